//! The benchmark of starts, on an image of one small program: it measures what it is told to, and leaves nothing.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::command::run;
use hermes_tests::compress::Compression;
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::layout::{Layout, NewLayer};
use hermes_tests::process;
use hermes_tests::tarball::{Entry, Tarball};
use serde_json::{Value, json};

/// Answers everybody with 200.
const SERVER: &str = r#"
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>
int main(void) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(8080)};
    int one = 1, server = socket(AF_INET, SOCK_STREAM, 0);
    char asked[4096];
    signal(SIGPIPE, SIG_IGN);
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(server, (struct sockaddr *)&at, sizeof at) || listen(server, 16)) return 1;
    for (;;) {
        int client = accept(server, 0, 0);
        if (read(client, asked, sizeof asked) > 0 && write(client, "HTTP/1.0 200 OK\r\n\r\n", 19) < 0) return 1;
        close(client);
    }
}
"#;

/// A layout with an image of that program alone, linked statically.
fn image(dir: &Path) -> Result<Layout> {
    let (source, program) = (dir.join("server.c"), dir.join("server"));
    fs::write(&source, SERVER)?;
    run(Command::new("cc").args(["-static", "-o"]).arg(&program).arg(&source))?;
    let tar = Tarball::of([Entry::file("server", fs::read(&program)?).mode(0o755)]);
    let layout = Layout::create(&dir.join("layout"))?;
    let layer = NewLayer { tar, compression: Compression::Gzip(6) };
    layout.add("v1", &[layer], &json!({"Entrypoint": ["/server"], "ExposedPorts": {"8080/tcp": {}}}))?;
    Ok(layout)
}

/// Where SOCI keeps its state, whatever it is told.
const SOCI_STATE: &str = "/var/lib/soci-snapshotter-grpc";

/// The benchmark with one round, at one link, below `dir`.
fn benchmark(dir: &Path, layout: &Layout) -> Command {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hermes"));
    command.args(["bench", "start", "--rounds", "1", "--link", "1000"]);
    command.args(["--way", "containerd", "--way", "soci", "--way", "cold"]);
    command.arg("--image").arg(format!("oci:{}:v1", layout.dir().display()));
    command.arg("--tools").arg(tools).arg("--dir").arg(dir).stdin(Stdio::null());
    command
}

fn is_empty(dir: &Path) -> Result<bool> {
    Ok(fs::read_dir(dir)?.next().is_none())
}

#[test]
fn starts_are_measured_and_nothing_is_left() -> Result<()> {
    let scratch = ScratchDir::new("b")?;
    let (layout, dir, json) = (image(scratch.path())?, scratch.make("d")?, scratch.path().join("runs.json"));
    let had_soci = Path::new(SOCI_STATE).exists();
    run(benchmark(&dir, &layout).arg("--json").arg(&json))?;
    ensure!(Path::new(SOCI_STATE).exists() == had_soci, "SOCI's state is left");
    let all: Value = serde_json::from_slice(&fs::read(json)?)?;
    let samples = all["runs"]["samples"].as_array().context("no samples")?;
    let ways: Vec<&str> = samples.iter().filter_map(|sample| sample["way"].as_str()).collect();
    ensure!(ways == ["containerd", "unpacked", "unpacked-hot", "soci", "cold"], "{ways:?}");
    for sample in samples {
        let seconds = |name: &str| sample[name].as_f64().with_context(|| format!("no {name}"));
        ensure!(seconds("ready_s")? <= seconds("started_s")?, "{sample}");
        ensure!(seconds("started_s")? <= seconds("answer_s")?, "{sample}");
        let is_pulled = sample["registry_bytes"].as_u64().context("no bytes")? > 0;
        ensure!(is_pulled == matches!(sample["way"].as_str(), Some("containerd" | "soci" | "cold")), "{sample}");
    }
    ensure!(is_empty(&dir)?, "the folder of the run is left");
    Ok(())
}

#[test]
fn a_killed_benchmark_leaves_nothing() -> Result<()> {
    let scratch = ScratchDir::new("b")?;
    let (layout, dir) = (image(scratch.path())?, scratch.make("d")?);
    let mut child = benchmark(&dir, &layout).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let deadline = hermes_tests::daemon::HANG;
    let begun = wait_for("a containerd", deadline, || {
        let all = process::descendants(child.id());
        let is_containerd =
            |pid: &&u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|it| it == "containerd\n");
        all.iter().any(|pid| is_containerd(&pid)).then_some(all)
    });
    process::kill(&[child.id()]);
    child.wait()?;
    let all = begun?;
    wait_for("the end of all of its processes", deadline, || {
        all.iter().all(|pid| process::has_ended(*pid)).then_some(())
    })?;
    wait_for("the end of its folder", deadline, || is_empty(&dir).ok()?.then_some(()))
}
