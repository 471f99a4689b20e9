//! The chart: what it renders is what is committed, an API server takes all of it, and wrong values are refused.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_tests::command::run;
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::kubernetes::Cluster;

/// How long the API server may take to serve something, on a machine that is busy with other tests.
const DEADLINE: Duration = Duration::from_secs(90);
const NAMESPACE: &str = "hermes-system";
/// What `kubectl apply` takes without Helm, in the order of docs/kubernetes.md.
const WITHOUT_HELM: [&str; 3] = ["deploy/chart/definitions", "deploy/rbac.yaml", "deploy/manifests"];

pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A program of one of the tools, which print the folder that it is in.
pub(crate) fn program(tool: &str) -> Result<PathBuf> {
    let printed = run(&mut Command::new(root().join("tools").join(tool)))?;
    Ok(Path::new(String::from_utf8(printed)?.trim_end()).join(tool))
}

fn helm(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("helm")?);
    command.current_dir(root()).args(arguments);
    Ok(command)
}

/// What the chart renders with these values.
fn template(values: &[&str]) -> Result<String> {
    let mut command = helm(&["template", "hermes", "deploy/chart", "--namespace", NAMESPACE])?;
    command.args(values);
    Ok(String::from_utf8(run(&mut command)?)?)
}

/// The values that are applied to the API server, each with a text that must be in what they render.
const VALUES: [(&[&str], &str); 8] = [
    (&[], "kind: DaemonSet"),
    (&["--set", "node.remove=true,node.purge=true,node.drainSeconds=5"], "--purge"),
    (
        &["--set", "controller.replicas=1,controller.artifacts.kind=persistentVolumeClaim"],
        "claimName: hermes-artifacts",
    ),
    (
        &[
            "--set",
            "controller.artifacts.kind=objectStore,controller.artifacts.place=s3://bucket/hermes,controller.artifacts.secret=s3",
            "--set",
            "controller.artifacts.environment.AWS_REGION=eu-west-1",
        ],
        "--artifacts=s3://bucket/hermes",
    ),
    (&["--set", "pullSecrets.namespaces={default,kube-system}"], "kind: RoleBinding"),
    (
        &[
            "--set",
            "controller.hostNetwork=true,node.controllers={10.0.0.1:7443,10.0.0.2:7443},controller.caBundle=ca",
            "--set",
            "controller.dockerConfig=logins,image.pullSecrets={registry},node.budget=100000000000,node.zone=a",
        ],
        "--controller=10.0.0.2:7443",
    ),
    // As from a file, where numbers are floating.
    (&["--set-json", "node.budget=100000000000"], "--budget=100000000000"),
    (&["--set", "monitoring.dashboard.enabled=true,node.enabled=false"], "hermes.json"),
];

#[test]
fn what_is_rendered_is_up_to_date() -> Result<()> {
    run(Command::new(root().join("tools/render")).arg("--check")).map(drop)
}

#[test]
fn helm_finds_no_fault_and_wrong_values_are_refused() -> Result<()> {
    run(&mut helm(&["lint", "--strict", "deploy/chart", "--kube-version", "1.29.0"])?)?;
    for (values, wanted) in VALUES {
        for version in ["1.20.15", "1.24.0", "1.33.0"] {
            let rendered = template(&[values, &["--kube-version", version]].concat())?;
            ensure!(rendered.contains(wanted), "{values:?} give no {wanted}");
            let is_new = rendered.contains("apiVersion: policy/v1\n");
            ensure!(version != "1.20.15" || !is_new, "policy/v1 for {version}");
            ensure!(
                version != "1.33.0" || !rendered.contains("apiVersion: policy/v1beta1"),
                "policy/v1beta1 for {version}"
            );
        }
    }
    let rendered = template(&["--set", "monitoring.serviceMonitor.enabled=true,monitoring.rules.enabled=true"])?;
    for wanted in ["kind: ServiceMonitor", "kind: PrometheusRule", "alert: HermesReadsFail"] {
        ensure!(rendered.contains(wanted), "no {wanted}");
    }
    for (wrong, named) in [
        ("node.compleet=idle", "compleet"),
        ("controller.builds=0", "builds"),
        ("controller.artifacts.kind=disk", "kind"),
        ("controller.artifacts.kind=objectStore", "controller.artifacts.place"),
        (
            "controller.artifacts.kind=persistentVolumeClaim,controller.artifacts.accessMode=ReadWriteOnce",
            "ReadWriteMany",
        ),
        ("node.registries.credentialProviderConfig=/a", "credentialProviderBinDir"),
        ("node.state=relative", "state"),
        ("node.controllers={controller}", "controllers"),
        ("image.digest=latest", "digest"),
    ] {
        let refused = template(&["--set", wrong]).err().with_context(|| format!("{wrong} is taken"))?;
        ensure!(format!("{refused:#}").contains(named), "{wrong}: {refused:#}");
    }
    Ok(())
}

