//! What a node answers when others ask it for chunks that they did not find.
//!
//! Asked for what is here, it gives what it has and what is surely on its way to it, and lacks the rest. Asked as the owner
//! of an extent it does one of four things, chunk by chunk: it gives what it has or will have, to the first few claimants;
//! sends later ones to those; gets what is missing when it has the layer open and its registry gives it; and otherwise
//! leaves the reading to the first claimant that can, and sends the next ones to that. So an owner needs neither the layer nor a login
//! to keep its extent from being read twice.
//!
//! **Nobody waits in a circle**: a promise stands on one ask and ends with it. Who asks for what is here is promised what
//! comes from the registry, from this disk, from a peer that has said that it has it, or from an owner; never what comes from
//! itself, nor from a peer that was merely named. Who asks this node as an owner is promised what comes from the first three;
//! for the rest this node turns to them itself, also when it has asked another owner before.

use std::collections::{BTreeMap, VecDeque};

use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;

use super::table::Certainty;
use super::{Flight, Turn};
use crate::class::Class;
use crate::event::{Action, ClaimId, PeerNo, ReadId, Ruling, Source, Want};
use crate::limits::Limits;
use crate::members::Duty;
use crate::time::Instant;

/// Reads that this node makes for claims have numbers from here on; the driver's are below.
const CLAIM_READS: u64 = 1 << 63;
/// Claimants and delegations remembered of one extent.
const REMEMBERED_MAX: usize = 16;

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
struct Claim {
    layer: DiffId,
    /// What was given and was not here then.
    awaited: Runs,
    /// Until when the claimant knows that the registry rests.
    told_rest: Instant,
}

/// Whom an owner has sent where, for one extent.
#[derive(Debug, Clone, Default)]
struct Book {
    used: Instant,
    /// Who was given chunks of the extent, the latest last.
    given: VecDeque<(PeerNo, Instant)>,
    /// Who reads what itself.
    delegated: VecDeque<(PeerNo, Instant, Runs)>,
}

impl Book {
    fn forget(&mut self, now: Instant, limits: &Limits) {
        let (given, delegated) = (now - limits.claimant_memory, now - limits.claim_patience);
        self.given.retain(|(_, at)| *at >= given);
        self.delegated.retain(|(_, at, _)| *at >= delegated);
    }

    fn note_given(&mut self, peer: PeerNo, now: Instant) {
        self.given.retain(|(other, _)| *other != peer);
        if self.given.len() >= REMEMBERED_MAX {
            self.given.pop_front();
        }
        self.given.push_back((peer, now));
    }

    fn note_delegated(&mut self, peer: PeerNo, now: Instant, chunks: Runs) {
        for (_, _, others) in &mut self.delegated {
            others.remove_all(&chunks);
        }
        self.delegated.retain(|(_, _, others)| !others.is_empty());
        if self.delegated.len() >= REMEMBERED_MAX {
            self.delegated.pop_front();
        }
        self.delegated.push_back((peer, now, chunks));
    }
}

/// What this node owes to others.
#[derive(Debug, Clone, Default)]
pub(super) struct Desk {
    claims: BTreeMap<ClaimId, Claim>,
    books: BTreeMap<(DiffId, u32), Book>,
    /// What asks that ended were to bring and did not.
    broken: BTreeMap<DiffId, Runs>,
}

impl Desk {
    pub(super) fn len(&self) -> usize {
        self.claims.len()
    }

