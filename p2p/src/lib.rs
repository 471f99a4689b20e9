//! Bytes in motion.
//!
//! Owns the libp2p swarm of a node: its identity, who may talk with it, its connections, the list of the cluster's
//! members, the Kademlia DHT that finds holders of a layer, and the exchange protocol that moves chunks, index artifacts
//! and signed statements between nodes. It never decides *what*
//! to fetch, from whom or when (that is `policy`), never stores anything but the node's key and the member list, and never hands out a byte
//! that was not checked against its name.
//!
//! ```text
//!  Node (cheap clone) --commands--> owner task: swarm, DHT, dials, bans          one task, nothing heavy on it
//!    |                                  |
//!    |                                  +-- connection tasks (noise, certificates, yamux)
//!    |
//!    +-- members, suspect ... --> roster <--- membership task <--streams--> others
//!    +-- fetch, have, artifact ... --> exchange client --streams--> peer
//!                                      exchange server <--streams-- peer, reads from `Content`
//! ```
//!
//! The wire format is described byte by byte in `docs/protocol.md`.

pub mod address;
pub mod admission;
pub mod config;
pub mod error;
pub mod exchange;
pub mod identity;
pub mod members;
pub mod node;

mod behaviour;
mod book;
mod bootstrap;
mod canonical;
mod fresh_ports;
mod lookup;
mod publish;
mod record_store;
mod swarm;

pub use address::PeerAddress;
pub use admission::certificate::Zone;
pub use admission::refusal::Refusal;
pub use canonical::{DecodeError, PeerKey, unix_now};
pub use config::{ClusterId, Discovery, DownloadLimits, NodeConfig, Transport, UploadLimits};
pub use error::{ErrorClass, NodeError};
pub use exchange::{
    Arrival, Asking, Claim, Class, Content, Desk, Duty, ExchangeError, Fetch, HaveNews, OpenDesk, Ruling, Want, Watch,
};
pub use libp2p::{Multiaddr, PeerId};
pub use members::{Member, MemberList, MembersConfig};
pub use node::{Node, PeerEvent};
