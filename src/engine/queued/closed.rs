//! The other end of a connection that waits, where it was of the same host and was closed: nobody has it, but its kernel
//! still knew it for a while, and answered no segment with a reset. So one is made, and closed.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use libc::{IPPROTO_IP, IPPROTO_TCP, SOL_SOCKET};
use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};

use super::program::PASSES;
use crate::engine::address::end_of;
use crate::engine::sys::socket;
use crate::engine::sys::tcp::{self, Queue, REPAIR_OFF_SILENTLY, REPAIR_ON};
use crate::proto::files::TcpConnection;

/// What it says that it takes, and what it may send.
const WINDOW: u32 = 65_535;

/// Such an end. It says nothing yet, but whoever speaks to it is not told that there is none.
#[derive(Debug)]
pub struct Closed(OwnedFd);

impl Closed {
    /// The ends that belong to these.
    pub fn make<'a>(images: impl Iterator<Item = &'a TcpConnection>) -> Vec<Self> {
        let make = |image: &TcpConnection| {
            // Without it the kernel says that there is none, as after a minute at the source.
            let failed = |errno: &Errno| {
                tracing::warn!(%errno, port = image.remote_port, "the closed end of a connection is not there");
            };
            make(image).inspect_err(failed).ok().map(Self)
        };
        images.filter_map(make).collect()
    }

    /// Closes it, once the connection is placed, which may hear only us.
    pub fn close(self) {
        let Self(fd) = self;
        // Passes the lock.
        let marked = socket::set_int_option(fd.as_fd(), SOL_SOCKET, libc::SO_MARK, PASSES.cast_signed());
        let ended = marked
            .and_then(|()| tcp::set_repair(fd.as_fd(), REPAIR_OFF_SILENTLY))
            .and_then(|()| shutdown(fd.as_raw_fd(), Shutdown::Write));
        if let Err(errno) = ended {
            tracing::warn!(%errno, "the closed end of a connection does not end");
        }
    }
}

fn make(image: &TcpConnection) -> Result<OwnedFd, Errno> {
    let ends = (end_of(&image.remote, image.remote_port), end_of(&image.local, image.local_port));
    let (Some(local), Some(remote)) = ends else { return Err(Errno::EINVAL) };
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let socket = socket::socket(family, libc::SOCK_STREAM, IPPROTO_TCP)?;
    let fd = socket.as_fd();
    tcp::set_repair(fd, REPAIR_ON)?;
    socket::set_int_option(fd, IPPROTO_IP, libc::IP_TRANSPARENT, 1)?;
    // Its end has come, and is counted; it is sent once more, with the same number.
    let bytes = u32::try_from(image.received.len()).unwrap_or(0);
    let sent = image.receive_sequence.wrapping_add(bytes).wrapping_sub(1);
    let received = image.send_sequence;
    for (queue, sequence) in [(Queue::Receive, received), (Queue::Send, sent)] {
        tcp::choose_queue(fd, queue)?;
        tcp::set_sequence(fd, sequence)?;
    }
    socket::bind(fd, local.ip(), local.port())?;
    tcp::connect(fd, remote.ip(), remote.port())?;
    // struct tcp_repair_window: what the peer has said last, and when; what was said to it, and when.
    let window = [received, WINDOW, WINDOW, WINDOW, received].map(u32::to_ne_bytes).concat();
    socket::set_option(fd, IPPROTO_TCP, libc::TCP_REPAIR_WINDOW, &window)?;
    tcp::choose_queue(fd, Queue::None)?;
    Ok(socket)
}
