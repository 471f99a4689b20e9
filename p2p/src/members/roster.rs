//! What a node knows of the members, shared by the tasks that exchange it.
//!
//! The table is behind a lock that is held for look-ups and merges only, never while signatures are checked or anything
//! is awaited. What others should hear at once goes to an outbox, which the membership task empties.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use libp2p::identity::ed25519;
use libp2p::{Multiaddr, PeerId};
use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::{Notify, watch};

use super::codec::{Greeting, News};
use super::entry::{Entry, ShortCertificate, SignedEntry, Suspicion, sockets_of};
use super::list::MemberList;
use super::table::{Heard, Merged, Table};
use crate::admission::Admission;
use crate::admission::certificate::Zone;
use crate::admission::grants::Grants;
use crate::admission::revocation::SignedRevocation;
use crate::canonical::{PeerKey, unix_now};
use crate::config::ClusterId;
use crate::swarm::Shared;

/// Most entries that are passed on at once; more go with the regular exchanges.
const OUTBOX_ENTRIES_MAX: usize = 256;

/// A node that sends what nobody who follows the protocol sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum Fault {
    #[error("an entry that its node has not signed")]
    Entry,
    #[error("a suspicion that its reporter has not signed")]
    Suspicion,
    #[error("a notice that the issuer has not signed")]
    Notice,
}

/// What others should hear at once.
#[derive(Debug, Default)]
struct Outbox {
    entries: BTreeSet<PeerKey>,
    suspicions: BTreeMap<PeerKey, Suspicion>,
    notice: bool,
}

/// News to pass on, and who should hear them besides a few.
#[derive(Debug)]
pub(crate) struct Passing {
    pub(crate) news: News,
    /// Nodes that are suspected and to which there is a connection: they should answer.
    pub(crate) also: Vec<PeerId>,
}

/// The member list and everything that changes it.
#[derive(Debug)]
pub(crate) struct Roster {
    cluster: ClusterId,
    pair: ed25519::Keypair,
    local: PeerId,
    admission: Arc<Admission>,
    grants: Arc<Grants>,
    shared: Arc<Shared>,
    table: Mutex<Table>,
    outbox: Mutex<Outbox>,
    /// Connected peers that were suspected, and did not answer when they were asked.
    unanswered: Mutex<BTreeSet<PeerId>>,
    list: watch::Sender<Arc<MemberList>>,
    /// Counts changes, for who saves them.
    changes: AtomicU64,
    /// The list or the outbox has changed.
    pub(crate) changed: Notify,
}

/// What a node says about itself from the start.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) cluster: ClusterId,
    pub(crate) pair: ed25519::Keypair,
    pub(crate) zone: Zone,
    pub(crate) suspect_for: Duration,
    /// The incarnation must be above this one.
    pub(crate) incarnation: u64,
}

impl Roster {
    /// A list of this node alone.
    pub(crate) fn new(own: Own, admission: Arc<Admission>, grants: Arc<Grants>, shared: Arc<Shared>) -> Self {
        let key = PeerKey(own.pair.public().to_bytes());
        let local = key.peer().expect("this node has a key");
        let entry = Entry {
            key,
            addresses: Vec::new(),
            zone: own.zone,
            drain: false,
            full: false,
            incarnation: next_incarnation(own.incarnation),
            certificate: admission.own().as_deref().map(ShortCertificate::of),
        };
        let table = Table::new(entry.sign(&own.cluster, &own.pair), own.suspect_for);
        let (list, _) = watch::channel(Arc::new(table.list(|_| false)));
        Self {
            cluster: own.cluster,
            pair: own.pair,
            local,
            admission,
            grants,
            shared,
            table: Mutex::new(table),
            outbox: Mutex::default(),
            unanswered: Mutex::default(),
            list,
            changes: AtomicU64::new(0),
            changed: Notify::new(),
        }
    }

    pub(crate) fn local(&self) -> PeerId {
        self.local
    }

    pub(crate) fn admission(&self) -> &Arc<Admission> {
        &self.admission
    }

    pub(crate) fn grants(&self) -> &Arc<Grants> {
        &self.grants
    }

    pub(crate) fn list(&self) -> watch::Receiver<Arc<MemberList>> {
        self.list.subscribe()
    }

