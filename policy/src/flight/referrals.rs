//! Whom an owner serves itself, and whom it sends to whom.
//!
//! What is here already goes to the first few claimants, and later ones are sent to these. For what is still on its way
//! everybody waits until it comes: then all who started together are known, and chance decides which of them the owner serves, as
//! many as each of those then serves. So a crowd of *n* costs nobody more than about the root of *n* uploads of an extent, and who
//! happens to be first everywhere is not sent all the others.
//!
//! What this node cannot get at all is left to a claimant that can ([`Ruling::Delegate`]), and the others are sent there.

use std::collections::VecDeque;

use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;

use super::books::Claimant;
use super::desk::{Asked, Held, rule};
use super::{Flight, Turn};
use crate::event::{ClaimId, PeerNo, Ruling};

impl Flight {
    /// Sends a claimant to others for what of `chunks` enough of them were given: the first few are served here. One that
    /// comes back is sent to those that it was not sent to before, as long as there are any. Gives what is left to be served
    /// here.
    pub(super) fn send_to_others(&mut self, asked: &Asked, again: bool, mut chunks: Runs, turn: &mut Turn<'_>) -> Runs {
        let mut left = Runs::new();
        if chunks.is_empty() {
            return left;
        }
        let (limits, peer) = (&self.limits, asked.peer);
        let book = self.desk.book(asked.layer, asked.extent.start, turn.now, limits);
        let again = book.comes_back(peer, &chunks) || again;
        let tried = if again { book.tried(peer) } else { VecDeque::new() };
        while let Some(first) = chunks.first().map(|run| run.start) {
            let can_give = |other: &&Claimant| {
                other.peer != peer && !tried.contains(&other.peer) && other.has(turn.now, limits).contains(first)
            };
            let mut others: Vec<&Claimant> = book.claimants.iter().filter(can_give).collect();
            if others.is_empty() || !again && book.is_served_here(first, others.len(), limits) {
                left.insert(first..first + 1);
                chunks.remove(first..first + 1);
                continue;
            }
            // Those that the fewest were sent to, by chance among equals.
            others.sort_by_cached_key(|other| (other.named, turn.rng.next_u64()));
            let (mut same, mut peers) = (chunks.clone(), Vec::new());
            for other in others.iter().take(limits.referral_peers) {
                same = same.intersection(&other.has(turn.now, limits));
                peers.push(other.peer);
            }
            chunks.remove_all(&same);
            book.note_sent(peer, &same, &peers, turn.now);
            rule(asked.claim, Ruling::Refer { chunks: same, peers }, turn);
        }
        book.note_given(peer, &left, turn.now);
        left
    }

    /// Lets a claim wait for what is on its way: who is served here is decided when it comes and all who want it are known.
    pub(super) fn hold(&mut self, asked: &Asked, again: bool, can_read: bool, chunks: Runs, turn: &mut Turn<'_>) {
        if chunks.is_empty() {
            return;
        }
        let key = (asked.layer, asked.extent.start);
        let book = self.desk.book(asked.layer, asked.extent.start, turn.now, &self.limits);
        let again = book.comes_back(asked.peer, &chunks) || again;
        let waiting = self.desk.held.entry(key).or_default();
        waiting.ids.insert(asked.claim);
        waiting.end = waiting.end.max(asked.extent.end);
        if let Some(record) = self.desk.claims.get_mut(&asked.claim) {
            record.awaited.insert_all(&chunks);
            record.held = Some(Held { extent: asked.extent.clone(), chunks, again, can_read });
        }
    }

    /// Chunks have come: of those who wait for them some are served here, and the others sent to these.
    pub(super) fn rule_on_held(&mut self, layer: DiffId, arrived: &Runs, turn: &mut Turn<'_>) {
        let held = self.desk.held.range((layer, 0)..=(layer, u32::MAX));
        let touched = held.filter(|((_, start), waiting)| arrived.intersects(&(*start..waiting.end)));
        let extents: Vec<u32> = touched.map(|(key, _)| key.1).collect();
        for extent in extents {
            self.rule_on_extent(layer, extent, arrived, turn);
        }
    }

