//! The part of containerd's gRPC API that a snapshotter speaks: `containerd.services.snapshots.v1`.
//!
//! Owns the wire format only. A crate of its own, so that code is generated, and the generator compiled, once and not
//! whenever the node's code changes; the files in `proto/` are the format's facts in our own words. The server's side is
//! for the node, the client's for tests and diagnosis.

/// The packages, nested as the generated code expects them.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated; described in proto/")]
mod containerd {
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
    pub mod services {
        pub mod snapshots {
            pub mod v1 {
                tonic::include_proto!("containerd.services.snapshots.v1");
            }
        }
    }
}

pub use containerd::services::snapshots::v1 as snapshots;
pub use containerd::types;
