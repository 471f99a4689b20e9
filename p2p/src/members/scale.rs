//! What the longest list costs: bytes on the wire, on disk, and time of one core.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::{AsyncRead, AsyncWrite};
use libp2p::identity::ed25519;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};

use super::codec::News;
use super::entry::tests::{cluster, said};
use super::entry::{Entry, ShortCertificate, SignedEntry};
use super::roster::{Own, Roster};
use super::saved::Saved;
use super::sync;
use super::table::MEMBERS_MAX;
use crate::admission::Admission;
use crate::admission::certificate::{Certificate, Trust};
use crate::admission::grants::{Grants, SignedGrant};
use crate::admission::issuer::{CertificateRequest, IssueError, Issuer};
use crate::admission::revocation::{Revocation, SignedRevocation};
use crate::admission::signed::Document as _;
use crate::canonical::{PeerKey, unix_now};
use crate::swarm::Shared;

/// Issues whatever it is asked for.
struct Authority(ed25519::Keypair);

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

impl Issuer for Authority {
    fn issue(
        &self,
        request: &CertificateRequest,
    ) -> Result<crate::admission::certificate::SignedCertificate, IssueError> {
        let (not_before, not_after) = (request.now, request.now + 3600);
        let (cluster, zone) = (request.cluster.clone(), request.zone.clone());
        let said = Certificate { cluster, peer: request.peer, zone, epoch: request.epoch_min, not_before, not_after };
        Ok(said.sign(&self.0))
    }

    fn trust(&self) -> Trust {
        Trust { keys: vec![PeerKey(self.0.public().to_bytes())], epoch_min: 0 }
    }

    fn revoke(&self, notice: Revocation) -> Result<SignedRevocation, IssueError> {
        Ok(notice.sign(&self.0))
    }

    fn grant(
        &self,
        _: &crate::config::ClusterId,
        _: libp2p::PeerId,
        _: hermes_image::ids::DiffId,
        _: u64,
        _: Duration,
    ) -> Result<SignedGrant, IssueError> {
        Err(IssueError::NotHere { what: "grant layers" })
    }
}

/// Counts what is written.
struct Counted {
    stream: Compat<tokio::io::DuplexStream>,
    written: Arc<AtomicUsize>,
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &mut [u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_read(cx, bytes)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(len)) = written {
            self.written.fetch_add(len, Ordering::Relaxed);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

/// The list of a node of an open swarm that has met nobody.
pub(super) fn open_roster() -> Arc<Roster> {
    roster(None)
}

/// The list of a node of a closed swarm that has met nobody.
pub(super) fn closed_roster() -> Arc<Roster> {
    alone(&Arc::new(Authority(ed25519::Keypair::generate())))
}

fn alone(authority: &Arc<Authority>) -> Arc<Roster> {
    roster(Some(Arc::clone(authority) as Arc<dyn Issuer>))
}

fn roster(issuer: Option<Arc<dyn Issuer>>) -> Arc<Roster> {
    let pair = ed25519::Keypair::generate();
    let admission = Arc::new(Admission::new(cluster(), issuer));
    let peer = PeerKey(pair.public().to_bytes()).peer().expect("a key");
    let zone: crate::Zone = "zone-1".parse().expect("a zone");
    admission.renew(peer, zone.clone()).expect("issued");
    let own = Own { cluster: cluster(), pair, zone, suspect_for: Duration::from_secs(30), incarnation: 0 };
    let grants = Arc::new(Grants::new(Arc::clone(&admission)));
    Arc::new(Roster::new(own, admission, grants, Arc::new(Shared::new())))
}

fn certified(authority: &Authority, pair: &ed25519::Keypair, mut entry: Entry) -> SignedEntry {
    let peer = entry.key.peer().expect("a key");
    let (zone, now) = (entry.zone.clone(), unix_now());
    let request = CertificateRequest { cluster: cluster(), peer, zone, epoch_min: 0, now };
    entry.certificate = Some(ShortCertificate::of(&authority.issue(&request).expect("issued")));
    entry.sign(&cluster(), pair)
}

/// Bytes both ways, and how long it took.
async fn exchange(asker: &Arc<Roster>, other: &Arc<Roster>) -> (usize, Duration) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let written = Arc::new(AtomicUsize::new(0));
    let mut near = Counted { stream: near.compat(), written: Arc::clone(&written) };
    let mut far = Counted { stream: far.compat(), written: Arc::clone(&written) };
    let begun = Instant::now();
    let (asked, answered) = tokio::join!(sync::compare(asker, &mut near), async {
        let answered = sync::answer(other, &mut far).await;
        drop(far);
        answered
    });
    asked.expect("compares");
    answered.expect("answers");
    (written.load(Ordering::Relaxed), begun.elapsed())
}

#[tokio::test]
async fn ten_thousand_members_are_within_bounds() {
    let authority = Arc::new(Authority(ed25519::Keypair::generate()));
    let (full, new) = (alone(&authority), alone(&authority));
    let mut people = Vec::new();
    for _ in 0..MEMBERS_MAX - 2 {
        let (pair, entry) = said(1);
        let signed = Arc::new(certified(&authority, &pair, entry.clone()));
        people.push((pair, entry, signed));
    }
    let entries: Vec<_> = people.iter().map(|(_, _, signed)| Arc::clone(signed)).collect();
    let begun = Instant::now();
    for some in entries.chunks(1000) {
        full.take(News { entries: some.to_vec(), ..News::default() }).expect("genuine");
    }
    println!("checking and merging {} entries: {:?}", entries.len(), begun.elapsed());

    let (bytes, time) = exchange(&new, &full).await;
    println!("joining: {bytes} bytes, {time:?}");
    assert!(bytes < 3 << 20, "{bytes}");
    assert_eq!(new.table().root(), full.table().root());
    let (bytes, time) = exchange(&new, &full).await;
    println!("comparing equal lists: {bytes} bytes, {time:?}");
    assert!(bytes < 64, "{bytes}");

    let (pair, entry, _) = &people[77];
    let changed = Entry { drain: true, incarnation: 2, ..entry.clone() };
    let changed = Arc::new(certified(&authority, pair, changed));
    full.take(News { entries: vec![changed], ..News::default() }).expect("genuine");
    let (bytes, time) = exchange(&new, &full).await;
    println!("comparing lists that differ in one entry: {bytes} bytes, {time:?}");
    assert!(bytes < 8 << 10, "{bytes}");

    let begun = Instant::now();
    let list = new.table().list(|_| false);
    println!("making a list of {}: {:?}", list.count(), begun.elapsed());
    assert_eq!((list.count(), list.epoch()), (MEMBERS_MAX, full.table().list(|_| false).epoch()));
    // One more finds no room, and is no error.
    let (pair, entry) = said(1);
    let more = Arc::new(certified(&authority, &pair, entry));
    new.take(News { entries: vec![more], ..News::default() }).expect("genuine");
    assert_eq!(new.table().list(|_| false).count(), MEMBERS_MAX);

    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("members");
    let entries = new.table().others().map(|(_, signed)| Arc::clone(signed)).collect();
    Saved { incarnation: 1, notice: None, entries }.store(&path).expect("saves");
    let len = std::fs::metadata(&path).expect("is there").len();
    println!("on disk: {len} bytes");
    assert!(len < 3 << 20 && Saved::load(&path).expect("reads").entries.len() == MEMBERS_MAX - 1);
}
