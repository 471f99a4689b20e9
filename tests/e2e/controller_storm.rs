//! Fifty images at once, from a registry that throttles and cuts connections, and a controller that is killed again and
//! again: all become ready, and nothing is read for nothing.
//!
//! It is killed while layers are half read, each time after it has finished some; under `make soak`, whose layers are larger, every
//! 30 s.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::wait_for;
use hermes_tests::layout::Layout;
use hermes_tests::soak;
use serde_json::json;

use crate::controller::{Controller, layer};

/// Images, each of which has a layer of its own.
const IMAGES: usize = 50;
/// Layers that images share: two each, of these.
const SHARED: usize = 6;
/// Kills, but under `make soak`.
const KILLS: usize = 4;
/// The time between two kills under `make soak`.
const KILL_INTERVAL: Duration = Duration::from_secs(30);
/// How long all of it may take: some five times what it takes.
const DEADLINE: Duration = Duration::from_secs(480);
const DEADLINE_OF_SOAK: Duration = Duration::from_secs(3600);
/// The most that may be read, in percent of the layers' bytes.
const READ_MAX_PERCENT: u64 = 130;

/// The images `v0` to `v49`, and the digests of all their layers.
fn write_images(layout: &Layout, shared_len_bytes: u64, own_len_bytes: u64) -> Result<BTreeSet<String>> {
    let shared = (0..SHARED).map(|number| layout.put_layer(&layer(&format!("shared-{number}"), shared_len_bytes)));
    let shared = shared.collect::<Result<Vec<_>>>()?;
    let mut layers = BTreeSet::new();
    for number in 0..IMAGES {
        let own = layout.put_layer(&layer(&format!("own-{number}"), own_len_bytes))?;
        let image = [shared[number % SHARED].clone(), shared[(number / SHARED + number + 1) % SHARED].clone(), own];
        layers.extend(image.iter().map(|layer| layer.layer_id.to_string()));
        layout.add_stored(&format!("v{number}"), &image, &json!({}))?;
    }
    Ok(layers)
}

/// Whether some of a layer that is not indexed yet is on the disk.
fn is_half_read(controller: &Controller) -> bool {
    let files = fs::read_dir(controller.state().join("partial")).into_iter().flatten().flatten();
    files.into_iter().any(|file| file.metadata().is_ok_and(|found| found.len() > 0))
}

#[test]
fn fifty_images_become_ready_through_throttling_cuts_and_kills() -> Result<()> {
    let is_soak = soak::length()?.is_some();
    let (shared_len_bytes, own_len_bytes) = soak::choose((6_000_000, 3_000_000), (48_000_000, 24_000_000))?;
    let deadline = Instant::now() + soak::choose(DEADLINE, DEADLINE_OF_SOAK)?;
    let mut controller = Controller::new("ctl-storm")?;
    let layout = Layout::create(&controller.scratch.path().join("layout"))?;
    let layers = write_images(&layout, shared_len_bytes, own_len_bytes)?;
    let registry = FaultyRegistry::start(layout.dir())?;
    let cut_after = own_len_bytes as usize / 4;
    registry.plan(move |number| match number % 7 {
        1 => Fault::Throttle(1),
        3 | 5 => Fault::CutAfter(cut_after),
        _ => Fault::Pass,
    });
    controller.policy("team", "team/app")?;
    controller.images(&(0..IMAGES).map(|number| registry.image(&format!("v{number}"))).collect::<Vec<_>>())?;

    let mut kills = 0;
    loop {
        let (started, before) = (Instant::now(), controller.count("layers"));
        controller.start(&[])?;
        let is_time = |controller: &Controller| match is_soak {
            true => started.elapsed() >= KILL_INTERVAL,
            false => kills < KILLS && controller.count("layers") > before && is_half_read(controller),
        };
        let is_ready = wait_for("all images, or the time to be killed", deadline - started, || {
            let ready = controller.status("team").is_some_and(|status| status["ready"] == IMAGES);
            (ready || is_time(&controller)).then_some(ready)
        });
        if is_ready.with_context(|| format!("{:?} after {kills} kills", controller.status("team")))? {
            break;
        }
        controller.kill()?;
        kills += 1;
    }
    ensure!(is_soak || kills == KILLS, "only {kills} kills");

    let delivered = registry.ledger().delivered(&layers, 0);
    let percent = delivered.bytes * 100 / delivered.unique_bytes;
    println!(
        "{IMAGES} images of {} layers ready after {kills} kills: {} bytes read of {} ({percent} %), {} answers",
        layers.len(),
        delivered.bytes,
        delivered.unique_bytes,
        delivered.answers
    );
    ensure!(percent <= READ_MAX_PERCENT, "{percent} % of the layers were read: {delivered:?}");
    // Nothing is left that nothing names: four artifacts a layer, and no beginnings of layers.
    let kept = ["statements", "references", "images", "layers", "artifacts"].map(|kind| controller.count(kind));
    ensure!(kept == [IMAGES, IMAGES, IMAGES, layers.len(), 4 * layers.len()], "{kept:?} of {} layers", layers.len());
    let left: Vec<_> = fs::read_dir(controller.state().join("partial"))?.collect();
    ensure!(left.is_empty(), "beginnings of layers are left: {left:?}");
    // What one image needs alone goes with it, and what others need stays.
    controller.images(&[registry.image("v0")])?;
    controller.wait_ready("team", 1)?;
    controller.wait("the others to go", || (controller.count("layers") == 3).then_some(()))?;
    controller.wait("their artifacts to go", || (controller.count("artifacts") == 12).then_some(()))?;
    controller.stop()
}
