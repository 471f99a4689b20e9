//! Who is asked for what, now.
//!
//! One pass serves demand in order of arrival, then readahead, then prefetch in the order given, as long as sources
//! have room. What cannot be asked yet leaves behind the time at which to look again; what needs no time leaves
//! nothing, because the fact that frees it (an ask that ends, a peer that comes) starts a pass of its own.

use std::collections::BTreeSet;
use std::sync::Arc;

use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;

use super::asking::{Question, Target};
use super::resting::Rest;
use super::shape::cut_chunks;
use super::sources::{OriginOffer, Survey};
use super::table::{Asker, Certainty, Layer, Lookup};
use super::{Flight, Turn, Wake};
use crate::class::Class;
use crate::event::{Action, FailReason, PeerNo, ReadId, Reason};
use crate::members::Duty;
use crate::time::Instant;

/// Who wants chunks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Need {
    pub(super) layer: DiffId,
    pub(super) class: Class,
    pub(super) since: Instant,
    /// The place of the read in its queue; readahead has none.
    pub(super) place: Option<u64>,
    /// For whom this node acts as an owner.
    pub(super) acts_for: Option<Duty>,
}

/// What a read can expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prospect {
    /// All of it was asked for, or will be.
    Good,
    /// Some of it can come from nowhere.
    DeadEnd,
}

impl Flight {
    /// What matters of a need to what holders offer.
    pub(super) fn asker(&self, need: &Need) -> Asker {
        let is_patient = need.class == Class::Prefetch || self.now < self.far_after(need);
        let can_wait = is_patient && self.can_read(need.layer);
        Asker { acts_for_others: need.acts_for.is_some(), can_wait }
    }

    /// From when on a reader asks other zones itself, rather than wait for the own zone's owner.
    fn far_after(&self, need: &Need) -> Instant {
        need.since + self.limits.rank_wait_min
    }

    pub(super) fn pump(&mut self, turn: &mut Turn<'_>) {
        self.wake = Wake::default();
        self.surveys.clear();
        let mut freed = std::mem::take(&mut self.freed);
        self.serve_demand(&freed, turn);
        self.surveys.clear();
        self.serve_ahead(&freed, turn);
        self.freed_for_prefetch.append(&mut freed);
        self.serve_prefetch(turn);
        self.surveys.clear();
        self.hedge(turn);
        self.take_back_promises(turn);
        self.tell_rests(turn);
    }

    fn serve_demand(&mut self, freed: &BTreeSet<PeerNo>, turn: &mut Turn<'_>) {
        // Layers of which nothing can be asked. Their further reads came later, so that they have no reason to look
        // again sooner than the one that found it out.
        let mut exhausted: BTreeSet<DiffId> = BTreeSet::new();
        let layers = self.reads.layers(Class::Demand).count();
        let mut next = 0;
        while let Some((place, id)) = self.reads.at_or_after(Class::Demand, next) {
            next = place + 1;
            if exhausted.len() == layers {
                break;
            }
            let Some(read) = self.reads.get(id).filter(|read| !exhausted.contains(&read.layer)) else { continue };
            if let Some(rest) = self.rests(read.layer, read.rest.as_ref(), freed, turn.now) {
                rest.into_iter().for_each(|at| self.wake_at(at));
                continue;
            }
            let others_wake = std::mem::take(&mut self.wake);
            let Some((need, wanted)) = self.wanted_by_demand(id, turn.now) else { continue };
            let asks = !wanted.is_empty();
            let far_after = self.far_after(&need);
            if self.members.has_zones() && turn.now < far_after {
                self.wake_at(far_after);
            }
            if asks && self.place(&need, wanted, turn) == Prospect::DeadEnd {
                self.fail_read(id, FailReason::Refused, turn);
                self.wake = self.wake.or(others_wake);
                continue;
            }
            let missing = self.reads.get(id).map(|read| read.missing.clone()).unwrap_or_default();
            let rest = self.rest(&need, &missing, self.wake.first(), turn.now);
            self.wake = self.wake.or(others_wake);
            if let Some(read) = self.reads.get_mut(id) {
                read.rest = rest;
            }
            let patient = turn.now < need.since + self.limits.full_patience;
            if asks && self.is_exhausted(&need, patient, turn.now) {
                exhausted.insert(need.layer);
            }
        }
    }

