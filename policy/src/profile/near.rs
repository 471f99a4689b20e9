//! Fetching what lies near what a start reads, when no profile knows what it will read.
//!
//! Files that are read together mostly lie together: those of a package, of a class path, of a folder. A first start waits for
//! one round trip after the other while the link is idle; so what is around each chunk that it reads is fetched meanwhile, in
//! circles: the nearest around all that was read, the newest first, and then twice as far. A chunk that is read for the first
//! time begins a circle of its own, before all wider ones. What is far from everything that was read is left alone. Readers that
//! wait go first, as always.
//!
//! It is a guess that is made while the start goes on, bounded as a profile's prefetch is ([`PrefetchLimits`]): by what may be
//! under way, and by what was fetched and nobody has read. Most of it is never read, so it gives way: as soon as batches come late,
//! which is when they, and readers with them, wait for each other on a link or a processor, less may be under way.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;

use super::prefetch::{Batch, Flow, PrefetchLimits};
use crate::geometry::LayerGeometry;
use crate::time::{Duration, Instant};

/// How much longer than the quickest one lately a batch may take: what a reader waits, at worst, behind what is under way here. As much as
/// a round trip to a registry. With twice as much first starts of Spark and of a Python service took as long at 1 Gbit/s and fetched
/// 406 rather than 287 MB and 154 rather than 133 (four asks beside a reader's own, three rounds each); with five times as much they
/// took 2 and 9 % longer than with twice as much.
const LATE: Duration = Duration::from_millis(20);
/// Batches are compared with the quickest one since less was put under way last, and with those of so many times between before. A
/// batch that a peer had at hand, or that another ask was about to bring, makes all from a registry late; it is forgotten after that.
const QUICKEST_OF: usize = 3;
/// Uncompressed bytes that the first circle reaches ahead of a chunk, and behind it. Of the reads of a Python service and of a
/// Spark master that follow nothing which was read before, two thirds are within that; more of them behind than ahead.
const FIRST_REACH_BYTES: u64 = 1 << 20;
/// Circles around a chunk, each twice as far as the one before: 88 and 89 in a hundred of those reads are within the widest, and
/// what is farther away is anything.
const CIRCLES: u32 = 3;

#[derive(Debug)]
struct Around {
    layer: DiffId,
    geometry: Arc<LayerGeometry>,
    /// What was asked for, or was here when its turn came.
    asked: Runs,
}

impl Around {
    /// How far a circle of `level` around `chunk` reaches.
    fn circle(&self, chunk: u32, level: u32) -> ChunkRange {
        let reach = FIRST_REACH_BYTES << level;
        let at = self.geometry.start_bytes(chunk);
        let first = self.geometry.chunk_at(at.saturating_sub(reach));
        first..self.geometry.chunk_at(at.saturating_add(reach)).max(chunk + 1)
    }
}

/// The greatest comes first: the nearest, and of these the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Circle {
    level: Reverse<u32>,
    /// Counts the reads.
    no: u64,
    /// The layer by its place.
    place: usize,
    chunk: u32,
}

/// Whether batches come in time.
#[derive(Debug, Default)]
struct Pace {
    /// The quickest batch since less was put under way last, and those of the times between before: what is quick differs from source
    /// to source.
    quickest: Option<Duration>,
    before: [Option<Duration>; QUICKEST_OF],
    /// When less was put under way. What was asked for before says nothing of what that helps.
    slowed: Option<Instant>,
}

impl Pace {
    fn note(&mut self, asked: Instant, now: Instant, bytes: u64, flow: &mut Flow) {
        let took = now.since(asked);
        let quickest = *self.quickest.insert(self.quickest.map_or(took, |quickest| quickest.min(took)));
        let least = self.before.iter().flatten().copied().fold(quickest, Duration::min);
        match self.slowed {
            Some(slowed) if asked < slowed => {}
            _ if took > least + LATE => {
                self.slowed = Some(now);
                self.before.rotate_right(1);
                self.before[0] = self.quickest.take();
                flow.halve();
            }
            Some(_) => flow.widen_gently(bytes),
            None => flow.widen(bytes),
        }
    }
}

/// A prefetch around what one start reads.
#[derive(Debug)]
pub struct Near {
    flow: Flow,
    pace: Pace,
    layers: Vec<Around>,
    circles: BinaryHeap<Circle>,
    reads: u64,
}

impl Near {
    /// Knows of no read yet.
    pub fn new(geometries: &BTreeMap<DiffId, Arc<LayerGeometry>>, limits: PrefetchLimits) -> Self {
        let around = |(layer, geometry): (&DiffId, &Arc<LayerGeometry>)| Around {
            layer: *layer,
            geometry: Arc::clone(geometry),
            asked: Runs::new(),
        };
        let layers = geometries.iter().map(around).collect();
        let (flow, pace) = (Flow::new(limits), Pace::default());
        Self { flow, pace, layers, circles: BinaryHeap::new(), reads: 0 }
    }

