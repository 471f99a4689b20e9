//! Hermes on real kubelets, in one story: a policy makes images ready before there are pods; pods start lazily on two nodes, the
//! second of which gets its bytes from the first; nodes hold copies that a policy wants; and then one part after the other
//! ends, and pods do not notice: the leading controller, the daemon, the pods that installed it, what a tag stands for, and
//! a node's power.
//!
//! The nodes are real ones (kubelet, containerd 1.7 and 1.6, runc, CNI, systemd), the controller has the chart's rights and
//! no more, and nodes join with the tokens that the kubelet gives to their pods. What it prints is what a person would look
//! at: times, bytes, and all Events.

mod lab;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::guard::wait_for;
use hermes_tests::kubernetes::images;
use serde_json::{Value, json};

use lab::{DEADLINE, Lab, NAMESPACE};

/// The tags of services, each of which shares no layer but busybox with the others, and is called by its tag. `plain` is there before
/// Hermes is; the last is moved.
const TAGS: [&str; 4] = ["plain", "full", "hot", "v1"];

/// How long it may take until the DaemonSet's pods are exchanged, one node after the other. A kubelet 1.20 that sees the end of a pod's
/// container one look before the end of its sandbox deletes the pod after 58 seconds, else within 10, by its log. Both nodes may be late.
const ROLLOUT_DEADLINE: Duration = Duration::from_secs(300);

fn policy(name: &str, pattern: &str, seed: &Value) -> String {
    let policy = json!({
        "apiVersion": "hermes.cloudpilot.ai/v1alpha1", "kind": "HermesPolicy", "metadata": {"name": name},
        "spec": {"imageSelectors": [{"imageRegex": pattern}], "seed": seed},
    });
    policy.to_string()
}

/// A Deployment that is called as its tag is.
fn deployment(lab: &Lab, tag: &str, replicas: u32) -> String {
    let labels = json!({"app": tag});
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": tag},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels}, "spec": service(lab, tag, 0),
        }},
    });
    deployment.to_string()
}

fn pod(lab: &Lab, app: &str, tag: &str, node: usize) -> String {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": app, "labels": {"app": app}}, "spec": service(lab, tag, node),
    });
    pod.to_string()
}

fn service(lab: &Lab, tag: &str, node: usize) -> Value {
    json!({
        "nodeSelector": {"kubernetes.io/hostname": lab.nodes[node].name()}, "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "main", "image": lab.registry.image(tag), "imagePullPolicy": "Always"}],
    })
}

fn is_ready(image: &Value) -> bool {
    image["status"]["phase"] == "Ready"
}

#[test]
fn a_policy_makes_pods_start_lazily_and_nothing_that_ends_is_noticed() -> Result<()> {
    let mut lab = Lab::start()?;
    for tag in TAGS {
        images::add_service(&lab.layout, &lab.busybox, tag, tag, tag)?;
    }
    a_pod_mounts_for_its_node(&lab)?;
    let plain = lab.time_to_answer(&pod(&lab, "plain", "plain", 0), "plain", "plain")?;
    println!(
        "{plain:?} from the creation of a pod to its answer, when containerd pulls {} bytes",
        lab.layer_bytes("plain")?
    );
    lab.install()?;
    images_are_ready_before_there_are_pods(&lab)?;
    pods_start_lazily(&lab)?;
    nodes_hold_what_a_policy_wants(&lab)?;
    the_leader_dies(&lab)?;
    the_daemon_ends(&lab)?;
    a_tag_is_moved(&lab)?;
    the_power_goes(&mut lab)?;
    let events = lab.events();
    println!("{events}\n{}", lab.cluster.get(&["get", "hp,hi,hn,pods", "-o", "wide"])?);
    for reason in ["Matched", "IndexReady", "TagMoved", "Released", "Scheduled", "Pulled", "Started"] {
        ensure!(events.contains(&format!(" {reason} ")), "no Event {reason}\n{events}");
    }
    Ok(())
}

