//! `hermes doctor`.

use clap::Args;
use hermes_snapshotter::doctor::{Examination, Verdict, examine};

use super::StateArgs;
use super::setup::{HostArgs, absolute, conclude, show_findings};

/// Arguments of `hermes doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// An image whose registry is to be tried: reached, logged in to, read in ranges.
    #[arg(value_name = "IMAGE")]
    image: Option<String>,
    /// The image's platform, as os/architecture[/variant]; this machine's when absent.
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// Speak plain HTTP to the registry. Registries on loopback are spoken to so anyway.
    #[arg(long)]
    plain_http: bool,
    #[command(flatten)]
    state: StateArgs,
    #[command(flatten)]
    host: HostArgs,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Examines this node.
pub(crate) async fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let root = args.host.open()?;
    let state = match root.is_own() {
        true => absolute(&args.state.state)?,
        false => root.at(&args.state.state),
    };
    let findings = examine(&Examination {
        state,
        root,
        containerd: args.host.containerd,
        image: args.image,
        platform: args.platform,
        plain_http: args.plain_http,
    })
    .await;
    show_findings(&findings, args.json)?;
    if !args.json && findings.iter().all(|finding| finding.verdict == Verdict::Ok) {
        println!("\nall is well");
    }
    conclude(&findings, "this node has problems")
}
