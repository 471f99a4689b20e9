//! The images: real ones, which the tree's own tools make from packages, each with a next version in one changed layer.
//!
//! The next version is what a release is: some files of the program's own have other bytes, all else is as it was, its
//! layer is packed anew and has another name. Both versions lie in one layout, under the tags [`OLD`] and [`NEW`], so that
//! they are versions of one repository.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use hermes_image::ids::{ChunkId, ChunkNo, DiffId, Digest};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::statement::Statement;
use hermes_lab::command::run;
use hermes_lab::index::Index;
use hermes_registry::oci::{
    Descriptor, ImageConfig, Index as ManifestIndex, MAX_MANIFEST_BYTES, Manifest, Platform, media_type,
};
use hermes_registry::{Layout, LayoutWriter, WrittenLayer};
use hermes_snapshotter::index_folder::IndexFolder;

use super::sample::Facts;

/// The tag of the image as it was made.
pub(super) const OLD: &str = "v1";
/// The tag of its next version.
pub(super) const NEW: &str = "v2";
/// What is put before the content of the changed files of a Java program: archives may have anything before their first entry,
/// so all of their bytes move.
const ARCHIVE_PREFIX: &[u8] = &[b'#'; 512];

/// An image that `tools/images` makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Recipe {
    /// Its name on the command line and in tables.
    pub(super) name: &'static str,
    /// For people.
    title: &'static str,
    /// The layer that the next version changes, from the lowest.
    layer: usize,
    /// The folder of the changed files in it, and how their names begin.
    changed: (&'static str, &'static str),
    /// What is put before their content.
    prefix: &'static [u8],
}

/// All of them.
pub(super) const RECIPES: [Recipe; 3] = [
    Recipe {
        name: "spark",
        title: "Apache Spark master (Debian, OpenJDK 17, Spark 4)",
        layer: 3,
        changed: ("opt/spark/jars", "spark-"),
        prefix: ARCHIVE_PREFIX,
    },
    Recipe {
        name: "python",
        title: "Python service (numpy, scipy, pandas, scikit-learn)",
        layer: 3,
        changed: ("opt/app", "server.py"),
        prefix: b"# The next version.\n",
    },
    Recipe {
        name: "web",
        title: "Node service (express)",
        layer: 2,
        changed: ("app", "server.js"),
        prefix: b"// The next version.\n",
    },
];

/// Where the benchmark's own images are: a folder of layouts, each of which is a repository.
pub(super) struct Subject {
    /// Its name.
    pub(super) name: String,
    /// The port that it answers on.
    pub(super) port: u16,
    /// What is known of it.
    pub(super) facts: Facts,
    /// Whether it has a next version.
    pub(super) has_next: bool,
    layout: PathBuf,
    /// Compressed and uncompressed bytes of each layer of the old version.
    layers: BTreeMap<DiffId, (u64, u64)>,
}

impl Subject {
    /// Makes the repository `name` below `repositories` of the image with `tag` in the layout at `source`.
    pub(super) fn make(name: &str, source: &Path, tag: &str, repositories: &Path) -> anyhow::Result<Self> {
        let layout = repositories.join(name);
        let writer = LayoutWriter::create(&layout)?;
        let source = Layout::open(source)?;
        let image = source.find(tag)?;
        let image = of_this_machine(&source, image)?;
        let (manifest, config) = documents(&source, &image)?;
        for blob in manifest.layers.iter().chain([&manifest.config, &image]) {
            let place = layout.join("blobs/sha256").join(blob.digest.hex());
            let from = fs::canonicalize(source.blob_path(&blob.digest))?;
            std::os::unix::fs::symlink(from, place)?;
        }
        writer.tag(image, OLD)?;
        let port = exposed_port(&source, &manifest)?;
        let facts = Facts {
            title: name.to_owned(),
            compressed_bytes: manifest.layers.iter().map(|layer| layer.size).sum(),
            uncompressed_bytes: 0,
            layers: manifest.layers.len(),
            needed_bytes: None,
        };
        let sizes = config.rootfs.diff_ids.iter().zip(&manifest.layers).map(|(id, layer)| (*id, (layer.size, 0)));
        let layers = sizes.collect();
        Ok(Self { name: name.to_owned(), port, facts, has_next: false, layout, layers })
    }

    /// Makes that of a recipe, from the layout at `source`, with its next version.
    pub(super) fn of_recipe(recipe: &Recipe, source: &Path, repositories: &Path, work: &Path) -> anyhow::Result<Self> {
        let mut subject = Self::make(recipe.name, source, "latest", repositories)?;
        recipe.title.clone_into(&mut subject.facts.title);
        subject.add_next(recipe, work).with_context(|| format!("the next version of {}", recipe.name))?;
        subject.has_next = true;
        Ok(subject)
    }

