//! What is answered.

use bytes::Bytes;
use hermes_image::ids::ChunkNo;
use hermes_image::index::chunks::CHUNK_LEN_MAX_BYTES;
use hermes_image::runs::Runs;

use super::{
    ANSWER_LEN_MAX_BYTES, CodecError, DATA_HEAD_LEN_BYTES, Encoding, GET_CHUNKS_MAX, LENGTH_LEN_BYTES, MAP_RUNS_MAX,
    PIECE_LEN_MAX_BYTES, Parts, PeerName, REFER_PEERS_MAX, Reason, frame,
};

const ANSWER_HELLO: u8 = 0x81;
const ANSWER_HAVE_MAP: u8 = 0x82;
const ANSWER_HAVE_MORE: u8 = 0x83;
const ANSWER_DATA: u8 = 0x84;
const ANSWER_LACKS: u8 = 0x85;
const ANSWER_BLOB: u8 = 0x86;
const ANSWER_PIECE: u8 = 0x87;
const ANSWER_END: u8 = 0x88;
const ANSWER_NOT_FOUND: u8 = 0x89;
const ANSWER_BUSY: u8 = 0x8a;
const ANSWER_DENIED: u8 = 0x8b;
const ANSWER_PENDING: u8 = 0x8c;
const ANSWER_REFER: u8 = 0x8d;
const ANSWER_DELEGATE: u8 = 0x8e;
const ANSWER_ERROR: u8 = 0x8f;
const ANSWER_NOT_MINE: u8 = 0x90;

/// What the side that accepted the stream says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The answer to [`Request::Hello`].
    Hello {
        /// The version that will be spoken.
        version: u16,
    },
    /// Which chunks are there.
    HaveMap {
        /// Whether more are there than could be said.
        cut_short: bool,
        /// The chunks.
        chunks: Runs,
    },
    /// Which chunks have come since the last map or news.
    HaveMore {
        /// The chunks.
        chunks: Runs,
    },
    /// A chunk.
    Data {
        /// Which.
        chunk: ChunkNo,
        /// How its bytes travel.
        encoding: Encoding,
        /// Its bytes, so encoded.
        body: Bytes,
    },
    /// Chunks that were asked for and are not here.
    Lacks {
        /// Which.
        chunks: Runs,
    },
    /// What was asked for follows in pieces.
    Blob {
        /// Length of the whole in bytes, wherever the asked part begins.
        total_len_bytes: u64,
    },
    /// The next piece.
    Piece {
        /// Its bytes, at least one.
        body: Bytes,
    },
    /// That was all.
    End,
    /// It is not here.
    NotFound,
    /// Not now: the limits of this node are reached.
    Busy {
        /// When to ask again, in milliseconds from now.
        retry_after_ms: u32,
    },
    /// Not for this peer.
    Denied,
    /// Nothing yet, but it is being seen to.
    Pending {
        /// When the next chunk may come, in milliseconds from now; 0 when that is not known.
        eta_ms: u32,
        /// How long the registry lets this node wait, in milliseconds from now; 0 when it does not.
        registry_rests_ms: u32,
    },
    /// These peers have the chunks, or get them.
    Refer {
        /// The chunks; some of those that were asked for.
        chunks: Runs,
        /// Whom to ask for them; at least one, at most [`REFER_PEERS_MAX`].
        peers: Vec<PeerName>,
    },
    /// The asker is to read these chunks from the source, and others are sent to it.
    Delegate {
        /// The chunks; some of those that were asked for, and perhaps others of their extent.
        chunks: Runs,
    },
    /// By this node's member list it does not own the extent.
    NotMine {
        /// The epoch of that list.
        epoch: u64,
    },
    /// The stream ends because of this.
    Error {
        /// Why.
        reason: Reason,
    },
}

/// Appends a data frame.
pub(crate) fn data_frame(out: &mut Vec<u8>, chunk: ChunkNo, encoding: Encoding, body: &[u8]) {
    frame(out, ANSWER_DATA, |out| {
        out.extend_from_slice(&chunk.0.to_le_bytes());
        out.push(match encoding {
            Encoding::Plain => 0,
            Encoding::Zstd => 1,
        });
        out.extend_from_slice(body);
    });
}

