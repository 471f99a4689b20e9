//! Pods on a real containerd: pulled, run, entered, stopped, removed, their images removed, collected, pruned and pulled
//! again, in random order, over images that share layers, some of them shown lazily and some not. Both sides know the same
//! snapshots all along, every container reads what its image has, and nothing is left in the end: no mount, no file, no
//! process, no row of the catalogue.
//!
//! A short while on one containerd; `make soak` has fifty rounds on each. The seed is printed, and taken from
//! `HERMES_TEST_SEED` to have a run again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_store::{Layer, Store, StoreConfig};
use hermes_tests::compress::Compression;
use hermes_tests::containerds::{LINES, RunningContainerd};
use hermes_tests::cri::Cri;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{mounts_below, wait_for};
use hermes_tests::layout::{Layout, NewLayer};
use hermes_tests::pods::Pod;
use hermes_tests::process::{descendants, used};
use hermes_tests::sample::content;
use hermes_tests::stage::{Stage, cksum};
use hermes_tests::tarball::{Entry, Tarball};
use hermes_tests::{runnable, soak};
use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;

/// Images, which share layers.
const IMAGES: usize = 10;
/// Pods at once.
const PODS_MAX: usize = 4;
/// Steps of a round: one of each kind, if chance were even.
const ROUND: usize = 10;
/// Rounds, in short and in whole.
const ROUNDS: (usize, usize) = (5, 50);
/// How long something may take that comes by itself.
const DEADLINE: Duration = Duration::from_secs(60);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// Whether an image is shown lazily. Beside one that is, there is always one that is not and has the same lower layers.
fn is_indexed(image: usize) -> bool {
    matches!(image % 4, 0 | 3)
}

fn tag(image: usize) -> String {
    format!("round{image}")
}

/// The files of an image that are looked at, lowest layer first.
fn files(image: usize) -> [(String, u64); 3] {
    let low = (format!("srv/low{}", image % 2), 200_000);
    let middle = (format!("srv/middle{}", image % 3), 100_000);
    [low, middle, (format!("srv/own{image}"), 150_000)]
}

fn images(dir: &Path) -> Result<Layout> {
    let layout = Layout::create(dir)?;
    let programs = runnable::programs()?;
    runnable::add_pause(&layout, &programs)?;
    for image in 0..IMAGES {
        let mut layers = vec![programs.clone()];
        for (layer, (name, len)) in files(image).into_iter().enumerate() {
            // Each layer also changes what all have.
            let own = Entry::file("etc/layer", format!("{name}\n"));
            let tar = Tarball::of([Entry::file(&name, content(&name, len)), own]);
            let compression = if layer == 1 { Compression::Zstd } else { Compression::Gzip(6) };
            layers.push(NewLayer { tar, compression });
        }
        layout.add(&tag(image), &layers, &json!({}))?;
    }
    Ok(layout)
}

/// What a shell prints for an image's files, by the same program.
fn expected(image: usize) -> Result<String> {
    let files = files(image);
    let sums = files.iter().map(|(name, len)| cksum(&content(name, *len))).collect::<Result<Vec<_>>>()?;
    Ok(format!("{}\n{}", files[2].0, sums.join("\n")))
}

/// The script that prints it.
fn script(image: usize) -> String {
    let sums = files(image).map(|(name, _)| format!("cksum < /{name}")).join("; ");
    format!("cat /etc/layer; {sums}")
}

/// What may be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Pull,
    Run,
    Once,
    Exec,
    Stop,
    Remove,
    RemoveImage,
    Collect,
    Prune,
    PullAgain,
}

const STEPS: [Step; 10] = [
    Step::Pull,
    Step::Run,
    Step::Once,
    Step::Exec,
    Step::Stop,
    Step::Remove,
    Step::RemoveImage,
    Step::Collect,
    Step::Prune,
    Step::PullAgain,
];

