//! How records and profiles are written. One form for each, with a version, and bounds that are checked before anything is
//! allocated.
//!
//! A **profile** (version 1; 2 with donors), at most [`PROFILE_LEN_MAX_BYTES`]:
//!
//! | field | size |
//! |---|---|
//! | `HPRF`, version 1 | 5 bytes |
//! | number of records, 1 to 255 | 1 byte |
//! | Unix seconds of the newest | number |
//! | number of layers, and their diffIDs | number, 32 bytes each |
//! | number of steps | number |
//! | each step: layer, first chunk, number of chunks, time, weight, spread | numbers |
//! | version 2: number of donors, 1 to 16; each: layer, diffID, chunk table | number; number, 32 bytes, 32 bytes |
//!
//! A **record** (version 1) has `HSTR`, the version, the seconds and the layers in the same way, then the number of touches,
//! and for each: layer, first chunk, number of chunks, time, and one byte: bits 0 and 1 the source, bit 2 whether a reader
//! waited. A **list of records** has `HSTL`, the version, their number, and each with its length before it.
//!
//! Numbers are LEB128 as in [`hermes_image::runs`]. First chunks and times are written as the difference to the end, and to
//! the time, of the step before, with the sign in the lowest bit.

use hermes_image::ids::{ArtifactId, DiffId};
use hermes_image::index::chunks::CHUNK_COUNT_MAX;
use hermes_image::runs::{Runs, put_varint, take_varint};
use thiserror::Error;

use super::{
    CHUNKS_MAX, DONORS_MAX, Donor, LAYERS_MAX, PROFILE_LEN_MAX_BYTES, Profile, RECORD_LEN_MAX_BYTES, RECORDS_MAX,
    START_MAX_MS, StartRecord, Step, TOUCHES_MAX, Touch, TouchSource,
};

const PROFILE_MAGIC: &[u8; 4] = b"HPRF";
const RECORD_MAGIC: &[u8; 4] = b"HSTR";
const LIST_MAGIC: &[u8; 4] = b"HSTL";
const VERSION: u8 = 1;
/// Of profiles with donors.
const VERSION_DONORS: u8 = 2;
/// Shortest encoding of a step or touch, in bytes: what a count promises cannot be more than the bytes hold.
const ENTRY_LEN_MIN_BYTES: usize = 5;
const WAITED: u8 = 1 << 2;

/// Bytes that are no profile, record or list of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ProfileError {
    /// Something else altogether.
    #[error("not a {0}")]
    Magic(&'static str),
    /// A version that this build does not know.
    #[error("version {0} of start profiles is not known; versions up to {VERSION_DONORS} are")]
    Version(u8),
    /// More bytes than one may have.
    #[error("a start profile of {len_bytes} bytes, where {limit_bytes} are allowed")]
    TooLong {
        /// That came.
        len_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// A field that cannot be.
    #[error("a start profile with a malformed {0}")]
    Malformed(&'static str),
}

/// The encoding of a profile.
pub fn encode(profile: &Profile) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + 32 * profile.layers.len() + 8 * profile.steps.len());
    out.extend_from_slice(PROFILE_MAGIC);
    let version = if profile.donors.is_empty() { VERSION } else { VERSION_DONORS };
    out.extend_from_slice(&[version, profile.records]);
    put_varint(&mut out, profile.newest_seconds);
    put_layers(&mut out, &profile.layers);
    put_varint(&mut out, profile.steps.len() as u64);
    let mut last = Last::default();
    for step in &profile.steps {
        last.put(&mut out, step.layer, (step.chunks.start, step.chunks.end), step.at_ms);
        out.push(step.weight);
        put_varint(&mut out, u64::from(step.spread_ms));
    }
    if version == VERSION_DONORS {
        put_varint(&mut out, profile.donors.len() as u64);
        for donor in &profile.donors {
            put_varint(&mut out, u64::from(donor.layer));
            out.extend_from_slice(&donor.diff_id.0);
            out.extend_from_slice(&donor.table.0);
        }
    }
    out
}