/// kubectl compares with the API server's schema and refuses fields that it does not have; the API server does what it would
/// do with each object, except for keeping it.
fn try_all(cluster: &Cluster, scratch: &ScratchDir, manifests: &str) -> Result<()> {
    let file = scratch.path().join("manifests.yaml");
    std::fs::write(&file, manifests)?;
    let file = file.to_str().context("UTF-8")?;
    cluster.get(&["apply", "--validate=true", "--dry-run=server", "-f", file]).map(drop)
}

#[test]
fn an_api_server_takes_all_of_it() -> Result<()> {
    let scratch = ScratchDir::new("chart")?;
    let cluster = Cluster::start()?;
    // As docs/kubernetes.md has it without Helm. 1.20 has no policy/v1, so that one object is rendered for it.
    let at = |path: &str| root().join(path).to_str().map(str::to_owned).context("UTF-8");
    for path in &WITHOUT_HELM[..2] {
        cluster.get(&["apply", "--validate=true", "-f", &at(path)?])?;
    }
    for kind in ["hermespolicies", "hermesimages", "hermesnodes"] {
        wait_for("served definitions", DEADLINE, || cluster.get(&["get", kind]).ok())?;
    }
    for (values, _) in VALUES {
        let rendered = template(&[values, &["--kube-version", "1.20.2"]].concat())?;
        try_all(&cluster, &scratch, &rendered).with_context(|| format!("{values:?}"))?;
    }
    for each in ["controller", "node"] {
        let text = std::fs::read_to_string(root().join(format!("deploy/manifests/{each}.yaml")))?;
        let text = text.replace("apiVersion: policy/v1\n", "apiVersion: policy/v1beta1\n");
        try_all(&cluster, &scratch, &text).with_context(|| each.to_owned())?;
    }
    // Every example, for real.
    cluster.get(&["create", "namespace", "team"])?;
    cluster.get(&["apply", "--validate=true", "-R", "-f", &at("deploy/examples")?])?;
    let policies = cluster.get(&["get", "hermespolicies", "-o", "name"])?;
    ensure!(policies.lines().count() >= 4, "{policies}");
    Ok(())
}

#[test]
fn helm_installs_upgrades_and_uninstalls_it() -> Result<()> {
    let cluster = Cluster::start()?;
    let scratch = ScratchDir::new("helm")?;
    let helm = |arguments: &[&str]| -> Result<String> {
        let mut command = helm(arguments)?;
        command.env("KUBECONFIG", cluster.admin()).env("HOME", scratch.path());
        Ok(String::from_utf8(run(command.args(["--namespace", NAMESPACE]))?)?)
    };
    let notes = helm(&["install", "hermes", "deploy/chart", "--create-namespace"])?;
    ensure!(notes.contains("kind: HermesPolicy"), "no next step: {notes}");
    let kinds = "deployment,daemonset,service,configmap,networkpolicy,poddisruptionbudget,serviceaccount,role";
    let there = cluster.get(&["get", kinds, "-n", NAMESPACE, "-o", "name"])?;
    for wanted in [
        "deployment.apps/hermes-controller",
        "daemonset.apps/hermes-node",
        "service/hermes-controller",
        "configmap/hermes-controller-roots",
        "networkpolicy.networking.k8s.io/hermes-controller",
        "poddisruptionbudget.policy/hermes-controller",
    ] {
        ensure!(there.contains(wanted), "no {wanted} in {there}");
    }
    // The controller's own field is not Helm's: it stays over an upgrade.
    let roots = ["patch", "configmap", "hermes-controller-roots", "-n", NAMESPACE, "--type=merge"];
    cluster.get(&[&roots[..], &["--patch", r#"{"data": {"api-roots.pem": "roots"}}"#]].concat())?;
    wait_for("served definitions", DEADLINE, || cluster.get(&["get", "hermespolicies"]).ok())?;
    cluster.apply(
        "{apiVersion: hermes.cloudpilot.ai/v1alpha1, kind: HermesPolicy, metadata: {name: kept}, \
         spec: {imageSelectors: [{imageRegex: x}]}}",
    )?;
    helm(&[
        "upgrade",
        "hermes",
        "deploy/chart",
        "--reset-then-reuse-values",
        "--set",
        "controller.replicas=1,node.remove=true",
    ])?;
    let value = |arguments: &[&str]| cluster.get(arguments);
    let roots = value(&[
        "get",
        "configmap",
        "hermes-controller-roots",
        "-n",
        NAMESPACE,
        "-o",
        "jsonpath={.data.api-roots\\.pem}",
    ])?;
    ensure!(roots == "roots", "an upgrade took the roots away: {roots}");
    let arguments = value(&["get", "daemonset", "hermes-node", "-n", NAMESPACE, "-o", "jsonpath={..args}"])?;
    ensure!(arguments.contains("--remove"), "{arguments}");
    ensure!(!value(&["get", "pdb", "-n", NAMESPACE, "-o", "name"])?.contains("hermes"), "a budget for one replica");
    helm(&["uninstall", "hermes"])?;
    ensure!(value(&["get", "deployment,daemonset", "-n", NAMESPACE, "-o", "name"])?.is_empty(), "something is left");
    ensure!(value(&["get", "hermespolicies", "-o", "name"])?.contains("kept"), "the policies went with the release");
    Ok(())
}
