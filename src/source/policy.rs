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
    /// From its scan to the last page that was given to the link, and the scan after that; without rests.
    pub duration: Duration,
    /// Of that, the scans, which take as long whatever there is to send.
    pub scanning: Duration,
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

/// What a round takes, however little there is to send, besides its scan if that takes longer: the way there and back.
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
    let pace = reckoned(rounds, limits);
    let of_all = pace.transfer_time(dirty).saturating_add(fixed);
    let verdict = verdict(rounds, limits, hurry, of_all);
    let Verdict::Freeze(reason) = verdict else {
        return Decision { verdict, downtime: of_all, eager_pages: u64::MAX };
    };
    let eager_pages = match (reason, limits.mode) {
        (FreezeReason::Hurried(Hurry::Force), _) => u64::MAX,
        (FreezeReason::Hurried(Hurry::Postcopy), _) | (_, Mode::Postcopy) => 0,
        (_, Mode::Precopy) => u64::MAX,
        (_, Mode::Auto) => pace.pages_within(limits.max_downtime.saturating_sub(fixed)),
    };
    let downtime = pace.transfer_time(dirty.min(eager_pages)).saturating_add(fixed);
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
    let pace = reckoned(rounds, limits);
    let time = |round: &Round| pace.transfer_time(round.dirty_after);
    let fits = |round: &&Round| time(round).saturating_add(fixed(limits)) <= limits.max_downtime;
    let Some(last) = rounds.last() else { return false };
    last.dirty_after >= WORTH_A_ROUND
        && rounds.iter().rev().take_while(fits).count() <= ROUNDS_THAT_PAY
        && time(last).saturating_add(LEAST_ROUND.max(last.scanning)).saturating_mul(2) <= last.duration
}

/// The pace to count on. When what was dirty fits, the rounds that follow are short, and measure the way there and back
/// more than the link: so as long as they leave no more than that, what was measured before them holds. Unless they are
/// slower by far: a link may become slow.
fn reckoned(rounds: &[Round], limits: &Limits) -> Pace {
    let now = pace(rounds);
    let Some(last) = rounds.last() else { return now };
    let fitted = rounds.iter().enumerate().find_map(|(i, round)| {
        let pace = pace(rounds.get(..=i)?);
        let fits = pace.transfer_time(round.dirty_after).saturating_add(fixed(limits)) <= limits.max_downtime;
        (fits && last.dirty_after <= round.dirty_after).then_some(pace)
    });
    fitted
        .filter(|pace| now.transfer_time(MEASURED_PAGES) / 2 <= pace.transfer_time(MEASURED_PAGES))
        .unwrap_or(now)
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
        pace.took = pace.took.saturating_add(round.duration.saturating_sub(round.scanning));
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
mod tests;