    /// How often anything has changed.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// For looking things up; not to be held over an await.
    pub(crate) fn table(&self) -> parking_lot::MutexGuard<'_, Table> {
        self.table.lock()
    }

    pub(crate) fn is_connected(&self, peer: &PeerId) -> bool {
        self.shared.is_connected(peer)
    }

    /// All peers that this node is connected to, without those that it has banned.
    pub(crate) fn connected(&self) -> Vec<PeerId> {
        self.shared.connected()
    }

    /// All peers that this node is connected to.
    pub(crate) fn everybody(&self) -> Vec<PeerId> {
        self.shared.everybody()
    }

    pub(crate) fn is_member(&self, peer: &PeerId) -> bool {
        PeerKey::of(peer).is_some_and(|key| self.table.lock().get(&key).is_some())
    }

    fn touch(&self) {
        self.changes.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_one();
    }

    /// Notes whether a connected peer answers: while a network is parted connections stay, and say nothing.
    pub(crate) fn note_answer(&self, peer: &PeerId, answers: bool) {
        let mut unanswered = self.unanswered.lock();
        let changed =
            if answers { unanswered.remove(peer) } else { self.is_connected(peer) && unanswered.insert(*peer) };
        if changed {
            self.changed.notify_one();
        }
    }

    /// Connected peers of which others say that they are gone, to be asked.
    pub(crate) fn suspects(&self) -> Vec<PeerId> {
        self.table.lock().suspects().filter(|peer| self.is_connected(peer)).collect()
    }

    /// Shows the list as it is now to whoever watches it, if it has changed.
    pub(crate) fn publish(&self) {
        let unanswered = self.unanswered.lock().clone();
        let answering = &self.shared.connected::<BTreeSet<PeerId>>() - &unanswered;
        // Locked until it is shown, so that an older list cannot overtake a newer one.
        let table = self.table.lock();
        let list = table.list(|peer| answering.contains(peer));
        self.list.send_if_modified(|shown| {
            let differs = **shown != list;
            if differs {
                *shown = Arc::new(list);
            }
            differs
        });
    }

    /// This node says something new about itself.
    pub(crate) fn speak(&self, change: impl FnOnce(&mut Entry)) {
        self.speak_above(0, change);
    }

    fn speak_above(&self, least: u64, change: impl FnOnce(&mut Entry)) {
        let key = {
            let mut table = self.table.lock();
            let old = Arc::clone(table.own());
            let mut entry = old.entry.clone();
            change(&mut entry);
            entry.incarnation = next_incarnation(entry.incarnation.max(least));
            entry.certificate = self.admission.own().as_deref().map(ShortCertificate::of);
            let is_news = least > 0 || entry.is_news_after(&old.entry);
            let key = entry.key;
            table.set_own(entry.sign(&self.cluster, &self.pair));
            is_news.then_some(key)
        };
        if let Some(key) = key {
            self.outbox.lock().entries.insert(key);
        }
        self.touch();
    }

    /// This node is at these addresses.
    pub(crate) fn set_addresses(&self, announced: &[Multiaddr]) {
        let sockets = sockets_of(announced);
        if self.table.lock().own().entry.addresses != sockets {
            self.speak(|entry| entry.addresses = sockets);
        }
    }

    /// This node leaves soon, or has no room.
    pub(crate) fn set_flags(&self, drain: bool, full: bool) {
        let differs = {
            let table = self.table.lock();
            let own = &table.own().entry;
            (own.drain, own.full) != (drain, full)
        };
        if differs {
            self.speak(|entry| (entry.drain, entry.full) = (drain, full));
            self.publish();
        }
    }

    /// This node could not reach `peer`.
    pub(crate) fn suspect(&self, peer: &PeerId) {
        let Some(target) = PeerKey::of(peer) else { return };
        let Some(incarnation) = self.table.lock().suspectable(&target) else { return };
        let said = Suspicion::new(&self.cluster, target, incarnation, &self.pair);
        if self.hear(said) == Heard::News {
            tracing::info!(%peer, "a member cannot be reached; it leaves the list unless it answers");
        }
    }

    fn hear(&self, said: Suspicion) -> Heard {
        let (target, incarnation) = (said.target, said.incarnation);
        let heard = self.table.lock().suspect(said.clone(), Instant::now());
        match heard {
            Heard::News => {
                self.outbox.lock().suspicions.insert(target, said);
                self.touch();
            }
            Heard::OfMe => self.speak_above(incarnation, |_| ()),
            Heard::TooMany | Heard::Nothing => {}
        }
        heard
    }

    /// Takes this peer's certificates back, also from the list. Blocks as the issuer does.
    ///
    /// # Errors
    /// When there is no issuer, or it does not sign.
    pub(crate) fn revoke(&self, peer: &PeerId) -> Result<(), crate::admission::issuer::IssueError> {
        self.admission.revoke(peer)?;
        self.notice_taken();
        Ok(())
    }

    fn notice_taken(&self) {
        let Some(notice) = self.admission.revocation() else { return };
        let notice = &notice.said;
        let removed = self.table.lock().remove(|peer, entry| {
            let epoch = entry.certificate.as_ref().map_or(0, |certificate| certificate.epoch);
            epoch < notice.epoch_min || notice.names(peer)
        });
        for peer in &removed {
            self.grants.forget_peer(peer);
            tracing::warn!(%peer, "a member's certificate was taken back");
        }
        self.outbox.lock().notice = true;
        self.touch();
    }

    /// Takes what another node tells. Gives back suspicions of whom it has and this node knows to be gone. Blocks for
    /// about 100 microseconds an entry that is new, so not for an async thread.
    ///
    /// # Errors
    /// When the other node breaks the protocol; what came before that is taken.
    pub(crate) fn take(&self, news: News) -> Result<Vec<Suspicion>, Fault> {
        if let Some(notice) = news.notice {
            self.take_notice(&notice)?;
        }
        let wanted: Vec<Arc<SignedEntry>> = {
            let table = self.table.lock();
            let own = table.own().entry.clone();
            let (mine, others): (Vec<_>, Vec<_>) =
                news.entries.into_iter().partition(|signed| signed.entry.key == own.key);
            let later = mine.iter().filter(|signed| signed.entry.incarnation > own.incarnation);
            let later = later.max_by_key(|signed| signed.entry.incarnation).cloned();
            drop(table);
            if let Some(later) = later.filter(|later| later.is_genuine(&self.cluster)) {
                // This node has said that before its state was lost, or its clock was set back.
                self.speak_above(later.entry.incarnation, |_| ());
            }
            let table = self.table.lock();
            others.into_iter().filter(|signed| table.wants(&signed.entry)).collect()
        };
        let now = unix_now();
        let mut gone = Vec::new();
        for signed in wanted {
            gone.extend(self.take_entry(&signed, now)?);
        }
        for said in news.suspicions {
            if !self.table.lock().wants_suspicion(&said) {
                continue;
            }
            if !said.is_genuine(&self.cluster) {
                return Err(Fault::Suspicion);
            }
            if self.hear(said.clone()) == Heard::TooMany {
                tracing::debug!(reporter = ?said.reporter, "a member suspects too many; the rest is not believed");
            }
        }
        Ok(gone)
    }

    fn take_notice(&self, notice: &SignedRevocation) -> Result<(), Fault> {
        let Some(trust) = self.admission.trust() else { return Ok(()) };
        if !notice.is_for(&self.cluster, &trust) {
            return Err(Fault::Notice);
        }
        if self.admission.take_revocation(notice.clone()) {
            self.notice_taken();
        }
        Ok(())
    }

    fn take_entry(&self, signed: &SignedEntry, now: u64) -> Result<Option<Suspicion>, Fault> {
        let Some(peer) = signed.entry.key.peer() else { return Err(Fault::Entry) };
        if !signed.is_genuine(&self.cluster) {
            return Err(Fault::Entry);
        }
        let certificate = signed.entry.certificate(&self.cluster, peer);
        if let Err(refusal) = self.admission.check(&peer, certificate.as_ref(), now) {
            // Whoever passes it on may have a slower clock, or not have heard of a notice; no fault of his.
            tracing::debug!(%peer, reason = refusal.name(), "a member's entry is not taken");
            return Ok(None);
        }
        let merged = self.table.lock().merge(peer, signed.clone());
        match merged {
            Merged::News => {
                let mut outbox = self.outbox.lock();
                if outbox.entries.len() < OUTBOX_ENTRIES_MAX {
                    outbox.entries.insert(signed.entry.key);
                }
                drop(outbox);
                self.touch();
            }
            // Shown within a second: at 10,000 members somebody renews five times a second, and a list takes milliseconds.
            Merged::Renewed => drop(self.changes.fetch_add(1, Ordering::Relaxed)),
            Merged::Known => {}
            Merged::Full => tracing::debug!(%peer, "the member list is full; a node is left out"),
            Merged::Gone(said) => return Ok(Some(*said)),
        }
        Ok(None)
    }

    /// Removes who has not answered in time, and whose certificate has ended. Says where they were.
    pub(crate) fn sweep(&self) -> Vec<(PeerId, Arc<SignedEntry>)> {
        let connected: BTreeSet<PeerId> = self.shared.connected();
        let left = self.table.lock().sweep(Instant::now(), unix_now(), |peer| connected.contains(peer));
        if !left.is_empty() {
            self.touch();
        }
        left
    }

    /// One word for everything.
    pub(crate) fn greeting(&self) -> Greeting {
        let notice = self.admission.revocation().map_or(0, |notice| notice.said.number);
        let table = self.table.lock();
        Greeting { root: table.root(), suspicions: table.suspicion_word(), notice }
    }

    /// The notice, if it is newer than `number`.
    pub(crate) fn notice_after(&self, number: u64) -> Option<Arc<SignedRevocation>> {
        self.admission.revocation().filter(|notice| notice.said.number > number)
    }

    /// What others should hear now; `None` when there is nothing.
    pub(crate) fn take_outbox(&self) -> Option<Passing> {
        let outbox = std::mem::take(&mut *self.outbox.lock());
        let now = Instant::now();
        let mut table = self.table.lock();
        let entries = outbox.entries.iter().filter_map(|key| table.take_push(key, now)).collect();
        drop(table);
        let also = outbox.suspicions.keys().filter_map(PeerKey::peer).filter(|peer| self.is_connected(peer)).collect();
        let notice = if outbox.notice { self.admission.revocation() } else { None };
        let suspicions = outbox.suspicions.into_values().collect();
        let news = News { more: false, notice, entries, suspicions, want: Vec::new() };
        (!news.is_empty()).then_some(Passing { news, also })
    }
}

/// Higher than `last`, and than what was said before any state was lost: milliseconds since 1970.
fn next_incarnation(last: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    last.saturating_add(1).max(u64::try_from(now).unwrap_or(u64::MAX))
}
