//! When each chunk of a layer was first read, for the starts that are being recorded.
//!
//! A layer has some slots, one for each start that reads it at the same time. A slot is a word for each chunk:
//!
//! | bits | meaning |
//! |---|---|
//! | 0 to 26 | when it was first read, in units of 64 us since the slot was claimed, plus one; 0 for never |
//! | 27 | the reader had to wait |
//! | 28, 29 | where its bytes came from: here before, another layer, a peer, a registry |
//! | 30 | it was asked for by the profile |
//!
//! All of it is relaxed: each word is a fact of its own, and whoever looks may see it a little later. A read that began
//! before its slot was claimed anew may leave a wrong time in it, which the merge of several records outvotes.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Instant;

use hermes_image::ids::ChunkRange;
use hermes_image::runs::Runs;
use hermes_policy::profile::TouchSource;

use crate::metrics::ArrivedFrom;

/// Starts that one layer takes part in at once. Memory for a slot is taken when it is first used: four bytes a chunk, 64 KB
/// for a layer of a gigabyte.
const SLOTS: usize = 8;
/// Unit of times, in microseconds. 2^27 of them are more than two hours; a start is over long before.
const UNIT_US: u64 = 64;
const TIME_MASK: u32 = (1 << 27) - 1;
const WAITED: u32 = 1 << 27;
const SOURCE_SHIFT: u32 = 28;
const PREFETCHED: u32 = 1 << 30;

/// The zero of this process's times.
static ZERO: LazyLock<Instant> = LazyLock::new(Instant::now);

fn now_units() -> u64 {
    u64::try_from(ZERO.elapsed().as_micros()).unwrap_or(u64::MAX) / UNIT_US
}

#[derive(Debug, Default)]
struct Slot {
    since_units: AtomicU64,
    cells: OnceLock<Box<[AtomicU32]>>,
}

/// The slots of one layer.
#[derive(Debug, Default)]
pub struct Touches {
    chunk_count: u32,
    /// One bit for each slot that records.
    active: AtomicU32,
    slots: [Slot; SLOTS],
}

/// What is known of a chunk that something happened to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touched {
    /// The chunk.
    pub chunk: u32,
    /// When it was first read, in microseconds since the claim; `None` for not yet.
    pub at_us: Option<u64>,
    /// Whether the reader had to wait.
    pub waited: bool,
    /// Where its bytes came from.
    pub source: TouchSource,
    /// Whether the profile had asked for it.
    pub prefetched: bool,
}

impl Touches {
    /// For a layer of so many chunks. Nothing is recorded.
    pub fn new(chunk_count: u32) -> Self {
        Self { chunk_count, ..Self::default() }
    }

    /// Whether anything is recorded: all that a read costs otherwise.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed) != 0
    }

    /// Notes that `chunks` were read; the reader has to wait for those that are `missing`.
    pub fn read(&self, chunks: ChunkRange, missing: &Runs) {
        let mut now = None;
        self.each_slot(|slot, cells| {
            for chunk in chunks.start..chunks.end.min(self.chunk_count) {
                let cell = &cells[chunk as usize];
                let mut known = cell.load(Ordering::Relaxed);
                while known & TIME_MASK == 0 {
                    let now = *now.get_or_insert_with(now_units);
                    let since = now.saturating_sub(slot.since_units.load(Ordering::Relaxed)) + 1;
                    let time = since.min(u64::from(TIME_MASK)) as u32;
                    let waited = if missing.contains(chunk) { WAITED } else { 0 };
                    match cell.compare_exchange_weak(known, known | time | waited, Ordering::Relaxed, Ordering::Relaxed)
                    {
                        Ok(_) => break,
                        Err(other) => known = other,
                    }
                }
            }
        });
    }

    /// Notes where the bytes of `chunks` came from. What came twice keeps its first source.
    pub fn arrived(&self, chunks: &Runs, from: ArrivedFrom) {
        let source = match from {
            ArrivedFrom::Local => TouchSource::Local,
            ArrivedFrom::Peer => TouchSource::Peer,
            // A byte comes from one place; the mixed value is for reads.
            ArrivedFrom::Registry | ArrivedFrom::Mixed => TouchSource::Registry,
        };
        self.each_slot(|_, cells| mark(cells, chunks, (source as u32) << SOURCE_SHIFT, 3 << SOURCE_SHIFT));
    }

    fn each_slot(&self, mut each: impl FnMut(&Slot, &[AtomicU32])) {
        let active = self.active.load(Ordering::Relaxed);
        for (no, slot) in self.slots.iter().enumerate() {
            if active & (1 << no) != 0
                && let Some(cells) = slot.cells.get()
            {
                each(slot, cells);
            }
        }
    }

    /// Begins to record; `None` when as many starts as a layer can have are being recorded.
    pub fn claim(self: &Arc<Self>) -> Option<Claim> {
        let active = self.active.load(Ordering::Acquire);
        for (no, slot) in self.slots.iter().enumerate().filter(|(no, _)| active & (1 << no) == 0) {
            let cells = slot.cells.get_or_init(|| (0..self.chunk_count).map(|_| AtomicU32::new(0)).collect());
            // Whoever sets the bit owns the slot: somebody else may be at it.
            if self.active.fetch_or(1 << no, Ordering::AcqRel) & (1 << no) != 0 {
                continue;
            }
            cells.iter().for_each(|cell| cell.store(0, Ordering::Relaxed));
            slot.since_units.store(now_units(), Ordering::Relaxed);
            return Some(Claim { touches: Arc::clone(self), slot: no });
        }
        None
    }
}

