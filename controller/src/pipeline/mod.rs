//! Carries out what the core asks for: resolves names, builds indexes, keeps and releases them.
//!
//! ```text
//!  core --act--> Pipeline --> a task per name or image --> Event --next--> core
//! ```
//!
//! The pipeline belongs to the task that owns the core; it decides nothing. What concerns one image is done in the order in
//! which it was asked for, one after the other; how much goes on at once is the core's to bound. Each task has a client of its
//! own for the registry, which knows the logins that were handed to it and no others.
//!
//! Layers are built once: one that is known already is not read ([`Artifacts::layer`]), and of two builds that need the same
//! layer one makes it and the other waits (`layers`). A build that is cut short, by a cancellation or by the end of the
//! process, leaves the layers that it has finished, and the beginning of the one that it was reading (`partial`); the next
//! one goes on after them.

mod failures;
mod images;
mod layers;
pub mod partial;
mod profiles;
pub mod secrets;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use hermes_image::build::Options;
use hermes_origin::OriginClient;
use hermes_origin::credentials::CredentialsConfig;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

use self::images::Tools;
use self::partial::Partials;
use self::secrets::Secrets;
use crate::artifacts::Artifacts;
use crate::event::{Action, Event, ImageKey, Name, SecretRef, UnixMillis};

/// Reports of progress that wait for the core; a full queue drops one, and the next second brings another.
const PROGRESS_MAX: usize = 64;

/// Something to do for an image.
#[derive(Debug)]
enum Work {
    Build { name: Name, secrets: Vec<SecretRef> },
    Release,
    KeepProfile(Arc<[u8]>),
    CarryProfile { earlier: ImageKey, from: Arc<[u8]> },
    SignAgain,
}

/// What a task is for.
#[derive(Debug, Clone)]
enum Task {
    Resolve(Name),
    Build(ImageKey),
    Carry(ImageKey),
    Other(ImageKey),
    /// Compares what is kept with its names.
    Check,
}

/// What is going on for one image.
#[derive(Debug)]
struct Line {
    running: AbortHandle,
    is_build: bool,
    waiting: VecDeque<Work>,
}

/// The tasks that work for the core.
#[derive(Debug)]
pub struct Pipeline {
    tools: Arc<Tools>,
    tasks: JoinSet<Option<Event>>,
    named: HashMap<Id, Task>,
    lines: BTreeMap<ImageKey, Line>,
    progress: mpsc::Sender<Event>,
    reports: mpsc::Receiver<Event>,
}

impl Pipeline {
    /// A pipeline that reads registries with `origin`, keeps what it makes in `artifacts` and what it is reading in `partials`, and
    /// reads logins from `secrets` beside those that `credentials` name.
    pub fn new(
        origin: OriginClient,
        credentials: CredentialsConfig,
        artifacts: Artifacts,
        partials: Partials,
        secrets: Arc<dyn Secrets>,
    ) -> Self {
        partials.retain(&artifacts.missing_layers());
        let tools = Tools {
            origin,
            credentials,
            artifacts,
            secrets,
            leases: layers::Leases::default(),
            partials,
            carrying: Semaphore::new(1),
            options: Options::default(),
        };
        let (progress, reports) = mpsc::channel(PROGRESS_MAX);
        let tools = Arc::new(tools);
        Self { tools, tasks: JoinSet::new(), named: HashMap::new(), lines: BTreeMap::new(), progress, reports }
    }

    /// Begins what `action` asks for. What is said to people and nodes is not for the pipeline, and does nothing.
    pub fn act(&mut self, action: &Action) {
        match action {
            Action::Resolve { name, secrets } => {
                let (tools, name, secrets) = (Arc::clone(&self.tools), name.clone(), secrets.clone());
                let task = Task::Resolve(name.clone());
                self.spawn(task, async move {
                    let outcome = tools.resolve(&name, &secrets).await;
                    Some(Event::Resolved { name, outcome })
                });
            }
            Action::Build { image, name, secrets } => {
                self.enqueue(image, Work::Build { name: name.clone(), secrets: secrets.clone() });
            }
            Action::Cancel { image } => self.cancel(image),
            Action::Release { image } => self.enqueue(image, Work::Release),
            Action::KeepProfile { image, profile } => self.enqueue(image, Work::KeepProfile(Arc::clone(profile))),
            Action::CarryProfile { image, earlier, from } => {
                self.enqueue(image, Work::CarryProfile { earlier: earlier.clone(), from: Arc::clone(from) });
            }
            Action::Publish(_)
            | Action::Withdraw(_)
            | Action::PolicyStatus { .. }
            | Action::Tell { .. }
            | Action::WakeAt(_) => {}
        }
    }

    /// Signs again what is signed by other keys than those in use; each is said as [`Event::Built`].
    pub fn sign_outdated(&mut self) {
        for image in self.tools.artifacts.outdated() {
            // One that is busy is looked at the next time.
            if !self.lines.contains_key(&image) {
                self.enqueue(&image, Work::SignAgain);
            }
        }
    }

    /// Gives up the layers of builds that nobody has gone on with for long.
    pub fn sweep(&mut self, now: UnixMillis) {
        for image in self.tools.artifacts.unfinished(now) {
            if !self.lines.contains_key(&image) {
                self.enqueue(&image, Work::Release);
            }
        }
    }

