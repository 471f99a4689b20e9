//! What befalls a fleet. Each scenario starts one of the given shape, has its nodes read, and reports one line.
//!
//! Times are parts of the bound: what the registry's link takes for everything that is read, once. So faults come while
//! nodes read, whatever the shape.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use rand::rngs::StdRng;
use rand::seq::index::sample;
use rand::{RngExt as _, SeedableRng as _};

use super::outcome::{Outcome, Start};
use super::rig::Rig;
use super::{Fleet, Shape};

/// How many lines of a node's log are shown when its reads have failed.
const LOG_LINES: usize = 20;

/// All nodes at once, none of which has anything.
///
/// # Errors
/// When the fleet does not come up.
pub fn all_cold(name: &str, rig: &Rig, shape: &Shape) -> Result<Outcome> {
    with_fault(name, rig, shape, &[], |_, _| Ok(()))
}

/// The same, each node on its own: it knows no other.
///
/// # Errors
/// When the fleet does not come up.
pub fn all_alone(name: &str, rig: &Rig, shape: &Shape) -> Result<Outcome> {
    all_cold(name, rig, &Shape { known: 0, ..shape.clone() })
}

/// The last node, after all others have read.
///
/// # Errors
/// When the fleet does not come up, or the first reads are not right.
pub fn one_cold(name: &str, rig: &Rig, shape: &Shape) -> Result<Outcome> {
    let fleet = Fleet::start(rig, shape)?;
    let all = everyone(shape);
    let Some((cold, warm)) = all.split_last() else { anyhow::bail!("a fleet without nodes") };
    fleet.mount(warm)?;
    let found = fleet.read(warm, &rig.read, || Ok(()))?;
    ensure!(found.iter().all(|node| node.failed.is_empty() && node.wrong.is_empty()), "{found:?}");
    fleet.mount(&[*cold])?;
    let start = Start::of(&fleet)?;
    let found = fleet.read(&[*cold], &rig.read, || Ok(()))?;
    Outcome::new(name, &fleet, &start, found, &[])
}

/// The last node, after all others have read, and those that all have started from are gone. It was never told of another
/// but by them.
///
/// # Errors
/// When the fleet does not come up, or the first reads are not right.
pub fn start_lost(name: &str, rig: &Rig, shape: &Shape) -> Result<Outcome> {
    let fleet = Fleet::start(rig, shape)?;
    let all = everyone(shape);
    let Some((cold, warm)) = all[shape.known..].split_last() else { anyhow::bail!("a fleet without nodes") };
    fleet.mount(warm)?;
    let found = fleet.read(warm, &rig.read, || Ok(()))?;
    ensure!(found.iter().all(|node| node.failed.is_empty() && node.wrong.is_empty()), "{found:?}");
    let start = Start::of(&fleet)?;
    fleet.lose_start()?;
    fleet.mount(&[*cold])?;
    let found = fleet.read(&[*cold], &rig.read, || Ok(()))?;
    for node in found.iter().filter(|node| !node.failed.is_empty()) {
        println!("the end of the log of node {}:\n{}", node.node, end_of_log(&fleet, node.node));
    }
    Outcome::new(name, &fleet, &start, found, &all[..shape.known])
}

/// Two nodes are killed at a moment that chance decides.
///
/// # Errors
/// When the fleet does not come up.
pub fn two_killed(name: &str, rig: &Rig, shape: &Shape, seed: u64) -> Result<Outcome> {
    let mut random = StdRng::seed_from_u64(seed);
    let nodes = sample(&mut random, shape.nodes(), 2).into_vec();
    let moment = random.random_range(0.1..0.7);
    println!("{name}: seed {seed}: nodes {nodes:?} are killed after {moment:.2} of the bound");
    killed(name, rig, shape, &nodes, moment)
}

/// These nodes are killed after this part of the bound.
///
/// # Errors
/// When the fleet does not come up.
pub fn killed(name: &str, rig: &Rig, shape: &Shape, nodes: &[usize], moment: f64) -> Result<Outcome> {
    with_fault(name, rig, shape, nodes, |fleet, bound| {
        thread::sleep(bound.mul_f64(moment));
        nodes.iter().try_for_each(|node| fleet.kill(*node))
    })
}

