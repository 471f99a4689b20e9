//! Images that containerd pulls and this node shows lazily.
//!
//! At the first layer that containerd is about to download, the whole image is decided: a signed index is here or with
//! a peer, it is for this machine, its tree can be made and shown, and its registry gives ranges to the credentials at
//! hand. Then every layer is answered as one that is there already. If one of these is missing, or takes longer than
//! containerd should wait, the image is pulled as ever, and the reason stands in the log, in a metric, and in
//! `hermes status`. If it is the index alone that is missing, the node may take the pull itself ([`super::first_pull`]).
//!
//! A tree is mounted below the state folder ([`super::shown`]) as long as a snapshot needs it, by the same means as
//! `hermes mount` uses, so that it goes on over the end of the daemon in the same way.
//!
//! The image is known by its manifest's digest where containerd sends it (CRI's labels), else by the chain ID of the
//! layer, which is looked for in the indexes that are on this node. Never by its tag.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::future::BoxFuture;
use hermes_image::access::Access;
use hermes_image::ids::{ChainId, DiffId, Digest, LayerId};
use hermes_image::statement::Statement;
use hermes_policy::class::ErrorClass;
use hermes_registry::oci::Platform;
use hermes_store::{RemoteLayer, SnapshotUsage};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::first_pull::FirstPull;
use super::shown::{Found as Tree, Places};
use super::{INDEXES_FOLDER, Inner, NodeError, guess};
use crate::artifacts::StatementLookupError;
use crate::config::CompleteMode;
use crate::control::MountRequest;
use crate::index_folder::IndexFolder;
use crate::metrics::{self, RECORDED};
use crate::snapshots::{Decision, Images, ImagesError, PulledLayer, RemoteChain};
use crate::status::PullStatus;
use hermes_origin::{LayerDescriptor, Origin};

/// What containerd's CRI calls the image, as the user wrote it (`pkg/snapshotters/annotations.go` of containerd).
const IMAGE_LABEL: &str = "containerd.io/snapshot/cri.image-ref";
/// The digest of its manifest.
const MANIFEST_LABEL: &str = "containerd.io/snapshot/cri.manifest-digest";
/// The digest of the layer's blob.
pub(super) const LAYER_LABEL: &str = "containerd.io/snapshot/cri.layer-digest";

/// Longest time for a decision. A plain pull has to begin within two seconds (design, section 10), and the answer has
/// to be written.
pub(super) const DECISION_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long a decision speaks for the lowest layer of a pull: containerd may ask for layers in parallel.
const SAME_PULL: Duration = Duration::from_secs(10);
/// How long it speaks for the layers above, which are asked for when those below were downloaded.
const SAME_IMAGE: Duration = Duration::from_secs(600);
/// Images whose decision is remembered; the oldest is forgotten.
const DECISIONS_MAX: usize = 256;
/// Statements of an index folder that are looked through for a chain.
const STATEMENTS_MAX: usize = 4096;
/// Decisions that `hermes status` shows.
const SHOWN_DECISIONS_MAX: usize = 32;
/// How often a tree that is busy is unmounted again. containerd has unmounted what stood above, but the kernel may
/// still be putting it away.
const UNMOUNT_TRIES: u32 = 20;
/// Time between the tries.
const UNMOUNT_PAUSE: Duration = Duration::from_millis(100);

/// Why an image is pulled as ever.
#[derive(Debug, Clone)]
pub(super) struct Refusal {
    pub(super) label: metrics::Decision,
    pub(super) reason: String,
}

pub(super) fn refusal(label: metrics::Decision, reason: impl Into<String>) -> Refusal {
    Refusal { label, reason: reason.into() }
}

/// An image that is shown lazily.
#[derive(Debug)]
pub(super) struct LazyImage {
    statement: Statement,
    /// The chain ID up to each layer.
    chains: Vec<ChainId>,
}

impl LazyImage {
    pub(super) fn new(statement: Statement) -> Self {
        let chains = chains_of(&statement);
        Self { statement, chains }
    }

