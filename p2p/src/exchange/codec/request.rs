//! What is asked.

use std::ops::Range;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, DiffId, Digest};
use hermes_image::index::chunks::CHUNK_COUNT_MAX;
use hermes_image::runs::Runs;

use super::{
    Accept, Class, CodecError, GET_CHUNKS_MAX, GRANT_LEN_MAX_BYTES, MAGIC, Parts, REQUEST_LEN_MAX_BYTES, Want,
    extent_fits, frame, want_code, want_of,
};

const REQUEST_HELLO: u8 = 0x01;
const REQUEST_HAVE: u8 = 0x02;
const REQUEST_GET: u8 = 0x03;
const REQUEST_ARTIFACT: u8 = 0x04;
const REQUEST_STATEMENT: u8 = 0x05;
const REQUEST_WATCH: u8 = 0x06;
const REQUEST_GRANT: u8 = 0x07;
const REQUEST_PROFILE: u8 = 0x08;

/// What the side that opened the stream says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The first message of a stream.
    Hello {
        /// The version to speak.
        version: u16,
    },
    /// Which chunks of a layer are there?
    Have {
        /// The layer.
        layer: DiffId,
        /// The chunk table that the answer is to be counted by.
        table: ArtifactId,
    },
    /// Send these chunks, or say what becomes of them.
    Get {
        /// The layer.
        layer: DiffId,
        /// The chunk table that chunks are counted by.
        table: ArtifactId,
        /// How urgent.
        class: Class,
        /// Which encodings are welcome.
        accept: Accept,
        /// What is expected of the other side.
        want: Want,
        /// The extent that the chunks belong to; 0..0 when none is meant, which only [`Want::Here`] allows.
        extent: Range<u32>,
        /// Which chunks; at least one, at most [`GET_CHUNKS_MAX`].
        chunks: Runs,
    },
    /// Send a part of an index artifact.
    Artifact {
        /// Which.
        id: ArtifactId,
        /// Where to begin, in bytes.
        offset: u64,
        /// How many bytes at most.
        len: u64,
    },
    /// Send the signed statement of an image.
    Statement {
        /// The image's manifest.
        manifest: Digest,
    },
    /// Send what starts of an image read.
    Profile {
        /// The image's manifest.
        manifest: Digest,
    },
    /// Send the have-map of a layer, and then what it grows by. The last request of its stream.
    Watch {
        /// The layer.
        layer: DiffId,
        /// The chunk table that the answer is to be counted by.
        table: ArtifactId,
    },
    /// Here is a grant: what is of a private image may be given to this asker.
    Grant {
        /// Its bytes, 1 to [`GRANT_LEN_MAX_BYTES`] of them; what they mean is not the exchange's business.
        grant: Bytes,
    },
}

