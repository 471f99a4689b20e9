//! `hermes simulate replay`: a record of `hermes node --record-decisions`, decided again.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use clap::Args;
use hermes_simulations::replay::{Difference, ReplayError, Replayed, replay};
use hermes_simulations::units::show_nanos;
use hermes_snapshotter::control::FailureClass;

use crate::output::failure;

/// Arguments of `hermes simulate replay`.
#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// What `hermes node --record-decisions` has written.
    #[arg(value_name = "RECORD")]
    record: PathBuf,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command. Another decision than the node's is a failure, after the answer.
pub(super) fn run(args: &ReplayArgs) -> anyhow::Result<()> {
    let path = args.record.display();
    let unreadable = |error: std::io::Error| failure(FailureClass::NotFound, format!("{path}: {error}"));
    let reader = BufReader::new(File::open(&args.record).map_err(unreadable)?);
    let replayed = replay(reader).map_err(|error| {
        let class = match &error {
            ReplayError::Read { .. } => FailureClass::Local,
            ReplayError::Format(_) => FailureClass::Usage,
            ReplayError::Line { .. } | ReplayError::Backwards { .. } => FailureClass::Corrupt,
        };
        failure(class, format!("{path}: {:#}", anyhow::Error::new(error)))
    })?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&replayed)?);
    } else {
        println!("{}", told(&replayed));
    }
    match &replayed.difference {
        None => Ok(()),
        Some(difference) => {
            anyhow::bail!("{path}, line {}: this version decides something else than the node did", difference.line)
        }
    }
}

fn told(replayed: &Replayed) -> String {
    let requests: Vec<String> = replayed.requests.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let waits = &replayed.waits;
    let mut rows = vec![
        ("written by", format!("hermes {}", replayed.version)),
        ("facts", format!("{} in {}", replayed.facts, show_nanos(replayed.span_ns))),
        ("requests", requests.join(", ")),
        (
            "demand reads",
            format!(
                "{} waited, p50 {}, p99 {}, longest {}; {} failed",
                waits.count,
                show_nanos(waits.p50_ns),
                show_nanos(waits.p99_ns),
                show_nanos(waits.max_ns),
                replayed.failed
            ),
        ),
        ("trace", replayed.trace.clone()),
    ];
    if replayed.breaks_off {
        rows.push(("end", "within a line: the daemon was killed, or runs on".to_owned()));
    }
    match &replayed.difference {
        None => rows.push(("decisions", "all as the node made them".to_owned())),
        Some(Difference { entry, now, .. }) => {
            rows.push(("told", format!("{:?}", entry.event)));
            rows.push(("asked for then", format!("{:?}", entry.actions)));
            rows.push(("and now", format!("{now:?}")));
        }
    }
    rows.iter().map(|(name, value)| format!("{name:18} {value}")).collect::<Vec<_>>().join("\n")
}
