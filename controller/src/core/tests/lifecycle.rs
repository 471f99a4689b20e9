use std::time::Duration;

use hermes_image::access::Access;
use hermes_image::ids::DiffId;
use hermes_policy::profile::codec::{decode, encode_record};
use hermes_policy::profile::{FirstTouch, StartRecord, TouchSource};

use super::world::*;
use crate::core::Settings;
use crate::event::{Action, Event, FailureClass, Phase, WorkloadKind};

const REDIS: &str = "docker.io/library/redis:7";

/// A world in which a policy means the image that a deployment names, and it is resolved to image 1.
fn with_redis() -> World {
    let mut world = World::new();
    world.say(policy("p", 1, spec("redis")));
    world.say(Event::Workload(workload(&id(WorkloadKind::Deployment, "a"), &["redis:7"])));
    world.say(Event::Synced);
    world.resolve(REDIS, 1);
    world
}

#[test]
fn an_image_that_matches_becomes_ready_and_the_story_is_told() {
    let mut world = with_redis();
    assert_eq!(world.phase(1), Some(Phase::Building));
    world.say(Event::Progress { image: key(1), read_bytes: 500 });
    assert_eq!(world.views[&key(1)].read_bytes, 500);
    world.build(1);
    assert_eq!(world.phase(1), Some(Phase::Ready));
    assert_eq!(world.reasons(), ["Matched", "Building", "IndexReady"]);
    assert_eq!(world.condition("p", "Ready").1, "AllReady");
    let status = &world.statuses["p"];
    assert_eq!((status.ready, status.failed, status.observed_generation), (1, 0, Some(1)));
    assert_eq!(status.images[0].image_digest_ref, format!("docker.io/library/redis@{}", key(1).manifest));
    assert!(status.images[0].last_build_time.as_ref().expect("a time").ends_with('Z'));
}

#[test]
fn names_are_matched_as_written_and_resolved_in_full() {
    let mut world = World::new();
    world.say(policy("short", 1, spec("^nginx$")));
    world.say(policy("long", 1, spec("^docker.io/library/nginx")));
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "a"), &["nginx", "oci:/etc/passwd", "a b"])));
    let name = name("docker.io/library/nginx:latest");
    assert_eq!(world.resolving.keys().collect::<Vec<_>>(), [&name]);
    world.resolve(&name.reference, 1);
    assert_eq!(world.views[&key(1)].policies.iter().collect::<Vec<_>>(), ["short"]);
    assert_eq!(world.condition("long", "Ready").1, "NothingMatched");
}

#[test]
fn every_platform_is_an_image_of_its_own() {
    let mut world = World::new();
    let mut both = spec("redis");
    both.platforms = vec![" linux/amd64".to_owned(), "linux/arm64".to_owned(), "nonsense".to_owned()];
    world.say(policy("p", 1, both));
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "a"), &["redis:7"])));
    let platforms: Vec<_> = world.resolving.keys().map(|name| name.platform.as_str()).collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm64"]);
    assert_eq!(world.condition("p", "Degraded").1, "SpecInvalid");
}

#[test]
fn a_paused_policy_begins_nothing_and_keeps_what_is() {
    let mut world = with_redis();
    world.build(1);
    let mut paused = spec("redis");
    paused.paused = true;
    world.say(policy("p", 2, paused.clone()));
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "b"), &["redis:8"])));
    world.pass(Duration::from_secs(3600));
    assert!(world.resolving.is_empty() && world.building.is_empty());
    assert_eq!(world.phase(1), Some(Phase::Ready));
    assert!(world.released.is_empty());
    paused.paused = false;
    world.say(policy("p", 3, paused));
    assert_eq!(world.resolving.len(), 2, "{:?}", world.resolving);
}

#[test]
fn a_tag_that_moves_is_a_new_image_and_pods_keep_the_old_one() {
    let mut world = with_redis();
    let (pod, late) = (id(WorkloadKind::Pod, "old"), id(WorkloadKind::Pod, "late"));
    world.say(Event::Workload(workload(&pod, &["redis:7"])));
    world.build(1);
    world.pass(Duration::from_secs(340));
    world.resolve(REDIS, 2);
    assert_eq!(world.phase(2), Some(Phase::Building));
    assert!(world.reasons().contains(&"TagMoved"));
    world.say(Event::Workload(workload(&late, &["redis:7"])));
    world.build(2);
    assert!(world.released.is_empty(), "a pod may run the old one");
    assert!(world.views[&key(1)].names.is_empty());
    world.say(Event::WorkloadGone(pod));
    assert_eq!(world.released, [key(1)]);
    assert_eq!(world.reasons().last(), Some(&"Released"));
    assert_eq!(world.phase(2), Some(Phase::Ready));
}

