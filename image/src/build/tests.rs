use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::ids::{ChunkId, SpanNo};
use crate::inflate::gzip;
use crate::span::{SpanDecoder, SpanError};

/// A tar of regular files, ustar headers, with the usual end.
fn tar_of(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut tar = Vec::new();
    for (path, data) in files {
        let mut header = [0_u8; 512];
        header[..path.len()].copy_from_slice(path.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[108..116].copy_from_slice(b"0000000\0");
        header[116..124].copy_from_slice(b"0000000\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[148..156].fill(b' ');
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.extend_from_slice(&header);
        tar.extend_from_slice(data);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize((tar.len() + 1024).next_multiple_of(10_240), 0);
    tar
}

/// Bytes that compress about as well as programs do: words, repetitions from near and far, noise.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut draw = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 20) as usize
    };
    let mut bytes: Vec<u8> = Vec::with_capacity(len + 400);
    while bytes.len() < len {
        let run = 4 + draw() % 300;
        match draw() % 4 {
            0 => bytes.extend((0..run).map(|_| draw() as u8)),
            1 | 2 if bytes.len() > 400 => {
                let start = bytes.len() - 1 - draw() % bytes.len().min(32_000);
                bytes.extend_from_within(start..bytes.len().min(start + run));
            }
            _ => bytes.extend(format!("a line of {run} words, number {}\n", draw() % 1000).bytes()),
        }
    }
    bytes.truncate(len);
    bytes
}

/// About `len` bytes of small files and some large ones.
fn files(seed: u64, len: usize) -> Vec<(String, Vec<u8>)> {
    let (mut files, mut total, mut no) = (Vec::new(), 0, 0_u64);
    while total < len {
        let lens = [700, 0, 5000, 20_000, 90_000, 300, 250_000, 12_000, 65_536, 3000];
        let file_len = lens[(seed.wrapping_add(no) % 10) as usize] + (no * 37 % 1000) as usize;
        files.push((format!("usr/share/thing/{no}.dat"), content(seed ^ no, file_len)));
        total += file_len + 1024;
        no += 1;
    }
    files
}

fn expect_of(blob: &[u8], tar: &[u8]) -> Expect {
    Expect {
        layer: LayerId(Sha256::digest(blob).into()),
        diff_id: DiffId(Sha256::digest(tar).into()),
        compressed_len_bytes: blob.len() as u64,
    }
}

/// Short spans, so that small layers have many.
fn options(threads: usize) -> Options {
    let spans = SpanLimits { min_len_bytes: 64 * 1024, max_len_bytes: 160 * 1024, joined_len_bytes: 0 };
    Options { threads, spans, ..Options::default() }
}

fn build(blob: &[u8], expect: Expect, options: Options, portion: usize) -> Result<LayerIndex, BuildError> {
    let mut builder = LayerBuilder::new(expect, options)?;
    for bytes in blob.chunks(portion) {
        builder.push(bytes)?;
    }
    builder.finish()
}

fn window_of(index: &LayerIndex, span: u32) -> Bytes {
    let range = index.seek.window_range(SpanNo(span));
    let window = index.windows.slice(range.start as usize..range.end as usize);
    index.seek.verify_window(SpanNo(span), window).expect("the right window").into_inner()
}

fn decode_run(
    index: &LayerIndex,
    blob: &[u8],
    spans: std::ops::Range<u32>,
    portion: usize,
) -> Result<Vec<(ChunkNo, Verified<Bytes>)>, SpanError> {
    let range = index.seek.blob_range(spans.clone());
    let mut decoder = SpanDecoder::run(&index.seek, &index.chunks, spans.clone(), &window_of(index, spans.start))?;
    let mut chunks = Vec::new();
    for bytes in blob[range.start as usize..range.end as usize].chunks(portion) {
        decoder.push(bytes, &mut chunks)?;
    }
    decoder.finish().map(|()| chunks)
}

/// Every chunk through the seek table, the last span first, each from exactly the bytes that the table names.
fn assert_all_decodes(index: &LayerIndex, blob: &[u8], tar: &[u8], what: &str) {
    assert_eq!(index.chunks.logical_len_bytes(), tar.len() as u64, "{what}");
    let mut seen = 0;
    for span in (0..index.seek.count()).rev() {
        for portion in [usize::MAX, 1000] {
            let chunks =
                decode_run(index, blob, span..span + 1, portion).unwrap_or_else(|error| panic!("{what}: {error}"));
            let numbers: Vec<u32> = chunks.iter().map(|(chunk, _)| chunk.0).collect();
            assert_eq!(numbers, Vec::from_iter(index.seek.span(SpanNo(span)).chunks), "{what}");
            for (chunk, bytes) in chunks {
                let range = index.chunks.range(chunk);
                assert!(bytes[..] == tar[range.start as usize..range.end as usize], "{what}: chunk {chunk}");
                seen += 1;
            }
        }
    }
    assert_eq!(seen, 2 * index.chunks.count(), "{what}");
}

/// The same tar in all the ways that layers come.
fn blobs_of(tar: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let (first, rest) = tar.split_at(tar.len() / 3);
    let frames = |len: usize| tar.chunks(len).flat_map(zstd).collect();
    let skippable = [0x5a, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4];
    vec![
        ("plain", tar.to_vec()),
        ("gzip stored", gzip(tar, 0, 8)),
        ("gzip 1", gzip(tar, 1, 8)),
        ("gzip 6", gzip(tar, 6, 8)),
        ("gzip 9", gzip(tar, 9, 9)),
        ("gzip, tiny blocks", gzip(tar, 6, 1)),
        ("gzip, two members", [gzip(first, 6, 8), gzip(rest, 9, 4)].concat()),
        ("gzip, many members", tar.chunks(30_000).flat_map(|part| gzip(part, 6, 8)).collect()),
        ("zstd", zstd(tar)),
        ("zstd, frames", frames(50_000)),
        ("zstd, small frames", frames(1000)),
        ("zstd, skippable frames", [&skippable[..], &zstd(first), &skippable, &zstd(rest), &skippable].concat()),
    ]
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ::zstd::bulk::compress(bytes, 3).expect("compresses")
}

#[test]
fn every_chunk_comes_back_from_every_kind_of_blob() {
    let tar = tar_of(&files(1, 2_000_000));
    let mut tables: Vec<Bytes> = Vec::new();
    for (what, blob) in blobs_of(&tar) {
        let index = build(&blob, expect_of(&blob, &tar), options(1), usize::MAX).expect(what);
        assert_all_decodes(&index, &blob, &tar, what);
        let count = index.seek.count();
        // One frame is one span, and so is one block, which zlib-rs makes of a whole stream at level 1.
        assert_eq!(count == 1, matches!(what, "zstd" | "gzip 1"), "{what}: {count} spans");
        for run in [0..count, count / 3..count, 0..count.div_ceil(2)] {
            let chunks = decode_run(&index, &blob, run.clone(), 777).expect(what);
            assert_eq!(
                chunks.len(),
                (index.seek.span(SpanNo(run.end - 1)).chunks.end - index.seek.span(SpanNo(run.start)).chunks.start)
                    as usize
            );
        }
        tables.push(index.chunks.bytes().clone());
    }
    assert!(tables.windows(2).all(|pair| pair[0] == pair[1]), "chunks depend on the compression");
}

#[test]
fn the_index_depends_on_the_blob_only() {
    let tar = tar_of(&files(2, 1_500_000));
    for (what, blob) in blobs_of(&tar) {
        let expect = expect_of(&blob, &tar);
        let one = build(&blob, expect, options(1), usize::MAX).expect(what);
        for (threads, portion) in [(1, 1013), (4, usize::MAX), (2, 70_000)] {
            let other = build(&blob, expect, options(threads), portion).expect(what);
            assert_eq!(other.seek.id(), one.seek.id(), "{what}");
            assert_eq!(other.windows, one.windows, "{what}");
            assert_eq!(other.chunks.id(), one.chunks.id(), "{what}");
            assert_eq!(other.toc.id(), one.toc.id(), "{what}");
        }
        let read = SeekTable::decode(one.seek.bytes().clone()).expect("decodes");
        assert_eq!(read.id(), one.seek.id());
    }
}

fn has_few_restarts(what: &str) -> bool {
    matches!(what, "zstd" | "zstd, skippable frames" | "gzip 1")
}

#[test]
fn spans_keep_their_length_where_the_blob_has_restart_points() {
    let tar = tar_of(&files(3, 3_000_000));
    for (what, blob) in blobs_of(&tar).into_iter().filter(|(what, _)| !has_few_restarts(what)) {
        let index = build(&blob, expect_of(&blob, &tar), options(1), usize::MAX).expect(what);
        let limits = options(1).spans;
        let lens: Vec<u64> = index
            .seek
            .spans()
            .map(|span| index.chunks.run_range(span.chunks))
            .map(|range| range.end - range.start)
            .collect();
        let (_, all_but_last) = lens.split_last().expect("spans");
        // Blocks of gzip may be longer than these spans; nothing else makes one longer, nothing a shorter one.
        let limit = if what.starts_with("gzip") { 4 * limits.max_len_bytes } else { limits.max_len_bytes };
        assert!(all_but_last.iter().all(|len| (limits.min_len_bytes..=limit).contains(len)), "{what}: {lens:?}");
        let read: u64 = index.seek.spans().map(|span| span.blob.end - span.blob.start).sum();
        assert!(read < 2 * blob.len() as u64, "{what}: {read} bytes in all spans of {}", blob.len());
    }
}

#[test]
fn joined_spans_decode_alone() {
    let tar = tar_of(&files(5, 3_000_000));
    let joining =
        |joined_len_bytes| Options { spans: SpanLimits { joined_len_bytes, ..options(1).spans }, ..options(1) };
    for (what, blob) in blobs_of(&tar) {
        let counts = [0, 400 * 1024].map(|joined| {
            let index = build(&blob, expect_of(&blob, &tar), joining(joined), usize::MAX).expect(what);
            assert_all_decodes(&index, &blob, &tar, what);
            index.seek.count()
        });
        match what {
            "gzip 6" => assert!(counts[1] < counts[0], "{what}: {counts:?}"),
            "plain" => assert_eq!(counts[1], counts[0], "cheap"),
            _ => {}
        }
    }
}

#[test]
fn a_sink_gets_every_chunk_in_order() {
    let tar = tar_of(&files(4, 700_000));
    let blob = gzip(&tar, 6, 8);
    for threads in [1, 2] {
        let got = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&got);
        let take: ChunkSink = Box::new(move |chunk, bytes| {
            sink.lock().expect("not poisoned").push((chunk, bytes));
            Ok(())
        });
        let mut builder = LayerBuilder::with_sink(expect_of(&blob, &tar), options(threads), take).expect("starts");
        builder.push(&blob).expect("goes well");
        let index = builder.finish().expect("builds");
        let got = got.lock().expect("not poisoned");
        assert_eq!(got.len(), index.chunks.count() as usize);
        for (at, (chunk, bytes)) in got.iter().enumerate() {
            assert_eq!(chunk.0 as usize, at);
            assert_eq!(ChunkId::of(bytes), index.chunks.chunk_id(*chunk));
        }
    }
}

