//! Mounting an image: manifest, statement, index, tree, mount.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hermes_image::erofs::{self, Image};
use hermes_image::ids::{ArtifactId, ChainId, DiffId};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::index::toc::Toc;
use hermes_image::merge::merge;
use hermes_image::runs::Runs;
use hermes_image::statement::Statement;
use hermes_image::verify::Verified;
use hermes_store::{ImageLayer, ImageRecord};
use tokio::sync::mpsc;

use super::{Inner, MountedImage, NodeError, Shown};
use crate::control::{Answer, MountRequest};
use crate::fetch::{Class, LayerOrigin, OpenLayer, SpanIndexSource};
use crate::fs::read::LayerFile;
use crate::fs::session::{FuseSession, SessionConfig};
use crate::fs::tree::TreeFs;
use crate::index_folder::IndexFolder;
use crate::indexing::build_index;
use crate::mounts::{self, erofs::Backing};
use crate::origin::{Origin, ResolvedImage, find_image};
use crate::status::Way;

/// How long `hermes complete` waits for one batch of chunks before it says what is wrong.
const COMPLETE_DEADLINE: Duration = Duration::from_secs(120);
/// Chunks that are asked for at once when an image is completed: about 64 MiB, enough to keep the link and all cores
/// busy, little enough that progress can be shown and a read on demand finds room.
const COMPLETE_BATCH_CHUNKS: u32 = 1024;
/// Who pins images that are mounted.
pub(super) const MOUNT_PIN: &str = "mount";
/// How long a peer that the user names may take to answer the first time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What the index of an image is, once everything is on this node.
struct OpenIndex {
    statement: Statement,
    tables: Vec<ChunkTable>,
    tree: Bytes,
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
        for key in &request.trusted_keys {
            let key = key.parse().map_err(|error| NodeError::Address(format!("--trust: {error}")))?;
            self.trusted.lock().push(key);
        }
        for folder in &request.index_folders {
            self.artifacts.add_folder(IndexFolder::new(folder));
        }
        self.connect(&request.peers).await?;
        say(&progress, "resolving", 0, 0);
        let (origin, image) = find_image(&request.image, request.platform.as_deref(), request.plain_http).await?;
        let index = self.index(&request, &origin, &image, &progress).await?;
        // One at a time from here on: two requests must not take the same folder, nor open the same layer twice.
        let _mounting = self.mounting.lock().await;
        self.check_mount_point(&request.dir).await?;
        let opened = index.statement.layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>();
        let shown = self.show(request, &origin, &image, index).await;
        if shown.is_err() {
            self.close_unused(&opened).await;
        }
        shown
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

    async fn connect(&self, peers: &[String]) -> Result<(), NodeError> {
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
                    Ok(Err(error)) => last = error.to_string(),
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
        origin: &Arc<Origin>,
        image: &ResolvedImage,
        progress: &mpsc::Sender<Answer>,
    ) -> Result<OpenIndex, NodeError> {
        let trusted = self.trusted.lock().clone();
        let own = IndexFolder::new(self.config.state.join("indexes"));
        self.artifacts.add_folder(own.clone());
        let found = self.artifacts.statement(image.manifest_digest, &trusted).await;
        let found = match found {
            // Whoever answers first may have anything; that must not keep an image from being mounted.
            Err(error) if request.build_missing_index => {
                tracing::warn!(image = %request.image, %error, "an index is not accepted; building one");
                None
            }
            found => found
                .map_err(|source| NodeError::Statement { image: request.image.clone(), source: Box::new(source) })?,
        };
        let (statement, signed) = match found {
            Some(found) => found,
            None if request.build_missing_index => self.build(&own, origin, image, progress).await?,
            None => {
                return Err(NodeError::NoIndex { image: request.image.clone(), manifest: image.manifest_digest });
            }
        };
        check_layers(&request.image, &statement, image)?;
        own.put_statement(image.manifest_digest, &signed).map_err(crate::artifacts::ArtifactError::from)?;
        self.content.add_statement(image.manifest_digest, signed);
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
        let index =
            build_index(origin, image, options, |done| say(progress, "building the index", done, total)).await?;
        let store = Arc::clone(&self.store);
        let artifacts = index.artifacts;
        let kept = tokio::task::spawn_blocking(move || {
            artifacts.iter().try_for_each(|artifact| store.put_artifact(&artifact.bytes).map(drop))
        });
        kept.await.map_err(|_| NodeError::Interrupted)??;
        let signed = self.key.sign(&index.statement);
        own.put_statement(image.manifest_digest, &signed).map_err(crate::artifacts::ArtifactError::from)?;
        Ok((index.statement, signed))
    }

