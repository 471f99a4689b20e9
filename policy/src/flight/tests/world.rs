//! A made-up world around one node: peers and a registry that answer late, wrongly or never, with a seed.
//!
//! It keeps its own books of what it was asked and what it gave, and checks every action against them: they are the
//! oracle, and share no code with the table.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;

use super::{geometry, layer_no};
use crate::class::{Class, ErrorClass};
use crate::event::{Action, AskId, Event, FailReason, OriginNo, Outcome, PeerNo, ReadId, Source};
use crate::flight::Flight;
use crate::geometry::LayerGeometry;
use crate::limits::Limits;
use crate::rng::Rng;
use crate::time::{Duration, Instant};

pub(super) const SPANS: u32 = 24;
pub(super) const CHUNKS: u32 = SPANS * super::SPAN_CHUNKS;
pub(super) const LAYERS: u8 = 3;
pub(super) const PEERS: u32 = 4;

/// How bad the world is: one in so many answers is bad; 0 for never.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weather {
    pub(super) bad_one_in: u32,
    /// One in so many asks is forgotten by the driver.
    pub(super) silent_one_in: u32,
}

#[derive(Debug, Clone)]
struct OpenRead {
    layer: DiffId,
    chunks: Runs,
    class: Class,
    deadline: Instant,
}

#[derive(Debug, Clone)]
struct OpenAsk {
    layer: DiffId,
    source: Source,
    /// Which registry, for asks to one.
    origin: Option<OriginNo>,
    class: Class,
    /// All that it may bring.
    brings: Runs,
}

pub(super) struct World {
    pub(super) flight: Flight,
    limits: Limits,
    pub(super) now: Instant,
    rng: Rng,
    /// The world's own dice, so that policy's use of its own changes nothing here.
    dice: Rng,
    weather: Weather,
    geometry: Arc<LayerGeometry>,
    /// What is to happen, by time and order.
    coming: BTreeMap<(Instant, u64), Event>,
    next_event: u64,
    timer: Option<Instant>,
    here: BTreeMap<DiffId, Runs>,
    reads: BTreeMap<ReadId, OpenRead>,
    asks: BTreeMap<AskId, OpenAsk>,
    /// How reads ended.
    pub(super) ended: BTreeMap<ReadId, Option<FailReason>>,
    pub(super) next_read: u64,
    /// Everything that was asked for, in order.
    pub(super) trace: Vec<(Instant, Action)>,
    /// Every fact that was told.
    pub(super) told: Vec<(Instant, Event)>,
}

impl World {
    pub(super) fn new(seed: u64, limits: Limits, weather: Weather) -> Self {
        Self {
            flight: Flight::new(limits.clone()),
            limits: limits.checked(),
            now: Instant::ZERO,
            rng: Rng::new(seed),
            dice: Rng::new(seed ^ 0xa5a5),
            weather,
            geometry: Arc::new(geometry(SPANS)),
            coming: BTreeMap::new(),
            next_event: 0,
            timer: None,
            here: BTreeMap::new(),
            reads: BTreeMap::new(),
            asks: BTreeMap::new(),
            ended: BTreeMap::new(),
            next_read: 0,
            trace: Vec::new(),
            told: Vec::new(),
        }
    }

    pub(super) fn roll(&mut self, bound: u64) -> u64 {
        self.dice.below(bound)
    }

    pub(super) fn open(&mut self, layer: DiffId, origin: Option<OriginNo>) {
        self.here.entry(layer).or_default();
        let geometry = Arc::clone(&self.geometry);
        let present = self.here.get(&layer).cloned().unwrap_or_default();
        self.tell(Event::LayerOpened { layer, geometry, present, local: Runs::new(), origin });
    }

    pub(super) fn read(&mut self, layer: DiffId, chunks: Runs, class: Class, patience: Duration) -> ReadId {
        let read = ReadId(self.next_read);
        self.next_read += 1;
        let deadline = self.now + patience;
        self.reads.insert(read, OpenRead { layer, chunks: chunks.clone(), class, deadline });
        self.tell(Event::ReadNeeds { read, layer, chunks, class, deadline });
        read
    }

    pub(super) fn cancel(&mut self, read: ReadId) {
        if self.reads.remove(&read).is_some() {
            self.ended.insert(read, None);
        }
        self.tell(Event::ReadCancelled { read });
    }

    pub(super) fn evict(&mut self, layer: DiffId, chunks: Runs) {
        if let Some(here) = self.here.get_mut(&layer) {
            here.remove_all(&chunks);
        }
        self.tell(Event::Evicted { layer, chunks });
    }