pub(super) fn encoded_len(profile: &Profile) -> usize {
    encode(profile).len()
}

/// Reads a profile.
///
/// # Errors
/// When the bytes are none, of another version, too long, or have a second encoding.
pub fn decode(bytes: &[u8]) -> Result<Profile, ProfileError> {
    let limit_bytes = PROFILE_LEN_MAX_BYTES;
    let (mut parts, version) = Parts::open(bytes, PROFILE_MAGIC, "start profile", limit_bytes, VERSION_DONORS)?;
    let records = parts.byte("number of records")?;
    if records == 0 {
        return Err(ProfileError::Malformed("number of records"));
    }
    let newest_seconds = parts.number("time")?;
    let layers = parts.layers()?;
    let count = parts.entries("number of steps", limit_bytes / ENTRY_LEN_MIN_BYTES)?;
    let (mut steps, mut last, mut seen) = (Vec::with_capacity(count), Last::default(), Seen::new(layers.len()));
    for _ in 0..count {
        let (layer, chunks, at_ms) = last.take(&mut parts, layers.len())?;
        seen.add(layer, chunks)?;
        let weight = parts.byte("weight")?;
        let spread_ms = parts.number("spread")?;
        if !(1..=100).contains(&weight) || spread_ms > u64::from(START_MAX_MS) {
            return Err(ProfileError::Malformed("weight or spread"));
        }
        steps.push(Step { layer, chunks: chunks.0..chunks.1, at_ms, weight, spread_ms: spread_ms as u32 });
    }
    let donors = if version == VERSION_DONORS { parts.donors(layers.len())? } else { Vec::new() };
    parts.end()?;
    Ok(Profile { records, newest_seconds, layers, steps, donors })
}

/// The encoding of a record.
pub fn encode_record(record: &StartRecord) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + 32 * record.layers.len() + 8 * record.touches.len());
    out.extend_from_slice(RECORD_MAGIC);
    out.push(VERSION);
    put_varint(&mut out, record.ended_seconds);
    put_layers(&mut out, &record.layers);
    put_varint(&mut out, record.touches.len() as u64);
    let mut last = Last::default();
    for touch in &record.touches {
        last.put(&mut out, touch.layer, touch.chunks, touch.at_ms);
        // The code of a source is its place among all.
        let source = TouchSource::ALL.iter().position(|source| *source == touch.source).unwrap_or(0) as u8;
        out.push(source | if touch.waited { WAITED } else { 0 });
    }
    out
}

/// Reads a record.
///
/// # Errors
/// When the bytes are none, of another version, too long, or have a second encoding.
pub fn decode_record(bytes: &[u8]) -> Result<StartRecord, ProfileError> {
    let (mut parts, _) = Parts::open(bytes, RECORD_MAGIC, "record of a start", RECORD_LEN_MAX_BYTES, VERSION)?;
    let ended_seconds = parts.number("time")?;
    let layers = parts.layers()?;
    let count = parts.entries("number of touches", TOUCHES_MAX)?;
    let (mut touches, mut last, mut seen) = (Vec::with_capacity(count), Last::default(), Seen::new(layers.len()));
    for _ in 0..count {
        let before_ms = last.at_ms;
        let (layer, chunks, at_ms) = last.take(&mut parts, layers.len())?;
        seen.add(layer, chunks)?;
        let flags = parts.byte("source")?;
        if at_ms < before_ms || flags > 7 {
            return Err(ProfileError::Malformed("time or source"));
        }
        let (waited, source) = (flags & WAITED != 0, TouchSource::ALL[usize::from(flags & 3)]);
        touches.push(Touch { at_ms, layer, chunks, waited, source });
    }
    parts.end()?;
    Ok(StartRecord { ended_seconds, layers, touches })
}

