//! A host with a real containerd into which Hermes was installed, a registry with runnable images, and their indexes.
//!
//! containerd is set up by `hermes node install`, as a user does it, and asked as a kubelet asks it. Daemon and containerd
//! are started by the test, in the order and as often as it likes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_snapshotter::status::{NodeStatus, PullStatus};

use crate::agree::Sides;
use crate::command::run;
use crate::containerds::{Host, RunningContainerd};
use crate::cri::Cri;
use crate::daemon::Daemon;
use crate::faulty::FaultyRegistry;
use crate::guard::{ScratchDir, mounts_below, wait_for};
use crate::kept::Kept;
use crate::layout::Layout;
use crate::node::Index;
use crate::runnable::{self, PAUSE};

/// How long containerd may take to collect garbage.
const DEADLINE: Duration = Duration::from_secs(60);

/// The parts. Fields drop in this order.
#[derive(Debug)]
pub struct Stage {
    /// The host, whose containerd uses Hermes for all pods.
    pub host: Host,
    /// Where images come from.
    pub registry: FaultyRegistry,
    /// The images in the registry.
    pub layout: Layout,
    /// The indexes of some of them.
    pub index: Index,
    hermes: PathBuf,
    scratch: ScratchDir,
}

impl Stage {
    /// A stage with containerd of `line` and [`runnable::images`], of which `v1` is indexed.
    ///
    /// # Errors
    /// When a part cannot be had.
    pub fn new(hermes: &Path, line: &str) -> Result<Self> {
        Self::with(hermes, line, &["v1"], FaultyRegistry::start, runnable::images)
    }

    /// A stage with the images that `make` makes in a folder, of which those with the tags `indexed` are indexed, behind
    /// the registry that `serve` makes of that folder.
    ///
    /// # Errors
    /// When a part cannot be had.
    pub fn with(
        hermes: &Path,
        line: &str,
        indexed: &[&str],
        serve: impl FnOnce(&Path) -> Result<FaultyRegistry>,
        make: impl FnOnce(&Path) -> Result<Layout>,
    ) -> Result<Self> {
        let scratch = ScratchDir::new("stage")?;
        let layout = make(&scratch.path().join("layout"))?;
        let registry = serve(layout.dir())?;
        let folder = scratch.path().join("index");
        let mut index = None;
        for tag in indexed {
            index = Some(Index::build(hermes, &registry.image(tag), &folder)?);
        }
        let host = Host::new(line)?;
        let mut stage = Self {
            host,
            registry,
            layout,
            index: index.context("an image has to be indexed")?,
            hermes: hermes.to_owned(),
            scratch,
        };
        stage.install()?;
        Ok(stage)
    }

    /// Installs Hermes on the host.
    fn install(&mut self) -> Result<()> {
        let text = self.host.config_for_pods(&self.registry.image(PAUSE))?;
        fs::write(self.host.config(), text)?;
        let (containerd, socket) = (self.host.containerd(), self.host.socket());
        let (containerd, socket) = (containerd.to_str().context("UTF-8")?, socket.to_str().context("UTF-8")?);
        let arguments = ["node", "install", "--no-start", "--containerd", containerd, "--socket", socket];
        let installed = self.host.hermes(self.hermes.to_str().context("UTF-8")?, &arguments)?;
        ensure!(installed.status.success(), "install: {}", String::from_utf8_lossy(&installed.stderr));
        Ok(())
    }

    /// The daemon's state folder.
    pub fn state(&self) -> PathBuf {
        self.scratch.path().join("state")
    }

    /// A folder of the test's own.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The arguments of a daemon that answers containerd, takes the stage's indexes and believes `trusted`.
    pub fn arguments_with(&self, trusted: &str) -> Vec<String> {
        let path = |path: &Path| path.display().to_string();
        let (socket, folder) = (path(&self.host.socket()), path(&self.index.folder));
        ["--containerd-socket", &socket, "--index", &folder, "--trust", trusted].map(str::to_owned).to_vec()
    }

    /// The same, believing who has made the indexes.
    pub fn arguments(&self) -> Vec<String> {
        self.arguments_with(&self.index.key)
    }

