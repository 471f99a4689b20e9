//! A real containerd with Hermes as its snapshotter: images are pulled, run and removed as ever, both sides know the
//! same snapshots at every moment, and nothing is left. Plus `kill -9` of the daemon between and within calls.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use hermes_tests::agree::{Agreed, Sides};
use hermes_tests::command::run;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{ScratchDir, mounts_below, wait_for};
use hermes_tests::runnable;
use hermes_tests::snapshotter::{Client, Labels, directories};
use hermes_tests::unpack::Containerd;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

/// How long containerd may take to end a task or to collect garbage.
const DEADLINE: Duration = Duration::from_secs(60);
/// Times that the daemon is killed.
const KILLS: u64 = 8;
/// The latest kill after a start, in milliseconds: some dozens of calls, each of which syncs.
const KILL_MAX_MS: u64 = 400;

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// `role` as no other test run calls a container: runc's state is in a place that all of this machine share.
fn name(role: &str) -> String {
    format!("{role}-{}", std::process::id())
}

/// Both sides. Fields drop in this order: containerd ends before the daemon that it asks.
struct Rig {
    containerd: Containerd,
    daemon: Option<Daemon>,
    registry: FaultyRegistry,
    scratch: ScratchDir,
}

impl Drop for Rig {
    /// A container outlives containerd, so one that a failed test has left is ended while containerd still runs.
    fn drop(&mut self) {
        let _ = self.ctr(&["tasks", "rm", "--force", &name("stays")]);
    }
}

impl Rig {
    fn start() -> Result<Self> {
        let scratch = ScratchDir::new("proxy")?;
        let layout = runnable::images(&scratch.path().join("layout"))?;
        let registry = FaultyRegistry::start(layout.dir())?;
        let daemon = start_daemon(scratch.path())?;
        let containerd = Containerd::with_snapshotter(&socket(scratch.path()))?;
        Ok(Self { containerd, daemon: Some(daemon), registry, scratch })
    }

    fn ctr(&self, arguments: &[&str]) -> Result<String> {
        Ok(String::from_utf8(run(self.containerd.ctr().args(arguments))?)?)
    }

    /// Runs `script` in a container of `image`; what it printed.
    fn once(&self, image: &str, script: &str) -> Result<String> {
        let run = ["run", "--rm", "--snapshotter", "hermes", image, &name("once"), "/bin/sh", "-c", script];
        Ok(self.ctr(&run)?.trim().to_owned())
    }

    fn pull(&self, tag: &str) -> Result<String> {
        let image = self.registry.image(tag);
        self.ctr(&["images", "pull", "--plain-http", "--snapshotter", "hermes", &image])?;
        Ok(image)
    }

    fn kill(&mut self) -> Result<()> {
        self.daemon.take().context("a daemon runs")?.kill(self.scratch.path())
    }

    /// Starts it again, and waits until containerd has noticed: it pauses for up to three seconds between attempts to
    /// connect, and refuses calls meanwhile.
    fn restart(&mut self) -> Result<()> {
        self.daemon = Some(start_daemon(self.scratch.path())?);
        wait_for("containerd's next connection", DEADLINE, || {
            // A list of nothing would not ask the daemon.
            self.ctr(&["snapshots", "--snapshotter", "hermes", "prepare", "probe"]).is_ok().then_some(())
        })?;
        self.ctr(&["snapshots", "--snapshotter", "hermes", "rm", "probe"])?;
        self.agree_on(|_| true).map(drop)
    }

    /// Waits until containerd and Hermes know the same snapshots, each with its directory, as many as `expected` wants;
    /// how many.
    fn agree_on(&self, expected: impl Fn(usize) -> bool) -> Result<usize> {
        let (socket, root) = (socket(self.scratch.path()), snapshots(self.scratch.path()));
        let sides = Sides { socket: &socket, root: &root };
        let each_has_one = |agreed: Agreed| agreed.directories == agreed.snapshots && expected(agreed.snapshots);
        Ok(sides.agree(|| self.containerd.ctr(), each_has_one)?.snapshots)
    }
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("run/snapshotter.sock")
}

