//! What is kept, who needs it, and what may go: plain bookkeeping without any I/O.
//!
//! An image's record names layers, a layer's record names artifacts. What nothing names goes, unless somebody who is just
//! writing it holds it (`pins`). What is being deleted is written down too (`leaving`), so that whoever wants to write
//! the same name waits until it is gone, and not the other way round.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use hermes_image::ids::{ArtifactId, LayerId};
use hermes_image::statement::LayerStatement;

use super::record::ImageRecord;
use crate::event::{ImageKey, ReadyIndex, UnixMillis};

/// One artifact.
#[derive(Debug, Default, Clone, Copy)]
struct Stored {
    /// Bytes in the packed form; none while it is being written.
    len_bytes: Option<u64>,
    /// Layers that name it.
    layers: u32,
    /// Writers that hold it.
    pins: u32,
}

/// One image.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) record: ImageRecord,
    /// Its index; none while it is being built.
    pub(super) index: Option<ReadyIndex>,
}

/// An object that can be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Object {
    /// The record of a layer.
    Layer(LayerId),
    /// An artifact.
    Artifact(ArtifactId),
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    artifacts: BTreeMap<ArtifactId, Stored>,
    layers: BTreeMap<LayerId, LayerStatement>,
    pub(super) images: BTreeMap<ImageKey, Entry>,
    leaving: BTreeSet<Object>,
    used_bytes: u64,
}

/// The artifacts that a layer consists of.
pub(super) fn artifacts_of(layer: &LayerStatement) -> [ArtifactId; 4] {
    [layer.toc, layer.chunks, layer.seek, layer.windows]
}

impl Ledger {
    /// Bytes of all artifacts.
    pub(super) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Length of an artifact that is kept.
    pub(super) fn len_bytes(&self, id: ArtifactId) -> Option<u64> {
        self.artifacts.get(&id)?.len_bytes
    }

    /// The first artifact from `start` on that is kept.
    pub(super) fn next_artifact(&self, start: Bound<ArtifactId>) -> Option<ArtifactId> {
        let mut kept = self.artifacts.range((start, Bound::Unbounded)).filter(|(_, stored)| stored.len_bytes.is_some());
        kept.next().map(|(id, _)| *id)
    }

    /// What is known of a layer.
    pub(super) fn layer(&self, layer: LayerId) -> Option<&LayerStatement> {
        self.layers.get(&layer)
    }

    /// Holds the objects of a layer for a writer; `false` while one of them is being deleted.
    pub(super) fn pin(&mut self, layer: &LayerStatement) -> bool {
        let objects = artifacts_of(layer).map(Object::Artifact);
        if self.leaving.contains(&Object::Layer(layer.layer)) || objects.iter().any(|it| self.leaving.contains(it)) {
            return false;
        }
        artifacts_of(layer).iter().for_each(|id| self.artifacts.entry(*id).or_default().pins += 1);
        true
    }

    /// The writer has ended, well or not.
    pub(super) fn unpin(&mut self, layer: &LayerStatement) {
        for id in artifacts_of(layer) {
            let Some(stored) = self.artifacts.get_mut(&id) else { continue };
            stored.pins = stored.pins.saturating_sub(1);
            if stored.pins == 0 && stored.layers == 0 && stored.len_bytes.is_none() {
                self.artifacts.remove(&id);
            }
        }
    }

    /// An artifact is there.
    pub(super) fn stored(&mut self, id: ArtifactId, len_bytes: u64) {
        let before = self.artifacts.entry(id).or_default().len_bytes.replace(len_bytes);
        self.used_bytes = self.used_bytes - before.unwrap_or(0) + len_bytes;
    }

    /// An artifact is not what its name says, and counts as one that was never written.
    pub(super) fn lost(&mut self, id: ArtifactId) {
        let before = self.artifacts.get_mut(&id).and_then(|stored| stored.len_bytes.take());
        self.used_bytes -= before.unwrap_or(0);
    }

