//! `hermes bench index`: building an index, against plain inflate and `gzip -dc`.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::Args;
use hermes_image::build::{Expect, LayerBuilder, Options};
use hermes_image::inflate::{Compression, Decoder};
use hermes_origin::LayerDescriptor;
use hermes_registry::Layout;

use super::report::{self, Line};
use crate::commands::ImageArgs;
use crate::output;

/// What is read from the blob at once.
const PIECE_LEN_BYTES: usize = 256 * 1024;

/// Arguments of `hermes bench index`.
#[derive(Debug, Args)]
pub(crate) struct IndexArgs {
    /// An OCI layout, as oci:PATH[:TAG]; its largest gzip layer is measured.
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Rounds; the best of each figure counts, because noise only ever adds.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark.
pub(super) async fn run(args: IndexArgs) -> anyhow::Result<()> {
    let Some(path) = args.image.strip_prefix("oci:") else { bail!("give a layout, as oci:PATH[:TAG]") };
    let (_, image) =
        crate::commands::index::resolve(&ImageArgs { image: args.image.clone(), platform: None, plain_http: false })
            .await?;
    let gzip =
        image.layers.iter().filter(|layer| layer.media_type.as_deref().is_some_and(|kind| kind.ends_with("gzip")));
    let layer = gzip.max_by_key(|layer| layer.len_bytes).context("the image has no gzip layer")?.clone();
    let layout =
        path.rsplit_once(':').map_or(path, |(path, tag)| if tag.contains('/') { &args.image[4..] } else { path });
    let blob = Layout::open(layout)?.blob_path(&layer.layer.into());
    let (rounds, json) = (args.rounds, args.json);
    let lines = tokio::task::spawn_blocking(move || measure(&blob, &layer, rounds)).await??;
    report::print("index build", &lines, json)
}

fn measure(blob: &Path, layer: &LayerDescriptor, rounds: u32) -> anyhow::Result<Vec<Line>> {
    // Into the page cache, so that the disk is not what is measured.
    std::io::copy(&mut File::open(blob)?, &mut std::io::sink())?;
    let (mut gzip, mut library, mut build) = (f64::MAX, f64::MAX, f64::MAX);
    let mut logical = 0;
    let mut sizes = (0, 0);
    for _ in 0..rounds {
        gzip = gzip.min(time(|| plain_gzip(blob))?);
        library = library.min(time(|| inflate(blob).map(|len| logical = len))?);
        build = build.min(time(|| build_index(blob, layer).map(|made| sizes = made))?);
    }
    let peak = peak_memory_bytes()?;
    let speed = |seconds: f64| format!("{:.0} MB/s of output", logical as f64 / seconds / 1e6);
    let part = |bytes: u64| format!("{} of {}", output::bytes(bytes), output::bytes(layer.len_bytes));
    let line = |what: &str, figure, against: String, ratio, reach| Line {
        what: what.to_owned(),
        figure,
        against,
        ratio,
        reach,
    };
    Ok(vec![
        line("build", speed(build), format!("the library's inflate {}", speed(library)), library / build, ">= 0.7"),
        line("build", speed(build), format!("gzip -dc {}", speed(gzip)), gzip / build, ""),
        line("peak memory", output::bytes(peak), "256 MiB".to_owned(), peak as f64 / (256 << 20) as f64, "<= 1.0"),
        line(
            "toc and chunk table",
            part(sizes.0),
            "the layer".to_owned(),
            sizes.0 as f64 / layer.len_bytes as f64,
            "<= 0.004",
        ),
        line("seek table", part(sizes.1), "the layer".to_owned(), sizes.1 as f64 / layer.len_bytes as f64, "<= 0.010"),
    ])
}

fn time(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

fn plain_gzip(blob: &Path) -> anyhow::Result<()> {
    let status = Command::new("gzip").arg("-dc").stdin(File::open(blob)?).stdout(Stdio::null()).status()?;
    if status.success() { Ok(()) } else { bail!("gzip could not read the layer") }
}

/// The library alone: no restart points, no hashes.
pub(super) fn inflate(blob: &Path) -> anyhow::Result<u64> {
    let mut decoder = Decoder::new(Compression::Gzip)?;
    let mut output = vec![0; PIECE_LEN_BYTES];
    let mut total = 0;
    each_piece(blob, |mut piece| {
        loop {
            let step = decoder.step(piece, &mut output)?;
            total += step.produced as u64;
            piece = &piece[step.consumed..];
            if step.is_stuck() {
                return Ok(());
            }
        }
    })?;
    decoder.finish()?;
    Ok(total)
}

/// The whole build; returns the lengths in their wire form of TOC and chunk table, and of the seek table.
fn build_index(blob: &Path, layer: &LayerDescriptor) -> anyhow::Result<(u64, u64)> {
    let expect = Expect { layer: layer.layer, diff_id: layer.diff_id, compressed_len_bytes: layer.len_bytes };
    let mut builder = LayerBuilder::new(expect, Options::default())?;
    each_piece(blob, |piece| Ok(builder.push(piece)?))?;
    let index = builder.finish()?;
    let wire = |bytes: &[u8]| hermes_image::index::wire::pack(bytes).len() as u64;
    Ok((wire(index.toc.bytes()) + wire(index.chunks.bytes()), wire(index.seek.bytes()) + wire(&index.windows)))
}

fn each_piece(blob: &Path, mut work: impl FnMut(&[u8]) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut file = File::open(blob)?;
    let mut piece = vec![0; PIECE_LEN_BYTES];
    loop {
        let len = file.read(&mut piece)?;
        if len == 0 {
            return Ok(());
        }
        work(&piece[..len])?;
    }
}

/// Most memory that this process has had, by the kernel.
fn peak_memory_bytes() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM in /proc/self/status")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}
