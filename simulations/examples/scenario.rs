//! Runs scenarios and random worlds from the command line without building the rest of Hermes: for profiling, and for work
//! on the policy.
//!
//! ```text
//! cargo run --release -p hermes-simulations --example scenario -- start-1000 [SEED] [section.field=value ...]
//! cargo run --release -p hermes-simulations --example scenario -- check FIRST COUNT    (one alone is shown)
//! ```

use std::sync::Arc;
use std::time::Instant;

use hermes_simulations::fuzz;
use hermes_simulations::scenario::{Scenario, shipped};
use hermes_simulations::{run, synthetic_shape};

type Done = Result<(), Box<dyn std::error::Error>>;

fn main() -> Done {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_else(|| "start-100".to_owned());
    let (changes, numbers): (Vec<String>, Vec<String>) = arguments.partition(|argument| argument.contains('='));
    let numbers: Vec<u64> = numbers.iter().map(|number| number.parse()).collect::<Result<_, _>>()?;
    if name == "check" {
        let first = numbers.first().copied().unwrap_or(0);
        return check(first..first + numbers.get(1).copied().unwrap_or(200));
    }
    scenario(&name, numbers.first().copied().unwrap_or(1), &changes)
}

/// Runs random worlds and prints what fails.
fn check(seeds: std::ops::Range<u64>) -> Done {
    let began = Instant::now();
    let (mut failures, count) = (0, seeds.end - seeds.start);
    if count == 1 {
        println!("{:#?}", fuzz::drawn(seeds.start, &[]));
        let report = fuzz::check_one(seeds.start, &[], None)?;
        report.lines().into_iter().for_each(|(name, value)| println!("{name:20} {value}"));
    }
    for seed in seeds {
        if let Some(failure) = fuzz::check(seed, None)? {
            failures += 1;
            println!("{}\n  {}: {}", failure.replay(), failure.violation.kind, failure.violation.what);
        }
    }
    println!("{count} worlds, {failures} failed, {:.1} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// Runs a scenario of the binary, or of a file, and prints what came of it.
fn scenario(name: &str, seed: u64, changes: &[String]) -> Done {
    let text = match shipped(name) {
        Some(text) => text.to_owned(),
        None => std::fs::read_to_string(name)?,
    };
    let scenario = Arc::new(Scenario::parse(&text, changes)?);
    let shape = synthetic_shape(&scenario, seed)?;
    let began = Instant::now();
    let report = run(scenario, shape, seed, |progress| {
        if progress.happened.is_multiple_of(1 << 20) {
            eprintln!("{} ms: {} of {} ready", progress.now / 1_000_000, progress.ready, progress.starts);
        }
    });
    for (name, value) in report.lines() {
        println!("{name:20} {value}");
    }
    println!("{:20} {:.1} s", "real time", began.elapsed().as_secs_f64());
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    println!("{:20} {}", "memory at most", peak.trim());
    Ok(())
}