struct RunningPod {
    image: usize,
    pod: Pod,
    runs: bool,
}

/// A node, and what it should have.
struct World<'a> {
    stage: &'a Stage,
    containerd: &'a RunningContainerd<'a>,
    cri: Cri,
    sums: Vec<String>,
    pulled: BTreeSet<usize>,
    pods: Vec<RunningPod>,
    random: StdRng,
    number: usize,
    done: BTreeMap<Step, (usize, Duration)>,
}

impl World<'_> {
    fn reference(&self, image: usize) -> String {
        self.stage.registry.image(&tag(image))
    }

    /// Does something that can be done now.
    fn step(&mut self) -> Result<()> {
        self.number += 1;
        let begun = Instant::now();
        let step = loop {
            let step = STEPS[self.random.random_range(0..STEPS.len())];
            if self.take(step).with_context(|| format!("step {}: {step:?}", self.number))? {
                break step;
            }
        };
        let (count, took) = self.done.entry(step).or_default();
        (*count, *took) = (*count + 1, *took + begun.elapsed());
        Ok(())
    }

    /// Does `step`; `false` when it makes no sense now.
    fn take(&mut self, step: Step) -> Result<bool> {
        let pulled = self.pulled.iter().copied().choose(&mut self.random);
        let missing = (0..IMAGES).filter(|image| !self.pulled.contains(image)).choose(&mut self.random);
        let pod = (0..self.pods.len()).choose(&mut self.random);
        let running = (0..self.pods.len()).filter(|pod| self.pods[*pod].runs).choose(&mut self.random);
        match step {
            Step::Pull => {
                let Some(image) = missing else { return Ok(false) };
                self.cri.pull(&self.reference(image))?;
                self.pulled.insert(image);
            }
            Step::PullAgain => {
                let Some(image) = pulled else { return Ok(false) };
                self.cri.pull(&self.reference(image))?;
            }
            Step::Run => {
                let Some(image) = pulled.filter(|_| self.pods.len() < PODS_MAX) else { return Ok(false) };
                let (name, reference) = (format!("pod-{}", self.number), self.reference(image));
                let pod = self.cri.run_pod(&name, &reference, &["/bin/sleep", "100000"])?;
                self.pods.push(RunningPod { image, pod, runs: true });
            }
            Step::Once => {
                let Some(image) = pulled else { return Ok(false) };
                let printed = self.containerd.once(&self.reference(image), &script(image))?;
                ensure!(printed == self.sums[image], "image {image} has {printed}");
            }
            Step::Exec => {
                let Some(RunningPod { image, pod, .. }) = running.map(|at| &self.pods[at]) else { return Ok(false) };
                let printed = self.cri.exec(pod, &["/bin/sh", "-c", &script(*image)])?;
                ensure!(printed == self.sums[*image], "image {image} has {printed}");
            }
            Step::Stop => {
                let Some(at) = running else { return Ok(false) };
                self.cri.stop_container(&self.pods[at].pod)?;
                self.pods[at].runs = false;
            }
            Step::Remove => {
                let Some(at) = pod else { return Ok(false) };
                self.cri.remove_pod(&self.pods.swap_remove(at).pod)?;
            }
            Step::RemoveImage => {
                // Also while a pod runs on it, which goes on reading.
                let Some(image) = pulled else { return Ok(false) };
                self.cri.remove_image(&self.reference(image))?;
                self.pulled.remove(&image);
            }
            Step::Collect => {
                self.containerd.ctr_says(&["leases", "create", "--id", "collect"])?;
                self.containerd.ctr_says(&["leases", "delete", "--sync", "collect"])?;
            }
            Step::Prune => {
                let used: BTreeSet<usize> = self.pods.iter().map(|pod| pod.image).collect();
                if self.pulled.is_subset(&used) {
                    return Ok(false);
                }
                for image in self.pulled.difference(&used) {
                    self.cri.remove_image(&self.reference(*image))?;
                }
                self.pulled.retain(|image| used.contains(image));
            }
        }
        Ok(true)
    }

    /// The pods go, then the images, and nothing is left with containerd and in the kernel.
    fn clear(&mut self) -> Result<()> {
        self.pods.drain(..).try_for_each(|pod| self.cri.remove_pod(&pod.pod))?;
        self.containerd.remove_all_images()?;
        self.stage.agrees_with(self.containerd, Some(0)).map(drop)
    }
}

