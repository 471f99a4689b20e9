//! Who owns an extent, in which order, and from when on it is whose turn to read the registry.

use std::collections::BTreeMap;
use std::sync::Arc;

use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;

use super::Flight;
use crate::event::PeerNo;
use crate::geometry::LayerGeometry;
use crate::members::Duty;
use crate::time::{Duration, Instant};

/// Members behind the owners of an extent in order of rank, of whom the first that can be reached stands in for them when none
/// of them can. When a network parts in halves, those of one in 100,000 extents are all beyond; where nine in ten nodes are beyond,
/// of one in five.
const STANDBYS: usize = 13;

/// What this node owns of each layer that was asked about, under the present member list.
#[derive(Debug, Clone, Default)]
pub(super) struct KnownOwners {
    by_layer: BTreeMap<DiffId, OwnExtents>,
}

/// What this node owns first of a layer, as far as it was asked: every pass over a long prefetch asks for it, and finding
/// out means to look at each extent.
#[derive(Debug, Clone, Default)]
struct OwnExtents {
    /// Chunks of extents that were looked at.
    known: Runs,
    /// Of these, those that this node owns.
    own: Runs,
}

impl KnownOwners {
    /// They are others under another list.
    pub(super) fn forget(&mut self) {
        self.by_layer.clear();
    }

    /// The layer's extents are others, or it is closed.
    pub(super) fn forget_layer(&mut self, layer: &DiffId) {
        self.by_layer.remove(layer);
    }
}

impl Flight {
    /// The owners of the extent of `layer` that begins with chunk `start`, the one that acts first.
    pub(super) fn owners(&self, layer: DiffId, start: u32, duty: Duty) -> Arc<[PeerNo]> {
        self.members.owners(&layer, start, duty, self.limits.owner_ranks)
    }

    /// This node's rank among the owners of the extent.
    pub(super) fn rank(&self, layer: DiffId, extent: &ChunkRange, duty: Duty) -> Option<usize> {
        let me = self.members.me()?;
        self.owners(layer, extent.start, duty).iter().position(|owner| *owner == me)
    }

    /// Those who stand in for the owners among all members when none of these can be reached, in order of rank.
    fn standbys(&self, layer: DiffId, start: u32) -> impl Iterator<Item = PeerNo> + use<> {
        let ranks = self.limits.owner_ranks;
        let ranked = self.members.owners(&layer, start, Duty::Cluster, ranks + STANDBYS);
        (ranks..ranked.len()).filter_map(move |rank| ranked.get(rank).copied())
    }

    /// Those of the stand-ins of whom something is heard, this node among them if it is one.
    pub(super) fn live_standbys(&self, layer: DiffId, start: u32, now: Instant) -> impl Iterator<Item = PeerNo> {
        let me = self.members.me();
        self.standbys(layer, start).filter(move |peer| Some(*peer) == me || !self.is_away(*peer, now))
    }

    /// Whether nothing is heard of a peer while others are found silent.
    pub(super) fn is_away(&self, peer: PeerNo, now: Instant) -> bool {
        self.peers.is_lost(peer, now) || self.peers.is_doubtful(peer, now)
    }

    /// Whether others may rely on this node as an owner: it is one, or stands in for those of whom it hears nothing either.
    pub(super) fn acts_as_owner(&self, layer: DiffId, extent: &ChunkRange, duty: Duty, now: Instant) -> bool {
        let me = self.members.me();
        let stands_in = || {
            self.owners(layer, extent.start, duty).iter().all(|owner| self.is_away(*owner, now))
                && self.standbys(layer, extent.start).any(|peer| Some(peer) == me)
        };
        self.rank(layer, extent, duty).is_some() || (duty == Duty::Cluster && stands_in())
    }

    /// How many come before this node when it is to act: each has a rank wait. Whoever stands in for the owners comes first, as
    /// these were asked in vain.
    pub(super) fn ahead_of_me(&self, layer: DiffId, extent: &ChunkRange, duty: Duty, now: Instant) -> usize {
        let me = self.members.me();
        let place = || self.live_standbys(layer, extent.start, now).position(|peer| Some(peer) == me);
        self.rank(layer, extent, duty).or_else(place).unwrap_or(self.limits.owner_ranks)
    }

