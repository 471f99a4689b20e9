//! Whatever goes wrong in a cluster is on the objects that it concerns, as a condition and as an Event, with what to do about it;
//! nothing else waits for it, and an object that somebody removes comes back.

use anyhow::{Context as _, Result, ensure};
use hermes_tests::compress::Compression;
use hermes_tests::faulty::{Fault, FaultyRegistry, login_header};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::kubernetes::Cluster;
use hermes_tests::layout::{Layout, LayoutImage, NewLayer};
use serde_json::{Value, json};

use crate::controller::layer;
use crate::controller_kubernetes::{DEADLINE, Replica, installed};

/// Where policies are posted: annotations of `kubectl apply` would not hold the longest.
const POLICIES: &str = "/apis/hermes.cloudpilot.ai/v1alpha1/hermespolicies";
/// As long as an expression may be that etcd still takes, about.
const LONG_REGEX_LEN_BYTES: usize = 1 << 20;

struct Lab {
    cluster: Cluster,
    replica: Replica,
}

impl Lab {
    /// A policy that means images in whose name `regex` is found.
    fn policy(&self, name: &str, regexes: &[&str]) -> Result<()> {
        let selectors: Vec<Value> = regexes.iter().map(|regex| json!({"imageRegex": regex})).collect();
        let policy = json!({
            "apiVersion": "hermes.cloudpilot.ai/v1alpha1", "kind": "HermesPolicy", "metadata": {"name": name},
            "spec": {"imageSelectors": selectors, "imagePullSecrets": ["default/pull"]},
        });
        self.cluster.create_raw(POLICIES, &policy).map(drop)
    }

    fn workload(&self, name: &str, image: &str) -> Result<()> {
        let deployment = json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": "default"},
            "spec": {"replicas": 1, "selector": {"matchLabels": {"app": name}}, "template": {
                "metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": "main", "image": image}]},
            }},
        });
        self.cluster.apply(&deployment.to_string())
    }

    fn get(&self, arguments: &[&str]) -> Option<Value> {
        serde_json::from_str(&self.cluster.get(&[arguments, &["-o", "json"]].concat()).ok()?).ok()
    }

    fn wait<T>(&self, what: &str, condition: impl FnMut() -> Option<T>) -> Result<T> {
        wait_for(what, DEADLINE, condition).with_context(|| self.replica.log())
    }

    /// Waits for a condition of a policy.
    fn condition(&self, policy: &str, kind: &str, reason: &str) -> Result<String> {
        self.wait(&format!("{kind} of {policy} for {reason}"), || {
            let policy = self.get(&["get", "hp", policy])?;
            let conditions = policy["status"]["conditions"].as_array()?;
            let found =
                conditions.iter().find(|condition| condition["type"] == kind && condition["reason"] == reason)?;
            Some(found["message"].as_str()?.to_owned())
        })
    }

    /// Waits for an Event about `object` in which `reason` is named, and returns what it says.
    fn event(&self, object: &str, reason: &str) -> Result<String> {
        self.wait(&format!("an Event about {object} that names {reason}"), || {
            let events = self.get(&["get", "events", "-A"])?;
            let items = events["items"].as_array()?;
            items.iter().find_map(|event| {
                let message = event["message"].as_str()?;
                let is_it = event["involvedObject"]["name"] == object
                    && (event["reason"] == reason || message.starts_with(&format!("{reason}:")));
                is_it.then(|| message.to_owned())
            })
        })
    }

    /// A name that cannot be resolved: on the policy and on the workload.
    fn check_name(&self, policy: &str, reason: &str, advice: &[&str]) -> Result<()> {
        let degraded = self.condition(policy, "Degraded", "ImagesFailed")?;
        ensure!(degraded.contains(reason), "{degraded}");
        for message in [degraded, self.event(policy, reason)?, self.event(&format!("{policy}-work"), reason)?] {
            ensure!(advice.iter().all(|advice| message.contains(advice)), "{message}");
        }
        Ok(())
    }

    /// An image that cannot be indexed: on the policy and on its own object.
    fn check_image(&self, policy: &str, image: &LayoutImage, reason: &str, advice: &str) -> Result<()> {
        let degraded = self.condition(policy, "Degraded", "ImagesFailed")?;
        ensure!(degraded.contains(reason) && degraded.contains(advice), "{degraded}");
        let object = image_object(image);
        let found = self.wait("the object", || {
            self.get(&["get", "hermesimages", &object]).filter(|found| found["status"]["phase"] == "Failed")
        })?;
        ensure!(found["status"]["conditions"][0]["reason"] == reason, "{found}");
        let said = self.event(&object, reason)?;
        ensure!(said.contains(advice), "{said}");
        Ok(())
    }
}

