//! Writing: room first, then the bytes, then the bits.

use std::io::{self, IoSlice};
use std::sync::atomic::Ordering;

use bytes::Bytes;
use hermes_image::ids::{ChunkNo, ChunkRange};
use hermes_image::verify::Verified;
use parking_lot::{RwLockReadGuard, RwLockWriteGuard};
use rustix::fs::FallocateFlags;

use super::{GROUP_CHUNKS, Layer};
use crate::error::{FullCause, StoreError, no_space};

/// With whom a write shares its stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// With other puts: the bytes are right, so it does not matter who writes them last.
    Shared,
    /// With nobody: the bytes may turn out wrong, and must not land on chunks that somebody else has just put.
    Alone,
}

/// A held stripe.
enum Held<'a> {
    Shared { _guard: RwLockReadGuard<'a, ()> },
    Alone { _guard: RwLockWriteGuard<'a, ()> },
}

impl Layer {
    /// Writes a chunk. Readers see it at once; it is durable after the next sync round.
    ///
    /// The caller has verified `bytes` as *this* chunk ([`ChunkTable::verify`](hermes_image::index::chunks::ChunkTable::verify)); only the length
    /// is checked again here, since hashing each chunk twice would cost a third of a core at 1 GB/s. A chunk that is
    /// present is left alone.
    ///
    /// # Errors
    /// [`StoreError::Full`] when there is no room: nothing changed, and the caller goes on without the store. Others
    /// when the chunk or its length is wrong, the layer was removed, or the disk fails.
    pub fn put(&self, chunk: ChunkNo, bytes: &Verified<Bytes>) -> Result<(), StoreError> {
        self.put_all(&[(chunk, bytes)])
    }

    /// Writes many chunks, neighbours in one call to the system. As [`Layer::put`] otherwise.
    ///
    /// # Errors
    /// As [`Layer::put`]; the chunks before the one that failed may be there.
    pub fn put_run(&self, chunks: &[(ChunkNo, Verified<Bytes>)]) -> Result<(), StoreError> {
        let chunks: Vec<(ChunkNo, &Verified<Bytes>)> = chunks.iter().map(|(chunk, bytes)| (*chunk, bytes)).collect();
        self.put_all(&chunks)
    }

    fn put_all(&self, chunks: &[(ChunkNo, &Verified<Bytes>)]) -> Result<(), StoreError> {
        for (chunk, bytes) in chunks {
            self.check_chunk(*chunk)?;
            let range = self.table.range(*chunk);
            let (expected, actual) = (range.end - range.start, bytes.len() as u64);
            if expected != actual {
                return Err(StoreError::WrongLength { diff_id: self.diff_id(), chunk: *chunk, expected, actual });
            }
            debug_assert!(
                self.table.verify(*chunk, Bytes::clone(bytes)).is_ok(),
                "these bytes were verified as another chunk than {chunk}"
            );
        }
        let mut rest = chunks;
        while let Some(((first, _), after)) = rest.split_first() {
            if self.present.contains(first.0) {
                self.shared.counters.put_duplicates.add(1);
                rest = after;
                continue;
            }
            let len = 1 + after
                .iter()
                .zip(first.0 + 1..)
                .take_while(|((chunk, _), next)| {
                    chunk.0 == *next && !next.is_multiple_of(GROUP_CHUNKS) && !self.present.contains(*next)
                })
                .count();
            let (segment, after) = rest.split_at(len);
            self.put_segment(segment)?;
            rest = after;
        }
        Ok(())
    }

    /// Writes neighbouring chunks of one group.
    fn put_segment(&self, segment: &[(ChunkNo, &Verified<Bytes>)]) -> Result<(), StoreError> {
        let first = segment[0].0.0;
        let run = first..first + segment.len() as u32;
        self.fill(&run, Access::Shared, |offset| {
            let slices: Vec<IoSlice<'_>> = segment.iter().map(|(_, bytes)| IoSlice::new(bytes)).collect();
            write_all_vectored(&self.file, slices, offset)?;
            Ok(true)
        })?;
        Ok(())
    }

    /// Makes room for `run` (chunks of one group), lets `write` put their bytes at the offset it is given, and marks
    /// them present if `write` says that they are right. When the filesystem is full, evicts once and tries again.
    ///
    /// Crash or failure before the bits are set leaves bytes that nobody sees, in a place that only these chunks use.
    pub(crate) fn fill(
        &self,
        run: &ChunkRange,
        access: Access,
        mut write: impl FnMut(u64) -> io::Result<bool>,
    ) -> Result<bool, StoreError> {
        let range = self.table.run_range(run.clone());
        let len_bytes = range.end - range.start;
        let mut evicted = false;
        loop {
            let room = self.shared.reserve(len_bytes).inspect_err(|error| self.count_full(error, run))?;
            let lock = &self.stripe(run.start / GROUP_CHUNKS).lock;
            let stripe = match access {
                Access::Shared => Held::Shared { _guard: lock.read() },
                Access::Alone => Held::Alone { _guard: lock.write() },
            };
            if access == Access::Alone && self.present.contains_all(run.clone()) {
                return Ok(true);
            }
            let failure = match write(range.start) {
                Ok(true) => {
                    let new_bytes = self.mark(run);
                    drop(stripe);
                    self.charge(new_bytes);
                    room.spend(new_bytes);
                    return Ok(true);
                }
                Ok(false) => {
                    drop(stripe);
                    self.give_back(run);
                    return Ok(false);
                }
                Err(failure) => failure,
            };
            drop(stripe);
            drop(room);
            if !no_space(&failure) {
                return Err(StoreError::io("write", &self.path)(failure));
            }
            self.give_back(run);
            if evicted || self.shared.make_room(len_bytes)? == 0 {
                let error = StoreError::Full { needed_bytes: len_bytes, cause: FullCause::Filesystem };
                self.count_full(&error, run);
                return Err(error);
            }
            evicted = true;
        }
    }

    fn count_full(&self, error: &StoreError, run: &ChunkRange) {
        if error.is_full() {
            self.shared.counters.full_chunks.add(u64::from(run.end - run.start));
        }
    }

    /// Marks chunks present that were just written, under their stripe's shared lock; the bytes that are new.
    fn mark(&self, run: &ChunkRange) -> u64 {
        let new;
        let new_bytes;
        {
            let mut pending = self.pending.lock();
            new = self.present.runs(run.clone(), false);
            new_bytes = self.bytes_of(&new);
            // On the list before anybody can see the chunk: whoever does may rely on the next sync round.
            pending.dirty.insert_all(&new);
            self.enqueue(&mut pending, new_bytes);
            for chunk in new.chunks() {
                self.present.set(chunk);
            }
            self.present_bytes.fetch_add(new_bytes, Ordering::Relaxed);
            // Last, so that whoever sees the layer complete sees all of it.
            self.present_chunks.fetch_add(new.chunk_count() as u32, Ordering::AcqRel);
        }
        self.touch(run);
        let counters = &self.shared.counters;
        counters.put_chunks.add(new.chunk_count());
        counters.put_bytes.add(new_bytes);
        counters.put_duplicates.add(u64::from(run.end - run.start) - new.chunk_count());
        new_bytes
    }

    fn charge(&self, new_bytes: u64) {
        self.charged_bytes.fetch_add(new_bytes, Ordering::Relaxed);
    }

    /// Gives back what a write that failed half-way has allocated. Only a courtesy, so failures are ignored: the next
    /// write of these chunks goes to the same place.
    fn give_back(&self, run: &ChunkRange) {
        // Alone: another writer may just be putting the same chunks.
        let _stripe = self.stripe(run.start / GROUP_CHUNKS).lock.write();
        for absent in self.present.runs(run.clone(), false).iter() {
            if let Err(error) = self.punch(&absent) {
                tracing::debug!(diff_id = %self.diff_id(), %error, "cannot give back the room of a failed write");
            }
        }
    }

    /// Punches the hole of absent chunks, whose stripe the caller holds alone.
    pub(super) fn punch(&self, run: &ChunkRange) -> Result<(), StoreError> {
        let range = self.table.run_range(run.clone());
        punch_hole(&self.file, range).map_err(StoreError::io("punch a hole into", &self.path))
    }
}

/// Takes the bytes of `range` out of `file`: they read as zeros, whole blocks are given back.
pub(crate) fn punch_hole(file: &std::fs::File, range: std::ops::Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, range.start, range.end - range.start)?)
}

/// Writes all of `slices` at `offset`.
fn write_all_vectored(file: &std::fs::File, mut slices: Vec<IoSlice<'_>>, mut offset: u64) -> io::Result<()> {
    let mut rest = slices.as_mut_slice();
    while !rest.is_empty() {
        match rustix::io::pwritev(file, rest, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as u64;
                IoSlice::advance_slices(&mut rest, written);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
