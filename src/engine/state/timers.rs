//! Interval timers and POSIX timers, with the time that remains.
//!
//! Carried: the three itimers; POSIX timers on the realtime, monotonic, boot-time and TAI clocks, their
//! alarm variants, and the process's CPU clock, with their ids. A timer on the CPU clock of a thread is
//! refused: the kernel does not tell of which thread. How counts of overruns and waiting signals come back is
//! told in [`restore`]. What a timer has missed before the freeze while its signal waits, no call tells: the
//! kernel reveals it with the signal only.

pub mod restore;

use std::time::Duration;

use super::calls::{AttrError, Named, read_as, words};
use crate::engine::procfs::{ProcTimer, parse_timers};
use crate::engine::reason::Reason;
use crate::engine::remote::{Arg, Batch, InjectError, Outcome, Tid};
use crate::engine::sys::attrs;
use crate::proto::image::{Itimer, PosixTimer, Process};

/// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
const ITIMERS: [u64; 3] = [0, 1, 2];
/// Most POSIX timers that are carried: what one batch has room for.
pub const MAX_TIMERS: usize = 512;
/// The process's own CPU clock, as the kernel writes it down and as timer_create takes it.
const OWN_CPU_CLOCK: i32 = -6;
const NS: u64 = 1_000_000_000;
const US: u64 = 1_000_000;

/// The clock to create a timer with; `None` for one that cannot be carried.
fn clock_of(clock: i32) -> Option<i32> {
    match clock {
        OWN_CPU_CLOCK => Some(libc::CLOCK_PROCESS_CPUTIME_ID),
        libc::CLOCK_REALTIME
        | libc::CLOCK_MONOTONIC
        | libc::CLOCK_PROCESS_CPUTIME_ID
        | libc::CLOCK_BOOTTIME
        | libc::CLOCK_REALTIME_ALARM
        | libc::CLOCK_BOOTTIME_ALARM
        | libc::CLOCK_TAI => Some(clock),
        _ => None,
    }
}

fn timers_of(pid: Tid) -> Result<Vec<ProcTimer>, AttrError> {
    read_as(format!("/proc/{pid}/timers"), parse_timers)
}

/// What is in the way of carrying the timers of `pid`, running or stopped.
///
/// # Errors
/// If /proc cannot be read.
pub fn preflight(pid: Tid) -> Result<Vec<Reason>, AttrError> {
    Ok(obstacles(pid, &timers_of(pid)?))
}

fn obstacles(pid: Tid, timers: &[ProcTimer]) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if timers.len() > MAX_TIMERS {
        let why = format!("has {} POSIX timers; up to {MAX_TIMERS} can be carried", timers.len());
        reasons.push(Reason::new(format!("pid {pid}"), why, ""));
    }
    for timer in timers.iter().filter(|t| clock_of(t.clock).is_none()) {
        let object = format!("POSIX timer {}", timer.id);
        let why = format!("runs on the CPU clock of a thread or of another process (clock {})", timer.clock);
        reasons.push(Reason::new(object, why, "delete the timer before the move"));
    }
    reasons
}

/// The POSIX timers as they are known from outside, without their times: what a destination must be able
/// to make.
///
/// # Errors
/// If /proc cannot be read.
pub fn survey(pid: Tid) -> Result<Vec<PosixTimer>, AttrError> {
    let known = |t: &ProcTimer| PosixTimer { id: t.id, clock: t.clock, ..PosixTimer::default() };
    // More than that are refused here already.
    Ok(timers_of(pid)?.iter().take(MAX_TIMERS).map(known).collect())
}

/// What is in the way of having these timers here.
pub fn check_here(timers: &[PosixTimer]) -> Vec<Reason> {
    if timers.is_empty() || attrs::timer_ids_can_be_chosen() {
        return Vec::new();
    }
    let why = format!("has {} POSIX timers, whose ids this kernel cannot restore", timers.len());
    vec![Reason::new("the process", why, "Linux 6.16 or newer can")]
}

/// The question for all timers.
#[derive(Debug)]
pub struct TimersProbe {
    calls: Named,
    itimers: [Arg; 3],
    timers: Vec<(ProcTimer, Arg, usize)>,
}

