//! What can go wrong with the node itself, and the class that policy sees of every error.

use std::io;

pub use hermes_policy::class::ErrorClass;
use libp2p::swarm::DialError;
use libp2p::{Multiaddr, PeerId};
use thiserror::Error;

use crate::address::AddressError;
use crate::admission::issuer::IssueError;
use crate::config::ConfigError;
use crate::identity::IdentityError;

/// A node that could not start, or could not do what it was asked outside of an exchange.
#[derive(Debug, Error)]
pub enum NodeError {
    /// The configuration contradicts itself.
    #[error("the peer-to-peer configuration is not usable: {0}")]
    Config(#[from] ConfigError),
    /// The key on disk could not be read or made.
    #[error("the identity of this node is not usable")]
    Identity(#[from] IdentityError),
    /// The issuer gave no certificate, or did not sign what it was asked to.
    #[error("the issuer of certificates did not do what it was asked: {0}")]
    Issuer(#[from] IssueError),
    /// An address that cannot be dialled.
    #[error("a peer address is not usable")]
    Address(#[from] AddressError),
    /// The transport refused its configuration.
    #[error("the transport could not be built: {problem}")]
    Transport {
        /// What the transport said.
        problem: String,
    },
    /// A listen address could not be bound.
    #[error("cannot listen on {address}; is the port taken or the address not of this host?")]
    Listen {
        /// The address from the configuration.
        address: Multiaddr,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// Dialling failed.
    #[error("cannot reach {target}")]
    Dial {
        /// The address or peer that was dialled.
        target: String,
        /// Why.
        #[source]
        source: Box<DialError>,
    },
    /// No address of the peer is known.
    #[error("no address of peer {peer} is known; connect to it or find it through the DHT first")]
    NoAddress {
        /// The peer.
        peer: PeerId,
    },
    /// The peer is banned on this node.
    #[error("peer {peer} is banned on this node")]
    Banned {
        /// The peer.
        peer: PeerId,
    },
    /// No answer came in time.
    #[error("{doing} took longer than its deadline")]
    Timeout {
        /// What was being done.
        doing: &'static str,
    },
    /// A bounded table of this node is full.
    #[error("this node already has {limit} {what}; raise the limit or withdraw some")]
    Full {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// The node is shutting down.
    #[error("the node is shutting down")]
    Closed,
}

/// The message of an error with those of its causes, as far as they say more: the outermost often says nothing.
pub fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |cause| cause.source()) {
        let said = cause.to_string();
        // Some repeat what they are wrapped in, and some what they wrap.
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
    }
    text
}

impl NodeError {
    /// The message with those of its causes, which say why a peer refused a connection and what to do about it.
    pub fn in_full(&self) -> String {
        in_full(self)
    }

    /// What policy should make of it.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Issuer(_) => ErrorClass::Local,
            Self::Config(_) | Self::Identity(_) | Self::Address(_) | Self::Transport { .. } | Self::Listen { .. } => {
                ErrorClass::Local
            }
            Self::Full { .. } | Self::Closed => ErrorClass::Local,
            Self::Dial { .. } | Self::NoAddress { .. } | Self::Timeout { .. } => ErrorClass::Transient,
            Self::Banned { .. } => ErrorClass::PeerFault,
        }
    }

    /// The metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Config(_) => "config",
            Self::Identity(_) => "identity",
            Self::Issuer(_) => "issuer",
            Self::Address(_) => "address",
            Self::Transport { .. } => "transport",
            Self::Listen { .. } => "listen",
            Self::Dial { .. } => "dial",
            Self::NoAddress { .. } => "no_address",
            Self::Banned { .. } => "banned",
            Self::Timeout { .. } => "timeout",
            Self::Full { .. } => "full",
            Self::Closed => "closed",
        }
    }
}
