//! What is simulated: a cluster, a registry, an image, a workload and faults, as commented TOML with units.
//!
//! Every field has a default, so a scenario says what is special about it. A change (`cluster.nodes=500`) is made to a field before
//! anything is read, so that a wrong name or value is refused like one in the file.

use serde::Deserialize;
use thiserror::Error;

use crate::strategy::Strategy;
use crate::units::{Bytes, Rate, Share, Time};

/// Most nodes of a world.
pub const NODES_MAX: u32 = 100_000;

/// Why a scenario is none.
#[derive(Debug, Error)]
pub enum ScenarioError {
    /// No TOML, a field that is not known, or a value that is none.
    #[error("the scenario cannot be read")]
    Read(#[from] toml::de::Error),
    /// A change that changes nothing.
    #[error("{0:?} is no change; write section.field=value")]
    Change(String),
    /// A value out of range.
    #[error("{field} is {value}, but must be {must}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        must: &'static str,
    },
}

/// A scenario.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scenario {
    /// For people: what is simulated.
    pub name: String,
    /// Nodes and the network between them.
    pub cluster: ClusterConfig,
    /// Where images come from.
    pub registry: RegistryConfig,
    /// What is started.
    pub image: ImageConfig,
    /// How a start reads.
    pub start: StartConfig,
    /// When starts happen.
    pub workload: WorkloadConfig,
    /// What goes wrong.
    #[serde(rename = "fault")]
    pub faults: Vec<FaultConfig>,
    /// What must come of it.
    pub expect: ExpectConfig,
}

/// Nodes and the network between them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// Number of nodes.
    pub nodes: u32,
    /// What a node runs.
    pub strategy: Strategy,
    /// Zones; nodes are dealt to them in turn.
    pub zones: u32,
    /// Speed of a node's network card, each way.
    pub nic: Rate,
    /// Most that a node gives to others, when that is less than its card.
    pub upload_limit: Option<Rate>,
    /// Speed of a zone's way to the others, each way.
    pub zone_link: Rate,
    /// One way between two nodes of a zone.
    pub latency: Time,
    /// One way between two zones.
    pub zone_latency: Time,
    /// Speed at which a node stores chunks.
    pub disk: Rate,
    /// Speed at which a node decompresses what the registry sends, in bytes of output.
    pub decode: Rate,
    /// Speed at which a node that pulls whole layers unpacks one, in bytes of output.
    pub unpack: Rate,
    /// Bytes of a chunk on the wire between nodes, as a share of the plain ones.
    pub peer_wire: Share,
    /// Connections that each node has opened to random others before anything starts.
    pub partners: u32,
    /// Time until the members know of a change that one of them noticed.
    pub gossip: Time,
    /// Time until a member whose host is gone or cut off is noticed by those that are connected to it and ask it nothing: two pings without
    /// an answer (`PING_EVERY`, `PING_TIMEOUT` in `p2p/behaviour.rs`).
    pub failure_detection: Time,
    /// Time until the DHT answers.
    pub lookup: Time,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            nodes: 10,
            strategy: Strategy::Hermes,
            zones: 1,
            nic: Rate(1_250_000_000),
            upload_limit: None,
            zone_link: Rate(12_500_000_000),
            latency: Time(100_000),
            zone_latency: Time(500_000),
            disk: Rate(1_500_000_000),
            decode: Rate(600_000_000),
            unpack: Rate(130_000_000),
            peer_wire: Share(10_000),
            partners: 8,
            gossip: Time(300_000_000),
            failure_detection: Time(40_000_000_000),
            lookup: Time(6_000_000),
        }
    }
}

/// Where images come from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistryConfig {
    /// What it sends to all together.
    pub bandwidth: Rate,
    /// From a request to its first byte.
    pub latency: Time,
    /// Requests that it answers a second; more get 429. None is no limit.
    pub requests_per_second: Option<u32>,
    /// The `Retry-After` of a 429.
    pub retry_after: Time,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            bandwidth: Rate(1_250_000_000),
            latency: Time(20_000_000),
            requests_per_second: None,
            retry_after: Time(1_000_000_000),
        }
    }
}

