//! Why a provider has no answer. A message names the provider and the cause, and never repeats what the provider said
//! on its standard output or what stands in a file, since both hold secrets.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

/// Why logins could not be had from one provider. The ones after it are asked all the same.
#[derive(Debug, Error)]
pub enum CredentialsError {
    /// A file is there but cannot be read.
    #[error("the logins in {} cannot be read: {source}; check its permissions", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file makes no sense. Its content is not repeated here, since it holds secrets.
    #[error("the logins in {} are malformed ({reason}); mend the file", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, without content.
        reason: String,
    },
    /// The kubelet's credential provider configuration cannot be used.
    #[error("the credential provider configuration {} cannot be used: {reason}; compare it with the kubelet's", .path.display())]
    Configuration {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A helper or plugin could not be started.
    #[error("{program} cannot be started: {source}; install it, or remove it from the configuration")]
    Start {
        /// The program.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// A helper or plugin did not end in time.
    #[error("{program} did not answer within {:.1} s and was ended; run it by hand to see why", .waited.as_secs_f64())]
    Timeout {
        /// The program.
        program: String,
        /// How long it was given.
        waited: Duration,
    },
    /// A helper or plugin reported a failure.
    #[error("{program} failed with {status}{}", said(.message))]
    Failed {
        /// The program.
        program: String,
        /// How it ended.
        status: String,
        /// The first line of its standard error.
        message: String,
    },
    /// A helper's or plugin's answer cannot be used.
    #[error("the answer of {program} cannot be used: {reason}")]
    Answer {
        /// The program.
        program: String,
        /// What is wrong, without content.
        reason: String,
    },
    /// A worker thread was lost.
    #[error("a task of this process failed: {0}; this is a defect of hermes, please report it")]
    Task(#[source] tokio::task::JoinError),
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(", saying '{message}'") }
}
