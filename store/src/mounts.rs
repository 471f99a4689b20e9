//! Notes of what is mounted where, so that a node that starts again finds what the one before it has shown.
//!
//! The store keeps them and does not read them: what a note says is its owner's business. A note is durable when
//! [`Store::put_mount`] returns, so a mount that is made afterwards is never without one; a crash in between leaves a
//! note of something that is not mounted, which the owner finds out by looking.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use crate::error::StoreError;
use crate::store::Store;

impl Store {
    /// Keeps `note` for the mount point `dir`, durably; replaces what was noted before.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn put_mount(&self, dir: &Path, note: &[u8]) -> Result<(), StoreError> {
        self.shared.catalogue.set_mount(dir.as_os_str().as_bytes(), Some(note))
    }

    /// Forgets the note of `dir`, durably. Nothing happens when there is none.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn remove_mount(&self, dir: &Path) -> Result<(), StoreError> {
        self.shared.catalogue.set_mount(dir.as_os_str().as_bytes(), None)
    }

    /// Every mount point with its note, by path.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn mounts(&self) -> Result<Vec<(PathBuf, Vec<u8>)>, StoreError> {
        let mounts = self.shared.catalogue.mounts()?;
        let path = |key: Box<[u8]>| PathBuf::from(OsString::from_vec(key.into_vec()));
        Ok(mounts.into_iter().map(|(key, note)| (path(key), note.into_vec())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StoreConfig;

    #[test]
    fn notes_are_kept_by_path_and_survive() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = PathBuf::from(OsString::from_vec(b"/a/not utf-8 \xff".to_vec()));
        let store = Store::open(StoreConfig::new(folder.path())).expect("opens");
        store.put_mount(&dir, b"first").expect("kept");
        store.put_mount(&dir, b"second").expect("replaced");
        store.put_mount(Path::new("/b"), b"third").expect("kept");
        store.remove_mount(Path::new("/b")).expect("forgotten");
        store.remove_mount(Path::new("/c")).expect("nothing to forget");
        drop(store);
        let store = Store::open(StoreConfig::new(folder.path())).expect("opens again");
        assert_eq!(store.mounts().expect("reads"), vec![(dir, b"second".to_vec())]);
    }
}
