//! Why a source is asked, as it is told to the driver.

use super::*;
use crate::event::{ClaimId, Reason, Want};
use crate::members::{Duty, Member, Members, ZoneNo};

const ME: PeerNo = PeerNo(0);
/// Chunks of an extent.
const EXTENT: u32 = 64;

fn reasons(actions: &[Action]) -> Vec<(AskId, Reason)> {
    let reason = |action: &Action| match action {
        Action::AskPeer { ask, reason, .. } | Action::AskOrigin { ask, reason, .. } => Some((*ask, *reason)),
        _ => None,
    };
    actions.iter().filter_map(reason).collect()
}

fn the_reason(actions: &[Action]) -> (AskId, Reason) {
    match reasons(actions).as_slice() {
        [only] => *only,
        other => panic!("one ask expected, not {other:?} of {actions:?}"),
    }
}

/// A node in a swarm with `A` and `B`, and an extent of which `owner` has rank 0.
fn swarm(owner: PeerNo) -> (Node, std::ops::Range<u32>) {
    let mut node = Node::with_layer();
    let member = |peer: PeerNo| Member { peer, key: u64::from(peer.0) * 7919, zone: ZoneNo(0), eligible: true };
    let members = Arc::new(Members::new(1, ME, [ME, A, B].map(member).to_vec()));
    let mut starts = (0..6).map(|extent| extent * EXTENT);
    let start = starts.find(|start| members.owners(&LAYER, *start, Duty::Cluster, 1)[..] == [owner]);
    let start = start.expect("each owns one of six");
    node.tell(Event::MembersChanged { members });
    node.tell(Event::HoldersFound { layer: LAYER });
    (node, start..start + EXTENT)
}

#[test]
fn a_node_alone_asks_holders_and_its_registry() {
    let mut node = Node::with_layer();
    assert_eq!(the_reason(&node.demand(0..1)).1, Reason::NoSwarm);
    node.holder(A, 40..80);
    let actions = node.demand(40..41);
    let actions = if reasons(&actions).is_empty() { node.tell(Event::HoldersFound { layer: LAYER }) } else { actions };
    assert_eq!(the_reason(&actions).1, Reason::Holder);
}

#[test]
fn an_owner_is_asked_as_such_and_what_it_says_is_the_next_reason() {
    for answer in [Reason::Named, Reason::Delegated] {
        let (mut node, extent) = swarm(A);
        let chunks = Runs::one(extent.start..extent.start + 1);
        let (ask, reason) = the_reason(&node.demand(extent.start..extent.start + 1));
        assert_eq!(reason, Reason::Owner { duty: Duty::Cluster, rank: 0 });
        let next = match answer {
            Reason::Named => node.tell(Event::AskReferred { ask, chunks, peers: vec![B] }),
            _ => node.tell(Event::AskDelegated { ask, chunks: Runs::one(extent) }),
        };
        assert_eq!(the_reason(&next).1, answer);
    }
}

#[test]
fn an_owner_reads_the_registry_for_itself_and_for_others() {
    let (mut node, extent) = swarm(ME);
    assert_eq!(the_reason(&node.demand(extent.start..extent.start + 1)).1, Reason::OwnTurn { rank: 0 });
    let (mut node, extent) = swarm(ME);
    let claimed = Event::Claimed {
        claim: ClaimId(1),
        peer: A,
        layer: LAYER,
        chunks: Runs::one(extent.start..extent.start + 1),
        extent: extent.clone(),
        class: Class::Demand,
        want: Want::Owner { duty: Duty::Cluster, again: false, can_read: true },
    };
    assert_eq!(the_reason(&node.tell(claimed)).1, Reason::ForOthers);
}

#[test]
fn when_no_owner_is_reached_the_registry_is_asked_all_the_same() {
    let (mut node, extent) = swarm(A);
    let members = Arc::new(Members::new(
        2,
        ME,
        [ME, A, B]
            .map(|peer| Member { peer, key: u64::from(peer.0) * 7919, zone: ZoneNo(0), eligible: peer != ME })
            .to_vec(),
    ));
    node.tell(Event::MembersChanged { members });
    let (first, _) = the_reason(&node.demand(extent.start..extent.start + 1));
    let mut actions = node.failed(first, ErrorClass::Transient);
    let (second, reason) = the_reason(&actions);
    assert!(matches!(reason, Reason::Owner { rank: 1, .. }), "{reason:?}");
    actions = node.failed(second, ErrorClass::Transient);
    actions.extend(node.wait(ms(3000)));
    let found = reasons(&actions);
    assert!(found.iter().any(|(_, reason)| *reason == Reason::NobodyOwns), "{found:?}");
}
