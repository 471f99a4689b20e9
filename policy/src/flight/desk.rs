//! What a node answers when others ask it for chunks that they did not find.
//!
//! Asked for what is here, it gives what it has and what is surely on its way to it, and lacks the rest. Asked as the owner
//! of an extent it does one of four things, chunk by chunk: it gives what it has or will have, to a few claimants; sends the
//! others to those (`referrals`, by what `books` remember); gets what is missing when it has the layer open and its registry
//! gives it; and otherwise leaves the reading to the first claimant that can, and sends the next ones to that. So an owner needs
//! neither the layer nor a login to keep its extent from being read twice.
//!
//! **Nobody waits in a circle**: a promise stands on one ask and ends with it. Who asks for what is here is promised what
//! comes from the registry, from this disk, from a peer that has said that it has it, or from an owner; never what comes from
//! itself, nor from a peer that was merely named. Who asks this node as an owner is promised what comes from the first three;
//! for the rest this node turns to them itself, also when it has asked another owner before.

use std::collections::{BTreeMap, BTreeSet};

use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;

use super::books::Book;
use super::table::{Certainty, ForOthers};
use super::{Flight, Turn};
use crate::class::Class;
use crate::event::{Action, ClaimId, PeerNo, ReadId, Ruling, Source, Want};
use crate::limits::Limits;
use crate::members::Duty;
use crate::time::Instant;

/// Reads that this node makes for claims have numbers from here on; the driver's are below.
const CLAIM_READS: u64 = 1 << 63;

/// The read that serves `claim`.
fn read_of(claim: ClaimId) -> ReadId {
    ReadId(claim.0 | CLAIM_READS)
}

/// The claim that `read` serves, if it serves one.
pub(super) fn claim_of(read: ReadId) -> Option<ClaimId> {
    (read.0 & CLAIM_READS != 0).then_some(ClaimId(read.0 & !CLAIM_READS))
}

/// A question that waits.
#[derive(Debug, Clone)]
pub(super) struct Claim {
    layer: DiffId,
    pub(super) peer: PeerNo,
    pub(super) class: Class,
    /// What it waits for.
    pub(super) awaited: Runs,
    /// Of it what is ruled on when it comes.
    pub(super) held: Option<Held>,
    /// Until when the claimant knows that the registry rests.
    told_rest: Instant,
}

/// Chunks that wait for a ruling of their owner.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) extent: ChunkRange,
    pub(super) chunks: Runs,
    /// The claimant was given them or sent to others for them before.
    pub(super) again: bool,
    /// The claimant can read the registry.
    pub(super) can_read: bool,
}

/// Claims that wait for chunks of one extent. There may be a thousand, and most of what comes is of other extents.
#[derive(Debug, Clone, Default)]
pub(super) struct HeldClaims {
    pub(super) ids: BTreeSet<ClaimId>,
    /// The extent ends here, by the longest of them.
    pub(super) end: u32,
}

/// What this node owes to others.
#[derive(Debug, Clone, Default)]
pub(super) struct Desk {
    pub(super) claims: BTreeMap<ClaimId, Claim>,
    /// Claims that are ruled on when chunks come, by the extent of these.
    pub(super) held: BTreeMap<(DiffId, u32), HeldClaims>,
    books: BTreeMap<(DiffId, u32), Book>,
    /// What asks that ended were to bring and did not.
    broken: BTreeMap<DiffId, Runs>,
}

impl Desk {
    pub(super) fn len(&self) -> usize {
        self.claims.len()
    }

    pub(super) fn is_within(&self, limits: &Limits) -> bool {
        let is_held = |id: &ClaimId| self.claims.get(id).is_some_and(|claim| claim.held.is_some());
        let held = || self.held.values().flat_map(|waiting| &waiting.ids);
        self.claims.len() <= limits.claims && self.books.len() <= limits.books && held().all(is_held)
    }

    /// Notes that an ask of the layer ended without these chunks.
    pub(super) fn note_broken(&mut self, layer: DiffId, chunks: &Runs) {
        if !self.claims.is_empty() {
            self.broken.entry(layer).or_default().insert_all(chunks);
        }
    }

