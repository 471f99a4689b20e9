//! What a node holds beside its policy: its store, its asks, what it answers others, and its start.
//!
//! A node that dies loses all of it but the store. Whatever was planned for the earlier life is ignored: it names the life
//! that it was planned for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use hermes_image::runs::Runs;
use hermes_policy::class::Class;
use hermes_policy::event::{AskId, ClaimId, ReadId, Want};
use hermes_policy::flight::Flight;
use hermes_policy::limits::Limits;
use hermes_policy::rng::Rng;
use hermes_policy::time::Instant;

use crate::net::{FlowNo, LinkNo};
use crate::queue::Nanos;
use crate::world::rival::state::Rival;

/// Whom an ask goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Peer(u32),
    Registry,
    Local,
}

/// An ask that the driver works on.
#[derive(Debug)]
pub(crate) struct OpenAsk {
    pub(crate) target: Target,
    pub(crate) layer: u16,
    pub(crate) class: Class,
    /// Asked for and not answered; of a peer.
    pub(crate) left: Runs,
    pub(crate) lacking: Runs,
    /// Came and is not stored yet.
    pub(crate) batch: Runs,
    /// The last sign of life.
    pub(crate) sign: Nanos,
    pub(crate) timeout: Nanos,
    /// It ends then, whatever comes.
    pub(crate) until: Nanos,
    pub(crate) bytes: u64,
    /// The spans that the registry sends.
    pub(crate) spans: std::ops::Range<u32>,
    pub(crate) flow: Option<FlowNo>,
}

impl OpenAsk {
    /// When it ends unless there is a sign of life before. Of a peer's answer that is here as a whole only the disk is waited for.
    pub(crate) fn due(&self) -> Nanos {
        match self.target {
            Target::Peer(_) if self.left.is_empty() => self.until,
            _ => self.until.min(self.sign + self.timeout),
        }
    }
}

/// What one other node is being answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) layer: u16,
    pub(crate) class: Class,
    pub(crate) want: Want,
    pub(crate) extent: std::ops::Range<u32>,
    pub(crate) asked: Runs,
    /// Not answered for yet.
    pub(crate) open: Runs,
    /// Of it, what is sent as soon as it is here.
    pub(crate) given: Runs,
    pub(crate) flow: Option<FlowNo>,
    /// It holds a place among the transfers.
    pub(crate) slot: bool,
    /// Something that was given may be here.
    pub(crate) looks: bool,
    pub(crate) claim: Option<ClaimId>,
    pub(crate) until: Nanos,
    pub(crate) registry_rests_until: Nanos,
}

/// What others may take at once (`p2p/exchange/limits.rs`).
#[derive(Debug, Default)]
pub(crate) struct Gate {
    pub(crate) demand: u32,
    pub(crate) prefetch: u32,
    pub(crate) claims: u32,
    /// Transfers and claims of each peer that has some.
    pub(crate) of_peer: BTreeMap<u32, (u32, u32)>,
    /// Answers that wait for a place, in order.
    pub(crate) waiting: VecDeque<(u32, AskId)>,
}

/// One layer on a node.
#[derive(Debug, Default)]
pub(crate) struct LayerHere {
    pub(crate) have: Runs,
    /// What watchers were told.
    pub(crate) told: Runs,
    pub(crate) news_planned: bool,
    /// Others that are told what comes.
    pub(crate) watchers: BTreeSet<u32>,
    /// Others that this node is told by.
    pub(crate) watched: BTreeSet<u32>,
    /// Holders that were asked what they have and have not answered.
    pub(crate) looking: BTreeSet<u32>,
    pub(crate) open: bool,
    /// The policy's marks, by place.
    pub(crate) marks: BTreeMap<usize, u32>,
}

/// A read that waits.
#[derive(Debug, Clone)]
pub(crate) struct Waiting {
    pub(crate) layer: u16,
    pub(crate) chunks: Runs,
    pub(crate) class: Class,
    pub(crate) since: Nanos,
}

