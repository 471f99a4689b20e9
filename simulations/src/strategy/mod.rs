//! What may stand where a Hermes node stands, so that they can be compared in the same world.
//!
//! Every strategy gets the same nodes, links, registry, image, arrivals and faults from the same seed; what it does with them
//! is its own. Hermes is the production policy, whole or with one part switched off by its limits and inputs; the others are
//! models ([`model`]), run by `world/rival`. [`model::MODELS`] is the one place with their parameters and where those come from.

pub mod model;

use std::fmt;
use std::str::FromStr;

use hermes_policy::limits::Limits;
use serde::Deserialize;
use thiserror::Error;

/// What stands where a Hermes node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// The production policy in a swarm.
    #[default]
    Hermes,
    /// Hermes whose extents have no owners: who finds no holder reads the registry.
    HermesNoOwners,
    /// Hermes whose owners serve all that ask and refer nobody to others.
    HermesNoReferral,
    /// Hermes that never asks a second holder for what a reader waits for.
    HermesNoHedging,
    /// Hermes whose nodes say what they have when their start is over, and are referred to by nobody before.
    HermesNoRelay,
    /// Hermes that does not know what a start will read.
    HermesNoProfile,
    /// Hermes whose warm nodes are there but have nothing.
    HermesNoSeeds,
    /// Hermes that takes all nodes for members of one zone.
    HermesNoZones,
    /// The production policy without a swarm: each node reads the registry lazily for itself.
    RegistryOnly,
    /// containerd pulls and unpacks whole layers from the registry.
    Containerd,
    /// Images are pulled to every node before pods come, and pods wait for that.
    Preload,
    /// Lazy reads of whole spans from the registry.
    Soci,
    /// Whole layers from nodes that a DHT names, else from the registry.
    Spegel,
    /// Pieces of layers from parents that a scheduler names; seed peers read the registry.
    Dragonfly,
    /// Pieces of layers from neighbours that a tracker names; origins read the registry.
    Kraken,
}

/// No strategy.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is no strategy; there are {names}", names = Strategy::ALL.map(Strategy::name).join(", "))]
pub struct UnknownStrategy(String);

impl FromStr for Strategy {
    type Err = UnknownStrategy;

    fn from_str(name: &str) -> Result<Self, UnknownStrategy> {
        let found = Self::ALL.into_iter().find(|strategy| strategy.name() == name.trim());
        found.ok_or_else(|| UnknownStrategy(name.trim().to_owned()))
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Strategy {
    /// All of them, in the order in which a comparison shows them.
    pub const ALL: [Self; 15] = [
        Self::Hermes,
        Self::HermesNoOwners,
        Self::HermesNoReferral,
        Self::HermesNoHedging,
        Self::HermesNoRelay,
        Self::HermesNoProfile,
        Self::HermesNoSeeds,
        Self::HermesNoZones,
        Self::RegistryOnly,
        Self::Soci,
        Self::Containerd,
        Self::Preload,
        Self::Spegel,
        Self::Dragonfly,
        Self::Kraken,
    ];

    /// Hermes and the other systems: what is compared when nobody says otherwise.
    pub const SYSTEMS: [Self; 8] = [
        Self::Hermes,
        Self::RegistryOnly,
        Self::Soci,
        Self::Containerd,
        Self::Preload,
        Self::Spegel,
        Self::Dragonfly,
        Self::Kraken,
    ];

    /// Its name, as scenarios and commands have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::HermesNoOwners => "hermes-no-owners",
            Self::HermesNoReferral => "hermes-no-referral",
            Self::HermesNoHedging => "hermes-no-hedging",
            Self::HermesNoRelay => "hermes-no-relay",
            Self::HermesNoProfile => "hermes-no-profile",
            Self::HermesNoSeeds => "hermes-no-seeds",
            Self::HermesNoZones => "hermes-no-zones",
            Self::RegistryOnly => "registry-only",
            Self::Soci => "soci",
            Self::Containerd => "containerd",
            Self::Preload => "preload",
            Self::Spegel => "spegel",
            Self::Dragonfly => "dragonfly",
            Self::Kraken => "kraken",
        }
    }

    /// Whether nodes run the production policy.
    pub const fn is_policy(self) -> bool {
        !matches!(self, Self::Soci | Self::Containerd | Self::Preload | Self::Spegel | Self::Dragonfly | Self::Kraken)
    }

    /// Whether the production policy has others to ask.
    pub const fn has_swarm(self) -> bool {
        self.is_policy() && !matches!(self, Self::RegistryOnly)
    }

    /// Whether nodes fetch whole images before anything is read.
    pub const fn is_eager(self) -> bool {
        !self.is_policy() && !matches!(self, Self::Soci)
    }

    /// The limits of a node's policy: the defaults, but for a part that is switched off.
    pub fn limits(self) -> Limits {
        let limits = Limits::default();
        match self {
            Self::HermesNoReferral | Self::HermesNoRelay => Limits { direct_claimants: usize::MAX, ..limits },
            Self::HermesNoHedging => Limits { hedge_percent: 0, ..limits },
            _ => limits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_scenarios() {
        for strategy in Strategy::ALL {
            assert_eq!(strategy.name().parse(), Ok(strategy));
            let text = format!("strategy = \"{strategy}\"");
            let table: toml::Table = text.parse().expect("it is TOML");
            let read: Strategy = table["strategy"].clone().try_into().expect("it is a strategy");
            assert_eq!(read, strategy);
        }
        let error = "dragonflies".parse::<Strategy>().expect_err("there is none").to_string();
        assert!(error.contains("\"dragonflies\" is no strategy") && error.contains("dragonfly, kraken"), "{error}");
    }

    #[test]
    fn the_documentation_quotes_the_models() {
        let text = include_str!("../../../docs/simulation.md");
        let missing = model::table().lines().find(|line| !text.contains(line)).map(str::to_owned);
        assert_eq!(missing, None, "docs/simulation.md has another table");
    }

    #[test]
    fn every_strategy_is_the_policy_or_a_model() {
        for strategy in Strategy::ALL {
            assert_eq!(
                model::MODELS.iter().any(|model| model.strategy == strategy),
                !strategy.is_policy(),
                "{strategy}"
            );
        }
        assert!(Strategy::SYSTEMS.iter().all(|system| Strategy::ALL.contains(system)));
    }
}
