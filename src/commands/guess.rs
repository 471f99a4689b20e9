//! `hermes index inspect --guess`: what a first start of an image is expected to read, and why.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use hermes_image::erofs::{self, Image};
use hermes_image::guess::{Command, Guess, GuessedFile, LIMITS, Source, guess};
use hermes_image::ids::{ChunkNo, DiffId, SpanNo};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::merge::merge;
use hermes_image::runs::Runs;
use hermes_image::span::SpanDecoder;
use hermes_image::verify::Verified;
use hermes_origin::{Origin, ResolvedImage};
use hermes_policy::profile::Profile;
use hermes_snapshotter::control::FailureClass;
use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::index::{OpenIndex, OpenLayerIndex};
use crate::output::{self, failure};

/// Time for one span, half a megabyte.
const SPAN_TIMEOUT: Duration = Duration::from_secs(60);
/// Spans that are kept: what is looked at next is mostly near what was looked at last. 32 MiB.
const SPANS_KEPT: usize = 64;
/// A layer that can only be read from its start is held in memory as a whole; it is not read for this when it is longer, in
/// bytes.
const STREAM_MAX_BYTES: u64 = 256 << 20;

type Chunks = Arc<Vec<(ChunkNo, Verified<Bytes>)>>;

/// Reads parts of layers from the registry.
struct Spans {
    origin: Arc<Origin>,
    image: Arc<ResolvedImage>,
    index: Arc<OpenIndex>,
    runtime: Handle,
    waits: Waits,
    kept: VecDeque<(u16, u32, Chunks)>,
}

impl Spans {
    async fn range(&mut self, layer: u16, range: Range<u64>) -> Option<Vec<u8>> {
        let index = Arc::clone(&self.index);
        let of = index.layers.get(usize::from(layer))?;
        let mut out = Vec::with_capacity(usize::try_from(range.end.checked_sub(range.start)?).ok()?);
        for chunk in of.chunks.covering(range.clone()) {
            let span = of.seek.spans().position(|span| span.chunks.contains(&chunk))?;
            let chunks = self.span(layer, of, u32::try_from(span).ok()?).await?;
            let bytes = &chunks.iter().find(|(no, _)| no.0 == chunk)?.1;
            let at = of.chunks.range(ChunkNo(chunk));
            let part = range.start.max(at.start) - at.start..range.end.min(at.end) - at.start;
            out.extend_from_slice(bytes.get(part.start as usize..part.end as usize)?);
        }
        Some(out)
    }

    async fn span(&mut self, layer: u16, of: &OpenLayerIndex, span: u32) -> Option<Chunks> {
        let known = self.kept.iter().find(|(in_layer, no, _)| (*in_layer, *no) == (layer, span));
        if let Some((_, _, chunks)) = known {
            return Some(Arc::clone(chunks));
        }
        if of.seek.count() == 1 && of.chunks.logical_len_bytes() > STREAM_MAX_BYTES {
            return None;
        }
        let window = of.seek.window_range(SpanNo(span));
        let window = of.windows.slice(window.start as usize..window.end as usize);
        let mut decoder = SpanDecoder::new(&of.seek, &of.chunks, SpanNo(span), &window).ok()?;
        let descriptor = self.image.layers.get(usize::from(layer))?;
        let deadline = (Instant::now() + SPAN_TIMEOUT).into();
        let mut body = std::pin::pin!(self.origin.read(descriptor, of.seek.blob_range(span..span + 1), deadline));
        let mut decoded = Vec::new();
        while let Some(piece) = body.next().await {
            decoder.push(&piece.ok()?, &mut decoded).ok()?;
        }
        decoder.finish().ok()?;
        let chunks = Arc::new(decoded);
        self.kept.push_back((layer, span, Arc::clone(&chunks)));
        if self.kept.len() > SPANS_KEPT {
            self.kept.pop_front();
        }
        Some(chunks)
    }
}

