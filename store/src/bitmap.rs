//! A bitmap of chunks that is read without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use hermes_image::ids::ChunkRange;
use hermes_image::runs::Runs;

/// Chunks in one page of a bitmap as the catalogue keeps it. 512 bytes: an update of one chunk rewrites no more, and
/// the largest layer (2^24 chunks, 2 MiB of bits) has 4,096 pages.
pub(crate) const PAGE_CHUNKS: u32 = 4096;
/// Length of a page in bytes.
pub(crate) const PAGE_LEN_BYTES: usize = PAGE_CHUNKS as usize / 8;

/// A page that cannot be one of this bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PageError {
    #[error("a presence page has {0} bytes instead of {PAGE_LEN_BYTES}")]
    Length(usize),
    #[error("there is no presence page {0}")]
    Number(u32),
    #[error("presence page {0} names chunks beyond the last")]
    Beyond(u32),
}

/// One bit a chunk.
///
/// Setting a bit releases what was written before it and reading one acquires it, so whoever sees the bit sees the
/// `pwrite` that came before.
#[derive(Debug)]
pub(crate) struct AtomicBitmap {
    words: Box<[AtomicU64]>,
    len: u32,
}

impl AtomicBitmap {
    pub(crate) fn new(len: u32) -> Self {
        Self { words: (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), len }
    }

    pub(crate) fn contains(&self, chunk: u32) -> bool {
        chunk < self.len && self.words[chunk as usize / 64].load(Ordering::Acquire) & (1 << (chunk % 64)) != 0
    }

    /// Sets a bit; whether it was clear.
    pub(crate) fn set(&self, chunk: u32) -> bool {
        debug_assert!(chunk < self.len);
        let bit = 1 << (chunk % 64);
        self.words[chunk as usize / 64].fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// Clears a bit; whether it was set.
    pub(crate) fn clear(&self, chunk: u32) -> bool {
        debug_assert!(chunk < self.len);
        let bit = 1 << (chunk % 64);
        self.words[chunk as usize / 64].fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    pub(crate) fn contains_all(&self, range: ChunkRange) -> bool {
        self.next(range.start, range.end, false) >= range.end
    }

    /// The chunks of `range` whose bit is `wanted`. What lies beyond the last chunk belongs to neither.
    pub(crate) fn runs(&self, range: ChunkRange, wanted: bool) -> Runs {
        let end = range.end.min(self.len);
        let mut runs = Runs::new();
        let mut at = range.start;
        while at < end {
            let start = self.next(at, end, wanted);
            let stop = self.next(start, end, !wanted);
            runs.insert(start..stop);
            at = stop;
        }
        runs
    }

    /// The first chunk from `from` whose bit is `wanted`, or `end`.
    fn next(&self, from: u32, end: u32, wanted: bool) -> u32 {
        let mut at = from;
        while at < end {
            let Some(word) = self.words.get(at as usize / 64) else { break };
            let word = word.load(Ordering::Acquire);
            let left = if wanted { word } else { !word } >> (at % 64);
            if left != 0 {
                return (at + left.trailing_zeros()).min(end);
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    /// The page numbers that `runs` touches, in order.
    pub(crate) fn pages_of(runs: &Runs) -> Vec<u32> {
        let mut pages: Vec<u32> =
            runs.iter().flat_map(|run| run.start / PAGE_CHUNKS..=(run.end - 1) / PAGE_CHUNKS).collect();
        pages.dedup();
        pages
    }

    /// A page as the catalogue keeps it: little-endian words, zeros beyond the last chunk.
    pub(crate) fn page(&self, page: u32) -> [u8; PAGE_LEN_BYTES] {
        let mut bytes = [0; PAGE_LEN_BYTES];
        let first = page as usize * (PAGE_CHUNKS as usize / 64);
        for (word, out) in self.words.iter().skip(first).zip(bytes.chunks_exact_mut(8)) {
            out.copy_from_slice(&word.load(Ordering::Acquire).to_le_bytes());
        }
        bytes
    }

    /// Takes a page over from the catalogue.
    pub(crate) fn load_page(&self, page: u32, bytes: &[u8]) -> Result<(), PageError> {
        if bytes.len() != PAGE_LEN_BYTES {
            return Err(PageError::Length(bytes.len()));
        }
        if u64::from(page) * u64::from(PAGE_CHUNKS) >= u64::from(self.len) {
            return Err(PageError::Number(page));
        }
        let first = page * (PAGE_CHUNKS / 64);
        let word_of = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * at..8 * at + 8]);
            u64::from_le_bytes(word)
        };
        for at in 0..PAGE_CHUNKS / 64 {
            // Bits of this word that stand for chunks of the layer.
            let valid = self.len.saturating_sub((first + at) * 64).min(64);
            let mask = if valid == 64 { u64::MAX } else { (1 << valid) - 1 };
            if word_of(at as usize) & !mask != 0 {
                return Err(PageError::Beyond(page));
            }
        }
        for at in 0..PAGE_CHUNKS / 64 {
            if let Some(word) = self.words.get((first + at) as usize) {
                word.store(word_of(at as usize), Ordering::Release);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set(len in 1_u32..300, ops in proptest::collection::vec((any::<bool>(), 0_u32..300), 0..200),
                              from in 0_u32..320, count in 0_u32..320) {
            let bitmap = AtomicBitmap::new(len);
            let mut oracle = BTreeSet::new();
            for (set, chunk) in ops {
                let chunk = chunk % len;
                if set {
                    prop_assert_eq!(bitmap.set(chunk), oracle.insert(chunk));
                } else {
                    prop_assert_eq!(bitmap.clear(chunk), oracle.remove(&chunk));
                }
            }
            let end = (from + count).min(len);
            let set: Vec<u32> = (from..end).filter(|chunk| oracle.contains(chunk)).collect();
            let clear: Vec<u32> = (from..end).filter(|chunk| !oracle.contains(chunk)).collect();
            prop_assert_eq!(bitmap.runs(from..from + count, true).chunks().collect::<Vec<_>>(), set);
            prop_assert_eq!(bitmap.runs(from..from + count, false).chunks().collect::<Vec<_>>(), clear.clone());
            prop_assert_eq!(bitmap.contains_all(from.min(end)..end), clear.is_empty());
            let copy = AtomicBitmap::new(len);
            copy.load_page(0, &bitmap.page(0)).expect("its own page");
            prop_assert_eq!(copy.runs(0..len, true), bitmap.runs(0..len, true));
        }
    }

    #[test]
    fn pages_that_cannot_be_are_refused() {
        let bitmap = AtomicBitmap::new(PAGE_CHUNKS + 3);
        assert_eq!(bitmap.load_page(0, &[0; 3]), Err(PageError::Length(3)));
        assert_eq!(bitmap.load_page(2, &[0; PAGE_LEN_BYTES]), Err(PageError::Number(2)));
        let mut page = [0; PAGE_LEN_BYTES];
        page[0] = 0b1000;
        assert_eq!(bitmap.load_page(1, &page), Err(PageError::Beyond(1)));
        page[0] = 0b0101;
        bitmap.load_page(1, &page).expect("chunks of the layer");
        assert_eq!(bitmap.runs(0..u32::MAX, true), Runs::from_iter([4096..4097, 4098..4099]));
        assert_eq!(AtomicBitmap::pages_of(&Runs::from_iter([0..1, 5..4097, 9000..9001])), vec![0, 1, 2]);
    }
}
