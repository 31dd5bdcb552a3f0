//! The part of the report about what was done after the resume.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::{Latency, as_ms, ms};

/// What post-copy did. All zero if there was none.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Postcopy {
    /// Pages that were missing when the process was resumed.
    pub pages_postcopy: u64,
    /// Of these, those that the process waited for.
    pub pages_faulted: u64,
    /// Of these, those that were there before it touched them.
    pub pages_pushed: u64,
    /// Of these, those that it gave up before they came.
    pub pages_dropped: u64,
    /// Pages that arrived although they were not missing: 0 unless something is wrong.
    pub pages_twice: u64,
    /// How long it waited for a page, in microseconds.
    pub fault_latency_us: Latency,
    /// From the resume until nothing was missing.
    #[serde(rename = "postcopy_ms", serialize_with = "as_ms")]
    pub took: Duration,
    /// How often a lost link was found again.
    pub recoveries: u64,
    /// Time without a link.
    #[serde(rename = "paused_ms", serialize_with = "as_ms")]
    pub paused: Duration,
}

impl Postcopy {
    /// Whether there was any.
    pub fn happened(&self) -> bool {
        self.pages_postcopy > 0 || self.took > Duration::ZERO
    }
}

impl fmt::Display for Postcopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "post-copy: {} pages in {:.1} ms, {} on faults, {} pushed",
            self.pages_postcopy,
            ms(self.took),
            self.pages_faulted,
            self.pages_pushed
        )?;
        if self.fault_latency_us.count > 0 {
            write!(f, "\nfaults: {}", self.fault_latency_us)?;
        }
        if self.recoveries > 0 || self.paused > Duration::ZERO {
            write!(
                f,
                "\nlink lost: found again {} times, paused {:.1} ms",
                self.recoveries,
                ms(self.paused)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_only_what_happened() {
        let mut postcopy = Postcopy { pages_postcopy: 10, pages_pushed: 10, ..Postcopy::default() };
        assert_eq!(postcopy.to_string(), "post-copy: 10 pages in 0.0 ms, 0 on faults, 10 pushed");
        postcopy.fault_latency_us = Latency { count: 2, p50: 80.0, p99: 120.5, max: 120.5 };
        postcopy.recoveries = 1;
        postcopy.paused = Duration::from_millis(1500);
        let text = postcopy.to_string();
        assert!(text.contains("faults: 2, p50 80.0 µs, p99 120.5 µs, max 120.5 µs"), "{text}");
        assert!(text.ends_with("found again 1 times, paused 1500.0 ms"), "{text}");
        assert!(postcopy.happened() && !Postcopy::default().happened());
    }
}
