//! The version of a node's state folder.
//!
//! It stands in the file `version`, as a decimal number. It is raised when something in the folder changes its meaning,
//! beyond what the store's own format covers. A daemon reads it before it touches anything else, and refuses what it
//! does not know; so a downgrade past a change ends with a message and leaves everything as it was. A folder of the
//! version before is brought up to date.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hermes_files::{READABLE, write_whole};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The version that this build writes. 0 had no record of what is mounted where; a folder of that time has no file.
pub const NEWEST: u32 = 1;
/// The oldest version that this build brings up to date.
pub const OLDEST: u32 = 0;

/// What a build can work with; `hermes node state-version` prints it for the build that would take its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateVersions {
    /// The oldest version that it brings up to date.
    pub oldest: u32,
    /// The version that it writes.
    pub newest: u32,
}

impl StateVersions {
    /// Those of this build.
    pub const OURS: Self = Self { oldest: OLDEST, newest: NEWEST };

    /// Whether a build with these can work with a folder of `version`.
    pub fn knows(self, version: u32) -> bool {
        (self.oldest..=self.newest).contains(&version)
    }
}

/// A state folder that cannot be used.
#[derive(Debug, Error)]
pub enum StateVersionError {
    /// It was written by a build of another time.
    #[error(
        "the state folder {} has version {found}, and this hermes knows {OLDEST} to {NEWEST}; run the version that wrote \
         it, or drain the node with that and use another folder",
        state.display()
    )]
    Unknown {
        /// The folder.
        state: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The file holds something else.
    #[error("{} holds no version number", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read or written.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// The version of the folder `state`; that of a new one is 0.
///
/// # Errors
/// When the file cannot be read or holds no number.
pub fn read(state: &Path) -> Result<u32, StateVersionError> {
    let path = state.join("version");
    match fs::read_to_string(&path) {
        Ok(text) => text.trim_end().parse().map_err(|_| StateVersionError::Damaged { path }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(source) => Err(StateVersionError::Io { what: "read", path, source }),
    }
}

/// Refuses what this build does not know, and brings up to date what is older. Nothing else has been touched before.
///
/// # Errors
/// When the version is unknown, or the file cannot be read or written.
pub fn open(state: &Path) -> Result<(), StateVersionError> {
    let found = read(state)?;
    if !StateVersions::OURS.knows(found) {
        return Err(StateVersionError::Unknown { state: state.to_owned(), found });
    }
    if found == NEWEST {
        return Ok(());
    }
    // From 0 to 1: the table of mounts is new, and empty until something is mounted.
    let path = state.join("version");
    write_whole(&path, READABLE, format!("{NEWEST}\n").as_bytes()).map_err(|source| StateVersionError::Io {
        what: "write",
        path,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_folders_are_brought_up_to_date_and_newer_ones_are_left_alone() {
        let state = tempfile::tempdir().expect("a folder");
        let file = state.path().join("version");
        for before in [None, Some("0"), Some("1\n")] {
            let _ = fs::remove_file(&file);
            if let Some(text) = before {
                fs::write(&file, text).expect("written");
            }
            open(state.path()).expect("opens");
            assert_eq!(read(state.path()).expect("reads"), NEWEST);
        }
        fs::write(&file, "2\n").expect("written");
        assert!(matches!(open(state.path()), Err(StateVersionError::Unknown { found: 2, .. })));
        assert_eq!(fs::read_to_string(&file).expect("reads"), "2\n");
        fs::write(&file, "two").expect("written");
        assert!(matches!(open(state.path()), Err(StateVersionError::Damaged { .. })));
    }
}
