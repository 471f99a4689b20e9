//! One layer: a sparse file in logical space, and which of its chunks are there.
//!
//! # Who may see what
//!
//! A chunk goes through three states, kept in two bitmaps: *absent*; *present* (the bit in [`Layer::present`] is set,
//! readers are served); *durable* (the bit in the ledger and in the catalogue is set, a crash keeps it).
//!
//! * **put**: `pwrite` the bytes, then set the present bit. Readers see it at once.
//! * **sync**: take the list of what was put, `fdatasync`, then set the durable bits and write their pages. What is
//!   taken while the disk works is left for the next round. So a durable bit stands for bytes on disk, always.
//! * **evict**: clear the present bits, then the durable ones (synced), then punch the hole. So no bit, in memory or
//!   on disk, ever stands for a hole.
//!
//! # Readers against eviction
//!
//! A reader takes no lock. It tests the bits and then reads the file, and a hole may be punched between the two; the
//! read would then return zeros. So neighbouring groups of chunks share a *stripe* with an epoch. The evictor clears
//! the bits, raises the epoch, and only then punches. The reader notes the epoch before it tests the bits and looks
//! again after it has read: if the epoch is the same, then no hole was begun before the read had ended, because a
//! hole begun earlier either raised the epoch in between, or had cleared the bits before the reader tested them. If
//! the epoch differs, the reader begins again.
//!
//! # Writers against eviction
//!
//! A put between "bits cleared" and "hole punched" would set a bit over bytes that are about to go. So a put holds its
//! stripe shared, and an evictor holds it alone from before it clears the bits until the hole is there. The evictor
//! only ever tries: a stripe that is being written is not worth evicting, so nobody waits and nothing can deadlock.
//!
//! # Locks, in the order in which they are taken
//!
//! `flushing` (one sync at a time, held across the disk), stripe, `ledger` (held across a catalogue write), `uses`,
//! `pending`, the sync thread's queue (these three held for memory only). Readers take none of them.

mod evict;
mod flush;
mod read;
mod write;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use hermes_image::ids::{ChunkNo, ChunkRange, DiffId};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use parking_lot::{Mutex, RwLock};

use crate::bitmap::{AtomicBitmap, PAGE_CHUNKS};
use crate::catalogue::LayerRecord;
use crate::error::StoreError;
use crate::shared::Shared;

pub use read::Read;
pub(crate) use write::{Access, punch_hole};

/// Chunks in one group, the unit of last use and of eviction: 1 MiB at the usual 64 KiB a chunk.
pub const GROUP_CHUNKS: u32 = 16;
/// Groups whose last uses share a page in the catalogue.
pub(crate) const GROUPS_PER_PAGE: usize = (PAGE_CHUNKS / GROUP_CHUNKS) as usize;
/// Most stripes of one layer. Enough that two random puts rarely meet; 16 bytes each.
const STRIPES_MAX: u32 = 64;

/// Longest folio of the page cache on x86-64: a huge page (mm/pagemap.h, `PREFERRED_MAX_PAGECACHE_ORDER`). Folios are
/// aligned to their length.
pub const FOLIO_MAX_BYTES: u64 = 2 << 20;

/// A share of the groups: see the module's text.
#[derive(Debug, Default)]
struct Stripe {
    /// Shared by puts, alone for an evictor.
    lock: RwLock<()>,
    /// Raised after bits were cleared and before their bytes go.
    epoch: AtomicU64,
}

/// What was put and is not durable yet.
#[derive(Debug, Default)]
struct Pending {
    /// Put since the last sync began.
    dirty: Runs,
    /// Taken by the sync that is running now.
    syncing: Runs,
    /// Whether the layer stands in the queue of the sync thread.
    queued: bool,
}

impl Pending {
    /// Whether some of `chunks` is not durable yet.
    fn is_unsynced(&self, chunks: &ChunkRange) -> bool {
        self.dirty.intersects(chunks) || self.syncing.intersects(chunks)
    }
}

/// What the catalogue says, and whether it still may be changed for this layer.
#[derive(Debug)]
struct Ledger {
    durable: AtomicBitmap,
    /// Set when the layer was removed: its number's pages must not come back.
    retired: bool,
}

