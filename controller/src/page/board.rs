//! What the page shows: the newest word on everything, as the core and the nodes say it.
//!
//! It hears what other audiences hear, keeps it in memory, and notes in which sections something has changed. Whoever
//! encodes a section takes a [`Snapshot`], which is a list of shared rows, so that the core waits for no encoding. Nothing
//! survives the process: what there is is heard again after a start.

use std::collections::BTreeMap;
use std::sync::Arc;

use hermes_image::ids::Digest;
use parking_lot::Mutex;

use super::series::{Series, between};
use super::slots::{Slot, Slots};
use crate::clock;
use crate::crd::{HermesPolicySpec, HermesPolicyStatus};
use crate::event::{Action, Audience, ClusterNode, Event, ImageView, NodeReport, Traffic, UnixMillis};

/// Most nodes that are kept: four times the largest cluster that is tested for.
const NODES_MAX: usize = 20_000;
/// Longest text of a node's that is kept, in characters.
const TEXT_LEN_MAX: usize = 64;
/// Most ways of showing a tree that a node may name.
const WAYS_MAX: usize = 8;

/// A part of what is shown that has a revision of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Section {
    Summary,
    Policies,
    Images,
    Nodes,
    Map,
    Traffic,
}

/// How often each section has changed. One that nothing else changes than others changes with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Revisions {
    policies: u64,
    images: u64,
    nodes: u64,
    held: u64,
    traffic: u64,
}

impl Revisions {
    /// The revision of a section.
    pub(super) fn of(self, section: Section) -> u64 {
        match section {
            Section::Summary => self.policies + self.images + self.nodes + self.held + self.traffic,
            Section::Policies => self.policies,
            Section::Images => self.images + self.policies,
            Section::Nodes => self.nodes,
            Section::Map => self.images + self.nodes + self.held,
            Section::Traffic => self.traffic,
        }
    }
}

/// A policy, with what is said of it.
#[derive(Debug, Clone, Default)]
pub(super) struct PolicyRow {
    pub(super) spec: HermesPolicySpec,
    pub(super) status: Option<HermesPolicyStatus>,
}

/// Whether the cluster knows a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Place {
    /// There is no cluster that could.
    #[default]
    Unknown,
    Cluster,
    /// It did, and does no more.
    Gone,
}

/// What a node has reported.
#[derive(Debug, Clone, Default)]
pub(super) struct Said {
    pub(super) version: String,
    pub(super) ways: Vec<String>,
    pub(super) store_used_bytes: u64,
    pub(super) store_budget_bytes: Option<u64>,
    pub(super) traffic: Option<Traffic>,
    /// Images with percent, in the order of their numbers.
    pub(super) held: Box<[(Slot, u8)]>,
    /// Images that it tells of.
    pub(super) image_count: usize,
    /// Of these, complete ones.
    pub(super) complete_count: usize,
    /// When it last said anything.
    pub(super) heard: UnixMillis,
}

/// A node.
#[derive(Debug, Clone, Default)]
pub(super) struct NodeRow {
    pub(super) zone: String,
    place: Place,
    schedulable: bool,
    pub(super) connected: bool,
    pub(super) said: Option<Said>,
}

/// All that is known now, to be encoded at leisure.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) started: UnixMillis,
    pub(super) policies: Vec<(String, Arc<PolicyRow>)>,
    /// In the order of [`Self::image_order`].
    pub(super) images: Vec<(Arc<ImageView>, Option<Slot>)>,
    /// Names the order of images; another number, another order.
    pub(super) image_order: u64,
    /// In the order of [`Self::node_order`].
    pub(super) nodes: Vec<(Arc<str>, Arc<NodeRow>)>,
    /// Names the order of nodes.
    pub(super) node_order: u64,
}

impl NodeRow {
    /// Whether pods can be scheduled to it; nobody knows where there is no cluster.
    pub(super) fn schedulable(&self) -> Option<bool> {
        (self.place == Place::Cluster).then_some(self.schedulable)
    }
}

