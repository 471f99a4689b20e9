//! What can be set, within which bounds, and why the defaults are what they are.
//!
//! The defaults are for one data centre: round trips of a millisecond, so that what takes seconds is dead.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use libp2p::Multiaddr;
use thiserror::Error;

use crate::address::PeerAddress;
use crate::admission::certificate::Zone;
use crate::admission::issuer::Issuer;
use crate::members::MembersConfig;

/// A configuration that contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// The cluster id is no DNS label.
    #[error("'{text}' is no cluster id; use 1 to 63 lower-case letters, digits and inner hyphens")]
    Cluster {
        /// What was given.
        text: String,
    },
    /// Nothing to listen on.
    #[error("no listen address is given; name one such as /ip4/0.0.0.0/tcp/4100")]
    NoListenAddress,
    /// An address that this node cannot listen on.
    #[error("cannot listen on {address}: only /ip4/../tcp/.. and /ip6/../tcp/.. are supported")]
    ListenAddress {
        /// The address.
        address: Multiaddr,
    },
    /// Everybody on the network could talk with this node, and nobody has said that they may.
    #[error(
        "listening on {address} would let everybody there read from this node: give --join-secret with a file that all nodes of the cluster have, listen on loopback, or say --open-swarm if everybody may"
    )]
    Open {
        /// The address.
        address: Multiaddr,
    },
    /// A number outside of its bounds.
    #[error("{field} is {value}, but must be {expected}")]
    OutOfBounds {
        /// The field.
        field: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
}

/// The name of a cluster. It stands in every protocol name, so nodes of two clusters never talk by accident.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ClusterId(String);

impl ClusterId {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterId {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let whole = (1..=63).contains(&text.len()) && text.bytes().all(inner);
        if !whole || text.starts_with('-') || text.ends_with('-') {
            return Err(ConfigError::Cluster { text: text.to_owned() });
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Everything that a node needs to start.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// The cluster whose nodes this one talks to.
    pub cluster: ClusterId,
    /// File of the node's key. Made at the first start.
    pub identity_path: PathBuf,
    /// Addresses to listen on, `/ip4/../tcp/..` or `/ip6/../tcp/..`. Port 0 takes any free port.
    pub listen: Vec<Multiaddr>,
    /// Addresses of this host to tell others, with the port of the first listener. Empty: all that the listeners have,
    /// without loopback unless there is nothing else. Name one where a host has bridges that others cannot reach.
    pub announce: Vec<IpAddr>,
    /// The zone (rack, availability zone) of this node; empty where there are none.
    pub zone: Zone,
    /// Issues this node's certificates and says whose are believed. Without one everybody may talk, which needs
    /// [`Self::open`] or loopback.
    pub issuer: Option<Arc<dyn Issuer>>,
    /// Everybody may talk, also when this node listens beyond loopback. Means nothing with an issuer.
    pub open: bool,
    /// The member list.
    pub members: MembersConfig,
    /// Peers to start from. Names are resolved at every attempt; this node may be among them.
    pub peers: Vec<PeerAddress>,
    /// Connections.
    pub transport: Transport,
    /// The DHT.
    pub discovery: Discovery,
    /// What others may take from this node.
    pub upload: UploadLimits,
    /// What this node takes from others at once.
    pub download: DownloadLimits,
}

impl NodeConfig {
    /// The defaults, for a node of `cluster` with its key at `identity_path`, listening on `listen`.
    pub fn new(cluster: ClusterId, identity_path: PathBuf, listen: Multiaddr) -> Self {
        Self {
            cluster,
            identity_path,
            listen: vec![listen],
            announce: Vec::new(),
            zone: Zone::default(),
            issuer: None,
            open: false,
            members: MembersConfig::default(),
            peers: Vec::new(),
            transport: Transport::default(),
            discovery: Discovery::default(),
            upload: UploadLimits::default(),
            download: DownloadLimits::default(),
        }
    }

    /// Checks every bound.
    ///
    /// # Errors
    /// Names the first field that is out of bounds.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.listen.is_empty() {
            return Err(ConfigError::NoListenAddress);
        }
        for address in &self.listen {
            use libp2p::multiaddr::Protocol;
            let parts: Vec<Protocol<'_>> = address.iter().collect();
            if !matches!(parts.as_slice(), [Protocol::Ip4(_) | Protocol::Ip6(_), Protocol::Tcp(_)]) {
                return Err(ConfigError::ListenAddress { address: address.clone() });
            }
            let loopback = match parts.first() {
                Some(Protocol::Ip4(ip)) => ip.is_loopback(),
                Some(Protocol::Ip6(ip)) => ip.is_loopback(),
                _ => false,
            };
            if self.issuer.is_none() && !self.open && !loopback {
                return Err(ConfigError::Open { address: address.clone() });
            }
        }
        let members = &self.members;
        at_least("compare_every", members.compare_every, Duration::from_millis(10), "at least 10 ms")?;
        at_least("suspect_for", members.suspect_for, Duration::from_millis(100), "at least 100 ms")?;
        self.transport.validate()?;
        self.discovery.validate()?;
        self.upload.validate()?;
        self.download.validate()
    }
}

