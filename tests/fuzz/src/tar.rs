//! Tar streams.

use hermes_image::ids::DiffId;
use hermes_image::index::toc::Toc;
use hermes_image::tar::{
    BLOCK_LEN_BYTES, EXTENSION_LEN_MAX_BYTES, Entry, EntryKind, LOGICAL_LEN_MAX_BYTES, LayerTree,
    SPARSE_SEGMENT_COUNT_MAX, TarError, TarWalker,
};
use hermes_image::tree::ExtentSource;

use crate::mutate::Random;
use crate::parts::numbers;

/// `tar` with the checksum of every block that looks like a header made right, or a fuzzer would hardly get past the
/// first one.
pub(crate) fn seal(tar: &[u8]) -> Vec<u8> {
    let mut sealed = tar.to_vec();
    for block in sealed.as_chunks_mut::<512>().0 {
        if block[257..262] == *b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    sealed
}

/// The entries of a stream that comes in `pieces`, and how it ended.
pub(crate) fn walk<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Entry>, Result<(), TarError>) {
    let mut walker = TarWalker::new();
    let mut entries = Vec::new();
    for piece in pieces {
        if let Err(error) = walker.push(piece, &mut entries) {
            assert_eq!(walker.push(&[0; 512], &mut entries), Err(error.clone()), "a failed walker changed its mind");
            return (entries, Err(error));
        }
    }
    let end = walker.finish(&mut entries);
    (entries, end)
}

/// The table of contents of a layer, as the index builder makes it.
pub(crate) fn toc_of(tar: &[u8], diff_id: DiffId) -> Result<Toc, TarError> {
    let (entries, end) = walk([tar]);
    let mut tree = LayerTree::new();
    for entry in entries {
        tree.apply(entry)?;
    }
    end?;
    tree.finish(diff_id, tar.len() as u64)
}

fn check_entry(entry: &Entry) {
    assert!(entry.header_start < entry.data_start);
    assert!(entry.header_start.is_multiple_of(BLOCK_LEN_BYTES) && entry.data_start.is_multiple_of(BLOCK_LEN_BYTES));
    assert!(entry.data_start + entry.stored_len_bytes <= LOGICAL_LEN_MAX_BYTES);
    assert!(entry.path.len() as u64 <= EXTENSION_LEN_MAX_BYTES);
    assert!(entry.metadata.permissions <= 0o7777 && entry.metadata.mtime.nanoseconds < 1_000_000_000);
    assert!(entry.metadata.xattrs.is_sorted_by(|left, right| left.name < right.name));
    let EntryKind::Regular { size_bytes, extents } = &entry.kind else { return };
    assert!(extents.len() <= SPARSE_SEGMENT_COUNT_MAX * 2);
    let mut end = 0;
    for extent in extents {
        assert!(extent.len_bytes > 0 && extent.file_offset >= end, "extents of {entry:?}");
        end = extent.file_offset + extent.len_bytes;
        assert!(extent.file_offset.is_multiple_of(BLOCK_LEN_BYTES) && end <= *size_bytes);
        assert!(extent.len_bytes.is_multiple_of(BLOCK_LEN_BYTES) || end == *size_bytes);
        match &extent.source {
            ExtentSource::Layer { layer, offset } => {
                assert!(*layer == 0 && offset.0.is_multiple_of(BLOCK_LEN_BYTES) && offset.0 >= entry.data_start);
                let data_end = (entry.data_start + entry.stored_len_bytes).next_multiple_of(BLOCK_LEN_BYTES);
                assert!(offset.0 + extent.len_bytes <= data_end);
            }
            ExtentSource::Inline(bytes) => assert_eq!(bytes.len() as u64, extent.len_bytes),
        }
    }
}

fn walk_and_unpack(tar: &[u8]) {
    for entry in &walk([tar]).0 {
        check_entry(entry);
    }
    if let Ok(toc) = toc_of(tar, DiffId([7; 32])) {
        let read = Toc::decode(toc.bytes().clone()).expect("what the builder writes, the decoder takes");
        assert_eq!(read.id(), toc.id());
    }
}

/// Any bytes are a tar or an error, and entries and tables of contents keep the rules of their formats.
pub fn tar(data: &[u8]) {
    walk_and_unpack(data);
    let sealed = seal(data);
    if sealed != data {
        walk_and_unpack(&sealed);
    }
}

/// Where a stream is cut makes no difference: the same entries, the same error.
pub fn tar_pushes(data: &[u8]) {
    let (seed, tar) = numbers::<8>(data);
    let tar = seal(tar);
    let mut random = Random::new(u64::from_le_bytes(seed));
    let piece_max = [1, 7, 511, 512, 513, 4096][random.below(6)];
    let mut rest = tar.as_slice();
    let pieces = std::iter::from_fn(|| {
        let len = rest.len().min(random.below(piece_max + 1));
        let (piece, after) = rest.split_at(len);
        let is_over = rest.is_empty();
        rest = after;
        (!is_over).then_some(piece)
    });
    assert_eq!(walk(pieces), walk([tar.as_slice()]));
}
