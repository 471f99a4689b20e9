//! Peers that answer our node with everything but what it asked for.

use std::time::Duration;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, ChunkNo, Digest};
use hermes_image::runs::Runs;
use hermes_image::verify::Mismatch;
use hermes_p2p::exchange::codec::{Answer, CodecError, Encoding, Request};
use hermes_p2p::{Asking, Class, ErrorClass, ExchangeError};

use crate::common::{
    Got, Layer, Look, PATIENCE, RawPeer, RawSession, TestNode, asked, collect, deadline, say, start, wait_for, welcome,
    write,
};

fn data(chunk: u32, body: impl Into<Bytes>) -> Answer {
    Answer::Data { chunk: ChunkNo(chunk), encoding: Encoding::Plain, body: body.into() }
}

fn layer() -> Layer {
    Layer::new(1, 8, 65536, Look::Noise)
}

/// What comes of asking a peer for chunks 2..6 that answers every request with `answers`.
async fn fetch_from(answers: Vec<Answer>) -> Got {
    let mut frames = Vec::new();
    for answer in &answers {
        answer.encode(&mut frames);
    }
    fetch_raw(frames, Then::Wait, PATIENCE).await
}

/// What a raw peer does after it has answered.
#[derive(Clone, Copy)]
enum Then {
    /// Keeps the stream open.
    Wait,
    /// Closes it.
    Close,
}

async fn fetch_raw(frames: Vec<u8>, then: Then, stall_timeout: Duration) -> Got {
    let raw = RawPeer::start(None).await;
    let asker = start(|config| config.download.stall_timeout = stall_timeout).await;
    raw.serve(move |_, mut session| {
        let frames = frames.clone();
        async move {
            welcome(&mut session).await;
            while asked(&mut session).await.is_some() {
                write(&mut session, &frames).await;
                if matches!(then, Then::Close) {
                    return session.close(Duration::from_secs(1)).await;
                }
            }
        }
    });
    asker.node.connect(raw.address.clone()).await.expect("connects");
    let layer = layer();
    let fetch = asker.node.fetch(raw.peer, &layer.table, Asking::here(Runs::one(2..6), Class::Demand), deadline());
    let got = collect(fetch, &layer).await;
    assert_unharmed(&asker).await;
    got
}

/// The node still works with others.
async fn assert_unharmed(asker: &TestNode) {
    let honest = start(|_| {}).await;
    let layer = Layer::new(2, 4, 4096, Look::Text);
    honest.made.add(&layer, layer.all());
    asker.meet(&honest).await;
    // Again and again, because some of these nodes give up on a slow machine.
    wait_for("an honest transfer", async || {
        let fetch = asker.node.fetch(honest.peer(), &layer.table, Asking::here(layer.all(), Class::Demand), deadline());
        let got = collect(fetch, &layer).await;
        got.error.is_none().then(|| assert_eq!(got.chunks.len(), 4))
    })
    .await;
}

