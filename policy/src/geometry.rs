//! Where the chunks and spans of a layer lie, as far as policy needs it: to count bytes and to merge neighbours.

use std::ops::Range;

use hermes_image::chunk::CHUNK_LEN_BYTES;
use hermes_image::ids::ChunkRange;
use hermes_image::index::chunks::{CHUNK_ALIGN_BYTES, CHUNK_COUNT_MAX, CHUNK_LEN_MAX_BYTES, ChunkTable};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Numbers that describe no layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum GeometryError {
    /// More chunks than a layer may have.
    #[error("layer has more than {CHUNK_COUNT_MAX} chunks")]
    TooMany,
    /// A chunk that is empty, too long or off the grid.
    #[error("chunk {0} is empty, too long, or does not start at a multiple of {CHUNK_ALIGN_BYTES} bytes")]
    Chunk(u32),
    /// A span that is empty or out of order, does not begin with the layer or lies beyond it.
    #[error("span {0} is empty, out of order, or outside the layer")]
    Span(u32),
    /// A layer that is one stream has one span.
    #[error("a layer that is one stream has exactly one span, not {0}")]
    Stream(usize),
}

/// A run of whole chunks that one restart point of the decompressor decodes. It ends where the next one begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Its first chunk.
    pub first_chunk: u32,
    /// First byte of the compressed blob that decoding it reads.
    pub blob_start: u64,
    /// End of the compressed bytes that decoding it reads. May reach into the next span by a byte: deflate blocks
    /// begin at any bit.
    pub blob_end: u64,
}

/// Chunks and spans of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct LayerGeometry {
    /// Start of each chunk in units of 512 bytes.
    starts: Vec<u32>,
    len_bytes: u64,
    spans: Option<Vec<Span>>,
    whole_stream: bool,
}

/// [`LayerGeometry`] as it is written down.
#[derive(Serialize, Deserialize)]
struct Written {
    /// Lengths in bytes, and how often in a row.
    chunks: Vec<(u64, u32)>,
    /// First chunk, start and end in the blob.
    spans: Option<Vec<(u32, u64, u64)>>,
    whole_stream: bool,
}

impl From<LayerGeometry> for Written {
    fn from(layer: LayerGeometry) -> Self {
        let mut chunks: Vec<(u64, u32)> = Vec::new();
        for chunk in 0..layer.chunk_count() {
            let len = layer.len_bytes(&(chunk..chunk + 1));
            match chunks.last_mut() {
                Some((last, count)) if *last == len => *count += 1,
                _ => chunks.push((len, 1)),
            }
        }
        let written = |spans: Vec<Span>| spans.iter().map(|at| (at.first_chunk, at.blob_start, at.blob_end)).collect();
        Self { chunks, spans: layer.spans.map(written), whole_stream: layer.whole_stream }
    }
}

impl TryFrom<Written> for LayerGeometry {
    type Error = GeometryError;

    fn try_from(written: Written) -> Result<Self, GeometryError> {
        let lens = written.chunks.iter().flat_map(|(len, count)| std::iter::repeat_n(*len, *count as usize));
        let layer = Self::new(lens)?;
        let Some(spans) = written.spans else { return Ok(layer) };
        let span = |(first_chunk, blob_start, blob_end)| Span { first_chunk, blob_start, blob_end };
        let layer = layer.with_spans(spans.into_iter().map(span).collect())?;
        if written.whole_stream { layer.as_whole_stream() } else { Ok(layer) }
    }
}

impl LayerGeometry {
    /// The geometry of chunks with these lengths in bytes. No spans yet.
    ///
    /// # Errors
    /// When the lengths describe no layer.
    pub fn new(lens_bytes: impl IntoIterator<Item = u64>) -> Result<Self, GeometryError> {
        let (mut starts, mut len_bytes) = (Vec::new(), 0_u64);
        for len in lens_bytes {
            let chunk = starts.len() as u32;
            if chunk >= CHUNK_COUNT_MAX {
                return Err(GeometryError::TooMany);
            }
            let aligned = len_bytes.is_multiple_of(CHUNK_ALIGN_BYTES) && len > 0 && len <= CHUNK_LEN_MAX_BYTES;
            match u32::try_from(len_bytes / CHUNK_ALIGN_BYTES) {
                Ok(start) if aligned => starts.push(start),
                _ => return Err(GeometryError::Chunk(chunk)),
            }
            len_bytes += len;
        }
        Ok(Self { starts, len_bytes, spans: None, whole_stream: false })
    }

