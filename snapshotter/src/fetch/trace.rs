//! Who was asked for what, when, why, and what came of it.
//!
//! The driver notes every ask when it is sent, when it shows a sign of life, when bytes come, and when it ends. An ask that
//! ended goes into a ring of its layer, where the oldest make room; all rings together are bounded as well. Nothing here
//! outlives the daemon, and a layer's ring goes when the layer is closed. Nothing decides by it.
//!
//! **Memory**: a record has at most [`RECORD_LEN_MAX_BYTES`], so a layer's ring takes 768 KiB at most and all of them 12 MiB.
//! Asks under way are bounded by the policy.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;
use hermes_p2p::PeerId;
use hermes_policy::class::Class;
use hermes_policy::event::{AskId, Outcome, Reason};
use hermes_policy::members::Duty;

use crate::metrics::{Again, ArrivedFrom, RECORDED, Referrals};
use crate::status::{AskOutcome, AskReason, ImageTrace, SourceKind, TraceSource, TracedAsk};

/// Asks that ended and are remembered of one layer: 8 GB in asks of 2 MiB.
const LAYER_ASKS_MAX: usize = 4096;
/// Asks that ended and are remembered of all layers.
const ASKS_MAX: usize = 65_536;
/// Asks in one answer: as JSON they take less than half of the longest line.
const ANSWER_ASKS_MAX: usize = 8192;
/// Longest record.
const RECORD_LEN_MAX_BYTES: usize = 192;
/// Peers whose bytes are counted; when there are more, all counts begin anew.
const COUNTED_PEERS_MAX: usize = 4096;

const _: () = assert!(size_of::<Record>() <= RECORD_LEN_MAX_BYTES, "a record of the trace has grown");

/// Who is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// Another layer on this node.
    Local,
    /// A peer.
    Peer(PeerId),
    /// The registry with this host.
    Registry(Arc<str>),
}

/// What is known of an ask when it is sent.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    pub(super) layer: DiffId,
    pub(super) source: Asked,
    pub(super) class: Class,
    /// Why this source; `None` for a local copy, which is always the first choice.
    pub(super) reason: Option<Reason>,
    pub(super) chunks: Runs,
    /// Uncompressed bytes of the chunks.
    pub(super) asked_bytes: u64,
}

/// Bytes that an ask brought.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Brought {
    /// The ask.
    pub(super) ask: Option<AskId>,
    /// From which kind of source.
    pub(super) from: ArrivedFrom,
    /// Uncompressed bytes.
    pub(super) bytes: u64,
    /// Of these, bytes of chunks that were here already.
    pub(super) again_bytes: u64,
}

/// One ask.
#[derive(Debug, Clone)]
struct Record {
    source: Asked,
    class: Class,
    reason: AskReason,
    rank: Option<u16>,
    referrals: u8,
    outcome: AskOutcome,
    chunks: u32,
    asked_bytes: u64,
    bytes: u64,
    /// Microseconds since the tracer began.
    sent_us: u64,
    first_us: Option<u64>,
    ended_us: Option<u64>,
}

/// An ask under way.
#[derive(Debug)]
struct Running {
    layer: DiffId,
    record: Record,
    chunks: Runs,
    is_hedge: bool,
    /// Why some of its chunks may come twice.
    twice: Option<Again>,
    referred: bool,
    delegated: bool,
}

#[derive(Debug, Default)]
struct Ring {
    ended: VecDeque<Record>,
    forgotten: u64,
    /// Chunks that peers named others for at least once, twice, three times, and that have not come.
    referred: [Runs; 3],
}

/// The record of a node's asks.
#[derive(Debug)]
pub(super) struct Tracer {
    started: Instant,
    running: BTreeMap<AskId, Running>,
    rings: BTreeMap<DiffId, Ring>,
    /// Records in all rings.
    count: usize,
    from_peers: HashMap<PeerId, u64>,
}

fn reason_of(reason: Option<Reason>) -> (AskReason, Option<u16>) {
    let ranked = |rank: usize| Some(u16::try_from(rank).unwrap_or(u16::MAX));
    match reason {
        None => (AskReason::LocalCopy, None),
        Some(Reason::Holder) => (AskReason::Holder, None),
        Some(Reason::Named) => (AskReason::Named, None),
        Some(Reason::Owner { duty: Duty::Zone, rank }) => (AskReason::ZoneOwner, ranked(rank)),
        Some(Reason::Owner { duty: Duty::Cluster, rank }) => (AskReason::Owner, ranked(rank)),
        Some(Reason::Hedge) => (AskReason::Hedge, None),
        Some(Reason::ForOthers) => (AskReason::ForOthers, None),
        Some(Reason::Delegated) => (AskReason::Delegated, None),
        Some(Reason::OwnTurn { rank }) => (AskReason::OwnTurn, ranked(rank)),
        Some(Reason::NobodyOwns) => (AskReason::NobodyOwns, None),
        Some(Reason::NoSwarm) => (AskReason::NoSwarm, None),
    }
}

