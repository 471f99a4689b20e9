//! `hermes bench controller`: one controller and the streams of a large cluster, over real TLS on loopback.
//!
//! The controller is a process of its own, so that its memory and processor time are its own. All nodes are tasks of this
//! one: each joins with a token, connects again with its certificate, and watches. Then one image after the other becomes
//! ready, and each node notes when it has heard of it. Both processes share the cores, so the figures are worse than
//! those of a controller that has some to itself.

mod made_up;
mod nodes;
pub(super) mod page;
mod server;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use hermes_lab::process::processor_time;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::report::{self, Line};

/// How long the cluster may take to come up.
const JOIN_MAX: Duration = Duration::from_secs(1200);
/// How long one image may take to be known everywhere before the run is given up.
const KNOWN_MAX: Duration = Duration::from_secs(120);
/// How long it is watched what the controller needs while nothing happens.
const IDLE: Duration = Duration::from_secs(5);
/// What every node is to know an image by, in seconds.
const KNOWN_SECONDS: f64 = 2.0;
/// What the controller may take, in megabytes.
const MEMORY_MB: f64 = 500.0;

/// Arguments of `hermes bench controller`.
#[derive(Debug, Args)]
pub(crate) struct ControllerArgs {
    /// Nodes, each with a stream.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    nodes: u32,
    /// Images that are ready from the start.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=5000))]
    images: u32,
    /// Images that become ready, one after the other; the slowest counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// Be the controller, with its state in this folder.
    #[arg(long, value_name = "DIR", hide = true)]
    serve: Option<std::path::PathBuf>,
    /// Serve the status page, too.
    #[arg(long, hide = true, requires = "serve")]
    page: bool,
}

/// Runs the benchmark.
pub(super) async fn run(args: ControllerArgs) -> anyhow::Result<()> {
    raise_file_limit(u64::from(args.nodes) + 1000)?;
    if let Some(folder) = &args.serve {
        return server::run(folder, args.nodes, args.images, args.page).await;
    }
    let folder = tempfile::tempdir()?;
    let mut controller = Controller::start(folder.path(), args.nodes, args.images, &[]).await?;
    let before = controller.usage()?;
    let began = Instant::now();
    let mut cluster = nodes::Cluster::start(&controller.address, folder.path(), args.nodes as usize, None);
    tokio::time::timeout(JOIN_MAX, cluster.settled()).await.context("the nodes did not all join")??;
    let (joined, up) = (began.elapsed(), controller.usage()?);
    tokio::time::sleep(IDLE).await;
    let idle = controller.usage()?;
    let mut slowest: Option<nodes::Heard> = None;
    for number in 0..args.rounds {
        let (manifest, at) = controller.publish(number).await?;
        let heard = tokio::time::timeout(KNOWN_MAX, cluster.heard(manifest, at)).await;
        let heard = heard.context("some nodes did not hear of an image")??;
        slowest = slowest.filter(|last| last.max >= heard.max).or(Some(heard));
    }
    let end = controller.usage()?;
    controller.stop().await?;
    let measured = Measured { before, up, idle, end, joined, heard: slowest.context("there is a round")? };
    report::print("controller", &measured.lines(&args), args.json)
}

/// What was measured.
struct Measured {
    /// When the controller had started.
    before: Usage,
    /// When all nodes had joined.
    up: Usage,
    /// When nothing had happened for a while.
    idle: Usage,
    end: Usage,
    joined: Duration,
    heard: nodes::Heard,
}

