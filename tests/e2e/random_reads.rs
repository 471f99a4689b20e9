//! Random reads of a real layer from a real registry: every chunk, in random order, is right, and costs little more
//! than the spans that hold what was read.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures::StreamExt as _;
use hermes_image::ids::{ArtifactId, ChunkNo, SpanNo};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::index::seek::SeekTable;
use hermes_image::span::SpanDecoder;
use hermes_image::statement::Statement;
use hermes_image::verify::Verified;
use hermes_origin::{LayerDescriptor, Origin, find_image};
use hermes_registry::{Handle, Registry};
use hermes_snapshotter::index_folder::IndexFolder;
use hermes_snapshotter::status::Way;
use hermes_tests::guard::ScratchDir;
use hermes_tests::images::{RealImage, TAG};
use hermes_tests::node::{Index, Mount, TestNode};
use hermes_tests::odd::noise;
use hermes_tests::unpack::decompress;
use tokio::time::Instant;

const SEED: u64 = 7;
/// Time for one span, of half a megabyte.
const SPAN_TIMEOUT: Duration = Duration::from_secs(30);
/// Chunks of the first, sparse pass over the mounted layer.
const SPARSE_READS: usize = 100;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// A real image behind a registry, the index of its largest gzip layer, and that layer's real tar.
struct Stage {
    registry: Handle,
    reference: String,
    origin: Arc<Origin>,
    descriptor: LayerDescriptor,
    index: Index,
    seek: SeekTable,
    chunks: ChunkTable,
    windows: Bytes,
    tar: File,
    _dir: ScratchDir,
}

impl Stage {
    async fn new(image: RealImage) -> Result<Self> {
        let layout = image.layout()?;
        let dir = ScratchDir::new("random-reads")?;
        let largest = layout.image(TAG)?.layers.into_iter().max_by_key(|layer| layer.blob_len_bytes);
        let layer = largest.context("the image has no layers")?;
        let tar = dir.path().join("layer.tar");
        decompress(&layer, &tar)?;
        let source = format!("oci:{}:{TAG}", layout.dir().display());
        let index = Index::build(program(), &source, &dir.make("indexes")?)?;

        let registry = Registry::open(layout.dir(), hermes_registry::Options::default())?;
        let registry = registry.start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;
        let reference = format!("{}/{}:{TAG}", registry.address(), image.name());
        let (origin, resolved) = find_image(&reference, None, true).await?;
        let folder = IndexFolder::new(&index.folder);
        let signed = folder.statement(resolved.manifest_digest)?.context("the index has no statement")?;
        let statement = Statement::open(&signed, resolved.manifest_digest, &[index.key.parse()?])?;
        let at = statement.layers.iter().position(|one| one.layer == layer.layer_id).context("no such layer")?;
        let part = |id: ArtifactId| -> Result<Bytes> {
            Ok(folder.artifact(id)?.context("part of the index is missing")?.into_inner())
        };
        let statement = &statement.layers[at];
        Ok(Self {
            registry,
            reference,
            origin,
            descriptor: resolved.layers[at].clone(),
            seek: SeekTable::decode(part(statement.seek)?)?,
            chunks: ChunkTable::decode(part(statement.chunks)?)?,
            windows: part(statement.windows)?,
            index,
            tar: File::open(&tar).context("open the tar")?,
            _dir: dir,
        })
    }

    /// Compares a chunk with the bytes of the real tar.
    fn check(&self, chunk: ChunkNo, bytes: &[u8]) -> Result<()> {
        let range = self.chunks.range(chunk);
        let mut expected = vec![0; usize::try_from(range.end - range.start)?];
        self.tar.read_exact_at(&mut expected, range.start).with_context(|| format!("read chunk {chunk} of the tar"))?;
        ensure!(bytes == expected, "chunk {chunk}, {range:?} of the tar, has other bytes");
        Ok(())
    }

    fn span_len_bytes(&self, span: SpanNo) -> u64 {
        let range = self.seek.blob_range(span.0..span.0 + 1);
        range.end - range.start
    }

