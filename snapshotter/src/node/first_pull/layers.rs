//! Taking a pull: the layers of an image, each known or staged, and then all of them at once in the store.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use hermes_image::access::Access;
use hermes_image::build::{BuildError, ChunkSink, Options};
use hermes_image::ids::ArtifactId;
use hermes_image::statement::{LayerStatement, Statement};
use hermes_policy::class::Class;
use hermes_store::{ImageLayer, ImageRecord, LayerUse, SealedLayer, StagedArtifact, Store, StoreError};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::super::lazy::{LazyImage, Refusal, refusal};
use super::super::{Inner, NodeError};
use super::{Outcome, Taking};
use crate::metrics::{self, ArrivedFrom, RECORDED};
use hermes_origin::indexing::{IndexedLayer, IndexingError, index_layer};
use hermes_origin::{ErrorClass, LayerDescriptor};

/// A layer that one or several pulls are about to have. Whoever comes first makes it ready; when that one is dropped,
/// the next does.
pub(super) type LayerSlot = OnceCell<Ready>;

/// A layer of which everything is here.
#[derive(Debug)]
pub(super) struct Ready {
    statement: LayerStatement,
    state: Mutex<State>,
}

/// Where a layer is.
#[derive(Debug)]
enum State {
    /// In the store, held.
    Stored { _held: LayerUse },
    /// In files that nobody sees yet.
    Staged(Box<Staged>),
    /// It could not be put into the store.
    Lost,
}

#[derive(Debug)]
struct Staged {
    layer: SealedLayer,
    artifacts: Vec<StagedArtifact>,
}

impl Ready {
    /// Puts the layer into the store with its artifacts, unless it is there.
    fn commit(&self, store: &Store) -> Result<(), NodeError> {
        let mut state = self.state.lock();
        let staged = match std::mem::replace(&mut *state, State::Lost) {
            State::Staged(staged) => *staged,
            stored @ State::Stored { .. } => {
                *state = stored;
                return Ok(());
            }
            State::Lost => return Err(NodeError::Interrupted),
        };
        for artifact in staged.artifacts {
            artifact.keep()?;
        }
        *state = State::Stored { _held: store.adopt(staged.layer)? };
        Ok(())
    }
}

/// Takes a pull. Dropped, it leaves nothing, unless the commit has begun, which then goes on to its end.
pub(super) async fn take(node: &Arc<Inner>, taking: &Taking) -> Outcome {
    let slots = ready_layers(node, taking).await?;
    let mut layers = Vec::new();
    for layer in &taking.image.layers {
        let ready = slots.get(&(layer.layer, layer.diff_id)).and_then(|slot| slot.get());
        layers.push(ready.ok_or_else(|| failed(&NodeError::Interrupted))?.statement.clone());
    }
    let platform = taking.image.platform.to_string();
    let statement = Statement::new(taking.image.manifest_digest, platform, layers);
    let (node, reference, told) = (Arc::clone(node), taking.pull.reference.clone(), taking.origin.access());
    let slots: Vec<Arc<LayerSlot>> = slots.into_values().collect();
    // A task of its own, so that the commit is not left half done.
    let tasks = node.first_pulls.tasks.clone();
    let committed = tasks.spawn(async move {
        let known = node.store.image(statement.manifest)?;
        let committed = commit(&node, &reference, &statement, &slots, told).await;
        if committed.is_err() {
            take_back(&node, &statement, known, slots).await;
        }
        committed.map(|()| Arc::new(LazyImage::new(statement)))
    });
    committed.await.unwrap_or(Err(NodeError::Interrupted)).map_err(|error| failed(&error))
}

fn failed(error: &NodeError) -> Refusal {
    let is_full = matches!(error, NodeError::Store(error) if error.is_full());
    let label = if is_full { metrics::Decision::NoRoom } else { metrics::Decision::Failed };
    refusal(label, format!("its pull could not be taken: {error}"))
}

/// The distinct layers of an image by blob and content.
type Slots = BTreeMap<(hermes_image::ids::LayerId, hermes_image::ids::DiffId), Arc<LayerSlot>>;

/// Has every layer made ready, the largest first, because the last one to end decides when all have.
async fn ready_layers(node: &Arc<Inner>, taking: &Taking) -> Result<Slots, Refusal> {
    let distinct: BTreeMap<_, _> =
        taking.image.layers.iter().map(|layer| ((layer.layer, layer.diff_id), layer)).collect();
    let mut order: Vec<LayerDescriptor> = distinct.into_values().cloned().collect();
    order.sort_by_key(|layer| std::cmp::Reverse(layer.len_bytes));
    let ready = order.into_iter().map(|layer| async move {
        let slot = node.first_pulls.slot(&layer);
        let came_here = AtomicBool::new(false);
        slot.get_or_try_init(|| {
            came_here.store(true, Ordering::Relaxed);
            ready(node, taking, &layer)
        })
        .await?;
        if !came_here.load(Ordering::Relaxed) {
            // Another pull has read it.
            taking.pull.progress(layer.len_bytes);
        }
        Ok::<_, Refusal>(((layer.layer, layer.diff_id), slot))
    });
    // How many of them are read at once is limited for all pulls together.
    stream::iter(ready).buffer_unordered(super::PIPELINES_MAX).try_collect().await
}

