//! `HermesImage`: what the controller knows of one image. Written by it alone, for people to read.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::conditions_schema;

/// Most names that an object lists.
pub const NAMES_MAX: usize = 64;
/// Most policies that an object lists.
pub const POLICIES_MAX: usize = 64;
/// Most nodes of a seed plan that an object lists.
pub const SEEDS_MAX: usize = 256;

/// Which image this is.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(group = "hermes.cloudpilot.ai", version = "v1alpha1", kind = "HermesImage", shortname = "hi")]
#[kube(status = "HermesImageStatus", derive = "Default", derive = "PartialEq")]
#[kube(
    doc = "A HermesImage says what has become of one image for one platform. The controller writes one for every image \
              that a policy matches, and removes it when no policy does. It is for reading."
)]
#[kube(printcolumn(name = "Image", type_ = "string", json_path = ".spec.names[0]"))]
#[kube(printcolumn(name = "Platform", type_ = "string", json_path = ".spec.platform"))]
#[kube(printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"))]
#[kube(printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason"))]
#[kube(printcolumn(name = "Since", type_ = "date", json_path = ".status.since"))]
#[kube(printcolumn(name = "Attempts", type_ = "integer", json_path = ".status.attempts", priority = 1))]
#[kube(printcolumn(name = "Bytes", type_ = "integer", json_path = ".status.imageBytes", priority = 1))]
#[serde(rename_all = "camelCase")]
pub struct HermesImageSpec {
    /// The names that stand for this image now, at most 64 of them.
    #[serde(default)]
    #[schemars(length(max = NAMES_MAX), extend("x-kubernetes-list-type" = "set"))]
    pub names: Vec<String>,
    /// The platform of the image, such as `linux/amd64`.
    #[serde(default)]
    pub platform: String,
    /// The digest of the platform's own manifest, by which the object is named.
    #[serde(default)]
    pub digest: String,
}

/// What has become of an image.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HermesImageStatus {
    /// How far it is: `Pending`, `Building`, `Ready` or `Failed`.
    #[serde(default)]
    pub phase: ImagePhase,
    /// When it became so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub since: Option<String>,
    /// Why it failed, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why it failed, and what to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// How often an index was begun for it.
    #[serde(default)]
    pub attempts: u32,
    /// When it is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub next_attempt: Option<String>,
    /// Compressed bytes of its layers.
    #[serde(default)]
    pub image_bytes: i64,
    /// How much of the layers the build that runs has read, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub progress_percent: Option<i32>,
    /// Bytes of its index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index_bytes: Option<i64>,
    /// The keys that have signed its index.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub signing_keys: Vec<String>,
    /// Who may read it: `Public` for everybody, `Private` for those who log in.
    #[serde(default)]
    pub access: ImageAccess,
    /// What is known of its starts. Absent before one was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<ImageProfile>,
    /// The nodes that are to hold it before pods land on them, and what they hold. At most 256 are listed.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["node"]))]
    pub seeds: Vec<ImageSeed>,
    /// How many nodes are to hold it.
    #[serde(default)]
    pub seed_count: u32,
    /// The policies that want it, at most 64 of them.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub policies: Vec<String>,
    /// The condition `Ready`.
    #[serde(default)]
    #[schemars(schema_with = "conditions_schema")]
    pub conditions: Vec<Condition>,
}

/// How far an image is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImagePhase {
    /// Waits for its turn.
    #[default]
    Pending,
    /// Its layers are being read.
    Building,
    /// Indexed, signed, and handed out.
    Ready,
    /// Not to be had; tried again later.
    Failed,
}

/// To whom a registry gives an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImageAccess {
    /// To everybody.
    Public,
    /// To those who log in.
    #[default]
    Private,
}

/// What is known of the starts of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageProfile {
    /// How many starts were recorded.
    pub starts: u32,
    /// How many chunks they read.
    pub chunks: i64,
    /// When the newest of them was.
    #[schemars(extend("format" = "date-time"))]
    pub newest: String,
}

/// One node of a seed plan.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageSeed {
    /// The node's name.
    pub node: String,
    /// What it is to hold: `Index`, `Hot` or `Full`, as in a policy.
    pub mode: super::SeedMode,
}