    /// The layer whose chain is `target`; `blob` is its digest, where containerd says it.
    fn layer(&self, target: ChainId, blob: Option<&String>) -> Result<RemoteLayer, Refusal> {
        let other = |reason: String| refusal(metrics::Decision::OtherImage, reason);
        let place = self.chains.iter().position(|chain| *chain == target);
        let place = place.ok_or_else(|| other(format!("its index has no layer with chain {target}")))?;
        let layer = &self.statement.layers[place];
        if let Some(blob) = blob
            && blob.parse::<LayerId>() != Ok(layer.layer)
        {
            return Err(other(format!("its index has layer {} where containerd means {blob}", layer.layer)));
        }
        let manifest = self.statement.manifest;
        Ok(RemoteLayer { chain: target, diff_id: layer.diff_id, layer: layer.layer, manifest })
    }
}

/// The chain ID up to each layer.
fn chains_of(statement: &Statement) -> Vec<ChainId> {
    let diff_ids: Vec<DiffId> = statement.layers.iter().map(|layer| layer.diff_id).collect();
    (1..=diff_ids.len()).filter_map(|count| ChainId::of(&diff_ids[..count])).collect()
}

type Verdict = Result<Arc<LazyImage>, Refusal>;

/// What an image has come to within the time of a decision.
enum Found {
    /// It is shown lazily.
    Index(Arc<LazyImage>),
    /// It has no index, and its pull is being taken.
    Pull(Arc<FirstPull>),
}

#[derive(Debug)]
struct Decided {
    manifest: Digest,
    at: Instant,
    verdict: Arc<OnceCell<Verdict>>,
}

/// The node's images, as containerd's snapshots need them.
#[derive(Debug)]
pub(super) struct LazyImages {
    node: Arc<Inner>,
    /// The latest last.
    decided: Mutex<VecDeque<Decided>>,
    /// The chains of statements that were looked through.
    chains: Mutex<BTreeMap<Digest, Vec<ChainId>>>,
}

impl LazyImages {
    pub(super) fn new(node: Arc<Inner>) -> Self {
        Self { node, decided: Mutex::default(), chains: Mutex::default() }
    }

    async fn consider(&self, layer: &PulledLayer) -> Result<RemoteLayer, Refusal> {
        let target: ChainId = layer
            .target
            .parse()
            .map_err(|error| refusal(metrics::Decision::OtherImage, format!("{}: {error}", layer.target)))?;
        let manifest = match layer.labels.get(MANIFEST_LABEL) {
            Some(text) => text
                .parse()
                .map_err(|error| refusal(metrics::Decision::OtherImage, format!("manifest digest {text}: {error}")))?,
            None => self.manifest_with(target).await?,
        };
        let verdict = self.slot(manifest, layer.below.is_empty());
        let image = verdict
            .get_or_init(|| async {
                let decided = self.decide(manifest, layer).await;
                self.note(manifest, layer, &decided);
                decided
            })
            .await;
        image.clone()?.layer(target, layer.labels.get(LAYER_LABEL))
    }

    /// Decides in time; a pull that this node takes itself then takes as long as it takes.
    async fn decide(&self, manifest: Digest, layer: &PulledLayer) -> Verdict {
        let found = tokio::time::timeout(DECISION_TIMEOUT, self.decide_image(manifest, layer)).await;
        let late = || refusal(metrics::Decision::Unreachable, format!("not decided within {DECISION_TIMEOUT:?}"));
        match found.unwrap_or_else(|_| Err(late()))? {
            Found::Index(image) => Ok(image),
            Found::Pull(pull) => {
                let taken = pull.outcome().await;
                // It speaks for the layers to come from now on.
                let mut decided = self.decided.lock();
                decided.iter_mut().filter(|known| known.manifest == manifest).for_each(|it| it.at = Instant::now());
                taken
            }
        }
    }

    /// Where the decision about an image stands, or is going to.
    fn slot(&self, manifest: Digest, is_lowest: bool) -> Arc<OnceCell<Verdict>> {
        let kept = if is_lowest { SAME_PULL } else { SAME_IMAGE };
        let mut decided = self.decided.lock();
        let known = decided.iter().position(|known| known.manifest == manifest);
        if let Some(at) = known {
            if decided[at].at.elapsed() < kept {
                return Arc::clone(&decided[at].verdict);
            }
            decided.remove(at);
        }
        if decided.len() >= DECISIONS_MAX {
            decided.pop_front();
        }
        let verdict = Arc::default();
        decided.push_back(Decided { manifest, at: Instant::now(), verdict: Arc::clone(&verdict) });
        verdict
    }

