//! Spans on demand (SOCI): a read that misses fetches the spans that it touches, each by one request, and waits until they are decoded.

use std::ops::Range;

use hermes_image::runs::Runs;
use hermes_policy::event::ReadId;

use super::Step;
use crate::queue::Nanos;
use crate::shape::Shape;
use crate::strategy::model::LAZY;
use crate::world::{Happening, World};

/// Spans of the shape that make one of the model, by layer.
pub(super) fn spans(shape: &Shape) -> Vec<Vec<Range<u32>>> {
    let of_layer = |layer: &crate::shape::ShapeLayer| {
        let geometry = &layer.geometry;
        let (mut spans, mut first, mut len_bytes) = (Vec::new(), 0, 0);
        for span in 0..geometry.span_count().unwrap_or(0) {
            let more = geometry.len_bytes(&geometry.span_chunks(&(span..span + 1)));
            if len_bytes > 0 && len_bytes + more > LAZY.span_bytes {
                spans.push(first..span);
                (first, len_bytes) = (span, 0);
            }
            len_bytes += more;
        }
        spans.push(first..geometry.span_count().unwrap_or(0));
        spans
    };
    shape.layers.iter().map(of_layer).collect()
}

impl World {
    fn lazy_chunks(&self, layer: u16, span: u32) -> Range<u32> {
        let place = usize::from(layer);
        self.shape.layers[place].geometry.span_chunks(&self.rivals.spans[place][span as usize])
    }

    /// Compressed bytes of a span.
    pub(super) fn lazy_len(&self, layer: u16, span: u32) -> u64 {
        let place = usize::from(layer);
        let bytes = self.shape.layers[place].geometry.span_bytes(&self.rivals.spans[place][span as usize]);
        bytes.end - bytes.start
    }

    /// A read misses: what is not on its way is asked for.
    pub(in crate::world) fn lazy_need(&mut self, no: u32, layer: u16, chunks: &Runs) {
        let missing = chunks.difference(&self.nodes[no as usize].layers[usize::from(layer)].have);
        let count = self.rivals.spans[usize::from(layer)].len() as u32;
        for run in missing.iter() {
            let begins_before = |no: u32| self.lazy_chunks(layer, no).end <= run.start;
            let mut span = partition(count, begins_before);
            while span < count && self.lazy_chunks(layer, span).start < run.end {
                self.want_span(no, layer, span);
                span += 1;
            }
        }
    }

    fn want_span(&mut self, no: u32, layer: u16, span: u32) {
        if self.rival_of(no).spans_under_way.insert((layer, span)) {
            self.ask_for(no, layer, span, None);
        }
    }

    /// All bytes of a span are here; it is decoded before anything of it is given.
    pub(super) fn span_is_here(&mut self, no: u32, layer: u16, span: u32) {
        let bytes = self.shape.layers[usize::from(layer)].geometry.len_bytes(&self.lazy_chunks(layer, span));
        let life = self.nodes[no as usize].life;
        self.queue
            .after(LAZY.decode.time(bytes), Happening::Rival { node: no, life, step: Step::Decoded { layer, span } });
    }

    /// A span can be read.
    pub(super) fn decoded(&mut self, no: u32, layer: u16, span: u32) {
        let chunks = self.lazy_chunks(layer, span);
        self.rival_of(no).spans_under_way.remove(&(layer, span));
        let node = &mut self.nodes[no as usize];
        node.layers[usize::from(layer)].have.insert(chunks);
        let have = &node.layers[usize::from(layer)].have;
        let full = node.reads.iter().filter(|(_, read)| read.layer == layer && read.chunks.difference(have).is_empty());
        let full: Vec<ReadId> = full.map(|(read, _)| *read).collect();
        full.into_iter().for_each(|read| self.delivered(no, read));
    }

    /// A request has failed: it is made again after the model's back-off.
    pub(super) fn span_failed(&mut self, no: u32, layer: u16, span: u32) {
        let at: Nanos = self.rival_of(no).rests_until;
        let life = self.nodes[no as usize].life;
        self.queue.at(at, Happening::Rival { node: no, life, step: Step::Again { layer, span } });
    }

    pub(super) fn span_again(&mut self, no: u32, layer: u16, span: u32) {
        self.ask_for(no, layer, span, None);
    }
}

/// The first of `count` numbers for which `before` does not hold.
fn partition(count: u32, before: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        if before(middle) { low = middle + 1 } else { high = middle }
    }
    low
}
