//! Taking an install back.
//!
//! Order: who uses lazy trees is looked at first, and nothing is touched while anybody does and no draining was asked
//! for. Then containerd's configuration is put back, so that no new container gets a lazy tree; then the daemon is asked
//! to unmount what is idle, again and again until nothing is in use or the time is over; then the service ends, and its
//! files go. The record goes last: whatever interrupts this, the same command finishes it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::config::revert;
use super::files::{Contents, Transaction};
use super::record::{Installed, read_text};
use super::root::Root;
use super::unit::{UNIT_MARK, UNIT_NAME, UNIT_PATH, WANTS_PATH};
use super::{InstallError, RESTART_CONTAINERD, Report, systemctl};
use crate::control::{self, Answer, ControlError, Request};
use crate::mounts::users::{TreeUse, overlay_users};

/// Between two looks at who still uses trees.
const DRAIN_PAUSE: Duration = Duration::from_secs(1);
/// How long the daemon may take for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A part of the unit that lasts until the next boot at most.
const STOP_PATH: &str = "/run/systemd/system/hermes.service.d/uninstall.conf";

/// How to take it back.
#[derive(Debug, Clone)]
pub struct Removal {
    /// The host's root.
    pub root: Root,
    /// The daemon's state folder, for a host whose record is gone.
    pub state: PathBuf,
    /// How long to wait for containers that use lazy trees; `None` refuses while there are any.
    pub drain: Option<Duration>,
    /// Whether the state folder with the store goes, too.
    pub purge: bool,
    /// Whether to restart containerd.
    pub restart_containerd: bool,
}

/// The state folder, as this process sees it and as the host's mount table names it.
#[derive(Debug)]
struct State {
    seen: PathBuf,
    on_host: PathBuf,
}

/// Removes Hermes from a host.
///
/// Not cancel safe; what is left is removed by another run.
///
/// # Errors
/// When trees are in use, or something cannot be put back.
pub async fn uninstall(this: &Removal) -> Result<Report, InstallError> {
    if !rustix::process::geteuid().is_root() {
        return Err(InstallError::NotRoot);
    }
    let root = &this.root;
    let installed = Installed::load(root)?;
    let on_host = installed.as_ref().map_or(&this.state, |installed| &installed.record.settings.state);
    let state = State { seen: root.at(on_host), on_host: on_host.clone() };
    let mut report = Report::default();
    let users = in_use(&state, false).await?;
    if !users.is_empty() && this.drain.is_none() {
        return Err(InstallError::InUse { users });
    }
    if let Some(installed) = &installed {
        restore_config(installed, root, &mut report)?;
    }
    if this.restart_containerd && root.runs_systemd() {
        systemctl(root, &["restart", "containerd.service"]).await?;
        report.done.push("restarted containerd".to_owned());
    } else if !report.done.is_empty() {
        report.next.push(RESTART_CONTAINERD.to_owned());
    }
    drain(&state, this.drain.unwrap_or_default()).await?;
    stop_daemon(root, &state.seen).await?;
    let mut files = Transaction::default();
    remove_files(root, installed.as_ref(), &mut files)?;
    Installed::forget(root, &mut files)?;
    report.done.extend(files.commit());
    Installed::remove_folder(root);
    if root.runs_systemd() {
        systemctl(root, &["daemon-reload"]).await?;
    }
    if this.purge {
        purge(&state.seen, &mut report)?;
    } else if state.seen.exists() {
        report.notes.push(format!("{} stays, with all that was fetched; --purge removes it", state.seen.display()));
    }
    if installed.is_none() {
        report.notes.push("there is no record of an install; containerd's configuration was not touched".to_owned());
    }
    Ok(report)
}

/// Puts containerd's configuration back.
fn restore_config(installed: &Installed, root: &Root, report: &mut Report) -> Result<(), InstallError> {
    let path = root.at(&installed.record.config);
    let Some(now) = read_text(&path)? else {
        report.notes.push(format!("{} is gone; nothing to put back", path.display()));
        return Ok(());
    };
    let mut files = Transaction::default();
    if installed.is_untouched(&now) {
        match &installed.before {
            Some(before) => drop(files.replace(&path, Contents::Bytes(before.as_bytes()), 0o644)?),
            None => files.remove(&path)?,
        }
    } else if installed.before.as_ref() != Some(&now) {
        let wrong = |source| InstallError::Config { path: path.clone(), source };
        let (text, kept) = revert(&now, &installed.record.changes).map_err(wrong)?;
        files.replace(&path, Contents::Bytes(text.as_bytes()), 0o644)?;
        report.notes.push(format!(
            "{} was changed after hermes went in: only what hermes had put in was taken out",
            path.display()
        ));
        if !kept.is_empty() {
            report.notes.push(format!("somebody has changed these since, so they stay: {}", kept.join(", ")));
        }
    }
    report.done.extend(files.commit());
    Ok(())
}

