//! Facts and what they change in the table. Nothing is asked for here: that is the scheduler's work afterwards.

use std::sync::Arc;

use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;

use super::desk::Asked;
use super::table::{ForOthers, Layer, Lookup, Read};
use super::{Flight, Turn};
use crate::class::Class;
use crate::event::{Action, AskId, Event, FailReason, OriginNo, PeerNo, ReadId, Source, Want};
use crate::peers::Readiness;
use crate::time::{Duration, Instant};

impl Flight {
    pub(super) fn apply(&mut self, event: Event, turn: &mut Turn<'_>) {
        match event {
            Event::LayerOpened { layer, geometry, present, local, origin } => {
                if !self.layers.contains_key(&layer) && self.layers.len() < self.limits.layers {
                    self.layers.insert(layer, Layer::new(geometry, &present, &local, origin));
                    if let Some(origin) = origin {
                        self.origins.entry(origin).or_default().layers += 1;
                    }
                }
            }
            Event::LayerClosed { layer } => self.layer_closed(layer, turn),
            Event::GeometryChanged { layer, geometry } => {
                if let Some(record) = self.layers.get_mut(&layer)
                    && record.geometry.chunk_count() == geometry.chunk_count()
                {
                    record.geometry = geometry;
                    self.known_owners.forget_layer(&layer);
                    record.origin.spans_asked = None;
                    self.stir(layer);
                }
            }
            Event::OriginChanged { layer, origin, usable } => self.origin_changed(layer, origin, usable),
            Event::PeerUp { peer } => self.peer_up(peer),
            Event::PeerDown { peer } => {
                let is_asked = self.asks.values().any(|ask| ask.source == Source::Peer(peer));
                if is_asked && self.peers.is_member(peer) {
                    turn.out.push(Action::Suspect { peer });
                }
                self.forget_peer(peer, turn);
                self.peers.down(peer, turn.now, &self.limits);
            }
            Event::PeerHas { peer, layer, chunks } => self.peer_has(peer, layer, &chunks),
            Event::HoldersFound { layer } => {
                if let Some(record) = self.layers.get_mut(&layer) {
                    record.lookup = Lookup::Ended { at: turn.now };
                    self.stir(layer);
                }
            }
            Event::ReadNeeds { read, layer, chunks, class, deadline } => {
                self.read_needs(read, layer, chunks, class, deadline, turn);
            }
            Event::MembersChanged { members } => {
                self.peers.set_members(Arc::clone(&members), turn.now, &self.limits);
                for (peer, holder) in self.layers.values_mut().flat_map(|layer| &mut layer.holders) {
                    holder.is_far = members.is_far(*peer);
                }
                self.members = members;
                self.known_owners.forget();
                self.stir_all();
            }
            Event::Claimed { claim, peer, layer, chunks, extent, class, want } => {
                self.claimed(Asked { claim, peer, layer, chunks, extent, class, want }, turn);
            }
            Event::ClaimEnded { claim } => self.claim_ended(claim),
            Event::AskReferred { ask, chunks, peers } => self.referred(ask, &chunks, &peers, turn.now),
            Event::AskDelegated { ask, chunks } => self.was_delegated(ask, &chunks, turn.now),
            Event::AskPending { ask, registry_rests } => self.ask_pending(ask, registry_rests),
            Event::ReadHit { layer, first_chunk, end_chunk } => {
                self.read_ahead(layer, &Runs::one(first_chunk..end_chunk), turn);
            }
            Event::ReadCancelled { read } => {
                self.remove_read(read, turn);
            }
            Event::Arrived { layer, chunks } => {
                if let Some(record) = self.layers.get_mut(&layer) {
                    record.have.insert_all(&chunks.within(0..record.geometry.chunk_count()));
                }
                self.arrived(layer, &chunks, turn);
            }
            Event::PassedThrough { layer, chunks } => {
                // What cannot be kept is not worth guessing.
                if let Some(record) = self.layers.get_mut(&layer) {
                    record.ahead = Runs::new();
                }
                self.arrived(layer, &chunks, turn);
            }
            Event::Evicted { layer, chunks } => self.evicted(layer, &chunks),
            Event::LocalHas { layer, chunks } => {
                if let Some(record) = self.layers.get_mut(&layer) {
                    record.local.insert_all(&chunks.within(0..record.geometry.chunk_count()));
                    self.stir(layer);
                }
            }
            Event::AskProgress { ask } => {
                if let Some(ask) = self.asks.get_mut(&ask) {
                    if let (None, Some(origin)) = (ask.first_sign, ask.origin.and_then(|no| self.origins.get_mut(&no)))
                    {
                        origin.learn(turn.now.since(ask.sent));
                    }
                    ask.renew(turn.now);
                    if let Source::Peer(peer) = ask.source {
                        self.heard_from(peer);
                    }
                }
            }
            Event::AskEnded { ask, outcome } => self.ask_ended(ask, outcome, turn),
            Event::TimerFired => self.armed = None,
        }
    }

