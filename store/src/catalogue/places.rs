//! Where in the store a chunk is, by its name.

use std::collections::BTreeSet;

use hermes_image::ids::{ChunkId, ChunkNo};
use hermes_image::index::chunks::ChunkTable;
use rocksdb::{ReadOptions, WriteBatch};

use super::{Catalogue, Durability, META, PLACES};
use crate::error::StoreError;

/// Bytes of a chunk's name in a key. What a place leads to is verified, so a collision costs one read.
pub(crate) const PLACE_PREFIX_LEN: usize = 16;
const KEY_LEN: usize = PLACE_PREFIX_LEN + 8;
/// Places in one write: 3 MiB of keys. One write for all but layers of several GB, in bounded memory for those.
const BATCH_PLACES: usize = 65_536;
/// Most places of one chunk that are looked at. Empty and padding chunks are in every layer.
const PLACES_MAX: usize = 32;

/// Where a chunk may be: a layer's number and the chunk within it.
pub(crate) type Place = (u32, ChunkNo);

fn key(id: &ChunkId, layer: u32, chunk: u32) -> [u8; KEY_LEN] {
    let mut key = [0; KEY_LEN];
    key[..PLACE_PREFIX_LEN].copy_from_slice(&id.0[..PLACE_PREFIX_LEN]);
    key[PLACE_PREFIX_LEN..PLACE_PREFIX_LEN + 4].copy_from_slice(&layer.to_be_bytes());
    key[PLACE_PREFIX_LEN + 4..].copy_from_slice(&chunk.to_be_bytes());
    key
}

fn place_of(key: &[u8]) -> Option<Place> {
    let (_, place) = key.split_at_checked(PLACE_PREFIX_LEN)?;
    let (layer, chunk) = place.split_first_chunk::<4>()?;
    Some((u32::from_be_bytes(*layer), ChunkNo(u32::from_be_bytes(*chunk.first_chunk::<4>()?))))
}

impl Catalogue {
    /// Writes the places of layers that are about to be registered. A crash in between is noticed at the next open.
    pub(crate) fn write_places<'a>(
        &self,
        layers: impl ExactSizeIterator<Item = (u32, &'a ChunkTable)>,
    ) -> Result<(), StoreError> {
        let is_one = layers.len() == 1;
        for (layer, table) in layers {
            // No number makes the next open look for all places that belong to no layer.
            let note = if is_one { &layer.to_be_bytes()[..] } else { &[] };
            self.for_each_batch(table, layer, note, |batch, key| batch.put_cf(self.family(PLACES), key, []))?;
        }
        Ok(())
    }

    /// Removes the places of a layer that was registered.
    pub(crate) fn remove_places(&self, layer: u32, table: &ChunkTable) -> Result<(), StoreError> {
        let note = layer.to_be_bytes();
        self.for_each_batch(table, layer, &note, |batch, key| batch.delete_cf(self.family(PLACES), key))?;
        let mut batch = WriteBatch::default();
        batch.delete_cf(self.family(META), b"registering");
        self.write(batch, Durability::Buffered)
    }

    fn for_each_batch(
        &self,
        table: &ChunkTable,
        layer: u32,
        note: &[u8],
        apply: impl Fn(&mut WriteBatch, [u8; KEY_LEN]),
    ) -> Result<(), StoreError> {
        let mut first = 0;
        // At least one write, so that the note is there also for a layer without chunks.
        loop {
            let mut batch = WriteBatch::default();
            batch.put_cf(self.family(META), b"registering", note);
            let last = table.count().min(first + BATCH_PLACES as u32);
            for chunk in first..last {
                apply(&mut batch, key(&table.chunk_id(ChunkNo(chunk)), layer, chunk));
            }
            self.write(batch, Durability::Buffered)?;
            first = last;
            if first >= table.count() {
                return Ok(());
            }
        }
    }

