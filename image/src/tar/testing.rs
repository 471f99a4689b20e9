//! A tar writer for tests that can write what no proper writer would, and readable listings of what came of it.

use super::{Entry, LayerTree, TarError, TarWalker};
use crate::ids::DiffId;
use crate::index::toc::{NodeKind, ROOT, Toc};

/// The diffID that tests give to their layers, which nothing checks.
pub(crate) const TEST_DIFF_ID: DiffId = DiffId([7; 32]);

/// One header block in the making: ustar, mode 0644, all else zero.
#[derive(Clone)]
pub(crate) struct RawHeader(pub(crate) [u8; 512]);

impl RawHeader {
    pub(crate) fn new(name: &[u8], type_flag: u8) -> Self {
        Self([0; 512]).set(0, name).set(156, &[type_flag]).set(100, b"0000644\0").set(257, b"ustar\x0000")
    }

    /// Writes raw bytes at an offset.
    pub(crate) fn set(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub(crate) fn gnu(self) -> Self {
        self.set(257, b"ustar  \0")
    }

    pub(crate) fn v7(self) -> Self {
        self.set(257, &[0; 8])
    }

    pub(crate) fn link(self, target: &[u8]) -> Self {
        self.set(157, target)
    }

    pub(crate) fn octal(self, at: usize, len: usize, value: u64) -> Self {
        let text = format!("{value:0width$o}\0", width = len - 1);
        self.set(at, text.as_bytes())
    }

    pub(crate) fn mode(self, mode: u64) -> Self {
        self.octal(100, 8, mode)
    }

    pub(crate) fn owner(self, uid: u64, gid: u64) -> Self {
        self.octal(108, 8, uid).octal(116, 8, gid)
    }

    pub(crate) fn size(self, size: u64) -> Self {
        self.octal(124, 12, size)
    }

    pub(crate) fn mtime(self, seconds: u64) -> Self {
        self.octal(136, 12, seconds)
    }

    pub(crate) fn device(self, major: u64, minor: u64) -> Self {
        self.octal(329, 8, major).octal(337, 8, minor)
    }

    /// The block with its checksum.
    pub(crate) fn sealed(self) -> [u8; 512] {
        let mut block = self.set(148, b"        ").0;
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// One PAX record.
pub(crate) fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while rest + len.to_string().len() != len {
        len = rest + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
}

/// A tar in the making.
#[derive(Default, Clone)]
pub(crate) struct TarWriter(pub(crate) Vec<u8>);

impl std::fmt::Debug for TarWriter {
    /// What it unpacks to, which a failing test can be read from.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("TarWriter").field(&toc_of(&self.0).map(|toc| listing(&toc))).finish()
    }
}

impl TarWriter {
    /// Adds a header and its data, with the header's size field as it is.
    pub(crate) fn raw(mut self, header: RawHeader, data: &[u8]) -> Self {
        self.0.extend_from_slice(&header.sealed());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// Adds a header with the size of its data.
    pub(crate) fn put(self, header: RawHeader, data: &[u8]) -> Self {
        self.raw(header.size(data.len() as u64), data)
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.put(RawHeader::new(name.as_bytes(), b'0'), data)
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.put(RawHeader::new(name.as_bytes(), b'5').mode(0o755), b"")
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.put(RawHeader::new(name.as_bytes(), b'2').mode(0o777).link(target.as_bytes()), b"")
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.put(RawHeader::new(name.as_bytes(), b'1').link(target.as_bytes()), b"")
    }

    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let content: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        self.put(RawHeader::new(b"PaxHeaders/x", b'x'), &content)
    }

    /// Two blocks of zeros.
    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// All entries of a stream that comes in pieces of `piece` bytes.
pub(crate) fn walk_in_pieces(tar: &[u8], piece: usize) -> Result<Vec<Entry>, TarError> {
    let mut walker = TarWalker::new();
    let mut entries = Vec::new();
    for bytes in tar.chunks(piece.max(1)) {
        walker.push(bytes, &mut entries)?;
    }
    walker.finish(&mut entries)?;
    Ok(entries)
}

/// All entries of a stream.
pub(crate) fn walk(tar: &[u8]) -> Result<Vec<Entry>, TarError> {
    walk_in_pieces(tar, usize::MAX)
}

/// The table of contents of a layer.
pub(crate) fn toc_of(tar: &[u8]) -> Result<Toc, TarError> {
    let mut tree = LayerTree::new();
    for entry in walk(tar)? {
        tree.apply(entry)?;
    }
    tree.finish(TEST_DIFF_ID, tar.len() as u64)
}

/// The paths of a table's nodes, by number.
pub(crate) fn paths(toc: &Toc) -> Vec<String> {
    let mut paths = vec![String::new(); toc.entry_count() as usize];
    for node in toc.nodes() {
        if let NodeKind::Directory { children, .. } = node.kind() {
            for child in children {
                let name = toc.node(child).name().escape_ascii().to_string();
                let parent = &paths[node.no() as usize];
                paths[child as usize] = if node.no() == ROOT { name } else { format!("{parent}/{name}") };
            }
        }
    }
    paths
}

/// One line a node, without the root: path, and what it is.
pub(crate) fn listing(toc: &Toc) -> Vec<String> {
    let paths = paths(toc);
    let describe = |kind: NodeKind<'_>| match kind {
        NodeKind::Directory { implied, opaque, .. } => {
            format!("dir{}{}", if implied { " implied" } else { "" }, if opaque { " opaque" } else { "" })
        }
        NodeKind::Regular { size_bytes, .. } => format!("file {size_bytes}"),
        NodeKind::Symlink { target } => format!("-> {}", target.escape_ascii()),
        NodeKind::CharDevice { major, minor } => format!("char {major}:{minor}"),
        NodeKind::BlockDevice { major, minor } => format!("block {major}:{minor}"),
        NodeKind::Fifo => "fifo".to_owned(),
        NodeKind::HardLink { node } => format!("= {}", paths[node as usize]),
        NodeKind::Whiteout => "whiteout".to_owned(),
    };
    toc.nodes().skip(1).map(|node| format!("{} {}", paths[node.no() as usize], describe(node.kind()))).collect()
}