    /// Whether a rest of this layer goes on, and until when.
    fn rests(
        &self,
        layer: DiffId,
        rest: Option<&Rest>,
        freed: &BTreeSet<PeerNo>,
        now: Instant,
    ) -> Option<Option<Instant>> {
        let (rest, record) = rest.zip(self.layers.get(&layer))?;
        rest.goes_on(record, freed, now).then(|| rest.wake())
    }

    fn serve_ahead(&mut self, freed: &BTreeSet<PeerNo>, turn: &mut Turn<'_>) {
        let layers: Vec<DiffId> = self.ahead_layers.iter().copied().collect();
        for layer in layers {
            let Some(record) = self.layers.get(&layer) else { continue };
            if let Some(rest) = self.rests(layer, record.ahead_rest.as_ref(), freed, turn.now) {
                rest.into_iter().for_each(|at| self.wake_at(at));
                continue;
            }
            let wanted = record.ahead.difference(&record.leased);
            let need = Need { layer, class: Class::Prefetch, since: turn.now, place: None, acts_for: None };
            let others_wake = std::mem::take(&mut self.wake);
            let is_dead_end = !wanted.is_empty() && self.place(&need, wanted.clone(), turn) == Prospect::DeadEnd;
            let rest = self.rest(&need, &wanted, self.wake.first(), turn.now);
            self.wake = self.wake.or(others_wake);
            let Some(record) = self.layers.get_mut(&layer) else { continue };
            record.ahead_rest = rest;
            if is_dead_end {
                record.ahead = Runs::new();
                self.ahead_layers.remove(&layer);
            }
        }
    }

    /// Whether no further read of the layer and class can be served in this pass, nor fails.
    pub(super) fn is_exhausted(&mut self, need: &Need, patient: bool, now: Instant) -> bool {
        let survey = self.surveyed(need.layer, need.class, now);
        survey.is_none_or(|survey| survey.is_exhausted(patient) && !survey.dead_end)
    }

    /// The chunks of `wanted` that none of `peers` has.
    fn without_held(&self, need: &Need, wanted: &Runs, peers: impl Iterator<Item = PeerNo>) -> Runs {
        let (mut rest, asker) = (wanted.clone(), self.asker(need));
        let Some(record) = self.layers.get(&need.layer) else { return rest };
        for holder in peers.filter_map(|peer| record.holders.get(&peer)) {
            if rest.is_empty() {
                break;
            }
            holder.take_offer_from(&mut rest, asker);
        }
        rest
    }

    /// What a demand read wants to ask for: what nobody was asked for, and what is far away in a prefetch ask. What
    /// such an ask will bring soon is joined: the ask now has to show the signs of life of a demand ask.
    fn wanted_by_demand(&mut self, id: ReadId, now: Instant) -> Option<(Need, Runs)> {
        let read = self.reads.get(id)?;
        let record = self.layers.get(&read.layer)?;
        let (class, since, place) = (Class::Demand, read.since, Some(read.place));
        let need = Need { layer: read.layer, class, since, place, acts_for: read.acts_for };
        let mut wanted = read.missing.difference(&record.leased);
        wanted.insert_all(&self.unsure(record, &read.missing, read.acts_for));
        let (mut look_again, mut joined) = (None, Vec::new());
        let rank_wait = self.rank_wait();
        for id in &record.overtakable {
            let Some(ask) = self.asks.get_mut(id) else { continue };
            let mut far = ask.chunks.intersection(&read.missing);
            let Some(head) = ask.chunks.first().filter(|_| !far.is_empty()) else { continue };
            let origin = ask.origin.and_then(|no| self.origins.get(&no));
            let wait = origin.map_or(self.limits.join_wait, |origin| origin.patience(self.limits.join_wait));
            let patient_until = ask.sent + wait;
            let stall = self.limits.reader_stall(ask.source, rank_wait);
            let lives = ask.first_sign.is_some() && now < ask.last_sign + stall;
            if lives || ask.first_sign.is_none() && now < patient_until {
                let near = ask.joinable_bytes(now, wait, &self.limits);
                let near_end = record.geometry.start_bytes(head.start).saturating_add(near);
                let near = head.start..record.geometry.chunk_at(near_end).max(head.start + 1);
                let before = far.chunk_count();
                far.remove(near);
                if far.chunk_count() < before {
                    ask.join(now, stall);
                    joined.push((*id, ask.lease_until));
                    if ask.first_sign.is_none() {
                        look_again = Some(look_again.map_or(patient_until, |at: Instant| at.min(patient_until)));
                    }
                }
            }
            wanted.insert_all(&far);
        }
        for (ask, lease_until) in joined {
            self.note_awaited(ask);
            self.lease_ends_at(lease_until);
        }
        if let Some(at) = look_again {
            self.wake_at(at);
        }
        Some((need, wanted))
    }

