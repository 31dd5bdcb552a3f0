//! Classic packet filters of sockets (`SO_ATTACH_FILTER`), and whether they are locked.

use std::os::fd::BorrowedFd;

use libc::SOL_SOCKET;
use nix::errno::Errno;

use super::{Stop, Trouble};
use crate::engine::sys::{datagram, socket};
use crate::proto::files::Filter;

pub(super) fn capture(fd: BorrowedFd<'_>) -> Result<Option<Filter>, Stop> {
    let program = match datagram::filter(fd) {
        Ok(program) => program,
        // The kernel does not keep the program of an eBPF filter with the socket.
        Err(Errno::EACCES) => {
            return Err(Stop::refuse("is a socket with an eBPF packet filter, which cannot be carried"));
        }
        Err(errno) => return Err(Stop::Failed { step: "reading a packet filter", errno }),
    };
    let locked = socket::int_option(fd, SOL_SOCKET, libc::SO_LOCK_FILTER)
        .map_err(Stop::failed("asking whether a packet filter is locked"))?;
    let none = program.is_empty() && locked == 0;
    Ok((!none).then_some(Filter { program, locked: locked != 0 }))
}

/// Sets a filter; the last thing that is done to a socket, as it may drop what we put into its queue.
pub(super) fn apply(fd: BorrowedFd<'_>, image: Option<&Filter>) -> Result<(), Trouble> {
    let Some(image) = image else { return Ok(()) };
    if image.program.len() > datagram::FILTER_INSTRUCTIONS * datagram::INSTRUCTION_BYTES {
        return Err(Trouble::Invalid("a packet filter's length"));
    }
    if !image.program.is_empty() {
        datagram::attach_filter(fd, &image.program).map_err(Trouble::step("attaching a packet filter"))?;
    }
    if image.locked {
        socket::set_int_option(fd, SOL_SOCKET, libc::SO_LOCK_FILTER, 1)
            .map_err(Trouble::step("locking a packet filter"))?;
    }
    Ok(())
}
