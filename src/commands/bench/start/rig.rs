//! Where it is measured: a node and its neighbour on links of their own, and a registry that is 20 ms away.
//!
//! ```text
//!   node 0 (measured) --1 Gbit/s-- bridge --1 Gbit/s or 200 Mbit/s-- registry (of this process)
//!   node 1 (the peer) --1 Gbit/s--+
//! ```
//!
//! Each has a network namespace; bridges are in a fourth. Nothing here needs to be undone: the whole benchmark runs in
//! namespaces of its own, which end with it.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hermes_lab::containerds::{Host, RunningContainerd};
use hermes_lab::daemon::Daemon;
use hermes_lab::guard::ScratchDir;
use hermes_lab::index::Index;
use hermes_lab::lazy_host::{self, NewContainer};
use hermes_lab::wires::{Plan, REGISTRY, Wires};
use hermes_registry::{Counters, Options, Registry};
use hermes_snapshotter::status::BySource;

use super::isolated;
use super::sample::{NODE_MBIT, Sample};
use super::soci::Soci;
use super::subject::{OLD, Subject};
use super::way::Way;
use crate::commands::bench::workload::drop_caches;
use crate::commands::probe;

/// How much later a connection is served, and a request answered, than without the distance to the registry.
const LATENCY: Duration = Duration::from_millis(20);
/// Where the registry listens.
pub(super) const REGISTRY_PORT: u16 = 5000;
/// Where nodes listen for each other.
const PEER_PORT: u16 = 7800;
/// How often the service is asked whether it answers.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How long a start may take: much longer than the slowest of them over the slowest link.
const ANSWER_MAX: Duration = Duration::from_secs(300);
/// How long a client may take, in Go's words.
const CLIENT_TIMEOUT: &str = "300s";
/// The measured node and its neighbour, by their numbers.
pub(super) const NODE: usize = 0;
const PEER: usize = 1;
const MEGA: u64 = 1_000_000;

/// Networks, registry, indexes and the neighbour.
pub(super) struct Rig {
    /// The command that nodes run.
    hermes: PathBuf,
    /// containerd, runc and the rest.
    pub(super) programs: PathBuf,
    /// What the folders of hosts are named after.
    name: String,
    /// Folder of everything.
    pub(super) work: PathBuf,
    /// Indexes alone.
    pub(super) plain: Index,
    /// The same with profiles.
    pub(super) profiled: Index,
    /// What containerd is told of registries.
    hosts: PathBuf,
    pub(super) wires: Wires,
    pub(super) registry: Registry,
    neighbour: Option<(Daemon, String)>,
    /// What SOCI needs, once it is prepared.
    pub(super) soci: Option<Soci>,
}

/// What had been sent at some moment.
#[derive(Clone, Copy)]
pub(super) struct Sent {
    registry: Counters,
    peer_bytes: u64,
}

impl Rig {
    /// Sets up the networks and the registry over the layouts in `repositories`.
    pub(super) fn new(
        work: &Path,
        hermes: PathBuf,
        programs: PathBuf,
        repositories: &Path,
        plain: Index,
    ) -> anyhow::Result<Self> {
        let rate = NODE_MBIT * MEGA;
        let wires = Wires::new(&Plan { zones: vec![2], node_rate: rate, registry_rate: rate, zone_rate: None })?;
        let registry = Registry::open(repositories, Options { latency: LATENCY, ..Options::default() })?;
        let profiled = Index { folder: work.join("profiled"), key: plain.key.clone() };
        let rig = Self {
            hermes,
            programs,
            name: isolated::name(work),
            work: work.to_owned(),
            plain,
            profiled,
            hosts: work.join("hosts"),
            wires,
            registry,
            neighbour: None,
            soci: None,
        };
        let (listener, served) = (rig.listen(REGISTRY_PORT)?, rig.registry.clone());
        tokio::spawn(async move { served.serve(listener, std::future::pending()).await });
        rig.write_hosts(REGISTRY_PORT)?;
        Ok(rig)
    }

