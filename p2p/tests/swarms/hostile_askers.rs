//! Peers that ask our node for everything but what they should.

use std::time::Duration;

use hermes_image::ids::{ArtifactId, DiffId};
use hermes_image::runs::Runs;
use hermes_p2p::Asking;
use hermes_p2p::exchange::codec::{Accept, Answer, Class, REQUEST_LEN_MAX_BYTES, Reason, Request, VERSION, Want};
use hermes_p2p::exchange::session::SessionError;

use crate::common::{
    Layer, Look, RawPeer, RawSession, TestNode, ask, collect, deadline, exchange_protocol, hear, start, wait_for, write,
};

fn get(layer: &Layer, chunks: Runs) -> Request {
    let (table, layer) = (layer.table.id(), layer.table.diff_id());
    Request::Get { layer, table, class: Class::Demand, accept: Accept::Plain, want: Want::Here, extent: 0..0, chunks }
}

fn have() -> Request {
    Request::Have { layer: DiffId([1; 32]), table: ArtifactId([1; 32]) }
}

/// The node still serves others.
async fn assert_unharmed(holder: &TestNode, layer: &Layer) {
    let honest = start(|_| {}).await;
    honest.meet(holder).await;
    wait_for("a free place", async || {
        let fetch =
            honest.node.fetch(holder.peer(), &layer.table, Asking::here(Runs::one(0..4), Class::Demand), deadline());
        let got = collect(fetch, layer).await;
        got.error.is_none().then(|| assert_eq!(got.chunks.len(), 4))
    })
    .await;
}

async fn assert_ends(session: &mut RawSession, reason: Reason) {
    assert_eq!(hear(session, 0).await.expect("a reason"), Answer::Error { reason });
    let end = hear(session, 0).await.expect_err("the end");
    assert!(matches!(end, SessionError::Closed | SessionError::Io(_)), "{end:?}");
}

