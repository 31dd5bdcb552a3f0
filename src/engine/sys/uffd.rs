//! userfaultfd ioctls, on a descriptor taken over from the process it belongs to: registering and
//! scanning work from outside.
//!
//! Written here and not taken from the `userfaultfd` crate, which needs libclang to build and has no
//! names for asynchronous write-protection.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

const UFFD_API: u64 = 0xaa;
/// Write-protect faults are resolved by the kernel, and only remembered (Linux 6.7).
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// Pages that do not exist yet can be write-protected.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// Write-protection on shared memory and huge pages.
pub const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// A fork hands over a userfaultfd of the child's, and waits until it is taken.
pub const FEATURE_EVENT_FORK: u64 = 1 << 1;
/// mremap(2) reports and waits.
pub const FEATURE_EVENT_REMAP: u64 = 1 << 2;
/// MADV_DONTNEED, MADV_FREE and MADV_REMOVE report and wait, before they do anything.
pub const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// Missing pages of hugetlb mappings.
pub const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
/// Missing pages of shared memory.
pub const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// munmap(2) and whatever maps over a range report and wait.
pub const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
/// A fault names its thread.
pub const FEATURE_THREAD_ID: u64 = 1 << 8;
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

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24 && size_of::<UffdioRegister>() == 32);
const _: () = assert!(size_of::<UffdioCopy>() == 40 && size_of::<UffdioZeropage>() == 32);

/// `_IOWR(0xAA, nr, size)`, as in asm-generic/ioctl.h.
const fn iowr(nr: u64, size: usize) -> u64 {
    (3 << 30) | ((size as u64) << 16) | (0xaa << 8) | nr
}
const UFFDIO_API: u64 = iowr(0x3f, size_of::<UffdioApi>());
const UFFDIO_REGISTER: u64 = iowr(0x00, size_of::<UffdioRegister>());
/// `_IOR(0xAA, 0x01, struct uffdio_range)`.
const UFFDIO_UNREGISTER: u64 = (2 << 30) | ((size_of::<UffdioRange>() as u64) << 16) | (0xaa << 8) | 1;
/// `_IOR(0xAA, 0x02, struct uffdio_range)`.
const UFFDIO_WAKE: u64 = (2 << 30) | ((size_of::<UffdioRange>() as u64) << 16) | (0xaa << 8) | 2;
const UFFDIO_COPY: u64 = iowr(0x03, size_of::<UffdioCopy>());
const UFFDIO_ZEROPAGE: u64 = iowr(0x04, size_of::<UffdioZeropage>());
const UFFDIO_WRITEPROTECT: u64 = iowr(0x06, size_of::<UffdioWriteprotect>());
const UFFDIO_POISON: u64 = iowr(0x08, size_of::<UffdioZeropage>());
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;

const _: () = assert!(UFFDIO_API == 0xc018_aa3f && UFFDIO_REGISTER == 0xc020_aa00);
const _: () = assert!(UFFDIO_UNREGISTER == 0x8010_aa01 && UFFDIO_WAKE == 0x8010_aa02);
const _: () = assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06);
const _: () = assert!(UFFDIO_COPY == 0xc028_aa03 && UFFDIO_ZEROPAGE == 0xc020_aa04);

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
    register(uffd, start, len, REGISTER_MODE_WP)
}

/// Registers `start..start+len` of the process for pages that are not there; errors as [`register_wp`].
pub fn register_missing(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    register(uffd, start, len, REGISTER_MODE_MISSING)
}

/// Takes `start..start+len` of the process back: it is tracked no more, and what was protected is not.
///
/// EINVAL: something there is not registered with this userfaultfd. ENOMEM: as [`register_wp`].
pub fn unregister(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    let mut arg = UffdioRange { start, len };
    // SAFETY: as in `api`; the range is another process's and only checked by the kernel.
    let rc = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut arg) };
    Errno::result(rc).map(drop)
}

/// Takes the protection of all pages of `start..start+len` away, with the marks that tell of it.
///
/// ENOENT: something there is not registered with this userfaultfd for write-protection. EAGAIN: an event of
/// this process is unread, or the thread that it is about has not gone on yet.
pub fn unprotect(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    let mut arg = UffdioWriteprotect { range: UffdioRange { start, len }, mode: 0 };
    // SAFETY: as in `api`; the range is another process's and only checked by the kernel.
    let rc = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut arg) };
    Errno::result(rc).map(drop)
}

fn register(uffd: BorrowedFd<'_>, start: u64, len: u64, mode: u64) -> Result<(), Errno> {
    let mut arg = UffdioRegister { range: UffdioRange { start, len }, mode, ioctls: 0 };
    // SAFETY: as in `api`; the range is another process's and only checked by the kernel.
    let rc = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut arg) };
    Errno::result(rc).map(drop)
}

