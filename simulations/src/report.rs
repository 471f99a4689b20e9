//! What came of a run.
//!
//! All figures are integers of virtual time and bytes, so that two machines print the same. `bound` is what no system can do
//! better: the longest of the bytes that a start lacks at the speed of a node's card, the bytes that leave the registry once at
//! its speed, and the program's own work.

use std::ops::Range;

use serde::Serialize;

use crate::checkers::Violation;
use crate::ledger::Excess;
use crate::queue::{Nanos, SECOND};
use crate::units::{show_bytes, show_nanos};
use crate::world::World;

/// A distribution of times in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Times {
    /// How many.
    pub count: u64,
    /// Half are shorter.
    pub p50_ns: Nanos,
    /// Nine in ten are shorter.
    pub p90_ns: Nanos,
    /// All but one in a hundred are shorter.
    pub p99_ns: Nanos,
    /// The longest.
    pub max_ns: Nanos,
}

impl Times {
    /// Of these.
    pub fn of(mut times: Vec<Nanos>) -> Self {
        times.sort_unstable();
        let at = |hundredths: usize| {
            let place = (times.len() * hundredths).div_ceil(100).saturating_sub(1);
            times.get(place).copied().unwrap_or_default()
        };
        Self { count: times.len() as u64, p50_ns: at(50), p90_ns: at(90), p99_ns: at(99), max_ns: at(100) }
    }
}

/// Figures over time, a sample each 100 ms of virtual time.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Series {
    /// When.
    pub at_ns: Vec<Nanos>,
    /// Bytes that the registry has sent until then.
    pub registry_bytes: Vec<u64>,
    /// Bytes that other nodes gave, until then.
    pub peer_bytes: Vec<u64>,
    /// Starts that have begun.
    pub begun: Vec<u32>,
    /// Starts that are ready.
    pub ready: Vec<u32>,
}

impl Series {
    /// Most samples; beyond them every second one goes.
    const SAMPLES_MAX: usize = 4096;

    pub(crate) fn sample(&mut self, at: Nanos, (registry_bytes, peer_bytes): (u64, u64), (begun, ready): (u32, u32)) {
        if self.at_ns.len() >= Self::SAMPLES_MAX {
            [&mut self.at_ns, &mut self.registry_bytes, &mut self.peer_bytes].into_iter().for_each(every_second);
            [&mut self.begun, &mut self.ready].into_iter().for_each(every_second);
        }
        self.at_ns.push(at);
        self.registry_bytes.push(registry_bytes);
        self.peer_bytes.push(peer_bytes);
        self.begun.push(begun);
        self.ready.push(ready);
    }
}

/// Drops every second sample.
fn every_second<T: Copy>(samples: &mut Vec<T>) {
    *samples = samples.iter().step_by(2).copied().collect();
}

/// Something on the time line of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mark {
    /// When.
    pub at_ns: Nanos,
    /// What begins or ends.
    pub what: String,
}

/// Parts of a distribution that a report keeps: its least and greatest value, and 99 between.
const QUANTILES: usize = 101;

/// The least value, those that 1, 2 ... 99 % are not above, and the greatest; none of nothing.
fn quantiles(mut values: Vec<u64>) -> Vec<u64> {
    values.sort_unstable();
    let last = values.len().saturating_sub(1);
    let steps = if values.is_empty() { 0 } else { QUANTILES };
    (0..steps).map(|step| values[last * step / (QUANTILES - 1)]).collect()
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The scenario's name.
    pub scenario: String,
    /// What stood where nodes of Hermes stand.
    pub strategy: &'static str,
    /// The seed.
    pub seed: u64,
    /// The fingerprint of every fact and request.
    pub trace: String,
    /// Facts and requests.
    pub trace_entries: u64,
    /// Nodes.
    pub nodes: u32,
    /// Starts that were to be ready, are, or died with their node.
    pub starts: u32,
    /// See `starts`.
    pub ready: u32,
    /// See `starts`.
    pub lost: u32,
    /// From the first start to the last node's being ready.
    pub finished_ns: Nanos,
    /// What no system can do better for starts that come together.
    pub bound_ns: Nanos,
    /// From a start to its being ready.
    pub ready_after: Times,
    /// Waits of demand reads that missed.
    pub waits: Times,
    /// Demand reads that found all there.
    pub hits: u64,
    /// Demand reads, in hundredths of a percent, that waited longer than twice a round trip between nodes and their bytes at
    /// the speed of the card.
    pub slow_reads: u64,
    /// Spans that the registry was asked for more than once or in vain, 256 rows at most.
    pub excess: Vec<Excess>,
    /// Bytes that have to leave the registry once, and that left it.
    pub needed_bytes: u64,
    /// See `needed_bytes`.
    pub registry_bytes: u64,
    /// `registry_bytes` in hundredths of a percent of `needed_bytes`.
    pub registry_share: u64,
    /// Requests that reached the registry, and those that it refused.
    pub registry_requests: u64,
    /// See `registry_requests`.
    pub registry_refused: u64,
    /// Bytes that nodes got, by source: uncompressed ones of chunks, and compressed ones under the models of other systems.
    pub from_registry_bytes: u64,
    /// See `from_registry_bytes`.
    pub from_peers_bytes: u64,
    /// See `from_registry_bytes`.
    pub from_local_bytes: u64,
    /// Of these, bytes that were there already.
    pub again_bytes: u64,
    /// Most bytes that one node gave to others, and the mean.
    pub upload_max_bytes: u64,
    /// See `upload_max_bytes`.
    pub upload_mean_bytes: u64,
    /// Bytes that left a zone for another.
    pub between_zones_bytes: u64,
    /// Reads that failed.
    pub failed_reads: u64,
    /// Virtual time at the end, and how many things happened.
    pub ended_ns: Nanos,
    /// See `ended_ns`.
    pub happened: u64,
    /// What did not hold; then the run ended there.
    #[serde(serialize_with = "violation")]
    pub violation: Option<Violation>,
    /// Starts' times until they were ready, as 101 quantiles.
    pub ready_quantiles_ns: Vec<Nanos>,
    /// Bytes that each node gave to others, as 101 quantiles.
    pub upload_quantiles: Vec<u64>,
    /// When the first start began.
    pub first_start_ns: Nanos,
    /// What went wrong when.
    pub marks: Vec<Mark>,
    /// Figures over time.
    pub series: Series,
}

