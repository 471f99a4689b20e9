//! A read on demand of one chunk from a node that others prefetch from as quickly as it gives.
//!
//! Once the holder may send 1 Gbit/s, which the prefetching nodes use up; and once as much as its core can. In the second
//! case the asker shares a core with what loads the holder, which would be other machines, so that it is waited for, too.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use hermes_image::runs::Runs;
use hermes_p2p::{Arrival, Asking, Class, Node, PeerId};

use super::content::Memory;
use super::cores::Side;
use super::throughput::Speed;
use super::{Line, quantile, start};

/// What the holder may send: 1 Gbit/s.
const BYTES_PER_SECOND: NonZeroU64 = NonZeroU64::new(125_000_000).expect("is not zero");
/// The layer, in chunks of the usual length.
const LEN_BYTES: usize = 64 << 20;
/// The usual chunk.
const CHUNK_LEN_BYTES: usize = 64 * 1024;
/// Nodes that prefetch, each over as many streams as a node opens for it.
const LOADERS: usize = 2;
/// Prefetching streams of each.
const LOADER_STREAMS: u32 = 6;
/// Reads on demand in a round.
const READS: u32 = 300;
/// Between two of them, so that they do not become the load.
const PAUSE: Duration = Duration::from_millis(5);
/// How long the load runs before the first read.
const WARM_UP: Duration = Duration::from_millis(500);
/// Time for any one transfer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Reads on demand, from a limited holder and from one without a limit.
pub(super) fn measure(cores: [usize; 2], rounds: u32, speed: Speed) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for limit in [Some(BYTES_PER_SECOND), None] {
        let all = under_load(cores, rounds, limit)?;
        let bandwidth = limit.map_or(speed.bytes_per_second, |limit| limit.get() as f64);
        for (name, part, reach) in [("p50", 0.5, ""), ("p99", 0.99, "<= 1")] {
            let best = all.iter().map(|round| quantile(&mut round.clone(), part)).fold(f64::MAX, f64::min);
            let allowed = 2.0 * (speed.round_trip_seconds + CHUNK_LEN_BYTES as f64 / bandwidth);
            lines.push(Line {
                what: format!(
                    "one chunk on demand, {LOADERS} nodes prefetch {}, {name}",
                    limit.map_or("without limit", |_| "1 Gbit/s")
                ),
                figure: format!("{:.2} ms", best * 1e3),
                against: format!(
                    "2 x (round trip of {:.0} us + 64 KiB / {:.0} MB/s): {:.2} ms",
                    speed.round_trip_seconds * 1e6,
                    bandwidth / 1e6,
                    allowed * 1e3
                ),
                ratio: best / allowed,
                reach,
            });
        }
    }
    Ok(lines)
}

/// Seconds of each read, in `rounds` rounds.
fn under_load(cores: [usize; 2], rounds: u32, limit: Option<NonZeroU64>) -> anyhow::Result<Vec<Vec<f64>>> {
    let (holder_side, asker_side) = (Side::on(cores[0])?, Side::on(cores[1])?);
    let folder = tempfile::tempdir()?;
    let memory = Memory::new(LEN_BYTES, CHUNK_LEN_BYTES)?;
    let (at, content) = (folder.path().to_owned(), Arc::clone(&memory));
    let holder = holder_side
        .run(async move { start(&at, "holder", content, |config| config.upload.bytes_per_second = limit).await })?;
    let (at, address, layer) = (folder.path().to_owned(), holder.listen_addresses()[0].clone(), Arc::clone(&memory));
    let all = asker_side.run(async move {
        let asker = start(&at, "asker", Arc::clone(&layer) as _, |_| {}).await?;
        let peer = asker.connect(address.clone()).await?;
        let loaders = load(&at, &layer, peer, &address).await?;
        tokio::time::sleep(WARM_UP).await;
        let mut all = Vec::new();
        for _ in 0..rounds {
            all.push(reads(&asker, peer, &layer).await?);
        }
        for node in loaders.iter().chain([&asker]) {
            node.shutdown().await;
        }
        Ok(all)
    })?;
    holder_side.run(async move {
        holder.shutdown().await;
        Ok(())
    })?;
    Ok(all)
}

/// Nodes that prefetch from `peer` until they are shut down.
async fn load(
    folder: &Path,
    layer: &Arc<Memory>,
    peer: PeerId,
    address: &hermes_p2p::Multiaddr,
) -> anyhow::Result<Vec<Node>> {
    let mut loaders = Vec::new();
    for no in 0..LOADERS {
        let node = start(folder, &format!("loader-{no}"), Arc::clone(layer) as _, |_| {}).await?;
        node.connect(address.clone()).await?;
        for _ in 0..LOADER_STREAMS {
            tokio::spawn(prefetch(node.clone(), peer, Arc::clone(layer)));
        }
        loaders.push(node);
    }
    Ok(loaders)
}

/// Reads the layer again and again until the node ends.
async fn prefetch(node: Node, peer: PeerId, layer: Arc<Memory>) {
    loop {
        let chunks = Runs::one(0..layer.table().count());
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut fetch = node.fetch(peer, layer.table(), Asking::here(chunks, Class::Prefetch), deadline);
        while let Some(arrival) = fetch.next().await {
            if let Err(error) = arrival {
                tracing::debug!(%error, "a loader has ended");
                return;
            }
        }
    }
}

/// Seconds of each read.
async fn reads(asker: &Node, peer: PeerId, layer: &Memory) -> anyhow::Result<Vec<f64>> {
    let mut seconds = Vec::with_capacity(READS as usize);
    for no in 0..READS {
        tokio::time::sleep(PAUSE).await;
        let chunk = no.wrapping_mul(7919) % layer.table().count();
        let started = Instant::now();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let asking = Asking::here(Runs::one(chunk..chunk + 1), Class::Demand);
        let mut fetch = asker.fetch(peer, layer.table(), asking, deadline);
        match fetch.next().await {
            Some(Ok(Arrival::Chunk(..))) => seconds.push(started.elapsed().as_secs_f64()),
            other => anyhow::bail!("{other:?} instead of a chunk"),
        }
        // To the end, so that the stream is used again.
        while fetch.next().await.is_some() {}
    }
    Ok(seconds)
}
