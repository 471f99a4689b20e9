//! What the tests of this crate share.

use std::sync::Arc;

use hermes_image::ids::ChunkNo;

pub(crate) use crate::ramp::Ramp;
use crate::{Layer, Read, Store, StoreConfig};

/// A folder with a store in it.
pub(crate) struct Fixture {
    pub(crate) config: StoreConfig,
    _dir: tempfile::TempDir,
}

impl Fixture {
    /// A store without a budget that syncs when it is told to.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let mut config = StoreConfig::new(dir.path().join("store"));
        config.sync_interval_ms = 3_600_000;
        config.sync_bytes = u64::MAX;
        config.free_floor_bytes = 0;
        Self { config, _dir: dir }
    }

    pub(crate) fn open(&self) -> Arc<Store> {
        Store::open(self.config.clone()).expect("opens")
    }
}

/// Puts a chunk.
pub(crate) fn put(layer: &Layer, ramp: &Ramp, chunk: u32) {
    layer.put(ChunkNo(chunk), &ramp.verified(chunk)).expect("puts");
}

/// Checks every byte of what is present.
pub(crate) fn check(layer: &Layer, ramp: &Ramp) {
    ramp.check(&layer.present(), |offset, buf| match layer.read_at(offset, buf).expect("reads") {
        Read::Hit(len) => {
            assert_eq!(len, buf.len());
            true
        }
        Read::Miss(runs) => panic!("{runs:?} were present"),
    });
}
