//! Real parts, set up so that tests and benchmarks can use them: hosts with their own containerd, networks with their own
//! links, the node's daemon.
//!
//! A [`containerds::Host`] is a folder with a containerd in it, and a [`lazy_host`] one into which Hermes was installed. A
//! [`daemon`] is `hermes node` with the settings that somebody needs, on an [`index`] that was built before. [`wires`] are
//! links with a rate between [`network`]s of nobody else. What outlives a function call (mounts, processes, loop devices,
//! folders) is owned by a [`guard`], which cleans up when its owner fails, too.

pub mod command;
pub mod containerds;
pub mod daemon;
pub mod guard;
pub mod index;
pub mod lazy_host;
pub mod network;
pub mod process;
pub mod wires;
