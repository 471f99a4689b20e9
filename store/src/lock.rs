//! One process a store.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;

use crate::error::StoreError;

/// An exclusive lock on a store's folder: `flock` on the file `lock`, gone with the process however it ends. The file
/// holds the process id of its last holder, for the message that the next one gets.
#[derive(Debug)]
pub(crate) struct DirLock {
    _file: File,
}

impl DirLock {
    /// Locks `dir`, which exists.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when somebody has it.
    pub(crate) fn take(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(StoreError::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                // A process id has at most 7 digits; anything longer is not ours to print.
                let read = (&file).take(16).read_to_string(&mut owner);
                let owner = match (read, owner.trim().parse::<u32>()) {
                    (Ok(_), Ok(id)) => format!("process {id}"),
                    _ => "another process".to_owned(),
                };
                return Err(StoreError::InUse { dir: dir.to_path_buf(), owner });
            }
            Err(TryLockError::Error(source)) => return Err(StoreError::io("lock", &path)(source)),
        }
        file.set_len(0).map_err(StoreError::io("write", &path))?;
        file.rewind().map_err(StoreError::io("write", &path))?;
        writeln!(file, "{}", std::process::id()).map_err(StoreError::io("write", &path))?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_holder_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().expect("a folder");
        let first = DirLock::take(dir.path()).expect("free");
        match DirLock::take(dir.path()) {
            Err(StoreError::InUse { owner, .. }) => assert_eq!(owner, format!("process {}", std::process::id())),
            other => panic!("{other:?}"),
        }
        drop(first);
        DirLock::take(dir.path()).expect("free again");
    }
}
