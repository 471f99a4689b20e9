//! Real containerds of several lines, each on a host that is a folder.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::command::run;
use crate::guard::{ProcessGuard, ScratchDir, wait_for};
use crate::network::Network;
use crate::process;

/// The lines that `tools/containerd` has.
pub const LINES: [&str; 3] = ["1.6", "1.7", "2"];
/// How long containerd may take to answer on its socket, on a machine that is busy with other tests.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long a process may take to end that was killed.
const END_DEADLINE: Duration = Duration::from_secs(20);
/// Where a host has a folder for each container of Kubernetes' namespace.
const BUNDLES: &str = "run/containerd/io.containerd.runtime.v2.task/k8s.io";
/// Where runc keeps the state of those, by the shim's default.
const RUNC_STATE: &str = "/run/containerd/runc/k8s.io";
/// What holds a pod or a container for containerd.
const SHIM: &str = "containerd-shim-runc-v2";
/// Where a host has the socket of its containerd.
const CONTAINERD_SOCKET: &str = "run/containerd/containerd.sock";
/// Where a host has the socket of its snapshotter.
const SNAPSHOTTER_SOCKET: &str = "run/hermes/snapshotter.sock";

/// The folder with the programs of a line.
///
/// # Errors
/// When they are not in the cache and cannot be fetched.
pub fn programs(line: &str) -> Result<PathBuf> {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tools/containerd");
    let printed = String::from_utf8(run(Command::new(tool).arg(line))?).context("a path that is no text")?;
    Ok(PathBuf::from(printed.trim_end()))
}

/// A host in a folder: its root, which `--root` names, and a containerd that keeps everything within it.
#[derive(Debug)]
pub struct Host {
    programs: PathBuf,
    snapshotter: Option<UnixListener>,
    dir: ScratchDir,
}

impl Host {
    /// An empty host with containerd of `line`.
    ///
    /// # Errors
    /// When there is no such containerd.
    pub fn new(line: &str) -> Result<Self> {
        Self::with(programs(line)?, "host")
    }

    /// An empty host with the containerd, the runc and the rest that are in the folder `programs`; its own folder, after which its
    /// containers are named, has `name` in it.
    ///
    /// # Errors
    /// When its folder cannot be made.
    pub fn with(programs: PathBuf, name: &str) -> Result<Self> {
        let dir = ScratchDir::new(name)?;
        for folder in ["etc/containerd", "run/hermes", "var/lib"] {
            fs::create_dir_all(dir.path().join(folder))?;
        }
        Ok(Self { programs, snapshotter: None, dir })
    }

    /// Its root.
    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    /// Where its containerd's configuration is.
    pub fn config(&self) -> PathBuf {
        self.root().join("etc/containerd/config.toml")
    }

    /// Its containerd.
    pub fn containerd(&self) -> PathBuf {
        self.programs.join("containerd")
    }

    /// containerd's own default configuration, with every path moved into this host.
    ///
    /// # Errors
    /// When containerd does not print it.
    pub fn default_config(&self) -> Result<String> {
        let printed = run(Command::new(self.containerd()).args(["config", "default"]))?;
        let root = self.root().display();
        let mut text = String::from_utf8(printed).context("a configuration that is no text")?;
        for path in ["/var/lib/containerd", "/var/run/nri", "/run/containerd", "/opt/containerd", "/opt/nri", "/etc/"] {
            for quote in ["\"", "'"] {
                text = text.replace(&format!("{quote}{path}"), &format!("{quote}{root}{path}"));
            }
        }
        Ok(text)
    }

    /// The same for pods: with `image` for what holds a pod's namespaces, and without lowering the score by which the
    /// kernel chooses what it kills for memory, which root may not do where this machine is a container itself.
    ///
    /// # Errors
    /// When containerd does not print it, or names no such image.
    pub fn config_for_pods(&self, image: &str) -> Result<String> {
        let text = self.default_config()?;
        // `sandbox_image` of CRI in 1.6 and 1.7, `sandbox` of its pinned images in 2.
        let is_sandbox = |line: &str| {
            let key = line.split_once('=').map(|(key, _)| key.trim());
            matches!(key, Some("sandbox_image" | "sandbox")) && line.contains('/')
        };
        if !text.lines().any(is_sandbox) {
            bail!("containerd's configuration names no image for sandboxes");
        }
        let replace = |line: &str| match line.split_once('=') {
            Some((key, _)) if is_sandbox(line) => format!("{key}= \"{image}\"\n"),
            Some((key, _)) if key.trim() == "restrict_oom_score_adj" => format!("{key}= true\n"),
            _ => format!("{line}\n"),
        };
        Ok(text.lines().map(replace).collect())
    }

