//! The order of prefetch, and when it is not worth looking at.
//!
//! A start wants thousands of chunks in hundreds of runs, and facts come thousands of times a second, most of which change
//! nothing for most of them. So a layer whose prefetch found nothing to ask in a whole pass is **quiet**: it is passed over until
//! something changes that the pass has met. Its books say what that can be: a peer that could not be asked, the registry or
//! the disk that had no room, a time. What else there is (chunks that somebody has now, leases that ended, holders, members)
//! ends the quiet where it is noted, in `events`, `outcome` and `owners`; and no quiet lasts longer than
//! [`Limits::prefetch_pause`](crate::limits::Limits) while facts come in, so that what was overlooked here costs no more than that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;

use super::schedule::{Need, Prospect};
use super::sources::OriginOffer;
use super::{Flight, Turn};
use crate::class::Class;
use crate::event::{FailReason, PeerNo, ReadId};
use crate::peers::Readiness;
use crate::time::Instant;

/// Why a layer's prefetch cannot go on.
#[derive(Debug, Clone)]
pub(super) struct Quiet {
    /// It is looked at again from then on, whatever happens.
    until: Instant,
    /// When something changes by time alone.
    wake: Option<Instant>,
    /// Peers that have or own something and could not be asked.
    taken: BTreeSet<PeerNo>,
    /// Whether one of them had no room, so that others were not asked.
    full: bool,
    /// The registry had no room.
    origin: bool,
    /// Nor had the disk.
    local: bool,
    /// What was wanted and not asked for.
    wanted: Runs,
}

/// A layer, as far as this pass has come with it.
#[derive(Debug, Default)]
struct Passed {
    wake: Option<Instant>,
    taken: BTreeSet<PeerNo>,
    wanted: Runs,
    asked: bool,
}

impl Flight {
    pub(super) fn serve_prefetch(&mut self, turn: &mut Turn<'_>) {
        // Layers of which nothing can be asked: their further reads need not be looked at.
        let mut exhausted: BTreeSet<DiffId> = BTreeSet::new();
        let mut passed: BTreeMap<DiffId, Passed> = BTreeMap::new();
        let layers: Vec<DiffId> = self.reads.layers(Class::Prefetch).collect();
        for layer in &layers {
            if self.stays_quiet(*layer, turn.now) {
                exhausted.insert(*layer);
            }
        }
        let mut next = 0;
        while let Some((place, id)) = self.reads.at_or_after(Class::Prefetch, next) {
            next = place + 1;
            // An ask that ends makes room, and leads here again.
            if !self.total.has_room(Class::Prefetch, &self.limits.total) {
                return;
            }
            if exhausted.len() == layers.len() {
                break;
            }
            let Some(read) = self.reads.get(id).filter(|read| !exhausted.contains(&read.layer)) else { continue };
            let (class, since, place) = (Class::Prefetch, read.since, Some(read.place));
            let need = Need { layer: read.layer, class, since, place, acts_for: read.acts_for };
            self.serve_prefetch_read(id, &need, passed.entry(need.layer).or_default(), turn);
            if self.reads.get(id).is_some() && self.is_exhausted(&need, true, turn.now) {
                exhausted.insert(need.layer);
            }
        }
        for (layer, passed) in passed.into_iter().filter(|(_, passed)| !passed.asked) {
            self.quieten(layer, passed, turn.now);
        }
    }

    /// Asks for what one read wants, as far as it can be asked for.
    fn serve_prefetch_read(&mut self, id: ReadId, need: &Need, passed: &mut Passed, turn: &mut Turn<'_>) {
        let Some((read, record)) = self.reads.get(id).zip(self.layers.get(&need.layer)) else { return };
        let missing = read.missing.clone();
        let mut wanted = missing.difference(&record.leased);
        wanted.insert_all(&self.unsure(record, &missing, need.acts_for));
        if wanted.is_empty() {
            return;
        }
        passed.wanted.insert_all(&wanted);
        let (asks, others_wake) = (self.next_ask, self.wake.take());
        self.taken_owners.clear();
        let mut dead_end = false;
        for mut part in self.prefetch_order(need.layer, wanted) {
            // Spans are read whole: what one part asked for may have brought the edge of the next.
            if let Some(record) = self.layers.get(&need.layer) {
                let leased = record.leased.intersection(&part).difference(&self.unsure(record, &part, need.acts_for));
                part.remove_all(&leased);
            }
            dead_end |= self.place(need, part, turn) == Prospect::DeadEnd;
        }
        passed.asked |= self.next_ask > asks;
        passed.taken.append(&mut self.taken_owners);
        passed.wake = passed.wake.into_iter().chain(self.wake).min();
        self.wake = others_wake.into_iter().chain(self.wake).min();
        if dead_end {
            self.fail_read(id, FailReason::Refused, turn);
        }
    }

