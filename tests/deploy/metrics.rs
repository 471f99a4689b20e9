//! `docs/metrics.md` is what the tables say, and a controller serves what is in its own.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_metrics::rows;
use hermes_tests::guard::{ProcessGuard, ScratchDir, wait_for};
use hermes_tests::web;

/// How long a controller may take to read an empty folder, on a machine that is busy with other tests.
const DEADLINE: Duration = Duration::from_secs(60);

fn document() -> String {
    format!(
        "<!-- Generated from snapshotter/src/metrics/table.rs and controller/src/metrics/table.rs; a test writes it anew when \
         HERMES_UPDATE_DOCS is set. -->\n\n\
         # Metrics\n\n\
         In Prometheus' text format, at `/metrics`. Counters begin at zero when the process starts. No metric is labelled by \
         image, layer, chunk or peer, so the number of series is fixed. Alerts and a dashboard that use them are in \
         [`deploy/chart/monitoring/`](../deploy/chart/monitoring), what to do about each alert in [operations.md](operations.md#alerts).\n\n\
         ## A node\n\n\
         `hermes node --metrics-listen ADDR`.\n\n{}\n\
         ## The controller\n\n\
         `hermes controller --metrics-listen ADDR`. Of several replicas the one that leads counts; the others say that they \
         do not.\n\n{}",
        rows(hermes_snapshotter::metrics::METRICS),
        rows(hermes_controller::metrics::METRICS),
    )
}

#[test]
fn the_document_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    if std::env::var_os("HERMES_UPDATE_DOCS").is_some() {
        std::fs::write(&path, document()).expect("written");
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(written == document(), "docs/metrics.md is old; run this test with HERMES_UPDATE_DOCS=1");
}

#[test]
fn a_controller_serves_its_numbers_and_probes() -> Result<()> {
    let scratch = ScratchDir::new("metrics")?;
    let (policies, log) = (scratch.make("policies")?, scratch.path().join("log"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_hermes"));
    command.args(["-v", "controller", "--metrics-listen", "0"]).arg("--policies").arg(&policies);
    command.arg("--state").arg(scratch.path().join("state")).stdin(Stdio::null()).stdout(Stdio::null());
    let mut controller = ProcessGuard::start(command.stderr(File::create(&log)?))?;
    let said = || fs::read_to_string(&log).unwrap_or_default();
    let address = wait_for("the address", DEADLINE, || web::metrics_address(&said())).with_context(said)?;
    let get = |path: &str| web::get(&address, path);
    wait_for("readiness", DEADLINE, || get("/readyz").is_ok_and(|answer| answer.contains(" 200 ")).then_some(()))
        .with_context(said)?;
    ensure!(get("/healthz")?.contains(" 200 "));
    let text = get("/metrics")?;
    for metric in hermes_controller::metrics::METRICS {
        ensure!(text.contains(&format!("\n{}", metric.name)), "no {} in {text}", metric.name);
    }
    for line in ["hermes_controller_leader 1", "hermes_controller_images{phase=\"ready\"} 0"] {
        ensure!(text.lines().any(|known| known == line), "no {line} in {text}");
    }
    ensure!(controller.stop()?.success(), "{}", said());
    Ok(())
}
