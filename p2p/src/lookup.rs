//! Lookups of holders: one at a time per layer, cut short when enough are found, remembered for seconds.
//!
//! Fifty reads of a starting container miss at once and ask for the same layer. One query answers them all; its result
//! is good for a few seconds, "nobody has it" for half a second. A state machine: time is an argument.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hermes_image::ids::DiffId;
use libp2p::PeerId;
use tokio::sync::oneshot;

/// Most layers with a remembered result. A node that starts twenty images of fifty layers needs 1,000.
const REMEMBERED_MAX: usize = 4096;
/// Most lookups on their way. Kademlia asks three peers at a time for each.
pub(crate) const FLIGHTS_MAX: usize = 256;
/// Most callers that wait for one lookup.
const WAITERS_MAX: usize = 1024;

/// Where the result goes: the holders found, best effort, this node not among them.
pub(crate) type Reply = oneshot::Sender<Vec<PeerId>>;

/// What to do about a question.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// It was answered from memory, waits for a lookup on its way, or was refused (its reply is dropped).
    Settled,
    /// A lookup must be started.
    Start,
    /// Too many lookups are on their way; the reply was dropped.
    Full,
}

#[derive(Debug, Default)]
struct Flight {
    waiters: Vec<Reply>,
    found: Vec<PeerId>,
}

#[derive(Debug)]
struct Remembered {
    until: Instant,
    holders: Vec<PeerId>,
}

/// All lookups of a node.
#[derive(Debug)]
pub(crate) struct Lookups {
    enough: usize,
    found_ttl: Duration,
    missing_ttl: Duration,
    flights: HashMap<DiffId, Flight>,
    remembered: HashMap<DiffId, Remembered>,
}

impl Lookups {
    /// No lookups; later each ends at `enough` holders.
    pub(crate) fn new(enough: usize, found_ttl: Duration, missing_ttl: Duration) -> Self {
        Self { enough, found_ttl, missing_ttl, flights: HashMap::new(), remembered: HashMap::new() }
    }

    /// Somebody asks for holders of `layer`.
    pub(crate) fn ask(&mut self, layer: DiffId, now: Instant, reply: Reply) -> Asked {
        if let Some(remembered) = self.remembered.get(&layer).filter(|remembered| remembered.until > now) {
            // A caller that has gone needs no answer.
            let _ = reply.send(remembered.holders.clone());
            return Asked::Settled;
        }
        if let Some(flight) = self.flights.get_mut(&layer) {
            flight.waiters.retain(|waiter| !waiter.is_closed());
            if flight.waiters.len() < WAITERS_MAX {
                flight.waiters.push(reply);
            }
            return Asked::Settled;
        }
        if self.flights.len() >= FLIGHTS_MAX {
            return Asked::Full;
        }
        self.flights.insert(layer, Flight { waiters: vec![reply], found: Vec::new() });
        Asked::Start
    }

    /// The lookup of `layer` has found some. True when that is enough and it should be ended.
    pub(crate) fn found(&mut self, layer: DiffId, holders: impl IntoIterator<Item = PeerId>) -> bool {
        let Some(flight) = self.flights.get_mut(&layer) else { return true };
        for holder in holders {
            // Kademlia answers with at most 20 at a time; twice "enough" keeps a bound whatever it does.
            if flight.found.len() < self.enough * 2 && !flight.found.contains(&holder) {
                flight.found.push(holder);
            }
        }
        flight.found.len() >= self.enough
    }

    /// The lookup of `layer` has ended: everybody who waits gets what was found.
    pub(crate) fn finish(&mut self, layer: DiffId, now: Instant) {
        let Some(flight) = self.flights.remove(&layer) else { return };
        for waiter in flight.waiters {
            // A caller that has gone needs no answer.
            let _ = waiter.send(flight.found.clone());
        }
        let ttl = if flight.found.is_empty() { self.missing_ttl } else { self.found_ttl };
        if self.remembered.len() >= REMEMBERED_MAX {
            self.remembered.retain(|_, remembered| remembered.until > now);
        }
        if self.remembered.len() < REMEMBERED_MAX {
            self.remembered.insert(layer, Remembered { until: now + ttl, holders: flight.found });
        }
    }

