//! gzip (RFC 1952): members, their headers and trailers, and restart points at deflate block boundaries.
//!
//! As strict as Go's `compress/gzip`, which is what containerd judges layers by: header checksums are checked, names
//! and comments are bounded, every member's CRC and length must be right, and nothing but another member may follow a
//! member. Reserved flag bits are ignored, as there.

use super::raw::{RawInflate, RawState, crc32};
use super::{Boundary, InflateError, Resume, Step};

/// Longest name or comment in a header, in bytes with its NUL: the buffer that Go's reader has for it.
const TEXT_LEN_MAX: u16 = 512;

const FLAG_HEADER_CRC: u8 = 1 << 1;
const FLAG_EXTRA: u8 = 1 << 2;
const FLAG_NAME: u8 = 1 << 3;
const FLAG_COMMENT: u8 = 1 << 4;

/// The part of a header that the next byte belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeaderPart {
    Fixed,
    ExtraLen,
    Extra,
    Name,
    Comment,
    Crc,
    Done,
}

/// A header, read byte by byte: headers are short, so nothing is gained by more.
#[derive(Debug)]
struct Header {
    part: HeaderPart,
    /// Bytes of the current part so far.
    at: u16,
    flags: u8,
    /// Little-endian number under construction: length of the extra field, or checksum.
    number: u16,
    crc: u32,
}

impl Header {
    const fn new() -> Self {
        Self { part: HeaderPart::Fixed, at: 0, flags: 0, number: 0, crc: 0 }
    }

    /// Whether not one byte has come.
    fn is_untouched(&self) -> bool {
        self.part == HeaderPart::Fixed && self.at == 0
    }

    /// Takes one byte; `false` when it cannot be part of a header.
    fn take(&mut self, byte: u8) -> bool {
        if self.part != HeaderPart::Crc {
            self.crc = crc32(self.crc, &[byte]);
        }
        let at = self.at;
        self.at += 1;
        match self.part {
            HeaderPart::Fixed => {
                match at {
                    0 if byte != 0x1f => return false,
                    1 if byte != 0x8b => return false,
                    2 if byte != 8 => return false,
                    3 => self.flags = byte,
                    9 => self.enter(HeaderPart::ExtraLen),
                    _ => {}
                }
                true
            }
            HeaderPart::ExtraLen => {
                self.number |= u16::from(byte) << (8 * at);
                if at == 1 {
                    self.enter(if self.number == 0 { HeaderPart::Name } else { HeaderPart::Extra });
                }
                true
            }
            HeaderPart::Extra => {
                if self.at == self.number {
                    self.enter(HeaderPart::Name);
                }
                true
            }
            HeaderPart::Name | HeaderPart::Comment => {
                if byte == 0 {
                    let next = if self.part == HeaderPart::Name { HeaderPart::Comment } else { HeaderPart::Crc };
                    self.enter(next);
                    return true;
                }
                self.at < TEXT_LEN_MAX
            }
            HeaderPart::Crc => {
                self.number |= u16::from(byte) << (8 * at);
                if at == 0 {
                    return true;
                }
                self.part = HeaderPart::Done;
                self.number == self.crc as u16
            }
            HeaderPart::Done => false,
        }
    }

    /// Goes to `part`, or to the first one after it that this header has.
    fn enter(&mut self, part: HeaderPart) {
        self.at = 0;
        let has = |flag: u8| self.flags & flag != 0;
        self.part = match part {
            HeaderPart::ExtraLen if has(FLAG_EXTRA) => HeaderPart::ExtraLen,
            HeaderPart::Extra => HeaderPart::Extra,
            HeaderPart::ExtraLen | HeaderPart::Name if has(FLAG_NAME) => HeaderPart::Name,
            HeaderPart::ExtraLen | HeaderPart::Name | HeaderPart::Comment if has(FLAG_COMMENT) => HeaderPart::Comment,
            _ if has(FLAG_HEADER_CRC) => {
                self.number = 0;
                HeaderPart::Crc
            }
            _ => HeaderPart::Done,
        };
    }
}

