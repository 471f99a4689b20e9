//! The step that decompresses: blocks of the blob -> pieces of the tar stream, with the restart points in them.
//!
//! A restart point comes with what the later steps need to use it: the window before it, and the compressed bytes
//! after it from which the first 32 KiB are made. It is handed on when those bytes are complete, so a piece says up to
//! where all restart points are known.

use std::collections::VecDeque;

use bytes::Bytes;

use super::BuildError;
use crate::inflate::window::{HEAD_LEN_MAX_BYTES, WINDOW_LEN_MAX_BYTES};
use crate::inflate::{Boundary, Compression, Decoder, InflateError};

/// Length of a piece in bytes, the last one excepted: a power of two above the longest chunk, so that most chunks lie
/// in one piece and need not be copied; four of them wait between two threads.
pub(super) const PIECE_LEN_BYTES: usize = 256 * 1024;
/// Progress is noted after so much output at most, in bytes. It is the precision of a span's compressed end: half of
/// it, some 5 KB of compressed bytes (15 where content hardly compresses), is read for nothing per span. A decoder copies
/// up to 32 KiB at every stop, so shorter steps cost time (docs/decisions/0001-inflate-zlib-rs.md).
const PROGRESS_STEP_BYTES: usize = 32 * 1024;
/// Notes of progress and restart points without a window are at least so far apart, in bytes of output: bounds their
/// number for blobs with tiny blocks or frames.
const NOTE_GAP_BYTES: u64 = 4 * 1024;
/// Restart points with a window are at least so far apart, in bytes of output: each costs a copy of 32 KiB. Blocks of
/// gzip are longer as a rule (measured: 20 to 200 KiB).
const WINDOW_GAP_BYTES: u64 = 16 * 1024;
/// A place at which a decoder can begin.
#[derive(Debug)]
pub(super) struct RestartPoint {
    /// Output before it, in bytes.
    pub(super) logical: u64,
    /// Input before it, in bytes.
    pub(super) blob: u64,
    /// How a decoder begins.
    pub(super) resume: Boundary,
    /// The output just before, as far as the data after it may refer to it.
    pub(super) window: Box<[u8]>,
    /// The compressed bytes after it, enough for the next 32 KiB of output in all usual cases.
    pub(super) head: Vec<u8>,
}

/// After `blob` bytes of input, all output before `logical` was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) logical: u64,
    pub(super) blob: u64,
}

/// A piece of the tar stream.
#[derive(Debug)]
pub(super) struct Piece {
    /// How the blob is compressed.
    pub(super) compression: Compression,
    /// The bytes.
    pub(super) bytes: Bytes,
    /// Notes of progress, in order, up to the piece's end.
    pub(super) progress: Vec<Progress>,
    /// Restart points, in order; they may lie in earlier pieces.
    pub(super) restarts: Vec<RestartPoint>,
    /// All restart points before this logical offset were handed on.
    pub(super) restarts_known_to: u64,
    /// Whether the stream ends with it.
    pub(super) is_last: bool,
}

/// What the step knows in the end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unpacked {
    pub(super) compression: Compression,
    pub(super) restart_points: u64,
}

/// The step.
pub(super) struct Unpacker {
    /// `None` before the first block, which tells the compression.
    decoder: Option<Decoder>,
    compression: Compression,
    logical: u64,
    blob: u64,
    logical_len_max: u64,
    /// Where the current gzip member starts: nothing refers to what is before.
    member_start: u64,
    /// The piece in the making, `filled` bytes of [`PIECE_LEN_BYTES`].
    output: Vec<u8>,
    filled: usize,
    /// The piece before it.
    previous: Bytes,
    progress: Vec<Progress>,
    /// Output when the last note was begun; it may have been moved ahead since.
    last_note: u64,
    /// Restart points whose head is not complete.
    open: VecDeque<RestartPoint>,
    complete: Vec<RestartPoint>,
    last_restart: u64,
    restart_points: u64,
}

impl Unpacker {
    /// A step that refuses more than `logical_len_max` bytes of output.
    pub(super) fn new(logical_len_max: u64) -> Self {
        Self {
            decoder: None,
            compression: Compression::Plain,
            logical: 0,
            blob: 0,
            logical_len_max,
            member_start: 0,
            output: vec![0; PIECE_LEN_BYTES],
            filled: 0,
            previous: Bytes::new(),
            progress: Vec::new(),
            last_note: 0,
            open: VecDeque::new(),
            complete: vec![RestartPoint {
                logical: 0,
                blob: 0,
                resume: Boundary::Start,
                window: Box::default(),
                head: Vec::new(),
            }],
            last_restart: 0,
            restart_points: 1,
        }
    }

