//! Many nodes in this process, each connected with each: their memory, what they do when nothing is asked, and how long a
//! lookup in the DHT takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hermes_image::ids::DiffId;
use hermes_p2p::{Content, Discovery, Node};

use super::content::Memory;
use super::cores::process_cpu_seconds;
use super::{Line, quantile, start};

/// How long nobody asks anything while processor time is counted.
const IDLE: Duration = Duration::from_secs(20);
/// How long the nodes have to tell each other what they tell after connecting.
const SETTLE: Duration = Duration::from_secs(5);
/// Time for all announcements. A record costs dozens of messages.
const PATIENCE: Duration = Duration::from_secs(600);
/// Records are looked at this often until no more come.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Lookups, each of another layer.
const LOOKUPS: u32 = 1000;
/// What the swarm part of a node may take.
const MEMORY_MAX_BYTES: f64 = (64 << 20) as f64;
/// What a lookup may take.
const LOOKUP_MAX_SECONDS: f64 = 0.05;

/// Measures `count` nodes that announce `layers` layers together.
pub(super) async fn measure(count: u32, layers: u32) -> anyhow::Result<Vec<Line>> {
    let folder = tempfile::tempdir()?;
    let content: Arc<dyn Content> = Memory::new(1 << 20, 64 * 1024)?;
    let empty = resident_bytes()?;
    let mut nodes = Vec::new();
    for no in 0..count {
        nodes.push(start(folder.path(), &format!("node-{no}"), Arc::clone(&content), |_| {}).await?);
    }
    let alone = resident_bytes()?;
    for (no, node) in nodes.iter().enumerate() {
        for other in &nodes[..no] {
            node.connect(other.listen_addresses()[0].clone()).await?;
        }
    }
    tokio::time::sleep(SETTLE).await;
    let together = resident_bytes()?;
    let cpu = process_cpu_seconds()?;
    tokio::time::sleep(IDLE).await;
    let idle = (process_cpu_seconds()? - cpu) / IDLE.as_secs_f64() / f64::from(count);

    let each = |bytes: f64| bytes / f64::from(count);
    let ends: usize = nodes.iter().map(|node| node.peers().len()).sum();
    let memory = each(together - empty);
    let mut lines = vec![
        Line {
            what: format!("memory of a node connected with {} others", count - 1),
            figure: format!("{:.2} MB, of them {:.2} MB without connections", memory / 1e6, each(alone - empty) / 1e6),
            against: "64 MiB".to_owned(),
            ratio: memory / MEMORY_MAX_BYTES,
            reach: "<= 1",
        },
        Line {
            what: "memory of one end of a connection".to_owned(),
            figure: format!("{:.1} KB, over {ends} ends", (together - alone) / ends as f64 / 1e3),
            against: "the node's memory".to_owned(),
            ratio: (together - alone) / ends as f64 / memory,
            reach: "",
        },
        Line {
            what: format!("processor time of an idle node, over {} s", IDLE.as_secs()),
            figure: format!("{:.2} ms/s", idle * 1e3),
            against: "1 % of a core".to_owned(),
            ratio: idle / 0.01,
            reach: "",
        },
    ];
    lines.extend(discovery(&nodes, layers).await?);
    futures::future::join_all(nodes.iter().map(Node::shutdown)).await;
    Ok(lines)
}

/// Announces, looks up.
async fn discovery(nodes: &[Node], layers: u32) -> anyhow::Result<Vec<Line>> {
    let started = Instant::now();
    for no in 0..layers {
        nodes[no as usize % nodes.len()].provide(layer(no)).await?;
    }
    let (largest, all) = settled(nodes).await?;
    let announced = started.elapsed().as_secs_f64();
    let mut seconds = Vec::new();
    let mut missed = 0;
    for no in 0..LOOKUPS.min(layers) {
        let wanted = (u64::from(no) * 7919 % u64::from(layers)) as u32;
        // Not the holder itself.
        let asker = &nodes[(wanted as usize + 1 + no as usize % (nodes.len() - 1)) % nodes.len()];
        let started = Instant::now();
        let found = asker.find_holders(layer(wanted)).await?;
        seconds.push(started.elapsed().as_secs_f64());
        missed += u32::from(found.is_empty());
    }
    let cap = Discovery::default().records_len_max_bytes;
    let looked_up = seconds.len();
    let lookup = |name: &str, seconds: f64, reach: &'static str| Line {
        what: format!("finding a holder with the DHT alone, {name}"),
        figure: format!("{:.1} ms; {missed} of {looked_up} found none", seconds * 1e3),
        against: "50 ms".to_owned(),
        ratio: seconds / LOOKUP_MAX_SECONDS,
        reach,
    };
    Ok(vec![
        lookup("p50", quantile(&mut seconds, 0.5), ""),
        lookup("p99", quantile(&mut seconds, 0.99), "<= 1"),
        Line {
            what: format!("the fullest record store with {layers} layers announced in {announced:.0} s"),
            figure: format!(
                "{:.2} MB, {:.2} MB on average",
                largest as f64 / 1e6,
                all as f64 / nodes.len() as f64 / 1e6
            ),
            against: format!("its cap of {:.2} MB", cap as f64 / 1e6),
            ratio: largest as f64 / cap as f64,
            reach: "<= 1",
        },
    ])
}

/// Waits until no more records come; the bytes of the fullest store and of all.
async fn settled(nodes: &[Node]) -> anyhow::Result<(usize, usize)> {
    let started = Instant::now();
    let mut before = 0;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let (mut largest, mut all) = (0, 0);
        for node in nodes {
            let len = node.records_len_bytes().await?;
            largest = largest.max(len);
            all += len;
        }
        if all > 0 && all == before {
            return Ok((largest, all));
        }
        if started.elapsed() > PATIENCE {
            bail!("the layers are not announced after {} s", PATIENCE.as_secs());
        }
        before = all;
    }
}

fn layer(no: u32) -> DiffId {
    // Spread over the key space, as digests are.
    DiffId(hermes_image::ids::ChunkId::of(&no.to_le_bytes()).0)
}

/// What this process has in memory.
fn resident_bytes() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text.split(' ').nth(1).context("statm has no second field")?.parse()?;
    Ok((pages * rustix::param::page_size() as u64) as f64)
}