#[derive(Debug, Default)]
struct Known {
    revisions: Revisions,
    policies: BTreeMap<String, Arc<PolicyRow>>,
    /// By what they are sorted by: the first of their names, and the manifest.
    images: BTreeMap<(String, Digest), Arc<ImageView>>,
    image_keys: BTreeMap<Digest, String>,
    image_order: u64,
    nodes: BTreeMap<Arc<str>, Arc<NodeRow>>,
    node_order: u64,
    slots: Slots,
    series: Series,
}

/// The audience that the page reads.
#[derive(Debug)]
pub struct Board {
    started: UnixMillis,
    known: Mutex<Known>,
}

impl Board {
    /// One that knows nothing yet, at `now`.
    pub fn new(now: UnixMillis) -> Self {
        Self { started: now, known: Mutex::default() }
    }

    /// Learns of a fact that became known at `now`.
    pub fn learn_at(&self, now: UnixMillis, event: &Event) {
        let mut known = self.known.lock();
        match event {
            Event::Policy(policy) => {
                let row = known.policies.entry(policy.name.clone()).or_default();
                Arc::make_mut(row).spec = policy.spec.clone();
                known.revisions.policies += 1;
            }
            Event::PolicyGone(name) => {
                known.policies.remove(name);
                known.revisions.policies += 1;
            }
            Event::Node(node) => known.node_is(node),
            Event::NodeGone(node) => known.node_goes(node),
            Event::NodeSilent(node) => known.node_is_silent(node),
            Event::Reported { node, report } => known.reported(now, node, report),
            _ => {}
        }
    }

    /// The revision of everything.
    pub(super) fn revisions(&self) -> Revisions {
        self.known.lock().revisions
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let known = self.known.lock();
        let image = |view: &Arc<ImageView>| (Arc::clone(view), known.slots.get(&view.image.manifest));
        Snapshot {
            started: self.started,
            policies: known.policies.iter().map(|(name, row)| (name.clone(), Arc::clone(row))).collect(),
            images: known.images.values().map(image).collect(),
            image_order: known.image_order,
            nodes: known.nodes.iter().map(|(name, row)| (Arc::clone(name), Arc::clone(row))).collect(),
            node_order: known.node_order,
        }
    }

    /// What `look` finds in the series.
    pub(super) fn series<T>(&self, look: impl FnOnce(&Series) -> T) -> T {
        look(&self.known.lock().series)
    }
}

impl Known {
    /// The row of a node, which is made if there is room.
    fn row(&mut self, name: &str) -> Option<&mut NodeRow> {
        if !self.nodes.contains_key(name) {
            if self.nodes.len() >= NODES_MAX {
                let idle = self.nodes.iter().find(|(_, row)| !row.connected && row.place != Place::Cluster);
                let idle = Arc::clone(idle?.0);
                self.nodes.remove(&idle);
            }
            self.node_order += 1;
            self.nodes.insert(name.into(), Arc::default());
        }
        self.revisions.nodes += 1;
        self.nodes.get_mut(name).map(Arc::make_mut)
    }

    fn node_is(&mut self, node: &ClusterNode) {
        let is_news = self.nodes.get(node.name.as_str()).is_none_or(|row| {
            row.place != Place::Cluster || row.zone != node.zone || row.schedulable != node.schedulable
        });
        if is_news && let Some(row) = self.row(&node.name) {
            row.place = Place::Cluster;
            row.zone = node.zone.chars().take(TEXT_LEN_MAX).collect();
            row.schedulable = node.schedulable;
        }
    }

    fn node_goes(&mut self, node: &str) {
        match self.nodes.get_mut(node) {
            // Its daemon still speaks; the row goes when it does not.
            Some(row) if row.connected => Arc::make_mut(row).place = Place::Gone,
            Some(_) => self.forget(node),
            None => return,
        }
        self.revisions.nodes += 1;
    }

    fn node_is_silent(&mut self, node: &str) {
        match self.nodes.get_mut(node) {
            Some(row) if row.place == Place::Gone => self.forget(node),
            Some(row) => Arc::make_mut(row).connected = false,
            None => return,
        }
        self.revisions.nodes += 1;
    }

