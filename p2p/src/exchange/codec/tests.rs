use bytes::Bytes;
use hermes_image::ids::{ArtifactId, ChunkNo, DiffId, Digest};
use hermes_image::index::chunks::CHUNK_COUNT_MAX as CHUNKS_MAX;
use proptest::prelude::*;

use super::*;

/// The one frame of `encode`, without its length.
fn framed(encode: impl FnOnce(&mut Vec<u8>), limit_bytes: usize) -> Bytes {
    let mut out = Vec::new();
    encode(&mut out);
    let head = *out.first_chunk::<LENGTH_LEN_BYTES>().expect("has a head");
    assert_eq!(frame_len(head, limit_bytes), Ok(out.len() - LENGTH_LEN_BYTES), "the head lies");
    Bytes::from(out.split_off(LENGTH_LEN_BYTES))
}

fn runs(limit: u32) -> impl Strategy<Value = Runs> {
    proptest::collection::vec((0..limit, 1_u32..20), 0..40)
        .prop_map(move |ranges| ranges.into_iter().map(|(start, len)| start..(start + len).min(limit)).collect())
}

fn some_runs() -> impl Strategy<Value = Runs> {
    runs(10_000).prop_filter("not empty", |runs| !runs.is_empty())
}

fn requests() -> impl Strategy<Value = Request> {
    let ids = || (any::<[u8; 32]>(), any::<[u8; 32]>());
    prop_oneof![
        any::<u16>().prop_map(|version| Request::Hello { version }),
        ids().prop_map(|(layer, table)| Request::Have { layer: DiffId(layer), table: ArtifactId(table) }),
        (ids(), any::<bool>(), any::<bool>(), some_runs()).prop_map(|((layer, table), demand, zstd, chunks)| {
            Request::Get {
                layer: DiffId(layer),
                table: ArtifactId(table),
                class: if demand { Class::Demand } else { Class::Prefetch },
                accept: if zstd { Accept::Zstd } else { Accept::Plain },
                chunks,
            }
        }),
        (any::<[u8; 32]>(), any::<u64>(), any::<u64>()).prop_map(|(id, offset, len)| Request::Artifact {
            id: ArtifactId(id),
            offset,
            len
        }),
        any::<[u8; 32]>().prop_map(|manifest| Request::Statement { manifest: Digest(manifest) }),
        ids().prop_map(|(layer, table)| Request::Watch { layer: DiffId(layer), table: ArtifactId(table) }),
    ]
}

fn answers() -> impl Strategy<Value = Answer> {
    let body = || proptest::collection::vec(any::<u8>(), 1..300).prop_map(Bytes::from);
    prop_oneof![
        any::<u16>().prop_map(|version| Answer::Hello { version }),
        (any::<bool>(), runs(10_000)).prop_map(|(cut_short, chunks)| Answer::HaveMap { cut_short, chunks }),
        runs(10_000).prop_map(|chunks| Answer::HaveMore { chunks }),
        (0_u32..10_000, any::<bool>(), body()).prop_map(|(chunk, plain, body)| Answer::Data {
            chunk: ChunkNo(chunk),
            encoding: if plain { Encoding::Plain } else { Encoding::Zstd },
            body,
        }),
        some_runs().prop_map(|chunks| Answer::Lacks { chunks }),
        any::<u64>().prop_map(|total_len_bytes| Answer::Blob { total_len_bytes }),
        body().prop_map(|body| Answer::Piece { body }),
        Just(Answer::End),
        Just(Answer::NotFound),
        any::<u32>().prop_map(|retry_after_ms| Answer::Busy { retry_after_ms }),
        Just(Answer::Denied),
        (0..Reason::ALL.len()).prop_map(|at| Answer::Error { reason: Reason::ALL[at] }),
    ]
}

