//! Windows: the up to 32 KiB of output before a deflate block that the data after it may refer to.
//!
//! Of a window a span refers to a tenth or so (measured: 2.5 to 3.4 KB of 32 KiB). Which bytes those are is found with
//! an ordinary inflate: the first 32 KiB after the restart point, which is as far as a reference can reach back into
//! the window, are decoded twice, with two made-up windows. In the first, the byte at *i* is the low byte of *i*; in the
//! second it is the high byte of *i* (7 bits), with the eighth bit chosen such that the two differ. A literal comes out
//! alike both times, and a byte that was copied from the window (however often it was copied on) comes out different,
//! as the two halves of its index.
//!
//! So the compressed data itself tells *where* the bytes belong, to the builder of an index and to its reader alike, and
//! only the bytes themselves are kept, in the order of the window. Where they belong would take nearly as much room
//! again (measured: 680 bytes beside 1,530 per window). A reader decodes 64 KiB more per span for it.
//!
//! When the data is such that the builder cannot tell (only data made for it is), the whole window is kept, and the
//! reader need not ask.

use std::sync::LazyLock;

use zstd_safe::{CCtx, CParameter, DCtx, get_error_name};

use super::InflateError;
use super::raw::{RawInflate, RawState};

/// Longest window in bytes: as far as deflate can refer back (RFC 1951, section 2).
pub const WINDOW_LEN_MAX_BYTES: usize = 32 * 1024;
/// So many compressed bytes after a restart point tell the use of its window, or nothing does. 32 KiB of output need no
/// more than a few bytes above 32 KiB, unless a blob is full of empty blocks.
pub const HEAD_LEN_MAX_BYTES: usize = 128 * 1024;

/// zstd level of packed windows: beyond it the time grows, not the gain (docs/decisions/0002-chunk-and-span-sizes.md).
const PACK_LEVEL: i32 = 9;

/// The two made-up windows.
static MADE_UP: LazyLock<[Box<[u8]>; 2]> = LazyLock::new(|| {
    let low = (0..WINDOW_LEN_MAX_BYTES).map(|i| i as u8).collect();
    let high = (0..WINDOW_LEN_MAX_BYTES).map(made_up_high).collect();
    [low, high]
});

/// The byte at `i` of the second made-up window: never the low byte of `i`.
fn made_up_high(i: usize) -> u8 {
    let marked = (i >> 8) as u8 | 0x80;
    if marked == i as u8 { marked & 0x7f } else { marked }
}

/// The place in the window whose bytes in the two made-up windows are `low` and `high`.
fn index_of(low: u8, high: u8) -> usize {
    usize::from(high & 0x7f) << 8 | usize::from(low)
}

/// Finds the bytes of a window that are referred to, from the compressed data after it, pushed in any portions.
pub struct UseFinder {
    rounds: [Round; 2],
    window_len: usize,
    output_len: usize,
}

/// One of the two decodings.
struct Round {
    inflate: RawInflate,
    decoded: Vec<u8>,
    len: usize,
    ended: bool,
}

impl Round {
    fn new() -> Result<Self, InflateError> {
        Ok(Self { inflate: RawInflate::new()?, decoded: vec![0; WINDOW_LEN_MAX_BYTES], len: 0, ended: false })
    }

    fn push(&mut self, mut input: &[u8], output_len: usize) -> Result<(), InflateError> {
        while !self.ended && self.len < output_len {
            let step = self.inflate.run(input, &mut self.decoded[self.len..output_len])?;
            input = &input[step.consumed..];
            self.len += step.produced;
            match step.state {
                RawState::StreamEnd => self.ended = true,
                RawState::InBlock if step.consumed == 0 && step.produced == 0 => return Ok(()),
                RawState::InBlock | RawState::BlockEnd { .. } => {}
            }
        }
        Ok(())
    }
}

impl UseFinder {
    /// A finder, which [`Self::start`] sets to work.
    ///
    /// # Errors
    /// When memory is short.
    pub fn new() -> Result<Self, InflateError> {
        Ok(Self { rounds: [Round::new()?, Round::new()?], window_len: 0, output_len: 0 })
    }

    /// Begins at a restart point: `bits` bits of the value `value` come before the first byte, and the window has
    /// `window_len` bytes. Only what the first `output_len` bytes of output refer to is asked for, 32 KiB at most.
    ///
    /// # Errors
    /// When memory is short, or the window too long.
    pub fn start(&mut self, bits: u8, value: u8, window_len: usize, output_len: usize) -> Result<(), InflateError> {
        self.window_len = window_len;
        self.output_len = output_len.min(WINDOW_LEN_MAX_BYTES);
        for (round, made_up) in self.rounds.iter_mut().zip(MADE_UP.iter()) {
            round.inflate.reset();
            round.inflate.resume(bits, value, made_up.get(..window_len).ok_or(InflateError::Deflate)?)?;
            (round.len, round.ended) = (0, false);
        }
        Ok(())
    }

    /// Takes more compressed data; whether the use is known now.
    ///
    /// # Errors
    /// When the data is damaged.
    pub fn push(&mut self, compressed: &[u8]) -> Result<bool, InflateError> {
        for round in &mut self.rounds {
            round.push(compressed, self.output_len)?;
        }
        Ok(self.rounds.iter().all(|round| round.ended || round.len == self.output_len))
    }