    /// Listens in the registry's network.
    pub(super) fn listen(&self, port: u16) -> anyhow::Result<tokio::net::TcpListener> {
        let address = SocketAddr::from((REGISTRY, port));
        let listener = self.wires.registry().within(|| {
            let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        Ok(tokio::net::TcpListener::from_std(listener)?)
    }

    /// Tells containerd and its clients that what they ask for on `port` of the registry is to be had without TLS.
    pub(super) fn write_hosts(&self, port: u16) -> anyhow::Result<()> {
        let host = self.hosts.join(format!("{REGISTRY}:{port}"));
        fs::create_dir_all(&host)?;
        let server = format!("http://{REGISTRY}:{REGISTRY_PORT}");
        let text = format!("server = \"{server}\"\n[host.\"{server}\"]\ncapabilities = [\"pull\", \"resolve\"]\n");
        Ok(fs::write(host.join("hosts.toml"), text)?)
    }

    /// The folder of what containerd and its clients are told of registries.
    pub(super) fn hosts(&self) -> anyhow::Result<&str> {
        self.hosts.to_str().context("a folder whose name is no text")
    }

    /// The name of a version of an image, as containerd is told.
    pub(super) fn reference(&self, subject: &Subject, tag: &str) -> String {
        format!("{REGISTRY}:{REGISTRY_PORT}/{}:{tag}", subject.name)
    }

    /// Gives the registry's link another rate.
    pub(super) fn limit(&self, link_mbit: u64) -> anyhow::Result<()> {
        self.wires.limit_registry(link_mbit * MEGA)
    }

    /// What was sent so far.
    pub(super) fn sent(&self) -> anyhow::Result<Sent> {
        let peer_bytes = self.wires.traffic()?.from_nodes[PEER];
        Ok(Sent { registry: self.registry.counters(), peer_bytes })
    }

    /// Bytes of blobs that the registry has sent since then.
    pub(super) fn blob_bytes_since(&self, before: Sent) -> u64 {
        self.registry.counters().blob_bytes - before.registry.blob_bytes
    }

    /// Starts the neighbour and has it fetch all of the old version of each subject. It stays.
    pub(super) fn start_neighbour(&mut self, subjects: &[Subject]) -> anyhow::Result<()> {
        let listen = SocketAddr::from((self.wires.address(PEER), PEER_PORT)).to_string();
        let arguments = ["--listen", &listen, "--open-swarm", "--complete", "never"];
        let state = self.work.join("neighbour");
        let command = self.wires.node(PEER).command(&self.hermes);
        let mut daemon = Daemon::launch(command, &self.hermes, &state, &arguments)?;
        daemon.wait()?;
        for subject in subjects {
            let dir = self.work.join(format!("neighbour-{}", subject.name));
            let image = self.reference(subject, OLD);
            daemon.mount(&image, &dir, &self.plain, &["--plain-http"])?;
            let output = daemon.run(&["complete", dir.to_str().context("a folder whose name is no text")?])?;
            if !output.status.success() {
                bail!("the neighbour: {}", String::from_utf8_lossy(&output.stderr).trim());
            }
        }
        let address = daemon.status()?.listen.into_iter().next().context("the neighbour listens nowhere")?;
        self.neighbour = Some((daemon, address));
        Ok(())
    }

    /// Empties the caches of this machine, but for what is another machine's: the registry's blobs and, when `neighbour`,
    /// what the neighbour holds.
    pub(super) fn drop_caches(&self, subject: &Subject, neighbour: bool) -> anyhow::Result<()> {
        drop_caches()?;
        subject.warm()?;
        if neighbour {
            subject.warm_layers(&self.work.join("neighbour/store/layers"))?;
        }
        Ok(())
    }

    /// A containerd without Hermes.
    pub(super) fn plain_host(&self) -> anyhow::Result<Host> {
        let host = Host::with(self.programs.clone(), &self.name)?;
        fs::write(host.config(), host.default_config()?)?;
        Ok(host)
    }

    /// A client of `containerd` that asks the registry itself, and so runs in the measured node's network.
    pub(super) fn client(&self, program: &Path, containerd: &RunningContainerd<'_>) -> Command {
        let mut command = self.wires.node(NODE).command(program);
        command.arg("--address").arg(containerd.socket()).args(["--namespace", "k8s.io", "--timeout", CLIENT_TIMEOUT]);
        command
    }

    /// A node that has nothing, whose daemon is told `more`, into whose containerd Hermes is installed.
    pub(super) fn node(&self, index: &Index, more: &[&str], has_peer: bool) -> anyhow::Result<Node<'_>> {
        let host = Host::with(self.programs.clone(), &self.name)?;
        lazy_host::install(&self.hermes, &host, None)?;
        let state = ScratchDir::new("node")?;
        let mut arguments = lazy_host::arguments(&host, index, &index.key);
        arguments.extend(["--hosts-dir".to_owned(), self.hosts.display().to_string()]);
        if let Some((_, peer)) = self.neighbour.as_ref().filter(|_| has_peer) {
            let listen = SocketAddr::from((self.wires.address(NODE), PEER_PORT)).to_string();
            arguments.extend(["--listen", &listen, "--open-swarm", "--peer", peer].map(str::to_owned));
        }
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let command = self.wires.node(NODE).command(&self.hermes);
        let mut daemon = Daemon::launch(command, &self.hermes, &state.path().join("state"), &arguments)?;
        daemon.wait()?;
        Ok(Node { rig: self, daemon, host, _state: state })
    }

    /// Starts the containerd of `host` in the measured node's network.
    pub(super) fn containerd<'a>(&self, host: &'a Host) -> anyhow::Result<RunningContainerd<'a>> {
        host.start_in(self.wires.node(NODE))
    }

    /// Pulls `image` for `snapshotter`, as `ctr` and the kubelet have containerd do it.
    pub(super) fn pull(
        &self,
        containerd: &RunningContainerd<'_>,
        image: &str,
        snapshotter: &str,
    ) -> anyhow::Result<()> {
        let arguments = ["images", "pull", "--hosts-dir", self.hosts()?, "--snapshotter", snapshotter, image];
        containerd.ctr_says(&arguments).map(drop)
    }

    /// Waits until the service on `port` of the measured node answers with 200, and says when that was.
    pub(super) fn wait_for_answer(&self, port: u16) -> anyhow::Result<Instant> {
        self.wires.node(NODE).within(|| {
            let deadline = Instant::now() + ANSWER_MAX;
            while Instant::now() < deadline {
                if probe::answers_ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).unwrap_or(false) {
                    return Ok(Instant::now());
                }
                std::thread::sleep(POLL_INTERVAL);
            }
            bail!("nobody answered on port {port} within {ANSWER_MAX:?}")
        })
    }

    /// The sample of a start that began at `begun`, with what was sent since `before`.
    pub(super) fn sample(&self, subject: &Subject, way: Way, times: Times, before: Sent) -> anyhow::Result<Sample> {
        let now = self.sent()?;
        let seconds = |at: Instant| at.duration_since(times.begun).as_secs_f64();
        Ok(Sample {
            image: subject.name.clone(),
            link_mbit: 0,
            way,
            round: 0,
            ready_s: seconds(times.ready),
            started_s: seconds(times.started),
            answer_s: seconds(times.answered),
            registry_bytes: now.registry.blob_bytes - before.registry.blob_bytes,
            registry_requests: now.registry.blob_requests - before.registry.blob_requests,
            peer_bytes: now.peer_bytes - before.peer_bytes,
            unused_bytes: None,
            changed_ratio: None,
        })
    }
}

