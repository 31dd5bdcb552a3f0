//! Signals sent to a process or to one of its threads, plain or with their `siginfo_t`.

use nix::errno::Errno;

use crate::engine::remote::Tid;
use crate::engine::sys::attrs::SIGINFO_BYTES;

/// kill(2), also for signals that have no name.
///
/// # Errors
/// `ESRCH` if it is gone.
pub fn send_to_process(pid: Tid, signal: i32) -> Result<(), Errno> {
    // SAFETY: takes two integers and touches no memory of ours.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// tgkill(2): a signal for this one thread.
///
/// # Errors
/// `ESRCH` if it is gone.
pub fn send_to_thread(pid: Tid, tid: Tid, signal: i32) -> Result<(), Errno> {
    // SAFETY: takes three integers and touches no memory of ours.
    Errno::result(unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) }).map(drop)
}

/// Queues a signal with its information: for the process, or for one thread of it. The kernel takes only
/// what cannot be mistaken for its own words or for those of kill(2): codes below zero, but for `SI_TKILL`.
///
/// # Errors
/// `EPERM` for other codes, `EAGAIN` if the queue is full, `ESRCH` if the process is gone.
pub fn queue(pid: Tid, tid: Option<Tid>, signal: i32, info: &[u8; SIGINFO_BYTES]) -> Result<(), Errno> {
    let rc = match tid {
        // SAFETY: the kernel reads the 128 bytes of a siginfo_t, which live until the call returns.
        None => unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, info.as_ptr()) },
        // SAFETY: the same.
        Some(tid) => unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, info.as_ptr()) },
    };
    Errno::result(rc).map(drop)
}