async fn holder(change: impl FnOnce(&mut hermes_p2p::NodeConfig)) -> (TestNode, Layer) {
    let holder = start(change).await;
    let layer = Layer::new(1, 1024, 65536, Look::Noise);
    holder.made.add(&layer, layer.all());
    (holder, layer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_requests_end_the_stream_with_a_reason() {
    let (holder, layer) = holder(|_| {}).await;
    let raw = RawPeer::start(Some(holder.address())).await;
    let too_long = (REQUEST_LEN_MAX_BYTES as u32 + 1).to_le_bytes().to_vec();
    for (bytes, reason) in [
        (too_long, Reason::FrameLength),
        (u32::MAX.to_le_bytes().to_vec(), Reason::FrameLength),
        (vec![0; 4], Reason::FrameLength),
        (vec![1, 0, 0, 0, 0x7f], Reason::UnknownType),
        // An answer is no request.
        (vec![1, 0, 0, 0, 0x88], Reason::UnknownType),
        (vec![3, 0, 0, 0, 0x03, 1, 2], Reason::Malformed),
    ] {
        let mut session = raw.greet(holder.peer()).await;
        write(&mut session, &bytes).await;
        assert_ends(&mut session, reason).await;
    }
    for (request, reason) in [(have(), Reason::OutOfOrder), (Request::Hello { version: VERSION + 1 }, Reason::Version)]
    {
        let mut session = raw.open(holder.peer()).await;
        ask(&mut session, &request).await;
        assert_ends(&mut session, reason).await;
    }
    let mut session = raw.greet(holder.peer()).await;
    ask(&mut session, &Request::Hello { version: VERSION }).await;
    assert_ends(&mut session, Reason::OutOfOrder).await;
    assert_unharmed(&holder, &layer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_requests_is_refused_and_then_ended() {
    let (holder, layer) = holder(|config| config.upload.requests_per_second_per_peer = 10).await;
    let raw = RawPeer::start(Some(holder.address())).await;
    let mut session = raw.greet(holder.peer()).await;
    let mut flood = Vec::new();
    for _ in 0..500 {
        have().encode(&mut flood);
    }
    write(&mut session, &flood).await;
    let (mut answered, mut refused) = (0, 0);
    loop {
        match hear(&mut session, 0).await {
            Ok(Answer::NotFound) => answered += 1,
            Ok(Answer::Busy { retry_after_ms }) => {
                assert!(retry_after_ms > 0);
                refused += 1;
            }
            Ok(Answer::Error { reason }) => break assert_eq!(reason, Reason::Flood),
            other => panic!("{other:?}"),
        }
    }
    assert!((20..500).contains(&answered) && refused >= 64, "{answered} answered, {refused} refused");
    assert_unharmed(&holder, &layer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_read_loses_its_place() {
    let (holder, layer) = holder(|config| {
        config.upload.stall_timeout = Duration::from_millis(1500);
        (config.upload.transfers_max, config.upload.prefetch_transfers_max) = (1, 1);
    })
    .await;
    let raw = RawPeer::start(Some(holder.address())).await;
    let mut session = raw.greet(holder.peer()).await;
    ask(&mut session, &get(&layer, layer.all())).await;
    hear(&mut session, layer.table.count()).await.expect("begins");
    // From here on nothing is read, and the only place is taken.
    assert_unharmed(&holder, &layer).await;
    let read = holder.made.reads.load(std::sync::atomic::Ordering::SeqCst);
    assert!(read < 1000, "{read} chunks were read for a peer that takes none");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_request_is_not_waited_for() {
    let (holder, layer) = holder(|config| config.upload.stall_timeout = Duration::from_millis(1500)).await;
    let raw = RawPeer::start(Some(holder.address())).await;
    for half in [&[5, 0][..], &[65, 0, 0, 0, 0x02, 1, 2, 3]] {
        let mut session = raw.greet(holder.peer()).await;
        write(&mut session, half).await;
        assert!(hear(&mut session, 0).await.is_err(), "the stream went on");
    }
    let mut silent = raw.open(holder.peer()).await;
    write(&mut silent, &[1]).await;
    assert!(hear(&mut silent, 0).await.is_err(), "a stream without a hello went on");
    assert_unharmed(&holder, &layer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_above_the_limit_are_dropped_and_the_others_work() {
    let (holder, layer) = holder(|config| config.upload.streams_per_peer_max = 3).await;
    let raw = RawPeer::start(Some(holder.address())).await;
    let mut kept = Vec::new();
    for _ in 0..3 {
        kept.push(raw.greet(holder.peer()).await);
    }
    for _ in 0..20 {
        let mut session = raw.open(holder.peer()).await;
        ask(&mut session, &Request::Hello { version: VERSION }).await;
        assert!(hear(&mut session, 0).await.is_err(), "one stream too many was served");
    }
    for session in &mut kept {
        ask(session, &have()).await;
        assert_eq!(hear(session, 0).await.expect("an answer"), Answer::NotFound);
    }
    assert_unharmed(&holder, &layer).await;
    drop(kept);
    wait_for("free places", async || {
        let mut session = raw.open(holder.peer()).await;
        ask(&mut session, &Request::Hello { version: VERSION }).await;
        hear(&mut session, 0).await.ok()
    })
    .await;
}

/// Resident memory of this process in bytes.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("has a status");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("says its memory");
    let kib: u64 = line.split_whitespace().nth(1).expect("a number").parse().expect("a number");
    kib * 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_half_open_streams_take_little_and_others_are_served() {
    let (holder, layer) = holder(|_| {}).await;
    let before = resident_bytes();
    let mut crowd = Vec::new();
    for _ in 0..20 {
        let raw = RawPeer::start(Some(holder.address())).await;
        let opened = futures::future::join_all((0..500).map(|no| {
            let (mut control, peer) = (raw.control.clone(), holder.peer());
            async move {
                let stream = control.open_stream(peer, exchange_protocol()).await.ok()?;
                let mut session = RawSession::new(stream);
                // Half of a request, or nothing at all.
                let half: &[u8] = if no % 2 == 0 { &[9, 0] } else { &[] };
                write(&mut session, half).await;
                Some(session)
            }
        }));
        let opened: Vec<_> = opened.await.into_iter().flatten().collect();
        crowd.push((raw, opened));
    }
    let opened: usize = crowd.iter().map(|(_, sessions)| sessions.len()).sum();
    assert!(opened > 5_000, "only {opened} streams were opened");
    // Of both ends together, which is far below what so many windows or requests would be.
    let taken = resident_bytes().saturating_sub(before);
    assert!(taken < 256 << 20, "{opened} streams take {taken} bytes");
    eprintln!("{opened} half-open streams take {} KiB, both ends together", taken >> 10);
    assert_unharmed(&holder, &layer).await;
    drop(crowd);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_sent_ahead_are_answered_one_after_the_other() {
    let (holder, layer) = holder(|_| {}).await;
    let raw = RawPeer::start(Some(holder.address())).await;
    let mut session = raw.greet(holder.peer()).await;
    for chunk in [7, 3] {
        ask(&mut session, &get(&layer, Runs::one(chunk..chunk + 1))).await;
    }
    for chunk in [7, 3] {
        match hear(&mut session, layer.table.count()).await.expect("an answer") {
            Answer::Data { chunk: no, body, .. } => {
                assert_eq!((no.0, &body), (chunk, &layer.bytes(no)));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(hear(&mut session, 0).await.expect("the end"), Answer::End);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_artifacts_are_given_within_their_bounds() {
    let (holder, _) = holder(|_| {}).await;
    let bytes: Vec<u8> = (0..200_000_u32).map(|no| no as u8).collect();
    let id = holder.made.add_artifact(bytes.clone().into());
    let raw = RawPeer::start(Some(holder.address())).await;
    let mut session = raw.greet(holder.peer()).await;
    for (offset, len) in [(0, u64::MAX), (150_000, 10), (199_999, 10), (200_000, 1), (u64::MAX, u64::MAX), (5, 0)] {
        ask(&mut session, &Request::Artifact { id, offset, len }).await;
        let blob = hear(&mut session, 0).await.expect("an answer");
        assert_eq!(blob, Answer::Blob { total_len_bytes: 200_000 });
        let mut got = Vec::new();
        loop {
            match hear(&mut session, 0).await.expect("an answer") {
                Answer::Piece { body } => got.extend_from_slice(&body),
                Answer::End => break,
                other => panic!("{other:?}"),
            }
        }
        let start = offset.min(200_000) as usize;
        let end = offset.saturating_add(len).min(200_000) as usize;
        assert_eq!(got, bytes[start..end]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_speaks_is_ended() {
    let (holder, layer) = holder(|_| {}).await;
    let raw = RawPeer::start(Some(holder.address())).await;
    let mut session = raw.greet(holder.peer()).await;
    let (table, diff_id) = (layer.table.id(), layer.table.diff_id());
    ask(&mut session, &Request::Watch { layer: diff_id, table }).await;
    let map = hear(&mut session, layer.table.count()).await.expect("a map");
    assert_eq!(map, Answer::HaveMap { cut_short: false, chunks: layer.all() });
    ask(&mut session, &have()).await;
    assert_ends(&mut session, Reason::OutOfOrder).await;
}
