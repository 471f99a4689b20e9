//! Networks of nodes: one for each node, one for the registry, and one with the bridges between them.
//!
//! ```text
//!   node 0 --port0-- zone0 --up0 / down0-- core --registry-- registry
//!   node 1 --port1-- zone0                  |
//!   node 2 --port2-- zone1 --up1 / down1----+
//! ```
//!
//! Each link has a rate in each direction (token buckets at both of its ends) and counters, which are the kernel's. All
//! addresses are in 10.77.0.0/16: the registry's is 10.77.0.1, that of the third node of the second zone 10.77.2.3.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::command::run;
use crate::network::Network;

/// The registry's address.
pub const REGISTRY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// What a token bucket holds in bytes, at least: more than the largest packet that the kernel cuts late (64 KiB).
const BURST_MIN_BYTES: u64 = 96 << 10;
/// What it holds in time: two ticks of a kernel of 250 Hz, as tc-tbf(8) asks for.
const BURSTS_PER_SECOND: u64 = 125;
/// How long a packet may wait for its turn before it is dropped.
const QUEUE_MS: u64 = 100;

/// How many nodes there are, and how fast their links are. Rates are bits per second, in each direction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// How many nodes there are in each zone. They are numbered through all zones, from 0.
    pub zones: Vec<usize>,
    /// Of each node's link.
    pub node_rate: u64,
    /// Of the registry's link.
    pub registry_rate: u64,
    /// Of the link between each zone and the rest, if it has a limit.
    pub zone_rate: Option<u64>,
}

/// A node's place in the networks.
#[derive(Debug)]
struct Port {
    network: Network,
    address: Ipv4Addr,
}

/// The networks and their links.
#[derive(Debug)]
pub struct Wires {
    bridges: Network,
    registry: Arc<Network>,
    ports: Vec<Port>,
    zones: usize,
    node_rate: u64,
}

/// What has gone over the links so far, in bytes with all headers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traffic {
    /// What the registry sent.
    pub from_registry: u64,
    /// What it was sent.
    pub to_registry: u64,
    /// What each node sent.
    pub from_nodes: Vec<u64>,
    /// What each node was sent.
    pub to_nodes: Vec<u64>,
    /// What left each zone, for others and for the registry.
    pub from_zones: Vec<u64>,
}

impl Traffic {
    /// What has gone since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        let each = |now: &[u64], before: &[u64]| now.iter().zip(before).map(|(now, before)| now - before).collect();
        Self {
            from_registry: self.from_registry - earlier.from_registry,
            to_registry: self.to_registry - earlier.to_registry,
            from_nodes: each(&self.from_nodes, &earlier.from_nodes),
            to_nodes: each(&self.to_nodes, &earlier.to_nodes),
            from_zones: each(&self.from_zones, &earlier.from_zones),
        }
    }

    /// What nodes sent to each other.
    pub fn between_nodes(&self) -> u64 {
        self.from_nodes.iter().sum::<u64>().saturating_sub(self.to_registry)
    }

    /// What nodes of one zone sent to those of another.
    pub fn between_zones(&self) -> u64 {
        self.from_zones.iter().sum::<u64>().saturating_sub(self.to_registry)
    }
}

impl Wires {
    /// Makes the networks that `plan` wants.
    ///
    /// # Errors
    /// When this process is not root, or `ip` or `tc` is missing.
    pub fn new(plan: &Plan) -> Result<Self> {
        let (bridges, registry) = (Network::new()?, Arc::new(Network::new()?));
        let mut wires =
            Self { bridges, registry, ports: Vec::new(), zones: plan.zones.len(), node_rate: plan.node_rate };
        let mut links = String::from("link add name core type bridge\nlink set dev core up\n");
        let mut rates = String::new();
        writeln!(links, "link add name registry type veth peer name eth0 netns {}", wires.registry.path())?;
        links += "link set dev registry master core up\n";
        rates += &limit("registry", plan.registry_rate);
        for (zone, count) in plan.zones.iter().enumerate() {
            writeln!(links, "link add name zone{zone} type bridge\nlink set dev zone{zone} up")?;
            writeln!(links, "link add name up{zone} type veth peer name down{zone}")?;
            writeln!(links, "link set dev up{zone} master zone{zone} up\nlink set dev down{zone} master core up")?;
            if let Some(rate) = plan.zone_rate {
                rates += &limit(&format!("up{zone}"), rate);
                rates += &limit(&format!("down{zone}"), rate);
            }
            for place in 0..*count {
                let port = Port { network: Network::new()?, address: address(zone, place)? };
                let (node, path, mac) = (wires.ports.len(), port.network.path(), hardware_address(port.address));
                writeln!(links, "link add name port{node} type veth peer name eth0 address {mac} netns {path}")?;
                writeln!(links, "link set dev port{node} master zone{zone} up")?;
                rates += &limit(&format!("port{node}"), plan.node_rate);
                wires.ports.push(port);
            }
        }
        wires.bridges.batch("ip", &links)?;
        wires.bridges.batch("tc", &rates)?;
        connect(&wires.registry, REGISTRY, plan.registry_rate)?;
        wires.ports.iter().try_for_each(|port| connect(&port.network, port.address, plan.node_rate))?;
        Ok(wires)
    }