impl super::FirstPulls {
    /// The place of a layer, which all pulls share that want it now.
    fn slot(&self, layer: &LayerDescriptor) -> Arc<LayerSlot> {
        let mut layers = self.layers.lock();
        layers.retain(|_, slot| slot.strong_count() > 0);
        let key = (layer.layer, layer.diff_id);
        if let Some(slot) = layers.get(&key).and_then(std::sync::Weak::upgrade) {
            return slot;
        }
        let slot = Arc::default();
        layers.insert(key, Arc::downgrade(&slot));
        slot
    }
}

/// Makes one layer ready: finds it in the store, or reads it.
async fn ready(node: &Arc<Inner>, taking: &Taking, layer: &LayerDescriptor) -> Result<Ready, Refusal> {
    let (known_by, wanted) = (Arc::clone(node), layer.clone());
    let known = tokio::task::spawn_blocking(move || known(&known_by, &wanted)).await;
    let known = known.unwrap_or(Err(NodeError::Interrupted)).map_err(|error| failed(&error))?;
    if let Some((statement, held)) = known {
        taking.pull.progress(layer.len_bytes);
        return Ok(Ready { statement, state: Mutex::new(State::Stored { _held: held }) });
    }
    // Closed by nobody.
    let place = node.first_pulls.pipelines.acquire().await;
    let _place = place.map_err(|_| failed(&NodeError::Interrupted))?;
    let (statement, staged) = stage(node, taking, layer).await?;
    Ok(Ready { statement, state: Mutex::new(State::Staged(Box::new(staged))) })
}

/// What an index says of `layer` that this node's key has signed, when the layer and all of that is here. Held before
/// it is looked at, so that what is here stays.
fn known(node: &Inner, layer: &LayerDescriptor) -> Result<Option<(LayerStatement, LayerUse)>, NodeError> {
    let Some(held) = node.store.open_layer(layer.diff_id).map(|stored| stored.hold()) else { return Ok(None) };
    if !held.is_complete() {
        return Ok(None);
    }
    let (own, key) = (node.own_indexes(), [node.key.public()]);
    for record in node.store.images()? {
        if !record.layers.iter().any(|known| known.layer == layer.layer && known.diff_id == layer.diff_id) {
            continue;
        }
        let Ok(Some(signed)) = own.statement(record.manifest) else { continue };
        let Ok(statement) = Statement::open(&signed, record.manifest, &key) else { continue };
        let same = |known: &LayerStatement| known.manifest_layer() == layer.manifest_layer();
        let Some(known) = statement.layers.into_iter().find(same) else { continue };
        if known.chunks == held.table().id() && is_here(&node.store, &known)? {
            return Ok(Some((known, held)));
        }
    }
    Ok(None)
}

