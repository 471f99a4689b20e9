//! Tests of the store as a whole, by table.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, ChunkNo, DiffId, Digest, LayerId};
use hermes_image::runs::Runs;
use hermes_image::verify::Verified;

use crate::testing::{Fixture, Ramp, check, put};
use crate::{DropBehind, FullCause, ImageLayer, ImageRecord, Read, Store, StoreError};

/// 40 chunks of 64 KiB: two and a half groups.
fn full_size(name: u32) -> Ramp {
    Ramp::unique(name, &[65536; 40])
}

fn fill(store: &Store, ramp: &Ramp) -> Arc<crate::Layer> {
    let layer = store.layer(&ramp.table).expect("a layer");
    for chunk in 0..ramp.table.count() {
        put(&layer, ramp, chunk);
    }
    layer
}

fn image(name: u8, ramps: &[&Ramp]) -> ImageRecord {
    let layers = ramps.iter().map(|ramp| ImageLayer {
        layer: LayerId(ramp.table.diff_id().0),
        diff_id: ramp.table.diff_id(),
        toc: ArtifactId([1; 32]),
        chunks: ramp.table.id(),
        seek: ArtifactId([2; 32]),
        windows: ArtifactId([3; 32]),
    });
    ImageRecord {
        manifest: Digest([name; 32]),
        reference: "registry.example/app:1".to_owned(),
        platform: "linux/amd64".to_owned(),
        layers: layers.collect(),
        tree: None,
        last_use_seconds: 1,
        access: hermes_image::access::Access::Public,
        proven: true,
    }
}

#[test]
fn reads_say_what_they_need_and_where_the_space_ends() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let ramp = Ramp::unique(1, &[512, 65536, 1000]);
    let layer = store.layer(&ramp.table).expect("a layer");
    let mut buf = [0; 2000];
    assert_eq!(layer.read_at(0, &mut buf).expect("reads"), Read::Miss(Runs::one(0..2)));
    put(&layer, &ramp, 1);
    assert_eq!(layer.read_at(0, &mut buf).expect("reads"), Read::Miss(Runs::one(0..1)));
    assert_eq!(layer.read_at(512, &mut buf).expect("reads"), Read::Hit(2000));
    assert_eq!(buf[..], ramp.bytes(1)[..2000]);
    put(&layer, &ramp, 2);
    assert_eq!(layer.read_at(66048 + 900, &mut buf).expect("reads"), Read::Hit(100));
    assert_eq!(buf[..100], ramp.bytes(2)[900..]);
    assert_eq!(layer.read_at(ramp.table.logical_len_bytes(), &mut buf).expect("reads"), Read::Hit(0));
    assert_eq!(layer.read_at(u64::MAX, &mut buf).expect("reads"), Read::Hit(0));
    assert!(!layer.contains_all(1..4) && layer.contains_all(1..3) && !layer.is_complete());
    put(&layer, &ramp, 0);
    assert!(layer.is_complete());
    check(&layer, &ramp);
}

#[test]
fn an_empty_layer_is_complete() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let layer = store.layer(&Ramp::new(1, &[]).table).expect("a layer");
    assert!(layer.is_complete() && layer.present().is_empty());
    assert_eq!(layer.read_at(0, &mut [0; 8]).expect("reads"), Read::Hit(0));
    layer.sync().expect("syncs");
}

#[test]
fn chunks_that_do_not_fit_are_refused() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let ramp = Ramp::unique(1, &[512, 1024]);
    let layer = store.layer(&ramp.table).expect("a layer");
    assert!(matches!(layer.put(ChunkNo(2), &ramp.verified(0)), Err(StoreError::NoSuchChunk { count: 2, .. })));
    assert!(matches!(layer.put(ChunkNo(1), &ramp.verified(0)), Err(StoreError::WrongLength { expected: 1024, .. })));
    assert!(matches!(layer.read_chunk(ChunkNo(9)), Err(StoreError::NoSuchChunk { .. })));
    assert!(layer.present().is_empty());
}

