//! Who needs which tree.
//!
//! A tree is needed from before the first snapshot above it exists until after the last one is gone. Users are counted
//! by the number of their snapshot, so being told twice is as good as once. Nothing of this is durable: it is told
//! again, from the catalogue, when the service starts.
//!
//! One tree may be shown at several places one after the other: when its image has become complete, who comes then gets
//! another place than who came before. A snapshot needs every place that it was ever given, because containers have the
//! place in their mounts; a place that no snapshot needs any more is released while the others stay. Which places the
//! snapshots of an earlier process were given nobody knows: they need all that are shown.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use hermes_image::ids::ChainId;
use parking_lot::Mutex;

use super::images::{Images, ImagesError, RemoteChain};

/// The numbers of the snapshots that need one tree.
#[derive(Debug, Default)]
struct Needs {
    all: BTreeSet<u64>,
    /// Those that were given each place.
    places: BTreeMap<PathBuf, BTreeSet<u64>>,
}

impl Needs {
    fn gave(&mut self, place: PathBuf, user: u64) {
        self.places.entry(place).or_default().insert(user);
    }

    /// Takes `user` out; the places that nobody needs any more.
    fn leave(&mut self, user: u64) -> Vec<PathBuf> {
        for users in self.places.values_mut() {
            users.remove(&user);
        }
        self.places.extract_if(.., |_, users| users.is_empty()).map(|(place, _)| place).collect()
    }
}

/// Locked across the calls for that tree, so that it is not taken down while somebody has it shown.
type Users = Arc<tokio::sync::Mutex<Needs>>;

/// The trees that are needed.
#[derive(Debug)]
pub(super) struct Trees {
    images: Arc<dyn Images>,
    users: Mutex<BTreeMap<ChainId, Users>>,
}

impl Trees {
    pub(super) fn new(images: Arc<dyn Images>) -> Self {
        Self { images, users: Mutex::default() }
    }

    fn users(&self, chain: ChainId) -> Users {
        Arc::clone(self.users.lock().entry(chain).or_default())
    }

    /// Notes that the snapshot with the number `user` needs the tree of `chain`, and has it shown. Even when that
    /// fails the need stays noted, until [`Self::done`].
    pub(super) async fn need(&self, chain: &RemoteChain, user: u64) -> Result<PathBuf, ImagesError> {
        let users = self.users(chain.layer.chain);
        let mut needs = users.lock().await;
        needs.all.insert(user);
        let place = self.images.show(chain).await?;
        needs.gave(place.clone(), user);
        Ok(place)
    }

    /// The same for a snapshot of an earlier process, which may have given it any place that is still shown.
    pub(super) async fn need_again(&self, chain: &RemoteChain, user: u64) -> Result<(), ImagesError> {
        let users = self.users(chain.layer.chain);
        let mut needs = users.lock().await;
        needs.all.insert(user);
        for place in self.images.places(chain).await {
            needs.gave(place, user);
        }
        let place = self.images.show(chain).await?;
        needs.gave(place, user);
        Ok(())
    }

