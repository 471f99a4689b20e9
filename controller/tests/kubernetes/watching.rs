//! Facts arrive from objects of each kind, also when the API server dies in between.

use std::collections::BTreeMap;

use hermes_controller::event::{ClusterNode, Event, Policy, Workload, WorkloadId, WorkloadKind};
use hermes_controller::kubernetes::watch;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::world::{DEADLINE, World};

/// One of each kind. The account of `robot` comes after the template that names it, as it may in a list.
const OBJECTS: &str = r#"
{apiVersion: v1, kind: ServiceAccount, metadata: {name: robot, namespace: default}, imagePullSecrets: [{name: login}]}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: default, namespace: default}}
---
{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/zone: z1, pool: gpu}}}
---
{apiVersion: hermes.cloudpilot.ai/v1alpha1, kind: HermesPolicy, metadata: {name: models},
 spec: {imageSelectors: [{imageRegex: vllm}], platforms: [linux/amd64]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: default}, spec: {automountServiceAccountToken: false,
 serviceAccountName: robot, initContainers: [{name: i, image: "r.example/init:1"}],
 containers: [{name: c, image: "r.example/vllm:1"}]}}
---
{apiVersion: apps/v1, kind: Deployment, metadata: {name: d, namespace: default}, spec: {selector: {matchLabels: {a: b}},
 template: {metadata: {labels: {a: b}}, spec: {serviceAccountName: robot, containers: [{name: c, image: "r.example/d"}]}}}}
---
{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: s, namespace: default}, spec: {serviceName: s,
 selector: {matchLabels: {a: b}}, template: {metadata: {labels: {a: b}}, spec: {imagePullSecrets: [{name: own}],
 serviceAccountName: robot, containers: [{name: c, image: "r.example/s"}]}}}}
---
{apiVersion: apps/v1, kind: DaemonSet, metadata: {name: ds, namespace: default}, spec: {selector: {matchLabels: {a: b}},
 template: {metadata: {labels: {a: b}}, spec: {containers: [{name: c, image: "r.example/ds"}]}}}}
---
{apiVersion: batch/v1, kind: Job, metadata: {name: j, namespace: default}, spec: {template: {spec: {restartPolicy: Never,
 containers: [{name: c, image: "r.example/j"}]}}}}
---
{apiVersion: batch/v1beta1, kind: CronJob, metadata: {name: cj, namespace: default}, spec: {schedule: "0 0 * * *",
 suspend: true, jobTemplate: {spec: {template: {spec: {restartPolicy: Never,
 containers: [{name: c, image: "r.example/cj"}]}}}}}}
"#;

/// What the events so far come to.
#[derive(Debug, Default, PartialEq)]
struct Picture {
    policies: BTreeMap<String, Policy>,
    nodes: BTreeMap<String, ClusterNode>,
    workloads: BTreeMap<WorkloadId, Workload>,
    synced: u32,
}

impl Picture {
    fn take(&mut self, event: Event) {
        match event {
            Event::Policy(policy) => drop(self.policies.insert(policy.name.clone(), policy)),
            Event::PolicyGone(name) => assert!(self.policies.remove(&name).is_some(), "{name} was not there"),
            Event::Node(node) => drop(self.nodes.insert(node.name.clone(), node)),
            Event::NodeGone(name) => assert!(self.nodes.remove(&name).is_some(), "{name} was not there"),
            Event::Workload(workload) => drop(self.workloads.insert(workload.id.clone(), workload)),
            Event::WorkloadGone(id) => assert!(self.workloads.remove(&id).is_some(), "{id:?} was not there"),
            Event::Synced => self.synced += 1,
            other => panic!("no fact of the cluster: {other:?}"),
        }
    }

    /// The images of a workload, and the names of its pull secrets.
    fn of(&self, kind: WorkloadKind, name: &str) -> Option<(String, String)> {
        let id = WorkloadId { kind, namespace: "default".to_owned(), name: name.to_owned() };
        let workload = self.workloads.get(&id)?;
        let secrets: Vec<String> = workload.pull_secrets.iter().map(ToString::to_string).collect();
        Some((workload.images.iter().cloned().collect::<Vec<_>>().join(" "), secrets.join(" ")))
    }
}

/// A driver, and the picture that it gives.
struct Watched {
    events: mpsc::Receiver<Event>,
    picture: Picture,
}

