//! One test for each rule about who is asked and when a read ends.

use super::*;
use crate::event::{OriginStanding, Source};
use crate::limits::{AskSize, SourceLimit};

fn has_lookup(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::FindHolders { .. }))
}

#[test]
fn what_is_here_is_delivered_at_once() {
    let mut node = Node::with_layer();
    node.arrived(3..9);
    let (read, actions) = node.read(Class::Demand, 4..8);
    assert_eq!(actions, [Action::Deliver { read }]);
    let (read, actions) = node.read_of(LAYER, Class::Demand, Runs::new(), ms(1));
    assert_eq!(actions, [Action::Deliver { read }]);
}

#[test]
fn a_node_alone_asks_the_origin_at_once_and_searches_nobody() {
    let mut node = Node::with_layer();
    let (read, actions) = node.read(Class::Demand, 5..6);
    assert_eq!(words(&actions), ["spans 1..2"]);
    assert!(!has_lookup(&actions));
    assert_eq!(delivered(&node.arrived(4..6)), [read]);
    assert!(node.ended(the_ask(&actions), Outcome::Done { bytes: SPAN_BYTES }).is_empty());
    assert_eq!(node.flight.status().asks_origin, 0);
}

#[test]
fn a_chunk_is_asked_for_once_and_neighbours_in_its_span_join() {
    let mut node = Node::with_layer();
    assert_eq!(words(&node.demand(5..6)), ["spans 1..2"]);
    assert!(node.demand(5..6).is_empty());
    assert!(node.demand(4..5).is_empty(), "the span brings it");
    assert_eq!(words(&node.demand(7..9)), ["spans 2..3"], "only what nobody was asked for");
    assert_eq!(delivered(&node.arrived(4..9)).len(), 4);
}

#[test]
fn what_arrives_unasked_counts() {
    let mut node = Node::with_layer();
    node.demand(5..6);
    node.arrived(0..8);
    let (read, actions) = node.read(Class::Demand, 0..2);
    assert_eq!(actions, [Action::Deliver { read }]);
}

#[test]
fn a_local_copy_comes_before_a_holder_and_a_holder_before_the_origin() {
    let mut node = Node::with_layer();
    node.holder(A, 0..8);
    assert!(node.tell(Event::LocalHas { layer: LAYER, chunks: Runs::one(0..2) }).is_empty());
    let actions = node.demand(0..12);
    assert_eq!(words(&actions), ["local 0..2", "peer 1 2..8"]);
    assert!(has_lookup(&actions), "somebody may have the rest");
    let later = node.tell(Event::HoldersFound { layer: LAYER });
    assert_eq!(words(&later), ["spans 2..3"]);
}

#[test]
fn what_other_layers_hold_is_copied_also_when_it_is_known_late() {
    let mut node = Node::with_layer();
    let first = node.demand(0..4);
    assert_eq!(words(&first), ["spans 0..1"], "a reader does not wait for the look-up");
    let late = Event::LocalHas { layer: LAYER, chunks: Runs::one(0..8) };
    assert!(node.tell(late.clone()).is_empty(), "what was asked for is asked for again");
    assert_eq!(words(&node.demand(4..8)), ["local 4..8"]);
    // The copies of a layer that was closed meanwhile are nobody's.
    node.tell(Event::LayerClosed { layer: LAYER });
    assert!(node.tell(late).is_empty());
}

#[test]
fn a_copy_that_fails_is_fetched() {
    let mut node = Node::with_layer();
    node.tell(Event::LocalHas { layer: LAYER, chunks: Runs::one(0..4) });
    let actions = node.demand(0..4);
    assert_eq!(words(&node.failed(the_ask(&actions), ErrorClass::NotFound)), ["spans 0..1"]);
}

#[test]
fn demand_waits_a_short_time_for_the_first_search_only() {
    let mut node = Node::with_layer();
    node.tell(Event::PeerUp { peer: A });
    let actions = node.demand(0..1);
    assert!(has_lookup(&actions) && words(&actions).is_empty());
    assert!(words(&node.wait(ms(29))).is_empty());
    assert_eq!(words(&node.wait(ms(2))), ["spans 0..1"], "30 ms");
    assert_eq!(words(&node.demand(4..5)), ["spans 1..2"], "no second wait");
    let mut node = Node::with_layer();
    node.tell(Event::PeerUp { peer: A });
    node.demand(0..1);
    assert_eq!(words(&node.tell(Event::HoldersFound { layer: LAYER })), ["spans 0..1"], "the search may end sooner");
}

