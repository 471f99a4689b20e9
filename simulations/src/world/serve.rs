//! Answers other nodes, as `p2p/exchange/{answering,server,limits}.rs` do.
//!
//! Asked for what is here, a node sends what it has under a transfer's place and lays a claim for the rest; asked as an owner
//! it lays a claim for all. Rulings give chunks (sent as soon as they are here and a place is free) or answer for them. While
//! a claim waits, PENDING is said at once and every 100 ms. A place is held until all that was found is on the wire.

use hermes_image::runs::Runs;
use hermes_policy::class::Class;
use hermes_policy::event::{AskId, ClaimId, Event, PeerNo, Ruling, Want};
use hermes_policy::time::nanos;

use super::driver::WRONG;
use super::wire::Word;
use super::{Happening, World};
use crate::net::{FlowNo, Purpose};
use crate::node::Answer;
use crate::queue::{MILLISECOND, Nanos, SECOND};
use crate::strategy::Strategy;

// The limits of `UploadLimits::default()` in `p2p/config.rs`; a test of `hermes simulate` compares them.

/// Transfers at once.
pub const TRANSFERS_MAX: u32 = 64;
/// Of these, for prefetch.
pub const PREFETCH_TRANSFERS_MAX: u32 = 48;
/// Transfers to one peer at once.
pub const TRANSFERS_PER_PEER_MAX: u32 = 8;
/// Claims that wait for chunks to come.
pub const CLAIMS_MAX: u32 = 1024;
/// Of these, of one peer.
pub const CLAIMS_PER_PEER_MAX: u32 = 64;
/// Streams on which a node tells what it gets.
pub const WATCHERS_MAX: usize = 128;

const CLAIM_TIMEOUT: Nanos = 30 * SECOND;
/// What BUSY says (`p2p/exchange/limits.rs`).
const RETRY_DEMAND: Nanos = 20 * MILLISECOND;
const RETRY_PREFETCH: Nanos = 250 * MILLISECOND;
const PENDING_EVERY: Nanos = 100 * MILLISECOND;
/// News are told at most this often (`NEWS_EVERY` in `p2p/exchange/server.rs`).
const NEWS_EVERY: Nanos = 50 * MILLISECOND;

type Asked = (u16, Class, Want, std::ops::Range<u32>, Runs);

impl World {
    /// A GET arrives.
    pub(super) fn asked(&mut self, no: u32, from: u32, ask: AskId, (layer, class, want, extent, chunks): Asked) {
        let now = self.queue.now();
        let answer = Answer {
            layer,
            class,
            want,
            extent,
            asked: chunks.clone(),
            open: chunks.clone(),
            given: Runs::new(),
            flow: None,
            slot: false,
            looks: false,
            claim: None,
            until: now + CLAIM_TIMEOUT,
            registry_rests_until: 0,
        };
        if Self::means_owner(want) {
            self.nodes[no as usize].answers.insert((from, ask), answer);
            if !self.claim(no, from, ask, chunks) {
                self.nodes[no as usize].answers.remove(&(from, ask));
                self.say(no, from, Word::Busy { ask, retry_after: RETRY_PREFETCH });
            }
            return;
        }
        if !self.take_slot(no, from, class) {
            let retry_after = if class == Class::Demand { RETRY_DEMAND } else { RETRY_PREFETCH };
            return self.say(no, from, Word::Busy { ask, retry_after });
        }
        let have = &self.nodes[no as usize].layers[usize::from(layer)].have;
        let missing = chunks.difference(have);
        self.nodes[no as usize].answers.insert((from, ask), Answer { given: chunks, slot: true, ..answer });
        self.send_what_is_here(no, from, ask);
        if missing.is_empty() {
            return;
        }
        if let Some(answer) = self.nodes[no as usize].answers.get_mut(&(from, ask)) {
            answer.given.remove_all(&missing);
        }
        if !self.claim(no, from, ask, missing.clone()) {
            self.lack(no, from, ask, &missing);
            self.end_when_answered(no, from, ask);
        }
    }

