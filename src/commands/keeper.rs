//! `hermes keeper`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use hermes_snapshotter::control::FailureClass;
use hermes_snapshotter::keeper::{self, DEADLINE, KeeperConfig};

use super::StateArgs;
use crate::output::failure;

/// Arguments of `hermes keeper`.
#[derive(Debug, Args)]
pub(crate) struct KeeperArgs {
    #[command(flatten)]
    state: StateArgs,
    /// How long readers wait without a daemon that runs well, in milliseconds, before they get an error.
    #[arg(long, value_name = "MS", default_value_t = DEADLINE.as_millis() as u64, value_parser = clap::value_parser!(u64).range(100..=86_400_000))]
    deadline_ms: u64,
    /// Further arguments of `hermes node`.
    #[arg(last = true, value_name = "NODE ARGUMENTS")]
    node: Vec<OsString>,
}

/// Runs the keeper. Not async, and before any runtime: it forks, so it has one thread.
pub(crate) fn run(args: KeeperArgs) -> anyhow::Result<ExitCode> {
    if !rustix::process::geteuid().is_root() {
        return Err(failure(FailureClass::Denied, "a node needs root to mount; run its keeper with sudo"));
    }
    let state: PathBuf = std::path::absolute(&args.state.state)?;
    hermes_snapshotter::node::private_folder(&state).map_err(|error| {
        failure(FailureClass::Local, format!("cannot make the state folder {}: {error}", state.display()))
    })?;
    let mut arguments: Vec<OsString> = vec!["node".into(), "--state".into(), state.clone().into()];
    arguments.extend(args.node);
    let program = std::env::current_exe()?;
    let deadline = Duration::from_millis(args.deadline_ms);
    let ended = keeper::run(KeeperConfig { state, deadline, program, arguments });
    ended.map(ExitCode::from).map_err(|error| failure(FailureClass::Local, error.to_string()))
}