    /// Whom this node has left chunks of an extent to, as long as that is worth waiting for.
    pub(super) fn delegates(
        &self,
        layer: DiffId,
        extent: &ChunkRange,
        now: Instant,
        limits: &Limits,
    ) -> impl Iterator<Item = (PeerNo, &Runs)> {
        let book = self.books.get(&(layer, extent.start));
        let since = now - limits.claim_patience;
        let live = book.into_iter().flat_map(move |book| book.delegated.iter().filter(move |(_, at, _)| *at >= since));
        live.map(|(peer, _, chunks)| (*peer, chunks))
    }

    /// The claim does not wait for what comes.
    fn release(&mut self, id: ClaimId) -> Option<Held> {
        let claim = self.claims.get_mut(&id)?;
        let held = claim.held.take()?;
        let key = (claim.layer, held.extent.start);
        if let Some(waiting) = self.held.get_mut(&key) {
            waiting.ids.remove(&id);
            if waiting.ids.is_empty() {
                self.held.remove(&key);
            }
        }
        Some(held)
    }

    pub(super) fn book(&mut self, layer: DiffId, extent: u32, now: Instant, limits: &Limits) -> &mut Book {
        let key = (layer, extent);
        if !self.books.contains_key(&key) && self.books.len() >= limits.books {
            let before = now - limits.claim_patience;
            self.books.retain(|_, book| book.used >= before);
            if self.books.len() >= limits.books {
                self.books.pop_first();
            }
        }
        let book = self.books.entry(key).or_default();
        book.used = now;
        book.forget(now, limits);
        book
    }
}

/// A claim as it comes.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) claim: ClaimId,
    pub(super) peer: PeerNo,
    pub(super) layer: DiffId,
    pub(super) chunks: Runs,
    pub(super) extent: ChunkRange,
    pub(super) class: Class,
    pub(super) want: Want,
}

impl Flight {
    pub(super) fn claimed(&mut self, asked: Asked, turn: &mut Turn<'_>) {
        let claim = asked.claim;
        if self.desk.claims.contains_key(&claim) || claim_of(ReadId(claim.0)).is_some() {
            return;
        }
        if self.desk.claims.len() >= self.limits.claims {
            turn.out.push(Action::Rule { claim, ruling: Ruling::Lacks(asked.chunks) });
            return;
        }
        let (layer, peer, class) = (asked.layer, asked.peer, asked.class);
        let record = Claim { layer, peer, class, awaited: Runs::new(), held: None, told_rest: Instant::ZERO };
        self.desk.claims.insert(claim, record);
        match asked.want {
            Want::Here => {
                let give = self.here(asked.layer, &asked.chunks, asked.peer, Certainty::Firm);
                let mut lacking = asked.chunks.difference(&give);
                self.give(claim, give, turn);
                let left = |duty| (self.left_here(asked.layer, &lacking, duty, turn.now), duty);
                let left = [Duty::Cluster, Duty::Zone].map(left).into_iter().find(|(left, _)| !left.is_empty());
                if let Some((left_here, duty)) = left {
                    lacking.remove_all(&left_here);
                    self.give(claim, left_here.clone(), turn);
                    self.read_for(&asked, left_here, ForOthers { duty, again: false }, turn);
                }
                rule(claim, Ruling::Lacks(lacking), turn);
            }
            Want::Owner { duty, again, can_read } => self.claimed_of_owner(&asked, duty, again, can_read, turn),
        }
        self.end_if_settled(claim);
    }

    /// Forgets a claim that waits for nothing more. Of thousands that come at once most are sent to others in the same moment, and
    /// [`Event::ClaimEnded`](crate::event::Event) says so later than the next ones come.
    pub(super) fn end_if_settled(&mut self, id: ClaimId) {
        let Some(claim) = self.desk.claims.get(&id) else { return };
        let is_here = |chunks: &Runs, layer| {
            chunks.is_empty() || self.layers.get(layer).is_some_and(|layer| chunks.difference(&layer.have).is_empty())
        };
        if claim.held.is_none() && self.reads.get(read_of(id)).is_none() && is_here(&claim.awaited, &claim.layer) {
            self.desk.claims.remove(&id);
        }
    }

