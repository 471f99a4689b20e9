//! The store against a model, with crashes.
//!
//! The model knows for each chunk whether it was ever put, and whether it must still be there. A crash drops the store
//! without a last sync, and then does what power loss may do to bytes that never reached the disk: everything that is
//! not durable is overwritten with rubbish, and unwritten artifacts appear half-made. What is reported present after
//! that must have the right bytes.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use hermes_image::ids::ChunkNo;
use hermes_image::runs::Runs;
use proptest::prelude::*;

use crate::testing::{Fixture, Ramp, check};
use crate::{Layer, LayerUse, Store, StoreError};

const LAYERS: u32 = 3;
const CHUNKS: u32 = 40;

#[derive(Debug, Clone)]
enum Op {
    Put(u32, u32),
    PutRun(u32, u32, u32),
    Read(u32, u64, usize),
    Copy(u32, u32),
    Sync,
    SyncLayer(u32),
    Hold(u32),
    Release(u32),
    MakeRoom(u64),
    RemoveLayer(u32),
    Reopen,
    Crash,
    Rot(u32, u32),
}

fn op() -> impl Strategy<Value = Op> {
    let layer = 0..LAYERS;
    let chunk = 0..CHUNKS;
    prop_oneof![
        8 => (layer.clone(), chunk.clone()).prop_map(|(layer, chunk)| Op::Put(layer, chunk)),
        6 => (layer.clone(), chunk.clone(), 1..20_u32).prop_map(|(layer, first, len)| Op::PutRun(layer, first, len)),
        6 => (layer.clone(), 0..400_000_u64, 1..200_000_usize).prop_map(|(layer, at, len)| Op::Read(layer, at, len)),
        4 => (layer.clone(), chunk.clone()).prop_map(|(layer, chunk)| Op::Copy(layer, chunk)),
        3 => Just(Op::Sync),
        2 => layer.clone().prop_map(Op::SyncLayer),
        2 => layer.clone().prop_map(Op::Hold),
        2 => layer.clone().prop_map(Op::Release),
        3 => (1..800_000_u64).prop_map(Op::MakeRoom),
        1 => layer.clone().prop_map(Op::RemoveLayer),
        1 => Just(Op::Reopen),
        3 => Just(Op::Crash),
        1 => (layer, chunk).prop_map(|(layer, chunk)| Op::Rot(layer, chunk)),
    ]
}

/// Layers that share contents: 0 and 1 have equal halves, 2 repeats itself.
fn ramps() -> Vec<Ramp> {
    let lens = [512, 4096, 65536, 1024, 8192, 1536];
    let len = |no: u32| lens[no as usize % lens.len()];
    (0..LAYERS)
        .map(|layer| {
            let content = |no: u32| match layer {
                0 => no,
                1 if no < CHUNKS / 2 => no,
                1 => 1000 + no,
                _ => 2000 + no % (lens.len() as u32 * 3),
            };
            let chunks: Vec<(u32, u64)> = (0..CHUNKS).map(|no| (content(no) + 1, len(no))).collect();
            Ramp::new(layer + 1, &chunks)
        })
        .collect()
}

