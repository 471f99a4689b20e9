//! Events: what happened, beside the object that it happened to.
//!
//! The same thing told again counts the Event up that is there, under one name that follows from what is told. How often
//! is remembered for the newest [`TALES_MAX`]; a restart counts from one again.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::Patch;
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Resource as _};

use super::views::image_name;
use super::write::{Bare, Failed, Writer, applying, in_time, policies};
use crate::crd::{GROUP, VERSION};
use crate::event::{Subject, WorkloadId, WorkloadKind};
use crate::kubernetes::MANAGER;

/// Most things that are remembered as told.
pub(super) const TALES_MAX: usize = 1000;
/// Longest message that the API server takes for an Event is 1024 bytes; characters may have four.
const MESSAGE_LEN_MAX_BYTES: usize = 1024;
/// Where Events about things of the whole cluster are.
const CLUSTER_NAMESPACE: &str = "default";
/// Longest part of an object's name in the name of an Event, which must not be longer than 253 characters.
const NAME_LEN_MAX: usize = 200;

/// What is told of what.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tale {
    pub(super) about: Subject,
    pub(super) warning: bool,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// How often it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) count: i32,
    pub(super) first: Timestamp,
    pub(super) last: Timestamp,
}

/// What was told.
#[derive(Debug, Default)]
pub(super) struct Tales {
    all: BTreeMap<Tale, Told>,
}

impl Tales {
    /// Notes that something is told at `now`, and says how often it was.
    pub(super) fn note(&mut self, tale: &Tale, now: Timestamp) -> Told {
        if self.all.len() >= TALES_MAX && !self.all.contains_key(tale) {
            let oldest = self.all.iter().min_by_key(|(_, told)| told.last).map(|(tale, _)| tale.clone());
            oldest.map(|tale| self.all.remove(&tale));
        }
        let told = self.all.entry(tale.clone()).or_insert(Told { count: 0, first: now, last: now });
        (told.count, told.last) = (told.count.saturating_add(1), now);
        *told
    }
}

impl Writer {
    /// Makes or counts up the Event. Nothing is told of what is gone.
    pub(super) async fn tell(&self, tale: &Tale, told: &Told, uid: Option<String>) -> Result<(), Failed> {
        let Some(involved) = self.involved(&tale.about, uid).await? else { return Ok(()) };
        let namespace = involved.namespace.clone().unwrap_or_else(|| CLUSTER_NAMESPACE.to_owned());
        let name = event_name(tale, &involved);
        let event = Event {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            involved_object: involved,
            type_: Some(if tale.warning { "Warning" } else { "Normal" }.to_owned()),
            reason: Some(tale.reason.to_owned()),
            message: Some(shortened(&tale.message)),
            count: Some(told.count),
            first_timestamp: Some(Time(told.first)),
            last_timestamp: Some(Time(told.last)),
            source: Some(EventSource { component: Some(MANAGER.to_owned()), host: None }),
            reporting_component: Some(MANAGER.to_owned()),
            reporting_instance: Some(MANAGER.to_owned()),
            ..Event::default()
        };
        let api = Api::<Event>::namespaced(self.client.clone(), &namespace);
        in_time(api.patch(&name, &applying(), &Patch::Apply(&event))).await.map(drop)
    }

    /// The object that a tale is about, if it is there.
    async fn involved(&self, about: &Subject, uid: Option<String>) -> Result<Option<ObjectReference>, Failed> {
        let reference = |kind: &str, name: &str, uid| ObjectReference {
            api_version: Some(format!("{GROUP}/{VERSION}")),
            kind: Some(kind.to_owned()),
            name: Some(name.to_owned()),
            uid,
            ..ObjectReference::default()
        };
        match about {
            Subject::Policy(name) => {
                let api = Api::<Bare>::all_with(self.client.clone(), &policies());
                let there = in_time(api.get_opt(name)).await?;
                Ok(there.map(|object| reference("HermesPolicy", name, object.metadata.uid)))
            }
            Subject::Image(image) => match uid {
                Some(uid) => Ok(Some(reference("HermesImage", &image_name(image), Some(uid)))),
                // It is written at the same time.
                None => Err(Failed::Later("the object of the image is not written yet".to_owned())),
            },
            Subject::Workload(id) => self.involved_workload(id).await,
        }
    }

