//! A private image on real daemons: who has the login reads it from a peer, who has not gets it from nobody.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use hermes_registry::{Auth, Login, Options};
use hermes_tests::cri::Cri;
use hermes_tests::daemon::{Daemon, HANG};
use hermes_tests::faulty::{FaultyRegistry, login_header};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::sample::{Sample, SampleIndex, TAG};
use hermes_tests::stage::{Stage, last_pull};
use hermes_tests::web;
use serde_json::json;

use crate::from_peer::without_layers;

/// The line of containerd.
const LINE: &str = "1.7";
const USER: &str = "node";
const PASSWORD: &str = "a long password";
/// How long a read waits that nobody answers.
const READ_DEADLINE_MS: &str = "20000";

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// A registry and the daemons of one join secret.
struct Rig {
    registry: FaultyRegistry,
    sample: Sample,
    index: SampleIndex,
    scratch: ScratchDir,
}

impl Rig {
    fn new(name: &str, auth: Auth) -> Result<Self> {
        let scratch = ScratchDir::new(name)?;
        let sample = Sample::new(&scratch.path().join("layout"))?;
        let index = sample.build_index(hermes(), &scratch.make("indexes")?)?;
        let registry = FaultyRegistry::with_options(sample.layout.dir(), Options { auth, ..Options::default() })?;
        let secret = scratch.path().join("secret");
        fs::write(&secret, "s".repeat(40))?;
        fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(Self { registry, sample, index, scratch })
    }