    /// Starts a daemon with `arguments`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn daemon_with(&self, arguments: &[String]) -> Result<Daemon> {
        let arguments = arguments.iter().map(String::as_str).collect::<Vec<_>>();
        Daemon::start(&self.hermes, &self.state(), &arguments)
    }

    /// Starts a daemon with the usual arguments and `more`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn daemon(&self, more: &[&str]) -> Result<Daemon> {
        self.daemon_with(&self.arguments_and(more))
    }

    /// Starts a daemon with the usual arguments and `more` under a keeper.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn kept(&self, more: &[&str]) -> Result<Kept> {
        let arguments = self.arguments_and(more);
        Kept::start(&self.hermes, &self.state(), &[], &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn arguments_and(&self, more: &[&str]) -> Vec<String> {
        let more = more.iter().map(|argument| (*argument).to_owned());
        self.arguments().into_iter().chain(more).collect()
    }

    /// The mounts of the daemon's trees.
    ///
    /// # Errors
    /// When the mount table cannot be read.
    pub fn trees(&self) -> Result<usize> {
        Ok(mounts_below(&self.state().join("trees"))?.len())
    }

    /// Where Hermes has the snapshots' directories.
    pub fn snapshots(&self) -> PathBuf {
        self.state().join("snapshots")
    }

    /// Compressed bytes of an image's layers.
    ///
    /// # Errors
    /// When there is no such image.
    pub fn layer_bytes(&self, tag: &str) -> Result<u64> {
        Ok(self.layout.image(tag)?.layers.iter().map(|layer| layer.blob_len_bytes).sum())
    }
}

/// What the shell says of a file, by the same program that containers have.
///
/// # Errors
/// When it cannot be run.
pub fn cksum(content: &[u8]) -> Result<String> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), content)?;
    let printed = run(Command::new("sh").args(["-c", "cksum < \"$0\""]).arg(file.path()))?;
    Ok(String::from_utf8(printed)?.trim().to_owned())
}

/// The decision about the last image that was pulled.
///
/// # Errors
/// When none was.
pub fn last_pull(status: NodeStatus) -> Result<PullStatus> {
    status.pulls.into_iter().next_back().context("no image was pulled")
}

impl RunningContainerd<'_> {
    /// What `ctr` says to `arguments`.
    ///
    /// # Errors
    /// With its complaint.
    pub fn ctr_says(&self, arguments: &[&str]) -> Result<String> {
        Ok(String::from_utf8(run(self.ctr().args(arguments))?)?)
    }

    /// A connection as a kubelet's.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub fn cri(&self) -> Result<Cri> {
        Cri::connect(&self.socket())
    }

    /// `name` as no other host calls a container: runc's state is in a place that all of this machine share.
    pub fn container_name(&self, name: &str) -> String {
        let host = self.root().file_name().unwrap_or_default();
        format!("{name}-{}", host.to_string_lossy())
    }

    /// Runs `script` in a container of `image`, and returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn once(&self, image: &str, script: &str) -> Result<String> {
        let name = self.container_name("once");
        let arguments = ["run", "--rm", "--snapshotter", "hermes", image, &name, "/bin/sh", "-c", script];
        Ok(self.ctr_says(&arguments)?.trim().to_owned())
    }

    /// Removes every name of every image, as a kubelet does, with a collection of garbage.
    ///
    /// # Errors
    /// When containerd does not.
    pub fn remove_names(&self) -> Result<()> {
        let names = self.ctr_says(&["images", "ls", "--quiet"])?;
        let names = names.lines().collect::<Vec<_>>();
        if !names.is_empty() {
            self.ctr_says(&[&["images", "rm", "--sync"], names.as_slice()].concat())?;
        }
        Ok(())
    }

    /// The same, until Hermes has no snapshot any more.
    ///
    /// # Errors
    /// When one stays.
    pub fn remove_all_images(&self) -> Result<()> {
        self.remove_names()?;
        wait_for("the end of all snapshots", DEADLINE, || {
            let listed = self.ctr_says(&["snapshots", "--snapshotter", "hermes", "ls"]).ok()?;
            (listed.lines().count() == 1).then_some(())
        })
    }

    /// Waits until containerd and the daemon of `stage` know the same `count` snapshots.
    ///
    /// # Errors
    /// When that does not come.
    pub fn agrees_with(&self, stage: &Stage, count: Option<usize>) -> Result<usize> {
        let (socket, root) = (stage.host.socket(), stage.snapshots());
        let sides = Sides { socket: &socket, root: &root };
        let agreed = sides.agree(|| self.ctr(), |agreed| count.is_none_or(|count| count == agreed.snapshots));
        Ok(agreed?.snapshots)
    }
}