#[test]
fn a_holder_that_the_search_finds_is_asked() {
    let mut node = Node::with_layer();
    node.tell(Event::PeerUp { peer: A });
    node.demand(0..1);
    let found = node.tell(Event::PeerHas { peer: A, layer: LAYER, chunks: Runs::one(0..400) });
    assert_eq!(words(&found), ["peer 1 0..1"]);
}

#[test]
fn searches_are_cached_and_repeated_after_their_time() {
    let mut node = Node::with_layer();
    node.tell(Event::PeerUp { peer: A });
    assert!(has_lookup(&node.demand(0..1)));
    node.tell(Event::HoldersFound { layer: LAYER });
    assert!(!has_lookup(&node.demand(4..5)));
    node.wait(Duration::from_secs(4));
    assert!(!has_lookup(&node.demand(8..9)));
    node.wait(Duration::from_secs(2));
    let actions = node.demand(12..13);
    assert!(has_lookup(&actions), "the negative answer is 5 s old");
    assert_eq!(words(&actions), ["spans 3..4"], "and is renewed beside the work");
}

#[test]
fn a_new_peer_renews_a_negative_answer() {
    let mut node = Node::with_layer();
    node.tell(Event::PeerUp { peer: A });
    node.demand(0..1);
    node.tell(Event::HoldersFound { layer: LAYER });
    node.wait(ms(1100));
    node.tell(Event::PeerUp { peer: B });
    assert!(has_lookup(&node.demand(4..5)));
}

#[test]
fn an_ask_that_fails_goes_to_the_next_source_at_once() {
    let mut node = Node::with_layer();
    node.holder(A, 0..400);
    node.holder(B, 0..400);
    let mut actions = node.demand(0..2);
    let mut seen = words(&actions);
    for class in [ErrorClass::Transient, ErrorClass::Transient] {
        actions = node.failed(the_ask(&actions), class);
        seen.extend(words(&actions));
    }
    seen[..2].sort();
    assert_eq!(seen, ["peer 1 0..2", "peer 2 0..2", "spans 0..1"]);
}

#[test]
fn each_failure_of_a_peer_has_its_rule() {
    for (outcome, asked_again, after) in [
        (Outcome::Failed { class: ErrorClass::Transient, retry_after: None }, true, ms(200)),
        (Outcome::Failed { class: ErrorClass::Transient, retry_after: Some(ms(3000)) }, false, ms(2000)),
        (Outcome::Failed { class: ErrorClass::Transient, retry_after: Some(ms(3000)) }, true, ms(3100)),
        (Outcome::Failed { class: ErrorClass::NotFound, retry_after: None }, false, ms(9000)),
        (Outcome::Failed { class: ErrorClass::Denied, retry_after: None }, false, ms(59_000)),
        (Outcome::Failed { class: ErrorClass::Denied, retry_after: None }, true, ms(61_000)),
        (Outcome::Failed { class: ErrorClass::PeerFault, retry_after: None }, false, ms(599_000)),
        (Outcome::Busy { retry_after: ms(50) }, true, ms(60)),
        (Outcome::Lacks { chunks: Runs::one(0..4) }, true, ms(0)),
        (Outcome::Lacks { chunks: Runs::one(4..8) }, false, ms(9000)),
        (Outcome::Done { bytes: 7 }, true, ms(0)),
    ] {
        let mut node = Node::with_layer();
        node.holder(A, 0..400);
        let ask = the_ask(&node.demand(0..2));
        node.ended(ask, outcome.clone());
        node.wait(after);
        let again = words(&node.demand(4..5)).contains(&"peer 1 4..5".to_owned());
        assert_eq!(again, asked_again, "{outcome:?}, {after:?} later");
    }
}

