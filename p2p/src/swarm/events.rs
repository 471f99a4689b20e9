//! What the swarm tells its owner task.

use std::net::IpAddr;
use std::time::Instant;

use libp2p::core::ConnectedPoint;
use libp2p::kad::store::RecordStore;
use libp2p::kad::{self, GetProvidersOk, InboundRequest, QueryResult};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::{ConnectionId, DialError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, identify, ping};

use super::commands::dial_error;
use super::{Event, Link, Owner, Query, REANNOUNCE_SPREAD, UNANSWERED_PINGS_MAX};
use crate::address::{socket_of, usable};
use crate::error::NodeError;

impl Owner {
    pub(super) fn on_swarm_event(&mut self, event: SwarmEvent<Event>) {
        match event {
            SwarmEvent::Behaviour(Event::Kad(event)) => self.on_kad(event),
            SwarmEvent::Behaviour(Event::Identify(identify::Event::Received { connection_id, peer_id, info })) => {
                self.on_identified(connection_id, peer_id, &info.listen_addrs);
            }
            SwarmEvent::Behaviour(Event::Ping(event)) => self.on_ping(&event),
            SwarmEvent::Behaviour(_) => {}
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, num_established, .. } => {
                self.on_established(peer_id, connection_id, &endpoint, num_established.get());
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, num_established, .. } => {
                self.links.remove(&connection_id);
                if num_established == 0 {
                    self.on_lost(peer_id);
                }
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                self.on_dial_failed(connection_id, peer_id, error);
            }
            SwarmEvent::NewListenAddr { address, .. } => self.on_listening(address),
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.shared.listen.write().retain(|known| *known != address);
                self.swarm.remove_external_address(&address);
            }
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                tracing::error!(?addresses, ?reason, "listener has closed; other nodes cannot connect any more");
                self.shared.listen.write().retain(|known| !addresses.contains(known));
            }
            SwarmEvent::ListenerError { error, .. } => tracing::warn!(%error, "cannot accept a connection"),
            SwarmEvent::IncomingConnectionError { error, .. } => tracing::debug!(%error, "inbound connection failed"),
            _ => {}
        }
    }

    fn on_established(&mut self, peer: PeerId, id: ConnectionId, endpoint: &ConnectedPoint, count: u32) {
        let remote = socket_of(endpoint.get_remote_address()).map(|socket| socket.ip());
        self.links.insert(id, Link { peer, remote, unanswered: 0 });
        let waiting = self.connects.remove(&id).map(|(_, reply)| reply);
        let waiting = waiting.into_iter().chain(self.reaches.remove(&peer).unwrap_or_default());
        let is_banned = self.bans.contains_key(&peer);
        for reply in waiting {
            // A caller that has gone needs no answer.
            let _ = reply.send(if is_banned { Err(NodeError::Banned { peer }) } else { Ok(peer) });
        }
        if is_banned {
            match endpoint {
                ConnectedPoint::Dialer { .. } => drop(self.swarm.close_connection(id)),
                ConnectedPoint::Listener { .. } => self.shared.shun(peer),
            }
            return;
        }
        if let ConnectedPoint::Dialer { address, .. } = endpoint
            && let Some(socket) = socket_of(address)
        {
            self.book.add(peer, crate::address::multiaddr_of(socket));
        }
        self.seeds.connected(id, peer);
        if count > 1 {
            return;
        }
        tracing::debug!(%peer, "peer is up");
        if self.shared.up(peer) {
            // What was announced while this node was alone reached nobody.
            self.schedule.restart(Instant::now(), REANNOUNCE_SPREAD, rand::random);
        }
    }

    fn on_ping(&mut self, event: &ping::Event) {
        let Some(link) = self.links.get_mut(&event.connection) else { return };
        match &event.result {
            Ok(_) | Err(ping::Failure::Unsupported) => link.unanswered = 0,
            Err(error) => {
                link.unanswered += 1;
                if link.unanswered >= UNANSWERED_PINGS_MAX {
                    tracing::info!(peer = %event.peer, %error, "peer does not answer; its connection is closed");
                    self.swarm.close_connection(event.connection);
                }
            }
        }
    }

    fn on_lost(&mut self, peer: PeerId) {
        self.shared.down(&peer);
        tracing::debug!(%peer, "peer is down");
        self.seeds.lost(&peer, Instant::now(), rand::random());
    }

    fn on_dial_failed(&mut self, id: ConnectionId, peer: Option<PeerId>, error: DialError) {
        let own = matches!(error, DialError::LocalPeerId { .. });
        tracing::debug!(?peer, %error, "dial failed");
        self.seeds.failed(id, own, Instant::now(), rand::random());
        if let Some((address, reply)) = self.connects.remove(&id) {
            let _ = reply.send(Err(dial_error(address.to_string(), error)));
        } else if let Some(peer) = peer
            && !self.swarm.is_connected(&peer)
        {
            self.unreached(peer, error);
        }
    }

    /// Tells others where this node is, unless the configuration says which addresses to tell.
    pub(super) fn on_listening(&mut self, address: Multiaddr) {
        let mut listen = self.shared.listen.write();
        if !listen.contains(&address) {
            listen.push(address);
        }
        let announced = announced(&listen, &self.config.announce);
        drop(listen);
        let old: Vec<Multiaddr> = self.swarm.external_addresses().cloned().collect();
        for address in old.iter().filter(|address| !announced.contains(address)) {
            self.swarm.remove_external_address(address);
        }
        for address in announced.iter().filter(|address| !old.contains(address)) {
            self.swarm.add_external_address(address.clone());
        }
        self.shared.announced.send_replace(announced);
    }

    /// A peer says where it is: Kademlia does not learn that by itself.
    fn on_identified(&mut self, connection: ConnectionId, peer: PeerId, claimed: &[Multiaddr]) {
        if self.bans.contains_key(&peer) {
            return;
        }
        let remote = self.links.get(&connection).and_then(|link| link.remote);
        for address in usable(claimed, remote) {
            self.book.add(peer, address.clone());
            self.swarm.behaviour_mut().kad.add_address(&peer, address);
        }
    }

    fn on_kad(&mut self, event: kad::Event) {
        match event {
            // Kademlia has checked that the provider is the sender.
            kad::Event::InboundRequest { request: InboundRequest::AddProvider { record: Some(record) } }
                if !self.bans.contains_key(&record.provider) =>
            {
                // A key that is no layer: whoever sends that needs no answer.
                let _ = self.swarm.behaviour_mut().kad.store_mut().add_provider(record);
            }
            kad::Event::OutboundQueryProgressed { id, result, step, .. } => self.on_query(id, result, step.last),
            kad::Event::RoutingUpdated { peer, addresses, .. } if !self.bans.contains_key(&peer) => {
                for address in addresses.iter() {
                    self.book.add(peer, address.clone());
                }
            }
            _ => {}
        }
    }

    fn on_query(&mut self, id: kad::QueryId, result: QueryResult, last: bool) {
        let Some(query) = self.queries.get(&id).copied() else { return };
        let now = Instant::now();
        match (query, result) {
            (Query::Find(layer), QueryResult::GetProviders(result)) => {
                if let Ok(GetProvidersOk::FoundProviders { providers, .. }) = result {
                    let local = *self.swarm.local_peer_id();
                    let holders: Vec<PeerId> =
                        providers.into_iter().filter(|peer| *peer != local && !self.bans.contains_key(peer)).collect();
                    // Kademlia knows where they are only while the query lives.
                    for holder in &holders {
                        self.dial(*holder);
                    }
                    if self.lookups.found(layer, holders)
                        && let Some(mut query) = self.swarm.behaviour_mut().kad.query_mut(&id)
                    {
                        query.finish();
                    }
                }
                if last {
                    self.queries.remove(&id);
                    self.lookups.finish(layer, now);
                }
            }
            (Query::Publish(layer), QueryResult::StartProviding(result)) => {
                self.queries.remove(&id);
                self.publications -= 1;
                self.schedule.finished(layer, result.is_ok(), now, rand::random());
                if !self.schedule.contains(layer) {
                    // Withdrawn while it was on its way.
                    self.swarm.behaviour_mut().kad.stop_providing(&super::key_of(layer));
                }
            }
            _ => {}
        }
    }
}