#[test]
fn what_is_not_the_expected_layer_is_refused_with_both_names() {
    let tar = tar_of(&files(5, 400_000));
    let blob = gzip(&tar, 6, 8);
    let right = expect_of(&blob, &tar);
    for threads in [1, 2] {
        let fails = |expect: Expect, blob: &[u8]| build(blob, expect, options(threads), 4096).expect_err("is refused");
        let other = LayerId([9; 32]);
        let error = fails(Expect { layer: other, ..right }, &blob);
        assert!(
            matches!(error, BuildError::BlobDigest { expected, actual } if expected == other && actual == right.layer)
        );
        let other = DiffId([9; 32]);
        let error = fails(Expect { diff_id: other, ..right }, &blob);
        assert!(
            matches!(error, BuildError::DiffId { expected, actual, .. } if expected == other && actual == right.diff_id)
        );
        let error = fails(right, &blob[..blob.len() - 1]);
        assert!(matches!(error, BuildError::BlobLength { .. }), "{error}");
        let error = fails(right, &[&blob[..], b"x"].concat());
        assert!(matches!(error, BuildError::BlobLength { .. }), "{error}");
        let garbage = [&blob[..], b"garbage"].concat();
        let error = fails(expect_of(&garbage, &tar), &garbage);
        assert!(
            matches!(error, BuildError::Inflate { source: InflateError::GzipHeader { after_member: true }, .. }),
            "{error}"
        );
        let cut = &blob[..blob.len() - 9];
        let error = fails(expect_of(cut, &tar), cut);
        assert!(matches!(error, BuildError::Inflate { source: InflateError::Truncated, .. }), "{error}");
        let mut damaged = blob.clone();
        damaged[blob.len() / 2] ^= 4;
        let error = fails(right, &damaged);
        assert!(
            matches!(error, BuildError::Inflate { .. } | BuildError::Tar(_) | BuildError::BlobDigest { .. }),
            "{error}"
        );
        let no_tar = gzip(&content(1, 5000), 6, 8);
        assert!(matches!(fails(expect_of(&no_tar, b""), &no_tar), BuildError::Tar(_)));
    }
}