    /// A layer's artifacts are all there, and its record.
    pub(super) fn add_layer(&mut self, layer: LayerStatement) {
        self.drop_layer(layer.layer);
        artifacts_of(&layer).iter().for_each(|id| self.artifacts.entry(*id).or_default().layers += 1);
        self.layers.insert(layer.layer, layer);
    }

    /// A layer's record is gone, or is not to be used.
    pub(super) fn drop_layer(&mut self, layer: LayerId) {
        let Some(layer) = self.layers.remove(&layer) else { return };
        for id in artifacts_of(&layer) {
            if let Some(stored) = self.artifacts.get_mut(&id) {
                stored.layers = stored.layers.saturating_sub(1);
            }
        }
    }

    /// The layers that name an artifact.
    pub(super) fn layers_with(&self, id: ArtifactId) -> Vec<LayerId> {
        let has = |layer: &&LayerStatement| artifacts_of(layer).contains(&id);
        self.layers.values().filter(has).map(|layer| layer.layer).collect()
    }

    /// Images that name a layer, and have an index.
    pub(super) fn ready_images_with(&self, layer: LayerId) -> Vec<ImageKey> {
        let has = |entry: &&Entry| entry.index.is_some() && entry.record.layers.iter().any(|it| it.layer == layer);
        self.images.values().filter(has).map(|entry| entry.record.image.clone()).collect()
    }

    /// Builds that began before `moment` and have not ended.
    pub(super) fn unfinished_since(&self, moment: UnixMillis) -> Vec<ImageKey> {
        let old = |entry: &&Entry| entry.index.is_none() && entry.record.begun < moment;
        self.images.values().filter(old).map(|entry| entry.record.image.clone()).collect()
    }

    /// Layers that images without an index need, and of which nothing is known.
    pub(super) fn missing_layers(&self) -> BTreeSet<LayerId> {
        let unfinished = self.images.values().filter(|entry| entry.index.is_none());
        let layers = unfinished.flat_map(|entry| entry.record.layers.iter().map(|layer| layer.layer));
        layers.filter(|layer| !self.layers.contains_key(layer)).collect()
    }

    /// Takes out what nobody needs, in the order in which it is to be deleted. [`Ledger::gone`] ends it.
    pub(super) fn collect(&mut self) -> Vec<Object> {
        let needed: BTreeSet<LayerId> =
            self.images.values().flat_map(|entry| entry.record.layers.iter().map(|layer| layer.layer)).collect();
        let layers: Vec<LayerId> = self.layers.keys().filter(|layer| !needed.contains(*layer)).copied().collect();
        layers.iter().for_each(|layer| self.drop_layer(*layer));
        let idle = |stored: &Stored| stored.layers == 0 && stored.pins == 0;
        let artifacts = self.artifacts.iter().filter(|(_, stored)| idle(stored)).map(|(id, _)| *id);
        let artifacts: Vec<ArtifactId> = artifacts.collect();
        for id in &artifacts {
            let stored = self.artifacts.remove(id).unwrap_or_default();
            self.used_bytes -= stored.len_bytes.unwrap_or(0);
        }
        let objects = layers.into_iter().map(Object::Layer).chain(artifacts.into_iter().map(Object::Artifact));
        let objects: Vec<Object> = objects.collect();
        self.leaving.extend(&objects);
        objects
    }

    /// Objects have been deleted, or will be at the next start.
    pub(super) fn gone(&mut self, objects: &[Object]) {
        objects.iter().for_each(|object| {
            self.leaving.remove(object);
        });
    }

    /// Bytes of the artifacts of an image, each counted once, and their names in order.
    pub(super) fn artifacts_of_image(&self, record: &ImageRecord) -> (Vec<ArtifactId>, u64) {
        let layers = record.layers.iter().filter_map(|layer| self.layers.get(&layer.layer));
        let mut seen = BTreeSet::new();
        let ids: Vec<ArtifactId> = layers.flat_map(artifacts_of).filter(|id| seen.insert(*id)).collect();
        let len_bytes = ids.iter().filter_map(|id| self.len_bytes(*id)).sum();
        (ids, len_bytes)
    }
}
