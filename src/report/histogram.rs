//! How long single events took, kept in a fixed amount of memory.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Each power of two is divided into so many buckets (as bits): a quantile is at most 1/16 too large.
const SPLIT_BITS: u32 = 4;
const SPLIT: usize = 1 << SPLIT_BITS;
/// Buckets for every u64: those below [`SPLIT`] hold one value each.
const BUCKETS: usize = (64 - SPLIT_BITS as usize + 1) * SPLIT;

/// Counts of durations in buckets that grow with them. Any thread may add to it: nothing is locked or
/// allocated for a sample.
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    max: AtomicU64,
}

/// What people ask of a histogram; durations in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Samples.
    pub count: u64,
    /// Half of them took no longer.
    pub p50: f64,
    /// 99 of 100 took no longer.
    pub p99: f64,
    /// None took longer.
    pub max: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), max: AtomicU64::new(0) }
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Histogram").field(&self.latency()).finish()
    }
}

impl Histogram {
    /// Adds a sample.
    pub fn record(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get(bucket_of(nanos)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.max.fetch_max(nanos, Ordering::Relaxed);
    }

    /// The summary of what was recorded so far.
    pub fn latency(&self) -> Latency {
        let counts: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        // The counts may have gone on while they were read: what was read adds up to itself.
        let count: u64 = counts.iter().sum();
        let max = self.max.load(Ordering::Relaxed);
        let at = |percent: u64| {
            let rank = (u128::from(count) * u128::from(percent)).div_ceil(100);
            let mut seen = 0u128;
            let bucket = counts.iter().position(|n| {
                seen += u128::from(*n);
                *n > 0 && seen >= rank
            });
            micros(bucket.map_or(0, last_of).min(max))
        };
        Latency { count, p50: at(50), p99: at(99), max: micros(max) }
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, p50, p99, max } = self;
        write!(f, "{count}, p50 {p50:.1} µs, p99 {p99:.1} µs, max {max:.1} µs")
    }
}

#[allow(clippy::cast_precision_loss, reason = "shown with few digits")]
fn micros(nanos: u64) -> f64 {
    (nanos as f64 / 100.0).round() / 10.0
}

/// The bucket of a value: its highest bit chooses the power of two, the next bits the part of it.
fn bucket_of(value: u64) -> usize {
    let power = 63 - (value | 1).leading_zeros();
    let Some(shift) = power.checked_sub(SPLIT_BITS) else { return usize::try_from(value).unwrap_or(0) };
    let part = usize::try_from(value >> shift).unwrap_or(0) - SPLIT;
    (shift as usize + 1) * SPLIT + part
}

/// The largest value of a bucket.
fn last_of(bucket: usize) -> u64 {
    let (group, part) = (bucket / SPLIT, bucket % SPLIT);
    let Some(shift) = group.checked_sub(1) else { return bucket as u64 };
    let first = ((SPLIT + part) as u64) << shift;
    first + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_one_another_without_a_gap() {
        assert_eq!(bucket_of(0), 0);
        for bucket in 0..BUCKETS - 1 {
            assert_eq!(bucket_of(last_of(bucket)), bucket);
            assert_eq!(bucket_of(last_of(bucket) + 1), bucket + 1);
        }
        assert_eq!((bucket_of(u64::MAX), last_of(BUCKETS - 1)), (BUCKETS - 1, u64::MAX));
    }

    #[test]
    fn quantiles_are_close_from_above() {
        let histogram = Histogram::default();
        assert_eq!(histogram.latency(), Latency::default());
        for micros in 1..=1000 {
            histogram.record(Duration::from_micros(micros));
        }
        let Latency { count, p50, p99, max } = histogram.latency();
        assert_eq!((count, max), (1000, 1000.0));
        assert!((500.0..=500.0 * 17.0 / 16.0).contains(&p50), "{p50}");
        assert!((990.0..=1000.0).contains(&p99), "{p99}");
    }

    #[test]
    fn one_sample_is_all_quantiles_and_one_of_a_hundred_is_only_the_largest() {
        let histogram = Histogram::default();
        histogram.record(Duration::from_micros(77));
        let Latency { count, p50, p99, max } = histogram.latency();
        assert_eq!((count, p50, p99, max), (1, 77.0, 77.0, 77.0));
        for _ in 0..98 {
            histogram.record(Duration::from_micros(77));
        }
        histogram.record(Duration::MAX);
        let Latency { p50, p99, max, .. } = histogram.latency();
        assert!(p50 < 82.0 && p99 < 82.0 && max > 1e15, "{p50} {p99} {max}");
    }

    #[test]
    fn threads_add_to_one_histogram() {
        let histogram = Histogram::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|n| histogram.record(Duration::from_nanos(n))));
            }
        });
        assert_eq!(histogram.latency().count, 4000);
    }
}
