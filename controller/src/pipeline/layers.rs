//! One build of a layer at a time, whichever image it is for.
//!
//! Being the one is a lease: it ends with the build that holds it, well or not, and whoever waits looks again.

use std::collections::BTreeSet;

use hermes_image::ids::LayerId;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// The layers that are being built.
#[derive(Debug, Default)]
pub(super) struct Leases {
    taken: Mutex<BTreeSet<LayerId>>,
    ended: Notify,
}

/// The right to build a layer.
#[derive(Debug)]
pub(super) struct Lease<'a> {
    leases: &'a Leases,
    pub(super) layer: LayerId,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.leases.taken.lock().remove(&self.layer);
        self.leases.ended.notify_waiters();
    }
}

impl Leases {
    /// The first of `layers` that nobody is building; waits while all are being built, and returns `None` when one of them
    /// has ended. Cancel safe.
    pub(super) async fn take(&self, layers: &[LayerId]) -> Option<Lease<'_>> {
        let ended = self.ended.notified();
        let free = {
            let mut taken = self.taken.lock();
            let free = layers.iter().copied().find(|layer| !taken.contains(layer));
            taken.extend(free);
            free
        };
        match free {
            Some(layer) => Some(Lease { leases: self, layer }),
            None => {
                ended.await;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_layer_is_built_by_one_and_taken_over_when_that_one_is_gone() {
        let (leases, a, b) = (Leases::default(), LayerId([1; 32]), LayerId([2; 32]));
        let first = leases.take(&[a, b]).await.expect("free");
        let second = leases.take(&[a, b]).await.expect("free");
        assert_eq!((first.layer, second.layer), (a, b));
        let both = [a, b];
        let mut waiting = Box::pin(leases.take(&both));
        assert!((&mut waiting).now_or_never().is_none());
        drop(first);
        assert!(waiting.await.is_none(), "look again");
        assert_eq!(leases.take(&[a, b]).await.expect("free").layer, a);
    }
}
