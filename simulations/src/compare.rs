//! One scenario under several strategies: the same world from the same seed, once for each.

use std::sync::Arc;

use crate::report::Report;
use crate::scenario::{ExpectConfig, Scenario};
use crate::shape::Shape;
use crate::strategy::Strategy;
use crate::strategy::model::PATIENCE;
use crate::units::{Share, Time};
use crate::world::Progress;

/// The scenario with another strategy. What is expected of Hermes is expected of Hermes alone: the others may send what they
/// send and fail what they fail, and are waited for.
pub fn under(scenario: &Scenario, strategy: Strategy) -> Scenario {
    let mut scenario = scenario.clone();
    scenario.cluster.strategy = strategy;
    if strategy != Strategy::Hermes {
        scenario.expect = ExpectConfig {
            registry: Share(u64::MAX),
            demand_wait: Time(PATIENCE),
            failures: true,
            ready_within: Time(PATIENCE),
        };
    }
    scenario
}

/// Runs the scenario once under each strategy, in order, and tells how far each is.
pub fn compare(
    scenario: &Scenario,
    shape: &Arc<Shape>,
    seed: u64,
    strategies: &[Strategy],
    mut tell: impl FnMut(Strategy, Progress),
) -> Vec<Report> {
    let run = |strategy: &Strategy| {
        let scenario = Arc::new(under(scenario, *strategy));
        crate::run(scenario, Arc::clone(shape), seed, |progress| tell(*strategy, progress))
    };
    strategies.iter().map(run).collect()
}

#[cfg(test)]
mod tests;