    pub(super) fn is_within(&self, limits: &Limits) -> bool {
        self.claims.len() <= limits.claims && self.books.len() <= limits.books
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

    fn book(&mut self, layer: DiffId, extent: &ChunkRange, now: Instant, limits: &Limits) -> &mut Book {
        let key = (layer, extent.start);
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
        let record = Claim { layer: asked.layer, awaited: Runs::new(), told_rest: Instant::ZERO };
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
                    self.read_for(&asked, left_here, duty, turn);
                }
                rule(claim, Ruling::Lacks(lacking), turn);
            }
            Want::Owner { duty, again, can_read } => self.claimed_of_owner(&asked, duty, again, can_read, turn),
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
        if self.rank(layer, extent, duty).is_none() {
            return rule(claim, Ruling::NotMine { epoch: self.members.epoch() }, turn);
        }
        // As the owner of a zone it asks the owner among all, for which it needs no login.
        let can_read = self.can_read(layer);
        let here = self.here(layer, &asked.chunks, peer, Certainty::Sure);
        let mut rest = asked.chunks.difference(&here);
        // On its way, and got anew should that end.
        let mut coming = Runs::new();
        if !here.is_empty() {
            match self.others_to_name(asked, again, turn) {
                Some(peers) => rule(claim, Ruling::Refer { chunks: here, peers }, turn),
                None if can_read => {
                    let layer = self.layers.get(&layer);
                    coming = layer.map_or_else(Runs::new, |layer| here.difference(&layer.have));
                    self.give(claim, here.difference(&coming), turn);
                }
                None => self.give(claim, here, turn),
            }
        }
        let limits = &self.limits;
        let book = self.desk.book(layer, extent, turn.now, limits);
        if again {
            // Who was to read it has not.
            for (other, _, chunks) in &mut book.delegated {
                if *other != peer {
                    chunks.remove_all(&rest);
                }
            }
        }
        for (other, _, chunks) in book.delegated.iter().filter(|(other, ..)| *other != peer) {
            let known = rest.intersection(chunks);
            rest.remove_all(&known);
            rule(claim, Ruling::Refer { chunks: known, peers: vec![*other] }, turn);
        }
        if can_read {
            rest.insert_all(&coming);
            if !rest.is_empty() {
                book.note_given(peer, turn.now);
                self.read_for(asked, rest, duty, turn);
            }
            return;
        }
        if rest.is_empty() {
            return;
        }
        if !claimant_can_read {
            return rule(claim, Ruling::Lacks(rest), turn);
        }
        // Whoever reads some of the extent may as well read the rest of it.
        let mut chunks = Runs::one(extent.clone());
        for (_, _, others) in book.delegated.iter().filter(|(other, ..)| *other != peer) {
            chunks.remove_all(others);
        }
        chunks.insert_all(&rest);
        book.note_delegated(peer, turn.now, chunks.clone());
        rule(claim, Ruling::Delegate(chunks), turn);
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
            rule(*id, Ruling::Lacks(lost), turn);
        }
    }

    /// Whom a claimant is sent to: the first few are served here, later ones sent to them, in turns.
    fn others_to_name(&mut self, asked: &Asked, again: bool, turn: &mut Turn<'_>) -> Option<Vec<PeerNo>> {
        let limits = &self.limits;
        let book = self.desk.book(asked.layer, &asked.extent, turn.now, limits);
        let others: Vec<PeerNo> =
            book.given.iter().map(|(other, _)| *other).filter(|other| *other != asked.peer).collect();
        let is_known = book.given.iter().any(|(other, _)| *other == asked.peer);
        if again || is_known || others.len() < limits.direct_claimants {
            book.note_given(asked.peer, turn.now);
            return None;
        }
        let first = turn.rng.below(others.len() as u64) as usize;
        let peers = others.iter().cycle().skip(first).take(limits.referral_peers.min(others.len())).copied().collect();
        // It will have them soon, and the next ones may be sent to it.
        book.note_given(asked.peer, turn.now);
        Some(peers)
    }

    /// Which of `chunks` are here or on their way with at least this certainty, and not by way of `claimant`.
    fn here(&self, layer: DiffId, chunks: &Runs, claimant: PeerNo, least: Certainty) -> Runs {
        let Some(record) = self.layers.get(&layer) else { return Runs::new() };
        let mut here = chunks.intersection(&record.have);
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
    fn read_for(&mut self, asked: &Asked, chunks: Runs, duty: Duty, turn: &mut Turn<'_>) {
        let read = read_of(asked.claim);
        self.give(asked.claim, chunks.clone(), turn);
        let deadline = turn.now + self.limits.claim_patience;
        self.read_as(read, asked.layer, chunks, asked.class, Some(duty), deadline, turn);
    }

    /// A read for a claim has failed: what it did not get is lacking.
    pub(super) fn claim_failed(&mut self, claim: ClaimId, turn: &mut Turn<'_>) {
        let Some(record) = self.desk.claims.get_mut(&claim) else { return };
        let mut lacking = std::mem::take(&mut record.awaited);
        if let Some(layer) = self.layers.get(&record.layer) {
            lacking = lacking.difference(&layer.have);
        }
        rule(claim, Ruling::Lacks(lacking), turn);
    }

    /// Nobody waits for the claim any more. What is under way for it goes on: the next claimant wants the same.
    pub(super) fn claim_ended(&mut self, claim: ClaimId) {
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
fn rule(claim: ClaimId, ruling: Ruling, turn: &mut Turn<'_>) {
    let is_empty = match &ruling {
        Ruling::Give(chunks) | Ruling::Lacks(chunks) | Ruling::Delegate(chunks) => chunks.is_empty(),
        Ruling::Refer { chunks, .. } => chunks.is_empty(),
        Ruling::RegistryRests(_) | Ruling::NotMine { .. } => false,
    };
    if !is_empty {
        turn.out.push(Action::Rule { claim, ruling });
    }
}
