//! `hermes node upgrade`.
//!
//! Everything that can be wrong with the new program is found out before anything is touched: it must run here, and it
//! must know the version of the state folder. Then the supervisor is told which program comes next, and the daemon is
//! asked to hand over. When the new daemon does not come up, the keeper goes back to the program before by itself.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use hermes_snapshotter::control::{self, Answer, FailureClass, Request};
use hermes_snapshotter::keeper;
use hermes_snapshotter::state_version::{self, StateVersions};
use hermes_snapshotter::status::NodeStatus;
use rustix::process::{Pid, Signal};
use tokio::process::Command;

use super::super::StateArgs;
use super::super::mount::expect_done;
use crate::output::failure;

/// How long the new program may take to say its version.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the new daemon may take until it answers; the keeper has gone back to the old one by then if it must.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often it is asked.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Arguments of `hermes node upgrade`.
#[derive(Debug, Args)]
pub(super) struct UpgradeArgs {
    /// The new `hermes`. It is used from where it is, and must stay there.
    #[arg(value_name = "PATH")]
    program: PathBuf,
    #[command(flatten)]
    state: StateArgs,
}

/// Replaces the running daemon's program.
pub(super) async fn run(args: UpgradeArgs) -> anyhow::Result<()> {
    let state = std::path::absolute(&args.state.state)?;
    let program = args.program.canonicalize().with_context(|| format!("cannot find {}", args.program.display()))?;
    let version = check(&program, &state).await?;
    let before = status(&state).await?;
    let kept = keeper::is_kept(&state).map_err(|error| failure(FailureClass::Local, error.to_string()))?;
    if kept {
        let old = keeper::program(&state);
        keeper::set_program(&state, Some(&program)).context("cannot write down the new program")?;
        if let Err(error) = hand_over(before.pid) {
            keeper::set_program(&state, old.as_deref()).context("cannot take back the new program")?;
            return Err(error);
        }
    } else {
        let unit = unit_of(before.pid).ok_or_else(|| {
            failure(
                FailureClass::Usage,
                "the node has no supervisor that keeps its mounts; run it with `hermes keeper` or as a systemd service",
            )
        })?;
        let running = std::fs::read_link(format!("/proc/{}/exe", before.pid)).context("cannot find the old program")?;
        replace(&program, &running).with_context(|| format!("cannot replace {}", running.display()))?;
        restart(&unit).await?;
    }
    let after = wait_for_another(&state, before.pid).await?;
    let running = std::fs::read_link(format!("/proc/{}/exe", after.pid)).unwrap_or_default();
    if kept && running != program {
        return Err(failure(
            FailureClass::Local,
            format!("{} does not start as a daemon; the node runs {} again", program.display(), running.display()),
        ));
    }
    println!("the node runs {version} (pid {}), was {} (pid {})", after.version, before.version, before.pid);
    Ok(())
}

/// Finds out whether `program` runs here and can use the state folder; what it calls itself.
async fn check(program: &Path, state: &Path) -> anyhow::Result<String> {
    let version = ask(program, &["--version"]).await?;
    let versions = ask(program, &["node", "state-version"]).await?;
    let versions: StateVersions = serde_json::from_str(&versions).map_err(|error| {
        failure(FailureClass::Usage, format!("{} does not say which state it can use: {error}", program.display()))
    })?;
    let found = state_version::read(state).map_err(|error| failure(FailureClass::Local, error.to_string()))?;
    if !versions.knows(found) {
        return Err(failure(
            FailureClass::Usage,
            format!(
                "{} ({version}) knows state folders of version {} to {}, and this one has {found}; nothing was changed",
                program.display(),
                versions.oldest,
                versions.newest
            ),
        ));
    }
    Ok(version)
}

async fn ask(program: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let refused = |reason: String| {
        let message = format!("{} is no hermes that runs here: {reason}; nothing was changed", program.display());
        failure(FailureClass::Usage, message)
    };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(ANSWER_TIMEOUT, command.output()).await;
    let output = output.map_err(|_| refused(format!("no answer within {ANSWER_TIMEOUT:?}")))?;
    let output = output.map_err(|error| refused(error.to_string()))?;
    if !output.status.success() {
        return Err(refused(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    let text = String::from_utf8(output.stdout).map_err(|error| refused(error.to_string()))?;
    Ok(text.trim().to_owned())
}

async fn status(state: &Path) -> anyhow::Result<NodeStatus> {
    match expect_done(control::ask(state, &Request::Status, |_| ()).await)? {
        Answer::Status(status) => Ok(*status),
        answer => anyhow::bail!("the daemon answered something else: {answer:?}"),
    }
}

fn hand_over(pid: u32) -> anyhow::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("the daemon's process id is none")?;
    rustix::process::kill_process(pid, Signal::TERM).context("cannot ask the daemon to hand over")
}

async fn wait_for_another(state: &Path, before: u32) -> anyhow::Result<NodeStatus> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        if let Ok(status) = status(state).await
            && status.pid != before
        {
            return Ok(status);
        }
        if Instant::now() > deadline {
            let message = format!("no daemon answers within {START_TIMEOUT:?}; its log says why");
            return Err(failure(FailureClass::Local, message));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// The systemd service that a process belongs to.
fn unit_of(pid: u32) -> Option<String> {
    unit_in(&std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

/// The service that a `/proc/PID/cgroup` names: the innermost part of the path that is one.
fn unit_in(cgroups: &str) -> Option<String> {
    let paths = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.flat_map(|path| path.rsplit('/')).find(|part| part.ends_with(".service")).map(str::to_owned)
}

/// Puts a copy of `new` in the place of `old`, in one step.
fn replace(new: &Path, old: &Path) -> io::Result<()> {
    let temporary = old.with_extension("new");
    std::fs::copy(new, &temporary)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o755))?;
    std::fs::File::open(&temporary)?.sync_all()?;
    std::fs::rename(&temporary, old)?;
    old.parent().map_or(Ok(()), |folder| std::fs::File::open(folder)?.sync_all())
}

/// systemd ends the daemon with SIGTERM, keeps its descriptors, and starts the new program with them.
async fn restart(unit: &str) -> anyhow::Result<()> {
    let restarted = Command::new("systemctl").args(["restart", unit]).stdin(Stdio::null()).output().await;
    let output = restarted.with_context(|| format!("cannot run systemctl; run `systemctl restart {unit}`"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(failure(FailureClass::Local, format!("systemctl restart {unit}: {said}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_service_is_found() {
        let cases = [
            ("0::/system.slice/hermes.service\n", Some("hermes.service")),
            ("1:cpu:/\n0::/a.slice/hermes@1.service/daemon\n", Some("hermes@1.service")),
            ("0::/user.slice/session-1.scope\n", None),
            ("", None),
        ];
        for (text, unit) in cases {
            assert_eq!(unit_in(text).as_deref(), unit, "{text}");
        }
    }

    #[test]
    fn a_program_is_replaced_in_one_step() {
        let folder = tempfile::tempdir().expect("a folder");
        let (new, old) = (folder.path().join("new-hermes"), folder.path().join("hermes"));
        std::fs::write(&new, "new").expect("written");
        std::fs::write(&old, "old").expect("written");
        replace(&new, &old).expect("replaced");
        assert_eq!(std::fs::read_to_string(&old).expect("reads"), "new");
        assert_eq!(std::fs::metadata(&old).expect("there").permissions().mode() & 0o777, 0o755);
        assert_eq!(std::fs::read_dir(folder.path()).expect("lists").count(), 2);
    }
}
