//! Forgetting what nothing has needed for long: images, and trees of parts of images.
//!
//! What containerd has removed, or somebody has unmounted, stays known: with its index and what is present of its layers
//! it starts at once when it comes back, and gives chunks to others meanwhile. Chunks make room for others when the budget
//! asks for it; records and indexes would stay for ever. So the node keeps those of the images that were used last, and
//! forgets the others: statement, record, layers that no other image has, artifacts.
//!
//! An image is needed while it is pinned (mounted ones are), has a snapshot, is being pulled by this node, or was one of the
//! last that containerd asked about. Whoever is between reading an index and writing down what needs it holds
//! [`Inner::keeping`]; nothing is forgotten meanwhile, only later. The statement goes first: whatever a crash leaves has a
//! record, and is forgotten the next time.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use hermes_image::erofs::Image;
use hermes_image::ids::{ArtifactId, Digest};
use hermes_store::{ImageRecord, StoreError};
use tokio::sync::Notify;

use super::record::MountRecord;
use super::{Inner, NodeError};
use crate::artifacts::ArtifactError;

/// How long it waits after something was removed, as images go several at a time, and when somebody is at an index.
const PAUSE: Duration = Duration::from_secs(10);
/// How often it looks when nobody says that something was removed, and whether there is a node still.
const INTERVAL: Duration = Duration::from_secs(600);

/// Forgets now, and whenever `due` says so. Ends with the node.
pub(super) async fn run(node: Weak<Inner>, due: Arc<Notify>) {
    let mut had_trees = false;
    loop {
        let Some(inner) = node.upgrade() else { return };
        match inner.forget_unused(&mut had_trees).await {
            Ok(true) => {}
            // Somebody is at an index.
            Ok(false) => due.notify_one(),
            Err(error) => tracing::warn!(%error, "what nothing needs is not forgotten"),
        }
        drop(inner);
        // The time is a limit: what is due is done early.
        let _ = tokio::time::timeout(INTERVAL, due.notified()).await;
        tokio::time::sleep(PAUSE).await;
    }
}

impl Inner {
    /// Whether it could be done now, or only in part. Trees that `had_trees` does not say were looked for are looked for
    /// once, because it is earlier daemons that leave them, and it takes a look at each artifact that no image has.
    async fn forget_unused(self: &Arc<Self>, had_trees: &mut bool) -> Result<bool, NodeError> {
        // One at a time, so that a container that starts meanwhile waits for one.
        while let Some(forgotten) = self.alone(Self::forget_one).await? {
            if forgotten {
                continue;
            }
            if !*had_trees {
                *had_trees = self.alone(Self::remove_leftover_trees).await?.is_some();
            }
            return Ok(*had_trees);
        }
        Ok(false)
    }

    /// Runs what waits for disks while nobody is between an index and what needs it; not at all when somebody is. It is not
    /// queued for, because those who came after it would wait for those before.
    async fn alone<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, NodeError> + Send + 'static,
    ) -> Result<Option<T>, NodeError> {
        let Ok(_alone) = self.keeping.try_write() else { return Ok(None) };
        let inner = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&inner)).await;
        done.map_err(|_| NodeError::Interrupted)?.map(Some)
    }

    /// Forgets the image that was not needed for longest; whether there was one to forget.
    fn forget_one(&self) -> Result<bool, NodeError> {
        let unused = to_forget(self.store.images()?, &self.needed_images()?, self.config.unused_images_max);
        let Some(image) = unused.last() else { return Ok(false) };
        self.own_indexes().remove(image.manifest).map_err(ArtifactError::from)?;
        self.content.remove_statement(image.manifest);
        let layers = self.store.remove_image(image.manifest)?;
        self.privacy.remove(image.manifest);
        self.store.remove_if_unused(layers, &image.artifacts().collect::<Vec<_>>())?;
        tracing::info!(manifest = %image.manifest, image = image.reference, "forgotten: not used for long");
        Ok(true)
    }

    fn needed_images(&self) -> Result<BTreeSet<Digest>, StoreError> {
        let pinned = self.store.pins()?.into_iter().map(|(manifest, _)| manifest);
        let snapshots = self.store.snapshots().list()?;
        let shown = snapshots.into_iter().filter_map(|snapshot| snapshot.remote.map(|layer| layer.manifest));
        // containerd may be about to make its snapshots.
        let decided = self.pulls.lock().iter().map(|pull| pull.manifest).collect::<Vec<_>>();
        Ok(pinned.chain(shown).chain(decided).chain(self.first_pulls.manifests()).collect())
    }

    /// Removes the trees of parts of images that are shown no more: no image's record names them. They can be made again.
    /// Other artifacts without an image stay: they may be of an index that is yet to be used.
    fn remove_leftover_trees(&self) -> Result<(), NodeError> {
        let records = self.store.mounts()?.into_iter().filter_map(|(_, note)| MountRecord::decode(&note).ok());
        let shown: BTreeSet<ArtifactId> = records.map(|record| record.tree).collect();
        let is_tree = |id| self.store.artifact(id).ok().flatten().is_some_and(|bytes| Image::open(bytes).is_ok());
        let freed_bytes = self.store.remove_unused_artifacts(&|id| shown.contains(&id) || !is_tree(id))?;
        tracing::info!(freed_bytes, "looked for trees of parts of images that earlier daemons have left");
        Ok(())
    }
}

/// The images that are not `needed`, but for the `kept` that were used last.
fn to_forget(mut images: Vec<ImageRecord>, needed: &BTreeSet<Digest>, kept: usize) -> Vec<ImageRecord> {
    images.retain(|image| !needed.contains(&image.manifest));
    images.sort_by_key(|image| Reverse(image.last_use_seconds));
    images.split_off(kept.min(images.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: u8, last_use_seconds: u64) -> ImageRecord {
        ImageRecord {
            manifest: Digest([name; 32]),
            reference: format!("registry.test/{name}"),
            platform: "linux/amd64".to_owned(),
            layers: Vec::new(),
            tree: None,
            last_use_seconds,
            access: hermes_image::access::Access::Public,
            proven: true,
        }
    }

    #[test]
    fn what_is_needed_stays_and_of_the_rest_what_was_used_last() {
        let images = || vec![image(1, 10), image(2, 40), image(3, 20), image(4, 30)];
        let forgotten = |needed: &[u8], kept| {
            let needed = needed.iter().map(|name| Digest([*name; 32])).collect();
            to_forget(images(), &needed, kept).iter().map(|image| image.manifest.0[0]).collect::<Vec<_>>()
        };
        assert_eq!(forgotten(&[], 0), [2, 4, 3, 1]);
        assert_eq!(forgotten(&[], 2), [3, 1]);
        // Needed ones take no place of others.
        assert_eq!(forgotten(&[1, 2], 1), [3]);
        assert_eq!(forgotten(&[1, 2, 3, 4], 0), [0_u8; 0]);
        assert_eq!(forgotten(&[], 9), [0_u8; 0]);
    }
}
