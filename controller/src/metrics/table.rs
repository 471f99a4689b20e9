//! The table.

use hermes_metrics::Kind::{Counter, Gauge, Histogram};
use hermes_metrics::{BUILD_INFO, Metric, metric};

use crate::api::numbers::{Call, Refusal};
use crate::event::Phase;

/// The phases of images, with their labels.
pub(super) const PHASES: [(Phase, &str); 4] =
    [(Phase::Pending, "pending"), (Phase::Building, "building"), (Phase::Ready, "ready"), (Phase::Failed, "failed")];

/// Reasons of failures as conditions name them, with their labels. What is not here is counted with the last.
pub(super) const REASONS: [(&str, &str); 16] = [
    ("RegistryUnavailable", "registry_unavailable"),
    ("RegistryThrottles", "registry_throttles"),
    ("RegistryMisbehaves", "registry_misbehaves"),
    ("RegistryConfigInvalid", "registry_config_invalid"),
    ("AccessDenied", "access_denied"),
    ("ImageNotFound", "image_not_found"),
    ("PlatformMissing", "platform_missing"),
    ("UnsupportedMediaType", "unsupported_media_type"),
    ("ManifestInvalid", "manifest_invalid"),
    ("LayerInvalid", "layer_invalid"),
    ("NameInvalid", "name_invalid"),
    ("PlatformInvalid", "platform_invalid"),
    ("QuotaExceeded", "quota_exceeded"),
    ("ArtifactsUnavailable", "artifacts_unavailable"),
    ("InternalError", "internal_error"),
    ("", "other"),
];
/// The place of the last.
pub(super) const OTHER_REASON: usize = REASONS.len() - 1;

const fn labels<const N: usize, T: Copy>(pairs: &[(T, &'static str); N]) -> [&'static str; N] {
    let (mut names, mut at) = ([""; N], 0);
    while at < N {
        names[at] = pairs[at].1;
        at += 1;
    }
    names
}

const PHASE_LABELS: [&str; PHASES.len()] = labels(&PHASES);
const REASON_LABELS: [&str; REASONS.len()] = labels(&REASONS);

/// Every metric of a controller.
#[rustfmt::skip]
pub const METRICS: &[Metric] = &[
    metric(BUILD_INFO, Gauge, "1", None, "Always 1; its label `version` says which build runs"),
    metric("hermes_start_time_seconds", Gauge, "seconds", None, "When this process started, since 1970; a change is a restart"),
    metric("hermes_memory_bytes", Gauge, "bytes", None, "Resident memory of the process"),
    metric("hermes_controller_leader", Gauge, "1", None, "1 while this replica decides, by its Lease or because it runs without Kubernetes; else 0"),
    metric("hermes_controller_policies", Gauge, "policies", None, "Policies that are there"),
    metric("hermes_controller_images", Gauge, "images", Some(("phase", &PHASE_LABELS)), "Images that policies want, by phase; those that are pending are the queue"),
    metric("hermes_controller_oldest_unready_seconds", Gauge, "seconds", None, "How long the oldest image that is pending or building has been so; 0 without any"),
    metric("hermes_controller_facts_waiting", Gauge, "facts", None, "Facts that wait for the core, of 1,024 at most; then their sources wait"),
    metric("hermes_controller_builds_total", Counter, "images", None, "Indexes built, kept and signed"),
    metric("hermes_controller_build_failures_total", Counter, "builds", Some(("reason", &REASON_LABELS)), "Builds that failed, by reason; most are tried again"),
    metric("hermes_controller_names_resolved_total", Counter, "names", None, "Times that a registry said what a name stands for"),
    metric("hermes_controller_name_failures_total", Counter, "names", Some(("reason", &REASON_LABELS)), "Times that it could not be found out, by reason"),
    metric("hermes_controller_tags_moved_total", Counter, "tags", None, "Tags that were found to stand for another image than before"),
    metric("hermes_controller_registry_requests_total", Counter, "requests", None, "Requests to registries, their mirrors, storage and token services"),
    metric("hermes_controller_registry_received_bytes_total", Counter, "bytes", None, "Bytes of all bodies that these sent; layers are most of it"),
    metric("hermes_controller_registry_refusals_total", Counter, "answers", Some(("reason", &["denied", "not_found", "throttled", "other"])), "Answers that were no success, after renewed credentials"),
    metric("hermes_controller_artifact_bytes", Gauge, "bytes", None, "Bytes of indexes that are kept"),
    metric("hermes_controller_artifact_quota_bytes", Gauge, "bytes", None, "Most bytes of indexes; 0 for no limit"),
    metric("hermes_controller_nodes", Gauge, "nodes", None, "Nodes that have reported and are not silent"),
    metric("hermes_controller_api_requests_total", Counter, "requests", Some(("call", &Call::NAMES)), "Calls of nodes, refused ones included, by call"),
    metric("hermes_controller_api_refusals_total", Counter, "requests", Some(("reason", &Refusal::NAMES)), "Joins, calls, connections and looks at the status page that were refused, by reason"),
    metric("hermes_controller_api_joins_total", Counter, "joins", None, "Certificates given to nodes, renewals included"),
    metric("hermes_controller_api_connections", Gauge, "connections", None, "Connections that are open"),
    metric("hermes_controller_api_watches", Gauge, "streams", None, "Streams by which nodes are told of changes"),
    metric("hermes_controller_api_updates_total", Counter, "updates", None, "Updates sent on these streams"),
    metric("hermes_controller_api_update_bytes_total", Counter, "bytes", None, "Bytes of these updates"),
    metric("hermes_controller_api_artifact_bytes_total", Counter, "bytes", None, "Bytes of index artifacts given to nodes, packed"),
    metric("hermes_controller_publish_seconds", Histogram, "seconds", None, "How long changes waited until a stream that knew everything before was told of them, once for each stream"),
];
