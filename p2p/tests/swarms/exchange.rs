//! Honest nodes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use hermes_image::ids::{ArtifactId, Digest};
use hermes_image::runs::Runs;
use hermes_p2p::{Asking, Class, Content, ErrorClass, ExchangeError, HaveNews, Node, OpenDesk, PeerEvent};
use tokio::time::{Instant, timeout};

use crate::common::{
    Layer, Look, PATIENCE, collect, config, deadline, single_streamed, spawn_collect, start, wait_for,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_exchange_everything() {
    let (holder, asker) = (start(|_| {}).await, start(|_| {}).await);
    let text = Layer::new(1, 50, 65536, Look::Text);
    let noise = Layer::new(2, 50, 65536, Look::Noise);
    holder.made.add(&text, text.all());
    holder.made.add(&noise, Runs::from_iter([0..10, 20..50]));
    let large = Bytes::from((0..3_000_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    let artifact = holder.made.add_artifact(large.clone());
    let empty = holder.made.add_artifact(Bytes::new());
    let manifest = Digest([9; 32]);
    holder.made.add_statement(manifest, Bytes::from_static(b"signed"));

    asker.meet(&holder).await;
    let (node, peer) = (&asker.node, holder.peer());
    assert_eq!(node.have(peer, &text.table, deadline()).await.expect("has it"), text.all());

    let got = collect(node.fetch(peer, &text.table, Asking::here(text.all(), Class::Demand), deadline()), &text).await;
    assert!(got.error.is_none() && got.chunks.len() == 50, "{got:?}");
    let asked = Runs::from_iter([5..25, 49..50]);
    let got = collect(node.fetch(peer, &noise.table, Asking::here(asked, Class::Prefetch), deadline()), &noise).await;
    assert!(got.error.is_none(), "{got:?}");
    assert_eq!(got.lacks, Runs::one(10..20));
    assert_eq!(got.chunks.iter().map(|chunk| chunk.0).collect::<Vec<_>>(), [5, 6, 7, 8, 9, 20, 21, 22, 23, 24, 49]);

    let len = large.len() as u64;
    for enough in [None, Some(len)] {
        assert_eq!(*node.artifact(peer, artifact, enough, deadline()).await.expect("has it"), large);
    }
    let longer = node.artifact(peer, artifact, Some(len - 1), deadline()).await.expect_err("is longer");
    assert_eq!((longer.kind(), longer.class()), ("not_found", ErrorClass::NotFound));
    assert_eq!(*node.artifact(peer, empty, None, deadline()).await.expect("has it"), Bytes::new());
    assert_eq!(node.statement(peer, manifest, deadline()).await.expect("has it"), "signed");
}

#[tokio::test]
async fn a_part_of_an_artifact_comes_alone() {
    let (holder, asker) = (start(|_| {}).await, start(|_| {}).await);
    let bytes = Bytes::from((0..100_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    let id = holder.made.add_artifact(bytes.clone());
    asker.meet(&holder).await;
    let part = |range: std::ops::Range<u64>| asker.node.artifact_range(holder.peer(), id, range, deadline());
    for range in [0..1, 5..300_000, 399_999..400_000, 0..400_000, 7..7] {
        let got = part(range.clone()).await.expect("has it");
        assert_eq!(got, bytes[range.start as usize..range.end as usize], "{range:?}");
    }
    let beyond = part(399_999..400_001).await.expect_err("ends before");
    assert!(matches!(beyond, ExchangeError::NotFound { .. }), "{beyond}");
}

#[tokio::test]
async fn what_is_not_there_is_said() {
    let (holder, asker) = (start(|_| {}).await, start(|_| {}).await);
    let known = Layer::new(1, 4, 4096, Look::Text);
    holder.made.add(&known, known.all());
    asker.meet(&holder).await;
    let (node, peer) = (&asker.node, holder.peer());

    let unknown = Layer::new(2, 4, 4096, Look::Text);
    let errors = [
        node.have(peer, &unknown.table, deadline()).await.expect_err("is not there"),
        node.artifact(peer, ArtifactId([1; 32]), None, deadline()).await.expect_err("is not there"),
        node.statement(peer, Digest([1; 32]), deadline()).await.expect_err("is not there"),
    ];
    for error in errors {
        assert_eq!((error.class(), error.kind(), error.peer()), (ErrorClass::NotFound, "not_found", Some(peer)));
    }
    let got =
        collect(node.fetch(peer, &unknown.table, Asking::here(unknown.all(), Class::Demand), deadline()), &unknown)
            .await;
    assert!(got.error.is_none() && got.lacks == unknown.all(), "{got:?}");

    let got =
        collect(node.fetch(peer, &known.table, Asking::here(Runs::one(3..9), Class::Demand), deadline()), &known).await;
    assert!(matches!(got.error, Some(ExchangeError::NoSuchChunk { end: 9, count: 4 })), "{got:?}");
    let got =
        collect(node.fetch(peer, &known.table, Asking::here(Runs::new(), Class::Demand), deadline()), &known).await;
    assert!(got.error.is_none() && got.chunks.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_chunks_arrive_in_order() {
    let (holder, asker) = (start(|_| {}).await, start(|_| {}).await);
    let layer = Layer::new(3, 10_000, 2048, Look::Noise);
    // Holes in runs of all lengths.
    let have: Runs = (0..10_000).filter(|chunk| chunk % 97 != 0).map(|chunk| chunk..chunk + 1).collect();
    holder.made.add(&layer, have.clone());
    asker.meet(&holder).await;
    assert_eq!(asker.node.have(holder.peer(), &layer.table, deadline()).await.expect("has it"), have);
    let fetch = asker.node.fetch(holder.peer(), &layer.table, Asking::here(layer.all(), Class::Prefetch), deadline());
    let got = collect(fetch, &layer).await;
    assert!(got.error.is_none(), "{:?}", got.error);
    assert_eq!(got.lacks, layer.all().difference(&have));
    assert!(got.chunks.iter().map(|chunk| chunk.0).eq(have.chunks()), "out of order or not complete");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_at_its_limit_says_busy_and_is_asked_again() {
    let holder = start(|config| {
        (config.upload.transfers_max, config.upload.prefetch_transfers_max) = (2, 1);
    })
    .await;
    let asker = start(|_| {}).await;
    let layer = Layer::new(4, 8, 4096, Look::Noise);
    holder.made.add(&layer, layer.all());
    holder.made.hold(layer.table.diff_id());
    asker.meet(&holder).await;
    let fetch = |class| asker.node.fetch(holder.peer(), &layer.table, Asking::here(layer.all(), class), deadline());

    let slow = spawn_collect(fetch(Class::Prefetch), &layer);
    holder.made.wait_for_held(1).await;
    let refused = collect(fetch(Class::Prefetch), &layer).await.error.expect("is refused");
    assert_eq!((refused.kind(), refused.class()), ("busy", ErrorClass::Transient));

    // The slot that is kept for demand.
    let demand = spawn_collect(fetch(Class::Demand), &layer);
    holder.made.wait_for_held(2).await;
    let refused = collect(fetch(Class::Demand), &layer).await.error.expect("is refused");
    assert!(matches!(refused, ExchangeError::Busy { retry_after, .. } if retry_after < Duration::from_secs(1)));

    holder.made.release();
    for transfer in [slow, demand] {
        let got = transfer.await.expect("no panic");
        assert!(got.error.is_none() && got.chunks.len() == 8, "{got:?}");
    }
    assert!(collect(fetch(Class::Demand), &layer).await.error.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelling_in_the_middle_leaves_the_pool_usable() {
    let holder = start(|_| {}).await;
    let asker = start(single_streamed).await;
    let layer = Layer::new(5, 200, 65536, Look::Noise);
    holder.made.add(&layer, layer.all());
    asker.meet(&holder).await;
    for round in 0..20 {
        let class = if round % 2 == 0 { Class::Demand } else { Class::Prefetch };
        let mut fetch = asker.node.fetch(holder.peer(), &layer.table, Asking::here(layer.all(), class), deadline());
        for _ in 0..round % 4 {
            let arrival = timeout(PATIENCE, fetch.next()).await.expect("in time").expect("not at its end");
            arrival.expect("a chunk");
        }
        drop(fetch);
    }
    // More than there are streams, so every place must be free again.
    let fetch = |class| asker.node.fetch(holder.peer(), &layer.table, Asking::here(layer.all(), class), deadline());
    let (a, b) = tokio::join!(collect(fetch(Class::Demand), &layer), collect(fetch(Class::Prefetch), &layer));
    for got in [a, b] {
        assert!(got.error.is_none() && got.chunks.len() == 200, "{:?}", got.error);
    }
    let reads = holder.made.reads.load(Ordering::SeqCst);
    assert!(reads < 22 * 200, "cancelled transfers were read to their end: {reads} reads");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn demand_does_not_wait_for_streams_that_prefetch_holds() {
    let holder = start(|_| {}).await;
    let asker = start(|config| {
        (config.download.streams_per_peer_max, config.download.prefetch_streams_per_peer_max) = (3, 2);
    })
    .await;
    let (slow, quick) = (Layer::new(6, 4, 4096, Look::Text), Layer::new(7, 4, 4096, Look::Text));
    holder.made.add(&slow, slow.all());
    holder.made.add(&quick, quick.all());
    holder.made.hold(slow.table.diff_id());
    asker.meet(&holder).await;
    let fetch = |layer: &Layer, class| {
        asker.node.fetch(holder.peer(), &layer.table, Asking::here(layer.all(), class), deadline())
    };
    let _held: Vec<_> = (0..5).map(|_| fetch(&slow, Class::Prefetch)).collect();
    // On two cores the second one waits for the first to be read; both hold a stream.
    holder.made.wait_for_held(1).await;
    let got = collect(fetch(&quick, Class::Demand), &quick).await;
    assert!(got.error.is_none() && got.chunks.len() == 4, "{got:?}");
    holder.made.release();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_deadline_of_the_caller_is_kept() {
    let (holder, asker) = (start(|_| {}).await, start(|_| {}).await);
    let layer = Layer::new(8, 4, 4096, Look::Text);
    holder.made.add(&layer, layer.all());
    holder.made.hold(layer.table.diff_id());
    asker.meet(&holder).await;
    let soon = Instant::now() + Duration::from_millis(200);
    let got =
        collect(asker.node.fetch(holder.peer(), &layer.table, Asking::here(layer.all(), Class::Demand), soon), &layer)
            .await;
    let error = got.error.expect("gives up");
    assert_eq!((error.kind(), error.class()), ("timeout", ErrorClass::Transient));
    holder.made.release();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_is_told_of_progress_until_all_is_there() {
    let (holder, asker) = (start(|_| {}).await, start(|_| {}).await);
    let layer = Layer::new(9, 1000, 512, Look::Text);
    holder.made.add(&layer, Runs::one(0..10));
    asker.meet(&holder).await;
    let mut watch = asker.node.watch(holder.peer(), &layer.table);
    let first = timeout(PATIENCE, watch.next()).await.expect("in time").expect("news").expect("no error");
    assert_eq!(first, HaveNews::Map(Runs::one(0..10)));
    let mut known = Runs::one(0..10);
    for end in [11, 400, 1000] {
        holder.made.add(&layer, Runs::one(0..end));
        holder.node.grown(layer.table.diff_id());
        while !known.contains_all(0..end) {
            let news = timeout(PATIENCE, watch.next()).await.expect("in time").expect("news").expect("no error");
            let HaveNews::More(more) = news else { panic!("{news:?}") };
            assert!(more.intersection(&known).is_empty() && !more.is_empty(), "said twice");
            known.insert_all(&more);
        }
    }
    assert!(timeout(PATIENCE, watch.next()).await.expect("in time").is_none(), "goes on after everything");

    let unknown = Layer::new(10, 4, 512, Look::Text);
    let mut watch = asker.node.watch(holder.peer(), &unknown.table);
    let error = timeout(PATIENCE, watch.next()).await.expect("in time").expect("an end").expect_err("an error");
    assert_eq!(error.class(), ErrorClass::NotFound);
    assert!(watch.next().await.is_none());
}

#[tokio::test]
async fn watchers_are_bounded_and_leave_their_place() {
    let holder = start(|config| config.upload.watchers_max = 1).await;
    let asker = start(|_| {}).await;
    let layer = Layer::new(11, 4, 512, Look::Text);
    holder.made.add(&layer, Runs::one(0..1));
    asker.meet(&holder).await;
    let mut first = asker.node.watch(holder.peer(), &layer.table);
    timeout(PATIENCE, first.next()).await.expect("in time").expect("news").expect("no error");
    let mut second = asker.node.watch(holder.peer(), &layer.table);
    let error = timeout(PATIENCE, second.next()).await.expect("in time").expect("an end").expect_err("an error");
    assert_eq!(error.kind(), "busy");
    drop(first);
    wait_for("the place of the first watcher", async || {
        let mut again = asker.node.watch(holder.peer(), &layer.table);
        timeout(PATIENCE, again.next()).await.expect("in time").expect("an item").ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_readers_nor_prefetch_wait_for_watches() {
    let holder = start(|_| {}).await;
    let asker = start(single_streamed).await;
    // An image has a dozen layers, and a partner tells of each of them.
    let layers: Vec<Layer> = (20..32).map(|seed| Layer::new(seed, 4, 512, Look::Text)).collect();
    asker.meet(&holder).await;
    let mut watches = Vec::new();
    for layer in &layers {
        holder.made.add(layer, Runs::one(0..2));
        let mut watch = asker.node.watch(holder.peer(), &layer.table);
        timeout(PATIENCE, watch.next()).await.expect("in time").expect("news").expect("no error");
        watches.push(watch);
    }
    for class in [Class::Demand, Class::Prefetch] {
        let asking = Asking::here(Runs::one(0..2), class);
        let got = collect(asker.node.fetch(holder.peer(), &layers[0].table, asking, deadline()), &layers[0]).await;
        assert!(got.error.is_none() && got.chunks.len() == 2, "{class:?}: {got:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_restarts_is_found_again_under_its_name() {
    let (holder, asker) = (start(|_| {}).await, start(|_| {}).await);
    let layer = Layer::new(12, 4, 4096, Look::Text);
    holder.made.add(&layer, layer.all());
    asker.meet(&holder).await;
    asker.node.have(holder.peer(), &layer.table, deadline()).await.expect("has it");
    let (address, peer) = (holder.address(), holder.peer());
    let mut events = asker.node.events();
    holder.node.shutdown().await;
    assert!(holder.node.peers().is_empty() && holder.node.listen_addresses().is_empty());
    let down = timeout(PATIENCE, events.recv()).await.expect("in time").expect("an event");
    assert_eq!(down, PeerEvent::Down(peer));

    let mut again = config(&holder.folder);
    again.listen = vec![address];
    let node = Node::start(again, Arc::clone(&holder.made) as Arc<dyn Content>, Arc::new(OpenDesk))
        .await
        .expect("starts again");
    assert_eq!(node.local_peer_id(), peer, "the name did not survive");
    // Without being told: the address is remembered, the dead streams are not.
    assert_eq!(asker.node.have(peer, &layer.table, deadline()).await.expect("is found again"), layer.all());
    assert_eq!(asker.node.peers(), [peer]);
}

#[tokio::test]
async fn a_banned_peer_is_answered_and_not_asked_until_the_ban_ends() {
    let (holder, asker) = (start(|_| {}).await, start(|_| {}).await);
    let layer = Layer::new(13, 4, 4096, Look::Text);
    holder.made.add(&layer, layer.all());
    asker.made.add(&layer, Runs::one(1..3));
    asker.meet(&holder).await;
    asker.node.have(holder.peer(), &layer.table, deadline()).await.expect("has it");
    asker.node.ban(holder.peer(), Duration::from_secs(3600)).await.expect("bans");
    wait_for("it to be forgotten", async || asker.node.peers().is_empty().then_some(())).await;
    let error = asker.node.have(holder.peer(), &layer.table, deadline()).await.expect_err("is banned");
    assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "unreachable"));
    assert!(asker.node.connect(holder.address()).await.is_err(), "connected to a banned peer");
    // It may ask over the connection that stands, and each may ban the other.
    let asked = async || holder.node.have(asker.peer(), &layer.table, deadline()).await.expect("is answered");
    assert_eq!(asked().await, Runs::one(1..3));
    holder.node.ban(asker.peer(), Duration::from_secs(3600)).await.expect("bans");
    wait_for("it to be forgotten", async || holder.node.peers().is_empty().then_some(())).await;
    holder.node.ban(asker.peer(), Duration::ZERO).await.expect("shortens the ban");
    wait_for("the end of that ban", async || (!holder.node.peers().is_empty()).then_some(())).await;
    assert_eq!(asked().await, Runs::one(1..3));
    assert!(asker.node.peers().is_empty());

    asker.node.ban(holder.peer(), Duration::ZERO).await.expect("shortens the ban");
    wait_for("the end of the ban", async || (!asker.node.peers().is_empty()).then_some(())).await;
    asker.node.have(holder.peer(), &layer.table, deadline()).await.expect("is back");
}

#[tokio::test]
async fn a_banned_peer_that_connects_is_answered_and_is_no_peer() {
    let (holder, asker) = (start(|_| {}).await, start(|_| {}).await);
    let layer = Layer::new(17, 4, 4096, Look::Text);
    holder.made.add(&layer, layer.all());
    holder.node.ban(asker.peer(), Duration::from_secs(3600)).await.expect("bans");
    asker.meet(&holder).await;
    assert_eq!(asker.node.have(holder.peer(), &layer.table, deadline()).await.expect("is answered"), layer.all());
    assert!(holder.node.peers().is_empty());
    holder.node.ban(asker.peer(), Duration::ZERO).await.expect("shortens the ban");
    wait_for("the end of the ban", async || (!holder.node.peers().is_empty()).then_some(())).await;
}

/// The connection stays, and the holder works on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_waits_for_a_peer_ends_when_the_peer_is_banned() {
    let (holder, asker) = (start(|_| {}).await, start(|config| config.download.stall_timeout = 10 * PATIENCE).await);
    let layer = Layer::new(16, 4, 4096, Look::Text);
    holder.made.add(&layer, layer.all());
    holder.made.hold(layer.table.diff_id());
    asker.meet(&holder).await;
    let asking = Asking::here(layer.all(), Class::Demand);
    let fetch = asker.node.fetch(holder.peer(), &layer.table, asking, Instant::now() + 10 * PATIENCE);
    let got = spawn_collect(fetch, &layer);
    holder.made.wait_for_held(1).await;
    asker.node.ban(holder.peer(), Duration::from_secs(3600)).await.expect("bans");
    let got = timeout(PATIENCE, got).await.expect("ends at once").expect("no panic");
    assert!(matches!(got.error, Some(ExchangeError::Disconnected { .. })), "{got:?}");
    holder.made.release();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_ends_transfers_with_an_error() {
    let (holder, asker) = (start(|_| {}).await, start(|_| {}).await);
    let layer = Layer::new(14, 4, 4096, Look::Text);
    holder.made.add(&layer, layer.all());
    holder.made.hold(layer.table.diff_id());
    asker.meet(&holder).await;
    let mut fetch = asker.node.fetch(holder.peer(), &layer.table, Asking::here(layer.all(), Class::Demand), deadline());
    tokio::select! {
        () = holder.made.wait_for_held(1) => {}
        early = fetch.next() => panic!("came before it was read: {early:?}"),
    }
    asker.node.shutdown().await;
    let error = collect(fetch, &layer).await.error.expect("an end that looks like success");
    assert_eq!((error.kind(), error.class()), ("closed", ErrorClass::Local));
    assert!(asker.node.provide(layer.table.diff_id()).await.is_err());
    holder.made.release();
}

#[tokio::test]
async fn nodes_of_two_clusters_do_not_exchange() {
    let here = start(|_| {}).await;
    let there = start(|config| config.cluster = "other".parse().expect("a cluster id")).await;
    let layer = Layer::new(15, 4, 4096, Look::Text);
    there.made.add(&layer, layer.all());
    here.meet(&there).await;
    let error = here.node.have(there.peer(), &layer.table, deadline()).await.expect_err("another cluster");
    assert_eq!(error.kind(), "unsupported");
}

#[tokio::test]
async fn a_peer_that_nobody_knows_is_unreachable() {
    let asker = start(|_| {}).await;
    let layer = Layer::new(16, 1, 512, Look::Text);
    let nobody = hermes_p2p::PeerId::random();
    let error = asker.node.have(nobody, &layer.table, deadline()).await.expect_err("nobody");
    assert_eq!((error.kind(), error.class()), ("unreachable", ErrorClass::Transient));
    asker.node.learn(nobody, "/ip4/127.0.0.1/tcp/1".parse().expect("a multiaddr")).await.expect("learns");
    let error = asker.node.have(nobody, &layer.table, deadline()).await.expect_err("nobody");
    assert_eq!(error.kind(), "unreachable");
    assert!(asker.node.connect("/ip4/127.0.0.1/tcp/1".parse().expect("a multiaddr")).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_that_comes_at_once_is_served() {
    let holder = start(|_| {}).await;
    let layer = Layer::new(17, 16, 4096, Look::Text);
    holder.made.add(&layer, layer.all());
    let askers = futures::future::join_all((0..6).map(|_| start(|_| {}))).await;
    for asker in &askers {
        asker.meet(&holder).await;
    }
    // Every stream is opened at the same moment.
    let fetches = askers.iter().flat_map(|asker| {
        let fetch = |no: u32| {
            asker.node.fetch(
                holder.peer(),
                &layer.table,
                Asking::here(Runs::one(no..no + 4), Class::Demand),
                deadline(),
            )
        };
        (0..4).map(fetch).collect::<Vec<_>>()
    });
    for got in futures::future::join_all(fetches.map(|fetch| collect(fetch, &layer))).await {
        assert!(got.error.is_none() && got.chunks.len() == 4, "{:?}", got.error);
    }
}
