//! Stands back where copying takes processors away from the process that is being copied.
//!
//! The kernel counts for each thread how long it ran and how long it was ready and waited for a processor
//! (`/proc/PID/task/TID/schedstat`, nanoseconds; Documentation/scheduler/sched-stats.rst). From both the share
//! of its progress follows that the process has lost since we began: if that is more than a client would
//! overlook, we rest between two reads. A nice value would not do: it counts only within our own session or
//! control group (sched(7), autogroup).

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
/// What one look counts against those before it: single ones vary by more than what they are to show.
const WEIGHT: f64 = 0.25;
/// So long is worked between two rests.
const WORK: Duration = Duration::from_millis(1);
/// What the process may lose.
const LOSS: f64 = 0.02;
/// Rest for each time of work, at most: a copy that never ends helps nobody.
const MOST_REST: f64 = 8.0;
/// Threads that are looked at.
const MOST_THREADS: usize = 64;
/// A process that is ready for less than this part of a window tells nothing.
const LEAST_READY: f64 = 0.1;
/// One line of numbers.
const LINE_BYTES: usize = 128;

/// Watches one process while it is copied.
#[derive(Debug)]
pub(super) struct Pacer {
    threads: Vec<File>,
    window: (Instant, SchedTimes),
    /// The part of its ready time that the process waits without us, and lately.
    before: f64,
    lately: f64,
    rest: f64,
    working_since: Instant,
    rested: Duration,
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
        let mut window = (began, first);
        let mut before = 0.0;
        for _ in 0..STILL_TIMES {
            std::thread::sleep(STILL);
            window = (Instant::now(), times(&threads));
            let Some(waits) = waiting(first, window.1, window.0 - began) else { break };
            before = waits;
        }
        Self {
            threads,
            window,
            before,
            lately: before,
            rest: 0.0,
            working_since: window.0,
            rested: Duration::ZERO,
        }
    }

    /// To be called between two reads: rests if the process needs it.
    pub(super) fn breathe(&mut self) {
        let now = Instant::now();
        let since = now - self.window.0;
        if since >= WINDOW {
            let times = times(&self.threads);
            if let Some(waits) = waiting(self.window.1, times, since) {
                self.lately += WEIGHT * (waits - self.lately);
                (self.rest, self.before) = adjusted(self.rest, self.before, self.lately);
            } else {
                self.rest = eased(self.rest);
            }
            self.window = (now, times);
        }
        let worked = now - self.working_since;
        if worked < WORK {
            return;
        }
        if self.rest > 0.0 {
            std::thread::sleep(worked.min(WINDOW).mul_f64(self.rest));
            self.rested += now.elapsed();
        }
        self.working_since = Instant::now();
    }

    /// How long it rested since the last time that this was asked.
    pub(super) fn take_rested(&mut self) -> Duration {
        std::mem::take(&mut self.rested)
    }
}

/// The part of its ready time that a process waited, if it was ready for long enough to say.
fn waiting(from: SchedTimes, to: SchedTimes, over: Duration) -> Option<f64> {
    #[allow(clippy::cast_precision_loss, reason = "a ratio")]
    let [ran, waited] =
        [to.ran_ns.saturating_sub(from.ran_ns) as f64, to.waited_ns.saturating_sub(from.waited_ns) as f64];
    let ready = ran + waited;
    (ready > LEAST_READY * over.as_secs_f64() * 1e9).then(|| waited / ready)
}

/// The rest from here on, and what to compare with. `waits` and `before` are parts of the ready time.
fn adjusted(rest: f64, before: f64, waits: f64) -> (f64, f64) {
    let lost = 1.0 - (1.0 - waits) / (1.0 - before).max(0.01);
    if lost <= LOSS {
        return (eased(rest), before);
    }
    if rest >= MOST_REST {
        // If resting does not help for long it is not us, or not us alone, for whom the process waits.
        return (rest, before + (waits - before) / 50.0);
    }
    ((rest * 1.5 + 0.25).min(MOST_REST), before)
}

fn eased(rest: f64) -> f64 {
    (rest * 0.9 - 0.02).max(0.0)
}

fn times(threads: &[File]) -> SchedTimes {
    let mut sum = SchedTimes::default();
    for thread in threads {
        let mut line = [0; LINE_BYTES];
        // A thread that has ended says nothing more.
        let length = thread.read_at(&mut line, 0).unwrap_or(0);
        if let Some(times) = line.get(..length).and_then(parse_schedstat) {
            sum.ran_ns = sum.ran_ns.saturating_add(times.ran_ns);
            sum.waited_ns = sum.waited_ns.saturating_add(times.waited_ns);
        }
    }
    sum
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_a_part_of_being_ready() {
        let (from, to) = (SchedTimes::default(), SchedTimes { ran_ns: 9_000_000, waited_ns: 3_000_000 });
        assert_eq!(waiting(from, to, Duration::from_millis(20)), Some(0.25));
        // Mostly asleep.
        assert_eq!(waiting(from, to, Duration::from_millis(200)), None);
        // A thread less than before.
        assert_eq!(waiting(to, from, Duration::from_millis(20)), None);
    }

    #[test]
    fn rests_only_for_what_it_takes_away() {
        // On a host that was busy before, the process waits without us as well.
        for before in [0.0, 0.5, 0.9] {
            let (rest, base) = adjusted(0.0, before, before);
            assert_eq!((rest, base), (0.0, before));
            let worse = before + (1.0 - before) * 0.2;
            let (rest, _) = adjusted(0.0, before, worse);
            assert!(rest > 0.0);
            let (more, _) = adjusted(rest, before, worse);
            assert!(more > rest);
            // Once it runs as before, we work on.
            let mut rest = more;
            for _ in 0..100 {
                (rest, _) = adjusted(rest, before, before);
            }
            assert_eq!(rest, 0.0);
        }
    }

    #[test]
    fn resting_that_does_not_help_ends() {
        let (mut rest, mut before) = (0.0, 0.0);
        for _ in 0..1000 {
            let (next, base) = adjusted(rest, before, 0.6);
            assert!(next <= MOST_REST);
            (rest, before) = (next, base);
        }
        assert!(rest < MOST_REST, "{rest} {before}");
    }

    #[test]
    fn of_a_real_process() {
        let mut child = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let pid = Tid::try_from(child.id()).unwrap();
        let mut pacer = Pacer::new(pid);
        // It was looked at for the whole time, since it never sleeps.
        let looked = pacer.window.1;
        assert!(looked.ran_ns + looked.waited_ns > 40_000_000, "{looked:?}");
        child.kill().unwrap();
        child.wait().unwrap();
        // It has ended: nobody to rest for.
        pacer.breathe();
        assert_eq!(pacer.take_rested(), Duration::ZERO);
    }

    #[test]
    fn of_a_process_that_sleeps() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        // It runs until it sleeps: clock_nanosleep is call 230.
        let call = format!("/proc/{}/syscall", child.id());
        while !std::fs::read_to_string(&call).unwrap().starts_with("230 ") {
            std::thread::yield_now();
        }
        let pacer = Pacer::new(Tid::try_from(child.id()).unwrap());
        assert!(pacer.before.abs() < f64::EPSILON);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
