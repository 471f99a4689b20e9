//! What benchmarks read: a tree with one big file and many small ones, on ext4 and as an image.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use hermes_registry::oci::Platform;
use hermes_registry::{LayoutWriter, WrittenLayer};

use super::workload::next_random;

/// Folders that the small files are spread over.
const FOLDERS: u64 = 200;
/// Small files are between half and one and a half of this long: what scripting languages' packages look like.
const SMALL_LEN_BYTES: u64 = 8 * 1024;

/// The tree on ext4 and the layout of an image of it.
pub(super) struct Stage {
    /// The tree.
    pub(super) tree: PathBuf,
    /// The layout.
    pub(super) layout: PathBuf,
}

impl Stage {
    /// Makes both below `work`.
    pub(super) fn make(work: &Path, big_len_bytes: u64, small_files: u64) -> anyhow::Result<Self> {
        let tree = work.join("tree");
        make_tree(&tree, big_len_bytes, small_files)?;
        let layout = work.join("layout");
        let writer = LayoutWriter::create(&layout)?;
        let layer = pack(&writer, &tree)?;
        let image = writer.image(&Platform::host(), &serde_json::json!({}), &[layer])?;
        writer.tag(image, "latest")?;
        Ok(Self { tree, layout })
    }

    /// The image's name on the command line.
    pub(super) fn image(&self) -> String {
        format!("oci:{}", self.layout.display())
    }

    /// The big file below `root`.
    pub(super) fn big(root: &Path) -> PathBuf {
        root.join("big.bin")
    }

    /// The small files' folder below `root`.
    pub(super) fn small(root: &Path) -> PathBuf {
        root.join("small")
    }
}

/// Packs a tree into a layer.
pub(super) fn pack(writer: &LayoutWriter, tree: &Path) -> anyhow::Result<WrittenLayer> {
    let mut tar = Command::new("tar")
        .args(["--create", "--format=pax", "--sort=name", "--numeric-owner", "--file=-", "--directory"])
        .arg(tree)
        .arg(".")
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start tar")?;
    let stream = tar.stdout.take().context("tar has no output")?;
    let layer = writer.layer_tar(stream)?;
    if !tar.wait()?.success() {
        bail!("tar could not pack the benchmark's tree");
    }
    Ok(layer)
}

fn make_tree(tree: &Path, big_len_bytes: u64, small_files: u64) -> anyhow::Result<()> {
    let mut state = 0x5851_f42d_4c95_7f2d;
    fs::create_dir_all(tree)?;
    let mut big = BufWriter::new(File::create(Stage::big(tree))?);
    for _ in 0..big_len_bytes / 8 {
        big.write_all(&next_random(&mut state).to_le_bytes())?;
    }
    big.into_inner()?.sync_all()?;
    for folder in 0..FOLDERS {
        fs::create_dir_all(Stage::small(tree).join(format!("package-{folder:03}")))?;
    }
    for file in 0..small_files {
        let len = SMALL_LEN_BYTES / 2 + next_random(&mut state) % SMALL_LEN_BYTES;
        let bytes: Vec<u8> = (0..len / 8).flat_map(|_| next_random(&mut state).to_le_bytes()).collect();
        let folder = Stage::small(tree).join(format!("package-{:03}", file % FOLDERS));
        fs::write(folder.join(format!("module_{file:05}.py")), bytes)?;
    }
    Ok(())
}
