//! The registry: one link that all share, a limit of requests, and what it answers when it is not well.
//!
//! A request is answered after the registry's latency: with a body that goes over the registry's link and the node's, or with
//! 429 and a `Retry-After`, or with nothing but a refused connection. A body comes in pieces of 64 KiB; each is a sign of
//! life, and the last one of a span lets it be decoded, at the node's speed, and stored.

use hermes_image::runs::Runs;
use hermes_policy::class::{Class, ErrorClass};
use hermes_policy::event::{AskId, Event, Outcome};

use super::{Batch, From, Happening, World};
use crate::ledger::Ledger;
use crate::net::{LinkNo, Network, Purpose};
use crate::node::{OpenAsk, Target};
use crate::queue::{Nanos, SECOND};
use crate::sabotage::Sabotage;
use crate::scenario::Scenario;

/// Pieces of a body.
const PIECE_BYTES: u64 = 65_536;

/// The registry's state.
#[derive(Debug)]
pub(super) struct RegistryState {
    pub(super) link: LinkNo,
    /// Refuses connections until then.
    pub(super) down_until: Nanos,
    /// Answers 429 until then, with this `Retry-After`.
    pub(super) busy_until: Nanos,
    pub(super) busy_retry: Nanos,
    /// Requests of the current second.
    second: u64,
    asked: u32,
    /// All requests, and those that were answered with 429.
    pub(super) requests: u64,
    pub(super) refused: u64,
    /// Who asked for what.
    pub(super) ledger: Ledger,
}

impl RegistryState {
    pub(super) fn new(scenario: &Scenario, net: &mut Network) -> Self {
        Self {
            link: net.add_link(scenario.registry.bandwidth, false),
            down_until: 0,
            busy_until: 0,
            busy_retry: 0,
            second: 0,
            asked: 0,
            requests: 0,
            refused: 0,
            ledger: Ledger::default(),
        }
    }
}

impl World {
    pub(super) fn ask_registry(
        &mut self,
        no: u32,
        ask: AskId,
        layer: u16,
        spans: std::ops::Range<u32>,
        class: Class,
        timeout: Nanos,
    ) {
        let open = OpenAsk {
            target: Target::Registry,
            layer,
            class,
            left: Runs::new(),
            lacking: Runs::new(),
            batch: Runs::new(),
            sign: self.queue.now(),
            timeout,
            until: Nanos::MAX,
            bytes: 0,
            spans,
            flow: None,
        };
        self.begin_ask(no, ask, open);
        let node = &mut self.nodes[no as usize];
        let life = node.life;
        node.counts.registry_asks += 1;
        let twice = self.sabotage == Some(Sabotage::DoubleOriginFetch);
        for _ in 0..1 + u32::from(twice) {
            self.queue.after(self.scenario.registry.latency.0, Happening::Registry { node: no, life, ask });
        }
    }

    /// The registry answers a request.
    pub(super) fn registry_asked(&mut self, no: u32, ask: AskId) {
        let now = self.queue.now();
        let Some(open) = self.nodes[no as usize].asks.get(&ask) else { return };
        let (layer, spans, class) = (open.layer, open.spans.clone(), open.class);
        self.registry.requests += 1;
        self.nodes[no as usize].counts.registry_requests += 1;
        if let Some(retry_after) = self.registry_refuses(now) {
            let outcome = Outcome::Failed { class: ErrorClass::Transient, retry_after };
            return self.ask_ends(no, ask, outcome);
        }
        let node = &self.nodes[no as usize];
        let path = [self.registry.link, node.downlink];
        let purpose = Purpose { from: None, to: no, to_life: node.life, ask: ask.0 };
        let flow = self.net.open(&path, class == Class::Demand, purpose);
        let geometry = &self.shape.layers[usize::from(layer)].geometry;
        let mut at = geometry.span_bytes(&spans).start;
        for span in spans {
            let end = geometry.span_bytes(&(span..span + 1)).end;
            while at < end {
                let len = (end - at).min(PIECE_BYTES);
                at += len;
                let tag = if at == end { span + 1 } else { 0 };
                self.net.push(flow, len as u32, tag, now);
            }
        }
        self.net.go(flow, now);
        if let Some(open) = self.nodes[no as usize].asks.get_mut(&ask) {
            match open.flow {
                None => open.flow = Some(flow),
                // A second body for one ask: nobody reads it.
                Some(_) => self.net.close_when_empty(flow),
            }
        }
    }

    /// Whether the registry refuses a request now, and what it says about when to come back.
    pub(super) fn registry_refuses(&mut self, now: Nanos) -> Option<Option<std::time::Duration>> {
        let config = &self.scenario.registry;
        if now < self.registry.down_until {
            return Some(None);
        }
        let nanos = std::time::Duration::from_nanos;
        if now < self.registry.busy_until {
            self.registry.refused += 1;
            return Some(Some(nanos(self.registry.busy_retry)));
        }
        let most = config.requests_per_second?;
        if self.registry.second != now / SECOND {
            (self.registry.second, self.registry.asked) = (now / SECOND, 0);
        }
        self.registry.asked += 1;
        if self.registry.asked > most {
            self.registry.refused += 1;
            return Some(Some(nanos(config.retry_after.0)));
        }
        None
    }

    /// A piece of a body has come.
    pub(super) fn piece_came(&mut self, no: u32, ask: AskId, span: u32, len_bytes: u32) {
        let now = self.queue.now();
        let node = &mut self.nodes[no as usize];
        let Some(open) = node.asks.get_mut(&ask) else { return };
        (open.sign, open.bytes) = (now, open.bytes + u64::from(len_bytes));
        let (layer, last) = (open.layer, open.spans.end);
        self.tell(no, Event::AskProgress { ask });
        let Some(span) = span.checked_sub(1) else { return };
        let chunks = Runs::one(self.shape.layers[usize::from(layer)].geometry.span_chunks(&(span..span + 1)));
        let takes = self.scenario.cluster.decode.time(self.len_bytes(layer, &chunks));
        let node = &mut self.nodes[no as usize];
        node.decode_free = node.decode_free.max(now) + takes;
        let wait = node.decode_free - now;
        let ends = (span + 1 == last).then_some(Outcome::Done { bytes: 0 });
        if ends.is_some()
            && let Some(open) = node.asks.get_mut(&ask)
            && let Some(flow) = open.flow.take()
            && self.net.is_open(flow)
        {
            // All of it is here; decoding takes its time.
            self.net.close(flow);
            open.sign = now + wait;
        }
        self.store(no, Batch { ask, layer, chunks, from: From::Registry, ends }, wait);
    }

    /// All bodies on their way break off.
    pub(super) fn cut_registry(&mut self) {
        self.cut_transfers();
        for no in 0..self.nodes.len() as u32 {
            let asks = self.nodes[no as usize].asks.iter();
            let cut: Vec<AskId> = asks.filter(|(_, ask)| ask.flow.is_some()).map(|(id, _)| *id).collect();
            for ask in cut {
                self.ask_ends(no, ask, Outcome::Failed { class: ErrorClass::Transient, retry_after: None });
            }
        }
    }

    /// Compressed bytes that have to leave the registry once: the spans of what starts read and no node has at first.
    pub(crate) fn needed_bytes(&self) -> u64 {
        let layers = self.checkers.needed().iter().enumerate();
        layers.map(|(layer, chunks)| self.shape.compressed_bytes(layer, chunks)).sum()
    }
}
