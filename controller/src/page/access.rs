//! Who may look: tokens, what is remembered of those that were good, and how many guesses there are.
//!
//! A token that was found good is believed for [`GOOD_FOR`] and then reviewed again, so that the page's polling does not
//! ask the API server each time, and a token that is taken back opens nothing a minute later. Tokens are remembered by
//! their hashes. Those that nobody knows have to share a few reviews a second, and those that were good lately do not have
//! to share them: a flood of guesses keeps nobody out who is in.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::api::numbers::{Numbers, Refusal};
use crate::api::review::{ReviewError, Viewers};

/// How long a token that was good is believed.
const GOOD_FOR: Duration = Duration::from_secs(60);
/// How long it is then reviewed again before those that nobody knows.
const KNOWN_FOR: Duration = Duration::from_secs(3600);
/// Most tokens that are remembered.
const KNOWN_MAX: usize = 1024;
/// Reviews of unknown tokens in a second, on average.
const GUESSES_PER_SECOND: f64 = 2.0;
/// Reviews of unknown tokens at once, after a pause: a team that signs in.
const GUESSES_BURST: f64 = 30.0;
/// Requests of one token in a second, on average: a page makes two, and a person may have a few open.
const REQUESTS_PER_SECOND: f64 = 20.0;
/// Requests of one token at once.
const REQUESTS_BURST: f64 = 100.0;
/// Most reviews at once.
const REVIEWS_MAX: usize = 8;
/// How long one may take, waiting included.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest token: it has to fit a cookie, of which browsers keep 4,096 bytes, a third longer than it is.
pub(super) const TOKEN_LEN_MAX: usize = 3000;

/// Why somebody may not look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// There is no token.
    Nothing,
    /// The token is not good.
    Token,
    /// It is good, and its owner may not look.
    NotAllowed,
    /// Too many requests.
    TooMany,
    /// It could not be found out.
    Unavailable,
}

/// So many at once, and so many a second.
#[derive(Debug)]
struct Bucket {
    tokens: f64,
    counted: Instant,
}

impl Bucket {
    fn full(burst: f64, now: Instant) -> Self {
        Self { tokens: burst, counted: now }
    }

    fn take(&mut self, now: Instant, per_second: f64, burst: f64) -> bool {
        let came = now.saturating_duration_since(self.counted).as_secs_f64() * per_second;
        (self.tokens, self.counted) = ((self.tokens + came).min(burst), now);
        let is_enough = self.tokens >= 1.0;
        if is_enough {
            self.tokens -= 1.0;
        }
        is_enough
    }
}

/// A token that was good.
#[derive(Debug)]
struct Known {
    reviewed: Instant,
    requests: Bucket,
}

#[derive(Debug)]
struct State {
    known: HashMap<blake3::Hash, Known>,
    guesses: Bucket,
}

/// Decides who may look.
pub(super) struct Gate {
    viewers: Arc<dyn Viewers>,
    numbers: Arc<Numbers>,
    state: Mutex<State>,
    reviews: Semaphore,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("viewers", &self.viewers).finish_non_exhaustive()
    }
}

impl Gate {
    pub(super) fn new(viewers: Arc<dyn Viewers>, numbers: Arc<Numbers>) -> Self {
        let guesses = Bucket::full(GUESSES_BURST, Instant::now());
        let state = Mutex::new(State { known: HashMap::new(), guesses });
        Self { viewers, numbers, state, reviews: Semaphore::new(REVIEWS_MAX) }
    }

    /// Whether whoever shows `token` may look now. Refusals are counted. Cancel safe.
    pub(super) async fn admit(&self, token: Option<&str>) -> Result<(), Refused> {
        let Some(token) = token.filter(|token| !token.is_empty()) else { return Err(self.refuse(Refusal::NoToken)) };
        if token.len() > TOKEN_LEN_MAX {
            return Err(self.refuse(Refusal::Malformed));
        }
        let hash = blake3::hash(token.as_bytes());
        if self.is_believed(&hash, Instant::now()).map_err(|why| self.refuse(why))? {
            return Ok(());
        }
        let reviewed = tokio::time::timeout(REVIEW_TIMEOUT, async {
            let _place = self.reviews.acquire().await.ok()?;
            Some(self.viewers.review(token).await)
        });
        match reviewed.await {
            Ok(Some(Ok(()))) => {
                self.remember(hash, Instant::now());
                Ok(())
            }
            Ok(Some(Err(ReviewError::Refused { why, message }))) => {
                tracing::debug!(reason = why.name(), message, "somebody may not see the status page");
                self.state.lock().known.remove(&hash);
                Err(self.refuse(why))
            }
            Ok(Some(Err(error @ ReviewError::Unavailable { .. }))) => {
                tracing::warn!(%error, "nobody can be let see the status page now");
                Err(Refused::Unavailable)
            }
            Ok(None) | Err(_) => Err(Refused::Unavailable),
        }
    }

    fn refuse(&self, why: Refusal) -> Refused {
        self.numbers.refused(why);
        match why {
            Refusal::NoToken => Refused::Nothing,
            Refusal::NotAllowed => Refused::NotAllowed,
            Refusal::TooMany => Refused::TooMany,
            _ => Refused::Token,
        }
    }

