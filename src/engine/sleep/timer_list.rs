//! The deadline of a sleep that nobody saw begin: which kernel timer is gone while the thread is stopped?
//!
//! /proc/timer_list shows the instant of every timer, but not whose it is. A thread that is stopped takes
//! its timer out of the list, and puts the same instant in again when it goes on. This is for threads whose
//! call was restarted already (after a stop from a terminal, a debugger, an earlier move), which are few.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::clock::monotonic_ns;
use super::look::Target;
use crate::engine::freeze::{Seized, wait_for_stop};
use crate::engine::remote::Tid;
use crate::engine::sys::ptrace;

/// How often a thread is stopped at most, until only one timer is left that could be its own.
const TRIES: usize = 4;
/// For what takes microseconds on a processor, which it may have to wait for.
const PATIENCE: Duration = Duration::from_secs(2);
/// For the way back into the call, unless it has just come to its end.
const BACK: Duration = Duration::from_millis(200);

/// The monotonic deadline of the restarted call that a running process's thread sleeps in.
pub(super) fn deadline(pid: Tid, tid: Tid) -> Option<u64> {
    let target = Target { pid, tid };
    let mut candidates: Option<HashSet<u64>> = None;
    for _ in 0..TRIES {
        let before = armed()?;
        ptrace::seize(tid, 0).ok()?;
        // Let go of on an early return as well: a freeze could not have it otherwise.
        let mut seized = Seized(vec![tid]);
        ptrace::interrupt(tid).ok()?;
        wait_for_stop(tid, Instant::now() + PATIENCE, PATIENCE).ok()??;
        seized.0.clear();
        let during = armed();
        ptrace::detach(tid, 0).ok()?;
        let until = Instant::now() + BACK;
        while target.blocked().is_none_or(|b| b.number != libc::SYS_restart_syscall) {
            if Instant::now() > until {
                return None;
            }
            std::thread::yield_now();
        }
        let (during, after, now) = (during?, armed()?, monotonic_ns());
        let own = |t: &u64| *t > now && !during.contains(t) && after.contains(t);
        let found: HashSet<u64> = before.into_iter().filter(own).collect();
        let left = match candidates {
            None => found,
            Some(earlier) => &earlier & &found,
        };
        match left.len() {
            0 => return None,
            1 => return left.into_iter().next(),
            _ => candidates = Some(left),
        }
    }
    None
}

fn armed() -> Option<HashSet<u64>> {
    Some(parse(&std::fs::read_to_string("/proc/timer_list").ok()?))
}

/// The instants at which somebody is to be woken by a timer of the monotonic clock.
fn parse(text: &str) -> HashSet<u64> {
    let (mut monotonic, mut wakes, mut all) = (false, false, HashSet::new());
    for line in text.lines().map(str::trim) {
        if let Some(clock) = line.strip_prefix("clock ") {
            monotonic = clock == "0:";
        } else if line.starts_with('#') && line.contains(">, ") {
            wakes = line.contains("hrtimer_wakeup");
        } else if let Some(times) = line.strip_prefix("# expires at ").filter(|_| monotonic && wakes) {
            all.extend(times.split_once('-').and_then(|(soft, _)| soft.parse::<u64>().ok()));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_only_sleepers_of_the_monotonic_clock() {
        let text = "cpu: 0\n clock 0:\n  .offset: 0\nactive timers:\n #0: <00000000c2>, hrtimer_wakeup, S:01\n \
            # expires at 12-34 nsecs [in 1 to 2 nsecs]\n #1: <00000000d6>, tick_nohz_handler, S:01\n \
            # expires at 56-56 nsecs [in 1 to 1 nsecs]\n clock 1:\nactive timers:\n \
            #0: <00000000c3>, hrtimer_wakeup, S:01\n # expires at 78-90 nsecs [in 1 to 1 nsecs]\n";
        assert_eq!(parse(text), HashSet::from([12]));
    }
}