    /// Tells people.
    fn note(&self, manifest: Digest, layer: &PulledLayer, verdict: &Verdict) {
        let reference = layer.labels.get(IMAGE_LABEL).cloned().unwrap_or_default();
        let (label, reason) = match verdict {
            Ok(_) => (metrics::Decision::Lazy, None),
            Err(refusal) => (refusal.label, Some(refusal.reason.clone())),
        };
        RECORDED.decided(label);
        match &reason {
            None => tracing::info!(%manifest, image = reference, "shown lazily"),
            Some(reason) => tracing::warn!(%manifest, image = reference, reason, "pulled as ever"),
        }
        let mut pulls = self.node.pulls.lock();
        pulls.retain(|pull| pull.manifest != manifest);
        if pulls.len() >= SHOWN_DECISIONS_MAX {
            pulls.pop_front();
        }
        pulls.push_back(PullStatus { manifest, reference, decision: label.name().to_owned(), reason });
    }

    /// The image of which `target` is a layer's chain, among the indexes that are here.
    async fn manifest_with(&self, target: ChainId) -> Result<Digest, Refusal> {
        let node = Arc::clone(&self.node);
        let mut known = std::mem::take(&mut *self.chains.lock());
        let looked = tokio::task::spawn_blocking(move || {
            for folder in node.artifacts.folders() {
                for manifest in folder.manifests().unwrap_or_default().into_iter().take(STATEMENTS_MAX) {
                    known.entry(manifest).or_insert_with(|| {
                        let signed = folder.statement(manifest).ok().flatten().unwrap_or_default();
                        Statement::open(&signed, manifest, &node.trusted())
                            .map_or_else(|_| Vec::new(), |it| chains_of(&it))
                    });
                }
            }
            // What nobody trusts today may be signed anew tomorrow.
            known.retain(|_, chains| !chains.is_empty());
            known
        });
        let known = looked.await.unwrap_or_default();
        let found = known.iter().find(|(_, chains)| chains.contains(&target)).map(|(manifest, _)| *manifest);
        self.chains.lock().extend(known);
        found.ok_or_else(|| {
            let reason = "containerd names no manifest, and no index that is on this node has the layer's chain";
            refusal(metrics::Decision::NoIndex, reason)
        })
    }

    async fn decide_image(&self, manifest: Digest, layer: &PulledLayer) -> Result<Found, Refusal> {
        let node = &self.node;
        if let Some(pull) = node.first_pulls.running(manifest) {
            return Ok(Found::Pull(pull));
        }
        let _keeping = node.keeping.read().await;
        let reference = self.reference(manifest, &layer.labels);
        let mut found = node.artifacts.statement(manifest, &node.trusted(), &[]).await;
        if let (Err(StatementLookupError::Denied), Some(reference)) = (&found, &reference) {
            // Peers have it and hold it back: the registry says whether this node may have it.
            let (_, image) = node.resolve_manifest(reference, manifest).await?;
            let proof: Vec<DiffId> = image.layers.iter().map(|layer| layer.diff_id).collect();
            found = node.artifacts.statement(manifest, &node.trusted(), &proof).await;
        }
        let found = match found {
            Err(StatementLookupError::Denied) => None,
            found => found.map_err(|error| lookup_refusal(&error))?,
        };
        let Some((statement, signed)) = found else {
            return node.offer_first_pull(manifest, reference, layer).await.map(Found::Pull);
        };
        let host = Platform::host();
        if !statement.platform.parse::<Platform>().is_ok_and(|platform| platform.runs_on(&host)) {
            let reason = format!("its index is for {}, and this is {host}", statement.platform);
            return Err(refusal(metrics::Decision::Platform, reason));
        }
        let named = reference.clone().unwrap_or_else(|| manifest.to_string());
        let way = node.ways.choose(node.config.way, true);
        way.map_err(|error| refusal(metrics::Decision::NoWay, error.to_string()))?;
        let index = async {
            let index = node.open_index(&named, statement.clone()).await;
            index.map_err(|error| refusal(index_label(&error), error.to_string()))
        };
        let layers: Vec<_> = statement.layers.iter().map(LayerDescriptor::of_statement).collect();
        let (index, told) = futures::try_join!(index, node.check_source(reference.as_deref(), &layers))?;
        if told.is_some() {
            node.prove(layers.iter().map(|layer| layer.diff_id).collect()).await;
        }
        let local = |error: NodeError| refusal(metrics::Decision::Corrupt, error.to_string());
        node.remember(&named, &index, told).map_err(local)?;
        self.keep(manifest, &signed, reference.as_deref());
        // What a container is going to read is known before it is made.
        let (profiles, proof) =
            (node.profiling.profiles.clone(), layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>());
        tokio::spawn(async move { profiles.fetch(manifest, &proof).await });
        tokio::spawn(node.artifacts.clone().keep_restart_points(statement.clone()));
        Ok(Found::Index(Arc::new(LazyImage::new(statement))))
    }

