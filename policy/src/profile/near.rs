//! Fetching what lies near what a start reads, when no profile knows what it will read.
//!
//! Files that are read together mostly lie together: those of a package, of a class path, of a folder. A first start waits for
//! one round trip after the other while the link is idle; so what is around each chunk that it reads is fetched meanwhile, more
//! ahead than behind, the newest first: less of it from a source that is near. What is far from everything that was read is left alone.
//! Readers that wait go first, as always.
//!
//! It is a guess that is made while the start goes on, bounded as a profile's prefetch is ([`PrefetchLimits`]): by what may be
//! under way, and by what was fetched and nobody has read. Most of it is never read, so it gives way: as soon as batches come late,
//! which is when they, and readers with them, wait for each other on a link or a processor, less may be under way.

use std::collections::BTreeMap;
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

/// How far around a chunk is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reach {
    /// Uncompressed bytes.
    ahead_bytes: u64,
    /// Uncompressed bytes.
    behind_bytes: u64,
}

/// Where a round trip is long. What a start has not read yet of the next quarter of a MiB, of the next half and of the next whole it reads
/// by 52 to 77 in a hundred, 42 to 72 and 31 to 66 (layers of a Spark master), 46 to 66, 38 to 60 and 33 to 58 (of a Python
/// service); behind a chunk by 0 to 42 and 17 to 43 of the next quarter. First starts from a registry took as long within 3 % with
/// nothing behind, with as much behind as ahead, and with half of that; 7 % longer over 200 Mbit/s with half as much ahead, and 7 %
/// longer at 1 Gbit/s where twice and four times as far followed, which fetched 365 rather than 222 MB and 144 rather than 106 (two and
/// three rounds, in turns).
const FAR: Reach = Reach { ahead_bytes: 1 << 20, behind_bytes: 256 << 10 };
/// Where half of the batches come within [`LATE`], as from a peer: there a reader loses little by asking itself, and what nobody reads takes the
/// link and the processors. First starts from a warm peer at 1 Gbit/s, each with [`FAR`] before and three rounds, in turns: Spark 5.4 and 5.0 s
/// became 4.3 and 4.9 with 159 rather than 212 MB, Python 3.5 became 3.4 with 94 rather than 109, a Node service 1.5 became 1.6 with 36 rather
/// than 38. With half of it they took as long (Spark 5.6 and 4.8 s against 5.1 and 5.4), with an eighth longer (6.5 and 5.3). That one batch was quick says
/// nothing: by the quickest lately, starts from a registry 20 ms away took up to 10 % longer.
const NEAR: Reach = Reach { ahead_bytes: 512 << 10, behind_bytes: 0 };

#[derive(Debug)]
struct Around {
    layer: DiffId,
    geometry: Arc<LayerGeometry>,
    /// What was asked for, or was here when its turn came.
    asked: Runs,
}

impl Around {
    /// What of the surroundings of `chunk` to ask for next: ahead, then behind.
    fn next(&self, chunk: u32, reach: Reach) -> Option<ChunkRange> {
        let around = self.geometry.around(chunk, reach.behind_bytes, reach.ahead_bytes);
        let of = |run: ChunkRange| Runs::one(run).difference(&self.asked).first();
        of(chunk..around.end).or_else(|| of(around.start..chunk))
    }
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
    /// Which of the last batches took less than [`LATE`], the newest lowest.
    in_time: u16,
}

impl Pace {
    /// How far to fetch.
    fn reach(&self) -> Reach {
        if self.in_time.count_ones() >= u16::BITS / 2 { NEAR } else { FAR }
    }

    fn note(&mut self, asked: Instant, now: Instant, bytes: u64, flow: &mut Flow) {
        let took = now.since(asked);
        self.in_time = self.in_time << 1 | u16::from(took < LATE);
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
    /// What was read, by the layer's place, the newest last; without those around which all was asked for.
    reads: Vec<(usize, u32)>,
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
        Self { flow, pace, layers, reads: Vec::new() }
    }

