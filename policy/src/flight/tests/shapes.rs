//! How much is asked for at once, in which order, and what the bounds do.

use super::super::table::Layer;
use super::*;
use crate::limits::{AskSize, SourceLimit};

#[test]
fn a_large_demand_read_becomes_several_small_asks() {
    let mut node = Node::with_layer();
    // Ten spans of 100 kB; an ask for demand holds 512 KiB.
    assert_eq!(words(&node.demand(0..40)), ["spans 0..5", "spans 5..10"]);
    let mut node = Node::with_layer();
    node.holder(A, 0..400);
    assert_eq!(words(&node.demand(0..20)), ["peer 1 0..8", "peer 1 8..16", "peer 1 16..20"]);
}

#[test]
fn prefetch_asks_are_long_and_join_neighbouring_reads() {
    let mut node = Node::with_layer();
    assert_eq!(words(&node.prefetch(0..400)), ["spans 0..41", "spans 41..82", "spans 82..100"]);
    let origin_gap = AskSize { demand_bytes: 0, prefetch_bytes: 128 * 1024 };
    let mut node = Node::new(Limits { origin_gap, ..no_guessing() });
    node.open(LAYER, geometry(100), Some(OriginNo(0)));
    node.tell(Event::OriginChanged { layer: LAYER, origin: Some(OriginNo(0)), usable: false });
    for chunk in [8, 0, 4, 16, 100] {
        assert!(node.prefetch(chunk..chunk + 1).is_empty());
    }
    let actions = node.tell(Event::OriginChanged { layer: LAYER, origin: Some(OriginNo(0)), usable: true });
    // 12..16 (one span, 100 kB) is read through; the way to 100 is too long.
    assert_eq!(words(&actions), ["spans 2..5", "spans 0..2", "spans 25..26"]);
}

#[test]
fn a_short_ask_to_a_peer_takes_the_next_prefetch_reads_along() {
    let mut node = Node::with_layer();
    for chunk in [300, 20, 100, 21] {
        node.tell(Event::OriginChanged { layer: LAYER, origin: Some(OriginNo(0)), usable: false });
        node.prefetch(chunk..chunk + 1);
    }
    let actions = node.holder(A, 0..400);
    assert_eq!(words(&actions), ["peer 1 20..22 100..101 300..301"]);
}

#[test]
fn several_holders_share_a_large_read() {
    let mut node = Node::with_layer();
    node.holder(A, 0..400);
    node.holder(B, 0..400);
    let actions = node.demand(0..64);
    let of = |name: &str| words(&actions).iter().filter(|ask| ask.starts_with(name)).count();
    assert_eq!((of("peer 1"), of("peer 2")), (4, 4));
}

#[test]
fn what_a_peer_has_is_not_read_from_the_registry_on_the_way() {
    let none = AskSize { demand_bytes: 0, prefetch_bytes: 0 };
    let peer = SourceLimit { asks: 2, reserved_for_demand: 1, prefetch_beside_demand: 1 };
    let mut node = Node::new(Limits { origin_gap: none, peer, ..no_guessing() });
    node.open(LAYER, geometry(100), Some(OriginNo(0)));
    node.holder(A, 4..8);
    node.tell(Event::PeerHas { peer: A, layer: LAYER, chunks: Runs::one(40..44) });
    assert_eq!(words(&node.prefetch(40..44)), ["peer 1 40..44"]);
    assert_eq!(words(&node.prefetch(0..4)), [""; 0], "the search is waited for");
    assert_eq!(words(&node.prefetch(4..12)), [""; 0], "the peer has no room");
    let actions = node.tell(Event::HoldersFound { layer: LAYER });
    assert_eq!(words(&actions), ["spans 0..1", "spans 2..3"]);
}

#[test]
fn demand_uses_what_is_reserved_when_prefetch_fills_every_source() {
    let mut node = Node::with_layer();
    node.holder(A, 0..200);
    for no in 0..100 {
        node.prefetch(no * 4..no * 4 + 4);
    }
    node.tell(Event::HoldersFound { layer: LAYER });
    let limits = Limits::default();
    let busy = node.flight.status();
    assert!(busy.asks_peer > 0 && busy.asks_origin > 0);
    assert!(busy.asks_origin <= (limits.origin.asks - limits.origin.reserved_for_demand) as usize);
    node.open(layer_no(2), geometry(10), Some(OriginNo(0)));
    let has = Event::PeerHas { peer: A, layer: layer_no(2), chunks: Runs::one(0..8) };
    node.tell(has);
    let (_, actions) = node.read_of(layer_no(2), Class::Demand, Runs::one(0..4), ms(60_000));
    assert_eq!(words(&actions), ["peer 1 0..4"]);
}

