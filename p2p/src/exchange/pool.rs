//! The streams that this node has opened, kept for the next request.
//!
//! A session is either leased to one request or idle here. A lease that is dropped in the middle of an answer takes its
//! session with it: the stream is out of step, and dropping it tells the other side to stop sending. So cancelling is
//! always safe, and costs one new stream later.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use libp2p::{PeerId, Stream};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::codec::Class;
use super::linked::Linked;
use super::session::Session;
use crate::config::DownloadLimits;

/// A session over a libp2p stream.
pub(crate) type PeerSession = Session<Linked<Stream>>;

#[derive(Debug)]
struct Idle {
    session: PeerSession,
    since: Instant,
}

/// The streams to one peer.
#[derive(Debug)]
struct PeerStreams {
    all: Arc<Semaphore>,
    prefetch: Arc<Semaphore>,
    watches: Arc<Semaphore>,
    /// One permit: who holds it may open a stream.
    opening: Arc<Semaphore>,
    idle: Mutex<Vec<Idle>>,
}

#[derive(Debug)]
struct Entry {
    streams: Arc<PeerStreams>,
    used: Instant,
}

/// The streams to all peers.
#[derive(Debug)]
pub(crate) struct Pool {
    limits: DownloadLimits,
    peers: Mutex<HashMap<PeerId, Entry>>,
}

/// The right to use one stream to a peer, and a session if one was idle.
#[derive(Debug)]
pub(crate) struct Slot {
    streams: Arc<PeerStreams>,
    session: Option<PeerSession>,
    _permits: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
}

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A question and its answer.
    Fetch(Class),
    /// News for minutes.
    Watch,
}

impl From<Class> for Purpose {
    fn from(class: Class) -> Self {
        Self::Fetch(class)
    }
}

impl Pool {
    /// An empty pool.
    pub(crate) fn new(limits: DownloadLimits) -> Self {
        Self { limits, peers: Mutex::default() }
    }

    /// Waits for the right to use a stream to `peer`; `None` only when the pool is gone.
    ///
    /// Cancel safe.
    pub(crate) async fn slot(&self, peer: PeerId, purpose: Purpose) -> Option<Slot> {
        let streams = self.streams(peer, Instant::now());
        let (places, share) = match purpose {
            Purpose::Fetch(Class::Demand) => (&streams.all, None),
            Purpose::Fetch(Class::Prefetch) => (&streams.all, Some(&streams.prefetch)),
            Purpose::Watch => (&streams.watches, None),
        };
        let share = match share {
            Some(share) => Some(Arc::clone(share).acquire_owned().await.ok()?),
            None => None,
        };
        let place = Arc::clone(places).acquire_owned().await.ok()?;
        let session = self.take_idle(&streams);
        Some(Slot { streams, session, _permits: (place, share) })
    }

    /// The session that was idle for the shortest time: its window is the widest, and the others may grow old.
    fn take_idle(&self, streams: &PeerStreams) -> Option<PeerSession> {
        let mut idle = streams.idle.lock();
        let newest = idle.pop()?;
        if newest.since.elapsed() < self.limits.stream_idle_timeout {
            return Some(newest.session);
        }
        idle.clear();
        None
    }

    fn streams(&self, peer: PeerId, now: Instant) -> Arc<PeerStreams> {
        let mut peers = self.peers.lock();
        if let Some(entry) = peers.get_mut(&peer) {
            entry.used = now;
            return Arc::clone(&entry.streams);
        }
        if peers.len() >= self.limits.pooled_peers_max {
            let oldest = peers.iter().min_by_key(|(_, entry)| entry.used).map(|(peer, _)| *peer);
            if let Some(oldest) = oldest {
                peers.remove(&oldest);
            }
        }
        let streams = Arc::new(PeerStreams {
            all: Arc::new(Semaphore::new(self.limits.streams_per_peer_max)),
            prefetch: Arc::new(Semaphore::new(self.limits.prefetch_streams_per_peer_max)),
            watches: Arc::new(Semaphore::new(self.limits.watches_per_peer_max)),
            opening: Arc::new(Semaphore::new(1)),
            idle: Mutex::default(),
        });
        peers.insert(peer, Entry { streams: Arc::clone(&streams), used: now });
        streams
    }

    /// Forgets the idle streams to `peer`, which are dead.
    pub(crate) fn forget(&self, peer: &PeerId) {
        if let Some(entry) = self.peers.lock().get(peer) {
            entry.streams.idle.lock().clear();
        }
    }

    /// Closes streams that were idle for too long, so that idle connections can close, and forgets peers without any.
    pub(crate) fn sweep(&self, now: Instant) {
        let timeout = self.limits.stream_idle_timeout;
        self.peers.lock().retain(|_, entry| {
            let mut idle = entry.streams.idle.lock();
            idle.retain(|idle| now.saturating_duration_since(idle.since) < timeout);
            let busy = Arc::strong_count(&entry.streams) > 1;
            busy || !idle.is_empty() || now.saturating_duration_since(entry.used) < timeout
        });
    }

    /// How often [`Self::sweep`] is worth it.
    pub(crate) fn sweep_every(&self) -> Duration {
        self.limits.stream_idle_timeout / 4
    }
}

impl Slot {
    /// The idle session that came with the slot, if any.
    pub(crate) fn take_session(&mut self) -> Option<PeerSession> {
        self.session.take()
    }

    /// Waits until nobody else opens a stream to the same peer. Cancel safe.
    pub(crate) fn turn_to_open(&self) -> impl Future<Output = Option<OwnedSemaphorePermit>> + use<> {
        let opening = Arc::clone(&self.streams.opening);
        // Never closed.
        async move { opening.acquire_owned().await.ok() }
    }

    /// Gives back a session that is in step: its last answer was read to the end.
    pub(crate) fn give_back(self, session: PeerSession) {
        // Never more than the permits of the peer.
        self.streams.idle.lock().push(Idle { session, since: Instant::now() });
    }
}
