//! `hermes node`.

use std::path::PathBuf;

use clap::Args;
use hermes_snapshotter::config::NodeConfig;
use hermes_snapshotter::mounts::erofs::Backing;
use hermes_snapshotter::node::Node;
use hermes_snapshotter::status::Way;
use tokio::signal::unix::{SignalKind, signal};

use super::StateArgs;
use crate::output::failure;

/// Arguments of `hermes node`.
#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
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
    /// A folder of indexes. May be given more than once.
    #[arg(long = "index", value_name = "DIR")]
    index_folders: Vec<PathBuf>,
    /// A key whose index statements are accepted, beside the node's own. May be given more than once.
    #[arg(long = "trust", value_name = "KEY")]
    trusted_keys: Vec<String>,
    /// Most bytes that the store may hold.
    #[arg(long, value_name = "BYTES")]
    budget: Option<u64>,
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
}

/// Runs the daemon until it is told to end, or nothing is mounted any more.
pub(crate) async fn run(args: NodeArgs) -> anyhow::Result<()> {
    let config = NodeConfig {
        state: std::path::absolute(&args.state.state)?,
        listen: args.listen,
        peers: args.peers,
        cluster: args.cluster,
        index_folders: args.index_folders,
        trusted_keys: args.trusted_keys,
        store_budget_bytes: args.budget,
        read_deadline_ms: args.read_deadline_ms,
        way: args.way,
        erofs_backing: args.erofs_backing,
        exit_when_unused: args.exit_when_unused,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let node = Node::start(config).await.map_err(|error| failure(error.class(), error.to_string()))?;
    let ended = tokio::select! {
        ended = node.serve() => ended,
        _ = tokio::signal::ctrl_c() => Ok(()),
        _ = terminate.recv() => Ok(()),
    };
    node.stop().await;
    ended.map_err(|error| failure(error.class(), error.to_string()))
}
