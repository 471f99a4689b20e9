//! Index artifacts and the sets and frames that they travel in.

use bytes::Bytes;
use hermes_image::ids::{ChunkNo, LogicalOffset, SpanNo};
use hermes_image::index::chunks::{CHUNK_LEN_MAX_BYTES, ChunkTable, ChunkTableBuilder};
use hermes_image::index::seek::SeekTable;
use hermes_image::index::toc::{NodeKind, ROOT, Toc};
use hermes_image::index::wire;
use hermes_image::inflate::window::WINDOW_LEN_MAX_BYTES;
use hermes_image::runs::Runs;
use hermes_image::tar::{NAME_LEN_MAX_BYTES, XATTR_VALUE_LEN_MAX_BYTES};
use hermes_image::tree::ExtentSource;

use crate::parts::numbers;

/// A table of contents that decodes is a tree: every node but the root is the child of one directory before it, and all
/// that nodes say lies within the layer.
pub fn toc(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let Ok(toc) = Toc::decode(bytes.clone()) else { return };
    assert_eq!(toc.bytes(), &bytes);
    let mut next_child = 1;
    for node in toc.nodes() {
        assert!(node.name().len() <= NAME_LEN_MAX_BYTES && node.name().is_empty() == (node.no() == ROOT));
        assert!(node.permissions() <= 0o7777 && node.mtime().nanoseconds < 1_000_000_000);
        let mut name: &[u8] = &[];
        for xattr in node.xattrs() {
            assert!(xattr.name > name && xattr.value.len() <= XATTR_VALUE_LEN_MAX_BYTES);
            name = xattr.name;
        }
        match node.kind() {
            NodeKind::Directory { children, .. } => {
                assert!(children.start == next_child && children.start <= children.end);
                next_child = children.end;
                for child in children {
                    let found = toc.child(node.no(), toc.node(child).name()).expect("a child is found by its name");
                    assert_eq!(found.no(), child);
                }
            }
            NodeKind::Regular { size_bytes, extents } => {
                let mut end = 0;
                for extent in extents {
                    assert!(extent.len_bytes > 0 && extent.file_offset >= end);
                    end = extent.file_offset + extent.len_bytes;
                    assert!(end <= size_bytes);
                    match extent.source {
                        ExtentSource::Layer { offset, .. } => {
                            assert!(offset.0 + extent.len_bytes <= toc.logical_len_bytes());
                        }
                        ExtentSource::Inline(bytes) => assert_eq!(bytes.len() as u64, extent.len_bytes),
                    }
                }
            }
            NodeKind::HardLink { node: first } => {
                assert!(first < node.no());
                let leads_to_a_file = !matches!(
                    toc.node(first).kind(),
                    NodeKind::Directory { .. } | NodeKind::HardLink { .. } | NodeKind::Whiteout
                );
                assert!(leads_to_a_file);
            }
            NodeKind::Symlink { target } => assert!(!target.is_empty() && !target.contains(&0)),
            NodeKind::CharDevice { .. } | NodeKind::BlockDevice { .. } | NodeKind::Fifo | NodeKind::Whiteout => {}
        }
    }
    assert_eq!(next_child, toc.entry_count(), "a node is lost");
}

/// A chunk table that decodes is the one that the builder makes of its chunks, and covers the layer without gaps.
pub fn chunk_table(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let Ok(table) = ChunkTable::decode(bytes.clone()) else { return };
    let mut builder = ChunkTableBuilder::default();
    let mut end = 0;
    for chunk in (0..table.count()).map(ChunkNo) {
        let range = table.range(chunk);
        assert!(range.start == end && range.start < range.end && range.end - range.start <= CHUNK_LEN_MAX_BYTES);
        end = range.end;
        assert_eq!(table.find(LogicalOffset(range.start)), Some(chunk));
        assert_eq!(table.find(LogicalOffset(range.end - 1)), Some(chunk));
        assert_eq!(table.covering(range.clone()), chunk.0..chunk.0 + 1);
        builder.push(table.chunk_id(chunk), range.end - range.start).expect("a decoded chunk can be pushed");
    }
    assert_eq!(end, table.logical_len_bytes());
    assert_eq!(table.find(LogicalOffset(end)), None);
    assert_eq!(table.run_range(0..table.count()), 0..end);
    let built = builder.finish(table.diff_id());
    assert_eq!((built.bytes(), built.id()), (&bytes, table.id()));
}

