//! The node.
//!
//! Owns everything on a node that touches the world: FUSE and EROFS mounts, the tasks that fetch, and the
//! daemon that puts the crates together. It decides nothing about chunks; `policy` does.
//!
//! Data flows: [`hermes_origin`] resolves an image -> [`artifacts`] finds its index -> [`node`] makes the tree and mounts it
//! ([`mounts`]) -> [`fs`] answers the kernel -> [`fetch`] brings what is missing. [`control`] is how commands talk to
//! the daemon, [`status`] what they learn; [`snapshots`] is how containerd does: it asks for snapshots and mounts them.
//! [`keeper`] outlives the daemon and keeps its FUSE connections. [`install`] makes a host use the node, [`doctor`] says
//! what is wrong with one.

pub mod artifacts;
pub mod config;
pub mod content;
pub mod control;
pub mod controller;
pub mod doctor;
pub mod fetch;
pub mod fs;
pub mod index_folder;
pub mod install;
pub mod keeper;
pub mod metrics;
pub mod mounts;
pub mod node;
pub mod privacy;
pub mod profile;
pub mod snapshots;
pub mod state_version;
pub mod status;
pub mod telemetry;
