//! The process at the destination, from an empty shell to the first instruction.
//!
//! A skeleton is made with its final PID at the beginning of a migration, and is under ptrace all along,
//! bound to our life (`PTRACE_O_EXITKILL`) until it is let run. It executes a tiny ELF file that we build
//! in memory: the injected code (`sys::blob`), its lanes and its area, at an address where the source has
//! nothing. Everything else is unmapped; then the memory map of the source is reconciled into it, round
//! by round, and its pages are written from outside.

mod reserve;

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::fence::Fence;
use super::freeze::run_in;
use super::inject::{Injector, StoppedThread, sys};
use super::late;
use super::memory::{Memory, MemoryError, PAGE_BYTES};
use super::regs;
use super::remote::{Batch, InjectError, Outcome, RemoteCalls, Tid};
use super::state::objects::{ObjectError, Objects};
use super::state::{keys, mm};
use super::sys::clone;
use super::sys::ptrace::{self, Stop};
use super::undertaker::Undertaker;
use crate::proto::control::LateSignal;
use crate::proto::image::Layout;

pub use reserve::ReservedPid;
use reserve::{STUB_BYTES, TASK_END};

/// Why a skeleton could not be made or built up.
#[derive(Debug, thiserror::Error)]
pub enum SkeletonError {
    /// The PID or a thread id is in use here.
    #[error("PID {0} is in use here")]
    PidInUse(Tid),
    /// clone3 refused.
    #[error("starting a process with PID {pid}")]
    Clone {
        /// The wanted PID.
        pid: Tid,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A pipe, socket or memory file of ours could not be made.
    #[error("making {what} for the skeleton")]
    Own {
        /// What.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The source's memory map leaves no place for the injected code.
    #[error("the memory map of process {0} leaves no room below it")]
    NoHole(Tid),
    /// It could not be driven.
    #[error("driving the skeleton")]
    Inject(#[from] InjectError),
    /// Its memory could not be reached.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Shared memory could not be made.
    #[error("making shared memory")]
    Objects(#[from] ObjectError),
    /// The final state of a thread is not valid here.
    #[error("the {what} of thread {tid} cannot be set here")]
    Registers {
        /// The thread.
        tid: Tid,
        /// Which part.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
}

/// Kills a child of ours and waits until it is gone; threads first, then the leader.
fn kill_and_reap(pid: Tid, threads: &[StoppedThread]) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    for tid in threads.iter().map(|t| t.tid).filter(|t| *t != pid).chain([pid]) {
        while let Ok((stop, _)) = ptrace::wait(tid) {
            if stop == Stop::Gone {
                break;
            }
        }
    }
}

/// Descriptors that there is room for from the beginning, at most.
const MAX_ROOM: u32 = 1 << 20;

/// A process that is being built, stopped, bound to our life. Dropping it kills it.
#[derive(Debug)]
pub struct Skeleton {
    pid: Tid,
    base: u64,
    injector: Injector,
    threads: Vec<StoppedThread>,
    memory: Memory,
    layout: Layout,
    objects: Objects,
    channel: OwnedFd,
    channel_in_process: i32,
    fence: Option<Fence>,
    over: bool,
    _undertaker: Undertaker,
}

impl Skeleton {
    /// Makes the table of descriptors as large as it will be. Once there are threads that share it, each time that it
    /// grows they wait until all processors have passed a quiet state (`expand_fdtable` in fs/file.c, Linux 6.18):
    /// 20 ms of downtime.
    fn make_room(&mut self, highest_fd: u32) -> Result<(), SkeletonError> {
        let highest = highest_fd.min(MAX_ROOM);
        let mut batch = Batch::new();
        let args = [self.channel_in_process.into(), libc::F_DUPFD.into(), highest.into()];
        let made = batch.call(libc::SYS_fcntl, &args);
        let outcome = self.run(&batch)?;
        // Beyond its limit there is no room to be made: it takes longer then, or fails by name.
        if let Ok(number) = outcome.ret(made) {
            let mut batch = Batch::new();
            batch.call(libc::SYS_close, &[number.into()]);
            self.run_all_ok("closing a descriptor", &batch)?;
        }
        Ok(())
    }

    /// Unmaps what the kernel gave it, and gives up what it inherited: descriptors, keys.
    fn clear(&mut self) -> Result<(), SkeletonError> {
        let keep = u64::try_from(self.channel_in_process).unwrap_or(3);
        let end = self.base + STUB_BYTES;
        let mut batch = Batch::new();
        let lowest = PAGE_BYTES;
        batch.call(libc::SYS_munmap, &[lowest.into(), (self.base - lowest).into()]);
        batch.call(libc::SYS_munmap, &[end.into(), (TASK_END - end).into()]);
        batch.call(libc::SYS_close_range, &[0u64.into(), (keep - 1).into(), 0u64.into()]);
        batch.call(libc::SYS_close_range, &[(keep + 1).into(), u32::MAX.into(), 0u64.into()]);
        // It was to die with the thread that made it, up to its exec.
        batch.call(libc::SYS_prctl, &[libc::PR_SET_PDEATHSIG.into(), 0u64.into()]);
        self.run_all_ok("emptying the skeleton", &batch)?;
        Ok(keys::leave_ours(self)?)
    }

    /// The channel over which descriptors are passed in: its number in the process, and our end.
    pub fn channel(&self) -> Result<(i32, OwnedFd), SkeletonError> {
        let ours = self.channel.try_clone();
        let ours = ours.map_err(|_| SkeletonError::Own { what: "a descriptor", errno: Errno::EMFILE })?;
        Ok((self.channel_in_process, ours))
    }

    /// Its memory, for placing pages.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The map it has now.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The shared memory it has.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Gives its shared memory owners, times and seals, once all contents and mappings are there.
    ///
    /// # Errors
    /// See [`ObjectError`].
    pub fn finish_objects(&mut self) -> Result<(), ObjectError> {
        let objects = std::mem::take(&mut self.objects);
        let finished = objects.finish(self);
        self.objects = objects;
        finished
    }

    /// Brings its memory map and its threads to what the source has now.
    ///
    /// # Errors
    /// See [`SkeletonError`]; it is then of no use.
    pub fn reconcile(&mut self, wanted: Layout) -> Result<(), SkeletonError> {
        let now = std::mem::take(&mut self.layout);
        // Borrowed apart from the process, and put back whatever happens: they are removed when it fails.
        let mut objects = std::mem::take(&mut self.objects);
        let made = objects
            .forget(&wanted.objects, || mm::unmap(self, &now, &wanted))
            .and_then(|()| objects.reconcile(self, &wanted.objects))
            .map_err(SkeletonError::from);
        let mapped = made.and_then(|()| Ok(mm::reconcile(self, &now, &wanted, &objects)?));
        self.objects = objects;
        mapped?;
        self.reconcile_threads(&wanted.tids)?;
        self.layout = wanted;
        Ok(())
    }

    fn reconcile_threads(&mut self, wanted: &[u32]) -> Result<(), SkeletonError> {
        let wanted: Vec<Tid> = wanted.iter().filter_map(|t| Tid::try_from(*t).ok()).collect();
        let have = |threads: &[StoppedThread], tid| threads.iter().any(|t| t.tid == tid);
        let surplus: Vec<Tid> =
            self.threads.iter().map(|t| t.tid).filter(|t| *t != self.pid && !wanted.contains(t)).collect();
        for tid in surplus {
            self.end_thread(tid)?;
        }
        let missing: Vec<Tid> = wanted.into_iter().filter(|t| !have(&self.threads, *t)).collect();
        // As many per batch as its data has room for.
        for group in missing.chunks(512) {
            let mut batch = Batch::new();
            for &tid in group {
                let set_tid = batch.input(&tid.to_ne_bytes());
                let args = batch.input(&clone::thread_clone_args());
                batch.pointer_to(args, clone::SET_TID_OFFSET, set_tid);
                batch.call(libc::SYS_clone3, &[args, clone::CLONE_ARGS_BYTES.into()]);
            }
            let outcome = self.run(&batch)?;
            // First take in all that were born, so that none is left behind on an error.
            let mut failed = None;
            for (i, &tid) in group.iter().enumerate() {
                match outcome.ret(i) {
                    Ok(_) => self.adopt(tid)?,
                    Err(errno) => failed = failed.or(Some((tid, errno))),
                }
            }
            match failed {
                None => {}
                Some((tid, Errno::EEXIST)) => return Err(SkeletonError::PidInUse(tid)),
                Some((pid, errno)) => return Err(SkeletonError::Clone { pid, errno }),
            }
        }
        Ok(())
    }

    /// A new thread, traced from birth: it reports before its first instruction.
    fn adopt(&mut self, tid: Tid) -> Result<(), SkeletonError> {
        match ptrace::wait(tid).map_err(|e| sys("waiting for a new thread", tid, e))? {
            (Stop::Event(_), _) => {}
            (Stop::Gone, _) => return Err(InjectError::Gone(tid).into()),
            (_, status) => return Err(InjectError::UnexpectedStop { tid, status }.into()),
        }
        ptrace::set_options(tid, libc::PTRACE_O_EXITKILL).map_err(|e| sys("binding a thread", tid, e))?;
        self.threads.push(StoppedThread::take(tid)?);
        Ok(())
    }

    /// Makes a thread exit that the source no longer has.
    fn end_thread(&mut self, tid: Tid) -> Result<(), SkeletonError> {
        let Some(at) = self.threads.iter().position(|t| t.tid == tid) else { return Ok(()) };
        let thread = self.threads.remove(at);
        let mut r = thread.regs;
        // The boot entry runs one call from registers.
        r.rip = self.base;
        r.rax = regs::unsigned(libc::SYS_exit);
        r.rdi = 0;
        r.orig_rax = u64::MAX;
        ptrace::set_regs(tid, &r).map_err(|e| sys("ending a thread", tid, e))?;
        ptrace::cont(tid, 0).map_err(|e| sys("ending a thread", tid, e))?;
        loop {
            match ptrace::wait(tid).map_err(|e| sys("ending a thread", tid, e))? {
                (Stop::Gone, _) => return Ok(()),
                _ => ptrace::cont(tid, 0).map_err(|e| sys("ending a thread", tid, e))?,
            }
        }
    }

    /// The doorbell from now on; it must be none of the signals that are pending at the end.
    pub fn set_doorbell(&mut self, signal: i32) {
        self.injector.set_signal(signal);
    }

    /// The injector and the threads, leader first, for what is done to one thread at a time.
    pub(super) fn parts(&mut self) -> (&mut Injector, &mut [StoppedThread]) {
        (&mut self.injector, &mut self.threads)
    }

    /// Ids of its threads.
    pub fn tids(&self) -> Vec<Tid> {
        self.threads.iter().map(|t| t.tid).collect()
    }

    /// Removes our code and area: the last call, from the process's own vdso.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn remove_stub(&mut self) -> Result<(), SkeletonError> {
        let pid = self.pid;
        let (start, end) = mm::vdso_group(&self.layout)
            .ok_or(InjectError::NoRoom { tid: pid, why: "the process has no vdso" })?;
        let syscall = self.find_syscall(start, end)?;
        let leader = self.threads.first().ok_or(InjectError::Gone(pid))?;
        let mut r = leader.regs;
        r.rip = syscall;
        r.rax = regs::unsigned(libc::SYS_munmap);
        r.rdi = self.base;
        r.rsi = STUB_BYTES;
        r.orig_rax = u64::MAX;
        ptrace::set_regs(pid, &r).map_err(|e| sys("removing the stub", pid, e))?;
        ptrace::set_sigmask(pid, u64::MAX).map_err(|e| sys("blocking signals", pid, e))?;
        ptrace::single_step(pid).map_err(|e| sys("removing the stub", pid, e))?;
        match ptrace::wait(pid).map_err(|e| sys("removing the stub", pid, e))? {
            (Stop::Signal(libc::SIGTRAP), _) => {}
            (Stop::Gone, _) => return Err(InjectError::Gone(pid).into()),
            (_, status) => return Err(InjectError::UnexpectedStop { tid: pid, status }.into()),
        }
        let after = ptrace::regs(pid).map_err(|e| sys("removing the stub", pid, e))?;
        match regs::signed(after.rax) {
            0 => Ok(()),
            e => Err(sys("unmapping the stub", pid, Errno::from_raw(i32::try_from(-e).unwrap_or(0))).into()),
        }
    }

    /// A `syscall` instruction in the vdso (the fallback of its functions).
    fn find_syscall(&self, start: u64, end: u64) -> Result<u64, SkeletonError> {
        let mut page = vec![0u8; usize::try_from(PAGE_BYTES).unwrap_or(0)];
        // The group begins with data pages that cannot be read; the code is at its end.
        let mut at = end;
        while at > start {
            at -= PAGE_BYTES;
            if self.memory.read_exact(at, &mut page).is_err() {
                break;
            }
            if let Some(i) = page.windows(2).position(|w| w == [0x0f, 0x05]) {
                return Ok(at + i as u64);
            }
        }
        Err(InjectError::NoRoom { tid: self.pid, why: "its vdso has no system call" }.into())
    }

    /// From here on the process outlives us: the right to run it has been accepted. The leader is last,
    /// its one call is the moment of acceptance. If we die now, it stays stopped by a fence until
    /// [`Skeleton::resume`].
    ///
    /// # Errors
    /// If the process is gone.
    pub fn accept(&mut self) -> Result<(), SkeletonError> {
        self.fence = Some(Fence::raise(self.pid, &self.tids())?);
        for thread in self.threads.iter().rev() {
            ptrace::set_options(thread.tid, 0).map_err(|e| sys("accepting", thread.tid, e))?;
        }
        self.over = true;
        self.objects.keep();
        Ok(())
    }

    /// Lets all threads run, or leaves them stopped if they came so, with the signals that came late. Call
    /// [`Skeleton::accept`] first.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn resume(mut self, stopped: bool, late: &[LateSignal]) -> Result<(), SkeletonError> {
        let tids = self.tids();
        if stopped {
            kill(Pid::from_raw(self.pid), Signal::SIGSTOP).map_err(|e| sys("stopping", self.pid, e))?;
        }
        let lifted = self.fence.take().map_or(Ok(()), |fence| fence.lift(self.pid, &tids));
        let mut result = lifted.map_err(Into::into);
        late::send(self.pid, &tids, late);
        for thread in self.threads.iter().rev() {
            let gone = ptrace::detach(thread.tid, 0).map_err(|e| sys("resuming", thread.tid, e).into());
            result = result.and(gone);
        }
        result
    }
}

impl RemoteCalls for Skeleton {
    fn pid(&self) -> Tid {
        self.pid
    }

    fn run(&mut self, batch: &Batch) -> Result<Outcome, InjectError> {
        let leader = self.threads.first_mut().ok_or(InjectError::Gone(self.pid))?;
        self.injector.run(leader, batch)
    }

    fn run_in_threads(&mut self, batches: &[(Tid, Batch)]) -> Result<Vec<Outcome>, InjectError> {
        run_in(&mut self.injector, &mut self.threads, batches, self.pid)
    }
}

impl Drop for Skeleton {
    fn drop(&mut self) {
        if !self.over {
            kill_and_reap(self.pid, &self.threads);
        }
    }
}
