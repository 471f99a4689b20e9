//! `hermes node install | uninstall | check` and `hermes doctor`, on real containerds of each line.
//!
//! A host is a folder; its containerd keeps everything within it. No systemd runs there, so services are not started,
//! which is what an install into the root of another machine is like.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use hermes_tests::command::exists;
use hermes_tests::containerds::{Host, LINES};
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::{MountGuard, ScratchDir, wait_for};
use hermes_tests::sample::{Sample, TAG};
use rustix::mount::MountFlags;

const HERMES: &str = env!("CARGO_BIN_EXE_hermes");

/// The exit code and everything that was said.
fn said(output: &Output) -> (Option<i32>, String) {
    let text = [output.stdout.as_slice(), &output.stderr].map(String::from_utf8_lossy).concat();
    (output.status.code(), text)
}

fn install_with(host: &Host, more: &[&str]) -> (Option<i32>, String) {
    let (containerd, socket) = (host.containerd(), host.socket());
    let mut arguments = vec!["node", "install", "--containerd", containerd.to_str().expect("text")];
    arguments.extend(["--socket", socket.to_str().expect("text")]);
    arguments.extend(more);
    said(&host.hermes(HERMES, &arguments).expect("the command starts"))
}

fn install(host: &Host, more: &[&str]) -> String {
    let (code, text) = install_with(host, more);
    assert_eq!(code, Some(0), "{text}");
    text
}

fn uninstall(host: &Host, more: &[&str]) -> (Option<i32>, String) {
    said(&host.hermes(HERMES, &[&["node", "uninstall"], more].concat()).expect("the command starts"))
}

fn check(host: &Host) -> (Option<i32>, String) {
    let containerd = host.containerd();
    let arguments = ["node", "check", "--containerd", containerd.to_str().expect("text")];
    said(&host.hermes(HERMES, &arguments).expect("the command starts"))
}

/// Every file below the host's root with what is in it, and its mode.
fn tree(root: &Path) -> Vec<(PathBuf, u32, Option<Vec<u8>>)> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let metadata = fs::symlink_metadata(&path).expect("metadata");
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            found.push((path.clone(), metadata.mode(), metadata.is_file().then(|| fs::read(path).expect("a file"))));
        }
    }
    found.sort();
    found
}

/// Files of `tree` that are not below folders which an install makes and an uninstall leaves empty.
fn files(root: &Path) -> Vec<(PathBuf, u32, Option<Vec<u8>>)> {
    tree(root).into_iter().filter(|(_, _, bytes)| bytes.is_some()).collect()
}

#[test]
fn each_containerd_loads_hermes_and_gets_its_own_bytes_back() {
    for line in LINES {
        let mut host = Host::new(line).expect("a host");
        let text = format!(
            "# the administrator's\n{}\n[unknown_table]\n  x = 1 # kept\n",
            host.default_config().expect("one")
        );
        fs::write(host.config(), &text).expect("written");
        fs::set_permissions(host.config(), fs::Permissions::from_mode(0o640)).expect("a mode");
        let before = files(host.root());

        let report = install(&host, &[]);
        assert!(report.contains("systemctl restart containerd"), "{line}: {report}");
        let edited = fs::read_to_string(host.config()).expect("readable");
        for kept in ["# the administrator's\n", "[unknown_table]\n  x = 1 # kept\n"] {
            assert!(edited.contains(kept), "{line} lost {kept}");
        }
        // Each line of the old text is still there, but for the two values that were set.
        let lost = text.lines().filter(|line| !edited.contains(line)).collect::<Vec<_>>();
        assert!(lost.len() <= 2 && lost.iter().all(|line| line.contains("snapshot")), "{line}: {lost:?}");
        assert_eq!(fs::metadata(host.config()).expect("there").mode() & 0o777, 0o640);
        let installed = tree(host.root());
        assert!(install(&host, &[]).starts_with("nothing to change"), "{line}");
        assert!(tree(host.root()) == installed, "{line}: a second install changed something");
        let (code, table) = check(&host);
        assert_eq!(code, Some(0), "{line}: {table}");

        host.listen().expect("a socket");
        let running = host.start().expect("containerd runs with the edited configuration");
        let plugin = |kind, name| running.plugin(kind, name).expect("an answer");
        assert_eq!(plugin("io.containerd.snapshotter.v1", "hermes").as_deref(), Some("ok"), "{line}");
        let cri = if line == "2" { ("io.containerd.cri.v1", "images") } else { ("io.containerd.grpc.v1", "cri") };
        assert_eq!(plugin(cri.0, cri.1).as_deref(), Some("ok"), "{line}");
        if line != "1.6" {
            assert_eq!(plugin("io.containerd.transfer.v1", "local").as_deref(), Some("ok"), "{line}");
        }
        drop(running);

        let (code, report) = uninstall(&host, &[]);
        assert_eq!(code, Some(0), "{line}: {report}");
        assert_eq!(fs::read_to_string(host.config()).expect("readable"), text, "{line}");
        let ours = |path: &Path| path.starts_with(host.root().join("etc")) || path.starts_with(host.root().join("usr"));
        let after = files(host.root()).into_iter().filter(|(path, ..)| ours(path)).collect::<Vec<_>>();
        assert!(after == before, "{line}: uninstall left something");
        assert_eq!(check(&host).0, Some(7), "{line}");
    }
}

