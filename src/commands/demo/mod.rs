//! `hermes demo`: what Hermes does, shown on a real image.
//!
//! A real program in a real image behind a slow link is started five ways: after a full download and unpack; cold from
//! the registry, with nothing known of it; cold from the registry and cold from the first node, with what that first
//! start has read; and again on a node that has what it needs. Everything that runs is the
//! product itself: this command only starts registries, nodes and containers, and reads the clock. All of it lives
//! below one temporary folder and ends with the command, however that ends.

mod image;
mod picture;
mod pull;
mod service;

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use hermes_registry::{Counters, Options, Registry};
use hermes_snapshotter::control::FailureClass;
use hermes_snapshotter::index_folder::IndexFolder;
use hermes_snapshotter::node::keys;

use self::picture::{Report, Start};
use self::service::{Service, StartConfig};
use super::ImageArgs;
use super::child::{ChildMount, ChildNode};
use crate::output::failure;

/// How long one layer may take over the emulated link.
const LAYER_TIMEOUT: Duration = Duration::from_secs(3600);

/// How long the first start may take to be over: the recorder's own limit and some more (docs/profiles.md).
const SETTLE_TIMEOUT: Duration = Duration::from_secs(150);
/// How often it is asked for.
const SETTLE_POLL: Duration = Duration::from_millis(500);

/// Arguments of `hermes demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// The image: a registry reference or oci:PATH[:TAG]. Made from packages on the spot when absent.
    #[arg(long, env = "IMAGE", value_name = "IMAGE")]
    image: Option<String>,
    /// Speed of the emulated link to the registry, in megabits per second.
    #[arg(long, value_name = "MBIT", default_value = "200")]
    bandwidth_mbit: NonZeroU64,
    /// Round trip of the emulated link, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 20)]
    latency_ms: u64,
    /// The port that the program answers HTTP on; the first that the image exposes when absent.
    #[arg(long)]
    port: Option<u16>,
    /// How long each start may take until the program answers, in seconds.
    #[arg(long, value_name = "S", default_value_t = 300)]
    timeout_s: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// What all starts share.
struct Stage {
    config: StartConfig,
    config_len_bytes: u64,
    port: u16,
    timeout: Duration,
    registry: hermes_registry::Handle,
    reference: String,
    index: PathBuf,
    trusted: String,
    work: PathBuf,
    json: bool,
}

impl Stage {
    fn say(&self, text: &str) {
        if !self.json {
            eprintln!("{text}");
        }
    }

    /// A new folder below the demo's own.
    fn folder(&self, name: &str) -> anyhow::Result<PathBuf> {
        let folder = self.work.join(name);
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }
}

/// Runs the demo.
pub(crate) async fn run(args: DemoArgs) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(failure(FailureClass::Denied, "the demo mounts images and starts a container; run it with sudo"));
    }
    let work = tempfile::Builder::new().prefix("hermes-demo-").tempdir()?;
    let layout = image::layout(args.image.as_deref(), work.path(), !args.json).await?;
    let bandwidth = args.bandwidth_mbit.saturating_mul(MEGA);
    let options = Options {
        bandwidth_bits_per_second: Some(bandwidth),
        latency: Duration::from_millis(args.latency_ms),
        ..Options::default()
    };
    let registry =
        Registry::open(&layout.path, options).map_err(|error| failure(FailureClass::NotFound, error.to_string()))?;
    let registry = registry.start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;

    // The index is built where the registry is near, as a controller would.
    let local = ImageArgs { image: format!("oci:{}", layout.path.display()), platform: None, plain_http: false };
    let (origin, image) = super::index::resolve(&local).await?;
    let key = keys::load_or_create(&work.path().join("index-key"))?;
    let index = work.path().join("indexes");
    let building = Instant::now();
    let (built, index_bytes) = super::index::build_into(&origin, &image, &IndexFolder::new(&index), &key).await?;
    let index_build_s = building.elapsed().as_secs_f64();

    let config = StartConfig::of_image(super::index::config_bytes(&image)?)?;
    let port = args.port.or_else(|| config.port());
    let port = port.ok_or_else(|| failure(FailureClass::Usage, "the image exposes no port; name one with --port"))?;
    let stage = Stage {
        config,
        config_len_bytes: image.config_bytes.len() as u64,
        port,
        timeout: Duration::from_secs(args.timeout_s),
        reference: format!("{}/demo:latest", registry.address()),
        registry,
        index,
        trusted: key.public().to_string(),
        work: work.path().to_owned(),
        json: args.json,
    };
    let mut report = Report {
        image: layout.name,
        layers: image.layers.len(),
        compressed_bytes: image.layers.iter().map(|layer| layer.len_bytes).sum(),
        uncompressed_bytes: built.statement.layers.iter().map(|layer| layer.logical_len_bytes).sum(),
        link: format!("{} Mbit/s, {} ms", args.bandwidth_mbit, args.latency_ms),
        way: String::new(),
        index_build_s,
        index_bytes,
        starts: Vec::new(),
    };
    let result = all_starts(&stage, &mut report).await;
    stage.registry.shutdown().await;
    result?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", picture::render(&report));
    }
    Ok(())
}

