//! Clocks that go on: a moved process must not see CLOCK_MONOTONIC or CLOCK_BOOTTIME jump, least of all
//! back, or its sleeps, timeouts and timers go wrong.
//!
//! Both clocks count from the start of their machine. Where those of the destination's service and those
//! of the process differ, the skeleton is born into a time namespace that shifts them. The offsets of a
//! namespace cannot change once a process is in it, so they are settled at the beginning of a migration:
//! - On the same kernel (two containers of one machine) they are those that the process has: exact.
//! - Between machines they follow from what the process's clocks read when the source sent the plan, as
//!   if it had come at once. The clocks then lag by the time the plan was under way. Before the process
//!   runs, [`catch_up`] waits until they have passed what they read at the freeze; nearly always they
//!   have, as the final state was under way for longer.

use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::gettid;

use super::procfs::{ClockOffsets, ProcfsError, parse_timens_offsets};
use super::remote::{Arg, Batch, InjectError, Outcome, Tid};
use super::sys::{fds, timens};
use crate::proto::control::Begin;
use crate::proto::image::Clocks;

/// Longest time that a process is held back for its clocks. They lag by what the plan took to arrive
/// and by what the machines' clocks drift apart in the course of a migration: milliseconds.
const MOST_LAG: Duration = Duration::from_secs(5);
const NS: i64 = 1_000_000_000;

/// Why the clocks of a process cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// A file of /proc could not be read.
    #[error("reading {path}")]
    Read {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It could be read, and made no sense.
    #[error("parsing {path}")]
    Parse {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: ProcfsError,
    },
    /// A clock of ours could not be read.
    #[error("reading our clocks")]
    Clock(#[source] Errno),
    /// The plan of the source does not tell.
    #[error("the source says nothing about the clocks")]
    Untold,
    /// No clock is that far off.
    #[error("the clocks are too far apart")]
    Range,
    /// The service may not make time namespaces, or the kernel has none.
    #[error("making a time namespace (unshare)")]
    Unshare(#[source] Errno),
    /// The namespace does not take the offsets.
    #[error("setting the clocks of a time namespace {0} ns and {1} ns off the machine's", .offsets.monotonic_ns, .offsets.boottime_ns)]
    Offsets {
        /// They.
        offsets: ClockOffsets,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The clocks are far behind what they were when the process was stopped.
    #[error("the clocks of the process are {0:?} behind")]
    Behind(Duration),
}

/// How much more the clocks of a process read than ours; nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shift {
    monotonic_ns: i64,
    boottime_ns: i64,
}

impl Shift {
    /// On this clock; zero on those that time namespaces do not shift.
    pub fn of(&self, clock: i32) -> i64 {
        match clock {
            libc::CLOCK_MONOTONIC | libc::CLOCK_MONOTONIC_RAW | libc::CLOCK_MONOTONIC_COARSE => {
                self.monotonic_ns
            }
            libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => self.boottime_ns,
            _ => 0,
        }
    }

    /// What the process reads now.
    fn readings(self) -> Result<Clocks, ClockError> {
        let read = |clock| {
            let ours = fds::clock_ns(clock).map_err(ClockError::Clock)?;
            ours.checked_add(self.of(clock)).ok_or(ClockError::Range)
        };
        Ok(Clocks { monotonic_ns: read(libc::CLOCK_MONOTONIC)?, boottime_ns: read(libc::CLOCK_BOOTTIME)? })
    }
}

/// What our own clocks read: to be asked when a plan arrives.
///
/// # Errors
/// If they cannot be read.
pub fn here() -> Result<Clocks, ClockError> {
    Shift::default().readings()
}

/// How far the clocks of process `pid`, or of the children that its main thread will have, are from the
/// machine's.
fn offsets_of(pid: &str) -> Result<ClockOffsets, ClockError> {
    let path = format!("/proc/{pid}/timens_offsets");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        // A kernel without time namespaces has this process and not the file.
        Err(e)
            if e.kind() == std::io::ErrorKind::NotFound
                && std::fs::exists(format!("/proc/{pid}/stat")).unwrap_or(false) =>
        {
            return Ok(ClockOffsets::default());
        }
        Err(source) => return Err(ClockError::Read { path, source }),
    };
    parse_timens_offsets(&text).map_err(|source| ClockError::Parse { path, source })
}

fn minus(a: i64, b: i64) -> Result<i64, ClockError> {
    a.checked_sub(b).ok_or(ClockError::Range)
}

/// How much more the clocks of process `pid` read than ours.
///
/// # Errors
/// If /proc does not tell.
pub fn shift_of(pid: Tid) -> Result<Shift, ClockError> {
    let (theirs, ours) = (offsets_of(&pid.to_string())?, offsets_of("self")?);
    Ok(Shift {
        monotonic_ns: minus(theirs.monotonic_ns, ours.monotonic_ns)?,
        boottime_ns: minus(theirs.boottime_ns, ours.boottime_ns)?,
    })
}

/// The clocks of a process, for the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// What they read now.
    pub now: Clocks,
    /// How far its time namespace is from the machine's clocks.
    pub offsets: Clocks,
}