#[test]
fn a_second_opener_is_refused_until_the_first_has_gone() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let ramp = Ramp::unique(1, &[512]);
    let layer = fill(&store, &ramp);
    match Store::open(fixture.config.clone()) {
        Err(error @ StoreError::InUse { .. }) => assert!(error.to_string().contains(&std::process::id().to_string())),
        other => panic!("{other:?}"),
    }
    drop(store);
    // A layer that is still held keeps the folder, can be read, and cannot be written.
    assert!(matches!(Store::open(fixture.config.clone()), Err(StoreError::InUse { .. })));
    check(&layer, &ramp);
    drop(layer);
    let store = fixture.open();
    assert!(!store.recovery().unclean);
    let layer = store.open_layer(ramp.table.diff_id()).expect("still there");
    assert!(layer.is_complete());
    let other = store.layer(&Ramp::unique(2, &[512]).table).expect("a layer");
    drop(store);
    assert!(matches!(other.put(ChunkNo(0), &Ramp::unique(2, &[512]).verified(0)), Err(StoreError::Closed)));
}

#[test]
fn the_thread_syncs_by_time_and_by_bytes() {
    for (interval_ms, bytes) in [(5, u64::MAX), (3_600_000, 65536)] {
        let mut fixture = Fixture::new();
        fixture.config.sync_interval_ms = interval_ms;
        fixture.config.sync_bytes = bytes;
        let store = fixture.open();
        let ramp = full_size(1);
        let layer = fill(&store, &ramp);
        let deadline = Instant::now() + Duration::from_secs(20);
        while store.counters().synced_chunks.get() < 40 {
            assert!(Instant::now() < deadline, "no sync with {interval_ms} ms or {bytes} bytes");
            std::thread::yield_now();
        }
        drop(layer);
        Store::abandon(store);
        let store = fixture.open();
        assert!(store.recovery().unclean);
        let layer = store.open_layer(ramp.table.diff_id()).expect("registered");
        assert!(layer.is_complete());
        check(&layer, &ramp);
    }
}

#[test]
fn the_budget_is_kept_by_evicting_the_longest_unused() {
    let mut fixture = Fixture::new();
    fixture.config.budget_bytes = Some(6 << 20);
    let store = fixture.open();
    let ramps = [full_size(1), full_size(2), full_size(3)];
    store.shared.clock.freeze(100);
    let old = fill(&store, &ramps[0]);
    store.shared.clock.freeze(200);
    let newer = fill(&store, &ramps[1]);
    store.shared.clock.freeze(300);
    // The first group of the old layer is used again, so its others are older.
    assert_eq!(old.read_at(0, &mut [0; 100]).expect("reads"), Read::Hit(100));
    let newest = fill(&store, &ramps[2]);
    assert!(newest.is_complete());
    assert_eq!(old.present(), Runs::one(0..16));
    assert!(newer.present().chunk_count() < 40 && !newer.present().is_empty());
    for (layer, ramp) in [(&old, &ramps[0]), (&newer, &ramps[1]), (&newest, &ramps[2])] {
        check(layer, ramp);
    }
    store.sync().expect("syncs");
    let usage = store.usage().expect("asks");
    assert!(usage.allocated_bytes <= 6 << 20, "{usage:?}");
    assert!(usage.used_bytes <= 6 << 20, "{usage:?}");
    // What was evicted stays away after a crash.
    let present = newer.present();
    drop((old, newer, newest));
    Store::abandon(store);
    let store = fixture.open();
    let newer = store.open_layer(ramps[1].table.diff_id()).expect("registered");
    assert!(newer.present().difference(&present).is_empty());
    check(&newer, &ramps[1]);
}

