//! The keeper's loop: wait, hear what the daemon says, see whether it ended, do what is due.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus};
use thiserror::Error;

use super::notify::{FDS_MAX, FIRST_FD, connection_of};
use super::program::{program, set_program};
use super::receive::{Message, Socket};
use super::schedule::{Due, LOOK_INTERVAL, Schedule};
use super::system::{self, Signals};
use crate::control::socket_path;
use crate::fs::session::abort_connection;

/// How long readers wait at most for a daemon, unless the keeper is told otherwise. As long as a read waits for the
/// registry: by then its process has an error in either case.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// How long a daemon may take to unmount everything when the keeper ends.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// How often an upgraded daemon may end before it answers; then the program before it is used again.
const UPGRADE_ATTEMPTS: u32 = 3;

/// What a keeper is told.
#[derive(Debug, Clone)]
pub struct KeeperConfig {
    /// The node's state folder.
    pub state: PathBuf,
    /// How long readers wait without a daemon that runs well, before the connections are ended.
    pub deadline: Duration,
    /// The program to start, unless an upgrade has named another one.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

/// The keeper cannot do its work.
#[derive(Debug, Error)]
pub enum KeeperError {
    /// Another one does.
    #[error("a keeper runs already with state folder {}", state.display())]
    Running {
        /// The folder.
        state: PathBuf,
    },
    /// A daemon runs that has no keeper.
    #[error("a node without a keeper runs with state folder {}; end it first", state.display())]
    Unkept {
        /// The folder.
        state: PathBuf,
    },
    /// A file.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn system_error<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> KeeperError {
    move |source| KeeperError::System { what, source: source.into() }
}

fn lock_path(state: &Path) -> PathBuf {
    state.join("keeper.lock")
}

fn lock(state: &Path) -> Result<Option<File>, KeeperError> {
    let path = lock_path(state);
    let failed = |what| {
        let path = path.clone();
        move |source| KeeperError::Io { what, path, source }
    };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed("open"))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(failed("lock")(error.into())),
    }
}

/// Whether a keeper runs for `state`.
///
/// # Errors
/// When the state folder cannot be used.
pub fn is_kept(state: &Path) -> Result<bool, KeeperError> {
    Ok(lock_path(state).exists() && lock(state)?.is_none())
}

/// A descriptor that is kept.
#[derive(Debug)]
struct Held {
    name: String,
    descriptor: OwnedFd,
}

/// A daemon that runs.
#[derive(Debug)]
struct Daemon {
    pid: Pid,
    handle: OwnedFd,
    program: PathBuf,
    has_answered: bool,
    is_stopping: bool,
}

struct Keeper {
    config: KeeperConfig,
    socket: Socket,
    socket_path: PathBuf,
    signals: Signals,
    schedule: Schedule,
    held: Vec<Held>,
    daemon: Option<Daemon>,
    /// The last program whose daemon has answered.
    proven: Option<PathBuf>,
    /// Daemons in a row that ended before they answered.
    silent: u32,
    /// When the daemon is killed, if the keeper was told to end.
    end_at: Option<Instant>,
}

/// Runs until the daemon ends for good or the keeper is told to end. Returns the exit code. To be called while the
/// process has one thread.
///
/// # Errors
/// When it cannot begin, or the kernel fails it.
pub fn run(config: KeeperConfig) -> Result<u8, KeeperError> {
    let state = config.state.clone();
    let _lock = lock(&state)?.ok_or_else(|| KeeperError::Running { state: state.clone() })?;
    if UnixStream::connect(socket_path(&state)).is_ok() {
        return Err(KeeperError::Unkept { state });
    }
    let socket_path = state.join("keeper.sock");
    let socket = Socket::bind(&socket_path).map_err(|source| {
        let path = socket_path.clone();
        KeeperError::Io { what: "listen on", path, source }
    })?;
    let signals = Signals::new().map_err(system_error("receive signals"))?;
    let schedule = Schedule::new(Instant::now(), config.deadline);
    let mut keeper = Keeper {
        config,
        socket,
        socket_path,
        signals,
        schedule,
        held: Vec::new(),
        daemon: None,
        proven: None,
        silent: 0,
        end_at: None,
    };
    let ended = keeper.run();
    let _ = std::fs::remove_file(&keeper.socket_path);
    ended
}

