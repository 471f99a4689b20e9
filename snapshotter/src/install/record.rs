//! What an install has done, kept for `check`, for another install and for `uninstall`.
//!
//! In `/etc/hermes`, because it concerns the host's configuration and has to outlive the store: `install.json`, and
//! beside it the containerd configuration as it was, byte for byte. Both are written before containerd's configuration is
//! replaced, so whatever a crash leaves can be taken back.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::config::Change;
use super::files::{Contents, Transaction};
use super::root::Root;
use super::{InstallError, Settings};

/// Where the record is.
const RECORD_PATH: &str = "/etc/hermes/install.json";
/// Where the configuration is as it was.
const BACKUP_PATH: &str = "/etc/hermes/containerd-config.before";
/// The folder of both.
const FOLDER: &str = "/etc/hermes";
/// The version of the record.
const RECORD_VERSION: u32 = 1;
/// The longest record and backup that are read, in bytes.
const FILE_MAX_BYTES: u64 = 4 << 20;

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    version: u32,
    /// With which settings.
    pub(super) settings: Settings,
    /// The configuration, links followed, as the host sees it.
    pub(super) config: PathBuf,
    /// Whether there was a configuration before.
    pub(super) existed: bool,
    /// SHA-256 of the configuration as it was written, in hex.
    pub(super) written: String,
    /// What was changed in it.
    pub(super) changes: Vec<Change>,
    /// Whether the binary was put where it is.
    pub(super) copied_binary: bool,
}

/// A record with the configuration as it was before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Installed {
    pub(super) record: Record,
    /// `None` when there was no file.
    pub(super) before: Option<String>,
}

impl Installed {
    pub(super) fn new(
        settings: &Settings,
        config: PathBuf,
        before: Option<String>,
        written: &str,
        changes: Vec<Change>,
        copied_binary: bool,
    ) -> Self {
        let record = Record {
            version: RECORD_VERSION,
            settings: settings.clone(),
            config,
            existed: before.is_some(),
            written: digest(written),
            changes,
            copied_binary,
        };
        Self { record, before }
    }

    /// What an earlier install has left; `None` when there was none.
    pub(super) fn load(root: &Root) -> Result<Option<Self>, InstallError> {
        let path = root.at(Path::new(RECORD_PATH));
        let Some(text) = read_text(&path)? else { return Ok(None) };
        let damaged = |reason: String| InstallError::Record { path: path.clone(), reason };
        let record: Record = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        if record.version != RECORD_VERSION {
            return Err(damaged(format!("version {}", record.version)));
        }
        let before = match record.existed {
            false => None,
            true => {
                let backup = root.at(Path::new(BACKUP_PATH));
                Some(read_text(&backup)?.ok_or_else(|| damaged(format!("{} is missing", backup.display())))?)
            }
        };
        Ok(Some(Self { record, before }))
    }

    /// Writes it.
    pub(super) fn store(&self, root: &Root, files: &mut Transaction) -> Result<(), InstallError> {
        let backup = root.at(Path::new(BACKUP_PATH));
        match &self.before {
            // As private as the strictest configuration: it may hold a registry's password.
            Some(before) => drop(files.replace(&backup, Contents::Bytes(before.as_bytes()), 0o600)?),
            None => files.remove(&backup)?,
        }
        let path = root.at(Path::new(RECORD_PATH));
        let text = serde_json::to_string_pretty(&self.record)
            .map_err(|error| InstallError::Record { path: path.clone(), reason: error.to_string() })?;
        files.replace(&path, Contents::Bytes(text.as_bytes()), 0o600).map(drop)
    }

    /// Removes it.
    pub(super) fn forget(root: &Root, files: &mut Transaction) -> Result<(), InstallError> {
        files.remove(&root.at(Path::new(RECORD_PATH)))?;
        files.remove(&root.at(Path::new(BACKUP_PATH)))
    }

    /// Removes the record's folder, if nothing else is in it.
    pub(super) fn remove_folder(root: &Root) {
        let _ = fs::remove_dir(root.at(Path::new(FOLDER)));
    }

    /// Whether the configuration is still what was written.
    pub(super) fn is_untouched(&self, now: &str) -> bool {
        digest(now) == self.record.written
    }
}

/// The name of a text.
fn digest(text: &str) -> String {
    hex::encode(Sha256::digest(text.as_bytes()))
}

/// A text file, within bounds; `None` when there is none.
pub(super) fn read_text(path: &Path) -> Result<Option<String>, InstallError> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(InstallError::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(InstallError::io("read", path))?;
    if bytes.len() as u64 > FILE_MAX_BYTES {
        let source = io::Error::new(io::ErrorKind::InvalidData, format!("it is longer than {FILE_MAX_BYTES} bytes"));
        return Err(InstallError::io("read", path)(source));
    }
    let text = String::from_utf8(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is no UTF-8 text"));
    text.map(Some).map_err(InstallError::io("read", path))
}
