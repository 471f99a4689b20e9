//! The messages of `/hermes/<cluster>/members/1`, pure.
//!
//! ```text
//! frame:    length (4) | type (1) | body
//!
//! 1 GREETING  root (8), suspicions' word (8), number of the notice (8)
//! 2 SAME                                                        all three are the same here: the end
//! 3 DIFFERS   as GREETING, 256 words (8 each), NEWS              each set of entries in one word
//! 4 SUMMARY   bits of the sets that differ (32), count (2), count x (short key (8), incarnation (8)), NEWS
//! 5 NEWS      more follows (1), notice: length (4) and bytes or 0, count (2) x entry: length (2) and bytes,
//!             count (2) x suspicion (136), count (2) x wanted short key (8)
//! ```

use std::sync::Arc;

use thiserror::Error;

use super::entry::{SignedEntry, Suspicion};
use super::table::{BUCKETS, Known, MEMBERS_MAX, SUSPICIONS_MAX};
use crate::admission::revocation::SignedRevocation;
use crate::canonical::{DecodeError, Reader, Writer};

/// Longest frame. A summary of 10,000 entries takes 160 kB, as many wanted keys 80 kB, 1,024 suspicions 140 kB, 1,024 of
/// the longest entries 420 kB, the longest notice 33 kB: below 1 MiB in any combination that is sent.
pub const FRAME_LEN_MAX_BYTES: usize = 1 << 20;
/// Most entries in one frame.
pub(crate) const ENTRIES_PER_FRAME_MAX: usize = 1024;

const GREETING: u8 = 1;
const SAME: u8 = 2;
const DIFFERS: u8 = 3;
const SUMMARY: u8 = 4;
const NEWS: u8 = 5;

/// A message that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CodecError {
    /// Its length cannot be.
    #[error("a frame of {0} bytes; at most {FRAME_LEN_MAX_BYTES} are allowed, and at least one")]
    FrameLength(usize),
    /// A type that there is not.
    #[error("no message has type {0}")]
    Type(u8),
    /// A field that cannot be read.
    #[error("a message cannot be read: {0}")]
    Malformed(#[from] DecodeError),
}

/// What one node tells another beside comparing.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct News {
    /// Another frame of news follows at once.
    pub(crate) more: bool,
    pub(crate) notice: Option<Arc<SignedRevocation>>,
    pub(crate) entries: Vec<Arc<SignedEntry>>,
    pub(crate) suspicions: Vec<Suspicion>,
    /// Short keys of entries that the other is asked for.
    pub(crate) want: Vec<u64>,
}

/// One word for everything that a node knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    pub(crate) root: u64,
    pub(crate) suspicions: u64,
    pub(crate) notice: u64,
}

impl Greeting {
    fn encode(&self, out: &mut Writer) {
        out.u64(self.root).u64(self.suspicions).u64(self.notice);
    }

    fn decode(fields: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { root: fields.u64()?, suspicions: fields.u64()?, notice: fields.u64()? })
    }
}

/// Which sets of entries differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buckets(pub(crate) [u8; BUCKETS / 8]);

impl Buckets {
    /// Those in which `ours` and `theirs` differ.
    pub(crate) fn differing(ours: &[u64; BUCKETS], theirs: &[u64; BUCKETS]) -> Self {
        let mut bits = [0; BUCKETS / 8];
        for (no, _) in ours.iter().zip(theirs).enumerate().filter(|(_, (ours, theirs))| ours != theirs) {
            bits[no / 8] |= 1 << (no % 8);
        }
        Self(bits)
    }

    pub(crate) fn has(&self, bucket: usize) -> bool {
        self.0[bucket / 8] & (1 << (bucket % 8)) != 0
    }
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// What the asker knows, in three words.
    Greeting(Greeting),
    /// The answer of one that knows the same.
    Same,
    /// The answer of one that does not: what it knows, in a word for each set of entries.
    Differs(Greeting, Box<[u64; BUCKETS]>, News),
    /// What the asker knows of the sets that differ.
    Summary(Buckets, Vec<Known>, News),
    /// What the other lacks.
    News(News),
}

