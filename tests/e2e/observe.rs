//! What operators see of a daemon: its numbers, its probes, the reads that wait, and its log, changed while it runs.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_snapshotter::status::WaitingRead;
use hermes_tests::daemon::{Daemon, HANG, Reading};
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::sample::{Sample, TAG};
use hermes_tests::web::{get, metric, metrics_address};

/// What is read.
const FILE: &str = "gzip/first";

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

#[test]
fn a_node_shows_what_it_does() -> Result<()> {
    let scratch = ScratchDir::new("observe")?;
    let sample = Sample::new(&scratch.path().join("layout"))?;
    let index = sample.build_index(hermes(), scratch.path())?;
    let registry = FaultyRegistry::start(sample.layout.dir())?;
    let state = scratch.path().join("state");
    let arguments = ["--way", "fuse-tree", "--metrics-listen", "0", "--read-deadline-ms", "30000"];
    let daemon = Daemon::start(hermes(), &state, &arguments)?;
    let address = metrics_address(&daemon.log()).context("the log names no address for metrics")?;
    ensure!(get(&address, "/healthz")?.starts_with("HTTP/1.1 200"), "healthy");
    ensure!(get(&address, "/readyz")?.starts_with("HTTP/1.1 200"), "ready");
    let dir = scratch.path().join("image");
    daemon.mount(&registry.image(TAG), &dir, &index, &[])?;

    // A read that waits is shown with its file and with who is asked.
    registry.always(Fault::Hang);
    let reading = Reading::start(&dir.join(FILE));
    let waiting = wait_for("the waiting read", Duration::from_secs(20), || {
        let output = daemon.run(&["status", "--waiting", "--json"]).ok()?;
        let reads: Vec<WaitingRead> = serde_json::from_slice(&output.stdout).ok()?;
        reads.into_iter().find(|read| read.demand && !read.asking.is_empty())
    })?;
    ensure!(waiting.file.as_deref() == Some(Path::new("/gzip/first")), "{waiting:?}");
    ensure!(waiting.image == registry.image(TAG) && waiting.missing_bytes > 0, "{waiting:?}");
    ensure!(waiting.asking.iter().any(|who| who.contains(&registry.host())), "{waiting:?}");
    let metrics = get(&address, "/metrics")?;
    ensure!(metric(&metrics, "hermes_reads_waiting{class=\"demand\"}") >= Some(1.0), "{metrics}");

    registry.always(Fault::Pass);
    let (read, _) = reading.end()?;
    ensure!(read.context("the read fails")? == sample.content(FILE), "wrong bytes");
    let metrics = get(&address, "/metrics")?;
    for (series, least) in [
        ("hermes_chunk_bytes_total{source=\"registry\"}", 1_500_000.0),
        ("hermes_demand_wait_seconds_count{source=\"registry\"}", 1.0),
        ("hermes_fuse_reads_total{result=\"miss\"}", 1.0),
        ("hermes_registry_requests_total", 3.0),
        ("hermes_images_mounted{way=\"fuse-tree\"}", 1.0),
        ("hermes_mounts_total{way=\"fuse-tree\"}", 1.0),
        ("hermes_store_bytes", 1_500_000.0),
        ("hermes_starts_total", 1.0),
    ] {
        ensure!(metric(&metrics, series) >= Some(least), "{series} is below {least}:\n{metrics}");
    }

    // The log says more when it is told to, and what makes no sense is refused.
    ensure!(!daemon.log().contains("DEBUG"), "it says more than it was told to");
    let refused = daemon.run(&["log-level", "hermes=shout"])?;
    ensure!(refused.status.code() == Some(2), "{refused:?}");
    ensure!(daemon.run(&["log-level", "trace"])?.status.success(), "the level is changed");
    std::fs::read(dir.join("zstd/first"))?;
    wait_for("a line of the new level", HANG, || {
        let log = daemon.log();
        (log.contains("DEBUG") || log.contains("TRACE")).then_some(())
    })?;
    daemon.stop()?;
    Ok(())
}
