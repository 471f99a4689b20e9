//! Peers that answer for chunks in every way but the honest one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hermes_image::ids::ChunkNo;
use hermes_image::runs::Runs;
use hermes_p2p::exchange::codec::{Answer, Encoding, LENGTH_LEN_BYTES, PeerName};
use hermes_p2p::{Asking, Class, ErrorClass, Multiaddr, NodeConfig, PeerId, Want};

use crate::common::{Got, Layer, Look, RawPeer, TestNode, asked, collect, deadline, say, start, welcome, write};
use crate::owners::OWNER;

fn layer() -> Layer {
    Layer::new(1, 16, 4096, Look::Noise)
}

fn data(chunk: u32) -> Answer {
    Answer::Data { chunk: ChunkNo(chunk), encoding: Encoding::Plain, body: layer().bytes(ChunkNo(chunk)) }
}

fn pending() -> Answer {
    Answer::Pending { eta_ms: 0, registry_rests_ms: 0 }
}

fn refer(chunks: std::ops::Range<u32>, peers: Vec<PeerName>) -> Answer {
    Answer::Refer { chunks: Runs::one(chunks), peers }
}

fn name(peer: PeerId, addresses: &[&str]) -> PeerName {
    let address = |text: &&str| text.parse::<Multiaddr>().expect("a multiaddr");
    PeerName { peer, addresses: addresses.iter().map(address).collect() }
}

/// A peer that answers every request with `frames`, and counts its streams.
async fn answering(frames: Vec<u8>) -> (RawPeer, Arc<AtomicUsize>) {
    let raw = RawPeer::start(None).await;
    let streams = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&streams);
    raw.serve(move |_, mut session| {
        counted.fetch_add(1, Ordering::SeqCst);
        let frames = frames.clone();
        async move {
            welcome(&mut session).await;
            while asked(&mut session).await.is_some() {
                write(&mut session, &frames).await;
            }
        }
    });
    (raw, streams)
}

fn encoded(answers: &[Answer]) -> Vec<u8> {
    let mut frames = Vec::new();
    answers.iter().for_each(|answer| answer.encode(&mut frames));
    frames
}

/// Asks `raw` for chunks 2..6 of the extent 0..8.
async fn fetch(asker: &TestNode, raw: &RawPeer, want: Want) -> Got {
    asker.node.connect(raw.address.clone()).await.expect("connects");
    let asking = Asking { chunks: Runs::one(2..6), extent: 0..8, want, class: Class::Demand };
    let layer = layer();
    collect(asker.node.fetch(raw.peer, &layer.table, asking, deadline()), &layer).await
}

