//! Answers of helpers and plugins, kept for as long as they may be.
//!
//! An answer has three ages: young (used as it is), to be renewed (asked again, but still good if that fails), and ended.
//! A provider that fails or has nothing is not asked again for a moment. Of the requests that need the same answer, one
//! asks and the others wait for it; one that is dropped while it asks lets the next one do it.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::error::CredentialsError;

/// A provider's failure, which more than one request is told of.
pub(super) type Problem = Arc<CredentialsError>;

/// Answers kept of one provider: as many registries and images as a node sees in a day. The one that ends first makes
/// room.
const MAX_ANSWERS: usize = 1024;

/// What a provider says when it is asked.
pub(super) struct Fresh<V> {
    /// Under which key it may be kept.
    pub(super) key: String,
    pub(super) value: V,
    /// How long; zero for not at all.
    pub(super) lifetime: Duration,
}

/// How long nothing, or a failure, is remembered: the next reads come within milliseconds, and a login that is added
/// should be seen soon.
const NEGATIVE: Duration = Duration::from_secs(10);

/// An answer is renewed a fifth of its life before its end, and at most this long before.
const RENEW_BEFORE_MAX: Duration = Duration::from_secs(300);

/// An answer.
#[derive(Debug, Clone)]
pub(super) struct Kept<T> {
    pub(super) value: T,
    got_at: Instant,
    renew_at: Instant,
    ends_at: Instant,
}

impl<T> Kept<T> {
    /// `value`, good for `lifetime` from `now` on.
    fn new(value: T, now: Instant, lifetime: Duration) -> Self {
        let early = (lifetime / 5).min(RENEW_BEFORE_MAX);
        Self { value, got_at: now, renew_at: now + (lifetime - early), ends_at: now + lifetime }
    }

    /// A failure or an empty answer.
    fn negative(value: T, now: Instant) -> Self {
        Self { value, got_at: now, renew_at: now + NEGATIVE, ends_at: now + NEGATIVE }
    }

    fn map<U>(self, map: impl FnOnce(T) -> U) -> Kept<U> {
        Kept { value: map(self.value), got_at: self.got_at, renew_at: self.renew_at, ends_at: self.ends_at }
    }

    /// When it should be renewed; `None` for one that may not be kept.
    pub(super) fn renew_at(&self) -> Option<Instant> {
        (self.ends_at > self.got_at).then_some(self.renew_at)
    }

    fn is_young(&self, now: Instant) -> bool {
        now < self.renew_at
    }

    fn is_good(&self, now: Instant) -> bool {
        now < self.ends_at
    }

    /// The same answer, not to be renewed for a moment: renewing has just failed.
    fn rested(mut self, now: Instant) -> Self {
        self.renew_at = (now + NEGATIVE).min(self.ends_at);
        self
    }
}

/// The answers of one provider.
#[derive(Debug)]
pub(super) struct Cache<T> {
    answers: parking_lot::Mutex<BTreeMap<String, Kept<T>>>,
    asking: parking_lot::Mutex<BTreeMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        Self { answers: parking_lot::Mutex::default(), asking: parking_lot::Mutex::default() }
    }
}

impl<T: Clone> Cache<T> {
    /// The answer for the first of `keys` that has a good one.
    fn get(&self, keys: &[String], now: Instant) -> Option<(String, Kept<T>)> {
        let answers = self.answers.lock();
        let good = |key: &String| answers.get(key).filter(|kept| kept.is_good(now));
        keys.iter().find_map(|key| Some((key.clone(), good(key)?.clone())))
    }

    fn put(&self, key: String, kept: Kept<T>) {
        let mut answers = self.answers.lock();
        if answers.len() >= MAX_ANSWERS && !answers.contains_key(&key) {
            let first = answers.iter().min_by_key(|(_, kept)| kept.ends_at).map(|(key, _)| key.clone());
            first.and_then(|first| answers.remove(&first));
        }
        answers.insert(key, kept);
    }

    /// What whoever asks for `key` has to hold.
    fn turn(&self, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut asking = self.asking.lock();
        if let Some(turn) = asking.get(key).and_then(Weak::upgrade) {
            return turn;
        }
        asking.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::default();
        asking.insert(key.to_owned(), Arc::downgrade(&turn));
        turn
    }
}

