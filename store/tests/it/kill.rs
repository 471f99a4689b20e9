//! `kill -9` at random points of filling, 200 rounds on the disk and 200 in memory.
//!
//! Each round starts this executable again as the victim. It opens the store, checks everything that the last victim
//! left against what that one had noted, then fills, reads, copies, syncs and evicts from several threads until it is
//! killed. The parent only counts the victim's progress and kills it after a random number of steps, also before its
//! first.
//!
//! Rounds take turns. In *strict* ones nothing is ever evicted, and the victim notes what it does, in a file, by
//! `write`, which a killed process does not take back: each chunk after its put, with the number of sync rounds that
//! had begun by then, and the end of each round. A chunk whose next round has ended must be there after the kill; so
//! what is lost was put since the last full round began: with the default settings, in the last second or two. In the
//! other rounds the budget is too small and evictions are asked for besides, so that kills fall between the bits and
//! the hole.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use hermes_image::ids::ChunkNo;
use hermes_store::{Layer, Read, Store, StoreConfig};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::harness::{kill_after, step};
use crate::ramp::Ramp;

const ROUNDS: u64 = 200;
const LAYERS: u32 = 4;
const CHUNKS: u32 = 96;
const WRITERS: u64 = 3;
/// Most steps before the kill; a full fill takes about 400.
const STEPS_MAX: u64 = 300;

/// A note has four words: its kind, a layer, a chunk or a round, sync rounds begun.
const NOTE_LEN: usize = 16;
const NOTE_PUT: u32 = 1;
const NOTE_ROUND: u32 = 2;

/// Layers with equal chunks at different places, so that there is something to copy, and sizes off every block.
fn ramps() -> Vec<Ramp> {
    (0..LAYERS)
        .map(|layer| {
            let chunks: Vec<(u32, u64)> = (0..CHUNKS)
                .map(|no| {
                    let content = if no % 3 == 0 { no + 1 } else { (layer + 1) * 1000 + no };
                    (content, [512, 12_288, 65_536, 3_072, 20_480][(no % 5) as usize])
                })
                .collect();
            Ramp::new(layer + 1, &chunks)
        })
        .collect()
}

fn config(dir: &Path, strict: bool) -> StoreConfig {
    let mut config = StoreConfig::new(dir.join("store"));
    config.budget_bytes = if strict { None } else { Some(5 << 20) };
    config.free_floor_bytes = 0;
    config.sync_interval_ms = 3;
    config.sync_bytes = 512 << 10;
    config
}

struct Notes(File);

impl Notes {
    fn open(dir: &Path) -> Self {
        let file = OpenOptions::new().create(true).append(true).open(dir.join("notes")).expect("the notes");
        Self(file)
    }

    fn write(&self, words: [u32; 4]) {
        let mut bytes = [0; NOTE_LEN];
        for (word, out) in words.iter().zip(bytes.chunks_exact_mut(4)) {
            out.copy_from_slice(&word.to_le_bytes());
        }
        (&self.0).write_all(&bytes).expect("a note");
    }

    /// The chunks that must be there: put before a round began that has ended.
    fn durable(dir: &Path) -> Vec<(u32, u32)> {
        let bytes = std::fs::read(dir.join("notes")).unwrap_or_default();
        let (mut puts, mut ended) = (BTreeMap::new(), 0);
        for note in bytes.chunks_exact(NOTE_LEN) {
            let word = |at: usize| u32::from_le_bytes([note[at], note[at + 1], note[at + 2], note[at + 3]]);
            match word(0) {
                // The first put counts: the later ones found it there.
                NOTE_PUT => {
                    puts.entry((word(4), word(8))).or_insert(word(12));
                }
                NOTE_ROUND => ended = ended.max(word(8)),
                kind => panic!("a note of kind {kind}"),
            }
        }
        puts.into_iter().filter(|(_, begun)| *begun < ended).map(|(chunk, _)| chunk).collect()
    }
}

fn check(layer: &Layer, ramp: &Ramp) {
    let hold = layer.present();
    ramp.check(
        &hold,
        |offset, buf| matches!(layer.read_at(offset, buf).expect("reads"), Read::Hit(len) if len == buf.len()),
    );
}

