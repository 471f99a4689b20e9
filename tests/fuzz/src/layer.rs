//! Whole layers: building the index from a blob, and getting chunks back out of it.

use bytes::Bytes;
use hermes_image::build::{Expect, LayerBuilder, LayerIndex, Options, SpanLimits};
use hermes_image::ids::{DiffId, LayerId, SpanNo};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::index::seek::SeekTable;
use hermes_image::index::toc::Toc;
use hermes_image::inflate::{Compression, Decoder};
use hermes_image::span::SpanDecoder;
use sha2::{Digest as _, Sha256};

use crate::inflate::decode;
use crate::parts::{numbers, split};
use crate::tar::{seal, toc_of};

/// Longest tar stream that the target's builders take, in bytes: some twenty spans of the length below, or more.
pub(crate) const LOGICAL_LEN_MAX_BYTES: usize = 2 << 20;
/// Spans far shorter than in production, so that small inputs have several.
const SPANS: SpanLimits =
    SpanLimits { min_len_bytes: 32 * 1024, max_len_bytes: 64 * 1024, joined_len_bytes: 96 * 1024 };

/// CRC-32 as gzip has it (RFC 1952, section 8), bit by bit: it is needed for small inputs only.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// A gzip member around deflate data, with the trailer that fits it, should the data be sound.
fn gzip_member(deflate: &[u8]) -> Vec<u8> {
    let mut member = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    member.extend_from_slice(deflate);
    let decoder = Decoder::new(Compression::Gzip).expect("memory is not short");
    let plain = decode(decoder, &member, usize::MAX, 64 * 1024, LOGICAL_LEN_MAX_BYTES).output;
    member.extend_from_slice(&crc32(&plain).to_le_bytes());
    member.extend_from_slice(&(plain.len() as u32).to_le_bytes());
    member
}

/// gzip with stored blocks only, of `piece` bytes each.
fn stored(plain: &[u8], piece: usize) -> Vec<u8> {
    let mut deflate = Vec::new();
    for block in plain.chunks(piece) {
        let len = block.len() as u16;
        deflate.push(0);
        deflate.extend_from_slice(&len.to_le_bytes());
        deflate.extend_from_slice(&(!len).to_le_bytes());
        deflate.extend_from_slice(block);
    }
    deflate.extend_from_slice(&[1, 0, 0, 0xff, 0xff]);
    gzip_member(&deflate)
}

/// The blob that an input stands for: itself, or what is packed so that damage gets past the packing's own checks.
fn blob_of(data: &[u8]) -> Vec<u8> {
    let ([kind], rest) = numbers::<1>(data);
    match kind % 6 {
        0 => rest.to_vec(),
        1 => gzip_member(rest),
        2 => stored(&seal(rest), 1 + 257 * usize::from(kind)),
        3 => zstd::bulk::compress(&seal(rest), 1).unwrap_or_default(),
        // Two members, or two frames.
        4 => {
            let (first, second) = rest.split_at(rest.len() / 2);
            [stored(first, 10_000), stored(second, 10_000)].concat()
        }
        _ => seal(rest),
    }
}

/// The whole content of a blob, if it is sound and not too long.
fn content(blob: &[u8]) -> Option<Vec<u8>> {
    let decoder = Decoder::new(Compression::detect(blob)).expect("memory is not short");
    let decoded = decode(decoder, blob, usize::MAX, 64 * 1024, LOGICAL_LEN_MAX_BYTES + 1);
    (decoded.end == Some(Ok(())) && decoded.output.len() <= LOGICAL_LEN_MAX_BYTES).then_some(decoded.output)
}

fn build(blob: &[u8], diff_id: DiffId, piece: usize) -> Option<LayerIndex> {
    let layer = LayerId(Sha256::digest(blob).into());
    let expect = Expect { layer, diff_id, compressed_len_bytes: blob.len() as u64 };
    let options = Options { threads: 1, logical_len_max_bytes: LOGICAL_LEN_MAX_BYTES as u64, spans: SPANS };
    let mut builder = LayerBuilder::new(expect, options).expect("one thread needs nothing");
    for piece in blob.chunks(piece) {
        builder.push(piece).ok()?;
    }
    builder.finish().ok()
}

