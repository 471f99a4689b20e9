//! What people see: the status of policies, `HermesImage` and `HermesNode` objects, and Events.
//!
//! [`Reports`] is an audience: it hears what the core says, notes the newest word on each object, and never waits.
//! [`Reports::write`] is the task that carries it out: several requests at once, a bounded number a second, each again
//! with growing waits until the API server takes it. An object is written only when it differs from what is there, which
//! is read once at the start, so a restart writes nothing that is still so. One that somebody else removes is written again
//! (`removed`).
//!
//! Objects are written by server-side apply under one field manager. Only the leader writes. A crash leaves behind objects
//! that say what was so; the next run corrects them, and removes those that nobody wants any more when the cluster was
//! listed and the core has had [`ReportsConfig::sweep_after`] to say what it knows.

mod queue;
mod removed;
mod start;
mod tales;
mod views;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use hermes_image::ids::Digest;
use jiff::Timestamp;
use kube::Client;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use self::queue::Queue;
use self::removed::{Kind, Removed};
use self::tales::{Tale, Tales};
use self::write::{Failed, Key, Wish, Writer, Written};
use crate::event::{Action, Audience, Event, ImageView, NodeReport, Subject};

/// Requests that run at once.
const CONCURRENCY: usize = 8;
/// Writes that may begin in a second. The reports of 5,000 nodes that change all the time must not load the API server
/// more than a busy controller of Kubernetes' own does (its client's default is 20 to 50).
const WRITES_PER_SECOND: u32 = 50;
/// How often what needs no memory any more is forgotten.
const FORGET_INTERVAL: Duration = Duration::from_secs(60);
/// Most Events that wait or were written just now; what is told beyond is in the log alone.
const TALES_WAITING_MAX: usize = tales::TALES_MAX;

/// How reports are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReportsConfig {
    /// How long after [`Event::Synced`] an object that an earlier run has left, and that nothing was said of since, is
    /// removed. Names must be resolved again meanwhile, of all images that have no index.
    pub sweep_after: Duration,
}

impl Default for ReportsConfig {
    /// 10 minutes: two rounds of resolving tags.
    fn default() -> Self {
        Self { sweep_after: Duration::from_secs(600) }
    }
}

/// Hears what has become of things, and writes it.
pub struct Reports {
    shared: Mutex<Shared>,
    changed: Notify,
    config: ReportsConfig,
}

impl fmt::Debug for Reports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reports").field("config", &self.config).finish_non_exhaustive()
    }
}

/// What was heard.
#[derive(Debug, Default)]
struct Shared {
    queue: Queue<Wish>,
    tales: Tales,
    /// The objects of images that are wanted now, and what they say.
    images: BTreeMap<String, Arc<ImageView>>,
    /// One name of each image.
    names: BTreeMap<Digest, String>,
    /// The nodes of the cluster.
    cluster_nodes: BTreeSet<String>,
    /// What nodes have said last, and whether they are connected.
    nodes: BTreeMap<String, (NodeReport, bool)>,
    /// Policies that are gone: one of the same name is another, which has no status.
    policies_gone: BTreeSet<String>,
    /// Objects that somebody else has removed, until they are written again.
    removed: BTreeSet<Key>,
    synced_at: Option<Instant>,
}

/// What [`Reports::write`] knows.
#[derive(Debug)]
struct Progress {
    written: BTreeMap<Key, Written>,
    /// Whether the last write was taken.
    healthy: bool,
}

impl Reports {
    /// Has heard nothing yet.
    pub fn new(config: ReportsConfig) -> Self {
        Self { shared: Mutex::new(Shared::default()), changed: Notify::new(), config }
    }

    /// Writes what is heard, until it is dropped. Not cancel safe in that requests that run are broken off; what they
    /// were to write is written by the next run.
    pub async fn write(&self, client: Client) {
        let writer = Writer { client };
        let mut progress = Progress { written: start::read(&writer).await, healthy: true };
        let mut pace = Pace::new(Instant::now());
        let mut running = FuturesUnordered::new();
        let mut removals = pin!(removed::follow(&writer.client));
        let mut swept = false;
        let mut forget_at = Instant::now() + FORGET_INTERVAL;
        loop {
            let now = Instant::now();
            if !swept && self.is_sweep_due(now) {
                swept = true;
                self.sweep(now, &progress.written);
            }
            if now >= forget_at {
                forget_at = now + FORGET_INTERVAL;
                self.shared.lock().queue.forget(now);
            }
            while running.len() < CONCURRENCY && pace.allows(now) {
                let Some((key, wish)) = self.take(now, &mut progress) else { break };
                pace.spend();
                let before = progress.written.get(&object_of(&key)).cloned().unwrap_or_default();
                let writer = &writer;
                running.push(async move {
                    let outcome = writer.write(&key, &wish, before).await;
                    (key, wish, outcome)
                });
            }
            let wake_at = self.wake_at(now, &pace, swept).min(forget_at);
            tokio::select! {
                Some((key, wish, outcome)) = running.next(), if !running.is_empty() => {
                    self.ended(key, wish, outcome, &mut progress);
                }
                Some(removed) = removals.next() => self.restore(removed),
                () = self.changed.notified() => {}
                () = sleep_until(wake_at), if running.len() < CONCURRENCY => {}
            }
        }
    }

