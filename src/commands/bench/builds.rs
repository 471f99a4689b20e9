//! `hermes bench builds`: a controller that indexes an image of a gigabyte on one core, and several images at once.
//!
//! The controller is the program itself, in a process of its own that may run on one core only (`taskset`); the registry is
//! this process, on loopback. What is measured is the whole way: from the start of the controller, with an empty state, until
//! its policy says that everything is ready. So reading over HTTP, keeping what is read, building, signing and writing are
//! all in the figures.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use hermes_registry::oci::{Platform, media_type};
use hermes_registry::{LayoutWriter, Registry, WrittenLayer};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use super::report::{self, Line};
use super::stage;
use super::workload::next_random;

/// Images that are built at once, and layers of the one that is built alone.
const IMAGES: u64 = 4;
/// Files of a layer.
const FILES: u64 = 16;
/// Bytes of a layer's files for each compressed byte, about: 8 bytes of each 28 are noise. Layers of images have two to three.
const RATIO: f64 = 2.7;
/// Four times what the Hermes written in Go reads in a second (24 MB/s), in MB.
const SPEED_MB: f64 = 96.0;
/// What the controller may take, in megabytes.
const MEMORY_MB: f64 = 300.0;
/// How often it is looked whether all is ready.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How long one round may take before the run is given up.
const ROUND_MAX: Duration = Duration::from_secs(1800);

