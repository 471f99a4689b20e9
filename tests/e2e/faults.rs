//! A registry that goes wrong under a mounted image: a reader gets the right bytes, from another attempt or another
//! node, or `EIO` within the deadline; never wrong bytes, and never a hang. The log says what was wrong.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::daemon::{Daemon, HANG, Reading};
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::sample::{Sample, SampleIndex, TAG};
use rustix::io::Errno;

/// How long reads wait where the registry never gets well.
const SHORT_DEADLINE: Duration = Duration::from_millis(2500);
/// Longest time from the deadline to the reader's `EIO`, on a machine that is busy with other tests.
const SLACK: Duration = Duration::from_millis(2000);
/// How long reads wait where the registry gets well: more than the ten seconds after which a silent one is given up.
const LONG_DEADLINE: Duration = Duration::from_secs(40);
/// What is read.
const FILE: &str = "gzip/first";

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// An image, its index, its registry, and a node that has it mounted. Fields drop in this order.
struct Rig {
    daemon: Daemon,
    registry: FaultyRegistry,
    index: SampleIndex,
    sample: Sample,
    dir: PathBuf,
    scratch: ScratchDir,
}

impl Rig {
    fn new(way: &str, deadline: Duration) -> Result<Self> {
        let scratch = ScratchDir::new("faults")?;
        let sample = Sample::new(&scratch.path().join("layout"))?;
        let index = sample.build_index(hermes(), scratch.path())?;
        let registry = FaultyRegistry::start(sample.layout.dir())?;
        let deadline = deadline.as_millis().to_string();
        let state = scratch.path().join("state");
        let daemon = Daemon::start(hermes(), &state, &["--read-deadline-ms", &deadline, "--way", way])?;
        let dir = scratch.path().join("image");
        daemon.mount(&registry.image(TAG), &dir, &index, &[])?;
        Ok(Self { daemon, registry, index, sample, dir, scratch })
    }

    fn read(&self) -> Result<(std::io::Result<Vec<u8>>, Duration)> {
        Reading::start(&self.dir.join(FILE)).end()
    }

    /// The log names the image, the layer, the registry and what to do.
    fn assert_log_is_complete(&self, next_step: &str) {
        let layer = &self.sample.image.layers[0];
        let file = format!("/{FILE}");
        let (image, layer_name) = (self.registry.image(TAG), layer.diff_id.to_string());
        let wanted = [image, layer_name, self.registry.host(), next_step.to_owned(), file];
        let is_complete = |line: &str| line.contains("a read failed") && wanted.iter().all(|part| line.contains(part));
        // The line comes after the reader has its answer: finding the file takes a moment.
        let found = wait_for("the line about the failed read", HANG, || {
            self.daemon.log().lines().any(is_complete).then_some(())
        });
        let log = self.daemon.log();
        assert!(found.is_ok(), "no line has all of {wanted:?}: {log}");
        let ids = [layer.layer_id.to_string(), layer.diff_id.to_string()];
        let why = log.lines().filter(|line| line.contains("the registry") && !line.contains("a read failed"));
        let why = why.filter(|line| ids.iter().any(|id| line.contains(id))).count() > 0;
        assert!(why, "the log does not say what the registry answered: {log}");
    }
}

