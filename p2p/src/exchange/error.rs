//! What can go wrong between this node and one peer.
//!
//! A fetch is of one layer, which its caller knows, so errors name the peer and the chunk only.

use std::io;
use std::ops::Range;
use std::time::Duration;

use hermes_image::ids::{ArtifactId, ChunkNo};
use hermes_image::verify::Mismatch;
use libp2p::PeerId;
use thiserror::Error;

use super::codec::{CodecError, Reason};
use crate::error::{ErrorClass, NodeError};

/// An exchange that did not bring all that was asked for. What was handed out before is right nevertheless.
#[derive(Debug, Error)]
pub enum ExchangeError {
    /// The peer sent bytes that are not the chunk.
    #[error("peer {peer} sent wrong bytes for chunk {chunk}")]
    WrongChunk {
        /// Who.
        peer: PeerId,
        /// For which chunk.
        chunk: ChunkNo,
        /// What is wrong with them.
        #[source]
        source: Mismatch,
    },
    /// The peer sent a compressed chunk that does not decompress to the chunk's length.
    #[error("peer {peer} sent chunk {chunk} badly compressed")]
    BadEncoding {
        /// Who.
        peer: PeerId,
        /// Which chunk.
        chunk: ChunkNo,
    },
    /// The peer sent a chunk that was not asked for, or that it had answered already.
    #[error("peer {peer} sent chunk {chunk}, which was never asked for or is answered already")]
    Unasked {
        /// Who.
        peer: PeerId,
        /// Which chunk.
        chunk: ChunkNo,
    },
    /// The peer sent bytes that are not the artifact.
    #[error("peer {peer} sent wrong bytes for artifact {id}")]
    WrongArtifact {
        /// Who.
        peer: PeerId,
        /// For which artifact.
        id: ArtifactId,
    },
    /// The peer offers more bytes than this node accepts.
    #[error("peer {peer} offers {len_bytes} bytes of {what}, more than the limit of {limit_bytes}")]
    TooLong {
        /// Who.
        peer: PeerId,
        /// Of what.
        what: &'static str,
        /// By its word.
        len_bytes: u64,
        /// What this node accepts.
        limit_bytes: u64,
    },
    /// The peer sent a frame that is no message.
    #[error("peer {peer} broke the protocol")]
    Codec {
        /// Who.
        peer: PeerId,
        /// How.
        #[source]
        source: CodecError,
    },
    /// The peer sent a message at the wrong time.
    #[error("peer {peer} answered {request} with {answer}")]
    Unexpected {
        /// Who.
        peer: PeerId,
        /// To what.
        request: &'static str,
        /// The message.
        answer: &'static str,
    },
    /// The peer said again and again that nothing has come yet, more often than it may.
    #[error("peer {peer} floods this node with PENDING")]
    PendingFlood {
        /// Who.
        peer: PeerId,
    },
    /// The peer ended the stream and said why.
    #[error("peer {peer} ended the stream: {}", reason.name())]
    Refused {
        /// Who.
        peer: PeerId,
        /// What it said.
        reason: Reason,
    },
    /// The peer's limits are reached.
    #[error("peer {peer} is busy; ask again in {retry_after:?}")]
    Busy {
        /// Who.
        peer: PeerId,
        /// When to ask again, at most a minute.
        retry_after: Duration,
    },
    /// The peer does not give this to this node.
    #[error("peer {peer} denies {what}")]
    Denied {
        /// Who.
        peer: PeerId,
        /// What.
        what: &'static str,
    },
    /// The peer does not own the extent by its member list.
    #[error("peer {peer} does not own the extent by its member list of epoch {epoch}; compare it with this node's")]
    NotMine {
        /// Who.
        peer: PeerId,
        /// The epoch of its member list.
        epoch: u64,
    },
    /// The peer does not have it.
    #[error("peer {peer} does not have the {what}")]
    NotFound {
        /// Who.
        peer: PeerId,
        /// What.
        what: &'static str,
    },
    /// There is no connection to the peer, and none could be made.
    #[error("peer {peer} cannot be reached")]
    Unreachable {
        /// Who.
        peer: PeerId,
        /// Why.
        #[source]
        source: Box<NodeError>,
    },
    /// The peer speaks another version, or no exchange at all.
    #[error("peer {peer} does not speak {protocol}; is it of another cluster or version?")]
    Unsupported {
        /// Who.
        peer: PeerId,
        /// What it does not speak.
        protocol: String,
    },
    /// The peer was too slow, or the deadline of the caller has passed.
    #[error("peer {peer} took too long while {doing}")]
    Timeout {
        /// Who.
        peer: PeerId,
        /// What was being done.
        doing: &'static str,
    },
    /// The stream or the connection broke.
    #[error("the stream to peer {peer} broke")]
    Disconnected {
        /// Who.
        peer: PeerId,
        /// How.
        #[source]
        source: io::Error,
    },
    /// The caller asked for chunks that the table does not have.
    #[error("asked for chunks up to {end} of a layer that has {count}")]
    NoSuchChunk {
        /// End of the last run asked for.
        end: u32,
        /// Chunks of the layer.
        count: u32,
    },
    /// The caller named an extent that has no chunks, or asked the owner of one for chunks outside of it.
    #[error("asked for chunks that are not all of the extent {}..{}", extent.start, extent.end)]
    NotInExtent {
        /// The extent.
        extent: Range<u32>,
    },
    /// The caller presents a grant that no message holds.
    #[error("a grant of {len_bytes} bytes cannot be presented; it has 1 to {limit_bytes}")]
    GrantLength {
        /// Its length.
        len_bytes: usize,
        /// The longest there may be.
        limit_bytes: usize,
    },
    /// The node is shutting down, or the task of the exchange was lost.
    #[error("the node is shutting down")]
    Closed,
}

