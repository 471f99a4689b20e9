//! Fleets of real nodes and the same fleets simulated, beside each other: `make calibrate`. Nothing in `make test`.

use std::path::Path;

use anyhow::Result;
use hermes_tests::fleet::calibration::{Calibration, Event, Image, Pair};
use hermes_tests::fleet::outcome::Outcome;
use hermes_tests::fleet::rig::{Plan, Rig};
use hermes_tests::fleet::{Shape, scenarios};
use hermes_tests::guard::{ScratchDir, Sweeper};

/// What `make calibrate` sets.
const VARIABLE: &str = "HERMES_CALIBRATE";
/// When two nodes are killed, as a part of the bound.
const KILLED_AT: f64 = 0.3;

#[test]
fn a_fleet_does_what_its_simulation_says() -> Result<()> {
    if std::env::var_os(VARIABLE).is_none() {
        return Ok(());
    }
    let rig = Rig::new(Path::new(env!("CARGO_BIN_EXE_hermes")), Plan::WHOLE)?;
    let scratch = ScratchDir::new("calibrate")?;
    let _sweeper = Sweeper::watch(scratch.path())?;
    let image = Image::export(&rig, scratch.path())?;
    let of = |zones: &[usize]| Shape { zones: zones.to_vec(), ..Shape::default() };
    let twelve = of(&[12]);
    let mut calibration = Calibration::default();
    println!("{}", Outcome::heading());
    let mut compare = |name: &str, shape: &Shape, event: Event, outcome: Outcome| -> Result<()> {
        println!("{outcome}");
        outcome.check()?;
        calibration.0.push(Pair::new(name, &rig, &image, shape, event, &outcome)?);
        Ok(())
    };
    for (name, zones) in [("8 cold nodes", &[8][..]), ("12 cold nodes", &[12]), ("three zones of 4", &[4, 4, 4])] {
        let shape = of(zones);
        compare(name, &shape, Event::AllCold, scenarios::all_cold(name, &rig, &shape)?)?;
    }
    let name = "one of 12, the others have it";
    compare(name, &twelve, Event::OneCold, scenarios::one_cold(name, &rig, &twelve)?)?;
    let (name, event) = ("2 of 12 are killed", Event::Killed(2, KILLED_AT));
    compare(name, &twelve, event, scenarios::killed(name, &rig, &twelve, &[4, 9], KILLED_AT)?)?;
    let (name, event) = ("two halves of 6 part", Event::Parted(scenarios::PARTED.0, scenarios::PARTED.1));
    compare(name, &twelve, event, scenarios::parted(name, &rig, &twelve)?)?;
    println!("\n{calibration}");
    calibration.check()
}