    /// The geometry of a chunk table. No spans yet.
    ///
    /// # Errors
    /// Never for a table that decoded; the checks are made again all the same.
    pub fn of_table(table: &ChunkTable) -> Result<Self, GeometryError> {
        Self::new((0..table.count()).map(|chunk| {
            let range = table.run_range(chunk..chunk + 1);
            range.end - range.start
        }))
    }

    /// Adds the spans, in order.
    ///
    /// # Errors
    /// When they do not cover the layer in order.
    pub fn with_spans(mut self, spans: Vec<Span>) -> Result<Self, GeometryError> {
        let mut before: Option<&Span> = None;
        for (no, span) in spans.iter().enumerate() {
            let in_order = match before {
                None => span.first_chunk == 0,
                Some(before) => span.first_chunk > before.first_chunk && span.blob_start >= before.blob_start,
            };
            if !in_order || span.first_chunk >= self.chunk_count() || span.blob_end <= span.blob_start {
                return Err(GeometryError::Span(no as u32));
            }
            before = Some(span);
        }
        if spans.is_empty() && self.chunk_count() > 0 {
            return Err(GeometryError::Span(0));
        }
        self.spans = Some(spans);
        Ok(self)
    }

    /// Says that the layer can only be decoded from its start, as one stream (a single zstd frame). It has one span.
    ///
    /// # Errors
    /// When it has more than one.
    pub fn as_whole_stream(mut self) -> Result<Self, GeometryError> {
        match self.spans.as_ref().map_or(0, Vec::len) {
            1 => self.whole_stream = true,
            count => return Err(GeometryError::Stream(count)),
        }
        Ok(self)
    }

    /// Number of chunks.
    pub fn chunk_count(&self) -> u32 {
        self.starts.len() as u32
    }

    /// Whether the layer can only be decoded from its start.
    pub fn is_whole_stream(&self) -> bool {
        self.whole_stream
    }

    /// Number of spans; `None` while they are not known.
    pub fn span_count(&self) -> Option<u32> {
        self.spans.as_ref().map(|spans| spans.len() as u32)
    }

    /// Logical start of `chunk` in bytes; the end of the layer for numbers beyond the last.
    pub fn start_bytes(&self, chunk: u32) -> u64 {
        self.starts.get(chunk as usize).map_or(self.len_bytes, |start| u64::from(*start) * CHUNK_ALIGN_BYTES)
    }

    /// Length of a run of chunks in bytes.
    pub fn len_bytes(&self, run: &ChunkRange) -> u64 {
        self.start_bytes(run.end).saturating_sub(self.start_bytes(run.start))
    }

    /// The first chunk that ends beyond the logical offset, or the number of chunks.
    pub fn chunk_at(&self, offset_bytes: u64) -> u32 {
        if offset_bytes >= self.len_bytes {
            return self.chunk_count();
        }
        let after = self.starts.partition_point(|start| u64::from(*start) * CHUNK_ALIGN_BYTES <= offset_bytes);
        after as u32 - 1
    }

    /// The chunks that lie, at least in part, within so many bytes before `chunk` or after its start. It is one of them.
    pub fn around(&self, chunk: u32, behind_bytes: u64, ahead_bytes: u64) -> ChunkRange {
        let at = self.start_bytes(chunk);
        let first = self.chunk_at(at.saturating_sub(behind_bytes)).min(chunk);
        first..self.chunk_at(at.saturating_add(ahead_bytes)).max(chunk + 1)
    }

