//! Raw calls on descriptors: taking them over from another process, comparing them, and the ioctls and
//! socket options of the kinds that `state::files` carries.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "sizes of kernel structures and arguments of system calls, each bounded where it is made"
)]

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::engine::remote::Tid;

/// `SO_PEEK_OFF`
pub const SO_PEEK_OFF: c_int = 42;
/// `TFD_IOC_SET_TICKS`: `_IOW('T', 0, u64)`
const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
/// `FIONREAD`
const FIONREAD: libc::c_ulong = 0x541b;
/// `F_SETOWN_EX`, `F_GETOWN_EX`, `F_SETSIG`, `F_GETSIG`
const F_GETOWN_EX: c_int = 16;
/// `F_SETSIG`
pub const F_SETSIG: c_int = 10;
const F_GETSIG: c_int = 11;
const KCMP_FILE: c_int = 0;
const KCMP_FILES: c_int = 2;
const KCMP_EPOLL_TFD: c_int = 7;

/// `struct f_owner_ex`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// `F_OWNER_TID` 0, `F_OWNER_PID` 1, `F_OWNER_PGRP` 2
    pub kind: c_int,
    /// The process, thread or group; 0: nobody.
    pub pid: libc::pid_t,
}

/// `struct kcmp_epoll_slot`
#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}

fn owned(rc: libc::c_long) -> Result<OwnedFd, Errno> {
    Ok(super::owned_fd(Errno::result(rc)? as RawFd))
}

/// Compares the descriptions of two descriptors of a process by the kernel's own, stable order.
pub fn kcmp_file(pid: Tid, a: RawFd, b: RawFd) -> Result<std::cmp::Ordering, Errno> {
    kcmp_files((pid, a), (pid, b))
}

/// Likewise those of two processes: the order is the same for all.
pub fn kcmp_files(a: (Tid, RawFd), b: (Tid, RawFd)) -> Result<std::cmp::Ordering, Errno> {
    let numbers = (a.1 as libc::c_ulong, b.1 as libc::c_ulong);
    // SAFETY: plain integer arguments.
    let rc = unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, KCMP_FILE, numbers.0, numbers.1) };
    Ok(match Errno::result(rc)? {
        0 => std::cmp::Ordering::Equal,
        1 => std::cmp::Ordering::Less,
        _ => std::cmp::Ordering::Greater,
    })
}

/// Whether a thread has the same descriptor table as another.
pub fn kcmp_tables(a: Tid, b: Tid) -> Result<bool, Errno> {
    // SAFETY: plain integer arguments.
    let rc = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_FILES, 0, 0) };
    Ok(Errno::result(rc)? == 0)
}

/// Whether descriptor `number` is the description behind the `nth` registration of `watched` in `epoll`.
pub fn kcmp_epoll(pid: Tid, number: RawFd, epoll: RawFd, watched: u32, nth: u32) -> Result<bool, Errno> {
    let slot = EpollSlot { efd: epoll as u32, tfd: watched, toff: nth };
    // SAFETY: `slot` is a live `kcmp_epoll_slot` for the whole call; the kernel only reads it.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            pid,
            pid,
            KCMP_EPOLL_TFD,
            number as libc::c_ulong,
            std::ptr::from_ref(&slot) as libc::c_ulong,
        )
    };
    Ok(Errno::result(rc)? == 0)
}

/// Status flags (`F_GETFL`).
pub fn status_flags(fd: BorrowedFd<'_>) -> Result<c_int, Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })
}

/// Sets the status flags that `F_SETFL` can change.
pub fn set_status_flags(fd: BorrowedFd<'_>, flags: c_int) -> Result<(), Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

/// Whom `SIGIO` goes to, and which signal is sent instead (0: `SIGIO`).
pub fn signal_owner(fd: BorrowedFd<'_>) -> Result<(Owner, c_int), Errno> {
    let mut owner = Owner::default();
    // SAFETY: `owner` is a live `f_owner_ex`, which the kernel fills in.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, std::ptr::from_mut(&mut owner)) })?;
    // SAFETY: no pointers.
    let signal = Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) })?;
    Ok((owner, signal))
}

/// Sets the signal that is sent instead of `SIGIO`.
pub fn set_signal(fd: BorrowedFd<'_>, signal: c_int) -> Result<(), Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_SETSIG, signal) }).map(drop)
}