/// Waits until nobody uses lazy trees.
async fn drain(state: &State, patience: Duration) -> Result<(), InstallError> {
    let begun = Instant::now();
    loop {
        let users = in_use(state, true).await?;
        if users.is_empty() {
            return Ok(());
        }
        if begun.elapsed() >= patience {
            return Err(InstallError::NotDrained { waited_seconds: patience.as_secs(), users });
        }
        tracing::info!(count = users.len(), "lazy trees are in use; waiting");
        tokio::time::sleep(DRAIN_PAUSE.min(patience)).await;
    }
}

/// Who uses lazy trees: by the mount table, which also knows when no daemon runs, and by the daemon, which unmounts what
/// is idle if `unmount` says so.
async fn in_use(state: &State, unmount: bool) -> Result<Vec<String>, InstallError> {
    let mut users: Vec<TreeUse> = Vec::new();
    for folder in [&state.seen, &state.on_host] {
        users.extend(overlay_users(folder).map_err(InstallError::io("read", "/proc/self/mountinfo"))?);
    }
    let request = Request::Drain { unmount };
    let asked = control::ask(&state.seen, &request, |_| ());
    let failed = |reason: String| InstallError::Program { program: "the daemon".to_owned(), reason };
    match tokio::time::timeout(ANSWER_TIMEOUT, asked).await {
        Ok(Ok(Answer::Drained { in_use })) => users.extend(in_use),
        Ok(Ok(Answer::Failed(failure))) => return Err(failed(failure.message)),
        Ok(Ok(other)) => return Err(failed(format!("it answered something else: {other:?}"))),
        // Nobody to ask: the mount table has said all.
        Ok(Err(ControlError::NotRunning { .. })) => {}
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => return Err(failed(format!("it did not answer within {} s", ANSWER_TIMEOUT.as_secs()))),
    }
    users.sort();
    users.dedup();
    Ok(users.iter().map(ToString::to_string).collect())
}

/// Ends the service, or the daemon that somebody else runs.
async fn stop_daemon(root: &Root, state: &Path) -> Result<(), InstallError> {
    if root.runs_systemd() && root.at(Path::new(UNIT_PATH)).exists() {
        return stop_service(root).await;
    }
    match tokio::time::timeout(ANSWER_TIMEOUT, control::ask(state, &Request::Shutdown, |_| ())).await {
        Ok(Ok(_) | Err(ControlError::NotRunning { .. } | ControlError::NoAnswer | ControlError::Broken(_))) => Ok(()),
        Ok(Err(error)) => Err(InstallError::Program { program: "the daemon".to_owned(), reason: error.to_string() }),
        Err(_) => Err(InstallError::Program { program: "the daemon".to_owned(), reason: "it does not end".to_owned() }),
    }
}

/// Ends the service for good. By SIGTERM it would leave its mounts to the next daemon, of which there is none; SIGINT has it
/// unmount them, so systemd is told for this once to end it by that.
async fn stop_service(root: &Root) -> Result<(), InstallError> {
    let path = root.at(Path::new(STOP_PATH));
    let folder = path.parent().unwrap_or(root.dir()).to_owned();
    std::fs::create_dir_all(&folder).map_err(InstallError::io("make", &folder))?;
    std::fs::write(&path, "[Service]\nKillSignal=SIGINT\n").map_err(InstallError::io("write", &path))?;
    let stopped = async {
        systemctl(root, &["daemon-reload"]).await?;
        systemctl(root, &["stop", UNIT_NAME]).await
    };
    let stopped = stopped.await;
    // Whoever reloads next forgets it; a reboot does as well.
    std::fs::remove_file(&path).map_err(InstallError::io("remove", &path))?;
    // Somebody else's parts may be there, too.
    let _ = std::fs::remove_dir(&folder);
    stopped
}

fn remove_files(root: &Root, installed: Option<&Installed>, files: &mut Transaction) -> Result<(), InstallError> {
    files.remove(&root.at(Path::new(WANTS_PATH)))?;
    let path = root.at(Path::new(UNIT_PATH));
    if read_text(&path)?.is_some_and(|text| text.starts_with(UNIT_MARK)) {
        files.remove(&path)?;
    }
    match installed.filter(|installed| installed.record.copied_binary) {
        Some(installed) => files.remove(&root.at(&installed.record.settings.binary)),
        None => Ok(()),
    }
}

/// Removes the state folder, never through something that is still mounted in it.
fn purge(state: &Path, report: &mut Report) -> Result<(), InstallError> {
    let mounted = crate::mounts::below(state).map_err(InstallError::io("read the mounts below", state))?;
    if let Some(first) = mounted.first() {
        let what = std::io::Error::new(std::io::ErrorKind::ResourceBusy, "something is still mounted there");
        return Err(InstallError::io("remove", first)(what));
    }
    match std::fs::remove_dir_all(state) {
        Ok(()) => report.done.push(format!("removed {}", state.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(InstallError::io("remove", state)(error)),
    }
    Ok(())
}
