//! `hermes simulate`: the production policy in a made-up world with virtual time.

mod check;

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use hermes_simulations::open::{OpenError, open};
use hermes_simulations::report::Report;
use hermes_simulations::scenario::{SHIPPED, Scenario, shipped};
use hermes_simulations::units::show_nanos;
use hermes_simulations::world::Progress;
use hermes_snapshotter::control::FailureClass;
use indicatif::{ProgressBar, ProgressStyle};

use crate::output::{self, failure};

/// How often the progress line is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(100);

/// Commands of `hermes simulate`.
#[derive(Debug, Subcommand)]
pub(crate) enum SimulateCommand {
    /// List the scenarios that come with this binary, or print one.
    List(ListArgs),
    /// Run a scenario and say what came of it.
    Run(RunArgs),
    /// Run a scenario once for each value of a field, and compare.
    Sweep(SweepArgs),
    /// Run random small worlds with faults, and make the ones that fail smaller.
    Check(check::CheckArgs),
}

/// Arguments of `hermes simulate list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Print the text of this scenario, to begin one's own with.
    #[arg(value_name = "SCENARIO")]
    scenario: Option<String>,
}

/// Which scenario, and what is changed in it.
#[derive(Debug, Clone, Args)]
pub(crate) struct ScenarioArgs {
    /// The name of a scenario (see `hermes simulate list`), or a TOML file.
    #[arg(value_name = "SCENARIO")]
    scenario: String,
    /// The seed: the same one gives the same run, on every machine.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Change a field, as in `--set cluster.nodes=500`. May be given more than once.
    #[arg(long = "set", value_name = "FIELD=VALUE")]
    changes: Vec<String>,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `hermes simulate run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    scenario: ScenarioArgs,
    /// Say too what was read from the registry more than once or in vain: by whom, when, and why. JSON always has it.
    #[arg(long)]
    excess: bool,
}

/// Arguments of `hermes simulate sweep`.
#[derive(Debug, Args)]
pub(crate) struct SweepArgs {
    #[command(flatten)]
    scenario: ScenarioArgs,
    /// The field and its values, as in `cluster.nodes=100,200,400`.
    #[arg(value_name = "FIELD=A,B,C")]
    values: String,
}

/// Runs a command.
pub(crate) async fn run(command: SimulateCommand) -> anyhow::Result<()> {
    // A simulation computes for minutes: on a thread that may be blocked.
    let done = tokio::task::spawn_blocking(move || match command {
        SimulateCommand::List(args) => list(&args),
        SimulateCommand::Run(args) => run_one(&args),
        SimulateCommand::Sweep(args) => sweep(&args),
        SimulateCommand::Check(args) => check::run(&args),
    });
    done.await.context("the simulation broke off")?
}

/// What is wrong with the request, in one line.
fn usage(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> anyhow::Error {
    let message = format!("{:#}", anyhow::Error::from_boxed(error.into()));
    failure(FailureClass::Usage, message.trim().replace('\n', ", "))
}

fn list(args: &ListArgs) -> anyhow::Result<()> {
    if let Some(name) = &args.scenario {
        print!("{}", shipped(name).ok_or_else(|| usage(OpenError::Unknown(name.clone())))?);
        return Ok(());
    }
    let mut rows = Vec::with_capacity(SHIPPED.len());
    for (name, text) in SHIPPED {
        let scenario = Scenario::parse(text, &[]).with_context(|| format!("scenario {name}"))?;
        rows.push(vec![(*name).to_owned(), scenario.name]);
    }
    println!("{}", output::table(&["SCENARIO", "WHAT"], rows));
    Ok(())
}

/// A line of progress, on a terminal only.
fn bar(template: &str) -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(1) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

fn simulate(args: &ScenarioArgs, changes: &[String]) -> anyhow::Result<Report> {
    let (scenario, shape) = open(&args.scenario, changes, args.seed).map_err(usage)?;
    let bar = bar("{bar:30} {pos}/{len} ready, {msg}{elapsed} real");
    let mut drawn = Instant::now();
    let show = |progress: Progress| {
        if drawn.elapsed() >= DRAW_EVERY {
            drawn = Instant::now();
            bar.set_length(progress.starts.into());
            bar.set_message(format!("{} virtual, ", show_nanos(progress.now)));
            bar.set_position(progress.ready.into());
        }
    };
    let report = hermes_simulations::run(scenario, shape, args.seed, show);
    bar.finish_and_clear();
    Ok(report)
}

/// A violation is a failure of the command, after the answer.
fn verdict(report: &Report) -> anyhow::Result<()> {
    match &report.violation {
        None => Ok(()),
        Some(violation) => Err(anyhow::anyhow!("{}: {}", violation.kind, violation.what)),
    }
}

/// A report for people, with more lines at its end.
fn lines(report: &Report, more: Vec<(&'static str, String)>) -> String {
    let lines = report.lines().into_iter().chain(more);
    lines.map(|(name, value)| format!("{name:18} {value}")).collect::<Vec<_>>().join("\n")
}

/// What the run took of this machine; the most memory that this process ever held.
fn cost(began: Instant) -> Vec<(&'static str, String)> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("unknown");
    vec![("real time", format!("{:.1} s", began.elapsed().as_secs_f64())), ("memory at most", peak.trim().to_owned())]
}

fn run_one(args: &RunArgs) -> anyhow::Result<()> {
    let began = Instant::now();
    let report = simulate(&args.scenario, &args.scenario.changes)?;
    if args.scenario.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return verdict(&report);
    }
    println!("{} (seed {})\n{}", report.scenario, report.seed, lines(&report, cost(began)));
    if args.excess {
        report.excess_lines().iter().for_each(|line| println!("{line}"));
    }
    verdict(&report)
}

fn sweep(args: &SweepArgs) -> anyhow::Result<()> {
    let values = args.values.split_once('=').filter(|(_, values)| !values.trim().is_empty());
    let (field, values) =
        values.ok_or_else(|| usage(format!("{:?} names no values; write FIELD=A,B,C", args.values)))?;
    let (mut rows, mut reports) = (Vec::new(), Vec::new());
    for value in values.split(',').map(str::trim) {
        let mut changes = args.scenario.changes.clone();
        changes.push(format!("{field}={value}"));
        let report = simulate(&args.scenario, &changes)?;
        rows.push(vec![
            value.to_owned(),
            format!("{}/{}", report.ready, report.starts),
            show_nanos(report.finished_ns),
            show_nanos(report.bound_ns),
            show_nanos(report.ready_after.p99_ns),
            output::bytes(report.registry_bytes),
            output::percent(report.registry_bytes, report.needed_bytes),
            show_nanos(report.waits.p99_ns),
            report.violation.as_ref().map_or("", |violation| violation.kind).to_owned(),
        ]);
        reports.push((value.to_owned(), report));
    }
    if args.scenario.json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    } else {
        let header =
            [field, "READY", "LAST READY", "BOUND", "START P99", "REGISTRY", "OF UNIQUE", "WAIT P99", "VIOLATION"];
        println!("{}", output::table(&header, rows));
    }
    reports.iter().try_for_each(|(_, report)| verdict(report))
}
