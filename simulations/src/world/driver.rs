//! The driver of a node's policy: carries out what it asks for and tells it what comes, exactly as `snapshotter/fetch` does.
//!
//! | request | what is done |
//! |---|---|
//! | `AskPeer` | GET to the peer; chunks are checked and stored, each at once for demand, eight together for prefetch (`BATCH_CHUNKS`), then `Arrived` and `AskProgress`; LACKS, REFER, DELEGATE and PENDING are passed on; the ask ends when all is answered for, after `timeout` without a sign, with its connection, or after a minute |
//! | `AskOrigin` | one ranged read; each piece of the body is an `AskProgress`; a span that is whole is decoded, stored, and `Arrived` |
//! | `AskLocal` | a copy at the speed of the disk |
//! | `Cancel` | the task ends: the stream is reset, which the peer notices |
//! | `Rule` | goes to the answer that waits for it (`serve`) |
//! | `Deliver`, `Fail` | the reader goes on (`starts`) |
//! | `FindHolders` | eight that the DHT names or are connected are asked what they have, then `HoldersFound` |
//! | `FindSpans` | answered from the shape |
//! | `Watch` | a mark; the read that reaches it is a `ReadHit` |
//! | `Ban` | what comes from the peer ends, and nothing is asked of it |
//! | `Suspect` | the members hear it, and believe it when it is so |
//! | `Arm` | `TimerFired` at that time by the node's clock |
//!
//! No `if` here is about policy.

use hermes_image::runs::Runs;
use hermes_policy::class::{Class, ErrorClass};
use hermes_policy::event::{Action, AskId, Event, Outcome, PeerNo, Source, Want};
use hermes_policy::time::{Instant, nanos};

use super::wire::Word;
use super::{Batch, From, Happening, World};
use crate::node::{OpenAsk, Target};
use crate::queue::{MILLISECOND, Nanos, SECOND};
use crate::sabotage::Sabotage;

/// Chunks of a peer that are stored and reported together (`snapshotter/fetch/asks.rs`).
const BATCH_CHUNKS: u64 = 8;
/// Longest time of one ask to a peer (`PEER_ASK_MAX` there).
const PEER_ASK_MAX: Nanos = 60 * SECOND;
/// Marks a unit with a wrong chunk. Chunk numbers are below 2^24.
pub(super) const WRONG: u32 = 1 << 31;
/// A timer counts as forgotten this long after its time.
pub(crate) const TIMER_SLACK: Nanos = 50 * MILLISECOND;

impl World {
    pub(super) fn carry_out(&mut self, no: u32, action: Action) {
        match action {
            Action::AskLocal { ask, layer, chunks, class } => {
                self.ask_local(no, ask, self.number(&layer), chunks, class)
            }
            Action::AskPeer { ask, peer, layer, chunks, class, want, extent, timeout, .. } => {
                let word = Word::Get { ask, layer: self.number(&layer), class, want, extent, chunks };
                self.ask_peer(no, peer, word, nanos(timeout));
            }
            Action::Rule { claim, ruling } => self.ruled(no, claim, ruling),
            Action::Suspect { peer } => self.suspected(no, peer.0),
            Action::AskOrigin { ask, layer, spans, class, reason, timeout, .. } => {
                let (now, number) = (self.queue.now(), self.number(&layer));
                self.registry.ledger.begins(now, (no, ask), (number, spans.clone()), (class, reason));
                self.ask_registry(no, ask, number, spans, class, nanos(timeout));
            }
            Action::Cancel { ask } => self.cancelled(no, ask),
            Action::Deliver { read } => self.delivered(no, read),
            Action::Fail { read, cause } => self.read_failed(no, read, &cause),
            Action::FindHolders { layer } => {
                let life = self.nodes[no as usize].life;
                let lookup = self.scenario.cluster.lookup.0;
                self.queue.after(lookup, Happening::Found { node: no, life, layer: self.number(&layer) });
            }
            // All nodes of this world have the seek tables; so the policy never asks, and would be told at once.
            Action::FindSpans { .. } => {}
            Action::Watch { layer, place, chunk } => {
                let layer = usize::from(self.number(&layer));
                self.nodes[no as usize].layers[layer].marks.insert(place, chunk);
            }
            Action::Ban { peer, until } => {
                let until = self.nodes[no as usize].world_time(until);
                self.ban(no, peer.0, until);
            }
            Action::Arm { at } => self.arm(no, at),
        }
    }

