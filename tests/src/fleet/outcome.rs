//! What a scenario came to: one line of a table, and what must be true of it.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::readers::Findings;
use super::wires::Traffic;
use super::{Fleet, Shape};
use crate::faulty::{Delivered, ToClient};

/// How many failures a message holds.
const SHOWN_MAX: usize = 10;

/// The figures of a fleet at some time.
#[derive(Debug)]
pub struct Start {
    answers: usize,
    traffic: Traffic,
    spent: Duration,
}

impl Start {
    /// Those of now.
    ///
    /// # Errors
    /// When a part of the fleet does not say its own.
    pub fn of(fleet: &Fleet<'_>) -> Result<Self> {
        let (traffic, spent) = (fleet.wires().traffic()?, fleet.processor_time()?);
        Ok(Self { answers: fleet.registry().ledger().answers(), traffic, spent })
    }
}

/// What came of one scenario.
#[derive(Debug)]
pub struct Outcome {
    name: String,
    shape: Shape,
    /// What the files that are read take in the compressed layers, about.
    read_compressed_bytes: u64,
    findings: Vec<Findings>,
    /// Nodes that a fault befell itself: their own time and stalls say nothing.
    befallen: Vec<usize>,
    delivered: Delivered,
    /// What the registry delivered to each node.
    to_nodes: Vec<ToClient>,
    traffic: Traffic,
    spent: Duration,
}

impl Outcome {
    /// What came of `findings` since `start`.
    ///
    /// # Errors
    /// When a part of the fleet does not say its own figures.
    pub fn new(
        name: &str,
        fleet: &Fleet<'_>,
        start: &Start,
        findings: Vec<Findings>,
        befallen: &[usize],
    ) -> Result<Self> {
        let now = Start::of(fleet)?;
        let delivered = fleet.delivered(start.answers);
        let to_node = |node| delivered.clients.get(&IpAddr::V4(fleet.wires().address(node))).copied();
        let to_nodes = (0..fleet.shape().nodes()).map(|node| to_node(node).unwrap_or_default()).collect();
        Ok(Self {
            name: name.to_owned(),
            shape: fleet.shape().clone(),
            read_compressed_bytes: fleet.rig().read_compressed_bytes,
            findings,
            befallen: befallen.to_owned(),
            to_nodes,
            delivered,
            traffic: now.traffic.since(&start.traffic),
            spent: now.spent.saturating_sub(start.spent),
        })
    }

    /// The names of the columns of its line. Megabytes are of compressed layers: what is read of them, what the registry
    /// delivered of them each byte once, and what it delivered in all; then of all packets between nodes, and zones.
    pub fn heading() -> String {
        format!(
            "{:<26} {:>5} {:>7} {:>7} {:>6} {:>7} {:>7} {:>7} {:>6} {:>6} {:>8} {:>8} {:>6} {:>6} {:>6} {:>7} {:>6}",
            "scenario",
            "nodes",
            "finish",
            "bound",
            "f/b",
            "read MB",
            "uniq MB",
            "reg MB",
            "asks",
            "r/u",
            "peers MB",
            "zones MB",
            "reads",
            "failed",
            "wrong",
            "stall s",
            "cpu s"
        )
    }

    fn unharmed(&self) -> impl Iterator<Item = &Findings> {
        self.findings.iter().filter(|findings| !findings.was_killed && !self.befallen.contains(&findings.node))
    }

    /// When the last reader was done whose node no fault befell.
    pub fn finish(&self) -> Duration {
        self.unharmed().map(|findings| findings.took).max().unwrap_or_default()
    }

    /// When half of the readers were done whose node no fault befell.
    pub fn median_finish(&self) -> Duration {
        let mut took: Vec<Duration> = self.unharmed().map(|findings| findings.took).collect();
        took.sort_unstable();
        took.get(took.len().saturating_sub(1) / 2).copied().unwrap_or_default()
    }

    /// How long the registry's link takes for each byte once.
    pub fn bound(&self) -> Duration {
        Duration::from_secs_f64(self.delivered.unique_bytes as f64 * 8.0 / self.shape.registry_rate as f64)
    }

    /// What the registry delivered of the layers.
    pub fn delivered(&self) -> &Delivered {
        &self.delivered
    }

    /// What the links carried.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// The longest read of nodes that no fault befell.
    pub fn longest_stall(&self) -> Duration {
        self.unharmed().map(|findings| findings.longest).max().unwrap_or_default()
    }

    /// Whether every read of a node that was not killed gave the right bytes.
    ///
    /// # Errors
    /// With those that did not.
    pub fn check(&self) -> Result<()> {
        let each = |of: fn(&Findings) -> &[String]| {
            let all: Vec<&String> = self.findings.iter().flat_map(of).collect();
            (all.len(), all.into_iter().take(SHOWN_MAX).cloned().collect::<Vec<_>>().join("\n"))
        };
        let (wrong, wrong_shown) = each(|findings| &findings.wrong);
        let (failed, failed_shown) = each(|findings| &findings.failed);
        ensure!(wrong == 0, "{}: {wrong} files held wrong bytes:\n{wrong_shown}", self.name);
        ensure!(failed == 0, "{}: {failed} files could not be read:\n{failed_shown}", self.name);
        Ok(())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let ratio = |of: f64, to: f64| if to > 0.0 { of / to } else { 0.0 };
        let (finish, bound) = (self.finish().as_secs_f64(), self.bound().as_secs_f64());
        let Delivered { answers, bytes, unique_bytes, .. } = self.delivered;
        let count = |of: fn(&Findings) -> usize| self.findings.iter().map(of).sum::<usize>();
        write!(
            f,
            "{:<26} {:>5} {finish:>7.1} {bound:>7.1} {:>6.2} {:>7.1} {:>7.1} {:>7.1} {:>6} {:>6.2} {:>8.1} {:>8.1} {:>6} {:>6} \
             {:>6} {:>7.1} {:>6.1}",
            self.name,
            self.findings.len(),
            ratio(finish, bound),
            megabytes(self.read_compressed_bytes),
            megabytes(unique_bytes),
            megabytes(bytes),
            answers,
            ratio(bytes as f64, unique_bytes as f64),
            megabytes(self.traffic.between_nodes()),
            megabytes(self.traffic.between_zones()),
            count(|findings| findings.reads),
            count(|findings| findings.failed.len()),
            count(|findings| findings.wrong.len()),
            self.longest_stall().as_secs_f64(),
            self.spent.as_secs_f64(),
        )?;
        let each = self.to_nodes.iter().enumerate().filter(|(_, to_node)| to_node.bytes > 0).map(|(node, to_node)| {
            format!("{node}: {:.1}/{:.1}", megabytes(to_node.bytes), megabytes(to_node.duplicate_bytes))
        });
        write!(f, "\n    by node, MB, and those delivered before: {}", each.collect::<Vec<_>>().join("  "))
    }
}
