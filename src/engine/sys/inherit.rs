//! Descriptors that a process was started with.

use nix::errno::Errno;

/// Closes all descriptors but standard input, output and error.
///
/// For the very start of a process: whatever owns a descriptor by then would be left with a number only.
pub(crate) fn close_inherited() -> Result<(), Errno> {
    // SAFETY: takes integers only. No object of ours holds a descriptor above 2 yet (see above), so none
    // of them is closed behind its owner's back.
    let rc = unsafe { libc::syscall(libc::SYS_close_range, 3, u64::from(u32::MAX), 0) };
    Errno::result(rc).map(|_| ())
}
