//! Building the index of an image: every layer streamed once from its registry through the builder.
//!
//! The builder's threads do the work; this module only moves bytes to it ([`index_layer`]). [`build_index`] takes the
//! layers of an image one after another, because one layer already uses the cores that there are and the link as well;
//! memory is bounded by one layer's pipeline, and what was made of a layer is handed on before the next begins. A node
//! that takes a pull itself drives the layers on its own, and keeps their chunks (`node/first_pull.rs`).
//!
//! A body that breaks off is gone on with where it broke, as long as something comes and the registry asks for no rest. The
//! whole is checked in the end, whoever sent which part of it. A build that is dropped stops at the next piece and leaves
//! nothing; whoever wants to go on after one keeps the bytes, and gives them again ([`index_bytes`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use hermes_image::build::{BuildError, ChunkSink, Expect, LayerBuilder, LayerIndex, Options, Stats};
use hermes_image::ids::ArtifactId;
use hermes_image::index::chunks::ChunkTable;
use hermes_image::statement::{LayerStatement, Statement};
use hermes_image::verify::Verified;
use thiserror::Error;
use tokio::sync::mpsc;

use crate::{ByteStream, ErrorClass, Failure, LayerDescriptor, Origin, OriginError, ResolvedImage};

/// Pieces between the socket and the builder, about 1 MiB.
const PIECES_MAX: usize = 16;
/// Longest time that reading one layer may take: 1 TiB at 100 MB/s. A registry that stops sending is noticed within
/// seconds by the origin's own limits.
const LAYER_READ_MAX: Duration = Duration::from_secs(3 * 3600);
/// How often a layer's body may break off and be gone on with. One that brings nothing before it breaks is not.
const RESUMES_MAX: u32 = 8;

/// What takes an artifact and fails.
type KeepError = Box<dyn std::error::Error + Send + Sync>;

/// An index that could not be built.
#[derive(Debug, Error)]
pub enum IndexingError {
    /// The registry failed.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// The layer is not what the manifest says, or cannot be indexed.
    #[error("cannot index layer {} of {image}: {source}", layer.layer)]
    Build {
        /// The image.
        image: String,
        /// The layer.
        layer: Box<LayerDescriptor>,
        /// Why.
        source: BuildError,
    },
    /// What was made cannot be kept.
    #[error("cannot keep the index of layer {} of {image}: {source}", layer.layer)]
    Keep {
        /// The image.
        image: String,
        /// The layer.
        layer: Box<LayerDescriptor>,
        /// Why.
        source: KeepError,
    },
    /// The builder's thread ended without a word.
    #[error("building the index of layer {} of {image} was interrupted", layer.layer)]
    Interrupted {
        /// The image.
        image: String,
        /// The layer.
        layer: Box<LayerDescriptor>,
    },
}

/// The index of an image, but for the artifacts, which were handed on.
#[derive(Debug)]
pub struct ImageIndex {
    /// What is to be signed.
    pub statement: Statement,
    /// What building each layer cost, in the order of the layers.
    pub stats: Vec<Stats>,
}

/// One artifact of an index.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// Its name.
    pub id: ArtifactId,
    /// Its bytes.
    pub bytes: Verified<Bytes>,
}

/// What was made of one layer, which is the one that the manifest and the configuration name.
#[derive(Debug)]
pub struct IndexedLayer {
    /// What is to be signed of it.
    pub statement: LayerStatement,
    /// Table of contents, chunk table, seek table, windows.
    pub artifacts: [Artifact; 4],
    /// The chunk table once more.
    pub table: ChunkTable,
    /// What building it cost.
    pub stats: Stats,
}

/// Builds the index of `image`. `keep` gets each artifact as soon as its layer is indexed, on a thread that may wait for
/// disks; `progress` hears how many compressed bytes were read, of all layers together.
///
/// # Errors
/// When a layer cannot be read or is not what the manifest says, or when `keep` fails.
pub async fn build_index<E: Into<KeepError>>(
    origin: &Arc<Origin>,
    image: &ResolvedImage,
    options: Options,
    keep: impl Fn(&Artifact) -> Result<(), E> + Send + Sync + 'static,
    progress: impl Fn(u64) + Send + Sync,
) -> Result<ImageIndex, IndexingError> {
    let keep = Arc::new(keep);
    let mut index = ImageIndex {
        statement: Statement::new(image.manifest_digest, image.platform.to_string(), Vec::new()),
        stats: Vec::new(),
    };
    let read = AtomicU64::new(0);
    let came = |bytes| progress(read.fetch_add(bytes, Ordering::Relaxed) + bytes);
    // A manifest may name one layer twice; its index is the same.
    let mut known: Vec<(LayerDescriptor, LayerStatement)> = Vec::new();
    for layer in &image.layers {
        if let Some((_, statement)) = known.iter().find(|(known, _)| known.layer == layer.layer) {
            index.statement.layers.push(statement.clone());
            continue;
        }
        let IndexedLayer { statement, artifacts, stats, .. } =
            index_layer(origin, &image.reference, layer, options, None, &came).await?;
        let keep = Arc::clone(&keep);
        let kept = tokio::task::spawn_blocking(move || {
            artifacts.iter().try_for_each(|artifact| keep(artifact).map_err(Into::into))
        });
        let (image, layer) = (|| image.reference.clone(), || Box::new(layer.clone()));
        let kept = kept.await.map_err(|_| IndexingError::Interrupted { image: image(), layer: layer() })?;
        kept.map_err(|source| IndexingError::Keep { image: image(), layer: layer(), source })?;
        index.statement.layers.push(statement.clone());
        known.push((*layer(), statement));
        index.stats.push(stats);
    }
    Ok(index)
}