#[test]
fn what_is_open_or_pinned_stays_and_the_store_says_that_it_is_full() {
    let mut fixture = Fixture::new();
    fixture.config.budget_bytes = Some(6 << 20);
    let store = fixture.open();
    let (held, pinned, third) = (full_size(1), full_size(2), full_size(3));
    let held_layer = fill(&store, &held);
    let guard = held_layer.hold();
    let pinned_layer = fill(&store, &pinned);
    store.put_image(&image(9, &[&pinned])).expect("puts");
    store.pin(Digest([9; 32]), "preload").expect("pins");
    let layer = store.layer(&third.table).expect("a layer");
    let filling = layer.hold();
    let mut put_chunks = 0;
    let error = loop {
        match layer.put(ChunkNo(put_chunks), &third.verified(put_chunks)) {
            Ok(()) => put_chunks += 1,
            Err(error) => break error,
        }
    };
    assert!(error.is_full(), "{error}");
    assert!(matches!(error, StoreError::Full { needed_bytes: 65536, cause: FullCause::Budget { .. } }), "{error:?}");
    assert!(held_layer.is_complete() && pinned_layer.is_complete());
    assert_eq!(layer.present().chunk_count(), u64::from(put_chunks));
    assert_eq!(store.make_room(1).expect("nothing"), 0);
    // Unpinned, it may go.
    store.unpin(Digest([9; 32]), "preload").expect("unpins");
    put(&layer, &third, put_chunks);
    assert!(!pinned_layer.is_complete());
    // So may the other when it is let go.
    drop(guard);
    assert!(store.make_room(u64::MAX).expect("evicts") > 0);
    assert!(held_layer.present().is_empty() && pinned_layer.present().is_empty());
    assert_eq!(held_layer.allocated_bytes().expect("asks"), 0, "an emptied layer gives everything back");
    check(&filling, &third);
}

#[test]
fn last_copies_go_last() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let (rare, common) = (full_size(1), full_size(2));
    store.shared.clock.freeze(1);
    let rare_layer = fill(&store, &rare);
    store.shared.clock.freeze(2);
    let common_layer = fill(&store, &common);
    let rare_id = rare.table.diff_id();
    store.set_last_copy_hint(move |diff_id| diff_id == rare_id);
    store.make_room(2 << 20).expect("evicts");
    assert!(rare_layer.is_complete() && !common_layer.is_complete());
    store.make_room(u64::MAX).expect("evicts");
    assert!(rare_layer.present().is_empty() && common_layer.present().is_empty());
}

#[test]
fn last_uses_survive_a_close() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let ramp = full_size(1);
    store.shared.clock.freeze(77);
    let layer = fill(&store, &ramp);
    store.shared.clock.freeze(99);
    layer.read_at(20 * 65536, &mut [0; 10]).expect("reads");
    drop(layer);
    drop(store);
    let store = fixture.open();
    let layer = store.open_layer(ramp.table.diff_id()).expect("registered");
    let uses: Vec<u32> = (0..layer.group_count()).map(|group| layer.group_last_use(group)).collect();
    assert_eq!(uses, vec![77, 99, 77]);
}