/// The spans of a seek table that decodes hold every chunk once, in order, and lie within the blob and the windows.
pub fn seek_table(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let Ok(table) = SeekTable::decode(bytes.clone()) else { return };
    assert_eq!(table.bytes(), &bytes);
    let header = *table.header();
    let (mut chunk, mut pack_end) = (0, 0);
    for (no, span) in table.spans().enumerate() {
        let no = SpanNo(no as u32);
        assert!(span.chunks.start == chunk && span.chunks.start < span.chunks.end);
        chunk = span.chunks.end;
        assert_eq!(table.span_of(ChunkNo(span.chunks.start)), no);
        assert_eq!(table.span_of(ChunkNo(span.chunks.end - 1)), no);
        assert!(span.blob.start <= span.blob.end && span.blob.end <= header.blob_len_bytes);
        let run = table.blob_range(0..no.0 + 1);
        assert!(run.start <= span.blob.start && run.end >= span.blob.end);
        assert!(span.kept.len() <= span.window_len_bytes && span.window_len_bytes <= WINDOW_LEN_MAX_BYTES);
        let pack = table.window_pack(no);
        assert!(span.kept.end <= pack.unpacked_len_bytes && pack.unpacked_len_bytes <= 16 * WINDOW_LEN_MAX_BYTES);
        assert!(pack.range.end <= table.windows_len_bytes() && pack.range.end >= pack_end);
        pack_end = pack.range.end;
        let needed = table.window_range(no);
        assert_eq!(needed.is_empty(), span.kept.is_empty());
        assert!(table.verify_window(no, Bytes::from_static(b"not a window")).is_err());
    }
    assert_eq!((chunk, pack_end), (header.chunk_count, table.windows_len_bytes()));
}

/// Longest artifact that [`wire`] allows, in bytes.
pub(crate) const WIRE_LIMIT_BYTES: usize = 1 << 20;

/// Unpacking stays within its limit, and packing loses nothing.
pub fn wire(data: &[u8]) {
    if let Ok(plain) = wire::unpack(data, WIRE_LIMIT_BYTES) {
        assert!(plain.len() <= WIRE_LIMIT_BYTES);
        assert_eq!(wire::unpack(&wire::pack(&plain), plain.len()), Ok(plain.clone()));
        if let Some(too_little) = plain.len().checked_sub(1) {
            assert!(wire::unpack(data, too_little).is_err());
        }
    }
    assert_eq!(wire::unpack(&wire::pack(data), data.len()).as_deref(), Ok(data));
}

/// A set of runs has exactly one encoding, and its operations agree with each other.
pub fn runs(data: &[u8]) {
    let ([a, b, c, d, few], data) = numbers::<5>(data);
    let chunk_limit = u32::from_le_bytes([a, b, c, d]);
    let run_limit = if few & 1 == 0 { usize::from(few) } else { 16 * 1024 };
    let mut rest = data;
    let Ok(runs) = Runs::decode(&mut rest, chunk_limit, run_limit) else { return };
    assert!(runs.run_count() <= run_limit && runs.iter().all(|run| run.end <= chunk_limit));
    let mut encoded = Vec::new();
    runs.encode(&mut encoded);
    assert_eq!(encoded, data[..data.len() - rest.len()], "a set has a second encoding");
    assert_eq!(runs.iter().collect::<Runs>(), runs);
    let Ok(other) = Runs::decode(&mut rest, chunk_limit, run_limit) else { return };
    let (both, left) = (runs.intersection(&other), runs.difference(&other));
    assert_eq!(both, other.intersection(&runs));
    assert_eq!(both.chunk_count() + left.chunk_count(), runs.chunk_count());
    let mut union = left.clone();
    union.insert_all(&other);
    assert_eq!(union.chunk_count(), left.chunk_count() + other.chunk_count());
    for run in both.iter() {
        assert!(runs.contains_all(run.clone()) && other.contains_all(run.clone()) && !left.contains(run.start));
    }
    let some = u32::from(few);
    assert_eq!(runs.take(some).chunk_count(), runs.chunk_count().min(u64::from(some)));
}