    /// Keeps what is needed to show the image again without anybody's help.
    fn keep(&self, manifest: Digest, signed: &[u8], reference: Option<&str>) {
        let own = self.node.own_indexes();
        let kept = own.put_statement(manifest, signed);
        let kept = kept.and_then(|()| reference.map_or(Ok(()), |reference| own.put_reference(manifest, reference)));
        if let Err(error) = kept {
            tracing::warn!(%manifest, %error, "the index is not kept; after a restart it is looked for again");
        }
        self.node.content.add_statement(manifest, signed.to_vec());
    }

    /// Where the image is from, as far as anybody says.
    fn reference(&self, manifest: Digest, labels: &BTreeMap<String, String>) -> Option<String> {
        labels.get(IMAGE_LABEL).cloned().or_else(|| {
            let folders = self.node.artifacts.folders();
            folders.iter().find_map(|folder| folder.reference(manifest).ok().flatten())
        })
    }

    async fn show_tree(&self, chain: &RemoteChain) -> Result<PathBuf, NodeError> {
        let node = &self.node;
        let places = Places::of(&node.config.state, chain.layer.chain);
        let dir = match node.find_shown(&places).await {
            Tree::Shown(dir) => return Ok(dir),
            Tree::Nowhere => places.first,
            Tree::CanBeWhole { lazy } => {
                let handed_over = self.mount_tree(chain, places.whole).await;
                return Ok(handed_over.unwrap_or_else(|error| {
                    tracing::warn!(chain = %chain.layer.chain, %error, "a complete tree stays lazy");
                    lazy
                }));
            }
        };
        self.mount_tree(chain, dir).await
    }

    /// Mounts the tree of `chain` at `dir`, unless it is there already.
    async fn mount_tree(&self, chain: &RemoteChain, dir: PathBuf) -> Result<PathBuf, NodeError> {
        let node = &self.node;
        let _keeping = node.keeping.read().await;
        let manifest = chain.layer.manifest;
        let labels = std::iter::once(&chain.top).chain(&chain.below).map(|snapshot| &snapshot.labels);
        let reference = labels.clone().find_map(|labels| self.reference(manifest, labels));
        let named = reference.clone().unwrap_or_else(|| manifest.to_string());
        let found = node.artifacts.statement(manifest, &node.trusted(), &[]).await;
        let found = found.map_err(|source| NodeError::Statement { image: named.clone(), source: Box::new(source) })?;
        let (mut statement, _) = found.ok_or_else(|| NodeError::NoIndex { image: named.clone(), manifest })?;
        let place = chains_of(&statement).iter().position(|known| *known == chain.layer.chain);
        let count = place.ok_or_else(|| NodeError::OtherLayers {
            image: named.clone(),
            reason: format!("its index has no layer with chain {}", chain.layer.chain),
        })? + 1;
        let is_whole = count == statement.layers.len();
        statement.layers.truncate(count);
        let index = node.open_index(&named, statement).await?;
        let origin = self.origin(reference.as_deref()).await;
        let _mounting = node.mounting.lock().await;
        if node.images.lock().await.iter().any(|image| image.dir == dir) {
            return Ok(dir);
        }
        std::fs::create_dir_all(&dir).map_err(|source| NodeError::Io { what: "make", path: dir.clone(), source })?;
        if is_whole {
            node.remember(&named, &index, None)?;
        }
        let (tree, layers) = (index.tree.clone(), index.statement.layers.clone());
        let (_, is_complete) = node.show(request(named, dir.clone()), origin.as_ref(), index).await?;
        if is_whole
            && !is_complete
            && node.config.guess_starts
            && let Some(reference) = reference
            && let Some(container) = node.container_start(&dir).await
        {
            let layers = layers.iter().map(|layer| layer.diff_id).collect();
            let guessed = guess::prefetch(Arc::downgrade(node), guess::Start { reference, manifest, tree, layers });
            // Where all of an image is fetched sooner or later, what is around its reads is fetched now: after the guess, which is right far more
            // often.
            let may_explore = node.config.complete != CompleteMode::Never;
            tokio::spawn(async move {
                if container.is_unknown().await {
                    guessed.await;
                }
                if may_explore {
                    container.explore();
                }
            });
        }
        Ok(dir)
    }