fn snapshots(dir: &Path) -> PathBuf {
    dir.join("state/snapshots")
}

fn start_daemon(dir: &Path) -> Result<Daemon> {
    let socket = socket(dir);
    let socket = socket.to_str().context("a path in UTF-8")?;
    Daemon::start(hermes(), &dir.join("state"), &["--containerd-socket", socket])
}

#[test]
fn containers_run_on_it_and_nothing_is_left() -> Result<()> {
    let mut rig = Rig::start()?;
    let v1 = rig.pull("v1")?;
    rig.agree_on(|count| count == 3).context("a snapshot for each layer")?;
    let v2 = rig.pull("v2")?;
    rig.agree_on(|count| count == 4).context("shared layers are shared")?;

    let script = "cat /etc/a; cat /etc/b 2>/dev/null; cat /gone/c 2>/dev/null; echo new > /etc/b; cat /etc/b";
    let answer = rig.once(&v1, script)?;
    ensure!(answer == "a2new", "the container read '{answer}'");
    let stays = name("stays");
    rig.ctr(&["run", "--detach", "--snapshotter", "hermes", &v2, &stays, "/bin/sleep", "600"])?;
    rig.agree_on(|count| count == 5).context("and one for the container that runs")?;

    // Whatever happens to the daemon, the container goes on, and is the same afterwards.
    rig.kill()?;
    let exec = |rig: &Rig, id: &str| {
        rig.ctr(&["tasks", "exec", "--exec-id", id, &stays, "/bin/sh", "-c", "cat /etc/a; echo > /tmp-file"])
    };
    ensure!(exec(&rig, "without")?.trim() == "other");
    rig.restart()?;
    ensure!(exec(&rig, "with")?.trim() == "other");
    rig.agree_on(|count| count == 5).context("both sides agree after a crash")?;

    rig.ctr(&["tasks", "kill", "--signal", "SIGKILL", &stays])?;
    wait_for("the end of the container", DEADLINE, || {
        rig.ctr(&["tasks", "ls"]).is_ok_and(|tasks| tasks.contains("STOPPED")).then_some(())
    })?;
    rig.ctr(&["tasks", "rm", &stays])?;
    rig.ctr(&["containers", "rm", &stays])?;
    rig.ctr(&["images", "rm", "--sync", &v1])?;
    // The sync is one of containerd's garbage collection.
    rig.agree_on(|count| count == 3).context("the end of unused snapshots")?;
    rig.pull("v1")?;
    rig.agree_on(|count| count == 4).context("pulled again")?;
    rig.ctr(&["images", "rm", "--sync", &v1, &v2])?;
    rig.agree_on(|count| count == 0).context("the end of all snapshots")?;
    let mounted = mounts_below(&snapshots(rig.scratch.path()))?;
    ensure!(mounted.is_empty(), "still mounted: {mounted:?}");
    Ok(())
}

#[test]
fn a_pull_that_loses_the_daemon_is_pulled_again() -> Result<()> {
    let mut rig = Rig::start()?;
    for round in 0..3_u64 {
        let mut pull = rig.containerd.ctr();
        pull.args(["images", "pull", "--plain-http", "--snapshotter", "hermes", &rig.registry.image("v1")]);
        let mut pull = pull.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn()?;
        // Somewhere within the pull, which takes about a second.
        thread::sleep(Duration::from_millis(150 * (round + 1)));
        rig.kill()?;
        pull.wait()?;
        rig.restart()?;
        let image = rig.pull("v1")?;
        rig.agree_on(|count| count >= 3).with_context(|| format!("round {round}"))?;
        let answer = rig.once(&image, "cat /etc/a")?;
        ensure!(answer == "a2", "round {round}: the container read '{answer}'");
        rig.ctr(&["images", "rm", "--sync", &image])?;
        rig.agree_on(|count| count == 0).context("the end of all snapshots")?;
    }
    Ok(())
}

