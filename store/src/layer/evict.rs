//! Taking chunks away again: bits first, bytes last.

use std::sync::atomic::Ordering;

use hermes_image::runs::Runs;
use parking_lot::RwLockWriteGuard;

use super::{GROUP_CHUNKS, Layer};
use crate::catalogue::Durability;
use crate::error::StoreError;

/// Why chunks are withdrawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// To make room: not if somebody holds the layer.
    Evicted,
    /// Their bytes are wrong or gone, whoever holds the layer.
    Lost,
}

impl Layer {
    /// Evicts what `groups` hold, unless somebody holds the layer or is writing there; the bytes of the chunks that
    /// went.
    ///
    /// # Errors
    /// When the catalogue cannot be written (nothing is evicted then), or no hole can be punched (the chunks are
    /// absent, their room comes back when they are written again or the layer is removed).
    pub(crate) fn evict(&self, groups: &[u32]) -> Result<u64, StoreError> {
        let stripes = self.try_stripes(groups);
        let mut wanted = Runs::new();
        for group in groups {
            if stripes.iter().any(|(stripe, _)| *stripe == *group as usize % self.stripes.len()) {
                wanted.insert_all(&self.present.runs(self.group_chunks(*group), true));
            }
        }
        let gone = self.withdraw(&wanted, Reason::Evicted)?;
        let mut freed = 0;
        for run in gone.iter() {
            let range = self.table.run_range(run.clone());
            self.punch(&run)?;
            freed += range.end - range.start;
        }
        drop(stripes);
        if self.present_chunks.load(Ordering::Acquire) == 0 {
            self.empty()?;
        }
        self.reconcile()?;
        self.shared.counters.evicted_chunks.add(gone.chunk_count());
        self.shared.counters.evicted_bytes.add(freed);
        Ok(freed)
    }

    /// The stripes of `groups` that nobody is writing to, alone, with their numbers.
    fn try_stripes(&self, groups: &[u32]) -> Vec<(usize, RwLockWriteGuard<'_, ()>)> {
        let mut numbers: Vec<usize> = groups.iter().map(|group| *group as usize % self.stripes.len()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers.into_iter().filter_map(|stripe| Some((stripe, self.stripes[stripe].lock.try_write()?))).collect()
    }

    /// Gives back the blocks that hold the ends of two chunks, which no hole of one chunk frees, once all are gone.
    fn empty(&self) -> Result<(), StoreError> {
        let groups: Vec<u32> = (0..self.stripes.len() as u32).collect();
        let stripes = self.try_stripes(&groups);
        let alone = stripes.len() == self.stripes.len();
        if alone && self.present_chunks.load(Ordering::Acquire) == 0 && self.table.count() > 0 {
            self.punch(&(0..self.table.count()))?;
        }
        Ok(())
    }

    /// Forgets chunks whose bytes are wrong or gone. They are absent at once, and durably so.
    pub(super) fn forget(&self, chunks: &Runs) -> Result<(), StoreError> {
        let gone = self.withdraw(chunks, Reason::Lost)?;
        self.shared.counters.damaged_chunks.add(gone.chunk_count());
        Ok(())
    }

    /// Clears the bits of `chunks`, in memory and then durably; the chunks that were present. None when `reason` gives
    /// way to a holder.
    ///
    /// When the catalogue cannot be written, the bits are set again: the bytes are still there.
    pub(super) fn withdraw(&self, chunks: &Runs, reason: Reason) -> Result<Runs, StoreError> {
        let ledger = self.ledger.lock();
        if ledger.retired {
            return Err(StoreError::LayerRemoved { diff_id: self.diff_id() });
        }
        let (gone, unsynced) = {
            let uses = self.uses.lock();
            if *uses > 0 && reason == Reason::Evicted {
                return Ok(Runs::new());
            }
            self.clear_present(chunks)
        };
        for group in gone.chunks().map(|chunk| chunk / GROUP_CHUNKS) {
            self.stripe(group).epoch.fetch_add(1, Ordering::SeqCst);
        }
        let durable = gone.difference(&unsynced);
        for chunk in durable.chunks() {
            ledger.durable.clear(chunk);
        }
        if let Err(error) = self.write_pages(&ledger.durable, &durable, Durability::Synced) {
            for chunk in durable.chunks() {
                ledger.durable.set(chunk);
            }
            self.set_present_again(&gone, &unsynced);
            return Err(error);
        }
        Ok(gone)
    }

    /// Clears present bits; which were set, and which of those were not durable.
    fn clear_present(&self, chunks: &Runs) -> (Runs, Runs) {
        let mut pending = self.pending.lock();
        let gone: Runs =
            chunks.chunks().filter(|chunk| self.present.clear(*chunk)).map(|chunk| chunk..chunk + 1).collect();
        let mut unsynced = gone.intersection(&pending.dirty);
        unsynced.insert_all(&gone.intersection(&pending.syncing));
        pending.dirty.remove_all(&gone);
        pending.syncing.remove_all(&gone);
        self.present_chunks.fetch_sub(gone.chunk_count() as u32, Ordering::AcqRel);
        self.present_bytes.fetch_sub(self.bytes_of(&gone), Ordering::Relaxed);
        (gone, unsynced)
    }

    fn set_present_again(&self, gone: &Runs, unsynced: &Runs) {
        let mut pending = self.pending.lock();
        let again: Runs =
            gone.chunks().filter(|chunk| self.present.set(*chunk)).map(|chunk| chunk..chunk + 1).collect();
        pending.dirty.insert_all(unsynced);
        self.present_bytes.fetch_add(self.bytes_of(&again), Ordering::Relaxed);
        self.present_chunks.fetch_add(again.chunk_count() as u32, Ordering::AcqRel);
        self.enqueue(&mut pending, 0);
    }

    pub(crate) fn bytes_of(&self, chunks: &Runs) -> u64 {
        chunks.iter().map(|run| self.table.run_range(run)).map(|range| range.end - range.start).sum()
    }

    /// Bytes that `group` holds.
    pub(crate) fn group_bytes(&self, group: u32) -> u64 {
        let chunks = self.group_chunks(group);
        if self.present.contains_all(chunks.clone()) {
            let range = self.table.run_range(chunks);
            return range.end - range.start;
        }
        self.bytes_of(&self.present.runs(chunks, true))
    }

    /// Ends the layer's life in the catalogue: no page of it is written any more, and its readers miss.
    ///
    /// # Errors
    /// [`StoreError::LayerInUse`] when somebody holds it.
    pub(crate) fn retire(&self) -> Result<(), StoreError> {
        let mut ledger = self.ledger.lock();
        let uses = self.uses.lock();
        if *uses > 0 {
            return Err(StoreError::LayerInUse { diff_id: self.diff_id() });
        }
        self.clear_present(&Runs::one(0..self.table.count()));
        ledger.retired = true;
        Ok(())
    }
}
