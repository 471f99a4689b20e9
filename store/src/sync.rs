//! The thread that makes chunks durable, in batches.
//!
//! One round takes every layer that was written since the last one, flushes each (data, `fdatasync`, bits) and then
//! syncs the catalogue's log once. A round runs every `sync_interval_ms`, early when `sync_bytes` have been written,
//! when [`Store::sync`](crate::Store::sync) is called, and once more when the store is closed. A crash loses what was
//! put since the last round began, never more.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::StoreError;
use crate::layer::Layer;
use crate::shared::Shared;

/// How often last uses go to the catalogue. A crash forgets this much of them, which eviction hardly notices.
const USES_INTERVAL: Duration = Duration::from_secs(60);
/// The clock of last uses moves at least this often, however rare sync rounds are.
const CLOCK_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct State {
    /// Layers with chunks that are not durable. Each stands here once (its `queued` flag).
    layers: Vec<Arc<Layer>>,
    /// Bytes put since the last round began.
    bytes: u64,
    stop: Option<Stop>,
}

/// How the sync thread ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// After one more round.
    Close,
    /// At once, as if the process had been killed.
    #[cfg(test)]
    Abandon,
}

/// What waits to be made durable.
#[derive(Debug)]
pub(crate) struct SyncQueue {
    state: Mutex<State>,
    wake: Condvar,
    round: Mutex<()>,
    sync_bytes: u64,
}

impl SyncQueue {
    pub(crate) fn new(sync_bytes: u64) -> Self {
        Self { state: Mutex::default(), wake: Condvar::new(), round: Mutex::new(()), sync_bytes }
    }

    /// `bytes` were put; `layer` if it does not stand in the queue yet.
    pub(crate) fn written(&self, layer: Option<Arc<Layer>>, bytes: u64) {
        let mut state = self.state.lock();
        state.layers.extend(layer);
        let before = state.bytes;
        state.bytes = before.saturating_add(bytes);
        if before < self.sync_bytes && state.bytes >= self.sync_bytes {
            self.wake.notify_all();
        }
    }

    pub(crate) fn stop(&self, how: Stop) {
        self.state.lock().stop = Some(how);
        self.wake.notify_all();
    }

    /// Lets go of the layers that will not be synced any more.
    pub(crate) fn clear(&self) {
        // Dropped outside the lock: the last reference to a layer may be among them.
        let layers = std::mem::take(&mut self.state.lock().layers);
        drop(layers);
    }

    /// Waits until `deadline`, enough bytes or the end; whether a round is due, and how to end.
    fn wait(&self, deadline: Instant) -> (bool, Option<Stop>) {
        let mut state = self.state.lock();
        if state.stop.is_none() && state.bytes < self.sync_bytes {
            let tick = Instant::now() + CLOCK_INTERVAL;
            self.wake.wait_until(&mut state, deadline.min(tick));
        }
        (state.bytes >= self.sync_bytes || Instant::now() >= deadline, state.stop)
    }
}

impl Shared {
    /// One sync round; see the module's text.
    ///
    /// # Errors
    /// The first one met. The other layers are synced all the same.
    pub(crate) fn sync_round(&self) -> Result<(), StoreError> {
        let _one = self.queue.round.lock();
        self.counters.sync_rounds_begun.add(1);
        let layers = {
            let mut state = self.queue.state.lock();
            state.bytes = 0;
            std::mem::take(&mut state.layers)
        };
        let mut failure = None;
        for layer in &layers {
            layer.dequeued();
            if let Err(error) = layer.flush() {
                failure.get_or_insert(error);
            }
        }
        if !layers.is_empty()
            && let Err(error) = self.catalogue.sync()
        {
            failure.get_or_insert(error);
        }
        match failure {
            None => {
                self.counters.sync_rounds_ended.add(1);
                Ok(())
            }
            Some(error) => {
                self.counters.sync_failures.add(1);
                Err(error)
            }
        }
    }

    /// Writes the last uses of all layers.
    pub(crate) fn write_uses(&self) -> Result<(), StoreError> {
        self.all_layers().iter().try_for_each(|layer| layer.write_uses())
    }

    fn sync_until_stopped(&self) {
        let interval = Duration::from_millis(self.config.sync_interval_ms);
        let mut next_round = Instant::now() + interval;
        let mut next_uses = Instant::now() + USES_INTERVAL;
        loop {
            let (due, stop) = self.queue.wait(next_round);
            match stop {
                None => self.clock.tick(),
                Some(Stop::Close) => {
                    self.report(self.sync_round());
                    self.report(self.write_uses());
                    return;
                }
                #[cfg(test)]
                Some(Stop::Abandon) => return,
            }
            if due {
                self.report(self.sync_round());
                next_round = Instant::now() + interval;
            }
            if Instant::now() >= next_uses {
                self.report(self.write_uses());
                next_uses = Instant::now() + USES_INTERVAL;
            }
        }
    }

    fn report(&self, result: Result<(), StoreError>) {
        if let Err(error) = result {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::error!(dir = %self.dir().display(), %error, source, "store cannot sync; it goes on trying");
        }
    }
}

/// Starts the sync thread. It ends when [`SyncQueue::stop`] is called.
pub(crate) fn start(shared: Arc<Shared>) -> Result<JoinHandle<()>, StoreError> {
    let dir = shared.dir().to_path_buf();
    std::thread::Builder::new()
        .name("hermes-sync".to_owned())
        .spawn(move || shared.sync_until_stopped())
        .map_err(StoreError::io("start the sync thread of", &dir))
}
