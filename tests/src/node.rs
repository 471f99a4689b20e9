//! A node of a test's own: the real `hermes` command with its own state folder.
//!
//! The daemon is a child of the test, started with `hermes node`; everything else is asked of it with the commands that
//! a person types. It is ended when the guard is dropped, which unmounts what it mounted; what a killed daemon leaves
//! mounted below the folder goes with the folder.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
pub use hermes_lab::index::Index;
use hermes_snapshotter::status::{ImageStatus, NodeStatus, Way};

use crate::command::run;
use crate::guard::{ProcessGuard, ScratchDir, wait_for};

/// How long a daemon may take until it answers: half a second alone, longer where others compile.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// What is to be mounted.
#[derive(Debug, Clone, Default)]
pub struct Mount<'a> {
    /// A registry reference, or `oci:PATH:TAG`.
    pub image: &'a str,
    /// How to show the tree; the best that works when absent.
    pub way: Option<Way>,
    /// A folder of indexes to read; peers are asked when absent.
    pub index_folder: Option<&'a Path>,
    /// The key whose indexes are accepted. No index is ever built by the mount.
    pub trusted_key: &'a str,
    /// Nodes to ask before the registry.
    pub peers: &'a [String],
}

/// A running node.
#[derive(Debug)]
pub struct TestNode {
    program: PathBuf,
    // The order is that of the clean-up: the daemon ends before its folder goes.
    process: ProcessGuard,
    dir: ScratchDir,
}

impl TestNode {
    /// Starts the daemon of `program`, the `hermes` command, and waits until it answers.
    ///
    /// # Errors
    ///
    /// When it ends or does not answer in time; the message holds its log.
    pub fn start(program: &Path, name: &str) -> Result<Self> {
        let dir = ScratchDir::new(name)?;
        let log_path = dir.path().join("daemon.log");
        let log = File::create(&log_path).with_context(|| format!("create {}", log_path.display()))?;
        let process = ProcessGuard::start(
            Command::new(program)
                .args(["node", "--listen", "127.0.0.1:0", "--complete", "never", "-v", "--state"])
                .arg(dir.path().join("state"))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log),
        )?;
        let mut node = Self { program: program.to_owned(), process, dir };
        let answers = wait_for("an answer of the daemon", START_DEADLINE, || {
            if let Ok(Some(status)) = node.process.ended() {
                return Some(Err(anyhow::anyhow!("the daemon ended with {status}")));
            }
            node.status().is_ok().then_some(Ok(()))
        });
        match answers {
            Ok(Ok(())) => Ok(node),
            Ok(Err(error)) | Err(error) => Err(error.context(format!("the daemon's log: {}", node.log()))),
        }
    }

    /// The node's state folder.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// What the daemon has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }

    /// The daemon itself, to signal it.
    pub fn process(&mut self) -> &mut ProcessGuard {
        &mut self.process
    }

    fn hermes<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Vec<u8>> {
        run(Command::new(&self.program).args(arguments).arg("--state").arg(self.state()))
            .with_context(|| format!("the end of the daemon's log: {}", tail(&self.log())))
    }

    /// Mounts an image at a new folder of the node's own and returns that folder.
    ///
    /// # Errors
    ///
    /// When the command fails, or shows the tree in another way than asked for.
    pub fn mount(&self, name: &str, mount: &Mount<'_>) -> Result<PathBuf> {
        let dir = self.dir.make(name)?;
        let mut arguments: Vec<&OsStr> = ["mount", "--no-build", "--json", "--trust", mount.trusted_key, mount.image]
            .into_iter()
            .map(OsStr::new)
            .collect();
        arguments.push(dir.as_os_str());
        if let Some(folder) = mount.index_folder {
            arguments.extend([OsStr::new("--index"), folder.as_os_str()]);
        }
        if let Some(way) = mount.way {
            arguments.extend([OsStr::new("--way"), OsStr::new(way.name())]);
        }
        for peer in mount.peers {
            arguments.extend([OsStr::new("--peer"), OsStr::new(peer)]);
        }
        self.hermes(arguments)?;
        let shown = self.image(&dir)?.way;
        if mount.way.is_some_and(|way| way != shown) {
            bail!("{} is shown as {shown}, not as asked for", mount.image);
        }
        Ok(dir)
    }

    /// Unmounts what is mounted at `dir`.
    ///
    /// # Errors
    ///
    /// When the command fails.
    pub fn unmount(&self, dir: &Path) -> Result<()> {
        self.hermes([OsStr::new("unmount"), dir.as_os_str()]).map(drop)
    }

    /// Fetches what is missing of what is mounted at `dir`.
    ///
    /// # Errors
    ///
    /// When the command fails.
    pub fn complete(&self, dir: &Path) -> Result<()> {
        self.hermes([OsStr::new("complete"), dir.as_os_str()]).map(drop)
    }

    /// How the node stands.
    ///
    /// # Errors
    ///
    /// When the command fails or its answer is not understood.
    pub fn status(&self) -> Result<NodeStatus> {
        let answer = run(Command::new(&self.program).args(["status", "--json", "--state"]).arg(self.state()))?;
        serde_json::from_slice(&answer).context("parse the answer of status")
    }

    /// How the image stands that is mounted at `dir`.
    ///
    /// # Errors
    ///
    /// When there is none, or [`TestNode::status`] fails.
    pub fn image(&self, dir: &Path) -> Result<ImageStatus> {
        let images = self.status()?.images;
        let found = images.into_iter().find(|image| Path::new(&image.dir) == dir);
        found.with_context(|| format!("no image is mounted at {}", dir.display()))
    }
}

/// The last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
