//! A disk that somebody else fills to the last byte while an image is completed, and again while it is handed over to the
//! kernel: no wrong byte, and both go on when there is room.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_snapshotter::status::CompletionState;
use hermes_tests::command::run;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{LoopGuard, MountGuard, ScratchDir, wait_for};
use hermes_tests::sample::TAG;
use hermes_tests::sample_image::SampleImage;
use rustix::mount::MountFlags;

use crate::space::fill;

/// The disk in MiB: the 64 MiB that the store leaves alone, the 64 MiB that completion leaves to readers, the image of
/// 45 MB, and the catalogue.
const DISK_MIB: u64 = 256;
/// Link to the registry in bits per second: the image takes 4 s, in which the disk can be filled.
const LINK_BITS_PER_SECOND: std::num::NonZeroU64 = std::num::NonZeroU64::new(90_000_000).expect("not zero");
/// How long something may take that comes by itself.
const DEADLINE: Duration = Duration::from_secs(60);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

fn serve(layout: &Path) -> Result<FaultyRegistry> {
    FaultyRegistry::with_rate(layout, LINK_BITS_PER_SECOND)
}

/// Reads everything from where `dir` is, not from memory.
fn check(image: &SampleImage, dir: &Path) -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    image.sample.check(dir)
}

/// Shows the image from its files, at another place.
fn hand_over(image: &SampleImage, daemon: &Daemon, dir: &Path) -> Result<()> {
    daemon.mount(&image.registry.image(TAG), dir, &image.index, &["--way", "erofs-files"])
}

#[test]
fn completion_and_hand_over_go_on_when_there_is_room_again() -> Result<()> {
    let scratch = ScratchDir::new("full-disk")?;
    let image = SampleImage::large(hermes(), &scratch, serve)?;
    let disk = scratch.path().join("disk.img");
    File::create(&disk)?.set_len(DISK_MIB << 20)?;
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&disk))?;
    let device = LoopGuard::attach(&disk)?;
    let (state, whole) = (scratch.make("state")?, scratch.make("whole")?);
    let mounted = MountGuard::mount(device.device(), &state, "ext4", MountFlags::empty(), "")?;
    let daemon = Daemon::start(hermes(), &state, &["--complete", "full"])?;
    image.mount(&daemon)?;

    // In the middle of completion.
    wait_for("the first bytes", DEADLINE, || image.status(&daemon).ok().filter(|image| image.present_bytes > 0))?;
    let hog = state.join("hog");
    fill(&hog)?;
    wait_for("an end of completion", DEADLINE, || {
        let state = image.status(&daemon).ok()?.completion;
        matches!(state, CompletionState::NoRoom { .. } | CompletionState::Failed { .. }).then_some(())
    })
    .with_context(|| daemon.log())?;
    ensure!(image.status(&daemon)?.percent_present() < 100.0, "it is complete on a full disk");
    check(&image, &image.dir).with_context(|| daemon.log())?;
    ensure!(hand_over(&image, &daemon, &whole).is_err(), "what is not complete is handed over");
    check(&image, &image.dir).context("after a hand-over that was refused")?;

    // Room.
    fs::remove_file(&hog)?;
    let resumed = daemon.run(&["complete", "--resume"])?;
    ensure!(resumed.status.success(), "{resumed:?}");
    wait_for("a complete image", DEADLINE, || {
        image.status(&daemon).ok().filter(|image| image.completion == CompletionState::Complete)
    })
    .with_context(|| daemon.log())?;

    // In the middle of the hand-over, which has its own things to write: it is made or refused, and right if it is made.
    fill(&hog)?;
    if hand_over(&image, &daemon, &whole).is_ok() {
        check(&image, &whole).context("from the files, on a full disk")?;
    }
    check(&image, &image.dir).context("lazily, on a full disk")?;
    fs::remove_file(&hog)?;
    let is_shown = daemon.status()?.images.iter().any(|image| Path::new(&image.dir) == whole);
    if !is_shown {
        hand_over(&image, &daemon, &whole).with_context(|| daemon.log())?;
    }
    check(&image, &whole).context("from the files")?;
    daemon.stop().context("the end after a full disk")?;

    let daemon = Daemon::start(hermes(), &state, &[])?;
    hand_over(&image, &daemon, &whole).with_context(|| daemon.log())?;
    check(&image, &whole).context("after a restart")?;
    daemon.stop()?;
    drop((mounted, device));
    Ok(())
}
