//! The authority's document in a folder, for controllers without Kubernetes.
//!
//! One file that only its owner can read, and the roots beside it. Each is there whole or not at all; a crash between the
//! two leaves the roots of the generation before, until the next start writes them anew.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use hermes_files::{OWNER_ONLY, write_whole};
use hermes_p2p::ClusterId;
use zeroize::Zeroizing;

use super::document::DOCUMENT_LEN_MAX_BYTES;
use super::{Authority, AuthorityError};

/// The document.
const DOCUMENT: &str = "authority.json";
/// The roots, for nodes to be given.
const ROOTS: &str = "ca.pem";

/// Where an authority is kept.
#[derive(Debug, Clone)]
pub struct AuthorityFolder {
    path: PathBuf,
}

impl AuthorityFolder {
    /// The folder at `path`, which is made when something is kept.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The file with the roots as PEM, for `hermes node --controller-ca`.
    pub fn roots_path(&self) -> PathBuf {
        self.path.join(ROOTS)
    }

    /// What is kept there for `cluster`; `None` when nothing is. Blocks.
    ///
    /// # Errors
    /// When the file cannot be read, can be read by others, or holds something else.
    pub fn load(&self, cluster: &ClusterId) -> Result<Option<Authority>, AuthorityError> {
        let path = self.path.join(DOCUMENT);
        let failed = |source| AuthorityError::Io { doing: "read", path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(AuthorityError::Exposed { path, mode });
        }
        let mut bytes = Zeroizing::new(Vec::new());
        file.take(DOCUMENT_LEN_MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
        Authority::from_document(&bytes, cluster).map(Some)
    }

    /// Keeps `authority`, durably. Blocks.
    ///
    /// # Errors
    /// When it cannot be written; then what was there stays.
    pub fn save(&self, authority: &Authority) -> Result<(), AuthorityError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path);
        made.map_err(|source| AuthorityError::Io { doing: "make", path: self.path.clone(), source })?;
        self.write(DOCUMENT, &authority.to_document())?;
        self.write(ROOTS, authority.roots_pem().as_bytes())
    }

    /// The same on a thread that may wait for the disk.
    pub(crate) fn keep(&self, authority: Arc<Authority>) -> BoxFuture<'static, Result<(), AuthorityError>> {
        let folder = self.clone();
        let kept = tokio::task::spawn_blocking(move || folder.save(&authority));
        let interrupted = || AuthorityError::Document { reason: "it was not written to its end".into() };
        async move { kept.await.unwrap_or_else(|_| Err(interrupted())) }.boxed()
    }

    /// What is kept there for `cluster`, or a new one, made at `now` (seconds since 1970). Blocks.
    ///
    /// # Errors
    /// As [`Self::load`] and [`Self::save`].
    pub fn load_or_create(&self, cluster: &ClusterId, now: u64) -> Result<Authority, AuthorityError> {
        let authority = match self.load(cluster)? {
            Some(known) => known,
            None => Authority::create(cluster.clone(), now)?,
        };
        self.save(&authority)?;
        Ok(authority)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), AuthorityError> {
        let path = self.path.join(name);
        write_whole(&path, OWNER_ONLY, bytes).map_err(|source| AuthorityError::Io { doing: "write", path, source })
    }
}
