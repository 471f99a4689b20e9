//! Keeping a daemon on a host, from a pod: `hermes node supervise`.
//!
//! ```text
//!  pod: token (kubelet renews it), roots, the Service's address
//!        |  every few seconds
//!        v
//!  host: <state>/controller/{token,api-roots.pem}      read by the daemon at each join
//!        program, unit, containerd's configuration      `install`, again when an address has changed
//!        the service: systemd's, or a keeper that is started outside of the pod (`detached`)
//! ```
//!
//! The daemon is no process of the pod, because the files of running containers would be gone for good with the pod that serves
//! them. So nothing happens when the pod is replaced or ends, and nothing when it is away for long: the daemon renews its
//! certificate without a token. A new pod brings its own program, and then the daemon is exchanged as by `hermes node upgrade`.
//!
//! **containerd** is restarted when its configuration has changed. That this is due is written down before the configuration is
//! changed and taken back when it is done, or when containerd is seen to have started later ([`due`]); so a crash in between
//! costs a restart, and never leaves containerd without Hermes.
//!
//! What a crash leaves is what an install leaves; the next pod goes on from there.

mod credentials;
mod detached;
mod due;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio_util::sync::CancellationToken;

use super::uninstall::{Removal, uninstall};
use super::unit::UNIT_NAME;
use super::{InstallError, Report, Run, Settings, install, root};
use super::{root::Root, systemctl};
use crate::control::{self, Answer, Request};
use crate::state_version::{self, StateVersionError, StateVersions};
use credentials::Credentials;
use detached::DetachedError;
use due::Due;

/// How often everything on the host is looked at. The kubelet renews a token long before it ends.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// How often the controller's address is looked up, in looks: thousands of pods ask the cluster's DNS.
const RESOLVE_LOOKS: u32 = 18;
/// How long a command that restarts containerd may take.
const RESTART_TIMEOUT: Duration = Duration::from_secs(180);
/// How long the daemon may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Who runs the daemon on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Supervisor {
    /// systemd where it runs, else a keeper.
    #[default]
    Auto,
    /// systemd, which has to run there.
    Systemd,
    /// A keeper that is started from here, outside of this pod.
    Keeper,
}

impl std::str::FromStr for Supervisor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "systemd" => Ok(Self::Systemd),
            "keeper" => Ok(Self::Keeper),
            _ => Err("give auto, systemd or keeper".to_owned()),
        }
    }
}

/// How the daemon reaches its controller, and as whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// The name of the node in the cluster.
    pub node: String,
    /// The address by which others reach the host.
    pub address: IpAddr,
    /// The port for other nodes.
    pub swarm_port: u16,
    /// The port of metrics and probes.
    pub metrics_port: u16,
    /// The swarm.
    pub cluster: String,
    /// The zone; none when empty.
    pub zone: String,
    /// Controllers, as `HOST:PORT`; names are resolved here, because the host does not know the cluster's.
    pub controllers: Vec<String>,
    /// The file with the controller's roots, in this process' world.
    pub roots: PathBuf,
    /// The file with the token, in this process' world.
    pub token: PathBuf,
}

/// How a host is kept.
#[derive(Debug, Clone)]
pub struct Supervision {
    /// How the host is set up; the arguments of the daemon are completed, and whether systemd runs it is found out.
    pub settings: Settings,
    /// The host, and the program to put there. containerd is restarted by `restart_containerd` here alone.
    pub run: Run,
    /// Who runs the daemon.
    pub supervisor: Supervisor,
    /// What the daemon is told of the cluster.
    pub membership: Membership,
    /// The command, for the host's `sh`, that makes containerd read its configuration; nobody does when empty.
    pub restart_containerd: String,
}

