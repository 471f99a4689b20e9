//! `hermes node supervise`: what a pod of the DaemonSet does.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use hermes_snapshotter::control::FailureClass;
use hermes_snapshotter::install::root::Root;
use hermes_snapshotter::install::supervise::{self, Membership, SuperviseError, Supervision, Supervisor};
use hermes_snapshotter::install::uninstall::Removal;
use hermes_snapshotter::install::{self, Run, Settings};

use super::super::setup::{check_node_arguments, show};
use super::super::{StateArgs, ending};
use crate::output::failure;

/// Arguments of `hermes node supervise`.
#[derive(Debug, Args)]
pub(super) struct SuperviseArgs {
    /// The folder where the host's root is mounted.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    #[command(flatten)]
    state: StateArgs,
    /// Who runs the daemon on the host: systemd, keeper, or auto for systemd where it runs.
    #[arg(long, value_name = "WHO", default_value = "auto")]
    supervisor: Supervisor,
    /// What makes containerd read its configuration, for the host's sh; it is left to somebody else when empty.
    #[arg(long, value_name = "COMMAND", default_value = "systemctl restart containerd.service")]
    containerd_restart: String,
    /// containerd's configuration on the host.
    #[arg(long, value_name = "PATH", default_value = install::CONTAINERD_CONFIG)]
    containerd_config: PathBuf,
    /// The containerd program to ask, as a path for this command; the host's own when absent.
    #[arg(long, value_name = "PATH")]
    containerd: Option<PathBuf>,
    /// The socket on which containerd finds the daemon.
    #[arg(long, value_name = "PATH", default_value = install::SNAPSHOTTER_SOCKET)]
    socket: PathBuf,
    /// Where the program goes on the host.
    #[arg(long, value_name = "PATH", default_value = install::BINARY)]
    binary: PathBuf,
    /// Have Kubernetes use Hermes only for runtimes whose `snapshotter` is hermes.
    #[arg(long)]
    no_set_default: bool,
    /// The name of the node in the cluster.
    #[arg(long, value_name = "NAME", required_unless_present = "remove")]
    node_name: Option<String>,
    /// The address by which other nodes, probes and scrapers reach the host.
    #[arg(long, value_name = "IP", required_unless_present = "remove")]
    node_ip: Option<IpAddr>,
    /// The port for other nodes.
    #[arg(long, value_name = "PORT", default_value_t = 4001)]
    swarm_port: u16,
    /// The port of /metrics, /healthz and /readyz.
    #[arg(long, value_name = "PORT", default_value_t = 9465)]
    metrics_port: u16,
    /// The swarm that the node belongs to.
    #[arg(long, value_name = "NAME", default_value = "default")]
    cluster: String,
    /// The zone (rack, availability zone) of the node.
    #[arg(long, value_name = "NAME", default_value = "")]
    zone: String,
    /// A controller, as HOST:PORT, looked up here and not on the host. May be given more than once.
    #[arg(long = "controller", value_name = "HOST:PORT", required_unless_present = "remove")]
    controllers: Vec<String>,
    /// The file (PEM) with the roots by which the controller is believed; copied to the host when it changes.
    #[arg(long, value_name = "FILE", required_unless_present = "remove")]
    roots: Option<PathBuf>,
    /// The file with this pod's token for the controller; copied to the host when it changes.
    #[arg(long, value_name = "FILE", required_unless_present = "remove")]
    token: Option<PathBuf>,
    /// Take Hermes off the host instead, and then wait to be ended.
    #[arg(long)]
    remove: bool,
    /// With --remove: how long containers that use lazy trees are waited for, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, requires = "remove")]
    drain: u64,
    /// With --remove: remove the store as well.
    #[arg(long, requires = "remove")]
    purge: bool,
    /// Further arguments of `hermes node`, after two hyphens.
    #[arg(last = true, value_name = "NODE ARGUMENT")]
    node_arguments: Vec<String>,
}

/// Keeps the daemon on the host, or takes it off, until this process is told to end.
pub(super) async fn run(args: SuperviseArgs) -> anyhow::Result<()> {
    let ending = ending()?;
    let opened = Root::new(&args.root);
    let root =
        opened.map_err(|error| failure(FailureClass::Usage, format!("--root {}: {error}", args.root.display())))?;
    if args.remove {
        let removal = Removal {
            root,
            state: args.state.state,
            drain: Some(Duration::from_secs(args.drain)),
            purge: args.purge,
            restart_containerd: false,
        };
        let report = tokio::select! {
            () = ending.cancelled() => return Ok(()),
            report = supervise::remove(&removal, &args.containerd_restart) => report.map_err(classed)?,
        };
        show(&report, false)?;
        println!("Hermes is off this host; this pod can go");
        ending.cancelled().await;
        return Ok(());
    }
    let supervision = supervision(args, root)?;
    supervise::supervise(supervision, ending).await.map_err(classed)
}

fn supervision(args: SuperviseArgs, root: Root) -> anyhow::Result<Supervision> {
    check_node_arguments(&args.node_arguments)?;
    // clap has seen to it that they are there.
    let given = "is not given";
    let membership = Membership {
        node: args.node_name.context(given)?,
        address: args.node_ip.context(given)?,
        swarm_port: args.swarm_port,
        metrics_port: args.metrics_port,
        cluster: args.cluster,
        zone: args.zone,
        controllers: args.controllers,
        roots: args.roots.context(given)?,
        token: args.token.context(given)?,
    };
    let settings = Settings {
        containerd_config: args.containerd_config,
        binary: args.binary,
        state: args.state.state,
        socket: args.socket,
        cri_default: !args.no_set_default,
        capabilities: Vec::new(),
        systemd: true,
        node_arguments: args.node_arguments,
    };
    let run = Run {
        root,
        containerd: args.containerd,
        source: std::env::current_exe().context("find this program's own file")?,
        start: true,
        restart_containerd: false,
    };
    let (supervisor, restart_containerd) = (args.supervisor, args.containerd_restart);
    Ok(Supervision { settings, run, supervisor, membership, restart_containerd })
}

fn classed(error: SuperviseError) -> anyhow::Error {
    let class = match &error {
        SuperviseError::Install(error) => error.class(),
        SuperviseError::Controller { .. } => FailureClass::Unreachable,
        SuperviseError::NoSystemd => FailureClass::Usage,
        SuperviseError::Io { .. }
        | SuperviseError::Foreign { .. }
        | SuperviseError::State(_)
        | SuperviseError::Detached(_) => FailureClass::Local,
    };
    failure(class, error.to_string())
}
