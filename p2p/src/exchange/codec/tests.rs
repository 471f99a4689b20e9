use bytes::Bytes;
use hermes_image::ids::{ArtifactId, ChunkNo, DiffId, Digest};
use libp2p::{Multiaddr, PeerId};
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

/// What is wanted, of which extent, and which chunks: only of the extent where an owner is meant.
fn wants() -> impl Strategy<Value = (Want, Range<u32>, Runs)> {
    let within = |runs: &Runs| {
        let end = runs.iter().next_back().map_or(0, |run| run.end);
        runs.first().map_or(0, |run| run.start)..end
    };
    (0..=8_u8, some_runs(), 0..2_u32, any::<bool>()).prop_map(move |(want, chunks, wider, elsewhere)| {
        let tight = within(&chunks);
        let extent = tight.start.saturating_sub(wider)..tight.end + wider;
        match want_of(want).expect("a code") {
            Want::Here if elsewhere => (Want::Here, if wider == 0 { 0..0 } else { 5..7 }, chunks),
            want => (want, extent, chunks),
        }
    })
}

fn names() -> impl Strategy<Value = Vec<PeerName>> {
    let address = (any::<[u8; 16]>(), any::<bool>(), 1_u16..).prop_map(|(ip, v4, port)| {
        let ip = std::net::IpAddr::from(ip);
        let short = std::net::IpAddr::from([1, 2, (port >> 8) as u8, port as u8]);
        crate::address::multiaddr_of(std::net::SocketAddr::new(if v4 { short } else { ip }, port))
    });
    let addresses = proptest::collection::vec(address, 0..=NAME_ADDRESSES_MAX);
    let name = addresses.prop_map(|addresses| PeerName { peer: PeerId::random(), addresses });
    proptest::collection::vec(name, 1..=REFER_PEERS_MAX)
}

