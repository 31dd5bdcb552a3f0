//! Nice values of single threads (setpriority(2): on Linux, PRIO_PROCESS means one thread), and their policies
//! (sched(7)).

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

/// Puts the calling thread before all ordinary ones: SCHED_FIFO with this priority, of which 1 is the lowest.
///
/// # Errors
/// EPERM without CAP_SYS_NICE.
pub fn set_first(priority: libc::c_int) -> Result<(), Errno> {
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: `param` is live for the whole call and only read; 0 is the calling thread.
    Errno::result(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) }).map(drop)
}

/// The scheduling policy of the calling thread (`SCHED_OTHER` and so on).
///
/// # Errors
/// None that is known.
pub fn policy() -> Result<libc::c_int, Errno> {
    // SAFETY: takes an integer and touches no memory of ours; 0 is the calling thread.
    Errno::result(unsafe { libc::sched_getscheduler(0) })
}

/// Gives the calling thread a policy that knows no priorities. Its nice value stays as it is.
///
/// # Errors
/// EINVAL for another policy.
pub fn set_ordinary(policy: libc::c_int) -> Result<(), Errno> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: `param` is live for the whole call and only read; 0 is the calling thread.
    Errno::result(unsafe { libc::sched_setscheduler(0, policy, &raw const param) }).map(drop)
}
