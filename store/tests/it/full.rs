//! A full disk: a real small filesystem, ext4 on a loop device and tmpfs, in a mount namespace that goes with the test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hermes_image::ids::{ChunkNo, Digest};
use hermes_store::{FullCause, ImageRecord, Layer, Read, Store, StoreConfig, StoreError};

use crate::harness::{mount, this_test_alone};
use crate::ramp::Ramp;

/// Size of the filesystem in MiB: room for RocksDB (a few MiB) and some of the chunks.
const FILESYSTEM_MIB: u64 = 48;
/// 16 MiB in chunks of 64 KiB.
const CHUNKS: u32 = 256;
/// What a condition may take that RocksDB brings about in the background (it looks for free space every 5 s).
const DEADLINE: Duration = Duration::from_secs(60);

fn ramp(name: u32) -> Ramp {
    Ramp::unique(name, &[65536; CHUNKS as usize])
}

fn open(dir: &Path, floor_bytes: u64) -> Arc<Store> {
    let mut config = StoreConfig::new(dir.join("store"));
    config.free_floor_bytes = floor_bytes;
    config.sync_interval_ms = 50;
    Store::open(config).expect("opens")
}

/// Puts until something fails; the failure.
fn put_all(layer: &Layer, ramp: &Ramp) -> Option<StoreError> {
    (0..CHUNKS).find_map(|chunk| layer.put(ChunkNo(chunk), &ramp.verified(chunk)).err())
}

fn check(layer: &Layer, ramp: &Ramp) -> u64 {
    let present = layer.present();
    ramp.check(&present, |offset, buf| {
        assert_eq!(layer.read_at(offset, buf).expect("reads"), Read::Hit(buf.len()));
        true
    });
    present.chunk_count()
}

/// With a floor, the store stops in time: everything else goes on as ever.
fn stops_at_the_floor(dir: &Path) {
    let stat = rustix::fs::statvfs(dir).expect("asks");
    // The catalogue (6 MiB), the first layer (16 MiB) and a part of the second fit above it.
    let store = open(dir, stat.f_bavail * stat.f_frsize - (26 << 20));
    let (first, second, third) = (ramp(1), ramp(2), ramp(3));
    let held = store.layer(&first.table).expect("a layer").hold();
    assert!(put_all(&held, &first).is_none(), "{:?}", store.usage());
    let other = store.layer(&second.table).expect("a layer");
    let other_held = other.hold();
    let error = put_all(&other, &second).expect("does not fit");
    assert!(matches!(error, StoreError::Full { cause: FullCause::Floor { .. }, .. }), "{error}");
    store.sync().expect("the catalogue has its room");
    assert_eq!(check(&held, &first), u64::from(CHUNKS));
    assert!(check(&other, &second) > 0);
    // Let go, it makes room for the next, and the held one is unharmed.
    drop(other_held);
    let layer = store.layer(&third.table).expect("a layer");
    assert!(put_all(&layer, &third).is_none(), "evicts");
    assert_eq!(check(&held, &first), u64::from(CHUNKS));
    assert!(check(&other, &second) < u64::from(CHUNKS));
    check(&layer, &third);
    drop(held);
    for layer in store.layers() {
        let diff_id = layer.diff_id();
        drop(layer);
        store.remove_layer(diff_id).expect("removes");
    }
}

