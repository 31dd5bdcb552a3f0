//! Interrupted system calls that simply go on, with the time that was left.
//!
//! A stop from outside interrupts a sleep. Most calls the kernel restarts by itself, at the destination
//! too; but those with a relative timeout (nanosleep, clock_nanosleep, poll, futex wait) return
//! `ERESTART_RESTARTBLOCK` and leave the rest to a *restart block* in the kernel, which shows nowhere: not
//! the deadline, and after one restart not even the number of the call (it is restart_syscall then).
//!
//! So the source watches: [`SleepBook::look`] right before a stop notes who sleeps in which call and until
//! when, [`SleepBook::note`] right after it says what goes for each thread. The destination starts the
//! same call with the remaining time and interrupts it ([`arm()`]), which fills the restart block for real.
//!
//! epoll_wait has no restart block: it ends with EINTR, and is issued again, with what is left as its timeout. Its
//! whole timeout once more would make the timers late of all that sleep by it (event loops, Go's runtime).

mod arm;
mod clock;
mod look;
mod timer_list;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::freeze::{FreezeError, Frozen, thread_ids};
use super::inject::StoppedThread;
use super::regs;
use super::remote::Tid;
pub use arm::arm;
use look::{Blocked, Target};

/// How often a process is stopped anew because one of its threads was on its way back into a sleep, and how long
/// it then gets to arrive there. On a busy host it waits for a processor.
const TRIES: usize = 4;
const PATIENCE: Duration = Duration::from_millis(50);

/// What a thread that was stopped in a call was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The number of the call, also where the registers say restart_syscall.
    pub number: i64,
    /// What is left of its relative timeout; -1 if it has none or nothing is known.
    pub remaining_ns: i64,
}

/// Where in the program a call was made: the same before and after a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    args: [u64; 6],
    sp: u64,
    pc: u64,
}

/// A sleep with a deadline on the monotonic clock, if that is known.
#[derive(Debug, Clone, Copy)]
struct Sleep {
    place: Place,
    number: i64,
    deadline: Option<u64>,
    /// Voluntary context switches of the thread while it slept.
    switches: u64,
}

#[derive(Debug, Default)]
struct Entry {
    /// As the last look found it.
    seen: Option<Sleep>,
    /// As the last stop left it.
    stopped: Option<Sleep>,
}

/// What is known of the sleeps of one process's threads.
#[derive(Debug, Default)]
pub struct SleepBook {
    threads: HashMap<Tid, Entry>,
    calls: HashMap<Tid, Call>,
}

impl SleepBook {
    /// An empty book, for one process.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stops a process, between [`SleepBook::look`] and [`SleepBook::note`]. It goes on for a moment, and is stopped
    /// again, while there are threads of which nobody knows what they do.
    ///
    /// # Errors
    /// See [`FreezeError`].
    pub fn freeze(&mut self, pid: Tid, patience: Duration) -> Result<Frozen, FreezeError> {
        let mut tries = 1;
        loop {
            self.look(pid);
            let mut frozen = Frozen::freeze(pid, patience)?;
            self.note(frozen.threads());
            frozen.remember_waits(self);
            let unknown: Vec<Target> = frozen
                .threads()
                .iter()
                .filter(|thread| self.is_unknown(thread))
                .map(|thread| Target { pid, tid: thread.tid })
                .collect();
            if unknown.is_empty() || tries == TRIES {
                return Ok(frozen);
            }
            tries += 1;
            frozen.thaw()?;
            let end = Instant::now() + PATIENCE;
            while unknown.iter().any(|target| target.asleep().is_none()) && Instant::now() < end {
                std::thread::yield_now();
            }
        }
    }

    /// Whether a stopped thread is in a call that was interrupted before, and nothing tells which.
    pub fn is_unknown(&self, thread: &StoppedThread) -> bool {
        regs::interrupted_call(&thread.regs) == Some(libc::SYS_restart_syscall)
            && regs::signed(thread.regs.rax) == regs::ERESTART_RESTARTBLOCK
            && !self.calls.contains_key(&thread.tid)
    }

    /// Notes which threads sleep in a call with a relative timeout, and until when. To be called while the
    /// process runs, right before each stop. What cannot be read is left out: it costs exactness, no more.
    pub fn look(&mut self, pid: Tid) {
        let tids = thread_ids(pid).unwrap_or_default();
        self.threads.retain(|tid, _| tids.contains(tid));
        let mut clocks = clock::CpuClocks::default();
        for tid in tids {
            let target = Target { pid, tid };
            let sleep = target.asleep().and_then(|asleep| self.identify(target, &asleep, &mut clocks));
            let entry = self.threads.entry(tid).or_default();
            entry.seen = sleep;
        }
        // Stopping a thread to learn its deadline disturbs its record: last, and only for those in need.
        for (&tid, entry) in &mut self.threads {
            if let Some(sleep) =
                entry.seen.as_mut().filter(|s| s.deadline.is_none() && look::needs_deadline(s))
            {
                sleep.deadline = timer_list::deadline(pid, tid);
                sleep.switches = look::switches(pid, tid).unwrap_or(sleep.switches);
            }
        }
    }

