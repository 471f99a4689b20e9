//! Many images and many containers on one node: what the daemon takes of the machine, and that it takes no more after
//! hundreds of containers have come and gone.
//!
//! A container is here what a daemon has of one: a snapshot that containerd has prepared, mounted, and read. `make soak`
//! has real ones instead, each with its processes, and ten times as many rounds.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_image::ids::{ChainId, DiffId};
use hermes_tests::compress::Compression;
use hermes_tests::containerds::RunningContainerd;
use hermes_tests::cri::Cri;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{MountGuard, wait_for};
use hermes_tests::layout::{Layout, NewLayer};
use hermes_tests::process::{Used, used};
use hermes_tests::sample::content;
use hermes_tests::snapshotter::{Client, Labels, labels, mount};
use hermes_tests::stage::{Stage, cksum};
use hermes_tests::tarball::{Entry, Tarball};
use hermes_tests::{runnable, soak};
use serde_json::json;

/// Images, and containers of them.
const IMAGES: usize = 20;
const CONTAINERS: usize = 100;
/// Files of each image, in folders of a hundred, beside its programs.
const FILES: usize = 2000;
/// Times that a container comes and goes: in short, and in whole.
const ROUNDS: (usize, usize) = (100, 1000);
/// Rounds before it is looked what the daemon uses: threads for what blocks come and stay for a while.
const WARM_UP: usize = 20;
/// What the daemon may have in memory, in KiB.
const MEMORY_MAX_KIB: u64 = 128 << 10;
/// Threads and descriptors that may be more after all rounds than before: those of calls that happen to be under way.
const MORE_MAX: usize = 8;
/// How long something may take that comes by itself.
const DEADLINE: Duration = Duration::from_secs(60);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

fn tag(image: usize) -> String {
    format!("many{image}")
}

/// A file's path in the image, and what it holds.
fn file(image: usize, file: usize) -> (String, Vec<u8>) {
    let name = format!("srv/{}/{image}-{file}", file / 100);
    let content = content(&name, 50 + file as u64 % 500);
    (name, content)
}

fn images(dir: &Path) -> Result<Layout> {
    let layout = Layout::create(dir)?;
    // Only what runs needs programs, and indexing them twenty times takes most of the short form's time.
    let programs = soak::length()?.map(|_| runnable::programs()).transpose()?;
    for image in 0..IMAGES {
        let files = (0..FILES).map(|number| file(image, number)).map(|(name, data)| Entry::file(name, data));
        let files = NewLayer { tar: Tarball::of(files), compression: Compression::Gzip(6) };
        let layers: Vec<NewLayer> = programs.iter().cloned().chain([files]).collect();
        layout.add(&tag(image), &layers, &json!({}))?;
    }
    Ok(layout)
}

/// The chain of all layers of an image, which is what its committed snapshot is called.
fn chain(stage: &Stage, image: usize) -> Result<String> {
    let layers: Vec<DiffId> = stage.layout.image(&tag(image))?.layers.iter().map(|layer| layer.diff_id).collect();
    Ok(ChainId::of(&layers).context("layers")?.to_string())
}

/// Both sides, and a connection to containerd's own snapshots.
struct Node<'a> {
    stage: &'a Stage,
    containerd: &'a RunningContainerd<'a>,
    client: Client,
    /// What images are called as snapshots.
    chains: Vec<String>,
}

/// A container.
enum Container {
    /// A mounted snapshot.
    Mounted { key: String, root: MountGuard },
    /// A real one.
    Running { name: String },
}

impl Node<'_> {
    fn start(&self, name: &str, image: usize, is_real: bool) -> Result<Container> {
        if is_real {
            let name = self.containerd.container_name(name);
            let reference = self.stage.registry.image(&tag(image));
            let sleeper = ["run", "--detach", "--snapshotter", "hermes", &reference, &name, "/bin/sleep", "100000"];
            self.containerd.ctr_says(&sleeper)?;
            return Ok(Container::Running { name });
        }
        // Nothing of containerd's refers to it, so it is one of those that its collection of garbage has to leave alone.
        let kept: Labels = labels(&[("containerd.io/gc.root", "test")]);
        let mounts = self.client.prepare(name, &self.chains[image], kept).context("prepare")?;
        let target = self.stage.scratch().join(name);
        fs::create_dir_all(&target)?;
        let root = mount(&mounts, &self.stage.snapshots(), &target)?;
        let container = Container::Mounted { key: name.to_owned(), root };
        self.read(&container, image, name.len())?;
        Ok(container)
    }

    /// Reads one of the image's files in the container.
    fn read(&self, container: &Container, image: usize, number: usize) -> Result<()> {
        let (name, expected) = file(image, number * 37 % FILES);
        match container {
            Container::Mounted { root, .. } => {
                let found = fs::read(root.path().join(&name)).with_context(|| format!("read {name}"))?;
                ensure!(found == expected, "{name} holds wrong bytes");
            }
            Container::Running { name: container } => {
                let script = format!("cksum < /{name}");
                let exec = ["tasks", "exec", "--exec-id", "reader", container, "/bin/sh", "-c", &script];
                let found = self.containerd.ctr_says(&exec)?;
                ensure!(found.trim() == cksum(&expected)?, "{name} holds wrong bytes");
            }
        }
        Ok(())
    }

    fn end(&self, container: Container) -> Result<()> {
        match container {
            Container::Mounted { key, root } => {
                let dir = root.path().to_owned();
                drop(root);
                fs::remove_dir(dir)?;
                self.client.remove(&key).context("remove")
            }
            Container::Running { name } => {
                self.containerd.ctr_says(&["tasks", "rm", "--force", &name])?;
                self.containerd.ctr_says(&["containers", "rm", &name]).map(drop)
            }
        }
    }
}

