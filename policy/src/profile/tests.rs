use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hermes_image::ids::{ChunkId, ChunkNo, DiffId};
use hermes_image::index::chunks::{ChunkTable, ChunkTableBuilder};
use hermes_image::runs::Runs;
use proptest::collection::vec;
use proptest::prelude::*;

use super::codec::{decode, decode_record, decode_records, encode, encode_record, encode_records};
use super::paths::{FilePlace, PathMap};
use super::*;
use crate::geometry::LayerGeometry;

const CHUNK: u64 = 65_536;

fn layer(no: u8) -> DiffId {
    DiffId([no; 32])
}

fn layers(count: u8) -> Vec<DiffId> {
    (0..count).map(layer).collect()
}

fn touch(at_ms: u32, layer: u16, chunk: u32) -> FirstTouch {
    FirstTouch { at_ms, layer, chunk, waited: at_ms.is_multiple_of(2), source: TouchSource::Registry }
}

/// A start that reads `chunks` of layer 0 one after another.
fn start(ended_seconds: u64, chunks: impl IntoIterator<Item = u32>, step_ms: u32) -> StartRecord {
    let touches = (0..).zip(chunks).map(|(at, chunk)| touch(at * step_ms, 0, chunk)).collect();
    StartRecord::of(ended_seconds, layers(2), touches)
}

fn chunks_of(profile: &Profile) -> BTreeSet<(DiffId, u32)> {
    let steps = profile.steps.iter();
    steps.flat_map(|step| step.chunks.clone().map(|chunk| (profile.layers[usize::from(step.layer)], chunk))).collect()
}

fn order_of(profile: &Profile) -> Vec<u32> {
    profile.steps.iter().flat_map(|step| step.chunks.clone()).collect()
}

fn any_touches() -> impl Strategy<Value = Vec<FirstTouch>> {
    let one = (0_u32..START_MAX_MS + 10, 0_u16..4, 0_u32..200, any::<bool>(), 0_usize..4);
    let one = one.prop_map(|(at_ms, layer, chunk, waited, source)| {
        let source = TouchSource::ALL[source];
        FirstTouch { at_ms, layer, chunk, waited, source }
    });
    vec(one, 0..60)
}

fn any_record() -> impl Strategy<Value = StartRecord> {
    (1_000_000_u64..1_000_100, any_touches()).prop_map(|(at, touches)| StartRecord::of(at, layers(3), touches))
}

proptest! {
    #[test]
    fn a_record_keeps_the_first_touch_of_each_chunk(touches in any_touches()) {
        let record = StartRecord::of(7, layers(3), touches.clone());
        let mut first: BTreeMap<(u16, u32), u32> = BTreeMap::new();
        for touch in touches.iter().filter(|touch| touch.layer < 3 && touch.at_ms <= START_MAX_MS) {
            let at = first.entry((touch.layer, touch.chunk)).or_insert(touch.at_ms);
            *at = (*at).min(touch.at_ms);
        }
        let runs = record.touches().iter();
        let kept: BTreeMap<(u16, u32), u32> =
            runs.flat_map(|run| run.range().map(|chunk| ((run.layer, chunk), run.at_ms))).collect();
        prop_assert_eq!(record.chunk_count(), kept.len() as u64);
        prop_assert_eq!(kept, first);
        prop_assert!(record.touches().is_sorted_by_key(|touch| touch.at_ms));
    }

    #[test]
    fn records_and_profiles_survive_their_encoding(records in vec(any_record(), 0..5)) {
        for record in &records {
            prop_assert_eq!(&decode_record(&encode_record(record)), &Ok(record.clone()));
        }
        prop_assert_eq!(decode_records(&encode_records(&records)), Ok(records.clone()));
        if let Some(profile) = merge(&records) {
            let bytes = encode(&profile);
            prop_assert!(bytes.len() <= PROFILE_LEN_MAX_BYTES);
            prop_assert_eq!(decode(&bytes), Ok(profile));
        }
    }

    #[test]
    fn hostile_bytes_never_panic_and_have_one_encoding(mut bytes in vec(any::<u8>(), 0..80), kind in 0..4) {
        let magic: &[u8] = [b"HPRF\x01".as_slice(), b"HSTR\x01", b"HSTL\x01", b""][kind as usize];
        bytes.splice(0..0, magic.iter().copied());
        if let Ok(profile) = decode(&bytes) {
            prop_assert_eq!(encode(&profile), bytes.clone());
        }
        if let Ok(record) = decode_record(&bytes) {
            prop_assert_eq!(encode_record(&record), bytes.clone());
        }
        if let Ok(records) = decode_records(&bytes) {
            prop_assert_eq!(encode_records(&records), bytes);
        }
    }

    #[test]
    fn a_merge_does_not_depend_on_the_order(records in vec(any_record(), 1..6), rotate in 0_usize..6) {
        let mut turned = records.clone();
        turned.rotate_left(rotate % records.len());
        prop_assert_eq!(merge(&records), merge(&turned));
    }

    #[test]
    fn one_odd_run_has_no_effect(
        usual in vec(0_u32..500, 1..80), count in 3_usize..7, odd in any_touches(), at in 0_u64..9
    ) {
        let all: Vec<_> = (0..count).map(|no| start(1_000_003 + no as u64, usual.clone(), 7)).collect();
        let expected = merge(&all[1..]).expect("they read something");
        let mut with_odd = all[1..].to_vec();
        with_odd.push(StartRecord::of(1_000_000 + at, layers(2), odd));
        let profile = merge(&with_odd).expect("they read something");
        // With two usual ones and an odd one, two of three still say the same.
        let order = |profile: &Profile| chunks_of(profile);
        prop_assert_eq!(order(&profile), order(&expected));
    }
}