proptest! {
    #[test]
    fn every_request_comes_back_as_it_was(request in requests()) {
        let frame = framed(|out| request.encode(out), REQUEST_LEN_MAX_BYTES);
        prop_assert_eq!(Request::decode(&frame), Ok(request));
    }

    #[test]
    fn every_answer_comes_back_as_it_was(answer in answers()) {
        let frame = framed(|out| answer.encode(out), ANSWER_LEN_MAX_BYTES);
        prop_assert_eq!(Answer::decode(&frame, 10_000), Ok(answer));
    }

    #[test]
    fn a_message_cut_short_or_with_something_behind_it_is_refused(request in requests(), cut in any::<prop::sample::Index>()) {
        // A later version may say more in its HELLO.
        prop_assume!(!matches!(request, Request::Hello { .. }));
        let frame = framed(|out| request.encode(out), REQUEST_LEN_MAX_BYTES);
        prop_assert!(Request::decode(&frame[..cut.index(frame.len())]).is_err());
        let mut longer = frame.to_vec();
        longer.push(0);
        prop_assert!(Request::decode(&longer).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_panic_and_never_exceed_a_limit(
        kind in prop_oneof![0_u8..8, 0x80_u8..0x90, any::<u8>()],
        body in proptest::collection::vec(any::<u8>(), 0..200),
        chunk_count in prop_oneof![Just(0_u32), 1_u32..100, Just(CHUNKS_MAX)],
    ) {
        let mut frame = vec![kind];
        frame.extend(body);
        let frame = Bytes::from(frame);
        if let Ok(Request::Get { chunks, .. }) = Request::decode(&frame) {
            prop_assert!(chunks.chunk_count() <= u64::from(GET_CHUNKS_MAX));
        }
        match Answer::decode(&frame, chunk_count) {
            Ok(Answer::HaveMap { chunks, .. } | Answer::HaveMore { chunks } | Answer::Lacks { chunks }) => {
                prop_assert!(chunks.iter().all(|run| run.end <= chunk_count));
            }
            Ok(Answer::Data { chunk, body, .. }) => prop_assert!(chunk.0 < chunk_count && !body.is_empty()),
            Ok(_) | Err(_) => {}
        }
    }
}

#[test]
fn lengths_outside_of_the_limit_are_refused_before_anything_is_allocated() {
    for len in [0_u32, 101, u32::MAX] {
        let error = CodecError::FrameLength { len_bytes: u64::from(len), limit_bytes: 100 };
        assert_eq!(frame_len(len.to_le_bytes(), 100), Err(error));
    }
    assert_eq!(frame_len(100_u32.to_le_bytes(), 100), Ok(100));
}

#[test]
fn the_largest_messages_fit_their_frames() {
    let apart = |count: u32, step: u32| (0..count).map(|no| no * step..no * step + 1).collect::<Runs>();
    let get = Request::Get {
        layer: DiffId([1; 32]),
        table: ArtifactId([2; 32]),
        class: Class::Demand,
        accept: Accept::Zstd,
        chunks: apart(GET_CHUNKS_MAX, CHUNKS_MAX / GET_CHUNKS_MAX),
    };
    framed(|out| get.encode(out), REQUEST_LEN_MAX_BYTES);
    // The widest gaps and the longest runs that many runs can have.
    let chunks: Runs = (0..MAP_RUNS_MAX as u32).map(|no| no * 1024 + 512..no * 1024 + 1024).collect();
    let map = Answer::HaveMap { cut_short: true, chunks };
    framed(|out| map.encode(out), ANSWER_LEN_MAX_BYTES);
    let body = Bytes::from(vec![1; CHUNK_LEN_MAX_BYTES as usize]);
    let data = Answer::Data { chunk: ChunkNo(0), encoding: Encoding::Plain, body };
    framed(|out| data.encode(out), ANSWER_LEN_MAX_BYTES);
    let piece = Answer::Piece { body: Bytes::from(vec![1; PIECE_LEN_MAX_BYTES]) };
    framed(|out| piece.encode(out), ANSWER_LEN_MAX_BYTES);
}

#[test]
fn asking_for_nothing_or_too_much_is_malformed() {
    for chunks in [Runs::new(), Runs::one(0..GET_CHUNKS_MAX + 1)] {
        let request = Request::Get {
            layer: DiffId([1; 32]),
            table: ArtifactId([2; 32]),
            class: Class::Demand,
            accept: Accept::Plain,
            chunks,
        };
        let frame = framed(|out| request.encode(out), REQUEST_LEN_MAX_BYTES);
        let error = CodecError::Malformed { message: "GET", field: "number of chunks" };
        assert_eq!(Request::decode(&frame), Err(error));
    }
}
