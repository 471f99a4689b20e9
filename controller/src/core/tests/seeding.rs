use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::world::*;
use crate::crd::{Seed, SeedMode};
use crate::event::{ClusterNode, Event, NodeReport, WorkloadKind};

fn node(number: u32, zone: &str) -> ClusterNode {
    ClusterNode {
        name: format!("node-{number:03}"),
        labels: BTreeMap::from([("pool".to_owned(), if number.is_multiple_of(2) { "gpu" } else { "cpu" }.to_owned())]),
        zone: zone.to_owned(),
        schedulable: true,
    }
}

fn seeded(seed: Seed) -> World {
    let mut world = World::new();
    let mut with_seed = spec("");
    with_seed.seed = Some(seed);
    world.say(policy("p", 1, with_seed));
    world.say(Event::Workload(workload(&id(WorkloadKind::Deployment, "a"), &["a"])));
    for number in 0..30 {
        let node = node(number, ["x", "y", "z"][number as usize / 10]);
        world.say(Event::Reported { node: node.name.clone(), report: NodeReport::default() });
        world.say(Event::Node(node));
    }
    world.resolve("docker.io/library/a:latest", 1);
    world.build(1);
    world.pass(Duration::from_secs(3));
    world
}

fn seeds(world: &World) -> BTreeSet<String> {
    world.views[&key(1)].seeds.keys().cloned().collect()
}

fn zone(node: &str) -> u32 {
    node["node-".len()..].parse::<u32>().expect("a number") / 10
}

#[test]
fn copies_are_in_different_zones_on_nodes_with_the_labels() {
    let selector = BTreeMap::from([("pool".to_owned(), "gpu".to_owned())]);
    let world = seeded(Seed { replicas: Some(3), node_selector: selector, mode: SeedMode::Full });
    let chosen = seeds(&world);
    assert_eq!(chosen.iter().map(|node| zone(node)).collect::<BTreeSet<_>>().len(), 3, "{chosen:?}");
    assert!(world.views[&key(1)].seeds.values().all(|mode| *mode == SeedMode::Full));
    assert!(chosen.iter().all(|node| node["node-".len()..].parse::<u32>().expect("a number") % 2 == 0));
}

#[test]
fn only_the_copies_move_that_have_to() {
    let mut world = seeded(Seed { replicas: Some(4), ..Seed::default() });
    let before = seeds(&world);
    assert_eq!(before.len(), 4);
    let lost = before.first().expect("one").clone();
    world.say(Event::NodeSilent(lost.clone()));
    world.pass(Duration::from_secs(3));
    let after = seeds(&world);
    assert_eq!(after.len(), 4);
    assert!(!after.contains(&lost) && after.intersection(&before).count() == 3, "{before:?} {after:?}");
    world.say(Event::Reported { node: lost, report: NodeReport::default() });
    world.pass(Duration::from_secs(3));
    assert_eq!(seeds(&world), before);
}

#[test]
fn nodes_without_room_or_about_to_go_get_nothing_new_and_keep_what_they_hold() {
    let mut world = seeded(Seed::default());
    let before = seeds(&world);
    let (first, second) = (before.first().expect("two").clone(), before.last().expect("two").clone());
    let full = |images: BTreeMap<_, _>| NodeReport {
        store_used_bytes: 900,
        store_budget_bytes: Some(1000),
        images,
        ..NodeReport::default()
    };
    let holds = BTreeMap::from([(key(1).manifest, 40)]);
    world.say(Event::Reported { node: first.clone(), report: full(holds) });
    world.say(Event::Reported { node: second.clone(), report: full(BTreeMap::new()) });
    world.pass(Duration::from_secs(3));
    let after = seeds(&world);
    assert!(after.contains(&first) && !after.contains(&second) && after.len() == 2, "{before:?} {after:?}");
    let mut cordoned = node(first["node-".len()..].parse().expect("a number"), "x");
    cordoned.schedulable = false;
    world.say(Event::Node(cordoned));
    world.pass(Duration::from_secs(3));
    assert!(!seeds(&world).contains(&first));
}

#[test]
fn without_a_wish_there_are_no_seeds_and_small_changes_plan_nothing() {
    let mut world = seeded(Seed::default());
    let published = world.log.len();
    for used in 0..100 {
        let report = NodeReport {
            store_used_bytes: used,
            store_budget_bytes: Some(1 << 40),
            peer_bytes: used,
            ..NodeReport::default()
        };
        world.say(Event::Reported { node: "node-001".to_owned(), report });
    }
    world.pass(Duration::from_secs(3));
    assert!(world.log.len() - published < 5, "{:?}", &world.log[published..]);
    world.say(policy("p", 2, spec("")));
    world.pass(Duration::from_secs(3));
    assert!(seeds(&world).is_empty());
}