#[test]
fn prefetch_holds_back_while_demand_is_under_way_at_the_same_source() {
    let mut limits = no_guessing();
    limits.origin.prefetch_beside_demand = 2;
    let mut node = Node::new(limits);
    node.open(LAYER, geometry(100), Some(OriginNo(0)));
    let ask = the_ask(&node.demand(396..400));
    let actions = node.prefetch(0..380);
    assert_eq!(words(&actions).len(), 2);
    node.arrived(396..400);
    let actions = node.ended(ask, Outcome::Done { bytes: SPAN_BYTES });
    assert!(!words(&actions).is_empty(), "then it goes on");
}

#[test]
fn prefetch_goes_in_the_order_given() {
    let mut limits = no_guessing();
    limits.origin = SourceLimit { asks: 2, reserved_for_demand: 1, prefetch_beside_demand: 1 };
    limits.origin_gap = AskSize { demand_bytes: 0, prefetch_bytes: 0 };
    let mut node = Node::new(limits);
    node.open(LAYER, geometry(100), Some(OriginNo(0)));
    let mut ask = the_ask(&node.prefetch(0..4));
    for span in [50, 20, 70, 10] {
        assert!(node.prefetch(span * 4..span * 4 + 4).is_empty());
    }
    let mut span = 0;
    for next in [50, 20, 70, 10] {
        node.arrived(span * 4..span * 4 + 4);
        let actions = node.ended(ask, Outcome::Done { bytes: 1 });
        assert_eq!(words(&actions), [format!("spans {next}..{}", next + 1)]);
        (ask, span) = (the_ask(&actions), next);
    }
}

#[test]
fn a_demand_read_joins_the_head_of_a_prefetch_ask_and_overtakes_its_tail() {
    let mut node = Node::with_layer();
    let ask = the_ask(&node.prefetch(0..160));
    assert!(node.demand(0..1).is_empty(), "it comes next");
    assert_eq!(words(&node.demand(100..101)), ["spans 25..26"], "it would come late");
    assert!(node.demand(100..101).is_empty());
    node.tell(Event::AskProgress { ask });
    assert!(words(&node.wait(ms(100))).is_empty(), "what shows a sign of life is believed");
}

#[test]
fn a_demand_read_joins_as_far_into_a_prefetch_ask_as_it_gets_soon() {
    let mut node = Node::with_layer();
    let ask = the_ask(&node.prefetch(0..160));
    node.tell(Event::AskProgress { ask });
    node.wait(ms(10));
    node.arrived(0..10);
    assert!(node.demand(59..60).is_empty(), "a chunk a millisecond: it comes within 50 ms");
    assert_eq!(words(&node.demand(64..65)), ["spans 16..17"], "it would come late");
}

#[test]
fn a_demand_read_overtakes_a_prefetch_ask_that_shows_no_sign_of_life() {
    let mut node = Node::with_layer();
    let (prefetch, actions) = node.read(Class::Prefetch, 0..4);
    let ask = the_ask(&actions);
    let (read, actions) = node.read(Class::Demand, 0..4);
    assert!(actions.is_empty());
    let actions = node.wait(ms(51));
    assert_eq!(words(&actions), ["spans 0..1"]);
    assert_eq!(cancelled(&actions), [ask], "nothing is left for it to bring");
    assert_eq!(delivered(&node.arrived(0..4)), [prefetch, read]);
}

#[test]
fn a_joined_prefetch_ask_that_falls_silent_is_left_sooner() {
    let mut node = Node::with_layer();
    let ask = the_ask(&node.prefetch(0..4));
    node.tell(Event::AskProgress { ask });
    assert!(node.demand(0..4).is_empty());
    let actions = node.wait(ms(10_600));
    assert_eq!(cancelled(&actions), [ask], "10 s, as demand, and not 30");
}

