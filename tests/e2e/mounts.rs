//! What one mount leaves to the next: layers that two images share, trust that was given once, and names whose registry
//! is away.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use hermes_store::{Store, StoreConfig};
use hermes_tests::compress::Compression;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::layout::NewLayer;
use hermes_tests::node::Index;
use hermes_tests::sample::{Sample, SampleIndex, TAG};
use hermes_tests::tarball::{Entry, Tarball};
use serde_json::json;

/// How long reads wait: long enough that only a hang reaches it.
const DEADLINE_MS: &str = "30000";

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

struct Rig {
    daemon: Daemon,
    sample: Sample,
    index: SampleIndex,
    scratch: ScratchDir,
}

impl Rig {
    fn new() -> Result<Self> {
        let scratch = ScratchDir::new("mounts")?;
        let sample = Sample::new(&scratch.path().join("layout"))?;
        let index = sample.build_index(hermes(), scratch.path())?;
        let state = scratch.path().join("state");
        let daemon = Daemon::start(hermes(), &state, &["--read-deadline-ms", DEADLINE_MS, "--way", "erofs-fuse"])?;
        Ok(Self { daemon, sample, index, scratch })
    }

    fn registry(&self) -> Result<FaultyRegistry> {
        FaultyRegistry::start(self.sample.layout.dir())
    }

    fn mount(&self, image: &str, name: &str) -> Result<PathBuf> {
        let dir = self.scratch.path().join(name);
        self.daemon.mount(image, &dir, &self.index, &[])?;
        Ok(dir)
    }

    fn command(&self, name: &str, dir: &Path) -> Result<()> {
        let output = self.daemon.run(&[name, dir.to_str().context("UTF-8")?])?;
        ensure!(output.status.success(), "{name}: {output:?}");
        Ok(())
    }

    /// The layer files that are served to the kernel, besides the probe's.
    fn served(&self) -> Result<usize> {
        Ok(std::fs::read_dir(self.scratch.path().join("state/layers"))?.count() - 1)
    }
}

/// Two images, one from each registry, with the same layers. Whichever registry refuses, the other one's is read.
#[test]
fn a_shared_layer_is_read_from_either_images_registry() -> Result<()> {
    for (refusing, fault) in [(0, Fault::Status(404)), (1, Fault::Status(403)), (0, Fault::Hang)] {
        let rig = Rig::new()?;
        let registries = [rig.registry()?, rig.registry()?];
        let first = rig.mount(&registries[0].image(TAG), "first")?;
        let second = rig.mount(&registries[1].image(TAG), "second")?;
        registries[refusing].always(fault);
        for dir in [&first, &second] {
            rig.sample.check(dir).with_context(|| format!("{refusing} {fault:?}: {}", rig.daemon.log()))?;
        }
    }
    Ok(())
}

#[test]
fn a_shared_layer_outlives_the_image_that_opened_it() -> Result<()> {
    let rig = Rig::new()?;
    let (first, second) = (rig.registry()?, rig.registry()?);
    let opened = rig.mount(&first.image(TAG), "first")?;
    let shared = rig.mount(&second.image(TAG), "second")?;
    rig.sample.check_file(&opened, "gzip/small")?;
    ensure!(rig.served()? == 3, "{} layers are served", rig.served()?);
    rig.command("unmount", &opened)?;
    drop(first);
    ensure!(rig.served()? == 3, "{} layers are served", rig.served()?);
    rig.sample.check(&shared).with_context(|| rig.daemon.log())?;
    rig.command("unmount", &shared)?;
    ensure!(rig.served()? == 0, "{} layers are served with nothing mounted", rig.served()?);
    // The kernel remembers the names of layer files; they mean the same when they come back.
    let again = rig.mount(&second.image(TAG), "third")?;
    rig.sample.check(&again).with_context(|| rig.daemon.log())
}

/// Who pushes an image compresses its layers anew: the same layers, in other blobs with other restart points. Whichever image
/// opened them, and whichever goes or is refused, what is read is right.
#[test]
fn layers_that_two_images_compress_in_different_ways_are_read_from_either() -> Result<()> {
    let kinds = [Compression::Zstd, Compression::GzipMembers { member_len_bytes: 400_000 }, Compression::Gzip(1)];
    for refusing in [None, Some(0), Some(1)] {
        let rig = Rig::new()?;
        let scratch = rig.scratch.make("other-image")?;
        let other = rig.sample.compressed_as(&scratch.join("layout"), &kinds)?;
        let registries = [rig.registry()?, FaultyRegistry::start(other.layout.dir())?];
        let first = rig.mount(&registries[0].image(TAG), "first")?;
        let second = rig.scratch.path().join("second");
        rig.daemon.mount(&registries[1].image(TAG), &second, &other.build_index(hermes(), &scratch)?, &[])?;
        rig.sample.check_file(&first, "gzip/small")?;
        match refusing {
            Some(refusing) => registries[refusing].always(Fault::Status(404)),
            None => rig.command("unmount", &first)?,
        }
        let read = |dir| rig.sample.check(dir).with_context(|| format!("{refusing:?}: {}", rig.daemon.log()));
        read(&second)?;
        if refusing.is_some() {
            read(&first)?;
        }
    }
    Ok(())
}

/// A refusal is remembered for a minute, but not against a new mount of the same image.
#[test]
fn mounting_again_asks_a_registry_that_has_refused() -> Result<()> {
    let rig = Rig::new()?;
    let registry = rig.registry()?;
    let dir = rig.mount(&registry.image(TAG), "image")?;
    registry.always(Fault::Status(403));
    ensure!(rig.sample.check_file(&dir, "gzip/first").is_err(), "read what the registry refuses");
    registry.always(Fault::Pass);
    let second = rig.mount(&registry.image(TAG), "second")?;
    rig.sample.check(&second)?;
    rig.sample.check(&dir)
}