impl Measured {
    fn lines(&self, args: &ControllerArgs) -> Vec<Line> {
        let (nodes, rounds) = (f64::from(args.nodes), f64::from(args.rounds));
        let line = |text: &str, figure: String, against: &str, ratio: f64, reach: &'static str| Line {
            what: format!("{text}, {} nodes x {} images", args.nodes, args.images),
            figure,
            against: against.to_owned(),
            ratio,
            reach,
        };
        let seconds = |duration: Duration| duration.as_secs_f64();
        let [p50, p99, max] = [self.heard.p50, self.heard.p99, self.heard.max].map(seconds);
        let stream_kb = (self.end.resident_mb - self.before.resident_mb) * 1000.0 / nodes;
        let update_ms = (self.end.processor - self.idle.processor) * 1000.0 / rounds;
        let idle_share = (self.idle.processor - self.up.processor) / seconds(IDLE);
        let join_ms = (self.up.processor - self.before.processor) * 1000.0 / nodes;
        let known = format!("{max:.3} s (p50 {p50:.3}, p99 {p99:.3})");
        let joining = format!("{:.1} s, {join_ms:.1} ms of processor each", seconds(self.joined));
        let join_share = join_ms * nodes / 1000.0 / seconds(self.joined);
        let peak_mb = self.end.peak_mb;
        vec![
            line("an image is known by every node", known, "2 s", max / KNOWN_SECONDS, "<= 1"),
            line("memory of the controller", format!("{peak_mb:.0} MB at most"), "500 MB", peak_mb / MEMORY_MB, "<= 1"),
            line("memory for each stream", format!("{stream_kb:.1} KB"), "100 KB", stream_kb / 100.0, ""),
            line(
                "processor to tell of an image",
                format!("{update_ms:.0} ms"),
                "2 s of a core",
                update_ms / 2000.0,
                "",
            ),
            line("processor without news", format!("{:.1} %", idle_share * 100.0), "1 core", idle_share, ""),
            line("joining and all images", joining, "1 core", join_share, ""),
        ]
    }
}

/// Thousands of sockets need as many descriptors.
fn raise_file_limit(wanted: u64) -> anyhow::Result<()> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < wanted) {
        limit.current = limit.maximum;
        setrlimit(Resource::Nofile, limit)?;
    }
    match limit.current {
        Some(current) if current < wanted => {
            bail!("{wanted} open files are needed and {current} allowed; raise the limit (ulimit -n)")
        }
        _ => Ok(()),
    }
}

/// What a process has used.
#[derive(Debug, Clone, Copy)]
struct Usage {
    /// Processor seconds.
    processor: f64,
    resident_mb: f64,
    peak_mb: f64,
}

/// The controller's process.
struct Controller {
    child: Child,
    id: u32,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    address: String,
}

impl Controller {
    async fn start(folder: &Path, nodes: u32, images: u32, more: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "controller", "--serve"]).arg(folder);
        command.args(["--nodes", &nodes.to_string(), "--images", &images.to_string()]).args(more);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let id = child.id().context("the controller has ended")?;
        let commands = child.stdin.take().context("its input is a pipe")?;
        let output = child.stdout.take().context("its output is a pipe")?;
        let mut answers = BufReader::new(output).lines();
        let address = answers.next_line().await?.context("the controller has ended")?;
        Ok(Self { child, id, commands, answers, address })
    }

    /// Lets an image become ready; its manifest, and when that was, in nanoseconds since 1970.
    async fn publish(&mut self, number: u32) -> anyhow::Result<([u8; 32], u128)> {
        self.commands.write_all(format!("{number}\n").as_bytes()).await?;
        let line = self.answers.next_line().await?.context("the controller has ended")?;
        let (manifest, at) = line.split_once(' ').context("an answer has two words")?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(manifest, &mut bytes)?;
        Ok((bytes, at.parse()?))
    }

    fn usage(&self) -> anyhow::Result<Usage> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id))?;
        let mb = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).map(|kib| kib * 1.024 / 1000.0)
        };
        let (resident, peak) = (mb("VmRSS:"), mb("VmHWM:"));
        Ok(Usage {
            processor: processor_time(self.id)?.as_secs_f64(),
            resident_mb: resident.context("no VmRSS")?,
            peak_mb: peak.context("no VmHWM")?,
        })
    }

    async fn stop(self) -> anyhow::Result<()> {
        let Self { mut child, commands, .. } = self;
        // The end of its input ends it.
        drop(commands);
        child.wait().await?;
        Ok(())
    }
}