    fn number(&self, layer: &hermes_image::ids::DiffId) -> u16 {
        self.layer_numbers.get(layer).copied().unwrap_or_default()
    }

    fn arm(&mut self, no: u32, at: Instant) {
        let node = &mut self.nodes[no as usize];
        node.armed = Some(at);
        if self.sabotage == Some(Sabotage::DroppedTimer) && at.0.is_multiple_of(4) {
            return;
        }
        node.timer = Some(at);
        let (life, when) = (node.life, node.world_time(at));
        self.queue.at(when, Happening::Timer { node: no, life });
    }

    /// A timer has come; only the last one that was asked for counts.
    pub(super) fn timer(&mut self, no: u32) {
        let now = self.queue.now();
        let node = &mut self.nodes[no as usize];
        if node.timer.is_some_and(|at| at <= node.clock(now)) {
            node.timer = None;
            self.tell(no, Event::TimerFired);
        }
    }

    pub(super) fn begin_ask(&mut self, no: u32, ask: AskId, open: OpenAsk) {
        self.look_for_silence_at(no, open.due());
        self.nodes[no as usize].asks.insert(ask, open);
    }

    fn ask_peer(&mut self, no: u32, peer: PeerNo, word: Word, timeout: Nanos) {
        let Word::Get { ask, layer, class, ref chunks, .. } = word else { return };
        let open = OpenAsk {
            target: Target::Peer(peer.0),
            layer,
            class,
            left: chunks.clone(),
            lacking: Runs::new(),
            batch: Runs::new(),
            sign: self.queue.now(),
            timeout,
            until: self.queue.now() + PEER_ASK_MAX,
            bytes: 0,
            spans: 0..0,
            flow: None,
        };
        self.begin_ask(no, ask, open);
        self.say(no, peer.0, word);
    }

    fn ask_local(&mut self, no: u32, ask: AskId, layer: u16, chunks: Runs, class: Class) {
        let open = OpenAsk {
            target: Target::Local,
            layer,
            class,
            left: Runs::new(),
            lacking: Runs::new(),
            batch: Runs::new(),
            sign: self.queue.now(),
            timeout: PEER_ASK_MAX,
            until: Nanos::MAX,
            bytes: 0,
            spans: 0..0,
            flow: None,
        };
        self.begin_ask(no, ask, open);
        let bytes = self.len_bytes(layer, &chunks);
        self.store(no, Batch { ask, layer, chunks, from: From::Local, ends: Some(Outcome::Done { bytes }) }, 0);
    }

    pub(crate) fn len_bytes(&self, layer: u16, chunks: &Runs) -> u64 {
        let geometry = &self.shape.layers[usize::from(layer)].geometry;
        chunks.iter().map(|run| geometry.len_bytes(&run)).sum()
    }

    /// A chunk of a peer has come over the wire. It is checked before anything else becomes of it.
    pub(super) fn chunk_came(&mut self, no: u32, ask: AskId, tag: u32) {
        let now = self.queue.now();
        let node = &mut self.nodes[no as usize];
        let Some(open) = node.asks.get_mut(&ask) else { return };
        open.sign = now;
        let chunk = tag & !WRONG;
        if tag & WRONG != 0 {
            if let Target::Peer(peer) = open.target {
                *node.counts.wrong.entry(peer).or_default() += 1;
            }
            if self.sabotage != Some(Sabotage::SkippedCheck) {
                let outcome = Outcome::Failed { class: ErrorClass::PeerFault, retry_after: None };
                return self.ask_ends(no, ask, outcome);
            }
            self.checkers.stored_wrong(no, open.layer, chunk);
        }
        open.batch.insert(chunk..chunk + 1);
        open.left.remove(chunk..chunk + 1);
        let is_last = open.left.is_empty();
        let ends = is_last.then(|| match open.lacking.is_empty() {
            true => Outcome::Done { bytes: 0 },
            false => Outcome::Lacks { chunks: open.lacking.clone() },
        });
        if is_last || open.class == Class::Demand || open.batch.chunk_count() >= BATCH_CHUNKS {
            self.flush(no, ask, ends);
        }
    }

