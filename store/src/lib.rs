//! Bytes at rest.
//!
//! Owns a folder: `layers/` (one sparse file a layer, in the layer's logical space), `artifacts/` (index artifacts and
//! trees, named by their content) and `catalogue/` (RocksDB: what is present, where equal chunks are, images, pins,
//! last uses, what starts read, and what containerd's snapshots are). It never fetches anything, never decides what to fetch, and knows no peer and no registry.
//!
//! The promise: a byte that the store gives out is the byte that was put, or (through [`Layer::read_chunk`]) one whose
//! hash was just checked; never a hole's zeros, and after a crash never a byte that had not reached the disk.
//! [`Layer`] says how that is kept against concurrent eviction, `sync` how it is kept against crashes, and `staged` how
//! a layer comes in whole whose chunks are known only when its last byte has come.
//!
//! What a crash leaves: everything that was durable, some bytes in layer files that no bit stands for (overwritten when
//! their chunks are fetched again), temporary files and half-made layers (removed by the next [`Store::open`], which
//! reports it in [`RecoveryReport`]).
//!
//! Every error of this crate is local trouble: the caller goes on with other sources and without the store.
//!
//! One descriptor is open for each registered layer, and at most 64 for the catalogue: raise the process's limit.

mod artifacts;
mod bitmap;
mod catalogue;
mod config;
mod counters;
mod error;
mod images;
mod layer;
mod lock;
mod map;
mod mounts;
mod profiles;
mod recovery;
mod reuse;
mod shared;
mod snapshots;
mod space;
mod staged;
mod store;
mod sync;

#[cfg(test)]
mod model_test;
#[cfg(test)]
#[path = "../tests/it/ramp.rs"]
mod ramp;
#[cfg(test)]
mod store_test;
#[cfg(test)]
mod testing;

pub use catalogue::FORMAT_VERSION;
pub use config::{BUDGET_MIN_BYTES, DropBehind, SYNC_INTERVAL_MAX_MS, StoreConfig};
pub use counters::{Counter, Counters};
pub use error::{FullCause, StoreError};
pub use images::{ImageLayer, ImageRecord, PIN_OWNER_MAX_BYTES};
pub use layer::{FOLIO_MAX_BYTES, GROUP_CHUNKS, Layer, LayerUse, Read};
pub use profiles::ProfilePart;
pub use recovery::RecoveryReport;
pub use snapshots::{
    Commit, LabelChange, NewSnapshot, RemoteLayer, SnapshotError, SnapshotKind, SnapshotRecord, SnapshotUsage,
    Snapshots,
};
pub use staged::{SealedLayer, StagedArtifact, StagedLayer};
pub use store::{Store, Usage};