    /// The part of `run` that is of the same file as its first chunk, as far as lengths tell: a long file is cut every
    /// [`CHUNK_LEN_BYTES`], so it ends with the first chunk of another length. When neither the first chunk nor the one
    /// before it has that length they tell nothing (it may hold many small files), and all of `run` is meant.
    pub fn same_file(&self, run: ChunkRange) -> ChunkRange {
        let is_cut = |chunk: u32| self.len_bytes(&(chunk..chunk + 1)) == CHUNK_LEN_BYTES;
        if !is_cut(run.start) && !run.start.checked_sub(1).is_some_and(is_cut) {
            return run;
        }
        let last = run.clone().find(|chunk| !is_cut(*chunk));
        run.start..last.map_or(run.end, |last| last + 1)
    }

    /// The span that holds `chunk`, while spans are known.
    pub(crate) fn span_of(&self, chunk: u32) -> Option<u32> {
        let after = self.spans.as_ref()?.partition_point(|span| span.first_chunk <= chunk);
        (after > 0).then(|| after as u32 - 1)
    }

    /// The extent that holds `chunk`: the neighbouring spans that begin in the same `extent_bytes` of logical bytes. So
    /// extents never share a span, and every node finds the same ones. `None` while spans are not known.
    pub fn extent_of(&self, chunk: u32, extent_bytes: u64) -> Option<ChunkRange> {
        let spans = self.spans.as_ref()?;
        let start = |span: &Span| self.start_bytes(span.first_chunk);
        let own = self.span_of(chunk)? as usize;
        let start_bytes = start(spans.get(own)?) / extent_bytes.max(1) * extent_bytes.max(1);
        let end_bytes = start_bytes.saturating_add(extent_bytes.max(1));
        // Of a layer with thousands of spans its extents have some.
        let before = spans[..own].iter().rev().take_while(|span| start(span) >= start_bytes).count();
        let after = spans[own..].iter().take_while(|span| start(span) < end_bytes).count();
        Some(self.span_chunks(&((own - before) as u32..(own + after) as u32)))
    }

    /// The chunks of a run of spans; empty while spans are not known.
    pub fn span_chunks(&self, spans: &Range<u32>) -> ChunkRange {
        let Some(all) = self.spans.as_ref().filter(|_| !spans.is_empty()) else { return 0..0 };
        let edge = |no: u32| all.get(no as usize).map_or(self.chunk_count(), |span| span.first_chunk);
        edge(spans.start)..edge(spans.end)
    }

    /// The bytes of the blob that a run of spans reads; empty while spans are not known.
    pub fn span_bytes(&self, spans: &Range<u32>) -> Range<u64> {
        let all = self.spans.as_deref().unwrap_or_default();
        let (Some(first), Some(last)) =
            (all.get(spans.start as usize), spans.end.checked_sub(1).and_then(|last| all.get(last as usize)))
        else {
            return 0..0;
        };
        first.blob_start..last.blob_end.max(first.blob_start)
    }

