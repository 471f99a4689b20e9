//! Where index artifacts are looked for: the store, folders of indexes, peers; in this order.
//!
//! Everything is checked by its name, so it does not matter who had it. What comes from elsewhere is put into the
//! store, except for ranges of artifacts that are never needed whole.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, Digest};
use hermes_image::statement::{PublicKey, Statement, StatementError};
use hermes_image::verify::{Mismatch, Verified};
use hermes_p2p::PeerId;
use hermes_store::{Store, StoreError};
use parking_lot::RwLock;
use thiserror::Error;
use tokio::time::Instant;

use crate::index_folder::{IndexFolder, IndexFolderError};

/// How long a peer may take to give an artifact; those of a layer of a gigabyte have a few megabytes.
const ARTIFACT_TIMEOUT: Duration = Duration::from_secs(20);

/// An artifact that should be here and cannot be read.
#[derive(Debug, Error)]
pub enum ArtifactError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A folder failed.
    #[error(transparent)]
    Folder(#[from] IndexFolderError),
    /// The store gave something else.
    #[error("the store's copy of an index artifact is damaged: {0}")]
    Damaged(#[from] Mismatch),
    /// A blocking task did not end well.
    #[error("reading an index artifact was interrupted")]
    Interrupted,
}

/// The places.
#[derive(Debug, Clone)]
pub struct Artifacts {
    store: Arc<Store>,
    folders: Arc<RwLock<Vec<IndexFolder>>>,
    peers: Option<hermes_p2p::Node>,
}

impl Artifacts {
    /// Looks in `store`, in folders that are added later, and asks `peers`.
    pub fn new(store: Arc<Store>, peers: Option<hermes_p2p::Node>) -> Self {
        Self { store, folders: Arc::default(), peers }
    }

    /// Looks in `folder` too.
    pub fn add_folder(&self, folder: IndexFolder) {
        let mut folders = self.folders.write();
        if !folders.iter().any(|known| known.path() == folder.path()) {
            folders.push(folder);
        }
    }

    fn connected(&self) -> Vec<(&hermes_p2p::Node, PeerId)> {
        self.peers.iter().flat_map(|node| node.peers().into_iter().map(move |peer| (node, peer))).collect()
    }

    /// The artifact `id`, whole; `None` when nobody has it. Cancel safe.
    ///
    /// # Errors
    /// When it is on this node and cannot be read. A peer that fails is passed over.
    pub async fn get(&self, id: ArtifactId) -> Result<Option<Verified<Bytes>>, ArtifactError> {
        if let Some(found) = self.local(id).await? {
            return Ok(Some(found));
        }
        for (node, peer) in self.connected() {
            match node.artifact(peer, id, Instant::now() + ARTIFACT_TIMEOUT).await {
                Ok(artifact) => {
                    self.keep(artifact.clone()).await?;
                    return Ok(Some(artifact));
                }
                Err(error) => tracing::debug!(%peer, %id, %error, "a peer does not give an artifact"),
            }
        }
        Ok(None)
    }

    async fn local(&self, id: ArtifactId) -> Result<Option<Verified<Bytes>>, ArtifactError> {
        let (store, folders) = (Arc::clone(&self.store), self.folders.read().clone());
        let look = move || {
            if let Some(found) = store.artifact(id)? {
                return Ok(Some(Verified::artifact(id, found)?));
            }
            for folder in folders {
                if let Some(found) = folder.artifact(id)? {
                    store.put_artifact(&found)?;
                    return Ok(Some(found));
                }
            }
            Ok(None)
        };
        tokio::task::spawn_blocking(look).await.map_err(|_| ArtifactError::Interrupted)?
    }

    async fn keep(&self, artifact: Verified<Bytes>) -> Result<(), ArtifactError> {
        let store = Arc::clone(&self.store);
        let kept = tokio::task::spawn_blocking(move || store.put_artifact(&artifact).map(drop));
        Ok(kept.await.map_err(|_| ArtifactError::Interrupted)??)
    }

    /// Part of the artifact `id`. Unchecked when it comes from a peer: the caller knows
    /// the name of the part. Cancel safe.
    ///
    /// # Errors
    /// When it is on this node and cannot be read.
    pub async fn range(&self, id: ArtifactId, range: Range<u64>) -> Result<Option<Bytes>, ArtifactError> {
        if let Some(whole) = self.local(id).await? {
            let part = (range.end <= whole.len() as u64).then(|| whole.slice(range.start as usize..range.end as usize));
            return Ok(part);
        }
        for (node, peer) in self.connected() {
            match node.artifact_range(peer, id, range.clone(), Instant::now() + ARTIFACT_TIMEOUT).await {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(error) => tracing::debug!(%peer, %id, %error, "a peer does not give part of an artifact"),
            }
        }
        Ok(None)
    }

    /// What a key in `trusted` says about `manifest`, with its signed form; `None` when nobody has a statement that is
    /// accepted. Cancel safe.
    ///
    /// # Errors
    /// With the reason why the last statement that was found was refused, when none was accepted.
    pub async fn statement(
        &self,
        manifest: Digest,
        trusted: &[PublicKey],
    ) -> Result<Option<(Statement, Vec<u8>)>, StatementLookupError> {
        let mut refused = None;
        let mut open = |signed: Vec<u8>| match Statement::open(&signed, manifest, trusted) {
            Ok(statement) => Some((statement, signed)),
            Err(error) => {
                refused = Some(error);
                None
            }
        };
        let folders = self.folders.read().clone();
        for folder in folders {
            if let Some(found) = folder.statement(manifest)?.and_then(&mut open) {
                return Ok(Some(found));
            }
        }
        for (node, peer) in self.connected() {
            match node.statement(peer, manifest, Instant::now() + ARTIFACT_TIMEOUT).await {
                Ok(signed) => {
                    if let Some(found) = open(signed.to_vec()) {
                        return Ok(Some(found));
                    }
                }
                Err(error) => tracing::debug!(%peer, %manifest, %error, "a peer has no statement"),
            }
        }
        refused.map_or(Ok(None), |error| Err(error.into()))
    }
}

/// No statement was accepted.
#[derive(Debug, Error)]
pub enum StatementLookupError {
    /// A folder failed.
    #[error(transparent)]
    Folder(#[from] IndexFolderError),
    /// One was found and refused.
    #[error(transparent)]
    Refused(#[from] StatementError),
}
