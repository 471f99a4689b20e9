//! The swarm: joining it, and what people ask of its member list.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use hermes_p2p::PeerId;
use hermes_p2p::address::multiaddr_of;
use hermes_p2p::admission::issuer::Issuer;
use hermes_p2p::admission::join_secret::JoinSecret;
use hermes_p2p::members::provider::{MembersDns, MembersFile};

use super::{Inner, NodeError, peer_address};
use crate::config::NodeConfig;
use crate::content::NodeContent;
use crate::control::Answer;
use crate::controller::{Controller, Places};
use crate::fetch::FetchDesk;
use crate::status::MemberStatus;

/// File of the member list, below the state folder.
const MEMBERS_FILE: &str = "members";

/// Starts the node's part of the swarm.
pub(super) async fn join_swarm(
    config: &NodeConfig,
    content: Arc<NodeContent>,
    desk: Arc<FetchDesk>,
    controller: Option<&Arc<Controller>>,
) -> Result<hermes_p2p::Node, NodeError> {
    let listen = config.listen.as_deref().unwrap_or("127.0.0.1:0");
    let listen = match listen.parse::<SocketAddr>() {
        Ok(address) => multiaddr_of(address),
        Err(_) => listen.parse().map_err(|_| {
            NodeError::Address(format!("listen: '{listen}' is no address; write IP:PORT or /ip4/IP/tcp/PORT"))
        })?,
    };
    let cluster = config.cluster_id()?;
    let mut settings = hermes_p2p::NodeConfig::new(cluster.clone(), config.state.join("identity"), listen);
    settings.peers = config.peers.iter().map(|peer| peer_address("peers", peer)).collect::<Result<_, _>>()?;
    settings.zone = config.zone_name()?;
    settings.open = config.open_swarm;
    if let Some(path) = &config.join_secret {
        let secret = JoinSecret::load(path, &cluster).map_err(|error| NodeError::JoinSecret(Box::new(error)))?;
        settings.issuer = Some(Arc::new(secret));
    }
    if let Some(controller) = controller {
        settings.issuer = Some(Arc::clone(controller) as Arc<dyn Issuer>);
        settings.members.providers.push(Arc::new(Places(Arc::clone(controller))));
    }
    settings.members.state_path = Some(config.state.join(MEMBERS_FILE));
    if let Some(path) = &config.members_file {
        settings.members.providers.push(Arc::new(MembersFile::new(path.clone())));
    }
    if let Some((host, port)) = config.members_name()? {
        settings.members.providers.push(Arc::new(MembersDns::new(host, port)));
    }
    Ok(hermes_p2p::Node::start(settings, content, desk).await?)
}

impl Inner {
    /// Who the members are.
    pub(super) fn members(&self) -> Answer {
        let list = self.peers.members().borrow().clone();
        let connected: BTreeSet<PeerId> = self.peers.peers().into_iter().collect();
        let me = list.me().peer;
        let members = list.members().iter().map(|member| MemberStatus {
            peer: member.peer.to_string(),
            me: member.peer == me,
            addresses: member.addresses.iter().map(ToString::to_string).collect(),
            zone: member.zone.to_string(),
            drain: member.drain,
            full: member.full,
            suspected: member.suspected,
            connected: connected.contains(&member.peer),
            certificate_until: member.certificate_until,
        });
        Answer::Members { epoch: list.epoch(), members: members.collect() }
    }

    /// Takes the certificates of `peer` back.
    pub(super) async fn revoke_member(&self, peer: &str) -> Result<Answer, NodeError> {
        let peer: PeerId = peer.parse().map_err(|_| {
            NodeError::Address(format!("'{peer}' is no PeerId; `hermes members` lists those of the members"))
        })?;
        self.peers.revoke(peer).await?;
        Ok(Answer::Done)
    }

    /// Tells the members that this node is about to leave, or that it stays.
    pub(super) fn drain_member(&self, drain: bool) {
        let full = self.peers.members().borrow().me().full;
        self.peers.set_flags(drain, full);
    }
}
