//! `hermes simulate check`: random small worlds on all cores.

use clap::Args;
use hermes_simulations::fuzz::{self, Change};

use super::{bar, lines, usage, verdict};

/// Arguments of `hermes simulate check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Number of worlds.
    #[arg(long, default_value_t = 200, value_name = "COUNT")]
    seeds: u64,
    /// The seed of the first world.
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    from: u64,
    /// Go on after a failure.
    #[arg(long)]
    keep_going: bool,
    /// Run the world of this seed alone and print its figures, and what was read from the registry more than once or in
    /// vain: how a failure is replayed.
    #[arg(long, conflicts_with_all = ["seeds", "from", "keep_going"])]
    seed: Option<u64>,
    /// Change what the seed draws, as a failure says: nodes=N, chunks=N, faults=BITS, zones=1, workload=flash-crowd,
    /// registry=PERCENT.
    #[arg(long = "set", value_name = "CHANGE", requires = "seed")]
    changes: Vec<Change>,
    /// Print the drawn world too.
    #[arg(long, requires = "seed")]
    world: bool,
}

/// Runs the command.
pub(super) fn run(args: &CheckArgs) -> anyhow::Result<()> {
    match args.seed {
        Some(seed) => replay(seed, args),
        None => check(args),
    }
}

fn replay(seed: u64, args: &CheckArgs) -> anyhow::Result<()> {
    if args.world {
        println!("{:#?}", fuzz::drawn(seed, &args.changes));
    }
    let report = fuzz::check_one(seed, &args.changes, None).map_err(usage)?;
    println!("{}\n{}", report.scenario, lines(&report, Vec::new()));
    report.excess_lines().iter().for_each(|line| println!("{line}"));
    verdict(&report)
}

fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let end =
        args.from.checked_add(args.seeds).ok_or_else(|| usage("--from and --seeds: the last seed is above 2^64"))?;
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let bar = bar("{bar:30} {pos}/{len} worlds, {msg}{elapsed}");
    bar.set_length(args.seeds);
    let failures = fuzz::check_all(args.from..end, threads, args.keep_going, |failure| {
        if failure.is_some() {
            bar.set_message("not all held, ");
        }
        bar.inc(1);
    })?;
    bar.finish_and_clear();
    failures.iter().for_each(|failure| println!("{failure}"));
    match failures.first() {
        None => println!("{} worlds, nothing violated", args.seeds),
        Some(first) => {
            anyhow::bail!("worlds that did not hold: {}, the first with seed {}", failures.len(), first.seed)
        }
    }
    Ok(())
}
