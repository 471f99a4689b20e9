//! Where chunks begin and end.
//!
//! Boundaries follow the files of a layer, so that equal files are equal chunks in every layer that holds them, and so
//! that an inserted file changes the chunks near it only. The space is a row of *units*, one per tar entry: its
//! headers, its data, and the padding to 512 bytes. A regular file with [`OWN_CHUNK_LEN_BYTES`] or more of data is two
//! units: its headers, and its data.
//!
//! 1. The data of such a file is a *run*: cut every 64 KiB from its own start. A tail shorter than 32 KiB stays with
//!    the chunk before it.
//! 2. All other units are *packed*: a pack is cut before a unit that would take it above 64 KiB, and, once it has
//!    16 KiB, before a unit that a hash of its path chooses. The chance of that grows with the length of the unit, so
//!    that packs of many tiny files and packs of a few larger ones are cut after as many bytes.
//! 3. A unit of 96 KiB or more (long headers, bytes after the last entry) is cut as a run.
//! 4. The headers of a file that is a run, and the bytes after the last entry, end their pack in any case; they may
//!    take it up to 96 KiB, lest they become a chunk of 512 bytes.
//!
//! So no chunk is longer than 96 KiB, and all boundaries but the end of the space are multiples of 512. [`Cutter`]
//! decides; it sees positions only. [`Chunker`] holds the bytes that are not cut yet. Both work on a stream: what is
//! known of it so far never changes where it is cut, only when. At most about 300 KiB wait (a pack of 96 KiB, 128 KiB
//! of which it is not known yet what they are, and the piece that came last).

use std::collections::VecDeque;
use std::ops::Range;

use bytes::{Bytes, BytesMut};

use crate::index::chunks::CHUNK_ALIGN_BYTES;

/// Data of a regular file of this length or more starts its own chunk, in bytes. Measured on real starts: twice the
/// chunk costs a quarter more bytes, half of it twice the table (docs/decisions/0002-chunk-and-span-sizes.md).
pub const OWN_CHUNK_LEN_BYTES: u64 = 64 * 1024;
/// The usual length of a chunk, in bytes: runs are cut every so often, packs do not grow beyond.
pub const CHUNK_LEN_BYTES: u64 = 64 * 1024;
/// A shorter rest of a run stays with the chunk before it, in bytes.
const TAIL_LEN_MIN_BYTES: u64 = 32 * 1024;
/// A unit of this length or more is a run; less is one chunk at most.
const RUN_LEN_MIN_BYTES: u64 = CHUNK_LEN_BYTES + TAIL_LEN_MIN_BYTES;
/// A pack has at least this length before a path may end it, in bytes: a quarter of the usual length.
const PACK_LEN_MIN_BYTES: u64 = 16 * 1024;
/// From then on, the mean number of bytes until a path ends the pack.
const PACK_LEN_MEAN_BYTES: u64 = 32 * 1024;
/// When so many bytes belong to no known entry, the unit is a run whatever comes, and what is left after a cut is
/// never a tail.
const UNKNOWN_LEN_MAX_BYTES: u64 = 2 * CHUNK_LEN_BYTES;

/// What chunking needs to know of a tar entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryShape<'a> {
    /// Where the entry's headers end and its data starts.
    pub data_start: u64,
    /// Length of the data in the stream, without padding.
    pub stored_len_bytes: u64,
    /// Whether the entry is a regular file.
    pub regular: bool,
    /// Its path, as the layer has it.
    pub path: &'a [u8],
}

/// Decides where chunks end, from the positions of the entries.
#[derive(Debug, Default)]
pub struct Cutter {
    /// The last cut.
    cut_to: u64,
    /// The end of the last known unit; may lie ahead of the stream.
    known_to: u64,
    /// What is left of a run.
    run: Option<Range<u64>>,
    /// Whether the unit at `known_to` was found to be a run before its end was known.
    open_run: bool,
}

impl Cutter {
    /// The next entry of the stream; its headers have passed, its data as a rule not. Appends the cuts that this decides.
    pub fn entry(&mut self, entry: EntryShape<'_>, cuts: &mut Vec<u64>) {
        // A sparse file whose odd bytes the index carries is known only after its data, which may be cut by then.
        let data_start = entry.data_start.max(self.known_to);
        let padded_len = entry.stored_len_bytes.checked_next_multiple_of(CHUNK_ALIGN_BYTES).unwrap_or(u64::MAX);
        let data_end = entry.data_start.saturating_add(padded_len).max(data_start);
        self.cut_run(data_start, cuts);
        if entry.regular && entry.stored_len_bytes >= OWN_CHUNK_LEN_BYTES {
            self.unit(data_start, RUN_LEN_MIN_BYTES, false, cuts);
            self.cut_run(data_start, cuts);
            self.cut(data_start, cuts);
            self.known_to = data_end;
            self.run = Some(data_start..data_end);
        } else {
            let chosen = self.is_chosen(entry.path, data_end);
            self.unit(data_end, CHUNK_LEN_BYTES, chosen, cuts);
        }
    }

    /// All of the stream up to `to` has passed, and with it every entry whose headers end there. Appends the cuts up
    /// to `to` that are certain now.
    pub fn walked(&mut self, to: u64, cuts: &mut Vec<u64>) {
        self.cut_run(to, cuts);
        while self.run.is_none() && to >= self.known_to.saturating_add(UNKNOWN_LEN_MAX_BYTES) {
            self.cut(self.known_to, cuts);
            self.known_to += CHUNK_LEN_BYTES;
            self.cut(self.known_to, cuts);
            self.open_run = true;
        }
    }