    fn claimed_of_owner(
        &mut self,
        asked: &Asked,
        duty: Duty,
        again: bool,
        claimant_can_read: bool,
        turn: &mut Turn<'_>,
    ) {
        let Asked { claim, peer, layer, ref extent, .. } = *asked;
        if !self.acts_as_owner(layer, extent, duty, turn.now) {
            return rule(claim, Ruling::NotMine { epoch: self.members.epoch() }, turn);
        }
        // As the owner of a zone it asks the owner among all, for which it needs no login.
        let can_read = self.can_read(layer);
        let here = self.here(layer, &asked.chunks, peer, Certainty::Sure);
        let mut rest = asked.chunks.difference(&here);
        let have = self.layers.get(&layer).map_or_else(Runs::new, |layer| here.intersection(&layer.have));
        let mut coming = here.difference(&have);
        let give = self.send_to_others(asked, again, have, turn);
        self.give(claim, give, turn);
        if !can_read {
            self.hold(asked, again, claimant_can_read, std::mem::take(&mut coming), turn);
        }
        if again {
            // Who was to read it has not, as this one was told there.
            let book = self.desk.book(layer, extent.start, turn.now, &self.limits);
            let tried = book.tried(peer);
            for (_, _, chunks) in book.delegated.iter_mut().filter(|(other, ..)| tried.contains(other)) {
                chunks.remove_all(&rest);
            }
        }
        self.send_to_delegates(claim, (layer, peer), extent.start, &mut rest, turn);
        if !can_read {
            return self.leave_to_claimant(claim, (layer, peer), extent, rest, claimant_can_read, turn);
        }
        rest.insert_all(&coming);
        if !rest.is_empty() {
            // What is on its way is got anew should that end.
            self.hold(asked, again, claimant_can_read, rest.clone(), turn);
            self.read_for(asked, rest, ForOthers { duty, again }, turn);
        }
    }

    /// Promises chunks that are here or on their way.
    fn give(&mut self, claim: ClaimId, chunks: Runs, turn: &mut Turn<'_>) {
        if let Some(record) = self.desk.claims.get_mut(&claim) {
            let layer = self.layers.get(&record.layer);
            record.awaited.insert_all(&layer.map_or_else(|| chunks.clone(), |layer| chunks.difference(&layer.have)));
        }
        rule(claim, Ruling::Give(chunks), turn);
    }

    /// Takes back what was promised when the ask that was to bring it has ended, also when another one is to bring it now:
    /// that one may wait for who was promised.
    pub(super) fn take_back_promises(&mut self, turn: &mut Turn<'_>) {
        let broken = std::mem::take(&mut self.desk.broken);
        if broken.is_empty() {
            return;
        }
        for (id, claim) in &mut self.desk.claims {
            let Some((chunks, layer)) = broken.get(&claim.layer).zip(self.layers.get(&claim.layer)) else { continue };
            let mut lost = claim.awaited.intersection(chunks).difference(&layer.have);
            if let Some(read) = self.reads.get(read_of(*id)) {
                lost.remove_all(&read.missing);
            }
            claim.awaited.remove_all(&lost);
            if let Some(held) = &mut claim.held {
                held.chunks.remove_all(&lost);
            }
            rule(*id, Ruling::Lacks(lost), turn);
        }
    }

    /// Which of `chunks` are here or on their way with at least this certainty, and not by way of `claimant`.
    fn here(&self, layer: DiffId, chunks: &Runs, claimant: PeerNo, least: Certainty) -> Runs {
        let Some(record) = self.layers.get(&layer) else { return Runs::new() };
        let mut here = chunks.intersection(&record.have);
        if chunks.first_common(&record.leased).is_none() {
            return here;
        }
        for ask in record.asks.iter().filter_map(|id| self.asks.get(id)) {
            if ask.certainty >= least && ask.source != Source::Peer(claimant) {
                here.insert_all(&chunks.intersection(&ask.chunks));
            }
        }
        here
    }

    /// Which of `chunks` an owner has left to this node, which has not begun with them: whoever is sent here relies on it.
    fn left_here(&self, layer: DiffId, chunks: &Runs, duty: Duty, now: Instant) -> Runs {
        let mut left = Runs::new();
        let Some(record) = self.layers.get(&layer).filter(|_| self.can_read(layer)) else { return left };
        let mut at = 0;
        while let Some(chunk) = chunks.within(at..u32::MAX).first().map(|run| run.start) {
            let Some(extent) = record.geometry.extent_of(chunk, self.limits.extent_bytes) else { break };
            at = extent.end;
            left.insert_all(&self.delegated(layer, &extent, duty, now).intersection(chunks));
        }
        left
    }

