//! A folder of indexes: what `hermes index build --output` writes and a node without a controller reads.
//!
//! ```text
//! statements/<manifest digest, hex>.json   the signed statement
//! artifacts/<BLAKE3, hex>                  an artifact in its wire form
//! profiles/<manifest digest, hex>          what starts of the image read; a hint, which nobody signs
//! ```
//!
//! Files are written under a temporary name, synced and renamed, so a reader never sees half of one. Nothing in the
//! folder is trusted: statements are checked by signature, artifacts by their name. Only their owner can read the
//! files: a table of contents tells an image's names, and windows hold bytes of its files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use hermes_files::{OWNER_ONLY, write_whole};
use hermes_image::ids::{ArtifactId, Digest};
use hermes_image::index::wire;
use hermes_image::verify::Verified;
use hermes_policy::profile::PROFILE_LEN_MAX_BYTES;
use thiserror::Error;

/// Longest artifact that is read, in bytes of its plain form: the table of contents of two million files.
pub const ARTIFACT_LEN_MAX_BYTES: usize = 1 << 30;

/// Longest reference that is believed, in bytes: a host, a repository and a tag at their longest (253, 255 and 128 by
/// the distribution spec), with room.
const REFERENCE_LEN_MAX_BYTES: usize = 1024;

/// A folder of indexes that cannot be read or written.
#[derive(Debug, Error)]
pub enum IndexFolderError {
    /// The file system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The file is not what its name says.
    #[error("{} is damaged ({reason}); delete it and build the index again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How.
        reason: String,
    },
}

/// A folder of indexes.
#[derive(Debug, Clone)]
pub struct IndexFolder {
    path: PathBuf,
}