    /// The start has read `chunk` for the first time. What does not exist is left out.
    pub fn read(&mut self, layer: DiffId, chunk: u32) {
        let Ok(place) = self.layers.binary_search_by_key(&layer, |around| around.layer) else { return };
        if chunk < self.layers[place].geometry.chunk_count() {
            self.reads.push((place, chunk));
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
        let (size, reach, mut total) = (self.flow.batch_bytes(), self.pace.reach(), 0);
        while total < size
            && let Some(&(place, chunk)) = self.reads.last()
        {
            let around = &mut self.layers[place];
            let Some(run) = around.next(chunk, reach) else {
                self.reads.pop();
                continue;
            };
            let geometry = &around.geometry;
            let enough = geometry.chunk_at(geometry.start_bytes(run.start) + (size - total)) + 1;
            let part = run.start..run.end.min(enough);
            let wanted = missing(around.layer, part.clone()).within(part.clone());
            let bytes = wanted.iter().map(|run| geometry.len_bytes(&run)).sum::<u64>();
            Batch::add(&mut batches, around.layer, &wanted, bytes);
            total += bytes;
            around.asked.insert(part);
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
    /// Chunks ahead, and behind.
    const AHEAD: u32 = (FAR.ahead_bytes / CHUNK) as u32;
    const BEHIND: u32 = (FAR.behind_bytes / CHUNK) as u32;

    fn near(limits: PrefetchLimits) -> Near {
        let geometry = Arc::new(LayerGeometry::new(vec![CHUNK; 1000]).expect("valid"));
        Near::new(&BTreeMap::from([(A, Arc::clone(&geometry)), (B, geometry)]), limits)
    }

    fn all(_: DiffId, chunks: ChunkRange) -> Runs {
        Runs::one(chunks)
    }

    /// Everything that is asked for when all comes at once and is read, batch by batch.
    fn order(near: &mut Near) -> Vec<Batch> {
        order_at(near, 0)
    }

    /// The same when each batch takes so many milliseconds.
    fn order_at(near: &mut Near, took: u64) -> Vec<Batch> {
        let (mut order, mut total) = (Vec::new(), 0);
        loop {
            let batches = near.next(all);
            if batches.is_empty() {
                break;
            }
            for batch in batches {
                total += batch.bytes;
                near.ended(batch.bytes, Instant::ZERO, Instant::ZERO + Duration::from_millis(took));
                order.push(batch);
            }
            near.used(total);
        }
        order
    }

    #[test]
    fn what_is_ahead_comes_first_then_what_is_behind_and_everything_once() {
        let mut near = near(PrefetchLimits::default());
        assert!(near.next(all).is_empty(), "nothing was read");
        near.read(A, 500);
        near.read(A, 5000);
        near.read(A, 501);
        let order = order(&mut near);
        let mut seen = Runs::new();
        for batch in &order {
            assert_eq!((batch.layer, seen.intersection(&batch.chunks)), (A, Runs::new()), "{batch:?} twice");
            seen.insert_all(&batch.chunks);
        }
        assert_eq!(seen, Runs::one(500 - BEHIND..501 + AHEAD));
        let place = |chunk| order.iter().position(|batch| batch.chunks.contains(chunk)).expect("asked for");
        assert_eq!(place(501), 0);
        assert!(place(501) < place(500 + AHEAD) && place(500 + AHEAD) <= place(501 - BEHIND));
    }

    #[test]
    fn less_is_fetched_from_near_than_from_far() {
        let mut near = near(PrefetchLimits::near());
        let ended = |near: &mut Near, batches: usize, took: u64| {
            for _ in 0..batches {
                near.ended(0, Instant::ZERO, Instant::ZERO + Duration::from_millis(took));
            }
        };
        let around = |near: &mut Near, chunk: u32| {
            near.read(A, chunk);
            order_at(near, 25).iter().map(|batch| batch.chunks.chunk_count()).sum::<u64>()
        };
        // Now and then one comes at once from far, too: another ask was about to bring it.
        for _ in 0..20 {
            ended(&mut near, 2, 25);
            ended(&mut near, 1, 1);
        }
        assert_eq!(around(&mut near, 100), u64::from(BEHIND + AHEAD));
        ended(&mut near, 16, 5);
        assert_eq!(around(&mut near, 300), NEAR.ahead_bytes / CHUNK);
        ended(&mut near, 16, 25);
        assert_eq!(around(&mut near, 500), u64::from(BEHIND + AHEAD));
    }

    #[test]
    fn around_the_newest_read_comes_first() {
        let mut near = near(PrefetchLimits::default());
        near.read(A, 100);
        assert!(near.next(all)[0].chunks.contains(100));
        near.read(B, 700);
        let next = near.next(all);
        assert_eq!((next[0].layer, next[0].chunks.contains(700)), (B, true));
    }

    #[test]
    fn what_is_here_costs_nothing_and_what_nobody_reads_ends_it() {
        let limits = PrefetchLimits { ahead_bytes: 2 << 20, ..PrefetchLimits::default() };
        let mut near = near(limits);
        (500..700).step_by(AHEAD as usize).for_each(|chunk| near.read(A, chunk));
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
        (0..1_000_000).step_by(AHEAD as usize).for_each(|chunk| near.read(A, chunk));
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
