//! The protocols of a node, put together and configured for one data centre.

use std::sync::Arc;
use std::time::Duration;

use libp2p::Transport;
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::swarm::{NetworkBehaviour, Swarm};
use libp2p::{PeerId, StreamProtocol, identify, kad, noise, ping, swarm, tcp, yamux};

use crate::admission::Admission;
use crate::admission::upgrade::Upgrade;
use crate::config::{ClusterId, NodeConfig};
use crate::error::NodeError;
use crate::fresh_ports::FreshPorts;
use crate::record_store::ProviderStore;

/// Most connections that are still shaking hands, each way. A node that joins 1,000 others meets them in batches.
const PENDING_MAX: u32 = 64;
/// How often a connection without traffic is checked. A dead host is noticed within this and the time below.
const PING_EVERY: Duration = Duration::from_secs(15);
/// How long a ping may take.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Everything that the swarm speaks.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    pub(crate) limits: connection_limits::Behaviour,
    pub(crate) ping: ping::Behaviour,
    pub(crate) identify: identify::Behaviour,
    pub(crate) kad: kad::Behaviour<ProviderStore>,
    pub(crate) streams: libp2p_stream::Behaviour,
}

/// The protocol name of `what` within `cluster`.
pub(crate) fn protocol_name(cluster: &ClusterId, what: &str) -> StreamProtocol {
    let name = format!("/hermes/{cluster}/{what}/1");
    // The only rule of libp2p is a leading slash.
    StreamProtocol::try_from_owned(name).expect("the name starts with a slash")
}

/// A swarm that does not listen or dial yet, and lets in whom `admission` lets in.
pub(crate) fn build(
    config: &NodeConfig,
    key: Keypair,
    admission: Arc<Admission>,
) -> Result<Swarm<Behaviour>, NodeError> {
    let local = key.public().to_peer_id();
    let noise = noise::Config::new(&key).map_err(|error| NodeError::Transport { problem: error.to_string() })?;
    let transport = FreshPorts::new(tcp::tokio::Transport::new(tcp::Config::default()))
        .upgrade(Version::V1Lazy)
        .authenticate(Upgrade::new(noise, admission))
        .multiplex(yamux::Config::default())
        .timeout(config.transport.connect_timeout)
        .boxed();
    let settings = swarm::Config::with_tokio_executor().with_idle_connection_timeout(config.transport.idle_timeout);
    Ok(Swarm::new(transport, behaviour(config, &key, local), local, settings))
}

fn behaviour(config: &NodeConfig, key: &Keypair, local: PeerId) -> Behaviour {
    let limits = ConnectionLimits::default()
        .with_max_pending_incoming(Some(PENDING_MAX))
        .with_max_pending_outgoing(Some(PENDING_MAX))
        .with_max_established(Some(config.transport.connections_max))
        .with_max_established_per_peer(Some(config.transport.connections_per_peer_max));
    // Only the addresses that this node announces are told; what others tell goes to our own address book.
    let identify = identify::Config::new(format!("/hermes/{}/1", config.cluster), key.public())
        .with_agent_version(concat!("hermes/", env!("CARGO_PKG_VERSION")).to_owned())
        .with_push_listen_addr_updates(true)
        .with_hide_listen_addrs(true)
        .with_cache_size(0);
    let ping = ping::Config::new().with_interval(PING_EVERY).with_timeout(PING_TIMEOUT);
    Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        ping: ping::Behaviour::new(ping),
        identify: identify::Behaviour::new(identify),
        kad: kademlia(config, local),
        streams: libp2p_stream::Behaviour::new(),
    }
}

fn kademlia(config: &NodeConfig, local: PeerId) -> kad::Behaviour<ProviderStore> {
    let discovery = &config.discovery;
    let mut settings = kad::Config::new(protocol_name(&config.cluster, "kad"));
    settings
        .set_query_timeout(discovery.query_timeout)
        .set_substreams_timeout(discovery.request_timeout)
        .set_provider_record_ttl(Some(discovery.provider_ttl))
        // `publish::Schedule` does it instead, layer by layer.
        .set_provider_publication_interval(None)
        // There are no values in this DHT.
        .set_publication_interval(None)
        .set_replication_interval(None)
        .set_caching(kad::Caching::Disabled)
        // What others want to store here is shown to the owner task first.
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        // The owner task refreshes the table instead, when there is anybody in it.
        .set_periodic_bootstrap_interval(None);
    let store =
        ProviderStore::new(local, discovery.provider_ttl, discovery.records_len_max_bytes, discovery.provided_max);
    let mut kad = kad::Behaviour::with_config(local, store, settings);
    // Without this, nodes stay clients until an external address is confirmed, and routing tables stay empty.
    kad.set_mode(Some(kad::Mode::Server));
    kad
}
