//! Random small worlds with faults, and making the ones that fail smaller.
//!
//! A seed draws the shape of the run itself: nodes, zones, speeds, image, workload, and up to four faults with their times. All
//! faults end, so that after the last one every read must come (safety under faults, then progress). What fails is made
//! smaller, one simplification at a time, as long as the same checker still finds something, and then printed as the one
//! line that replays it: the seed, and the changes that were made to what it draws.

use std::fmt;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hermes_policy::rng::Rng;
use thiserror::Error;

use crate::checkers::Violation;
use crate::queue::{MILLISECOND, Nanos, SECOND};
use crate::report::Report;
use crate::sabotage::Sabotage;
use crate::scenario::{
    ClusterConfig, ExpectConfig, FaultConfig, FaultKind, ImageConfig, Prefetch, RegistryConfig, Scenario, StartConfig,
    WorkloadConfig, WorkloadKind,
};
use crate::shape::{CHUNK_BYTES, ShapeError};
use crate::strategy::Strategy;
use crate::units::{Bytes, Rate, Share, Time};
use crate::world::World;

/// Runs in which one failing world is made smaller.
const SHRINKS_MAX: usize = 200;
/// Most faults of one world.
const FAULTS_MAX: u64 = 4;

/// A change to what a seed draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// So many nodes.
    Nodes(u32),
    /// A start of so many chunks.
    Chunks(u32),
    /// Only the faults whose bits are set.
    Faults(u32),
    /// One zone.
    OneZone,
    /// All start at once.
    AtOnce,
    /// The registry may send so many hundredths of what is needed once: of a world that once read too much, less than its cards ask for.
    Registry(u32),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nodes(count) => write!(f, "nodes={count}"),
            Self::Chunks(count) => write!(f, "chunks={count}"),
            Self::Faults(bits) => write!(f, "faults={bits}"),
            Self::OneZone => write!(f, "zones=1"),
            Self::AtOnce => write!(f, "workload=flash-crowd"),
            Self::Registry(percent) => write!(f, "registry={percent}"),
        }
    }
}

/// Text that is no change.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{0:?} is no change of a drawn world; write nodes=N, chunks=N, faults=BITS, zones=1, workload=flash-crowd or registry=PERCENT"
)]
pub struct ChangeError(String);

impl std::str::FromStr for Change {
    type Err = ChangeError;

    fn from_str(text: &str) -> Result<Self, ChangeError> {
        let error = || ChangeError(text.to_owned());
        let (name, value) = text.split_once('=').ok_or_else(error)?;
        let number = value.parse::<u32>();
        Ok(match (name, number) {
            ("nodes", Ok(count @ 1..)) => Self::Nodes(count),
            ("chunks", Ok(count @ 1..)) => Self::Chunks(count),
            ("faults", Ok(bits)) => Self::Faults(bits),
            ("zones", Ok(1)) => Self::OneZone,
            ("workload", _) if value == "flash-crowd" => Self::AtOnce,
            ("registry", Ok(percent @ 1..)) => Self::Registry(percent),
            _ => return Err(error()),
        })
    }
}

/// The world that a seed draws, with changes made to it.
pub fn drawn(seed: u64, changes: &[Change]) -> Scenario {
    let mut rng = Rng::new(seed ^ 0x0066_757a_7a65_6421);
    let nodes = 1 + rng.below(14) as u32;
    let nic = [100, 1_000, 10_000][rng.below(3) as usize] * 125_000;
    let cluster = ClusterConfig {
        nodes,
        zones: 1 + (rng.below(6) as u32).saturating_sub(3).min(nodes - 1),
        strategy: if rng.one_in(24) { Strategy::RegistryOnly } else { Strategy::Hermes },
        nic: Rate(nic),
        upload_limit: rng.one_in(4).then_some(Rate(nic / 4)),
        zone_link: Rate(nic * 2),
        latency: Time(20_000 + rng.below(300_000)),
        zone_latency: Time(300_000 + rng.below(2_000_000)),
        partners: rng.below(9) as u32,
        ..ClusterConfig::default()
    };
    let registry = RegistryConfig {
        bandwidth: Rate([200, 1_000, 10_000][rng.below(3) as usize] * 125_000),
        latency: Time(2 * MILLISECOND + rng.below(60 * MILLISECOND)),
        requests_per_second: rng.one_in(5).then(|| 10 + rng.below(100) as u32),
        retry_after: Time(SECOND + rng.below(2 * SECOND)),
    };
    let start_chunks = 8 + rng.below(200) as u32;
    let image = ImageConfig {
        size: Bytes(u64::from(start_chunks) * CHUNK_BYTES * (1 + rng.below(4)) + (2 << 20)),
        layers: 1 + rng.below(4) as u16,
        start_chunks,
        ..ImageConfig::default()
    };
    let start = StartConfig {
        prefetch: [Prefetch::None, Prefetch::Profile, Prefetch::Profile, Prefetch::All][rng.below(4) as usize],
        parallel: 1 + rng.below(8) as u32,
        work: Time(if rng.one_in(2) { rng.below(2 * SECOND) } else { 0 }),
        ..StartConfig::default()
    };
    let kinds = [WorkloadKind::FlashCrowd, WorkloadKind::FlashCrowd, WorkloadKind::Staggered, WorkloadKind::Autoscaler];
    let workload = WorkloadConfig {
        kind: kinds[rng.below(4) as usize],
        spread: Time(if rng.one_in(2) { rng.below(SECOND) } else { 0 }),
        per_minute: 60 + rng.below(600) as u32,
        warm: (rng.below(u64::from(nodes)) as u32).min(2),
        ..WorkloadConfig::default()
    };
    let faults = (0..rng.below(FAULTS_MAX + 1)).map(|_| fault(&mut rng)).collect();
    let name = format!("drawn from seed {seed}");
    let mut scenario =
        Scenario { name, cluster, registry, image, start, workload, faults, expect: ExpectConfig::default() };
    changes.iter().for_each(|change| apply(&mut scenario, *change));
    scenario.expect = expected(&scenario);
    for change in changes {
        if let Change::Registry(percent) = *change {
            scenario.expect.registry = Share(u64::from(percent) * 100);
        }
    }
    scenario
}