    /// A sign of life of a peer: if it rested for its silence, it may be asked again.
    fn heard_from(&mut self, peer: PeerNo) {
        if self.peers.alive(peer, self.now) {
            self.freed.insert(peer);
            self.dirty = true;
        }
    }

    /// A peer works on an ask and has nothing yet. What it says of the registry holds here, too: it saw it last.
    fn ask_pending(&mut self, id: AskId, registry_rests: Option<Duration>) {
        let now = self.now;
        let Some(ask) = self.asks.get_mut(&id) else { return };
        // Where all senders pause, nobody is quicker.
        let patience = self.limits.overtaken_patience.max(self.peers.pause_bound());
        ask.renew_pending(now, self.readings.overtake(ask).then_some(patience), &self.limits);
        let (source, layer, lease_until) = (ask.source, ask.layer, ask.lease_until);
        self.lease_ends_at(lease_until);
        if let Source::Peer(peer) = source {
            self.heard_from(peer);
        }
        let origin = self.layers.get(&layer).and_then(|record| record.origin.no);
        if let Some(wait) = registry_rests
            && let Some(shared) = origin.and_then(|no| self.origins.get_mut(&no))
        {
            shared.rest_until = shared.rest_until.max(now + wait.min(self.limits.told_rest_max));
        }
    }

    fn layer_closed(&mut self, layer: DiffId, turn: &mut Turn<'_>) {
        let Some(record) = self.layers.get(&layer) else { return };
        let (reads, asks) = (record.reads.all().clone(), record.asks.clone());
        for read in reads {
            self.fail_read(read, FailReason::Closed, turn);
        }
        for ask in asks {
            self.cancel_ask(ask, turn);
        }
        self.ahead_layers.remove(&layer);
        self.known_owners.forget_layer(&layer);
        let origin = self.layers.remove(&layer).and_then(|record| record.origin.no);
        self.leave_origin(origin);
    }

    /// One layer less uses the registry. Its books stay open while asks of it are under way.
    fn leave_origin(&mut self, origin: Option<OriginNo>) {
        if let Some(no) = origin
            && let Some(record) = self.origins.get_mut(&no)
        {
            record.layers -= 1;
            self.origins.retain(|_, record| !record.is_unused());
        }
    }

    fn origin_changed(&mut self, layer: DiffId, origin: Option<OriginNo>, usable: bool) {
        let now = self.now;
        let Some(record) = self.layers.get_mut(&layer) else { return };
        let left = std::mem::replace(&mut record.origin.no, origin);
        record.origin.changed_at = now;
        record.origin.usable = usable;
        record.origin.refused_until = None;
        record.origin.wrong_bytes = 0;
        record.origin.spans_asked = None;
        record.origin.backoff.succeed();
        record.troubles.remove(&Source::Origin);
        if left != origin {
            if let Some(no) = origin {
                self.origins.entry(no).or_default().layers += 1;
            }
            self.leave_origin(left);
        }
        self.stir(layer);
    }

    fn peer_up(&mut self, peer: PeerNo) {
        let before = self.peers.readiness(peer, Class::Demand, self.now, &self.limits);
        if !self.peers.up(peer, self.now, &self.limits) {
            return;
        }
        // Of a member that is asked already the connection is no news.
        let is_news = !matches!(before, Readiness::Ready | Readiness::Full | Readiness::Busy(_));
        // The newcomer may have what nobody had. A search that ended a moment ago is not repeated for each of many
        // peers that come up together.
        for record in self.layers.values_mut() {
            if let Lookup::Ended { at } = record.lookup
                && record.holders.is_empty()
                && self.now >= at + self.limits.lookup_again
            {
                record.lookup = Lookup::Never;
                record.search_is_worth_waiting = true;
                self.dirty = true;
                record.quiet = None;
            }
        }
        if is_news {
            self.stir_all();
        }
    }

