//! From `Prepare` of a container's snapshot to its mounts, for an image of fifty layers whose index is on the node, beside
//! containerd's own overlayfs for the same image already unpacked. Both are asked through containerd.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::command::run;
use hermes_tests::compress::Compression;
use hermes_tests::containerds::{Host, LINES, RunningContainerd};
use hermes_tests::cri;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::layout::{Layout, NewLayer};
use hermes_tests::node::Index;
use hermes_tests::sample::content;
use hermes_tests::snapshotter::{Client, Labels, labels, listing, mount};
use hermes_tests::soak;
use hermes_tests::tarball::{Entry, Tarball};
use serde_json::json;

/// Layers of the image: what overlayfs of containerd takes with paths of ordinary length.
const LAYERS: usize = 50;
/// Files of each layer.
const FILES: usize = 60;
/// Length of the files, in bytes: file `n` has `n * LEN_STEP_BYTES`, 12 KB on average.
const LEN_STEP_BYTES: u64 = 400;
/// Snapshots made one after the other, of which the median is printed. Each is the first of its image on the node,
/// because nothing stays mounted in between.
const ROUNDS: usize = 15;
/// How long containerd may take to collect garbage.
const DEADLINE: Duration = Duration::from_secs(60);

fn hermes() -> &'static str {
    env!("CARGO_BIN_EXE_hermes")
}

/// Each layer has files of its own, changes one of the layer below, and deletes another of it.
fn image(dir: &Path) -> Result<()> {
    let layers: Vec<NewLayer> = (0..LAYERS)
        .map(|layer| {
            let own = (0..FILES).map(|file| {
                let name = format!("srv/layer-{layer}/file-{file}");
                Entry::file(&name, content(&name, file as u64 * LEN_STEP_BYTES))
            });
            let changes = layer.checked_sub(1).into_iter().flat_map(|below| {
                let changed = format!("srv/layer-{below}/file-0");
                [Entry::file(&changed, changed.clone()), Entry::whiteout(&format!("srv/layer-{below}/file-1"))]
            });
            NewLayer { tar: Tarball::of(own.chain(changes)), compression: Compression::Gzip(1) }
        })
        .collect();
    Layout::create(dir)?.add("fifty", &layers, &json!({})).map(drop)
}

#[test]
fn a_snapshot_on_fifty_layers_is_prepared() -> Result<()> {
    let scratch = ScratchDir::new("fifty")?;
    let layout = scratch.path().join("layout");
    image(&layout)?;
    let registry = FaultyRegistry::start(&layout)?;
    let image = registry.image("fifty");
    let index = Index::build(Path::new(hermes()), &image, &scratch.path().join("index"))?;
    for line in soak::choose(&LINES[1..2], &LINES[..])? {
        prepares(line, &image, &index, &scratch.path().join(format!("state-{line}")))
            .with_context(|| format!("containerd {line}"))?;
    }
    Ok(())
}

fn prepares(line: &str, image: &str, index: &Index, state: &Path) -> Result<()> {
    let host = Host::new(line)?;
    fs::write(host.config(), host.default_config()?)?;
    let (programs, socket) = (host.containerd(), host.socket());
    let (programs, socket) = (programs.to_str().context("UTF-8")?, socket.to_str().context("UTF-8")?);
    let installed =
        host.hermes(hermes(), &["node", "install", "--no-start", "--containerd", programs, "--socket", socket])?;
    ensure!(installed.status.success(), "install: {}", String::from_utf8_lossy(&installed.stderr));
    let folder = index.folder.to_str().context("UTF-8")?;
    let arguments = ["--containerd-socket", socket, "--index", folder, "--trust", &index.key];
    let daemon = Daemon::start(Path::new(hermes()), state, &arguments)?;
    let containerd = host.start()?;
    cri::pull(&containerd.socket(), image)?;
    let status = daemon.status()?;
    ensure!(status.pulls.iter().any(|pull| pull.decision == "lazy"), "{:?}", status.pulls);
    run(containerd.ctr().args(["images", "pull", "--plain-http", "--snapshotter", "overlayfs", image]))?;

    let lazy = measure(&containerd, "hermes", &state.join("snapshots"), || {
        // Nothing of the last round is left.
        let images = daemon.status().ok()?.images;
        images.is_empty().then_some(())
    })?;
    let plain = host.root().join("var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots");
    let unpacked = measure(&containerd, "overlayfs", &plain, || Some(()))?;
    println!(
        "containerd {line}, {LAYERS} layers, {ROUNDS} rounds: Prepare to mounts {:.1} ms (slowest {:.1}), overlayfs \
         already unpacked {:.1} ms (slowest {:.1})",
        lazy.median_ms, lazy.slowest_ms, unpacked.median_ms, unpacked.slowest_ms
    );
    ensure!(lazy.files == unpacked.files, "the two trees differ");
    drop(containerd);
    daemon.stop().map(drop)
}

struct Measured {
    median_ms: f64,
    slowest_ms: f64,
    files: hermes_tests::snapshotter::Listing,
}

fn measure(
    containerd: &RunningContainerd<'_>,
    snapshotter: &str,
    root: &Path,
    mut is_clean: impl FnMut() -> Option<()>,
) -> Result<Measured> {
    let client = Client::through_containerd(&containerd.socket(), snapshotter)?;
    let all = client.list(&[])?;
    let top = all.iter().find(|info| all.iter().all(|other| other.parent != info.name));
    let top = top.context("no snapshot was made")?.name.clone();
    ensure!(all.len() == LAYERS, "{} snapshots", all.len());
    let mut times = Vec::new();
    for round in 0..ROUNDS {
        let key = format!("container-{round}");
        let started = Instant::now();
        client.prepare(&key, &top, root_label())?;
        times.push(started.elapsed().as_secs_f64() * 1000.0);
        client.remove(&key)?;
        collect_garbage(containerd)?;
        wait_for("the end of the tree", DEADLINE, &mut is_clean)?;
    }
    times.sort_by(f64::total_cmp);
    let scratch = ScratchDir::new("fifty-shown")?;
    let mounts = client.prepare("look", &top, root_label())?;
    let shown = mount(&mounts, root, &scratch.make("root")?)?;
    let files = listing(shown.path())?;
    drop(shown);
    client.remove("look")?;
    Ok(Measured { median_ms: times[times.len() / 2], slowest_ms: times[times.len() - 1], files })
}

/// Keeps containerd from collecting what nobody has a use for.
fn root_label() -> Labels {
    labels(&[("containerd.io/gc.root", "test")])
}

/// Has containerd remove now what it has forgotten: the end of a lease can be waited for until that is done.
fn collect_garbage(containerd: &RunningContainerd<'_>) -> Result<()> {
    run(containerd.ctr().args(["leases", "create", "--id", "round"]))?;
    run(containerd.ctr().args(["leases", "delete", "--sync", "round"])).map(drop)
}
