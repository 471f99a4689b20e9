//! The task that owns the fetch policy.
//!
//! `select -> apply`: gathering is async, deciding is not. It turns commands into facts, hands them to the policy with
//! the time, and carries out what comes back. It holds no opinion of its own.

mod deciding;
mod seen;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use hermes_image::ids::{ChunkNo, DiffId};
use hermes_image::runs::Runs;
use hermes_p2p::MemberList;
use hermes_p2p::{PeerEvent, PeerId, Ruling};
use hermes_policy::class::ErrorClass;
use hermes_policy::event::{AskId, ClaimId, Event, Outcome, ReadId, Source};
use hermes_policy::flight::Flight;
use hermes_policy::limits::Limits;
use hermes_policy::record::{FORMAT, Header};
use hermes_policy::rng::Rng;
use hermes_store::Store;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::AbortHandle;

use super::asks;
use super::blob::Blob;
use super::desk::{Claimed, Claims};
use super::layer::OpenLayer;
use super::numbers::PeerNumbers;
use super::overflow::Overflow;
use super::record::Recorder;
use super::trace::{Brought, Tracer};
use super::{Answer, COMMANDS_MAX, Class, Command, Delivered, FetchHandle};
use crate::metrics::{ArrivedFrom, RECORDED};

/// What the driver works with.
#[derive(Debug)]
pub struct FetchConfig {
    /// Where chunks go.
    pub store: Arc<Store>,
    /// The swarm, if the node is in one.
    pub peers: Option<hermes_p2p::Node>,
    /// What the other nodes ask this one for.
    pub claims: Option<Claims>,
    /// Bounds of the policy.
    pub limits: Limits,
    /// Seed of the policy's random choices.
    pub seed: u64,
    /// Where all that the policy is told and asks for is written down (docs/simulation.md), if anywhere.
    pub record: Option<PathBuf>,
}

/// Starts the driver on the current runtime. It ends when the last handle is dropped.
///
/// # Errors
/// When the record cannot be begun.
pub fn spawn(mut config: FetchConfig) -> io::Result<FetchHandle> {
    let begin = |path: &PathBuf| {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let header = Header { format: FORMAT.to_owned(), version, seed: config.seed, limits: config.limits.clone() };
        Recorder::start(path, &header)
    };
    let recorder = config.record.as_ref().map(begin).transpose()?;
    let claims = config.claims.take();
    let (commands, queue) = mpsc::channel(COMMANDS_MAX);
    let (completed, completions) = watch::channel(());
    let (store, started) = (Arc::clone(&config.store), Instant::now());
    let driver = Driver {
        flight: Flight::new(config.limits.clone()),
        recorder,
        rng: Rng::new(config.seed),
        started,
        timer: None,
        layers: BTreeMap::new(),
        reads: BTreeMap::new(),
        overflow: Overflow::default(),
        asks: BTreeMap::new(),
        claims: BTreeMap::new(),
        next_claim: 0,
        peers: PeerNumbers::default(),
        tracer: Tracer::new(started),
        reports: commands.downgrade(),
        completed,
        config,
    };
    tokio::spawn(driver.run(queue, claims));
    Ok(FetchHandle::new(commands, store, completions))
}

struct Waiting {
    layer: DiffId,
    chunks: Runs,
    class: Class,
    since: Instant,
    /// Where what came so far came from.
    from: Option<ArrivedFrom>,
    delivered: Delivered,
    done: oneshot::Sender<Answer>,
}

/// An ask under way.
struct Asked {
    task: AbortHandle,
    source: Source,
    layer: DiffId,
    /// What the registry was asked for.
    blob: Option<Arc<Blob>>,
}

struct Driver {
    config: FetchConfig,
    flight: Flight,
    recorder: Option<Recorder>,
    rng: Rng,
    started: Instant,
    timer: Option<Instant>,
    layers: BTreeMap<DiffId, Arc<OpenLayer>>,
    reads: BTreeMap<ReadId, Waiting>,
    overflow: Overflow,
    asks: BTreeMap<AskId, Asked>,
    /// Where rulings go.
    claims: BTreeMap<ClaimId, mpsc::Sender<Ruling>>,
    next_claim: u64,
    peers: PeerNumbers,
    tracer: Tracer,
    /// Weak, so that the asks' way back does not keep the driver alive.
    reports: mpsc::WeakSender<Command>,
    completed: watch::Sender<()>,
}

