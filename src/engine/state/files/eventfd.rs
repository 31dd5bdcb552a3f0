//! eventfd: its counter and whether reads take one (semaphore).

use std::os::fd::{AsFd, OwnedFd};

use super::scan::Open;
use super::{Stop, Trouble};
use crate::engine::sys::fds;
use crate::proto::files::EventFd;

pub(super) fn capture(open: &Open) -> Result<EventFd, Stop> {
    let count = open.field("eventfd-count").and_then(|s| u64::from_str_radix(s, 16).ok());
    let semaphore = open.field("eventfd-semaphore").and_then(|s| s.parse::<u32>().ok());
    match (count, semaphore) {
        (Some(count), Some(semaphore)) => Ok(EventFd { count, semaphore: semaphore != 0 }),
        _ => {
            Err(Stop::refuse("is an eventfd, and this kernel does not tell its counter and kind (6.5 does)"))
        }
    }
}

pub(super) fn make(image: &EventFd) -> Result<OwnedFd, Trouble> {
    let fd = fds::eventfd(0, image.semaphore).map_err(Trouble::step("making an eventfd"))?;
    if image.count > 0 {
        // Never blocks: the counter was zero, and the largest one that a write takes is one below the top.
        let count = image.count.min(u64::MAX - 1);
        nix::unistd::write(fd.as_fd(), &count.to_ne_bytes())
            .map_err(Trouble::step("setting the counter of an eventfd"))?;
    }
    Ok(fd)
}
