//! Interval timers and POSIX timers: restored as late as possible, with the time that remains.
//!
//! Carried: the three itimers; POSIX timers on the realtime, monotonic, boot-time and TAI clocks, their
//! alarm variants, and the process's CPU clock, with their ids. A timer on the CPU clock of a thread is
//! refused: the kernel does not tell of which thread. The count of overruns that timer_getoverrun(2)
//! gives between one delivery and the next begins at 0.

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

const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

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
    timers: Vec<(ProcTimer, Arg)>,
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
            timers.push((timer, into));
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
        let timers = self.timers.iter().map(|(timer, at)| {
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
                overrun: 0,
            }
        });
        Ok((itimers, timers.collect()))
    }
}

/// Corrects timers that fired after they were read: their signal is among those pending, and was not
/// `before`. What they had left is over: one that fires once must not fire again, any other goes on with
/// the next time.
pub fn account_for_fired(before: &[Vec<u8>], image: &mut Process) {
    let all = super::signals::all_pending(image);
    let word = |info: &[u8], at: usize| info.get(at..at + 4)?.try_into().ok().map(i32::from_ne_bytes);
    // siginfo_t: signal, errno, code; for SI_TIMER the timer's id after the padding.
    let new: Vec<_> = all.iter().filter(|info| !before.contains(info)).collect();
    let from_kernel =
        |info: &[u8], signal| word(info, 0) == Some(signal) && word(info, 8) == Some(libc::SI_KERNEL);
    let next = |value: u64, interval: u64| if interval == 0 { 0 } else { value.saturating_add(interval) };
    for timer in &mut image.timers {
        let is_its =
            |info: &&Vec<u8>| word(info, 8) == Some(libc::SI_TIMER) && word(info, 16) == Some(timer.id);
        if timer.value_ns != 0 && new.iter().any(is_its) {
            timer.value_ns = next(timer.value_ns, timer.interval_ns);
        }
    }
    for (signal, timer) in [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF].into_iter().zip(&mut image.itimers)
    {
        if timer.value_us != 0 && new.iter().any(|info| from_kernel(info, signal)) {
            timer.value_us = next(timer.value_us, timer.interval_us);
        }
    }
}

/// Makes the timers again and starts them. `elapsed` is how long ago they were captured: what goes on
/// while a process does not run is that much nearer its end, and fires at once if it is over.
///
/// # Errors
/// For timers that [`preflight`] would have refused.
pub fn restore_calls(image: &Process, elapsed: Duration, batch: &mut Batch) -> Result<Named, AttrError> {
    let invalid = |t: &&PosixTimer| t.id < 0 || clock_of(t.clock) != Some(t.clock);
    if image.timers.len() > MAX_TIMERS || image.itimers.len() > ITIMERS.len() {
        return Err(AttrError::Refused(vec![Reason::new("the process", "has too many timers", "")]));
    }
    if let Some(timer) = image.timers.iter().find(invalid) {
        let why = format!("cannot be made here (clock {})", timer.clock);
        return Err(AttrError::Refused(vec![Reason::new(format!("POSIX timer {}", timer.id), why, "")]));
    }
    let mut calls = Named::new();
    if !image.timers.is_empty() {
        restore_ids(&mut calls, batch, 1);
        // The kernel lists the newest first, and counts on from the last id it gave.
        for timer in image.timers.iter().rev() {
            // struct sigevent: value, signal, notification, thread; 64 bytes.
            let mut event = [0u8; 64];
            event[..8].copy_from_slice(&timer.sigval.to_ne_bytes());
            event[8..12].copy_from_slice(&timer.signal.to_ne_bytes());
            event[12..16].copy_from_slice(&timer.notify.to_ne_bytes());
            event[16..20].copy_from_slice(&timer.thread.to_ne_bytes());
            let event = batch.input(&event);
            let id = batch.input(&timer.id.to_ne_bytes());
            let args = [timer.clock.into(), event, id];
            calls.add(batch, "making a POSIX timer with its id", libc::SYS_timer_create, &args);
        }
        restore_ids(&mut calls, batch, 0);
    }
    let elapsed_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
    for timer in &image.timers {
        let passed = if timer.clock == libc::CLOCK_PROCESS_CPUTIME_ID { 0 } else { elapsed_ns };
        let times = timespecs(timer.interval_ns, left(timer.value_ns, passed), NS);
        let times = batch.input(&times);
        let args = [timer.id.into(), 0u64.into(), times, 0u64.into()];
        calls.add(batch, "starting a POSIX timer", libc::SYS_timer_settime, &args);
    }
    for (which, timer) in ITIMERS.into_iter().zip(&image.itimers) {
        let passed = if which == 0 { elapsed_ns / 1000 } else { 0 };
        let times = batch.input(&timespecs(timer.interval_us, left(timer.value_us, passed), US));
        let args = [which.into(), times, 0u64.into()];
        calls.add(batch, "starting an interval timer", libc::SYS_setitimer, &args);
    }
    Ok(calls)
}

