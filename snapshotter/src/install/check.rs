//! Whether a host is still as an install has left it. Only looks.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hermes_containerd_api::snapshots::StatSnapshotRequest;
use hermes_containerd_api::snapshots::snapshots_client::SnapshotsClient;
use serde::Serialize;
use tonic::Code;
use tonic::transport::Endpoint;

use super::containerd::Containerd;
use super::record::{Installed, read_text};
use super::root::Root;
use super::unit::{UNIT_NAME, UNIT_PATH, WANTS_PATH, unit};
use super::{InstallError, systemctl};

/// How it stands with one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it shall be.
    Ok,
    /// It works, but not as well or as long as it could.
    Warn,
    /// It does not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// How it stands.
    pub verdict: Verdict,
    /// What was seen.
    pub seen: String,
    /// What to do; empty when there is nothing to do.
    pub next: String,
}

impl Finding {
    /// All is well.
    pub fn ok(what: &'static str, seen: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Ok, seen: seen.into(), next: String::new() }
    }

    /// It could be better.
    pub fn warn(what: &'static str, seen: impl Into<String>, next: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Warn, seen: seen.into(), next: next.into() }
    }

    /// It is broken.
    pub fn fail(what: &'static str, seen: impl Into<String>, next: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Fail, seen: seen.into(), next: next.into() }
    }
}

/// What to do about most of what is found here.
const INSTALL_AGAIN: &str = "run `hermes node install` again, with the same options";

/// How long the daemon may take to answer on its socket.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A name that containerd gives no snapshot.
const NOBODYS_SNAPSHOT: &str = "hermes-doctor";

/// Compares the host with the record of its install. `named` is a containerd to ask instead of the host's.
///
/// Cancel safe.
///
/// # Errors
/// When the record or the configuration cannot be read.
pub async fn check(root: &Root, named: Option<PathBuf>) -> Result<Vec<Finding>, InstallError> {
    let Some(installed) = Installed::load(root)? else {
        let next = "run `hermes node install`";
        return Ok(vec![Finding::fail("install", "there is no record of an install", next)]);
    };
    let mut found =
        vec![Finding::ok("install", format!("recorded in {}", root.at(Path::new("/etc/hermes")).display()))];
    found.push(binary(root, &installed));
    if installed.record.settings.systemd {
        found.push(unit_file(root, &installed)?);
        found.push(service(root).await);
    }
    found.extend(configuration(root, &installed, named.as_deref()).await?);
    Ok(found)
}

/// Asks the socket that containerd was told of, as containerd does; `None` when nothing is installed.
///
/// Cancel safe.
///
/// # Errors
/// When the record cannot be read.
pub async fn snapshots(root: &Root) -> Result<Option<Finding>, InstallError> {
    const WHAT: &str = "snapshots";
    let Some(installed) = Installed::load(root)? else { return Ok(None) };
    let socket = &installed.record.settings.socket;
    // A containerd that runs outside of the host's root sees the path as it is.
    let path = Some(root.at(socket)).filter(|path| path.exists()).unwrap_or_else(|| socket.clone());
    let socket = path.display().to_string();
    let asked = async {
        let channel = Endpoint::from_shared(format!("unix://{socket}")).map_err(|error| error.to_string())?;
        let channel = channel.connect().await.map_err(|error| cause_of(&error))?;
        let request = StatSnapshotRequest { key: NOBODYS_SNAPSHOT.to_owned(), ..StatSnapshotRequest::default() };
        match SnapshotsClient::new(channel).stat(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(status.to_string()),
        }
    };
    let answered = match tokio::time::timeout(ANSWER_TIMEOUT, asked).await {
        Ok(answered) => answered,
        Err(_) => Err(format!("no answer within {ANSWER_TIMEOUT:?}")),
    };
    Ok(Some(match answered {
        Ok(()) => Finding::ok(WHAT, format!("{socket} answers")),
        Err(reason) => {
            let next = "start the daemon with --containerd-socket; until then containerd can start nothing with Hermes";
            Finding::fail(WHAT, format!("{socket}: {reason}"), next)
        }
    }))
}