    /// A daemon that knows `peer`, with or without the login.
    fn daemon(&self, name: &str, has_login: bool, peer: Option<&Daemon>) -> Result<Daemon> {
        let text = |path: PathBuf| path.display().to_string();
        let docker_config = self.scratch.path().join(format!("{name}.json"));
        let header = login_header(USER, PASSWORD);
        let login = json!({ "auth": header.trim_start_matches("Basic ") });
        let host = self.registry.host();
        let document = if has_login { json!({ "auths": { host: login } }) } else { json!({}) };
        fs::write(&docker_config, document.to_string())?;
        let mut arguments = vec!["--listen".to_owned(), format!("{}:0", Ipv4Addr::LOCALHOST)];
        arguments.extend(["--join-secret".to_owned(), text(self.scratch.path().join("secret"))]);
        arguments.extend(["--docker-config".to_owned(), text(docker_config)]);
        arguments.extend(["--metrics-listen".to_owned(), format!("{}:0", Ipv4Addr::LOCALHOST)]);
        arguments.extend(["--read-deadline-ms".to_owned(), READ_DEADLINE_MS.to_owned()]);
        if let Some(peer) = peer {
            arguments.extend(["--peer".to_owned(), peer.status()?.listen[0].clone()]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let daemon = Daemon::start(hermes(), &self.scratch.path().join(name), &arguments)?;
        if peer.is_some() {
            wait_for("the peer", HANG, || (metric(&daemon, "hermes_peers_connected").ok()? >= 1.0).then_some(()))?;
        }
        Ok(daemon)
    }

    fn dir(&self, name: &str) -> Result<PathBuf> {
        self.scratch.make(format!("{name}-image"))
    }

    /// Mounts the registry's image without an index at hand: it has to come from a peer.
    fn mount_from_peer(&self, daemon: &Daemon, dir: &Path) -> Result<Output> {
        let mut command = daemon.command(&["mount", &self.registry.image(TAG)]);
        Ok(command.arg(dir).args(["--no-build", "--trust", &self.index.key]).output()?)
    }

    /// The node that everybody else gets the image from has it whole.
    fn holder(&self, has_login: bool) -> Result<Daemon> {
        let (holder, dir) = (self.daemon("holder", has_login, None)?, self.dir("holder")?);
        holder.mount(&self.registry.image(TAG), &dir, &self.index, &[])?;
        let completed = holder.run(&["complete", &dir.display().to_string()])?;
        ensure!(completed.status.success(), "{}", said(&completed));
        Ok(holder)
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn metric(daemon: &Daemon, series: &str) -> Result<f64> {
    let log = daemon.log();
    let address = web::metrics_address(&log).context("an address of metrics")?;
    web::metric(&web::get(&address, "/metrics")?, series).with_context(|| format!("no {series}"))
}

fn denials(daemon: &Daemon) -> Result<f64> {
    metric(daemon, r#"hermes_peer_denials_total{reason="no_grant"}"#)
}

/// Whatever the other node shows came from the holder alone, and is right.
fn reads_from_the_peer(rig: &Rig, daemon: &Daemon, dir: &Path) -> Result<()> {
    let before = rig.registry.blob_requests();
    let mounted = rig.mount_from_peer(daemon, dir)?;
    ensure!(mounted.status.success(), "{}\n{}", said(&mounted), daemon.log());
    rig.sample.check(dir).with_context(|| daemon.log())?;
    let sources = daemon.sources()?;
    ensure!(sources.peer_bytes > 4_000_000 && sources.registry_bytes == 0, "{sources:?}\n{}", daemon.log());
    println!("{} blobs were asked of the registry, one is the configuration", rig.registry.blob_requests() - before);
    Ok(())
}

#[test]
fn a_private_image_comes_from_a_peer_to_who_has_the_login_and_from_nobody_to_others() -> Result<()> {
    let login = Login { user: USER.to_owned(), password: PASSWORD.to_owned() };
    let rig = Rig::new("grants", Auth::Basic(login))?;
    let holder = rig.holder(true)?;
    ensure!(denials(&holder)? == 0.0, "{}", holder.log());

    let member = rig.daemon("member", true, Some(&holder))?;
    reads_from_the_peer(&rig, &member, &rig.dir("member")?)?;
    ensure!(denials(&holder)? >= 1.0, "the holder gave it without asking for a grant");

    // Without a login the registry refuses, and the peer is not even asked.
    let stranger = rig.daemon("stranger", false, Some(&holder))?;
    let dir = rig.dir("stranger")?;
    let refused = rig.mount_from_peer(&stranger, &dir)?;
    ensure!(!refused.status.success(), "{}", said(&refused));
    // With the index at hand, and a manifest that no registry gave it, the chunks are all that is missing.
    let before = denials(&holder)?;
    let stripped = rig.scratch.path().join("stripped");
    without_layers(&rig.sample.layout, TAG, &stripped)?;
    stranger.mount(&format!("oci:{}:{TAG}", stripped.display()), &dir, &rig.index, &[])?;
    let name = rig.sample.names().next().context("a file")?;
    let read = fs::read(dir.join(name));
    ensure!(read.is_err(), "a node without a login and a grant has read a private layer");
    ensure!(stranger.sources()?.peer_bytes == 0, "{:?}", stranger.sources()?);
    wait_for("the holder to deny", HANG, || (denials(&holder).ok()? > before).then_some(()))?;
    ensure!(holder.log().contains("no_grant"), "{}", holder.log());
    Ok(())
}

#[test]
fn a_private_image_stays_private_when_its_daemon_is_started_again() -> Result<()> {
    let login = Login { user: USER.to_owned(), password: PASSWORD.to_owned() };
    let rig = Rig::new("grants-again", Auth::Basic(login))?;
    rig.holder(true)?.stop()?;
    // It shows nothing now, and has everything in its store.
    let holder = rig.daemon("holder", false, None)?;
    let stranger = rig.daemon("stranger", false, Some(&holder))?;
    let (dir, stripped) = (rig.dir("stranger")?, rig.scratch.path().join("stripped"));
    without_layers(&rig.sample.layout, TAG, &stripped)?;
    stranger.mount(&format!("oci:{}:{TAG}", stripped.display()), &dir, &rig.index, &[])?;
    let name = rig.sample.names().next().context("a file")?;
    ensure!(fs::read(dir.join(name)).is_err(), "a private layer was given after a restart");
    ensure!(denials(&holder)? >= 1.0, "{}", holder.log());
    let member = rig.daemon("member", true, Some(&holder))?;
    reads_from_the_peer(&rig, &member, &rig.dir("member")?)
}

/// The node has neither a login nor a grant; the kubelet has a login. Peers hold the statement back, so containerd pulls.
#[test]
fn a_node_without_a_grant_pulls_a_private_image_as_ever() -> Result<()> {
    let stage = Stage::new(hermes(), LINE)?;
    let image = stage.registry.image("v1");
    stage.registry.want_login(USER, PASSWORD);
    let path = |name: &str| stage.scratch().join(name).display().to_string();
    let (secret, login, no_login) = (path("secret"), path("login.json"), path("no-login.json"));
    fs::write(&secret, "s".repeat(40))?;
    fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let auth = json!({ "auth": login_header(USER, PASSWORD).trim_start_matches("Basic ") });
    fs::write(&login, json!({ "auths": { stage.registry.host(): auth } }).to_string())?;
    fs::write(&no_login, "{}")?;
    let common = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--join-secret", &secret];

    let arguments = [&common[..], &["--docker-config", &login]].concat();
    let holder = Daemon::start(hermes(), &stage.scratch().join("holder"), &arguments)?;
    let dir = stage.scratch().join("holder-image");
    fs::create_dir(&dir)?;
    let index = SampleIndex { folder: stage.index.folder.clone(), key: stage.index.key.clone() };
    holder.mount(&image, &dir, &index, &["--plain-http"])?;
    let before = denials(&holder)?;

    let (socket, peer) = (stage.host.socket().display().to_string(), holder.status()?.listen[0].clone());
    let own =
        ["--containerd-socket", &socket, "--trust", &stage.index.key, "--peer", &peer, "--docker-config", &no_login];
    let daemon = Daemon::start(hermes(), &stage.state(), &[&common[..], &own].concat())?;
    wait_for("the peer", HANG, || (metric(&daemon, "hermes_peers_connected").ok()? >= 1.0).then_some(()))?;
    let containerd = stage.host.start()?;
    Cri::connect(&containerd.socket())?.pull_as(&image, USER, PASSWORD).with_context(|| daemon.log())?;
    let decided = last_pull(daemon.status()?).with_context(|| daemon.log())?;
    ensure!(decided.decision == "denied", "{decided:?}\n{}", daemon.log());
    ensure!(denials(&holder)? > before, "the holder was not asked: {}", holder.log());
    ensure!(containerd.once(&image, "cat /etc/a")? == "a2", "the container read something else");
    ensure!(daemon.sources()?.peer_bytes == 0 && stage.trees()? == 0, "{:?}", daemon.sources()?);
    containerd.remove_all_images()?;
    drop(containerd);
    daemon.stop()?;
    holder.stop().map(drop)
}

#[test]
fn a_public_image_needs_no_grant() -> Result<()> {
    let rig = Rig::new("grants-public", Auth::Open)?;
    let holder = rig.holder(false)?;
    let member = rig.daemon("member", false, Some(&holder))?;
    reads_from_the_peer(&rig, &member, &rig.dir("member")?)?;
    // Grants are shown when something is denied and not before, so nobody has shown one.
    ensure!(denials(&holder)? == 0.0, "{}", holder.log());
    Ok(())
}
