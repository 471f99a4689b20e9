//! `hermes bench recorder`: what recording a start costs reads of what is present, against the same reads without it.
//!
//! Once with the path alone that answers the kernel (a read of the store, then the note), where nothing hides the difference, and once
//! as readers see it, through a FUSE tree whose pages are dropped before each pass while those of the store stay. There the passes of
//! one round are compared with each other, and the median of the rounds counts: from round to round such reads differ by a tenth.

use std::fs::File;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use hermes_image::ids::{ChunkId, ChunkNo, DiffId};
use hermes_image::index::chunks::ChunkTableBuilder;
use hermes_image::runs::Runs;
use hermes_lab::guard::wait_for;
use hermes_snapshotter::profile::Touches;
use hermes_snapshotter::status::Way;
use hermes_store::{Layer, Store, StoreConfig};
use rustix::fs::{Advice, fadvise};

use super::report::{self, Line, Spread};
use super::stage::Stage;
use super::workload::{self, Measured};
use crate::commands::child::{ChildMount, ChildNode};

/// Length of a chunk, as images have them.
const CHUNK_LEN_BYTES: usize = 65_536;
/// Small files that are read before anything is measured.
const WARM_UP_FILES: u64 = 2_000;
/// How long a start may take to settle: ten seconds after its last first read.
const SETTLED_MAX: Duration = Duration::from_secs(30);

/// Arguments of `hermes bench recorder`.
#[derive(Debug, Args)]
pub(crate) struct RecorderArgs {
    /// Length of the layer that is read, in MiB; through the FUSE tree it is four times as long.
    #[arg(long, default_value_t = 64)]
    mib: u32,
    /// Length of each read, in KiB: the kernel reads 4 to 1,024.
    #[arg(long, default_value_t = 64)]
    read_kib: usize,
    /// Rounds; the best of each figure counts, because noise only ever adds.
    #[arg(long, default_value_t = 25)]
    rounds: u32,
    /// Rounds through the FUSE tree, of some thirteen seconds each; the median counts.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    fuse_rounds: u32,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark.
pub(super) async fn run(args: RecorderArgs) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(move || measure(&args)).await?
}

fn measure(args: &RecorderArgs) -> anyhow::Result<()> {
    let work = tempfile::Builder::new().prefix("hermes-bench-").tempdir_in("/var/tmp")?;
    let store = Store::open(StoreConfig::new(work.path()))?;
    let layer = present_layer(&store, args.mib * 16)?;
    let touches = Arc::new(Touches::new(layer.table().count()));
    let mut buffer = vec![0; args.read_kib.max(1) << 10];
    let (mut off, mut first, mut on) = (f64::MAX, f64::MAX, f64::MAX);
    for _ in 0..args.rounds {
        off = off.min(read_all(&layer, &touches, &mut buffer)?);
        let claim = touches.claim().context("a slot is free")?;
        first = first.min(read_all(&layer, &touches, &mut buffer)?);
        on = on.min(read_all(&layer, &touches, &mut buffer)?);
        drop(claim);
    }
    let len_bytes = layer.table().logical_len_bytes() as f64;
    let speed = |seconds: f64| format!("{:.0} MB/s", len_bytes / seconds / 1e6);
    let line = |what: &str, seconds: f64| Line {
        what: format!("{what}, reads of {} KiB", args.read_kib),
        figure: speed(seconds),
        against: format!("without it {}", speed(off)),
        ratio: off / seconds,
        reach: ">= 0.98",
    };
    let mut lines = vec![line("first reads", first), line("later reads", on)];
    lines.extend(through_fuse(args)?);
    report::print("recording a start", &lines, args.json)
}

/// A way to read the file, as a reader of the tree does.
type Pass = fn(&Path) -> anyhow::Result<Measured>;

/// What one round gives, in bytes or reads a second.
struct Rates {
    /// First reads while a start is recorded.
    first: f64,
    /// Later reads while it is.
    later: f64,
    /// When it is over.
    off: f64,
}

