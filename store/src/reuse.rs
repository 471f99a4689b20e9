//! Copying a chunk that is already somewhere in the store.
//!
//! A place in the catalogue is a hint. What it leads to may have been evicted, or may be damaged, and a copy is as
//! untrusted as bytes from a peer: it is checked against the chunk's name before a reader sees it.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use hermes_image::ids::{ChunkNo, DiffId};
use hermes_image::runs::Runs;

use crate::catalogue::Place;
use crate::error::StoreError;
use crate::layer::{Access, Layer};
use crate::store::Store;

/// Chunks looked up with one cursor: 64 Ki names are 2.4 MB.
const LOOKUP_CHUNKS: u32 = 65_536;
/// Filesystems share whole blocks only; 4 KiB is the usual one.
const BLOCK_LEN_BYTES: u64 = 4096;
/// `f_type` of filesystems that can share blocks between files (linux/magic.h): xfs, btrfs, bcachefs.
const SHARING_FILESYSTEMS: [u64; 3] = [0x5846_5342, 0x9123_683E, 0xCA45_1A4E];

/// How a chunk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Both files share the blocks; nothing is written but metadata.
    Share,
    /// Read, check, write.
    Copy,
}

impl Store {
    /// The chunks of `layer` that are absent and that [`Store::copy_local`] will find in the store, in this layer or
    /// another: those need not be asked for.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn local_runs(&self, layer: &Layer) -> Result<Runs, StoreError> {
        let table = layer.table();
        let mut local = Runs::new();
        let mut first = 0;
        while first < table.count() {
            let last = table.count().min(first + LOOKUP_CHUNKS);
            let missing = layer.missing(first..last);
            let chunks = missing.chunks().map(|chunk| (table.chunk_id(ChunkNo(chunk)), ChunkNo(chunk)));
            self.shared.catalogue.find_places(chunks, |chunk, place| {
                let found = self.source(layer, chunk, place).is_some();
                if found {
                    local.insert(chunk.0..chunk.0 + 1);
                }
                found
            })?;
            first = last;
        }
        Ok(local)
    }

    /// Fills `chunk` of `layer` from another place in the store; whether it is present now.
    ///
    /// # Errors
    /// When there is no such chunk, and as [`Layer::put`].
    pub fn copy_local(&self, layer: &Layer, chunk: ChunkNo) -> Result<bool, StoreError> {
        layer.check_chunk(chunk)?;
        if layer.contains(chunk) {
            return Ok(true);
        }
        for place in self.shared.catalogue.places(&layer.table().chunk_id(chunk))? {
            let Some((source, from)) = self.source(layer, chunk, place) else { continue };
            let way = if self.shared.shares_blocks { Way::Share } else { Way::Copy };
            if copy_chunk(&source, from, layer, chunk, way)? {
                let range = layer.table().range(chunk);
                self.shared.counters.copied_chunks.add(1);
                self.shared.counters.copied_bytes.add(range.end - range.start);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The layer and chunk at `place`, if it holds `chunk` of `layer` now.
    fn source(&self, layer: &Layer, chunk: ChunkNo, (number, from): Place) -> Option<(Arc<Layer>, ChunkNo)> {
        let source = Arc::clone(self.shared.layers.read().by_number.get(&number)?);
        let id = layer.table().chunk_id(chunk);
        let here = from.0 < source.table().count() && source.table().chunk_id(from) == id && source.contains(from);
        here.then_some((source, from))
    }

    /// Every layer that holds `chunk` of the layer's table now, for status and tests.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn holders(&self, layer: &Layer, chunk: ChunkNo) -> Result<Vec<(DiffId, ChunkNo)>, StoreError> {
        layer.check_chunk(chunk)?;
        let places = self.shared.catalogue.places(&layer.table().chunk_id(chunk))?;
        let found = places.into_iter().filter_map(|place| self.source(layer, chunk, place));
        Ok(found.map(|(source, from)| (source.diff_id(), from)).collect())
    }
}

/// Copies a chunk; whether it is present now.
fn copy_chunk(source: &Layer, from: ChunkNo, layer: &Layer, chunk: ChunkNo, way: Way) -> Result<bool, StoreError> {
    let (source_range, range) = (source.table().range(from), layer.table().range(chunk));
    let whole_blocks = [source_range.start, source_range.end, range.start, range.end]
        .iter()
        .all(|offset| offset.is_multiple_of(BLOCK_LEN_BYTES));
    if way == Way::Share && whole_blocks {
        let len_bytes = range.end - range.start;
        let copied = layer.fill(&(chunk.0..chunk.0 + 1), Access::Alone, |offset| {
            if !copy_range(source, source_range.start, layer, offset, len_bytes)? {
                return Ok(false);
            }
            // At most CHUNK_LEN_MAX_BYTES, which a chunk table promises.
            let mut bytes = vec![0; len_bytes as usize];
            layer.file().read_exact_at(&mut bytes, offset)?;
            Ok(layer.table().verify(chunk, Bytes::from(bytes)).is_ok())
        })?;
        if copied {
            return Ok(true);
        }
    }
    // Checks the source, and forgets it when it is damaged.
    match source.read_chunk(from)? {
        Some(bytes) => layer.put(chunk, &bytes).map(|()| true),
        None => Ok(false),
    }
}

/// Copies within the kernel, which shares blocks where the filesystem can; `false` when it cannot at all.
fn copy_range(source: &Layer, from: u64, layer: &Layer, to: u64, len_bytes: u64) -> io::Result<bool> {
    let (mut from, mut to, mut left) = (from, to, len_bytes);
    while left > 0 {
        match rustix::fs::copy_file_range(source.file(), Some(&mut from), layer.file(), Some(&mut to), left as usize) {
            Ok(0) => return Ok(false),
            Ok(copied) => left -= copied as u64,
            Err(rustix::io::Errno::INTR) => {}
            Err(
                rustix::io::Errno::OPNOTSUPP
                | rustix::io::Errno::NOSYS
                | rustix::io::Errno::XDEV
                | rustix::io::Errno::INVAL,
            ) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// Whether files of the filesystem that holds `file` can share blocks.
pub(crate) fn shares_blocks(file: &std::fs::File) -> bool {
    // The width of f_type differs between targets; the magic numbers have 32 bits.
    rustix::fs::fstatfs(file).is_ok_and(|stat| SHARING_FILESYSTEMS.contains(&(stat.f_type as u64 & 0xFFFF_FFFF)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fixture, Ramp, check, put};

    #[test]
    fn chunks_that_are_elsewhere_are_found_and_copied() {
        let fixture = Fixture::new();
        let store = fixture.open();
        let contents = [(11, 8192), (12, 65536), (13, 4096), (14, 700)];
        let one = Ramp::new(1, &contents);
        // Equal content at other offsets: the second layer begins with a chunk of its own.
        let two = Ramp::new(2, &[&[(21, 4096)], &contents[..]].concat());
        let (source, target) = (store.layer(&one.table).expect("opens"), store.layer(&two.table).expect("opens"));
        assert!(store.local_runs(&target).expect("looks").is_empty());
        assert!(!store.copy_local(&target, ChunkNo(2)).expect("nothing there"));
        for chunk in 0..4 {
            put(&source, &one, chunk);
        }
        assert_eq!(store.local_runs(&target).expect("looks"), Runs::one(1..5));
        assert_eq!(store.holders(&target, ChunkNo(2)).expect("looks"), vec![(source.diff_id(), ChunkNo(1))]);
        for chunk in 1..5 {
            assert!(store.copy_local(&target, ChunkNo(chunk)).expect("copies"));
        }
        assert!(!store.copy_local(&target, ChunkNo(0)).expect("its own"));
        assert_eq!(target.present(), Runs::one(1..5));
        check(&target, &two);
        assert_eq!(store.counters().copied_chunks.get(), 4);
    }

    #[test]
    fn a_layer_that_repeats_a_chunk_copies_it_within_itself() {
        let fixture = Fixture::new();
        let store = fixture.open();
        let ramp = Ramp::new(1, &[(7, 4096), (8, 512), (7, 4096)]);
        let layer = store.layer(&ramp.table).expect("opens");
        put(&layer, &ramp, 0);
        assert_eq!(store.local_runs(&layer).expect("looks"), Runs::one(2..3));
        assert!(store.copy_local(&layer, ChunkNo(2)).expect("copies"));
        check(&layer, &ramp);
    }

    #[test]
    fn both_ways_give_right_bytes_and_damage_is_found() {
        for way in [Way::Share, Way::Copy] {
            let fixture = Fixture::new();
            let store = fixture.open();
            let contents = [(1, 65536), (2, 65536)];
            let (one, two) = (Ramp::new(1, &contents), Ramp::new(2, &contents));
            let (source, target) = (store.layer(&one.table).expect("opens"), store.layer(&two.table).expect("opens"));
            put(&source, &one, 0);
            put(&source, &one, 1);
            assert!(copy_chunk(&source, ChunkNo(0), &target, ChunkNo(0), way).expect("copies"));
            check(&target, &two);
            source.file().write_all_at(b"rot", 65536 + 100).expect("damages");
            assert!(!copy_chunk(&source, ChunkNo(1), &target, ChunkNo(1), way).expect("refuses"));
            assert_eq!(target.present(), Runs::one(0..1));
            assert_eq!(source.present(), Runs::one(0..1), "the damaged chunk is forgotten");
            // What the refused copy has written is not seen, and a good put repairs it.
            put(&target, &two, 1);
            check(&target, &two);
        }
    }
}