fn at_least<T: PartialOrd + fmt::Debug>(
    field: &'static str,
    value: T,
    least: T,
    expected: &'static str,
) -> Result<(), ConfigError> {
    if value >= least {
        return Ok(());
    }
    Err(ConfigError::OutOfBounds { field, value: format!("{value:?}"), expected })
}

/// Connections to other nodes.
#[derive(Debug, Clone)]
pub struct Transport {
    /// Time for TCP, noise and yamux together. Two seconds are a thousand round trips.
    pub connect_timeout: Duration,
    /// How long a connection without streams stays open. A node is idle between two pod starts, and a new connection
    /// starts with a handshake and a small window; so at least 600 s.
    pub idle_timeout: Duration,
    /// Most connections, in and out. Each costs about 180 KB of noise buffers, so 256 are 45 MB at worst.
    pub connections_max: u32,
    /// Most connections to one peer. Two nodes that dial each other at once make two.
    pub connections_per_peer_max: u32,
}

impl Default for Transport {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            idle_timeout: Duration::from_secs(900),
            connections_max: 256,
            connections_per_peer_max: 4,
        }
    }
}

impl Transport {
    fn validate(&self) -> Result<(), ConfigError> {
        at_least("connect_timeout", self.connect_timeout, Duration::from_millis(100), "at least 100 ms")?;
        at_least("idle_timeout", self.idle_timeout, Duration::from_secs(600), "at least 600 s")?;
        at_least("connections_max", self.connections_max, 8, "at least 8")?;
        at_least("connections_per_peer_max", self.connections_per_peer_max, 2, "at least 2")
    }
}

/// The DHT, which finds holders of a layer.
#[derive(Debug, Clone)]
pub struct Discovery {
    /// How long others remember that this node has a layer. Short, because a node that is gone cannot take it back.
    pub provider_ttl: Duration,
    /// How often this node says so again, give or take a quarter. A third of the time above survives two losses.
    pub republish_every: Duration,
    /// Time for one whole lookup or publication.
    pub query_timeout: Duration,
    /// Time for one question to one peer.
    pub request_timeout: Duration,
    /// A lookup ends when it has found this many holders.
    pub holders_enough: usize,
    /// How long holders found are good for. Policy asks for every image; a second is an age while nodes start.
    pub found_ttl: Duration,
    /// How long "nobody has it" is good for. Short, because a seed may be ready any moment.
    pub missing_ttl: Duration,
    /// Memory for provider records of others, in bytes. 16 MiB are about 80,000 records.
    pub records_len_max_bytes: usize,
    /// How often records past their time are swept.
    pub sweep_every: Duration,
    /// Most layers that this node may announce.
    pub provided_max: usize,
}

impl Default for Discovery {
    fn default() -> Self {
        Self {
            provider_ttl: Duration::from_secs(15 * 60),
            republish_every: Duration::from_secs(5 * 60),
            query_timeout: Duration::from_secs(3),
            request_timeout: Duration::from_secs(2),
            holders_enough: 8,
            found_ttl: Duration::from_secs(5),
            missing_ttl: Duration::from_millis(500),
            records_len_max_bytes: 16 << 20,
            sweep_every: Duration::from_secs(60),
            provided_max: 16_384,
        }
    }
}

impl Discovery {
    fn validate(&self) -> Result<(), ConfigError> {
        at_least("republish_every", self.republish_every, Duration::from_secs(1), "at least 1 s")?;
        let twice = self.republish_every * 2;
        at_least("provider_ttl", self.provider_ttl, twice, "at least twice republish_every")?;
        at_least("query_timeout", self.query_timeout, Duration::from_millis(100), "at least 100 ms")?;
        at_least("request_timeout", self.request_timeout, Duration::from_millis(100), "at least 100 ms")?;
        at_least("holders_enough", self.holders_enough, 1, "at least 1")?;
        at_least("records_len_max_bytes", self.records_len_max_bytes, 64 << 10, "at least 64 KiB")?;
        at_least("sweep_every", self.sweep_every, Duration::from_secs(1), "at least 1 s")?;
        at_least("provided_max", self.provided_max, 1, "at least 1")
    }
}

