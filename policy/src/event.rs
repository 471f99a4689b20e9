//! The language between policy and its driver: facts in, requests out.
//!
//! What a driver must keep to:
//! - Time never runs backwards, and [`Event::TimerFired`] comes at or after the time of the last [`Action::Arm`].
//! - [`Event::Arrived`] is sent for every chunk that was verified and stored, whoever brought it and whether anybody
//!   asked for it, and *before* the [`Event::AskEnded`] of the ask that brought it.
//! - Every ask ends with one `AskEnded`, except after [`Action::Cancel`], when it may. Facts about asks, reads, peers
//!   and layers that policy does not know change nothing.
//! - A claim ends with one [`Event::ClaimEnded`], whether all of it was ruled on or not. Claims' numbers are below 2^63.
//! - Whoever promises and never delivers loses the promise: policy cancels an ask that shows no sign of life.

use std::ops::Range;
use std::sync::Arc;

use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;
use serde::{Deserialize, Serialize};

use crate::class::{Class, ErrorClass};
use crate::geometry::LayerGeometry;
use crate::members::{Duty, Members};
use crate::time::{Duration, Instant};

/// How what is shared is written: like the thing itself.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<T: Serialize, S: Serializer>(value: &Arc<T>, serializer: S) -> Result<S::Ok, S::Error> {
        value.as_ref().serialize(serializer)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<T>, D::Error> {
        T::deserialize(deserializer).map(Arc::new)
    }
}

/// A peer, by the driver's own number. A number is never given to another peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeerNo(pub u32);

/// A registry (or mirror), by the driver's own number. Layers of one registry share its limits and its `Retry-After`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OriginNo(pub u32);

/// A read that waits, by the driver's own number. A number is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ReadId(pub u64);

/// A question under way, by policy's number. A number is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AskId(pub u64);

/// A question of another node that waits for rulings, by the driver's own number. A number is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClaimId(pub u64);

/// What is expected of a peer that is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Want {
    /// What it has, or what is on its way to it.
    Here,
    /// That it gets them, or says who else has them: it owns their extent.
    Owner {
        /// For whom it is to act.
        duty: Duty,
        /// Whom it named before did not have them.
        again: bool,
        /// The asker's own registry would give them, if the owner left them to it.
        can_read: bool,
    },
}

/// What is answered to a claim, for some of its chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ruling {
    /// They are here or on their way: send them when they are.
    Give(Runs),
    /// They are not here, and do not come.
    Lacks(Runs),
    /// Others have them or are about to; at most [`crate::limits::Limits::referral_peers`].
    Refer {
        /// The chunks.
        chunks: Runs,
        /// Who.
        peers: Vec<PeerNo>,
    },
    /// The claimant reads them itself, and the next claimants are sent to it.
    Delegate(Runs),
    /// What was promised waits because the registry asked for rest.
    RegistryRests(Duration),
    /// This node does not own the extent.
    NotMine {
        /// Of the member list that says so.
        epoch: u64,
    },
}

/// Where chunks can come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Source {
    /// Another layer on this node.
    Local,
    /// A peer that has them.
    Peer(PeerNo),
    /// The layer's registry.
    Origin,
}

/// Why just this source is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Reason {
    /// The peer has said that it has all of the chunks.
    Holder,
    /// Somebody who owns or reads the chunks has named the peer.
    Named,
    /// The peer owns the extent.
    Owner {
        /// For whom.
        duty: Duty,
        /// How many would be asked before it.
        rank: usize,
    },
    /// An earlier ask takes too long.
    Hedge,
    /// Other nodes want the chunks from this one, as the owner of their extent.
    ForOthers,
    /// An owner has left the chunks to this node.
    Delegated,
    /// This node is itself among the owners of the extent.
    OwnTurn {
        /// How many owners come before it.
        rank: usize,
    },
    /// No owner of the extent can be reached.
    NobodyOwns,
    /// There is no swarm with owners.
    NoSwarm,
}