#[test]
fn wrong_bytes_ban_the_peer_and_its_chunks_are_asked_elsewhere_at_once() {
    let mut node = Node::with_layer();
    node.holder(A, 0..400);
    let first = the_ask(&node.demand(0..2));
    let second = the_ask(&node.demand(8..9));
    let actions = node.failed(first, ErrorClass::PeerFault);
    let until = node.now + Duration::from_secs(600);
    assert!(actions.contains(&Action::Ban { peer: A, until }));
    assert_eq!(cancelled(&actions), [second]);
    assert_eq!(node.flight.status().asks_origin, 2);
    assert_eq!(node.flight.status().peers_banned, 1);
    assert!(node.tell(Event::AskEnded { ask: second, outcome: Outcome::Done { bytes: 1 } }).is_empty());
    node.tell(Event::PeerDown { peer: A });
    assert!(node.holder(A, 0..400).is_empty());
    assert_eq!(words(&node.demand(40..41)), ["spans 10..11"], "the ban outlives the connection");
}

#[test]
fn a_lost_connection_frees_its_chunks() {
    let mut node = Node::with_layer();
    node.holder(A, 0..400);
    let ask = the_ask(&node.demand(0..2));
    let actions = node.tell(Event::PeerDown { peer: A });
    assert_eq!(cancelled(&actions), [ask]);
    assert_eq!(words(&actions), ["spans 0..1"]);
}

#[test]
fn an_ask_without_a_sign_of_life_loses_its_lease() {
    let mut node = Node::with_layer();
    node.holder(A, 0..400);
    let ask = the_ask(&node.demand(0..8));
    assert!(words(&node.wait(ms(249))).is_empty());
    node.tell(Event::AskProgress { ask });
    assert!(words(&node.wait(ms(2400))).is_empty(), "progress renews it");
    node.arrived(0..1);
    assert!(words(&node.wait(ms(2400))).is_empty(), "so do chunks");
    let actions = node.wait(ms(200));
    assert_eq!(cancelled(&actions), [ask]);
    assert_eq!(words(&actions), ["spans 0..2"]);
}

#[test]
fn a_reader_waits_no_longer_than_a_rank_for_the_first_word_of_a_peer() {
    let mut node = Node::with_layer();
    node.holder(A, 0..400);
    let ask = the_ask(&node.demand(0..8));
    let actions = node.wait(ms(251));
    assert_eq!((cancelled(&actions), words(&actions)), (vec![ask], vec!["spans 0..2".to_owned()]));
}

#[test]
fn a_reader_does_not_join_prefetch_whose_peer_has_gone_silent() {
    let mut node = Node::with_layer();
    node.holder(A, 0..400);
    let ask = the_ask(&node.prefetch(0..8));
    node.tell(Event::AskProgress { ask });
    assert!(words(&node.wait(ms(1500))).is_empty(), "prefetch can wait");
    node.holder(B, 0..400);
    assert_eq!(words(&node.demand(0..1)).len(), 1, "a reader cannot");
}

#[test]
fn a_full_holder_is_waited_for_rather_than_the_origin_but_not_for_ever() {
    let mut node = Node::with_layer();
    node.holder(A, 0..400);
    let asked: Vec<_> = (0..16).map(|no| the_ask(&node.demand(no * 8..no * 8 + 1))).collect();
    assert!(node.demand(200..201).is_empty());
    let actions = node.ended(asked[0], Outcome::Busy { retry_after: ms(10) });
    assert!(words(&actions).is_empty(), "it will have time within the patience of demand");
    let actions = node.wait(ms(11));
    assert_eq!(words(&actions), ["peer 1 0..1 200..201"], "the ask that ended takes the next read along");
    assert!(node.demand(300..301).is_empty());
    for ask in asked[1..].iter().copied().chain([the_ask(&actions)]) {
        node.tell(Event::AskProgress { ask });
    }
    node.wait(ms(1500));
    for ask in &asked[1..] {
        node.tell(Event::AskProgress { ask: *ask });
    }
    node.tell(Event::AskProgress { ask: the_ask(&actions) });
    let waited = words(&node.wait(ms(1600)));
    assert_eq!(waited, ["spans 75..76"], "3 s are enough");
}

