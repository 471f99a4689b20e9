//! Images without an index that a node takes the pull of: its layers come once, the pod waits and then reads a complete
//! image, and the next node starts lazily from the first. What fails leaves nothing and is pulled as ever.
//!
//! containerd is set up by `hermes node install` and asked as a kubelet asks it; the registry counts what it gives.

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZeroU64;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_registry::Options;
use hermes_snapshotter::status::{NodeStatus, PullStatus};
use hermes_tests::command::run;
use hermes_tests::compress::Compression;
use hermes_tests::containerds::Host;
use hermes_tests::cri;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::layout::{Layout, NewLayer};
use hermes_tests::lazy_host::{self, Container};
use hermes_tests::runnable;
use hermes_tests::sample::content;
use hermes_tests::tarball::{Entry, Tarball};
use serde_json::json;

/// How long something may take that has no time of its own.
const DEADLINE: Duration = Duration::from_secs(60);
/// The large files of the image, each in a layer of its own, and their length in bytes.
const FILES: [&str; 2] = ["opt/first", "opt/second"];
const FILE_LEN_BYTES: u64 = 24_000_000;
/// What is read beside the layers: the configuration, and a byte to see that ranges are given.
const BESIDE_BYTES_MAX: u64 = 16_384;

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// What is the same for every node: the images, their registry, the key that all sign with.
struct Stage {
    layout: Layout,
    registry: FaultyRegistry,
    key: PathBuf,
    scratch: ScratchDir,
}

impl Stage {
    fn new(options: Options) -> Result<Self> {
        let scratch = ScratchDir::new("first")?;
        let layout = runnable::images(&scratch.path().join("layout"))?;
        let layer = |tar: Vec<u8>, compression| NewLayer { tar, compression };
        let file = |name: &str| Tarball::of([Entry::file(name, content(name, FILE_LEN_BYTES))]);
        let layers = [
            runnable::programs()?,
            layer(file(FILES[0]), Compression::Gzip(1)),
            layer(file(FILES[1]), Compression::Zstd),
            layer(Tarball::of([Entry::file("etc/a", "top")]), Compression::Plain),
        ];
        layout.add("large", &layers, &json!({}))?;
        // A thousand times as long as it looks.
        let zeros = layer(Tarball::of([Entry::file("zeros", vec![0; 40_000_000])]), Compression::Gzip(6));
        layout.add("long", &[zeros, layer(Tarball::of([Entry::file("a", "long")]), Compression::Plain)], &json!({}))?;
        let registry = FaultyRegistry::with_options(layout.dir(), options)?;
        let key = scratch.path().join("fleet-key");
        fs::write(&key, "5e".repeat(32))?;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        Ok(Self { layout, registry, key, scratch })
    }

    /// Compressed bytes of an image's layers.
    fn layer_bytes(&self, tag: &str) -> Result<u64> {
        Ok(self.layout.image(tag)?.layers.iter().map(|layer| layer.blob_len_bytes).sum())
    }

    fn blob_bytes(&self) -> u64 {
        self.registry.counters().blob_bytes
    }

    /// A host with containerd of `line` that uses Hermes.
    fn host(line: &str) -> Result<Host> {
        lazy_host::installed(hermes(), line, None)
    }

    /// The daemon of `host`, which signs with the fleet's key.
    fn daemon(&self, host: &Host, name: &str, more: &[&str]) -> Result<Daemon> {
        let (socket, key) = (host.socket().display().to_string(), self.key.display().to_string());
        let own = ["--containerd-socket", &socket, "--signing-key", &key, "--listen", "127.0.0.1:0"];
        Daemon::start(hermes(), &self.state(name), &[&own, more].concat())
    }

