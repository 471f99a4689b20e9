//! Asking the host's containerd: which version it is, and what it makes of a configuration.

use std::path::{Path, PathBuf};

use tokio::process::Command;

use super::InstallError;
use super::effective::{Effective, Version};
use super::root::{PRINT_TIMEOUT, Root, run};

/// The host's containerd.
#[derive(Debug, Clone)]
pub(crate) struct Containerd {
    root: Root,
    /// A program of this process' world; `None` for one within the root.
    named: Option<PathBuf>,
    program: PathBuf,
    pub(crate) version: Version,
}

impl Containerd {
    /// Finds it, and asks for its version. `named` is a path for this process, which runs outside the root.
    pub(crate) async fn find(root: &Root, named: Option<&Path>) -> Result<Self, InstallError> {
        let program = match named {
            Some(named) => named.to_owned(),
            None => root
                .find_program("containerd")
                .ok_or_else(|| InstallError::NoContainerd { root: root.dir().to_owned() })?,
        };
        let mut found =
            Self { root: root.clone(), named: named.map(Path::to_owned), program, version: Version::OLDEST };
        let mut command = found.command();
        command.arg("--version");
        let said = run(command, PRINT_TIMEOUT).await?;
        found.version = Version::parse(&said).ok_or_else(|| InstallError::Program {
            program: found.program.display().to_string(),
            reason: format!("it says '{}', which is no version of containerd", said.trim()),
        })?;
        if found.version < Version::OLDEST {
            return Err(InstallError::TooOld { found: found.version });
        }
        Ok(found)
    }

    fn command(&self) -> Command {
        if self.named.is_some() { Command::new(&self.program) } else { self.root.command(&self.program) }
    }

    /// What it makes of the configuration at the host's path `config`.
    pub(crate) async fn effective(&self, config: &Path) -> Result<Effective, InstallError> {
        let config = if self.named.is_some() { self.root.at(config) } else { config.to_owned() };
        let mut command = self.command();
        command.arg("--config").arg(config).args(["config", "dump"]);
        let dump = run(command, PRINT_TIMEOUT).await.map_err(|error| match error {
            ended @ InstallError::Ended { .. } => ended,
            other => InstallError::Refused(other.to_string()),
        })?;
        Effective::parse(&dump).map_err(|error| InstallError::Refused(error.to_string()))
    }
}
