//! The networks of a cluster with nodes: one with a bridge, where its servers and the registry are, and one for each node.
//!
//! ```text
//!   node 0 (10.88.0.11) --port0-- bridge (10.88.0.1, 10.96.0.1) --port1-- node 1 (10.88.0.12)
//!     pods 10.89.0.0/24                                                     pods 10.89.1.0/24
//! ```
//!
//! No address of the machine is used, and no route leads out. Services are not proxied: the one address that leads
//! anywhere is that of the API server, which it has itself; pods are reached at their own addresses, through their nodes.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};

use crate::command::run;
use crate::network::Network;

/// The address of the cluster's servers and of the registry.
pub const HOME: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
/// The first address of the Services' range, which pods look for the API server at.
pub const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// The port of the API server, of its Service, too.
pub const API_PORT: u16 = 443;

/// The networks.
#[derive(Debug)]
pub struct Site {
    network: Arc<Network>,
    nodes: Vec<Arc<Network>>,
}

impl Site {
    /// Networks for so many nodes.
    ///
    /// # Errors
    /// When this process is not root, or `ip` is missing.
    pub fn new(nodes: usize) -> Result<Self> {
        ensure!(nodes <= 100, "{nodes} nodes are more than there are addresses");
        let site = Self {
            network: Arc::new(Network::new()?),
            nodes: (0..nodes).map(|_| Network::new().map(Arc::new)).collect::<Result<_>>()?,
        };
        let mut home = format!(
            "link add name bridge type bridge\naddr add {HOME}/24 dev bridge\naddr add {API_SERVICE}/32 dev bridge\n\
             link set dev bridge up\n"
        );
        for (number, node) in site.nodes.iter().enumerate() {
            let path = node.path();
            writeln!(home, "link add name port{number} type veth peer name eth0 netns {path}")?;
            writeln!(home, "link set dev port{number} master bridge up")?;
            writeln!(home, "route add {} via {}", pods(number), address(number))?;
        }
        site.network.batch("ip", &home)?;
        forward(&site.network)?;
        for (number, node) in site.nodes.iter().enumerate() {
            let mut lines = format!("addr add {}/24 dev eth0\nlink set dev eth0 up\n", address(number));
            writeln!(lines, "route add default via {HOME}")?;
            for other in (0..nodes).filter(|other| *other != number) {
                writeln!(lines, "route add {} via {}", pods(other), address(other))?;
            }
            node.batch("ip", &lines)?;
            forward(node)?;
        }
        Ok(site)
    }

    /// The network of the cluster's servers.
    pub fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// The network of a node.
    pub fn node(&self, number: usize) -> &Arc<Network> {
        &self.nodes[number]
    }
}

/// The address of a node.
pub fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(HOME) + 10 + number as u32)
}

/// The addresses of a node's pods.
pub fn pods(number: usize) -> String {
    format!("10.89.{number}.0/24")
}

/// Has a network pass on what is for others.
fn forward(network: &Network) -> Result<()> {
    let script = "echo 1 >/proc/sys/net/ipv4/ip_forward";
    run(network.command("sh").args(["-c", script])).context("forward packets")?;
    Ok(())
}