impl Message {
    /// The whole frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.bytes(&[0; 4]);
        match self {
            Self::Greeting(greeting) => {
                out.u8(GREETING);
                greeting.encode(&mut out);
            }
            Self::Same => {
                out.u8(SAME);
            }
            Self::Differs(greeting, buckets, news) => {
                out.u8(DIFFERS);
                greeting.encode(&mut out);
                out.words(buckets.iter().copied());
                news.encode(&mut out);
            }
            Self::Summary(buckets, known, news) => {
                out.u8(SUMMARY).bytes(&buckets.0).u16(count(known.len()));
                out.words(known.iter().flat_map(|known| [known.short, known.incarnation]));
                news.encode(&mut out);
            }
            Self::News(news) => {
                out.u8(NEWS);
                news.encode(&mut out);
            }
        }
        let mut frame = out.finish();
        let len = u32::try_from(frame.len() - 4).expect("a frame is below 1 MiB");
        frame[..4].copy_from_slice(&len.to_le_bytes());
        frame
    }

    /// Reads a frame without its length, and nothing else. Signatures are not looked at.
    ///
    /// # Errors
    /// When there is no such message, or a field of it cannot be.
    pub fn decode(frame: &[u8]) -> Result<Self, CodecError> {
        let mut fields = Reader::new(frame);
        let message = match fields.u8()? {
            GREETING => Self::Greeting(Greeting::decode(&mut fields)?),
            SAME => Self::Same,
            DIFFERS => {
                let greeting = Greeting::decode(&mut fields)?;
                let mut buckets = Box::new([0; BUCKETS]);
                for bucket in buckets.iter_mut() {
                    *bucket = fields.u64()?;
                }
                Self::Differs(greeting, buckets, News::decode(&mut fields)?)
            }
            SUMMARY => {
                let buckets = Buckets(fields.array()?);
                let count = counted(&mut fields, MEMBERS_MAX, 16)?;
                let mut known = Vec::with_capacity(count);
                for _ in 0..count {
                    known.push(Known { short: fields.u64()?, incarnation: fields.u64()? });
                }
                Self::Summary(buckets, known, News::decode(&mut fields)?)
            }
            NEWS => Self::News(News::decode(&mut fields)?),
            other => return Err(CodecError::Type(other)),
        };
        fields.end()?;
        Ok(message)
    }
}

fn count(len: usize) -> u16 {
    u16::try_from(len).expect("every list is bounded below 65,536")
}

/// A count of things of at least `least_len_bytes`, checked before anything is allocated for them.
fn counted(fields: &mut Reader<'_>, most: usize, least_len_bytes: usize) -> Result<usize, DecodeError> {
    let count = usize::from(fields.u16()?);
    if count > most {
        return Err(DecodeError::Field("count"));
    }
    if count * least_len_bytes > fields.left() {
        return Err(DecodeError::Short);
    }
    Ok(count)
}

impl News {
    pub(crate) fn is_empty(&self) -> bool {
        self.notice.is_none() && self.entries.is_empty() && self.suspicions.is_empty() && self.want.is_empty()
    }

    /// `entries` in as many frames as they need, with the rest in the last one.
    pub(crate) fn in_frames(mut self) -> Vec<Self> {
        let mut frames = Vec::new();
        while self.entries.len() > ENTRIES_PER_FRAME_MAX {
            let rest = self.entries.split_off(ENTRIES_PER_FRAME_MAX);
            let entries = std::mem::replace(&mut self.entries, rest);
            frames.push(Self { more: true, entries, ..Self::default() });
        }
        self.more = false;
        frames.push(self);
        frames
    }

    fn encode(&self, out: &mut Writer) {
        out.u8(u8::from(self.more));
        let notice = self.notice.as_ref().map(|notice| notice.encode()).unwrap_or_default();
        out.bytes(&u32::try_from(notice.len()).expect("a notice has a limit").to_le_bytes()).bytes(&notice);
        out.u16(count(self.entries.len()));
        for signed in &self.entries {
            out.u16(count(signed.encoded.len())).bytes(&signed.encoded);
        }
        out.u16(count(self.suspicions.len()));
        self.suspicions.iter().for_each(|said| said.encode(out));
        out.u16(count(self.want.len()));
        out.words(self.want.iter().copied());
    }

