//! Trees to test with: random ones that shrink, and the means to write one down.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::ids::{DiffId, LogicalOffset};
use crate::tree::{Extent, ExtentSource, Inode, InodeKind, Timestamp, Tree, TreeLayer, Xattr};

/// Blocks in each layer of a test tree.
const LAYER_BLOCKS: u64 = 600;

/// Three layers, the last of which ends inside a block.
pub(super) fn layers() -> Vec<TreeLayer> {
    (0..3_u8)
        .map(|no| TreeLayer {
            diff_id: DiffId([no + 1; 32]),
            logical_len_bytes: LAYER_BLOCKS * 512 - if no == 2 { 100 } else { 0 },
        })
        .collect()
}

/// The byte that layer `layer` has at `offset`: a function of its place, so that every misplaced byte shows.
pub(super) fn ramp_byte(layer: u16, offset: u64) -> u8 {
    let place = offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(layer) + 1).wrapping_mul(0xd6e8_feb8_6659_fd93);
    (place ^ (place >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_be_bytes()[0]
}

/// `out.len()` bytes of layer `layer` from `offset`.
pub(super) fn ramp(layer: u16, offset: u64, out: &mut [u8]) {
    for (at, byte) in (offset..).zip(out) {
        *byte = ramp_byte(layer, at);
    }
}

/// Something to add to a tree that has directories and other inodes already.
#[derive(Debug, Clone)]
pub(super) struct Node {
    /// Which directory, modulo their number.
    pub(super) parent: u16,
    pub(super) name: Vec<u8>,
    pub(super) meta: Meta,
    pub(super) what: What,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Meta {
    pub(super) permissions: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
    pub(super) xattrs: Vec<Xattr>,
}

#[derive(Debug, Clone)]
pub(super) enum What {
    Directory,
    /// Pieces, and bytes by which the last one (or the hole behind it, in blocks) is cut.
    File {
        pieces: Vec<Piece>,
        hole_blocks: u64,
        cut: u64,
    },
    Symlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
    /// A further name of an inode that is no directory, modulo their number.
    Link(u16),
}

#[derive(Debug, Clone)]
pub(super) struct Piece {
    hole_blocks: u64,
    blocks: u64,
    /// Layer and block, or inline bytes.
    source: Option<(u16, u64)>,
}

/// A directory in directory number `parent`.
pub(super) fn directory(parent: u16, name: &[u8]) -> Node {
    Node { parent, name: name.to_vec(), meta: Meta::default(), what: What::Directory }
}

/// A file of pieces (blocks of hole before it, blocks, block in layer 0), cut by `cut` bytes.
pub(super) fn file(parent: u16, name: &[u8], pieces: &[(u64, u64, u64)], cut: u64) -> Node {
    let pieces =
        pieces.iter().map(|&(hole_blocks, blocks, at)| Piece { hole_blocks, blocks, source: Some((0, at)) }).collect();
    let what = What::File { pieces, hole_blocks: 0, cut };
    Node { parent, name: name.to_vec(), meta: Meta::default(), what }
}

/// The tree of `nodes`; a node whose name its directory has already is left out.
pub(super) fn build(nodes: Vec<Node>) -> Tree {
    let root = InodeKind::Directory { entries: Vec::new(), parent: 0 };
    let mut tree = Tree { layers: layers(), inodes: vec![inode(Meta { permissions: 0o755, ..Meta::default() }, root)] };
    tree.inodes[0].link_count = 2;
    let mut directories = vec![0];
    let mut others = Vec::new();
    for node in nodes {
        let parent = directories[usize::from(node.parent) % directories.len()];
        let index = tree.inodes.len() as u32;
        let kind = match node.what {
            What::Directory => InodeKind::Directory { entries: Vec::new(), parent },
            What::File { pieces, hole_blocks, cut } => regular(&pieces, hole_blocks, cut),
            What::Symlink(target) => InodeKind::Symlink { target },
            What::CharDevice(major, minor) => InodeKind::CharDevice { major, minor },
            What::BlockDevice(major, minor) => InodeKind::BlockDevice { major, minor },
            What::Fifo => InodeKind::Fifo,
            What::Link(to) if !others.is_empty() => {
                let to = others[usize::from(to) % others.len()];
                if insert(&mut tree, parent, &node.name, to) {
                    tree.inodes[to as usize].link_count += 1;
                }
                continue;
            }
            What::Link(_) => continue,
        };
        if !insert(&mut tree, parent, &node.name, index) {
            continue;
        }
        let is_directory = matches!(kind, InodeKind::Directory { .. });
        tree.inodes.push(inode(node.meta, kind));
        if is_directory {
            tree.inodes[index as usize].link_count = 2;
            tree.inodes[parent as usize].link_count += 1;
            directories.push(index);
        } else {
            others.push(index);
        }
    }
    tree
}

fn insert(tree: &mut Tree, parent: u32, name: &[u8], index: u32) -> bool {
    let InodeKind::Directory { entries, .. } = &mut tree.inodes[parent as usize].kind else { return false };
    match entries.binary_search_by(|(other, _)| other.as_slice().cmp(name)) {
        Ok(_) => false,
        Err(at) => {
            entries.insert(at, (name.to_vec(), index));
            true
        }
    }
}

fn inode(meta: Meta, kind: InodeKind) -> Inode {
    let Meta { permissions, uid, gid, mtime, mut xattrs } = meta;
    // What the kernel shows on some kinds of file only.
    xattrs.retain(|xattr| {
        let is_directory = matches!(kind, InodeKind::Directory { .. });
        let is_file = matches!(kind, InodeKind::Regular { .. });
        if xattr.name.ends_with(b"default") {
            is_directory
        } else if xattr.name.starts_with(b"user.") || xattr.name.starts_with(b"system.") {
            is_directory || is_file
        } else {
            true
        }
    });
    Inode { permissions, uid, gid, mtime, link_count: 1, xattrs, kind }
}

fn regular(pieces: &[Piece], hole_blocks: u64, cut: u64) -> InodeKind {
    let mut extents = Vec::new();
    let mut end = 0;
    for (no, piece) in pieces.iter().enumerate() {
        let file_offset = end + piece.hole_blocks * 512;
        let is_last = no + 1 == pieces.len() && hole_blocks == 0;
        let len_bytes = piece.blocks * 512 - if is_last { cut } else { 0 };
        end = file_offset + len_bytes;
        let source = match piece.source {
            Some((layer, block)) => ExtentSource::Layer { layer, offset: LogicalOffset(block * 512) },
            None => {
                let bytes: Vec<u8> = (file_offset..end).map(|at| ramp_byte(99, at)).collect();
                ExtentSource::Inline(Bytes::from(bytes))
            }
        };
        extents.push(Extent { file_offset, len_bytes, source });
    }
    if hole_blocks > 0 {
        end += hole_blocks * 512 - cut;
    }
    InodeKind::Regular { size_bytes: end, extents }
}

fn any_piece() -> impl Strategy<Value = Piece> {
    let source = prop_oneof![
        6 => (0_u16..3, 0_u64..LAYER_BLOCKS - 20).prop_map(Some),
        1 => Just(None),
    ];
    let hole = prop_oneof![3 => Just(0_u64), 1 => 1_u64..9];
    (hole, 1_u64..17, source).prop_map(|(hole_blocks, blocks, source)| Piece { hole_blocks, blocks, source })
}

fn any_name() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_filter("not in names", |byte| !matches!(byte, 0 | b'/'));
    prop_oneof![
        6 => "[a-z.!-]{1,3}".prop_map(String::into_bytes),
        3 => "[a-z]{8,30}".prop_map(String::into_bytes),
        1 => vec(byte, 1..=255),
        1 => "[x-z]{230,255}".prop_map(String::into_bytes),
    ]
    .prop_filter("a name of its own", |name| !matches!(name.as_slice(), b"." | b".."))
}

fn any_time() -> impl Strategy<Value = Timestamp> {
    prop_oneof![
        3 => Just(Timestamp { seconds: 1_700_000_000, nanoseconds: 0 }),
        1 => (-(1_i64 << 40)..1 << 40, 0_u32..1_000_000_000)
            .prop_map(|(seconds, nanoseconds)| Timestamp { seconds, nanoseconds }),
    ]
}

/// An access list that the kernel takes: `struct posix_acl_xattr_header` and five entries.
fn access_list(id: u32) -> Vec<u8> {
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1_u16, 6_u16, u32::MAX), (2, 4, id), (4, 4, u32::MAX), (16, 6, u32::MAX), (32, 0, u32::MAX)]
    {
        list.extend_from_slice(&tag.to_le_bytes());
        list.extend_from_slice(&permissions.to_le_bytes());
        list.extend_from_slice(&id.to_le_bytes());
    }
    list
}