    /// The stream ends at `end`. Appends the last cuts, the end of a stream that is not empty among them.
    pub fn finish(mut self, end: u64, cuts: &mut Vec<u64>) {
        // A stream that ends inside of an entry is the tar walk's to refuse; here it only must not confuse.
        let end = end.max(self.cut_to);
        self.known_to = self.known_to.min(end);
        if let Some(run) = &mut self.run {
            run.end = run.end.min(end);
        }
        self.cut_run(end, cuts);
        if self.known_to < end {
            self.unit(end, RUN_LEN_MIN_BYTES, false, cuts);
            self.cut_run(end, cuts);
        }
        self.cut(end, cuts);
    }

    /// Whether the path ends a pack before its unit, which ends at `end`.
    fn is_chosen(&self, path: &[u8], end: u64) -> bool {
        let hash = blake3::hash(path);
        let [a, b, c, d, ..] = *hash.as_bytes();
        let drawn = u128::from(u32::from_le_bytes([a, b, c, d]));
        drawn * u128::from(PACK_LEN_MEAN_BYTES) < u128::from(end - self.known_to) << 32
    }

    /// The unit from `known_to` to `end`, which may take its pack to `limit`.
    fn unit(&mut self, end: u64, limit: u64, chosen: bool, cuts: &mut Vec<u64>) {
        let start = self.known_to;
        let was_run = std::mem::take(&mut self.open_run);
        let is_run = was_run || end - start >= RUN_LEN_MIN_BYTES;
        let pack_len = start - self.cut_to;
        if is_run || end - self.cut_to > limit || (chosen && pack_len >= PACK_LEN_MIN_BYTES) {
            self.cut(start, cuts);
        }
        self.known_to = end;
        if is_run && start < end {
            self.run = Some(start..end);
        }
    }

    /// Cuts what is left of a run, as far as `to`.
    fn cut_run(&mut self, to: u64, cuts: &mut Vec<u64>) {
        while let Some(run) = &mut self.run {
            let is_last = run.end - run.start < RUN_LEN_MIN_BYTES;
            let next = if is_last { run.end } else { run.start + CHUNK_LEN_BYTES };
            if next > to {
                return;
            }
            run.start = next;
            if is_last {
                self.run = None;
            }
            self.cut(next, cuts);
        }
    }

    fn cut(&mut self, at: u64, cuts: &mut Vec<u64>) {
        if at > self.cut_to {
            self.cut_to = at;
            cuts.push(at);
        }
    }
}

/// Cuts a stream into chunks: [`Cutter`] with the bytes.
#[derive(Debug, Default)]
pub struct Chunker {
    cutter: Cutter,
    cuts: Vec<u64>,
    /// The bytes that are not cut yet, in order.
    waiting: VecDeque<Bytes>,
    /// Where the first of them stands.
    waiting_start: u64,
    /// Where the last of them ends.
    end: u64,
}

impl Chunker {
    /// See [`Cutter::entry`]: to be called before the [`Self::push`] of the piece in which the entry's headers end.
    pub fn entry(&mut self, entry: EntryShape<'_>) {
        self.cutter.entry(entry, &mut self.cuts);
    }

    /// The next piece of the stream. Appends the chunks that are complete now.
    pub fn push(&mut self, piece: Bytes, chunks: &mut Vec<Bytes>) {
        self.end += piece.len() as u64;
        if !piece.is_empty() {
            self.waiting.push_back(piece);
        }
        self.cutter.walked(self.end, &mut self.cuts);
        self.take_chunks(chunks);
    }

    /// The stream has ended. Appends the last chunks.
    pub fn finish(mut self, chunks: &mut Vec<Bytes>) {
        let cutter = std::mem::take(&mut self.cutter);
        cutter.finish(self.end, &mut self.cuts);
        self.take_chunks(chunks);
    }

    /// Bytes that wait to be cut.
    pub fn waiting_len_bytes(&self) -> u64 {
        self.end - self.waiting_start
    }

    fn take_chunks(&mut self, chunks: &mut Vec<Bytes>) {
        // All cuts are behind the stream's end: entries are known when their headers have passed, runs are cut as far
        // as the stream has come.
        for cut in std::mem::take(&mut self.cuts) {
            let len = cut.min(self.end) - self.waiting_start;
            self.waiting_start += len;
            chunks.push(take(&mut self.waiting, len as usize));
        }
    }
}

/// The first `len` bytes; copied only when they stand in several pieces.
fn take(waiting: &mut VecDeque<Bytes>, len: usize) -> Bytes {
    if let Some(first) = waiting.front_mut()
        && first.len() >= len
    {
        let taken = first.split_to(len);
        if first.is_empty() {
            waiting.pop_front();
        }
        return taken;
    }
    let mut joined = BytesMut::with_capacity(len);
    while joined.len() < len
        && let Some(mut first) = waiting.pop_front()
    {
        joined.extend_from_slice(&first.split_to(first.len().min(len - joined.len())));
        if !first.is_empty() {
            waiting.push_front(first);
        }
    }
    joined.freeze()
}

#[cfg(test)]
mod tests;
