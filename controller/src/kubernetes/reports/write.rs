//! Writing one object: by server-side apply, and only what has changed.

use std::fmt;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::core::object::NotUsed;
use kube::core::{ApiResource, GroupVersionKind, Object};
use kube::{Api, Client};
use serde::Serialize;
use serde_json::json;

use super::tales::{Tale, Told};
use super::views;
use crate::crd::{GROUP, HermesImageSpec, HermesImageStatus, HermesNodeStatus, HermesPolicyStatus, VERSION};
use crate::event::ImageView;
use crate::kubernetes::{MANAGER, backoff, status_code};

/// How long the API server may take for one request.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often something is told that nobody wants to hear, before it is given up.
const TALE_ATTEMPTS_MAX: u32 = 5;

/// What a wish is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Policy(String),
    /// By the name of its object.
    Image(String),
    Node(String),
    Tale(Tale),
}

impl Key {
    /// 0 for what goes first, 1 for what waits.
    pub(super) fn urgency(&self) -> usize {
        usize::from(matches!(self, Self::Node(_)))
    }

    /// How long after a write the next one may follow. Nodes change all the time, and there are thousands; a build says
    /// how far it is several times a second.
    pub(super) fn interval(&self) -> Duration {
        match self {
            Self::Policy(_) | Self::Image(_) => Duration::from_secs(2),
            Self::Node(_) | Self::Tale(_) => Duration::from_secs(10),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(name) => write!(f, "HermesPolicy {name}"),
            Self::Image(name) => write!(f, "HermesImage {name}"),
            Self::Node(name) => write!(f, "HermesNode {name}"),
            Self::Tale(tale) => write!(f, "Event {}", tale.reason),
        }
    }
}

/// What is to be so.
#[derive(Debug, Clone)]
pub(super) enum Wish {
    PolicyStatus(Box<HermesPolicyStatus>),
    Image(Arc<ImageView>),
    /// What the node has reported last by when it is written.
    NodeAsReported,
    Node(Box<HermesNodeStatus>),
    /// The node's daemon is not connected; the rest of its object stays.
    NotConnected,
    /// The object is to be gone.
    Gone,
    Told(Told),
}

/// What the API server has of one object.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Written {
    pub(super) policy: Option<HermesPolicyStatus>,
    pub(super) image: Option<HermesImageSpec>,
    pub(super) image_status: Option<HermesImageStatus>,
    /// The [`fingerprint`] of a node's status: there are thousands.
    pub(super) node: Option<u64>,
    /// The object's uid, once it is known.
    pub(super) uid: Option<String>,
    /// Whether others have written this object's status before, so that their part is to be removed first.
    pub(super) has_foreign_status: bool,
}

/// A hash of a node's status, for this process.
pub(super) fn fingerprint(status: &HermesNodeStatus) -> u64 {
    let text = serde_json::to_vec(status).expect("a status has only texts, numbers and lists");
    BuildHasherDefault::<DefaultHasher>::default().hash_one(text)
}

/// Why something was not written.
#[derive(Debug)]
pub(super) enum Failed {
    /// Trying again may help.
    Later(String),
    /// The object is not there.
    Missing(String),
    /// The API server will not have it, now or later.
    Never(String),
}

impl Failed {
    /// The wait before the next try, after so many failures; `None` when trying again is for nothing.
    pub(super) fn wait(&self, key: &Key, failures: u32) -> Option<Duration> {
        let is_worth_it = match (self, key) {
            (Self::Never(_), _) | (Self::Missing(_), Key::Policy(_)) => false,
            (_, Key::Tale(_)) => failures < TALE_ATTEMPTS_MAX,
            // Somebody has removed the object between its two parts: it is made again.
            (Self::Later(_) | Self::Missing(_), _) => true,
        };
        is_worth_it.then(|| backoff::after(failures))
    }

    /// Whether it is likely to be so for all objects.
    pub(super) fn is_general(&self) -> bool {
        matches!(self, Self::Later(_))
    }

    /// What the API server said.
    pub(super) fn problem(&self) -> &str {
        match self {
            Self::Later(problem) | Self::Missing(problem) | Self::Never(problem) => problem,
        }
    }
}

impl From<kube::Error> for Failed {
    fn from(error: kube::Error) -> Self {
        let problem = crate::kubernetes::one_line(&error);
        match status_code(&error) {
            Some(404) => Self::Missing(problem),
            // 401 and 403 end when somebody repairs the role.
            Some(400 | 405 | 413 | 422) => Self::Never(problem),
            _ => Self::Later(problem),
        }
    }
}

/// An object of which only the metadata is looked at.
pub(super) type Bare = Object<Option<NotUsed>, NotUsed>;

/// Where the objects of a kind are.
pub(super) fn resource(kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, VERSION, kind), plural)
}

/// Where policies are.
pub(super) fn policies() -> ApiResource {
    resource("HermesPolicy", "hermespolicies")
}

/// Where images are.
pub(super) fn images() -> ApiResource {
    resource("HermesImage", "hermesimages")
}

/// Where nodes are.
pub(super) fn nodes() -> ApiResource {
    resource("HermesNode", "hermesnodes")
}

/// What a request comes to, if that is soon enough.
pub(super) async fn in_time<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Failed> {
    match tokio::time::timeout(TIMEOUT, request).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Failed::Later(format!("no answer within {} s", TIMEOUT.as_secs()))),
    }
}

/// Writes with a client.
#[derive(Clone)]
pub(super) struct Writer {
    pub(super) client: Client,
}

