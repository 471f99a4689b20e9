//! Which layers are private, and who may read those.
//!
//! An image is private when its registry gave something of it only for a login, and public when it gave everything to
//! anybody ([`Origin::access`](hermes_origin::Origin::access)). That stands in the image's record in the store, so a daemon
//! that starts knows it. A layer is public when any image that has it is: everybody can get it there.
//!
//! ```text
//!  registry --> Access of the image --> ImageRecord --> layer, artifacts, statement
//!                                                        | public: everybody
//!                                                        | private: who has presented a grant for the layer
//! ```
//!
//! Everything that is here without a record is as good as private. A layer that is not here has nothing to tell but who
//! else asked for it; that is told unless the layer is known to be private. In an open swarm nobody can be granted anything,
//! and everybody may read everything.
//!
//! All state but the records is in memory: after a restart peers present their grants again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hermes_image::access::Access;
use hermes_image::ids::{ArtifactId, DiffId, Digest};
use hermes_p2p::PeerId;
use hermes_p2p::admission::grants::{GrantError, Grants};
use hermes_store::{ImageRecord, Store, StoreError};
use parking_lot::{Mutex, RwLock};

use crate::metrics::{Denial, RECORDED};

/// How long a grant of this node's own is good: as long as the certificates of members. It is renewed at half of that.
pub const GRANT_LIFE: Duration = Duration::from_secs(3600);
/// How often a refusal of the same layer to the same peer is logged at most.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// Refusals whose time is remembered. While more befall, the others are counted and not logged.
const LOGGED_MAX: usize = 4096;

/// What the records say, turned around.
#[derive(Debug, Default)]
struct Tables {
    images: BTreeMap<Digest, (Access, Vec<hermes_store::ImageLayer>)>,
    layers: BTreeMap<DiffId, Access>,
    artifacts: BTreeMap<ArtifactId, BTreeSet<DiffId>>,
}

impl Tables {
    /// Some hundred images with tens of layers each: some 10,000 entries, a millisecond or two, once for each mount.
    fn rebuild(&mut self) {
        self.layers.clear();
        self.artifacts.clear();
        for (access, layers) in self.images.values() {
            for layer in layers {
                let known = self.layers.entry(layer.diff_id).or_insert(*access);
                if *access == Access::Public {
                    *known = Access::Public;
                }
                for id in [layer.toc, layer.chunks, layer.seek, layer.windows] {
                    self.artifacts.entry(id).or_default().insert(layer.diff_id);
                }
            }
        }
    }
}

/// Says who may read what.
#[derive(Debug)]
pub struct Privacy {
    store: Arc<Store>,
    tables: RwLock<Tables>,
    /// Known once the node is in its swarm.
    grants: OnceLock<Arc<Grants>>,
    logged: Mutex<HashMap<(PeerId, String), Instant>>,
}

