//! A made-up cluster and registry around the core: plays the driver, and checks after every event what must always hold.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use hermes_image::access::Access;
use hermes_image::ids::{ArtifactId, DiffId, Digest, LayerId};
use hermes_policy::rng::Rng;

use crate::core::{Core, Settings};
use crate::crd::{HermesPolicySpec, HermesPolicyStatus, ImageSelector};
use crate::event::{
    Action, Event, Failure, FailureClass, ImageKey, ImageView, Name, Phase, Policy, ReadyIndex, Resolved,
    ResolvedLayer, SecretRef, UnixMillis, Workload, WorkloadId, WorkloadKind,
};

pub(super) fn key(number: u8) -> ImageKey {
    ImageKey { manifest: Digest([number; 32]) }
}

pub(super) fn index(number: u8) -> ReadyIndex {
    ReadyIndex {
        statement: Arc::from([number].as_slice()),
        artifacts: [ArtifactId([number; 32])].into(),
        index_len_bytes: 10,
        image_len_bytes: 1000,
    }
}

pub(super) fn layers(number: u8) -> Arc<[ResolvedLayer]> {
    [ResolvedLayer { layer: LayerId([number; 32]), diff_id: DiffId([number; 32]), len_bytes: 1000 }].into()
}

pub(super) fn failure(class: FailureClass) -> Failure {
    let reason = match class {
        FailureClass::Transient => "RegistryUnavailable",
        FailureClass::Denied => "AccessDenied",
        FailureClass::NotFound => "ImageNotFound",
        FailureClass::Unfit => "LayerInvalid",
        FailureClass::Local => "QuotaExceeded",
    };
    Failure { class, reason, message: "it failed".to_owned(), retry_after: None }
}

pub(super) fn spec(regex: &str) -> HermesPolicySpec {
    HermesPolicySpec {
        image_selectors: vec![ImageSelector { image_regex: regex.to_owned() }],
        ..HermesPolicySpec::default()
    }
}

pub(super) fn policy(name: &str, generation: i64, spec: HermesPolicySpec) -> Event {
    Event::Policy(Policy { name: name.to_owned(), generation, spec })
}

pub(super) fn id(kind: WorkloadKind, name: &str) -> WorkloadId {
    WorkloadId { kind, namespace: "default".to_owned(), name: name.to_owned() }
}

pub(super) fn workload(id: &WorkloadId, images: &[&str]) -> Workload {
    Workload {
        id: id.clone(),
        images: images.iter().map(|image| (*image).to_owned()).collect(),
        pull_secrets: Vec::new(),
        waiting: false,
    }
}

pub(super) fn secret(name: &str) -> SecretRef {
    SecretRef { namespace: "default".to_owned(), name: name.to_owned() }
}

