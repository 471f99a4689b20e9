//! How nodes come to know who the members are, and when one is gone.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use hermes_p2p::admission::issuer::Issuer;
use hermes_p2p::members::provider::{MembersDns, MembersFile};
use hermes_p2p::{Asking, MemberList, Multiaddr, Node, NodeConfig, OpenDesk, PeerAddress, PeerId};
use libp2p::multiaddr::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::admission::issuer;
use crate::common::{Made, TestNode, start, wait_for};

fn seed(node: &TestNode) -> PeerAddress {
    PeerAddress::Fixed(node.address())
}

fn list(node: &TestNode) -> Arc<MemberList> {
    node.node.members().borrow().clone()
}

fn names(node: &TestNode) -> BTreeSet<PeerId> {
    list(node).members().iter().map(|member| member.peer).collect()
}

/// `count` nodes that know of the first alone.
async fn cluster(count: usize, change: impl Fn(usize, &mut NodeConfig)) -> Vec<TestNode> {
    let first = start(|config| change(0, config)).await;
    let seeds = vec![seed(&first)];
    let (seeds, change) = (&seeds, &change);
    let others = join_all((1..count).map(|no| {
        start(move |config: &mut NodeConfig| {
            config.peers = seeds.clone();
            change(no, config);
        })
    }));
    let others = others.await;
    std::iter::once(first).chain(others).collect()
}