/// A start under way.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) began: Nanos,
    /// The image, by its place in the shape.
    pub(crate) image: usize,
    /// The next read of the shape that nobody has begun.
    pub(crate) next: usize,
    pub(crate) done: usize,
    pub(crate) ready: Option<Nanos>,
    /// Reads that failed and are made again.
    pub(crate) again: Vec<usize>,
    /// Demand reads that wait, by place in the shape.
    pub(crate) at: BTreeMap<ReadId, usize>,
}

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) zone: u32,
    /// It is in the cluster.
    pub(crate) joined: bool,
    pub(crate) up: bool,
    pub(crate) life: u32,
    pub(crate) paused_until: Nanos,
    /// It died for good while it had work.
    pub(crate) lost: bool,
    pub(crate) corrupt: bool,
    pub(crate) stale: bool,
    pub(crate) drift_ppm: u32,
    pub(crate) flight: Flight,
    pub(crate) rng: Rng,
    pub(crate) uplink: LinkNo,
    pub(crate) downlink: LinkNo,
    /// The policy's time at which the timer is to fire, and of the last request for it (for the checkers).
    pub(crate) timer: Option<Instant>,
    pub(crate) armed: Option<Instant>,
    pub(crate) layers: Vec<LayerHere>,
    pub(crate) asks: BTreeMap<AskId, OpenAsk>,
    /// When silent asks are looked for next.
    pub(crate) silence_at: Option<Nanos>,
    pub(crate) answers: BTreeMap<(u32, AskId), Answer>,
    pub(crate) claims: BTreeMap<ClaimId, (u32, AskId)>,
    pub(crate) next_claim: u64,
    pub(crate) gate: Gate,
    pub(crate) connected: BTreeSet<u32>,
    /// Connections that are being made, and when they stand.
    pub(crate) dialing: BTreeMap<u32, Nanos>,
    pub(crate) banned: BTreeMap<u32, Nanos>,
    pub(crate) disk_free: Nanos,
    pub(crate) decode_free: Nanos,
    pub(crate) reads: BTreeMap<ReadId, Waiting>,
    pub(crate) next_read: u64,
    pub(crate) start: Option<Start>,
    pub(crate) counts: Counts,
    /// What a model of another system keeps.
    pub(crate) rival: Option<Box<Rival>>,
}

/// What a node has done.
#[derive(Debug, Default, Clone)]
pub(crate) struct Counts {
    /// Uncompressed bytes that came, by source, and those of them that were here already.
    pub(crate) from_registry: u64,
    pub(crate) from_peers: u64,
    pub(crate) from_local: u64,
    pub(crate) again: u64,
    /// Asks of the registry that the policy made, and requests that the registry got from this node.
    pub(crate) registry_asks: u64,
    pub(crate) registry_requests: u64,
    /// Wrong chunks, by peer.
    pub(crate) wrong: BTreeMap<u32, u32>,
}

impl Node {
    pub(crate) fn new(no: u32, zone: u32, layers: usize, links: (LinkNo, LinkNo), seed: u64, limits: Limits) -> Self {
        Self {
            zone,
            joined: false,
            up: false,
            life: 0,
            paused_until: 0,
            lost: false,
            corrupt: false,
            stale: false,
            drift_ppm: 0,
            flight: Flight::new(limits),
            rng: Rng::new(seed ^ u64::from(no).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            uplink: links.0,
            downlink: links.1,
            timer: None,
            armed: None,
            layers: (0..layers).map(|_| LayerHere::default()).collect(),
            asks: BTreeMap::new(),
            silence_at: None,
            answers: BTreeMap::new(),
            claims: BTreeMap::new(),
            next_claim: 0,
            gate: Gate::default(),
            connected: BTreeSet::new(),
            dialing: BTreeMap::new(),
            banned: BTreeMap::new(),
            disk_free: 0,
            decode_free: 0,
            reads: BTreeMap::new(),
            next_read: 0,
            start: None,
            counts: Counts::default(),
            rival: None,
        }
    }

    /// The node's own clock at the world's time `now`.
    pub(crate) fn clock(&self, now: Nanos) -> Instant {
        Instant(now + (u128::from(now) * u128::from(self.drift_ppm) / 1_000_000) as u64)
    }

    /// The world's time at which the node's clock shows `at`.
    pub(crate) fn world_time(&self, at: Instant) -> Nanos {
        let scaled = u128::from(at.0) * 1_000_000;
        u64::try_from(scaled.div_ceil(1_000_000 + u128::from(self.drift_ppm))).unwrap_or(u64::MAX)
    }

    /// Forgets all that dies with the process.
    pub(crate) fn die(&mut self, limits: Limits) {
        self.up = false;
        self.life += 1;
        self.flight = Flight::new(limits);
        (self.timer, self.armed, self.silence_at) = (None, None, None);
        self.asks = BTreeMap::new();
        self.answers = BTreeMap::new();
        self.claims = BTreeMap::new();
        self.gate = Gate::default();
        self.connected = BTreeSet::new();
        self.dialing = BTreeMap::new();
        self.banned = BTreeMap::new();
        self.reads = BTreeMap::new();
        for layer in &mut self.layers {
            let have = std::mem::take(&mut layer.have);
            *layer = LayerHere { have, ..LayerHere::default() };
        }
        if let Some(rival) = &mut self.rival {
            rival.die();
        }
        if let Some(start) = &mut self.start {
            // The containers live on; their reads wait and are made again.
            start.again.extend(std::mem::take(&mut start.at).into_values());
        }
    }

    pub(crate) fn read_id(&mut self) -> ReadId {
        self.next_read += 1;
        ReadId(self.next_read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quick_clock_shows_more_and_is_turned_back_exactly() {
        let mut node = Node::new(0, 0, 0, (LinkNo(0), LinkNo(1)), 1, Limits::default());
        node.drift_ppm = 500;
        assert_eq!(node.clock(2_000_000), Instant(2_001_000));
        for at in [0, 1, 999_999, 2_001_000, 1 << 50] {
            let world = node.world_time(Instant(at));
            assert!(node.clock(world).0 >= at && (world == 0 || node.clock(world - 1).0 < at), "{at}");
        }
    }
}