#[test]
fn a_bomb_stops_at_the_limit() {
    let zeros = vec![0; 20 << 20];
    for blob in [gzip(&zeros, 9, 8), zstd(&zeros)] {
        for threads in [1, 2] {
            let limited = Options { logical_len_max_bytes: 1 << 20, ..options(threads) };
            let error = build(&blob, expect_of(&blob, &zeros), limited, 100).expect_err("too long");
            assert!(matches!(error, BuildError::TooLong { limit_bytes: 1_048_576 }), "{error}");
        }
    }
}

#[test]
fn a_builder_may_be_dropped_or_used_after_an_error() {
    let tar = tar_of(&files(6, 400_000));
    let blob = gzip(&tar, 6, 8);
    for threads in [1, 2] {
        let mut builder = LayerBuilder::new(expect_of(&blob, &tar), options(threads)).expect("starts");
        builder.push(&blob[..blob.len() / 2]).expect("goes well");
        drop(builder);
        let no_gzip = [&blob[..10], &vec![0xff; 400_000]].concat();
        let mut builder = LayerBuilder::new(expect_of(&no_gzip, &tar), options(threads)).expect("starts");
        let failed = no_gzip.chunks(1000).find_map(|bytes| builder.push(bytes).err());
        let after = builder.push(b"");
        if failed.is_some() {
            assert!(after.is_ok(), "nothing was pushed, nothing fails");
            assert!(matches!(builder.finish(), Err(BuildError::BlobLength { .. } | BuildError::Failed)));
        } else {
            assert!(builder.finish().is_err());
        }
    }
}