/// When the halves of [`parted`] part, and for how long, as parts of the bound.
pub const PARTED: (f64, f64) = (0.2, 0.5);

/// The first half of the nodes and the second do not reach each other for half of the bound.
///
/// # Errors
/// When the fleet does not come up.
pub fn parted(name: &str, rig: &Rig, shape: &Shape) -> Result<Outcome> {
    let group: Vec<usize> = (0..shape.nodes() / 2).collect();
    with_fault(name, rig, shape, &[], |fleet, bound| {
        thread::sleep(bound.mul_f64(PARTED.0));
        fleet.wires().part(&group)?;
        thread::sleep(bound.mul_f64(PARTED.1));
        fleet.wires().join(&group)
    })
}

/// One node stands still for `length`.
///
/// # Errors
/// When the fleet does not come up.
pub fn one_paused(name: &str, rig: &Rig, shape: &Shape, length: Duration) -> Result<Outcome> {
    with_fault(name, rig, shape, &[0], |fleet, bound| {
        thread::sleep(bound.mul_f64(0.2));
        fleet.pause(0)?;
        thread::sleep(length);
        fleet.resume(0)
    })
}

/// One node's link is out for half of the bound.
///
/// # Errors
/// When the fleet does not come up.
pub fn one_cut(name: &str, rig: &Rig, shape: &Shape) -> Result<Outcome> {
    with_fault(name, rig, shape, &[0], |fleet, bound| {
        thread::sleep(bound.mul_f64(0.2));
        fleet.cut(0)?;
        thread::sleep(bound.mul_f64(0.5));
        fleet.heal(0)
    })
}

/// The first node sends `factor` times slower than the others, from the beginning.
///
/// # Errors
/// When the fleet does not come up.
pub fn one_slow(name: &str, rig: &Rig, shape: &Shape, factor: u64) -> Result<Outcome> {
    with_fault(name, rig, shape, &[0], |fleet, _| fleet.wires().slow(0, factor))
}

/// The two last nodes go for good while the first fifth stands still for `age`, and then all others read at once: a fifth with
/// lists of members that are as old, in which those that went still own their parts.
///
/// # Errors
/// When the fleet does not come up.
pub fn stale_lists(name: &str, rig: &Rig, shape: &Shape, age: Duration) -> Result<Outcome> {
    let fleet = Fleet::start(rig, shape)?;
    let all = everyone(shape);
    let (there, gone) = all.split_at(all.len().saturating_sub(2));
    let stale = &there[..all.len().div_ceil(5).min(there.len())];
    fleet.mount(there)?;
    stale.iter().try_for_each(|node| fleet.pause(*node))?;
    gone.iter().try_for_each(|node| fleet.kill(*node))?;
    thread::sleep(age);
    let start = Start::of(&fleet)?;
    stale.iter().try_for_each(|node| fleet.resume(*node))?;
    let found = fleet.read(there, &rig.read, || Ok(()))?;
    Outcome::new(name, &fleet, &start, found, gone)
}

/// What the registry's link takes for everything that is read, once.
pub(super) fn bound(rig: &Rig, shape: &Shape) -> Duration {
    Duration::from_secs_f64(rig.read_compressed_bytes as f64 * 8.0 / shape.registry_rate as f64)
}

fn everyone(shape: &Shape) -> Vec<usize> {
    (0..shape.nodes()).collect()
}

/// All nodes at once, while `fault` befalls the nodes `befallen`. It is given the bound.
fn with_fault(
    name: &str,
    rig: &Rig,
    shape: &Shape,
    befallen: &[usize],
    fault: impl FnOnce(&Fleet<'_>, Duration) -> Result<()>,
) -> Result<Outcome> {
    let fleet = Fleet::start(rig, shape)?;
    let all = everyone(shape);
    fleet.mount(&all)?;
    let bound = bound(rig, shape);
    let start = Start::of(&fleet)?;
    let found = fleet.read(&all, &rig.read, || fault(&fleet, bound))?;
    for node in found.iter().filter(|node| !node.failed.is_empty()) {
        println!("the end of the log of node {}:\n{}", node.node, end_of_log(&fleet, node.node));
    }
    Outcome::new(name, &fleet, &start, found, befallen)
}

fn end_of_log(fleet: &Fleet<'_>, node: usize) -> String {
    let log = fleet.daemon(node).log();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
