//! Stands back where copying takes processors away from the process that is being copied.
//!
//! The kernel counts for each thread how long it ran and how long it was ready and waited for a processor
//! (`/proc/PID/task/TID/schedstat`, nanoseconds; Documentation/scheduler/sched-stats.rst). From both the share
//! of its progress follows that a thread has lost by us: if that is more than a client would overlook, we rest
//! between two reads. Threads that are seldom ready lose nothing: they catch up. What a thread would wait
//! without us is seen by standing still now and then. A nice value would not do: it counts only within our own
//! session or control group (sched(7), autogroup).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::engine::freeze::thread_ids;
use crate::engine::procfs::{SchedTimes, parse_schedstat};
use crate::engine::remote::Tid;

/// Time between two looks at the process.
const WINDOW: Duration = Duration::from_millis(20);
/// How long we keep still at first, to see how the process does without us; one that hardly runs in the
/// first of them is not looked at for longer.
const STILL: Duration = Duration::from_millis(10);
const STILL_TIMES: u32 = 8;
/// How often we keep still again while we rest, and how long, after what is under way has gone.
const STILL_AGAIN: Duration = Duration::from_secs(1);
const SETTLE: Duration = Duration::from_millis(10);
/// What one look counts against those before it: single ones vary by more than what they are to show.
const WEIGHT: f64 = 0.25;
/// So long is worked between two rests.
const WORK: Duration = Duration::from_millis(1);
/// What the process may lose.
const LOSS: f64 = 0.05;
/// Rest for each time of work, at most: the work of the network, here and perhaps there, comes beside.
const MOST_REST: f64 = 24.0;
/// A copy that never ends helps nobody: when so much of the time was rested, less is rested from there on, and so it is
/// for a process that is not busy.
const PATIENCE: Duration = Duration::from_secs(30);
const LITTLE_REST: f64 = 3.0;
/// Threads that are looked at.
const MOST_THREADS: usize = 64;
/// A thread that is ready for less than this part of a window has time left to catch up, and loses only some
/// milliseconds now and then. One that is ready for more may not have: its clients may wait for it as it waits
/// for them.
const BUSY: f64 = 0.3;
/// And less than this part tells nothing.
const LEAST_READY: f64 = 0.1;
/// One line of numbers.
const LINE_BYTES: usize = 128;

/// Watches one process while it is copied.
#[derive(Debug)]
pub(super) struct Pacer {
    threads: Vec<File>,
    window: (Instant, Vec<SchedTimes>),
    /// The part of their ready time that the busy threads wait without us, and lately.
    before: f64,
    lately: f64,
    rest: f64,
    working_since: Instant,
    still_at: Instant,
    rested: Duration,
    rested_in_all: Duration,
}

impl Pacer {
    /// To be made just before the copying begins, when the other side has nothing to do either: looks for up
    /// to 80 ms how a busy process does by itself, 10 ms for any other. A kernel without these counters gives a
    /// pacer that never rests.
    pub(super) fn new(pid: Tid) -> Self {
        let open = |tid| File::open(format!("/proc/{pid}/task/{tid}/schedstat")).ok();
        let threads: Vec<File> =
            thread_ids(pid).unwrap_or_default().into_iter().take(MOST_THREADS).filter_map(open).collect();
        let (began, first) = (Instant::now(), times(&threads));
        let mut window = (began, first.clone());
        let mut before = 0.0;
        for _ in 0..STILL_TIMES {
            std::thread::sleep(STILL);
            window = (Instant::now(), times(&threads));
            let Some(waits) = waiting(&first, &window.1, window.0 - began) else { break };
            before = waits.part;
        }
        Self {
            threads,
            before,
            lately: before,
            rest: 0.0,
            working_since: window.0,
            still_at: window.0,
            window,
            rested: Duration::ZERO,
            rested_in_all: Duration::ZERO,
        }
    }