    /// The name of a version on the command line.
    pub(super) fn in_layout(&self, tag: &str) -> String {
        format!("oci:{}:{tag}", self.layout.display())
    }

    /// The versions that there are.
    pub(super) fn tags(&self) -> &'static [&'static str] {
        if self.has_next { &[OLD, NEW] } else { &[OLD] }
    }

    /// Puts all blobs in `folder`, whose files are named after their digests, into its repository.
    pub(super) fn add_blobs(&self, folder: &Path) -> anyhow::Result<()> {
        let writer = LayoutWriter::create(&self.layout)?;
        for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let mut blob = writer.blob()?;
            blob.copy_from(File::open(entry?.path())?)?;
            blob.finish("application/octet-stream")?;
        }
        Ok(())
    }

    /// The manifest of the old version.
    pub(super) fn image(&self) -> anyhow::Result<Manifest> {
        self.manifest(&Layout::open(&self.layout)?.find(OLD)?.digest)
    }

    /// The manifest `digest` of its repository.
    pub(super) fn manifest(&self, digest: &Digest) -> anyhow::Result<Manifest> {
        let bytes = Layout::open(&self.layout)?.document(digest, MAX_MANIFEST_BYTES)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Reads all blobs, so that they come from memory when they are asked for.
    pub(super) fn warm(&self) -> anyhow::Result<()> {
        warm(&self.layout.join("blobs/sha256"))
    }

    /// The same for the layers of the old version in `folder`, where a node keeps them.
    pub(super) fn warm_layers(&self, folder: &Path) -> anyhow::Result<()> {
        self.layers.keys().try_for_each(|layer| warm_file(&folder.join(layer.hex())))
    }

    fn add_next(&self, recipe: &Recipe, work: &Path) -> anyhow::Result<()> {
        let layout = Layout::open(&self.layout)?;
        let (mut manifest, _) = documents(&layout, &layout.find(OLD)?)?;
        let old = manifest.layers.get(recipe.layer).context("the image has less layers than its recipe")?;
        let tree = work.join("next");
        fs::create_dir_all(&tree)?;
        // It sees by itself how the file is compressed.
        let mut tar = Command::new("tar");
        tar.args([
            "--extract",
            "--preserve-permissions",
            "--numeric-owner",
            "--xattrs",
            "--xattrs-include=*",
            "--file",
        ]);
        run(tar.arg(layout.blob_path(&old.digest)).arg("--directory").arg(&tree))?;
        let folder = tree.join(recipe.changed.0);
        let mut changed = 0;
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(recipe.changed.1) && entry.file_type()?.is_file() {
                // In place: owner and mode stay as they are.
                let content = [recipe.prefix, &fs::read(entry.path())?].concat();
                fs::write(entry.path(), content)?;
                changed += 1;
            }
        }
        ensure!(changed > 0, "no file {}/{}* in its layer", recipe.changed.0, recipe.changed.1);
        let writer = LayoutWriter::create(&self.layout)?;
        let layer = pack(&writer, &tree, work)?;
        fs::remove_dir_all(&tree)?;
        let mut config: serde_json::Value =
            serde_json::from_slice(&fs::read(layout.blob_path(&manifest.config.digest))?)?;
        config["rootfs"]["diff_ids"][recipe.layer] = serde_json::to_value(layer.diff_id)?;
        manifest.layers[recipe.layer] = layer.descriptor;
        manifest.config = writer.document(media_type::OCI_CONFIG, &serde_json::to_vec(&config)?)?;
        let image = writer.document(media_type::OCI_MANIFEST, &serde_json::to_vec(&manifest)?)?;
        let platform = layout.find(OLD)?.platform;
        Ok(writer.tag(Descriptor { platform, ..image }, NEW)?)
    }

    /// Reads from the index how long the layers are, and takes `touched` of them as what a start reads: uncompressed bytes
    /// by layer. Each layer's share is taken as compressed as the layer is.
    pub(super) fn learn(&mut self, index: &Index, touched: &BTreeMap<DiffId, u64>) -> anyhow::Result<()> {
        for (diff_id, table) in self.chunks(index, OLD)? {
            if let Some((_, len_bytes)) = self.layers.get_mut(&diff_id) {
                *len_bytes = table.logical_len_bytes();
            }
        }
        self.facts.uncompressed_bytes = self.layers.values().map(|(_, len_bytes)| len_bytes).sum();
        let needed = touched.iter().filter_map(|(layer, bytes)| {
            let (compressed, uncompressed) = self.layers.get(layer)?;
            Some(*bytes as f64 * *compressed as f64 / (*uncompressed).max(1) as f64)
        });
        let needed_bytes: f64 = needed.sum();
        if !touched.is_empty() {
            self.facts.needed_bytes = Some(needed_bytes as u64);
        }
        Ok(())
    }

    /// The chunks of a version's layers.
    pub(super) fn chunks(&self, index: &Index, tag: &str) -> anyhow::Result<BTreeMap<DiffId, ChunkTable>> {
        let manifest = Layout::open(&self.layout)?.find(tag)?.digest;
        let folder = IndexFolder::new(&index.folder);
        let signed = folder.statement(manifest)?.with_context(|| format!("no index of {}:{tag}", self.name))?;
        let statement = Statement::open(&signed, manifest, &[index.key.parse()?])?;
        let tables = statement.layers.iter().map(|layer| {
            let bytes = folder.artifact(layer.chunks)?.context("a chunk table is missing")?;
            let table = ChunkTable::decode(bytes.into_inner())?;
            Ok((table.diff_id(), table))
        });
        tables.collect()
    }
}

