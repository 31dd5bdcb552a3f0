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
