//! Asking: an ask is booked, takes the leases of those that it overtakes, and goes to the driver.

use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;

use super::schedule::Need;
use super::shape::{cut_spans, near, reach};
use super::table::{Ask, Certainty};
use super::{Flight, Turn};
use crate::class::Class;
use crate::event::{Action, AskId, OriginNo, PeerNo, Reason, Source, Want};

/// Uncompressed bytes before and after a chunk in which something has to be here, for what lies next to be taken along with it.
const SEEN_WITHIN_BYTES: u64 = 1 << 20;

/// A question to a peer.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) peer: PeerNo,
    pub(super) chunks: Runs,
    pub(super) want: Want,
    pub(super) reason: Reason,
    /// The extent that the peer is asked for as its owner; empty for others.
    pub(super) extent: ChunkRange,
}

impl Question {
    /// For what the peer has, or what is on its way to it.
    pub(super) fn here(peer: PeerNo, chunks: Runs, reason: Reason) -> Self {
        Self { peer, chunks, want: Want::Here, reason, extent: 0..0 }
    }
}

/// What an ask goes to, and what is expected of it.
#[derive(Debug)]
pub(super) struct Target {
    source: Source,
    origin: Option<OriginNo>,
    want: Want,
    extent: ChunkRange,
    certainty: Certainty,
}

impl Target {
    /// The local store.
    pub(super) const LOCAL: Self = Self::sure(Source::Local, None);

    /// A source that has all of it.
    const fn sure(source: Source, origin: Option<OriginNo>) -> Self {
        Self { source, origin, want: Want::Here, extent: 0..0, certainty: Certainty::Sure }
    }
}

impl Flight {
    /// Puts a question to a peer.
    pub(super) fn ask_peer(&mut self, need: &Need, question: Question, turn: &mut Turn<'_>) {
        let Question { peer, chunks, want, reason, extent } = question;
        let (layer, class) = (need.layer, need.class);
        let record = self.layers.get(&layer);
        let bytes = record.map_or(0, |record| record.bytes(&chunks));
        let has = record.and_then(|record| record.holders.get(&peer));
        let certainty = match want {
            Want::Owner { .. } => Certainty::Firm,
            Want::Here if has.is_some_and(|holder| chunks.difference(&holder.chunks).is_empty()) => Certainty::Sure,
            Want::Here => Certainty::Hoped,
        };
        let timeout = match class {
            Class::Demand => self.limits.reader_stall(Source::Peer(peer), self.rank_wait()),
            Class::Prefetch => self.limits.stall(Source::Peer(peer), class),
        };
        if class == Class::Demand {
            self.hedges.asked(bytes);
        }
        let target = Target { source: Source::Peer(peer), origin: None, want, extent: extent.clone(), certainty };
        let first_word = turn.now + self.first_word_wait();
        let ask = self.lease(need, target, chunks.clone(), bytes, turn);
        if let Some(asked) = self.asks.get_mut(&ask).filter(|_| class == Class::Demand) {
            asked.lease_until = first_word;
            self.lease_ends_at(first_word);
        }
        turn.out.push(Action::AskPeer { ask, peer, layer, chunks, class, want, reason, extent, timeout });
    }

