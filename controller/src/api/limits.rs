//! How much one node, and all of them, may ask for at once.

use std::time::Duration;

/// The limits. Each is for one controller process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiLimits {
    /// Most connections: twice the largest cluster that is tested for, for those that are being replaced.
    pub connections_max: usize,
    /// Most connections that shake hands at once. Each is a millisecond of one core.
    pub handshakes_max: usize,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// How long a connection without a certificate stays: it may only join.
    pub anonymous_for: Duration,
    /// Most joins that are reviewed at once; more wait.
    pub reviews_max: usize,
    /// How long one join may take, waiting included.
    pub join_timeout: Duration,
    /// Most watches of one node: one, and those of connections that have not been found dead yet.
    pub watches_per_node: usize,
    /// Most artifacts that one node reads at once.
    pub reads_per_node: usize,
    /// Most artifacts that all read at once. Each has a part of 128 KiB in memory.
    pub reads_max: usize,
    /// How long one artifact may take.
    pub read_timeout: Duration,
    /// Requests that a node may send in a second, on average.
    pub requests_per_second: u32,
    /// Requests that it may send at once, after it was quiet: the artifacts of an image of many layers.
    pub requests_burst: u32,
    /// How soon a node may report again.
    pub report_every: Duration,
    /// How long a node without a watch is still taken for one that is there.
    pub silent_after: Duration,
    /// How long an API that ends waits for calls under way.
    pub drain: Duration,
}

impl Default for ApiLimits {
    fn default() -> Self {
        Self {
            connections_max: 12_000,
            handshakes_max: 256,
            handshake_timeout: Duration::from_secs(10),
            anonymous_for: Duration::from_secs(30),
            reviews_max: 64,
            join_timeout: Duration::from_secs(20),
            watches_per_node: 4,
            reads_per_node: 16,
            reads_max: 512,
            read_timeout: Duration::from_secs(120),
            requests_per_second: 50,
            requests_burst: 1000,
            // Nodes do so every ten seconds, give or take what the network does.
            report_every: Duration::from_secs(5),
            silent_after: Duration::from_secs(120),
            drain: Duration::from_secs(10),
        }
    }
}
