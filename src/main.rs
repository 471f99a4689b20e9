//! The `hermes` command: arguments, telemetry, dispatch, exit code.

mod commands;
mod output;

use std::process::ExitCode;

use clap::Parser;

use crate::commands::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    output::start_logging(cli.verbosity());
    // More than one TLS library could be linked one day; say which is ours before anybody asks.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match commands::run(cli) {
        Ok(code) => code,
        Err(error) => output::report(&error),
    }
}