fn restore_ids(calls: &mut Named, batch: &mut Batch, on: u64) {
    let args = [PR_TIMER_CREATE_RESTORE_IDS.into(), on.into()];
    calls.add(batch, "choosing timer ids (PR_TIMER_CREATE_RESTORE_IDS)", libc::SYS_prctl, &args);
}

/// What is left of `value`: 0 stays 0 (not running), anything else is at least 1.
fn left(value: u64, passed: u64) -> u64 {
    if value == 0 { 0 } else { value.saturating_sub(passed).max(1) }
}

/// Interval and value as the kernel's structures have them.
fn timespecs(interval: u64, value: u64, per_second: u64) -> Vec<u8> {
    [interval / per_second, interval % per_second, value / per_second, value % per_second]
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_passes_but_never_stops_a_timer() {
        assert_eq!((left(0, 5), left(10, 4), left(10, 10), left(10, 11)), (0, 6, 1, 1));
    }

    #[test]
    fn what_fired_after_it_was_read_fires_no_second_time() {
        let info = |signal: i32, code: i32, id: i32| {
            let mut info = vec![0; attrs::SIGINFO_BYTES];
            for (at, word) in [(0, signal), (8, code), (16, id)] {
                info[at..at + 4].copy_from_slice(&word.to_ne_bytes());
            }
            info
        };
        let timer = |id, interval_ns| PosixTimer { id, value_ns: 5, interval_ns, ..PosixTimer::default() };
        let mut image = Process {
            pending: vec![
                info(libc::SIGALRM, libc::SI_KERNEL, 0),
                info(10, libc::SI_TIMER, 1),
                info(10, libc::SI_TIMER, 2),
                info(10, libc::SI_TIMER, 3),
            ],
            itimers: vec![Itimer { interval_us: 0, value_us: 9 }; 3],
            timers: vec![timer(1, 0), timer(2, 100), timer(3, 0), timer(4, 0)],
            ..Process::default()
        };
        account_for_fired(&[info(10, libc::SI_TIMER, 3)], &mut image);
        let left: Vec<u64> = image.timers.iter().map(|t| t.value_ns).collect();
        assert_eq!(left, [0, 105, 5, 5]);
        let left: Vec<u64> = image.itimers.iter().map(|t| t.value_us).collect();
        assert_eq!(left, [0, 9, 9]);
    }

    #[test]
    fn cpu_clocks_of_threads_are_refused() {
        let timer = |clock| ProcTimer { id: 3, signal: 10, sigval: 0, notify: 0, target: 1, clock };
        assert!(obstacles(1, &[timer(-6), timer(1), timer(0)]).is_empty());
        let reasons = obstacles(1, &[timer(-2), timer(-6), timer(-8006)]);
        assert_eq!(reasons.len(), 2);
        assert_eq!(reasons[0].object, "POSIX timer 3");
        let image = Process {
            timers: vec![PosixTimer { id: 1, clock: -2, ..PosixTimer::default() }],
            ..Process::default()
        };
        assert!(restore_calls(&image, Duration::ZERO, &mut Batch::new()).is_err());
    }
}