/// When what happened.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// The command was given.
    pub(super) begun: Instant,
    /// The root file system was there.
    pub(super) ready: Instant,
    /// The container was started.
    pub(super) started: Instant,
    /// The first HTTP 200, or the program's end.
    pub(super) answered: Instant,
}

/// A node with Hermes. Dropping it ends it, and nothing of it is left.
pub(super) struct Node<'a> {
    rig: &'a Rig,
    /// Its daemon.
    pub(super) daemon: Daemon,
    /// Its host, whose containerd is started by whoever needs it.
    pub(super) host: Host,
    _state: ScratchDir,
}

impl Node<'_> {
    /// Makes sure that an image was not pulled as ever.
    pub(super) fn is_lazy(&self) -> anyhow::Result<()> {
        let last = self.daemon.status()?.pulls.into_iter().next_back().context("no image was pulled")?;
        if last.decision != "lazy" {
            bail!("the image was pulled as ever: {last:?}");
        }
        Ok(())
    }

    /// Where the chunks of its images came from, and how many bytes of them came ahead and were not read.
    pub(super) fn fetched(&self) -> anyhow::Result<(BySource, Option<u64>)> {
        let (status, mut sources) = (self.daemon.status()?, BySource::default());
        status.images.iter().for_each(|image| sources.add(image.sources));
        let starts = status.images.iter().filter_map(|image| image.start.as_ref());
        let unused = starts.map(|start| start.prefetched_bytes.saturating_sub(start.used_bytes)).max();
        Ok((sources, unused))
    }

    /// Runs a command against its daemon; what it printed.
    pub(super) fn says(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.daemon.run(arguments)?;
        if !output.status.success() {
            bail!("{arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        String::from_utf8(output.stdout).context("what the daemon says is no text")
    }

    /// Pulls a version of `subject`, starts it and waits for its answer. Where its chunks had come from by then is told, too.
    pub(super) fn start(
        &self,
        containerd: &RunningContainerd<'_>,
        subject: &Subject,
        tag: &str,
        way: Way,
    ) -> anyhow::Result<(Sample, BySource)> {
        let (image, before) = (self.rig.reference(subject, tag), self.rig.sent()?);
        let begun = Instant::now();
        self.rig.pull(containerd, &image, OURS)?;
        let ready = Instant::now();
        let container = service(&image, OURS).start(containerd, "service")?;
        let started = Instant::now();
        let answered = self.rig.wait_for_answer(subject.port).with_context(|| self.daemon.log())?;
        let sample = self.rig.sample(subject, way, Times { begun, ready, started, answered }, before)?;
        let (sources, unused_bytes) = self.fetched()?;
        drop(container);
        self.is_lazy().with_context(|| self.daemon.log())?;
        Ok((Sample { unused_bytes, ..sample }, sources))
    }
}

/// Hermes, as containerd calls it.
pub(super) const OURS: &str = "hermes";
/// containerd's own snapshotter.
pub(super) const THEIRS: &str = "overlayfs";

/// The image's own program, in the network of its node.
pub(super) fn service<'a>(image: &'a str, snapshotter: &'a str) -> NewContainer<'a> {
    NewContainer { image, snapshotter, options: &["--net-host", "--null-io"], command: &[] }
}
