//! A fleet: real daemons, each in a network and a mount namespace of its own, and a registry that counts.
//!
//! A [`Shape`] says how many nodes there are in which zones and how fast their links are; [`wires`] are these links.
//! Nodes mount the image of a [`rig`] and read its files at once ([`Fleet::read`]), while faults befall them. [`scenarios`]
//! do that in all the ways that are measured, and report an [`outcome`] each.
//!
//! Nothing outlives the fleet, not even when the test is killed: a daemon dies with the thread that started it, mounts
//! and networks with their last process, and the folder is swept by a [`Sweeper`].

pub mod calibration;
pub mod outcome;
pub mod readers;
pub mod rig;
pub mod scenarios;
pub use hermes_lab::wires;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hermes_image::ids::Digest;
use hermes_registry::Options;
use rustix::process::Signal;

use crate::daemon::{Daemon, HANG};
use crate::faulty::{Delivered, FaultyRegistry, Site};
use crate::guard::{ScratchDir, Sweeper, wait_for};
use crate::process::{self, processor_time};
use crate::sample::TAG;
use rig::Rig;
use wires::{REGISTRY, Wires};

/// Runs what is given after `$1`, with `$1` beside it in the same mount namespace.
const IN_NAMESPACE: &str = r#"hold=$1; shift; setsid sh -c "$hold" hold $$ </dev/null >/dev/null 2>&1 & exec "$@""#;
/// Waits until no thread of the process `$1` is left. A mount namespace that ends with its daemon is torn down by the
/// daemon's last thread *before* the kernel closes that thread's FUSE connection, and the teardown waits for reads which
/// that connection will never answer: a thread that no signal ends, and a superblock that all of the machine waits for.
const HOLD: &str = r#"while read -r _ _ state _ </proc/$1/stat && { [ "$state" != Z ] || [ "$(ls /proc/$1/task | wc -l)" -gt 1 ]; }
do sleep 0.1; done 2>/dev/null"#;

/// Where nodes listen for each other.
const PEER_PORT: u16 = 7800;
/// Where the registry listens.
const REGISTRY_PORT: u16 = 5000;

/// What a fleet is like.
#[derive(Debug, Clone)]
pub struct Shape {
    /// How many nodes there are in each zone. They are numbered through all zones, from 0.
    pub zones: Vec<usize>,
    /// Bits per second of each node's link, in each direction.
    pub node_rate: u64,
    /// Bits per second of the registry's link.
    pub registry_rate: u64,
    /// Bits per second of the link between each zone and the rest, if it has a limit.
    pub zone_rate: Option<u64>,
    /// How much later what a node or the registry sends arrives at the other, beside what the links need.
    pub registry_delay: Duration,
    /// How many nodes, from the first, every node knows from the start, by its arguments and by the file of members that
    /// all are given; with none, each is alone.
    pub known: usize,
    /// Further arguments of the daemons, by node; nodes beyond the end have none.
    pub arguments: Vec<Vec<String>>,
}

impl Default for Shape {
    /// Four nodes in one zone, with links of 400 Mbit/s; the registry has one of 40 Mbit/s, and is 5 ms away.
    fn default() -> Self {
        Self {
            zones: vec![4],
            node_rate: 400_000_000,
            registry_rate: 40_000_000,
            zone_rate: None,
            registry_delay: Duration::from_millis(5),
            known: 2,
            arguments: Vec::new(),
        }
    }
}

impl Shape {
    /// How many nodes there are.
    pub fn nodes(&self) -> usize {
        self.zones.iter().sum()
    }

    /// The links that it has.
    fn links(&self) -> wires::Plan {
        let Self { zones, node_rate, registry_rate, zone_rate, .. } = self.clone();
        wires::Plan { zones, node_rate, registry_rate, zone_rate }
    }

    /// The zone of a node.
    fn zone(&self, node: usize) -> usize {
        let mut first = 0;
        let of = self.zones.iter().position(|nodes| {
            first += nodes;
            node < first
        });
        of.unwrap_or(0)
    }

    fn daemon_arguments(&self, node: usize, wires: &Wires, secret: &Path, members: &Path) -> Vec<String> {
        let address = |node| SocketAddr::from((wires.address(node), PEER_PORT)).to_string();
        let mut arguments = vec!["--listen".to_owned(), address(node)];
        arguments.extend(["--join-secret".to_owned(), secret.display().to_string()]);
        arguments.extend(["--zone".to_owned(), format!("zone-{}", self.zone(node))]);
        if self.known == 0 {
            arguments.extend(["--cluster".to_owned(), format!("alone-{node}")]);
        }
        for other in (0..self.known.min(self.nodes())).filter(|other| *other != node) {
            arguments.extend(["--peer".to_owned(), address(other)]);
        }
        if self.known > 0 {
            arguments.extend(["--members".to_owned(), members.display().to_string()]);
        }
        arguments.extend(self.arguments.get(node).into_iter().flatten().cloned());
        arguments
    }
}

