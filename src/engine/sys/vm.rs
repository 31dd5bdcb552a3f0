//! Another process's memory, without stopping it: process_vm_readv(2) and process_vm_writev(2).

use nix::errno::Errno;

use crate::engine::remote::Tid;

/// A range of another process's memory. Never dereferenced by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteRange {
    pub start: u64,
    pub len: usize,
}

impl RemoteRange {
    fn as_iovec(self) -> libc::iovec {
        libc::iovec {
            iov_base: std::ptr::without_provenance_mut(usize::try_from(self.start).unwrap_or(0)),
            iov_len: self.len,
        }
    }
}

/// IOV_MAX.
const MAX_RANGES: usize = 1024;

/// Reads the ranges one after the other into `into`; returns the bytes read, fewer than asked for where
/// a range is not readable (EFAULT if nothing is).
pub fn read(pid: Tid, into: &mut [u8], from: &[RemoteRange]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote: Vec<libc::iovec> = from.iter().take(MAX_RANGES).map(|r| r.as_iovec()).collect();
    // SAFETY: `local` describes `into`, borrowed mutably for the whole call; the kernel writes no more
    // than its length. The remote addresses are only checked and used in the other process.
    let rc =
        unsafe { libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), remote.len() as u64, 0) };
    Errno::result(rc).map(|n| usize::try_from(n).unwrap_or(0))
}

/// Writes `from` to the ranges one after the other; returns the bytes written, fewer than asked for where
/// a range is not writable (EFAULT if the first is not).
pub fn write(pid: Tid, from: &[u8], to: &[RemoteRange]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote: Vec<libc::iovec> = to.iter().take(MAX_RANGES).map(|r| r.as_iovec()).collect();
    // SAFETY: `local` describes `from`, which the kernel only reads; the remote addresses are only
    // checked and used in the other process.
    let rc =
        unsafe { libc::process_vm_writev(pid, &raw const local, 1, remote.as_ptr(), remote.len() as u64, 0) };
    Errno::result(rc).map(|n| usize::try_from(n).unwrap_or(0))
}