    async fn involved_workload(&self, id: &WorkloadId) -> Result<Option<ObjectReference>, Failed> {
        for resource in resources(id.kind) {
            let api = Api::<Bare>::namespaced_with(self.client.clone(), &id.namespace, &resource);
            if let Some(object) = in_time(api.get_opt(&id.name)).await? {
                return Ok(Some(ObjectReference {
                    api_version: Some(resource.api_version),
                    kind: Some(resource.kind),
                    namespace: Some(id.namespace.clone()),
                    name: Some(id.name.clone()),
                    uid: object.meta().uid.clone(),
                    ..ObjectReference::default()
                }));
            }
        }
        Ok(None)
    }
}

/// Where objects of a kind may be; CronJobs have moved with Kubernetes 1.21.
fn resources(kind: WorkloadKind) -> Vec<ApiResource> {
    let at = |group, version, kind, plural| {
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
    };
    match kind {
        WorkloadKind::Pod => vec![at("", "v1", "Pod", "pods")],
        WorkloadKind::Deployment => vec![at("apps", "v1", "Deployment", "deployments")],
        WorkloadKind::StatefulSet => vec![at("apps", "v1", "StatefulSet", "statefulsets")],
        WorkloadKind::DaemonSet => vec![at("apps", "v1", "DaemonSet", "daemonsets")],
        WorkloadKind::Job => vec![at("batch", "v1", "Job", "jobs")],
        WorkloadKind::CronJob => {
            vec![at("batch", "v1", "CronJob", "cronjobs"), at("batch", "v1beta1", "CronJob", "cronjobs")]
        }
    }
}

/// The same for the same tale of the same object.
fn event_name(tale: &Tale, involved: &ObjectReference) -> String {
    let facts = (&involved.uid, tale.warning, tale.reason, &tale.message);
    let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(facts);
    let name: String = involved.name.iter().flat_map(|name| name.chars()).take(NAME_LEN_MAX).collect();
    format!("{}.{hash:016x}", name.trim_end_matches(['.', '-']))
}

fn shortened(message: &str) -> String {
    let mut end = message.len().min(MESSAGE_LEN_MAX_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    message[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tale(n: usize) -> Tale {
        Tale { about: Subject::Policy("p".to_owned()), warning: false, reason: "Ready", message: n.to_string() }
    }

    #[test]
    fn the_same_is_counted_and_the_oldest_forgotten() {
        let mut tales = Tales::default();
        let at = |second| Timestamp::from_second(second).expect("a moment");
        assert_eq!(tales.note(&tale(0), at(1)), Told { count: 1, first: at(1), last: at(1) });
        assert_eq!(tales.note(&tale(0), at(2)), Told { count: 2, first: at(1), last: at(2) });
        for n in 1..=TALES_MAX {
            tales.note(&tale(n), at(3));
        }
        assert_eq!(tales.all.len(), TALES_MAX);
        assert_eq!(tales.note(&tale(0), at(4)).count, 1);
        assert_eq!(tales.note(&tale(TALES_MAX), at(5)).count, 2);
    }

    #[test]
    fn messages_end_at_a_character() {
        assert_eq!(shortened(&"ä".repeat(600)).len(), 1024);
        assert_eq!(shortened(&format!("a{}", "ä".repeat(600))).len(), 1023);
    }

    #[test]
    fn an_event_has_one_name_for_one_tale() {
        let involved = ObjectReference { name: Some("x".repeat(253)), ..ObjectReference::default() };
        let name = event_name(&tale(1), &involved);
        assert!(
            name.len() <= 253 && name == event_name(&tale(1), &involved) && name != event_name(&tale(2), &involved)
        );
    }
}
