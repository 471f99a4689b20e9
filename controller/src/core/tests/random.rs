//! Any order of events: what must always hold is checked by the world after each, and in the end everything is ready.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use hermes_image::access::Access;
use hermes_image::ids::DiffId;
use hermes_policy::profile::codec::encode;
use hermes_policy::profile::{FirstTouch, StartRecord, TouchSource, merge};
use proptest::prelude::*;

use super::world::*;
use crate::core::Settings;
use crate::event::{Action, Event, FailureClass, Phase, Resolved, WorkloadKind};

#[derive(Debug, Clone)]
enum Step {
    Policy { name: u8, regex: u8, paused: bool },
    PolicyGone(u8),
    Workload { id: u8, images: Vec<u8>, secret: bool, waiting: bool },
    WorkloadGone(u8),
    Synced,
    Kept { name: u8, image: u8, has_profile: bool },
    Resolved { which: prop::sample::Index, image: u8, fails: Option<u8> },
    Built { which: prop::sample::Index, fails: Option<u8> },
    StaleBuilt { image: u8, fails: bool },
    Progress { image: u8 },
    Lost { image: u8 },
    Carried { which: prop::sample::Index, applies: bool },
    Pass { seconds: u16 },
}

const REGEXES: [&str; 5] = ["", "^a", "b|c", "(", "nothing"];
const TEXTS: [&str; 5] = ["a", "b:1", "c", "docker.io/library/a", "not an image"];
const CLASSES: [FailureClass; 5] =
    [FailureClass::Transient, FailureClass::Denied, FailureClass::NotFound, FailureClass::Unfit, FailureClass::Local];

fn step() -> impl Strategy<Value = Step> {
    let fails = || prop::option::weighted(0.4, 0_u8..5);
    prop_oneof![
        3 => (0_u8..3, 0_u8..5, any::<bool>()).prop_map(|(name, regex, paused)| Step::Policy { name, regex, paused }),
        1 => (0_u8..3).prop_map(Step::PolicyGone),
        4 => (0_u8..6, prop::collection::vec(0_u8..5, 0..3), any::<bool>(), any::<bool>())
            .prop_map(|(id, images, secret, waiting)| Step::Workload { id, images, secret, waiting }),
        2 => (0_u8..6).prop_map(Step::WorkloadGone),
        1 => Just(Step::Synced),
        1 => (0_u8..3, 1_u8..8, any::<bool>())
            .prop_map(|(name, image, has_profile)| Step::Kept { name, image, has_profile }),
        1 => (1_u8..8).prop_map(|image| Step::Lost { image }),
        2 => (any::<prop::sample::Index>(), any::<bool>())
            .prop_map(|(which, applies)| Step::Carried { which, applies }),
        6 => (any::<prop::sample::Index>(), 1_u8..8, fails())
            .prop_map(|(which, image, fails)| Step::Resolved { which, image, fails }),
        4 => (any::<prop::sample::Index>(), fails()).prop_map(|(which, fails)| Step::Built { which, fails }),
        1 => (1_u8..8, any::<bool>()).prop_map(|(image, fails)| Step::StaleBuilt { image, fails }),
        1 => (1_u8..8).prop_map(|image| Step::Progress { image }),
        3 => (0_u16..700).prop_map(|seconds| Step::Pass { seconds }),
    ]
}

fn resolved(image: u8) -> Resolved {
    Resolved { image: key(image), layers: layers(image), access: Access::Public }
}

/// What starts of some image read.
fn profile() -> Arc<[u8]> {
    let touch = FirstTouch { at_ms: 0, layer: 0, chunk: 0, waited: true, source: TouchSource::Registry };
    let record = StartRecord::of(1, vec![DiffId([1; 32])], vec![touch]);
    encode(&merge(&[record]).expect("one start counts")).into()
}

