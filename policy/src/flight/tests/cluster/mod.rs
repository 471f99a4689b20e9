//! Many nodes of the production policy in one made-up network: what the registry sees when they start together, and what
//! comes of reads when nodes die, are cut off, have old lists, or lack a login.

mod network;

use std::collections::BTreeSet;

use proptest::prelude::{ProptestConfig, any, prop_assert, proptest};

use super::*;
use network::{CHUNK_TIME, CHUNKS, Cluster, SPANS};

/// A chunk at 400 Mbit/s.
const NARROW_CHUNK_TIME: Duration = Duration::from_micros(1311);

fn all(count: usize) -> Vec<usize> {
    (0..count).collect()
}

/// Seeds of clusters whose mean is looked at.
const SEEDS: [u64; 5] = [1, 2, 3, 4, 5];

#[test]
fn nodes_that_start_together_read_the_registry_once() {
    for (count, class, step) in [
        (12, Class::Demand, 2),
        (12, Class::Prefetch, CHUNKS),
        (3, Class::Demand, 5),
        (2, Class::Demand, 1),
        (40, Class::Demand, 8),
    ] {
        // One seed says little: of sixteen, two are at 112 % with forty nodes, and most are below 107.
        let egress = SEEDS.map(|seed| {
            let mut cluster = Cluster::new(count, 1, count, seed);
            cluster.all_read(&all(count), step, class, |_, _| {});
            cluster.egress()
        });
        let mean = egress.iter().sum::<u32>() / SEEDS.len() as u32;
        assert!(mean <= 108 && egress.iter().all(|egress| *egress <= 115), "{count} nodes, {class:?}: {egress:?} %");
    }
}

#[test]
fn a_node_that_is_alone_waits_for_nobody() {
    let mut cluster = Cluster::new(1, 1, 1, 1);
    cluster.all_read(&[0], 2, Class::Demand, |_, _| {});
    assert_eq!((cluster.egress(), cluster.longest() < ms(100)), (100, true), "{:?}", cluster.longest());
}

#[test]
fn owners_without_the_layer_leave_it_to_the_readers() {
    let mut cluster = Cluster::new(60, 1, 6, 2);
    cluster.all_read(&all(6), 2, Class::Demand, |_, _| {});
    assert!(cluster.egress() <= 110, "{} %", cluster.egress());
    assert!(cluster.machines[6..].iter().all(|machine| machine.have.is_empty()), "an owner read what it does not need");
}

#[test]
fn who_was_left_extents_reads_them_for_all_who_are_sent_there() {
    for (step, class) in [(CHUNKS, Class::Prefetch), (21, Class::Prefetch), (4, Class::Prefetch), (21, Class::Demand)] {
        let mut cluster = Cluster::new(13, 1, 7, 9);
        cluster.all_read(&all(7), step, class, |_, _| {});
        assert!(cluster.egress() <= 102, "{step} chunks, {class:?}: {} %", cluster.egress());
    }
}

#[test]
fn owners_without_a_login_leave_it_to_those_who_have_one() {
    let mut cluster = Cluster::new(12, 1, 12, 3);
    for no in 0..9 {
        cluster.machines[no].has_login = false;
    }
    cluster.all_read(&all(12), 2, Class::Demand, |_, _| {});
    assert!(cluster.egress() <= 115, "{} %", cluster.egress());
}

/// The owner of the first extent takes on claims before it learns that its registry refuses it; others wait for these
/// claims, and it for them.
#[test]
fn an_owner_that_is_refused_gives_its_claims_back() {
    let seed = 15_807_214_429_799_003_527;
    let mut cluster = Cluster::new(8, 1, 8, seed);
    for no in [1, 3, 4, 5, 6, 7] {
        cluster.machines[no].has_login = false;
    }
    cluster.all_read(&all(8), 1, Class::Prefetch, |_, _| {});
    assert!(cluster.longest() <= Duration::from_secs(1), "{:?}", cluster.longest());
    assert!(cluster.egress() <= 120, "{} %", cluster.egress());
}

#[test]
fn zones_see_each_byte_about_once() {
    let mut cluster = Cluster::new(12, 3, 12, 4);
    cluster.all_read(&all(12), 2, Class::Demand, |_, _| {});
    let crossing: u64 = cluster
        .machines
        .iter()
        .enumerate()
        .flat_map(|(from, machine)| machine.sent.iter().filter(move |(to, _)| *to % 3 != from % 3))
        .map(|(_, chunks)| chunks)
        .sum();
    let most = 3 * u64::from(CHUNKS) * 11 / 10;
    assert!(crossing <= most, "{crossing} chunks crossed zones, {most} may");
    assert!(cluster.egress() <= 110, "{} %", cluster.egress());
}

