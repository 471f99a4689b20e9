//! The numbers by which the policy knows peers, zones and registries.

use std::collections::{BTreeMap, HashMap, HashSet};

use hermes_p2p::{MemberList, PeerId};
use hermes_policy::event::{OriginNo, PeerNo};
use hermes_policy::members::{Member, Members, ZoneNo};

/// Peers whose numbers are remembered beside the members: four times as many as may be connected, so that one that comes
/// back soon is the same to the policy. The swarm itself remembers whom it has banned.
const NUMBERED_PEERS_MAX: usize = 1024;

/// Numbers for peers, as the policy wants them; never given twice.
#[derive(Default)]
pub(super) struct PeerNumbers {
    by_id: HashMap<PeerId, PeerNo>,
    /// The peer, and whether it is connected.
    by_no: BTreeMap<PeerNo, (PeerId, bool)>,
    members: HashSet<PeerNo>,
    zones: BTreeMap<String, ZoneNo>,
    next: u32,
}

impl PeerNumbers {
    /// The number of `peer`.
    pub(super) fn number(&mut self, peer: PeerId) -> PeerNo {
        if let Some(no) = self.by_id.get(&peer) {
            return *no;
        }
        let may_go = |no: &PeerNo, up: bool| !up && !self.members.contains(no);
        if self.by_no.len() >= NUMBERED_PEERS_MAX + self.members.len()
            && let Some(oldest) = self.by_no.iter().find(|(no, (_, up))| may_go(no, *up)).map(|(no, _)| *no)
            && let Some((gone, _)) = self.by_no.remove(&oldest)
        {
            self.by_id.remove(&gone);
        }
        let no = PeerNo(self.next);
        // After four thousand million peers they begin anew: the first ones are long forgotten.
        self.next = self.next.wrapping_add(1);
        self.by_id.insert(peer, no);
        self.by_no.insert(no, (peer, false));
        no
    }

    /// Notes whether `peer` is connected.
    pub(super) fn set_up(&mut self, peer: PeerId, up: bool) -> PeerNo {
        let no = self.number(peer);
        self.by_no.insert(no, (peer, up));
        no
    }

    /// The number of `peer`, if it has one.
    pub(super) fn known(&self, peer: &PeerId) -> Option<PeerNo> {
        self.by_id.get(peer).copied()
    }

    /// The peer with the number.
    pub(super) fn id(&self, no: PeerNo) -> Option<PeerId> {
        self.by_no.get(&no).map(|(peer, _)| *peer)
    }

    /// The list in the policy's words.
    pub(super) fn members(&mut self, list: &MemberList) -> Members {
        self.members.clear();
        let zones = &mut self.zones;
        let places: Vec<ZoneNo> = list
            .members()
            .iter()
            .map(|member| {
                let next = ZoneNo(zones.len() as u32);
                *zones.entry(member.zone.as_str().to_owned()).or_insert(next)
            })
            .collect();
        let mut members = Vec::with_capacity(list.count());
        for (member, zone) in list.members().iter().zip(places) {
            let peer = self.number(member.peer);
            self.members.insert(peer);
            members.push(Member { peer, key: member.key, zone, eligible: member.eligible() });
        }
        // Zones of members that are gone.
        if self.zones.len() > members.len() + ZONES_KEPT {
            self.zones.clear();
            return self.members(list);
        }
        let me = self.number(list.me().peer);
        Members::new(list.epoch(), me, members)
    }
}

/// Names of zones without members that are remembered.
const ZONES_KEPT: usize = 64;

/// The number by which the policy knows a registry host: hosts share limits and `Retry-After`, layers do not.
#[derive(Debug, Default)]
pub struct OriginNumbers {
    hosts: BTreeMap<String, OriginNo>,
}

impl OriginNumbers {
    /// The number of `host`.
    pub fn number(&mut self, host: &str) -> OriginNo {
        let next = OriginNo(self.hosts.len() as u32);
        *self.hosts.entry(host.to_owned()).or_insert(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_numbers_are_bounded_and_never_given_twice() {
        let mut numbers = PeerNumbers::default();
        let first = PeerId::random();
        let kept = numbers.set_up(first, true);
        let mut seen = std::collections::BTreeSet::from([kept]);
        for _ in 0..NUMBERED_PEERS_MAX + 100 {
            let peer = PeerId::random();
            assert!(seen.insert(numbers.set_up(peer, true)), "a number is given twice");
            numbers.set_up(peer, false);
        }
        assert_eq!((numbers.by_id.len(), numbers.by_no.len()), (NUMBERED_PEERS_MAX, NUMBERED_PEERS_MAX));
        assert_eq!((numbers.number(first), numbers.id(kept)), (kept, Some(first)), "connected peers keep theirs");
    }
}