/// A policy and templates, of which there is no pod: images are read once, by the controller alone.
fn images_are_ready_before_there_are_pods(lab: &Lab) -> Result<()> {
    let begun = Instant::now();
    let deployments = TAGS[1..].iter().map(|tag| deployment(lab, tag, 0)).collect::<Vec<_>>().join("\n---\n");
    lab.cluster
        .apply(&format!("{}\n---\n{deployments}", policy("services", "team/app:(full|hot|v1)$", &Value::Null)))?;
    TAGS[1..].iter().try_for_each(|tag| lab.image(tag, is_ready).map(drop))?;
    println!("{:?} from the policy to {} images that are ready", begun.elapsed(), TAGS.len() - 1);
    lab.see(&["get", "hp", "services", "-o", "jsonpath={.status.ready}"], "3")?;
    for tag in &TAGS[1..] {
        let (read, all) = (lab.delivered_to_controllers(tag)?, lab.layer_bytes(tag)?);
        ensure!(read == all, "{read} of {all} bytes of {tag} were read for its index");
        for node in &lab.nodes {
            ensure!(lab.delivered_to(tag, node)? == 0, "{} has read {tag} before there was a pod", node.name());
        }
    }
    Ok(())
}

/// The first pod of an image in the cluster has its bytes from the registry, as far as it needs them; the second, on another node,
/// from the first node.
fn pods_start_lazily(lab: &Lab) -> Result<()> {
    let first = lab.time_to_answer(&deployment(lab, "v1", 1), "v1", "v1")?;
    // Long before its profile is asked for.
    lab.cluster.apply(&deployment(lab, "hot", 1))?;
    let second = lab.time_to_answer(&pod(lab, "second", "v1", 1), "second", "v1")?;
    println!("{first:?} and {second:?} from the creation of a pod to its answer, from the registry and from a node");
    for node in &lab.nodes {
        let shown = lab.shown(node, "v1")?;
        let (present, total, read) = (shown.present_bytes, shown.total_bytes, lab.delivered_to("v1", node)?);
        println!(
            "{}: {present} of {total} bytes, {read} from the registry; {}, {:?}",
            node.name(),
            shown.way,
            shown.sources
        );
        ensure!(present < total, "{} has all of the image\n{}", node.name(), lab.story());
    }
    let (all, by_nodes) = (lab.layer_bytes("v1")?, [0, 1].map(|node| lab.delivered_to("v1", &lab.nodes[node])));
    let [first, second] = by_nodes;
    let (first, second) = (first?, second?);
    ensure!(
        first < all / 2 && second <= first / 10,
        "{first} and {second} of {all} bytes from the registry\n{}",
        lab.story()
    );
    ensure!(
        lab.shown(&lab.nodes[1], "v1")?.sources.peer_bytes > 0,
        "nothing came from the other node\n{}",
        lab.story()
    );
    Ok(())
}

/// Seeding in its three modes: what a node is to hold is there before its first pod.
fn nodes_hold_what_a_policy_wants(lab: &Lab) -> Result<()> {
    let on =
        |mode: &str, node: &str| json!({"mode": mode, "replicas": 1, "nodeSelector": {"kubernetes.io/hostname": node}});
    lab.wait_for_answer("hot", "hot")?;
    let hot = lab.image("hot", |image| image["status"]["profile"]["starts"].as_u64() > Some(0))?;
    let policies = [
        policy("seeds-index", "team/app:plain$", &on("Index", "node-1")),
        policy("seeds-hot", "team/app:hot$", &on("Hot", "node-1")),
        policy("seeds-full", "team/app:full$", &json!({"mode": "Full", "replicas": 2})),
    ];
    lab.cluster.apply(&policies.join("\n---\n"))?;
    let is_planned = |count: u64| move |image: &Value| is_ready(image) && image["status"]["seedCount"] == count;
    let (plain, full) = (lab.image("plain", is_planned(1))?, lab.image("full", is_planned(2))?);
    let node = &lab.nodes[1];
    let index = lab.percent(node, &plain, |percent| percent == 0)?;
    // The rest of what it reads at its start, about a seventh, came with the whole spans of its layers.
    let held = lab.percent(node, &hot, |percent| percent > 0)?;
    lab.nodes.iter().try_for_each(|node| lab.percent(node, &full, |percent| percent == 100).map(drop))?;
    println!("{} holds {index} % of an image of mode Index, {held} % of one of mode Hot", node.name());
    ensure!(held < 50, "all of it is there\n{}", lab.story());
    let read = |tag: &str| lab.delivered_to(tag, node);
    let (read_hot, read_full) = (read("hot")?, read("full")?);
    let from_hot = lab.time_to_answer(&pod(lab, "seeded-hot", "hot", 1), "seeded-hot", "hot")?;
    let from_full = lab.time_to_answer(&pod(lab, "seeded-full", "full", 1), "seeded-full", "full")?;
    println!("{from_hot:?} and {from_full:?} from the creation of a pod to its answer, on what was held");
    // A range of one byte proves that the registry gives the image to the node.
    let since = [read("hot")? - read_hot, read("full")? - read_full];
    ensure!(
        since.iter().all(|bytes| *bytes <= 1),
        "starts have read {since:?} bytes from the registry\n{}",
        lab.story()
    );
    for tag in ["hot", "full"] {
        let shown = lab.shown(node, tag)?;
        println!("{tag}: {} of {} bytes, {:?}", shown.present_bytes, shown.total_bytes, shown.sources);
        ensure!(shown.sources.registry_bytes == 0, "{tag}: {shown:?}");
    }
    Ok(())
}

