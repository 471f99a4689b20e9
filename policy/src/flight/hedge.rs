//! A reader that waits longer for a peer than nine in ten do gets its chunks from a second one as well.
//!
//! The lease moves to the second ask, and the first one goes on without it: whoever brings a chunk first has brought it.
//! When nobody else has what a peer has and does not send, its chunks are wanted anew without it: their owners are asked,
//! this peer not among them, and whoever's turn it is reads them from the registry once more.
//! What may be asked twice is a share of what demand has asked of peers, so that a slow network is not made slower.

use hermes_image::runs::Runs;

use super::asking::Question;
use super::schedule::Need;
use super::table::Ask;
use super::{Flight, Turn};
use crate::class::Class;
use crate::event::{AskId, PeerNo, Reason, Source};
use crate::limits::Limits;
use crate::peers::Readiness;
use crate::time::{Duration, Instant};

/// Bytes that may be asked twice before a share of anything was asked: a few asks.
const ALLOWANCE_BYTES: u64 = 4 << 20;
/// Silences of this many p90 between two chunks count as slow.
const SLOW_SILENCES: u32 = 4;

/// Waits for a rank after which a chunk is got elsewhere although its only holder sends others all the while.
const SENDER_WAITS: u32 = 4;

/// What demand has asked of peers, and of it twice, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct HedgeBooks {
    asked: u64,
    twice: u64,
}

impl HedgeBooks {
    pub(super) fn asked(&mut self, bytes: u64) {
        self.asked = self.asked.saturating_add(bytes);
    }

    fn has_room(&self, bytes: u64, limits: &Limits) -> bool {
        let most = (self.asked / 100).saturating_mul(limits.hedge_percent).saturating_add(ALLOWANCE_BYTES);
        self.twice.saturating_add(bytes) <= most
    }
}

impl Flight {
    /// Puts the demand asks that take too long to second holders.
    pub(super) fn hedge(&mut self, turn: &mut Turn<'_>) {
        if self.limits.hedge_percent == 0 {
            return;
        }
        if turn.now < self.hedge_from {
            return self.wake_at(self.hedge_from);
        }
        let after = self.peers.latency_p90().max(self.limits.hedge_min);
        let mut due = Vec::new();
        let mut next: Option<Instant> = None;
        for (id, ask) in self.awaited.iter().filter_map(|id| Some((id, self.asks.get(id)?))) {
            let Source::Peer(peer) = ask.source else { continue };
            if ask.chunks.is_empty() || !ask.shadow.is_empty() {
                continue;
            }
            let at = match ask.first_sign {
                None => ask.progress_at() + after,
                Some(_) => ask.progress_at() + after * SLOW_SILENCES,
            };
            if at <= turn.now {
                due.push((*id, peer));
            } else {
                next = Some(next.map_or(at, |next: Instant| next.min(at)));
            }
        }
        // What is due and cannot be put to another one is looked at again whenever something happens.
        self.hedge_from = if due.is_empty() { next.unwrap_or(Instant::NEVER) } else { turn.now };
        for (id, peer) in due {
            self.hedge_one(id, peer, after, turn);
        }
        if let Some(at) = next {
            self.wake_at(at);
        }
    }

    /// Readers wait for an ask from now on.
    pub(super) fn note_awaited(&mut self, id: AskId) {
        self.awaited.insert(id);
        self.hedge_from = Instant::ZERO;
    }

    fn hedge_one(&mut self, id: AskId, slow: PeerNo, after: Duration, turn: &mut Turn<'_>) {
        let Some(ask) = self.asks.get(&id) else { return };
        let (layer, wanted) = (ask.layer, ask.chunks.clone());
        let Some(record) = self.layers.get(&layer) else { return };
        let bytes = record.bytes(&wanted);
        if !self.total.has_room(Class::Demand, &self.limits.total) || !self.hedges.has_room(bytes, &self.limits) {
            return self.wake_at(turn.now + after);
        }
        let ready =
            |peer: PeerNo| self.peers.readiness(peer, Class::Demand, turn.now, &self.limits) == Readiness::Ready;
        let offers: Vec<(PeerNo, Runs)> = record
            .holders
            .iter()
            .filter(|(peer, holder)| {
                **peer != slow && holder.denied_until.is_none_or(|until| until <= turn.now) && ready(**peer)
            })
            .map(|(peer, holder)| (*peer, wanted.intersection(&holder.chunks)))
            .filter(|(_, offer)| !offer.is_empty())
            .collect();
        let Some(most) = offers.iter().map(|(_, offer)| offer.chunk_count()).max() else {
            return self.do_without(id, slow, turn.now);
        };
        let best: Vec<PeerNo> =
            offers.iter().filter(|(_, offer)| offer.chunk_count() == most).map(|(peer, _)| *peer).collect();
        let Some(peer) = self.peers.choose(&best, bytes, Class::Demand, &self.limits, turn.rng) else { return };
        let Some((_, chunks)) = offers.into_iter().find(|(other, _)| *other == peer) else { return };
        self.shadow(id, &chunks, bytes);
        let need = Need { layer, class: Class::Demand, since: turn.now, place: None, acts_for: None };
        self.ask_peer(&need, Question::here(peer, chunks, Reason::Hedge), turn);
    }

    /// Nobody else has what a peer has and has not sent for as long as a rank waits: it rests, and its chunks are wanted anew. What
    /// it does not have itself yet comes as soon as it can, from whomever.
    fn do_without(&mut self, id: AskId, slow: PeerNo, now: Instant) {
        let wait = self.rank_wait();
        let Some(ask) = self.asks.get(&id).filter(|_| self.members.is_swarm()) else { return };
        let (layer, at) = (ask.layer, ask.progress_at() + wait);
        let Some(record) = self.layers.get(&layer) else { return };
        let has = record.holders.get(&slow).map(|holder| ask.chunks.intersection(&holder.chunks)).unwrap_or_default();
        if has.is_empty() {
            return;
        }
        if at > now {
            return self.wake_at(at);
        }
        // Nobody would be asked while it rests, though it is busy with what this node has asked for before.
        let latest = ask.progress_at() + wait * SENDER_WAITS;
        if latest > now && self.peers.is_sending(slow, now, &self.limits) {
            return self.wake_at((now + wait).min(latest));
        }
        let bytes = record.bytes(&has);
        self.peers.slow(slow, now, &self.limits);
        self.shadow(id, &has, bytes);
        self.dirty = true;
    }

    /// An ask has ended. What nobody has sent was not asked for twice in vain.
    pub(super) fn refund(&mut self, ask: &Ask) {
        if ask.first_sign.is_none() {
            self.hedges.twice = self.hedges.twice.saturating_sub(ask.hedged_bytes);
        }
    }

    /// Takes the lease of chunks from an ask that goes on.
    fn shadow(&mut self, id: AskId, chunks: &Runs, bytes: u64) {
        let Some(ask) = self.asks.get_mut(&id) else { return };
        self.hedges.twice += bytes;
        ask.hedged_bytes += bytes;
        ask.chunks = ask.chunks.difference(chunks);
        ask.shadow.insert_all(chunks);
        if let Some(record) = self.layers.get_mut(&ask.layer) {
            record.leased.remove_all(chunks);
            record.changes += 1;
            record.look_again(chunks);
        }
    }
}
