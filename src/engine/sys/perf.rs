//! Counting what threads do (perf_event_open(2) on the kernel's trace events).

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

/// `PERF_TYPE_TRACEPOINT` in the first word of struct perf_event_attr, and the size of its first version, which is all
/// that is needed here.
const TRACEPOINT: u64 = 2 | 64 << 32;
/// The bit `inherit`: threads and processes that it starts count too.
const INHERIT: u64 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
/// `FSOPEN_CLOEXEC`, `FSMOUNT_CLOEXEC`
const CLOEXEC: libc::c_uint = 1;

/// The kernel's trace events as a directory (tracefs) that only this descriptor leads to: it need not be mounted.
pub fn trace_files() -> Result<OwnedFd, Errno> {
    let descriptor = |rc: libc::c_long| -> Result<OwnedFd, Errno> {
        let fd = i32::try_from(Errno::result(rc)?).map_err(|_| Errno::EBADF)?;
        Ok(super::owned_fd(fd))
    };
    // SAFETY: the name is a live C string.
    let system = descriptor(unsafe { libc::syscall(libc::SYS_fsopen, c"tracefs".as_ptr(), CLOEXEC) })?;
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes neither key nor value.
    let made =
        unsafe { libc::syscall(libc::SYS_fsconfig, system.as_raw_fd(), FSCONFIG_CMD_CREATE, none, none, 0) };
    Errno::result(made)?;
    // SAFETY: no pointers.
    descriptor(unsafe { libc::syscall(libc::SYS_fsmount, system.as_raw_fd(), CLOEXEC, 0) })
}

/// The number of a trace event, `syscalls/sys_exit_read` for example.
pub fn trace_event(files: BorrowedFd<'_>, name: &str) -> Result<u64, Errno> {
    let path = format!("events/{name}/id");
    let file = openat(files, path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut text = String::new();
    let read = File::from(file).read_to_string(&mut text);
    read.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    text.trim().parse().map_err(|_| Errno::EPROTO)
}

/// Counts the events of this number in a thread, and in what it starts from now on.
pub fn count(thread: i32, event: u64) -> Result<OwnedFd, Errno> {
    // struct perf_event_attr: type and size, number, period, what to sample, what to read, bits, two more.
    let attr: [u64; 8] = [TRACEPOINT, event, 0, 0, 0, INHERIT, 0, 0];
    // SAFETY: `attr` is a live perf_event_attr of the size that it names; the kernel only reads it.
    let rc = unsafe {
        libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), thread, -1, -1, PERF_FLAG_FD_CLOEXEC)
    };
    let fd = i32::try_from(Errno::result(rc)?).map_err(|_| Errno::EBADF)?;
    Ok(super::owned_fd(fd))
}

/// How many it has counted.
pub fn counted(counter: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut count = [0; 8];
    match nix::unistd::read(counter.as_fd(), &mut count)? {
        8 => Ok(u64::from_ne_bytes(count)),
        _ => Err(Errno::EPROTO),
    }
}
