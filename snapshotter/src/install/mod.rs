//! Making a host use Hermes, and taking that back: `hermes node install | uninstall | check`.
//!
//! What an install leaves on the host (all below a [`root::Root`]):
//!
//! - the `hermes` binary, and a systemd unit that is started with the machine ([`unit`]);
//! - a few keys in containerd's configuration ([`config`]), which containerd itself has judged ([`effective`]) before they
//!   replaced anything;
//! - a record of all that, with the configuration as it was, byte for byte ([`record`]).
//!
//! Everything changes or nothing does ([`files`]): the configuration comes last, after what can fail, and an error puts
//! back what was changed before it. A second install with the same settings changes nothing; with other settings it
//! starts from the configuration as it was. Neither touches the store.
//!
//! [`uninstall`](uninstall::uninstall) puts the old bytes back when nobody has changed the configuration since, and else
//! takes out what the record says was put in. [`check`](check::check) only looks.

pub mod check;
pub mod config;
#[cfg(test)]
mod config_test;
pub(crate) mod containerd;
pub mod effective;
mod error;
mod files;
mod record;
pub mod root;
pub mod supervise;
pub mod uninstall;
pub mod unit;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use error::InstallError;

use self::config::{Change, Wanted, edit, revert};
use self::containerd::Containerd;
use self::files::{Contents, Transaction, beside};
use self::record::{Installed, read_text};
use self::root::{Root, SERVICE_TIMEOUT, run};
use self::unit::{UNIT_MARK, UNIT_NAME, UNIT_PATH, WANTS_PATH, unit};

/// Where containerd's configuration is, unless somebody says otherwise.
pub const CONTAINERD_CONFIG: &str = "/etc/containerd/config.toml";
/// Where the daemon serves snapshots.
pub const SNAPSHOTTER_SOCKET: &str = "/run/hermes/snapshotter.sock";
/// Where the binary goes.
pub const BINARY: &str = "/usr/local/bin/hermes";

/// How a host is set up. Paths are the host's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// containerd's configuration.
    pub containerd_config: PathBuf,
    /// Where the binary goes.
    pub binary: PathBuf,
    /// The daemon's state folder.
    pub state: PathBuf,
    /// The socket that the daemon serves snapshots on.
    pub socket: PathBuf,
    /// Whether CRI takes Hermes for every image; else only runtimes that name it do.
    pub cri_default: bool,
    /// What the snapshotter can do beyond the basics, in containerd's words; what it can do here when empty.
    pub capabilities: Vec<String>,
    /// Whether systemd runs the daemon; else somebody else does.
    pub systemd: bool,
    /// More arguments for the daemon.
    pub node_arguments: Vec<String>,
}

impl Settings {
    /// Checks what can be checked without touching anything.
    ///
    /// # Errors
    /// With the first setting that cannot be.
    pub fn validate(&self) -> Result<(), InstallError> {
        let paths = [
            ("containerd's configuration", &self.containerd_config),
            ("the binary", &self.binary),
            ("the state folder", &self.state),
            ("the socket", &self.socket),
        ];
        for (what, path) in paths {
            let text = path.to_str().filter(|text| !text.chars().any(char::is_control));
            let Some(text) = text.filter(|_| path.is_absolute()) else {
                return Err(InstallError::Setting(format!("{what} at {path:?} is no absolute path in plain text")));
            };
            // They stand unquoted in the unit, where systemd would take these for its own.
            if text.contains(['%', '"', '\\', ' ']) {
                return Err(InstallError::Setting(format!("{what} at {text} has a blank, quote, backslash or %")));
            }
        }
        // sockaddr_un(7): 108 bytes with the closing zero.
        if self.socket.as_os_str().len() > 107 {
            return Err(InstallError::Setting("the socket's path is longer than 107 bytes".to_owned()));
        }
        if self.node_arguments.iter().any(|argument| argument.chars().any(char::is_control)) {
            return Err(InstallError::Setting("an argument of the daemon has a control character".to_owned()));
        }
        Ok(())
    }

    /// What containerd of `version` shall be told.
    fn wanted(&self, version: effective::Version) -> Wanted {
        Wanted {
            socket: self.socket.display().to_string(),
            root: self.state.display().to_string(),
            // 1.6 does not know them.
            capabilities: match self.capabilities.as_slice() {
                [] if version.has_exports() => crate::snapshots::capabilities().map(str::to_owned).collect(),
                given => given.to_vec(),
            },
            cri_default: self.cri_default,
            new_file: version.dialect(),
            transfer: version.has_exports(),
            platform: hermes_registry::oci::Platform::host().to_string(),
        }
    }
}

/// What only this run of the command needs to know.
#[derive(Debug, Clone)]
pub struct Run {
    /// The host's root.
    pub root: Root,
    /// A containerd to ask instead of the host's, as a path for this process.
    pub containerd: Option<PathBuf>,
    /// The binary to copy, as a path for this process.
    pub source: PathBuf,
    /// Whether to start the service.
    pub start: bool,
    /// Whether to restart containerd.
    pub restart_containerd: bool,
}

