//! The client against the real registry, and against that registry behind a layer that makes every fault a registry,
//! a proxy or a network can make.

mod auth;
mod faults;
mod harness;
mod mirrors;
mod read;
mod resolve;
