//! A complete image is handed to the kernel: containers that are prepared then read the store's files without the daemon,
//! those that run go on, and the lazy tree goes with its last container.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_snapshotter::status::{NodeStatus, Way};
use hermes_tests::command::run;
use hermes_tests::containerds::RunningContainerd;
use hermes_tests::cri::Cri;
use hermes_tests::guard::{MountGuard, wait_for};
use hermes_tests::runnable::LARGE;
use hermes_tests::sample::content;
use hermes_tests::stage::{Stage, cksum};
use rustix::process::Signal;

/// How long something may take that comes by itself.
const DEADLINE: Duration = Duration::from_secs(60);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// A container that sleeps until it is dropped.
struct Sleeper<'a> {
    containerd: &'a RunningContainerd<'a>,
    name: String,
}

impl<'a> Sleeper<'a> {
    fn start(containerd: &'a RunningContainerd<'a>, image: &str, name: &str) -> Result<Self> {
        let sleeper = Self { containerd, name: containerd.container_name(name) };
        let run = ["run", "--detach", "--snapshotter", "hermes", image, &sleeper.name, "/bin/sleep", "100000"];
        containerd.ctr_says(&run)?;
        Ok(sleeper)
    }

    /// The sum of the large file, as this container reads it now, not from memory.
    fn sum(&self) -> Result<String> {
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        let script = format!("cksum < /{}", LARGE.0);
        let exec = ["tasks", "exec", "--exec-id", "reader", &self.name, "/bin/sh", "-c", &script];
        Ok(self.containerd.ctr_says(&exec)?.trim().to_owned())
    }

    fn end(&self) -> Result<()> {
        self.containerd.ctr_says(&["tasks", "rm", "--force", &self.name])?;
        self.containerd.ctr_says(&["containers", "rm", &self.name]).map(drop)
    }
}

impl Drop for Sleeper<'_> {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// How the trees are shown, in the order of their places.
fn ways(status: &NodeStatus) -> Vec<Way> {
    let mut shown: Vec<(&str, Way)> = status.images.iter().map(|image| (image.dir.as_str(), image.way)).collect();
    shown.sort_unstable_by_key(|(dir, _)| *dir);
    shown.into_iter().map(|(_, way)| way).collect()
}

#[test]
fn containers_come_to_read_without_a_daemon() -> Result<()> {
    let stage = Stage::new(hermes(), "1.7")?;
    let mut kept = stage.kept(&["--complete", "full"])?;
    let paused = kept.run(&["complete", "--pause"])?;
    ensure!(paused.status.success(), "{paused:?}");
    let containerd = stage.host.start()?;
    let (image, expected) = (stage.registry.image("v1"), cksum(&content(LARGE.0, LARGE.1))?);
    Cri::connect(&containerd.socket())?.pull(&image)?;
    let old = Sleeper::start(&containerd, &image, "old")?;
    let first = kept.status()?;
    let [lazy] = ways(&first)[..] else { anyhow::bail!("{first:?}") };
    if first.ways.iter().any(|way| way.way == Way::ErofsFiles && !way.available) || lazy == Way::ErofsFiles {
        return Ok(()); // This kernel has no such way, and nothing to hand over to.
    }
    let resumed = kept.run(&["complete", "--resume"])?;
    ensure!(resumed.status.success(), "{resumed:?}");
    wait_for("a complete image", DEADLINE, || {
        kept.status().ok().filter(|status| status.images.iter().all(|image| image.percent_present() == 100.0))
    })
    .with_context(|| kept.log())?;

    // Who comes now gets the kernel's tree; who is there stays.
    let new = Sleeper::start(&containerd, &image, "new")?;
    ensure!(ways(&kept.status()?) == [lazy, Way::ErofsFiles], "{:?}", ways(&kept.status()?));
    ensure!(old.sum()? == expected && new.sum()? == expected, "wrong bytes");

    // The lazy tree goes with its last container.
    old.end()?;
    wait_for("the end of the lazy tree", DEADLINE, || {
        kept.status().ok().filter(|status| ways(status) == [Way::ErofsFiles])
    })
    .with_context(|| kept.log())?;
    let before = kept.signal_daemon(Signal::KILL)?;
    kept.wait_for_another(before)?;
    ensure!(ways(&kept.status()?) == [Way::ErofsFiles], "after a crash: {:?}", ways(&kept.status()?));
    ensure!(new.sum()? == expected, "wrong bytes after the end of the lazy tree and a crash");

    // Nobody of ours runs any more: what runs reads on, and what is mounted can be used again.
    let tree = PathBuf::from(&kept.status()?.images[0].dir);
    let daemon = kept.daemon()?.context("a daemon")?;
    kept.keeper().signal(Signal::KILL)?;
    kept.keeper().child().wait()?;
    rustix::process::kill_process(daemon, Signal::KILL)?;
    wait_for("the end of the daemon", DEADLINE, || kept.status().is_err().then_some(()))?;
    ensure!(new.sum()? == expected, "wrong bytes without a daemon");
    restarts_on(&tree, stage.scratch(), &expected)?;
    let refused = containerd.once(&image, "true");
    ensure!(refused.is_err(), "containerd prepares without its snapshotter");

    // The next daemon finds it as it is, and holds it.
    let daemon = stage.daemon(&[])?;
    ensure!(ways(&daemon.status()?) == [Way::ErofsFiles], "{:?}", daemon.status()?.images);
    // containerd pauses before it connects to its snapshotter again.
    let script = format!("cksum < /{}", LARGE.0);
    let sum = wait_for("a container", DEADLINE, || containerd.once(&image, &script).ok())?;
    ensure!(sum == expected, "wrong bytes with the next daemon: {sum}");
    drop((old, new));
    containerd.remove_all_images()?;
    wait_for("the end of all trees", DEADLINE, || (stage.trees().ok()? == 0).then_some(()))?;
    drop(containerd);
    daemon.stop().map(drop)
}

/// A new container's root over `tree`, as its runtime mounts it when it restarts one with the mounts it was told before.
fn restarts_on(tree: &Path, scratch: &Path, expected: &str) -> Result<()> {
    let [upper, work, root] = ["upper", "work", "root"].map(|name| scratch.join(format!("restart-{name}")));
    for folder in [&upper, &work, &root] {
        fs::create_dir_all(folder)?;
    }
    let options = format!("lowerdir={},upperdir={},workdir={}", tree.display(), upper.display(), work.display());
    run(Command::new("mount").args(["-t", "overlay", "overlay"]).arg(&root).args(["-o", &options]))?;
    let mounted = MountGuard::adopt(&root);
    let read = run(Command::new("chroot").arg(&root).args(["/bin/sh", "-c", &format!("cksum < /{}", LARGE.0)]))?;
    ensure!(String::from_utf8(read)?.trim() == expected, "wrong bytes in a container that restarts");
    drop(mounted);
    Ok(())
}
