//! Why a node is not let in, and how often that happens.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use parking_lot::Mutex;

/// A peer's refusals are logged at most this often.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// Most peers of which the last log line is remembered. When that many strangers come within a minute, all further ones
/// are only counted.
const LOGGED_MAX: usize = 1024;

/// Why one node does not talk with another. Its number is the byte that the refused side is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// It shows no certificate.
    NoCertificate = 1,
    /// What it shows is no certificate, or of a version that is not known here.
    Malformed = 2,
    /// Its certificate is for another cluster.
    OtherCluster = 3,
    /// Its certificate is for another `PeerId`.
    OtherPeer = 4,
    /// Its certificate has ended.
    Expired = 5,
    /// Its certificate has not begun.
    NotYet = 6,
    /// Its certificate was taken back.
    Revoked = 7,
    /// Nobody who is believed has signed its certificate.
    UnknownIssuer = 8,
}

impl Refusal {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::NoCertificate,
        Self::Malformed,
        Self::OtherCluster,
        Self::OtherPeer,
        Self::Expired,
        Self::NotYet,
        Self::Revoked,
        Self::UnknownIssuer,
    ];

    /// The byte that says it.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The refusal of a byte; later versions may have more.
    pub fn of_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|refusal| refusal.code() == code)
    }

    /// The metric label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Malformed => "malformed",
            Self::OtherCluster => "other_cluster",
            Self::OtherPeer => "other_peer",
            Self::Expired => "expired",
            Self::NotYet => "not_yet",
            Self::Revoked => "revoked",
            Self::UnknownIssuer => "unknown_issuer",
        }
    }

    /// What it means and what whoever runs the refused node does about it.
    pub fn advice(self) -> &'static str {
        match self {
            Self::NoCertificate => {
                "the refused node shows no certificate; start it with --join-secret and the file that the cluster's nodes have"
            }
            Self::Malformed => "the certificate of the refused node cannot be read; run the same version on both nodes",
            Self::OtherCluster => {
                "the certificate of the refused node is for another cluster; compare --cluster of both nodes"
            }
            Self::OtherPeer => {
                "the certificate of the refused node is for another peer; restart it, so that it gets one of its own"
            }
            Self::Expired => {
                "the certificate of the refused node has ended; compare the clocks of both nodes, and see in its log why it is not renewed"
            }
            Self::NotYet => "the certificate of the refused node has not begun; compare the clocks of both nodes",
            Self::Revoked => {
                "the certificate of the refused node was taken back; if that was a mistake, delete its identity file and restart it"
            }
            Self::UnknownIssuer => {
                "nobody who is believed here has signed its certificate; give both nodes the same --join-secret"
            }
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.advice())
    }
}

/// Counts refusals by reason, and logs each peer's at most once a minute.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    counts: [AtomicU64; Refusal::ALL.len()],
    logged: Mutex<HashMap<PeerId, Instant>>,
}

impl Refusals {
    /// This node has refused `peer`. True when a line should be logged about it.
    pub(crate) fn count(&self, peer: PeerId, refusal: Refusal, now: Instant) -> bool {
        self.counts[usize::from(refusal.code()) - 1].fetch_add(1, Ordering::Relaxed);
        self.may_log(peer, now)
    }

    /// Whether `peer` was not logged about within the last minute.
    pub(crate) fn may_log(&self, peer: PeerId, now: Instant) -> bool {
        let mut logged = self.logged.lock();
        if logged.get(&peer).is_some_and(|last| now.duration_since(*last) < LOG_EVERY) {
            return false;
        }
        if logged.len() >= LOGGED_MAX {
            logged.retain(|_, last| now.duration_since(*last) < LOG_EVERY);
        }
        if logged.len() >= LOGGED_MAX && !logged.contains_key(&peer) {
            return false;
        }
        logged.insert(peer, now);
        true
    }

    /// How often this node has refused anybody, by reason.
    pub(crate) fn counts(&self) -> Vec<(Refusal, u64)> {
        Refusal::ALL.into_iter().zip(self.counts.iter().map(|count| count.load(Ordering::Relaxed))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_logged_once_a_minute_and_always_counted() {
        let (refusals, peer, start) = (Refusals::default(), PeerId::random(), Instant::now());
        assert!(refusals.count(peer, Refusal::Expired, start));
        assert!(!refusals.count(peer, Refusal::Expired, start + LOG_EVERY / 2));
        assert!(refusals.count(peer, Refusal::Expired, start + LOG_EVERY));
        let counts = refusals.counts();
        assert!(counts.contains(&(Refusal::Expired, 3)) && counts.contains(&(Refusal::Revoked, 0)));
    }

    #[test]
    fn a_flood_of_strangers_does_not_fill_memory_or_log() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        let lines = (0..3 * LOGGED_MAX).filter(|_| refusals.may_log(PeerId::random(), start)).count();
        assert_eq!((lines, refusals.logged.lock().len()), (LOGGED_MAX, LOGGED_MAX));
        assert!(refusals.may_log(PeerId::random(), start + LOG_EVERY));
    }

    #[test]
    fn codes_are_one_to_one() {
        for refusal in Refusal::ALL {
            assert_eq!(Refusal::of_code(refusal.code()), Some(refusal));
        }
        assert!(Refusal::of_code(0).is_none() && Refusal::of_code(9).is_none());
    }
}