impl Driver {
    async fn run(mut self, mut queue: mpsc::Receiver<Command>, mut claims: Option<Claims>) {
        let mut peer_events = self.config.peers.as_ref().map(hermes_p2p::Node::events);
        let mut lists = self.config.peers.as_ref().map(hermes_p2p::Node::members);
        if let Some(lists) = &mut lists {
            lists.mark_changed();
        }
        for peer in self.config.peers.as_ref().map(hermes_p2p::Node::peers).unwrap_or_default() {
            self.peer_up(peer);
        }
        loop {
            let timer = self.timer;
            let fire = async move {
                match timer {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                command = queue.recv() => match command {
                    Some(command) => self.apply(command),
                    None => break,
                },
                event = next_event(&mut peer_events) => self.peer_event(event),
                list = next_list(&mut lists) => {
                    let members = Arc::new(self.peers.members(&list));
                    self.tell(Event::MembersChanged { members });
                }
                claimed = next_claim(&mut claims) => self.claimed(claimed),
                () = fire => {
                    self.timer = None;
                    self.tell(Event::TimerFired);
                }
            }
        }
        for ask in self.asks.values() {
            ask.task.abort();
        }
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Open { layer, local, ready } => {
                self.open(layer, local);
                let _ = ready.send(());
            }
            Command::OriginsChanged { layer } => {
                let Some(open) = self.layers.get(&layer) else { return };
                if open.users_changed() {
                    self.tell_geometry(layer);
                }
                self.tell_origin(layer, true);
            }
            Command::Close { layer } => {
                self.tell(Event::LayerClosed { layer });
                self.layers.remove(&layer);
                self.overflow.forget(layer);
                self.tracer.closed(layer);
            }
            Command::Need { read, layer, chunks, class, deadline, done } => {
                let (mut delivered, since, from) = (Delivered::default(), Instant::now(), None);
                let mut chunks = chunks;
                if class == Class::Demand
                    && let Some(open) = self.layers.get(&layer)
                {
                    open.missed(since);
                    chunks = self.overflow.give(layer, &chunks, &mut delivered);
                    if chunks.is_empty() {
                        let _ = done.send(Ok(delivered));
                        return;
                    }
                }
                let waiting = Waiting { layer, chunks: chunks.clone(), class, since, from, delivered, done };
                self.reads.insert(read, waiting);
                let deadline = self.policy_time(deadline);
                self.tell(Event::ReadNeeds { read, layer, chunks, class, deadline });
            }
            Command::Withdraw { read } => {
                self.reads.remove(&read);
                self.tell(Event::ReadCancelled { read });
            }
            Command::Hit { layer, chunks } => {
                self.tell(Event::ReadHit { layer, first_chunk: chunks.start, end_chunk: chunks.end });
            }
            Command::LocalHas { layer, chunks } => self.tell(Event::LocalHas { layer, chunks }),
            Command::Evicted { layer, chunks } => self.tell(Event::Evicted { layer, chunks }),
            Command::Arrived { layer, chunks, overflow, from } => {
                if let Some(brought) = from {
                    self.note_source(layer, &chunks, &brought);
                }
                self.arrived(layer, chunks, &overflow);
            }
            Command::Progress { ask } => {
                self.tracer.sign(ask, Instant::now());
                self.tell(Event::AskProgress { ask });
            }
            Command::Referred { ask, chunks, peers } => {
                self.tracer.referred(ask, &chunks, Instant::now());
                let peers = peers.into_iter().map(|peer| self.peers.number(peer)).collect();
                self.tell(Event::AskReferred { ask, chunks, peers });
            }
            Command::Delegated { ask, chunks } => {
                self.tracer.delegated(ask, Instant::now());
                self.tell(Event::AskDelegated { ask, chunks });
            }
            Command::Pending { ask, registry_rests } => {
                self.tracer.sign(ask, Instant::now());
                self.tell(Event::AskPending { ask, registry_rests });
            }
            Command::ClaimEnded { claim } => {
                self.claims.remove(&claim);
                self.tell(Event::ClaimEnded { claim });
            }
            Command::Ended { ask, outcome } => {
                let asked = self.asks.remove(&ask);
                self.tracer.ended(ask, Some(&outcome), Instant::now());
                if let Outcome::Failed { class, .. } = &outcome {
                    RECORDED.ask_failed(*class);
                }
                let outcome = self.unless_another_blob(asked, outcome);
                self.tell(Event::AskEnded { ask, outcome });
            }
            Command::PeerHas { peer, layer, chunks } => {
                let peer = self.peers.number(peer);
                self.tell(Event::PeerHas { peer, layer, chunks });
            }
            Command::HoldersFound { layer } => self.tell(Event::HoldersFound { layer }),
            Command::FindDonors { layer, found } => {
                if let Some(open) = self.layers.get(&layer).cloned() {
                    self.spawn_detached(|work| async move {
                        asks::donors(&work, &open).await;
                        let _ = found.send(());
                    });
                }
            }
            Command::SpansFound { layer, blob, found } => self.spans_found(layer, &blob, found),
            Command::Status { answer } => {
                let _ = answer.send(self.flight.status());
            }
            Command::Waiting { answer } => {
                let _ = answer.send(self.waiting());
            }
            Command::Trace { layers, answer } => {
                let _ = answer.send(self.tracer.of(layers, Instant::now()));
            }
            Command::Held { layer, answer } => {
                let _ = answer.send(self.flight.held_by_peers(layer));
            }
            Command::Peers { peers, answer } => {
                let _ = answer.send(peers.iter().map(|peer| self.peer_account(peer)).collect());
            }
        }
    }