#[test]
fn small_missing_and_older_configurations_are_edited_too() {
    for line in LINES {
        let host = Host::new(line).expect("a host");
        // A file of version 2, which 2.x converts at each start.
        let text = "version = 2 # two\n";
        fs::write(host.config(), text).expect("written");
        install(&host, &["--no-set-default", "--no-systemd"]);
        let edited = fs::read_to_string(host.config()).expect("readable");
        // The transfer service's entry alone.
        let named = edited.lines().filter(|line| *line == "snapshotter = \"hermes\"").count();
        assert_eq!(named, if line == "1.6" { 0 } else { 1 }, "{edited}");
        assert_eq!(check(&host).0, Some(0), "{line}: {}", check(&host).1);
        // Another choice starts from what was there before.
        install(&host, &["--set-default", "--no-systemd"]);
        assert_eq!(check(&host).0, Some(0), "{line}: {}", check(&host).1);
        assert_eq!(uninstall(&host, &[]).0, Some(0));
        assert_eq!(fs::read_to_string(host.config()).expect("readable"), text, "{line}");

        fs::write(host.config(), host.small_config(2)).expect("written");
        assert!(install(&host, &[]).contains("CRI is switched off"), "{line}");
        let running = host.start().expect("containerd runs");
        assert_eq!(running.plugin("io.containerd.snapshotter.v1", "hermes").expect("asked").as_deref(), Some("ok"));
        drop(running);
        assert_eq!(uninstall(&host, &[]).0, Some(0));

        // No file at all: containerd runs with its defaults, and does so again afterwards.
        fs::remove_file(host.config()).expect("removed");
        install(&host, &[]);
        assert_eq!(check(&host).0, Some(0), "{line}: {}", check(&host).1);
        assert_eq!(uninstall(&host, &[]).0, Some(0));
        assert!(!host.config().exists(), "{line}");
    }
}

#[test]
fn what_containerd_would_not_use_is_refused_and_nothing_changes() {
    for line in LINES {
        let host = Host::new(line).expect("a host");
        let refused = |text: &str, what: &str| {
            fs::write(host.config(), text).expect("written");
            let before = tree(host.root());
            let (code, report) = install_with(&host, &[]);
            assert_eq!(code, Some(7), "{line}: {report}");
            assert!(report.contains(what), "{line}: {report}");
            assert!(tree(host.root()) == before, "{line}: something changed");
        };
        refused("version = [\n", "no TOML");
        refused("version = 7\n", "version 7");
        refused("version = 2\nplugins = 3\n", "not a table");
        refused("version = 2\noom_score = \"much\"\n", "refuses");
        // An imported file that says otherwise wins in containerd, so it must not be overlooked.
        let dialect = if line == "2" { 3 } else { 2 };
        let table =
            if line == "2" { "'io.containerd.cri.v1.images'" } else { "'io.containerd.grpc.v1.cri'.containerd" };
        let import = host.root().join("etc/containerd/other.toml");
        fs::write(&import, format!("version = {dialect}\n[plugins.{table}]\nsnapshotter = \"native\"\n"))
            .expect("written");
        let text = format!("version = {dialect}\nimports = [\"{}\"]\n", import.display());
        refused(&text, "CRI uses the snapshotter native");
        // A place where a file cannot go: the binary's folder is a file.
        fs::write(host.config(), "version = 2\n").expect("written");
        fs::write(host.root().join("usr"), "a file").expect("written");
        refused("version = 2\n", "usr");
        fs::remove_file(host.root().join("usr")).expect("removed");
        // A unit of somebody else.
        fs::create_dir_all(host.root().join("etc/systemd/system")).expect("folders");
        fs::write(host.root().join("etc/systemd/system/hermes.service"), "[Unit]\n").expect("written");
        refused("version = 2\n", "was not written by hermes");
    }
}

