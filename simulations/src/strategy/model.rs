//! The parameters of the systems that Hermes is compared with, each with its source.
//!
//! | what all models share | value | from |
//! |---|---|---|
//! | unit on a link | 1 MiB of a layer's blob | chosen: shares are fair over some units, so they are small against any layer |
//! | unpacking | one layer after the other, each after its download, at `cluster.unpack` | containerd's overlayfs snapshotter; 130 MB/s measured with a Spark image of 908 MB: 8.7 s computed against 8.6 s |
//! | a refused or broken pull | is tried again after 10 s, then twice as long each time, up to 300 s | kubelet's image back-off |
//! | what a layer's download had | is kept and gone on from | containerd's content store, pieces of the others |
//! | hosts of their own (seed peers, origins) | have the nodes' cards, in zone 0; faults do not hit them | in favour of the model |
//! | manifests, tags, schedulers' own load | cost nothing | in favour of the model |

use std::fmt::Write as _;

use super::Strategy;
use crate::queue::{MILLISECOND, Nanos, SECOND};
use crate::units::{Rate, show_bytes, show_nanos};

/// Bytes of a layer's blob that are on a link at once.
pub const UNIT_BYTES: u64 = 1 << 20;
/// First and longest time between two tries of a pull.
pub const PULL_BACKOFF: (Nanos, Nanos) = (10 * SECOND, 300 * SECOND);
/// The program waits for its image no longer than this: see `expect.ready_within`.
pub const PATIENCE: Nanos = 4 * 3600 * SECOND;

/// Whom a model asks for a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The registry alone.
    Registry,
    /// Nodes that have the whole layer and were found by a search, then the registry.
    Search {
        /// Providers that one search gives.
        found: usize,
        /// A search that takes longer has found nobody.
        patience: Nanos,
        /// How long a connection to a node that is gone is tried.
        dial: Nanos,
    },
    /// Parents that a scheduler names, which may have a part of it.
    Scheduled {
        /// Hosts that read the registry for all.
        seeds: u32,
        /// Peers of the layer that the scheduler looks at, and those that it names.
        sampled: usize,
        /// See `sampled`.
        parents: usize,
        /// Uploads of a node, and of a seed peer.
        uploads: u32,
        /// See `uploads`.
        seed_uploads: u32,
        /// How long a peer without parents waits until it asks again, and how often until it reads the registry.
        retry: Nanos,
        /// See `retry`.
        retries: u32,
        /// Peers of a layer that may read the registry.
        back_to_source: u32,
    },
    /// Neighbours that a tracker names, which may have a part of it.
    Tracked {
        /// Hosts that hold layers for all, and of them those that hold one.
        origins: u32,
        /// See `origins`.
        replicas: u32,
        /// How often a peer asks the tracker.
        announce: Nanos,
        /// Peers in one answer, and connections of a peer for one layer.
        handout: usize,
        /// See `handout`.
        connections: usize,
        /// Pieces asked for at once on one connection.
        pipeline: u32,
        /// How long a connection stays on which no piece goes.
        idle: Nanos,
    },
}

/// A system's model.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// Which.
    pub strategy: Strategy,
    /// What it is a model of.
    pub of: &'static str,
    /// Bytes of a piece at least, and pieces of a layer at most; `None` when a layer is one piece.
    pub pieces: Option<(u64, u64)>,
    /// Layers that are downloaded at once.
    pub layers: usize,
    /// Pieces of one layer that are under way at once.
    pub at_once: u32,
    /// Most that a node gives to others and takes from them; the card when absent.
    pub limit: Option<(Rate, Rate)>,
    /// How long a transfer may be silent.
    pub stall: Nanos,
    /// Whom it asks.
    pub way: Way,
    /// Where the numbers are from.
    pub source: &'static str,
    /// What it is checked against, or why it is not.
    pub checked: &'static str,
}

/// Reads of lazy spans.
#[derive(Debug, Clone, Copy)]
pub struct LazyModel {
    /// Uncompressed bytes of a span, which is fetched by one request and decoded whole before its first byte is given.
    pub span_bytes: u64,
    /// Speed of decoding, in bytes of output, of one span; spans of different readers are decoded side by side.
    pub decode: Rate,
    /// First wait after a refusal or a failure, which doubles up to the longest.
    pub backoff: (Nanos, Nanos),
}

/// `soci`: see its row of [`MODELS`].
pub const LAZY: LazyModel =
    LazyModel { span_bytes: 4 << 20, decode: Rate(100_000_000), backoff: (30 * MILLISECOND, 300 * SECOND) };

