//! When a replica takes the Lease, and until when it leads. Pure: it is told what is there and what time it is.

use std::time::Duration;

use tokio::time::Instant;

use super::Timing;

/// What the Lease says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    /// Who has it; empty when nobody has.
    pub(super) holder: String,
    /// How long it counts after it was renewed.
    pub(super) duration: Duration,
    /// Another with every write.
    pub(super) version: String,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Take or renew it, if it is still as it was seen.
    Take,
    /// Another has it; nothing changes before this.
    Wait(Instant),
}

/// One replica.
#[derive(Debug)]
pub(super) struct Candidate {
    identity: String,
    timing: Timing,
    /// The version that was seen last, and when it was seen first.
    seen: Option<(String, Instant)>,
    leads_until: Option<Instant>,
}

impl Candidate {
    pub(super) fn new(identity: String, timing: Timing) -> Self {
        Self { identity, timing, seen: None, leads_until: None }
    }

    /// Until when it leads; `None` when it does not.
    pub(super) fn leads_until(&self) -> Option<Instant> {
        self.leads_until
    }

    /// Takes in what the Lease says, as it was at `now` or later, and says what to do.
    pub(super) fn sees(&mut self, now: Instant, held: Option<&Held>) -> Step {
        let Some(held) = held else {
            self.lost();
            return Step::Take;
        };
        if held.holder == self.identity {
            return Step::Take;
        }
        self.lost();
        if held.holder.is_empty() {
            return Step::Take;
        }
        let since = match &self.seen {
            Some((version, since)) if *version == held.version => *since,
            _ => {
                self.seen = Some((held.version.clone(), now));
                now
            }
        };
        let ends = since + held.duration;
        if now >= ends { Step::Take } else { Step::Wait(ends) }
    }

    /// It has taken or renewed the Lease by a request that began at `began`.
    pub(super) fn took(&mut self, began: Instant, version: &str) {
        self.seen = Some((version.to_owned(), began));
        self.leads_until = Some(began + self.timing.renew_deadline);
    }

    /// It leads no more.
    pub(super) fn lost(&mut self) {
        self.leads_until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate() -> (Candidate, Instant) {
        (Candidate::new("me".to_owned(), Timing::default()), Instant::now())
    }

    fn held(holder: &str, version: &str) -> Held {
        Held { holder: holder.to_owned(), duration: Duration::from_secs(10), version: version.to_owned() }
    }

    #[test]
    fn what_nobody_has_is_taken_and_renewed() {
        let (mut me, now) = candidate();
        assert_eq!(me.sees(now, None), Step::Take);
        assert_eq!(me.leads_until(), None);
        me.took(now, "1");
        assert_eq!(me.leads_until(), Some(now + Duration::from_secs(7)));
        let later = now + Duration::from_secs(2);
        assert_eq!(me.sees(later, Some(&held("me", "1"))), Step::Take);
        me.took(later, "2");
        assert_eq!(me.leads_until(), Some(later + Duration::from_secs(7)));
        assert_eq!(me.sees(later, Some(&held("", "3"))), Step::Take);
        assert_eq!(me.leads_until(), None);
    }

    #[test]
    fn what_another_has_is_taken_when_it_has_not_changed_for_its_time() {
        let (mut me, now) = candidate();
        let at = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(me.sees(now, Some(&held("you", "1"))), Step::Wait(at(10)));
        assert_eq!(me.sees(at(9), Some(&held("you", "1"))), Step::Wait(at(10)));
        assert_eq!(me.sees(at(9), Some(&held("you", "2"))), Step::Wait(at(19)));
        assert_eq!(me.sees(at(18), Some(&held("you", "2"))), Step::Wait(at(19)));
        assert_eq!(me.sees(at(19), Some(&held("you", "2"))), Step::Take);
        // A third was quicker.
        assert_eq!(me.sees(at(19), Some(&held("they", "3"))), Step::Wait(at(29)));
    }

    #[test]
    fn a_leader_that_sees_another_leads_no_more_and_ends_before_others_begin() {
        let (mut me, now) = candidate();
        me.took(now, "1");
        let mut you = Candidate::new("you".to_owned(), Timing::default());
        let Step::Wait(taken_at) = you.sees(now, Some(&held("me", "1"))) else { panic!("taken too early") };
        assert!(me.leads_until().is_some_and(|end| end < taken_at));
        assert!(matches!(me.sees(now, Some(&held("you", "2"))), Step::Wait(_)));
        assert_eq!(me.leads_until(), None);
    }
}
