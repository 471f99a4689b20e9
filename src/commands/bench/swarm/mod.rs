//! `hermes bench swarm`: what moving chunks between nodes costs, and what being in a swarm costs.
//!
//! Nodes of one process talk over loopback. Where speed is measured, each of the two sides has a core of its own, and what
//! is compared with runs on the same two cores in the same round. The sockets that are compared with are in `raw`.

mod content;
mod cores;
mod demand;
mod many;
mod raw;
mod throughput;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use hermes_p2p::{Content, Node, NodeConfig, OpenDesk};

use super::report::{self, Line};

/// Patience of nodes that share two cores with fifty others.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Arguments of `hermes bench swarm`.
#[derive(Debug, Args)]
pub(crate) struct SwarmArgs {
    /// Rounds; the best of each figure counts, because noise only ever adds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Nodes of the swarm whose memory, idle time and lookups are measured.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(2..=200))]
    nodes: u32,
    /// Layers that the nodes of that swarm announce together.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    layers: u32,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark.
pub(super) async fn run(args: SwarmArgs) -> anyhow::Result<()> {
    // First, while the process has no memory that it has used before.
    let many = many::measure(args.nodes, args.layers).await?;
    let rounds = args.rounds;
    // It has runtimes of its own, which must not end on a thread of this one.
    let mut lines = tokio::task::spawn_blocking(move || -> anyhow::Result<Vec<Line>> {
        let cores = cores::pair()?;
        let (moved, speed) = throughput::measure(cores, rounds)?;
        Ok([moved, demand::measure(cores, rounds, speed)?].concat())
    })
    .await??;
    lines.extend(many);
    report::print("swarm", &lines, args.json)
}

/// A node that listens on loopback and keeps its key at `folder/name`.
async fn start(
    folder: &Path,
    name: &str,
    content: Arc<dyn Content>,
    change: impl FnOnce(&mut NodeConfig),
) -> anyhow::Result<Node> {
    let mut config = NodeConfig::new("bench".parse()?, folder.join(name), "/ip4/127.0.0.1/tcp/0".parse()?);
    config.transport.connect_timeout = CONNECT_TIMEOUT;
    config.download.dial_timeout = CONNECT_TIMEOUT;
    // One asker asks as quickly as it can, for many.
    config.upload.requests_per_second_per_peer = 1_000_000;
    change(&mut config);
    Ok(Node::start(config, content, Arc::new(OpenDesk)).await?)
}

/// The value below which `part` of all lie.
fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * part).round() as usize).copied().unwrap_or(f64::NAN)
}
