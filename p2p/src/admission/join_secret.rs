//! The issuer of a cluster without a controller: a secret that all its nodes have.
//!
//! The cluster's issuing key is derived from the secret and the cluster's name, so every node issues its own
//! certificates, and any may take back others'. Whoever has the secret is the cluster: it cannot be taken back from one
//! node, only changed on all.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hermes_image::ids::DiffId;
use libp2p::PeerId;
use thiserror::Error;

use super::certificate::{CERTIFICATE_LIFE, SignedCertificate, Trust};
use super::grants::SignedGrant;
use super::issuer::{CertificateRequest, IssueError, Issuer};
use super::issuing::IssuingKey;
use super::revocation::{Revocation, SignedRevocation};
use crate::config::ClusterId;

/// What BLAKE3 derives the key for: an application, a purpose, a version.
const CONTEXT: &str = "hermes swarm 2026 join secret: cluster issuing key v1";
/// Fewest bytes of a secret, without white space around them: 32 random characters cannot be guessed.
const SECRET_LEN_MIN_BYTES: usize = 32;
/// Most bytes of a file with a secret.
const SECRET_LEN_MAX_BYTES: u64 = 4096;

/// A join secret that cannot be used.
#[derive(Debug, Error)]
pub enum JoinSecretError {
    /// The file cannot be read.
    #[error(
        "cannot read the join secret {path}: {source}; make one with `head -c 32 /dev/urandom | base64` and give all nodes the same"
    )]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Others may read it.
    #[error(
        "the join secret {path} has mode {mode:04o}, so others can read it; chmod 600 it, and change it on all nodes if they did"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Too short or too long.
    #[error(
        "the join secret {path} has {len_bytes} characters; it must have {SECRET_LEN_MIN_BYTES} to {SECRET_LEN_MAX_BYTES}, such as `head -c 32 /dev/urandom | base64` gives"
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// How many bytes it has, without white space around them.
        len_bytes: usize,
    },
}

/// Issues by a secret that all nodes of the cluster have.
pub struct JoinSecret {
    key: IssuingKey,
    life: Duration,
}

impl fmt::Debug for JoinSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinSecret").field("life", &self.life).finish_non_exhaustive()
    }
}

impl JoinSecret {
    /// Reads the secret of `cluster` from the file at `path`.
    ///
    /// # Errors
    /// When it cannot be read, others can read it, or it is too short to be one.
    pub fn load(path: &Path, cluster: &ClusterId) -> Result<Self, JoinSecretError> {
        let failed = |source| JoinSecretError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(JoinSecretError::Exposed { path: path.to_owned(), mode });
        }
        let mut bytes = Vec::new();
        file.take(SECRET_LEN_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
        let secret = bytes.trim_ascii();
        if secret.len() < SECRET_LEN_MIN_BYTES || bytes.len() as u64 > SECRET_LEN_MAX_BYTES {
            return Err(JoinSecretError::Length { path: path.to_owned(), len_bytes: secret.len() });
        }
        Ok(Self::of(secret, cluster))
    }

    fn of(secret: &[u8], cluster: &ClusterId) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        // The length keeps the two apart.
        hasher.update(&(cluster.as_str().len() as u64).to_le_bytes()).update(cluster.as_str().as_bytes());
        hasher.update(secret);
        Self { key: IssuingKey::from_seed(*hasher.finalize().as_bytes()), life: CERTIFICATE_LIFE }
    }

    /// The same with certificates that are good for `life`.
    #[must_use]
    pub fn with_life(self, life: Duration) -> Self {
        Self { life, ..self }
    }
}

impl Issuer for JoinSecret {
    fn issue(&self, request: &CertificateRequest) -> Result<SignedCertificate, IssueError> {
        Ok(self.key.certificate(request, self.life))
    }

    fn trust(&self) -> Trust {
        Trust { keys: vec![self.key.public()], epoch_min: 0 }
    }

    fn revoke(&self, notice: Revocation) -> Result<SignedRevocation, IssueError> {
        Ok(self.key.revocation(notice))
    }

    fn grant(
        &self,
        cluster: &ClusterId,
        peer: PeerId,
        layer: DiffId,
        now: u64,
        life: Duration,
    ) -> Result<SignedGrant, IssueError> {
        Ok(self.key.grant(cluster, peer, layer, now, life))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn cluster(name: &str) -> ClusterId {
        name.parse().expect("a cluster id")
    }

    #[test]
    fn the_same_file_gives_the_same_key_in_the_same_cluster_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        let write = |text: &str| {
            std::fs::write(&path, text).expect("writes");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("protects");
        };
        let key = |name: &str| JoinSecret::load(&path, &cluster(name)).expect("loads").trust().keys;
        write(&"s".repeat(32));
        let prod = key("prod");
        // An editor's line end is no part of the secret.
        write(&format!("{}\n", "s".repeat(32)));
        assert_eq!(key("prod"), prod);
        assert_ne!(key("test"), prod);
        write(&"t".repeat(32));
        assert_ne!(key("prod"), prod);
        assert!(!format!("{:?}", JoinSecret::load(&path, &cluster("prod"))).contains("ttt"));
    }

    #[test]
    fn a_secret_that_is_short_or_open_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        let error = |path: &Path| JoinSecret::load(path, &cluster("prod")).expect_err("refused");
        assert!(matches!(error(&path), JoinSecretError::Io { .. }));
        std::fs::write(&path, "s".repeat(64)).expect("writes");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("opens");
        assert!(matches!(error(&path), JoinSecretError::Exposed { mode: 0o640, .. }));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("protects");
        for (text, len) in [("s".repeat(31), 31), (format!("{}{}", " ".repeat(40), "s"), 1), ("s".repeat(5000), 4097)] {
            std::fs::write(&path, text).expect("writes");
            assert!(matches!(error(&path), JoinSecretError::Length { len_bytes, .. } if len_bytes == len));
        }
    }
}
