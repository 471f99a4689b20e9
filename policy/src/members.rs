//! Who is in the cluster, and who owns what.
//!
//! An extent of a layer has owners: the members with the highest random weight for it (Thaler and Ravishankar 1998), in
//! order. Every node computes them from its own member list, so nobody is asked, and a member that comes or goes moves
//! only its own extents. Equal layers of different images have the same owners, because the layer's name and nothing of
//! the image goes into the weight.
//!
//! Lists differ for a while; what follows from that is bounded by the ranks' delays (`flight/owners.rs`), not by agreement.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use hermes_image::ids::DiffId;
use serde::{Deserialize, Serialize};

use crate::event::PeerNo;

/// A zone (rack, availability zone), by the driver's own number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ZoneNo(pub u32);

/// For whom an owner acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Duty {
    /// For the members of its zone: it asks the owner among all.
    Zone,
    /// For the whole cluster: it asks the registry.
    Cluster,
}

/// A member of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its number.
    pub peer: PeerNo,
    /// A number that follows from its name alone and is the same on all nodes: the first eight bytes of a hash of it.
    pub key: u64,
    /// Its zone.
    pub zone: ZoneNo,
    /// Whether it may own anything: it does not leave, has room, and nobody suspects it to be dead.
    pub eligible: bool,
}

/// One version of the member list, this node in it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Members {
    epoch: u64,
    me: Option<Member>,
    roster: Arc<Roster>,
}

/// The members of one version, and who was found to own what: the same for all who have it, and shared by them where they are
/// in one process.
#[derive(Debug, Default)]
struct Roster {
    /// In order of their numbers.
    members: Box<[Member]>,
    eligible: usize,
    zones: usize,
    /// Owners that were asked for: finding them looks at every member, and every pass over what is wanted asks for them.
    known: Mutex<BTreeMap<OwnedPart, Arc<[PeerNo]>>>,
}

/// An extent, the zone whose owners are meant, and how many.
type OwnedPart = (u64, Option<ZoneNo>, usize);

/// Extents whose owners are remembered: three images of 10 GB that are read at once, 100 bytes each.
const KNOWN_MAX: usize = 8192;

impl PartialEq for Roster {
    /// What was found out follows from the members.
    fn eq(&self, other: &Self) -> bool {
        self.members == other.members
    }
}

impl Eq for Roster {}

/// [`Members`] as they are written down: the rest follows from it.
#[derive(Serialize, Deserialize)]
struct Written {
    epoch: u64,
    me: Option<PeerNo>,
    members: Vec<Member>,
}

impl From<Members> for Written {
    fn from(list: Members) -> Self {
        Self { epoch: list.epoch, me: list.me(), members: list.roster.members.to_vec() }
    }
}

impl From<Written> for Members {
    fn from(written: Written) -> Self {
        // A number that nobody has stands for a node that is not in its own list.
        Self::new(written.epoch, written.me.unwrap_or(PeerNo(u32::MAX)), written.members)
    }
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit of the input changes every bit of the output with a
/// chance of one half.
pub(crate) const fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The extent of `layer` that begins with chunk `start`, as one word.
fn extent_key(layer: &DiffId, start: u32) -> u64 {
    let mut word = [0; 8];
    // A hash already: any eight bytes do.
    word.copy_from_slice(&layer.0[..8]);
    mix(u64::from_le_bytes(word).wrapping_add(u64::from(start)))
}

impl Members {
    /// The list of version `epoch`; `me` is this node's number. A node that is not in its own list owns nothing.
    pub fn new(epoch: u64, me: PeerNo, members: Vec<Member>) -> Self {
        let mut members = members;
        members.sort_unstable_by_key(|member| member.peer);
        let eligible = || members.iter().filter(|member| member.eligible);
        let mut zones: Vec<ZoneNo> = eligible().map(|member| member.zone).collect();
        zones.sort_unstable();
        zones.dedup();
        let (eligible, zones) = (eligible().count(), zones.len());
        let roster = Roster { members: members.into(), eligible, zones, known: Mutex::default() };
        Self { epoch, me: None, roster: Arc::new(roster) }.seen_by(me)
    }

