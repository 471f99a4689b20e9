//! What the authority makes, looked at by the TLS library and by the swarm.

use std::os::unix::fs::PermissionsExt as _;

use proptest::prelude::*;
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;

use super::folder::AuthorityFolder;
use super::identity::NodeIdentity;
use super::*;

const NOW: u64 = 1_800_000_000;
const DAY: u64 = 24 * 3600;

fn cluster() -> ClusterId {
    "prod".parse().expect("a cluster id")
}

fn peer(seed: u8) -> PeerId {
    let key = hermes_p2p::admission::issuing::IssuingKey::from_seed([seed; 32]).public();
    key.peer().expect("a key")
}

/// Whether TLS believes `certificate` by `roots` at `now`.
fn is_believed(roots: &[Vec<u8>], certificate: &[u8], now: u64) -> bool {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(CertificateDer::from(root.clone())).expect("a root");
    }
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(std::sync::Arc::new(store), provider).build();
    let at = UnixTime::since_unix_epoch(Duration::from_secs(now));
    verifier.expect("built").verify_client_cert(&CertificateDer::from(certificate), &[], at).is_ok()
}

#[test]
fn a_nodes_certificate_names_it_and_is_believed_for_a_day() {
    let authority = Authority::create(cluster(), NOW).expect("made");
    let certificate = authority.node_certificate("node-1.example", &peer(1), NOW).expect("issued");
    let identity = NodeIdentity::of(&certificate).expect("read");
    assert_eq!((identity.node.as_str(), identity.peer, identity.not_after), ("node-1.example", peer(1), NOW + DAY));
    let roots = authority.roots();
    assert!(is_believed(&roots, &certificate, NOW) && is_believed(&roots, &certificate, NOW + DAY - 1));
    assert!(!is_believed(&roots, &certificate, NOW + DAY + 1), "it does not end");
    let other = Authority::create(cluster(), NOW).expect("made");
    assert!(!is_believed(&other.roots(), &certificate, NOW), "another authority's is believed");
    for name in ["", "Node", "-a", "a-", "a b", "a/b", &"a".repeat(254)] {
        assert!(
            matches!(authority.node_certificate(name, &peer(1), NOW), Err(AuthorityError::NodeName { .. })),
            "{name}"
        );
    }
    // The server's own is no node's.
    let (server, _) = authority.issuing(NOW).server_certificate(NOW).expect("issued");
    assert!(!is_believed(&roots, &server, NOW) && NodeIdentity::of(&server).is_none());
}

#[test]
fn a_generation_is_replaced_while_everything_that_was_issued_stays_good() {
    let first = Authority::create(cluster(), NOW).expect("made");
    let rotate = ROTATE_EVERY.as_secs();
    assert!(first.rotated(NOW + rotate - 1).expect("looks").is_none());
    let made = NOW + rotate;
    let second = first.rotated(made).expect("looks").expect("a new generation");
    assert_eq!(second.roots().len(), 2);
    assert!(second.rotated(made + 1).expect("looks").is_none(), "a generation too much");

    // Until everybody has heard of the new one, the old one issues.
    let before = second.node_certificate("a", &peer(1), made + OVERLAP.as_secs() - 1).expect("issued");
    assert!(is_believed(&first.roots(), &before, made + OVERLAP.as_secs() - 1));
    let at = made + OVERLAP.as_secs();
    let after = second.node_certificate("a", &peer(1), at).expect("issued");
    assert!(!is_believed(&first.roots(), &after, at) && is_believed(&second.roots(), &after, at));
    let member = second.member_certificate(peer(1), Zone::default(), at);
    assert!(member.check(&cluster(), &peer(1), &second.trust(), None, at).is_ok());

    // The last that the old one has issued ends a day later; the old one is gone after that.
    assert!(second.rotated(at + OVERLAP.as_secs() - 1).expect("looks").is_none());
    let third = second.rotated(at + OVERLAP.as_secs()).expect("looks").expect("the old one goes");
    assert_eq!(third.roots(), second.roots()[1..]);
    assert!(is_believed(&third.roots(), &after, at));
}

