//! Real swarms over loopback TCP: exchange, discovery, and peers that mean harm.

mod common;
mod discovery;
mod exchange;
mod hostile_askers;
mod hostile_holders;
