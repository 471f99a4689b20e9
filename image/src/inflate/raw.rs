//! Raw deflate with zlib-rs: stop at block boundaries, resume in the middle of a stream.
//!
//! The only place of this crate that calls a C-shaped interface. zlib-rs offers what restart points need (stop at the
//! next block boundary, feed single bits, set the window) only through `libz-rs-sys`, whose functions take a raw
//! `z_stream`; [`RawInflate`] owns one and passes slices only.

#![allow(unsafe_code)] // libz-rs-sys mirrors zlib's C interface; see the module text.

use libz_rs_sys as z;
use thiserror::Error;

/// Why raw deflate data cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum RawError {
    /// The bits are no deflate stream.
    #[error("the deflate data is damaged")]
    Data,
    /// zlib could not allocate its state.
    #[error("out of memory for the inflate state")]
    Memory,
}

/// What one call of [`RawInflate::run`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RawStep {
    /// Bytes taken from the input.
    pub(super) consumed: usize,
    /// Bytes written to the output.
    pub(super) produced: usize,
    /// Where the decoder stands now.
    pub(super) state: RawState,
}

/// Where a decoder stands after a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RawState {
    /// Inside a block: more input or more room is wanted.
    InBlock,
    /// Just after a block that is not the last one.
    BlockEnd {
        /// How many of the high bits of the last consumed byte belong to the next block, 0 to 7.
        unused_bits: u8,
    },
    /// After the last block.
    StreamEnd,
}

/// A raw inflate state: 32 KiB of window and about 15 KiB of tables, reused by [`RawInflate::reset`].
pub(super) struct RawInflate {
    /// Boxed, because zlib's contract is that a stream does not move while it is in use.
    stream: Box<z::z_stream>,
}

// SAFETY: the stream's pointers lead to memory that this value alone owns (the state, allocated by the Rust allocator)
// or that is only looked at during `run` (input and output, both set afresh by each call). Nothing in it is bound to
// the thread that made it.
unsafe impl Send for RawInflate {}

impl RawInflate {
    /// A state at the start of a raw deflate stream.
    ///
    /// # Errors
    /// When memory is short.
    pub(super) fn new() -> Result<Self, RawError> {
        let mut stream = Box::new(z::z_stream::default());
        let len = i32::try_from(size_of::<z::z_stream>()).expect("a z_stream is about a hundred bytes");
        // SAFETY: `stream` is a valid, default-initialised z_stream with the Rust allocator's functions set; the
        // version string is the library's own and ends with a NUL byte.
        let code = unsafe { z::inflateInit2_(&raw mut *stream, -15, z::zlibVersion(), len) };
        if code == z::Z_OK { Ok(Self { stream }) } else { Err(RawError::Memory) }
    }

    /// Back to the start of a stream, keeping the memory.
    pub(super) fn reset(&mut self) {
        // SAFETY: the stream was initialised by `new` and not ended.
        let code = unsafe { z::inflateReset(&raw mut *self.stream) };
        debug_assert_eq!(code, z::Z_OK, "resetting an initialised state cannot fail");
    }

    /// Makes a fresh or reset state continue in the middle of a stream: `bits` bits (0 to 7) with the value `value`
    /// come before the next input byte, and `window` (at most 32 KiB) is the output just before.
    pub(super) fn resume(&mut self, bits: u8, value: u8, window: &[u8]) -> Result<(), RawError> {
        let window_len = u32::try_from(window.len()).map_err(|_| RawError::Data)?;
        // SAFETY: the stream was initialised by `new` and not ended.
        let mut code = unsafe { z::inflatePrime(&raw mut *self.stream, i32::from(bits), i32::from(value)) };
        if code == z::Z_OK && window_len > 0 {
            // SAFETY: as above; the pointer and length describe `window`, which zlib copies before it returns.
            code = unsafe { z::inflateSetDictionary(&raw mut *self.stream, window.as_ptr(), window_len) };
        }
        match code {
            z::Z_OK => Ok(()),
            z::Z_MEM_ERROR => Err(RawError::Memory),
            _ => Err(RawError::Data),
        }
    }

