//! From times to places on a picture: as the clock goes, but for long pauses, which are cut to a mark.

/// Width of the mark of a pause, in pixels.
pub(super) const PAUSE_WIDTH: f64 = 30.0;
/// Pauses that are cut.
const PAUSES_MAX: usize = 8;
/// A pause is cut when it is longer than this share of the time in which something was under way.
const PAUSE_SHARE: f64 = 0.2;
/// Shorter pauses are never cut, in microseconds.
const PAUSE_MIN_US: u64 = 20_000;
/// How far apart ticks are at least, in pixels.
const TICK_WIDTH: f64 = 110.0;

/// A part without a long pause, and where it lies.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Part {
    start_us: u64,
    end_us: u64,
    x: f64,
}

/// The scale.
#[derive(Debug)]
pub(super) struct Timescale {
    parts: Vec<Part>,
    pixels_per_us: f64,
}

impl Timescale {
    /// A scale of `width` pixels from `left` on for what happened in `spans`, each with its start and end.
    pub(super) fn new(mut spans: Vec<(u64, u64)>, left: f64, width: f64) -> Self {
        spans.sort_unstable();
        let mut busy: Vec<(u64, u64)> = Vec::new();
        for (start, end) in spans {
            match busy.last_mut() {
                Some((_, last)) if start <= *last => *last = end.max(*last),
                _ => busy.push((start, end.max(start))),
            }
        }
        let busy_us: u64 = busy.iter().map(|(start, end)| end - start).sum();
        let shortest = ((busy_us as f64 * PAUSE_SHARE) as u64).max(PAUSE_MIN_US);
        let mut pauses: Vec<u64> = busy.windows(2).map(|pair| pair[1].0 - pair[0].1).collect();
        pauses.retain(|pause| *pause > shortest);
        pauses.sort_unstable_by(|a, b| b.cmp(a));
        let shortest = pauses.get(PAUSES_MAX).copied().unwrap_or(shortest).max(shortest);
        let mut parts: Vec<(u64, u64)> = Vec::new();
        for (start, end) in busy {
            match parts.last_mut() {
                Some((_, last)) if start - *last <= shortest => *last = end,
                _ => parts.push((start, end)),
            }
        }
        if parts.is_empty() {
            parts.push((0, 0));
        }
        let shown_us: u64 = parts.iter().map(|(start, end)| end - start).sum();
        let room = width - PAUSE_WIDTH * (parts.len() - 1) as f64;
        let pixels_per_us = room / shown_us.max(1) as f64;
        let mut x = left;
        let parts = parts.into_iter().map(|(start_us, end_us)| {
            let part = Part { start_us, end_us, x };
            x += (end_us - start_us) as f64 * pixels_per_us + PAUSE_WIDTH;
            part
        });
        Self { parts: parts.collect(), pixels_per_us }
    }

    /// Where a time lies.
    pub(super) fn x(&self, at_us: u64) -> f64 {
        let part = self.parts.iter().rev().find(|part| part.start_us <= at_us).or(self.parts.first());
        part.map_or(0.0, |part| {
            part.x + (at_us.clamp(part.start_us, part.end_us) - part.start_us) as f64 * self.pixels_per_us
        })
    }

    /// Where pauses were cut, and how long they are.
    pub(super) fn pauses(&self) -> Vec<(f64, u64)> {
        let cut = |pair: &[Part]| (pair[1].x - PAUSE_WIDTH, pair[1].start_us - pair[0].end_us);
        self.parts.windows(2).map(cut).collect()
    }

    /// Round times, and where they lie.
    pub(super) fn ticks(&self) -> Vec<(f64, u64)> {
        let wanted_us = (TICK_WIDTH / self.pixels_per_us).max(1.0);
        let power = 10_f64.powf(wanted_us.log10().floor());
        let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= wanted_us).unwrap_or(10.0);
        let step = ((factor * power) as u64).max(1);
        let mut ticks: Vec<(f64, u64)> = Vec::new();
        for part in &self.parts {
            let mut at = part.start_us.next_multiple_of(step);
            while at <= part.end_us {
                ticks.push((self.x(at), at));
                at += step;
            }
        }
        ticks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_pauses_are_cut_and_order_is_kept() {
        let hour = 3_600_000_000;
        let scale = Timescale::new(vec![(0, 1_000_000), (500_000, 2_000_000), (hour, hour + 1_000_000)], 100.0, 1000.0);
        let [(x, length)] = scale.pauses()[..] else { panic!("{scale:?}") };
        assert_eq!(length, hour - 2_000_000);
        assert!(scale.x(2_000_000) <= x + 0.01 && scale.x(hour) >= x + PAUSE_WIDTH - 0.01);
        assert!((scale.x(0) - 100.0).abs() < 0.01 && (scale.x(hour + 1_000_000) - 1100.0).abs() < 0.01);
        let ticks = scale.ticks();
        assert!(ticks.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1) && (4..=12).contains(&ticks.len()), "{ticks:?}");
    }

    #[test]
    fn a_scale_of_nothing_and_of_a_moment_works() {
        for spans in [vec![], vec![(0, 0)], vec![(5, 5), (5, 6)]] {
            let scale = Timescale::new(spans, 10.0, 100.0);
            let x = scale.x(5);
            assert!((10.0..=110.0).contains(&x), "{x}");
            assert!(scale.ticks().len() <= 12, "{:?}", scale.ticks());
        }
    }

    #[test]
    fn no_more_pauses_are_cut_than_there_is_room_for() {
        let spans = (0..1000_u64).map(|at| (at * 10_000_000, at * 10_000_000 + 10)).collect();
        let scale = Timescale::new(spans, 0.0, 900.0);
        assert!(scale.pauses().len() <= PAUSES_MAX, "{}", scale.pauses().len());
    }
}