    fn rule_on_extent(&mut self, layer: DiffId, extent: u32, arrived: &Runs, turn: &mut Turn<'_>) {
        let key = (layer, extent);
        let Some(held) = self.desk.held.get_mut(&key) else { return };
        let ids = &mut held.ids;
        let mut waiting = Vec::new();
        for id in ids.clone() {
            let Some(claim) = self.desk.claims.get_mut(&id) else { continue };
            let Some(held) = &mut claim.held else { continue };
            let come = held.chunks.intersection(arrived);
            if come.is_empty() {
                continue;
            }
            held.chunks.remove_all(&come);
            let order = (!held.again, claim.class, turn.rng.next_u64());
            if held.chunks.is_empty() {
                claim.held = None;
                ids.remove(&id);
            }
            waiting.push((order, id, claim.peer, come));
        }
        if ids.is_empty() {
            self.desk.held.remove(&key);
        }
        waiting.sort_unstable_by_key(|(order, ..)| *order);
        // As many are served here as each of them then serves.
        let back = waiting.iter().filter(|((first, ..), ..)| !first).count();
        let served = (waiting.len() as u64).isqrt() as usize;
        let served = served.max(self.limits.direct_claimants).max(back).min(waiting.len());
        let (direct, others) = waiting.split_at(served);
        let book = self.desk.book(layer, extent, turn.now, &self.limits);
        for (_, id, peer, come) in direct {
            book.note_given(*peer, come, turn.now);
            rule(*id, Ruling::Give(come.clone()), turn);
        }
        for (no, (_, id, peer, come)) in others.iter().enumerate() {
            let named = direct.iter().cycle().skip(no % served.max(1)).take(self.limits.referral_peers.min(served));
            let (mut same, mut peers) = (come.clone(), Vec::new());
            for (_, _, other, theirs) in named.filter(|(_, _, other, _)| other != peer) {
                let common = same.intersection(theirs);
                if !common.is_empty() {
                    same = common;
                    peers.push(*other);
                }
            }
            if peers.is_empty() {
                same = Runs::new();
            }
            let left = come.difference(&same);
            book.note_given(*peer, &left, turn.now);
            book.note_sent(*peer, &same, &peers, turn.now);
            rule(*id, Ruling::Refer { chunks: same, peers }, turn);
            rule(*id, Ruling::Give(left), turn);
        }
        for (_, id, ..) in waiting {
            self.end_if_settled(id);
        }
    }

    /// Sends a claimant to those who were left the chunks, and takes these out of `rest`.
    pub(super) fn send_to_delegates(
        &mut self,
        claim: ClaimId,
        (layer, peer): (DiffId, PeerNo),
        extent: u32,
        rest: &mut Runs,
        turn: &mut Turn<'_>,
    ) {
        let book = self.desk.book(layer, extent, turn.now, &self.limits);
        let mut known = Vec::new();
        for (other, _, chunks) in book.delegated.iter().filter(|(other, ..)| *other != peer) {
            let chunks = rest.intersection(chunks);
            rest.remove_all(&chunks);
            known.push((*other, chunks));
        }
        for (other, chunks) in known {
            book.note_sent(peer, &chunks, &[other], turn.now);
            rule(claim, Ruling::Refer { chunks, peers: vec![other] }, turn);
        }
    }

    /// Leaves the reading to a claimant that can, as this node cannot.
    pub(super) fn leave_to_claimant(
        &mut self,
        claim: ClaimId,
        (layer, peer): (DiffId, PeerNo),
        extent: &ChunkRange,
        rest: Runs,
        can_read: bool,
        turn: &mut Turn<'_>,
    ) {
        if rest.is_empty() {
            return;
        }
        if !can_read {
            return rule(claim, Ruling::Lacks(rest), turn);
        }
        let book = self.desk.book(layer, extent.start, turn.now, &self.limits);
        // Whoever reads some of the extent may as well read the rest of it.
        let mut chunks = Runs::one(extent.clone());
        for (_, _, others) in book.delegated.iter().filter(|(other, ..)| *other != peer) {
            chunks.remove_all(others);
        }
        chunks.insert_all(&rest);
        book.note_delegated(peer, turn.now, chunks.clone());
        rule(claim, Ruling::Delegate(chunks), turn);
    }
}
