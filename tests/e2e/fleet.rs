//! Fleets of nodes on links that have rates: right bytes whatever befalls them, and what it costs.
//!
//! `make test` has one small fleet; `make soak` runs twelve nodes through every scenario and prints a table. Ratios are
//! comparable between machines, times are not.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use hermes_tests::daemon::HANG;
use hermes_tests::fleet::outcome::Outcome;
use hermes_tests::fleet::rig::{Plan, Rig};
use hermes_tests::fleet::{Shape, scenarios};
use hermes_tests::guard::{ProcessGuard, ScratchDir, Sweeper, mounts_below, wait_for};
use hermes_tests::process::{has_ended, with_argument};
use hermes_tests::soak;
use rustix::process::Signal;

/// The image of the long tests, made once for all of them. It is swept when the tests end.
static WHOLE: LazyLock<Result<Rig>> = LazyLock::new(|| Rig::new(hermes(), Plan::WHOLE));
/// How long a node stands still.
const PAUSE: Duration = Duration::from_secs(10);
/// How old lists of members can be.
const STALE: Duration = Duration::from_secs(30);
/// How many times slower one node sends.
const SLOWER: u64 = 100;

/// A scenario, given its name.
type Scenario<'a> = (&'a str, &'a dyn Fn(&str) -> Result<Outcome>);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

#[test]
fn a_fleet_reads_the_right_bytes() -> Result<()> {
    let rig = Rig::new(hermes(), Plan::SMALL)?;
    let scratch = ScratchDir::new("decisions")?;
    // Another test kills this one.
    let _sweeper = Sweeper::watch(scratch.path())?;
    let record = |node: usize| scratch.path().join(format!("{node}.record")).to_string_lossy().into_owned();
    let arguments =
        |node| ["--read-deadline-ms", "30000", "--record-decisions", &record(node)].map(str::to_owned).to_vec();
    let shape = Shape { zones: vec![2, 2], arguments: (0..4).map(arguments).collect(), ..Shape::default() };
    let outcome = scenarios::all_cold("four nodes", &rig, &shape)?;
    println!("{}\n{outcome}", Outcome::heading());
    outcome.check()?;
    let delivered = outcome.delivered();
    ensure!(delivered.unique_bytes >= rig.read_compressed_bytes * 9 / 10, "{delivered:?}");
    ensure!(outcome.traffic().from_registry > delivered.unique_bytes, "{:?}", outcome.traffic());
    (0..4).try_for_each(|node| decided_again(&record(node)))
}

/// The policy in the simulator's hands decides as the daemon has that wrote the record, and says so when it does not.
fn decided_again(record: &str) -> Result<()> {
    let replay = |record: &str| Command::new(hermes()).args(["simulate", "replay", "--json", record]).output();
    let output = replay(record)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let replayed: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let asked = |kind: &str| replayed["requests"][kind].as_u64().unwrap_or(0);
    ensure!(asked("ask registry") + asked("ask peer") > 0 && asked("deliver") > 0, "{replayed}");
    ensure!(replayed["waits"]["count"].as_u64() > Some(0) && replayed["failed"] == 0, "{replayed}");
    let deliver = "\"Deliver\":{\"read\":";
    let text = std::fs::read_to_string(record)?;
    ensure!(text.contains(deliver), "no read was answered");
    std::fs::write(record, text.replacen(deliver, &format!("{deliver}9"), 1))?;
    let output = replay(record)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && said.contains("decides something else"), "{said}");
    Ok(())
}

#[test]
fn a_fleet_goes_on_when_what_it_started_from_is_gone() -> Result<()> {
    let rig = Rig::new(hermes(), Plan::SMALL)?;
    let shape = Shape { known: 1, ..Shape::default() };
    let outcome = scenarios::start_lost("started from nobody", &rig, &shape)?;
    println!("{}\n{outcome}", Outcome::heading());
    outcome.check()?;
    // It reads from the members that it had heard of, not from the registry.
    let delivered = outcome.delivered();
    ensure!(delivered.unique_bytes < rig.read_compressed_bytes / 4, "{delivered:?}");
    Ok(())
}