/// What is started: a file, or parameters.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageConfig {
    /// An image of the library ([`crate::library`]), or a shape's file. Of the parameters below only `start_chunks` counts then, when nobody has recorded a start.
    pub shape: Option<String>,
    /// Uncompressed bytes.
    pub size: Bytes,
    /// Layers of equal length.
    pub layers: u16,
    /// Uncompressed bytes of a span.
    pub span: Bytes,
    /// Compressed bytes as a share of uncompressed ones.
    pub compressed: Share,
    /// Chunks that a start reads.
    pub start_chunks: u32,
}

impl Default for ImageConfig {
    fn default() -> Self {
        Self {
            shape: None,
            size: Bytes(1_000_000_000),
            layers: 5,
            span: Bytes(393_216),
            compressed: Share(4_000),
            start_chunks: 500,
        }
    }
}

/// How a start reads.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StartConfig {
    /// Whether what it will read is known before.
    pub prefetch: Prefetch,
    /// Reads under way at once.
    pub parallel: u32,
    /// What the program computes, evenly between its reads.
    pub work: Time,
    /// How long a read waits before it fails.
    pub deadline: Time,
}

impl Default for StartConfig {
    fn default() -> Self {
        Self { prefetch: Prefetch::Profile, parallel: 4, work: Time(0), deadline: Time(60_000_000_000) }
    }
}

/// What is fetched before it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prefetch {
    /// Nothing but what readahead guesses.
    None,
    /// What a start reads.
    #[default]
    Profile,
    /// The whole image.
    All,
}

/// When starts happen.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkloadConfig {
    /// Which.
    pub kind: WorkloadKind,
    /// Flash crowd: the starts are spread evenly over this time.
    pub spread: Time,
    /// Staggered arrivals and autoscaler: starts a minute.
    pub per_minute: u32,
    /// Autoscaler: nodes that run the image already.
    pub warm: u32,
    /// Preloading: how long before the first start it begins.
    pub lead: Time,
    /// Rolling update: nodes that start at once; the next one begins when one is ready.
    pub surge: u32,
    /// Rolling update: layers, from the top, that are not those of the version before.
    pub changed_layers: u16,
    /// Rolling update: chunks of a changed layer that the version before does not have.
    pub changed: Share,
    /// CI churn: images, each as `image` says. The most popular one is wanted twice as often as the second, three times as often as the
    /// third, and so on (Zipf's law with exponent 1).
    pub images: u16,
    /// CI churn: layers of each image, from the base, that are the same in all.
    pub shared_layers: u16,
    /// CI churn: jobs, of which `per_minute` come.
    pub jobs: u32,
    /// CI churn: how long a job has its node to itself once it is ready.
    pub job: Time,
}

impl Default for WorkloadConfig {
    fn default() -> Self {
        Self {
            kind: WorkloadKind::default(),
            spread: Time(0),
            per_minute: 0,
            warm: 0,
            lead: Time(600_000_000_000),
            surge: 0,
            changed_layers: 0,
            changed: Share(0),
            images: 1,
            shared_layers: 0,
            jobs: 0,
            job: Time(0),
        }
    }
}

/// Kinds of workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkloadKind {
    /// All nodes start at once.
    #[default]
    FlashCrowd,
    /// Nodes that are there start one after the other.
    Staggered,
    /// Nodes join the cluster one after the other and start at once.
    Autoscaler,
    /// Nodes that run the version before start this one, some at a time.
    RollingUpdate,
    /// Jobs with many images come one after the other, each to the node that has been free for longest.
    CiChurn,
}

/// Something that goes wrong.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultConfig {
    /// When.
    pub at: Time,
    /// What.
    pub kind: FaultKind,
    /// For how long; for ever when absent.
    #[serde(rename = "for")]
    pub lasts: Option<Time>,
    /// Nodes that it hits, chosen at random.
    #[serde(default)]
    pub share: Share,
    /// Slow nodes: by how much. Clock drift: parts in a million.
    #[serde(default)]
    pub factor: u32,
    /// 429s: the `Retry-After`.
    pub retry_after: Option<Time>,
}

