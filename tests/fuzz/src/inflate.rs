//! Compressed streams.

use hermes_image::inflate::{Boundary, Compression, Decoder, InflateError, Resume};

use crate::mutate::Random;
use crate::parts::numbers;

/// More output than this is not asked for, in bytes: enough for 32 windows.
const OUTPUT_LEN_MAX_BYTES: usize = 1 << 20;
/// As far back as deflate refers, in bytes (RFC 1951, section 2).
const WINDOW_LEN_BYTES: usize = 32 * 1024;

pub(crate) struct Decoded {
    pub(crate) output: Vec<u8>,
    /// `None` when the output limit was reached first.
    pub(crate) end: Option<Result<(), InflateError>>,
    /// Restart points: input before, output before, and how to begin there.
    restarts: Vec<(usize, usize, Resume)>,
}

/// Decodes `input`, given in pieces of at most `piece` bytes, into buffers of `room` bytes.
pub(crate) fn decode(mut decoder: Decoder, input: &[u8], piece: usize, room: usize, limit: usize) -> Decoded {
    let mut decoded = Decoded { output: Vec::new(), end: None, restarts: Vec::new() };
    let mut buffer = vec![0; room];
    let mut consumed = 0;
    let mut given = input.len().min(piece);
    while decoded.output.len() < limit {
        let step = match decoder.step(&input[consumed..given], &mut buffer) {
            Ok(step) => step,
            Err(error) => {
                decoded.end = Some(Err(error));
                return decoded;
            }
        };
        assert!(step.consumed <= given - consumed && step.produced <= room, "a step took more than there was");
        consumed += step.consumed;
        decoded.output.extend_from_slice(&buffer[..step.produced]);
        if let Some(boundary) = step.boundary
            && decoded.restarts.len() < 256
        {
            decoded.restarts.push((consumed, decoded.output.len(), boundary));
        }
        if step.is_stuck() {
            if given == input.len() {
                let end = if consumed == given { decoder.finish() } else { Err(InflateError::Truncated) };
                decoded.end = Some(end);
                return decoded;
            }
            given = input.len().min(given + piece);
        }
    }
    decoded
}

fn any_cut_gives_the_same(compression: Compression, data: &[u8]) {
    let (seed, data) = numbers::<4>(data);
    let mut random = Random::new(u64::from(u32::from_le_bytes(seed)));
    let start = || Decoder::new(compression).expect("memory is not short");
    let whole = decode(start(), data, usize::MAX, 16 * 1024, OUTPUT_LEN_MAX_BYTES);
    let (piece, room) = ([1, 13, 4096][random.below(3)], [31, 1000, 40_000][random.below(3)]);
    let cut = decode(start(), data, piece, room, OUTPUT_LEN_MAX_BYTES);
    let common = whole.output.len().min(cut.output.len());
    assert_eq!(whole.output[..common], cut.output[..common], "{piece}, {room}");
    if let (Some(whole_end), Some(cut_end)) = (whole.end, cut.end) {
        assert_eq!(whole_end.is_ok(), cut_end.is_ok(), "{whole_end:?} {cut_end:?} in pieces of {piece} and {room}");
        assert!(whole_end.is_err() || whole.output.len() == cut.output.len());
    }
    if whole.restarts.is_empty() {
        return;
    }
    let (consumed, produced, resume) = whole.restarts[random.below(whole.restarts.len())];
    let window = match resume {
        Boundary::Start => &[],
        Boundary::Block { .. } => &whole.output[produced.saturating_sub(WINDOW_LEN_BYTES)..produced],
    };
    let resumed = Decoder::resume(compression, resume, window).expect("the decoder itself named this restart point");
    let resumed = decode(resumed, &data[consumed..], usize::MAX, 16 * 1024, OUTPUT_LEN_MAX_BYTES);
    let rest = &whole.output[produced..];
    let common = rest.len().min(resumed.output.len());
    assert_eq!(rest[..common], resumed.output[..common], "resumed at {consumed}");
    // The end of the last member is named, too, although nothing follows that could be decoded.
    if whole.end == Some(Ok(())) && consumed < data.len() {
        assert_eq!((resumed.end, resumed.output.len()), (Some(Ok(())), rest.len()), "resumed at {consumed}");
    }
}

/// Any bytes are gzip or an error; cuts and restart points change nothing about the output.
pub fn inflate_gzip(data: &[u8]) {
    any_cut_gives_the_same(Compression::Gzip, data);
}

/// Any bytes are zstd or an error; cuts and restart points change nothing about the output.
pub fn inflate_zstd(data: &[u8]) {
    any_cut_gives_the_same(Compression::Zstd, data);
}