impl Source for Spans {
    fn read(&mut self, layer: u16, range: Range<u64>) -> Option<Vec<u8>> {
        let chunks = self.index.layers.get(usize::from(layer))?.chunks.covering(range.clone());
        self.waits.read(layer, chunks);
        self.runtime.clone().block_on(self.range(layer, range))
    }

    /// What is read here comes one by one, whatever is known of it: only the waits are counted.
    fn ahead(&mut self, parts: &[(u16, Range<u64>)]) {
        for (layer, range) in parts {
            let Some(of) = self.index.layers.get(usize::from(*layer)) else { continue };
            self.waits.ask(*layer, of.chunks.covering(range.clone()));
        }
    }

    fn found(&mut self, file: &GuessedFile) {
        self.ahead(&file.pieces);
    }
}

/// How often somebody waits who asks for everything that is announced at once, and for whom an answer takes one turn.
#[derive(Default)]
struct Waits {
    now: u32,
    /// The turn by which a chunk is there.
    due: BTreeMap<(u16, u32), u32>,
}

impl Waits {
    fn ask(&mut self, layer: u16, chunks: Range<u32>) {
        for chunk in chunks {
            self.due.entry((layer, chunk)).or_insert(self.now + 1);
        }
    }

    fn read(&mut self, layer: u16, chunks: Range<u32>) {
        self.ask(layer, chunks.clone());
        for chunk in chunks {
            self.now = self.now.max(self.due[&(layer, chunk)]);
        }
    }
}

/// A guess, and how long it takes to make it.
#[derive(Default)]
pub(super) struct Guessed {
    guess: Guess,
    /// Round trips of which each waits for the one before.
    waits: u32,
}

/// Guesses what a start reads; nothing for an image that says not what it runs.
pub(super) async fn of_image(
    origin: Arc<Origin>,
    image: Arc<ResolvedImage>,
    index: Arc<OpenIndex>,
) -> anyhow::Result<Guessed> {
    let Some(command) = Command::of_config(&image.config_bytes) else { return Ok(Guessed::default()) };
    let guessing = tokio::task::spawn_blocking(move || {
        let tocs: Vec<_> = index.layers.iter().map(|layer| layer.toc.clone()).collect();
        let tree = erofs::write(&merge(&tocs)?)?;
        let tree = Image::open(tree)?;
        let runtime = Handle::current();
        let mut spans = Spans { origin, image, index, runtime, kept: VecDeque::new(), waits: Waits::default() };
        let guess = guess(&tree, &command, LIMITS, &mut spans);
        anyhow::Ok(Guessed { guess, waits: spans.waits.now })
    });
    let guessed = guessing.await?;
    guessed.map_err(|error| failure(FailureClass::Corrupt, format!("the image's tree: {error}")))
}

/// How much of what a start reads a guess names, and how much of what it names is read.
struct Comparison {
    read: Size,
    guessed: Size,
    both: Size,
}

impl Comparison {
    /// With a profile of starts: its chunks are what is read.
    fn new(guess: &Guess, profile: &Profile, index: &OpenIndex) -> Self {
        let tables: Vec<_> = index.layers.iter().map(|layer| &layer.chunks).collect();
        let mut guessed: BTreeMap<DiffId, Runs> = BTreeMap::new();
        for (layer, runs) in guess.chunks(&tables) {
            guessed.entry(layer).or_default().insert_all(&runs);
        }
        let mut read: BTreeMap<DiffId, Runs> = BTreeMap::new();
        for step in &profile.steps {
            let Some(layer) = profile.layers.get(usize::from(step.layer)) else { continue };
            let Some(table) = tables.iter().find(|table| table.diff_id() == *layer) else { continue };
            let chunks = step.chunks.start.min(table.count())..step.chunks.end.min(table.count());
            read.entry(*layer).or_default().insert(chunks);
        }
        let both = |(layer, runs): (&DiffId, &Runs)| Some((*layer, runs.intersection(guessed.get(layer)?)));
        let both: BTreeMap<DiffId, Runs> = read.iter().filter_map(both).collect();
        let size = |of: &BTreeMap<DiffId, Runs>| Size::of(of.iter(), &tables);
        Self { read: size(&read), guessed: size(&guessed), both: size(&both) }
    }

