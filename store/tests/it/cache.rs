//! One cached copy: what the store has written, or has answered a read with, leaves the page cache.

use std::path::Path;
use std::process::Command;

use hermes_image::ids::ChunkNo;
use hermes_store::{DropBehind, Read, Store, StoreConfig};

use crate::ramp::Ramp;

/// 4 MiB.
const CHUNKS: u32 = 64;

/// Bytes of a file in the page cache, by fincore(1) of util-linux.
fn cached_bytes(path: &Path) -> u64 {
    let output = Command::new("fincore").args(["--bytes", "--noheadings", "--output", "RES"]).arg(path).output();
    let output = output.expect("fincore runs");
    String::from_utf8_lossy(&output.stdout).trim().parse().expect("a number")
}

#[test]
fn the_stores_copy_leaves_the_page_cache() {
    let cases =
        [(DropBehind::Off, true, true), (DropBehind::Written, false, true), (DropBehind::WrittenAndRead, false, false)];
    for (drop_behind, kept_when_written, kept_when_read) in cases {
        // Beside the build: on tmpfs the page cache is the disk.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let mut config = StoreConfig::new(dir.path().join("store"));
        config.drop_behind = drop_behind;
        let store = Store::open(config).expect("opens");
        let ramp = Ramp::unique(1, &[65536; CHUNKS as usize]);
        let layer = store.layer(&ramp.table).expect("a layer");
        for chunk in 0..CHUNKS {
            layer.put(ChunkNo(chunk), &ramp.verified(chunk)).expect("puts");
        }
        store.sync().expect("syncs");
        let whole = u64::from(CHUNKS) * 65536;
        let expected = |kept| if kept { whole } else { 0 };
        assert_eq!(cached_bytes(layer.path()), expected(kept_when_written), "{drop_behind:?}, written");
        let mut buf = vec![0; 65536];
        for chunk in 0..u64::from(CHUNKS) {
            assert_eq!(layer.read_at(chunk * 65536, &mut buf).expect("reads"), Read::Hit(65536));
        }
        assert_eq!(cached_bytes(layer.path()), expected(kept_when_read), "{drop_behind:?}, read");
        layer.drop_cached(0..whole).expect("drops");
        assert_eq!(cached_bytes(layer.path()), 0);
    }
}
