//! `hermes bench`: this build, on this machine, against a peer or a limit in the same run.
//!
//! Every line is a ratio of two things measured in one run, because these figures are read on shared and noisy
//! machines. Nothing is asserted: tests do not measure time.

mod cgroup;
mod files;
mod index;
mod memory_cgroup;
mod read;
mod recorder;
mod report;
mod stage;
mod swarm;
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
    /// What moving chunks between nodes and being in a swarm costs, against raw TCP.
    Swarm(swarm::SwarmArgs),
}

/// Runs a benchmark.
pub(crate) async fn run(command: BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Index(args) => index::run(args).await,
        BenchCommand::Read(args) => read::run(args).await,
        BenchCommand::Fs(args) => files::run(args).await,
        BenchCommand::Cgroup(args) => cgroup::run(args).await,
        BenchCommand::Recorder(args) => recorder::run(args).await,
        BenchCommand::Swarm(args) => swarm::run(args).await,
    }
}
