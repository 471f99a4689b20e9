//! The fingerprint of a run.
//!
//! Every fact that a node's policy is told and every request that it makes goes into one BLAKE3 hash, with its time and its
//! node, in a fixed encoding of integers. The same scenario and seed give the same hash on every machine; another policy, or
//! another model, gives another one. Sets of chunks count by their runs, so nothing of a decision is left out.

use hermes_image::runs::Runs;
use hermes_policy::class::{Class, ErrorClass};
use hermes_policy::event::{Action, Event, Outcome, Ruling, Want};
use hermes_policy::members::Duty;

use crate::queue::Nanos;

/// Bytes that are gathered before they are hashed.
const BUFFER_BYTES: usize = 64 * 1024;

/// The hash so far.
#[derive(Debug)]
pub struct Trace {
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    entries: u64,
}

impl Default for Trace {
    fn default() -> Self {
        Self { hasher: blake3::Hasher::new(), buffer: Vec::with_capacity(BUFFER_BYTES + 4096), entries: 0 }
    }
}

fn class_no(class: Class) -> u64 {
    match class {
        Class::Demand => 0,
        Class::Prefetch => 1,
    }
}

fn error_no(class: ErrorClass) -> u64 {
    match class {
        ErrorClass::Transient => 0,
        ErrorClass::PeerFault => 1,
        ErrorClass::NotFound => 2,
        ErrorClass::Denied => 3,
        ErrorClass::Local => 4,
    }
}

fn want_no(want: Want) -> u64 {
    match want {
        Want::Here => 0,
        Want::Owner { duty, again, can_read } => {
            1 + u64::from(again) * 2 + u64::from(can_read) * 4 + u64::from(duty == Duty::Zone) * 8
        }
    }
}

impl Trace {
    fn words(&mut self, words: &[u64]) {
        for word in words {
            self.buffer.extend_from_slice(&word.to_le_bytes());
        }
    }

    fn runs(&mut self, runs: &Runs) {
        self.words(&[runs.run_count() as u64]);
        for run in runs.iter() {
            self.words(&[u64::from(run.start) << 32 | u64::from(run.end)]);
        }
    }

    /// Something that a model of another system does; its kind is told by its words.
    pub fn note(&mut self, now: Nanos, node: u32, words: &[u64]) {
        self.words(&[now, u64::from(node), u64::MAX]);
        self.words(words);
        self.end();
    }

    fn end(&mut self) {
        self.entries += 1;
        if self.buffer.len() >= BUFFER_BYTES {
            self.hasher.update(&self.buffer);
            self.buffer.clear();
        }
    }

    /// A fact that node `node` is told.
    pub fn event(&mut self, now: Nanos, node: u32, event: &Event) {
        self.words(&[now, u64::from(node)]);
        match event {
            Event::LayerOpened { layer, present, local, .. } => {
                self.words(&[1, u64::from(layer.0[0])]);
                self.runs(present);
                self.runs(local);
            }
            Event::LayerClosed { layer } => self.words(&[2, u64::from(layer.0[0])]),
            Event::GeometryChanged { layer, .. } => self.words(&[3, u64::from(layer.0[0])]),
            Event::OriginChanged { usable, .. } => self.words(&[4, u64::from(*usable)]),
            Event::PeerUp { peer } => self.words(&[5, u64::from(peer.0)]),
            Event::PeerDown { peer } => self.words(&[6, u64::from(peer.0)]),
            Event::PeerHas { peer, chunks, .. } => {
                self.words(&[7, u64::from(peer.0)]);
                self.runs(chunks);
            }
            Event::HoldersFound { .. } => self.words(&[8]),
            Event::MembersChanged { members } => {
                self.words(&[9, members.epoch(), members.len() as u64]);
                let eligible = members.iter().filter(|member| member.eligible).count();
                self.words(&[eligible as u64]);
            }
            Event::Claimed { claim, peer, chunks, class, want, .. } => {
                self.words(&[10, claim.0, u64::from(peer.0), class_no(*class), want_no(*want)]);
                self.runs(chunks);
            }
            Event::ClaimEnded { claim } => self.words(&[11, claim.0]),
            Event::AskReferred { ask, chunks, peers } => {
                self.words(&[12, ask.0, peers.len() as u64]);
                peers.iter().for_each(|peer| self.words(&[u64::from(peer.0)]));
                self.runs(chunks);
            }
            Event::AskDelegated { ask, chunks } => {
                self.words(&[13, ask.0]);
                self.runs(chunks);
            }
            Event::AskPending { ask, registry_rests } => {
                let rests = registry_rests.map_or(0, hermes_policy::time::nanos);
                self.words(&[14, ask.0, rests]);
            }
            Event::ReadNeeds { read, chunks, class, .. } => {
                self.words(&[15, read.0, class_no(*class)]);
                self.runs(chunks);
            }
            Event::ReadHit { first_chunk, end_chunk, .. } => {
                self.words(&[16, u64::from(*first_chunk), u64::from(*end_chunk)]);
            }
            Event::ReadCancelled { read } => self.words(&[17, read.0]),
            Event::Arrived { chunks, .. } | Event::PassedThrough { chunks, .. } => {
                self.words(&[18]);
                self.runs(chunks);
            }
            Event::Evicted { chunks, .. } | Event::LocalHas { chunks, .. } => {
                self.words(&[19]);
                self.runs(chunks);
            }
            Event::AskProgress { ask } => self.words(&[20, ask.0]),
            Event::AskEnded { ask, outcome } => {
                self.words(&[21, ask.0]);
                self.outcome(outcome);
            }
            Event::TimerFired => self.words(&[22]),
        }
        self.end();
    }