struct World {
    fixture: Fixture,
    store: Option<Arc<Store>>,
    ramps: Vec<Ramp>,
    layers: Vec<Arc<Layer>>,
    held: BTreeMap<u32, LayerUse>,
    /// Present for readers.
    present: Vec<Runs>,
    /// Present after a crash.
    durable: Vec<Runs>,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            fixture: Fixture::new(),
            store: None,
            ramps: ramps(),
            layers: Vec::new(),
            held: BTreeMap::new(),
            present: vec![Runs::new(); LAYERS as usize],
            durable: vec![Runs::new(); LAYERS as usize],
        };
        world.open();
        world
    }

    fn open(&mut self) {
        let store = self.fixture.open();
        self.layers = self.ramps.iter().map(|ramp| store.layer(&ramp.table).expect("a layer")).collect();
        self.store = Some(store);
    }

    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().expect("open between operations")
    }

    fn crash(&mut self) {
        self.held.clear();
        let paths: Vec<_> = self.layers.iter().map(|layer| layer.path().to_path_buf()).collect();
        self.layers.clear();
        Store::abandon(self.store.take().expect("open"));
        for (layer, path) in paths.iter().enumerate() {
            let file = std::fs::OpenOptions::new().write(true).open(path).expect("its file");
            let table = &self.ramps[layer].table;
            for chunk in (0..CHUNKS).filter(|chunk| !self.durable[layer].contains(*chunk)) {
                let range = table.range(ChunkNo(chunk));
                file.write_all_at(&vec![0xEE; (range.end - range.start) as usize], range.start).expect("writes");
            }
        }
        std::fs::write(self.fixture.config.dir.join("artifacts/.tmp-9-9"), b"half").expect("writes");
        self.present = self.durable.clone();
        self.open();
        let report = self.store().recovery();
        assert!(
            report.unclean && report.temporary_files == 1 && report.dropped.is_empty() && report.cleared.is_empty()
        );
    }

    /// What the store has must be what the model says.
    fn compare(&self) {
        for (at, layer) in self.layers.iter().enumerate() {
            assert_eq!(layer.present(), self.present[at], "layer {at}");
            assert_eq!(layer.missing(0..CHUNKS), Runs::one(0..CHUNKS).difference(&self.present[at]));
            assert_eq!(layer.present_bytes(), layer.bytes_of(&self.present[at]));
            assert_eq!(layer.is_complete(), self.present[at].chunk_count() == u64::from(CHUNKS));
            check(layer, &self.ramps[at]);
        }
    }

    /// Takes over what an eviction has left: it may take anything that is not held.
    fn after_eviction(&mut self) {
        for at in 0..LAYERS {
            let left = self.layers[at as usize].present();
            let gone = self.present[at as usize].difference(&left);
            assert!(left.difference(&self.present[at as usize]).is_empty(), "eviction added chunks");
            assert!(gone.is_empty() || !self.held.contains_key(&at), "a held layer was evicted");
            self.durable[at as usize].remove_all(&gone);
            self.present[at as usize] = left;
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Put(layer, chunk) => self.put(layer, chunk..chunk + 1),
            Op::PutRun(layer, first, len) => self.put(layer, first..(first + len).min(CHUNKS)),
            Op::Read(layer, at, len) => self.read(layer, at, len),
            Op::Copy(layer, chunk) => self.copy(layer, chunk),
            Op::Sync => {
                self.store().sync().expect("syncs");
                self.durable = self.present.clone();
            }
            Op::SyncLayer(layer) => {
                self.layers[layer as usize].sync().expect("syncs");
                self.durable[layer as usize] = self.present[layer as usize].clone();
            }
            Op::Hold(layer) => {
                self.held.insert(layer, self.layers[layer as usize].hold());
            }
            Op::Release(layer) => {
                self.held.remove(&layer);
            }
            Op::MakeRoom(bytes) => {
                let freed = self.store().make_room(bytes).expect("evicts");
                let before: u64 =
                    (0..).zip(&self.layers).map(|(at, layer): (usize, _)| layer.bytes_of(&self.present[at])).sum();
                self.after_eviction();
                let after: u64 = self.layers.iter().map(|layer| layer.present_bytes()).sum();
                assert_eq!(before - after, freed);
            }
            Op::RemoveLayer(layer) => self.remove(layer),
            Op::Reopen => {
                self.held.clear();
                self.layers.clear();
                self.store = None;
                self.durable = self.present.clone();
                self.open();
                assert!(!self.store().recovery().unclean);
            }
            Op::Crash => self.crash(),
            Op::Rot(layer, chunk) => self.rot(layer, chunk),
        }
    }

    fn put(&mut self, layer: u32, chunks: std::ops::Range<u32>) {
        let ramp = &self.ramps[layer as usize];
        let given: Vec<_> = chunks.clone().map(|chunk| (ChunkNo(chunk), ramp.verified(chunk))).collect();
        self.layers[layer as usize].put_run(&given).expect("puts");
        self.present[layer as usize].insert(chunks);
    }

    fn read(&mut self, layer: u32, at: u64, len: usize) {
        let ramp = &self.ramps[layer as usize];
        let mut buf = vec![0; len];
        let end = ramp.table.logical_len_bytes().min(at + len as u64);
        let needed = Runs::one(ramp.table.covering(at..end)).difference(&self.present[layer as usize]);
        match self.layers[layer as usize].read_at(at, &mut buf).expect("reads") {
            crate::Read::Hit(hit) => {
                assert!(needed.is_empty());
                assert_eq!(hit as u64, end.saturating_sub(at));
            }
            crate::Read::Miss(missing) => assert_eq!(missing, needed),
        }
    }

    fn copy(&mut self, layer: u32, chunk: u32) {
        let id = self.ramps[layer as usize].table.chunk_id(ChunkNo(chunk));
        let somewhere = (0..LAYERS as usize)
            .any(|at| self.present[at].chunks().any(|other| self.ramps[at].table.chunk_id(ChunkNo(other)) == id));
        let local = self.store().local_runs(&self.layers[layer as usize]).expect("looks");
        assert_eq!(local.contains(chunk), somewhere && !self.present[layer as usize].contains(chunk));
        let copied = self.store().copy_local(&self.layers[layer as usize], ChunkNo(chunk)).expect("copies");
        assert_eq!(copied, somewhere);
        if copied {
            self.present[layer as usize].insert(chunk..chunk + 1);
        }
    }

    fn remove(&mut self, layer: u32) {
        let diff_id = self.ramps[layer as usize].table.diff_id();
        match self.store().remove_layer(diff_id) {
            Ok(removed) => {
                assert!(removed && !self.held.contains_key(&layer));
                let old = &self.layers[layer as usize];
                assert!(old.present().is_empty());
                assert!(matches!(old.write_uses(), Ok(())));
                self.present[layer as usize] = Runs::new();
                self.durable[layer as usize] = Runs::new();
                let again = self.store().layer(&self.ramps[layer as usize].table).expect("registers again");
                self.layers[layer as usize] = again;
            }
            Err(StoreError::LayerInUse { .. }) => assert!(self.held.contains_key(&layer)),
            Err(error) => panic!("{error}"),
        }
    }

    /// Damages a chunk on disk: nobody may be given it as that chunk.
    fn rot(&mut self, layer: u32, chunk: u32) {
        if !self.present[layer as usize].contains(chunk) {
            return;
        }
        let layer_file = &self.layers[layer as usize];
        let range = layer_file.table().range(ChunkNo(chunk));
        layer_file.file().write_all_at(b"rot", range.start + 7).expect("writes");
        assert_eq!(layer_file.verify_present().expect("checks"), Runs::one(chunk..chunk + 1));
        self.present[layer as usize].remove(chunk..chunk + 1);
        self.durable[layer as usize].remove(chunk..chunk + 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn what_is_present_is_right_whatever_happens(ops in proptest::collection::vec(op(), 1..60)) {
        let mut world = World::new();
        for op in ops {
            world.apply(op);
            world.compare();
        }
    }
}