impl Writer {
    /// Makes it so and says what is now known of the object. Nothing is asked when nothing has changed.
    pub(super) async fn write(&self, key: &Key, wish: &Wish, before: Written) -> Result<Written, Failed> {
        match (key, wish) {
            (Key::Policy(name), Wish::PolicyStatus(status)) => self.policy(name, status, before).await,
            (Key::Image(name), Wish::Image(view)) => self.image(name, view, before).await,
            (Key::Node(name), Wish::Node(status)) => self.node(name, status, before).await,
            (Key::Node(name), Wish::NotConnected) => self.not_connected(name, before).await,
            (Key::Image(name), Wish::Gone) => self.remove(name, &images()).await,
            (Key::Node(name), Wish::Gone) => self.remove(name, &nodes()).await,
            (Key::Tale(tale), Wish::Told(told)) => {
                self.tell(tale, told, before.uid.clone()).await?;
                Ok(before)
            }
            _ => Err(Failed::Never("no such wish for this kind of object".to_owned())),
        }
    }

    async fn policy(&self, name: &str, wanted: &HermesPolicyStatus, mut before: Written) -> Result<Written, Failed> {
        let mut wanted = wanted.clone();
        if let Some(last) = &before.policy {
            keep_transitions(&mut wanted.conditions, &last.conditions);
        }
        if before.policy.as_ref() == Some(&wanted) {
            return Ok(before);
        }
        if before.has_foreign_status {
            // What another program has written stays its own under server-side apply, entries of lists that are wrong
            // by now among them.
            let api = Api::<Bare>::all_with(self.client.clone(), &policies());
            let nothing = Patch::Merge(json!({ "status": null }));
            in_time(api.patch_status(name, &PatchParams::default(), &nothing)).await?;
            before.has_foreign_status = false;
        }
        before.uid = self.apply_status(name, &policies(), &wanted).await?;
        before.policy = Some(wanted);
        Ok(before)
    }

    async fn image(&self, name: &str, view: &ImageView, mut before: Written) -> Result<Written, Failed> {
        let (spec, mut status) = (views::image_spec(view), views::image_status(view));
        if let Some(last) = &before.image_status {
            keep_transitions(&mut status.conditions, &last.conditions);
        }
        if before.image.as_ref() != Some(&spec) {
            before.uid = self.apply_spec(name, &images(), &spec).await?;
            before.image = Some(spec);
        }
        if before.image_status.as_ref() != Some(&status) {
            self.apply_status(name, &images(), &status).await?;
            before.image_status = Some(status);
        }
        Ok(before)
    }

    async fn node(&self, name: &str, status: &HermesNodeStatus, mut before: Written) -> Result<Written, Failed> {
        let wanted = Some(fingerprint(status));
        if before.node == wanted {
            return Ok(before);
        }
        if before.uid.is_none() {
            before.uid = self.apply_spec(name, &nodes(), &json!({})).await?;
        }
        self.apply_status(name, &nodes(), status).await?;
        before.node = wanted;
        Ok(before)
    }

    async fn not_connected(&self, name: &str, mut before: Written) -> Result<Written, Failed> {
        let api = Api::<Bare>::all_with(self.client.clone(), &nodes());
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let patch = Patch::Merge(json!({ "status": { "connected": false } }));
        in_time(api.patch_status(name, &params, &patch)).await?;
        before.node = None;
        Ok(before)
    }

    async fn remove(&self, name: &str, resource: &ApiResource) -> Result<Written, Failed> {
        let api = Api::<Bare>::all_with(self.client.clone(), resource);
        match in_time(api.delete(name, &DeleteParams::default())).await {
            Ok(_) | Err(Failed::Missing(_)) => Ok(Written::default()),
            Err(error) => Err(error),
        }
    }

    async fn apply_spec(
        &self,
        name: &str,
        resource: &ApiResource,
        spec: &impl Serialize,
    ) -> Result<Option<String>, Failed> {
        let object = part_of(name, resource, "spec", spec);
        let api = Api::<Bare>::all_with(self.client.clone(), resource);
        let applied = in_time(api.patch(name, &applying(), &Patch::Apply(&object))).await?;
        Ok(applied.metadata.uid)
    }

    async fn apply_status(
        &self,
        name: &str,
        resource: &ApiResource,
        status: &impl Serialize,
    ) -> Result<Option<String>, Failed> {
        let object = part_of(name, resource, "status", status);
        let api = Api::<Bare>::all_with(self.client.clone(), resource);
        let applied = in_time(api.patch_status(name, &applying(), &Patch::Apply(&object))).await?;
        Ok(applied.metadata.uid)
    }
}

/// One part of an object, to be applied.
fn part_of(name: &str, resource: &ApiResource, part: &str, value: &impl Serialize) -> serde_json::Value {
    json!({ "apiVersion": resource.api_version, "kind": resource.kind, "metadata": { "name": name }, part: value })
}

/// As the one who decides about every field that is named.
pub(super) fn applying() -> PatchParams {
    PatchParams::apply(MANAGER).force()
}

/// A condition that is as it was keeps the moment since which it is so; the core of another run cannot know it.
fn keep_transitions(wanted: &mut [Condition], last: &[Condition]) {
    for condition in wanted {
        let same = last.iter().find(|last| last.type_ == condition.type_ && last.status == condition.status);
        if let Some(last) = same {
            condition.last_transition_time = last.last_transition_time.clone();
        }
    }
}
