//! The made-up world: one queue, one clock, all nodes.
//!
//! ```text
//!  queue --> happening --> driver --> facts --> production policy --> requests --> driver --> queue
//!                            |                                                       |
//!                            +------ links (`net`), registry, member list -----------+
//! ```
//!
//! | module | what |
//! |---|---|
//! | `driver` | carries out what a node's policy asks for, as `snapshotter/fetch` does; the only place that does so |
//! | `serve` | answers other nodes, as `p2p/exchange` does |
//! | `wire` | connections and words between nodes |
//! | `origin` | the registry |
//! | `members` | the member list and the DHT |
//! | `rival` | models of other systems, which stand where nodes of Hermes stand |
//! | `starts` | what programs read, and when they start |
//! | `faults` | what goes wrong |
//!
//! One thread, no clock, no randomness but from the seed, no container whose order is not fixed.

mod driver;
mod faults;
mod members;
mod origin;
pub(crate) mod rival;
pub mod serve;
mod starts;
mod wire;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;
use hermes_policy::event::{Action, AskId, ClaimId, Event, Outcome};
use hermes_policy::rng::Rng;

use crate::checkers::{Checkers, Violation};
use crate::ledger::Excess;
use crate::net::{FlowNo, LinkNo, Network};
use crate::node::Node;
use crate::queue::{MILLISECOND, Nanos, Queue, SECOND};
use crate::report::{Mark, Report, Series};
use crate::sabotage::Sabotage;
use crate::scenario::{ClusterConfig, Scenario};
use crate::shape::Shape;
use crate::strategy::model::hosts;
use crate::trace::Trace;
use crate::units::Rate;

pub(crate) use driver::TIMER_SLACK;
pub(crate) use wire::Word;

use members::Membership;
use origin::RegistryState;
use wire::Letter;

/// How often the books are compared.
const CHECK_EVERY: Nanos = 100 * MILLISECOND;
/// How often progress is told.
const TELL_EVERY: u64 = 1 << 16;

/// Something that happens.
#[derive(Debug)]
pub(crate) enum Happening {
    /// A link has sent a unit.
    Link(LinkNo),
    /// A flow that was idle begins.
    Go { flow: FlowNo, ask: u64 },
    /// Words arrive.
    Letter(Box<Letter>),
    /// A chunk comes for an ask of a peer.
    Chunk { node: u32, life: u32, ask: AskId, tag: u32 },
    /// A piece of the registry's body comes; the last one of its span says which (plus one).
    Piece { node: u32, life: u32, ask: AskId, span: u32, len_bytes: u32 },
    /// Whoever asked does not wait any more.
    ClaimGone { node: u32, life: u32, claim: ClaimId },
    /// A connection stands.
    Connected { nodes: (u32, u32), lives: (u32, u32) },
    /// A node hears that a connection is gone.
    Lost { node: u32, life: u32, peer: u32 },
    /// The policy's timer.
    Timer { node: u32, life: u32 },
    /// Asks that were silent for too long end.
    Silent { node: u32, life: u32 },
    /// An answer is still waited for.
    Waits { node: u32, life: u32, from: u32, ask: AskId },
    /// Chunks are in the store.
    Stored { node: u32, life: u32, batch: Box<Batch> },
    /// An ask ends without more.
    Ends { node: u32, life: u32, ask: AskId, outcome: Box<Outcome> },
    /// A request reaches the registry's answer.
    Registry { node: u32, life: u32, ask: AskId },
    /// Watchers are told what came.
    News { node: u32, life: u32, layer: u16 },
    /// The DHT has answered.
    Found { node: u32, life: u32, layer: u16 },
    /// Holders that have not said what they have are not waited for any longer.
    LookupEnds { node: u32, life: u32, layer: u16 },
    /// A node of a model goes on.
    Rival { node: u32, life: u32, step: rival::Step },
    /// A program reads on.
    Read { node: u32 },
    /// A pod lands on a node.
    Arrives { node: u32 },
    /// A job comes that any node may have.
    Job { image: usize },
    /// A node's job is over.
    JobEnds { node: u32, life: u32 },
    /// The members notice what has changed.
    Notice,
    /// A node gets the list.
    List { node: u32, life: u32 },
    /// A fault begins, or ends.
    Fault { no: usize, ends: bool },
    /// The books are compared.
    Check,
}

