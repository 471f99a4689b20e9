//! Waiting for one's own FUSE files, without holding what answers for them.
//!
//! Mounting EROFS over layer files that this daemon serves waits for this daemon. If it is killed meanwhile, the thread that
//! waits is not: the kernel lets nobody out of a request that was taken and not answered, and only the end of the FUSE
//! connection answers it. A connection ends with its last descriptor, and a thread that waits holds those of its process; so
//! it would wait for itself, for ever, and keep everybody waiting who syncs or drops caches.
//!
//! [`apart`] therefore works on a thread whose descriptor table is its own, and empty. With a keeper, which holds the
//! descriptors too, the next daemon answers instead.
#![allow(unsafe_code, reason = "a thread leaves its process's descriptor table: unshare(2), close_range(2)")]

use std::io;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Runs `work` on a thread without any descriptor but the standard ones, and waits for it. What `work` opens is its own and
/// is closed when it ends; it must not use or return a descriptor of anybody else.
///
/// # Errors
/// When there is no thread, or the kernel refuses it a table of its own. `work` has not run then.
pub(super) fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("mount".to_owned()).spawn_scoped(scope, || {
            leave_descriptors()?;
            Ok(work())
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn leave_descriptors() -> io::Result<()> {
    // SAFETY: From here on a number means something else on this thread. It was just begun and owns no descriptor; `work`
    // gets none by the contract of `apart`, and brings none back.
    unsafe { unshare_unsafe(UnshareFlags::FILES) }?;
    // SAFETY: The table is this thread's alone by now, and nothing on this thread owns a descriptor of it.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn the_work_holds_none_of_the_processes_descriptors_and_takes_none_away() {
        let (mut reader, mut writer) = io::pipe().expect("a pipe");
        let (held, read_fd) = (writer.as_raw_fd(), reader.as_raw_fd());
        let is_open = |fd: i32| std::fs::symlink_metadata(format!("/proc/thread-self/fd/{fd}")).is_ok();
        let seen = apart(|| (is_open(held), is_open(read_fd), is_open(2))).expect("a thread");
        assert_eq!(seen, (false, false, true));
        writer.write_all(b"x").expect("still open here");
        drop(writer);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).expect("reads");
        assert_eq!(rest, b"x", "nobody else holds the writer");
    }

    #[test]
    fn what_the_work_returns_comes_back() {
        let file = apart(|| std::fs::read_to_string("/proc/thread-self/comm")).expect("a thread").expect("reads");
        assert_eq!(file, "mount\n");
    }
}
