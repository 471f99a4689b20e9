//! How fast chunks move over a pooled stream on loopback, against plain TCP in the same run.
//!
//! Both sides share the machine's cores, so the ratio says more than the figures. Plain TCP sends the same frames with
//! no encryption, no multiplexing and no checks: the ceiling.
//!
//! ```text
//! cargo run --release -p hermes-p2p --example throughput
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use hermes_image::ids::{ArtifactId, ChunkId, ChunkNo, DiffId, Digest};
use hermes_image::index::chunks::{ChunkTable, ChunkTableBuilder};
use hermes_image::runs::Runs;
use hermes_p2p::{Arrival, Class, Content, Node, NodeConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Length of a chunk in bytes.
const CHUNK_LEN_BYTES: usize = 65536;
/// Chunks of a transfer: 512 MiB.
const CHUNKS: u32 = 8192;
/// How often each way is measured; the median counts.
const ROUNDS: usize = 5;

/// A few chunks in memory, given again and again, so that no disk is measured.
struct Memory {
    chunks: Vec<Bytes>,
}

impl Memory {
    fn chunk_no(&self, chunk: u32) -> &Bytes {
        &self.chunks[chunk as usize % self.chunks.len()]
    }
}

impl Content for Memory {
    fn have(&self, _: DiffId, _: ArtifactId) -> Option<Runs> {
        Some(Runs::one(0..CHUNKS))
    }

    fn chunk(&self, _: DiffId, _: ArtifactId, chunk: ChunkNo) -> std::io::Result<Option<Bytes>> {
        Ok(Some(self.chunk_no(chunk.0).clone()))
    }

    fn artifact(&self, _: ArtifactId) -> std::io::Result<Option<Bytes>> {
        Ok(None)
    }

    fn statement(&self, _: Digest) -> Option<Bytes> {
        None
    }
}

/// Bytes that do not compress, or text that shrinks to about a third.
fn memory(compressible: bool) -> Arc<Memory> {
    let chunk = |no: u64| {
        let mut state = no + 1;
        let mut bytes = Vec::with_capacity(CHUNK_LEN_BYTES + 64);
        while bytes.len() < CHUNK_LEN_BYTES {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let word = (state >> 16) as u32;
            if compressible {
                bytes.extend_from_slice(format!("lib/python3/site-packages/{word:08x}.py\n").as_bytes());
            } else {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
        }
        bytes.truncate(CHUNK_LEN_BYTES);
        Bytes::from(bytes)
    };
    Arc::new(Memory { chunks: (0..64).map(chunk).collect() })
}

fn table(memory: &Memory) -> anyhow::Result<ChunkTable> {
    let mut builder = ChunkTableBuilder::default();
    for chunk in 0..CHUNKS {
        builder.push(ChunkId::of(memory.chunk_no(chunk)), CHUNK_LEN_BYTES as u64)?;
    }
    Ok(builder.finish(DiffId([1; 32])))
}

async fn node(folder: &tempfile::TempDir, content: Arc<dyn Content>) -> anyhow::Result<Node> {
    let mut config = NodeConfig::new("bench".parse()?, folder.path().join("key"), "/ip4/127.0.0.1/tcp/0".parse()?);
    config.transport.connect_timeout = Duration::from_secs(30);
    config.download.compression = true;
    Ok(Node::start(config, content).await?)
}

/// Seconds for one transfer of all chunks over `streams` streams at once.
async fn exchange(memory: Arc<Memory>, streams: u32) -> anyhow::Result<Vec<f64>> {
    let folders = (tempfile::tempdir()?, tempfile::tempdir()?);
    let table = table(&memory)?;
    let holder = node(&folders.0, memory.clone()).await?;
    let asker = node(&folders.1, memory).await?;
    let peer = asker.connect(holder.listen_addresses()[0].clone()).await?;
    let mut seconds = Vec::new();
    // The first round warms the streams' windows.
    for round in 0..=ROUNDS {
        let start = Instant::now();
        let part = CHUNKS / streams;
        let transfers = (0..streams).map(|no| {
            let chunks = Runs::one(no * part..(no + 1) * part);
            let deadline = tokio::time::Instant::now() + Duration::from_secs(120);
            let mut fetch = asker.fetch(peer, &table, chunks, Class::Demand, deadline);
            async move {
                let mut len_bytes = 0;
                while let Some(arrival) = fetch.next().await {
                    match arrival? {
                        Arrival::Chunk(_, bytes) => len_bytes += bytes.len(),
                        Arrival::Lacks(chunks) => anyhow::bail!("lacks {chunks:?}"),
                    }
                }
                anyhow::ensure!(len_bytes == part as usize * CHUNK_LEN_BYTES, "{len_bytes} bytes came");
                Ok(())
            }
        });
        futures::future::try_join_all(transfers).await?;
        if round > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    asker.shutdown().await;
    holder.shutdown().await;
    Ok(seconds)
}

/// Seconds for the same bytes over plain TCP.
async fn plain(memory: Arc<Memory>) -> anyhow::Result<Vec<f64>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        while stream.read_u8().await.is_ok() {
            for chunk in 0..CHUNKS {
                stream.write_all(memory.chunk_no(chunk)).await?;
            }
        }
        anyhow::Ok(())
    });
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut chunk = vec![0; CHUNK_LEN_BYTES];
    let mut seconds = Vec::new();
    for round in 0..=ROUNDS {
        let start = Instant::now();
        stream.write_u8(1).await?;
        for _ in 0..CHUNKS {
            stream.read_exact(&mut chunk).await?;
        }
        if round > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    drop(stream);
    server.await??;
    Ok(seconds)
}

fn report(name: &str, mut seconds: Vec<f64>, against: Option<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    let megabytes = f64::from(CHUNKS) * CHUNK_LEN_BYTES as f64 / 1e6;
    let median = megabytes / seconds[seconds.len() / 2];
    let (worst, best) = (megabytes / seconds[seconds.len() - 1], megabytes / seconds[0]);
    let ratio = against.map(|against| format!(", {:.2} of plain TCP", median / against)).unwrap_or_default();
    println!("{name:<44} {median:7.0} MB/s (of {worst:.0} to {best:.0}){ratio}");
    median
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let noise = memory(false);
    let ceiling = report("plain TCP, one stream, nothing checked", plain(noise.clone()).await?, None);
    for streams in [1, 2, 4] {
        let name = format!("exchange, {streams} stream(s), incompressible");
        report(&name, exchange(noise.clone(), streams).await?, Some(ceiling));
    }
    let name = "exchange, 1 stream, text that compresses";
    report(name, exchange(memory(true), 1).await?, Some(ceiling));
    report("plain TCP again", plain(noise).await?, None);
    Ok(())
}