#[test]
fn a_profile_is_in_the_order_of_reading_whatever_the_speed() {
    let reading = [40, 41, 42, 900, 901, 7, 8, 300];
    let slow = start(10, reading, 1_000);
    let quick = start(11, reading, 3);
    let profile = merge(&[slow, quick]).expect("they read something");
    assert_eq!(order_of(&profile), reading);
    assert_eq!((profile.records, profile.newest_seconds), (2, 11));
    assert!(profile.steps.iter().all(|step| step.weight == 100));
    assert_eq!(profile.steps.len(), 4, "neighbours are one step: {profile:?}");
}

#[test]
fn what_few_read_is_left_out_and_old_records_have_no_say() {
    let day = 24 * 3600;
    let now = 1000 * day;
    let records: Vec<_> = (0..4).map(|no| start(now + no, [1, 2, 100 + no as u32], 5)).collect();
    let profile = merge(&records).expect("they read something");
    assert_eq!(order_of(&profile), [1, 2]);
    // Two of four, and of records that are long gone nothing.
    let mut records = records;
    records.push(start(now, [1, 2, 100], 5));
    assert_eq!(order_of(&merge(&records).expect("some")), [1, 2, 100]);
    let long_ago = (0..5).map(|no| start(now - 91 * day - no, [50, 60], 5));
    records.extend(long_ago);
    assert_eq!(order_of(&merge(&records).expect("some")), [1, 2, 100]);
    assert_eq!(keep_newest(records).len(), 5);
    assert_eq!(merge(&[]), None);
    assert_eq!(merge(&[start(1, [], 1)]), None);
}

#[test]
fn a_profile_is_cut_by_weight_to_its_bound() {
    // Every second chunk, so that nothing can be joined; what only half of the records have goes first.
    let all = |to: u32| (0..to).map(|no| touch(no, 0, no * 2)).collect::<Vec<_>>();
    let long = StartRecord::of(2, layers(1), all(16_000));
    let short = StartRecord::of(1, layers(1), all(6_000));
    assert!(encode_record(&long).len() <= RECORD_LEN_MAX_BYTES);
    let profile = merge(&[long, short]).expect("they read something");
    assert!(encode(&profile).len() <= PROFILE_LEN_MAX_BYTES);
    assert!(encode(&profile).len() > PROFILE_LEN_MAX_BYTES - 64, "no room is wasted");
    let full = profile.steps.iter().filter(|step| step.weight == 100).count();
    assert_eq!(full, 6_000);
    assert!(order_of(&profile).is_sorted(), "still in order");
    assert_eq!(decode(&encode(&profile)), Ok(profile));
}

