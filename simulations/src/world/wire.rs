//! Connections and words between nodes.
//!
//! The first word to a node that there is no connection with makes one, which takes [`DIAL_TRIPS`] ways; one that cannot be
//! reached is known as such after the dial's time. Words take one way of latency and no bandwidth: they are some tens of
//! bytes, chunks travel in flows. TCP loses nothing, so a word is lost only with its connection, its node, or beyond a
//! partition, where nobody is told.

use hermes_image::runs::Runs;
use hermes_policy::class::{Class, ErrorClass};
use hermes_policy::event::{AskId, Event, Outcome, PeerNo, Want};

use super::{Happening, World};
use crate::net::{HOPS_MAX, LinkNo};
use crate::node::Target;
use crate::queue::{MILLISECOND, Nanos};
use crate::sabotage::Sabotage;

/// Ways of latency until a connection stands: TCP, Noise XX and yamux, three round trips.
const DIAL_TRIPS: Nanos = 6;
/// How long a dial that an ask waits for may take (`dial_timeout` in `p2p/config.rs`).
const DIAL_TIMEOUT: Nanos = 250 * MILLISECOND;

/// A word between two lives of nodes.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) from: u32,
    pub(crate) from_life: u32,
    pub(crate) to: u32,
    pub(crate) to_life: u32,
    pub(crate) word: Word,
}

/// What nodes say to each other (docs/protocol.md).
#[derive(Debug)]
pub(crate) enum Word {
    Get { ask: AskId, layer: u16, class: Class, want: Want, extent: std::ops::Range<u32>, chunks: Runs },
    Withdraw { ask: AskId },
    Lacks { ask: AskId, chunks: Runs },
    Refer { ask: AskId, chunks: Runs, peers: Vec<u32> },
    Delegate { ask: AskId, chunks: Runs },
    Pending { ask: AskId, registry_rests: Nanos },
    NotMine { ask: AskId, epoch: u64 },
    Busy { ask: AskId, retry_after: Nanos },
    Have { layer: u16 },
    HaveMap { layer: u16, chunks: Runs },
    Watch { layer: u16 },
    More { layer: u16, chunks: Runs },
}

impl World {
    /// One way between two nodes.
    pub(super) fn latency(&self, from: u32, to: u32) -> Nanos {
        let cluster = &self.scenario.cluster;
        let same = self.nodes[from as usize].zone == self.nodes[to as usize].zone;
        if same { cluster.latency.0 } else { cluster.zone_latency.0 }
    }

    /// The links from one node to another.
    pub(super) fn path(&self, from: u32, to: u32) -> ([LinkNo; HOPS_MAX], usize) {
        let (from, to) = (&self.nodes[from as usize], &self.nodes[to as usize]);
        if from.zone == to.zone {
            return ([from.uplink, to.downlink, LinkNo(0), LinkNo(0)], 2);
        }
        let (out, into) =
            (self.membership.zone_links[from.zone as usize].0, self.membership.zone_links[to.zone as usize].1);
        ([from.uplink, out, into, to.downlink], 4)
    }

    /// Whether something that `from` sends reaches `to`.
    pub(super) fn reaches(&self, from: u32, to: u32) -> bool {
        let cut = self.parts.values().any(|(part, one_way)| {
            let (from, to) = (part.contains(&from), part.contains(&to));
            if *one_way { from && !to } else { from != to }
        });
        self.nodes[from as usize].up && self.nodes[to as usize].up && !cut
    }

    /// Says something to a node, over a connection that is made for it if there is none.
    pub(super) fn say(&mut self, from: u32, to: u32, word: Word) {
        let now = self.queue.now();
        let latency = self.latency(from, to);
        let node = &self.nodes[from as usize];
        let stands = match node.connected.contains(&to) {
            true => now,
            false => match node.dialing.get(&to) {
                Some(at) => *at,
                None => {
                    let both = self.reaches(from, to) && self.reaches(to, from);
                    if !both || self.shuns(from, to) {
                        let Word::Get { ask, .. } = word else { return };
                        return self.unreachable(from, ask);
                    }
                    self.dial(from, to)
                }
            },
        };
        let (from_life, to_life) = (self.nodes[from as usize].life, self.nodes[to as usize].life);
        let letter = Letter { from, from_life, to, to_life, word };
        self.queue.at(stands + latency, Happening::Letter(Box::new(letter)));
    }