impl<V: Clone> Cache<Result<V, Problem>> {
    /// The answer for `keys`, from the cache or by `ask`, which is polled only then. One that `is_refused` says was refused by a registry is asked
    /// for again, unless it is brand new. With the answer, or instead of it, comes what went wrong.
    pub(super) async fn answer(
        &self,
        program: &str,
        keys: &[String],
        deadline: Instant,
        is_refused: impl Fn(&V) -> bool,
        ask: impl Future<Output = Result<Fresh<V>, CredentialsError>>,
    ) -> (Option<Kept<V>>, Option<Problem>) {
        let spent = |value: &V, got_at: Instant| is_refused(value) && got_at.elapsed() >= NEGATIVE;
        let usable = |kept: &Kept<Result<V, Problem>>| match &kept.value {
            Ok(value) => kept.is_young(Instant::now()) && !spent(value, kept.got_at),
            Err(_) => true,
        };
        if let Some((_, kept)) = self.get(keys, Instant::now()).filter(|(_, kept)| usable(kept)) {
            return split(kept);
        }
        let turn = self.turn(keys.first().map_or("", String::as_str));
        let begun = Instant::now();
        let Ok(_turn) = timeout_at(deadline, turn.lock()).await else {
            let timeout = CredentialsError::Timeout { program: program.to_owned(), waited: begun.elapsed() };
            return (None, Some(Arc::new(timeout)));
        };
        let old = self.get(keys, Instant::now());
        if let Some((_, kept)) = old.as_ref().filter(|(_, kept)| usable(kept)) {
            return split(kept.clone());
        }
        match ask.await {
            Ok(Fresh { key, value, lifetime }) => {
                let kept = Kept::new(value, Instant::now(), lifetime);
                if !lifetime.is_zero() {
                    self.put(key, kept.clone().map(Ok));
                }
                (Some(kept), None)
            }
            Err(error) => {
                let (problem, now) = (Arc::new(error), Instant::now());
                match old {
                    Some((key, Kept { value: Ok(value), got_at, renew_at, ends_at })) if !spent(&value, got_at) => {
                        let kept = Kept { value, got_at, renew_at, ends_at }.rested(now);
                        self.put(key, kept.clone().map(Ok));
                        (Some(kept), Some(problem))
                    }
                    _ => {
                        let key = keys.first().cloned().unwrap_or_default();
                        self.put(key, Kept::negative(Err(Arc::clone(&problem)), now));
                        (None, Some(problem))
                    }
                }
            }
        }
    }
}

fn split<V>(kept: Kept<Result<V, Problem>>) -> (Option<Kept<V>>, Option<Problem>) {
    let Kept { value, got_at, renew_at, ends_at } = kept;
    match value {
        Ok(value) => (Some(Kept { value, got_at, renew_at, ends_at }), None),
        Err(problem) => (None, Some(problem)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_ages_and_are_bounded() {
        let now = Instant::now();
        let after = |seconds| now + Duration::from_secs(seconds);
        let kept = Kept::new(1, now, Duration::from_secs(100));
        assert!(kept.is_young(after(79)) && !kept.is_young(after(80)) && kept.is_good(after(99)));
        assert!(!kept.is_good(after(100)));
        assert!(kept.clone().rested(after(85)).is_young(after(94)), "not asked again for a moment");
        assert!(!kept.rested(after(95)).is_young(after(100)), "and never used past its end");
        let long = Kept::new(1, now, Duration::from_secs(43_200));
        assert!(long.is_young(after(42_899)) && !long.is_young(after(42_901)));

        let cache = Cache::default();
        for number in 0..MAX_ANSWERS as u64 + 3 {
            cache.put(format!("{number}"), Kept::new(number, now, Duration::from_secs(number + 10)));
        }
        assert_eq!(cache.answers.lock().len(), MAX_ANSWERS);
        assert!(cache.get(&["0".to_owned()], now).is_none(), "the one that ended first is gone");
        assert_eq!(cache.get(&["x".to_owned(), "7".to_owned()], now).expect("kept").1.value, 7);
    }

    /// What a cache says whose only answer, good for 100 s, came `age` seconds ago, when the provider answers `now`.
    async fn asked(age: u64, is_refused: bool, now: Result<u8, ()>) -> (Option<u8>, bool, bool) {
        let (cache, key) = (Cache::<Result<u8, Problem>>::default(), "key".to_owned());
        let got_at = Instant::now() - Duration::from_secs(age);
        cache.put(key.clone(), Kept::new(Ok(1), got_at, Duration::from_secs(100)));
        let mut was_asked = false;
        let ask = async {
            was_asked = true;
            let failed = |()| CredentialsError::Answer { program: "p".to_owned(), reason: "r".to_owned() };
            Ok(Fresh { key: key.clone(), value: now.map_err(failed)?, lifetime: Duration::from_secs(100) })
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        let keys = [key.clone()];
        let (kept, problem) = cache.answer("p", &keys, deadline, |value| is_refused && *value == 1, ask).await;
        (kept.map(|kept| kept.value), was_asked, problem.is_some())
    }

    #[tokio::test]
    async fn an_answer_is_asked_for_again_when_it_is_old_or_was_refused() {
        assert_eq!(asked(70, false, Ok(2)).await, (Some(1), false, false), "young");
        assert_eq!(asked(85, false, Ok(2)).await, (Some(2), true, false), "to be renewed");
        assert_eq!(asked(85, false, Err(())).await, (Some(1), true, true), "still good when renewing fails");
        assert_eq!(asked(101, false, Err(())).await, (None, true, true), "ended");
        assert_eq!(asked(5, true, Ok(2)).await, (Some(1), false, false), "refused, but brand new");
        assert_eq!(asked(11, true, Ok(2)).await, (Some(2), true, false), "refused");
        assert_eq!(asked(11, true, Err(())).await, (None, true, true), "what was refused is not good");
    }
}
