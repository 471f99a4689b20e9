//! The member list as the rest of the node sees it.

use std::sync::Arc;

use libp2p::{Multiaddr, PeerId};

use super::entry::word_of;
use crate::admission::certificate::Zone;

/// A node of the cluster, as it says itself; whether it is suspected is what others say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub peer: PeerId,
    /// The first eight bytes, little endian, of the BLAKE3 hash of its name's bytes: the same on all nodes.
    pub key: u64,
    /// Where it may be reached.
    pub addresses: Vec<Multiaddr>,
    /// Its zone; empty where nobody has named zones.
    pub zone: Zone,
    /// It is about to leave and wants nothing new.
    pub drain: bool,
    /// It has no room for more.
    pub full: bool,
    /// Somebody could not reach it, it has not answered to that, and this node has no connection to it.
    pub suspected: bool,
    /// When its certificate ends, in seconds since 1970; none in an open swarm.
    pub certificate_until: Option<u64>,
}

impl Member {
    /// Whether it may own anything: it does not leave, has room, and nobody suspects it to be gone.
    pub fn eligible(&self) -> bool {
        !self.drain && !self.full && !self.suspected
    }

    /// [`Self::key`] of a peer.
    pub fn key_of(peer: &PeerId) -> u64 {
        word_of(&peer.to_bytes())
    }
}

/// One version of the member list. This node is always in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberList {
    epoch: u64,
    me: usize,
    members: Vec<Arc<Member>>,
}

impl MemberList {
    /// The list of `members`, of which `me` is one.
    ///
    /// # Panics
    /// When `me` is not among them.
    pub(crate) fn new(mut members: Vec<Arc<Member>>, me: &PeerId) -> Self {
        members.sort_unstable_by_key(|member| member.peer);
        let me = members.binary_search_by_key(me, |member| member.peer).expect("this node is a member");
        let mut hasher = blake3::Hasher::new();
        for member in &members {
            // What follows the zone has a fixed length, so no two lists have the same bytes.
            hasher.update(&member.peer.to_bytes()).update(&[member.zone.as_str().len() as u8]);
            hasher.update(member.zone.as_str().as_bytes()).update(&[u8::from(member.eligible())]);
        }
        let hash = hasher.finalize();
        let (word, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
        Self { epoch: u64::from_le_bytes(*word), me, members }
    }

    /// A hash of who is a member, in which zone, and eligible: lists that agree on that have the same epoch on all nodes.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// This node.
    pub fn me(&self) -> &Member {
        &self.members[self.me]
    }

    /// All members, this node among them, in the order of their names.
    pub fn members(&self) -> &[Arc<Member>] {
        &self.members
    }

    /// The member of that name.
    pub fn get(&self, peer: &PeerId) -> Option<&Arc<Member>> {
        let at = self.members.binary_search_by_key(peer, |member| member.peer).ok()?;
        self.members.get(at)
    }

    /// How many there are, at least one.
    pub fn count(&self) -> usize {
        self.members.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(peer: PeerId, zone: &str) -> Member {
        let zone = zone.parse().expect("a zone");
        Member {
            key: Member::key_of(&peer),
            peer,
            addresses: Vec::new(),
            zone,
            drain: false,
            full: false,
            suspected: false,
            certificate_until: None,
        }
    }

    fn list(members: &[Member], me: PeerId) -> MemberList {
        MemberList::new(members.iter().cloned().map(Arc::new).collect(), &me)
    }

    #[test]
    fn equal_lists_have_equal_epochs_whoever_looks_and_in_whatever_order() {
        let (one, two) = (member(PeerId::random(), "a"), member(PeerId::random(), "b"));
        let first = list(&[one.clone(), two.clone()], one.peer);
        let second = list(&[two.clone(), one.clone()], two.peer);
        assert_eq!(first.epoch(), second.epoch());
        assert_eq!((first.me().peer, second.me().peer), (one.peer, two.peer));
        assert_eq!(first.get(&two.peer).map(|member| member.peer), Some(two.peer));

        let change = |change: fn(&mut Member)| {
            let mut two = two.clone();
            change(&mut two);
            list(&[one.clone(), two], one.peer).epoch()
        };
        assert_ne!(change(|member| member.drain = true), first.epoch());
        assert_ne!(change(|member| member.suspected = true), first.epoch());
        assert_ne!(change(|member| member.zone = "c".parse().expect("a zone")), first.epoch());
        // Neither where it is nor until when it may stay changes who owns what.
        assert_eq!(change(|member| member.addresses.push(Multiaddr::empty())), first.epoch());
        assert_eq!(change(|member| member.certificate_until = Some(1)), first.epoch());
        assert_ne!(list(std::slice::from_ref(&one), one.peer).epoch(), first.epoch());
    }
}