#[test]
fn two_of_twelve_may_die() {
    for seed in 0..20 {
        let mut cluster = Cluster::new(12, 1, 12, seed);
        let mut dice = Rng::new(seed);
        let (first, second, at) = (dice.below(12) as usize, dice.below(12) as usize, dice.below(400) as u32);
        cluster.all_read(&all(12), 2, Class::Demand, |cluster, tick| {
            if tick == at {
                cluster.kill(first);
                cluster.kill(second);
            }
        });
        assert!(cluster.egress() <= 120, "seed {seed}: {} %", cluster.egress());
        assert!(cluster.longest() <= Duration::from_secs(1), "seed {seed}: {:?}", cluster.longest());
    }
}

#[test]
fn a_partition_reads_once_on_each_side_and_heals() {
    let mut cluster = Cluster::new(12, 1, 12, 5);
    let lose = |cluster: &mut Cluster| {
        for no in 0..12 {
            for other in (0..12).filter(|other| other % 2 != no % 2) {
                cluster.connection_lost(no, other);
            }
        }
    };
    cluster.all_read(&all(12), 2, Class::Demand, |cluster, tick| match tick {
        100 => {
            cluster.group = (0..12).map(|no| no % 2).collect();
            lose(cluster);
        }
        // The swarm has noticed.
        1500 => (0..12).for_each(|no| {
            let others = (0..12).filter(|other| other % 2 != no % 2).collect();
            cluster.tell_members(no, &others, 2 + no as u64 % 2);
        }),
        3000 => {
            cluster.group = vec![0; 12];
            (0..12).for_each(|no| cluster.tell_members(no, &BTreeSet::new(), 4));
        }
        _ => {}
    });
    assert!(cluster.egress() <= 210, "{} %", cluster.egress());
}

/// The network of the fleets in the end-to-end tests: uplinks of 400 Mbit/s, and one link of 40 Mbit/s to the registry for all.
fn narrow(count: usize, seed: u64) -> Cluster {
    let mut cluster = Cluster::new(count, 1, count, seed);
    for machine in &mut cluster.machines {
        machine.chunk_time = NARROW_CHUNK_TIME;
    }
    cluster.registry_span_time = Some(ms(40));
    cluster
}

#[test]
fn a_partition_that_nobody_is_told_of_holds_up_nobody_for_long() {
    for seed in 0..8 {
        let mut cluster = narrow(12, seed);
        cluster.is_silent = true;
        cluster.all_read(&all(12), 2, Class::Demand, |cluster, tick| match tick {
            1000 => cluster.group = (0..12).map(|no| no % 2).collect(),
            5000 => cluster.group = vec![0; 12],
            _ => {}
        });
        assert!(cluster.longest() <= Duration::from_secs(1), "seed {seed}: {:?}", cluster.longest());
        assert!(cluster.egress() <= 210, "seed {seed}: {} %", cluster.egress());
    }
}

#[test]
fn one_slow_uploader_on_a_narrow_network_holds_up_nobody_for_long() {
    for seed in 0..8 {
        let mut cluster = narrow(12, seed);
        let slow = Rng::new(seed).below(12) as usize;
        cluster.machines[slow].chunk_time = NARROW_CHUNK_TIME * 100;
        cluster.all_read(&all(12), 2, Class::Demand, |_, _| {});
        assert!(cluster.longest() <= Duration::from_secs(1), "seed {seed}: {:?}", cluster.longest());
        assert!(cluster.egress() <= 120, "seed {seed}: {} %", cluster.egress());
    }
}

#[test]
fn a_node_that_pauses_is_passed_over() {
    for seed in 0..8 {
        let mut cluster = Cluster::new(12, 1, 12, seed);
        let paused = Rng::new(seed).below(12) as usize;
        cluster.all_read(&all(12), 2, Class::Demand, |cluster, tick| {
            if tick == 50 {
                let until = cluster.now + Duration::from_secs(10);
                cluster.paused_until.insert(paused, until);
            }
        });
        let others = cluster.machines.iter().enumerate().filter(|(no, _)| *no != paused);
        let longest = others.map(|(_, machine)| machine.longest).max().unwrap_or_default();
        assert!(longest <= Duration::from_secs(1), "seed {seed}: {longest:?}");
        assert!(cluster.egress() <= 120, "seed {seed}: {} %", cluster.egress());
        let wrong = cluster.suspected.iter().find(|(peer, by)| *peer != paused && *by != paused);
        assert_eq!(wrong, None, "seed {seed}");
    }
}

