//! Time namespaces: unshare(2) with `CLONE_NEWTIME`.

use nix::errno::Errno;

/// Gives the children of the calling thread, from the next one on, a new time namespace. The thread
/// itself stays in its own.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN, EINVAL if the kernel has no time namespaces.
pub fn unshare_time() -> Result<(), Errno> {
    // SAFETY: takes one integer and touches no memory of ours. Of the calling thread it changes nothing
    // but the namespace that its later children are born into.
    Errno::result(unsafe { libc::unshare(libc::CLONE_NEWTIME) }).map(drop)
}
