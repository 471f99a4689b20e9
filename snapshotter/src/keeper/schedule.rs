//! When the keeper starts the daemon, and when it gives the connections up. Times are arguments; nothing happens here.

use std::time::{Duration, Instant};

/// A daemon that has answered for so long runs well. A start takes a tenth of this.
const SETTLED_AFTER: Duration = Duration::from_secs(1);
/// A daemon that has not answered after so long never will. It opens its store within a second, and waits for its
/// predecessor's at most ten.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// The first pause between starts. It doubles with each daemon that did not run well.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// The longest pause: short beside the deadline, long beside what a start costs.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How often a daemon that may be dying is looked at.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Start the daemon.
    Start,
    /// End the connections, and a daemon that does not answer.
    GiveUp,
    /// End a daemon that does not answer.
    Replace,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Daemon {
    /// It is to be started then.
    Absent { start_at: Instant },
    /// It was started and has not answered.
    Starting { since: Instant },
    /// It was killed and cannot end.
    Dying,
    /// It has answered.
    Answering { since: Instant },
}

/// What is known of the daemons so far.
#[derive(Debug)]
pub(super) struct Schedule {
    deadline: Duration,
    daemon: Daemon,
    /// Since when no daemon has run well; `None` while one does.
    unwell_since: Option<Instant>,
    gave_up: bool,
    /// Daemons in a row that ended before they ran well.
    failures: u32,
}

impl Schedule {
    /// The first daemon is due at once. Without one that runs well for `deadline`, the connections are given up.
    pub(super) fn new(now: Instant, deadline: Duration) -> Self {
        let daemon = Daemon::Absent { start_at: now };
        Self { deadline, daemon, unwell_since: Some(now), gave_up: false, failures: 0 }
    }

    /// The daemon was started.
    pub(super) fn started(&mut self, now: Instant) {
        self.daemon = Daemon::Starting { since: now };
    }

    /// The daemon answers.
    pub(super) fn ready(&mut self, now: Instant) {
        if matches!(self.daemon, Daemon::Starting { .. }) {
            self.daemon = Daemon::Answering { since: now };
            // What it is given to show has a deadline of its own, also when it ends before it has run well.
            if std::mem::take(&mut self.gave_up) {
                self.unwell_since = Some(now);
            }
        }
    }

    /// The daemon is dying and may be for long: it waits for itself.
    pub(super) fn dying(&mut self, now: Instant) {
        self.settle(now);
        self.daemon = Daemon::Dying;
        self.unwell_since.get_or_insert(now);
    }

    /// The daemon has ended.
    pub(super) fn ended(&mut self, now: Instant) {
        self.settle(now);
        if self.unwell_since.is_none() {
            self.unwell_since = Some(now);
        } else {
            self.failures = self.failures.saturating_add(1);
        }
        self.daemon = Daemon::Absent { start_at: now + self.pause() };
    }

    /// The daemon has ended because it was told to hand over. However short it ran, nothing is wrong with it.
    pub(super) fn handed_over(&mut self, now: Instant) {
        self.settle(now);
        self.unwell_since.get_or_insert(now);
        self.daemon = Daemon::Absent { start_at: now };
    }

    /// One failure may be anything: it costs no pause.
    fn pause(&self) -> Duration {
        match self.failures {
            0 | 1 => Duration::ZERO,
            more => PAUSE_MIN.saturating_mul(1 << (more - 2).min(16)).min(PAUSE_MAX),
        }
    }

    fn settle(&mut self, now: Instant) {
        if let Daemon::Answering { since } = self.daemon
            && now >= since + SETTLED_AFTER
        {
            (self.unwell_since, self.gave_up, self.failures) = (None, false, 0);
        }
    }

    /// What is to be done now; asked again until it is nothing.
    pub(super) fn due(&mut self, now: Instant) -> Option<Due> {
        self.settle(now);
        let is_late = self.unwell_since.is_some_and(|since| now >= since + self.deadline);
        if is_late && !self.gave_up && !matches!(self.daemon, Daemon::Answering { .. }) {
            self.gave_up = true;
            return Some(Due::GiveUp);
        }
        match self.daemon {
            Daemon::Absent { start_at } => (now >= start_at).then_some(Due::Start),
            Daemon::Starting { since } if now >= since + START_TIMEOUT => {
                self.daemon = Daemon::Starting { since: now };
                Some(Due::Replace)
            }
            Daemon::Starting { .. } | Daemon::Answering { .. } | Daemon::Dying => None,
        }
    }

