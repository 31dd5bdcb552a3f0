//! Stops a process from outside and lets it go again, as it was.
//!
//! A freeze seizes every thread, interrupts it and waits for it, and lists the threads again until a
//! listing finds no new one: then nobody is left who could start another. If we die, the kernel lets
//! all of them go, and injected code finds its own way back (see `inject`); the source's tracees are
//! never bound to our life.

use std::collections::HashMap;
use std::fs::File;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::fence::{Fence, Queue};
use super::inject::{CodeRoom, Injector, StoppedThread, choose_doorbell, io, signal_bit, sys};
use super::late::Seen;
use super::procfs;
use super::regs;
use super::remote::{Batch, InjectError, Outcome, RemoteCalls, Tid};
use super::rseq;
use super::sleep::{self, SleepBook};
use super::sys::ptrace::{self, Stop};
use super::undertaker;
use super::vdso;
use crate::proto::control::LateSignal;

/// Why a process could not be stopped.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// A thread did not stop in time: it sits in an uninterruptible wait (vfork, a dead disk).
    #[error("thread {tid} did not stop within {waited:?}")]
    Stuck {
        /// The thread.
        tid: Tid,
        /// For how long we waited.
        waited: Duration,
    },
    /// Somebody else traces it.
    #[error("thread {0} is traced by another process or may not be traced")]
    NotTraceable(Tid),
    /// A thread runs 32-bit code.
    #[error("thread {0} runs 32-bit code")]
    ThirtyTwoBit(Tid),
    /// Any other step.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// /proc could not be read.
    #[error("reading /proc/{pid}/{what}")]
    Proc {
        /// The process.
        pid: Tid,
        /// Which file.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A process with all its threads stopped. Dropping it lets the process run on.
#[derive(Debug)]
pub struct Frozen {
    pid: Tid,
    threads: Vec<StoppedThread>,
    injection: Option<(Injector, CodeRoom)>,
    /// The process was in a group stop (SIGSTOP) already, or came into one while we stopped it.
    pub group_stopped: bool,
    stop_seen: bool,
    left_rseq: bool,
    /// Until when threads wait whose calls our stop has ended, on the monotonic clock.
    waits: HashMap<Tid, u64>,
    fence: Option<Fence>,
    over: bool,
}

/// The ids of a process's threads, in the order of the kernel's list (leader first).
pub fn thread_ids(pid: Tid) -> std::io::Result<Vec<Tid>> {
    let mut tids = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        if let Some(tid) = entry?.file_name().to_str().and_then(|s| s.parse().ok()) {
            tids.push(tid);
        }
    }
    Ok(tids)
}

impl Frozen {
    /// Stops all threads of `pid`, within `patience`. On an error everything stopped so far runs on.
    ///
    /// # Errors
    /// See [`FreezeError`].
    pub fn freeze(pid: Tid, patience: Duration) -> Result<Self, FreezeError> {
        let deadline = Instant::now() + patience;
        let group_stopped = in_group_stop(pid);
        let mut frozen = Self {
            pid,
            threads: Vec::new(),
            injection: None,
            group_stopped,
            stop_seen: false,
            left_rseq: false,
            waits: HashMap::new(),
            fence: None,
            over: false,
        };
        loop {
            let tids = thread_ids(pid).map_err(|source| FreezeError::Proc { pid, what: "task", source })?;
            let fresh: Vec<Tid> =
                tids.into_iter().filter(|t| !frozen.threads.iter().any(|s| s.tid == *t)).collect();
            if fresh.is_empty() {
                break;
            }
            // On an early return, `frozen` lets go of what it holds; what is only seized goes by this.
            let mut seized = Seized(Vec::with_capacity(fresh.len()));
            for tid in fresh {
                match ptrace::seize(tid, ptrace::MARK_CALLS) {
                    Ok(()) => seized.0.push(tid),
                    Err(Errno::ESRCH) => {}
                    Err(Errno::EPERM) if is_gone(pid, tid) => {}
                    Err(Errno::EPERM) => return Err(FreezeError::NotTraceable(tid)),
                    Err(errno) => return Err(sys("seizing", tid, errno).into()),
                }
            }
            if !group_stopped {
                for &tid in &seized.0 {
                    match ptrace::interrupt(tid) {
                        Ok(()) | Err(Errno::ESRCH) => {}
                        Err(errno) => return Err(sys("interrupting", tid, errno).into()),
                    }
                }
            }
            while let Some(&tid) = seized.0.last() {
                if let Some(signal) = wait_for_stop(tid, deadline, patience)? {
                    // A SIGSTOP that was on its way: the last to stop know of it.
                    frozen.group_stopped |= signal != libc::SIGTRAP;
                    let thread = StoppedThread::take(tid)?;
                    if regs::is_32_bit(&thread.regs) {
                        return Err(FreezeError::ThirtyTwoBit(tid));
                    }
                    frozen.threads.push(thread);
                }
                seized.0.pop();
            }
        }
        if frozen.threads.is_empty() {
            return Err(InjectError::Gone(pid).into());
        }
        frozen.threads.sort_by_key(|t| (t.tid != pid, t.tid));
        Ok(frozen)
    }