/// Chunks of `tables`, by their names.
pub(super) fn names(tables: &BTreeMap<DiffId, ChunkTable>) -> BTreeSet<ChunkId> {
    let all = tables.values().flat_map(|table| (0..table.count()).map(|no| table.chunk_id(ChunkNo(no))));
    all.collect()
}

/// Reads all files of a folder, so that they are in the page cache.
fn warm(folder: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        warm_file(&entry?.path())?;
    }
    Ok(())
}

fn warm_file(path: &Path) -> anyhow::Result<()> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    std::io::copy(&mut file, &mut std::io::sink())?;
    Ok(())
}

/// The manifest of this machine's platform below `image`, which may be an index over several.
fn of_this_machine(layout: &Layout, image: Descriptor) -> anyhow::Result<Descriptor> {
    let bytes = fs::read(layout.blob_path(&image.digest))?;
    let Ok(index) = serde_json::from_slice::<ManifestIndex>(&bytes) else { return Ok(image) };
    if index.manifests.is_empty() {
        return Ok(image);
    }
    let found = index.select(&Platform::host());
    found.cloned().map_err(|platforms| anyhow::anyhow!("the image is not for this machine, but for {platforms:?}"))
}

/// What a manifest and its configuration say.
fn documents(layout: &Layout, image: &Descriptor) -> anyhow::Result<(Manifest, ImageConfig)> {
    let manifest: Manifest = serde_json::from_slice(&fs::read(layout.blob_path(&image.digest))?)?;
    let config = serde_json::from_slice(&fs::read(layout.blob_path(&manifest.config.digest))?)?;
    Ok((manifest, config))
}

/// The first port that the image exposes over TCP.
fn exposed_port(layout: &Layout, manifest: &Manifest) -> anyhow::Result<u16> {
    let config: serde_json::Value = serde_json::from_slice(&fs::read(layout.blob_path(&manifest.config.digest))?)?;
    let ports = config["config"]["ExposedPorts"].as_object();
    let mut numbers = ports.into_iter().flatten().filter_map(|(port, _)| port.trim_end_matches("/tcp").parse().ok());
    numbers.next().context("the image exposes no port")
}

/// Packs `tree` into a gzip layer, in the form in which `tools/images` does.
fn pack(writer: &LayoutWriter, tree: &Path, work: &Path) -> anyhow::Result<WrittenLayer> {
    let plain = work.join("next.tar");
    let mut names = fs::read_dir(tree)?.map(|entry| Ok(entry?.file_name())).collect::<anyhow::Result<Vec<_>>>()?;
    names.sort();
    let mut tar = Command::new("tar");
    tar.args([
        "--create",
        "--format=posix",
        "--numeric-owner",
        "--pax-option=delete=atime,delete=ctime",
        "--sort=name",
    ]);
    tar.args(["--xattrs", "--xattrs-include=*", "--xattrs-exclude=trusted.*", "--file"]).arg(&plain);
    run(tar.arg("--directory").arg(tree).arg("--").args(names))?;
    let scratch = work.join("next.layout");
    let diff_id = LayoutWriter::create(&scratch)?.layer_tar(File::open(&plain)?)?.diff_id;
    let mut gzip = Command::new("gzip")
        .args(["-n", "-6", "--stdout"])
        .stdin(File::open(&plain)?)
        .stdout(Stdio::piped())
        .spawn()
        .context("start gzip")?;
    let stream = gzip.stdout.take().context("gzip has no output")?;
    let layer = writer.layer_blob(stream, media_type::OCI_LAYER_GZIP, diff_id)?;
    ensure!(gzip.wait()?.success(), "gzip could not pack the layer");
    fs::remove_file(&plain)?;
    fs::remove_dir_all(&scratch)?;
    Ok(layer)
}
