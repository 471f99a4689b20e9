//! Building the index of an image: every layer streamed once from its registry through the builder.
//!
//! The builder's threads do the work; this module only moves bytes to it. Layers follow one another, because one layer
//! already uses the cores that there are and the link as well; memory is bounded by one layer's pipeline. A build that
//! is dropped stops at the next piece and leaves nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use hermes_image::build::{BuildError, Expect, LayerBuilder, LayerIndex, Options, Stats};
use hermes_image::ids::ArtifactId;
use hermes_image::statement::{LayerStatement, Statement};
use hermes_image::verify::Verified;
use thiserror::Error;
use tokio::sync::mpsc;

use crate::origin::{LayerDescriptor, Origin, OriginError, ResolvedImage};

/// Pieces between the socket and the builder, about 1 MiB.
const PIECES_MAX: usize = 16;
/// Longest time that reading one layer may take: 1 TiB at 100 MB/s. A registry that stops sending is noticed within
/// seconds by the origin's own limits.
const LAYER_READ_MAX: Duration = Duration::from_secs(3 * 3600);

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
    /// The builder's thread ended without a word.
    #[error("building the index of layer {} of {image} was interrupted", layer.layer)]
    Interrupted {
        /// The image.
        image: String,
        /// The layer.
        layer: Box<LayerDescriptor>,
    },
}

/// The index of an image.
#[derive(Debug)]
pub struct ImageIndex {
    /// What is to be signed.
    pub statement: Statement,
    /// All artifacts, in the order of the layers: table of contents, chunk table, seek table, windows.
    pub artifacts: Vec<Artifact>,
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
    /// What it is.
    pub kind: ArtifactKind,
    /// Which layer it belongs to, counted from the lowest.
    pub layer: usize,
}

/// Kinds of artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArtifactKind {
    /// Table of contents.
    Toc,
    /// Chunk table.
    Chunks,
    /// Directory of the seek table.
    Seek,
    /// Windows of the seek table.
    Windows,
}

/// Builds the index of `image`. `progress` hears how many compressed bytes were read, of all layers together.
///
/// # Errors
/// When a layer cannot be read or is not what the manifest says.
pub async fn build_index(
    origin: &Arc<Origin>,
    image: &ResolvedImage,
    options: Options,
    progress: impl Fn(u64) + Send,
) -> Result<ImageIndex, IndexingError> {
    let mut index = ImageIndex {
        statement: Statement::new(image.manifest_digest, image.platform.to_string(), Vec::new()),
        artifacts: Vec::new(),
        stats: Vec::new(),
    };
    let mut done = 0;
    // A manifest may name one layer twice; its index is the same.
    let mut known: Vec<(LayerDescriptor, LayerStatement)> = Vec::new();
    for (number, layer) in image.layers.iter().enumerate() {
        if let Some((_, statement)) = known.iter().find(|(known, _)| known.layer == layer.layer) {
            index.statement.layers.push(statement.clone());
            continue;
        }
        let built = build_layer(origin, image, layer, options, |read| progress(done + read)).await?;
        done += layer.len_bytes;
        let artifacts = [
            (ArtifactKind::Toc, built.toc.bytes().clone()),
            (ArtifactKind::Chunks, built.chunks.bytes().clone()),
            (ArtifactKind::Seek, built.seek.bytes().clone()),
            (ArtifactKind::Windows, built.windows.clone()),
        ];
        for (kind, bytes) in artifacts {
            let (id, bytes) = Verified::named(bytes);
            index.artifacts.push(Artifact { id, bytes, kind, layer: number });
        }
        let statement = LayerStatement {
            layer: layer.layer,
            diff_id: layer.diff_id,
            blob_len_bytes: layer.len_bytes,
            logical_len_bytes: built.chunks.logical_len_bytes(),
            toc: built.toc.id(),
            chunks: built.chunks.id(),
            seek: built.seek.id(),
            windows: built.seek.windows_id(),
        };
        index.statement.layers.push(statement.clone());
        known.push((layer.clone(), statement));
        index.stats.push(built.stats);
    }
    Ok(index)
}

/// Streams one layer through the builder.
async fn build_layer(
    origin: &Arc<Origin>,
    image: &ResolvedImage,
    layer: &LayerDescriptor,
    options: Options,
    progress: impl Fn(u64),
) -> Result<LayerIndex, IndexingError> {
    let expect = Expect { layer: layer.layer, diff_id: layer.diff_id, compressed_len_bytes: layer.len_bytes };
    let (pieces, mut queue) = mpsc::channel::<Bytes>(PIECES_MAX);
    let building = tokio::task::spawn_blocking(move || {
        let mut builder = LayerBuilder::new(expect, options)?;
        while let Some(piece) = queue.blocking_recv() {
            builder.push(&piece)?;
        }
        builder.finish()
    });
    let started = Instant::now();
    let mut body = std::pin::pin!(origin.read_all(layer, (started + LAYER_READ_MAX).into()));
    let mut read = 0;
    let broken = loop {
        match body.next().await {
            Some(Ok(piece)) => {
                read += piece.len() as u64;
                progress(read);
                if pieces.send(piece).await.is_err() {
                    // The builder has failed and says why.
                    break None;
                }
            }
            Some(Err(error)) => break Some(error),
            None => break None,
        }
    };
    drop(pieces);
    let built = building.await;
    if let Some(error) = broken {
        return Err(error.into());
    }
    let image = image.reference.clone();
    match built {
        Ok(Ok(index)) => {
            tracing::info!(layer = %layer.layer, elapsed_ms = started.elapsed().as_millis() as u64, "indexed a layer");
            Ok(index)
        }
        Ok(Err(source)) => Err(IndexingError::Build { image, layer: Box::new(layer.clone()), source }),
        Err(_) => Err(IndexingError::Interrupted { image, layer: Box::new(layer.clone()) }),
    }
}