/// Whether all artifacts of a layer's index are in the store.
fn is_here(store: &Store, layer: &LayerStatement) -> Result<bool, StoreError> {
    for id in artifacts_of(layer) {
        match store.artifact(id) {
            Ok(Some(_)) => {}
            Ok(None) | Err(StoreError::DamagedArtifact { .. }) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn artifacts_of(layer: &LayerStatement) -> [ArtifactId; 4] {
    [layer.toc, layer.chunks, layer.seek, layer.windows]
}

/// Streams a layer through the builder into files that nobody sees yet.
async fn stage(
    node: &Arc<Inner>,
    taking: &Taking,
    layer: &LayerDescriptor,
) -> Result<(LayerStatement, Staged), Refusal> {
    let begun = node.store.stage_layer().map_err(|error| failed(&error.into()))?;
    let staged = Arc::new(Mutex::new(begun));
    let chunks = Arc::clone(&staged);
    let sink: ChunkSink = Box::new(move |_, chunk| {
        chunks.lock().append(&chunk)?;
        // Its reader is containerd, which waits for the pull.
        RECORDED.arrived(ArrivedFrom::Registry, Class::Demand, chunk.len() as u64);
        Ok(())
    });
    let came = |bytes| {
        RECORDED.first_pull_received(bytes);
        taking.pull.progress(bytes);
    };
    let image = &taking.image.reference;
    let built = index_layer(&taking.origin, image, layer, Options::default(), Some(sink), came).await;
    let IndexedLayer { statement, artifacts, table, .. } = built.map_err(indexing_refusal)?;
    // The builder has ended, and its sink with it.
    let staged = Arc::into_inner(staged).ok_or_else(|| failed(&NodeError::Interrupted))?.into_inner();
    let store = Arc::clone(&node.store);
    let sealed = tokio::task::spawn_blocking(move || {
        let layer = staged.seal(&table)?;
        let artifacts = artifacts.iter().map(|artifact| store.stage_artifact(&artifact.bytes));
        Ok::<_, NodeError>(Staged { layer, artifacts: artifacts.collect::<Result<_, _>>()? })
    });
    let sealed = sealed.await.unwrap_or(Err(NodeError::Interrupted)).map_err(|error| failed(&error))?;
    Ok((statement, sealed))
}

fn indexing_refusal(error: IndexingError) -> Refusal {
    let label = match &error {
        IndexingError::Build { source: BuildError::Sink(source), .. }
            if source.downcast_ref::<StoreError>().is_some_and(StoreError::is_full) =>
        {
            metrics::Decision::NoRoom
        }
        IndexingError::Origin(error) => match error.class() {
            ErrorClass::Denied | ErrorClass::NotFound => metrics::Decision::Denied,
            ErrorClass::Transient | ErrorClass::PeerFault | ErrorClass::Local => metrics::Decision::Unreachable,
        },
        _ => metrics::Decision::Failed,
    };
    refusal(label, format!("its pull could not be taken: {error}"))
}

/// Puts everything in its place: the image's record, artifacts and layers, the tree, and at last the statement, by which
/// this node and others know that all of it is here.
async fn commit(
    node: &Arc<Inner>,
    reference: &str,
    statement: &Statement,
    slots: &[Arc<LayerSlot>],
    told: Option<Access>,
) -> Result<(), NodeError> {
    let _keeping = node.keeping.read().await;
    let diff_ids: Vec<_> = statement.layers.iter().map(|layer| layer.diff_id).collect();
    let access = node.access_of(statement.manifest, &diff_ids, told);
    let (inner, record, layers) =
        (Arc::clone(node), record(reference, statement, access, told.is_some()), slots.to_vec());
    let stored = tokio::task::spawn_blocking(move || {
        inner.put_image(&record)?;
        let commit = |ready: &Ready| ready.commit(&inner.store);
        layers.iter().try_for_each(|slot| slot.get().map_or(Err(NodeError::Interrupted), commit))
    });
    stored.await.map_err(|_| NodeError::Interrupted)??;
    let index = node.open_index(reference, statement.clone()).await?;
    node.remember(reference, &index, told)?;
    let (manifest, signed) = (statement.manifest, node.key.sign(statement));
    let own = node.own_indexes();
    own.put_reference(manifest, reference).map_err(crate::artifacts::ArtifactError::from)?;
    own.put_statement(manifest, &signed).map_err(crate::artifacts::ArtifactError::from)?;
    node.content.add_statement(manifest, signed);
    node.announce_layers(statement.layers.iter().map(|layer| layer.diff_id));
    Ok(())
}

fn record(reference: &str, statement: &Statement, access: Access, proven: bool) -> ImageRecord {
    let layers = statement.layers.iter().map(ImageLayer::from);
    ImageRecord {
        manifest: statement.manifest,
        reference: reference.to_owned(),
        platform: statement.platform.clone(),
        layers: layers.collect(),
        tree: None,
        // Nobody has asked for it successfully; what a reference means is found by the latest.
        last_use_seconds: 0,
        access,
        proven,
    }
}

/// Takes back what a commit that failed has done, but for layers that another image or another pull has, too. What the
/// store knew of the image before stays: it may be mounted.
async fn take_back(node: &Arc<Inner>, statement: &Statement, known: Option<ImageRecord>, slots: Vec<Arc<LayerSlot>>) {
    let (inner, manifest) = (Arc::clone(node), statement.manifest);
    let taken_back = tokio::task::spawn_blocking(move || {
        if let Some(known) = known {
            return inner.put_image(&known);
        }
        let store = &inner.store;
        let tree = store.image(manifest)?.and_then(|record| record.tree);
        let unused = store.remove_image(manifest)?;
        inner.privacy.remove(manifest);
        // What another pull wants of this one stays with it; the rest is let go.
        let mine = slots.into_iter().filter_map(Arc::into_inner).filter_map(OnceCell::into_inner);
        let mine: Vec<LayerStatement> = mine.map(|ready| ready.statement).collect();
        let layers = mine.iter().map(|layer| layer.diff_id).filter(|layer| unused.contains(layer));
        let artifacts: Vec<ArtifactId> = mine.iter().flat_map(artifacts_of).chain(tree).collect();
        store.remove_if_unused(layers, &artifacts)
    });
    match taken_back.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%manifest, %error, "something of a pull that failed stays in the store"),
        Err(_) => tracing::warn!(%manifest, "taking back a pull that failed was interrupted"),
    }
}
