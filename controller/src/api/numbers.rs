//! What the API counts. [`crate::metrics::METRICS`] says what each number means.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hermes_metrics::{Histogram, Values, labels};

/// Upper bounds of the histogram of how long changes wait, in seconds: a cluster of 5,000 nodes shall know within 2.
const PUBLISH_BOUNDS_SECONDS: [f64; 10] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 10.0];

labels! {
    /// Why somebody was refused. Closed, because it is a label.
    Refusal {
        /// A join without a token.
        NoToken = "no_token",
        /// A token for another audience.
        OtherAudience = "other_audience",
        /// A token of another ServiceAccount than those of nodes.
        OtherAccount = "other_account",
        /// Another node's token, or one that belongs to no node.
        OtherNode = "other_node",
        /// A token that has ended.
        Expired = "expired",
        /// A token that nobody has given out.
        UnknownToken = "unknown_token",
        /// A join to another cluster.
        OtherCluster = "other_cluster",
        /// No version in common.
        Version = "version",
        /// A request that makes no sense.
        Malformed = "malformed",
        /// A call without a certificate.
        NoCertificate = "no_certificate",
        /// A certificate of this authority that is no node's.
        NoNode = "no_node",
        /// A member that was taken out.
        Revoked = "revoked",
        /// Something private without a grant for it.
        NoGrant = "no_grant",
        /// A limit.
        TooMany = "too_many",
        /// A good token of somebody who may not see the status page.
        NotAllowed = "not_allowed",
        /// A connection whose TLS came to nothing: a certificate that is not believed or has ended, or no TLS at all.
        Handshake = "handshake",
    }
}

labels! {
    /// A call of a node.
    Call {
        /// Asks for a certificate.
        Join = "join",
        /// Wants to be told of changes.
        Watch = "watch",
        /// Asks for an image.
        GetImage = "get_image",
        /// Reads an artifact.
        ReadArtifact = "read_artifact",
        /// Says how it is.
        Report = "report",
        /// Says what a start has read.
        UploadStart = "upload_start",
        /// Asks for grants.
        Grant = "grant",
        /// Takes itself out.
        Revoke = "revoke",
    }
}

/// The counters.
#[derive(Debug)]
pub struct Numbers {
    refusals: [AtomicU64; Refusal::NAMES.len()],
    calls: [AtomicU64; Call::NAMES.len()],
    publish: Histogram<{ PUBLISH_BOUNDS_SECONDS.len() + 1 }>,
    pub(super) joins: AtomicU64,
    pub(super) connections: AtomicU64,
    pub(super) watches: AtomicU64,
    pub(super) updates: AtomicU64,
    pub(super) update_bytes: AtomicU64,
    pub(super) artifact_bytes: AtomicU64,
}

impl Default for Numbers {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            refusals: [const { AtomicU64::new(0) }; Refusal::NAMES.len()],
            calls: [const { AtomicU64::new(0) }; Call::NAMES.len()],
            publish: Histogram::new(&PUBLISH_BOUNDS_SECONDS),
            joins: zero(),
            connections: zero(),
            watches: zero(),
            updates: zero(),
            update_bytes: zero(),
            artifact_bytes: zero(),
        }
    }
}

impl Numbers {
    pub(super) fn called(&self, call: Call) {
        self.calls[call as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// A stream that knew everything before was told of what had changed so long ago.
    pub(super) fn told_after(&self, waited: Duration) {
        self.publish.observe(waited);
    }

    pub(crate) fn refused(&self, why: Refusal) {
        self.refusals[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How often somebody was refused so.
    pub fn refusals(&self, why: Refusal) -> u64 {
        self.refusals[why as usize].load(Ordering::Relaxed)
    }

    /// Streams that are open.
    pub fn watches(&self) -> u64 {
        self.watches.load(Ordering::Relaxed)
    }

    /// Connections that are open.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Bytes of index artifacts given to nodes.
    pub fn artifact_bytes(&self) -> u64 {
        self.artifact_bytes.load(Ordering::Relaxed)
    }

    /// Sets the metrics of the API.
    pub fn fill(&self, values: &mut Values) {
        for (label, count) in Refusal::NAMES.iter().zip(&self.refusals) {
            values.set("hermes_controller_api_refusals_total", label, count.load(Ordering::Relaxed));
        }
        for (label, count) in Call::NAMES.iter().zip(&self.calls) {
            values.set("hermes_controller_api_requests_total", label, count.load(Ordering::Relaxed));
        }
        for (metric, count) in [
            ("hermes_controller_api_joins_total", &self.joins),
            ("hermes_controller_api_connections", &self.connections),
            ("hermes_controller_api_watches", &self.watches),
            ("hermes_controller_api_updates_total", &self.updates),
            ("hermes_controller_api_update_bytes_total", &self.update_bytes),
            ("hermes_controller_api_artifact_bytes_total", &self.artifact_bytes),
        ] {
            values.set(metric, "", count.load(Ordering::Relaxed));
        }
        values.set_distribution("hermes_controller_publish_seconds", "", self.publish.read());
    }
}

/// One of the numbers that count what is there.
pub(super) type Gauge = fn(&Numbers) -> &AtomicU64;

/// Counts something while it is there.
#[derive(Debug)]
pub(super) struct Counted(Arc<Numbers>, Gauge);

impl Counted {
    pub(super) fn new(numbers: &Arc<Numbers>, which: Gauge) -> Self {
        which(numbers).fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(numbers), which)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Ordering::Relaxed);
    }
}