impl TimersProbe {
    /// Adds it to a batch that any thread of the stopped process may run.
    ///
    /// # Errors
    /// If /proc cannot be read, and for timers that cannot be carried.
    pub fn ask(pid: Tid, batch: &mut Batch) -> Result<Self, AttrError> {
        let listed = timers_of(pid)?;
        let reasons = obstacles(pid, &listed);
        if !reasons.is_empty() {
            return Err(AttrError::Refused(reasons));
        }
        let mut calls = Named::new();
        let itimers = ITIMERS.map(|which| {
            let into = batch.output(32);
            calls.add(batch, "reading an interval timer", libc::SYS_getitimer, &[which.into(), into]);
            into
        });
        let mut timers = Vec::with_capacity(listed.len());
        for timer in listed {
            let into = batch.output(32);
            let args = [timer.id.into(), into];
            calls.add(batch, "reading a POSIX timer", libc::SYS_timer_gettime, &args);
            let what = "reading how often a POSIX timer was missed";
            let overrun = calls.add(batch, what, libc::SYS_timer_getoverrun, &[timer.id.into()]);
            timers.push((timer, into, overrun));
        }
        Ok(Self { calls, itimers, timers })
    }

    /// The three interval timers and the POSIX timers.
    ///
    /// # Errors
    /// If a call failed.
    pub fn read(&self, pid: Tid, outcome: &Outcome) -> Result<(Vec<Itimer>, Vec<PosixTimer>), InjectError> {
        self.calls.check(pid, outcome)?;
        // Interval, then time to the next expiry; seconds and a fraction each.
        let times = |at: Arg, per_second: u64| match words(outcome.data(at, 32))[..] {
            [s, f, value_s, value_f] => {
                let total = |s: u64, f: u64| s.saturating_mul(per_second).saturating_add(f);
                (total(s, f), total(value_s, value_f))
            }
            _ => (0, 0),
        };
        let itimers = self.itimers.iter().map(|at| times(*at, US));
        let mut itimers: Vec<Itimer> =
            itimers.map(|(interval_us, value_us)| Itimer { interval_us, value_us }).collect();
        // ITIMER_REAL goes on when its SIGALRM is delivered. Due and not delivered, it reads as nothing
        // left, which would stop it: the next time is at most one interval away.
        if let Some(real) = itimers.first_mut().filter(|real| real.value_us == 0) {
            real.value_us = real.interval_us;
        }
        let timers = self.timers.iter().map(|(timer, at, overrun)| {
            let (interval_ns, value_ns) = times(*at, NS);
            PosixTimer {
                id: timer.id,
                clock: clock_of(timer.clock).unwrap_or(timer.clock),
                signal: timer.signal,
                notify: timer.notify,
                sigval: timer.sigval,
                thread: if timer.notify & libc::SIGEV_THREAD_ID == 0 {
                    0
                } else {
                    timer.target.unsigned_abs()
                },
                interval_ns,
                value_ns,
                overrun: outcome.ret(*overrun).ok().and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
            }
        });
        Ok((itimers, timers.collect()))
    }
}

/// Whether a `siginfo_t` is the signal of this timer. It has only one, which is queued again for the next time.
fn is_signal_of(info: &[u8], timer: &PosixTimer) -> bool {
    // signal, errno, code; of SI_TIMER the timer's id and the value, after the padding.
    let sigval = info.get(24..32).and_then(|bytes| bytes.try_into().ok()).map(u64::from_ne_bytes);
    word(info, 0) == Some(timer.signal)
        && word(info, 8) == Some(libc::SI_TIMER)
        && word(info, 16) == Some(timer.id)
        && sigval == Some(timer.sigval)
}

fn word(info: &[u8], at: usize) -> Option<i32> {
    info.get(at..at + 4)?.try_into().ok().map(i32::from_ne_bytes)
}