    /// Ends all asks to a peer and forgets what it has.
    pub(super) fn forget_peer(&mut self, peer: PeerNo, turn: &mut Turn<'_>) {
        let asks: Vec<AskId> =
            self.asks.iter().filter(|(_, ask)| ask.source == Source::Peer(peer)).map(|(id, _)| *id).collect();
        for ask in asks {
            if let Some(asked) = self.asks.get(&ask).filter(|asked| matches!(asked.want, Want::Owner { .. })).cloned() {
                self.pass_over(&asked, peer, turn.now + self.limits.owner_rest);
            }
            self.cancel_ask(ask, turn);
        }
        for record in self.layers.values_mut() {
            record.forget_peer(peer);
        }
        self.stir_all();
    }

    fn peer_has(&mut self, peer: PeerNo, layer: DiffId, chunks: &Runs) {
        self.heard_from(peer);
        if !self.peers.is_usable(peer, self.now) {
            return;
        }
        let Some(record) = self.layers.get_mut(&layer) else { return };
        let all = 0..record.geometry.chunk_count();
        let is_news = !record.holders.contains_key(&peer);
        let Some(holder) = record.telling_holder(peer, self.members.is_far(peer), &self.limits) else { return };
        let more = chunks.within(all).difference(&holder.chunks);
        if !more.is_empty() && !holder.chunks.is_empty() {
            holder.grew = self.now;
        }
        holder.chunks.insert_all(&more);
        if holder.chunks.run_count() > self.limits.runs_per_holder {
            holder.chunks = holder.chunks.iter().take(self.limits.runs_per_holder).collect();
        }
        // Most of what others tell is here already, or wanted by nobody.
        let is_wanted = |read: ReadId| {
            let demand = self.reads.get(read).filter(|read| read.class == Class::Demand);
            demand.is_some_and(|read| read.missing.first_common(&more).is_some())
        };
        let is_waited_for = !record.reads.all().is_empty() || !record.ahead.is_empty();
        let may_be_wanted = is_news
            || more.first_common(&record.ahead).is_some()
            || record.quiet.as_ref().is_none_or(|quiet| quiet.waits_for_any(&more))
            || record.reads.near(&more).into_iter().any(is_wanted);
        if is_waited_for && may_be_wanted {
            self.stir_for(layer, peer, &more);
        }
    }

    fn read_needs(
        &mut self,
        id: ReadId,
        layer: DiffId,
        chunks: Runs,
        class: Class,
        deadline: Instant,
        turn: &mut Turn<'_>,
    ) {
        if class == Class::Demand && self.reads.get(id).is_none() {
            self.read_ahead(layer, &chunks, turn);
        }
        self.read_as(id, layer, chunks, class, None, deadline, turn);
    }

    /// Begins a read, of this node or as an owner for others.
    #[expect(clippy::too_many_arguments, reason = "they are the parts of a read")]
    pub(super) fn read_as(
        &mut self,
        id: ReadId,
        layer: DiffId,
        chunks: Runs,
        class: Class,
        others: Option<ForOthers>,
        deadline: Instant,
        turn: &mut Turn<'_>,
    ) {
        if self.reads.get(id).is_some() {
            return;
        }
        let beyond = chunks.iter().next_back().map_or(0, |run| run.end);
        let record = self.layers.get(&layer).filter(|record| beyond <= record.geometry.chunk_count());
        let refusal = match record {
            None => Some(FailReason::Unknown),
            Some(record) if chunks.difference(&record.have).is_empty() => {
                Self::say_delivered(id, turn);
                return;
            }
            Some(_) if deadline <= turn.now => Some(FailReason::Deadline),
            Some(_) => self.make_room(class, turn),
        };
        if let Some(reason) = refusal {
            let cause = self.cause(layer, reason);
            self.say_failed(id, cause, turn);
            return;
        }
        let Some(record) = self.layers.get_mut(&layer) else { return };
        record.reads.insert(id, &chunks);
        let missing = chunks.difference(&record.have);
        let read = Read {
            layer,
            needs: chunks,
            missing: missing.clone(),
            class,
            acts_for: others.map(|others| others.duty),
            since: turn.now,
            deadline,
            place: 0,
            rest: None,
        };
        // What many wait for comes before what this node prefetches for itself; who comes back was told of others who have it.
        let first = others.is_some_and(|others| !others.again);
        self.reads.insert(id, read, first && class == Class::Prefetch);
        match class {
            Class::Demand => self.dirty = true,
            Class::Prefetch => self.stir_chunks(layer, &missing),
        }
    }

