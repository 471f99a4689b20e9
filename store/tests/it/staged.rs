//! `kill -9` at random points of staging and adopting: a layer is there whole, or nothing of it.

use std::path::Path;

use hermes_store::{Read, Store, StoreConfig};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::harness::{kill_after, step};
use crate::ramp::Ramp;

const ROUNDS: u64 = 60;
const LAYERS: u32 = 4;
/// Most steps before the kill: some lives of every layer.
const STEPS_MAX: u64 = 200;
fn ramps() -> Vec<Ramp> {
    let lens: Vec<u64> = (0..24).map(|no| [512, 12_288, 65_536, 3_072, 20_480][no % 5]).collect();
    (1..=LAYERS).map(|layer| Ramp::unique(layer, &lens)).collect()
}

/// Opens what the last victim left: every layer that is registered is complete and right, and no file is over.
fn reopen(dir: &Path, ramps: &[Ramp]) -> std::sync::Arc<Store> {
    let mut config = StoreConfig::new(dir.join("store"));
    config.free_floor_bytes = 0;
    let store = Store::open(config).expect("the store opens after every kill");
    assert!(store.recovery().dropped.is_empty() && store.recovery().cleared.is_empty(), "{:?}", store.recovery());
    for layer in store.layers() {
        let ramp = ramps.iter().find(|ramp| ramp.table.diff_id() == layer.diff_id()).expect("one of these");
        assert!(layer.is_complete(), "a layer is there in part");
        ramp.check(&layer.present(), |offset, buf| matches!(layer.read_at(offset, buf), Ok(Read::Hit(_))));
        assert!(layer.verify_present().expect("verifies").is_empty());
    }
    let files = std::fs::read_dir(dir.join("store/layers")).expect("lists").count();
    assert_eq!(files, store.layers().len(), "files without a layer");
    store
}

/// The victim. Does nothing unless it is one.
#[test]
fn victim() {
    let Ok(dir) = std::env::var("HERMES_STORE_STAGING_VICTIM") else { return };
    let seed: u64 = std::env::var("HERMES_STORE_SEED").expect("a seed").parse().expect("a number");
    let ramps = ramps();
    step();
    let store = reopen(Path::new(&dir), &ramps);
    let mut random = SmallRng::seed_from_u64(seed);
    loop {
        let ramp = &ramps[random.random_range(0..ramps.len())];
        let diff_id = ramp.table.diff_id();
        let mut staged = store.stage_layer().expect("begins");
        for chunk in 0..ramp.table.count() {
            staged.append(&ramp.verified(chunk)).expect("appends");
            step();
        }
        let sealed = staged.seal(&ramp.table).expect("seals");
        step();
        match random.random_range(0..4) {
            0 => drop(sealed),
            1 => {
                store.remove_layer(diff_id).expect("removes");
                step();
                store.adopt(sealed).map(drop).expect("adopts");
            }
            _ => store.adopt(sealed).map(drop).expect("adopts"),
        }
        step();
    }
}

#[test]
fn killed_60_times_a_layer_is_there_whole_or_not_at_all() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().to_str().expect("a readable path");
    let mut random = SmallRng::seed_from_u64(11);
    for round in 0..ROUNDS {
        let settings = [("HERMES_STORE_STAGING_VICTIM", dir), ("HERMES_STORE_SEED", &round.to_string())];
        kill_after(random.random_range(0..STEPS_MAX), "staged::victim", &settings);
    }
    reopen(folder.path(), &ramps());
}
