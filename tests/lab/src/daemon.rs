//! A node's daemon as a process of its own, started by a test with the settings that the test needs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hermes_snapshotter::status::{BySource, NodeStatus};
use rustix::mount::UnmountFlags;
use rustix::process::Signal;

use crate::guard::{ProcessGuard, mounts_below, wait_for};
use crate::index::Index;

/// How long a daemon may take until it answers, on a machine that is busy with other tests.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Past this a read or a command counts as hanging. Every deadline that tests set is far below it.
pub const HANG: Duration = Duration::from_secs(60);

/// A running `hermes node`. Dropping it ends it, which unmounts what it has mounted.
#[derive(Debug)]
pub struct Daemon {
    process: ProcessGuard,
    hermes: PathBuf,
    state: PathBuf,
}

impl Daemon {
    /// Starts `hermes node` on the folder `state`, and waits until it answers.
    ///
    /// # Errors
    /// When it ends or does not answer; its log is in the message.
    pub fn start(hermes: &Path, state: &Path, arguments: &[&str]) -> Result<Self> {
        let mut daemon = Self::launch(Command::new(hermes), hermes, state, arguments)?;
        daemon.wait()?;
        Ok(daemon)
    }

    /// Starts it through `command`, which ends in the path of `hermes`, without waiting for its answer.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn launch(mut command: Command, hermes: &Path, state: &Path, arguments: &[&str]) -> Result<Self> {
        fs::create_dir_all(state)?;
        let log = File::options().create(true).append(true).open(state.with_extension("log"))?;
        command.args(["node", "-v", "--state"]).arg(state).args(arguments);
        // Tests count what readers cause; those that are about the rest say so.
        if !arguments.contains(&"--complete") {
            command.args(["--complete", "never"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let process = ProcessGuard::start(&mut command)?;
        Ok(Self { process, hermes: hermes.to_owned(), state: state.to_owned() })
    }

    /// Waits until it answers.
    ///
    /// # Errors
    /// When it ends or does not answer; its log is in the message.
    pub fn wait(&mut self) -> Result<()> {
        let answered = wait_for("the daemon's first answer", START_DEADLINE, || match self.process.ended() {
            Ok(None) => self.status().is_ok().then_some(true),
            _ => Some(false),
        });
        if !answered? {
            bail!("the daemon ended: {}", self.log());
        }
        Ok(())
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Runs another command against it, to its end.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = self.command(arguments);
        command.output().with_context(|| format!("start {command:?}"))
    }

    /// Another command against it, to be started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.hermes);
        command.args(arguments).arg("--state").arg(&self.state).stdin(Stdio::null());
        command
    }

    /// Mounts an image whose index is at hand.
    ///
    /// # Errors
    /// With what the command says.
    pub fn mount(&self, image: &str, dir: &Path, index: &Index, more: &[&str]) -> Result<()> {
        fs::create_dir_all(dir)?;
        let mut command = self.command(&["mount", image]);
        command.arg(dir).args(["--no-build", "--trust", &index.key, "--index"]).arg(&index.folder).args(more);
        let output = command.output()?;
        if !output.status.success() {
            bail!("mount: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// What it knows of itself.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<NodeStatus> {
        let output = self.run(&["status", "--json"])?;
        if !output.status.success() {
            bail!("status: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Where the bytes of all images came from.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn sources(&self) -> Result<BySource> {
        let mut sources = BySource::default();
        self.status()?.images.iter().for_each(|image| sources.add(image.sources));
        Ok(sources)
    }

    /// What it, and the daemons before it on this folder, have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.state.with_extension("log")).unwrap_or_default()
    }

    /// Ends it in order. Says how long that took.
    ///
    /// # Errors
    /// When it ends with another code than 0, or had to be killed.
    pub fn stop(mut self) -> Result<Duration> {
        let started = Instant::now();
        let status = self.process.stop()?;
        if !status.success() {
            bail!("the daemon ended with {status}");
        }
        Ok(started.elapsed())
    }

    /// Kills it, and clears away its mounts below `root`, as its user has to (docs/semantics.md).
    ///
    /// # Errors
    /// When a mount cannot be undone.
    pub fn kill(mut self, root: &Path) -> Result<()> {
        self.process.signal(Signal::KILL)?;
        self.process.child().wait()?;
        for dir in mounts_below(root)?.iter().rev().filter(|dir| !dir.starts_with(&self.state)) {
            rustix::mount::unmount(dir, UnmountFlags::DETACH)
                .with_context(|| format!("umount -l {}", dir.display()))?;
        }
        Ok(())
    }
}

/// A read on a thread of its own.
#[derive(Debug)]
pub struct Reading {
    started: Instant,
    answer: Receiver<(std::io::Result<Vec<u8>>, Duration)>,
}

impl Reading {
    /// Begins to read all of `path`.
    pub fn start(path: &Path) -> Self {
        let (path, started) = (path.to_owned(), Instant::now());
        let (tell, answer) = mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let read = fs::read(path);
            let _ = tell.send((read, started.elapsed()));
        });
        Self { started, answer }
    }

    /// What came of it, and how long it took.
    ///
    /// # Errors
    /// When it hangs.
    pub fn end(self) -> Result<(std::io::Result<Vec<u8>>, Duration)> {
        let left = HANG.saturating_sub(self.started.elapsed());
        self.answer.recv_timeout(left).with_context(|| format!("the read hangs for {HANG:?}"))
    }
}
