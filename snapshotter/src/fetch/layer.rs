//! A layer that can be fetched: whom it is open for, which of its blobs is read, its counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hermes_image::ids::{ArtifactId, DiffId, LayerId};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::statement::LayerStatement;
use hermes_origin::{LayerDescriptor, Origin};
use hermes_policy::class::ErrorClass;
use hermes_policy::event::OriginNo;
use hermes_policy::geometry::{GeometryError, LayerGeometry};
use parking_lot::{Mutex, RwLock};

use super::Marks;
use super::blob::Blob;
use super::donor::{DONOR_TABLE_MAX_BYTES, DONORS_MAX, Donor};
use crate::artifacts::Artifacts;
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
    /// What the signer of its index says of the layer, and of the blob that the image names.
    pub statement: LayerStatement,
    /// Its registry, with its credentials; `None` when it came without one.
    pub origin: Option<LayerOrigin>,
}

impl LayerUser {
    /// The users that a mount of `image` makes, one for each of its layers.
    pub fn of_image(mount: MountNo, image: &str, layers: &[LayerStatement], origin: Option<&LayerOrigin>) -> Vec<Self> {
        let user = |statement: &LayerStatement| Self {
            mount,
            image: image.to_owned(),
            statement: statement.clone(),
            origin: origin.cloned(),
        };
        layers.iter().map(user).collect()
    }

    fn blob(&self) -> LayerId {
        self.statement.layer
    }
}

/// The registry of an image.
#[derive(Debug, Clone)]
pub struct LayerOrigin {
    /// By which the policy knows the host.
    pub number: OriginNo,
    /// Reads blobs.
    pub origin: Arc<Origin>,
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

/// Whom a layer is open for, and which of their blobs is read.
#[derive(Debug)]
struct Users {
    /// The registry of the first that has one is asked first.
    all: Vec<LayerUser>,
    blob: Arc<Blob>,
    /// Blobs that their registries have refused since the users changed.
    refused: Vec<LayerId>,
}

impl Users {
    fn has_registry(&self, blob: LayerId) -> bool {
        self.all.iter().any(|user| user.blob() == blob && user.origin.is_some())
    }
}

/// A layer that is open for reading.
#[derive(Debug)]
pub struct OpenLayer {
    /// The bytes at rest.
    pub layer: Arc<hermes_store::Layer>,
    /// Where its bytes came from.
    pub counters: SourceCounters,
    /// Where its readers should be heard of.
    pub marks: Arc<Marks>,
    /// What starts that are being recorded have read of it.
    pub touches: Arc<Touches>,
    /// Where restart points are looked for.
    artifacts: Artifacts,
    /// Its chunks alone.
    chunks: Arc<LayerGeometry>,
    users: RwLock<Users>,
    donors: RwLock<Vec<Arc<Donor>>>,
    warned_of_full_store: Mutex<Option<Instant>>,
    /// When a reader last waited for something that was not here.
    last_miss: Mutex<Option<Instant>>,
    /// How the last attempt to read a registry has failed; `None` when it has not.
    registry_failure: Mutex<Option<ErrorClass>>,
    /// The peers that may be watched at once.
    pub(super) partners: Arc<tokio::sync::Semaphore>,
}

impl OpenLayer {
    /// A layer whose restart points are not known yet, and are looked for in `artifacts`.
    ///
    /// # Errors
    /// When the chunk table describes no layer.
    pub fn new(layer: Arc<hermes_store::Layer>, user: LayerUser, artifacts: Artifacts) -> Result<Self, GeometryError> {
        let chunks = Arc::new(LayerGeometry::of_table(layer.table())?);
        let touches = Arc::new(Touches::new(layer.table().count()));
        let blob = Arc::new(Blob::new(artifacts.clone(), user.statement.clone(), Arc::clone(&chunks)));
        Ok(Self {
            layer,
            counters: SourceCounters::default(),
            marks: Arc::default(),
            touches,
            artifacts,
            chunks,
            users: RwLock::new(Users { all: vec![user], blob, refused: Vec::new() }),
            donors: RwLock::default(),
            warned_of_full_store: Mutex::new(None),
            last_miss: Mutex::new(None),
            registry_failure: Mutex::new(None),
            partners: Arc::new(tokio::sync::Semaphore::new(PARTNERS_MAX)),
        })
    }

    /// The layer.
    pub fn diff_id(&self) -> DiffId {
        self.layer.diff_id()
    }

