//! The fence: a process that we hold and that must not run even if we die.
//!
//! It is a SIGSTOP in the own queue of each thread. If the kernel lets go of the threads because we died,
//! each finds one (or the stop of the whole process that the first of them has begun) before it reaches user
//! mode. What others send by kill(2) waits in the queue of the process and is never mixed up with it: a
//! stop that comes while the fence is up is still there when it is lifted. (Only a SIGSTOP that is meant for
//! one single thread, which nobody sends, is one with ours.)
//!
//! SIGCONT takes all stops out of all queues, the fence's too, and a stop takes SIGCONT out of them. So
//! raising the fence notes which SIGCONTs it removes, and lifting it sends them again, from us.
//!
//! Lifting it lets each thread run into the delivery of its SIGSTOP, with all else blocked, and stops there.
//! A thread whose SIGSTOP is gone is not let run at all; if a SIGCONT takes it away at the very moment, the
//! kernel makes the traced thread report that before anything else, and it does not run either.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::inject::{signal_bit, sys};
use super::procfs;
use super::remote::{InjectError, Tid};
use super::state::signals::{MAX_PENDING, signal_of};
use super::sys::attrs::traced_pending;
use super::sys::ptrace::{self, Stop};
use super::sys::queue::send_to_thread;

/// How long a thread may take to reach the delivery of its SIGSTOP. In tests it is not the point, and the host is busy.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 20 } else { 2 });
/// A thread that has run for so long has met whatever waited for it, nanoseconds.
const RAN_NS: u64 = 1_000_000;
/// Entries of a queue that are asked for at a time.
const PER_LOOK: u16 = 64;

/// A raised fence. It stays when this value is dropped.
#[derive(Debug)]
pub(super) struct Fence {
    /// The SIGCONTs that it has removed.
    continued: Vec<Queue>,
}

/// Where a signal waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Queue {
    /// For the whole process.
    Process,
    /// For one thread.
    Thread(Tid),
}

impl Fence {
    /// Raises the fence around a process all of whose threads are `tids`, traced and stopped.
    ///
    /// # Errors
    /// If the process is gone.
    pub(super) fn raise(pid: Tid, tids: &[Tid]) -> Result<Self, InjectError> {
        let mut continued = Vec::new();
        let queues = tids.iter().map(|tid| Queue::Thread(*tid));
        for queue in std::iter::once(Queue::Process).chain(queues) {
            if queue.signals(pid)? & signal_bit(libc::SIGCONT) != 0 {
                continued.push(queue);
            }
        }
        let fence = Self { continued };
        for &tid in tids {
            if let Err(errno) = send_to_thread(pid, tid, libc::SIGSTOP) {
                let error = sys("fencing", tid, errno);
                return fence.lift(pid, tids).and(Err(error));
            }
        }
        Ok(fence)
    }

    /// The SIGCONTs that raising the fence has taken out of the queues.
    pub(super) fn continued(&self) -> &[Queue] {
        &self.continued
    }

    /// Takes it down again; the threads stay stopped.
    ///
    /// # Errors
    /// If a thread is gone or does not behave; the others are done all the same.
    pub(super) fn lift(self, pid: Tid, tids: &[Tid]) -> Result<(), InjectError> {
        let mut result = Ok(());
        let mut under_way = Vec::with_capacity(tids.len());
        for &tid in tids {
            match start(tid) {
                Ok(Some(before)) => under_way.push((tid, before)),
                Ok(None) => {}
                Err(error) => result = result.and(Err(error)),
            }
        }
        let deadline = Instant::now() + PATIENCE;
        for (tid, (regs, mask)) in under_way {
            let done = arrive(tid, deadline).and_then(|()| {
                ptrace::set_regs(tid, &regs).map_err(|e| sys("restoring registers", tid, e))?;
                ptrace::set_sigmask(tid, mask).map_err(|e| sys("restoring the mask", tid, e))
            });
            result = result.and(done);
        }
        result.and_then(|()| self.send_continued(pid))
    }

