//! Sections as bytes: JSON, and for the map one byte a cell.
//!
//! What comes from nodes, registries and people is text like any other here: the page puts it into the document as text,
//! never as markup. Lists and texts have limits, so that an answer is of a size that a browser can hold.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use hermes_image::access::Access;
use serde_json::{Value, json};

use super::Window;
use super::board::{Board, NodeRow, PolicyRow, Snapshot};
use super::series::{Counts, NAMES, counts};
use super::slots::SLOTS_MAX;
use crate::crd::PolicyImagePhase;
use crate::event::{ImageView, Phase, UnixMillis};

/// Most cells of the map: 8 MB, which is five thousand nodes with sixteen hundred images.
const CELLS_MAX: usize = 8_000_000;
/// What a cell is of an image that the node has nothing of.
const ABSENT: u8 = 255;
/// The form of the map.
const MAP_VERSION: u8 = 1;
/// Most policies, and names that stand for no image, that are listed.
const POLICIES_MAX: usize = 1000;
/// Most names of an image.
const NAMES_MAX: usize = 16;
/// Most expressions of a policy.
const REGEXES_MAX: usize = 8;
/// Longest text, in characters.
const TEXT_LEN_MAX: usize = 512;
/// The largest whole number that JavaScript can tell from the next.
const NUMBER_MAX: u64 = (1 << 53) - 1;

fn text(said: &str) -> String {
    match said.char_indices().nth(TEXT_LEN_MAX) {
        Some((end, _)) => format!("{}…", &said[..end]),
        None => said.to_owned(),
    }
}

fn number(bytes: u64) -> u64 {
    bytes.min(NUMBER_MAX)
}

fn named(counts: &Counts) -> BTreeMap<&'static str, u64> {
    NAMES.iter().zip(counts).map(|(name, bytes)| (*name, number(*bytes))).collect()
}

fn encoded(value: &Value) -> Bytes {
    value.to_string().into()
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Pending => "Pending",
        Phase::Building => "Building",
        Phase::Ready => "Ready",
        Phase::Failed => "Failed",
    }
}

/// Totals, and which cluster this is.
pub(super) fn summary(cluster: &str, board: &Board) -> Bytes {
    let snapshot = board.snapshot();
    let total = board.series(super::series::Series::total);
    let [at_once, after_waiting, _, from_registries, ..] = total;
    let read = number(at_once.saturating_add(after_waiting)).cast_signed();
    let mut phases = BTreeMap::from([("Pending", 0), ("Building", 0), ("Ready", 0), ("Failed", 0)]);
    for (view, _) in &snapshot.images {
        *phases.entry(phase_name(view.phase)).or_insert(0) += 1;
    }
    let said = || snapshot.nodes.iter().filter_map(|(_, row)| row.said.as_ref());
    let ill = |row: &PolicyRow| {
        let conditions = row.status.iter().flat_map(|status| &status.conditions);
        conditions.into_iter().any(|condition| condition.type_ == "Degraded" && condition.status == "True")
    };
    encoded(&json!({
        "cluster": cluster, "version": env!("CARGO_PKG_VERSION"), "startedAt": snapshot.started.0,
        "imageOrder": snapshot.image_order, "nodeOrder": snapshot.node_order,
        "policies": {
            "total": snapshot.policies.len(),
            "paused": snapshot.policies.iter().filter(|(_, row)| row.spec.paused).count(),
            "degraded": snapshot.policies.iter().filter(|(_, row)| ill(row)).count(),
        },
        "images": {"total": snapshot.images.len(), "phases": phases, "unresolved": unresolved(&snapshot).len()},
        "nodes": {
            "total": snapshot.nodes.len(),
            "connected": snapshot.nodes.iter().filter(|(_, row)| row.connected).count(),
            "storeUsedBytes": number(said().fold(0, |sum, said| sum.saturating_add(said.store_used_bytes))),
            "copies": said().map(|said| said.image_count).sum::<usize>(),
            "completeCopies": said().map(|said| said.complete_count).sum::<usize>(),
        },
        "traffic": {"total": named(&total), "registryBytesSaved": read - number(from_registries).cast_signed()},
    }))
}