/// Of `recycled` the registry sent 1.7 times what is needed once: whoever had all of it sent it to all, and was left for what stood in
/// line there.
#[test]
fn what_stands_in_line_at_a_peer_that_sends_is_asked_for_again_as_demand() {
    for sends in [true, false] {
        let mut node = Node::with_layer();
        node.holder(A, 0..400);
        let other = the_ask(&node.prefetch(100..120));
        let ask = the_ask(&node.prefetch(0..8));
        [ask, other].into_iter().for_each(|ask| assert!(node.tell(Event::AskProgress { ask }).is_empty()));
        assert!(node.demand(0..2).is_empty(), "joins it");
        node.wait(ms(150));
        if sends {
            node.arrived(100..101);
        }
        let actions = node.wait(ms(110));
        assert_eq!(cancelled(&actions), [ask]);
        let first = words(&actions).first().cloned().unwrap_or_default();
        assert_eq!(first.starts_with("peer 1 0..2"), sends, "{first}");
    }
}

#[test]
fn prefetch_ends_with_its_read_but_not_what_others_want() {
    let mut node = Node::with_layer();
    let (first, actions) = node.read(Class::Prefetch, 0..4);
    let ask = the_ask(&actions);
    let (second, _) = node.read(Class::Prefetch, 2..4);
    assert!(node.tell(Event::ReadCancelled { read: first }).is_empty());
    assert_eq!(cancelled(&node.tell(Event::ReadCancelled { read: second })), [ask]);
    assert_eq!(node.flight.status().asks_origin, 0);
}

#[test]
fn a_layer_that_is_one_stream_is_read_once() {
    let stream = LayerGeometry::new(vec![CHUNK; 400])
        .and_then(|layer| layer.with_spans(vec![Span { first_chunk: 0, blob_start: 0, blob_end: 9_000_000 }]))
        .and_then(LayerGeometry::as_whole_stream)
        .expect("valid");
    let mut node = Node::new(no_guessing());
    node.open(LAYER, stream, Some(OriginNo(0)));
    let ask = the_ask(&node.demand(300..301));
    assert!(node.demand(10..11).is_empty());
    assert!(node.prefetch(0..400).is_empty());
    for at in 0..100 {
        node.wait(ms(5_000).min(ms(400)));
        assert!(words(&node.arrived(at..at + 1)).is_empty());
    }
    // A holder is quicker than the far end of the stream.
    node.tell(Event::PeerUp { peer: A });
    let actions = node.tell(Event::PeerHas { peer: A, layer: LAYER, chunks: Runs::one(200..400) });
    assert_eq!(words(&actions), ["peer 1 300..301"]);
    assert!(cancelled(&actions).is_empty());
    let actions = node.failed(ask, ErrorClass::Transient);
    assert!(!words(&actions).is_empty(), "what the stream would have brought is asked elsewhere: {actions:?}");
}

#[test]
fn a_demand_ask_takes_along_what_lies_next_where_something_near_is_here_and_nobody_else_has_it() {
    let near = || {
        let mut node = Node::new(Limits { origin_near_bytes: 3 * u64::from(SPAN_CHUNKS) * CHUNK, ..no_guessing() });
        node.open(LAYER, geometry(100), Some(OriginNo(0)));
        node.arrived(0..4);
        node.arrived(36..40);
        node
    };
    let mut node = near();
    assert_eq!(words(&node.demand(200..201)), ["spans 50..51"], "nothing near was read");
    assert_eq!(words(&node.demand(14..15)), ["spans 3..6"]);
    assert_eq!(words(&node.demand(9..10)), ["spans 2..3"], "what is under way is not asked for again");
    assert_eq!(words(&node.demand(32..33)), ["spans 8..9"], "nor what is here");
    node.holder(A, 44..48);
    let mut actions = node.demand(40..41);
    actions.extend(node.tell(Event::HoldersFound { layer: LAYER }));
    assert_eq!(words(&actions), ["spans 10..11"], "what a peer has is not read from the registry");
    assert_eq!(words(&near().prefetch(5..6)), ["spans 1..2"], "prefetch knows what it wants");
}

#[test]
fn a_sequential_reader_is_read_ahead_of() {
    let mut node = Node::new(Limits { explore_prefetch_one_in: 0, origin_near_bytes: 0, ..Limits::default() });
    node.open(LAYER, geometry(100), Some(OriginNo(0)));
    assert_eq!(words(&node.demand(0..2)), ["spans 0..1"]);
    assert!(node.demand(2..4).is_empty() || node.flight.status().asks_origin > 1);
    assert!(node.flight.status().asks_origin > 1, "the second read in a row opens a window");
    assert_eq!(node.flight.status().waiting_prefetch, 0);
    let hit = Event::ReadHit { layer: LAYER, first_chunk: 200, end_chunk: 201 };
    assert!(words(&node.tell(hit)).is_empty(), "one read is no sequence");
}

