//! Making chunks durable: data, `fdatasync`, bits.

use hermes_image::runs::Runs;

use super::{FOLIO_MAX_BYTES, Layer, Pending};
use crate::bitmap::{AtomicBitmap, PAGE_LEN_BYTES};
use crate::catalogue::Durability;
use crate::config::DropBehind;
use crate::error::StoreError;

impl Layer {
    /// Makes everything durable that was put before the call.
    ///
    /// # Errors
    /// [`StoreError::LostWrites`] when the disk did not take the bytes: those chunks are absent again. Others when the
    /// catalogue could not be written: the chunks stay present and are tried again in the next round.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.flush()?;
        self.shared.catalogue.sync()
    }

    /// All of [`Layer::sync`] but the sync of the catalogue's log, which a round does once for all layers.
    pub(crate) fn flush(&self) -> Result<(), StoreError> {
        let _one = self.flushing.lock();
        {
            let mut pending = self.pending.lock();
            if pending.dirty.is_empty() {
                return Ok(());
            }
            pending.syncing = std::mem::take(&mut pending.dirty);
        }
        if let Err(source) = self.file.sync_data() {
            return Err(self.lose_unsynced(source));
        }
        let synced = {
            let ledger = self.ledger.lock();
            // What was evicted while the disk worked has been taken out.
            let synced = std::mem::take(&mut self.pending.lock().syncing);
            if ledger.retired {
                return Ok(());
            }
            for chunk in synced.chunks() {
                ledger.durable.set(chunk);
            }
            if let Err(error) = self.write_pages(&ledger.durable, &synced, Durability::Buffered) {
                // The bytes are on disk, only the note is missing.
                let mut pending = self.pending.lock();
                pending.dirty.insert_all(&synced);
                self.enqueue(&mut pending, 0);
                return Err(error);
            }
            synced
        };
        self.shared.counters.synced_chunks.add(synced.chunk_count());
        self.reconcile()?;
        if self.shared.config.drop_behind != DropBehind::Off {
            for run in synced.iter() {
                let range = self.table.run_range(run);
                self.drop_cached(range.start..range.end.next_multiple_of(FOLIO_MAX_BYTES))?;
            }
        }
        Ok(())
    }

    /// Writes the pages that `changed` touches, as `bits` has them.
    pub(super) fn write_pages(
        &self,
        bits: &AtomicBitmap,
        changed: &Runs,
        durability: Durability,
    ) -> Result<(), StoreError> {
        let pages: Vec<(u32, [u8; PAGE_LEN_BYTES])> =
            AtomicBitmap::pages_of(changed).into_iter().map(|page| (page, bits.page(page))).collect();
        if pages.is_empty() { Ok(()) } else { self.shared.catalogue.write_presence(self.number, &pages, durability) }
    }

    /// A failed `fdatasync` may have dropped any page that was not yet written, and says so only once (Linux marks the
    /// pages clean). So nothing that is not durable may be believed any more.
    fn lose_unsynced(&self, source: std::io::Error) -> StoreError {
        // All stripes alone: a put whose bytes are in the file and whose bit is not set yet has to be over.
        let stripes: Vec<_> = self.stripes.iter().map(|stripe| stripe.lock.write()).collect();
        let lost = {
            let pending = self.pending.lock();
            let mut lost = pending.dirty.clone();
            lost.insert_all(&pending.syncing);
            lost
        };
        drop(stripes);
        let chunk_count = lost.chunk_count();
        // None of these has a durable bit, so nothing is written and nothing can fail but a removed layer, which has
        // no chunks left to lose.
        if let Err(error) = self.withdraw(&lost, super::evict::Reason::Lost) {
            tracing::debug!(diff_id = %self.diff_id(), %error, "lost writes of a layer that is being removed");
        }
        StoreError::LostWrites { diff_id: self.diff_id(), chunk_count, source }
    }

    /// Puts the layer into the queue of the sync thread, unless it stands there or has nothing to sync.
    pub(super) fn enqueue(&self, pending: &mut Pending, new_bytes: u64) {
        let join = !pending.dirty.is_empty() && !std::mem::replace(&mut pending.queued, true);
        self.shared.queue.written(if join { self.me.upgrade() } else { None }, new_bytes);
    }

    /// Called by the sync thread when it takes the layer from its queue.
    pub(crate) fn dequeued(&self) {
        self.pending.lock().queued = false;
    }
}
