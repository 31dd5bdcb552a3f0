//! How fast bytes go, now and on the whole: pure, the time is given.

use std::time::{Duration, Instant};

/// A rate is taken over one to two windows.
const WINDOW: Duration = Duration::from_secs(1);

/// Counts bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Meter {
    first: Option<Instant>,
    last: Option<Instant>,
    total: u64,
    /// The window before the current one: its bytes and its length.
    before: (u64, Duration),
    /// The current one: its bytes, and since when.
    current: (u64, Option<Instant>),
}

impl Meter {
    /// Bytes that went at `now`.
    pub(super) fn add(&mut self, now: Instant, bytes: u64) {
        self.first.get_or_insert(now);
        self.last = Some(now);
        self.total = self.total.saturating_add(bytes);
        self.roll(now);
        self.current.0 = self.current.0.saturating_add(bytes);
    }

    /// Begins another window if the current one is over.
    fn roll(&mut self, now: Instant) {
        let since = *self.current.1.get_or_insert(now);
        let age = now.saturating_duration_since(since);
        if age >= WINDOW {
            self.before = (self.current.0, age);
            self.current = (0, Some(now));
        }
    }

    /// Bytes per second now: 0 if nothing has gone for two windows.
    pub(super) fn now(mut self, now: Instant) -> u64 {
        match self.last {
            Some(last) if now.saturating_duration_since(last) < WINDOW * 2 => {}
            _ => return 0,
        }
        self.roll(now);
        let age = self.current.1.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        rate(self.before.0.saturating_add(self.current.0), self.before.1 + age)
    }

    /// Bytes per second from the first byte to the last.
    pub(super) fn mean(&self) -> u64 {
        match (self.first, self.last) {
            (Some(first), Some(last)) => rate(self.total, last.saturating_duration_since(first)),
            _ => 0,
        }
    }
}

/// Per second; of less than a millisecond nothing can be said.
fn rate(bytes: u64, took: Duration) -> u64 {
    if took < Duration::from_millis(1) {
        return 0;
    }
    u64::try_from(u128::from(bytes) * 1_000_000_000 / took.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_flow_then_a_slower_one_then_none() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut meter = Meter::default();
        assert_eq!((meter.now(start), meter.mean()), (0, 0));
        for ms in (0..10_000).step_by(10) {
            meter.add(at(ms), 1000);
        }
        let near =
            |got: u64, want: u64| assert!(got.abs_diff(want) <= want / 50, "{got} is not about {want}");
        near(meter.now(at(9_990)), 100_000);
        near(meter.mean(), 100_000);
        for ms in (10_000..20_000).step_by(10) {
            meter.add(at(ms), 100);
        }
        near(meter.now(at(19_990)), 10_000);
        near(meter.mean(), 55_000);
        assert!(meter.now(at(21_000)) < 10_000);
        assert_eq!(meter.now(at(22_000)), 0);
        near(meter.mean(), 55_000);
    }

    #[test]
    fn one_frame_is_no_rate() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.add(start, u64::MAX);
        meter.add(start, u64::MAX);
        assert_eq!((meter.now(start), meter.mean()), (0, 0));
    }
}