    /// Decodes until the input is used up, the output is full, or a block ends, whichever comes first.
    ///
    /// # Errors
    /// When the data is damaged. The state must be reset before it is used again.
    pub(super) fn run(&mut self, input: &[u8], output: &mut [u8]) -> Result<RawStep, RawError> {
        // zlib counts in 32 bits; what is beyond is left for the next call.
        let input_len = u32::try_from(input.len()).unwrap_or(u32::MAX);
        let output_len = u32::try_from(output.len()).unwrap_or(u32::MAX);
        self.stream.next_in = input.as_ptr();
        self.stream.avail_in = input_len;
        self.stream.next_out = output.as_mut_ptr();
        self.stream.avail_out = output_len;
        // SAFETY: the stream was initialised by `new` and not ended; next_in/avail_in and next_out/avail_out describe
        // the two slices, which outlive the call and do not overlap (one is borrowed mutably).
        let code = unsafe { z::inflate(&raw mut *self.stream, z::Z_BLOCK) };
        let consumed = (input_len - self.stream.avail_in) as usize;
        let produced = (output_len - self.stream.avail_out) as usize;
        // No pointer to the caller's memory outlives the call.
        self.stream.next_in = std::ptr::null();
        self.stream.next_out = std::ptr::null_mut();
        let data_type = self.stream.data_type;
        let state = match code {
            z::Z_STREAM_END => RawState::StreamEnd,
            // Bit 7: stopped just after a block's end. Bit 6: that block is the last one.
            z::Z_OK if data_type & 128 != 0 && data_type & 64 == 0 => {
                RawState::BlockEnd { unused_bits: (data_type & 7) as u8 }
            }
            // Z_BUF_ERROR only says that no progress was possible with what was given.
            z::Z_OK | z::Z_BUF_ERROR => RawState::InBlock,
            z::Z_MEM_ERROR => return Err(RawError::Memory),
            _ => return Err(RawError::Data),
        };
        Ok(RawStep { consumed, produced, state })
    }
}

impl Drop for RawInflate {
    fn drop(&mut self) {
        // SAFETY: the stream was initialised by `new`; this is the only place that ends it.
        unsafe { z::inflateEnd(&raw mut *self.stream) };
    }
}

/// Continues a CRC-32 (the one of gzip; starts at 0) over `bytes`.
pub(super) fn crc32(crc: u32, bytes: &[u8]) -> u32 {
    // SAFETY: pointer and length describe `bytes`.
    let crc = unsafe { z::crc32_z(crc.into(), bytes.as_ptr(), bytes.len()) };
    u32::try_from(crc).expect("a CRC-32 has 32 bits")
}

/// `bytes` as one gzip member. `memory_level` (1 to 9) sets the length of blocks: 2^(6 + level) symbols.
#[cfg(test)]
pub(crate) fn gzip(bytes: &[u8], level: i32, memory_level: i32) -> Vec<u8> {
    let mut stream = z::z_stream::default();
    let len = i32::try_from(size_of::<z::z_stream>()).expect("about a hundred bytes");
    let mut out = vec![0; bytes.len() + bytes.len() / 4 + 10_000];
    // SAFETY: `stream` is default-initialised with the Rust allocator's functions set, lives on this frame and does not
    // move between the calls; next_in and next_out describe `bytes` and `out`, which outlive them.
    unsafe {
        let code = z::deflateInit2_(&raw mut stream, level, z::Z_DEFLATED, 31, memory_level, 0, z::zlibVersion(), len);
        assert_eq!(code, z::Z_OK);
        stream.next_in = bytes.as_ptr();
        stream.avail_in = bytes.len() as u32;
        stream.next_out = out.as_mut_ptr();
        stream.avail_out = out.len() as u32;
        assert_eq!(z::deflate(&raw mut stream, z::Z_FINISH), z::Z_STREAM_END);
        out.truncate(stream.total_out as usize);
        z::deflateEnd(&raw mut stream);
    }
    out
}
