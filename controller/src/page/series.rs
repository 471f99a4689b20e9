//! Bytes by source over time: what nodes count, added up by the minute over all of them.
//!
//! Nodes count from the start of their daemons. What counts here is the difference between two reports of one node; a run
//! of the daemon that is new counts from zero, and the first report that is heard of a node counts nothing, because nobody
//! knows when it came to that. So neither a node nor the controller that starts again makes a step in the curve, and what
//! passed while there was no controller is not in it.
//!
//! It is a ring of fixed size in memory and survives nothing: it begins with the process.

use crate::event::Traffic;

/// How far back it reaches.
pub(super) const MINUTES: u64 = 24 * 60;

/// How many things are counted.
pub(super) const COUNTS: usize = 7;

/// What is counted, as the page's API calls it, in the order of [`Counts`].
pub(super) const NAMES: [&str; COUNTS] =
    ["readAtOnce", "readAfterWaiting", "fromPeers", "fromRegistries", "fromOtherLayers", "ahead", "registryWire"];

/// Bytes, in the order of [`NAMES`].
pub(super) type Counts = [u64; COUNTS];

/// The ring.
#[derive(Debug)]
pub(super) struct Series {
    /// Which minute since 1970 each place is of, and what was counted in it.
    minutes: Box<[(u64, Counts)]>,
    total: Counts,
}

impl Default for Series {
    fn default() -> Self {
        Self { minutes: vec![(0, [0; COUNTS]); MINUTES as usize].into(), total: [0; COUNTS] }
    }
}

fn add(sum: &mut Counts, more: &Counts) {
    sum.iter_mut().zip(more).for_each(|(sum, more)| *sum = sum.saturating_add(*more));
}

/// What came between two reports of one node.
pub(super) fn between(last: Option<&Traffic>, now: &Traffic) -> Counts {
    match last {
        None => [0; COUNTS],
        Some(last) if last.run != now.run => counts(now),
        // Within a run nothing falls; whoever says so has counted nothing.
        Some(last) => {
            let (last, now) = (counts(last), counts(now));
            std::array::from_fn(|at| now[at].saturating_sub(last[at]))
        }
    }
}

/// What a node has counted, in the order of [`NAMES`].
pub(super) fn counts(traffic: &Traffic) -> Counts {
    let Traffic {
        run: _,
        read_at_once,
        read_after_waiting,
        from_peers,
        from_registries,
        from_other_layers,
        ahead,
        registry_wire,
    } = *traffic;
    [read_at_once, read_after_waiting, from_peers, from_registries, from_other_layers, ahead, registry_wire]
}

impl Series {
    /// Adds what came, in the minute `minute` since 1970.
    pub(super) fn add(&mut self, minute: u64, came: &Counts) {
        let place = &mut self.minutes[(minute % MINUTES) as usize];
        if place.0 != minute {
            *place = (minute, [0; COUNTS]);
        }
        add(&mut place.1, came);
        add(&mut self.total, came);
    }

    /// All since the process started.
    pub(super) fn total(&self) -> Counts {
        self.total
    }

    /// What came in the `points` spans of `step` minutes each that end with the one that `minute` lies in, oldest first,
    /// and the minute in which the first begins. Spans begin at multiples of their length.
    pub(super) fn window(&self, minute: u64, step: u64, points: u64) -> (u64, Vec<Counts>) {
        let end = (minute / step + 1) * step;
        let begin = end.saturating_sub(step * points);
        let sum = |from: u64| {
            let mut sum = [0; COUNTS];
            for minute in from..from + step {
                let (known, counts) = &self.minutes[(minute % MINUTES) as usize];
                if *known == minute {
                    add(&mut sum, counts);
                }
            }
            sum
        };
        (begin, (begin..end).step_by(step as usize).map(sum).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(run: u64, bytes: u64) -> Traffic {
        Traffic { run, from_peers: bytes, ..Traffic::default() }
    }

    #[test]
    fn neither_side_starting_again_makes_a_step() {
        let peers = |last: Option<Traffic>, now| between(last.as_ref(), &now)[2];
        assert_eq!(peers(None, traffic(1, 500)), 0, "nobody knows when that was");
        assert_eq!(peers(Some(traffic(1, 500)), traffic(1, 700)), 200);
        assert_eq!(peers(Some(traffic(1, 700)), traffic(2, 30)), 30, "from zero in a new run");
        assert_eq!(peers(Some(traffic(1, 700)), traffic(2, 900)), 900, "also when it has come further than the last");
        assert_eq!(peers(Some(traffic(1, 700)), traffic(1, 600)), 0, "nothing falls within a run");
    }

    #[test]
    fn a_ring_forgets_what_is_a_day_old_and_nothing_else() {
        let mut series = Series::default();
        let now = 29_000_000;
        let one = |bytes| [0, 0, bytes, 0, 0, 0, 0];
        series.add(now - MINUTES, &one(1));
        series.add(now - MINUTES + 1, &one(10));
        series.add(now, &one(100));
        series.add(now, &one(1000));
        let (begin, points) = series.window(now, 1, MINUTES);
        assert_eq!((begin, points.len() as u64), (now - MINUTES + 1, MINUTES));
        assert_eq!((points[0][2], points[points.len() - 1][2]), (10, 1100));
        assert_eq!(points.iter().map(|point| point[2]).sum::<u64>(), 1110);
        assert_eq!(series.total()[2], 1111);
        series.add(now + 1, &one(u64::MAX));
        series.add(now + 1, &one(u64::MAX));
        assert_eq!(series.total()[2], u64::MAX, "a liar does not make it overflow");
    }

    #[test]
    fn wide_spans_begin_at_multiples_and_hold_all_of_their_minutes() {
        let mut series = Series::default();
        let now = 29_000_008;
        for minute in now - 20..=now {
            series.add(minute, &[1; COUNTS]);
        }
        let (begin, points) = series.window(now, 15, 4);
        assert_eq!((begin % 15, points.len()), (0, 4));
        assert_eq!(points.iter().map(|point| point[0]).sum::<u64>(), 21);
        assert_eq!(points[3][0], now % 15 + 1);
    }
}
