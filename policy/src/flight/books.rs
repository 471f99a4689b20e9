//! What an owner remembers of one extent: who was given what of it, who was sent to others, and who reads it itself.
//!
//! A claimant that comes for what it was given or sent for does not have it, whatever the book says, and the book takes it back:
//! so nobody is sent to it, and it is not sent again to where it was.

use std::collections::{BTreeMap, VecDeque};

use hermes_image::runs::Runs;

use crate::event::PeerNo;
use crate::limits::Limits;
use crate::time::Instant;

/// Claimants that were given something remembered of one extent. Of ten thousand that come together a hundred are served by the owner,
/// and others than these where they read other chunks of the extent.
const GIVEN_MAX: usize = 256;
/// Claimants remembered of one extent while some of them were only sent away; delegations of it, and peers that one claimant was sent
/// to.
const REMEMBERED_MAX: usize = 64;

/// What a claimant of an extent was answered.
#[derive(Debug, Clone)]
pub(super) struct Claimant {
    pub(super) peer: PeerNo,
    at: Instant,
    /// What it was given here.
    given: Runs,
    /// What it was sent to others for.
    sent: Runs,
    /// Whom it was sent to, the latest last.
    to: VecDeque<PeerNo>,
    /// How often others were sent to it.
    pub(super) named: u32,
}

impl Claimant {
    /// What it has or is about to have.
    pub(super) fn has(&self, now: Instant, limits: &Limits) -> Runs {
        let mut has = self.given.clone();
        if now >= self.at + limits.rank_wait_min {
            has.insert_all(&self.sent);
        }
        has
    }
}

/// How often a chunk was given to claimants, and answered for at all.
#[derive(Debug, Clone, Copy, Default)]
struct Answers {
    given: u32,
    all: u32,
}

/// Whom an owner has sent where, for one extent.
#[derive(Debug, Clone, Default)]
pub(super) struct Book {
    pub(super) used: Instant,
    /// Who was given chunks of the extent or sent to others for them, the latest last.
    pub(super) claimants: VecDeque<Claimant>,
    /// How often each chunk was answered for since nobody was remembered.
    answers: BTreeMap<u32, Answers>,
    /// Who reads what itself.
    pub(super) delegated: VecDeque<(PeerNo, Instant, Runs)>,
}

impl Book {
    pub(super) fn forget(&mut self, now: Instant, limits: &Limits) {
        let (given, delegated) = (now - limits.claimant_memory, now - limits.claim_patience);
        self.claimants.retain(|claimant| claimant.at >= given);
        if self.claimants.is_empty() {
            self.answers.clear();
        }
        self.delegated.retain(|(_, at, _)| *at >= delegated);
    }

    /// The record of a claimant, as the latest one. Those that were only sent away make room first, and then those that others were
    /// sent to most often.
    fn claimant(&mut self, peer: PeerNo, now: Instant) -> &mut Claimant {
        let place = self.claimants.iter().position(|claimant| claimant.peer == peer);
        let known = place.and_then(|place| self.claimants.remove(place));
        if known.is_none() && self.claimants.len() >= REMEMBERED_MAX {
            let sent = self.claimants.iter().position(|claimant| claimant.given.is_empty());
            let places = self.claimants.iter().enumerate().rev();
            let is_full = self.claimants.len() >= GIVEN_MAX;
            let named_most = || places.max_by_key(|(_, claimant)| claimant.named).filter(|_| is_full);
            if let Some(place) = sent.or_else(|| named_most().map(|(place, _)| place)) {
                self.claimants.remove(place);
            }
        }
        let fresh = || Claimant { peer, at: now, given: Runs::new(), sent: Runs::new(), to: VecDeque::new(), named: 0 };
        self.claimants.push_back(Claimant { at: now, ..known.unwrap_or_else(fresh) });
        let last = self.claimants.len() - 1;
        &mut self.claimants[last]
    }

    /// Whether the next claimant of a chunk is served by the owner when it could be sent to `others`: the first few are, and then so
    /// many that each of them serves as many others. Of those that were given it some may be forgotten.
    pub(super) fn is_served_here(&self, chunk: u32, others: usize, limits: &Limits) -> bool {
        let Answers { given, all } = self.answers.get(&chunk).copied().unwrap_or_default();
        (given as usize).min(others) < limits.direct_claimants || given < all.isqrt()
    }

    fn note_answers(&mut self, chunks: &Runs, given: u32) {
        for chunk in chunks.chunks() {
            let answers = self.answers.entry(chunk).or_default();
            answers.given = answers.given.saturating_add(given);
            answers.all = answers.all.saturating_add(1);
        }
    }

    /// Whether the claimant was given some of `chunks` or sent to others for them. It does not have them.
    pub(super) fn comes_back(&mut self, peer: PeerNo, chunks: &Runs) -> bool {
        let Some(claimant) = self.claimants.iter_mut().find(|claimant| claimant.peer == peer) else { return false };
        let known = |claimant: &Claimant| claimant.given.chunk_count() + claimant.sent.chunk_count();
        let before = known(claimant);
        claimant.given.remove_all(chunks);
        claimant.sent.remove_all(chunks);
        known(claimant) < before
    }

    /// Whom the claimant was sent to before.
    pub(super) fn tried(&self, peer: PeerNo) -> VecDeque<PeerNo> {
        let claimant = self.claimants.iter().find(|claimant| claimant.peer == peer);
        claimant.map(|claimant| claimant.to.clone()).unwrap_or_default()
    }

    pub(super) fn note_given(&mut self, peer: PeerNo, chunks: &Runs, now: Instant) {
        if chunks.is_empty() {
            return;
        }
        self.note_answers(chunks, 1);
        let claimant = self.claimant(peer, now);
        claimant.given.insert_all(chunks);
        claimant.sent.remove_all(chunks);
    }

    pub(super) fn note_sent(&mut self, peer: PeerNo, chunks: &Runs, to: &[PeerNo], now: Instant) {
        if chunks.is_empty() {
            return;
        }
        self.note_answers(chunks, 0);
        for named in self.claimants.iter_mut().filter(|claimant| to.contains(&claimant.peer)) {
            named.named = named.named.saturating_add(1);
        }
        let claimant = self.claimant(peer, now);
        claimant.sent.insert_all(chunks);
        claimant.to.retain(|other| !to.contains(other));
        claimant.to.extend(to);
        let forgotten = claimant.to.len().saturating_sub(REMEMBERED_MAX);
        claimant.to.drain(..forgotten);
    }

    pub(super) fn note_delegated(&mut self, peer: PeerNo, now: Instant, chunks: Runs) {
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
