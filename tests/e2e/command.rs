//! What a person sees of the command when something is wrong: one clear line, and an exit code by class.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use hermes_tests::daemon::{Daemon, HANG};
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::{MountGuard, ScratchDir, wait_for};
use hermes_tests::sample::{Sample, SampleIndex, TAG};
use rustix::mount::MountFlags;

fn hermes(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hermes")).args(arguments).output().expect("the command starts")
}

/// Runs the command and expects it to fail with `code` and one line that says `what`.
fn assert_fails(arguments: &[&str], code: i32, what: &str) {
    assert_failed(&format!("{arguments:?}"), &hermes(arguments), code, what);
}

fn assert_failed(name: &str, output: &Output, code: i32, what: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{name}: {said}");
    assert!(said.contains(what), "{name} says: {said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{name} says more than a line: {said}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

#[test]
fn bad_input_gets_one_clear_line_and_its_own_exit_code() {
    let scratch = ScratchDir::new("command").expect("a folder");
    let state = scratch.make("state").expect("a folder");
    let empty = scratch.make("empty").expect("a folder");
    let state = text(&state);
    let no_layout = format!("oci:{}", text(&empty));
    let nowhere = "127.0.0.1:1/nothing:latest";

    assert_fails(&["index", "build", "not a reference", "--state", state], 2, "not a reference");
    assert_fails(&["index", "build", &no_layout, "--state", state], 3, text(&empty));
    assert_fails(&["index", "inspect", nowhere, "--state", state], 5, "127.0.0.1:1");
    assert_fails(&["registry", "serve", text(&empty), "--listen", "127.0.0.1:0"], 3, text(&empty));
    assert_fails(&["status", "--state", state], 3, "no hermes node runs");
    assert_fails(&["unmount", text(&empty), "--state", state], 3, "no hermes node runs");
}

/// An image with its index and registry, and a node.
struct Rig {
    daemon: Daemon,
    registry: FaultyRegistry,
    index: SampleIndex,
    sample: Sample,
    scratch: ScratchDir,
}

impl Rig {
    fn new() -> Self {
        let hermes = Path::new(env!("CARGO_BIN_EXE_hermes"));
        let scratch = ScratchDir::new("command").expect("a folder");
        let sample = Sample::new(&scratch.path().join("layout")).expect("an image");
        let index = sample.build_index(hermes, scratch.path()).expect("an index");
        let registry = FaultyRegistry::start(sample.layout.dir()).expect("a registry");
        let daemon = Daemon::start(hermes, &scratch.path().join("state"), &[]).expect("a node");
        Self { daemon, registry, index, sample, scratch }
    }

    fn state(&self) -> String {
        text(&self.scratch.path().join("state")).to_owned()
    }

    fn path(&self, name: &str) -> String {
        text(&self.scratch.path().join(name)).to_owned()
    }

    fn make(&self, name: &str) -> String {
        text(&self.scratch.make(name).expect("a folder")).to_owned()
    }

    /// Expects `hermes mount` of `image` at `dir` with the arguments `more` to fail.
    fn assert_mount_fails(&self, image: &str, dir: &str, more: &[&str], code: i32, what: &str) {
        let state = self.state();
        let mut arguments = vec!["mount", image, dir, "--no-build", "--state", &state];
        arguments.extend(more);
        assert_fails(&arguments, code, what);
    }

    fn mount(&self, dir: &str) {
        self.daemon.mount(&self.registry.image(TAG), Path::new(dir), &self.index, &[]).expect("mounts");
    }
}

#[test]
fn images_that_cannot_be_mounted_are_named() {
    let rig = Rig::new();
    let (dir, empty, known) = (rig.make("dir"), rig.make("empty"), rig.registry.image(TAG));
    rig.assert_mount_fails("not a reference", &dir, &[], 2, "not a reference");
    rig.assert_mount_fails(&rig.registry.image("v0"), &dir, &[], 3, "v0");
    rig.assert_mount_fails(&format!("oci:{empty}"), &dir, &[], 3, &empty);
    rig.assert_mount_fails(&format!("oci:{}:v0", text(rig.sample.layout.dir())), &dir, &[], 3, "v0");
    rig.assert_mount_fails(&known, &dir, &["--platform", "linux"], 2, "linux");
    rig.assert_mount_fails("127.0.0.1:1/nothing:latest", &dir, &[], 5, "127.0.0.1:1");
    rig.assert_mount_fails(&known, &dir, &[], 3, "hermes index build");
    rig.assert_mount_fails(&known, &dir, &["--peer", "127.0.0.1:1"], 5, "127.0.0.1:1");
    rig.assert_mount_fails(&known, &dir, &["--trust", "me"], 2, "--trust");
    assert!(rig.daemon.status().expect("it runs").images.is_empty());
}

#[test]
fn an_image_of_another_platform_is_refused() {
    let rig = Rig::new();
    let folder = rig.scratch.path().join("platforms");
    let writer = hermes_registry::LayoutWriter::create(&folder).expect("a layout");
    let platform = "linux/s390x".parse().expect("a platform");
    let image = writer.image(&platform, &serde_json::json!({}), &[]).expect("an image");
    let index = writer.index(vec![image]).expect("an index");
    writer.tag(index, TAG).expect("tagged");
    let (dir, image) = (rig.make("dir"), format!("oci:{}:{TAG}", text(&folder)));
    rig.assert_mount_fails(&image, &dir, &["--platform", "linux/arm64"], 3, "linux/s390x");
}

#[test]
fn indexes_that_cannot_be_used_are_named() {
    let rig = Rig::new();
    let (dir, known) = (rig.make("dir"), rig.registry.image(TAG));
    let folder = text(&rig.index.folder);
    // Signed by a key that nobody named.
    rig.assert_mount_fails(&known, &dir, &["--index", folder], 4, &rig.index.key);
    // An artifact with other bytes; then a missing one.
    let artifacts = rig.index.folder.join("artifacts");
    for artifact in std::fs::read_dir(&artifacts).expect("artifacts").map(|entry| entry.expect("an entry").path()) {
        let mut bytes = std::fs::read(&artifact).expect("readable");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xFF;
        std::fs::write(&artifact, bytes).expect("writable");
    }
    let named = ["--index", folder, "--trust", &rig.index.key];
    rig.assert_mount_fails(&known, &dir, &named, 6, "build the index again");
    std::fs::remove_dir_all(&artifacts).expect("removed");
    rig.assert_mount_fails(&known, &dir, &named, 3, "nobody gives part of the index");
    // A statement that is cut. The node keeps the whole one that it has seen, so another node looks.
    let statements = rig.index.folder.join("statements");
    for statement in std::fs::read_dir(&statements).expect("statements").map(|entry| entry.expect("an entry").path()) {
        let bytes = std::fs::read(&statement).expect("readable");
        std::fs::write(&statement, &bytes[..bytes.len() / 2]).expect("writable");
    }
    let state = rig.path("other-state");
    let arguments = ["mount", &known, &dir, "--no-build", "--index", folder, "--trust", &rig.index.key];
    assert_fails(&[&arguments[..], &["--state", &state]].concat(), 6, "malformed");
    assert_ends(&state);
}

/// A node that `hermes mount` has started ends by itself when the mount fails.
fn assert_ends(state: &str) {
    let ended = wait_for("the end of a node that nobody uses", HANG, || {
        let output = hermes(&["status", "--state", state]);
        (output.status.code() == Some(3)).then_some(())
    });
    ended.expect("it ends");
}

#[test]
fn mount_points_that_cannot_be_used_are_named() {
    let rig = Rig::new();
    let known = rig.registry.image(TAG);
    let full = rig.make("full");
    std::fs::write(Path::new(&full).join("file"), "").expect("written");
    rig.assert_mount_fails(&known, &rig.path("nowhere"), &[], 7, "there is no such folder");
    rig.assert_mount_fails(&known, &full, &[], 7, "not empty");
    rig.assert_mount_fails(&known, &rig.path("full/file"), &[], 7, "it is no folder");
    let used = rig.make("used");
    rig.mount(&used);
    rig.assert_mount_fails(&known, &used, &[], 7, "unmount it first");
    let foreign = rig.scratch.make("foreign").expect("a folder");
    let tmpfs = MountGuard::mount(Path::new("none"), &foreign, "tmpfs", MountFlags::empty(), "size=64k");
    let tmpfs = tmpfs.expect("root can mount a tmpfs");
    rig.assert_mount_fails(&known, text(&foreign), &[], 7, "unmount it first");
    drop(tmpfs);

    let state = rig.state();
    assert_fails(&["unmount", text(&foreign), "--state", &state], 3, "nothing is mounted at");
    assert_fails(&["complete", text(&foreign), "--state", &state], 3, "is mounted by this node");
    let held = std::fs::File::open(Path::new(&used).join("gzip/first")).expect("opens");
    assert_fails(&["unmount", &used, "--state", &state], 7, "is in use");
    rig.sample.check(Path::new(&used)).expect("nothing has changed");
    drop(held);
    let output = hermes(&["unmount", &used, "--state", &state]);
    assert!(output.status.success(), "{output:?}");
}

/// `hermes complete` ends with the class of what the registry said.
#[test]
fn an_image_that_cannot_be_completed_says_why() {
    for (fault, code, what) in [
        (Fault::Status(404), 3, "check that the registry still has the layer"),
        (Fault::Status(403), 4, "check the registry's credentials"),
        (Fault::Change, 6, "build the index again"),
    ] {
        let rig = Rig::new();
        let dir = rig.make("dir");
        rig.mount(&dir);
        rig.registry.always(fault);
        assert_fails(&["complete", &dir, "--state", &rig.state()], code, what);
    }
}

#[test]
fn whoever_is_not_root_is_told_so() {
    const NOBODY: &str = "65534";
    let rig = Rig::new();
    // Where nobody may go; the program's own folder may not be.
    std::fs::set_permissions(rig.scratch.path(), std::fs::Permissions::from_mode(0o755)).expect("changed");
    let program = rig.scratch.path().join("hermes");
    std::fs::copy(env!("CARGO_BIN_EXE_hermes"), &program).expect("copied");
    let (dir, state, known) = (rig.make("dir"), rig.state(), rig.registry.image(TAG));
    let other = rig.path("other-state");
    for arguments in [
        ["mount", &known, &dir, "--state", &other].as_slice(),
        &["mount", &known, &dir, "--state", &state],
        &["node", "--state", &other],
        &["status", "--state", &state],
        &["unmount", &dir, "--state", &state],
    ] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]).arg(&program).args(arguments);
        assert_failed(&format!("{arguments:?}"), &command.output().expect("setpriv starts"), 4, "sudo");
    }
    assert!(!Path::new(&other).exists(), "nothing is made for whom is refused");
}

/// Without FUSE an image that is not complete cannot be shown, and the message says what is missing.
#[test]
fn a_machine_without_fuse_is_told_what_it_lacks() {
    let rig = Rig::new();
    let (dir, state, known) = (rig.make("dir"), rig.path("other-state"), rig.registry.image(TAG));
    let folder = text(&rig.index.folder);
    // The device is masked, as container runtimes do; there is none.
    for mask in ["mount --bind /dev/null /dev/fuse", "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3"] {
        let mut command = Command::new("unshare");
        // The namespace, and what is mounted in it, ends with the last of its processes.
        let script = format!(r#"{mask} && exec "$0" "$@""#);
        command.args(["--mount", "sh", "-c", &script, env!("CARGO_BIN_EXE_hermes"), "mount", &known, &dir]);
        command.args(["--no-build", "--index", folder, "--trust", &rig.index.key, "--state", &state]);
        assert_failed(mask, &command.output().expect("unshare starts"), 7, "/dev/fuse");
        assert_ends(&state);
    }
}