#[test]
fn a_sink_that_fails_ends_the_build_and_says_why() {
    let tar = tar_of(&files(7, 900_000));
    let blob = gzip(&tar, 6, 8);
    for threads in [1, 2] {
        let sink: ChunkSink = Box::new(|chunk, _| if chunk.0 < 2 { Ok(()) } else { Err("the disk is full".into()) });
        let mut builder = LayerBuilder::with_sink(expect_of(&blob, &tar), options(threads), sink).expect("starts");
        let pushed = blob.chunks(10_000).try_for_each(|bytes| builder.push(bytes));
        let error = pushed.err().or_else(|| builder.finish().err()).expect("fails");
        assert!(matches!(error, BuildError::Sink(_)), "{error}");
        assert!(error.to_string().contains("the disk is full"), "{error}");
    }
}

#[test]
fn a_panicking_sink_is_an_error() {
    let tar = tar_of(&files(7, 400_000));
    let sink: ChunkSink = Box::new(|chunk, _| {
        assert!(chunk.0 < 2, "a sink that panics");
        Ok(())
    });
    let mut builder = LayerBuilder::with_sink(expect_of(&tar, &tar), options(2), sink).expect("starts");
    let pushed = tar.chunks(10_000).try_for_each(|bytes| builder.push(bytes));
    let error = pushed.err().or_else(|| builder.finish().err()).expect("fails");
    assert!(matches!(error, BuildError::Panicked { name: "layout" }), "{error}");
}

