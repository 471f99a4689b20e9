//! A made-up cluster for the status page: what its nodes hold, what passed in the last day, and what went wrong.
//!
//! Everything follows from numbers, so that each run shows the same.

use std::collections::BTreeMap;
use std::time::Duration;

use hermes_controller::crd::{HermesPolicySpec, HermesPolicyStatus, ImageSelector, Seed, SeedMode};
use hermes_controller::event::{
    Action, Audience as _, Event, Failure, FailureClass, ImageView, Name, NodeReport, Phase, Policy, Traffic,
    UnixMillis,
};
use hermes_controller::page::Board;
use hermes_controller_api::v1;
use serde_json::json;

use super::server::manifest;

/// Images of the cluster.
pub(super) const IMAGES: u32 = 200;
/// Pools of nodes that run different things.
const POOLS: u32 = 8;
/// Images that all nodes have, such as those of agents.
const EVERYWHERE: u32 = 14;
/// Minutes of history.
const MINUTES: u64 = 24 * 60;

/// A number below 100 that looks like chance.
fn chance(one: u32, other: u32) -> u32 {
    let mixed = (one ^ 0x9e37_79b9).wrapping_mul(0x85eb_ca6b) ^ other.wrapping_add(17).wrapping_mul(0xc2b2_ae35);
    let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x2c1b_3c6d);
    (mixed ^ (mixed >> 13)) % 100
}

/// Percent of an image that a node holds; `None` when it has nothing of it.
fn held(node: u32, pool: u32, image: u32) -> Option<u32> {
    let drawn = chance(node, image);
    let partly = 5 + chance(image, node) * 94 / 100;
    match image {
        0..EVERYWHERE if drawn < 93 => Some(100),
        0..EVERYWHERE => Some(partly),
        // One that is being rolled out, node after node.
        _ if image % 23 == 9 => Some(100_u32.saturating_sub(node / 12 + drawn / 4)).filter(|percent| *percent > 6),
        _ if image / 3 % POOLS == pool && drawn < 62 => Some(100),
        _ if image / 3 % POOLS == pool && drawn < 90 => Some(partly),
        _ if drawn < 3 => Some(partly / 2),
        _ => None,
    }
}

/// What the node `number` of `count` reports.
pub(super) fn report(number: usize, count: usize) -> v1::ReportRequest {
    let (node, count) = (number as u32, count as u32);
    let pool = node * POOLS / count.max(1);
    let held = (0..IMAGES).filter_map(|image| Some((image, held(node, pool, image)?)));
    let held: Vec<_> = held.collect();
    let complete = held.iter().filter(|(_, percent)| *percent == 100).count() as u64;
    let used = held.iter().map(|(_, percent)| u64::from(*percent) * 4_000_000).sum();
    let bytes = |share: u64| complete * 9_000_000 * (share + u64::from(chance(node, share as u32)) / 10);
    let images =
        held.into_iter().map(|(image, percent)| v1::HeldImage { manifest: manifest(image).0.to_vec().into(), percent });
    v1::ReportRequest {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ways: vec!["erofs-files".to_owned(), "erofs-fuse".to_owned()],
        store_used_bytes: used,
        store_budget_bytes: Some(80_000_000_000),
        images: images.collect(),
        peer_bytes: bytes(40),
        registry_bytes: bytes(4),
        addresses: Vec::new(),
        traffic: Some(v1::Traffic {
            run: 1,
            read_at_once: bytes(70),
            read_after_waiting: bytes(30),
            from_peers: bytes(40),
            from_registries: bytes(4),
            from_other_layers: bytes(8),
            ahead: bytes(20),
            registry_wire: bytes(2),
        }),
    }
}

/// What the image of a number is called.
fn reference(number: u32) -> String {
    const AGENTS: [&str; 7] = ["node-exporter", "log-shipper", "cni", "csi-driver", "proxy", "dns-cache", "tracer"];
    const SERVICES: [&str; 12] = [
        "billing",
        "catalog",
        "checkout",
        "gateway",
        "ledger",
        "media",
        "notify",
        "orders",
        "profile",
        "recommend",
        "search",
        "session",
    ];
    match policy_name(number) {
        "agents" => format!("registry.example/infra/{}:{}", AGENTS[number as usize % 7], 2 + number / 7),
        "models" => format!("registry.example/models/vllm-{}b:0.9.{}", number % 70, number % 5),
        _ => format!(
            "registry.example/team-{}/{}:1.{}.{}",
            number / 3 % POOLS,
            SERVICES[number as usize % SERVICES.len()],
            number / 24,
            number % 7
        ),
    }
}