/// Policies, by name.
pub(super) fn policies(board: &Board) -> Bytes {
    let snapshot = board.snapshot();
    let rows: Vec<Value> =
        snapshot.policies.iter().take(POLICIES_MAX).map(|(name, row)| policy_value(name, row)).collect();
    encoded(&json!({"total": snapshot.policies.len(), "policies": rows}))
}

fn policy_value(name: &str, row: &PolicyRow) -> Value {
    let PolicyRow { spec, status } = row;
    let conditions = status.iter().flat_map(|status| &status.conditions).map(|condition| {
        json!({
            "type": condition.type_, "status": condition.status, "reason": condition.reason,
            "message": text(&condition.message),
        })
    });
    let regexes: Vec<String> =
        spec.image_selectors.iter().take(REGEXES_MAX).map(|selector| text(&selector.image_regex)).collect();
    let building = status.iter().flat_map(|status| &status.images);
    let building = building.filter(|image| image.phase == PolicyImagePhase::Building).count();
    json!({
        "name": text(name), "paused": spec.paused, "regexes": regexes, "regexCount": spec.image_selectors.len(),
        "platforms": spec.platforms.iter().take(NAMES_MAX).map(|platform| text(platform)).collect::<Vec<_>>(),
        "seed": spec.seed.as_ref().map(|seed| json!({"replicas": seed.replicas.unwrap_or(2), "mode": seed.mode})),
        "ready": status.as_ref().map_or(0, |status| status.ready),
        "failed": status.as_ref().map_or(0, |status| status.failed),
        "building": building, "conditions": conditions.collect::<Vec<_>>(),
    })
}

/// Images, in the order of the map's columns, and names that stand for none.
pub(super) fn images(board: &Board) -> Bytes {
    let snapshot = board.snapshot();
    let rows: Vec<Value> = snapshot.images.iter().take(SLOTS_MAX).map(|(view, _)| image_value(view)).collect();
    let unresolved = unresolved(&snapshot);
    let names = unresolved.iter().take(POLICIES_MAX).map(|((name, platform), (error, policies))| {
        json!({"name": text(name), "platform": platform, "message": error, "policies": policies})
    });
    encoded(&json!({
        "order": snapshot.image_order, "total": snapshot.images.len(), "images": rows,
        "unresolvedTotal": unresolved.len(), "unresolved": names.collect::<Vec<_>>(),
    }))
}

fn image_value(view: &ImageView) -> Value {
    let mut names: Vec<String> = view.names.iter().map(|name| text(&name.reference)).collect();
    names.dedup();
    names.truncate(NAMES_MAX);
    json!({
        "manifest": view.image.manifest, "names": names,
        "platform": view.names.first().map(|name| name.platform.as_str()),
        "policies": view.policies.iter().take(NAMES_MAX).collect::<Vec<_>>(), "phase": phase_name(view.phase),
        "reason": view.failure.as_ref().map(|failure| failure.reason),
        "message": view.failure.as_ref().map(|failure| text(&failure.message)),
        "attempts": view.attempts, "nextAttemptAt": view.next_attempt.map(|at| at.0), "since": view.since.0,
        "imageBytes": number(view.image_len_bytes), "readBytes": number(view.read_bytes),
        "indexBytes": view.index.as_ref().map(|index| number(index.index_len_bytes)),
        "private": view.access == Access::Private, "hasProfile": view.profile.is_some(), "seeds": view.seeds.len(),
    })
}

/// Why a name stands for no image, and who wants it.
type Wish = (String, BTreeSet<String>);

/// Names that policies want and that stand for no image that is listed, with their platforms.
fn unresolved(snapshot: &Snapshot) -> BTreeMap<(String, String), Wish> {
    let known: BTreeSet<String> = snapshot.images.iter().map(|(view, _)| view.image.manifest.to_string()).collect();
    let mut names: BTreeMap<(String, String), Wish> = BTreeMap::new();
    for (policy, row) in &snapshot.policies {
        for image in row.status.iter().flat_map(|status| &status.images) {
            let is_image = image.image_digest_ref.rsplit_once('@').is_some_and(|(_, digest)| known.contains(digest));
            if image.phase == PolicyImagePhase::Failed && !is_image {
                let name = (image.image_digest_ref.clone(), image.platform.clone());
                let error = text(image.error.as_deref().unwrap_or_default());
                names.entry(name).or_insert_with(|| (error, BTreeSet::new())).1.insert(text(policy));
            }
        }
    }
    names
}