#[test]
fn a_tag_that_moves_without_pods_gives_the_old_one_up_when_the_new_one_is_ready() {
    let mut world = with_redis();
    world.build(1);
    world.pass(Duration::from_secs(340));
    world.resolve(REDIS, 2);
    assert!(world.released.is_empty(), "the new one is not ready");
    assert!(world.views[&key(1)].names.is_empty() && world.views[&key(1)].policies.contains("p"));
    assert_eq!(world.phase(1), Some(Phase::Ready));
    // It moves again before that: what was never ready goes at once.
    world.fail_to_build(2, failure(FailureClass::Unfit));
    world.pass(Duration::from_secs(340));
    world.resolve(REDIS, 3);
    assert_eq!(world.released, [key(2)]);
    world.build(3);
    assert_eq!(world.released, [key(2), key(1)]);
}

#[test]
fn a_tag_that_moves_back_has_its_image_at_once() {
    let mut world = with_redis();
    world.build(1);
    world.pass(Duration::from_secs(340));
    world.resolve(REDIS, 2);
    world.pass(Duration::from_secs(340));
    world.resolve(REDIS, 1);
    assert_eq!(world.released, [key(2)]);
    assert!(world.building.is_empty());
    assert_eq!(world.phase(1), Some(Phase::Ready));
    world.say(Event::WorkloadGone(id(WorkloadKind::Deployment, "a")));
    assert_eq!(world.released, [key(2), key(1)]);
}

#[test]
fn a_stand_in_goes_with_the_last_who_wants_its_name() {
    let mut world = with_redis();
    world.build(1);
    world.pass(Duration::from_secs(340));
    world.resolve(REDIS, 2);
    world.say(Event::PolicyGone("p".to_owned()));
    assert_eq!(world.released.len(), 2, "{:?}", world.released);
    assert!(world.views.is_empty() && world.building.is_empty());
}

#[test]
fn what_is_found_damaged_is_built_again_at_once() {
    let mut world = with_redis();
    world.build(1);
    world.say(Event::Lost(key(1)));
    assert_eq!(world.phase(1), Some(Phase::Building));
    assert!(world.views[&key(1)].index.is_none());
    assert_eq!(world.reasons().last(), Some(&"IndexLost"));
    world.build(1);
    assert_eq!(world.reasons().last(), Some(&"IndexReady"));
    // An older version that only pods hold has no name to read it by.
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "old"), &["redis:7"])));
    world.pass(Duration::from_secs(340));
    world.resolve(REDIS, 2);
    world.build(2);
    assert!(world.released.is_empty());
    world.say(Event::Lost(key(1)));
    assert_eq!(world.released, [key(1)]);
}

#[test]
fn a_new_tag_of_a_repository_inherits_what_starts_of_the_others_read() {
    let mut world = with_redis();
    world.build(1);
    for seconds in 0..20 {
        world.say(Event::Started { image: key(1), record: record(seconds, 1, 0..5) });
    }
    let profile = world.views[&key(1)].profile.clone().expect("a profile");
    world.say(Event::Workload(workload(&id(WorkloadKind::Deployment, "b"), &["redis:8", "other"])));
    world.resolve("docker.io/library/redis:8", 2);
    world.build(2);
    let asked = Action::CarryProfile { image: key(2), earlier: key(1), from: profile };
    assert_eq!(world.profiles.last(), Some(&asked));
    world.say(policy("p", 2, spec("")));
    world.resolve("docker.io/library/other:latest", 3);
    world.build(3);
    assert_eq!(world.profiles.last(), Some(&asked), "another repository's starts say nothing");
}

#[test]
fn digests_are_resolved_once_and_tags_again() {
    let mut world = World::new();
    world.say(policy("p", 1, spec("")));
    let pinned = format!("docker.io/library/redis@{}", key(1).manifest);
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "a"), &["redis:7", &pinned])));
    world.resolve(REDIS, 1);
    world.resolve(&pinned, 1);
    world.build(1);
    world.pass(Duration::from_secs(269));
    assert!(world.resolving.is_empty(), "not before nine tenths of the interval");
    world.pass(Duration::from_secs(62));
    assert_eq!(world.resolving.keys().map(|name| name.reference.as_str()).collect::<Vec<_>>(), [REDIS]);
    assert_eq!(world.views[&key(1)].names.len(), 2);
}