/// The encoding of at most [`RECORDS_MAX`] records.
pub fn encode_records(records: &[StartRecord]) -> Vec<u8> {
    let kept = &records[..records.len().min(RECORDS_MAX)];
    let mut out = LIST_MAGIC.to_vec();
    out.push(VERSION);
    put_varint(&mut out, kept.len() as u64);
    for record in kept {
        let bytes = encode_record(record);
        put_varint(&mut out, bytes.len() as u64);
        out.extend_from_slice(&bytes);
    }
    out
}

/// Reads a list of records.
///
/// # Errors
/// When the bytes are none, or one of the records is.
pub fn decode_records(bytes: &[u8]) -> Result<Vec<StartRecord>, ProfileError> {
    let limit_bytes = RECORDS_MAX * (RECORD_LEN_MAX_BYTES + 8);
    let (mut parts, _) = Parts::open(bytes, LIST_MAGIC, "list of records of starts", limit_bytes, VERSION)?;
    let count = parts.count("number of records", RECORDS_MAX)?;
    let mut records = Vec::with_capacity(count);
    for _ in 0..count {
        let len = parts.count("length of a record", RECORD_LEN_MAX_BYTES)?;
        let record = parts.bytes.get(..len).ok_or(ProfileError::Malformed("length of a record"))?;
        parts.bytes = &parts.bytes[len..];
        records.push(decode_record(record)?);
    }
    parts.end()?;
    Ok(records)
}

fn put_layers(out: &mut Vec<u8>, layers: &[DiffId]) {
    put_varint(out, layers.len() as u64);
    layers.iter().for_each(|layer| out.extend_from_slice(&layer.0));
}

fn put_signed(out: &mut Vec<u8>, value: i64) {
    put_varint(out, ((value << 1) ^ (value >> 63)) as u64);
}

/// What the next entry is written relative to.
#[derive(Debug, Default)]
struct Last {
    chunk: u32,
    at_ms: u32,
}

impl Last {
    fn put(&mut self, out: &mut Vec<u8>, layer: u16, chunks: (u32, u32), at_ms: u32) {
        put_varint(out, u64::from(layer));
        put_signed(out, i64::from(chunks.0) - i64::from(self.chunk));
        put_varint(out, u64::from(chunks.1 - chunks.0));
        put_signed(out, i64::from(at_ms) - i64::from(self.at_ms));
        (self.chunk, self.at_ms) = (chunks.1, at_ms);
    }

    fn take(&mut self, parts: &mut Parts<'_>, layers: usize) -> Result<(u16, (u32, u32), u32), ProfileError> {
        let layer = parts.count("layer", layers.saturating_sub(1))?;
        let start = i64::from(self.chunk).checked_add(parts.signed("chunk")?);
        let len = parts.number("number of chunks")?;
        let start = start.and_then(|start| u32::try_from(start).ok()).ok_or(ProfileError::Malformed("chunk"))?;
        let end = u64::from(start).checked_add(len).filter(|end| *end <= u64::from(CHUNK_COUNT_MAX) && len > 0);
        let end = end.ok_or(ProfileError::Malformed("number of chunks"))?;
        let at_ms = i64::from(self.at_ms).checked_add(parts.signed("time")?);
        let at_ms = at_ms.and_then(|at| u32::try_from(at).ok()).filter(|at| *at <= START_MAX_MS);
        // Both fit: a layer has fewer than 2^32 chunks, and there are at most LAYERS_MAX layers.
        (self.chunk, self.at_ms) = (end as u32, at_ms.ok_or(ProfileError::Malformed("time"))?);
        Ok((layer as u16, (start, self.chunk), self.at_ms))
    }
}

/// The chunks that were named already.
struct Seen {
    layers: Vec<Runs>,
    count: u64,
}

impl Seen {
    fn new(layers: usize) -> Self {
        Self { layers: vec![Runs::new(); layers], count: 0 }
    }

    fn add(&mut self, layer: u16, chunks: (u32, u32)) -> Result<(), ProfileError> {
        let known = self.layers.get_mut(usize::from(layer)).ok_or(ProfileError::Malformed("layer"))?;
        self.count += u64::from(chunks.1 - chunks.0);
        if known.intersects(&(chunks.0..chunks.1)) || self.count > CHUNKS_MAX {
            return Err(ProfileError::Malformed("set of chunks: one stands twice, or there are too many"));
        }
        known.insert(chunks.0..chunks.1);
        Ok(())
    }
}