    fn forget(&mut self, node: &str) {
        self.nodes.remove(node);
        self.node_order += 1;
        self.revisions.held += 1;
    }

    fn reported(&mut self, now: UnixMillis, node: &str, report: &NodeReport) {
        let held = self.held(report);
        let Some(row) = self.row(node) else { return };
        row.connected = true;
        let last = row.said.take();
        let text = |said: &String| said.chars().filter(|c| !c.is_control()).take(TEXT_LEN_MAX).collect();
        let came = report
            .traffic
            .as_ref()
            .map(|traffic| between(last.as_ref().and_then(|said| said.traffic.as_ref()), traffic));
        let is_moved = last.is_none_or(|said| said.held != held);
        row.said = Some(Said {
            version: text(&report.version),
            ways: report.ways.iter().take(WAYS_MAX).map(text).collect(),
            store_used_bytes: report.store_used_bytes,
            store_budget_bytes: report.store_budget_bytes,
            traffic: report.traffic,
            image_count: report.images.len(),
            complete_count: report.images.values().filter(|percent| **percent >= 100).count(),
            held,
            heard: now,
        });
        if is_moved {
            self.revisions.held += 1;
        }
        if let Some(came) = came.filter(|came| came.iter().any(|bytes| *bytes > 0)) {
            self.series.add(now.0 / 60_000, &came);
            self.revisions.traffic += 1;
        }
    }

    /// What a node holds, by the images' numbers. Those for which there is none are left out.
    fn held(&mut self, report: &NodeReport) -> Box<[(Slot, u8)]> {
        if self.slots.is_full() && report.images.keys().any(|manifest| self.slots.get(manifest).is_none()) {
            self.free_slots();
        }
        let held = report.images.iter().filter_map(|(manifest, percent)| Some((self.slots.give(*manifest)?, *percent)));
        let mut held: Vec<(Slot, u8)> = held.collect();
        held.sort_unstable();
        held.into()
    }

    /// Images that no node holds and nobody wants need no numbers.
    fn free_slots(&mut self) {
        let rows = self.nodes.values().filter_map(|row| row.said.as_ref());
        let held: std::collections::HashSet<Slot> =
            rows.flat_map(|said| said.held.iter().map(|(slot, _)| *slot)).collect();
        let wanted = &self.image_keys;
        self.slots.keep(|manifest, slot| held.contains(&slot) || wanted.contains_key(manifest));
    }

    fn publish(&mut self, view: &Arc<ImageView>) {
        let manifest = view.image.manifest;
        let key = view.names.first().map(|name| name.reference.clone()).unwrap_or_default();
        if let Some(last) = self.image_keys.insert(manifest, key.clone())
            && last != key
        {
            self.images.remove(&(last, manifest));
        }
        if self.images.insert((key, manifest), Arc::clone(view)).is_none() {
            self.image_order += 1;
            if self.slots.is_full() {
                self.free_slots();
            }
            self.slots.give(manifest);
        }
        self.revisions.images += 1;
    }

    fn withdraw(&mut self, manifest: Digest) {
        if let Some(key) = self.image_keys.remove(&manifest) {
            self.images.remove(&(key, manifest));
            self.image_order += 1;
            self.revisions.images += 1;
        }
    }
}

impl Audience for Board {
    fn hear(&self, action: &Action) {
        let mut known = self.known.lock();
        match action {
            Action::Publish(view) => known.publish(view),
            Action::Withdraw(image) => known.withdraw(image.manifest),
            // It may come before the policy itself, and never after that has gone.
            Action::PolicyStatus { policy, status } => {
                let row = known.policies.entry(policy.clone()).or_default();
                Arc::make_mut(row).status = Some(status.clone());
                known.revisions.policies += 1;
            }
            _ => {}
        }
    }

