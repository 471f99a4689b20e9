//! Following one kind of object, whatever the API server does.
//!
//! The watcher of kube lists and watches and takes a broken watch up again. Added here are the waits between tries, a
//! fresh start where taking up cannot help (the server says that the version is too old or not there yet, or fails again
//! and again), and the search for the version in which the server has CronJobs.

use std::fmt::Debug;
use std::pin::pin;

use futures::StreamExt as _;
use hermes_p2p::error::in_full;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::WATCH_SECONDS;
use super::known::{Kind, Seen};
use super::objects::{self, CronJobObject, NodeObject, PodObject, PolicyObject, Reading, TemplateObject};
use crate::crd::{GROUP, VERSION};
use crate::event::WorkloadKind;
use crate::kubernetes::{backoff, status_code};

/// Objects in one page of a list. A pod is some 10 kB on the wire, and a page is in memory whole.
const PAGE_SIZE: u32 = 250;
/// After so many failures in a row a list begins anew: what the server has may have nothing to do with what it had.
const FRESH_AFTER_FAILURES: u32 = 5;
/// The first failure is logged as a warning, and then every so many.
const WARN_EVERY_FAILURES: u32 = 10;

/// Where what is seen goes.
type Sender = mpsc::Sender<(Kind, Seen)>;

/// Follows `kind` until nobody listens.
pub(super) async fn follow(client: Client, kind: Kind, out: Sender) {
    let fixed = |group: &str, version: &str, object: &str| resource(group, version, object, kind);
    match kind {
        Kind::Policies => {
            let api = Api::<PolicyObject>::all_with(client, &fixed(GROUP, VERSION, "HermesPolicy"));
            follow_fixed(api, kind, objects::policy, out).await;
        }
        Kind::Nodes => {
            let api = Api::<NodeObject>::all_with(client, &fixed("", "v1", "Node"));
            follow_fixed(api, kind, objects::node, out).await;
        }
        Kind::Accounts => {
            follow_fixed(Api::<ServiceAccount>::all(client), kind, objects::account, out).await;
        }
        Kind::Workloads(WorkloadKind::Pod) => {
            let api = Api::<PodObject>::all_with(client, &fixed("", "v1", "Pod"));
            follow_fixed(api, kind, objects::pod, out).await;
        }
        Kind::Workloads(WorkloadKind::CronJob) => follow_cron_jobs(client, kind, out).await,
        Kind::Workloads(template @ WorkloadKind::Deployment) => {
            follow_templates(client, &fixed("apps", "v1", "Deployment"), template, out).await;
        }
        Kind::Workloads(template @ WorkloadKind::StatefulSet) => {
            follow_templates(client, &fixed("apps", "v1", "StatefulSet"), template, out).await;
        }
        Kind::Workloads(template @ WorkloadKind::DaemonSet) => {
            follow_templates(client, &fixed("apps", "v1", "DaemonSet"), template, out).await;
        }
        Kind::Workloads(template @ WorkloadKind::Job) => {
            follow_templates(client, &fixed("batch", "v1", "Job"), template, out).await;
        }
    }
}

fn resource(group: &str, version: &str, object: &str, kind: Kind) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, object), kind.name())
}

async fn follow_templates(client: Client, resource: &ApiResource, kind: WorkloadKind, out: Sender) {
    let api = Api::<TemplateObject>::all_with(client, resource);
    follow_fixed(api, Kind::Workloads(kind), move |object| objects::template(kind, object), out).await;
}

/// Follows objects that have been at one place since Kubernetes 1.20.
async fn follow_fixed<K, R>(api: Api<K>, kind: Kind, read: R, out: Sender)
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    R: Fn(K) -> Reading,
{
    let mut failures = 0;
    while let Ended::Fresh = follow_once(api.clone(), kind, &read, &mut failures, &out).await {}
}

/// Follows CronJobs, which are in batch/v1 since Kubernetes 1.21 and in batch/v1beta1 up to 1.24. A server that is
/// upgraded stops serving the old one, so each fresh start looks again.
async fn follow_cron_jobs(client: Client, kind: Kind, out: Sender) {
    let mut failures = 0;
    loop {
        let served = client.list_api_group_resources("batch/v1").await;
        let version = match served {
            Ok(list) if list.resources.iter().any(|each| each.name == kind.name()) => "v1",
            Ok(_) => "v1beta1",
            Err(error) => {
                failures += 1;
                log(kind, &super::super::one_line(&error), failures);
                tokio::time::sleep(backoff::after(failures)).await;
                continue;
            }
        };
        let api = Api::<CronJobObject>::all_with(client.clone(), &resource("batch", version, "CronJob", kind));
        if let Ended::Closed = follow_once(api, kind, &objects::cron_job, &mut failures, &out).await {
            return;
        }
    }
}

/// Why following has ended.
enum Ended {
    /// Only a fresh start can help.
    Fresh,
    /// Nobody listens.
    Closed,
}

async fn follow_once<K, R>(api: Api<K>, kind: Kind, read: &R, failures: &mut u32, out: &Sender) -> Ended
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    R: Fn(K) -> Reading,
{
    let config = watcher::Config::default().page_size(PAGE_SIZE).timeout(WATCH_SECONDS);
    let mut stream = pin!(watcher(api, config));
    while let Some(step) = stream.next().await {
        let seen = match step {
            // Comes before the server was asked, so it says nothing about failures.
            Ok(watcher::Event::Init) => Seen::Began,
            Ok(event) => {
                if std::mem::take(failures) > 0 {
                    tracing::info!(kind = kind.name(), "watching again");
                }
                match event {
                    watcher::Event::InitApply(object) | watcher::Event::Apply(object) => Seen::Read(read(object)),
                    watcher::Event::Delete(object) => Seen::Read(Reading::Gone(objects::place(object.meta()))),
                    watcher::Event::InitDone => Seen::Listed,
                    watcher::Event::Init => Seen::Began,
                }
            }
            Err(error) => {
                *failures = failures.saturating_add(1);
                log(kind, &in_full(&error), *failures);
                tokio::time::sleep(backoff::after(*failures)).await;
                if needs_fresh_start(&error) || failures.is_multiple_of(FRESH_AFTER_FAILURES) {
                    return Ended::Fresh;
                }
                continue;
            }
        };
        if out.send((kind, seen)).await.is_err() {
            return Ended::Closed;
        }
    }
    Ended::Fresh
}

/// Whether a watch cannot go on from where it was: the version is too old (410), or the resource is not there (404).
fn needs_fresh_start(error: &watcher::Error) -> bool {
    let code = match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => status_code(error),
        watcher::Error::WatchError(status) => Some(status.code),
        watcher::Error::NoResourceVersion => None,
    };
    matches!(code, Some(404 | 410))
}

fn log(kind: Kind, problem: &str, failures: u32) {
    let kind = kind.name();
    if failures == 1 || failures.is_multiple_of(WARN_EVERY_FAILURES) {
        tracing::warn!(kind, problem, failures, "cannot watch; trying again");
    } else {
        tracing::debug!(kind, problem, failures, "cannot watch; trying again");
    }
}