    /// To be called between two reads: rests if the process needs it.
    pub(super) fn breathe(&mut self) {
        let now = Instant::now();
        if now - self.window.0 >= WINDOW {
            self.look(now);
        }
        let worked = now - self.working_since;
        if worked < WORK {
            return;
        }
        if self.rest > 0.0 {
            std::thread::sleep(worked.min(WINDOW).mul_f64(self.rest));
            if self.still_at.elapsed() >= STILL_AGAIN {
                self.keep_still();
            }
            self.rested += now.elapsed();
            self.rested_in_all += now.elapsed();
        }
        self.working_since = Instant::now();
    }

    fn look(&mut self, now: Instant) {
        let times = times(&self.threads);
        self.rest = match waiting(&self.window.1, &times, now - self.window.0) {
            Some(Waiting { part, busy }) => {
                self.lately += WEIGHT * (part - self.lately);
                let most = if busy && self.rested_in_all < PATIENCE { MOST_REST } else { LITTLE_REST };
                adjusted(self.rest, self.before, self.lately).min(most)
            }
            None => eased(self.rest),
        };
        self.window = (now, times);
        tracing::trace!(before = self.before, lately = self.lately, rest = self.rest, "pace");
    }

    /// Sees again how the process does without us.
    fn keep_still(&mut self) {
        std::thread::sleep(SETTLE);
        let (began, first) = (Instant::now(), times(&self.threads));
        std::thread::sleep(WINDOW);
        let last = times(&self.threads);
        self.still_at = Instant::now();
        if let Some(waits) = waiting(&first, &last, self.still_at - began) {
            self.before += WEIGHT * (waits.part - self.before);
        }
        self.window = (self.still_at, last);
    }

    /// How long it rested since the last time that this was asked.
    pub(super) fn take_rested(&mut self) -> Duration {
        std::mem::take(&mut self.rested)
    }
}

/// How the threads of a process have waited for processors.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Waiting {
    /// The part of their ready time.
    part: f64,
    /// Whether one of them has no time left to catch up.
    busy: bool,
}

/// Of those threads that say anything, if there are any.
fn waiting(from: &[SchedTimes], to: &[SchedTimes], over: Duration) -> Option<Waiting> {
    let over = over.as_secs_f64() * 1e9;
    #[allow(clippy::cast_precision_loss, reason = "a ratio")]
    let spans = from.iter().zip(to).map(|(from, to)| {
        let ran = to.ran_ns.saturating_sub(from.ran_ns) as f64;
        let waited = to.waited_ns.saturating_sub(from.waited_ns) as f64;
        (ran + waited, waited)
    });
    let (mut ready, mut waited, mut busy) = (0.0, 0.0, false);
    for span in spans.filter(|(ready, _)| *ready > LEAST_READY * over) {
        (ready, waited, busy) = (ready + span.0, waited + span.1, busy || span.0 > BUSY * over);
    }
    (ready > 0.0).then(|| Waiting { part: waited / ready, busy })
}

/// The rest from here on. `waits` and `before` are parts of the ready time.
fn adjusted(rest: f64, before: f64, waits: f64) -> f64 {
    let lost = 1.0 - (1.0 - waits) / (1.0 - before).max(0.01);
    if lost <= LOSS { eased(rest) } else { (rest * 1.25 + 0.25).min(MOST_REST) }
}

fn eased(rest: f64) -> f64 {
    (rest * 0.95 - 0.02).max(0.0)
}

