//! What a miss drags along.
//!
//! A layer file is read sequentially where a program loads or a file is copied. The kernel asks for 128 KiB at a time,
//! and a registry 20 ms away would give 6 MB/s. So each layer follows a few readers: a demand read that begins where
//! one before ended doubles that reader's window, and the chunks up to the end of the window are fetched as prefetch.
//! A read that continues nothing begins a new reader with no window: random reads drag nothing along.
//!
//! Bounded by the number of readers and the window; the least recent reader is forgotten.

use std::collections::VecDeque;

use hermes_image::ids::ChunkRange;

use crate::geometry::LayerGeometry;
use crate::limits::Limits;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Stream {
    /// Where the reader will go on.
    next_chunk: u32,
    /// The chunk after the last that was fetched ahead.
    ahead_end: u32,
    window_bytes: u64,
}

/// The readers of one layer, the most recent last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Readahead {
    streams: VecDeque<Stream>,
}

impl Readahead {
    /// Notes a demand read, and says what to fetch ahead of it; empty for nothing.
    pub fn read(&mut self, run: &ChunkRange, geometry: &LayerGeometry, limits: &Limits) -> ChunkRange {
        if limits.readahead_streams == 0 || limits.readahead_first_bytes == 0 || run.is_empty() {
            return 0..0;
        }
        // A reader goes on in the chunk where it stopped or in the next one; parallel requests of the kernel may
        // overtake each other by a chunk or two.
        let goes_on = |stream: &Stream| run.start <= stream.next_chunk + 1 && run.end + 2 >= stream.next_chunk;
        let Some(index) = self.streams.iter().rposition(goes_on) else {
            if self.streams.len() >= limits.readahead_streams {
                self.streams.pop_front();
            }
            self.streams.push_back(Stream { next_chunk: run.end, ahead_end: run.end, window_bytes: 0 });
            return 0..0;
        };
        let Some(mut stream) = self.streams.remove(index) else { return 0..0 };
        let advanced = run.end > stream.next_chunk;
        stream.next_chunk = stream.next_chunk.max(run.end);
        stream.ahead_end = stream.ahead_end.max(stream.next_chunk);
        let mut ahead = 0..0;
        let left_bytes = geometry.len_bytes(&(stream.next_chunk..stream.ahead_end));
        // Half a window is left to hide the round trip of the next one.
        if advanced && left_bytes <= stream.window_bytes / 2 {
            stream.window_bytes =
                (stream.window_bytes * 2).clamp(limits.readahead_first_bytes, limits.readahead_max_bytes);
            let end = geometry.chunk_at(geometry.start_bytes(stream.next_chunk) + stream.window_bytes);
            ahead = stream.ahead_end..end.max(stream.ahead_end);
            stream.ahead_end = ahead.end;
        }
        self.streams.push_back(stream);
        ahead
    }

    /// Number of readers that are followed.
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    /// Whether no reader is followed.
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 65_536;

    fn limits() -> Limits {
        Limits {
            readahead_streams: 2,
            readahead_first_bytes: 4 * CHUNK,
            readahead_max_bytes: 16 * CHUNK,
            ..Limits::default()
        }
    }

    fn layer(chunks: usize) -> LayerGeometry {
        LayerGeometry::new(vec![CHUNK; chunks]).expect("valid")
    }

    #[test]
    fn sequential_reads_open_a_window_that_doubles_up_to_its_bound() {
        let (layer, limits) = (layer(1000), limits());
        let mut readahead = Readahead::default();
        let mut end = 0;
        let mut longest = 0;
        for chunk in 0..200 {
            let ahead = readahead.read(&(chunk..chunk + 1), &layer, &limits);
            if chunk == 0 {
                assert!(ahead.is_empty(), "one read is no sequence");
            }
            if !ahead.is_empty() {
                assert!(ahead.start == end || end == 0, "no chunk is fetched ahead twice");
                end = ahead.end;
                longest = longest.max(end - chunk);
            }
            assert!(end == 0 || end > chunk, "the reader caught up at {chunk}");
            assert!(end <= chunk + 1 + 16, "beyond the window at {chunk}");
        }
        assert_eq!(longest, 17);
    }

    #[test]
    fn random_reads_drag_nothing_along() {
        let (layer, limits) = (layer(1000), limits());
        let mut readahead = Readahead::default();
        for chunk in [500, 10, 900, 300, 700, 100] {
            assert!(readahead.read(&(chunk..chunk + 2), &layer, &limits).is_empty());
            assert!(readahead.len() <= 2);
        }
    }

    #[test]
    fn two_readers_are_followed_and_the_end_of_the_layer_is_kept() {
        let (layer, limits) = (layer(20), limits());
        let mut readahead = Readahead::default();
        for chunk in 0..8 {
            for at in [chunk, chunk + 12] {
                let ahead = readahead.read(&(at..at + 1), &layer, &limits);
                assert!(ahead.end <= 20);
                assert!(chunk != 1 || !ahead.is_empty(), "reader at {at} is not followed");
            }
        }
    }

    #[test]
    fn it_can_be_switched_off() {
        let limits = Limits { readahead_first_bytes: 0, ..limits() };
        let mut readahead = Readahead::default();
        for chunk in 0..10 {
            assert!(readahead.read(&(chunk..chunk + 1), &layer(20), &limits).is_empty());
        }
    }
}