    /// Makes room for one more read: prefetch is shed first, the last one first.
    fn make_room(&mut self, class: Class, turn: &mut Turn<'_>) -> Option<FailReason> {
        let full = self.reads.len() >= self.limits.waiting_reads;
        match class {
            Class::Prefetch => (full || self.reads.prefetch_len() >= self.limits.waiting_prefetch_reads)
                .then_some(FailReason::Overload),
            Class::Demand if !full => None,
            Class::Demand => match self.reads.last_prefetch() {
                Some(last) => {
                    self.fail_read(last, FailReason::Overload, turn);
                    None
                }
                None => Some(FailReason::Overload),
            },
        }
    }

    fn read_ahead(&mut self, layer: DiffId, chunks: &Runs, turn: &mut Turn<'_>) {
        let Some(record) = self.layers.get_mut(&layer) else { return };
        let Some(run) = chunks.first().filter(|run| run.end <= record.geometry.chunk_count()) else { return };
        let next = record.readahead.read(&run, &record.geometry, &self.limits);
        turn.out.extend(next.mark.map(|(place, chunk)| Action::Watch { layer, place, chunk }));
        let ahead = Runs::one(next.chunks).difference(&record.have);
        let ahead = record.worth_guessing(ahead, chunks, self.now, &self.limits);
        if !ahead.is_empty() {
            record.ahead.insert_all(&ahead);
            record.ahead_rest = None;
            self.ahead_layers.insert(layer);
            self.dirty = true;
        }
    }

    /// Takes chunks that came off what reads wait for and asks were to bring.
    fn arrived(&mut self, layer: DiffId, chunks: &Runs, turn: &mut Turn<'_>) {
        let Some(record) = self.layers.get_mut(&layer) else { return };
        let chunks = chunks.within(0..record.geometry.chunk_count());
        record.redeem_promises(&chunks);
        record.ahead.remove_all(&chunks);
        if record.ahead.is_empty() {
            self.ahead_layers.remove(&layer);
        }
        for id in &record.asks {
            let Some(ask) = self.asks.get_mut(id) else { continue };
            ask.shadow.remove_all(&chunks);
            let brought = ask.chunks.intersection(&chunks);
            if !brought.is_empty() {
                if let (Source::Peer(_), Some(sign), true) = (ask.source, ask.first_sign, ask.is_waited_for()) {
                    self.peers.went_on(turn.now.since(ask.progress_at().max(sign)));
                }
                self.readings.note(ask);
                ask.was_pending = false;
                let bytes = brought.iter().map(|run| record.geometry.len_bytes(&run)).sum::<u64>();
                if let Source::Peer(peer) = ask.source {
                    self.peers.brought(peer, turn.now, bytes, &self.limits);
                }
                ask.brought_bytes += bytes;
                ask.chunks.remove_all(&brought);
                record.leased.remove_all(&brought);
                ask.last_brought = turn.now;
                ask.renew(turn.now);
            }
        }
        let mut complete = Vec::new();
        for id in record.reads.near(&chunks) {
            let Some(read) = self.reads.get_mut(id) else { continue };
            read.missing.remove_all(&chunks);
            if read.missing.is_empty() {
                complete.push(id);
            }
        }
        for id in complete {
            if let Some(read) = self.reads.remove(id) {
                record.reads.remove(id, &read.needs);
            }
            Self::say_delivered(id, turn);
        }
        self.end_quests(layer, &chunks);
        self.rule_on_held(layer, &chunks, turn);
    }

    fn evicted(&mut self, layer: DiffId, chunks: &Runs) {
        let Some(record) = self.layers.get_mut(&layer) else { return };
        let gone = record.have.intersection(chunks);
        record.have.remove_all(&gone);
        for id in record.reads.near(&gone) {
            let Some(read) = self.reads.get_mut(id) else { continue };
            let again = read.needs.intersection(&gone);
            if !again.is_empty() {
                read.missing.insert_all(&again);
                self.dirty = true;
                read.rest = None;
                record.look_again(&again);
            }
        }
    }
}
