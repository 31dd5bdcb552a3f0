//! Stops a process from outside and lets it go again, as it was.
//!
//! A freeze seizes every thread, interrupts it and waits for it, and lists the threads again until a
//! listing finds no new one: then nobody is left who could start another. If we die, the kernel lets
//! all of them go, and injected code finds its own way back (see `inject`); the source's tracees are
//! never bound to our life.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::inject::{CodeRoom, Injector, StoppedThread, choose_doorbell, io, sys};
use super::procfs;
use super::regs;
use super::remote::{Batch, InjectError, Outcome, RemoteCalls, Tid};
use super::rseq;
use super::sys::blob;
use super::sys::ptrace::{self, Stop};

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
    /// The process was in a group stop (SIGSTOP) already.
    pub group_stopped: bool,
    stop_seen: bool,
    left_rseq: bool,
    fenced: bool,
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
            fenced: false,
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
                match ptrace::seize(tid, 0) {
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
                if wait_for_stop(tid, deadline, patience)? {
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

    /// From here on the process must not run even if we die: see [`Frozen::lift_fence`]. SIGSTOP stays
    /// pending while the threads are traced; if the kernel lets go of them because we died, each finds it
    /// (or the group stop) before it reaches user mode.
    pub fn fence(&mut self) -> Result<(), InjectError> {
        kill(Pid::from_raw(self.pid), Signal::SIGSTOP).map_err(|e| sys("fencing", self.pid, e))?;
        self.fenced = true;
        Ok(())
    }

    /// Takes the pending SIGSTOP out again: the leader runs into its delivery, with everything else
    /// blocked, and the signal is dropped there. The process stays stopped.
    pub fn lift_fence(&mut self) -> Result<(), InjectError> {
        if !self.fenced {
            return Ok(());
        }
        let leader = self.threads.first_mut().ok_or(InjectError::Gone(self.pid))?;
        drop_pending_stop(leader.tid)?;
        self.fenced = false;
        Ok(())
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
        self.fenced = false;
        if let Err(error) = self.let_go() {
            tracing::error!(pid = self.pid, %error, "letting go of a held process");
        }
    }

    /// Kills the process; the threads are reaped so that its parent can be told.
    pub fn kill(mut self) {
        self.over = true;
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        // Threads before the leader: it cannot be waited for while traced threads have not been.
        for thread in self.threads.iter().rev() {
            while let Ok((stop, _)) = ptrace::wait(thread.tid) {
                if stop == Stop::Gone {
                    break;
                }
            }
        }
    }

    fn let_go(&mut self) -> Result<(), InjectError> {
        if self.over {
            return Ok(());
        }
        self.over = true;
        let mut result = self.close_injection().and_then(|()| self.lift_fence());
        if self.stop_seen {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGSTOP);
        }
        for thread in &mut self.threads {
            let own = thread.put_back();
            // A call that only our stop has ended is issued again.
            let mut r = thread.regs;
            let rewound = if regs::ended_by_stop(&r) && !signal_is_due(self.pid, thread.tid, thread.mask) {
                regs::rewind_call(&mut r);
                ptrace::set_regs(thread.tid, &r).map_err(|e| sys("restoring registers", thread.tid, e))
            } else {
                Ok(())
            };
            let gone = ptrace::detach(thread.tid, 0).map_err(|e| sys("letting go", thread.tid, e));
            result = result.and(own).and(rewound).and(gone);
        }
        result
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
        let room = vdso_tail(pid, &mem)?;
        let (caught, ignored, pending) = signal_sets(pid, &self.threads)?;
        let signal = choose_doorbell(caught, ignored, pending).ok_or(InjectError::NoRoom {
            tid: pid,
            why: "it handles every signal that could be the doorbell",
        })?;
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

/// Takes a pending SIGSTOP out of a stopped process: the thread runs into its delivery, with everything
/// else blocked, and drops it there. Registers, mask and the restart of an interrupted call stay as they
/// are: in the stop of a delivery the kernel has not yet decided about a restart.
pub(super) fn drop_pending_stop(tid: Tid) -> Result<(), InjectError> {
    let step = |step| move |errno| sys(step, tid, errno);
    let regs = ptrace::regs(tid).map_err(step("reading registers"))?;
    let mask = ptrace::sigmask(tid).map_err(step("reading the mask"))?;
    ptrace::set_sigmask(tid, u64::MAX).map_err(step("blocking signals"))?;
    loop {
        ptrace::cont(tid, 0).map_err(step("lifting the fence"))?;
        match ptrace::wait(tid).map_err(step("lifting the fence"))? {
            (Stop::Signal(libc::SIGSTOP), _) => break,
            (Stop::Gone, _) => return Err(InjectError::Gone(tid)),
            (Stop::Signal(_) | Stop::Event(_), _) => {}
            (Stop::Other(_), status) => return Err(InjectError::UnexpectedStop { tid, status }),
        }
    }
    ptrace::set_regs(tid, &regs).map_err(step("restoring registers"))?;
    ptrace::set_sigmask(tid, mask).map_err(step("restoring the mask"))
}

/// Runs each batch in its thread; the leader, parked in injected code, takes its own turn.
pub(super) fn run_in(
    injector: &mut Injector,
    threads: &mut [StoppedThread],
    batches: &[(Tid, Batch)],
    pid: Tid,
) -> Result<Vec<Outcome>, InjectError> {
    let mut outcomes: Vec<Option<Outcome>> = vec![None; batches.len()];
    let mut by_tid: std::collections::HashMap<Tid, &mut StoppedThread> =
        threads.iter_mut().map(|t| (t.tid, t)).collect();
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
struct Seized(Vec<Tid>);

impl Drop for Seized {
    fn drop(&mut self) {
        for &tid in &self.0 {
            let _ = ptrace::interrupt(tid);
            let deadline = Instant::now() + Duration::from_millis(200);
            if let Ok(true) = wait_for_stop(tid, deadline, Duration::from_millis(200)) {
                let _ = ptrace::detach(tid, 0);
            } else {
                // It will be let go when this thread of ours ends.
                tracing::warn!(tid, "a thread that does not stop stays traced until we exit");
            }
        }
    }
}

/// Waits until an interrupted thread has stopped; false if it is gone.
pub(super) fn wait_for_stop(tid: Tid, deadline: Instant, patience: Duration) -> Result<bool, FreezeError> {
    let mut tries = 0u32;
    loop {
        match ptrace::poll(tid).map_err(|e| FreezeError::Inject(sys("waiting", tid, e)))? {
            Some((Stop::Event(_), _)) => return Ok(true),
            Some((Stop::Gone, _)) => return Ok(false),
            // A signal was on its way: deliver it; the stop that we asked for comes before user mode.
            Some((Stop::Signal(signal), _)) => {
                ptrace::cont(tid, signal).map_err(|e| FreezeError::Inject(sys("going on", tid, e)))?;
            }
            Some((Stop::Other(_), _)) => {
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
    let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
    procfs::parse_stat(&stat).map_or(true, |s| matches!(s.state, b'Z' | b'X'))
}

fn in_group_stop(pid: Tid) -> bool {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    procfs::parse_stat(&stat).is_ok_and(|s| s.state == b'T')
}

/// Caught and ignored signals of a process, and those that are pending for it or any of its threads.
fn signal_sets(pid: Tid, threads: &[StoppedThread]) -> Result<(u64, u64, u64), InjectError> {
    let (mut caught, mut ignored, mut pending) = (0, 0, 0);
    for thread in threads {
        let text = std::fs::read(format!("/proc/{pid}/task/{}/status", thread.tid))
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
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|l| l.strip_prefix("SigPnd:").or_else(|| l.strip_prefix("ShdPnd:")))
        .filter_map(|v| u64::from_str_radix(v.trim(), 16).ok())
        .any(|set| set & !mask != 0)
}

/// The unused end of the vdso: behind its ELF file, up to the end of the page.
fn vdso_tail(pid: Tid, mem: &File) -> Result<CodeRoom, InjectError> {
    const MAX_VDSO_BYTES: u64 = 64 * 1024;
    let no_room = |why| InjectError::NoRoom { tid: pid, why };
    let text = std::fs::read(format!("/proc/{pid}/maps")).map_err(|e| io("reading its maps", pid, &e))?;
    let maps = procfs::parse_maps(&text).map_err(|_| no_room("its memory map cannot be read"))?;
    let vdso = maps.iter().find(|m| m.path == b"[vdso]").ok_or(no_room("it has no vdso"))?;
    let len = vdso.end - vdso.start;
    if len > MAX_VDSO_BYTES {
        return Err(no_room("its vdso is unexpectedly large"));
    }
    let mut image = vec![0u8; usize::try_from(len).unwrap_or(0)];
    mem.read_exact_at(&mut image, vdso.start).map_err(|e| io("reading its vdso", pid, &e))?;
    let used = elf_end(&image).ok_or(no_room("its vdso is not an ELF file"))?.next_multiple_of(16);
    let tail = image.get(used..).unwrap_or_default();
    // A service that was killed in the middle leaves its code there, which nobody will ever run.
    let code = blob::blob().code;
    if !tail.iter().all(|b| *b == 0) && !tail.starts_with(code) {
        return Err(no_room("the end of its vdso is in use"));
    }
    Ok(CodeRoom { start: vdso.start + used as u64, len: tail.len() })
}

/// The end of an ELF file's contents: segments and section table.
fn elf_end(image: &[u8]) -> Option<usize> {
    let word = |at: usize, len: usize| -> Option<u64> {
        let mut bytes = [0u8; 8];
        bytes[..len].copy_from_slice(image.get(at..at + len)?);
        Some(u64::from_le_bytes(bytes))
    };
    if !image.starts_with(b"\x7fELF") {
        return None;
    }
    let mut end = word(40, 8)?.checked_add(word(58, 2)? * word(60, 2)?)?;
    let (table, size, count) = (word(32, 8)?, word(54, 2)?, word(56, 2)?);
    for i in 0..count {
        let at = usize::try_from(table.checked_add(i * size)?).ok()?;
        end = end.max(word(at.checked_add(8)?, 8)?.checked_add(word(at.checked_add(32)?, 8)?)?);
    }
    let end = usize::try_from(end).ok()?;
    (end <= image.len()).then_some(end)
}
