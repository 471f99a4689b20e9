//! A node as another process: the real command with a state folder of its own, for the demo and for benchmarks.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, bail};
use hermes_snapshotter::status::{BySource, NodeStatus, Way};

/// What to mount.
#[derive(Debug, Clone, Default)]
pub(super) struct ChildMount<'a> {
    /// A registry reference or a layout.
    pub(super) image: &'a str,
    /// A folder of indexes and the key that signed them; the index is built by the node when absent.
    pub(super) index: Option<(&'a Path, &'a str)>,
    /// Peers to ask.
    pub(super) peers: &'a [String],
    /// How to show the tree.
    pub(super) way: Option<Way>,
}

/// A state folder and a mount point, served by a daemon that `hermes mount` starts. Dropping it unmounts and ends the
/// daemon.
pub(super) struct ChildNode {
    name: String,
    state: PathBuf,
    dir: PathBuf,
}

impl ChildNode {
    /// A node that has nothing, below `root`.
    pub(super) fn new(root: &Path, name: &str) -> anyhow::Result<Self> {
        let (state, dir) = (root.join(format!("{name}-state")), root.join(format!("{name}-image")));
        for folder in [&state, &dir] {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        Ok(Self { name: name.to_owned(), state, dir })
    }

    /// What it is called.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where its image is mounted.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn hermes(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let output = Command::new(program)
            .args(arguments)
            .arg("--state")
            .arg(&self.state)
            .stdin(Stdio::null())
            .output()
            .context("cannot start this program again")?;
        if !output.status.success() {
            bail!("node {}: {}", self.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(output)
    }

    /// Mounts an image.
    pub(super) fn mount(&self, mount: &ChildMount<'_>) -> anyhow::Result<()> {
        let mut arguments = vec!["mount", mount.image, text(&self.dir)?, "--listen", "127.0.0.1:0"];
        if let Some((index, trusted)) = mount.index {
            arguments.extend(["--no-build", "--index", text(index)?, "--trust", trusted]);
        }
        if let Some(way) = mount.way {
            arguments.extend(["--way", way.name()]);
        }
        for peer in mount.peers {
            arguments.extend(["--peer", peer.as_str()]);
        }
        self.hermes(&arguments).map(drop)
    }

    /// Fetches what is missing.
    pub(super) fn complete(&self) -> anyhow::Result<()> {
        self.hermes(&["complete", text(&self.dir)?]).map(drop)
    }

    /// Unmounts; the daemon ends with its last image.
    pub(super) fn unmount(&self) -> anyhow::Result<()> {
        self.hermes(&["unmount", text(&self.dir)?]).map(drop)
    }

    /// How the node stands.
    pub(super) fn status(&self) -> anyhow::Result<NodeStatus> {
        let output = self.hermes(&["status", "--json"])?;
        serde_json::from_slice(&output.stdout).context("the status is not what it should be")
    }

    /// Where its bytes came from so far; nothing when no daemon runs.
    pub(super) fn sources(&self) -> BySource {
        let mut sources = BySource::default();
        if let Ok(status) = self.status() {
            status.images.iter().for_each(|image| sources.add(image.sources));
        }
        sources
    }

    /// Where peers reach it.
    pub(super) fn addresses(&self) -> anyhow::Result<Vec<String>> {
        Ok(self.status()?.listen)
    }

    /// Unmounts and ends the daemon, if it runs.
    pub(super) fn stop(&self) {
        if self.status().is_ok() {
            let _ = self.unmount();
        }
    }
}

impl Drop for ChildNode {
    fn drop(&mut self) {
        self.stop();
    }
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a folder whose name is not UTF-8")
}
