//! Frames and messages of the exchange protocol, byte for byte as `docs/protocol.md` has them.
//!
//! A frame is a length (4 bytes, little endian, of what follows), one byte of message type, and the body. Nothing here
//! does I/O. Decoding checks every limit before it allocates, insists on every byte of a message and no more, and never
//! panics, whatever the bytes.

mod answer;
mod name;
mod request;

use std::ops::Range;

use hermes_image::index::chunks::{CHUNK_COUNT_MAX, CHUNK_LEN_MAX_BYTES};
use hermes_image::runs::{DecodeRunsError, Runs};
pub use hermes_policy::event::Want;
pub use hermes_policy::members::Duty;
use thiserror::Error;

pub use answer::Answer;
pub(crate) use answer::data_frame;
pub use name::{NAME_ADDRESS_LEN_MAX_BYTES, NAME_ADDRESSES_MAX, NAME_PEER_LEN_MAX_BYTES, PeerName};
pub use request::Request;

/// The version of the protocol that this build speaks.
pub const VERSION: u16 = 1;
/// First bytes of the first frame, so that anything else that comes over a stream is noticed at once.
pub const MAGIC: [u8; 4] = *b"HXCH";
/// Bytes of the length that starts a frame.
pub const LENGTH_LEN_BYTES: usize = 4;
/// Longest frame that answers, in bytes without its length: a chunk of 128 KiB, or a have-map, and their heads.
pub const ANSWER_LEN_MAX_BYTES: usize = CHUNK_LEN_MAX_BYTES as usize + 1024;
/// Longest frame that asks, in bytes without its length: 1,024 runs of eight bytes, and their head.
pub const REQUEST_LEN_MAX_BYTES: usize = 16 * 1024;
/// Most chunks asked for in one request: 64 MiB of the usual size. More takes more requests, so that the limits of the
/// other end can change its mind.
pub const GET_CHUNKS_MAX: u32 = 1024;
/// Most runs in a have-map. At eight bytes each, the longest map just fits a frame; a map that would need more says
/// less than is there, and says that it does.
pub const MAP_RUNS_MAX: usize = 16 * 1024;
/// Longest piece of an artifact or statement, in bytes.
pub const PIECE_LEN_MAX_BYTES: usize = 128 * 1024;
/// Longest signed statement, in bytes.
pub const STATEMENT_LEN_MAX_BYTES: u64 = 1 << 20;
/// Longest grant, in bytes: a few dozen digests under one signature.
pub const GRANT_LEN_MAX_BYTES: usize = 1024;
/// Most peers in one REFER. Ranks 0 to 3 of an extent stand in for each other, and nobody asks more than that.
pub const REFER_PEERS_MAX: usize = 4;
/// Bytes of a data frame before the chunk's own: length, type, chunk number and encoding.
pub const DATA_HEAD_LEN_BYTES: usize = LENGTH_LEN_BYTES + 1 + 4 + 1;

/// Bytes that are no message.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CodecError {
    /// A type that this version does not know, or that the other side must not send.
    #[error("message type 0x{0:02x} is not expected here")]
    UnknownType(u8),
    /// A frame with a length that no message has.
    #[error("a frame of {len_bytes} bytes, where at most {limit_bytes} and at least 1 are allowed")]
    FrameLength {
        /// By its head.
        len_bytes: u64,
        /// The longest allowed.
        limit_bytes: usize,
    },
    /// The body ends too early, goes on too long, or has a value out of its bounds.
    #[error("{message} message with a malformed {field}")]
    Malformed {
        /// Which message.
        message: &'static str,
        /// Which part of it.
        field: &'static str,
    },
    /// A set of chunks that is no set, or too large.
    #[error("{message} message with a bad set of chunks")]
    Runs {
        /// Which message.
        message: &'static str,
        /// What is wrong with it.
        #[source]
        source: DecodeRunsError,
    },
    /// A version that this build does not speak.
    #[error("protocol version {0} is not known; version {VERSION} is")]
    Version(u16),
}

/// How urgent a transfer is. Demand goes before prefetch at both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Somebody waits for it.
    Demand,
    /// Somebody may want it.
    Prefetch,
}

impl Class {
    /// The metric label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Prefetch => "prefetch",
        }
    }
}

/// First of the codes of [`Want::Owner`]; the bits of its three parts are added.
const WANT_OWNER: u8 = 1;

/// How `want` is written.
fn want_code(want: Want) -> u8 {
    match want {
        Want::Here => 0,
        Want::Owner { duty, again, can_read } => {
            WANT_OWNER + u8::from(duty == Duty::Cluster) + 2 * u8::from(again) + 4 * u8::from(can_read)
        }
    }
}

/// What was written as `code`.
fn want_of(code: u8) -> Option<Want> {
    let Some(bits) = code.checked_sub(WANT_OWNER) else { return Some(Want::Here) };
    let duty = if bits & 1 == 0 { Duty::Zone } else { Duty::Cluster };
    (bits < 8).then_some(Want::Owner { duty, again: bits & 2 != 0, can_read: bits & 4 != 0 })
}

