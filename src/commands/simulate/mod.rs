//! `hermes simulate`: the production policy in a made-up world with virtual time.

mod check;
mod replay;

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use hermes_simulations::html;
use hermes_simulations::library::{SCENARIOS, SHAPES, text};
use hermes_simulations::open::{OpenError, open};
use hermes_simulations::report::Report;
use hermes_simulations::scenario::Scenario;
use hermes_simulations::shape::Shape;
use hermes_simulations::strategy::{Strategy, model};
use hermes_simulations::units::show_nanos;
use hermes_simulations::world::Progress;
use hermes_snapshotter::control::FailureClass;
use indicatif::{ProgressBar, ProgressStyle};

use crate::output::{self, failure};

/// Nodes from which on a run takes hundreds of megabytes.
const LARGE_NODES: u32 = 500;

/// How often the progress line is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(100);

/// Commands of `hermes simulate`.
#[derive(Debug, Subcommand)]
pub(crate) enum SimulateCommand {
    /// List the scenarios and the images that come with this binary, or print a scenario.
    List(ListArgs),
    /// Run a scenario and say what came of it.
    Run(RunArgs),
    /// Run a scenario under several strategies: Hermes, Hermes without some of its parts, and models of other systems.
    Compare(CompareArgs),
    /// Run a scenario once for each value of a field, and compare.
    Sweep(SweepArgs),
    /// Run random small worlds with faults, and make the ones that fail smaller.
    Check(check::CheckArgs),
    /// Decide again what a real node has decided, and say where this version decides something else.
    Replay(replay::ReplayArgs),
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

/// Where a report is written to, beside what is printed.
#[derive(Debug, Clone, Args)]
pub(crate) struct ReportArgs {
    /// Write the report as a page that stands alone.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the figures over time as CSV.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

impl ReportArgs {
    fn write(&self, reports: &[Report]) -> anyhow::Result<()> {
        let files = [(&self.html, html::page as fn(&[Report]) -> String), (&self.csv, html::csv)];
        for (file, make) in files {
            if let Some(file) = file {
                std::fs::write(file, make(reports)).with_context(|| format!("{} cannot be written", file.display()))?;
            }
        }
        Ok(())
    }
}

/// Arguments of `hermes simulate compare`.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    scenario: ScenarioArgs,
    #[command(flatten)]
    report: ReportArgs,
    /// The strategies, as in `hermes,hermes-no-owners,spegel`; `all` for all of them. Hermes and the other systems when absent.
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    strategies: Vec<String>,
    /// Print the models' parameters and sources as well.
    #[arg(long)]
    models: bool,
}

/// Arguments of `hermes simulate run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    scenario: ScenarioArgs,
    #[command(flatten)]
    report: ReportArgs,
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
        SimulateCommand::Compare(args) => compare(&args),
        SimulateCommand::Sweep(args) => sweep(&args),
        SimulateCommand::Check(args) => check::run(&args),
        SimulateCommand::Replay(args) => replay::run(&args),
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
        print!("{}", text(SCENARIOS, name).ok_or_else(|| usage(OpenError::Unknown(name.clone())))?);
        return Ok(());
    }
    let mut rows = Vec::with_capacity(SCENARIOS.len());
    for (name, text) in SCENARIOS {
        let scenario = Scenario::parse(text, &[]).with_context(|| format!("scenario {name}"))?;
        rows.push(vec![(*name).to_owned(), scenario.name]);
    }
    println!("{}\n", output::table(&["SCENARIO", "WHAT"], rows));
    let mut images = Vec::with_capacity(SHAPES.len());
    for (name, file) in SHAPES {
        let shape = Shape::parse(file.as_bytes()).with_context(|| format!("image {name}"))?;
        let (chunks, start) = (shape.chunk_count(), shape.start_size().1);
        images.push(vec![(*name).to_owned(), chunks.to_string(), output::bytes(start), shape.name]);
    }
    println!("{}", output::table(&["IMAGE.SHAPE", "CHUNKS", "A START READS", "WHAT"], images));
    Ok(())
}

/// A line of progress, on a terminal only.
fn bar(template: &str) -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(1) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// Draws how far a run is, now and then.
fn drawing(bar: &ProgressBar) -> impl FnMut(&str, Progress) {
    let mut drawn = Instant::now();
    move |what, progress| {
        if drawn.elapsed() >= DRAW_EVERY {
            drawn = Instant::now();
            bar.set_length(progress.starts.into());
            bar.set_message(format!("{what}{} virtual, ", show_nanos(progress.now)));
            bar.set_position(progress.ready.into());
        }
    }
}

/// The line of progress of a run.
const RUN_BAR: &str = "{bar:30} {pos}/{len} ready, {msg}{elapsed} real";

