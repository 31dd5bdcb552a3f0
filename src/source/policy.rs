//! When to freeze, and what goes before the resume: a pure decision over what the rounds measured.

use std::time::Duration;

use crate::config::{Mode, OnTimeout, Timeout};

/// What one pre-copy round measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Round {
    /// Pages sent in it.
    pub pages: u64,
    /// Bytes they took on the wire.
    pub bytes: u64,
    /// From its scan to its acknowledgement, without rests.
    pub duration: Duration,
    /// Pages still to be sent when it ended: written since its scan, or not sent because it was cut short.
    pub dirty_after: u64,
}

/// What the operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// When the memory travels.
    pub mode: Mode,
    /// How long the process may stand still for its last pages.
    pub max_downtime: Duration,
    /// Rounds after which it is frozen in any case.
    pub max_rounds: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { mode: Mode::default(), max_downtime: Duration::from_millis(10), max_rounds: 30 }
    }
}

/// Part of `max_downtime` that freeze, state, commit and resume need, whatever the number of pages.
/// Never more than half of it, or a small `max_downtime` could never be met.
pub const FIXED_DOWNTIME: Duration = Duration::from_millis(4);

/// Rounds in a row that may fail to shrink the dirty set before we stop waiting for it.
pub const STALLED_ROUNDS: usize = 3;

/// The same where the rest can follow by post-copy: giving up early costs less there.
pub const STALLED_ROUNDS_AUTO: usize = 2;

/// Fewer dirty pages are not worth a round.
const WORTH_A_ROUND: u64 = 64;

/// What a round takes, however little there is to send: a scan, and the way there and back.
const LEAST_ROUND: Duration = Duration::from_millis(2);

/// Rounds of that kind, at most: each is a guess.
const ROUNDS_THAT_PAY: usize = 3;

/// A round shrinks the dirty set if it leaves less than this many percent of the smallest one so far.
const PROGRESS_PERCENT: u64 = 90;

/// Why it is time to freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezeReason {
    /// What is dirty fits into the allowed downtime, and a round more would not leave much less.
    Converged,
    /// The last rounds did not shrink the dirty set: more of them would only cost time.
    NoProgress,
    /// The process wrote pages as fast as the last round sent them, and the rest can follow.
    Outrun,
    /// `max_rounds` are done.
    MaxRounds,
    /// Post-copy was asked for: there is nothing to wait for.
    AtOnce,
    /// The operator, or the end of the time, says so.
    Hurried(Hurry),
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
    /// Downtime to expect: of what goes before the resume if it is time to freeze, else of all that is dirty.
    pub downtime: Duration,
    /// Pages that may go between the freeze and the resume; the rest follows by post-copy. `u64::MAX` if
    /// nothing may follow, 0 if everything does. The dirty set of the freeze itself may be larger than that of
    /// the last round.
    pub eager_pages: u64,
}

/// A freeze that does not wait until the rounds have done what they can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hurry {
    /// All that is dirty follows by post-copy.
    Postcopy,
    /// All that is dirty goes while the process stands still, however long that takes.
    Force,
}

/// What the operator or the clock wants of a migration under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The process is to stay.
    Cancel,
    /// It is to be frozen now.
    Hurry(Hurry),
}

/// What is wanted after `elapsed`. The operator's own word comes before what was planned for the end of the
/// time, and staying comes before everything.
pub fn order(elapsed: Duration, timeout: Option<Timeout>, cancel: bool, postcopy: bool) -> Option<Order> {
    if cancel {
        return Some(Order::Cancel);
    }
    if postcopy {
        return Some(Order::Hurry(Hurry::Postcopy));
    }
    timeout.filter(|timeout| elapsed >= timeout.after).map(|timeout| match timeout.then {
        OnTimeout::Cancel => Order::Cancel,
        OnTimeout::Postcopy => Order::Hurry(Hurry::Postcopy),
        OnTimeout::Force => Order::Hurry(Hurry::Force),
    })
}

/// What was wanted last: each order is told once. Where it comes too late things go on as before, and whoever
/// waits for the destination's answer must not hear of the order again and again instead.
#[derive(Debug, Default)]
pub struct Told(Option<Order>);

impl Told {
    /// The order, if it is news.
    pub fn news(&mut self, order: Option<Order>) -> Option<Order> {
        let order = order?;
        (self.0.replace(order) != Some(order)).then_some(order)
    }
}

