//! Mounting an image: manifest, statement, index, tree, mount.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use hermes_image::access::Access;
use hermes_image::erofs::{self, Image};
use hermes_image::ids::{ArtifactId, ChainId, DiffId, Digest};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::index::seek::SeekTable;
use hermes_image::index::toc::Toc;
use hermes_image::merge::merge;
use hermes_image::statement::{LayerStatement, PublicKey, Statement};
use hermes_image::verify::Verified;
use hermes_policy::geometry::GeometryError;
use hermes_store::{ImageLayer, ImageRecord, Store, StoreError};
use tokio::sync::mpsc;

use super::record::{MountRecord, tree_connection};
use super::resolve::FoundImage;
use super::{Inner, MountedImage, NodeError, Shown, Starts};
use crate::artifacts::StatementLookupError;
use crate::control::{Answer, MountRequest};
use crate::fetch::{LayerOrigin, LayerUser, MountNo, OpenLayer};
use crate::fs::locate::ShownTree;
use crate::fs::read::LayerFile;
use crate::fs::session::{FuseSession, Keeping, SessionConfig};
use crate::fs::tree::TreeFs;
use crate::index_folder::IndexFolder;
use crate::metrics::RECORDED;
use crate::mounts;
use crate::mounts::users::overlay_users;
use crate::status::Way;
use hermes_origin::indexing::{Artifact, build_index};
use hermes_origin::{Origin, ResolvedImage};

/// Who pins images that are mounted.
pub(super) const MOUNT_PIN: &str = "mount";
/// Layers of an image that are handled at once. Each waits for disks and peers rather than for a core.
const LAYERS_AT_ONCE: usize = 16;
/// How long a container waits to know what other images on this node have of its layers, which saves reading that from
/// elsewhere. What is found later is used for what is read later.
const LOOK_UP_PATIENCE: Duration = Duration::from_millis(50);
/// How long a peer that the user names may take to answer the first time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What the index of an image is, once everything is on this node.
pub(super) struct OpenIndex {
    pub(super) statement: Statement,
    pub(super) tables: Vec<ChunkTable>,
    pub(super) tree: Bytes,
    tree_id: ArtifactId,
    tree_path: PathBuf,
    chain: ChainId,
}

impl Inner {
    /// Mounts an image.
    pub(super) async fn mount(
        self: &Arc<Self>,
        request: MountRequest,
        progress: mpsc::Sender<Answer>,
    ) -> Result<Answer, NodeError> {
        self.check_mount_point(&request.dir).await?;
        let trusted = self.trusted_for(&request)?;
        for folder in &request.index_folders {
            self.artifacts.add_folder(IndexFolder::new(folder));
        }
        self.connect(&request.peers).await?;
        say(&progress, "resolving", 0, 0);
        let image = self.resolve(&request).await?;
        if image.told().is_some() {
            self.prove(image.diff_ids()).await;
        }
        let _keeping = self.keeping.read().await;
        let index = self.index(&request, &trusted, &image, &progress).await?;
        // One at a time from here on: two requests must not take the same folder, nor open the same layer twice.
        let _mounting = self.mounting.lock().await;
        self.check_mount_point(&request.dir).await?;
        self.remember(&request.image, &index, image.told())?;
        let dir = request.dir.clone();
        let (way, is_complete) = self.show(request, image.origin.as_ref(), index).await?;
        let mut detail = if is_complete { ", complete" } else { "" }.to_owned();
        if image.now.is_err() {
            detail.push_str(", as this node knows it: the registry does not answer");
        }
        Ok(Answer::Mounted { dir, way, detail })
    }

    /// Whose statements this request takes: the node's own and configured keys, and those that it names itself, which
    /// no later request inherits.
    fn trusted_for(&self, request: &MountRequest) -> Result<Vec<PublicKey>, NodeError> {
        let mut trusted = self.trusted();
        for key in &request.trusted_keys {
            trusted.push(key.parse().map_err(|error| NodeError::Address(format!("--trust: {error}")))?);
        }
        Ok(trusted)
    }

