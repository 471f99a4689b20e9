//! What others may take from this node: streams, transfers, requests and bytes.
//!
//! Demand goes before prefetch four times over: prefetch has fewer slots, reads and compresses on half of the cores, yields
//! between batches while demand is being served, and of a limited rate gets only what demand leaves: demand is sent at once,
//! and prefetch waits until that is paid.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use libp2p::PeerId;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::codec::Class;
use crate::config::UploadLimits;

/// When a refused demand may ask again. A demand transfer takes a few milliseconds.
const RETRY_DEMAND_MS: u32 = 20;
/// When a refused prefetch may ask again. A prefetch transfer of 64 MiB takes half a second at 1 Gbit/s.
const RETRY_PREFETCH_MS: u32 = 250;
/// When a peer above its request rate may ask again.
const RETRY_REQUEST_MS: u32 = 100;
/// How long a prefetch batch waits for demand to be served first. Bounded, so that prefetch never starves.
const YIELD_MAX: Duration = Duration::from_millis(20);
/// How much of a limited byte rate may be sent at once.
const BURST: Duration = Duration::from_millis(100);
/// How much of a limited byte rate demand may take of the future. A reader waits for it, and behind a batch of prefetch it
/// would wait for 2 ms at 1 Gbit/s, four times as long as its own chunk takes; 100 ms are 190 chunks at that rate.
const DEMAND_AHEAD: Duration = Duration::from_millis(100);

/// Peers whose bytes are counted; when there are more, all counts begin anew.
const COUNTED_PEERS_MAX: usize = 4096;

/// What one peer uses. It exists while the peer has a stream.
#[derive(Debug)]
struct PeerUse {
    streams: usize,
    transfers: usize,
    claims: usize,
    /// Requests that it may send now.
    credit: f64,
    credit_at: Instant,
}

#[derive(Debug)]
struct State {
    peers: HashMap<PeerId, PeerUse>,
    streams: usize,
    demand: usize,
    prefetch: usize,
    watchers: usize,
    claims: usize,
    demand_waits: usize,
    pace: Option<Pace>,
}

/// Guards all uploads of a node.
#[derive(Debug)]
pub(crate) struct Gate {
    limits: UploadLimits,
    state: Mutex<State>,
    /// Prefetch batches that are read and compressed at once.
    prefetch_batches: Semaphore,
    /// Bytes of chunks that were sent since the node started.
    sent: Mutex<HashMap<PeerId, u64>>,
    /// Told when the last demand transfer has ended.
    calm: Notify,
    /// Told when a transfer has ended.
    freed: Notify,
}

/// The limits are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Busy {
    /// When to ask again.
    pub(crate) retry_after_ms: u32,
}

/// Bytes per second, as the time at which the next may go.
#[derive(Debug)]
struct Pace {
    bytes_per_second: NonZeroU64,
    next: Instant,
}

impl Pace {
    /// How long to wait before anything may go; zero for now.
    fn wait(&self, now: Instant) -> Duration {
        self.next.saturating_duration_since(now)
    }

    fn charge(&mut self, now: Instant, len_bytes: u64) {
        let nanos = u128::from(len_bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.get());
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let floor = now.checked_sub(BURST).unwrap_or(now);
        self.next = self.next.max(floor) + cost;
    }
}

