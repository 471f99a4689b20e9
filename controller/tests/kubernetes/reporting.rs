//! What is heard is written: once, the newest, and again after everything that may happen in between.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use hermes_controller::crd::{HermesPolicyStatus, PolicyImage, PolicyImagePhase, SeedMode};
use hermes_controller::event::{
    Action, Audience as _, ClusterNode, Event, Failure, FailureClass, ImageKey, ImageView, Name, NodeReport, Phase,
    ReadyIndex, Subject, UnixMillis, WorkloadId, WorkloadKind,
};
use hermes_controller::kubernetes::reports::{Reports, ReportsConfig};
use hermes_image::access::Access;
use hermes_image::ids::Digest;
use hermes_image::statement::{SigningKey, Statement};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::objects::go_hermes;
use crate::world::{RIGHTS, World, install};

/// A driver of reports.
struct Reporting {
    reports: Arc<Reports>,
    task: JoinHandle<()>,
}

impl Reporting {
    fn start(world: &World, sweep_after: Duration) -> Self {
        let reports = Arc::new(Reports::new(ReportsConfig { sweep_after }));
        let client = world.controller().expect("the controller's client");
        let task = {
            let reports = Arc::clone(&reports);
            world.runtime.spawn(async move { reports.write(client).await })
        };
        Self { reports, task }
    }

    fn status(&self, ready: i32, images: &[&str]) {
        let image = |name: &&str| PolicyImage {
            image_digest_ref: (*name).to_owned(),
            platform: "linux/amd64".to_owned(),
            phase: PolicyImagePhase::Ready,
            last_build_time: None,
            error: None,
        };
        let images = images.iter().map(image).collect();
        let status =
            HermesPolicyStatus { ready, images, observed_generation: Some(1), ..HermesPolicyStatus::default() };
        self.reports.hear(&Action::PolicyStatus { policy: "models".to_owned(), status });
    }

    fn tell(&self, about: Subject, message: &str) {
        let message = message.to_owned();
        self.reports.hear(&Action::Tell { about, warning: true, reason: "ImageNotFound", message });
    }
}

fn image(n: u8) -> ImageKey {
    ImageKey { manifest: Digest([n; 32]) }
}

fn object_name(n: u8) -> String {
    format!("sha256-{}", image(n).manifest.hex())
}

fn view(n: u8, phase: Phase) -> Arc<ImageView> {
    let statement = Statement::new(image(n).manifest, "linux/amd64".to_owned(), Vec::new());
    let index = ReadyIndex {
        statement: SigningKey::from_seed(&[7; 32]).sign(&statement).into(),
        artifacts: Arc::new([]),
        index_len_bytes: 1000,
        image_len_bytes: 2000,
    };
    let failure = Failure {
        class: FailureClass::NotFound,
        reason: "ImageNotFound",
        message: "no such image".to_owned(),
        retry_after: None,
    };
    Arc::new(ImageView {
        image: image(n),
        names: [Name { reference: format!("r.example/image:{n}"), platform: "linux/amd64".to_owned() }].into(),
        policies: BTreeSet::from(["models".to_owned()]),
        phase,
        failure: (phase == Phase::Failed).then_some(failure),
        attempts: 1,
        next_attempt: None,
        image_len_bytes: 2000,
        read_bytes: 500,
        since: UnixMillis(1_700_000_000_000),
        index: (phase == Phase::Ready).then_some(index),
        access: Access::Public,
        profile: None,
        seeds: BTreeMap::from([("n1".to_owned(), SeedMode::Full)]),
    })
}