    /// The registry, which is not asked for anything before something is read.
    async fn origin(&self, reference: Option<&str>) -> Option<Arc<Origin>> {
        match self.node.origin_client.open_image(reference?, false).await {
            Ok(origin) => Some(origin),
            Err(error) => {
                tracing::warn!(image = reference, %error, "nothing can be fetched from where the image is from");
                None
            }
        }
    }

    /// Unmounts a tree's place, or all of them.
    async fn unmount_places(&self, chain: ChainId, place: Option<&Path>) {
        let places = Places::of(&self.node.config.state, chain);
        for dir in places.all().into_iter().filter(|dir| place.is_none_or(|place| place == *dir)) {
            self.unmount_tree(dir).await;
        }
    }

    async fn unmount_tree(&self, dir: &Path) {
        for _ in 0..UNMOUNT_TRIES {
            match self.node.unmount(dir).await {
                Err(NodeError::Busy { .. }) => tokio::time::sleep(UNMOUNT_PAUSE).await,
                Ok(()) => {
                    if let Err(error) = std::fs::remove_dir(dir) {
                        tracing::debug!(dir = %dir.display(), %error, "an empty folder is left");
                    }
                    return;
                }
                Err(NodeError::NotMounted { .. }) => return,
                Err(error) => return tracing::warn!(dir = %dir.display(), %error, "a tree stays mounted"),
            }
        }
        tracing::warn!(dir = %dir.display(), "a tree stays mounted: somebody has files of it open");
    }
}

/// What mounting a tree for containers asks for.
fn request(image: String, dir: PathBuf) -> MountRequest {
    MountRequest {
        image,
        dir,
        platform: None,
        plain_http: false,
        peers: Vec::new(),
        index_folders: Vec::new(),
        trusted_keys: Vec::new(),
        build_missing_index: false,
        way: None,
    }
}

/// Why an index is not used whose statement is here.
fn index_label(error: &NodeError) -> metrics::Decision {
    match error {
        // The controller is away, say, and no node has started the image yet.
        NodeError::MissingArtifact { .. } => metrics::Decision::NoIndex,
        _ => metrics::Decision::Corrupt,
    }
}

fn lookup_refusal(error: &StatementLookupError) -> Refusal {
    use hermes_image::statement::StatementError;
    let label = match error {
        StatementLookupError::Folder(_) => metrics::Decision::Corrupt,
        StatementLookupError::Denied => metrics::Decision::Denied,
        StatementLookupError::Refused(error) => match error {
            StatementError::Untrusted { .. } | StatementError::BadSignature { .. } => metrics::Decision::Unsigned,
            StatementError::OtherImage { .. } => metrics::Decision::OtherImage,
            StatementError::TooLong | StatementError::Malformed(_) | StatementError::Format(_) => {
                metrics::Decision::Corrupt
            }
        },
    };
    refusal(label, error.to_string())
}