/// Kinds of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// Daemons end and their connections with them; with `for` they start again on the same store.
    Kill,
    /// The same, but the hosts say nothing any more: nobody is told that connections are gone.
    PowerLoss,
    /// All nodes of the last zone lose power, whatever `share` says.
    ZoneLoss,
    /// Nodes stop and go on later as if nothing had been.
    Pause,
    /// Cards and disks are slower by `factor`.
    Slow,
    /// Every chunk that they give is wrong.
    Corrupt,
    /// The nodes are cut off from the rest, both ways.
    Partition,
    /// The rest does not hear these nodes, but they hear the rest.
    Deaf,
    /// The nodes keep the member list that they have.
    StaleList,
    /// Their clocks are too quick by `factor` parts in a million.
    Drift,
    /// The registry refuses connections.
    RegistryDown,
    /// The registry answers everything with 429.
    RegistryBusy,
    /// All bodies of the registry that are on their way break off.
    RegistryCut,
}

impl FaultKind {
    /// Those that random worlds have: they draw by place, so that another order is another world for every seed. The loss of a
    /// zone is a power loss of some nodes.
    pub const ALL: [Self; 12] = [
        Self::Kill,
        Self::PowerLoss,
        Self::Pause,
        Self::Slow,
        Self::Corrupt,
        Self::Partition,
        Self::Deaf,
        Self::StaleList,
        Self::Drift,
        Self::RegistryDown,
        Self::RegistryBusy,
        Self::RegistryCut,
    ];

    /// What it is called in reports.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Kill => "nodes end",
            Self::PowerLoss => "nodes lose power",
            Self::ZoneLoss => "zone lost",
            Self::Pause => "nodes pause",
            Self::Slow => "nodes are slow",
            Self::Corrupt => "nodes give wrong bytes",
            Self::Partition => "partition",
            Self::Deaf => "one-way partition",
            Self::StaleList => "stale member lists",
            Self::Drift => "quick clocks",
            Self::RegistryDown => "registry down",
            Self::RegistryBusy => "registry busy",
            Self::RegistryCut => "registry cuts bodies",
        }
    }
}

/// What must come of a run: the checkers take these as bounds.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExpectConfig {
    /// Registry bytes as a share of those that are needed once.
    pub registry: Share,
    /// Longest wait of a read for its chunks.
    pub demand_wait: Time,
    /// Whether reads may fail.
    pub failures: bool,
    /// After the last start or the end of the last fault, all are ready within this time.
    pub ready_within: Time,
}

impl Default for ExpectConfig {
    fn default() -> Self {
        Self {
            registry: Share(1_000_000),
            demand_wait: Time(60_000_000_000),
            failures: false,
            ready_within: Time(600_000_000_000),
        }
    }
}

impl Scenario {
    /// Reads a scenario, with `changes` (`section.field=value`) made to it.
    ///
    /// # Errors
    /// When it is none, or not with these changes.
    pub fn parse(text: &str, changes: &[String]) -> Result<Self, ScenarioError> {
        let mut table: toml::Table = text.parse()?;
        for change in changes {
            let (path, value) = change.split_once('=').ok_or_else(|| ScenarioError::Change(change.clone()))?;
            set(&mut table, path.trim(), value.trim()).ok_or_else(|| ScenarioError::Change(change.clone()))?;
        }
        let scenario: Self = table.try_into()?;
        scenario.validate()?;
        Ok(scenario)
    }

