//! ptrace(2) and waitpid(2) on one thread at a time. The caller is the tracer, and the only one that
//! waits for these threads.

#![allow(clippy::disallowed_methods, reason = "the home of ptrace and waitpid")]

use nix::errno::Errno;

use crate::engine::remote::Tid;

/// `PTRACE_EVENT_STOP`: the event of a stop by INTERRUPT, of a new traced thread, of a group stop.
pub const EVENT_STOP: i32 = 128;

/// The general registers, as `PTRACE_GETREGS` gives them.
pub type Regs = libc::user_regs_struct;

/// Note type of the extended state (x87, SSE, AVX...): `NT_X86_XSTATE`.
const NT_X86_XSTATE: usize = 0x202;
/// More than any xstate of today (AMX: 11 KiB).
const XSTATE_MAX_BYTES: usize = 64 * 1024;

/// Tells stops at system calls from signals; and if we die in one, what the kernel then sends is no signal at
/// all, where it would be SIGTRAP otherwise (`ptrace_report_syscall` in include/linux/ptrace.h, Linux 6.18).
pub const MARK_CALLS: i32 = libc::PTRACE_O_TRACESYSGOOD;
const CALL_STOP: i32 = libc::SIGTRAP | 0x80;

const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;

/// How a thread reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// `PTRACE_EVENT_STOP`, with the signal of the group stop or SIGTRAP.
    Event(i32),
    /// About to have this signal delivered.
    Signal(i32),
    /// At the entry or the exit of a system call, by [`cont_to_call`] with [`MARK_CALLS`].
    Call,
    /// Another ptrace event.
    Other(i32),
    /// Exited or killed.
    Gone,
}

fn request(op: u32, tid: Tid, addr: usize, data: usize) -> Result<i64, Errno> {
    // SAFETY: only requests whose `addr` and `data` are plain values, or pointers to objects that the
    // functions below borrow for the whole call, come here; the kernel checks the thread id.
    let rc = unsafe { libc::ptrace(op, tid, addr, data) };
    Errno::result(rc)
}

/// PTRACE_SEIZE with these PTRACE_O_* options; the thread runs on.
pub fn seize(tid: Tid, options: i32) -> Result<(), Errno> {
    request(libc::PTRACE_SEIZE, tid, 0, usize::try_from(options).unwrap_or(0)).map(drop)
}

/// Changes the PTRACE_O_* options of a stopped thread.
pub fn set_options(tid: Tid, options: i32) -> Result<(), Errno> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, usize::try_from(options).unwrap_or(0)).map(drop)
}

/// Goes on to the next entry or exit of a system call. The thread must have been seized with [`MARK_CALLS`].
pub fn cont_to_call(tid: Tid) -> Result<(), Errno> {
    request(libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// Asks a seized thread to stop; wait for it with [`wait`] or [`poll`].
pub fn interrupt(tid: Tid) -> Result<(), Errno> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped thread run, delivering `signal` (0: none).
pub fn cont(tid: Tid, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_CONT, tid, 0, usize::try_from(signal).unwrap_or(0)).map(drop)
}

/// One instruction, then a SIGTRAP stop. Never at the source: see `inject`.
pub fn single_step(tid: Tid) -> Result<(), Errno> {
    request(libc::PTRACE_SINGLESTEP, tid, 0, 0).map(drop)
}

/// Lets a stopped thread go for good, delivering `signal` (0: none).
pub fn detach(tid: Tid, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_DETACH, tid, 0, usize::try_from(signal).unwrap_or(0)).map(drop)
}

/// General registers of a stopped thread.
pub fn regs(tid: Tid) -> Result<Regs, Errno> {
    // SAFETY: `user_regs_struct` is plain integers, for which all zeroes is a value.
    let mut regs: Regs = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, tid, 0, (&raw mut regs).addr())?;
    Ok(regs)
}

/// Sets the general registers of a stopped thread.
pub fn set_regs(tid: Tid, regs: &Regs) -> Result<(), Errno> {
    request(libc::PTRACE_SETREGS, tid, 0, std::ptr::from_ref(regs).addr()).map(drop)
}

/// Extended state of a stopped thread, in the layout of XSAVE.
pub fn xstate(tid: Tid) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0u8; XSTATE_MAX_BYTES];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, (&raw mut iov).addr())?;
    bytes.truncate(iov.iov_len);
    Ok(bytes)
}

/// Sets the extended state; the length must be this CPU's, or EFAULT.
pub fn set_xstate(tid: Tid, bytes: &mut [u8]) -> Result<(), Errno> {
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    request(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, (&raw mut iov).addr()).map(drop)
}

/// Blocked signals of a stopped thread, bit n-1 for signal n.
pub fn sigmask(tid: Tid) -> Result<u64, Errno> {
    let mut mask = 0u64;
    request(PTRACE_GETSIGMASK, tid, 8, (&raw mut mask).addr())?;
    Ok(mask)
}

/// Sets the blocked signals of a stopped thread.
pub fn set_sigmask(tid: Tid, mask: u64) -> Result<(), Errno> {
    request(PTRACE_SETSIGMASK, tid, 8, (&raw const mask).addr()).map(drop)
}

fn decode(status: i32) -> Stop {
    if libc::WIFSTOPPED(status) {
        match (status >> 16, libc::WSTOPSIG(status)) {
            (0, CALL_STOP) => Stop::Call,
            (0, signal) => Stop::Signal(signal),
            (EVENT_STOP, signal) => Stop::Event(signal),
            (event, _) => Stop::Other(event),
        }
    } else {
        Stop::Gone
    }
}

fn wait_with(tid: Tid, flags: i32) -> Result<Option<(Stop, i32)>, Errno> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a live, writable int for the whole call.
        let rc = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | flags) };
        match Errno::result(rc) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some((decode(status), status))),
            Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => return Ok(Some((Stop::Gone, 0))),
            Err(errno) => return Err(errno),
        }
    }
}

/// Waits for the next report of one thread; the raw status with it.
pub fn wait(tid: Tid) -> Result<(Stop, i32), Errno> {
    wait_with(tid, 0).map(|stop| stop.unwrap_or((Stop::Gone, 0)))
}

/// The next report of one thread, if there is one already.
pub fn poll(tid: Tid) -> Result<Option<(Stop, i32)>, Errno> {
    wait_with(tid, libc::WNOHANG)
}