/// A fault that ends.
fn fault(rng: &mut Rng) -> FaultConfig {
    let kind = FaultKind::ALL[rng.below(FaultKind::ALL.len() as u64) as usize];
    let lasts: Nanos = 100 * MILLISECOND + rng.below(8 * SECOND);
    FaultConfig {
        at: Time(rng.below(3 * SECOND)),
        kind,
        lasts: Some(Time(lasts)),
        share: Share(500 + rng.below(3_500)),
        factor: if kind == FaultKind::Slow { 2 + rng.below(30) as u32 } else { 100 + rng.below(400) as u32 },
        retry_after: Some(Time(SECOND + rng.below(3 * SECOND))),
    }
}

fn apply(scenario: &mut Scenario, change: Change) {
    match change {
        Change::Nodes(count) => {
            scenario.cluster.nodes = count;
            scenario.workload.warm = scenario.workload.warm.min(count - 1);
        }
        Change::Chunks(count) => scenario.image.start_chunks = count,
        Change::Faults(bits) => {
            let mut no = 0;
            scenario.faults.retain(|_| {
                no += 1;
                bits >> (no - 1) & 1 == 1
            });
        }
        Change::OneZone => scenario.cluster.zones = 1,
        Change::AtOnce => (scenario.workload.kind, scenario.workload.warm) = (WorkloadKind::FlashCrowd, 0),
        // Of what must come of it, which is said last.
        Change::Registry(_) => {}
    }
}

/// What must come of a drawn world. The registry is bounded where nothing happens that makes nodes read it for themselves.
fn expected(scenario: &Scenario) -> ExpectConfig {
    let calm = scenario.faults.is_empty() && scenario.registry.requests_per_second.is_none();
    let swarm = scenario.cluster.strategy == Strategy::Hermes;
    let nodes = u64::from(scenario.cluster.nodes);
    // A node reads all for itself at the very worst; readahead and whole images fetch more than starts read: how much of an
    // image a small start is, chunks being 32 KiB at least, has no bound.
    let start_bytes = u64::from(scenario.image.start_chunks.max(1)) * 32_768;
    let extra = match scenario.start.prefetch {
        Prefetch::All => 6.max(1 + scenario.image.size.0 / start_bytes),
        Prefetch::None => 6,
        Prefetch::Profile => 1,
    };
    let registry = match (calm, swarm) {
        (true, true) => 16_000 * extra.max(readings(scenario)),
        _ => (nodes + 3) * 30_000 * extra,
    };
    let demand_wait = if calm { 15 * SECOND } else { 60 * SECOND };
    ExpectConfig {
        registry: Share(registry),
        demand_wait: Time(demand_wait),
        failures: false,
        ready_within: Time(180 * SECOND),
    }
}

/// How often the same may be read where nothing happens. What cards are too slow for is read again rather than waited for: a reader does
/// without a holder that leaves it waiting for as long as ranks wait, which is a quarter of a second, and up to a second where it
/// sends all the while. See `docs/decisions/0021-slow-cards.md`.
fn readings(scenario: &Scenario) -> u64 {
    let ClusterConfig { nic, upload_limit, .. } = &scenario.cluster;
    let rate = upload_limit.map_or(nic.0, |limit| limit.0.min(nic.0)).max(1);
    let took = u64::from(scenario.image.start_chunks) * CHUNK_BYTES * SECOND / rate;
    match took {
        _ if took <= 250 * MILLISECOND => 1,
        _ if took <= SECOND => 2,
        _ => 3,
    }
}