    /// Says what is wrong.
    ///
    /// # Errors
    /// For a value out of range.
    pub fn validate(&self) -> Result<(), ScenarioError> {
        let check = |field, value: u64, fits: bool, must| {
            if fits { Ok(()) } else { Err(ScenarioError::Value { field, value: value.to_string(), must }) }
        };
        let (cluster, work) = (&self.cluster, &self.workload);
        let nodes = u64::from(cluster.nodes);
        check("cluster.nodes", nodes, (1..=u64::from(NODES_MAX)).contains(&nodes), "between 1 and 100000")?;
        check("cluster.zones", cluster.zones.into(), (1..=64).contains(&cluster.zones), "between 1 and 64")?;
        check("cluster.peer_wire", cluster.peer_wire.0, cluster.peer_wire.0 > 0, "above 0 %")?;
        check("start.parallel", self.start.parallel.into(), (1..=1024).contains(&self.start.parallel), "1 to 1024")?;
        check("image.compressed", self.image.compressed.0, self.image.compressed.0 > 0, "above 0 %")?;
        check("image.span", self.image.span.0, self.image.span.0 >= 65_536, "64 KiB at least")?;
        check("image.size", self.image.size.0, self.image.size.0 <= 1 << 40, "1 TiB at most")?;
        let churns = work.kind == WorkloadKind::CiChurn;
        let rated = churns || matches!(work.kind, WorkloadKind::Staggered | WorkloadKind::Autoscaler);
        check("workload.per_minute", work.per_minute.into(), !rated || work.per_minute > 0, "above 0")?;
        let rolls = work.kind == WorkloadKind::RollingUpdate;
        check("workload.surge", work.surge.into(), !rolls || work.surge > 0, "above 0")?;
        check("workload.warm", work.warm.into(), work.warm <= cluster.nodes, "no more than cluster.nodes")?;
        let (images, layers) = (u64::from(work.images), u64::from(self.image.layers));
        check(
            "workload.images",
            images,
            churns && (1..=1000).contains(&images) || images == 1,
            "1, or to 1000 of ci-churn",
        )?;
        check("workload.images", images, images == 1 || self.image.shape.is_none(), "1 where image.shape names one")?;
        let own = layers.saturating_sub(work.shared_layers.into());
        check("workload.shared_layers", work.shared_layers.into(), images == 1 || own > 0, "fewer than image.layers")?;
        check("image.layers", layers, images * own < u64::from(u16::MAX), "fewer for so many images")?;
        check("workload.jobs", work.jobs.into(), !churns || work.jobs > 0, "above 0")?;
        for fault in &self.faults {
            check("fault.share", fault.share.0, fault.share.0 <= 10_000, "at most 100 %")?;
            let slow = fault.kind == FaultKind::Slow;
            check("fault.factor", fault.factor.into(), !slow || (2..=10_000).contains(&fault.factor), "2 to 10000")?;
        }
        Ok(())
    }
}

/// Changes one field, named by its path. A value that is no TOML is text.
fn set(table: &mut toml::Table, path: &str, value: &str) -> Option<()> {
    let mut names: Vec<&str> = path.split('.').collect();
    let field = names.pop().filter(|field| !field.is_empty())?;
    let mut at = table;
    for name in names {
        at = at.entry(name).or_insert_with(|| toml::Value::Table(toml::Table::new())).as_table_mut()?;
    }
    let parsed = format!("value = {value}").parse::<toml::Table>().ok().and_then(|mut table| table.remove("value"));
    at.insert(field.to_owned(), parsed.unwrap_or_else(|| toml::Value::String(value.to_owned())));
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_have_defaults_and_can_be_changed() {
        let text = "name = \"x\"\n[cluster]\nnodes = 3\n[[fault]]\nat = \"1 s\"\nkind = \"kill\"\nshare = \"10 %\"\nfor = \"2 s\"";
        let changes = ["cluster.nodes=7", "registry.bandwidth=2 Gbit/s", "cluster.strategy=registry-only"];
        let scenario = Scenario::parse(text, &changes.map(str::to_owned)).expect("valid");
        assert_eq!((scenario.cluster.nodes, scenario.registry.bandwidth), (7, Rate(250_000_000)));
        assert_eq!((scenario.cluster.strategy, scenario.start.parallel), (Strategy::RegistryOnly, 4));
        assert_eq!((scenario.faults[0].lasts, scenario.faults[0].share), (Some(Time(2_000_000_000)), Share(1000)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (change, part) in [
            ("cluster.node=7", "unknown field `node`"),
            ("cluster.nodes=0", "cluster.nodes is 0, but must be between 1 and 100000"),
            ("registry.bandwidth=fast", "\"fast\" is no speed"),
            ("nodes", "is no change"),
            ("cluster.nodes.more=3", "is no change"),
            ("workload.kind=staggered", "workload.per_minute is 0"),
            ("workload.images=3", "workload.images is 3, but must be 1, or to 1000 of ci-churn"),
        ] {
            let error = Scenario::parse("[cluster]\nnodes = 3", &[change.to_owned()]).expect_err(change);
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            let error = format!("{error}: {cause}");
            assert!(error.contains(part), "{change}: {error}");
        }
    }
}
