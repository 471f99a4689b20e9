//! containerd's side of the snapshots service: its client, and what containerd does with the mounts it is given.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use hermes_containerd_api::snapshots::snapshots_client::SnapshotsClient;
use hermes_containerd_api::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, UsageResponse,
    ViewSnapshotRequest,
};
use hermes_containerd_api::types::Mount;
use hermes_snapshotter::snapshots::{Images, Listener, Service};
use hermes_store::{Store, StoreConfig};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::metadata::MetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::command::run;
use crate::guard::{MountGuard, ScratchDir};

/// Labels of a snapshot.
pub type Labels = BTreeMap<String, String>;

/// Labels from pairs.
pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// What containerd calls the service.
const NAME: &str = "hermes";
/// The namespace that a client works in where it asks containerd, which wants to know: that of Kubernetes.
const NAMESPACE: (&str, &str) = ("containerd-namespace", "k8s.io");

/// Adds the namespace to a request.
fn in_namespace(mut request: Request<()>) -> Result<Request<()>, Status> {
    request.metadata_mut().insert(NAMESPACE.0, MetadataValue::from_static(NAMESPACE.1));
    Ok(request)
}

type Namespaced = InterceptedService<Channel, fn(Request<()>) -> Result<Request<()>, Status>>;

/// A client of the service, or of containerd's own over it, for tests that wait for each answer.
#[derive(Debug)]
pub struct Client {
    runtime: Arc<Runtime>,
    client: SnapshotsClient<Namespaced>,
    /// Which snapshotter containerd is to ask; a service that is one itself doesn't look.
    snapshotter: String,
}

type Answer<T> = Result<T, Status>;

impl Client {
    /// Connects to the service at `socket`, or to a containerd that listens there.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = Arc::new(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?);
        Self::on(runtime, socket, NAME)
    }

    /// Connects to containerd itself, for the snapshots that `snapshotter` has in Kubernetes' namespace.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn through_containerd(socket: &Path, snapshotter: &str) -> Result<Self> {
        let runtime = Arc::new(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?);
        Self::on(runtime, socket, snapshotter)
    }

    fn on(runtime: Arc<Runtime>, socket: &Path, snapshotter: &str) -> Result<Self> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        let channel = runtime.block_on(endpoint.connect()).with_context(|| format!("connect {}", socket.display()))?;
        let client = SnapshotsClient::with_interceptor(channel, in_namespace as fn(_) -> _);
        Ok(Self { runtime, client, snapshotter: snapshotter.to_owned() })
    }

    /// Makes an active snapshot.
    ///
    /// # Errors
    /// What the service says.
    pub fn prepare(&self, key: &str, parent: &str, labels: Labels) -> Answer<Vec<Mount>> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        Ok(self.runtime.block_on(self.client.clone().prepare(request))?.into_inner().mounts)
    }

    /// Makes a view.
    ///
    /// # Errors
    /// What the service says.
    pub fn view(&self, key: &str, parent: &str) -> Answer<Vec<Mount>> {
        let request = ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            ..Default::default()
        };
        Ok(self.runtime.block_on(self.client.clone().view(request))?.into_inner().mounts)
    }

    /// The mounts of a snapshot.
    ///
    /// # Errors
    /// What the service says.
    pub fn mounts(&self, key: &str) -> Answer<Vec<Mount>> {
        let request = MountsRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        Ok(self.runtime.block_on(self.client.clone().mounts(request))?.into_inner().mounts)
    }

    /// Commits an active snapshot; an empty parent leaves the one it has.
    ///
    /// # Errors
    /// What the service says.
    pub fn commit(&self, name: &str, key: &str, labels: Labels, parent: &str) -> Answer<()> {
        let request = CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels,
            parent: parent.to_owned(),
        };
        self.runtime.block_on(self.client.clone().commit(request)).map(drop)
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// What the service says.
    pub fn remove(&self, key: &str) -> Answer<()> {
        let request = RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        self.runtime.block_on(self.client.clone().remove(request)).map(drop)
    }

    /// A snapshot.
    ///
    /// # Errors
    /// What the service says.
    pub fn stat(&self, key: &str) -> Answer<Info> {
        let request = StatSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        Ok(self.runtime.block_on(self.client.clone().stat(request))?.into_inner().info.expect("a stat has an answer"))
    }

    /// Changes what `mask` names.
    ///
    /// # Errors
    /// What the service says.
    pub fn update(&self, info: Info, mask: &[&str]) -> Answer<Info> {
        let mut request =
            UpdateSnapshotRequest { snapshotter: self.snapshotter.clone(), info: Some(info), ..Default::default() };
        request.update_mask.get_or_insert_default().paths = mask.iter().map(|path| (*path).to_owned()).collect();
        let answer = self.runtime.block_on(self.client.clone().update(request))?;
        Ok(answer.into_inner().info.expect("an update has an answer"))
    }

    /// The snapshots for which one of `filters` holds.
    ///
    /// # Errors
    /// What the service says.
    pub fn list(&self, filters: &[&str]) -> Answer<Vec<Info>> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let request = ListSnapshotsRequest { snapshotter: self.snapshotter.clone(), filters };
        self.runtime.block_on(async {
            let mut stream = self.client.clone().list(request).await?.into_inner();
            let mut all = Vec::new();
            while let Some(batch) = stream.message().await? {
                all.extend(batch.info);
            }
            Ok(all)
        })
    }

    /// The names of the snapshots for which one of `filters` holds.
    ///
    /// # Errors
    /// What the service says.
    pub fn names(&self, filters: &[&str]) -> Answer<BTreeSet<String>> {
        Ok(self.list(filters)?.into_iter().map(|info| info.name).collect())
    }

    /// What a snapshot takes.
    ///
    /// # Errors
    /// What the service says.
    pub fn usage(&self, key: &str) -> Answer<UsageResponse> {
        let request = UsageRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        Ok(self.runtime.block_on(self.client.clone().usage(request))?.into_inner())
    }

    /// Has removed directories deleted.
    ///
    /// # Errors
    /// What the service says.
    pub fn cleanup(&self) -> Answer<()> {
        self.runtime
            .block_on(self.client.clone().cleanup(CleanupRequest { snapshotter: self.snapshotter.clone() }))
            .map(drop)
    }
}