#[test]
fn what_pods_wait_for_is_built_first() {
    let mut world = World::with(Settings { builds_max: 1, ..Settings::default() });
    world.say(policy("p", 1, spec("")));
    world.say(Event::Synced);
    for (name, number) in [("a", 1), ("b", 2), ("c", 3)] {
        world.say(Event::Workload(workload(&id(WorkloadKind::Deployment, name), &[name])));
        world.resolve(&format!("docker.io/library/{name}:latest"), number);
        world.now.0 += 1;
    }
    let mut waiting = workload(&id(WorkloadKind::Pod, "w"), &["c"]);
    waiting.waiting = true;
    world.say(Event::Workload(waiting));
    world.build(1);
    world.build(3);
    world.build(2);
}

#[test]
fn what_fails_for_now_is_tried_again_later_and_told_once() {
    let mut world = with_redis();
    let mut throttled = failure(FailureClass::Transient);
    throttled.retry_after = Some(Duration::from_secs(30));
    world.fail_to_build(1, throttled);
    assert_eq!(world.phase(1), Some(Phase::Failed));
    assert_eq!(world.condition("p", "Degraded").0, "True");
    assert_eq!(world.condition("p", "Ready").1, "Failed");
    world.pass(Duration::from_secs(28));
    assert!(world.building.is_empty(), "the registry asked for 30 s");
    world.pass(Duration::from_secs(11));
    for _ in 0..5 {
        world.fail_to_build(1, failure(FailureClass::Transient));
        world.pass(Duration::from_secs(300));
    }
    let told = world.reasons();
    assert_eq!(told.iter().filter(|reason| **reason == "IndexFailed").count(), 1, "{told:?}");
    world.build(1);
    assert_eq!(world.views[&key(1)].attempts, 7);
    assert_eq!(world.condition("p", "Degraded").0, "False");
}

#[test]
fn what_is_refused_is_tried_again_with_other_logins() {
    let mut world = with_redis();
    let deployment = id(WorkloadKind::Deployment, "a");
    world.fail_to_build(1, failure(FailureClass::Denied));
    world.pass(Duration::from_secs(200));
    assert!(world.building.is_empty());
    let mut with_login = workload(&deployment, &["redis:7"]);
    with_login.pull_secrets = vec![secret("pull")];
    world.say(Event::Workload(with_login.clone()));
    assert_eq!(world.building[&key(1)].1, [secret("pull")]);
    world.build(1);

    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "b"), &["redis:8"])));
    world.fail_to_resolve("docker.io/library/redis:8", FailureClass::Denied);
    assert!(world.told.iter().filter(|(reason, _)| *reason == "AccessDenied").count() == 2, "policy and pod");
    let mut with_policy_login = spec("redis");
    with_policy_login.image_pull_secrets = vec!["default/team".to_owned(), "malformed".to_owned()];
    world.say(policy("p", 2, with_policy_login));
    assert_eq!(world.resolving[&name("docker.io/library/redis:8")], [secret("team")]);
}

#[test]
fn what_no_attempt_changes_is_not_tried_again() {
    let mut world = with_redis();
    world.fail_to_build(1, failure(FailureClass::Unfit));
    world.pass(Duration::from_secs(320));
    world.resolve(REDIS, 1);
    world.pass(Duration::from_secs(100));
    assert_eq!((world.phase(1), world.views[&key(1)].next_attempt), (Some(Phase::Failed), None));
    world.pass(Duration::from_secs(300));
    world.resolve(REDIS, 2);
    assert_eq!(world.phase(2), Some(Phase::Building), "another digest is another image");
}

#[test]
fn an_image_that_is_gone_fails_on_the_policy_until_it_is_back() {
    let mut world = World::new();
    world.say(policy("p", 1, spec("")));
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "a"), &["redis:7"])));
    world.fail_to_resolve(REDIS, FailureClass::NotFound);
    assert_eq!(
        world.condition("p", "Degraded"),
        (
            "True".to_owned(),
            "ImagesFailed".to_owned(),
            "1 images failed; the first: ImageNotFound: it failed".to_owned()
        )
    );
    assert_eq!(world.statuses["p"].images[0].image_digest_ref, REDIS);
    world.pass(Duration::from_secs(340));
    world.resolve(REDIS, 1);
    world.build(1);
    assert_eq!(world.condition("p", "Degraded").0, "False");
    // Later failures of the registry do not take away what is ready.
    world.pass(Duration::from_secs(340));
    world.fail_to_resolve(REDIS, FailureClass::NotFound);
    assert_eq!(world.condition("p", "Degraded").1, "RefreshFailed");
    assert_eq!(world.phase(1), Some(Phase::Ready));
}