    fn take(&self, now: Instant, progress: &mut Progress) -> Option<(Key, Wish)> {
        let mut shared = self.shared.lock();
        for name in std::mem::take(&mut shared.policies_gone) {
            progress.written.remove(&Key::Policy(name));
        }
        let (key, wish) = shared.queue.take(now)?;
        if shared.removed.remove(&key) {
            progress.written.remove(&key);
        }
        // A node's object is made when it is written: thousands may wait.
        let wish = match (&key, wish) {
            (Key::Node(name), Wish::NodeAsReported) => match shared.nodes.get(name) {
                Some((report, connected)) => {
                    Wish::Node(Box::new(views::node_status(report, *connected, &shared.names)))
                }
                None => Wish::Gone,
            },
            (_, wish) => wish,
        };
        Some((key, wish))
    }

    /// Somebody else has removed objects: those that are still to be there are written again.
    fn restore(&self, removed: Removed) {
        let now = Instant::now();
        let mut shared = self.shared.lock();
        let is_gone = |name: &String| match &removed {
            Removed::One(_, gone) => gone == name,
            Removed::AllBut(_, there) => !there.contains(name),
        };
        match removed {
            Removed::One(Kind::Image, _) | Removed::AllBut(Kind::Image, _) => {
                let gone = shared.images.iter().filter(|(name, _)| is_gone(name));
                let gone: Vec<_> = gone.map(|(name, view)| (Key::Image(name.clone()), Arc::clone(view))).collect();
                for (key, view) in gone {
                    shared.removed.insert(key.clone());
                    shared.queue.put(now, key, Wish::Image(view));
                }
            }
            Removed::One(Kind::Node, _) | Removed::AllBut(Kind::Node, _) => {
                let gone: Vec<String> = shared.nodes.keys().filter(|name| is_gone(name)).cloned().collect();
                for name in gone.iter().filter(|name| shared.cluster_nodes.contains(*name)).collect::<Vec<_>>() {
                    shared.removed.insert(Key::Node(name.clone()));
                    shared.wish_node(now, name);
                }
            }
        }
    }

    /// When there may be something to do without anything being heard.
    fn wake_at(&self, now: Instant, pace: &Pace, swept: bool) -> Instant {
        let shared = self.shared.lock();
        let due = shared.queue.next_due().map(|due| due.max(pace.next(now)));
        let sweep = shared.synced_at.filter(|_| !swept).map(|at| at + self.config.sweep_after);
        [due, sweep].into_iter().flatten().min().unwrap_or(now + FORGET_INTERVAL)
    }

    fn is_sweep_due(&self, now: Instant) -> bool {
        self.shared.lock().synced_at.is_some_and(|at| now >= at + self.config.sweep_after)
    }

    /// Wishes away what an earlier run has left and nobody wants, and says of nodes that have not come back that they are
    /// not connected.
    fn sweep(&self, now: Instant, written: &BTreeMap<Key, Written>) {
        let mut shared = self.shared.lock();
        for key in written.keys() {
            let wish = match key {
                Key::Image(name) if !shared.images.contains_key(name) => Wish::Gone,
                Key::Node(name) if !shared.cluster_nodes.contains(name) => Wish::Gone,
                Key::Node(name) if !shared.nodes.contains_key(name) => Wish::NotConnected,
                Key::Image(_) | Key::Node(_) | Key::Policy(_) | Key::Tale(_) => continue,
            };
            shared.queue.put(now, key.clone(), wish);
        }
    }

    fn ended(&self, key: Key, wish: Wish, outcome: Result<Written, Failed>, progress: &mut Progress) {
        let now = Instant::now();
        let mut shared = self.shared.lock();
        match outcome {
            Ok(known) => {
                match (&key, &wish) {
                    (Key::Tale(_), _) => {}
                    (_, Wish::Gone) => drop(progress.written.remove(&key)),
                    _ => drop(progress.written.insert(key.clone(), known)),
                }
                if !std::mem::replace(&mut progress.healthy, true) {
                    tracing::info!("objects are written again");
                }
                let interval = key.interval();
                shared.queue.written(now, key, interval);
            }
            Err(failed) => {
                let (problem, object) = (failed.problem(), key.to_string());
                // Of an API server that is away, one line says enough, however many objects wait for it.
                let is_news = std::mem::replace(&mut progress.healthy, !failed.is_general()) || !failed.is_general();
                if is_news {
                    tracing::warn!(object, problem, "cannot write an object");
                } else {
                    tracing::debug!(object, problem, "cannot write an object");
                }
                if matches!(failed, Failed::Missing(_)) {
                    progress.written.remove(&key);
                }
                shared.queue.failed(now, key.clone(), wish, |failures| failed.wait(&key, failures));
            }
        }
    }
}