/// A file capability of version 2 (`struct vfs_cap_data`).
fn capability(bits: u32) -> Vec<u8> {
    let mut value = 0x0200_0000_u32.to_le_bytes().to_vec();
    value.extend_from_slice(&bits.to_le_bytes());
    value.extend_from_slice(&[0; 12]);
    value
}

fn any_xattr() -> impl Strategy<Value = Xattr> {
    let named = |name: &'static str| move |value: Vec<u8>| (name.to_owned(), value);
    prop_oneof![
        4 => (0_u32..3).prop_map(|bits| ("security.capability".to_owned(), capability(1 << bits))),
        1 => (0_u32..3).prop_map(|id| ("system.posix_acl_access".to_owned(), access_list(id))),
        1 => (0_u32..3).prop_map(|id| ("system.posix_acl_default".to_owned(), access_list(id))),
        1 => Just(b"y".to_vec()).prop_map(named("trusted.overlay.opaque")),
        2 => ("user\\.[a-c]{1,2}", vec(0_u8..3, 0..3)),
        1 => ("user\\.[a-z]{1,250}", vec(any::<u8>(), 0..700)),
        1 => ("trusted\\.[a-z]{1,20}", vec(any::<u8>(), 0..2000)),
        1 => vec(any::<u8>(), 1..30).prop_map(named("security.hermes")),
    ]
    .prop_map(|(name, value)| Xattr { name: name.into_bytes(), value })
}