fn apply(world: &mut World, step: &Step) {
    match step.clone() {
        Step::Policy { name, regex, paused } => {
            let mut spec = spec(REGEXES[usize::from(regex)]);
            spec.paused = paused;
            world.say(policy(&format!("p{name}"), 1, spec));
        }
        Step::PolicyGone(name) => world.say(Event::PolicyGone(format!("p{name}"))),
        Step::Workload { id: number, images, secret: with_secret, waiting } => {
            let images: Vec<&str> = images.iter().map(|image| TEXTS[usize::from(*image)]).collect();
            let mut changed = workload(&workload_id(number), &images);
            changed.waiting = waiting;
            changed.pull_secrets = if with_secret { vec![secret("s")] } else { Vec::new() };
            world.say(Event::Workload(changed));
        }
        Step::WorkloadGone(number) => world.say(Event::WorkloadGone(workload_id(number))),
        Step::Synced => world.say(Event::Synced),
        Step::Lost { image } => world.say(Event::Lost(key(image))),
        Step::Carried { which, applies } => {
            if !world.carrying.is_empty() {
                let image = which.get(&world.carrying).clone();
                world.say(Event::Carried { image, profile: applies.then(profile) });
            }
        }
        Step::Kept { name: number, image, has_profile } => {
            let reference = ["docker.io/library/a:latest", "docker.io/library/b:1", "x.y/z:1"][usize::from(number)];
            let (index, layers) = (index(image), layers(image));
            let access = Access::Private;
            let profile = has_profile.then(profile);
            world.say(Event::Kept { image: key(image), name: name(reference), index, layers, access, profile });
        }
        Step::Resolved { which, image, fails } => {
            let asked: Vec<_> = world.resolving.keys().cloned().collect();
            if asked.is_empty() {
                return;
            }
            let outcome = match fails {
                Some(class) => Err(failure(CLASSES[usize::from(class)])),
                None => Ok(resolved(image)),
            };
            world.say(Event::Resolved { name: which.get(&asked).clone(), outcome });
        }
        Step::Built { which, fails } => {
            let asked: Vec<_> = world.building.keys().cloned().collect();
            if asked.is_empty() {
                return;
            }
            let image = which.get(&asked).clone();
            let outcome = match fails {
                Some(class) => Err(failure(CLASSES[usize::from(class)])),
                None => Ok(index(image.manifest.0[0])),
            };
            world.say(Event::Built { image, outcome });
        }
        Step::StaleBuilt { image, fails } => {
            // Only what is not asked for can come late.
            if !world.building.contains_key(&key(image)) {
                let outcome = if fails { Err(failure(FailureClass::Local)) } else { Ok(index(image)) };
                world.say(Event::Built { image: key(image), outcome });
            }
        }
        Step::Progress { image } => world.say(Event::Progress { image: key(image), read_bytes: 7 }),
        Step::Pass { seconds } => world.pass(Duration::from_secs(u64::from(seconds))),
    }
}

fn workload_id(number: u8) -> crate::event::WorkloadId {
    id(if number.is_multiple_of(2) { WorkloadKind::Pod } else { WorkloadKind::Deployment }, &number.to_string())
}

/// From now on the registry gives everything, and each name stands for one image for ever.
fn heal(world: &mut World) {
    world.say(Event::Synced);
    for _ in 0..200 {
        while let Some(asked) = world.resolving.keys().next().cloned() {
            let image = 100 + asked.reference.bytes().fold(0_u8, u8::wrapping_add) % 100;
            world.say(Event::Resolved { name: asked, outcome: Ok(resolved(image)) });
        }
        while let Some(image) = world.carrying.pop() {
            world.say(Event::Carried { image, profile: None });
        }
        while let Some(image) = world.building.keys().next().cloned() {
            let number = image.manifest.0[0];
            world.say(Event::Built { image, outcome: Ok(index(number)) });
        }
        world.pass(Duration::from_secs(60));
    }
}

fn run(steps: &[Step]) -> World {
    let mut world = World::with(Settings { builds_max: 2, resolves_max: 2, ..Settings::default() });
    for step in steps {
        let (released, wanted) = (world.released.len(), world.wanted_images());
        apply(&mut world, step);
        // What is released was published as wanted by somebody only if this very step took that away.
        for image in &world.released[released..] {
            assert!(!world.wanted_images().contains(image), "{image:?} of {wanted:?} is released and wanted");
        }
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn everything_that_is_wanted_is_ready_in_the_end(steps in prop::collection::vec(step(), 0..80)) {
        let mut world = run(&steps);
        let synced = steps.iter().any(|step| matches!(step, Step::Synced));
        let stale = steps.iter().any(|step| matches!(step, Step::StaleBuilt { .. }));
        prop_assert!(synced || stale || world.released.is_empty());
        // Nothing is paused any more.
        world.say(policy("p0", 9, spec("")));
        for name in ["p1", "p2"] {
            world.say(Event::PolicyGone(name.to_owned()));
        }
        heal(&mut world);
        let unfit: BTreeSet<_> = world.views.values().filter(|view| view.failure.as_ref()
            .is_some_and(|failure| failure.class == FailureClass::Unfit)).map(|view| view.image.clone()).collect();
        for view in world.views.values().filter(|view| !unfit.contains(&view.image)) {
            prop_assert_eq!(view.phase, Phase::Ready, "{:?}", view);
            prop_assert!(!view.policies.is_empty());
        }
        let before = world.log.len();
        world.pass(Duration::from_millis(1));
        let quiet = world.log[before..].iter().all(|action| matches!(action, Action::Resolve { .. } | Action::WakeAt(_)));
        prop_assert!(quiet);
        for number in 0..6 {
            world.say(Event::WorkloadGone(workload_id(number)));
        }
        prop_assert!(world.views.is_empty() && world.building.is_empty(), "{:?}", world.views);
    }

    #[test]
    fn the_same_events_give_the_same_actions(steps in prop::collection::vec(step(), 0..60)) {
        prop_assert_eq!(run(&steps).log, run(&steps).log);
    }
}
