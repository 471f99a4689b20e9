//! Random worlds hold, errors on purpose are found, and a run is its seed's alone.

use super::*;

/// Of [`the_fingerprint_is_the_pinned_one`].
const PINNED: &str = "e08cb861180f08337db2df58e3672e488a2aae5fd6d37a3af184f6cb7ddd16de";

/// Seeds that are tried, without and with each error on purpose.
const SEEDS: u64 = 200;

#[test]
fn changes_are_read_as_they_are_written() {
    let all = [
        Change::Nodes(3),
        Change::Chunks(9),
        Change::Faults(5),
        Change::OneZone,
        Change::AtOnce,
        Change::Registry(160),
    ];
    for change in all {
        assert_eq!(change.to_string().parse(), Ok(change));
    }
    assert_eq!(drawn(1413, &[Change::Registry(160)]).expect.registry, Share(16_000));
    assert!("nodes=0".parse::<Change>().is_err() && "zones=2".parse::<Change>().is_err());
    let violation = Violation { kind: "timer", at: 0, what: "late".to_owned() };
    let failure = Failure { seed: 7, changes: vec![Change::Nodes(3), Change::Faults(0)], violation };
    assert_eq!(failure.to_string(), "hermes simulate check --seed 7 --set nodes=3 --set faults=0  # timer: late");
}

#[test]
fn drawn_worlds_are_valid() {
    for seed in 0..2000 {
        let scenario = drawn(seed, &[]);
        scenario.validate().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert!(scenario.faults.iter().all(|fault| fault.lasts.is_some()), "seed {seed}: all faults end");
    }
}

#[test]
fn nothing_is_violated_in_some_worlds() {
    let told = AtomicU64::new(0);
    let count = |_: Option<&Failure>| _ = told.fetch_add(1, Ordering::Relaxed);
    let failures = check_all(0..SEEDS, 2, true, count).expect("have images");
    let lines: Vec<String> = failures.iter().map(Failure::to_string).collect();
    assert!(failures.is_empty(), "{}", lines.join("\n"));
    assert_eq!(told.into_inner(), SEEDS);
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in [3, 4, 11] {
        let [one, two] = [0, 1].map(|_| check_one(seed, &[], None).expect("has an image"));
        assert_eq!(one, two);
        assert_ne!(one.trace, check_one(seed + 1, &[], None).expect("has an image").trace);
    }
}

/// Errors of a driver that were put in on purpose are found, and by the checkers that are meant to.
#[test]
fn errors_on_purpose_are_found() {
    for (sabotage, kinds) in [
        (Sabotage::LostLeader, &["single flight", "starved", "liveness"][..]),
        (Sabotage::IgnoredBan, &["ban"]),
        (Sabotage::DoubleOriginFetch, &["egress", "single flight"]),
        (Sabotage::DroppedTimer, &["timer", "starved", "liveness"]),
        (Sabotage::SkippedCheck, &["verified", "ban"]),
    ] {
        let found = (0..SEEDS).find_map(|seed| check_one(seed, &[], Some(sabotage)).expect("has an image").violation);
        let found = found.unwrap_or_else(|| panic!("{sabotage:?} is not found within {SEEDS} seeds"));
        assert!(kinds.contains(&found.kind), "{sabotage:?} is found as {found:?}");
    }
}

#[test]
fn a_failing_world_is_made_smaller_and_still_fails() {
    let failure = (0..SEEDS).find_map(|seed| check(seed, Some(Sabotage::DoubleOriginFetch)).expect("has an image"));
    let failure = failure.expect("is found");
    let small = drawn(failure.seed, &failure.changes);
    assert!(small.faults.is_empty() && small.cluster.nodes <= 2, "{}", failure.replay());
    let again = check_one(failure.seed, &failure.changes, Some(Sabotage::DoubleOriginFetch)).expect("has an image");
    assert_eq!(again.violation, Some(failure.violation));
}

/// Seeds that once found an error, with the changes that made their worlds small.
#[test]
fn what_was_found_once_stays_mended() {
    for line in include_str!("../../seeds/regressions.txt").lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let Some(seed) = words.next() else { continue };
        let seed = seed.parse().unwrap_or_else(|_| panic!("{line}"));
        let changes: Vec<Change> = words.map(|change| change.parse().unwrap_or_else(|_| panic!("{line}"))).collect();
        let report = check_one(seed, &changes, None).expect("has an image");
        assert_eq!(report.violation, None, "{line}");
    }
}

/// The fingerprint of one run, the same on every machine. It changes with every change of what policy does, of the driver's
/// model or of the world: then take over the new one and say in the commit what has changed.
#[test]
fn the_fingerprint_is_the_pinned_one() {
    let report = check_one(5, &[Change::Nodes(4), Change::Chunks(40), Change::Faults(0)], None).expect("has an image");
    assert_eq!(report.trace, PINNED);
}
