//! Snapshots in the catalogue: their records by name, and which snapshot is whose parent by number.

use rocksdb::WriteBatch;

use super::{CHILDREN, Catalogue, Durability, META, SNAPSHOTS};
use crate::error::StoreError;

/// The key of the next free snapshot number in `meta`.
const NEXT: &[u8] = b"next_snapshot";

/// Changes of snapshots that happen together or not at all.
pub(crate) struct SnapshotBatch<'a> {
    catalogue: &'a Catalogue,
    batch: WriteBatch,
}

impl SnapshotBatch<'_> {
    /// Puts a record under its name.
    pub(crate) fn put(&mut self, name: &str, json: &[u8]) {
        self.batch.put_cf(self.catalogue.family(SNAPSHOTS), name, json);
    }

    /// Takes a record away.
    pub(crate) fn delete(&mut self, name: &str) {
        self.batch.delete_cf(self.catalogue.family(SNAPSHOTS), name);
    }

    /// Notes that `child` is above `parent`.
    pub(crate) fn link(&mut self, parent: u64, child: u64) {
        self.batch.put_cf(self.catalogue.family(CHILDREN), link_key(parent, child), []);
    }

    /// Notes that it no longer is.
    pub(crate) fn unlink(&mut self, parent: u64, child: u64) {
        self.batch.delete_cf(self.catalogue.family(CHILDREN), link_key(parent, child));
    }

    /// Carries the changes out, durably.
    pub(crate) fn write(self) -> Result<(), StoreError> {
        self.catalogue.write(self.batch, Durability::Synced)
    }
}

fn link_key(parent: u64, child: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&parent.to_be_bytes());
    key[8..].copy_from_slice(&child.to_be_bytes());
    key
}

impl Catalogue {
    /// Starts a change.
    pub(crate) fn snapshot_batch(&self) -> SnapshotBatch<'_> {
        SnapshotBatch { catalogue: self, batch: WriteBatch::default() }
    }

    /// A snapshot's record.
    pub(crate) fn snapshot(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.get(SNAPSHOTS, name.as_bytes())
    }

    /// Every snapshot's name and record, by name, as they are at one moment.
    pub(crate) fn snapshots(&self) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let mut snapshots = Vec::new();
        for item in self.iterate(SNAPSHOTS, &[]) {
            let (name, json) = item?;
            let Ok(name) = String::from_utf8(name.into_vec()) else {
                let reason = "its name is no text".to_owned();
                return Err(StoreError::Damaged { record: "a snapshot".to_owned(), reason });
            };
            snapshots.push((name, json.into_vec()));
        }
        Ok(snapshots)
    }

    /// Whether a snapshot has this one as its parent.
    pub(crate) fn snapshot_has_children(&self, id: u64) -> Result<bool, StoreError> {
        self.iterate(CHILDREN, &id.to_be_bytes()).next().transpose().map(|child| child.is_some())
    }

    /// A snapshot number that was never used before, from 1. Buffered: the record that uses it is synced after it.
    pub(crate) fn take_snapshot_number(&self) -> Result<u64, StoreError> {
        let number = match self.get(META, NEXT)? {
            None => 1,
            Some(bytes) => match <[u8; 8]>::try_from(bytes.as_slice()) {
                Ok(bytes) => u64::from_be_bytes(bytes),
                Err(_) => {
                    return Err(StoreError::Damaged {
                        record: "the next snapshot number".to_owned(),
                        reason: format!("it has {} bytes instead of 8", bytes.len()),
                    });
                }
            },
        };
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(META), NEXT, number.saturating_add(1).to_be_bytes());
        self.write(batch, Durability::Buffered)?;
        Ok(number)
    }
}
