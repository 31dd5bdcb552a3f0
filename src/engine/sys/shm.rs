//! Shared memory of ours: writing into a file that takes no write(2), and removing System V segments.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use super::vm::{self, RemoteRange};
use crate::engine::remote::Tid;

/// Writes `bytes` at `skip` bytes behind `offset`, through a mapping of `unit` bytes that lasts as long as
/// this call: for huge pages, and for what lies behind the end of the file in its last page.
pub fn write_mapped(
    file: BorrowedFd<'_>,
    offset: u64,
    unit: usize,
    skip: usize,
    bytes: &[u8],
) -> Result<(), Errno> {
    if skip.checked_add(bytes.len()).is_none_or(|end| end > unit) {
        return Err(Errno::EINVAL);
    }
    let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), unit, prot, libc::MAP_SHARED, file.as_raw_fd(), offset) };
    if at == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    // Written by the kernel, as into a stranger's memory: where no page is to be had, it answers, instead
    // of ending us by SIGBUS.
    let us = Tid::try_from(std::process::id()).map_err(|_| Errno::ESRCH)?;
    let target = RemoteRange { start: at.addr() as u64 + skip as u64, len: bytes.len() };
    let written = match vm::write(us, bytes, &[target]) {
        Ok(n) if n == bytes.len() => Ok(()),
        Ok(_) => Err(Errno::EFAULT),
        Err(errno) => Err(errno),
    };
    // SAFETY: the mapping of above, which nothing refers to any more.
    let unmapped = Errno::result(unsafe { libc::munmap(at, unit) });
    written.and(unmapped.map(drop))
}

/// Removes a System V segment: at once, or with its last attach.
pub fn remove_segment(id: i32) -> Result<(), Errno> {
    // SAFETY: IPC_RMID uses no buffer.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) }).map(drop)
}
