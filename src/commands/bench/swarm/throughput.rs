//! Chunks from one node to another against the same bytes over raw TCP, and pieces of one length against another.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use hermes_image::runs::Runs;
use hermes_p2p::{Arrival, Asking, Class, Node, PeerId};

use super::content::Memory;
use super::cores::Side;
use super::raw::{Raw, Wire};
use super::{Line, start};

/// Bytes of one round of one way.
const LEN_BYTES: usize = 256 << 20;
/// The usual chunk.
const CHUNK_LEN_BYTES: usize = 64 * 1024;
/// The longest piece that the protocol has: `docs/protocol.md`, section 3.
const PIECE_LEN_BYTES: usize = 128 * 1024;
/// Chunks of one GET: what the protocol allows, an extent, and 1 MiB.
const GETS: [u32; 3] = [1024, 64, 16];
/// Time for one round of one way.
const PATIENCE: Duration = Duration::from_secs(120);

/// What two nodes on the same cores were seen to do; the limits of a read on demand are made of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Speed {
    /// Median of a round trip of a few bytes over raw TCP.
    pub(super) round_trip_seconds: f64,
    /// Chunks over one stream.
    pub(super) bytes_per_second: f64,
}

/// What one way of moving [`LEN_BYTES`] took at its best.
#[derive(Debug, Clone, Copy)]
struct Best {
    seconds: f64,
    asker_cpu_seconds: f64,
    holder_cpu_seconds: f64,
    messages: u64,
}

impl Best {
    const NONE: Self =
        Self { seconds: f64::MAX, asker_cpu_seconds: f64::MAX, holder_cpu_seconds: f64::MAX, messages: 0 };

    /// Runs `work`, which gives the number of messages, once more.
    fn improve(&mut self, sides: &Sides, work: impl FnOnce() -> anyhow::Result<u64>) -> anyhow::Result<()> {
        let (asker, holder) = (sides.asker.cpu_seconds()?, sides.holder.cpu_seconds()?);
        let started = Instant::now();
        self.messages = work()?;
        self.seconds = self.seconds.min(started.elapsed().as_secs_f64());
        self.asker_cpu_seconds = self.asker_cpu_seconds.min(sides.asker.cpu_seconds()? - asker);
        self.holder_cpu_seconds = self.holder_cpu_seconds.min(sides.holder.cpu_seconds()? - holder);
        Ok(())
    }

    fn bytes_per_second(&self) -> f64 {
        LEN_BYTES as f64 / self.seconds
    }

    /// Of both sides.
    fn cpu_seconds(&self) -> f64 {
        self.asker_cpu_seconds + self.holder_cpu_seconds
    }

    fn figure(&self) -> String {
        let per_gigabyte = 1e9 / LEN_BYTES as f64;
        format!(
            "{:.0} MB/s, {:.2} + {:.2} CPU s/GB",
            self.bytes_per_second() / 1e6,
            self.holder_cpu_seconds * per_gigabyte,
            self.asker_cpu_seconds * per_gigabyte
        )
    }

    /// How fast this is against `other`.
    fn line(&self, what: &str, name: &str, other: &Self, reach: &'static str) -> Line {
        Line {
            what: what.to_owned(),
            figure: self.figure(),
            against: format!("{name}: {}", other.figure()),
            ratio: other.seconds / self.seconds,
            reach,
        }
    }
}

/// The two sides.
struct Sides {
    holder: Side,
    asker: Side,
}

/// A holder and an asker of one layer.
struct Pair {
    holder: Node,
    asker: Node,
    peer: PeerId,
    memory: Arc<Memory>,
    _folder: tempfile::TempDir,
}

impl Pair {
    fn start(sides: &Sides, chunk_len_bytes: usize) -> anyhow::Result<Self> {
        let memory = Memory::new(LEN_BYTES, chunk_len_bytes)?;
        let folder = tempfile::tempdir()?;
        let (content, at) = (Arc::clone(&memory), folder.path().to_owned());
        let holder = sides.holder.run(async move { start(&at, "holder", content, |_| {}).await })?;
        let (content, at) = (Arc::clone(&memory), folder.path().to_owned());
        let asker = sides.asker.run(async move { start(&at, "asker", content, |_| {}).await })?;
        let (node, address) = (asker.clone(), holder.listen_addresses()[0].clone());
        let peer = sides.asker.run(async move { Ok(node.connect(address).await?) })?;
        Ok(Self { holder, asker, peer, memory, _folder: folder })
    }