impl Answer {
    /// The name of the message, for logs and errors.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "HELLO",
            Self::HaveMap { .. } => "HAVE_MAP",
            Self::HaveMore { .. } => "HAVE_MORE",
            Self::Data { .. } => "DATA",
            Self::Lacks { .. } => "LACKS",
            Self::Blob { .. } => "BLOB",
            Self::Piece { .. } => "PIECE",
            Self::End => "END",
            Self::NotFound => "NOT_FOUND",
            Self::Busy { .. } => "BUSY",
            Self::Denied => "DENIED",
            Self::Pending { .. } => "PENDING",
            Self::Refer { .. } => "REFER",
            Self::Delegate { .. } => "DELEGATE",
            Self::NotMine { .. } => "NOT_MINE",
            Self::Error { .. } => "ERROR",
        }
    }

    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello { version } => frame(out, ANSWER_HELLO, |out| out.extend_from_slice(&version.to_le_bytes())),
            Self::HaveMap { cut_short, chunks } => frame(out, ANSWER_HAVE_MAP, |out| {
                out.push(u8::from(*cut_short));
                chunks.encode(out);
            }),
            Self::HaveMore { chunks } => frame(out, ANSWER_HAVE_MORE, |out| chunks.encode(out)),
            Self::Data { chunk, encoding, body } => data_frame(out, *chunk, *encoding, body),
            Self::Lacks { chunks } => frame(out, ANSWER_LACKS, |out| chunks.encode(out)),
            Self::Blob { total_len_bytes } => {
                frame(out, ANSWER_BLOB, |out| out.extend_from_slice(&total_len_bytes.to_le_bytes()));
            }
            Self::Piece { body } => frame(out, ANSWER_PIECE, |out| out.extend_from_slice(body)),
            Self::End => frame(out, ANSWER_END, |_| {}),
            Self::NotFound => frame(out, ANSWER_NOT_FOUND, |_| {}),
            Self::Busy { retry_after_ms } => {
                frame(out, ANSWER_BUSY, |out| out.extend_from_slice(&retry_after_ms.to_le_bytes()));
            }
            Self::Denied => frame(out, ANSWER_DENIED, |_| {}),
            Self::Pending { eta_ms, registry_rests_ms } => frame(out, ANSWER_PENDING, |out| {
                out.extend_from_slice(&eta_ms.to_le_bytes());
                out.extend_from_slice(&registry_rests_ms.to_le_bytes());
            }),
            Self::Refer { chunks, peers } => frame(out, ANSWER_REFER, |out| {
                chunks.encode(out);
                // At most `REFER_PEERS_MAX`.
                out.push(peers.len() as u8);
                peers.iter().for_each(|peer| peer.encode(out));
            }),
            Self::Delegate { chunks } => frame(out, ANSWER_DELEGATE, |out| chunks.encode(out)),
            Self::NotMine { epoch } => frame(out, ANSWER_NOT_MINE, |out| out.extend_from_slice(&epoch.to_le_bytes())),
            Self::Error { reason } => frame(out, ANSWER_ERROR, |out| out.push(reason.code())),
        }
    }

    /// Reads a frame without its length. `chunk_count` is the number of chunks of the layer in question.
    ///
    /// # Errors
    /// When the bytes are no answer of this version, or name a chunk that the layer does not have.
    pub fn decode(frame: &Bytes, chunk_count: u32) -> Result<Self, CodecError> {
        let too_short = CodecError::FrameLength { len_bytes: 0, limit_bytes: ANSWER_LEN_MAX_BYTES };
        let (kind, bytes) = frame.split_first().ok_or(too_short)?;
        let parts = |message| Parts { message, bytes };
        match *kind {
            ANSWER_HELLO => {
                let version = u16::from_le_bytes(parts("HELLO").take("version")?);
                Ok(Self::Hello { version })
            }
            ANSWER_HAVE_MAP => {
                let mut parts = parts("HAVE_MAP");
                let cut_short = match parts.byte("flags")? {
                    0 => false,
                    1 => true,
                    _ => return parts.malformed("flags"),
                };
                let chunks = parts.runs(chunk_count, MAP_RUNS_MAX)?;
                parts.end(Self::HaveMap { cut_short, chunks })
            }
            ANSWER_HAVE_MORE => {
                let mut parts = parts("HAVE_MORE");
                let chunks = parts.runs(chunk_count, MAP_RUNS_MAX)?;
                parts.end(Self::HaveMore { chunks })
            }
            ANSWER_DATA => Self::decode_data(frame, parts("DATA"), chunk_count),
            ANSWER_LACKS => {
                let mut parts = parts("LACKS");
                let chunks = Self::decode_some(&mut parts, chunk_count)?;
                parts.end(Self::Lacks { chunks })
            }
            ANSWER_BLOB => {
                let mut parts = parts("BLOB");
                let total_len_bytes = u64::from_le_bytes(parts.take("length")?);
                parts.end(Self::Blob { total_len_bytes })
            }
            ANSWER_PIECE => {
                let body = frame.slice(1..);
                if body.is_empty() || body.len() > PIECE_LEN_MAX_BYTES {
                    return parts("PIECE").malformed("length");
                }
                Ok(Self::Piece { body })
            }
            ANSWER_END => parts("END").end(Self::End),
            ANSWER_NOT_FOUND => parts("NOT_FOUND").end(Self::NotFound),
            ANSWER_BUSY => {
                let mut parts = parts("BUSY");
                let retry_after_ms = u32::from_le_bytes(parts.take("wait")?);
                parts.end(Self::Busy { retry_after_ms })
            }
            ANSWER_DENIED => parts("DENIED").end(Self::Denied),
            ANSWER_PENDING => {
                let mut parts = parts("PENDING");
                let eta_ms = u32::from_le_bytes(parts.take("wait")?);
                let registry_rests_ms = u32::from_le_bytes(parts.take("rest")?);
                parts.end(Self::Pending { eta_ms, registry_rests_ms })
            }
            ANSWER_REFER => {
                let mut parts = parts("REFER");
                let chunks = Self::decode_some(&mut parts, chunk_count)?;
                let count = usize::from(parts.byte("number of peers")?);
                if !(1..=REFER_PEERS_MAX).contains(&count) {
                    return parts.malformed("number of peers");
                }
                let peers = (0..count).map(|_| PeerName::decode(&mut parts)).collect::<Result<_, _>>()?;
                parts.end(Self::Refer { chunks, peers })
            }
            ANSWER_DELEGATE => {
                let mut parts = parts("DELEGATE");
                let chunks = Self::decode_some(&mut parts, chunk_count)?;
                parts.end(Self::Delegate { chunks })
            }
            ANSWER_NOT_MINE => {
                let mut parts = parts("NOT_MINE");
                let epoch = u64::from_le_bytes(parts.take("epoch")?);
                parts.end(Self::NotMine { epoch })
            }
            ANSWER_ERROR => {
                let mut parts = parts("ERROR");
                let Some(reason) = Reason::from_code(parts.byte("reason")?) else { return parts.malformed("reason") };
                parts.end(Self::Error { reason })
            }
            other => Err(CodecError::UnknownType(other)),
        }
    }

    /// A set that has chunks, in no more runs than a request can name.
    fn decode_some(parts: &mut Parts<'_>, chunk_count: u32) -> Result<Runs, CodecError> {
        let chunks = parts.runs(chunk_count, GET_CHUNKS_MAX as usize)?;
        if chunks.is_empty() { parts.malformed("number of chunks") } else { Ok(chunks) }
    }

    fn decode_data(frame: &Bytes, mut parts: Parts<'_>, chunk_count: u32) -> Result<Self, CodecError> {
        let chunk = ChunkNo(u32::from_le_bytes(parts.take("chunk")?));
        if chunk.0 >= chunk_count {
            return parts.malformed("chunk");
        }
        let encoding = match parts.byte("encoding")? {
            0 => Encoding::Plain,
            1 => Encoding::Zstd,
            _ => return parts.malformed("encoding"),
        };
        let body = frame.slice(DATA_HEAD_LEN_BYTES - LENGTH_LEN_BYTES..);
        if body.is_empty() || body.len() as u64 > CHUNK_LEN_MAX_BYTES {
            return parts.malformed("length");
        }
        Ok(Self::Data { chunk, encoding, body })
    }
}