#[test]
fn what_is_no_profile_is_named() {
    let good = encode(&merge(&[start(1, [1, 2, 9], 1)]).expect("some"));
    assert_eq!(decode(b"HPR"), Err(ProfileError::Magic("start profile")));
    assert_eq!(decode(b"HPRF\x03"), Err(ProfileError::Version(3)));
    let too_long = vec![0; PROFILE_LEN_MAX_BYTES + 1];
    assert!(matches!(decode(&too_long), Err(ProfileError::TooLong { .. })));
    assert_eq!(decode(&[good.as_slice(), &[0]].concat()), Err(ProfileError::Malformed("end")));
    for len in 6..good.len() {
        assert!(decode(&good[..len]).is_err(), "{len} bytes");
    }
    // The same chunk twice: the second step goes back over the first.
    let twice = Profile {
        records: 1,
        newest_seconds: 1,
        layers: layers(1),
        steps: [1..3, 2..4].map(|chunks| Step { layer: 0, chunks, at_ms: 0, weight: 1, spread_ms: 0 }).to_vec(),
        donors: Vec::new(),
    };
    assert!(matches!(decode(&encode(&twice)), Err(ProfileError::Malformed(_))));
}

fn table(no: u8, ids: &[u8]) -> ChunkTable {
    let mut builder = ChunkTableBuilder::default();
    for id in ids {
        builder.push(ChunkId([*id; 32]), CHUNK).expect("a chunk");
    }
    builder.finish(layer(no))
}

fn profile_of(layer_no: u8, chunks: &[u32]) -> Profile {
    let steps = chunks.iter().map(|chunk| Step {
        layer: 0,
        chunks: *chunk..*chunk + 1,
        at_ms: *chunk,
        weight: 100,
        spread_ms: 0,
    });
    let (layers, steps) = (vec![layer(layer_no)], steps.collect());
    Profile { records: 3, newest_seconds: 5, layers, steps, donors: Vec::new() }
}

#[test]
fn a_profile_is_carried_by_layer_by_name_and_by_path() {
    let (same, old, new) = (table(1, &[1, 2, 3]), table(2, &[10, 11, 12, 13]), table(3, &[13, 99, 11, 98, 97]));
    let mut profile = profile_of(1, &[2, 0]);
    profile.layers.push(layer(2));
    // Name 11 is now chunk 2, name 12 is gone but the file that it was of has a chunk there, name 10 is nowhere.
    let more = profile_of(2, &[1, 2, 0]).steps.into_iter().map(|step| Step { layer: 1, ..step });
    profile.steps.extend(more);
    let old_table = |id: DiffId| (id == layer(2)).then_some(&old);
    let file = |no, chunks| FilePlace { layer: layer(no), chunks };
    let paths = PathMap::new([(b"/a".as_slice(), file(2, 1..4))], [(b"/a".as_slice(), file(3, 2..5))]);
    let carried = carry_over(&profile, old_table, &[&same, &new], &paths);
    let found: Vec<_> =
        carried.steps.iter().map(|step| (carried.layers[usize::from(step.layer)], step.chunks.clone())).collect();
    assert_eq!(found, [(layer(1), 2..3), (layer(1), 0..1), (layer(3), 2..3), (layer(3), 3..4)]);
    // Chunk 11 is with whoever has the old layer.
    let donor = Donor { layer: 1, diff_id: layer(2), table: old.id() };
    assert_eq!(carried.donors, [donor]);
    let encoded = encode(&carried);
    assert_eq!(decode(&encoded), Ok(carried));
    for len in 6..encoded.len() {
        assert!(decode(&encoded[..len]).is_err(), "{len} bytes");
    }
    // What the new image does not have is nowhere.
    let nothing = carry_over(&profile_of(2, &[0]), |_| None, &[&same], &PathMap::none());
    assert!(nothing.steps.is_empty() && nothing.layers.is_empty());
}

