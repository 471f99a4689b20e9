//! Index artifacts and trees: immutable files named by their content.
//!
//! Written under a temporary name, synced, renamed, folder synced: under its own name an artifact is whole or not
//! there. A crash leaves temporary files, which the next open removes. Every read checks the bytes against the name
//! (BLAKE3 takes 0.3 ms a MB), and removes a file that fails, so that the next look says "absent" and it is fetched
//! again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hermes_image::ids::ArtifactId;
use hermes_image::verify::Verified;

use crate::error::StoreError;
use crate::map::map_artifact;
use crate::shared::Shared;

/// What temporary names begin with. No hexadecimal name does.
pub(crate) const TEMPORARY_PREFIX: &str = ".tmp-";
/// How long a file that was right counts as right: whoever reads a layer asks for its windows within minutes, and a disk
/// that rots is noticed before long.
const CHECKED_FOR: Duration = Duration::from_secs(600);
/// Files that are remembered as right; when there are more, all are checked once again.
const CHECKED_MAX: usize = 4096;
/// Artifacts of at least this many bytes are mapped, shorter ones read: a mapping costs a page table and two faults.
const MAP_MIN_BYTES: u64 = 64 << 10;

/// Which file it is, and whether it was written since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    inode: u64,
    len_bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Ok(Self { inode: metadata.ino(), len_bytes: metadata.len(), modified })
    }
}

/// Files that were right, and when.
pub(crate) type CheckedArtifacts = BTreeMap<ArtifactId, (Stamp, Instant)>;

impl Shared {
    pub(crate) fn artifact_path(&self, id: ArtifactId) -> PathBuf {
        self.artifacts_dir().join(id.hex())
    }

    pub(crate) fn put_artifact(self: &Arc<Self>, bytes: &Verified<Bytes>) -> Result<ArtifactId, StoreError> {
        self.stage_artifact(bytes)?.keep()
    }

    pub(crate) fn artifact(&self, id: ArtifactId) -> Result<Option<Bytes>, StoreError> {
        let path = self.artifact_path(id);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreError::io("open", &path)(source)),
        };
        let bytes = read_whole(&file).map_err(StoreError::io("read", &path))?;
        let len_bytes = bytes.len() as u64;
        match Verified::artifact(id, bytes) {
            Ok(bytes) => Ok(Some(bytes.into_inner())),
            Err(_) => {
                self.counters.damaged_artifacts.add(1);
                self.remove_artifact_file(&path, len_bytes)?;
                Err(StoreError::DamagedArtifact { id })
            }
        }
    }

    /// The same, but a large file that was found right a while ago and is still the same file is not hashed again.
    pub(crate) fn artifact_checked_lately(&self, id: ArtifactId) -> Result<Option<Bytes>, StoreError> {
        let path = self.artifact_path(id);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreError::io("open", &path)(source)),
        };
        let found = Stamp::of(&file).map_err(StoreError::io("stat", &path))?;
        let known = self.checked_artifacts.lock().get(&id).copied();
        if known.is_some_and(|(stamp, at)| stamp == found && at.elapsed() < CHECKED_FOR) {
            self.counters.artifacts_not_hashed.add(1);
            return read_whole(&file).map(Some).map_err(StoreError::io("read", &path));
        }
        let bytes = self.artifact(id)?;
        if bytes.is_some() && found.len_bytes >= MAP_MIN_BYTES {
            let mut checked = self.checked_artifacts.lock();
            if checked.len() >= CHECKED_MAX {
                checked.clear();
            }
            checked.insert(id, (found, Instant::now()));
        }
        Ok(bytes)
    }

    fn remove_artifact_file(&self, path: &Path, len_bytes: u64) -> Result<(), StoreError> {
        match fs::remove_file(path) {
            Ok(()) => {
                self.space.adjust(len_bytes, 0);
                let less = |total: u64| Some(total.saturating_sub(len_bytes));
                // The closure always answers, so the update always happens.
                let _ = self.artifact_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(StoreError::io("remove", path)(source)),
        }
    }

    /// Removes those of `artifacts` that are not in `keep`.
    pub(crate) fn remove_artifacts(
        &self,
        artifacts: &[ArtifactId],
        keep: &BTreeSet<ArtifactId>,
    ) -> Result<(), StoreError> {
        for id in artifacts.iter().filter(|id| !keep.contains(id)) {
            let path = self.artifact_path(*id);
            let len_bytes = match fs::metadata(&path) {
                Ok(metadata) => metadata.len(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(StoreError::io("stat", &path)(source)),
            };
            self.remove_artifact_file(&path, len_bytes)?;
        }
        Ok(())
    }

    /// Removes every artifact that is not in `keep`; the bytes that came back.
    pub(crate) fn remove_artifacts_but(
        &self,
        keep: &BTreeSet<ArtifactId>,
        also: &dyn Fn(ArtifactId) -> bool,
    ) -> Result<u64, StoreError> {
        let dir = self.artifacts_dir();
        let mut freed = 0;
        for entry in fs::read_dir(&dir).map_err(StoreError::io("list", &dir))? {
            let entry = entry.map_err(StoreError::io("list", &dir))?;
            let Some(id) = artifact_of(&entry.file_name().to_string_lossy()) else { continue };
            if keep.contains(&id) || also(id) {
                continue;
            }
            let len_bytes = entry.metadata().map_err(StoreError::io("stat", &entry.path()))?.len();
            self.remove_artifact_file(&entry.path(), len_bytes)?;
            freed += len_bytes;
        }
        Ok(freed)
    }
}

/// The artifact whose file has this name, if it is one.
pub(crate) fn artifact_of(name: &str) -> Option<ArtifactId> {
    format!("blake3:{name}").parse().ok()
}

pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn read_whole(file: &File) -> io::Result<Bytes> {
    let len_bytes = file.metadata()?.len();
    if len_bytes >= MAP_MIN_BYTES {
        return map_artifact(file);
    }
    // Bounded by MAP_MIN_BYTES.
    let mut bytes = Vec::with_capacity(len_bytes as usize);
    file.take(MAP_MIN_BYTES).read_to_end(&mut bytes)?;
    Ok(Bytes::from(bytes))
}

/// Makes names in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(StoreError::io("sync", dir))
}
