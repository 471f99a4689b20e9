//! Reading: a lock-free test of the bits, one `pread`, and a look at the epochs.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{Ordering, fence};

use bytes::Bytes;
use hermes_image::ids::{ChunkNo, ChunkRange};
use hermes_image::runs::Runs;
use hermes_image::verify::Verified;

use super::Layer;
use crate::config::DropBehind;
use crate::error::StoreError;

/// Evictions that may come between before a read gives up and calls its chunks absent. Each needs the evictor to have
/// taken something from the very groups that are being read.
const RETRIES_MAX: u32 = 16;

/// The answer to a read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// All of it is here: so many bytes were read. Fewer than were asked for only at the end of the space.
    Hit(usize),
    /// These chunks are needed first. The buffer holds nothing of meaning.
    Miss(Runs),
}

/// A chunk that was read back and checked.
enum Checked {
    Absent,
    Right(Verified<Bytes>),
    /// It was not what its name says, and is forgotten.
    Damaged,
}

impl Layer {
    /// Reads from `offset` of the logical space into `buf`, if every chunk that the range touches is here.
    ///
    /// Never blocks on a lock, a sync or an eviction; a page that is not cached costs a disk read. Zeros are returned
    /// only where the layer has zeros.
    ///
    /// # Errors
    /// When the disk cannot be read and the chunks could not be forgotten either (chunks on a bad sector are).
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<Read, StoreError> {
        let counters = &self.shared.counters;
        let end = offset.saturating_add(buf.len() as u64).min(self.table.logical_len_bytes());
        if offset >= end {
            return Ok(Read::Hit(0));
        }
        let chunks = self.table.covering(offset..end);
        // Fits: it is at most the length of `buf`.
        let buf = &mut buf[..(end - offset) as usize];
        if !self.read_present(&chunks, offset, buf)? {
            counters.read_misses.add(1);
            let missing = self.present.runs(chunks.clone(), false);
            // Whatever made the read fail came back meanwhile: let the caller ask for all of it.
            return Ok(Read::Miss(if missing.is_empty() { Runs::one(chunks) } else { missing }));
        }
        self.touch(&chunks);
        counters.read_hits.add(1);
        counters.read_bytes.add(end - offset);
        self.drop_read(&chunks, offset..end)?;
        Ok(Read::Hit(buf.len()))
    }

    /// The bytes of `chunk`, checked against its name; `None` when it is absent, or was found damaged and forgotten.
    ///
    /// For serving others and for copying, where a wrong byte would spread; costs about 20 us per 64 KiB more than
    /// [`Layer::read_at`].
    ///
    /// # Errors
    /// When there is no such chunk, or what is damaged could not be forgotten.
    pub fn read_chunk(&self, chunk: ChunkNo) -> Result<Option<Verified<Bytes>>, StoreError> {
        match self.read_checked(chunk)? {
            Checked::Right(bytes) => Ok(Some(bytes)),
            Checked::Absent | Checked::Damaged => Ok(None),
        }
    }

    /// Reads every present chunk and forgets those whose bytes are not what their name says; which those were.
    ///
    /// For operators and after disk trouble: reads of containers are not verified again.
    ///
    /// # Errors
    /// When a damaged chunk cannot be forgotten.
    pub fn verify_present(&self) -> Result<Runs, StoreError> {
        let mut damaged = Runs::new();
        for chunk in self.present().chunks() {
            if let Checked::Damaged = self.read_checked(ChunkNo(chunk))? {
                damaged.insert(chunk..chunk + 1);
            }
        }
        Ok(damaged)
    }

    fn read_checked(&self, chunk: ChunkNo) -> Result<Checked, StoreError> {
        self.check_chunk(chunk)?;
        let range = self.table.range(chunk);
        // At most CHUNK_LEN_MAX_BYTES, which a chunk table promises.
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let chunks = chunk.0..chunk.0 + 1;
        if !self.read_present(&chunks, range.start, &mut bytes)? {
            return Ok(Checked::Absent);
        }
        let Ok(bytes) = self.table.verify(chunk, Bytes::from(bytes)) else {
            tracing::warn!(diff_id = %self.diff_id(), %chunk, "chunk is damaged on disk; it will be fetched again");
            self.forget(&Runs::one(chunks))?;
            return Ok(Checked::Damaged);
        };
        self.touch(&chunks);
        self.shared.counters.read_hits.add(1);
        self.shared.counters.read_bytes.add(range.end - range.start);
        self.drop_read(&chunks, range)?;
        Ok(Checked::Right(bytes))
    }

    /// Drops cached pages that were read, if that is the configuration. What was written a moment ago is left to the
    /// next sync round: to drop it here would write it out in pieces as small as the reads (2.4 % of the processor
    /// time of a cold read).
    fn drop_read(&self, chunks: &ChunkRange, range: std::ops::Range<u64>) -> Result<(), StoreError> {
        if self.shared.config.drop_behind != DropBehind::WrittenAndRead {
            return Ok(());
        }
        // Whoever holds the list is about to change it: a reader does not wait for that.
        let is_synced = self.pending.try_lock().is_some_and(|pending| !pending.is_unsynced(chunks));
        if is_synced { self.drop_cached(range) } else { Ok(()) }
    }

    /// Reads `buf` at `offset`, which `chunks` cover, if all of them are present before and after.
    fn read_present(&self, chunks: &ChunkRange, offset: u64, buf: &mut [u8]) -> Result<bool, StoreError> {
        for _ in 0..RETRIES_MAX {
            let before = self.epochs(chunks);
            if !self.present.contains_all(chunks.clone()) {
                return Ok(false);
            }
            match self.file.read_exact_at(buf, offset) {
                Ok(()) => {}
                // A bad sector, or a file that somebody else has cut. The bytes are fetched again.
                Err(source) if is_lost(&source) => {
                    tracing::warn!(diff_id = %self.diff_id(), offset, %source, "chunks cannot be read back");
                    self.forget(&Runs::one(chunks.clone()))?;
                    return Ok(false);
                }
                Err(source) => return Err(StoreError::io("read", &self.path)(source)),
            }
            // The epochs are loaded after the bytes.
            fence(Ordering::SeqCst);
            if self.epochs(chunks) == before {
                return Ok(true);
            }
            self.shared.counters.read_retries.add(1);
        }
        Ok(false)
    }

    /// The sum of the epochs that guard `chunks`. Epochs only rise, so equal sums mean equal epochs.
    fn epochs(&self, chunks: &ChunkRange) -> u64 {
        let groups = Self::groups(chunks);
        if groups.len() >= self.stripes.len() {
            return self.stripes.iter().map(|stripe| stripe.epoch.load(Ordering::SeqCst)).sum();
        }
        groups.map(|group| self.stripe(group).epoch.load(Ordering::SeqCst)).sum()
    }

    pub(crate) fn check_chunk(&self, chunk: ChunkNo) -> Result<(), StoreError> {
        if chunk.0 < self.table.count() {
            return Ok(());
        }
        Err(StoreError::NoSuchChunk { diff_id: self.diff_id(), chunk, count: self.table.count() })
    }
}

/// Whether bytes that were written can no longer be had.
fn is_lost(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::UnexpectedEof || error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}
