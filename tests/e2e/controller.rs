//! The controller without Kubernetes, on a real registry with faults: what a policy means becomes ready before anybody pulls it,
//! a node reads lazily by its index, and whatever goes wrong is named and holds nothing else up.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_tests::command::run;
use hermes_tests::compress::Compression;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::{Fault, FaultyRegistry, login_header};
use hermes_tests::guard::{ProcessGuard, ScratchDir, wait_for};
use hermes_tests::layout::{Layout, LayoutImage, NewLayer};
use hermes_tests::sample::{Sample, SampleIndex, content};
use hermes_tests::tarball::{Entry, Tarball};
use rustix::process::Signal;
use serde_json::{Value, json};

/// How long something may take that has no time of its own.
const DEADLINE: Duration = Duration::from_secs(90);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// A controller's folders, and the controller when it runs.
pub(crate) struct Controller {
    pub(crate) scratch: ScratchDir,
    process: Option<ProcessGuard>,
}

impl Controller {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let scratch = ScratchDir::new(name)?;
        fs::create_dir(scratch.path().join("policies"))?;
        Ok(Self { scratch, process: None })
    }

    /// With the sample image, tagged `v1`, in a registry.
    fn with_sample(name: &str) -> Result<(Self, Sample, FaultyRegistry)> {
        let controller = Self::new(name)?;
        let sample = Sample::new(&controller.scratch.path().join("layout"))?;
        let registry = FaultyRegistry::start(sample.layout.dir())?;
        Ok((controller, sample, registry))
    }

    /// Starts it with the policy `team`, which means all images, and waits until `v1` of `registry` is ready.
    fn make_ready(&mut self, registry: &FaultyRegistry) -> Result<()> {
        self.policy("team", "")?;
        self.images(&[registry.image("v1")])?;
        self.start(&[])?;
        self.wait_ready("team", 1)
    }

    /// `hermes index verify` of `image` by what it has, for somebody who trusts `key`.
    fn verify(&self, image: &str, key: &str) -> Command {
        let mut verify = Command::new(hermes());
        verify.args(["index", "verify", image, "--trust", key, "--index"]).arg(self.indexes());
        verify
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.scratch.path().join("state")
    }

    pub(crate) fn indexes(&self) -> PathBuf {
        self.state().join("indexes")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.scratch.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn command(&self, more: &[&str]) -> Result<Command> {
        let mut command = Command::new(hermes());
        command.args(["-v", "controller", "--policies"]).arg(self.scratch.path().join("policies"));
        command.arg("--state").arg(self.state()).arg("--docker-config").arg(self.scratch.path().join("none.json"));
        command.arg("--hosts-dir").arg(self.scratch.path().join("hosts")).args(more);
        let log = File::options().create(true).append(true).open(self.scratch.path().join("log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Ok(command)
    }

    pub(crate) fn start(&mut self, more: &[&str]) -> Result<()> {
        self.process = Some(ProcessGuard::start(&mut self.command(more)?)?);
        Ok(())
    }

    pub(crate) fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("it does not run")?;
        process.signal(Signal::KILL)?;
        process.child().wait()?;
        // What it said last is not to be taken for what the next one says.
        match fs::remove_dir_all(self.state().join("status")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    pub(crate) fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("it does not run")?;
        let status = process.stop()?;
        ensure!(status.success(), "the controller ended with {status}: {}", self.log());
        Ok(())
    }

    /// Writes a policy that means the images in which `regex` is found.
    pub(crate) fn policy(&self, name: &str, regex: &str) -> Result<()> {
        let policy = json!({
            "apiVersion": "hermes.cloudpilot.ai/v1alpha1", "kind": "HermesPolicy", "metadata": {"name": name},
            "spec": {"imageSelectors": [{"imageRegex": regex}], "imagePullSecrets": ["team/pull"]},
        });
        Ok(fs::write(self.policy_path(name), policy.to_string())?)
    }

    pub(crate) fn policy_path(&self, name: &str) -> PathBuf {
        self.scratch.path().join("policies").join(format!("{name}.json"))
    }

    /// Writes the list of images that stands for workloads.
    pub(crate) fn images(&self, images: &[String]) -> Result<()> {
        let list = json!({
            "apiVersion": "hermes.cloudpilot.ai/v1alpha1", "kind": "ImageList", "metadata": {"name": "list"},
            "images": images,
        });
        Ok(fs::write(self.policy_path("list"), list.to_string())?)
    }

    pub(crate) fn status(&self, policy: &str) -> Option<Value> {
        let path = self.state().join("status/policies").join(format!("{policy}.json"));
        Some(serde_json::from_slice::<Value>(&fs::read(path).ok()?).ok()?["status"].take())
    }

    pub(crate) fn image(&self, image: &LayoutImage) -> Option<Value> {
        let path = self.state().join("status/images").join(format!("{}.json", image.manifest.hex()));
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Waits until `policy` has so many images that are ready.
    pub(crate) fn wait_ready(&self, policy: &str, count: i64) -> Result<()> {
        self.wait(&format!("{count} images of {policy}"), || {
            (self.status(policy)?["ready"].as_i64() == Some(count)).then_some(())
        })
    }

    pub(crate) fn wait<T>(&self, what: &str, condition: impl FnMut() -> Option<T>) -> Result<T> {
        wait_for(what, DEADLINE, condition).with_context(|| self.log())
    }

    /// Waits until `policy` has an image that failed for `reason`, and returns what is said of it.
    pub(crate) fn wait_failed(&self, policy: &str, reason: &str) -> Result<String> {
        self.wait(&format!("{policy} to fail with {reason}"), || {
            let status = self.status(policy)?;
            let errors = status["images"].as_array()?.iter().filter_map(|image| image["error"].as_str());
            errors.map(str::to_owned).find(|error| error.starts_with(reason))
        })
    }

    pub(crate) fn key(&self) -> Result<String> {
        let keys = fs::read_to_string(self.state().join("trusted-keys"))?;
        Ok(keys.lines().next().context("no key")?.to_owned())
    }

    pub(crate) fn count(&self, kind: &str) -> usize {
        fs::read_dir(self.indexes().join(kind)).map_or(0, Iterator::count)
    }
}

/// A layer with one file, of a content that its name says.
pub(crate) fn layer(name: &str, len_bytes: u64) -> NewLayer {
    NewLayer { tar: Tarball::of([Entry::file(name, content(name, len_bytes))]), compression: Compression::Gzip(1) }
}

#[test]
fn what_a_policy_means_is_ready_and_a_node_reads_lazily_by_it() -> Result<()> {
    let (mut controller, sample, registry) = Controller::with_sample("ctl-ready")?;
    let image = registry.image("v1");
    controller.policy("team", "team/app")?;
    controller.policy("wrong", "(")?;
    controller.images(&[image.clone(), "not/meant:1".to_owned()])?;
    controller.start(&[])?;
    controller.wait_ready("team", 1)?;
    let known = controller.image(&sample.image).context("no status of the image")?;
    ensure!(known["phase"] == "Ready" && known["access"] == "public", "{known}");
    let wrong = controller.wait("the condition", || controller.status("wrong"))?;
    let condition = &wrong["conditions"][1];
    ensure!(condition["type"] == "RegexValid" && condition["status"] == "False", "{wrong}");
    ensure!(condition["message"].as_str().is_some_and(|text| text.contains("character 1")), "{wrong}");

    let index = SampleIndex { folder: controller.indexes(), key: controller.key()? };
    run(controller.verify(&image, &index.key).arg("--read"))?;

    let before = registry.ledger().answers();
    let daemon = Daemon::start(hermes(), &controller.scratch.path().join("node"), &[])?;
    let mount = controller.scratch.path().join("mount");
    daemon.mount(&image, &mount, &index, &[])?;
    sample.check_file(&mount, "gzip/small")?;
    let layers = sample.image.layers.iter().map(|layer| layer.layer_id.to_string()).collect();
    let delivered = registry.ledger().delivered(&layers, before);
    let all: u64 = sample.image.layers.iter().map(|layer| layer.blob_len_bytes).sum();
    ensure!(delivered.bytes < all / 2, "{} bytes came for one small file of {all}", delivered.bytes);
    sample.check(&mount)?;
    daemon.stop()?;
    controller.stop()
}

#[test]
fn a_controller_that_is_killed_goes_on_after_the_layers_that_it_has() -> Result<()> {
    let mut controller = Controller::new("ctl-killed")?;
    let layout = Layout::create(&controller.scratch.path().join("layout"))?;
    let layers = [layer("first", 2_000_000), layer("second", 2_000_000), layer("third", 2_000_000)];
    let image = layout.add("v1", &layers, &json!({}))?;
    let registry = FaultyRegistry::start(layout.dir())?;
    // The last layer stops in the middle; resolving reads the configuration.
    let last = image.layers[2].layer_id.to_string();
    registry.plan(|number| if number >= 4 { Fault::HangAfter(100_000) } else { Fault::Pass });
    controller.policy("team", "")?;
    controller.images(&[registry.image("v1")])?;
    controller.start(&[])?;
    controller.wait("two layers", || (controller.count("layers") == 2).then_some(()))?;
    controller.wait("the last layer to be asked for", || {
        registry.blob_log().iter().any(|request| request.path.contains(&last)).then_some(())
    })?;
    controller.kill()?;
    registry.always(Fault::Pass);
    controller.start(&[])?;
    controller.wait_ready("team", 1)?;
    let asked = registry.blob_log();
    for layer in &image.layers[..2] {
        let id = layer.layer_id.to_string();
        ensure!(!asked.iter().any(|request| request.path.contains(&id)), "{id} is read again: {asked:?}");
    }
    // What it keeps survives the next death, without reading anything.
    controller.kill()?;
    let before = registry.ledger().answers();
    controller.start(&[])?;
    controller.wait_ready("team", 1)?;
    let layers = image.layers.iter().map(|layer| layer.layer_id.to_string()).collect();
    ensure!(registry.ledger().delivered(&layers, before).bytes == 0, "layers are read again");
    ensure!((controller.count("layers"), controller.count("artifacts")) == (3, 12));
    controller.stop()
}

#[test]
fn what_cannot_be_had_is_named_and_holds_nothing_up() -> Result<()> {
    let mut controller = Controller::new("ctl-named")?;
    let layout = Layout::create(&controller.scratch.path().join("layout"))?;
    layout.add("good", &[layer("good", 100_000)], &json!({}))?;
    let broken = NewLayer { tar: vec![7; 20_480], compression: Compression::Gzip(1) };
    layout.add("broken", &[layer("fine", 10_000), broken], &json!({}))?;
    let mut odd = layout.put_layer(&layer("odd", 10_000))?;
    odd.media_type = "application/x-odd".to_owned();
    layout.add_stored("odd", &[odd], &json!({}))?;
    let registry = FaultyRegistry::start(layout.dir())?;
    controller.policy("good", ":good")?;
    controller.policy("gone", ":gone")?;
    controller.policy("broken", ":broken")?;
    controller.policy("nobody", "127.0.0.1:1/")?;
    controller.policy("odd", ":odd")?;
    let mut images = ["good", "gone", "broken", "odd"].map(|tag| registry.image(tag)).to_vec();
    images.push("127.0.0.1:1/a:1".to_owned());
    controller.images(&images)?;
    controller.start(&["--builds", "1"])?;
    let gone = controller.wait_failed("gone", "ImageNotFound")?;
    ensure!(gone.contains(":gone") && gone.contains("check the name"), "{gone}");
    let broken = controller.wait_failed("broken", "LayerInvalid")?;
    ensure!(broken.contains("push the image again"), "{broken}");
    let odd = controller.wait_failed("odd", "UnsupportedMediaType")?;
    ensure!(odd.contains("application/x-odd"), "{odd}");
    let nobody = controller.wait_failed("nobody", "RegistryUnavailable")?;
    ensure!(nobody.contains("127.0.0.1:1"), "{nobody}");
    controller.wait_ready("good", 1)?;
    controller.stop()
}

#[test]
fn wrong_logins_are_named_and_right_ones_are_used() -> Result<()> {
    let (mut controller, sample, registry) = Controller::with_sample("ctl-logins")?;
    registry.want_login("ann", "right");
    let secrets = controller.state().join("secrets/team");
    fs::create_dir_all(&secrets)?;
    let write = |password: &str| {
        let login = login_header("ann", password);
        let auth = login.strip_prefix("Basic ").unwrap_or_default();
        fs::write(secrets.join("pull.json"), json!({"auths": {registry.host(): {"auth": auth}}}).to_string())
    };
    write("wrong")?;
    controller.policy("team", "")?;
    controller.images(&[registry.image("v1")])?;
    controller.start(&["--refresh", "2"])?;
    let denied = controller.wait_failed("team", "AccessDenied")?;
    ensure!(denied.contains("ann") && !denied.contains("wrong"), "{denied}");
    write("right")?;
    controller.wait_ready("team", 1)?;
    let known = controller.image(&sample.image).context("no status of the image")?;
    ensure!(known["access"] == "private", "{known}");
    ensure!(!controller.log().contains("right\""), "a password is in the log");
    controller.stop()
}

#[test]
fn a_tag_that_moves_is_followed_and_a_policy_that_goes_takes_its_build_along() -> Result<()> {
    let mut controller = Controller::new("ctl-moves")?;
    let layout = Layout::create(&controller.scratch.path().join("layout"))?;
    let first = layout.add("v1", &[layer("first", 100_000)], &json!({}))?;
    let registry = FaultyRegistry::start(layout.dir())?;
    controller.policy("team", "")?;
    controller.images(&[registry.image("v1")])?;
    controller.start(&["--refresh", "1"])?;
    controller.wait("the first", || (controller.image(&first)?["phase"] == "Ready").then_some(()))?;
    let second = layout.add("v1", &[layer("second", 100_000)], &json!({}))?;
    controller.wait("the second", || (controller.image(&second)?["phase"] == "Ready").then_some(()))?;
    controller.wait("the first to go", || controller.image(&first).is_none().then_some(()))?;
    ensure!(controller.log().contains("TagMoved"), "{}", controller.log());

    let third = layout.add("v1", &[layer("third", 3_000_000)], &json!({}))?;
    registry.always(Fault::HangAfter(10_000));
    controller.wait("the third", || (controller.image(&third)?["phase"] == "Building").then_some(()))?;
    fs::remove_file(controller.policy_path("team"))?;
    controller.wait("the third to be given up", || controller.image(&third).is_none().then_some(()))?;
    controller.wait("nothing to be left", || {
        let kinds = ["statements", "references", "profiles", "artifacts", "images", "layers"];
        kinds.iter().all(|kind| controller.count(kind) == 0).then_some(())
    })?;
    controller.wait("its status to go", || controller.status("team").is_none().then_some(()))?;
    controller.stop()
}

#[test]
fn what_is_damaged_is_built_again_at_once() -> Result<()> {
    let (mut controller, _sample, registry) = Controller::with_sample("ctl-damaged")?;
    controller.make_ready(&registry)?;
    let artifacts = controller.indexes().join("artifacts");
    let damaged = fs::read_dir(&artifacts)?.next().context("no artifact")??.path();
    let before = fs::read(&damaged)?;
    fs::write(&damaged, b"rotten")?;
    controller.wait("the artifact to be made again", || (fs::read(&damaged).ok()? == before).then_some(()))?;
    controller.wait_ready("team", 1)?;
    ensure!(controller.log().contains("IndexLost"), "{}", controller.log());
    run(controller.verify(&registry.image("v1"), &controller.key()?).arg("--read"))?;
    controller.stop()
}

#[test]
fn keys_are_exchanged_while_it_runs() -> Result<()> {
    let (mut controller, sample, registry) = Controller::with_sample("ctl-keys")?;
    controller.make_ready(&registry)?;
    let old = controller.key()?;
    let mut second = controller.command(&[])?;
    ensure!(!second.status()?.success(), "two controllers share a state folder");
    ensure!(controller.log().contains("another controller"), "{}", controller.log());
    controller.stop()?;
    let rotate = |state: &Path| -> Result<Value> {
        let mut rotate = Command::new(hermes());
        rotate.args(["controller", "keys", "--rotate", "--json", "--state"]).arg(state);
        Ok(serde_json::from_slice(&run(&mut rotate)?)?)
    };
    let keys = rotate(&controller.state())?;
    let new = keys["keys"][0]["key"].as_str().context("no key")?.to_owned();
    ensure!(keys["keys"][1]["key"] == old.as_str() && new != old, "{keys}");
    controller.start(&[])?;
    let statement = controller.indexes().join("statements").join(format!("{}.json", sample.image.manifest.hex()));
    controller.wait("a new signature", || fs::read_to_string(&statement).ok()?.contains(&new).then_some(()))?;
    for key in [&old, &new] {
        run(&mut controller.verify(&registry.image("v1"), key))?;
    }
    let stranger = rotate(&controller.scratch.path().join("stranger"))?;
    let stranger = stranger["keys"][0]["key"].as_str().context("no key")?;
    let refused = controller.verify(&registry.image("v1"), stranger).arg("--json").output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && said.contains(&old) && said.contains(&new), "{said}");
    controller.stop()
}