/// How an ask ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// All that was asked for has arrived.
    Done {
        /// Bytes that came over the wire or from the disk; they calibrate the choice of peers.
        bytes: u64,
    },
    /// It failed. What arrived before stays.
    Failed {
        /// What the failure means.
        class: ErrorClass,
        /// What the source said about when to come back.
        retry_after: Option<Duration>,
    },
    /// The source is well but has too much to do.
    Busy {
        /// When to come back.
        retry_after: Duration,
    },
    /// The source does not have these chunks (any more). Whatever else was asked for and did not come may be asked
    /// for again.
    Lacks {
        /// The chunks.
        chunks: Runs,
    },
    /// The peer does not own the extent.
    NotMine {
        /// Of the member list that says so.
        epoch: u64,
    },
}

/// A fact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A layer may be read from now on.
    LayerOpened {
        /// The layer.
        layer: DiffId,
        /// Where its chunks and spans lie.
        #[serde(with = "shared")]
        geometry: Arc<LayerGeometry>,
        /// Chunks that are here.
        present: Runs,
        /// Chunks that another layer on this node holds now.
        local: Runs,
        /// Its registry; `None` when it has none at all.
        origin: Option<OriginNo>,
    },
    /// The layer is no longer read. Its waiting reads fail and its asks are cancelled.
    LayerClosed {
        /// The layer.
        layer: DiffId,
    },
    /// More is known about the layer's spans. The number of chunks stays as it was, else nothing changes.
    GeometryChanged {
        /// The layer.
        layer: DiffId,
        /// The geometry from now on.
        #[serde(with = "shared")]
        geometry: Arc<LayerGeometry>,
    },
    /// This registry can (or cannot) be asked for the layer from now on: another image brought or took one, or new
    /// credentials. Forgets what was refused; what was asked before and fails later says nothing of it either.
    OriginChanged {
        /// The layer.
        layer: DiffId,
        /// The registry; `None` when it has none any more.
        origin: Option<OriginNo>,
        /// Whether it can be asked.
        usable: bool,
    },
    /// A connection to the peer stands.
    PeerUp {
        /// The peer.
        peer: PeerNo,
    },
    /// The connection is gone, and with it all that is known of what the peer has. Its asks count as failed.
    PeerDown {
        /// The peer.
        peer: PeerNo,
    },
    /// The peer also has these chunks: *extends* what is known. Less comes by [`Outcome::Lacks`] and `PeerDown`.
    PeerHas {
        /// The peer; unknown or banned ones are ignored.
        peer: PeerNo,
        /// The layer; unknown ones are ignored.
        layer: DiffId,
        /// The chunks; those beyond the layer are ignored.
        chunks: Runs,
    },
    /// The search that [`Action::FindHolders`] asked for is over; what it found came as `PeerHas` before.
    HoldersFound {
        /// The layer.
        layer: DiffId,
    },
    /// The member list has changed. Members may be asked whether there is a connection or not.
    MembersChanged {
        /// All of it.
        #[serde(with = "shared")]
        members: Arc<Members>,
    },
    /// Another node asks for what it did not find.
    Claimed {
        /// Its name from now on.
        claim: ClaimId,
        /// Who asks; a peer that has a number.
        peer: PeerNo,
        /// The layer; need not be open here.
        layer: DiffId,
        /// The chunks, by the claimant's count.
        chunks: Runs,
        /// The extent that they belong to, by the claimant's count; empty when `want` is [`Want::Here`].
        extent: ChunkRange,
        /// Why.
        class: Class,
        /// What is expected.
        want: Want,
    },
    /// Nobody waits for rulings on the claim any more.
    ClaimEnded {
        /// The claim.
        claim: ClaimId,
    },
    /// The peer names others for chunks that it was asked for.
    AskReferred {
        /// The ask.
        ask: AskId,
        /// The chunks.
        chunks: Runs,
        /// Who has them, or is about to.
        peers: Vec<PeerNo>,
    },
    /// The owner leaves it to this node to read chunks from where the owner would have: the registry, or the owner among
    /// all.
    AskDelegated {
        /// The ask.
        ask: AskId,
        /// The chunks; those beyond the extent that was asked about are ignored.
        chunks: Runs,
    },
    /// The peer works on the ask and has nothing yet.
    AskPending {
        /// The ask.
        ask: AskId,
        /// For how long the registry asked the peer to leave it alone, if it did.
        registry_rests: Option<Duration>,
    },
    /// A read wants these chunks.
    ReadNeeds {
        /// Its name from now on.
        read: ReadId,
        /// The layer.
        layer: DiffId,
        /// The chunks. Those that are here already are not waited for.
        chunks: Runs,
        /// Why.
        class: Class,
        /// When to give up.
        deadline: Instant,
    },
    /// A demand read was answered from chunks that are here, among them one of [`Action::Watch`]. A hint for
    /// readahead: it may be dropped.
    ReadHit {
        /// The layer.
        layer: DiffId,
        /// The first chunk that it read.
        first_chunk: u32,
        /// The chunk after the last that it read.
        end_chunk: u32,
    },
    /// Nobody waits for the read any more.
    ReadCancelled {
        /// The read.
        read: ReadId,
    },
    /// Chunks were verified and stored.
    Arrived {
        /// The layer.
        layer: DiffId,
        /// The chunks.
        chunks: Runs,
    },
    /// Chunks were verified and handed to the reads that wait for them, because the store has no room. They are not
    /// here: a read that comes later needs them anew.
    PassedThrough {
        /// The layer.
        layer: DiffId,
        /// The chunks.
        chunks: Runs,
    },
    /// Chunks were removed from the store.
    Evicted {
        /// The layer.
        layer: DiffId,
        /// The chunks.
        chunks: Runs,
    },
    /// Another layer on this node holds these chunks now.
    LocalHas {
        /// The layer that could copy them.
        layer: DiffId,
        /// The chunks, in that layer's numbers.
        chunks: Runs,
    },
    /// Bytes came for an ask: a sign of life.
    AskProgress {
        /// The ask.
        ask: AskId,
    },
    /// An ask is over.
    AskEnded {
        /// The ask.
        ask: AskId,
        /// How.
        outcome: Outcome,
    },
    /// The time of [`Action::Arm`] has come.
    TimerFired,
}

