//! The running controller: one task that owns the core and the pipeline.
//!
//! ```text
//!  sources (folder, Kubernetes, node API) --Event--> Program { core.handle } --Action--> pipeline
//!                                          pipeline --Event--^            \--Action--> audiences (objects, nodes, page)
//! ```
//!
//! Gathering is async, deciding is not: the loop waits for the next fact, gives it to the core, and hands on what it asks for.
//! Nothing in it waits for anything else, so no source can hold it up.
//!
//! Nothing is kept here: after a crash the next process reads what the artifacts hold and hears of the rest again.

use std::sync::Arc;
use std::time::Duration;

use hermes_policy::rng::Rng;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::core::{Core, Settings};
use crate::event::{Action, Audience, Event, UnixMillis};
use crate::pipeline::Pipeline;

/// How often what is kept is looked through for builds that nobody goes on with, and for signatures of older keys.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(20);
/// How often some of what is kept is compared with its names.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// The longest sleep, so that a clock that was set is noticed.
const SLEEP_MAX: Duration = Duration::from_secs(30);
/// Facts that wait for the core, for whoever makes the channel of the sources: enough for bursts of a cluster, few enough
/// that a source that is too fast waits.
pub const EVENTS_MAX: usize = 1024;

/// A controller that can be run.
#[derive(Debug)]
pub struct Program {
    core: Core,
    pipeline: Pipeline,
    audiences: Vec<Arc<dyn Audience>>,
    rng: Rng,
    wake_at: Option<UnixMillis>,
    actions: Vec<Action>,
}

impl Program {
    /// A controller that decides by `settings`, does what it decides with `pipeline`, and tells `audiences`. It begins with
    /// what an earlier run has `kept`.
    pub fn new(settings: Settings, pipeline: Pipeline, audiences: Vec<Arc<dyn Audience>>, kept: Vec<Event>) -> Self {
        let rng = Rng::new(rand::random());
        let core = Core::new(settings);
        let mut program = Self { core, pipeline, audiences, rng, wake_at: None, actions: Vec::new() };
        kept.into_iter().for_each(|event| program.hear(event));
        program
    }

    /// Runs until `ending` is cancelled or all sources have ended; then lets what is being written end, for at most `patience`.
    pub async fn run(mut self, mut sources: mpsc::Receiver<Event>, ending: CancellationToken, patience: Duration) {
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING_INTERVAL);
        let mut checking = tokio::time::interval(CHECK_INTERVAL);
        loop {
            tokio::select! {
                () = ending.cancelled() => break,
                event = sources.recv() => match event {
                    Some(event) => self.hear(event),
                    None => break,
                },
                event = self.pipeline.next() => self.hear(event),
                () = sleep_until(self.wake_at), if self.wake_at.is_some() => {
                    if self.wake_at.is_some_and(|moment| moment <= clock::now()) {
                        self.wake_at = None;
                        self.hear(Event::Woken);
                    }
                }
                _ = checking.tick() => self.pipeline.check_some(),
                _ = housekeeping.tick() => {
                    self.pipeline.sweep(clock::now());
                    self.pipeline.sign_outdated();
                }
            }
        }
        self.pipeline.drain(patience).await;
    }

    fn hear(&mut self, event: Event) {
        self.core.handle(clock::now(), event.clone(), &mut self.rng, &mut self.actions);
        for action in self.actions.drain(..) {
            match action {
                Action::WakeAt(moment) => self.wake_at = Some(moment),
                Action::Publish(_) | Action::Withdraw(_) | Action::PolicyStatus { .. } | Action::Tell { .. } => {
                    self.audiences.iter().for_each(|audience| audience.hear(&action));
                }
                action => self.pipeline.act(&action),
            }
        }
        self.audiences.iter().for_each(|audience| audience.learn(&event));
    }
}

/// Sleeps until `moment`, or for [`SLEEP_MAX`].
async fn sleep_until(moment: Option<UnixMillis>) {
    let wait_ms = moment.map_or(u64::MAX, |moment| moment.0.saturating_sub(clock::now().0));
    tokio::time::sleep(Duration::from_millis(wait_ms).min(SLEEP_MAX)).await;
}
