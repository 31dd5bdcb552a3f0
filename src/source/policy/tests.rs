//! The verdicts as tables.

use super::*;

/// A round at `rate` pages per millisecond.
fn round(pages: u64, rate: u64, dirty_after: u64) -> Round {
    Round {
        pages,
        bytes: pages * 4096,
        duration: Duration::from_micros(pages * 1000 / rate),
        dirty_after,
        ..Round::default()
    }
}

/// The same, and its scans take as many milliseconds.
fn scanned(ms: u64, round: Round) -> Round {
    let scanning = Duration::from_millis(ms);
    Round { duration: round.duration + scanning, scanning, ..round }
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
            vec![round(100_000, 100, 3), Round { duration: Duration::from_millis(2), ..round(3, 1, 300) }],
            Freeze(Converged),
        ),
        ("a scan that takes longer than all that", vec![scanned(9, round(2100, 100, 600))], Continue),
        ("and than half a round", vec![scanned(18, round(2100, 100, 600))], Freeze(Converged)),
        (
            "three rounds have paid, and are counted anew",
            vec![
                round(500_000, 100, 500),
                round(500_000, 100, 500),
                round(500_000, 100, 5000),
                round(500_000, 100, 500),
            ],
            Continue,
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
fn rounds_that_would_pay_are_no_more_than_the_operator_wants() {
    let limits = Limits { max_rounds: 1, ..Limits::default() };
    let fits = [round(100_000, 100, 600)];
    assert_eq!(decide(&fits, &Limits::default(), None).verdict, Verdict::Continue);
    assert_eq!(decide(&fits, &limits, None).verdict, Verdict::Freeze(FreezeReason::Converged));
}

/// Whatever a scan takes, and as badly as short rounds tell the pace: what has fitted once fits.
#[test]
fn what_fitted_still_fits() {
    for scan in [0, 1, 4, 10, 100] {
        for latency in [0, 1, 3] {
            for (rate, hot) in [(250, 1480), (100, 590), (100, 100), (7, 41)] {
                let mut rounds = vec![scanned(2 * scan, round(1_000_000, rate, hot))];
                let decision = loop {
                    let decision = decide(&rounds, &Limits::default(), None);
                    if decision.verdict != Verdict::Continue {
                        break decision;
                    }
                    let mut next = scanned(scan, round(hot, rate, hot));
                    next.duration += Duration::from_millis(latency);
                    rounds.push(next);
                };
                let what = format!("scan {scan}, latency {latency}, rate {rate}, {hot} pages: {rounds:?}");
                assert_eq!(decision.verdict, Verdict::Freeze(FreezeReason::Converged), "{what}");
                assert!(decision.eager_pages >= hot, "{decision:?} {what}");
                assert!(rounds.len() <= 1 + ROUNDS_THAT_PAY, "{what}");
            }
        }
    }
}

#[test]
fn a_link_that_has_become_slow_is_noticed() {
    let fits = round(1_000_000, 100, 590);
    let same = decide(&[fits, round(590, 80, 500)], &Limits::default(), None);
    assert_eq!(same.verdict, Verdict::Freeze(FreezeReason::Converged));
    let slow = [fits, round(590, 10, 500), round(500, 10, 450)];
    assert_eq!(decide(&slow, &Limits::default(), None).verdict, Verdict::Continue);
}

#[test]
fn absurd_numbers_saturate() {
    let huge = Round {
        pages: u64::MAX,
        bytes: u64::MAX,
        duration: Duration::MAX,
        scanning: Duration::ZERO,
        dirty_after: u64::MAX,
    };
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