/// Fills missing pages from `start` on with `bytes` and wakes who waits for them. Returns how many bytes
/// were placed, at least one page; call again for the rest.
///
/// EEXIST: the first page is there. EAGAIN: an event of this process is unread, or the thread that it is
/// about has not gone on yet. ENOENT: the range is not inside of one registered mapping. ESRCH: the
/// process has ended or has executed another program.
pub fn copy(uffd: BorrowedFd<'_>, start: u64, bytes: &[u8]) -> Result<u64, Errno> {
    let mut arg = UffdioCopy {
        dst: start,
        src: bytes.as_ptr().addr() as u64,
        len: bytes.len() as u64,
        mode: 0,
        copy: 0,
    };
    // SAFETY: `arg` is live and writable for the whole call and has the size that the number says; `src`
    // and `len` describe `bytes`, borrowed meanwhile and only read. `dst` is another process's.
    let rc = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut arg) };
    placed(rc, arg.copy)
}

/// Whether the page at `start` lies in a registered mapping. EAGAIN: as in [`copy`].
pub fn is_registered(uffd: BorrowedFd<'_>, start: u64) -> Result<bool, Errno> {
    // The lowest address that user space may have, where nothing of ours is: copying from there fails,
    // but only after the kernel has found where to copy to.
    const NOTHING: u64 = 65536;
    let mut arg = UffdioCopy { dst: start, src: NOTHING, len: 4096, mode: 0, copy: 0 };
    // SAFETY: as in `copy`, but that `src` leads nowhere, which the kernel reports.
    let rc = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut arg) };
    match placed(rc, arg.copy) {
        Err(Errno::EFAULT | Errno::EEXIST) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno),
        Ok(_) => Err(Errno::ENOTSUP),
    }
}

/// Fills missing pages with zeros, as [`copy`]. EINVAL: not in this kind of mapping.
pub fn zero(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<u64, Errno> {
    let mut arg = UffdioZeropage { range: UffdioRange { start, len }, mode: 0, zeropage: 0 };
    // SAFETY: as in `api`; the range is another process's and only checked by the kernel.
    let rc = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut arg) };
    placed(rc, arg.zeropage)
}

/// Makes missing pages fail: who touches them gets SIGBUS (Linux 6.6).
pub fn poison(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<u64, Errno> {
    // `struct uffdio_poison` has the same fields.
    let mut arg = UffdioZeropage { range: UffdioRange { start, len }, mode: 0, zeropage: 0 };
    // SAFETY: as in `api`; the range is another process's and only checked by the kernel.
    let rc = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_POISON, &raw mut arg) };
    placed(rc, arg.zeropage)
}

/// A call that places a part reports EAGAIN and how much it was.
fn placed(rc: i32, count: i64) -> Result<u64, Errno> {
    match (Errno::result(rc), u64::try_from(count)) {
        (Ok(_) | Err(Errno::EAGAIN), Ok(count)) if count > 0 => Ok(count),
        (Err(errno), _) => Err(errno),
        (Ok(_), _) => Err(Errno::EAGAIN),
    }
}

/// Wakes who waits for pages of this range: they look again.
pub fn wake(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    let mut arg = UffdioRange { start, len };
    // SAFETY: as in `api`; the range is another process's and only compared with addresses.
    let rc = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WAKE, &raw mut arg) };
    Errno::result(rc).map(drop)
}

/// What a userfaultfd tells.
#[derive(Debug)]
pub enum Message {
    /// A thread waits for a page.
    Fault {
        /// Where, to the byte or to the page.
        address: u64,
        /// Who, in its own PID namespace; 0: not a thread of the process.
        tid: u32,
    },
    /// The process has a child with a copy of its memory, which is registered with this userfaultfd.
    Fork(OwnedFd),
    /// `from..from+len` is at `to` now; `len` is 0 if `from` stays mapped as well.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// How much moved.
        len: u64,
    },
    /// The contents of `start..end` are about to be given up.
    Remove {
        /// First address.
        start: u64,
        /// First address behind.
        end: u64,
    },
    /// `start..end` is mapped no more.
    Unmap {
        /// First address.
        start: u64,
        /// First address behind.
        end: u64,
    },
    /// Something that this version of the kernel did not promise.
    Other(u8),
}

#[repr(C)]
#[derive(Default)]
struct UffdMsg {
    event: u8,
    reserved: [u8; 7],
    args: [u64; 3],
}
const _: () = assert!(size_of::<UffdMsg>() == 32);

/// Reads one message. The thread behind an event goes on with it.
///
/// EAGAIN: there is none. EMFILE: a fork's userfaultfd has no room among our descriptors; the message
/// stays.
pub fn read_message(uffd: BorrowedFd<'_>) -> Result<Message, Errno> {
    let mut msg = UffdMsg::default();
    // SAFETY: the pointer and the length describe `msg`, plain integers, writable for the whole call.
    let rc = unsafe { libc::read(uffd.as_raw_fd(), (&raw mut msg).cast(), size_of::<UffdMsg>()) };
    if Errno::result(rc)? != 32 {
        return Err(Errno::EIO);
    }
    let low = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0);
    let [a, b, c] = msg.args;
    Ok(match msg.event {
        0x12 => Message::Fault { address: b, tid: low(c) },
        0x13 => match i32::try_from(low(a)) {
            Ok(fd) => Message::Fork(super::owned_fd(fd)),
            Err(_) => return Err(Errno::EIO),
        },
        0x14 => Message::Remap { from: a, to: b, len: c },
        0x15 => Message::Remove { start: a, end: b },
        0x16 => Message::Unmap { start: a, end: b },
        other => Message::Other(other),
    })
}
