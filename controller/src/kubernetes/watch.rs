//! Facts from the cluster's objects.
//!
//! Each [`Kind`] is followed by a task of its own ([`follow`]), which lists it in pages, watches it from there on, and
//! recovers by itself. One owner ([`run`]) puts together what they see ([`known`]) and says it to the core. All queues are
//! bounded: a core that is behind makes the tasks wait, and at last the API server, which ends a watch that is too slow;
//! it is then taken up where it was, or listed anew.
//!
//! A list that begins anew says what is gone. [`Event::Synced`] comes once, when every kind was listed. Dropping the
//! future of [`run`] ends all of it; nothing is left behind.

mod follow;
mod known;
mod objects;

use kube::Client;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::event::Event;
use known::{Kind, Known, Seen};

/// How long one watch lasts that says nothing, in seconds, before the server ends it and it is begun again. So long a
/// connection whose other side is gone without a word stays unnoticed, at most; a new watch costs one request.
pub(in crate::kubernetes) const WATCH_SECONDS: u32 = 60;
/// What may have been seen and not yet put together, in objects of all kinds.
const SEEN_MAX: usize = 256;

/// Says what is there and what changes, until `events` is closed. Errors of the API server are waited out and logged.
///
/// # Panics
/// When a task of it has.
///
/// Not cancel safe: dropped, what was seen and not yet said is lost, and a new one must be given to a new core.
pub async fn run(client: Client, events: mpsc::Sender<Event>) {
    let (sender, mut seen) = mpsc::channel::<(Kind, Seen)>(SEEN_MAX);
    // Aborts its tasks when it is dropped.
    let mut followers = JoinSet::new();
    for kind in Kind::ALL {
        followers.spawn(follow::follow(client.clone(), kind, sender.clone()));
    }
    drop(sender);
    let mut known = Known::default();
    let mut said = Vec::new();
    loop {
        let next = tokio::select! {
            next = seen.recv() => next,
            () = events.closed() => return,
            // They end with this only, or by a fault of their own, which must not go unseen.
            Some(Err(ended)) = followers.join_next() => match ended.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => return,
            },
        };
        let Some((kind, seen)) = next else { return };
        known.apply(kind, seen, &mut said);
        for event in said.drain(..) {
            if events.send(event).await.is_err() {
                return;
            }
        }
    }
}