    /// The chunks of `wanted` in extents that this node owns first for the cluster. Each extent is looked at once for a list
    /// of members, however often it is asked about.
    pub(super) fn owned(&mut self, layer: DiffId, geometry: &LayerGeometry, wanted: &Runs) -> Runs {
        let mut extents = self.known_owners.by_layer.remove(&layer).unwrap_or_default();
        let unknown = wanted.difference(&extents.known);
        let mut at = 0;
        while let Some(chunk) = unknown.first_from(at) {
            let Some(extent) = geometry.extent_of(chunk, self.limits.extent_bytes) else { break };
            at = extent.end;
            extents.known.insert(extent.clone());
            if self.rank(layer, &extent, Duty::Cluster) == Some(0) {
                extents.own.insert(extent);
            }
        }
        let owned = wanted.intersection(&extents.own);
        self.known_owners.by_layer.insert(layer, extents);
        owned
    }

    /// How long a reader waits for the first word of a peer, which says at once that it works on what it was asked for.
    pub(super) fn first_word_wait(&self) -> Duration {
        (self.peers.latency_p90() * 3).max(self.limits.rank_wait_min)
    }

    /// How long a rank gives each one before it, and a reader a peer that has spoken: as long as peers take to answer, and those
    /// that send to send the next chunk.
    pub(super) fn rank_wait(&self) -> Duration {
        let pause = self.peers.pause_bound().min(self.limits.rank_wait_pause_max);
        self.first_word_wait().max(pause)
    }

    /// When it is the turn of whoever has `rank` others before it for what was first wanted at `since`.
    pub(super) fn turn_of(&self, since: Instant, rank: usize) -> Instant {
        since + self.rank_wait() * u32::try_from(rank).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Span;
    use crate::limits::Limits;
    use crate::members::{Member, Members, ZoneNo};

    const LAYER: DiffId = DiffId([3; 32]);

    fn list(epoch: u64, nodes: u32) -> Arc<Members> {
        let member = |no| Member { peer: PeerNo(no), key: u64::from(no) * 7919, zone: ZoneNo(0), eligible: true };
        Arc::new(Members::new(epoch, PeerNo(0), (0..nodes).map(member).collect()))
    }

    #[test]
    fn each_extent_is_looked_at_once_for_a_list_of_members() {
        let spans =
            (0..200).map(|no| Span { first_chunk: no * 8, blob_start: u64::from(no), blob_end: u64::from(no) + 1 });
        let geometry = LayerGeometry::new(std::iter::repeat_n(65_536, 1600))
            .and_then(|geometry| geometry.with_spans(spans.collect()));
        let geometry = geometry.expect("a layer");
        let mut flight = Flight::new(Limits::default());
        flight.members = list(1, 5);
        let wanted: Runs = (0..160).map(|no| no * 10..no * 10 + 2).collect();
        let by_extent = |flight: &mut Flight| {
            let mine = |chunk: &u32| {
                let extent = geometry.extent_of(*chunk, flight.limits.extent_bytes).expect("it has spans");
                flight.rank(LAYER, &extent, Duty::Cluster) == Some(0)
            };
            wanted.chunks().filter(mine).map(|chunk| chunk..chunk + 1).collect::<Runs>()
        };
        let owned = flight.owned(LAYER, &geometry, &wanted);
        assert_eq!(owned, by_extent(&mut flight));
        assert!(!owned.is_empty() && owned != wanted);
        // Nothing is looked up again: without members the answer is the same.
        let members = std::mem::take(&mut flight.members);
        assert_eq!(flight.owned(LAYER, &geometry, &wanted), owned);
        assert!(flight.members.is_empty() && members.is_swarm());
        // Another list has other owners, and other spans have other extents.
        flight.members = list(2, 2);
        flight.known_owners.forget();
        let more = flight.owned(LAYER, &geometry, &wanted);
        assert_eq!(more, by_extent(&mut flight));
        assert_ne!(more, owned);
        flight.known_owners.forget_layer(&LAYER);
        assert!(flight.known_owners.by_layer.is_empty());
    }
}