#[test]
fn readahead_asks_nobody_for_what_those_who_have_read_it_did_not_need() {
    for (rested, expected) in [(ms(50), 0..20), (Limits::default().settled, 0..8)] {
        let mut node = Node::new(Limits { readahead_first_bytes: 16 * CHUNK, ..no_guessing() });
        node.open(LAYER, geometry(100), Some(OriginNo(0)));
        node.holder(A, 0..4);
        node.tell(Event::PeerHas { peer: A, layer: LAYER, chunks: Runs::one(4..8) });
        node.wait(rested);
        let mut actions = node.demand(0..2);
        actions.extend(node.demand(2..4));
        actions.extend(node.tell(Event::HoldersFound { layer: LAYER }));
        let mut asked = Runs::new();
        for action in actions {
            match action {
                Action::AskPeer { chunks, .. } => asked.insert_all(&chunks),
                Action::AskOrigin { spans, .. } => asked.insert(spans.start * SPAN_CHUNKS..spans.end * SPAN_CHUNKS),
                _ => {}
            }
        }
        assert_eq!(asked, Runs::one(expected), "a holder at rest for {rested:?}");
    }
}

#[test]
fn too_many_reads_shed_prefetch_first_and_the_last_first() {
    let limits = Limits { waiting_reads: 4, waiting_prefetch_reads: 3, ..no_guessing() };
    let mut node = Node::new(limits);
    node.open(LAYER, geometry(100), None);
    let prefetch: Vec<_> = (0..3).map(|no| node.read(Class::Prefetch, no..no + 1).0).collect();
    let (read, actions) = node.read(Class::Prefetch, 9..10);
    assert_eq!(failures(&actions), [(read, FailReason::Overload)], "more prefetch than may wait");
    node.demand(20..21);
    for shed in prefetch.iter().rev() {
        assert_eq!(failures(&node.demand(21..22)), [(*shed, FailReason::Overload)]);
    }
    let (read, actions) = node.read(Class::Demand, 22..23);
    assert_eq!(failures(&actions), [(read, FailReason::Overload)], "only demand is left");
    assert_eq!((node.flight.status().waiting_demand, node.flight.status().waiting_prefetch), (4, 0));
}

#[test]
fn tables_are_bounded() {
    let limits = Limits { layers: 1, peers: 3, holders_per_layer: 1, runs_per_holder: 2, ..no_guessing() };
    let mut node = Node::new(limits);
    node.open(LAYER, geometry(100), None);
    node.open(layer_no(2), geometry(1), None);
    assert_eq!(node.flight.status().layers, 1);
    for peer in 0..5 {
        node.tell(Event::PeerUp { peer: PeerNo(peer) });
        let chunks = Runs::from_iter([0..1, 2..3, 4..5]);
        node.tell(Event::PeerHas { peer: PeerNo(peer), layer: LAYER, chunks });
    }
    assert_eq!(node.flight.status().peers_up, 3);
    let (_, actions) = node.read_of(LAYER, Class::Demand, Runs::from_iter([0..1, 2..3, 4..5]), ms(9));
    assert_eq!(words(&actions), ["peer 0 0..1 2..3"]);
}

#[test]
fn whom_owners_name_takes_no_place_of_those_who_tell_what_they_have() {
    let limits = Limits { holders_per_layer: 1, named_per_layer: 2, ..Limits::default() };
    let mut layer = Layer::new(Arc::new(geometry(100)), &Runs::new(), &Runs::new(), None);
    let tell = |layer: &mut Layer, peer: u32| {
        let holder = layer.telling_holder(PeerNo(peer), false, &limits);
        holder.map(|holder| holder.chunks.insert(0..4)).is_some()
    };
    assert!(tell(&mut layer, 1) && tell(&mut layer, 1) && !tell(&mut layer, 2));
    for (peer, at) in [(5, 10), (4, 20), (5, 30), (3, 40)] {
        layer.named_holder(PeerNo(peer), false, Instant(at), &limits).promised.insert(8..12);
    }
    let known = |layer: &Layer| layer.holders.keys().map(|peer| peer.0).collect::<Vec<_>>();
    assert_eq!(known(&layer), [1, 3, 5], "the one that was named longest ago makes room");
    layer.redeem_promises(&Runs::one(8..10));
    assert_eq!(known(&layer), [1, 3, 5]);
    layer.redeem_promises(&Runs::one(10..12));
    assert_eq!(known(&layer), [1], "what was promised is here");
}
