//! How what is known of images and nodes looks as objects.

use std::collections::BTreeMap;

use hermes_image::access::Access;
use hermes_image::ids::Digest;
use hermes_policy::profile::codec::decode;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde::Deserialize;

use crate::crd::{
    HermesImageSpec, HermesImageStatus, HermesNodeStatus, ImageAccess, ImagePhase, ImageProfile, ImageSeed, NAMES_MAX,
    NODE_IMAGES_MAX, NodeImage, POLICIES_MAX, SEEDS_MAX,
};
use crate::event::{ImageKey, ImageView, NodeReport, Phase, UnixMillis};

/// To what the bytes of a node's report are rounded down: less is no news to people.
const BYTES_STEP: u64 = 64 << 20;
/// To what percents are rounded down, but for 100.
const PERCENT_STEP: u8 = 5;
/// Longest text of a report that is written, in characters.
const TEXT_LEN_MAX: usize = 256;
/// Most ways of showing a tree that a node may name.
const WAYS_MAX: usize = 16;
/// Most signatures of a statement that are named.
const SIGNATURES_MAX: usize = 8;

/// The name of an image's object.
pub(super) fn image_name(image: &ImageKey) -> String {
    format!("sha256-{}", image.manifest.hex())
}

/// What an image is.
pub(super) fn image_spec(view: &ImageView) -> HermesImageSpec {
    let mut names: Vec<String> = view.names.iter().map(|name| name.reference.clone()).collect();
    names.dedup();
    names.truncate(NAMES_MAX);
    HermesImageSpec {
        names,
        platform: view.names.first().map(|name| name.platform.clone()).unwrap_or_default(),
        digest: view.image.manifest.to_string(),
    }
}

/// What has become of an image.
pub(super) fn image_status(view: &ImageView) -> HermesImageStatus {
    let failure = view.failure.as_ref();
    let seeds = view.seeds.iter().take(SEEDS_MAX);
    HermesImageStatus {
        phase: match view.phase {
            Phase::Pending => ImagePhase::Pending,
            Phase::Building => ImagePhase::Building,
            Phase::Ready => ImagePhase::Ready,
            Phase::Failed => ImagePhase::Failed,
        },
        since: Some(timestamp(view.since).to_string()),
        reason: failure.map(|failure| failure.reason.to_owned()),
        message: failure.map(|failure| failure.message.clone()),
        attempts: view.attempts,
        next_attempt: view.next_attempt.map(|at| timestamp(at).to_string()),
        image_bytes: signed(view.image_len_bytes),
        progress_percent: (view.phase == Phase::Building).then(|| percent(view.read_bytes, view.image_len_bytes)),
        index_bytes: view.index.as_ref().map(|index| signed(index.index_len_bytes)),
        signing_keys: view.index.as_ref().map(|index| signing_keys(&index.statement)).unwrap_or_default(),
        access: match view.access {
            Access::Public => ImageAccess::Public,
            Access::Private => ImageAccess::Private,
        },
        profile: view.profile.as_deref().and_then(image_profile),
        seeds: seeds.map(|(node, mode)| ImageSeed { node: node.clone(), mode: *mode }).collect(),
        seed_count: u32::try_from(view.seeds.len()).unwrap_or(u32::MAX),
        policies: view.policies.iter().take(POLICIES_MAX).cloned().collect(),
        conditions: vec![ready_condition(view)],
    }
}

fn ready_condition(view: &ImageView) -> Condition {
    let (status, reason, message) = match (view.phase, &view.failure) {
        (Phase::Ready, _) => ("True", "Indexed", "indexed, signed, and handed out".to_owned()),
        (Phase::Building, _) => ("False", "Building", "its layers are being read".to_owned()),
        (Phase::Pending, None) => ("False", "Waiting", "waits for its turn".to_owned()),
        (Phase::Pending | Phase::Failed, Some(failure)) => ("False", failure.reason, failure.message.clone()),
        (Phase::Failed, None) => ("False", "Failed", "could not be indexed".to_owned()),
    };
    Condition {
        type_: "Ready".to_owned(),
        status: status.to_owned(),
        observed_generation: None,
        last_transition_time: Time(timestamp(view.since)),
        reason: reason.to_owned(),
        message,
    }
}