    /// What of `wanted` is leased to asks that an owner must not wait for, as they may wait for it.
    pub(super) fn unsure(&self, record: &Layer, wanted: &Runs, acts_for: Option<Duty>) -> Runs {
        let mut unsure = Runs::new();
        let least = match acts_for {
            None => return unsure,
            Some(Duty::Zone) => Certainty::Firm,
            Some(Duty::Cluster) => Certainty::Sure,
        };
        for ask in record.asks.iter().filter_map(|id| self.asks.get(id)) {
            if ask.certainty < least {
                unsure.insert_all(&wanted.intersection(&ask.chunks));
            }
        }
        unsure
    }

    /// The survey of a layer, made anew after every ask.
    pub(super) fn surveyed(&mut self, layer: DiffId, class: Class, now: Instant) -> Option<Arc<Survey>> {
        if let Some(survey) = self.surveys.get(&layer) {
            return Some(Arc::clone(survey));
        }
        let survey = Arc::new(self.survey(layer, class, now)?);
        self.surveys.insert(layer, Arc::clone(&survey));
        Some(survey)
    }

    /// Asks for as much of `wanted` as sources have room for.
    pub(super) fn place(&mut self, need: &Need, mut wanted: Runs, turn: &mut Turn<'_>) -> Prospect {
        while !wanted.is_empty() {
            let Some(survey) = self.surveyed(need.layer, need.class, turn.now) else { return Prospect::Good };
            if let Some(until) = survey.own_rest {
                self.wake_at(until);
                return Prospect::Good;
            }
            // An ask that ends makes room.
            if !survey.room {
                return Prospect::Good;
            }
            if let Some(asked) = self.place_local(need, &survey, &mut wanted, turn) {
                wanted.remove_all(&asked);
            } else if let Some((peer, chunks)) = self.pick_holder(need, self.asker(need), &survey, &wanted, turn) {
                wanted.remove_all(&chunks);
                let reason = self.holder_reason(need.layer, peer, &chunks);
                self.ask_peer(need, Question::here(peer, chunks, reason), turn);
            } else {
                self.leave_to_holders(need, &survey, &mut wanted, turn.now);
                if wanted.is_empty() {
                    return Prospect::Good;
                }
                if self.look_up(need.layer, turn) {
                    self.surveys.remove(&need.layer);
                    continue;
                }
                if let Some(until) = survey.lookup_until.filter(|until| *until > turn.now) {
                    self.wake_at(until);
                    // Somebody is known to have these, but rests: a reader has waited enough.
                    let unknown = self.without_held(need, &wanted, survey.resting.iter().copied());
                    wanted.remove_all(&unknown);
                    if wanted.is_empty() || need.class == Class::Prefetch {
                        return Prospect::Good;
                    }
                }
                let mut mine = Runs::one(0..u32::MAX);
                if survey.has_owners {
                    let Some(turns) = self.ask_owners(need, &mut wanted, turn) else { return Prospect::DeadEnd };
                    mine = turns;
                    if wanted.is_empty() {
                        return Prospect::Good;
                    }
                    // What another zone has is not read from the registry once more.
                    let asker = Asker { can_wait: false, ..self.asker(need) };
                    if let Some((peer, chunks)) = self.pick_holder(need, asker, &survey, &wanted, turn) {
                        wanted.remove_all(&chunks);
                        self.ask_peer(need, Question::here(peer, chunks, Reason::Holder), turn);
                        continue;
                    }
                }
                match survey.origin {
                    OriginOffer::Ready(no) => match self.ask_origin(need, no, &wanted, &mine, turn) {
                        Some(leased) => wanted.remove_all(&leased),
                        None => return Prospect::Good,
                    },
                    _ => return self.leave_waiting(need, &survey, &wanted, turn),
                }
            }
        }
        Prospect::Good
    }