    /// Lets everything happen that is due until `end`.
    pub(super) fn run_until(&mut self, end: Instant) {
        loop {
            let event = self.coming.keys().next().map(|(at, _)| *at);
            let Some(at) = [event, self.timer].into_iter().flatten().min().filter(|at| *at <= end) else { break };
            self.now = at;
            if event == Some(at) {
                if let Some((_, event)) = self.coming.pop_first() {
                    self.tell(event);
                }
            } else {
                self.timer = None;
                self.tell(Event::TimerFired);
            }
        }
        self.now = end;
    }

    pub(super) fn tell(&mut self, event: Event) {
        self.told.push((self.now, event.clone()));
        match &event {
            Event::Arrived { layer, chunks } => {
                if let Some(here) = self.here.get_mut(layer) {
                    here.insert_all(chunks);
                }
                for ask in self.asks.values_mut().filter(|ask| ask.layer == *layer) {
                    ask.brings.remove_all(chunks);
                }
            }
            // A late answer to a cancelled ask is told all the same: policy has to bear it.
            Event::AskEnded { ask, .. } => {
                self.asks.remove(ask);
            }
            _ => {}
        }
        let mut out = Vec::new();
        self.flight.handle(self.now, event, &mut self.rng, &mut out);
        for action in out {
            self.trace.push((self.now, action.clone()));
            self.obey(action);
        }
        self.check_limits();
        for (read, open) in &self.reads {
            assert!(open.deadline > self.now, "{read:?} waits beyond its deadline");
        }
    }

    fn obey(&mut self, action: Action) {
        match action {
            Action::Watch { place, chunk, .. } => {
                let is_somewhere = place < self.limits.readahead_streams && chunk < self.geometry.chunk_count();
                assert!(is_somewhere, "a mark on nothing");
            }
            Action::Arm { at } => {
                assert!(at > self.now, "armed for the past");
                self.timer = Some(at);
            }
            Action::Deliver { read } => {
                let open = self.reads.remove(&read).expect("a read ends once");
                let here = &self.here[&open.layer];
                assert!(open.chunks.difference(here).is_empty(), "{read:?} was delivered without its chunks");
                self.ended.insert(read, None);
            }
            Action::Fail { read, cause } => {
                self.reads.remove(&read).expect("a read ends once");
                self.ended.insert(read, Some(cause.reason));
            }
            Action::AskLocal { ask, layer, chunks, class } => {
                self.asked(ask, layer, Source::Local, None, class, chunks);
            }
            Action::AskPeer { ask, peer, layer, chunks, class, .. } => {
                self.asked(ask, layer, Source::Peer(peer), None, class, chunks);
            }
            Action::AskOrigin { ask, origin, layer, spans, class, .. } => {
                assert!(!spans.is_empty() && spans.end <= SPANS);
                let mut chunks = Runs::one(self.geometry.span_chunks(&spans));
                chunks.remove_all(&self.here[&layer]);
                self.asked(ask, layer, Source::Origin, Some(origin), class, chunks);
            }
            Action::Cancel { ask } => {
                self.asks.remove(&ask).expect("only asks under way are cancelled");
            }
            Action::FindHolders { layer } => {
                let at = self.later(60);
                for peer in 0..PEERS {
                    if self.roll(3) == 0 {
                        let chunks = self.some_chunks();
                        self.schedule(at, Event::PeerHas { peer: PeerNo(peer), layer, chunks });
                    }
                }
                if self.roll(4) > 0 {
                    self.schedule(at, Event::HoldersFound { layer });
                }
            }
            Action::FindSpans { .. } => unreachable!("the spans of this world are known"),
            Action::Rule { .. } | Action::Suspect { .. } => {
                unreachable!("this world has no members")
            }
            Action::Ban { peer, .. } => {
                let at = self.later(5);
                self.schedule(at, Event::PeerDown { peer });
            }
        }
    }