#[test]
fn trust_is_for_the_request_that_gives_it() -> Result<()> {
    let rig = Rig::new()?;
    let registry = rig.registry()?;
    let dir = rig.mount(&registry.image(TAG), "image")?;
    let other = rig.scratch.make("other")?;
    let index = rig.index.folder.to_str().context("UTF-8")?;
    let arguments = ["mount", &registry.image(TAG), other.to_str().context("UTF-8")?, "--no-build", "--index", index];
    let untrusted = rig.daemon.run(&arguments)?;
    let said = String::from_utf8_lossy(&untrusted.stderr).into_owned();
    ensure!(untrusted.status.code() == Some(4) && said.contains("--trust"), "{untrusted:?}");
    // What was mounted with trust stays.
    rig.sample.check(&dir)
}

/// Everything is on the node: an image that was mounted here is mounted again without its registry, by tag and by
/// digest, and it is said so.
#[test]
fn an_image_that_is_known_is_mounted_while_its_registry_is_away() -> Result<()> {
    let rig = Rig::new()?;
    let registry = rig.registry()?;
    let by_tag = registry.image(TAG);
    let by_digest = by_tag.replace(&format!(":{TAG}"), &format!("@{}", rig.sample.image.manifest));
    let dir = rig.mount(&by_tag, "image")?;
    rig.command("complete", &dir)?;
    rig.command("unmount", &dir)?;
    let unknown = by_tag.replace(TAG, "other");
    drop(registry);
    for (image, name) in [(&by_tag, "by-tag"), (&by_digest, "by-digest")] {
        let dir = rig.mount(image, name).with_context(|| rig.daemon.log())?;
        rig.sample.check(&dir)?;
    }
    ensure!(rig.daemon.log().contains("the registry does not answer"), "{}", rig.daemon.log());
    let error = rig.mount(&unknown, "unknown").expect_err("nobody knows it").to_string();
    ensure!(error.contains("no connection"), "{error}");
    Ok(())
}

/// A tag means what the registry says while it answers, and what it said last while it does not.
#[test]
fn a_tag_that_has_moved_is_never_what_it_was_before() -> Result<()> {
    let rig = Rig::new()?;
    let registry = rig.registry()?;
    let image = registry.image(TAG);
    let old = rig.mount(&image, "old")?;
    rig.command("complete", &old)?;
    let tar = Tarball::of([Entry::file("moved", "the tag has moved")]);
    rig.sample.layout.add(TAG, &[NewLayer { tar, compression: Compression::Plain }], &json!({}))?;
    let index = rig.sample.build_index(hermes(), rig.scratch.path())?;
    let mount = |name: &str| -> Result<String> {
        let dir = rig.scratch.path().join(name);
        rig.daemon.mount(&image, &dir, &index, &[])?;
        Ok(std::fs::read_to_string(dir.join("moved"))?)
    };
    ensure!(mount("new")? == "the tag has moved");
    rig.sample.check(&old)?;
    drop(registry);
    ensure!(mount("away")? == "the tag has moved");
    Ok(())
}

/// An image that nothing needs is known until others were used after it: then it goes with all that only it had.
#[test]
fn images_that_nothing_needs_are_forgotten_but_for_the_last() -> Result<()> {
    let rig = Rig::new()?;
    let tar = Tarball::of([Entry::file("one", "of the last image")]);
    rig.sample.layout.add("last", &[NewLayer { tar, compression: Compression::Plain }], &json!({}))?;
    let registry = rig.registry()?;
    let (old, last) = (registry.image(TAG), registry.image("last"));
    let index = Index::build(hermes(), &last, &rig.scratch.path().join("index-of-last"))?;
    let index = SampleIndex { folder: index.folder, key: index.key };
    let use_image = |image: &str, index: &SampleIndex| -> Result<()> {
        let dir = rig.scratch.path().join("image");
        rig.daemon.mount(image, &dir, index, &[])?;
        rig.command("complete", &dir)?;
        rig.command("unmount", &dir)
    };
    use_image(&old, &rig.index)?;
    // Uses are told apart by seconds.
    let second = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let before = second();
    wait_for("the next second", Duration::from_secs(10), || (second() > before).then_some(()))?;
    use_image(&last, &index)?;
    drop(registry);
    let Rig { daemon, sample, index: of_old, scratch } = rig;
    daemon.stop()?;
    let daemon = Daemon::start(hermes(), &scratch.path().join("state"), &["--keep-images", "1"])?;
    wait_for("the end of the old image", Duration::from_secs(30), || daemon.log().contains("forgotten").then_some(()))?;
    let dir = scratch.path().join("image");
    let error = daemon.mount(&old, &dir, &of_old, &[]).expect_err("nobody knows it any more").to_string();
    ensure!(error.contains("no connection"), "{error}");
    daemon.mount(&last, &dir, &index, &[])?;
    ensure!(std::fs::read(dir.join("one"))? == b"of the last image");
    daemon.stop()?;
    let store = Store::open(StoreConfig::new(scratch.path().join("state/store")))?;
    let images = store.images()?;
    ensure!(images.len() == 1 && images[0].reference == last, "{images:?}");
    for layer in &sample.image.layers {
        ensure!(store.open_layer(layer.diff_id).is_none(), "layer {} is left", layer.diff_id);
    }
    // Of the layer and of the probe's, and the tree.
    let artifacts = std::fs::read_dir(scratch.path().join("state/store/artifacts"))?.count();
    ensure!(artifacts <= 4 + 1 + 1, "{artifacts} artifacts are left");
    Ok(())
}