#[test]
fn readers_never_see_the_zeros_of_an_eviction() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let ramp = Ramp::unique(1, &[16384; 64]);
    let layer = fill(&store, &ramp);
    let all: Vec<u8> = (0..64).flat_map(|chunk| ramp.bytes(chunk)).collect();
    let stop = AtomicBool::new(false);
    let (mut evictions, deadline) = (0, Instant::now() + Duration::from_secs(60));
    std::thread::scope(|scope| {
        for reader in 0..3_u64 {
            let (layer, ramp, all, stop) = (&layer, &ramp, &all, &stop);
            scope.spawn(move || {
                let mut at = reader;
                let mut buf = vec![0; 40_000];
                while !stop.load(Ordering::Relaxed) {
                    at = (at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1)) % (64 * 16384 - 40_000);
                    if let Read::Hit(len) = layer.read_at(at, &mut buf).expect("reads") {
                        let right = &all[at as usize..at as usize + len];
                        assert!(buf[..len] == *right, "wrong bytes at {at}");
                    }
                    let chunk = (at % 64) as u32;
                    if let Some(bytes) = layer.read_chunk(ChunkNo(chunk)).expect("reads") {
                        assert_eq!(*bytes, ramp.bytes(chunk));
                    }
                }
            });
        }
        scope.spawn(|| {
            let mut chunk = 0;
            while !stop.load(Ordering::Relaxed) {
                layer.put(ChunkNo(chunk), &ramp.verified(chunk)).expect("puts");
                chunk = (chunk + 1) % 64;
            }
        });
        while evictions < 300 && Instant::now() < deadline {
            if store.make_room(1 + (evictions % 5) * 200_000).expect("evicts") > 0 {
                evictions += 1;
            }
            if evictions % 50 == 49 {
                store.sync().expect("syncs");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(evictions >= 300, "only {evictions} evictions");
    assert_eq!(store.counters().damaged_chunks.get(), 0);
    check(&layer, &ramp);
}

#[test]
fn a_missing_or_short_layer_file_is_an_empty_layer() {
    for (short, reason) in [(true, "bytes"), (false, "missing")] {
        let fixture = Fixture::new();
        let store = fixture.open();
        let ramp = full_size(1);
        let path = fill(&store, &ramp).path().to_path_buf();
        drop(store);
        if short {
            fs::File::options().write(true).open(&path).and_then(|file| file.set_len(100_000)).expect("cuts");
        } else {
            fs::remove_file(&path).expect("removes");
        }
        let store = fixture.open();
        let cleared = &store.recovery().cleared;
        assert!(cleared.len() == 1 && cleared[0].1.contains(reason), "{cleared:?}");
        let layer = store.open_layer(ramp.table.diff_id()).expect("registered");
        assert!(layer.present().is_empty());
        put(&layer, &ramp, 3);
        check(&layer, &ramp);
        // Cleared for good, not only in memory.
        drop(layer);
        Store::abandon(store);
        let store = fixture.open();
        assert!(store.recovery().cleared.is_empty());
        assert!(store.open_layer(ramp.table.diff_id()).expect("registered").present().is_empty());
    }
}

#[test]
fn damage_to_what_describes_a_layer_costs_that_layer_only() {
    type Damage = fn(&Fixture, &Store, &Ramp);
    let cases: [(&str, Damage); 3] = [
        ("record is damaged", |_, store, ramp| {
            store.shared.catalogue.damage_layer(ramp.table.diff_id(), b"{\"number\":");
        }),
        ("chunk table", |fixture, _, ramp| {
            let path = fixture.config.dir.join("artifacts").join(ramp.table.id().hex());
            fs::remove_file(path).expect("removes");
        }),
        ("damaged on disk", |fixture, _, ramp| {
            let path = fixture.config.dir.join("artifacts").join(ramp.table.id().hex());
            let file = fs::File::options().write(true).open(path).expect("opens");
            file.write_all_at(b"x", 70).expect("damages");
        }),
    ];
    for (reason, damage) in cases {
        let fixture = Fixture::new();
        let store = fixture.open();
        let (bad, good) = (full_size(1), full_size(2));
        let path = fill(&store, &bad).path().to_path_buf();
        fill(&store, &good);
        store.sync().expect("syncs");
        damage(&fixture, &store, &bad);
        drop(store);
        let store = fixture.open();
        let dropped = &store.recovery().dropped;
        assert!(dropped.len() == 1 && dropped[0].1.contains(reason), "{reason}: {dropped:?}");
        assert!(store.recovery().orphan_layer_files == 1 && !path.exists());
        assert!(store.open_layer(bad.table.diff_id()).is_none());
        check(&store.open_layer(good.table.diff_id()).expect("unharmed"), &good);
        // Nothing of the old life comes back when it is registered again.
        let again = store.layer(&bad.table).expect("registers");
        assert!(again.present().is_empty());
        assert!(store.local_runs(&again).expect("looks").is_empty());
    }
}

#[test]
fn damaged_presence_is_no_presence() {
    let pages: [(u32, &[u8]); 3] = [(0, &[1, 2, 3]), (7, &[0; 512]), (0, &[0xFF; 512])];
    for (page, bytes) in pages {
        let fixture = Fixture::new();
        let store = fixture.open();
        let ramp = full_size(1);
        let number = fill(&store, &ramp).number();
        store.sync().expect("syncs");
        store.shared.catalogue.damage_presence(number, page, bytes);
        drop(store);
        let store = fixture.open();
        assert_eq!(store.recovery().cleared.len(), 1);
        assert!(store.open_layer(ramp.table.diff_id()).expect("registered").present().is_empty());
    }
}

#[test]
fn a_damaged_catalogue_is_a_clear_error() {
    let fixture = Fixture::new();
    let store = fixture.open();
    fill(&store, &full_size(1));
    drop(store);
    let catalogue = fixture.config.dir.join("catalogue");
    for entry in fs::read_dir(&catalogue).expect("lists") {
        let path = entry.expect("an entry").path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("MANIFEST")) {
            fs::write(path, b"rubbish").expect("writes");
        }
    }
    match Store::open(fixture.config.clone()) {
        Err(error @ StoreError::Catalogue { .. }) => assert!(error.to_string().contains("remove the store's folder")),
        other => panic!("{other:?}"),
    }
}

/// Leaves the store as after a power cut in the midst of its last record.
fn cut_log(fixture: &Fixture, store: Arc<Store>) {
    Store::abandon(store);
    let logs =
        fs::read_dir(fixture.config.dir.join("catalogue")).expect("lists").map(|entry| entry.expect("an entry").path());
    let log = logs.filter(|path| path.extension().is_some_and(|extension| extension == "log")).max().expect("a log");
    let file = fs::File::options().read(true).write(true).open(log).expect("opens");
    let end = file.metadata().expect("a file").len();
    file.write_all_at(&[0; 4], end - 4).expect("damages");
}

#[test]
fn a_log_that_a_power_cut_has_torn_is_believed_up_to_there() {
    let (kept, lost) = (full_size(1), full_size(2));
    let fixture = Fixture::new();
    let store = fixture.open();
    fill(&store, &kept);
    store.sync().expect("syncs");
    store.layer(&lost.table).expect("registers");
    cut_log(&fixture, store);
    let store = fixture.open();
    let report = store.recovery();
    assert!(report.cut && report.unclean && report.cleared.is_empty(), "{report:?}");
    check(&store.open_layer(kept.table.diff_id()).expect("it was synced"), &kept);
}

#[test]
fn chunks_that_were_evicted_do_not_come_back_with_a_torn_log() {
    let ramp = full_size(1);
    let fixture = Fixture::new();
    let store = fixture.open();
    let path = fill(&store, &ramp).path().to_path_buf();
    store.sync().expect("syncs");
    store.layer(&full_size(2).table).expect("registers");
    // As if the record of the eviction was behind the damage.
    let file = fs::File::options().write(true).open(path).expect("opens");
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, 65_536, 65_536).expect("punches");
    cut_log(&fixture, store);
    let store = fixture.open();
    assert_eq!(store.recovery().cleared.len(), 1, "{:?}", store.recovery());
    assert!(store.open_layer(ramp.table.diff_id()).expect("registered").present().is_empty());
}