    /// SIGCONT again, unless a stop has come since: that would have removed it.
    fn send_continued(self, pid: Tid) -> Result<(), InjectError> {
        let stop = signal_bit(libc::SIGSTOP);
        for queue in self.continued {
            if Queue::Process.signals(pid)? & stop != 0 {
                break;
            }
            match queue {
                Queue::Process => kill(Pid::from_raw(pid), Signal::SIGCONT),
                Queue::Thread(tid) => send_to_thread(pid, tid, libc::SIGCONT),
            }
            .map_err(|e| sys("sending SIGCONT again", pid, e))?;
        }
        Ok(())
    }
}

impl Queue {
    /// The signals that wait here; `pid` is any traced and stopped thread of the process, for its queue.
    pub(super) fn signals(self, pid: Tid) -> Result<u64, InjectError> {
        let number = |info: &Vec<u8>| info.first_chunk().map_or(0, |c| i32::from_ne_bytes(*c));
        Ok(self.entries(pid)?.iter().fold(0, |set, info| set | signal_bit(number(info))))
    }

    /// The entries that wait here, in order.
    pub(super) fn entries(self, pid: Tid) -> Result<Vec<Vec<u8>>, InjectError> {
        let (tid, shared) = match self {
            Queue::Process => (pid, true),
            Queue::Thread(tid) => (tid, false),
        };
        let mut all: Vec<Vec<u8>> = Vec::new();
        // A process with more is refused by the capture.
        while all.len() <= MAX_PENDING {
            let some = traced_pending(tid, shared, all.len() as u64, PER_LOOK)
                .map_err(|e| sys("reading the pending signals", tid, e))?;
            let last = some.len() < usize::from(PER_LOOK);
            all.extend(some);
            if last {
                break;
            }
        }
        Ok(all)
    }
}

/// Whether this is a SIGSTOP of a fence of ours.
pub(super) fn is_ours(info: &[u8]) -> bool {
    // siginfo_t: signal, errno, code; then for SI_TKILL the sender's PID.
    let word = |at: usize| info.get(at..at + 4).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
    word(0) == Some(libc::SIGSTOP)
        && word(8) == Some(libc::SI_TKILL)
        && word(16) == i32::try_from(std::process::id()).ok()
}

/// Whether a stop that somebody else sent waits for a process, beside the one that a fence has put it in. For
/// a process that nobody traces any more: what keeps it from running is not to be ended by SIGCONT then.
pub fn another_stop_waits(pid: u32) -> bool {
    let status = procfs::read(format!("/proc/{pid}/status")).unwrap_or_default();
    procfs::parse_status(&status).is_ok_and(|s| s.shared_pending & signal_bit(libc::SIGSTOP) != 0)
}

/// Whether a fence, or some other stop, holds a process that nobody traces any more, or is about to. Where it is not
/// clear yet, waits until it is.
pub fn is_up(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.map(|task| task.path()).any(|task| is_held(&task))
}

/// The tracer of a thread may have died when the thread was about to have SIGSTOP delivered: it is not in the queue any
/// more then, and the thread stops as soon as it has a processor. So one that is ready to run has decided nothing
/// before it has run for a while.
fn is_held(task: &Path) -> bool {
    let look = |file| procfs::read(task.join(file)).unwrap_or_default();
    let ran_ns = || procfs::parse_schedstat(&look("schedstat")).unwrap_or_default().ran_ns;
    let (begin, deadline) = (ran_ns(), Instant::now() + PATIENCE);
    loop {
        if procfs::parse_status(&look("status")).is_ok_and(|s| s.pending & signal_bit(libc::SIGSTOP) != 0) {
            return true;
        }
        // By another look: in one, the state is taken down before the signals, and the thread takes its SIGSTOP
        // and stops in one step (do_signal_stop in kernel/signal.c, Linux 6.18).
        match procfs::parse_stat(&look("stat")).map(|stat| stat.state) {
            Ok(b'T') => return true,
            Ok(b'R' | b't') if ran_ns() < begin + RAN_NS && Instant::now() < deadline => {
                std::thread::yield_now();
            }
            _ => return false,
        }
    }
}

