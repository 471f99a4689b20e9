//! What is read of Kubernetes' objects, and what it says.
//!
//! The types hold only the fields that matter; everything else is skipped while a page of a list is parsed, so that a
//! cluster's size shows in the number of small facts and never in that of whole objects. Fields are optional even where
//! Kubernetes has them always: one odd object must not make a whole list unreadable.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::Object;
use kube::core::object::NotUsed;
use serde::Deserialize;

use crate::crd::HermesPolicySpec;
use crate::event::{ClusterNode, Policy, SecretRef, Workload, WorkloadId, WorkloadKind};

/// Longest image name that is looked at, in bytes. Registries take 255 for a repository and 128 for a tag; with a host
/// and a digest that is half of this.
const IMAGE_NAME_LEN_MAX_BYTES: usize = 1024;
/// Most pull secrets of one workload that are looked at; each may cost a request for every image.
const PULL_SECRETS_MAX: usize = 32;
/// The zone of a node, and the name that it had before Kubernetes 1.17.
const ZONE_LABELS: [&str; 2] = ["topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"];
/// Taints by which the cluster autoscaler, Karpenter (old and new) and cloud providers say that a node is about to go.
const LEAVING_TAINTS: [&str; 4] = [
    "ToBeDeletedByClusterAutoscaler",
    "karpenter.sh/disruption",
    "karpenter.sh/disrupted",
    "node.cloudprovider.kubernetes.io/shutdown",
];

/// Where a namespaced object is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) namespace: String,
    pub(super) name: String,
}

/// What one object says.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Thing {
    Policy(Policy),
    Node(ClusterNode),
    /// A ServiceAccount, by the pull secrets that its pods get.
    Account(Place, Vec<String>),
    /// A workload; for a template that names no pull secrets, with the name of the ServiceAccount whose it gets.
    Workload(Workload, Option<String>),
}

/// One object, or that it counts no more.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Reading {
    There(Thing),
    /// By its place; that of a thing of the whole cluster has no namespace.
    Gone(Place),
}

