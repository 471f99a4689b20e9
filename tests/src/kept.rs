//! A node under a keeper: its daemon can be killed, upgraded and handed over while something reads.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hermes_snapshotter::status::NodeStatus;
use rustix::process::{Pid, Signal};

use crate::guard::{ProcessGuard, wait_for};
use crate::sample::SampleIndex;

/// How long a daemon may take until it answers, on a machine that is busy with other tests.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// A running `hermes keeper` and its daemon. Dropping it ends both, which unmounts what is mounted.
#[derive(Debug)]
pub struct Kept {
    keeper: ProcessGuard,
    hermes: PathBuf,
    state: PathBuf,
}

impl Kept {
    /// Starts a keeper on the folder `state`, with its own arguments and those of its daemons, and waits for an answer.
    ///
    /// # Errors
    /// When it ends or its daemon does not answer; the log is in the message.
    pub fn start(hermes: &Path, state: &Path, keeper: &[&str], node: &[&str]) -> Result<Self> {
        fs::create_dir_all(state)?;
        let log = File::options().create(true).append(true).open(state.with_extension("log"))?;
        let mut command = Command::new(hermes);
        command.args(["keeper", "-v", "--state"]).arg(state).args(keeper).args(["--", "-v"]).args(node);
        // As for other daemons of tests.
        if !node.contains(&"--complete") {
            command.args(["--complete", "never"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let keeper = ProcessGuard::start(&mut command)?;
        let mut kept = Self { keeper, hermes: hermes.to_owned(), state: state.to_owned() };
        let answered = wait_for("the daemon's first answer", START_DEADLINE, || match kept.keeper.ended() {
            Ok(None) => kept.status().is_ok().then_some(true),
            _ => Some(false),
        });
        if !answered? {
            bail!("the keeper ended: {}", kept.log());
        }
        Ok(kept)
    }

    /// Runs another command against the daemon, to its end.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.hermes);
        command.args(arguments).arg("--state").arg(&self.state).stdin(Stdio::null());
        command.output().with_context(|| format!("start {command:?}"))
    }

    /// Mounts an image whose index is at hand.
    ///
    /// # Errors
    /// With what the command says.
    pub fn mount(&self, image: &str, dir: &Path, index: &SampleIndex) -> Result<()> {
        fs::create_dir_all(dir)?;
        let path = |path: &Path| path.to_str().map(str::to_owned).context("UTF-8");
        let (dir, folder) = (path(dir)?, path(&index.folder)?);
        let output = self.run(&["mount", image, &dir, "--no-build", "--trust", &index.key, "--index", &folder])?;
        if !output.status.success() {
            bail!("mount: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// What the daemon knows of itself.
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

    /// The daemon's process id, whether it answers or not; `None` between two daemons.
    ///
    /// # Errors
    /// When the keeper is no more.
    pub fn daemon(&self) -> Result<Option<Pid>> {
        let keeper = self.keeper.id();
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children"))?;
        Ok(children.split_whitespace().next().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw))
    }

    /// Sends `signal` to the daemon. Says to whom.
    ///
    /// # Errors
    /// When there is no daemon.
    pub fn signal_daemon(&self, signal: Signal) -> Result<Pid> {
        // One that has ended since it was looked for is followed by another.
        let signalled = |daemon: &Pid| rustix::process::kill_process(*daemon, signal).is_ok();
        wait_for("a daemon", START_DEADLINE, || self.daemon().ok().flatten().filter(signalled))
    }

    /// Waits until another daemon than `before` answers. Says how long that took.
    ///
    /// # Errors
    /// When none does; the log is in the message.
    pub fn wait_for_another(&self, before: Pid) -> Result<Duration> {
        let started = Instant::now();
        let old = before.as_raw_nonzero().get().unsigned_abs();
        wait_for("another daemon", START_DEADLINE, || {
            self.status().is_ok_and(|status| status.pid != old).then_some(())
        })
        .with_context(|| self.log())?;
        Ok(started.elapsed())
    }

    /// Has `script`, a shell script, be the daemon from the next start on. It finds the real one as `$HERMES`, and its
    /// arguments as `$@`.
    ///
    /// # Errors
    /// When the state folder cannot be written.
    pub fn use_script(&self, script: &str) -> Result<()> {
        let path = self.state.join("script");
        fs::write(&path, format!("#!/bin/sh\nHERMES='{}'\n{script}\n", self.hermes.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(hermes_snapshotter::keeper::set_program(&self.state, Some(&path))?)
    }

    /// The keeper's own process.
    pub fn keeper(&mut self) -> &mut ProcessGuard {
        &mut self.keeper
    }

    /// What the keeper has in memory besides its program, in KiB.
    ///
    /// # Errors
    /// When it is no more.
    pub fn keeper_memory_kib(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.keeper.id()))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"));
        Ok(resident.context("no RssAnon")?.parse()?)
    }

    /// What the keeper and its daemons have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.state.with_extension("log")).unwrap_or_default()
    }

    /// Ends the keeper in order, which unmounts everything.
    ///
    /// # Errors
    /// When it had to be killed.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.keeper.stop()
    }
}

/// Runs this test program once more, for the test called `name` (its module before it) and with `variables` set: a reader that is a process.
///
/// # Errors
/// When it cannot be started.
pub fn test_process(name: &str, variables: &[(&str, OsString)]) -> Result<ProcessGuard> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", name, "--nocapture"]).envs(variables.iter().map(|(key, value)| (key, value)));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    ProcessGuard::start(&mut command)
}