/// The keys that a signed statement says it is signed with. It is one of the controller's own, so nothing is checked; its
/// form is that of `hermes_image::statement`.
fn signing_keys(statement: &[u8]) -> Vec<String> {
    #[derive(Deserialize)]
    struct Signed {
        signatures: Vec<Signature>,
    }
    #[derive(Deserialize)]
    struct Signature {
        key: String,
    }
    let signed = serde_json::from_slice::<Signed>(statement).ok();
    let keys = signed.into_iter().flat_map(|signed| signed.signatures).map(|signature| signature.key);
    let keys: std::collections::BTreeSet<String> = keys.take(SIGNATURES_MAX).collect();
    keys.into_iter().collect()
}

fn image_profile(bytes: &[u8]) -> Option<ImageProfile> {
    let profile = decode(bytes).ok()?;
    let newest = Timestamp::from_second(i64::try_from(profile.newest_seconds).ok()?).ok()?;
    let chunks = signed(profile.chunk_count());
    Some(ImageProfile { starts: u32::from(profile.records), chunks, newest: newest.to_string() })
}

/// What a node has said, condensed, with the names of images where they are known.
pub(super) fn node_status(report: &NodeReport, connected: bool, names: &BTreeMap<Digest, String>) -> HermesNodeStatus {
    let mut images: Vec<(u8, &Digest)> = report.images.iter().map(|(digest, percent)| (*percent, digest)).collect();
    images.sort_unstable();
    let complete = images.iter().filter(|(percent, _)| *percent >= 100).count();
    let shown = images.iter().take(NODE_IMAGES_MAX).map(|(percent, digest)| NodeImage {
        digest: digest.to_string(),
        name: names.get(*digest).cloned(),
        percent: i32::from(if *percent >= 100 { 100 } else { percent - percent % PERCENT_STEP }),
    });
    let ways = report.ways.iter().take(WAYS_MAX).map(|way| text(way)).collect::<std::collections::BTreeSet<_>>();
    HermesNodeStatus {
        connected,
        version: text(&report.version),
        peer: text(&report.peer),
        ways: ways.into_iter().collect(),
        store_used_bytes: rounded(report.store_used_bytes),
        store_budget_bytes: report.store_budget_bytes.map(signed),
        peer_bytes: rounded(report.peer_bytes),
        registry_bytes: rounded(report.registry_bytes),
        image_count: u32::try_from(images.len()).unwrap_or(u32::MAX),
        complete_count: u32::try_from(complete).unwrap_or(u32::MAX),
        images: shown.collect(),
    }
}

/// The moment, to the second, as objects have it.
fn timestamp(at: UnixMillis) -> Timestamp {
    i64::try_from(at.0 / 1000)
        .ok()
        .and_then(|seconds| Timestamp::from_second(seconds).ok())
        .unwrap_or(Timestamp::UNIX_EPOCH)
}

/// A node's own words are shown as they are, but for their length and what would break a terminal.
fn text(said: &str) -> String {
    said.chars().filter(|c| !c.is_control()).take(TEXT_LEN_MAX).collect()
}

fn rounded(bytes: u64) -> i64 {
    signed(bytes - bytes % BYTES_STEP)
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn percent(part: u64, whole: u64) -> i32 {
    let percent = (u128::from(part) * 100).checked_div(u128::from(whole)).unwrap_or_default();
    i32::try_from(percent.min(100)).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_condensed() {
        let mut report = NodeReport { store_used_bytes: (64 << 20) + 1, ..NodeReport::default() };
        report.version = "1\u{1b}[2J".to_owned();
        report.images = (0..=255).map(|n| (Digest([n; 32]), n.min(100))).collect();
        report.images.insert(Digest([3; 32]), 100);
        report.images.extend((0..9).map(|n| (Digest([n; 32]), 99)).take(1));
        let names = [(Digest([1; 32]), "r.example/a:1".to_owned())].into();
        let status = node_status(&report, true, &names);
        assert_eq!((status.version.as_str(), status.store_used_bytes), ("1[2J", 64 << 20));
        assert_eq!((status.image_count, status.complete_count), (256, 157));
        assert_eq!(
            status.images.first().map(|image| (image.percent, image.name.as_deref())),
            Some((0, Some("r.example/a:1")))
        );
        assert!(status.images.iter().all(|image| image.percent % 5 == 0));
        // Small changes are none.
        report.store_used_bytes += 1;
        assert_eq!(node_status(&report, true, &names), status);
    }

    #[test]
    fn percents_are_between_none_and_all() {
        assert_eq!((percent(0, 0), percent(1, 3), percent(5, 3)), (0, 33, 100));
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
    }
}
