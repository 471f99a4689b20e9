//! Where the chunks of a layer can come from at this moment.
//!
//! A survey says it for one layer and one class. It does not depend on a read, so that the reads of a layer share it
//! until an ask changes the loads.

use std::sync::Arc;

use hermes_image::ids::DiffId;

use super::{Flight, Turn};
use crate::class::Class;
use crate::event::{Action, OriginNo, PeerNo, Source};
use crate::peers::Readiness;
use crate::time::Instant;

use super::table::Lookup;

/// Whether the layer's registry may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OriginOffer {
    /// Now.
    Ready(OriginNo),
    /// When one of its asks ends, spans are known, or the driver says so: something else will wake us.
    Later,
    /// It rests.
    Resting(Instant),
    /// Its spans have to be asked for.
    NeedsSpans,
    /// It has none, or refused.
    Gone,
}

/// What there is to ask.
#[derive(Debug, Clone)]
pub(super) struct Survey {
    /// A local copy may begin.
    pub(super) local: bool,
    /// Holders that may be asked now.
    pub(super) ready: Vec<PeerNo>,
    /// Holders whose asks are all taken.
    pub(super) full: Vec<PeerNo>,
    /// Whether one of them has the whole layer.
    pub(super) full_has_all: bool,
    /// Holders that said when they will have time.
    pub(super) busy: Vec<(Instant, PeerNo)>,
    /// Holders that rest after a failure.
    pub(super) resting: Vec<PeerNo>,
    /// When the first of those that rest, or that refused, may be asked again.
    pub(super) resting_until: Option<Instant>,
    pub(super) origin: OriginOffer,
    /// Until when a search for holders is worth waiting for.
    pub(super) lookup_until: Option<Instant>,
    /// Whether every source that is not a holder has refused for good, so that a chunk that no holder has can come
    /// from nowhere.
    pub(super) dead_end: bool,
    /// Whether whose turn it is to read the registry is a question.
    pub(super) has_owners: bool,
    /// Whether one more ask is within the limits.
    pub(super) room: bool,
    /// Our own disk failed; nothing is asked before this time.
    pub(super) own_rest: Option<Instant>,
}

impl Survey {
    /// Whether no ask can be made, whatever is wanted; `patient` when what a full holder has is waited for.
    pub(super) fn is_exhausted(&self, patient: bool) -> bool {
        let origin = matches!(self.origin, OriginOffer::Ready(_)) && !(patient && self.full_has_all);
        self.own_rest.is_some() || !(self.local || !self.ready.is_empty() || origin || self.has_owners && self.room)
    }

    fn looks_again_at(&mut self, at: Instant) {
        self.resting_until = Some(self.resting_until.map_or(at, |first| first.min(at)));
    }

    /// Holders that cannot be asked now but may be later.
    pub(super) fn later(&self) -> impl Iterator<Item = PeerNo> + '_ {
        let busy = self.busy.iter().map(|(_, peer)| *peer);
        self.full.iter().copied().chain(self.resting.iter().copied()).chain(busy)
    }
}

impl Flight {
    /// What `class` may ask for `layer` now. Expires a search that brought no answer.
    pub(super) fn survey(&mut self, layer: DiffId, class: Class, now: Instant) -> Option<Survey> {
        let limits = &self.limits;
        let record = self.layers.get_mut(&layer)?;
        let room = self.total.has_room(class, &limits.total);
        let mut survey = Survey {
            local: room && !record.local.is_empty() && self.local.has_room(class, &limits.local),
            ready: Vec::new(),
            full: Vec::new(),
            full_has_all: false,
            busy: Vec::new(),
            resting: Vec::new(),
            resting_until: None,
            origin: OriginOffer::Gone,
            lookup_until: None,
            dead_end: false,
            has_owners: self.members.is_swarm() && record.geometry.span_count().is_some(),
            room,
            own_rest: record.own.resting(now),
        };
        for (peer, holder) in &record.holders {
            let denied = holder.denied_until.filter(|until| *until > now);
            if let Some(until) = denied {
                survey.looks_again_at(until);
            }
            if denied.is_some() || holder.is_empty() {
                continue;
            }
            if class == Class::Demand && self.peers.is_doubtful(*peer, now) {
                survey.resting.push(*peer);
                survey.looks_again_at(self.peers.doubts_end());
                continue;
            }
            match self.peers.readiness(*peer, class, now, limits) {
                Readiness::Ready if room => survey.ready.push(*peer),
                Readiness::Ready | Readiness::Full => {
                    survey.full.push(*peer);
                    survey.full_has_all |= holder.chunks.contains_all(0..record.geometry.chunk_count());
                }
                Readiness::Busy(until) => survey.busy.push((until, *peer)),
                Readiness::Resting(until) => {
                    survey.resting.push(*peer);
                    survey.looks_again_at(until);
                }
                Readiness::Gone => {}
            }
        }
        if let Lookup::Asked { at, .. } = record.lookup
            && now >= at + limits.lookup_end
        {
            record.lookup = Lookup::Ended { at: now };
        }
        if let Lookup::Asked { at, demand_waits } = record.lookup {
            survey.lookup_until = match class {
                Class::Prefetch => Some(at + limits.lookup_end),
                Class::Demand if demand_waits => Some(at + limits.lookup_wait),
                Class::Demand => None,
            };
        }
        survey.origin = self.origin_offer(layer, class, room, now);
        let record = self.layers.get(&layer)?;
        let origin_gone = record.origin.no.is_none() || record.origin.is_refused(now);
        let refused = record.troubles.values().any(|class| class.is_permanent());
        let searching = matches!(record.lookup, Lookup::Asked { .. }) || self.lookup_is_due(layer, now);
        survey.dead_end = origin_gone && !searching && (refused || record.origin.is_refused(now));
        Some(survey)
    }

