//! Forgetting images that nothing has needed for long.
//!
//! What containerd has removed, or somebody has unmounted, stays known: with its index and what is present of its layers
//! it starts at once when it comes back, and gives chunks to others meanwhile. Chunks make room for others when the budget
//! asks for it; records and indexes would stay for ever. So the node keeps those of the images that were used last, and
//! forgets the others: statement, record, layers that no other image has, artifacts.
//!
//! An image is needed while it is pinned (mounted ones are), has a snapshot, is being pulled by this node, or was one of the
//! last that containerd asked about. The statement goes first: whatever a crash leaves has a record, and is
//! forgotten the next time.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use hermes_image::ids::Digest;
use hermes_store::{ImageRecord, StoreError};
use tokio::sync::Notify;

use super::{Inner, NodeError};
use crate::artifacts::ArtifactError;

/// How long it waits after something was removed: images go several at a time.
const PAUSE: Duration = Duration::from_secs(10);
/// How often it looks when nobody says that something was removed, and whether there is a node still.
const INTERVAL: Duration = Duration::from_secs(600);

/// Forgets now, and whenever `due` says so. Ends with the node.
pub(super) async fn run(node: Weak<Inner>, due: Arc<Notify>) {
    loop {
        let Some(inner) = node.upgrade() else { return };
        if let Err(error) = inner.forget_unused().await {
            tracing::warn!(%error, "images that nothing needs are not forgotten");
        }
        drop(inner);
        // The time is a limit: what is due is done early.
        let _ = tokio::time::timeout(INTERVAL, due.notified()).await;
        tokio::time::sleep(PAUSE).await;
    }
}

impl Inner {
    async fn forget_unused(self: &Arc<Self>) -> Result<(), NodeError> {
        // Nothing is mounted meanwhile.
        let _mounting = self.mounting.lock().await;
        let inner = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || inner.forget_but_the_last(inner.config.unused_images_max));
        done.await.map_err(|_| NodeError::Interrupted)?
    }

    fn forget_but_the_last(&self, kept: usize) -> Result<(), NodeError> {
        let needed = self.needed_images()?;
        let mut unused = self.store.images()?;
        unused.retain(|image| !needed.contains(&image.manifest));
        unused.sort_by_key(|image| std::cmp::Reverse(image.last_use_seconds));
        for image in unused.iter().skip(kept) {
            self.forget(image)?;
            tracing::info!(manifest = %image.manifest, image = image.reference, "forgotten: not used for long");
        }
        Ok(())
    }

    fn needed_images(&self) -> Result<BTreeSet<Digest>, StoreError> {
        let pinned = self.store.pins()?.into_iter().map(|(manifest, _)| manifest);
        let snapshots = self.store.snapshots().list()?;
        let shown = snapshots.into_iter().filter_map(|snapshot| snapshot.remote.map(|layer| layer.manifest));
        // containerd may be about to make its snapshots.
        let decided = self.pulls.lock().iter().map(|pull| pull.manifest).collect::<Vec<_>>();
        Ok(pinned.chain(shown).chain(decided).chain(self.first_pulls.manifests()).collect())
    }

    fn forget(&self, image: &ImageRecord) -> Result<(), NodeError> {
        self.own_indexes().remove(image.manifest).map_err(ArtifactError::from)?;
        self.content.remove_statement(image.manifest);
        for layer in self.store.remove_image(image.manifest)? {
            match self.store.remove_layer(layer) {
                Ok(_) | Err(StoreError::LayerInUse { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.store.remove_artifacts_if_unused(&image.artifacts().collect::<Vec<_>>())?;
        Ok(())
    }
}
