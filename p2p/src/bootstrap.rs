//! The peers to start from: kept connected, tried again with growing waits.
//!
//! Every seed is in one state; the owner task resolves and dials for it and reports back. A seed that turns out to be
//! this very node (a DaemonSet gives all nodes the same list) rests for ten minutes. Time and jitter are arguments.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::swarm::ConnectionId;

use crate::address::PeerAddress;

/// First wait after a failure. Nodes that start together find each other within a few of these.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
/// Longest wait. A cluster that comes back after an outage is whole again within about this time.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// How long a seed that is this node itself rests. Its name may point elsewhere later.
const OWN_ADDRESS_REST: Duration = Duration::from_secs(600);

#[derive(Debug)]
enum State {
    Waiting { until: Instant },
    Resolving,
    Dialing { connections: HashSet<ConnectionId>, own: bool },
    Up { peers: HashSet<PeerId> },
}

#[derive(Debug)]
struct Seed {
    address: PeerAddress,
    state: State,
    failures: u32,
}

/// All seeds of a node.
#[derive(Debug)]
pub(crate) struct Seeds {
    seeds: Vec<Seed>,
}

impl Seeds {
    /// The given seeds, all due now.
    pub(crate) fn new(addresses: Vec<PeerAddress>, now: Instant) -> Self {
        let seed = |address| Seed { address, state: State::Waiting { until: now }, failures: 0 };
        Self { seeds: addresses.into_iter().map(seed).collect() }
    }

    /// The seeds to resolve now.
    pub(crate) fn take_due(&mut self, now: Instant) -> Vec<(usize, PeerAddress)> {
        let mut due = Vec::new();
        for (index, seed) in self.seeds.iter_mut().enumerate() {
            if matches!(seed.state, State::Waiting { until } if until <= now) {
                seed.state = State::Resolving;
                due.push((index, seed.address.clone()));
            }
        }
        due
    }

    /// When the next seed is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let waits = self.seeds.iter().filter_map(|seed| match seed.state {
            State::Waiting { until } => Some(until),
            _ => None,
        });
        waits.min()
    }

    /// The addresses of a seed are being dialled. `own` says that one of them is this node itself. No connection means
    /// that nothing could be dialled.
    pub(crate) fn dialing(
        &mut self,
        index: usize,
        connections: HashSet<ConnectionId>,
        own: bool,
        now: Instant,
        jitter: f64,
    ) {
        let Some(seed) = self.seeds.get_mut(index) else { return };
        if connections.is_empty() {
            seed.rest(own, now, jitter);
        } else {
            seed.state = State::Dialing { connections, own };
        }
    }

    /// A connection was established. True if a seed asked for it.
    pub(crate) fn connected(&mut self, connection: ConnectionId, peer: PeerId) -> bool {
        for seed in &mut self.seeds {
            match &mut seed.state {
                State::Dialing { connections, .. } if connections.contains(&connection) => {
                    seed.failures = 0;
                    seed.state = State::Up { peers: HashSet::from([peer]) };
                    return true;
                }
                _ => {}
            }
        }
        false
    }

    /// A dial has failed; `own` when it met this node itself.
    pub(crate) fn failed(&mut self, connection: ConnectionId, own: bool, now: Instant, jitter: f64) {
        for seed in &mut self.seeds {
            if let State::Dialing { connections, own: met_own } = &mut seed.state
                && connections.remove(&connection)
            {
                *met_own |= own;
                if connections.is_empty() {
                    let own = *met_own;
                    seed.rest(own, now, jitter);
                }
                return;
            }
        }
    }

    /// The last connection to `peer` is gone.
    pub(crate) fn lost(&mut self, peer: &PeerId, now: Instant, jitter: f64) {
        for seed in &mut self.seeds {
            if let State::Up { peers } = &mut seed.state
                && peers.remove(peer)
                && peers.is_empty()
            {
                seed.rest(false, now, jitter);
            }
        }
    }
}

impl Seed {
    fn rest(&mut self, own: bool, now: Instant, jitter: f64) {
        let wait = if own {
            OWN_ADDRESS_REST
        } else {
            let doubled = BACKOFF_FIRST * (1 << self.failures.min(16));
            self.failures = (self.failures + 1).min(16);
            doubled.min(BACKOFF_MAX)
        };
        self.state = State::Waiting { until: now + wait.mul_f64(0.5 + 0.5 * jitter) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seeds(count: usize, now: Instant) -> Seeds {
        Seeds::new(vec!["10.0.0.1:1".parse().expect("an address"); count], now)
    }

    fn connection(no: usize) -> ConnectionId {
        ConnectionId::new_unchecked(no)
    }

    #[test]
    fn a_seed_that_fails_is_tried_again_with_growing_waits() {
        let mut now = Instant::now();
        let mut seeds = seeds(1, now);
        let mut waits = Vec::new();
        for no in 0..12 {
            assert_eq!(seeds.take_due(now).len(), 1);
            assert_eq!((seeds.take_due(now).len(), seeds.next_due()), (0, None), "resolved twice");
            seeds.dialing(0, HashSet::from([connection(no)]), false, now, 1.0);
            seeds.failed(connection(no), false, now, 1.0);
            let due = seeds.next_due().expect("waits");
            waits.push(due - now);
            now = due;
        }
        assert_eq!(waits[..3], [50, 100, 200].map(Duration::from_millis));
        assert_eq!(waits[11], BACKOFF_MAX);
    }

    #[test]
    fn a_seed_stays_up_until_its_peer_is_lost() {
        let now = Instant::now();
        let mut seeds = seeds(1, now);
        let peer = PeerId::random();
        seeds.take_due(now);
        seeds.dialing(0, HashSet::from([connection(1), connection(2)]), false, now, 1.0);
        assert!(seeds.connected(connection(1), peer));
        assert!(!seeds.connected(connection(3), peer));
        assert_eq!(seeds.next_due(), None);
        seeds.failed(connection(2), false, now, 1.0);
        seeds.lost(&PeerId::random(), now, 1.0);
        assert_eq!(seeds.next_due(), None);
        seeds.lost(&peer, now, 1.0);
        assert_eq!(seeds.next_due(), Some(now + BACKOFF_FIRST));
    }

    #[test]
    fn this_node_itself_is_not_dialled_again_soon() {
        let now = Instant::now();
        let mut seeds = seeds(2, now);
        seeds.take_due(now);
        seeds.dialing(0, HashSet::new(), true, now, 1.0);
        seeds.dialing(1, HashSet::from([connection(1)]), false, now, 1.0);
        seeds.failed(connection(1), true, now, 1.0);
        assert_eq!(seeds.next_due(), Some(now + OWN_ADDRESS_REST));
    }
}