    fn open(&mut self, layer: Arc<OpenLayer>, local: Runs) {
        let diff_id = layer.diff_id();
        let event = Event::LayerOpened {
            layer: diff_id,
            geometry: layer.geometry(),
            present: layer.layer.present(),
            local,
            origin: layer.origin_number(),
        };
        self.layers.insert(diff_id, Arc::clone(&layer));
        self.tell(event);
        for peer in self.config.peers.as_ref().map(hermes_p2p::Node::peers).unwrap_or_default() {
            let layer = Arc::clone(&layer);
            self.spawn_detached(|work| asks::watch(work, layer, peer));
        }
    }

    /// Another node asks. Its chunks are counted by a table: by another one than ours they mean nothing here.
    fn claimed(&mut self, claimed: Claimed) {
        let Claimed { claim, rulings } = claimed;
        let counts_alike = |open: &Arc<OpenLayer>| open.layer.table().id() == claim.table;
        let Some(reports) = self.reports.upgrade() else { return };
        if !self.layers.get(&claim.layer).is_none_or(counts_alike) {
            return;
        }
        let no = ClaimId(self.next_claim);
        self.next_claim += 1;
        self.claims.insert(no, rulings.clone());
        tokio::spawn(async move {
            rulings.closed().await;
            let _ = reports.send(Command::ClaimEnded { claim: no }).await;
        });
        let class = match claim.class {
            hermes_p2p::Class::Demand => Class::Demand,
            hermes_p2p::Class::Prefetch => Class::Prefetch,
        };
        let peer = self.peers.number(claim.peer);
        let hermes_p2p::Claim { layer, want, extent, chunks, .. } = claim;
        self.tell(Event::Claimed { claim: no, peer, layer, chunks, extent, class, want });
    }

    fn spans_found(&mut self, layer: DiffId, blob: &Arc<Blob>, found: Result<(), ErrorClass>) {
        let is_read = self.layers.get(&layer).is_some_and(|open| Arc::ptr_eq(&open.blob(), blob));
        match found {
            _ if !is_read => {}
            Ok(()) => self.tell_geometry(layer),
            Err(_) if self.turned_from(layer, blob) => {}
            // A peer that comes may have it: the policy asks again after a pause.
            Err(ErrorClass::NotFound) => {}
            Err(_) => self.tell_origin(layer, false),
        }
    }

    /// A refusal is that of one blob: where another image has the layer as another one, that is read from now on, and the
    /// policy hears of an ask that failed in passing.
    fn unless_another_blob(&mut self, asked: Option<Asked>, outcome: Outcome) -> Outcome {
        let Outcome::Failed { class: ErrorClass::NotFound | ErrorClass::Denied | ErrorClass::PeerFault, .. } = outcome
        else {
            return outcome;
        };
        match asked {
            Some(Asked { blob: Some(blob), layer, .. }) if self.turned_from(layer, &blob) => {
                Outcome::Failed { class: ErrorClass::Transient, retry_after: None }
            }
            _ => outcome,
        }
    }