/// Length and CRC of a member's output so far.
#[derive(Debug, Clone, Copy, Default)]
struct Check {
    crc: u32,
    len: u32,
}

enum State {
    Header(Header),
    Body,
    Trailer { at: usize, bytes: [u8; 8] },
}

/// A gzip decoder that stops at every restart point.
pub(super) struct GzipDecoder {
    inflate: RawInflate,
    state: State,
    /// `None` for a member that was entered in its middle: its checksum cannot be known.
    check: Option<Check>,
    /// The last byte that deflate consumed: a block may begin inside it.
    last_byte: u8,
    /// Whether a member has ended, which makes wrong bytes trailing garbage rather than no gzip at all.
    after_member: bool,
}

impl GzipDecoder {
    /// A decoder at a restart point; `window` is the output before it (or zeros for what the span does not refer to).
    pub(super) fn new(resume: Resume, window: &[u8]) -> Result<Self, InflateError> {
        let mut inflate = RawInflate::new()?;
        let (state, check) = match resume {
            Resume::Start => (State::Header(Header::new()), Some(Check::default())),
            Resume::Block { bits, value } => {
                inflate.resume(bits, value, window)?;
                (State::Body, None)
            }
        };
        Ok(Self { inflate, state, check, last_byte: 0, after_member: false })
    }

    /// See [`super::Decoder::step`].
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, InflateError> {
        match &mut self.state {
            State::Header(header) => {
                let mut consumed = 0;
                for byte in input {
                    if !header.take(*byte) {
                        return Err(InflateError::GzipHeader { after_member: self.after_member });
                    }
                    consumed += 1;
                    if header.part == HeaderPart::Done {
                        self.state = State::Body;
                        break;
                    }
                }
                Ok(Step { consumed, produced: 0, boundary: None })
            }
            State::Body => self.body(input, output),
            State::Trailer { at, bytes } => {
                let consumed = input.len().min(8 - *at);
                bytes[*at..*at + consumed].copy_from_slice(&input[..consumed]);
                *at += consumed;
                if *at < 8 {
                    return Ok(Step { consumed, produced: 0, boundary: None });
                }
                let [c0, c1, c2, c3, l0, l1, l2, l3] = *bytes;
                let told =
                    Check { crc: u32::from_le_bytes([c0, c1, c2, c3]), len: u32::from_le_bytes([l0, l1, l2, l3]) };
                if self.check.is_some_and(|made| made.crc != told.crc || made.len != told.len) {
                    return Err(InflateError::GzipChecksum);
                }
                self.inflate.reset();
                self.state = State::Header(Header::new());
                self.check = Some(Check::default());
                self.after_member = true;
                Ok(Step { consumed, produced: 0, boundary: Some(Boundary::Start) })
            }
        }
    }

    fn body(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, InflateError> {
        let step = self.inflate.run(input, output)?;
        if step.consumed > 0 {
            self.last_byte = input[step.consumed - 1];
        }
        if let Some(check) = &mut self.check {
            check.crc = crc32(check.crc, &output[..step.produced]);
            // The length in a trailer counts modulo 2^32.
            check.len = check.len.wrapping_add(step.produced as u32);
        }
        let boundary = match step.state {
            RawState::InBlock => None,
            RawState::BlockEnd { unused_bits: 0 } => Some(Boundary::Block { bits: 0, value: 0 }),
            RawState::BlockEnd { unused_bits } => {
                Some(Boundary::Block { bits: unused_bits, value: self.last_byte >> (8 - unused_bits) })
            }
            RawState::StreamEnd => {
                self.state = State::Trailer { at: 0, bytes: [0; 8] };
                if step.consumed == 0 && step.produced == 0 {
                    // The end was noticed only now; a step without any progress would say that more input is wanted.
                    return self.step(input, output);
                }
                None
            }
        };
        Ok(Step { consumed: step.consumed, produced: step.produced, boundary })
    }

    /// Whether the input may end here: a member is complete and no other has begun.
    pub(super) fn is_complete(&self) -> bool {
        self.after_member && matches!(&self.state, State::Header(header) if header.is_untouched())
    }
}