    /// Takes a place among the transfers, if there is one.
    fn take_slot(&mut self, no: u32, from: u32, class: Class) -> bool {
        let gate = &mut self.nodes[no as usize].gate;
        let mine = gate.of_peer.get(&from).map_or(0, |used| used.0);
        let full = gate.demand + gate.prefetch >= TRANSFERS_MAX
            || class == Class::Prefetch && gate.prefetch >= PREFETCH_TRANSFERS_MAX;
        if full || mine >= TRANSFERS_PER_PEER_MAX {
            return false;
        }
        gate.of_peer.entry(from).or_default().0 += 1;
        match class {
            Class::Demand => gate.demand += 1,
            Class::Prefetch => gate.prefetch += 1,
        }
        true
    }

    fn give_slot_back(&mut self, no: u32, from: u32, class: Class) {
        let gate = &mut self.nodes[no as usize].gate;
        match class {
            Class::Demand => gate.demand -= 1,
            Class::Prefetch => gate.prefetch -= 1,
        }
        if let Some(used) = gate.of_peer.get_mut(&from) {
            used.0 -= 1;
            if *used == (0, 0) {
                gate.of_peer.remove(&from);
            }
        }
        // Those that wait look again, in order; the ones that still find no place stay.
        for _ in 0..gate.waiting.len() {
            let Some((from, ask)) = self.nodes[no as usize].gate.waiting.pop_front() else { return };
            self.try_to_send(no, from, ask);
        }
    }

    /// Lays a claim; false when there are too many.
    fn claim(&mut self, no: u32, from: u32, ask: AskId, chunks: Runs) -> bool {
        let node = &mut self.nodes[no as usize];
        let mine = node.gate.of_peer.get(&from).map_or(0, |used| used.1);
        if node.gate.claims >= CLAIMS_MAX || mine >= CLAIMS_PER_PEER_MAX {
            return false;
        }
        let Some(answer) = node.answers.get_mut(&(from, ask)) else { return true };
        let claim = ClaimId(node.next_claim);
        answer.claim = Some(claim);
        node.next_claim += 1;
        node.gate.claims += 1;
        node.gate.of_peer.entry(from).or_default().1 += 1;
        node.claims.insert(claim, (from, ask));
        let (class, want, extent, life) = (answer.class, answer.want, answer.extent.clone(), node.life);
        let layer = self.shape.layers[usize::from(answer.layer)].diff_id;
        self.tell(no, Event::Claimed { claim, peer: PeerNo(from), layer, chunks, extent, class, want });
        if self.nodes[no as usize].answers.contains_key(&(from, ask)) {
            self.queue.after(0, Happening::Waits { node: no, life, from, ask });
        }
        true
    }

    /// Policy has ruled on a claim.
    pub(super) fn ruled(&mut self, no: u32, claim: ClaimId, ruling: Ruling) {
        let now = self.queue.now();
        let Some((from, ask)) = self.nodes[no as usize].claims.get(&claim).copied() else { return };
        let Some(answer) = self.nodes[no as usize].answers.get_mut(&(from, ask)) else { return };
        match ruling {
            Ruling::Give(chunks) => {
                answer.given.insert_all(&chunks.intersection(&answer.open));
                answer.looks = true;
                self.try_to_send(no, from, ask);
            }
            Ruling::Lacks(chunks) => {
                let chunks = chunks.intersection(&answer.open);
                self.lack(no, from, ask, &chunks);
            }
            Ruling::Refer { chunks, peers } => {
                let chunks = chunks.intersection(&answer.open);
                let peers: Vec<u32> = peers.into_iter().map(|peer| peer.0).filter(|peer| *peer != from).collect();
                if peers.is_empty() {
                    self.lack(no, from, ask, &chunks);
                } else if !chunks.is_empty() {
                    self.answered(no, from, ask, &chunks);
                    self.say(no, from, Word::Refer { ask, chunks, peers });
                }
            }
            Ruling::Delegate(chunks) => {
                let mine = chunks.intersection(&answer.open);
                let mut all = chunks.within(answer.extent.clone()).difference(&answer.asked);
                all.insert_all(&mine);
                if !mine.is_empty() {
                    self.answered(no, from, ask, &mine);
                    self.say(no, from, Word::Delegate { ask, chunks: all });
                }
            }
            Ruling::RegistryRests(wait) => answer.registry_rests_until = now + nanos(wait),
            Ruling::NotMine { epoch } => {
                self.say(no, from, Word::NotMine { ask, epoch });
                return self.end_answer(no, from, ask);
            }
        }
        self.end_when_answered(no, from, ask);
    }

