//! What a reader waits for goes before what nobody waits for: while an image is completed over a slow link, which that
//! fills, a read of another image asks the same registry at once and has its answer while the rest has still to come.

use std::fs;
use std::num::NonZeroU64;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::compress::Compression;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{ProcessGuard, ScratchDir, wait_for};
use hermes_tests::layout::NewLayer;
use hermes_tests::node::Index;
use hermes_tests::sample::{Sample, SampleIndex, content};
use hermes_tests::sample_image::SampleImage;
use hermes_tests::tarball::{Entry, Tarball};
use serde_json::json;

/// Link to the registry in bits per second: what nobody waits for takes 16 s.
const LINK_BITS_PER_SECOND: NonZeroU64 = NonZeroU64::new(20_000_000).expect("not zero");
/// Bytes that nobody waits for, in an image of their own.
const REST_BYTES: u64 = 40_000_000;
/// The tag of that image.
const REST: &str = "rest";
/// Reads, each of a layer of its own, so that the registry's log tells them apart.
const READS: usize = 5;
/// Length of the file that is read, in bytes: one chunk.
const FILE_LEN_BYTES: u64 = 60_000;
/// Requests for the rest that may be on their way to the registry while a read is on its way to the daemon.
const CROSSING_MAX: usize = 1;
/// How long something may take that comes by itself.
const DEADLINE: Duration = Duration::from_secs(60);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

fn name(read: usize) -> String {
    format!("srv/{read}")
}

fn sample(dir: &Path) -> Result<Sample> {
    let names: Vec<String> = (0..2 * READS).map(name).collect();
    let files: Vec<[(&str, u64); 1]> = names.iter().map(|name| [(name.as_str(), FILE_LEN_BYTES)]).collect();
    let layers: Vec<_> = files.iter().map(|files| (Compression::Plain, files.as_slice())).collect();
    let sample = Sample::with_layers(dir, &layers)?;
    let rest = Tarball::of([Entry::file("rest", content("rest", REST_BYTES))]);
    sample.layout.add(REST, &[NewLayer { tar: rest, compression: Compression::Plain }], &json!({}))?;
    Ok(sample)
}

fn sample_blob(image: &SampleImage, tag: &str) -> Result<String> {
    let layers = image.sample.layout.image(tag)?.layers;
    Ok(layers.first().context("a layer")?.layer_id.to_string())
}

fn serve(layout: &Path) -> Result<FaultyRegistry> {
    FaultyRegistry::with_rate(layout, LINK_BITS_PER_SECOND)
}

/// Reads a file anew. Says how long that took, and what was asked of the registry before it was asked for the file.
fn read(image: &SampleImage, read: usize) -> Result<(Duration, usize)> {
    let begun = Instant::now();
    let found = fs::read(image.dir.join(name(read)))?;
    let took = begun.elapsed();
    ensure!(found == image.sample.content(&name(read)), "wrong bytes");
    let blob = image.sample.image.layers[read].layer_id.to_string();
    let mut since = image.registry.blob_log().into_iter().filter(|request| request.at > begun);
    let before = since.position(|request| request.path.ends_with(&blob));
    Ok((took, before.context("nobody asked for what was read")?))
}

#[test]
fn readers_overtake_what_nobody_waits_for() -> Result<()> {
    let scratch = ScratchDir::new("priority")?;
    let image = SampleImage::new(hermes(), &scratch, "image", serve, sample)?;
    let index = Index::build(hermes(), &image.registry.image(REST), &scratch.path().join("rest-index"))?;
    let index = SampleIndex { folder: index.folder.clone(), key: index.key.clone() };
    let (dir, reference) = (scratch.make("rest")?, image.registry.image(REST));
    let daemon = Daemon::start(hermes(), &scratch.path().join("state"), &[])?;
    image.mount(&daemon)?;
    daemon.mount(&reference, &dir, &index, &[])?;
    let alone = (0..READS).map(|number| read(&image, number)).collect::<Result<Vec<_>>>()?;

    let mut completing = daemon.command(&["complete", dir.to_str().context("UTF-8")?]);
    let mut completing = ProcessGuard::start(completing.stdout(Stdio::null()).stderr(Stdio::null()))?;
    // Several requests for long ranges are under way, and the link is full.
    let rest = sample_blob(&image, REST)?;
    let present = || -> Result<u64> {
        let images = daemon.status()?.images;
        Ok(images.iter().filter(|image| Path::new(&image.dir) == dir).map(|image| image.present_bytes).sum())
    };
    wait_for("a full link", DEADLINE, || {
        let asked = image.registry.blob_log().iter().filter(|request| request.path.ends_with(&rest)).count();
        (asked >= 3 && present().ok()? > 0).then_some(())
    })?;
    let beside = (READS..2 * READS).map(|number| read(&image, number)).collect::<Result<Vec<_>>>();
    let beside = beside.with_context(|| daemon.log())?;
    let here = present()?;
    println!("alone {alone:?}, beside {beside:?}, {here} of {REST_BYTES} bytes are here");
    for (number, (_, before)) in beside.iter().enumerate() {
        ensure!(*before <= CROSSING_MAX, "read {number}: {before} requests of nobody went before it: {beside:?}");
    }
    ensure!(here < REST_BYTES, "the rest came before the reads were answered: {beside:?}");
    completing.stop()?;
    daemon.stop().map(drop)
}