    /// Stores what came from a peer so far; `ends` when it was the last.
    pub(super) fn flush(&mut self, no: u32, ask: AskId, ends: Option<Outcome>) {
        let Some(open) = self.nodes[no as usize].asks.get_mut(&ask) else { return };
        let chunks = std::mem::take(&mut open.batch);
        if chunks.is_empty() && ends.is_none() {
            return;
        }
        let layer = open.layer;
        self.store(no, Batch { ask, layer, chunks, from: From::Peer, ends }, 0);
    }

    /// Writes chunks, which takes its time on the disk, after `wait`.
    pub(super) fn store(&mut self, no: u32, batch: Batch, wait: Nanos) {
        let takes = self.scenario.cluster.disk.time(self.len_bytes(batch.layer, &batch.chunks));
        let now = self.queue.now();
        let node = &mut self.nodes[no as usize];
        let slow = self.membership.slow.get(&no).copied().unwrap_or(1);
        node.disk_free = node.disk_free.max(now + wait) + takes * u64::from(slow);
        let (life, at) = (node.life, node.disk_free);
        self.queue.at(at, Happening::Stored { node: no, life, batch: Box::new(batch) });
    }

    pub(super) fn stored(&mut self, no: u32, batch: Batch) {
        let Batch { ask, layer, chunks, from, ends } = batch;
        let node = &self.nodes[no as usize];
        let under_way = node.asks.contains_key(&ask);
        // A task that was cancelled stores nothing more, but for what the disk already has; decoding goes on to its end.
        if !under_way && from != From::Registry {
            return;
        }
        if !chunks.is_empty() {
            let again = chunks.intersection(&node.layers[usize::from(layer)].have);
            let (bytes, again) = (self.len_bytes(layer, &chunks), self.len_bytes(layer, &again));
            let node = &mut self.nodes[no as usize];
            node.counts.again += again;
            match from {
                From::Registry => node.counts.from_registry += bytes,
                From::Peer => node.counts.from_peers += bytes,
                From::Local => node.counts.from_local += bytes,
            }
            node.layers[usize::from(layer)].have.insert_all(&chunks);
            if let Some(open) = node.asks.get_mut(&ask) {
                open.bytes += bytes;
            }
            let diff_id = self.shape.layers[usize::from(layer)].diff_id;
            self.tell(no, Event::Arrived { layer: diff_id, chunks: chunks.clone() });
            self.grown(no, layer, &chunks);
            if under_way && from == From::Peer {
                self.tell(no, Event::AskProgress { ask });
            }
        }
        if let Some(outcome) = ends {
            let bytes = self.nodes[no as usize].asks.get(&ask).map_or(0, |open| open.bytes);
            let outcome = if let Outcome::Done { .. } = outcome { Outcome::Done { bytes } } else { outcome };
            self.ask_ends(no, ask, outcome);
        }
    }

    /// Chunks of an ask to a peer were answered in another way than by data.
    pub(super) fn settled(&mut self, no: u32, ask: AskId, chunks: &Runs, lacking: bool) {
        let Some(open) = self.nodes[no as usize].asks.get_mut(&ask) else { return };
        open.left.remove_all(chunks);
        if lacking {
            open.lacking.insert_all(chunks);
        }
        if open.left.is_empty() {
            let ends = match open.lacking.is_empty() {
                true => Outcome::Done { bytes: 0 },
                false => Outcome::Lacks { chunks: open.lacking.clone() },
            };
            let layer = open.layer;
            self.store(no, Batch { ask, layer, chunks: Runs::new(), from: From::Peer, ends: Some(ends) }, 0);
        }
    }

