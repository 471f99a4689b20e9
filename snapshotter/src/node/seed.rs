//! Images that the controller wants this node to hold before a pod needs them.
//!
//! An image is opened as for a mount, without one: its layers get a user, what is wanted of them is fetched as what nobody
//! waits for, and they are closed again. It is pinned as long as it is wanted, so that it is not forgotten; its chunks are
//! evicted like all others when readers need their room, and nothing is begun that the store has no room for. A daemon
//! that starts begins again with what the controller said last, and finds what is here already.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use hermes_controller_api::v1::seed::Mode;
use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;
use hermes_policy::profile::Profile;

use super::complete::sync_layers;
use super::mount::OpenIndex;
use super::{Inner, NodeError};
use crate::controller::Wanted;
use crate::fetch::{Class, LayerUser, MountNo, OpenLayer};
use hermes_origin::Origin;

/// Who pins images that are held so.
const SEED_PIN: &str = "seed";
/// Steps of a profile that are asked for at once.
const STEPS_AT_ONCE: usize = 8;
/// Longest that one step waits for its bytes.
const PATIENCE: Duration = Duration::from_secs(600);
/// Room that is left to readers, in bytes.
const MARGIN_BYTES: u64 = 64 << 20;

impl Inner {
    /// Lets go of images that are no more in `wanted`.
    pub(super) fn release_seeds(&self, wanted: &[Wanted]) {
        let pins = self.store.pins().unwrap_or_default().into_iter().filter(|(_, owner)| owner == SEED_PIN);
        for (manifest, _) in pins.filter(|(manifest, _)| !wanted.iter().any(|wanted| wanted.manifest == *manifest)) {
            match self.store.unpin(manifest, SEED_PIN) {
                Ok(()) => self.forget_due.notify_one(),
                Err(error) => tracing::warn!(%manifest, %error, "an image is held for longer than it is wanted"),
            }
        }
    }

    /// Gets what is wanted of an image, and holds it.
    ///
    /// # Errors
    /// When its index or its bytes cannot be had, or there is no room.
    pub(super) async fn hold_seed(self: &Arc<Self>, wanted: &Wanted) -> Result<(), NodeError> {
        let manifest = wanted.manifest;
        let references = match wanted.references.is_empty() {
            false => wanted.references.clone(),
            true => self.private_references(wanted).await,
        };
        let named = references.first().cloned().unwrap_or_else(|| manifest.to_string());
        let resolved = self.resolve_manifest(&named, manifest).await;
        let resolved = resolved.inspect_err(|refusal| {
            tracing::info!(image = named, reason = refusal.reason, "an image to be held can come from peers only");
        });
        let origin = resolved.as_ref().ok().map(|(origin, _)| Arc::clone(origin));
        let proof: Vec<DiffId> = resolved.iter().flat_map(|(_, image)| &image.layers).map(|it| it.diff_id).collect();
        let _keeping = self.keeping.read().await;
        let found = self.artifacts.statement(manifest, &self.trusted(), &proof).await;
        let found = found.map_err(|source| NodeError::Statement { image: named.clone(), source: Box::new(source) })?;
        let (statement, signed) = found.ok_or_else(|| NodeError::NoIndex { image: named.clone(), manifest })?;
        let index = self.open_index(&named, statement).await?;
        self.store.pin(manifest, SEED_PIN)?;
        self.remember(&named, &index, origin.as_ref().and_then(|origin| origin.access()))?;
        let own = self.own_indexes();
        own.put_statement(manifest, &signed).map_err(crate::artifacts::ArtifactError::from)?;
        if let Some(reference) = references.first() {
            own.put_reference(manifest, reference).map_err(crate::artifacts::ArtifactError::from)?;
        }
        self.content.add_statement(manifest, signed);
        let missing = self.artifacts.get_restart_points(&index.statement).await?;
        if wanted.mode == Mode::Index {
            let lacks = |id| Err(NodeError::MissingArtifact { image: named, what: "restart points", id });
            return missing.map_or(Ok(()), lacks);
        }
        let mount = MountNo(self.next_mount.fetch_add(1, Ordering::Relaxed));
        let layers: Vec<DiffId> = index.statement.layers.iter().map(|layer| layer.diff_id).collect();
        let fetched = self.fetch_seed(wanted, mount, &named, origin, &index).await;
        let _mounting = self.mounting.lock().await;
        self.close_layers(mount, &layers).await;
        fetched
    }

