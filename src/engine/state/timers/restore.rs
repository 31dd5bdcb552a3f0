//! Timers are made again and set going, so that a POSIX timer goes on as if it had only stood still.
//!
//! The kernel counts what a periodic timer misses: when its signal is taken, the timer is moved on to its
//! next time by whole intervals, and their number is the overrun. So a timer whose first time lies N
//! intervals back has an overrun of N once its signal is taken, and keeps its phase:
//!
//! - one whose signal is pending gets the time before its next one for its first. Its signal is queued by
//!   the kernel and counts on; one that we sent in its place would be joined by another;
//! - one that has run out meanwhile gets the time when it did. What timer_getoverrun(2) said of the delivery
//!   before is lost then: it says 0 until the signal is taken;
//! - one that still has time, and an overrun, fires in the past and has its signal taken by the process itself.
//!
//! A past time can only be given as an absolute one. On CLOCK_REALTIME that makes a difference (a relative
//! timer does not follow when the clock is set), so other timers are given the time they have left. The CPU
//! clock of the process begins at 0 and has no past: overruns of its timers begin at 0 too, and one whose
//! signal is pending goes on with a whole interval.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{ITIMERS, MAX_TIMERS, NS, US, clock_of, is_signal_of, word};
use crate::engine::clocks::{self, ClockError, Shift};
use crate::engine::reason::Reason;
use crate::engine::remote::{Batch, InjectError, RemoteCalls, Tid};
use crate::engine::state::calls::{AttrError, Named};
use crate::engine::sys::attrs::{SIGINFO_BYTES, traced_pending};
use crate::engine::sys::fds;
use crate::proto::image::{Itimer, PosixTimer, Process};

const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
const TIMER_ABSTIME: u64 = 1;
/// How long the signal of a timer that is over may take: it comes with the next interrupt.
const DUE: Duration = Duration::from_secs(1);
/// How often an overrun is made anew because the next time came in between.
const ATTEMPTS: u32 = 8;

/// The timers of an image on their way into a process.
#[derive(Debug)]
pub struct Timers<'a> {
    all: &'a [PosixTimer],
    itimers: &'a [Itimer],
    shift: Shift,
    /// What CLOCK_MONOTONIC of the process read when they were captured.
    captured_ns: i64,
    /// Those that run already.
    going: Vec<i32>,
}

impl<'a> Timers<'a> {
    /// Makes the POSIX timers, and sets those going that have an overrun and time left. No signal may be
    /// pending yet.
    ///
    /// # Errors
    /// For timers that a preflight would have refused, and if a call fails.
    pub fn make(process: &mut dyn RemoteCalls, image: &'a Process) -> Result<Self, AttrError> {
        check(image)?;
        let shift = clocks::shift_of(process.pid())?;
        let captured_ns = image.clocks.as_ref().ok_or(ClockError::Untold)?.monotonic_ns;
        let (all, itimers) = (&image.timers, &image.itimers);
        let mut timers = Self { all, itimers, shift, captured_ns, going: Vec::new() };
        if all.is_empty() {
            return Ok(timers);
        }
        let (mut calls, mut batch) = (Named::new(), Batch::new());
        restore_ids(&mut calls, &mut batch, 1);
        // The kernel lists the newest first, and counts on from the last id it gave.
        for timer in all.iter().rev() {
            // struct sigevent: value, signal, notification, thread; 64 bytes.
            let mut event = [0u8; 64];
            event[..8].copy_from_slice(&timer.sigval.to_ne_bytes());
            event[8..12].copy_from_slice(&timer.signal.to_ne_bytes());
            event[12..16].copy_from_slice(&timer.notify.to_ne_bytes());
            event[16..20].copy_from_slice(&timer.thread.to_ne_bytes());
            let event = batch.input(&event);
            let id = batch.input(&timer.id.to_ne_bytes());
            let args = [timer.clock.into(), event, id];
            calls.add(&mut batch, "making a POSIX timer with its id", libc::SYS_timer_create, &args);
        }
        restore_ids(&mut calls, &mut batch, 0);
        calls.check(process.pid(), &process.run(&batch)?)?;
        let pending = super::super::signals::all_pending(image);
        for timer in all.iter().filter(|t| t.overrun > 0 && t.interval_ns > 0 && !on_cpu_clock(t)) {
            if !pending.iter().any(|info| is_signal_of(info, timer)) {
                timers.overrun(process, timer)?;
            }
        }
        Ok(timers)
    }

