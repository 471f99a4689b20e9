//! The fetch state machine of one node.
//!
//! [`Flight::handle`] takes one fact and gives the requests that follow from it. It has three layers:
//!
//! - `table`: the single-flight table. A chunk is leased to at most one ask; reads wait for chunks, never for asks.
//!   An ask that ends, in whatever way, frees its chunks, and the scheduler gives them to another source at once while
//!   anybody still waits. A lease ends by itself when its ask shows no sign of life.
//! - `sources` and `schedule`: who may be asked now, and for what. Demand first, in order of arrival; then what
//!   readahead wants; then prefetch, in the order given. For each chunk: a local copy, then the best holder, then the
//!   registry. A demand read whose chunk is far down a prefetch ask takes it over with an ask of its own.
//! - `asking` books what is asked; `outcome`: what the end of an ask says about its source.
//!
//! Nothing is lost by a driver that forgets: every wait has an end that the timer brings. A driver that restarts
//! begins with an empty `Flight`; nothing here is worth keeping.
//!
//! In a swarm with a member list, `owners` (by the order of `ranks`) stands between the holders and the registry, `desk` answers what others ask of
//! this node (as an owner it serves some and sends the others to them: `referrals`, `books`), and `hedge` puts demand that takes too long to a second holder. `prefetching` knows
//! which prefetch need not be looked at, and `resting` which reads of demand.

mod asking;
mod books;
mod desk;
mod events;
mod hedge;
mod invariants;
mod outcome;
mod owners;
mod prefetching;
mod ranks;
mod referrals;
mod resting;
mod schedule;
mod shape;
mod sources;
mod table;
#[cfg(test)]
mod tests;
mod waiters;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;

use crate::class::Class;
use crate::event::{
    Action, AskId, Event, FailCause, FailReason, OriginNo, OriginStanding, PeerNo, PeerView, ReadId, Source, Status,
};
use crate::limits::{Limits, Load};
use crate::members::Members;
use crate::peers::Peers;
use crate::rng::Rng;
use crate::time::Instant;

use desk::Desk;
use hedge::HedgeBooks;
use owners::{Readings, Unowned};
use ranks::KnownOwners;
use sources::Survey;
use table::{Ask, Layer, OriginRecord, Read, Reads};

/// The fetch state of one node. See the module.
#[derive(Debug, Clone)]
pub struct Flight {
    limits: Limits,
    now: Instant,
    layers: BTreeMap<DiffId, Layer>,
    reads: Reads,
    asks: BTreeMap<AskId, Ask>,
    /// Those that readers wait for.
    awaited: BTreeSet<AskId>,
    peers: Peers,
    origins: BTreeMap<OriginNo, OriginRecord>,
    members: Arc<Members>,
    known_owners: KnownOwners,
    desk: Desk,
    hedges: HedgeBooks,
    /// No ask that readers wait for takes too long before.
    hedge_from: Instant,
    unowned: Unowned,
    readings: Readings,
    /// All asks, and those to the local store.
    total: Load,
    local: Load,
    next_ask: u64,
    /// Layers in which readahead wants something.
    ahead_layers: BTreeSet<DiffId>,
    /// Surveys that still hold, for the class that is being served.
    surveys: BTreeMap<DiffId, Arc<Survey>>,
    /// What is being looked at and waits for owners that could not be asked.
    taken_owners: BTreeMap<PeerNo, Runs>,
    /// Peers that may have room since the last pass, and since the last one over prefetch.
    freed: BTreeSet<PeerNo>,
    freed_for_prefetch: BTreeSet<PeerNo>,
    /// When something that is waited for may have changed by time alone.
    wake: Wake,
    /// The timer that the driver was asked for.
    armed: Option<Instant>,
    /// No lease ends before; most are renewed until then.
    next_lease: Instant,
    /// Something may be asked that could not be before.
    dirty: bool,
}

/// When something may change by time alone.
#[derive(Debug, Clone, Copy, Default)]
struct Wake {
    /// Peers that said when they will have time have it, or have rested.
    peers: Option<Instant>,
    /// Anything else.
    other: Option<Instant>,
}

impl Wake {
    /// The earlier times.
    fn or(self, more: Self) -> Self {
        let first = |one: Option<Instant>, two: Option<Instant>| one.into_iter().chain(two).min();
        Self { peers: first(self.peers, more.peers), other: first(self.other, more.other) }
    }

    /// The earlier one.
    fn first(self) -> Option<Instant> {
        self.peers.into_iter().chain(self.other).min()
    }
}

/// What one call of [`Flight::handle`] works with.
pub(crate) struct Turn<'a> {
    now: Instant,
    rng: &'a mut Rng,
    out: &'a mut Vec<Action>,
}

