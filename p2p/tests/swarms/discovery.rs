//! How nodes find each other and each other's layers.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use hermes_image::ids::DiffId;
use hermes_p2p::{Asking, Class, OpenDesk, PeerAddress, PeerEvent};
use tokio::time::timeout;

use crate::common::{Layer, Look, PATIENCE, TestNode, collect, deadline, start, wait_for};

fn seed(node: &TestNode) -> PeerAddress {
    PeerAddress::Fixed(node.address())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_is_found_through_a_third_node() {
    let meeting_point = start(|_| {}).await;
    let seeds = vec![seed(&meeting_point)];
    let holder = start(|config| config.peers = seeds.clone()).await;
    let asker = start(|config| config.peers = seeds.clone()).await;
    let layer = Layer::new(1, 10, 4096, Look::Text);
    holder.made.add(&layer, layer.all());
    holder.node.provide(layer.table.diff_id()).await.expect("announces");

    let holders = wait_for("a holder", async || {
        let found = asker.node.find_holders(layer.table.diff_id()).await.expect("looks");
        (!found.is_empty()).then_some(found)
    })
    .await;
    assert_eq!(holders, [holder.peer()]);
    // The asker was never told where the holder is.
    let got = collect(
        asker.node.fetch(holders[0], &layer.table, Asking::here(layer.all(), Class::Demand), deadline()),
        &layer,
    )
    .await;
    assert!(got.error.is_none() && got.chunks.len() == 10, "{got:?}");
    // Whoever looks for its own layer does not find itself.
    assert_eq!(holder.node.find_holders(layer.table.diff_id()).await.expect("looks"), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_nodes_find_several_holders() {
    let meeting_point = start(|_| {}).await;
    let seeds = vec![seed(&meeting_point)];
    let nodes = join_all((0..8).map(|_| start(|config| config.peers = seeds.clone()))).await;
    let layer = DiffId([2; 32]);
    for node in &nodes[..3] {
        node.node.provide(layer).await.expect("announces");
    }
    let mut expected: Vec<_> = nodes[..3].iter().map(TestNode::peer).collect();
    expected.sort();
    for node in &nodes[3..] {
        wait_for("all holders", async || {
            let mut found = node.node.find_holders(layer).await.expect("looks");
            found.sort();
            (found == expected).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn what_was_announced_alone_is_announced_again_to_the_first_peer() {
    let lonely = start(|_| {}).await;
    let layer = DiffId([3; 32]);
    lonely.node.provide(layer).await.expect("announces");
    assert_eq!(lonely.node.find_holders(layer).await.expect("looks"), []);
    let other = start(|_| {}).await;
    other.meet(&lonely).await;
    wait_for("the holder", async || (other.node.find_holders(layer).await.ok()? == [lonely.peer()]).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_withdrawn_layer_is_forgotten_when_its_time_is_over() {
    let short = |config: &mut hermes_p2p::NodeConfig| {
        config.discovery.republish_every = Duration::from_secs(1);
        config.discovery.provider_ttl = Duration::from_secs(2);
        config.discovery.found_ttl = Duration::from_millis(10);
        config.discovery.missing_ttl = Duration::from_millis(10);
    };
    let meeting_point = start(short).await;
    let seeds = vec![seed(&meeting_point)];
    let join = |config: &mut hermes_p2p::NodeConfig| {
        short(config);
        config.peers = seeds.clone();
    };
    let (holder, asker) = (start(join).await, start(join).await);
    let layer = DiffId([4; 32]);
    holder.node.provide(layer).await.expect("announces");
    let found = async || asker.node.find_holders(layer).await.expect("looks") == [holder.peer()];
    wait_for("the holder", async || found().await.then_some(())).await;
    holder.node.withdraw(layer).await.expect("withdraws");
    wait_for("the end of the record", async || (!found().await).then_some(())).await;
}

#[tokio::test]
async fn a_node_among_its_own_seeds_and_a_dead_one_still_find_the_living() {
    let living = start(|_| {}).await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = crate::common::config(&folder);
    // A port that is free now, so that the node can be told of itself before it starts.
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let own = free.local_addr().expect("is bound");
    drop(free);
    config.listen = vec![hermes_p2p::address::multiaddr_of(own)];
    let port = living.address().to_string().rsplit('/').next().expect("has a port").to_owned();
    config.peers = [own.to_string(), "127.0.0.1:1".into(), format!("localhost:{port}")]
        .iter()
        .map(|text| text.parse().expect("an address"))
        .collect();
    let content = Arc::new(crate::common::Made::default());
    let node = hermes_p2p::Node::start(config, content, Arc::new(OpenDesk)).await.expect("starts");
    wait_for("the living seed", async || (node.peers() == [living.peer()]).then_some(())).await;
}

#[tokio::test]
async fn a_seed_that_comes_late_is_found() {
    let late = start(|_| {}).await;
    let (address, peer) = (late.address(), late.peer());
    late.node.shutdown().await;
    let early = start(|config| config.peers = vec![PeerAddress::Fixed(address.clone())]).await;
    let mut events = early.node.events();
    let mut again = crate::common::config(&late.folder);
    again.listen = vec![address];
    let node = hermes_p2p::Node::start(again, late.made.clone(), Arc::new(OpenDesk)).await.expect("starts");
    let up = timeout(PATIENCE, events.recv()).await.expect("in time").expect("an event");
    assert_eq!(up, PeerEvent::Up(peer));
    // And again when it was lost.
    early.node.ban(peer, Duration::ZERO).await.expect("cuts off");
    let down = timeout(PATIENCE, events.recv()).await.expect("in time").expect("an event");
    assert_eq!(down, PeerEvent::Down(peer));
    let up = timeout(PATIENCE, events.recv()).await.expect("in time").expect("an event");
    assert_eq!(up, PeerEvent::Up(peer));
    drop(node);
}

#[tokio::test]
async fn a_peer_is_reached_by_host_name_and_only_under_its_own_name() {
    let (a, b) = (start(|_| {}).await, start(|_| {}).await);
    let port = b.address().to_string().rsplit('/').next().expect("has a port").to_owned();
    let address: PeerAddress = format!("localhost:{port}").parse().expect("an address");
    assert_eq!(a.node.connect_to(&address).await.expect("connects"), b.peer());
    let c = start(|_| {}).await;
    let wrong = b.address().with_p2p(c.peer()).expect("no name yet");
    assert!(c.node.connect(wrong.clone()).await.is_err(), "a node is no peer of itself");
    assert!(a.node.connect(wrong).await.is_err(), "somebody else answered");
    let right = c.address().with_p2p(c.peer()).expect("no name yet");
    assert_eq!(a.node.connect(right).await.expect("connects"), c.peer());
}