#[test]
fn orphans_go_and_foreign_files_stay() {
    let fixture = Fixture::new();
    drop(fixture.open());
    let dir = &fixture.config.dir;
    fs::write(dir.join("layers").join(DiffId([9; 32]).hex()), b"orphan").expect("writes");
    fs::write(dir.join("layers/notes.txt"), b"mine").expect("writes");
    fs::write(dir.join("artifacts/.tmp-1-1"), b"half").expect("writes");
    let store = fixture.open();
    let report = store.recovery();
    assert_eq!((report.orphan_layer_files, report.temporary_files), (1, 1));
    assert_eq!(report.foreign_files, vec!["layers/notes.txt".to_owned()]);
    assert!(dir.join("layers/notes.txt").exists() && !dir.join("artifacts/.tmp-1-1").exists());
}

#[test]
fn artifacts_are_what_their_names_say_or_gone() {
    let fixture = Fixture::new();
    let store = fixture.open();
    for len in [0, 10, 200_000] {
        let (id, bytes) = Verified::named(Bytes::from(vec![7; len]));
        assert_eq!(store.artifact(id).expect("looks"), None);
        assert_eq!(store.put_artifact(&bytes).expect("puts"), id);
        assert_eq!(store.put_artifact(&bytes).expect("puts again"), id);
        assert_eq!(store.artifact(id).expect("reads").as_ref(), Some(&*bytes));
        if len == 0 {
            continue;
        }
        let file = fs::File::options().write(true).open(store.artifact_path(id)).expect("opens");
        file.write_all_at(b"x", 3).expect("damages");
        assert!(matches!(store.artifact(id), Err(StoreError::DamagedArtifact { .. })));
        assert_eq!(store.artifact(id).expect("looks"), None);
        // A put heals, also before anybody has noticed.
        store.put_artifact(&bytes).expect("puts");
        let file = fs::File::options().write(true).open(store.artifact_path(id)).expect("opens");
        file.write_all_at(b"x", 3).expect("damages");
        store.put_artifact(&bytes).expect("heals");
        assert_eq!(store.artifact(id).expect("reads"), Some(bytes.into_inner()));
    }
    assert_eq!(store.usage().expect("asks").artifact_bytes, 200_010);
    assert_eq!(store.remove_unused_artifacts(&|_| false).expect("removes"), 200_010);
    assert_eq!(store.usage().expect("asks").used_bytes, 0);
}