proptest! {
    #[test]
    fn an_image_carries_over_to_itself(chunks in vec(0_u32..50, 1..50), other in 0_u8..2) {
        let ids: Vec<u8> = (0..50).collect();
        let old = table(1, &ids);
        // The same chunks, in a layer of the same or of another name.
        let new = table(1 + other, &ids);
        let mut chunks = chunks;
        chunks.sort_unstable();
        chunks.dedup();
        let profile = profile_of(1, &chunks);
        let carried = carry_over(&profile, |_| Some(&old), &[&new], &PathMap::none());
        prop_assert_eq!(order_of(&carried), chunks);
        prop_assert!(carried.steps.is_empty() || carried.layers == [layer(1 + other)]);
    }

    #[test]
    fn a_carried_profile_names_what_exists_and_each_once(
        old_ids in vec(0_u8..20, 1..30), new_ids in vec(0_u8..20, 1..30), chunks in vec(0_u32..40, 0..40)
    ) {
        let (old, new) = (table(1, &old_ids), table(2, &new_ids));
        let mut chunks = chunks;
        chunks.sort_unstable();
        chunks.dedup();
        let id = |_: DiffId, chunk: u32| (chunk < old.count()).then(|| old.chunk_id(ChunkNo(chunk)));
        let carried = carry_over(&profile_of(1, &chunks), |_| Some(&old), &[&new], &PathMap::none());
        for chunk in order_of(&carried) {
            prop_assert!(chunk < new.count());
            prop_assert!(chunks.iter().any(|old| id(layer(1), *old) == Some(new.chunk_id(ChunkNo(chunk)))));
        }
        // What one has of the names that the profile means, the other gets.
        let names: BTreeSet<_> = chunks.iter().filter_map(|chunk| id(layer(1), *chunk)).collect();
        let there: BTreeSet<_> = (0..new.count()).map(|chunk| new.chunk_id(ChunkNo(chunk))).collect();
        let got: BTreeSet<_> = order_of(&carried).into_iter().map(|chunk| new.chunk_id(ChunkNo(chunk))).collect();
        prop_assert_eq!(got, names.intersection(&there).copied().collect());
        prop_assert_eq!(chunks_of(&carried).len() as u64, carried.chunk_count());
    }
}

#[test]
fn a_path_means_its_last_file_and_few_places() {
    let file = |no, chunks| FilePlace { layer: layer(no), chunks };
    let names: Vec<Vec<u8>> = (0_u8..20).map(|no| vec![b'/', no]).collect();
    let old = names.iter().map(|name| (name.as_slice(), file(1, 5..6)));
    let new = (0_u32..).zip(&names).map(|(no, name)| (name.as_slice(), file(2, no..no + 1)));
    let map = PathMap::new(old, new);
    assert_eq!(map.places(layer(1), 5).len(), 4, "a chunk of many small files leads to few places");
    assert!(map.places(layer(1), 6).is_empty() && map.places(layer(9), 5).is_empty());
    let twice = [(b"/a".as_slice(), file(2, 0..1)), (b"/a".as_slice(), file(3, 7..8))];
    let map = PathMap::new([(b"/a".as_slice(), file(1, 0..3))], twice);
    assert_eq!(map.places(layer(1), 0), [(layer(3), 7)]);
    assert!(map.places(layer(1), 1).is_empty(), "the new file is shorter");
}

fn geometry(chunks: usize) -> Arc<LayerGeometry> {
    Arc::new(LayerGeometry::new(vec![CHUNK; chunks]).expect("a layer"))
}

fn prefetch(profile: &Profile, limits: PrefetchLimits) -> Prefetch {
    Prefetch::new(profile, &BTreeMap::from([(layer(0), geometry(4096))]), limits)
}

fn whole(chunks: std::ops::Range<u32>) -> Profile {
    let steps = vec![Step { layer: 0, chunks, at_ms: 0, weight: 100, spread_ms: 0 }];
    Profile { records: 1, newest_seconds: 0, layers: layers(1), steps, donors: Vec::new() }
}

#[test]
fn requests_begin_small_and_grow_and_the_flight_is_bounded() {
    let limits = PrefetchLimits::default();
    let mut prefetch = prefetch(&whole(0..3000), limits);
    let all = |_: DiffId, chunks| Runs::one(chunks);
    let mut sizes = Vec::new();
    let mut under_way = std::collections::VecDeque::new();
    let mut expected = 0;
    while prefetch.state() == PrefetchState::Running || !under_way.is_empty() {
        let batches = prefetch.next(all);
        if batches.is_empty() {
            let ended = under_way.pop_front().expect("something is under way when nothing is asked for");
            prefetch.ended(ended);
            prefetch.saw(Seen { chunks: 1, in_profile: 1, used_bytes: u64::from(expected) * CHUNK });
            continue;
        }
        for batch in batches {
            assert_eq!(batch.chunks.first().map(|run| run.start), Some(expected), "in the profile's order");
            expected = batch.chunks.iter().last().expect("some").end;
            sizes.push(batch.bytes);
            under_way.push_back(batch.bytes);
        }
        assert!(under_way.iter().sum::<u64>() <= limits.flight_bytes + limits.batch_bytes);
    }
    assert_eq!(expected, 3000);
    assert_eq!(sizes[..8], [limits.first_batch_bytes; 8]);
    assert_eq!(sizes.iter().max(), Some(&limits.batch_bytes));
    assert_eq!(prefetch.state(), PrefetchState::Done);
}