/// One node.
#[derive(Debug)]
struct Node {
    daemon: Daemon,
    /// Where it mounts the image.
    dir: PathBuf,
    /// Its processor time in microseconds when it was killed, and one more; 0 while it lives.
    killed_at_us: AtomicU64,
}

impl Node {
    fn is_alive(&self) -> bool {
        self.killed_at_us.load(Ordering::Acquire) == 0
    }
}

/// Running nodes and their registry.
#[derive(Debug)]
pub struct Fleet<'a> {
    // The order is that of the clean-up.
    nodes: Vec<Node>,
    registry: FaultyRegistry,
    wires: Wires,
    rig: &'a Rig,
    shape: Shape,
    scratch: ScratchDir,
    _sweeper: Sweeper,
}

impl<'a> Fleet<'a> {
    /// Starts a fleet, whose daemons die when the calling thread ends, and waits until all nodes answer and know
    /// another one.
    ///
    /// # Errors
    /// When a part of it does not come up.
    pub fn start(rig: &'a Rig, shape: &Shape) -> Result<Self> {
        let scratch = ScratchDir::new("fleet")?;
        let sweeper = Sweeper::watch(scratch.path())?;
        let wires = Wires::new(&shape.links())?;
        let site = Site {
            network: Some(wires.registry().clone()),
            address: SocketAddr::from((REGISTRY, REGISTRY_PORT)),
            delay: shape.registry_delay,
        };
        let registry = FaultyRegistry::at(rig.sample.layout.dir(), Options::default(), site)?;
        let mut fleet =
            Self { nodes: Vec::new(), registry, wires, rig, shape: shape.clone(), scratch, _sweeper: sweeper };
        fleet.write_secret()?;
        fleet.write_members()?;
        for number in 0..shape.nodes() {
            let node = fleet.launch(number)?;
            fleet.nodes.push(node);
        }
        fleet.nodes.iter_mut().try_for_each(|node| node.daemon.wait())?;
        if shape.known > 0 && shape.nodes() > 1 {
            fleet.wait_for_members()?;
        }
        Ok(fleet)
    }

    fn secret(&self) -> PathBuf {
        self.scratch.path().join("join-secret")
    }

    /// What the nodes of this fleet, and no other, have in common.
    fn write_secret(&self) -> Result<()> {
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(self.secret())?;
        writeln!(file, "{:032x}", rand::random::<u128>())?;
        Ok(())
    }

    fn members(&self) -> PathBuf {
        self.scratch.path().join("members.toml")
    }

    /// Where the nodes are that all know from the start.
    fn write_members(&self) -> Result<()> {
        let known = 0..self.shape.known.min(self.shape.nodes());
        let address = |node| SocketAddr::from((self.wires.address(node), PEER_PORT));
        let members = known.map(|node| format!("[[member]]\naddress = \"{}\"\n", address(node)));
        Ok(fs::write(self.members(), members.collect::<String>())?)
    }

    /// Kills the nodes that all have started from, for good, and removes the file that names them: who is there is
    /// known from now on by the members alone.
    ///
    /// # Errors
    /// When one of them has ended before.
    pub fn lose_start(&self) -> Result<()> {
        fs::remove_file(self.members())?;
        (0..self.shape.known).try_for_each(|node| self.kill(node))
    }

    fn launch(&self, number: usize) -> Result<Node> {
        let folder = self.scratch.make(format!("node-{number}"))?;
        let mut command = self.wires.node(number).command("unshare");
        command.args(["--mount", "--propagation", "private", "--", "sh", "-c", IN_NAMESPACE, "node", HOLD]);
        command.args(["setpriv", "--pdeathsig", "KILL", "--"]);
        command.arg(&self.rig.hermes);
        let arguments = self.shape.daemon_arguments(number, &self.wires, &self.secret(), &self.members());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let daemon = Daemon::launch(command, &self.rig.hermes, &folder.join("state"), &arguments)?;
        Ok(Node { daemon, dir: folder.join("image"), killed_at_us: AtomicU64::new(0) })
    }

