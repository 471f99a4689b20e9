//! `hermes bench full`: all of an image from a fast registry, against inflate on all cores and against containerd's pull.
//!
//! The registry is this process, on loopback and without a limit, so that what is measured is what becomes of the bytes: fetched,
//! inflated, checked chunk by chunk and stored by Hermes; fetched, checked, inflated and unpacked into an overlay's folders by
//! containerd. Registry and node share the cores, so the parts of the work are measured by themselves, too: no more than all cores
//! busy with these and nothing else is possible here.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use futures::TryStreamExt as _;
use hermes_image::ids::ChunkId;
use hermes_lab::containerds::Host;
use hermes_lab::process::processor_time;
use hermes_origin::{Origin, ResolvedImage};
use hermes_registry::{Layout, Registry};
use hermes_snapshotter::index_folder::IndexFolder;
use hermes_snapshotter::node::keys;

use super::report::{self, Line};
use super::{index, tools};
use crate::commands::ImageArgs;
use crate::commands::child::{ChildMount, ChildNode};

/// Arguments of `hermes bench full`.
#[derive(Debug, Args)]
pub(crate) struct FullArgs {
    /// An OCI layout whose layers are gzip's, as oci:PATH.
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Rounds; the best of each figure counts, because noise only ever adds.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// The folder with the tool that unpacks containerd, as in the source tree.
    #[arg(long, value_name = "DIR", default_value = "tools")]
    tools: PathBuf,
    /// Where Hermes keeps what it has; must be on the disk that is to be measured, as must $TMPDIR, where containerd keeps its own.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Length of the pieces that are hashed, as chunks have, and of those that are written, in bytes.
const HASHED_LEN_BYTES: usize = 64 * 1024;
/// As many chunks as are written together.
const WRITTEN_LEN_BYTES: usize = 8 * HASHED_LEN_BYTES;
/// How long fetching all layers may take.
const FETCH_MAX: Duration = Duration::from_secs(600);

/// Best seconds of each.
struct Best {
    ours: f64,
    theirs: f64,
    inflate: f64,
}

/// Seconds of processor time that parts of the work take by themselves.
struct Parts {
    inflate: f64,
    hash: f64,
    write: f64,
    /// Both ends.
    fetch: f64,
}

impl Parts {
    fn sum(&self) -> f64 {
        self.inflate + self.hash + self.write + self.fetch
    }
}

/// Runs the benchmark.
pub(super) async fn run(args: FullArgs) -> anyhow::Result<()> {
    let Some(path) = args.image.strip_prefix("oci:") else { bail!("give a layout, as oci:PATH") };
    let programs = tools::made_by(&args.tools, "containerd", &["2"])?;
    let work = tempfile::Builder::new().prefix("hermes-bench-").tempdir_in(&args.dir)?;
    let registry = Registry::open(path, hermes_registry::Options::default())?;
    let registry = registry.start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;
    let reference = format!("{}/bench:latest", registry.address());
    let named = ImageArgs { image: reference.clone(), platform: None, plain_http: true };
    let (origin, image) = crate::commands::index::resolve(&named).await?;
    let layout = Layout::open(path)?;
    let mut blobs = Vec::new();
    for layer in &image.layers {
        if !layer.media_type.as_deref().is_some_and(|kind| kind.ends_with("gzip")) {
            bail!("layer {} is not compressed by gzip, which is what is compared with", layer.layer);
        }
        blobs.push(layout.blob_path(&layer.layer.into()));
    }
    let key = keys::load_or_create(&work.path().join("index-key"))?;
    let folder = IndexFolder::new(work.path().join("indexes"));
    crate::commands::index::build_into(&origin, &image, &folder, &key).await?;
    let trusted = key.public().to_string();
    let compressed: u64 = image.layers.iter().map(|layer| layer.len_bytes).sum();
    let before = processor_seconds()?;
    fetch(&origin, &image).await?;
    let fetch = processor_seconds()? - before;
    let lines = tokio::task::spawn_blocking(move || {
        let mut best = Best { ours: f64::MAX, theirs: f64::MAX, inflate: f64::MAX };
        let mut logical = 0;
        for round in 0..args.rounds {
            let started = Instant::now();
            logical = inflate(&blobs)?;
            best.inflate = best.inflate.min(started.elapsed().as_secs_f64());
            best.ours = best.ours.min(ours(work.path(), round, &reference, &folder, &trusted)?);
            best.theirs = best.theirs.min(theirs(&programs, &reference)?);
        }
        let alone = |part: &dyn Fn() -> anyhow::Result<()>| {
            let before = processor_seconds()?;
            part()?;
            anyhow::Ok(processor_seconds()? - before)
        };
        let parts = Parts {
            inflate: alone(&|| inflate(&blobs).map(drop))?,
            hash: alone(&|| {
                hash(logical);
                Ok(())
            })?,
            write: alone(&|| write(&work.path().join("written"), logical))?,
            fetch,
        };
        anyhow::Ok(report_lines(&best, &parts, compressed, logical))
    });
    let lines = lines.await??;
    registry.shutdown().await;
    report::print("all of an image from a fast registry", &lines, args.json)
}

/// Processor time of this process so far, with what the kernel has done for it.
fn processor_seconds() -> anyhow::Result<f64> {
    Ok(processor_time(std::process::id())?.as_secs_f64())
}

/// Inflates all blobs; the length of what comes out, in bytes.
fn inflate(blobs: &[PathBuf]) -> anyhow::Result<u64> {
    blobs.iter().map(|blob| index::inflate(blob)).try_fold(0, |sum, len| len.map(|len| sum + len))
}

/// Hashes so many bytes, as chunks are.
fn hash(len_bytes: u64) {
    let piece = vec![0x5a; HASHED_LEN_BYTES];
    for _ in 0..len_bytes / HASHED_LEN_BYTES as u64 {
        black_box(ChunkId::of(black_box(&piece)));
    }
}

/// Writes so many bytes into a file, without waiting for the disk.
fn write(path: &Path, len_bytes: u64) -> anyhow::Result<()> {
    let (mut file, piece) = (File::create(path)?, vec![0x5a; WRITTEN_LEN_BYTES]);
    for _ in 0..len_bytes / WRITTEN_LEN_BYTES as u64 {
        file.write_all(&piece)?;
    }
    Ok(())
}

/// Fetches all layers and forgets them.
async fn fetch(origin: &Origin, image: &ResolvedImage) -> anyhow::Result<()> {
    let deadline = (Instant::now() + FETCH_MAX).into();
    for layer in &image.layers {
        origin.read_all(layer, deadline).try_for_each(|_| std::future::ready(Ok(()))).await?;
    }
    Ok(())
}

/// Mounts the image and fetches all of it, on a node that has nothing.
fn ours(work: &Path, round: u32, image: &str, folder: &IndexFolder, trusted: &str) -> anyhow::Result<f64> {
    let dir = work.join(format!("round-{round}"));
    let node = ChildNode::new(&dir, "node")?;
    let mount = ChildMount { image, index: Some((folder.path(), trusted)), ..ChildMount::default() };
    let started = Instant::now();
    node.mount(&mount)?;
    node.complete()?;
    let took = started.elapsed().as_secs_f64();
    drop(node);
    fs::remove_dir_all(dir)?;
    Ok(took)
}

/// Pulls and unpacks the image with a containerd that has nothing.
fn theirs(programs: &Path, image: &str) -> anyhow::Result<f64> {
    let host = Host::with(programs.to_owned(), "bench")?;
    fs::write(host.config(), host.default_config()?)?;
    let containerd = host.start()?;
    let started = Instant::now();
    containerd.ctr_says(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", image])?;
    Ok(started.elapsed().as_secs_f64())
}

fn report_lines(best: &Best, parts: &Parts, compressed: u64, logical: u64) -> Vec<Line> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let speed = |seconds: f64| format!("{:.0} MB/s of output", logical as f64 / seconds / 1e6);
    let what = |against: &str| format!("{} MB, {} MB unpacked, {against}", compressed / 1_000_000, logical / 1_000_000);
    let all_cores = best.inflate / cores as f64;
    vec![
        Line {
            what: what("against the library's inflate"),
            figure: speed(best.ours),
            against: format!("{cores} cores x {}", speed(best.inflate)),
            ratio: all_cores / best.ours,
            reach: ">= 0.9",
        },
        Line {
            what: what("against containerd's pull"),
            figure: format!("{:.2} s", best.ours),
            against: format!("{:.2} s", best.theirs),
            ratio: best.theirs / best.ours,
            reach: ">= 1.5",
        },
        Line {
            what: what("against the parts of the work by themselves"),
            figure: format!("{:.2} s", best.ours),
            against: format!(
                "{:.2} s on {cores} cores: inflate {:.2}, BLAKE3 {:.2}, write {:.2}, serve and fetch {:.2}",
                parts.sum() / cores as f64,
                parts.inflate,
                parts.hash,
                parts.write,
                parts.fetch,
            ),
            ratio: parts.sum() / cores as f64 / best.ours,
            reach: "",
        },
    ]
}