impl Keeper {
    fn run(&mut self) -> Result<u8, KeeperError> {
        loop {
            if self.end_at.is_none() {
                while let Some(due) = self.schedule.due(Instant::now()) {
                    match due {
                        Due::Start => self.start()?,
                        Due::GiveUp => self.give_up(),
                        Due::Replace => self.kill("it does not answer"),
                    }
                }
            }
            let now = Instant::now();
            let timeout = match self.end_at {
                Some(at) => at.saturating_duration_since(now).min(LOOK_INTERVAL),
                None => self.schedule.idle(now),
            };
            let handle = self.daemon.as_ref().map(|daemon| &daemon.handle as &dyn AsFd);
            let ready = system::wait([Some(&self.socket), Some(&self.signals), handle], timeout);
            let [_, signalled, _] = ready.map_err(system_error("wait for the daemon"))?;
            // What the daemon said before it ended is heard before its end is seen.
            let ended = self.reap()?;
            self.hear()?;
            if signalled && self.signals.take() {
                self.end();
            }
            if let Some(status) = ended
                && let Some(code) = self.after(status)
            {
                return Ok(code);
            }
            if self.end_at.is_some() && self.daemon.is_none() {
                return Ok(0);
            }
            if self.end_at.is_some_and(|at| Instant::now() >= at) {
                self.kill("it does not end");
            }
        }
    }

