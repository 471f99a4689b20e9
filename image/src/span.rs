//! Spans to chunks: what a node does with bytes that it read from a registry.
//!
//! A [`SpanDecoder`] is pushed the compressed bytes of a span ([`SeekTable::span`] says which, and
//! [`SeekTable::blob_range`] for several adjacent spans in one go) in any portions, and hands out every chunk as soon as
//! its last byte is there and the chunk table has vouched for it, so a reader need not wait for the rest of the span.
//! Nothing that is not verified leaves it. After an error it gives nothing more; dropping it at any point leaves nothing
//! behind.
//!
//! The window of a gzip span is stored without saying where its bytes belong ([`crate::inflate::window`]), so the decoder
//! keeps the first compressed bytes, as a rule some 12 KB, until they have told.
//!
//! Adjacent spans are cheapest decoded by one decoder over the whole run: it needs the window of the first span only.
//! Spans of one request can as well be decoded in parallel, each from its part of the bytes.

use std::ops::Range;

use bytes::Bytes;
use thiserror::Error;

use crate::ids::{ChunkNo, ChunkRange, SpanNo};
use crate::index::chunks::ChunkTable;
use crate::index::seek::SeekTable;
use crate::inflate::window::{HEAD_LEN_MAX_BYTES, UseFinder, unpack};
use crate::inflate::{Compression, Decoder, InflateError, Resume};
use crate::verify::{Mismatch, Verified};

/// Output before the first chunk is decoded into a buffer of this length and forgotten, in bytes.
const SKIP_LEN_BYTES: usize = 32 * 1024;

/// A span that cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SpanError {
    /// The seek table and the chunk table are of different layers, or contradict each other.
    #[error("the seek table and the chunk table do not belong together")]
    Tables,
    /// The seek table has no such span, or the run of spans is empty.
    #[error("there is no span {0}")]
    NoSuchSpan(SpanNo),
    /// The packed windows of the first span are damaged.
    #[error("the window of span {span} cannot be used")]
    Window {
        /// The span.
        span: SpanNo,
        /// Why.
        #[source]
        source: InflateError,
    },
    /// The compressed bytes are damaged, or not those of the span.
    #[error("span {span} cannot be decompressed at chunk {chunk}; read it again, or from elsewhere")]
    Inflate {
        /// The span.
        span: SpanNo,
        /// The first chunk that could not be made.
        chunk: ChunkNo,
        /// Why.
        #[source]
        source: InflateError,
    },
    /// The bytes decompress to something else.
    #[error("span {span} gives wrong bytes for chunk {chunk}; read it again, or from elsewhere")]
    Wrong {
        /// The span.
        span: SpanNo,
        /// The chunk.
        chunk: ChunkNo,
        /// Why.
        #[source]
        source: Mismatch,
    },
    /// The compressed bytes ended before the last chunk was complete.
    #[error("span {span} ended before chunk {chunk} was complete; read it again, or from elsewhere")]
    Truncated {
        /// The span.
        span: SpanNo,
        /// The first chunk that is missing.
        chunk: ChunkNo,
    },
}

/// Which of the two things a decoder does.
enum Stage {
    /// It learns from the first compressed bytes where the kept bytes of the window belong.
    Placing(Box<Placing>),
    /// It decodes.
    Decoding(Decoder),
}

struct Placing {
    finder: UseFinder,
    kept: Vec<u8>,
    resume: Resume,
    /// The compressed bytes so far, which are to be decoded afterwards.
    head: Vec<u8>,
}

/// Decodes one span, or a run of adjacent spans, into verified chunks.
pub struct SpanDecoder {
    seek: SeekTable,
    chunks: ChunkTable,
    stage: Stage,
    /// Output before the first chunk that is still to come, in bytes.
    skip_len_bytes: u64,
    skipped: Vec<u8>,
    /// The chunks that are still to come.
    left: ChunkRange,
    /// The chunk in the making: its whole length, of which `filled` bytes are there.
    chunk: Vec<u8>,
    filled: usize,
    failed: Option<SpanError>,
}

