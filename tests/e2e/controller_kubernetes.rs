//! The controller on a real API server, with the rights that it is installed with: a policy and a template make an image
//! ready before there is a pod, a node joins by its pod's token and reads by that index, and a replica that is killed is
//! followed by the other, which has the same keys and builds nothing again.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_controller::crd::definitions;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{ProcessGuard, ScratchDir, wait_for};
use hermes_tests::kubernetes::Cluster;
use hermes_tests::sample::{Sample, TAG};
use rustix::process::Signal;
use serde_json::{Value, json};

/// How long something may take that has no time of its own, where others compile.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);
/// What the controller may do.
const RIGHTS: &str = include_str!("../../deploy/rbac.yaml");
pub(crate) const NAMESPACE: &str = "hermes-system";

pub(crate) fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// One replica: a process with a state folder of its own, and indexes that both share.
pub(crate) struct Replica {
    pub(crate) state: PathBuf,
    pub(crate) process: ProcessGuard,
}

impl Replica {
    pub(crate) fn start(scratch: &ScratchDir, kubeconfig: &Path, name: &str, more: &[&str]) -> Result<Self> {
        let state = scratch.path().join(name);
        let mut command = Command::new(hermes());
        command.args(["-v", "controller", "--kubernetes", "--listen", "127.0.0.1:0", "--identity", name]);
        command.arg("--kubeconfig").arg(kubeconfig).arg("--state").arg(&state);
        command.arg("--artifacts").arg(scratch.path().join("indexes"));
        command.arg("--hosts-dir").arg(scratch.path().join("hosts")).args(more);
        let log = File::create(scratch.path().join(format!("{name}.log")))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Ok(Self { state, process: ProcessGuard::start(&mut command)? })
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.state.with_extension("log")).unwrap_or_default()
    }

    /// Where it serves nodes, once it leads.
    pub(crate) fn address(&self) -> Result<String> {
        let said =
            |line: &str| Some(line.split_once("nodes are served")?.1.split_once("address=")?.1.trim().to_owned());
        wait_for("a replica that leads", DEADLINE, || self.log().lines().find_map(said)).with_context(|| self.log())
    }

    pub(crate) fn kill(mut self) -> Result<()> {
        self.process.signal(Signal::KILL)?;
        self.process.child().wait()?;
        Ok(())
    }
}

/// What kubectl says, once it is as wanted.
pub(crate) fn see(cluster: &Cluster, arguments: &[&str], wanted: &str) -> Result<()> {
    let mut seen = String::new();
    wait_for(wanted, DEADLINE, || {
        seen = cluster.get(arguments).unwrap_or_else(|error| format!("{error:#}"));
        seen.contains(wanted).then_some(())
    })
    .with_context(|| format!("{arguments:?} says {seen}"))
}

/// A policy, and a template that names `image`, of which there is no pod.
fn wishes(image: &str) -> String {
    let policy = json!({
        "apiVersion": "hermes.cloudpilot.ai/v1alpha1", "kind": "HermesPolicy", "metadata": {"name": "all"},
        "spec": {"imageSelectors": [{"imageRegex": ".*"}]},
    });
    let labels = json!({"app": "service"});
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "service", "namespace": "default"},
        "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels}, "spec": {"containers": [{"name": "main", "image": image}]},
        }},
    });
    format!("{policy}\n---\n{deployment}\n")
}

/// A node with a pod of the nodes' account, and the token that the pod has.
pub(crate) fn pod_token(cluster: &Cluster) -> Result<String> {
    cluster.apply(
        "apiVersion: v1\nkind: Node\nmetadata: {name: node-1}\n---\napiVersion: v1\nkind: ServiceAccount\n\
         metadata: {name: hermes-node, namespace: hermes-system}\n---\napiVersion: v1\nkind: Pod\n\
         metadata: {name: daemon, namespace: hermes-system}\nspec: {serviceAccountName: hermes-node, automountServiceAccountToken: false, nodeName: node-1, \
         containers: [{name: daemon, image: daemon}]}\n",
    )?;
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"audiences": ["hermes-controller"], "expirationSeconds": 3600,
                 "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "daemon"}},
    });
    let answer = cluster.create_raw("/api/v1/namespaces/hermes-system/serviceaccounts/hermes-node/token", &request)?;
    let answer: Value = serde_json::from_slice(&answer)?;
    Ok(answer["status"]["token"].as_str().context("an answer without a token")?.to_owned())
}