    /// A small configuration of the version `number`, without the plugins that would leave this host: CRI and those
    /// that make folders or sockets in places of their own.
    pub fn small_config(&self, number: u32) -> String {
        let root = self.root().display();
        format!(
            r#"version = {number}
root = "{root}/var/lib/containerd"
state = "{root}/run/containerd"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", # no pods here
  "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri",
]

[grpc]
address = "{root}/run/containerd/containerd.sock"
"#
        )
    }

    /// Runs `hermes` with `arguments` for this host.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn hermes(&self, hermes: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(hermes);
        // What follows two hyphens is for the daemon.
        let own = arguments.iter().position(|&argument| argument == "--").unwrap_or(arguments.len());
        command.args(&arguments[..own]).arg("--root").arg(self.root()).args(&arguments[own..]).stdin(Stdio::null());
        command.output().with_context(|| format!("start {command:?}"))
    }

    /// Listens on the snapshotter's socket, which is all that loading a proxy plugin takes.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen(&mut self) -> Result<()> {
        self.snapshotter = Some(UnixListener::bind(self.root().join(SNAPSHOTTER_SOCKET))?);
        Ok(())
    }

    /// The snapshotter's socket.
    pub fn socket(&self) -> PathBuf {
        self.root().join(SNAPSHOTTER_SOCKET)
    }

    /// Starts containerd with the configuration as it is, and waits until it answers.
    ///
    /// # Errors
    /// When it ends or does not answer; its log is in the message.
    pub fn start(&self) -> Result<RunningContainerd<'_>> {
        self.launch(Command::new(self.containerd()))
    }

    /// The same in `network`, which containers share that have none of their own.
    ///
    /// # Errors
    /// As [`Host::start`].
    pub fn start_in(&self, network: &Network) -> Result<RunningContainerd<'_>> {
        self.launch(network.command(self.containerd()))
    }

    fn launch(&self, mut command: Command) -> Result<RunningContainerd<'_>> {
        let log_path = self.root().join("containerd.log");
        let log = File::create(&log_path)?;
        let path = std::env::join_paths(
            [self.programs.clone()]
                .into_iter()
                .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
        )?;
        command.arg("--config").arg(self.config()).env("PATH", path).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        let mut process = ProcessGuard::start(&mut command)?;
        let answered = wait_for("an answer of containerd", START_DEADLINE, || match process.ended() {
            Ok(None) => run(self.ctr().arg("version")).is_ok().then_some(true),
            _ => Some(false),
        });
        if !answered.as_ref().is_ok_and(|answered| *answered) {
            bail!("containerd does not run ({answered:?}): {}", fs::read_to_string(log_path).unwrap_or_default());
        }
        Ok(RunningContainerd { host: self, process })
    }

    /// Kills what containerd has started: the shims of this host and all containers in them. A shim outlives the
    /// containerd that started it.
    ///
    /// # Errors
    /// When one does not end.
    pub fn kill_containers(&self) -> Result<()> {
        self.kill_containers_and(&[])
    }

    /// The same, and at the same time `others`.
    ///
    /// # Errors
    /// When one does not end.
    pub fn kill_containers_and(&self, others: &[u32]) -> Result<()> {
        let mut processes = self.shims();
        processes.extend(processes.clone().into_iter().flat_map(process::descendants));
        processes.extend(others);
        process::kill(&processes);
        wait_for("the end of all containers", END_DEADLINE, || {
            processes.iter().all(|pid| process::has_ended(*pid)).then_some(())
        })?;
        self.forget_containers()
    }

    /// Has runc forget the containers that were killed, and remove their control groups: its own state is in a place
    /// that all hosts of this machine share, and that a real one would lose with its processes.
    fn forget_containers(&self) -> Result<()> {
        let Ok(bundles) = fs::read_dir(self.root().join(BUNDLES)) else { return Ok(()) };
        for bundle in bundles {
            let mut delete = Command::new(self.programs.join("runc"));
            delete.args(["--root", RUNC_STATE, "delete", "--force"]).arg(bundle?.file_name());
            run(&mut delete)?;
        }
        Ok(())
    }

    /// The shims of this host.
    pub fn shims(&self) -> Vec<u32> {
        process::with_argument(SHIM, self.root())
    }

    fn ctr(&self) -> Command {
        let mut command = Command::new(self.programs.join("ctr"));
        command.arg("--address").arg(self.root().join(CONTAINERD_SOCKET));
        // In Go's words; a call that hangs is a failure.
        command.args(["--timeout", "20s"]);
        command
    }
}

/// Containers outlive everybody that started them; those that a failed test has left go with their host.
impl Drop for Host {
    fn drop(&mut self) {
        if let Err(error) = self.kill_containers() {
            eprintln!("guard: {error:#}");
        }
    }
}

/// A containerd that runs on a [`Host`]. It ends when this is dropped.
#[derive(Debug)]
pub struct RunningContainerd<'a> {
    host: &'a Host,
    process: ProcessGuard,
}

impl RunningContainerd<'_> {
    /// Its process id. What it has started is not part of it: each pod has a shim, which has the containers.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The root of its host.
    pub fn root(&self) -> &Path {
        self.host.root()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.host.root().join(CONTAINERD_SOCKET)
    }

    /// containerd's own client, in the namespace of Kubernetes.
    pub fn ctr(&self) -> Command {
        let mut command = self.host.ctr();
        command.args(["--namespace", "k8s.io"]);
        command
    }

    /// The state of a plugin, as `ctr plugins ls` has it: `ok`, `skip` or `error`; `None` when there is no such plugin.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub fn plugin(&self, kind: &str, name: &str) -> Result<Option<String>> {
        let listed = String::from_utf8(run(self.host.ctr().args(["plugins", "ls"]))?)?;
        let mut rows = listed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = rows.find(|row| row.first() == Some(&kind) && row.get(1) == Some(&name));
        Ok(row.and_then(|row| row.last().map(|&state| state.to_owned())))
    }
}