impl SpanDecoder {
    /// A decoder for `span`; `window` is what [`SeekTable::window_range`] names of the windows, verified with
    /// [`SeekTable::verify_window`], and empty when that range is.
    ///
    /// # Errors
    /// When the tables do not belong together, there is no such span, the window is damaged, or memory is short.
    pub fn new(seek: &SeekTable, chunks: &ChunkTable, span: SpanNo, window: &[u8]) -> Result<Self, SpanError> {
        let end = span.0.checked_add(1).ok_or(SpanError::NoSuchSpan(span))?;
        Self::run(seek, chunks, span.0..end, window)
    }

    /// A decoder for a run of adjacent spans, from the bytes [`SeekTable::blob_range`]; `window` is that of the first.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn run(seek: &SeekTable, chunks: &ChunkTable, spans: Range<u32>, window: &[u8]) -> Result<Self, SpanError> {
        let header = seek.header();
        let same = header.diff_id == chunks.diff_id()
            && header.chunk_count == chunks.count()
            && header.logical_len_bytes == chunks.logical_len_bytes();
        if !same {
            return Err(SpanError::Tables);
        }
        if spans.is_empty() || spans.end > seek.count() {
            return Err(SpanError::NoSuchSpan(SpanNo(spans.end.saturating_sub(1).max(spans.start))));
        }
        let span = SpanNo(spans.start);
        let entry = seek.span(span);
        let left = entry.chunks.start..seek.span(SpanNo(spans.end - 1)).chunks.end;
        let chunk = ChunkNo(left.start);
        let stage = Stage::begin(seek, chunks, spans.clone(), window)?;
        let first = chunks.range(chunk);
        let skip_len_bytes = first.start.checked_sub(entry.logical_start.0).ok_or(SpanError::Tables)?;
        let skipped = vec![0; SKIP_LEN_BYTES.min(usize::try_from(skip_len_bytes).unwrap_or(SKIP_LEN_BYTES))];
        let chunk = vec![0; (first.end - first.start) as usize];
        let (seek, chunks) = (seek.clone(), chunks.clone());
        Ok(Self { seek, chunks, stage, skip_len_bytes, skipped, left, chunk, filled: 0, failed: None })
    }

    /// Takes the next compressed bytes, and appends the chunks that they complete. Bytes after the last chunk are
    /// ignored.
    ///
    /// # Errors
    /// When the bytes are damaged or not those of the span. Chunks appended before are right all the same. The same
    /// error comes from every later call.
    pub fn push(&mut self, compressed: &[u8], out: &mut Vec<(ChunkNo, Verified<Bytes>)>) -> Result<(), SpanError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let result = self.take(compressed, out);
        if let Err(error) = result {
            self.failed = Some(error);
        }
        result
    }

    /// Whether the last chunk was handed out. More bytes are not needed then.
    pub fn is_done(&self) -> bool {
        self.left.is_empty()
    }

    /// The bytes have ended.
    ///
    /// # Errors
    /// When chunks are missing, or a push had failed.
    pub fn finish(self) -> Result<(), SpanError> {
        match self.failed {
            Some(error) => Err(error),
            None if self.is_done() => Ok(()),
            None => Err(SpanError::Truncated { span: self.span(), chunk: ChunkNo(self.left.start) }),
        }
    }

    /// The span of the chunk in the making.
    fn span(&self) -> SpanNo {
        self.seek.span_of(ChunkNo(self.left.start))
    }

    fn take(&mut self, compressed: &[u8], out: &mut Vec<(ChunkNo, Verified<Bytes>)>) -> Result<(), SpanError> {
        match &mut self.stage {
            Stage::Decoding(_) => self.decode(compressed, out),
            Stage::Placing(placing) => match placing.push(compressed) {
                Ok(None) => Ok(()),
                Ok(Some((decoder, head))) => {
                    self.stage = Stage::Decoding(decoder);
                    self.decode(&head, out)
                }
                Err(source) => Err(self.inflate_error(source)),
            },
        }
    }

    fn decode(&mut self, mut input: &[u8], out: &mut Vec<(ChunkNo, Verified<Bytes>)>) -> Result<(), SpanError> {
        while !self.is_done() {
            let Stage::Decoding(decoder) = &mut self.stage else { return Ok(()) };
            let skipping = self.skip_len_bytes > 0;
            let output = if skipping {
                let len = self.skipped.len().min(usize::try_from(self.skip_len_bytes).unwrap_or(usize::MAX));
                &mut self.skipped[..len]
            } else {
                &mut self.chunk[self.filled..]
            };
            let step = match decoder.step(input, output) {
                Ok(step) => step,
                Err(source) => return Err(self.inflate_error(source)),
            };
            input = &input[step.consumed..];
            if skipping {
                self.skip_len_bytes -= step.produced as u64;
            } else {
                self.filled += step.produced;
                if self.filled == self.chunk.len() {
                    self.hand_out(out)?;
                }
            }
            if step.is_stuck() {
                // Both ends are open, so a decoder that does nothing with input before it does not understand it.
                return if input.is_empty() { Ok(()) } else { Err(self.inflate_error(InflateError::Deflate)) };
            }
        }
        Ok(())
    }

    fn hand_out(&mut self, out: &mut Vec<(ChunkNo, Verified<Bytes>)>) -> Result<(), SpanError> {
        let chunk = ChunkNo(self.left.start);
        let bytes = Bytes::from(std::mem::take(&mut self.chunk));
        let verified = self.chunks.verify(chunk, bytes).map_err(|source| SpanError::Wrong {
            span: self.seek.span_of(chunk),
            chunk,
            source,
        })?;
        out.push((chunk, verified));
        self.left.start += 1;
        self.filled = 0;
        if !self.is_done() {
            let next = self.chunks.range(ChunkNo(self.left.start));
            self.chunk = vec![0; (next.end - next.start) as usize];
        }
        Ok(())
    }

    fn inflate_error(&self, source: InflateError) -> SpanError {
        SpanError::Inflate { span: self.span(), chunk: ChunkNo(self.left.start), source }
    }
}

