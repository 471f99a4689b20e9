//! Two daemons of one join secret, what the commands say of them, and who is not let in.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_tests::guard::{ProcessGuard, ScratchDir, wait_for};
use serde_json::Value;

/// How long anything may take here. The machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// A daemon that ends with it.
struct Daemon {
    _process: ProcessGuard,
    state: PathBuf,
}

/// What a command has said: its exit code, and both of its outputs.
struct Said {
    code: Option<i32>,
    text: String,
}

fn run(arguments: &[&str], state: &Path) -> Result<Said> {
    let output = Command::new(hermes()).args(arguments).arg("--state").arg(state).stdin(Stdio::null()).output()?;
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    Ok(Said { code: output.status.code(), text: String::from_utf8_lossy(&text).into_owned() })
}

impl Daemon {
    fn start(scratch: &ScratchDir, name: &str, arguments: &[&str]) -> Result<Self> {
        let state = scratch.path().join(name);
        let log = scratch.path().join(format!("{name}.log"));
        let process = ProcessGuard::start(
            Command::new(hermes())
                .args(["node", "--listen", "127.0.0.1:0"])
                .args(arguments)
                .arg("--state")
                .arg(&state)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(fs::File::create(&log)?),
        )?;
        let answers = || run(&["status"], &state).ok().filter(|said| said.code == Some(0));
        wait_for("a daemon", PATIENCE, answers).with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
        Ok(Self { _process: process, state })
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let said = run(arguments, &self.state)?;
        ensure!(said.code == Some(0), "{}", said.text);
        Ok(serde_json::from_str(&said.text)?)
    }

    fn address(&self) -> Result<String> {
        let status = self.json(&["status", "--json"])?;
        Ok(status["listen"][0].as_str().context("it listens")?.to_owned())
    }

    /// The members as this node sees them, once `all` is true of them.
    fn members(&self, what: &str, all: impl Fn(&[Value]) -> bool) -> Result<Vec<Value>> {
        wait_for(what, PATIENCE, || {
            let answer = self.json(&["members", "--json"]).ok()?;
            let members = answer["members"].as_array()?.clone();
            all(&members).then_some(members)
        })
    }
}

fn secret(scratch: &ScratchDir, name: &str, mode: u32) -> Result<String> {
    let path = scratch.path().join(name);
    fs::write(&path, name.repeat(40))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    Ok(path.to_str().context("a path of text")?.to_owned())
}

#[test]
fn members_are_shown_drained_and_revoked() -> Result<()> {
    let scratch = ScratchDir::new("members")?;
    let (ours, theirs) = (secret(&scratch, "ours", 0o600)?, secret(&scratch, "theirs", 0o600)?);
    let one = Daemon::start(&scratch, "one", &["--join-secret", &ours, "--zone", "rack-1"])?;
    let address = one.address()?;
    let two = Daemon::start(&scratch, "two", &["--join-secret", &ours, "--zone", "rack-2", "--peer", &address])?;
    let stranger = Daemon::start(&scratch, "stranger", &["--join-secret", &theirs, "--peer", &address])?;

    for node in [&one, &two] {
        let members = node.members("both members", |members| {
            members.len() == 2 && members.iter().any(|member| member["connected"] == true)
        })?;
        let zones: Vec<_> = members.iter().filter_map(|member| member["zone"].as_str()).collect();
        ensure!(zones.contains(&"rack-1") && zones.contains(&"rack-2"), "{members:?}");
        ensure!(members.iter().all(|member| member["certificate_until"].is_u64()), "{members:?}");
    }
    let table = run(&["members"], &one.state)?.text;
    ensure!(table.contains("rack-2") && table.contains("this node") && table.contains("min left"), "{table}");
    let log = scratch.path().join("one.log");
    wait_for("a line about the stranger", PATIENCE, || {
        fs::read_to_string(&log).ok().filter(|text| text.contains("unknown_issuer"))
    })?;
    ensure!(stranger.members("itself alone", |_| true)?.len() == 1);

    ensure!(run(&["members", "drain"], &two.state)?.code == Some(0));
    let draining = |drain: bool| move |members: &[Value]| members.iter().any(|member| member["drain"] == true) == drain;
    one.members("two to drain", draining(true))?;
    ensure!(run(&["members", "drain", "--off"], &two.state)?.code == Some(0));
    let members = one.members("two to stay", draining(false))?;

    let other = members.iter().find(|member| member["me"] == false).context("two is a member")?;
    let peer = other["peer"].as_str().context("a name")?;
    ensure!(run(&["members", "revoke", "nobody"], &one.state)?.code == Some(2));
    ensure!(run(&["members", "revoke", peer], &one.state)?.code == Some(0));
    one.members("two to be gone", |members| members.len() == 1)?;
    Ok(())
}

#[test]
fn a_daemon_that_would_be_open_by_mistake_does_not_start() -> Result<()> {
    let scratch = ScratchDir::new("open")?;
    let state = scratch.path().join("state");
    let said = run(&["node", "--listen", "0.0.0.0:0"], &state)?;
    ensure!(said.code == Some(2), "{:?}: {}", said.code, said.text);
    ensure!(said.text.contains("--join-secret") && said.text.contains("--open-swarm"), "{}", said.text);
    let readable = secret(&scratch, "readable", 0o644)?;
    let said = run(&["node", "--listen", "127.0.0.1:0", "--join-secret", &readable], &state)?;
    ensure!(said.code == Some(7) && said.text.contains("0644") && said.text.contains("chmod 600"), "{}", said.text);
    Ok(())
}
