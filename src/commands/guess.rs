//! `hermes index inspect --guess`: what a first start of an image is expected to read, and why.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use hermes_image::erofs::{self, Image};
use hermes_image::guess::{Command, Guess, LIMITS, guess};
use hermes_image::ids::{ChunkNo, SpanNo};
use hermes_image::merge::merge;
use hermes_image::span::SpanDecoder;
use hermes_image::verify::Verified;
use hermes_origin::{Origin, ResolvedImage};
use hermes_snapshotter::control::FailureClass;
use serde_json::{Value, json};

use super::index::{OpenIndex, OpenLayerIndex};
use crate::output::{self, failure};

/// Time for one span, half a megabyte.
const SPAN_TIMEOUT: Duration = Duration::from_secs(60);
/// Spans that are kept: what is looked at next is mostly near what was looked at last. 32 MiB.
const SPANS_KEPT: usize = 64;
/// A layer that can only be read from its start is not read for this when it is longer, in bytes.
const STREAM_MAX_BYTES: u64 = 64 << 20;

type Chunks = Arc<Vec<(ChunkNo, Verified<Bytes>)>>;

/// Reads parts of layers from the registry.
struct Spans {
    origin: Arc<Origin>,
    image: Arc<ResolvedImage>,
    index: Arc<OpenIndex>,
    kept: VecDeque<(u16, u32, Chunks)>,
}

impl Spans {
    /// The bytes of a range; `None` when they cannot be had, which ends the guess there.
    async fn read(&mut self, layer: u16, range: Range<u64>) -> Option<Vec<u8>> {
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

/// Guesses what a start reads; nothing for an image that says not what it runs.
pub(super) async fn of_image(
    origin: Arc<Origin>,
    image: Arc<ResolvedImage>,
    index: Arc<OpenIndex>,
) -> anyhow::Result<Guess> {
    let Some(command) = Command::of_config(&image.config_bytes) else { return Ok(Guess::default()) };
    let guessing = tokio::task::spawn_blocking(move || {
        let tocs: Vec<_> = index.layers.iter().map(|layer| layer.toc.clone()).collect();
        let tree = erofs::write(&merge(&tocs)?)?;
        let tree = Image::open(tree)?;
        let runtime = tokio::runtime::Handle::current();
        let mut spans = Spans { origin, image, index, kept: VecDeque::new() };
        let mut read = |layer: u16, range: Range<u64>| runtime.block_on(spans.read(layer, range));
        anyhow::Ok(guess(&tree, &command, LIMITS, &mut read))
    });
    let guessed = guessing.await?;
    guessed.map_err(|error| failure(FailureClass::Corrupt, format!("the image's tree: {error}")))
}

/// For machines.
pub(super) fn as_json(guess: &Guess, index: &OpenIndex) -> Value {
    let files = guess.files.iter().map(|file| {
        let pieces = file.pieces.iter().map(|(layer, range)| json!({"layer": layer, "start": range.start, "end": range.end}));
        json!({"path": file.path, "reason": file.reason, "bytes": file.len_bytes(), "pieces": pieces.collect::<Vec<_>>()})
    });
    let (chunks, bytes) = chunks(guess, index);
    json!({"files": files.collect::<Vec<_>>(), "chunks": chunks, "chunk_bytes": bytes, "cut": guess.is_cut})
}

/// For people.
pub(super) fn as_table(guess: &Guess, index: &OpenIndex) -> String {
    let rows =
        guess.files.iter().map(|file| vec![file.path.clone(), output::bytes(file.len_bytes()), file.reason.clone()]);
    let (chunks, bytes) = chunks(guess, index);
    format!(
        "\na first start is expected to read {} files, {chunks} chunks, {}{}\n{}",
        guess.files.len(),
        output::bytes(bytes),
        if guess.is_cut { ", and more (a bound was met)" } else { "" },
        output::table(&["file", "bytes", "why"], rows.collect())
    )
}

fn chunks(guess: &Guess, index: &OpenIndex) -> (u64, u64) {
    let tables: Vec<_> = index.layers.iter().map(|layer| &layer.chunks).collect();
    let ordered = guess.chunks(&tables);
    let len = |(diff_id, runs): &(_, hermes_image::runs::Runs)| {
        let table = tables.iter().find(|table| table.diff_id() == *diff_id);
        table.map_or(0, |table| {
            runs.iter().map(|run| table.run_range(run)).map(|range| range.end - range.start).sum::<u64>()
        })
    };
    (ordered.iter().map(|(_, runs)| runs.chunk_count()).sum(), ordered.iter().map(len).sum())
}