    fn learn(&self, event: &Event) {
        self.learn_at(clock::now(), event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Policy;

    const NOW: UnixMillis = UnixMillis(1_700_000_000_000);

    fn report(node: &str, images: &[(u8, u8)], peers: u64) -> Event {
        let images = images.iter().map(|(image, percent)| (Digest([*image; 32]), *percent)).collect();
        let traffic = Some(Traffic { run: 1, from_peers: peers, ..Traffic::default() });
        Event::Reported { node: node.to_owned(), report: NodeReport { images, traffic, ..NodeReport::default() } }
    }

    fn node(name: &str) -> Event {
        let (labels, zone) = (BTreeMap::new(), "a".to_owned());
        Event::Node(ClusterNode { name: name.to_owned(), labels, zone, schedulable: true })
    }

    fn names(board: &Board) -> Vec<String> {
        board.snapshot().nodes.iter().map(|(name, _)| name.to_string()).collect()
    }

    #[test]
    fn a_node_of_a_cluster_goes_when_it_is_gone_and_silent_in_either_order() {
        let board = Board::new(NOW);
        for name in ["a", "b", "c"] {
            board.learn_at(NOW, &node(name));
            board.learn_at(NOW, &report(name, &[], 0));
        }
        board.learn_at(NOW, &Event::NodeGone("a".to_owned()));
        assert_eq!(names(&board), ["a", "b", "c"], "its daemon still speaks");
        board.learn_at(NOW, &Event::NodeSilent("a".to_owned()));
        board.learn_at(NOW, &Event::NodeSilent("b".to_owned()));
        assert_eq!(names(&board), ["b", "c"], "a silent node is still there");
        board.learn_at(NOW, &Event::NodeGone("b".to_owned()));
        assert_eq!(names(&board), ["c"]);
    }

    #[test]
    fn only_what_changes_has_another_revision() {
        let board = Board::new(NOW);
        board.learn_at(NOW, &report("a", &[(1, 50)], 0));
        let before = board.revisions();
        board.learn_at(NOW, &report("a", &[(1, 50)], 7));
        let counted = board.revisions();
        assert_eq!((before.held, before.policies), (counted.held, counted.policies));
        assert!(counted.of(Section::Traffic) > before.of(Section::Traffic));
        board.learn_at(NOW, &report("a", &[(1, 51)], 7));
        let moved = board.revisions();
        assert!(moved.held > counted.held && moved.traffic == counted.traffic);
        assert_eq!(board.series(|series| series.total()[2]), 7);
    }

    #[test]
    fn a_status_may_come_before_its_policy() {
        let board = Board::new(NOW);
        let status = HermesPolicyStatus { ready: 3, ..HermesPolicyStatus::default() };
        board.hear(&Action::PolicyStatus { policy: "p".to_owned(), status });
        let spec = HermesPolicySpec { paused: true, ..HermesPolicySpec::default() };
        board.learn_at(NOW, &Event::Policy(Policy { name: "p".to_owned(), generation: 1, spec }));
        let row = &board.snapshot().policies[0].1;
        assert_eq!((row.spec.paused, row.status.as_ref().map(|status| status.ready)), (true, Some(3)));
        board.learn_at(NOW, &Event::PolicyGone("p".to_owned()));
        assert!(board.snapshot().policies.is_empty());
    }

    #[test]
    fn nodes_have_a_limit_and_the_idle_make_room() {
        let board = Board::new(NOW);
        for number in 0..NODES_MAX {
            board.learn_at(NOW, &report(&format!("node-{number}"), &[], 0));
        }
        board.learn_at(NOW, &report("one-more", &[], 0));
        assert_eq!(board.snapshot().nodes.len(), NODES_MAX);
        assert!(!names(&board).contains(&"one-more".to_owned()), "all others are there");
        board.learn_at(NOW, &Event::NodeSilent("node-5".to_owned()));
        board.learn_at(NOW, &report("one-more", &[], 0));
        let names = names(&board);
        assert!(names.len() == NODES_MAX && names.contains(&"one-more".to_owned()));
        assert!(!names.contains(&"node-5".to_owned()));
    }
}