    /// The stopped threads, leader first, with their registers as the freeze found them.
    pub fn threads(&self) -> &[StoppedThread] {
        &self.threads
    }

    /// The same, to correct registers before capture and thaw (a call ended by our stop, an rseq section).
    pub fn threads_mut(&mut self) -> &mut [StoppedThread] {
        &mut self.threads
    }

    /// Has the waits go on with what is left of them where the process goes on here.
    pub fn remember_waits(&mut self, sleeps: &SleepBook) {
        self.waits = sleeps.waits();
    }

    /// Takes all threads out of restartable sequences, once. Injection does so by itself; registers that
    /// are read before it are right after this only.
    ///
    /// # Errors
    /// If memory or registers of a thread cannot be reached.
    pub fn leave_rseq_sections(&mut self) -> Result<(), InjectError> {
        if !self.left_rseq {
            let mem = self.open_memory()?;
            self.threads.iter_mut().try_for_each(|thread| rseq::leave_section(thread, &mem))?;
            self.left_rseq = true;
        }
        Ok(())
    }

    fn open_memory(&self) -> Result<File, InjectError> {
        File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{}/mem", self.pid))
            .map_err(|e| io("opening its memory", self.pid, &e))
    }

    /// Whether the process was stopped when we came, or a SIGSTOP for it has come by while we held it.
    pub fn is_to_stop(&self) -> bool {
        let seen = self.injection.as_ref().is_some_and(|(injector, _)| injector.stop_seen);
        self.group_stopped || self.stop_seen || seen
    }

    /// Puts everything injected away; the process stays stopped.
    pub fn close_injection(&mut self) -> Result<(), InjectError> {
        let Some((mut injector, room)) = self.injection.take() else { return Ok(()) };
        let leader = self.threads.first_mut().ok_or(InjectError::Gone(self.pid))?;
        injector.shut(leader)?;
        self.stop_seen |= injector.stop_seen;
        injector.erase(room)
    }

    /// Whether the process would stand still by itself if it were let go now: stopped before we came, or by
    /// a stop that has come since, and no SIGCONT after that.
    ///
    /// # Errors
    /// If it is gone.
    pub fn stop_is_due(&self) -> Result<bool, InjectError> {
        let pending = self.queues().try_fold(0, |set, queue| Ok(set | queue.signals(self.pid)?))?;
        let stop = self.is_to_stop() || pending & signal_bit(libc::SIGSTOP) != 0;
        // A stop takes SIGCONT out of the queues: one that waits has come after it.
        Ok(stop && pending & signal_bit(libc::SIGCONT) == 0)
    }

    /// What was sent to the process since it was captured.
    ///
    /// # Errors
    /// If it is gone.
    pub fn late_signals(&self, seen: &Seen) -> Result<Vec<LateSignal>, InjectError> {
        let continued = self.fence.as_ref().map_or(&[][..], Fence::continued);
        let now = self.queues().map(|queue| Ok((queue.number(), queue.entries(self.pid)?)));
        Ok(seen.since(continued, now.collect::<Result<_, InjectError>>()?))
    }

    fn queues(&self) -> impl Iterator<Item = Queue> {
        std::iter::once(Queue::Process).chain(self.threads.iter().map(|t| Queue::Thread(t.tid)))
    }

    fn tids(&self) -> Vec<Tid> {
        self.threads.iter().map(|t| t.tid).collect()
    }

    /// From here on the process must not run even if we die (see [`super::fence`]), until
    /// [`Frozen::lift_fence`].
    ///
    /// # Errors
    /// If it is gone.
    pub fn fence(&mut self) -> Result<(), InjectError> {
        // A thread in injected code would take the fence's stop for somebody else's.
        self.close_injection()?;
        self.fence = Some(Fence::raise(self.pid, &self.tids())?);
        Ok(())
    }

    /// Takes the fence down again. The process stays stopped.
    ///
    /// # Errors
    /// If it is gone.
    pub fn lift_fence(&mut self) -> Result<(), InjectError> {
        self.fence.take().map_or(Ok(()), |fence| fence.lift(self.pid, &self.tids()))
    }

    /// Lets the process run on as it was.
    ///
    /// # Errors
    /// If it is gone. Whatever can be let go has been let go all the same.
    pub fn thaw(mut self) -> Result<(), InjectError> {
        self.let_go()
    }