/// Decides before the first round and after each. Without any measurement the answer is another round,
/// unless post-copy or hurry was asked for.
pub fn decide(rounds: &[Round], limits: &Limits, hurry: Option<Hurry>) -> Decision {
    let fixed = fixed(limits);
    let dirty = rounds.last().map_or(u64::MAX, |last| last.dirty_after);
    let of_all = pace(rounds).transfer_time(dirty).saturating_add(fixed);
    let verdict = verdict(rounds, limits, hurry, of_all);
    let Verdict::Freeze(reason) = verdict else {
        return Decision { verdict, downtime: of_all, eager_pages: u64::MAX };
    };
    let eager_pages = match (reason, limits.mode) {
        (FreezeReason::Hurried(Hurry::Force), _) => u64::MAX,
        (FreezeReason::Hurried(Hurry::Postcopy), _) | (_, Mode::Postcopy) => 0,
        (_, Mode::Precopy) => u64::MAX,
        (_, Mode::Auto) => pace(rounds).pages_within(limits.max_downtime.saturating_sub(fixed)),
    };
    let downtime = pace(rounds).transfer_time(dirty.min(eager_pages)).saturating_add(fixed);
    Decision { verdict, downtime, eager_pages }
}

fn fixed(limits: &Limits) -> Duration {
    FIXED_DOWNTIME.min(limits.max_downtime / 2)
}

fn verdict(rounds: &[Round], limits: &Limits, hurry: Option<Hurry>, downtime: Duration) -> Verdict {
    if let Some(hurry) = hurry {
        return Verdict::Freeze(FreezeReason::Hurried(hurry));
    }
    if limits.mode == Mode::Postcopy {
        return Verdict::Freeze(FreezeReason::AtOnce);
    }
    let Some(last) = rounds.last() else { return Verdict::Continue };
    let auto = limits.mode == Mode::Auto;
    let are_all = rounds.len() >= usize::try_from(limits.max_rounds).unwrap_or(usize::MAX);
    if downtime <= limits.max_downtime {
        let more = !are_all && pays(rounds, limits);
        if more { Verdict::Continue } else { Verdict::Freeze(FreezeReason::Converged) }
    } else if are_all {
        Verdict::Freeze(FreezeReason::MaxRounds)
    } else if auto && last.pages >= MEASURED_PAGES && last.dirty_after >= last.pages {
        Verdict::Freeze(FreezeReason::Outrun)
    } else if stalled(rounds, if auto { STALLED_ROUNDS_AUTO } else { STALLED_ROUNDS }) {
        Verdict::Freeze(FreezeReason::NoProgress)
    } else {
        Verdict::Continue
    }
}

/// Whether a round more is worth its time although what is dirty fits: it leaves less than half of that, as it takes less
/// than half as long as the last one.
fn pays(rounds: &[Round], limits: &Limits) -> bool {
    let time = |round: &Round| pace(rounds).transfer_time(round.dirty_after);
    let fits = |round: &&Round| time(round).saturating_add(fixed(limits)) <= limits.max_downtime;
    let Some(last) = rounds.last() else { return false };
    last.dirty_after >= WORTH_A_ROUND
        && rounds.iter().rev().take_while(fits).count() <= ROUNDS_THAT_PAY
        && time(last).saturating_add(LEAST_ROUND).saturating_mul(2) <= last.duration
}

/// Pages sent in a time.
#[derive(Debug, Clone, Copy)]
struct Pace {
    pages: u64,
    took: Duration,
}

/// The pace of the last rounds, of which together at least [`MEASURED_PAGES`] are looked at, because a round
/// of three pages measures only latency.
fn pace(rounds: &[Round]) -> Pace {
    let mut pace = Pace { pages: 0, took: Duration::ZERO };
    for round in rounds.iter().rev() {
        pace.pages = pace.pages.saturating_add(round.pages);
        pace.took = pace.took.saturating_add(round.duration);
        if pace.pages >= MEASURED_PAGES {
            break;
        }
    }
    pace
}

impl Pace {
    /// How long `pages` take; for ever if nothing was measured.
    fn transfer_time(self, pages: u64) -> Duration {
        if pages == 0 {
            return Duration::ZERO;
        }
        if self.pages == 0 {
            return Duration::MAX;
        }
        let nanos = self.took.as_nanos().saturating_mul(u128::from(pages)) / u128::from(self.pages);
        u64::try_from(nanos).map_or(Duration::MAX, Duration::from_nanos)
    }

    /// How many pages fit into a time; none if nothing was measured.
    fn pages_within(self, time: Duration) -> u64 {
        let pages = time.as_nanos().saturating_mul(u128::from(self.pages)) / self.took.as_nanos().max(1);
        u64::try_from(pages).unwrap_or(u64::MAX)
    }
}

/// Pages that make a measurement: 4 MiB.
const MEASURED_PAGES: u64 = 1024;