#[test]
fn a_busy_holder_is_waited_for_when_it_will_have_time_soon() {
    for (busy, asked_now, asked_later) in
        [(ms(150), vec![], vec!["peer 1 0..1"]), (ms(900), vec!["spans 0..1"], vec![])]
    {
        let mut node = Node::with_layer();
        node.holder(A, 0..400);
        let ask = the_ask(&node.demand(0..1));
        // The search is over, so that nothing but the holder is waited for.
        node.tell(Event::HoldersFound { layer: LAYER });
        let actions = node.ended(ask, Outcome::Busy { retry_after: busy });
        assert_eq!(words(&actions), asked_now, "busy for {busy:?}");
        assert_eq!(words(&node.wait(ms(200))), asked_later, "busy for {busy:?}");
    }
}

#[test]
fn a_registry_failure_rests_the_layer_and_a_retry_after_rests_the_registry() {
    for (retry_after, other_layer) in [(None, "spans 0..1"), (Some(ms(5000)), "")] {
        let mut node = Node::with_layer();
        node.open(layer_no(2), geometry(10), Some(OriginNo(0)));
        let ask = the_ask(&node.demand(0..1));
        let outcome = Outcome::Failed { class: ErrorClass::Transient, retry_after };
        assert!(words(&node.ended(ask, outcome)).is_empty());
        let (_, actions) = node.read_of(layer_no(2), Class::Demand, Runs::one(0..1), ms(60_000));
        assert_eq!(words(&actions).join(" "), other_layer);
        let waited = node.wait(ms(4900));
        assert_eq!(words(&waited).len(), usize::from(retry_after.is_none()), "Retry-After is honoured");
        assert_eq!(words(&node.wait(ms(200))).len(), if retry_after.is_some() { 2 } else { 0 });
    }
}

#[test]
fn when_every_source_refused_demand_fails_at_once_with_the_reasons() {
    for class in [ErrorClass::Denied, ErrorClass::NotFound] {
        let mut node = Node::with_layer();
        let (read, actions) = node.read(Class::Demand, 0..1);
        let (prefetch, _) = node.read(Class::Prefetch, 1..2);
        let actions = node.failed(the_ask(&actions), class);
        assert_eq!(failures(&actions), [(read, FailReason::Refused), (prefetch, FailReason::Refused)]);
        let cause = causes(&actions).remove(0).1;
        assert_eq!(cause.tried, [(Source::Origin, class)]);
        assert_eq!((cause.origin, cause.holders), (OriginStanding::Refused, 0));
        let (read, actions) = node.read(Class::Demand, 8..9);
        assert_eq!(failures(&actions), [(read, FailReason::Refused)], "it is remembered");
        node.wait(Duration::from_secs(61));
        assert_eq!(words(&node.demand(8..9)).len(), 1, "for a minute");
    }
}

/// Another image that has the layer, from another registry: what the first one refuses is read from there.
#[test]
fn another_registry_is_asked_when_one_has_refused() {
    let mut node = Node::with_layer();
    let ask = the_ask(&node.demand(0..1));
    node.wait(ms(1));
    node.tell(Event::OriginChanged { layer: LAYER, origin: Some(OriginNo(1)), usable: true });
    // The old one's refusal comes after the change and says nothing of the new one.
    let actions = node.failed(ask, ErrorClass::Denied);
    let [Action::AskOrigin { origin, .. }] = actions.as_slice() else { panic!("{actions:?}") };
    assert_eq!(*origin, OriginNo(1));
    // Without any, reads have nothing to wait for but holders.
    node.tell(Event::OriginChanged { layer: LAYER, origin: None, usable: true });
    assert!(node.demand(5..6).is_empty());
}

#[test]
fn a_refusing_origin_with_a_search_under_way_is_waited_out() {
    for found in [true, false] {
        let mut node = Node::with_layer();
        let ask = the_ask(&node.demand(0..1));
        node.failed(ask, ErrorClass::Denied);
        node.tell(Event::PeerUp { peer: A });
        let (read, actions) = node.read(Class::Demand, 0..1);
        assert!(has_lookup(&actions));
        assert!(node.wait(ms(1900)).is_empty(), "demand waits for the search: there is nothing else");
        if found {
            let actions = node.tell(Event::PeerHas { peer: A, layer: LAYER, chunks: Runs::one(0..4) });
            assert_eq!(words(&actions), ["peer 1 0..1"]);
        } else {
            assert_eq!(failures(&node.wait(ms(200))), [(read, FailReason::Refused)], "a search without end has one");
        }
    }
}