impl Watched {
    fn start(world: &World) -> Self {
        // A small queue: the driver waits for the test.
        let (sender, events) = mpsc::channel(4);
        world.runtime.spawn(watch::run(world.controller().expect("the controller's client"), sender));
        Self { events, picture: Picture::default() }
    }

    /// Takes events until the picture is as wanted.
    fn until(&mut self, world: &World, what: &str, wanted: impl Fn(&Picture) -> bool) {
        world.runtime.block_on(async {
            while !wanted(&self.picture) {
                let event = timeout(DEADLINE, self.events.recv()).await;
                match event {
                    Ok(Some(event)) => self.picture.take(event),
                    other => panic!("waiting for {what}: {other:?}; have {:#?}", self.picture),
                }
            }
        });
    }
}

fn pair(images: &str, secrets: &str) -> Option<(String, String)> {
    Some((images.to_owned(), secrets.to_owned()))
}

#[test]
fn every_kind_is_told_and_followed() {
    let world = World::new().expect("a cluster");
    world.cluster.apply(OBJECTS).expect("objects");
    let mut watched = Watched::start(&world);
    watched.until(&world, "everything", |picture| picture.synced == 1);
    let picture = &watched.picture;
    assert_eq!(picture.policies["models"].spec.image_selectors[0].image_regex, "vllm");
    let node = &picture.nodes["n1"];
    assert_eq!((node.zone.as_str(), node.labels["pool"].as_str(), node.schedulable), ("z1", "gpu", false));
    for (kind, name, images, secrets) in [
        (WorkloadKind::Pod, "p", "r.example/init:1 r.example/vllm:1", "default/login"),
        (WorkloadKind::Deployment, "d", "r.example/d", "default/login"),
        (WorkloadKind::StatefulSet, "s", "r.example/s", "default/own"),
        (WorkloadKind::DaemonSet, "ds", "r.example/ds", ""),
        (WorkloadKind::Job, "j", "r.example/j", ""),
        (WorkloadKind::CronJob, "cj", "r.example/cj", ""),
    ] {
        assert_eq!(picture.of(kind, name), pair(images, secrets), "{kind:?}");
    }
    assert!(picture.workloads.values().all(|workload| workload.waiting == (workload.id.kind == WorkloadKind::Pod)));

    let run = |arguments: &[&str]| drop(world.cluster.get(arguments).expect("kubectl"));
    run(&["set", "image", "deployment/d", "c=r.example/d:2"]);
    watched.until(&world, "another image", |picture| {
        picture.of(WorkloadKind::Deployment, "d") == pair("r.example/d:2", "default/login")
    });
    run(&["patch", "serviceaccount", "robot", "--patch", r#"{"imagePullSecrets":[{"name":"new"}]}"#]);
    watched.until(&world, "another account", |picture| {
        picture.of(WorkloadKind::Deployment, "d").is_some_and(|(_, secrets)| secrets.contains("new"))
    });
    run(&["delete", "hp", "models"]);
    run(&["delete", "cronjob", "cj"]);
    run(&["delete", "node", "n1"]);
    watched.until(&world, "what is gone", |picture| {
        picture.policies.is_empty() && picture.nodes.is_empty() && picture.of(WorkloadKind::CronJob, "cj").is_none()
    });
    assert_eq!(watched.picture.synced, 1);
}

#[test]
fn what_changes_while_the_api_server_is_away_is_told_afterwards() {
    let mut world = World::new().expect("a cluster");
    world.cluster.apply(OBJECTS).expect("objects");
    let mut watched = Watched::start(&world);
    watched.until(&world, "everything", |picture| picture.synced == 1);
    world.cluster.kill_api_server().expect("it ran");
    world.cluster.start_api_server().expect("it comes back");
    // The new API server does not know the old one's versions: what was watched is listed anew.
    for arguments in [["delete", "job", "j"], ["delete", "hp", "models"]] {
        world.cluster.get(&arguments).expect("kubectl");
    }
    world.cluster.get(&["set", "image", "daemonset/ds", "c=r.example/ds:2"]).expect("kubectl");
    watched.until(&world, "what has changed", |picture| {
        picture.policies.is_empty()
            && picture.of(WorkloadKind::Job, "j").is_none()
            && picture.of(WorkloadKind::DaemonSet, "ds") == pair("r.example/ds:2", "")
    });
    assert!(watched.picture.of(WorkloadKind::Pod, "p").is_some());
    assert_eq!(watched.picture.synced, 1);
}
