//! `hermes profile`: what starts of an image read, and what is fetched ahead of the next one.

mod picture;
mod table;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use hermes_policy::profile::codec;
use hermes_snapshotter::control::{self, Answer, FailureClass, Request};
use hermes_snapshotter::index_folder::IndexFolder;
use hermes_snapshotter::status::ProfileReport;

use super::StateArgs;
use super::mount::expect_done;
use crate::output::failure;

/// Commands of `hermes profile`.
#[derive(Debug, Subcommand)]
pub(crate) enum ProfileCommand {
    /// Show what starts of an image read, and what is fetched ahead of the next one; as tables and as a picture.
    Show(ShowArgs),
    /// Say which files the profile is about, in their order, and how sure it is of each.
    Explain(ShowArgs),
    /// Write the profile into a file, or into a folder of indexes beside the image's index.
    Export(ExportArgs),
    /// Take a profile from such a file or folder.
    Import(ImportArgs),
}

/// Which image, on which node.
#[derive(Debug, Args)]
pub(crate) struct ProfileImageArgs {
    /// An image that the node knows: the name with which it was mounted, the folder, or the digest of its manifest.
    #[arg(value_name = "IMAGE|DIR|DIGEST")]
    image: String,
    #[command(flatten)]
    state: StateArgs,
}

/// Arguments of `hermes profile show` and `explain`.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    image: ProfileImageArgs,
    /// Draw what the newest start read, and the profile beside it, into this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// List every step, not only the first.
    #[arg(long)]
    all: bool,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `hermes profile export`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    image: ProfileImageArgs,
    /// A file, or a folder of indexes, where `hermes mount --index` finds it.
    #[arg(long, short, value_name = "FILE|DIR")]
    output: PathBuf,
}

/// Arguments of `hermes profile import`.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    #[command(flatten)]
    image: ProfileImageArgs,
    /// What `hermes profile export` has written.
    #[arg(value_name = "FILE|DIR")]
    from: PathBuf,
}

/// Runs a command.
pub(crate) async fn run(command: ProfileCommand) -> anyhow::Result<()> {
    match command {
        ProfileCommand::Show(args) => show(args, false).await,
        ProfileCommand::Explain(args) => show(args, true).await,
        ProfileCommand::Export(args) => export(args).await,
        ProfileCommand::Import(args) => import(args).await,
    }
}

async fn report(args: &ProfileImageArgs, files: bool) -> anyhow::Result<ProfileReport> {
    let dir = std::path::absolute(&args.image)?;
    let request = Request::Profile { image: args.image.clone(), dir, files };
    let answer = expect_done(control::ask(&std::path::absolute(&args.state.state)?, &request, |_| ()).await)?;
    match answer {
        Answer::Profile(report) => Ok(*report),
        other => anyhow::bail!("the daemon answered something else: {other:?}"),
    }
}

async fn show(args: ShowArgs, files: bool) -> anyhow::Result<()> {
    let report = report(&args.image, files).await?;
    if let Some(path) = &args.svg {
        std::fs::write(path, picture::draw(&report)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else if files {
        print!("{}", table::explain(&report, args.all));
    } else {
        print!("{}", table::show(&report, args.all));
    }
    Ok(())
}

async fn export(args: ExportArgs) -> anyhow::Result<()> {
    let report = report(&args.image, false).await?;
    if report.encoded.is_empty() {
        let message = format!("{}: no start was recorded yet, so there is nothing to export", report.reference);
        return Err(failure(FailureClass::NotFound, message));
    }
    let bytes = hex::decode(&report.encoded).context("the daemon answered something else than a profile")?;
    if args.output.is_dir() {
        IndexFolder::new(&args.output).put_profile(report.manifest, &bytes)?;
    } else {
        std::fs::write(&args.output, &bytes).with_context(|| format!("cannot write {}", args.output.display()))?;
    }
    println!("{} bytes, made of {} starts: {}", bytes.len(), report.records, args.output.display());
    Ok(())
}

async fn import(args: ImportArgs) -> anyhow::Result<()> {
    let bytes = read(&args).await?;
    let usage = |reason: String| failure(FailureClass::Corrupt, format!("{}: {reason}", args.from.display()));
    let profile = codec::decode(&bytes).map_err(|error| usage(error.to_string()))?;
    let dir = std::path::absolute(&args.image.image)?;
    let request = Request::ImportProfile { image: args.image.image, dir, profile: hex::encode(&bytes) };
    expect_done(control::ask(&std::path::absolute(&args.image.state.state)?, &request, |_| ()).await)?;
    println!("imported: {} chunks, made of {} starts", profile.chunk_count(), profile.records);
    Ok(())
}

/// The bytes of the file, or of the image's profile in the folder.
async fn read(args: &ImportArgs) -> anyhow::Result<Vec<u8>> {
    let from: &Path = &args.from;
    if !from.is_dir() {
        return std::fs::read(from).with_context(|| format!("cannot read {}", from.display()));
    }
    let manifest = report(&args.image, false).await?.manifest;
    let found = IndexFolder::new(from).profile(manifest)?;
    found.ok_or_else(|| failure(FailureClass::NotFound, format!("{} has no profile of {manifest}", from.display())))
}

#[cfg(test)]
mod sample {
    use hermes_image::ids::{DiffId, Digest};
    use hermes_snapshotter::status::{ProfileOrigin, ProfileReport, ProfileStep, RecordedTouch, StartSummary};

    /// A start of 200 reads from two sources, and the profile of three like it.
    pub(super) fn report() -> ProfileReport {
        let sources = ["registry", "registry", "peer", "here"];
        let touches = (0_u32..200).map(|no| RecordedTouch {
            at_ms: no * 13,
            layer: DiffId([7; 32]),
            first_chunk: no * 3,
            bytes: 131_072,
            waited: no % 5 == 0,
            source: sources[no as usize % 4].to_owned(),
        });
        let steps = (0_u32..150).map(|no| ProfileStep {
            layer: DiffId([7; 32]),
            first_chunk: no * 3,
            chunks: 2,
            bytes: 131_072,
            at_ms: no * 13,
            spread_ms: no % 9 * 20,
            weight_percent: if no % 10 == 0 { 66 } else { 100 },
            files: vec![format!("/usr/lib/lib<{no}>.so")],
            more_files: usize::from(no == 3),
        });
        let start =
            StartSummary { ended_seconds: 1_700_000_000, length_ms: 2_587, bytes: 26_214_400, waited_bytes: 5_242_880 };
        ProfileReport {
            reference: "registry.example/<b>&\"app\":1".to_owned(),
            manifest: Digest([9; 32]),
            image_bytes: 900_000_000,
            origin: Some(ProfileOrigin::Own),
            records: 3,
            newest_seconds: 1_700_000_000,
            steps: steps.collect(),
            encoded: "00".repeat(1200),
            starts: vec![start.clone(), StartSummary { waited_bytes: 26_214_400, ..start }],
            touches: touches.collect(),
        }
    }
}
