//! The commands. Each file reads its arguments, asks the crates, and says what came of it.

mod bench;
mod child;
mod controller;
mod demo;
mod doctor;
mod guess;
mod index;
mod keeper;
mod members;
mod mount;
mod node;
mod probe;
mod profile;
mod registry;
mod setup;
mod simulate;
mod status;
mod trace;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Container images that start on cold nodes as if they were already there.
#[derive(Debug, Parser)]
#[command(name = "hermes", version, propagate_version = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Say more: once for what happens, twice for why, three times for every chunk.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

impl Cli {
    /// How often `-v` was given.
    pub(crate) fn verbosity(&self) -> u8 {
        self.verbose
    }

    /// Whether it runs the node's daemon.
    pub(crate) fn is_daemon(&self) -> bool {
        matches!(&self.command, Command::Node(args) if args.is_daemon())
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what Hermes does, on a real image, in a few minutes.
    Demo(demo::DemoArgs),
    /// Build, look into, and check the index of an image.
    #[command(subcommand)]
    Index(index::IndexCommand),
    /// Mount an image; its files are fetched when they are read.
    Mount(mount::MountArgs),
    /// Unmount what `hermes mount` has mounted.
    Unmount(mount::UnmountArgs),
    /// Fetch what is missing of a mounted image, so that it can be shown without a daemon.
    Complete(mount::CompleteArgs),
    /// Show images, what is present of them, where bytes came from, and who waits.
    Status(status::StatusArgs),
    /// Show who gave the chunks of a mounted image, when, and why they were asked; as a table and as a picture.
    Trace(trace::TraceArgs),
    /// Show, explain, export and import what starts of an image read.
    #[command(subcommand)]
    Profile(profile::ProfileCommand),
    /// Show who the members of the swarm are; take a member's certificates back; leave and join again.
    Members(members::MembersArgs),
    /// Change what the node's daemon logs, while it runs.
    LogLevel(status::LogLevelArgs),
    /// Say what is wrong with this node, and what to do about it.
    Doctor(doctor::DoctorArgs),
    /// Run the node's daemon in the foreground, or set this host up for it. `hermes mount` starts one by itself.
    Node(Box<node::NodeArgs>),
    /// Index the images that policies mean, before anybody pulls them. Without Kubernetes: policies are files of a folder.
    Controller(Box<controller::ControllerArgs>),
    /// Start the node's daemon and keep its mounts over its end: after a crash or an upgrade reads go on.
    Keeper(keeper::KeeperArgs),
    /// Serve images from a folder, for tests, demonstrations and air-gapped nodes.
    #[command(subcommand)]
    Registry(registry::RegistryCommand),
    /// Simulate clusters of up to tens of thousands of nodes: what a registry sees, and when the last pod answers.
    #[command(subcommand)]
    Simulate(simulate::SimulateCommand),
    /// Measure this build on this machine, against a peer or a limit in the same run.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

/// Where a node keeps its state; shared by the commands that talk to its daemon.
#[derive(Debug, Clone, Args)]
pub(crate) struct StateArgs {
    /// The folder with the node's store, keys and socket.
    #[arg(long, value_name = "DIR", env = "HERMES_STATE", default_value = "/var/lib/hermes")]
    pub(crate) state: PathBuf,
}

/// Which image, and how to reach it.
#[derive(Debug, Clone, Args)]
pub(crate) struct ImageArgs {
    /// A registry reference, such as registry.example/team/app:1.2, or oci:PATH[:TAG].
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    /// The platform, as os/architecture[/variant]; this machine's when absent.
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<String>,
    /// Speak plain HTTP to the registry. Registries on loopback are spoken to so anyway.
    #[arg(long)]
    pub(crate) plain_http: bool,
}

/// How long the end of the process waits for work on blocking threads.
const DRAIN_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// Runs the command.
pub(crate) fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let command = match cli.command {
        Command::Keeper(args) => return keeper::run(args),
        command => command,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("hermes").build()?;
    let result = runtime.block_on(async move {
        match command {
            Command::Demo(args) => demo::run(args).await,
            Command::Index(command) => index::run(command).await,
            Command::Mount(args) => mount::mount(args).await,
            Command::Unmount(args) => mount::unmount(args).await,
            Command::Complete(args) => mount::complete(args).await,
            Command::Status(args) => status::run(args).await,
            Command::Trace(args) => trace::run(args).await,
            Command::Profile(command) => profile::run(command).await,
            Command::Members(args) => members::run(args).await,
            Command::LogLevel(args) => status::log_level(args).await,
            Command::Doctor(args) => doctor::run(args).await,
            Command::Node(args) => node::run(*args).await,
            Command::Controller(args) => controller::run(*args).await,
            Command::Keeper(_) => unreachable!("it runs without a runtime"),
            Command::Registry(command) => registry::run(command).await,
            Command::Simulate(command) => simulate::run(command).await,
            Command::Bench(command) => bench::run(command).await,
        }
    });
    // What still runs on blocking threads uses the store, whose library must not be torn down under it: exiting at once
    // aborted now and then. Nothing there waits for the network, so this is a matter of milliseconds.
    runtime.shutdown_timeout(DRAIN_TIMEOUT);
    result.map(|()| ExitCode::SUCCESS)
}

/// Cancelled when this process is told to end, by SIGTERM or ctrl-c.
///
/// # Errors
///
/// When signals cannot be listened to.
fn ending() -> std::io::Result<CancellationToken> {
    let ending = CancellationToken::new();
    let (mut terminate, told) = (signal(SignalKind::terminate())?, ending.clone());
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        told.cancel();
    });
    Ok(ending)
}

/// `host:port`, or a port alone for loopback: the numbers are nobody else's business unless somebody says so.
pub(crate) fn metrics_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.trim_start_matches(':').parse::<u16>() {
        return Ok((Ipv4Addr::LOCALHOST, port).into());
    }
    text.parse().map_err(|_| "give IP:PORT, or a port on loopback".to_owned())
}