impl Audience for Reports {
    /// What nodes report of themselves, and which are there, goes into objects without the core.
    fn learn(&self, event: &Event) {
        let now = Instant::now();
        let mut shared = self.shared.lock();
        match event {
            Event::Reported { node, report } => {
                shared.nodes.insert(node.clone(), (report.clone(), true));
                shared.wish_node(now, node);
            }
            Event::NodeSilent(node) => {
                if let Some(known) = shared.nodes.get_mut(node) {
                    known.1 = false;
                }
                shared.wish_node(now, node);
            }
            Event::Node(node) => {
                if shared.cluster_nodes.insert(node.name.clone()) {
                    shared.wish_node(now, &node.name);
                }
            }
            Event::NodeGone(node) => {
                shared.cluster_nodes.remove(node);
                if shared.nodes.remove(node).is_some() {
                    shared.queue.put(now, Key::Node(node.clone()), Wish::Gone);
                }
            }
            Event::PolicyGone(name) => drop(shared.policies_gone.insert(name.clone())),
            Event::Synced => shared.synced_at = Some(now),
            _ => return,
        }
        drop(shared);
        self.changed.notify_one();
    }

    fn hear(&self, action: &Action) {
        let now = Instant::now();
        let mut shared = self.shared.lock();
        match action {
            Action::Publish(view) => {
                let name = views::image_name(&view.image);
                shared.images.insert(name.clone(), Arc::clone(view));
                if let Some(first) = view.names.first() {
                    shared.names.insert(view.image.manifest, first.reference.clone());
                }
                shared.queue.put(now, Key::Image(name), Wish::Image(view.clone()));
            }
            Action::Withdraw(image) => {
                let name = views::image_name(image);
                shared.images.remove(&name);
                shared.names.remove(&image.manifest);
                shared.queue.put(now, Key::Image(name), Wish::Gone);
            }
            Action::PolicyStatus { policy, status } => {
                shared.queue.put(now, Key::Policy(policy.clone()), Wish::PolicyStatus(Box::new(status.clone())));
            }
            Action::Tell { about, warning, reason, message } => {
                let tale = Tale { about: about.clone(), warning: *warning, reason, message: message.clone() };
                shared.tell(now, tale);
            }
            _ => return,
        }
        drop(shared);
        self.changed.notify_one();
    }
}

impl Shared {
    /// Wishes for a node's object, if the node is there and has reported, in whichever order that is heard.
    fn wish_node(&mut self, now: Instant, node: &str) {
        if self.cluster_nodes.contains(node) && self.nodes.contains_key(node) {
            self.queue.put(now, Key::Node(node.to_owned()), Wish::NodeAsReported);
        }
    }

    fn tell(&mut self, now: Instant, tale: Tale) {
        let told = self.tales.note(&tale, Timestamp::now());
        if self.queue.tale_count() >= TALES_WAITING_MAX {
            self.queue.forget(now);
        }
        if self.queue.tale_count() >= TALES_WAITING_MAX {
            let (about, reason, message) = (&tale.about, tale.reason, &tale.message);
            tracing::warn!(?about, reason, message, "too many Events at once; this one is here alone");
            return;
        }
        self.queue.put(now, Key::Tale(tale), Wish::Told(told));
    }
}

/// The object whose state a write needs to know.
fn object_of(key: &Key) -> Key {
    match key {
        Key::Tale(Tale { about: Subject::Image(image), .. }) => Key::Image(views::image_name(image)),
        other => other.clone(),
    }
}

/// Bounds how many writes begin in a second; up to a second's worth may begin at once.
#[derive(Debug)]
struct Pace {
    /// When the last of all writes so far would have begun, had they been spread evenly.
    spent_until: Instant,
}

impl Pace {
    /// The time between two writes.
    const STEP: Duration = Duration::from_nanos(1_000_000_000 / WRITES_PER_SECOND as u64);
    /// How much may be saved up.
    const BURST: Duration = Duration::from_secs(1);

    fn new(now: Instant) -> Self {
        Self { spent_until: now }
    }

    /// Whether one more may begin, and forgets what was saved up beyond the burst.
    fn allows(&mut self, now: Instant) -> bool {
        self.spent_until = self.spent_until.max(now);
        self.spent_until < now + Self::BURST
    }

    fn spend(&mut self) {
        self.spent_until += Self::STEP;
    }

    /// When the next may begin.
    fn next(&self, now: Instant) -> Instant {
        if self.spent_until < now + Self::BURST { now } else { self.spent_until - Self::BURST + Self::STEP }
    }
}