/// What others may take from this node.
#[derive(Debug, Clone)]
pub struct UploadLimits {
    /// Most inbound streams of one peer. Twice what a peer of this version opens.
    pub streams_per_peer_max: usize,
    /// Most inbound streams. One costs about 20 KiB while it is idle.
    pub streams_max: usize,
    /// Most transfers to one peer at once.
    pub transfers_per_peer_max: usize,
    /// Most transfers at once. One holds up to two batches of 256 KiB and, when it compresses, 1 MiB of state.
    pub transfers_max: usize,
    /// Most *prefetch* transfers at once; the rest is kept for demand.
    pub prefetch_transfers_max: usize,
    /// Most claims of one peer that wait for chunks to come.
    pub claims_per_peer_max: usize,
    /// Most claims that wait for chunks to come. One costs a few KiB, and holds no transfer while it waits.
    pub claims_max: usize,
    /// How long a claim lasts. What was not answered for by then is lacking; its asker has long turned to somebody else.
    pub claim_timeout: Duration,
    /// Bytes per second, if limited.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Requests per second of one peer, with bursts of two seconds' worth.
    pub requests_per_second_per_peer: u32,
    /// Most streams on which this node pushes news of its progress, one for each layer and peer: 32 partners were 3 for each of ten
    /// layers (docs/decisions/0018).
    pub watchers_max: usize,
    /// How long a peer may take to send the rest of a request, or to accept a batch.
    pub stall_timeout: Duration,
    /// How long a stream may be silent between requests.
    pub stream_idle_timeout: Duration,
}

impl Default for UploadLimits {
    fn default() -> Self {
        Self {
            streams_per_peer_max: 80,
            streams_max: 1024,
            transfers_per_peer_max: 8,
            transfers_max: 64,
            prefetch_transfers_max: 48,
            claims_per_peer_max: 64,
            claims_max: 1024,
            claim_timeout: Duration::from_secs(30),
            bytes_per_second: None,
            requests_per_second_per_peer: 500,
            watchers_max: 128,
            stall_timeout: Duration::from_secs(10),
            stream_idle_timeout: Duration::from_secs(600),
        }
    }
}

impl UploadLimits {
    fn validate(&self) -> Result<(), ConfigError> {
        at_least("streams_per_peer_max", self.streams_per_peer_max, 1, "at least 1")?;
        at_least("streams_max", self.streams_max, 1, "at least 1")?;
        at_least("transfers_per_peer_max", self.transfers_per_peer_max, 1, "at least 1")?;
        at_least("transfers_max", self.transfers_max, 1, "at least 1")?;
        let prefetch = self.prefetch_transfers_max;
        at_least("transfers_max", self.transfers_max, prefetch, "at least prefetch_transfers_max")?;
        at_least("claims_per_peer_max", self.claims_per_peer_max, 1, "at least 1")?;
        at_least("claims_max", self.claims_max, 1, "at least 1")?;
        at_least("claim_timeout", self.claim_timeout, Duration::from_millis(100), "at least 100 ms")?;
        at_least("requests_per_second_per_peer", self.requests_per_second_per_peer, 1, "at least 1")?;
        at_least("stall_timeout", self.stall_timeout, Duration::from_millis(10), "at least 10 ms")?;
        at_least("stream_idle_timeout", self.stream_idle_timeout, self.stall_timeout, "at least stall_timeout")
    }
}

/// What this node takes from others at once.
#[derive(Debug, Clone)]
pub struct DownloadLimits {
    /// Most streams to one peer for what is fetched. Enough to keep a peer busy while a chunk is checked.
    pub streams_per_peer_max: usize,
    /// Most of them for prefetch, as the policy has it (`hermes_policy::limits::Limits::peer`); the rest is kept for demand.
    pub prefetch_streams_per_peer_max: usize,
    /// Most streams to one peer on which it tells what it gets, one for each layer. They last for minutes, so they are none of the
    /// above.
    pub watches_per_peer_max: usize,
    /// Most peers with pooled streams; the one that was used longest ago goes first.
    pub pooled_peers_max: usize,
    /// Whether to ask for compressed chunks. Pays below about 4 Gbit/s.
    pub compression: bool,
    /// Time to connect and open a stream.
    pub open_timeout: Duration,
    /// Time to connect to a peer that is asked for chunks: a reader waits, and another holder or the registry is quicker
    /// than a dial that takes longer than this. The dial itself goes on, so that the next ask may find the peer connected.
    pub dial_timeout: Duration,
    /// How long a peer may take for the next frame.
    pub stall_timeout: Duration,
    /// How long a peer may hold this node off with PENDING since it last answered for a chunk.
    pub pending_max: Duration,
    /// Pooled streams unused for this long are closed rather than used, well before the other end does so.
    pub stream_idle_timeout: Duration,
    /// Longest artifact accepted, in bytes. A table of contents of a million files has about 100 MB.
    pub artifact_len_max_bytes: u64,
    /// Memory for artifacts that are on their way, of all peers, in bytes.
    pub artifacts_len_max_bytes: u64,
}