/// Chunks on their way into the store.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) ask: AskId,
    pub(crate) layer: u16,
    pub(crate) chunks: Runs,
    pub(crate) from: From,
    /// Ends the ask when they are stored.
    pub(crate) ends: Option<Outcome>,
}

/// Where chunks came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    Registry,
    Peer,
    Local,
}

/// Progress of a run, for people.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Virtual time.
    pub now: Nanos,
    /// Starts that are ready, and all that are to be.
    pub ready: u32,
    /// See `ready`.
    pub starts: u32,
    /// Things that have happened.
    pub happened: u64,
}

/// The speeds of a node's card, out and in.
fn card_of(cluster: &ClusterConfig) -> (Rate, Rate) {
    let up = cluster.upload_limit.map_or(cluster.nic, |limit| limit.min(cluster.nic));
    rival::card(cluster.strategy, cluster.nic, up)
}

/// The world. See the module.
pub struct World {
    scenario: Arc<Scenario>,
    shape: Arc<Shape>,
    layer_numbers: BTreeMap<DiffId, u16>,
    queue: Queue<Happening>,
    net: Network,
    nodes: Vec<Node>,
    registry: RegistryState,
    membership: Membership,
    rivals: rival::Rivals,
    /// Nodes that each fault has hit.
    hit: Vec<Vec<u32>>,
    /// Nodes beyond a partition, by fault, and whether the rest hears them.
    parts: BTreeMap<usize, (BTreeSet<u32>, bool)>,
    faults_left: usize,
    rng: Rng,
    trace: Trace,
    checkers: Checkers,
    sabotage: Option<Sabotage>,
    spare: Vec<Vec<Action>>,
    starts: u32,
    begun: u32,
    ready: u32,
    lost: u32,
    marks: Vec<Mark>,
    /// Nodes of the rolling update that wait for their turn.
    to_roll: Vec<u32>,
    /// Nodes that wait for jobs, and the images of jobs that wait for nodes; one of both is empty.
    free: VecDeque<u32>,
    jobs: VecDeque<usize>,
    /// When the first start began, and when those that are ready began and were.
    first_start: Option<Nanos>,
    took: Vec<(Nanos, Nanos)>,
    last_change: Nanos,
    series: Series,
    waits: Vec<(Nanos, u32)>,
    hits: u64,
    happened: u64,
}

impl World {
    /// The world of a scenario at its start. The same scenario, shape and seed give the same run.
    pub fn new(scenario: Arc<Scenario>, shape: Arc<Shape>, seed: u64, sabotage: Option<Sabotage>) -> Self {
        let mut rng = Rng::new(seed);
        let mut net = Network::default();
        let registry = RegistryState::new(&scenario, &mut net);
        let membership = Membership::new(&scenario, &mut net, shape.layers.len());
        let cluster = &scenario.cluster;
        let (up, down) = card_of(cluster);
        let node_seed = rng.next_u64();
        let limits = cluster.strategy.limits();
        let nodes = (0..cluster.nodes + hosts(cluster.strategy)).map(|no| {
            let links = (net.add_link(up, true), net.add_link(down, false));
            Node::new(no, no % cluster.zones, shape.layers.len(), links, node_seed, limits.clone())
        });
        let nodes: Vec<Node> = nodes.collect();
        let numbers = shape.layers.iter().enumerate().map(|(place, layer)| (layer.diff_id, place as u16));
        let mut world = Self {
            layer_numbers: numbers.collect(),
            checkers: Checkers::new(&scenario, seed),
            hit: vec![Vec::new(); scenario.faults.len()],
            parts: BTreeMap::new(),
            rivals: rival::Rivals::new(scenario.cluster.strategy, &shape),
            faults_left: scenario.faults.len(),
            scenario,
            shape,
            queue: Queue::default(),
            net,
            nodes,
            registry,
            membership,
            rng,
            trace: Trace::default(),
            sabotage,
            spare: Vec::new(),
            starts: 0,
            begun: 0,
            ready: 0,
            lost: 0,
            marks: Vec::new(),
            to_roll: Vec::new(),
            free: VecDeque::new(),
            jobs: VecDeque::new(),
            first_start: None,
            took: Vec::new(),
            last_change: 0,
            series: Series::default(),
            waits: Vec::new(),
            hits: 0,
            happened: 0,
        };
        world.begin();
        world
    }