/// Looks at the clocks of process `pid`.
///
/// # Errors
/// If /proc does not tell.
pub fn look(pid: Tid) -> Result<View, ClockError> {
    let offsets = offsets_of(&pid.to_string())?;
    let offsets = Clocks { monotonic_ns: offsets.monotonic_ns, boottime_ns: offsets.boottime_ns };
    Ok(View { offsets, now: shift_of(pid)?.readings()? })
}

/// Sees that the next child of the calling thread is born with clocks that go on from those of the source,
/// if need be in a new time namespace. `received` is what [`here`] told when the plan arrived. Returns how
/// much more the child's clocks will read than ours.
///
/// # Errors
/// If the clocks cannot be carried on: see [`ClockError`].
pub fn prepare(begin: &Begin, same_kernel: bool, received: Option<&Clocks>) -> Result<Shift, ClockError> {
    let told = begin.clocks.as_ref().zip(begin.clock_offsets.as_ref()).zip(received);
    let ((there, offsets_there), received) = told.ok_or(ClockError::Untold)?;
    let ours = offsets_of("self")?;
    let shift = if same_kernel {
        Shift {
            monotonic_ns: minus(offsets_there.monotonic_ns, ours.monotonic_ns)?,
            boottime_ns: minus(offsets_there.boottime_ns, ours.boottime_ns)?,
        }
    } else {
        Shift {
            monotonic_ns: minus(there.monotonic_ns, received.monotonic_ns)?,
            boottime_ns: minus(there.boottime_ns, received.boottime_ns)?,
        }
    };
    if shift != Shift::default() {
        let plus = |a: i64, b: i64| a.checked_add(b).ok_or(ClockError::Range);
        enter(ClockOffsets {
            monotonic_ns: plus(ours.monotonic_ns, shift.monotonic_ns)?,
            boottime_ns: plus(ours.boottime_ns, shift.boottime_ns)?,
        })?;
    }
    Ok(shift)
}

/// A new time namespace for the children of this thread.
fn enter(offsets: ClockOffsets) -> Result<(), ClockError> {
    timens::unshare_time().map_err(ClockError::Unshare)?;
    let line = |clock, ns: i64| format!("{clock} {} {}\n", ns.div_euclid(NS), ns.rem_euclid(NS));
    let text = line("monotonic", offsets.monotonic_ns) + &line("boottime", offsets.boottime_ns);
    // /proc/thread-self has no such file; a thread's number works in its place.
    std::fs::write(format!("/proc/{}/timens_offsets", gettid()), text)
        .map_err(|source| ClockError::Offsets { offsets, source })
}

/// Holds the caller until the clocks of the process, `shift` ahead of ours, read no less than they did at
/// the freeze. Returns for how long it has not run, by its own clock.
///
/// # Errors
/// [`ClockError::Behind`] if that would take long: something is wrong.
pub fn catch_up(frozen: Option<&Clocks>, shift: &Shift) -> Result<Duration, ClockError> {
    let frozen = frozen.ok_or(ClockError::Untold)?;
    loop {
        let now = shift.readings()?;
        let passed = minus(now.monotonic_ns, frozen.monotonic_ns)?;
        let least = passed.min(minus(now.boottime_ns, frozen.boottime_ns)?);
        if least >= 0 {
            return Ok(Duration::from_nanos(passed.unsigned_abs()));
        }
        let lag = Duration::from_nanos(least.unsigned_abs());
        if lag > MOST_LAG {
            return Err(ClockError::Behind(lag));
        }
        std::thread::sleep(lag);
    }
}

/// The question of what a process's clocks read, answered by itself.
#[derive(Debug)]
pub struct ClocksProbe {
    calls: [(usize, Arg); 2],
}

impl ClocksProbe {
    /// Adds it to a batch that any thread of the stopped process may run.
    pub fn ask(batch: &mut Batch) -> Self {
        let calls = [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME].map(|clock| {
            let into = batch.output(16);
            (batch.call(libc::SYS_clock_gettime, &[clock.into(), into]), into)
        });
        Self { calls }
    }

    /// What they read.
    ///
    /// # Errors
    /// If a call failed.
    pub fn read(&self, pid: Tid, outcome: &Outcome) -> Result<Clocks, InjectError> {
        let ns = |(call, into): (usize, Arg)| {
            let what = || "reading a clock".to_owned();
            outcome.ret(call).map_err(|errno| InjectError::Call { what: what(), tid: pid, errno })?;
            let half = |bytes: &[u8]| bytes.try_into().map_or(0, i64::from_ne_bytes);
            let (seconds, ns) = outcome.data(into, 16).split_at_checked(8).unwrap_or_default();
            Ok(half(seconds).saturating_mul(NS).saturating_add(half(ns)))
        };
        let [monotonic, boottime] = self.calls;
        Ok(Clocks { monotonic_ns: ns(monotonic)?, boottime_ns: ns(boottime)? })
    }
}

#[cfg(test)]
mod tests;