fn json_of(world: &World, arguments: &[&str]) -> Value {
    let text = world.cluster.get(&[arguments, &["-o", "json"]].concat()).expect("an object");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn the_status_of_the_go_hermes_is_taken_over_and_the_newest_is_written() {
    let mut world = go_hermes(1).expect("the Hermes in Go");
    install(&world.cluster).expect("our definitions");
    world.cluster.apply(RIGHTS).expect("the controller's rights");
    let reporting = Reporting::start(&world, Duration::from_secs(600));
    reporting.status(1, &["r.example/vllm@sha256:1"]);
    // What only the other has written is gone, and nothing of the policy itself is touched.
    let columns = ["get", "hp", "models", "--no-headers"];
    let is = |words: [&'static str; 4]| move |text: &str| text.split_whitespace().eq(words);
    world.see(&columns, is(["models", "false", "1", "0"])).expect("our status");
    let policy = json_of(&world, &["get", "hp", "models"]);
    let expected =
        json!([{ "imageDigestRef": "r.example/vllm@sha256:1", "platform": "linux/amd64", "phase": "Ready" }]);
    assert_eq!(policy["status"]["images"], expected);
    assert_eq!(policy["spec"]["imageSelectors"][0]["imageRegex"], ".*vllm.*");

    world.cluster.kill_api_server().expect("it ran");
    reporting.status(2, &[]);
    reporting.status(3, &["r.example/other@sha256:9"]);
    world.cluster.start_api_server().expect("it comes back");
    world.see(&columns, is(["models", "false", "3", "0"])).expect("the newest status");
    let policy = json_of(&world, &["get", "hp", "models"]);
    assert_eq!(policy["status"]["images"][0]["imageDigestRef"], "r.example/other@sha256:9");
    // A policy that is gone holds nothing up.
    world.cluster.get(&["delete", "hp", "models"]).expect("kubectl");
    reporting.status(4, &[]);
    reporting.reports.hear(&Action::Publish(view(1, Phase::Ready)));
    world.see(&["get", "hi", &object_name(1)], |text| text.contains("Ready")).expect("an image");
    assert!(!reporting.task.is_finished());
}

#[test]
fn images_and_events_are_written_counted_and_removed() {
    let world = World::new().expect("a cluster");
    let objects = "{apiVersion: v1, kind: ServiceAccount, metadata: {name: default, namespace: default}}\n---\n\
        {apiVersion: hermes.cloudpilot.ai/v1alpha1, kind: HermesPolicy, metadata: {name: models}}\n---\n\
        {apiVersion: v1, kind: Pod, metadata: {name: p, namespace: default}, spec: {automountServiceAccountToken: false, \
        containers: [{name: c, image: x}]}}\n---\n\
        {apiVersion: batch/v1beta1, kind: CronJob, metadata: {name: cj, namespace: default}, spec: {schedule: '0 0 * * *', \
        jobTemplate: {spec: {template: {spec: {restartPolicy: Never, containers: [{name: c, image: x}]}}}}}}";
    world.cluster.apply(objects).expect("objects");
    let first = Reporting::start(&world, Duration::from_secs(600));
    for (n, phase) in [(1, Phase::Ready), (2, Phase::Failed), (3, Phase::Building)] {
        first.reports.hear(&Action::Publish(view(n, phase)));
    }
    let columns = |n: u8| ["get", "hi", &object_name(n), "--no-headers"].map(str::to_owned);
    let see = |n: u8, words: &str| {
        let columns = columns(n);
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        world.see(&columns, |text| text.split_whitespace().collect::<Vec<_>>().join(" ").contains(words))
    };
    see(1, "r.example/image:1 linux/amd64 Ready").expect("a ready image");
    see(2, "r.example/image:2 linux/amd64 Failed ImageNotFound").expect("a failed image");
    see(3, "r.example/image:3 linux/amd64 Building").expect("an image in the making");
    let ready = json_of(&world, &["get", "hi", &object_name(1)]);
    assert_eq!(ready["status"]["signingKeys"][0], SigningKey::from_seed(&[7; 32]).public().to_string());
    assert_eq!(ready["status"]["seeds"], json!([{ "node": "n1", "mode": "Full" }]));
    assert_eq!(ready["status"]["conditions"][0]["status"], "True");
    assert_eq!(json_of(&world, &["get", "hi", &object_name(3)])["status"]["progressPercent"], 25);

    let workload = |kind, name: &str| {
        Subject::Workload(WorkloadId { kind, namespace: "default".to_owned(), name: name.to_owned() })
    };
    first.tell(workload(WorkloadKind::Pod, "gone"), "nobody hears this");
    for about in [
        Subject::Policy("models".to_owned()),
        Subject::Image(image(2)),
        workload(WorkloadKind::Pod, "p"),
        workload(WorkloadKind::CronJob, "cj"),
    ] {
        first.tell(about.clone(), "no such image");
        first.tell(about, "no such image");
    }
    let events = || {
        let events = json_of(&world, &["-n", "default", "get", "events"]);
        let mut told: Vec<String> = Vec::new();
        for event in events["items"].as_array().into_iter().flatten() {
            let involved = &event["involvedObject"];
            assert!(involved["uid"].as_str().is_some_and(|uid| !uid.is_empty()), "{event}");
            told.push(format!("{} {}", involved["kind"].as_str().unwrap_or_default(), event["count"]));
        }
        told.sort();
        told.join(", ")
    };
    let wanted = "CronJob 2, HermesImage 2, HermesPolicy 2, Pod 2";
    let seen = hermes_tests::guard::wait_for("Events", crate::world::DEADLINE, || (events() == wanted).then_some(()));
    seen.unwrap_or_else(|error| panic!("{error:#}: {}", events()));
    let described = world.cluster.get(&["describe", "hp", "models"]).expect("kubectl");
    assert!(described.contains("ImageNotFound") && described.contains("hermes-controller"), "{described}");

    first.reports.hear(&Action::Withdraw(image(3)));
    world.see(&["get", "hi"], |text| !text.contains(&object_name(3))).expect("it is removed");

    // Another run: what is still so is not written, what nobody says any more is removed.
    first.task.abort();
    let before = json_of(&world, &["get", "hi", &object_name(1)]);
    let second = Reporting::start(&world, Duration::from_secs(1));
    second.reports.hear(&Action::Publish(view(1, Phase::Ready)));
    second.reports.learn(&Event::Synced);
    world.see(&["get", "hi"], |text| !text.contains(&object_name(2))).expect("it is removed");
    assert_eq!(
        json_of(&world, &["get", "hi", &object_name(1)])["metadata"]["resourceVersion"],
        before["metadata"]["resourceVersion"]
    );
    assert!(!second.task.is_finished());
}

#[test]
fn a_node_is_written_when_it_changes_and_not_too_often() {
    let world = World::new().expect("a cluster");
    let reporting = Reporting::start(&world, Duration::from_secs(600));
    let report = |used: u64| {
        let images = BTreeMap::from([(image(1).manifest, 43), (image(2).manifest, 100)]);
        let report = NodeReport {
            version: "0.1.0".to_owned(),
            peer: "12D3".to_owned(),
            ways: vec!["fuse".to_owned(), "erofs-files".to_owned()],
            store_used_bytes: used << 30,
            images,
            ..NodeReport::default()
        };
        reporting.reports.learn(&Event::Reported { node: "n1".to_owned(), report });
    };
    reporting.reports.hear(&Action::Publish(view(1, Phase::Ready)));
    let cluster_node = |name: &str| ClusterNode {
        name: name.to_owned(),
        labels: BTreeMap::new(),
        zone: String::new(),
        schedulable: true,
    };
    let path = ["get", "hn", "n1", "-o", "jsonpath={.status.connected} {.status.storeUsedBytes}"];
    let see = |words: &str| drop(world.see(&path, |text| text == words).expect("a node"));
    report(1);
    // What is no node of the cluster gets no object; which comes first does not matter.
    reporting.reports.learn(&Event::Node(cluster_node("n1")));
    see(&format!("true {}", 1_u64 << 30));
    let written_at = || {
        let node = json_of(&world, &["get", "hn", "n1"]);
        let entries = node["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
        let status = entries.iter().find(|entry| entry["fieldsV1"]["f:status"].is_object());
        let time = status.and_then(|entry| entry["time"].as_str()).expect("a status that was applied");
        time.parse::<Timestamp>().expect("a moment").as_second()
    };
    let first = written_at();
    report(2);
    report(3);
    see(&format!("true {}", 3_u64 << 30));
    // Moments of the API server, in whole seconds.
    assert!(written_at() - first >= 9, "{first} and {}", written_at());
    let node = json_of(&world, &["get", "hn", "n1"]);
    let first = json!({ "digest": image(1).manifest.to_string(), "name": "r.example/image:1", "percent": 40 });
    assert_eq!(node["status"]["images"][0], first);
    assert_eq!((&node["status"]["imageCount"], &node["status"]["completeCount"]), (&json!(2), &json!(1)));
    // Another run, to which the node does not come back.
    reporting.task.abort();
    let reporting = Reporting::start(&world, Duration::from_secs(1));
    reporting.reports.learn(&Event::Node(cluster_node("n1")));
    reporting.reports.learn(&Event::Synced);
    see(&format!("false {}", 3_u64 << 30));
    reporting.reports.learn(&Event::Reported {
        node: "n1".to_owned(),
        report: NodeReport { version: "0.2.0".to_owned(), peer: "12D3".to_owned(), ..NodeReport::default() },
    });
    see("true 0");
    reporting.reports.learn(&Event::NodeSilent("n1".to_owned()));
    see("false 0");
    reporting.reports.learn(&Event::NodeGone("n1".to_owned()));
    world.see(&["get", "hn"], |text| !text.contains("n1")).expect("it is removed");
}
