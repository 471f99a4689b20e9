//! What must hold in every run, whatever goes wrong.
//!
//! | kind | what must hold | looked at |
//! |---|---|---|
//! | `verified` | a read gets chunks that are stored and were right | at each delivery |
//! | `egress` | the registry sends no more than the bound | at the end |
//! | `single flight` | one request to the registry for each ask; the policy's asks are the driver's asks | 100 ms, end |
//! | `failed` | no read fails, unless the scenario says that some may | at once |
//! | `starved` | no demand read waits longer than the bound | at once, and 100 ms for those that still wait |
//! | `timer` | the policy's timer comes | 100 ms |
//! | `limits` | reads, asks, claims, transfers, partners and messages are within their bounds | 100 ms, each word |
//! | `upload` | no link is quicker than its rate | end |
//! | `conservation` | bytes pushed into links came out, were dropped, or are there | 100 ms |
//! | `ban` | nobody listens to a banned peer, nor takes more than three wrong chunks of one | each word, 100 ms |
//! | `liveness` | after the last start and fault, all are ready in time | at the end |
//!
//! The checkers know ground truth that no node knows, such as which copies are wrong, and they look at what the policy says
//! and is told rather than at how the driver works. The first violation ends the run.

use std::collections::BTreeSet;

use hermes_image::runs::Runs;
use hermes_policy::limits::Limits;

use crate::net::{LinkNo, Network};
use crate::node::Node;
use crate::queue::{MILLISECOND, Nanos, SECOND};
use crate::scenario::Scenario;
use crate::units::{Share, show_bytes, show_nanos};
use crate::world::{TIMER_SLACK, Word, World, serve};

/// Wrong chunks that a node may take of one peer before it is banned: those that were on their way.
const WRONG_MAX: u32 = 3;
/// Runs in one message (`GET_CHUNKS_MAX` and `MAP_RUNS_MAX` in `p2p/exchange/codec.rs`).
const GET_RUNS_MAX: usize = 1024;
const MAP_RUNS_MAX: usize = 16 * 1024;
const REFER_PEERS_MAX: usize = 4;
/// Registry bytes beyond the bound's share: in a small image one span read twice is a large share.
const EGRESS_GRACE_BYTES: u64 = 1 << 20;
/// A read that fails by its deadline is told by the timer.
const DEADLINE_GRACE: Nanos = 500 * MILLISECOND;

/// What did not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which checker: the names of the table above.
    pub kind: &'static str,
    /// When, in virtual time.
    pub at: Nanos,
    /// What happened.
    pub what: String,
}

/// The checkers of one run.
#[derive(Debug)]
pub(crate) struct Checkers {
    limits: Limits,
    demand_wait: Nanos,
    registry: Share,
    first: Option<Violation>,
    /// What all starts read and had not, by layer.
    needed: Vec<Runs>,
    /// Copies that are wrong: node, layer, chunk. Empty unless something is broken.
    wrong: BTreeSet<(u32, u16, u32)>,
    failed: u64,
    seed: u64,
}

