//! What is done for one image: find out what a name stands for, build its index, carry a profile over.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hermes_image::access::Access;
use hermes_image::build::Options;
use hermes_image::ids::LayerId;
use hermes_image::statement::{LayerStatement, Statement};
use hermes_origin::indexing::{IndexedLayer, IndexingError, index_bytes, layer_deadline};
use hermes_origin::{ImageSource, LayerDescriptor, Origin, OriginClient, ResolvedImage, wanted_platform};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior};

use super::failures::{failure, internal, is_content, of_artifacts, of_indexing, of_origin};
use super::layers::Leases;
use super::partial::{Partial, Partials};
use super::secrets::Secrets;
use crate::artifacts::{Artifacts, ImageRecord};
use crate::core::reference::repository;
use crate::event::{Event, Failure, FailureClass, ImageKey, Name, ReadyIndex, Resolved, ResolvedLayer, SecretRef};

/// How long resolving an image may take: a token, an index, a manifest and a configuration, with a slow registry.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often progress is said.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// What every task works with.
#[derive(Debug)]
pub(super) struct Tools {
    pub(super) origin: OriginClient,
    pub(super) credentials: hermes_origin::credentials::CredentialsConfig,
    pub(super) artifacts: Artifacts,
    pub(super) secrets: Arc<dyn Secrets>,
    pub(super) leases: Leases,
    pub(super) partials: Partials,
    /// Held while a profile is carried over: tables of contents are the largest things here.
    pub(super) carrying: Semaphore,
    pub(super) options: Options,
}

/// A registry's image, and what could not be done to get at it.
struct Opened {
    origin: Arc<Origin>,
    image: ResolvedImage,
}

impl Tools {
    pub(super) async fn resolve(&self, name: &Name, secrets: &[SecretRef]) -> Result<Resolved, Failure> {
        let opened = self.open(&name.reference, &name.platform, secrets).await?;
        Ok(Resolved {
            image: ImageKey { manifest: opened.image.manifest_digest },
            layers: opened.image.layers.iter().map(resolved_layer).collect(),
            access: access(&opened.origin),
        })
    }

    /// Opens `reference` with the logins of `secrets`, which the registry sees one after another until it accepts one.
    async fn open(&self, reference: &str, platform: &str, secrets: &[SecretRef]) -> Result<Opened, Failure> {
        let source = match reference.parse() {
            // A folder of this machine is nothing that a pod can name.
            Ok(source @ ImageSource::Registry(_)) => source,
            _ => return Err(failure(FailureClass::Unfit, "NameInvalid", format!("'{reference}' names no image"))),
        };
        let platform = wanted_platform(Some(platform))
            .map_err(|error| failure(FailureClass::Unfit, "PlatformInvalid", error.to_string()))?;
        let client = self.origin.with_credentials(self.credentials.clone());
        let problems = self.log_in(&client, secrets).await;
        let opened = async {
            let origin = client.open(&source).await?;
            let image = origin.resolve(&platform, Instant::now() + RESOLVE_TIMEOUT).await?;
            Ok(Opened { origin: Arc::new(origin), image })
        };
        opened.await.map_err(|error| {
            let mut failure = of_origin(&error);
            if failure.class == FailureClass::Denied {
                problems.iter().for_each(|problem| failure.message.push_str(&format!("; {problem}")));
            }
            failure
        })
    }

    /// Hands the documents of `secrets` to `client`, and returns what is wrong with them.
    async fn log_in(&self, client: &OriginClient, secrets: &[SecretRef]) -> Vec<String> {
        let mut problems = Vec::new();
        for secret in secrets {
            let problem = match self.secrets.read(secret).await {
                Ok(Some(document)) => {
                    let name = secret.to_string();
                    client.credentials().pull_secrets().insert(&name, &document).err().map(|error| error.to_string())
                }
                // Workloads often name secrets that are not there; it is worth a word only when access is denied.
                Ok(None) => {
                    problems.push(format!("the secret {secret} does not exist"));
                    None
                }
                Err(error) => Some(error.to_string()),
            };
            if let Some(problem) = problem {
                tracing::warn!(%secret, problem, "a pull secret cannot be used");
                problems.push(problem);
            }
        }
        problems
    }

    /// Builds, signs and keeps the index of `image`. Progress goes to `events` once a second.
    pub(super) async fn build(
        &self,
        key: &ImageKey,
        name: &Name,
        secrets: &[SecretRef],
        events: &mpsc::Sender<Event>,
    ) -> Result<ReadyIndex, Failure> {
        let read = AtomicU64::new(0);
        let mut building = std::pin::pin!(self.build_counted(key, name, secrets, &read));
        let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut said = 0;
        loop {
            tokio::select! {
                built = &mut building => return built,
                _ = ticks.tick() => {
                    let read_bytes = read.load(Ordering::Relaxed);
                    // Who is too slow hears of it a second later.
                    if read_bytes != said && events.try_send(Event::Progress { image: key.clone(), read_bytes }).is_ok() {
                        said = read_bytes;
                    }
                }
            }
        }
    }

