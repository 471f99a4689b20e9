//! The decisions: which images are wanted, what is resolved and built when, where copies go, and what people are told.
//!
//! A machine without clock, network, disk or tasks: [`Core::handle`] takes a moment, a fact and a source of numbers, and
//! returns requests. The same events give the same requests.
//!
//! ```text
//!  workloads --texts--> policies' selectors --> names (reference x platform) --Resolve--> images (manifest)
//!                                                                                           |
//!                      seeds <-- nodes and their reports         Ready <--Built-- Build <-- queue
//! ```
//!
//! - A *text* is an image's name as a pod writes it. Policies match it as it is; what it means in full is its *reference*.
//! - A *name* is a reference for one platform. It is wanted by the policies that match one of its texts, and resolved at
//!   first sight and again and again, because tags move (`names`).
//! - An *image* is wanted by the policies of the names that stand for it, of pods that still run it after its tag has moved,
//!   and of names that stood for it until what they stand for now is ready (`stand_ins`). One that nobody wants is given up,
//!   but only when everything that is there has been said (`images`).
//! - Builds are few at once, most wanted first; what fails is tried again when that is worth something (`builds`, `retry`).
//!
//! Invariants: no more builds and resolutions at once than the settings say, and never two of one thing; an image that an
//! unpaused policy wants is ready, being built, in the queue, or has a moment at which it is tried again, unless nothing can
//! change it; nothing that somebody wants is released; a name that has stood for a ready image has one until it is wanted no
//! more.

mod builds;
mod images;
mod names;
mod profiles;
mod queue;
pub(crate) mod reference;
mod registries;
mod retry;
mod seeds;
mod selectors;
mod stand_ins;
mod status;
#[cfg(test)]
mod tests;
mod wants;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hermes_policy::rng::Rng;

use self::images::ImageState;
use self::names::NameState;
use self::queue::Queue;
use self::registries::Registries;
use self::seeds::Nodes;
use self::wants::{PolicyState, Text};
use crate::crd::HermesPolicyStatus;
use crate::event::{Action, Event, ImageKey, Name, Subject, UnixMillis, Workload, WorkloadId};

/// How the core works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Platforms of policies that name none, such as `linux/amd64`.
    pub platforms: Vec<String>,
    /// Builds at once.
    pub builds_max: usize,
    /// Resolutions at once.
    pub resolves_max: usize,
    /// How long what a name stands for is believed.
    pub refresh: Duration,
    /// Names that are followed at once; policies that want more are told.
    pub names_max: usize,
}

impl Default for Settings {
    /// Four builds keep a link of 1 Gbit/s busy and fit 300 MB; sixteen resolutions hide the latency of a registry and are
    /// few enough for its limits; tags that move are noticed in five minutes; 10,000 names are a large cluster's.
    fn default() -> Self {
        Self {
            platforms: vec!["linux/amd64".to_owned()],
            builds_max: 4,
            resolves_max: 16,
            refresh: Duration::from_secs(300),
            names_max: 10_000,
        }
    }
}

/// Something that happens at a moment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// A name is to be resolved.
    Name(Name),
    /// An image is to be tried again.
    Image(ImageKey),
    /// Seeds are to be planned.
    Seeds,
    /// Statuses are to be said.
    Statuses,
}

/// What one event works with.
struct Turn<'a> {
    now: UnixMillis,
    rng: &'a mut Rng,
    out: &'a mut Vec<Action>,
}

impl Turn<'_> {
    fn tell(&mut self, about: Subject, warning: bool, reason: &'static str, message: String) {
        self.out.push(Action::Tell { about, warning, reason, message });
    }
}

/// The machine.
#[derive(Debug)]
pub struct Core {
    settings: Settings,
    policies: BTreeMap<String, PolicyState>,
    workloads: BTreeMap<WorkloadId, Workload>,
    texts: BTreeMap<String, Text>,
    /// The texts that mean each reference.
    references: BTreeMap<String, BTreeSet<String>>,
    names: BTreeMap<Name, NameState>,
    /// Names that are not followed because there are too many, with the policies that want them.
    left_out: BTreeMap<Name, BTreeSet<String>>,
    images: BTreeMap<ImageKey, ImageState>,
    /// Images of an earlier run, by the name that they were indexed from, until that name is resolved.
    kept: BTreeMap<Name, BTreeSet<ImageKey>>,
    /// Images that pods still run although their tag has moved.
    held: BTreeMap<WorkloadId, BTreeSet<ImageKey>>,
    /// Ready images that names stood for, while what they stand for now is not ready.
    stand_ins: BTreeMap<Name, BTreeSet<ImageKey>>,
    nodes: Nodes,
    timers: BTreeSet<(UnixMillis, Timer)>,
    /// The last wish of being woken.
    wake_at: Option<UnixMillis>,
    /// Names that are due.
    due: Queue<Name>,
    resolving: BTreeSet<Name>,
    registries: Registries,
    /// Images whose turn has not come.
    pending: Queue<ImageKey>,
    building: BTreeSet<ImageKey>,
    synced: bool,
    changed_references: BTreeSet<String>,
    changed_images: BTreeSet<ImageKey>,
    changed_policies: BTreeSet<String>,
    statuses: BTreeMap<String, HermesPolicyStatus>,
    statuses_at: Option<UnixMillis>,
}