/// What makes containerd read its configuration.
const RESTART_CONTAINERD: &str = "systemctl restart containerd   # reads its configuration; containers keep running";

/// What was done, and what is left to do.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Report {
    /// Steps that changed something.
    pub done: Vec<String>,
    /// What somebody should know.
    pub notes: Vec<String>,
    /// Commands to run next.
    pub next: Vec<String>,
    /// A daemon of before runs on, with another program or other settings.
    pub daemon_is_old: bool,
    /// containerd has not read its configuration since it was changed.
    pub containerd_is_old: bool,
}

/// Makes the host use Hermes.
///
/// Not cancel safe: dropping it puts files back, but not services.
///
/// # Errors
/// When something cannot be; everything is as it was before then.
pub async fn install(settings: &Settings, this: &Run) -> Result<Report, InstallError> {
    settings.validate()?;
    if !rustix::process::geteuid().is_root() {
        return Err(InstallError::NotRoot);
    }
    let root = &this.root;
    let containerd = Containerd::find(root, this.containerd.as_deref()).await?;
    let earlier = Installed::load(root)?;
    let plan = Plan::make(settings, root, &containerd, earlier.as_ref())?;
    let notes = plan.judge(settings, root, &containerd).await?;

    let mut report = Report { notes, ..Report::default() };
    let mut files = Transaction::default();
    let mut started = false;
    let placed = place(settings, this, &plan, earlier.as_ref(), &mut files, &mut report, &mut started).await;
    if let Err(error) = placed {
        // Back to the old files first, so that services that are reloaded see those.
        drop(files);
        if started {
            let _ = systemctl(root, &["stop", UNIT_NAME]).await;
        }
        if settings.systemd && root.runs_systemd() {
            let _ = systemctl(root, &["daemon-reload"]).await;
        }
        return Err(error);
    }
    if this.restart_containerd && root.runs_systemd() {
        if let Err(error) = systemctl(root, &["restart", "containerd.service"]).await {
            drop(files);
            let _ = systemctl(root, &["restart", "containerd.service"]).await;
            return Err(error);
        }
        files.done.push("restarted containerd".to_owned());
    }
    report.done = files.commit();
    Ok(report)
}

/// Puts everything into its place, containerd's configuration last.
async fn place(
    settings: &Settings,
    this: &Run,
    plan: &Plan,
    earlier: Option<&Installed>,
    files: &mut Transaction,
    report: &mut Report,
    started: &mut bool,
) -> Result<(), InstallError> {
    let root = &this.root;
    let copied = files.replace(&root.at(&settings.binary), Contents::File(&this.source), 0o755)?;
    let copied_before = earlier.is_some_and(|earlier| earlier.record.copied_binary);
    let unit_changed = place_unit(settings, root, files)?;
    let (before, changes) = (plan.before.clone(), plan.changes.clone());
    let installed = Installed::new(settings, plan.config.clone(), before, &plan.text, changes, copied || copied_before);
    if earlier != Some(&installed) {
        installed.store(root, files)?;
    }
    *started = start_service(settings, this, unit_changed, copied, files, report).await?;
    let rewritten = files.replace(&root.at(&plan.config), Contents::Bytes(plan.text.as_bytes()), 0o644)?;
    if rewritten && !(this.restart_containerd && root.runs_systemd()) {
        report.containerd_is_old = true;
        report.next.push(RESTART_CONTAINERD.to_owned());
    }
    Ok(())
}

/// What becomes of containerd's configuration.
#[derive(Debug)]
struct Plan {
    /// The file, links followed, as the host sees it.
    config: PathBuf,
    /// What it would be without Hermes.
    before: Option<String>,
    /// What it will be.
    text: String,
    /// By which changes.
    changes: Vec<Change>,
}

impl Plan {
    fn make(
        settings: &Settings,
        root: &Root,
        containerd: &Containerd,
        earlier: Option<&Installed>,
    ) -> Result<Self, InstallError> {
        let config = host_path(root, &settings.containerd_config)?;
        if let Some(earlier) = earlier.filter(|earlier| earlier.record.config != config) {
            return Err(InstallError::Setting(format!(
                "hermes is installed in {}; run `hermes node uninstall` before it goes into {}",
                earlier.record.config.display(),
                config.display()
            )));
        }
        let now = read_text(&root.at(&config))?;
        let wrong = |source| InstallError::Config { path: root.at(&config), source };
        let before = match (earlier, &now) {
            (Some(earlier), Some(now)) if earlier.is_untouched(now) => earlier.before.clone(),
            // A crash before it was replaced.
            (Some(earlier), Some(now)) if earlier.before.as_ref() == Some(now) => earlier.before.clone(),
            // Somebody changed it: that counts as what was there before, without what is ours.
            (Some(earlier), Some(now)) => Some(revert(now, &earlier.record.changes).map_err(wrong)?.0),
            _ => now.clone(),
        };
        let wanted = settings.wanted(containerd.version);
        let edited = edit(before.as_deref().unwrap_or_default(), &wanted).map_err(wrong)?;
        // A file that already says all that is wanted stays as somebody may have arranged it.
        if let (Some(earlier), Some(now)) = (earlier, &now)
            && earlier.record.settings == *settings
            && edit(now, &wanted).map_err(wrong)?.changes.is_empty()
        {
            return Ok(Self { config, before, text: now.clone(), changes: earlier.record.changes.clone() });
        }
        Ok(Self { config, before, text: edited.text, changes: edited.changes })
    }

