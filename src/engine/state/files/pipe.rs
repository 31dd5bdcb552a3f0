//! Pipes whose ends are all inside the process: size, unread data with its packet boundaries, closed ends.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::scan::Open;
use super::{Stop, Trouble};
use crate::engine::sys::fds;
use crate::proto::files::Pipe;

/// Largest pipe that we take from a peer.
const PIPE_BYTES: u32 = 64 << 20;

/// Whether the other side of this end is closed everywhere.
pub(super) fn other_side_closed(open: &Open) -> bool {
    fds::poll_now(open.fd(), 0).is_ok_and(|seen| seen & (libc::POLLHUP | libc::POLLERR) != 0)
}

/// Reads a pipe without consuming anything. `reader` is any end for reading; without one nobody can ever
/// read what is in it.
pub(super) fn capture(reader: Option<&Open>, any: &Open, contents: bool) -> Result<Pipe, Stop> {
    let failed = Stop::failed;
    let size = fds::pipe_size(any.fd()).map_err(failed("asking for a pipe's size"))?;
    let mut image = Pipe { size: u32::try_from(size).unwrap_or(u32::MAX), ..Pipe::default() };
    let Some(reader) = reader.filter(|_| contents) else { return Ok(image) };
    let unread = fds::readable_bytes(reader.fd()).map_err(failed("asking for a pipe's contents"))?;
    if unread == 0 {
        return Ok(image);
    }
    let (copy_out, copy_in) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK)
            .map_err(failed("making a pipe"))?;
    fds::set_pipe_size(copy_in.as_fd(), size).map_err(failed("sizing a pipe"))?;
    let copied = fds::tee(reader.fd(), copy_in.as_fd(), unread).map_err(failed("copying a pipe (tee)"))?;
    if copied != unread {
        return Err(Stop::Failed { step: "copying a pipe (tee) as a whole", errno: Errno::EIO });
    }
    let mut copy_out = std::fs::File::from(copy_out);
    let mut buffer = vec![0u8; unread];
    let mut left = unread;
    while left > 0 {
        let n =
            copy_out.read(&mut buffer).map_err(|e| failed("reading a pipe's copy")(super::errno_of(&e)))?;
        // A read that ends early ends at a packet's end.
        image.packet_mode |= n < left;
        image.packets.push(buffer.get(..n).unwrap_or_default().to_vec());
        left = left.saturating_sub(n.max(1));
    }
    // A single packet looks like a stream: the write end tells.
    image.packet_mode |= any.access() == libc::O_WRONLY && any.flags & libc::O_DIRECT != 0;
    Ok(image)
}

/// A pipe made anew: its end for reading, its end for writing.
pub(super) fn make(image: &Pipe) -> Result<(OwnedFd, OwnedFd), Trouble> {
    if image.size > PIPE_BYTES || image.packets.iter().map(Vec::len).sum::<usize>() > PIPE_BYTES as usize {
        return Err(Trouble::Invalid("a pipe's size"));
    }
    let step = Trouble::step;
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(step("making a pipe"))?;
    if fds::pipe_size(write.as_fd()).ok() != usize::try_from(image.size).ok() {
        fds::set_pipe_size(write.as_fd(), image.size as usize).map_err(step("sizing a pipe"))?;
    }
    let packet_flag = if image.packet_mode { libc::O_DIRECT } else { 0 };
    fds::set_status_flags(write.as_fd(), libc::O_NONBLOCK | packet_flag).map_err(step("preparing a pipe"))?;
    for packet in &image.packets {
        write_whole(write.as_fd(), packet).map_err(step("filling a pipe"))?;
    }
    fds::set_status_flags(write.as_fd(), 0).map_err(step("preparing a pipe"))?;
    Ok((read, write))
}

fn write_whole(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    match nix::unistd::write(fd, bytes)? {
        n if n == bytes.len() => Ok(()),
        _ => Err(Errno::EAGAIN),
    }
}
