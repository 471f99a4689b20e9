//! Taking over a FUSE connection that another process began.
//!
//! The kernel says INIT once in a connection's life, and `fuser` makes no session without having answered one. So the
//! session is made on a socket over which it is told an INIT of our own; its answer is read by nobody. Then the
//! connection takes the socket's place under the session's descriptor, before the session's threads begin to read.
//!
//! Requests that the earlier process had read and not answered are put back into the queue first
//! (`FUSE_NOTIFY_RESEND`, Linux 6.9): the kernel marks them by the highest bit of their number, and wants that bit in
//! the answer, where it stands anyway because an answer repeats the number. It must be first, or requests that this
//! process has read itself would be read twice. Only requests of a descriptor that is still open can be put back: what
//! was read through a clone (`FUSE_DEV_IOC_CLONE`) failed when the clone was closed, with its process. So a connection
//! that is to be taken over is read through one descriptor by all threads.
#![allow(unsafe_code, reason = "a descriptor is replaced under its owner, which dup3(2) does in one step")]

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use fuser::{Config, Filesystem, Session, SessionACL};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

// From linux/fuse.h.
const FUSE_INIT: u32 = 26;
const FUSE_KERNEL_VERSION: u32 = 7;
/// The protocol that has everything which this program could be asked (Linux 5.4); nothing depends on it later.
const FUSE_KERNEL_MINOR_VERSION: u32 = 31;
const FUSE_NOTIFY_RESEND: i32 = 7;
/// What the kernel offers by default; the connection keeps what it has.
const MAX_READAHEAD_BYTES: u32 = 128 << 10;
/// `struct fuse_in_header` and `struct fuse_init_in`.
const INIT_LEN_BYTES: usize = 40 + 64;
/// Number of the INIT that is made up here; no connection sees it.
const INIT_UNIQUE: u64 = 2;

/// What became of the requests that the earlier process had not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// They are asked again.
    Resent,
    /// This kernel cannot ask them again (before 6.9): whoever waits for one waits until the connection ends.
    Lost,
}

/// Asks the kernel to ask again what was read from `device` and never answered.
///
/// # Errors
/// When the connection is no more.
pub(super) fn resend(device: &OwnedFd) -> io::Result<Unanswered> {
    // `struct fuse_out_header` with number 0: a notice, whose kind stands where an answer has its error.
    let mut notice = [0; 16];
    notice[..4].copy_from_slice(&16_u32.to_ne_bytes());
    notice[4..8].copy_from_slice(&FUSE_NOTIFY_RESEND.to_ne_bytes());
    match rustix::io::write(device, &notice) {
        Ok(_) => Ok(Unanswered::Resent),
        Err(rustix::io::Errno::INVAL) => Ok(Unanswered::Lost),
        Err(error) => Err(error.into()),
    }
}

/// A session of `filesystem` on the connection `device`, which is past its INIT.
///
/// # Errors
/// When there are no descriptors left, or the file system refuses.
pub(super) fn session<F: Filesystem>(filesystem: F, device: &OwnedFd, options: Config) -> io::Result<Session<F>> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::write(&ours, &init_request())?;
    let session = Session::from_fd(filesystem, theirs, SessionACL::All, options)?;
    // SAFETY: both descriptors are open. The session owns its number before and after; only what the number stands for
    // changes, in one step, and no thread reads from it yet.
    let replaced = unsafe { libc::dup3(device.as_raw_fd(), session.as_fd().as_raw_fd(), libc::O_CLOEXEC) };
    if replaced < 0 { Err(io::Error::last_os_error()) } else { Ok(session) }
}

/// An INIT that offers everything, so that the file system asks for what it always asks.
fn init_request() -> [u8; INIT_LEN_BYTES] {
    let mut request = [0; INIT_LEN_BYTES];
    let mut put = |at: usize, value: &[u8]| request[at..at + value.len()].copy_from_slice(value);
    put(0, &(INIT_LEN_BYTES as u32).to_ne_bytes());
    put(4, &FUSE_INIT.to_ne_bytes());
    put(8, &INIT_UNIQUE.to_ne_bytes());
    put(40, &FUSE_KERNEL_VERSION.to_ne_bytes());
    put(44, &FUSE_KERNEL_MINOR_VERSION.to_ne_bytes());
    put(48, &MAX_READAHEAD_BYTES.to_ne_bytes());
    put(52, &u32::MAX.to_ne_bytes()); // flags
    put(56, &u32::MAX.to_ne_bytes()); // flags2
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;
    impl Filesystem for Nothing {}

    #[test]
    fn a_session_is_made_without_the_kernel_and_reads_from_the_descriptor_it_is_given() {
        let (device, other) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("sockets");
        let session = session(Nothing, &device, Config::default()).expect("a session");
        rustix::io::write(session.as_fd(), b"through the device").expect("written");
        let mut buffer = [0; 64];
        let len = rustix::io::read(&other, &mut buffer).expect("read");
        assert_eq!(&buffer[..len], b"through the device");
    }
}