    /// Moves the layer over `streams` streams with `chunks_per_get` in each GET; how many messages that were.
    fn transfer(&self, sides: &Sides, streams: u32, chunks_per_get: u32) -> anyhow::Result<u64> {
        let (node, peer, table) = (self.asker.clone(), self.peer, self.memory.table().clone());
        sides.asker.run(async move {
            let share = table.count() / streams;
            let transfers = (0..streams).map(|no| {
                let (node, table) = (node.clone(), &table);
                async move {
                    let mut messages = 0;
                    for first in (no * share..(no + 1) * share).step_by(chunks_per_get as usize) {
                        let chunks = Runs::one(first..(first + chunks_per_get).min((no + 1) * share));
                        let deadline = tokio::time::Instant::now() + PATIENCE;
                        let mut fetch = node.fetch(peer, table, Asking::here(chunks, Class::Demand), deadline);
                        // The GET and the END.
                        messages += 2;
                        while let Some(arrival) = fetch.next().await {
                            match arrival? {
                                Arrival::Chunk(..) => messages += 1,
                                other => anyhow::bail!("{other:?} instead of a chunk"),
                            }
                        }
                    }
                    Ok(messages)
                }
            });
            Ok(futures::future::try_join_all(transfers).await?.into_iter().sum())
        })
    }

    fn end(self, sides: &Sides) -> anyhow::Result<()> {
        let Self { holder, asker, .. } = self;
        sides.asker.run(async move {
            asker.shutdown().await;
            Ok(())
        })?;
        sides.holder.run(async move {
            holder.shutdown().await;
            Ok(())
        })
    }
}

/// Moves bytes in all ways, in turns, `rounds` times.
pub(super) fn measure(cores: [usize; 2], rounds: u32) -> anyhow::Result<(Vec<Line>, Speed)> {
    let sides = Sides { holder: Side::on(cores[0])?, asker: Side::on(cores[1])? };
    let chunks = Pair::start(&sides, CHUNK_LEN_BYTES)?;
    let pieces = Pair::start(&sides, PIECE_LEN_BYTES)?;
    let bytes = Arc::new(chunks.memory.bytes());
    let mut plain = Raw::connect(&sides.holder, &sides.asker, Arc::clone(&bytes), Wire::Plain)?;
    let mut encrypted = Raw::connect(&sides.holder, &sides.asker, bytes, Wire::Encrypted)?;

    let [mut best_plain, mut best_encrypted, mut best_four, mut best_pieces] = [Best::NONE; 4];
    let mut best_gets = [Best::NONE; GETS.len()];
    // The streams' windows are wide after the first.
    chunks.transfer(&sides, 4, GETS[0])?;
    pieces.transfer(&sides, 1, GETS[0])?;
    let mut round_trips = Vec::new();
    for _ in 0..rounds {
        round_trips.append(&mut plain.round_trips(&sides.asker, 1000)?);
        best_plain.improve(&sides, || plain.read(&sides.asker, LEN_BYTES).map(|()| 0))?;
        best_encrypted.improve(&sides, || encrypted.read(&sides.asker, LEN_BYTES).map(|()| 0))?;
        for (best, chunks_per_get) in best_gets.iter_mut().zip(GETS) {
            best.improve(&sides, || chunks.transfer(&sides, 1, chunks_per_get))?;
        }
        best_four.improve(&sides, || chunks.transfer(&sides, 4, GETS[0]))?;
        best_pieces.improve(&sides, || pieces.transfer(&sides, 1, GETS[0]))?;
    }
    chunks.end(&sides)?;
    pieces.end(&sides)?;

    let best = best_gets[0];
    let raw = "encrypted TCP";
    let mut lines = vec![
        best.line("chunks of 64 KiB, one stream", raw, &best_encrypted, ">= 0.7"),
        best_four.line("chunks of 64 KiB, four streams", raw, &best_encrypted, ""),
        best.line("chunks of 64 KiB, one stream", "plain TCP", &best_plain, ""),
    ];
    for (best, chunks_per_get) in best_gets.iter().zip(GETS) {
        lines.push(pieces_line(best, chunks_per_get, &best_pieces));
    }
    let round_trip_seconds = super::quantile(&mut round_trips, 0.5);
    Ok((lines, Speed { round_trip_seconds, bytes_per_second: best.bytes_per_second() }))
}

/// What chunks cost against the longest pieces.
fn pieces_line(best: &Best, chunks_per_get: u32, pieces: &Best) -> Line {
    let per_gigabyte = 1e9 / LEN_BYTES as f64;
    let figure = |best: &Best| {
        format!(
            "{:.2} CPU s/GB, {:.0} messages/GB",
            best.cpu_seconds() * per_gigabyte,
            best.messages as f64 * per_gigabyte
        )
    };
    Line {
        what: format!(
            "CPU of both sides, 64 KiB chunks, GETs of {} KiB",
            chunks_per_get as usize * CHUNK_LEN_BYTES / 1024
        ),
        figure: figure(best),
        against: format!("pieces of 128 KiB, GETs of 128 MiB: {}", figure(pieces)),
        ratio: best.cpu_seconds() / pieces.cpu_seconds(),
        reach: "<= 1.2",
    }
}