    /// The places in the window that the output so far refers to, in order.
    pub fn places(&self) -> Vec<usize> {
        let mut used = vec![false; self.window_len];
        let [low, high] = &self.rounds;
        for (low, high) in low.decoded[..low.len].iter().zip(&high.decoded[..high.len]) {
            if low != high
                && let Some(used) = used.get_mut(index_of(*low, *high))
            {
                *used = true;
            }
        }
        (0..used.len()).filter(|i| used[*i]).collect()
    }

    /// The bytes of `window` to keep, given the compressed data after it: those that are referred to, or all when that
    /// cannot be told.
    ///
    /// # Errors
    /// When memory is short, or the window too long.
    pub fn kept(&mut self, bits: u8, value: u8, window: &[u8], head: &[u8]) -> Result<Vec<u8>, InflateError> {
        self.start(bits, value, window.len(), WINDOW_LEN_MAX_BYTES)?;
        match self.push(head) {
            Ok(true) => Ok(self.places().into_iter().map(|place| window[place]).collect()),
            Ok(false) | Err(InflateError::Deflate) => Ok(window.to_vec()),
            Err(error) => Err(error),
        }
    }

    /// The window of which `kept` was kept, with zeros where nothing is referred to; `None` when the data refers to
    /// another number of bytes.
    pub fn fill(&self, kept: &[u8]) -> Option<Vec<u8>> {
        let places = self.places();
        if places.len() != kept.len() {
            return None;
        }
        let mut window = vec![0; self.window_len];
        for (place, byte) in places.into_iter().zip(kept) {
            window[place] = *byte;
        }
        Some(window)
    }
}

/// Packs the kept bytes of several windows.
///
/// # Errors
/// When memory is short.
pub fn pack(kept: &[u8]) -> Result<Vec<u8>, InflateError> {
    if kept.is_empty() {
        return Ok(Vec::new());
    }
    let refused = |code| InflateError::Zstd { reason: get_error_name(code) };
    let mut compressor = CCtx::try_create().ok_or(InflateError::Memory)?;
    // The seek table has the length and the BLAKE3 name.
    let level = CParameter::CompressionLevel(PACK_LEVEL);
    for parameter in [level, CParameter::ContentSizeFlag(false), CParameter::ChecksumFlag(false)] {
        compressor.set_parameter(parameter).map_err(refused)?;
    }
    let mut packed = Vec::with_capacity(zstd_safe::compress_bound(kept.len()));
    compressor.compress2(&mut packed, kept).map_err(refused)?;
    Ok(packed)
}

/// Unpacks what [`pack`] made of `len` bytes.
///
/// # Errors
/// When it is damaged, or of another length. No more than `len` bytes are allocated.
pub fn unpack(packed: &[u8], len: usize) -> Result<Vec<u8>, InflateError> {
    let mut kept = Vec::with_capacity(len);
    if !packed.is_empty() {
        DCtx::try_create()
            .ok_or(InflateError::Memory)?
            .decompress(&mut kept, packed)
            .map_err(|code| InflateError::Zstd { reason: get_error_name(code) })?;
    }
    if kept.len() == len { Ok(kept) } else { Err(InflateError::Truncated) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_windows_name_every_place_and_never_look_like_a_literal() {
        for i in 0..WINDOW_LEN_MAX_BYTES {
            let (low, high) = (i as u8, made_up_high(i));
            assert_ne!(low, high);
            assert_eq!(index_of(low, high), i);
        }
    }

    #[test]
    fn without_enough_input_the_whole_window_is_kept() {
        let window: Vec<u8> = (0..WINDOW_LEN_MAX_BYTES).map(|i| (i * 7 + i / 256) as u8).collect();
        let mut finder = UseFinder::new().expect("memory");
        for len in [1, 100, WINDOW_LEN_MAX_BYTES] {
            for head in [&[][..], &[0xff; 10]] {
                assert_eq!(finder.kept(3, 5, &window[..len], head).expect("memory"), window[..len]);
            }
        }
        assert!(finder.start(0, 0, WINDOW_LEN_MAX_BYTES + 1, 10).is_err());
    }

    #[test]
    fn packed_windows_come_back_and_damage_is_an_error_or_bounded() {
        let kept: Vec<u8> = (0..5000).map(|i| (i * 31 / 7) as u8).collect();
        let packed = pack(&kept).expect("packs");
        assert_eq!(unpack(&packed, kept.len()).expect("unpacks"), kept);
        assert!(unpack(&packed, kept.len() - 1).is_err());
        assert!(unpack(&packed, kept.len() + 1).is_err());
        assert!(pack(&[]).expect("nothing").is_empty());
        assert!(unpack(&[], 0).expect("nothing").is_empty());
        assert!(unpack(&[], 1).is_err());
        for at in 0..packed.len() {
            let mut damaged = packed.clone();
            damaged[at] ^= 0x55;
            if let Ok(unpacked) = unpack(&damaged, kept.len()) {
                assert_eq!(unpacked.len(), kept.len());
            }
            assert!(unpack(&packed[..at], kept.len()).is_err());
        }
    }
}