    /// The registry's network.
    pub fn registry(&self) -> &Arc<Network> {
        &self.registry
    }

    /// The network of a node.
    pub fn node(&self, node: usize) -> &Network {
        &self.ports[node].network
    }

    /// The address of a node.
    pub fn address(&self, node: usize) -> Ipv4Addr {
        self.ports[node].address
    }

    /// Unplugs a node's link, or plugs it in again.
    ///
    /// # Errors
    /// With what `ip` says.
    pub fn plug(&self, node: usize, is_in: bool) -> Result<()> {
        self.bridges.batch("ip", &format!("link set dev port{node} {}", if is_in { "up" } else { "down" }))
    }

    /// Lets nothing through any more between the nodes of `group` and all others; both sides reach the registry.
    ///
    /// A packet for the other side is sent to the sender's own hardware address, and bridges never send a packet back
    /// to where it came from: it is lost without a word, as in a network that has come apart.
    ///
    /// # Errors
    /// With what `ip` says.
    pub fn part(&self, group: &[usize]) -> Result<()> {
        self.for_pairs_across(group, |port, other| {
            let own = hardware_address(port.address);
            format!("neigh replace {} lladdr {own} nud permanent dev eth0\n", other.address)
        })
    }

    /// Takes [`Wires::part`] back.
    ///
    /// # Errors
    /// With what `ip` says.
    pub fn join(&self, group: &[usize]) -> Result<()> {
        self.for_pairs_across(group, |_, other| format!("neigh del {} dev eth0\n", other.address))
    }

    fn for_pairs_across(&self, group: &[usize], command: impl Fn(&Port, &Port) -> String) -> Result<()> {
        for (node, port) in self.ports.iter().enumerate() {
            let is_across = |(other, _): &(usize, &Port)| group.contains(other) != group.contains(&node);
            let others = self.ports.iter().enumerate().filter(is_across);
            let commands: String = others.map(|(_, other)| command(port, other)).collect();
            port.network.batch("ip", &commands)?;
        }
        Ok(())
    }

    /// Makes a node's uploads `factor` times slower than all nodes' links are; 1 is as they were.
    ///
    /// # Errors
    /// With what `tc` says.
    pub fn slow(&self, node: usize, factor: u64) -> Result<()> {
        self.ports[node].network.batch("tc", &limit("eth0", self.node_rate / factor.max(1)))
    }

    /// Gives the registry's link another rate, in both directions.
    ///
    /// # Errors
    /// With what `tc` says.
    pub fn limit_registry(&self, rate: u64) -> Result<()> {
        self.bridges.batch("tc", &limit("registry", rate))?;
        self.registry.batch("tc", &limit("eth0", rate))
    }

    /// What the links have carried.
    ///
    /// # Errors
    /// With what `ip` says.
    pub fn traffic(&self) -> Result<Traffic> {
        let answer = run(self.bridges.command("ip").args(["-s", "-j", "link", "show"]))?;
        let links: Vec<Value> = serde_json::from_slice(&answer).context("parse the answer of ip")?;
        let bytes = |name: &str, direction: &str| {
            let link = links.iter().find(|link| link["ifname"] == name);
            link.and_then(|link| link["stats64"][direction]["bytes"].as_u64())
                .with_context(|| format!("no link {name}"))
        };
        let ports = |direction| {
            (0..self.ports.len()).map(|node| bytes(&format!("port{node}"), direction)).collect::<Result<_>>()
        };
        Ok(Traffic {
            from_registry: bytes("registry", "rx")?,
            to_registry: bytes("registry", "tx")?,
            from_nodes: ports("rx")?,
            to_nodes: ports("tx")?,
            from_zones: (0..self.zones).map(|zone| bytes(&format!("up{zone}"), "tx")).collect::<Result<_>>()?,
        })
    }
}

/// Gives the near end of a link its address and its rate.
fn connect(network: &Network, address: Ipv4Addr, rate: u64) -> Result<()> {
    network.batch("ip", &format!("addr add {address}/16 dev eth0\nlink set dev eth0 up\n"))?;
    network.batch("tc", &limit("eth0", rate))
}