impl Gate {
    /// A gate with nothing behind it yet.
    pub(crate) fn new(limits: UploadLimits) -> Arc<Self> {
        let pace = limits.bytes_per_second.map(|bytes_per_second| Pace { bytes_per_second, next: Instant::now() });
        let state = State {
            peers: HashMap::new(),
            streams: 0,
            demand: 0,
            prefetch: 0,
            watchers: 0,
            claims: 0,
            demand_waits: 0,
            pace,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            limits,
            state: Mutex::new(state),
            prefetch_batches: Semaphore::new((cores / 2).max(1)),
            sent: Mutex::default(),
            calm: Notify::new(),
            freed: Notify::new(),
        })
    }

    /// A stream of `peer`, if it may have one more.
    pub(crate) fn stream(self: &Arc<Self>, peer: PeerId) -> Option<StreamPermit> {
        let mut state = self.state.lock();
        let mine = state.peers.get(&peer).map_or(0, |used| used.streams);
        if state.streams >= self.limits.streams_max || mine >= self.limits.streams_per_peer_max {
            return None;
        }
        state.streams += 1;
        let credit = f64::from(self.limits.requests_per_second_per_peer) * 2.0;
        let fresh = PeerUse { streams: 0, transfers: 0, claims: 0, credit, credit_at: Instant::now() };
        state.peers.entry(peer).or_insert(fresh).streams += 1;
        Some(StreamPermit { gate: Arc::clone(self), peer })
    }

    /// One request of `peer`, which has a stream.
    pub(crate) fn request(&self, peer: &PeerId, now: Instant) -> Result<(), Busy> {
        let rate = f64::from(self.limits.requests_per_second_per_peer);
        let busy = Busy { retry_after_ms: RETRY_REQUEST_MS };
        let mut state = self.state.lock();
        let used = state.peers.get_mut(peer).ok_or(busy)?;
        let gained = now.saturating_duration_since(used.credit_at).as_secs_f64() * rate;
        used.credit = (used.credit + gained).min(rate * 2.0);
        used.credit_at = now;
        if used.credit < 1.0 {
            return Err(busy);
        }
        used.credit -= 1.0;
        Ok(())
    }

    /// One transfer to `peer`, which has a stream.
    pub(crate) fn transfer(self: &Arc<Self>, peer: PeerId, class: Class) -> Result<TransferPermit, Busy> {
        let retry_after_ms = match class {
            Class::Demand => RETRY_DEMAND_MS,
            Class::Prefetch => RETRY_PREFETCH_MS,
        };
        let busy = Busy { retry_after_ms };
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let full = state.demand + state.prefetch >= self.limits.transfers_max
            || (class == Class::Prefetch && state.prefetch >= self.limits.prefetch_transfers_max);
        let used = state.peers.get_mut(&peer).ok_or(busy)?;
        if full || used.transfers >= self.limits.transfers_per_peer_max {
            return Err(busy);
        }
        used.transfers += 1;
        match class {
            Class::Demand => state.demand += 1,
            Class::Prefetch => state.prefetch += 1,
        }
        Ok(TransferPermit { gate: Arc::clone(self), peer, class })
    }

    /// Ends when a transfer has ended since this was called. Cancel safe.
    pub(crate) fn freed(&self) -> impl Future<Output = ()> + '_ {
        self.freed.notified()
    }

    /// Notes that so many bytes of chunks go to `peer`.
    pub(crate) fn note_sent(&self, peer: PeerId, len_bytes: usize) {
        let mut sent = self.sent.lock();
        if sent.len() >= COUNTED_PEERS_MAX && !sent.contains_key(&peer) {
            sent.clear();
        }
        *sent.entry(peer).or_default() += len_bytes as u64;
    }

    /// Bytes of chunks that went to `peer`.
    pub(crate) fn sent_bytes(&self, peer: &PeerId) -> u64 {
        self.sent.lock().get(peer).copied().unwrap_or(0)
    }

    /// One claim of `peer`, which has a stream.
    pub(crate) fn claim(self: &Arc<Self>, peer: PeerId) -> Result<ClaimPermit, Busy> {
        let busy = Busy { retry_after_ms: RETRY_PREFETCH_MS };
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let used = state.peers.get_mut(&peer).ok_or(busy)?;
        if state.claims >= self.limits.claims_max || used.claims >= self.limits.claims_per_peer_max {
            return Err(busy);
        }
        state.claims += 1;
        used.claims += 1;
        Ok(ClaimPermit { gate: Arc::clone(self), peer })
    }

    /// One stream on which news of progress are pushed.
    pub(crate) fn watcher(self: &Arc<Self>) -> Result<WatchPermit, Busy> {
        let mut state = self.state.lock();
        if state.watchers >= self.limits.watchers_max {
            return Err(Busy { retry_after_ms: RETRY_PREFETCH_MS });
        }
        state.watchers += 1;
        Ok(WatchPermit { gate: Arc::clone(self) })
    }

    /// Waits for a core to read and compress a batch on. Demand takes one at once: it would queue behind all transfers of
    /// prefetch, which all read ahead.
    pub(crate) async fn core(&self, class: Class) -> Option<SemaphorePermit<'_>> {
        match class {
            Class::Demand => None,
            // Never closed.
            Class::Prefetch => self.prefetch_batches.acquire().await.ok(),
        }
    }

    /// Waits until `len_bytes` may be sent.
    ///
    /// Cancel safe: nothing is charged before it returns.
    pub(crate) async fn pace(&self, class: Class, len_bytes: usize) {
        if class == Class::Prefetch {
            self.yield_to_demand().await;
        }
        let mut waiting = None;
        loop {
            let wait = {
                let mut guard = self.state.lock();
                let state = &mut *guard;
                let Some(pace) = &mut state.pace else { return };
                let now = Instant::now();
                let first = class == Class::Demand || state.demand_waits == 0;
                let ahead = if class == Class::Demand { DEMAND_AHEAD } else { Duration::ZERO };
                let wait = pace.wait(now).saturating_sub(ahead);
                if first && wait.is_zero() {
                    pace.charge(now, len_bytes as u64);
                    return;
                }
                if class == Class::Demand && waiting.is_none() {
                    state.demand_waits += 1;
                    waiting = Some(DemandWaits(self));
                }
                // Prefetch behind waiting demand looks again soon.
                wait.max(Duration::from_millis(1))
            };
            tokio::time::sleep(wait).await;
        }
    }

    async fn yield_to_demand(&self) {
        let calm = self.calm.notified();
        if self.state.lock().demand > 0 {
            // Time up is as good as calm: prefetch goes on slowly.
            let _ = tokio::time::timeout(YIELD_MAX, calm).await;
        }
    }
}

