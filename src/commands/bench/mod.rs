//! `hermes bench`: this build, on this machine, against a peer or a limit in the same run.
//!
//! Every line is a ratio of two things measured in one run, because these figures are read on shared and noisy
//! machines. Nothing is asserted: tests do not measure time.

mod builds;
mod cgroup;
mod controller;
mod files;
mod full;
mod index;
mod memory_cgroup;
mod read;
mod recorder;
mod report;
mod stage;
mod start;
mod swarm;
mod tools;
mod workload;

use clap::Subcommand;

/// Commands of `hermes bench`.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Building an index, against plain inflate and `gzip -dc`.
    Index(index::IndexArgs),
    /// Reading a cold file from a fast registry, against plain ranged HTTP and inflate.
    Read(read::ReadArgs),
    /// Reading present files in each way a tree can be shown, against ext4 on the same disk.
    Fs(files::FilesArgs),
    /// What a container's control group is charged for reading a lazily shown file, against overlayfs on ext4.
    Cgroup(cgroup::CgroupArgs),
    /// What recording a start costs reads of present chunks, against the same reads without it.
    Recorder(recorder::RecorderArgs),
    /// How long real programs take from the pull to their first answer, in every way to start them; the benchmark that tells the truth.
    Start(start::StartArgs),
    /// All of an image from a fast registry, against inflate on all cores and containerd's pull.
    Full(full::FullArgs),
    /// What moving chunks between nodes and being in a swarm costs, against raw TCP.
    Swarm(swarm::SwarmArgs),
    /// A controller's builds on one core: an image of a gigabyte, and several at once.
    Builds(builds::BuildsArgs),
    /// One controller and the streams of a large cluster: how long until every node knows, and what that takes.
    Controller(controller::ControllerArgs),
    /// The status page of a large cluster in a real browser: when it is painted, and whether it moves.
    Page(controller::page::PageArgs),
}

/// Runs a benchmark.
pub(crate) async fn run(command: BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Index(args) => index::run(args).await,
        BenchCommand::Read(args) => read::run(args).await,
        BenchCommand::Fs(args) => files::run(args).await,
        BenchCommand::Cgroup(args) => cgroup::run(args).await,
        BenchCommand::Recorder(args) => recorder::run(args).await,
        BenchCommand::Start(args) => start::run(args).await,
        BenchCommand::Full(args) => full::run(args).await,
        BenchCommand::Swarm(args) => swarm::run(args).await,
        BenchCommand::Builds(args) => builds::run(args).await,
        BenchCommand::Controller(args) => controller::run(args).await,
        BenchCommand::Page(args) => controller::page::run(args).await,
    }
}
