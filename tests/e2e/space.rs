//! No room: a small disk, a disk that somebody else fills to the last byte, a small budget. Reads go on uncached,
//! other images are unharmed, and `hermes complete` says what is wrong.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::command::run;
use hermes_tests::daemon::{Daemon, Reading};
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::{LoopGuard, MountGuard, ScratchDir};
use hermes_tests::sample::Sample;
use hermes_tests::sample_image::SampleImage;
use rustix::fs::{Advice, fadvise};
use rustix::mount::MountFlags;

/// Size of the small disk in MiB: the 64 MiB that the store leaves alone, the catalogue, and half of the large image.
const DISK_MIB: u64 = 100;
/// The smallest budget that a node takes, in bytes.
const BUDGET_BYTES: u64 = 16 << 20;
/// How long a read waits. It only has to when the disk refuses everything.
const DEADLINE_MS: &str = "5000";

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

fn complete(image: &SampleImage, daemon: &Daemon) -> Result<Output> {
    daemon.run(&["complete", image.dir.to_str().context("UTF-8")?])
}

/// Reads everything anew, not from the page cache.
fn check(image: &SampleImage) -> Result<()> {
    forget_pages(image)?;
    image.sample.check(&image.dir)
}

fn forget_pages(image: &SampleImage) -> Result<()> {
    for name in image.sample.names() {
        fadvise(File::open(image.dir.join(name))?, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

/// Each file is right or an error.
fn check_what_can_be_read(image: &SampleImage) -> Result<()> {
    forget_pages(image)?;
    for name in image.sample.names() {
        if let (Ok(found), _) = Reading::start(&image.dir.join(name)).end()? {
            ensure!(found == image.sample.content(name), "{name}: wrong bytes");
        }
    }
    Ok(())
}

/// One line, the exit code for what this machine lacks, and what to do.
fn assert_says_no_room(output: &Output) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(7), "{output:?}");
    ensure!(said.trim_end().lines().count() == 1, "more than a line: {said}");
    ensure!(said.contains("no room") && said.contains("--budget"), "{said}");
    Ok(())
}

/// A complete image, and beside it one for which there is no room.
fn reads_go_on(daemon: &Daemon, small: &SampleImage, large: &SampleImage) -> Result<()> {
    small.mount(daemon)?;
    let output = complete(small, daemon)?;
    ensure!(output.status.success(), "{output:?}");
    small.registry.always(Fault::Status(404));
    large.mount(daemon)?;
    check(large).with_context(|| daemon.log())?;
    assert_says_no_room(&complete(large, daemon)?)?;
    let status = daemon.status()?;
    let present = |image: &SampleImage| {
        let dir = image.dir.display().to_string();
        status.images.iter().find(|status| status.dir == dir).map(|status| (status.present_bytes, status.total_bytes))
    };
    let (present_bytes, total_bytes) = present(large).context("it is mounted")?;
    ensure!(present_bytes > 0 && present_bytes < total_bytes, "{present_bytes} of {total_bytes} bytes were kept");
    let (present_bytes, total_bytes) = present(small).context("it is mounted")?;
    ensure!(present_bytes == total_bytes, "the other image lost something: {present_bytes} of {total_bytes}");
    check(small).context("the other image, without its registry")?;
    // What was kept is right: the registry can go.
    large.registry.always(Fault::Status(404));
    check_what_can_be_read(large)?;
    large.registry.always(Fault::Pass);
    // The refusal is remembered for a minute, or until the next mount.
    let output = daemon.run(&["unmount", large.dir.to_str().context("UTF-8")?])?;
    ensure!(output.status.success(), "{output:?}");
    large.mount(daemon)
}

#[test]
fn a_small_budget() -> Result<()> {
    let scratch = ScratchDir::new("space")?;
    let (small, large) = (
        SampleImage::new(hermes(), &scratch, "small", FaultyRegistry::start, Sample::new)?,
        SampleImage::large(hermes(), &scratch, FaultyRegistry::start)?,
    );
    let budget = BUDGET_BYTES.to_string();
    let settings = ["--budget", &budget, "--read-deadline-ms", DEADLINE_MS];
    let daemon = Daemon::start(hermes(), &scratch.path().join("state"), &settings)?;
    reads_go_on(&daemon, &small, &large)?;
    let status = daemon.status()?;
    ensure!(status.store_bytes <= BUDGET_BYTES, "{} bytes", status.store_bytes);
    daemon.stop()?;
    Ok(())
}

#[test]
fn a_small_disk_and_a_full_one() -> Result<()> {
    let scratch = ScratchDir::new("space")?;
    let (small, large) = (
        SampleImage::new(hermes(), &scratch, "small", FaultyRegistry::start, Sample::new)?,
        SampleImage::large(hermes(), &scratch, FaultyRegistry::start)?,
    );
    let disk = scratch.path().join("disk.img");
    File::create(&disk)?.set_len(DISK_MIB << 20)?;
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0", "-O", "^has_journal"]).arg(&disk))?;
    let device = LoopGuard::attach(&disk)?;
    let state = scratch.make("state")?;
    let mounted = MountGuard::mount(device.device(), &state, "ext4", MountFlags::empty(), "")?;
    let daemon = Daemon::start(hermes(), &state, &["--read-deadline-ms", DEADLINE_MS])?;
    reads_go_on(&daemon, &small, &large)?;

    // Somebody else takes the last byte.
    let hog = state.join("hog");
    fill(&hog)?;
    check(&large).with_context(|| daemon.log())?;
    assert_says_no_room(&complete(&large, &daemon)?)?;
    check(&small).context("the other image, without its registry")?;

    // And gives it back: everything goes on without a restart, and with one.
    std::fs::remove_file(&hog)?;
    check(&large).with_context(|| daemon.log())?;
    daemon.stop().context("the end after a full disk")?;
    let daemon = Daemon::start(hermes(), &state, &["--read-deadline-ms", DEADLINE_MS])?;
    small.registry.always(Fault::Pass);
    small.mount(&daemon)?;
    small.registry.always(Fault::Status(404));
    check(&small).context("after a restart, without its registry")?;
    daemon.stop()?;
    drop((mounted, device));
    Ok(())
}

/// Writes until the disk takes no more.
pub(crate) fn fill(hog: &Path) -> Result<()> {
    use std::io::Write as _;
    let mut file = File::create(hog)?;
    let block = vec![0x55; 1 << 20];
    for len in [1 << 20, 4096, 1] {
        while file.write_all(&block[..len]).is_ok() {}
    }
    let _ = file.sync_all();
    Ok(())
}