/// What each node's row is made of, before the counts of [`NAMES`].
const NODE_COLUMNS: [&str; 11] = [
    "name",
    "zone",
    "connected",
    "schedulable",
    "version",
    "ways",
    "storeUsedBytes",
    "storeBudgetBytes",
    "images",
    "complete",
    "heardAt",
];

/// Nodes, in the order of the map's rows; values in the order of `columns`, to be a third as long.
pub(super) fn nodes(board: &Board) -> Bytes {
    let snapshot = board.snapshot();
    let rows: Vec<Value> = snapshot.nodes.iter().map(|(name, row)| node_value(name, row)).collect();
    let columns: Vec<&str> = NODE_COLUMNS.iter().chain(&NAMES).copied().collect();
    encoded(&json!({"order": snapshot.node_order, "columns": columns, "rows": rows}))
}

fn node_value(name: &str, row: &NodeRow) -> Value {
    let said = row.said.as_ref();
    let mut values = vec![
        json!(name),
        json!(row.zone),
        json!(row.connected),
        json!(row.schedulable()),
        json!(said.map(|said| &said.version)),
        json!(said.map(|said| &said.ways)),
        json!(said.map(|said| number(said.store_used_bytes))),
        json!(said.and_then(|said| said.store_budget_bytes).map(number)),
        json!(said.map(|said| said.image_count)),
        json!(said.map(|said| said.complete_count)),
        json!(said.map(|said| said.heard.0)),
    ];
    let counted = said.and_then(|said| said.traffic.as_ref()).map(counts);
    values.extend((0..NAMES.len()).map(|at| json!(counted.map(|counts| number(counts[at])))));
    Value::Array(values)
}

/// The map: `HMAP`, a byte of version and three of nothing, the numbers of both orders (64 bits each), how many nodes and
/// images (32 bits each), all little endian; then node by node a byte for each image.
pub(super) fn map(board: &Board) -> Bytes {
    let snapshot = board.snapshot();
    let images_max = CELLS_MAX / snapshot.nodes.len().max(1);
    let images = &snapshot.images[..snapshot.images.len().min(images_max).min(SLOTS_MAX)];
    let mut columns = vec![None; SLOTS_MAX];
    for (column, (_, slot)) in images.iter().enumerate() {
        if let Some(slot) = slot {
            columns[usize::from(*slot)] = Some(column);
        }
    }
    let (width, height) = (images.len(), snapshot.nodes.len());
    let mut out = Vec::with_capacity(32 + width * height);
    out.extend_from_slice(b"HMAP");
    out.extend_from_slice(&[MAP_VERSION, 0, 0, 0]);
    out.extend_from_slice(&snapshot.node_order.to_le_bytes());
    out.extend_from_slice(&snapshot.image_order.to_le_bytes());
    // Both are far below 2^32.
    out.extend_from_slice(&(height as u32).to_le_bytes());
    out.extend_from_slice(&(width as u32).to_le_bytes());
    for (_, row) in &snapshot.nodes {
        let begin = out.len();
        out.resize(begin + width, ABSENT);
        for (slot, percent) in row.said.iter().flat_map(|said| &said.held) {
            if let Some(column) = columns[usize::from(*slot)] {
                out[begin + column] = (*percent).min(100);
            }
        }
    }
    out.into()
}

/// Bytes by source, up to `now`.
pub(super) fn traffic(board: &Board, window: Window, now: UnixMillis) -> Bytes {
    let (step, points) = (window.step_minutes(), window.points());
    let (begin, sums) = board.series(|series| series.window(now.0 / 60_000, step, points));
    let columns: BTreeMap<&str, Vec<u64>> = NAMES
        .iter()
        .enumerate()
        .map(|(at, name)| (*name, sums.iter().map(|counts| number(counts[at])).collect()))
        .collect();
    let started = board.snapshot().started.0;
    encoded(&json!({
        "window": window.name(), "beginsAt": begin * 60_000, "stepSeconds": step * 60, "startedAt": started,
        "bytes": columns,
    }))
}
