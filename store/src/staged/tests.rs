use std::fs;
use std::sync::Arc;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, ChunkId, ChunkNo};
use hermes_image::index::chunks::ChunkTableBuilder;
use hermes_image::verify::Verified;

use crate::testing::{Fixture, Ramp, check, put};
use crate::{FullCause, SealedLayer, StagedLayer, Store, StoreError};

/// 40 chunks of 64 KiB, and one that ends off every block.
fn ramp(name: u32) -> Ramp {
    let mut lens = vec![65536; 40];
    lens.push(700);
    Ramp::unique(name, &lens)
}

fn stage(store: &Store, ramp: &Ramp) -> StagedLayer {
    let mut staged = store.stage_layer().expect("begins");
    for chunk in 0..ramp.table.count() {
        staged.append(&ramp.verified(chunk)).expect("appends");
    }
    staged
}

fn seal(store: &Store, ramp: &Ramp) -> SealedLayer {
    stage(store, ramp).seal(&ramp.table).expect("seals")
}

fn used_bytes(store: &Store) -> u64 {
    store.usage().expect("usage").used_bytes
}

/// The names in the folder `name` of the store.
fn names(store: &Store, name: &str) -> Vec<String> {
    let entries = fs::read_dir(store.config().dir.join(name)).expect("lists");
    entries.map(|entry| entry.expect("lists").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn a_staged_layer_is_nothing_until_it_is_adopted_and_then_complete_for_good() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let ramp = ramp(1);
    let sealed = seal(&store, &ramp);
    assert!(store.open_layer(ramp.table.diff_id()).is_none() && store.layers().is_empty());
    assert!(used_bytes(&store) >= ramp.table.logical_len_bytes(), "its room is taken");
    let layer = store.adopt(sealed).expect("adopts");
    assert!(layer.is_complete() && layer.is_held());
    check(&layer, &ramp);
    assert!(layer.verify_present().expect("verifies").is_empty());
    assert_eq!(
        used_bytes(&store),
        layer.allocated_bytes().expect("asks") + store.usage().expect("usage").artifact_bytes
    );
    assert_eq!(names(&store, "layers"), [ramp.table.diff_id().hex()]);
    assert_eq!(store.holders(&layer, ChunkNo(3)).expect("looks up"), [(ramp.table.diff_id(), ChunkNo(3))]);
    drop(layer);
    // Nothing is synced after it: it was durable when it was adopted.
    Store::abandon(store);
    let store = fixture.open();
    let layer = store.open_layer(ramp.table.diff_id()).expect("registered");
    assert!(layer.is_complete() && !layer.is_held());
    check(&layer, &ramp);
    assert!(store.make_room(u64::MAX).expect("evicts") >= ramp.table.logical_len_bytes(), "it can be evicted");
}

#[test]
fn what_is_dropped_leaves_nothing() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let before = used_bytes(&store);
    drop(stage(&store, &ramp(1)));
    drop(seal(&store, &ramp(2)));
    let error = stage(&store, &ramp(4)).seal(&Ramp::unique(3, &[65536; 40]).table).expect_err("too long");
    assert!(matches!(error, StoreError::StagedLength { expected: 2_621_440, actual: 2_622_140, .. }), "{error}");
    drop(store.stage_artifact(&Verified::named(Bytes::from_static(b"part of an index")).1).expect("stages"));
    assert!(names(&store, "layers").is_empty() && names(&store, "artifacts").is_empty());
    assert_eq!(used_bytes(&store), before);
    // An empty layer is complete as it is.
    let empty = Ramp::new(9, &[]);
    assert!(store.adopt(seal(&store, &empty)).expect("adopts").is_complete());
}

#[test]
fn a_crash_before_the_record_leaves_nothing_that_counts() {
    let fixture = Fixture::new();
    let ramp = ramp(1);
    // The file as it is when the process ends: below its temporary name, or already below the layer's.
    for (name, temporary, orphans) in [(".tmp-1-0".to_owned(), 1, 0), (ramp.table.diff_id().hex(), 0, 1)] {
        let store = fixture.open();
        let saved = fixture.config.dir.join("saved");
        let sealed = seal(&store, &ramp);
        fs::hard_link(&sealed.staged.path, &saved).expect("links");
        drop(sealed);
        Store::abandon(store);
        fs::rename(&saved, fixture.config.dir.join("layers").join(name)).expect("renames");
        let store = fixture.open();
        assert_eq!((store.recovery().temporary_files, store.recovery().orphan_layer_files), (temporary, orphans));
        assert!(store.layers().is_empty() && names(&store, "layers").is_empty());
        assert_eq!(used_bytes(&store), 0);
        // And the same layer can come again.
        let layer = store.adopt(seal(&store, &ramp)).expect("adopts");
        check(&layer, &ramp);
        drop(layer);
        assert!(store.remove_layer(ramp.table.diff_id()).expect("removes"));
        store.remove_unused_artifacts(&|_| false).expect("removes");
    }
}