impl Flight {
    /// A node that knows nothing.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits: limits.checked(),
            now: Instant::ZERO,
            layers: BTreeMap::new(),
            reads: Reads::default(),
            asks: BTreeMap::new(),
            awaited: BTreeSet::new(),
            peers: Peers::default(),
            origins: BTreeMap::new(),
            members: Arc::default(),
            known_owners: KnownOwners::default(),
            desk: Desk::default(),
            hedges: HedgeBooks::default(),
            hedge_from: Instant::ZERO,
            unowned: Unowned::default(),
            readings: Readings::default(),
            total: Load::default(),
            local: Load::default(),
            next_ask: 0,
            ahead_layers: BTreeSet::new(),
            surveys: BTreeMap::new(),
            taken_owners: BTreeMap::new(),
            freed: BTreeSet::new(),
            freed_for_prefetch: BTreeSet::new(),
            wake: Wake::default(),
            armed: None,
            next_lease: Instant::NEVER,
            dirty: false,
        }
    }

    /// Takes one fact at the time `now` and appends the requests that follow to `out`, in the order in which the
    /// driver must carry them out. A time before that of the last call counts as that time.
    pub fn handle(&mut self, now: Instant, event: Event, rng: &mut Rng, out: &mut Vec<Action>) {
        if cfg!(debug_assertions) {
            self.assert_invariants();
        }
        self.now = self.now.max(now);
        let mut turn = Turn { now: self.now, rng, out };
        self.apply(event, &mut turn);
        self.expire(&mut turn);
        // A pass that cancelled asks or failed reads has made room for others. Each such pass leaves fewer of them, so
        // this ends.
        while std::mem::take(&mut self.dirty) {
            self.pump(&mut turn);
        }
        self.arm(&mut turn);
        if cfg!(debug_assertions) {
            self.assert_invariants();
        }
    }

    /// Ends the reads and leases whose time has come.
    fn expire(&mut self, turn: &mut Turn<'_>) {
        while let Some((deadline, read)) = self.reads.first_deadline().filter(|(deadline, _)| *deadline <= turn.now) {
            debug_assert!(deadline <= turn.now);
            self.fail_read(read, FailReason::Deadline, turn);
        }
        if self.next_lease <= turn.now {
            let silent: Vec<AskId> =
                self.asks.iter().filter(|(_, ask)| ask.lease_until <= turn.now).map(|(id, _)| *id).collect();
            for ask in silent {
                self.lease_ended(ask, turn);
            }
            self.next_lease = self.asks.values().map(|ask| ask.lease_until).min().unwrap_or(Instant::NEVER);
        }
        if self.wake.first().is_some_and(|wake| wake <= turn.now) {
            self.dirty = true;
        }
    }

    /// Asks for the timer, when it is needed sooner than the last time it was asked for.
    fn arm(&mut self, turn: &mut Turn<'_>) {
        let deadline = self.reads.first_deadline().map(|(deadline, _)| deadline);
        let Some(at) = [Some(self.next_lease), deadline, self.wake.first()].into_iter().flatten().min() else { return };
        if at < Instant::NEVER && self.armed.is_none_or(|armed| at < armed) {
            self.armed = Some(at);
            turn.out.push(Action::Arm { at });
        }
    }

    /// Notes that a lease ends at a time, unless its ask shows a sign of life.
    fn lease_ends_at(&mut self, at: Instant) {
        self.next_lease = self.next_lease.min(at);
    }

    /// Notes that something may change at a time.
    fn wake_at(&mut self, at: Instant) {
        self.wake_by(Wake { peers: None, other: Some(at) });
    }

    /// Notes that a peer that could not be asked may be at a time.
    fn wake_for_peer(&mut self, at: Instant) {
        self.wake_by(Wake { peers: Some(at), other: None });
    }

    fn wake_by(&mut self, wake: Wake) {
        if self.reads.len() > 0 {
            self.wake = self.wake.or(wake);
        }
    }

    /// Takes an ask out of all books. Its chunks may be asked for again.
    fn drop_ask(&mut self, id: AskId) -> Option<Ask> {
        let ask = self.asks.remove(&id)?;
        self.awaited.remove(&id);
        self.total.sub(ask.class);
        match ask.source {
            Source::Local => self.local.sub(ask.class),
            Source::Peer(peer) => {
                self.peers.ended(peer, ask.class, ask.bytes);
                self.freed.insert(peer);
            }
            Source::Origin => {
                if let Some(origin) = ask.origin.and_then(|no| self.origins.get_mut(&no)) {
                    origin.load.sub(ask.class);
                }
                self.origins.retain(|_, record| !record.is_unused());
            }
        }
        self.refund(&ask);
        if !ask.chunks.is_empty() {
            self.desk.note_broken(ask.layer, &ask.chunks);
        }
        if let Some(layer) = self.layers.get_mut(&ask.layer) {
            layer.asks.remove(&id);
            layer.overtakable.remove(&id);
            layer.leased.remove_all(&ask.chunks);
            layer.changes += 1;
            if !ask.chunks.is_empty() {
                layer.look_again(&ask.chunks);
            }
        }
        self.surveys.clear();
        self.dirty = true;
        Some(ask)
    }

    /// Ends an ask that nobody needs.
    fn cancel_ask(&mut self, id: AskId, turn: &mut Turn<'_>) {
        if self.drop_ask(id).is_some() {
            turn.out.push(Action::Cancel { ask: id });
        }
    }

    /// Takes a read out of all books, and ends the prefetch that only it wanted.
    fn remove_read(&mut self, id: ReadId, turn: &mut Turn<'_>) -> bool {
        let Some(read) = self.reads.remove(id) else { return false };
        let Some(layer) = self.layers.get_mut(&read.layer) else { return true };
        layer.reads.remove(id, &read.needs);
        if read.class == Class::Prefetch {
            self.cancel_unwanted(&read, turn);
        }
        true
    }

    /// Cancels the prefetch asks that brought chunks for a read that is gone, and now bring nothing that anybody
    /// waits for.
    fn cancel_unwanted(&mut self, gone: &Read, turn: &mut Turn<'_>) {
        let Some(record) = self.layers.get(&gone.layer) else { return };
        let is_wanted = |ask: &Ask| {
            ask.class == Class::Demand
                || ask.chunks.intersection(&gone.missing).is_empty()
                || !ask.chunks.intersection(&record.ahead).is_empty()
                || record
                    .reads
                    .near(&ask.chunks)
                    .into_iter()
                    .filter_map(|read| self.reads.get(read))
                    .any(|read| !read.missing.intersection(&ask.chunks).is_empty())
        };
        let unwanted: Vec<AskId> =
            record.asks.iter().filter(|id| self.asks.get(id).is_some_and(|ask| !is_wanted(ask))).copied().collect();
        for ask in unwanted {
            self.cancel_ask(ask, turn);
        }
    }

    /// Ends a read without its chunks.
    fn fail_read(&mut self, id: ReadId, reason: FailReason, turn: &mut Turn<'_>) {
        let Some(layer) = self.reads.get(id).map(|read| read.layer) else { return };
        let cause = self.cause(layer, reason);
        self.remove_read(id, turn);
        self.say_failed(id, cause, turn);
    }

    /// Says that a read failed, to whoever wanted it.
    fn say_failed(&mut self, id: ReadId, cause: FailCause, turn: &mut Turn<'_>) {
        match desk::claim_of(id) {
            Some(claim) => self.claim_failed(claim, turn),
            None => turn.out.push(Action::Fail { read: id, cause }),
        }
    }

    /// Says that a read has all its chunks. Claims were told before that these would come.
    fn say_delivered(id: ReadId, turn: &mut Turn<'_>) {
        if desk::claim_of(id).is_none() {
            turn.out.push(Action::Deliver { read: id });
        }
    }

    fn cause(&self, layer: DiffId, reason: FailReason) -> FailCause {
        match self.layers.get(&layer) {
            Some(layer) => layer.cause(reason, self.now),
            None => FailCause { reason, tried: Vec::new(), origin: OriginStanding::Absent, holders: 0 },
        }
    }

    /// A peer as it is seen now; `None` for one that is not known.
    pub fn peer_view(&self, peer: PeerNo) -> Option<PeerView> {
        let holds = self.layers.values().filter(|layer| layer.holders.contains_key(&peer)).count();
        Some(PeerView { holds, ..self.peers.view(peer, self.now)? })
    }

    /// What each peer that is known to hold something of `layer` has said that it has.
    pub fn held_by_peers(&self, layer: DiffId) -> Vec<Runs> {
        let holders = self.layers.get(&layer).into_iter().flat_map(|layer| layer.holders.values());
        holders.map(|holder| holder.chunks.clone()).filter(|chunks| !chunks.is_empty()).collect()
    }

    /// What waits and what is under way.
    pub fn status(&self) -> Status {
        let asks = |wanted: fn(&Source) -> bool| self.asks.values().filter(|ask| wanted(&ask.source)).count();
        let (peers_up, peers_banned) = self.peers.counts(self.now);
        Status {
            waiting_demand: self.reads.len() - self.reads.prefetch_len(),
            waiting_prefetch: self.reads.prefetch_len(),
            asks_local: asks(|source| *source == Source::Local),
            asks_peer: asks(|source| matches!(source, Source::Peer(_))),
            asks_origin: asks(|source| *source == Source::Origin),
            peers_up,
            peers_banned,
            layers: self.layers.len(),
            claims: self.desk.len(),
        }
    }
}
