//! Which reads are not worth looking at.
//!
//! Facts come thousands of times a second, and each leads to a pass over all reads of demand; most of them wait for what is under
//! way, or for a peer that said when it will have time, and nothing has changed for them. Such a read **rests** until something
//! happens in its layer (an ask begins or ends, a peer has more), until a peer that it waits for may have room, or until a time that
//! the pass has found. No rest is longer than [`REST_MAX`], so that what was overlooked here costs a reader no more than that.

use std::collections::BTreeSet;

use hermes_image::runs::Runs;

use super::Flight;
use super::schedule::Need;
use super::sources::OriginOffer;
use super::table::Layer;
use crate::event::PeerNo;
use crate::members::Duty;
use crate::peers::Readiness;
use crate::time::{Duration, Instant};

/// Longest rest: a twentieth of what a reader notices (0.2 s).
const REST_MAX: Duration = Duration::from_millis(10);

/// Why a read cannot be asked for now.
#[derive(Debug, Clone)]
pub(super) struct Rest {
    /// [`Layer::changes`] when it began.
    changes: u64,
    /// When something changes by time alone.
    wake: Option<Instant>,
    /// It ends then, whatever happens.
    until: Instant,
    /// Peers that have or own what it waits for and could not be asked, in order.
    waits_for: Vec<PeerNo>,
}

impl Rest {
    /// Whether it goes on, when these peers may have room again.
    pub(super) fn goes_on(&self, layer: &Layer, freed: &BTreeSet<PeerNo>, now: Instant) -> bool {
        self.changes == layer.changes
            && now < self.until
            && self.wake.is_none_or(|at| now < at)
            && !freed.iter().any(|peer| self.waits_for.binary_search(peer).is_ok())
    }

    /// When something changes by time alone.
    pub(super) fn wake(&self) -> Option<Instant> {
        self.wake
    }
}

impl Flight {
    /// The rest of a read for which all was asked that could be; `None` when it may be worth looking at soon. `wake` is when
    /// something changes for it by time alone.
    pub(super) fn rest(&self, need: &Need, missing: &Runs, wake: Option<Instant>, now: Instant) -> Option<Rest> {
        let record = self.layers.get(&need.layer)?;
        let mut rest = Rest { changes: record.changes, wake, until: now + REST_MAX, waits_for: Vec::new() };
        let mut left = missing.difference(&record.leased);
        left.insert_all(&self.unsure(record, missing, need.acts_for));
        if left.is_empty() {
            return Some(rest);
        }
        // Room among all asks, on the disk and at the registry comes with asks of other layers, too.
        let has_room = self.total.has_room(need.class, &self.limits.total) && record.local.is_empty();
        if !has_room || self.origin_offer(need.layer, need.class, true, now) == OriginOffer::Later {
            return None;
        }
        let asker = self.asker(need);
        let offers = |peer: &&PeerNo| {
            record.holders.get(*peer).is_some_and(|holder| holder.first_offered(&left, asker).is_some())
        };
        let mut waits_for: Vec<PeerNo> = record.holders.keys().filter(offers).copied().collect();
        let mut at = 0;
        while let Some(chunk) = left.first_from(at) {
            let Some(extent) = record.geometry.extent_of(chunk, self.limits.extent_bytes) else { break };
            at = extent.end;
            for duty in [Duty::Zone, Duty::Cluster] {
                waits_for.extend(self.owners(need.layer, extent.start, duty).iter());
            }
        }
        waits_for.retain(|peer| self.peers.readiness(*peer, need.class, now, &self.limits) != Readiness::Ready);
        waits_for.sort_unstable();
        waits_for.dedup();
        rest.waits_for = waits_for;
        Some(rest)
    }
}
