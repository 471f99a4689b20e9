//! The daemon's end as its supervisor sees it: reads wait for the next daemon and get right bytes; when none comes they
//! end with an error, and nothing of that stays; what cannot go on is refused or cleared away.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::compress::Compression;
use hermes_tests::daemon::Reading;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{ScratchDir, mounts_below, wait_for};
use hermes_tests::kept::Kept;
use hermes_tests::layout::NewLayer;
use hermes_tests::node::Index;
use hermes_tests::sample::{Sample, SampleIndex, TAG, content};
use hermes_tests::tarball::{Entry, Tarball};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::process::Signal;
use serde_json::json;

/// Longest time that anything here is waited for.
const DEADLINE: Duration = Duration::from_secs(30);
/// The keeper's deadline where a test waits for it, in milliseconds.
const SHORT_DEADLINE_MS: &str = "1500";
/// A file that is read while there is no daemon, and one that was read before.
const UNREAD: &str = "gzip/first";
const READ: &str = "zstd/first";
/// A daemon that never answers.
const SILENT: &str = "exec sleep 600";

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// An image, its registry, and a kept node that has it mounted. Fields drop in this order.
struct Rig {
    kept: Kept,
    registry: FaultyRegistry,
    index: SampleIndex,
    sample: Sample,
    dir: PathBuf,
    state: PathBuf,
    scratch: ScratchDir,
}

impl Rig {
    fn new(way: &str, keeper: &[&str]) -> Result<Self> {
        let scratch = ScratchDir::new("keeper")?;
        let sample = Sample::new(&scratch.path().join("layout"))?;
        let index = sample.build_index(hermes(), scratch.path())?;
        let registry = FaultyRegistry::start(sample.layout.dir())?;
        let state = scratch.path().join("state");
        let kept = Kept::start(hermes(), &state, keeper, &["--way", way])?;
        let dir = scratch.path().join("image");
        kept.mount(&registry.image(TAG), &dir, &index)?;
        sample.check_file(&dir, READ)?;
        Ok(Self { kept, registry, index, sample, dir, state, scratch })
    }

    fn reading(&self, name: &str) -> Reading {
        Reading::start(&self.dir.join(name))
    }

    /// The daemon that was killed has ended, and the next one is a script.
    fn kill_and_wait(&self) -> Result<()> {
        let before = self.kept.signal_daemon(Signal::KILL)?;
        wait_for("the next process", DEADLINE, || self.kept.daemon().ok().flatten().filter(|pid| *pid != before))?;
        Ok(())
    }
}

/// The kernel's folder of FUSE connections, which a bare machine does not show by itself.
fn connections() -> Result<&'static Path> {
    let folder = Path::new("/sys/fs/fuse/connections");
    match rustix::mount::mount("fusectl", folder, "fusectl", MountFlags::empty(), None) {
        Ok(()) | Err(Errno::BUSY) => Ok(folder),
        Err(error) => Err(error).context("show the FUSE connections"),
    }
}

/// A read that begins while there is no daemon waits, also one whose bytes are here, and gets right bytes.
fn reads_wait(way: &str) -> Result<()> {
    let rig = Rig::new(way, &[])?;
    let go = rig.scratch.path().join("go");
    rig.kept.use_script(&format!("until [ -e '{}' ]; do sleep 0.02; done\nexec \"$HERMES\" \"$@\"", go.display()))?;
    rig.kill_and_wait()?;
    let reading = [UNREAD, "plain/second", "zstd/small"].map(|name| (name, rig.reading(name)));
    // They wait in the kernel: nobody has read their requests.
    let connections = connections()?;
    wait_for("a read that waits", DEADLINE, || {
        let waiting = fs::read_dir(connections).ok()?.flatten().filter_map(|connection| {
            fs::read_to_string(connection.path().join("waiting")).ok()?.trim().parse::<u64>().ok()
        });
        (waiting.sum::<u64>() > 0).then_some(())
    })?;
    fs::write(&go, "")?;
    for (name, reading) in reading {
        let (bytes, waited) = reading.end()?;
        ensure!(bytes? == rig.sample.content(name), "{name}: wrong bytes after {waited:?}\n{}", rig.kept.log());
    }
    rig.sample.check(&rig.dir)?;
    ensure!(rig.kept.stop()?.success());
    ensure!(mounts_below(rig.scratch.path())?.is_empty(), "a mount is left");
    Ok(())
}

#[test]
fn reads_wait_for_the_next_daemon_under_erofs() -> Result<()> {
    reads_wait("erofs-fuse")
}

#[test]
fn reads_wait_for_the_next_daemon_under_fuse() -> Result<()> {
    reads_wait("fuse-tree")
}

