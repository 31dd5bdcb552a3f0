//! What is counted while the missing pages come in.

use std::time::Duration;

/// Numbers for the report and the tests. Pages are of 4 KiB unless said otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Missing at the beginning. `initial + inherited = installed + dropped` when all is done.
    pub initial: u64,
    /// Missing in children by fork when they were born.
    pub inherited: u64,
    /// Placed with their contents or as zeros that the source told of.
    pub installed: u64,
    /// Wanted no more: unmapped, dropped, or of a process that is gone.
    pub dropped: u64,
    /// Messages about a thread that waits for a page.
    pub faults: u64,
    /// Pages that were asked for (of any size).
    pub asked: u64,
    /// Pages that arrived and were not missing: sent twice, or dropped meanwhile.
    pub unwanted: u64,
    /// Pages that should have been missing and were there: a defect, here or at the source.
    pub present: u64,
    /// Places that were never missing and were filled with zeros upon a fault (of any size).
    pub zero_filled: u64,
    /// Huge pages whose parts were given up for want of room, and asked for again.
    pub evicted: u64,
    /// From a fault's message to its page: counts by powers of two of microseconds (below 1, 2, 4, ...).
    pub latency: [u64; 24],
    /// The longest of them.
    pub longest: Duration,
}

impl Stats {
    pub(super) fn waited(&mut self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bits = usize::try_from(u64::BITS - micros.leading_zeros()).unwrap_or(0);
        if let Some(slot) = self.latency.get_mut(bits.min(23)) {
            *slot += 1;
        }
        self.longest = self.longest.max(time);
    }

    /// A time below which this share (0 to 100) of the faults were answered; a power of two microseconds.
    pub fn percentile(&self, share: u64) -> Duration {
        let all: u64 = self.latency.iter().sum();
        let mut seen = 0;
        for (bits, count) in self.latency.iter().enumerate() {
            seen += count;
            if seen * 100 >= all * share {
                return Duration::from_micros(1 << bits).min(self.longest);
            }
        }
        self.longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_known_times() {
        let mut stats = Stats::default();
        for _ in 0..98 {
            stats.waited(Duration::from_micros(5));
        }
        stats.waited(Duration::from_micros(700));
        stats.waited(Duration::from_secs(3600));
        assert_eq!(stats.percentile(50), Duration::from_micros(8));
        assert_eq!(stats.percentile(99), Duration::from_micros(1024));
        assert_eq!(stats.longest, Duration::from_secs(3600));
        assert_eq!(stats.latency.iter().sum::<u64>(), 100);
    }
}