/// The service in this process, on its own socket and store.
#[derive(Debug)]
pub struct LocalService {
    client: Client,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
    runtime: Arc<Runtime>,
    dir: ScratchDir,
}

impl LocalService {
    /// Starts it.
    ///
    /// # Errors
    /// When it cannot.
    pub fn start(images: Arc<dyn Images>) -> Result<Self> {
        let runtime = Arc::new(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?);
        let dir = ScratchDir::new("snapshotter")?;
        let (client, running) = Self::run(&runtime, dir.path(), images)?;
        Ok(Self { client, running: Some(running), runtime, dir })
    }

    #[allow(clippy::type_complexity, reason = "what the two callers take apart at once")]
    fn run(
        runtime: &Arc<Runtime>,
        dir: &Path,
        images: Arc<dyn Images>,
    ) -> Result<(Client, (oneshot::Sender<()>, JoinHandle<()>))> {
        let socket = dir.join("run/snapshotter.sock");
        let store = Store::open(StoreConfig::new(dir.join("store")))?;
        let entered = runtime.enter();
        let listener = Listener::bind(&socket)?;
        drop(entered);
        let service = runtime.block_on(Service::start(store, dir.join("snapshots"), images))?;
        let (stop, stopped) = oneshot::channel::<()>();
        let task = runtime.spawn(async move {
            service.serve(listener, async { drop(stopped.await) }).await.expect("the service ends in order");
        });
        Ok((Client::on(Arc::clone(runtime), &socket, NAME)?, (stop, task)))
    }

    /// Ends it in order and starts it again on the same folder.
    ///
    /// # Errors
    /// When it cannot.
    pub fn restart(&mut self, images: Arc<dyn Images>) -> Result<()> {
        self.stop();
        let (client, running) = Self::run(&self.runtime, self.dir.path(), images)?;
        (self.client, self.running) = (client, Some(running));
        Ok(())
    }

    fn stop(&mut self) {
        if let Some((stop, task)) = self.running.take() {
            drop(stop);
            if let Err(error) = self.runtime.block_on(task) {
                eprintln!("the service did not end well: {error}");
            }
        }
    }

    /// Its client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Where the snapshots' directories are.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("snapshots")
    }

    /// A new folder of the test's.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(&self, name: &str) -> Result<PathBuf> {
        self.dir.make(name)
    }

    /// Mounts what the service answered at a new folder of this name.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn mount(&self, mounts: &[Mount], name: &str) -> Result<MountGuard> {
        mount(mounts, &self.root(), &self.make(name)?)
    }

    /// The names of the snapshots' directories.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn directories(&self) -> Result<BTreeSet<String>> {
        directories(&self.root())
    }
}

impl Drop for LocalService {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The names in a folder.
///
/// # Errors
/// When it cannot be read.
pub fn directories(root: &Path) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(root).with_context(|| format!("list {}", root.display()))?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Mounts what a service with the folder `root` answered at `target`, as containerd does: with paths relative to that
/// folder, because the kernel takes one page of options.
///
/// # Errors
/// When the kernel refuses.
pub fn mount(mounts: &[Mount], root: &Path, target: &Path) -> Result<MountGuard> {
    let [mount] = mounts else { bail!("one mount is expected: {mounts:?}") };
    let prefix = format!("{}/", root.display());
    let options = mount.options.join(",");
    let (source, options) = match mount.r#type.as_str() {
        "overlay" => (mount.source.clone(), options.replace(&prefix, "")),
        _ => (mount.source.clone(), options),
    };
    run(Command::new("mount")
        .current_dir(root)
        .args(["-t", &mount.r#type, &source])
        .arg(target)
        .args(["-o", &options]))?;
    Ok(MountGuard::adopt(target))
}

/// What there is in a tree, by path: mode with type, owner, and what a file holds or a link points to.
pub type Listing = BTreeMap<PathBuf, (u32, u32, u32, Vec<u8>)>;

/// Lists a tree without its root.
///
/// # Errors
/// When something of it cannot be read.
pub fn listing(root: &Path) -> Result<Listing> {
    let mut all = Listing::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let metadata = fs::symlink_metadata(&path)?;
            let content = match metadata.file_type() {
                kind if kind.is_symlink() => fs::read_link(&path)?.into_os_string().into_encoded_bytes(),
                kind if kind.is_file() => fs::read(&path)?,
                _ => Vec::new(),
            };
            if metadata.is_dir() {
                dirs.push(path.clone());
            }
            let name = path.strip_prefix(root).expect("an entry is below its folder").to_owned();
            all.insert(name, (metadata.permissions().mode(), metadata.uid(), metadata.gid(), content));
        }
    }
    Ok(all)
}