/// What snapshots there are: kind and parent by name.
type Model = BTreeMap<String, (&'static str, String)>;

fn seen(client: &Client) -> Result<Model> {
    Ok(client
        .list(&[])?
        .into_iter()
        .map(|info| (info.name.clone(), (info.kind().as_str_name(), info.parent)))
        .collect())
}

/// A call that must succeed on `model`, and what the model is after it.
fn random_call(model: &Model, number: u64, random: &mut StdRng) -> (Call, Model) {
    let of_kind = |kind| model.iter().filter(move |(_, (found, _))| *found == kind).map(|(name, _)| name.clone());
    let committed: Vec<String> = of_kind("COMMITTED").collect();
    let active: Vec<String> = of_kind("ACTIVE").collect();
    let parents: BTreeSet<&String> = model.values().map(|(_, parent)| parent).collect();
    let leaves: Vec<&String> = model.keys().filter(|name| !parents.contains(name)).collect();
    let mut after = model.clone();
    let choice = random.random_range(0..10);
    if choice < 3 && !active.is_empty() {
        let key = active[random.random_range(0..active.len())].clone();
        let (name, (_, parent)) = (format!("layer-{number}"), after.remove(&key).expect("it is there"));
        after.insert(name.clone(), ("COMMITTED", parent));
        return (Call::Commit { name, key }, after);
    }
    if choice < 6 && !leaves.is_empty() {
        let name = leaves[random.random_range(0..leaves.len())].clone();
        after.remove(&name);
        return (Call::Remove { name }, after);
    }
    let parent = match committed.len() {
        0 => String::new(),
        count => committed[random.random_range(0..count)].clone(),
    };
    let (key, view) = (format!("key-{number}"), choice == 9);
    after.insert(key.clone(), (if view { "VIEW" } else { "ACTIVE" }, parent.clone()));
    (Call::Create { key, parent, view }, after)
}

#[derive(Debug)]
enum Call {
    Create { key: String, parent: String, view: bool },
    Commit { name: String, key: String },
    Remove { name: String },
}

impl Call {
    fn send(&self, client: &Client) -> bool {
        match self {
            Self::Create { key, parent, view: true } => client.view(key, parent).is_ok(),
            Self::Create { key, parent, view: false } => client.prepare(key, parent, Labels::new()).is_ok(),
            Self::Commit { name, key } => client.commit(name, key, Labels::new(), "").is_ok(),
            Self::Remove { name } => client.remove(name).is_ok(),
        }
    }
}

#[test]
fn what_was_answered_survives_a_kill() -> Result<()> {
    let scratch = ScratchDir::new("killed")?;
    let mut random = StdRng::seed_from_u64(7);
    let (mut model, mut under_way, mut number) = (Model::new(), None::<Model>, 0);
    for kill in 0..KILLS {
        let daemon = start_daemon(scratch.path())?;
        let client = Client::connect(&socket(scratch.path()))?;
        let found = seen(&client)?;
        match under_way.take() {
            Some(after) if found == after => model = after,
            _ => ensure!(found == model, "after kill {kill}: found {found:#?}, known {model:#?}"),
        }
        let left = directories(&snapshots(scratch.path()))?;
        let own = left.iter().filter(|name| !name.starts_with("removed-")).count();
        ensure!(own == model.len(), "after kill {kill}: {left:?} for {} snapshots", model.len());
        let delay = Duration::from_millis(random.random_range(10..KILL_MAX_MS));
        let killer = thread::spawn(move || {
            thread::sleep(delay);
            daemon.kill(Path::new("/nowhere"))
        });
        loop {
            number += 1;
            let (call, after) = random_call(&model, number, &mut random);
            if call.send(&client) {
                model = after;
            } else {
                under_way = Some(after);
                break;
            }
            if number > 1_000_000 {
                bail!("the daemon was never killed");
            }
        }
        killer.join().expect("the killer ends")?;
    }
    println!("{number} calls, {KILLS} kills, {} snapshots at the end", model.len());
    Ok(())
}