    /// Gets the tables, and makes the tree unless an earlier mount of the same chain has.
    async fn open_index(&self, image: &str, statement: Statement) -> Result<OpenIndex, NodeError> {
        let damaged = |what, reason: String| NodeError::Damaged { image: image.to_owned(), what, reason };
        let diff_ids: Vec<DiffId> = statement.layers.iter().map(|layer| layer.diff_id).collect();
        let chain = ChainId::of(&diff_ids).ok_or_else(|| damaged("statement", "the image has no layers".to_owned()))?;
        let mut tables = Vec::new();
        let mut tocs = Vec::new();
        for layer in &statement.layers {
            let bytes = self.artifact(image, "chunk table", layer.chunks).await?;
            let table = ChunkTable::decode(bytes).map_err(|error| damaged("chunk table", error.to_string()))?;
            if table.diff_id() != layer.diff_id || table.logical_len_bytes() != layer.logical_len_bytes {
                return Err(damaged("chunk table", format!("it is not of layer {}", layer.diff_id)));
            }
            tables.push(table);
            let bytes = self.artifact(image, "table of contents", layer.toc).await?;
            let toc = Toc::decode(bytes).map_err(|error| damaged("table of contents", error.to_string()))?;
            if toc.diff_id() != layer.diff_id {
                return Err(damaged("table of contents", format!("it is not of layer {}", layer.diff_id)));
            }
            tocs.push(toc);
            // Peers that start from this node need the restart points' directory too.
            let _ = self.artifacts.get(layer.seek).await?;
        }
        let store = Arc::clone(&self.store);
        let made = tokio::task::spawn_blocking(move || -> Result<(ArtifactId, Bytes, PathBuf), String> {
            let tree = merge(&tocs).map_err(|error| error.to_string())?;
            let image = erofs::write(&tree).map_err(|error| error.to_string())?;
            let (id, image) = Verified::named(image.into());
            store.put_artifact(&image).map_err(|error| error.to_string())?;
            let path = store.artifact_path(id);
            Ok((id, image.into_inner(), path))
        });
        let made = made.await.map_err(|_| NodeError::Interrupted)?;
        let (tree_id, tree, tree_path) = made.map_err(|reason| damaged("tree", reason))?;
        Ok(OpenIndex { statement, tables, tree, tree_id, tree_path, chain })
    }

    async fn artifact(&self, image: &str, what: &'static str, id: ArtifactId) -> Result<Bytes, NodeError> {
        let found = self.artifacts.get(id).await?;
        let missing = || NodeError::MissingArtifact { image: image.to_owned(), what, id };
        Ok(found.ok_or_else(missing)?.into_inner())
    }