/// A registered layer of an open store. Shared; all methods may be called from any thread.
#[derive(Debug)]
pub struct Layer {
    table: ChunkTable,
    number: u32,
    file: File,
    path: PathBuf,
    present: AtomicBitmap,
    present_chunks: AtomicU32,
    present_bytes: AtomicU64,
    stripes: Box<[Stripe]>,
    /// Unix seconds of each group's last use.
    last_uses: Box<[AtomicU32]>,
    uses_changed: AtomicBool,
    uses: Mutex<u32>,
    pending: Mutex<Pending>,
    ledger: Mutex<Ledger>,
    flushing: Mutex<()>,
    /// What this layer has added to the store's count of used bytes.
    charged_bytes: AtomicU64,
    shared: Arc<Shared>,
    me: Weak<Layer>,
}

/// Keeps a layer's chunks from being evicted and the layer from being removed, for as long as it lives: whoever
/// mounts, serves or maps a layer holds one. Take it before asking [`Layer::is_complete`]; what is present then, stays.
#[derive(Debug)]
pub struct LayerUse {
    layer: Arc<Layer>,
}

impl LayerUse {
    /// The layer.
    pub fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }
}

impl std::ops::Deref for LayerUse {
    type Target = Layer;

    fn deref(&self) -> &Layer {
        &self.layer
    }
}

impl Drop for LayerUse {
    fn drop(&mut self) {
        *self.layer.uses.lock() -= 1;
        self.layer.shared.space.something_changed();
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        // The file of a removed layer gives its room back now that nobody has it open.
        self.shared.space.adjust(*self.charged_bytes.get_mut(), 0);
    }
}

/// What a layer is opened from.
pub(crate) struct LayerParts {
    pub(crate) table: ChunkTable,
    pub(crate) record: LayerRecord,
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    /// What the catalogue says is there.
    pub(crate) durable: AtomicBitmap,
    /// Last uses by the catalogue; what it does not know was last used at 0.
    pub(crate) last_uses: Box<[AtomicU32]>,
}

impl Layer {
    /// Opens a layer whose parts were checked against each other.
    pub(crate) fn new(parts: LayerParts, shared: Arc<Shared>) -> Result<Arc<Self>, StoreError> {
        let LayerParts { table, record, file, path, durable, last_uses } = parts;
        let present = AtomicBitmap::new(table.count());
        let (mut chunks, mut bytes) = (0, 0);
        for run in durable.runs(0..table.count(), true).iter() {
            let range = table.run_range(run.clone());
            bytes += range.end - range.start;
            chunks += run.end - run.start;
            for chunk in run {
                present.set(chunk);
            }
        }
        let groups = table.count().div_ceil(GROUP_CHUNKS);
        let layer = Arc::new_cyclic(|me| Self {
            number: record.number,
            present,
            present_chunks: AtomicU32::new(chunks),
            present_bytes: AtomicU64::new(bytes),
            stripes: (0..groups.clamp(1, STRIPES_MAX)).map(|_| Stripe::default()).collect(),
            last_uses,
            uses_changed: AtomicBool::new(false),
            uses: Mutex::new(0),
            pending: Mutex::default(),
            ledger: Mutex::new(Ledger { durable, retired: false }),
            flushing: Mutex::new(()),
            charged_bytes: AtomicU64::new(0),
            table,
            file,
            path,
            shared,
            me: me.clone(),
        });
        layer.reconcile()?;
        Ok(layer)
    }

    /// The chunk table.
    pub fn table(&self) -> &ChunkTable {
        &self.table
    }

    /// The layer's name.
    pub fn diff_id(&self) -> DiffId {
        self.table.diff_id()
    }

    /// Its number in this store: the same at every open, and never another layer's, also when this one is removed.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The layer file. Reading it where nothing is present gives zeros: hold a [`LayerUse`] and know what is present.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Path of the layer file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The chunks that are here.
    pub fn present(&self) -> Runs {
        self.present.runs(0..self.table.count(), true)
    }

    /// The chunks of `range` that are not here. What lies beyond the last chunk is ignored.
    pub fn missing(&self, range: ChunkRange) -> Runs {
        self.present.runs(range, false)
    }

    /// Whether `chunk` is here.
    pub fn contains(&self, chunk: ChunkNo) -> bool {
        self.present.contains(chunk.0)
    }

    /// Whether all of `range` is here. False when the range goes beyond the last chunk.
    pub fn contains_all(&self, range: ChunkRange) -> bool {
        range.end <= self.table.count() && self.present.contains_all(range)
    }

    /// Whether every chunk is here. Stays true only under a [`LayerUse`] that was taken before.
    pub fn is_complete(&self) -> bool {
        self.present_chunks.load(Ordering::Acquire) == self.table.count()
    }