/// What the dead daemon had read and not answered is answered by the next one.
fn unanswered_reads_are_answered(way: &str) -> Result<()> {
    let rig = Rig::new(way, &[])?;
    rig.registry.always(hermes_tests::faulty::Fault::Hang);
    let reading = rig.reading(UNREAD);
    wait_for("a read that waits for the registry", DEADLINE, || {
        rig.kept.status().ok().filter(|status| status.waiting.demand > 0)
    })?;
    let before = rig.kept.signal_daemon(Signal::KILL)?;
    rig.registry.always(hermes_tests::faulty::Fault::Pass);
    let restarted = rig.kept.wait_for_another(before)?;
    let (bytes, waited) = reading.end()?;
    ensure!(bytes? == rig.sample.content(UNREAD), "wrong bytes\n{}", rig.kept.log());
    eprintln!("{way}: a read that was under way took {waited:?} in all, the restart {restarted:?}");
    rig.sample.check(&rig.dir)
}

#[test]
fn unanswered_reads_are_answered_under_erofs() -> Result<()> {
    unanswered_reads_are_answered("erofs-fuse")
}

#[test]
fn unanswered_reads_are_answered_under_fuse() -> Result<()> {
    unanswered_reads_are_answered("fuse-tree")
}

/// Past the deadline readers get an error; the next daemon clears the mount away; the image can be mounted there again,
/// and no failure is remembered by anything.
fn deadline(way: &str) -> Result<()> {
    let rig = Rig::new(way, &["--deadline-ms", SHORT_DEADLINE_MS])?;
    rig.kept.use_script(SILENT)?;
    rig.kill_and_wait()?;
    let (bytes, waited) = rig.reading(UNREAD).end()?;
    ensure!(bytes.is_err(), "a read without a daemon gave bytes");
    eprintln!("{way}: a read without a daemon ended after {waited:?}");
    hermes_snapshotter::keeper::set_program(&rig.state, None)?;
    // The silent daemon was killed at the deadline; perhaps another one has followed.
    rig.kept.signal_daemon(Signal::KILL)?;
    wait_for("the next daemon", DEADLINE, || rig.kept.status().ok())?;
    ensure!(!mounts_below(&rig.dir)?.contains(&rig.dir), "the dead mount is left");
    rig.kept.mount(&rig.registry.image(TAG), &rig.dir, &rig.index)?;
    rig.sample.check(&rig.dir)?;
    ensure!(rig.kept.stop()?.success());
    Ok(())
}

#[test]
fn the_deadline_ends_connections_under_erofs() -> Result<()> {
    deadline("erofs-fuse")
}

#[test]
fn the_deadline_ends_connections_under_fuse() -> Result<()> {
    deadline("fuse-tree")
}

/// A tree that the store has lost meanwhile is cleared away with its layers; one that shares layers with it goes on, and
/// the image can be mounted there again.
#[test]
fn a_tree_that_cannot_go_on_takes_its_own_layers_with_it() -> Result<()> {
    let rig = Rig::new("fuse-tree", &[])?;
    let own = Tarball::of([Entry::file("own/file", content("own/file", 400_000))]);
    let mut layers = rig.sample.image.layers.clone();
    layers.push(rig.sample.layout.put_layer(&NewLayer { tar: own, compression: Compression::Gzip(6) })?);
    rig.sample.layout.add_stored("more", &layers, &json!({}))?;
    let (image, folder) = (rig.registry.image("more"), rig.scratch.path().join("more-index"));
    let index = Index::build(hermes(), &image, &folder)?;
    let index = SampleIndex { folder: index.folder, key: index.key };
    let dir = rig.scratch.path().join("more");
    rig.kept.mount(&image, &dir, &index)?;
    fs::read(dir.join("own/file"))?;

    let shown = rig.kept.status()?.images;
    let of_dir = |dir: &Path| shown.iter().find(|image| Path::new(&image.dir) == dir).context("it is shown");
    let (lost, other) = (&of_dir(&dir)?.tree_path, &of_dir(&rig.dir)?.tree_path);
    ensure!(lost != other, "both images have one tree");
    fs::remove_file(lost)?;
    let before = rig.kept.signal_daemon(Signal::KILL)?;
    rig.kept.wait_for_another(before)?;
    let images = rig.kept.status()?.images;
    ensure!(images.len() == 1 && Path::new(&images[0].dir) == rig.dir, "{images:?}\n{}", rig.kept.log());
    ensure!(mounts_below(&dir)?.is_empty(), "the dead mount is left");
    // The layers that both have are read on, first the ones of which nothing was here.
    rig.sample.check(&rig.dir).with_context(|| rig.kept.log())?;
    rig.kept.mount(&image, &dir, &index)?;
    ensure!(fs::read(dir.join("own/file"))? == content("own/file", 400_000), "wrong bytes");
    rig.sample.check(&dir).with_context(|| rig.kept.log())?;
    ensure!(rig.kept.stop()?.success());
    ensure!(mounts_below(rig.scratch.path())?.is_empty(), "a mount is left");
    Ok(())
}

