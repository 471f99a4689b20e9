//! Other systems in the same world: containerd, preloading, SOCI, Spegel, Dragonfly and Kraken.
//!
//! A pod lands, its node wants the blobs of the image's layers, and [`World::look`] asks for what can be asked for: pieces of
//! some layers at once, from whom the strategy's way says (`choose`). A transfer is a flow over the same links as everything
//! else (`transfer`), from the registry with its refusals and outages, or from another host. Whole layers are unpacked one
//! after the other; when all are, the program reads, as with Hermes. `lazy` reads spans on demand instead.
//!
//! | module | what |
//! |---|---|
//! | `state` | what a node keeps |
//! | `choose` | whom pieces are asked of |
//! | `transfer` | pieces on their way, and what becomes of a failure |
//! | `lazy` | spans on demand |
//!
//! Parameters and sources: [`crate::strategy::model`].

mod choose;
mod lazy;
pub(crate) mod state;
mod transfer;

use hermes_image::runs::Runs;

use super::{Happening, World};
use crate::queue::Nanos;
use crate::strategy::Strategy;
use crate::strategy::model::{Model, UNIT_BYTES, hosts, model};
use crate::units::Rate;

use state::{Blob, Pieces, Rival, Swarm};

/// Something that happens to a node of a model.
#[derive(Debug)]
pub(crate) enum Step {
    /// It looks at what can be asked for.
    Look,
    /// A request has reached whoever is to answer it.
    Begins { transfer: u64 },
    /// A unit has come.
    Unit { transfer: u64, len_bytes: u32, last: bool },
    /// Whether a transfer was silent for too long.
    Silent { transfer: u64 },
    /// A transfer cannot be.
    Fails { transfer: u64 },
    /// A search for a layer has ended.
    Searched { layer: u16 },
    /// The scheduler or the tracker answers.
    Named { layer: u16 },
    /// A host is gone.
    Lost { host: u32 },
    /// A layer is unpacked.
    Unpacked { layer: u16 },
    /// A span is decoded.
    Decoded { layer: u16, span: u32 },
    /// A span whose request failed is asked for again.
    Again { layer: u16, span: u32 },
}

/// What the models know together.
#[derive(Debug, Default)]
pub(crate) struct Rivals {
    pub(crate) swarms: Vec<Swarm>,
    /// Spans of the lazy model, by layer: spans of the shape that make one.
    pub(crate) spans: Vec<Vec<std::ops::Range<u32>>>,
}

impl Rivals {
    pub(crate) fn new(strategy: Strategy, shape: &crate::shape::Shape) -> Self {
        if strategy.is_policy() {
            return Self::default();
        }
        let swarms = shape.layers.iter().map(|_| Swarm::default()).collect();
        let spans = if strategy == Strategy::Soci { lazy::spans(shape) } else { Vec::new() };
        Self { swarms, spans }
    }
}

/// The speed of a node's card each way under a strategy.
pub(crate) fn card(strategy: Strategy, nic: Rate, upload: Rate) -> (Rate, Rate) {
    match model(strategy).and_then(|model| model.limit) {
        Some((up, down)) => (upload.min(up), nic.min(down)),
        None => (upload, nic),
    }
}