/// Runs `case` for each of `cases` in both ways that a daemon serves, all at once: they mostly wait.
fn for_each_way<C: Copy + Send + Sync + std::fmt::Debug>(cases: &[C], case: fn(C, &str) -> Result<()>) {
    let failures: Vec<String> = std::thread::scope(|scope| {
        let running: Vec<_> = cases
            .iter()
            .flat_map(|one| ["erofs-fuse", "fuse-tree"].map(|way| (one, way)))
            .map(|(one, way)| (one, way, scope.spawn(move || case(*one, way))))
            .collect();
        let ended = running.into_iter().filter_map(|(one, way, thread)| match thread.join() {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{one:?}, {way}: {error:#}")),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                Some(format!("{one:?}, {way}: {}", text.unwrap_or_else(|| "it panics".to_owned())))
            }
        });
        ended.collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_fault_that_passes_costs_another_attempt_and_no_byte() {
    let cases = [
        Fault::Status(500),
        Fault::Status(502),
        Fault::Throttle(1),
        Fault::LoseLogin,
        Fault::Status(416),
        Fault::CutAfter(1000),
        Fault::Shorten(1000),
        Fault::Change,
        Fault::Hang,
        Fault::HangAfter(1000),
    ];
    for half in cases.chunks(5) {
        for_each_way(half, |fault, way| {
            let rig = Rig::new(way, LONG_DEADLINE)?;
            rig.registry.once(fault);
            let (read, took) = rig.read()?;
            ensure!(read.context("the read fails")? == rig.sample.content(FILE), "wrong bytes");
            ensure!(took < LONG_DEADLINE, "it took {took:?}");
            ensure!(rig.registry.blob_requests() > 1, "the fault was never met");
            rig.sample.check(&rig.dir)
        });
    }
}

/// A fault that stays: until the deadline, because it might pass, or known to be for good.
#[derive(Debug, Clone, Copy)]
enum Ends {
    AtTheDeadline,
    AtOnce,
}

#[test]
fn a_fault_that_stays_is_an_io_error_in_time_and_the_log_says_what_to_do() {
    let cases = [
        (Fault::Status(500), Ends::AtTheDeadline, "check the network"),
        (Fault::Status(429), Ends::AtTheDeadline, "check the network"),
        (Fault::CutAfter(1000), Ends::AtTheDeadline, "check the network"),
        (Fault::Status(416), Ends::AtOnce, "build the index again"),
        (Fault::Change, Ends::AtOnce, "build the index again"),
        // Its head says already that it is another length than was asked for.
        (Fault::Shorten(1000), Ends::AtOnce, "build the index again"),
        (Fault::Status(401), Ends::AtOnce, "check the registry's credentials"),
        (Fault::Status(403), Ends::AtOnce, "check the registry's credentials"),
        (Fault::Status(404), Ends::AtOnce, "check that the registry still has the layer"),
    ];
    for part in cases.chunks(3) {
        for_each_way(part, |(fault, ends, next_step), way| {
            // Where it ends at once, the deadline is too far away to be taken for it.
            let deadline = match ends {
                Ends::AtTheDeadline => SHORT_DEADLINE,
                Ends::AtOnce => LONG_DEADLINE,
            };
            let rig = Rig::new(way, deadline)?;
            rig.registry.always(fault);
            let (read, took) = rig.read()?;
            let error = read.err().context("the read succeeds")?;
            ensure!(error.raw_os_error() == Some(Errno::IO.raw_os_error()), "{error}");
            match ends {
                Ends::AtTheDeadline => {
                    ensure!(took > deadline / 2 && took < deadline + SLACK, "it took {took:?}");
                }
                Ends::AtOnce => ensure!(took < Duration::from_secs(10), "it took {took:?}"),
            }
            rig.assert_log_is_complete(next_step);
            well_again(&rig, ends)
        });
    }
}

/// When the registry is well again, so are reads: at once where they were waited for, after another mount where the
/// registry had refused for good.
fn well_again(rig: &Rig, ends: Ends) -> Result<()> {
    rig.registry.always(Fault::Pass);
    if matches!(ends, Ends::AtOnce) {
        let output = rig.daemon.run(&["unmount", rig.dir.to_str().context("UTF-8")?])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        rig.daemon.mount(&rig.registry.image(TAG), &rig.dir, &rig.index, &[])?;
    }
    let mut last = Ok(());
    let well = wait_for("reads that are well again", HANG, || {
        last = rig.sample.check(&rig.dir);
        last.is_ok().then_some(())
    });
    well.and(last).context("after the fault")
}

#[test]
fn a_registry_that_hangs_is_an_io_error_at_the_deadline() {
    for_each_way(&[Fault::Hang, Fault::HangAfter(1000)], |fault, way| {
        let rig = Rig::new(way, SHORT_DEADLINE)?;
        rig.registry.always(fault);
        let (read, took) = rig.read()?;
        let error = read.err().context("the read succeeds")?;
        ensure!(error.raw_os_error() == Some(Errno::IO.raw_os_error()), "{error}");
        ensure!(took < SHORT_DEADLINE + SLACK, "it took {took:?}");
        let wanted = [rig.registry.image(TAG), rig.registry.host(), "no answer yet); check the network".to_owned()];
        let is_complete = |line: &str| wanted.iter().all(|part| line.contains(part));
        let found = wait_for("the line about the failed read", HANG, || {
            rig.daemon.log().lines().any(is_complete).then_some(())
        });
        ensure!(found.is_ok(), "{}", rig.daemon.log());
        Ok(())
    });
}

#[test]
fn another_node_gives_what_the_registry_does_not() {
    let cases = [Fault::Status(404), Fault::Status(401), Fault::Status(500), Fault::Change, Fault::Hang];
    for_each_way(&cases, |fault, way| {
        let rig = Rig::new(way, LONG_DEADLINE)?;
        rig.sample.check(&rig.dir)?;
        let peer = rig.daemon.status()?.listen.first().cloned().context("the node listens nowhere")?;
        let cold = Daemon::start(hermes(), &rig.scratch.path().join("cold"), &["--way", way])?;
        let dir = rig.scratch.path().join("cold-image");
        cold.mount(&rig.registry.image(TAG), &dir, &rig.index, &["--peer", &peer])?;
        // Resolving a reference needs the registry; reading does not.
        rig.registry.always(fault);
        rig.sample.check(&dir)?;
        let sources = cold.sources()?;
        ensure!(sources.registry_bytes == 0 && sources.peer_bytes > 0, "{sources:?}");
        Ok(())
    });
}

/// A read that waits can be seen, does not hold up an unmount, and ends with the daemon.
#[test]
fn a_waiting_read_is_visible_and_ends_with_the_daemon() {
    for_each_way(&[Fault::Hang], |fault, way| {
        let rig = Rig::new(way, LONG_DEADLINE)?;
        rig.registry.always(fault);
        let reading = Reading::start(&rig.dir.join(FILE));
        wait_for("a waiting read in the status", HANG, || {
            rig.daemon.status().ok().filter(|status| status.waiting.demand > 0)
        })?;
        let output = rig.daemon.run(&["status"])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(said.contains("waiting reads: ") && !said.contains("waiting reads: 0 demand"), "{said}");

        let started = Instant::now();
        let output = rig.daemon.run(&["unmount", rig.dir.to_str().context("UTF-8")?])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(7) && said.contains("is in use"), "{output:?}");
        ensure!(started.elapsed() < Duration::from_secs(5), "unmount took {:?}", started.elapsed());

        let Rig { daemon, registry, index: _index, sample: _sample, dir, scratch } = rig;
        let took = daemon.stop()?;
        ensure!(took < Duration::from_secs(8), "the daemon took {took:?} to end");
        let (read, took) = reading.end()?;
        ensure!(read.is_err() && took < LONG_DEADLINE, "the read ended with {read:?} after {took:?}");
        ensure!(hermes_tests::guard::mounts_below(&dir)?.is_empty(), "it is still mounted");
        drop((registry, scratch));
        Ok(())
    });
}