#[test]
fn new_credentials_forget_the_refusal() {
    let mut node = Node::with_layer();
    let ask = the_ask(&node.demand(0..1));
    node.failed(ask, ErrorClass::Denied);
    node.tell(Event::OriginChanged { layer: LAYER, origin: Some(OriginNo(0)), usable: true });
    assert_eq!(words(&node.demand(0..1)), ["spans 0..1"]);
}

#[test]
fn a_refusing_origin_with_a_resting_holder_is_waited_out() {
    let mut node = Node::with_layer();
    node.holder(A, 0..400);
    let (read, actions) = node.read(Class::Demand, 0..1);
    let actions = node.failed(the_ask(&actions), ErrorClass::Transient);
    let actions = node.failed(the_ask(&actions), ErrorClass::Denied);
    assert!(failures(&actions).is_empty());
    let actions = node.wait(ms(200));
    assert_eq!(words(&actions), ["peer 1 0..1"]);
    assert_eq!(delivered(&node.arrived(0..1)), [read]);
}

#[test]
fn without_any_source_a_read_waits_until_its_deadline_and_says_what_it_lacked() {
    let mut node = Node::new(no_guessing());
    node.open(LAYER, geometry(10), Some(OriginNo(0)));
    node.tell(Event::OriginChanged { layer: LAYER, origin: Some(OriginNo(0)), usable: false });
    let (read, actions) = node.read(Class::Demand, 0..1);
    assert!(actions.is_empty());
    assert!(node.wait(ms(59_999)).is_empty());
    let actions = node.wait(ms(1));
    let [(failed, cause)] = causes(&actions).try_into().expect("one failure");
    assert_eq!((failed, cause.reason, cause.origin), (read, FailReason::Deadline, OriginStanding::Unusable));
    let (_, actions) = node.read_of(LAYER, Class::Demand, Runs::one(0..1), ms(0));
    assert_eq!(failures(&actions).len(), 1, "a deadline that has passed fails at once");
}

#[test]
fn a_peer_that_comes_while_a_read_waits_answers_it() {
    let mut node = Node::new(no_guessing());
    node.open(LAYER, geometry(10), None);
    let (_, actions) = node.read(Class::Demand, 0..1);
    assert!(actions.is_empty());
    node.wait(ms(20_000));
    assert!(has_lookup(&node.tell(Event::PeerUp { peer: A })));
    let found = node.tell(Event::PeerHas { peer: A, layer: LAYER, chunks: Runs::one(0..40) });
    assert_eq!(words(&found), ["peer 1 0..1"]);
}

#[test]
fn a_registry_that_sends_wrong_bytes_is_given_up_after_three_times() {
    let mut node = Node::with_layer();
    let (read, mut actions) = node.read(Class::Demand, 0..1);
    for _ in 0..2 {
        node.failed(the_ask(&actions), ErrorClass::PeerFault);
        actions = node.wait(ms(1000));
    }
    assert_eq!(failures(&node.failed(the_ask(&actions), ErrorClass::PeerFault)), [(read, FailReason::Refused)]);
}

#[test]
fn a_failure_of_our_own_disk_blames_nobody() {
    let mut node = Node::with_layer();
    node.holder(A, 0..400);
    let (read, actions) = node.read(Class::Demand, 0..1);
    let actions = node.failed(the_ask(&actions), ErrorClass::Local);
    assert!(words(&actions).is_empty(), "no other source can help");
    let actions = node.wait(ms(200));
    assert_eq!(words(&actions), ["peer 1 0..1"], "the same peer is asked again");
    assert_eq!(delivered(&node.arrived(0..1)), [read]);
}

#[test]
fn what_is_evicted_under_a_waiting_read_is_fetched_again() {
    let mut node = Node::with_layer();
    let (read, _) = node.read(Class::Demand, 0..8);
    node.arrived(0..4);
    let actions = node.tell(Event::Evicted { layer: LAYER, chunks: Runs::one(2..3) });
    assert_eq!(words(&actions), ["spans 0..1"]);
    assert!(delivered(&node.arrived(4..8)).is_empty());
    assert_eq!(delivered(&node.arrived(2..3)), [read]);
}