#[test]
fn a_policy_that_goes_stops_its_builds() {
    let mut world = with_redis();
    world.say(Event::PolicyGone("p".to_owned()));
    assert!(world.building.is_empty() && world.views.is_empty());
    assert_eq!(world.released, [key(1)]);
    // The end of the build was on its way.
    world.say(Event::Built { image: key(1), outcome: Ok(index(1)) });
    assert_eq!(world.released.len(), 2);
    world.pass(Duration::from_secs(3600));
    assert!(world.resolving.is_empty());
}

#[test]
fn what_an_earlier_run_has_kept_is_used_and_given_up_only_when_all_is_said() {
    let mut world = World::new();
    for number in [1, 2] {
        let reference = ["", REDIS, "docker.io/library/gone:1"][usize::from(number)];
        let (index, layers) = (index(number), layers(number));
        let access = Access::Private;
        world.say(Event::Kept { image: key(number), name: name(reference), index, layers, access, profile: None });
    }
    world.say(policy("p", 1, spec("")));
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "a"), &["redis:7"])));
    world.pass(Duration::from_secs(10));
    assert!(world.released.is_empty());
    assert_eq!(world.phase(1), Some(Phase::Ready));
    world.say(Event::Synced);
    assert_eq!(world.released, [key(2)]);
    world.resolve(REDIS, 1);
    assert!(world.building.is_empty() && world.released == [key(2)]);
    assert_eq!(world.reasons(), ["Released"], "nothing new has happened");
}

#[test]
fn an_older_version_of_an_earlier_run_stays_with_its_pods() {
    let mut world = World::new();
    let kept = |number| Event::Kept {
        image: key(number),
        name: name(REDIS),
        index: index(number),
        layers: layers(number),
        access: Access::Public,
        profile: None,
    };
    world.say(kept(1));
    world.say(kept(2));
    world.say(policy("p", 1, spec("")));
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "a"), &["redis:7"])));
    world.say(Event::Synced);
    world.resolve(REDIS, 2);
    assert!(world.released.is_empty());
    world.say(Event::WorkloadGone(id(WorkloadKind::Pod, "a")));
    assert_eq!(world.released.len(), 2);
}

#[test]
fn a_wrong_expression_is_a_condition_and_the_others_count() {
    let mut world = World::new();
    let mut two = spec("redis");
    two.image_selectors.push(crate::crd::ImageSelector { image_regex: "(".to_owned() });
    world.say(policy("p", 4, two));
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "a"), &["redis:7"])));
    let (status, reason, message) = world.condition("p", "RegexValid");
    assert_eq!((status.as_str(), reason.as_str()), ("False", "RegexInvalid"));
    assert!(message.contains("imageSelectors[1]") && message.contains("character 1"), "{message}");
    assert_eq!(world.resolving.len(), 1);
    world.say(policy("p", 5, spec("redis")));
    assert_eq!(world.condition("p", "RegexValid").0, "True");
    assert_eq!(world.statuses["p"].conditions[0].observed_generation, Some(5));
}

#[test]
fn names_are_bounded_and_policies_told() {
    let mut world = World::with(Settings { names_max: 2, ..Settings::default() });
    world.say(policy("p", 1, spec("")));
    for name in ["a", "b", "c"] {
        world.say(Event::Workload(workload(&id(WorkloadKind::Pod, name), &[name])));
    }
    assert_eq!(world.resolving.len(), 2);
    assert_eq!(world.condition("p", "Degraded").1, "TooManyNames");
    world.say(Event::WorkloadGone(id(WorkloadKind::Pod, "a")));
    assert!(world.resolving.contains_key(&name("docker.io/library/c:latest")));
    assert_eq!(world.condition("p", "Degraded").0, "False");
}

fn record(seconds: u64, image: u8, chunks: std::ops::Range<u32>) -> std::sync::Arc<[u8]> {
    let touch = |chunk| FirstTouch { at_ms: chunk, layer: 0, chunk, waited: true, source: TouchSource::Registry };
    let record = StartRecord::of(seconds, vec![DiffId([image; 32])], chunks.map(touch).collect());
    encode_record(&record).into()
}

