//! Real programs in real containers, on images that are shown lazily: everything is as on containerd's own overlayfs.
//!
//! Each program runs twice on the same containerd, from the same registry: on the lazy tree and on what containerd has
//! unpacked. What it finds is compared fact by fact.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use hermes_tests::containerds::{LINES, RunningContainerd};
use hermes_tests::cri;
use hermes_tests::daemon::Daemon;
use hermes_tests::facts::Comparison;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::ScratchDir;
use hermes_tests::images::RealImage;
use hermes_tests::layout::Layout;
use hermes_tests::lazy_host::{self, NewContainer};
use hermes_tests::node::Index;
use hermes_tests::programs::{
    self, ASK_BY_NODE, ASK_BY_PYTHON, CORE, FILESYSTEM, NAMESPACE, NUMBERS, PACKAGES, PIP, PRIVILEGES, Script, THE_END,
};

/// The snapshotter of this project, and the one that it has to equal.
const OURS: &str = "hermes";
const THEIRS: &str = "overlayfs";

fn hermes() -> &'static str {
    env!("CARGO_BIN_EXE_hermes")
}

/// Images, their registry and their indexes: the same for every line of containerd.
struct Images {
    layout: Layout,
    registry: FaultyRegistry,
    index: Index,
    scratch: ScratchDir,
}

impl Images {
    fn new(whole: &[RealImage], core: bool) -> Result<Self> {
        let scratch = ScratchDir::new("programs")?;
        let layout = programs::images(&scratch.path().join("layout"), whole)?;
        let registry = FaultyRegistry::start(layout.dir())?;
        let folder = scratch.path().join("index");
        let tags = whole.iter().map(|image| image.name()).chain(core.then_some(CORE));
        let indexes = tags.map(|tag| Index::build(Path::new(hermes()), &registry.image(tag), &folder));
        let index = indexes.collect::<Result<Vec<_>>>()?.pop().context("no image")?;
        Ok(Self { layout, registry, index, scratch })
    }

    /// Has `work` done on a host with containerd of `line`, which has pulled the image `tag` for both snapshotters, and
    /// removes the image again.
    fn on(&self, line: &str, tag: &str, work: impl FnOnce(&Rig<'_>) -> Result<()>) -> Result<()> {
        let host = lazy_host::installed(Path::new(hermes()), line, None)?;
        let arguments = lazy_host::arguments(&host, &self.index, &self.index.key);
        let arguments = arguments.iter().map(String::as_str).collect::<Vec<_>>();
        let state = self.scratch.path().join(format!("state-{line}"));
        let daemon = Daemon::start(Path::new(hermes()), &state, &arguments)?;
        let containerd = host.start()?;
        let image = self.registry.image(tag);
        cri::pull(&containerd.socket(), &image)?;
        let decided = daemon.status()?.pulls.into_iter().next_back().context("no image was pulled")?;
        ensure!(decided.decision == "lazy", "{decided:?}: {}", daemon.log());
        containerd.ctr_says(&["images", "pull", "--plain-http", "--snapshotter", THEIRS, &image])?;
        let before = self.registry.counters().blob_bytes;
        work(&Rig { images: self, line, containerd: &containerd, image, before })?;
        containerd.remove_all_images()?;
        drop(containerd);
        daemon.stop().map(drop)
    }
}

/// A containerd with an image that it has unpacked, and that it has from Hermes.
struct Rig<'a> {
    images: &'a Images,
    line: &'a str,
    containerd: &'a RunningContainerd<'a>,
    image: String,
    /// What the registry had served before.
    before: u64,
}