    /// Whether a node has banned a peer and heeds it: then it asks it nothing and believes nothing that it says, and answers what
    /// it asks.
    pub(super) fn shuns(&self, no: u32, peer: u32) -> bool {
        self.sabotage != Some(Sabotage::IgnoredBan) && self.has_banned(no, peer)
    }

    fn has_banned(&self, no: u32, peer: u32) -> bool {
        self.nodes[no as usize].banned.get(&peer).is_some_and(|until| *until > self.queue.now())
    }

    /// Begins to make a connection. Gives the time at which it stands.
    pub(super) fn dial(&mut self, from: u32, to: u32) -> Nanos {
        let at = self.queue.now() + self.latency(from, to) * DIAL_TRIPS;
        let lives = (self.nodes[from as usize].life, self.nodes[to as usize].life);
        self.nodes[from as usize].dialing.insert(to, at);
        self.nodes[to as usize].dialing.insert(from, at);
        self.queue.at(at, Happening::Connected { nodes: (from, to), lives });
        at
    }

    /// There is nobody: who asked hears it when the dial's time is over, or at once when the port is closed.
    fn unreachable(&mut self, from: u32, ask: AskId) {
        let life = self.nodes[from as usize].life;
        let outcome = Box::new(Outcome::Failed { class: ErrorClass::Transient, retry_after: None });
        self.queue.after(DIAL_TIMEOUT, Happening::Ends { node: from, life, ask, outcome });
    }

    /// A dial is over. Of a peer that was banned meanwhile the policy does not hear.
    pub(super) fn connected(&mut self, (one, two): (u32, u32), lives: (u32, u32)) {
        let stands = lives == (self.nodes[one as usize].life, self.nodes[two as usize].life)
            && self.reaches(one, two)
            && self.reaches(two, one);
        for (no, other) in [(one, two), (two, one)] {
            self.nodes[no as usize].dialing.remove(&other);
            if stands {
                // One side may not have heard yet that the connection before this one is gone.
                self.connection_lost(no, other);
                self.nodes[no as usize].connected.insert(other);
                if !self.shuns(no, other) {
                    self.peer_up(no, other);
                }
            }
        }
    }

    /// As the driver does: tells the policy, and watches what the newcomer has.
    pub(super) fn peer_up(&mut self, no: u32, peer: u32) {
        self.tell(no, Event::PeerUp { peer: PeerNo(peer) });
        for layer in 0..self.shape.layers.len() as u16 {
            self.watch(no, layer, peer);
        }
    }

    /// A node hears that a connection is gone, unless there is another one by now.
    pub(super) fn heard_of_loss(&mut self, no: u32, peer: u32) {
        let again =
            self.nodes[peer as usize].connected.contains(&no) && self.reaches(no, peer) && self.reaches(peer, no);
        if !again {
            self.connection_lost(no, peer);
        }
    }

    /// What a node asks a peer for.
    fn asks_of(&self, no: u32, peer: u32) -> Vec<AskId> {
        let asks = self.nodes[no as usize].asks.iter();
        asks.filter(|(_, ask)| ask.target == Target::Peer(peer)).map(|(id, _)| *id).collect()
    }

    /// A connection is gone: asks of that peer are over, and what it was given too.
    pub(super) fn connection_lost(&mut self, no: u32, peer: u32) {
        if !self.nodes[no as usize].connected.remove(&peer) {
            return;
        }
        for layer in &mut self.nodes[no as usize].layers {
            layer.watchers.remove(&peer);
        }
        if !self.shuns(no, peer) {
            self.forget_peer(no, peer);
        }
        let answers: Vec<AskId> = self.nodes[no as usize]
            .answers
            .range((peer, AskId(0))..=(peer, AskId(u64::MAX)))
            .map(|(key, _)| key.1)
            .collect();
        for ask in answers {
            self.end_answer(no, peer, ask);
        }
    }