impl Default for DownloadLimits {
    fn default() -> Self {
        Self {
            streams_per_peer_max: 8,
            prefetch_streams_per_peer_max: 6,
            watches_per_peer_max: 32,
            pooled_peers_max: 256,
            compression: true,
            open_timeout: Duration::from_secs(5),
            dial_timeout: Duration::from_millis(250),
            stall_timeout: Duration::from_secs(10),
            pending_max: Duration::from_secs(5),
            stream_idle_timeout: Duration::from_secs(300),
            artifact_len_max_bytes: 256 << 20,
            artifacts_len_max_bytes: 512 << 20,
        }
    }
}

impl DownloadLimits {
    fn validate(&self) -> Result<(), ConfigError> {
        let prefetch = self.prefetch_streams_per_peer_max;
        at_least("prefetch_streams_per_peer_max", prefetch, 1, "at least 1")?;
        at_least("streams_per_peer_max", self.streams_per_peer_max, prefetch + 1, "more than the prefetch streams")?;
        at_least("watches_per_peer_max", self.watches_per_peer_max, 1, "at least 1")?;
        at_least("pooled_peers_max", self.pooled_peers_max, 1, "at least 1")?;
        at_least("open_timeout", self.open_timeout, Duration::from_millis(100), "at least 100 ms")?;
        at_least("dial_timeout", self.dial_timeout, Duration::from_millis(10), "at least 10 ms")?;
        at_least("pending_max", self.pending_max, Duration::from_millis(100), "at least 100 ms")?;
        at_least("stall_timeout", self.stall_timeout, Duration::from_millis(10), "at least 10 ms")?;
        let most = self.artifact_len_max_bytes;
        at_least("artifacts_len_max_bytes", self.artifacts_len_max_bytes, most, "at least artifact_len_max_bytes")?;
        if self.artifacts_len_max_bytes > 1 << 40 {
            let value = self.artifacts_len_max_bytes.to_string();
            return Err(ConfigError::OutOfBounds {
                field: "artifacts_len_max_bytes",
                value,
                expected: "at most 1 TiB",
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NodeConfig {
        let listen = "/ip4/127.0.0.1/tcp/0".parse().expect("a multiaddr");
        NodeConfig::new("test".parse().expect("a cluster id"), PathBuf::from("node.key"), listen)
    }

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(config().validate(), Ok(()));
    }

    #[test]
    fn a_node_beyond_loopback_is_closed_or_open_on_purpose() {
        let listening = |text: &str, open: bool| {
            let mut config = config();
            config.listen = vec![text.parse().expect("a multiaddr")];
            config.open = open;
            config.validate()
        };
        for address in ["/ip4/0.0.0.0/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip6/::/tcp/1"] {
            let error = listening(address, false).expect_err("refused");
            assert!(error.to_string().contains("--join-secret") && error.to_string().contains("--open-swarm"));
            assert_eq!(listening(address, true), Ok(()));
        }
        assert_eq!(listening("/ip6/::1/tcp/0", false), Ok(()));
    }

    #[test]
    fn cluster_ids_are_dns_labels() {
        for good in ["a", "prod-1", &"x".repeat(63)] {
            assert!(good.parse::<ClusterId>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a/b", "a.b", &"x".repeat(64)] {
            assert!(bad.parse::<ClusterId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn contradictions_are_named() {
        let field = |change: fn(&mut NodeConfig)| {
            let mut config = config();
            change(&mut config);
            match config.validate() {
                Err(ConfigError::OutOfBounds { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(field(|c| c.transport.idle_timeout = Duration::from_secs(10)), "idle_timeout");
        assert_eq!(field(|c| c.discovery.provider_ttl = Duration::from_secs(400)), "provider_ttl");
        assert_eq!(field(|c| c.upload.prefetch_transfers_max = 1000), "transfers_max");
        assert_eq!(field(|c| c.download.streams_per_peer_max = 6), "streams_per_peer_max");
        assert_eq!(field(|c| c.download.artifacts_len_max_bytes = u64::MAX), "artifacts_len_max_bytes");
        let mut none = config();
        none.listen.clear();
        assert_eq!(none.validate(), Err(ConfigError::NoListenAddress));
        let mut udp = config();
        udp.listen = vec!["/ip4/127.0.0.1/udp/1".parse().expect("a multiaddr")];
        assert!(matches!(udp.validate(), Err(ConfigError::ListenAddress { .. })));
    }
}
