//! The objects that people write and read: [`HermesPolicy`], and what is said of it, of images and of nodes.
//!
//! Group, version, kind, fields and their meaning are those of the Hermes that was written in Go, so its manifests apply
//! unchanged; what is new is optional. The standalone controller reads the same documents from files.
//!
//! Comments of types and fields become what `kubectl explain` says, so they are written for people who know nothing of
//! this code. Limits stand on new fields only: an object that the Go Hermes took is never refused, its status included,
//! since older API servers check all of an object whenever any of it changes. Nothing rests on CEL, which they drop. Lists
//! of a status are written also when they are empty, so that nothing depends on what server-side apply leaves of a list
//! that is no longer named.
#![allow(
    clippy::duplicated_attributes,
    reason = "columns of one type, which this lint takes for one column said twice"
)]

mod definitions;
mod image;
mod node;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use definitions::{Definition, definitions};
pub use image::{
    HermesImage, HermesImageSpec, HermesImageStatus, ImageAccess, ImagePhase, ImageProfile, ImageSeed, NAMES_MAX,
    POLICIES_MAX, SEEDS_MAX,
};
pub use node::{HermesNode, HermesNodeSpec, HermesNodeStatus, NODE_IMAGES_MAX, NodeImage};

/// The API group of every object.
pub const GROUP: &str = "hermes.cloudpilot.ai";
/// The version of every object.
pub const VERSION: &str = "v1alpha1";

/// Which images are made ready before pods need them.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(group = "hermes.cloudpilot.ai", version = "v1alpha1", kind = "HermesPolicy", shortname = "hp")]
#[kube(status = "HermesPolicyStatus", derive = "Default", derive = "PartialEq")]
#[kube(
    doc = "A HermesPolicy says which images Hermes makes ready before pods need them: it indexes every image that matches, \
              signs the index, and hands it to all nodes, so that containers start while their image is still on its way."
)]
#[kube(printcolumn(name = "Paused", type_ = "boolean", json_path = ".spec.paused"))]
#[kube(printcolumn(name = "Ready", type_ = "integer", json_path = ".status.ready"))]
#[kube(printcolumn(name = "Failed", type_ = "integer", json_path = ".status.failed"))]
#[serde(rename_all = "camelCase")]
pub struct HermesPolicySpec {
    /// Whether nothing new is begun for this policy. What is ready stays in use.
    #[serde(default)]
    pub paused: bool,
    /// An image is meant when one of these matches. No selector matches no image.
    #[serde(default)]
    pub image_selectors: Vec<ImageSelector>,
    /// Platforms that are indexed, such as `linux/amd64`. When empty, those that the controller was started for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub platforms: Vec<String>,
    /// Secrets with logins, as `namespace/name`, that may be used for every image of this policy, beside the pull secrets
    /// of its pods. The controller reads them when it needs them, and must be allowed to get them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 3, max = 317)))]
    pub image_pull_secrets: Vec<String>,
    /// Nodes that hold copies before the first pod lands. When absent, copies spread from node to node as pods start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<Seed>,
}

/// Selects images by the text that a pod names them with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageSelector {
    /// A regular expression (syntax of RE2) that is looked for anywhere in the image's name, as the pod writes it. Begin
    /// it with `^` and end it with `$` to compare the whole name. One that is no regular expression, or too large, is
    /// named in the condition `RegexValid`.
    pub image_regex: String,
}

/// Where copies are kept before anybody needs them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Seed {
    /// How many nodes hold a copy; 2 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000))]
    pub replicas: Option<u32>,
    /// Only nodes with all of these labels are chosen; any node when empty.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub node_selector: BTreeMap<String, String>,
    /// What a copy holds: `Index` for the index alone, `Hot` for what starts read, by the image's profile, and everything
    /// while there is none, `Full` for everything.
    #[serde(default)]
    pub mode: SeedMode,
}

/// What seeded nodes hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SeedMode {
    /// The index alone.
    Index,
    /// What starts read, by the image's profile; everything while there is none.
    #[default]
    Hot,
    /// Everything.
    Full,
}

/// What has become of a policy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HermesPolicyStatus {
    /// The generation of the spec that this speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Images that are ready.
    #[serde(default)]
    pub ready: i32,
    /// Images that failed.
    #[serde(default)]
    pub failed: i32,
    /// The images of this policy; at most 1,000 of them, those that failed first.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["imageDigestRef", "platform"]))]
    pub images: Vec<PolicyImage>,
    /// The conditions `Ready`, `RegexValid` and `Degraded`.
    #[serde(default)]
    #[schemars(schema_with = "conditions_schema")]
    pub conditions: Vec<Condition>,
}

/// One image of a policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyImage {
    /// The image by its digest, `repository@sha256:...`, which is that of the platform's own manifest.
    pub image_digest_ref: String,
    /// The platform of the image, such as `linux/amd64`.
    pub platform: String,
    /// How far it is.
    pub phase: PolicyImagePhase,
    /// When its index was built or failed last, as RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub last_build_time: Option<String>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How far an image of a policy is. Closed: older readers know these three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PolicyImagePhase {
    /// Being made, or waiting for it.
    Building,
    /// Indexed, signed, and handed out.
    Ready,
    /// Not to be had; tried again later.
    Failed,
}

/// The schema of conditions: a list with one entry for each type.
fn conditions_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "lastTransitionTime", "reason", "message"],
            "properties": {
                "type": { "type": "string", "description": "What this is about." },
                "status": { "type": "string", "enum": ["True", "False", "Unknown"], "description": "Whether it is so." },
                "observedGeneration": {
                    "type": "integer", "format": "int64",
                    "description": "The generation of the spec that this speaks of.",
                },
                "lastTransitionTime": {
                    "type": "string", "format": "date-time",
                    "description": "When the status changed last.",
                },
                "reason": { "type": "string", "description": "Why, in one word." },
                "message": { "type": "string", "description": "Why, and what to do about it." },
            },
        },
    })
}
