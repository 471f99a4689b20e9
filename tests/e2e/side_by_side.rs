//! Ten images start side by side on a node whose store has room for half of their bytes: all start with right bytes, and
//! what is fetched stays near what is read, also by starts that read more than there is room for.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_policy::rng::Rng;
use hermes_tests::compress::Compression;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::ScratchDir;
use hermes_tests::sample::Sample;
use hermes_tests::sample_image::SampleImage;

/// Images that start at once.
const IMAGES: usize = 10;
/// Files of each image, and their length in bytes: no whole number of chunks.
const FILES: usize = 12;
const FILE_LEN_BYTES: u64 = 350_001;
/// Half of the bytes of all images.
const BUDGET_BYTES: u64 = IMAGES as u64 * FILES as u64 * FILE_LEN_BYTES / 2;
/// What a program reads at a time, in bytes.
const READ_LEN_BYTES: usize = 16 << 10;

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

fn image(scratch: &ScratchDir, number: usize) -> Result<SampleImage> {
    let names: Vec<String> = (0..FILES).map(|file| format!("srv/{number}-{file}")).collect();
    let files: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), FILE_LEN_BYTES)).collect();
    let sample = |dir: &Path| Sample::with_layers(dir, &[(Compression::Gzip(1), &files)]);
    SampleImage::new(hermes(), scratch, &format!("image-{number}"), FaultyRegistry::start, sample)
}

/// Reads `count` neighbouring files of `image` in an order of its own. Says how long each read took.
fn start(image: &SampleImage, number: usize, count: usize) -> Result<Vec<Duration>> {
    let mut names: Vec<&str> = image.sample.names().collect();
    let (mut rng, mut took) = (Rng::new(number as u64), Vec::new());
    names.rotate_left(number);
    names.truncate(count);
    while !names.is_empty() {
        let name = names.swap_remove(rng.below(names.len() as u64) as usize);
        let (expected, file) = (image.sample.content(name), File::open(image.dir.join(name))?);
        for (place, piece) in expected.chunks(READ_LEN_BYTES).enumerate() {
            let (begun, mut found) = (Instant::now(), vec![0; piece.len()]);
            file.read_exact_at(&mut found, (place * READ_LEN_BYTES) as u64).with_context(|| name.to_owned())?;
            took.push(begun.elapsed());
            ensure!(found == piece, "{name} of image {number} holds wrong bytes");
        }
    }
    Ok(took)
}

/// Starts all images, each of which reads `count` of its files.
fn start_all(count: usize) -> Result<()> {
    let scratch = ScratchDir::new("side-by-side")?;
    let images = (0..IMAGES).map(|number| image(&scratch, number)).collect::<Result<Vec<_>>>()?;
    let budget = BUDGET_BYTES.to_string();
    let daemon = Daemon::start(hermes(), &scratch.path().join("state"), &["--budget", &budget, "--complete", "idle"])?;
    images.iter().try_for_each(|image| image.mount(&daemon))?;
    let mut took = std::thread::scope(|scope| {
        let starts: Vec<_> =
            images.iter().enumerate().map(|(number, image)| scope.spawn(move || start(image, number, count))).collect();
        let ended = starts.into_iter().map(|start| start.join().map_err(|_| anyhow::anyhow!("a start panics"))?);
        ended.collect::<Result<Vec<_>>>().map(|took| took.concat())
    })
    .with_context(|| daemon.log())?;
    took.sort_unstable();
    let read_bytes = (IMAGES * count) as u64 * FILE_LEN_BYTES;
    let (fetched_bytes, status) = (daemon.sources()?.registry_bytes, daemon.status()?);
    println!(
        "{count} of {FILES} files: {read_bytes} bytes read, {fetched_bytes} fetched ({:.2} x), read p50 {:?}, p99 {:?}, longest {:?}",
        fetched_bytes as f64 / read_bytes as f64,
        took[took.len() / 2],
        took[took.len() * 99 / 100],
        took[took.len() - 1],
    );
    ensure!(status.store_bytes <= BUDGET_BYTES, "{} bytes", status.store_bytes);
    ensure!(fetched_bytes * 2 <= read_bytes * 3, "{fetched_bytes} bytes were fetched where {read_bytes} were read");
    daemon.stop().map(drop)
}

#[test]
fn starts_that_find_room() -> Result<()> {
    start_all(FILES / 2)
}

#[test]
fn starts_that_read_more_than_there_is_room_for() -> Result<()> {
    start_all(FILES)
}
