//! What a node asks of its owner task.

use std::collections::HashSet;
use std::time::Instant;

use libp2p::swarm::DialError;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId};

use super::{BANS_MAX, Command, DIAL_WAITERS_MAX, DialReply, Owner, Query, Resolved, key_of};
use crate::address::{peer_of, reachable, socket_of};
use crate::error::NodeError;
use crate::lookup::Asked;

impl Owner {
    pub(super) fn on_command(&mut self, command: Command) {
        match command {
            Command::Connect { address, reply } => self.connect(address, reply),
            Command::Reach { peer, reply } => self.reach(peer, reply),
            Command::Learn { peer, address } => self.book.add(peer, address),
            Command::Hear { from, peer, addresses } => self.hear(from, peer, &addresses),
            Command::Addresses { peers, reply } => {
                let found = peers.into_iter().map(|peer| (peer, self.book.addresses(&peer))).collect();
                // A caller that has gone needs no answer.
                let _ = reply.send(found);
            }
            Command::FindHolders { layer, reply } => match self.lookups.ask(layer, Instant::now(), reply) {
                Asked::Start => {
                    let query = self.swarm.behaviour_mut().kad.get_providers(key_of(layer));
                    self.queries.insert(query, Query::Find(layer));
                }
                Asked::Settled => {}
                Asked::Full => tracing::warn!(%layer, "too many lookups are on their way; one was refused"),
            },
            Command::Provide { layer, reply } => {
                let added = self.schedule.add(layer, Instant::now());
                let limit = self.config.discovery.provided_max;
                let result = if added { Ok(()) } else { Err(NodeError::Full { what: "announced layers", limit }) };
                // A caller that has gone needs no answer.
                let _ = reply.send(result);
            }
            Command::Withdraw { layer } => {
                if self.schedule.remove(layer) {
                    self.swarm.behaviour_mut().kad.stop_providing(&key_of(layer));
                }
            }
            Command::RecordsLen { reply } => {
                // A caller that has gone needs no answer.
                let _ = reply.send(self.swarm.behaviour_mut().kad.store_mut().len_bytes());
            }
            Command::Close { peer } => {
                // That there is no connection any more is no error.
                let _ = self.swarm.disconnect_peer_id(peer);
            }
            Command::Ban { peer, until } => self.ban(peer, until),
        }
    }