    /// Asks the registry for the spans of the first wanted chunk and their neighbours. Gives the chunks that the ask
    /// leases.
    pub(super) fn ask_origin(
        &mut self,
        need: &Need,
        no: OriginNo,
        wanted: &Runs,
        mine: &Runs,
        turn: &mut Turn<'_>,
    ) -> Option<Runs> {
        let record = self.layers.get(&need.layer)?;
        let size = self.limits.origin_size.bytes(need.class);
        let first = wanted.first()?.start;
        let mut within = reach(&record.geometry, first, size);
        // Not beyond the extents whose turn is this node's.
        let own = mine.iter().find(|run| run.contains(&first))?;
        within.end = within.end.min(own.end);
        let mut targets = self.gather(need, Some(&within));
        if need.class == Class::Demand {
            // What readahead wants next comes with it: a request of its own would read the end of this one again.
            let mut along = record.ahead.within(within.clone());
            let around = record.geometry.around(first, SEEN_WITHIN_BYTES, SEEN_WITHIN_BYTES);
            if need.acts_for.is_none() && record.have.intersects(&around) {
                // Where something was read before the next read is likeliest here, and to wait for another round trip costs more than to
                // take it along. Random reads drag nothing along.
                let end = near(&record.geometry, first, self.limits.origin_near_bytes).end.clamp(first, within.end);
                let next = Runs::one(first..end);
                along.insert_all(&record.worth_guessing(next, wanted, turn.now, &self.limits));
            }
            targets.insert_all(&along.difference(&record.have).difference(&record.leased));
        }
        // What somebody else has is not read from the registry on the way.
        for holder in record.holders.values() {
            targets.remove_all(&holder.chunks);
        }
        targets.remove_all(&record.local);
        targets.insert_all(&wanted.within(within));
        let gap = self.limits.origin_gap.bytes(need.class);
        let spans = cut_spans(&record.geometry, &targets, size, gap)?;
        let mut chunks = Runs::one(record.geometry.span_chunks(&spans));
        chunks = chunks.difference(&record.have);
        let mut leased = record.leased.within(record.geometry.span_chunks(&spans));
        if need.class == Class::Demand {
            for ask in record.overtakable.iter().filter_map(|id| self.asks.get(id)) {
                leased.remove_all(&ask.chunks);
            }
        }
        // A span is read whole: what owners of it were asked for at the same time comes with it, and would be left to this node
        // as well.
        for ask in record.asks.iter().filter_map(|id| self.asks.get(id)) {
            if ask.certainty < Certainty::Sure && ask.brought_bytes == 0 && ask.class >= need.class {
                leased.remove_all(&ask.chunks);
            }
        }
        leased.remove_all(&self.unsure(record, &chunks, need.acts_for));
        chunks.remove_all(&leased);
        if chunks.intersection(wanted).is_empty() {
            return None;
        }
        let read = record.geometry.span_bytes(&spans);
        let (layer, class, timeout) = (need.layer, need.class, self.limits.stall(Source::Origin, need.class));
        let reason = self.origin_reason(need, first, turn.now);
        let target = Target::sure(Source::Origin, Some(no));
        let ask = self.lease(need, target, chunks.clone(), read.end - read.start, turn);
        turn.out.push(Action::AskOrigin { ask, origin: no, layer, spans, class, reason, timeout });
        Some(chunks)
    }

    /// Books a new ask, and moves to it the leases of the asks that it overtakes.
    pub(super) fn lease(
        &mut self,
        need: &Need,
        target: Target,
        chunks: Runs,
        bytes: u64,
        turn: &mut Turn<'_>,
    ) -> AskId {
        let Target { source, origin, want, extent, certainty } = target;
        let (layer, class) = (need.layer, need.class);
        let id = AskId(self.next_ask);
        self.next_ask += 1;
        self.overtake(layer, &chunks, turn);
        self.total.add(class);
        match source {
            Source::Local => self.local.add(class),
            Source::Peer(peer) => self.peers.asked(peer, class, bytes),
            Source::Origin => {
                if let Some(record) = origin.and_then(|no| self.origins.get_mut(&no)) {
                    record.load.add(class);
                }
            }
        }
        self.note_in_surveys(source, class, turn.now);
        let silence = self.limits.stall(source, class) + self.limits.lease_grace;
        let mut whole_stream = false;
        if let Some(record) = self.layers.get_mut(&layer) {
            record.leased.insert_all(&chunks);
            record.changes += 1;
            record.asks.insert(id);
            whole_stream = source == Source::Origin && record.geometry.is_whole_stream();
            if class == Class::Prefetch || whole_stream {
                record.overtakable.insert(id);
            }
        }
        let (sent, lease_until) = (turn.now, turn.now + silence);
        let ask = Ask {
            layer,
            source,
            origin,
            class,
            chunks,
            bytes,
            brought_bytes: 0,
            sent,
            first_sign: None,
            last_sign: sent,
            silence,
            lease_until,
            whole_stream,
            want,
            extent,
            certainty,
            shadow: Runs::new(),
            hedged_bytes: 0,
            joined: None,
            last_brought: sent,
            was_pending: false,
        };
        if ask.is_waited_for() {
            self.note_awaited(id);
        }
        self.asks.insert(id, ask);
        self.lease_ends_at(lease_until);
        id
    }

    /// Takes chunks out of the leases of other asks of the layer. An ask that has nothing left to bring is cancelled.
    fn overtake(&mut self, layer: DiffId, chunks: &Runs, turn: &mut Turn<'_>) {
        let Some(record) = self.layers.get_mut(&layer) else { return };
        if record.leased.intersection(chunks).is_empty() {
            return;
        }
        let mut empty = Vec::new();
        for id in &record.asks {
            let Some(ask) = self.asks.get_mut(id) else { continue };
            let taken = ask.chunks.intersection(chunks);
            if taken.is_empty() {
                continue;
            }
            debug_assert!(ask.can_be_overtaken() || ask.certainty < Certainty::Sure, "{id:?} is not overtaken");
            ask.chunks.remove_all(&taken);
            record.leased.remove_all(&taken);
            if ask.chunks.is_empty() {
                empty.push(*id);
            }
        }
        for ask in empty {
            self.cancel_ask(ask, turn);
        }
    }
}
