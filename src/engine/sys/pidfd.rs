//! Process descriptors: a process that cannot be mistaken for a later one with the same number.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

/// An open process descriptor.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens the process that has this number now. Check its start time afterwards: see [`super::super::alive`].
    ///
    /// # Errors
    /// `ESRCH` if there is none.
    pub fn open(pid: u32) -> Result<Self, Errno> {
        // SAFETY: takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: the call just made this descriptor and nothing else knows of it. It is close-on-exec.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// `ESRCH` if it is gone (a zombie takes signals without effect).
    pub fn signal(&self, signal: Signal) -> Result<(), Errno> {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        let number = libc::c_long::from(signal as i32);
        // SAFETY: the descriptor is open for the whole call; without a siginfo the kernel reads no memory.
        let rc =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), number, no_info, 0) };
        Errno::result(rc).map(|_| ())
    }

    /// Whether the process (all its threads) has ended, waiting for it up to `timeout`.
    ///
    /// # Errors
    /// If polling fails.
    pub fn ended(&self, timeout: PollTimeout) -> Result<bool, Errno> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, timeout) {
                Err(Errno::EINTR) => {}
                other => return other.map(|ready| ready > 0),
            }
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A duplicate of descriptor `number` of the process, sharing its open file description
/// (pidfd_getfd(2)).
///
/// # Errors
/// `EBADF` if it has no such descriptor, `ESRCH` if it is gone.
pub fn take_fd(process: BorrowedFd<'_>, number: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: takes integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the call just made this descriptor and nothing else knows of it. It is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
