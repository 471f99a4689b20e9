//! Indexes in a real registry, as OCI artifacts: everything goes on from there after a restart, what is given up is deleted, and a
//! registry that deletes nothing is not in the way.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_tests::faulty::{FaultyRegistry, login_header};
use hermes_tests::guard::{ProcessGuard, ScratchDir, wait_for};
use hermes_tests::layout::Layout;
use hermes_tests::web::get_with;
use serde_json::{Value, json};

use crate::controller::{Controller, layer};

/// Starts within seconds, where others compile.
const DEADLINE: Duration = Duration::from_secs(60);
/// `ann` with the password `right`, as `htpasswd -B` writes it.
const USERS: &str = "ann:$2b$05$8bHhmJZFnKfBihJEnBymheETTcg/kIsAbF.xMi42zuCVcRrdzzCBW\n";
const REPOSITORY: &str = "team/indexes";

/// Docker's registry, as Debian packages it, which wants a login.
struct Store {
    _process: ProcessGuard,
    host: String,
}

impl Store {
    fn start(scratch: &ScratchDir, deletes: bool) -> Result<Self> {
        let folder = scratch.make("registry")?;
        fs::write(folder.join("users"), USERS)?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let config = json!({
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": folder.join("data")}, "delete": {"enabled": deletes}},
            "http": {"addr": address.to_string()},
            "auth": {"htpasswd": {"realm": "test", "path": folder.join("users")}},
        });
        let path = folder.join("config.yml");
        fs::write(&path, config.to_string())?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = ProcessGuard::start(&mut command).context("docker-registry; tools/setup test installs it")?;
        let store = Self { _process: process, host: address.to_string() };
        wait_for("the registry", DEADLINE, || store.get("").ok())?;
        Ok(store)
    }

    fn get(&self, path: &str) -> Result<Value> {
        let login = login_header("ann", "right");
        let head = format!("authorization: {login}\r\naccept: application/vnd.oci.image.manifest.v1+json");
        let answer = get_with(&self.host, &format!("/v2/{path}"), &head)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
        Ok(serde_json::from_str(body)?)
    }

    fn tags(&self) -> Result<Vec<String>> {
        let list = self.get(&format!("{REPOSITORY}/tags/list"))?;
        let tags = list["tags"].as_array().into_iter().flatten().filter_map(Value::as_str);
        Ok(tags.map(str::to_owned).collect())
    }

    /// The tags that stand for objects, and not for deleted ones.
    fn objects(&self) -> Result<BTreeSet<String>> {
        let mut objects = BTreeSet::new();
        for tag in self.tags()? {
            let manifest = self.get(&format!("{REPOSITORY}/manifests/{tag}"))?;
            if manifest["artifactType"] == "application/vnd.hermes.object.v1" {
                objects.insert(tag);
            }
        }
        Ok(objects)
    }

    /// Lets `controller` in, and returns its arguments.
    fn arguments(&self, folder: &Path) -> Result<Vec<String>> {
        let header = login_header("ann", "right");
        let auth = header.strip_prefix("Basic ").unwrap_or_default();
        let login = json!({"auths": {self.host.as_str(): {"auth": auth}}});
        // The file that the controller of the tests looks at.
        fs::write(folder.join("none.json"), login.to_string())?;
        Ok(vec!["--artifacts".to_owned(), format!("oci://{}/{REPOSITORY}", self.host)])
    }
}

/// Statements, references, records of images and of layers.
fn count(tags: &BTreeSet<String>) -> [usize; 4] {
    let kinds = ["statements-", "references-", "images-", "layers-"];
    kinds.map(|kind| tags.iter().filter(|tag| tag.starts_with(kind)).count())
}

fn check(name: &str, deletes: bool) -> Result<()> {
    let mut controller = Controller::new(name)?;
    let store = Store::start(&controller.scratch, deletes)?;
    let layout = Layout::create(&controller.scratch.path().join("layout"))?;
    let shared = layout.put_layer(&layer("shared", 600_000))?;
    let mut images = Vec::new();
    for tag in ["v1", "v2"] {
        let own = layout.put_layer(&layer(tag, 300_000))?;
        images.push(layout.add_stored(tag, &[shared.clone(), own], &json!({}))?);
    }
    let registry = FaultyRegistry::start(layout.dir())?;
    let arguments = store.arguments(controller.scratch.path())?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    controller.policy("team", "team/app")?;
    controller.images(&[registry.image("v1"), registry.image("v2")])?;
    controller.start(&arguments)?;
    controller.wait_ready("team", 2)?;
    let all = store.objects()?;
    ensure!(all.contains("hermes-controller.json") && count(&all) == [2, 2, 2, 3], "{all:?}");
    let statement = format!("statements-{}.json", images[0].manifest.hex());
    let manifest = store.get(&format!("{REPOSITORY}/manifests/{statement}"))?;
    let named = &manifest["annotations"]["hermes.cloudpilot.ai/image"];
    ensure!(*named == images[0].manifest.to_string(), "{manifest}");
    ensure!(manifest["layers"][0]["mediaType"] == "application/vnd.hermes.object.v1", "{manifest}");

    // Another process has it all, and reads no layer.
    controller.kill()?;
    let before = registry.ledger().answers();
    controller.start(&arguments)?;
    controller.wait_ready("team", 2)?;
    let layers = images.iter().flat_map(|image| &image.layers).map(|layer| layer.layer_id.to_string()).collect();
    ensure!(registry.ledger().delivered(&layers, before).bytes == 0, "layers are read again");

    // What is given up is gone, also for the next one.
    controller.images(&[registry.image("v1")])?;
    let left =
        controller.wait("the other to go", || store.objects().ok().filter(|left| count(left) == [1, 1, 1, 2]))?;
    controller.wait("its artifacts to go", || {
        let artifacts = |tags: &BTreeSet<String>| tags.iter().filter(|tag| tag.starts_with("artifacts-")).count();
        (artifacts(&store.objects().ok()?) < artifacts(&all)).then_some(())
    })?;
    let tags: BTreeSet<String> = store.tags()?.into_iter().collect();
    ensure!(if deletes { tags.is_subset(&all) && tags != all } else { tags == all }, "{tags:?} of {all:?}");
    ensure!(controller.log().contains("the registry deletes nothing") != deletes, "{}", controller.log());
    controller.stop()?;
    controller.start(&arguments)?;
    controller.wait_ready("team", 1)?;
    ensure!(store.objects()?.is_subset(&left), "{:?}", store.tags()?);
    // What is built again takes the place of what was deleted.
    controller.images(&[registry.image("v1"), registry.image("v2")])?;
    controller.wait_ready("team", 2)?;
    ensure!(store.objects()? == all, "{:?} and not {all:?}", store.objects()?);
    let login = login_header("ann", "right");
    ensure!(!controller.log().contains(login.trim_start_matches("Basic ")), "a login is in the log");
    controller.stop()
}

#[test]
fn indexes_in_a_registry_are_found_again_and_deleted() -> Result<()> {
    check("ctl-oci", true)
}

#[test]
fn a_registry_that_deletes_nothing_holds_empty_manifests() -> Result<()> {
    check("ctl-oci-keeps", false)
}