/// Pods that run do not notice, and an image whose index a node holds starts there lazily meanwhile. The other replica builds
/// nothing again.
fn the_leader_dies(lab: &Lab) -> Result<()> {
    let read = TAGS.map(|tag| lab.delivered_to_controllers(tag));
    let ((leader, node), address) = (lab.leader()?, lab.wait_for_answer("v1", "v1")?);
    // In the node's own process namespace, where no other controller is.
    node.must("pkill", &["-KILL", "-f", "controller --kubernetes"])?;
    let killed = Instant::now();
    let followed = || lab.leader().is_ok_and(|(now, _)| now != leader).then(|| killed.elapsed());
    let followed = std::thread::scope(|scope| {
        let followed = scope.spawn(|| wait_for("another leader", DEADLINE, followed));
        lab.check_cold(address, "v1", 0)?;
        let took = lab.time_to_answer(&pod(lab, "late", "plain", 1), "late", "plain")?;
        println!("{took:?} from the creation of a pod to its answer, without a controller");
        lab.shown(&lab.nodes[1], "plain")?;
        // A read that fails is one that the service ends of.
        let restarts = ["get", "pod", "late", "-o", "jsonpath={.status.containerStatuses[0].restartCount}"];
        ensure!(lab.cluster.get(&restarts)? == "0", "its reads have failed\n{}", lab.story());
        followed.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?.with_context(|| lab.story())
    })?;
    println!("{followed:?} until the other replica led");
    for (tag, before) in TAGS.iter().zip(read) {
        let (before, now) = (before?, lab.delivered_to_controllers(tag)?);
        ensure!(now == before, "{} bytes of {tag} were read again\n{}", now - before, lab.story());
    }
    Ok(())
}

/// Killed, and exchanged by a new release, whose pods replace those that installed it: what runs reads on.
fn the_daemon_ends(lab: &Lab) -> Result<()> {
    let (node, address) = (&lab.nodes[0], lab.wait_for_answer("v1", "v1")?);
    let first = lab.daemon(node)?;
    node.must("systemctl", &["kill", "--signal=KILL", "--kill-who=main", "hermes.service"])?;
    lab.check_cold(address, "v1", 1).context("the daemon was killed")?;
    let second = lab.daemon(node)?;
    ensure!(first != second, "the daemon was not killed");
    lab.helm(&["upgrade", "hermes", "deploy/chart", "--reuse-values", "--set", "node.verbosity=2"])?;
    // A pod that is replaced is one whose daemon runs with other arguments; reads go on throughout.
    let mut number = 1;
    let exchanged = wait_for("a daemon with other arguments", ROLLOUT_DEADLINE, || {
        number = number % (images::COLD.0 - 1) + 1;
        if let Err(error) = lab.check_cold(address, "v1", number) {
            return Some(Err(error));
        }
        lab.status(node).is_ok_and(|status| status.pid != second).then_some(Ok(()))
    });
    exchanged.with_context(|| lab.story())??;
    let rolled = [
        "get",
        "daemonset",
        "-n",
        NAMESPACE,
        "hermes-node",
        "-o",
        "jsonpath={.status.updatedNumberScheduled} {.status.numberReady}",
    ];
    lab.see(&rolled, "2 2")?;
    let restarts =
        ["get", "pods", "-l", "app=v1", "-o", "jsonpath={.items[*].status.containerStatuses[*].restartCount}"];
    ensure!(lab.cluster.get(&restarts)? == "0", "the service was started again\n{}", lab.story());
    Ok(())
}