    /// An ask has been booked: changes the surveys that still hold accordingly.
    pub(super) fn note_in_surveys(&mut self, source: Source, class: Class, now: Instant) {
        let Source::Peer(peer) = source else { return self.surveys.clear() };
        if !self.total.has_room(class, &self.limits.total) {
            return self.surveys.clear();
        }
        if self.peers.readiness(peer, class, now, &self.limits) == Readiness::Ready {
            return;
        }
        for (layer, survey) in &mut self.surveys {
            let Some(place) = survey.ready.iter().position(|other| *other == peer) else { continue };
            let survey = Arc::make_mut(survey);
            survey.ready.remove(place);
            let place = survey.full.partition_point(|other| *other < peer);
            survey.full.insert(place, peer);
            let record = self.layers.get(layer);
            let holder = record.and_then(|record| Some((record, record.holders.get(&peer)?)));
            survey.full_has_all |=
                holder.is_some_and(|(record, holder)| holder.chunks.contains_all(0..record.geometry.chunk_count()));
        }
    }

    pub(super) fn origin_offer(&self, layer: DiffId, class: Class, room: bool, now: Instant) -> OriginOffer {
        let Some(record) = self.layers.get(&layer) else { return OriginOffer::Gone };
        let origin = &record.origin;
        let Some(no) = origin.no.filter(|_| !origin.is_refused(now)) else { return OriginOffer::Gone };
        if !origin.usable {
            return OriginOffer::Later;
        }
        if record.geometry.span_count().is_none() {
            return match origin.spans_asked.map(|at| at + self.limits.spans_wait) {
                Some(until) if until > now => OriginOffer::Resting(until),
                _ => OriginOffer::NeedsSpans,
            };
        }
        let shared = self.origins.get(&no);
        let rest_until = shared.map(|shared| shared.rest_until).filter(|until| *until > now);
        if let Some(until) = origin.backoff.resting(now).max(rest_until) {
            return OriginOffer::Resting(until);
        }
        // A second reader of one stream would read all that comes before once more.
        let streaming = record.overtakable.iter().filter_map(|ask| self.asks.get(ask)).any(|ask| ask.whole_stream);
        let load = shared.map(|shared| shared.load).unwrap_or_default();
        if room && !streaming && load.has_room(class, &self.limits.origin) {
            OriginOffer::Ready(no)
        } else {
            OriginOffer::Later
        }
    }

    /// Whether holders of the layer should be searched for (again). A member of a swarm searches before its first connection
    /// stands: what it owns by its new list others may have had for long.
    pub(super) fn lookup_is_due(&self, layer: DiffId, now: Instant) -> bool {
        let can_ask = self.peers.any_up(now) || self.members.is_swarm();
        let Some(record) = self.layers.get(&layer).filter(|_| can_ask) else { return false };
        match record.lookup {
            Lookup::Never => true,
            Lookup::Asked { .. } => false,
            Lookup::Ended { at } if record.holders.is_empty() => now >= at + self.limits.lookup_negative,
            Lookup::Ended { at } => now >= at + self.limits.lookup_found,
        }
    }

    /// Searches for holders, if that is due.
    pub(super) fn look_up(&mut self, layer: DiffId, turn: &mut Turn<'_>) -> bool {
        if !self.lookup_is_due(layer, turn.now) {
            return false;
        }
        let Some(record) = self.layers.get_mut(&layer) else { return false };
        let demand_waits = std::mem::take(&mut record.search_is_worth_waiting);
        record.lookup = Lookup::Asked { at: turn.now, demand_waits };
        turn.out.push(Action::FindHolders { layer });
        true
    }
}
