//! Changing several files so that all change or none does.
//!
//! A [`Transaction`] replaces, links and removes files one by one, each atomically, and keeps what stood there under
//! another name beside it. Dropped without [`Transaction::commit`], it puts everything back, newest first. A crash in
//! between leaves some files new and `.hermes-saved` names beside them; the command run again finishes the work and
//! takes such names over.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use super::InstallError;

/// What undoes one step.
#[derive(Debug)]
enum Undo {
    /// Remove what was not there.
    Remove(PathBuf),
    /// Put back what was saved.
    Restore { saved: PathBuf, path: PathBuf },
    /// Remove a folder that was made.
    RemoveDir(PathBuf),
}

/// Where new contents come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Contents<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// The bytes of another file.
    File(&'a Path),
}

/// Steps that are undone together.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    undo: Vec<Undo>,
    /// What was done, for people.
    pub(super) done: Vec<String>,
}

impl Transaction {
    /// Makes `dir` and what leads to it.
    pub(super) fn make_dir(&mut self, dir: &Path) -> Result<(), InstallError> {
        if dir.is_dir() {
            return Ok(());
        }
        if let Some(parent) = dir.parent() {
            self.make_dir(parent)?;
        }
        fs::create_dir(dir).map_err(InstallError::io("make", dir))?;
        self.undo.push(Undo::RemoveDir(dir.to_owned()));
        Ok(())
    }

    /// Puts `contents` at `path` with `mode`, atomically and durably. A file that is replaced keeps its mode and owner.
    /// Does nothing when they are there already, and says so with false.
    pub(super) fn replace(&mut self, path: &Path, contents: Contents<'_>, mode: u32) -> Result<bool, InstallError> {
        let old = match fs::metadata(path) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(InstallError::io("look at", path)(error)),
        };
        if old.is_some() && equal(path, contents).map_err(InstallError::io("read", path))? {
            return Ok(false);
        }
        if let Some(parent) = path.parent() {
            self.make_dir(parent)?;
        }
        let new = beside(path, "new");
        let written = write_new(&new, contents, old.as_ref(), mode);
        if let Err(error) = written {
            let _ = fs::remove_file(&new);
            return Err(InstallError::io("write", new)(error));
        }
        if old.is_some() {
            self.save(path)?;
        }
        fs::rename(&new, path).map_err(InstallError::io("replace", path))?;
        sync_folder_of(path).map_err(InstallError::io("sync the folder of", path))?;
        if old.is_none() {
            self.undo.push(Undo::Remove(path.to_owned()));
        }
        self.done.push(format!("wrote {}", path.display()));
        Ok(true)
    }

    /// Makes the link `path` to `target`, unless it is there.
    pub(super) fn link(&mut self, path: &Path, target: &Path) -> Result<(), InstallError> {
        if fs::read_link(path).is_ok_and(|now| now == target) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.make_dir(parent)?;
        }
        self.remove(path)?;
        std::os::unix::fs::symlink(target, path).map_err(InstallError::io("link", path))?;
        self.undo.push(Undo::Remove(path.to_owned()));
        self.done.push(format!("linked {}", path.display()));
        Ok(())
    }

    /// Removes the file at `path`, if there is one.
    pub(super) fn remove(&mut self, path: &Path) -> Result<(), InstallError> {
        if fs::symlink_metadata(path).is_err() {
            return Ok(());
        }
        let saved = beside(path, "saved");
        fs::rename(path, &saved).map_err(InstallError::io("remove", path))?;
        self.undo.push(Undo::Restore { saved, path: path.to_owned() });
        self.done.push(format!("removed {}", path.display()));
        Ok(())
    }

    /// Keeps what is at `path` under another name; the file stays where it is.
    fn save(&mut self, path: &Path) -> Result<(), InstallError> {
        let saved = beside(path, "saved");
        let _ = fs::remove_file(&saved);
        fs::hard_link(path, &saved).map_err(InstallError::io("keep", path))?;
        self.undo.push(Undo::Restore { saved, path: path.to_owned() });
        Ok(())
    }

    /// Makes it final. Says what was done.
    pub(super) fn commit(mut self) -> Vec<String> {
        for undo in std::mem::take(&mut self.undo) {
            if let Undo::Restore { saved, .. } = undo
                && let Err(error) = fs::remove_file(&saved)
            {
                tracing::warn!(path = %saved.display(), %error, "a saved copy stays behind");
            }
        }
        std::mem::take(&mut self.done)
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        while let Some(undo) = self.undo.pop() {
            let (path, result) = match undo {
                Undo::Remove(path) => (path.clone(), fs::remove_file(path)),
                Undo::Restore { saved, path } => (path.clone(), fs::rename(saved, path)),
                Undo::RemoveDir(path) => (path.clone(), fs::remove_dir(path)),
            };
            if let Err(error) = result {
                tracing::error!(path = %path.display(), %error, "cannot put it back as it was");
            }
        }
    }
}

