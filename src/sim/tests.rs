//! One fault at every step, two at every pair of steps, many at random.

use std::time::Duration;

use super::{Fault, Here, PROCESS, There, World};
use crate::source::machine::SourceMachine;
use crate::source::policy::{FreezeReason, Hurry, Limits, Round};
use crate::source::protocol::{Action, Event, Message, Outcome};

/// Every kind of fault, with times around the timeouts of the machines.
const ALL: &[Fault] = &[
    Fault::KillSource,
    Fault::KillDest { back_ms: 1 },
    Fault::KillDest { back_ms: 30_000 },
    Fault::KillSentinel,
    Fault::Cut { heal_ms: 0, late: false, silent: false },
    Fault::Cut { heal_ms: 0, late: true, silent: true },
    Fault::Cut { heal_ms: 5000, late: true, silent: false },
    Fault::Cut { heal_ms: 5000, late: false, silent: true },
    Fault::Cut { heal_ms: 200_000, late: false, silent: false },
    Fault::Cut { heal_ms: 200_000, late: true, silent: true },
    Fault::Drop,
    Fault::Delay { ms: 2 },
    Fault::Delay { ms: 2500 },
    Fault::Delay { ms: 15_000 },
    Fault::Duplicate { ms: 3 },
    Fault::Duplicate { ms: 15_000 },
    Fault::Cancel,
    Fault::FailSource,
    Fault::FailDest,
    Fault::Exit,
    Fault::Operator,
];

/// Runs and returns the number of events; on a violation, the story of the run.
fn run_with(seed: Option<u64>, owes: bool, faults: &[(usize, Fault)]) -> World {
    let mut world = World::new(seed, owes);
    if let Err(violation) = world.run(faults) {
        let mut world = World::new(seed, owes);
        world.trace = Some(Vec::new());
        let _ = world.run(faults);
        let story = world.trace.unwrap_or_default().join("\n");
        panic!("{violation}\nwith {faults:?}, seed {seed:?}, owing pages: {owes}\n{story}");
    }
    world
}

fn run(seed: Option<u64>, faults: &[(usize, Fault)]) -> World {
    run_with(seed, false, faults)
}

#[test]
fn without_a_fault_it_moves() {
    let world = run(None, &[]);
    assert_eq!(world.outcome, Some(Outcome::Moved));
    assert_eq!((world.here, world.there), (Here::Dead, There::Running));
    assert_eq!(world.incoming, None, "confirmed, so the destination may forget");
    let world = run_with(None, true, &[]);
    assert_eq!(world.outcome, Some(Outcome::Moved));
    assert_eq!((world.here, world.there, world.misses), (Here::Dead, There::Running, false));
}

#[test]
fn one_fault_at_every_step() {
    let length = run(None, &[]).events;
    let (mut moved, mut stayed, mut unknown) = (0, 0, 0);
    let postcopy = run_with(None, true, &[]).events;
    assert!(postcopy > length, "there is more to go wrong");
    for (step, owes) in (0..length).map(|s| (s, false)).chain((0..postcopy).map(|s| (s, true))) {
        for fault in ALL {
            let world = run_with(None, owes, &[(step, *fault)]);
            match world.outcome {
                Some(Outcome::Moved) => moved += 1,
                Some(Outcome::NotMoved(_)) => stayed += 1,
                Some(Outcome::Unknown | Outcome::Unfinished | Outcome::Lost(_)) => unknown += 1,
                None => {}
            }
        }
    }
    // If one of these were missing, the faults would not reach what they are meant for.
    assert!(moved > 0 && stayed > 0 && unknown > 0, "{moved} moved, {stayed} stayed, {unknown} unknown");
}

#[test]
fn two_faults_at_every_pair_of_steps() {
    assert!(pairs(false, 0, ALL) > 100_000);
}

/// Up to the acceptance, post-copy is what the test above sees.
#[test]
fn two_faults_at_every_pair_of_steps_of_post_copy() {
    let accepted = run_with(None, true, &[]).accepted_at;
    assert!(pairs(true, accepted.saturating_sub(5), SERVING) > 50_000);
}

/// The faults that post-copy could take amiss.
const SERVING: &[Fault] = &[
    Fault::KillSource,
    Fault::KillDest { back_ms: 1 },
    Fault::KillDest { back_ms: 30_000 },
    Fault::KillSentinel,
    Fault::Cut { heal_ms: 0, late: true, silent: true },
    Fault::Cut { heal_ms: 5000, late: false, silent: false },
    Fault::Drop,
    Fault::Delay { ms: 2500 },
    Fault::Duplicate { ms: 3 },
    Fault::FailSource,
    Fault::Exit,
    Fault::Operator,
];

fn pairs(owes: bool, from: usize, faults: &[Fault]) -> u32 {
    let length = run_with(None, owes, &[]).events;
    let mut runs = 0u32;
    for first_step in from..length {
        for first in faults {
            let end = run_with(None, owes, &[(first_step, *first)]).events.min(length + LONGEST_SECOND);
            for second_step in first_step..end {
                for second in faults {
                    run_with(None, owes, &[(first_step, *first), (second_step, *second)]);
                    runs += 1;
                }
            }
        }
    }
    runs
}

/// How far beyond the length of a run without faults the second fault may strike.
const LONGEST_SECOND: usize = 40;

#[test]
fn many_faults_at_random() {
    let runs: u64 = std::env::var("SIM_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(50_000);
    let first: u64 = std::env::var("SIM_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    for seed in first..first + runs {
        let mut dice = World::new(Some(seed ^ 0x5eed), false);
        let count = 1 + usize::try_from(dice.random() % 6).unwrap();
        let faults: Vec<_> = (0..count)
            .map(|_| {
                let step = usize::try_from(dice.random() % 140).unwrap();
                let fault = ALL[usize::try_from(dice.random() % ALL.len() as u64).unwrap()];
                (step, fault)
            })
            .collect();
        run_with(Some(seed), seed % 2 == 0, &faults);
    }
}

/// An order to hurry is remembered until the round is done, and then decides.
#[test]
fn hurry_ends_the_rounds() {
    for hurry in [None, Some(Hurry::Force), Some(Hurry::Postcopy)] {
        let (mut machine, _) = SourceMachine::start(PROCESS, Limits::default());
        let mut tell = |event| machine.handle(Duration::ZERO, event).unwrap();
        tell(Event::Message(Message::Ready));
        if let Some(hurry) = hurry {
            assert_eq!(tell(Event::Hurry(hurry)), vec![]);
        }
        let dirty_after = 50_000;
        let round = Round {
            pages: 90_000,
            bytes: 1,
            duration: Duration::from_millis(900),
            dirty_after,
            ..Round::default()
        };
        tell(Event::RoundSent(round));
        let actions = tell(Event::Message(Message::RoundPlaced(1)));
        let want = match hurry {
            None => Action::StartRound(2),
            Some(Hurry::Postcopy) => Action::Announce(2),
            Some(hurry) => Action::Freeze { reason: FreezeReason::Hurried(hurry), eager_pages: u64::MAX },
        };
        assert!(actions.contains(&want), "{hurry:?}: {actions:?}");
    }
}
