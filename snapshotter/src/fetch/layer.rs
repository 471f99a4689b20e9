//! A layer that can be fetched: its tables, its registry, its restart points, its counters.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, DiffId, SpanNo};
use hermes_image::index::seek::SeekTable;
use hermes_image::verify::Verified;
use hermes_policy::event::OriginNo;
use hermes_policy::geometry::{GeometryError, LayerGeometry, Span};
use parking_lot::{Mutex, RwLock};
use thiserror::Error;

use super::Marks;
use crate::artifacts::{ArtifactError, Artifacts};
use crate::origin::{LayerDescriptor, Origin};
use crate::status::BySource;

/// Time between two warnings that a layer's chunks find no room: often enough to be seen in the tail of a log.
const FULL_STORE_WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// The registry of a layer.
#[derive(Debug, Clone)]
pub struct LayerOrigin {
    /// By which the policy knows the host.
    pub number: OriginNo,
    /// Reads blobs.
    pub origin: Arc<Origin>,
    /// The blob.
    pub descriptor: LayerDescriptor,
}

/// Restart points that cannot be had or used.
#[derive(Debug, Error)]
pub enum SpanIndexError {
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

/// The restart points of a layer, and where their windows are.
#[derive(Debug)]
pub struct SpanIndex {
    /// The directory.
    pub seek: SeekTable,
    source: SpanIndexSource,
}

/// Where windows come from.
#[derive(Debug, Clone)]
pub struct SpanIndexSource {
    /// Where artifacts are looked for.
    pub artifacts: Artifacts,
    /// The directory of the seek table.
    pub seek: ArtifactId,
}

impl SpanIndex {
    /// The packed window of `span`, checked. Only this window is fetched when the blob of all of them is not here.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// When nobody has it, or what they have is damaged.
    pub async fn window(&self, span: SpanNo) -> Result<Verified<Bytes>, SpanIndexError> {
        let range = self.seek.window_range(span);
        if range.is_empty() {
            return self.check(span, Bytes::new());
        }
        let windows = self.seek.windows_id();
        let bytes = self.source.artifacts.range(windows, range).await?;
        self.check(span, bytes.ok_or(SpanIndexError::Missing(windows))?)
    }

    fn check(&self, span: SpanNo, bytes: Bytes) -> Result<Verified<Bytes>, SpanIndexError> {
        self.seek
            .verify_window(span, bytes)
            .map_err(|mismatch| SpanIndexError::Damaged(format!("window {span}: {mismatch}")))
    }
}

/// Chunk bytes by source, since the daemon started.
#[derive(Debug, Default)]
pub struct SourceCounters {
    pub(super) local: AtomicU64,
    pub(super) peer: AtomicU64,
    pub(super) registry: AtomicU64,
    pub(super) registry_wire: AtomicU64,
}

impl SourceCounters {
    /// The counts now.
    pub fn snapshot(&self) -> BySource {
        BySource {
            local_bytes: self.local.load(Ordering::Relaxed),
            peer_bytes: self.peer.load(Ordering::Relaxed),
            registry_bytes: self.registry.load(Ordering::Relaxed),
            registry_wire_bytes: self.registry_wire.load(Ordering::Relaxed),
        }
    }
}

/// A layer that is open for reading.
#[derive(Debug)]
pub struct OpenLayer {
    /// The bytes at rest.
    pub layer: Arc<hermes_store::Layer>,
    /// The image that it was opened for, for messages.
    pub image: String,
    /// Its registry; `None` when the image came without one.
    pub origin: Option<LayerOrigin>,
    /// Where its restart points are looked for when the registry is needed.
    pub spans_from: SpanIndexSource,
    /// Where its bytes came from.
    pub counters: SourceCounters,
    /// Where its readers should be heard of.
    pub marks: Arc<Marks>,
    geometry: RwLock<Arc<LayerGeometry>>,
    warned_of_full_store: Mutex<Option<Instant>>,
    spans: tokio::sync::OnceCell<Arc<SpanIndex>>,
}

impl OpenLayer {
    /// A layer whose restart points are not known yet.
    ///
    /// # Errors
    /// When the chunk table describes no layer.
    pub fn new(
        layer: Arc<hermes_store::Layer>,
        marks: Arc<Marks>,
        image: String,
        origin: Option<LayerOrigin>,
        spans_from: SpanIndexSource,
    ) -> Result<Self, GeometryError> {
        let geometry = LayerGeometry::of_table(layer.table())?;
        Ok(Self {
            layer,
            image,
            origin,
            spans_from,
            counters: SourceCounters::default(),
            marks,
            geometry: RwLock::new(Arc::new(geometry)),
            warned_of_full_store: Mutex::new(None),
            spans: tokio::sync::OnceCell::new(),
        })
    }

    /// The layer.
    pub fn diff_id(&self) -> DiffId {
        self.layer.diff_id()
    }

    /// Chunks, and spans where they are known.
    pub fn geometry(&self) -> Arc<LayerGeometry> {
        Arc::clone(&self.geometry.read())
    }

    /// Whether to say that the store is full: it then is for every chunk, a thousand times a second.
    pub(super) fn should_warn_of_full_store(&self) -> bool {
        let mut warned = self.warned_of_full_store.lock();
        let is_due = warned.is_none_or(|at| at.elapsed() > FULL_STORE_WARNING_INTERVAL);
        if is_due {
            *warned = Some(Instant::now());
        }
        is_due
    }

    /// The restart points, fetched at the first call. Cancel safe.
    ///
    /// # Errors
    /// When nobody has them or they do not fit the layer.
    pub async fn spans(&self) -> Result<Arc<SpanIndex>, SpanIndexError> {
        self.spans.get_or_try_init(|| self.find_spans()).await.cloned()
    }

    async fn find_spans(&self) -> Result<Arc<SpanIndex>, SpanIndexError> {
        let id = self.spans_from.seek;
        let bytes = self.spans_from.artifacts.get(id).await?.ok_or(SpanIndexError::Missing(id))?;
        let damaged = |error: &dyn std::fmt::Display| SpanIndexError::Damaged(error.to_string());
        let seek = SeekTable::decode(bytes.into_inner()).map_err(|error| damaged(&error))?;
        let spans = seek.spans().map(|span| {
            let Range { start, end } = span.blob;
            Span { first_chunk: span.chunks.start, blob_start: start, blob_end: end }
        });
        let spans = spans.collect::<Vec<_>>();
        let one_stream = spans.len() == 1 && seek.count() == 1;
        let geometry = (*self.geometry()).clone().with_spans(spans).map_err(|error| damaged(&error))?;
        let geometry = if one_stream { geometry.as_whole_stream().map_err(|error| damaged(&error))? } else { geometry };
        *self.geometry.write() = Arc::new(geometry);
        Ok(Arc::new(SpanIndex { seek, source: self.spans_from.clone() }))
    }
}
