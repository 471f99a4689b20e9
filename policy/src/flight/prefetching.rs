//! The order of prefetch, and when it is not worth looking at.
//!
//! A start wants thousands of chunks in hundreds of runs, and facts come thousands of times a second, most of which change
//! nothing for most of them. So what a whole pass over a layer's prefetch could not ask for is **quiet** from then on: the books say
//! what waits for which peer, and whether the registry or the disk had no room, or a time has to come. A fact names the chunks that
//! it changes something for (somebody has them now, their lease ended, they were left to this node, the peer that they wait for has
//! room), and the next pass looks at these alone. What changes everything (members, holders that were searched for, a registry
//! that has room again) ends the quiet; and none lasts longer than [`Limits::prefetch_pause`](crate::limits::Limits) while facts
//! come in, so that what was overlooked here costs no more than that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;

use super::schedule::{Need, Prospect};
use super::sources::OriginOffer;
use super::table::{Asker, Layer};
use super::{Flight, Turn, Wake};
use crate::class::Class;
use crate::event::{FailReason, PeerNo, ReadId};
use crate::peers::Readiness;
use crate::time::Instant;

/// Why a layer's prefetch cannot go on.
#[derive(Debug, Clone)]
pub(super) struct Quiet {
    /// All of it is looked at again from then on, whatever happens.
    until: Instant,
    /// When something changes by time alone for what waits for peers, and for anything else.
    wake: Wake,
    /// What a fact has changed something for since the last pass.
    look: Runs,
    /// What waits for peers that have or own it and could not be asked.
    waits_for: BTreeMap<PeerNo, Runs>,
    /// Whether one of them had no room, so that others were not asked.
    full: bool,
    /// The registry had no room.
    origin: bool,
    /// Nor had the disk.
    local: bool,
    /// All that was wanted and not asked for, and perhaps what was asked for since.
    left: Runs,
}

impl Quiet {
    /// Whether some of these were wanted and not asked for.
    pub(super) fn waits_for_any(&self, chunks: &Runs) -> bool {
        chunks.first_common(&self.left).is_some()
    }

    /// Something has changed for these chunks.
    fn look_again(&mut self, chunks: &Runs) {
        self.look.insert_all(chunks);
        self.left.insert_all(chunks);
    }
}

impl Layer {
    /// Something has changed for these chunks of its prefetch.
    pub(super) fn look_again(&mut self, chunks: &Runs) {
        if let Some(quiet) = &mut self.quiet {
            quiet.look_again(chunks);
        }
    }
}

/// A pass over a layer.
#[derive(Debug)]
struct Pass {
    /// What it looks at; `None` for all that is wanted.
    look: Option<Runs>,
    /// It has come to a read.
    has_begun: bool,
    /// When something changes by time alone, but for what waits for peers.
    wake: Option<Instant>,
    /// What waits for owners that could not be asked.
    waits_for: BTreeMap<PeerNo, Runs>,
}

impl Pass {
    fn over(look: Option<Runs>) -> Self {
        Self { look, has_begun: false, wake: None, waits_for: BTreeMap::new() }
    }

    /// What the pass looks at of what is wanted.
    fn seen(&self, wanted: &Runs) -> Runs {
        self.look.as_ref().map_or_else(|| wanted.clone(), |look| wanted.intersection(look))
    }
}

