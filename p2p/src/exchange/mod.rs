//! The exchange: chunks, have-maps, artifacts and statements over long-lived streams.
//!
//! A stream carries one request at a time: the asker writes it, then only reads until the last frame of the answer; the
//! other side only reads until it has a request, then only writes. So two full windows can never wait for each other.
//! Streams are opened rarely and used again, because a fresh one costs a round trip and starts with a small window.
//!
//! | module | what |
//! |---|---|
//! | [`codec`] | frames and messages, pure |
//! | `session` | frames over a stream, with limits and times |
//! | `linked` | a stream that breaks with its connection |
//! | `compress` | zstd on the wire |
//! | `limits` | what others may take from this node |
//! | [`desk`] | who decides about chunks that are not simply here |
//! | `server`, `answering`, `upload` | answers requests from [`Content`], by leave of the [`Desk`] |
//! | `pool` | the streams that this node has opened |
//! | `client`, [`fetch`], `watch` | asks, checks every byte, hands it on |

pub mod codec;
pub mod desk;
pub mod error;
pub mod fetch;
pub mod session;
pub mod watch;

mod answering;
pub(crate) mod client;
pub(crate) mod compress;
pub(crate) mod limits;
pub(crate) mod linked;
pub(crate) mod pool;
pub(crate) mod progress;
pub(crate) mod proofs;
pub(crate) mod server;
mod upload;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, ChunkNo, DiffId, Digest};
use hermes_image::runs::Runs;

pub use codec::{Class, Duty, Want};
pub use desk::{Claim, Desk, OpenDesk, Ruling};
pub use error::ExchangeError;
pub use fetch::{Arrival, Asking, Fetch};
pub use watch::{HaveNews, Watch};

/// What this node can give to others. Every method may block on disk; none is called on an async thread.
///
/// Only bytes that were verified may be given: the asker checks them again and bans this node if they are wrong.
pub trait Content: Send + Sync + 'static {
    /// Which chunks of `layer` are here, counted by the chunk table `table`; `None` when the layer is not known by it.
    fn have(&self, layer: DiffId, table: ArtifactId) -> Option<Runs>;

    /// The plain bytes of a chunk, or `None` if it is not here (any more).
    ///
    /// # Errors
    /// When the disk fails; the asker is told that the chunk is not here.
    fn chunk(&self, layer: DiffId, table: ArtifactId, chunk: ChunkNo) -> std::io::Result<Option<Bytes>>;

    /// The whole of an index artifact, or `None` if it is not here. It is sent in pieces, so let it share memory (a map,
    /// a reference count) where it is large.
    ///
    /// # Errors
    /// When the disk fails; the asker is told that the artifact is not here.
    fn artifact(&self, id: ArtifactId) -> std::io::Result<Option<Bytes>>;

    /// The signed statement of an image, at most 1 MiB, or `None` if it is not here.
    fn statement(&self, manifest: Digest) -> Option<Bytes>;

    /// What starts of an image read, at most 64 KiB, or `None` if nobody here knows. Whoever records no starts has none.
    fn profile(&self, _manifest: Digest) -> Option<Bytes> {
        None
    }
}