    /// `peer` is no holder to be offered any more.
    pub(crate) fn forget_peer(&mut self, peer: &PeerId) {
        for remembered in self.remembered.values_mut() {
            remembered.holders.retain(|holder| holder != peer);
        }
        for flight in self.flights.values_mut() {
            flight.found.retain(|holder| holder != peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: DiffId = DiffId([1; 32]);

    fn lookups() -> Lookups {
        Lookups::new(2, Duration::from_secs(5), Duration::from_millis(500))
    }

    #[test]
    fn many_who_ask_share_one_lookup_and_its_memory() {
        let now = Instant::now();
        let mut lookups = lookups();
        let holders = [PeerId::random(), PeerId::random()];
        let (first, mut first_answer) = oneshot::channel();
        let (second, mut second_answer) = oneshot::channel();
        assert_eq!(lookups.ask(LAYER, now, first), Asked::Start);
        assert_eq!(lookups.ask(LAYER, now, second), Asked::Settled);
        assert!(!lookups.found(LAYER, [holders[0], holders[0]]));
        assert!(lookups.found(LAYER, holders));
        assert!(first_answer.try_recv().is_err(), "answered before the end");
        lookups.finish(LAYER, now);
        assert_eq!(first_answer.try_recv().expect("answered"), holders);
        assert_eq!(second_answer.try_recv().expect("answered"), holders);

        let (later, mut later_answer) = oneshot::channel();
        assert_eq!(lookups.ask(LAYER, now + Duration::from_secs(4), later), Asked::Settled);
        assert_eq!(later_answer.try_recv().expect("answered"), holders);
        lookups.forget_peer(&holders[0]);
        let (later, mut later_answer) = oneshot::channel();
        lookups.ask(LAYER, now, later);
        assert_eq!(later_answer.try_recv().expect("answered"), holders[1..]);
        let (too_late, _) = oneshot::channel();
        assert_eq!(lookups.ask(LAYER, now + Duration::from_secs(5), too_late), Asked::Start);
    }

    #[test]
    fn nobody_has_it_is_forgotten_soon() {
        let now = Instant::now();
        let mut lookups = lookups();
        let (reply, mut answer) = oneshot::channel();
        lookups.ask(LAYER, now, reply);
        lookups.finish(LAYER, now);
        assert_eq!(answer.try_recv().expect("answered"), []);
        let (reply, _) = oneshot::channel();
        assert_eq!(lookups.ask(LAYER, now + Duration::from_millis(499), reply), Asked::Settled);
        let (reply, _) = oneshot::channel();
        assert_eq!(lookups.ask(LAYER, now + Duration::from_millis(500), reply), Asked::Start);
    }

    #[test]
    fn lookups_memory_and_waiters_are_bounded() {
        let now = Instant::now();
        let mut lookups = lookups();
        for no in 0..10_000_u32 {
            let mut name = [0; 32];
            name[..4].copy_from_slice(&no.to_le_bytes());
            let (reply, _) = oneshot::channel();
            if lookups.ask(DiffId(name), now, reply) == Asked::Start && no % 2 == 0 {
                lookups.finish(DiffId(name), now);
            }
        }
        assert_eq!((lookups.flights.len(), lookups.remembered.len() <= REMEMBERED_MAX), (FLIGHTS_MAX, true));
        let mut answers = Vec::new();
        for _ in 0..WAITERS_MAX + 10 {
            let (reply, answer) = oneshot::channel();
            answers.push(answer);
            let mut name = [0; 32];
            name[0] = 1;
            lookups.ask(DiffId(name), now, reply);
        }
        assert!(lookups.flights.values().all(|flight| flight.waiters.len() <= WAITERS_MAX));
    }
}