/// A host that cannot be kept.
#[derive(Debug, Error)]
pub enum SuperviseError {
    /// Setting it up.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// A file.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The program does not run there.
    #[error(
        "this program does not run on the host: {reason}; the host needs glibc 2.34 or newer, or a build for its own"
    )]
    Foreign {
        /// What it says.
        reason: String,
    },
    /// The controller's address.
    #[error(
        "cannot find the controller {name}: {reason}; is its Service there, and does this pod know the cluster's names?"
    )]
    Controller {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// systemd was asked for.
    #[error(
        "the host does not run systemd; use --supervisor keeper, and have its own init start `hermes keeper` before containerd"
    )]
    NoSystemd,
    /// The keeper.
    #[error(transparent)]
    Detached(#[from] DetachedError),
    /// The state folder is of a version that this program does not know.
    #[error(transparent)]
    State(#[from] StateVersionError),
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> SuperviseError {
    let path = path.to_owned();
    move |source| SuperviseError::Io { what, path, source }
}

/// Keeps the host until `ending` is cancelled, and leaves everything as it is then.
///
/// # Errors
/// When the host cannot be set up. What goes wrong later is logged, and tried again.
pub async fn supervise(mut this: Supervision, ending: CancellationToken) -> Result<(), SuperviseError> {
    let root = this.run.root.clone();
    this.settings.systemd = match this.supervisor {
        Supervisor::Auto => root.runs_systemd(),
        Supervisor::Systemd if !root.runs_systemd() => return Err(SuperviseError::NoSystemd),
        Supervisor::Systemd => true,
        Supervisor::Keeper => false,
    };
    let credentials = Credentials::new(&root, &this.settings.state, &this.membership);
    credentials.refresh()?;
    let extra = std::mem::take(&mut this.settings.node_arguments);
    let mut addresses = resolve(&this.membership.controllers).await?;
    this.settings.node_arguments = arguments(&this.membership, &this.settings.state, &addresses, &extra);
    set_up(&this).await?;
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut until_resolved = RESOLVE_LOOKS;
    loop {
        tokio::select! {
            () = ending.cancelled() => return Ok(()),
            _ = ticks.tick() => {}
        }
        if let Err(error) = credentials.refresh() {
            tracing::error!(%error, "the daemon cannot be given what it joins with");
        }
        until_resolved -= 1;
        if until_resolved == 0 {
            until_resolved = RESOLVE_LOOKS;
            follow_controllers(&mut this, &mut addresses, &extra).await;
        }
        if let Err(error) = keep_running(&this).await {
            tracing::error!(%error, "the daemon does not run; it is started again");
        }
        if let Err(error) = settle_containerd(&this).await {
            tracing::error!(%error, "containerd cannot be restarted");
        }
    }
}

/// Tells the daemon of controllers that have other addresses now, as a Service that was made anew has. While their names are not
/// known, the old ones stay.
async fn follow_controllers(this: &mut Supervision, addresses: &mut Vec<String>, extra: &[String]) {
    let now = match resolve(&this.membership.controllers).await {
        Ok(now) if now != *addresses => now,
        Ok(_) => return,
        Err(error) => return tracing::debug!(%error, "the controller's address is not looked up"),
    };
    tracing::info!(?now, "the controller has another address");
    this.settings.node_arguments = arguments(&this.membership, &this.settings.state, &now, extra);
    match set_up(this).await {
        Ok(()) => *addresses = now,
        Err(error) => tracing::error!(%error, "the daemon cannot be told the controller's new address"),
    }
}

/// Takes Hermes off the host, and has containerd read its configuration.
///
/// # Errors
/// When containers use lazy trees after the time that they were given, or something cannot be put back.
pub async fn remove(removal: &Removal, restart: &str) -> Result<Report, SuperviseError> {
    let due = Due::new(&removal.root);
    let was_due = due.is_due();
    due.begin()?;
    // First what can be done at once, so that containerd gives no new container a lazy tree while the others are waited for.
    match uninstall(&Removal { drain: Some(Duration::ZERO), ..removal.clone() }).await {
        Ok(mut report) => {
            if !report.done.is_empty() || was_due {
                report.done.extend(reread(removal, restart, &due).await?);
            }
            due.end()?;
            Ok(report)
        }
        Err(InstallError::NotDrained { users, .. }) => {
            tracing::info!(?users, "containers use lazy trees; they are waited for");
            let restarted = reread(removal, restart, &due).await?;
            let mut report = uninstall(removal).await?;
            report.done.extend(restarted);
            Ok(report)
        }
        Err(error) => Err(error.into()),
    }
}

/// Has containerd read its configuration, or says that somebody has to.
async fn reread(removal: &Removal, restart: &str, due: &Due) -> Result<Option<String>, SuperviseError> {
    if restart.is_empty() {
        tracing::warn!("restart containerd, so that it reads its configuration; containers keep running");
        return Ok(None);
    }
    restart_containerd(&removal.root, restart).await?;
    due.end()?;
    Ok(Some("restarted containerd".to_owned()))
}

/// The daemon's arguments: what the cluster says, and then what somebody has added.
fn arguments(membership: &Membership, state: &Path, controllers: &[String], extra: &[String]) -> Vec<String> {
    let folder = state.join(credentials::FOLDER);
    let at = |port| std::net::SocketAddr::new(membership.address, port).to_string();
    let mut all = vec![
        "--listen".to_owned(),
        at(membership.swarm_port),
        "--metrics-listen".to_owned(),
        at(membership.metrics_port),
        "--cluster".to_owned(),
        membership.cluster.clone(),
        "--node-name".to_owned(),
        membership.node.clone(),
        "--controller-ca".to_owned(),
        folder.join(credentials::ROOTS).display().to_string(),
        "--controller-token".to_owned(),
        folder.join(credentials::TOKEN).display().to_string(),
    ];
    if !membership.zone.is_empty() {
        all.extend(["--zone".to_owned(), membership.zone.clone()]);
    }
    all.extend(controllers.iter().flat_map(|address| ["--controller".to_owned(), address.clone()]));
    all.extend(extra.iter().cloned());
    all
}

/// The addresses of `controllers`, in an order that is always the same.
async fn resolve(controllers: &[String]) -> Result<Vec<String>, SuperviseError> {
    let mut found = Vec::new();
    for name in controllers {
        let failed = |reason: String| SuperviseError::Controller { name: name.clone(), reason };
        let addresses = tokio::net::lookup_host(name).await.map_err(|error| failed(error.to_string()))?;
        let before = found.len();
        found.extend(addresses.map(|address| address.to_string()));
        if found.len() == before {
            return Err(failed("it has no address".to_owned()));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// Installs, exchanges a daemon that runs another program or other arguments, and has containerd restarted.
async fn set_up(this: &Supervision) -> Result<(), SuperviseError> {
    let root = &this.run.root;
    runs_there(root, &this.run.source, &this.settings.binary).await?;
    let state = root.at(&this.settings.state);
    let found = state_version::read(&state)?;
    if !StateVersions::OURS.knows(found) {
        return Err(StateVersionError::Unknown { state, found }.into());
    }
    let due = Due::new(root);
    let was_due = due.is_due();
    due.begin()?;
    let report = install(&this.settings, &this.run).await?;
    for line in report.done.iter().chain(&report.notes) {
        tracing::info!("{line}");
    }
    let has_just_started = keep_running(this).await?;
    if (report.daemon_is_old || was_due) && !has_just_started {
        exchange(this).await?;
    }
    if !report.containerd_is_old && !was_due {
        due.end()?;
    }
    settle_containerd(this).await
}

/// Whether the host's loader can start the program; found out before anything of the host is changed.
async fn runs_there(root: &Root, source: &Path, binary: &Path) -> Result<(), SuperviseError> {
    if root.is_own() {
        return Ok(());
    }
    let trial = root.at(binary).with_extension("trial");
    if let Some(folder) = trial.parent() {
        std::fs::create_dir_all(folder).map_err(io_error("make", folder))?;
    }
    std::fs::copy(source, &trial).map_err(io_error("write", &trial))?;
    let mut command = root.command(&binary.with_extension("trial"));
    command.arg("--version");
    let said = root::run(command, root::PRINT_TIMEOUT).await;
    std::fs::remove_file(&trial).map_err(io_error("remove", &trial))?;
    said.map(drop).map_err(|error| SuperviseError::Foreign { reason: error.to_string() })
}

/// Sees to it that the daemon's supervisor runs. True when it did not.
async fn keep_running(this: &Supervision) -> Result<bool, SuperviseError> {
    let root = &this.run.root;
    if !this.settings.systemd {
        return Ok(detached::keep(root, &this.settings).await?);
    }
    if systemctl(root, &["is-active", "--quiet", UNIT_NAME]).await.is_ok() {
        return Ok(false);
    }
    systemctl(root, &["start", UNIT_NAME]).await?;
    tracing::info!("started the service");
    Ok(true)
}

/// Has another daemon take over from the one that runs; readers wait a moment.
async fn exchange(this: &Supervision) -> Result<(), SuperviseError> {
    if this.settings.systemd {
        systemctl(&this.run.root, &["restart", UNIT_NAME]).await?;
        tracing::info!("restarted the service; containers do not notice");
        return Ok(());
    }
    Ok(detached::exchange(&this.run.root, &this.settings).await?)
}

/// Restarts containerd if that is due.
async fn settle_containerd(this: &Supervision) -> Result<(), SuperviseError> {
    let due = Due::new(&this.run.root);
    if !due.is_due() {
        return Ok(());
    }
    if due.containerd_has_started_since() {
        tracing::info!("containerd was restarted and has read its configuration");
        return due.end();
    }
    if this.restart_containerd.is_empty() {
        tracing::warn!("containerd has not read its configuration yet: restart it; containers keep running");
        return Ok(());
    }
    restart_containerd(&this.run.root, &this.restart_containerd).await?;
    tracing::info!("restarted containerd; containers keep running");
    due.end()
}

/// Runs somebody's command on the host.
async fn restart_containerd(root: &Root, command: &str) -> Result<(), SuperviseError> {
    let mut shell = root.command(Path::new("/bin/sh"));
    shell.args(["-c", command]);
    root::run(shell, RESTART_TIMEOUT).await?;
    Ok(())
}

/// The version and process id of the daemon that answers on `state`, a path of this process' world.
async fn daemon(state: &Path) -> Option<(String, u32)> {
    let asked = control::ask(state, &Request::Status, |_| ());
    match tokio::time::timeout(ANSWER_TIMEOUT, asked).await {
        Ok(Ok(Answer::Status(status))) => Some((status.version, status.pid)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemon_is_told_of_the_cluster() {
        let membership = Membership {
            node: "node-1".to_owned(),
            address: "fd00::7".parse().expect("an address"),
            swarm_port: 4001,
            metrics_port: 9465,
            cluster: "default".to_owned(),
            zone: String::new(),
            controllers: vec!["controller:7443".to_owned()],
            roots: "/r".into(),
            token: "/t".into(),
        };
        let all = arguments(&membership, Path::new("/s"), &["10.0.0.1:7443".to_owned()], &["--plain".to_owned()]);
        let text = all.join(" ");
        assert!(text.starts_with("--listen [fd00::7]:4001 --metrics-listen [fd00::7]:9465 "), "{text}");
        assert!(text.contains("--controller-token /s/controller/token"), "{text}");
        assert!(text.ends_with("--controller 10.0.0.1:7443 --plain") && !text.contains("--zone"), "{text}");
    }

    #[tokio::test]
    async fn addresses_are_found_and_their_order_is_stable() {
        let controllers = ["127.0.0.2:2", "127.0.0.1:1", "127.0.0.2:2"].map(str::to_owned);
        assert_eq!(resolve(&controllers).await.expect("found"), ["127.0.0.1:1", "127.0.0.2:2"]);
        let unknown = resolve(&["no-such-name.invalid:1".to_owned()]).await.expect_err("unknown");
        assert!(unknown.to_string().contains("no-such-name.invalid:1"), "{unknown}");
    }
}
