//! Every way to show a tree shows the one that containerd unpacks, for real images and for the odd ones.
//!
//! Each image is indexed with the real command from its layout, and mounted lazily over FUSE on one node and lazily by
//! the kernel on another, so that both begin with nothing; then the second one is completed and the kernel mounts the
//! layer files themselves. All three are compared in everything that `hermes_tests::compare` looks at, content
//! included, with what containerd's overlayfs snapshotter unpacked. Where containerd refuses an image GNU tar is the
//! oracle. That the other reference programs agree with containerd, on the same images, is shown by the tests of the
//! crate `hermes-tests` (`real_images`, `odd`).
//!
//! What is excepted is what docs/semantics.md excepts: the mtime of directories that the unpacking itself touched, and
//! the root's metadata. Overlayfs shows the link count of the lower inode, so counts are held against the names in the
//! tree instead.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::SystemTime;

use anyhow::{Context as _, Result, ensure};
use hermes_snapshotter::status::Way;
use hermes_tests::compare::{Exceptions, compare};
use hermes_tests::fsck::fsck;
use hermes_tests::guard::ScratchDir;
use hermes_tests::images::{RealImage, TAG};
use hermes_tests::layout::Layout;
use hermes_tests::node::{Index, Mount, TestNode};
use hermes_tests::odd::{OddImage, Oracles, images, random};
use hermes_tests::snapshot::{Kind, Snapshot};
use hermes_tests::unpack::{Containerd, Snapshotter, gnu_tar};

const SEED: u64 = 1;
/// Random images; each takes a second.
const RANDOM_COUNT: u64 = 20;
/// Small images that are checked at once: most of the time of each is the disk's, for what is made durable.
const WORKERS: usize = 4;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// The tree that an image must have, and what of it is not compared.
struct Expected {
    tree: Snapshot,
    exceptions: Exceptions,
}

impl Expected {
    fn unpack(containerd: &Containerd, layout: &Layout, tag: &str, oracles: Oracles) -> Result<Self> {
        let scratch = ScratchDir::new("expected")?;
        let since = SystemTime::now();
        let target = scratch.make("tree")?;
        let tree = if oracles == Oracles::GnuTar {
            gnu_tar(layout, tag, &target)?;
            Snapshot::take(&target)?
        } else {
            let mounted = containerd.unpack(layout, tag, Snapshotter::Overlayfs, &target)?;
            Snapshot::take(mounted.path())?
        };
        ensure!(tree.nodes.len() > 1, "the oracle's tree is empty");
        let exceptions = Exceptions {
            directory_mtimes_since: Some(since),
            root_metadata: true,
            link_counts: true,
            ..Exceptions::default()
        };
        Ok(Self { tree, exceptions })
    }

    fn compare(&self, dir: &Path, way: &str) -> Result<()> {
        let actual = Snapshot::take(dir).with_context(|| format!("read the tree as {way}"))?;
        let differences = compare(&self.tree, &actual, &self.exceptions);
        ensure!(differences.is_empty(), "{way}: {differences}");
        for (path, node) in &actual.nodes {
            let names = node.names.len() as u64;
            let counts = matches!(node.kind, Kind::Directory) || node.link_count == names;
            let path = path.escape_ascii();
            ensure!(counts, "{way}: /{path} has {names} names and a link count of {}", node.link_count);
        }
        Ok(())
    }
}

/// Two nodes, one for each lazy way, and the indexes that they read.
struct Nodes {
    fuse_tree: TestNode,
    erofs: TestNode,
    indexes: PathBuf,
    // Last: the nodes read it until they end.
    _dir: ScratchDir,
}

impl Nodes {
    fn start() -> Result<Self> {
        let dir = ScratchDir::new("indexes")?;
        let (fuse_tree, erofs) = (TestNode::start(program(), "fuse-tree")?, TestNode::start(program(), "erofs")?);
        Ok(Self { fuse_tree, erofs, indexes: dir.make("indexes")?, _dir: dir })
    }

    /// Shows the image in all three ways and compares each with what is expected.
    fn check(&self, layout: &Layout, tag: &str, expected: &Expected) -> Result<()> {
        let image = format!("oci:{}:{tag}", layout.dir().display());
        let index = Index::build(program(), &image, &self.indexes.join(tag))?;
        let mount = |way| Mount {
            image: &image,
            way: Some(way),
            index_folder: Some(&index.folder),
            trusted_key: &index.key,
            peers: &[],
        };

        let dir = self.fuse_tree.mount(tag, &mount(Way::FuseTree))?;
        expected.compare(&dir, "fuse-tree")?;
        let tree = self.fuse_tree.image(&dir)?.tree_path;
        self.fuse_tree.unmount(&dir)?;

        let dir = self.erofs.mount(tag, &mount(Way::ErofsFuse))?;
        expected.compare(&dir, "erofs-fuse")?;
        self.erofs.complete(&dir)?;
        self.erofs.unmount(&dir)?;

        let dir = self.erofs.mount(tag, &mount(Way::ErofsFiles))?;
        let status = self.erofs.image(&dir)?;
        ensure!(status.present_bytes == status.total_bytes, "completed, and not all is here: {status:?}");
        expected.compare(&dir, "erofs-files")?;
        fsck(&status.tree_path, &status.layer_paths)?;
        // Artifacts are named by their content, so what was just checked is the other node's tree as well.
        ensure!(status.tree_path.file_name() == tree.file_name(), "the nodes made different trees");
        self.erofs.unmount(&dir)
    }
}

fn real_image_is_the_same(image: RealImage) -> Result<()> {
    let layout = image.layout()?;
    let expected = Expected::unpack(&Containerd::start()?, &layout, TAG, Oracles::All)?;
    Nodes::start()?.check(&layout, TAG, &expected)
}

#[test]
fn spark_is_the_same_in_every_way() -> Result<()> {
    real_image_is_the_same(RealImage::Spark)
}

#[test]
fn web_is_the_same_in_every_way() -> Result<()> {
    real_image_is_the_same(RealImage::Web)
}

#[test]
fn python_is_the_same_in_every_way() -> Result<()> {
    real_image_is_the_same(RealImage::Python)
}

/// Checks all images on the same containerd and the same two nodes, several at a time.
fn odd_images_are_the_same(images: &[OddImage]) -> Result<()> {
    let containerd = Containerd::start()?;
    let nodes = Nodes::start()?;
    let scratch = ScratchDir::new("layouts")?;
    let check = |image: &OddImage| {
        // A layout of its own: ctr reads all blobs of an archive.
        let layout = Layout::create(&scratch.path().join(&image.tag))?;
        image.write(&layout)?;
        let expected = Expected::unpack(&containerd, &layout, &image.tag, image.oracles)?;
        nodes.check(&layout, &image.tag, &expected)
    };
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(image) = images.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = check(image) {
                failures.lock().expect("no worker panics").push(format!("{}: {error:#}", image.tag));
            }
        }
    };
    thread::scope(|scope| (0..WORKERS).for_each(|_| drop(scope.spawn(work))));
    let failures = failures.into_inner().expect("no worker panics");
    assert!(failures.is_empty(), "{} images differ:\n{}", failures.len(), failures.join("\n\n"));
    Ok(())
}

#[test]
fn odd_images_are_the_same_in_every_way() -> Result<()> {
    odd_images_are_the_same(&images(SEED))
}

#[test]
fn random_images_are_the_same_in_every_way() -> Result<()> {
    odd_images_are_the_same(&(0..RANDOM_COUNT).map(random).collect::<Vec<_>>())
}