#[test]
fn what_the_store_cannot_keep_counts_for_the_reads_that_wait_and_for_no_other() {
    let mut node = Node::with_layer();
    let (read, _) = node.read(Class::Demand, 0..8);
    let through = |chunks| Event::PassedThrough { layer: LAYER, chunks: Runs::one(chunks) };
    assert!(delivered(&node.tell(through(0..4))).is_empty());
    assert_eq!(delivered(&node.tell(through(4..8))), [read]);
    assert_eq!(words(&node.demand(0..1)), ["spans 0..1"]);
}

#[test]
fn closing_a_layer_ends_its_reads_and_asks() {
    let mut node = Node::with_layer();
    let (read, actions) = node.read(Class::Demand, 0..1);
    let ask = the_ask(&actions);
    let actions = node.tell(Event::LayerClosed { layer: LAYER });
    assert_eq!((failures(&actions), cancelled(&actions)), (vec![(read, FailReason::Closed)], vec![ask]));
    let (read, actions) = node.read(Class::Demand, 0..1);
    assert_eq!(failures(&actions), [(read, FailReason::Unknown)]);
    assert_eq!(node.flight.status(), crate::event::Status::default());
}

#[test]
fn chunks_that_do_not_exist_are_refused() {
    let mut node = Node::with_layer();
    let (read, actions) = node.read(Class::Demand, 399..401);
    assert_eq!(failures(&actions), [(read, FailReason::Unknown)]);
}

#[test]
fn spans_are_asked_for_when_the_registry_is_needed() {
    let mut node = Node::new(no_guessing());
    let bare = LayerGeometry::new(vec![CHUNK; 40]).expect("valid");
    node.open(LAYER, bare, Some(OriginNo(0)));
    node.holder(A, 0..4);
    assert_eq!(words(&node.demand(0..4)), ["peer 1 0..4"]);
    node.arrived(0..4);
    node.demand(8..9);
    let actions = node.tell(Event::HoldersFound { layer: LAYER });
    assert_eq!(actions, [Action::FindSpans { layer: LAYER }]);
    assert!(node.demand(12..13).is_empty(), "once");
    let waited = node.wait(ms(5000));
    assert!(waited.contains(&Action::FindSpans { layer: LAYER }), "and again when nothing came: {waited:?}");
    let known = Event::GeometryChanged { layer: LAYER, geometry: Arc::new(geometry(10)) };
    let actions = node.tell(known);
    assert_eq!(words(&actions), ["spans 2..4"]);
}

#[test]
fn a_cancelled_reader_leaves_the_ask_to_those_who_wait() {
    let mut node = Node::with_layer();
    let (first, actions) = node.read(Class::Demand, 0..1);
    let (second, _) = node.read(Class::Demand, 1..2);
    assert!(node.tell(Event::ReadCancelled { read: first }).is_empty());
    let actions = node.failed(the_ask(&actions), ErrorClass::Transient);
    assert!(failures(&actions).is_empty());
    assert_eq!(words(&node.wait(ms(300))), ["spans 0..1"], "the second leads now");
    assert_eq!(delivered(&node.arrived(0..4)), [second]);
}

#[test]
fn facts_about_the_unknown_change_nothing() {
    let mut node = Node::with_layer();
    let chunks = Runs::one(0..4);
    let (layer, peer) = (layer_no(9), PeerNo(9));
    for event in [
        Event::LayerClosed { layer },
        Event::OriginChanged { layer, origin: None, usable: true },
        Event::GeometryChanged { layer, geometry: Arc::new(geometry(1)) },
        Event::GeometryChanged { layer: LAYER, geometry: Arc::new(geometry(1)) },
        Event::PeerDown { peer },
        Event::PeerHas { peer, layer: LAYER, chunks: chunks.clone() },
        Event::HoldersFound { layer },
        Event::ReadCancelled { read: ReadId(77) },
        Event::ReadHit { layer: LAYER, first_chunk: 9, end_chunk: 3 },
        Event::Arrived { layer, chunks: chunks.clone() },
        Event::Arrived { layer: LAYER, chunks: Runs::one(400..500) },
        Event::PassedThrough { layer, chunks: chunks.clone() },
        Event::PassedThrough { layer: LAYER, chunks: Runs::one(400..500) },
        Event::Evicted { layer, chunks: chunks.clone() },
        Event::LocalHas { layer, chunks },
        Event::AskProgress { ask: AskId(5) },
        Event::AskEnded { ask: AskId(5), outcome: Outcome::Done { bytes: 0 } },
        Event::TimerFired,
    ] {
        assert_eq!(node.tell(event), []);
    }
    assert_eq!(words(&node.demand(0..1)), ["spans 0..1"]);
}

