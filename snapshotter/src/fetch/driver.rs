//! The task that owns the fetch policy.
//!
//! `select -> apply`: gathering is async, deciding is not. It turns commands into facts, hands them to the policy with
//! the time, and carries out what comes back. It holds no opinion of its own.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use hermes_image::ids::{ChunkNo, DiffId};
use hermes_image::runs::Runs;
use hermes_p2p::{PeerEvent, PeerId};
use hermes_policy::event::{
    Action, AskId, Event, FailCause, OriginNo, OriginStanding, Outcome, PeerNo, ReadId, Source,
};
use hermes_policy::flight::Flight;
use hermes_policy::limits::Limits;
use hermes_policy::rng::Rng;
use hermes_store::Store;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::AbortHandle;

use super::asks::{self, Ask};
use super::layer::OpenLayer;
use super::{Answer, COMMANDS_MAX, Class, Command, Delivered, FetchError, FetchHandle, Tried};
use crate::metrics::{ArrivedFrom, RECORDED};
use crate::status::WaitingRead;

/// What the driver works with.
#[derive(Debug, Clone)]
pub struct FetchConfig {
    /// Where chunks go.
    pub store: Arc<Store>,
    /// The swarm, if the node is in one.
    pub peers: Option<hermes_p2p::Node>,
    /// Bounds of the policy.
    pub limits: Limits,
    /// Seed of the policy's random choices.
    pub seed: u64,
}

/// Starts the driver on the current runtime. It ends when the last handle is dropped.
pub fn spawn(config: FetchConfig) -> FetchHandle {
    let (commands, queue) = mpsc::channel(COMMANDS_MAX);
    let (completed, completions) = watch::channel(());
    let store = Arc::clone(&config.store);
    let driver = Driver {
        flight: Flight::new(config.limits.clone()),
        rng: Rng::new(config.seed),
        started: Instant::now(),
        timer: None,
        layers: BTreeMap::new(),
        reads: BTreeMap::new(),
        asks: BTreeMap::new(),
        peers: PeerNumbers::default(),
        reports: commands.downgrade(),
        completed,
        config,
    };
    tokio::spawn(driver.run(queue));
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
    peers: PeerNumbers,
    /// Weak, so that the asks' way back does not keep the driver alive.
    reports: mpsc::WeakSender<Command>,
    completed: watch::Sender<()>,
}

/// Peers whose numbers are remembered: four times as many as may be connected, so that one that comes back soon is the
/// same to the policy. The swarm itself remembers whom it has banned.
const NUMBERED_PEERS_MAX: usize = 1024;

/// Numbers for peers, as the policy wants them; never given twice.
#[derive(Default)]
struct PeerNumbers {
    by_id: HashMap<PeerId, PeerNo>,
    /// The peer, and whether it is connected.
    by_no: BTreeMap<PeerNo, (PeerId, bool)>,
    next: u32,
}

impl PeerNumbers {
    fn number(&mut self, peer: PeerId) -> PeerNo {
        if let Some(no) = self.by_id.get(&peer) {
            return *no;
        }
        if self.by_no.len() >= NUMBERED_PEERS_MAX
            && let Some(oldest) = self.by_no.iter().find(|(_, (_, up))| !up).map(|(no, _)| *no)
            && let Some((gone, _)) = self.by_no.remove(&oldest)
        {
            self.by_id.remove(&gone);
        }
        let no = PeerNo(self.next);
        // After four thousand million peers they begin anew: the first ones are long forgotten.
        self.next = self.next.wrapping_add(1);
        self.by_id.insert(peer, no);
        self.by_no.insert(no, (peer, false));
        no
    }

    fn set_up(&mut self, peer: PeerId, up: bool) -> PeerNo {
        let no = self.number(peer);
        self.by_no.insert(no, (peer, up));
        no
    }

    fn id(&self, no: PeerNo) -> Option<PeerId> {
        self.by_no.get(&no).map(|(peer, _)| *peer)
    }
}

