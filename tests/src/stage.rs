//! A host with a real containerd into which Hermes was installed, a registry with runnable images, and their indexes.
//!
//! The host is one of [`lazy_host`]. Daemon and containerd are started by the test, in the order and as often as it likes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use hermes_snapshotter::status::{NodeStatus, PullStatus};

use crate::agree::Sides;
use crate::command::run;
use crate::containerds::{Host, RunningContainerd};
use crate::daemon::Daemon;
use crate::faulty::FaultyRegistry;
use crate::guard::{ScratchDir, mounts_below};
use crate::kept::Kept;
use crate::layout::Layout;
use crate::lazy_host;
use crate::node::Index;
use crate::runnable::{self, PAUSE};

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
        let index = index.context("an image has to be indexed")?;
        let host = lazy_host::installed(hermes, line, Some(&registry.image(PAUSE)))?;
        Ok(Self { host, registry, layout, index, hermes: hermes.to_owned(), scratch })
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
        lazy_host::arguments(&self.host, &self.index, trusted)
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

    /// Waits until `containerd` and the daemon know the same `count` snapshots.
    ///
    /// # Errors
    /// When that does not come.
    pub fn agrees_with(&self, containerd: &RunningContainerd<'_>, count: Option<usize>) -> Result<usize> {
        let (socket, root) = (self.host.socket(), self.snapshots());
        let sides = Sides { socket: &socket, root: &root };
        let agreed = sides.agree(|| containerd.ctr(), |agreed| count.is_none_or(|count| count == agreed.snapshots));
        Ok(agreed?.snapshots)
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
