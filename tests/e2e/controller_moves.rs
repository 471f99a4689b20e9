//! A tag that moves in a cluster: the new image is indexed and seeded, and only then the old one is given up. And keys that are
//! rotated there, with a node that follows.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::command::run;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::kubernetes::Cluster;
use hermes_tests::layout::{Layout, LayoutImage};
use serde_json::{Value, json};

use crate::controller::layer;
use crate::controller_kubernetes::{DEADLINE, Replica, hermes, installed, node_arguments};

/// How long what a tag stands for is believed.
const REFRESH_SECONDS: &str = "3";

fn get(cluster: &Cluster, arguments: &[&str]) -> Option<Value> {
    serde_json::from_str(&cluster.get(&[arguments, &["-o", "json"]].concat()).ok()?).ok()
}

fn status(cluster: &Cluster, image: &LayoutImage) -> Option<Value> {
    let mut found = get(cluster, &["get", "hermesimages", &format!("sha256-{}", image.manifest.hex())])?;
    Some(found["status"].take())
}

/// Whether `node-1` says that it has all of `image`.
fn is_held(cluster: &Cluster, image: &LayoutImage) -> Option<()> {
    let node = get(cluster, &["get", "hermesnodes", "node-1"])?;
    let images = node["status"]["images"].as_array()?;
    let digest = image.manifest.to_string();
    images.iter().any(|held| held["digest"] == digest.as_str() && held["percent"] == 100).then_some(())
}

/// A policy that seeds one copy of everything, a template, and a node that is ready.
fn want(cluster: &Cluster, image: &str) -> Result<()> {
    let policy = json!({
        "apiVersion": "hermes.cloudpilot.ai/v1alpha1", "kind": "HermesPolicy", "metadata": {"name": "all"},
        "spec": {"imageSelectors": [{"imageRegex": ".*"}], "seed": {"replicas": 1, "mode": "Full"}},
    });
    let labels = json!({"app": "service"});
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "service", "namespace": "default"},
        "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels}, "spec": {"containers": [{"name": "main", "image": image}]},
        }},
    });
    cluster.apply(&format!("{policy}\n---\n{deployment}\n"))
}

/// What a kubelet would say.
fn make_ready(cluster: &Cluster) -> Result<()> {
    let mut node = get(cluster, &["get", "node", "node-1"]).context("no node")?;
    node["status"] = json!({"conditions": [{"type": "Ready", "status": "True"}]});
    cluster.replace_raw("/api/v1/nodes/node-1/status", &node)
}

/// Rotates the keys in the cluster, and returns them, newest first.
fn rotate(cluster: &Cluster, overlap_hours: &str) -> Result<Vec<String>> {
    let mut command = Command::new(hermes());
    command.args(["controller", "keys", "--kubernetes", "--rotate", "--json", "--overlap-hours", overlap_hours]);
    command.arg("--kubeconfig").arg(cluster.admin());
    let answer: Value = serde_json::from_slice(&run(&mut command)?)?;
    let keys = answer["keys"].as_array().context("no keys")?.iter().filter_map(|key| key["key"].as_str());
    Ok(keys.map(str::to_owned).collect())
}

fn wait_signed(cluster: &Cluster, image: &LayoutImage, keys: &[String]) -> Result<()> {
    wait_for("an index that is signed by the keys in use", DEADLINE, || {
        let status = status(cluster, image)?;
        let signers: Vec<&str> = status["signingKeys"].as_array()?.iter().filter_map(Value::as_str).collect();
        (signers.len() == keys.len() && keys.iter().all(|key| signers.contains(&key.as_str()))).then_some(())
    })
}

#[test]
fn a_tag_that_moves_is_seeded_before_the_old_image_goes_and_nodes_follow_rotated_keys() -> Result<()> {
    let scratch = ScratchDir::new("controller-moves")?;
    let layout = Layout::create(&scratch.path().join("layout"))?;
    let old = layout.add("v1", &[layer("shared", 400_000), layer("old", 400_000)], &json!({}))?;
    let registry = FaultyRegistry::start(layout.dir())?;
    let (cluster, kubeconfig) = installed()?;
    let replica = Replica::start(&scratch, &kubeconfig, "first", &["--refresh", REFRESH_SECONDS])?;
    let arguments = node_arguments(&cluster, &replica, &scratch.path().join("token"))?;
    make_ready(&cluster)?;
    want(&cluster, &registry.image("v1"))?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let daemon = Daemon::start(hermes(), &scratch.path().join("node"), &arguments)?;
    let logs = || format!("{}\n{}", daemon.log(), replica.log());
    wait_for("the old image on the node", DEADLINE, || is_held(&cluster, &old)).with_context(logs)?;

    // The new one cannot be read at first: the old one stays.
    registry.plan(|number| if number == 0 { Fault::Pass } else { Fault::Throttle(1) });
    let (moved, new) =
        (Instant::now(), layout.add("v1", &[layer("shared", 400_000), layer("new", 400_000)], &json!({}))?);
    wait_for("the new image to fail", DEADLINE, || (status(&cluster, &new)?["phase"] == "Failed").then_some(()))
        .with_context(logs)?;
    ensure!(status(&cluster, &old).is_some_and(|status| status["phase"] == "Ready"), "the old one is gone\n{}", logs());
    registry.always(Fault::Pass);
    // Objects are written when their turn comes; indexes are there, or gone, at once.
    let is_kept = |image: &LayoutImage| {
        scratch.path().join("indexes/statements").join(format!("{}.json", image.manifest.hex())).exists()
    };
    let in_order = wait_for("the old index to go", DEADLINE, || (!is_kept(&old)).then(|| is_kept(&new)));
    ensure!(in_order.with_context(logs)?, "the old index went before the new one was there\n{}", logs());
    wait_for("the new image", DEADLINE, || (status(&cluster, &new)?["phase"] == "Ready").then_some(()))
        .with_context(logs)?;
    let ready_after = moved.elapsed();
    wait_for("the old image to go", DEADLINE, || status(&cluster, &old).is_none().then_some(())).with_context(logs)?;
    wait_for("the new image on the node", DEADLINE, || is_held(&cluster, &new)).with_context(logs)?;
    println!(
        "a tag moved: ready after {:.1} s, seeded after {:.1} s, with a refresh of {REFRESH_SECONDS} s",
        ready_after.as_secs_f64(),
        moved.elapsed().as_secs_f64()
    );

    // A new key beside the old one, and then alone: what is signed by it alone is taken by the node.
    let first = status(&cluster, &new).context("no object")?["signingKeys"][0].as_str().context("no key")?.to_owned();
    let both = rotate(&cluster, "168")?;
    ensure!(both.len() == 2 && both[1] == first, "{both:?}");
    wait_signed(&cluster, &new, &both).with_context(logs)?;
    let newest = rotate(&cluster, "0")?[..1].to_vec();
    wait_signed(&cluster, &new, &newest).with_context(logs)?;
    let last = layout.add("v2", &[layer("last", 400_000)], &json!({}))?;
    want(&cluster, &registry.image("v2"))?;
    wait_signed(&cluster, &last, &newest).with_context(logs)?;
    wait_for("the last image on the node", DEADLINE, || is_held(&cluster, &last)).with_context(logs)?;
    let dir = scratch.make("image")?;
    wait_for("a lazy mount", Duration::from_secs(60), || {
        let mounted = daemon.command(&["mount", &registry.image("v2")]).arg(&dir).arg("--no-build").output().ok()?;
        mounted.status.success().then_some(())
    })
    .with_context(logs)
}