pub(super) fn name(reference: &str) -> Name {
    Name { reference: reference.to_owned(), platform: "linux/amd64".to_owned() }
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) core: Core,
    pub(super) now: UnixMillis,
    rng: Rng,
    pub(super) settings: Settings,
    pub(super) resolving: BTreeMap<Name, Vec<SecretRef>>,
    pub(super) building: BTreeMap<ImageKey, (Name, Vec<SecretRef>)>,
    pub(super) views: BTreeMap<ImageKey, Arc<ImageView>>,
    pub(super) statuses: BTreeMap<String, HermesPolicyStatus>,
    pub(super) released: Vec<ImageKey>,
    pub(super) told: Vec<(&'static str, String)>,
    pub(super) profiles: Vec<Action>,
    /// What is asked of earlier versions, and not answered.
    pub(super) carrying: Vec<ImageKey>,
    /// The ready image that each name has stood for last.
    serving: BTreeMap<Name, ImageKey>,
    pub(super) wake_at: Option<UnixMillis>,
    pub(super) log: Vec<Action>,
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(Settings::default())
    }

    pub(super) fn with(settings: Settings) -> Self {
        Self {
            core: Core::new(settings.clone()),
            now: UnixMillis(1_700_000_000_000),
            rng: Rng::new(7),
            settings,
            resolving: BTreeMap::new(),
            building: BTreeMap::new(),
            views: BTreeMap::new(),
            statuses: BTreeMap::new(),
            released: Vec::new(),
            told: Vec::new(),
            profiles: Vec::new(),
            carrying: Vec::new(),
            serving: BTreeMap::new(),
            wake_at: None,
            log: Vec::new(),
        }
    }

    pub(super) fn say(&mut self, event: Event) {
        match &event {
            Event::Resolved { name, .. } => {
                self.resolving.remove(name);
            }
            Event::Built { image, .. } => {
                self.building.remove(image);
            }
            Event::Carried { image, .. } => self.carrying.retain(|carrying| carrying != image),
            Event::Lost(image) => self.serving.retain(|_, serving| serving != image),
            _ => {}
        }
        let mut out = Vec::new();
        self.core.handle(self.now, event, &mut self.rng, &mut out);
        let released = self.released.len();
        for action in out {
            self.carry_out(&action);
            self.log.push(action);
        }
        self.check_names(&self.released[released..]);
        // One that nobody wanted for a while has nothing to lose.
        let names = &self.core.names;
        self.serving.retain(|name, _| names.contains_key(name));
        assert!(self.building.len() <= self.settings.builds_max, "{} builds at once", self.building.len());
        assert!(self.resolving.len() <= self.settings.resolves_max, "{} resolutions", self.resolving.len());
    }

    /// A name that stood for a ready image must not lose it to one that is not ready.
    fn check_names(&self, released: &[ImageKey]) {
        for (name, _) in self.serving.iter().filter(|(_, image)| released.contains(image)) {
            let Some(image) = self.core.names.get(name).and_then(|state| state.image.as_ref()) else { continue };
            let phase = self.views.get(image).map(|view| view.phase);
            assert_eq!(phase, Some(Phase::Ready), "{name} has lost its image to {image:?}");
        }
    }

    fn carry_out(&mut self, action: &Action) {
        match action.clone() {
            Action::Resolve { name, secrets } => {
                let twice = self.resolving.insert(name, secrets);
                assert!(twice.is_none(), "resolved twice at once");
            }
            Action::Build { image, name, secrets } => {
                let twice = self.building.insert(image, (name, secrets));
                assert!(twice.is_none(), "built twice at once");
            }
            Action::Cancel { image } => {
                assert!(self.building.remove(&image).is_some(), "what is not built is cancelled");
            }
            Action::Release { image } => {
                assert!(!self.building.contains_key(&image), "what is being built is released");
                self.released.push(image);
            }
            action @ Action::KeepProfile { .. } => self.profiles.push(action),
            action @ Action::CarryProfile { .. } => {
                let Action::CarryProfile { image, earlier, .. } = &action else { return };
                assert!(!self.released.contains(earlier) || self.views.contains_key(earlier), "it is not kept");
                self.carrying.push(image.clone());
                self.profiles.push(action);
            }
            Action::Publish(view) => {
                if view.phase == Phase::Ready {
                    // What an earlier run has kept for a name that stands for something else by now serves nobody.
                    let stands_for = |name: &Name| self.core.names.get(name).and_then(|state| state.image.as_ref());
                    let names =
                        view.names.iter().filter(|name| stands_for(name).is_none_or(|image| *image == view.image));
                    let names: Vec<Name> = names.cloned().collect();
                    self.serving.extend(names.into_iter().map(|name| (name, view.image.clone())));
                }
                let before = self.views.insert(view.image.clone(), Arc::clone(&view));
                assert_ne!(before, Some(view), "the same is published twice");
            }
            Action::Withdraw(image) => {
                assert!(self.views.remove(&image).is_some(), "what was not published is withdrawn");
            }
            Action::PolicyStatus { policy, status } => {
                assert_ne!(self.statuses.get(&policy), Some(&status), "the same status is said twice");
                self.statuses.insert(policy, status);
            }
            Action::Tell { reason, message, .. } => self.told.push((reason, message)),
            Action::WakeAt(moment) => self.wake_at = Some(moment),
        }
    }

    /// Lets time pass, with every timer in it.
    pub(super) fn pass(&mut self, time: Duration) {
        let end = UnixMillis(self.now.0 + time.as_millis() as u64);
        while let Some(moment) = self.wake_at.filter(|moment| *moment <= end) {
            self.now = self.now.max(moment);
            self.wake_at = None;
            self.say(Event::Woken);
        }
        self.now = end;
        self.say(Event::Woken);
    }

    pub(super) fn resolve(&mut self, reference: &str, number: u8) {
        let image = key(number);
        let resolved = Resolved { image, layers: layers(number), access: Access::Public };
        self.say(Event::Resolved { name: name(reference), outcome: Ok(resolved) });
    }

    pub(super) fn fail_to_resolve(&mut self, reference: &str, class: FailureClass) {
        self.say(Event::Resolved { name: name(reference), outcome: Err(failure(class)) });
    }

    pub(super) fn build(&mut self, number: u8) {
        assert!(self.building.contains_key(&key(number)), "image {number} is not being built");
        self.say(Event::Built { image: key(number), outcome: Ok(index(number)) });
    }

    pub(super) fn fail_to_build(&mut self, number: u8, failure: Failure) {
        assert!(self.building.contains_key(&key(number)), "image {number} is not being built");
        self.say(Event::Built { image: key(number), outcome: Err(failure) });
    }

    pub(super) fn phase(&self, number: u8) -> Option<Phase> {
        Some(self.views.get(&key(number))?.phase)
    }

    pub(super) fn reasons(&self) -> Vec<&'static str> {
        self.told.iter().map(|(reason, _)| *reason).collect()
    }

    pub(super) fn condition(&mut self, policy: &str, kind: &str) -> (String, String, String) {
        self.pass(Duration::from_millis(500));
        let status = &self.statuses[policy];
        let condition = status.conditions.iter().find(|condition| condition.type_ == kind).expect("a condition");
        (condition.status.clone(), condition.reason.clone(), condition.message.clone())
    }

    pub(super) fn wanted_images(&self) -> BTreeSet<ImageKey> {
        self.views.values().filter(|view| !view.policies.is_empty()).map(|view| view.image.clone()).collect()
    }
}