/// What is to be simulated.
type World = (Arc<Scenario>, Arc<Shape>);

/// Opens a scenario with changes. For a large cluster the command begins anew, once, with memory in huge pages: each event touches a
/// little of another node, so that with pages of 4 KiB a fifth of the time goes into finding them (1,000 nodes: 81 s rather than 103).
/// The allocator can be told so only before a process begins.
fn opened(args: &ScenarioArgs, changes: &[String]) -> anyhow::Result<World> {
    const TUNABLES: &str = "GLIBC_TUNABLES";
    let (scenario, shape) = open(&args.scenario, changes, args.seed).map_err(usage)?;
    if scenario.cluster.nodes >= LARGE_NODES
        && std::env::var_os(TUNABLES).is_none()
        && let Ok(program) = std::env::current_exe()
    {
        let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
        let error = Command::new(program).args(arguments).env(TUNABLES, "glibc.malloc.hugetlb=1").exec();
        tracing::debug!(%error, "runs without huge pages");
    }
    Ok((scenario, shape))
}

fn simulate((scenario, shape): World, seed: u64) -> Report {
    let bar = bar(RUN_BAR);
    let mut draw = drawing(&bar);
    let report = hermes_simulations::run(scenario, shape, seed, |progress| draw("", progress));
    bar.finish_and_clear();
    report
}

fn compare(args: &CompareArgs) -> anyhow::Result<()> {
    let strategies = match args.strategies.as_slice() {
        [] => Strategy::SYSTEMS.to_vec(),
        [all] if all == "all" => Strategy::ALL.to_vec(),
        names => names.iter().map(|name| name.parse()).collect::<Result<Vec<Strategy>, _>>().map_err(usage)?,
    };
    let ScenarioArgs { seed, changes, json, .. } = &args.scenario;
    let (scenario, shape) = opened(&args.scenario, changes)?;
    let bar = bar(RUN_BAR);
    let mut draw = drawing(&bar);
    let tell = |strategy: Strategy, progress| draw(&format!("{strategy}, "), progress);
    let reports = hermes_simulations::compare::compare(&scenario, &shape, *seed, &strategies, tell);
    bar.finish_and_clear();
    args.report.write(&reports)?;
    if *json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    } else {
        println!("{} (seed {seed})", scenario.name);
        println!("{}", output::table(&html::COLUMNS, reports.iter().map(html::row).collect()));
    }
    if args.models {
        println!("\n{}", model::table());
    }
    reports.iter().filter(|report| report.strategy == Strategy::Hermes.name()).try_for_each(verdict)
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
    let report = simulate(opened(&args.scenario, &args.scenario.changes)?, args.scenario.seed);
    args.report.write(std::slice::from_ref(&report))?;
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
    // A value that is none is said before the first run.
    let worlds: Vec<(&str, World)> = values
        .split(',')
        .map(str::trim)
        .map(|value| {
            let change = format!("{field}={value}");
            let changes: Vec<String> = args.scenario.changes.iter().cloned().chain([change]).collect();
            Ok((value, opened(&args.scenario, &changes)?))
        })
        .collect::<anyhow::Result<_>>()?;
    for (value, world) in worlds {
        let report = simulate(world, args.scenario.seed);
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

#[cfg(test)]
mod tests {
    use hermes_p2p::{DownloadLimits, UploadLimits};
    use hermes_policy::limits::Limits;
    use hermes_simulations::world::serve;

    #[test]
    fn simulated_nodes_serve_within_the_limits_of_real_ones() {
        let UploadLimits {
            transfers_max,
            prefetch_transfers_max,
            transfers_per_peer_max,
            claims_max,
            claims_per_peer_max,
            watchers_max,
            ..
        } = UploadLimits::default();
        let simulated = [
            serve::TRANSFERS_MAX,
            serve::PREFETCH_TRANSFERS_MAX,
            serve::TRANSFERS_PER_PEER_MAX,
            serve::CLAIMS_MAX,
            serve::CLAIMS_PER_PEER_MAX,
        ];
        let real = [transfers_max, prefetch_transfers_max, transfers_per_peer_max, claims_max, claims_per_peer_max];
        assert_eq!((simulated.map(|limit| limit as usize), serve::WATCHERS_MAX), (real, watchers_max));
    }

    #[test]
    fn policy_asks_for_as_much_at_once_as_the_exchange_has_streams_for_and_leaves_places_to_readers() {
        let (policy, download) = (Limits::default().peer, DownloadLimits::default());
        let prefetch = download.prefetch_streams_per_peer_max;
        assert_eq!((policy.asks - policy.reserved_for_demand) as usize, prefetch);
        assert!(prefetch < UploadLimits::default().transfers_per_peer_max);
    }
}