    /// Opens the layers and shows the tree.
    async fn show(
        self: &Arc<Self>,
        request: MountRequest,
        origin: &Arc<Origin>,
        image: &ResolvedImage,
        index: OpenIndex,
    ) -> Result<Answer, NodeError> {
        let number = self.origins.lock().number(origin.host());
        let (mut layers, mut files, mut uses) = (Vec::new(), Vec::new(), Vec::new());
        for ((table, statement), descriptor) in index.tables.iter().zip(&index.statement.layers).zip(&image.layers) {
            let stored = self.store.layer(table)?;
            uses.push(stored.hold());
            let origin = LayerOrigin { number, origin: Arc::clone(origin), descriptor: descriptor.clone() };
            let spans_from = SpanIndexSource { artifacts: self.artifacts.clone(), seek: statement.seek };
            let file = self.layer_file(stored);
            let (layer, marks) = (Arc::clone(&file.layer), Arc::clone(&file.marks));
            let open = OpenLayer::new(layer, marks, request.image.clone(), Some(origin), spans_from);
            let open = Arc::new(open.map_err(|error| NodeError::Damaged {
                image: request.image.clone(),
                what: "chunk table",
                reason: error.to_string(),
            })?);
            layers.push(self.open_layer(open).await);
            files.push(file);
        }
        let complete = layers.iter().all(|layer| layer.layer.is_complete());
        let wanted = request.way.or(self.config.way);
        let way = self.ways.choose(wanted, complete)?;
        // Before the mount: a kernel mount outlives a daemon that is killed, and what it reads must not be evicted then.
        self.remember(&request.image, image, &index)?;
        self.store.pin(image.manifest_digest, MOUNT_PIN)?;
        let shown = self.show_as(way, wanted, &request.dir, &index, files).await?;
        for layer in &layers {
            let (peers, layer) = (self.peers.clone(), layer.diff_id());
            // Announcing takes a walk through the DHT; the mount does not wait for it.
            tokio::spawn(async move {
                if let Err(error) = peers.provide(layer).await {
                    tracing::debug!(%layer, %error, "the layer is not announced yet");
                }
            });
        }
        tracing::info!(image = %request.image, dir = %request.dir.display(), %way, "mounted");
        let detail = if complete { ", complete" } else { "" }.to_owned();
        let mounted = MountedImage {
            shown,
            reference: request.image,
            manifest: image.manifest_digest,
            chain: index.chain,
            dir: request.dir.clone(),
            way,
            tree_path: index.tree_path,
            layers,
            _uses: uses,
        };
        mounted.lengthen_read_ahead();
        self.images.lock().await.push(mounted);
        Ok(Answer::Mounted { dir: request.dir, way, detail })
    }

    /// Opens a layer for fetching, unless another image has it open: then that one serves both.
    async fn open_layer(&self, open: Arc<OpenLayer>) -> Arc<OpenLayer> {
        let diff_id = open.diff_id();
        let images = self.images.lock().await;
        let shared = images.iter().flat_map(|image| &image.layers).find(|layer| layer.diff_id() == diff_id).cloned();
        drop(images);
        match shared {
            Some(shared) => shared,
            None => {
                self.fetch.open(Arc::clone(&open)).await;
                open
            }
        }
    }