/// Brings what was read of the timers, `since_read` ago, into line with the signals that are pending now;
/// `before` are those that were pending before the timers were read.
///
/// - An interval timer or one that fires once, whose signal is new, has used up what it had left.
/// - A periodic POSIX timer whose signal is pending has `value_ns` to its next time: what it has left moves
///   on by an interval if it fired only after it was read.
/// - A signal of a POSIX timer that was set anew since (it has more left than it can have) is void: the
///   kernel would not deliver it, and it leaves the image.
pub fn account_for_fired(before: &[Vec<u8>], since_read: Duration, image: &mut Process) {
    let all = super::signals::all_pending(image);
    let new: Vec<_> = all.iter().filter(|info| !before.contains(info)).collect();
    let from_kernel =
        |info: &[u8], signal| word(info, 0) == Some(signal) && word(info, 8) == Some(libc::SI_KERNEL);
    let next = |value: u64, interval: u64| if interval == 0 { 0 } else { value.saturating_add(interval) };
    let since_read = u64::try_from(since_read.as_nanos()).unwrap_or(u64::MAX);
    for timer in &mut image.timers {
        if timer.value_ns == 0 || !all.iter().any(|info| is_signal_of(info, timer)) {
            continue;
        }
        let was_pending = before.iter().any(|info| is_signal_of(info, timer));
        if !was_pending && timer.value_ns <= since_read {
            timer.value_ns = next(timer.value_ns, timer.interval_ns);
        } else if timer.value_ns > timer.interval_ns {
            let is_void = |info: &Vec<u8>| is_signal_of(info, timer);
            image.pending.retain(|info| !is_void(info));
            for thread in &mut image.threads {
                thread.pending.retain(|info| !is_void(info));
            }
        }
    }
    for (signal, timer) in [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF].into_iter().zip(&mut image.itimers)
    {
        if timer.value_us != 0 && new.iter().any(|info| from_kernel(info, signal)) {
            timer.value_us = next(timer.value_us, timer.interval_us);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(signal: i32, code: i32, id: i32) -> Vec<u8> {
        let mut info = vec![0; attrs::SIGINFO_BYTES];
        for (at, word) in [(0, signal), (8, code), (16, id)] {
            info[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        info
    }

    #[test]
    fn what_fired_after_it_was_read_fires_no_second_time() {
        let timer = |id, interval_ns| PosixTimer {
            id,
            signal: 10,
            value_ns: 5,
            interval_ns,
            ..PosixTimer::default()
        };
        let mut image = Process {
            pending: vec![
                info(libc::SIGALRM, libc::SI_KERNEL, 0),
                info(10, libc::SI_TIMER, 1),
                info(10, libc::SI_TIMER, 2),
                info(10, libc::SI_TIMER, 3),
                info(10, libc::SI_TIMER, 4),
            ],
            itimers: vec![Itimer { interval_us: 0, value_us: 9 }; 3],
            timers: vec![timer(1, 0), timer(2, 100), timer(3, 100), timer(4, 0), timer(5, 0)],
            ..Process::default()
        };
        let before = [info(10, libc::SI_TIMER, 3), info(10, libc::SI_TIMER, 4)];
        let mut later = image.clone();
        account_for_fired(&before, Duration::from_nanos(5), &mut image);
        let left: Vec<u64> = image.timers.iter().map(|t| t.value_ns).collect();
        assert_eq!(left, [0, 105, 5, 5, 5]);
        let left: Vec<u64> = image.itimers.iter().map(|t| t.value_us).collect();
        assert_eq!(left, [0, 9, 9]);
        // The fourth was set anew while its signal waited: that is void.
        assert_eq!(image.pending.len(), 4);
        assert!(!image.pending.contains(&info(10, libc::SI_TIMER, 4)));
        // It cannot have fired since it was read: its signal came between the first look and the reading.
        account_for_fired(&before, Duration::from_nanos(4), &mut later);
        assert_eq!(later.timers[1].value_ns, 5);
    }

    #[test]
    fn cpu_clocks_of_threads_are_refused() {
        let timer = |clock| ProcTimer { id: 3, signal: 10, sigval: 0, notify: 0, target: 1, clock };
        assert!(obstacles(1, &[timer(-6), timer(1), timer(0)]).is_empty());
        let reasons = obstacles(1, &[timer(-2), timer(-6), timer(-8006)]);
        assert_eq!(reasons.len(), 2);
        assert_eq!(reasons[0].object, "POSIX timer 3");
    }
}