/// Another run of this program has a fleet, and is killed in the midst of it.
#[test]
fn a_fleet_whose_test_is_killed_leaves_nothing() -> Result<()> {
    let scratch = ScratchDir::new("killed")?;
    let mut test = Command::new(std::env::current_exe()?);
    test.args(["--exact", "fleet::a_fleet_reads_the_right_bytes"]).env("TMPDIR", scratch.path());
    let mut test = ProcessGuard::start(test.stdout(Stdio::null()))?;
    let daemons = || with_argument("hermes", scratch.path());
    let folder = scratch.path().to_str().context("UTF-8")?;
    // Daemons, not other commands: those have no mounts. With their trees, which are mounted last: a daemon that is killed while the
    // kernel opens its layer files for it waits for itself, and only the end of its connection ends it.
    let has_mounted = |pid: &u32| {
        let is_tree = |mount: &str| mount.contains(folder) && mount.contains(" - erofs ");
        std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).is_ok_and(|mounts| mounts.lines().any(is_tree))
    };
    let all = wait_for("four daemons with their mounts", HANG, || {
        let all: Vec<u32> = daemons().into_iter().filter(has_mounted).collect();
        (all.len() == Shape::default().nodes()).then_some(all)
    })?;
    test.signal(Signal::KILL)?;
    test.child().wait()?;
    // And of the commands that were asking them: those end a moment later, by themselves.
    let ended = || all.iter().all(|pid| has_ended(*pid)) && daemons().is_empty();
    wait_for("the end of all daemons and commands", HANG, || ended().then_some(()))?;
    let is_empty = || std::fs::read_dir(scratch.path()).is_ok_and(|mut left| left.next().is_none());
    wait_for("an empty folder", HANG, || is_empty().then_some(()))?;
    ensure!(mounts_below(scratch.path())?.is_empty());
    Ok(())
}

/// The image of the long tests and twelve nodes; nothing in `make test`.
fn twelve() -> Result<Option<(&'static Rig, Shape)>> {
    if soak::length()?.is_none() {
        return Ok(None);
    }
    match &*WHOLE {
        Ok(rig) => Ok(Some((rig, Shape { zones: vec![12], ..Shape::default() }))),
        Err(error) => bail!("{error:#}"),
    }
}

/// Runs them one by one, whatever comes of those before, and prints a line for each.
fn table(scenarios: &[Scenario<'_>]) -> Result<()> {
    println!("{}", Outcome::heading());
    let mut failures = Vec::new();
    for (name, scenario) in scenarios {
        let checked = scenario(name).and_then(|outcome| {
            println!("{outcome}");
            outcome.check()
        });
        failures.extend(checked.err().map(|error| format!("{name}: {error:#}")));
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

#[test]
fn what_twelve_nodes_cost() -> Result<()> {
    let Some((rig, shape)) = twelve()? else { return Ok(()) };
    let zones = Shape { zones: vec![4, 4, 4], ..shape.clone() };
    let few = |nodes| Shape { zones: vec![nodes], ..shape.clone() };
    let (one, two, three) = (few(1), few(2), few(3));
    table(&[
        ("one alone", &|name| scenarios::all_alone(name, rig, &one)),
        ("one", &|name| scenarios::all_cold(name, rig, &one)),
        ("two", &|name| scenarios::all_cold(name, rig, &two)),
        ("three", &|name| scenarios::all_cold(name, rig, &three)),
        ("all cold", &|name| scenarios::all_cold(name, rig, &shape)),
        ("all alone", &|name| scenarios::all_alone(name, rig, &shape)),
        ("one cold, the others warm", &|name| scenarios::one_cold(name, rig, &shape)),
        ("three zones, all cold", &|name| scenarios::all_cold(name, rig, &zones)),
    ])
}

#[test]
fn what_befalls_twelve_nodes_spoils_no_read() -> Result<()> {
    let Some((rig, shape)) = twelve()? else { return Ok(()) };
    let seed = rand::random();
    table(&[
        ("two killed", &|name| scenarios::two_killed(name, rig, &shape, seed)),
        ("halves parted", &|name| scenarios::parted(name, rig, &shape)),
        ("one paused", &|name| scenarios::one_paused(name, rig, &shape, PAUSE)),
        ("one cut off", &|name| scenarios::one_cut(name, rig, &shape)),
        ("a fifth has old lists", &|name| scenarios::stale_lists(name, rig, &shape, STALE)),
        ("one sends slowly", &|name| scenarios::one_slow(name, rig, &shape, SLOWER)),
    ])
}
