//! `hermes node`: the daemon, and what is done to a running one. What sets a host up for it is in [`super::setup`].

mod supervise;
mod upgrade;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, Subcommand};
use hermes_origin::{ClientCertificate, HOSTS_DIR, TlsSettings};
use hermes_snapshotter::config::{
    COMPLETE_RATE_BYTES_PER_SECOND, CompleteMode, FIRST_PULL_MIN_BYTES, NodeConfig, RegistrySettings, UNUSED_IMAGES_MAX,
};
use hermes_snapshotter::control::{self, Request};
use hermes_snapshotter::mounts::erofs::Backing;
use hermes_snapshotter::node::{Node, NodeError, Supervision};
use hermes_snapshotter::snapshots::DEFAULT_SOCKET;
use hermes_snapshotter::state_version::StateVersions;
use hermes_snapshotter::status::Way;
use tokio::signal::unix::{SignalKind, signal};

use super::mount::expect_done;
use super::setup::{self, SetupCommand};
use super::{StateArgs, metrics_address};
use crate::output::failure;

/// Arguments of `hermes node`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct NodeArgs {
    #[command(subcommand)]
    command: Option<NodeCommand>,
    #[command(flatten)]
    state: StateArgs,
    /// Where peers reach this node, as host:port or a multiaddress.
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// A node that is known from the start. May be given more than once.
    #[arg(long = "peer", value_name = "ADDR")]
    peers: Vec<String>,
    /// The swarm that this node belongs to.
    #[arg(long, value_name = "NAME", default_value = "default")]
    cluster: String,
    /// The file with the secret (mode 0600, 32 characters or more) that all nodes of the cluster have. Only who has it is
    /// let in. Needed, or --open-swarm, when this node listens beyond loopback.
    #[arg(long, value_name = "FILE", conflicts_with = "open_swarm")]
    join_secret: Option<PathBuf>,
    /// Let everybody who reaches this node's port read from it.
    #[arg(long)]
    open_swarm: bool,
    /// The zone (rack, availability zone) of this node. Nodes ask within their zone first.
    #[arg(long, value_name = "NAME", default_value = "")]
    zone: String,
    /// A TOML file that lists nodes of the cluster ([[member]] with address, and peer if known); read again when it changes.
    #[arg(long = "members", value_name = "FILE")]
    members_file: Option<PathBuf>,
    /// A name whose addresses are those of the cluster's nodes, such as a headless service; resolved again and again.
    #[arg(long, value_name = "NAME:PORT")]
    members_dns: Option<String>,
    /// A controller, as HOST:PORT. It says which images are indexed, and who is a member of the swarm. May be given more than
    /// once, for replicas.
    #[arg(long = "controller", value_name = "HOST:PORT", conflicts_with_all = ["join_secret", "open_swarm"])]
    controllers: Vec<String>,
    /// The file (PEM) with the roots by which the controller is believed.
    #[arg(long, value_name = "FILE", requires = "controllers")]
    controller_ca: Option<PathBuf>,
    /// The file with the token that proves to the controller which node this is: a projected ServiceAccount token, or a join
    /// token. Read again at each join.
    #[arg(long, value_name = "FILE", requires = "controllers")]
    controller_token: Option<PathBuf>,
    /// The name of this node in the cluster.
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// A folder of indexes. May be given more than once.
    #[arg(long = "index", value_name = "DIR")]
    index_folders: Vec<PathBuf>,
    /// A key whose index statements are accepted, beside the node's own. May be given more than once.
    #[arg(long = "trust", value_name = "KEY")]
    trusted_keys: Vec<String>,
    /// The file with the secret key that this node signs indexes with, and whose indexes it accepts (mode 0600). Give all
    /// nodes of a fleet the same, so that each accepts what another has built; a key of its own when absent.
    #[arg(long, value_name = "FILE")]
    signing_key: Option<PathBuf>,
    /// When nobody has the index of an image that containerd pulls, take the pull: read all layers once, keep them, and
    /// build the index on the way, for the next nodes. The pod waits for it; if it fails, containerd pulls as ever.
    #[arg(
        long,
        value_name = "BOOL",
        default_value_t = true,
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    index_on_first_pull: bool,
    /// The smallest image whose pull is taken so, in compressed bytes of its layers.
    #[arg(long, value_name = "BYTES", default_value_t = FIRST_PULL_MIN_BYTES)]
    index_on_first_pull_min_size: u64,
    /// Most bytes that the store may hold.
    #[arg(long, value_name = "BYTES")]
    budget: Option<u64>,
    /// Fetch what nobody has read of mounted images as well: never, idle (when a start has settled, slowly, while no reader
    /// waits) or full (at once, as fast as it goes). Never evicts another image's bytes for it.
    #[arg(long, value_name = "WHEN", default_value = "idle")]
    complete: CompleteMode,
    /// Most bytes per second, uncompressed, that are fetched so; 0 for no limit.
    #[arg(long, value_name = "BYTES", default_value_t = COMPLETE_RATE_BYTES_PER_SECOND)]
    complete_rate: u64,
    /// Do not fetch what the first start of an image is likely to read, as far as the image itself tells, nor what lies
    /// around what it reads (which --complete never switches off as well).
    #[arg(long)]
    no_guess: bool,
    /// Of how many images that nothing needs any more index and layers are kept, as far as the budget lets them. Those
    /// that were used last stay.
    #[arg(long, value_name = "COUNT", default_value_t = UNUSED_IMAGES_MAX)]
    keep_images: usize,
    /// How long a read waits for a source before it fails, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 60_000)]
    read_deadline_ms: u64,
    /// Show trees this way: erofs-files, erofs-fuse or fuse-tree. The best that works when absent.
    #[arg(long)]
    way: Option<Way>,
    /// Mount EROFS through this only: files or loop-devices. Files where the kernel can, else loop devices, when absent.
    #[arg(long, value_name = "BACKING", hide = true)]
    erofs_backing: Option<Backing>,
    /// End when the last image is unmounted.
    #[arg(long)]
    exit_when_unused: bool,
    /// Answer containerd as its snapshotter, on /run/hermes/snapshotter.sock or on the socket that is given.
    #[arg(
        long,
        value_name = "PATH",
        env = "HERMES_SNAPSHOTTER_SOCKET",
        num_args = 0..=1,
        default_missing_value = DEFAULT_SOCKET,
        conflicts_with = "exit_when_unused"
    )]
    containerd_socket: Option<PathBuf>,
    /// Let containerd pull every image as ever.
    #[arg(long)]
    plain: bool,
    /// Serve /metrics, /healthz and /readyz there, as host:port or as a port on loopback.
    #[arg(long, value_name = "ADDR", value_parser = metrics_address)]
    metrics_listen: Option<SocketAddr>,
    /// Write all that the fetch policy is told and asks for into this file, anew at each start of the daemon; `hermes simulate
    /// replay` reads it.
    #[arg(long, value_name = "FILE")]
    record_decisions: Option<PathBuf>,
    #[command(flatten)]
    registries: RegistryArgs,
}