    fn outcome(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Done { bytes } => self.words(&[0, *bytes]),
            Outcome::Failed { class, .. } => self.words(&[1, error_no(*class)]),
            Outcome::Busy { retry_after } => self.words(&[2, hermes_policy::time::nanos(*retry_after)]),
            Outcome::Lacks { chunks } => {
                self.words(&[3]);
                self.runs(chunks);
            }
            Outcome::NotMine { epoch } => self.words(&[4, *epoch]),
        }
    }

    /// A request of the policy that was told last.
    pub fn action(&mut self, action: &Action) {
        match action {
            Action::AskLocal { ask, chunks, class, .. } => {
                self.words(&[101, ask.0, class_no(*class)]);
                self.runs(chunks);
            }
            Action::AskPeer { ask, peer, chunks, class, want, .. } => {
                self.words(&[102, ask.0, u64::from(peer.0), class_no(*class), want_no(*want)]);
                self.runs(chunks);
            }
            Action::Rule { claim, ruling } => {
                self.words(&[103, claim.0]);
                self.ruling(ruling);
            }
            Action::Suspect { peer } => self.words(&[104, u64::from(peer.0)]),
            Action::AskOrigin { ask, spans, class, .. } => {
                self.words(&[105, ask.0, u64::from(spans.start), u64::from(spans.end), class_no(*class)]);
            }
            Action::Cancel { ask } => self.words(&[106, ask.0]),
            Action::Deliver { read } => self.words(&[107, read.0]),
            Action::Fail { read, .. } => self.words(&[108, read.0]),
            Action::FindHolders { .. } => self.words(&[109]),
            Action::FindSpans { .. } => self.words(&[110]),
            Action::Watch { place, chunk, .. } => self.words(&[111, *place as u64, u64::from(*chunk)]),
            Action::Ban { peer, until } => self.words(&[112, u64::from(peer.0), until.0]),
            Action::Arm { at } => self.words(&[113, at.0]),
        }
        self.end();
    }

    fn ruling(&mut self, ruling: &Ruling) {
        match ruling {
            Ruling::Give(chunks) => {
                self.words(&[0]);
                self.runs(chunks);
            }
            Ruling::Lacks(chunks) => {
                self.words(&[1]);
                self.runs(chunks);
            }
            Ruling::Refer { chunks, peers } => {
                self.words(&[2, peers.len() as u64]);
                self.runs(chunks);
            }
            Ruling::Delegate(chunks) => {
                self.words(&[3]);
                self.runs(chunks);
            }
            Ruling::RegistryRests(wait) => self.words(&[4, hermes_policy::time::nanos(*wait)]),
            Ruling::NotMine { epoch } => self.words(&[5, *epoch]),
        }
    }

    /// Facts and requests so far.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// The hash of everything so far, in hexadecimal.
    pub fn hash(&self) -> String {
        let mut hasher = self.hasher.clone();
        hasher.update(&self.buffer);
        hasher.finalize().to_hex().to_string()
    }
}
