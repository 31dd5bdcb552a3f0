//! When to freeze: a pure decision over what the rounds measured.

use std::time::Duration;

/// What one pre-copy round measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Round {
    /// Pages sent in it.
    pub pages: u64,
    /// Bytes they took on the wire.
    pub bytes: u64,
    /// From its scan to its acknowledgement.
    pub duration: Duration,
    /// Pages found written since its scan, when it ended.
    pub dirty_after: u64,
}

/// What the operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How long the process may stand still for its last pages.
    pub max_downtime: Duration,
    /// Rounds after which it is frozen in any case.
    pub max_rounds: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_downtime: Duration::from_millis(10), max_rounds: 30 }
    }
}

/// Part of `max_downtime` that freeze, state, commit and resume need, whatever the number of pages.
/// Never more than half of it, or a small `max_downtime` could never be met.
pub const FIXED_DOWNTIME: Duration = Duration::from_millis(4);

/// Rounds in a row that may fail to shrink the dirty set before we stop waiting for it.
pub const STALLED_ROUNDS: usize = 3;

/// A round shrinks the dirty set if it leaves less than this many percent of the smallest one so far.
const PROGRESS_PERCENT: u64 = 90;

/// Why it is time to freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezeReason {
    /// What is dirty fits into the allowed downtime.
    Converged,
    /// The last rounds did not shrink the dirty set: more of them would only cost time.
    NoProgress,
    /// `max_rounds` are done.
    MaxRounds,
}

/// Another round, or the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Send another round.
    Continue,
    /// Freeze now.
    Freeze(FreezeReason),
}

/// The verdict and the numbers behind it, for the progress line and the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// What to do.
    pub verdict: Verdict,
    /// Downtime to expect if the process were frozen now.
    pub downtime: Duration,
}

/// Decides after each round. `rounds` is never empty when the source's machine calls it; without any
/// measurement the answer is another round.
pub fn decide(rounds: &[Round], limits: &Limits) -> Decision {
    let Some(last) = rounds.last() else {
        return Decision { verdict: Verdict::Continue, downtime: Duration::MAX };
    };
    let fixed = FIXED_DOWNTIME.min(limits.max_downtime / 2);
    let transfer = transfer_time(rounds, last.dirty_after);
    let downtime = transfer.saturating_add(fixed);
    let verdict = if downtime <= limits.max_downtime {
        Verdict::Freeze(FreezeReason::Converged)
    } else if rounds.len() >= usize::try_from(limits.max_rounds).unwrap_or(usize::MAX) {
        Verdict::Freeze(FreezeReason::MaxRounds)
    } else if stalled(rounds) {
        Verdict::Freeze(FreezeReason::NoProgress)
    } else {
        Verdict::Continue
    };
    Decision { verdict, downtime }
}

/// How long `pages` take at the measured pace: pages per second of the last rounds, of which together at
/// least [`MEASURED_PAGES`] are looked at, because a round of three pages measures only latency.
fn transfer_time(rounds: &[Round], pages: u64) -> Duration {
    if pages == 0 {
        return Duration::ZERO;
    }
    let (mut sent, mut took) = (0u64, Duration::ZERO);
    for round in rounds.iter().rev() {
        sent = sent.saturating_add(round.pages);
        took = took.saturating_add(round.duration);
        if sent >= MEASURED_PAGES {
            break;
        }
    }
    if sent == 0 {
        return Duration::MAX;
    }
    let nanos = took.as_nanos().saturating_mul(u128::from(pages)) / u128::from(sent);
    u64::try_from(nanos).map_or(Duration::MAX, Duration::from_nanos)
}

/// Pages that make a measurement: 4 MiB.
const MEASURED_PAGES: u64 = 1024;

/// Whether the last [`STALLED_ROUNDS`] rounds all left as much as the best round before them.
fn stalled(rounds: &[Round]) -> bool {
    let Some(before) = rounds.len().checked_sub(STALLED_ROUNDS).filter(|n| *n > 0) else {
        return false;
    };
    let (earlier, latest) = rounds.split_at(before);
    let best = earlier.iter().map(|r| r.dirty_after).min().unwrap_or(u64::MAX);
    let progress = best.saturating_mul(PROGRESS_PERCENT) / 100;
    latest.iter().all(|r| r.dirty_after >= progress)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A round at `rate` pages per millisecond.
    fn round(pages: u64, rate: u64, dirty_after: u64) -> Round {
        Round {
            pages,
            bytes: pages * 4096,
            duration: Duration::from_micros(pages * 1000 / rate),
            dirty_after,
        }
    }

    #[test]
    fn table() {
        use FreezeReason::*;
        use Verdict::*;
        let limits = Limits::default();
        let cases: &[(&str, Vec<Round>, Verdict)] = &[
            ("nothing measured", vec![], Continue),
            ("idle process, one round", vec![round(100_000, 100, 0)], Freeze(Converged)),
            ("exactly the budget: 600 pages in 6 ms", vec![round(100_000, 100, 600)], Freeze(Converged)),
            ("one page above it", vec![round(100_000, 100, 601)], Continue),
            ("still shrinking", vec![round(100_000, 100, 50_000), round(50_000, 100, 25_000)], Continue),
            (
                "a tiny last round measures latency, not rate",
                vec![
                    round(100_000, 100, 3),
                    Round { pages: 3, bytes: 9, duration: Duration::from_millis(2), dirty_after: 300 },
                ],
                Freeze(Converged),
            ),
            ("a small process that keeps writing", vec![round(500, 100, 450)], Freeze(Converged)),
            ("two flat rounds: wait", vec![round(9000, 100, 9000); 3], Continue),
            ("three flat rounds after the first: stop", vec![round(9000, 100, 9000); 4], Freeze(NoProgress)),
            (
                "one of the three made progress",
                vec![
                    round(9000, 100, 9000),
                    round(9000, 100, 9000),
                    round(9000, 100, 8000),
                    round(8000, 100, 9000),
                ],
                Continue,
            ),
            (
                "slow but steady progress runs into the limit",
                std::iter::successors(Some(500_000), |d| Some(d * 85 / 100))
                    .take(30)
                    .map(|d| round(9000, 100, d))
                    .collect(),
                Freeze(MaxRounds),
            ),
            ("a round without pages says nothing about the rate", vec![round(0, 1, 10)], Continue),
        ];
        for (name, rounds, want) in cases {
            assert_eq!(decide(rounds, &limits).verdict, *want, "{name}");
        }
    }

    #[test]
    fn a_tiny_budget_can_be_met() {
        let limits = Limits { max_downtime: Duration::from_millis(1), max_rounds: 30 };
        let decision = decide(&[round(100_000, 100, 40)], &limits);
        assert_eq!(decision.verdict, Verdict::Freeze(FreezeReason::Converged));
        assert_eq!(decision.downtime, Duration::from_micros(900));
    }

    #[test]
    fn one_round_may_be_all() {
        let limits = Limits { max_rounds: 1, ..Limits::default() };
        assert_eq!(
            decide(&[round(9000, 100, 9000)], &limits).verdict,
            Verdict::Freeze(FreezeReason::MaxRounds)
        );
    }

    #[test]
    fn absurd_numbers_saturate() {
        let huge = Round { pages: u64::MAX, bytes: u64::MAX, duration: Duration::MAX, dirty_after: u64::MAX };
        assert_eq!(decide(&[huge, huge], &Limits::default()).verdict, Verdict::Continue);
    }
}
