//! A real systemd, as the first process of namespaces of its own.
//!
//! It sees this machine's programs and network, an `/etc` and `/usr/local` that it may change without anybody noticing,
//! its own `/run`, and no unit but those that are written here and by the test: nothing of this machine's own services
//! is started. What it mounts is in its mount namespace; [`Systemd::path`] leads there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::command::run;
use crate::guard::{ProcessGuard, wait_for};

/// How long systemd may take to have started, on a machine that is busy with other tests.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// The targets that every service refers to, and the one that services are installed in.
const TARGETS: [&str; 4] = ["sysinit.target", "basic.target", "shutdown.target", "multi-user.target"];
/// Makes the namespaces' view. `$1` is a folder for what is written, `$2` the control group of all.
const BOOT: &str = r#"
set -e
echo $$ >"$2/cgroup.procs"
exec unshare --mount --pid --fork --cgroup --kill-child --propagation private bash -c '
set -e
overlay() {
  mkdir -p "$1/$3" "$1/$3-work"
  mount -t overlay -o "lowerdir=$2,upperdir=$1/$3,workdir=$1/$3-work" overlay "$2"
}
overlay "$0" /etc etc
overlay "$0" /usr/local local
for hidden in /etc/systemd /usr/lib/systemd/system /usr/lib/systemd/system-generators /run; do
  mkdir -p "$hidden"
  mount -t tmpfs tmpfs "$hidden"
done
mkdir -p /etc/systemd/system /run/lock
cp "$0"/units/* /etc/systemd/system/
umount --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t proc proc /proc
exec env --ignore-environment PATH="$PATH" container=test \
  /lib/systemd/systemd --system --unit=basic.target --log-target=console --show-status=false
' "$1"
"#;

/// A running systemd. It and all that it started end when this is dropped.
#[derive(Debug)]
pub struct Systemd {
    outer: ProcessGuard,
    first: Pid,
    group: PathBuf,
}

impl Systemd {
    /// Starts it; what it writes goes into `dir`.
    ///
    /// # Errors
    /// When there is no systemd on this machine, or it does not start; its log is in the message.
    pub fn boot(dir: &Path) -> Result<Self> {
        let units = dir.join("units");
        fs::create_dir_all(&units)?;
        for target in TARGETS {
            fs::write(units.join(target), "[Unit]\nDefaultDependencies=no\n")?;
        }
        let group = unified_groups()?.join(format!("hermes-systemd-{}", std::process::id()));
        fs::create_dir(&group).with_context(|| format!("make the control group {}", group.display()))?;
        let log = fs::File::create(dir.join("systemd.log"))?;
        let mut command = Command::new("bash");
        command.args(["-c", BOOT, "systemd"]).arg(dir).arg(&group);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut outer = ProcessGuard::start(&mut command)?;
        let id = outer.id();
        let first = wait_for("the first process", BOOT_DEADLINE, || match outer.ended() {
            Ok(None) => first_process(id).map(Some),
            _ => Some(None),
        });
        let said = || fs::read_to_string(dir.join("systemd.log")).unwrap_or_default();
        let Some(first) = first? else { bail!("systemd does not start: {}", said()) };
        let systemd = Self { outer, first, group };
        let booted = wait_for("the end of the boot", BOOT_DEADLINE, || {
            let state = systemd.run("systemctl", &["is-system-running"]).ok()?;
            let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
            ["running", "degraded"].contains(&state.as_str()).then_some(())
        });
        booted.with_context(said)?;
        Ok(systemd)
    }

    /// Runs a program beside it, to its end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.first.as_raw_nonzero().to_string(), "--mount", "--pid", "--cgroup", "--"]);
        command.arg(program).args(arguments).stdin(Stdio::null());
        command.output().with_context(|| format!("start {command:?}"))
    }

    /// The same, for one that must succeed; what it printed.
    ///
    /// # Errors
    /// With what it says when it fails.
    pub fn must(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self.run(program, arguments)?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {arguments:?}: {} {error}", output.status);
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// A property of a unit, as `systemctl show` has it.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        self.must("systemctl", &["show", unit, "--property", name, "--value"])
    }

    /// `path` as it is there, for a process that is here.
    pub fn path(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.first.as_raw_nonzero()));
        root.join(path.strip_prefix("/").unwrap_or(path))
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // The end of the first process is the end of all others.
        let _ = kill_process(self.first, Signal::KILL);
        if let Err(error) = self.outer.child().wait() {
            eprintln!("systemd: {error}");
        }
        if let Err(error) = run(Command::new("find").arg(&self.group).args(["-depth", "-type", "d", "-delete"])) {
            eprintln!("systemd: a control group is left: {error}");
        }
    }
}

/// Where the second version of control groups is mounted.
fn unified_groups() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts")?;
    let mut rows = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let row = rows.find(|row| row.get(2) == Some(&"cgroup2"));
    let path =
        row.and_then(|row| row.get(1).copied()).context("control groups of the second version are not mounted")?;
    Ok(PathBuf::from(path))
}

/// The child of `outer` that has become systemd.
pub(crate) fn first_process(outer: u32) -> Option<Pid> {
    let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).ok()?;
    let child: i32 = children.split_whitespace().next()?.parse().ok()?;
    let program = fs::read_link(format!("/proc/{child}/exe")).ok()?;
    program.ends_with("systemd/systemd").then(|| Pid::from_raw(child)).flatten()
}
