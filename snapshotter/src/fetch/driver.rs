//! The task that owns the fetch policy.
//!
//! `select -> apply`: gathering is async, deciding is not. It turns commands into facts, hands them to the policy with
//! the time, and carries out what comes back. It holds no opinion of its own.

mod seen;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use hermes_image::ids::{ChunkNo, DiffId};
use hermes_image::runs::Runs;
use hermes_p2p::MemberList;
use hermes_p2p::{Asking, PeerEvent, PeerId, Ruling};
use hermes_policy::event::{self, Action, AskId, ClaimId, Event, FailCause, OriginStanding, Outcome, ReadId, Source};
use hermes_policy::flight::Flight;
use hermes_policy::limits::Limits;
use hermes_policy::rng::Rng;
use hermes_store::Store;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::AbortHandle;

use super::asks::{self, Ask};
use super::desk::{Claimed, Claims};
use super::layer::OpenLayer;
use super::numbers::PeerNumbers;
use super::trace::{self, Brought, Tracer};
use super::{Answer, COMMANDS_MAX, Class, Command, Delivered, FetchError, FetchHandle, Tried};
use crate::metrics::{ArrivedFrom, RECORDED, RulingGiven};

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
}

/// Starts the driver on the current runtime. It ends when the last handle is dropped.
pub fn spawn(mut config: FetchConfig) -> FetchHandle {
    let claims = config.claims.take();
    let (commands, queue) = mpsc::channel(COMMANDS_MAX);
    let (completed, completions) = watch::channel(());
    let (store, started) = (Arc::clone(&config.store), Instant::now());
    let driver = Driver {
        flight: Flight::new(config.limits.clone()),
        rng: Rng::new(config.seed),
        started,
        timer: None,
        layers: BTreeMap::new(),
        reads: BTreeMap::new(),
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
    FetchHandle::new(commands, store, completions)
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
}

struct Driver {
    config: FetchConfig,
    flight: Flight,
    rng: Rng,
    started: Instant,
    timer: Option<Instant>,
    layers: BTreeMap<DiffId, Arc<OpenLayer>>,
    reads: BTreeMap<ReadId, Waiting>,
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
                if let Some(open) = self.layers.get(&layer) {
                    let origin = open.origin_number();
                    self.tell(Event::OriginChanged { layer, origin, usable: true });
                }
            }
            Command::Close { layer } => {
                self.tell(Event::LayerClosed { layer });
                self.layers.remove(&layer);
                self.tracer.closed(layer);
            }
            Command::Need { read, layer, chunks, class, deadline, done } => {
                let (delivered, since, from) = (Delivered::default(), Instant::now(), None);
                let waiting = Waiting { layer, chunks: chunks.clone(), class, since, from, delivered, done };
                if class == Class::Demand
                    && let Some(open) = self.layers.get(&layer)
                {
                    open.missed(since);
                }
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
                self.asks.remove(&ask);
                self.tracer.ended(ask, Some(&outcome), Instant::now());
                if let Outcome::Failed { class, .. } = &outcome {
                    RECORDED.ask_failed(*class);
                }
                self.tell(Event::AskEnded { ask, outcome });
            }
            Command::PeerHas { peer, layer, chunks } => {
                let peer = self.peers.number(peer);
                self.tell(Event::PeerHas { peer, layer, chunks });
            }
            Command::HoldersFound { layer } => self.tell(Event::HoldersFound { layer }),
            Command::SpansFound { layer, found } => self.spans_found(layer, found),
            Command::Status { answer } => {
                let _ = answer.send(self.flight.status());
            }
            Command::Waiting { answer } => {
                let _ = answer.send(self.waiting());
            }
            Command::Trace { layers, answer } => {
                let _ = answer.send(self.tracer.of(layers, Instant::now()));
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

    fn rule(&mut self, claim: ClaimId, ruling: event::Ruling) {
        RECORDED.ruled(RulingGiven::of(&ruling));
        let ruling = match ruling {
            event::Ruling::Give(chunks) => Ruling::Give(chunks),
            event::Ruling::Lacks(chunks) => Ruling::Lacks(chunks),
            event::Ruling::Refer { chunks, peers } => {
                let peers = peers.into_iter().filter_map(|peer| self.peers.id(peer)).collect();
                Ruling::Refer { chunks, peers }
            }
            event::Ruling::Delegate(chunks) => Ruling::Delegate(chunks),
            event::Ruling::RegistryRests(wait) => Ruling::RegistryRests(wait),
            event::Ruling::NotMine { epoch } => Ruling::NotMine { epoch },
        };
        if let Some(rulings) = self.claims.get(&claim)
            && rulings.try_send(ruling).is_err()
        {
            // It has gone, or is too slow to be told: then the server ends it.
            self.claims.remove(&claim);
        }
    }

    fn spans_found(&mut self, layer: DiffId, found: bool) {
        let Some(open) = self.layers.get(&layer) else { return };
        if found {
            let geometry = open.geometry();
            self.tell(Event::GeometryChanged { layer, geometry });
        } else {
            let origin = open.origin_number();
            self.tell(Event::OriginChanged { layer, origin, usable: false });
        }
    }

    /// Hands chunks that the store could not take to whoever waits for them, then tells the policy.
    fn arrived(&mut self, layer: DiffId, chunks: Runs, overflow: &[(ChunkNo, Bytes)]) {
        if !overflow.is_empty() {
            for waiting in self.reads.values_mut().filter(|waiting| waiting.layer == layer) {
                let wanted = overflow.iter().filter(|(chunk, _)| waiting.chunks.contains(chunk.0));
                waiting.delivered.chunks.extend(wanted.map(|(chunk, bytes)| (chunk.0, bytes.clone())));
            }
        }
        // They are not in the store: the next reader has to fetch them again, those who wait now need not.
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

    fn policy_time(&self, at: Instant) -> hermes_policy::time::Instant {
        let nanos = at.saturating_duration_since(self.started).as_nanos();
        hermes_policy::time::Instant(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn clock_time(&self, at: hermes_policy::time::Instant) -> Instant {
        self.started + std::time::Duration::from_nanos(at.0)
    }

    fn tell(&mut self, event: Event) {
        let mut actions = Vec::new();
        let now = self.policy_time(Instant::now());
        self.flight.handle(now, event, &mut self.rng, &mut actions);
        for action in actions {
            self.carry_out(action);
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::AskLocal { ask, layer, chunks, class } => {
                self.trace(ask, layer, trace::Asked::Local, class, None, chunks.clone());
                self.spawn_ask(ask, Source::Local, layer, |work, layer| asks::local(work, layer, chunks));
            }
            Action::AskPeer { ask, peer: no, layer, chunks, class, want, reason, extent, timeout } => {
                let Some(peer) = self.peers.id(no) else { return };
                self.trace(ask, layer, trace::Asked::Peer(peer), class, Some(reason), chunks.clone());
                let class = match class {
                    Class::Demand => hermes_p2p::Class::Demand,
                    Class::Prefetch => hermes_p2p::Class::Prefetch,
                };
                let asking = Asking { chunks, extent, want, class };
                self.spawn_ask(ask, Source::Peer(no), layer, move |work, layer| {
                    asks::peer(work, layer, peer, asking, timeout)
                });
            }
            Action::Rule { claim, ruling } => self.rule(claim, ruling),
            Action::Suspect { peer } => {
                if let (Some(peer), Some(node)) = (self.peers.id(peer), &self.config.peers) {
                    node.suspect(&peer);
                }
            }
            Action::AskOrigin { ask, origin, layer, spans, class, reason, timeout } => {
                self.trace_registry(ask, layer, &spans, class, reason);
                self.spawn_ask(ask, Source::Origin, layer, move |work, layer| {
                    asks::registry(work, layer, (origin, reason), spans, timeout)
                });
            }
            Action::Cancel { ask } => {
                self.tracer.ended(ask, None, Instant::now());
                if let Some(asked) = self.asks.remove(&ask) {
                    asked.task.abort();
                }
            }
            Action::Deliver { read } => self.answer(read, Ok),
            Action::Fail { read, cause } => self.fail(read, cause),
            Action::FindHolders { layer } => {
                if let Some(open) = self.layers.get(&layer).cloned() {
                    self.spawn_detached(|work| asks::holders(work, open));
                }
            }
            Action::FindSpans { layer } => {
                if let Some(open) = self.layers.get(&layer).cloned() {
                    self.spawn_detached(|work| asks::spans(work, open));
                }
            }
            Action::Watch { layer, place, chunk } => {
                if let Some(open) = self.layers.get(&layer) {
                    open.marks.set(place, open.layer.table().range(ChunkNo(chunk)).start);
                }
            }
            Action::Ban { peer, until } => {
                if let (Some(peer), Some(node)) = (self.peers.id(peer), self.config.peers.clone()) {
                    let duration = self.clock_time(until).saturating_duration_since(Instant::now());
                    RECORDED.banned();
                    tracing::warn!(%peer, ?duration, "a peer sent wrong bytes; it is refused for a while");
                    self.spawn_detached(|_| async move { drop(node.ban(peer, duration).await) });
                }
            }
            Action::Arm { at } => self.timer = Some(self.clock_time(at)),
        }
    }

    fn answer(&mut self, read: ReadId, answer: impl FnOnce(Delivered) -> Answer) {
        if let Some(waiting) = self.reads.remove(&read) {
            if let (Class::Demand, Some(from)) = (waiting.class, waiting.from) {
                RECORDED.waited(from, waiting.since.elapsed());
            }
            let _ = waiting.done.send(answer(waiting.delivered));
        }
    }

    fn fail(&mut self, read: ReadId, cause: FailCause) {
        let Some(layer) = self.reads.get(&read).map(|waiting| waiting.layer) else { return };
        let open = self.layers.get(&layer);
        let image = open.map_or_else(String::new, |open| open.image());
        let name = |source| self.name(source, layer);
        let failed = cause.tried.iter().map(|(source, class)| (*source, Some(*class)));
        let mut tried: Vec<_> = failed.map(|(source, failure)| Tried { name: name(source), source, failure }).collect();
        let is_open = matches!(cause.origin, OriginStanding::Ready | OriginStanding::Resting);
        if is_open && !tried.iter().any(|tried| tried.source == Source::Origin) {
            tried.push(Tried { name: name(Source::Origin), source: Source::Origin, failure: None });
        }
        self.answer(read, |_| Err(FetchError::Failed { image, layer, reason: cause.reason, tried }));
    }

    fn work(&self) -> Option<Ask> {
        let reports = self.reports.upgrade()?;
        Some(Ask { id: None, store: Arc::clone(&self.config.store), peers: self.config.peers.clone(), reports })
    }

    /// Runs `ask` as a task; whatever becomes of it, the policy hears of its end once.
    fn spawn_ask<F, R>(&mut self, ask: AskId, source: Source, layer: DiffId, run: F)
    where
        F: FnOnce(Ask, Arc<OpenLayer>) -> R,
        R: Future<Output = Outcome> + Send + 'static,
    {
        let (Some(mut work), Some(open)) = (self.work(), self.layers.get(&layer).cloned()) else { return };
        work.id = Some(ask);
        let reports = work.reports.clone();
        let running = run(work, open);
        let task = tokio::spawn(async move {
            let outcome = running.await;
            let _ = reports.send(Command::Ended { ask, outcome }).await;
        });
        self.asks.insert(ask, Asked { task: task.abort_handle(), source, layer });
    }

    fn spawn_detached<F, R>(&self, run: F)
    where
        F: FnOnce(Ask) -> R,
        R: Future<Output = ()> + Send + 'static,
    {
        if let Some(work) = self.work() {
            tokio::spawn(run(work));
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
