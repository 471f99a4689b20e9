//! zstd on the wire: contexts that are used again, and an effort that gives up on what does not shrink.
//!
//! At level 1 one core compresses about 500 MB/s and decompresses about 1.5 GB/s, so it pays below about 4 Gbit/s, and
//! only for chunks that shrink.

use bytes::Bytes;
use parking_lot::Mutex;
use zstd::bulk::{Compressor, Decompressor};

/// The fastest level with a real match finder.
const LEVEL: i32 = 1;
/// Most contexts kept of each kind; more are made and dropped. A compressor has about 0.6 MB, a decompressor 0.1 MB.
const KEPT_MAX: usize = 8;
/// A chunk travels compressed when it shrinks to this many tenths or less.
const WORTH_TENTHS: usize = 9;
/// After this many chunks in a row that did not shrink, chunks are skipped, at first as many.
const MISSES_BEFORE_SKIP: u32 = 4;
/// Longest skip: one try in this many chunks costs two percent of the time.
const SKIP_MAX: u32 = 64;

/// Compression contexts, shared by all streams of a node.
#[derive(Default)]
pub(crate) struct Codecs {
    compressors: Mutex<Vec<Compressor<'static>>>,
    decompressors: Mutex<Vec<Decompressor<'static>>>,
}

impl Codecs {
    /// `plain` compressed, if that saves more than a tenth.
    pub(crate) fn compress(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let kept = self.compressors.lock().pop();
        let mut compressor = match kept {
            Some(compressor) => compressor,
            None => Compressor::new(LEVEL).ok()?,
        };
        // What does not fit was not worth it, so zstd may stop there.
        let mut out = Vec::with_capacity(plain.len() * WORTH_TENTHS / 10);
        let worth = compressor.compress_to_buffer(plain, &mut out).is_ok();
        keep(&self.compressors, compressor);
        worth.then_some(out).filter(|out| out.len() <= plain.len() * WORTH_TENTHS / 10)
    }

    /// What `body` decompresses to, if that is exactly `len` bytes. Never allocates more than that.
    pub(crate) fn decompress(&self, body: &[u8], len: usize) -> Option<Bytes> {
        let kept = self.decompressors.lock().pop();
        let mut decompressor = match kept {
            Some(decompressor) => decompressor,
            None => Decompressor::new().ok()?,
        };
        let mut out = Vec::with_capacity(len);
        let result = decompressor.decompress_to_buffer(body, &mut out);
        keep(&self.decompressors, decompressor);
        (result.ok()? == len && out.len() == len).then(|| Bytes::from(out))
    }
}

fn keep<T>(pool: &Mutex<Vec<T>>, context: T) {
    let mut pool = pool.lock();
    if pool.len() < KEPT_MAX {
        pool.push(context);
    }
}

/// Whether to try the next chunk of one transfer, from how the last ones went.
#[derive(Debug, Default)]
pub(crate) struct Effort {
    misses: u32,
    skip: u32,
}

impl Effort {
    /// Whether to compress the next chunk.
    pub(crate) fn tries(&mut self) -> bool {
        self.skip = self.skip.saturating_sub(1);
        self.skip == 0
    }

    /// A chunk was tried.
    pub(crate) fn tried(&mut self, worth: bool) {
        self.misses = if worth { 0 } else { self.misses.saturating_add(1) };
        if self.misses >= MISSES_BEFORE_SKIP {
            self.skip = self.misses.saturating_mul(4).min(SKIP_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that do not shrink.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn only_what_shrinks_is_compressed_and_it_comes_back() {
        let codecs = Codecs::default();
        let text = b"a chunk that says the same again and again; ".repeat(1500);
        let body = codecs.compress(&text).expect("shrinks");
        assert!(body.len() * 10 < text.len());
        assert_eq!(codecs.decompress(&body, text.len()).expect("comes back"), text);
        assert_eq!(codecs.compress(&noise(65536)), None);
        assert_eq!(codecs.compress(&[]), None);
    }

    #[test]
    fn another_length_or_damage_is_refused() {
        let codecs = Codecs::default();
        let text = vec![7; 65536];
        let body = codecs.compress(&text).expect("shrinks");
        for len in [0, 1, 65535, 65537, 131_072] {
            assert_eq!(codecs.decompress(&body, len), None, "taken as {len} bytes");
        }
        assert_eq!(codecs.decompress(&body[..body.len() - 1], 65536), None);
        assert_eq!(codecs.decompress(&noise(500), 65536), None);
        assert_eq!(codecs.decompress(&[], 65536), None);
        // A bomb: 128 MiB of zeros in a few KiB.
        let bomb = zstd::bulk::compress(&vec![0; 128 << 20], 1).expect("compresses");
        assert_eq!(codecs.decompress(&bomb, 65536), None);
    }

    #[test]
    fn effort_is_saved_on_what_does_not_shrink_and_comes_back() {
        let mut effort = Effort::default();
        let tries = (0..1000)
            .filter(|_| {
                let tries = effort.tries();
                if tries {
                    effort.tried(false);
                }
                tries
            })
            .count();
        assert!((4..60).contains(&tries), "{tries} tries");
        while !effort.tries() {}
        effort.tried(true);
        assert!((0..100).all(|_| {
            let tries = effort.tries();
            effort.tried(true);
            tries
        }));
    }
}
