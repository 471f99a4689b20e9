//! What befell a real fleet, simulated: both beside each other, and how far the simulation is off.
//!
//! The simulator gets what the fleet has: its links, the shape of its image as `hermes index export-shape` writes it, and what its readers
//! read, in order. Its own seeds stand for what is chance in the real fleet.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::Shape;
use super::outcome::Outcome;
use super::readers::READ_BYTES;
use super::rig::Rig;
use super::scenarios;
use crate::command::run;
use crate::sample::TAG;

/// Seeds of a simulated scenario; the median of each figure counts.
const SEEDS: u64 = 5;
/// How far off figures may be in the median, and each of them.
const MEDIAN_MAX: f64 = 0.15;
/// See [`MEDIAN_MAX`].
const EACH_MAX: f64 = 0.30;
/// What a packet takes from one node's network to another's on one machine, one way.
const LATENCY: &str = "100 us";

/// What is simulated beside the fleet's shape.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// All nodes at once, none of which has anything.
    AllCold,
    /// The last node, after all others have read.
    OneCold,
    /// So many nodes are killed after this part of the bound.
    Killed(usize, f64),
    /// Half of the nodes do not reach the others from the first part of the bound on, for the second.
    Parted(f64, f64),
}

/// The image as the simulator knows it.
#[derive(Debug)]
pub struct Image {
    shape: PathBuf,
    /// Compressed bytes as parts of ten thousand of uncompressed ones.
    compressed: u64,
}

impl Image {
    /// Exports the image of `rig` into `folder`, with what is read of it.
    ///
    /// # Errors
    /// With what `hermes index export-shape` says, and when its file is not what was expected.
    pub fn export(rig: &Rig, folder: &Path) -> Result<Self> {
        let shape = folder.join("shape.json");
        let image = format!("oci:{}:{TAG}", rig.sample.layout.dir().display());
        let mut command = Command::new(&rig.hermes);
        command.args(["index", "export-shape", &image, "--index"]).arg(&rig.index.folder);
        run(command.arg("--to").arg(&shape))?;
        let mut exported: Value = serde_json::from_slice(&fs::read(&shape)?)?;
        let layers = exported["layers"].as_array().context("a shape has layers")?;
        let starts = layers.iter().map(chunk_starts).collect::<Result<Vec<_>>>()?;
        let mut reads = Vec::new();
        for file in &rig.read {
            let (layer, range) = rig.sample.place(&file.name).with_context(|| format!("find {}", file.name))?;
            let starts = starts.get(layer).context("a layer of the sample")?;
            let chunk = |byte: u64| starts.partition_point(|start| *start <= byte) - 1;
            let mut at = range.start;
            while at < range.end {
                let end = (at + READ_BYTES as u64).min(range.end);
                let (first, last) = (chunk(at), chunk(end - 1));
                reads.push(json!([layer, first, last + 1 - first]));
                at = end;
            }
        }
        exported["reads"] = Value::Array(reads);
        fs::write(&shape, serde_json::to_vec(&exported)?)?;
        let uncompressed: u64 = starts.iter().filter_map(|starts| starts.last()).sum();
        let compressed: u64 = rig.sample.image.layers.iter().map(|layer| layer.blob_len_bytes).sum();
        Ok(Self { shape, compressed: compressed * 10_000 / uncompressed.max(1) })
    }
}

/// Where the chunks of a layer start, and where the last one ends.
fn chunk_starts(layer: &Value) -> Result<Vec<u64>> {
    let mut starts = vec![0];
    for run in layer["chunks"].as_array().context("a layer has chunks")? {
        let (len, count) = (run[0].as_u64().context("a length")?, run[1].as_u64().context("a number")?);
        for _ in 0..count {
            starts.push(starts.last().copied().unwrap_or_default() + len);
        }
    }
    Ok(starts)
}

/// A figure of both.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    name: &'static str,
    real: f64,
    simulated: f64,
}

impl Figure {
    /// How far the simulated one is off, as a part of the real one.
    fn error(&self) -> f64 {
        (self.simulated - self.real) / self.real.max(f64::MIN_POSITIVE)
    }
}

/// A scenario, in reality and simulated.
#[derive(Debug)]
pub struct Pair {
    name: String,
    figures: Vec<Figure>,
}

impl Pair {
    /// Simulates what `outcome` is of.
    ///
    /// # Errors
    /// With what `hermes simulate run` says.
    pub fn new(name: &str, rig: &Rig, image: &Image, shape: &Shape, event: Event, outcome: &Outcome) -> Result<Self> {
        let file = image.shape.with_extension("toml");
        fs::write(&file, scenario(name, rig, image, shape, event))?;
        let mut reports = Vec::new();
        for seed in 1..=SEEDS {
            let mut command = Command::new(&rig.hermes);
            command.args(["simulate", "run"]).arg(&file).args(["--json", "--seed", &seed.to_string()]);
            reports.push(serde_json::from_slice::<Value>(&run(&mut command)?)?);
        }
        let simulated = |path: &str, scale: f64| {
            let of = |report: &Value| report.pointer(path).and_then(Value::as_f64).map(|value| value * scale);
            let values: Option<Vec<f64>> = reports.iter().map(of).collect();
            values.map(median).with_context(|| format!("a report has {path}"))
        };
        let (delivered, wire) = (outcome.delivered(), image.compressed as f64 / 1e4);
        let figure = |name, real, simulated| Figure { name, real, simulated };
        let figures = vec![
            figure("last node ready, s", outcome.finish().as_secs_f64(), simulated("/ready_after/max_ns", 1e-9)?),
            figure(
                "median node ready, s",
                outcome.median_finish().as_secs_f64(),
                simulated("/ready_after/p50_ns", 1e-9)?,
            ),
            figure("from the registry, MB", delivered.bytes as f64 / 1e6, simulated("/registry_bytes", 1e-6)?),
            figure("requests to it", delivered.answers as f64, simulated("/registry_requests", 1.0)?),
            figure(
                "between nodes, MB",
                outcome.traffic().between_nodes() as f64 / 1e6,
                simulated("/from_peers_bytes", wire / 1e6)?,
            ),
            figure("longest read, s", outcome.longest_stall().as_secs_f64(), simulated("/waits/max_ns", 1e-9)?),
        ];
        Ok(Self { name: name.to_owned(), figures: figures.into_iter().filter(|figure| figure.real > 0.0).collect() })
    }
}