    /// Leaves the process stopped by its fence, in everything else as it was.
    pub fn leave_held(mut self) {
        // Once more: a SIGCONT may have come. What this one removes, who resolves the migration sends again.
        if let Err(error) = Fence::raise(self.pid, &self.tids()) {
            tracing::error!(pid = self.pid, %error, "fencing a process that stays held");
        }
        self.fence = None;
        // It is in the journal.
        self.stop_seen = false;
        if let Err(error) = self.let_go() {
            tracing::error!(pid = self.pid, %error, "letting go of a held process");
        }
    }

    /// Kills the process; the threads are reaped so that its parent can be told.
    pub fn kill(mut self) {
        self.over = true;
        let threads: Vec<Tid> = self.threads.iter().map(|thread| thread.tid).collect();
        undertaker::end(self.pid, &threads);
    }

    fn let_go(&mut self) -> Result<(), InjectError> {
        if self.over {
            return Ok(());
        }
        self.over = true;
        let mut result = self.lift_fence().and(self.close_injection());
        // One that our injected code has run into. It would take a later SIGCONT out of the queues.
        if self.stop_seen && self.stop_is_due().unwrap_or(true) {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGSTOP);
        }
        for thread in &mut self.threads {
            let own = thread.put_back();
            // A call that only our stop has ended is issued again.
            let mut r = thread.regs;
            let rewound = if regs::ended_by_stop(&r) && !signal_is_due(self.pid, thread.tid, thread.mask) {
                regs::rewind_call(&mut r);
                if let Some(until) = self.waits.get(&thread.tid) {
                    regs::shorten_wait(&mut r, sleep::milliseconds_to(*until).max(1));
                }
                ptrace::set_regs(thread.tid, &r).map_err(|e| sys("restoring registers", thread.tid, e))
            } else {
                Ok(())
            };
            let gone = ptrace::detach(thread.tid, 0).map_err(|e| sys("letting go", thread.tid, e));
            result = result.and(own).and(rewound).and(gone);
        }
        result
    }

    /// What each thread blocks, `(TID, kernel sigset)`.
    pub fn masks(&self) -> Vec<(Tid, u64)> {
        self.threads.iter().map(|thread| (thread.tid, thread.mask)).collect()
    }

    /// For tests that play the destination inside a frozen process.
    #[cfg(test)]
    pub(super) fn parts(&mut self) -> Option<(&mut Injector, &mut [StoppedThread])> {
        self.inject().ok()?;
        let (injector, _) = self.injection.as_mut()?;
        Some((injector, &mut self.threads))
    }

    /// Makes room for injected calls, once.
    fn inject(&mut self) -> Result<(), InjectError> {
        if self.injection.is_some() {
            return Ok(());
        }
        let pid = self.pid;
        self.leave_rseq_sections()?;
        let mem = self.open_memory()?;
        let room = vdso::tail(pid, &mem)?;
        let (caught, ignored, pending) = signal_sets(pid, &self.threads)?;
        let signal = choose_doorbell(caught, ignored, pending);
        let mut injector = Injector::place(pid, mem, room, signal)?;
        let leader = self.threads.first_mut().ok_or(InjectError::Gone(pid))?;
        injector.boot(leader)?;
        self.injection = Some((injector, room));
        Ok(())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if !self.over {
            tracing::warn!(pid = self.pid, "letting a frozen process go on an error path");
            if let Err(error) = self.let_go() {
                tracing::error!(pid = self.pid, %error, "could not let the process go as it was");
            }
        }
    }
}

impl RemoteCalls for Frozen {
    fn pid(&self) -> Tid {
        self.pid
    }

    fn run(&mut self, batch: &Batch) -> Result<Outcome, InjectError> {
        self.inject()?;
        let (Some((injector, _)), Some(leader)) = (self.injection.as_mut(), self.threads.first_mut()) else {
            return Err(InjectError::Gone(self.pid));
        };
        injector.run(leader, batch)
    }

    fn run_in_threads(&mut self, batches: &[(Tid, Batch)]) -> Result<Vec<Outcome>, InjectError> {
        self.inject()?;
        let pid = self.pid;
        let Some((injector, _)) = self.injection.as_mut() else { return Err(InjectError::Gone(pid)) };
        run_in(injector, &mut self.threads, batches, pid)
    }
}

