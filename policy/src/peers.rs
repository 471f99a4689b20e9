//! What is known of each peer, and the choice among several.
//!
//! The peer with the lowest expected completion time is asked: its smoothed latency, plus the bytes that it still owes
//! us and the new ones at its smoothed cost per KiB. Once in a while any other is taken, so that a peer which was slow
//! once is measured again. Integers only; time and randomness are arguments.
//!
//! A peer that fails rests (backoff with full jitter); one that is busy rests as long as it says; one that sends wrong
//! bytes is banned for a while, and stays banned when its connection comes back.

use std::collections::BTreeMap;

use crate::class::{Backoff, Class};
use crate::event::PeerNo;
use crate::limits::{Limits, Load};
use crate::rng::Rng;
use crate::time::{Duration, Instant, nanos};

/// Whether a peer may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// Now.
    Ready,
    /// When one of its asks ends.
    Full,
    /// It said when it will have time.
    Busy(Instant),
    /// It failed and rests.
    Resting(Instant),
    /// Not connected, or banned.
    Gone,
}

#[derive(Debug, Clone)]
struct Peer {
    up: bool,
    latency_ns: u64,
    cost_ns_per_kib: u64,
    load: Load,
    /// KiB of all asks under way.
    owed_kib: u64,
    backoff: Backoff,
    busy_until: Instant,
    banned_until: Option<Instant>,
}

impl Peer {
    fn new(limits: &Limits) -> Self {
        Self {
            up: false,
            latency_ns: nanos(limits.peer_latency),
            cost_ns_per_kib: nanos(limits.peer_cost_per_kib),
            load: Load::default(),
            owed_kib: 0,
            backoff: Backoff::default(),
            busy_until: Instant::ZERO,
            banned_until: None,
        }
    }

    fn is_banned(&self, now: Instant) -> bool {
        self.banned_until.is_some_and(|until| until > now)
    }

    fn expected_ns(&self, kib: u64) -> u64 {
        self.latency_ns.saturating_add(self.cost_ns_per_kib.saturating_mul(self.owed_kib + kib))
    }
}

/// All peers. Bounded by [`Limits::peers`]: those that come beyond are not used.
#[derive(Debug, Clone, Default)]
pub struct Peers {
    records: BTreeMap<PeerNo, Peer>,
}

/// KiB of `bytes`, at least one.
fn kib(bytes: u64) -> u64 {
    bytes.div_ceil(1024).max(1)
}

/// One step of a moving average with weight 1/8, as TCP smooths its round trips (RFC 6298).
fn smooth(average: &mut u64, sample: u64) {
    *average = average.saturating_sub(*average / 8).saturating_add(sample / 8);
}

impl Peers {
    /// Notes a connection. Says whether the peer is usable: known, and not banned.
    pub fn up(&mut self, peer: PeerNo, now: Instant, limits: &Limits) -> bool {
        if !self.records.contains_key(&peer) && self.records.len() >= limits.peers {
            self.records.retain(|_, record| record.up || record.is_banned(now));
            if self.records.len() >= limits.peers {
                return false;
            }
        }
        let record = self.records.entry(peer).or_insert_with(|| Peer::new(limits));
        record.up = true;
        !record.is_banned(now)
    }

    /// Notes a lost connection. Keeps the record only of a banned peer. The caller has ended the peer's asks.
    pub fn down(&mut self, peer: PeerNo, now: Instant) {
        let Some(record) = self.records.get_mut(&peer) else { return };
        debug_assert_eq!(record.load, Load::default(), "{peer:?} went down with asks under way");
        record.up = false;
        if !record.is_banned(now) {
            self.records.remove(&peer);
        }
    }

    /// Bans the peer.
    pub fn ban(&mut self, peer: PeerNo, until: Instant) {
        if let Some(record) = self.records.get_mut(&peer) {
            record.banned_until = Some(until);
        }
    }

    /// Whether the peer may be asked.
    pub fn readiness(&self, peer: PeerNo, class: Class, now: Instant, limits: &Limits) -> Readiness {
        let Some(record) = self.records.get(&peer).filter(|record| record.up && !record.is_banned(now)) else {
            return Readiness::Gone;
        };
        if let Some(until) = record.backoff.resting(now) {
            return Readiness::Resting(until);
        }
        if record.busy_until > now {
            return Readiness::Busy(record.busy_until);
        }
        if record.load.has_room(class, &limits.peer) { Readiness::Ready } else { Readiness::Full }
    }

