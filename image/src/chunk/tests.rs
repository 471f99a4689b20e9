use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::ids::ChunkId;
use crate::index::chunks::CHUNK_LEN_MAX_BYTES;

const KIB: u64 = 1024;

/// A row of entries: (path, length of headers, length of data, regular file).
type Entries = Vec<(String, u64, u64, bool)>;

/// The cuts of a stream with `entries` and then `trailing` bytes, told as if it came `portion` bytes at a time.
fn cuts_of(entries: &Entries, trailing: u64, portion: u64) -> Vec<u64> {
    let (mut cutter, mut cuts) = (Cutter::default(), Vec::new());
    let (mut at, mut walked) = (0, 0);
    for (path, header_len, data_len, regular) in entries {
        let data_start = at + header_len;
        // Portions that end before the headers do are walked without the entry.
        while walked + portion < data_start {
            walked += portion;
            cutter.walked(walked, &mut cuts);
        }
        let shape = EntryShape { data_start, stored_len_bytes: *data_len, regular: *regular, path: path.as_bytes() };
        cutter.entry(shape, &mut cuts);
        at = data_start + data_len.next_multiple_of(512);
    }
    let end = at + trailing;
    while walked + portion < end {
        walked += portion;
        cutter.walked(walked, &mut cuts);
    }
    cutter.finish(end, &mut cuts);
    cuts
}

fn lens(cuts: &[u64]) -> Vec<u64> {
    std::iter::once(&0).chain(cuts).zip(cuts).map(|(start, end)| end - start).collect()
}

fn file(len: u64) -> (String, u64, u64, bool) {
    (format!("file-{len}"), 512, len, true)
}

#[test]
fn big_files_are_cut_from_their_own_start() {
    let cases: &[(u64, &[u64])] = &[
        (64 * KIB - 1, &[64 * KIB + 512 + 1024]),
        (64 * KIB, &[512, 64 * KIB, 1024]),
        (64 * KIB + 1, &[512, 64 * KIB + 512, 1024]),
        (96 * KIB - 512, &[512, 96 * KIB - 512, 1024]),
        (96 * KIB - 511, &[512, 64 * KIB, 32 * KIB, 1024]),
        (96 * KIB, &[512, 64 * KIB, 32 * KIB, 1024]),
        (128 * KIB, &[512, 64 * KIB, 64 * KIB, 1024]),
        (128 * KIB + 10, &[512, 64 * KIB, 64 * KIB + 512, 1024]),
        (300 * KIB, &[512, 64 * KIB, 64 * KIB, 64 * KIB, 64 * KIB, 44 * KIB, 1024]),
    ];
    for (len, expected) in cases {
        assert_eq!(lens(&cuts_of(&vec![file(*len)], 1024, 4096)), *expected, "a file of {len}");
    }
}

#[test]
fn long_headers_other_data_and_trailing_bytes_are_runs() {
    let long_header = vec![("x".to_owned(), 300 * KIB, 100, true)];
    assert_eq!(lens(&cuts_of(&long_header, 0, 512)), [64 * KIB, 64 * KIB, 64 * KIB, 64 * KIB, 44 * KIB + 512]);
    let before_big = vec![("x".to_owned(), 100 * KIB, 70 * KIB, true)];
    assert_eq!(lens(&cuts_of(&before_big, 0, 512)), [64 * KIB, 36 * KIB, 70 * KIB]);
    let odd_kind = vec![("x".to_owned(), 512, 200 * KIB, false)];
    assert_eq!(lens(&cuts_of(&odd_kind, 0, 512)), [64 * KIB, 64 * KIB, 72 * KIB + 512]);
    assert_eq!(lens(&cuts_of(&vec![file(1)], 200 * KIB, 512)), [1024, 64 * KIB, 64 * KIB, 72 * KIB]);
    assert_eq!(lens(&cuts_of(&vec![file(1)], 10 * KIB, 512)), [11 * KIB]);
    assert!(cuts_of(&vec![], 0, 512).is_empty());
    assert_eq!(cuts_of(&vec![], 700, 512), [700]);
}

