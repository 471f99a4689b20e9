//! The member list, and the DHT, as far as a node's policy sees them.
//!
//! The list is one; nodes hear of a change after the time that gossip takes, each at its own moment. A member that is
//! suspected and answers refutes it, so only those are taken out that do not answer: dead, asleep, or beyond a partition
//! (then each side takes the other out). Nodes with a stale list keep the one they have.
//!
//! The DHT has a record for each node that has opened a layer, of which a search finds the newest at random.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hermes_image::runs::Runs;
use hermes_policy::event::{Event, PeerNo};
use hermes_policy::members::{Member, Members, ZoneNo};
use hermes_policy::rng::Rng;

use super::wire::Word;
use super::{Happening, World};
use crate::net::{LinkNo, Network};
use crate::queue::{Nanos, SECOND};
use crate::scenario::Scenario;
use crate::strategy::Strategy;

/// Holders of a layer that the DHT remembers, and that one search finds (`holders_enough` in `p2p/config.rs`).
const PROVIDERS_MAX: usize = 64;
const HOLDERS_ENOUGH: usize = 8;
/// Partners whose news of a layer a node listens to (`PARTNERS_MAX` in `snapshotter/fetch/layer.rs`).
const WATCHED_MAX: usize = 32;
/// How long a member that is suspected and connected may take to answer (`ANSWER_WAIT` in `p2p/members/task.rs`).
const ANSWER_WAIT: Nanos = 2 * SECOND;
/// How long a holder may take to say what it has (`HAVE_TIMEOUT` in `snapshotter/fetch/asks.rs`).
const HAVE_TIMEOUT: Nanos = 2 * SECOND;

/// What the members know of each other.
#[derive(Debug)]
pub(super) struct Membership {
    /// Out of each zone, and into it.
    pub(super) zone_links: Vec<(LinkNo, LinkNo)>,
    /// Members that the others believe to be gone.
    pub(super) gone: BTreeSet<u32>,
    /// How much slower some nodes are.
    pub(super) slow: BTreeMap<u32, u32>,
    epoch: u64,
    /// The list as all have it who are in it and believed to live, until it changes.
    shared: Option<Members>,
    /// When the next change is noticed.
    planned: Option<Nanos>,
    /// Newest providers of each layer, the newest last.
    providers: Vec<Vec<u32>>,
}

impl Membership {
    pub(super) fn new(scenario: &Scenario, net: &mut Network, layers: usize) -> Self {
        let rate = scenario.cluster.zone_link;
        Self {
            zone_links: (0..scenario.cluster.zones)
                .map(|_| (net.add_link(rate, false), net.add_link(rate, false)))
                .collect(),
            gone: BTreeSet::new(),
            slow: BTreeMap::new(),
            epoch: 1,
            shared: None,
            planned: None,
            providers: vec![Vec::new(); layers],
        }
    }
}

/// A member's key: the first eight bytes of a hash of its name.
fn key(no: u32) -> u64 {
    Rng::new(u64::from(no) ^ 0x6b65_7973).next_u64()
}

impl World {
    pub(super) fn has_swarm(&self) -> bool {
        self.scenario.cluster.strategy.has_swarm()
    }

    /// The list as `viewer` hears it now. Most hear the same one, and share it.
    fn list(&mut self, viewer: u32) -> Members {
        let own = self.strategy() == Strategy::HermesNoOwners
            || !self.parts.is_empty()
            || self.membership.gone.contains(&viewer)
            || !self.nodes[viewer as usize].joined;
        if own {
            return self.list_of(Some(viewer)).seen_by(PeerNo(viewer));
        }
        if self.membership.shared.is_none() {
            self.membership.shared = Some(self.list_of(None));
        }
        self.membership.shared.as_ref().map_or_else(Members::default, |list| list.seen_by(PeerNo(viewer)))
    }

    /// The list as one node sees it, or as nobody in particular.
    fn list_of(&self, viewer: Option<u32>) -> Members {
        let beyond = |no: u32| {
            let parted =
                |viewer: u32| self.parts.values().any(|(part, _)| part.contains(&viewer) != part.contains(&no));
            viewer.is_some_and(parted)
        };
        let strategy = self.strategy();
        let joined = self.nodes.iter().enumerate().filter(|(_, node)| node.joined);
        let members = joined.map(|(no, node)| {
            let no = no as u32;
            let there = viewer == Some(no) || !(self.membership.gone.contains(&no) || beyond(no));
            let eligible = there && (viewer == Some(no) || strategy != Strategy::HermesNoOwners);
            let zone = ZoneNo(if strategy == Strategy::HermesNoZones { 0 } else { node.zone });
            Member { peer: PeerNo(no), key: key(no), zone, eligible }
        });
        Members::new(self.membership.epoch, PeerNo(u32::MAX), members.collect())
    }

    pub(super) fn tell_list(&mut self, no: u32) {
        if self.has_swarm() {
            let members = Arc::new(self.list(no));
            self.tell(no, Event::MembersChanged { members });
        }
    }

    /// Something has changed that members notice after `wait`, or before that together with something else.
    pub(super) fn change_members(&mut self, wait: Nanos) {
        let at = self.queue.now() + wait;
        if self.membership.planned.is_none_or(|planned| at < planned) {
            self.membership.planned = Some(at);
            self.queue.at(at, Happening::Notice);
        }
    }

