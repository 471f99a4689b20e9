//! Starts that begin with the pull of their image.
//!
//! containerd pulls an image because a container of it is about to start. So the start begins when it is decided that the image is
//! shown lazily, while containerd still talks to the registry: the layers are opened, what a profile or a guess names is fetched,
//! and what is read is going to be recorded. The tree that is shown for the first container takes the start over. When none
//! comes in time, or the image is removed, it ends, and what was fetched stays as other chunks do.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use hermes_image::ids::{DiffId, Digest};
use hermes_store::LayerUse;
use parking_lot::Mutex;

use super::mount::OpenIndex;
use super::starts::RunningStart;
use super::{Inner, NodeError, guess};
use crate::fetch::MountNo;

/// How long a start waits for its container. From the pull to the container a kubelet takes a second or two; on a node that starts
/// many at once some ten.
const CONTAINER_WITHIN: Duration = Duration::from_secs(60);

/// A start without a tree.
#[derive(Debug)]
struct EarlyStart {
    mount: MountNo,
    layers: Vec<DiffId>,
    start: RunningStart,
    _uses: Vec<LayerUse>,
}

/// Those of a node, by their images' manifests.
#[derive(Debug, Default)]
pub(super) struct EarlyStarts(Mutex<BTreeMap<Digest, EarlyStart>>);

impl Inner {
    /// Begins the start of an image whose pull has begun, unless all of it is here or it is shown already.
    ///
    /// # Errors
    /// When its layers cannot be opened, which the container that comes will be told.
    pub(super) async fn begin_early(
        self: &Arc<Self>,
        reference: Option<&str>,
        index: &OpenIndex,
    ) -> Result<(), NodeError> {
        let manifest = index.statement.manifest;
        let origin = self.origin(reference).await;
        let named = reference.map_or_else(|| manifest.to_string(), str::to_owned);
        let _keeping = self.keeping.read().await;
        let mount = MountNo(self.next_mount.fetch_add(1, Ordering::Relaxed));
        let diff_ids: Vec<DiffId> = index.statement.layers.iter().map(|layer| layer.diff_id).collect();
        {
            let _mounting = self.mounting.lock().await;
            let is_known = self.early_starts.0.lock().contains_key(&manifest);
            if is_known || self.images.lock().await.iter().any(|image| image.manifest == manifest) {
                return Ok(());
            }
            let opened = self.open_image(mount, &named, index, origin.as_ref()).await;
            let begun = opened.map(|image| {
                let is_complete = image.is_complete();
                let start = if is_complete { None } else { self.profiling.begin(manifest, &named, &image.layers, &[]) };
                start.map(|start| (start, image))
            });
            let Ok(Some((start, image))) = begun else {
                self.close_layers(mount, &diff_ids).await;
                return begun.map(drop);
            };
            self.announce(&image.layers);
            if self.config.guess_starts
                && reference.is_some()
                && let Some(has_profile) = start.explore(self.may_explore())
            {
                let (reference, tree, layers) = (named, index.tree.clone(), diff_ids.clone());
                let guessed = guess::Start { reference, manifest, tree, layers };
                tokio::spawn(guess::prefetch(Arc::downgrade(self), guessed, has_profile));
            }
            let early = EarlyStart { mount, layers: diff_ids, start, _uses: image.uses };
            self.early_starts.0.lock().insert(manifest, early);
        }
        let node = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(CONTAINER_WITHIN).await;
            end_unless_taken(node, manifest, mount).await;
        });
        Ok(())
    }

    /// The start of the image that is being shown with `layers`, if it began with its pull. The caller holds the lock of mounting, and
    /// has opened the layers.
    pub(super) async fn take_early(&self, manifest: Digest, layers: &[DiffId]) -> Option<RunningStart> {
        let taken = {
            let mut starts = self.early_starts.0.lock();
            starts.get(&manifest).is_some_and(|early| early.layers == layers).then(|| starts.remove(&manifest))??
        };
        let EarlyStart { mount, layers, start, .. } = taken;
        self.close_layers(mount, &layers).await;
        Some(start)
    }

    /// Ends the start of an image that is removed, if there is one that no tree has taken over.
    pub(super) async fn end_early(&self, manifest: Digest) {
        if !self.early_starts.0.lock().contains_key(&manifest) {
            return;
        }
        let _mounting = self.mounting.lock().await;
        let early = self.early_starts.0.lock().remove(&manifest);
        let Some(EarlyStart { mount, layers, start, _uses }) = early else { return };
        drop(start);
        self.close_layers(mount, &layers).await;
    }
}

/// Ends a start for which no container came.
async fn end_unless_taken(node: Weak<Inner>, manifest: Digest, mount: MountNo) {
    let Some(node) = node.upgrade() else { return };
    let is_waiting = node.early_starts.0.lock().get(&manifest).is_some_and(|early| early.mount == mount);
    if is_waiting {
        tracing::info!(%manifest, "no container came after a pull; nothing more is fetched for it");
        node.end_early(manifest).await;
    }
}
