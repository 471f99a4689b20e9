//! Which nodes hold copies before anybody needs them.
//!
//! For each ready image of a policy with `spec.seed`: the nodes with its labels that are fit for pods, run Hermes and have
//! room. Each has a score for the image that nobody has to agree on (highest random weight), so when nodes come and go only
//! the copies move that have to; zones are taken in turn by the score of their best node, so copies are in as many zones as
//! there are. Room is what the node's store may still take, less what this plan gives to the node; what it holds already needs
//! none.
//!
//! Plans are made for all images together, and not more often than [`INTERVAL_MS`]: 200 images on 5,000 nodes are a million
//! scores.

use std::collections::{BTreeMap, BTreeSet};

use hermes_policy::rng::Rng;

use super::{Core, Timer, Turn};
use crate::crd::{Seed, SeedMode};
use crate::event::{ClusterNode, ImageKey, NodeReport, Phase, UnixMillis};

/// Copies of an image when a policy does not say (design: in two zones).
const REPLICAS: u32 = 2;
/// Copies of an image at most.
const REPLICAS_MAX: u32 = 1000;
/// Least time between two plans, in milliseconds.
const INTERVAL_MS: u64 = 2_000;

/// A node, and what it says.
#[derive(Debug, Default)]
struct NodeState {
    node: Option<ClusterNode>,
    report: Option<NodeReport>,
}

/// The nodes, and when to plan.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    nodes: BTreeMap<String, NodeState>,
    /// A plan is wanted.
    wanted: bool,
    planned_at: Option<UnixMillis>,
    /// When the plan is to be made, if that has been put down.
    pub(super) wish: Option<UnixMillis>,
}

/// A node that may hold copies.
#[derive(Debug)]
struct Candidate<'a> {
    node: &'a ClusterNode,
    report: &'a NodeReport,
    hash: u64,
}

impl Nodes {
    /// Something has changed that plans depend on.
    pub(super) fn want_plan(&mut self) {
        self.wanted = true;
    }

    pub(super) fn changed(&mut self, node: ClusterNode) {
        let state = self.nodes.entry(node.name.clone()).or_default();
        if state.node.as_ref() != Some(&node) {
            state.node = Some(node);
            self.wanted = true;
        }
    }

    pub(super) fn gone(&mut self, name: &str) {
        self.wanted |= self.nodes.remove(name).is_some();
    }

    pub(super) fn silent(&mut self, name: &str) {
        let Some(state) = self.nodes.get_mut(name) else { return };
        self.wanted |= state.report.take().is_some();
        if state.node.is_none() {
            self.nodes.remove(name);
        }
    }

    pub(super) fn reported(&mut self, name: String, report: NodeReport) {
        let state = self.nodes.entry(name).or_default();
        let before = state.report.replace(report);
        let free = |report: &NodeReport| free_bytes(report).checked_ilog2();
        let now = state.report.as_ref().and_then(free);
        // Stores fill and empty all the time: only a change by half or double is one.
        self.wanted |= before.as_ref().and_then(free) != now;
    }
}

fn free_bytes(report: &NodeReport) -> u64 {
    report.store_budget_bytes.map_or(u64::MAX, |budget| budget.saturating_sub(report.store_used_bytes))
}

/// FNV-1a, 64 bits (Fowler, Noll, Vo): spread further by [`score`].
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn score(image: &ImageKey, node: u64) -> u64 {
    let digest = image.manifest.0.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    Rng::new(digest ^ node).next_u64()
}

impl Core {
    /// Plans, if that is wanted and not too soon.
    pub(super) fn plan_seeds(&mut self, turn: &mut Turn<'_>) {
        if !self.nodes.wanted {
            return;
        }
        let soonest = self.nodes.planned_at.map_or(turn.now, |planned| UnixMillis(planned.0 + INTERVAL_MS));
        // A clock that was set back must not stop the planning.
        if soonest > turn.now && self.nodes.planned_at.is_some_and(|planned| planned <= turn.now) {
            if self.nodes.wish.is_none() {
                self.nodes.wish = Some(soonest);
                self.timers.insert((soonest, Timer::Seeds));
            }
            return;
        }
        self.nodes.wanted = false;
        self.nodes.planned_at = Some(turn.now);
        for (key, seeds) in self.plan() {
            if let Some(image) = self.images.get_mut(&key) {
                image.seeds = seeds;
                self.changed_images.insert(key);
            }
        }
    }