impl Images for LazyImages {
    fn decide<'a>(&'a self, layer: &'a PulledLayer) -> BoxFuture<'a, Decision> {
        Box::pin(async {
            match self.consider(layer).await {
                Ok(remote) => Decision::Lazy(remote),
                Err(refusal) => Decision::Plain { reason: refusal.reason },
            }
        })
    }

    fn show<'a>(&'a self, chain: &'a RemoteChain) -> BoxFuture<'a, Result<PathBuf, ImagesError>> {
        Box::pin(async {
            self.show_tree(chain).await.map_err(|error| match error {
                NodeError::Image(_) | NodeError::MissingArtifact { .. } | NodeError::NoIndex { .. } => {
                    ImagesError::Unavailable(error.to_string())
                }
                error => ImagesError::Failed(error.to_string()),
            })
        })
    }

    fn places<'a>(&'a self, chain: &'a RemoteChain) -> BoxFuture<'a, Vec<PathBuf>> {
        Box::pin(async {
            let places = Places::of(&self.node.config.state, chain.layer.chain);
            self.node.shown_places(&places).await
        })
    }

    fn release<'a>(&'a self, chain: &'a RemoteChain, place: Option<&'a Path>) -> BoxFuture<'a, ()> {
        Box::pin(self.unmount_places(chain.layer.chain, place))
    }

    fn usage<'a>(&'a self, layer: &'a RemoteLayer) -> BoxFuture<'a, Result<SnapshotUsage, ImagesError>> {
        let stored = self.node.store.open_layer(layer.diff_id);
        // Its files are in one sparse file of the store.
        let usage = stored.map(|stored| SnapshotUsage { size_bytes: stored.present_bytes(), inodes: 1 });
        Box::pin(async move { Ok(usage.unwrap_or_default()) })
    }

    fn removed<'a>(&'a self, layer: &'a RemoteLayer) -> BoxFuture<'a, ()> {
        // Its chunks stay until their room is needed: the next image may have the same.
        tracing::debug!(layer = %layer.layer, "containerd has removed a layer");
        self.node.forget_due.notify_one();
        Box::pin(async {})
    }
}

impl Inner {
    /// The node's own folder of indexes.
    pub(super) fn own_indexes(&self) -> IndexFolder {
        IndexFolder::new(self.config.state.join(INDEXES_FOLDER))
    }

    /// Whether what is missing can be read with the credentials at hand: by reading a byte from the middle of nowhere,
    /// because a registry that ignores ranges would answer a read from the start just as well. To whom the registry gives it,
    /// if it was asked.
    pub(super) async fn check_source(
        &self,
        reference: Option<&str>,
        layers: &[LayerDescriptor],
    ) -> Result<Option<Access>, Refusal> {
        let is_missing = |diff_id: DiffId| {
            let stored = self.store.open_layer(diff_id);
            stored.is_none_or(|layer| !layer.is_complete())
        };
        let missing = layers.iter().filter(|layer| is_missing(layer.diff_id));
        let Some(largest) = missing.max_by_key(|layer| layer.len_bytes) else { return Ok(None) };
        let unknown = "neither containerd nor the index says where it is from; let containerd send its annotations";
        let reference = reference.ok_or_else(|| refusal(metrics::Decision::Unreachable, unknown))?;
        let origin = self.origin_client.open_image(reference, false).await;
        let origin = origin.map_err(|error| refusal(metrics::Decision::Unreachable, error.to_string()))?;
        let end = largest.len_bytes.min(2);
        let deadline = Instant::now() + DECISION_TIMEOUT;
        match origin.read_part(largest, end.saturating_sub(1)..end, deadline.into()).next().await {
            Some(Ok(_)) => Ok(origin.access()),
            Some(Err(error)) => {
                let label = match error.class() {
                    ErrorClass::Denied | ErrorClass::NotFound => metrics::Decision::Denied,
                    ErrorClass::PeerFault => metrics::Decision::NoRanges,
                    ErrorClass::Transient | ErrorClass::Local => metrics::Decision::Unreachable,
                };
                Err(refusal(label, error.to_string()))
            }
            None => Err(refusal(metrics::Decision::NoRanges, "the registry gave no byte of a range")),
        }
    }
}