/// All models. The command prints them, and docs/simulation.md quotes them.
pub const MODELS: [Model; 6] = [
    Model {
        strategy: Strategy::Soci,
        of: "SOCI snapshotter 0.4 (lazy reads from the registry)",
        pieces: None,
        layers: 0,
        at_once: 0,
        limit: None,
        stall: 300 * SECOND,
        way: Way::Registry,
        source: "span 4 MiB, one range request for each, no prefetch, retries from 30 ms to 300 s (code of 0.4); \
                 100 MB/s of decoding from the measurement; the background fetcher, which begins after 30 s without a mount, is left out",
        checked: "the start of a Spark image at 1 Gbit/s and 200 Mbit/s, +20 ms (measured): within 15 %; the pull of its indexes, 1.3 s there, \
                  is left out",
    },
    Model {
        strategy: Strategy::Containerd,
        of: "containerd 2.1 with overlayfs",
        pieces: None,
        layers: 3,
        at_once: 1,
        limit: None,
        stall: 300 * SECOND,
        way: Way::Registry,
        source: "3 downloads at once and image_pull_progress_timeout 5 min (containerd's defaults)",
        checked: "the pull of the same image at 1 Gbit/s and 200 Mbit/s (measured): within 10 %",
    },
    Model {
        strategy: Strategy::Preload,
        of: "a DaemonSet or kube-fledged that pulls before pods come, with a taint until it has",
        pieces: None,
        layers: 3,
        at_once: 1,
        limit: None,
        stall: 300 * SECOND,
        way: Way::Registry,
        source: "containerd's pull, begun on all nodes at once `workload.lead` before the first pod, on a new node when it joins; \
                 kube-fledged would notice new nodes at its next refresh (15 min) and gives up a pull after 5 min, a DaemonSet's \
                 update goes node by node: both left out, in favour of the model",
        checked: "the pull is containerd's; nobody has published figures of a crowd",
    },
    Model {
        strategy: Strategy::Spegel,
        of: "Spegel 0.4 beside containerd",
        pieces: None,
        layers: 3,
        at_once: 1,
        limit: None,
        stall: 300 * SECOND,
        way: Way::Search { found: 3, patience: 20 * MILLISECOND, dial: 200 * MILLISECOND },
        source: "mirrorResolveRetries 3, mirrorResolveTimeout 20 ms, dial_timeout 200 ms, layers announced when they are whole, \
                 one layer from one peer, records of the dead for 19 min (code, values.yaml)",
        checked: "not: its benchmarks are plots; that a crowd goes to the registry is its documentation's own words",
    },
    Model {
        strategy: Strategy::Dragonfly,
        of: "Dragonfly 2 (scheduler, three seed peers)",
        pieces: Some((4 << 20, 500)),
        layers: 3,
        at_once: 8,
        limit: None,
        stall: 360 * SECOND,
        way: Way::Scheduled {
            seeds: 3,
            sampled: 15,
            parents: 4,
            uploads: 200,
            seed_uploads: 2000,
            retry: 500 * MILLISECOND,
            retries: 4,
            back_to_source: 200,
        },
        source: "pieces of 4 MiB up to 500 of a task, concurrent_piece_count 8, piece_timeout 360 s, FilterParentLimit 15, \
                 4 candidates, 200 uploads (seed peers 2000), RetryBackToSourceLimit 4 each 500 ms, back-to-source count 200 (code)",
        checked: "200 MB (dragonfly#1535): 6.3 s to 100 and 9.2 s to 990 machines published, on links that are not named; 200 nodes \
                  with 1 Gbit/s here lie between 3 and 9.2 s",
    },
    Model {
        strategy: Strategy::Kraken,
        of: "Kraken (five origins, a tracker)",
        pieces: Some((4 << 20, u64::MAX)),
        layers: 3,
        at_once: 30,
        limit: Some((Rate(300_000_000), Rate(300_000_000))),
        stall: 16 * SECOND,
        way: Way::Tracked {
            origins: 5,
            replicas: 2,
            announce: 3 * SECOND,
            handout: 50,
            connections: 10,
            pipeline: 3,
            idle: 30 * SECOND,
        },
        source: "pieces of 4 MB, announce 3 s, handout 50, 10 connections, closed after 30 s without a piece, pipeline 3, rarest first, piece timeout 4 s/MB, 2 replicas \
                 (code); 300 MB/s each way as in its published run; an origin has a layer whole before it gives a piece",
        checked: "3 GB in 2 layers on 2,600 hosts: p50 10 s, p99 18 s published; 150 hosts of this model \
                  end together, after the published p50 and before the published p99",
    },
];

/// The model of a strategy; none for those that run the policy.
pub fn model(strategy: Strategy) -> Option<&'static Model> {
    MODELS.iter().find(|model| model.strategy == strategy)
}

/// Hosts beside the nodes that a strategy needs.
pub fn hosts(strategy: Strategy) -> u32 {
    match model(strategy).map(|model| model.way) {
        Some(Way::Scheduled { seeds, .. }) => seeds,
        Some(Way::Tracked { origins, .. }) => origins,
        _ => 0,
    }
}

/// The models as a table of Markdown, for docs/simulation.md.
pub fn table() -> String {
    let mut text =
        String::from("| strategy | model of | parameters and their source | checked against |\n|---|---|---|---|\n");
    for model in MODELS {
        let piece =
            model.pieces.map_or(String::new(), |(least, _)| format!("pieces of {} at least; ", show_bytes(least)));
        let stall = show_nanos(model.stall);
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let Model { strategy, of, source, checked, .. } = model;
        let (source, checked) = (words(source), words(checked));
        writeln!(text, "| `{strategy}` | {of} | {piece}silence of {stall} at most; {source} | {checked} |")
            .expect("a string takes all that is written");
    }
    text
}
