//! What the store, its layers and its sync thread have in common.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use hermes_image::ids::DiffId;
use parking_lot::{Mutex, RwLock};

use crate::artifacts::CheckedArtifacts;
use crate::catalogue::Catalogue;
use crate::config::StoreConfig;
use crate::counters::Counters;
use crate::layer::Layer;
use crate::lock::DirLock;
use crate::space::{LastCopy, Space};
use crate::sync::SyncQueue;

/// Wall time, a second at a time: read without a system call, moved on by the sync thread.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    seconds: AtomicU32,
    /// Tests of the order of eviction set the time themselves.
    #[cfg(test)]
    frozen: AtomicBool,
}

impl Clock {
    /// Unix seconds at the last tick. Fits until 2106.
    pub(crate) fn seconds(&self) -> u32 {
        self.seconds.load(Ordering::Relaxed)
    }

    pub(crate) fn tick(&self) {
        #[cfg(test)]
        if self.frozen.load(Ordering::Relaxed) {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.seconds.store(u32::try_from(now).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn freeze(&self, seconds: u32) {
        self.frozen.store(true, Ordering::Relaxed);
        self.seconds.store(seconds, Ordering::Relaxed);
    }
}

/// The open layers. Every registered layer is open.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    pub(crate) by_id: BTreeMap<DiffId, Arc<Layer>>,
    pub(crate) by_number: BTreeMap<u32, Arc<Layer>>,
}

impl Layers {
    pub(crate) fn insert(&mut self, layer: &Arc<Layer>) {
        self.by_id.insert(layer.diff_id(), Arc::clone(layer));
        self.by_number.insert(layer.number(), Arc::clone(layer));
    }

    pub(crate) fn remove(&mut self, layer: &Layer) {
        self.by_id.remove(&layer.diff_id());
        self.by_number.remove(&layer.number());
    }
}

/// The inside of a store. Layers hold it too, so the catalogue and the lock on the folder live as long as the last of
/// them; `layers` points back at them and is emptied when the store is closed.
pub(crate) struct Shared {
    pub(crate) config: StoreConfig,
    pub(crate) catalogue: Catalogue,
    pub(crate) layers: RwLock<Layers>,
    /// One registration or removal at a time: they share a note in the catalogue.
    pub(crate) registering: Mutex<()>,
    /// One change of snapshots at a time: each checks what it found before it writes.
    pub(crate) snapshots: Mutex<()>,
    pub(crate) space: Space,
    pub(crate) checked_artifacts: Mutex<CheckedArtifacts>,
    pub(crate) last_copy: RwLock<Option<Arc<LastCopy>>>,
    pub(crate) queue: SyncQueue,
    pub(crate) clock: Clock,
    pub(crate) counters: Counters,
    pub(crate) artifact_bytes: AtomicU64,
    pub(crate) temporary_names: AtomicU64,
    /// Whether layer files can share blocks (reflink).
    pub(crate) shares_blocks: bool,
    pub(crate) closed: AtomicBool,
    // Last, so that the folder is free only when the catalogue is closed.
    pub(crate) _lock: DirLock,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("dir", &self.config.dir).finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn dir(&self) -> &Path {
        &self.config.dir
    }

    pub(crate) fn layers_dir(&self) -> PathBuf {
        self.config.dir.join("layers")
    }

    pub(crate) fn layer_path(&self, diff_id: DiffId) -> PathBuf {
        self.layers_dir().join(diff_id.hex())
    }

    pub(crate) fn artifacts_dir(&self) -> PathBuf {
        self.config.dir.join("artifacts")
    }

    pub(crate) fn all_layers(&self) -> Vec<Arc<Layer>> {
        self.layers.read().by_id.values().cloned().collect()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}