    fn start(&mut self) -> Result<(), KeeperError> {
        let program = program(&self.config.state).unwrap_or_else(|| self.config.program.clone());
        let mut command = Command::new(&program);
        let names: Vec<&str> = self.held.iter().map(|held| held.name.as_str()).collect();
        command.args(&self.config.arguments).env("NOTIFY_SOCKET", &self.socket_path);
        command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        let copies = self.held.iter().map(|held| held.descriptor.try_clone()).collect::<Result<Vec<_>, _>>();
        let copies = copies.map_err(system_error("copy a descriptor"))?;
        let pid = system::start(command, &copies, FIRST_FD).map_err(system_error("start the daemon"))?;
        let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty());
        let handle = handle.map_err(system_error("watch the daemon"))?;
        tracing::info!(pid = pid.as_raw_nonzero(), program = %program.display(), kept = copies.len(), "daemon started");
        self.daemon = Some(Daemon { pid, handle, program, has_answered: false, is_stopping: false });
        self.schedule.started(Instant::now());
        Ok(())
    }

    /// The status of a daemon that has ended.
    fn reap(&mut self) -> Result<Option<WaitStatus>, KeeperError> {
        let Some(daemon) = &self.daemon else { return Ok(None) };
        let ended = rustix::process::waitpid(Some(daemon.pid), WaitOptions::NOHANG);
        match ended.map_err(system_error("ask for the daemon's end"))? {
            Some((_, status)) => Ok(Some(status)),
            None => {
                if is_dying(daemon.pid) {
                    self.schedule.dying(Instant::now());
                }
                Ok(None)
            }
        }
    }

    fn hear(&mut self) -> Result<(), KeeperError> {
        while let Some(message) = self.socket.receive().map_err(system_error("hear the daemon"))? {
            match message {
                Message::Ready => {
                    self.schedule.ready(Instant::now());
                    self.silent = 0;
                    if let Some(daemon) = &mut self.daemon {
                        daemon.has_answered = true;
                        self.proven = Some(daemon.program.clone());
                    }
                }
                Message::Stopping => {
                    if let Some(daemon) = &mut self.daemon {
                        daemon.is_stopping = true;
                    }
                }
                Message::Store { name, descriptor } => {
                    self.held.retain(|held| held.name != name);
                    if self.held.len() < FDS_MAX {
                        self.held.push(Held { name, descriptor });
                    } else {
                        tracing::warn!(name, "{FDS_MAX} descriptors are kept already; this one is not");
                    }
                }
                Message::Remove { name } => self.held.retain(|held| held.name != name),
            }
        }
        Ok(())
    }

    /// Takes note of the daemon's end. Returns the keeper's exit code when it is the last.
    fn after(&mut self, status: WaitStatus) -> Option<u8> {
        let daemon = self.daemon.take()?;
        let code = status.exit_status().map_or(1, |code| u8::try_from(code).unwrap_or(1));
        if self.end_at.is_some() || (daemon.is_stopping && code == 0) {
            return Some(code);
        }
        if !daemon.has_answered && self.proven.is_none() && self.held.is_empty() {
            // A wrong setting does not get better by trying again.
            return Some(code.max(1));
        }
        if daemon.has_answered && status.exit_status() == Some(0) {
            self.schedule.handed_over(Instant::now());
        } else {
            self.schedule.ended(Instant::now());
        }
        tracing::info!(?status, kept = self.held.len(), "the daemon ended; it is started again");
        if !daemon.has_answered {
            self.silent += 1;
            self.take_back(&daemon.program);
        }
        None
    }

    /// Goes back to the program that has worked when the one after it does not.
    fn take_back(&mut self, failed: &Path) {
        let Some(proven) = self.proven.clone().filter(|proven| proven != failed) else { return };
        if self.silent < UPGRADE_ATTEMPTS {
            return;
        }
        tracing::error!(
            program = %failed.display(), before = %proven.display(),
            "the upgraded daemon ended {UPGRADE_ATTEMPTS} times before it answered; the one before it is used again"
        );
        let before = Some(proven.as_path()).filter(|proven| *proven != self.config.program);
        match set_program(&self.config.state, before) {
            Ok(()) => self.silent = 0,
            Err(error) => tracing::error!(%error, "cannot write down which program to start"),
        }
    }

    /// Ends the connections: whoever waits gets an error.
    fn give_up(&mut self) {
        if self.held.is_empty() {
            return;
        }
        self.kill("it does not answer");
        for held in self.held.drain(..) {
            let name = held.name;
            tracing::error!(name, deadline = ?self.config.deadline, "no daemon has run well for too long; the connection ends");
            // A daemon that cannot die, because it waits for itself, has a copy too: closing ours would not be enough.
            if let Some((_, connection)) = connection_of(&name) {
                abort_connection(connection);
            }
        }
    }

    /// Has the daemon unmount everything and end.
    fn end(&mut self) {
        if let Some(daemon) = &self.daemon {
            let _ = rustix::process::kill_process(daemon.pid, Signal::INT);
        }
        self.end_at.get_or_insert(Instant::now() + STOP_TIMEOUT);
    }

    fn kill(&self, reason: &str) {
        if let Some(daemon) = &self.daemon {
            tracing::warn!(pid = daemon.pid.as_raw_nonzero(), reason, "killing the daemon");
            let _ = rustix::process::kill_process(daemon.pid, Signal::KILL);
        }
    }
}

/// Whether the process was killed and cannot end: its first thread is gone, and another one waits in the kernel for
/// what only this process could answer.
fn is_dying(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    // The state follows the name, which is in brackets and may hold anything (proc_pid_stat(5)).
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_keeper_a_state_folder() {
        let state = tempfile::tempdir().expect("a folder");
        assert!(!is_kept(state.path()).expect("looks"));
        let held = lock(state.path()).expect("locks").expect("free");
        assert!(is_kept(state.path()).expect("looks"));
        drop(held);
        assert!(!is_kept(state.path()).expect("looks"));
    }

    #[test]
    fn a_living_process_is_not_dying() {
        assert!(!is_dying(rustix::process::getpid()));
    }
}
