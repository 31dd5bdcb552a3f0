//! System V semaphores, as they are seen from outside.

use nix::errno::Errno;

/// The process that last did an operation on semaphore `index` of set `id`; 0: nobody has.
pub fn last_process(id: i32, index: i32) -> Result<i32, Errno> {
    // SAFETY: GETPID takes no further argument and touches no memory of ours.
    Errno::result(unsafe { libc::semctl(id, index, libc::GETPID) })
}
