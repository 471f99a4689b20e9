//! zstd: frames, each of which is a restart point.
//!
//! Skippable frames (such as the tables of `zstd:chunked`) are passed over by libzstd. A frame cannot be entered in
//! its middle: its state is entropy tables, repeat offsets and a window of megabytes, which libzstd does not show.

use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name, get_frame_content_size};

use super::{Boundary, InflateError, Step};

/// Largest window of a frame, as a power of two: 2^27 bytes, 128 MiB. libzstd's own default limit
/// (`ZSTD_WINDOWLOG_LIMIT_DEFAULT`) and the most that its encoder uses without `--long=28` and above. It bounds what a
/// hostile frame header can make the decoder allocate.
pub(super) const WINDOW_LOG_MAX: u32 = 27;

/// Longest header of a frame, in bytes (`ZSTD_FRAMEHEADERSIZE_MAX` of libzstd, RFC 8878 section 3.1.1).
const HEADER_LEN_MAX_BYTES: usize = 18;

/// Less than any header has, in bytes (`ZSTD_FRAMEHEADERSIZE_MIN` of libzstd is 6).
const HEADER_PART_LEN_BYTES: usize = 5;

/// A zstd decoder that stops after every frame.
pub(super) struct ZstdDecoder {
    context: DCtx<'static>,
    frame: Frame,
    /// Whether the next byte begins a frame.
    between_frames: bool,
}

impl ZstdDecoder {
    /// A decoder at the start of a frame.
    pub(super) fn new() -> Result<Self, InflateError> {
        let mut context = DCtx::try_create().ok_or(InflateError::Memory)?;
        context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(refused)?;
        Ok(Self { context, frame: Frame::default(), between_frames: true })
    }

    /// See [`super::Decoder::step`].
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, InflateError> {
        if self.between_frames && input.is_empty() {
            return Ok(Step { consumed: 0, produced: 0, boundary: None });
        }
        // Given a whole frame at once, libzstd takes another path, which judges damaged frames differently. So no call
        // gets more than the beginning of a header.
        let alone = HEADER_PART_LEN_BYTES.saturating_sub(self.frame.head_len);
        let input = if alone > 0 { &input[..input.len().min(alone)] } else { input };
        let mut source = InBuffer::around(input);
        let mut target = OutBuffer::around(output);
        let hint = self.context.decompress_stream(&mut target, &mut source).map_err(refused)?;
        self.frame.note(&input[..source.pos()], target.pos());
        self.between_frames = hint == 0;
        if self.between_frames {
            std::mem::take(&mut self.frame).check()?;
        }
        let boundary = self.between_frames.then_some(Boundary::Start);
        Ok(Step { consumed: source.pos(), produced: target.pos(), boundary })
    }

    /// See [`super::Decoder::held_back`]. libzstd leaves the last byte of a frame in the input, though it has used it,
    /// until all output of the frame is out; in the middle of a frame there always is another byte.
    pub(super) fn held_back(&self) -> usize {
        usize::from(!self.between_frames)
    }

    /// Whether the input may end here.
    pub(super) fn is_complete(&self) -> bool {
        self.between_frames
    }
}

/// What is known of the frame that is being decoded.
///
/// Where libzstd decodes a frame piece by piece it does not compare the length that the frame declares with the one it has.
#[derive(Default)]
struct Frame {
    head: [u8; HEADER_LEN_MAX_BYTES],
    head_len: usize,
    produced_bytes: u64,
}

impl Frame {
    /// Takes what the decoder has consumed and produced.
    fn note(&mut self, consumed: &[u8], produced: usize) {
        let len = consumed.len().min(self.head.len() - self.head_len);
        self.head[self.head_len..self.head_len + len].copy_from_slice(&consumed[..len]);
        self.head_len += len;
        self.produced_bytes += produced as u64;
    }

    /// The frame is over.
    fn check(&self) -> Result<(), InflateError> {
        match get_frame_content_size(&self.head[..self.head_len]) {
            Ok(Some(declared)) if declared != self.produced_bytes => {
                Err(InflateError::Zstd { reason: "a frame has another length than its header says" })
            }
            _ => Ok(()),
        }
    }
}

fn refused(code: usize) -> InflateError {
    InflateError::Zstd { reason: get_error_name(code) }
}
