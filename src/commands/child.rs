//! A node as another process: the real command with a state folder of its own, for the demo and for benchmarks.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hermes_snapshotter::control::FailureClass;
use hermes_snapshotter::status::{BySource, NodeStatus, Way};

/// How long the daemon may take to end: its own limit for what runs on blocking threads and as much again.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// How often its end is looked for.
const END_POLL: Duration = Duration::from_millis(20);

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

    fn run(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut command = Command::new(program);
        command.args(arguments).arg("--state").arg(&self.state).stdin(Stdio::null());
        command.output().context("cannot start this program again")
    }

    fn hermes(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        self.succeeded(self.run(arguments)?)
    }

    fn succeeded(&self, output: Output) -> anyhow::Result<Output> {
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

    /// Writes the image's profile into a folder of indexes; false when no start of it is over yet.
    pub(super) fn export_profile(&self, folder: &Path) -> anyhow::Result<bool> {
        let output = self.run(&["profile", "export", text(&self.dir)?, "--output", text(folder)?])?;
        match output.status.code() {
            Some(code) if code == i32::from(FailureClass::NotFound.exit_code()) => Ok(false),
            _ => self.succeeded(output).map(|_| true),
        }
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

    /// Unmounts and ends the daemon, if it runs, and waits for its end: until then it writes into its state folder.
    pub(super) fn stop(&self) {
        if self.status().is_err() {
            return;
        }
        // The store's lock names the process (hermes_store).
        let daemon = std::fs::read_to_string(self.state.join("store/lock")).unwrap_or_default();
        if self.unmount().is_ok()
            && let Ok(daemon) = daemon.trim().parse::<u32>()
        {
            let (process, until) = (PathBuf::from(format!("/proc/{daemon}")), Instant::now() + END_TIMEOUT);
            while process.exists() && Instant::now() < until {
                std::thread::sleep(END_POLL);
            }
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
