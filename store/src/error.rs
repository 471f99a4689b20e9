//! What can go wrong with bytes at rest.

use std::io;
use std::path::{Path, PathBuf};

use hermes_image::ids::{ArtifactId, ChunkNo, DiffId};
use thiserror::Error;

/// Why a store call failed. All of it is local trouble: no peer and no registry is to blame, and asking another
/// source again does not help. The bytes themselves can still be used by whoever holds them.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A setting is out of range.
    #[error("store setting {field} = '{value}': {rule}")]
    Config {
        /// The field of [`StoreConfig`](crate::StoreConfig).
        field: &'static str,
        /// What was set.
        value: String,
        /// What is allowed.
        rule: &'static str,
    },
    /// Another process, or this one, has the store open.
    #[error("store {} is in use by {owner}; stop that process or choose another folder", dir.display())]
    InUse {
        /// The store's folder.
        dir: PathBuf,
        /// Who, as far as the lock file tells.
        owner: String,
    },
    /// The store was written in a format that this build does not read.
    #[error(
        "store {} has format {found}, this build reads {known}; use the build that wrote it, or remove the folder \
         (what it holds is fetched again)", dir.display()
    )]
    Version {
        /// The store's folder.
        dir: PathBuf,
        /// What the store says.
        found: String,
        /// What this build reads and writes.
        known: u32,
    },
    /// The filesystem cannot punch holes, so a budget could not be kept.
    #[error(
        "the filesystem of store {} cannot punch holes, which eviction needs; \
         use ext4, xfs, btrfs or tmpfs, or set no budget", dir.display()
    )]
    NoHolePunching {
        /// The store's folder.
        dir: PathBuf,
    },
    /// The operating system refused something.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// RocksDB failed.
    #[error(
        "cannot {operation} the catalogue {}: {source}; if it stays so, stop Hermes and remove the store's folder \
         (what it holds is fetched again)", path.display()
    )]
    Catalogue {
        /// What was tried, as a verb.
        operation: &'static str,
        /// The catalogue's folder.
        path: PathBuf,
        /// What RocksDB said.
        #[source]
        source: rocksdb::Error,
    },
    /// A catalogue value is not what its key promises.
    #[error("the catalogue's record of {record} is damaged: {reason}; remove it and fetch it again")]
    Damaged {
        /// What the record describes.
        record: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An artifact's file does not have the bytes that its name says. The file has been removed.
    #[error("artifact {id} was damaged on disk and has been removed; fetch it again")]
    DamagedArtifact {
        /// The artifact.
        id: ArtifactId,
    },
    /// There is no room, and nothing that may be evicted.
    #[error("no room for {needed_bytes} bytes in the store: {cause}")]
    Full {
        /// What was to be written.
        needed_bytes: u64,
        /// Which limit was met.
        cause: FullCause,
    },
    /// A layer that somebody holds open was to be changed or removed.
    #[error("layer {diff_id} is in use; unmount the images that hold it first")]
    LayerInUse {
        /// The layer.
        diff_id: DiffId,
    },
    /// The layer was removed, or registered again with another chunk table, since it was opened.
    #[error("layer {diff_id} was removed from the store while it was open")]
    LayerRemoved {
        /// The layer.
        diff_id: DiffId,
    },
    /// A chunk that the layer does not have.
    #[error("layer {diff_id} has {count} chunks, so no chunk {chunk}")]
    NoSuchChunk {
        /// The layer.
        diff_id: DiffId,
        /// What was asked for.
        chunk: ChunkNo,
        /// How many it has.
        count: u32,
    },
    /// Bytes of another length than the chunk table gives.
    #[error("chunk {chunk} of layer {diff_id} has {expected} bytes, {actual} were given")]
    WrongLength {
        /// The layer.
        diff_id: DiffId,
        /// The chunk.
        chunk: ChunkNo,
        /// By the chunk table.
        expected: u64,
        /// By the caller.
        actual: u64,
    },
    /// What was staged as a layer has another length than its chunk table gives.
    #[error("layer {diff_id} has {expected} bytes by its chunk table, {actual} were staged")]
    StagedLength {
        /// The layer.
        diff_id: DiffId,
        /// By the chunk table.
        expected: u64,
        /// By what was appended.
        actual: u64,
    },
    /// The disk refused bytes that had already been accepted. They count as absent again.
    #[error("layer {diff_id} lost {chunk_count} chunks that could not be written to disk; they are fetched again")]
    LostWrites {
        /// The layer.
        diff_id: DiffId,
        /// How many chunks.
        chunk_count: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The store was closed while one of its layers was still held.
    #[error("the store is closed")]
    Closed,
}

/// Which limit a [`StoreError::Full`] met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FullCause {
    /// The budget, with nothing left that may be evicted.
    #[error("{used_bytes} of a budget of {budget_bytes} are used, and what is left is open or pinned")]
    Budget {
        /// Bytes in use.
        used_bytes: u64,
        /// The budget.
        budget_bytes: u64,
    },
    /// The free space that the store leaves alone.
    #[error("the filesystem has {free_bytes} bytes free, and {floor_bytes} are left alone")]
    Floor {
        /// Bytes free for an ordinary user.
        free_bytes: u64,
        /// The configured floor.
        floor_bytes: u64,
    },
    /// The filesystem itself (ENOSPC, or a quota).
    #[error("the filesystem is full")]
    Filesystem,
}

impl StoreError {
    /// Whether this means "no room": the reader goes on with the bytes it has, uncached.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }

    /// A short, closed name for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Config { .. } => "config",
            Self::InUse { .. } => "in_use",
            Self::Version { .. } => "version",
            Self::NoHolePunching { .. } => "no_hole_punching",
            Self::Io { .. } => "io",
            Self::Catalogue { .. } => "catalogue",
            Self::Damaged { .. } => "damaged",
            Self::DamagedArtifact { .. } => "damaged_artifact",
            Self::Full { .. } => "full",
            Self::LayerInUse { .. } => "layer_in_use",
            Self::LayerRemoved { .. } => "layer_removed",
            Self::NoSuchChunk { .. } => "no_such_chunk",
            Self::WrongLength { .. } => "wrong_length",
            Self::StagedLength { .. } => "staged_length",
            Self::LostWrites { .. } => "lost_writes",
            Self::Closed => "closed",
        }
    }

    /// For `map_err` on a system call: `.map_err(StoreError::io("read", path))`.
    pub(crate) fn io<E: Into<io::Error>>(operation: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { operation, path: path.to_path_buf(), source: source.into() }
    }
}

/// Whether the system said that there is no room.
pub(crate) fn no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
