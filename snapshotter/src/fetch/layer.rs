//! A layer that can be fetched: its tables, its registry, its restart points, its counters.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, DiffId, SpanNo};
use hermes_image::index::seek::SeekTable;
use hermes_image::statement::LayerStatement;
use hermes_image::verify::Verified;
use hermes_policy::class::ErrorClass;
use hermes_policy::event::OriginNo;
use hermes_policy::geometry::{GeometryError, LayerGeometry, Span};
use parking_lot::{Mutex, RwLock};
use thiserror::Error;

use super::Marks;
use crate::artifacts::{ArtifactError, Artifacts};
use crate::origin::{LayerDescriptor, Origin};
use crate::profile::Touches;
use crate::status::BySource;

/// Time between two warnings that a layer's chunks find no room: often enough to be seen in the tail of a log.
const FULL_STORE_WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// A mount of this daemon, by a number that is never given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MountNo(pub u64);

/// A mounted image that reads a layer.
#[derive(Debug, Clone)]
pub struct LayerUser {
    /// The mount.
    pub mount: MountNo,
    /// The image, for messages.
    pub image: String,
    /// Its registry, with its credentials; `None` when it came without one.
    pub origin: Option<LayerOrigin>,
}

/// The registry of a layer, as one image names it.
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
    /// What the signer says of the layer, and with it of its seek table.
    pub statement: LayerStatement,
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
            let none = self.seek.verify_window(span, Bytes::new());
            return none.map_err(|mismatch| SpanIndexError::Damaged(format!("window {span}: {mismatch}")));
        }
        let windows = self.seek.windows_id();
        let (source, layer) = (&self.source, self.source.statement.diff_id);
        let check = |bytes| self.seek.verify_window(span, bytes);
        let found = source.artifacts.range(windows, layer, range, check).await?;
        found.ok_or(SpanIndexError::Missing(windows))
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

/// Peers whose progress with one layer is followed: with 32, news cost a node 0.2 MB/s at most (design, section 6).
const PARTNERS_MAX: usize = 32;

/// The place of a registry among those of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rank {
    /// It has given what it was asked for.
    First,
    /// It has failed.
    Last,
}

/// A layer that is open for reading.
#[derive(Debug)]
pub struct OpenLayer {
    /// The bytes at rest.
    pub layer: Arc<hermes_store::Layer>,
    /// Where its restart points are looked for when the registry is needed.
    pub spans_from: SpanIndexSource,
    /// Where its bytes came from.
    pub counters: SourceCounters,
    /// Where its readers should be heard of.
    pub marks: Arc<Marks>,
    /// What starts that are being recorded have read of it.
    pub touches: Arc<Touches>,
    /// Whom it is open for. The registry of the first that has one is asked first.
    users: RwLock<Vec<LayerUser>>,
    geometry: RwLock<Arc<LayerGeometry>>,
    warned_of_full_store: Mutex<Option<Instant>>,
    /// When a reader last waited for something that was not here.
    last_miss: Mutex<Option<Instant>>,
    /// How the last attempt to read a registry has failed; `None` when it has not.
    registry_failure: Mutex<Option<ErrorClass>>,
    /// The peers that may be watched at once.
    pub(super) partners: Arc<tokio::sync::Semaphore>,
    spans: tokio::sync::OnceCell<Arc<SpanIndex>>,
}

impl OpenLayer {
    /// A layer whose restart points are not known yet.
    ///
    /// # Errors
    /// When the chunk table describes no layer.
    pub fn new(
        layer: Arc<hermes_store::Layer>,
        user: LayerUser,
        spans_from: SpanIndexSource,
    ) -> Result<Self, GeometryError> {
        let geometry = LayerGeometry::of_table(layer.table())?;
        let touches = Arc::new(Touches::new(layer.table().count()));
        Ok(Self {
            layer,
            spans_from,
            counters: SourceCounters::default(),
            marks: Arc::default(),
            touches,
            users: RwLock::new(vec![user]),
            geometry: RwLock::new(Arc::new(geometry)),
            warned_of_full_store: Mutex::new(None),
            last_miss: Mutex::new(None),
            registry_failure: Mutex::new(None),
            partners: Arc::new(tokio::sync::Semaphore::new(PARTNERS_MAX)),
            spans: tokio::sync::OnceCell::new(),
        })
    }

    /// The layer.
    pub fn diff_id(&self) -> DiffId {
        self.layer.diff_id()
    }

    /// Opens it for one more mount. Its registry is asked before the others: its credentials are the newest.
    pub fn add_user(&self, user: LayerUser) {
        let mut users = self.users.write();
        users.retain(|known| known.mount != user.mount);
        users.insert(0, user);
    }

    /// Closes it for `mount`; how many mounts it is still open for.
    pub fn remove_user(&self, mount: MountNo) -> usize {
        let mut users = self.users.write();
        users.retain(|user| user.mount != mount);
        users.len()
    }

    /// An image that it is open for, for messages.
    pub fn image(&self) -> String {
        self.users.read().first().map_or_else(String::new, |user| user.image.clone())
    }

    /// The registries that have it, in the order in which they are asked.
    pub fn origins(&self) -> Vec<LayerOrigin> {
        self.users.read().iter().filter_map(|user| user.origin.clone()).collect()
    }

    /// By which the policy knows the registry that is asked first.
    pub fn origin_number(&self) -> Option<OriginNo> {
        self.users.read().iter().find_map(|user| user.origin.as_ref()).map(|origin| origin.number)
    }

    /// Asks this registry before or after all others from now on.
    pub(super) fn rank(&self, origin: &LayerOrigin, rank: Rank) {
        let mut users = self.users.write();
        let is_it =
            |user: &LayerUser| user.origin.as_ref().is_some_and(|known| Arc::ptr_eq(&known.origin, &origin.origin));
        // The sort is stable: the others keep their order.
        users.sort_by_key(|user| match rank {
            Rank::First => !is_it(user),
            Rank::Last => is_it(user),
        });
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

    /// Notes that a reader waits for something that is not here.
    pub(super) fn missed(&self, now: Instant) {
        *self.last_miss.lock() = Some(now);
    }

    /// When a reader last waited for something that was not here; `None` when none has since the layer was opened.
    pub fn last_miss(&self) -> Option<Instant> {
        *self.last_miss.lock()
    }

    /// Notes how an attempt to read a registry has ended. Whether that is a failure of another kind than the last
    /// attempt's: an outage has hundreds of the same.
    pub fn registry_ended(&self, failure: Option<ErrorClass>) -> bool {
        let mut last = self.registry_failure.lock();
        let is_news = failure.is_some() && *last != failure;
        *last = failure;
        is_news
    }

    /// The restart points, fetched at the first call. Cancel safe.
    ///
    /// # Errors
    /// When nobody has them or they do not fit the layer.
    pub async fn spans(&self) -> Result<Arc<SpanIndex>, SpanIndexError> {
        self.spans.get_or_try_init(|| self.find_spans()).await.cloned()
    }

    async fn find_spans(&self) -> Result<Arc<SpanIndex>, SpanIndexError> {
        let (id, layer) = (self.spans_from.statement.seek, self.spans_from.statement.diff_id);
        let bytes = self.spans_from.artifacts.get(id, layer).await?.ok_or(SpanIndexError::Missing(id))?;
        let damaged = |error: &dyn std::fmt::Display| SpanIndexError::Damaged(error.to_string());
        let seek = SeekTable::decode(bytes.into_inner()).map_err(|error| damaged(&error))?;
        self.spans_from.statement.check_seek(&seek, self.layer.table()).map_err(|error| damaged(&error))?;
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