#[test]
fn changes_of_others_survive_an_uninstall_and_an_install() {
    let host = Host::new("1.7").expect("a host");
    let text = host.small_config(2);
    fs::write(host.config(), &text).expect("written");
    install(&host, &[]);
    let edited = fs::read_to_string(host.config()).expect("readable");
    let theirs = edited.replace("[grpc]\n", "# mine\n[grpc]\nuid = 0\n");
    fs::write(host.config(), &theirs).expect("written");
    assert_eq!(check(&host).0, Some(0), "{}", check(&host).1);
    assert!(install(&host, &[]).contains("wrote"), "the record follows");
    assert!(install(&host, &[]).starts_with("nothing to change"));
    assert_eq!(fs::read_to_string(host.config()).expect("readable"), theirs);
    fs::write(host.config(), theirs.replace("\"hermes\"", "\"native\"")).expect("written");
    assert_eq!(check(&host).0, Some(7), "{}", check(&host).1);
    fs::write(host.config(), format!("{theirs}# last\n")).expect("written");
    let (code, report) = uninstall(&host, &[]);
    assert_eq!(code, Some(0), "{report}");
    assert!(report.contains("was changed after hermes went in"), "{report}");
    let left = fs::read_to_string(host.config()).expect("readable");
    let expected = text.replace("[grpc]\n", "# mine\n[grpc]\nuid = 0\n");
    assert_eq!(left, expected + "# last\n");
}

#[test]
fn the_unit_is_one_that_systemd_takes() {
    let host = Host::new("1.7").expect("a host");
    install(&host, &["--", "--listen", "127.0.0.1:4001", "--cluster", "two"]);
    let unit = host.root().join("etc/systemd/system/hermes.service");
    let text = fs::read_to_string(&unit).expect("a unit");
    assert!(
        text.contains(
            "ExecStart=/usr/local/bin/hermes node --state /var/lib/hermes --listen 127.0.0.1:4001 --cluster two\n"
        ),
        "{text}"
    );
    let link = host.root().join("etc/systemd/system/multi-user.target.wants/hermes.service");
    assert_eq!(fs::read_link(link).expect("a link"), Path::new("/etc/systemd/system/hermes.service"));
    assert_eq!(install_with(&host, &["--", "--lissen", "x"]).0, Some(2));
    if exists("systemd-analyze") {
        // Below the real root, because systemd looks there for the program; the name is that of the unit.
        let scratch = ScratchDir::new("unit").expect("a folder");
        let checked = scratch.path().join("hermes.service");
        fs::write(&checked, text.replace("/usr/local/bin/hermes", HERMES)).expect("written");
        let output = Command::new("systemd-analyze").arg("verify").arg(&checked).output().expect("it starts");
        let (code, complaints) = said(&output);
        assert_eq!(code, Some(0), "{complaints}");
        let unknown = complaints.lines().filter(|line| line.contains("hermes.service"));
        // Known since systemd 254.
        let unknown = unknown.filter(|line| !line.contains("FileDescriptorStorePreserve")).collect::<Vec<_>>();
        assert_eq!(unknown, Vec::<&str>::new());
    }
}

/// An overlay mount over a tree of the host's, as a container's root is one.
fn container(host: &Host) -> MountGuard {
    let at = |name: &str| {
        let path = host.root().join(name);
        fs::create_dir_all(&path).expect("folders");
        path
    };
    let (tree, upper, work) = (at("var/lib/hermes/trees/one"), at("run/c/upper"), at("run/c/work"));
    let options = format!("lowerdir={},upperdir={},workdir={}", tree.display(), upper.display(), work.display());
    MountGuard::mount(Path::new("overlay"), &at("run/c/rootfs"), "overlay", MountFlags::empty(), &options)
        .expect("mounted")
}

#[test]
fn uninstall_waits_for_containers_or_refuses() {
    let host = Host::new("1.7").expect("a host");
    let text = host.small_config(2);
    fs::write(host.config(), &text).expect("written");
    install(&host, &[]);
    let used = container(&host);
    let before = tree(host.root());
    let (code, report) = uninstall(&host, &[]);
    assert_eq!(code, Some(7), "{report}");
    assert!(report.contains("run/c/rootfs") && report.contains("--drain"), "{report}");
    assert!(tree(host.root()) == before, "a refused uninstall changed something");
    let (code, report) = uninstall(&host, &["--drain", "0"]);
    assert_eq!(code, Some(7), "{report}");
    // No new container comes to Hermes, those that are there keep it.
    assert_eq!(fs::read_to_string(host.config()).expect("readable"), text);
    assert!(host.root().join("usr/local/bin/hermes").exists());
    let (code, report) = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| uninstall(&host, &["--drain", "60", "--purge"]));
        drop(used);
        waiting.join().expect("it ends")
    });
    assert_eq!(code, Some(0), "{report}");
    assert!(!host.root().join("usr/local/bin/hermes").exists());
    assert!(!host.root().join("var/lib/hermes").exists());
}