    /// Whether a token needs no review at `now`; an error when there is none to be had.
    fn is_believed(&self, hash: &blake3::Hash, now: Instant) -> Result<bool, Refusal> {
        let mut state = self.state.lock();
        let State { known, guesses } = &mut *state;
        let age = known.get(hash).map(|known| now.saturating_duration_since(known.reviewed));
        if age.is_some_and(|age| age >= KNOWN_FOR) {
            known.remove(hash);
        }
        let may_ask = match known.get_mut(hash) {
            Some(known) => known.requests.take(now, REQUESTS_PER_SECOND, REQUESTS_BURST),
            None => guesses.take(now, GUESSES_PER_SECOND, GUESSES_BURST),
        };
        if may_ask { Ok(age.is_some_and(|age| age < GOOD_FOR)) } else { Err(Refusal::TooMany) }
    }

    fn remember(&self, hash: blake3::Hash, now: Instant) {
        let mut state = self.state.lock();
        let known = &mut state.known;
        if known.len() >= KNOWN_MAX && !known.contains_key(&hash) {
            let oldest = known.iter().min_by_key(|(_, known)| known.reviewed).map(|(hash, _)| *hash);
            oldest.map(|oldest| known.remove(&oldest));
        }
        let fresh = || Known { reviewed: now, requests: Bucket::full(REQUESTS_BURST, now) };
        known.entry(hash).or_insert_with(fresh).reviewed = now;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::BoxFuture;

    use super::*;

    /// Believes what begins with `good`, and counts how often it is asked.
    #[derive(Debug, Default)]
    struct Words(AtomicUsize);

    impl Viewers for Words {
        fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<(), ReviewError>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                match token {
                    "stranger" => Err(ReviewError::refused(Refusal::NotAllowed, "may not")),
                    "away" => Err(ReviewError::Unavailable { reason: "away".to_owned() }),
                    token if token.starts_with("good") => Ok(()),
                    _ => Err(ReviewError::refused(Refusal::UnknownToken, "unknown")),
                }
            })
        }
    }

    #[tokio::test]
    async fn a_token_is_reviewed_once_a_minute_and_guesses_are_few_and_counted() {
        let (words, numbers) = (Arc::new(Words::default()), Arc::new(Numbers::default()));
        let gate = Gate::new(Arc::clone(&words) as Arc<dyn Viewers>, Arc::clone(&numbers));
        assert_eq!(gate.admit(None).await, Err(Refused::Nothing));
        assert_eq!(gate.admit(Some("")).await, Err(Refused::Nothing));
        assert_eq!(gate.admit(Some(&"x".repeat(TOKEN_LEN_MAX + 1))).await, Err(Refused::Token));
        assert_eq!(words.0.load(Ordering::Relaxed), 0);
        for _ in 0..10 {
            assert_eq!(gate.admit(Some("good")).await, Ok(()));
        }
        assert_eq!(words.0.load(Ordering::Relaxed), 1);
        assert_eq!(gate.admit(Some("stranger")).await, Err(Refused::NotAllowed));
        assert_eq!(gate.admit(Some("away")).await, Err(Refused::Unavailable));
        let mut refused = 0;
        for number in 0..200 {
            let outcome = gate.admit(Some(&format!("guess {number}"))).await;
            refused += usize::from(outcome == Err(Refused::TooMany));
        }
        assert!(refused > 100, "{refused} guesses were not looked at");
        assert_eq!(gate.admit(Some("good")).await, Ok(()), "who is in stays in");
        assert_eq!(gate.admit(Some("good too")).await, Err(Refused::TooMany), "a new one has to wait");
        assert_eq!(numbers.refusals(Refusal::NoToken), 2);
        assert_eq!(numbers.refusals(Refusal::NotAllowed), 1);
        assert!(numbers.refusals(Refusal::TooMany) > 100 && numbers.refusals(Refusal::UnknownToken) > 0);
    }

    #[tokio::test]
    async fn one_token_has_so_many_requests_and_the_memory_of_tokens_has_an_end() {
        let gate = Gate::new(Arc::new(Words::default()), Arc::new(Numbers::default()));
        assert_eq!(gate.admit(Some("good")).await, Ok(()));
        let mut refused = 0;
        for _ in 0..300 {
            refused += usize::from(gate.admit(Some("good")).await == Err(Refused::TooMany));
        }
        assert!(refused > 100, "{refused} refused");
        let now = Instant::now();
        for number in 0..2 * KNOWN_MAX {
            gate.remember(blake3::hash(&number.to_le_bytes()), now);
        }
        assert_eq!(gate.state.lock().known.len(), KNOWN_MAX);
    }

    #[test]
    fn what_was_good_is_reviewed_again_and_then_forgotten() {
        let gate = Gate::new(Arc::new(Words::default()), Arc::new(Numbers::default()));
        let (hash, now) = (blake3::hash(b"good"), Instant::now());
        gate.remember(hash, now);
        assert_eq!(gate.is_believed(&hash, now + GOOD_FOR / 2), Ok(true));
        assert_eq!(gate.is_believed(&hash, now + GOOD_FOR), Ok(false));
        gate.state.lock().guesses.tokens = 0.0;
        assert_eq!(gate.is_believed(&hash, now + GOOD_FOR), Ok(false), "it needs no place among guesses");
        let much_later = now + KNOWN_FOR;
        gate.state.lock().guesses = Bucket { tokens: 0.0, counted: much_later };
        assert_eq!(gate.is_believed(&hash, much_later), Err(Refusal::TooMany), "it is a guess again");
    }
}