    /// Notes that the snapshot no longer needs it.
    pub(super) async fn done(&self, chain: &RemoteChain, user: u64) {
        let users = self.users(chain.layer.chain);
        {
            let mut needs = users.lock().await;
            if needs.all.remove(&user) {
                let unused = needs.leave(user);
                if needs.all.is_empty() {
                    self.images.release(chain, None).await;
                } else {
                    for place in &unused {
                        self.images.release(chain, Some(place)).await;
                    }
                }
            }
        }
        let mut all = self.users.lock();
        // Two owners are the map and this call: nobody is about to become a user.
        if Arc::strong_count(&users) == 2 && users.try_lock().is_ok_and(|needs| needs.all.is_empty()) {
            all.remove(&chain.layer.chain);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use futures::future::BoxFuture;
    use hermes_image::ids::{DiffId, Digest, LayerId};
    use hermes_store::{RemoteLayer, SnapshotKind, SnapshotRecord, SnapshotUsage};

    use super::super::images::{Decision, PulledLayer};
    use super::*;

    /// Shows one tree at the place that was set last.
    #[derive(Debug, Default)]
    struct Shows {
        place: Mutex<Option<PathBuf>>,
        shown: Mutex<BTreeSet<PathBuf>>,
        released: Mutex<Vec<Option<PathBuf>>>,
    }

    impl Shows {
        fn moves_to(&self, place: &str) {
            *self.place.lock() = Some(place.into());
        }

        fn released(&self) -> Vec<Option<PathBuf>> {
            std::mem::take(&mut self.released.lock())
        }
    }

    impl Images for Shows {
        fn decide<'a>(&'a self, _layer: &'a PulledLayer) -> BoxFuture<'a, Decision> {
            Box::pin(async { Decision::Plain { reason: String::new() } })
        }

        fn show<'a>(&'a self, _chain: &'a RemoteChain) -> BoxFuture<'a, Result<PathBuf, ImagesError>> {
            Box::pin(async {
                let place = self.place.lock().clone().ok_or(ImagesError::Unavailable("nowhere".to_owned()))?;
                self.shown.lock().insert(place.clone());
                Ok(place)
            })
        }

        fn places<'a>(&'a self, _chain: &'a RemoteChain) -> BoxFuture<'a, Vec<PathBuf>> {
            Box::pin(async { self.shown.lock().iter().cloned().collect() })
        }

        fn release<'a>(&'a self, _chain: &'a RemoteChain, place: Option<&'a Path>) -> BoxFuture<'a, ()> {
            Box::pin(async move { self.released.lock().push(place.map(Path::to_owned)) })
        }

        fn usage<'a>(&'a self, _layer: &'a RemoteLayer) -> BoxFuture<'a, Result<SnapshotUsage, ImagesError>> {
            Box::pin(async { Ok(SnapshotUsage::default()) })
        }

        fn removed<'a>(&'a self, _layer: &'a RemoteLayer) -> BoxFuture<'a, ()> {
            Box::pin(async {})
        }
    }

    fn chain() -> RemoteChain {
        let layer = RemoteLayer {
            chain: ChainId::of(&[DiffId([1; 32])]).expect("a chain"),
            diff_id: DiffId([1; 32]),
            layer: LayerId([2; 32]),
            manifest: Digest([3; 32]),
        };
        let top = SnapshotRecord {
            id: 1,
            name: "top".to_owned(),
            kind: SnapshotKind::Committed,
            parent: None,
            labels: BTreeMap::new(),
            created_ns: 0,
            updated_ns: 0,
            usage: SnapshotUsage::default(),
            remote: Some(layer),
        };
        RemoteChain { layer, top, below: Vec::new() }
    }

    #[tokio::test]
    async fn a_place_goes_with_its_last_user_and_the_tree_with_the_last_of_all() {
        let images = Arc::new(Shows::default());
        let trees = Trees::new(Arc::clone(&images) as Arc<dyn Images>);
        let chain = chain();
        images.moves_to("/old");
        for user in [1, 2] {
            assert_eq!(trees.need(&chain, user).await.as_deref(), Ok(Path::new("/old")));
        }
        images.moves_to("/new");
        assert_eq!(trees.need(&chain, 3).await.as_deref(), Ok(Path::new("/new")));
        // Asked for again, it may still run on the old one.
        trees.need(&chain, 1).await.expect("shown");
        trees.done(&chain, 2).await;
        assert_eq!(images.released(), []);
        trees.done(&chain, 1).await;
        assert_eq!(images.released(), [Some("/old".into())]);
        trees.done(&chain, 1).await;
        assert_eq!(images.released(), []);
        trees.done(&chain, 3).await;
        assert_eq!(images.released(), [None]);
        assert!(trees.users.lock().is_empty());
    }

    #[tokio::test]
    async fn snapshots_of_an_earlier_process_need_every_place() {
        let images = Arc::new(Shows::default());
        images.shown.lock().insert("/old".into());
        images.moves_to("/new");
        let trees = Trees::new(Arc::clone(&images) as Arc<dyn Images>);
        let chain = chain();
        trees.need_again(&chain, 1).await.expect("shown");
        trees.need(&chain, 2).await.expect("shown");
        trees.done(&chain, 2).await;
        assert_eq!(images.released(), []);
        trees.done(&chain, 1).await;
        assert_eq!(images.released(), [None]);
    }

    #[tokio::test]
    async fn a_tree_that_could_not_be_shown_is_released_as_well() {
        let images = Arc::new(Shows::default());
        let trees = Trees::new(Arc::clone(&images) as Arc<dyn Images>);
        let chain = chain();
        trees.need(&chain, 1).await.expect_err("nowhere");
        trees.done(&chain, 1).await;
        assert_eq!(images.released(), [None]);
    }
}