impl ExchangeError {
    /// The peer that the error is about; `None` when it is about this node.
    pub fn peer(&self) -> Option<PeerId> {
        match self {
            Self::WrongChunk { peer, .. }
            | Self::BadEncoding { peer, .. }
            | Self::Unasked { peer, .. }
            | Self::WrongArtifact { peer, .. }
            | Self::TooLong { peer, .. }
            | Self::Codec { peer, .. }
            | Self::Unexpected { peer, .. }
            | Self::PendingFlood { peer }
            | Self::Refused { peer, .. }
            | Self::Busy { peer, .. }
            | Self::Denied { peer, .. }
            | Self::NotMine { peer, .. }
            | Self::NotFound { peer, .. }
            | Self::Unreachable { peer, .. }
            | Self::Unsupported { peer, .. }
            | Self::Timeout { peer, .. }
            | Self::Disconnected { peer, .. } => Some(*peer),
            Self::NoSuchChunk { .. } | Self::NotInExtent { .. } | Self::GrantLength { .. } | Self::Closed => None,
        }
    }

    /// What policy should make of it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::WrongChunk { .. }
            | Self::BadEncoding { .. }
            | Self::Unasked { .. }
            | Self::WrongArtifact { .. }
            | Self::TooLong { .. }
            | Self::Codec { .. }
            | Self::Unexpected { .. }
            | Self::PendingFlood { .. }
            | Self::Unsupported { .. } => ErrorClass::PeerFault,
            Self::Refused { .. }
            | Self::Busy { .. }
            | Self::NotMine { .. }
            | Self::Timeout { .. }
            | Self::Disconnected { .. } => ErrorClass::Transient,
            Self::Denied { .. } => ErrorClass::Denied,
            Self::NotFound { .. } => ErrorClass::NotFound,
            Self::Unreachable { source, .. } => source.class(),
            Self::NoSuchChunk { .. } | Self::NotInExtent { .. } | Self::GrantLength { .. } | Self::Closed => {
                ErrorClass::Local
            }
        }
    }

    /// The metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::WrongChunk { .. } => "wrong_chunk",
            Self::BadEncoding { .. } => "bad_encoding",
            Self::Unasked { .. } => "unasked",
            Self::WrongArtifact { .. } => "wrong_artifact",
            Self::TooLong { .. } => "too_long",
            Self::Codec { .. } => "codec",
            Self::Unexpected { .. } => "unexpected",
            Self::PendingFlood { .. } => "pending_flood",
            Self::Refused { .. } => "refused",
            Self::Busy { .. } => "busy",
            Self::Denied { .. } => "denied",
            Self::NotMine { .. } => "not_mine",
            Self::NotFound { .. } => "not_found",
            Self::Unreachable { .. } => "unreachable",
            Self::Unsupported { .. } => "unsupported",
            Self::Timeout { .. } => "timeout",
            Self::Disconnected { .. } => "disconnected",
            Self::NoSuchChunk { .. } => "no_such_chunk",
            Self::NotInExtent { .. } => "not_in_extent",
            Self::GrantLength { .. } => "grant_length",
            Self::Closed => "closed",
        }
    }
}