/// Two layers of which `A` has the first chunks, and a demand read of each, the second of which it is too busy for.
fn one_that_waits_for_a_busy_peer() -> (Node, AskId) {
    let mut node = Node::with_layer();
    node.holder(A, 0..8);
    node.open(layer_no(2), geometry(10), Some(OriginNo(0)));
    node.tell(Event::PeerHas { peer: A, layer: layer_no(2), chunks: Runs::one(0..8) });
    let first = the_ask(&node.demand(0..2));
    let read = node.read_of(layer_no(2), Class::Demand, Runs::one(0..2), ms(9_000));
    let busy = node.ended(the_ask(&read.1), Outcome::Busy { retry_after: ms(150) });
    assert_eq!(words(&busy), [""; 0], "it is waited for");
    (node, first)
}

#[test]
fn a_read_that_rests_goes_on_when_its_peer_has_time() {
    let (mut node, _) = one_that_waits_for_a_busy_peer();
    assert_eq!(words(&node.wait(ms(149))), [""; 0]);
    assert_eq!(words(&node.wait(ms(2))), ["peer 1 0..2"]);
}

#[test]
fn a_read_that_rests_goes_on_when_its_peer_has_answered_for_another_layer() {
    let (mut node, first) = one_that_waits_for_a_busy_peer();
    node.now = node.now + ms(2);
    node.arrived(0..2);
    assert_eq!(words(&node.ended(first, Outcome::Done { bytes: 2 * CHUNK })), ["peer 1 0..2"]);
}

#[test]
fn a_read_that_rests_goes_on_when_another_peer_has_it() {
    let (mut node, _) = one_that_waits_for_a_busy_peer();
    node.tell(Event::PeerUp { peer: B });
    let news = Event::PeerHas { peer: B, layer: layer_no(2), chunks: Runs::one(0..2) };
    assert_eq!(words(&node.tell(news)), ["peer 2 0..2"]);
}

#[test]
fn what_waits_for_a_full_peer_is_asked_of_it_alone_when_it_has_room_and_of_others_when_they_have_it() {
    let peer = SourceLimit { asks: 2, reserved_for_demand: 1, prefetch_beside_demand: 1 };
    let mut node = Node::new(Limits {
        peer,
        peer_size: AskSize { demand_bytes: 2 * CHUNK, prefetch_bytes: 2 * CHUNK },
        ..no_guessing()
    });
    node.open(LAYER, geometry(100), None);
    node.holder(A, 0..8);
    let first = the_ask(&node.prefetch(0..8));
    node.tell(Event::PeerUp { peer: B });
    let news = |chunks| Event::PeerHas { peer: B, layer: LAYER, chunks };
    assert_eq!(words(&node.tell(news(Runs::one(40..44)))), [""; 0], "nobody wants that");
    assert_eq!(words(&node.tell(news(Runs::one(6..8)))), ["peer 2 6..8"]);
    node.arrived(0..2);
    assert_eq!(words(&node.ended(first, Outcome::Done { bytes: 2 * CHUNK })), ["peer 1 2..4"]);
}

#[test]
fn news_of_what_nobody_waits_for_make_nobody_look_again() {
    let mut node = Node::with_layer();
    node.holder(A, 0..1);
    let told = |node: &mut Node, chunks| node.tell(Event::PeerHas { peer: A, layer: LAYER, chunks: Runs::one(chunks) });
    let changes = |node: &Node| node.flight.layers[&LAYER].changes;
    node.tell(Event::HoldersFound { layer: LAYER });
    node.demand(100..102);
    node.prefetch(200..202);
    let before = changes(&node);
    assert_eq!(told(&mut node, 300..310), []);
    assert_eq!(changes(&node), before, "nobody wants these");
    told(&mut node, 101..102);
    assert_ne!(changes(&node), before, "a reader waits for this one");
    node.holder(B, 0..1);
    let before = changes(&node);
    node.tell(Event::PeerHas { peer: B, layer: LAYER, chunks: Runs::one(201..202) });
    assert_eq!(changes(&node), before, "prefetch has asked for it");
}
