//! Images that a real containerd pulls and Hermes shows lazily: nothing of the layers is downloaded, containers run, read
//! what they need and go on over the end of the daemon; and images that cannot be shown so are pulled as ever.
//!
//! containerd of each line is set up by `hermes node install` and asked as a kubelet asks it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_snapshotter::status::{NodeStatus, PullStatus};
use hermes_tests::command::run;
use hermes_tests::containerds::{Host, LINES, RunningContainerd};
use hermes_tests::cri;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{ScratchDir, mounts_below, wait_for};
use hermes_tests::kept::Kept;
use hermes_tests::layout::Layout;
use hermes_tests::node::Index;
use hermes_tests::runnable::{self, LARGE};
use rustix::process::Signal;

/// How long containerd may take to collect garbage.
const DEADLINE: Duration = Duration::from_secs(60);
/// What deciding and mounting may read of the layers, in bytes: a byte to see that ranges are given.
const DECISION_BYTES_MAX: u64 = 16;

fn hermes() -> &'static str {
    env!("CARGO_BIN_EXE_hermes")
}

/// What is the same for every test: a host, images, their registry, the index of one of them.
struct Stage {
    host: Host,
    registry: FaultyRegistry,
    index: Index,
    scratch: ScratchDir,
}

impl Stage {
    fn new(line: &str) -> Result<Self> {
        let scratch = ScratchDir::new("lazy")?;
        let layout = runnable::images(&scratch.path().join("layout"))?;
        let registry = FaultyRegistry::start(layout.dir())?;
        let index = Index::build(Path::new(hermes()), &registry.image("v1"), &scratch.path().join("index"))?;
        let host = Host::new(line)?;
        fs::write(host.config(), host.default_config()?)?;
        let (containerd, socket) = (host.containerd(), host.socket());
        let containerd = containerd.to_str().context("UTF-8")?;
        let arguments = [
            "node",
            "install",
            "--no-start",
            "--containerd",
            containerd,
            "--socket",
            socket.to_str().context("UTF-8")?,
        ];
        let installed = host.hermes(hermes(), &arguments)?;
        ensure!(installed.status.success(), "install: {}", String::from_utf8_lossy(&installed.stderr));
        Ok(Self { host, registry, index, scratch })
    }

    fn state(&self) -> PathBuf {
        self.scratch.path().join("state")
    }

    /// The arguments of a daemon that takes the statements of `trusted`.
    fn arguments(&self, trusted: &str) -> Vec<String> {
        let path = |path: &Path| path.display().to_string();
        let (socket, folder) = (path(&self.host.socket()), path(&self.index.folder));
        ["--containerd-socket", &socket, "--index", &folder, "--trust", trusted].map(str::to_owned).to_vec()
    }

    fn daemon(&self, arguments: &[String]) -> Result<Daemon> {
        let arguments = arguments.iter().map(String::as_str).collect::<Vec<_>>();
        Daemon::start(Path::new(hermes()), &self.state(), &arguments)
    }

    fn trees(&self) -> Result<usize> {
        Ok(mounts_below(&self.state().join("trees"))?.len())
    }
}

type Containerd<'a> = RunningContainerd<'a>;

fn ctr(containerd: &Containerd<'_>, arguments: &[&str]) -> Result<String> {
    Ok(String::from_utf8(run(containerd.ctr().args(arguments))?)?)
}

fn pull(containerd: &Containerd<'_>, image: &str) -> Result<()> {
    cri::pull(&containerd.socket(), image)
}

fn once(containerd: &Containerd<'_>, image: &str, script: &str) -> Result<String> {
    let arguments = ["run", "--rm", "--snapshotter", "hermes", image, "once", "/bin/sh", "-c", script];
    Ok(ctr(containerd, &arguments)?.trim().to_owned())
}

/// Removes every name of every image, as a kubelet does, and waits until no snapshot is left.
fn remove_all(containerd: &Containerd<'_>) -> Result<()> {
    let names = ctr(containerd, &["images", "ls", "--quiet"])?;
    let names = names.lines().collect::<Vec<_>>();
    ctr(containerd, &[&["images", "rm", "--sync"], names.as_slice()].concat())?;
    wait_for("the end of all snapshots", DEADLINE, || {
        let listed = ctr(containerd, &["snapshots", "--snapshotter", "hermes", "ls"]).ok()?;
        (listed.lines().count() == 1).then_some(())
    })
}

/// The decision about the last image that was pulled.
fn decision(status: NodeStatus) -> Result<PullStatus> {
    status.pulls.into_iter().next_back().context("no image was pulled")
}

#[test]
fn an_indexed_image_runs_without_being_downloaded_and_nothing_is_left() -> Result<()> {
    LINES.iter().try_for_each(|line| runs_without_being_downloaded(line).with_context(|| format!("containerd {line}")))
}

