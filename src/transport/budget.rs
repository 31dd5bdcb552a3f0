//! A bound on bytes that a blocking thread has handed over, and a bound on bytes per second.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug)]
struct State {
    limit: usize,
    used: usize,
    closed: bool,
}

/// Lets so many bytes be on their way between a blocking thread and a task.
#[derive(Debug)]
pub(super) struct Budget {
    state: Mutex<State>,
    freed: Condvar,
}

impl Budget {
    pub(super) fn new(limit: usize) -> Self {
        Self { state: Mutex::new(State { limit, used: 0, closed: false }), freed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding the lock; the numbers are right in any case.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `bytes` fit; what is larger than the whole budget goes alone. False once closed.
    pub(super) fn acquire_blocking(&self, bytes: usize) -> bool {
        let mut state = self.state();
        while !state.closed && state.used > 0 && state.used + bytes > state.limit {
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if !state.closed {
            state.used += bytes;
        }
        !state.closed
    }

    /// From now on so many bytes; those that are on their way stay.
    pub(super) fn set_limit(&self, limit: usize) {
        self.state().limit = limit;
        self.freed.notify_all();
    }

    /// Gives `bytes` back.
    pub(super) fn release(&self, bytes: usize) {
        let mut state = self.state();
        state.used = state.used.saturating_sub(bytes);
        drop(state);
        self.freed.notify_all();
    }

    /// Lets nobody wait any more.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.freed.notify_all();
    }
}

/// How long after an idle time the rate may catch up.
const BURST: Duration = Duration::from_millis(10);

/// A token bucket that holds 10 ms worth of bytes.
#[derive(Debug)]
pub(super) struct Rate {
    bytes_per_second: u64,
    paid_until: Instant,
}

impl Rate {
    pub(super) fn new(bytes_per_second: u64, now: Instant) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), paid_until: now }
    }

    /// Largest piece to send in one go, so that a slow rate is even too.
    pub(super) fn piece_bytes(&self) -> usize {
        usize::try_from(self.bytes_per_second / 100).unwrap_or(usize::MAX).clamp(4096, 256 << 10)
    }

    /// Takes `bytes` from the bucket; when they may be sent.
    pub(super) fn take(&mut self, bytes: usize, now: Instant) -> Instant {
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let start = self.paid_until.max(earliest);
        let nanos = u128::from(bytes as u64) * 1_000_000_000 / u128::from(self.bytes_per_second);
        self.paid_until = start + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_a_second() {
        let start = Instant::now();
        let mut rate = Rate::new(1_000_000, start);
        let mut now = start;
        let mut sent = 0;
        while now < start + Duration::from_secs(1) {
            now = now.max(rate.take(4096, now));
            sent += 4096;
        }
        assert!((990_000..1_030_000).contains(&sent), "{sent}");
    }

    #[test]
    fn a_budget_lets_the_large_pass_alone_and_the_closed_not_at_all() {
        let budget = Budget::new(100);
        assert!(budget.acquire_blocking(1000));
        let waited = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| budget.acquire_blocking(1));
            budget.release(1000);
            waiter.join()
        });
        assert!(matches!(waited, Ok(true)));
        let refused = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| budget.acquire_blocking(100));
            budget.close();
            waiter.join()
        });
        assert!(matches!(refused, Ok(false)));
    }
}