/// Arguments of `hermes bench builds`.
#[derive(Debug, Args)]
pub(crate) struct BuildsArgs {
    /// Compressed megabytes of the image, and of all the images that are built at once.
    #[arg(long, value_name = "MB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(4..))]
    megabytes: u64,
    /// The core that the controller runs on.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    core: u32,
    /// Where the images are made, and the controller keeps its state: some four times as large as they are.
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// What a round has taken.
struct Round {
    elapsed: Duration,
    peak_mb: f64,
}

/// Runs the benchmark.
pub(super) async fn run(args: BuildsArgs) -> anyhow::Result<()> {
    let folder = match &args.work {
        Some(work) => tempfile::tempdir_in(work)?,
        None => tempfile::tempdir()?,
    };
    let (work, megabytes) = (folder.path().to_owned(), args.megabytes);
    let len_bytes = tokio::task::spawn_blocking(move || make_images(&work, megabytes)).await??;
    let registry = Registry::open(folder.path().join("layout"), hermes_registry::Options::default())?;
    let registry = registry.start(([127, 0, 0, 1], 0).into()).await?;
    let image = |tag: &str| format!("{}/bench/image:{tag}", registry.address());
    let alone = round(folder.path(), "alone", &args, &[image("all")]).await?;
    let tags: Vec<String> = (0..IMAGES).map(|number| image(&format!("part-{number}"))).collect();
    let together = round(folder.path(), "together", &args, &tags).await?;
    registry.shutdown().await;
    report::print("the controller's builds", &lines(len_bytes, &alone, &together), args.json)
}

fn lines(len_bytes: u64, alone: &Round, together: &Round) -> Vec<Line> {
    let megabytes = len_bytes as f64 / 1e6;
    let speed = |round: &Round| megabytes / round.elapsed.as_secs_f64();
    let line = |what: String, figure: String, against: &str, ratio, reach| Line {
        what,
        figure,
        against: against.to_owned(),
        ratio,
        reach,
    };
    let one = format!("one image of {megabytes:.0} MB in {IMAGES} layers, one core");
    let many = format!("{IMAGES} images of as much, at once, one core");
    let per_second = |round: &Round| format!("{:.0} MB/s compressed", speed(round));
    let memory = |round: &Round| format!("{:.0} MB at most", round.peak_mb);
    vec![
        line(one.clone(), per_second(alone), "96 MB/s", speed(alone) / SPEED_MB, ">= 1"),
        line(format!("{one}: memory"), memory(alone), "300 MB", alone.peak_mb / MEMORY_MB, "<= 1"),
        line(many.clone(), per_second(together), "96 MB/s", speed(together) / SPEED_MB, ""),
        line(format!("{many}: memory"), memory(together), "300 MB", together.peak_mb / MEMORY_MB, "<= 1"),
    ]
}

/// Writes a layout with one image of all layers and one of each, and returns the compressed bytes of the layers.
fn make_images(work: &Path, megabytes: u64) -> anyhow::Result<u64> {
    let writer = LayoutWriter::create(work.join("layout"))?;
    let file_len_bytes = (megabytes * 1_000_000 / IMAGES / FILES) as f64 * RATIO;
    let mut state = 0x5851_f42d_4c95_7f2d;
    let mut layers = Vec::new();
    for number in 0..IMAGES {
        let tree = work.join("tree");
        fs::create_dir(&tree)?;
        for file in 0..FILES {
            write_file(&tree.join(format!("file-{number}-{file}")), file_len_bytes as u64, &mut state)?;
        }
        let layer = compress(&writer, &stage::pack(&writer, &tree)?)?;
        fs::remove_dir_all(&tree)?;
        let image = writer.image(&Platform::host(), &json!({}), std::slice::from_ref(&layer))?;
        writer.tag(image, &format!("part-{number}"))?;
        layers.push(layer);
    }
    let image = writer.image(&Platform::host(), &json!({}), &layers)?;
    writer.tag(image, "all")?;
    let layout = writer.layout()?;
    let lengths = layers.iter().map(|layer| fs::metadata(layout.blob_path(&layer.descriptor.digest)));
    Ok(lengths.collect::<Result<Vec<_>, _>>()?.iter().map(fs::Metadata::len).sum())
}

/// The layer `plain` as gzip writes it, in its place.
fn compress(writer: &LayoutWriter, plain: &WrittenLayer) -> anyhow::Result<WrittenLayer> {
    let path = writer.layout()?.blob_path(&plain.descriptor.digest);
    let mut gzip = std::process::Command::new("gzip")
        .arg("--stdout")
        .stdin(File::open(&path)?)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start gzip")?;
    let stream = gzip.stdout.take().context("gzip has no output")?;
    let layer = writer.layer_blob(stream, media_type::OCI_LAYER_GZIP, plain.diff_id)?;
    if !gzip.wait()?.success() {
        bail!("gzip could not compress a layer");
    }
    fs::remove_file(&path)?;
    Ok(layer)
}

/// A file that compresses about as programs do.
fn write_file(path: &Path, len_bytes: u64, state: &mut u64) -> anyhow::Result<()> {
    const WORDS: [&[u8; 20]; 4] =
        [b" the same words that", b" come back once more", b" or some other words", b" between the numbers"];
    let mut file = BufWriter::new(File::create(path)?);
    for _ in 0..len_bytes / 28 {
        let number = next_random(state);
        file.write_all(&number.to_le_bytes())?;
        file.write_all(WORDS[(number % 4) as usize])?;
    }
    Ok(file.flush()?)
}

/// Runs a controller with an empty state until all `images` are ready.
async fn round(work: &Path, name: &str, args: &BuildsArgs, images: &[String]) -> anyhow::Result<Round> {
    let (policies, state) = (work.join(format!("{name}-policies")), work.join(format!("{name}-state")));
    fs::create_dir(&policies)?;
    let document = |kind: &str, rest: Value| {
        let mut document =
            json!({"apiVersion": "hermes.cloudpilot.ai/v1alpha1", "kind": kind, "metadata": {"name": "all"}});
        if let (Some(document), Value::Object(rest)) = (document.as_object_mut(), rest) {
            document.extend(rest);
        }
        document.to_string()
    };
    let policy = document("HermesPolicy", json!({"spec": {"imageSelectors": [{"imageRegex": ""}]}}));
    fs::write(policies.join("policy.json"), policy)?;
    fs::write(policies.join("images.json"), document("ImageList", json!({"images": images})))?;
    let began = Instant::now();
    let mut controller = start(&policies, &state, args.core)?;
    let id = controller.id().context("the controller has ended")?;
    let status = state.join("status/policies/all.json");
    loop {
        let said = fs::read(&status).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        let said = said.map(|said| said["status"].clone()).unwrap_or_default();
        if said["ready"] == images.len() {
            break;
        }
        if said["failed"].as_i64().unwrap_or_default() > 0 {
            bail!("an image failed: {said}");
        }
        if let Some(status) = controller.try_wait()? {
            bail!("the controller ended with {status}; is taskset (package util-linux) installed?");
        }
        if began.elapsed() > ROUND_MAX {
            bail!("not ready after {} s: {said}", ROUND_MAX.as_secs());
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    let round = Round { elapsed: began.elapsed(), peak_mb: peak_mb(id)? };
    controller.kill().await?;
    Ok(round)
}

fn start(policies: &Path, state: &Path, core: u32) -> anyhow::Result<Child> {
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &core.to_string()]).arg(std::env::current_exe()?).args(["controller", "--policies"]);
    command.arg(policies).arg("--state").arg(state).args(["--builds", &IMAGES.to_string()]);
    command.arg("--hosts-dir").arg(state.join("hosts")).arg("--docker-config").arg(state.join("none.json"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
    command.spawn().context("cannot start taskset (package util-linux)")
}

/// Most memory that a process has had, by the kernel.
fn peak_mb(id: u32) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1.024 / 1000.0)
}