/// Capacity of a pipe in bytes.
pub fn pipe_size(fd: BorrowedFd<'_>) -> Result<usize, Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETPIPE_SZ) }).map(|v| v as usize)
}

/// Sets the capacity of a pipe.
pub fn set_pipe_size(fd: BorrowedFd<'_>, bytes: usize) -> Result<(), Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETPIPE_SZ, bytes as c_int) }).map(drop)
}

/// Bytes that can be read at once (`FIONREAD`).
pub fn readable_bytes(fd: BorrowedFd<'_>) -> Result<usize, Errno> {
    let mut bytes: c_int = 0;
    // SAFETY: FIONREAD writes one int to `bytes`, alive for the whole call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), FIONREAD, std::ptr::from_mut(&mut bytes)) })?;
    Ok(bytes.max(0) as usize)
}

/// Duplicates up to `len` bytes from one pipe to another without consuming them; never blocks.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: usize) -> Result<usize, Errno> {
    // SAFETY: no pointers.
    let rc = unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), len, libc::SPLICE_F_NONBLOCK) };
    Errno::result(rc).map(|v| v as usize)
}

/// What poll(2) reports at once.
pub fn poll_now(fd: BorrowedFd<'_>, events: i16) -> Result<i16, Errno> {
    let mut polled = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: `polled` is one live pollfd, as the count says.
    Errno::result(unsafe { libc::poll(&raw mut polled, 1, 0) })?;
    Ok(polled.revents)
}

/// Makes an eventfd.
pub fn eventfd(count: u32, semaphore: bool) -> Result<OwnedFd, Errno> {
    let flags = libc::EFD_CLOEXEC | if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: no pointers.
    owned(libc::c_long::from(unsafe { libc::eventfd(count, flags) }))
}

/// Makes a signalfd for the signals of `mask` (bit 0 is signal 1).
pub fn signalfd(mask: u64) -> Result<OwnedFd, Errno> {
    // SAFETY: the kernel reads 8 bytes of `mask`, which lives for the whole call.
    owned(unsafe {
        libc::syscall(libc::SYS_signalfd4, -1, std::ptr::from_ref(&mask), size_of::<u64>(), libc::SFD_CLOEXEC)
    })
}

/// Makes an epoll.
pub fn epoll() -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    owned(libc::c_long::from(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }))
}

/// Makes a timerfd.
pub fn timerfd(clock: c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    owned(libc::c_long::from(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) }))
}

/// Remaining time and interval of a timerfd. Also makes the kernel count overdue periods, so that the
/// ticks in fdinfo are right afterwards.
pub fn timerfd_gettime(fd: BorrowedFd<'_>) -> Result<libc::itimerspec, Errno> {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut spec = libc::itimerspec { it_interval: zero, it_value: zero };
    // SAFETY: the kernel fills in `spec`, which lives for the whole call.
    Errno::result(unsafe { libc::timerfd_gettime(fd.as_raw_fd(), &raw mut spec) })?;
    Ok(spec)
}

/// Arms or disarms a timerfd.
pub fn timerfd_settime(fd: BorrowedFd<'_>, flags: c_int, spec: &libc::itimerspec) -> Result<(), Errno> {
    // SAFETY: the kernel reads `spec`, which lives for the whole call; no old value is asked for.
    let rc = unsafe { libc::timerfd_settime(fd.as_raw_fd(), flags, spec, std::ptr::null_mut()) };
    Errno::result(rc).map(drop)
}

/// Sets the expirations that the next read of a timerfd reports.
pub fn timerfd_set_ticks(fd: BorrowedFd<'_>, ticks: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads 8 bytes of `ticks`, which lives for the whole call.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, std::ptr::from_ref(&ticks)) };
    Errno::result(rc).map(drop)
}

/// A clock's time in nanoseconds.
pub fn clock_ns(clock: c_int) -> Result<i64, Errno> {
    // Those that wake the machine read the same, but can only be read where there is a device for it.
    let clock = match clock {
        libc::CLOCK_REALTIME_ALARM => libc::CLOCK_REALTIME,
        libc::CLOCK_BOOTTIME_ALARM => libc::CLOCK_BOOTTIME,
        other => other,
    };
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills in `now`, which lives for the whole call.
    Errno::result(unsafe { libc::clock_gettime(clock, &raw mut now) })?;
    Ok(now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec))
}