    /// The timer whose signal this is.
    pub fn whose(&self, info: &[u8]) -> Option<&'a PosixTimer> {
        self.all.iter().find(|timer| is_signal_of(info, timer))
    }

    /// Sets a timer going whose signal is pending, and returns when it is: signals of one number are taken in
    /// the order in which they came.
    ///
    /// # Errors
    /// If it cannot be set, or its signal does not come.
    pub fn fire(&mut self, process: &mut dyn RemoteCalls, timer: &PosixTimer) -> Result<(), AttrError> {
        let first = if timer.interval_ns == 0 || on_cpu_clock(timer) {
            1
        } else {
            self.past(timer, i128::from(timer.value_ns) - i128::from(timer.interval_ns))?
        };
        let (mut calls, mut batch) = (Named::new(), Batch::new());
        set(&mut calls, &mut batch, timer, TIMER_ABSTIME, first);
        calls.check(process.pid(), &process.run(&batch)?)?;
        self.going.push(timer.id);
        let began = Instant::now();
        while !is_queued(process.pid(), timer)? {
            if began.elapsed() > DUE {
                return Err(call("waiting for the signal of a POSIX timer", process.pid(), Errno::ETIMEDOUT));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Sets all others going: as late as possible, they run.
    ///
    /// # Errors
    /// If the time of one cannot be told here.
    pub fn start(&self, batch: &mut Batch) -> Result<Named, AttrError> {
        let mut calls = Named::new();
        let passed = self.passed()?;
        for timer in self.all.iter().filter(|t| t.value_ns != 0 && !self.going.contains(&t.id)) {
            let left = i128::from(timer.value_ns) - if on_cpu_clock(timer) { 0 } else { passed };
            if left <= 0 && timer.interval_ns != 0 {
                let first = self.past(timer, i128::from(timer.value_ns))?;
                set(&mut calls, batch, timer, TIMER_ABSTIME, first);
            } else {
                set(&mut calls, batch, timer, 0, u64::try_from(left.max(1)).unwrap_or(u64::MAX));
            }
        }
        let passed_us = u64::try_from(passed / 1000).unwrap_or(u64::MAX);
        for (which, timer) in ITIMERS.into_iter().zip(self.itimers) {
            let passed = if which == 0 { passed_us } else { 0 };
            let times = batch.input(&timespecs(timer.interval_us, left(timer.value_us, passed), US));
            let args = [which.into(), times, 0u64.into()];
            calls.add(batch, "starting an interval timer", libc::SYS_setitimer, &args);
        }
        Ok(calls)
    }

    /// Lets a timer fire in the past and has the process take its signal, so that it has its overrun. One that
    /// has run out by now is left alone.
    fn overrun(&mut self, process: &mut dyn RemoteCalls, timer: &PosixTimer) -> Result<(), AttrError> {
        let back = (i128::from(timer.overrun) + 1) * i128::from(timer.interval_ns);
        let mask = 1u64.checked_shl(timer.signal.unsigned_abs().wrapping_sub(1)).unwrap_or(0);
        for _ in 0..ATTEMPTS {
            if i128::from(timer.value_ns) <= self.passed()? {
                return Ok(());
            }
            let first = self.past(timer, i128::from(timer.value_ns) - back)?;
            let (mut calls, mut batch) = (Named::new(), Batch::new());
            set(&mut calls, &mut batch, timer, TIMER_ABSTIME, first);
            let mask = batch.input(&mask.to_ne_bytes());
            let info = batch.output(SIGINFO_BYTES);
            let patience = batch.input(&timespecs(DUE.as_secs(), 0, 1)[..16]);
            let args = [mask, info, patience, 8u64.into()];
            calls.add(&mut batch, "taking the signal of a POSIX timer", libc::SYS_rt_sigtimedwait, &args);
            let what = "reading how often a POSIX timer was missed";
            let count = calls.add(&mut batch, what, libc::SYS_timer_getoverrun, &[timer.id.into()]);
            let outcome = match Tid::try_from(timer.thread) {
                Ok(tid) if tid != 0 => process.run_in_threads(&[(tid, batch)])?.pop().unwrap_or_default(),
                _ => process.run(&batch)?,
            };
            calls.check(process.pid(), &outcome)?;
            if let Some(id) = word(outcome.data(info, SIGINFO_BYTES), 16).filter(|id| *id != timer.id) {
                // Another one with the same signal, made before, has run out just now: it fires again.
                self.going.retain(|going| *going != id);
            } else if outcome.ret(count) == Ok(timer.overrun.into()) {
                self.going.push(timer.id);
                return Ok(());
            }
        }
        let why = format!("its count of overruns ({}) cannot be made here", timer.overrun);
        Err(refused(timer, why))
    }

    /// How long ago the timers were captured; nanoseconds.
    fn passed(&self) -> Result<i128, AttrError> {
        let now =
            i128::from(clock(libc::CLOCK_MONOTONIC)?) + i128::from(self.shift.of(libc::CLOCK_MONOTONIC));
        Ok((now - i128::from(self.captured_ns)).max(0))
    }

    /// The instant `after_capture` nanoseconds after the capture, on the timer's clock as the process sees it.
    fn past(&self, timer: &PosixTimer, after_capture: i128) -> Result<u64, AttrError> {
        let here = i128::from(clock(timer.clock)?) + after_capture - self.passed()?;
        // The kernel takes what lies before the start of its clock for that start.
        if here <= 0 {
            return Err(refused(timer, "began before this host was started, and cannot be made here".into()));
        }
        Ok(u64::try_from(here + i128::from(self.shift.of(timer.clock))).unwrap_or(1))
    }
}

/// Their times were not known to the preflight; their clocks and ids were.
fn check(image: &Process) -> Result<(), AttrError> {
    let invalid = |t: &&PosixTimer| t.id < 0 || clock_of(t.clock) != Some(t.clock);
    if image.timers.len() > MAX_TIMERS || image.itimers.len() > ITIMERS.len() {
        return Err(AttrError::Refused(vec![Reason::new("the process", "has too many timers", "")]));
    }
    match image.timers.iter().find(invalid) {
        Some(timer) => Err(refused(timer, format!("cannot be made here (clock {})", timer.clock))),
        None => Ok(()),
    }
}

fn refused(timer: &PosixTimer, why: String) -> AttrError {
    AttrError::Refused(vec![Reason::new(format!("POSIX timer {}", timer.id), why, "")])
}

fn call(what: &str, tid: Tid, errno: Errno) -> AttrError {
    InjectError::Call { what: what.into(), tid, errno }.into()
}

/// What a clock of ours reads.
fn clock(clock: i32) -> Result<i64, AttrError> {
    Ok(fds::clock_ns(clock).map_err(ClockError::Clock)?)
}

fn on_cpu_clock(timer: &PosixTimer) -> bool {
    timer.clock == libc::CLOCK_PROCESS_CPUTIME_ID
}

/// Whether the signal of the timer is pending.
fn is_queued(pid: Tid, timer: &PosixTimer) -> Result<bool, AttrError> {
    const AT_ONCE: u16 = 64;
    let thread = Tid::try_from(timer.thread).unwrap_or(0);
    let (tid, shared) = if thread == 0 { (pid, true) } else { (thread, false) };
    let mut at = 0;
    loop {
        let some = traced_pending(tid, shared, at, AT_ONCE)
            .map_err(|errno| call("reading the pending signals", tid, errno))?;
        if some.iter().any(|info| is_signal_of(info, timer)) {
            return Ok(true);
        }
        if some.len() < usize::from(AT_ONCE) {
            return Ok(false);
        }
        at += u64::from(AT_ONCE);
    }
}

fn set(calls: &mut Named, batch: &mut Batch, timer: &PosixTimer, flags: u64, value_ns: u64) {
    let times = batch.input(&timespecs(timer.interval_ns, value_ns, NS));
    let args = [timer.id.into(), flags.into(), times, 0u64.into()];
    calls.add(batch, "starting a POSIX timer", libc::SYS_timer_settime, &args);
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
    fn what_cannot_be_made_is_refused() {
        let image = |timer| Process { timers: vec![timer], ..Process::default() };
        assert!(check(&image(PosixTimer { id: 1, clock: -2, ..PosixTimer::default() })).is_err());
        assert!(check(&image(PosixTimer { id: -1, clock: 1, ..PosixTimer::default() })).is_err());
        let timer = PosixTimer { id: 1, clock: libc::CLOCK_MONOTONIC, ..PosixTimer::default() };
        let image = image(timer);
        check(&image).unwrap();
        let timers = Timers {
            all: &image.timers,
            itimers: &[],
            shift: Shift::default(),
            captured_ns: clock(libc::CLOCK_MONOTONIC).unwrap(),
            going: Vec::new(),
        };
        assert!(timers.past(&timer, -1).is_ok());
        let AttrError::Refused(reasons) = timers.past(&timer, i128::from(i64::MIN)).unwrap_err() else {
            panic!("another error")
        };
        assert!(reasons[0].why.contains("before this host was started"));
    }
}
