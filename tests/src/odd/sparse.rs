//! Sparse files in all four encodings that GNU tar has had.

use super::{OddImage, Oracles, ramp};
use crate::tarball::{BLOCK_LEN_BYTES, Dialect, Entry, Tarball, header, seal};

/// Fragments in the header of an old GNU sparse entry, and in each block that extends it (GNU tar, tar.h).
const HEADER_FRAGMENTS: usize = 4;
const EXTENSION_FRAGMENTS: usize = 21;
/// Offsets of the sparse fields in such a header (`struct oldgnu_header`), in bytes.
const FRAGMENTS_AT: usize = 386;
const IS_EXTENDED_AT: usize = 482;
const REAL_SIZE_AT: usize = 483;

/// A file with holes: where its data is (offset and length in bytes), and how long it is.
struct Sparse {
    name: &'static str,
    data: Vec<(u64, u64)>,
    size_bytes: u64,
}

pub(super) fn images(seed: u64) -> Vec<OddImage> {
    vec![
        OddImage::new("sparse-old", [old_gnu(seed)]).oracles(Oracles::GnuTar),
        OddImage::new("sparse-pax-0-0", [pax_0_0(seed)]),
        OddImage::new("sparse-pax-0-1", [pax_0_1(seed)]),
        OddImage::new("sparse-pax-1-0", [pax_1_0(seed)]),
    ]
}

fn files() -> Vec<Sparse> {
    let sparse = |name, data: &[(u64, u64)], size_bytes| Sparse { name, data: data.to_vec(), size_bytes };
    vec![
        sparse("aligned", &[(0, 512), (4096, 1024), (65_536, 4096)], 69_632),
        sparse("unaligned", &[(1, 7), (600, 513), (5_000, 1), (10_000, 2_000)], 12_000),
        sparse("hole-at-end", &[(0, 700), (100_000, 0)], 100_000),
        sparse("hole-at-start", &[(99_999, 1)], 100_000),
        sparse("only-hole", &[(70_000, 0)], 70_000),
        sparse("no-hole", &[(0, 3_000)], 3_000),
        sparse("huge", &[(4_096, 512), (1 << 28, 513)], (1 << 28) + 1_000),
        Sparse { name: "many", data: (0..60).map(|index| (index * 1_536, 512)).collect(), size_bytes: 60 * 1_536 },
        Sparse {
            name: "many-odd",
            data: (0..60).map(|index| (index * 1_000, index + 1)).collect(),
            size_bytes: 60_000,
        },
    ]
}

impl Sparse {
    fn has_whole_blocks(&self) -> bool {
        let last = self.data.iter().rposition(|&(_, len)| len > 0).unwrap_or(0);
        self.data[..last].iter().all(|(_, len)| len.is_multiple_of(BLOCK_LEN_BYTES as u64))
    }

    /// The bytes that stand in the tar: all fragments, one after another.
    fn stored(&self, seed: u64) -> Vec<u8> {
        let len_bytes: u64 = self.data.iter().map(|&(_, len)| len).sum();
        ramp(seed ^ self.size_bytes, len_bytes as usize)
    }
}

fn old_gnu(seed: u64) -> Vec<u8> {
    let mut tarball = Tarball::new();
    // GNU tar pads every fragment to whole blocks, Go's reader none: what all agree on is what GNU tar writes, which
    // has whole blocks in all fragments but the last.
    for file in files().into_iter().filter(Sparse::has_whole_blocks) {
        let entry = Entry { data: file.stored(seed), ..Entry::new(b'S', file.name).dialect(Dialect::Gnu) };
        let mut block = header(&entry);
        let mut data = file.data.clone();
        // GNU tar closes a file that ends with a hole by an empty fragment, and misses that hole without one, whatever
        // the size in the header.
        if data.last().is_some_and(|(offset, len)| offset + len < file.size_bytes) {
            data.push((file.size_bytes, 0));
        }
        let (own, extended) = data.split_at(data.len().min(HEADER_FRAGMENTS));
        put_fragments(&mut block[FRAGMENTS_AT..IS_EXTENDED_AT], own);
        block[IS_EXTENDED_AT] = u8::from(!extended.is_empty());
        block[REAL_SIZE_AT..REAL_SIZE_AT + 11].copy_from_slice(format!("{:011o}", file.size_bytes).as_bytes());
        seal(&mut block);
        tarball.raw(&block);
        let count = extended.len().div_ceil(EXTENSION_FRAGMENTS);
        for (index, fragments) in extended.chunks(EXTENSION_FRAGMENTS).enumerate() {
            let mut block = [0; BLOCK_LEN_BYTES];
            put_fragments(&mut block[..504], fragments);
            block[504] = u8::from(index + 1 < count);
            tarball.raw(&block);
        }
        tarball.data(&entry.data);
    }
    tarball.add(&Entry::file("after", ramp(seed, 100)));
    tarball.finish()
}

fn put_fragments(field: &mut [u8], fragments: &[(u64, u64)]) {
    for (place, (offset, len)) in field.chunks_mut(24).zip(fragments) {
        place[..11].copy_from_slice(format!("{offset:011o}").as_bytes());
        place[12..23].copy_from_slice(format!("{len:011o}").as_bytes());
    }
}

fn pax_0_0(seed: u64) -> Vec<u8> {
    let entries = files().into_iter().map(|file| {
        let mut entry = Entry::file(file.name, file.stored(seed))
            .record("GNU.sparse.size", file.size_bytes.to_string())
            .record("GNU.sparse.numblocks", file.data.len().to_string());
        for (offset, len) in &file.data {
            entry = entry.record("GNU.sparse.offset", offset.to_string());
            entry = entry.record("GNU.sparse.numbytes", len.to_string());
        }
        entry
    });
    Tarball::of(entries.chain([Entry::file("after", ramp(seed, 100))]))
}

fn pax_0_1(seed: u64) -> Vec<u8> {
    let entries = files().into_iter().map(|file| {
        let map: Vec<String> = file.data.iter().map(|(offset, len)| format!("{offset},{len}")).collect();
        Entry::file(format!("GNUSparseFile.1/{}", file.name), file.stored(seed))
            .record("GNU.sparse.size", file.size_bytes.to_string())
            .record("GNU.sparse.numblocks", file.data.len().to_string())
            .record("GNU.sparse.map", map.join(","))
            .record("GNU.sparse.name", format!("dir/{}", file.name))
    });
    Tarball::of([Entry::directory("dir")].into_iter().chain(entries).chain([Entry::file("after", ramp(seed, 100))]))
}

fn pax_1_0(seed: u64) -> Vec<u8> {
    let entries = files().into_iter().map(|file| {
        let mut data = format!("{}\n", file.data.len()).into_bytes();
        for (offset, len) in &file.data {
            data.extend(format!("{offset}\n{len}\n").into_bytes());
        }
        data.resize(data.len().next_multiple_of(BLOCK_LEN_BYTES), 0);
        data.extend(file.stored(seed));
        Entry::file(format!("GNUSparseFile.2/{}", file.name), data)
            .record("GNU.sparse.major", "1")
            .record("GNU.sparse.minor", "0")
            .record("GNU.sparse.name", format!("dir/{}", file.name))
            .record("GNU.sparse.realsize", file.size_bytes.to_string())
    });
    Tarball::of([Entry::directory("dir")].into_iter().chain(entries).chain([Entry::file("after", ramp(seed, 100))]))
}