impl Privacy {
    /// As the records in `store` say.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn new(store: Arc<Store>) -> Result<Self, StoreError> {
        let images = store.images()?.into_iter().map(|image| (image.manifest, (image.access, image.layers))).collect();
        let mut tables = Tables { images, ..Tables::default() };
        tables.rebuild();
        Ok(Self { store, tables: RwLock::new(tables), grants: OnceLock::new(), logged: Mutex::default() })
    }

    /// Where peers' grants are. Until it is told, nobody has any.
    pub fn join(&self, grants: Arc<Grants>) {
        let _ = self.grants.set(grants);
    }

    /// Remembers what the record of an image says.
    pub fn set(&self, image: &ImageRecord) {
        let mut tables = self.tables.write();
        tables.images.insert(image.manifest, (image.access, image.layers.clone()));
        tables.rebuild();
    }

    /// Forgets an image whose record is gone.
    pub fn remove(&self, manifest: Digest) {
        let mut tables = self.tables.write();
        tables.images.remove(&manifest);
        tables.rebuild();
    }

    /// What the image `manifest` with `layers` is, now that its registry has said `told`, or was not asked.
    ///
    /// What was public once stays so. Without the registry's word it is what is known of its layers, and public when nothing
    /// of them is here: what then comes, comes without a login and without a grant.
    pub fn access_of(&self, manifest: Digest, layers: &[DiffId], told: Option<Access>) -> Access {
        let tables = self.tables.read();
        let known = tables.images.get(&manifest).map(|(access, _)| *access);
        if known == Some(Access::Public) {
            return Access::Public;
        }
        let is_open = |layer: &DiffId| match tables.layers.get(layer) {
            Some(access) => *access == Access::Public,
            None => self.store.open_layer(*layer).is_none(),
        };
        told.or(known).unwrap_or_else(|| if layers.iter().all(is_open) { Access::Public } else { Access::Private })
    }

    /// Whether the artifact `id` is of an image that has a record, or the swarm is open. Nobody is given others, such as
    /// trees with the names of all files.
    pub fn knows_artifact(&self, id: ArtifactId) -> bool {
        self.is_open() || self.tables.read().artifacts.contains_key(&id)
    }

    /// The same of the image `manifest`.
    pub fn knows_image(&self, manifest: Digest) -> bool {
        self.is_open() || self.tables.read().images.contains_key(&manifest)
    }

    /// Whether `peer` may have anything of `layer`.
    pub fn allows_layer(&self, peer: PeerId, layer: DiffId) -> bool {
        self.may_read(&peer, layer) || self.refuse(peer, &layer, Denial::NoGrant)
    }

    /// Whether `peer` may have the index artifact `id`, which is here: like a layer that it is of.
    pub fn allows_artifact(&self, peer: PeerId, id: ArtifactId) -> bool {
        let layers = self.tables.read().artifacts.get(&id).cloned().unwrap_or_default();
        self.is_open()
            || layers.iter().any(|layer| self.may_read(&peer, *layer))
            || self.refuse(peer, &id, Denial::NoGrant)
    }

    /// Whether `peer` may have the statement of `manifest`, which is here: that of a private image names all its layers,
    /// so all of them must be open to the peer.
    pub fn allows_statement(&self, peer: PeerId, manifest: Digest) -> bool {
        let image = self.tables.read().images.get(&manifest).cloned();
        let may_read = match image {
            Some((Access::Public, _)) => true,
            Some((Access::Private, layers)) => layers.iter().all(|layer| self.may_read(&peer, layer.diff_id)),
            None => self.is_open(),
        };
        may_read || self.is_open() || self.refuse(peer, &manifest, Denial::NoGrant)
    }

    /// Takes a grant that `peer` presents; whether it is good.
    pub fn present(&self, peer: PeerId, grant: &[u8]) -> bool {
        let Some(grants) = self.grants.get() else { return false };
        match grants.present(&peer, grant) {
            // It is worth nothing there, and does no harm.
            Ok(_) | Err(GrantError::Open) => true,
            Err(error) => {
                let denial = match &error {
                    GrantError::Decode(_) | GrantError::Open => Denial::GrantMalformed,
                    GrantError::OtherCluster => Denial::GrantOtherCluster,
                    GrantError::OtherPeer => Denial::GrantOtherPeer,
                    GrantError::Expired => Denial::GrantExpired,
                    GrantError::UnknownIssuer => Denial::GrantUnknownIssuer,
                    GrantError::Full { .. } => Denial::GrantNoRoom,
                };
                self.refuse(peer, &error, denial)
            }
        }
    }

    fn is_open(&self) -> bool {
        self.grants.get().is_some_and(|grants| grants.is_open())
    }

    fn may_read(&self, peer: &PeerId, layer: DiffId) -> bool {
        let access = self.tables.read().layers.get(&layer).copied();
        let is_public = match access {
            Some(access) => access == Access::Public,
            None => self.store.open_layer(layer).is_none(),
        };
        is_public || self.grants.get().is_some_and(|grants| grants.is_open() || grants.allows(peer, layer))
    }

    /// Counts a refusal, and logs it unless it did so within the last minute. Never true, so that it can end a condition.
    fn refuse(&self, peer: PeerId, what: &dyn std::fmt::Display, denial: Denial) -> bool {
        RECORDED.denied(denial);
        let (key, now) = ((peer, what.to_string()), Instant::now());
        let mut logged = self.logged.lock();
        if logged.len() >= LOGGED_MAX {
            logged.retain(|_, at| now.saturating_duration_since(*at) < LOG_EVERY);
        }
        let is_new = logged.get(&key).is_none_or(|at| now.saturating_duration_since(*at) >= LOG_EVERY);
        if is_new && (logged.len() < LOGGED_MAX || logged.contains_key(&key)) {
            tracing::info!(%peer, what = %key.1, reason = denial.name(), "a peer is denied what is private");
            logged.insert(key, now);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use hermes_image::ids::LayerId;
    use hermes_store::{ImageLayer, StoreConfig};

    use super::*;

    fn record(manifest: u8, layers: &[u8], access: Access) -> ImageRecord {
        let layer = |name: &u8| ImageLayer {
            layer: LayerId([*name; 32]),
            diff_id: DiffId([*name; 32]),
            toc: ArtifactId([name | 0x80; 32]),
            chunks: ArtifactId([name | 0x40; 32]),
            seek: ArtifactId([name | 0x20; 32]),
            windows: ArtifactId([name | 0x10; 32]),
        };
        ImageRecord {
            manifest: Digest([manifest; 32]),
            reference: "registry.test/team/app:1".to_owned(),
            platform: "linux/amd64".to_owned(),
            layers: layers.iter().map(layer).collect(),
            tree: None,
            last_use_seconds: 1,
            access,
            proven: true,
        }
    }

    fn privacy() -> (tempfile::TempDir, Privacy) {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(StoreConfig::new(folder.path())).expect("opens");
        (folder, Privacy::new(store).expect("reads"))
    }

    #[test]
    fn a_layer_is_public_when_any_image_of_it_is() {
        let (_folder, privacy) = privacy();
        let peer = PeerId::random();
        let (layer, artifact) = (|no| DiffId([no; 32]), |no: u8| ArtifactId([no | 0x80; 32]));
        privacy.set(&record(1, &[1, 2], Access::Private));
        assert!(!privacy.allows_layer(peer, layer(1)) && !privacy.allows_layer(peer, layer(2)));
        assert!(!privacy.allows_artifact(peer, artifact(1)) && !privacy.allows_statement(peer, Digest([1; 32])));
        privacy.set(&record(2, &[1, 3], Access::Public));
        assert!(privacy.allows_layer(peer, layer(1)) && privacy.allows_layer(peer, layer(3)));
        assert!(privacy.allows_artifact(peer, artifact(1)) && !privacy.allows_artifact(peer, artifact(2)));
        assert!(!privacy.allows_layer(peer, layer(2)) && !privacy.allows_statement(peer, Digest([1; 32])));
        assert!(privacy.allows_statement(peer, Digest([2; 32])));
        privacy.remove(Digest([2; 32]));
        assert!(!privacy.allows_layer(peer, layer(1)), "public after its public image is forgotten");
        // Nothing of it is here: as a rendezvous everybody may ask.
        assert!(privacy.allows_layer(peer, layer(9)));
        // An artifact without a record, such as a tree with all file names, is not even said to be here.
        assert!(privacy.knows_artifact(artifact(1)) && !privacy.knows_artifact(artifact(9)));
        assert!(privacy.knows_image(Digest([1; 32])) && !privacy.knows_image(Digest([2; 32])));
        assert!(!privacy.allows_artifact(peer, artifact(9)) && !privacy.allows_statement(peer, Digest([9; 32])));
        assert!(privacy.logged.lock().len() <= 8);
    }

    #[test]
    fn an_image_is_what_its_registry_says_and_public_for_good() {
        let (_folder, privacy) = privacy();
        let (manifest, layers) = (Digest([1; 32]), [DiffId([1; 32])]);
        assert_eq!(privacy.access_of(manifest, &layers, None), Access::Public);
        assert_eq!(privacy.access_of(manifest, &layers, Some(Access::Private)), Access::Private);
        privacy.set(&record(1, &[1], Access::Private));
        assert_eq!(privacy.access_of(manifest, &layers, None), Access::Private);
        assert_eq!(privacy.access_of(Digest([2; 32]), &layers, None), Access::Private, "an image with its layer");
        assert_eq!(privacy.access_of(manifest, &layers, Some(Access::Public)), Access::Public);
        privacy.set(&record(1, &[1], Access::Public));
        assert_eq!(privacy.access_of(manifest, &layers, Some(Access::Private)), Access::Public);
    }

    #[test]
    fn what_is_private_is_remembered() {
        let folder = tempfile::tempdir().expect("a folder");
        let open = || Store::open(StoreConfig::new(folder.path())).expect("opens");
        open().put_image(&record(1, &[1], Access::Private)).expect("kept");
        let privacy = Privacy::new(open()).expect("reads");
        assert!(!privacy.allows_layer(PeerId::random(), DiffId([1; 32])));
    }
}