/// The line for `tc` by which `device` sends so many bits per second at most.
fn limit(device: &str, rate: u64) -> String {
    let burst = (rate / 8 / BURSTS_PER_SECOND).max(BURST_MIN_BYTES);
    format!("qdisc replace dev {device} root tbf rate {rate}bit burst {burst} latency {QUEUE_MS}ms\n")
}

fn address(zone: usize, place: usize) -> Result<Ipv4Addr> {
    let part = |number: usize| u8::try_from(number + 1).context("too many zones, or nodes in a zone");
    Ok(Ipv4Addr::new(10, 77, part(zone)?, part(place)?))
}

/// One that nobody else has (IEEE 802: the second bit says that it is locally administered).
fn hardware_address(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use anyhow::ensure;

    use super::*;

    /// Long enough for a connection on a busy machine.
    const ANSWERED: Duration = Duration::from_secs(10);
    /// Longer than one takes, for those that must not come about.
    const LOST: Duration = Duration::from_millis(300);
    const PORT: u16 = 5000;
    /// Bytes that each connection is sent.
    const SENT_BYTES: usize = 1 << 20;

    fn serve(network: &Network, address: Ipv4Addr) -> Result<()> {
        let listener = network.within(|| Ok(TcpListener::bind((address, PORT))?))?;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = (&stream).write_all(&vec![7; SENT_BYTES]);
            }
        });
        Ok(())
    }

    /// How long it takes to read all; nothing when there is no connection.
    fn read(wires: &Wires, node: usize, from: Ipv4Addr, deadline: Duration) -> Result<Option<Duration>> {
        wires.node(node).within(|| {
            let begun = Instant::now();
            let Ok(mut stream) = TcpStream::connect_timeout(&SocketAddr::from((from, PORT)), deadline) else {
                return Ok(None);
            };
            stream.set_read_timeout(Some(ANSWERED))?;
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes)?;
            ensure!(bytes.len() == SENT_BYTES, "{} bytes", bytes.len());
            Ok(Some(begun.elapsed()))
        })
    }

    #[test]
    fn links_count_and_limit_and_come_apart() -> Result<()> {
        let plan =
            Plan { zones: vec![2, 1], node_rate: 800_000_000, registry_rate: 80_000_000, zone_rate: Some(800_000_000) };
        let wires = Wires::new(&plan)?;
        serve(wires.registry(), REGISTRY)?;
        (0..3).try_for_each(|node| serve(wires.node(node), wires.address(node)))?;
        let (sent, before) = (SENT_BYTES as u64, wires.traffic()?);

        let took = read(&wires, 0, REGISTRY, ANSWERED)?.context("no registry")?;
        // A second has 10 MB, of which a bucket is given at once.
        ensure!(took > Duration::from_millis(80), "{took:?}");
        let traffic = wires.traffic()?.since(&before);
        ensure!(traffic.from_registry > sent && traffic.to_nodes[0] > sent, "{traffic:?}");
        ensure!(traffic.between_nodes() < sent / 10 && traffic.between_zones() < sent / 10, "{traffic:?}");

        for (from, crosses) in [(1, false), (2, true)] {
            let before = wires.traffic()?;
            read(&wires, 0, wires.address(from), ANSWERED)?.context("no neighbour")?;
            let traffic = wires.traffic()?.since(&before);
            ensure!(traffic.from_nodes[from] > sent && traffic.between_nodes() > sent, "{traffic:?}");
            ensure!((traffic.between_zones() > sent) == crosses, "{traffic:?}");
        }

        wires.part(&[2])?;
        ensure!(read(&wires, 0, wires.address(2), LOST)?.is_none(), "the groups are not apart");
        ensure!(read(&wires, 2, wires.address(0), LOST)?.is_none(), "the groups are not apart");
        read(&wires, 0, wires.address(1), ANSWERED)?.context("the group has come apart")?;
        read(&wires, 2, REGISTRY, ANSWERED)?.context("no registry")?;
        wires.join(&[2])?;
        read(&wires, 0, wires.address(2), ANSWERED)?.context("they are still apart")?;

        wires.plug(1, false)?;
        ensure!(read(&wires, 0, wires.address(1), LOST)?.is_none(), "it is still plugged in");
        wires.plug(1, true)?;
        read(&wires, 0, wires.address(1), ANSWERED)?.context("it is not plugged in")?;

        wires.slow(1, 100)?;
        let took = read(&wires, 0, wires.address(1), ANSWERED)?.context("it does not answer")?;
        ensure!(took > Duration::from_millis(800), "{took:?} at 8 Mbit/s");
        Ok(())
    }
}