/// Whether `extent` may go with `want`: an owner is asked for chunks of an extent that has some. Where no owner is
/// meant, there may be no extent, and then it is written as 0..0.
pub(crate) fn extent_fits(want: Want, extent: &Range<u32>, chunks: &Runs) -> bool {
    if extent.end > CHUNK_COUNT_MAX {
        return false;
    }
    match want {
        Want::Here => extent.start < extent.end || *extent == (0..0),
        Want::Owner { .. } => extent.start < extent.end && chunks.within(extent.clone()) == *chunks,
    }
}

/// How the bytes of a chunk travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// As they are.
    Plain,
    /// One zstd frame. The chunk table bounds what comes out of it.
    Zstd,
}

/// Which encodings the asker takes beside plain bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Accept {
    /// None.
    Plain,
    /// zstd.
    Zstd,
}

/// Why one side ends a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A message type that it does not know.
    UnknownType,
    /// A frame longer than allowed.
    FrameLength,
    /// A message that it cannot read.
    Malformed,
    /// A message at the wrong time.
    OutOfOrder,
    /// A version that it does not speak.
    Version,
    /// Requests that keep coming after BUSY.
    Flood,
    /// A fault of its own.
    Internal,
}

impl Reason {
    const ALL: [Self; 7] = [
        Self::UnknownType,
        Self::FrameLength,
        Self::Malformed,
        Self::OutOfOrder,
        Self::Version,
        Self::Flood,
        Self::Internal,
    ];

    fn code(self) -> u8 {
        match self {
            Self::UnknownType => 1,
            Self::FrameLength => 2,
            Self::Malformed => 3,
            Self::OutOfOrder => 4,
            Self::Version => 5,
            Self::Flood => 6,
            Self::Internal => 7,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.code() == code)
    }

    /// In words, for logs and errors.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UnknownType => "unknown message type",
            Self::FrameLength => "frame too long",
            Self::Malformed => "malformed message",
            Self::OutOfOrder => "message at the wrong time",
            Self::Version => "unknown version",
            Self::Flood => "too many requests",
            Self::Internal => "internal fault",
        }
    }

    /// The reason to give for `error`.
    pub fn of(error: &CodecError) -> Self {
        match error {
            CodecError::UnknownType(_) => Self::UnknownType,
            CodecError::FrameLength { .. } => Self::FrameLength,
            CodecError::Malformed { .. } | CodecError::Runs { .. } => Self::Malformed,
            CodecError::Version(_) => Self::Version,
        }
    }
}

/// Appends one frame, whose body `body` writes.
fn frame(out: &mut Vec<u8>, kind: u8, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; LENGTH_LEN_BYTES]);
    out.push(kind);
    body(out);
    // Every message is far shorter than 4 GiB; see the limits above.
    let len = (out.len() - start - LENGTH_LEN_BYTES) as u32;
    out[start..start + LENGTH_LEN_BYTES].copy_from_slice(&len.to_le_bytes());
}

/// The length in the head of a frame, if it is within `limit_bytes`.
///
/// # Errors
/// When it is zero or above the limit.
pub fn frame_len(head: [u8; LENGTH_LEN_BYTES], limit_bytes: usize) -> Result<usize, CodecError> {
    let len = u32::from_le_bytes(head);
    match usize::try_from(len) {
        Ok(len) if (1..=limit_bytes).contains(&len) => Ok(len),
        _ => Err(CodecError::FrameLength { len_bytes: u64::from(len), limit_bytes }),
    }
}

/// Reads the parts of one message in order and insists on all of them and no more.
struct Parts<'a> {
    message: &'static str,
    bytes: &'a [u8],
}

impl<'a> Parts<'a> {
    fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], CodecError> {
        let malformed = CodecError::Malformed { message: self.message, field };
        let (part, rest) = self.bytes.split_first_chunk::<N>().ok_or(malformed)?;
        self.bytes = rest;
        Ok(*part)
    }

    fn byte(&mut self, field: &'static str) -> Result<u8, CodecError> {
        self.take::<1>(field).map(|[byte]| byte)
    }

    /// What stands behind one byte of length; at least one byte, at most `limit_bytes`.
    fn prefixed(&mut self, field: &'static str, limit_bytes: usize) -> Result<&'a [u8], CodecError> {
        let len = usize::from(self.byte(field)?);
        let valid = (1..=limit_bytes).contains(&len);
        let Some((part, rest)) = self.bytes.split_at_checked(len).filter(|_| valid) else {
            return self.malformed(field);
        };
        self.bytes = rest;
        Ok(part)
    }

    fn runs(&mut self, chunk_limit: u32, run_limit: usize) -> Result<Runs, CodecError> {
        let message = self.message;
        Runs::decode(&mut self.bytes, chunk_limit, run_limit).map_err(|source| CodecError::Runs { message, source })
    }

    fn malformed<T>(&self, field: &'static str) -> Result<T, CodecError> {
        Err(CodecError::Malformed { message: self.message, field })
    }

    fn end<T>(self, value: T) -> Result<T, CodecError> {
        if self.bytes.is_empty() { Ok(value) } else { self.malformed("end") }
    }
}

#[cfg(test)]
mod tests;