impl IndexFolder {
    /// The folder at `path`, which need not exist before something is written to it.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn statement_path(&self, manifest: Digest) -> PathBuf {
        self.path.join("statements").join(format!("{}.json", manifest.hex()))
    }

    fn reference_path(&self, manifest: Digest) -> PathBuf {
        self.path.join("references").join(manifest.hex())
    }

    fn profile_path(&self, manifest: Digest) -> PathBuf {
        self.path.join("profiles").join(manifest.hex())
    }

    fn artifact_path(&self, id: ArtifactId) -> PathBuf {
        self.path.join("artifacts").join(id.hex())
    }

    /// The signed statement about `manifest`, unchecked.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn statement(&self, manifest: Digest) -> Result<Option<Vec<u8>>, IndexFolderError> {
        read(&self.statement_path(manifest))
    }

    /// The manifests that it has statements about.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn manifests(&self) -> Result<Vec<Digest>, IndexFolderError> {
        let path = self.path.join("statements");
        let failed = |source| IndexFolderError::Io { action: "list", path: path.clone(), source };
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut manifests = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            let hex = name.to_str().and_then(|name| name.strip_suffix(".json"));
            // Others are somebody's temporary files.
            manifests.extend(hex.and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok()));
        }
        Ok(manifests)
    }

    /// Where `manifest` was indexed from, for whoever is not told otherwise. Nobody has signed it; whatever is read
    /// from there is checked.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn reference(&self, manifest: Digest) -> Result<Option<String>, IndexFolderError> {
        let text = read(&self.reference_path(manifest))?;
        Ok(text.filter(|text| text.len() <= REFERENCE_LEN_MAX_BYTES).and_then(|text| String::from_utf8(text).ok()))
    }

    /// Writes down where `manifest` is from.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_reference(&self, manifest: Digest, reference: &str) -> Result<(), IndexFolderError> {
        write(&self.reference_path(manifest), reference.as_bytes())
    }

    /// What starts of `manifest` read, unchecked; `None` also when it is longer than a profile may be.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn profile(&self, manifest: Digest) -> Result<Option<Vec<u8>>, IndexFolderError> {
        Ok(read(&self.profile_path(manifest))?.filter(|bytes| bytes.len() <= PROFILE_LEN_MAX_BYTES))
    }

    /// Writes down what starts of `manifest` read.
    ///
    /// # Errors
    /// When it cannot be written; an older one stays.
    pub fn put_profile(&self, manifest: Digest, profile: &[u8]) -> Result<(), IndexFolderError> {
        write(&self.profile_path(manifest), profile)
    }

    /// The artifact `id`.
    ///
    /// # Errors
    /// When it is there and cannot be read, or is something else.
    pub fn artifact(&self, id: ArtifactId) -> Result<Option<Verified<Bytes>>, IndexFolderError> {
        let path = self.artifact_path(id);
        let Some(packed) = read(&path)? else { return Ok(None) };
        let damaged = |reason: String| IndexFolderError::Damaged { path: path.clone(), reason };
        let plain = wire::unpack(&packed, ARTIFACT_LEN_MAX_BYTES).map_err(|error| damaged(error.to_string()))?;
        Verified::artifact(id, plain).map(Some).map_err(|error| damaged(error.to_string()))
    }

    /// Writes a signed statement about `manifest`.
    ///
    /// # Errors
    /// When it cannot be written; an older one stays.
    pub fn put_statement(&self, manifest: Digest, signed: &[u8]) -> Result<(), IndexFolderError> {
        write(&self.statement_path(manifest), signed)
    }

    /// Removes what it says about `manifest`; artifacts stay.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove(&self, manifest: Digest) -> Result<(), IndexFolderError> {
        for path in [self.statement_path(manifest), self.reference_path(manifest), self.profile_path(manifest)] {
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(IndexFolderError::Io { action: "remove", path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Writes an artifact, in its wire form. Returns the length of that form in bytes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_artifact(&self, id: ArtifactId, plain: &Verified<Bytes>) -> Result<u64, IndexFolderError> {
        let packed = wire::pack(plain);
        write(&self.artifact_path(id), &packed)?;
        Ok(packed.len() as u64)
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, IndexFolderError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(IndexFolderError::Io { action: "read", path: path.to_owned(), source }),
    }
}

/// Only its owner can read it: images may be private, and whoever hands an index on does so knowingly.
fn write(path: &Path, bytes: &[u8]) -> Result<(), IndexFolderError> {
    path.parent()
        .map_or(Ok(()), fs::create_dir_all)
        .and_then(|()| write_whole(path, OWNER_ONLY, bytes))
        .map_err(|source| IndexFolderError::Io { action: "write", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn nobody_else_can_read_an_index() {
        let temporary = tempfile::tempdir().expect("a temporary folder");
        let folder = IndexFolder::new(temporary.path());
        let (id, artifact) = Verified::named(Bytes::from_static(b"names and bytes of a private image"));
        folder.put_artifact(id, &artifact).expect("written");
        folder.put_statement(Digest([1; 32]), b"signed").expect("written");
        for path in [folder.artifact_path(id), folder.statement_path(Digest([1; 32]))] {
            let mode = fs::metadata(&path).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, OWNER_ONLY, "{}", path.display());
        }
    }

    #[test]
    fn manifests_are_listed_with_where_they_are_from() {
        let temporary = tempfile::tempdir().expect("a temporary folder");
        let folder = IndexFolder::new(temporary.path());
        let manifest = Digest([1; 32]);
        assert_eq!(folder.manifests().expect("an empty list"), []);
        folder.put_statement(manifest, b"signed").expect("written");
        fs::write(temporary.path().join("statements/other.tmp1"), b"").expect("written");
        assert_eq!(folder.manifests().expect("listed"), [manifest]);
        assert_eq!(folder.reference(manifest).expect("nothing"), None);
        folder.put_reference(manifest, "registry.test/a:b").expect("written");
        assert_eq!(folder.reference(manifest).expect("there").as_deref(), Some("registry.test/a:b"));
    }

    #[test]
    fn artifacts_round_trip_and_damage_is_named() {
        let temporary = tempfile::tempdir().expect("a temporary folder");
        let folder = IndexFolder::new(temporary.path().join("indexes"));
        let (id, artifact) = Verified::named(Bytes::from(vec![7; 10_000]));
        assert!(folder.artifact(id).expect("readable").is_none());
        let packed = folder.put_artifact(id, &artifact).expect("written");
        assert!(packed < 1_000, "an artifact is compressed at rest");
        assert_eq!(folder.artifact(id).expect("readable").expect("there"), artifact);
        fs::write(folder.artifact_path(id), wire::pack(b"something else")).expect("written");
        let error = folder.artifact(id).expect_err("damaged").to_string();
        assert!(error.contains(&id.hex()), "{error}");
    }
}
