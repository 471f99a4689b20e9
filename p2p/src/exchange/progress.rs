//! Who wants to know when chunks of a layer arrive.
//!
//! The store says "this layer has grown"; the streams that watch it are woken, and read the new have-map themselves.
//! A layer without watchers costs nothing.

use std::collections::HashMap;
use std::sync::Arc;

use hermes_image::ids::DiffId;
use parking_lot::Mutex;
use tokio::sync::watch;

/// Layers with watchers. Bounded by the number of watchers.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    layers: Mutex<HashMap<DiffId, watch::Sender<()>>>,
}

impl Progress {
    /// `layer` has grown.
    pub(crate) fn grown(&self, layer: DiffId) {
        let mut layers = self.layers.lock();
        if let Some(sender) = layers.get(&layer)
            && sender.send(()).is_err()
        {
            layers.remove(&layer);
        }
    }

    /// Told whenever `layer` grows, as long as it is held.
    pub(crate) fn subscribe(self: &Arc<Self>, layer: DiffId) -> Subscription {
        let mut layers = self.layers.lock();
        let receiver = layers.entry(layer).or_insert_with(|| watch::channel(()).0).subscribe();
        Subscription { progress: Arc::clone(self), layer, receiver }
    }
}

/// News of one layer.
#[derive(Debug)]
pub(crate) struct Subscription {
    progress: Arc<Progress>,
    layer: DiffId,
    receiver: watch::Receiver<()>,
}

impl Subscription {
    /// Ends when the layer has grown since the last time. Cancel safe.
    pub(crate) async fn grown(&mut self) {
        if self.receiver.changed().await.is_err() {
            // The sender lives as long as a subscription does.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut layers = self.progress.layers.lock();
        if layers.get(&self.layer).is_some_and(|sender| sender.receiver_count() <= 1) {
            layers.remove(&self.layer);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn only_watchers_of_the_layer_are_woken_and_nothing_is_left_behind() {
        let progress = Arc::new(Progress::default());
        let (a, b) = (DiffId([1; 32]), DiffId([2; 32]));
        let mut first = progress.subscribe(a);
        let mut second = progress.subscribe(a);
        let mut other = progress.subscribe(b);
        progress.grown(a);
        progress.grown(a);
        first.grown().await;
        second.grown().await;
        assert!(first.grown().now_or_never().is_none(), "woken twice for what it has seen");
        assert!(other.grown().now_or_never().is_none(), "woken for another layer");
        drop((first, other));
        progress.grown(a);
        second.grown().await;
        drop(second);
        assert!(progress.layers.lock().is_empty());
    }
}