impl World {
    pub(super) fn model(&self) -> &'static Model {
        model(self.strategy()).expect("it is asked for by models only")
    }

    pub(super) fn strategy(&self) -> Strategy {
        self.scenario.cluster.strategy
    }

    /// Whether it is a host beside the nodes.
    pub(super) fn is_host(&self, no: u32) -> bool {
        no >= self.scenario.cluster.nodes
    }

    /// Lets the hosts beside the nodes run.
    pub(super) fn begin_hosts(&mut self) {
        for host in 0..hosts(self.strategy()) {
            let no = self.scenario.cluster.nodes + host;
            let node = &mut self.nodes[no as usize];
            (node.up, node.zone) = (true, 0);
            self.rival_of(no);
        }
    }

    /// What a node of a model keeps, made when it is first needed.
    pub(super) fn rival_of(&mut self, no: u32) -> &mut Rival {
        if self.nodes[no as usize].rival.is_none() {
            let model = self.model();
            let blobs = self.shape.layers.iter().map(|layer| {
                let spans = layer.geometry.span_count().unwrap_or(0);
                let bytes = layer.geometry.span_bytes(&(0..spans));
                let len_bytes = (bytes.end - bytes.start).max(1);
                let piece_bytes = match model.pieces {
                    Some((least, most)) => least.max(len_bytes.div_ceil(most)),
                    None => len_bytes,
                };
                let piece_count = u32::try_from(len_bytes.div_ceil(piece_bytes)).unwrap_or(u32::MAX - 1);
                Blob {
                    len_bytes,
                    piece_bytes,
                    piece_count,
                    have: Pieces::none_of(piece_count),
                    under_way: Pieces::none_of(piece_count),
                    rarity: vec![0; piece_count as usize],
                    ..Blob::default()
                }
            });
            let rival = Rival { blobs: blobs.collect(), ..Rival::default() };
            self.nodes[no as usize].rival = Some(Box::new(rival));
        }
        self.nodes[no as usize].rival.as_deref_mut().expect("it was just made")
    }

    /// The node has these layers already.
    pub(super) fn has_layers(&mut self, no: u32, layers: std::ops::Range<usize>) {
        if !self.strategy().is_eager() {
            return;
        }
        for place in layers {
            let blob = &mut self.rival_of(no).blobs[place];
            blob.have = Pieces::all_of(blob.piece_count);
            blob.unpacked = true;
            let swarm = &mut self.rivals.swarms[place];
            swarm.providers.push(no);
            swarm.members.push(no);
            self.rival_of(no).blobs[place].registered = true;
        }
    }

    /// The node wants the image.
    pub(super) fn pull(&mut self, no: u32) {
        for place in self.places(no) {
            self.rival_of(no).blobs[place].wanted = true;
        }
        self.plan_look(no, self.queue.now());
        self.image_comes(no);
    }

    /// Plans a look for `at`, unless there is an earlier one.
    pub(super) fn plan_look(&mut self, no: u32, at: Nanos) {
        let life = self.nodes[no as usize].life;
        let rival = self.rival_of(no);
        if rival.looks_at.is_none_or(|planned| planned > at) {
            rival.looks_at = Some(at);
            self.queue.at(at, Happening::Rival { node: no, life, step: Step::Look });
        }
    }

    pub(super) fn rival_step(&mut self, no: u32, step: Step) {
        match step {
            Step::Look => self.look(no),
            Step::Begins { transfer } => self.transfer_begins(no, transfer),
            Step::Unit { transfer, len_bytes, last } => self.unit_came(no, transfer, len_bytes, last),
            Step::Silent { transfer } => self.transfer_silent(no, transfer),
            Step::Fails { transfer } => self.transfer_failed(no, transfer, None),
            Step::Searched { layer } => self.searched(no, layer),
            Step::Named { layer } => self.named(no, layer),
            Step::Lost { host } => self.host_lost(no, host),
            Step::Unpacked { layer } => self.unpacked(no, layer),
            Step::Decoded { layer, span } => self.decoded(no, layer, span),
            Step::Again { layer, span } => self.span_again(no, layer, span),
        }
    }

    /// Asks for what can be asked for now.
    fn look(&mut self, no: u32) {
        let now = self.queue.now();
        let most = if self.is_host(no) { usize::MAX } else { self.model().layers };
        let rival = self.rival_of(no);
        if rival.looks_at.is_some_and(|at| at <= now) {
            rival.looks_at = None;
        }
        if rival.rests_until > now {
            let until = rival.rests_until;
            return self.plan_look(no, until);
        }
        let wanted = rival.blobs.iter().enumerate().filter(|(_, blob)| blob.wanted && !blob.is_whole());
        let wanted: Vec<u16> = wanted.map(|(place, _)| place as u16).take(most).collect();
        wanted.into_iter().for_each(|layer| self.fill(no, layer));
    }

    /// A layer's blob is whole: it is announced and unpacked.
    pub(super) fn blob_whole(&mut self, no: u32, layer: u16) {
        self.rivals.swarms[usize::from(layer)].providers.push(no);
        if !self.is_host(no) {
            self.image_comes(no);
        }
    }

    /// Unpacks the next layer, when its turn has come; lets the program read when nothing is left.
    fn image_comes(&mut self, no: u32) {
        let rate = self.scenario.cluster.unpack;
        let places = self.places(no);
        let rival = self.rival_of(no);
        if rival.unpacking || !places.iter().all(|place| rival.blobs[*place].wanted) {
            return;
        }
        match places.into_iter().find(|place| !rival.blobs[*place].unpacked) {
            Some(place) if rival.blobs[place].is_whole() => {
                rival.unpacking = true;
                let takes = rate.time(self.shape.layers[place].geometry.len_bytes(&(0..u32::MAX)));
                let life = self.nodes[no as usize].life;
                let step = Step::Unpacked { layer: place as u16 };
                self.queue.after(takes, Happening::Rival { node: no, life, step });
            }
            Some(_) => {}
            None => self.image_is_here(no),
        }
    }

    fn unpacked(&mut self, no: u32, layer: u16) {
        let rival = self.rival_of(no);
        rival.unpacking = false;
        rival.blobs[usize::from(layer)].unpacked = true;
        self.image_comes(no);
    }

    fn image_is_here(&mut self, no: u32) {
        let places = self.places(no);
        let node = &mut self.nodes[no as usize];
        for place in places {
            node.layers[place].have = Runs::one(0..self.shape.layers[place].geometry.chunk_count());
        }
        let waits = node.start.as_ref().is_some_and(|start| start.ready.is_none());
        let reads = &mut self.rival_of(no).reads;
        if waits && !std::mem::replace(reads, true) {
            (0..self.scenario.start.parallel).for_each(|_| self.read_on(no));
        }
    }

    /// What a start reads and the node has not is needed once by the cluster.
    fn note_needs(&mut self, no: u32) {
        let node = &self.nodes[no as usize];
        for (place, hot) in Self::parts(&self.shape, node) {
            self.checkers.needs(place, &hot.difference(&node.layers[place].have));
        }
    }

    /// The image is pulled from `at` on, before any pod comes.
    pub(super) fn preload(&mut self, no: u32, at: Nanos) {
        self.note_needs(no);
        self.rival_of(no).blobs.iter_mut().for_each(|blob| blob.wanted = true);
        self.plan_look(no, at);
    }

    /// The layers of the image that a node starts; of all images when it starts none.
    fn places(&self, no: u32) -> Vec<usize> {
        Self::parts(&self.shape, &self.nodes[no as usize]).into_iter().map(|(place, _)| place).collect()
    }

    /// A pod lands on a node of a model, or its daemon starts again.
    pub(super) fn rival_starts(&mut self, no: u32) {
        self.note_needs(no);
        self.rival_of(no).reads = false;
        if self.strategy().is_eager() {
            return self.pull(no);
        }
        self.rival_of(no);
        (0..self.scenario.start.parallel).for_each(|_| self.read_on(no));
    }
}

/// Units of a transfer: their lengths in bytes.
fn units(len_bytes: u64) -> impl Iterator<Item = u32> {
    let whole = len_bytes / UNIT_BYTES;
    let rest = (len_bytes % UNIT_BYTES) as u32;
    std::iter::repeat_n(UNIT_BYTES as u32, whole as usize).chain((rest > 0).then_some(rest))
}
