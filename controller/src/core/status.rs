//! What is said of policies.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::images::ImageState;
use super::reference::repository;
use super::wants::PolicyState;
use super::{Core, Timer, Turn};
use crate::crd::{HermesPolicyStatus, PolicyImage, PolicyImagePhase};
use crate::event::{Action, Failure, ImageKey, Phase, UnixMillis};

/// Images that a status lists: 1,000 of 400 bytes are far from what etcd takes (1.5 MB).
const IMAGES_MAX: usize = 1000;
/// Least time between two rounds of statuses, in milliseconds: each looks at all images of the policies that have changed.
const INTERVAL_MS: u64 = 500;
/// Longest message of a condition, in bytes.
const MESSAGE_LEN_MAX_BYTES: usize = 1024;

/// What of a policy is not as it should be.
#[derive(Debug, Default)]
struct Tally {
    /// Names that are not followed because there are too many.
    left_out: usize,
    ready: usize,
    failed: usize,
    coming: usize,
    /// The first failure, for people.
    first: Option<String>,
    /// Names that stand for something that is ready, but could not be resolved again.
    stale: usize,
}

fn time(moment: UnixMillis) -> jiff::Timestamp {
    i64::try_from(moment.0)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .unwrap_or(jiff::Timestamp::MAX)
}

fn cut(mut text: String) -> String {
    if text.len() > MESSAGE_LEN_MAX_BYTES {
        let end = (0..=MESSAGE_LEN_MAX_BYTES - 3).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push_str("...");
    }
    text
}

fn error_text(failure: &Failure) -> String {
    cut(format!("{}: {}", failure.reason, failure.message))
}

fn image_entry(key: &ImageKey, image: &ImageState) -> PolicyImage {
    let phase = match image.phase {
        Phase::Pending | Phase::Building => PolicyImagePhase::Building,
        Phase::Ready => PolicyImagePhase::Ready,
        Phase::Failed => PolicyImagePhase::Failed,
    };
    let ended = matches!(image.phase, Phase::Ready | Phase::Failed);
    PolicyImage {
        image_digest_ref: format!("{}@{}", repository(&image.source.reference), key.manifest),
        platform: image.source.platform.clone(),
        phase,
        last_build_time: ended.then(|| seconds(image.since)),
        error: image.failure.as_ref().map(error_text),
    }
}

/// RFC 3339, whole seconds, as Kubernetes has it.
fn seconds(moment: UnixMillis) -> String {
    time(UnixMillis(moment.0 / 1000 * 1000)).to_string()
}

impl Core {
    pub(super) fn settle_policies(&mut self, turn: &mut Turn<'_>) {
        if self.changed_policies.is_empty() {
            return;
        }
        let soonest = self.statuses_at.map_or(turn.now, |said| UnixMillis(said.0 + INTERVAL_MS));
        // A clock that was set back must not keep statuses from being said.
        if soonest > turn.now && self.statuses_at.is_some_and(|said| said <= turn.now) {
            self.timers.insert((soonest, Timer::Statuses));
            return;
        }
        self.statuses_at = Some(turn.now);
        while let Some(name) = self.changed_policies.pop_first() {
            let Some(policy) = self.policies.get(&name) else { continue };
            let status = self.status(turn.now, &name, policy);
            if self.statuses.get(&name) != Some(&status) {
                self.statuses.insert(name.clone(), status.clone());
                turn.out.push(Action::PolicyStatus { policy: name, status });
            }
        }
    }