/// The innermost cause of an error: a transport's own words say no more than that it is one.
fn cause_of(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.last().unwrap_or(error).to_string()
}

fn binary(root: &Root, installed: &Installed) -> Finding {
    use std::os::unix::fs::PermissionsExt as _;
    let path = root.at(&installed.record.settings.binary);
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 => {
            Finding::ok("binary", path.display().to_string())
        }
        Ok(_) => Finding::fail("binary", format!("{} is no program", path.display()), INSTALL_AGAIN),
        Err(error) => Finding::fail("binary", format!("{}: {error}", path.display()), INSTALL_AGAIN),
    }
}

fn unit_file(root: &Root, installed: &Installed) -> Result<Finding, InstallError> {
    let path = root.at(Path::new(UNIT_PATH));
    let wants = root.at(Path::new(WANTS_PATH));
    let there = read_text(&path)?;
    Ok(match there {
        None => Finding::fail("unit", format!("{} is missing", path.display()), INSTALL_AGAIN),
        Some(text) if text != unit(&installed.record.settings) => {
            let next = format!("{INSTALL_AGAIN}; keep changes of your own in a drop-in (systemctl edit hermes)");
            Finding::warn("unit", format!("{} is not as this version writes it", path.display()), next)
        }
        Some(_) if std::fs::symlink_metadata(&wants).is_err() => {
            Finding::fail("unit", "the service does not start with the machine", INSTALL_AGAIN)
        }
        Some(_) => Finding::ok("unit", path.display().to_string()),
    })
}

async fn service(root: &Root) -> Finding {
    if !root.runs_systemd() {
        return Finding::warn("service", "systemd does not run there", "start the machine to start the service");
    }
    match systemctl(root, &["is-active", "--quiet", UNIT_NAME]).await {
        Ok(()) => Finding::ok("service", "it runs"),
        Err(_) => Finding::fail(
            "service",
            "it does not run",
            "see `journalctl --unit hermes` for the reason, then `systemctl start hermes`",
        ),
    }
}

async fn configuration(root: &Root, installed: &Installed, named: Option<&Path>) -> Result<Vec<Finding>, InstallError> {
    const WHAT: &str = "containerd configuration";
    let record = &installed.record;
    let path = root.at(&record.config);
    let Some(text) = read_text(&path)? else {
        return Ok(vec![Finding::fail(WHAT, format!("{} is missing", path.display()), INSTALL_AGAIN)]);
    };
    let containerd = match Containerd::find(root, named).await {
        Ok(containerd) => containerd,
        Err(error) => return Ok(vec![Finding::fail("containerd", error.to_string(), "")]),
    };
    let mut found = vec![Finding::ok("containerd", format!("version {}", containerd.version))];
    let effective = match containerd.effective(&record.config).await {
        Ok(effective) => effective,
        Err(error) => {
            let next = format!("repair {}; containerd does not start with it", path.display());
            found.push(Finding::fail(WHAT, error.to_string(), next));
            return Ok(found);
        }
    };
    let differences = effective.differences(&record.settings.wanted(containerd.version), containerd.version);
    found.push(if !differences.is_empty() {
        Finding::fail(WHAT, differences.join("; "), INSTALL_AGAIN)
    } else if installed.is_untouched(&text) {
        Finding::ok(WHAT, format!("{} is as it was written", path.display()))
    } else {
        let seen = format!("{} was changed since, and still says what it has to", path.display());
        Finding::ok(WHAT, seen)
    });
    if effective.cri_disabled {
        let next = "remove \"cri\" from disabled_plugins if this is a node of Kubernetes";
        found.push(Finding::warn(WHAT, "CRI is switched off", next));
    }
    Ok(found)
}
