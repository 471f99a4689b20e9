//! The file system below the store.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate, statfs};

use super::Finding;

/// Free space below which an image may not fit, in bytes.
const FREE_MIN_BYTES: u64 = 10 << 30;
/// What is written to have a hole punched into it, in bytes: several blocks of any file system.
const HOLE_LEN_BYTES: usize = 1 << 20;

/// What a file system is called, and whether a store can be on it. Numbers from the kernel's `magic.h` and statfs(2).
fn kind(magic: u64) -> (&'static str, Option<&'static str>) {
    match magic {
        0xef53 => ("ext4", None),
        0x5846_5342 => ("xfs", None),
        0x9123_683e => ("btrfs", None),
        0x2fc1_2fc1 => ("zfs", None),
        0x794c_7630 => ("overlayfs", Some("a container's own files; mount a folder of the host there")),
        0x0102_1994 | 0x8584_58f6 => ("tmpfs", Some("memory, and gone after a restart; give it a disk")),
        0x6969 => ("NFS", Some("holes and locks are not reliable there; give it a local disk")),
        0xff53_4d42 | 0xfe53_4d42 => ("SMB", Some("give it a local disk")),
        0x6573_5546 => ("FUSE", Some("give it a local disk")),
        _ => ("another file system", None),
    }
}

/// Type of file system and free space at `folder`.
pub(super) fn folder(folder: &Path) -> Vec<Finding> {
    let found = match statfs(folder) {
        Ok(found) => found,
        Err(error) => return vec![Finding::fail("store", format!("{}: {error}", folder.display()), "")],
    };
    let (name, wrong) = kind(found.f_type as u64);
    let seen = format!("{} is on {name}", folder.display());
    let place = match wrong {
        None => Finding::ok("store", seen),
        Some(next) => Finding::fail("store", seen, next),
    };
    let block = u64::try_from(found.f_bsize).unwrap_or(0);
    let free = found.f_bavail.saturating_mul(block);
    let seen = format!("{:.1} GB free of {:.1}", free as f64 / 1e9, found.f_blocks.saturating_mul(block) as f64 / 1e9);
    let space = match free < FREE_MIN_BYTES {
        true => Finding::warn("space", seen, "free some, or give the node a --budget that fits"),
        false => Finding::ok("space", seen),
    };
    vec![place, space]
}

/// Whether a file's space can be given back piece by piece, which is how the store evicts.
pub(super) fn punch_hole(scratch: &Path) -> Finding {
    const WHAT: &str = "holes";
    let tried = || -> std::io::Result<bool> {
        let mut file = File::create(scratch.join("hole"))?;
        // No zeros, which some file systems do not store.
        file.write_all(&vec![0xa5; HOLE_LEN_BYTES])?;
        file.sync_all()?;
        let before = file.metadata()?.blocks();
        fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, HOLE_LEN_BYTES as u64)?;
        file.sync_all()?;
        Ok(file.metadata()?.blocks() < before)
    };
    let next = "put the state folder on ext4 or xfs";
    match tried() {
        Ok(true) => Finding::ok(WHAT, "space of files can be given back"),
        Ok(false) => Finding::warn(WHAT, "punching a hole gives no space back", next),
        Err(error) => Finding::fail(WHAT, format!("a hole cannot be punched: {error}"), next),
    }
}
