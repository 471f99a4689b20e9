//! The layer index: three content-addressed artifacts, because they are needed at different times.
//!
//! The table of contents ([`toc`]) and the chunk table ([`chunks`]) are needed when an image is mounted; the seek
//! table ([`seek`]) only by a node that reads the registry.

pub mod chunks;
pub mod seek;
pub mod toc;
pub mod wire;