    /// The best of `candidates` for an ask of `bytes`; `None` when there are none.
    pub fn choose(
        &self,
        candidates: &[PeerNo],
        bytes: u64,
        class: Class,
        limits: &Limits,
        rng: &mut Rng,
    ) -> Option<PeerNo> {
        let explore_one_in = match class {
            Class::Demand => limits.explore_demand_one_in,
            Class::Prefetch => limits.explore_prefetch_one_in,
        };
        if candidates.len() > 1 && rng.one_in(explore_one_in) {
            return candidates.get(rng.below(candidates.len() as u64) as usize).copied();
        }
        // Equal peers share the work: the first of the best is taken from a random place on.
        let turn = rng.below(candidates.len() as u64) as usize;
        let rotated = candidates.iter().cycle().skip(turn).take(candidates.len());
        let expected = |peer: &&PeerNo| self.records.get(peer).map_or(u64::MAX, |peer| peer.expected_ns(kib(bytes)));
        rotated.min_by_key(expected).copied()
    }

    /// Notes an ask.
    pub(crate) fn asked(&mut self, peer: PeerNo, class: Class, bytes: u64) {
        if let Some(record) = self.records.get_mut(&peer) {
            record.load.add(class);
            record.owed_kib += kib(bytes);
        }
    }

    /// Notes the end of an ask, whatever it brought.
    pub(crate) fn ended(&mut self, peer: PeerNo, class: Class, bytes: u64) {
        if let Some(record) = self.records.get_mut(&peer) {
            record.load.sub(class);
            record.owed_kib = record.owed_kib.saturating_sub(kib(bytes));
        }
    }

    /// Learns from an answer: the first byte came after `latency`, all `bytes` after `elapsed`.
    pub(crate) fn answered(&mut self, peer: PeerNo, latency: Duration, elapsed: Duration, bytes: u64) {
        if let Some(record) = self.records.get_mut(&peer) {
            record.backoff.succeed();
            record.busy_until = Instant::ZERO;
            smooth(&mut record.latency_ns, nanos(latency));
            smooth(&mut record.cost_ns_per_kib, nanos(elapsed.saturating_sub(latency)) / kib(bytes));
        }
    }

    /// Rests the peer after a failure.
    pub(crate) fn failed(
        &mut self,
        peer: PeerNo,
        now: Instant,
        sent: Instant,
        retry_after: Option<Duration>,
        limits: &Limits,
        rng: &mut Rng,
    ) {
        if let Some(record) = self.records.get_mut(&peer) {
            record.backoff.fail(now, sent, retry_after, &limits.peer_backoff, rng);
        }
    }

    /// Rests the peer for as long as it asked for, within bounds.
    pub(crate) fn busy(&mut self, peer: PeerNo, now: Instant, retry_after: Duration, limits: &Limits) {
        if let Some(record) = self.records.get_mut(&peer) {
            let until = now + retry_after.clamp(limits.busy_min, limits.busy_max);
            record.busy_until = record.busy_until.max(until);
        }
    }

    /// Whether any peer could have something.
    pub fn any_up(&self, now: Instant) -> bool {
        self.records.values().any(|record| record.up && !record.is_banned(now))
    }

    /// Whether the peer is connected and not banned.
    pub fn is_usable(&self, peer: PeerNo, now: Instant) -> bool {
        self.records.get(&peer).is_some_and(|record| record.up && !record.is_banned(now))
    }

    /// Connected peers, and banned ones.
    pub fn counts(&self, now: Instant) -> (usize, usize) {
        let up = self.records.values().filter(|record| record.up).count();
        (up, self.records.values().filter(|record| record.is_banned(now)).count())
    }

    /// The asks under way at a peer.
    pub fn load(&self, peer: PeerNo) -> Load {
        self.records.get(&peer).map(|record| record.load).unwrap_or_default()
    }

    /// Number of remembered peers.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether no peer is remembered.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: PeerNo = PeerNo(1);
    const B: PeerNo = PeerNo(2);
    const NOW: Instant = Instant(1_000_000_000);

    fn limits() -> Limits {
        Limits { explore_demand_one_in: 0, explore_prefetch_one_in: 0, ..Limits::default() }
    }

    fn two() -> Peers {
        let mut peers = Peers::default();
        assert!(peers.up(A, NOW, &limits()) && peers.up(B, NOW, &limits()));
        peers
    }