pub(super) type PolicyObject = Object<Option<serde_json::Value>, NotUsed>;
pub(super) type NodeObject = Object<Option<NodeSpec>, NodeStatus>;
pub(super) type PodObject = Object<Option<PodSpec>, PodStatus>;
pub(super) type TemplateObject = Object<Option<TemplateSpec>, TemplateStatus>;
pub(super) type CronJobObject = Object<Option<CronJobSpec>, NotUsed>;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct NodeSpec {
    unschedulable: Option<bool>,
    taints: Option<Vec<Taint>>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Taint {
    key: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct NodeStatus {
    conditions: Option<Vec<StatusCondition>>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct StatusCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PodSpec {
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
    ephemeral_containers: Option<Vec<Container>>,
    image_pull_secrets: Option<Vec<SecretName>>,
    service_account_name: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Container {
    image: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct SecretName {
    name: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct PodStatus {
    phase: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct TemplateSpec {
    template: Option<Template>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Template {
    spec: Option<PodSpec>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct TemplateStatus {
    conditions: Option<Vec<StatusCondition>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct CronJobSpec {
    job_template: Option<JobTemplate>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct JobTemplate {
    spec: Option<TemplateSpec>,
}

/// A policy. One that cannot be read counts as gone: the API server checks them by the definition, so somebody has
/// installed another one.
pub(super) fn policy(object: PolicyObject) -> Reading {
    let place = place(&object.metadata);
    let spec = object.spec.unwrap_or_else(|| serde_json::json!({}));
    match serde_json::from_value::<HermesPolicySpec>(spec) {
        Ok(spec) => Reading::There(Thing::Policy(Policy {
            name: place.name,
            generation: object.metadata.generation.unwrap_or_default(),
            spec,
        })),
        Err(error) => {
            tracing::error!(policy = place.name, %error, "policy ignored: install the definitions of this version");
            Reading::Gone(place)
        }
    }
}

/// A node.
pub(super) fn node(object: NodeObject) -> Reading {
    let (spec, status) = (object.spec.unwrap_or_default(), object.status.unwrap_or_default());
    let leaving = spec.taints.iter().flatten().any(|taint| LEAVING_TAINTS.contains(&taint.key.as_str()));
    let name = object.metadata.name.unwrap_or_default();
    let labels = object.metadata.labels.unwrap_or_default();
    Reading::There(Thing::Node(ClusterNode {
        name,
        zone: zone(&labels),
        schedulable: is_so(status.conditions.as_deref(), "Ready")
            && spec.unschedulable != Some(true)
            && !leaving
            && object.metadata.deletion_timestamp.is_none(),
        labels,
    }))
}

/// A ServiceAccount; gone when its pods get no pull secrets from it.
pub(super) fn account(object: ServiceAccount) -> Reading {
    let place = place(&object.metadata);
    let names = object.image_pull_secrets.unwrap_or_default().into_iter().map(|secret| secret.name);
    let names: Vec<String> = names.filter(|name| !name.is_empty()).take(PULL_SECRETS_MAX).collect();
    if names.is_empty() { Reading::Gone(place) } else { Reading::There(Thing::Account(place, names)) }
}

/// A pod; gone when it has ended, since nothing of it will start again. Kubernetes itself has given it the pull secrets
/// of its ServiceAccount if it had none.
pub(super) fn pod(object: PodObject) -> Reading {
    let place = place(&object.metadata);
    let phase = object.status.unwrap_or_default().phase.unwrap_or_default();
    if matches!(phase.as_str(), "Succeeded" | "Failed") {
        return Reading::Gone(place);
    }
    let (mut workload, _) = workload(WorkloadKind::Pod, place, object.spec.unwrap_or_default());
    workload.waiting = matches!(phase.as_str(), "Pending" | "");
    Reading::There(Thing::Workload(workload, None))
}

/// A Deployment, StatefulSet, DaemonSet or Job; gone when it is a Job that has ended.
pub(super) fn template(kind: WorkloadKind, object: TemplateObject) -> Reading {
    let place = place(&object.metadata);
    let conditions = object.status.unwrap_or_default().conditions;
    let ended = ["Complete", "Failed"].iter().any(|condition| is_so(conditions.as_deref(), condition));
    if kind == WorkloadKind::Job && ended {
        return Reading::Gone(place);
    }
    from_template(kind, place, object.spec.unwrap_or_default())
}

/// A CronJob, a suspended one, too: it names what it will start.
pub(super) fn cron_job(object: CronJobObject) -> Reading {
    let spec = object.spec.and_then(|spec| spec.job_template).and_then(|template| template.spec);
    from_template(WorkloadKind::CronJob, place(&object.metadata), spec.unwrap_or_default())
}

fn from_template(kind: WorkloadKind, place: Place, spec: TemplateSpec) -> Reading {
    let spec = spec.template.and_then(|template| template.spec).unwrap_or_default();
    let (workload, account) = workload(kind, place, spec);
    // As Kubernetes does it when it makes the pod: those of the account only where the template names none.
    let account = workload.pull_secrets.is_empty().then_some(account);
    Reading::There(Thing::Workload(workload, account))
}

fn workload(kind: WorkloadKind, place: Place, spec: PodSpec) -> (Workload, String) {
    let lists = [spec.init_containers, spec.containers, spec.ephemeral_containers];
    let images = lists.into_iter().flatten().flatten().filter_map(|container| container.image);
    let images = images.filter(|image| !image.is_empty() && image.len() <= IMAGE_NAME_LEN_MAX_BYTES);
    let secrets = spec.image_pull_secrets.into_iter().flatten().filter_map(|secret| secret.name);
    let secrets = secrets.filter(|name| !name.is_empty()).take(PULL_SECRETS_MAX);
    let account = spec.service_account_name.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".to_owned());
    let workload = Workload {
        images: images.collect::<BTreeSet<_>>(),
        pull_secrets: secrets.map(|name| SecretRef { namespace: place.namespace.clone(), name }).collect(),
        waiting: false,
        id: WorkloadId { kind, namespace: place.namespace, name: place.name },
    };
    (workload, account)
}

/// Where an object is.
pub(super) fn place(metadata: &ObjectMeta) -> Place {
    Place { namespace: metadata.namespace.clone().unwrap_or_default(), name: metadata.name.clone().unwrap_or_default() }
}

fn is_so(conditions: Option<&[StatusCondition]>, kind: &str) -> bool {
    conditions.unwrap_or_default().iter().any(|condition| condition.kind == kind && condition.status == "True")
}

fn zone(labels: &BTreeMap<String, String>) -> String {
    ZONE_LABELS.iter().find_map(|label| labels.get(*label)).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).expect("an object")
    }

    fn of(reading: Reading) -> (Workload, Option<String>) {
        match reading {
            Reading::There(Thing::Workload(workload, account)) => (workload, account),
            other => panic!("no workload: {other:?}"),
        }
    }

    #[test]
    fn a_pod_names_the_images_of_all_its_containers() {
        let object = json!({
            "metadata": { "name": "p", "namespace": "n", "managedFields": [{ "manager": "m", "fieldsV1": { "f:spec": {} } }] },
            "spec": {
                "containers": [{ "image": "a:1", "name": "x" }, { "image": "a:1" }, { "name": "odd" }],
                "initContainers": [{ "image": "b" }], "ephemeralContainers": [{ "image": "c" }, { "image": "d".repeat(2000) }],
                "imagePullSecrets": [{ "name": "s" }, {}], "nodeName": "x",
            },
            "status": { "phase": "Pending", "podIP": "1.2.3.4" },
        });
        let (workload, account) = of(pod(read(object.clone())));
        assert_eq!(workload.images.iter().map(String::as_str).collect::<Vec<_>>(), ["a:1", "b", "c"]);
        assert_eq!(workload.pull_secrets.iter().map(ToString::to_string).collect::<Vec<_>>(), ["n/s"]);
        assert!(workload.waiting && account.is_none());
        for (phase, waits) in [("Running", Some(false)), ("Succeeded", None), ("Failed", None)] {
            let mut object = object.clone();
            object["status"]["phase"] = json!(phase);
            match pod(read(object)) {
                Reading::There(Thing::Workload(workload, _)) => assert_eq!(Some(workload.waiting), waits),
                other => {
                    assert_eq!((other, waits), (Reading::Gone(Place { namespace: "n".into(), name: "p".into() }), None))
                }
            }
        }
    }

    #[test]
    fn templates_are_read_at_their_places() {
        let spec =
            json!({ "template": { "spec": { "containers": [{ "image": "a" }], "serviceAccountName": "robot" } } });
        let object = json!({ "metadata": { "name": "t", "namespace": "n" }, "spec": spec });
        let (workload, account) = of(template(WorkloadKind::Deployment, read(object.clone())));
        assert_eq!((workload.images.len(), account.as_deref()), (1, Some("robot")));
        let nested =
            json!({ "metadata": { "name": "t", "namespace": "n" }, "spec": { "jobTemplate": { "spec": spec } } });
        assert_eq!(of(cron_job(read(nested))).0.images, workload.images);
        let mut ended = object.clone();
        ended["status"] = json!({ "conditions": [{ "type": "Failed", "status": "True" }] });
        assert!(matches!(template(WorkloadKind::Job, read(ended.clone())), Reading::Gone(_)));
        assert!(matches!(template(WorkloadKind::Deployment, read(ended)), Reading::There(_)));
        let mut own = object;
        own["spec"]["template"]["spec"]["imagePullSecrets"] = json!([{ "name": "s" }]);
        assert_eq!(of(template(WorkloadKind::Job, read(own))).1, None);
        // Nothing that should be there is.
        let (workload, account) = of(cron_job(read(json!({ "metadata": { "name": "t" }, "spec": null }))));
        assert_eq!((workload.images.len(), account.as_deref()), (0, Some("default")));
    }

    #[test]
    fn a_node_is_schedulable_when_it_is_ready_and_stays() {
        let object = |unschedulable: bool, ready: &str, taint: &str| {
            let object = json!({
                "metadata": { "name": "n", "labels": { "topology.kubernetes.io/zone": "z" } },
                "spec": { "unschedulable": unschedulable, "taints": [{ "key": taint, "effect": "NoSchedule" }] },
                "status": { "conditions": [{ "type": "Ready", "status": ready, "reason": "x" }] },
            });
            match node(read(object)) {
                Reading::There(Thing::Node(node)) => (node.zone, node.schedulable),
                other => panic!("no node: {other:?}"),
            }
        };
        assert_eq!(object(false, "True", "nvidia.com/gpu"), ("z".to_owned(), true));
        assert!(!object(true, "True", "x").1 && !object(false, "Unknown", "x").1);
        assert!(!object(false, "True", "karpenter.sh/disrupted").1);
    }

    #[test]
    fn a_policy_may_have_no_spec_and_one_that_cannot_be_read_is_gone() {
        let without = policy(read(json!({ "metadata": { "name": "p", "generation": 3 } })));
        let expected = Policy { name: "p".to_owned(), generation: 3, spec: HermesPolicySpec::default() };
        assert_eq!(without, Reading::There(Thing::Policy(expected)));
        let odd = json!({ "metadata": { "name": "p" }, "spec": { "imageSelectors": 7 } });
        assert!(matches!(policy(read(odd)), Reading::Gone(_)));
    }
}