    fn lack(&mut self, no: u32, from: u32, ask: AskId, chunks: &Runs) {
        if !chunks.is_empty() {
            self.answered(no, from, ask, chunks);
            self.say(no, from, Word::Lacks { ask, chunks: chunks.clone() });
        }
    }

    fn answered(&mut self, no: u32, from: u32, ask: AskId, chunks: &Runs) {
        if let Some(answer) = self.nodes[no as usize].answers.get_mut(&(from, ask)) {
            answer.open.remove_all(chunks);
            answer.given.remove_all(chunks);
        }
    }

    /// A layer has grown: what was given may be here.
    pub(super) fn grown(&mut self, no: u32, layer: u16, chunks: &Runs) {
        let node = &mut self.nodes[no as usize];
        let mut waiting = Vec::new();
        for (key, answer) in &mut node.answers {
            if answer.layer == layer && answer.given.first_common(chunks).is_some() {
                answer.looks = true;
                waiting.push(*key);
            }
        }
        for (from, ask) in waiting {
            self.try_to_send(no, from, ask);
        }
        let here = &mut self.nodes[no as usize].layers[usize::from(layer)];
        if !here.watchers.is_empty() && !here.news_planned {
            here.news_planned = true;
            let life = self.nodes[no as usize].life;
            self.queue.after(NEWS_EVERY, Happening::News { node: no, life, layer });
        }
    }

    /// Sends what was given and is here, when there is a place.
    fn try_to_send(&mut self, no: u32, from: u32, ask: AskId) {
        let node = &self.nodes[no as usize];
        let Some(answer) = node.answers.get(&(from, ask)).filter(|answer| answer.looks) else { return };
        let have = &node.layers[usize::from(answer.layer)].have;
        if !answer.given.iter().any(|run| have.intersects(&run)) {
            return;
        }
        let class = answer.class;
        if answer.slot || self.take_slot(no, from, class) {
            if let Some(answer) = self.nodes[no as usize].answers.get_mut(&(from, ask)) {
                answer.slot = true;
            }
            self.send_what_is_here(no, from, ask);
        } else if !self.nodes[no as usize].gate.waiting.contains(&(from, ask)) {
            self.nodes[no as usize].gate.waiting.push_back((from, ask));
        }
    }

    fn send_what_is_here(&mut self, no: u32, from: u32, ask: AskId) {
        let now = self.queue.now();
        let (path, hops) = self.path(no, from);
        let latency = self.latency(no, from);
        let wire = self.scenario.cluster.peer_wire;
        let to_life = self.nodes[from as usize].life;
        let node = &mut self.nodes[no as usize];
        let Some(answer) = node.answers.get_mut(&(from, ask)) else { return };
        answer.looks = false;
        let here = answer.given.intersection(&node.layers[usize::from(answer.layer)].have);
        answer.open.remove_all(&here);
        answer.given.remove_all(&here);
        if here.is_empty() {
            let class = answer.class;
            answer.slot = false;
            return self.give_slot_back(no, from, class);
        }
        let urgent = answer.class == Class::Demand;
        let net = &mut self.net;
        let purpose = Purpose { from: Some(no), to: from, to_life, ask: ask.0 };
        let flow = *answer.flow.get_or_insert_with(|| net.open(&path[..hops], urgent, purpose));
        let geometry = &self.shape.layers[usize::from(answer.layer)].geometry;
        let mark = if node.corrupt { WRONG } else { 0 };
        let mut idle = false;
        for chunk in here.chunks() {
            let len = wire.of(geometry.len_bytes(&(chunk..chunk + 1))).max(1);
            idle |= self.net.push(flow, u32::try_from(len).unwrap_or(u32::MAX), chunk | mark, now);
        }
        if idle {
            self.queue.after(latency, Happening::Go { flow, ask: ask.0 });
        }
    }

