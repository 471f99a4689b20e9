//! Presence bits and last uses, a page at a time; registration and removal of layers.

use hermes_image::ids::DiffId;
use rocksdb::WriteBatch;

use super::{Catalogue, Durability, LAYERS, LayerRecord, META, PRESENCE, USES};
use crate::bitmap::PAGE_LEN_BYTES;
use crate::error::StoreError;

fn page_key(layer: u32, page: u32) -> [u8; 8] {
    let mut key = [0; 8];
    key[..4].copy_from_slice(&layer.to_be_bytes());
    key[4..].copy_from_slice(&page.to_be_bytes());
    key
}

/// A page of presence bits with its number.
pub(crate) type PresencePage = (u32, [u8; PAGE_LEN_BYTES]);

/// A page with its number.
pub(crate) type Page = (u32, Vec<u8>);

impl Catalogue {
    /// Writes presence pages of a layer.
    pub(crate) fn write_presence(
        &self,
        layer: u32,
        pages: &[PresencePage],
        durability: Durability,
    ) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        for (page, bytes) in pages {
            // A page without a bit is no page: an evicted layer leaves nothing behind.
            if bytes.iter().all(|byte| *byte == 0) {
                batch.delete_cf(self.family(PRESENCE), page_key(layer, *page));
            } else {
                batch.put_cf(self.family(PRESENCE), page_key(layer, *page), bytes);
            }
        }
        self.write(batch, durability)
    }

    /// Writes all last-use pages of a layer. Never synced: a lost one makes eviction a little less wise.
    pub(crate) fn write_uses(&self, layer: u32, pages: &[(u32, Vec<u8>)]) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        for (page, bytes) in pages {
            batch.put_cf(self.family(USES), page_key(layer, *page), bytes);
        }
        self.write(batch, Durability::Buffered)
    }

    /// The presence pages of a layer.
    pub(crate) fn presence(&self, layer: u32) -> Result<Vec<Page>, StoreError> {
        self.pages(PRESENCE, layer)
    }

    /// The last-use pages of a layer.
    pub(crate) fn uses(&self, layer: u32) -> Result<Vec<Page>, StoreError> {
        self.pages(USES, layer)
    }

    fn pages(&self, family: &str, layer: u32) -> Result<Vec<Page>, StoreError> {
        let prefix = layer.to_be_bytes();
        let mut pages = Vec::new();
        for item in self.iterate(family, &prefix) {
            let (key, value) = item?;
            let Some(page) = key[4..].first_chunk::<4>().filter(|_| key.len() == 8) else {
                return Err(StoreError::Damaged {
                    record: format!("a page of layer number {layer}"),
                    reason: format!("its key has {} bytes instead of 8", key.len()),
                });
            };
            pages.push((u32::from_be_bytes(*page), value.into_vec()));
        }
        Ok(pages)
    }

    /// Commits layers whose files and places are there, each with the pages of what its file holds already: all or none.
    pub(crate) fn register<'a>(
        &self,
        layers: impl Iterator<Item = (DiffId, &'a LayerRecord, &'a [PresencePage])>,
    ) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        for (diff_id, record, pages) in layers {
            let json = serde_json::to_vec(record).expect("numbers and a name always serialise");
            for (page, bytes) in pages {
                batch.put_cf(self.family(PRESENCE), page_key(record.number, *page), bytes);
            }
            batch.put_cf(self.family(LAYERS), diff_id.0, json);
        }
        batch.delete_cf(self.family(META), b"registering");
        self.write(batch, Durability::Synced)
    }

    /// Forgets what a layer has, durably.
    pub(crate) fn clear_presence(&self, layer: u32) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        batch.delete_range_cf(self.family(PRESENCE), page_key(layer, 0), page_key(layer, u32::MAX));
        self.write(batch, Durability::Synced)
    }

    /// Forgets a layer, durably: record and presence in one write. Its places are removed after that, or ignored.
    pub(crate) fn unregister(&self, diff_id: DiffId, number: Option<u32>) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        batch.delete_cf(self.family(LAYERS), diff_id.0);
        // Its places are still there; an unknown number makes the next open look for all that belong to no layer.
        let note = number.map_or_else(Vec::new, |number| number.to_be_bytes().to_vec());
        batch.put_cf(self.family(META), b"registering", note);
        if let Some(number) = number {
            for family in [PRESENCE, USES] {
                batch.delete_range_cf(self.family(family), page_key(number, 0), page_key(number, u32::MAX));
            }
        }
        self.write(batch, Durability::Synced)
    }
}

#[cfg(test)]
impl Catalogue {
    /// Overwrites a presence page, for tests of damage.
    pub(crate) fn damage_presence(&self, layer: u32, page: u32, bytes: &[u8]) {
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(PRESENCE), page_key(layer, page), bytes);
        self.write(batch, Durability::Synced).expect("writes");
    }

    /// Overwrites a layer's record, for tests of damage.
    pub(crate) fn damage_layer(&self, diff_id: DiffId, bytes: &[u8]) {
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(LAYERS), diff_id.0, bytes);
        self.write(batch, Durability::Synced).expect("writes");
    }
}