/// The fleet and what befalls it, as the simulator reads it.
fn scenario(name: &str, rig: &Rig, image: &Image, shape: &Shape, event: Event) -> String {
    let (nodes, zones) = (shape.nodes(), shape.zones.len());
    let Shape { node_rate, registry_rate, registry_delay, .. } = shape;
    // What either sends is late.
    let latency_us = 2 * registry_delay.as_micros();
    let percent = image.compressed as f64 / 100.0;
    let bound_ms = scenarios::bound(rig, shape).as_secs_f64() * 1e3;
    let workload = match event {
        Event::OneCold => format!("kind = \"autoscaler\"\nper_minute = 60\nwarm = {}", nodes - 1),
        _ => "kind = \"flash-crowd\"".to_owned(),
    };
    let fault = match event {
        Event::AllCold | Event::OneCold => String::new(),
        Event::Killed(count, at) => {
            let share = (count * 100).div_ceil(nodes);
            format!("[[fault]]\nkind = \"kill\"\nat = \"{:.0} ms\"\nshare = \"{share} %\"\n", at * bound_ms)
        }
        Event::Parted(at, lasts) => format!(
            "[[fault]]\nkind = \"partition\"\nat = \"{:.0} ms\"\nfor = \"{:.0} ms\"\nshare = \"50 %\"\n",
            at * bound_ms,
            lasts * bound_ms
        ),
    };
    let shape_file = image.shape.file_name().unwrap_or_default().display();
    format!(
        "name = \"{name}\"\n[cluster]\nnodes = {nodes}\nzones = {zones}\nnic = \"{node_rate} bit/s\"\nlatency = \"{LATENCY}\"\n\
         zone_latency = \"{LATENCY}\"\npeer_wire = \"{percent} %\"\n[registry]\nbandwidth = \"{registry_rate} bit/s\"\n\
         latency = \"{latency_us} us\"\n[image]\nshape = \"{shape_file}\"\n[start]\nprefetch = \"none\"\nparallel = 1\n\
         [workload]\n{workload}\n{fault}"
    )
}

/// Of an even number, the lower one in the middle; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or_default()
}

/// All pairs as a table, with a verdict.
#[derive(Debug, Default)]
pub struct Calibration(pub Vec<Pair>);

impl Calibration {
    fn figures(&self) -> impl Iterator<Item = &Figure> {
        self.0.iter().flat_map(|pair| &pair.figures)
    }

    /// The middle of all errors, as a part of the real figure.
    pub fn median_error(&self) -> f64 {
        median(self.figures().map(|figure| figure.error().abs()).collect())
    }

    /// Figures that are off by more than they may be each.
    pub fn far_off(&self) -> usize {
        self.figures().filter(|figure| figure.error().abs() > EACH_MAX).count()
    }

    /// Whether the median is within what it may be.
    ///
    /// # Errors
    /// When it is not, or nothing was compared.
    pub fn check(&self) -> Result<()> {
        ensure!(self.figures().count() > 0, "nothing was compared");
        ensure!(self.median_error() <= MEDIAN_MAX, "{self}");
        Ok(())
    }
}

impl fmt::Display for Calibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| scenario | figure | real | simulated | error |\n|---|---|---|---|---|")?;
        for pair in &self.0 {
            for figure in &pair.figures {
                let Figure { name, real, simulated } = figure;
                let off = if figure.error().abs() > EACH_MAX { " **far off**" } else { "" };
                let error = figure.error() * 100.0;
                writeln!(f, "| {} | {name} | {real:.2} | {simulated:.2} | {error:+.0} %{off} |", pair.name)?;
            }
        }
        let word = |holds: bool| if holds { "OK" } else { "**missed**" };
        let (middle, far_off) = (self.median_error(), self.far_off());
        let (all, in_middle) = (self.figures().count(), word(middle <= MEDIAN_MAX));
        write!(
            f,
            "\nmedian error {:.0} % (<= {:.0} %) {in_middle}; {far_off} of {all} figures off by more than {:.0} % {}",
            middle * 100.0,
            MEDIAN_MAX * 100.0,
            EACH_MAX * 100.0,
            word(far_off == 0)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_parts_of_the_real_figure_and_the_far_ones_are_named() {
        let figure = |real, simulated| Figure { name: "figure", real, simulated };
        let figures = vec![figure(10.0, 11.0), figure(10.0, 5.0), figure(4.0, 4.0)];
        let calibration = Calibration(vec![Pair { name: "pair".to_owned(), figures }]);
        assert_eq!((calibration.far_off(), calibration.median_error()), (1, 0.1));
        let shown = calibration.to_string();
        assert!(shown.contains("| pair | figure | 10.00 | 5.00 | -50 % **far off** |"), "{shown}");
        assert!(shown.contains("median error 10 % (<= 15 %) OK; 1 of 3 figures off by more than 30 % **missed**"));
        assert!(calibration.check().is_ok() && Calibration::default().check().is_err());
        let off = Calibration(vec![Pair { name: "off".to_owned(), figures: vec![figure(10.0, 12.0)] }]);
        assert!(off.check().is_err(), "a fifth is too much");
    }
}
