//! `hermes node install | uninstall | check`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use hermes_snapshotter::control::FailureClass;
use hermes_snapshotter::install::check::{self, Finding, Verdict};
use hermes_snapshotter::install::root::Root;
use hermes_snapshotter::install::uninstall::{Removal, uninstall};
use hermes_snapshotter::install::{self, InstallError, Report, Run, Settings};

use super::StateArgs;
use crate::output::{self, failure};

/// The commands that set a host up.
#[derive(Debug, Subcommand)]
pub(crate) enum SetupCommand {
    /// Make this host use Hermes: binary, service, containerd's configuration.
    Install(Box<InstallArgs>),
    /// Take back what install has done.
    Uninstall(UninstallArgs),
    /// Say whether everything is as install has left it. Changes nothing.
    Check(CheckArgs),
}

/// Which host, and how to ask its containerd.
#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    /// The folder where the host's root is mounted, as in a DaemonSet's pod.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
    /// The containerd program to ask, as a path for this command; the host's own when absent.
    #[arg(long, value_name = "PATH")]
    pub(crate) containerd: Option<PathBuf>,
}

impl HostArgs {
    /// The host's root.
    pub(crate) fn open(&self) -> anyhow::Result<Root> {
        let opened = Root::new(&self.root);
        opened.map_err(|error| failure(FailureClass::Usage, format!("--root {}: {error}", self.root.display())))
    }
}

/// Arguments of `hermes node install`.
#[derive(Debug, Args)]
pub(crate) struct InstallArgs {
    #[command(flatten)]
    host: HostArgs,
    #[command(flatten)]
    state: StateArgs,
    /// containerd's configuration.
    #[arg(long, value_name = "PATH", default_value = install::CONTAINERD_CONFIG)]
    containerd_config: PathBuf,
    /// The socket on which containerd finds the daemon.
    #[arg(long, value_name = "PATH", default_value = install::SNAPSHOTTER_SOCKET)]
    socket: PathBuf,
    /// Where the binary goes.
    #[arg(long, value_name = "PATH", default_value = install::BINARY)]
    binary: PathBuf,
    /// Have Kubernetes use Hermes for every image. This is the default.
    #[arg(long, overrides_with = "no_set_default")]
    set_default: bool,
    /// Have Kubernetes use Hermes only for runtimes whose `snapshotter` is hermes.
    #[arg(long, overrides_with = "set_default")]
    no_set_default: bool,
    /// Something that the snapshotter can do, in containerd's words. May be given more than once; what it can do on this
    /// kernel when absent.
    #[arg(long = "capability", value_name = "NAME")]
    capabilities: Vec<String>,
    /// Install no systemd unit; something else runs the daemon, through `hermes keeper`.
    #[arg(long)]
    no_systemd: bool,
    /// Do not start the service now.
    #[arg(long)]
    no_start: bool,
    /// Restart containerd, so that it reads its configuration now. Containers keep running.
    #[arg(long)]
    restart_containerd: bool,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
    /// Arguments for the daemon, such as --listen, after two hyphens.
    #[arg(last = true, value_name = "NODE ARGUMENT")]
    node_arguments: Vec<String>,
}