    /// The file that readers of `layer` see.
    fn layer_file(&self, layer: Arc<hermes_store::Layer>) -> Arc<LayerFile> {
        let mut layers = self.layers.lock();
        let file = layers
            .entry(layer.diff_id())
            .or_insert_with(|| Arc::new(LayerFile { layer, fetch: self.fetch.clone(), marks: Arc::default() }));
        self.directory.insert(Arc::clone(file));
        Arc::clone(file)
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
                // Who asks for a way gets it; else complete layers are read without the daemon already.
                let direct = wanted.is_none() && self.ways.files == Ok(Backing::File) && backing == Backing::File;
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
                Box::new(move || {
                    let config = SessionConfig { read_ahead_kib: TreeFs::READ_AHEAD_KIB, ..SessionConfig::default() };
                    Ok(Shown::Fuse(FuseSession::start(filesystem, &dir, config)?))
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
    fn remember(&self, reference: &str, image: &ResolvedImage, index: &OpenIndex) -> Result<(), NodeError> {
        let layers = index.statement.layers.iter().map(|layer| ImageLayer {
            layer: layer.layer,
            diff_id: layer.diff_id,
            toc: layer.toc,
            chunks: layer.chunks,
            seek: layer.seek,
            windows: layer.windows,
        });
        self.store.put_image(&ImageRecord {
            manifest: image.manifest_digest,
            reference: reference.to_owned(),
            platform: image.platform.to_string(),
            layers: layers.collect(),
            tree: Some(index.tree_id),
            last_use_seconds: 0,
        })?;
        Ok(())
    }

    /// Unmounts what is mounted at `dir`.
    pub(super) async fn unmount(&self, dir: &Path) -> Result<(), NodeError> {
        let mut images = self.images.lock().await;
        let Some(at) = images.iter().position(|image| image.dir == dir) else {
            return Err(NodeError::NotMounted { dir: dir.to_owned() });
        };
        let image = images.swap_remove(at);
        let unmounting = tokio::task::spawn_blocking(move || {
            let mut image = image;
            let result = match &mut image.shown {
                Shown::Erofs(mounted) => mounted.unmount(),
                Shown::Fuse(session) => session.unmount(),
            };
            (image, result)
        });
        let (image, result) = unmounting.await.map_err(|_| NodeError::Interrupted)?;
        if let Err(source) = result {
            let dir = image.dir.clone();
            images.push(image);
            return Err(if source.kind() == std::io::ErrorKind::ResourceBusy {
                NodeError::Busy { dir }
            } else {
                NodeError::Io { what: "unmount", path: dir, source }
            });
        }
        let still_open =
            |layer: DiffId| images.iter().flat_map(|image| &image.layers).any(|other| other.diff_id() == layer);
        for layer in image.layers.iter().filter(|layer| !still_open(layer.diff_id())) {
            self.fetch.close(layer.diff_id()).await;
        }
        tracing::info!(dir = %dir.display(), "unmounted");
        Ok(())
    }

    /// Closes those of `layers` that no mounted image reads.
    async fn close_unused(&self, layers: &[DiffId]) {
        let images = self.images.lock().await;
        let open =
            |layer: &DiffId| images.iter().flat_map(|image| &image.layers).any(|other| other.diff_id() == *layer);
        let unused = layers.iter().filter(|layer| !open(layer)).copied().collect::<Vec<_>>();
        drop(images);
        for layer in unused {
            self.fetch.close(layer).await;
        }
    }

    /// Fetches what is missing of the image at `dir`.
    pub(super) async fn complete(&self, dir: &Path, progress: mpsc::Sender<Answer>) -> Result<(), NodeError> {
        let layers = {
            let images = self.images.lock().await;
            let image = images.iter().find(|image| image.dir == dir);
            image.ok_or_else(|| NodeError::NotMounted { dir: dir.to_owned() })?.layers.clone()
        };
        let total = layers.iter().map(|layer| layer.layer.table().logical_len_bytes()).sum();
        for layer in &layers {
            loop {
                let missing = layer.layer.missing(0..layer.layer.table().count()).take(COMPLETE_BATCH_CHUNKS);
                if missing.is_empty() {
                    break;
                }
                self.fetch_batch(layer, missing).await?;
                let present = layers.iter().map(|layer| layer.layer.present_bytes()).sum();
                say(&progress, "fetching", present, total);
            }
        }
        let sync = tokio::task::spawn_blocking(move || layers.iter().try_for_each(|layer| layer.layer.sync()));
        Ok(sync.await.map_err(|_| NodeError::Interrupted)??)
    }

    async fn fetch_batch(&self, layer: &OpenLayer, missing: Runs) -> Result<(), NodeError> {
        let deadline = Instant::now() + COMPLETE_DEADLINE;
        let delivered = self.fetch.need(layer.diff_id(), missing, Class::Prefetch, deadline).await?;
        if delivered.is_empty() {
            return Ok(());
        }
        // The chunks came and could not be kept: going on would fetch them for ever.
        Err(NodeError::Full { store: self.config.state.join("store") })
    }
}

impl MountedImage {
    /// Lets the kernel read far ahead when there is nothing that it could cause to be fetched.
    fn lengthen_read_ahead(&self) {
        if let Shown::Erofs(mounted) = &self.shown
            && self.layers.iter().all(|layer| layer.layer.is_complete())
        {
            mounted.set_read_ahead(mounts::erofs::LOCAL_READ_AHEAD_KIB);
        }
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

/// The statement must be about exactly these layers: it is the manifest that the reference resolved to that counts.
fn check_layers(image: &str, statement: &Statement, resolved: &ResolvedImage) -> Result<(), NodeError> {
    let other = |reason: String| Err(NodeError::OtherLayers { image: image.to_owned(), reason });
    if statement.layers.len() != resolved.layers.len() {
        return other(format!("{} layers indexed, {} in the manifest", statement.layers.len(), resolved.layers.len()));
    }
    for (indexed, layer) in statement.layers.iter().zip(&resolved.layers) {
        if indexed.layer != layer.layer || indexed.diff_id != layer.diff_id {
            return other(format!("layer {} is indexed where the manifest has {}", indexed.layer, layer.layer));
        }
    }
    Ok(())
}

/// Tells the client how far it is; dropped when the client is slow.
fn say(progress: &mpsc::Sender<Answer>, step: &str, done_bytes: u64, total_bytes: u64) {
    let _ = progress.try_send(Answer::Progress { step: step.to_owned(), done_bytes, total_bytes });
}