fn any_meta() -> impl Strategy<Value = Meta> {
    let owner = || prop_oneof![3 => 0_u32..2, 1 => any::<u32>().prop_map(|id| id & 0x7fff_ffff)];
    let xattrs = prop_oneof![
        3 => Just(Vec::new()),
        2 => vec(any_xattr(), 1..5).prop_map(|mut xattrs| {
            xattrs.sort();
            xattrs.dedup_by(|a, b| a.name == b.name);
            xattrs
        }),
    ];
    (0_u16..0o10000, owner(), owner(), any_time(), xattrs).prop_map(|(permissions, uid, gid, mtime, xattrs)| Meta {
        permissions,
        uid,
        gid,
        mtime,
        xattrs,
    })
}

fn any_what() -> impl Strategy<Value = What> {
    let file = |(pieces, hole_blocks, cut)| What::File { pieces, hole_blocks, cut };
    let symlink = |target: String| What::Symlink(target.into_bytes());
    prop_oneof![
        3 => Just(What::Directory),
        2 => (vec(any_piece(), 0..2), Just(0_u64), 0_u64..512).prop_map(file),
        2 => (vec(any_piece(), 0..6), 0_u64..3, 0_u64..512).prop_map(file),
        1 => "[a-z/]{1,40}".prop_map(symlink),
        1 => "[a-z/]{350,600}".prop_map(symlink),
        1 => "[a-z/]{4000,4095}".prop_map(symlink),
        1 => (0_u32..4096, 0_u32..1 << 20).prop_map(|(major, minor)| What::CharDevice(major, minor)),
        1 => (0_u32..256, 0_u32..256).prop_map(|(major, minor)| What::BlockDevice(major, minor)),
        1 => Just(What::Fifo),
        2 => any::<u16>().prop_map(What::Link),
    ]
}

/// A tree of up to 60 inodes with everything that a layer can hold.
pub(super) fn any_tree() -> impl Strategy<Value = Tree> {
    let node = (prop_oneof![Just(0), any::<u16>()], any_name(), any_meta(), any_what())
        .prop_map(|(parent, name, meta, what)| Node { parent, name, meta, what });
    vec(node, 0..60).prop_map(build)
}

/// A tree with one of everything that is written by a rule of its own.
pub(super) fn known_tree() -> Tree {
    let mtime = Timestamp { seconds: 1_600_000_000, nanoseconds: 123_456_789 };
    let xattrs = vec![
        Xattr { name: b"security.capability".to_vec(), value: capability(1) },
        Xattr { name: b"user.note".to_vec(), value: b"kept here".to_vec() },
    ];
    let meta = Meta { permissions: 0o4755, uid: 70_000, gid: 5, mtime, xattrs };
    let mut nodes = vec![directory(0, b"etc"), directory(1, b"many"), file(1, b"plain", &[(0, 9, 4)], 17)];
    nodes.extend((0..100).map(|no| file(2, format!("entry-{no:03}").as_bytes(), &[(0, 1, no)], 1)));
    nodes.push(Node { meta: meta.clone(), ..file(1, b"sparse", &[(3, 2, 40), (0, 1, 80), (7, 4, 90)], 300) });
    nodes.push(Node { meta, ..file(0, b"empty", &[], 0) });
    for (name, what) in [
        ("short", What::Symlink(b"etc/plain".to_vec())),
        ("long", What::Symlink(vec![b'l'; 1500])),
        ("null", What::CharDevice(1, 3)),
        ("disk", What::BlockDevice(259, 70_000)),
        ("pipe", What::Fifo),
        ("link", What::Link(0)),
    ] {
        nodes.push(Node { parent: 0, name: name.as_bytes().to_vec(), meta: Meta::default(), what });
    }
    let inline = Piece { hole_blocks: 1, blocks: 2, source: None };
    let what = What::File { pieces: vec![inline], hole_blocks: 0, cut: 1 };
    nodes.push(Node { parent: 0, name: b"inline".to_vec(), meta: Meta::default(), what });
    build(nodes)
}