/// A name beside `path` that no program takes for its own. It is the same in each run, so that what a killed run left
/// is taken over.
pub(super) fn beside(path: &Path, role: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.hermes-{role}"))
}

fn write_new(new: &Path, contents: Contents<'_>, like: Option<&fs::Metadata>, mode: u32) -> io::Result<()> {
    let _ = fs::remove_file(new);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(new)?;
    match contents {
        Contents::Bytes(bytes) => file.write_all(bytes)?,
        Contents::File(source) => drop(io::copy(&mut File::open(source)?, &mut file)?),
    }
    if let Some(like) = like {
        std::os::unix::fs::fchown(&file, Some(like.uid()), Some(like.gid()))?;
    }
    file.set_permissions(fs::Permissions::from_mode(like.map_or(mode, |like| like.mode() & 0o7777)))?;
    file.sync_all()
}

fn equal(path: &Path, contents: Contents<'_>) -> io::Result<bool> {
    let mut there = File::open(path)?;
    match contents {
        Contents::Bytes(bytes) => {
            if there.metadata()?.len() != bytes.len() as u64 {
                return Ok(false);
            }
            let mut read = Vec::with_capacity(bytes.len());
            there.read_to_end(&mut read)?;
            Ok(read == bytes)
        }
        Contents::File(source) => {
            let mut source = File::open(source)?;
            let (one, other) = (there.metadata()?, source.metadata()?);
            if one.len() != other.len() {
                return Ok(false);
            }
            if (one.dev(), one.ino()) == (other.dev(), other.ino()) {
                return Ok(true);
            }
            let (mut one, mut other) = (vec![0; 64 << 10], vec![0; 64 << 10]);
            loop {
                let len = there.read(&mut one)?;
                if len == 0 {
                    return Ok(true);
                }
                source.read_exact(&mut other[..len])?;
                if one[..len] != other[..len] {
                    return Ok(false);
                }
            }
        }
    }
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(dir: &Path) -> Vec<(PathBuf, Option<Vec<u8>>, u32)> {
        let mut found = Vec::new();
        let mut folders = vec![dir.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                let metadata = fs::symlink_metadata(&path).expect("metadata");
                if metadata.is_dir() {
                    folders.push(path.clone());
                }
                let bytes = metadata.is_file().then(|| fs::read(&path).expect("a file"));
                found.push((path, bytes, metadata.mode()));
            }
        }
        found.sort();
        found
    }

    #[test]
    fn dropped_it_leaves_everything_as_it_was_and_committed_it_leaves_nothing_over() {
        let dir = tempfile::tempdir().expect("a folder");
        let at = |name: &str| dir.path().join(name);
        fs::write(at("replaced"), "old").expect("a file");
        fs::set_permissions(at("replaced"), fs::Permissions::from_mode(0o640)).expect("a mode");
        fs::write(at("removed"), "old").expect("a file");
        let before = tree(dir.path());
        let change = || {
            let mut files = Transaction::default();
            assert!(files.replace(&at("replaced"), Contents::Bytes(b"new"), 0o600).expect("replaced"));
            assert!(!files.replace(&at("replaced"), Contents::Bytes(b"new"), 0o600).expect("as it is"));
            assert!(files.replace(&at("a/b/made"), Contents::File(&at("replaced")), 0o755).expect("made"));
            files.link(&at("a/link"), Path::new("b/made")).expect("linked");
            files.remove(&at("removed")).expect("removed");
            files
        };
        drop(change());
        assert_eq!(tree(dir.path()), before);
        change().commit();
        let mut names = tree(dir.path());
        names.retain(|(path, ..)| path.extension().is_some() || path.to_string_lossy().contains("hermes-"));
        assert_eq!(names, []);
        assert_eq!(fs::read(at("a/link")).expect("through the link"), b"new");
        assert_eq!(fs::metadata(at("replaced")).expect("there").mode() & 0o777, 0o640);
        assert_eq!(fs::metadata(at("a/b/made")).expect("there").mode() & 0o777, 0o755);
        assert!(!at("removed").exists());
    }
}
