//! Who reads what from the registry, and why: the way from a figure of egress to its cause.
//!
//! The world notes each request that a policy makes of the registry, with its reason, and how it ended. At the end
//! [`Ledger::excess`] names the spans that were asked for more than once, and those that hold nothing that a start reads. It
//! is a diary for people: nothing is decided by it, and the fingerprint does not know it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use hermes_image::runs::Runs;
use hermes_policy::class::Class;
use hermes_policy::event::{AskId, Outcome, Reason};
use serde::Serialize;

use crate::queue::Nanos;
use crate::shape::Shape;
use crate::units::show_nanos;

/// Most requests that are noted: what a run of 10,000 nodes makes many times over, in some MB.
const REQUESTS_MAX: usize = 1 << 16;
/// Most rows of a report.
const EXCESS_MAX: usize = 256;

/// One request to the registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Request {
    /// When the policy made it.
    pub at_ns: Nanos,
    /// Who made it.
    pub node: u32,
    /// `demand` or `prefetch`.
    pub class: &'static str,
    /// Why the registry was asked and nobody else.
    pub reason: String,
    /// When it ended; `None` when it was under way at the end of the run, or of its node.
    pub ended_ns: Option<Nanos>,
    /// How it ended.
    pub outcome: &'static str,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at_ns, node, class, reason, ended_ns, outcome } = self;
        write!(f, "node {node} at {} ({reason}, {class}): {outcome}", show_nanos(*at_ns))?;
        ended_ns.map_or(Ok(()), |ended| write!(f, " at {}", show_nanos(ended)))
    }
}

/// Neighbouring spans that the same requests asked for, and that one request or none would have done for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Excess {
    /// The layer's place in the image.
    pub layer: u16,
    /// The spans.
    pub spans: Range<u32>,
    /// Their compressed bytes.
    pub len_bytes: u64,
    /// Some start reads something of them that no node had at first.
    pub needed: bool,
    /// In the order in which they were made.
    pub requests: Vec<Request>,
}

/// All requests of a run, up to a bound.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    entries: Vec<(u16, Range<u32>, Request)>,
    under_way: BTreeMap<(u32, AskId), usize>,
}

fn because(reason: Reason) -> String {
    match reason {
        Reason::Holder => "holder".to_owned(),
        Reason::Named => "named".to_owned(),
        Reason::Owner { rank, .. } => format!("owner after {rank}"),
        Reason::Hedge => "hedge".to_owned(),
        Reason::ForOthers => "for others".to_owned(),
        Reason::Delegated => "delegated".to_owned(),
        Reason::OwnTurn { rank } => format!("own turn after {rank}"),
        Reason::NobodyOwns => "nobody owns".to_owned(),
        Reason::NoSwarm => "no swarm".to_owned(),
    }
}

impl Ledger {
    /// A policy asks the registry.
    pub(crate) fn begins(
        &mut self,
        at: Nanos,
        (node, ask): (u32, AskId),
        (layer, spans): (u16, Range<u32>),
        (class, reason): (Class, Reason),
    ) {
        if self.entries.len() >= REQUESTS_MAX {
            return;
        }
        self.under_way.insert((node, ask), self.entries.len());
        let (class, reason) = (class.kind(), because(reason));
        let request = Request { at_ns: at, node, class, reason, ended_ns: None, outcome: "under way" };
        self.entries.push((layer, spans, request));
    }

    /// An ask of a node is over; without an outcome it was called back. Asks of others than the registry are not known here.
    pub(crate) fn ends(&mut self, at: Nanos, node: u32, ask: AskId, outcome: Option<&Outcome>) {
        let entry = self.under_way.remove(&(node, ask)).and_then(|place| self.entries.get_mut(place));
        let Some((_, _, request)) = entry else { return };
        request.ended_ns = Some(at);
        request.outcome = match outcome {
            None => "called back",
            Some(Outcome::Done { .. }) => "done",
            Some(Outcome::Failed { class, .. }) => class.kind(),
            Some(Outcome::Busy { .. }) => "busy",
            Some(Outcome::Lacks { .. }) => "lacks",
            Some(Outcome::NotMine { .. }) => "not mine",
        };
    }

    /// Spans that were asked for more than once, or that nobody `needed` (chunks by layer), in their order.
    pub(crate) fn excess(&self, shape: &Shape, needed: &[Runs]) -> Vec<Excess> {
        let mut by_span: BTreeMap<(u16, u32), Vec<usize>> = BTreeMap::new();
        for (place, (layer, spans, _)) in self.entries.iter().enumerate() {
            spans.clone().for_each(|span| by_span.entry((*layer, span)).or_default().push(place));
        }
        let mut rows: Vec<(Excess, Vec<usize>)> = Vec::new();
        for ((layer, span), places) in by_span {
            let geometry = &shape.layers[usize::from(layer)].geometry;
            let chunks = geometry.span_chunks(&(span..span + 1));
            let is_needed = needed.get(usize::from(layer)).is_some_and(|needed| needed.intersects(&chunks));
            if is_needed && places.len() == 1 {
                continue;
            }
            let bytes = geometry.span_bytes(&(span..span + 1));
            let len_bytes = bytes.end - bytes.start;
            if let Some((row, same)) = rows.last_mut()
                && (row.layer, row.spans.end, row.needed) == (layer, span, is_needed)
                && *same == places
            {
                row.spans.end += 1;
                row.len_bytes += len_bytes;
                continue;
            }
            if rows.len() == EXCESS_MAX {
                break;
            }
            let requests = places.iter().map(|place| self.entries[*place].2.clone()).collect();
            rows.push((Excess { layer, spans: span..span + 1, len_bytes, needed: is_needed, requests }, places));
        }
        rows.into_iter().map(|(row, _)| row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::ImageConfig;

    #[test]
    fn what_is_asked_for_twice_or_in_vain_is_named() {
        let shape = Shape::synthetic(&ImageConfig::default(), 1).expect("an image");
        let needed = [Runs::one(shape.layers[0].geometry.span_chunks(&(0..6)))];
        let mut ledger = Ledger::default();
        let why = (Class::Demand, Reason::OwnTurn { rank: 0 });
        ledger.begins(10, (1, AskId(1)), (0, 0..4), why);
        ledger.begins(20, (2, AskId(1)), (0, 1..3), why);
        ledger.begins(30, (2, AskId(2)), (0, 9..10), why);
        ledger.ends(40, 1, AskId(1), Some(&Outcome::Done { bytes: 0 }));
        ledger.ends(50, 2, AskId(1), None);
        ledger.ends(60, 2, AskId(7), None);
        let rows = ledger.excess(&shape, &needed);
        let found: Vec<_> = rows.iter().map(|row| (row.spans.clone(), row.needed, row.requests.len())).collect();
        assert_eq!(found, [(1..3, true, 2), (9..10, false, 1)]);
        assert_eq!(rows[0].requests[0].to_string(), "node 1 at 0.010 us (own turn after 0, demand): done at 0.040 us");
        assert_eq!((rows[0].requests[1].outcome, rows[1].requests[0].outcome), ("called back", "under way"));
    }
}