    /// Where a private image is from, which the controller tells those that are to hold it.
    async fn private_references(&self, wanted: &Wanted) -> Vec<String> {
        let Some(controller) = &self.controller else { return Vec::new() };
        let image = controller.whole_image(wanted.manifest, Vec::new()).await;
        image.map(|image| image.references).unwrap_or_default()
    }

    async fn fetch_seed(
        &self,
        wanted: &Wanted,
        mount: MountNo,
        named: &str,
        origin: Option<Arc<Origin>>,
        index: &OpenIndex,
    ) -> Result<(), NodeError> {
        let (store, tables) = (Arc::clone(&self.store), index.tables.clone());
        let stored = tokio::task::spawn_blocking(move || store.layers_of(&tables)).await;
        let stored = stored.map_err(|_| NodeError::Interrupted)??;
        let _uses: Vec<_> = stored.iter().map(|layer| layer.hold()).collect();
        let origin = origin.map(|origin| self.layer_origin(&origin));
        let users = LayerUser::of_image(mount, named, &index.statement.layers, origin.as_ref());
        let opened = {
            let _mounting = self.mounting.lock().await;
            self.open_layers(stored, users).await?
        };
        let layers: Vec<Arc<OpenLayer>> = opened.into_iter().map(|(layer, _)| layer).collect();
        self.announce(&layers);
        let proof: Vec<DiffId> = layers.iter().map(|layer| layer.diff_id()).collect();
        let profile = match wanted.mode {
            Mode::Hot => self.profiling.profiles.fetch(wanted.manifest, &proof).await,
            Mode::Index | Mode::Full => None,
        };
        let parts = match &profile {
            Some((profile, _)) => steps(profile, &layers),
            None => layers.iter().map(|layer| (Arc::clone(layer), 0..layer.layer.table().count())).collect(),
        };
        let missing =
            parts.iter().map(|(layer, chunks)| missing_bytes(layer, &layer.layer.missing(chunks.clone()))).sum();
        self.check_seed_room(missing)?;
        match profile {
            Some(_) => self.fetch_steps(parts).await?,
            None => self.fetch_all(&layers, || ()).await?,
        }
        sync_layers(layers).await?;
        tracing::info!(image = named, bytes = missing, mode = wanted.mode.as_str_name(), "holding an image for others");
        Ok(())
    }

    fn check_seed_room(&self, missing_bytes: u64) -> Result<(), NodeError> {
        let spare = self.store.spare_bytes()?;
        let fits = missing_bytes == 0 || missing_bytes.saturating_add(MARGIN_BYTES) <= spare;
        if fits { Ok(()) } else { Err(NodeError::Full { store: self.config.state.join("store") }) }
    }

    async fn fetch_steps(&self, steps: Vec<(Arc<OpenLayer>, std::ops::Range<u32>)>) -> Result<(), NodeError> {
        let fetches = steps.into_iter().map(|(layer, chunks)| async move {
            let missing = layer.layer.missing(chunks);
            if missing.is_empty() {
                return Ok(());
            }
            let need = self.fetch.need(layer.diff_id(), missing, Class::Prefetch, Instant::now() + PATIENCE);
            let overflow = need.await?;
            if overflow.is_empty() { Ok(()) } else { Err(NodeError::Full { store: self.config.state.join("store") }) }
        });
        let fetches: Vec<_> = fetches.collect();
        stream::iter(fetches).buffer_unordered(STEPS_AT_ONCE).try_for_each(|()| std::future::ready(Ok(()))).await
    }
}

/// The chunks that a profile names, in its order, as far as these layers have them.
fn steps(profile: &Profile, layers: &[Arc<OpenLayer>]) -> Vec<(Arc<OpenLayer>, std::ops::Range<u32>)> {
    let of = |step: &hermes_policy::profile::Step| {
        let diff_id = profile.layers.get(usize::from(step.layer))?;
        let layer = layers.iter().find(|layer| layer.diff_id() == *diff_id)?;
        let end = step.chunks.end.min(layer.layer.table().count());
        (step.chunks.start < end).then(|| (Arc::clone(layer), step.chunks.start..end))
    };
    profile.steps.iter().filter_map(of).collect()
}

fn missing_bytes(layer: &OpenLayer, missing: &Runs) -> u64 {
    missing.iter().map(|run| layer.layer.table().run_range(run)).map(|at| at.end - at.start).sum()
}