    /// The first span at or after `from` whose bytes end beyond `blob_end`, or the number of spans.
    pub(crate) fn first_span_beyond(&self, from: u32, blob_end: u64) -> u32 {
        let all = self.spans.as_deref().unwrap_or_default();
        let rest = all.get(from as usize..).unwrap_or_default();
        from + rest.iter().position(|span| span.blob_end > blob_end).unwrap_or(rest.len()) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_around_a_chunk_ends_with_the_layer() {
        let layer = LayerGeometry::new([512, 65_536, 1_024, 700]).expect("valid");
        for (chunk, behind, ahead, expected) in [
            (0, 0, 0, 0..1),
            (2, 0, 1, 2..3),
            (2, 1, 0, 1..3),
            (2, 65_537, 2_000, 0..4),
            (3, 0, u64::MAX, 3..4),
            (1, u64::MAX, 1, 0..2),
        ] {
            assert_eq!(layer.around(chunk, behind, ahead), expected, "{behind} before and {ahead} after chunk {chunk}");
        }
    }

    fn span(first_chunk: u32, blob_start: u64, blob_end: u64) -> Span {
        Span { first_chunk, blob_start, blob_end }
    }

    #[test]
    fn chunks_and_spans_are_found() {
        let layer = LayerGeometry::new([512, 65_536, 1_024, 700]).expect("valid");
        let layer = layer.with_spans(vec![span(0, 10, 40), span(2, 39, 90)]).expect("valid");
        assert_eq!((layer.chunk_count(), layer.span_count()), (4, Some(2)));
        assert_eq!(layer.len_bytes(&(1..4)), 65_536 + 1_024 + 700);
        assert_eq!([0, 511, 512, 66_048, 67_771, 67_772].map(|at| layer.chunk_at(at)), [0, 0, 1, 2, 3, 4]);
        assert_eq!([0, 1, 2, 3].map(|chunk| layer.span_of(chunk)), [Some(0), Some(0), Some(1), Some(1)]);
        assert_eq!(
            (layer.span_chunks(&(0..1)), layer.span_chunks(&(0..2)), layer.span_chunks(&(1..1))),
            (0..2, 0..4, 0..0)
        );
        assert_eq!(
            (layer.span_bytes(&(0..2)), layer.span_bytes(&(0..1)), layer.span_bytes(&(5..6))),
            (10..90, 10..40, 0..0)
        );
        assert_eq!((layer.first_span_beyond(0, 40), layer.first_span_beyond(0, 90)), (1, 2));
    }

    #[test]
    fn extents_are_whole_spans_and_cover_the_layer() {
        let spans = (0..10).map(|no| span(no * 3, u64::from(no), u64::from(no) + 1)).collect();
        let layer = LayerGeometry::new([65_536; 30]).and_then(|layer| layer.with_spans(spans)).expect("valid");
        // Spans begin at 0, 3, 6 ... chunks; those that begin below 8, 16, 24 chunks belong together.
        let extents: Vec<_> =
            (0..30).map(|chunk| layer.extent_of(chunk, 8 * 65_536).expect("spans are known")).collect();
        let expected = [0..9, 9..18, 18..24, 24..30];
        for (chunk, extent) in extents.into_iter().enumerate() {
            assert!(expected.contains(&extent) && extent.contains(&(chunk as u32)), "{chunk}: {extent:?}");
        }
        assert_eq!(layer.extent_of(5, 0), Some(3..6), "each span for itself");
        assert_eq!(layer.extent_of(5, u64::MAX), Some(0..30));
        assert_eq!(LayerGeometry::new([512]).expect("valid").extent_of(0, 1), None);
    }

    #[test]
    fn a_file_ends_with_the_first_chunk_of_another_length() {
        let layer = LayerGeometry::new([512, 65_536, 65_536, 1_024, 65_536, 65_536]).expect("valid");
        assert_eq!(
            [0..6, 1..6, 1..3, 3..6, 4..6, 6..6].map(|run| layer.same_file(run)),
            [0..6, 1..4, 1..3, 3..4, 4..6, 6..6]
        );
    }

    #[test]
    fn what_is_no_layer_is_refused() {
        assert_eq!(LayerGeometry::new([0]), Err(GeometryError::Chunk(0)));
        assert_eq!(LayerGeometry::new([CHUNK_LEN_MAX_BYTES + 1]), Err(GeometryError::Chunk(0)));
        assert_eq!(LayerGeometry::new([100, 512]), Err(GeometryError::Chunk(1)));
        let layer = LayerGeometry::new([512; 4]).expect("valid");
        for (spans, bad) in [
            (vec![], 0),
            (vec![span(1, 0, 1)], 0),
            (vec![span(0, 5, 5)], 0),
            (vec![span(0, 0, 5), span(0, 5, 6)], 1),
            (vec![span(0, 5, 6), span(1, 0, 1)], 1),
            (vec![span(0, 0, 5), span(4, 5, 6)], 1),
        ] {
            assert_eq!(layer.clone().with_spans(spans), Err(GeometryError::Span(bad)));
        }
        assert_eq!(layer.clone().as_whole_stream(), Err(GeometryError::Stream(0)));
        assert!(layer.with_spans(vec![span(0, 0, 9)]).and_then(LayerGeometry::as_whole_stream).is_ok());
    }
}