#[test]
fn what_is_here_or_does_not_exist_is_not_asked_for() {
    let mut profile = whole(10..20);
    let beyond = Step { layer: 0, chunks: 4090..CHUNKS_BEYOND, at_ms: 1, weight: 100, spread_ms: 0 };
    profile.steps.push(beyond);
    profile.layers.push(layer(9));
    profile.steps.push(Step { layer: 1, chunks: 0..5, at_ms: 2, weight: 100, spread_ms: 0 });
    let mut prefetch = prefetch(&profile, PrefetchLimits::default());
    assert_eq!(prefetch.chunks()[&layer(0)], Runs::from_iter([10..20, 4090..4096]));
    let missing = |_: DiffId, chunks: ChunkRange| Runs::one(chunks).difference(&Runs::one(12..18));
    let batches = std::iter::from_fn(|| Some(prefetch.next(missing)).filter(|batches| !batches.is_empty()));
    let asked: Runs = batches.flatten().flat_map(|batch| batch.chunks.iter().collect::<Vec<_>>()).collect();
    assert_eq!(asked, Runs::from_iter([10..12, 18..20, 4090..4096]));
    assert_eq!(prefetch.state(), PrefetchState::Done);
}

const CHUNKS_BEYOND: u32 = 5000;

#[test]
fn a_start_that_reads_something_else_ends_it() {
    let limits = PrefetchLimits::default();
    let mut prefetch = prefetch(&whole(0..3000), limits);
    let all = |_: DiffId, chunks| Runs::one(chunks);
    assert!(!prefetch.next(all).is_empty());
    prefetch.saw(Seen { chunks: limits.judged_after_chunks - 1, in_profile: 0, used_bytes: 0 });
    assert_eq!(prefetch.state(), PrefetchState::Running, "too early to say");
    prefetch.saw(Seen { chunks: 100, in_profile: 25, used_bytes: 0 });
    assert_eq!(prefetch.state(), PrefetchState::Running);
    prefetch.saw(Seen { chunks: 101, in_profile: 25, used_bytes: 0 });
    assert_eq!(prefetch.state(), PrefetchState::PoorUse);
    assert!(prefetch.next(all).is_empty());
}

#[test]
fn nobody_reads_and_little_is_fetched() {
    let limits = PrefetchLimits { ahead_bytes: 8 << 20, ..PrefetchLimits::default() };
    let mut prefetch = prefetch(&whole(0..3000), limits);
    let mut fetched = 0;
    let all = |_: DiffId, chunks| Runs::one(chunks);
    let mut drain = |prefetch: &mut Prefetch| {
        loop {
            let batches = prefetch.next(all);
            if batches.is_empty() {
                return fetched;
            }
            for batch in batches {
                fetched += batch.bytes;
                prefetch.ended(batch.bytes);
            }
        }
    };
    let alone = drain(&mut prefetch);
    assert!((8 << 20..12 << 20).contains(&alone), "{alone} bytes for nobody");
    prefetch.saw(Seen { chunks: 50, in_profile: 50, used_bytes: 4 << 20 });
    let read = drain(&mut prefetch);
    assert!(read > alone && read < alone + (8 << 20), "{read} bytes, {alone} before");
}

#[test]
fn own_starts_win_once_they_are_enough() {
    let with = |records| Some(Profile { records, ..whole(0..1) });
    let chosen = |own, given| choose(own, given).map(|profile| profile.records);
    assert_eq!(chosen(with(1), with(8)), Some(8));
    assert_eq!(chosen(with(3), with(200)), Some(3));
    assert_eq!(chosen(with(2), with(1)), Some(2));
    assert_eq!(chosen(None, with(1)), Some(1));
    assert_eq!(chosen(with(1), None), Some(1));
    assert_eq!(choose(None, None), None);
}