    async fn check_mount_point(&self, dir: &Path) -> Result<(), NodeError> {
        let wrong = |reason: &str| Err(NodeError::MountPoint { dir: dir.to_owned(), reason: reason.to_owned() });
        if self.images.lock().await.iter().any(|image| image.dir == dir) {
            return wrong("an image is mounted there already; unmount it first");
        }
        match std::fs::read_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => wrong("there is no such folder; make it"),
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => wrong("it is no folder"),
            Err(error) => wrong(&error.to_string()),
            Ok(mut entries) => match (entries.next(), mounts::is_mount_point(dir)) {
                (_, Ok(true)) => wrong("something is mounted there already; unmount it first"),
                (Some(_), _) => wrong("the folder is not empty; give an empty one"),
                _ => Ok(()),
            },
        }
    }

    pub(super) async fn connect(&self, peers: &[String]) -> Result<(), NodeError> {
        for peer in peers {
            let unreachable = |reason: String| NodeError::Peer { peer: peer.clone(), reason };
            let addresses = super::peer_address("--peer", peer)?.resolve().await;
            let addresses = addresses.map_err(|error| unreachable(error.to_string()))?;
            let mut last = "it has no address".to_owned();
            let mut connected = false;
            for address in addresses {
                match tokio::time::timeout(CONNECT_TIMEOUT, self.peers.connect(address)).await {
                    Ok(Ok(_)) => {
                        connected = true;
                        break;
                    }
                    Ok(Err(error)) => last = error.in_full(),
                    Err(_) => last = format!("it does not answer within {CONNECT_TIMEOUT:?}"),
                }
            }
            if !connected {
                return Err(unreachable(last));
            }
        }
        Ok(())
    }

    /// The index of `image`: from the store, a folder, a peer, or built here.
    async fn index(
        &self,
        request: &MountRequest,
        trusted: &[PublicKey],
        image: &FoundImage,
        progress: &mpsc::Sender<Answer>,
    ) -> Result<OpenIndex, NodeError> {
        let own = self.own_indexes();
        let found = self.artifacts.statement(image.manifest, trusted, &image.diff_ids()).await;
        let found = match found {
            // Whoever is asked wants to see a grant: then this node has to have a way of its own to the index.
            Err(StatementLookupError::Denied) => None,
            // Whoever answers first may have anything; that must not keep an image from being mounted.
            Err(error) if request.build_missing_index => {
                tracing::warn!(image = %request.image, %error, "an index is not accepted; building one");
                None
            }
            found => found
                .map_err(|source| NodeError::Statement { image: request.image.clone(), source: Box::new(source) })?,
        };
        let (statement, signed) = match (found, image.resolved()) {
            (Some(found), _) => found,
            (None, Some((origin, image))) if request.build_missing_index => {
                self.build(&own, origin, image, progress).await?
            }
            (None, Some(_)) => {
                return Err(NodeError::NoIndex { image: request.image.clone(), manifest: image.manifest });
            }
            (None, None) => {
                return Err(NodeError::Unknown { image: request.image.clone(), reason: image.why_not_resolved() });
            }
        };
        image.check(&request.image, &statement)?;
        own.put_statement(image.manifest, &signed).map_err(crate::artifacts::ArtifactError::from)?;
        self.content.add_statement(image.manifest, signed);
        say(progress, "reading the index", 0, 0);
        self.open_index(&request.image, statement).await
    }

    async fn build(
        &self,
        own: &IndexFolder,
        origin: &Arc<Origin>,
        image: &ResolvedImage,
        progress: &mpsc::Sender<Answer>,
    ) -> Result<(Statement, Vec<u8>), NodeError> {
        let total = image.layers.iter().map(|layer| layer.len_bytes).sum();
        let options = hermes_image::build::Options::default();
        let store = Arc::clone(&self.store);
        let keep = move |artifact: &Artifact| store.put_artifact(&artifact.bytes).map(drop);
        let said = |done| say(progress, "building the index", done, total);
        let index = build_index(origin, image, options, keep, said).await?;
        let signed = self.key.sign(&index.statement);
        own.put_statement(image.manifest_digest, &signed).map_err(crate::artifacts::ArtifactError::from)?;
        Ok((index.statement, signed))
    }

    /// Gets the tables, and makes the tree unless an earlier mount of the same chain has.
    pub(super) async fn open_index(&self, image: &str, statement: Statement) -> Result<OpenIndex, NodeError> {
        let damaged = |what, reason: String| NodeError::Damaged { image: image.to_owned(), what, reason };
        let diff_ids: Vec<DiffId> = statement.layers.iter().map(|layer| layer.diff_id).collect();
        let chain = ChainId::of(&diff_ids).ok_or_else(|| damaged("statement", "the image has no layers".to_owned()))?;
        let (store, manifest) = (Arc::clone(&self.store), statement.manifest);
        let known = tokio::task::spawn_blocking(move || known_tree(&store, manifest, &diff_ids)).await;
        let known = known.map_err(|_| NodeError::Interrupted)??;
        let layers = statement.layers.iter().map(|layer| self.open_layer_index(image, layer, known.is_some()));
        let layers = layers.collect::<Vec<_>>();
        let layers: Vec<_> = stream::iter(layers).buffered(LAYERS_AT_ONCE).try_collect().await?;
        let (tables, tocs): (Vec<ChunkTable>, Vec<Option<Toc>>) = layers.into_iter().unzip();
        let (tree_id, tree) = match known {
            Some(known) => known,
            None => {
                let store = Arc::clone(&self.store);
                let tocs: Vec<Toc> = tocs.into_iter().flatten().collect();
                let made = tokio::task::spawn_blocking(move || make_tree(&store, &tocs)).await;
                made.map_err(|_| NodeError::Interrupted)?.map_err(|reason| damaged("tree", reason))?
            }
        };
        let tree_path = self.store.artifact_path(tree_id);
        Ok(OpenIndex { statement, tables, tree, tree_id, tree_path, chain })
    }

    /// What the index has of one layer; without a table of contents where the tree is known. Everything is looked for
    /// at once, because it may be with a peer, and a round trip for each would be seconds for an image of many layers.
    async fn open_layer_index(
        &self,
        image: &str,
        layer: &LayerStatement,
        tree_is_known: bool,
    ) -> Result<(ChunkTable, Option<Toc>), NodeError> {
        let damaged = |what, reason: String| NodeError::Damaged { image: image.to_owned(), what, reason };
        let table = async {
            let bytes = self.artifact(image, "chunk table", layer, layer.chunks).await?;
            let table = ChunkTable::decode(bytes).map_err(|error| damaged("chunk table", error.to_string()))?;
            layer.check_chunks(&table).map_err(|error| damaged("chunk table", error.to_string()))?;
            Ok::<_, NodeError>(table)
        };
        // It was looked through when the tree was made.
        if tree_is_known {
            return Ok((table.await?, None));
        }
        let toc = async {
            let bytes = self.artifact(image, "table of contents", layer, layer.toc).await?;
            let toc = Toc::decode(bytes).map_err(|error| damaged("table of contents", error.to_string()))?;
            layer.check_toc(&toc).map_err(|error| damaged("table of contents", error.to_string()))?;
            Ok(toc)
        };
        // Peers that start from this node need the restart points' directory too. It may be missing while others have
        // the chunks.
        let seek = async { Ok(self.artifacts.get(layer.seek, layer.diff_id).await?) };
        let (table, toc, seek) = futures::try_join!(table, toc, seek)?;
        if let Some(seek) = seek {
            let seek = SeekTable::decode(seek.into_inner());
            let seek = seek.map_err(|error| damaged("seek table", error.to_string()))?;
            layer.check_seek(&seek, &table).map_err(|error| damaged("seek table", error.to_string()))?;
        }
        Ok((table, Some(toc)))
    }

    async fn artifact(
        &self,
        image: &str,
        what: &'static str,
        layer: &LayerStatement,
        id: ArtifactId,
    ) -> Result<Bytes, NodeError> {
        let found = self.artifacts.get(id, layer.diff_id).await?;
        let missing = || NodeError::MissingArtifact { image: image.to_owned(), what, id };
        Ok(found.ok_or_else(missing)?.into_inner())
    }

    /// Opens the layers and shows the tree. Says how, and whether everything is here. The caller holds the lock of mounting.
    pub(super) async fn show(
        &self,
        request: MountRequest,
        origin: Option<&Arc<Origin>>,
        index: OpenIndex,
    ) -> Result<(Way, bool), NodeError> {
        let opened = index.statement.layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>();
        let mount = MountNo(self.next_mount.fetch_add(1, Ordering::Relaxed));
        let shown = self.show_as_mount(mount, request, origin, index).await;
        if shown.is_err() {
            self.close_layers(mount, &opened).await;
        }
        shown
    }

    /// All of [`Self::show`] but the end of a failure, after which the layers are still open for `mount`.
    async fn show_as_mount(
        &self,
        mount: MountNo,
        request: MountRequest,
        origin: Option<&Arc<Origin>>,
        index: OpenIndex,
    ) -> Result<(Way, bool), NodeError> {
        let (store, tables) = (Arc::clone(&self.store), index.tables.clone());
        let stored = tokio::task::spawn_blocking(move || store.layers_of(&tables)).await;
        let stored = stored.map_err(|_| NodeError::Interrupted)??;
        let uses = stored.iter().map(|layer| layer.hold()).collect();
        let origin = origin.map(|origin| self.layer_origin(origin));
        let users = LayerUser::of_image(mount, &request.image, &index.statement.layers, origin.as_ref());
        let opened = self.open_layers(stored, users).await?;
        let (layers, files): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
        let complete = layers.iter().all(|layer| layer.layer.is_complete());
        let wanted = request.way.or(self.config.way);
        let way = self.ways.choose(wanted, complete)?;
        // Before the mount: a kernel mount outlives a daemon that is killed, and what it reads must not be evicted then.
        let manifest = index.statement.manifest;
        self.store.pin(manifest, MOUNT_PIN)?;
        // Before the mount too: a daemon that takes over must know of everything that can be seen.
        record(&request, &index, way).put(&self.store, &request.dir)?;
        let direct = self.ways.reads_directly(way, wanted);
        let start = Starts::claim(&layers, |layer| direct && (way == Way::ErofsFiles || layer.layer.is_complete()));
        let shown = match self.show_as(way, wanted, &request.dir, &index, files).await {
            Ok(shown) => shown,
            Err(error) => {
                self.store.remove_mount(&request.dir)?;
                return Err(error);
            }
        };
        self.announce(&layers);
        tracing::info!(image = %request.image, dir = %request.dir.display(), %way, "mounted");
        let located = ShownTree {
            image: request.image.clone(),
            tree_path: index.tree_path.clone(),
            layers: layers.iter().map(|layer| layer.diff_id()).collect(),
        };
        self.reader.locator().insert(located.clone());
        RECORDED.mounted(way);
        let start = self.profiling.run(start, manifest, &request.image, &layers);
        let mounted = MountedImage {
            number: mount,
            located,
            shown,
            start,
            reference: request.image,
            manifest,
            chain: index.chain,
            dir: request.dir,
            way,
            prepared: Instant::now(),
            tree_path: index.tree_path,
            layers,
            _uses: uses,
        };
        mounted.lengthen_read_ahead();
        self.images.lock().await.push(mounted);
        Ok((way, complete))
    }

    /// Tells the swarm that this node has parts of `layers`.
    pub(super) fn announce(&self, layers: &[Arc<OpenLayer>]) {
        self.announce_layers(layers.iter().map(|layer| layer.diff_id()));
    }

    /// The same by name.
    pub(super) fn announce_layers(&self, layers: impl Iterator<Item = DiffId>) {
        for layer in layers {
            let peers = self.peers.clone();
            // Announcing takes a walk through the DHT; nobody waits for it.
            tokio::spawn(async move {
                if let Err(error) = peers.provide(layer).await {
                    tracing::debug!(%layer, %error, "the layer is not announced yet");
                }
            });
        }
    }

    /// A registry, by the number that the policy knows it by.
    pub(super) fn layer_origin(&self, origin: &Arc<Origin>) -> LayerOrigin {
        LayerOrigin { number: self.origins.lock().number(origin.host()), origin: Arc::clone(origin) }
    }

    /// Opens layers for their users; one that another mount has open already serves both, and then may be read from
    /// either image's registry. The caller holds the lock of mounting.
    pub(super) async fn open_layers(
        &self,
        stored: Vec<Arc<hermes_store::Layer>>,
        users: Vec<LayerUser>,
    ) -> Result<Vec<(Arc<OpenLayer>, Arc<LayerFile>)>, NodeError> {
        let (mut all, mut new, mut shared) = (Vec::new(), Vec::new(), Vec::new());
        for (stored, user) in stored.into_iter().zip(users) {
            let diff_id = stored.diff_id();
            let known = self.layers.lock().get(&diff_id).cloned();
            if let Some((open, file)) = known {
                open.add_user(user);
                shared.push(diff_id);
                all.push((open, file));
                continue;
            }
            let image = user.image.clone();
            let damaged =
                |error: GeometryError| NodeError::Damaged { image, what: "chunk table", reason: error.to_string() };
            let open = Arc::new(OpenLayer::new(Arc::clone(&stored), user, self.artifacts.clone()).map_err(damaged)?);
            let (marks, touches) = (Arc::clone(&open.marks), Arc::clone(&open.touches));
            let file = Arc::new(LayerFile { layer: stored, fetch: self.fetch.clone(), marks, touches });
            self.layers.lock().insert(diff_id, (Arc::clone(&open), Arc::clone(&file)));
            self.directory.insert(Arc::clone(&file));
            new.push(Arc::clone(&open));
            all.push((open, file));
        }
        stream::iter(new).for_each_concurrent(LAYERS_AT_ONCE, |open| self.fetch.open(open, LOOK_UP_PATIENCE)).await;
        for layer in shared {
            self.fetch.origins_changed(layer).await;
        }
        Ok(all)
    }

    /// Closes layers for a mount that has ended, or was never made; those that no other mount reads are forgotten. The
    /// caller holds the lock of mounting, so that nobody opens them meanwhile.
    pub(super) async fn close_layers(&self, mount: MountNo, layers: &[DiffId]) {
        for layer in layers {
            let Some((open, _)) = self.layers.lock().get(layer).cloned() else { continue };
            if open.remove_user(mount) > 0 {
                self.fetch.origins_changed(*layer).await;
                continue;
            }
            self.layers.lock().remove(layer);
            self.directory.remove(*layer);
            self.fetch.close(*layer).await;
        }
    }

    async fn show_as(
        &self,
        way: Way,
        wanted: Option<Way>,
        dir: &Path,
        index: &OpenIndex,
        files: Vec<Arc<LayerFile>>,
    ) -> Result<Shown, NodeError> {
        let dir = dir.to_owned();
        let shown: Box<dyn FnOnce() -> Result<Shown, NodeError> + Send> = match way {
            Way::ErofsFiles | Way::ErofsFuse => {
                let backing = if way == Way::ErofsFiles { &self.ways.files } else { &self.ways.fuse };
                let backing = backing.clone().map_err(|reason| NodeError::Way { way, reason })?;
                let (tree_path, layers_dir) = (index.tree_path.clone(), self.ways.layers_dir.clone());
                let direct = self.ways.reads_directly(way, wanted);
                Box::new(move || {
                    let devices = devices(way, direct, &files, &layers_dir)?;
                    Ok(Shown::Erofs(mounts::erofs::mount(&tree_path, &devices, &dir, backing)?))
                })
            }
            Way::FuseTree => {
                let image = Image::open(index.tree.clone()).map_err(|error| NodeError::Damaged {
                    image: index.chain.to_string(),
                    what: "tree",
                    reason: error.to_string(),
                })?;
                let filesystem = TreeFs::new(image, files, self.reader.clone());
                let keeping = self.notifier.clone().map(|notifier| Keeping { notifier, name: tree_connection(&dir) });
                Box::new(move || {
                    let config = SessionConfig { read_ahead_kib: TreeFs::READ_AHEAD_KIB, ..SessionConfig::default() };
                    Ok(Shown::Fuse(FuseSession::start(filesystem, &dir, config, keeping)?))
                })
            }
        };
        tokio::task::spawn_blocking(shown).await.map_err(|_| NodeError::Interrupted)?
    }

    /// Lets the kernel read far ahead in images that have become complete.
    pub(super) async fn lengthen_read_ahead(&self) {
        self.images.lock().await.iter().for_each(MountedImage::lengthen_read_ahead);
    }

    /// Writes down what is mounted, so that it can be found again without the registry.
    pub(super) fn remember(&self, reference: &str, index: &OpenIndex, told: Option<Access>) -> Result<(), NodeError> {
        let layers = index.statement.layers.iter().map(ImageLayer::from);
        // Later than every other image that had this reference, also when the clock was set back: the last is what it means.
        let others = self.store.images()?.into_iter().filter(|record| record.reference == reference);
        let last = others.map(|record| record.last_use_seconds + 1).max().unwrap_or(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let manifest = index.statement.manifest;
        let diff_ids: Vec<DiffId> = index.statement.layers.iter().map(|layer| layer.diff_id).collect();
        let proven = told.is_some() || self.store.image(manifest)?.is_some_and(|known| known.proven);
        self.put_image(&ImageRecord {
            manifest,
            reference: reference.to_owned(),
            platform: index.statement.platform.clone(),
            layers: layers.collect(),
            tree: Some(index.tree_id),
            last_use_seconds: last.max(now),
            access: self.access_of(manifest, &diff_ids, told),
            proven,
        })?;
        Ok(())
    }

    /// Unmounts what is mounted at `dir`.
    pub(super) async fn unmount(&self, dir: &Path) -> Result<(), NodeError> {
        let mut images = self.images.lock().await;
        let Some(at) = images.iter().position(|image| image.dir == dir) else {
            return Err(NodeError::NotMounted { dir: dir.to_owned() });
        };
        // A container's overlay does not keep its tree from being unmounted, and goes on reading it. Where the kernel reads
        // layer files itself, these must stay whole for as long as it does.
        if matches!(images[at].shown, Shown::Erofs(_)) && !overlay_users(dir).unwrap_or_default().is_empty() {
            return Err(NodeError::Busy { dir: dir.to_owned() });
        }
        let image = images.swap_remove(at);
        let unmounting = tokio::task::spawn_blocking(move || {
            let mut image = image;
            let result = match &mut image.shown {
                Shown::Erofs(mounted) => mounted.unmount(),
                Shown::Fuse(session) => session.unmount(),
            };
            (image, result)
        });
        let (mut image, result) = unmounting.await.map_err(|_| NodeError::Interrupted)?;
        if let Err(source) = result {
            let dir = image.dir.clone();
            images.push(image);
            return Err(if source.kind() == std::io::ErrorKind::ResourceBusy {
                NodeError::Busy { dir }
            } else {
                NodeError::Io { what: "unmount", path: dir, source }
            });
        }
        // After the mount: a record of what is not mounted is found out by looking, a mount without a record is not.
        self.store.remove_mount(dir)?;
        if !images.iter().any(|other| other.manifest == image.manifest) {
            self.store.unpin(image.manifest, MOUNT_PIN)?;
        }
        drop(images);
        self.reader.locator().remove(&image.located);
        image.end_start().await;
        let (number, layers) = (image.number, image.layers.iter().map(|layer| layer.diff_id()).collect::<Vec<_>>());
        // With what it reads from, such as loop devices over layer files.
        drop(image);
        let _mounting = self.mounting.lock().await;
        self.close_layers(number, &layers).await;
        self.forget_due.notify_one();
        tracing::info!(dir = %dir.display(), "unmounted");
        Ok(())
    }
}

