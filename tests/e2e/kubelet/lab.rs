//! A cluster with two real nodes, a registry, and Hermes as its chart installs it: two replicas of the controller, and pods that keep
//! the daemon on their nodes.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_image::ids::Digest;
use hermes_registry::Options;
use hermes_snapshotter::status::{ImageStatus, NodeStatus};
use hermes_tests::command::run;
use hermes_tests::faulty::{FaultyRegistry, Site as Place};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::kubernetes::Cluster;
use hermes_tests::kubernetes::images::{self, HERMES, PAUSE, SERVICE_PORT};
use hermes_tests::kubernetes::node::{Build, Node};
use hermes_tests::kubernetes::service::ReachableService;
use hermes_tests::kubernetes::site::{HOME, Site};
use hermes_tests::layout::{Layout, NewLayer};
use hermes_tests::web;
use serde_json::{Value, json};

/// How long something may take that has no time of its own, where others compile.
pub(super) const DEADLINE: Duration = Duration::from_secs(120);
/// Where everything of Hermes is.
pub(super) const NAMESPACE: &str = "hermes-system";
/// The lines of containerd, one for each node.
const LINES: [&str; 2] = ["1.7", "1.6"];
/// The address of the controller's Service.
const CONTROLLER: &str = "10.96.7.43";
/// The pods of the controller.
const CONTROLLERS: &str = "app.kubernetes.io/component=controller";
/// What the registry sends at most, in bits per second.
const REGISTRY_RATE: NonZeroU64 = NonZeroU64::new(400_000_000).expect("it is not 0");
/// All parts. Fields drop in this order.
#[derive(Debug)]
pub(super) struct Lab {
    pub(super) nodes: Vec<Node>,
    pub(super) cluster: Cluster,
    pub(super) registry: FaultyRegistry,
    pub(super) site: Site,
    pub(super) layout: Layout,
    pub(super) busybox: NewLayer,
    service: Option<ReachableService>,
    scratch: ScratchDir,
}

impl Lab {
    /// Starts a cluster with two nodes, on which nothing of Hermes is, and a registry with an image for it.
    pub(super) fn start() -> Result<Self> {
        let scratch = ScratchDir::new("kubelet")?;
        let layout = Layout::create(&scratch.path().join("layout"))?;
        let busybox = images::busybox()?;
        images::add_pause(&layout, &busybox)?;
        images::add_hermes(&layout, &busybox, Path::new(env!("CARGO_BIN_EXE_hermes")))?;
        let site = Site::new(LINES.len())?;
        let address = SocketAddr::from((HOME, 5000));
        let place = Place { network: Some(Arc::clone(site.network())), address, delay: Duration::ZERO };
        let options = Options { bandwidth_bits_per_second: Some(REGISTRY_RATE), ..Options::default() };
        let registry = FaultyRegistry::at(layout.dir(), options, place)?;
        let cluster = Cluster::on(&site)?;
        let (pause, host) = (registry.image(PAUSE), registry.host());
        let build = |(number, containerd): (usize, &'static &'static str)| {
            Node::boot(&cluster, &site, &Build { number, containerd, pause: &pause, registry: &host })
        };
        let nodes = LINES.iter().enumerate().map(build).collect::<Result<Vec<_>>>()?;
        let lab = Self { nodes, cluster, registry, site, layout, busybox, service: None, scratch };
        lab.nodes.iter().try_for_each(|node| node.wait(&lab.cluster))?;
        Ok(lab)
    }

    /// Installs the chart, and waits until one of two replicas leads and both nodes have joined.
    pub(super) fn install(&mut self) -> Result<()> {
        let indexes = self.scratch.make("indexes")?;
        // Whoever the controller runs as.
        fs::set_permissions(&indexes, fs::Permissions::from_mode(0o777))?;
        let values = self.scratch.path().join("values.json");
        fs::write(&values, values_of(&self.registry).to_string())?;
        self.cluster.apply(&format!("{}\n---\n{}", namespace(), volume(&indexes)))?;
        // Pods that came before it would wait for long.
        self.see(&["get", "pvc", "-n", NAMESPACE, "indexes", "-o", "jsonpath={.status.phase}"], "Bound")?;
        self.helm(&["install", "hermes", "deploy/chart", "--values", values.to_str().context("UTF-8")?])?;
        self.service = Some(self.cluster.reach(&self.site, NAMESPACE, "hermes-controller")?);
        self.see(
            &["get", "deployment", "-n", NAMESPACE, "hermes-controller", "-o", "jsonpath={.status.readyReplicas}"],
            "2",
        )?;
        for node in &self.nodes {
            self.see(&["get", "hermesnode", node.name(), "-o", "jsonpath={.status.connected}"], "true")?;
        }
        Ok(())
    }