impl Rig<'_> {
    fn container<'b>(
        &'b self,
        snapshotter: &'b str,
        options: &'b [&'b str],
        command: &'b [&'b str],
    ) -> NewContainer<'b> {
        NewContainer { image: &self.image, snapshotter, options, command }
    }

    /// What a script finds in a container.
    fn found(&self, script: Script, snapshotter: &str, options: &[&str]) -> Result<String> {
        let found = self.container(snapshotter, options, &script.command()).run(self.containerd, "case")?;
        ensure!(found.trim_end().ends_with(THE_END), "containerd {}, {}: {found}", self.line, script.name);
        Ok(found)
    }

    /// Runs a script in a container of each kind and compares what it found.
    fn compare(&self, script: Script, options: &[&str], facts: &mut Comparison) -> Result<()> {
        let ours = self.found(script, OURS, options)?;
        self.was_lazy()?;
        let theirs = self.found(script, THEIRS, options)?;
        facts.add(&format!("containerd {}, {}", self.line, script.name), &theirs, &ours)
    }

    /// Runs the image's own service in a container of each kind, and compares what one beside it is answered.
    fn serve(&self, ask: Script, facts: &mut Comparison) -> Result<()> {
        let answer = |snapshotter: &str| {
            let container = self.container(snapshotter, &["--null-io"], &[]).start(self.containerd, "service")?;
            container.exec(&ask.command())
        };
        let ours = answer(OURS)?;
        self.was_lazy()?;
        facts.add(&format!("containerd {}, {}", self.line, self.image_name()), &answer(THEIRS)?, &ours)
    }

    /// What a container in a user namespace finds, the mapping of whose ids is left to the snapshotter.
    fn in_user_namespace(&self, snapshotter: &str) -> Result<String> {
        let mapping = ["--remap-labels", "--uidmap", "0:200000:65536", "--gidmap", "0:300000:65536"];
        let (before, options) = (self.fetched(), [&PRIVILEGED[..], &mapping[..]].concat());
        let found = self.found(NAMESPACE, snapshotter, &options)?;
        println!("containerd {}: {} bytes more for a user namespace", self.line, self.fetched() - before);
        Ok(found)
    }

    /// The image's name without registry and repository.
    fn image_name(&self) -> &str {
        self.image.rsplit(':').next().unwrap_or_default()
    }

    /// Compressed bytes that Hermes has read of the image since containerd unpacked it.
    fn fetched(&self) -> u64 {
        self.images.registry.counters().blob_bytes - self.before
    }

    /// Checks that less than all of the image was fetched.
    fn was_lazy(&self) -> Result<()> {
        let layers = self.images.layout.image(self.image_name())?.layers;
        let all: u64 = layers.iter().map(|layer| layer.blob_len_bytes).sum();
        println!("containerd {}: {} of {all} bytes of {} were fetched", self.line, self.fetched(), self.image_name());
        ensure!(self.fetched() < all, "all of the image was fetched");
        Ok(())
    }
}

/// What differs, because trees are EROFS and a container's changes are on another file system (docs/semantics.md).
const EXCEPTIONS: [&str; 5] =
    ["one device", "block sizes", "direct reads", "flags of files below", "copies by the kernel"];
/// What containerd's client takes away unless told otherwise: set-id programs, and flags of files.
const PRIVILEGED: [&str; 3] = ["--allow-new-privs", "--cap-add", "CAP_LINUX_IMMUTABLE"];

#[test]
fn files_and_privileges_are_as_on_overlayfs() -> Result<()> {
    let images = Images::new(&[], true)?;
    let mut facts = Comparison::default();
    let (mut namespaces, mut expected) = (Vec::new(), String::new());
    for line in LINES {
        let checked = images.on(line, CORE, |rig| {
            rig.compare(FILESYSTEM, &PRIVILEGED, &mut facts)?;
            rig.compare(PRIVILEGES, &PRIVILEGED, &mut facts)?;
            if line == "1.7" {
                rig.compare(PACKAGES, &PRIVILEGED, &mut facts)?;
            }
            rig.in_user_namespace(OURS).map(|found| namespaces.push((line, found)))?;
            if line == "2" {
                expected = rig.in_user_namespace(THEIRS)?;
            }
            Ok(())
        });
        checked.with_context(|| format!("containerd {line}"))?;
    }
    // Before 2.0 containerd's own snapshotter changes the owners of copies, by which set-id bits, capabilities and access
    // lists get lost.
    for (line, found) in namespaces {
        facts.add(&format!("containerd {line}, {}", NAMESPACE.name), &expected, &found)?;
    }
    facts.finish(&EXCEPTIONS)
}

#[test]
fn services_of_real_images_answer_as_on_overlayfs() -> Result<()> {
    let images = Images::new(&RealImage::ALL, false)?;
    let mut facts = Comparison::default();
    images.on("1.6", RealImage::Web.name(), |rig| rig.serve(ASK_BY_NODE, &mut facts))?;
    images.on("1.7", RealImage::Python.name(), |rig| {
        rig.serve(ASK_BY_PYTHON, &mut facts)?;
        rig.compare(NUMBERS, &[], &mut facts)
    })?;
    images.on("2", RealImage::Spark.name(), |rig| {
        rig.serve(ASK_BY_PYTHON, &mut facts)?;
        rig.compare(PIP, &["--user", "0"], &mut facts)
    })?;
    facts.finish(&[])
}