/// A layer has an index exactly when its blob unpacks and its content is a tar that can be unpacked; and every span of
/// that index gives the very bytes of the layer.
pub fn layer_builder(data: &[u8]) {
    let blob = blob_of(data);
    let content = content(&blob);
    let diff_id = DiffId(content.as_deref().map_or([0; 32], |content| Sha256::digest(content).into()));
    let index = build(&blob, diff_id, usize::MAX);
    let toc = content.as_deref().and_then(|content| toc_of(content, diff_id).ok());
    assert_eq!(index.as_ref().map(|index| index.toc.id()), toc.map(|toc| toc.id()));
    let (Some(index), Some(content)) = (index, content) else { return };
    let again = build(&blob, diff_id, 777).expect("the same blob in other pieces");
    assert_eq!(
        (again.chunks.id(), again.seek.id(), again.seek.windows_id()),
        (index.chunks.id(), index.seek.id(), index.seek.windows_id()),
        "the index depends on how the blob was pushed"
    );
    assert!(Toc::decode(index.toc.bytes().clone()).is_ok());
    let chunks = ChunkTable::decode(index.chunks.bytes().clone()).expect("what the builder writes, the decoder takes");
    let seek = SeekTable::decode(index.seek.bytes().clone()).expect("what the builder writes, the decoder takes");
    assert_eq!(chunks.logical_len_bytes(), content.len() as u64);
    for span in (0..seek.count()).map(SpanNo) {
        check_span(&index, &seek, &chunks, span, &blob, &content);
    }
}

fn check_span(index: &LayerIndex, seek: &SeekTable, chunks: &ChunkTable, span: SpanNo, blob: &[u8], content: &[u8]) {
    let window = seek.window_range(span);
    let window = index.windows.slice(window.start as usize..window.end as usize);
    let window = seek.verify_window(span, window).expect("the builder's own window");
    let entry = seek.span(span);
    let mut decoder = SpanDecoder::new(seek, chunks, span, &window).expect("the builder's own span");
    let mut out = Vec::new();
    decoder.push(&blob[entry.blob.start as usize..entry.blob.end as usize], &mut out).expect("the span's own bytes");
    decoder.finish().expect("the span's bytes make all of its chunks");
    assert!(out.iter().map(|(chunk, _)| chunk.0).eq(entry.chunks));
    for (chunk, bytes) in out {
        let range = chunks.range(chunk);
        assert_eq!(bytes[..], content[range.start as usize..range.end as usize]);
    }
}

/// Any tables, windows and compressed bytes give verified chunks or an error, and the same chunks however the bytes are
/// cut.
pub fn span_decoder(data: &[u8]) {
    let ([first, count, piece], data) = numbers::<3>(data);
    let [seek, chunks, window, compressed] = split::<4>(data);
    let Ok(seek) = SeekTable::decode(Bytes::copy_from_slice(seek)) else { return };
    let Ok(chunks) = ChunkTable::decode(Bytes::copy_from_slice(chunks)) else { return };
    let spans = u32::from(first)..u32::from(first) + u32::from(count);
    let decode = |piece: usize| {
        let mut decoder = SpanDecoder::run(&seek, &chunks, spans.clone(), window).map_err(|error| error.to_string())?;
        let mut out = Vec::new();
        let mut result = Ok(());
        for piece in compressed.chunks(piece) {
            result = decoder.push(piece, &mut out);
            if result.is_err() {
                assert_eq!(decoder.push(piece, &mut out), result, "a failed decoder changed its mind");
                break;
            }
        }
        let is_done = decoder.is_done();
        let end = decoder.finish();
        assert_eq!(end.is_ok(), is_done && result.is_ok());
        Ok::<_, String>((out, is_done))
    };
    let whole = decode(usize::MAX);
    if let Ok((out, is_done)) = &whole {
        let first_chunk = seek.span(SpanNo(spans.start)).chunks.start;
        assert!(out.iter().zip(first_chunk..).all(|((chunk, _), expected)| chunk.0 == expected));
        for (chunk, bytes) in out {
            let range = chunks.range(*chunk);
            assert_eq!(bytes.len() as u64, range.end - range.start);
        }
        let wanted = seek.span(SpanNo(spans.end - 1)).chunks.end - first_chunk;
        assert_eq!(*is_done, out.len() as u32 == wanted);
    }
    let cut = decode(1 + usize::from(piece));
    assert_eq!(cut.is_ok(), whole.is_ok());
    let (Ok((cut, _)), Ok((whole, _))) = (cut, whole) else { return };
    // Where damage shows may depend on the cut (zstd's checksum behind the last chunk, for one), but never what a chunk is.
    assert!(cut.iter().zip(&whole).all(|(cut, whole)| cut == whole), "in pieces of {}", u32::from(piece) + 1);
}