/// A cluster with the definitions and the controller's rights, and the controller's kubeconfig.
pub(crate) fn installed() -> Result<(Cluster, PathBuf)> {
    let cluster = Cluster::start()?;
    definitions().iter().try_for_each(|each| cluster.apply(&each.yaml()))?;
    cluster.apply(RIGHTS)?;
    for kind in ["hermespolicies", "hermesimages", "hermesnodes"] {
        wait_for("served definitions", DEADLINE, || cluster.get(&["get", kind]).ok())?;
    }
    let kubeconfig = cluster.service_account(NAMESPACE, "hermes-controller")?;
    Ok((cluster, kubeconfig))
}

/// The arguments of a daemon that joins as `node-1`, with its pod's token.
pub(crate) fn node_arguments(cluster: &Cluster, replica: &Replica, token: &Path) -> Result<Vec<String>> {
    fs::write(token, pod_token(cluster)?)?;
    let roots = replica.state.join("api-roots.pem");
    let arguments = [
        "--listen",
        "127.0.0.1:0",
        "--controller",
        &replica.address()?,
        "--controller-ca",
        roots.to_str().context("UTF-8")?,
        "--controller-token",
        token.to_str().context("UTF-8")?,
        "--node-name",
        "node-1",
    ];
    Ok(arguments.map(str::to_owned).to_vec())
}

#[test]
fn a_policy_makes_an_image_ready_for_nodes_and_a_second_replica_goes_on() -> Result<()> {
    let scratch = ScratchDir::new("controller-kubernetes")?;
    let sample = Sample::new(&scratch.path().join("layout"))?;
    let registry = FaultyRegistry::start(sample.layout.dir())?;
    let image = registry.image(TAG);
    let (cluster, kubeconfig) = installed()?;
    let first = Replica::start(&scratch, &kubeconfig, "first", &[])?;
    first.address()?;
    let mut second = Replica::start(&scratch, &kubeconfig, "second", &[])?;

    // No pod is there yet.
    cluster.apply(&wishes(&image))?;
    let images = ["get", "hermesimages", "-o", "jsonpath={.items[*].status.phase}"];
    see(&cluster, &images, "Ready").with_context(|| first.log())?;
    see(&cluster, &["get", "hp", "all", "-o", "jsonpath={.status.ready}"], "1").with_context(|| first.log())?;
    see(&cluster, &["get", "events", "-A", "-o", "jsonpath={.items[*].reason}"], "IndexReady")?;

    // A node that has nothing but its pod's token and the controller's roots reads by that index.
    let roots = first.state.join("api-roots.pem");
    let arguments = node_arguments(&cluster, &first, &scratch.path().join("token"))?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let daemon = Daemon::start(hermes(), &scratch.path().join("node"), &arguments)?;
    let dir = scratch.make("image")?;
    wait_for("a lazy mount", DEADLINE, || {
        let mounted = daemon.command(&["mount", &image]).arg(&dir).arg("--no-build").output().ok()?;
        mounted.status.success().then_some(())
    })
    .with_context(|| format!("{}\n{}", daemon.log(), first.log()))?;
    sample.check(&dir).with_context(|| daemon.log())?;
    see(&cluster, &["get", "hermesnodes", "-o", "name"], "node-1").with_context(|| first.log())?;

    // The other replica goes on with the same keys, and reads no layer again.
    let keys = fs::read_to_string(first.state.join("trusted-keys"))?;
    let read = registry.blob_requests();
    let killed = Instant::now();
    first.kill()?;
    second.address()?;
    println!("the second replica leads {:.1} s after the first was killed", killed.elapsed().as_secs_f64());
    ensure!(fs::read_to_string(second.state.join("trusted-keys"))? == keys, "other keys\n{}", second.log());
    ensure!(fs::read(second.state.join("api-roots.pem"))? == fs::read(&roots)?, "another authority");
    see(&cluster, &images, "Ready").with_context(|| second.log())?;
    // The configuration, when the name is resolved.
    let blobs = registry.blob_requests() - read;
    ensure!(blobs <= 1, "{blobs} blobs were read again\n{}", second.log());
    ensure!(second.process.stop()?.success(), "{}", second.log());
    Ok(())
}
