//! A host whose containerd shows images lazily: set up by `hermes node install`, asked as a person asks it.
//!
//! The parts are started one by one, because tests differ in their daemons: a [`Host`] by [`installed`], a daemon with
//! [`arguments`], containerd by [`Host::start`]. Containers outlive
//! containerd, so a [`Container`] that stays is ended by its guard while containerd runs.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::command::run;
use crate::containerds::{Host, RunningContainerd};
use crate::guard::wait_for;
use crate::index::Index;

/// How long containerd may take to collect garbage.
const DEADLINE: Duration = Duration::from_secs(60);

/// How long a program in a container, or a pull, may take, in Go's words; on a machine that is busy with other tests.
const CTR_TIMEOUT: &str = "240s";

/// A host with containerd of `line`, on which `hermes`, the command, is installed. `pause` is the image that holds pods,
/// where there are any.
///
/// # Errors
/// With what the command says.
pub fn installed(hermes: &Path, line: &str, pause: Option<&str>) -> Result<Host> {
    let host = Host::new(line)?;
    install(hermes, &host, pause)?;
    Ok(host)
}

/// Writes the configuration of the containerd of `host`, and installs `hermes` into it, as [`installed`] does.
///
/// # Errors
/// With what the command says.
pub fn install(hermes: &Path, host: &Host, pause: Option<&str>) -> Result<()> {
    let config = pause.map_or_else(|| host.default_config(), |pause| host.config_for_pods(pause));
    fs::write(host.config(), config?)?;
    let (containerd, socket) = (host.containerd(), host.socket());
    let (containerd, socket) = (containerd.to_str().context("UTF-8")?, socket.to_str().context("UTF-8")?);
    let arguments = ["node", "install", "--no-start", "--containerd", containerd, "--socket", socket];
    let installed = host.hermes(hermes.to_str().context("UTF-8")?, &arguments)?;
    ensure!(installed.status.success(), "install: {}", String::from_utf8_lossy(&installed.stderr));
    Ok(())
}

/// The arguments of a daemon on `host` that knows `index` and takes the statements of `trusted`.
pub fn arguments(host: &Host, index: &Index, trusted: &str) -> Vec<String> {
    let path = |path: &Path| path.display().to_string();
    let (socket, folder) = (path(&host.socket()), path(&index.folder));
    ["--containerd-socket", &socket, "--index", &folder, "--trust", trusted].map(str::to_owned).to_vec()
}

impl RunningContainerd<'_> {
    /// What `ctr`, containerd's own client, says to `arguments`.
    ///
    /// # Errors
    /// With its complaint.
    pub fn ctr_says(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.ctr();
        command.args(["--timeout", CTR_TIMEOUT]).args(arguments);
        String::from_utf8(run(&mut command)?).with_context(|| format!("{command:?} printed what is no text"))
    }

    /// `name` as no other host calls a container: runc's state is in a place that all of this machine share.
    pub fn container_name(&self, name: &str) -> String {
        let host = self.root().file_name().unwrap_or_default();
        format!("{name}-{}", host.to_string_lossy())
    }

    /// Runs `script` in a container of `image`, and returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn once(&self, image: &str, script: &str) -> Result<String> {
        let container =
            NewContainer { image, snapshotter: "hermes", options: &[], command: &["/bin/sh", "-c", script] };
        Ok(container.run(self, "once")?.trim().to_owned())
    }

    /// Removes every name of every image, as a kubelet does, with a collection of garbage.
    ///
    /// # Errors
    /// When containerd does not.
    pub fn remove_names(&self) -> Result<()> {
        let names = self.ctr_says(&["images", "ls", "--quiet"])?;
        let names = names.lines().collect::<Vec<_>>();
        if !names.is_empty() {
            self.ctr_says(&[&["images", "rm", "--sync"], names.as_slice()].concat())?;
        }
        Ok(())
    }

    /// The same, until Hermes has no snapshot any more.
    ///
    /// # Errors
    /// When one stays.
    pub fn remove_all_images(&self) -> Result<()> {
        self.remove_names()?;
        wait_for("the end of all snapshots", DEADLINE, || {
            let listed = self.ctr_says(&["snapshots", "--snapshotter", "hermes", "ls"]).ok()?;
            (listed.lines().count() == 1).then_some(())
        })
    }
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
    /// Runs it to its end under a name that tells its `role`; what it printed, errors too.
    ///
    /// The shim writes that into a file: of what comes to its client through a pipe, containerd loses the end once in a while
    /// (concourse/concourse issue 6775 has the same).
    ///
    /// # Errors
    /// When it fails; what it said is in the message.
    pub fn run(&self, containerd: &RunningContainerd<'_>, role: &str) -> Result<String> {
        let (name, log) = (containerd.container_name(role), containerd.root().join(format!("{role}.log")));
        let uri = format!("file://{}", log.display());
        let run = ["run", "--rm", "--log-uri", &uri, "--snapshotter", self.snapshotter];
        let ran = containerd.ctr_says(&[&run, self.options, &[self.image, &name], self.command].concat());
        let printed = match fs::read_to_string(&log) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            read => read.with_context(|| format!("cannot read {}", log.display()))?,
        };
        let _ = fs::remove_file(&log);
        ran.with_context(|| format!("a container printed: {printed}"))?;
        Ok(printed)
    }

    /// Starts it under a name that tells its `role`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start<'a>(&self, containerd: &'a RunningContainerd<'a>, role: &str) -> Result<Container<'a>> {
        // Before it can fail: what is half made is cleaned up, too.
        let container = Container { containerd, name: containerd.container_name(role) };
        let run = ["run", "--detach", "--snapshotter", self.snapshotter];
        containerd.ctr_says(&[&run, self.options, &[self.image, &container.name], self.command].concat())?;
        Ok(container)
    }
}

/// A container that runs until it is dropped.
#[derive(Debug)]
pub struct Container<'a> {
    containerd: &'a RunningContainerd<'a>,
    name: String,
}

impl<'a> Container<'a> {
    /// One of `image`, shown by Hermes, that does nothing for ten minutes.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn sleeping(containerd: &'a RunningContainerd<'a>, image: &str) -> Result<Self> {
        let command = ["/bin/sleep", "600"];
        NewContainer { image, snapshotter: "hermes", options: &[], command: &command }.start(containerd, "sleeps")
    }

    /// Runs another program in it; what that printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn exec(&self, command: &[&str]) -> Result<String> {
        self.containerd.ctr_says(&[&["tasks", "exec", "--exec-id", "other", &self.name], command].concat())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = self.containerd.ctr_says(&["tasks", "rm", "--force", &self.name]);
        let _ = self.containerd.ctr_says(&["containers", "rm", &self.name]);
    }
}