/// Demand that waits for bytes of a limited rate.
struct DemandWaits<'a>(&'a Gate);

impl Drop for DemandWaits<'_> {
    fn drop(&mut self) {
        self.0.state.lock().demand_waits -= 1;
    }
}

/// A stream that counts until it is dropped.
#[derive(Debug)]
pub(crate) struct StreamPermit {
    gate: Arc<Gate>,
    peer: PeerId,
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock();
        state.streams -= 1;
        if let Some(used) = state.peers.get_mut(&self.peer) {
            used.streams -= 1;
            if used.streams == 0 {
                state.peers.remove(&self.peer);
            }
        }
    }
}

/// A transfer that counts until it is dropped. Dropped before the permit of its stream.
#[derive(Debug)]
pub(crate) struct TransferPermit {
    gate: Arc<Gate>,
    peer: PeerId,
    class: Class,
}

impl Drop for TransferPermit {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock();
        if let Some(used) = state.peers.get_mut(&self.peer) {
            used.transfers -= 1;
        }
        match self.class {
            Class::Demand => state.demand -= 1,
            Class::Prefetch => state.prefetch -= 1,
        }
        if state.demand == 0 {
            self.gate.calm.notify_waiters();
        }
        self.gate.freed.notify_waiters();
    }
}

/// A claim that counts until it is dropped. Dropped before the permit of its stream.
#[derive(Debug)]
pub(crate) struct ClaimPermit {
    gate: Arc<Gate>,
    peer: PeerId,
}

