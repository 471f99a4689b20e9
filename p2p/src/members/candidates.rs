//! Places where members may be and nobody has said so himself: from providers, from disk, and those that have left.
//! They are tried one after the other, with growing waits. Pure; time is an argument.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::provider::Seed;
use super::table::MEMBERS_MAX;
use crate::address::socket_of;

/// First wait after a failure.
const WAIT_FIRST: Duration = Duration::from_secs(1);
/// Longest wait. Nodes that were apart find each other within about this time.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Most places that are remembered of those that have left or were on disk.
const LEFT_MAX: usize = MEMBERS_MAX;
/// How often a place that has left is tried in vain before it is forgotten: about two hours.
const LEFT_TRIES_MAX: u32 = 120;

#[derive(Debug)]
struct Place {
    due: Instant,
    failures: u32,
}

/// Where a place is known from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Origin {
    /// A member was there once.
    Left,
    /// A provider, by its number.
    Provider(usize),
}

/// All places.
#[derive(Debug, Default)]
pub(crate) struct Candidates {
    places: BTreeMap<(Origin, Seed), Place>,
}

impl Candidates {
    /// Provider `no` knows these places now, and no others.
    pub(crate) fn provided(&mut self, no: usize, seeds: Vec<Seed>, now: Instant) {
        let seeds: HashSet<Seed> = seeds.into_iter().take(MEMBERS_MAX).collect();
        self.places.retain(|(origin, seed), _| *origin != Origin::Provider(no) || seeds.contains(seed));
        for seed in seeds {
            self.places.entry((Origin::Provider(no), seed)).or_insert(Place { due: now, failures: 0 });
        }
    }

    /// A member was at `seed` and is no member any more.
    pub(crate) fn left(&mut self, seed: Seed, now: Instant) {
        let count = self.places.keys().filter(|(origin, _)| *origin == Origin::Left).count();
        if count < LEFT_MAX {
            self.places.entry((Origin::Left, seed)).or_insert(Place { due: now, failures: 0 });
        }
    }

    /// Whether anything is to be tried.
    pub(crate) fn any_due(&self, now: Instant) -> bool {
        self.places.values().any(|place| place.due <= now)
    }

    /// At most `count` places to try now, none of them at `taken` addresses, where members are. The next try of each is
    /// put off as if this one failed.
    pub(crate) fn take_due(&mut self, count: usize, taken: &HashSet<SocketAddr>, now: Instant) -> Vec<Seed> {
        let is_taken = |seed: &Seed| socket_of(&seed.address).is_some_and(|socket| taken.contains(&socket));
        self.places.retain(|(origin, seed), place| {
            *origin != Origin::Left || (place.failures < LEFT_TRIES_MAX && !is_taken(seed))
        });
        let mut due = Vec::new();
        for ((_, seed), place) in &mut self.places {
            if due.len() >= count {
                break;
            }
            if place.due > now {
                continue;
            }
            if is_taken(seed) {
                place.failures = 0;
                place.due = now + WAIT_MAX;
                continue;
            }
            let wait = WAIT_FIRST * (1 << place.failures.min(16));
            place.failures = place.failures.saturating_add(1);
            place.due = now + wait.min(WAIT_MAX);
            due.push(seed.clone());
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seed(port: u16) -> Seed {
        let address = crate::address::multiaddr_of(SocketAddr::new([10, 0, 0, 1].into(), port));
        Seed { peer: None, address }
    }

    #[test]
    fn places_are_tried_with_growing_waits_unless_a_member_is_there() {
        let (mut all, start, nobody) = (Candidates::default(), Instant::now(), HashSet::new());
        all.provided(0, vec![seed(1), seed(2), seed(3)], start);
        assert_eq!(all.take_due(2, &nobody, start).len(), 2);
        assert_eq!(all.take_due(2, &nobody, start), [seed(3)]);
        assert!(!all.any_due(start) && all.any_due(start + WAIT_FIRST));
        assert_eq!(all.take_due(9, &nobody, start + WAIT_FIRST).len(), 3);
        assert_eq!(all.take_due(9, &nobody, start + 2 * WAIT_FIRST), []);
        let taken = HashSet::from([socket_of(&seed(1).address).expect("a socket")]);
        assert_eq!(all.take_due(9, &taken, start + 3 * WAIT_FIRST), [seed(2), seed(3)]);
        all.provided(0, vec![seed(9)], start);
        assert_eq!(all.take_due(9, &nobody, start + WAIT_MAX), [seed(9)]);
    }

    #[test]
    fn who_has_left_is_tried_for_a_while() {
        let (mut all, start, nobody) = (Candidates::default(), Instant::now(), HashSet::new());
        all.left(seed(1), start);
        let mut now = start;
        let mut tries = 0;
        while !all.take_due(1, &nobody, now).is_empty() {
            tries += 1;
            now += WAIT_MAX;
        }
        assert_eq!(tries, LEFT_TRIES_MAX);
        all.left(seed(1), now);
        let taken = HashSet::from([socket_of(&seed(1).address).expect("a socket")]);
        assert_eq!(all.take_due(9, &taken, now), []);
        assert!(all.places.is_empty(), "a member that is back is tried as one that has left");
    }
}