#[test]
fn an_inserted_file_changes_few_chunks() {
    let mut entries: Entries = (0..3000)
        .map(|i| (format!("usr/lib/thing/{i}.py"), 512, [800, 3000, 12_000, 500, 90_000][i % 5] + i as u64, true))
        .collect();
    // Chunks as their bytes would make them: each unit is told by its path and place in it.
    let ids = |entries: &Entries| {
        let cuts = cuts_of(entries, 1024, 1 << 18);
        let mut text = String::new();
        let (mut at, mut next, mut ids) = (0, 0, HashSet::new());
        for (path, header_len, data_len, _) in entries {
            let end = at + header_len + data_len.next_multiple_of(512);
            while next < cuts.len() && cuts[next] <= end {
                text.push_str(&format!("{path}<{};", cuts[next] - at));
                ids.insert(ChunkId::of(text.as_bytes()));
                text.clear();
                next += 1;
            }
            text.push_str(&format!("{path}+{};", end - at));
            at = end;
        }
        ids
    };
    let before = ids(&entries);
    for (at, len) in [(1500, 2000), (10, 200_000), (2999, 512)] {
        entries.insert(at, (format!("inserted-{at}"), 512, len, true));
        let after = ids(&entries);
        let changed = after.difference(&before).count();
        assert!(changed <= 12, "{changed} of {} chunks changed by a file of {len} at {at}", after.len());
        entries.remove(at);
    }
}

fn any_entries() -> impl Strategy<Value = Entries> {
    let header =
        prop_oneof![9 => Just(512_u64), 2 => (1_u64..6).prop_map(|n| n * 512), 1 => (1_u64..700).prop_map(|n| n * 512)];
    let data = prop_oneof![6 => 0_u64..8000, 3 => 0_u64..150_000, 1 => 0_u64..700_000];
    let regular = prop_oneof![9 => Just(true), 1 => Just(false)];
    proptest::collection::vec(("[a-z]{1,8}", header, data, regular), 0..60)
}

proptest! {
    #[test]
    fn cuts_do_not_depend_on_portions_and_keep_the_limits(entries in any_entries(), trailing in 0_u64..300_000) {
        let cuts = cuts_of(&entries, trailing, 1 << 40);
        for portion in [512, 10_240, 65_536, 262_144] {
            prop_assert_eq!(&cuts_of(&entries, trailing, portion), &cuts);
        }
        let end = trailing + entries.iter().map(|(_, header, data, _)| header + data.next_multiple_of(512)).sum::<u64>();
        prop_assert_eq!(cuts.last().copied().unwrap_or(0), end);
        for (at, len) in cuts.iter().zip(lens(&cuts)) {
            prop_assert!(*at == end || at.is_multiple_of(512));
            prop_assert!(len > 0 && len <= 96 * KIB && len <= CHUNK_LEN_MAX_BYTES);
        }
        let mut at = 0;
        for (_, header, data, regular) in &entries {
            if *regular && *data >= OWN_CHUNK_LEN_BYTES {
                let (start, file_end) = (at + header, at + header + data.next_multiple_of(512));
                prop_assert!(start == 0 || cuts.contains(&start));
                prop_assert!(cuts.contains(&file_end));
            }
            at += header + data.next_multiple_of(512);
        }
    }

    #[test]
    fn nonsense_positions_never_panic(
        entries in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 0..8),
        end in 0_u64..10_000_000,
    ) {
        let (mut cutter, mut cuts) = (Cutter::default(), Vec::new());
        for (data_start, stored_len_bytes, regular) in entries {
            let data_start = data_start % 20_000_000;
            cutter.walked(data_start.min(end), &mut cuts);
            let shape = EntryShape { data_start, stored_len_bytes: stored_len_bytes >> 40, regular, path: b"x" };
            cutter.entry(shape, &mut cuts);
        }
        cutter.finish(end, &mut cuts);
        prop_assert!(cuts.is_sorted());
    }

    #[test]
    fn the_chunker_gives_the_bytes_between_the_cuts(
        entries in any_entries(),
        trailing in 0_u64..100_000,
        portion in 1_usize..300_000,
    ) {
        let end = trailing + entries.iter().map(|(_, header, data, _)| header + data.next_multiple_of(512)).sum::<u64>();
        let stream: Vec<u8> = (0..end).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect();
        let (mut chunker, mut chunks) = (Chunker::default(), Vec::new());
        let (mut next, mut next_start, mut walked) = (0, 0, 0);
        for piece in stream.chunks(portion) {
            walked += piece.len() as u64;
            while let Some((path, header, data, regular)) = entries.get(next)
                && next_start + header <= walked
            {
                let data_start = next_start + header;
                chunker.entry(EntryShape { data_start, stored_len_bytes: *data, regular: *regular, path: path.as_bytes() });
                next_start = data_start + data.next_multiple_of(512);
                next += 1;
            }
            chunker.push(Bytes::copy_from_slice(piece), &mut chunks);
            prop_assert!(chunker.waiting_len_bytes() <= 300 * KIB);
        }
        chunker.finish(&mut chunks);
        let ends: Vec<u64> = chunks.iter().scan(0, |at, chunk| { *at += chunk.len() as u64; Some(*at) }).collect();
        prop_assert_eq!(ends, cuts_of(&entries, trailing, 1 << 40));
        prop_assert!(chunks.concat() == stream);
    }
}