/// A request to the driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Copy chunks from another layer on this node.
    AskLocal {
        /// The ask.
        ask: AskId,
        /// The layer that wants them.
        layer: DiffId,
        /// The chunks.
        chunks: Runs,
        /// Why.
        class: Class,
    },
    /// Ask a peer for chunks.
    AskPeer {
        /// The ask.
        ask: AskId,
        /// The peer.
        peer: PeerNo,
        /// The layer.
        layer: DiffId,
        /// The chunks.
        chunks: Runs,
        /// Why.
        class: Class,
        /// What is expected of the peer.
        want: Want,
        /// Why this peer.
        reason: Reason,
        /// The extent of the chunks; empty when `want` is [`Want::Here`].
        extent: ChunkRange,
        /// Longest time without a byte, after which the driver ends the ask as transient.
        timeout: Duration,
    },
    /// Answer (a part of) a claim.
    Rule {
        /// The claim.
        claim: ClaimId,
        /// The answer.
        ruling: Ruling,
    },
    /// The member did not answer: let the others know.
    Suspect {
        /// The member.
        peer: PeerNo,
    },
    /// Read neighbouring spans from the registry in one request, and decode them. All chunks of the spans that are
    /// not here yet are worth storing, whoever asked for them.
    AskOrigin {
        /// The ask.
        ask: AskId,
        /// The registry.
        origin: OriginNo,
        /// The layer.
        layer: DiffId,
        /// The spans.
        spans: Range<u32>,
        /// Why.
        class: Class,
        /// Why the registry.
        reason: Reason,
        /// Longest time without a byte, after which the driver ends the ask as transient.
        timeout: Duration,
    },
    /// Stop working on an ask. Nobody waits for it.
    Cancel {
        /// The ask.
        ask: AskId,
    },
    /// All chunks of the read are here.
    Deliver {
        /// The read.
        read: ReadId,
    },
    /// The read cannot be answered.
    Fail {
        /// The read.
        read: ReadId,
        /// Why.
        cause: FailCause,
    },
    /// Search the swarm for holders of the layer; report them as `PeerHas`, then `HoldersFound`.
    FindHolders {
        /// The layer.
        layer: DiffId,
    },
    /// The registry is needed, but the layer's spans are not known: get them, and report `GeometryChanged`.
    FindSpans {
        /// The layer.
        layer: DiffId,
    },
    /// Report the next read that finds the chunk there, as [`Event::ReadHit`]. Replaces the earlier request of the
    /// same layer and place.
    Watch {
        /// The layer.
        layer: DiffId,
        /// Which of the layer's marks is moved; below [`crate::limits::Limits::readahead_streams`].
        place: usize,
        /// The chunk.
        chunk: u32,
    },
    /// The peer sent wrong bytes: ask it for nothing and drop what it still sends, report it.
    Ban {
        /// The peer.
        peer: PeerNo,
        /// Until when.
        until: Instant,
    },
    /// Send `TimerFired` at this time. Replaces the earlier request.
    Arm {
        /// The time.
        at: Instant,
    },
}