fn requests() -> impl Strategy<Value = Request> {
    let ids = || (any::<[u8; 32]>(), any::<[u8; 32]>());
    prop_oneof![
        any::<u16>().prop_map(|version| Request::Hello { version }),
        ids().prop_map(|(layer, table)| Request::Have { layer: DiffId(layer), table: ArtifactId(table) }),
        (ids(), any::<bool>(), any::<bool>(), wants()).prop_map(
            |((layer, table), demand, zstd, (want, extent, chunks))| {
                Request::Get {
                    layer: DiffId(layer),
                    table: ArtifactId(table),
                    class: if demand { Class::Demand } else { Class::Prefetch },
                    accept: if zstd { Accept::Zstd } else { Accept::Plain },
                    want,
                    extent,
                    chunks,
                }
            }
        ),
        (any::<[u8; 32]>(), any::<u64>(), any::<u64>()).prop_map(|(id, offset, len)| Request::Artifact {
            id: ArtifactId(id),
            offset,
            len
        }),
        any::<[u8; 32]>().prop_map(|manifest| Request::Profile { manifest: Digest(manifest) }),
        any::<[u8; 32]>().prop_map(|manifest| Request::Statement { manifest: Digest(manifest) }),
        ids().prop_map(|(layer, table)| Request::Watch { layer: DiffId(layer), table: ArtifactId(table) }),
        proptest::collection::vec(any::<u8>(), 1..=GRANT_LEN_MAX_BYTES)
            .prop_map(|grant| Request::Grant { grant: Bytes::from(grant) }),
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
        (any::<u32>(), any::<u32>())
            .prop_map(|(eta_ms, registry_rests_ms)| Answer::Pending { eta_ms, registry_rests_ms }),
        (some_runs(), names()).prop_map(|(chunks, peers)| Answer::Refer { chunks, peers }),
        some_runs().prop_map(|chunks| Answer::Delegate { chunks }),
        any::<u64>().prop_map(|epoch| Answer::NotMine { epoch }),
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
        // A later version may say more in its HELLO, and every length up to its limit is a grant.
        prop_assume!(!matches!(request, Request::Hello { .. } | Request::Grant { .. }));
        let frame = framed(|out| request.encode(out), REQUEST_LEN_MAX_BYTES);
        prop_assert!(Request::decode(&frame[..cut.index(frame.len())]).is_err());
        let mut longer = frame.to_vec();
        longer.push(0);
        prop_assert!(Request::decode(&longer).is_err());
    }

    #[test]
    fn an_answer_cut_short_or_with_something_behind_it_is_refused(
        answer in answers(),
        cut in any::<prop::sample::Index>(),
    ) {
        // A later version may say more in its HELLO, and bytes of any length are a chunk or a piece.
        prop_assume!(!matches!(answer, Answer::Hello { .. } | Answer::Data { .. } | Answer::Piece { .. }));
        let frame = framed(|out| answer.encode(out), ANSWER_LEN_MAX_BYTES);
        prop_assert!(Answer::decode(&frame.slice(..cut.index(frame.len())), 10_000).is_err());
        let longer = Bytes::from([&frame, &[0][..]].concat());
        prop_assert!(Answer::decode(&longer, 10_000).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_panic_and_never_exceed_a_limit(
        kind in prop_oneof![0_u8..9, 0x80_u8..0x92, any::<u8>()],
        body in proptest::collection::vec(any::<u8>(), 0..200),
        chunk_count in prop_oneof![Just(0_u32), 1_u32..100, Just(CHUNK_COUNT_MAX)],
    ) {
        let mut frame = vec![kind];
        frame.extend(body);
        let frame = Bytes::from(frame);
        if let Ok(Request::Get { want, extent, chunks, .. }) = Request::decode(&frame) {
            prop_assert!(chunks.chunk_count() <= u64::from(GET_CHUNKS_MAX));
            prop_assert!(extent.start <= extent.end && extent.end <= CHUNK_COUNT_MAX);
            prop_assert!(want == Want::Here || chunks.within(extent) == chunks);
        }
        match Answer::decode(&frame, chunk_count) {
            Ok(Answer::HaveMap { chunks, .. } | Answer::HaveMore { chunks } | Answer::Lacks { chunks }) => {
                prop_assert!(chunks.iter().all(|run| run.end <= chunk_count));
            }
            Ok(Answer::Refer { chunks, peers }) => {
                prop_assert!(chunks.iter().all(|run| run.end <= chunk_count) && !chunks.is_empty());
                prop_assert!((1..=REFER_PEERS_MAX).contains(&peers.len()));
                prop_assert!(peers.iter().all(|peer| peer.addresses.len() <= NAME_ADDRESSES_MAX));
            }
            Ok(Answer::Delegate { chunks }) => {
                prop_assert!(chunks.iter().all(|run| run.end <= chunk_count) && !chunks.is_empty());
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
        want: Want::Owner { duty: Duty::Cluster, again: true, can_read: false },
        extent: 0..CHUNK_COUNT_MAX,
        chunks: apart(GET_CHUNKS_MAX, CHUNK_COUNT_MAX / GET_CHUNKS_MAX),
    };
    framed(|out| get.encode(out), REQUEST_LEN_MAX_BYTES);
    // The widest gaps and the longest runs that many runs can have.
    let chunks: Runs = (0..MAP_RUNS_MAX as u32).map(|no| no * 1024 + 512..no * 1024 + 1024).collect();
    let map = Answer::HaveMap { cut_short: true, chunks };
    framed(|out| map.encode(out), ANSWER_LEN_MAX_BYTES);
    let body = Bytes::from(vec![1; CHUNK_LEN_MAX_BYTES as usize]);
    let data = Answer::Data { chunk: ChunkNo(0), encoding: Encoding::Plain, body };
    framed(|out| data.encode(out), ANSWER_LEN_MAX_BYTES);
    // The farthest apart that so many chunks can be, and names of the longest kind.
    let far = Multiaddr::from(std::net::Ipv6Addr::LOCALHOST);
    let long = (0..6).fold(far, |address, _| address.with(libp2p::multiaddr::Protocol::Ip6([7; 16].into())));
    let name = || PeerName::new(PeerId::random(), [long.clone(), long.clone(), long.clone()]);
    let names = (0..REFER_PEERS_MAX).map(|_| name()).collect::<Vec<_>>();
    assert!(names.iter().all(|name| name.addresses.len() == NAME_ADDRESSES_MAX));
    let refer = Answer::Refer { chunks: apart(GET_CHUNKS_MAX, CHUNK_COUNT_MAX / GET_CHUNKS_MAX), peers: names };
    let frame = framed(|out| refer.encode(out), ANSWER_LEN_MAX_BYTES);
    assert_eq!(Answer::decode(&frame, CHUNK_COUNT_MAX), Ok(refer));
    let grant = Request::Grant { grant: Bytes::from(vec![1; GRANT_LEN_MAX_BYTES]) };
    framed(|out| grant.encode(out), REQUEST_LEN_MAX_BYTES);
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
            want: Want::Here,
            extent: 0..0,
            chunks,
        };
        let frame = framed(|out| request.encode(out), REQUEST_LEN_MAX_BYTES);
        let error = CodecError::Malformed { message: "GET", field: "number of chunks" };
        assert_eq!(Request::decode(&frame), Err(error));
    }
}

#[test]
fn an_extent_has_chunks_and_an_owner_is_asked_only_for_those() {
    let owner = Want::Owner { duty: Duty::Zone, again: false, can_read: true };
    for (want, extent, chunks, valid) in [
        (Want::Here, 0..0, 5..6, true),
        (Want::Here, 7..9, 5..6, true),
        (Want::Here, 4..8, 5..6, true),
        (Want::Here, 3..3, 5..6, false),
        (Want::Here, Range { start: 9, end: 7 }, 5..6, false),
        (Want::Here, 0..CHUNK_COUNT_MAX + 1, 5..6, false),
        (owner, 5..6, 5..6, true),
        (owner, 0..0, 5..6, false),
        (owner, 5..5, 5..6, false),
        (owner, 4..8, 7..9, false),
        (owner, 4..8, 3..5, false),
        (owner, 0..CHUNK_COUNT_MAX + 1, 5..6, false),
    ] {
        let request = Request::Get {
            layer: DiffId([1; 32]),
            table: ArtifactId([2; 32]),
            class: Class::Demand,
            accept: Accept::Plain,
            want,
            extent: extent.clone(),
            chunks: Runs::one(chunks.clone()),
        };
        let frame = framed(|out| request.encode(out), REQUEST_LEN_MAX_BYTES);
        let error = CodecError::Malformed { message: "GET", field: "extent" };
        let expected = if valid { Ok(request) } else { Err(error) };
        assert_eq!(Request::decode(&frame), expected, "{want:?} {extent:?} {chunks:?}");
    }
}

#[test]
fn a_name_that_is_none_is_malformed() {
    let peer = PeerId::random().to_bytes();
    let address = Multiaddr::from(std::net::Ipv4Addr::LOCALHOST).to_vec();
    let prefixed = |bytes: &[u8]| [&[bytes.len() as u8], bytes].concat();
    let name = |addresses: &[&[u8]]| {
        let told = addresses.iter().flat_map(|address| prefixed(address));
        prefixed(&peer).into_iter().chain([addresses.len() as u8]).chain(told).collect::<Vec<u8>>()
    };
    // One run of one chunk, and then the peers.
    let refer = |count: u8, names: &[u8]| Bytes::from([&[0x8d, 1, 0, 1, count], names].concat());
    assert!(Answer::decode(&refer(1, &name(&[&address, &address])), 10).is_ok());
    for (count, names, field) in [
        (0, Vec::new(), "number of peers"),
        (5, name(&[]).repeat(5), "number of peers"),
        (2, name(&[]), "peer"),
        (1, prefixed(&[]), "peer"),
        (1, prefixed(&[7; 65]), "peer"),
        (1, prefixed(&peer[1..]), "peer"),
        (1, name(&[&address, &address, &address]), "number of addresses"),
        (1, name(&[&[]]), "address"),
        (1, name(&[&[0xff; 20]]), "address"),
        (1, name(&[&address[..3]]), "address"),
        (1, name(&[&address.repeat(26)]), "address"),
        (1, [name(&[]), vec![0]].concat(), "end"),
    ] {
        let error = CodecError::Malformed { message: "REFER", field };
        assert_eq!(Answer::decode(&refer(count, &names), 10), Err(error), "{names:?}");
    }
}

#[test]
fn an_empty_or_endless_grant_is_malformed() {
    for len in [0, GRANT_LEN_MAX_BYTES + 1] {
        let frame = [&[0x07], vec![1; len].as_slice()].concat();
        assert_eq!(Request::decode(&frame), Err(CodecError::Malformed { message: "GRANT", field: "length" }));
    }
}