    fn connect(&mut self, address: Multiaddr, reply: DialReply) {
        if let Some(peer) = peer_of(&address) {
            if let Some(socket) = socket_of(&address) {
                self.book.add(peer, crate::address::multiaddr_of(socket));
            }
            return self.reach(peer, reply);
        }
        if self.connects.len() >= DIAL_WAITERS_MAX {
            let _ = reply.send(Err(NodeError::Full { what: "dials on their way", limit: DIAL_WAITERS_MAX }));
            return;
        }
        let options = DialOpts::unknown_peer_id().address(address.clone()).build();
        let connection = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => {
                self.connects.insert(connection, (address, reply));
            }
            Err(source) => {
                let _ = reply.send(Err(dial_error(address.to_string(), source)));
            }
        }
    }

    fn reach(&mut self, peer: PeerId, reply: DialReply) {
        if self.bans.contains_key(&peer) {
            let _ = reply.send(Err(NodeError::Banned { peer }));
            return;
        }
        if self.swarm.is_connected(&peer) {
            let _ = reply.send(Ok(peer));
            return;
        }
        let known = self.reaches.contains_key(&peer);
        let waiters = self.reaches.get(&peer).map_or(0, Vec::len);
        if waiters >= DIAL_WAITERS_MAX || (!known && self.reaches.len() >= DIAL_WAITERS_MAX) {
            let _ = reply.send(Err(NodeError::Full { what: "dials on their way", limit: DIAL_WAITERS_MAX }));
            return;
        }
        self.reaches.entry(peer).or_default().push(reply);
        self.dial(peer);
    }

    /// `from` says where `peer` is. Only what could be seen from where `from` is counts, and it pushes nothing out that this
    /// node knows better.
    fn hear(&mut self, from: PeerId, peer: PeerId, addresses: &[Multiaddr]) {
        if self.bans.contains_key(&peer) {
            return;
        }
        let remote = self.links.values().find(|link| link.peer == from).and_then(|link| link.remote);
        for address in reachable(addresses, remote) {
            self.book.hear(peer, address);
        }
    }

    /// Dials `peer` unless there is a connection or a dial already; the outcome comes as an event.
    pub(super) fn dial(&mut self, peer: PeerId) {
        let mut addresses = self.book.addresses(&peer);
        if let Some(member) = self.members.borrow().get(&peer) {
            addresses
                .extend(member.addresses.iter().filter(|said| !addresses.contains(said)).cloned().collect::<Vec<_>>());
        }
        let options = DialOpts::peer_id(peer)
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .addresses(addresses)
            .extend_addresses_through_behaviour()
            .build();
        match self.swarm.dial(options) {
            Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(source) => self.unreached(peer, source),
        }
    }

    /// A dial of `peer` has failed: everybody who waits for it is told.
    pub(super) fn unreached(&mut self, peer: PeerId, source: DialError) {
        let waiters = self.reaches.remove(&peer).unwrap_or_default();
        let mut source = Some(source);
        for waiter in waiters {
            // The first one gets the cause; it cannot be cloned, and they all see the same failure.
            let error = match source.take() {
                Some(DialError::NoAddresses) | None => NodeError::NoAddress { peer },
                Some(source) => dial_error(peer.to_string(), source),
            };
            let _ = waiter.send(Err(error));
        }
    }

    /// Asks `peer` nothing and believes nothing that it has said. What it asks is answered: it would have to turn to the registry
    /// for all of that.
    fn ban(&mut self, peer: PeerId, until: Instant) {
        if peer == *self.swarm.local_peer_id() {
            return;
        }
        if self.bans.len() >= BANS_MAX && !self.bans.contains_key(&peer) {
            let first = self.bans.iter().min_by_key(|(_, until)| **until).map(|(peer, _)| *peer);
            if let Some(first) = first {
                self.unban(first);
            }
        }
        self.bans.insert(peer, until);
        self.book.remove(&peer);
        self.lookups.forget_peer(&peer);
        let behaviour = self.swarm.behaviour_mut();
        behaviour.kad.store_mut().forget_peer(&peer);
        behaviour.kad.remove_peer(&peer);
        if self.swarm.is_connected(&peer) {
            self.shared.shun(peer);
        }
        tracing::warn!(%peer, "peer is banned");
    }

    pub(super) fn unban(&mut self, peer: PeerId) {
        self.bans.remove(&peer);
        if self.swarm.is_connected(&peer) {
            self.shared.up(peer);
        }
    }

    /// The addresses of a seed are known: dial them all, the first that answers wins.
    pub(super) fn on_resolved(&mut self, resolved: Result<Resolved, tokio::task::JoinError>) {
        let Ok((index, resolved)) = resolved else { return };
        let addresses = match resolved {
            Ok(addresses) => addresses,
            Err(error) => {
                tracing::debug!(error = %error, source = ?std::error::Error::source(&error), "cannot resolve a seed");
                Vec::new()
            }
        };
        let mut connections = HashSet::new();
        let mut own = false;
        for address in addresses {
            if peer_of(&address) == Some(*self.swarm.local_peer_id()) {
                own = true;
                continue;
            }
            let options = DialOpts::unknown_peer_id().address(address.clone()).build();
            let connection = options.connection_id();
            match self.swarm.dial(options) {
                Ok(()) => {
                    connections.insert(connection);
                }
                // The swarm leaves out the addresses that it listens on.
                Err(DialError::NoAddresses) => own = true,
                Err(error) => tracing::debug!(%address, %error, "cannot dial a seed"),
            }
        }
        self.seeds.dialing(index, connections, own, Instant::now(), rand::random());
    }
}

/// The error of a failed dial of `target`.
pub(super) fn dial_error(target: String, source: DialError) -> NodeError {
    NodeError::Dial { target, source: Box::new(source) }
}