#[test]
fn a_drained_daemon_keeps_what_is_in_use_and_unmounts_the_rest() {
    let scratch = ScratchDir::new("drain").expect("a folder");
    let sample = Sample::new(&scratch.path().join("layout")).expect("an image");
    let hermes = Path::new(HERMES);
    let index = sample.build_index(hermes, scratch.path()).expect("an index");
    let registry = FaultyRegistry::start(sample.layout.dir()).expect("a registry");
    let host = Host::new("1.7").expect("a host");
    let state = host.root().join("var/lib/hermes");
    let daemon = Daemon::start(hermes, &state, &[]).expect("a node");
    let (used, idle) = (scratch.make("used").expect("a folder"), scratch.make("idle").expect("a folder"));
    for dir in [&used, &idle] {
        daemon.mount(&registry.image(TAG), dir, &index, &[]).expect("mounts");
    }
    let name = sample.names().next().expect("a file").to_owned();
    let open = fs::File::open(used.join(name)).expect("open");
    let (code, report) = uninstall(&host, &[]);
    assert_eq!(code, Some(7), "{report}");
    assert_eq!(daemon.status().expect("it runs").images.len(), 2, "nothing is unmounted without --drain");
    let (code, report) = uninstall(&host, &["--drain", "0"]);
    assert_eq!(code, Some(7), "{report}");
    assert!(report.contains("open files"), "{report}");
    let mounted = daemon.status().expect("it runs").images;
    assert_eq!(mounted.iter().map(|image| Path::new(&image.dir)).collect::<Vec<_>>(), [used.as_path()]);
    drop(open);
    let (code, report) = uninstall(&host, &["--drain", "30"]);
    assert_eq!(code, Some(0), "{report}");
    wait_for("the daemon's end", Duration::from_secs(30), || daemon.status().is_err().then_some(())).expect("it ends");
}

/// The verdict of one line of `hermes doctor --json`.
fn verdict<'a>(findings: &'a serde_json::Value, what: &str) -> &'a str {
    let found = findings.as_array().and_then(|list| list.iter().find(|finding| finding["what"] == what));
    found.and_then(|finding| finding["verdict"].as_str()).unwrap_or("absent")
}

#[test]
fn the_doctor_tries_what_it_speaks_of() {
    let scratch = ScratchDir::new("doctor").expect("a folder");
    let sample = Sample::new(&scratch.path().join("layout")).expect("an image");
    let registry = FaultyRegistry::start(sample.layout.dir()).expect("a registry");
    let host = Host::new("1.7").expect("a host");
    install(&host, &["--no-systemd"]);
    let (containerd, image) = (host.containerd(), registry.image(TAG));
    let doctor = |image: &str| {
        let arguments = ["doctor", image, "--json", "--containerd", containerd.to_str().expect("text")];
        let output = host.hermes(HERMES, &arguments).expect("the command starts");
        let findings: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (output.status.code(), findings)
    };
    let (code, alone) = doctor(&image);
    assert_eq!(code, Some(7), "{alone}");
    assert_eq!((verdict(&alone, "daemon"), verdict(&alone, "snapshots")), ("fail", "fail"), "{alone}");
    for what in ["privileges", "holes", "FUSE", "overlayfs", "registry", "ranges", "containerd configuration"] {
        assert_eq!(verdict(&alone, what), "ok", "{what}: {alone}");
    }
    assert_eq!(verdict(&alone, "clock of the registry"), "ok", "{alone}");
    let state = host.root().join("var/lib/hermes");
    let daemon = Daemon::start(Path::new(HERMES), &state, &[]).expect("a node");
    // It runs, and containerd could not ask it.
    let (code, unasked) = doctor(&image);
    let found = (code, verdict(&unasked, "daemon"), verdict(&unasked, "snapshots"));
    assert_eq!(found, (Some(7), "ok", "fail"), "{unasked}");
    drop(daemon);
    let socket = host.socket();
    let serving = ["--containerd-socket", socket.to_str().expect("text")];
    let daemon = Daemon::start(Path::new(HERMES), &state, &serving).expect("a node");
    let (code, with) = doctor(&image);
    assert_eq!(code, Some(0), "{with}");
    assert_eq!((verdict(&with, "snapshots"), verdict(&with, "peers")), ("ok", "warn"), "{with}");
    // The first blob is the image's configuration, the second the layer.
    registry.plan(|request| if request == 0 { Fault::Pass } else { Fault::Status(403) });
    assert_eq!(verdict(&doctor(&image).1, "ranges"), "fail");
    let nowhere = doctor("127.0.0.1:1/nothing:latest").1;
    assert_eq!(verdict(&nowhere, "registry"), "fail", "{nowhere}");
    drop(daemon);
}