/// Arguments of `hermes node uninstall`.
#[derive(Debug, Args)]
pub(crate) struct UninstallArgs {
    /// The folder where the host's root is mounted, as in a DaemonSet's pod.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    #[command(flatten)]
    state: StateArgs,
    /// Stop containerd from using Hermes, and wait this long for containers that still do. Without it, nothing is done
    /// while there are any.
    #[arg(long, value_name = "SECONDS")]
    drain: Option<u64>,
    /// Remove the store as well, with everything that was fetched.
    #[arg(long)]
    purge: bool,
    /// Restart containerd, so that it reads its configuration now. Containers keep running.
    #[arg(long)]
    restart_containerd: bool,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `hermes node check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs one of them.
pub(crate) async fn run(command: SetupCommand) -> anyhow::Result<()> {
    match command {
        SetupCommand::Install(args) => install(*args).await,
        SetupCommand::Uninstall(args) => remove(args).await,
        SetupCommand::Check(args) => check(args).await,
    }
}

async fn install(args: InstallArgs) -> anyhow::Result<()> {
    check_node_arguments(&args.node_arguments)?;
    let settings = Settings {
        containerd_config: args.containerd_config,
        binary: args.binary,
        state: args.state.state,
        socket: args.socket,
        cri_default: args.set_default || !args.no_set_default,
        capabilities: args.capabilities,
        systemd: !args.no_systemd,
        node_arguments: args.node_arguments,
    };
    let this = Run {
        root: args.host.open()?,
        containerd: args.host.containerd,
        source: std::env::current_exe().context("find this program's own file")?,
        start: !args.no_start,
        restart_containerd: args.restart_containerd,
    };
    show(&install::install(&settings, &this).await.map_err(classed)?, args.json)
}

/// A daemon that does not start for a misspelt option would be found out too late.
pub(crate) fn check_node_arguments(arguments: &[String]) -> anyhow::Result<()> {
    use clap::Parser as _;
    let line = ["hermes", "node"].into_iter().map(str::to_owned).chain(arguments.iter().cloned());
    let wrong = |reason: String| {
        let first = reason.lines().next().unwrap_or_default().to_owned();
        failure(FailureClass::Usage, format!("the daemon's arguments: {first}"))
    };
    match super::Cli::try_parse_from(line) {
        Ok(cli) if cli.is_daemon() => Ok(()),
        Ok(_) => Err(wrong("give options of `hermes node` only".to_owned())),
        Err(error) => Err(wrong(error.to_string())),
    }
}

async fn remove(args: UninstallArgs) -> anyhow::Result<()> {
    let this = Removal {
        root: HostArgs { root: args.root, containerd: None }.open()?,
        state: args.state.state,
        drain: args.drain.map(Duration::from_secs),
        purge: args.purge,
        restart_containerd: args.restart_containerd,
    };
    show(&uninstall(&this).await.map_err(classed)?, args.json)
}

async fn check(args: CheckArgs) -> anyhow::Result<()> {
    let root = args.host.open()?;
    let findings = check::check(&root, args.host.containerd).await.map_err(classed)?;
    show_findings(&findings, args.json)?;
    conclude(&findings, "this host is not as install leaves it")
}

fn classed(error: InstallError) -> anyhow::Error {
    failure(error.class(), error.to_string())
}

pub(crate) fn show(report: &Report, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
        return Ok(());
    }
    if report.done.is_empty() {
        println!("nothing to change");
    }
    report.done.iter().for_each(|line| println!("{line}"));
    report.notes.iter().for_each(|line| println!("note: {line}"));
    report.next.iter().for_each(|line| println!("next: {line}"));
    Ok(())
}

/// Prints findings as a table or as JSON.
pub(crate) fn show_findings(findings: &[Finding], json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(findings)?);
        return Ok(());
    }
    let verdict = |finding: &Finding| match finding.verdict {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "FAIL",
    };
    let row = |finding: &Finding| {
        vec![finding.what.to_owned(), verdict(finding).to_owned(), finding.seen.clone(), finding.next.clone()]
    };
    println!("{}", output::table(&["what", "", "seen", "next step"], findings.iter().map(row).collect()));
    Ok(())
}

/// Success, unless something failed.
pub(crate) fn conclude(findings: &[Finding], what: &str) -> anyhow::Result<()> {
    let failed = findings.iter().filter(|finding| finding.verdict == Verdict::Fail).count();
    match failed {
        0 => Ok(()),
        count => Err(failure(FailureClass::Local, format!("{what}: {count} of {} checks failed", findings.len()))),
    }
}

/// An absolute form of the state folder for commands that run on this host itself.
pub(crate) fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot find {}", path.display()))
}
