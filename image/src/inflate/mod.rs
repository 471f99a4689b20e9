//! Decompression with restart points.
//!
//! A layer blob is gzip, zstd or an uncompressed tar, told apart by its first bytes as containerd does it. A
//! [`Decoder`] turns compressed bytes into the tar stream and stops at every *restart point*: a place at which another
//! decoder can begin.
//!
//! | compression | restart points | what a decoder needs there |
//! |---|---|---|
//! | gzip | start of a member | nothing |
//! | gzip | end of a deflate block that is not the member's last | up to 7 bits, and the 32 KiB of output before |
//! | zstd | start of a frame | nothing |
//! | plain | every byte | nothing |
//!
//! Of the 32 KiB, a span refers to a few only; [`window`] finds and packs those.
//!
//! Decoders hold no input and no output: both are the caller's slices. Memory is fixed: about 48 KiB for gzip, at most
//! 128 MiB (the window of a frame) for zstd. Dropping a decoder at any point leaves nothing behind.

mod gzip;
mod raw;
pub mod window;
mod zstd;

use thiserror::Error;

use self::gzip::GzipDecoder;
use self::raw::RawError;
use self::zstd::ZstdDecoder;

#[cfg(test)]
pub(crate) use self::raw::gzip;

/// How many first bytes [`Compression::detect`] looks at.
pub const DETECT_LEN_BYTES: usize = 4;

/// How a layer blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all: the blob is the tar stream.
    Plain,
    /// gzip, one member or several.
    Gzip,
    /// zstd, one frame or several, skippable ones among them.
    Zstd,
}

impl Compression {
    /// Tells by the first bytes of a blob ([`DETECT_LEN_BYTES`], or fewer if the blob is shorter). What is neither
    /// gzip nor zstd is taken for a plain tar.
    pub fn detect(prefix: &[u8]) -> Self {
        match *prefix {
            [0x1f, 0x8b, 8, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // Skippable frames have sixteen magic numbers (RFC 8878, section 3.1.2).
            [low, 0x2a, 0x4d, 0x18, ..] if low & 0xf0 == 0x50 => Self::Zstd,
            _ => Self::Plain,
        }
    }
}

/// Bytes that cannot be decompressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum InflateError {
    /// A gzip header was expected.
    #[error("{}", if *.after_member { "garbage after the end of a gzip member" } else { "not a gzip header" })]
    GzipHeader {
        /// Whether a whole member came before.
        after_member: bool,
    },
    /// A member's trailer does not fit its content.
    #[error("a gzip member has another CRC-32 or length than its trailer says")]
    GzipChecksum,
    /// Damaged deflate data.
    #[error("damaged deflate data")]
    Deflate,
    /// libzstd refused the data, for damage or for a window above the limit of 128 MiB.
    #[error("zstd refused the data: {reason}")]
    Zstd {
        /// libzstd's own words.
        reason: &'static str,
    },
    /// The compressed data ends in the middle of a member or frame.
    #[error("the compressed data ends too early")]
    Truncated,
    /// No memory for the decoder's state.
    #[error("out of memory for a decompressor")]
    Memory,
}

impl From<RawError> for InflateError {
    fn from(error: RawError) -> Self {
        match error {
            RawError::Data => Self::Deflate,
            RawError::Memory => Self::Memory,
        }
    }
}

/// A place at which a decoder can begin, as seen by the decoder that passed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Boundary {
    /// Nothing from before is needed: a gzip member or a zstd frame starts here.
    Start,
    /// A deflate block starts here.
    Block {
        /// How many bits of the byte before belong to the block, 0 to 7.
        bits: u8,
        /// Those bits, in the low end.
        value: u8,
    },
}

/// How a decoder begins: the same two ways.
pub type Resume = Boundary;

/// What one call of [`Decoder::step`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Bytes taken from the input.
    pub consumed: usize,
    /// Bytes written to the output.
    pub produced: usize,
    /// The restart point at which the decoder now stands, if it does.
    pub boundary: Option<Boundary>,
}

impl Step {
    /// Whether the decoder can go no further without more input or more room.
    pub fn is_stuck(&self) -> bool {
        self.consumed == 0 && self.produced == 0 && self.boundary.is_none()
    }
}

/// A streaming decompressor of any of the three kinds.
pub struct Decoder(Kind);

enum Kind {
    Plain,
    Gzip(GzipDecoder),
    Zstd(ZstdDecoder),
}

impl Decoder {
    /// A decoder at the start of a blob.
    ///
    /// # Errors
    /// When memory is short.
    pub fn new(compression: Compression) -> Result<Self, InflateError> {
        Self::resume(compression, Resume::Start, &[])
    }

    /// A decoder at a restart point. `window` is the output just before it, at most 32 KiB, and empty unless the point
    /// is a deflate block's.
    ///
    /// # Errors
    /// When memory is short, or the restart point is not one of this kind of compression.
    pub fn resume(compression: Compression, resume: Resume, window: &[u8]) -> Result<Self, InflateError> {
        let kind = match (compression, resume) {
            (Compression::Gzip, _) => Kind::Gzip(GzipDecoder::new(resume, window)?),
            (Compression::Zstd, Resume::Start) => Kind::Zstd(ZstdDecoder::new()?),
            (Compression::Plain, Resume::Start) => Kind::Plain,
            (Compression::Plain | Compression::Zstd, Resume::Block { .. }) => return Err(InflateError::Deflate),
        };
        Ok(Self(kind))
    }

    /// Decodes from `input` to `output` until one of them is used up or a restart point is reached. Call it again with
    /// what is left until [`Step::is_stuck`]; a step may consume without producing and the other way round.
    ///
    /// # Errors
    /// When the input is damaged. The decoder is of no use afterwards.
    pub fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, InflateError> {
        match &mut self.0 {
            Kind::Plain => {
                let len = input.len().min(output.len());
                output[..len].copy_from_slice(&input[..len]);
                Ok(Step { consumed: len, produced: len, boundary: None })
            }
            Kind::Gzip(decoder) => decoder.step(input, output),
            Kind::Zstd(decoder) => decoder.step(input, output),
        }
    }

    /// How many bytes after those consumed may have been needed for the output so far. Whoever wants to get the same
    /// output from a cut blob has to keep them.
    pub fn held_back(&self) -> usize {
        match &self.0 {
            Kind::Plain | Kind::Gzip(_) => 0,
            Kind::Zstd(decoder) => decoder.held_back(),
        }
    }

    /// To be asked when there is no more input and [`Self::step`] is stuck: whether that is a proper end.
    ///
    /// # Errors
    /// When the input ended in the middle of something.
    pub fn finish(&self) -> Result<(), InflateError> {
        let complete = match &self.0 {
            Kind::Plain => true,
            Kind::Gzip(decoder) => decoder.is_complete(),
            Kind::Zstd(decoder) => decoder.is_complete(),
        };
        if complete { Ok(()) } else { Err(InflateError::Truncated) }
    }
}

#[cfg(test)]
mod tests;