    /// Runs to the end: all that is to be ready is, or its time is over, or a checker has found something.
    pub fn run(mut self, mut tell: impl FnMut(Progress)) -> Report {
        loop {
            let end = self.last_change.saturating_add(self.scenario.expect.ready_within.0);
            let Some(happening) = self.queue.next(end) else { break };
            self.happens(happening);
            while let Some((at, link)) = self.net.take_begun() {
                self.queue.at(at, Happening::Link(link));
            }
            self.happened += 1;
            if self.happened.is_multiple_of(TELL_EVERY) {
                tell(self.progress());
            }
            if self.checkers.violation().is_some() || self.is_over() {
                break;
            }
        }
        tell(self.progress());
        self.check_end();
        self.report()
    }

    fn progress(&self) -> Progress {
        Progress { now: self.queue.now(), ready: self.ready, starts: self.starts, happened: self.happened }
    }

    fn is_over(&self) -> bool {
        self.ready + self.lost >= self.starts && self.faults_left == 0
    }

    fn happens(&mut self, happening: Happening) {
        let Some(happening) = self.admitted(happening) else { return };
        match happening {
            Happening::Link(link) => self.link_sent(link),
            Happening::Go { flow, ask } => {
                if self.net.purpose(flow).ask == ask {
                    self.net.go(flow, self.queue.now());
                }
            }
            Happening::Letter(letter) => self.letter(*letter),
            Happening::Chunk { node, ask, tag, .. } => self.chunk_came(node, ask, tag),
            Happening::Piece { node, ask, span, len_bytes, .. } => self.piece_came(node, ask, span, len_bytes),
            Happening::ClaimGone { node, claim, .. } => self.tell(node, Event::ClaimEnded { claim }),
            Happening::Connected { nodes, lives } => self.connected(nodes, lives),
            Happening::Lost { node, peer, .. } => self.heard_of_loss(node, peer),
            Happening::Timer { node, .. } => self.timer(node),
            Happening::Silent { node, .. } => self.end_silent(node),
            Happening::Waits { node, from, ask, .. } => self.still_waits(node, from, ask),
            Happening::Stored { node, batch, .. } => self.stored(node, *batch),
            Happening::Ends { node, ask, outcome, .. } => self.ask_ends(node, ask, *outcome),
            Happening::Registry { node, ask, .. } => self.registry_asked(node, ask),
            Happening::News { node, layer, .. } => self.news(node, layer),
            Happening::Found { node, layer, .. } => self.found(node, layer),
            Happening::LookupEnds { node, layer, .. } => self.lookup_ends(node, layer),
            Happening::Rival { node, step, .. } => self.rival_step(node, step),
            Happening::Read { node } => self.read_on(node),
            Happening::Arrives { node } => self.arrives(node, 0),
            Happening::Job { image } => self.job_comes(image),
            Happening::JobEnds { node, .. } => self.is_free(node),
            Happening::Notice => self.notice(),
            Happening::List { node, .. } => self.tell_list(node),
            Happening::Fault { no, ends } => self.fault(no, ends),
            Happening::Check => self.check(),
        }
    }

    /// What is for an earlier life of a node is dropped, and what is for a node that pauses is put off.
    fn admitted(&mut self, happening: Happening) -> Option<Happening> {
        let (node, life) = match &happening {
            Happening::Letter(letter) => (letter.to, Some(letter.to_life)),
            Happening::Lost { node, life, .. }
            | Happening::Timer { node, life }
            | Happening::Chunk { node, life, .. }
            | Happening::Piece { node, life, .. }
            | Happening::ClaimGone { node, life, .. }
            | Happening::Silent { node, life }
            | Happening::Waits { node, life, .. }
            | Happening::Stored { node, life, .. }
            | Happening::Ends { node, life, .. }
            | Happening::Registry { node, life, .. }
            | Happening::News { node, life, .. }
            | Happening::Found { node, life, .. }
            | Happening::LookupEnds { node, life, .. }
            | Happening::Rival { node, life, .. }
            | Happening::JobEnds { node, life }
            | Happening::List { node, life } => (*node, Some(*life)),
            Happening::Read { node } | Happening::Arrives { node } => (*node, None),
            _ => return Some(happening),
        };
        let record = &self.nodes[node as usize];
        if life.is_some_and(|life| life != record.life || !record.up) {
            return None;
        }
        if record.paused_until > self.queue.now() {
            let until = record.paused_until;
            self.queue.at(until, happening);
            return None;
        }
        Some(happening)
    }

