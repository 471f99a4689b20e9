//! Addresses of peers: as people write them, as DNS answers them, and as other nodes claim them.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};
use thiserror::Error;

/// Most addresses used of one host name and address family. All nodes resolve the same headless service; taking the
/// first few in sorted order makes them meet at the same peers.
const RESOLVED_PER_FAMILY_MAX: usize = 3;
/// Most addresses remembered of one peer: two families and a few networks.
pub(crate) const ADDRESSES_PER_PEER_MAX: usize = 8;

/// An address that cannot be used.
#[derive(Debug, Error)]
pub enum AddressError {
    /// The text is neither form.
    #[error("'{text}' is no peer address; write HOST:PORT or /ip4/ADDRESS/tcp/PORT[/p2p/PEER]")]
    Malformed {
        /// What was given.
        text: String,
    },
    /// The name did not resolve.
    #[error("cannot resolve host '{host}'")]
    Resolve {
        /// The host name.
        host: String,
        /// What the resolver said.
        #[source]
        source: std::io::Error,
    },
}

/// Where a peer may be found: an address, or a host name that is resolved anew at every attempt.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PeerAddress {
    /// `/ip4/../tcp/..` or `/ip6/../tcp/..`, with or without `/p2p/..`.
    Fixed(Multiaddr),
    /// A host name and a port.
    Host {
        /// The name, which may have several addresses (a headless service).
        host: String,
        /// The TCP port.
        port: u16,
        /// The only peer to be accepted there, if known.
        peer: Option<PeerId>,
    },
}

impl PeerAddress {
    /// The addresses to dial now, sorted, at most three of each family.
    ///
    /// Cancel safe: it only asks the resolver.
    ///
    /// # Errors
    /// When the host name does not resolve.
    pub async fn resolve(&self) -> Result<Vec<Multiaddr>, AddressError> {
        match self {
            Self::Fixed(address) => Ok(vec![address.clone()]),
            Self::Host { host, port, peer } => {
                let found = tokio::net::lookup_host((host.as_str(), *port))
                    .await
                    .map_err(|source| AddressError::Resolve { host: host.clone(), source })?;
                Ok(first_of_each_family(found, *peer))
            }
        }
    }
}

fn first_of_each_family(found: impl Iterator<Item = SocketAddr>, peer: Option<PeerId>) -> Vec<Multiaddr> {
    let mut found: Vec<SocketAddr> = found.collect();
    found.sort_unstable();
    found.dedup();
    let (mut v4, mut v6) = (0, 0);
    found
        .into_iter()
        .filter(|address| {
            let count = if address.is_ipv4() { &mut v4 } else { &mut v6 };
            *count += 1;
            *count <= RESOLVED_PER_FAMILY_MAX
        })
        .map(|address| {
            let address = multiaddr_of(address);
            match peer {
                Some(peer) => address.with(Protocol::P2p(peer)),
                None => address,
            }
        })
        .collect()
}

impl FromStr for PeerAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let malformed = || AddressError::Malformed { text: text.to_owned() };
        if text.starts_with('/') {
            return from_multiaddr(text).ok_or_else(malformed);
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            return if address.port() == 0 { Err(malformed()) } else { Ok(Self::Fixed(multiaddr_of(address))) };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(malformed)?;
        let port: u16 = port.parse().ok().filter(|port| *port != 0).ok_or_else(malformed)?;
        if !is_host_name(host) {
            return Err(malformed());
        }
        Ok(Self::Host { host: host.to_owned(), port, peer: None })
    }
}

/// A name as RFC 1123 allows it, with underscores as many resolvers do.
fn is_host_name(host: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    (1..=253).contains(&host.len()) && host.bytes().all(allowed)
}

fn from_multiaddr(text: &str) -> Option<PeerAddress> {
    let address: Multiaddr = text.parse().ok()?;
    let parts: Vec<Protocol<'_>> = address.iter().collect();
    let (transport, peer) = match parts.as_slice() {
        [transport @ .., Protocol::P2p(peer)] => (transport, Some(*peer)),
        transport => (transport, None),
    };
    match transport {
        [Protocol::Ip4(_) | Protocol::Ip6(_), Protocol::Tcp(port)] if *port != 0 => Some(PeerAddress::Fixed(address)),
        [Protocol::Dns(host) | Protocol::Dns4(host) | Protocol::Dns6(host), Protocol::Tcp(port)]
            if *port != 0 && is_host_name(host) =>
        {
            Some(PeerAddress::Host { host: host.to_string(), port: *port, peer })
        }
        _ => None,
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(address) => fmt::Display::fmt(address, f),
            Self::Host { host, port, .. } => write!(f, "{host}:{port}"),
        }
    }
}