fn violation<S: serde::Serializer>(violation: &Option<Violation>, to: S) -> Result<S::Ok, S::Error> {
    violation.as_ref().map(|violation| (violation.kind, violation.at, &violation.what)).serialize(to)
}

/// `part` of `whole` in hundredths of a percent.
fn share(part: u64, whole: u64) -> u64 {
    u64::try_from(u128::from(part) * 10_000 / u128::from(whole.max(1))).unwrap_or(u64::MAX)
}

impl World {
    /// What no system can do better for starts that come together.
    fn bound(&self, needed: u64) -> Nanos {
        // What one start lacks: all starts that come together lack the same.
        let layers = self.checkers().needed().iter().enumerate();
        let lacking_bytes = layers.map(|(layer, chunks)| self.len_bytes(layer as u16, chunks)).sum();
        let own = self.scenario().cluster.nic.time(lacking_bytes);
        let registry = self.scenario().registry.bandwidth.time(needed);
        own.max(registry).max(self.scenario().start.work.0)
    }

    pub(crate) fn report(self) -> Report {
        let needed_bytes = self.needed_bytes();
        let (first, took) = self.start_times();
        let last = took.iter().map(|(_, ready)| *ready).max().unwrap_or_default();
        let after: Vec<Nanos> = took.iter().map(|(began, ready)| ready - began).collect();
        let cluster = &self.scenario().cluster;
        let trip = cluster.latency.0.max(if cluster.zones > 1 { cluster.zone_latency.0 } else { 0 }) * 2;
        let is_slow = |(wait, len): &&(Nanos, u32)| *wait > 2 * (trip + cluster.nic.time(u64::from(*len)));
        let slow = self.waits().iter().filter(is_slow).count() as u64;
        let sum = |of: fn(&crate::node::Counts) -> u64| self.nodes().iter().map(|node| of(&node.counts)).sum::<u64>();
        let uploads: Vec<u64> = self.nodes().iter().map(|node| self.net().sent(node.uplink).0).collect();
        let (registry_bytes, requests, refused) = self.registry_totals();
        let (starts, ready, lost) = self.start_counts();
        Report {
            scenario: self.scenario().name.clone(),
            strategy: self.scenario().cluster.strategy.name(),
            seed: self.checkers().seed(),
            trace: self.trace().hash(),
            trace_entries: self.trace().entries(),
            nodes: cluster.nodes,
            starts,
            ready,
            lost,
            finished_ns: last.saturating_sub(first),
            bound_ns: self.bound(needed_bytes),
            ready_after: Times::of(after.clone()),
            waits: Times::of(self.waits().iter().map(|(wait, _)| *wait).collect()),
            hits: self.hits(),
            slow_reads: share(slow, self.hits() + self.waits().len() as u64),
            excess: self.excess(),
            needed_bytes,
            registry_bytes,
            registry_share: share(registry_bytes, needed_bytes),
            registry_requests: requests,
            registry_refused: refused,
            from_registry_bytes: sum(|counts| counts.from_registry),
            from_peers_bytes: sum(|counts| counts.from_peers),
            from_local_bytes: sum(|counts| counts.from_local),
            again_bytes: sum(|counts| counts.again),
            upload_max_bytes: uploads.iter().copied().max().unwrap_or_default(),
            upload_mean_bytes: uploads.iter().sum::<u64>() / (uploads.len() as u64).max(1),
            between_zones_bytes: self.between_zones_bytes(),
            failed_reads: self.checkers().failed(),
            ended_ns: self.now(),
            happened: self.happened(),
            violation: self.checkers().violation().cloned(),
            ready_quantiles_ns: quantiles(after),
            upload_quantiles: quantiles(uploads),
            first_start_ns: first,
            marks: self.marks().to_vec(),
            series: self.series().clone(),
        }
    }
}