/// Streams one layer of `image` through the builder, which gives each chunk to `sink` as it is cut. `came` hears how
/// many more compressed bytes were read.
///
/// Dropped, it ends at the next piece; the sink goes with the builder's threads, shortly after.
///
/// # Errors
/// When the layer cannot be read, is not what the manifest says, or the sink fails. What the sink has taken is right
/// only when this succeeds.
pub async fn index_layer(
    origin: &Arc<Origin>,
    image: &str,
    layer: &LayerDescriptor,
    options: Options,
    sink: Option<ChunkSink>,
    came: impl Fn(u64),
) -> Result<IndexedLayer, IndexingError> {
    let deadline = layer_deadline();
    let read = |from| origin.read(layer, from..layer.len_bytes, deadline);
    index_bytes(image, layer, options, sink, read, came).await
}

/// When a layer that is begun now has to be read.
pub fn layer_deadline() -> tokio::time::Instant {
    tokio::time::Instant::now() + LAYER_READ_MAX
}

/// As [`index_layer`], with bytes from anywhere: `read` gives those from a place of the layer to its end. It is asked for
/// the first place once, and again for where a stream broke off.
///
/// # Errors
/// As [`index_layer`].
pub async fn index_bytes(
    image: &str,
    layer: &LayerDescriptor,
    options: Options,
    sink: Option<ChunkSink>,
    read: impl Fn(u64) -> ByteStream,
    came: impl Fn(u64),
) -> Result<IndexedLayer, IndexingError> {
    let expect = Expect { layer: layer.layer, diff_id: layer.diff_id, compressed_len_bytes: layer.len_bytes };
    let (pieces, mut queue) = mpsc::channel::<Bytes>(PIECES_MAX);
    let building = tokio::task::spawn_blocking(move || {
        let mut builder = match sink {
            Some(sink) => LayerBuilder::with_sink(expect, options, sink)?,
            None => LayerBuilder::new(expect, options)?,
        };
        while let Some(piece) = queue.blocking_recv() {
            builder.push(&piece)?;
        }
        builder.finish()
    });
    let started = Instant::now();
    // Takes the sender along: the builder ends with the bytes.
    let fed = feed(layer, read, pieces, came).await;
    let built = building.await;
    let (image, descriptor) = (image.to_owned(), Box::new(layer.clone()));
    match (fed, built) {
        (Err(broken), _) => Err(broken.into()),
        (Ok(()), Ok(Ok(index))) => {
            tracing::info!(layer = %layer.layer, elapsed_ms = started.elapsed().as_millis() as u64, "indexed a layer");
            Ok(indexed(layer, index))
        }
        (Ok(()), Ok(Err(source))) => Err(IndexingError::Build { image, layer: descriptor, source }),
        (Ok(()), Err(_)) => Err(IndexingError::Interrupted { image, layer: descriptor }),
    }
}

/// Moves the bytes of `layer` to the builder, which says itself why it takes no more.
async fn feed(
    layer: &LayerDescriptor,
    from_place: impl Fn(u64) -> ByteStream,
    pieces: mpsc::Sender<Bytes>,
    came: impl Fn(u64),
) -> Result<(), OriginError> {
    let (mut read, mut resumes) = (0, 0);
    loop {
        let from = read;
        let mut body = from_place(from);
        let broken = loop {
            match body.next().await {
                Some(Ok(piece)) => {
                    let len_bytes = piece.len() as u64;
                    if pieces.send(piece).await.is_err() {
                        return Ok(());
                    }
                    read += len_bytes;
                    came(len_bytes);
                }
                Some(Err(error)) => break error,
                None => return Ok(()),
            }
        };
        let wants_rest = matches!(broken.failure(), Failure::Throttled { .. });
        if broken.class() != ErrorClass::Transient || wants_rest || read == from || resumes == RESUMES_MAX {
            return Err(broken);
        }
        resumes += 1;
        tracing::info!(layer = %layer.layer, at = read, error = %broken, "a layer broke off; it is gone on with");
    }
}

fn indexed(layer: &LayerDescriptor, built: LayerIndex) -> IndexedLayer {
    let LayerIndex { toc, chunks, seek, windows, stats } = built;
    let statement = LayerStatement {
        layer: layer.layer,
        diff_id: layer.diff_id,
        blob_len_bytes: layer.len_bytes,
        logical_len_bytes: chunks.logical_len_bytes(),
        toc: toc.id(),
        chunks: chunks.id(),
        seek: seek.id(),
        windows: seek.windows_id(),
    };
    let artifacts = [toc.bytes().clone(), chunks.bytes().clone(), seek.bytes().clone(), windows].map(|bytes| {
        let (id, bytes) = Verified::named(bytes);
        Artifact { id, bytes }
    });
    IndexedLayer { statement, artifacts, table: chunks, stats }
}