fn peer_fault(got: &Got) -> &ExchangeError {
    let error = got.error.as_ref().expect("an error");
    assert_eq!(error.class(), ErrorClass::PeerFault, "{error:?}");
    error
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_after_a_wrong_chunk_is_delivered() {
    let layer = layer();
    let right = |chunk| data(chunk, layer.bytes(ChunkNo(chunk)));
    let got = fetch_from(vec![right(2), data(3, layer.bytes(ChunkNo(4))), right(4), right(5), Answer::End]).await;
    assert_eq!(got.chunks, [ChunkNo(2)]);
    let error = peer_fault(&got);
    assert!(matches!(error, ExchangeError::WrongChunk { chunk: ChunkNo(3), source: Mismatch::Hash, .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_of_another_length_is_wrong() {
    for len in [1, 65535, 65537, 131_072] {
        let got = fetch_from(vec![data(2, vec![7; len])]).await;
        let error = peer_fault(&got);
        let expected = Mismatch::Length { expected: 65536, actual: len as u64 };
        assert!(matches!(error, ExchangeError::WrongChunk { source, .. } if *source == expected), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_compression_and_bombs_are_refused() {
    let compressed = |plain: &[u8]| Bytes::from(zstd::bulk::compress(plain, 1).expect("compresses"));
    let bomb = compressed(&vec![0; 64 << 20]);
    for body in [Bytes::from_static(b"no zstd"), bomb, compressed(&[0; 10]), compressed(&[])] {
        let got = fetch_from(vec![Answer::Data { chunk: ChunkNo(2), encoding: Encoding::Zstd, body }]).await;
        assert!(matches!(peer_fault(&got), ExchangeError::BadEncoding { chunk: ChunkNo(2), .. }), "{got:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_that_nobody_asked_for_are_refused() {
    let layer = layer();
    let right = |chunk| data(chunk, layer.bytes(ChunkNo(chunk)));
    for (answers, delivered) in [
        // Never asked for; twice; twice with others between; lacking and yet sent; more than asked for.
        (vec![right(7)], 0),
        (vec![right(3), right(3)], 1),
        (vec![right(5), right(3), right(5)], 2),
        (vec![Answer::Lacks { chunks: Runs::one(2..3) }, right(2)], 0),
        (vec![right(2), right(3), right(4), right(5), right(6)], 4),
    ] {
        let got = fetch_from(answers).await;
        assert_eq!(got.chunks.len(), delivered);
        assert!(matches!(peer_fault(&got), ExchangeError::Unasked { .. }), "{got:?}");
    }
    let got = fetch_from(vec![data(8, vec![1])]).await;
    let error = peer_fault(&got);
    assert!(matches!(error, ExchangeError::Codec { source: CodecError::Malformed { .. }, .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_at_the_wrong_time_are_refused() {
    for answer in [
        Answer::End,
        Answer::Lacks { chunks: Runs::one(1..3) },
        Answer::Lacks { chunks: Runs::one(6..7) },
        Answer::HaveMore { chunks: Runs::one(0..1) },
        Answer::Piece { body: Bytes::from_static(b"x") },
        Answer::Hello { version: 1 },
    ] {
        let got = fetch_from(vec![answer.clone()]).await;
        assert!(matches!(peer_fault(&got), ExchangeError::Unexpected { request: "GET", .. }), "{answer:?}: {got:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_that_are_none_end_the_stream() {
    let mut oversized = u32::MAX.to_le_bytes().to_vec();
    oversized.extend([0x84; 64]);
    for frames in [oversized, vec![0; 4], vec![1, 0, 0, 0, 0x7f], vec![2, 0, 0, 0, 0x88, 0]] {
        let got = fetch_raw(frames.clone(), Then::Wait, PATIENCE).await;
        assert!(matches!(peer_fault(&got), ExchangeError::Codec { .. }), "{frames:?}: {got:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_in_the_middle_is_a_disconnect() {
    let layer = layer();
    let mut frames = Vec::new();
    data(2, layer.bytes(ChunkNo(2))).encode(&mut frames);
    let whole = frames.len();
    data(3, layer.bytes(ChunkNo(3))).encode(&mut frames);
    for (cut, delivered) in [(2, 0), (1000, 0), (whole, 1), (whole + 7, 1)] {
        let got = fetch_raw(frames[..cut].to_vec(), Then::Close, PATIENCE).await;
        assert_eq!(got.chunks.len(), delivered);
        let error = got.error.expect("an error");
        assert_eq!((error.kind(), error.class()), ("disconnected", ErrorClass::Transient));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_in_the_middle_of_a_frame_is_a_timeout() {
    let mut frames = Vec::new();
    data(2, layer().bytes(ChunkNo(2))).encode(&mut frames);
    for cut in [0, 2, 1000] {
        let got = fetch_raw(frames[..cut].to_vec(), Then::Wait, Duration::from_millis(500)).await;
        let error = got.error.expect("an error");
        assert_eq!((error.kind(), error.class()), ("timeout", ErrorClass::Transient));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trickle_ends_at_the_deadline() {
    let (raw, asker) = (RawPeer::start(None).await, start(|_| {}).await);
    raw.serve(move |_, mut session| async move {
        welcome(&mut session).await;
        asked(&mut session).await;
        let mut frame = Vec::new();
        data(2, vec![7; 65536]).encode(&mut frame);
        // One byte at a time, for ever as far as the asker can see.
        for byte in frame {
            write(&mut session, &[byte]).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    asker.node.connect(raw.address.clone()).await.expect("connects");
    let layer = layer();
    let soon = tokio::time::Instant::now() + Duration::from_millis(500);
    let got =
        collect(asker.node.fetch(raw.peer, &layer.table, Asking::here(Runs::one(2..6), Class::Demand), soon), &layer)
            .await;
    assert_eq!(got.error.expect("an error").kind(), "timeout");
}

/// Asks a peer for an artifact, the same with a limit that is the configuration's, and a statement, which it answers with `answers`
/// over and over.
async fn blobs_from(id: ArtifactId, answers: Vec<Answer>) -> [ExchangeError; 3] {
    let raw = RawPeer::start(None).await;
    let asker = start(|config| config.download.artifact_len_max_bytes = 1 << 20).await;
    raw.serve(move |_, mut session| {
        let answers = answers.clone();
        async move {
            welcome(&mut session).await;
            while asked(&mut session).await.is_some() {
                for answer in &answers {
                    say(&mut session, answer).await;
                }
            }
        }
    });
    asker.node.connect(raw.address.clone()).await.expect("connects");
    let artifact = asker.node.artifact(raw.peer, id, None, deadline()).await.expect_err("an artifact");
    let short = asker.node.artifact(raw.peer, id, Some(1 << 20), deadline()).await.expect_err("a short artifact");
    let statement = asker.node.statement(raw.peer, Digest([1; 32]), deadline()).await.expect_err("a statement");
    assert_unharmed(&asker).await;
    [artifact, short, statement]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn artifacts_and_statements_are_bounded() {
    let id = ArtifactId([1; 32]);
    let piece = Answer::Piece { body: Bytes::from(vec![7; 100_000]) };
    // One that is longer than its asker wants is a lie of who named it, not of who has it; more than was announced is one of the peer's.
    for (answers, kind, short) in [
        (vec![Answer::Blob { total_len_bytes: u64::MAX }], "too_long", "not_found"),
        (vec![Answer::Blob { total_len_bytes: (1 << 20) + 1 }], "too_long", "not_found"),
        (vec![Answer::Blob { total_len_bytes: 150_000 }, piece.clone(), piece.clone()], "too_long", "too_long"),
        (vec![Answer::Blob { total_len_bytes: 150_000 }, piece.clone(), Answer::End], "unexpected", "unexpected"),
        (vec![piece.clone()], "unexpected", "unexpected"),
        (vec![Answer::Denied], "denied", "denied"),
    ] {
        let kinds = blobs_from(id, answers.clone()).await.map(|error| error.kind());
        assert_eq!(kinds, [kind, short, kind], "{answers:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_of_other_bytes_is_wrong() {
    let (raw, asker) = (RawPeer::start(None).await, start(|_| {}).await);
    raw.serve(move |_, mut session| async move {
        welcome(&mut session).await;
        asked(&mut session).await;
        say(&mut session, &Answer::Blob { total_len_bytes: 5 }).await;
        say(&mut session, &Answer::Piece { body: Bytes::from_static(b"wrong") }).await;
        say(&mut session, &Answer::End).await;
    });
    asker.node.connect(raw.address.clone()).await.expect("connects");
    let error = asker.node.artifact(raw.peer, ArtifactId::of(b"right"), None, deadline()).await.expect_err("is wrong");
    assert!(matches!(error, ExchangeError::WrongArtifact { .. }), "{error:?}");
    assert_eq!(error.class(), ErrorClass::PeerFault);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_are_dropped_at_first_are_opened_again() {
    let (raw, asker) = (RawPeer::start(None).await, start(|_| {}).await);
    let layer = layer();
    let answer = data(2, layer.bytes(ChunkNo(2)));
    raw.serve(move |count, mut session: RawSession| {
        let answer = answer.clone();
        async move {
            if count < 2 {
                return;
            }
            welcome(&mut session).await;
            while let Some(Request::Get { .. }) = asked(&mut session).await {
                say(&mut session, &answer).await;
                say(&mut session, &Answer::End).await;
            }
        }
    });
    asker.node.connect(raw.address.clone()).await.expect("connects");
    let fetch = asker.node.fetch(raw.peer, &layer.table, Asking::here(Runs::one(2..3), Class::Demand), deadline());
    let got = collect(fetch, &layer).await;
    assert!(got.error.is_none() && got.chunks == [ChunkNo(2)], "{got:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_died_while_idle_is_replaced_unseen() {
    let (raw, asker) = (RawPeer::start(None).await, start(|_| {}).await);
    let layer = layer();
    let answer = data(2, layer.bytes(ChunkNo(2)));
    // Every stream answers one request and dies at the second.
    raw.serve(move |_, mut session: RawSession| {
        let answer = answer.clone();
        async move {
            welcome(&mut session).await;
            asked(&mut session).await;
            say(&mut session, &answer).await;
            say(&mut session, &Answer::End).await;
            asked(&mut session).await;
        }
    });
    asker.node.connect(raw.address.clone()).await.expect("connects");
    for _ in 0..5 {
        let fetch = asker.node.fetch(raw.peer, &layer.table, Asking::here(Runs::one(2..3), Class::Demand), deadline());
        let got = collect(fetch, &layer).await;
        assert!(got.error.is_none() && got.chunks == [ChunkNo(2)], "{got:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strange_hellos_and_absurd_waits_are_cut_down() {
    let (raw, asker) = (RawPeer::start(None).await, start(|_| {}).await);
    raw.serve(move |count, mut session| async move {
        if count == 0 {
            asked(&mut session).await;
            say(&mut session, &Answer::Hello { version: 9 }).await;
            asked(&mut session).await;
            return;
        }
        welcome(&mut session).await;
        asked(&mut session).await;
        say(&mut session, &Answer::Busy { retry_after_ms: u32::MAX }).await;
        asked(&mut session).await;
    });
    asker.node.connect(raw.address.clone()).await.expect("connects");
    let layer = layer();
    let error = asker.node.have(raw.peer, &layer.table, deadline()).await.expect_err("version 9");
    assert!(matches!(error, ExchangeError::Unsupported { .. }), "{error:?}");
    let error = asker.node.have(raw.peer, &layer.table, deadline()).await.expect_err("busy");
    assert!(matches!(error, ExchangeError::Busy { retry_after, .. } if retry_after <= Duration::from_secs(60)));
    // A peer that is gone without a word.
    drop(raw);
    wait_for("the end of the connection", async || asker.node.peers().is_empty().then_some(())).await;
}
