//! What is told, in memory and on disk. The controller itself is met in the end-to-end tests.

use bytes::Bytes;

use super::known::Known;
use super::*;

fn image(number: u8, fingerprint: u64) -> v1::Image {
    v1::Image {
        manifest: Bytes::from(vec![number; 32]),
        fingerprint,
        statement: Bytes::from_static(b"signed"),
        seeds: vec![v1::Seed { node: "node-1".to_owned(), mode: v1::seed::Mode::Hot.into() }],
        ..Default::default()
    }
}

fn update(revision: u64, snapshot: bool, images: Vec<v1::Image>) -> v1::WatchUpdate {
    v1::WatchUpdate { history: 7, revision, snapshot, images, ..Default::default() }
}

fn numbers(known: &Known) -> Vec<u8> {
    (0..=255).filter(|number| known.image(Digest([*number; 32])).is_some()).collect()
}

#[test]
fn a_snapshot_replaces_all_but_what_it_keeps_and_changes_add_to_it() {
    let mut known = Known::default();
    known.take(update(0, true, vec![image(1, 11)]));
    known.take(update(5, true, vec![image(2, 12), image(3, 13)]));
    assert_eq!((numbers(&known), known.request().revision), (vec![1, 2, 3], 5));
    let gone_images = vec![Bytes::from(vec![2; 32])];
    known.take(v1::WatchUpdate { gone_images, ..update(6, false, vec![image(4, 14)]) });
    assert_eq!(numbers(&known), [1, 3, 4]);
    let request = known.request();
    assert_eq!((request.history, request.revision, request.known), (7, 6, vec![11, 13, 14]));
    // A snapshot that is cut short takes nothing away, and says nothing of the next one.
    known.take(update(0, true, vec![image(5, 15)]));
    known.begin();
    known.take(v1::WatchUpdate { kept: vec![13], ..update(9, true, vec![image(6, 16)]) });
    assert_eq!(numbers(&known), [3, 6]);
    let wanted = known.wanted("node-1");
    assert_eq!((wanted.len(), wanted[0].mode), (2, v1::seed::Mode::Hot));
    assert!(known.wanted("node-2").is_empty());
}

#[test]
fn what_makes_no_sense_is_left_out() {
    let mut known = Known::default();
    let short = v1::Image { manifest: Bytes::from_static(b"short"), ..image(1, 1) };
    let long = v1::Image { statement: Bytes::from(vec![0; 2 << 20]), ..image(2, 2) };
    let nobody = v1::Member { peer: Bytes::from_static(b"nobody"), addresses: Vec::new() };
    known.take(v1::WatchUpdate { members: vec![nobody], ..update(1, false, vec![short, long]) });
    assert!(numbers(&known).is_empty() && known.places().is_empty());
    let keys = vec!["no key".to_owned(); 100];
    let issuer_keys = vec![Bytes::from_static(b"short")];
    known.set_trust(v1::Trust { index_keys: keys, issuer_keys, ..Default::default() });
    assert!(known.index_keys().is_empty() && known.swarm_trust().keys.is_empty());
}

#[test]
fn what_was_told_is_there_after_a_restart_and_damage_is_seen() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("state");
    assert!(numbers(&Known::load(&path).expect("no file is no error")).is_empty());
    let mut known = Known::default();
    let peer = hermes_p2p::admission::issuing::IssuingKey::from_seed([1; 32]).public().peer().expect("a key");
    let member = v1::Member { peer: peer.to_bytes().into(), addresses: vec!["/ip4/10.0.0.1/tcp/4100".to_owned()] };
    known.take(v1::WatchUpdate { members: vec![member], ..update(3, true, vec![image(1, 11)]) });
    let bytes = known.encode();
    super::known::save(&path, &bytes).expect("saved");
    let read = Known::load(&path).expect("read");
    assert_eq!((numbers(&read), read.places().len(), read.request()), (vec![1], 1, known.request()));
    for at in (0..bytes.len()).step_by(13) {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        std::fs::write(&path, &bad).expect("written");
        assert!(Known::load(&path).is_err(), "byte {at}");
        std::fs::write(&path, &bytes[..at]).expect("written");
        assert!(Known::load(&path).is_err(), "cut at {at}");
    }
}
