//! `hermes bench read`: a cold file from a fast registry, against plain ranged HTTP and inflate on all cores.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use futures::StreamExt as _;
use hermes_image::ids::{ChunkNo, SpanNo};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::index::seek::SeekTable;
use hermes_image::index::toc::{NodeKind, Toc};
use hermes_image::inflate::Decoder;
use hermes_image::statement::LayerStatement;
use hermes_image::tree::ExtentSource;
use hermes_origin::indexing::ImageIndex;
use hermes_origin::{LayerDescriptor, Origin};
use hermes_registry::Registry;
use hermes_snapshotter::index_folder::IndexFolder;
use hermes_snapshotter::node::keys;
use hermes_snapshotter::status::Way;

use super::report::{self, Line};
use super::workload;
use crate::commands::ImageArgs;
use crate::commands::child::{ChildMount, ChildNode};

/// Compressed bytes that the plain client asks for at once: long enough that a request's cost does not show.
const REQUEST_LEN_BYTES: u64 = 4 << 20;
/// Time that one of its requests may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Arguments of `hermes bench read`.
#[derive(Debug, Args)]
pub(crate) struct ReadArgs {
    /// An OCI layout, as oci:PATH[:TAG]; its largest file is read.
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Rounds; the best of each figure counts, because noise only ever adds.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// How the tree is shown.
    #[arg(long, default_value = "erofs-fuse")]
    way: Way,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark.
pub(super) async fn run(args: ReadArgs) -> anyhow::Result<()> {
    let Some(path) = args.image.strip_prefix("oci:") else { bail!("give a layout, as oci:PATH[:TAG]") };
    let work = tempfile::Builder::new().prefix("hermes-bench-").tempdir_in("/var/tmp")?;
    let registry = Registry::open(path, hermes_registry::Options::default())?;
    let registry = registry.start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;
    let reference = format!("{}/bench:latest", registry.address());
    let named = ImageArgs { image: reference.clone(), platform: None, plain_http: true };
    let (origin, image) = crate::commands::index::resolve(&named).await?;
    let key = keys::load_or_create(&work.path().join("index-key"))?;
    let folder = IndexFolder::new(work.path().join("indexes"));
    let (index, _) = crate::commands::index::build_into(&origin, &image, &folder, &key).await?;
    let trusted = key.public().to_string();

    let (mut best_ours, mut best_plain, mut len) = (f64::MAX, f64::MAX, 0);
    let mut subject = None;
    for round in 0..args.rounds {
        let node = ChildNode::new(work.path(), &format!("round-{round}"))?;
        let mount = ChildMount {
            image: &reference,
            index: Some((folder.path(), &trusted)),
            way: Some(args.way),
            ..ChildMount::default()
        };
        node.mount(&mount)?;
        let file = match &subject {
            Some(found) => found,
            None => subject.insert(largest(&node, &folder, &index)?),
        };
        let path = node.dir().join(&file.path);
        let read = tokio::task::spawn_blocking(move || workload::sequential(&path)).await??;
        len = read.amount;
        best_ours = best_ours.min(read.elapsed.as_secs_f64());
        let statement = &index.statement.layers[file.layer];
        let seek = SeekTable::decode(part(&folder, statement.seek)?)?;
        let spans = spans_of(&seek, &folder, statement, &file.logical)?;
        best_plain = best_plain.min(plain(&origin, &image.layers[file.layer], seek, spans).await?);
    }
    registry.shutdown().await;
    let speed = |seconds: f64| format!("{:.0} MB/s", len as f64 / seconds / 1e6);
    let line = Line {
        what: format!("cold file of {} MB through {}", len / 1_000_000, args.way),
        figure: speed(best_ours),
        against: format!("ranged HTTP and inflate {}", speed(best_plain)),
        ratio: best_plain / best_ours,
        reach: ">= 0.8",
    };
    report::print("sequential read from a fast registry", &[line], args.json)
}

fn part(folder: &IndexFolder, id: hermes_image::ids::ArtifactId) -> anyhow::Result<bytes::Bytes> {
    Ok(folder.artifact(id)?.context("part of the index is missing")?.into_inner())
}

/// A file of the image, and where its bytes come from.
#[derive(Debug, Clone)]
struct Subject {
    /// Relative to the image's root.
    path: PathBuf,
    /// Its layer's place in the image.
    layer: usize,
    /// Its bytes in the layer's logical space.
    logical: Range<u64>,
}

/// The largest regular file of the image that is in one piece.
fn largest(node: &ChildNode, folder: &IndexFolder, index: &ImageIndex) -> anyhow::Result<Subject> {
    let mut best = (0, PathBuf::new());
    for path in workload::shuffled_files(node.dir())? {
        let len = std::fs::symlink_metadata(&path)?.len();
        if len > best.0 {
            best = (len, path);
        }
    }
    let path = best.1.strip_prefix(node.dir())?.to_owned();
    for (layer, statement) in index.statement.layers.iter().enumerate().rev() {
        let toc = Toc::decode(part(folder, statement.toc)?)?;
        if let Some(start) = find(&toc, &path) {
            return Ok(Subject { path, layer, logical: start..start + best.0 });
        }
    }
    bail!("no layer has {} in one piece", path.display())
}

/// Where the bytes of the regular file at `path` begin in the layer.
fn find(toc: &Toc, path: &Path) -> Option<u64> {
    let mut node = toc.node(0);
    for name in path {
        node = toc.child(node.no(), name.as_bytes())?;
    }
    if let NodeKind::HardLink { node: target } = node.kind() {
        node = toc.node(target);
    }
    let NodeKind::Regular { size_bytes, mut extents } = node.kind() else { return None };
    let first = extents.next().filter(|extent| extent.len_bytes == size_bytes)?;
    match first.source {
        ExtentSource::Layer { offset, .. } => Some(offset.0),
        ExtentSource::Inline(_) => None,
    }
}

/// The spans that hold `logical`.
fn spans_of(
    seek: &SeekTable,
    folder: &IndexFolder,
    layer: &LayerStatement,
    logical: &Range<u64>,
) -> anyhow::Result<Range<u32>> {
    let chunks = ChunkTable::decode(part(folder, layer.chunks)?)?.covering(logical.clone());
    Ok(seek.span_of(ChunkNo(chunks.start)).0..seek.span_of(ChunkNo(chunks.end - 1)).0 + 1)
}

/// Reads spans in long requests, as many at once as there are cores, and inflates them. Nothing is checked or stored.
async fn plain(
    origin: &Arc<Origin>,
    layer: &LayerDescriptor,
    seek: SeekTable,
    spans: Range<u32>,
) -> anyhow::Result<f64> {
    let seek = Arc::new(seek);
    let mut requests = Vec::new();
    let mut first = spans.start;
    while first < spans.end {
        let mut end = first + 1;
        while end < spans.end
            && seek.blob_range(first..end + 1).end - seek.blob_range(first..end).start < REQUEST_LEN_BYTES
        {
            end += 1;
        }
        requests.push(first..end);
        first = end;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let started = Instant::now();
    let work = futures::stream::iter(requests.into_iter().map(|run| {
        let (origin, layer, seek) = (Arc::clone(origin), layer.clone(), Arc::clone(&seek));
        tokio::spawn(async move { plain_request(&origin, &layer, &seek, run).await })
    }));
    let mut work = work.buffer_unordered(cores);
    while let Some(done) = work.next().await {
        done??;
    }
    Ok(started.elapsed().as_secs_f64())
}

async fn plain_request(
    origin: &Origin,
    layer: &LayerDescriptor,
    seek: &SeekTable,
    run: Range<u32>,
) -> anyhow::Result<()> {
    let span = seek.span(SpanNo(run.start));
    // What the window holds does not change the work, and nobody looks at the bytes.
    let window = vec![0; span.window_len_bytes];
    let mut decoder = Decoder::resume(seek.header().compression, span.resume, &window)?;
    let mut body = std::pin::pin!(origin.read(layer, seek.blob_range(run), (Instant::now() + REQUEST_TIMEOUT).into()));
    while let Some(piece) = body.next().await {
        let piece = piece?;
        decoder = tokio::task::spawn_blocking(move || -> anyhow::Result<Decoder> {
            let mut output = vec![0; 256 * 1024];
            let mut left = &piece[..];
            loop {
                let step = decoder.step(left, &mut output)?;
                left = &left[step.consumed..];
                if step.is_stuck() {
                    return Ok(decoder);
                }
            }
        })
        .await??;
    }
    Ok(())
}
