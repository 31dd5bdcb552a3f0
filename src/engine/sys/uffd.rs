//! userfaultfd ioctls, on a descriptor taken over from the process it belongs to: registering and
//! scanning work from outside.
//!
//! Written here and not taken from the `userfaultfd` crate, which needs libclang to build and has no
//! names for asynchronous write-protection.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

const UFFD_API: u64 = 0xaa;
/// Write-protect faults are resolved by the kernel, and only remembered (Linux 6.7).
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// Pages that do not exist yet can be write-protected.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// Write-protection on shared memory and huge pages.
pub const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Flag of userfaultfd(2): faults from inside the kernel need not be handled. Allowed without privileges;
/// asynchronous write-protection resolves and reports kernel-mode writes all the same.
pub const USER_MODE_ONLY: u64 = 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24 && size_of::<UffdioRegister>() == 32);

/// `_IOWR(0xAA, nr, size)`, as in asm-generic/ioctl.h.
const fn iowr(nr: u64, size: usize) -> u64 {
    (3 << 30) | ((size as u64) << 16) | (0xaa << 8) | nr
}
const UFFDIO_API: u64 = iowr(0x3f, size_of::<UffdioApi>());
const UFFDIO_REGISTER: u64 = iowr(0x00, size_of::<UffdioRegister>());
const REGISTER_MODE_WP: u64 = 2;

const _: () = assert!(UFFDIO_API == 0xc018_aa3f && UFFDIO_REGISTER == 0xc020_aa00);

/// The handshake: exactly these features, or EINVAL.
pub fn api(uffd: BorrowedFd<'_>, features: u64) -> Result<(), Errno> {
    let mut arg = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: `arg` is live and writable for the whole call and has the size that the number says.
    let rc = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut arg) };
    Errno::result(rc).map(drop)
}

/// Registers `start..start+len` of the process for write-protection; idempotent.
///
/// EINVAL: a mapping in the range cannot be tracked. EBUSY: registered with another userfaultfd.
/// ENOMEM: nothing mapped there, or the process is gone.
pub fn register_wp(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    let mut arg = UffdioRegister { range: UffdioRange { start, len }, mode: REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: as in `api`; the range is another process's and only checked by the kernel.
    let rc = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut arg) };
    Errno::result(rc).map(drop)
}
