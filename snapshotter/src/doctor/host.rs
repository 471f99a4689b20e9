//! The host around the daemon: privileges, the daemon itself, containerd.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Finding;
use crate::control::{self, Answer, ControlError, Request};
use crate::install::InstallError;
use crate::install::check::{self, Verdict};
use crate::install::root::Root;
use crate::status::{NodeStatus, Way};

/// How long the daemon may take to say how it is.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);
/// Open files that the daemon needs room for: a descriptor for each layer, peer and request.
const OPEN_FILES_MIN: u64 = 16_384;

/// Whether this is root.
pub(super) fn root() -> Finding {
    match rustix::process::geteuid().is_root() {
        true => Finding::ok("privileges", "root"),
        false => Finding::fail("privileges", "not root", "run it with sudo; without, other checks fail for that alone"),
    }
}

/// Whether the daemon answers, and how it is.
pub(super) async fn daemon(state: &Path) -> Vec<Finding> {
    const WHAT: &str = "daemon";
    let asked = tokio::time::timeout(STATUS_TIMEOUT, control::ask(state, &Request::Status, |_| ())).await;
    let failed = |seen: String, next: &str| vec![Finding::fail(WHAT, seen, next)];
    let status = match asked {
        Err(_) => {
            let seen = format!("it does not answer within {} s", STATUS_TIMEOUT.as_secs());
            return failed(seen, "see its log (`journalctl --unit hermes`) and whether its disk answers");
        }
        Ok(Ok(Answer::Status(status))) => status,
        Ok(Ok(other)) => return failed(format!("it answers {other:?}"), "use the same version of both"),
        Ok(Err(error @ ControlError::NotRunning { .. })) => {
            let next = "start it: `systemctl start hermes`, or `hermes node install` first";
            return failed(error.to_string(), next);
        }
        Ok(Err(error)) => return failed(error.to_string(), ""),
    };
    let ours = env!("CARGO_PKG_VERSION");
    let running = format!("version {} runs (pid {})", status.version, status.pid);
    let mut findings = vec![if status.version == ours {
        Finding::ok(WHAT, running)
    } else {
        Finding::warn(WHAT, format!("{running}, this command is {ours}"), "restart it: `systemctl restart hermes`")
    }];
    findings.push(ways(&status));
    findings.push(waiting(&status));
    findings.push(peers(&status));
    findings.extend(open_files(status.pid));
    findings
}

fn ways(status: &NodeStatus) -> Finding {
    let shown = status.ways.iter().map(|way| match way.available {
        true => way.way.to_string(),
        false => format!("not {} ({})", way.way, way.detail),
    });
    let seen = shown.collect::<Vec<_>>().join(", ");
    let has = |wanted| status.ways.iter().any(|way| way.way == wanted && way.available);
    if has(Way::ErofsFuse) {
        Finding::ok("trees", seen)
    } else if has(Way::FuseTree) {
        Finding::warn("trees", seen, "reading works, more slowly; Linux 6.12 or newer with EROFS makes it quicker")
    } else {
        Finding::fail("trees", seen, "images are pulled as ever; see the lines on FUSE and EROFS for the reason")
    }
}

fn waiting(status: &NodeStatus) -> Finding {
    match status.waiting.demand {
        0 => Finding::ok("waiting reads", "none"),
        count => Finding::warn(
            "waiting reads",
            format!("{count} just now"),
            "if they stay: examine the registry with `hermes doctor IMAGE`, and whether peers are there",
        ),
    }
}

fn peers(status: &NodeStatus) -> Finding {
    match (status.peers.len(), status.listen.is_empty()) {
        (0, _) => Finding::warn(
            "peers",
            "none is connected: everything comes from the registry",
            "fine for a node alone; else give it --peer, and let others reach its --listen address",
        ),
        (count, true) => Finding::warn("peers", format!("{count}, but none can reach this node"), "give it --listen"),
        (count, false) => Finding::ok("peers", format!("{count} connected")),
    }
}

/// The daemon's own limit, from the kernel.
fn open_files(pid: u32) -> Option<Finding> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find(|line| line.starts_with("Max open files"))?;
    // Name of three words, soft limit, hard limit, unit.
    let soft = line.split_whitespace().nth(3)?;
    let enough = soft == "unlimited" || soft.parse::<u64>().ok()? >= OPEN_FILES_MIN;
    let seen = format!("the daemon may have {soft}");
    Some(match enough {
        true => Finding::ok("open files", seen),
        false => {
            Finding::warn("open files", seen, "set LimitNOFILE=1048576 in its unit, as `hermes node install` does")
        }
    })
}

/// Whether containerd is there and uses Hermes, if it was ever told to.
pub(super) async fn containerd(root: &Root, named: Option<PathBuf>) -> Vec<Finding> {
    let looked = async {
        let mut findings = check::check(root, named).await?;
        findings.extend(check::snapshots(root).await?);
        Ok::<_, InstallError>(findings)
    };
    match looked.await {
        Ok(findings) => findings,
        Err(error) => vec![Finding {
            what: "install",
            verdict: Verdict::Fail,
            seen: error.to_string(),
            next: "repair it, or run `hermes node uninstall` and `hermes node install`".to_owned(),
        }],
    }
}