impl Flight {
    pub(super) fn serve_prefetch(&mut self, turn: &mut Turn<'_>) {
        // An ask that ends makes room, and leads here again.
        if !self.has_prefetch_room() {
            return;
        }
        let layers: Vec<DiffId> = self.reads.layers(Class::Prefetch).collect();
        let freed = std::mem::take(&mut self.freed_for_prefetch);
        let mut passes: BTreeMap<DiffId, Pass> = BTreeMap::new();
        for layer in layers {
            passes.extend(self.due_pass(layer, &freed, turn.now).map(|pass| (layer, pass)));
        }
        // Layers of which something can be asked: the further reads of others need not be looked at.
        let mut open: BTreeSet<DiffId> = passes.keys().copied().collect();
        let mut next = 0;
        while !open.is_empty()
            && let Some((place, id)) = self.reads.at_or_after(Class::Prefetch, next)
        {
            next = place + 1;
            let Some(read) = self.reads.get(id).filter(|read| open.contains(&read.layer)) else { continue };
            let (class, since) = (Class::Prefetch, read.since);
            let need = Need { layer: read.layer, class, since, place: Some(place), acts_for: read.acts_for };
            let Some(pass) = passes.get_mut(&need.layer) else { continue };
            pass.has_begun = true;
            let was_looked_at = self.serve_prefetch_read(id, &need, pass, turn);
            if !self.has_prefetch_room() {
                // The rest is looked at by the next pass.
                passes.retain(|layer, pass| pass.has_begun && *layer != need.layer);
                next = place;
                break;
            }
            if was_looked_at && self.reads.get(id).is_some() && self.is_exhausted(&need, true, turn.now) {
                open.remove(&need.layer);
            }
        }
        for (layer, pass) in passes {
            let unseen = if open.contains(&layer) { next } else { u64::MAX };
            self.quieten(layer, pass, unseen, turn.now);
        }
    }

    fn has_prefetch_room(&self) -> bool {
        self.total.has_room(Class::Prefetch, &self.limits.total)
    }

    /// Asks for what one read wants, as far as it can be asked for. Says whether it wants anything.
    fn serve_prefetch_read(&mut self, id: ReadId, need: &Need, pass: &mut Pass, turn: &mut Turn<'_>) -> bool {
        let Some((read, record)) = self.reads.get(id).zip(self.layers.get(&need.layer)) else { return false };
        let missing = pass.seen(&read.missing);
        let mut wanted = missing.difference(&record.leased);
        wanted.insert_all(&self.unsure(record, &missing, need.acts_for));
        if wanted.is_empty() {
            return false;
        }
        let others_wake = std::mem::take(&mut self.wake);
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
        for (owner, chunks) in std::mem::take(&mut self.taken_owners) {
            pass.waits_for.entry(owner).or_default().insert_all(&chunks);
        }
        pass.wake = pass.wake.into_iter().chain(self.wake.other).min();
        self.wake = self.wake.or(others_wake);
        if dead_end {
            self.fail_read(id, FailReason::Refused, turn);
        }
        true
    }

    /// What a pass could not ask for waits from now on. It has not come to the reads from the place `unseen` on.
    fn quieten(&mut self, layer: DiffId, pass: Pass, unseen: u64, now: Instant) {
        let Some(record) = self.layers.get(&layer) else { return };
        let (mut left, mut not_seen) = (Runs::new(), Runs::new());
        let reads = record.reads.all().iter().filter_map(|id| self.reads.get(*id));
        for read in reads.filter(|read| read.class == Class::Prefetch) {
            let missing = pass.seen(&read.missing);
            let mut wanted = missing.difference(&record.leased);
            wanted.insert_all(&self.unsure(record, &missing, read.acts_for));
            left.insert_all(&wanted);
            if read.place >= unseen {
                not_seen.insert_all(&wanted);
            }
        }
        // What an owner that acts for others asks of other zones is among what it is shown here, and more.
        let anyone = Asker { acts_for_others: false, can_wait: false };
        let Pass { look, wake, mut waits_for, .. } = pass;
        for (peer, holder) in &record.holders {
            let readiness = self.peers.readiness(*peer, Class::Prefetch, now, &self.limits);
            if !matches!(readiness, Readiness::Ready | Readiness::Gone) {
                let offer = holder.offer(&left, anyone);
                if !offer.is_empty() {
                    waits_for.entry(*peer).or_default().insert_all(&offer);
                }
            }
        }
        let mut wake = Wake { peers: None, other: wake };
        let mut full = false;
        for peer in waits_for.keys() {
            let readiness = self.peers.readiness(*peer, Class::Prefetch, now, &self.limits);
            full |= readiness == Readiness::Full;
            wake = wake.or(Wake { peers: readiness.until(), other: None });
        }
        let origin = self.origin_offer(layer, Class::Prefetch, true, now) == OriginOffer::Later;
        let local = !self.local.has_room(Class::Prefetch, &self.limits.local);
        let Some(record) = self.layers.get_mut(&layer) else { return };
        match (look, &mut record.quiet) {
            (Some(_), Some(quiet)) => {
                quiet.wake = quiet.wake.or(wake);
                quiet.look = not_seen;
                for (peer, chunks) in waits_for {
                    quiet.waits_for.entry(peer).or_default().insert_all(&chunks);
                }
                quiet.full |= full;
                quiet.origin |= origin;
                quiet.local |= local;
            }
            // Something has changed for all of it meanwhile.
            (Some(_), None) => {}
            (None, quiet) => {
                let until = now + self.limits.prefetch_pause;
                *quiet = Some(Quiet { until, wake, look: not_seen, waits_for, full, origin, local, left });
            }
        }
    }

