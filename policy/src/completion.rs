//! Fetching the rest of an image in the background: when to begin, how fast, in which order.
//!
//! A container that starts reads what it needs on demand; everything else may come later. When that start is over
//! ([`is_settled`]) the rest can be fetched without being in its way, no faster than a rate ([`Pace`]), in parts
//! ([`parts`]) that begin somewhere else on each node, so that nodes which complete one image together fetch
//! different chunks and trade. What the bytes cost is known before ([`Room`]): completing an image never takes the
//! place of another image's bytes.

use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;

use crate::geometry::LayerGeometry;
use crate::time::{Duration, Instant};

/// Nothing that was missing was read for so long: whatever started has started. Services that are measured pause less
/// than a second between their first reads (a JVM that loads classes, a Python service that imports).
pub const QUIET: Duration = Duration::from_secs(10);
/// After so long a container counts as started, however much it still reads: batch jobs read on for as long as they
/// run, and completing the image is then what helps them.
pub const LONGEST_START: Duration = Duration::from_secs(120);

/// Whether a start of an image that was prepared at `prepared`, and read at `last_miss` for the last time something
/// that was not here, is over. The recorder of starts goes by the same times, on all reads.
pub fn is_settled(prepared: Instant, last_miss: Option<Instant>, now: Instant) -> bool {
    let last = last_miss.map_or(prepared, |miss| miss.max(prepared));
    now.since(last) >= QUIET || now.since(prepared) >= LONGEST_START
}

/// A token bucket. It holds a second's worth, so that what was not used while others were served is not made up for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    bytes_per_second: u64,
    /// May be far in the debt of what was taken.
    ready_at: Instant,
}

impl Pace {
    /// `bytes_per_second` from now on; 0 for as fast as it goes.
    pub const fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, ready_at: Instant::ZERO }
    }

    /// Takes `bytes`; how long to wait before they may be asked for.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        let begin = self.ready_at.max(now - Duration::from_secs(1));
        let cost = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        self.ready_at = begin + Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX));
        begin.since(now)
    }
}

/// What a store can still take without evicting anything, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// That much can be written before something must go.
    pub spare_bytes: u64,
    /// That much is left to readers on demand, whose writes come at any time.
    pub margin_bytes: u64,
}

impl Room {
    /// Whether `bytes` more can be kept.
    pub fn has(&self, bytes: u64) -> bool {
        bytes.saturating_add(self.margin_bytes) <= self.spare_bytes
    }
}

/// What is missing of a layer, in parts of about `part_bytes` (whole extents of that length), in the order in which
/// this node fetches them: from a place on that `node`, any number that differs between nodes, and the layer choose.
pub fn parts(layer: &DiffId, geometry: &LayerGeometry, missing: &Runs, part_bytes: u64, node: u64) -> Vec<Runs> {
    let mut parts = Vec::new();
    let mut at = 0;
    while let Some(chunk) = missing.within(at..u32::MAX).first().map(|run| run.start) {
        // Where spans are not known (nobody has asked a registry yet) the grid alone does.
        let end = geometry.extent_of(chunk, part_bytes).map_or_else(
            || {
                let next = (geometry.start_bytes(chunk) / part_bytes.max(1)).saturating_add(1);
                geometry.chunk_at(next.saturating_mul(part_bytes.max(1)))
            },
            |extent| extent.end,
        );
        at = end.max(chunk + 1);
        parts.push(missing.within(chunk..at));
    }
    let first = pivot(layer, node, parts.len());
    parts.rotate_left(first);
    parts
}

/// A place below `count` that is another one for each node and layer; 0 for a count of 0.
fn pivot(layer: &DiffId, node: u64, count: usize) -> usize {
    let mut word = [0; 8];
    // A hash already: any eight bytes do.
    word.copy_from_slice(&layer.0[..8]);
    let mut rng = crate::rng::Rng::new(u64::from_le_bytes(word) ^ node);
    if count == 0 { 0 } else { usize::try_from(rng.below(count as u64)).unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: DiffId = DiffId([7; 32]);

    fn at(seconds: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(seconds)
    }

    #[test]
    fn a_start_is_over_when_nothing_is_missed_any_more_or_too_long() {
        for (last_miss, now, expected) in [
            (None, 9, false),
            (None, 10, true),
            (Some(5), 14, false),
            (Some(5), 15, true),
            (Some(119), 119, false),
            (Some(120), 120, true),
            // A miss of an earlier container is none of this start.
            (Some(0), 10, true),
        ] {
            assert_eq!(is_settled(at(0), last_miss.map(at), at(now)), expected, "{last_miss:?} {now}");
        }
        assert!(!is_settled(at(100), Some(at(50)), at(105)));
    }

    #[test]
    fn the_pace_is_kept_and_rest_is_not_made_up_for() {
        let mut pace = Pace::new(1000);
        let mut now = at(100);
        // A second's worth at once, then a second for each thousand.
        assert_eq!(pace.take(1000, now), Duration::ZERO);
        assert_eq!(pace.take(1000, now), Duration::ZERO);
        assert_eq!(pace.take(1000, now), Duration::from_secs(1));
        now = now + Duration::from_secs(3600);
        assert_eq!(pace.take(5000, now), Duration::ZERO);
        assert_eq!(pace.take(1, now), Duration::from_secs(4));
        let mut free = Pace::new(0);
        assert_eq!(free.take(u64::MAX, now), Duration::ZERO);
        assert_eq!(free.take(u64::MAX, now), Duration::ZERO);
    }

    #[test]
    fn room_leaves_a_margin() {
        let room = Room { spare_bytes: 100, margin_bytes: 10 };
        assert!(room.has(90) && !room.has(91) && !room.has(u64::MAX));
    }

    #[test]
    fn parts_are_all_that_is_missing_and_begin_elsewhere_on_each_node() {
        let geometry = LayerGeometry::new((0..1000).map(|_| 65_536)).expect("a layer");
        let mut missing = Runs::one(0..1000);
        missing.remove(3..400);
        let of = |node| parts(&LAYER, &geometry, &missing, 1 << 20, node);
        let mut firsts = std::collections::BTreeSet::new();
        for node in 0..32 {
            let parts = of(node);
            let mut all = Runs::new();
            for part in &parts {
                assert!(!part.is_empty() && part.intersection(&all).is_empty());
                assert!(part.chunk_count() <= 17, "{part:?}");
                all.insert_all(part);
            }
            assert_eq!(all, missing);
            firsts.insert(parts[0].first().map(|run| run.start));
            assert_eq!(parts, of(node), "the same every time");
        }
        assert!(firsts.len() > 10, "{firsts:?}");
        assert!(parts(&LAYER, &geometry, &Runs::new(), 1 << 20, 1).is_empty());
    }
}