    /// Tells the policy of a node a fact and carries out what it asks for. See `driver`.
    fn tell(&mut self, no: u32, event: Event) {
        let now = self.queue.now();
        let node = &mut self.nodes[no as usize];
        if !node.up {
            return;
        }
        self.trace.event(now, no, &event);
        if event == Event::TimerFired {
            node.armed = None;
        }
        let mut actions = self.spare.pop().unwrap_or_default();
        let clock = node.clock(now);
        node.flight.handle(clock, event, &mut node.rng, &mut actions);
        // A ban ends what comes from a peer, of which the policy hears at once: first comes all else that it has asked for.
        actions.sort_by_key(|action| matches!(action, Action::Ban { .. }));
        for action in actions.drain(..) {
            self.trace.action(&action);
            self.carry_out(no, action);
        }
        self.spare.push(actions);
    }

    fn violated(&mut self, kind: &'static str, what: String) {
        self.checkers.report(Violation { kind, at: self.queue.now(), what });
    }

    /// Compares the books, every now and then.
    fn check(&mut self) {
        let now = self.queue.now();
        let found = self.nodes.iter().enumerate().find_map(|(no, node)| self.checkers.check_node(no, node, now));
        let found = found.or_else(|| self.checkers.check_network(&self.net));
        if let Some((kind, what)) = found {
            self.violated(kind, what);
        }
        let (sent, _) = self.net.sent(self.registry.link);
        let peers = self.nodes.iter().map(|node| node.counts.from_peers).sum();
        self.series.sample(now, (sent, peers), (self.begun, self.ready));
        self.queue.after(CHECK_EVERY, Happening::Check);
    }

    /// What must hold at the end.
    fn check_end(&mut self) {
        if self.checkers.violation().is_some() {
            return;
        }
        let waiting = self.starts - self.ready - self.lost;
        if waiting > 0 {
            let stuck =
                self.nodes.iter().position(|node| node.start.as_ref().is_some_and(|start| start.ready.is_none()));
            let stuck = stuck.unwrap_or_default();
            let reads = self.nodes[stuck].reads.len();
            let what = format!(
                "{waiting} starts are not ready {} s after the last start or fault; node {stuck} waits for {reads} reads",
                self.scenario.expect.ready_within.0 / SECOND
            );
            return self.violated("liveness", what);
        }
        let (sent, _) = self.net.sent(self.registry.link);
        let needed = self.needed_bytes();
        if let Some((kind, what)) = self.checkers.check_end(&self.nodes, &self.net, sent, needed) {
            self.violated(kind, what);
        }
    }
}

/// What the report and the checkers look at.
impl World {
    pub(crate) fn scenario(&self) -> &Scenario {
        &self.scenario
    }

    pub(crate) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub(crate) fn net(&self) -> &Network {
        &self.net
    }

    pub(crate) fn trace(&self) -> &Trace {
        &self.trace
    }

    pub(crate) fn checkers(&self) -> &Checkers {
        &self.checkers
    }

    pub(crate) fn series(&self) -> &Series {
        &self.series
    }

    /// Waits of demand reads, and their bytes.
    pub(crate) fn waits(&self) -> &[(Nanos, u32)] {
        &self.waits
    }

    pub(crate) fn hits(&self) -> u64 {
        self.hits
    }

    pub(crate) fn happened(&self) -> u64 {
        self.happened
    }

    pub(crate) fn now(&self) -> Nanos {
        self.queue.now()
    }

    /// Starts that were to be ready, are, and died with their node.
    pub(crate) fn start_counts(&self) -> (u32, u32, u32) {
        (self.starts, self.ready, self.lost)
    }

    /// When the first start began, and when those that are ready began and were.
    pub(crate) fn start_times(&self) -> (Nanos, &[(Nanos, Nanos)]) {
        (self.first_start.unwrap_or_default(), &self.took)
    }

    /// Bytes that left a zone for another.
    pub(crate) fn between_zones_bytes(&self) -> u64 {
        self.membership.zone_links.iter().map(|(out, _)| self.net.sent(*out).0).sum()
    }

    /// What went wrong when.
    pub(crate) fn marks(&self) -> &[Mark] {
        &self.marks
    }

    /// Spans that the registry was asked for in vain or more than once.
    pub(crate) fn excess(&self) -> Vec<Excess> {
        self.registry.ledger.excess(&self.shape, self.checkers.needed())
    }

    /// Bytes that the registry sent, requests that it got, and those that it refused.
    pub(crate) fn registry_totals(&self) -> (u64, u64, u64) {
        (self.net.sent(self.registry.link).0, self.registry.requests, self.registry.refused)
    }
}
