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
    let count = usize::try_from(Errno::result(rc)?).unwrap_or(0);
    // A walk that goes on after 512 regions, the kernel's own room, and then comes to its end leaves `walk_end`
    // at the last of these stops (seen on Linux 6.18): to go on from there would report the rest twice.
    let walked_to = match found.get(count.wrapping_sub(1)) {
        Some(last) if count == found.len() => arg.walk_end.max(last.end),
        _ => end,
    };
    Ok((count, walked_to))
}

/// Scans all of `start..end`, in as many ioctls as it takes with `found` as room for one.
///
/// # Errors
/// The errno of an ioctl; what the ones before it found has been told.
pub fn scan_all(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    query: Query,
    found: &mut [PageRegion],
    mut each: impl FnMut(PageRegion),
) -> Result<(), Errno> {
    let mut at = start;
    while at < end {
        let (count, walked_to) = scan(pagemap, at, end, query, found)?;
        found.iter().take(count).for_each(|r| each(*r));
        if walked_to <= at {
            break;
        }
        at = walked_to;
    }
    Ok(())
}

/// A mapping as PROCMAP_QUERY tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappingAt {
    pub start: u64,
    pub end: u64,
    /// Neither shared nor backed by a file.
    pub anonymous: bool,
}

#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const PROCMAP_QUERY: u64 = (3 << 30) | ((size_of::<ProcmapQuery>() as u64) << 16) | ((b'f' as u64) << 8) | 17;
const _: () = assert!(size_of::<ProcmapQuery>() == 104);

/// The mapping that holds `address`, or else the next one; `None` behind the last (Linux 6.11, a
/// microsecond; ENOTTY before).
pub fn mapping_at(maps: BorrowedFd<'_>, address: u64) -> Result<Option<MappingAt>, Errno> {
    const COVERING_OR_NEXT: u64 = 0x10;
    const SHARED: u64 = 8;
    let mut arg = ProcmapQuery {
        size: size_of::<ProcmapQuery>() as u64,
        query_flags: COVERING_OR_NEXT,
        query_addr: address,
        ..ProcmapQuery::default()
    };
    // SAFETY: `arg` is live and writable and of the size that the number and its first field say; with
    // name and build id sizes of 0 the kernel writes nowhere else.
    let rc = unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut arg) };
    match Errno::result(rc) {
        Ok(_) => Ok(Some(MappingAt {
            start: arg.vma_start,
            end: arg.vma_end,
            anonymous: arg.inode == 0 && arg.vma_flags & SHARED == 0,
        })),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}
