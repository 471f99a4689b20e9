//! The wanted part of an answer's body, piece by piece: exactly the range, or an error.
//!
//! A server may answer a range with the whole (200); then what lies before the range is thrown away, within a bound, and
//! the rest is not read. An answer of another length or place than asked for is refused before a byte of it is passed
//! on, where its head tells.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;
use http::header::{CONTENT_RANGE, HeaderMap};
use reqwest::Response;
use tokio::time::Instant;

use super::endpoint::Rest;
use super::error::{Failure, OriginError, Subject};
use super::transport::Transport;

/// A body under way.
pub(super) struct RangeBody {
    transport: Transport,
    /// Of the host, which begins when the body breaks.
    rest: Arc<Rest>,
    subject: Subject,
    response: Response,
    deadline: Instant,
    /// Bytes still to throw away.
    skip_bytes: u64,
    /// Bytes still to pass on.
    left_bytes: u64,
    /// Bytes to pass on in all.
    wanted_bytes: u64,
    /// Whether the body should end with the range, so that more of it is an error.
    ends_with_range: bool,
}

/// What a reader wants of a layer.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) range: Range<u64>,
    /// The length of the layer by its descriptor.
    pub(super) len_bytes: u64,
    /// The most that may be thrown away before the range.
    pub(super) max_skip_bytes: u64,
}

impl Wanted {
    fn count(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether this is the whole layer, which needs no range.
    pub(super) fn is_whole(&self) -> bool {
        self.range == (0..self.len_bytes)
    }
}

impl RangeBody {
    /// Checks the head of `response`, an answer of status 200 or 206 to a request for `wanted`.
    pub(super) fn begin(
        (transport, rest): (Transport, Arc<Rest>),
        subject: Subject,
        response: Response,
        wanted: &Wanted,
        deadline: Instant,
    ) -> Result<Self, Failure> {
        let skip_bytes = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                check_range(response.headers(), wanted)?;
                0
            }
            _ => wanted.range.start,
        };
        let is_part = response.status() == StatusCode::PARTIAL_CONTENT;
        let expected_bytes = if is_part { wanted.count() } else { wanted.len_bytes };
        // A server that sends pieces of unknown number announces nothing; then counting tells.
        if let Some(actual_bytes) = response.content_length().filter(|len| *len != expected_bytes) {
            return Err(Failure::WrongLength { wanted_bytes: expected_bytes, actual_bytes });
        }
        if skip_bytes > wanted.max_skip_bytes {
            return Err(Failure::RangesIgnored { skip_bytes, limit_bytes: wanted.max_skip_bytes });
        }
        Ok(Self {
            transport,
            rest,
            subject,
            response,
            deadline,
            skip_bytes,
            left_bytes: wanted.count(),
            wanted_bytes: wanted.count(),
            ends_with_range: is_part || wanted.range.end == wanted.len_bytes,
        })
    }

    /// The next piece, never empty, and what is to come after it; `None` when all was passed on.
    pub(super) async fn next(self) -> Result<Option<(Bytes, Self)>, OriginError> {
        let rest = Arc::clone(&self.rest);
        let next = self.piece().await;
        if let Err(error) = &next {
            rest.failed(error);
        }
        next
    }

    async fn piece(mut self) -> Result<Option<(Bytes, Self)>, OriginError> {
        loop {
            let at_end = self.left_bytes == 0;
            if at_end && !self.ends_with_range {
                return Ok(None);
            }
            let received_bytes = self.wanted_bytes - self.left_bytes;
            let truncated = |source| Failure::Truncated { wanted_bytes: self.wanted_bytes, received_bytes, source };
            let chunk = self.transport.chunk(&mut self.response, received_bytes, self.deadline).await;
            let mut chunk = match chunk.map_err(|failure| self.subject.error(failure))? {
                Ok(Some(chunk)) => chunk,
                Ok(None) if at_end => return Ok(None),
                // All bytes are here; how the connection ends no longer matters.
                Err(_) if at_end => return Ok(None),
                Ok(None) => return Err(self.subject.error(truncated(None))),
                Err(error) => return Err(self.subject.error(truncated(Some(error)))),
            };
            let skipped = usize::try_from(self.skip_bytes).unwrap_or(usize::MAX).min(chunk.len());
            let _ = chunk.split_to(skipped);
            self.skip_bytes -= skipped as u64;
            if chunk.is_empty() {
                continue;
            }
            if chunk.len() as u64 > self.left_bytes {
                if self.ends_with_range {
                    let actual_bytes = received_bytes + chunk.len() as u64;
                    let failure = Failure::WrongLength { wanted_bytes: self.wanted_bytes, actual_bytes };
                    return Err(self.subject.error(failure));
                }
                chunk.truncate(usize::try_from(self.left_bytes).unwrap_or(usize::MAX));
            }
            self.left_bytes -= chunk.len() as u64;
            return Ok(Some((chunk, self)));
        }
    }
}

/// Whether a 206 is the part that was asked for.
fn check_range(headers: &HeaderMap, wanted: &Wanted) -> Result<(), Failure> {
    let answer = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let expected = parse_content_range(answer);
    let right = expected.is_some_and(|(range, len_bytes)| {
        range == wanted.range && len_bytes.is_none_or(|len_bytes| len_bytes == wanted.len_bytes)
    });
    if right { Ok(()) } else { Err(Failure::WrongRange { range: wanted.range.clone(), answer: shown(answer) }) }
}

/// Header text, fit for a message.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(80).collect()
}

/// `bytes A-B/N` or `bytes A-B/*`.
fn parse_content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, len_bytes) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let len_bytes = match len_bytes.trim() {
        "*" => None,
        len_bytes => Some(len_bytes.parse().ok()?),
    };
    Some((first..last.checked_add(1)?, len_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn another_part_than_asked_for_is_refused() {
        let wanted = Wanted { range: 10..20, len_bytes: 100, max_skip_bytes: 0 };
        let cases = [
            ("bytes 10-19/100", true),
            ("bytes 10-19/*", true),
            ("bytes 10-18/100", false),
            ("bytes 0-19/100", false),
            ("bytes 10-19/101", false),
            ("bytes 10-18446744073709551615/100", false),
            ("bytes */100", false),
            ("items 10-19/100", false),
            ("", false),
        ];
        for (text, right) in cases {
            let headers = HeaderMap::from_iter([(CONTENT_RANGE, HeaderValue::from_static(text))]);
            assert_eq!(check_range(&headers, &wanted).is_ok(), right, "'{text}'");
        }
        assert!(check_range(&HeaderMap::new(), &wanted).is_err());
    }
}