    /// Nothing comes from a peer any more: what it was asked for is over.
    fn forget_peer(&mut self, no: u32, peer: u32) {
        for layer in &mut self.nodes[no as usize].layers {
            layer.watched.remove(&peer);
        }
        let of_peer = self.asks_of(no, peer);
        self.tell(no, Event::PeerDown { peer: PeerNo(peer) });
        for ask in of_peer {
            // Policy has ended them; the driver's tasks end by themselves, unless they were cancelled.
            let outcome = Outcome::Failed { class: ErrorClass::Transient, retry_after: None };
            self.ask_ends(no, ask, outcome);
        }
        for layer in 0..self.shape.layers.len() as u16 {
            self.holder_answered(no, layer, peer);
        }
    }

    pub(super) fn letter(&mut self, letter: Letter) {
        let Letter { from, from_life, to, word, .. } = letter;
        let sender = &self.nodes[from as usize];
        if sender.life != from_life && !matches!(word, Word::Withdraw { .. }) || !self.reaches(from, to) {
            return;
        }
        if !self.nodes[to as usize].connected.contains(&from) {
            return;
        }
        let is_question =
            matches!(word, Word::Get { .. } | Word::Withdraw { .. } | Word::Have { .. } | Word::Watch { .. });
        if !is_question && self.has_banned(to, from) {
            if self.shuns(to, from) {
                return;
            }
            return self.violated("ban", format!("node {to} listens to node {from}, which it has banned"));
        }
        if let Some(what) = self.checkers.check_word(&word) {
            return self.violated("limits", format!("node {from} says to node {to}: {what}"));
        }
        match word {
            Word::Get { ask, layer, class, want, extent, chunks } => {
                self.asked(to, from, ask, (layer, class, want, extent, chunks));
            }
            Word::Withdraw { ask } => self.end_answer(to, from, ask),
            Word::Have { layer } => self.say_have(to, from, layer),
            Word::Watch { layer } => self.watched(to, from, layer),
            Word::HaveMap { layer, chunks } => {
                if !chunks.is_empty() {
                    self.heard_of(to, from, layer, chunks);
                }
                self.holder_answered(to, layer, from);
            }
            Word::More { layer, chunks } => self.heard_of(to, from, layer, chunks),
            answer => self.answer_word(to, answer),
        }
    }

    /// A word of an answer: a sign of life, and what it says.
    fn answer_word(&mut self, no: u32, word: Word) {
        let (ask, now) = match &word {
            Word::Lacks { ask, .. }
            | Word::Refer { ask, .. }
            | Word::Delegate { ask, .. }
            | Word::Pending { ask, .. }
            | Word::NotMine { ask, .. }
            | Word::Busy { ask, .. } => (*ask, self.queue.now()),
            _ => return,
        };
        let Some(open) = self.nodes[no as usize].asks.get_mut(&ask) else { return };
        open.sign = now;
        self.flush(no, ask, None);
        let nanos = std::time::Duration::from_nanos;
        match word {
            Word::Lacks { chunks, .. } => self.settled(no, ask, &chunks, true),
            Word::Refer { chunks, peers, .. } => {
                let peers = peers.into_iter().map(PeerNo).collect();
                self.tell(no, Event::AskReferred { ask, chunks: chunks.clone(), peers });
                self.settled(no, ask, &chunks, false);
            }
            Word::Delegate { chunks, .. } => {
                self.tell(no, Event::AskDelegated { ask, chunks: chunks.clone() });
                self.settled(no, ask, &chunks, false);
            }
            Word::Pending { registry_rests, .. } => {
                let registry_rests = (registry_rests > 0).then(|| nanos(registry_rests));
                self.tell(no, Event::AskPending { ask, registry_rests });
            }
            Word::NotMine { epoch, .. } => self.ask_ends(no, ask, Outcome::NotMine { epoch }),
            Word::Busy { retry_after, .. } => {
                self.ask_ends(no, ask, Outcome::Busy { retry_after: nanos(retry_after) });
            }
            _ => {}
        }
    }

    /// A ban ends all that comes from the peer, and not what it gets.
    pub(super) fn ban(&mut self, no: u32, peer: u32, until: Nanos) {
        self.nodes[no as usize].banned.insert(peer, until);
        if self.shuns(no, peer) {
            self.forget_peer(no, peer);
        }
    }
}