/// Whether the last `rounds_in_a_row` rounds all left as much as the best round before them.
fn stalled(rounds: &[Round], rounds_in_a_row: usize) -> bool {
    let Some(before) = rounds.len().checked_sub(rounds_in_a_row).filter(|n| *n > 0) else {
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
        let limits = Limits { mode: Mode::Precopy, ..Limits::default() };
        let cases: &[(&str, Vec<Round>, Verdict)] = &[
            ("nothing measured", vec![], Continue),
            ("idle process, one round", vec![round(100_000, 100, 0)], Freeze(Converged)),
            ("it fits, and a short round leaves less", vec![round(100_000, 100, 600)], Continue),
            (
                "exactly the budget: 600 pages in 6 ms",
                vec![round(100_000, 100, 1500), round(1500, 100, 600)],
                Freeze(Converged),
            ),
            ("one page above it", vec![round(100_000, 100, 1500), round(1500, 100, 601)], Continue),
            ("too few to be worth it", vec![round(100_000, 100, 63)], Freeze(Converged)),
            ("just enough", vec![round(100_000, 100, 64)], Continue),
            ("twice as fast as the last round", vec![round(1600, 100, 600)], Continue),
            ("not quite", vec![round(1599, 100, 600)], Freeze(Converged)),
            ("three rounds have paid", vec![round(500_000, 100, 500); 4], Freeze(Converged)),
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
            let decision = decide(rounds, &limits, None);
            assert_eq!(decision.verdict, *want, "{name}");
            assert_eq!(decision.eager_pages, u64::MAX, "{name}");
        }
    }

    #[test]
    fn a_tiny_budget_can_be_met() {
        let limits = Limits { max_downtime: Duration::from_millis(1), ..Limits::default() };
        let decision = decide(&[round(100_000, 100, 40)], &limits, None);
        assert_eq!(decision.verdict, Verdict::Freeze(FreezeReason::Converged));
        assert_eq!(decision.downtime, Duration::from_micros(900));
    }

    #[test]
    fn one_round_may_be_all() {
        let limits = Limits { max_rounds: 1, ..Limits::default() };
        assert_eq!(
            decide(&[round(9000, 100, 9000)], &limits, None).verdict,
            Verdict::Freeze(FreezeReason::MaxRounds)
        );
    }

    #[test]
    fn absurd_numbers_saturate() {
        let huge = Round { pages: u64::MAX, bytes: u64::MAX, duration: Duration::MAX, dirty_after: u64::MAX };
        let limits = |mode| Limits { mode, ..Limits::default() };
        assert_eq!(decide(&[huge, huge], &limits(Mode::Precopy), None).verdict, Verdict::Continue);
        let fast = Round { duration: Duration::ZERO, ..huge };
        for rounds in [[huge, huge], [huge, fast], [fast, fast]] {
            for mode in [Mode::Auto, Mode::Precopy, Mode::Postcopy] {
                for hurry in [None, Some(Hurry::Postcopy), Some(Hurry::Force)] {
                    let _ = decide(&rounds, &limits(mode), hurry);
                }
            }
        }
    }

    #[test]
    fn table_of_auto() {
        use FreezeReason::*;
        use Verdict::*;
        let limits = Limits::default();
        assert_eq!(limits.mode, Mode::Auto);
        // At 100 pages a millisecond the 6 ms that are left of the downtime carry 600 pages.
        let cases: &[(&str, Vec<Round>, Verdict, u64)] = &[
            ("nothing measured", vec![], Continue, u64::MAX),
            ("idle process, one round", vec![round(100_000, 100, 0)], Freeze(Converged), 600),
            ("it fits, and a short round leaves less", vec![round(100_000, 100, 600)], Continue, u64::MAX),
            (
                "exactly the budget",
                vec![round(100_000, 100, 1500), round(1500, 100, 600)],
                Freeze(Converged),
                600,
            ),
            ("a slower link", vec![round(7_000, 7, 42)], Freeze(Converged), 42),
            ("one page above it", vec![round(100_000, 100, 1500), round(1500, 100, 601)], Continue, u64::MAX),
            ("the first round pays", vec![round(100_000, 100, 90_000)], Continue, u64::MAX),
            ("written as fast as sent", vec![round(100_000, 100, 100_000)], Freeze(Outrun), 600),
            (
                "written faster than sent in a later round",
                vec![round(100_000, 100, 50_000), round(50_000, 100, 60_000)],
                Freeze(Outrun),
                600,
            ),
            (
                "a round of few pages says nothing of what is written meanwhile",
                vec![round(100_000, 100, 1000), round(1000, 100, 1100)],
                Continue,
                u64::MAX,
            ),
            (
                "still shrinking",
                vec![round(100_000, 100, 50_000), round(50_000, 100, 25_000)],
                Continue,
                u64::MAX,
            ),
            (
                "one round without progress: wait",
                vec![round(100_000, 100, 9000), round(9500, 100, 8900)],
                Continue,
                u64::MAX,
            ),
            (
                "two in a row: the rest follows",
                vec![round(100_000, 100, 9000), round(9500, 100, 8900), round(9500, 100, 8800)],
                Freeze(NoProgress),
                600,
            ),
            (
                "one of the two made progress",
                vec![round(100_000, 100, 9000), round(9500, 100, 8000), round(9500, 100, 8900)],
                Continue,
                u64::MAX,
            ),
            (
                "slow but steady progress runs into the limit",
                std::iter::successors(Some(500_000), |d| Some(d * 85 / 100))
                    .take(30)
                    .map(|d| round(600_000, 100, d))
                    .collect(),
                Freeze(MaxRounds),
                600,
            ),
        ];
        for (name, rounds, want, eager) in cases {
            let decision = decide(rounds, &limits, None);
            assert_eq!((decision.verdict, decision.eager_pages), (*want, *eager), "{name}");
            if matches!(want, Freeze(_)) {
                assert!(decision.downtime <= limits.max_downtime, "{name}: {decision:?}");
            }
        }
    }

    #[test]
    fn hurry_comes_before_everything_in_every_mode() {
        use FreezeReason::*;
        let dirty = vec![round(100_000, 100, 50_000)];
        for mode in [Mode::Auto, Mode::Precopy, Mode::Postcopy] {
            let limits = Limits { mode, ..Limits::default() };
            for rounds in [vec![], dirty.clone(), vec![round(100_000, 100, 0)]] {
                let lazily = decide(&rounds, &limits, Some(Hurry::Postcopy));
                let verdict = Verdict::Freeze(Hurried(Hurry::Postcopy));
                assert_eq!((lazily.verdict, lazily.eager_pages), (verdict, 0), "{mode:?}");
                assert_eq!(lazily.downtime, FIXED_DOWNTIME, "{mode:?}");
                let forced = decide(&rounds, &limits, Some(Hurry::Force));
                let verdict = Verdict::Freeze(Hurried(Hurry::Force));
                assert_eq!((forced.verdict, forced.eager_pages), (verdict, u64::MAX), "{mode:?}");
            }
            let forced = decide(&dirty, &limits, Some(Hurry::Force));
            assert_eq!(forced.downtime, Duration::from_millis(504), "{mode:?}");
        }
        let limits = Limits { mode: Mode::Postcopy, ..Limits::default() };
        for rounds in [vec![], dirty] {
            let decision = decide(&rounds, &limits, None);
            assert_eq!((decision.verdict, decision.eager_pages), (Verdict::Freeze(AtOnce), 0));
        }
    }

    #[test]
    fn an_order_is_told_once() {
        let mut told = Told::default();
        let hurry = Some(Order::Hurry(Hurry::Force));
        let said: Vec<_> =
            [None, hurry, hurry, Some(Order::Cancel), Some(Order::Cancel), None, Some(Order::Cancel)]
                .map(|order| told.news(order))
                .into();
        assert_eq!(said, [None, hurry, None, Some(Order::Cancel), None, None, None]);
    }

    #[test]
    fn who_is_heard_first() {
        let after = Duration::from_secs(5);
        let timeout = |then| Some(Timeout { after, then });
        let early = Duration::from_millis(4999);
        let hurry = |hurry| Some(Order::Hurry(hurry));
        for (elapsed, timeout, cancel, postcopy, want) in [
            (after, None, false, false, None),
            (early, timeout(OnTimeout::Force), false, false, None),
            (after, timeout(OnTimeout::Cancel), false, false, Some(Order::Cancel)),
            (after, timeout(OnTimeout::Postcopy), false, false, hurry(Hurry::Postcopy)),
            (after, timeout(OnTimeout::Force), false, false, hurry(Hurry::Force)),
            (early, None, false, true, hurry(Hurry::Postcopy)),
            (after, timeout(OnTimeout::Cancel), false, true, hurry(Hurry::Postcopy)),
            (after, timeout(OnTimeout::Force), false, true, hurry(Hurry::Postcopy)),
            (early, None, true, false, Some(Order::Cancel)),
            (after, timeout(OnTimeout::Force), true, true, Some(Order::Cancel)),
        ] {
            assert_eq!(order(elapsed, timeout, cancel, postcopy), want, "{timeout:?} {cancel} {postcopy}");
        }
    }
}