impl Drop for ClaimPermit {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock();
        state.claims -= 1;
        if let Some(used) = state.peers.get_mut(&self.peer) {
            used.claims -= 1;
        }
    }
}

/// A watcher that counts until it is dropped.
#[derive(Debug)]
pub(crate) struct WatchPermit {
    gate: Arc<Gate>,
}

impl Drop for WatchPermit {
    fn drop(&mut self) {
        self.gate.state.lock().watchers -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(change: impl FnOnce(&mut UploadLimits)) -> Arc<Gate> {
        let mut limits = UploadLimits::default();
        change(&mut limits);
        Gate::new(limits)
    }

    #[test]
    fn streams_are_bounded_by_peer_and_in_all() {
        let gate = gate(|limits| (limits.streams_per_peer_max, limits.streams_max) = (2, 3));
        let (a, b) = (PeerId::random(), PeerId::random());
        let held: Vec<_> = [a, a, b].map(|peer| gate.stream(peer).expect("is free")).into();
        assert!(gate.stream(a).is_none() && gate.stream(b).is_none());
        drop(held);
        assert!(gate.state.lock().peers.is_empty(), "a peer without streams is remembered");
        assert!(gate.stream(b).is_some());
    }

    #[test]
    fn demand_finds_a_slot_when_prefetch_has_taken_all_of_its_own() {
        let gate = gate(|limits| {
            (limits.transfers_max, limits.prefetch_transfers_max, limits.transfers_per_peer_max) = (3, 2, 8);
        });
        let peer = PeerId::random();
        let _stream = gate.stream(peer).expect("is free");
        let _held = [Class::Prefetch; 2].map(|class| gate.transfer(peer, class).expect("is free"));
        assert!(gate.transfer(peer, Class::Prefetch).is_err());
        let demand = gate.transfer(peer, Class::Demand).expect("is kept for demand");
        assert!(gate.transfer(peer, Class::Demand).is_err());
        drop(demand);
        assert!(gate.transfer(peer, Class::Demand).is_ok());
    }

    #[test]
    fn one_peer_cannot_take_all_slots() {
        let gate = gate(|limits| limits.transfers_per_peer_max = 2);
        let peers = [PeerId::random(), PeerId::random()];
        let _streams = peers.map(|peer| gate.stream(peer).expect("is free"));
        let _held = [0; 2].map(|_| gate.transfer(peers[0], Class::Demand).expect("is free"));
        assert!(gate.transfer(peers[0], Class::Demand).is_err());
        assert!(gate.transfer(peers[1], Class::Demand).is_ok());
    }

    #[test]
    fn claims_are_bounded_by_peer_and_in_all_and_hold_no_transfer() {
        let gate = gate(|limits| {
            (limits.claims_per_peer_max, limits.claims_max) = (2, 3);
            (limits.transfers_max, limits.prefetch_transfers_max) = (1, 1);
        });
        let peers = [PeerId::random(), PeerId::random()];
        let _streams = peers.map(|peer| gate.stream(peer).expect("is free"));
        let mut held: Vec<_> = [peers[0], peers[0], peers[1]].map(|peer| gate.claim(peer).expect("is free")).into();
        assert!(gate.claim(peers[0]).is_err() && gate.claim(peers[1]).is_err());
        assert!(gate.transfer(peers[0], Class::Demand).is_ok());
        held.pop();
        assert!(gate.claim(peers[0]).is_err(), "one peer took more than its share");
        assert!(gate.claim(peers[1]).is_ok());
    }

    #[test]
    fn progress_is_told_on_so_many_streams() {
        let gate = gate(|_| {});
        let held: Vec<_> = (0..128).map(|_| gate.watcher().expect("is free")).collect();
        assert!(gate.watcher().is_err());
        drop(held);
        assert!(gate.watcher().is_ok());
    }

    #[tokio::test]
    async fn whoever_waits_for_a_slot_is_told() {
        let gate = gate(|_| {});
        let peer = PeerId::random();
        let _stream = gate.stream(peer).expect("is free");
        let transfer = gate.transfer(peer, Class::Demand).expect("is free");
        let mut freed = Box::pin(gate.freed());
        assert!(futures::poll!(&mut freed).is_pending());
        drop(transfer);
        assert!(futures::poll!(&mut freed).is_ready());
    }

    #[test]
    fn requests_are_bounded_by_rate() {
        let gate = gate(|limits| limits.requests_per_second_per_peer = 10);
        let peer = PeerId::random();
        let _stream = gate.stream(peer).expect("is free");
        let now = Instant::now();
        let allowed = |now| (0..100).filter(|_| gate.request(&peer, now).is_ok()).count();
        assert_eq!(allowed(now), 20);
        assert_eq!(allowed(now + Duration::from_millis(500)), 5);
        assert_eq!(allowed(now + Duration::from_secs(60)), 20);
    }

    #[test]
    fn bytes_are_bounded_by_rate() {
        let start = Instant::now();
        let bytes_per_second = NonZeroU64::new(1_000_000).expect("not zero");
        let mut pace = Pace { bytes_per_second, next: start };
        let mut now = start + Duration::from_secs(60);
        let begin = now;
        for _ in 0..20 {
            now += pace.wait(now);
            pace.charge(now, 100_000);
        }
        // Twenty tenths of a second, of which the burst and the last one are not waited for.
        assert_eq!(now - begin, Duration::from_millis(1800));
        pace.charge(now, u64::MAX);
        assert!(pace.wait(now) > Duration::from_secs(1_000_000));
    }

    #[tokio::test]
    async fn demand_gets_the_next_bytes_of_a_limited_rate() {
        let gate = gate(|limits| limits.bytes_per_second = NonZeroU64::new(1_000_000_000));
        let set_next = |next| gate.state.lock().pace.as_mut().expect("is limited").next = next;
        set_next(Instant::now() + Duration::from_secs(3600));
        let mut demand = Box::pin(gate.pace(Class::Demand, 100));
        assert!(futures::poll!(&mut demand).is_pending());
        set_next(Instant::now());
        let mut prefetch = Box::pin(gate.pace(Class::Prefetch, 100));
        assert!(futures::poll!(&mut prefetch).is_pending(), "went before the demand that waits");
        drop(demand);
        assert_eq!(gate.state.lock().demand_waits, 0);
        prefetch.await;
    }

    #[tokio::test]
    async fn demand_takes_a_little_of_the_future_and_prefetch_pays_for_it() {
        let gate = gate(|limits| limits.bytes_per_second = NonZeroU64::new(1_000_000));
        gate.state.lock().pace.as_mut().expect("is limited").next = Instant::now() + DEMAND_AHEAD / 2;
        assert!(futures::poll!(Box::pin(gate.pace(Class::Prefetch, 1))).is_pending());
        // A second's worth: paid by whoever comes next.
        assert!(futures::poll!(Box::pin(gate.pace(Class::Demand, 1_000_000))).is_ready());
        assert!(futures::poll!(Box::pin(gate.pace(Class::Demand, 1))).is_pending(), "demand knows no limit");
    }

    #[tokio::test]
    async fn prefetch_yields_to_demand_but_never_starves() {
        let gate = gate(|_| {});
        let peer = PeerId::random();
        let _stream = gate.stream(peer).expect("is free");
        let demand = gate.transfer(peer, Class::Demand).expect("is free");
        let start = Instant::now();
        gate.pace(Class::Prefetch, 1).await;
        assert!(start.elapsed() >= YIELD_MAX, "did not yield");
        let mut prefetch = Box::pin(gate.pace(Class::Prefetch, 1));
        let _ = futures::poll!(&mut prefetch);
        drop(demand);
        assert!(futures::poll!(&mut prefetch).is_ready(), "goes on waiting when demand has ended");
    }
}