    /// Plans to look for asks that are silent, unless that is planned for no later time. One plan for a node, not for each ask: a
    /// start makes thousands of asks, and plans are never taken back.
    fn look_for_silence_at(&mut self, no: u32, at: Nanos) {
        let node = &mut self.nodes[no as usize];
        if node.silence_at.is_none_or(|planned| at < planned) {
            node.silence_at = Some(at);
            let life = node.life;
            self.queue.at(at, Happening::Silent { node: no, life });
        }
    }

    /// Ends the asks that have been without a sign of life for too long.
    pub(super) fn end_silent(&mut self, no: u32) {
        let now = self.queue.now();
        let node = &mut self.nodes[no as usize];
        if node.silence_at.is_none_or(|planned| planned > now) {
            return;
        }
        node.silence_at = None;
        let silent: Vec<AskId> = node.asks.iter().filter(|(_, open)| open.due() <= now).map(|(ask, _)| *ask).collect();
        for ask in silent {
            self.ask_ends(no, ask, Outcome::Failed { class: ErrorClass::Transient, retry_after: None });
        }
        if let Some(at) = self.nodes[no as usize].asks.values().map(OpenAsk::due).min() {
            self.look_for_silence_at(no, at);
        }
    }

    /// An ask is over, and the policy hears of it, once.
    pub(super) fn ask_ends(&mut self, no: u32, ask: AskId, outcome: Outcome) {
        let Some(open) = self.nodes[no as usize].asks.remove(&ask) else { return };
        self.registry.ledger.ends(self.queue.now(), no, ask, Some(&outcome));
        self.stop(no, ask, &open);
        if self.sabotage == Some(Sabotage::LostLeader)
            && matches!(outcome, Outcome::Failed { .. } | Outcome::Busy { .. })
        {
            return;
        }
        self.tell(no, Event::AskEnded { ask, outcome });
    }

    fn cancelled(&mut self, no: u32, ask: AskId) {
        if let Some(open) = self.nodes[no as usize].asks.remove(&ask) {
            self.registry.ledger.ends(self.queue.now(), no, ask, None);
            self.stop(no, ask, &open);
        }
    }

    /// Stops the work on an ask at both ends.
    fn stop(&mut self, no: u32, ask: AskId, open: &OpenAsk) {
        if let Some(flow) = open.flow {
            self.net.close(flow);
        }
        if let Target::Peer(peer) = open.target
            && !(open.left.is_empty())
            && self.nodes[no as usize].connected.contains(&peer)
        {
            self.say(no, peer, Word::Withdraw { ask });
        }
    }

    /// The policy's counts of asks are those of the driver.
    pub(crate) fn asks_by_source(node: &crate::node::Node) -> [usize; 3] {
        let count = |wanted: fn(&Target) -> bool| node.asks.values().filter(|ask| wanted(&ask.target)).count();
        [
            count(|target| *target == Target::Local),
            count(|target| matches!(target, Target::Peer(_))),
            count(|target| *target == Target::Registry),
        ]
    }

    /// What the failure of a read says, for people.
    pub(super) fn describe(cause: &hermes_policy::event::FailCause) -> String {
        let tried = cause.tried.iter().map(|(source, class)| match source {
            Source::Local => format!("local: {class}"),
            Source::Peer(peer) => format!("node {}: {class}", peer.0),
            Source::Origin => format!("registry: {class}"),
        });
        let tried: Vec<String> = tried.collect();
        format!(
            "{} (registry {:?}, {} holders; {})",
            cause.reason.kind(),
            cause.origin,
            cause.holders,
            tried.join(", ")
        )
    }

    /// Whether the peer is to act as an owner.
    pub(super) fn means_owner(want: Want) -> bool {
        matches!(want, Want::Owner { .. })
    }
}