    /// Waits until every node knows every other one.
    fn wait_for_members(&self) -> Result<()> {
        for (number, node) in self.nodes.iter().enumerate() {
            let all = || {
                let listed = node.daemon.run(&["members", "--json"]).ok()?;
                let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).ok()?;
                (listed["members"].as_array()?.len() == self.nodes.len()).then_some(())
            };
            wait_for("all members", HANG, all).with_context(|| format!("node {number}: {}", node.daemon.log()))?;
        }
        Ok(())
    }

    /// What it was started as.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// What it reads.
    pub fn rig(&self) -> &Rig {
        self.rig
    }

    /// Its registry, which can go wrong.
    pub fn registry(&self) -> &FaultyRegistry {
        &self.registry
    }

    /// Its links.
    pub fn wires(&self) -> &Wires {
        &self.wires
    }

    /// A folder that goes with the fleet.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The daemon of a node.
    pub fn daemon(&self, node: usize) -> &Daemon {
        &self.nodes[node].daemon
    }

    /// Mounts the image on these nodes.
    ///
    /// # Errors
    /// With what the first command says that fails.
    pub fn mount(&self, nodes: &[usize]) -> Result<()> {
        let image = self.registry.image(TAG);
        nodes.iter().try_for_each(|number| {
            let node = &self.nodes[*number];
            let mounted = node.daemon.mount(&image, &node.dir, &self.rig.index, &["--plain-http"]);
            mounted.with_context(|| format!("node {number}"))
        })
    }

    /// Where the image of a node is seen from here.
    pub fn root(&self, node: usize) -> PathBuf {
        let Node { daemon, dir, .. } = &self.nodes[node];
        let inside = dir.strip_prefix("/").unwrap_or(dir);
        PathBuf::from(format!("/proc/{}/root", daemon.id())).join(inside)
    }

    /// Whether a node has not been killed.
    pub fn is_alive(&self, node: usize) -> bool {
        self.nodes[node].is_alive()
    }

    /// What the registry has delivered of the image's layers after its first `skipped` answers.
    pub fn delivered(&self, skipped: usize) -> Delivered {
        let layers = self.rig.sample.image.layers.iter();
        let blobs: BTreeSet<String> = layers.map(|layer| Digest(layer.layer_id.0).to_string()).collect();
        self.registry.ledger().delivered(&blobs, skipped)
    }

    /// The processor time of all daemons and of the test with its registry and its readers, so far.
    ///
    /// # Errors
    /// When a daemon has ended by itself.
    pub fn processor_time(&self) -> Result<Duration> {
        let of_node = |node: &Node| match node.killed_at_us.load(Ordering::Acquire) {
            0 => processor_time(node.daemon.id()),
            killed_at_us => Ok(Duration::from_micros(killed_at_us - 1)),
        };
        let nodes = self.nodes.iter().map(of_node).sum::<Result<Duration>>()?;
        Ok(nodes + processor_time(std::process::id())?)
    }

    /// Unplugs a node's link.
    ///
    /// # Errors
    /// With what `ip` says.
    pub fn cut(&self, node: usize) -> Result<()> {
        self.wires.plug(node, false)
    }

    /// Plugs it in again.
    ///
    /// # Errors
    /// With what `ip` says.
    pub fn heal(&self, node: usize) -> Result<()> {
        self.wires.plug(node, true)
    }

    /// Stops a node's daemon: its connections stay, and nobody answers on them.
    ///
    /// # Errors
    /// When it has ended.
    pub fn pause(&self, node: usize) -> Result<()> {
        self.nodes[node].daemon.signal(Signal::STOP)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When it has ended.
    pub fn resume(&self, node: usize) -> Result<()> {
        self.nodes[node].daemon.signal(Signal::CONT)
    }

    /// Kills a node's daemon, for good. Reads of its image fail from now on, and do not count.
    ///
    /// # Errors
    /// When it has ended before.
    pub fn kill(&self, node: usize) -> Result<()> {
        let Node { daemon, killed_at_us, .. } = &self.nodes[node];
        let spent_us = u64::try_from(processor_time(daemon.id())?.as_micros())?;
        killed_at_us.store(spent_us + 1, Ordering::Release);
        daemon.signal(Signal::KILL)
    }
}

impl Drop for Fleet<'_> {
    /// Their mounts end with them, so nothing is lost by killing them, all at once.
    fn drop(&mut self) {
        process::kill(&self.nodes.iter().map(|node| node.daemon.id()).collect::<Vec<_>>());
    }
}