    /// A link has sent a unit: the sender may be done with a flow, the receiver has a piece.
    pub(super) fn link_sent(&mut self, link: crate::net::LinkNo) {
        let sent = self.net.sent_one(link, self.queue.now());
        if let Some((flow, tag, len)) = sent.arrived {
            let purpose = self.net.purpose(flow);
            if !self.strategy().is_policy() {
                self.unit_arrived(purpose, tag != 0, len);
            } else if let Some(from) = purpose.from {
                if self.reaches(from, purpose.to) {
                    self.came(Happening::Chunk {
                        node: purpose.to,
                        life: purpose.to_life,
                        ask: AskId(purpose.ask),
                        tag,
                    });
                }
            } else {
                let Purpose { to, to_life, ask, .. } = purpose;
                self.came(Happening::Piece { node: to, life: to_life, ask: AskId(ask), span: tag, len_bytes: len });
            }
        }
        if let Some(flow) = sent.drained
            && self.strategy().is_policy()
        {
            self.drained(flow);
        }
    }

    /// Something has come out of the network for a node, which may be dead, or sleep.
    fn came(&mut self, what: Happening) {
        match self.admitted(what) {
            Some(Happening::Chunk { node, ask, tag, .. }) => self.chunk_came(node, ask, tag),
            Some(Happening::Piece { node, ask, span, len_bytes, .. }) => self.piece_came(node, ask, span, len_bytes),
            _ => {}
        }
    }

    /// All that an answer found is on the wire.
    fn drained(&mut self, flow: FlowNo) {
        let Purpose { from: Some(no), to, ask, .. } = self.net.purpose(flow) else { return };
        let key = (to, AskId(ask));
        let Some(answer) = self.nodes[no as usize].answers.get_mut(&key) else { return };
        if answer.flow == Some(flow) && std::mem::take(&mut answer.slot) {
            let class = answer.class;
            self.give_slot_back(no, to, class);
        }
        // A chunk may have come meanwhile.
        self.try_to_send(no, to, key.1);
        self.end_when_answered(no, to, key.1);
    }

    /// PENDING every 100 ms; what was not answered for when the claim ends is lacking.
    pub(super) fn still_waits(&mut self, no: u32, from: u32, ask: AskId) {
        let now = self.queue.now();
        let life = self.nodes[no as usize].life;
        let Some(answer) = self.nodes[no as usize].answers.get(&(from, ask)) else { return };
        if now >= answer.until {
            let open = answer.open.clone();
            self.lack(no, from, ask, &open);
            return self.end_when_answered(no, from, ask);
        }
        if answer.open.is_empty() {
            return;
        }
        if !answer.slot {
            let registry_rests = answer.registry_rests_until.saturating_sub(now);
            self.say(no, from, Word::Pending { ask, registry_rests });
        }
        self.queue.after(PENDING_EVERY, Happening::Waits { node: no, life, from, ask });
    }

    /// An answer ends when all is answered for and on the wire. The flow goes on until its last unit has arrived.
    fn end_when_answered(&mut self, no: u32, from: u32, ask: AskId) {
        let Some(answer) = self.nodes[no as usize].answers.get(&(from, ask)) else { return };
        if answer.open.is_empty() && !answer.slot {
            self.forget_answer(no, from, ask);
        }
    }