/// Names an image, and makes some of them fail, be built, or wait.
pub(super) fn change(view: &mut ImageView, number: u32) {
    view.names = view.names.iter().map(|name| Name { reference: reference(number), ..name.clone() }).collect();
    let hours = u64::from(number % 19) + 1;
    view.since = UnixMillis(hermes_controller::clock::now().0.saturating_sub(hours * 3_600_000));
    view.policies = [policy_name(number).to_owned()].into();
    let scale = u64::from(chance(number, 5)) + 3;
    view.image_len_bytes = scale * 37_000_000;
    let failure =
        |class, reason, message: &str| Failure { class, reason, message: message.to_owned(), retry_after: None };
    match number {
        31 => {
            view.phase = Phase::Failed;
            let message = "the registry refuses the login of secret team/pull; give one that may pull";
            view.failure = Some(failure(FailureClass::Denied, "AccessDenied", message));
            view.attempts = 4;
        }
        77 | 78 => {
            view.phase = Phase::Failed;
            let message = "registry.example answers 503; look at the registry, or a proxy in between";
            view.failure = Some(failure(FailureClass::Transient, "RegistryUnavailable", message));
            view.next_attempt = Some(UnixMillis(hermes_controller::clock::now().0 + 90_000));
            view.attempts = 7;
        }
        120..124 => {
            view.phase = Phase::Building;
            view.read_bytes = view.image_len_bytes / 100 * u64::from(chance(number, 1));
        }
        124..130 => (view.phase, view.attempts) = (Phase::Pending, 0),
        _ => {}
    }
    if view.phase != Phase::Ready {
        view.index = None;
    }
}

fn policy_name(image: u32) -> &'static str {
    match image {
        0..EVERYWHERE => "agents",
        _ if image % 23 == 9 => "models",
        _ => "services",
    }
}

/// The policies of the made-up cluster.
pub(super) fn policies(board: &Board) -> anyhow::Result<()> {
    for (name, regex, seed) in [
        ("agents", "^registry\\.example/infra/", Some(SeedMode::Full)),
        ("models", "vllm", Some(SeedMode::Hot)),
        ("services", "^registry\\.example/team-", None),
    ] {
        let selector = ImageSelector { image_regex: regex.to_owned() };
        let seed = seed.map(|mode| Seed { replicas: Some(3), node_selector: BTreeMap::new(), mode });
        let spec = HermesPolicySpec { image_selectors: vec![selector], seed, ..HermesPolicySpec::default() };
        board.learn(&Event::Policy(Policy { name: name.to_owned(), generation: 1, spec }));
        let mine = (0..IMAGES).filter(|image| policy_name(*image) == name);
        let failed = mine.clone().filter(|image| [31, 77, 78].contains(image)).count();
        let coming = mine.clone().filter(|image| (120..130).contains(image)).count();
        let condition = |kind: &str, is_so: bool, reason: &str, message: &str| {
            let status = if is_so { "True" } else { "False" };
            let time = "2026-01-01T00:00:00Z";
            json!({"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": time})
        };
        let all = failed + coming == 0;
        let status: HermesPolicyStatus = serde_json::from_value(json!({
            "ready": mine.count() - failed - coming, "failed": failed,
            "conditions": [
                condition("Ready", all, if all { "AllReady" } else { "Building" }, ""),
                condition("Degraded", failed > 0, if failed > 0 { "ImagesFailed" } else { "AsExpected" }, &format!("{failed} images failed")),
            ],
        }))?;
        board.hear(&Action::PolicyStatus { policy: name.to_owned(), status });
    }
    Ok(())
}

/// A day of traffic until `now`: working hours, and two rollouts.
pub(super) fn history(board: &Board, now: UnixMillis, nodes: u32) {
    let node = "history".to_owned();
    let mut traffic = Traffic { run: 1, ..Traffic::default() };
    for minute in 0..=MINUTES {
        let at = UnixMillis(now.0 - Duration::from_secs((MINUTES - minute) * 60).as_millis() as u64);
        let hour = minute as f64 / 60.0;
        let bump = |centre: f64, width: f64| (-((hour - centre) / width).powi(2)).exp();
        let day = 0.25 + bump(9.0, 4.5) + 0.6 * bump(20.0, 3.0);
        let rollouts = bump(6.5, 0.35) + 1.6 * bump(14.2, 0.5);
        let noise = f64::from(chance(minute as u32, nodes)) / 100.0;
        let each = |share: f64| (f64::from(nodes) * 1.0e6 * share) as u64;
        traffic.read_at_once += each(1.7 * day + 0.3 * noise);
        traffic.read_after_waiting += each(0.25 * day + 1.1 * rollouts);
        traffic.from_peers += each(0.2 * day + 2.2 * rollouts + 0.1 * noise);
        traffic.from_registries += each(0.02 * day + 0.12 * rollouts + 0.02 * noise);
        traffic.from_other_layers += each(0.05 * day + 0.5 * rollouts);
        traffic.ahead += each(0.12 * day + 1.4 * rollouts);
        traffic.registry_wire += each(0.01 * day + 0.05 * rollouts);
        let report = NodeReport { traffic: Some(traffic), ..NodeReport::default() };
        board.learn_at(at, &Event::Reported { node: node.clone(), report });
    }
    board.learn(&Event::NodeSilent(node.clone()));
    board.learn(&Event::NodeGone(node));
}