impl Request {
    /// The name of the message, for logs and errors.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "HELLO",
            Self::Have { .. } => "HAVE",
            Self::Get { .. } => "GET",
            Self::Artifact { .. } => "ARTIFACT",
            Self::Statement { .. } => "STATEMENT",
            Self::Watch { .. } => "WATCH",
            Self::Grant { .. } => "GRANT",
            Self::Profile { .. } => "PROFILE",
        }
    }

    /// The layer that is asked about.
    pub const fn layer(&self) -> Option<DiffId> {
        match self {
            Self::Have { layer, .. } | Self::Get { layer, .. } | Self::Watch { layer, .. } => Some(*layer),
            Self::Hello { .. }
            | Self::Artifact { .. }
            | Self::Statement { .. }
            | Self::Grant { .. }
            | Self::Profile { .. } => None,
        }
    }

    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello { version } => frame(out, REQUEST_HELLO, |out| {
                out.extend_from_slice(&MAGIC);
                out.extend_from_slice(&version.to_le_bytes());
            }),
            Self::Have { layer, table } => frame(out, REQUEST_HAVE, |out| {
                out.extend_from_slice(&layer.0);
                out.extend_from_slice(&table.0);
            }),
            Self::Get { layer, table, class, accept, want, extent, chunks } => frame(out, REQUEST_GET, |out| {
                out.extend_from_slice(&layer.0);
                out.extend_from_slice(&table.0);
                out.push(match class {
                    Class::Demand => 0,
                    Class::Prefetch => 1,
                });
                out.push(match accept {
                    Accept::Plain => 0,
                    Accept::Zstd => 1,
                });
                out.push(want_code(*want));
                out.extend_from_slice(&extent.start.to_le_bytes());
                out.extend_from_slice(&extent.end.to_le_bytes());
                chunks.encode(out);
            }),
            Self::Artifact { id, offset, len } => frame(out, REQUEST_ARTIFACT, |out| {
                out.extend_from_slice(&id.0);
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(&len.to_le_bytes());
            }),
            Self::Statement { manifest } => {
                frame(out, REQUEST_STATEMENT, |out| out.extend_from_slice(&manifest.0));
            }
            Self::Profile { manifest } => frame(out, REQUEST_PROFILE, |out| out.extend_from_slice(&manifest.0)),
            Self::Watch { layer, table } => frame(out, REQUEST_WATCH, |out| {
                out.extend_from_slice(&layer.0);
                out.extend_from_slice(&table.0);
            }),
            Self::Grant { grant } => frame(out, REQUEST_GRANT, |out| out.extend_from_slice(grant)),
        }
    }

    /// Reads a frame without its length.
    ///
    /// # Errors
    /// When the bytes are no request of this version.
    pub fn decode(frame: &[u8]) -> Result<Self, CodecError> {
        let too_short = CodecError::FrameLength { len_bytes: 0, limit_bytes: REQUEST_LEN_MAX_BYTES };
        let (kind, bytes) = frame.split_first().ok_or(too_short)?;
        match *kind {
            REQUEST_HELLO => {
                let mut parts = Parts { message: "HELLO", bytes };
                if parts.take::<4>("magic")? != MAGIC {
                    return parts.malformed("magic");
                }
                let version = u16::from_le_bytes(parts.take("version")?);
                // What a later version says beyond this is for a later version to read.
                Ok(Self::Hello { version })
            }
            REQUEST_HAVE => {
                let mut parts = Parts { message: "HAVE", bytes };
                let (layer, table) = (DiffId(parts.take("layer")?), ArtifactId(parts.take("table")?));
                parts.end(Self::Have { layer, table })
            }
            REQUEST_GET => Self::decode_get(Parts { message: "GET", bytes }),
            REQUEST_ARTIFACT => {
                let mut parts = Parts { message: "ARTIFACT", bytes };
                let id = ArtifactId(parts.take("id")?);
                let offset = u64::from_le_bytes(parts.take("offset")?);
                let len = u64::from_le_bytes(parts.take("length")?);
                parts.end(Self::Artifact { id, offset, len })
            }
            REQUEST_STATEMENT => {
                let mut parts = Parts { message: "STATEMENT", bytes };
                let manifest = Digest(parts.take("manifest")?);
                parts.end(Self::Statement { manifest })
            }
            REQUEST_PROFILE => {
                let mut parts = Parts { message: "PROFILE", bytes };
                let manifest = Digest(parts.take("manifest")?);
                parts.end(Self::Profile { manifest })
            }
            REQUEST_WATCH => {
                let mut parts = Parts { message: "WATCH", bytes };
                let (layer, table) = (DiffId(parts.take("layer")?), ArtifactId(parts.take("table")?));
                parts.end(Self::Watch { layer, table })
            }
            REQUEST_GRANT => {
                if !(1..=GRANT_LEN_MAX_BYTES).contains(&bytes.len()) {
                    return Parts { message: "GRANT", bytes }.malformed("length");
                }
                Ok(Self::Grant { grant: Bytes::copy_from_slice(bytes) })
            }
            other => Err(CodecError::UnknownType(other)),
        }
    }

    fn decode_get(mut parts: Parts<'_>) -> Result<Self, CodecError> {
        let (layer, table) = (DiffId(parts.take("layer")?), ArtifactId(parts.take("table")?));
        let class = match parts.byte("class")? {
            0 => Class::Demand,
            1 => Class::Prefetch,
            _ => return parts.malformed("class"),
        };
        let accept = match parts.byte("encodings")? {
            0 => Accept::Plain,
            1 => Accept::Zstd,
            _ => return parts.malformed("encodings"),
        };
        let Some(want) = want_of(parts.byte("want")?) else { return parts.malformed("want") };
        let extent = u32::from_le_bytes(parts.take("extent")?)..u32::from_le_bytes(parts.take("extent")?);
        let chunks = parts.runs(CHUNK_COUNT_MAX, GET_CHUNKS_MAX as usize)?;
        if !(1..=u64::from(GET_CHUNKS_MAX)).contains(&chunks.chunk_count()) {
            return parts.malformed("number of chunks");
        }
        if !extent_fits(want, &extent, &chunks) {
            return parts.malformed("extent");
        }
        parts.end(Self::Get { layer, table, class, accept, want, extent, chunks })
    }
}
