//! The process at the destination, from an empty shell to the first instruction.
//!
//! A skeleton is made with its final PID at the beginning of a migration, and is under ptrace all along,
//! bound to our life (`PTRACE_O_EXITKILL`) until it is let run. It executes a tiny ELF file that we build
//! in memory: the injected code (`sys::blob`), its lanes and its area, at an address where the source has
//! nothing. Everything else is unmapped; then the memory map of the source is reconciled into it, round
//! by round, and its pages are written from outside.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::freeze::{drop_pending_stop, run_in};
use super::inject::{AREA_BYTES, CodeRoom, Injector, StoppedThread, io, sys};
use super::memory::{Memory, MemoryError, PAGE_BYTES};
use super::regs;
use super::remote::{Batch, InjectError, Outcome, RemoteCalls, Tid};
use super::state::mm;
use super::sys::ptrace::{self, Stop};
use super::sys::{blob, clone};
use crate::proto::image::Layout;

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

/// A PID that is ours: a child that waits for its program.
#[derive(Debug)]
pub struct ReservedPid {
    pid: Tid,
    go: Option<OwnedFd>,
    exe: File,
    /// Our end of the channel over which descriptors go in.
    channel: OwnedFd,
    channel_in_process: i32,
    done: bool,
}

/// Lanes for this many threads at the same time.
const LANES: u64 = 64;
/// Lowest address that the stub may have: above any mmap_min_addr.
const LOWEST: u64 = 0x11_0000;
const HIGHEST: u64 = 0x7000_0000_0000;
/// End of user space with four-level page tables.
const TASK_END: u64 = 0x7fff_ffff_f000;

const CODE_BYTES: u64 = {
    let wanted = 512 + LANES * blob::lane::BYTES as u64;
    wanted.next_multiple_of(PAGE_BYTES)
};
const STUB_BYTES: u64 = CODE_BYTES + AREA_BYTES as u64;

