//! What a real node decided, decided again.
//!
//! A record ([`hermes_policy::record`]) of a node's daemon is read line by line; the policy of this version, made anew with the
//! record's limits and seed, is told each fact at its time, by the same call as a simulated node's, and what it asks for is
//! compared with what was asked for then. The first difference ends it: what a policy is told after that follows from requests
//! that this one never made.
//!
//! A record is somebody's file: its lines are bounded, and one that is none is named. A last line that breaks off is where a
//! daemon was killed.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read as _};

use hermes_policy::class::Class;
use hermes_policy::event::{Action, Event, ReadId};
use hermes_policy::flight::Flight;
use hermes_policy::record::{Entry, FORMAT, Header};
use hermes_policy::rng::Rng;
use hermes_policy::time::Instant;
use serde::Serialize;
use thiserror::Error;

use crate::report::Times;
use crate::trace::Trace;

/// Longest line: the geometry of the largest layer, [`hermes_image::index::chunks::CHUNK_COUNT_MAX`] chunks with a span each, takes
/// less.
const LINE_MAX_BYTES: u64 = 1 << 30;

/// Why a record cannot be replayed.
#[derive(Debug, Error)]
pub enum ReplayError {
    /// It cannot be read.
    #[error("line {line} cannot be read")]
    Read {
        /// Counted from one.
        line: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line that is not what it should be.
    #[error("line {line} is no line of a {FORMAT} record")]
    Line {
        /// Counted from one.
        line: u64,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Another format or version.
    #[error("the record has format {0:?}, this version reads {FORMAT:?}; replay it with the version that wrote it")]
    Format(String),
    /// Time that runs backwards.
    #[error("line {line} is earlier than the one before it")]
    Backwards {
        /// Counted from one.
        line: u64,
    },
}

/// Where this version of the policy decides something else than the node did.
#[derive(Debug, Clone, Serialize)]
pub struct Difference {
    /// The line of the record, counted from one.
    pub line: u64,
    /// What the policy was told last.
    pub entry: Entry,
    /// What it asks for now.
    pub now: Vec<Action>,
}

/// What came of a replay.
#[derive(Debug, Clone, Serialize)]
pub struct Replayed {
    /// The version of the program that wrote the record.
    pub version: String,
    /// Facts that were told.
    pub facts: u64,
    /// What was asked for on them, by kind.
    pub requests: BTreeMap<&'static str, u64>,
    /// From the first fact to the last, in nanoseconds.
    pub span_ns: u64,
    /// The fingerprint of all facts and requests, like a simulation's.
    pub trace: String,
    /// How long demand reads that were answered waited for what was missing.
    pub waits: Times,
    /// Demand reads that failed.
    pub failed: u64,
    /// The record breaks off within its last line.
    pub breaks_off: bool,
    /// The first difference, if any.
    pub difference: Option<Difference>,
}

/// The kind of a request, for counting.
const fn kind(action: &Action) -> &'static str {
    match action {
        Action::AskLocal { .. } => "ask local",
        Action::AskPeer { .. } => "ask peer",
        Action::Rule { .. } => "rule",
        Action::Suspect { .. } => "suspect",
        Action::AskOrigin { .. } => "ask registry",
        Action::Cancel { .. } => "cancel",
        Action::Deliver { .. } => "deliver",
        Action::Fail { .. } => "fail",
        Action::FindHolders { .. } => "find holders",
        Action::FindSpans { .. } => "find spans",
        Action::Watch { .. } => "watch",
        Action::Ban { .. } => "ban",
        Action::Arm { .. } => "arm",
    }
}

/// Reads and waits of what is replayed.
#[derive(Default)]
struct Waits {
    since: BTreeMap<ReadId, Instant>,
    waits_ns: Vec<u64>,
    failed: u64,
}

impl Waits {
    fn told(&mut self, at: Instant, event: &Event) {
        match event {
            Event::ReadNeeds { read, class: Class::Demand, .. } => {
                self.since.insert(*read, at);
            }
            Event::ReadCancelled { read } => {
                self.since.remove(read);
            }
            _ => {}
        }
    }

