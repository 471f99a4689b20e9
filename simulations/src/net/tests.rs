//! The link model against max-min shares computed by filling, and its books.

use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};

use super::*;
use crate::queue::{Queue, SECOND};

const UNIT: u32 = 65_536;

fn purpose() -> Purpose {
    Purpose { from: None, to: 0, to_life: 0, ask: 0 }
}

/// Bytes that flows which always have something to send get through in `end`.
fn run(rates: &[u64], paths: &[Vec<usize>], end: Nanos) -> (Vec<u64>, Network) {
    let mut net = Network::default();
    let links: Vec<LinkNo> = rates.iter().map(|rate| net.add_link(Rate(*rate), false)).collect();
    let mut queue = Queue::default();
    let mut got = vec![0; paths.len()];
    for path in paths {
        let path: Vec<LinkNo> = path.iter().map(|no| links[*no]).collect();
        let flow = net.open(&path, true, purpose());
        for _ in 0..8 {
            net.push(flow, UNIT, 0, 0);
        }
        net.go(flow, 0);
    }
    loop {
        while let Some((at, link)) = net.take_begun() {
            queue.at(at, link);
        }
        let Some(link) = queue.next(end) else { break };
        if let Some((flow, _, len)) = net.sent_one(link, queue.now()).arrived {
            got[flow.0 as usize] += u64::from(len);
            if net.push(flow, UNIT, 0, queue.now()) {
                net.go(flow, queue.now());
            }
        }
    }
    (got, net)
}

/// Max-min shares by filling: the tightest link fixes the shares of its flows, and so on (Bertsekas and Gallager 1992).
fn filled(rates: &[u64], paths: &[Vec<usize>]) -> Vec<f64> {
    let mut shares = vec![None; paths.len()];
    loop {
        let left = |link: usize| {
            let taken: f64 = (0..paths.len()).filter(|f| paths[*f].contains(&link)).filter_map(|f| shares[f]).sum();
            let open = (0..paths.len()).filter(|f| paths[*f].contains(&link) && shares[*f].is_none()).count();
            (open > 0).then(|| (rates[link] as f64 - taken) / open as f64)
        };
        let tightest = (0..rates.len()).filter_map(|link| Some((left(link)?, link))).min_by(|a, b| a.0.total_cmp(&b.0));
        let Some((share, link)) = tightest else { break };
        for flow in 0..paths.len() {
            if paths[flow].contains(&link) && shares[flow].is_none() {
                shares[flow] = Some(share);
            }
        }
    }
    shares.into_iter().map(Option::unwrap_or_default).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flows_get_their_max_min_shares(
        rates in proptest::collection::vec(2_u64..12, 3..7),
        ends in proptest::collection::vec((any::<u16>(), any::<u16>()), 1..9),
    ) {
        // Nodes with a link each way: even numbers out, odd ones in.
        let rates: Vec<u64> = rates.iter().flat_map(|rate| [rate * 10_000_000, rate * 7_000_000]).collect();
        let nodes = rates.len() / 2;
        let paths: Vec<Vec<usize>> = ends.iter().map(|(from, to)| {
            let from = usize::from(*from) % nodes;
            let to = (from + 1 + usize::from(*to) % (nodes - 1)) % nodes;
            vec![from * 2, to * 2 + 1]
        }).collect();
        let (got, net) = run(&rates, &paths, 4 * SECOND);
        for (flow, share) in filled(&rates, &paths).into_iter().enumerate() {
            let speed = got[flow] as f64 / 4.0;
            prop_assert!((speed - share).abs() <= share * 0.06 + 200_000.0, "flow {flow} {:?}: {speed} of {share}", paths[flow]);
        }
        let books = net.books();
        prop_assert_eq!(books.pushed, books.delivered + books.dropped + books.waiting);
        prop_assert_eq!(books.waiting, net.count_waiting());
        for (no, rate) in rates.iter().enumerate() {
            let (sent, busy) = net.sent(LinkNo(no as u32));
            prop_assert!(u128::from(sent) * u128::from(SECOND) <= u128::from(*rate) * u128::from(busy), "link {no} is too quick");
        }
    }
}

#[test]
fn demand_goes_first_and_prefetch_is_not_starved() {
    let mut net = Network::default();
    let link = net.add_link(Rate(u64::from(UNIT) * 1000), true);
    let (slow, quick) = (net.open(&[link], false, purpose()), net.open(&[link], true, purpose()));
    for flow in [slow, quick] {
        for _ in 0..100 {
            net.push(flow, UNIT, 0, 0);
        }
        net.go(flow, 0);
    }
    let mut order = Vec::new();
    let mut queue = Queue::default();
    loop {
        while let Some((at, link)) = net.take_begun() {
            queue.at(at, link);
        }
        let Some(link) = queue.next(SECOND) else { break };
        order.extend(net.sent_one(link, queue.now()).arrived.map(|(flow, ..)| flow == slow));
    }
    let before: usize = order[..100].iter().filter(|slow| **slow).count();
    assert_eq!(order.len(), 200);
    assert!((4..=6).contains(&before), "one prefetch unit every 20 ms beside demand, not {before}");
}

#[test]
fn a_closed_flow_frees_its_place_and_its_link() {
    let mut net = Network::default();
    let link = net.add_link(Rate(u64::from(UNIT)), false);
    let gone = net.open(&[link], true, purpose());
    let stays = net.open(&[link], true, purpose());
    for flow in [gone, stays] {
        net.push(flow, UNIT, 7, 0);
        net.go(flow, 0);
    }
    net.close(gone);
    assert_eq!(net.take_begun(), Some((SECOND, link)), "what is on the link is sent");
    assert_eq!(net.sent_one(link, SECOND), Sent::default());
    assert_eq!(net.take_begun(), Some((2 * SECOND, link)));
    assert_eq!(net.sent_one(link, 2 * SECOND).arrived, Some((stays, 7, UNIT)));
    assert_eq!(net.open(&[link], true, purpose()), gone, "its number is used again");
    let books = Books { pushed: 131_072, delivered: 65_536, dropped: 65_536, waiting: 0 };
    assert_eq!(net.books(), books);
}
