//! Which program the keeper starts as the daemon: the one that an upgrade has named, else its own.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use hermes_files::{READABLE, write_whole};

/// Longest path of a program, in bytes (linux/limits.h, `PATH_MAX`).
const PATH_MAX_BYTES: usize = 4096;

fn file(state: &Path) -> PathBuf {
    state.join("program")
}

/// The program that was named; `None` when none was, or what is written down cannot be one.
pub fn program(state: &Path) -> Option<PathBuf> {
    let mut bytes = fs::read(file(state)).ok()?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    let path = PathBuf::from(OsString::from_vec(bytes));
    (path.is_absolute() && path.as_os_str().len() <= PATH_MAX_BYTES).then_some(path)
}

/// Names `program`, or none, durably: from the next start on it is the daemon.
///
/// # Errors
/// When the state folder cannot be written.
pub fn set_program(state: &Path, program: Option<&Path>) -> io::Result<()> {
    let file = file(state);
    let Some(program) = program else {
        return match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    write_whole(&file, READABLE, &[program.as_os_str().as_bytes(), b"\n"].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_remembered_until_it_is_taken_back() {
        let state = tempfile::tempdir().expect("a folder");
        assert_eq!(program(state.path()), None);
        set_program(state.path(), Some(Path::new("/opt/hermes 2/hermes"))).expect("written");
        assert_eq!(program(state.path()), Some(PathBuf::from("/opt/hermes 2/hermes")));
        set_program(state.path(), None).expect("removed");
        set_program(state.path(), None).expect("nothing to remove");
        assert_eq!(program(state.path()), None);
        fs::write(file(state.path()), "relative").expect("written");
        assert_eq!(program(state.path()), None);
    }
}
