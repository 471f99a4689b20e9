//! A small registry over OCI image layouts, for demonstrations, tests and air-gapped clusters.
//!
//! Owns the reading and writing of layouts on the disk ([`Layout`], [`LayoutWriter`]), the documents of an image
//! ([`oci`]), and a server for the pulling half of the OCI distribution specification 1.1 ([`Registry`]). The server
//! never writes and never holds a blob in memory; it can ask for passwords or tokens, speak TLS, and behave as if it stood
//! behind a slow or distant link.

mod answer;
mod auth;
mod layout;
mod link;
pub mod oci;
mod range;
mod repositories;
mod router;
mod server;
mod writer;

pub use auth::{Auth, Login};
pub use layout::{Layout, LayoutError};
pub use repositories::OpenError;
pub use server::{Counters, Handle, Options, Registry};
pub use writer::{BlobWriter, LayoutWriter, WriteError, WrittenLayer};