/// What is still mounted for containers and images.
fn mounted(stage: &Stage) -> Result<Vec<PathBuf>> {
    let mut mounted = mounts_below(&stage.state())?;
    // The layers are served as long as the daemon runs.
    mounted.retain(|dir| *dir != stage.state().join("layers"));
    mounted.extend(mounts_below(stage.host.root())?);
    Ok(mounted)
}

/// What is left in the kernel, and of processes, when there are no images and no pods.
fn nothing_is_left(stage: &Stage, daemon: &Daemon) -> Result<()> {
    let mut left = None;
    let gone = wait_for("the end of all mounts and processes", DEADLINE, || {
        let pid = daemon.status().ok()?.pid;
        let seen = (mounted(stage).ok()?, descendants(pid), stage.host.shims(), daemon.status().ok()?.images);
        let is_empty = seen.0.is_empty() && seen.1.is_empty() && seen.2.is_empty() && seen.3.is_empty();
        left = Some(seen);
        is_empty.then_some(())
    });
    gone.with_context(|| format!("mounts, children, shims, images: {left:?}"))?;
    for folder in ["trees", "snapshots"] {
        let left = names(&stage.state().join(folder))?;
        ensure!(left.is_empty(), "{folder} has {left:?}");
    }
    println!("the daemon at the end: {:?}", used(daemon.status()?.pid)?);
    Ok(())
}

/// The names in a folder; none where there is no folder.
fn names(dir: &Path) -> Result<BTreeSet<String>> {
    if !dir.exists() {
        return Ok(BTreeSet::new());
    }
    hermes_tests::snapshotter::directories(dir)
}

/// What a daemon has in its store for itself, from its start on: what it tries the kernel's ways with.
struct Own {
    layers: BTreeSet<String>,
    artifacts: BTreeSet<String>,
}

impl Own {
    fn of(stage: &Stage) -> Result<Self> {
        Ok(Self { layers: in_store(stage, "layers")?, artifacts: in_store(stage, "artifacts")? })
    }
}

fn in_store(stage: &Stage, folder: &str) -> Result<BTreeSet<String>> {
    names(&stage.state().join("store").join(folder))
}

