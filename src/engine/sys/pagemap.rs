//! The PAGEMAP_SCAN ioctl on /proc/PID/pagemap (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst).

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// Page categories.
pub const WPALLOWED: u64 = 1;
pub const WRITTEN: u64 = 1 << 1;
pub const FILE: u64 = 1 << 2;
pub const PRESENT: u64 = 1 << 3;
pub const SWAPPED: u64 = 1 << 4;
pub const PFNZERO: u64 = 1 << 5;
pub const GUARD: u64 = 1 << 8;

/// Write-protect what matches, atomically with reporting it.
pub const WP_MATCHING: u64 = 1;
/// EPERM where a mapping is not registered for asynchronous write-protection.
pub const CHECK_WPASYNC: u64 = 1 << 1;

/// A run of pages with the same categories; addresses in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageRegion {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGEMAP_SCAN: u64 = (3 << 30) | ((size_of::<PmScanArg>() as u64) << 16) | ((b'f' as u64) << 8) | 16;
const _: () = assert!(size_of::<PmScanArg>() == 96 && PAGEMAP_SCAN == 0xc060_6610);

/// Which pages match, and what is said of them: a page matches if, after inverting `inverted`, it has
/// all of `all` and any of `any` (0: no condition).
#[derive(Debug, Clone, Copy, Default)]
pub struct Query {
    pub flags: u64,
    pub inverted: u64,
    pub all: u64,
    pub any: u64,
    pub report: u64,
}

/// Scans `start..end` into `found`; returns how many regions were found and where the scan ended
/// (before `end` if `found` is full: go on from there).
pub fn scan(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    query: Query,
    found: &mut [PageRegion],
) -> Result<(usize, u64), Errno> {
    let mut arg = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags: query.flags,
        start,
        end,
        walk_end: 0,
        vec: found.as_mut_ptr().addr() as u64,
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: query.inverted,
        category_mask: query.all,
        category_anyof_mask: query.any,
        return_mask: query.report,
    };
    // SAFETY: `arg` is live and writable and of the size that the number and its first field say; `vec`
    // and `vec_len` describe `found`, borrowed for the whole call.
    let rc = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    let count = Errno::result(rc)?;
    Ok((usize::try_from(count).unwrap_or(0), arg.walk_end))
}
