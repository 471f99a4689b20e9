//! Who shows a certificate: read from its DER, once TLS has found that this authority has signed it.
//!
//! Reads no more of X.509 (RFC 5280, section 4.1) than what this authority writes, and takes nothing else; whether the
//! certificate is good is not decided here.

use hermes_p2p::{PeerId, PeerKey};

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OBJECT: u8 = 0x06;
const UTF8: u8 = 0x0c;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// The explicit tag before the version.
const VERSION: u8 = 0xa0;
/// `id-at-commonName`, 2.5.4.3.
const COMMON_NAME: [u8; 3] = [0x55, 0x04, 0x03];
/// `id-Ed25519`, 1.3.101.112 (RFC 8410).
const ED25519: [u8; 3] = [0x2b, 0x65, 0x70];

/// Who a certificate is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeIdentity {
    /// The node's name in the cluster.
    pub node: String,
    /// The node's name in the swarm, whose key TLS has seen.
    pub peer: PeerId,
    /// When the certificate ends, in seconds since 1970.
    pub not_after: u64,
}

impl NodeIdentity {
    /// Reads it from a certificate in DER; `None` when it is none that this authority gives to nodes.
    pub fn of(certificate: &[u8]) -> Option<Self> {
        let mut body = Der(Der(certificate).value(SEQUENCE)?).enter(SEQUENCE)?;
        body.value(VERSION)?;
        body.value(INTEGER)?;
        body.value(SEQUENCE)?;
        body.value(SEQUENCE)?;
        let mut validity = body.enter(SEQUENCE)?;
        validity.any()?;
        let not_after = time_of(validity.any()?)?;
        let subject = body.enter(SEQUENCE)?;
        let mut public = body.enter(SEQUENCE)?;
        if public.enter(SEQUENCE)?.value(OBJECT)? != ED25519 {
            return None;
        }
        // A bit string begins with the number of bits that its last byte does not use.
        let [0, key @ ..] = public.value(BIT_STRING)? else { return None };
        let peer = PeerKey::from_bytes(key.try_into().ok()?).peer()?;
        let node = common_name(subject)?;
        super::is_node_name(&node).then_some(Self { node, peer, not_after })
    }
}

/// What is left to read.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The next value and its tag.
    fn any(&mut self) -> Option<(u8, &'a [u8])> {
        let [tag, len, rest @ ..] = self.0 else { return None };
        let (len, rest) = match *len {
            short @ 0..=0x7f => (usize::from(short), rest),
            0x81 => rest.split_first().map(|(len, rest)| (usize::from(*len), rest))?,
            0x82 => rest.split_first_chunk::<2>().map(|(len, rest)| (usize::from(u16::from_be_bytes(*len)), rest))?,
            _ => return None,
        };
        let (value, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        Some((*tag, value))
    }

    /// The next value, which must have `tag`.
    fn value(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.any().filter(|(found, _)| *found == tag).map(|(_, value)| value)
    }

    /// What is within the next value.
    fn enter(&mut self, tag: u8) -> Option<Der<'a>> {
        self.value(tag).map(Der)
    }
}

fn common_name(mut subject: Der<'_>) -> Option<String> {
    let mut attribute = subject.enter(SET)?.enter(SEQUENCE)?;
    if attribute.value(OBJECT)? != COMMON_NAME {
        return None;
    }
    String::from_utf8(attribute.value(UTF8)?.to_vec()).ok()
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`, as seconds since 1970.
fn time_of((tag, text): (u8, &[u8])) -> Option<u64> {
    let digits = text.strip_suffix(b"Z")?;
    let number = |bytes: &[u8]| std::str::from_utf8(bytes).ok()?.parse::<i64>().ok();
    let (year, rest) = match tag {
        UTC_TIME => {
            let (year, rest) = digits.split_at_checked(2)?;
            let year = number(year)?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        GENERALIZED_TIME => {
            let (year, rest) = digits.split_at_checked(4)?;
            (number(year)?, rest)
        }
        _ => return None,
    };
    let [month, day, hour, minute, second] = [0, 2, 4, 6, 8].map(|at| rest.get(at..at + 2).and_then(number));
    let date = jiff::civil::date(
        i16::try_from(year).ok()?,
        i8::try_from(month?).ok().filter(|month| (1..=12).contains(month))?,
        1,
    );
    let date = date.with().day(i8::try_from(day?).ok()?).build().ok()?;
    let time =
        jiff::civil::Time::new(i8::try_from(hour?).ok()?, i8::try_from(minute?).ok()?, i8::try_from(second?).ok()?, 0);
    let moment = date.to_datetime(time.ok()?).to_zoned(jiff::tz::TimeZone::UTC).ok()?;
    u64::try_from(moment.timestamp().as_second()).ok()
}
