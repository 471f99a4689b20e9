//! The EROFS reader.

use std::collections::HashSet;

use hermes_image::erofs::{FileType, Image, Nid, RangeSource, ReadError};

/// Most inodes that are asked about in one image. A hostile image of 32 KiB can name every one of its 1,000 inodes in
/// many directories, which would only slow the fuzzer down.
const QUESTIONS_MAX: usize = 512;
/// Where a superblock says whether it has a checksum: the superblock's place, its field, its bit.
const CHECKSUM_FLAG_AT: usize = 1024 + 8;

/// Any bytes are an image or an error. Whatever the image says, walks end, and every answer lies within the image or
/// within the device that it names.
pub fn erofs_reader(data: &[u8]) {
    match Image::open(data) {
        Ok(image) => walk(&image),
        // Without its flag the checksum is not looked at, as with images of other writers.
        Err(ReadError::Checksum { .. }) => {
            let mut bytes = data.to_vec();
            bytes[CHECKSUM_FLAG_AT] &= !1;
            if let Ok(image) = Image::open(bytes.as_slice()) {
                walk(&image);
            }
        }
        Err(_) => {}
    }
}

fn walk(image: &Image<&[u8]>) {
    let devices: Vec<_> = image.devices().collect();
    let _ = (image.inode_count(), image.has_any_xattr());
    let mut waiting = vec![image.root()];
    let mut seen = HashSet::new();
    while let Some(nid) = waiting.pop() {
        if seen.len() == QUESTIONS_MAX {
            return;
        }
        if !seen.insert(nid) {
            continue;
        }
        ask(image, nid, &devices);
        entries(image, nid, &mut waiting);
    }
}

/// Everything but the entries of a directory.
fn ask(image: &Image<&[u8]>, nid: Nid, devices: &[hermes_image::erofs::DeviceSlot]) {
    let len = image.bytes().len();
    let Ok(attributes) = image.stat(nid) else { return };
    assert!(attributes.permissions <= 0o7777 && attributes.ino == nid.0);
    if let Ok(target) = image.readlink(nid) {
        // Blocks and tail each lie in the image; a hostile one lets them overlap.
        assert!(attributes.kind == FileType::Symlink && target.len() as u64 <= len as u64 + image.block_len_bytes());
    }
    let mut sum = 0;
    for entry in image.xattrs(nid).into_iter().flatten().map_while(Result::ok) {
        sum += 1;
        assert!(entry.name.len() <= 255 + 32 && entry.value.len() <= len);
        if sum <= 16 {
            assert!(image.xattr(nid, &entry.name.to_vec()).is_ok());
        }
    }
    // An inode has at most 65,535 units of four bytes for attributes, each of which is one attribute at most.
    assert!(sum <= 65_535 + 256);
    for range in [0..u64::MAX, 0..1, attributes.size_bytes / 2..attributes.size_bytes, u64::MAX - 1..u64::MAX] {
        let Ok(extents) = image.extents(nid, range.clone()) else { continue };
        let (mut at, end) = (range.start, range.end.min(attributes.size_bytes));
        let mut count = 0;
        for extent in extents {
            let Ok(extent) = extent else { break };
            assert!(extent.file_offset == at && extent.len_bytes > 0 && at + extent.len_bytes <= end);
            at += extent.len_bytes;
            count += 1;
            match extent.source {
                RangeSource::Hole => {}
                RangeSource::Image { offset } => assert!(offset + extent.len_bytes <= len as u64),
                RangeSource::Device { index, offset } => {
                    let device_len = u64::from(devices[usize::from(index)].blocks) * image.block_len_bytes();
                    assert!(offset.0 + extent.len_bytes <= device_len);
                }
            }
        }
        // Each comes from an entry of four bytes or more.
        assert!(count <= len / 4 + 2);
    }
}

fn entries(image: &Image<&[u8]>, nid: Nid, waiting: &mut Vec<Nid>) {
    let Ok(all) = image.readdir(nid, 0) else { return };
    let mut count = 0;
    let mut offset = 0;
    for entry in all {
        let Ok(entry) = entry else { break };
        assert!(entry.next_offset > offset, "readdir does not go on");
        offset = entry.next_offset;
        count += 1;
        // An entry takes 12 bytes.
        assert!(count <= image.bytes().len() / 12, "more entries than fit the image");
        if count <= 64 {
            let _ = image.lookup(nid, entry.name);
            if !matches!(entry.name, b"." | b"..") && waiting.len() < QUESTIONS_MAX {
                waiting.push(entry.nid);
            }
        }
    }
    // Offsets that no entry has told.
    for offset in [1, 13, offset, u64::MAX] {
        let _ = image.readdir(nid, offset).map(|rest| rest.take(4).count());
    }
    let _ = image.lookup(nid, b"no such name");
}
