//! Calls tried on ourselves, only to see whether this kernel has them.

use std::os::fd::OwnedFd;

use nix::errno::Errno;

/// A userfaultfd of our own memory.
pub fn userfaultfd(flags: u64) -> Result<OwnedFd, Errno> {
    // SAFETY: takes an integer and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags | O_CLOEXEC) };
    let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    Ok(super::owned_fd(fd))
}

/// `O_CLOEXEC`
const O_CLOEXEC: u64 = 0o2_000_000;

/// Whether this kernel has clone3(2): with no arguments it says that they are too short.
pub fn has_clone3() -> bool {
    let nothing = std::ptr::null::<libc::c_void>();
    // SAFETY: a size of zero is refused before the pointer is looked at.
    let rc = unsafe { libc::syscall(libc::SYS_clone3, nothing, 0) };
    rc == -1 && Errno::last() == Errno::EINVAL
}

/// Makes the calling thread one without effective capabilities.
#[cfg(test)]
pub fn drop_effective_capabilities() -> Result<(), Errno> {
    let header = [0x2008_0522u32, 0];
    let mut sets = [0u32; 6];
    // SAFETY: `sets` has room for the two structures of three words that this version of the header stands for.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) })?;
    (sets[0], sets[3]) = (0, 0);
    // SAFETY: as above; the kernel only reads them.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) }).map(drop)
}