    /// The plans that differ from those in force.
    fn plan(&self) -> Vec<(ImageKey, BTreeMap<String, SeedMode>)> {
        let candidates: Vec<Candidate<'_>> = self
            .nodes
            .nodes
            .values()
            .filter_map(|state| Some((state.node.as_ref()?, state.report.as_ref()?)))
            .filter(|(node, _)| node.schedulable)
            .map(|(node, report)| Candidate { node, report, hash: hash(&node.name) })
            .collect();
        let mut given: BTreeMap<&str, u64> = BTreeMap::new();
        let mut changed = Vec::new();
        for (key, image) in &self.images {
            let mut seeds: BTreeMap<String, SeedMode> = BTreeMap::new();
            let policies = if image.phase == Phase::Ready { self.wanted_by(image).0 } else { BTreeSet::new() };
            for seed in policies.iter().filter_map(|name| self.policies.get(name)?.spec.seed.as_ref()) {
                for candidate in choose(key, image.len_bytes(), seed, &candidates, &given) {
                    let mode = seeds.entry(candidate.node.name.clone()).or_insert(seed.mode);
                    *mode = stronger(*mode, seed.mode);
                }
            }
            for candidate in candidates.iter().filter(|candidate| seeds.contains_key(&candidate.node.name)) {
                if !holds(candidate, key) {
                    *given.entry(&candidate.node.name).or_default() += image.len_bytes();
                }
            }
            if seeds != image.seeds {
                changed.push((key.clone(), seeds));
            }
        }
        changed
    }
}

fn stronger(one: SeedMode, other: SeedMode) -> SeedMode {
    let strength = |mode| match mode {
        SeedMode::Index => 0,
        SeedMode::Hot => 1,
        SeedMode::Full => 2,
    };
    if strength(other) > strength(one) { other } else { one }
}

fn holds(candidate: &Candidate<'_>, key: &ImageKey) -> bool {
    candidate.report.images.get(&key.manifest).is_some_and(|percent| *percent > 0)
}

/// The nodes for one image and one wish.
fn choose<'a, 'n>(
    key: &ImageKey,
    len_bytes: u64,
    seed: &Seed,
    candidates: &'a [Candidate<'n>],
    given: &BTreeMap<&str, u64>,
) -> Vec<&'a Candidate<'n>> {
    let replicas = seed.replicas.unwrap_or(REPLICAS).min(REPLICAS_MAX) as usize;
    let labelled = |candidate: &&Candidate<'_>| {
        seed.node_selector.iter().all(|(label, value)| candidate.node.labels.get(label) == Some(value))
    };
    let has_room = |candidate: &&Candidate<'_>| {
        let taken = given.get(candidate.node.name.as_str()).copied().unwrap_or(0);
        let room = free_bytes(candidate.report).saturating_sub(taken);
        seed.mode == SeedMode::Index || holds(candidate, key) || room >= len_bytes
    };
    let mut fit: Vec<&Candidate<'_>> = candidates.iter().filter(labelled).filter(has_room).collect();
    fit.sort_by_key(|candidate| (std::cmp::Reverse(score(key, candidate.hash)), &candidate.node.name));
    // How many better nodes of its zone there are is the round in which a node's turn comes.
    let mut rounds: BTreeMap<&str, usize> = BTreeMap::new();
    let mut ordered: Vec<(usize, usize, &Candidate<'_>)> = Vec::with_capacity(fit.len());
    for (place, candidate) in fit.into_iter().enumerate() {
        let round = rounds.entry(&candidate.node.zone).or_default();
        ordered.push((*round, place, candidate));
        *round += 1;
    }
    ordered.sort_by_key(|(round, place, _)| (*round, *place));
    ordered.into_iter().take(replicas).map(|(_, _, candidate)| candidate).collect()
}