/// The tree that an earlier mount has made of the same chain.
fn known_tree(store: &Store, manifest: Digest, diff_ids: &[DiffId]) -> Result<Option<(ArtifactId, Bytes)>, StoreError> {
    let Some(record) = store.image(manifest)? else { return Ok(None) };
    let is_same = record.layers.iter().map(|layer| layer.diff_id).eq(diff_ids.iter().copied());
    let Some(id) = record.tree.filter(|_| is_same) else { return Ok(None) };
    Ok(store.artifact(id)?.map(|image| (id, image)))
}

/// Makes the tree of a chain and keeps it.
fn make_tree(store: &Store, tocs: &[Toc]) -> Result<(ArtifactId, Bytes), String> {
    let tree = merge(tocs).map_err(|error| error.to_string())?;
    let image = erofs::write(&tree).map_err(|error| error.to_string())?;
    let (id, image) = Verified::named(image.into());
    store.put_artifact(&image).map_err(|error| error.to_string())?;
    Ok((id, image.into_inner()))
}

/// What the next daemon needs to go on with this mount.
fn record(request: &MountRequest, index: &OpenIndex, way: Way) -> MountRecord {
    MountRecord {
        manifest: index.statement.manifest,
        chain: index.chain,
        reference: request.image.clone(),
        plain_http: request.plain_http,
        way,
        tree: index.tree_id,
        layers: index.statement.layers.clone(),
        index_folders: request.index_folders.clone(),
        peers: request.peers.clone(),
    }
}

/// What EROFS reads the layers from: real files where a layer is complete and durable, else files of FUSE.
fn devices(way: Way, direct: bool, files: &[Arc<LayerFile>], layers_dir: &Path) -> Result<Vec<PathBuf>, NodeError> {
    let device = |file: &Arc<LayerFile>| {
        let complete = file.layer.is_complete();
        if way == Way::ErofsFiles || (direct && complete) {
            // The kernel reads the file itself from now on: what it finds must be what the catalogue says.
            file.layer.sync()?;
            return Ok(file.layer.path().to_owned());
        }
        Ok(layers_dir.join(file.layer.diff_id().hex()))
    };
    files.iter().map(device).collect()
}

/// Tells the client how far it is; dropped when the client is slow.
pub(super) fn say(progress: &mpsc::Sender<Answer>, step: &str, done_bytes: u64, total_bytes: u64) {
    let _ = progress.try_send(Answer::Progress { step: step.to_owned(), done_bytes, total_bytes });
}
