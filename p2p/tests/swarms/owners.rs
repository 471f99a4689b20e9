//! Honest nodes whose desks decide: owners, relays, and those who wait for them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use hermes_image::ids::{ArtifactId, ChunkNo, DiffId, Digest};
use hermes_image::runs::Runs;
use hermes_p2p::exchange::codec::{Accept, Answer, Request};
use hermes_p2p::{
    Arrival, Asking, Claim, Class, Desk, Duty, ErrorClass, ExchangeError, Fetch, NodeConfig, PeerId, Ruling, Want,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::common::{
    Layer, Look, PATIENCE, RawPeer, TestNode, ask, collect, deadline, hear, single_streamed, spawn_collect, start,
    start_with, wait_for,
};

pub(crate) const OWNER: Want = Want::Owner { duty: Duty::Cluster, again: false, can_read: true };

/// A claim and where the rulings on it go.
pub(crate) type Claimed = (Claim, mpsc::Sender<Ruling>);

/// A desk that lets a test decide.
pub(crate) struct TestDesk {
    claims: mpsc::Sender<Claimed>,
    /// Layers that nobody may have.
    pub(crate) closed: Mutex<HashSet<DiffId>>,
    grants: Mutex<Vec<(PeerId, Vec<u8>)>>,
}

impl Desk for TestDesk {
    fn claim(&self, claim: Claim) -> mpsc::Receiver<Ruling> {
        let (rule, rulings) = mpsc::channel(64);
        // A test that has ended decides nothing.
        let _ = self.claims.try_send((claim, rule));
        rulings
    }

    fn allows(&self, _: PeerId, layer: DiffId) -> bool {
        !self.closed.lock().contains(&layer)
    }

    fn allows_artifact(&self, _: PeerId, _: ArtifactId) -> bool {
        true
    }

    fn allows_statement(&self, _: PeerId, _: Digest) -> bool {
        true
    }

    fn grant(&self, peer: PeerId, grant: &[u8]) -> bool {
        self.grants.lock().push((peer, grant.to_vec()));
        grant.starts_with(b"good")
    }
}

/// A node, its desk, and the claims that come to it.
pub(crate) async fn owner(change: impl FnOnce(&mut NodeConfig)) -> (TestNode, Arc<TestDesk>, mpsc::Receiver<Claimed>) {
    let (send, claims) = mpsc::channel(256);
    let desk = Arc::new(TestDesk { claims: send, closed: Mutex::default(), grants: Mutex::default() });
    (start_with(Arc::clone(&desk) as Arc<dyn Desk>, change).await, desk, claims)
}

async fn next_claim(claims: &mut mpsc::Receiver<Claimed>) -> Claimed {
    timeout(PATIENCE, claims.recv()).await.expect("in time").expect("a claim")
}

async fn rule(rule: &mpsc::Sender<Ruling>, ruling: Ruling) {
    rule.send(ruling).await.expect("somebody still waits");
}

/// The next arrival that is more than a word of patience.
async fn next_news(fetch: &mut Fetch) -> Arrival {
    loop {
        let next = timeout(PATIENCE, fetch.next()).await.expect("in time").expect("not at its end");
        match next.expect("no error") {
            Arrival::Pending { .. } => {}
            news => return news,
        }
    }
}

fn owned(chunks: std::ops::Range<u32>, extent: std::ops::Range<u32>) -> Asking {
    Asking { chunks: Runs::one(chunks), extent, want: OWNER, class: Class::Demand }
}

fn layer() -> Layer {
    Layer::new(1, 16, 4096, Look::Noise)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_ruling_reaches_the_asker() {
    let (holder, _, mut claims) = owner(|_| {}).await;
    let (asker, third) = (start(|_| {}).await, start(|_| {}).await);
    let layer = layer();
    holder.made.add(&layer, Runs::one(0..2));
    third.made.add(&layer, layer.all());
    asker.meet(&holder).await;
    holder.meet(&third).await;
    let asking = owned(0..10, 0..12);
    let fetch = asker.node.fetch(holder.peer(), &layer.table, asking.clone(), deadline());
    let collected = tokio::spawn({
        let layer = layer.clone();
        async move { collect(fetch, &layer).await }
    });

    let (claim, to) = next_claim(&mut claims).await;
    let expected = Claim {
        peer: asker.peer(),
        layer: layer.table.diff_id(),
        table: layer.table.id(),
        class: Class::Demand,
        want: asking.want,
        extent: 0..12,
        chunks: Runs::one(0..10),
    };
    assert_eq!(claim, expected);
    rule(&to, Ruling::RegistryRests(Duration::from_secs(40))).await;
    rule(&to, Ruling::Lacks(Runs::one(2..3))).await;
    rule(&to, Ruling::Refer { chunks: Runs::one(3..5), peers: vec![asker.peer(), third.peer(), third.peer()] }).await;
    // What is answered for already is left out, what nobody asked for stays.
    rule(&to, Ruling::Delegate(Runs::one(4..7))).await;
    rule(&to, Ruling::Delegate(Runs::one(6..12))).await;
    // Of the other six, four were delegated just now.
    rule(&to, Ruling::Give(Runs::one(0..2))).await;
    drop(to);
    let got = collected.await.expect("no panic");
    assert!(got.error.is_none(), "{got:?}");
    assert_eq!(got.chunks, [ChunkNo(0), ChunkNo(1)]);
    assert_eq!(got.lacks, Runs::one(2..3));
    assert_eq!(got.referred, [(Runs::one(3..5), vec![third.peer()])]);
    assert_eq!(got.delegated, Runs::one(5..12));
    // The asker was never told where the third node is, but by the referral.
    asker.node.have(third.peer(), &layer.table, deadline()).await.expect("is found where it was said to be");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_given_comes_when_it_is_here_and_the_rest_of_the_time_is_pending() {
    let (holder, _, mut claims) = owner(|_| {}).await;
    let asker = start(|_| {}).await;
    let layer = layer();
    holder.made.add(&layer, Runs::new());
    asker.meet(&holder).await;
    let mut fetch = asker.node.fetch(holder.peer(), &layer.table, owned(4..8, 0..16), deadline());
    let (_, to) = next_claim(&mut claims).await;
    rule(&to, Ruling::Give(Runs::one(4..8))).await;
    rule(&to, Ruling::RegistryRests(Duration::from_secs(40))).await;
    loop {
        let next = timeout(PATIENCE, fetch.next()).await.expect("in time").expect("not at its end").expect("no error");
        let Arrival::Pending { eta, registry_rests } = next else { panic!("{next:?} came out of nothing") };
        assert_eq!(eta, None);
        if let Some(rests) = registry_rests {
            assert!(rests <= Duration::from_secs(40) && rests > Duration::from_secs(1), "{rests:?}");
            break;
        }
    }
    // Not in the order of their numbers.
    for end in [6..7, 5..7, 5..8] {
        holder.made.add(&layer, Runs::one(end.clone()));
        holder.node.grown(layer.table.diff_id());
        let Arrival::Chunk(chunk, bytes) = next_news(&mut fetch).await else { panic!("no chunk") };
        assert!(end.contains(&chunk.0));
        assert_eq!(*bytes, layer.bytes(chunk));
    }
    // A ruling may be taken back.
    rule(&to, Ruling::Lacks(Runs::one(4..6))).await;
    assert_eq!(next_news(&mut fetch).await, Arrival::Lacks(Runs::one(4..5)));
    assert!(timeout(PATIENCE, fetch.next()).await.expect("in time").is_none());
    to.closed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_here_is_sent_without_the_desk_and_only_the_rest_is_claimed() {
    let (holder, _, mut claims) = owner(|_| {}).await;
    let asker = start(|_| {}).await;
    let layer = layer();
    holder.made.add(&layer, Runs::from_iter([0..4, 6..9]));
    asker.meet(&holder).await;
    let asking = Asking::here(Runs::one(0..8), Class::Prefetch);
    let mut fetch = asker.node.fetch(holder.peer(), &layer.table, asking, deadline());
    for expected in [0, 1, 2, 3, 6, 7] {
        let news = next_news(&mut fetch).await;
        assert!(matches!(news, Arrival::Chunk(ChunkNo(chunk), _) if chunk == expected), "{news:?}");
    }
    let (claim, to) = next_claim(&mut claims).await;
    assert_eq!((claim.chunks, claim.want, claim.extent), (Runs::one(4..6), Want::Here, 0..0));
    // It came without a ruling. A desk that says nothing gives what is here.
    holder.made.add(&layer, Runs::one(5..6));
    drop(to);
    let got = collect(fetch, &layer).await;
    assert!(got.error.is_none(), "{got:?}");
    assert_eq!((got.chunks, got.lacks), (vec![ChunkNo(5)], Runs::one(4..5)));

    let all_here = Asking::here(Runs::one(5..6), Class::Demand);
    let got = collect(asker.node.fetch(holder.peer(), &layer.table, all_here, deadline()), &layer).await;
    assert!(got.error.is_none() && got.chunks.len() == 1 && claims.try_recv().is_err(), "{got:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_relays_while_it_downloads() {
    let (origin, _, mut origin_claims) = owner(|_| {}).await;
    let (relay, _, mut relay_claims) = owner(|_| {}).await;
    let last = start(|_| {}).await;
    let layer = Layer::new(2, 40, 65536, Look::Noise);
    origin.made.add(&layer, Runs::new());
    relay.made.add(&layer, Runs::new());
    relay.meet(&origin).await;
    last.meet(&relay).await;

    let mut upstream = relay.node.fetch(origin.peer(), &layer.table, owned(0..40, 0..40), deadline());
    let (_, to_relay) = next_claim(&mut origin_claims).await;
    rule(&to_relay, Ruling::Give(layer.all())).await;
    let mut downstream = last.node.fetch(relay.peer(), &layer.table, owned(0..40, 0..40), deadline());
    let (_, to_last) = next_claim(&mut relay_claims).await;
    rule(&to_last, Ruling::Give(layer.all())).await;

    let storing = {
        let (made, node, layer) = (Arc::clone(&relay.made), relay.node.clone(), layer.clone());
        tokio::spawn(async move {
            let mut have = Runs::new();
            while let Some(arrival) = upstream.next().await {
                if let Arrival::Chunk(chunk, _) = arrival.expect("no error") {
                    have.insert(chunk.0..chunk.0 + 1);
                    made.add(&layer, have.clone());
                    node.grown(layer.table.diff_id());
                }
            }
        })
    };
    // Each chunk reaches the last node before the origin has the next.
    for chunk in 0..40 {
        origin.made.add(&layer, Runs::one(0..chunk + 1));
        origin.node.grown(layer.table.diff_id());
        let Arrival::Chunk(arrived, bytes) = next_news(&mut downstream).await else { panic!("no chunk") };
        assert_eq!(arrived, ChunkNo(chunk));
        assert_eq!(*bytes, layer.bytes(arrived));
    }
    assert!(timeout(PATIENCE, downstream.next()).await.expect("in time").is_none());
    timeout(PATIENCE, storing).await.expect("in time").expect("no panic");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_is_withdrawn_when_its_asker_leaves() {
    let (holder, _, mut claims) = owner(|_| {}).await;
    let asker = start(|_| {}).await;
    let layer = layer();
    holder.made.add(&layer, Runs::new());
    asker.meet(&holder).await;
    for round in 0..4 {
        let fetch = asker.node.fetch(holder.peer(), &layer.table, owned(0..8, 0..8), deadline());
        let (_, to) = next_claim(&mut claims).await;
        if round % 2 == 1 {
            rule(&to, Ruling::Give(Runs::one(0..4))).await;
        }
        drop(fetch);
        timeout(PATIENCE, to.closed()).await.expect("the desk is told");
    }
    // So is everything of a node that has gone.
    let _fetch = asker.node.fetch(holder.peer(), &layer.table, owned(0..8, 0..8), deadline());
    let (_, to) = next_claim(&mut claims).await;
    asker.node.shutdown().await;
    timeout(PATIENCE, to.closed()).await.expect("the desk is told");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_nobody_decides_ends_as_lacking() {
    let (holder, _, mut claims) = owner(|config| config.upload.claim_timeout = Duration::from_millis(700)).await;
    let asker = start(|_| {}).await;
    let layer = layer();
    holder.made.add(&layer, Runs::new());
    asker.meet(&holder).await;
    let got = collect(asker.node.fetch(holder.peer(), &layer.table, owned(0..8, 0..8), deadline()), &layer).await;
    assert!(got.error.is_none() && got.lacks == Runs::one(0..8), "{got:?}");
    assert!((1..=8).contains(&got.pendings), "{} times pending", got.pendings);
    let (_, to) = next_claim(&mut claims).await;
    timeout(PATIENCE, to.closed()).await.expect("the desk is told");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_that_wait_hold_no_transfer_and_are_bounded() {
    let (holder, _, mut claims) = owner(|config| {
        (config.upload.transfers_max, config.upload.prefetch_transfers_max) = (1, 1);
        config.upload.claims_per_peer_max = 3;
    })
    .await;
    let asker = start(|_| {}).await;
    let (layer, slow) = (layer(), Layer::new(3, 4, 4096, Look::Noise));
    holder.made.add(&layer, Runs::one(15..16));
    holder.made.add(&slow, slow.all());
    holder.made.hold(slow.table.diff_id());
    asker.meet(&holder).await;
    let fetch = |asking| asker.node.fetch(holder.peer(), &layer.table, asking, deadline());
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let fetch = fetch(owned(0..8, 0..8));
        waiting.push((fetch, next_claim(&mut claims).await.1));
    }
    // The only slot is free, and nobody else is refused.
    let got = collect(fetch(Asking::here(Runs::one(15..16), Class::Demand)), &layer).await;
    assert!(got.error.is_none() && got.chunks.len() == 1, "{got:?}");
    let got = collect(fetch(owned(0..8, 0..8)), &layer).await;
    assert_eq!(got.error.expect("one claim too many").kind(), "busy");

    // A claim whose chunk is here waits for the slot that another transfer holds.
    let holds = asker.node.fetch(holder.peer(), &slow.table, Asking::here(slow.all(), Class::Demand), deadline());
    holder.made.wait_for_held(1).await;
    let (mut first, to) = waiting.remove(0);
    holder.made.add(&layer, Runs::from_iter([0..8, 15..16]));
    rule(&to, Ruling::Give(Runs::one(0..8))).await;
    drop(to);
    holder.made.release();
    assert!(collect(holds, &slow).await.error.is_none());
    for chunk in 0..8 {
        let news = next_news(&mut first).await;
        assert!(matches!(news, Arrival::Chunk(ChunkNo(no), _) if no == chunk), "{news:?}");
    }
    assert!(timeout(PATIENCE, first.next()).await.expect("in time").is_none());
    // Its place is free again.
    let _fourth = fetch(owned(0..8, 0..8));
    next_claim(&mut claims).await;
}

/// An owner that has two chunks of a layer, the claims that come to it, and an asker with one stream for demand, so that a stream
/// out of step shows.
async fn owner_and_single_streamed_asker() -> (TestNode, mpsc::Receiver<Claimed>, TestNode, Layer) {
    let (holder, _, claims) = owner(|_| {}).await;
    let asker = start(single_streamed).await;
    let layer = layer();
    holder.made.add(&layer, Runs::one(0..2));
    asker.meet(&holder).await;
    (holder, claims, asker, layer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_leave_the_stream_in_step() {
    let (holder, mut claims, asker, layer) = owner_and_single_streamed_asker().await;
    let fetch = |asking| spawn_collect(asker.node.fetch(holder.peer(), &layer.table, asking, deadline()), &layer);
    for ruling in [Ruling::NotMine { epoch: 7 }, Ruling::Denied] {
        let fetched = fetch(owned(0..8, 0..8));
        let (_, to) = next_claim(&mut claims).await;
        rule(&to, Ruling::Give(Runs::one(0..2))).await;
        rule(&to, Ruling::Lacks(Runs::one(2..3))).await;
        rule(&to, ruling.clone()).await;
        let got = fetched.await.expect("no panic");
        let error = got.error.as_ref().expect("is refused");
        match ruling {
            Ruling::NotMine { .. } => {
                assert!(matches!(error, ExchangeError::NotMine { peer, epoch: 7 } if *peer == holder.peer()));
                assert_eq!((error.class(), error.kind()), (ErrorClass::Transient, "not_mine"));
            }
            _ => assert_eq!((error.class(), error.kind()), (ErrorClass::Denied, "denied")),
        }
        assert_eq!(got.lacks, Runs::one(2..3));
        timeout(PATIENCE, to.closed()).await.expect("the claim has ended");
    }
    // To say it of what nobody claims to be owned is to say that it is not here.
    let fetched = fetch(Asking::here(Runs::one(1..8), Class::Demand));
    let (_, to) = next_claim(&mut claims).await;
    rule(&to, Ruling::NotMine { epoch: 7 }).await;
    let got = fetched.await.expect("no panic");
    assert!(got.error.is_none() && got.lacks == Runs::one(2..8) && got.chunks == [ChunkNo(1)], "{got:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_comes_after_what_was_read_meanwhile() {
    let (holder, mut claims, asker, layer) = owner_and_single_streamed_asker().await;
    let fetch = |asking| spawn_collect(asker.node.fetch(holder.peer(), &layer.table, asking, deadline()), &layer);
    for ruling in [Ruling::NotMine { epoch: 7 }, Ruling::Denied] {
        holder.made.hold(layer.table.diff_id());
        let fetched = fetch(owned(0..8, 0..8));
        let (_, to) = next_claim(&mut claims).await;
        rule(&to, Ruling::Give(Runs::one(0..2))).await;
        holder.made.wait_for_held(1).await;
        rule(&to, ruling).await;
        holder.made.release();
        let got = fetched.await.expect("no panic");
        assert_eq!(got.chunks, [ChunkNo(0), ChunkNo(1)], "{got:?}");
        assert!(matches!(got.error.map(|error| error.kind()), Some("not_mine" | "denied")));
        let next = fetch(Asking::here(Runs::one(1..2), Class::Demand)).await.expect("no panic");
        assert!(next.error.is_none() && next.chunks == [ChunkNo(1)], "{next:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_have_a_layer_is_denied_and_grants_are_judged() {
    let (holder, desk, mut claims) = owner(|_| {}).await;
    let asker = start(|_| {}).await;
    let (closed, open) = (layer(), Layer::new(2, 4, 4096, Look::Text));
    for layer in [&closed, &open] {
        holder.made.add(layer, layer.all());
    }
    desk.closed.lock().insert(closed.table.diff_id());
    asker.meet(&holder).await;
    let (node, peer) = (&asker.node, holder.peer());
    let denied = |error: &ExchangeError| assert_eq!((error.class(), error.kind()), (ErrorClass::Denied, "denied"));
    denied(&node.have(peer, &closed.table, deadline()).await.expect_err("is closed"));
    for asking in [Asking::here(closed.all(), Class::Demand), owned(0..4, 0..4)] {
        let got = collect(node.fetch(peer, &closed.table, asking, deadline()), &closed).await;
        denied(&got.error.expect("is closed"));
    }
    let mut watch = node.watch(peer, &closed.table);
    denied(&timeout(PATIENCE, watch.next()).await.expect("in time").expect("an end").expect_err("is closed"));
    assert!(claims.try_recv().is_err(), "the desk was asked about chunks that the peer may not have");
    node.have(peer, &open.table, deadline()).await.expect("is open");

    let present = |grant: &'static [u8]| node.present_grant(peer, grant.into(), deadline());
    assert!(present(b"good for layer 1").await.expect("is judged"));
    assert!(!present(b"bad").await.expect("is judged"));
    let presented: Vec<_> = desk.grants.lock().iter().map(|(from, grant)| (*from, grant.len())).collect();
    assert_eq!(presented, [(asker.peer(), 16), (asker.peer(), 3)]);
    for grant in [vec![], vec![1; 1025]] {
        let error = node.present_grant(peer, grant.into(), deadline()).await.expect_err("no message holds it");
        assert_eq!((error.class(), error.kind()), (ErrorClass::Local, "grant_length"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_sent_ahead_of_a_wait_is_answered_after_it() {
    let (holder, _, mut claims) = owner(|_| {}).await;
    let layer = layer();
    holder.made.add(&layer, Runs::one(0..1));
    let raw = RawPeer::start(Some(holder.address())).await;
    let mut session = raw.greet(holder.peer()).await;
    let (diff_id, table) = (layer.table.diff_id(), layer.table.id());
    let get = Request::Get {
        layer: diff_id,
        table,
        class: Class::Demand,
        accept: Accept::Plain,
        want: OWNER,
        extent: 0..8,
        chunks: Runs::one(0..1),
    };
    ask(&mut session, &get).await;
    let (_, to) = next_claim(&mut claims).await;
    ask(&mut session, &Request::Have { layer: diff_id, table }).await;
    // The holder has looked for the end of the stream when it says this.
    for _ in 0..2 {
        let answer = hear(&mut session, 16).await.expect("an answer");
        assert_eq!(answer, Answer::Pending { eta_ms: 0, registry_rests_ms: 0 });
    }
    rule(&to, Ruling::Give(Runs::one(0..1))).await;
    let mut answers = Vec::new();
    while answers.len() < 3 {
        match hear(&mut session, 16).await.expect("an answer") {
            Answer::Pending { .. } => {}
            answer => answers.push(answer.name()),
        }
    }
    assert_eq!(answers, ["DATA", "END", "HAVE_MAP"]);
    // And when that asker leaves, the next write shows it.
    ask(&mut session, &get).await;
    let (_, to) = next_claim(&mut claims).await;
    ask(&mut session, &Request::Have { layer: diff_id, table }).await;
    drop(session);
    timeout(PATIENCE, to.closed()).await.expect("the desk is told");
}

#[tokio::test]
async fn asking_for_what_is_not_of_the_extent_is_refused_at_home() {
    let (holder, asker) = (start(|_| {}).await, start(|_| {}).await);
    let layer = layer();
    asker.meet(&holder).await;
    for (asking, kind) in [
        (owned(0..8, 1..8), "not_in_extent"),
        (owned(0..8, 0..0), "not_in_extent"),
        (owned(0..8, 0..17), "no_such_chunk"),
        (Asking { want: Want::Here, ..owned(0..8, 3..3) }, "not_in_extent"),
    ] {
        let got = collect(asker.node.fetch(holder.peer(), &layer.table, asking.clone(), deadline()), &layer).await;
        let error = got.error.expect("is refused");
        assert_eq!((error.class(), error.kind()), (ErrorClass::Local, kind), "{asking:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ask_does_not_wait_for_a_dial_but_the_dial_goes_on() {
    let holder = start(|_| {}).await;
    let asker = start(|config| config.download.dial_timeout = Duration::from_millis(20)).await;
    let layer = layer();
    holder.made.add(&layer, layer.all());
    // A listener that nobody accepts from: the handshake waits until it times out.
    let hole = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let address = hermes_p2p::address::multiaddr_of(hole.local_addr().expect("is bound"));
    let nobody = PeerId::random();
    asker.node.learn(nobody, address).await.expect("learns");
    let asking = Asking::here(layer.all(), Class::Demand);
    let got = collect(asker.node.fetch(nobody, &layer.table, asking.clone(), deadline()), &layer).await;
    let error = got.error.expect("is not reached");
    assert_eq!((error.class(), error.kind()), (ErrorClass::Transient, "timeout"));

    asker.node.learn(holder.peer(), holder.address()).await.expect("learns");
    wait_for("the dial that goes on", async || {
        let fetch = asker.node.fetch(holder.peer(), &layer.table, asking.clone(), deadline());
        collect(fetch, &layer).await.error.is_none().then_some(())
    })
    .await;
}