async fn all_starts(stage: &Stage, report: &mut Report) -> anyhow::Result<()> {
    stage.say("full download and unpack ...");
    report.starts.push(full(stage).await?);
    stage.say("cold node, from the registry ...");
    let first = ChildNode::new(&stage.work, "first")?;
    report.starts.push(lazy(stage, &first, &[], "cold, from the registry").await?);
    report.way = first.status()?.images.first().map(|image| image.way.to_string()).unwrap_or_default();
    stage.say("completing the first node in the background of its program ...");
    first.complete()?;
    stage.say("waiting until its start is known ...");
    tokio::time::timeout(SETTLE_TIMEOUT, profile_of(&first, &stage.index))
        .await
        .context("the first start did not settle; `hermes profile show` says what is read")??;
    stage.say("cold node, from the registry, its start known ...");
    let second = ChildNode::new(&stage.work, "second")?;
    report.starts.push(lazy(stage, &second, &[], "cold, registry, start known").await?);
    second.stop();
    stage.say("cold node, from the first node, its start known ...");
    let third = ChildNode::new(&stage.work, "third")?;
    report.starts.push(lazy(stage, &third, &first.addresses()?, "cold, peer, start known").await?);
    stage.say("again on that node ...");
    third.unmount()?;
    report.starts.push(lazy(stage, &third, &[], "warm, same node").await?);
    third.stop();
    first.stop();
    Ok(())
}

/// Puts what the first start has read beside the image's index, where other nodes find it, as soon as the start is over.
async fn profile_of(node: &ChildNode, index: &Path) -> anyhow::Result<()> {
    while !node.export_profile(index)? {
        tokio::time::sleep(SETTLE_POLL).await;
    }
    Ok(())
}

/// What the registry was asked for since `before`: layer data alone. Each start also reads the image's configuration,
/// once, which is a blob too.
fn served(stage: &Stage, before: Counters) -> (u64, u64) {
    let now = stage.registry.counters();
    let bytes = (now.blob_bytes - before.blob_bytes).saturating_sub(stage.config_len_bytes);
    (bytes, (now.blob_requests - before.blob_requests).saturating_sub(1))
}

async fn full(stage: &Stage) -> anyhow::Result<Start> {
    let before = stage.registry.counters();
    let layers = stage.folder("pulled")?;
    let started = Instant::now();
    let folders = pull::pull_and_unpack(&stage.reference, &stage.folder("blobs")?, &layers).await?;
    let ready = started.elapsed();
    let answered = answer(stage, &folders, &stage.folder("full")?)?;
    let (registry_bytes, registry_requests) = served(stage, before);
    std::fs::remove_dir_all(&layers)?;
    Ok(Start {
        name: "full download and unpack",
        ready_s: ready.as_secs_f64(),
        answer_s: answered.duration_since(started).as_secs_f64(),
        registry_bytes,
        peer_bytes: 0,
        local_bytes: 0,
        registry_requests,
        present_percent: 100.0,
    })
}

async fn lazy(stage: &Stage, node: &ChildNode, peers: &[String], name: &'static str) -> anyhow::Result<Start> {
    let before = stage.registry.counters();
    let earlier = node.sources();
    let started = Instant::now();
    let index = Some((stage.index.as_path(), stage.trusted.as_str()));
    node.mount(&ChildMount { image: &stage.reference, index, peers, way: None })?;
    let ready = started.elapsed();
    let answered = answer(stage, &[node.dir().to_owned()], &stage.folder(&format!("{}-{}", node.name(), name.len()))?)?;
    let (registry_bytes, registry_requests) = served(stage, before);
    let sources = node.sources();
    let present_percent = node.status()?.images.first().map_or(0.0, |image| image.percent_present());
    Ok(Start {
        name,
        ready_s: ready.as_secs_f64(),
        answer_s: answered.duration_since(started).as_secs_f64(),
        registry_bytes,
        peer_bytes: sources.peer_bytes.saturating_sub(earlier.peer_bytes),
        local_bytes: sources.local_bytes.saturating_sub(earlier.local_bytes),
        registry_requests,
        present_percent,
    })
}

/// Starts the program over the folders `lower`, uppermost first, and waits for its first answer. The program is ended before this returns.
fn answer(stage: &Stage, lower: &[PathBuf], work: &Path) -> anyhow::Result<Instant> {
    tokio::task::block_in_place(|| {
        let mut service = Service::start(lower, &stage.config, work)?;
        service.wait_for_answer(stage.port, stage.timeout)
    })
}

const MEGA: NonZeroU64 = NonZeroU64::new(1_000_000).expect("not zero");