    /// Takes the next block; appends the pieces that it completes.
    pub(super) fn push(&mut self, block: &[u8], pieces: &mut Vec<Piece>) -> Result<(), BuildError> {
        if self.decoder.is_none() {
            self.compression = Compression::detect(block);
            self.decoder = Some(Decoder::new(self.compression).map_err(|source| self.error(source))?);
        }
        let mut input = block;
        loop {
            let Some(decoder) = &mut self.decoder else { return Ok(()) };
            let room = PROGRESS_STEP_BYTES.min(PIECE_LEN_BYTES - self.filled);
            let step = decoder
                .step(input, &mut self.output[self.filled..self.filled + room])
                .map_err(|source| BuildError::Inflate { blob_offset: self.blob, source })?;
            let (consumed, rest) = input.split_at(step.consumed);
            input = rest;
            self.blob += step.consumed as u64;
            self.logical += step.produced as u64;
            self.filled += step.produced;
            if self.logical > self.logical_len_max {
                return Err(BuildError::TooLong { limit_bytes: self.logical_len_max });
            }
            let held_back = decoder.held_back() as u64;
            if step.produced > 0 {
                self.note_progress(self.blob + held_back);
            }
            self.feed_heads(consumed);
            if let Some(boundary) = step.boundary {
                self.note_restart(boundary);
            }
            if self.filled == PIECE_LEN_BYTES {
                pieces.push(self.take_piece());
            }
            if step.is_stuck() {
                return if input.is_empty() { Ok(()) } else { Err(self.error(InflateError::Deflate)) };
            }
        }
    }

    /// The blob has ended; appends the last piece.
    pub(super) fn finish(mut self, pieces: &mut Vec<Piece>) -> Result<Unpacked, BuildError> {
        if let Some(decoder) = &self.decoder {
            decoder.finish().map_err(|source| self.error(source))?;
        }
        self.complete.extend(self.open.drain(..));
        let mut last = self.take_piece();
        last.restarts_known_to = u64::MAX;
        last.is_last = true;
        pieces.push(last);
        Ok(Unpacked { compression: self.compression, restart_points: self.restart_points })
    }

    fn error(&self, source: InflateError) -> BuildError {
        BuildError::Inflate { blob_offset: self.blob, source }
    }

    fn note_progress(&mut self, blob: u64) {
        let now = Progress { logical: self.logical, blob };
        match self.progress.last_mut() {
            // Moving a note ahead keeps it true: by the later byte, the earlier output was there as well.
            Some(last) if now.logical - self.last_note < NOTE_GAP_BYTES => *last = now,
            _ => {
                self.last_note = now.logical;
                self.progress.push(now);
            }
        }
    }

    fn feed_heads(&mut self, consumed: &[u8]) {
        for point in &mut self.open {
            let room = HEAD_LEN_MAX_BYTES - point.head.len();
            point.head.extend_from_slice(&consumed[..consumed.len().min(room)]);
        }
        while let Some(point) = self.open.front()
            && (self.logical - point.logical >= WINDOW_LEN_MAX_BYTES as u64 || point.head.len() == HEAD_LEN_MAX_BYTES)
        {
            self.complete.extend(self.open.pop_front());
        }
    }

    fn note_restart(&mut self, boundary: Boundary) {
        if boundary == Boundary::Start {
            // The member has ended, and with it what its restart points are for.
            self.complete.extend(self.open.drain(..));
            self.member_start = self.logical;
        }
        let gap = match boundary {
            Boundary::Start => NOTE_GAP_BYTES,
            Boundary::Block { .. } => WINDOW_GAP_BYTES,
        };
        if self.logical - self.last_restart < gap {
            return;
        }
        self.last_restart = self.logical;
        self.restart_points += 1;
        let mut point = RestartPoint {
            logical: self.logical,
            blob: self.blob,
            resume: boundary,
            window: Box::default(),
            head: Vec::new(),
        };
        match boundary {
            Boundary::Start => self.complete.push(point),
            Boundary::Block { .. } => {
                point.window = self.window();
                self.open.push_back(point);
            }
        }
    }

    /// The last 32 KiB of output, or what of them belongs to the member.
    fn window(&self) -> Box<[u8]> {
        let member_len = usize::try_from(self.logical - self.member_start).unwrap_or(usize::MAX);
        let len = member_len.min(WINDOW_LEN_MAX_BYTES);
        let here = len.min(self.filled);
        // A piece is longer than a window, so the one before holds the rest.
        let before = &self.previous[self.previous.len() - (len - here)..];
        [before, &self.output[self.filled - here..self.filled]].concat().into_boxed_slice()
    }

    fn take_piece(&mut self) -> Piece {
        let mut output = std::mem::replace(&mut self.output, vec![0; PIECE_LEN_BYTES]);
        output.truncate(self.filled);
        self.filled = 0;
        let bytes = Bytes::from(output);
        self.previous = bytes.clone();
        Piece {
            compression: self.compression,
            bytes,
            progress: std::mem::take(&mut self.progress),
            restarts: std::mem::take(&mut self.complete),
            // A point at this very place may still come.
            restarts_known_to: self.open.front().map_or(self.logical, |point| point.logical),
            is_last: false,
        }
    }
}
