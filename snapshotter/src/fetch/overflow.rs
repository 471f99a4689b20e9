//! What the store could not take, kept in memory for the reads that come next.
//!
//! A registry is read by spans of several chunks, and a reader of a file wants one after the other. On a node whose store
//! is full of what other containers have open, only the chunk that somebody waits for would be used, and the span fetched
//! again for each of the others: a reader of whole files fetched 2.7 times what it read (measured, ten images side by side).
//! So the chunks that came last stay here, the oldest going first, whoever reads them.
//!
//! Bounded by [`OVERFLOW_MAX_BYTES`]. Nothing of it is present for anybody else: peers are not given it, and the catalogue
//! does not know it. It is gone with the process.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use hermes_image::ids::{ChunkNo, DiffId};
use hermes_image::runs::Runs;

use super::Delivered;

/// What is kept in memory at most, in bytes: 32 spans of 512 KiB, enough for as many readers at once.
pub(super) const OVERFLOW_MAX_BYTES: usize = 16 << 20;

/// A chunk and the number of its arrival.
#[derive(Debug)]
struct Kept {
    arrival: u64,
    bytes: Bytes,
}

/// The chunks that came last.
#[derive(Debug, Default)]
pub(super) struct Overflow {
    chunks: BTreeMap<(DiffId, u32), Kept>,
    /// Arrivals, the oldest first; those of chunks that came again or went are skipped.
    order: VecDeque<(u64, DiffId, u32)>,
    next_arrival: u64,
    len_bytes: usize,
}

impl Overflow {
    /// Keeps chunks of `layer` that the store has just refused.
    pub(super) fn keep(&mut self, layer: DiffId, chunks: &[(ChunkNo, Bytes)]) {
        for (chunk, bytes) in chunks {
            let arrival = self.next_arrival;
            self.next_arrival += 1;
            self.order.push_back((arrival, layer, chunk.0));
            self.len_bytes += bytes.len();
            let before = self.chunks.insert((layer, chunk.0), Kept { arrival, bytes: bytes.clone() });
            self.len_bytes -= before.map_or(0, |before| before.bytes.len());
        }
        // Stale arrivals are fewer than chunks that came, and go with the turn of their age.
        while self.len_bytes > OVERFLOW_MAX_BYTES
            && let Some((arrival, layer, chunk)) = self.order.pop_front()
        {
            if self.chunks.get(&(layer, chunk)).is_some_and(|kept| kept.arrival == arrival) {
                self.remove(layer, chunk);
            }
        }
        if self.order.len() > 2 * self.chunks.len() {
            let chunks = &self.chunks;
            self.order.retain(|(arrival, layer, chunk)| {
                chunks.get(&(*layer, *chunk)).is_some_and(|kept| kept.arrival == *arrival)
            });
        }
    }

    /// Gives what is here of `wanted`. Says what is not.
    pub(super) fn give(&self, layer: DiffId, wanted: &Runs, to: &mut Delivered) -> Runs {
        let mut missing = wanted.clone();
        for run in wanted.iter() {
            for ((_, chunk), kept) in self.chunks.range((layer, run.start)..(layer, run.end)) {
                to.chunks.insert(*chunk, kept.bytes.clone());
                missing.remove(*chunk..*chunk + 1);
            }
        }
        missing
    }

    /// Forgets a layer that is closed.
    pub(super) fn forget(&mut self, layer: DiffId) {
        let chunks: Vec<u32> =
            self.chunks.range((layer, 0)..=(layer, u32::MAX)).map(|((_, chunk), _)| *chunk).collect();
        chunks.into_iter().for_each(|chunk| self.remove(layer, chunk));
    }

    fn remove(&mut self, layer: DiffId, chunk: u32) {
        let kept = self.chunks.remove(&(layer, chunk));
        self.len_bytes -= kept.map_or(0, |kept| kept.bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: DiffId = DiffId([1; 32]);
    const OTHER: DiffId = DiffId([2; 32]);
    const CHUNK: usize = 64 << 10;

    fn chunk(number: u32) -> (ChunkNo, Bytes) {
        (ChunkNo(number), Bytes::from(vec![number as u8; CHUNK]))
    }

    fn given(overflow: &Overflow, layer: DiffId, wanted: Runs) -> (Vec<u32>, Runs) {
        let mut delivered = Delivered::default();
        let missing = overflow.give(layer, &wanted, &mut delivered);
        for (number, bytes) in &delivered.chunks {
            assert_eq!(*bytes, chunk(*number).1, "chunk {number}");
        }
        (delivered.chunks.into_keys().collect(), missing)
    }

    #[test]
    fn what_came_last_is_given_to_its_layer() {
        let mut overflow = Overflow::default();
        overflow.keep(LAYER, &[chunk(3), chunk(4), chunk(9)]);
        assert_eq!(given(&overflow, LAYER, Runs::one(0..6)), (vec![3, 4], Runs::from_iter([0..3, 5..6])));
        assert_eq!(given(&overflow, LAYER, Runs::one(3..5)), (vec![3, 4], Runs::new()));
        assert_eq!(given(&overflow, OTHER, Runs::one(3..5)), (vec![], Runs::one(3..5)));
        overflow.keep(OTHER, &[chunk(3)]);
        overflow.forget(LAYER);
        assert_eq!(given(&overflow, LAYER, Runs::one(0..10)), (vec![], Runs::one(0..10)));
        assert_eq!(given(&overflow, OTHER, Runs::one(3..4)), (vec![3], Runs::new()));
        assert_eq!(overflow.len_bytes, CHUNK);
    }

    #[test]
    fn the_oldest_goes_first_and_the_bound_holds() {
        let mut overflow = Overflow::default();
        let full = (OVERFLOW_MAX_BYTES / CHUNK) as u32;
        for number in 0..full {
            overflow.keep(LAYER, &[chunk(number)]);
        }
        // Chunk 0 comes again, so 1 is the oldest.
        overflow.keep(LAYER, &[chunk(0)]);
        assert_eq!(overflow.len_bytes, OVERFLOW_MAX_BYTES);
        overflow.keep(LAYER, &[chunk(full)]);
        assert_eq!(given(&overflow, LAYER, Runs::one(0..3)), (vec![0, 2], Runs::one(1..2)));
        for _ in 0..10 * full {
            overflow.keep(LAYER, &[chunk(7)]);
        }
        assert!(overflow.order.len() <= 2 * overflow.chunks.len() && overflow.len_bytes <= OVERFLOW_MAX_BYTES);
    }
}
