//! The definitions on a real API server, and in place of those of the Go Hermes.

use anyhow::{Context as _, Result};
use hermes_controller::crd::HermesPolicy;
use hermes_tests::guard::wait_for;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::world::{DEADLINE, World, install};

/// The definition of the Hermes in Go.
const GO_DEFINITION: &str = include_str!("go-hermes.yaml");
/// Policies that were written for it.
const GO_POLICIES: &str = include_str!("go-policies.yaml");

/// A cluster with the Hermes in Go, its policies, and a status that it has written.
pub(crate) fn go_hermes(ready: u32) -> Result<World> {
    let world = World::empty()?;
    world.cluster.apply(GO_DEFINITION)?;
    world.cluster.get(&[
        "wait",
        "--for=condition=Established",
        "--timeout=60s",
        "crd/hermespolicies.hermes.cloudpilot.ai",
    ])?;
    // Served a moment after it is established.
    let mut refused = None;
    wait_for("the old definition", DEADLINE, || {
        world.cluster.apply(GO_POLICIES).map_err(|error| refused = Some(error)).ok()
    })
    .with_context(|| format!("{refused:?}"))?;
    let images = json!([
        { "imageDigestRef": "r.example/vllm@sha256:1", "platform": "linux/amd64", "phase": "Ready" },
        { "imageDigestRef": "r.example/vllm@sha256:2", "platform": "linux/amd64", "phase": "Failed", "error": "why" },
    ]);
    patch_status(&world, "models", &json!({ "ready": ready, "failed": 1, "images": images }))?;
    Ok(world)
}

fn patch_status(world: &World, name: &str, status: &Value) -> Result<()> {
    let api = Api::<HermesPolicy>::all(world.admin()?);
    let patch = Patch::Merge(json!({ "status": status }));
    let params = PatchParams { field_manager: Some("controller".to_owned()), ..PatchParams::default() };
    world.runtime.block_on(api.patch_status(name, &params, &patch))?;
    Ok(())
}

/// The words of a table's lines.
fn table(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(|line| line.split_whitespace().collect()).collect()
}

#[test]
fn the_go_definition_is_replaced_and_its_policies_stay() {
    let world = go_hermes(1).expect("the Hermes in Go");
    let before = world.cluster.get(&["get", "hp"]).expect("a table");
    install(&world.cluster).expect("our definitions");
    // The schema of ours names what the other did not.
    world.see(&["explain", "hp.spec.seed"], |text| text.contains("replicas")).expect("ours is served");
    let after = world.cluster.get(&["get", "hp"]).expect("a table");
    assert_eq!(before, after);
    let words = table(&after);
    assert_eq!(words[0], ["NAME", "PAUSED", "READY", "FAILED"]);
    assert!(words.contains(&vec!["models", "false", "1", "1"]), "{after}");
    // Unchanged manifests apply, and an object of old with a status can still be written.
    world.cluster.apply(GO_POLICIES).expect("the same manifests");
    world.cluster.get(&["annotate", "hp", "models", "touched=yes"]).expect("an old object is taken");
}

#[test]
fn the_definitions_explain_themselves_and_refuse_what_is_wrong() {
    let world = World::new().expect("a cluster");
    let explained = world.see(&["explain", "hp.spec"], |text| text.contains("imagePullSecrets"));
    let explained = explained.expect("the API server publishes the schema");
    for words in ["imageSelectors", "seed", "Whether nothing new is begun for this policy."] {
        assert!(explained.contains(words), "no '{words}' in {explained}");
    }
    for field in ["hermesimages.status.seeds", "hermesnodes.status.images", "hp.status.conditions", "hp.spec.seed.mode"]
    {
        let explained = world.see(&["explain", field], |text| text.contains("DESCRIPTION")).expect(field);
        assert!(!explained.contains("<empty>"), "{field} is not explained: {explained}");
    }
    let policy = |seed: &str| {
        world.cluster.apply(&format!(
            "{{apiVersion: hermes.cloudpilot.ai/v1alpha1, kind: HermesPolicy, metadata: {{name: p}}, \
             spec: {{imageSelectors: [{{imageRegex: x}}], seed: {seed}}}}}"
        ))
    };
    policy("{replicas: 3, mode: Full, nodeSelector: {a: b}}").expect("a policy");
    assert!(policy("{mode: Everything}").is_err());
    assert!(policy("{replicas: -1}").is_err());
}