/// Opens the store and checks what the last victim left.
fn reopen(dir: &Path, ramps: &[Ramp], strict: bool) -> (Arc<Store>, Vec<Arc<Layer>>) {
    let store = Store::open(config(dir, strict)).expect("the store opens after every kill");
    assert!(store.recovery().dropped.is_empty() && store.recovery().cleared.is_empty(), "{:?}", store.recovery());
    let layers: Vec<_> = ramps.iter().map(|ramp| store.layer(&ramp.table).expect("a layer")).collect();
    for (layer, ramp) in layers.iter().zip(ramps) {
        check(layer, ramp);
        assert!(layer.verify_present().expect("verifies").is_empty());
    }
    for (layer, chunk) in Notes::durable(dir) {
        assert!(layers[layer as usize].contains(ChunkNo(chunk)), "chunk {chunk} of layer {layer} was durable");
    }
    (store, layers)
}

/// The victim. Does nothing unless it is one.
#[test]
fn victim() {
    let Ok(dir) = std::env::var("HERMES_STORE_VICTIM") else { return };
    let seed: u64 = std::env::var("HERMES_STORE_SEED").expect("a seed").parse().expect("a number");
    let (dir, strict) = (Path::new(&dir), seed.is_multiple_of(2));
    let ramps = ramps();
    step();
    let (store, layers) = reopen(dir, &ramps, strict);
    // From here on the notes are about this life.
    File::create(dir.join("notes")).expect("new notes");
    step();
    let notes = strict.then(|| Notes::open(dir));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (store, layers, ramps, notes) = (&store, &layers, &ramps, notes.as_ref());
                let mut random = SmallRng::seed_from_u64(seed * WRITERS + writer);
                scope.spawn(move || {
                    loop {
                        work(store, layers, ramps, notes, &mut random);
                    }
                })
            })
            .collect();
        let mut last = 0;
        loop {
            let ended = store.counters().sync_rounds_ended.get();
            if let Some(notes) = notes.as_ref().filter(|_| ended > last) {
                notes.write([NOTE_ROUND, 0, ended as u32, 0]);
            }
            last = ended;
            // A worker ends only by a failed check, or because the parent is gone.
            if workers.iter().any(|worker| worker.is_finished()) {
                std::process::exit(1);
            }
            std::thread::yield_now();
        }
    });
}

fn work(store: &Store, layers: &[Arc<Layer>], ramps: &[Ramp], notes: Option<&Notes>, random: &mut SmallRng) {
    let at = random.random_range(0..LAYERS);
    let (layer, ramp) = (&layers[at as usize], &ramps[at as usize]);
    let chunk = random.random_range(0..CHUNKS);
    let put = match random.random_range(0..20) {
        0..10 => layer.put(ChunkNo(chunk), &ramp.verified(chunk)).map(|()| chunk..chunk + 1),
        10..14 => {
            let run = chunk..(chunk + 8).min(CHUNKS);
            let chunks: Vec<_> = run.clone().map(|chunk| (ChunkNo(chunk), ramp.verified(chunk))).collect();
            layer.put_run(&chunks).map(|()| run)
        }
        14..16 => store.copy_local(layer, ChunkNo(chunk)).map(|copied| chunk..chunk + u32::from(copied)),
        16 => {
            check(layer, ramp);
            Ok(0..0)
        }
        17 if notes.is_none() => store.make_room(random.random_range(1..1_000_000)).map(|_| 0..0),
        18 => store.sync().map(|()| 0..0),
        _ => layer.sync().map(|()| 0..0),
    };
    let begun = store.counters().sync_rounds_begun.get() as u32;
    let put = put.expect("the store works");
    if let Some(notes) = notes {
        put.for_each(|chunk| notes.write([NOTE_PUT, at, chunk, begun]));
    }
    step();
}

fn kill_rounds(dir: &Path) {
    let dir = dir.to_str().expect("a readable path");
    let mut random = SmallRng::seed_from_u64(7);
    for round in 0..ROUNDS {
        // Few rounds die while they open, the others all over their filling.
        let steps = if round % 10 == 0 { random.random_range(0..3) } else { random.random_range(3..STEPS_MAX) };
        let settings = [("HERMES_STORE_VICTIM", dir), ("HERMES_STORE_SEED", &round.to_string())];
        kill_after(steps, "kill::victim", &settings);
    }
}

#[test]
fn killed_200_times_on_disk_nothing_is_wrong_and_nothing_durable_is_lost() {
    let dir = tempfile::tempdir().expect("a folder");
    kill_rounds(dir.path());
}

#[test]
fn killed_200_times_in_memory_nothing_is_wrong_and_nothing_durable_is_lost() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a folder on tmpfs");
    kill_rounds(dir.path());
}