    /// Removes places that an interrupted registration or removal left; how many. `registered` says which layer
    /// numbers have a record.
    pub(crate) fn remove_orphan_places(&self, registered: impl Fn(u32) -> bool) -> Result<u64, StoreError> {
        let Some(note) = self.get(META, b"registering")? else { return Ok(0) };
        let interrupted = <[u8; 4]>::try_from(note.as_slice()).ok().map(u32::from_be_bytes);
        let mut removed = 0;
        let mut batch = WriteBatch::default();
        if interrupted.is_none_or(|layer| !registered(layer)) {
            let mut options = ReadOptions::default();
            options.set_total_order_seek(true);
            let mut places = self.db.raw_iterator_cf_opt(self.family(PLACES), options);
            places.seek_to_first();
            while let Some(key) = places.key() {
                if place_of(key).is_none_or(|(layer, _)| !registered(layer)) {
                    batch.delete_cf(self.family(PLACES), key);
                    removed += 1;
                    if batch.len() >= BATCH_PLACES {
                        self.write(std::mem::take(&mut batch), Durability::Buffered)?;
                    }
                }
                places.next();
            }
            places.status().map_err(self.failed("read"))?;
        }
        batch.delete_cf(self.family(META), b"registering");
        self.write(batch, Durability::Buffered)?;
        Ok(removed)
    }

    /// Where the chunk `id` may be.
    pub(crate) fn places(&self, id: &ChunkId) -> Result<Vec<Place>, StoreError> {
        let mut found = Vec::new();
        self.find_places(std::iter::once((*id, ChunkNo(0))), |_, place| {
            found.push(place);
            false
        })?;
        Ok(found)
    }

    /// Looks up many chunks with one cursor, in the order of their names. `found` is called with the number that came
    /// with a chunk and a place of it, until it answers `true` (enough) for that chunk.
    pub(crate) fn find_places(
        &self,
        chunks: impl Iterator<Item = (ChunkId, ChunkNo)>,
        mut found: impl FnMut(ChunkNo, Place) -> bool,
    ) -> Result<(), StoreError> {
        let sorted: BTreeSet<(ChunkId, ChunkNo)> = chunks.collect();
        let mut options = ReadOptions::default();
        options.set_prefix_same_as_start(true);
        let mut places = self.db.raw_iterator_cf_opt(self.family(PLACES), options);
        for (id, chunk) in sorted {
            let prefix = &id.0[..PLACE_PREFIX_LEN];
            places.seek(prefix);
            for _ in 0..PLACES_MAX {
                let Some(place) = places.key().filter(|key| key.starts_with(prefix)).and_then(place_of) else { break };
                if found(chunk, place) {
                    break;
                }
                places.next();
            }
            places.status().map_err(self.failed("read"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use hermes_image::ids::DiffId;
    use hermes_image::index::chunks::ChunkTableBuilder;

    use super::*;

    fn table(ids: &[u8]) -> ChunkTable {
        let mut builder = ChunkTableBuilder::default();
        for id in ids {
            builder.push(ChunkId([*id; 32]), 512).expect("a chunk");
        }
        builder.finish(DiffId([9; 32]))
    }

    #[test]
    fn places_come_and_go_with_their_layer() {
        let dir = tempfile::tempdir().expect("a folder");
        let (catalogue, _) = Catalogue::open(dir.path()).expect("opens");
        let (one, two) = (table(&[5, 6, 5]), table(&[6]));
        catalogue.write_places([(1, &one)].into_iter()).expect("writes");
        catalogue.write_places([(2, &two)].into_iter()).expect("writes");
        let places = |id: u8| catalogue.places(&ChunkId([id; 32])).expect("reads");
        assert_eq!(places(5), vec![(1, ChunkNo(0)), (1, ChunkNo(2))]);
        assert_eq!(places(6), vec![(1, ChunkNo(1)), (2, ChunkNo(0))]);
        assert_eq!(places(7), vec![]);
        catalogue.remove_places(1, &one).expect("removes");
        assert_eq!((places(5), places(6)), (vec![], vec![(2, ChunkNo(0))]));
        // Layer 2 was never registered: a crash now leaves its places behind.
        catalogue.write_places([(2, &two)].into_iter()).expect("writes");
        assert_eq!(catalogue.remove_orphan_places(|_| false).expect("cleans"), 1);
        assert_eq!(places(6), vec![]);
        assert_eq!(catalogue.remove_orphan_places(|_| false).expect("cleans"), 0);
        // Of two that are registered at once, too.
        catalogue.write_places([(3, &one), (4, &two)].into_iter()).expect("writes");
        assert_eq!(catalogue.remove_orphan_places(|number| number == 4).expect("cleans"), 3);
        assert_eq!((places(5), places(6)), (vec![], vec![(4, ChunkNo(0))]));
    }
}