    /// Whether this node can get chunks of the layer: it is open, and its registry gives them.
    pub(super) fn can_read(&self, layer: DiffId) -> bool {
        let Some(record) = self.layers.get(&layer) else { return false };
        let origin = &record.origin;
        // Spans that are not known yet are found when they are needed.
        origin.no.is_some() && origin.usable && !origin.is_refused(self.now)
    }

    /// Gets chunks for a claim, as if a reader here wanted them.
    fn read_for(&mut self, asked: &Asked, chunks: Runs, others: ForOthers, turn: &mut Turn<'_>) {
        let read = read_of(asked.claim);
        let deadline = turn.now + self.limits.claim_patience;
        self.read_as(read, asked.layer, chunks, asked.class, Some(others), deadline, turn);
    }

    /// A read for a claim has failed: what it did not get is lacking, or left to claimants when it was found out that the
    /// registry refuses this node.
    pub(super) fn claim_failed(&mut self, claim: ClaimId, turn: &mut Turn<'_>) {
        let held = self.desk.release(claim);
        let Some(record) = self.desk.claims.get_mut(&claim) else { return };
        let mut lacking = std::mem::take(&mut record.awaited);
        let (layer, peer) = (record.layer, record.peer);
        if let Some(layer) = self.layers.get(&layer) {
            lacking = lacking.difference(&layer.have);
        }
        if let Some(Held { extent, chunks, can_read, .. }) = held.filter(|_| !self.can_read(layer)) {
            let mut rest = lacking.intersection(&chunks);
            lacking.remove_all(&rest);
            self.send_to_delegates(claim, (layer, peer), extent.start, &mut rest, turn);
            self.leave_to_claimant(claim, (layer, peer), &extent, rest, can_read, turn);
        }
        rule(claim, Ruling::Lacks(lacking), turn);
    }

    /// Nobody waits for the claim any more. What is under way for it goes on: the next claimant wants the same.
    pub(super) fn claim_ended(&mut self, claim: ClaimId) {
        self.desk.release(claim);
        self.desk.claims.remove(&claim);
        let id = read_of(claim);
        if let Some(read) = self.reads.remove(id)
            && let Some(layer) = self.layers.get_mut(&read.layer)
        {
            layer.reads.remove(id, &read.needs);
        }
    }

    /// Tells claimants that the registry has asked for rest, so that they do not turn to it themselves.
    pub(super) fn tell_rests(&mut self, turn: &mut Turn<'_>) {
        if self.origins.values().all(|origin| origin.rest_until <= turn.now) {
            return;
        }
        for (id, claim) in &mut self.desk.claims {
            let Some(layer) = self.layers.get(&claim.layer).filter(|_| self.reads.get(read_of(*id)).is_some()) else {
                continue;
            };
            let origin = layer.origin.no.and_then(|no| self.origins.get(&no));
            let Some(until) = origin.map(|origin| origin.rest_until).filter(|until| *until > turn.now) else {
                continue;
            };
            // Said again before it is over, as it is believed only so long.
            if claim.told_rest < until.min(turn.now + self.limits.told_rest_max / 2) {
                claim.told_rest = until.min(turn.now + self.limits.told_rest_max);
                rule(*id, Ruling::RegistryRests(until.since(turn.now)), turn);
            }
        }
    }
}

/// Rules on chunks, if there are any.
pub(super) fn rule(claim: ClaimId, ruling: Ruling, turn: &mut Turn<'_>) {
    let is_empty = match &ruling {
        Ruling::Give(chunks) | Ruling::Lacks(chunks) | Ruling::Delegate(chunks) => chunks.is_empty(),
        Ruling::Refer { chunks, .. } => chunks.is_empty(),
        Ruling::RegistryRests(_) | Ruling::NotMine { .. } => false,
    };
    if !is_empty {
        turn.out.push(Action::Rule { claim, ruling });
    }
}
