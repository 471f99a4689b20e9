//! Runs scenarios and random worlds from the command line without building the rest of Hermes: for profiling, and for work
//! on the policy.
//!
//! ```text
//! cargo run --release -p hermes-simulations --example scenario -- start-1000 [SEED] [section.field=value ...]
//! cargo run --release -p hermes-simulations --example scenario -- check FIRST COUNT
//! cargo run --release -p hermes-simulations --example scenario -- check SEED [nodes=N ...]
//! ```

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use hermes_simulations::fuzz;
use hermes_simulations::scenario::{Scenario, shipped};
use hermes_simulations::shape::{FILE_LEN_MAX_BYTES, Shape};
use hermes_simulations::{run, synthetic_shape};

type Done = Result<(), Box<dyn std::error::Error>>;

fn main() -> Done {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_else(|| "start-100".to_owned());
    let (changes, numbers): (Vec<String>, Vec<String>) = arguments.partition(|argument| argument.contains('='));
    let numbers: Vec<u64> = numbers.iter().map(|number| number.parse()).collect::<Result<_, _>>()?;
    if name == "check" {
        let first = numbers.first().copied().unwrap_or(0);
        return match numbers.get(1) {
            Some(count) => check(first..first + count),
            None => show(first, &changes),
        };
    }
    scenario(&name, numbers.first().copied().unwrap_or(1), &changes)
}

/// Runs random worlds and prints what fails.
fn check(seeds: std::ops::Range<u64>) -> Done {
    let began = Instant::now();
    let (mut failures, count) = (0, seeds.end - seeds.start);
    for seed in seeds {
        if let Some(failure) = fuzz::check(seed, None)? {
            failures += 1;
            println!("{}\n  {}: {}", failure.replay(), failure.violation.kind, failure.violation.what);
        }
    }
    println!("{count} worlds, {failures} failed, {:.1} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// Runs one random world, with changes made to it, and shows it.
fn show(seed: u64, changes: &[String]) -> Done {
    let changes: Vec<fuzz::Change> = changes.iter().map(|change| change.parse()).collect::<Result<_, _>>()?;
    println!("{:#?}", fuzz::drawn(seed, &changes));
    let report = fuzz::check_one(seed, &changes, None)?;
    report.lines().into_iter().for_each(|(name, value)| println!("{name:20} {value}"));
    Ok(())
}

/// Runs a scenario of the binary, or of a file, and prints what came of it.
fn scenario(name: &str, seed: u64, changes: &[String]) -> Done {
    let text = match shipped(name) {
        Some(text) => text.to_owned(),
        None => std::fs::read_to_string(name)?,
    };
    let scenario = Arc::new(Scenario::parse(&text, changes)?);
    let shape = match &scenario.image.shape {
        Some(file) => {
            let path = Path::new(name).parent().unwrap_or(Path::new("")).join(file);
            if std::fs::metadata(&path)?.len() > FILE_LEN_MAX_BYTES {
                return Err(format!("{} is too long for a shape", path.display()).into());
            }
            Arc::new(Shape::parse(&std::fs::read(path)?)?)
        }
        None => synthetic_shape(&scenario, seed)?,
    };
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