impl Stage {
    fn begin(seek: &SeekTable, chunks: &ChunkTable, spans: Range<u32>, window: &[u8]) -> Result<Self, SpanError> {
        let (span, last) = (SpanNo(spans.start), SpanNo(spans.end - 1));
        let entry = seek.span(span);
        let compression = seek.header().compression;
        let chunk = ChunkNo(entry.chunks.start);
        let inflate = |source| SpanError::Inflate { span, chunk, source };
        let kept = if entry.kept.is_empty() {
            Vec::new()
        } else {
            let len = seek.window_pack(span).unpacked_len_bytes;
            unpack(window, len).map_err(|source| SpanError::Window { span, source })?[entry.kept].to_vec()
        };
        let decode = |window: &[u8]| Decoder::resume(compression, entry.resume, window).map_err(inflate);
        match entry.resume {
            Resume::Block { bits, value } if !kept.is_empty() && kept.len() < entry.window_len_bytes => {
                let end = chunks.run_range(seek.span(last).chunks).end;
                let output_len = usize::try_from(end.saturating_sub(entry.logical_start.0)).unwrap_or(usize::MAX);
                let mut finder = UseFinder::new().map_err(inflate)?;
                finder.start(bits, value, entry.window_len_bytes, output_len).map_err(inflate)?;
                Ok(Self::Placing(Box::new(Placing { finder, kept, resume: entry.resume, head: Vec::new() })))
            }
            // Nothing of the window is needed, or all of it was kept.
            Resume::Block { .. } if kept.is_empty() => decode(&vec![0; entry.window_len_bytes]).map(Self::Decoding),
            Resume::Block { .. } | Resume::Start => decode(&kept).map(Self::Decoding),
        }
    }
}

impl Placing {
    /// Takes compressed bytes; once they tell the window, the decoder for it and all bytes so far.
    fn push(&mut self, compressed: &[u8]) -> Result<Option<(Decoder, Vec<u8>)>, InflateError> {
        self.head.extend_from_slice(compressed);
        if !self.finder.push(compressed)? {
            // The builder saw no more than this either.
            return if self.head.len() > HEAD_LEN_MAX_BYTES { Err(InflateError::Deflate) } else { Ok(None) };
        }
        let window = self.finder.fill(&self.kept).ok_or(InflateError::Deflate)?;
        let decoder = Decoder::resume(Compression::Gzip, self.resume, &window)?;
        Ok(Some((decoder, std::mem::take(&mut self.head))))
    }
}