    /// The members notice who is gone and who is back, and tell each other.
    pub(super) fn notice(&mut self) {
        let now = self.queue.now();
        if self.membership.planned != Some(now) {
            return;
        }
        self.membership.planned = None;
        self.membership.epoch += 1;
        let silent = |node: &crate::node::Node| node.joined && (!node.up || node.paused_until > now);
        let gone = self.nodes.iter().enumerate().filter(|(_, node)| silent(node)).map(|(no, _)| no as u32).collect();
        (self.membership.gone, self.membership.shared) = (gone, None);
        for no in 0..self.nodes.len() as u32 {
            let node = &self.nodes[no as usize];
            if node.up && node.joined && !node.stale {
                let life = node.life;
                let wait = self.rng.below(self.scenario.cluster.gossip.0.max(1));
                self.queue.after(wait, Happening::List { node: no, life });
            }
        }
    }

    /// A node says that a member does not answer. Whoever does answer refutes it; who is connected has time to do so.
    pub(super) fn suspected(&mut self, by: u32, peer: u32) {
        let now = self.queue.now();
        let node = &self.nodes[peer as usize];
        let answers = node.up && node.paused_until <= now && self.reaches(by, peer) && self.reaches(peer, by);
        if !answers && !self.membership.gone.contains(&peer) {
            let is_connected = self.nodes[by as usize].connected.contains(&peer);
            self.change_members(if is_connected { ANSWER_WAIT } else { 0 });
        }
    }

    /// A node comes into the cluster, or back: it connects to partners, and all hear of it.
    pub(super) fn join(&mut self, no: u32) {
        let node = &mut self.nodes[no as usize];
        node.up = true;
        if !std::mem::replace(&mut node.joined, true) {
            self.membership.shared = None;
        }
        if !self.has_swarm() {
            return;
        }
        self.tell_list(no);
        let others: Vec<u32> = (0..self.nodes.len() as u32)
            .filter(|other| *other != no && self.nodes[*other as usize].joined && self.reaches(no, *other))
            .collect();
        let wanted = (self.scenario.cluster.partners as usize).min(others.len());
        let mut tries = 0;
        let mut made = 0;
        while made < wanted && tries < wanted * 4 {
            tries += 1;
            let other = others[self.rng.below(others.len() as u64) as usize];
            let node = &self.nodes[no as usize];
            if !node.connected.contains(&other) && !node.dialing.contains_key(&other) {
                self.dial(no, other);
                made += 1;
            }
        }
    }

    /// Listens to what a peer has of a layer and gets, when that is worth it.
    pub(super) fn watch(&mut self, no: u32, layer: u16, peer: u32) {
        let shuns = self.shuns(no, peer);
        let here = &mut self.nodes[no as usize].layers[usize::from(layer)];
        if here.open && !shuns && here.watched.len() < WATCHED_MAX && here.watched.insert(peer) {
            self.say(no, peer, Word::Watch { layer });
        }
    }

    /// The layer is open here, and others may find that out.
    pub(super) fn provide(&mut self, no: u32, layer: u16) {
        let providers = &mut self.membership.providers[usize::from(layer)];
        providers.retain(|other| *other != no);
        if providers.len() >= PROVIDERS_MAX {
            providers.remove(0);
        }
        providers.push(no);
    }

    /// The DHT has answered: holders and neighbours are asked what they have.
    pub(super) fn found(&mut self, no: u32, layer: u16) {
        let mut holders: Vec<u32> = Vec::new();
        if self.has_swarm() {
            let known = self.membership.providers[usize::from(layer)].clone();
            let turn = self.rng.below(known.len().max(1) as u64) as usize;
            let found = known.iter().cycle().skip(turn).take(known.len()).copied().filter(|other| *other != no);
            holders.extend(found.take(HOLDERS_ENOUGH));
            let near: Vec<u32> = self.nodes[no as usize].connected.iter().copied().collect();
            holders.extend(near.into_iter().filter(|peer| !holders.contains(peer)).collect::<Vec<_>>());
            holders.truncate(HOLDERS_ENOUGH);
            holders.retain(|other| self.reaches(no, *other) && self.reaches(*other, no) && !self.shuns(no, *other));
        }
        let here = &mut self.nodes[no as usize].layers[usize::from(layer)];
        here.looking = holders.iter().copied().collect();
        if holders.is_empty() {
            return self.lookup_ends(no, layer);
        }
        for holder in holders {
            self.say(no, holder, Word::Have { layer });
        }
        let life = self.nodes[no as usize].life;
        self.queue.after(HAVE_TIMEOUT, Happening::LookupEnds { node: no, life, layer });
    }

    /// A holder has said what it has, or cannot any more.
    pub(super) fn holder_answered(&mut self, no: u32, layer: u16, holder: u32) {
        let here = &mut self.nodes[no as usize].layers[usize::from(layer)];
        if here.looking.remove(&holder) && here.looking.is_empty() {
            let layer = self.shape.layers[usize::from(layer)].diff_id;
            self.tell(no, Event::HoldersFound { layer });
        }
    }

    /// Nobody else is waited for. Says so once.
    pub(super) fn lookup_ends(&mut self, no: u32, layer: u16) {
        self.nodes[no as usize].layers[usize::from(layer)].looking.clear();
        let layer = self.shape.layers[usize::from(layer)].diff_id;
        self.tell(no, Event::HoldersFound { layer });
    }

    /// A peer has said that it has chunks.
    pub(super) fn heard_of(&mut self, no: u32, peer: u32, layer: u16, chunks: Runs) {
        let layer = self.shape.layers[usize::from(layer)].diff_id;
        self.tell(no, Event::PeerHas { peer: PeerNo(peer), layer, chunks });
    }
}