    /// Nothing can be asked for `wanted` now: notes when to look again.
    fn leave_waiting(&mut self, need: &Need, survey: &Survey, wanted: &Runs, turn: &mut Turn<'_>) -> Prospect {
        match survey.origin {
            OriginOffer::Resting(until) => self.wake_at(until),
            OriginOffer::NeedsSpans => {
                if let Some(record) = self.layers.get_mut(&need.layer) {
                    record.origin.spans_asked = Some(turn.now);
                    turn.out.push(Action::FindSpans { layer: need.layer });
                }
                self.surveys.remove(&need.layer);
                self.wake_at(turn.now + self.limits.spans_wait);
            }
            OriginOffer::Ready(_) | OriginOffer::Later | OriginOffer::Gone => {}
        }
        if let Some(until) = survey.resting_until {
            self.wake_at(until);
        }
        if let Some(at) = self.lookup_changes_at(need.layer, turn.now) {
            self.wake_at(at);
        }
        let Some(record) = self.layers.get(&need.layer).filter(|_| survey.dead_end) else { return Prospect::Good };
        let nowhere = self.without_held(need, &wanted.difference(&record.leased), survey.later());
        if nowhere.is_empty() { Prospect::Good } else { Prospect::DeadEnd }
    }

    /// Begins a local copy of what another layer has, if it may; else leaves it to wait for its turn: copies are quick.
    fn place_local(&mut self, need: &Need, survey: &Survey, wanted: &mut Runs, turn: &mut Turn<'_>) -> Option<Runs> {
        let record = self.layers.get(&need.layer).filter(|record| !record.local.is_empty())?;
        let copies = wanted.intersection(&record.local);
        if copies.is_empty() {
            return None;
        }
        if !survey.local {
            wanted.remove_all(&copies);
            return None;
        }
        let size = self.limits.local_size.bytes(need.class);
        let chunks = cut_chunks(&record.geometry, &copies, size, self.limits.runs_per_ask);
        let (layer, class) = (need.layer, need.class);
        let bytes = record.bytes(&chunks);
        let ask = self.lease(need, Target::LOCAL, chunks.clone(), bytes, turn);
        turn.out.push(Action::AskLocal { ask, layer, chunks: chunks.clone(), class });
        Some(chunks)
    }

    /// The best holder of the first wanted chunk that any ready holder has, and what to ask it for.
    fn pick_holder(
        &self,
        need: &Need,
        asker: Asker,
        survey: &Survey,
        wanted: &Runs,
        turn: &mut Turn<'_>,
    ) -> Option<(PeerNo, Runs)> {
        let record = self.layers.get(&need.layer)?;
        let limits = &self.limits;
        // Whole offers are long, and of most holders nothing but their first chunk matters. Both lists are in order of peers.
        let mut ready = survey.ready.iter().peekable();
        let mut first = u32::MAX;
        let mut candidates: Vec<PeerNo> = Vec::new();
        for (peer, holder) in &record.holders {
            while ready.next_if(|next| *next < peer).is_some() {}
            let Some(_) = ready.next_if_eq(&peer) else { continue };
            let Some(offered) = holder.first_offered(wanted, asker) else { continue };
            if offered < first {
                candidates.clear();
                first = offered;
            }
            if offered == first {
                candidates.push(*peer);
            }
        }
        if candidates.is_empty() {
            return None;
        }
        let size = limits.peer_size.bytes(need.class);
        let peer = self.peers.choose(&candidates, size.min(record.bytes(wanted)), need.class, limits, turn.rng)?;
        let offer = record.holders.get(&peer)?.offer(wanted, asker);
        let mut chunks = cut_chunks(&record.geometry, &offer, size, limits.runs_per_ask);
        // A short ask takes along what the next reads of its class want from the same peer.
        let left = size.saturating_sub(record.bytes(&chunks));
        if left > 0 && chunks == offer {
            let holder = record.holders.get(&peer)?;
            let mut more = self.gather(need, None).intersection(holder.told(asker));
            more.remove_all(&chunks);
            more.remove_all(&record.local);
            let runs = limits.runs_per_ask.saturating_sub(chunks.run_count());
            if runs > 0
                && more.first().is_some_and(|run| record.geometry.len_bytes(&(run.start..run.start + 1)) <= left)
            {
                chunks.insert_all(&cut_chunks(&record.geometry, &more, left, runs));
            }
        }
        Some((peer, chunks))
    }