#[test]
fn records_become_a_profile_that_the_next_version_inherits() {
    let mut world = with_redis();
    world.build(1);
    for seconds in 0..20 {
        world.say(Event::Started { image: key(1), record: record(seconds, 1, 0..5) });
    }
    world.say(Event::Started { image: key(1), record: record(90, 9, 0..50) });
    world.say(Event::Started { image: key(1), record: b"nonsense".as_slice().into() });
    let profile = world.views[&key(1)].profile.clone().expect("a profile");
    let decoded = decode(&profile).expect("well formed");
    assert_eq!((decoded.chunk_count(), decoded.records), (5, 8));
    assert!(matches!(world.profiles.last(), Some(Action::KeepProfile { .. })));
    world.pass(Duration::from_secs(340));
    world.resolve(REDIS, 2);
    world.build(2);
    let asked = Action::CarryProfile { image: key(2), earlier: key(1), from: profile.clone() };
    assert_eq!(world.profiles.last(), Some(&asked));
    assert!(world.released.is_empty(), "the earlier one's indexes are read");
    world.say(Event::Carried { image: key(2), profile: Some(profile.clone()) });
    assert_eq!(world.views[&key(2)].profile, Some(profile));
    assert_eq!(world.released, [key(1)]);
}

#[test]
fn failures_come_first_in_a_status_that_is_bounded() {
    let mut world = World::with(Settings { resolves_max: 2000, ..Settings::default() });
    world.say(policy("p", 1, spec("")));
    let names: Vec<String> = (0..1200).map(|number| format!("a{number:04}")).collect();
    let images: Vec<&str> = names.iter().map(String::as_str).collect();
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "a"), &images)));
    for name in &names[..1199] {
        world.fail_to_resolve(&format!("docker.io/library/{name}:latest"), FailureClass::NotFound);
    }
    world.resolve("docker.io/library/a1199:latest", 1);
    world.build(1);
    world.pass(Duration::from_secs(1));
    let status = &world.statuses["p"];
    assert_eq!((status.images.len(), status.ready, status.failed), (1000, 1, 1199));
    assert!(status.images.iter().all(|image| image.error.is_some()));
}

#[test]
fn thousands_of_pods_of_one_image_are_counted_and_not_gone_through() {
    let mut world = World::with(Settings { builds_max: 1, ..Settings::default() });
    world.say(policy("p", 1, spec("")));
    world.say(Event::Synced);
    for number in 0..5000 {
        let mut pod = workload(&id(WorkloadKind::Pod, &number.to_string()), &["redis:7"]);
        pod.waiting = true;
        pod.pull_secrets = vec![secret(&format!("s{}", number % 3))];
        world.say(Event::Workload(pod.clone()));
        pod.waiting = false;
        world.say(Event::Workload(pod));
    }
    assert_eq!(world.resolving.len(), 1);
    world.resolve(REDIS, 1);
    assert_eq!(world.building[&key(1)].1, [secret("s0"), secret("s1"), secret("s2")]);
    for number in 0..5000 {
        world.say(Event::WorkloadGone(id(WorkloadKind::Pod, &number.to_string())));
    }
    assert_eq!(world.released, [key(1)]);
}

#[test]
fn a_registry_that_fails_does_not_hold_up_the_others() {
    let mut world = World::with(Settings { resolves_max: 4, ..Settings::default() });
    world.say(policy("p", 1, spec("")));
    let bad: Vec<String> = (0..50).map(|number| format!("bad.test/a{number}:1")).collect();
    let images: Vec<&str> = bad.iter().map(String::as_str).collect();
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "bad"), &images)));
    assert_eq!(world.resolving.len(), 4, "nobody knows yet");
    for _ in 0..4 {
        let asked = world.resolving.keys().next().expect("asked for").reference.clone();
        world.fail_to_resolve(&asked, FailureClass::Transient);
    }
    assert_eq!(world.resolving.len(), 1, "a quarter");
    world.say(Event::Workload(workload(&id(WorkloadKind::Pod, "good"), &["good.test/a:1"])));
    assert!(world.resolving.contains_key(&name("good.test/a:1")));
    let asked = world.resolving.keys().next().expect("asked for").reference.clone();
    world.resolve(&asked, 1);
    assert_eq!(world.resolving.len(), 4, "it answers again");
}