    /// The same list, as another member has it. Both share the members.
    pub fn seen_by(&self, me: PeerNo) -> Self {
        Self { epoch: self.epoch, me: self.find(me).copied(), roster: Arc::clone(&self.roster) }
    }

    fn find(&self, peer: PeerNo) -> Option<&Member> {
        let members = &self.roster.members;
        members.binary_search_by_key(&peer, |member| member.peer).ok().and_then(|place| members.get(place))
    }

    /// Whether the peer is a member.
    pub fn contains(&self, peer: PeerNo) -> bool {
        self.find(peer).is_some()
    }

    /// The version.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// This node's number, when it is in the list.
    pub fn me(&self) -> Option<PeerNo> {
        self.me.map(|me| me.peer)
    }

    /// The members, in order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = &Member> {
        self.roster.members.iter()
    }

    /// Number of members, this node among them.
    pub fn len(&self) -> usize {
        self.roster.members.len()
    }

    /// Whether nobody is known.
    pub fn is_empty(&self) -> bool {
        self.roster.members.is_empty()
    }

    /// Whether this node is a member beside others that may own something.
    pub fn is_swarm(&self) -> bool {
        self.me.is_some_and(|me| self.roster.eligible > usize::from(me.eligible))
    }

    /// Whether zones have owners of their own.
    pub fn has_zones(&self) -> bool {
        self.roster.zones > 1
    }

    /// Whether the peer is a member in another zone than this node's, where zones have owners of their own.
    pub fn is_far(&self, peer: PeerNo) -> bool {
        let zones = || Some((self.me?.zone, self.find(peer)?.zone));
        self.has_zones() && zones().is_some_and(|(mine, other)| mine != other)
    }

    /// The first `count` owners of the extent that begins with chunk `start`, the one that acts first. For [`Duty::Zone`]
    /// they are of this node's zone. They are looked for once while this version of the list lives.
    pub fn owners(&self, layer: &DiffId, start: u32, duty: Duty, count: usize) -> Arc<[PeerNo]> {
        let key = extent_key(layer, start);
        let zone = match (duty, self.me) {
            (Duty::Cluster, _) => None,
            (Duty::Zone, Some(me)) => Some(me.zone),
            (Duty::Zone, None) => return Arc::default(),
        };
        // Nothing can be left half done by a panic: what is in the map is right.
        let mut known = self.roster.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(owners) = known.get(&(key, zone, count)) {
            return Arc::clone(owners);
        }
        let owners: Arc<[PeerNo]> = self.find_owners(key, zone, count).into();
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert((key, zone, count), Arc::clone(&owners));
        owners
    }

    fn find_owners(&self, key: u64, zone: Option<ZoneNo>, count: usize) -> Vec<PeerNo> {
        let mut first: Vec<(u64, PeerNo)> = Vec::with_capacity(count + 1);
        let members = self.roster.members.iter().filter(|member| member.eligible);
        for member in members.filter(|member| zone.is_none_or(|zone| zone == member.zone)) {
            let weight = mix(member.key ^ key);
            let place = first.partition_point(|(other, _)| *other >= weight);
            if place < count {
                first.insert(place, (weight, member.peer));
                first.truncate(count);
            }
        }
        first.into_iter().map(|(_, peer)| peer).collect()
    }

