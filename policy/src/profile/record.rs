//! One start, as a node saw it.

use std::collections::BTreeSet;

use hermes_image::ids::{ChunkRange, DiffId};

use super::{CHUNKS_MAX, LAYERS_MAX, START_MAX_MS, TOUCHES_MAX};

/// Where the bytes of a chunk had come from when they were first read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TouchSource {
    /// They were on the node before the image was shown.
    Here,
    /// Another layer on the node.
    Local,
    /// A peer.
    Peer,
    /// A registry.
    Registry,
}

impl TouchSource {
    /// All of them, by their codes.
    pub const ALL: [Self; 4] = [Self::Here, Self::Local, Self::Peer, Self::Registry];

    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Here => "here",
            Self::Local => "local",
            Self::Peer => "peer",
            Self::Registry => "registry",
        }
    }
}

/// The first read of one chunk, for [`StartRecord::of`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FirstTouch {
    /// Milliseconds since the first read of the start.
    pub at_ms: u32,
    /// The layer, by its place among the record's.
    pub layer: u16,
    /// The chunk.
    pub chunk: u32,
    /// Whether the reader had to wait: it was read on demand. Else it was here already: read ahead, prefetched, or fetched
    /// with a neighbour or by an earlier start.
    pub waited: bool,
    /// Where its bytes came from.
    pub source: TouchSource,
}

/// Neighbouring chunks that were first read at one time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Touch {
    /// Milliseconds since the first read of the start, at most [`START_MAX_MS`].
    pub at_ms: u32,
    /// The layer, by its place in [`StartRecord::layers`].
    pub layer: u16,
    /// The chunks, never none: start and end.
    pub chunks: (u32, u32),
    /// See [`FirstTouch::waited`].
    pub waited: bool,
    /// See [`FirstTouch::source`].
    pub source: TouchSource,
}

impl Touch {
    /// The chunks.
    pub fn range(&self) -> ChunkRange {
        self.chunks.0..self.chunks.1
    }
}

/// One start.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct StartRecord {
    /// When it had settled, in Unix seconds.
    pub ended_seconds: u64,
    /// The layers of the image whose reads were seen, lowest first. Of the others the record says nothing.
    pub layers: Vec<DiffId>,
    /// What was read, first things first. No chunk is in two of them.
    pub(super) touches: Vec<Touch>,
}

impl StartRecord {
    /// The record of a start that read `touches`, in any order. What is beyond the bounds of a record is left out, the latest
    /// first: touches of layers that are none, later ones of the same chunk, those after [`START_MAX_MS`].
    pub fn of(ended_seconds: u64, mut layers: Vec<DiffId>, mut touches: Vec<FirstTouch>) -> Self {
        layers.truncate(LAYERS_MAX);
        touches.sort_unstable();
        let mut known = BTreeSet::new();
        let mut runs: Vec<Touch> = Vec::new();
        for touch in touches {
            let is_bounded = touch.at_ms <= START_MAX_MS && (known.len() as u64) < CHUNKS_MAX;
            if !is_bounded || usize::from(touch.layer) >= layers.len() || !known.insert((touch.layer, touch.chunk)) {
                continue;
            }
            let is_full = runs.len() == TOUCHES_MAX;
            match runs.last_mut() {
                Some(run) if run.continues(&touch) => run.chunks.1 += 1,
                _ if is_full => break,
                _ => runs.push(Touch {
                    at_ms: touch.at_ms,
                    layer: touch.layer,
                    chunks: (touch.chunk, touch.chunk.saturating_add(1)),
                    waited: touch.waited,
                    source: touch.source,
                }),
            }
        }
        runs.retain(|run| run.chunks.0 < run.chunks.1);
        Self { ended_seconds, layers, touches: runs }
    }

    /// What was read, first things first.
    pub fn touches(&self) -> &[Touch] {
        &self.touches
    }

    /// Number of chunks.
    pub fn chunk_count(&self) -> u64 {
        self.touches.iter().map(|touch| u64::from(touch.chunks.1 - touch.chunks.0)).sum()
    }

    /// From the first read to the last, in milliseconds.
    pub fn length_ms(&self) -> u32 {
        self.touches.last().map_or(0, |touch| touch.at_ms)
    }
}

impl Touch {
    fn continues(&self, touch: &FirstTouch) -> bool {
        (self.at_ms, self.layer, self.chunks.1) == (touch.at_ms, touch.layer, touch.chunk)
            && (self.waited, self.source) == (touch.waited, touch.source)
            && touch.chunk < u32::MAX
    }
}