    fn status(&self, now: UnixMillis, name: &str, policy: &PolicyState) -> HermesPolicyStatus {
        let left_out = self.left_out.values().filter(|policies| policies.contains(name)).count();
        let mut tally = Tally { left_out, ..Tally::default() };
        let mut images = Vec::new();
        let mine = self
            .images
            .iter()
            .filter(|(_, image)| image.published.as_deref().is_some_and(|published| published.policies.contains(name)));
        for (key, image) in mine {
            let entry = image_entry(key, image);
            match entry.phase {
                PolicyImagePhase::Building => tally.coming += 1,
                PolicyImagePhase::Ready => tally.ready += 1,
                PolicyImagePhase::Failed => tally.failed += 1,
            }
            if let Some(error) = &entry.error {
                tally.first.get_or_insert_with(|| error.clone());
            }
            images.push(entry);
        }
        for (name, state) in self.names.iter().filter(|(_, state)| state.policies.contains(name)) {
            match (&state.failure, &state.image) {
                (Some(failure), None) => {
                    tally.failed += 1;
                    tally.first.get_or_insert_with(|| error_text(failure));
                    images.push(PolicyImage {
                        image_digest_ref: name.reference.clone(),
                        platform: name.platform.clone(),
                        phase: PolicyImagePhase::Failed,
                        last_build_time: Some(seconds(state.failed_at)),
                        error: Some(error_text(failure)),
                    });
                }
                (Some(failure), Some(_)) => {
                    tally.stale += 1;
                    tally.first.get_or_insert_with(|| error_text(failure));
                }
                (None, None) if state.active => tally.coming += 1,
                (None, _) => {}
            }
        }
        let order = |entry: &PolicyImage| match entry.phase {
            PolicyImagePhase::Failed => 0,
            PolicyImagePhase::Building => 1,
            PolicyImagePhase::Ready => 2,
        };
        images.sort_by(|a, b| {
            (order(a), &a.image_digest_ref, &a.platform).cmp(&(order(b), &b.image_digest_ref, &b.platform))
        });
        images.truncate(IMAGES_MAX);
        let before = self.statuses.get(name).map(|status| status.conditions.as_slice()).unwrap_or_default();
        HermesPolicyStatus {
            observed_generation: Some(policy.generation),
            ready: tally.ready as i32,
            failed: tally.failed as i32,
            images,
            conditions: conditions(now, policy, &tally, before),
        }
    }
}

fn conditions(now: UnixMillis, policy: &PolicyState, tally: &Tally, before: &[Condition]) -> Vec<Condition> {
    let all = tally.ready + tally.failed + tally.coming;
    let counts = format!("{} of {all} images are ready, {} failed", tally.ready, tally.failed);
    let ready = match tally {
        _ if all == 0 => ("True", "NothingMatched", "no workload names an image that matches".to_owned()),
        tally if tally.ready == all => ("True", "AllReady", counts.clone()),
        _ if policy.spec.paused => ("False", "Paused", format!("{counts}; the policy is paused")),
        tally if tally.coming > 0 => ("False", "Building", counts.clone()),
        _ => ("False", "Failed", counts.clone()),
    };
    let problems = &policy.selectors.problems;
    let regex = match problems.as_slice() {
        [] => ("True", "Valid", "all imageSelectors can be used".to_owned()),
        problems => ("False", "RegexInvalid", problems.join("; ")),
    };
    let first = tally.first.as_deref().unwrap_or_default();
    let degraded = match tally {
        tally if tally.failed > 0 => {
            ("True", "ImagesFailed", format!("{} images failed; the first: {first}", tally.failed))
        }
        tally if tally.stale > 0 => {
            ("True", "RefreshFailed", format!("{} names cannot be looked up again; the first: {first}", tally.stale))
        }
        _ if tally.left_out > 0 => {
            let message =
                format!("{} names are not followed, because there are too many; narrow the selectors", tally.left_out);
            ("True", "TooManyNames", message)
        }
        _ if !policy.problems.is_empty() => ("True", "SpecInvalid", policy.problems.join("; ")),
        _ => ("False", "AsExpected", "nothing has failed".to_owned()),
    };
    [("Ready", ready), ("RegexValid", regex), ("Degraded", degraded)]
        .into_iter()
        .map(|(kind, (status, reason, message))| {
            let same = before.iter().find(|before| before.type_ == kind && before.status == status);
            Condition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                observed_generation: Some(policy.generation),
                last_transition_time: same.map_or_else(|| Time(time(now)), |same| same.last_transition_time.clone()),
                reason: reason.to_owned(),
                message: cut(message),
            }
        })
        .collect()
}
