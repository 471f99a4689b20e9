//! Tables of contents -> tree -> EROFS image -> reader: what goes in comes out.

use bytes::Bytes;
use hermes_image::erofs::{self, Image, Nid, RangeSource};
use hermes_image::index::toc::{NodeKind, Toc};
use hermes_image::merge;
use hermes_image::tree::{ExtentSource, Inode, InodeIndex, InodeKind, Tree};

use crate::parts::{numbers, split};

/// Most bytes that the sparse files of an input may say they have. An EROFS file has up to 8 bytes of index for each 512
/// of its size, holes included, so a few sparse extents can ask for an image of up to the writer's own limit of
/// 1 GiB. That limit has its tests; here it would only cost time.
const SPARSE_LEN_MAX_BYTES: u64 = 64 << 20;
/// Most bytes of extended attributes over all nodes. Nodes may share one set, which the tree has once for each of them.
const XATTR_LEN_MAX_BYTES: usize = 1 << 20;

/// Up to three tables of contents merge into a tree that its EROFS image shows exactly.
pub fn merge(data: &[u8]) {
    let ([count], data) = numbers::<1>(data);
    let parts = split::<3>(data);
    let tables: Result<Vec<_>, _> =
        parts[..1 + usize::from(count % 3)].iter().map(|part| Toc::decode(Bytes::copy_from_slice(part))).collect();
    let Ok(tables) = tables else { return };
    if !is_small(&tables) {
        return;
    }
    let tree = merge::merge(&tables).expect("so few nodes are below every limit");
    assert_eq!(tree, merge::merge(&tables).expect("as before"), "the same tables gave another tree");
    let nodes: u64 = tables.iter().map(|toc| u64::from(toc.entry_count())).sum();
    assert!(tree.inodes.len() as u64 <= nodes);
    let Ok(written) = erofs::write(&tree) else { return };
    let image = Image::open(written.as_slice()).expect("our own image can be read");
    assert_eq!(image.inode_count(), tree.inodes.len() as u64);
    assert!(image.devices().map(|slot| slot.diff_id).eq(tree.layers.iter().map(|layer| Some(layer.diff_id))));
    compare(&image, &tree);
}

fn is_small(tables: &[Toc]) -> bool {
    let (mut sparse_len, mut xattr_len) = (0_u64, 0);
    for node in tables.iter().flat_map(Toc::nodes) {
        xattr_len += node.xattrs().map(|xattr| xattr.name.len() + xattr.value.len()).sum::<usize>();
        if let NodeKind::Regular { size_bytes, mut extents } = node.kind()
            && extents.next().is_none_or(|extent| extent.len_bytes < size_bytes)
        {
            sparse_len = sparse_len.saturating_add(size_bytes);
        }
    }
    sparse_len <= SPARSE_LEN_MAX_BYTES && xattr_len <= XATTR_LEN_MAX_BYTES
}

fn compare(image: &Image<&[u8]>, tree: &Tree) {
    let mut nids: Vec<Option<Nid>> = vec![None; tree.inodes.len()];
    let mut waiting = vec![(0, image.root())];
    while let Some((index, nid)) = waiting.pop() {
        match &mut nids[index as usize] {
            Some(before) => {
                assert_eq!(*before, nid, "a hard link leads to another inode");
                continue;
            }
            first => *first = Some(nid),
        }
        let inode = &tree.inodes[index as usize];
        same_attributes(image, nid, inode);
        match &inode.kind {
            InodeKind::Directory { entries, .. } => same_entries(image, nid, entries, &mut waiting),
            InodeKind::Regular { .. } => same_content(image, nid, inode),
            InodeKind::Symlink { target } => assert_eq!(image.readlink(nid).expect("a symlink"), target.as_slice()),
            InodeKind::CharDevice { major, minor } | InodeKind::BlockDevice { major, minor } => {
                let device = image.stat(nid).expect("a device").rdev;
                assert_eq!((device.major, device.minor), (*major, *minor));
            }
            InodeKind::Fifo => {}
        }
    }
    assert!(nids.iter().all(Option::is_some), "an inode has no name");
}

fn same_attributes(image: &Image<&[u8]>, nid: Nid, inode: &Inode) {
    let shown = image.stat(nid).expect("every inode can be read");
    assert_eq!(
        (shown.permissions, shown.uid, shown.gid, shown.mtime, shown.link_count),
        (inode.permissions, inode.uid, inode.gid, inode.mtime, inode.link_count)
    );
    for xattr in image.xattrs(nid).expect("every inode can be read") {
        let xattr = xattr.expect("every attribute can be read");
        let known = inode.xattrs.iter().any(|wanted| xattr.name == *wanted.name && wanted.value == xattr.value);
        assert!(known, "the image made up the attribute {:?}", xattr.name);
    }
}

fn same_entries(
    image: &Image<&[u8]>,
    nid: Nid,
    entries: &[(Vec<u8>, InodeIndex)],
    waiting: &mut Vec<(InodeIndex, Nid)>,
) {
    let shown = image.readdir(nid, 0).expect("a directory").map(|entry| entry.expect("sound"));
    let mut shown: Vec<_> =
        shown.filter(|entry| entry.name != b"." && entry.name != b"..").map(|entry| (entry.name, entry.nid)).collect();
    shown.sort_unstable_by_key(|(name, _)| *name);
    assert!(shown.iter().map(|(name, _)| *name).eq(entries.iter().map(|(name, _)| name.as_slice())));
    for ((name, found), (_, index)) in shown.into_iter().zip(entries) {
        assert_eq!(image.lookup(nid, name), Ok(Some(found)));
        waiting.push((*index, found));
    }
}

fn same_content(image: &Image<&[u8]>, nid: Nid, inode: &Inode) {
    let InodeKind::Regular { size_bytes, extents } = &inode.kind else { return };
    assert_eq!(image.stat(nid).expect("a file").size_bytes, *size_bytes);
    for extent in extents {
        let range = extent.file_offset..extent.file_offset + extent.len_bytes;
        let mut at = range.start;
        for shown in image.extents(nid, range).expect("a file") {
            let shown = shown.expect("sound");
            let within = shown.file_offset - extent.file_offset;
            match (&extent.source, shown.source) {
                (ExtentSource::Layer { layer, offset }, RangeSource::Device { index, offset: found }) => {
                    assert_eq!((*layer, offset.0 + within), (index, found.0));
                }
                (ExtentSource::Inline(bytes), RangeSource::Image { offset }) => {
                    let (within, offset, len) = (within as usize, offset as usize, shown.len_bytes as usize);
                    assert_eq!(bytes[within..within + len], image.bytes()[offset..offset + len]);
                }
                (wanted, found) => panic!("{wanted:?} is shown as {found:?}"),
            }
            at += shown.len_bytes;
        }
        assert_eq!(at, extent.file_offset + extent.len_bytes);
    }
}