/// Runs each batch in its thread; the leader, parked in injected code, takes its own turn.
pub(super) fn run_in(
    injector: &mut Injector,
    threads: &mut [StoppedThread],
    batches: &[(Tid, Batch)],
    pid: Tid,
) -> Result<Vec<Outcome>, InjectError> {
    let mut outcomes: Vec<Option<Outcome>> = vec![None; batches.len()];
    let mut by_tid: HashMap<Tid, &mut StoppedThread> = threads.iter_mut().map(|t| (t.tid, t)).collect();
    let mut work = Vec::with_capacity(batches.len());
    let mut places = Vec::with_capacity(batches.len());
    for (i, (tid, batch)) in batches.iter().enumerate() {
        let thread = by_tid.remove(tid).ok_or(InjectError::Gone(*tid))?;
        if *tid == pid {
            outcomes[i] = Some(injector.run(thread, batch)?);
        } else {
            work.push((thread, batch));
            places.push(i);
        }
    }
    for (place, outcome) in places.into_iter().zip(injector.run_many(&mut work, 1)?) {
        outcomes[place] = Some(outcome);
    }
    Ok(outcomes.into_iter().map(Option::unwrap_or_default).collect())
}

/// Seized, not yet stopped: let go on an early return (a running tracee must be stopped to be detached).
pub(super) struct Seized(pub(super) Vec<Tid>);

/// How long all of them together may take to stop.
const LET_GO: Duration = Duration::from_secs(1);
/// And each of them at least.
const LEAST: Duration = Duration::from_millis(20);

impl Drop for Seized {
    fn drop(&mut self) {
        for &tid in &self.0 {
            let _ = ptrace::interrupt(tid);
        }
        let deadline = Instant::now() + LET_GO;
        for &tid in &self.0 {
            // One that does not stop takes nothing from those that do.
            match wait_for_stop(tid, deadline.max(Instant::now() + LEAST), LET_GO) {
                Ok(Some(_)) => drop(ptrace::detach(tid, 0)),
                Ok(None) => {}
                // It will be let go when this thread of ours ends.
                Err(_) => tracing::warn!(tid, "a thread that does not stop stays traced until we exit"),
            }
        }
    }
}

/// Waits until an interrupted thread has stopped: by SIGTRAP, or by the signal of a stop of the whole
/// process. `None` if it is gone.
pub(super) fn wait_for_stop(
    tid: Tid,
    deadline: Instant,
    patience: Duration,
) -> Result<Option<i32>, FreezeError> {
    let mut tries = 0u32;
    loop {
        match ptrace::poll(tid).map_err(|e| FreezeError::Inject(sys("waiting", tid, e)))? {
            Some((Stop::Event(signal), _)) => return Ok(Some(signal)),
            Some((Stop::Gone, _)) => return Ok(None),
            // A signal was on its way: deliver it; the stop that we asked for comes before user mode.
            Some((Stop::Signal(signal), _)) => {
                ptrace::cont(tid, signal).map_err(|e| FreezeError::Inject(sys("going on", tid, e)))?;
            }
            Some((Stop::Call | Stop::Other(_), _)) => {
                ptrace::cont(tid, 0).map_err(|e| FreezeError::Inject(sys("going on", tid, e)))?;
            }
            None if Instant::now() > deadline => return Err(FreezeError::Stuck { tid, waited: patience }),
            None if tries < 50 => std::thread::yield_now(),
            None => std::thread::sleep(Duration::from_micros(50)),
        }
        tries += 1;
    }
}

fn is_gone(pid: Tid, tid: Tid) -> bool {
    let stat = procfs::read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
    procfs::parse_stat(&stat).map_or(true, |s| matches!(s.state, b'Z' | b'X'))
}

fn in_group_stop(pid: Tid) -> bool {
    let stat = procfs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    procfs::parse_stat(&stat).is_ok_and(|s| s.state == b'T')
}

/// Caught and ignored signals of a process, and those that are pending for it or any of its threads.
fn signal_sets(pid: Tid, threads: &[StoppedThread]) -> Result<(u64, u64, u64), InjectError> {
    let (mut caught, mut ignored, mut pending) = (0, 0, 0);
    for thread in threads {
        let text = procfs::read(format!("/proc/{pid}/task/{}/status", thread.tid))
            .map_err(|e| io("reading its status", thread.tid, &e))?;
        let status =
            procfs::parse_status(&text).map_err(|_| sys("reading its status", thread.tid, Errno::EINVAL))?;
        (caught, ignored) = (status.caught, status.ignored);
        pending |= status.pending | status.shared_pending;
    }
    Ok((caught, ignored, pending))
}

/// Whether a signal waits that the thread does not block.
pub fn signal_is_due(pid: Tid, tid: Tid, mask: u64) -> bool {
    let path = format!("/proc/{pid}/task/{tid}/status");
    let text = procfs::read_text(path).unwrap_or_default();
    text.lines()
        .filter_map(|l| l.strip_prefix("SigPnd:").or_else(|| l.strip_prefix("ShdPnd:")))
        .filter_map(|v| u64::from_str_radix(v.trim(), 16).ok())
        .any(|set| set & !mask != 0)
}