#[test]
fn a_hundred_containers_of_twenty_images_take_little_and_leave_nothing() -> Result<()> {
    let tags: Vec<String> = (0..IMAGES).map(tag).collect();
    let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
    let (begun, is_real) = (Instant::now(), soak::length()?.is_some());
    let stage = Stage::with(hermes(), "1.7", &tags, FaultyRegistry::start, images)?;
    let daemon = stage.daemon(&[])?;
    let pid = daemon.status()?.pid;
    let containerd = stage.host.start()?;
    println!("{IMAGES} images of {FILES} files made and indexed in {:?}", begun.elapsed());
    let start = used(pid)?;
    let (begun, cri) = (Instant::now(), Cri::connect(&containerd.socket())?);
    tags.iter().try_for_each(|tag| cri.pull(&stage.registry.image(tag)))?;
    let pulls = daemon.status()?.pulls;
    ensure!(pulls.len() == IMAGES && pulls.iter().all(|pull| pull.decision == "lazy"), "{pulls:?}");
    println!("{IMAGES} images pulled in {:?}", begun.elapsed());

    let chains = (0..IMAGES).map(|image| chain(&stage, image)).collect::<Result<_>>()?;
    let client = Client::connect(&containerd.socket())?;
    let node = Node { stage: &stage, containerd: &containerd, client, chains };
    let begun = Instant::now();
    let start_one = |number: usize| node.start(&format!("many-{number}"), number % IMAGES, is_real);
    let mut containers = (0..CONTAINERS).map(start_one).collect::<Result<Vec<_>>>()?;
    println!("{CONTAINERS} containers started in {:?}", begun.elapsed());
    for (number, container) in containers.iter().enumerate() {
        node.read(container, number % IMAGES, number)?;
    }
    ensure!(stage.trees()? == IMAGES, "a tree for each image, not {}", stage.trees()?);
    let held = used(pid)?;
    println!("the daemon alone: {start:?}\nwith {CONTAINERS} containers of {IMAGES} images: {held:?}");
    ensure!(held.resident_kib <= MEMORY_MAX_KIB, "{held:?}");

    // Of half of the images there are containers all the time; the trees of the others come and go with each round.
    for (number, container) in std::mem::take(&mut containers).into_iter().enumerate() {
        match number % IMAGES < IMAGES / 2 {
            true => containers.push(container),
            false => node.end(container)?,
        }
    }
    let rounds = soak::choose(ROUNDS.0, ROUNDS.1)?;
    let (before, after, took) = come_and_go(&node, pid, rounds)?;
    println!("{rounds} rounds in {took:?}\nbefore {before:?}\nafter  {after:?}");
    let is_more = |before: usize, after: usize| after > before + MORE_MAX;
    ensure!(!is_more(before.threads, after.threads), "threads grow: {before:?}, {after:?}");
    ensure!(!is_more(before.descriptors, after.descriptors), "descriptors grow: {before:?}, {after:?}");
    ensure!(after.resident_kib <= MEMORY_MAX_KIB, "{after:?}");

    containers.into_iter().try_for_each(|container| node.end(container))?;
    containerd.remove_all_images()?;
    stage.agrees_with(&containerd, Some(0))?;
    wait_for("the end of all trees", DEADLINE, || (stage.trees().ok()? == 0).then_some(()))?;
    println!("with nothing: {:?}", used(pid)?);
    drop(containerd);
    daemon.stop().map(drop)
}

/// What the daemon uses before and after `rounds` containers, each of which comes, reads and goes.
fn come_and_go(node: &Node<'_>, pid: u32, rounds: usize) -> Result<(Used, Used, Duration)> {
    let round = |number: usize| -> Result<()> {
        // By a step that has no factor in common with the number of images, so that all have their turn.
        let image = number * 7 % IMAGES;
        let container = node.start(&format!("round-{number}"), image, false)?;
        node.read(&container, image, number)?;
        node.end(container).with_context(|| format!("round {number}"))
    };
    (0..WARM_UP).try_for_each(round)?;
    let (before, begun) = (used(pid)?, Instant::now());
    (WARM_UP..WARM_UP + rounds).try_for_each(round)?;
    Ok((before, used(pid)?, begun.elapsed()))
}