fn file_name(layer: &Arc<Layer>) -> String {
    layer.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// What is left on the disk is what is kept for the next pull, and all of it: the chunks and the indexes of the images
/// that were shown lazily. To be called when the daemon has ended.
fn only_what_is_kept(stage: &Stage, own: &Own) -> Result<()> {
    let store = Store::open(StoreConfig::new(stage.state().join("store")))?;
    let rows = store.rows()?;
    println!("rows of the catalogue: {rows:?}");
    for family in ["snapshots", "children", "mounts", "pins"] {
        ensure!(rows[family] == 0, "{family}: {rows:?}");
    }
    let (layers, records) = (store.layers(), store.images()?);
    let chunks: u64 = layers.iter().map(|layer| u64::from(layer.table().count())).sum();
    ensure!(rows["layers"] == layers.len() as u64 && rows["places"] == chunks, "{rows:?}");
    ensure!(rows["images"] == records.len() as u64 && records.len() <= IMAGES, "{rows:?}");
    let shown: BTreeSet<_> = records.iter().flat_map(|record| &record.layers).map(|layer| layer.diff_id).collect();
    let is_known = |layer: &Arc<Layer>| shown.contains(&layer.diff_id()) || own.layers.contains(&file_name(layer));
    ensure!(layers.iter().all(is_known), "layers of no image that was shown");

    let folder = |name: &str| names(&stage.state().join("store").join(name));
    let expected: BTreeSet<String> =
        layers.iter().filter_map(|layer| Some(layer.path().file_name()?.to_string_lossy().into_owned())).collect();
    ensure!(folder("layers")? == expected, "files of layers: {:?}, not {expected:?}", folder("layers")?);
    let of_layers = records.iter().flat_map(|record| &record.layers);
    let used = of_layers.flat_map(|layer| [layer.toc, layer.chunks, layer.seek, layer.windows]);
    let used = used.chain(records.iter().filter_map(|record| record.tree)).map(|id| id.hex().to_string());
    let used: BTreeSet<String> = used.chain(own.artifacts.iter().cloned()).collect();
    let other: Vec<_> = in_store(stage, "artifacts")?.difference(&used).cloned().collect();
    ensure!(other.is_empty(), "artifacts of no image: {other:?}");
    let statements = names(&stage.state().join("indexes/statements"))?;
    ensure!(statements.len() == records.len(), "{statements:?} for {} images", records.len());
    Ok(())
}

fn rounds(line: &str, rounds: usize, seed: u64) -> Result<()> {
    println!("containerd {line}: seed {seed}");
    let indexed: Vec<String> = (0..IMAGES).filter(|image| is_indexed(*image)).map(tag).collect();
    let indexed: Vec<&str> = indexed.iter().map(String::as_str).collect();
    let begun = Instant::now();
    let stage = Stage::with(hermes(), line, &indexed, FaultyRegistry::start, images)?;
    let daemon = stage.daemon(&[])?;
    let own = Own::of(&stage)?;
    let containerd = stage.host.start()?;
    let mut world = World {
        stage: &stage,
        containerd: &containerd,
        cri: Cri::connect(&containerd.socket())?,
        sums: (0..IMAGES).map(expected).collect::<Result<_>>()?,
        pulled: BTreeSet::new(),
        pods: Vec::new(),
        random: StdRng::seed_from_u64(seed),
        number: 0,
        done: BTreeMap::new(),
    };
    println!("set up in {:?}", begun.elapsed());
    let begun = Instant::now();
    for round in 0..rounds {
        let stepped = (0..ROUND).try_for_each(|_| world.step());
        stepped.and_then(|()| stage.agrees_with(&containerd, None).map(drop)).with_context(|| {
            format!("containerd {line}, seed {seed}, round {round}: {:?}\n{}", world.done, daemon.log())
        })?;
    }
    println!("{rounds} rounds in {:?}: {:?}", begun.elapsed(), world.done);
    world.clear().with_context(|| format!("containerd {line}, seed {seed}"))?;
    nothing_is_left(&stage, &daemon).with_context(|| format!("containerd {line}, seed {seed}"))?;
    drop(world);
    drop(containerd);
    let looked = |log: &str| log.matches("looked for trees").count();
    let before = looked(&daemon.log());
    daemon.stop()?;
    // The next start removes what was made of parts of images, and nothing else.
    let next = stage.daemon(&[])?;
    wait_for("the end of trees of parts", DEADLINE, || (looked(&next.log()) > before).then_some(()))?;
    next.stop()?;
    only_what_is_kept(&stage, &own).with_context(|| format!("containerd {line}, seed {seed}"))
}

#[test]
fn pods_come_and_go_in_any_order_and_nothing_is_left() -> Result<()> {
    let seed = match std::env::var("HERMES_TEST_SEED") {
        Ok(seed) => seed.parse().context("HERMES_TEST_SEED is a number")?,
        Err(_) => rand::random(),
    };
    let count = soak::choose(ROUNDS.0, ROUNDS.1)?;
    let lines = soak::choose(&LINES[1..2], &LINES[..])?;
    lines.iter().try_for_each(|line| rounds(line, count, seed))
}
