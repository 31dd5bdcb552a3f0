//! Nice values of single threads (setpriority(2): on Linux, PRIO_PROCESS means one thread).

use nix::errno::Errno;

use crate::engine::remote::Tid;

/// Sets the nice value of one thread.
///
/// # Errors
/// EACCES or EPERM without CAP_SYS_NICE, ESRCH if it is gone.
pub fn set_nice(tid: Tid, nice: i32) -> Result<(), Errno> {
    // SAFETY: takes three integers and touches no memory of ours.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, tid.unsigned_abs(), nice) }).map(drop)
}

/// Puts the calling thread before all ordinary ones (SCHED_FIFO, lowest priority of it).
///
/// # Errors
/// EPERM without CAP_SYS_NICE.
pub fn first_in_line() -> Result<(), Errno> {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: `param` is live for the whole call and only read; 0 is the calling thread.
    Errno::result(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) }).map(drop)
}
