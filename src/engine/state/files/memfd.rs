//! Descriptors of memfds. What is in one is an object of the memory map (`state::objects`).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::{Whence, lseek};

use super::scan::Open;
use super::{Stop, Trouble};
use crate::engine::state::objects::{Objects, id_of_memfd};
use crate::engine::sys::fds;
use crate::proto::files::MemFile;

/// `None`: it is something else.
pub(super) fn capture(open: &Open) -> Option<Result<MemFile, Stop>> {
    if !open.link_starts_with("/memfd:") {
        return None;
    }
    let (object, _) = id_of_memfd(&open.stat)?;
    if open.has_locks() {
        return Some(Err(Stop::refuse("holds file locks, which cannot be carried yet")));
    }
    Some(Ok(MemFile { object, position: open.position }))
}

/// Opens the object anew, by ours of it.
pub(super) fn make(image: &MemFile, flags: i32, objects: &Objects) -> Result<OwnedFd, Trouble> {
    let object = objects.fd(image.object).ok_or(Trouble::Invalid("a memfd that is not in the memory map"))?;
    let path = format!("/proc/self/fd/{}", object.as_raw_fd());
    let not_reopened = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC;
    let flags = OFlag::from_bits_retain(flags & !not_reopened) | OFlag::O_CLOEXEC;
    let fd =
        nix::fcntl::open(path.as_str(), flags, Mode::empty()).map_err(Trouble::step("opening a memfd"))?;
    if image.position != 0 && fds::status_flags(fd.as_fd()).is_ok_and(|f| f & libc::O_PATH == 0) {
        let position = i64::try_from(image.position).map_err(|_| Trouble::Invalid("a file position"))?;
        lseek(fd.as_fd(), position, Whence::SeekSet).map_err(Trouble::step("setting a memfd's position"))?;
    }
    Ok(fd)
}