    fn share_of_a(peers: &Peers, limits: &Limits, class: Class) -> usize {
        let mut rng = Rng::new(9);
        (0..1000).filter(|_| peers.choose(&[A, B], 65_536, class, limits, &mut rng) == Some(A)).count()
    }

    #[test]
    fn the_quicker_peer_is_chosen_and_equals_share() {
        let mut peers = two();
        let even = share_of_a(&peers, &limits(), Class::Demand);
        assert!((400..600).contains(&even), "{even} of 1000");
        for _ in 0..20 {
            peers.answered(A, Duration::from_millis(50), Duration::from_millis(60), 65_536);
            peers.answered(B, Duration::from_millis(1), Duration::from_millis(2), 65_536);
        }
        assert_eq!(share_of_a(&peers, &limits(), Class::Demand), 0);
        let exploring = Limits::default();
        let explored = share_of_a(&peers, &exploring, Class::Prefetch);
        assert!((10..80).contains(&explored), "{explored} of 1000, about 31 expected");
        let explored = share_of_a(&peers, &exploring, Class::Demand);
        assert!((1..30).contains(&explored), "{explored} of 1000, about 8 expected");
    }

    #[test]
    fn what_a_peer_owes_makes_it_slower() {
        let mut peers = two();
        peers.asked(A, Class::Demand, 1 << 20);
        assert_eq!(share_of_a(&peers, &limits(), Class::Demand), 0);
        peers.ended(A, Class::Demand, 1 << 20);
        assert!(share_of_a(&peers, &limits(), Class::Demand) > 0);
    }

    #[test]
    fn readiness_follows_load_rest_and_ban() {
        let limits = limits();
        let mut rng = Rng::new(1);
        let mut peers = two();
        assert_eq!(peers.readiness(PeerNo(9), Class::Demand, NOW, &limits), Readiness::Gone);
        for _ in 0..limits.peer.asks - limits.peer.reserved_for_demand {
            assert_eq!(peers.readiness(A, Class::Prefetch, NOW, &limits), Readiness::Ready);
            peers.asked(A, Class::Prefetch, 1);
        }
        assert_eq!(peers.readiness(A, Class::Prefetch, NOW, &limits), Readiness::Full);
        assert_eq!(peers.readiness(A, Class::Demand, NOW, &limits), Readiness::Ready);
        peers.busy(A, NOW, Duration::from_millis(20), &limits);
        let until = NOW + Duration::from_millis(20);
        assert_eq!(peers.readiness(A, Class::Demand, NOW, &limits), Readiness::Busy(until));
        assert_eq!(peers.readiness(A, Class::Demand, until, &limits), Readiness::Ready);
        peers.failed(B, NOW, NOW, Some(Duration::from_secs(3)), &limits, &mut rng);
        assert_eq!(peers.readiness(B, Class::Demand, NOW, &limits), Readiness::Resting(NOW + Duration::from_secs(3)));
        peers.answered(B, Duration::ZERO, Duration::ZERO, 1);
        assert_eq!(peers.readiness(B, Class::Demand, NOW, &limits), Readiness::Ready);
    }

    #[test]
    fn a_ban_outlives_the_connection_and_then_ends() {
        let limits = limits();
        let mut peers = two();
        let until = NOW + limits.ban;
        peers.ban(A, until);
        assert_eq!(peers.counts(NOW), (2, 1));
        peers.down(A, NOW);
        assert!(!peers.up(A, NOW, &limits));
        assert_eq!(peers.readiness(A, Class::Demand, NOW, &limits), Readiness::Gone);
        assert_eq!(peers.readiness(A, Class::Demand, until, &limits), Readiness::Ready);
        assert_eq!(peers.counts(until), (2, 0));
    }

    #[test]
    fn the_table_is_bounded() {
        let limits = Limits { peers: 2, ..limits() };
        let mut peers = two();
        assert!(!peers.up(PeerNo(3), NOW, &limits));
        peers.down(A, NOW);
        assert!(peers.up(PeerNo(3), NOW, &limits));
        assert_eq!(peers.len(), 2);
        peers.ban(B, NOW + Duration::from_secs(1));
        peers.down(B, NOW);
        assert!(!peers.up(A, NOW, &limits), "the banned one is remembered");
        assert!(peers.up(A, NOW + Duration::from_secs(1), &limits), "until the ban ends");
    }
}