    /// Reads one chunk through its span, all of whose compressed bytes are read. Returns how many these are.
    async fn read(&self, chunk: ChunkNo) -> Result<(Verified<Bytes>, u64)> {
        let span = self.seek.span_of(chunk);
        let window = self.seek.window_range(span);
        let window = self.windows.slice(usize::try_from(window.start)?..usize::try_from(window.end)?);
        let window = self.seek.verify_window(span, window)?;
        let mut decoder = SpanDecoder::new(&self.seek, &self.chunks, span, &window)?;
        let range = self.seek.blob_range(span.0..span.0 + 1);
        let mut body = self.origin.read(&self.descriptor, range, Instant::now() + SPAN_TIMEOUT);
        let (mut decoded, mut found) = (Vec::new(), None);
        while let Some(piece) = body.next().await {
            let piece = piece?;
            if found.is_none() {
                decoder.push(&piece, &mut decoded)?;
                found = decoded.drain(..).find(|(one, _)| *one == chunk).map(|(_, bytes)| bytes);
            }
        }
        let found = found.with_context(|| format!("span {span} ended without chunk {chunk}"))?;
        Ok((found, self.span_len_bytes(span)))
    }
}

/// The numbers from 0 to `count - 1` in an order that depends on nothing but the seed (Fisher and Yates).
fn shuffled(count: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count).collect();
    let random = noise(SEED, order.len() * 8);
    for (last, word) in (1..order.len()).rev().zip(random.chunks_exact(8)) {
        let word = u64::from_le_bytes(word.try_into().expect("chunks of eight"));
        order.swap(last, (word % (last as u64 + 1)) as usize);
    }
    order
}

/// Every chunk of a layer by itself, each through its own span from that span's restart point: nothing that one read
/// left behind can help another.
#[tokio::test(flavor = "multi_thread")]
async fn every_chunk_is_right_through_its_own_span() -> Result<()> {
    let stage = Arc::new(Stage::new(RealImage::Web).await?);
    let before = stage.registry.counters();
    let order = Arc::new(shuffled(stage.chunks.count()));
    let (next, touched_bytes) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
    let readers = std::thread::available_parallelism().map_or(1, usize::from);
    let tasks: Vec<_> = (0..readers)
        .map(|_| {
            let (stage, order) = (Arc::clone(&stage), Arc::clone(&order));
            let (next, touched_bytes) = (Arc::clone(&next), Arc::clone(&touched_bytes));
            tokio::spawn(async move {
                let mut read = 0;
                while let Some(&chunk) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (bytes, span_len_bytes) = stage.read(ChunkNo(chunk)).await?;
                    stage.check(ChunkNo(chunk), &bytes)?;
                    touched_bytes.fetch_add(span_len_bytes, Ordering::Relaxed);
                    read += 1;
                }
                anyhow::Ok(read)
            })
        })
        .collect();
    let mut read = 0;
    for task in tasks {
        read += task.await??;
    }
    assert_eq!(read, stage.chunks.count());
    let (served, touched) =
        (stage.registry.counters().blob_bytes - before.blob_bytes, touched_bytes.load(Ordering::Relaxed));
    println!("{read} chunks of {} spans: {served} bytes for spans of {touched}", stage.seek.count());
    assert!(served * 10 <= touched * 12, "{served} bytes served for spans of {touched}");
    Ok(())
}

/// The same through a node: a layer file of a mounted image is read chunk by chunk. A few chunks cost their spans, and
/// no prefetch on top; all of them cost the layer once.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_reads_the_spans_that_it_needs() -> Result<()> {
    let stage = Stage::new(RealImage::Spark).await?;
    let node = TestNode::start(program(), "random-reads")?;
    let mount = Mount {
        image: &stage.reference,
        way: Some(Way::ErofsFuse),
        index_folder: Some(&stage.index.folder),
        trusted_key: &stage.index.key,
        peers: &[],
    };
    let dir = node.mount("image", &mount)?;
    let path: PathBuf = node.state().join("layers").join(stage.descriptor.diff_id.hex());
    let layer = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    let before = stage.registry.counters().blob_bytes;
    let mut spans = BTreeSet::new();
    let mut touched = 0;
    let order = shuffled(stage.chunks.count());
    for (done, &chunk) in order.iter().enumerate() {
        let chunk = ChunkNo(chunk);
        let range = stage.chunks.range(chunk);
        let mut bytes = vec![0; usize::try_from(range.end - range.start)?];
        layer.read_exact_at(&mut bytes, range.start).with_context(|| format!("read chunk {chunk}"))?;
        stage.check(chunk, &bytes)?;
        let span = stage.seek.span_of(chunk);
        if spans.insert(span) {
            touched += stage.span_len_bytes(span);
        }
        if done + 1 == SPARSE_READS || done + 1 == order.len() {
            let served = stage.registry.counters().blob_bytes - before;
            println!("{} chunks of {} spans: {served} bytes for spans of {touched}", done + 1, spans.len());
            assert!(served * 10 <= touched * 12, "{served} bytes served for spans of {touched}");
        }
    }
    drop(layer);
    node.unmount(&dir)
}
