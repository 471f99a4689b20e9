//! Who may talk, who may read what, and who is there: what the issuer signs, and what members say.

use std::sync::LazyLock;

use hermes_p2p::admission::certificate::{Certificate, Trust};
use hermes_p2p::admission::grants::{Grant, GrantError};
use hermes_p2p::admission::revocation::{REVOKED_MAX, Revocation};
use hermes_p2p::admission::signed::{Document, Signed};
use hermes_p2p::members::codec::{FRAME_LEN_MAX_BYTES, Message};
use hermes_p2p::members::entry::SignedEntry;
use hermes_p2p::{ClusterId, PeerId, PeerKey, Refusal};
use libp2p::identity::{PublicKey, ed25519};

/// Seed of the key that the targets believe as the issuer's.
pub const ISSUER_SEED: [u8; 32] = [43; 32];

struct Issuer {
    pair: ed25519::Keypair,
    peer: PeerId,
    trust: Trust,
}

static ISSUER: LazyLock<Issuer> = LazyLock::new(|| {
    let secret = ed25519::SecretKey::try_from_bytes(ISSUER_SEED).expect("32 bytes are a key");
    let pair = ed25519::Keypair::from(secret);
    let peer = PublicKey::from(pair.public()).to_peer_id();
    let keys = vec![PeerKey::of(&peer).expect("an Ed25519 peer")];
    Issuer { pair, peer, trust: Trust { keys, epoch_min: 0 } }
});

/// Nobody's.
fn no_trust() -> Trust {
    Trust { keys: Vec::new(), epoch_min: 0 }
}

/// A document has one encoding, is no document of another kind, and is the same when the issuer signs it. The latter.
fn document<T: Document + Clone + PartialEq + std::fmt::Debug>(data: &[u8]) -> Option<(Signed<T>, Signed<T>)> {
    let read = Signed::<T>::decode(data).ok()?;
    assert!(data.len() <= T::LEN_MAX_BYTES);
    assert_eq!(read.encode(), data, "a document has a second encoding");
    let ours = read.said().clone().sign(&ISSUER.pair);
    assert_eq!(Signed::<T>::decode(&ours.encode()).as_ref(), Ok(&ours));
    Some((read, ours))
}

fn other_cluster(cluster: &ClusterId) -> ClusterId {
    let name = if cluster.as_str() == "other" { "another" } else { "other" };
    name.parse().expect("a cluster id")
}

/// A certificate is good for one peer, in one cluster and for one time, by an issuer that is believed.
pub fn certificate(data: &[u8]) {
    let Some((read, ours)) = document::<Certificate>(data) else { return };
    let said = read.said().clone();
    let check = |signed: &Signed<Certificate>, trust: &Trust| {
        signed.check(&said.cluster, &said.peer, trust, None, said.not_before)
    };
    let lasts = said.not_before <= said.not_after;
    assert!(check(&read, &no_trust()).is_err(), "believed without an issuer");
    assert_eq!(check(&ours, &ISSUER.trust).is_ok(), lasts);
    // Only the issuer's own signature over these bytes is good.
    assert!(check(&read, &ISSUER.trust).is_err() || read == ours);
    let elsewhere = other_cluster(&said.cluster);
    let in_other = ours.check(&elsewhere, &said.peer, &ISSUER.trust, None, said.not_before);
    assert_eq!(in_other, Err(Refusal::OtherCluster));
    if let Some(after) = said.not_after.checked_add(61) {
        let late = ours.check(&said.cluster, &said.peer, &ISSUER.trust, None, after);
        assert_eq!(late, Err(Refusal::Expired));
    }
    if lasts {
        let revoked = Revocation::with(&said.cluster, None, &said.peer, 1).expect("a node's name");
        let now = said.not_before;
        assert_eq!(ours.check(&said.cluster, &said.peer, &ISSUER.trust, Some(&revoked), now), Err(Refusal::Revoked));
    }
}

/// A grant is good in one cluster until its end, by an issuer that is believed.
pub fn grant(data: &[u8]) {
    let Some((read, ours)) = document::<Grant>(data) else { return };
    let said = read.said().clone();
    let verify = |signed: &Signed<Grant>, trust: &Trust| signed.verify(&said.cluster, trust, said.not_after);
    assert_eq!(verify(&read, &no_trust()), Err(GrantError::UnknownIssuer));
    assert_eq!(verify(&ours, &ISSUER.trust), Ok(()));
    assert!(verify(&read, &ISSUER.trust).is_err() || read == ours);
    let elsewhere = other_cluster(&said.cluster);
    assert_eq!(ours.verify(&elsewhere, &ISSUER.trust, 0), Err(GrantError::OtherCluster));
    if let Some(after) = said.not_after.checked_add(61) {
        assert_eq!(ours.verify(&said.cluster, &ISSUER.trust, after), Err(GrantError::Expired));
    }
}

/// A notice names each peer once, and the one that follows it names these too and has a higher number.
pub fn revocation(data: &[u8]) {
    let Some((read, _)) = document::<Revocation>(data) else { return };
    let said = read.said();
    // Bytes that are no point of the curve may be refused by name, and nobody has that name.
    let named: Vec<PeerId> = said.peers().collect();
    assert!(named.len() <= REVOKED_MAX);
    assert!(named.iter().all(|peer| said.names(peer)));
    if let Some(next) = Revocation::with(&said.cluster, Some(said), &ISSUER.peer, 0) {
        assert!(next.number > said.number || said.number == u64::MAX);
        assert!(next.names(&ISSUER.peer) && named.iter().all(|peer| next.names(peer)));
        let signed = next.sign(&ISSUER.pair);
        assert_eq!(Signed::decode(&signed.encode()), Ok(signed));
    }
}

/// An entry is read as it stands, and good in one cluster at most.
pub fn member_entry(data: &[u8]) {
    let Ok(read) = SignedEntry::decode(data) else { return };
    assert_eq!(read.encoded(), data, "an entry is not what was read");
    let genuine = ["prod", "other"].map(|cluster| read.is_genuine(&cluster.parse().expect("a cluster id")));
    assert_ne!(genuine, [true; 2], "good in two clusters");
}

/// A message has one encoding.
pub fn member_message(data: &[u8]) {
    let Ok(message) = Message::decode(data) else { return };
    let frame = message.encode();
    let (head, body) = frame.split_first_chunk::<4>().expect("a frame has a length");
    assert_eq!(u32::from_le_bytes(*head) as usize, body.len());
    assert!(body.len() <= FRAME_LEN_MAX_BYTES);
    assert_eq!(body, data, "a message has a second encoding");
}