    fn recall(&self) -> (f64, f64) {
        self.both.share_of(&self.read)
    }

    fn precision(&self) -> (f64, f64) {
        self.both.share_of(&self.guessed)
    }
}

/// Chunks and their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    chunks: u64,
    bytes: u64,
}

impl Size {
    fn of<'a>(layers: impl Iterator<Item = (&'a DiffId, &'a Runs)>, tables: &[&ChunkTable]) -> Self {
        let mut sum = Self { chunks: 0, bytes: 0 };
        for (layer, runs) in layers {
            let Some(table) = tables.iter().find(|table| table.diff_id() == *layer) else { continue };
            sum.chunks += runs.chunk_count();
            sum.bytes += runs.iter().map(|run| table.run_range(run)).map(|range| range.end - range.start).sum::<u64>();
        }
        sum
    }

    /// Of the bytes and of the chunks, in percent.
    fn share_of(&self, whole: &Self) -> (f64, f64) {
        let share = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
        (share(self.bytes, whole.bytes), share(self.chunks, whole.chunks))
    }
}

impl Guessed {
    /// For machines.
    pub(super) fn as_json(&self, profile: Option<&Profile>, index: &OpenIndex) -> Value {
        let files = self.guess.files.iter().map(|file| {
            let pieces = file
                .pieces
                .iter()
                .map(|(layer, range)| json!({"layer": layer, "start": range.start, "end": range.end}));
            let pieces: Vec<_> = pieces.collect();
            json!({"path": file.path, "reason": file.reason, "bytes": file.len_bytes(), "pieces": pieces})
        });
        let size = self.size(index);
        let compared = profile.map(|profile| {
            let compared = Comparison::new(&self.guess, profile, index);
            let (recall, precision) = (compared.recall(), compared.precision());
            json!({
                "read_chunks": compared.read.chunks, "read_bytes": compared.read.bytes,
                "recall_bytes_percent": recall.0, "recall_chunks_percent": recall.1,
                "precision_bytes_percent": precision.0, "precision_chunks_percent": precision.1,
            })
        });
        json!({
            "files": files.collect::<Vec<_>>(), "chunks": size.chunks, "chunk_bytes": size.bytes,
            "round_trips": self.waits, "cut": self.guess.is_cut, "profile": compared,
        })
    }

    /// For people.
    pub(super) fn as_table(&self, profile: Option<&Profile>, index: &OpenIndex) -> String {
        let files = self.guess.files.iter();
        let rows = files.map(|file| vec![file.path.clone(), output::bytes(file.len_bytes()), file.reason.clone()]);
        let size = self.size(index);
        let compared = profile.map(|profile| {
            let compared = Comparison::new(&self.guess, profile, index);
            let ((of_bytes, of_chunks), (right_bytes, right_chunks)) = (compared.recall(), compared.precision());
            format!(
                "the profile of recorded starts names {} chunks, {}: the guess has {of_bytes:.0} % of the bytes and {of_chunks:.0} % \
                 of the chunks; of its own, {right_bytes:.0} % and {right_chunks:.0} % are in the profile\n",
                compared.read.chunks,
                output::bytes(compared.read.bytes),
            )
        });
        format!(
            "\na first start is expected to read {} files, {} chunks, {}{}; found in {} round trips\n{}{}",
            self.guess.files.len(),
            size.chunks,
            output::bytes(size.bytes),
            if self.guess.is_cut { ", and more (a bound was met)" } else { "" },
            self.waits,
            compared.unwrap_or_default(),
            output::table(&["file", "bytes", "why"], rows.collect())
        )
    }

    fn size(&self, index: &OpenIndex) -> Size {
        let tables: Vec<_> = index.layers.iter().map(|layer| &layer.chunks).collect();
        let chunks = self.guess.chunks(&tables);
        Size::of(chunks.iter().map(|(layer, runs)| (layer, runs)), &tables)
    }
}