fn runs_without_being_downloaded(line: &str) -> Result<()> {
    let stage = Stage::new(line)?;
    let daemon = stage.daemon(&stage.arguments(&stage.index.key))?;
    let containerd = stage.host.start()?;
    let image = stage.registry.image("v1");
    let layers = layer_bytes(&stage, "v1")?;
    let before = stage.registry.counters();
    pull(&containerd, &image)?;
    let decided = decision(daemon.status()?).with_context(|| daemon.log())?;
    ensure!(decided.decision == "lazy", "{decided:?}");
    let pulled = stage.registry.counters().blob_bytes - before.blob_bytes;
    // The image's configuration is a blob too.
    ensure!(pulled < layers / 10, "{pulled} of {layers} bytes were read to pull it");
    ensure!(daemon.sources()?.registry_wire_bytes <= DECISION_BYTES_MAX, "chunks were fetched before a container runs");

    let script = "cat /etc/a; cat /etc/b 2>/dev/null; cat /gone/c 2>/dev/null; echo new > /etc/b; cat /etc/b";
    let answer = once(&containerd, &image, script)?;
    ensure!(answer == "a2new", "the container read '{answer}'");
    let started = stage.registry.counters().blob_bytes - before.blob_bytes;
    ensure!(started < layers, "{started} of {layers} bytes were read though the large file was not");
    let sum = once(&containerd, &image, &format!("cksum < /{}", LARGE.0))?;
    ensure!(sum == cksum(&stage)?, "the large file came wrong: {sum}");
    println!("containerd {line}: layers {layers} B; read to pull {pulled} B, to run a shell {started} B");

    remove_all(&containerd)?;
    wait_for("the end of all trees", DEADLINE, || (stage.trees().ok()? == 0).then_some(()))?;
    let left = fs::read_dir(stage.state().join("trees"))?.count();
    ensure!(left == 0, "{left} folders are left");
    // It was only removed from containerd: what had come is there for the next time.
    pull(&containerd, &image)?;
    ensure!(once(&containerd, &image, "cat /etc/a")? == "a2");
    drop(containerd);
    daemon.stop().map(drop)
}

#[test]
fn images_that_cannot_be_shown_lazily_are_pulled_as_ever_and_say_why() -> Result<()> {
    let stage = Stage::new("1.7")?;
    let stranger = Index::build(Path::new(hermes()), &stage.registry.image("v1"), &stage.scratch.path().join("other"))?;
    for (tag, trusted, expected) in [("v2", &stage.index.key, "small"), ("v1", &stranger.key, "unsigned")] {
        let daemon = stage.daemon(&stage.arguments(trusted))?;
        let containerd = stage.host.start()?;
        let image = stage.registry.image(tag);
        pull(&containerd, &image)?;
        let decided = decision(daemon.status()?).with_context(|| daemon.log())?;
        ensure!(decided.decision == expected && decided.reason.is_some(), "{decided:?}");
        let expected = if tag == "v1" { "a2" } else { "other" };
        ensure!(once(&containerd, &image, "cat /etc/a")? == expected);
        ensure!(stage.trees()? == 0, "a tree is mounted for an image that was unpacked");
        remove_all(&containerd)?;
        drop(containerd);
        daemon.stop()?;
        fs::remove_dir_all(stage.state())?;
    }
    Ok(())
}

#[test]
fn a_container_reads_on_over_the_death_of_the_daemon() -> Result<()> {
    let stage = Stage::new("1.7")?;
    let arguments = stage.arguments(&stage.index.key);
    let kept = Kept::start(
        Path::new(hermes()),
        &stage.state(),
        &[],
        &arguments.iter().map(String::as_str).collect::<Vec<_>>(),
    )?;
    let containerd = stage.host.start()?;
    let image = stage.registry.image("v1");
    pull(&containerd, &image)?;
    let _container = Container::start(&containerd, &image)?;
    let (before, trees) = (kept.signal_daemon(Signal::KILL)?, stage.trees()?);
    // Nothing of this file was read yet: it waits for the next daemon, which asks the registry.
    let sum = ctr(
        &containerd,
        &["tasks", "exec", "--exec-id", "reader", Container::NAME, "/bin/sh", "-c", &format!("cksum < /{}", LARGE.0)],
    )?;
    ensure!(sum.trim() == cksum(&stage)?, "the container read something else: {sum}");
    kept.wait_for_another(before)?;
    ensure!((stage.trees()?, trees) == (1, 1), "one tree, before and after");
    Ok(())
}

/// A container that runs until it is dropped, while containerd still runs.
struct Container<'a>(&'a Containerd<'a>);

impl<'a> Container<'a> {
    const NAME: &'static str = "lazy-stays";

    fn start(containerd: &'a Containerd<'a>, image: &str) -> Result<Self> {
        let container = Self(containerd);
        ctr(containerd, &["run", "--detach", "--snapshotter", "hermes", image, Self::NAME, "/bin/sleep", "600"])?;
        Ok(container)
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = ctr(self.0, &["tasks", "rm", "--force", Self::NAME]);
        let _ = ctr(self.0, &["containers", "rm", Self::NAME]);
    }
}

/// Compressed bytes of an image's layers.
fn layer_bytes(stage: &Stage, tag: &str) -> Result<u64> {
    let layout = Layout::open(&stage.scratch.path().join("layout"))?;
    Ok(layout.image(tag)?.layers.iter().map(|layer| layer.blob_len_bytes).sum())
}

/// The sum of the large file, by the same program.
fn cksum(stage: &Stage) -> Result<String> {
    let path = stage.scratch.path().join("large");
    fs::write(&path, hermes_tests::sample::content(LARGE.0, LARGE.1))?;
    let printed = run(Command::new("sh").args(["-c", &format!("cksum < {}", path.display())]))?;
    Ok(String::from_utf8(printed)?.trim().to_owned())
}
