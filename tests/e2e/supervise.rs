//! What a pod of the DaemonSet does to its host, with a real systemd in the place of the kubelet: the pod is a unit, whose end is
//! the end of all that is in its control group. The daemon is not, whoever supervises it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_tests::containerds;
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::systemd::Systemd;

/// Longest time that anything here is waited for.
const DEADLINE: Duration = Duration::from_secs(90);
const UNIT: &str = "hermes.service";
const POD: &str = "pod.service";

/// A host, and the pod on it.
struct Host {
    systemd: Systemd,
    scratch: ScratchDir,
}

impl Host {
    fn new(name: &str) -> Result<Self> {
        let scratch = ScratchDir::new(name)?;
        let systemd = Systemd::boot(&scratch.make("boot")?)?;
        fs::write(scratch.path().join("token"), "token-1")?;
        fs::write(scratch.path().join("roots"), "roots-1")?;
        Ok(Self { systemd, scratch })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Replaces the pod by one that runs with `more` arguments.
    fn pod(&self, more: &[&str]) -> Result<()> {
        let at = |name: &str| self.at(name).display().to_string();
        let containerd = containerds::programs("1.7")?.join("containerd").display().to_string();
        let restart = format!("echo restarted >>{}", at("restarts"));
        let mut words = vec![env!("CARGO_BIN_EXE_hermes").to_owned()];
        words.extend(["-v", "node", "supervise", "--state"].map(str::to_owned));
        words.extend([at("state"), "--containerd-restart".to_owned(), restart]);
        if !more.contains(&"--remove") {
            words.extend(["--containerd".to_owned(), containerd, "--node-name=node-1".to_owned()]);
            words.extend(["--node-ip=127.0.0.1", "--swarm-port=0", "--metrics-port=0"].map(str::to_owned));
            words.extend(["--controller=127.0.0.1:1".to_owned(), "--roots".to_owned(), at("roots")]);
            words.extend(["--token".to_owned(), at("token")]);
        }
        words.extend(more.iter().map(|&word| word.to_owned()));
        let command = words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(" ");
        let log = at("pod.log");
        let unit = format!(
            "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart={command}\nStandardError=append:{log}\nStandardOutput=append:{log}\n"
        );
        fs::write(self.systemd.path(Path::new("/etc/systemd/system/pod.service")), unit)?;
        self.systemd.must("systemctl", &["stop", POD])?;
        self.systemd.must("systemctl", &["daemon-reload"])?;
        self.systemd.must("systemctl", &["start", POD]).map(drop)
    }

    fn said(&self) -> String {
        let keeper = fs::read_to_string(self.at("state").join("keeper.log")).unwrap_or_default();
        format!("{}\n{keeper}", fs::read_to_string(self.at("pod.log")).unwrap_or_default())
    }

    /// Process and arguments of the daemon, once it answers and is as wanted.
    fn daemon(&self, what: &str, wanted: impl Fn(u32, &str) -> bool) -> Result<u32> {
        let state = self.at("state");
        let look = || {
            let status =
                self.systemd.must(env!("CARGO_BIN_EXE_hermes"), &["status", "--json", "--state", state.to_str()?]);
            let status: serde_json::Value = serde_json::from_str(&status.ok()?).ok()?;
            let pid = u32::try_from(status["pid"].as_u64()?).ok()?;
            let line = self.systemd.must("cat", &[&format!("/proc/{pid}/cmdline")]).ok()?.replace('\0', " ");
            wanted(pid, &line).then_some(pid)
        };
        wait_for(what, DEADLINE, look).with_context(|| self.said())
    }

    fn restarts(&self) -> usize {
        fs::read_to_string(self.at("restarts")).map_or(0, |text| text.lines().count())
    }

    fn token(&self) -> String {
        fs::read_to_string(self.at("state").join("controller/token")).unwrap_or_default()
    }

    fn exists(&self, path: &str) -> bool {
        self.systemd.path(Path::new(path)).exists()
    }
}

/// Its end is not that of the daemon; a new token reaches the host; a new pod changes nothing that is as it shall be.
fn lives_on(host: &Host, as_before: &[&str]) -> Result<u32> {
    let first = host.daemon("the daemon", |_, line| line.contains("--controller 127.0.0.1:1"))?;
    ensure!(host.token() == "token-1", "no token\n{}", host.said());
    wait_for("a restart of containerd", DEADLINE, || (host.restarts() == 1).then_some(()))?;
    wait_for("that it is not due any more", DEADLINE, || {
        (!host.exists("/etc/hermes.containerd-restart-due")).then_some(())
    })?;
    fs::write(host.at("token"), "token-2")?;
    wait_for("the new token", DEADLINE, || (host.token() == "token-2").then_some(()))?;

    host.systemd.must("systemctl", &["stop", POD])?;
    ensure!(host.systemd.property(POD, "ActiveState")? == "inactive", "the pod runs");
    host.daemon("the daemon without its pod", |pid, _| pid == first)?;
    fs::write(host.at("token"), "token-3")?;
    host.pod(as_before)?;
    wait_for("the next pod's token", DEADLINE, || (host.token() == "token-3").then_some(()))?;
    host.daemon("the same daemon", |pid, _| pid == first)?;
    ensure!(host.restarts() == 1, "containerd was restarted for nothing\n{}", host.said());
    Ok(first)
}

fn is_removed(host: &Host) -> Result<()> {
    // A pod that is replaced while it sets its host up costs one restart more, by the next.
    let before = host.restarts();
    host.pod(&["--remove", "--drain=5", "--purge"])?;
    wait_for("the end of the removal", DEADLINE, || host.said().contains("Hermes is off this host").then_some(()))
        .with_context(|| host.said())?;
    for left in ["/usr/local/bin/hermes", "/etc/hermes", "/etc/hermes.containerd-restart-due"] {
        ensure!(!host.exists(left), "{left} is left\n{}", host.said());
    }
    ensure!(!host.at("state").exists(), "the store is left\n{}", host.said());
    ensure!(host.restarts() > before, "containerd still knows hermes\n{}", host.said());
    Ok(())
}

#[test]
fn a_service_of_systemd_outlives_its_pod() -> Result<()> {
    let host = Host::new("supervise-systemd")?;
    host.pod(&[])?;
    let first = lives_on(&host, &[])?;
    ensure!(host.systemd.property(UNIT, "MainPID")? == first.to_string(), "systemd runs something else");
    // Another argument is another daemon, of the same service.
    host.pod(&["--", "--plain"])?;
    host.daemon("a daemon with the new argument", |pid, line| pid != first && line.contains("--plain"))?;
    ensure!(host.systemd.property(UNIT, "ActiveState")? == "active", "{}", host.said());
    // A pod with a program that is too old for what is on the host changes nothing.
    let (version, second) = (host.at("state").join("version"), host.systemd.property(UNIT, "MainPID")?);
    let known = fs::read(&version)?;
    fs::write(&version, "9\n")?;
    host.pod(&["--", "--no-guess"])?;
    wait_for("its refusal", DEADLINE, || host.said().contains("has version 9").then_some(()))?;
    fs::write(&version, known)?;
    ensure!(host.systemd.property(UNIT, "MainPID")? == second, "the daemon was exchanged");
    host.pod(&["--", "--plain"])?;
    // One that somebody has stopped is started again.
    host.systemd.must("systemctl", &["stop", UNIT])?;
    host.daemon("a daemon that was stopped", |_, _| true)?;
    is_removed(&host)?;
    ensure!(host.systemd.property(UNIT, "LoadState")? == "not-found", "systemd still knows the unit");
    Ok(())
}

#[test]
fn a_keeper_outlives_the_pod_that_has_started_it() -> Result<()> {
    let host = Host::new("supervise-keeper")?;
    host.pod(&["--supervisor=keeper"])?;
    let first = lives_on(&host, &["--supervisor=keeper"])?;
    // One that was killed is started by its keeper, and a keeper by the pod.
    host.systemd.must("kill", &["-KILL", &first.to_string()])?;
    let second = host.daemon("another daemon", |pid, _| pid != first)?;
    let keeper = host.systemd.must("cat", &[&format!("/proc/{second}/stat")])?;
    let keeper = keeper.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)).context("no parent")?.to_owned();
    host.systemd.must("kill", &["-KILL", &keeper, &second.to_string()])?;
    host.daemon("another keeper's daemon", |pid, _| pid != second)?;
    is_removed(&host)
}
