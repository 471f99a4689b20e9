//! Images that a real containerd pulls and Hermes shows lazily: nothing of the layers is downloaded, containers run, read
//! what they need and go on over the end of the daemon. Images that cannot be shown so are in `refused.rs`.
//!
//! containerd of each line is set up by `hermes node install` and asked as a kubelet asks it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_tests::containerds::LINES;
use hermes_tests::cri::Cri;
use hermes_tests::guard::wait_for;
use hermes_tests::lazy_host::Container;
use hermes_tests::runnable::LARGE;
use hermes_tests::sample::content;
use hermes_tests::stage::{Stage, cksum, last_pull};
use rustix::process::Signal;

/// How long containerd may take to collect garbage.
const DEADLINE: Duration = Duration::from_secs(60);
/// What deciding and mounting may read of the layers, in bytes: a byte to see that ranges are given.
const DECISION_BYTES_MAX: u64 = 16;

/// Bytes around a small file that come with it at least: the large file beside it begins within the nearest of them.
const AROUND_BYTES_MIN: u64 = 1_000_000;

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

#[test]
fn an_indexed_image_runs_without_being_downloaded_and_nothing_is_left() -> Result<()> {
    LINES.iter().try_for_each(|line| runs_without_being_downloaded(line).with_context(|| format!("containerd {line}")))
}

fn runs_without_being_downloaded(line: &str) -> Result<()> {
    let stage = Stage::new(hermes(), line)?;
    let daemon = stage.daemon(&[])?;
    let containerd = stage.host.start()?;
    let image = stage.registry.image("v1");
    let layers = stage.layer_bytes("v1")?;
    let before = stage.registry.counters();
    Cri::connect(&containerd.socket())?.pull(&image)?;
    let decided = last_pull(daemon.status()?).with_context(|| daemon.log())?;
    ensure!(decided.decision == "lazy", "{decided:?}");
    let pulled = stage.registry.counters().blob_bytes - before.blob_bytes;
    // The image's configuration is a blob too.
    ensure!(pulled < layers / 10, "{pulled} of {layers} bytes were read to pull it");
    ensure!(daemon.sources()?.registry_wire_bytes <= DECISION_BYTES_MAX, "chunks were fetched before a container runs");

    let script = "cat /etc/a; cat /etc/b 2>/dev/null; cat /gone/c 2>/dev/null; echo new > /etc/b; cat /etc/b";
    let answer = containerd.once(&image, script)?;
    ensure!(answer == "a2new", "the container read '{answer}'");
    let started = stage.registry.counters().blob_bytes - before.blob_bytes;
    ensure!(started < layers, "{started} of {layers} bytes were read though the large file was not");
    let sum = containerd.once(&image, &format!("cksum < /{}", LARGE.0))?;
    ensure!(sum == large_sum()?, "the large file came wrong: {sum}");
    println!("containerd {line}: layers {layers} B; read to pull {pulled} B, to run a shell {started} B");

    containerd.remove_all_images()?;
    wait_for("the end of all trees", DEADLINE, || (stage.trees().ok()? == 0).then_some(()))?;
    let left = fs::read_dir(stage.state().join("trees"))?.count();
    ensure!(left == 0, "{left} folders are left");
    // It was only removed from containerd: what had come is there for the next time.
    Cri::connect(&containerd.socket())?.pull(&image)?;
    ensure!(containerd.once(&image, "cat /etc/a")? == "a2");
    drop(containerd);
    daemon.stop().map(drop)
}

/// A client that is no kubelet pulls through containerd's transfer service, which unpacks as its configuration says.
#[test]
fn a_pull_through_the_transfer_service_is_lazy_too() -> Result<()> {
    let stage = Stage::new(hermes(), "2")?;
    let daemon = stage.daemon(&[])?;
    let containerd = stage.host.start()?;
    let (image, before) = (stage.registry.image("v1"), stage.registry.counters());
    containerd.ctr_says(&["images", "pull", "--plain-http", "--snapshotter", "hermes", &image])?;
    let decided = last_pull(daemon.status()?).with_context(|| daemon.log())?;
    ensure!(decided.decision == "lazy", "{decided:?}");
    let (pulled, layers) = (stage.registry.counters().blob_bytes - before.blob_bytes, stage.layer_bytes("v1")?);
    ensure!(pulled < layers / 10, "{pulled} of {layers} bytes were read to pull it");
    let sum = containerd.once(&image, &format!("cat /etc/a; cksum < /{}", LARGE.0))?;
    ensure!(sum == format!("a2{}", large_sum()?), "the container read '{sum}'");
    containerd.remove_all_images()?;
    drop(containerd);
    daemon.stop().map(drop)
}

#[test]
fn a_container_reads_on_over_the_death_of_the_daemon() -> Result<()> {
    let stage = Stage::new(hermes(), "1.7")?;
    let kept = stage.kept(&[])?;
    let containerd = stage.host.start()?;
    let image = stage.registry.image("v1");
    Cri::connect(&containerd.socket())?.pull(&image)?;
    let container = Container::sleeping(&containerd, &image)?;
    let (before, trees) = (kept.signal_daemon(Signal::KILL)?, stage.trees()?);
    // Nothing of this file was read yet: it waits for the next daemon, which asks the registry.
    let script = format!("cksum < /{}", LARGE.0);
    let sum = container.exec(&["/bin/sh", "-c", &script])?;
    ensure!(sum.trim() == large_sum()?, "the container read something else: {sum}");
    kept.wait_for_another(before)?;
    ensure!((stage.trees()?, trees) == (1, 1), "one tree, before and after");
    Ok(())
}

/// Nobody has recorded the image: where all of it comes sooner or later, what lies around a file that is read comes at once, and
/// what is far from it does not.
#[test]
fn a_first_start_is_fetched_around_what_it_reads() -> Result<()> {
    let stage = Stage::new(hermes(), "2")?;
    let daemon = stage.daemon(&["--complete", "idle"])?;
    let containerd = stage.host.start()?;
    let image = stage.registry.image("v1");
    Cri::connect(&containerd.socket())?.pull(&image)?;
    let container = Container::sleeping(&containerd, &image)?;
    ensure!(container.exec(&["/bin/cat", "/etc/a"])? == "a2");
    let shown = wait_for("the file beside", DEADLINE, || {
        let shown = daemon.status().ok()?.images.into_iter().next()?;
        (shown.start.as_ref()?.prefetched_bytes >= AROUND_BYTES_MIN).then_some(shown)
    });
    let shown = shown.with_context(|| daemon.log())?;
    ensure!(shown.start.as_ref().is_some_and(|start| start.profile.is_none()), "{shown:?}");
    ensure!(shown.present_bytes < shown.total_bytes, "{shown:?}");
    Ok(())
}

/// The sum of the large file.
fn large_sum() -> Result<String> {
    cksum(&content(LARGE.0, LARGE.1))
}