    /// How long nothing is due.
    pub(super) fn idle(&self, now: Instant) -> Duration {
        let start = match self.daemon {
            Daemon::Absent { start_at } => Some(start_at),
            Daemon::Answering { since } => Some(since + SETTLED_AFTER).filter(|_| self.unwell_since.is_some()),
            Daemon::Starting { since } => Some(since + START_TIMEOUT),
            Daemon::Dying => None,
        };
        let give_up = self.unwell_since.map(|since| since + self.deadline).filter(|_| !self.gave_up);
        let next = [start, give_up].into_iter().flatten().map(|at| at.saturating_duration_since(now)).min();
        next.unwrap_or(LOOK_INTERVAL).min(LOOK_INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(60);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_daemon_that_ran_well_is_started_again_at_once() {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(now, DEADLINE);
        for _ in 0..100 {
            assert_eq!(schedule.due(now), Some(Due::Start));
            schedule.started(now);
            assert_eq!(schedule.due(now), None);
            schedule.ready(now);
            now += seconds(2);
            schedule.ended(now);
        }
    }

    #[test]
    fn daemons_that_hand_over_follow_each_other_at_once() {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(now, DEADLINE);
        for _ in 0..100 {
            assert_eq!(schedule.due(now), Some(Due::Start));
            schedule.started(now);
            schedule.ready(now);
            now += SETTLED_AFTER / 10;
            schedule.handed_over(now);
        }
    }

    #[test]
    fn a_daemon_that_does_not_run_well_gets_growing_pauses_and_the_connections_end_once() {
        let begin = Instant::now();
        let mut now = begin;
        let mut schedule = Schedule::new(now, DEADLINE);
        let (mut starts, mut given_up) = (Vec::new(), Vec::new());
        while now < begin + seconds(120) {
            match schedule.due(now) {
                Some(Due::Start) => {
                    starts.push(now - begin);
                    schedule.started(now);
                    schedule.ready(now);
                    schedule.ended(now);
                }
                Some(Due::GiveUp) => given_up.push(now - begin),
                Some(Due::Replace) => panic!("every daemon answered"),
                None => now += schedule.idle(now),
            }
        }
        assert_eq!(starts[..2], [Duration::ZERO; 2]);
        assert_eq!(starts[2], PAUSE_MIN);
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] <= PAUSE_MAX), "{starts:?}");
        assert!((20..40).contains(&starts.len()), "{starts:?}");
        assert_eq!(given_up, [DEADLINE]);
    }

    #[test]
    fn connections_are_given_up_again_after_a_daemon_that_ran_well() {
        let begin = Instant::now();
        let mut schedule = Schedule::new(begin, DEADLINE);
        schedule.started(begin + seconds(1));
        assert_eq!(schedule.due(begin + DEADLINE), Some(Due::GiveUp), "it never answered");
        assert_eq!(schedule.due(begin + DEADLINE), None);
        schedule.ready(begin + seconds(61));
        assert_eq!(schedule.due(begin + seconds(63)), None);
        schedule.ended(begin + seconds(70));
        assert_eq!(schedule.due(begin + seconds(70)), Some(Due::Start));
        schedule.started(begin + seconds(71));
        assert_eq!(schedule.due(begin + seconds(129)), None);
        assert_eq!(schedule.due(begin + seconds(130)), Some(Due::GiveUp));
        assert_eq!(schedule.due(begin + seconds(130)), None);
        assert_eq!(schedule.due(begin + seconds(131)), Some(Due::Replace), "nor does it answer afterwards");
        assert_eq!(schedule.due(begin + seconds(131)), None);
    }

    #[test]
    fn connections_of_a_daemon_that_answered_late_and_ended_early_are_given_up() {
        let begin = Instant::now();
        let mut schedule = Schedule::new(begin, DEADLINE);
        schedule.started(begin);
        assert_eq!(schedule.due(begin + DEADLINE), Some(Due::GiveUp), "there was nothing to give up");
        let ready = begin + DEADLINE + seconds(1);
        schedule.ready(ready);
        schedule.ended(ready + SETTLED_AFTER / 2);
        schedule.started(ready + SETTLED_AFTER / 2);
        assert_eq!(schedule.due(ready + DEADLINE - seconds(2)), None);
        assert_eq!(schedule.due(ready + DEADLINE), Some(Due::GiveUp));
    }

    #[test]
    fn a_daemon_that_does_not_finish_dying_is_given_up() {
        let begin = Instant::now();
        let mut schedule = Schedule::new(begin, DEADLINE);
        schedule.started(begin);
        schedule.ready(begin);
        for second in 10..70 {
            schedule.dying(begin + seconds(second));
            assert_eq!(schedule.due(begin + seconds(second)), None);
        }
        assert_eq!(schedule.due(begin + seconds(70)), Some(Due::GiveUp));
    }
}
