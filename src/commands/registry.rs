//! `hermes registry`.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use hermes_registry::{Auth, Login, Options, Registry};
use hermes_snapshotter::control::FailureClass;
use tokio::net::TcpListener;

use crate::output::{self, failure};

/// How long a token of the embedded registry is valid: what Docker Hub gives.
const TOKEN_LIFETIME: Duration = Duration::from_secs(300);

/// Commands of `hermes registry`.
#[derive(Debug, Subcommand)]
pub(crate) enum RegistryCommand {
    /// Serve an OCI layout, or a folder of layouts, until interrupted.
    Serve(ServeArgs),
}

/// Arguments of `hermes registry serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// An OCI layout (served under any name), or a folder of layouts (each served under its own).
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Where to listen.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:5000")]
    listen: SocketAddr,
    /// Emulate a link of so many megabits per second, shared by all clients.
    #[arg(long, value_name = "MBIT")]
    bandwidth_mbit: Option<NonZeroU64>,
    /// Emulate a round trip of so many milliseconds, on each connection and each request.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    latency_ms: u64,
    /// Ask for this login before giving tokens.
    #[arg(long, value_name = "USER:PASSWORD", env = "HERMES_REGISTRY_LOGIN", hide_env_values = true)]
    login: Option<String>,
}

/// Runs a command.
pub(crate) async fn run(command: RegistryCommand) -> anyhow::Result<()> {
    let RegistryCommand::Serve(args) = command;
    let auth = match &args.login {
        None => Auth::Open,
        Some(login) => {
            let (user, password) =
                login.split_once(':').ok_or_else(|| failure(FailureClass::Usage, "--login wants USER:PASSWORD"))?;
            let login = Login { user: user.to_owned(), password: password.to_owned() };
            Auth::Token { login: Some(login), lifetime: TOKEN_LIFETIME }
        }
    };
    let options = Options {
        auth,
        bandwidth_bits_per_second: args.bandwidth_mbit.map(|mbit| mbit.saturating_mul(MEGA)),
        latency: Duration::from_millis(args.latency_ms),
    };
    let registry =
        Registry::open(&args.path, options).map_err(|error| failure(FailureClass::NotFound, error.to_string()))?;
    let listener = TcpListener::bind(args.listen)
        .await
        .map_err(|error| failure(FailureClass::Local, format!("cannot listen on {}: {error}", args.listen)))?;
    let address = listener.local_addr().context("the listener has no address")?;
    println!("serving {} at http://{address}", args.path.display());
    for name in registry.repositories() {
        println!("  {address}/{name}");
    }
    registry
        .serve(listener, async {
            let _ = tokio::signal::ctrl_c().await;
        })
        .await;
    let counters = registry.counters();
    println!(
        "served {} of blobs in {} requests, {} manifests",
        output::bytes(counters.blob_bytes),
        counters.blob_requests,
        counters.manifest_requests
    );
    Ok(())
}

const MEGA: NonZeroU64 = NonZeroU64::new(1_000_000).expect("not zero");
