//! What a registry has delivered of each blob, to whom.
//!
//! Every answer with bytes of a blob is one delivery, which grows as its bytes are handed to the connection. What a
//! client does not wait for counts as far as it was handed over: some hundred kilobytes at most, the socket's buffer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use futures::stream::StreamExt as _;
use http::header::CONTENT_RANGE;
use http::{HeaderValue, Method};

use super::distance::Client;

/// Consecutive bytes of a blob that one client was given.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Delivery {
    /// Who asked.
    client: IpAddr,
    /// The digest, as it stood in the request.
    blob: String,
    /// Which bytes of the blob.
    range: Range<u64>,
}

/// All deliveries, in the order in which their answers began.
#[derive(Debug, Default)]
pub struct Ledger {
    deliveries: Mutex<Vec<Delivery>>,
}

/// What deliveries come to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Answers that had bytes.
    pub answers: usize,
    /// Bytes of all answers.
    pub bytes: u64,
    /// Different bytes of blobs among them.
    pub unique_bytes: u64,
    /// The same by who asked.
    pub clients: BTreeMap<IpAddr, ToClient>,
}

/// What a client was delivered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ToClient {
    /// Answers that had bytes.
    pub answers: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes among them that somebody, or it itself, had been delivered before.
    pub duplicate_bytes: u64,
}

impl Ledger {
    /// Nothing under the lock can break half-way.
    fn entries(&self) -> MutexGuard<'_, Vec<Delivery>> {
        self.deliveries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many answers had bytes of a blob, or will have, so far.
    pub fn answers(&self) -> usize {
        self.entries().len()
    }

    /// What the deliveries of these blobs come to, without the first `skipped` of all [`Ledger::answers`].
    pub fn delivered(&self, blobs: &BTreeSet<String>, skipped: usize) -> Delivered {
        sum_up(self.entries().iter().skip(skipped).filter(|delivery| blobs.contains(&delivery.blob)))
    }

    fn begin(&self, delivery: Delivery) -> usize {
        let mut entries = self.entries();
        entries.push(delivery);
        entries.len() - 1
    }

    fn grow(&self, entry: usize, piece: &Bytes) {
        self.entries()[entry].range.end += piece.len() as u64;
    }
}

fn sum_up<'a>(deliveries: impl Iterator<Item = &'a Delivery>) -> Delivered {
    let mut sum = Delivered::default();
    let mut seen: BTreeMap<&str, Union> = BTreeMap::new();
    for delivery in deliveries.filter(|delivery| !delivery.range.is_empty()) {
        let len_bytes = delivery.range.end - delivery.range.start;
        let new_bytes = seen.entry(&delivery.blob).or_default().add(delivery.range.clone());
        sum.answers += 1;
        sum.bytes += len_bytes;
        sum.unique_bytes += new_bytes;
        let client = sum.clients.entry(delivery.client).or_default();
        client.answers += 1;
        client.bytes += len_bytes;
        client.duplicate_bytes += len_bytes - new_bytes;
    }
    sum
}

/// A union of ranges: start and end of those that do not touch.
#[derive(Debug, Default)]
struct Union(BTreeMap<u64, u64>);

impl Union {
    /// Adds a range, and says how much of it is new.
    fn add(&mut self, range: Range<u64>) -> u64 {
        let (mut start, mut end, mut old_bytes) = (range.start, range.end, 0);
        // Those before it do not overlap each other, so the last of them reaches farthest.
        let touching = self.0.range(..=range.end).rev().take_while(|(_, known_end)| **known_end >= range.start);
        for (known_start, known_end) in touching.map(|(start, end)| (*start, *end)).collect::<Vec<_>>() {
            old_bytes += known_end.min(range.end) - known_start.max(range.start);
            start = start.min(known_start);
            end = end.max(known_end);
            self.0.remove(&known_start);
        }
        self.0.insert(start, end);
        range.end - range.start - old_bytes
    }
}

/// Enters what answers to requests for blobs hand over.
pub(super) async fn enter(State(ledger): State<Arc<Ledger>>, request: Request, next: Next) -> Response {
    let blob = request.uri().path().rsplit_once("/blobs/").map(|(_, digest)| digest.to_owned());
    let client = request.extensions().get::<ConnectInfo<Client>>().map(|ConnectInfo(client)| client.0);
    let is_get = request.method() == Method::GET;
    let answer = next.run(request).await;
    let (Some(blob), Some(client)) = (blob, client) else { return answer };
    if !is_get || !answer.status().is_success() {
        return answer;
    }
    let (head, body) = answer.into_parts();
    let start = head.headers.get(CONTENT_RANGE).and_then(range_start).unwrap_or(0);
    let entry = ledger.begin(Delivery { client, blob, range: start..start });
    let pieces = body.into_data_stream().inspect(move |piece| {
        if let Ok(piece) = piece {
            ledger.grow(entry, piece);
        }
    });
    Response::from_parts(head, Body::from_stream(pieces))
}

/// The first place in `bytes 5-9/10` (RFC 9110, section 14.4).
fn range_start(value: &HeaderValue) -> Option<u64> {
    value.to_str().ok()?.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unions_count_what_is_new() {
        let mut union = Union::default();
        let cases =
            [(10..20, 10), (10..20, 0), (30..40, 10), (15..35, 10), (0..5, 5), (5..10, 5), (0..50, 10), (7..8, 0)];
        for (range, expected) in cases {
            assert_eq!(union.add(range.clone()), expected, "{range:?} to {union:?}");
        }
        assert_eq!(union.0, BTreeMap::from([(0, 50)]));
    }

    #[test]
    fn duplicates_are_whose_request_came_later() {
        let client = |last| IpAddr::from([10, 0, 0, last]);
        let delivery = |last, blob: &str, range| Delivery { client: client(last), blob: blob.to_owned(), range };
        let deliveries =
            [delivery(1, "a", 0..100), delivery(2, "a", 50..150), delivery(2, "b", 0..100), delivery(1, "b", 100..100)];
        let expected = Delivered {
            answers: 3,
            bytes: 300,
            unique_bytes: 250,
            clients: BTreeMap::from([
                (client(1), ToClient { answers: 1, bytes: 100, duplicate_bytes: 0 }),
                (client(2), ToClient { answers: 2, bytes: 200, duplicate_bytes: 50 }),
            ]),
        };
        assert_eq!(sum_up(deliveries.iter()), expected);
    }

    #[test]
    fn a_range_says_where_it_starts() {
        let cases = [("bytes 5-9/10", Some(5)), ("bytes */10", None), ("items 1-2/3", None)];
        for (text, expected) in cases {
            assert_eq!(range_start(&HeaderValue::from_static(text)), expected, "{text}");
        }
    }
}