/// Gives the threads of a process that nobody traces any more their masks back, if who lifted its fence died over
/// it: such a thread blocks all signals. It stays stopped if it is.
///
/// # Errors
/// The first thread's for which it failed; the others are done all the same.
pub fn restore_masks(masks: &[(Tid, u64)]) -> Result<(), InjectError> {
    let left = |tid: Tid| {
        let status = procfs::read(format!("/proc/{tid}/status")).unwrap_or_default();
        procfs::parse_status(&status).is_ok_and(|s| s.blocked == EVERYTHING)
    };
    let mut result = Ok(());
    for &(tid, mask) in masks {
        if mask != EVERYTHING && left(tid) {
            result = result.and(restore_mask(tid, mask));
        }
    }
    result
}

/// What a thread blocks that was told to block everything.
const EVERYTHING: u64 = !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1));

fn restore_mask(tid: Tid, mask: u64) -> Result<(), InjectError> {
    let step = |step| move |errno| sys(step, tid, errno);
    ptrace::seize(tid, 0).map_err(step("seizing"))?;
    ptrace::interrupt(tid).map_err(step("interrupting"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ptrace::poll(tid).map_err(step("waiting"))? {
            Some((Stop::Event(_), _)) => break,
            Some((Stop::Gone, _)) => return Err(InjectError::Gone(tid)),
            Some((Stop::Signal(signal), _)) => ptrace::cont(tid, signal).map_err(step("going on"))?,
            Some(_) => ptrace::cont(tid, 0).map_err(step("going on"))?,
            None if Instant::now() > deadline => return Err(step("waiting")(Errno::ETIMEDOUT)),
            None => std::thread::yield_now(),
        }
    }
    ptrace::set_sigmask(tid, mask).map_err(step("restoring the mask"))?;
    ptrace::detach(tid, 0).map_err(step("letting go"))
}

/// Lets the thread run into the delivery of our SIGSTOP, if that still waits for it; what it had before.
fn start(tid: Tid) -> Result<Option<(ptrace::Regs, u64)>, InjectError> {
    let step = |step| move |errno| sys(step, tid, errno);
    if !our_stop_waits(tid)? {
        return Ok(None);
    }
    let regs = ptrace::regs(tid).map_err(step("reading registers"))?;
    let mask = ptrace::sigmask(tid).map_err(step("reading the mask"))?;
    ptrace::set_sigmask(tid, u64::MAX).map_err(step("blocking signals"))?;
    ptrace::cont(tid, 0).map_err(step("lifting the fence"))?;
    Ok(Some((regs, mask)))
}

fn our_stop_waits(tid: Tid) -> Result<bool, InjectError> {
    let entries = Queue::Thread(tid).entries(tid)?;
    if entries.iter().any(|info| is_ours(info)) {
        return Ok(true);
    }
    // Beyond RLIMIT_SIGPENDING the kernel keeps the signal, and not who has sent it.
    let nameless = !entries.iter().any(|info| signal_of(info) == Some(libc::SIGSTOP));
    let status = procfs::read(format!("/proc/{tid}/status")).unwrap_or_default();
    let stop = procfs::parse_status(&status).is_ok_and(|s| s.pending & signal_bit(libc::SIGSTOP) != 0);
    Ok(nameless && stop)
}

/// Waits until the thread stands in the delivery of SIGSTOP, or has reported that SIGCONT took it away.
fn arrive(tid: Tid, deadline: Instant) -> Result<(), InjectError> {
    let step = |errno| sys("lifting the fence", tid, errno);
    loop {
        match ptrace::poll(tid).map_err(step)? {
            Some((Stop::Signal(libc::SIGSTOP), _)) => return Ok(()),
            Some((Stop::Gone, _)) => return Err(InjectError::Gone(tid)),
            Some((Stop::Event(_), _)) if our_stop_waits(tid)? => ptrace::cont(tid, 0).map_err(step)?,
            Some((Stop::Event(_), _)) => return Ok(()),
            Some((_, status)) => return Err(InjectError::UnexpectedStop { tid, status }),
            None if Instant::now() > deadline => return Err(step(Errno::ETIMEDOUT)),
            None => std::thread::yield_now(),
        }
    }
}
