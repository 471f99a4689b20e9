//! What a node's policy was told and what it asked for, written down.
//!
//! A record is lines of JSON: a [`Header`], then an [`Entry`] for each fact, in order. The policy has no clock, no chance
//! and no state but what it was told, so the same policy that is told the same facts asks for the same things: `hermes
//! simulate replay` tells them again and compares. Numbers of peers, registries and reads are the node's own; a record names
//! layers by digest, and nothing of images, hosts or what is in them.

use serde::{Deserialize, Serialize};

use crate::event::{Action, Event};
use crate::limits::Limits;
use crate::time::Instant;

/// The name and version of the format.
pub const FORMAT: &str = "hermes-decisions/1";

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`].
    pub format: String,
    /// The version of the program that wrote it.
    pub version: String,
    /// The seed of the policy's random choices.
    pub seed: u64,
    /// The policy's bounds.
    pub limits: Limits,
}

/// A fact, and what was asked for on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The policy's time.
    pub at: Instant,
    /// The fact.
    pub event: Event,
    /// The requests, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub actions: Vec<Action>,
}
