//! What can go wrong when a node is set up, and what to do then.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::config::ConfigError;
use super::effective::Version;
use crate::control::FailureClass;

/// Setting up a node, or taking that back, failed. Unless it says otherwise, everything is as it was before.
#[derive(Debug, Error)]
pub enum InstallError {
    /// Not root.
    #[error("only root may change how containerd and the node's services run; run it with sudo")]
    NotRoot,
    /// A setting that cannot be.
    #[error("{0}")]
    Setting(String),
    /// A file could not be handled.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was to be done.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// containerd is not there.
    #[error("no containerd below {}; install it, or name the program with --containerd", root.display())]
    NoContainerd {
        /// Where it was looked for.
        root: PathBuf,
    },
    /// containerd is too old.
    #[error("containerd {found} is older than {}, which is the oldest that Hermes knows", Version::OLDEST)]
    TooOld {
        /// Its version.
        found: Version,
    },
    /// Somebody ended a program before it was done, such as who ends the whole pod.
    #[error("{program} was ended by signal {signal} before it was done; set the host up again")]
    Ended {
        /// Which.
        program: String,
        /// signal(7).
        signal: i32,
    },
    /// A program could not be run.
    #[error("cannot run {program}: {reason}")]
    Program {
        /// Which.
        program: String,
        /// Why.
        reason: String,
    },
    /// The configuration cannot be edited.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ConfigError,
    },
    /// containerd does not accept the edited configuration.
    #[error("containerd refuses the edited configuration, so it stays as it is: {0}")]
    Refused(String),
    /// containerd accepts it, but what it makes of it is something else.
    #[error(
        "containerd would not use what was set in {}: {}; a file that it imports says otherwise, or its version is old \
         (`containerd config migrate` rewrites it); nothing was changed", path.display(), differences.join("; ")
    )]
    Hidden {
        /// The file.
        path: PathBuf,
        /// What is not as it was set.
        differences: Vec<String>,
    },
    /// A file of somebody else stands where ours would.
    #[error("{} was not written by hermes; move it away first", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The record of an earlier install cannot be understood.
    #[error("{} is damaged or of another version of hermes: {reason}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Containers use lazy trees.
    #[error(
        "{} still in use, so nothing was removed: {}; stop these containers, or drain the node with --drain SECONDS",
        counted(users), users.join(", ")
    )]
    InUse {
        /// Where the trees are used.
        users: Vec<String>,
    },
    /// They still do after the time that they were given.
    #[error(
        "after {waited_seconds} s {} still in use: {}; containerd is configured without hermes already and the daemon \
         still runs; stop these containers and run the same command again", counted(users), users.join(", ")
    )]
    NotDrained {
        /// How long it waited.
        waited_seconds: u64,
        /// Where the trees are used.
        users: Vec<String>,
    },
}

fn counted(users: &[String]) -> String {
    match users.len() {
        1 => "one lazy tree is".to_owned(),
        count => format!("{count} lazy trees are"),
    }
}

impl InstallError {
    /// For the command's exit code.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::NotRoot => FailureClass::Denied,
            Self::Setting(_) => FailureClass::Usage,
            Self::NoContainerd { .. } => FailureClass::NotFound,
            Self::Record { .. } => FailureClass::Corrupt,
            Self::Io { .. }
            | Self::TooOld { .. }
            | Self::Program { .. }
            | Self::Ended { .. }
            | Self::Config { .. }
            | Self::Refused(_)
            | Self::Hidden { .. }
            | Self::Foreign { .. }
            | Self::InUse { .. }
            | Self::NotDrained { .. } => FailureClass::Local,
        }
    }

    /// For `map_err` of file operations.
    pub(super) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