impl Driver {
    async fn run(mut self, mut queue: mpsc::Receiver<Command>) {
        let mut peer_events = self.config.peers.as_ref().map(hermes_p2p::Node::events);
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
            }
            Command::Need { read, layer, chunks, class, deadline, done } => {
                let (delivered, since, from) = (Delivered::default(), Instant::now(), None);
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
                self.note_source(layer, &chunks, from);
                self.arrived(layer, chunks, &overflow);
            }
            Command::Progress { ask } => self.tell(Event::AskProgress { ask }),
            Command::Ended { ask, outcome } => {
                self.asks.remove(&ask);
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
    fn note_source(&mut self, layer: DiffId, chunks: &Runs, from: Option<ArrivedFrom>) {
        let Some(from) = from else { return };
        for waiting in self.reads.values_mut().filter(|waiting| waiting.layer == layer) {
            if waiting.from != Some(ArrivedFrom::Mixed) && !waiting.chunks.intersection(chunks).is_empty() {
                let is_same = waiting.from.is_none_or(|known| known == from);
                waiting.from = Some(if is_same { from } else { ArrivedFrom::Mixed });
            }
        }
    }

    /// The reads that wait, for people.
    fn waiting(&self) -> Vec<WaitingRead> {
        let mut reads: Vec<_> = self.reads.values().collect();
        reads.sort_by_key(|waiting| waiting.since);
        let describe = |waiting: &&Waiting| {
            let open = self.layers.get(&waiting.layer)?;
            let missing = open.layer.missing(0..open.layer.table().count()).intersection(&waiting.chunks);
            let first = missing.chunks().next().or_else(|| waiting.chunks.chunks().next())?;
            let len = |run: std::ops::Range<u32>| {
                let range = open.layer.table().run_range(run);
                range.end - range.start
            };
            let asked = self.asks.values().filter(|asked| asked.layer == waiting.layer);
            let mut asking: Vec<String> = asked.map(|asked| self.name(asked.source, asked.layer)).collect();
            asking.sort();
            asking.dedup();
            Some(WaitingRead {
                image: open.image(),
                file: None,
                layer: waiting.layer,
                offset: open.layer.table().range(ChunkNo(first)).start,
                missing_bytes: missing.iter().map(len).sum(),
                demand: waiting.class == Class::Demand,
                waiting_ms: u64::try_from(waiting.since.elapsed().as_millis()).unwrap_or(u64::MAX),
                asking,
            })
        };
        reads.iter().take(super::WAITING_MAX).filter_map(describe).collect()
    }

    /// A source, for people.
    fn name(&self, source: Source, layer: DiffId) -> String {
        match source {
            Source::Local => "the local store".to_owned(),
            Source::Peer(peer) => self.peers.id(peer).map_or_else(String::new, |id| format!("peer {id}")),
            Source::Origin => {
                let origins = self.layers.get(&layer).map(|open| open.origins()).unwrap_or_default();
                format!("the registry {}", origins.first().map_or("", |origin| origin.origin.host()))
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
            Action::AskLocal { ask, layer, chunks, .. } => {
                self.spawn_ask(ask, Source::Local, layer, |work, layer| asks::local(work, layer, chunks));
            }
            Action::AskPeer { ask, peer: no, layer, chunks, class, timeout } => {
                let Some(peer) = self.peers.id(no) else { return };
                self.spawn_ask(ask, Source::Peer(no), layer, move |work, layer| {
                    asks::peer(work, layer, peer, chunks, class, timeout)
                });
            }
            Action::AskOrigin { ask, origin, layer, spans, timeout, .. } => {
                self.spawn_ask(ask, Source::Origin, layer, move |work, layer| {
                    asks::registry(work, layer, origin, spans, timeout)
                });
            }
            Action::Cancel { ask } => {
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

/// The number by which the policy knows a registry host: hosts share limits and `Retry-After`, layers do not.
#[derive(Debug, Default)]
pub struct OriginNumbers {
    hosts: BTreeMap<String, OriginNo>,
}

impl OriginNumbers {
    /// The number of `host`.
    pub fn number(&mut self, host: &str) -> OriginNo {
        let next = OriginNo(self.hosts.len() as u32);
        *self.hosts.entry(host.to_owned()).or_insert(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_numbers_are_bounded_and_never_given_twice() {
        let mut numbers = PeerNumbers::default();
        let first = PeerId::random();
        let kept = numbers.set_up(first, true);
        let mut seen = std::collections::BTreeSet::from([kept]);
        for _ in 0..NUMBERED_PEERS_MAX + 100 {
            let peer = PeerId::random();
            assert!(seen.insert(numbers.set_up(peer, true)), "a number is given twice");
            numbers.set_up(peer, false);
        }
        assert_eq!((numbers.by_id.len(), numbers.by_no.len()), (NUMBERED_PEERS_MAX, NUMBERED_PEERS_MAX));
        assert_eq!((numbers.number(first), numbers.id(kept)), (kept, Some(first)), "connected peers keep theirs");
    }
}