    /// Lets holders of the layer `donor`, whose chunk table is `table`, give what it has in common with this one. Whether there
    /// is something. Cancel safe.
    pub(crate) async fn take_donor(&self, donor: DiffId, table: ArtifactId) -> bool {
        let is_known = |donors: &[Arc<Donor>]| donors.iter().any(|known| known.table().id() == table);
        if donor == self.diff_id() || is_known(&self.donors.read()) {
            return false;
        }
        let found = self.artifacts.glance(table, donor, DONOR_TABLE_MAX_BYTES).await.inspect_err(|error| {
            tracing::warn!(layer = %self.diff_id(), %donor, %error, "an earlier version's layer gives nothing");
        });
        let Ok(Some(bytes)) = found else { return false };
        let open = self.layer.table().clone();
        let made = tokio::task::spawn_blocking(move || {
            let table = ChunkTable::decode(bytes.into_inner()).ok().filter(|table| table.diff_id() == donor)?;
            Donor::new(&open, table)
        });
        let Ok(Some(made)) = made.await else { return false };
        let mut donors = self.donors.write();
        let has_room = donors.len() < DONORS_MAX && !is_known(&donors);
        if has_room {
            donors.push(Arc::new(made));
        }
        has_room
    }

    /// The layers whose holders can give chunks of this one.
    pub(super) fn donors(&self) -> Vec<Arc<Donor>> {
        self.donors.read().clone()
    }

    /// Opens it for one more mount. Its registry is asked before the others: its credentials are the newest.
    pub fn add_user(&self, user: LayerUser) {
        let mut users = self.users.write();
        users.all.retain(|known| known.mount != user.mount);
        users.all.insert(0, user);
    }

    /// Closes it for `mount`; how many mounts it is still open for.
    pub fn remove_user(&self, mount: MountNo) -> usize {
        let mut users = self.users.write();
        users.all.retain(|user| user.mount != mount);
        users.all.len()
    }

    /// An image that it is open for, for messages.
    pub fn image(&self) -> String {
        self.users.read().all.first().map_or_else(String::new, |user| user.image.clone())
    }

    /// The registries that have the blob that is read, in the order in which they are asked.
    pub fn origins(&self) -> Vec<LayerOrigin> {
        self.origins_of(&self.blob()).into_iter().map(|(origin, _)| origin).collect()
    }

    /// The registries that have `blob`, in the order in which they are asked, with what each calls it.
    pub(super) fn origins_of(&self, blob: &Blob) -> Vec<(LayerOrigin, LayerDescriptor)> {
        let users = self.users.read();
        let named = users.all.iter().filter(|user| user.blob() == blob.id());
        let origins =
            named.filter_map(|user| Some((user.origin.clone()?, LayerDescriptor::of_statement(&user.statement))));
        origins.collect()
    }

    /// By which the policy knows the registry that is asked first.
    pub fn origin_number(&self) -> Option<OriginNo> {
        let users = self.users.read();
        let mut named = users.all.iter().filter(|user| user.blob() == users.blob.id());
        named.find_map(|user| user.origin.as_ref()).map(|origin| origin.number)
    }

    /// Asks this registry before or after all others from now on.
    pub(super) fn rank(&self, origin: &LayerOrigin, rank: Rank) {
        let mut users = self.users.write();
        let is_it =
            |user: &LayerUser| user.origin.as_ref().is_some_and(|known| Arc::ptr_eq(&known.origin, &origin.origin));
        // The sort is stable: the others keep their order.
        users.all.sort_by_key(|user| match rank {
            Rank::First => !is_it(user),
            Rank::Last => is_it(user),
        });
    }

    /// The blob that registries are read for.
    pub(super) fn blob(&self) -> Arc<Blob> {
        Arc::clone(&self.users.read().blob)
    }

    /// Takes note that users came or went, and gives all their blobs another chance. Whether another blob is read from now on,
    /// because nobody names a registry any more for the one that was. For the driver alone, which tells the policy.
    pub(super) fn users_changed(&self) -> bool {
        let mut users = self.users.write();
        users.refused.clear();
        !users.has_registry(users.blob.id()) && self.turn(&mut users)
    }

    /// Takes note that `blob` cannot be read from any of its registries. Whether another one is read from now on; when all were
    /// refused, each gets another chance. For the driver alone, which tells the policy.
    pub(super) fn refused(&self, blob: &Blob) -> bool {
        let mut users = self.users.write();
        users.refused.push(blob.id());
        let turned = self.turn(&mut users);
        if !turned {
            users.refused.clear();
        }
        turned
    }

    fn turn(&self, users: &mut Users) -> bool {
        let is_other = |user: &&LayerUser| {
            user.origin.is_some() && user.blob() != users.blob.id() && !users.refused.contains(&user.blob())
        };
        let Some(next) = users.all.iter().find(is_other).map(|user| user.statement.clone()) else { return false };
        tracing::info!(layer = %self.diff_id(), blob = %next.layer, "the layer is read in another image's compression");
        users.blob = Arc::new(Blob::new(self.artifacts.clone(), next, Arc::clone(&self.chunks)));
        true
    }

    /// Chunks, and spans of the blob that is read where they are known.
    pub fn geometry(&self) -> Arc<LayerGeometry> {
        self.users.read().blob.geometry()
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
}