/// Sets `bits` in the cells of `chunks` where none of `unless` is set.
fn mark(cells: &[AtomicU32], chunks: &Runs, bits: u32, unless: u32) {
    for chunk in chunks.chunks() {
        let Some(cell) = cells.get(chunk as usize) else { return };
        if cell.load(Ordering::Relaxed) & unless == 0 {
            cell.fetch_or(bits, Ordering::Relaxed);
        }
    }
}

/// A slot of a layer, for one start. Dropping it ends the recording.
#[derive(Debug)]
pub struct Claim {
    touches: Arc<Touches>,
    slot: usize,
}

impl Claim {
    fn cells(&self) -> &[AtomicU32] {
        self.touches.slots[self.slot].cells.get().map_or(&[], |cells| cells)
    }

    /// Notes that the profile asks for `chunks`, before it does.
    pub fn prefetching(&self, chunks: &Runs) {
        mark(self.cells(), chunks, PREFETCHED, PREFETCHED);
    }

    /// Notes that the profile asked for `chunks` and they did not come.
    pub fn not_prefetched(&self, chunks: &Runs) {
        for chunk in chunks.chunks() {
            let Some(cell) = self.cells().get(chunk as usize) else { return };
            cell.fetch_and(!PREFETCHED, Ordering::Relaxed);
        }
    }

    /// Every chunk that was read, came or was asked for, in order. Looks at each chunk of the layer: 0.1 ms for 10 GB.
    pub fn touched(&self) -> impl Iterator<Item = Touched> + '_ {
        (0_u32..).zip(self.cells()).filter_map(|(chunk, cell)| {
            let cell = cell.load(Ordering::Relaxed);
            let time = cell & TIME_MASK;
            (cell != 0).then(|| Touched {
                chunk,
                at_us: (time > 0).then(|| u64::from(time - 1) * UNIT_US),
                waited: cell & WAITED != 0,
                source: TouchSource::ALL[(cell >> SOURCE_SHIFT & 3) as usize],
                prefetched: cell & PREFETCHED != 0,
            })
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.touches.active.fetch_and(!(1 << self.slot), Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(range: ChunkRange) -> Runs {
        Runs::one(range)
    }

    #[test]
    fn the_first_read_of_a_chunk_counts() {
        let touches = Arc::new(Touches::new(100));
        touches.read(0..5, &Runs::new());
        assert!(!touches.is_active());
        let claim = touches.claim().expect("a slot");
        assert!(touches.is_active());
        touches.arrived(&runs(3..4), ArrivedFrom::Peer);
        touches.read(2..6, &runs(4..5));
        // Later reads, later arrivals, and what is beyond the layer change nothing.
        touches.read(0..200, &runs(2..5));
        touches.arrived(&runs(3..5), ArrivedFrom::Registry);
        touches.arrived(&runs(90..300), ArrivedFrom::Local);
        claim.prefetching(&runs(4..6));
        let touched: Vec<_> = claim.touched().collect();
        assert_eq!(touched.len(), 100);
        let of = |chunk: usize| (touched[chunk].waited, touched[chunk].source, touched[chunk].prefetched);
        assert_eq!(of(1), (false, TouchSource::Here, false));
        assert_eq!(of(2), (false, TouchSource::Here, false), "it was read before it was missing");
        assert_eq!(of(3), (false, TouchSource::Peer, false));
        assert_eq!(of(4), (true, TouchSource::Registry, true));
        assert!(touched.iter().all(|touched| touched.at_us.is_some_and(|at| at < 60_000_000)));
    }

    #[test]
    fn slots_are_apart_begin_empty_and_are_few() {
        let touches = Arc::new(Touches::new(10));
        let first = touches.claim().expect("a slot");
        touches.read(0..1, &Runs::new());
        let second = touches.claim().expect("a slot");
        touches.read(1..2, &Runs::new());
        let chunks = |claim: &Claim| claim.touched().map(|touched| touched.chunk).collect::<Vec<_>>();
        assert_eq!((chunks(&first), chunks(&second)), (vec![0, 1], vec![1]));
        second.prefetching(&runs(7..8));
        second.not_prefetched(&runs(7..8));
        assert_eq!(chunks(&second), [1]);
        drop(first);
        touches.read(2..3, &Runs::new());
        let again = touches.claim().expect("the slot is free");
        assert_eq!(chunks(&again), [0_u32; 0]);
        assert_eq!(chunks(&second), [1, 2]);
        let more: Vec<_> = std::iter::from_fn(|| touches.claim()).collect();
        assert_eq!(more.len(), SLOTS - 2);
        drop((again, second, more));
        assert!(!touches.is_active());
    }

    #[test]
    fn threads_agree_on_one_first_read() {
        let touches = Arc::new(Touches::new(1000));
        let claim = touches.claim().expect("a slot");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|chunk| touches.read(chunk..chunk + 1, &Runs::new())));
            }
        });
        assert_eq!(claim.touched().filter(|touched| touched.at_us.is_some()).count(), 1000);
    }
}
