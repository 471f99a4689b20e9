//! A host whose containerd shows images lazily: set up by `hermes node install`, asked as a kubelet and as a person ask it.
//!
//! The parts are started one by one, because tests differ in their daemons: a [`Host`] by [`installed`], a daemon with
//! [`arguments`], containerd by [`Host::start`]. Containers outlive containerd, so a [`Container`] that stays is ended by its
//! guard while containerd runs.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::command::run;
use crate::containerds::{Host, RunningContainerd};
use crate::guard::wait_for;
use crate::node::Index;

/// How long containerd may take to collect garbage.
const DEADLINE: Duration = Duration::from_secs(60);

/// How long a program in a container, or a pull, may take, in Go's words; on a machine that is busy with other tests.
const CTR_TIMEOUT: &str = "240s";

/// A host with containerd of `line`, on which `hermes`, the command, is installed; `more` are further arguments of the
/// install.
///
/// # Errors
/// With what the command says.
pub fn installed(hermes: &str, line: &str, more: &[&str]) -> Result<Host> {
    let host = Host::new(line)?;
    fs::write(host.config(), host.default_config()?)?;
    let (containerd, socket) = (host.containerd(), host.socket());
    let (containerd, socket) = (containerd.to_str().context("UTF-8")?, socket.to_str().context("UTF-8")?);
    let own = ["node", "install", "--no-start", "--containerd", containerd, "--socket", socket];
    let installed = host.hermes(hermes, &[&own[..], more].concat())?;
    ensure!(installed.status.success(), "install: {}", String::from_utf8_lossy(&installed.stderr));
    Ok(host)
}

/// The arguments of a daemon on `host` that knows `index` and takes the statements of `trusted`.
pub fn arguments(host: &Host, index: &Index, trusted: &str) -> Vec<String> {
    let path = |path: &Path| path.display().to_string();
    let (socket, folder) = (path(&host.socket()), path(&index.folder));
    ["--containerd-socket", &socket, "--index", &folder, "--trust", trusted].map(str::to_owned).to_vec()
}

/// Runs containerd's own client; what it printed.
///
/// # Errors
/// With what it says.
pub fn ctr(containerd: &RunningContainerd<'_>, arguments: &[&str]) -> Result<String> {
    let mut command = containerd.ctr();
    command.args(["--timeout", CTR_TIMEOUT]).args(arguments);
    String::from_utf8(run(&mut command)?).with_context(|| format!("{command:?} printed what is no text"))
}

/// Removes every name of every image, as a kubelet does, and waits until no snapshot of `snapshotter` is left.
///
/// # Errors
/// When containerd refuses, or keeps a snapshot.
pub fn remove_all(containerd: &RunningContainerd<'_>, snapshotter: &str) -> Result<()> {
    let names = ctr(containerd, &["images", "ls", "--quiet"])?;
    let names = names.lines().collect::<Vec<_>>();
    ctr(containerd, &[&["images", "rm", "--sync"], names.as_slice()].concat())?;
    wait_for("the end of all snapshots", DEADLINE, || {
        let listed = ctr(containerd, &["snapshots", "--snapshotter", snapshotter, "ls"]).ok()?;
        (listed.lines().count() == 1).then_some(())
    })
}

/// A container to be.
#[derive(Debug, Clone, Copy)]
pub struct NewContainer<'a> {
    /// The image's reference.
    pub image: &'a str,
    /// Who keeps its file system: `hermes` or `overlayfs`.
    pub snapshotter: &'a str,
    /// Further options of `ctr run`.
    pub options: &'a [&'a str],
    /// What it runs; what the image says when empty.
    pub command: &'a [&'a str],
}

impl NewContainer<'_> {
    /// Runs it to its end; what it printed.
    ///
    /// # Errors
    /// When it fails; what it said is in the message.
    pub fn run(&self, containerd: &RunningContainerd<'_>, name: &str) -> Result<String> {
        let run = ["run", "--rm", "--snapshotter", self.snapshotter];
        ctr(containerd, &[&run, self.options, &[self.image, name], self.command].concat())
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start<'a>(&self, containerd: &'a RunningContainerd<'a>, name: &str) -> Result<Container<'a>> {
        // Before it can fail: what is half made is cleaned up, too.
        let container = Container { containerd, name: name.to_owned() };
        let run = ["run", "--detach", "--snapshotter", self.snapshotter];
        ctr(containerd, &[&run, self.options, &[self.image, name], self.command].concat())?;
        Ok(container)
    }
}

/// A container that runs until it is dropped.
#[derive(Debug)]
pub struct Container<'a> {
    containerd: &'a RunningContainerd<'a>,
    name: String,
}

impl Container<'_> {
    /// Runs another program in it; what that printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn exec(&self, command: &[&str]) -> Result<String> {
        ctr(self.containerd, &[&["tasks", "exec", "--exec-id", "other", &self.name], command].concat())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = ctr(self.containerd, &["tasks", "rm", "--force", &self.name]);
        let _ = ctr(self.containerd, &["containers", "rm", &self.name]);
    }
}