    fn decode(fields: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let more = match fields.u8()? {
            0 => false,
            1 => true,
            _ => return Err(DecodeError::Field("more")),
        };
        let notice = match u32::from_le_bytes(fields.array()?) as usize {
            0 => None,
            len => Some(Arc::new(SignedRevocation::decode(fields.bytes(len)?)?)),
        };
        let entry_count = counted(fields, ENTRIES_PER_FRAME_MAX, 2)?;
        let mut entries = Vec::with_capacity(entry_count);
        for _ in 0..entry_count {
            let len = usize::from(fields.u16()?);
            entries.push(Arc::new(SignedEntry::decode(fields.bytes(len)?)?));
        }
        let suspicion_count = counted(fields, SUSPICIONS_MAX, super::entry::SUSPICION_LEN_BYTES)?;
        let suspicions = (0..suspicion_count).map(|_| Suspicion::decode(fields)).collect::<Result<_, _>>()?;
        let want_count = counted(fields, MEMBERS_MAX, 8)?;
        let want = (0..want_count).map(|_| fields.u64()).collect::<Result<_, _>>()?;
        Ok(Self { more, notice, entries, suspicions, want })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::entry::tests::{cluster, said};
    use super::*;

    fn news(count: usize) -> News {
        let (pair, entry) = said(3);
        let signed = Arc::new(entry.sign(&cluster(), &pair));
        let suspicions = vec![Suspicion::new(&cluster(), signed.entry.key, 3, &pair)];
        News { more: false, notice: None, entries: vec![signed; count], suspicions, want: vec![1, 2] }
    }

    #[test]
    fn every_message_is_read_as_it_was_written() {
        let known = vec![Known { short: 1, incarnation: 2 }];
        let greeting = Greeting { root: 1, suspicions: 2, notice: 3 };
        let all = [
            Message::Greeting(greeting),
            Message::Same,
            Message::Differs(greeting, Box::new([7; BUCKETS]), news(2)),
            Message::Summary(Buckets([5; BUCKETS / 8]), known, News::default()),
            Message::News(news(1)),
        ];
        for message in all {
            let frame = message.encode();
            assert_eq!(frame[..4], u32::try_from(frame.len() - 4).expect("short").to_le_bytes());
            assert_eq!(Message::decode(&frame[4..]), Ok(message));
            for cut in 4..frame.len() {
                assert!(Message::decode(&frame[4..cut]).is_err());
            }
            assert!(Message::decode(&[&frame[4..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn many_entries_go_in_frames_that_fit() {
        let frames = news(2500).in_frames();
        assert_eq!(frames.iter().map(|frame| frame.entries.len()).collect::<Vec<_>>(), [1024, 1024, 452]);
        assert_eq!(frames.iter().map(|frame| frame.more).collect::<Vec<_>>(), [true, true, false]);
        assert!(frames[0].want.is_empty() && frames[2].want == [1, 2]);
        const { assert!(ENTRIES_PER_FRAME_MAX * (2 + super::super::entry::ENTRY_LEN_MAX_BYTES) < FRAME_LEN_MAX_BYTES) };
        assert_eq!(News::default().in_frames().len(), 1);
    }

    #[test]
    fn counts_are_checked_before_memory_is_taken() {
        // A summary of 65,535 entries that are not there.
        let mut frame = vec![SUMMARY];
        frame.extend([0; BUCKETS / 8]);
        frame.extend([0xff, 0xff]);
        assert!(Message::decode(&frame).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600), kind in 0_u8..7) {
            let frame = [&[kind][..], &bytes].concat();
            if let Ok(read) = Message::decode(&frame) {
                prop_assert_eq!(&read.encode()[4..], &frame[..]);
            }
        }
    }
}