/// The registry is gone when the daemon starts again: what is here is read at once.
#[test]
fn a_daemon_starts_without_its_registry() -> Result<()> {
    for way in ["erofs-fuse", "fuse-tree"] {
        let Rig { kept, registry, index, sample, dir, state, scratch } = Rig::new(way, &[])?;
        sample.check(&dir)?;
        let before = kept.signal_daemon(Signal::TERM)?;
        kept.wait_for_another(before)?;
        drop(registry);
        let before = kept.signal_daemon(Signal::KILL)?;
        let restarted = kept.wait_for_another(before)?;
        sample.check(&dir).with_context(|| kept.log())?;
        eprintln!("{way}: without a registry the daemon answers {restarted:?} after a kill");
        // A keeper that is started anew has no connections: the mount is dead and goes away.
        ensure!(kept.stop()?.success());
        let kept = Kept::start(hermes(), &state, &[], &["--way", way])?;
        ensure!(kept.status()?.images.is_empty() && mounts_below(&dir)?.is_empty());
        drop((kept, index, scratch));
    }
    Ok(())
}

/// When the keeper is killed, the daemon goes on. With it the connections end, and the next start clears them away.
#[test]
fn a_lost_keeper_is_noticed_when_its_daemon_ends() -> Result<()> {
    for way in ["erofs-fuse", "fuse-tree"] {
        let mut rig = Rig::new(way, &[])?;
        let daemon = rig.kept.daemon()?.context("a daemon")?;
        rig.kept.keeper().signal(Signal::KILL)?;
        rig.kept.keeper().child().wait()?;
        rig.sample.check_file(&rig.dir, UNREAD)?;
        let refused = std::process::Command::new(hermes()).args(["keeper", "--state"]).arg(&rig.state).output()?;
        ensure!(!refused.status.success(), "two daemons were started");
        rustix::process::kill_process(daemon, Signal::KILL)?;
        let (bytes, _) = rig.reading("plain/first").end()?;
        ensure!(bytes.is_err(), "a connection outlived everybody who had it");
        let next = wait_for("the end of the daemon", DEADLINE, || {
            Kept::start(hermes(), &rig.state, &[], &["--way", way]).ok()
        })?;
        ensure!(mounts_below(&rig.dir)?.is_empty(), "the dead mount is left");
        next.mount(&rig.registry.image(TAG), &rig.dir, &rig.index)?;
        rig.sample.check(&rig.dir)?;
        ensure!(next.stop()?.success());
    }
    Ok(())
}

/// `drain` unmounts everything and ends the daemon and its keeper.
#[test]
fn a_drained_node_leaves_nothing() -> Result<()> {
    let mut rig = Rig::new("fuse-tree", &[])?;
    let output = rig.kept.run(&["node", "drain"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let status = wait_for("the end of the keeper", DEADLINE, || rig.kept.keeper().ended().transpose())??;
    ensure!(status.success(), "the keeper ended with {status}");
    ensure!(mounts_below(rig.scratch.path())?.is_empty(), "a mount is left");
    Ok(())
}

/// An upgrade that cannot work is refused before anything is touched, or taken back.
#[test]
fn upgrades_that_cannot_work_change_nothing() -> Result<()> {
    let rig = Rig::new("erofs-fuse", &[])?;
    let before = rig.kept.status()?.pid;
    let script = |name: &str, text: &str| -> Result<String> {
        use std::os::unix::fs::PermissionsExt as _;
        let path = rig.scratch.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path.to_str().context("UTF-8")?.to_owned())
    };
    let newer =
        script("newer", "case $1 in --version) echo hermes 99;; *) echo '{\"oldest\":98,\"newest\":99}';; esac")?;
    for (program, reason) in [(script("broken", "exit 3")?, "no hermes that runs here"), (newer, "nothing was changed")]
    {
        let output = rig.kept.run(&["node", "upgrade", &program])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && said.contains(reason), "{said}");
        ensure!(rig.kept.status()?.pid == before, "the daemon was restarted");
    }
    let hermes_path = hermes().display();
    let dies =
        format!("case \"$1 $2\" in '--version '|'node state-version') exec '{hermes_path}' \"$@\";; esac\nexit 1");
    let output = rig.kept.run(&["node", "upgrade", &script("dies", &dies)?])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && said.contains("does not start"), "{said}");
    rig.sample.check(&rig.dir).with_context(|| rig.kept.log())?;
    // A folder of a later version is refused as a whole.
    let Rig { kept, state, scratch, .. } = rig;
    ensure!(kept.stop()?.success());
    fs::write(state.join("version"), "99\n")?;
    let started = Instant::now();
    let output = std::process::Command::new(hermes()).args(["keeper", "--state"]).arg(&state).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && said.contains("version 99"), "{said}");
    ensure!(started.elapsed() < DEADLINE && fs::read_to_string(state.join("version"))? == "99\n");
    drop(scratch);
    Ok(())
}
