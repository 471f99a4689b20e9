//! What this node gives to peers: chunks that are present, index artifacts, signed statements, profiles.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, ChunkNo, DiffId, Digest};
use hermes_image::runs::Runs;
use hermes_image::verify::Verified;
use hermes_p2p::Content;
use hermes_store::Store;
use parking_lot::RwLock;

use crate::index_folder::IndexFolder;
use crate::privacy::Privacy;

/// The store, as peers see it.
#[derive(Debug)]
pub struct NodeContent {
    store: Arc<Store>,
    /// The node's own statements, those of earlier daemons among them.
    own: IndexFolder,
    privacy: Arc<Privacy>,
    statements: RwLock<BTreeMap<Digest, Bytes>>,
}

impl NodeContent {
    /// Gives what `store` has, and the statements in `own`, of which each was accepted by this node; of both only what is of
    /// an image of which `privacy` knows who may have it.
    pub fn new(store: Arc<Store>, own: IndexFolder, privacy: Arc<Privacy>) -> Self {
        Self { store, own, privacy, statements: RwLock::default() }
    }

    /// Gives `signed` to peers that ask about `manifest`.
    pub fn add_statement(&self, manifest: Digest, signed: Vec<u8>) {
        self.statements.write().insert(manifest, signed.into());
    }

    /// Gives nobody the statement about `manifest` any more, unless it stands in the node's own folder.
    pub fn remove_statement(&self, manifest: Digest) {
        self.statements.write().remove(&manifest);
    }

    fn layer(&self, layer: DiffId, table: ArtifactId) -> Option<Arc<hermes_store::Layer>> {
        let layer = self.store.open_layer(layer)?;
        // Chunk numbers mean something only under the same table.
        (layer.table().id() == table).then_some(layer)
    }
}

impl Content for NodeContent {
    fn have(&self, layer: DiffId, table: ArtifactId) -> Option<Runs> {
        Some(self.layer(layer, table)?.present())
    }

    fn chunk(&self, layer: DiffId, table: ArtifactId, chunk: ChunkNo) -> io::Result<Option<Bytes>> {
        let Some(layer) = self.layer(layer, table) else { return Ok(None) };
        if chunk.0 >= layer.table().count() {
            return Ok(None);
        }
        let bytes = layer.read_chunk(chunk).map_err(io::Error::other)?;
        Ok(bytes.map(Verified::into_inner))
    }

    fn artifact(&self, id: ArtifactId) -> io::Result<Option<Bytes>> {
        if !self.privacy.knows_artifact(id) {
            return Ok(None);
        }
        self.store.artifact_checked_lately(id).map_err(io::Error::other)
    }

    fn profile(&self, manifest: Digest) -> Option<Bytes> {
        if !self.privacy.knows_image(manifest) {
            return None;
        }
        crate::profile::to_give(&self.store, manifest)
    }

    fn statement(&self, manifest: Digest) -> Option<Bytes> {
        if !self.privacy.knows_image(manifest) {
            return None;
        }
        if let Some(signed) = self.statements.read().get(&manifest) {
            return Some(signed.clone());
        }
        let kept =
            self.own.statement(manifest).inspect_err(|error| tracing::warn!(%error, "a statement is not given on"));
        kept.ok().flatten().map(Bytes::from)
    }
}
