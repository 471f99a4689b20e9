//! zstd: frames, each of which is a restart point.
//!
//! Skippable frames (such as the tables of `zstd:chunked`) are passed over by libzstd. A frame cannot be entered in
//! its middle: its state is entropy tables, repeat offsets and a window of megabytes, which libzstd does not show.

use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

use super::{Boundary, InflateError, Step};

/// Largest window of a frame, as a power of two: 2^27 bytes, 128 MiB. libzstd's own default limit
/// (`ZSTD_WINDOWLOG_LIMIT_DEFAULT`) and the most that its encoder uses without `--long=28` and above. It bounds what a
/// hostile frame header can make the decoder allocate.
pub(super) const WINDOW_LOG_MAX: u32 = 27;

/// A zstd decoder that stops after every frame.
pub(super) struct ZstdDecoder {
    context: DCtx<'static>,
    /// Whether the next byte begins a frame.
    between_frames: bool,
}

impl ZstdDecoder {
    /// A decoder at the start of a frame.
    pub(super) fn new() -> Result<Self, InflateError> {
        let mut context = DCtx::try_create().ok_or(InflateError::Memory)?;
        context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(refused)?;
        Ok(Self { context, between_frames: true })
    }

    /// See [`super::Decoder::step`].
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, InflateError> {
        if self.between_frames && input.is_empty() {
            return Ok(Step { consumed: 0, produced: 0, boundary: None });
        }
        let mut source = InBuffer::around(input);
        let mut target = OutBuffer::around(output);
        let hint = self.context.decompress_stream(&mut target, &mut source).map_err(refused)?;
        self.between_frames = hint == 0;
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

fn refused(code: usize) -> InflateError {
    InflateError::Zstd { reason: get_error_name(code) }
}