    fn identify(
        &self,
        target: Target,
        asleep: &look::Asleep,
        clocks: &mut clock::CpuClocks,
    ) -> Option<Sleep> {
        let Blocked { number, place } = asleep.blocked;
        let switches = asleep.sched.switches;
        if number == libc::SYS_restart_syscall {
            // One that should be over by now is another, which somebody else has interrupted.
            let now = clock::monotonic_ns();
            let known = self.threads.get(&target.tid).and_then(|e| e.stopped);
            let known = known.filter(|s| s.place == place && s.deadline.is_none_or(|d| d > now));
            return match known {
                Some(known) => Some(Sleep { switches, ..known }),
                None => {
                    Some(Sleep { place, number: target.restarted_call(&place)?, deadline: None, switches })
                }
            };
        }
        let timeout = look::relative_timeout(target.pid, number, &place.args)?;
        let began = clocks.monotonic(asleep.cpu, asleep.sched.exec_start);
        // Without a beginning: the whole time from now on; a sleep is never too short.
        let began = began.unwrap_or_else(clock::monotonic_ns);
        Some(Sleep { place, number, deadline: Some(began.saturating_add(timeout)), switches })
    }

    /// Settles what goes for each thread of the stopped process, leader first. To be called right after
    /// each stop, before anything is injected.
    pub fn note(&mut self, threads: &[StoppedThread]) {
        let now = clock::monotonic_ns();
        self.calls.clear();
        let Some(pid) = threads.first().map(|t| t.tid) else { return };
        for thread in threads {
            let entry = self.threads.entry(thread.tid).or_default();
            let last = entry.stopped.filter(|s| s.deadline.is_none_or(|d| d > now));
            entry.stopped = settle(pid, thread, entry.seen.take(), last, now);
            if let Some(sleep) = entry.stopped {
                let left = sleep.deadline.and_then(|d| i64::try_from(d.saturating_sub(now)).ok());
                let call = Call { number: sleep.number, remaining_ns: left.unwrap_or(-1) };
                self.calls.insert(thread.tid, call);
            }
        }
    }

    /// Until when, on the monotonic clock, threads wait whose calls are to be issued again with what is left.
    pub fn waits(&self) -> HashMap<Tid, u64> {
        let of = |(tid, entry): (&Tid, &Entry)| {
            let sleep = entry.stopped.filter(|s| regs::EPOLL_WAITS.contains(&s.number))?;
            Some((*tid, sleep.deadline?))
        };
        self.threads.iter().filter_map(of).collect()
    }

    /// The call that a thread was in at the last [`SleepBook::note`], if it is one that the kernel would go
    /// on with by a restart block, or that is issued again with what is left of its timeout. Of the former the number
    /// belongs into `orig_rax` of the captured registers.
    pub fn remaining(&self, thread: &StoppedThread) -> Option<Call> {
        self.calls.get(&thread.tid).copied()
    }
}

/// From now to an instant of the monotonic clock, rounded up.
pub(super) fn milliseconds_to(instant: u64) -> u64 {
    instant.saturating_sub(clock::monotonic_ns()).div_ceil(1_000_000)
}

/// The call of one stopped thread; `seen` is what the look before the stop found, `last` how the stop before left it.
fn settle(
    pid: Tid,
    thread: &StoppedThread,
    seen: Option<Sleep>,
    last: Option<Sleep>,
    now: u64,
) -> Option<Sleep> {
    let r = &thread.regs;
    let number = regs::interrupted_call(r)?;
    let waits = regs::ended_by_stop(r) && regs::EPOLL_WAITS.contains(&number);
    if regs::signed(r.rax) != regs::ERESTART_RESTARTBLOCK && !waits {
        return None;
    }
    let place = Place { args: [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9], sp: r.rsp, pc: r.rip };
    let seen = seen.filter(|s| s.place == place);
    let switches = look::switches(pid, thread.tid).unwrap_or(0);
    let (number, deadline) = if number == libc::SYS_restart_syscall {
        // One that has not come to sleep since the last stop is still in what it was in then.
        let seen = seen.or(last.filter(|s| s.place == place))?;
        (seen.number, seen.deadline)
    } else {
        // The same call, and only woken by our stop since: else it began after the look.
        let same = seen.filter(|s| s.number == number && switches <= s.switches + 1);
        let whole = || look::relative_timeout(pid, number, &place.args).map(|t| now.saturating_add(t));
        (number, same.map_or_else(whole, |s| s.deadline))
    };
    // Where the program asked for the remaining time, the kernel has written it as the thread stopped: a
    // little before now.
    let written = look::written_remainder(pid, number, &place.args).map(|left| now.saturating_add(left));
    let deadline = deadline.into_iter().chain(written).min();
    Some(Sleep { place, number, deadline, switches })
}

#[cfg(test)]
mod tests;