    /// The asker has gone, or was told that this is not the place.
    pub(super) fn end_answer(&mut self, no: u32, from: u32, ask: AskId) {
        if let Some(flow) = self.forget_answer(no, from, ask)
            && self.net.is_open(flow)
        {
            self.net.close(flow);
        }
    }

    fn forget_answer(&mut self, no: u32, from: u32, ask: AskId) -> Option<FlowNo> {
        let node = &mut self.nodes[no as usize];
        let answer = node.answers.remove(&(from, ask))?;
        node.gate.waiting.retain(|key| *key != (from, ask));
        if let Some(claim) = answer.claim {
            node.claims.remove(&claim);
            node.gate.claims -= 1;
            if let Some(used) = node.gate.of_peer.get_mut(&from) {
                used.1 -= 1;
                if *used == (0, 0) {
                    node.gate.of_peer.remove(&from);
                }
            }
            self.queue.after(0, Happening::ClaimGone { node: no, life: self.nodes[no as usize].life, claim });
        }
        if answer.slot {
            self.give_slot_back(no, from, answer.class);
        }
        if let Some(flow) = answer.flow {
            self.net.close_when_empty(flow);
        }
        answer.flow
    }

    /// What others are told that is here. Without relaying, that is nothing before the node's own start is over.
    fn shown(&self, no: u32, layer: u16) -> Runs {
        let node = &self.nodes[no as usize];
        let starts = node.start.as_ref().is_some_and(|start| start.ready.is_none());
        match self.strategy() {
            Strategy::HermesNoRelay if starts => Runs::new(),
            _ => node.layers[usize::from(layer)].have.clone(),
        }
    }

    /// A start is over: what was not told before is told now.
    pub(super) fn tell_all(&mut self, no: u32) {
        if self.strategy() != Strategy::HermesNoRelay {
            return;
        }
        for layer in 0..self.shape.layers.len() as u16 {
            let node = &mut self.nodes[no as usize];
            let (life, here) = (node.life, &mut node.layers[usize::from(layer)]);
            if !here.watchers.is_empty() && !here.news_planned {
                here.news_planned = true;
                self.queue.after(NEWS_EVERY, Happening::News { node: no, life, layer });
            }
        }
    }

    /// Another node asks what is here.
    pub(super) fn say_have(&mut self, no: u32, from: u32, layer: u16) {
        let chunks = self.shown(no, layer);
        self.say(no, from, Word::HaveMap { layer, chunks });
    }

    /// Another node wants to be told what is here and what comes; only of a layer that is known here.
    pub(super) fn watched(&mut self, no: u32, from: u32, layer: u16) {
        let watching: usize = self.nodes[no as usize].layers.iter().map(|layer| layer.watchers.len()).sum();
        let chunks = self.shown(no, layer);
        let here = &mut self.nodes[no as usize].layers[usize::from(layer)];
        if !here.open || watching >= WATCHERS_MAX {
            return;
        }
        here.watchers.insert(from);
        here.told.insert_all(&chunks);
        self.say(no, from, Word::More { layer, chunks });
    }

    /// Tells watchers what came since the last time.
    pub(super) fn news(&mut self, no: u32, layer: u16) {
        let shown = self.shown(no, layer);
        let here = &mut self.nodes[no as usize].layers[usize::from(layer)];
        here.news_planned = false;
        let chunks = shown.difference(&here.told);
        if chunks.is_empty() {
            return;
        }
        here.told.insert_all(&chunks);
        let watchers: Vec<u32> = here.watchers.iter().copied().collect();
        for watcher in watchers {
            if self.nodes[no as usize].connected.contains(&watcher) {
                self.say(no, watcher, Word::More { layer, chunks: chunks.clone() });
            }
        }
    }
}