/// The addresses to tell others: the configured ones with the port of the first listener, else all that are not
/// loopback, else all.
fn announced(listen: &[Multiaddr], configured: &[IpAddr]) -> Vec<Multiaddr> {
    let sockets: Vec<_> = listen.iter().filter_map(socket_of).collect();
    if let Some(first) = sockets.first()
        && !configured.is_empty()
    {
        let at = |ip: &IpAddr| Multiaddr::from(*ip).with(Protocol::Tcp(first.port()));
        return configured.iter().map(at).collect();
    }
    let far: Vec<Multiaddr> =
        sockets.iter().filter(|socket| !socket.ip().is_loopback()).copied().map(crate::address::multiaddr_of).collect();
    if far.is_empty() { sockets.into_iter().map(crate::address::multiaddr_of).collect() } else { far }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_announced_only_when_there_is_nothing_else() {
        let address = |text: &str| text.parse::<Multiaddr>().expect("a multiaddr");
        let (near, far) = (address("/ip4/127.0.0.1/tcp/7"), address("/ip4/10.0.0.1/tcp/7"));
        let both = [near.clone(), far.clone()];
        assert_eq!(announced(&both, &[]), [far]);
        assert_eq!(announced(&both[..1], &[]), [near]);
        let configured = ["192.0.2.1".parse().expect("an address")];
        assert_eq!(announced(&both, &configured), [address("/ip4/192.0.2.1/tcp/7")]);
    }
}