    /// Runs Helm on the cluster.
    pub(super) fn helm(&self, arguments: &[&str]) -> Result<()> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = String::from_utf8(run(&mut Command::new(root.join("tools/helm")))?)?;
        let mut command = self.site.network().command(Path::new(folder.trim_end()).join("helm"));
        command.current_dir(root).args(arguments).args(["--namespace", NAMESPACE]);
        command.env("KUBECONFIG", self.cluster.admin()).env("HOME", self.scratch.path());
        run(&mut command).map(drop)
    }

    /// The pod that leads, and its node.
    pub(super) fn leader(&self) -> Result<(String, &Node)> {
        let holder = ["get", "lease", "-n", NAMESPACE, "hermes-controller", "-o", "jsonpath={.spec.holderIdentity}"];
        let holder = self.cluster.get(&holder)?;
        let pods = self.object(&["pods", "-n", NAMESPACE, "-l", CONTROLLERS])?;
        let is_it = |pod: &&Value| pod["metadata"]["name"].as_str().is_some_and(|name| holder.starts_with(name));
        let pod = pods["items"].as_array().and_then(|pods| pods.iter().find(is_it)).context("nobody leads")?;
        let node =
            self.nodes.iter().find(|node| pod["spec"]["nodeName"] == node.name()).context("the leader is nowhere")?;
        Ok((holder, node))
    }

    /// What kubectl says, once it is as wanted.
    pub(super) fn see(&self, arguments: &[&str], wanted: &str) -> Result<String> {
        let mut seen = String::new();
        let found = wait_for(wanted, DEADLINE, || {
            seen = self.cluster.get(arguments).unwrap_or_else(|error| format!("{error:#}"));
            seen.contains(wanted).then_some(())
        });
        found.with_context(|| format!("{arguments:?} says {seen}\n{}", self.story()))?;
        Ok(seen)
    }

    /// An object, as JSON.
    pub(super) fn object(&self, arguments: &[&str]) -> Result<Value> {
        let printed = self.cluster.get(&[&["get", "-o", "json"], arguments].concat())?;
        Ok(serde_json::from_str(&printed)?)
    }

    /// Everything that says what has happened, for a failure's message.
    pub(super) fn story(&self) -> String {
        let mut told = self.events();
        for arguments in [&["get", "pods,hp,hi,hn", "-A", "-o", "wide"][..], &["get", "hi", "-o", "yaml"]] {
            told += &self.cluster.get(arguments).unwrap_or_else(|error| format!("{error:#}\n"));
        }
        for node in &self.nodes {
            told += &format!("{}\n{} hermes.log:\n{}\n", node.logs(), node.name(), node.log("hermes.log"));
        }
        let logs = ["logs", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=hermes", "--tail=200", "--prefix"];
        told + &self.cluster.get(&logs).unwrap_or_else(|error| format!("{error:#}\n"))
    }

    /// All Events, in the order in which they came.
    pub(super) fn events(&self) -> String {
        let columns = "custom-columns=LAST:.lastTimestamp,OBJECT:.involvedObject.kind,NAME:.involvedObject.name,\
                       REASON:.reason,COUNT:.count,MESSAGE:.message";
        let arguments = ["get", "events", "-A", "--sort-by=.metadata.creationTimestamp", "-o", columns];
        self.cluster.get(&arguments).unwrap_or_else(|error| format!("{error:#}\n"))
    }

    /// Applies `manifests`, and says how long it took until the pod with the label `app` answered with `version`.
    pub(super) fn time_to_answer(&self, manifests: &str, app: &str, version: &str) -> Result<Duration> {
        let begun = Instant::now();
        self.cluster.apply(manifests)?;
        self.wait_for_answer(app, version)?;
        Ok(begun.elapsed())
    }

    /// What is known of the image that `tag` stands for, once `is_wanted`.
    pub(super) fn image(&self, tag: &str, is_wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let name = self.registry.image(tag);
        let mut seen = Value::Null;
        let found = wait_for("what is wanted of an image", DEADLINE, || {
            let images = self.object(&["hermesimages"]).ok()?;
            let stands =
                |image: &&Value| image["spec"]["names"].as_array().is_some_and(|names| names.contains(&json!(name)));
            seen = images["items"].as_array()?.iter().find(stands)?.clone();
            is_wanted(&seen).then(|| seen.clone())
        });
        found.with_context(|| format!("{tag}: {seen:#}\n{}", self.story()))
    }

    /// How many percent of an image a node has reported, once `is_wanted`.
    pub(super) fn percent(&self, node: &Node, image: &Value, is_wanted: impl Fn(i64) -> bool) -> Result<i64> {
        let mut seen = Value::Null;
        let found = wait_for("what is wanted of a node's copy", DEADLINE, || {
            let reported = self.object(&["hermesnode", node.name()]).ok()?;
            seen = reported["status"]["images"].clone();
            let copy = seen.as_array()?.iter().find(|copy| copy["digest"] == image["spec"]["digest"])?;
            copy["percent"].as_i64().filter(|percent| is_wanted(*percent))
        });
        found.with_context(|| format!("{} has {seen:#}\n{}", node.name(), self.story()))
    }

    /// Waits until the pods with the label `app` are one that answers with `version`; its address.
    pub(super) fn wait_for_answer(&self, app: &str, version: &str) -> Result<Ipv4Addr> {
        let label = format!("app={app}");
        let address = ["get", "pods", "-l", &label, "-o", "jsonpath={.items[*].status.podIP}"];
        let mut said = String::new();
        let answered = wait_for("an answer of a service", DEADLINE, || {
            said = self.cluster.get(&address).unwrap_or_else(|error| format!("{error:#}"));
            let address: Ipv4Addr = said.trim().parse().ok()?;
            let answer = self.ask(address, "/version").ok()?;
            said = String::from_utf8_lossy(&answer).into_owned();
            (said.trim() == version).then_some(address)
        });
        answered.with_context(|| format!("{app} says {said}\n{}", self.story()))
    }

    /// What the service at `address` has at `path`.
    pub(super) fn ask(&self, address: Ipv4Addr, path: &str) -> Result<Vec<u8>> {
        self.site.network().within(|| web::body(&format!("{address}:{SERVICE_PORT}"), path))
    }

    /// Checks that the service at `address` has the right bytes in a file that nobody had read.
    pub(super) fn check_cold(&self, address: Ipv4Addr, salt: &str, number: usize) -> Result<()> {
        let found = self.ask(address, &format!("/cold/cold-{number}")).with_context(|| self.story())?;
        ensure!(found == images::cold_content(salt, number), "cold-{number} at {address} holds wrong bytes");
        Ok(())
    }

    /// What the daemon of a node knows of itself.
    pub(super) fn status(&self, node: &Node) -> Result<NodeStatus> {
        let printed = node.must("/usr/local/bin/hermes", &["status", "--json"])?;
        Ok(serde_json::from_str(&printed)?)
    }

    /// The process of a node's daemon, once it answers.
    pub(super) fn daemon(&self, node: &Node) -> Result<u32> {
        let answer = wait_for("an answer of the daemon", DEADLINE, || self.status(node).ok());
        Ok(answer.with_context(|| self.story())?.pid)
    }

    /// What a node shows of the image that `name` stands for, and what it has decided about its pull.
    pub(super) fn shown(&self, node: &Node, name: &str) -> Result<ImageStatus> {
        let status = self.status(node)?;
        let pull = status.pulls.iter().rev().find(|pull| pull.reference.contains(name));
        let pull = pull.with_context(|| format!("{} has not pulled {name}: {:?}", node.name(), status.pulls))?;
        ensure!(pull.decision == "lazy", "{}: {pull:?}\n{}", node.name(), self.story());
        let image = status.images.iter().find(|image| image.manifest == pull.manifest).cloned();
        image.with_context(|| format!("{} does not show {name}: {:?}", node.name(), status.images))
    }

    /// Bytes that the registry has delivered to a node so far of the layers of the image `tag`, busybox's left out, which all have.
    pub(super) fn delivered_to(&self, tag: &str, node: &Node) -> Result<u64> {
        self.delivered(tag, |client| client == node.address())
    }

    /// The same for pods, of which none but the controller's read a registry.
    pub(super) fn delivered_to_controllers(&self, tag: &str) -> Result<u64> {
        self.delivered(tag, |client| client.octets()[..2] == [10, 89])
    }

    fn delivered(&self, tag: &str, is_meant: impl Fn(Ipv4Addr) -> bool) -> Result<u64> {
        let layers = self.layout.image(tag)?.layers;
        let blobs = layers.iter().skip(1).map(|layer| Digest(layer.layer_id.0).to_string()).collect();
        let delivered = self.registry.ledger().delivered(&blobs, 0);
        let is_meant = |client: &IpAddr| matches!(client, IpAddr::V4(client) if is_meant(*client));
        Ok(delivered.clients.iter().filter(|(client, _)| is_meant(client)).map(|(_, client)| client.bytes).sum())
    }

    /// Compressed bytes of the same layers.
    pub(super) fn layer_bytes(&self, tag: &str) -> Result<u64> {
        Ok(self.layout.image(tag)?.layers.iter().skip(1).map(|layer| layer.blob_len_bytes).sum())
    }
}

/// What is different here from the chart's defaults, and why.
fn values_of(registry: &FaultyRegistry) -> Value {
    let (repository, _) =
        registry.image(HERMES).rsplit_once(':').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap_or_default();
    json!({
        "image": {"repository": repository, "tag": HERMES},
        "controller": {
            // Nobody resolves names here.
            "clusterIP": CONTROLLER, "plainHttp": [registry.host()], "refreshSeconds": 5,
            "artifacts": {"kind": "persistentVolumeClaim", "existingClaim": "indexes"},
            "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
        },
        // What readers cause is counted.
        "node": {"controllers": [format!("{CONTROLLER}:7443")], "complete": "never"},
    })
}

fn namespace() -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
}

/// A folder that all nodes have, where a cluster has storage that they share.
fn volume(folder: &Path) -> String {
    let volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "indexes"},
        "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "hostPath": {"path": folder}},
    });
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "indexes", "namespace": NAMESPACE},
        "spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": "indexes",
                 "resources": {"requests": {"storage": "1Gi"}}},
    });
    format!("{volume}\n---\n{claim}")
}