/// The TCP address as libp2p writes it.
pub fn multiaddr_of(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// The IP address and port of a plain TCP address; `None` for anything else.
pub(crate) fn socket_of(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => IpAddr::V4(ip),
        Protocol::Ip6(ip) => IpAddr::V6(ip),
        _ => return None,
    };
    let Protocol::Tcp(port) = parts.next()? else { return None };
    match parts.next() {
        None | Some(Protocol::P2p(_)) if port != 0 => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

/// The peer that an address names at its end.
pub(crate) fn peer_of(address: &Multiaddr) -> Option<PeerId> {
    match address.iter().last() {
        Some(Protocol::P2p(peer)) => Some(peer),
        _ => None,
    }
}

/// Which of the addresses that a peer claims are worth dialling, seen from a connection whose other end is `remote`.
///
/// Nodes also claim their bridges and overlays. If the peer claims the very address that it talks from, nothing else is
/// taken; otherwise everything that is not of this host. Loopback counts only among nodes of one host.
pub(crate) fn usable(claimed: &[Multiaddr], remote: Option<IpAddr>) -> Vec<Multiaddr> {
    let sockets = sockets_of(claimed, remote);
    let same: Vec<SocketAddr> = sockets.iter().copied().filter(|socket| Some(socket.ip()) == remote).collect();
    let chosen = if same.is_empty() { sockets } else { same };
    chosen.into_iter().take(ADDRESSES_PER_PEER_MAX).map(multiaddr_of).collect()
}

/// Which addresses of somebody else, told by a peer at `remote`, are worth dialling. Loopback counts only among nodes of
/// one host: else anybody could make this node dial its own host's services.
pub(crate) fn reachable(told: &[Multiaddr], remote: Option<IpAddr>) -> Vec<Multiaddr> {
    sockets_of(told, remote).into_iter().map(multiaddr_of).collect()
}

fn sockets_of(addresses: &[Multiaddr], remote: Option<IpAddr>) -> Vec<SocketAddr> {
    addresses
        .iter()
        .filter_map(socket_of)
        .filter(|socket| !socket.ip().is_unspecified())
        .filter(|socket| !socket.ip().is_loopback() || remote.is_some_and(|remote| remote.is_loopback()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_write_an_address_is_understood() {
        let fixed = |text: &str| PeerAddress::Fixed(text.parse().expect("a multiaddr"));
        let host = |host: &str, port| PeerAddress::Host { host: host.to_owned(), port, peer: None };
        for (text, expected) in [
            ("10.0.0.1:4001", fixed("/ip4/10.0.0.1/tcp/4001")),
            ("[fd00::1]:4001", fixed("/ip6/fd00::1/tcp/4001")),
            ("/ip4/10.0.0.1/tcp/4001", fixed("/ip4/10.0.0.1/tcp/4001")),
            ("hermes.kube-system.svc:4001", host("hermes.kube-system.svc", 4001)),
            ("/dns4/node-1/tcp/9", host("node-1", 9)),
        ] {
            assert_eq!(text.parse::<PeerAddress>().expect(text), expected);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in ["", ":1", "host", "host:", "host:0", "host:70000", "10.0.0.1:0", "a b:1", "/ip4/10.0.0.1", "//"] {
            assert!(text.parse::<PeerAddress>().is_err(), "{text:?} was accepted");
        }
        for text in ["/ip4/10.0.0.1/udp/1", "/ip4/10.0.0.1/tcp/0", "/ip4/1.2.3.4/tcp/1/ws", "/memory/1"] {
            assert!(text.parse::<PeerAddress>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_name_gives_the_first_few_of_each_family_in_order() {
        let found = ["10.0.0.9:1", "[fd00::2]:1", "10.0.0.1:1", "10.0.0.2:1", "10.0.0.1:1", "10.0.0.3:1"];
        let found = found.iter().map(|text| text.parse().expect("a socket address"));
        let texts: Vec<String> = first_of_each_family(found, None).iter().map(ToString::to_string).collect();
        let expected =
            ["/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1", "/ip4/10.0.0.3/tcp/1", "/ip6/fd00::2/tcp/1"].to_vec();
        assert_eq!(texts, expected);
    }

    #[test]
    fn claimed_addresses_are_filtered_by_the_one_the_peer_talks_from() {
        let claimed: Vec<Multiaddr> =
            ["/ip4/127.0.0.1/tcp/1", "/ip4/172.17.0.1/tcp/1", "/ip4/10.0.0.7/tcp/1", "/ip4/0.0.0.0/tcp/1"]
                .iter()
                .map(|text| text.parse().expect("a multiaddr"))
                .collect();
        let texts = |remote: &str| -> Vec<String> {
            usable(&claimed, remote.parse().ok()).iter().map(ToString::to_string).collect()
        };
        assert_eq!(texts("10.0.0.7"), ["/ip4/10.0.0.7/tcp/1"]);
        assert_eq!(texts("10.0.0.99"), ["/ip4/172.17.0.1/tcp/1", "/ip4/10.0.0.7/tcp/1"]);
        assert_eq!(texts("127.0.0.1"), ["/ip4/127.0.0.1/tcp/1"]);
    }
}