impl ReservedPid {
    /// Takes the PID: a child of ours that waits.
    ///
    /// # Errors
    /// See [`SkeletonError`].
    pub fn take(pid: Tid) -> Result<Self, SkeletonError> {
        let own = |what| move |errno| SkeletonError::Own { what, errno };
        let (wait, go) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(own("a pipe"))?;
        let (ours, theirs) = nix::sys::socket::socketpair(
            nix::sys::socket::AddressFamily::Unix,
            nix::sys::socket::SockType::SeqPacket,
            None,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        )
        .map_err(own("a socket pair"))?;
        let exe = nix::sys::memfd::memfd_create(c"migrate-skeleton", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .map_err(own("a memory file"))?;
        // The skeleton opens files at descriptor 0: its channel must be above.
        let theirs = if theirs.as_raw_fd() < 3 {
            nix::fcntl::fcntl(&theirs, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(3))
                .map(|fd| crate::engine::sys::owned_fd(fd))
                .map_err(own("a descriptor"))?
        } else {
            theirs
        };
        clone::spawn_with_pid(pid, exe.as_fd(), wait.as_fd(), theirs.as_fd()).map_err(
            |errno| match errno {
                Errno::EEXIST => SkeletonError::PidInUse(pid),
                errno => SkeletonError::Clone { pid, errno },
            },
        )?;
        let channel_in_process = theirs.as_raw_fd();
        Ok(Self { pid, go: Some(go), exe: File::from(exe), channel: ours, channel_in_process, done: false })
    }

    /// Makes it a skeleton with nothing mapped but our code, at a place that `layout` leaves free. Must be
    /// called on the thread that will drive the skeleton.
    ///
    /// # Errors
    /// See [`SkeletonError`]; the child is then killed.
    pub fn execute(mut self, layout: &Layout) -> Result<Skeleton, SkeletonError> {
        let pid = self.pid;
        let base = hole(layout).ok_or(SkeletonError::NoHole(pid))?;
        let elf = stub_elf(base);
        self.exe.write_all_at(&elf, 0).map_err(|e| io("writing the stub", pid, &e))?;
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACEEXEC;
        ptrace::seize(pid, options).map_err(|e| sys("seizing the skeleton", pid, e))?;
        if let Some(go) = self.go.take() {
            File::from(go).write_all(&[1]).map_err(|e| io("starting the skeleton", pid, &e))?;
        }
        self.wait_for(|stop| matches!(stop, Stop::Other(libc::PTRACE_EVENT_EXEC)))?;
        let mem = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map_err(|e| io("opening its memory", pid, &e))?;
        // The first instruction is a breakpoint: by then what execve returns has been written to its
        // register.
        mem.write_all_at(&[0xcc], base).map_err(|e| io("writing the stub's entry", pid, &e))?;
        ptrace::cont(pid, 0).map_err(|e| sys("starting the stub", pid, e))?;
        self.wait_for(|stop| stop == Stop::Signal(libc::SIGTRAP))?;
        ptrace::set_options(pid, libc::PTRACE_O_EXITKILL).map_err(|e| sys("binding the skeleton", pid, e))?;
        let memory = Memory::open(pid)?;
        let room = CodeRoom { start: base, len: usize::try_from(CODE_BYTES).unwrap_or(0) };
        let mut injector = Injector::place(pid, mem, room, libc::SIGWINCH)?;
        injector.use_area(base + CODE_BYTES);
        let leader = StoppedThread::take(pid)?;
        self.done = true;
        let channel = self
            .channel
            .try_clone()
            .map_err(|_| SkeletonError::Own { what: "a descriptor", errno: Errno::EMFILE })?;
        let mut skeleton = Skeleton {
            pid,
            base,
            injector,
            threads: vec![leader],
            memory,
            layout: Layout::default(),
            channel,
            channel_in_process: self.channel_in_process,
            over: false,
        };
        skeleton.clear()?;
        Ok(skeleton)
    }

    fn wait_for(&self, wanted: impl Fn(Stop) -> bool) -> Result<(), SkeletonError> {
        let (stop, status) =
            ptrace::wait(self.pid).map_err(|e| sys("waiting for the skeleton", self.pid, e))?;
        match stop {
            Stop::Gone => Err(InjectError::Gone(self.pid).into()),
            stop if wanted(stop) => Ok(()),
            _ => Err(InjectError::UnexpectedStop { tid: self.pid, status }.into()),
        }
    }
}

impl Drop for ReservedPid {
    fn drop(&mut self) {
        if !self.done {
            kill_and_reap(self.pid, &[]);
        }
    }
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

/// A place for the stub that no mapping of the source touches, as low as possible: new mappings of the
/// source, which come while it runs, are put elsewhere by the kernel.
fn hole(layout: &Layout) -> Option<u64> {
    let mut at = LOWEST;
    for vma in &layout.vmas {
        if vma.start >= at + STUB_BYTES + PAGE_BYTES {
            break;
        }
        at = at.max(vma.end + PAGE_BYTES);
    }
    (at + STUB_BYTES < HIGHEST).then_some(at)
}

/// An ELF file with one segment and nothing in it, room for code and area. Anonymous memory: a mapping of
/// the file itself would hinder the change of the exe link (EBUSY).
fn stub_elf(base: u64) -> Vec<u8> {
    let page = PAGE_BYTES;
    let mut f = Vec::new();
    let (u16s, u32s, u64s) = (u16::to_le_bytes, u32::to_le_bytes, u64::to_le_bytes);
    f.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    f.extend_from_slice(&u16s(2)); // ET_EXEC
    f.extend_from_slice(&u16s(62)); // EM_X86_64
    f.extend_from_slice(&u32s(1));
    f.extend_from_slice(&u64s(base));
    f.extend_from_slice(&u64s(64)); // program headers
    f.extend_from_slice(&u64s(0));
    f.extend_from_slice(&u32s(0));
    for half in [64u16, 56, 1, 64, 0, 0] {
        f.extend_from_slice(&u16s(half));
    }
    f.extend_from_slice(&u32s(1)); // PT_LOAD
    f.extend_from_slice(&u32s(7)); // R+W+X
    for v in [0, base, base, 0, STUB_BYTES, page] {
        f.extend_from_slice(&u64s(v));
    }
    f
}

/// A process that is being built, stopped, bound to our life. Dropping it kills it.
#[derive(Debug)]
pub struct Skeleton {
    pid: Tid,
    base: u64,
    injector: Injector,
    threads: Vec<StoppedThread>,
    memory: Memory,
    layout: Layout,
    channel: OwnedFd,
    channel_in_process: i32,
    over: bool,
}

impl Skeleton {
    /// Unmaps what the kernel gave it and closes what it inherited.
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
        Ok(())
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

    /// Brings its memory map and its threads to what the source has now.
    ///
    /// # Errors
    /// See [`SkeletonError`]; it is then of no use.
    pub fn reconcile(&mut self, wanted: Layout) -> Result<(), SkeletonError> {
        let now = std::mem::take(&mut self.layout);
        mm::reconcile(self, &now, &wanted)?;
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
        loop {
            match ptrace::wait(tid).map_err(|e| sys("waiting for a new thread", tid, e))? {
                (Stop::Event(_), _) => break,
                (Stop::Gone, _) => return Err(InjectError::Gone(tid).into()),
                (_, status) => return Err(InjectError::UnexpectedStop { tid, status }.into()),
            }
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
    /// its one call is the moment of acceptance. If we die now, it stays stopped: a SIGSTOP is pending
    /// until [`Skeleton::resume`].
    ///
    /// # Errors
    /// If the process is gone.
    pub fn accept(&mut self) -> Result<(), SkeletonError> {
        kill(Pid::from_raw(self.pid), Signal::SIGSTOP).map_err(|e| sys("fencing", self.pid, e))?;
        for thread in self.threads.iter().rev() {
            ptrace::set_options(thread.tid, 0).map_err(|e| sys("accepting", thread.tid, e))?;
        }
        self.over = true;
        Ok(())
    }

    /// Lets all threads run, or leaves them stopped if they came so. Call [`Skeleton::accept`] first.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn resume(mut self, stopped: bool) -> Result<(), SkeletonError> {
        let mut result = Ok(());
        if !stopped {
            let leader = self.threads.first_mut().ok_or(InjectError::Gone(self.pid))?;
            result = drop_pending_stop(leader.tid).map_err(Into::into);
        }
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
