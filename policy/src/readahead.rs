//! What a miss drags along.
//!
//! A layer file is read sequentially where a program loads or a file is copied. The kernel asks for 128 KiB at a time,
//! and a registry 20 ms away would give 6 MB/s. So each layer follows a few readers: a demand read that begins where
//! one before ended gives that reader a window of three quarters of what it has read, and the chunks up to the end of the
//! window are fetched as prefetch.
//! A read that continues nothing begins a new reader with no window: random reads drag nothing along.
//!
//! Bounded by the number of readers and the window; the least recent reader is forgotten.

use std::collections::VecDeque;

use hermes_image::ids::ChunkRange;

use crate::geometry::LayerGeometry;
use crate::limits::Limits;

/// What a read leads to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ahead {
    /// What to fetch; empty for nothing.
    pub chunks: ChunkRange,
    /// The place of the reader's mark among those of the layer, below [`Limits::readahead_streams`], and the chunk that
    /// it stands on now; `None` when it stays where it is.
    pub mark: Option<(usize, u32)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Stream {
    /// The place of its mark.
    place: usize,
    /// Where the reader began.
    first_chunk: u32,
    /// Where the reader will go on, as far as it was heard of.
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
    /// Notes a read, and says what to fetch ahead of it.
    pub fn read(&mut self, run: &ChunkRange, geometry: &LayerGeometry, limits: &Limits) -> Ahead {
        if limits.readahead_streams == 0 || limits.readahead_first_bytes == 0 || run.is_empty() {
            return Ahead::default();
        }
        // A reader goes on where it stopped or in what was fetched ahead of it, of which it is not heard; parallel
        // requests of the kernel may overtake each other by a chunk or two.
        let goes_on = |stream: &Stream| run.start <= stream.ahead_end + 1 && run.end + 2 >= stream.next_chunk;
        let Some(index) = self.streams.iter().rposition(goes_on) else {
            let is_full = self.streams.len() >= limits.readahead_streams;
            let forgotten = if is_full { self.streams.pop_front() } else { None };
            let place = forgotten.map_or(self.streams.len(), |stream| stream.place);
            self.streams.push_back(Stream {
                place,
                first_chunk: run.start,
                next_chunk: run.end,
                ahead_end: run.end,
                window_bytes: 0,
            });
            return Ahead::default();
        };
        let Some(mut stream) = self.streams.remove(index) else { return Ahead::default() };
        let advanced = run.end > stream.next_chunk;
        stream.next_chunk = stream.next_chunk.max(run.end);
        stream.ahead_end = stream.ahead_end.max(stream.next_chunk);
        let mut ahead = Ahead::default();
        let left_bytes = geometry.len_bytes(&(stream.next_chunk..stream.ahead_end));
        // Half a window is left to hide the round trip of the next one.
        if advanced && left_bytes <= stream.window_bytes / 2 {
            let read_bytes = geometry.len_bytes(&(stream.first_chunk..stream.next_chunk));
            // More reads ahead of more readers that stop, less keeps the link idle; docs/benchmarks.md has the figures.
            stream.window_bytes = (read_bytes / 4 * 3).clamp(limits.readahead_first_bytes, limits.readahead_max_bytes);
            let end = geometry.chunk_at(geometry.start_bytes(stream.next_chunk) + stream.window_bytes);
            let end = geometry.same_file(run.end - 1..end.max(run.end)).end;
            ahead.chunks = stream.ahead_end..end.max(stream.ahead_end);
            stream.ahead_end = ahead.chunks.end;
            let half = geometry.start_bytes(stream.ahead_end).saturating_sub(stream.window_bytes / 2);
            let mark = geometry.chunk_at(half).max(stream.next_chunk);
            ahead.mark = (mark < stream.ahead_end).then_some((stream.place, mark));
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
    fn sequential_reads_open_a_window_that_grows_up_to_its_bound() {
        let (layer, limits) = (layer(1000), limits());
        let mut readahead = Readahead::default();
        let mut end = 0;
        let mut longest = 0;
        for chunk in 0..200 {
            let ahead = readahead.read(&(chunk..chunk + 1), &layer, &limits).chunks;
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
            assert_eq!(readahead.read(&(chunk..chunk + 2), &layer, &limits), Ahead::default());
            assert!(readahead.len() <= 2);
        }
    }

    #[test]
    fn reads_at_the_marks_alone_keep_the_window_ahead_of_the_reader() {
        let (layer, limits) = (layer(1000), limits());
        let mut readahead = Readahead::default();
        readahead.read(&(0..1), &layer, &limits);
        let mut window = readahead.read(&(1..2), &layer, &limits);
        for _ in 0..60 {
            let (place, mark) = window.mark.expect("the window opened, so its mark moved");
            assert_eq!(place, 0);
            assert!(window.chunks.contains(&mark), "{mark} is no chunk of {:?}", window.chunks);
            let next = readahead.read(&(mark..mark + 1), &layer, &limits);
            assert_eq!(next.chunks.start, window.chunks.end, "a gap behind {window:?}");
            window = next;
        }
        assert!(window.chunks.len() >= 8, "the window stays open");
        assert_eq!(readahead.len(), 1);
    }

    #[test]
    fn marks_have_as_many_places_as_there_are_readers() {
        let (layer, limits) = (layer(1000), limits());
        let mut readahead = Readahead::default();
        let mut places = std::collections::BTreeSet::new();
        for start in [0, 100, 200, 300, 400] {
            for chunk in start..start + 10 {
                places.extend(readahead.read(&(chunk..chunk + 1), &layer, &limits).mark.map(|(place, _)| place));
            }
        }
        assert_eq!(places, [0, 1].into());
    }

    #[test]
    fn two_readers_are_followed_and_the_end_of_the_layer_is_kept() {
        let (layer, limits) = (layer(20), limits());
        let mut readahead = Readahead::default();
        for chunk in 0..8 {
            for at in [chunk, chunk + 12] {
                let ahead = readahead.read(&(at..at + 1), &layer, &limits).chunks;
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
            assert_eq!(readahead.read(&(chunk..chunk + 1), &layer(20), &limits), Ahead::default());
        }
    }
}