impl Report {
    /// Who asked the registry for what more than once or in vain: a line for each row of `excess`, with its requests below.
    pub fn excess_lines(&self) -> Vec<String> {
        let rows = self.excess.iter().flat_map(|row| {
            let Range { start, end } = row.spans;
            let (bytes, why) = (show_bytes(row.len_bytes), if row.needed { "" } else { ", which no start reads" });
            let head = format!("layer {}, spans {start}..{end}, {bytes}{why}", row.layer);
            std::iter::once(head).chain(row.requests.iter().map(|request| format!("  {request}")))
        });
        rows.collect()
    }

    /// The report as lines of a name and a value, for people.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let percent = |parts: u64| format!("{}.{:02} %", parts / 100, parts % 100);
        let times = |times: &Times| {
            let [p50, p90, p99, max] = [times.p50_ns, times.p90_ns, times.p99_ns, times.max_ns].map(show_nanos);
            format!("p50 {p50}, p90 {p90}, p99 {p99}, longest {max}")
        };
        let of_bound = share(self.finished_ns, self.bound_ns);
        let (finished, bound) = (show_nanos(self.finished_ns), show_nanos(self.bound_ns));
        let all_reads = self.hits + self.waits.count;
        let sources = [self.from_registry_bytes, self.from_peers_bytes, self.from_local_bytes, self.again_bytes];
        let [registry, peers, local, again] = sources.map(show_bytes);
        let mut lines = vec![
            ("strategy", self.strategy.to_owned()),
            ("starts", format!("{} of {} ready, {} died with their node", self.ready, self.starts, self.lost)),
            (
                "last ready",
                match self.bound_ns {
                    0 => format!("{finished} after the first start, which lacked nothing"),
                    _ => format!(
                        "{finished} after the first start, {}.{:02} x the bound of {bound}",
                        of_bound / 10_000,
                        of_bound / 100 % 100
                    ),
                },
            ),
            ("a start takes", times(&self.ready_after)),
            (
                "registry sent",
                format!(
                    "{}, {} of the {} that are needed once",
                    show_bytes(self.registry_bytes),
                    percent(self.registry_share),
                    show_bytes(self.needed_bytes)
                ),
            ),
            ("registry requests", format!("{}, {} refused", self.registry_requests, self.registry_refused)),
            ("reads", format!("{all_reads}, {} found all there, {} failed", self.hits, self.failed_reads)),
            ("reads that waited", times(&self.waits)),
            (
                "slow reads",
                format!("{} waited longer than 2 x (round trip + bytes at the card's speed)", percent(self.slow_reads)),
            ),
            ("nodes got", format!("{registry} from the registry, {peers} from peers, {local} copied; {again} twice")),
            (
                "uploads",
                format!(
                    "{} at most, {} on average",
                    show_bytes(self.upload_max_bytes),
                    show_bytes(self.upload_mean_bytes)
                ),
            ),
            ("between zones", show_bytes(self.between_zones_bytes)),
            (
                "simulated",
                format!(
                    "{} in {} events, {} facts and requests",
                    show_nanos(self.ended_ns),
                    self.happened,
                    self.trace_entries
                ),
            ),
            ("trace", self.trace.clone()),
        ];
        if let Some(violation) = &self.violation {
            let at = violation.at / SECOND;
            let millis = violation.at % SECOND / 1_000_000;
            lines.push(("violation", format!("{} at {at}.{millis:03} s: {}", violation.kind, violation.what)));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let times = Times::of((1..=200).rev().collect());
        assert_eq!((times.count, times.p50_ns, times.p90_ns, times.p99_ns, times.max_ns), (200, 100, 180, 198, 200));
        assert_eq!(Times::of(Vec::new()), Times::default());
        let parts = quantiles((0..=1000).rev().collect());
        assert_eq!((parts.len(), parts[0], parts[50], parts[100]), (101, 0, 500, 1000));
        assert_eq!((quantiles(Vec::new()), quantiles(vec![7])), (Vec::new(), vec![7; 101]));
    }

    #[test]
    fn long_series_are_thinned() {
        let mut series = Series::default();
        (0..10_000).for_each(|at| series.sample(at, (at * 2, 0), (1, 1)));
        assert!(series.at_ns.len() <= Series::SAMPLES_MAX && series.at_ns.len() == series.ready.len());
        assert!(series.at_ns.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
