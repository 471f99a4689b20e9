//! Who decides about chunks that others ask for and that are not simply here.
//!
//! The server knows what is here; whether the rest is on its way, is to be read from the registry, or is to be had from
//! somebody else is the business of whoever fetches for this node. So the server takes such chunks to a [`Desk`], as a
//! [`Claim`], and does what comes back, [`Ruling`] by ruling. Whoever loses interest drops their end of the channel: the
//! server when its asker has gone or has been answered, the desk when it has ruled on every chunk. Nothing is left behind.

use std::ops::Range;
use std::time::Duration;

use hermes_image::ids::{ArtifactId, DiffId, Digest};
use hermes_image::runs::Runs;
use libp2p::PeerId;
use tokio::sync::mpsc;

use super::codec::{Class, Want};

/// Decides about chunks that others ask for and that are not simply here.
///
/// Nothing here may block: all of it is called on async threads.
pub trait Desk: Send + Sync + 'static {
    /// Takes a claim. Rulings come over the returned receiver until every chunk has one; dropping the receiver withdraws
    /// the claim.
    ///
    /// A later ruling on a chunk counts, as long as the chunk was not answered for. When the sender is dropped, chunks
    /// without a ruling are given if they are here at that moment, and are lacking otherwise.
    fn claim(&self, claim: Claim) -> mpsc::Receiver<Ruling>;

    /// Whether `peer` may have anything of `layer`, and may know who else wants it.
    fn allows(&self, peer: PeerId, layer: DiffId) -> bool;

    /// Whether `peer` may have the index artifact `id`, which is here.
    fn allows_artifact(&self, peer: PeerId, id: ArtifactId) -> bool;

    /// Whether `peer` may have the statement of `manifest`, which is here.
    fn allows_statement(&self, peer: PeerId, manifest: Digest) -> bool;

    /// Takes a grant that `peer` presents, 1 to 1,024 bytes; whether it is good.
    fn grant(&self, peer: PeerId, grant: &[u8]) -> bool;
}

/// Chunks that a peer waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Who.
    pub peer: PeerId,
    /// Of which layer.
    pub layer: DiffId,
    /// By which chunk table they are counted.
    pub table: ArtifactId,
    /// How urgently.
    pub class: Class,
    /// What the peer expects of this node.
    pub want: Want,
    /// The extent that they belong to; 0..0 when the peer means none. It may end beyond the layer.
    pub extent: Range<u32>,
    /// Which chunks; at least one, and all of the extent unless [`Want::Here`]. They may not be chunks of the layer.
    pub chunks: Runs,
}

/// What becomes of chunks of a claim. Chunks that are not of the claim, or are answered for, are ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ruling {
    /// The peer is given these as soon as they are here.
    Give(Runs),
    /// They are not here and will not be.
    Lacks(Runs),
    /// Others have them, or get them.
    Refer {
        /// Which.
        chunks: Runs,
        /// Who, best first; at most four are told.
        peers: Vec<PeerId>,
    },
    /// The peer is to read these from the source; they may hold more of the extent than was claimed.
    Delegate(Runs),
    /// The registry has told this node to wait for so long, which the peer is told.
    RegistryRests(Duration),
    /// By the member list of `epoch` this node does not own the extent. Ends the claim.
    NotMine {
        /// The epoch.
        epoch: u64,
    },
    /// The peer may not have it. Ends the claim.
    Denied,
}

/// Gives everybody what is here, lacks the rest, and takes every grant: for tests, and for tools that only serve.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenDesk;

impl Desk for OpenDesk {
    fn claim(&self, _: Claim) -> mpsc::Receiver<Ruling> {
        // No ruling at all.
        mpsc::channel(1).1
    }

    fn allows(&self, _: PeerId, _: DiffId) -> bool {
        true
    }

    fn allows_artifact(&self, _: PeerId, _: ArtifactId) -> bool {
        true
    }

    fn allows_statement(&self, _: PeerId, _: Digest) -> bool {
        true
    }

    fn grant(&self, _: PeerId, _: &[u8]) -> bool {
        true
    }
}
