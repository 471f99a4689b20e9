//! `HermesNode`: what one node has said of itself, condensed. Written by the controller alone, for people to read.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most images that an object lists.
pub const NODE_IMAGES_MAX: usize = 256;

/// Nothing is asked of a node here.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(group = "hermes.cloudpilot.ai", version = "v1alpha1", kind = "HermesNode", shortname = "hn")]
#[kube(status = "HermesNodeStatus", derive = "Default", derive = "PartialEq")]
#[kube(
    doc = "A HermesNode says what the Hermes daemon of the node of the same name has reported: its version, what it can \
              do, and what its store holds. The controller writes it when something has changed, at most every 10 \
              seconds; numbers are rounded so that small changes need no writing."
)]
#[kube(printcolumn(name = "Version", type_ = "string", json_path = ".status.version"))]
#[kube(printcolumn(name = "Connected", type_ = "boolean", json_path = ".status.connected"))]
#[kube(printcolumn(name = "Images", type_ = "integer", json_path = ".status.imageCount"))]
#[kube(printcolumn(name = "Complete", type_ = "integer", json_path = ".status.completeCount"))]
#[kube(printcolumn(name = "Used", type_ = "integer", json_path = ".status.storeUsedBytes", priority = 1))]
#[kube(printcolumn(name = "Budget", type_ = "integer", json_path = ".status.storeBudgetBytes", priority = 1))]
#[serde(rename_all = "camelCase")]
pub struct HermesNodeSpec {}

/// What a node has reported last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HermesNodeStatus {
    /// Whether the daemon is connected to a controller. One that is not goes on with what it knows.
    #[serde(default)]
    pub connected: bool,
    /// The daemon's version.
    #[serde(default)]
    pub version: String,
    /// The node's name in the swarm, its PeerId.
    #[serde(default)]
    pub peer: String,
    /// The ways in which it can show an image, such as `erofs-files`.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub ways: Vec<String>,
    /// Bytes that its store holds, rounded down to 64 MiB.
    #[serde(default)]
    pub store_used_bytes: i64,
    /// Bytes that its store may hold. Absent when it has no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_budget_bytes: Option<i64>,
    /// Bytes that came from other nodes since the daemon's start, rounded down to 64 MiB.
    #[serde(default)]
    pub peer_bytes: i64,
    /// Bytes that came from registries since the daemon's start, rounded down to 64 MiB.
    #[serde(default)]
    pub registry_bytes: i64,
    /// How many images it shows or keeps.
    #[serde(default)]
    pub image_count: u32,
    /// How many of them it has all of.
    #[serde(default)]
    pub complete_count: u32,
    /// The images, at most 256 of them, those that it has least of first.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["digest"]))]
    pub images: Vec<NodeImage>,
}

/// One image on a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeImage {
    /// The digest of its manifest; the HermesImage is named after it.
    pub digest: String,
    /// One of its names, if a policy matches it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How much of it is on the node, rounded down to a multiple of 5; 100 when all of it is.
    #[schemars(range(min = 0, max = 100))]
    pub percent: i32,
}
