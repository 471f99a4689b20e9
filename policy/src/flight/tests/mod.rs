//! A node without a driver: facts go in by hand, requests are looked at.

mod cluster;
mod owners;
mod random;
mod reasons;
mod rules;
mod shapes;
mod world;

use std::sync::Arc;

use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;

use super::Flight;
use crate::class::{Class, ErrorClass};
use crate::event::{Action, AskId, Event, FailCause, FailReason, OriginNo, Outcome, PeerNo, ReadId};
use crate::geometry::{LayerGeometry, Span};
use crate::limits::Limits;
use crate::rng::Rng;
use crate::time::{Duration, Instant};

pub(super) const CHUNK: u64 = 65_536;
/// Chunks in each span of a test layer.
pub(super) const SPAN_CHUNKS: u32 = 4;
/// Compressed bytes of each span of a test layer.
pub(super) const SPAN_BYTES: u64 = 100_000;

pub(super) fn layer_no(no: u8) -> DiffId {
    DiffId([no; 32])
}

pub(super) const LAYER: DiffId = DiffId([1; 32]);
pub(super) const A: PeerNo = PeerNo(1);
pub(super) const B: PeerNo = PeerNo(2);

pub(super) fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// A layer of whole spans.
pub(super) fn geometry(spans: u32) -> LayerGeometry {
    let table = (0..spans)
        .map(|no| Span {
            first_chunk: no * SPAN_CHUNKS,
            blob_start: u64::from(no) * SPAN_BYTES,
            blob_end: u64::from(no + 1) * SPAN_BYTES,
        })
        .collect();
    LayerGeometry::new(vec![CHUNK; (spans * SPAN_CHUNKS) as usize])
        .and_then(|layer| layer.with_spans(table))
        .expect("a valid layer")
}

pub(super) fn no_guessing() -> Limits {
    Limits {
        readahead_first_bytes: 0,
        origin_near_bytes: 0,
        explore_demand_one_in: 0,
        explore_prefetch_one_in: 0,
        hedge_percent: 0,
        ..Limits::default()
    }
}

/// A node whose driver is the test.
pub(super) struct Node {
    pub(super) flight: Flight,
    pub(super) now: Instant,
    rng: Rng,
    armed: Option<Instant>,
    next_read: u64,
}

impl Node {
    pub(super) fn new(limits: Limits) -> Self {
        Self { flight: Flight::new(limits), now: Instant(1_000_000_000), rng: Rng::new(42), armed: None, next_read: 0 }
    }

    /// A node with one open layer of 100 spans with an origin.
    pub(super) fn with_layer() -> Self {
        let mut node = Self::new(no_guessing());
        node.open(LAYER, geometry(100), Some(OriginNo(0)));
        node
    }

    pub(super) fn tell(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        self.flight.handle(self.now, event, &mut self.rng, &mut out);
        for action in &out {
            if let Action::Arm { at } = action {
                assert!(*at > self.now, "armed for the past");
                self.armed = Some(*at);
            }
        }
        out.retain(|action| !matches!(action, Action::Arm { .. }));
        out
    }

    /// Lets time pass, with the timer. Gives all that happened.
    pub(super) fn wait(&mut self, duration: Duration) -> Vec<Action> {
        let end = self.now + duration;
        let mut happened = Vec::new();
        while let Some(at) = self.armed.filter(|at| *at <= end) {
            self.now = at;
            self.armed = None;
            happened.extend(self.tell(Event::TimerFired));
        }
        self.now = end;
        happened
    }

    pub(super) fn open(&mut self, layer: DiffId, geometry: LayerGeometry, origin: Option<OriginNo>) {
        let geometry = Arc::new(geometry);
        let opened = Event::LayerOpened { layer, geometry, present: Runs::new(), local: Runs::new(), origin };
        assert_eq!(self.tell(opened), []);
    }

    /// A connected peer that has chunks of the layer.
    pub(super) fn holder(&mut self, peer: PeerNo, chunks: std::ops::Range<u32>) -> Vec<Action> {
        let mut actions = self.tell(Event::PeerUp { peer });
        actions.extend(self.tell(Event::PeerHas { peer, layer: LAYER, chunks: Runs::one(chunks) }));
        actions
    }

    pub(super) fn read(&mut self, class: Class, chunks: std::ops::Range<u32>) -> (ReadId, Vec<Action>) {
        self.read_of(LAYER, class, Runs::one(chunks), Duration::from_secs(60))
    }

    pub(super) fn demand(&mut self, chunks: std::ops::Range<u32>) -> Vec<Action> {
        self.read(Class::Demand, chunks).1
    }

    pub(super) fn prefetch(&mut self, chunks: std::ops::Range<u32>) -> Vec<Action> {
        self.read(Class::Prefetch, chunks).1
    }

    pub(super) fn read_of(
        &mut self,
        layer: DiffId,
        class: Class,
        chunks: Runs,
        patience: Duration,
    ) -> (ReadId, Vec<Action>) {
        let read = ReadId(self.next_read);
        self.next_read += 1;
        let deadline = self.now + patience;
        (read, self.tell(Event::ReadNeeds { read, layer, chunks, class, deadline }))
    }

    pub(super) fn arrived(&mut self, chunks: std::ops::Range<u32>) -> Vec<Action> {
        self.tell(Event::Arrived { layer: LAYER, chunks: Runs::one(chunks) })
    }

    pub(super) fn ended(&mut self, ask: AskId, outcome: Outcome) -> Vec<Action> {
        self.tell(Event::AskEnded { ask, outcome })
    }

    pub(super) fn failed(&mut self, ask: AskId, class: ErrorClass) -> Vec<Action> {
        self.ended(ask, Outcome::Failed { class, retry_after: None })
    }
}

/// The asks among `actions`: name, source in words, chunks or spans.
pub(super) fn asks(actions: &[Action]) -> Vec<(AskId, String)> {
    let runs = |chunks: &Runs| chunks.iter().map(|run| format!(" {}..{}", run.start, run.end)).collect::<String>();
    actions
        .iter()
        .filter_map(|action| match action {
            Action::AskLocal { ask, chunks, .. } => Some((*ask, format!("local{}", runs(chunks)))),
            Action::AskPeer { ask, peer, chunks, .. } => Some((*ask, format!("peer {}{}", peer.0, runs(chunks)))),
            Action::AskOrigin { ask, spans, .. } => Some((*ask, format!("spans {}..{}", spans.start, spans.end))),
            _ => None,
        })
        .collect()
}

/// The asks among `actions`, in words.
pub(super) fn words(actions: &[Action]) -> Vec<String> {
    asks(actions).into_iter().map(|(_, words)| words).collect()
}

/// The only ask among `actions`.
pub(super) fn the_ask(actions: &[Action]) -> AskId {
    match asks(actions).as_slice() {
        [(ask, _)] => *ask,
        other => panic!("one ask expected, not {other:?}"),
    }
}

/// Why reads failed.
pub(super) fn failures(actions: &[Action]) -> Vec<(ReadId, FailReason)> {
    causes(actions).into_iter().map(|(read, cause)| (read, cause.reason)).collect()
}

pub(super) fn causes(actions: &[Action]) -> Vec<(ReadId, FailCause)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Fail { read, cause } => Some((*read, cause.clone())),
            _ => None,
        })
        .collect()
}

pub(super) fn delivered(actions: &[Action]) -> Vec<ReadId> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Deliver { read } => Some(*read),
            _ => None,
        })
        .collect()
}

pub(super) fn cancelled(actions: &[Action]) -> Vec<AskId> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Cancel { ask } => Some(*ask),
            _ => None,
        })
        .collect()
}