#[test]
fn damaged_bytes_and_windows_give_errors_and_never_wrong_chunks() {
    let tar = tar_of(&files(8, 900_000));
    for (what, blob) in blobs_of(&tar) {
        let index = build(&blob, expect_of(&blob, &tar), options(1), usize::MAX).expect(what);
        for span in 0..index.seek.count() {
            let entry = index.seek.span(SpanNo(span));
            let range = entry.blob.start as usize..entry.blob.end as usize;
            for at in range.clone().step_by(range.len() / 5 + 1) {
                let mut damaged = blob.clone();
                damaged[at] ^= 0x41;
                let mut decoder =
                    SpanDecoder::new(&index.seek, &index.chunks, SpanNo(span), &window_of(&index, span)).expect(what);
                let mut chunks = Vec::new();
                let pushed = decoder.push(&damaged[range.clone()], &mut chunks);
                assert_eq!(decoder.push(b"", &mut Vec::new()), pushed, "an error stays");
                // Bytes before the first chunk, or of a trailer, may be wrong without effect.
                for (chunk, bytes) in chunks {
                    let range = index.chunks.range(chunk);
                    assert!(bytes[..] == tar[range.start as usize..range.end as usize], "{what}: wrong bytes");
                }
                if let Err(error) = pushed {
                    let named = match error {
                        SpanError::Inflate { span, chunk, .. } | SpanError::Wrong { span, chunk, .. } => {
                            Some((span, chunk))
                        }
                        _ => None,
                    };
                    let (named_span, chunk) = named.expect("an error that says where");
                    assert_eq!(named_span.0, span);
                    assert!(entry.chunks.contains(&chunk.0));
                }
            }
            if range.len() < 5000 {
                // The end of a span is known to some bytes only, which may be half of so few.
                continue;
            }
            let cut = &blob[range.start..range.start + range.len() / 2];
            let mut decoder =
                SpanDecoder::new(&index.seek, &index.chunks, SpanNo(span), &window_of(&index, span)).expect(what);
            decoder.push(cut, &mut Vec::new()).expect("nothing wrong so far");
            assert!(matches!(decoder.finish(), Err(SpanError::Truncated { .. })), "{what}");
        }
    }
}

#[test]
fn a_window_of_another_span_never_gives_wrong_chunks() {
    let tar = tar_of(&files(9, 900_000));
    let blob = gzip(&tar, 6, 8);
    let index = build(&blob, expect_of(&blob, &tar), options(1), usize::MAX).expect("builds");
    let mut refused = 0;
    for span in 1..index.seek.count() {
        let range = index.seek.blob_range(span..span + 1);
        for window in [window_of(&index, span - 1), Bytes::new(), Bytes::from_static(b"no window")] {
            let Ok(mut decoder) = SpanDecoder::new(&index.seek, &index.chunks, SpanNo(span), &window) else {
                refused += 1;
                continue;
            };
            let mut chunks = Vec::new();
            refused += u32::from(decoder.push(&blob[range.start as usize..range.end as usize], &mut chunks).is_err());
            for (chunk, bytes) in chunks {
                let range = index.chunks.range(chunk);
                assert!(bytes[..] == tar[range.start as usize..range.end as usize], "wrong bytes");
            }
        }
    }
    assert!(refused > index.seek.count(), "wrong windows had no effect, so the test shows nothing");
}