    /// Nothing was asked for a layer in a whole pass.
    fn quieten(&mut self, layer: DiffId, passed: Passed, now: Instant) {
        let Some(survey) = self.surveyed(layer, Class::Prefetch, now) else { return };
        let Passed { wake, mut taken, wanted, .. } = passed;
        taken.extend(survey.later());
        let is_full =
            |peer: &PeerNo| self.peers.readiness(*peer, Class::Prefetch, now, &self.limits) == Readiness::Full;
        let quiet = Quiet {
            until: now + self.limits.prefetch_pause,
            wake,
            full: taken.iter().any(is_full),
            taken,
            origin: survey.origin == OriginOffer::Later,
            local: !survey.local,
            wanted,
        };
        if let Some(record) = self.layers.get_mut(&layer) {
            record.quiet = Some(quiet);
        }
    }

    /// Whether nothing has changed for a quiet layer. Notes when that will be.
    fn stays_quiet(&mut self, layer: DiffId, now: Instant) -> bool {
        let Some(record) = self.layers.get_mut(&layer) else { return false };
        let Some(quiet) = record.quiet.take() else { return false };
        let peers = &self.peers;
        let ready = |peer: &PeerNo| peers.readiness(*peer, Class::Prefetch, now, &self.limits) == Readiness::Ready;
        let copies =
            quiet.local && !record.local.is_empty() && self.local.has_room(Class::Prefetch, &self.limits.local);
        let stays = now < quiet.until
            && quiet.wake.is_none_or(|at| at > now)
            && !copies
            && !quiet.taken.iter().any(ready)
            && !(quiet.origin && matches!(self.origin_offer(layer, Class::Prefetch, true, now), OriginOffer::Ready(_)));
        if stays {
            // Asks take a peer's room. When none is left, who had no room has failed and rests, so others are to be asked; and there is
            // none whose end would lead here.
            let has_failed = quiet.full && self.asks.is_empty();
            quiet.wake.into_iter().chain(has_failed.then_some(quiet.until)).for_each(|at| self.wake_at(at));
            if let Some(record) = self.layers.get_mut(&layer) {
                record.quiet = Some(quiet);
            }
        }
        stays
    }

    /// Something has changed for the prefetch of a layer.
    pub(super) fn stir(&mut self, layer: DiffId) {
        self.dirty = true;
        if let Some(record) = self.layers.get_mut(&layer) {
            record.quiet = None;
        }
    }

    /// Something has changed for the prefetch of all layers.
    pub(super) fn stir_all(&mut self) {
        self.dirty = true;
        self.layers.values_mut().for_each(|record| record.quiet = None);
    }

    /// A peer has more of a layer: what waits for it is asked for now, or when the peer can be asked.
    pub(super) fn stir_for(&mut self, layer: DiffId, peer: PeerNo, more: &Runs) {
        self.dirty = true;
        if let Some(record) = self.layers.get_mut(&layer)
            && let Some(quiet) = &mut record.quiet
            && quiet.wanted.first_common(more).is_some()
        {
            quiet.taken.insert(peer);
        }
    }

    /// What is prefetched in which order: first what this node owns, as others wait for it; then the rest from a place on that
    /// is another one on each node, so that nodes that start together fetch different chunks and trade.
    fn prefetch_order(&mut self, layer: DiffId, wanted: Runs) -> Vec<Runs> {
        let record = self.layers.get(&layer).filter(|_| self.members.is_swarm());
        let Some(geometry) = record.map(|record| Arc::clone(&record.geometry)) else { return vec![wanted] };
        let own = self.owned(layer, &geometry, &wanted);
        let rest = wanted.difference(&own);
        let Some(first) = rest.first().map(|run| run.start) else { return vec![own] };
        let end = rest.iter().next_back().map_or(first, |run| run.end);
        let pivot = first + self.members.rotation(&layer, end - first);
        // Extents are not torn: their spans would be read twice.
        let pivot = geometry.extent_of(pivot, self.limits.extent_bytes).map_or(pivot, |extent| extent.start.max(first));
        [own, rest.within(pivot..end), rest.within(first..pivot)].into_iter().filter(|part| !part.is_empty()).collect()
    }
}