#[test]
fn who_is_taken_out_stays_out_over_rotations() {
    let first = Authority::create(cluster(), NOW).expect("made");
    let out = first.without(&peer(1), NOW).expect("taken out").without(&peer(2), NOW).expect("taken out");
    assert!(out.has_revoked(&peer(1)) && out.has_revoked(&peer(2)) && !out.has_revoked(&peer(3)));
    assert!(!first.has_revoked(&peer(1)));
    let made = NOW + ROTATE_EVERY.as_secs();
    let later = out.rotated(made).expect("looks").expect("changes");
    let last = later.rotated(made + 2 * OVERLAP.as_secs()).expect("looks").expect("changes");
    assert!(last.has_revoked(&peer(1)));
    let (old, new) = (out.revocation().expect("there"), last.revocation().expect("there"));
    assert!(new.said().number > old.said().number, "nodes would not take it");
}

#[test]
fn grants_are_good_for_their_peer_and_their_time() {
    let authority = Authority::create(cluster(), NOW).expect("made");
    let layer = DiffId([7; 32]);
    let grant = authority.grant(peer(1), layer, NOW, Duration::from_secs(600)).encode();
    assert_eq!(authority.granted(&grant, &peer(1), NOW), Some(layer));
    assert_eq!(authority.granted(&grant, &peer(2), NOW), None);
    assert_eq!(authority.granted(&grant, &peer(1), NOW + 700), None);
    assert_eq!(Authority::create(cluster(), NOW).expect("made").granted(&grant, &peer(1), NOW), None);
}

#[test]
fn what_is_kept_is_the_same_again_and_is_nobody_elses() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = AuthorityFolder::new(folder.path().join("authority"));
    assert!(place.load(&cluster()).expect("looks").is_none());
    let made = place.load_or_create(&cluster(), NOW).expect("made");
    let changed = made.renewed(NOW).expect("renewed").without(&peer(1), NOW).expect("taken out");
    place.save(&changed).expect("saved");
    let read = place.load(&cluster()).expect("reads").expect("there");
    assert_eq!((read.to_document(), read.roots()), (changed.to_document(), changed.roots()));
    let certificate = read.node_certificate("a", &peer(1), NOW).expect("issued");
    assert!(is_believed(&made.roots(), &certificate, NOW), "the restored key signs something else");
    let path = folder.path().join("authority/authority.json");
    assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    let other = "test".parse().expect("a cluster id");
    assert!(matches!(place.load(&other), Err(AuthorityError::OtherCluster { .. })));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("opens");
    assert!(matches!(place.load(&cluster()), Err(AuthorityError::Exposed { mode: 0o640, .. })));
    assert!(!format!("{read:?}").contains(&hex::encode(&read.to_document()[..8])));
}

#[test]
fn a_damaged_document_is_refused() {
    let document = Authority::create(cluster(), NOW).expect("made").to_document();
    for cut in (0..document.len()).step_by(31) {
        assert!(Authority::from_document(&document[..cut], &cluster()).is_err(), "cut at {cut}");
    }
    let text = String::from_utf8(document.to_vec()).expect("text");
    let later = text.replace("\"version\": 1", "\"version\": 2");
    assert!(matches!(Authority::from_document(later.as_bytes(), &cluster()), Err(AuthorityError::Document { .. })));
}

proptest! {
    #[test]
    fn any_bytes_are_some_certificate_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = NodeIdentity::of(&bytes);
    }

    #[test]
    fn a_changed_certificate_never_panics(at in 0_usize..2000, value in any::<u8>()) {
        let authority = Authority::create(cluster(), NOW).expect("made");
        let mut certificate = authority.node_certificate("node", &peer(1), NOW).expect("issued");
        let at = at % certificate.len();
        certificate[at] = value;
        let _ = NodeIdentity::of(&certificate);
    }
}