/// How registries are reached.
#[derive(Debug, Args)]
struct RegistryArgs {
    /// The folder with containerd's hosts.toml files.
    #[arg(long, value_name = "DIR", default_value = HOSTS_DIR)]
    hosts_dir: PathBuf,
    /// CAs that a registry is believed by, as HOST[:PORT]=FILE (PEM). May be given more than once.
    #[arg(long, value_name = "HOST=FILE", value_parser = host_value)]
    registry_ca: Vec<(String, String)>,
    /// The certificate that is shown to a registry, as HOST[:PORT]=FILE[,KEYFILE] (PEM). May be given more than once.
    #[arg(long, value_name = "HOST=FILE[,KEY]", value_parser = host_value)]
    registry_client_cert: Vec<(String, String)>,
    /// A folder with image pull secrets (kubernetes.io/dockerconfigjson). May be given more than once.
    #[arg(long = "pull-secrets", value_name = "DIR")]
    pull_secret_folders: Vec<PathBuf>,
    /// The kubelet's --image-credential-provider-config.
    #[arg(long, value_name = "PATH", requires = "credential_provider_bin_dir")]
    credential_provider_config: Option<PathBuf>,
    /// The kubelet's --image-credential-provider-bin-dir.
    #[arg(long, value_name = "DIR", requires = "credential_provider_config")]
    credential_provider_bin_dir: Option<PathBuf>,
    /// Docker's config.json; that of DOCKER_CONFIG or the home directory when absent.
    #[arg(long, value_name = "FILE")]
    docker_config: Option<PathBuf>,
    /// The folder with docker's credential helpers; those that PATH leads to when absent.
    #[arg(long, value_name = "DIR")]
    docker_helper_dir: Option<PathBuf>,
}

/// `HOST=VALUE`.
fn host_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((host, value)) if !host.is_empty() && !value.is_empty() => Ok((host.to_owned(), value.to_owned())),
        _ => Err("give HOST=FILE, such as registry.example:5000=/etc/ssl/team.pem".to_owned()),
    }
}