#[test]
fn images_name_what_they_need_and_what_nobody_needs_any_more() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let (one, two, three) = (full_size(1), full_size(2), full_size(3));
    let (a, b) = (image(1, &[&one, &two]), image(2, &[&two, &three]));
    fill(&store, &one);
    store.put_image(&a).expect("puts");
    store.put_image(&b).expect("puts");
    store.pin(a.manifest, "x").expect("pins");
    assert!(matches!(store.pin(a.manifest, ""), Err(StoreError::Config { .. })));
    drop(store);
    let store = fixture.open();
    assert_eq!(store.images().expect("lists"), vec![a.clone(), b.clone()]);
    assert_eq!(store.image(a.manifest).expect("reads"), Some(a.clone()));
    assert_eq!(store.image(Digest([7; 32])).expect("reads"), None);
    assert_eq!(store.remove_image(a.manifest).expect("removes"), vec![one.table.diff_id()]);
    assert!(store.pins().expect("lists").is_empty());
    assert!(store.remove_layer(one.table.diff_id()).expect("removes"));
    assert!(!store.remove_layer(one.table.diff_id()).expect("is gone"));
    store.shared.catalogue.put_image(b.manifest, b"{}").expect("damages");
    assert!(matches!(store.image(b.manifest), Err(StoreError::Damaged { .. })));
    assert!(store.images().expect("lists the others").is_empty());
    assert!(store.remove_unused_artifacts(&|_| false).is_err(), "an unreadable image may need anything");
    store.remove_image(b.manifest).expect("a damaged record can be removed");
    assert!(store.remove_unused_artifacts(&|_| false).expect("removes") > 0);
}

#[test]
fn layers_of_an_image_are_registered_together_or_not_at_all() {
    let fixture = Fixture::new();
    let (known, new) = (full_size(1), full_size(2));
    let other = Ramp::unique(2, &[32768; 80]);
    let tables = |ramps: &[&Ramp]| ramps.iter().map(|ramp| ramp.table.clone()).collect::<Vec<_>>();
    {
        let store = fixture.open();
        fill(&store, &known);
        let refused = store.layers_of(&tables(&[&known, &new, &other]));
        assert!(matches!(refused, Err(StoreError::LayerInUse { diff_id }) if diff_id == new.table.diff_id()));
        assert_eq!(store.layers().len(), 1, "one layer cannot have two tables");
        let layers = store.layers_of(&tables(&[&new, &known, &new])).expect("registers");
        assert!(Arc::ptr_eq(&layers[0], &layers[2]) && !Arc::ptr_eq(&layers[0], &layers[1]));
        check(&layers[1], &known);
        put(&layers[0], &new, 3);
    }
    let store = fixture.open();
    assert_eq!(store.recovery().layers, 2);
    check(&store.layer(&new.table).expect("is there"), &new);
    assert!(store.layers_of(&[]).expect("nothing").is_empty());
}