async fn fetch_from(answers: &[Answer], want: Want, change: impl FnOnce(&mut NodeConfig)) -> Got {
    let (raw, _) = answering(encoded(answers)).await;
    let asker = start(change).await;
    fetch(&asker, &raw, want).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_order_is_as_good() {
    let answers = [data(5), pending(), data(2), Answer::Lacks { chunks: Runs::one(4..5) }, data(3), Answer::End];
    let got = fetch_from(&answers, OWNER, |_| {}).await;
    assert!(got.error.is_none(), "{got:?}");
    assert_eq!(got.chunks, [5, 2, 3].map(ChunkNo));
    assert_eq!((got.lacks, got.pendings), (Runs::one(4..5), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_patience_is_not_asked_of_anybody() {
    let (raw, asker) =
        (RawPeer::start(None).await, start(|config| config.download.pending_max = Duration::from_millis(800)).await);
    raw.serve(|_, mut session| async move {
        welcome(&mut session).await;
        asked(&mut session).await;
        say(&mut session, &data(4)).await;
        loop {
            say(&mut session, &pending()).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let got = fetch(&asker, &raw, OWNER).await;
    let error = got.error.expect("gives up");
    assert_eq!((error.class(), error.kind()), (ErrorClass::Transient, "timeout"));
    assert_eq!(got.chunks, [ChunkNo(4)]);
    assert!(got.pendings >= 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn patience_is_renewed_by_chunks() {
    let (raw, asker) =
        (RawPeer::start(None).await, start(|config| config.download.pending_max = Duration::from_secs(4)).await);
    raw.serve(|_, mut session| async move {
        welcome(&mut session).await;
        asked(&mut session).await;
        // Twelve times half a second, longer than the patience for one chunk.
        for chunk in 2..6 {
            for _ in 0..3 {
                say(&mut session, &pending()).await;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            say(&mut session, &data(chunk)).await;
        }
        say(&mut session, &Answer::End).await;
        asked(&mut session).await;
    });
    let got = fetch(&asker, &raw, OWNER).await;
    assert!(got.error.is_none() && got.chunks.len() == 4, "{got:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_pending_is_a_fault() {
    let got = fetch_from(&vec![pending(); 10_000], OWNER, |_| {}).await;
    let error = got.error.expect("is a fault");
    assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "pending_flood"));
    assert!(got.pendings < 1000, "{} were taken", got.pendings);
    let four = [pending(), pending(), pending(), pending(), data(2), data(3), data(4), data(5), Answer::End];
    let got = fetch_from(&four, OWNER, |_| {}).await;
    assert!(got.error.is_none() && got.chunks.len() == 4, "{got:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn referrals_and_delegations_beyond_what_was_asked_are_faults() {
    let somebody = || vec![name(PeerId::random(), &[])];
    let delegate = |chunks: std::ops::Range<u32>| Answer::Delegate { chunks: Runs::one(chunks) };
    let delegate_both = |chunks: [std::ops::Range<u32>; 2]| Answer::Delegate { chunks: Runs::from_iter(chunks) };
    for answers in [
        // Never asked for; partly; twice; after the chunk itself.
        vec![refer(6..7, somebody())],
        vec![refer(5..7, somebody())],
        vec![refer(2..4, somebody()), refer(3..5, somebody())],
        vec![data(2), refer(2..3, somebody())],
        // Outside of the extent; nothing that was asked for; twice; after the chunk itself.
        vec![delegate(2..9)],
        vec![delegate_both([2..3, 10..11])],
        vec![delegate(6..8)],
        vec![delegate(2..3), delegate(2..3)],
        vec![data(2), delegate(2..4)],
        // The end before its time, and what goes on after everything.
        vec![refer(2..4, somebody()), Answer::End],
        vec![delegate(2..6), pending()],
        vec![delegate(0..8), delegate(0..8)],
    ] {
        let got = fetch_from(&answers, OWNER, |_| {}).await;
        let error = got.error.unwrap_or_else(|| panic!("{answers:?} was taken"));
        assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "unexpected"), "{answers:?}");
    }
    // What is honest: all of the extent beside what was asked for.
    let got = fetch_from(&[refer(3..4, somebody()), delegate_both([0..3, 4..8]), Answer::End], OWNER, |_| {}).await;
    assert!(got.error.is_none() && got.delegated == Runs::from_iter([0..3, 4..8]), "{got:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_delegated_is_not_asked_for_again() {
    // More than one request holds.
    let layer = Layer::new(2, 3000, 512, Look::Text);
    let (raw, requests) = (RawPeer::start(None).await, Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&requests);
    raw.serve(move |_, mut session| {
        let counted = Arc::clone(&counted);
        async move {
            welcome(&mut session).await;
            while asked(&mut session).await.is_some() {
                counted.fetch_add(1, Ordering::SeqCst);
                say(&mut session, &Answer::Delegate { chunks: Runs::one(0..3000) }).await;
                say(&mut session, &Answer::End).await;
            }
        }
    });
    let asker = start(|_| {}).await;
    asker.node.connect(raw.address.clone()).await.expect("connects");
    let asking = Asking { chunks: layer.all(), extent: 0..3000, want: OWNER, class: Class::Prefetch };
    let got = collect(asker.node.fetch(raw.peer, &layer.table, asking, deadline()), &layer).await;
    assert!(got.error.is_none() && got.delegated == layer.all(), "{:?}", got.error);
    assert_eq!(requests.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_are_none_are_faults_and_strange_addresses_are_not_dialled() {
    let mut garbage = encoded(&[refer(2..6, vec![name(PeerId::random(), &[])])]);
    // The first byte of the PeerId, behind its length, the number of peers and the set of chunks.
    garbage[LENGTH_LEN_BYTES + 1 + 3 + 2] ^= 0xff;
    let (raw, _) = answering(garbage).await;
    let asker = start(|_| {}).await;
    let error = fetch(&asker, &raw, OWNER).await.error.expect("is no name");
    assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "codec"));

    let asker = start(|_| {}).await;
    let nowhere = PeerId::random();
    let peers = vec![
        name(nowhere, &["/dns4/metadata.internal/tcp/80", "/ip4/0.0.0.0/tcp/22"]),
        name(nowhere, &["/ip4/127.0.0.1/udp/53"]),
        name(asker.peer(), &[]),
    ];
    let (raw, _) = answering(encoded(&[refer(2..6, peers), Answer::End])).await;
    let got = fetch(&asker, &raw, OWNER).await;
    assert!(got.error.is_none(), "{got:?}");
    assert_eq!(got.referred, [(Runs::one(2..6), vec![nowhere])]);
    let error = asker.node.have(nowhere, &layer().table, deadline()).await.expect_err("nobody is anywhere");
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(source.contains("no address"), "{source}");

    // To be sent to oneself is to be told that nobody has it.
    let (raw, _) = answering(encoded(&[refer(2..6, vec![name(asker.peer(), &[])]), Answer::End])).await;
    let got = fetch(&asker, &raw, OWNER).await;
    assert!(got.error.is_none() && got.referred.is_empty() && got.lacks == Runs::one(2..6), "{got:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusing_an_extent_that_nobody_spoke_of_is_a_fault() {
    let not_mine = Answer::NotMine { epoch: u64::MAX };
    let got = fetch_from(std::slice::from_ref(&not_mine), Want::Here, |_| {}).await;
    let error = got.error.expect("is a fault");
    assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "unexpected"));

    for answer in [not_mine, pending(), refer(0..1, vec![name(PeerId::random(), &[])])] {
        let (raw, _) = answering(encoded(&[answer])).await;
        let asker = start(|_| {}).await;
        asker.node.connect(raw.address.clone()).await.expect("connects");
        let error = asker.node.have(raw.peer, &layer().table, deadline()).await.expect_err("is a fault");
        assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "unexpected"));
        let error = asker.node.present_grant(raw.peer, "a grant".into(), deadline()).await.expect_err("is a fault");
        assert_eq!(error.class(), ErrorClass::PeerFault, "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_may_be_broken_off_in_the_middle_and_the_stream_goes_on() {
    let asker = start(|_| {}).await;
    for (last, kind) in [
        (Answer::NotMine { epoch: 3 }, "not_mine"),
        (Answer::Denied, "denied"),
        (Answer::Busy { retry_after_ms: 5 }, "busy"),
    ] {
        let (raw, streams) = answering(encoded(&[data(3), pending(), last])).await;
        for _ in 0..3 {
            let got = fetch(&asker, &raw, OWNER).await;
            assert_eq!(got.error.expect("is broken off").kind(), kind);
            assert_eq!(got.chunks, [ChunkNo(3)]);
        }
        assert_eq!(streams.load(Ordering::SeqCst), 1, "{kind}: the stream was out of step");
    }
}
