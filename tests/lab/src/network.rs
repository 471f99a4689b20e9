//! Networks of a test's own.
#![allow(unsafe_code, reason = "the kernel moves a thread into another network on its word alone")]

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::command::run;

/// Runs `work` on a thread in a network that has a loopback device and nothing else: no route leads anywhere. What it
/// starts is in that network too, and stays there.
///
/// # Errors
/// When there can be no such network; with what `work` says.
pub fn without_network<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    on_a_thread(|| {
        leave()?;
        run(Command::new("ip").args(["link", "set", "lo", "up"])).context("bring up loopback")?;
        work()
    })
}

/// A network without a name. It lasts as long as this value or a process in it, so that nothing of it is left when the
/// test is killed; links into it end with it.
#[derive(Debug)]
pub struct Network {
    file: File,
}

impl Network {
    /// Makes one, with loopback up.
    ///
    /// # Errors
    /// When this process is not root.
    pub fn new() -> Result<Self> {
        let open = || {
            leave()?;
            File::open("/proc/thread-self/ns/net").context("open the network of this thread")
        };
        let network = Self { file: on_a_thread(open)? };
        network.batch("ip", "link set dev lo up")?;
        Ok(network)
    }

    /// Where other processes find it while this value lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// `program`, to be run in it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg("--").arg(program);
        command
    }

    /// Runs the lines of `commands` through `ip` or `tc` in it.
    ///
    /// # Errors
    /// With the first line that fails.
    pub fn batch(&self, program: &str, commands: &str) -> Result<()> {
        let mut file = tempfile::NamedTempFile::new().context("make a temporary file")?;
        file.write_all(commands.as_bytes())?;
        let mut command = self.command(program);
        run(command.arg("-batch").arg(file.path())).with_context(|| commands.to_owned())?;
        Ok(())
    }

    /// Runs `work` on a thread in it. Sockets that are made there stay in it.
    ///
    /// # Errors
    /// When the thread cannot enter; with what `work` says.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            self.enter()?;
            work()
        })
    }

    /// Moves this thread into it, for good.
    ///
    /// # Errors
    /// When this process is not root.
    pub fn enter(&self) -> Result<()> {
        move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network)).context("enter a network")
    }
}

/// Moves this thread into a new network.
fn leave() -> Result<()> {
    // SAFETY: it concerns this thread alone, which has just begun and holds no socket.
    let left = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    ensure!(left == 0, "no network of its own: {}", std::io::Error::last_os_error());
    Ok(())
}

/// A thread may go into another network and need not come back.
fn on_a_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join()).map_err(|_| anyhow!("the thread panicked"))?
}