#[test]
fn a_layer_that_is_there_gets_what_it_lacks() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let ramp = ramp(1);
    let layer = store.layer(&ramp.table).expect("a layer").hold();
    (0..20).for_each(|chunk| put(&layer, &ramp, chunk));
    let adopted = store.adopt(seal(&store, &ramp)).expect("adopts");
    assert!(layer.is_complete() && adopted.number() == layer.number());
    check(&layer, &ramp);
    drop((adopted, layer));
    Store::abandon(store);
    let store = fixture.open();
    assert!(store.open_layer(ramp.table.diff_id()).expect("registered").is_complete());
}

#[test]
fn another_table_gives_way_unless_it_is_held() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let ramp = ramp(1);
    // The same layer, as one that was indexed with other chunks.
    let mut builder = ChunkTableBuilder::default();
    builder.push(ChunkId([7; 32]), 1024).expect("a chunk");
    let other = builder.finish(ramp.table.diff_id());
    let held = store.layer(&other).expect("a layer").hold();
    assert!(matches!(store.adopt(seal(&store, &ramp)), Err(StoreError::LayerInUse { .. })));
    assert_eq!(names(&store, "layers").len(), 1, "the held layer's file alone");
    drop(held);
    let layer = store.adopt(seal(&store, &ramp)).expect("adopts");
    check(&layer, &ramp);
    assert_eq!(store.layers().len(), 1);
}

#[test]
fn staging_keeps_the_budget() {
    let mut fixture = Fixture::new();
    fixture.config.budget_bytes = Some(6 << 20);
    let store = fixture.open();
    let (old, new) = (ramp(1), ramp(2));
    let layer = Arc::clone(store.adopt(seal(&store, &old)).expect("adopts").layer());
    let first = seal(&store, &new);
    let second = {
        // Two layers of 2.5 MiB are staged; the third finds room by what it evicts.
        let ramp = ramp(3);
        (seal(&store, &ramp), ramp)
    };
    assert!(!layer.is_complete(), "what nobody holds gives way");
    assert!(used_bytes(&store) <= 6 << 20);
    let mut third = store.stage_layer().expect("begins");
    let more = ramp(4);
    let error = (0..40).find_map(|chunk| third.append(&more.verified(chunk)).err()).expect("there is no more room");
    assert!(matches!(error, StoreError::Full { cause: FullCause::Budget { .. }, .. }), "{error}");
    drop((third, first));
    check(&store.adopt(second.0).expect("adopts"), &second.1);
}

#[test]
fn artifacts_are_kept_together_with_their_layer_or_not_at_all() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let (id, bytes) = Verified::named(Bytes::from(vec![5; 100_000]));
    let staged = store.stage_artifact(&bytes).expect("stages");
    assert_eq!((staged.id(), store.artifact(id).expect("looks")), (id, None));
    let twice = store.stage_artifact(&bytes).expect("stages");
    staged.keep().expect("keeps");
    assert_eq!(twice.keep().expect("is there"), id);
    assert_eq!(store.usage().expect("usage").artifact_bytes, 100_000);
    assert_eq!(used_bytes(&store), 100_000, "it is counted once");
    drop(store.stage_artifact(&bytes).expect("is there"));
    assert!(store.artifact(id).expect("looks").is_some(), "what was there before stays");
    store.remove_if_unused([], &[id, ArtifactId([1; 32])]).expect("removes");
    assert_eq!((store.artifact(id).expect("looks"), used_bytes(&store)), (None, 0));
    let table = ramp(1).table;
    let layer = store.layer(&table).expect("a layer");
    store.remove_if_unused([], &[table.id()]).expect("looks");
    assert!(store.artifact(table.id()).expect("looks").is_some(), "a layer refers to it");
    drop(layer);
}