/// Those of each thread; one that has ended has no more.
fn times(threads: &[File]) -> Vec<SchedTimes> {
    let times = |thread: &File| {
        let mut line = [0; LINE_BYTES];
        let length = thread.read_at(&mut line, 0).unwrap_or(0);
        line.get(..length).and_then(parse_schedstat).unwrap_or_default()
    };
    threads.iter().map(times).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Stdio;

    use super::*;
    use crate::engine::trial::{Killed, until, until_asleep};

    const MS: u64 = 1_000_000;

    fn ms(ran: u64, waited: u64) -> SchedTimes {
        SchedTimes { ran_ns: ran * MS, waited_ns: waited * MS }
    }

    #[test]
    fn what_threads_have_lost() {
        let (zero, window) = (SchedTimes::default(), Duration::from_millis(20));
        let waited =
            |from: &[SchedTimes], to: &[SchedTimes]| waiting(from, to, window).map(|w| (w.part, w.busy));
        assert_eq!(waited(&[zero], &[ms(15, 5)]), Some((0.25, true)));
        assert_eq!(waited(&[zero], &[ms(3, 1)]), Some((0.25, false)));
        // Nearly all of the time it has nothing to do.
        assert_eq!(waited(&[zero], &[ms(1, 1)]), None);
        assert_eq!(waited(&[zero, zero], &[ms(1, 1), ms(15, 5)]), Some((0.25, true)));
        // It has ended.
        assert_eq!(waited(&[ms(15, 5)], &[zero]), None);
        assert_eq!(waited(&[], &[]), None);
    }

    #[test]
    fn rests_only_for_what_it_takes_away() {
        // On a host that was busy before, the process waits without us as well.
        for before in [0.0, 0.5, 0.9] {
            assert_eq!(adjusted(0.0, before, before), 0.0);
            let worse = before + (1.0 - before) * 0.2;
            let rest = adjusted(0.0, before, worse);
            assert!(rest > 0.0);
            let mut more = rest;
            for _ in 0..100 {
                more = adjusted(more, before, worse);
            }
            assert!(rest < more && more <= MOST_REST);
            // Once it runs as before, we work on.
            for _ in 0..100 {
                more = adjusted(more, before, before);
            }
            assert_eq!(more, 0.0);
        }
    }

    /// A program that has come to spin.
    fn spinning() -> Killed {
        let mut command = std::process::Command::new("sh");
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let program = Killed::spawn(quiet.args(["-c", "while :; do :; done"]));
        let times = format!("/proc/{}/schedstat", program.id());
        let ran = || -> u64 {
            std::fs::read_to_string(&times).unwrap().split_whitespace().next().unwrap().parse().unwrap()
        };
        until("that it spins", || ran() >= 20 * MS);
        program
    }

    #[test]
    fn of_a_real_process() {
        let child = spinning();
        let ready = |times: SchedTimes| times.ran_ns + times.waited_ns;
        let mut pacer = Pacer::new(child.pid());
        // It is looked at for the whole time, since it never sleeps. Nothing is known of one that waits for all of the
        // first look.
        until("a look of 40 ms", || {
            let before = ready(times(&pacer.threads)[0]);
            pacer = Pacer::new(child.pid());
            ready(pacer.window.1[0]) > before + 40 * MS
        });
        drop(child);
        // It has ended: nobody to rest for.
        pacer.breathe();
        assert_eq!(pacer.take_rested(), Duration::ZERO);
    }

    #[test]
    fn what_it_waits_without_us_is_seen_again() {
        let child = spinning();
        let mut pacer = Pacer::new(child.pid());
        // As if somebody else had come to use the host and had gone again.
        (pacer.before, pacer.rest) = (2.0, 1.0);
        // Nothing is known of one that waits all the time.
        until("that something is known", || {
            pacer.keep_still();
            pacer.before < 2.0
        });
        assert!(pacer.before < 1.8, "{}", pacer.before);
    }

    #[test]
    fn nobody_rests_for_ever() {
        let child = spinning();
        let mut pacer = Pacer::new(child.pid());
        // Nothing is known of one that waits all the time.
        until("that something is known", || {
            (pacer.before, pacer.lately) = (0.0, 1.0);
            (pacer.rest, pacer.rested_in_all) = (MOST_REST, PATIENCE);
            std::thread::sleep(STILL);
            pacer.look(Instant::now());
            (pacer.rest - eased(MOST_REST)).abs() > f64::EPSILON
        });
        assert!(pacer.rest <= LITTLE_REST, "{}", pacer.rest);
    }

    #[test]
    fn of_a_process_that_sleeps() {
        let child = Killed::sleeper();
        // It runs until it sleeps.
        until_asleep(child.id());
        let pacer = Pacer::new(child.pid());
        assert!(pacer.before.abs() < f64::EPSILON);
    }
}