    async fn build_counted(
        &self,
        key: &ImageKey,
        name: &Name,
        secrets: &[SecretRef],
        read: &AtomicU64,
    ) -> Result<ReadyIndex, Failure> {
        if let Some(index) = self.artifacts.index(key) {
            return Ok(index);
        }
        self.artifacts.check_room().map_err(|error| of_artifacts(&error))?;
        // The name may stand for something else by now.
        let pinned = format!("{}@{}", repository(&name.reference), key.manifest);
        let Opened { origin, image } = self.open(&pinned, &name.platform, secrets).await?;
        if image.manifest_digest != key.manifest {
            return Err(internal(&format!("{pinned} was resolved to {}", image.manifest_digest)));
        }
        let record = ImageRecord {
            image: key.clone(),
            name: name.clone(),
            layers: image.layers.iter().map(resolved_layer).collect(),
            access: access(&origin),
            begun: crate::clock::now(),
        };
        self.artifacts.begin(record).await.map_err(|error| of_artifacts(&error))?;
        self.build_layers(&origin, &image, read).await?;
        let layers = image.layers.iter().map(|layer| self.known_layer(&image, layer));
        let layers = layers.collect::<Result<Option<Vec<_>>, Failure>>()?;
        let layers = layers.ok_or_else(|| internal("a layer that was just built is not kept"))?;
        let statement = Statement::new(key.manifest, image.platform.to_string(), layers);
        self.artifacts.finish(&statement).await.map_err(|error| of_artifacts(&error))
    }

    /// Builds the layers that are not known yet: first those that nobody else is building.
    async fn build_layers(&self, origin: &Arc<Origin>, image: &ResolvedImage, read: &AtomicU64) -> Result<(), Failure> {
        let mut counted: Vec<LayerId> = Vec::new();
        loop {
            let mut missing: Vec<LayerId> = Vec::new();
            for layer in &image.layers {
                if self.known_layer(image, layer)?.is_none() {
                    missing.push(layer.layer);
                } else if !counted.contains(&layer.layer) {
                    counted.push(layer.layer);
                    read.fetch_add(layer.len_bytes, Ordering::Relaxed);
                }
            }
            if missing.is_empty() {
                return Ok(());
            }
            let Some(lease) = self.leases.take(&missing).await else { continue };
            let Some(layer) = image.layers.iter().find(|layer| layer.layer == lease.layer) else { continue };
            // Somebody may have built it just before.
            if self.known_layer(image, layer)?.is_none() {
                let before = read.load(Ordering::Relaxed);
                self.build_layer(origin, image, layer, read)
                    .await
                    .inspect_err(|_| read.store(before, Ordering::Relaxed))?;
                counted.push(layer.layer);
            }
        }
    }

    /// What is known of a layer, if that is the layer that the image means.
    fn known_layer(&self, image: &ResolvedImage, layer: &LayerDescriptor) -> Result<Option<LayerStatement>, Failure> {
        let Some(known) = self.artifacts.layer(layer.layer) else { return Ok(None) };
        if known.manifest_layer() == layer.manifest_layer() {
            return Ok(Some(known));
        }
        let message = format!(
            "layer {} of {} has {} bytes and the diffID {}, but the image says {} bytes and {}; build and push the image again",
            layer.layer, image.reference, known.blob_len_bytes, known.diff_id, layer.len_bytes, layer.diff_id
        );
        Err(failure(FailureClass::Unfit, "LayerInvalid", message))
    }

    async fn build_layer(
        &self,
        origin: &Arc<Origin>,
        image: &ResolvedImage,
        layer: &LayerDescriptor,
        read: &AtomicU64,
    ) -> Result<(), Failure> {
        let partial = self.partials.of(layer.layer, layer.len_bytes).await;
        let before = read.load(Ordering::Relaxed);
        let mut read_again = false;
        let built = loop {
            let goes_on = partial.len_bytes() > 0;
            let error = match self.read_layer(origin, image, layer, &partial, read).await {
                Ok(built) => break built,
                Err(error) => error,
            };
            if matches!(error, IndexingError::Build { .. }) {
                partial.discard().await;
            }
            let is_odd = is_content(&error) && !read_again;
            // What was kept of it may be to blame: other bytes of the registry, or a disk that has lost some.
            let is_kept = goes_on && matches!(error, IndexingError::Build { .. });
            if !is_odd && !is_kept {
                return Err(of_indexing(&error));
            }
            tracing::info!(layer = %layer.layer, %error, goes_on, "a layer's content is wrong; it is read once more");
            if !is_kept {
                read_again = true;
                origin.distrust(layer);
            }
            read.store(before, Ordering::Relaxed);
        };
        let kept = self.artifacts.put_layer(&built.statement, built.artifacts).await;
        kept.map_err(|error| of_artifacts(&error))?;
        partial.discard().await;
        Ok(())
    }

    async fn read_layer(
        &self,
        origin: &Arc<Origin>,
        image: &ResolvedImage,
        layer: &LayerDescriptor,
        partial: &Partial,
        read: &AtomicU64,
    ) -> Result<IndexedLayer, IndexingError> {
        let came = |bytes| {
            read.fetch_add(bytes, Ordering::Relaxed);
        };
        let deadline = layer_deadline();
        let from_place = |from| {
            let (origin, layer) = (Arc::clone(origin), layer.clone());
            partial.read(from, move |from| origin.read(&layer, from..layer.len_bytes, deadline))
        };
        index_bytes(&image.reference, layer, self.options, None, from_place, came).await
    }

    /// Gives up what is kept of layers that no build needs any more.
    pub(super) async fn sweep_partials(&self) {
        let (partials, wanted) = (self.partials.clone(), self.artifacts.missing_layers());
        let sweeping = tokio::task::spawn_blocking(move || partials.retain(&wanted));
        if let Err(error) = sweeping.await {
            tracing::error!(%error, "a task has panicked");
        }
    }
}

fn resolved_layer(layer: &LayerDescriptor) -> ResolvedLayer {
    ResolvedLayer { layer: layer.layer, diff_id: layer.diff_id, len_bytes: layer.len_bytes }
}

/// To whom the registry gives what was asked of it; those who log in, when nothing proves otherwise.
fn access(origin: &Origin) -> Access {
    origin.access().unwrap_or_default()
}
