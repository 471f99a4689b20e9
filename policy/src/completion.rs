//! Fetching the rest of an image in the background: when to begin, how fast, in which order.
//!
//! A container that starts reads what it needs on demand; everything else may come later. When that start is over
//! ([`is_settled`]) the rest can be fetched without being in its way, no faster than a rate ([`Pace`]), in parts
//! ([`parts`]) that begin somewhere else on each node, and where peers are known first what the fewest of them have
//! ([`rarest_first`]), so that nodes which complete one image together fetch different chunks and trade. What the bytes cost is known before ([`Room`]): completing an image never takes the
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

/// Puts `parts` of a layer into the order that helps the swarm: what the fewest peers have comes first, whether that means
/// that nobody can give it but the registry or that one peer alone can, because what is rare is what the others wait for
/// when its only holder is busy or gone. `held` is what each peer that this node knows has said that it has of the layer.
///
/// Equally rare parts come in an order of `node`'s own, so that nodes which know the same do not all ask for the same.
/// Without peers nothing changes: neighbours stay neighbours.
pub fn rarest_first(layer: &DiffId, parts: &mut [Runs], held: &[Runs], node: u64) {
    if held.iter().all(Runs::is_empty) {
        return;
    }
    let seed = seed(layer, node);
    parts.sort_by_cached_key(|part| {
        let start = part.first().map_or(0, |run| run.start);
        (copies(part, held), crate::rng::Rng::new(seed ^ u64::from(start)).next_u64())
    });
}

/// How many peers have `part`, on average over its chunks; what somebody has a bit of counts as a whole copy.
fn copies(part: &Runs, held: &[Runs]) -> u64 {
    let (mut all, mut here) = (0, 0);
    for run in part.iter() {
        all += u64::from(run.end - run.start);
        here += held.iter().map(|held| held.within(run.clone()).chunk_count()).sum::<u64>();
    }
    here.div_ceil(all.max(1))
}

/// Another number for each node and layer.
fn seed(layer: &DiffId, node: u64) -> u64 {
    let mut word = [0; 8];
    // A hash already: any eight bytes do.
    word.copy_from_slice(&layer.0[..8]);
    u64::from_le_bytes(word) ^ node
}

/// A place below `count` that is another one for each node and layer; 0 for a count of 0.
fn pivot(layer: &DiffId, node: u64, count: usize) -> usize {
    let mut rng = crate::rng::Rng::new(seed(layer, node));
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

    #[test]
    fn what_few_peers_have_comes_first_and_ties_are_each_nodes_own() {
        let one = |chunks| Runs::one(chunks);
        let held = [Runs::from_iter([0..8, 12..14]), one(0..4), Runs::new()];
        let order = |node| {
            let mut parts: Vec<Runs> = (0..8).map(|part| one(part * 4..part * 4 + 4)).collect();
            rarest_first(&LAYER, &mut parts, &held, node);
            parts.iter().map(|part| part.first().map_or(0, |run| run.start) / 4).collect::<Vec<_>>()
        };
        let mut firsts = std::collections::BTreeSet::new();
        for node in 0..32 {
            let order = order(node);
            // Nobody has 2 and 4 to 7, one has 1 and half of 3, two have 0.
            assert!(order[..5].iter().all(|part| [2, 4, 5, 6, 7].contains(part)), "{order:?}");
            assert!(order[5..7].iter().all(|part| [1, 3].contains(part)) && order[7] == 0, "{order:?}");
            firsts.insert(order[0]);
        }
        assert_eq!(firsts.len(), 5);
        let mut parts = vec![one(4..8), one(0..4)];
        rarest_first(&LAYER, &mut parts, &[Runs::new()], 1);
        assert_eq!(parts, [one(4..8), one(0..4)], "nobody is known");
    }

    proptest::proptest! {
        #[test]
        fn no_order_loses_a_part_or_puts_a_common_one_first(
            held in proptest::collection::vec(proptest::collection::vec(0_u32..40, 0..40), 0..6),
            node: u64,
        ) {
            let held: Vec<Runs> = held.iter().map(|has| has.iter().map(|part| part * 3..part * 3 + 3).collect()).collect();
            let all: Vec<Runs> = (0..40).map(|part| Runs::one(part * 3..part * 3 + 3)).collect();
            let mut parts = all.clone();
            rarest_first(&LAYER, &mut parts, &held, node);
            let known = held.iter().any(|held| !held.is_empty());
            let counts: Vec<u64> = parts.iter().map(|part| copies(part, &held)).collect();
            proptest::prop_assert!(!known || counts.is_sorted());
            parts.sort_by_key(|part| part.first().map(|run| run.start));
            proptest::prop_assert_eq!(parts, all);
        }
    }

    /// What a group of nodes that complete one layer together comes to.
    #[derive(Debug, PartialEq, Eq)]
    struct Outcome {
        /// Until the last one has all.
        ticks: u32,
        /// Parts that the registry gave.
        from_registry: u32,
    }

    /// Nodes of which each takes one part and gives one part in a tick, and a registry that gives one, to whom the order
    /// of each node leads. What was there before a tick can be given in it.
    fn complete_together(nodes: usize, count: u32, is_rarest: bool) -> Outcome {
        let geometry = LayerGeometry::new((0..count).map(|_| 65_536)).expect("a layer");
        let mut has = vec![Runs::new(); nodes];
        let mut outcome = Outcome { ticks: 0, from_registry: 0 };
        while has.iter().any(|has| has.chunk_count() < u64::from(count)) {
            outcome.ticks += 1;
            assert!(outcome.ticks < 100 * count, "it stands still");
            let (before, mut gives, mut registry) = (has.clone(), vec![true; nodes], true);
            for turn in 0..nodes {
                // Nobody is always the first to choose.
                let node = (turn + outcome.ticks as usize) % nodes;
                let missing = Runs::one(0..count).difference(&before[node]);
                let mut wanted = parts(&LAYER, &geometry, &missing, 65_536, node as u64);
                if is_rarest {
                    let others: Vec<Runs> = before
                        .iter()
                        .enumerate()
                        .filter(|(other, _)| *other != node)
                        .map(|(_, has)| has.clone())
                        .collect();
                    rarest_first(&LAYER, &mut wanted, &others, node as u64);
                }
                let taken = wanted.iter().filter_map(Runs::first).find(|run| {
                    let holder = (0..nodes).find(|other| gives[*other] && before[*other].contains_all(run.clone()));
                    let is_held = before.iter().any(|has| has.contains_all(run.clone()));
                    match holder {
                        Some(holder) => gives[holder] = false,
                        // What a peer has is not asked of the registry.
                        None if is_held || !registry => return false,
                        None => {
                            registry = false;
                            outcome.from_registry += 1;
                        }
                    }
                    true
                });
                if let Some(run) = taken {
                    has[node].insert(run);
                }
            }
        }
        outcome
    }

    #[test]
    fn nodes_that_complete_together_are_done_sooner_by_rarity() {
        for (nodes, count) in [(4, 64), (16, 64), (48, 96)] {
            let (rotated, rarest) = (complete_together(nodes, count, false), complete_together(nodes, count, true));
            println!("{nodes} nodes, {count} parts: rotated {rotated:?}, rarest first {rarest:?}");
            assert_eq!(rarest.from_registry, count, "the registry gives each part once");
            assert!(rarest.ticks <= rotated.ticks, "{nodes} nodes: {rarest:?} {rotated:?}");
        }
    }
}