    /// Whether another blob of the layer is read instead of `blob`, which cannot be.
    fn turned_from(&mut self, layer: DiffId, blob: &Arc<Blob>) -> bool {
        let Some(open) = self.layers.get(&layer) else { return false };
        if Arc::ptr_eq(&open.blob(), blob) {
            if !open.refused(blob) {
                return false;
            }
            self.tell_geometry(layer);
            self.tell_origin(layer, true);
        }
        true
    }

    fn tell_geometry(&mut self, layer: DiffId) {
        if let Some(geometry) = self.layers.get(&layer).map(|open| open.geometry()) {
            self.tell(Event::GeometryChanged { layer, geometry });
        }
    }

    fn tell_origin(&mut self, layer: DiffId, usable: bool) {
        if let Some(origin) = self.layers.get(&layer).map(|open| open.origin_number()) {
            self.tell(Event::OriginChanged { layer, origin, usable });
        }
    }

    /// Hands chunks that the store could not take to whoever waits for them, then tells the policy.
    fn arrived(&mut self, layer: DiffId, chunks: Runs, overflow: &[(ChunkNo, Bytes)]) {
        if !overflow.is_empty() {
            for waiting in self.reads.values_mut().filter(|waiting| waiting.layer == layer) {
                let wanted = overflow.iter().filter(|(chunk, _)| waiting.chunks.contains(chunk.0));
                waiting.delivered.chunks.extend(wanted.map(|(chunk, bytes)| (chunk.0, bytes.clone())));
            }
            if self.layers.contains_key(&layer) {
                self.overflow.keep(layer, overflow);
            }
        }
        // They are not in the store: who comes much later has to fetch them again, those who wait now need not.
        let passed: Runs = overflow.iter().map(|(chunk, _)| chunk.0..chunk.0 + 1).collect();
        let kept = chunks.difference(&passed);
        if !kept.is_empty() {
            self.tell(Event::Arrived { layer, chunks: kept });
            if self.layers.get(&layer).is_some_and(|open| open.layer.is_complete()) {
                self.completed.send_replace(());
            }
            if let Some(peers) = &self.config.peers {
                peers.grown(layer);
            }
        }
        if !passed.is_empty() {
            self.tell(Event::PassedThrough { layer, chunks: passed });
        }
    }

    /// Remembers for the reads that wait for `chunks` where these came from.
    fn note_source(&mut self, layer: DiffId, chunks: &Runs, brought: &Brought) {
        self.tracer.arrived(layer, chunks, brought, Instant::now());
        if let Some(open) = self.layers.get(&layer) {
            open.touches.arrived(chunks, brought.from);
        }
        let from = brought.from;
        for waiting in self.reads.values_mut().filter(|waiting| waiting.layer == layer) {
            if waiting.from != Some(ArrivedFrom::Mixed) && !waiting.chunks.intersection(chunks).is_empty() {
                let is_same = waiting.from.is_none_or(|known| known == from);
                waiting.from = Some(if is_same { from } else { ArrivedFrom::Mixed });
            }
        }
    }

    fn peer_event(&mut self, event: PeerEvent) {
        match event {
            PeerEvent::Up(peer) => self.peer_up(peer),
            PeerEvent::Down(peer) => {
                let peer = self.peers.set_up(peer, false);
                self.tell(Event::PeerDown { peer });
            }
        }
    }

    fn peer_up(&mut self, peer: PeerId) {
        let no = self.peers.set_up(peer, true);
        self.tell(Event::PeerUp { peer: no });
        // A new neighbour may have what is being read right now.
        for layer in self.layers.values().cloned().collect::<Vec<_>>() {
            self.spawn_detached(|work| asks::watch(work, layer, peer));
        }
    }
}

/// The next version of the member list.
async fn next_list(lists: &mut Option<watch::Receiver<Arc<MemberList>>>) -> Arc<MemberList> {
    let Some(lists) = lists else { return std::future::pending().await };
    match lists.changed().await {
        Ok(()) => Arc::clone(&lists.borrow_and_update()),
        Err(_) => std::future::pending().await,
    }
}

async fn next_claim(claims: &mut Option<Claims>) -> Claimed {
    match claims {
        Some(queue) => match queue.recv().await {
            Some(claimed) => claimed,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

async fn next_event(events: &mut Option<broadcast::Receiver<PeerEvent>>) -> PeerEvent {
    let Some(events) = events else { return std::future::pending().await };
    loop {
        match events.recv().await {
            Ok(event) => return event,
            // What was missed shows itself: a peer that is gone fails its asks, one that came is found by the next search.
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return std::future::pending().await,
        }
    }
}
