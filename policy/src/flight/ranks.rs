//! Who owns an extent, in which order, and from when on it is whose turn to read the registry.

use std::collections::BTreeMap;
use std::sync::Arc;

use hermes_image::ids::{ChunkRange, DiffId};

use super::Flight;
use crate::event::PeerNo;
use crate::members::Duty;
use crate::time::{Duration, Instant};

/// The owners of extents that were looked up under the present member list: finding them looks at every member, and every
/// pass over what is wanted asks for them.
#[derive(Debug, Clone, Default)]
pub(super) struct KnownOwners {
    by_extent: BTreeMap<(DiffId, u32, Duty), Arc<[PeerNo]>>,
}

impl KnownOwners {
    /// They are others under another list.
    pub(super) fn forget(&mut self) {
        self.by_extent.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.by_extent.len()
    }
}

impl Flight {
    /// The owners of the extent of `layer` that begins with chunk `start`, the one that acts first.
    pub(super) fn owners(&mut self, layer: DiffId, start: u32, duty: Duty) -> Arc<[PeerNo]> {
        if let Some(owners) = self.known_owners.by_extent.get(&(layer, start, duty)) {
            return Arc::clone(owners);
        }
        let owners: Arc<[PeerNo]> = self.members.owners(&layer, start, duty, self.limits.owner_ranks).into();
        if self.known_owners.len() >= self.limits.known_owners {
            self.known_owners.forget();
        }
        self.known_owners.by_extent.insert((layer, start, duty), Arc::clone(&owners));
        owners
    }

    /// This node's rank among the owners of the extent.
    pub(super) fn rank(&mut self, layer: DiffId, extent: &ChunkRange, duty: Duty) -> Option<usize> {
        let me = self.members.me()?;
        self.owners(layer, extent.start, duty).iter().position(|owner| *owner == me)
    }

    /// How long a rank gives each one before it.
    pub(super) fn rank_wait(&self) -> Duration {
        (self.peers.latency_p90() * 3).max(self.limits.rank_wait_min)
    }

    /// When it is the turn of `rank` for what was first wanted at `since`.
    pub(super) fn turn_of(&self, since: Instant, rank: usize) -> Instant {
        since + self.rank_wait() * u32::try_from(rank).unwrap_or(u32::MAX)
    }
}