    /// A number below `bound` that is another one on each node, for orders that begin somewhere else on each; 0 for a
    /// bound of 0.
    pub fn rotation(&self, layer: &DiffId, bound: u32) -> u32 {
        let word = mix(self.me.map_or(0, |me| me.key) ^ extent_key(layer, u32::MAX));
        ((u128::from(word) * u128::from(bound)) >> 64) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: DiffId = DiffId([7; 32]);

    fn members(count: u32, zones: u32) -> Vec<Member> {
        let member = |no: u32| Member {
            peer: PeerNo(no),
            key: mix(u64::from(no) + 1),
            zone: ZoneNo(no % zones),
            eligible: true,
        };
        (0..count).map(member).collect()
    }

    #[test]
    fn owners_are_the_same_on_all_nodes_and_spread_evenly() {
        let count = 100;
        let mut owned = vec![0_u32; count as usize];
        for extent in 0..10_000 {
            let list = |me| Members::new(1, PeerNo(me), members(count, 1));
            let owners = list(0).owners(&LAYER, extent, Duty::Cluster, 3);
            assert_eq!(owners.len(), 3);
            assert_eq!(owners, list(99).owners(&LAYER, extent, Duty::Cluster, 3));
            owned[owners[0].0 as usize] += 1;
        }
        // Poisson with mean 100: five standard deviations either way.
        assert!(owned.iter().all(|owned| (50..=150).contains(owned)), "{owned:?}");
    }

    #[test]
    fn who_leaves_moves_its_own_extents_only_and_to_the_next_rank() {
        let before = Members::new(1, PeerNo(0), members(20, 1));
        let mut left = members(20, 1);
        left[7].eligible = false;
        let after = Members::new(2, PeerNo(0), left);
        for extent in 0..1000 {
            let [old, new] = [&before, &after].map(|list| list.owners(&LAYER, extent, Duty::Cluster, 3));
            let expected: Vec<PeerNo> = old.iter().copied().filter(|peer| *peer != PeerNo(7)).collect();
            assert_eq!(new[..expected.len()], expected);
        }
    }

    #[test]
    fn zone_owners_are_of_the_zone_and_the_cluster_owner_is_its_own_zones() {
        for extent in 0..300 {
            let of = |me| Members::new(1, PeerNo(me), members(12, 3));
            let cluster = of(0).owners(&LAYER, extent, Duty::Cluster, 1)[0];
            let zone = of(cluster.0).owners(&LAYER, extent, Duty::Zone, 1)[0];
            assert_eq!(zone, cluster);
            for me in 0..12 {
                let owners = of(me).owners(&LAYER, extent, Duty::Zone, 3);
                assert!(owners.len() == 3 && owners.iter().all(|owner| owner.0 % 3 == me % 3));
            }
        }
        assert!(Members::new(1, PeerNo(0), members(12, 3)).has_zones());
    }

    #[test]
    fn a_node_that_is_alone_or_no_member_is_no_swarm() {
        assert!(!Members::default().is_swarm());
        assert!(!Members::new(1, PeerNo(0), members(1, 1)).is_swarm());
        assert!(!Members::new(1, PeerNo(9), members(2, 1)).is_swarm());
        assert!(Members::new(1, PeerNo(0), members(2, 1)).is_swarm());
        let mut draining = members(2, 1);
        draining[1].eligible = false;
        assert!(!Members::new(1, PeerNo(0), draining).is_swarm());
        let (list, other) = (Members::new(1, PeerNo(0), members(3, 1)), Members::new(1, PeerNo(2), members(3, 1)));
        assert_eq!(list.seen_by(PeerNo(2)), other);
        assert!(list.contains(PeerNo(2)) && !list.contains(PeerNo(3)) && !list.seen_by(PeerNo(3)).is_swarm());
    }

    #[test]
    fn rotations_differ() {
        let at = |me| Members::new(1, PeerNo(me), members(64, 1)).rotation(&LAYER, 1000);
        let mut places: Vec<u32> = (0..64).map(at).collect();
        assert!(places.iter().all(|place| *place < 1000));
        places.sort_unstable();
        places.dedup();
        assert!(places.len() > 55, "{places:?}");
        assert_eq!(Members::default().rotation(&LAYER, 0), 0);
    }
}
