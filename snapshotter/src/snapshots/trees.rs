//! Who needs which tree.
//!
//! A tree is needed from before the first snapshot above it exists until after the last one is gone. Users are counted
//! by the number of their snapshot, so being told twice is as good as once. Nothing of this is durable: it is told
//! again, from the catalogue, when the service starts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use hermes_image::ids::ChainId;
use parking_lot::Mutex;

use super::images::{Images, ImagesError, RemoteChain};

/// The numbers of the snapshots that need one tree. Locked across the calls for that tree, so that it is not taken down
/// while somebody has it shown.
type Users = Arc<tokio::sync::Mutex<BTreeSet<u64>>>;

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
        let mut users = users.lock().await;
        users.insert(user);
        self.images.show(chain).await
    }

    /// Notes that the snapshot no longer needs it.
    pub(super) async fn done(&self, chain: &RemoteChain, user: u64) {
        let users = self.users(chain.layer.chain);
        {
            let mut users = users.lock().await;
            if users.remove(&user) && users.is_empty() {
                self.images.release(chain).await;
            }
        }
        let mut all = self.users.lock();
        // Two owners are the map and this call: nobody is about to become a user.
        if Arc::strong_count(&users) == 2 && users.try_lock().is_ok_and(|users| users.is_empty()) {
            all.remove(&chain.layer.chain);
        }
    }
}