async fn all_agree(nodes: &[TestNode]) {
    let everybody: BTreeSet<PeerId> = nodes.iter().map(TestNode::peer).collect();
    wait_for("all to know all", async || {
        let epoch = list(&nodes[0]).epoch();
        let agree = |node: &TestNode| list(node).epoch() == epoch && names(node) == everybody;
        nodes.iter().all(agree).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twelve_nodes_know_each_other_from_one_address() {
    let issuer = issuer("test", 's');
    let nodes = cluster(12, |no, config| {
        config.issuer = Some(Arc::clone(&issuer) as Arc<dyn Issuer>);
        config.zone = ["a", "b", "c"][no % 3].parse().expect("a zone");
    })
    .await;
    all_agree(&nodes).await;
    for node in &nodes {
        let list = list(node);
        assert_eq!(list.me().peer, node.peer());
        assert!(list.members().iter().all(|member| member.eligible() && !member.addresses.is_empty()));
        assert_eq!(list.members().iter().filter(|member| member.zone.as_str() == "b").count(), 4);
    }
    // Whoever is in the list can be asked, though nobody has said where it is but the list.
    let (first, last) = (&nodes[3], &nodes[11]);
    let layer = crate::common::Layer::new(1, 2, 4096, crate::common::Look::Text);
    last.made.add(&layer, layer.all());
    let deadline = crate::common::deadline();
    let fetch =
        first.node.fetch(last.peer(), &layer.table, Asking::here(layer.all(), hermes_p2p::Class::Demand), deadline);
    assert_eq!(crate::common::collect(fetch, &layer).await.chunks.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fifth_of_the_nodes_with_old_lists_catches_up() {
    let state = |config: &mut NodeConfig| {
        config.members.state_path = Some(config.identity_path.with_file_name("members"));
    };
    let nodes = cluster(10, |_, config| state(config)).await;
    all_agree(&nodes).await;
    // Two nodes end, and the others change meanwhile: one is new, one drains. Then the two come back with their old lists.
    let old = &nodes[8..];
    join_all(old.iter().map(|node| node.node.shutdown())).await;
    nodes[1].node.set_flags(true, false);
    let seeds = vec![seed(&nodes[0])];
    let new = start(|config| config.peers = seeds.clone()).await;
    let back = join_all(old.iter().map(|node| async {
        let mut config = crate::common::config(&node.folder);
        state(&mut config);
        Node::start(config, Arc::new(Made::default()), Arc::new(OpenDesk)).await.expect("starts")
    }))
    .await;
    let everybody: BTreeSet<PeerId> = nodes.iter().map(TestNode::peer).chain([new.peer()]).collect();
    wait_for("the old lists to catch up", async || {
        let lists = nodes[..8].iter().chain([&new]).map(list);
        let lists: Vec<_> = lists.chain(back.iter().map(|node| node.members().borrow().clone())).collect();
        let right = |list: &MemberList| {
            let names: BTreeSet<PeerId> = list.members().iter().map(|member| member.peer).collect();
            names == everybody && list.get(&nodes[1].peer()).is_some_and(|member| member.drain)
        };
        (lists.iter().all(|list| right(list)) && lists.windows(2).all(|two| two[0].epoch() == two[1].epoch()))
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_node_is_suspected_by_all_and_leaves() {
    let nodes = cluster(8, |_, config| config.members.suspect_for = Duration::from_secs(3)).await;
    all_agree(&nodes).await;
    let (dead, living) = nodes.split_last().expect("there are some");
    let before = list(&nodes[0]).epoch();
    dead.node.shutdown().await;
    living[2].node.suspect(&dead.peer());
    let reported = Instant::now();
    wait_for("all to suspect it", async || {
        let doubts = |node: &TestNode| list(node).get(&dead.peer()).is_none_or(|member| !member.eligible());
        living.iter().all(doubts).then_some(())
    })
    .await;
    println!("suspected everywhere after {:?}", reported.elapsed());
    assert!(living.iter().all(|node| list(node).epoch() != before), "owners stayed the same");
    wait_for("it to leave", async || living.iter().all(|node| list(node).get(&dead.peer()).is_none()).then_some(()))
        .await;
    all_agree(living).await;
    // It comes back when it speaks.
    let mut config = crate::common::config(&dead.folder);
    config.peers = vec![seed(&living[5])];
    let back = Node::start(config, Arc::new(Made::default()), Arc::new(OpenDesk)).await.expect("starts");
    wait_for("it to be back", async || {
        let knows = |node: &TestNode| list(node).get(&back.local_peer_id()).is_some_and(|member| member.eligible());
        living.iter().all(knows).then_some(())
    })
    .await;
}

/// Passes on what two nodes say to each other, unless it is `parted`: then their connection stays, and nothing comes.
async fn passage(to: Multiaddr, parted: watch::Receiver<bool>) -> Multiaddr {
    let port = to.iter().find_map(|part| if let Protocol::Tcp(port) = part { Some(port) } else { None });
    let to = (Ipv4Addr::LOCALHOST, port.expect("a TCP address"));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let pass = |mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut parted: watch::Receiver<bool>| async move {
        let mut bytes = vec![0; 65_536];
        while let Ok(count @ 1..) = from.read(&mut bytes).await {
            let _ = parted.wait_for(|parted| !parted).await;
            if to.write_all(&bytes[..count]).await.is_err() {
                break;
            }
        }
    };
    tokio::spawn(async move {
        while let Ok((one, _)) = listener.accept().await {
            let Ok(two) = TcpStream::connect(to).await else { continue };
            let ((from_one, to_one), (from_two, to_two)) = (one.into_split(), two.into_split());
            tokio::spawn(pass(from_one, to_two, parted.clone()));
            tokio::spawn(pass(from_two, to_one, parted.clone()));
        }
    });
    format!("/ip4/127.0.0.1/tcp/{port}").parse().expect("a multiaddr")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_of_which_nothing_comes_does_not_clear_a_suspect() {
    let far = start(|_| ()).await;
    let (part, parted) = watch::channel(false);
    let address = passage(far.address(), parted).await;
    let near = start(|config| config.peers = vec![PeerAddress::Fixed(address)]).await;
    let nodes = [near, far];
    all_agree(&nodes).await;
    let [near, far] = &nodes;
    let is_suspected = || list(near).get(&far.peer()).is_some_and(|member| member.suspected);
    // Whoever answers is not suspected.
    near.node.suspect(&far.peer());
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!is_suspected());
    part.send(true).expect("it listens");
    near.node.suspect(&far.peer());
    wait_for("the suspicion to count", async || is_suspected().then_some(())).await;
    assert!(near.node.peers().contains(&far.peer()), "the connection had been found dead");
    part.send(false).expect("it listens");
    wait_for("it to answer", async || (!is_suspected()).then_some(())).await;
    all_agree(&nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_liar_cannot_make_the_living_leave() {
    let nodes = cluster(8, |_, config| config.members.suspect_for = Duration::from_secs(2)).await;
    all_agree(&nodes).await;
    let (liar, honest) = nodes.split_first().expect("there are some");
    let lies = Instant::now();
    // Longer than the suspected have to answer.
    while lies.elapsed() < Duration::from_secs(4) {
        for node in honest {
            liar.node.suspect(&node.peer());
        }
        for node in honest {
            let list = list(node);
            assert_eq!(list.count(), nodes.len(), "a living node has left");
            let suspected = list.members().iter().filter(|member| member.suspected).count();
            assert!(suspected <= 2, "one liar has {suspected} of {} suspected", nodes.len());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    wait_for("all to be cleared", async || {
        let clear = |node: &TestNode| list(node).members().iter().all(|member| !member.suspected);
        nodes.iter().all(clear).then_some(())
    })
    .await;
    all_agree(&nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_drains_or_is_full_is_no_owner_anywhere() {
    let nodes = cluster(5, |_, _| {}).await;
    all_agree(&nodes).await;
    let before = list(&nodes[0]).epoch();
    for (drain, full) in [(true, false), (false, true), (false, false)] {
        nodes[4].node.set_flags(drain, full);
        wait_for("all to know", async || {
            let knows = |node: &TestNode| {
                list(node).get(&nodes[4].peer()).is_some_and(|member| (member.drain, member.full) == (drain, full))
            };
            nodes.iter().all(knows).then_some(())
        })
        .await;
        assert_eq!(list(&nodes[0]).epoch() == before, !drain && !full);
        all_agree(&nodes).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_goes_on_from_its_disk_when_everything_else_is_gone() {
    let issuer = issuer("test", 's');
    let change = |_: usize, config: &mut NodeConfig| {
        config.issuer = Some(Arc::clone(&issuer) as Arc<dyn Issuer>);
        config.members.state_path = Some(config.identity_path.with_file_name("members"));
    };
    let nodes = cluster(4, change).await;
    all_agree(&nodes).await;
    let everybody = names(&nodes[0]);
    // The seed goes first, so nobody can be found through it.
    nodes[0].node.shutdown().await;
    nodes[3].node.shutdown().await;
    let mut config = crate::common::config(&nodes[3].folder);
    change(3, &mut config);
    let back = Node::start(config, Arc::new(Made::default()), Arc::new(OpenDesk)).await.expect("starts");
    let known: BTreeSet<PeerId> = back.members().borrow().members().iter().map(|member| member.peer).collect();
    assert_eq!(known, everybody, "it does not know the list that it ended with");
    wait_for("the living", async || {
        let peers = back.peers();
        (peers.contains(&nodes[1].peer()) && peers.contains(&nodes[2].peer())).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_meet_through_a_file_and_through_a_name() {
    let (one, two) = (start(|_| {}).await, start(|_| {}).await);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("members.toml");
    let file = |node: &TestNode| {
        let socket = node.address().to_string();
        format!("[[member]]\naddress = \"{socket}\"\npeer = \"{}\"\n", node.peer())
    };
    std::fs::write(&path, file(&one)).expect("writes");
    let port = two.address().to_string().rsplit('/').next().expect("has a port").parse().expect("a number");
    let third = start(|config| {
        let file = MembersFile::new(path.clone()).with_interval(Duration::from_millis(20));
        config.members.providers = vec![Arc::new(file), Arc::new(MembersDns::new("localhost".into(), port))];
    })
    .await;
    all_agree_on(&third, &[one.peer(), two.peer()]).await;
    // The file changes.
    let late = start(|_| {}).await;
    std::fs::write(&path, file(&one) + &file(&late)).expect("writes");
    all_agree_on(&third, &[one.peer(), two.peer(), late.peer()]).await;
    all_agree_on(&late, &[one.peer(), two.peer(), third.peer()]).await;
}

async fn all_agree_on(node: &TestNode, others: &[PeerId]) {
    wait_for("all members", async || {
        let known = names(node);
        others.iter().all(|peer| known.contains(peer)).then_some(())
    })
    .await;
}