    /// Has containerd judge the new text, from a file beside the real one, so that what it imports is found.
    async fn judge(
        &self,
        settings: &Settings,
        root: &Root,
        containerd: &Containerd,
    ) -> Result<Vec<String>, InstallError> {
        let candidate = beside(&self.config, "check");
        let mut files = Transaction::default();
        files.replace(&root.at(&candidate), Contents::Bytes(self.text.as_bytes()), 0o600)?;
        let effective = containerd.effective(&candidate).await?;
        // Dropping it removes the candidate.
        drop(files);
        let wanted = settings.wanted(containerd.version);
        let differences = effective.differences(&wanted, containerd.version);
        if !differences.is_empty() {
            return Err(InstallError::Hidden { path: root.at(&self.config), differences });
        }
        let mut notes = Vec::new();
        if effective.cri_disabled {
            notes.push(
                "CRI is switched off in containerd (disabled_plugins): Kubernetes cannot use this node".to_owned(),
            );
        }
        Ok(notes)
    }
}

/// The host's path of the file that `path` leads to; `path` itself when there is none yet.
fn host_path(root: &Root, path: &Path) -> Result<PathBuf, InstallError> {
    let resolved = root.resolve(path).map_err(InstallError::io("follow", root.at(path)))?;
    let within = resolved.as_deref().and_then(|resolved| resolved.strip_prefix(root.dir()).ok());
    Ok(within.map_or_else(|| path.to_owned(), |within| Path::new("/").join(within)))
}

/// Puts the unit where it belongs, or removes ours when systemd shall not run the daemon. True when it changed.
fn place_unit(settings: &Settings, root: &Root, files: &mut Transaction) -> Result<bool, InstallError> {
    let path = root.at(Path::new(UNIT_PATH));
    let there = read_text(&path)?;
    if there.is_some_and(|text| !text.starts_with(UNIT_MARK)) {
        return Err(InstallError::Foreign { path });
    }
    let wants = root.at(Path::new(WANTS_PATH));
    if !settings.systemd {
        files.remove(&wants)?;
        files.remove(&path)?;
        return Ok(false);
    }
    let changed = files.replace(&path, Contents::Bytes(unit(settings).as_bytes()), 0o644)?;
    files.link(&wants, Path::new(UNIT_PATH))?;
    Ok(changed)
}

async fn start_service(
    settings: &Settings,
    this: &Run,
    unit_changed: bool,
    binary_changed: bool,
    files: &mut Transaction,
    report: &mut Report,
) -> Result<bool, InstallError> {
    let root = &this.root;
    if !settings.systemd {
        report.daemon_is_old = binary_changed;
        report.next.push(format!(
            "hermes keeper -- {} node --state {}   # before containerd, by whatever starts services here",
            settings.binary.display(),
            settings.state.display()
        ));
        return Ok(false);
    }
    if !root.runs_systemd() {
        report.notes.push("systemd does not run there; the service starts with the machine".to_owned());
        return Ok(false);
    }
    if unit_changed {
        systemctl(root, &["daemon-reload"]).await?;
    }
    let active = systemctl(root, &["is-active", "--quiet", UNIT_NAME]).await.is_ok();
    if active {
        if unit_changed || binary_changed {
            report.daemon_is_old = true;
            report.next.push("systemctl restart hermes   # runs the new version; containers keep running".to_owned());
        }
    } else if this.start {
        if let Err(error) = systemctl(root, &["start", UNIT_NAME]).await {
            let _ = systemctl(root, &["stop", UNIT_NAME]).await;
            return Err(error);
        }
        files.done.push("started the service".to_owned());
        return Ok(true);
    } else {
        report.next.push("systemctl start hermes".to_owned());
    }
    Ok(false)
}

/// Runs the host's `systemctl`.
async fn systemctl(root: &Root, arguments: &[&str]) -> Result<(), InstallError> {
    let missing = || InstallError::Program { program: "systemctl".to_owned(), reason: "it is not there".to_owned() };
    let program = root.find_program("systemctl").ok_or_else(missing)?;
    let mut command = root.command(&program);
    command.args(arguments);
    run(command, SERVICE_TIMEOUT).await.map(drop)
}
