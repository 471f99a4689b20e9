//! Comparing what is kept with its names while it is in use: disks lose bytes, and people files.
//!
//! Every artifact has its turn, a few at a time; those that a node has begun to read go first, for a node that is given other
//! bytes than it asked for will ask again. A store that keeps checksums is believed, but for objects that it has lost. What is
//! damaged goes with everything that names it, and the images that had it wait in [`Artifacts::lost`] to be built again.

use std::collections::BTreeSet;
use std::ops::Bound;

use hermes_image::ids::ArtifactId;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Artifacts, layer_path, statement_path};
use crate::clock;
use crate::event::ImageKey;

/// Bytes that are compared at once; one artifact, however long. With a check every ten seconds, 100 MB a minute: 1 % of a core,
/// and a cluster's indexes in an hour.
const CHECK_LEN_BYTES: u64 = 16 << 20;
/// Artifacts that go first, at most.
const READ_MAX: usize = 1024;

/// What is compared next, and what was found.
#[derive(Debug)]
pub(super) struct Checks {
    /// Whether bytes may change without anybody noticing.
    may_rot: bool,
    /// The artifact that was compared last in turn.
    last: Mutex<Option<ArtifactId>>,
    /// What nodes have begun to read since.
    read: Mutex<BTreeSet<ArtifactId>>,
    /// Images whose index is gone, and that nobody was told of yet.
    lost: Mutex<BTreeSet<ImageKey>>,
    found: Notify,
}

impl Checks {
    pub(super) fn new(may_rot: bool) -> Self {
        let (read, lost) = (Mutex::default(), Mutex::default());
        Self { may_rot, last: Mutex::default(), read, lost, found: Notify::new() }
    }

    /// A node reads it.
    pub(super) fn is_read(&self, id: ArtifactId) {
        let mut read = self.read.lock();
        if self.may_rot && read.len() < READ_MAX {
            read.insert(id);
        }
    }
}

impl Artifacts {
    /// An image whose index was found damaged and is gone. Waits for one. Cancel safe.
    pub async fn lost(&self) -> ImageKey {
        loop {
            let found = self.inner.checks.found.notified();
            if let Some(image) = self.inner.checks.lost.lock().pop_first() {
                return image;
            }
            found.await;
        }
    }

    /// Compares some artifacts with their names.
    pub async fn check_some(&self) {
        if !self.inner.checks.may_rot {
            return;
        }
        let mut left_bytes = CHECK_LEN_BYTES;
        let mut seen = BTreeSet::new();
        while left_bytes > 0 {
            let Some(id) = self.next_check().filter(|id| seen.insert(*id)) else { return };
            left_bytes = left_bytes.saturating_sub(self.packed_len_bytes(id).unwrap_or(0).max(1));
            // Damage is dealt with there; a store that fails is tried again in its turn.
            if let Err(error) = self.read(id).await {
                tracing::warn!(%error, "an artifact cannot be compared with its name");
            }
        }
    }

    fn next_check(&self) -> Option<ArtifactId> {
        let checks = &self.inner.checks;
        if let Some(id) = checks.read.lock().pop_first() {
            return Some(id);
        }
        let mut last = checks.last.lock();
        let ledger = self.inner.ledger.lock();
        let after = last.map_or(Bound::Unbounded, Bound::Excluded);
        *last = ledger.next_artifact(after).or_else(|| ledger.next_artifact(Bound::Unbounded));
        *last
    }

    /// Removes an artifact that is not what its name says, with everything that names it.
    pub(super) async fn remove_damaged(&self, id: ArtifactId, reason: &str) {
        let (layers, images) = {
            let mut ledger = self.inner.ledger.lock();
            let layers = ledger.layers_with(id);
            let images: Vec<ImageKey> = layers.iter().flat_map(|layer| ledger.ready_images_with(*layer)).collect();
            layers.iter().for_each(|layer| ledger.drop_layer(*layer));
            // Whoever builds such a layer just now writes it again.
            ledger.lost(id);
            for image in &images {
                if let Some(entry) = ledger.images.get_mut(image) {
                    entry.index = None;
                    // The time for building it again begins now.
                    entry.record.begun = clock::now();
                }
            }
            (layers, images)
        };
        if layers.is_empty() {
            // It was given up meanwhile.
            return;
        }
        tracing::error!(artifact = %id, reason, images = images.len(), "an artifact is damaged and is removed");
        let paths = images.iter().map(statement_path).chain(layers.iter().map(|layer| layer_path(*layer)));
        for path in paths {
            if let Err(error) = self.inner.delete(&path).await {
                tracing::warn!(%error, "what names a damaged artifact stays until the next start");
            }
        }
        if let Err(error) = self.collect().await {
            tracing::warn!(%error, "a damaged artifact stays until the next start");
        }
        self.inner.checks.lost.lock().extend(images);
        self.inner.checks.found.notify_one();
    }
}