impl Core {
    /// A machine that knows nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            policies: BTreeMap::new(),
            workloads: BTreeMap::new(),
            texts: BTreeMap::new(),
            references: BTreeMap::new(),
            names: BTreeMap::new(),
            left_out: BTreeMap::new(),
            images: BTreeMap::new(),
            kept: BTreeMap::new(),
            held: BTreeMap::new(),
            stand_ins: BTreeMap::new(),
            nodes: Nodes::default(),
            timers: BTreeSet::new(),
            wake_at: None,
            due: Queue::default(),
            resolving: BTreeSet::new(),
            registries: Registries::default(),
            pending: Queue::default(),
            building: BTreeSet::new(),
            synced: false,
            changed_references: BTreeSet::new(),
            changed_images: BTreeSet::new(),
            changed_policies: BTreeSet::new(),
            statuses: BTreeMap::new(),
            statuses_at: None,
        }
    }

    /// Takes in a fact, and adds to `out` what is to be done about it. `now` never goes back by more than a clock that is
    /// set; `rng` spreads what would otherwise come at one moment.
    pub fn handle(&mut self, now: UnixMillis, event: Event, rng: &mut Rng, out: &mut Vec<Action>) {
        let mut turn = Turn { now, rng, out };
        match event {
            Event::Policy(policy) => self.policy_changed(policy),
            Event::PolicyGone(name) => self.policy_gone(&name),
            Event::Workload(workload) => self.workload_changed(workload),
            Event::WorkloadGone(id) => self.workload_gone(&id),
            Event::Node(node) => self.nodes.changed(node),
            Event::NodeGone(name) => self.nodes.gone(&name),
            Event::Reported { node, report } => self.nodes.reported(node, report),
            Event::NodeSilent(node) => self.nodes.silent(&node),
            Event::Synced => self.all_said(),
            Event::Kept { image, name, index, layers, access, profile } => {
                self.image_kept(now, image, name, (index, layers, access), profile);
            }
            Event::Resolved { name, outcome } => self.name_resolved(&mut turn, name, outcome),
            Event::Progress { image, read_bytes } => self.build_moved(&image, read_bytes),
            Event::Built { image, outcome } => self.build_ended(&mut turn, image, outcome),
            Event::Started { image, record } => self.start_recorded(&mut turn, &image, &record),
            Event::Carried { image, profile } => self.profile_carried(&mut turn, &image, profile),
            Event::Lost(image) => self.image_lost(&mut turn, &image),
            Event::Woken => {}
        }
        self.settle(&mut turn);
    }

    /// Draws the consequences of what has changed, from workloads to status.
    fn settle(&mut self, turn: &mut Turn<'_>) {
        self.run_timers(turn);
        while let Some(reference) = self.changed_references.pop_first() {
            self.settle_reference(turn, &reference);
        }
        self.start_resolving(turn);
        self.plan_seeds(turn);
        self.settle_images(turn);
        self.start_building(turn);
        self.settle_images(turn);
        self.settle_policies(turn);
        self.set_alarm(turn);
    }

    fn run_timers(&mut self, turn: &mut Turn<'_>) {
        while self.timers.first().is_some_and(|(moment, _)| *moment <= turn.now) {
            let Some((_, timer)) = self.timers.pop_first() else { break };
            match timer {
                Timer::Name(name) => self.name_due(turn, &name),
                Timer::Image(image) => self.image_due(turn, &image),
                Timer::Seeds => self.nodes.wish = None,
                Timer::Statuses => {}
            }
        }
    }

    /// Wishes to be woken for the next timer, unless that is the last wish anyway.
    fn set_alarm(&mut self, turn: &mut Turn<'_>) {
        let next = self.timers.first().map(|(moment, _)| *moment);
        if self.wake_at.is_some_and(|moment| moment <= turn.now) {
            self.wake_at = None;
        }
        if let Some(next) = next
            && self.wake_at.is_none_or(|wished| next < wished)
        {
            self.wake_at = Some(next);
            turn.out.push(Action::WakeAt(next));
        }
    }

    /// Everything that is there has been said: from now on what nobody wants is given up.
    fn all_said(&mut self) {
        self.synced = true;
        self.changed_images.extend(self.images.keys().cloned());
    }
}
