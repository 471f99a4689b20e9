//! Images that become complete by themselves, in the background: at once or when they have settled, paused and gone on
//! with, over the death of the daemon, and never in the place of another image's bytes.

use std::num::NonZeroU64;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_snapshotter::status::CompletionState;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::sample::Sample;
use hermes_tests::sample_image::SampleImage;

/// How long something may take that comes by itself: a start settles after 10 s.
const DEADLINE: Duration = Duration::from_secs(120);
/// Link to the registry in bits per second: the image (45 MB) takes some seconds, in which the daemon can be killed.
const LINK_BITS_PER_SECOND: NonZeroU64 = NonZeroU64::new(80_000_000).expect("not zero");
/// Room for a third of the large image.
const BUDGET: &str = "16777216";

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// A registry behind the slow link.
fn serve(layout: &Path) -> Result<FaultyRegistry> {
    FaultyRegistry::with_rate(layout, LINK_BITS_PER_SECOND)
}

/// Waits until nothing is missing, and reads everything without a registry.
fn completes(image: &SampleImage, daemon: &Daemon) -> Result<()> {
    wait_for("a complete image", DEADLINE, || {
        image.status(daemon).ok().filter(|mounted| mounted.completion == CompletionState::Complete)
    })
    .with_context(|| daemon.log())?;
    image.registry.always(Fault::Status(404));
    image.sample.check(&image.dir).with_context(|| daemon.log())?;
    image.registry.always(Fault::Pass);
    Ok(())
}

fn must(daemon: &Daemon, arguments: &[&str]) -> Result<()> {
    let output = daemon.run(arguments)?;
    ensure!(output.status.success(), "{arguments:?}: {output:?}");
    Ok(())
}

#[test]
fn an_image_is_completed_paused_killed_and_completed() -> Result<()> {
    let scratch = ScratchDir::new("completion")?;
    let (image, state) = (SampleImage::large(hermes(), &scratch, serve)?, scratch.path().join("state"));
    let daemon = Daemon::start(hermes(), &state, &["--complete", "full"])?;
    must(&daemon, &["complete", "--pause"])?;
    image.mount(&daemon)?;
    ensure!(image.status(&daemon)?.completion == CompletionState::Paused, "{:?}", daemon.status()?);
    must(&daemon, &["complete", "--resume"])?;
    wait_for("the first bytes", DEADLINE, || image.status(&daemon).ok().filter(|image| image.present_bytes > 0))?;
    daemon.kill(scratch.path())?;
    // Restarted, it begins where it was; without anybody asking.
    let daemon = Daemon::start(hermes(), &state, &["--complete", "full"])?;
    image.mount(&daemon)?;
    completes(&image, &daemon)?;
    let completion = daemon.status()?.completion;
    ensure!(completion.completed_images <= 1 && !completion.paused, "{completion:?}");
    daemon.stop().map(drop)
}

#[test]
fn a_start_that_has_settled_is_completed_within_its_rate() -> Result<()> {
    let scratch = ScratchDir::new("completion")?;
    let small = SampleImage::new(hermes(), &scratch, "small", serve, Sample::new)?;
    let state = scratch.path().join("state");
    let daemon = Daemon::start(hermes(), &state, &["--complete", "idle", "--complete-rate", "4000000"])?;
    small.mount(&daemon)?;
    let begun = std::time::Instant::now();
    let first = small.status(&daemon)?;
    ensure!(first.completion == CompletionState::Starting && first.present_bytes == 0, "{first:?}");
    completes(&small, &daemon)?;
    // Ten seconds of quiet are the definition of settled.
    ensure!(begun.elapsed() >= Duration::from_secs(10), "it began after {:?}", begun.elapsed());
    ensure!(daemon.status()?.completion.fetched_bytes > 0);
    daemon.stop().map(drop)
}

#[test]
fn what_has_no_room_is_not_completed_and_nobody_loses_a_byte() -> Result<()> {
    let scratch = ScratchDir::new("completion")?;
    let (small, large) = (
        SampleImage::new(hermes(), &scratch, "small", serve, Sample::new)?,
        SampleImage::large(hermes(), &scratch, serve)?,
    );
    let state = scratch.path().join("state");
    let daemon = Daemon::start(hermes(), &state, &["--complete", "full", "--budget", BUDGET])?;
    small.mount(&daemon)?;
    completes(&small, &daemon)?;
    // Nothing mounted holds it any more: a byte too much would evict it.
    must(&daemon, &["unmount", small.dir.to_str().context("UTF-8")?])?;
    let kept = daemon.status()?.store_bytes;
    large.mount(&daemon)?;
    wait_for("a refusal", DEADLINE, || {
        let state = large.status(&daemon).ok()?.completion;
        matches!(state, CompletionState::NoRoom { .. }).then_some(())
    })?;
    let status = daemon.status()?;
    ensure!(status.store_bytes >= kept, "{} of {kept} bytes are left", status.store_bytes);
    ensure!(large.status(&daemon)?.present_bytes == 0, "it began all the same");
    daemon.stop().map(drop)
}