fn image_object(image: &LayoutImage) -> String {
    format!("sha256-{}", image.manifest.hex())
}

#[test]
fn what_goes_wrong_is_on_its_objects_and_nothing_else_waits() -> Result<()> {
    let scratch = ScratchDir::new("controller-troubles")?;
    let layout = Layout::create(&scratch.path().join("layout"))?;
    let good = layout.add("good", &[layer("good", 100_000)], &json!({}))?;
    let torn = NewLayer { tar: vec![7; 20_480], compression: Compression::Gzip(1) };
    let broken = layout.add("broken", &[layer("fine", 10_000), torn], &json!({}))?;
    let mut odd = layout.put_layer(&layer("odd", 10_000))?;
    odd.media_type = "application/x-odd".to_owned();
    layout.add_stored("odd", &[odd], &json!({}))?;
    let slow = layout.add("slow", &[layer("slow", 3_000_000)], &json!({}))?;
    let registry = FaultyRegistry::start(layout.dir())?;
    let (locked, hanging) = (FaultyRegistry::start(layout.dir())?, FaultyRegistry::start(layout.dir())?);
    locked.want_login("ann", "right");
    hanging.always(Fault::HangAfter(10_000));

    let (cluster, kubeconfig) = installed()?;
    let header = login_header("ann", "wrong");
    let auth = header.strip_prefix("Basic ").unwrap_or_default();
    let login = json!({"auths": {locked.host(): {"auth": auth}}}).to_string();
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "pull", "namespace": "default"},
        "type": "kubernetes.io/dockerconfigjson", "stringData": {".dockerconfigjson": login},
    });
    cluster.apply(&secret.to_string())?;
    let replica = Replica::start(&scratch, &kubeconfig, "first", &[])?;
    replica.address()?;
    let lab = Lab { cluster, replica };

    // All at once, and what hangs first.
    lab.policy("slow", &[&hanging.host()])?;
    lab.workload("slow-work", &hanging.image("slow"))?;
    lab.policy("locked", &[&locked.host()])?;
    lab.workload("locked-work", &locked.image("good"))?;
    for name in ["gone", "broken", "odd"] {
        lab.policy(name, &[&format!("{}/team/app:{name}$", registry.host())])?;
        lab.workload(&format!("{name}-work"), &registry.image(name))?;
    }
    let long = "a|".repeat(LONG_REGEX_LEN_BYTES / 2);
    lab.policy("long", &[&long, &format!("{}/team/app:good$", registry.host())])?;
    lab.workload("long-work", &registry.image("good"))?;

    lab.check_name("gone", "ImageNotFound", &[":gone", "check the name"])?;
    lab.check_name("locked", "AccessDenied", &["ann"])?;
    lab.check_name("odd", "UnsupportedMediaType", &["application/x-odd"])?;
    lab.check_image("broken", &broken, "LayerInvalid", "push the image again")?;
    // An expression as long as a document: named, and the other one of its policy counts.
    let said = lab.condition("long", "RegexValid", "RegexInvalid")?;
    ensure!(said.contains("imageSelectors[0]") && said.contains("1048576 bytes"), "{said}");
    lab.wait("the good image", || (lab.get(&["get", "hp", "long"])?["status"]["ready"] == 1).then_some(()))?;
    let log = lab.replica.log();
    ensure!(!log.contains("ann:wrong") && !log.contains(auth), "a login is in the log");

    // A policy that goes takes the build along that hangs.
    let object = image_object(&slow);
    lab.wait("the slow one", || {
        (lab.get(&["get", "hermesimages", &object])?["status"]["phase"] == "Building").then_some(())
    })?;
    lab.cluster.get(&["delete", "hp", "slow"])?;
    lab.wait("the build to end", || lab.get(&["get", "hermesimages", &object]).is_none().then_some(()))?;
    let said = lab.event(&object, "Released")?;
    ensure!(said.contains("wanted by no policy"), "{said}");

    // An object that somebody removes comes back as it was.
    let object = image_object(&good);
    let before = lab.get(&["get", "hermesimages", &object]).context("no object")?;
    lab.cluster.get(&["delete", "hermesimages", &object])?;
    let after = lab.wait("the object to come back", || {
        lab.get(&["get", "hermesimages", &object]).filter(|found| found["status"]["phase"] == "Ready")
    })?;
    ensure!(before["metadata"]["uid"] != after["metadata"]["uid"], "it was not removed");
    ensure!(before["spec"] == after["spec"] && before["status"] == after["status"], "{before}\n{after}");
    Ok(())
}