    /// The start has read `chunk` for the first time. What does not exist is left out.
    pub fn read(&mut self, layer: DiffId, chunk: u32) {
        let Ok(place) = self.layers.binary_search_by_key(&layer, |around| around.layer) else { return };
        if chunk < self.layers[place].geometry.chunk_count() {
            self.reads += 1;
            self.circles.push(Circle { level: Reverse(0), no: self.reads, place, chunk });
        }
    }

    /// So many bytes of what was fetched have been read, all in all.
    pub fn used(&mut self, bytes: u64) {
        self.flow.used(bytes);
    }

    /// A batch of so many bytes is over, however it ended.
    pub fn ended(&mut self, bytes: u64, asked: Instant, now: Instant) {
        self.flow.ended(bytes);
        self.pace.note(asked, now, bytes, &mut self.flow);
    }

    /// What to ask for now, empty when that has to wait for [`Self::ended`], [`Self::used`] or [`Self::read`]; `missing` says
    /// what of a layer's chunks is not here. All of it counts as under way from now on.
    pub fn next(&mut self, mut missing: impl FnMut(DiffId, ChunkRange) -> Runs) -> Vec<Batch> {
        let mut batches = Vec::new();
        if !self.flow.has_room() {
            return batches;
        }
        let (size, mut total) = (self.flow.batch_bytes(), 0);
        while total < size
            && let Some(circle) = self.circles.pop()
        {
            let around = &self.layers[circle.place];
            let (layer, geometry) = (&around.layer, &around.geometry);
            let reach = around.circle(circle.chunk, circle.level.0);
            let ahead = Runs::one(circle.chunk..reach.end).difference(&around.asked);
            let next = ahead.first().or_else(|| Runs::one(reach.start..circle.chunk).difference(&around.asked).first());
            let Some(run) = next else {
                let level = circle.level.0 + 1;
                if level < CIRCLES {
                    self.circles.push(Circle { level: Reverse(level), ..circle });
                }
                continue;
            };
            let enough = geometry.chunk_at(geometry.start_bytes(run.start) + (size - total)) + 1;
            let part = run.start..run.end.min(enough);
            let wanted = missing(*layer, part.clone()).within(part.clone());
            let bytes = wanted.iter().map(|run| geometry.len_bytes(&run)).sum::<u64>();
            Batch::add(&mut batches, *layer, &wanted, bytes);
            total += bytes;
            self.layers[circle.place].asked.insert(part);
            self.circles.push(circle);
        }
        self.flow.asked(total);
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 65_536;
    const A: DiffId = DiffId([1; 32]);
    const B: DiffId = DiffId([2; 32]);
    /// Chunks that the first circle reaches ahead, and behind.
    const REACH: u32 = (FIRST_REACH_BYTES / CHUNK) as u32;

    fn near(limits: PrefetchLimits) -> Near {
        let geometry = Arc::new(LayerGeometry::new(vec![CHUNK; 1000]).expect("valid"));
        Near::new(&BTreeMap::from([(A, Arc::clone(&geometry)), (B, geometry)]), limits)
    }

    fn all(_: DiffId, chunks: ChunkRange) -> Runs {
        Runs::one(chunks)
    }

    /// Everything that is asked for when all comes at once and is read, batch by batch, up to `bytes`.
    fn order(near: &mut Near, bytes: u64) -> Vec<Batch> {
        let (mut order, mut total) = (Vec::new(), 0);
        while total < bytes {
            let batches = near.next(all);
            if batches.is_empty() {
                break;
            }
            for batch in batches {
                total += batch.bytes;
                near.ended(batch.bytes, Instant::ZERO, Instant::ZERO);
                order.push(batch);
            }
            near.used(total);
        }
        order
    }

    #[test]
    fn the_nearest_come_first_ahead_before_behind_and_everything_once() {
        let mut near = near(PrefetchLimits::default());
        assert!(near.next(all).is_empty(), "nothing was read");
        near.read(A, 500);
        near.read(A, 5000);
        let order = order(&mut near, u64::MAX);
        let mut seen = Runs::new();
        for batch in &order {
            assert_eq!((batch.layer, seen.intersection(&batch.chunks)), (A, Runs::new()), "{batch:?} twice");
            seen.insert_all(&batch.chunks);
        }
        let widest = REACH << (CIRCLES - 1);
        assert!(seen.contains_all(500 - widest..500 + widest) && seen.chunk_count() <= 2 * u64::from(widest) + 2);
        let place = |chunk| order.iter().position(|batch| batch.chunks.contains(chunk)).expect("asked for");
        assert_eq!(place(500), 0);
        assert!(place(500) < place(500 + REACH - 1) && place(500 + REACH - 1) <= place(500 - REACH));
        assert!(
            place(500 - REACH) <= place(500 + 2 * REACH - 1) && place(500 + 2 * REACH - 1) < place(500 - 4 * REACH)
        );
    }

    #[test]
    fn a_new_read_goes_before_wider_circles_around_older_ones() {
        let mut near = near(PrefetchLimits::default());
        near.read(A, 100);
        order(&mut near, 10 << 20);
        near.read(B, 700);
        let next = near.next(all);
        assert_eq!((next[0].layer, next[0].chunks.contains(700)), (B, true));
    }

    #[test]
    fn what_is_here_costs_nothing_and_what_nobody_reads_ends_it() {
        let limits = PrefetchLimits { ahead_bytes: 2 << 20, ..PrefetchLimits::default() };
        let mut near = near(limits);
        near.read(A, 500);
        let half = |layer: DiffId, chunks: ChunkRange| {
            let mut missing = all(layer, chunks);
            missing.remove(0..500);
            missing
        };
        let mut total = 0;
        loop {
            let batches = near.next(half);
            if batches.is_empty() {
                break;
            }
            for batch in batches {
                assert!(batch.chunks.first().is_some_and(|run| run.start >= 500), "{batch:?}");
                total += batch.bytes;
                near.ended(batch.bytes, Instant::ZERO, Instant::ZERO);
            }
        }
        assert!((limits.ahead_bytes..2 * limits.ahead_bytes).contains(&total), "{total}");
        near.used(total);
        assert!(!near.next(half).is_empty(), "it goes on when they are read");
    }

    /// What is used of a link of `rate` bytes a second that nothing else uses, and how long batches wait for each other at most once
    /// that was found out; in `seconds`.
    fn over_a_link(rate: u64, seconds: u64) -> (f64, Duration) {
        let far = Duration::from_millis(20);
        let end = Instant::ZERO + Duration::from_secs(seconds);
        let geometry = Arc::new(LayerGeometry::new(vec![CHUNK; 1_000_000]).expect("valid"));
        let mut near = Near::new(
            &BTreeMap::from([(A, geometry)]),
            PrefetchLimits { ahead_bytes: u64::MAX, ..PrefetchLimits::near() },
        );
        (0..1_000_000).step_by(REACH as usize).for_each(|chunk| near.read(A, chunk));
        let (mut now, mut free, mut came, mut waited) = (Instant::ZERO, Instant::ZERO, 0, Duration::ZERO);
        let mut under_way = std::collections::VecDeque::new();
        while now < end {
            loop {
                let batches = near.next(all);
                if batches.is_empty() {
                    break;
                }
                for batch in batches {
                    free = free.max(now) + Duration::from_nanos(batch.bytes * 1_000_000_000 / rate);
                    under_way.push_back((batch.bytes, now, free + far));
                }
            }
            let (bytes, asked, at) = under_way.pop_front().expect("something is always under way");
            let alone = far + Duration::from_nanos(bytes * 1_000_000_000 / rate);
            if asked > Instant::ZERO + Duration::from_secs(3) {
                waited = waited.max(at.since(asked) - alone);
            }
            now = at;
            came += bytes;
            near.ended(bytes, asked, now);
        }
        (came as f64 / (rate * seconds) as f64, waited)
    }

    #[test]
    fn a_batch_from_near_does_not_slow_what_comes_from_far_for_long() {
        let geometry = Arc::new(LayerGeometry::new(vec![CHUNK; 1_000_000]).expect("valid"));
        let mut near = Near::new(&BTreeMap::from([(A, geometry)]), PrefetchLimits::near());
        near.ended(512 << 10, Instant::ZERO, Instant::ZERO + Duration::from_millis(1));
        let mut now = Instant::ZERO + Duration::from_millis(1);
        let windows: Vec<u64> = (0..200)
            .map(|_| {
                let asked = now;
                now = now + Duration::from_millis(30);
                near.ended(512 << 10, asked, now);
                near.flow.window_bytes()
            })
            .collect();
        assert!(windows.iter().min().is_some_and(|least| *least <= 1 << 20), "it gives way first: {windows:?}");
        assert!(windows.last().is_some_and(|last| *last >= 4 << 20), "and goes on: {windows:?}");
    }

    #[test]
    fn it_fills_an_idle_link_and_keeps_nobody_waiting_long() {
        for mb_per_second in [5, 50, 500] {
            let rate = mb_per_second * 1_000_000;
            let (used, waited) = over_a_link(rate, 10);
            // One batch is always asked for, and one more to see whether there is room again.
            let batch = Duration::from_nanos(PrefetchLimits::near().first_batch_bytes * 1_000_000_000 / rate);
            assert!(used > 0.9 && waited <= LATE + 2 * batch, "{mb_per_second} MB/s: {used:.2}, {waited:?}");
        }
    }
}