    fn state(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// The sum of a file of the image, by the same program.
    fn cksum(&self, name: &str) -> Result<String> {
        let path = self.scratch.path().join("content");
        fs::write(&path, content(name, FILE_LEN_BYTES))?;
        let printed = run(Command::new("sh").args(["-c", &format!("cksum < {}", path.display())]))?;
        Ok(String::from_utf8(printed)?.trim().to_owned())
    }
}

/// The decision about the last image that was pulled.
fn decision(status: NodeStatus) -> Result<PullStatus> {
    status.pulls.into_iter().next_back().context("no image was pulled")
}

fn expect_decision(daemon: &Daemon, expected: &str) -> Result<PullStatus> {
    let decided = decision(daemon.status()?).with_context(|| daemon.log())?;
    ensure!(decided.decision == expected, "{decided:?}\n{}", daemon.log());
    Ok(decided)
}

/// The files of layers and artifacts in a node's store.
fn stored(state: &Path) -> Result<BTreeSet<PathBuf>> {
    let folders = ["layers", "artifacts"].map(|name| fs::read_dir(state.join("store").join(name)));
    let mut files = BTreeSet::new();
    for folder in folders {
        for entry in folder? {
            files.insert(entry?.path());
        }
    }
    Ok(files)
}

/// How long containerd takes by itself.
fn plain_pull(image: &str, line: &str) -> Result<Duration> {
    let host = Host::new(line)?;
    fs::write(host.config(), host.default_config()?)?;
    let containerd = host.start()?;
    let started = Instant::now();
    cri::pull(&containerd.socket(), image)?;
    Ok(started.elapsed())
}

#[test]
fn the_first_node_takes_the_pull_and_the_next_one_starts_lazily_from_it() -> Result<()> {
    let lines = [("1.7", "2"), ("2", "1.6")];
    lines.into_iter().try_for_each(|(first, second)| {
        first_and_second(first, second).with_context(|| format!("containerd {first}, then {second}"))
    })
}

fn first_and_second(first_line: &str, second_line: &str) -> Result<()> {
    let stage = Stage::new(Options::default())?;
    let (image, layers) = (stage.registry.image("large"), stage.layer_bytes("large")?);
    let plain = plain_pull(&image, first_line)?;
    let smallest = (layers - 1).to_string();
    let sizes = ["--index-on-first-pull-min-size", &smallest];

    let first_host = Stage::host(first_line)?;
    let first = stage.daemon(&first_host, "first", &sizes)?;
    let containerd = first_host.start()?;
    let (before, started) = (stage.blob_bytes(), Instant::now());
    cri::pull(&containerd.socket(), &image)?;
    let taken = started.elapsed();
    expect_decision(&first, "lazy")?;
    let read = stage.blob_bytes() - before;
    // containerd reads the configuration, and so does the node.
    ensure!(read >= layers && read < layers + 2 * BESIDE_BYTES_MAX, "{read} bytes were read for layers of {layers}");
    ensure!(first.status()?.first_pulls.is_empty());
    let answer = containerd.once(&image, &format!("cat /etc/a; cksum < /{}", FILES[0]))?;
    ensure!(answer == format!("top{}", stage.cksum(FILES[0])?), "the container read '{answer}'");
    ensure!(stage.blob_bytes() - before == read, "the container read from the registry");
    // While a container is there, its tree is shown.
    let container = Container::sleeping(&containerd, &image)?;
    let shown = first.status()?.images.into_iter().next().context("no tree is shown")?;
    ensure!(shown.present_bytes == shown.total_bytes && shown.total_bytes > layers, "{shown:?}");

    // The next node: index and chunks come from the first, also when that has been restarted since.
    drop(container);
    first.stop()?;
    let first = stage.daemon(&first_host, "first", &sizes)?;
    let second_host = Stage::host(second_line)?;
    let listens = || first.status().ok()?.listen.into_iter().next();
    let peer = wait_for("an address of the first node", DEADLINE, listens)?;
    let second = stage.daemon(&second_host, "second", &[&sizes[..], &["--peer", &peer]].concat())?;
    wait_for("the two nodes to know each other", DEADLINE, || {
        second.status().is_ok_and(|status| !status.peers.is_empty()).then_some(())
    })?;
    let other = second_host.start()?;
    let (before, started) = (stage.blob_bytes(), Instant::now());
    cri::pull(&other.socket(), &image)?;
    let lazy = started.elapsed();
    expect_decision(&second, "lazy")?;
    let sum = other.once(&image, &format!("cksum < /{}", FILES[1]))?;
    ensure!(sum == stage.cksum(FILES[1])?, "the second node's container read '{sum}'");
    let read = stage.blob_bytes() - before;
    ensure!(read < 2 * BESIDE_BYTES_MAX, "{read} bytes came from the registry, not from the first node");
    println!(
        "layers of {layers} B, containerd {first_line}: its own pull {plain:?}, taken by the node {taken:?}; \
         next node ({second_line}) {lazy:?}, {read} B from the registry"
    );
    drop((other, second));
    Ok(())
}

#[test]
fn layers_that_an_own_index_has_are_not_read_again() -> Result<()> {
    let stage = Stage::new(Options::default())?;
    let host = Stage::host("1.7")?;
    let daemon = stage.daemon(&host, "state", &["--index-on-first-pull-min-size", "1"])?;
    let containerd = host.start()?;
    for (tag, limit) in [("v1", stage.layer_bytes("v1")?), ("v2", 0)] {
        let before = stage.blob_bytes();
        cri::pull(&containerd.socket(), &stage.registry.image(tag))?;
        expect_decision(&daemon, "lazy")?;
        let read = stage.blob_bytes() - before;
        ensure!(read < limit + 2 * BESIDE_BYTES_MAX, "{read} bytes were read for {tag}");
    }
    ensure!(containerd.once(&stage.registry.image("v2"), "cat /etc/a")? == "other");
    ensure!(containerd.once(&stage.registry.image("v1"), "cat /etc/a")? == "a2");
    Ok(())
}

#[test]
fn what_is_small_or_finds_no_room_or_is_switched_off_is_pulled_as_ever() -> Result<()> {
    let stage = Stage::new(Options::default())?;
    let all = ["--index-on-first-pull-min-size", "1"];
    let narrow = [&all[..], &["--budget", "16777216"]].concat();
    let cases = [
        ("v1", vec![], "small"),
        ("v1", vec!["--index-on-first-pull=false"], "no_index"),
        // Seen before anything is read, and on the way.
        ("large", narrow.clone(), "no_room"),
        ("long", narrow, "no_room"),
    ];
    for (at, (tag, arguments, expected)) in cases.into_iter().enumerate() {
        let host = Stage::host("1.7")?;
        let name = format!("state-{at}");
        let daemon = stage.daemon(&host, &name, &arguments)?;
        let before = stored(&stage.state(&name))?;
        let containerd = host.start()?;
        let image = stage.registry.image(tag);
        cri::pull(&containerd.socket(), &image)?;
        let decided = expect_decision(&daemon, expected)?;
        let reason = decided.reason.context("a reason")?;
        ensure!(reason.contains(if tag == "long" { "could not be taken" } else { "nobody has its index" }), "{reason}");
        if tag == "v1" {
            ensure!(containerd.once(&image, "cat /etc/a")? == "a2");
        }
        ensure!(stored(&stage.state(&name))? == before, "something is left in the store");
    }
    Ok(())
}

#[test]
fn a_layer_that_breaks_off_is_gone_on_with() -> Result<()> {
    let stage = Stage::new(Options::default())?;
    let host = Stage::host("1.7")?;
    let daemon = stage.daemon(&host, "state", &["--index-on-first-pull-min-size", "1"])?;
    let containerd = host.start()?;
    let image = stage.registry.image("large");
    // Each layer breaks off at least once; what is shorter does not.
    stage.registry.plan(|request| if request < 8 { Fault::CutAfter(3_000_000) } else { Fault::Pass });
    cri::pull(&containerd.socket(), &image)?;
    expect_decision(&daemon, "lazy")?;
    ensure!(daemon.log().contains("a layer broke off"), "no layer broke off");
    for file in FILES {
        ensure!(containerd.once(&image, &format!("cksum < /{file}"))? == stage.cksum(file)?, "{file} came wrong");
    }
    Ok(())
}

#[test]
fn a_registry_that_breaks_off_leaves_nothing_and_the_image_is_pulled_as_ever() -> Result<()> {
    let stage = Stage::new(Options::default())?;
    let host = Stage::host("1.7")?;
    let daemon = stage.daemon(&host, "state", &["--index-on-first-pull-min-size", "1"])?;
    let containerd = host.start()?;
    let image = stage.registry.image("large");
    let (before, bytes_before) = (stored(&stage.state("state"))?, daemon.status()?.store_bytes);
    // More often than a layer is gone on with; the configuration is shorter than that.
    stage.registry.always(Fault::CutAfter(300_000));
    let pulled = cri::pull(&containerd.socket(), &image);
    let decided = expect_decision(&daemon, "unreachable")?;
    let reason = decided.reason.context("a reason")?;
    ensure!(reason.contains("could not be taken"), "{reason}");
    if let Err(error) = &pulled {
        // What the registry does to containerd is all that the pod sees.
        ensure!(!format!("{error:#}").contains("hermes"), "{error:#}");
    }
    ensure!(stored(&stage.state("state"))? == before, "something is left in the store");
    ensure!(daemon.status()?.store_bytes == bytes_before);

    stage.registry.always(Fault::Pass);
    cri::pull(&containerd.socket(), &image)?;
    // It is not taken again at once.
    expect_decision(&daemon, "unreachable")?;
    ensure!(containerd.once(&image, "cat /etc/a")? == "top");
    Ok(())
}

#[test]
fn pulls_that_begin_together_or_are_begun_again_share_one() -> Result<()> {
    // Some four seconds, in which the others come.
    let bandwidth_bits_per_second = NonZeroU64::new(80_000_000);
    let stage = Stage::new(Options { bandwidth_bits_per_second, ..Options::default() })?;
    let host = Stage::host("1.7")?;
    let daemon = stage.daemon(&host, "state", &["--index-on-first-pull-min-size", "1"])?;
    let containerd = host.start()?;
    let (image, layers) = (stage.registry.image("large"), stage.layer_bytes("large")?);
    let (socket, before) = (containerd.socket(), stage.blob_bytes());
    let together = Barrier::new(2);
    std::thread::scope(|scope| {
        let impatient = scope.spawn(|| {
            together.wait();
            cri::pull_within(Duration::from_secs(1), &socket, &image)
        });
        together.wait();
        let patient = scope.spawn(|| cri::pull(&socket, &image));
        wait_for("progress of the pull", DEADLINE, || {
            let status = daemon.status().ok()?;
            let pull = status.first_pulls.first()?;
            (pull.done_bytes > 0 && pull.total_bytes == layers && pull.reference == image).then_some(())
        })?;
        let gave_up = impatient.join().expect("does not panic");
        ensure!(gave_up.is_err(), "the link is not as slow as it should be");
        // Whoever asks again joins.
        cri::pull(&socket, &image)?;
        patient.join().expect("does not panic")
    })?;
    expect_decision(&daemon, "lazy")?;
    let read = stage.blob_bytes() - before;
    ensure!(read < layers + 4 * BESIDE_BYTES_MAX, "{read} bytes were read for layers of {layers}");
    ensure!(containerd.once(&image, "cat /etc/a")? == "top");
    Ok(())
}

#[test]
fn a_daemon_that_ends_lets_containerd_pull_and_leaves_nothing() -> Result<()> {
    let bandwidth_bits_per_second = NonZeroU64::new(40_000_000);
    let stage = Stage::new(Options { bandwidth_bits_per_second, ..Options::default() })?;
    let host = Stage::host("1.7")?;
    let daemon = stage.daemon(&host, "state", &["--index-on-first-pull-min-size", "1"])?;
    let before = stored(&stage.state("state"))?;
    let containerd = host.start()?;
    let (image, socket) = (stage.registry.image("large"), containerd.socket());
    std::thread::scope(|scope| {
        let pull = scope.spawn(|| cri::pull(&socket, &image));
        wait_for("progress of the pull", DEADLINE, || {
            daemon.status().ok()?.first_pulls.first().filter(|pull| pull.done_bytes > 0).map(drop)
        })?;
        daemon.stop()?;
        // Its snapshotter is gone, so this pull may fail; the next one finds the daemon again.
        drop(pull.join().expect("does not panic"));
        anyhow::Ok(())
    })?;
    let daemon = stage.daemon(&host, "state", &["--index-on-first-pull=false"])?;
    ensure!(stored(&stage.state("state"))? == before);
    daemon.stop()?;
    Ok(())
}
