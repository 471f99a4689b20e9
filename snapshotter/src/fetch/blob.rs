//! One compressed form of a layer: where its restart points are, and what they say of its spans.
//!
//! The same layer can be several blobs: whoever pushes it compresses it anew, and the images that share it name different ones.
//! A span means bytes of one of them.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, LayerId, SpanNo};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::index::seek::SeekTable;
use hermes_image::statement::LayerStatement;
use hermes_image::verify::Verified;
use hermes_policy::class::ErrorClass;
use hermes_policy::geometry::{LayerGeometry, Span};
use parking_lot::RwLock;
use thiserror::Error;

use crate::artifacts::{ArtifactError, Artifacts};

/// Restart points that cannot be had or used.
#[derive(Debug, Error)]
pub(super) enum SpanIndexError {
    /// Nobody has them.
    #[error("nobody has the seek table {0}; build the index of the image again")]
    Missing(ArtifactId),
    /// They could not be read.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// They are not what they should be.
    #[error("the seek table is damaged: {0}")]
    Damaged(String),
}

impl SpanIndexError {
    /// What it means for reading the registry, which cannot be used without them; other sources can.
    pub(super) fn class(&self) -> ErrorClass {
        match self {
            Self::Missing(_) => ErrorClass::NotFound,
            Self::Artifact(_) => ErrorClass::Local,
            // The registry's bytes and the index do not belong together.
            Self::Damaged(_) => ErrorClass::PeerFault,
        }
    }
}

/// A blob of an open layer.
#[derive(Debug)]
pub(crate) struct Blob {
    artifacts: Artifacts,
    /// What the signer says of the layer in this form.
    statement: LayerStatement,
    geometry: RwLock<Arc<LayerGeometry>>,
    spans: tokio::sync::OnceCell<Arc<SpanIndex>>,
}

impl Blob {
    /// A blob whose restart points are not known yet, of a layer with this `geometry` of chunks.
    pub(super) fn new(artifacts: Artifacts, statement: LayerStatement, geometry: Arc<LayerGeometry>) -> Self {
        Self { artifacts, statement, geometry: RwLock::new(geometry), spans: tokio::sync::OnceCell::new() }
    }

    /// Its name.
    pub(super) fn id(&self) -> LayerId {
        self.statement.layer
    }

    /// Chunks, and spans where they are known.
    pub(super) fn geometry(&self) -> Arc<LayerGeometry> {
        Arc::clone(&self.geometry.read())
    }

    /// The restart points, fetched at the first call; `table` is the layer's. Cancel safe.
    ///
    /// # Errors
    /// When nobody has them or they do not fit the layer.
    pub(super) async fn spans(&self, table: &ChunkTable) -> Result<Arc<SpanIndex>, SpanIndexError> {
        self.spans.get_or_try_init(|| self.find_spans(table)).await.cloned()
    }

    async fn find_spans(&self, table: &ChunkTable) -> Result<Arc<SpanIndex>, SpanIndexError> {
        let LayerStatement { seek: id, diff_id, .. } = self.statement;
        let bytes = self.artifacts.get(id, diff_id).await?.ok_or(SpanIndexError::Missing(id))?;
        let damaged = |error: &dyn std::fmt::Display| SpanIndexError::Damaged(error.to_string());
        let seek = SeekTable::decode(bytes.into_inner()).map_err(|error| damaged(&error))?;
        self.statement.check_seek(&seek, table).map_err(|error| damaged(&error))?;
        let spans = seek.spans().map(|span| {
            let Range { start, end } = span.blob;
            Span { first_chunk: span.chunks.start, blob_start: start, blob_end: end }
        });
        let spans = spans.collect::<Vec<_>>();
        let one_stream = spans.len() == 1 && seek.count() == 1;
        let geometry = (*self.geometry()).clone().with_spans(spans).map_err(|error| damaged(&error))?;
        let geometry = if one_stream { geometry.as_whole_stream().map_err(|error| damaged(&error))? } else { geometry };
        *self.geometry.write() = Arc::new(geometry);
        Ok(Arc::new(SpanIndex { seek, artifacts: self.artifacts.clone(), statement: self.statement.clone() }))
    }
}

/// The restart points of a blob, and where their windows are.
#[derive(Debug)]
pub(super) struct SpanIndex {
    /// The directory.
    pub(super) seek: SeekTable,
    artifacts: Artifacts,
    statement: LayerStatement,
}

impl SpanIndex {
    /// The packed window of `span`, checked. Only this window is fetched when the blob of all of them is not here.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// When nobody has it, or what they have is damaged.
    pub(super) async fn window(&self, span: SpanNo) -> Result<Verified<Bytes>, SpanIndexError> {
        let range = self.seek.window_range(span);
        if range.is_empty() {
            let none = self.seek.verify_window(span, Bytes::new());
            return none.map_err(|mismatch| SpanIndexError::Damaged(format!("window {span}: {mismatch}")));
        }
        let windows = self.seek.windows_id();
        let check = |bytes| self.seek.verify_window(span, bytes);
        let found = self.artifacts.range(windows, self.statement.diff_id, range, check).await?;
        found.ok_or(SpanIndexError::Missing(windows))
    }
}