#[test]
fn tables_of_different_layers_and_spans_that_do_not_exist_are_refused() {
    let (one, two) = (tar_of(&files(10, 300_000)), tar_of(&files(11, 300_000)));
    let index = |tar: &[u8]| build(tar, expect_of(tar, tar), options(1), usize::MAX).expect("builds");
    let (one, two) = (index(&one), index(&two));
    assert_eq!(SpanDecoder::new(&one.seek, &two.chunks, SpanNo(0), b"").err(), Some(SpanError::Tables));
    let beyond = SpanNo(one.seek.count());
    assert_eq!(SpanDecoder::new(&one.seek, &one.chunks, beyond, b"").err(), Some(SpanError::NoSuchSpan(beyond)));
    assert!(SpanDecoder::new(&one.seek, &one.chunks, SpanNo(u32::MAX), b"").is_err());
    assert!(SpanDecoder::run(&one.seek, &one.chunks, 1..1, b"").is_err());
}

#[test]
fn an_inserted_file_leaves_the_other_chunks_alone() {
    let mut files = files(12, 6_000_000);
    let ids = |files: &[(String, Vec<u8>)]| {
        let tar = tar_of(files);
        let chunks = build(&tar, expect_of(&tar, &tar), options(1), usize::MAX).expect("builds").chunks;
        let ids: Vec<ChunkId> = (0..chunks.count()).map(|chunk| chunks.chunk_id(ChunkNo(chunk))).collect();
        ids
    };
    let before: std::collections::HashSet<ChunkId> = ids(&files).into_iter().collect();
    for (at, len) in [(files.len() / 2, 3000), (0, 100_000)] {
        files.insert(at, ("usr/share/inserted".to_owned(), content(99, len)));
        let after = ids(&files);
        let shared = after.iter().filter(|id| before.contains(id)).count();
        assert!(shared + 8 >= after.len(), "{shared} of {} chunks are shared", after.len());
        files.remove(at);
    }
}

#[test]
fn a_blob_full_of_empty_blocks_has_an_index() {
    let tar = tar_of(&files(13, 500_000));
    let whole = gzip(&tar, 0, 8);
    let stored = |bytes: &[u8]| {
        let len = bytes.len() as u16;
        [&[0][..], &len.to_le_bytes(), &(!len).to_le_bytes(), bytes].concat()
    };
    let mut blob = whole[..10].to_vec();
    for part in tar.chunks(20_000) {
        blob.extend(stored(part));
        blob.extend(stored(b"").repeat(30_000));
    }
    blob.extend([1, 0, 0, 0xff, 0xff]);
    blob.extend(&whole[whole.len() - 8..]);
    let index = build(&blob, expect_of(&blob, &tar), options(1), usize::MAX).expect("builds");
    assert!(index.seek.count() > 3);
    assert_all_decodes(&index, &blob, &tar, "empty blocks");
}

#[test]
fn an_empty_tar_has_an_index() {
    let tar = tar_of(&[]);
    for blob in [tar.clone(), gzip(&tar, 6, 8), zstd(&tar)] {
        let index = build(&blob, expect_of(&blob, &tar), options(1), usize::MAX).expect("builds");
        assert_eq!((index.chunks.count(), index.seek.count()), (1, 1));
        assert_all_decodes(&index, &blob, &tar, "empty");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_tar_comes_back(
        lens in proptest::collection::vec(prop_oneof![4 => 0_usize..9000, 1 => 0_usize..200_000], 1..40),
        seed in any::<u64>(),
        level in prop_oneof![Just(0), Just(1), Just(6), Just(9)],
        memory_level in 1..=9,
        member_len in 10_000_usize..2_000_000,
        portion in 1_usize..100_000,
    ) {
        let files: Vec<_> =
            lens.iter().enumerate().map(|(no, len)| (format!("{no}"), content(seed ^ no as u64, *len))).collect();
        let tar = tar_of(&files);
        let blob: Vec<u8> = tar.chunks(member_len).flat_map(|part| gzip(part, level, memory_level)).collect();
        let threads = 1 + portion % 2;
        let index = build(&blob, expect_of(&blob, &tar), options(threads), portion).expect("builds");
        assert_all_decodes(&index, &blob, &tar, "any");
    }
}