/// Why a read ended without its chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailReason {
    /// No source answered in time.
    Deadline,
    /// Every source has said for good that it will not or cannot give the chunks.
    Refused,
    /// Too many reads wait.
    Overload,
    /// The layer was closed.
    Closed,
    /// The layer is not open, or has no such chunk.
    Unknown,
}

impl FailReason {
    /// The metric label.
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Deadline => "deadline",
            Self::Refused => "refused",
            Self::Overload => "overload",
            Self::Closed => "closed",
            Self::Unknown => "unknown",
        }
    }
}

/// How the layer's registry stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OriginStanding {
    /// The layer has none.
    Absent,
    /// It cannot be asked now.
    Unusable,
    /// Its spans are not known yet.
    SpansUnknown,
    /// It rests after a failure.
    Resting,
    /// It refused the layer.
    Refused,
    /// It can be asked.
    Ready,
}

/// Why a read failed, with what is known of each source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailCause {
    /// Why it ended now.
    pub reason: FailReason,
    /// The last failure of each source of the layer that did not answer since, in order of sources; bounded by
    /// [`crate::limits::Limits::troubles_per_layer`].
    pub tried: Vec<(Source, ErrorClass)>,
    /// How the registry stands.
    pub origin: OriginStanding,
    /// Peers that say they have chunks of the layer.
    pub holders: usize,
}

/// A peer as the policy sees it, for `hermes status --peers`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PeerView {
    /// Smoothed time to its first byte.
    pub latency: Duration,
    /// Smoothed time for each KiB after that.
    pub cost_per_kib: Duration,
    /// Asks under way.
    pub asks: usize,
    /// Open layers of which it has said that it has something, or somebody has.
    pub holds: usize,
    /// How much longer it is left alone, after a failure or because it is busy.
    pub rests: Duration,
    /// How much longer it is banned.
    pub banned: Duration,
}

/// What waits and what is under way, for `hermes status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status {
    /// Demand reads that wait.
    pub waiting_demand: usize,
    /// Prefetch reads that wait.
    pub waiting_prefetch: usize,
    /// Asks under way, by source.
    pub asks_local: usize,
    /// See `asks_local`.
    pub asks_peer: usize,
    /// See `asks_local`.
    pub asks_origin: usize,
    /// Peers that are connected.
    pub peers_up: usize,
    /// Peers that are banned.
    pub peers_banned: usize,
    /// Layers that are open.
    pub layers: usize,
    /// Claims of others that wait for chunks.
    pub claims: usize,
}
