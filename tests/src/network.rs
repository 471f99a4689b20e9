//! A network of a test's own.
#![allow(unsafe_code, reason = "the kernel moves a thread into another network on its word alone")]

use std::process::Command;

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::command::run;

/// Runs `work` on a thread in a network that has a loopback device and nothing else: no route leads anywhere. What it
/// starts is in that network too, and stays there.
///
/// # Errors
/// When there can be no such network; with what `work` says.
pub fn without_network<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let enter = || {
        // SAFETY: it concerns this thread alone, which has just begun and holds no socket.
        let entered = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        ensure!(entered == 0, "no network of its own: {}", std::io::Error::last_os_error());
        run(Command::new("ip").args(["link", "set", "lo", "up"])).context("bring up loopback")?;
        work()
    };
    std::thread::scope(|scope| scope.spawn(enter).join()).map_err(|_| anyhow!("the thread panicked"))?
}