    /// Books an ask, checks that nobody else was asked for its chunks, and decides how it will end.
    fn asked(
        &mut self,
        id: AskId,
        layer: DiffId,
        source: Source,
        origin: Option<OriginNo>,
        class: Class,
        chunks: Runs,
    ) {
        assert!(!chunks.is_empty(), "{id:?} asks for nothing");
        let here = &self.here[&layer];
        if source != Source::Origin {
            assert!(chunks.intersection(here).is_empty(), "{id:?} asks for what is here");
            for (other, ask) in self.asks.iter().filter(|(_, ask)| ask.layer == layer) {
                // Spans are read whole, so only what peers and copies are asked for is exact. A demand ask may
                // repeat what a prefetch ask was asked for.
                let doubled = ask.source != Source::Origin && !ask.brings.intersection(&chunks).is_empty();
                let upgrade = class == Class::Demand && ask.class == Class::Prefetch;
                assert!(!doubled || upgrade, "{id:?} repeats {other:?}");
            }
        } else {
            let useful = self.reads.values().filter(|read| read.layer == layer).any(|read| {
                let mut free = read.chunks.intersection(&chunks);
                for ask in self.asks.values().filter(|ask| ask.layer == layer) {
                    if !(class == Class::Demand && ask.class == Class::Prefetch) {
                        free.remove_all(&ask.brings);
                    }
                }
                !free.is_empty()
            });
            assert!(useful || self.limits.readahead_first_bytes > 0, "{id:?} reads spans that nobody waits for");
        }
        if class == Class::Demand {
            // An upgrade moves the lease: whatever becomes of it, the prefetch ask no longer answers for these chunks.
            for ask in self.asks.values_mut().filter(|ask| ask.layer == layer && ask.class == Class::Prefetch) {
                ask.brings.remove_all(&chunks);
            }
        }
        self.asks.insert(id, OpenAsk { layer, source, origin, class, brings: chunks.clone() });
        if self.dice.one_in(self.weather.silent_one_in) {
            return;
        }
        let mut at = self.later(40);
        if self.roll(2) == 0 {
            self.schedule(at, Event::AskProgress { ask: id });
        }
        let bad = self.dice.one_in(self.weather.bad_one_in);
        for run in chunks.iter() {
            at = at + Duration::from_micros(500);
            if bad && self.roll(2) == 0 {
                break;
            }
            self.schedule(at, Event::Arrived { layer, chunks: Runs::one(run) });
        }
        let outcome =
            if bad { self.bad_outcome(&chunks) } else { Outcome::Done { bytes: chunks.chunk_count() * 65_536 } };
        at = at + Duration::from_micros(1);
        self.schedule(at, Event::AskEnded { ask: id, outcome });
    }

    fn bad_outcome(&mut self, chunks: &Runs) -> Outcome {
        let retry_after = (self.roll(3) == 0).then_some(Duration::from_millis(self.dice.below(3000)));
        let class = match self.roll(12) {
            0 => return Outcome::Busy { retry_after: Duration::from_millis(self.roll(500)) },
            1 => return Outcome::Lacks { chunks: chunks.clone() },
            2 => return Outcome::Done { bytes: 0 },
            3 => ErrorClass::PeerFault,
            4 => ErrorClass::NotFound,
            5 => ErrorClass::Denied,
            6 => ErrorClass::Local,
            _ => ErrorClass::Transient,
        };
        Outcome::Failed { class, retry_after }
    }

    fn later(&mut self, most_ms: u64) -> Instant {
        self.now + Duration::from_micros(1 + self.dice.below(most_ms * 1000))
    }

    pub(super) fn some_chunks(&mut self) -> Runs {
        let start = self.roll(u64::from(CHUNKS)) as u32;
        let len = 1 + self.roll(20) as u32;
        Runs::one(start..(start + len).min(CHUNKS))
    }

    pub(super) fn schedule(&mut self, at: Instant, event: Event) {
        self.coming.insert((at, self.next_event), event);
        self.next_event += 1;
    }

    fn check_limits(&self) {
        let limits = &self.limits;
        let mut by_source: BTreeMap<(Source, Option<OriginNo>), (u32, u32)> = BTreeMap::new();
        for ask in self.asks.values() {
            let count = by_source.entry((ask.source, ask.origin)).or_default();
            if ask.class == Class::Demand { count.0 += 1 } else { count.1 += 1 }
        }
        for ((source, _), (demand, prefetch)) in by_source {
            let limit = match source {
                Source::Local => limits.local,
                Source::Peer(_) => limits.peer,
                Source::Origin => limits.origin,
            };
            assert!(demand + prefetch <= limit.asks, "{source:?} has {demand} and {prefetch} asks");
            assert!(prefetch <= limit.asks - limit.reserved_for_demand, "{source:?} has {prefetch} prefetch asks");
        }
        assert!(self.asks.len() <= limits.total.asks as usize);
        assert!(self.reads.len() <= limits.waiting_reads);
        let status = self.flight.status();
        assert_eq!(status.waiting_demand + status.waiting_prefetch, self.reads.len(), "reads are counted alike");
        let asks: BTreeSet<AskId> = self.asks.keys().copied().collect();
        assert_eq!(status.asks_local + status.asks_peer + status.asks_origin, asks.len(), "asks are counted alike");
    }

    /// Names of the reads that wait.
    pub(super) fn waiting(&self) -> Vec<(ReadId, Class)> {
        self.reads.iter().map(|(id, read)| (*id, read.class)).collect()
    }

    pub(super) fn any_layer(&mut self) -> DiffId {
        layer_no(self.roll(u64::from(LAYERS)) as u8)
    }
}