struct Parts<'a> {
    bytes: &'a [u8],
}

impl<'a> Parts<'a> {
    /// What comes after the version, and that.
    fn open(
        bytes: &'a [u8],
        magic: &[u8; 4],
        what: &'static str,
        limit_bytes: usize,
        newest: u8,
    ) -> Result<(Self, u8), ProfileError> {
        if bytes.len() > limit_bytes {
            return Err(ProfileError::TooLong { len_bytes: bytes.len(), limit_bytes });
        }
        let rest = bytes.strip_prefix(magic).ok_or(ProfileError::Magic(what))?;
        match rest.split_first() {
            Some((version, bytes)) if (VERSION..=newest).contains(version) => Ok((Self { bytes }, *version)),
            Some((version, _)) => Err(ProfileError::Version(*version)),
            None => Err(ProfileError::Magic(what)),
        }
    }

    fn byte(&mut self, field: &'static str) -> Result<u8, ProfileError> {
        let (first, rest) = self.bytes.split_first().ok_or(ProfileError::Malformed(field))?;
        self.bytes = rest;
        Ok(*first)
    }

    fn number(&mut self, field: &'static str) -> Result<u64, ProfileError> {
        take_varint(&mut self.bytes).map_err(|_| ProfileError::Malformed(field))
    }

    fn signed(&mut self, field: &'static str) -> Result<i64, ProfileError> {
        let value = self.number(field)?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// A number that is at most `limit`.
    fn count(&mut self, field: &'static str, limit: usize) -> Result<usize, ProfileError> {
        let count = usize::try_from(self.number(field)?).ok().filter(|count| *count <= limit);
        count.ok_or(ProfileError::Malformed(field))
    }

    /// A number of steps or touches that the bytes can hold.
    fn entries(&mut self, field: &'static str, limit: usize) -> Result<usize, ProfileError> {
        let count = self.count(field, limit)?;
        if count > self.bytes.len() / ENTRY_LEN_MIN_BYTES { Err(ProfileError::Malformed(field)) } else { Ok(count) }
    }

    fn layers(&mut self) -> Result<Vec<DiffId>, ProfileError> {
        let malformed = ProfileError::Malformed("list of layers");
        let count = self.count("number of layers", LAYERS_MAX)?;
        let bytes = self.bytes.get(..32 * count).ok_or(malformed)?;
        self.bytes = &self.bytes[32 * count..];
        let (layers, _) = bytes.as_chunks::<32>();
        Ok(layers.iter().map(|layer| DiffId(*layer)).collect())
    }

    fn donors(&mut self, layers: usize) -> Result<Vec<Donor>, ProfileError> {
        let malformed = ProfileError::Malformed("list of donors");
        let count = self.count("number of donors", DONORS_MAX)?;
        let mut donors = Vec::with_capacity(count);
        for _ in 0..count {
            // It fits: there are at most LAYERS_MAX layers.
            let layer = self.count("layer of a donor", layers.saturating_sub(1))? as u16;
            donors.push(Donor { layer, diff_id: DiffId(self.name()?), table: ArtifactId(self.name()?) });
        }
        let is_one_form = layers > 0 && !donors.is_empty() && donors.is_sorted_by(|one, next| one < next);
        if is_one_form { Ok(donors) } else { Err(malformed) }
    }

    fn name(&mut self) -> Result<[u8; 32], ProfileError> {
        let (name, rest) = self.bytes.split_first_chunk().ok_or(ProfileError::Malformed("name"))?;
        self.bytes = rest;
        Ok(*name)
    }

    fn end(&self) -> Result<(), ProfileError> {
        if self.bytes.is_empty() { Ok(()) } else { Err(ProfileError::Malformed("end")) }
    }
}