    /// What the reads of the same class and layer behind this one want and nobody was asked for.
    pub(super) fn gather(&self, need: &Need, within: Option<&ChunkRange>) -> Runs {
        let mut gathered = Runs::new();
        let (Some(place), Some(record)) = (need.place, self.layers.get(&need.layer)) else { return gathered };
        let behind = self.reads.queued_from(need.class, place + 1).take(self.limits.gather_reads);
        for read in behind.filter(|read| read.layer == need.layer) {
            for run in read.missing.iter() {
                let within = within.unwrap_or(&run);
                gathered.insert(run.start.max(within.start)..run.end.min(within.end));
            }
        }
        gathered.difference(&record.leased)
    }

    /// Why a peer that is no owner is asked for chunks.
    fn holder_reason(&self, layer: DiffId, peer: PeerNo, chunks: &Runs) -> Reason {
        let holder = self.layers.get(&layer).and_then(|record| record.holders.get(&peer));
        let has_all = holder.is_some_and(|holder| chunks.difference(&holder.chunks).is_empty());
        if has_all { Reason::Holder } else { Reason::Named }
    }

    /// Takes out of `wanted` what is better waited for: what holders have whose asks are all taken, or who said when
    /// they will have time. Prefetch always waits for them; demand for so long.
    fn leave_to_holders(&mut self, need: &Need, survey: &Survey, wanted: &mut Runs, now: Instant) {
        let patient = need.class == Class::Prefetch;
        let full_until = need.since + self.limits.full_patience;
        let (record, asker) = (self.layers.get(&need.layer), self.asker(need));
        let offers = |peer: &PeerNo, wanted: &Runs| {
            let holder = record.and_then(|record| record.holders.get(peer));
            holder.is_some_and(|holder| holder.first_offered(wanted, asker).is_some())
        };
        let busy: Vec<(Instant, PeerNo)> =
            survey.busy.iter().filter(|(_, peer)| offers(peer, wanted)).copied().collect();
        if (patient || now < full_until) && survey.full.iter().any(|peer| offers(peer, wanted)) {
            let rest = self.without_held(need, wanted, survey.full.iter().copied());
            if !patient && rest != *wanted {
                self.wake_at(full_until);
            }
            *wanted = rest;
        }
        let busy_until = need.since + self.limits.busy_patience;
        for (until, peer) in &busy {
            let rest = self.without_held(need, wanted, std::iter::once(*peer));
            if rest != *wanted {
                self.wake_for_peer(*until);
                if patient || *until <= busy_until {
                    *wanted = rest;
                }
            }
        }
    }

    /// When the search for holders of a layer ends by itself or is due again.
    fn lookup_changes_at(&self, layer: DiffId, now: Instant) -> Option<Instant> {
        let record = self.layers.get(&layer).filter(|_| self.peers.any_up(now))?;
        let at = match record.lookup {
            Lookup::Never => return None,
            Lookup::Asked { at, .. } => at + self.limits.lookup_end,
            Lookup::Ended { at } if record.holders.is_empty() => at + self.limits.lookup_negative,
            Lookup::Ended { at } => at + self.limits.lookup_found,
        };
        (at > now).then_some(at)
    }
}
