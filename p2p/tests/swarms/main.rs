//! Real swarms over loopback TCP: exchange, discovery, and peers that mean harm.

mod admission;
mod common;
mod discovery;
mod exchange;
mod grants;
mod hostile_askers;
mod hostile_holders;
mod hostile_owners;
mod members;
mod owners;
