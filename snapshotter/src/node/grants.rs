//! This node's own grants: proofs that it may read what it shows.
//!
//! A registry that gives this node an image proves that it may have the image's layers, so the issuer is asked for grants
//! of all of them then, public or not: peers may know another registry or another login for the same layers, and only they
//! say what they hold back. The grants are shown to peers that deny something. Those of images that are shown are renewed
//! at half of their life, because what is shown can be read here anyhow; the others end by themselves.
//!
//! All of it is in memory. A daemon that starts has the layers granted anew of what goes on being shown.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use hermes_image::access::Access;
use hermes_image::ids::{DiffId, Digest};
use hermes_p2p::unix_now;
use hermes_store::{ImageRecord, StoreError};

use super::{Inner, NodeError};
use crate::privacy::GRANT_LIFE;

/// How often it looks what has to be renewed: an issuer that is away for long is asked some thirty times.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// Renews the grants for what is shown. Ends with the node.
pub(super) async fn run(node: Weak<Inner>) {
    loop {
        let Some(inner) = node.upgrade() else { return };
        match inner.due().await {
            Ok(due) => inner.prove(due).await,
            Err(error) => tracing::warn!(%error, "grants are not renewed"),
        }
        drop(inner);
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

impl Inner {
    /// Layers of images that are shown and that their registries have given to this node, whose grants are missing or end
    /// within half of their life.
    async fn due(&self) -> Result<Vec<DiffId>, NodeError> {
        let shown: BTreeSet<Digest> = self.images.lock().await.iter().map(|image| image.manifest).collect();
        let store = Arc::clone(&self.store);
        let records = tokio::task::spawn_blocking(move || {
            shown.into_iter().filter_map(|manifest| store.image(manifest).transpose()).collect::<Result<Vec<_>, _>>()
        });
        let records = records.await.map_err(|_| NodeError::Interrupted)??;
        let layers = records.iter().filter(|record| record.proven).flat_map(|record| &record.layers);
        let distinct: BTreeSet<DiffId> = layers.map(|layer| layer.diff_id).collect();
        let renew_before = unix_now() + GRANT_LIFE.as_secs() / 2;
        let is_due = |layer: &DiffId| {
            let own = self.peers.grants().own_with_end(*layer);
            own.is_none_or(|(not_after, _)| not_after < renew_before)
        };
        Ok(distinct.into_iter().filter(is_due).collect())
    }

    /// Has `layers` granted to this node, whose registry has given them. When that fails, peers deny what is private, and
    /// the registry is read instead.
    pub(super) async fn prove(&self, layers: Vec<DiffId>) {
        if layers.is_empty() {
            return;
        }
        if let Err(error) = self.peers.grant_own(layers, GRANT_LIFE).await {
            tracing::warn!(%error, "nothing that is private will come from peers");
        }
    }

    /// What an image is, now that its registry has said `told`, or was not asked.
    pub(super) fn access_of(&self, manifest: Digest, layers: &[DiffId], told: Option<Access>) -> Access {
        self.privacy.access_of(manifest, layers, told)
    }

    /// Keeps the record of an image, and who may read it. Before anything of it is given to anybody.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub(super) fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        self.store.put_image(record)?;
        self.privacy.set(record);
        Ok(())
    }
}