/// Without a floor, and with somebody else filling the disk, writes really fail. Nothing present is lost or wrong, and
/// when there is room again the store goes on by itself.
fn survives_enospc(dir: &Path) {
    let store = open(dir, 0);
    let (first, second) = (ramp(4), ramp(5));
    let held = store.layer(&first.table).expect("a layer").hold();
    for chunk in 0..100 {
        held.put(ChunkNo(chunk), &first.verified(chunk)).expect("puts");
    }
    store.sync().expect("syncs");
    let ballast = fill_up(dir);
    let error = put_all(&held, &first).expect("does not fit");
    assert!(matches!(error, StoreError::Full { cause: FullCause::Filesystem, .. }), "{error}");
    let before = check(&held, &first);
    assert!(before >= 100);
    // A layer that is being staged stops, too, and gives back what it has taken.
    let mut staged = store.stage_layer().expect("begins");
    let error = (0..CHUNKS).find_map(|chunk| staged.append(&second.verified(chunk)).err()).expect("does not fit");
    assert!(matches!(error, StoreError::Full { cause: FullCause::Filesystem, .. }), "{error}");
    let used_bytes = store.usage().expect("usage").used_bytes;
    let staged_bytes = staged.len_bytes();
    drop(staged);
    assert_eq!(store.usage().expect("usage").used_bytes, used_bytes - staged_bytes);
    // Nor is there room for the catalogue, once what it has allocated ahead is used up. Readers do not notice.
    let error = (0..1000).find_map(|no| store.put_image(&image(no)).err()).expect("does not fit");
    assert_eq!(error.kind(), "catalogue", "{error}");
    assert_eq!(store.make_room(1).expect("all is held"), 0);
    assert_eq!(check(&held, &first), before);
    // Without a floor the sync may fail too. What is present stays so for readers, and is synced later.
    let _ = store.sync();
    assert_eq!(check(&held, &first), before);
    fs::remove_file(ballast).expect("gives room");
    let deadline = Instant::now() + DEADLINE;
    while let Err(error) = store.put_image(&image(0)).and_then(|()| store.sync()) {
        assert!(Instant::now() < deadline, "the catalogue does not recover: {error:?}");
        std::thread::yield_now();
    }
    assert!(put_all(&held, &first).is_none(), "goes on");
    let other = store.layer(&second.table).expect("a layer");
    other.put(ChunkNo(9), &second.verified(9)).expect("puts");
    drop((held, other));
    drop(store);
    let store = open(dir, 0);
    let report = store.recovery();
    assert!(!report.unclean && report.dropped.is_empty() && report.cleared.is_empty(), "{report:?}");
    for (ramp, chunks) in [(first, u64::from(CHUNKS)), (second, 1)] {
        let layer = store.open_layer(ramp.table.diff_id()).expect("registered");
        assert_eq!(check(&layer, &ramp), chunks);
        assert!(layer.verify_present().expect("verifies").is_empty());
    }
}

/// A record of 64 KiB.
fn image(no: u32) -> ImageRecord {
    let mut manifest = [0; 32];
    manifest[..4].copy_from_slice(&no.to_be_bytes());
    ImageRecord {
        manifest: Digest(manifest),
        reference: "x".repeat(65536),
        platform: "linux/amd64".to_owned(),
        layers: Vec::new(),
        tree: None,
        last_use_seconds: 0,
        access: hermes_image::access::Access::Public,
        proven: true,
    }
}

/// Takes all the room that is left, down to the last block.
fn fill_up(dir: &Path) -> PathBuf {
    use std::io::Write;
    let path = dir.join("ballast");
    let mut file = File::create(&path).expect("makes a file");
    for len in [1 << 20, 1 << 14, 1 << 12, 1] {
        while file.write_all(&vec![1; len]).and_then(|()| file.sync_data()).is_ok() {}
    }
    path
}

/// The test proper, on a filesystem of its own. Does nothing unless it was told which.
#[test]
fn on_a_small_filesystem() {
    let (Ok(kind), Ok(dir)) = (std::env::var("HERMES_STORE_FILESYSTEM"), std::env::var("HERMES_STORE_DIR")) else {
        return;
    };
    let dir = Path::new(&dir);
    let target = dir.join("small");
    fs::create_dir(&target).expect("a mount point");
    if kind == "tmpfs" {
        mount(&["-t", "tmpfs", "-o", &format!("size={FILESYSTEM_MIB}m"), "tmpfs"], &target);
    } else {
        let image = dir.join("image");
        File::create(&image).and_then(|file| file.set_len(FILESYSTEM_MIB << 20)).expect("an image file");
        let image = image.to_str().expect("a readable path");
        let made = std::process::Command::new("mkfs.ext4").args(["-q", "-F", image]).status();
        assert!(made.expect("mkfs.ext4 runs").success());
        mount(&["-o", "loop", image], &target);
    }
    stops_at_the_floor(&target);
    survives_enospc(&target);
}

fn on(kind: &str) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().to_str().expect("a readable path");
    let settings = [("HERMES_STORE_FILESYSTEM", kind), ("HERMES_STORE_DIR", path)];
    let output = this_test_alone("full::on_a_small_filesystem", &settings).output().expect("unshare runs (needs root)");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
}

#[test]
fn a_full_ext4_harms_nothing() {
    on("ext4");
}

#[test]
fn a_full_tmpfs_harms_nothing() {
    on("tmpfs");
}