    /// Compares some of what is kept with its names, unless that is still going on. What is damaged is said as
    /// [`Event::Lost`].
    pub fn check_some(&mut self) {
        if self.named.values().any(|task| matches!(task, Task::Check)) {
            return;
        }
        let tools = Arc::clone(&self.tools);
        self.spawn(Task::Check, async move {
            tools.artifacts.check_some().await;
            None
        });
    }

    /// The next fact. Waits for ever when nothing is going on. Cancel safe.
    pub async fn next(&mut self) -> Event {
        loop {
            tokio::select! {
                Some(event) = self.reports.recv() => return event,
                image = self.tools.artifacts.lost() => return Event::Lost(image),
                Some(ended) = self.tasks.join_next_with_id(), if !self.tasks.is_empty() => {
                    if let Some(event) = self.ended(ended) {
                        return event;
                    }
                }
            }
        }
    }

    /// Lets what writes end, for at most `patience`, and stops what reads: what a build has finished is kept.
    pub async fn drain(mut self, patience: Duration) {
        let images: Vec<ImageKey> = self.lines.keys().cloned().collect();
        images.iter().for_each(|image| self.cancel(image));
        let resolving = self.named.iter().filter(|(_, task)| matches!(task, Task::Resolve(_) | Task::Check));
        let resolving: Vec<Id> = resolving.map(|(id, _)| *id).collect();
        let all = async {
            while self.lines.values().any(|line| !line.is_build) || self.named.len() > resolving.len() {
                let Some(ended) = self.tasks.join_next_with_id().await else { break };
                self.ended(ended);
            }
        };
        if tokio::time::timeout(patience, all).await.is_err() {
            tracing::warn!("what was being written is left; the next start puts it in order");
        }
        self.tasks.shutdown().await;
    }

    fn spawn(&mut self, task: Task, work: impl Future<Output = Option<Event>> + Send + 'static) -> AbortHandle {
        let handle = self.tasks.spawn(work);
        self.named.insert(handle.id(), task);
        handle
    }

    fn enqueue(&mut self, image: &ImageKey, work: Work) {
        match self.lines.get_mut(image) {
            Some(line) => line.waiting.push_back(work),
            None => self.start(image, work, VecDeque::new()),
        }
    }

    fn start(&mut self, image: &ImageKey, work: Work, waiting: VecDeque<Work>) {
        let is_build = matches!(work, Work::Build { .. });
        let task = match work {
            Work::Build { .. } => Task::Build(image.clone()),
            Work::CarryProfile { .. } => Task::Carry(image.clone()),
            _ => Task::Other(image.clone()),
        };
        let (tools, events) = (Arc::clone(&self.tools), self.progress.clone());
        let running = self.spawn(task, work.run(tools, image.clone(), events));
        self.lines.insert(image.clone(), Line { running, is_build, waiting });
    }

    fn cancel(&mut self, image: &ImageKey) {
        let Some(line) = self.lines.get_mut(image) else { return };
        line.waiting.retain(|work| !matches!(work, Work::Build { .. }));
        if line.is_build {
            line.running.abort();
        }
    }

    /// A task has ended: what waits for the same image is next.
    fn ended(&mut self, ended: Result<(Id, Option<Event>), JoinError>) -> Option<Event> {
        let (id, outcome) = match ended {
            Ok((id, event)) => (id, Ok(event)),
            Err(error) => (error.id(), Err(error)),
        };
        let task = self.named.remove(&id)?;
        if let Task::Build(image) | Task::Carry(image) | Task::Other(image) = &task
            && let Some(line) = self.lines.remove(image)
        {
            let mut waiting = line.waiting;
            if let Some(work) = waiting.pop_front() {
                self.start(image, work, waiting);
            }
        }
        match outcome {
            Ok(event) => event,
            Err(error) if error.is_cancelled() => None,
            Err(error) => {
                tracing::error!(?task, %error, "a task has panicked");
                let failure = failures::internal("a task of the controller has panicked");
                match task {
                    Task::Resolve(name) => Some(Event::Resolved { name, outcome: Err(failure) }),
                    Task::Build(image) => Some(Event::Built { image, outcome: Err(failure) }),
                    Task::Carry(image) => Some(Event::Carried { image, profile: None }),
                    Task::Other(_) | Task::Check => None,
                }
            }
        }
    }
}

impl Work {
    async fn run(self, tools: Arc<Tools>, image: ImageKey, events: mpsc::Sender<Event>) -> Option<Event> {
        let result = match self {
            Self::Build { name, secrets } => {
                let outcome = tools.build(&image, &name, &secrets, &events).await;
                return Some(Event::Built { image, outcome });
            }
            Self::CarryProfile { earlier, from } => {
                let profile = tools.carry_profile(&image, &earlier, &from).await;
                return Some(Event::Carried { image, profile });
            }
            Self::SignAgain => match tools.artifacts.sign_again(&image).await {
                Ok(index) => return Some(Event::Built { outcome: Ok(index?), image }),
                Err(error) => Err(error),
            },
            Self::Release => {
                let released = tools.artifacts.release(&image).await;
                tools.sweep_partials().await;
                released
            }
            Self::KeepProfile(profile) => tools.artifacts.put_profile(&image, &profile).await,
        };
        if let Err(error) = result {
            tracing::warn!(image = %image.manifest, %error, "what is kept of an image could not be changed");
        }
        None
    }
}