/// A world in which something did not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The seed that draws it.
    pub seed: u64,
    /// How it was made smaller.
    pub changes: Vec<Change>,
    /// What did not hold.
    pub violation: Violation,
}

impl Failure {
    /// The command that replays it.
    pub fn replay(&self) -> String {
        let changes: String = self.changes.iter().map(|change| format!(" --set {change}")).collect();
        format!("hermes simulate check --seed {}{changes}", self.seed)
    }
}

impl fmt::Display for Failure {
    /// One line for a shell: the command that replays it, and what it finds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}  # {}: {}", self.replay(), self.violation.kind, self.violation.what)
    }
}

/// Runs the world of one seed.
///
/// # Errors
/// When the changes leave no image.
pub fn check_one(seed: u64, changes: &[Change], sabotage: Option<Sabotage>) -> Result<Report, ShapeError> {
    let scenario = Arc::new(drawn(seed, changes));
    let shape = crate::synthetic_shape(&scenario, seed)?;
    Ok(World::new(scenario, shape, seed, sabotage).run(|_| ()))
}

/// Runs the world of one seed, and makes it smaller when something does not hold.
///
/// # Errors
/// When the drawn world has no image, which would be an error here.
pub fn check(seed: u64, sabotage: Option<Sabotage>) -> Result<Option<Failure>, ShapeError> {
    let report = check_one(seed, &[], sabotage)?;
    let Some(violation) = report.violation else { return Ok(None) };
    Ok(Some(shrink(Failure { seed, changes: Vec::new(), violation }, sabotage)))
}

/// Runs the worlds of seeds on `threads` threads; each world is one thread's alone, so that it does not matter which. Ends
/// with the first that fails unless `keep_going`, tells `done` of each, and gives the failures in the order of their seeds:
/// no world before the first of them has been left out.
///
/// # Errors
/// See [`check`].
pub fn check_all(
    seeds: Range<u64>,
    threads: usize,
    keep_going: bool,
    done: impl Fn(Option<&Failure>) + Sync,
) -> Result<Vec<Failure>, ShapeError> {
    let (next, stop) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    let work = || -> Result<Vec<Failure>, ShapeError> {
        let mut failures = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if !seeds.contains(&seed) {
                break;
            }
            let failure = check(seed, None)?;
            done(failure.as_ref());
            stop.fetch_or(failure.is_some() && !keep_going, Ordering::Relaxed);
            failures.extend(failure);
        }
        Ok(failures)
    };
    let mut failures = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let found = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
        found.collect::<Result<Vec<_>, _>>()
    })?
    .concat();
    failures.sort_unstable_by_key(|failure| failure.seed);
    Ok(failures)
}

/// Makes a failing world smaller as long as the same checker still finds something.
fn shrink(mut failure: Failure, sabotage: Option<Sabotage>) -> Failure {
    let mut runs = 0;
    let mut progress = true;
    while std::mem::take(&mut progress) && runs < SHRINKS_MAX {
        for change in simpler(&drawn(failure.seed, &failure.changes), &failure.changes) {
            let mut changes: Vec<Change> = failure.changes.clone();
            changes.retain(|other| std::mem::discriminant(other) != std::mem::discriminant(&change));
            changes.push(change);
            runs += 1;
            let Ok(report) = check_one(failure.seed, &changes, sabotage) else { continue };
            if let Some(violation) = report.violation.filter(|found| found.kind == failure.violation.kind) {
                failure = Failure { seed: failure.seed, changes, violation };
                progress = true;
                break;
            }
            if runs >= SHRINKS_MAX {
                break;
            }
        }
    }
    failure
}

/// Simpler worlds, the simplest first.
fn simpler(scenario: &Scenario, changes: &[Change]) -> Vec<Change> {
    let mut simpler = Vec::new();
    let bits = changes.iter().find_map(|change| if let Change::Faults(bits) = change { Some(*bits) } else { None });
    let bits = bits.unwrap_or((1 << scenario.faults.len()) - 1);
    if bits != 0 {
        simpler.push(Change::Faults(0));
        let single = (0..32).filter(|bit| bits >> bit & 1 == 1).map(|bit| Change::Faults(bits & !(1 << bit)));
        simpler.extend(single.filter(|change| *change != Change::Faults(0)));
    }
    let (nodes, chunks) = (scenario.cluster.nodes, scenario.image.start_chunks);
    simpler.extend([nodes / 2, nodes - 1].into_iter().filter(|count| *count > 0).map(Change::Nodes));
    if scenario.cluster.zones > 1 {
        simpler.push(Change::OneZone);
    }
    if scenario.workload.kind != WorkloadKind::FlashCrowd {
        simpler.push(Change::AtOnce);
    }
    simpler.extend([chunks / 2, chunks * 3 / 4].into_iter().filter(|count| *count > 0).map(Change::Chunks));
    simpler
}

#[cfg(test)]
mod tests;
