//! The table.

use hermes_metrics::Kind::{Counter, Gauge, Histogram};
use hermes_metrics::{BUILD_INFO, Metric, metric};
use hermes_p2p::Refusal;

use crate::status::CompletionState;
use hermes_origin::credentials::Provider;

use super::recorded::{
    Again, ArrivedFrom, Decision, Denial, Egress, FirstPullEnd, PrefetchedBytes, ReadFailure, Referrals, RulingGiven,
    StartRecordEnd,
};

const PROVIDERS: &[&str] = &[
    Provider::PullSecret.name(),
    Provider::KubeletPlugin.name(),
    Provider::DockerHelper.name(),
    Provider::DockerConfig.name(),
];

const REFUSALS: &[&str] = &[
    Refusal::NoCertificate.name(),
    Refusal::Malformed.name(),
    Refusal::OtherCluster.name(),
    Refusal::OtherPeer.name(),
    Refusal::Expired.name(),
    Refusal::NotYet.name(),
    Refusal::Revoked.name(),
    Refusal::UnknownIssuer.name(),
];

/// Every metric of a node.
#[rustfmt::skip]
pub const METRICS: &[Metric] = &[
    metric(BUILD_INFO, Gauge, "1", None, "Always 1; its label `version` says which build runs"),
    metric("hermes_start_time_seconds", Gauge, "seconds", None, "When this daemon started, since 1970; a change is a restart"),
    metric("hermes_starts_total", Counter, "starts", None, "Starts of a daemon with this state folder, this one included; kept across restarts"),
    metric("hermes_memory_bytes", Gauge, "bytes", None, "Resident memory of the daemon"),
    metric("hermes_fuse_reads_total", Counter, "requests", Some(("result", &["hit", "miss"])), "Read requests of the kernel, by whether all their bytes were on this node"),
    metric("hermes_fuse_read_bytes_total", Counter, "bytes", Some(("result", &["hit", "miss"])), "Bytes of layers that read requests of the kernel were answered with, by whether all bytes of the request were on this node; what the kernel's page cache answers, and reads of images that the kernel shows from files, are not seen"),
    metric("hermes_chunk_bytes_total", Counter, "bytes", Some(("source", &ArrivedFrom::BYTE_SOURCES)), "Uncompressed bytes of chunks that came, by where from"),
    metric("hermes_chunk_bytes_ahead_total", Counter, "bytes", None, "Uncompressed bytes of chunks that came before anybody read them: by a profile, by a guess, to seed, or to complete an image; counted in hermes_chunk_bytes_total too"),
    metric("hermes_registry_chunk_bytes_total", Counter, "bytes", Some(("reason", &Egress::NAMES)), "Uncompressed bytes of chunks that came from registries, by why this node read them; their sum over all nodes, divided by the length of what is distinct, is the egress ratio"),
    metric("hermes_duplicate_bytes_total", Counter, "bytes", Some(("reason", &Again::NAMES)), "Uncompressed bytes of chunks that came when they were here already, by why"),
    metric("hermes_registry_wire_bytes_total", Counter, "bytes", None, "Bytes of layers as registries sent them, compressed"),
    metric("hermes_reads_waiting", Gauge, "reads", Some(("class", &["demand", "prefetch"])), "Reads that wait for chunks now"),
    metric("hermes_demand_wait_seconds", Histogram, "seconds", Some(("source", &ArrivedFrom::NAMES)), "How long reads on demand waited for missing chunks, by where these came from"),
    metric("hermes_asks_running", Gauge, "requests", Some(("source", &ArrivedFrom::BYTE_SOURCES)), "Requests for chunks under way, by who is asked"),
    metric("hermes_peer_asks_total", Counter, "requests", Some(("referrals", &Referrals::NAMES)), "Requests for chunks to peers, by how often others had been named for these chunks before"),
    metric("hermes_ask_failures_total", Counter, "requests", Some(("class", &["transient", "peer_fault", "not_found", "denied", "local"])), "Requests for chunks that failed, by class; reads go on with another source"),
    metric("hermes_read_failures_total", Counter, "reads", Some(("reason", &ReadFailure::NAMES)), "Reads that ended with EIO, by reason"),
    metric("hermes_registry_requests_total", Counter, "requests", None, "Requests to registries, their mirrors, storage and token services"),
    metric("hermes_registry_received_bytes_total", Counter, "bytes", None, "Bytes of all bodies that these sent, documents and what was thrown away included"),
    metric("hermes_registry_retries_total", Counter, "requests", None, "Requests sent again because a kept connection was dead"),
    metric("hermes_registry_redirects_total", Counter, "redirects", None, "Redirects followed"),
    metric("hermes_registry_token_requests_total", Counter, "requests", None, "Requests to token services"),
    metric("hermes_registry_refusals_total", Counter, "answers", Some(("reason", &["denied", "not_found", "throttled", "other"])), "Answers that were no success, after renewed credentials"),
    metric("hermes_mirror_failures_total", Counter, "requests", None, "Times that a mirror could not help and the next host was asked"),
    metric("hermes_credentials_requests_total", Counter, "lookups", Some(("provider", PROVIDERS)), "Times that a provider of credentials was asked: files read, programs run"),
    metric("hermes_credentials_failures_total", Counter, "lookups", Some(("provider", PROVIDERS)), "Times that a provider of credentials failed"),
    metric("hermes_images_mounted", Gauge, "images", Some(("way", &["erofs-files", "erofs-fuse", "fuse-tree"])), "Images that are shown now, by way"),
    metric("hermes_mounts_total", Counter, "mounts", Some(("way", &["erofs-files", "erofs-fuse", "fuse-tree"])), "Mounts made, by way"),
    metric("hermes_lazy_decisions_total", Counter, "images", Some(("reason", &Decision::NAMES)), "Decisions for images that containerd prepares: lazy, or plain with the reason"),
    metric("hermes_first_pulls_running", Gauge, "images", None, "Pulls that this node takes itself now, to build the index on the way"),
    metric("hermes_first_pulls_total", Counter, "images", Some(("result", &FirstPullEnd::NAMES)), "Pulls that this node took itself, by what came of it; after a failure containerd pulls as ever"),
    metric("hermes_first_pull_bytes_total", Counter, "bytes", None, "Compressed bytes of layers that were read for such pulls"),
    metric("hermes_start_records_total", Counter, "starts", Some(("result", &StartRecordEnd::NAMES)), "Starts of images whose reads were recorded, by what became of the record"),
    metric("hermes_prefetch_bytes_total", Counter, "bytes", Some(("result", &PrefetchedBytes::NAMES)), "Uncompressed bytes that were fetched ahead by a profile, and, once the start was over, how many of them it had read and how many not"),
    metric("hermes_images_completion", Gauge, "images", Some(("state", &CompletionState::NAMES)), "Mounted images, by what becomes of what nobody has read of them"),
    metric("hermes_completion_bytes_total", Counter, "bytes", None, "Uncompressed bytes that were fetched to complete images in the background"),
    metric("hermes_completed_images_total", Counter, "images", None, "Images that became complete so"),
    metric("hermes_completion_paused", Gauge, "1", None, "1 while somebody has paused completing images, else 0"),
    metric("hermes_store_bytes", Gauge, "bytes", None, "Bytes of chunks at rest"),
    metric("hermes_store_budget_bytes", Gauge, "bytes", None, "The store's budget; 0 for none"),
    metric("hermes_store_evicted_bytes_total", Counter, "bytes", None, "Bytes evicted to keep the budget"),
    metric("hermes_store_evicted_chunks_total", Counter, "chunks", None, "Chunks evicted to keep the budget"),
    metric("hermes_store_full_chunks_total", Counter, "chunks", None, "Chunks that found no room and were read uncached"),
    metric("hermes_store_damaged_chunks_total", Counter, "chunks", None, "Chunks whose bytes were gone when they were read, and that were fetched again"),
    metric("hermes_controller_connected", Gauge, "1", None, "1 while this node is connected with a controller, else 0"),
    metric("hermes_peers_connected", Gauge, "peers", None, "Peers that are connected"),
    metric("hermes_peers_banned", Gauge, "peers", None, "Peers of which nothing is taken for now because they sent wrong bytes"),
    metric("hermes_peers_refused_total", Counter, "connections", Some(("reason", REFUSALS)), "Connections with peers that this node did not let in, or cut off, by reason"),
    metric("hermes_claims_waiting", Gauge, "requests", None, "Questions of other nodes that wait for chunks which are on their way to this one"),
    metric("hermes_rulings_total", Counter, "answers", Some(("kind", &RulingGiven::NAMES)), "Answers to questions of other nodes about chunks that were not here, or for extents that this node owns, by kind"),
    metric("hermes_peer_denials_total", Counter, "requests", Some(("reason", &Denial::NAMES)), "Requests of peers for private layers and indexes, and grants, that this node denied, by reason"),
    metric("hermes_members", Gauge, "members", Some(("state", &["eligible", "drain", "full", "suspected"])), "Members of the swarm, this node included: those that may own extents, and those that may not, by why; one may be counted twice there"),
    metric("hermes_peer_bans_total", Counter, "bans", None, "Times that a peer was banned"),
];