    /// Bytes of the chunks that are here.
    pub fn present_bytes(&self) -> u64 {
        self.present_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that the filesystem has allocated for the layer file.
    ///
    /// # Errors
    /// When the file cannot be asked.
    pub fn allocated_bytes(&self) -> Result<u64, StoreError> {
        use std::os::unix::fs::MetadataExt;
        let metadata = self.file.metadata().map_err(StoreError::io("stat", &self.path))?;
        // st_blocks counts units of 512 bytes on Linux, whatever the block size (stat(2)).
        Ok(metadata.blocks() * 512)
    }

    /// Keeps the layer and its chunks here until the answer is dropped.
    pub fn hold(self: &Arc<Self>) -> LayerUse {
        *self.uses.lock() += 1;
        LayerUse { layer: Arc::clone(self) }
    }

    /// Whether anybody holds the layer.
    pub fn is_held(&self) -> bool {
        *self.uses.lock() > 0
    }

    /// Sets the store's count of used bytes right for this layer.
    fn reconcile(&self) -> Result<(), StoreError> {
        let now = self.allocated_bytes()?;
        let before = self.charged_bytes.swap(now, Ordering::Relaxed);
        self.shared.space.adjust(before, now);
        Ok(())
    }

    fn stripe(&self, group: u32) -> &Stripe {
        &self.stripes[group as usize % self.stripes.len()]
    }

    /// The groups that `chunks` touch; empty for no chunks.
    fn groups(chunks: &ChunkRange) -> std::ops::Range<u32> {
        chunks.start / GROUP_CHUNKS..chunks.end.div_ceil(GROUP_CHUNKS)
    }

    /// The chunks of `group`.
    pub(crate) fn group_chunks(&self, group: u32) -> ChunkRange {
        group * GROUP_CHUNKS..((group + 1) * GROUP_CHUNKS).min(self.table.count())
    }

    pub(crate) fn group_count(&self) -> u32 {
        self.last_uses.len() as u32
    }

    /// Notes that `chunks` were used now. One relaxed load, and a store at most once a second and group.
    fn touch(&self, chunks: &ChunkRange) {
        let now = self.shared.clock.seconds();
        for group in Self::groups(chunks) {
            let last_use = &self.last_uses[group as usize];
            if last_use.load(Ordering::Relaxed) != now {
                last_use.store(now, Ordering::Relaxed);
                self.uses_changed.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Unix seconds of a group's last use.
    pub(crate) fn group_last_use(&self, group: u32) -> u32 {
        self.last_uses[group as usize].load(Ordering::Relaxed)
    }

    /// Unix seconds when anything of the layer was last used; 0 for never.
    pub fn last_use_seconds(&self) -> u64 {
        self.last_uses.iter().map(|last_use| last_use.load(Ordering::Relaxed)).max().unwrap_or(0).into()
    }

    /// Writes the last uses to the catalogue, if any changed. Buffered: a crash may lose the last minute of them.
    pub(crate) fn write_uses(&self) -> Result<(), StoreError> {
        if !self.uses_changed.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let pages: Vec<(u32, Vec<u8>)> = (0_u32..)
            .zip(self.last_uses.chunks(GROUPS_PER_PAGE))
            .map(|(page, uses)| {
                let mut bytes: Vec<u8> =
                    uses.iter().flat_map(|last_use| last_use.load(Ordering::Relaxed).to_le_bytes()).collect();
                bytes.resize(4 * GROUPS_PER_PAGE, 0);
                (page, bytes)
            })
            .collect();
        let ledger = self.ledger.lock();
        if ledger.retired { Ok(()) } else { self.shared.catalogue.write_uses(self.number, &pages) }
    }

    /// Drops the store's share of the page cache up to the end of a logical range: the copy that the layer file's own
    /// pages are. Dirty pages stay. See [`DropBehind`](crate::DropBehind).
    ///
    /// The kernel drops whole folios only, and readahead makes folios longer than most reads. So the range is taken to
    /// begin at a multiple of [`FOLIO_MAX_BYTES`]: what an earlier read could not drop goes with the one that reaches
    /// the end of its folio. What was read ahead of `range` stays.
    ///
    /// # Errors
    /// When the system refuses the advice.
    pub fn drop_cached(&self, range: std::ops::Range<u64>) -> Result<(), StoreError> {
        if range.is_empty() {
            return Ok(());
        }
        let start = range.start - range.start % FOLIO_MAX_BYTES;
        let len = std::num::NonZeroU64::new(range.end - start);
        rustix::fs::fadvise(&self.file, start, len, rustix::fs::Advice::DontNeed)
            .map_err(StoreError::io("drop cached pages of", &self.path))
    }
}