#[test]
fn a_layer_with_another_table_begins_anew_unless_it_is_held() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let (old, new) = (Ramp::unique(1, &[65536; 20]), Ramp::unique(1, &[32768; 40]));
    let layer = fill(&store, &old);
    let held = layer.hold();
    assert!(matches!(store.layer(&new.table), Err(StoreError::LayerInUse { .. })));
    drop(held);
    let again = store.layer(&new.table).expect("registers");
    assert!(again.present().is_empty() && layer.present().is_empty());
    // The old handle is harmless: it sees nothing, and what is put through it reaches no catalogue.
    assert!(matches!(layer.read_at(0, &mut [0; 10]).expect("reads"), Read::Miss(_)));
    put(&layer, &old, 0);
    layer.sync().expect("nothing to do");
    put(&again, &new, 5);
    drop((layer, again));
    drop(store);
    let store = fixture.open();
    let layer = store.open_layer(new.table.diff_id()).expect("registered");
    assert_eq!(layer.present(), Runs::one(5..6));
    check(&layer, &new);
}

#[test]
fn a_record_that_a_failed_removal_left_does_not_outlive_its_bytes() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let ramp = full_size(1);
    let layer = fill(&store, &ramp);
    layer.sync().expect("syncs");
    // What `remove_layer` does before the catalogue fails.
    layer.retire().expect("nobody holds it");
    store.shared.layers.write().remove(&layer);
    drop(layer);
    let again = store.layer(&ramp.table).expect("registers");
    assert!(again.present().is_empty());
    drop(again);
    Store::abandon(store);
    let store = fixture.open();
    let layer = store.open_layer(ramp.table.diff_id()).expect("registered");
    assert!(layer.present().is_empty());
}

#[test]
fn an_unreadable_pinned_image_does_not_stop_eviction() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let ramp = full_size(1);
    let layer = fill(&store, &ramp);
    store.shared.catalogue.put_image(Digest([4; 32]), b"rubbish").expect("puts");
    store.pin(Digest([4; 32]), "x").expect("pins");
    assert!(store.make_room(1).expect("evicts") > 0);
    check(&layer, &ramp);
}

#[test]
fn the_page_cache_can_be_left() {
    for way in [DropBehind::Off, DropBehind::Written, DropBehind::WrittenAndRead] {
        let mut fixture = Fixture::new();
        fixture.config.drop_behind = way;
        let store = fixture.open();
        let ramp = full_size(1);
        let layer = fill(&store, &ramp);
        store.sync().expect("syncs");
        check(&layer, &ramp);
        layer.drop_cached(0..u64::MAX / 2).expect("drops");
        layer.drop_cached(5..5).expect("nothing");
        check(&layer, &ramp);
    }
}

/// EROFS reads whole blocks, and a loop device ends with the last whole one.
#[test]
fn a_layer_file_ends_with_a_block_also_where_the_stream_does_not() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let ramp = Ramp::unique(1, &[512, 65536, 1000]);
    let layer = store.layer(&ramp.table).expect("a layer");
    put(&layer, &ramp, 2);
    let path = layer.path().to_path_buf();
    let len_bytes = || fs::metadata(&path).expect("there").len();
    assert_eq!(len_bytes(), 512 + 65536 + 1024);
    layer.sync().expect("syncs");
    drop(layer);
    drop(store);
    // As a store of before would have it.
    fs::File::options().write(true).open(&path).and_then(|file| file.set_len(512 + 65536 + 1000)).expect("cuts");
    let store = fixture.open();
    assert_eq!(len_bytes(), 512 + 65536 + 1024);
    assert_eq!(store.open_layer(ramp.table.diff_id()).expect("registered").present(), Runs::one(2..3));
}

/// Peers ask for one window after the other of the same artifact.
#[test]
fn a_large_artifact_is_hashed_once_and_again_when_its_file_was_replaced() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let (id, bytes) = Verified::named(vec![7; 1 << 20].into());
    store.put_artifact(&bytes).expect("written");
    for _ in 0..3 {
        assert_eq!(store.artifact_checked_lately(id).expect("read").expect("there"), *bytes);
    }
    assert_eq!(store.counters().artifacts_not_hashed.get(), 2);
    fs::remove_file(store.artifact_path(id)).expect("removed");
    fs::write(store.artifact_path(id), vec![8; 1 << 20]).expect("written");
    assert!(matches!(store.artifact_checked_lately(id), Err(StoreError::DamagedArtifact { .. })));
    assert!(store.artifact_checked_lately(id).expect("read").is_none());
}