impl Tracer {
    /// Nothing yet; times count from `started`.
    pub(super) fn new(started: Instant) -> Self {
        Self { started, running: BTreeMap::new(), rings: BTreeMap::new(), count: 0, from_peers: HashMap::new() }
    }

    fn micros(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_micros()).unwrap_or(u64::MAX)
    }

    /// An ask is sent.
    pub(super) fn sent(&mut self, ask: AskId, sent: Sent, now: Instant) {
        let Sent { layer, source, class, reason, chunks, asked_bytes } = sent;
        let is_hedge = reason == Some(Reason::Hedge);
        let mut twice = None;
        for other in self.running.values_mut().filter(|other| other.layer == layer) {
            if !other.chunks.intersection(&chunks).is_empty() {
                let why = if is_hedge || other.is_hedge { Again::Hedge } else { Again::Overtaken };
                (other.twice, twice) = (Some(why), Some(why));
            }
        }
        let ring = self.rings.entry(layer).or_default();
        let referrals = ring.referred.iter().take_while(|runs| !runs.intersection(&chunks).is_empty()).count();
        if matches!(source, Asked::Peer(_)) {
            RECORDED.peer_asked(Referrals::of(referrals));
        }
        let (reason, rank) = reason_of(reason);
        let record = Record {
            source,
            class,
            reason,
            rank,
            referrals: referrals as u8,
            outcome: AskOutcome::UnderWay,
            chunks: u32::try_from(chunks.chunk_count()).unwrap_or(u32::MAX),
            asked_bytes,
            bytes: 0,
            sent_us: self.micros(now),
            first_us: None,
            ended_us: None,
        };
        let running = Running { layer, record, chunks, is_hedge, twice, referred: false, delegated: false };
        self.running.insert(ask, running);
    }

    /// An ask shows a sign of life.
    pub(super) fn sign(&mut self, ask: AskId, now: Instant) {
        let at = self.micros(now);
        if let Some(running) = self.running.get_mut(&ask) {
            running.record.first_us.get_or_insert(at);
        }
    }

    /// Chunks came.
    pub(super) fn arrived(&mut self, layer: DiffId, chunks: &Runs, brought: &Brought, now: Instant) {
        for runs in self.rings.get_mut(&layer).into_iter().flat_map(|ring| &mut ring.referred) {
            runs.remove_all(chunks);
        }
        let Some(ask) = brought.ask else { return };
        self.sign(ask, now);
        let running = self.running.get_mut(&ask);
        if brought.again_bytes > 0 {
            let other = if brought.from == ArrivedFrom::Registry { Again::Overread } else { Again::Other };
            let why = running.as_ref().map_or(Again::Late, |running| running.twice.unwrap_or(other));
            RECORDED.arrived_again(why, brought.again_bytes);
        }
        let Some(running) = running else { return };
        running.record.bytes += brought.bytes;
        if let Asked::Peer(peer) = running.record.source {
            if self.from_peers.len() >= COUNTED_PEERS_MAX && !self.from_peers.contains_key(&peer) {
                self.from_peers.clear();
            }
            *self.from_peers.entry(peer).or_default() += brought.bytes;
        }
    }

    /// The peer names others for chunks.
    pub(super) fn referred(&mut self, ask: AskId, chunks: &Runs, now: Instant) {
        self.sign(ask, now);
        let Some(running) = self.running.get_mut(&ask) else { return };
        running.referred = true;
        let ring = self.rings.entry(running.layer).or_default();
        let mut named = chunks.intersection(&running.chunks);
        for runs in &mut ring.referred {
            let before = named.intersection(runs);
            runs.insert_all(&named);
            named = before;
        }
    }

    /// The peer leaves chunks to this node.
    pub(super) fn delegated(&mut self, ask: AskId, now: Instant) {
        self.sign(ask, now);
        if let Some(running) = self.running.get_mut(&ask) {
            running.delegated = true;
        }
    }

    /// An ask is over; `None` when it was cancelled.
    pub(super) fn ended(&mut self, ask: AskId, outcome: Option<&Outcome>, now: Instant) {
        let at = self.micros(now);
        let Some(running) = self.running.remove(&ask) else { return };
        let Running { layer, mut record, referred, delegated, .. } = running;
        let brought_nothing = record.bytes == 0;
        record.ended_us = Some(at);
        record.outcome = match outcome {
            None => AskOutcome::Cancelled,
            Some(Outcome::Done { .. } | Outcome::Lacks { .. }) if brought_nothing && delegated => AskOutcome::Delegated,
            Some(Outcome::Done { .. } | Outcome::Lacks { .. }) if brought_nothing && referred => AskOutcome::Referred,
            Some(Outcome::Done { .. }) => AskOutcome::Done,
            Some(Outcome::Lacks { .. }) => AskOutcome::Lacks,
            Some(Outcome::Busy { .. }) => AskOutcome::Busy,
            Some(Outcome::NotMine { .. }) => AskOutcome::NotMine,
            Some(Outcome::Failed { class, .. }) => AskOutcome::of_failure(*class),
        };
        let Some(ring) = self.rings.get_mut(&layer) else { return };
        ring.ended.push_back(record);
        self.count += 1;
        if ring.ended.len() > LAYER_ASKS_MAX {
            self.forget_oldest(layer);
        } else if self.count > ASKS_MAX
            && let Some(longest) = self.rings.iter().max_by_key(|(_, ring)| ring.ended.len()).map(|(layer, _)| *layer)
        {
            self.forget_oldest(longest);
        }
    }

    fn forget_oldest(&mut self, layer: DiffId) {
        let Some(ring) = self.rings.get_mut(&layer) else { return };
        if ring.ended.pop_front().is_some() {
            ring.forgotten += 1;
            self.count -= 1;
        }
    }

    /// The layer is closed.
    pub(super) fn closed(&mut self, layer: DiffId) {
        self.running.retain(|_, running| running.layer != layer);
        if let Some(ring) = self.rings.remove(&layer) {
            self.count -= ring.ended.len();
        }
    }

    /// Uncompressed bytes that came from `peer`.
    pub(super) fn bytes_from(&self, peer: &PeerId) -> u64 {
        self.from_peers.get(peer).copied().unwrap_or(0)
    }

    /// What happened to `layers`, by the time at which it was sent; the latest, where there is too much.
    pub(super) fn of(&self, layers: Vec<DiffId>, now: Instant) -> ImageTrace {
        let mut found: Vec<(u32, &Record)> = Vec::new();
        let mut left_out = 0;
        for (place, layer) in (0_u32..).zip(&layers) {
            if let Some(ring) = self.rings.get(layer) {
                left_out += ring.forgotten;
                found.extend(ring.ended.iter().map(|record| (place, record)));
            }
            let running = self.running.values().filter(|running| running.layer == *layer);
            found.extend(running.map(|running| (place, &running.record)));
        }
        found.sort_by_key(|(place, record)| (record.sent_us, *place));
        let too_many = found.len().saturating_sub(ANSWER_ASKS_MAX);
        let found = found.split_off(too_many);
        let zero = found.first().map_or(0, |(_, record)| record.sent_us);
        let mut sources: Vec<&Asked> = Vec::new();
        let mut asks = Vec::with_capacity(found.len());
        for (layer, record) in found {
            let source = sources.iter().position(|source| **source == record.source).unwrap_or_else(|| {
                sources.push(&record.source);
                sources.len() - 1
            });
            asks.push(TracedAsk {
                layer,
                source: source as u32,
                demand: record.class == Class::Demand,
                reason: record.reason,
                rank: record.rank,
                referrals: record.referrals,
                sent_us: record.sent_us - zero,
                first_us: record.first_us.map(|at| at.saturating_sub(zero)),
                ended_us: record.ended_us.map(|at| at.saturating_sub(zero)),
                chunks: record.chunks,
                asked_bytes: record.asked_bytes,
                bytes: record.bytes,
                outcome: record.outcome,
            });
        }
        let sources = sources.into_iter().map(|source| match source {
            Asked::Local => TraceSource { kind: SourceKind::Local, name: String::new(), zone: String::new() },
            Asked::Peer(peer) => TraceSource { kind: SourceKind::Peer, name: peer.to_string(), zone: String::new() },
            Asked::Registry(host) => {
                TraceSource { kind: SourceKind::Registry, name: host.to_string(), zone: String::new() }
            }
        });
        ImageTrace {
            image: String::new(),
            now_us: self.micros(now).saturating_sub(zero),
            sources: sources.collect(),
            layers,
            asks,
            left_out: left_out + too_many as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hermes_policy::class::ErrorClass;

    use super::*;

    fn layer(number: u8) -> DiffId {
        DiffId([number; 32])
    }

    fn to(source: Asked, reason: Reason, chunks: std::ops::Range<u32>) -> Sent {
        let chunks = Runs::one(chunks);
        let asked_bytes = chunks.chunk_count() * 10;
        Sent { layer: layer(1), source, class: Class::Demand, reason: Some(reason), chunks, asked_bytes }
    }

    fn brought(ask: u64, bytes: u64) -> Brought {
        Brought { ask: Some(AskId(ask)), from: ArrivedFrom::Peer, bytes, again_bytes: 0 }
    }

    #[test]
    fn an_ask_is_told_from_its_first_word_to_its_last() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut tracer = Tracer::new(start);
        let (owner, named) = (PeerId::random(), PeerId::random());
        let asked = Reason::Owner { duty: Duty::Cluster, rank: 1 };
        tracer.sent(AskId(0), to(Asked::Peer(owner), asked, 0..4), at(5));
        tracer.referred(AskId(0), &Runs::one(0..4), at(7));
        tracer.ended(AskId(0), Some(&Outcome::Done { bytes: 0 }), at(8));
        tracer.sent(AskId(1), to(Asked::Peer(named), Reason::Named, 0..4), at(8));
        tracer.arrived(layer(1), &Runs::one(0..4), &brought(1, 40), at(10));
        tracer.ended(AskId(1), Some(&Outcome::Done { bytes: 40 }), at(11));
        let host: Arc<str> = "registry.example".into();
        tracer.sent(AskId(2), to(Asked::Registry(host), Reason::OwnTurn { rank: 0 }, 4..6), at(12));
        let trace = tracer.of(vec![layer(2), layer(1)], at(20));
        assert_eq!((trace.asks.len(), trace.left_out, trace.now_us), (3, 0, 15_000));
        let [first, second, third] = trace.asks.as_slice() else { panic!("{trace:?}") };
        assert_eq!((first.reason, first.rank, first.outcome), (AskReason::Owner, Some(1), AskOutcome::Referred));
        assert_eq!((first.sent_us, first.first_us, first.ended_us), (0, Some(2000), Some(3000)));
        assert_eq!((second.reason, second.referrals, second.bytes), (AskReason::Named, 1, 40));
        assert_eq!((third.outcome, third.ended_us, third.referrals), (AskOutcome::UnderWay, None, 0));
        assert_eq!(trace.sources[third.source as usize].name, "registry.example");
        assert_eq!((tracer.bytes_from(&named), tracer.bytes_from(&owner)), (40, 0));
    }

    #[test]
    fn rings_are_bounded_and_go_with_their_layers() {
        let start = Instant::now();
        let mut tracer = Tracer::new(start);
        let failed = Outcome::Failed { class: ErrorClass::Transient, retry_after: None };
        for ask in 0..LAYER_ASKS_MAX as u64 + 10 {
            tracer.sent(AskId(ask), to(Asked::Local, Reason::Holder, 0..1), start + Duration::from_micros(ask));
            tracer.ended(AskId(ask), Some(&failed), start + Duration::from_micros(ask));
        }
        let trace = tracer.of(vec![layer(1)], start);
        assert_eq!((trace.asks.len(), trace.left_out), (LAYER_ASKS_MAX, 10), "the oldest went");
        assert!(trace.asks.iter().all(|ask| ask.outcome == AskOutcome::FailedTransient));
        tracer.sent(AskId(u64::MAX), to(Asked::Local, Reason::Holder, 0..1), start);
        tracer.closed(layer(1));
        assert_eq!((tracer.count, tracer.running.len(), tracer.rings.len()), (0, 0, 0));
        let mut number = 0;
        for name in 0..=(ASKS_MAX / LAYER_ASKS_MAX) as u8 {
            for _ in 0..LAYER_ASKS_MAX {
                let sent = Sent { layer: layer(name), ..to(Asked::Local, Reason::Holder, 0..1) };
                tracer.sent(AskId(number), sent, start);
                tracer.ended(AskId(number), None, start);
                number += 1;
            }
        }
        assert_eq!(tracer.count, ASKS_MAX);
        assert_eq!(tracer.rings.values().map(|ring| ring.ended.len()).sum::<usize>(), ASKS_MAX);
    }
}