    /// The pass that a layer is worth, if any, when these peers may have room again. Notes when that will change.
    fn due_pass(&mut self, layer: DiffId, freed: &BTreeSet<PeerNo>, now: Instant) -> Option<Pass> {
        let record = self.layers.get_mut(&layer)?;
        let Some(mut quiet) = record.quiet.take() else { return Some(Pass::over(None)) };
        let copies =
            quiet.local && !record.local.is_empty() && self.local.has_room(Class::Prefetch, &self.limits.local);
        if now >= quiet.until
            || quiet.wake.other.is_some_and(|at| at <= now)
            || copies
            || quiet.origin && matches!(self.origin_offer(layer, Class::Prefetch, true, now), OriginOffer::Ready(_))
        {
            return Some(Pass::over(None));
        }
        let readiness = |peer: PeerNo| self.peers.readiness(peer, Class::Prefetch, now, &self.limits);
        if quiet.wake.peers.is_some_and(|at| at <= now) {
            let mut wake = None;
            let ready = quiet.waits_for.extract_if(.., |peer, _| {
                let readiness = readiness(*peer);
                wake = wake.into_iter().chain(readiness.until()).min();
                readiness == Readiness::Ready
            });
            ready.for_each(|(_, chunks)| quiet.look.insert_all(&chunks));
            quiet.wake.peers = wake;
        }
        for peer in freed.iter().filter(|peer| readiness(**peer) == Readiness::Ready) {
            if let Some(chunks) = quiet.waits_for.remove(peer) {
                quiet.look.insert_all(&chunks);
            }
        }
        // Asks take a peer's room. When none is left, who had no room has failed and rests, so others are to be asked; and there is
        // none whose end would lead here.
        let has_failed = quiet.full && self.asks.is_empty();
        self.wake_by(quiet.wake.or(Wake { peers: None, other: has_failed.then_some(quiet.until) }));
        let look = quiet.look.clone();
        if let Some(record) = self.layers.get_mut(&layer) {
            record.quiet = Some(quiet);
        }
        (!look.is_empty()).then(|| Pass::over(Some(look)))
    }

    /// Something has changed for all prefetch of a layer.
    pub(super) fn stir(&mut self, layer: DiffId) {
        self.dirty = true;
        if let Some(record) = self.layers.get_mut(&layer) {
            record.quiet = None;
            record.changes += 1;
        }
    }

    /// Something has changed for the prefetch of these chunks.
    pub(super) fn stir_chunks(&mut self, layer: DiffId, chunks: &Runs) {
        self.dirty = true;
        if let Some(record) = self.layers.get_mut(&layer) {
            record.look_again(chunks);
        }
    }

    /// Something has changed for the prefetch of all layers.
    pub(super) fn stir_all(&mut self) {
        self.dirty = true;
        for record in self.layers.values_mut() {
            record.quiet = None;
            record.changes += 1;
        }
    }

    /// A peer has more of a layer: what waits for it is asked for now, or when the peer can be asked.
    pub(super) fn stir_for(&mut self, layer: DiffId, peer: PeerNo, more: &Runs) {
        self.dirty = true;
        let Some(record) = self.layers.get_mut(&layer) else { return };
        record.changes += 1;
        if let Some(quiet) = &mut record.quiet {
            let news = more.intersection(&quiet.left);
            if !news.is_empty() {
                quiet.waits_for.entry(peer).or_default().insert_all(&news);
                self.freed_for_prefetch.insert(peer);
            }
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
