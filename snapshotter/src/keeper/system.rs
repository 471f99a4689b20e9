//! What the keeper needs of the kernel and the standard library does not have: waiting for several things at once,
//! signals as something to wait for, and starting a program with descriptors at given numbers.
#![allow(unsafe_code, reason = "poll(2), signalfd(2), fork(2) and _exit(2)")]

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

use rustix::process::Pid;

/// What a program that could not be started ends with, as shells have it.
const EXIT_NOT_STARTED: i32 = 127;

/// Waits until one of `descriptors` can be read or has ended, at most `timeout`. Which ones can.
///
/// # Errors
/// When the kernel has no memory.
pub(super) fn wait<const N: usize>(descriptors: [Option<&dyn AsFd>; N], timeout: Duration) -> io::Result<[bool; N]> {
    // A descriptor of -1 is passed over (poll(2)).
    let number = |descriptor: Option<&dyn AsFd>| descriptor.map_or(-1, |descriptor| descriptor.as_fd().as_raw_fd());
    let mut polled = descriptors.map(|one| libc::pollfd { fd: number(one), events: libc::POLLIN, revents: 0 });
    // Rounded up, so that what is due at the end of the timeout is due when it has passed.
    let timeout = i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    // SAFETY: `polled` lives through the call and has N elements.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, timeout) };
    match ready {
        0.. => Ok(polled.map(|one| one.revents != 0)),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok([false; N]),
            error => Err(error),
        },
    }
}

/// Whether the connection behind a FUSE descriptor has ended: unmounted, or aborted.
pub(crate) fn has_ended(device: &OwnedFd) -> bool {
    let mut polled = libc::pollfd { fd: device.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: `polled` lives through the call and is one element.
    let ready = unsafe { libc::poll(&raw mut polled, 1, 0) };
    ready > 0 && polled.revents & libc::POLLERR != 0
}

/// SIGTERM and SIGINT as something to read. They do nothing else to this process any more.
#[derive(Debug)]
pub(super) struct Signals {
    file: File,
}

impl Signals {
    /// Blocks the signals and makes the descriptor. To be called while the process has one thread.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(super) fn new() -> io::Result<Self> {
        let mut set = std::mem::MaybeUninit::uninit();
        // SAFETY: `sigemptyset` makes `set`, the others read it and live through the calls.
        let descriptor = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
            libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
            libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above has made the descriptor and given it to nobody else.
        Ok(Self { file: unsafe { File::from_raw_fd(descriptor) } })
    }

    /// Takes the signals that have come; whether there were any.
    pub(super) fn take(&mut self) -> bool {
        let mut taken = false;
        let mut one = [0; size_of::<libc::signalfd_siginfo>()];
        while self.file.read(&mut one).is_ok_and(|len| len > 0) {
            taken = true;
        }
        taken
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Starts `command` with `descriptors` at `first`, `first` + 1, ... and `LISTEN_PID` set to its process id.
///
/// The process must have one thread: what runs between fork(2) and exec(2) allocates memory.
///
/// # Errors
/// When there can be no process more. A program that cannot be started ends with 127.
pub(super) fn start(mut command: Command, descriptors: &[OwnedFd], first: i32) -> io::Result<Pid> {
    // SAFETY: this process has one thread (see above), so that no lock is held by a thread which the child lacks.
    let child = unsafe { libc::fork() };
    match child {
        ..0 => Err(io::Error::last_os_error()),
        0 => {
            let error = become_program(&mut command, descriptors, first);
            eprintln!("hermes: cannot start {}: {error}", command.get_program().display());
            exit_at_once(EXIT_NOT_STARTED)
        }
        _ => Pid::from_raw(child).ok_or_else(|| io::Error::other("fork(2) gave no process id")),
    }
}

/// In the child. Comes back only with what went wrong.
fn become_program(command: &mut Command, descriptors: &[OwnedFd], first: i32) -> io::Error {
    let end = first + descriptors.len() as i32;
    // First out of each other's way, then to their places: a place may be one that another descriptor has.
    let mut apart = Vec::new();
    for descriptor in descriptors {
        match rustix::io::fcntl_dupfd_cloexec(descriptor, end) {
            Ok(copy) => apart.push(copy),
            Err(error) => return error.into(),
        }
    }
    for (place, copy) in (first..).zip(&apart) {
        // SAFETY: the child owns all of its descriptors and ends or becomes another program without using them.
        if unsafe { libc::dup2(copy.as_raw_fd(), place) } < 0 {
            return io::Error::last_os_error();
        }
    }
    // SAFETY: `sigemptyset` makes the set, `sigprocmask` reads it; both live through the calls.
    unsafe {
        let mut none = std::mem::MaybeUninit::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
    command.env("LISTEN_PID", std::process::id().to_string()).exec()
}

/// Ends this process as a kill would, with `code`: nothing is dropped, nothing is flushed. For a daemon that hands over:
/// what waits for an answer is to be answered by the next one, and dropping it here would answer with an error.
pub fn exit_at_once(code: i32) -> ! {
    // SAFETY: _exit(2) touches no memory of this process.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn waiting_says_who_can_be_read() {
        let (one, other) = UnixDatagram::pair().expect("sockets");
        let moment = Duration::from_millis(1);
        assert_eq!(wait([Some(&one as &dyn AsFd), None], moment).expect("waits"), [false, false]);
        other.send(b"x").expect("sent");
        let ready = wait([None, Some(&one as &dyn AsFd), Some(&other as &dyn AsFd)], moment);
        assert_eq!(ready.expect("waits"), [false, true, false]);
    }
}
