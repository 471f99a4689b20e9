//! Where artifacts are kept: a folder, or a bucket by its address.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::local::LocalFileSystem;
use object_store::parse_url_opts;
use object_store::prefix::PrefixStore;

use super::ArtifactsError;
use super::store::Store;

/// Schemes of the stores that are built in.
const SCHEMES: [&str; 5] = ["s3://", "s3a://", "gs://", "az://", "abfss://"];
/// Longest time that one request may take, as stores are told it: an artifact of 1 GiB at 4 MB/s. Their own default,
/// 30 s, is too short for the tables of contents of large images over a slow line.
const REQUEST_TIMEOUT: (&str, &str) = ("timeout", "5 minutes");

/// A store of objects, and how much it can be relied on.
#[derive(Debug)]
pub(super) struct Place {
    /// The store.
    pub(super) store: Store,
    /// Its address without secrets, for messages.
    pub(super) name: String,
    /// Whether bytes may rot without anybody noticing: a disk, and not a store that keeps checksums.
    pub(super) may_rot: bool,
}

/// Opens `location`: the address of a bucket, or else a folder, which is made.
///
/// Buckets take their logins and regions from `environment`, by the usual names (`AWS_*`, `GOOGLE_*`, `AZURE_*`).
pub(super) fn open(
    location: &str,
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Place, ArtifactsError> {
    let wrong = |reason: String| ArtifactsError::Location { location: location.to_owned(), reason };
    if !location.contains("://") {
        return open_folder(Path::new(location));
    }
    if !SCHEMES.iter().any(|scheme| location.starts_with(scheme)) {
        return Err(wrong(format!("write a folder, or an address that begins with {}, or oci://", SCHEMES.join(", "))));
    }
    // The HTTP client of the stores takes the process's; it fails only when there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let Ok(url) = location.parse() else { return Err(wrong("it is no address".to_owned())) };
    // Names that a store does not know are passed over by it.
    let environment = environment.filter_map(|(name, value)| {
        let name = name.into_string().ok()?.to_ascii_lowercase();
        let known = ["aws_", "google_", "azure_"].iter().any(|prefix| name.starts_with(prefix));
        known.then_some(())?;
        Some((name, value.into_string().ok()?))
    });
    let defaults = [(REQUEST_TIMEOUT.0.to_owned(), REQUEST_TIMEOUT.1.to_owned())];
    let (store, path) =
        parse_url_opts(&url, defaults.into_iter().chain(environment)).map_err(|error| wrong(error.to_string()))?;
    let store = Store::Objects(Arc::new(PrefixStore::new(store, path)));
    Ok(Place { store, name: location.to_owned(), may_rot: false })
}

/// The folder is its owner's alone: a table of contents tells an image's names, and windows hold bytes of its files.
fn open_folder(path: &Path) -> Result<Place, ArtifactsError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let failed = |source| ArtifactsError::Folder { path: path.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    let path = path.canonicalize().map_err(failed)?;
    remove_unfinished(&path).map_err(failed)?;
    let store = LocalFileSystem::new_with_prefix(&path).map_err(|error| ArtifactsError::Location {
        location: path.display().to_string(),
        reason: error.to_string(),
    })?;
    let name = path.display().to_string();
    Ok(Place { store: Store::Objects(Arc::new(store.with_fsync(true))), name, may_rot: true })
}

/// Files that a crash left half written: the store writes to `NAME#NUMBER` and renames, and never lists such names.
fn remove_unfinished(root: &Path) -> std::io::Result<()> {
    for kind in super::KINDS {
        let folder: PathBuf = root.join(kind);
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.rsplit_once('#')).map(|(_, number)| number);
            if number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())) {
                std::fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let folder = tempfile::tempdir().expect("a folder");
        let place = folder.path().join("a/b");
        assert!(open(place.to_str().expect("a text"), std::iter::empty()).expect("made").may_rot);
        for address in ["s3://bucket/prefix", "gs://bucket", "az://container/prefix"] {
            let environment = [("AZURE_STORAGE_ACCOUNT_NAME", "account"), ("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")];
            let environment = environment.map(|(name, value)| (name.into(), value.into()));
            let place = open(address, environment.into_iter()).expect(address);
            assert_eq!((place.name.as_str(), place.may_rot), (address, false));
        }
        for nonsense in ["ftp://host/a", "s3://", "http://host/a"] {
            assert!(matches!(open(nonsense, std::iter::empty()), Err(ArtifactsError::Location { .. })), "{nonsense}");
        }
    }
}