#[test]
fn one_slow_uploader_holds_up_nobody_for_long() {
    for seed in 0..8 {
        let mut cluster = Cluster::new(12, 1, 12, seed);
        let slow = Rng::new(seed).below(12) as usize;
        cluster.machines[slow].chunk_time = CHUNK_TIME * 100;
        cluster.all_read(&all(12), 2, Class::Demand, |_, _| {});
        assert!(cluster.longest() <= Duration::from_secs(1), "seed {seed}: {:?}", cluster.longest());
        assert!(cluster.egress() <= 120, "seed {seed}: {} %", cluster.egress());
    }
}

#[test]
fn old_lists_cost_little() {
    let mut cluster = Cluster::new(12, 1, 12, 6);
    // Two nodes of ten do not know the two newest.
    for no in [3, 8] {
        cluster.tell_members(no, &BTreeSet::from([10, 11]), 9);
    }
    cluster.all_read(&all(12), 2, Class::Demand, |_, _| {});
    assert!(cluster.egress() <= 120, "{} %", cluster.egress());
    assert!(cluster.longest() <= Duration::from_secs(1), "{:?}", cluster.longest());
}

#[test]
fn a_registry_that_asks_for_rest_is_left_alone_by_all() {
    let mut cluster = Cluster::new(12, 1, 12, 7);
    cluster.registry_rests_until = cluster.now + Duration::from_secs(3);
    cluster.all_read(&all(12), 2, Class::Demand, |_, _| {});
    assert!(cluster.egress() <= 110, "{} %", cluster.egress());
    // At most one that hears it first for each extent owner, before the word has spread.
    assert!(cluster.requests <= SPANS + 12, "{} requests", cluster.requests);
}

#[test]
fn a_cold_node_among_warm_ones_asks_the_registry_for_nothing() {
    let mut cluster = Cluster::new(12, 1, 12, 8);
    for no in 1..12 {
        cluster.tell(no, Event::Arrived { layer: LAYER, chunks: Runs::one(0..CHUNKS) });
    }
    cluster.all_read(&[0], 2, Class::Demand, |_, _| {});
    assert_eq!((cluster.egress(), cluster.longest() < ms(60)), (0, true), "{:?}", cluster.longest());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens to some of the nodes, the reads of those that live end with their chunks as long as one of them
    /// reaches the registry with a login, and nobody waits in a circle: that would take five seconds a time.
    #[test]
    fn readers_that_live_get_their_chunks(
        seed in any::<u64>(),
        count in 2_usize..14,
        zones in 1_u32..4,
        prefetch in any::<bool>(),
        step in 1_u32..24,
        faults in proptest::collection::vec((0_u32..600, 0_u32..5, any::<u8>()), 0..6),
    ) {
        let open = 1 + seed as usize % count;
        let mut cluster = Cluster::new(count, zones, open, seed);
        let class = if prefetch { Class::Prefetch } else { Class::Demand };
        for no in 1..open {
            cluster.machines[no].has_login = !(seed >> no).is_multiple_of(3);
        }
        cluster.all_read(&all(open), step, class, |cluster, tick| {
            for (_, fault, which) in faults.iter().filter(|(at, ..)| *at == tick) {
                let no = usize::from(*which) % count;
                match fault {
                    // The first one lives: it can read the registry.
                    0 if no > 0 => cluster.kill(no),
                    1 if no > 0 => {
                        let until = cluster.now + Duration::from_secs(3);
                        cluster.paused_until.insert(no, until);
                    }
                    2 => {
                        // Everybody knows the one that can read the registry.
                        let unknown = [no, (no + 1) % count].into_iter().filter(|no| *no > 0).collect();
                        cluster.tell_members((no + 2) % count, &unknown, 100 + u64::from(*which));
                    }
                    3 => cluster.machines[no].chunk_time = CHUNK_TIME * 20,
                    _ => cluster.registry_rests_until = cluster.now + Duration::from_secs(1),
                }
            }
        });
        // Each list that differs may cost a reading of its own (two of them 216 % in a cluster of three). The owner sends who has no
        // login away, and who is next in rank reads for it; the owner's claimants read as well.
        let lists = 1 + faults.iter().filter(|(_, fault, _)| *fault == 2).count() as u32;
        let all_have_logins = cluster.machines.iter().all(|machine| machine.has_login);
        let most = match faults.iter().any(|(_, fault, _)| *fault < 2) {
            true => 4,
            false if all_have_logins => lists.max(2),
            false => lists.max(3),
        };
        prop_assert!(cluster.egress() <= 100 * most, "{} %", cluster.egress());
    }
}