    fn asked(&mut self, at: Instant, action: &Action) {
        match action {
            Action::Deliver { read } => {
                if let Some(since) = self.since.remove(read) {
                    self.waits_ns.push(at.0 - since.0);
                }
            }
            Action::Fail { read, .. } => self.failed += u64::from(self.since.remove(read).is_some()),
            _ => {}
        }
    }
}

/// One line without its end; `None` at the end of the record.
fn line(reader: &mut impl BufRead, line: u64, buffer: &mut Vec<u8>) -> Result<Option<bool>, ReplayError> {
    buffer.clear();
    let read = reader.by_ref().take(LINE_MAX_BYTES).read_until(b'\n', buffer);
    match read.map_err(|source| ReplayError::Read { line, source })? {
        0 => Ok(None),
        _ => Ok(Some(buffer.ends_with(b"\n"))),
    }
}

/// Replays a record.
///
/// # Errors
/// When it is none. Another decision is no error: [`Replayed::difference`].
pub fn replay(mut reader: impl BufRead) -> Result<Replayed, ReplayError> {
    let mut buffer = Vec::new();
    line(&mut reader, 1, &mut buffer)?;
    let header: Header = serde_json::from_slice(&buffer).map_err(|source| ReplayError::Line { line: 1, source })?;
    if header.format != FORMAT {
        return Err(ReplayError::Format(header.format));
    }
    let (mut flight, mut rng) = (Flight::new(header.limits), Rng::new(header.seed));
    let (mut trace, mut waits, mut requests) = (Trace::default(), Waits::default(), BTreeMap::new());
    let (mut facts, mut first, mut last) = (0, None, Instant::ZERO);
    let (mut breaks_off, mut difference) = (false, None);
    while let Some(is_whole) = line(&mut reader, facts + 2, &mut buffer)? {
        let no = facts + 2;
        let entry: Entry = match serde_json::from_slice(&buffer) {
            Ok(entry) => entry,
            Err(_) if !is_whole => {
                breaks_off = true;
                break;
            }
            Err(source) => return Err(ReplayError::Line { line: no, source }),
        };
        if entry.at < last {
            return Err(ReplayError::Backwards { line: no });
        }
        facts += 1;
        last = entry.at;
        let began = *first.get_or_insert(entry.at);
        waits.told(entry.at, &entry.event);
        trace.event(entry.at.0 - began.0, 0, &entry.event);
        let mut now = Vec::new();
        flight.handle(entry.at, entry.event.clone(), &mut rng, &mut now);
        for action in &now {
            trace.action(action);
            waits.asked(entry.at, action);
            *requests.entry(kind(action)).or_default() += 1;
        }
        if now != entry.actions {
            difference = Some(Difference { line: no, entry, now });
            break;
        }
    }
    Ok(Replayed {
        version: header.version,
        facts,
        requests,
        span_ns: last.0 - first.unwrap_or(last).0,
        trace: trace.hash(),
        waits: Times::of(waits.waits_ns),
        failed: waits.failed,
        breaks_off,
        difference,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hermes_image::ids::DiffId;
    use hermes_image::runs::Runs;
    use hermes_policy::event::PeerNo;
    use hermes_policy::event::{FailReason, OriginNo, Outcome};
    use hermes_policy::geometry::{LayerGeometry, Span};
    use hermes_policy::limits::Limits;
    use hermes_policy::members::{Member, Members, ZoneNo};

    use super::*;

    const LAYER: DiffId = DiffId([7; 32]);
    const SEED: u64 = 11;

    /// What a node writes when it is told these facts.
    fn record(limits: &Limits, facts: Vec<(u64, Event)>) -> String {
        let header = Header { format: FORMAT.into(), version: "0".into(), seed: SEED, limits: limits.clone() };
        let mut lines = vec![serde_json::to_string(&header).expect("serialises")];
        let (mut flight, mut rng) = (Flight::new(limits.clone()), Rng::new(SEED));
        for (at, event) in facts {
            let mut actions = Vec::new();
            flight.handle(Instant(at), event.clone(), &mut rng, &mut actions);
            lines.push(serde_json::to_string(&Entry { at: Instant(at), event, actions }).expect("serialises"));
        }
        lines.join("\n") + "\n"
    }

    /// A layer is opened, a read is answered by the registry after a failure, and one ends at its deadline.
    fn facts() -> Vec<(u64, Event)> {
        let spans = vec![Span { first_chunk: 0, blob_start: 0, blob_end: 90 }];
        let geometry = LayerGeometry::new([65_536, 65_536, 512]).and_then(|layer| layer.with_spans(spans));
        let member =
            |no, zone| Member { peer: PeerNo(no), key: 40 + u64::from(no), zone: ZoneNo(zone), eligible: no < 3 };
        let members = Members::new(3, PeerNo(0), vec![member(0, 0), member(1, 1), member(4, 0)]);
        let need = |read, class, deadline| Event::ReadNeeds {
            read: ReadId(read),
            layer: LAYER,
            chunks: Runs::one(0..2),
            class,
            deadline: Instant(deadline),
        };
        vec![
            (1, Event::MembersChanged { members: Arc::new(members) }),
            (
                2,
                Event::LayerOpened {
                    layer: LAYER,
                    geometry: Arc::new(geometry.expect("valid")),
                    present: Runs::new(),
                    local: Runs::new(),
                    origin: Some(OriginNo(0)),
                },
            ),
            (3, Event::PeerUp { peer: PeerNo(1) }),
            (4, need(1, Class::Demand, 90_000_000_000)),
            (60_000_000, Event::HoldersFound { layer: LAYER }),
            (61_000_000, Event::TimerFired),
            (2_000_000_000, Event::TimerFired),
            (3_000_000_000, Event::Arrived { layer: LAYER, chunks: Runs::one(0..3) }),
            (3_000_000_001, Event::Evicted { layer: LAYER, chunks: Runs::one(0..1) }),
            (3_000_000_002, need(2, Class::Demand, 3_500_000_000)),
            (3_500_000_003, Event::TimerFired),
            (3_600_000_000, Event::LayerClosed { layer: LAYER }),
        ]
    }

    fn of(text: &str) -> Result<Replayed, ReplayError> {
        replay(text.as_bytes())
    }

    #[test]
    fn the_same_facts_are_decided_alike() {
        let text = record(&Limits::default(), facts());
        let replayed = of(&text).expect("a record");
        assert!(replayed.difference.is_none(), "{:?}", replayed.difference);
        assert_eq!((replayed.facts, replayed.waits.count, replayed.failed), (12, 1, 1));
        assert_eq!(replayed.waits.max_ns, 2_999_999_996);
        assert_eq!(replayed.trace, of(&text).expect("a record").trace);
        assert!(!replayed.breaks_off);
    }

    #[test]
    fn every_fact_and_request_is_written_and_read_alike() {
        let failed = Outcome::Failed {
            class: hermes_policy::class::ErrorClass::Denied,
            retry_after: Some(std::time::Duration::from_millis(1_500)),
        };
        let cause = hermes_policy::event::FailCause {
            reason: FailReason::Refused,
            tried: vec![(hermes_policy::event::Source::Origin, hermes_policy::class::ErrorClass::Denied)],
            origin: hermes_policy::event::OriginStanding::Refused,
            holders: 2,
        };
        let entry = Entry {
            at: Instant(u64::MAX),
            event: Event::AskEnded { ask: hermes_policy::event::AskId(9), outcome: failed },
            actions: vec![Action::Fail { read: ReadId(1), cause }, Action::Arm { at: Instant::NEVER }],
        };
        let text = serde_json::to_string(&entry).expect("serialises");
        assert_eq!(serde_json::from_str::<Entry>(&text).expect("reads"), entry);
        for (at, event) in facts() {
            let entry = Entry { at: Instant(at), event, actions: Vec::new() };
            let text = serde_json::to_string(&entry).expect("serialises");
            assert_eq!(serde_json::from_str::<Entry>(&text).expect("reads"), entry);
        }
    }

    #[test]
    fn another_decision_is_shown_where_it_is_made() {
        let text = record(&Limits::default(), facts());
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let place = lines.iter().position(|line| line.contains("AskPeer") || line.contains("AskOrigin"));
        let place = place.expect("something was asked");
        let mut entry: Entry = serde_json::from_str(&lines[place]).expect("an entry");
        entry.actions.pop();
        lines[place] = serde_json::to_string(&entry).expect("serialises");
        let difference = of(&lines.join("\n")).expect("a record").difference.expect("it differs");
        assert_eq!(difference.line, place as u64 + 1);
        assert_eq!(difference.now.len(), entry.actions.len() + 1);
    }

    #[test]
    fn what_is_no_record_is_named_and_one_that_breaks_off_is_read_so_far() {
        let text = record(&Limits::default(), facts());
        let broken = &text[..text.len() - 9];
        let replayed = of(broken).expect("so far");
        assert!(replayed.breaks_off && replayed.difference.is_none() && replayed.facts == 11);
        let lines: Vec<&str> = text.lines().collect();
        let with = |place: usize, line: &str| {
            let mut lines = lines.clone();
            lines[place] = line;
            of(&(lines.join("\n") + "\n"))
        };
        assert!(matches!(with(0, "{}"), Err(ReplayError::Line { line: 1, .. })));
        assert!(matches!(with(3, "no"), Err(ReplayError::Line { line: 4, .. })));
        assert!(matches!(with(5, lines[1]), Err(ReplayError::Backwards { line: 6 })));
        let other = lines[0].replace(FORMAT, "hermes-decisions/0");
        assert!(matches!(with(0, &other), Err(ReplayError::Format(_))));
        assert!(matches!(of(""), Err(ReplayError::Line { line: 1, .. })));
        // Chunks that no layer has are refused, not made.
        let many = lines[2].replace("65536,2", "65536,4000000000");
        assert!(many != lines[2] && matches!(with(2, &many), Err(ReplayError::Line { line: 3, .. })));
    }
}