type Found = Option<(&'static str, String)>;

impl Checkers {
    pub(crate) fn new(scenario: &Scenario, seed: u64) -> Self {
        Self {
            limits: Limits::default(),
            demand_wait: scenario.expect.demand_wait.0,
            registry: scenario.expect.registry,
            first: None,
            needed: Vec::new(),
            wrong: BTreeSet::new(),
            failed: 0,
            seed,
        }
    }

    pub(crate) fn report(&mut self, violation: Violation) {
        self.first.get_or_insert(violation);
    }

    pub(crate) fn violation(&self) -> Option<&Violation> {
        self.first.as_ref()
    }

    /// The seed of the run, for its report.
    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn needs(&mut self, layer: usize, chunks: &Runs) {
        if self.needed.len() <= layer {
            self.needed.resize(layer + 1, Runs::new());
        }
        self.needed[layer].insert_all(chunks);
    }

    pub(crate) fn needed(&self) -> &[Runs] {
        &self.needed
    }

    pub(crate) fn read_failed(&mut self) {
        self.failed += 1;
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failed
    }

    pub(crate) fn stored_wrong(&mut self, no: u32, layer: u16, chunk: u32) {
        self.wrong.insert((no, layer, chunk));
    }

    pub(crate) fn check_delivery(&self, no: u32, layer: u16, chunks: &Runs) -> Option<String> {
        if self.wrong.is_empty() {
            return None;
        }
        let wrong = chunks.chunks().find(|chunk| self.wrong.contains(&(no, layer, *chunk)))?;
        Some(format!("node {no}: a read gets chunk {wrong} of layer {layer} with wrong bytes"))
    }

    /// Whether a message is within its bounds.
    pub(crate) fn check_word(&self, word: &Word) -> Option<String> {
        let (name, runs, most) = match word {
            Word::Get { chunks, .. } => ("GET", chunks, GET_RUNS_MAX),
            Word::Refer { peers, .. } if peers.len() > REFER_PEERS_MAX => {
                return Some(format!("REFER with {} peers", peers.len()));
            }
            Word::Lacks { chunks, .. } | Word::Refer { chunks, .. } | Word::Delegate { chunks, .. } => {
                ("an answer", chunks, GET_RUNS_MAX)
            }
            Word::HaveMap { chunks, .. } | Word::More { chunks, .. } => ("a have-map", chunks, MAP_RUNS_MAX),
            _ => return None,
        };
        (runs.run_count() > most).then(|| format!("{name} with {} runs", runs.run_count()))
    }

    /// Compares the books of one node.
    pub(crate) fn check_node(&self, no: usize, node: &Node, now: Nanos) -> Found {
        if !node.up || node.paused_until.saturating_add(TIMER_SLACK) > now {
            return None;
        }
        let status = node.flight.status();
        let asks = World::asks_by_source(node);
        let policy = [status.asks_local, status.asks_peer, status.asks_origin];
        if asks != policy {
            let what = format!(
                "node {no}: the policy waits for {policy:?} asks (local, peer, registry), of which the driver has {asks:?}"
            );
            return Some(("single flight", what));
        }
        if let Some(armed) = node.armed.map(|at| node.world_time(at)).filter(|at| at.saturating_add(TIMER_SLACK) < now)
        {
            return Some(("timer", format!("node {no}: the timer of {} has not come", show_nanos(armed))));
        }
        if let Some((peer, count)) = node.counts.wrong.iter().find(|(_, count)| **count > WRONG_MAX) {
            return Some(("ban", format!("node {no} took {count} wrong chunks of node {peer}")));
        }
        let longest = self.demand_wait.saturating_add(DEADLINE_GRACE);
        let demand = node.start.as_ref().into_iter().flat_map(|start| start.at.keys());
        let late =
            demand.filter_map(|id| node.reads.get(id)).find(|waiting| now.saturating_sub(waiting.since) > longest);
        if let Some(late) = late {
            let (chunks, waits) = (&late.chunks, show_nanos(now - late.since));
            return Some((
                "starved",
                format!("node {no}: {chunks:?} of layer {} has not come for {waits}", late.layer),
            ));
        }
        self.check_limits(no, node, &status)
    }

    fn check_limits(&self, no: usize, node: &Node, status: &hermes_policy::event::Status) -> Found {
        let limits = &self.limits;
        let watchers: usize = node.layers.iter().map(|layer| layer.watchers.len()).sum();
        let transfers = (node.gate.demand + node.gate.prefetch) as usize;
        let asks: usize = status.asks_local + status.asks_peer + status.asks_origin;
        let bounds = [
            ("reads", status.waiting_demand + status.waiting_prefetch, limits.waiting_reads),
            ("prefetch reads", status.waiting_prefetch, limits.waiting_prefetch_reads),
            ("asks", asks, limits.total.asks as usize),
            ("asks of the registry", status.asks_origin, limits.origin.asks as usize),
            ("claims in the policy", status.claims, limits.claims),
            ("claims", node.gate.claims as usize, serve::CLAIMS_MAX as usize),
            ("transfers", transfers, serve::TRANSFERS_MAX as usize),
            ("prefetch transfers", node.gate.prefetch as usize, serve::PREFETCH_TRANSFERS_MAX as usize),
            ("watchers", watchers, serve::WATCHERS_MAX),
        ];
        let broken = bounds.into_iter().find(|(_, has, most)| has > most);
        let broken = broken.map(|(name, has, most)| format!("node {no} has {has} {name}, {most} is the most"));
        let mut peers = node.gate.of_peer.iter();
        let greedy =
            peers.find(|(_, used)| used.0 > serve::TRANSFERS_PER_PEER_MAX || used.1 > serve::CLAIMS_PER_PEER_MAX);
        let greedy = greedy.map(|(peer, used)| format!("node {no} gives {used:?} transfers and claims to node {peer}"));
        broken.or(greedy).map(|what| ("limits", what))
    }

    /// Compares the books of the links.
    pub(crate) fn check_network(&self, net: &Network) -> Found {
        let books = net.books();
        let kept = books.pushed == books.delivered + books.dropped + books.waiting;
        (!kept).then(|| ("conservation", format!("{books:?}")))
    }

    /// What must hold at the end: `sent` registry bytes, where `needed` would do.
    pub(crate) fn check_end(&self, nodes: &[Node], net: &Network, sent: u64, needed: u64) -> Found {
        let bound = self.registry.of(needed).saturating_add(EGRESS_GRACE_BYTES);
        if sent > bound {
            let share = u128::from(sent) * 100 / u128::from(needed.max(1));
            let (sent, needed) = (show_bytes(sent), show_bytes(needed));
            let what =
                format!("the registry sent {sent} where {needed} would do ({share} %, {} may be)", self.registry);
            return Some(("egress", what));
        }
        for (no, node) in nodes.iter().enumerate() {
            let (asks, requests) = (node.counts.registry_asks, node.counts.registry_requests);
            if requests > asks {
                let what = format!("node {no} made {requests} requests to the registry for {asks} asks");
                return Some(("single flight", what));
            }
            for link in [node.uplink, node.downlink] {
                let (bytes, busy) = net.sent(link);
                if !is_within(net, link, bytes, busy) {
                    return Some((
                        "upload",
                        format!("node {no}: link {link:?} sent {bytes} B in {}", show_nanos(busy)),
                    ));
                }
            }
        }
        let books = net.books();
        let counted = net.count_waiting();
        (books.waiting != counted).then(|| ("conservation", format!("{books:?}, but {counted} B wait")))
    }
}

/// A link that was slower for a while had a lower rate than it has now, so this holds for it too.
fn is_within(net: &Network, link: LinkNo, bytes: u64, busy: Nanos) -> bool {
    let rate = net.rate(link).0;
    u128::from(bytes) * u128::from(SECOND) <= u128::from(rate) * u128::from(busy) || rate == 0
}