impl RegistryArgs {
    fn settings(self) -> anyhow::Result<RegistrySettings> {
        let absolute = |path: Option<PathBuf>| path.map(std::path::absolute).transpose();
        let mut tls: BTreeMap<String, TlsSettings> = BTreeMap::new();
        for (host, file) in self.registry_ca {
            tls.entry(host).or_default().ca.push(file.into());
        }
        for (host, files) in self.registry_client_cert {
            let (certificate, key) = match files.split_once(',') {
                Some((certificate, key)) => (certificate, Some(key.into())),
                None => (files.as_str(), None),
            };
            tls.entry(host).or_default().client.push(ClientCertificate { certificate: certificate.into(), key });
        }
        Ok(RegistrySettings {
            hosts_dir: self.hosts_dir,
            tls,
            pull_secret_folders: self.pull_secret_folders,
            credential_provider_config: self.credential_provider_config,
            credential_provider_bin_dir: absolute(self.credential_provider_bin_dir)?,
            docker_config: self.docker_config,
            docker_helper_dir: absolute(self.docker_helper_dir)?,
        })
    }
}

/// What is done to a host, or to a running daemon.
#[derive(Debug, Subcommand)]
enum NodeCommand {
    #[command(flatten)]
    Setup(SetupCommand),
    /// Unmount everything and end, also under a supervisor.
    Drain(DrainArgs),
    /// Replace the running daemon's program; processes that read from mounted images do not notice.
    Upgrade(upgrade::UpgradeArgs),
    /// Put the daemon on this host from a pod, and keep it there: its service, its token, its version. What a pod of the DaemonSet runs.
    Supervise(Box<supervise::SuperviseArgs>),
    /// Print, as JSON, which versions of the state folder this program can use.
    StateVersion,
}

/// Arguments of `hermes node drain`.
#[derive(Debug, Args)]
struct DrainArgs {
    #[command(flatten)]
    state: StateArgs,
}

impl NodeArgs {
    /// Whether it runs the daemon.
    pub(crate) fn is_daemon(&self) -> bool {
        self.command.is_none()
    }
}

/// Does what is asked: runs the daemon, or something to a host or a running daemon.
pub(crate) async fn run(mut args: NodeArgs) -> anyhow::Result<()> {
    match args.command.take() {
        None => serve(args).await,
        Some(NodeCommand::Setup(command)) => setup::run(command).await,
        Some(NodeCommand::Drain(drain)) => {
            let state = std::path::absolute(&drain.state.state)?;
            expect_done(control::ask(&state, &Request::Shutdown, |_| ()).await).map(drop)
        }
        Some(NodeCommand::Upgrade(upgrade)) => upgrade::run(upgrade).await,
        Some(NodeCommand::Supervise(args)) => supervise::run(*args).await,
        Some(NodeCommand::StateVersion) => {
            println!("{}", serde_json::to_string(&StateVersions::OURS)?);
            Ok(())
        }
    }
}

/// Runs the daemon until it is told to end, or nothing is mounted any more. Under a supervisor SIGTERM means to hand
/// over to the next one; SIGINT and `hermes node drain` always mean to unmount everything.
async fn serve(args: NodeArgs) -> anyhow::Result<()> {
    let classed = |error: NodeError| failure(error.class(), error.to_string());
    let supervision = Supervision::from_environment().map_err(classed)?;
    let config = NodeConfig {
        state: std::path::absolute(&args.state.state)?,
        listen: args.listen,
        peers: args.peers,
        cluster: args.cluster,
        join_secret: args.join_secret.map(std::path::absolute).transpose()?,
        open_swarm: args.open_swarm,
        zone: args.zone,
        members_file: args.members_file.map(std::path::absolute).transpose()?,
        members_dns: args.members_dns,
        controller: args.controllers,
        controller_ca: args.controller_ca.map(std::path::absolute).transpose()?,
        controller_token: args.controller_token.map(std::path::absolute).transpose()?,
        node_name: args.node_name,
        index_folders: args.index_folders,
        trusted_keys: args.trusted_keys,
        signing_key: args.signing_key.map(std::path::absolute).transpose()?,
        index_on_first_pull: args.index_on_first_pull,
        unused_images_max: args.keep_images,
        index_on_first_pull_min_bytes: args.index_on_first_pull_min_size,
        store_budget_bytes: args.budget,
        complete: args.complete,
        guess_starts: !args.no_guess,
        complete_rate_bytes_per_second: args.complete_rate,
        read_deadline_ms: args.read_deadline_ms,
        way: args.way,
        erofs_backing: args.erofs_backing,
        exit_when_unused: args.exit_when_unused,
        metrics_listen: args.metrics_listen,
        record_decisions: args.record_decisions.map(std::path::absolute).transpose()?,
        registries: args.registries.settings()?,
        snapshotter_socket: args.containerd_socket.map(std::path::absolute).transpose()?,
        plain: args.plain,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let node = Node::start(config, supervision).await.map_err(classed)?;
    let (ended, hands_over) = tokio::select! {
        ended = node.serve() => (ended, false),
        _ = tokio::signal::ctrl_c() => (Ok(()), false),
        _ = terminate.recv() => (Ok(()), node.is_supervised()),
    };
    if hands_over {
        node.hand_over().await;
    } else {
        node.stop().await;
    }
    ended.map_err(classed)
}
