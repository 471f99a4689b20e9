//! `hermes status`.

use clap::Args;
use hermes_snapshotter::control::{self, Answer, Request};
use hermes_snapshotter::status::{NodeStatus, WaitingRead};

use super::StateArgs;
use super::mount::expect_done;
use crate::output;

/// Arguments of `hermes status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    state: StateArgs,
    /// Show the reads that wait instead: of which file, for how long, and who is asked.
    #[arg(long)]
    waiting: bool,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `hermes log-level`.
#[derive(Debug, Args)]
pub(crate) struct LogLevelArgs {
    /// A level (error, warn, info, debug, trace), or a filter in the syntax of HERMES_LOG.
    #[arg(value_name = "LEVEL")]
    filter: String,
    #[command(flatten)]
    state: StateArgs,
}

/// Changes what the daemon logs from now on.
pub(crate) async fn log_level(args: LogLevelArgs) -> anyhow::Result<()> {
    let request = Request::LogLevel { filter: args.filter };
    expect_done(control::ask(&std::path::absolute(&args.state.state)?, &request, |_| ()).await)?;
    Ok(())
}

async fn waiting(args: &StatusArgs) -> anyhow::Result<()> {
    let state = std::path::absolute(&args.state.state)?;
    let answer = expect_done(control::ask(&state, &Request::Waiting, |_| ()).await)?;
    let Answer::Waiting { reads } = answer else { anyhow::bail!("the daemon answered something else: {answer:?}") };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&reads)?);
    } else {
        print!("{}", render_waiting(&reads));
    }
    Ok(())
}

fn render_waiting(reads: &[WaitingRead]) -> String {
    if reads.is_empty() {
        return "no read waits\n".to_owned();
    }
    let rows = reads.iter().map(|read| {
        let place = format!("layer {} at {}", read.layer, read.offset);
        vec![
            format!("{:.1} s", read.waiting_ms as f64 / 1000.0),
            if read.demand { "demand" } else { "prefetch" }.to_owned(),
            read.image.clone(),
            read.file.as_ref().map_or(place, |file| file.display().to_string()),
            output::bytes(read.missing_bytes),
            if read.asking.is_empty() { "nobody".to_owned() } else { read.asking.join(", ") },
        ]
    });
    format!("{}\n", output::table(&["for", "class", "image", "file", "missing", "asking"], rows.collect()))
}

/// Shows how things stand.
pub(crate) async fn run(args: StatusArgs) -> anyhow::Result<()> {
    if args.waiting {
        return waiting(&args).await;
    }
    let answer = expect_done(control::ask(&std::path::absolute(&args.state.state)?, &Request::Status, |_| ()).await)?;
    let Answer::Status(status) = answer else { anyhow::bail!("the daemon answered something else: {answer:?}") };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print!("{}", render(&status));
    }
    Ok(())
}

fn render(status: &NodeStatus) -> String {
    let mut out = String::new();
    let budget = status
        .store_budget_bytes
        .map_or_else(|| "no budget".to_owned(), |budget| format!("of {}", output::bytes(budget)));
    out += &format!(
        "hermes {} (pid {}), {} memory, store {} ({budget}), waiting reads: {} demand, {} prefetch\n",
        status.version,
        status.pid,
        output::bytes(status.memory_bytes),
        output::bytes(status.store_bytes),
        status.waiting.demand,
        status.waiting.prefetch
    );
    let ways = status.ways.iter().map(|way| {
        let mark = if way.available { "yes" } else { "no" };
        format!("{} {mark} ({})", way.way, way.detail)
    });
    out += &format!("ways to show a tree: {}\n", ways.collect::<Vec<_>>().join(", "));
    if let Some(peer_id) = &status.peer_id {
        out += &format!("peer {peer_id} at {}\n", status.listen.join(", "));
    }
    for pull in &status.pulls {
        let name = if pull.reference.is_empty() { pull.manifest.to_string() } else { pull.reference.clone() };
        out += &match &pull.reason {
            None => format!("containerd pulled {name}: {}\n", pull.decision),
            Some(reason) => format!("containerd pulled {name}: as ever ({}): {reason}\n", pull.decision),
        };
    }
    for pull in &status.first_pulls {
        let (done, total) = (output::bytes(pull.done_bytes), output::bytes(pull.total_bytes));
        out += &format!("taking the pull of {} and building its index: {done} of {total}\n", pull.reference);
    }
    if status.images.is_empty() {
        out += "\nno image is mounted\n";
    } else {
        let rows = status.images.iter().map(|image| {
            vec![
                image.reference.clone(),
                image.dir.clone(),
                image.way.to_string(),
                format!("{:.1} %", image.percent_present()),
                output::bytes(image.total_bytes),
                output::bytes(image.sources.local_bytes),
                output::bytes(image.sources.peer_bytes),
                output::bytes(image.sources.registry_bytes),
            ]
        });
        let header = ["image", "at", "way", "present", "size", "local", "peer", "registry"];
        out += &format!("\n{}\n", output::table(&header, rows.collect()));
    }
    if !status.peers.is_empty() {
        let peers: Vec<_> = status.peers.iter().map(|peer| peer.id.as_str()).collect();
        out += &format!("\nconnected peers: {}\n", peers.join(", "));
    }
    out
}