/// The same through the kernel.
fn through_fuse(args: &RecorderArgs) -> anyhow::Result<Vec<Line>> {
    let work = tempfile::Builder::new().prefix("hermes-bench-").tempdir_in("/var/tmp")?;
    let stage = Stage::make(work.path(), u64::from(args.mib) << 22, WARM_UP_FILES)?;
    let (node, image) = (ChildNode::new(work.path(), "bench")?, stage.image());
    let mount = ChildMount { image: &image, way: Some(Way::FuseTree), ..ChildMount::default() };
    node.mount(&mount)?;
    node.complete()?;
    let big = Stage::big(node.dir());
    let passes: [(&str, &str, Pass); 2] =
        [("one after the other", "B/s", workload::sequential), ("random 4 KiB", "reads/s", workload::random)];
    let mut lines = Vec::new();
    for (what, unit, pass) in passes {
        let mut rounds = Vec::new();
        for _ in 0..args.fuse_rounds {
            node.stop();
            node.mount(&mount)?;
            // Other files first: the first reads of a daemon are slower than all later ones.
            workload::read_files(&workload::shuffled_files(&Stage::small(node.dir()))?)?;
            let (first, later) = (uncached(&big, pass)?, uncached(&big, pass)?);
            wait_for("the end of the start", SETTLED_MAX, || {
                let status = node.status().ok()?;
                let start = status.images.first()?.start.as_ref()?;
                (!start.recording).then_some(())
            })?;
            rounds.push(Rates { first, later, off: uncached(&big, pass)? });
        }
        let line = |reads: &str, rate: fn(&Rates) -> f64| {
            let median =
                |of: &dyn Fn(&Rates) -> f64| Spread::of(rounds.iter().map(of)).expect("there is a round").median;
            Line {
                what: format!("{reads} through FUSE, {what}"),
                figure: report::rate(median(&rate), unit),
                against: format!("without it {}", report::rate(median(&|round| round.off), unit)),
                ratio: median(&|round| rate(round) / round.off),
                reach: ">= 0.98",
            }
        };
        lines.extend([line("first reads", |round| round.first), line("later reads", |round| round.later)]);
    }
    Ok(lines)
}

/// How quickly a file is read of which the kernel has nothing.
fn uncached(path: &Path, pass: Pass) -> anyhow::Result<f64> {
    fadvise(&File::open(path)?, 0, None, Advice::DontNeed)?;
    Ok(pass(path)?.rate())
}

/// A layer of which all is here.
fn present_layer(store: &Store, chunks: u32) -> anyhow::Result<Arc<Layer>> {
    let bytes = |chunk: u32| bytes::Bytes::from(vec![chunk as u8; CHUNK_LEN_BYTES]);
    let mut table = ChunkTableBuilder::default();
    for chunk in 0..chunks {
        table.push(ChunkId::of(&bytes(chunk)), CHUNK_LEN_BYTES as u64)?;
    }
    let table = table.finish(DiffId([1; 32]));
    let layer = store.layer(&table)?;
    for chunk in 0..chunks {
        let verified = table.verify(ChunkNo(chunk), bytes(chunk)).map_err(|error| anyhow::anyhow!("{error}"))?;
        layer.put(ChunkNo(chunk), &verified)?;
    }
    Ok(layer)
}

/// Seconds that reading all of it takes.
fn read_all(layer: &Layer, touches: &Touches, buffer: &mut [u8]) -> anyhow::Result<f64> {
    let len_bytes = layer.table().logical_len_bytes();
    let started = Instant::now();
    let mut at = 0;
    while at < len_bytes {
        black_box(layer.read_at(at, buffer)?);
        let end = (at + buffer.len() as u64).min(len_bytes);
        if touches.is_active() {
            touches.read(layer.table().covering(at..end), &Runs::new());
        }
        at = end;
    }
    Ok(started.elapsed().as_secs_f64())
}
