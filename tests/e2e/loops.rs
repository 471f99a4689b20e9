//! Kernel EROFS through loop devices, as kernels of 6.4 to 6.11 need it: the same bytes, and no device is left behind,
//! neither by an unmount nor by a daemon that is killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_snapshotter::status::Way;
use hermes_tests::compress::Compression;
use hermes_tests::daemon::Daemon;
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::layout::NewLayer;
use hermes_tests::sample::{Sample, SampleIndex, TAG};
use hermes_tests::tarball::{Entry, Tarball, header};
use serde_json::json;

/// How long the kernel may take to free a device whose last user is gone.
const DETACH_DEADLINE: Duration = Duration::from_secs(10);
/// The tag of an image whose last layer ends in the middle of a block.
const ODD_TAG: &str = "odd";
/// Length of that image's one file, in bytes.
const ODD_LEN_BYTES: usize = 100_003;

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// The files below `root` that loop devices are attached to, by the kernel's own list.
fn attached(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for device in fs::read_dir("/sys/block")? {
        // Only there while the device has a file.
        let Ok(file) = fs::read_to_string(device?.path().join("loop/backing_file")) else { continue };
        let file = PathBuf::from(file.trim_end());
        files.extend(file.starts_with(root).then_some(file));
    }
    files.sort();
    Ok(files)
}

struct Rig {
    sample: Sample,
    index: SampleIndex,
    daemon: Option<Daemon>,
    scratch: ScratchDir,
}

impl Rig {
    fn new() -> Result<Self> {
        let scratch = ScratchDir::new("loops")?;
        let sample = Sample::new(&scratch.path().join("layout"))?;
        let index = sample.build_index(hermes(), scratch.path())?;
        let mut rig = Self { sample, index, daemon: None, scratch };
        rig.start()?;
        Ok(rig)
    }

    fn start(&mut self) -> Result<()> {
        let state = self.scratch.path().join("state");
        self.daemon = Some(Daemon::start(hermes(), &state, &["--erofs-backing", "loop-devices"])?);
        Ok(())
    }

    fn daemon(&self) -> Result<&Daemon> {
        self.daemon.as_ref().context("the daemon runs")
    }

    fn command(&self, name: &str, dir: &Path) -> Result<()> {
        let output = self.daemon()?.run(&[name, dir.to_str().context("UTF-8")?])?;
        ensure!(output.status.success(), "{name}: {output:?}");
        Ok(())
    }

    /// Shows the image `tag` by the kernel over complete layer files.
    fn mount_complete(&self, tag: &str) -> Result<PathBuf> {
        let dir = self.scratch.path().join("image");
        let image = format!("oci:{}:{tag}", self.sample.layout.dir().display());
        self.daemon()?.mount(&image, &dir, &self.index, &["--way", "fuse-tree"])?;
        self.command("complete", &dir)?;
        self.command("unmount", &dir)?;
        self.daemon()?.mount(&image, &dir, &self.index, &["--way", "erofs-files"])?;
        Ok(dir)
    }

    /// What EROFS reads of all mounted images: trees and layers.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let images = self.daemon()?.status()?.images;
        let mut files: Vec<_> =
            images.into_iter().flat_map(|image| [vec![image.tree_path], image.layer_paths].concat()).collect();
        files.sort();
        Ok(files)
    }

    fn assert_none_attached(&self) -> Result<()> {
        let root = self.scratch.path();
        wait_for("the end of the loop devices", DETACH_DEADLINE, || attached(root).ok().filter(Vec::is_empty))
            .with_context(|| format!("attached: {:?}", attached(root)))?;
        Ok(())
    }
}

#[test]
fn complete_layers_are_read_through_loop_devices_that_go_with_the_mount() -> Result<()> {
    let rig = Rig::new()?;
    let dir = rig.mount_complete(TAG)?;
    let status = rig.daemon()?.status()?;
    let way = status.ways.iter().find(|way| way.way == Way::ErofsFiles).context("the way is listed")?;
    ensure!(way.available && way.detail == "through loop-devices", "{way:?}");
    ensure!(attached(rig.scratch.path())? == rig.files()?, "{:?}", attached(rig.scratch.path()));
    rig.sample.check(&dir)?;
    rig.command("unmount", &dir)?;
    rig.assert_none_attached()
}

/// A stream that ends within a block is accepted, as containerd does; its last block is read too.
#[test]
fn the_last_block_of_an_odd_layer_is_read_through_a_loop_device() -> Result<()> {
    let rig = Rig::new()?;
    let content: Vec<u8> = (0..ODD_LEN_BYTES).map(|at| (at % 251) as u8 + 1).collect();
    let entry = Entry::file("last", content.clone());
    let mut tar = Tarball::new();
    tar.raw(&header(&entry)).raw(&content);
    let layer = NewLayer { tar: tar.unfinished(), compression: Compression::Plain };
    rig.sample.layout.add(ODD_TAG, &[layer], &json!({}))?;
    let image = format!("oci:{}:{ODD_TAG}", rig.sample.layout.dir().display());
    let dir = rig.scratch.make("image")?;
    let mount = |way: &str| -> Result<()> {
        let output = rig.daemon()?.run(&["mount", &image, dir.to_str().context("UTF-8")?, "--way", way])?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    };
    mount("fuse-tree")?;
    rig.command("complete", &dir)?;
    rig.command("unmount", &dir)?;
    mount("erofs-files")?;
    ensure!(fs::read(dir.join("last"))? == content, "wrong bytes");
    rig.command("unmount", &dir)?;
    rig.assert_none_attached()
}

#[test]
fn a_killed_daemon_leaves_no_loop_device_once_its_mounts_are_cleared_away() -> Result<()> {
    let mut rig = Rig::new()?;
    let dir = rig.mount_complete(TAG)?;
    let daemon = rig.daemon.take().context("the daemon runs")?;
    // Clears the mounts away as well.
    daemon.kill(rig.scratch.path())?;
    rig.assert_none_attached()?;
    // And the next daemon on the same folder shows it again.
    rig.start()?;
    let again = rig.mount_complete(TAG)?;
    ensure!(again == dir);
    rig.sample.check(&again)?;
    rig.command("unmount", &again)?;
    rig.assert_none_attached()
}
