//! Tells a living process from one that is already being killed, by stopping it once.

#![allow(clippy::disallowed_methods, reason = "traces for a moment, on the thread that calls")]

use std::ptr::null_mut;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Seizes, interrupts and lets go of the leader `pid`. True if it stopped: a process with a fatal signal
/// on its way never does, it ends. A process in a group stop stays in it.
///
/// `EPERM` says that it is traced by somebody else, or on its way out.
///
/// The caller must not trace the process. The thread that calls traces it in between.
pub(crate) fn stops(pid: Pid) -> Result<bool, Errno> {
    match ptrace(libc::PTRACE_SEIZE, pid) {
        Err(Errno::ESRCH) => return Ok(false),
        other => other?,
    }
    match ptrace(libc::PTRACE_INTERRUPT, pid) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => return Err(errno),
    }
    loop {
        match waitpid(pid, Some(WaitPidFlag::__WALL)) {
            Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) | Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => return Ok(false),
            Err(errno) => return Err(errno),
            Ok(_) => break,
        }
    }
    match ptrace(libc::PTRACE_DETACH, pid) {
        Ok(()) => Ok(true),
        Err(Errno::ESRCH) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn ptrace(request: libc::c_uint, pid: Pid) -> Result<(), Errno> {
    // SAFETY: none of these three requests reads or writes memory of ours: address and data are null.
    let rc = unsafe {
        libc::ptrace(request, pid.as_raw(), null_mut::<libc::c_void>(), null_mut::<libc::c_void>())
    };
    Errno::result(rc).map(|_| ())
}
