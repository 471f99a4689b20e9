//! The same policy in a made-up world.
//!
//! Owns virtual time, links, a registry, a cluster with faults, and the checkers; runs [`hermes_policy::flight::Flight`], the
//! code of the node daemon, unchanged, on each of up to tens of thousands of nodes. Never reads a clock or draws a number
//! that is not in the seed, so that one seed is one run ([`trace`]), and never decides about chunks.
//!
//! Data flows: [`open`] (and [`library`]) -> [`scenario`] + [`shape`] + seed -> [`world`] -> [`report`] -> [`html`]; [`compare`] runs the same world once for
//! each [`strategy`]; [`checkers`] watch all the way, and
//! [`ledger`] notes who reads what from the registry; [`fuzz`] makes random small worlds, and makes the failing ones smaller; [`replay`] decides again
//! what a real node has decided. What the model is, and what it cannot say: `docs/simulation.md`.

pub mod checkers;
pub mod compare;
pub mod fuzz;
pub mod html;
pub mod ledger;
pub mod library;
pub mod net;
pub mod open;
pub mod queue;
pub mod replay;
pub mod report;
pub mod sabotage;
pub mod scenario;
pub mod shape;
pub mod strategy;
pub mod trace;
pub mod units;
pub mod world;

mod node;

use std::sync::Arc;

use report::Report;
use scenario::Scenario;
use shape::{Shape, ShapeError};
use world::{Progress, World};

/// Runs a scenario with the image's shape. The same arguments give the same report on every machine.
pub fn run(scenario: Arc<Scenario>, shape: Arc<Shape>, seed: u64, tell: impl FnMut(Progress)) -> Report {
    World::new(scenario, shape, seed, None).run(tell)
}

/// The shape by a scenario's parameters.
///
/// # Errors
/// When the parameters describe no image.
pub fn synthetic_shape(scenario: &Scenario, seed: u64) -> Result<Arc<Shape>, ShapeError> {
    let work = &scenario.workload;
    Ok(Arc::new(Shape::synthetic_images(&scenario.image, work.images, work.shared_layers, seed)?))
}
