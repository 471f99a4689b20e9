use std::collections::{BTreeMap, BTreeSet};

use hermes_image::access::Access;
use hermes_image::ids::Digest;

use super::*;
use crate::event::{Failure, FailureClass, ImageView, Subject};

fn view(phase: Phase) -> Action {
    Action::Publish(Arc::new(ImageView {
        image: ImageKey { manifest: Digest([7; 32]) },
        names: BTreeSet::new(),
        policies: BTreeSet::new(),
        phase,
        failure: None,
        attempts: 1,
        next_attempt: None,
        image_len_bytes: 1,
        read_bytes: 0,
        since: UnixMillis(clock::now().0 - 60_000),
        index: None,
        access: Access::Public,
        profile: None,
        seeds: BTreeMap::new(),
    }))
}

fn failed(reason: &'static str) -> Event {
    let failure = Failure { class: FailureClass::Transient, reason, message: String::new(), retry_after: None };
    Event::Built { image: ImageKey { manifest: Digest([7; 32]) }, outcome: Err(failure) }
}

fn has(metrics: &Metrics, line: &str) {
    let text = metrics.text();
    assert!(text.lines().any(|known| known == line), "'{line}' is missing in:\n{text}");
}

#[test]
fn the_table_keeps_prometheus_rules() {
    assert_eq!(hermes_metrics::broken_rules(METRICS), Vec::<String>::new());
}

#[test]
fn what_becomes_of_images_is_counted() {
    let metrics = Metrics::default();
    metrics.hear(&view(Phase::Pending));
    has(&metrics, "hermes_controller_images{phase=\"pending\"} 1");
    let age = metrics.text();
    let age = age.lines().find_map(|line| line.strip_prefix("hermes_controller_oldest_unready_seconds "));
    assert!(age.and_then(|age| age.parse::<f64>().ok()).is_some_and(|age| age >= 60.0), "{age:?}");
    metrics.hear(&view(Phase::Building));
    metrics.learn(&failed("RegistryThrottles"));
    metrics.learn(&failed("SomethingOfTomorrow"));
    metrics.hear(&view(Phase::Ready));
    // Said again, as after an exchange of keys: not built again.
    metrics.hear(&view(Phase::Ready));
    let about = Subject::Policy("p".to_owned());
    metrics.hear(&Action::Tell { about, warning: false, reason: "TagMoved", message: String::new() });
    for line in [
        "hermes_controller_builds_total 1",
        "hermes_controller_build_failures_total{reason=\"registry_throttles\"} 1",
        "hermes_controller_build_failures_total{reason=\"other\"} 1",
        "hermes_controller_images{phase=\"ready\"} 1",
        "hermes_controller_images{phase=\"pending\"} 0",
        "hermes_controller_oldest_unready_seconds 0",
        "hermes_controller_tags_moved_total 1",
        "hermes_controller_api_refusals_total{reason=\"other_node\"} 0",
        "hermes_controller_publish_seconds_count 0",
    ] {
        has(&metrics, line);
    }
    metrics.hear(&Action::Withdraw(ImageKey { manifest: Digest([7; 32]) }));
    has(&metrics, "hermes_controller_images{phase=\"ready\"} 0");
}

#[test]
fn a_standby_is_ready_and_a_leader_when_it_knows_what_is_there() {
    let metrics = Metrics::default();
    assert!(metrics.missing().is_some());
    metrics.stands(Role::Standby);
    assert_eq!(metrics.missing(), None);
    metrics.stands(Role::Leader);
    assert!(metrics.missing().is_some());
    metrics.learn(&Event::Synced);
    assert_eq!(metrics.missing(), None);
    has(&metrics, "hermes_controller_leader 1");
}