/// A tag stands for another image: that is indexed, new pods run it, and the one before is given up with its last pod.
fn a_tag_is_moved(lab: &Lab) -> Result<()> {
    let before = lab.image("v1", is_ready)?;
    let is_another = |image: &Value| is_ready(image) && image["spec"]["digest"] != before["spec"]["digest"];
    images::add_service(&lab.layout, &lab.busybox, "v1", "v1 moved", "v1")?;
    let moved = Instant::now();
    lab.image("v1", is_another)?;
    println!("{:?} until what the tag stands for now was ready", moved.elapsed());
    let name = before["metadata"]["name"].as_str().context("no name")?;
    lab.cluster.get(&["get", "hermesimage", name]).context("pods run it")?;
    lab.cluster.get(&["rollout", "restart", "deployment", "v1"])?;
    lab.wait_for_answer("v1", "v1 moved")?;
    lab.shown(&lab.nodes[0], "v1")?;
    lab.cluster.get(&["delete", "pod", "second", "--wait=true"])?;
    let gone =
        wait_for("the end of what nobody runs", DEADLINE, || lab.cluster.get(&["get", "hermesimage", name]).err());
    gone.with_context(|| lab.story()).map(drop)
}

/// What a privileged pod mounts in a folder that it shares both ways is seen by its node, which a daemon in a pod would need.
fn a_pod_mounts_for_its_node(lab: &Lab) -> Result<()> {
    let script = "mount -t tmpfs tmpfs /shared && echo seen >/shared/file && exec sleep 1000000";
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "mounts"},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": "node-0"}, "terminationGracePeriodSeconds": 0,
            "volumes": [{"name": "shared", "hostPath": {"path": "/var/lib/shared", "type": "DirectoryOrCreate"}}],
            "containers": [{
                "name": "main", "image": lab.registry.image(images::PAUSE), "command": ["/bin/sh", "-ec", script],
                "securityContext": {"privileged": true},
                "volumeMounts": [{"name": "shared", "mountPath": "/shared", "mountPropagation": "Bidirectional"}],
            }],
        },
    });
    lab.cluster.apply(&pod.to_string())?;
    let node = &lab.nodes[0];
    let seen = wait_for("a pod's mount", DEADLINE, || node.must("cat", &["/var/lib/shared/file"]).ok());
    ensure!(seen.with_context(|| lab.story())? == "seen", "another file is there");
    lab.cluster.get(&["delete", "pod", "mounts", "--wait=true"]).map(drop)
}

/// A node loses its power with all that runs on it, and has it again: pods come back on what its disk holds.
fn the_power_goes(lab: &mut Lab) -> Result<()> {
    lab.nodes[1].power_off()?;
    let ready = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
    lab.see(&["get", "node", "node-1", "-o", ready], "Unknown")?;
    lab.wait_for_answer("v1", "v1 moved")?;
    let read = TAGS.map(|tag| lab.delivered_to(tag, &lab.nodes[1]));
    let begun = Instant::now();
    lab.nodes[1].power_on()?;
    lab.nodes[1].wait(&lab.cluster)?;
    println!("{:?} until the node was ready again", begun.elapsed());
    for (app, tag) in [("late", "plain"), ("seeded-hot", "hot"), ("seeded-full", "full")] {
        let address = lab.wait_for_answer(app, tag)?;
        let digest = lab.image(tag, is_ready)?["spec"]["digest"].clone();
        let images = lab.status(&lab.nodes[1])?.images;
        ensure!(images.iter().any(|image| digest == image.manifest.to_string()), "{tag} is not shown\n{}", lab.story());
        lab.check_cold(address, tag, 1)?;
    }
    println!("{:?} until its pods answered again", begun.elapsed());
    for (tag, before) in TAGS.iter().zip(read) {
        println!("{tag}: {} bytes from the registry since", lab.delivered_to(tag, &lab.nodes[1])? - before?);
    }
    Ok(())
}
