//! Connections that wait to be accepted: taken out of the queues of listening sockets, when the process that might have
//! accepted them will never run here again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::{IPPROTO_TCP, SOL_SOCKET};
use nix::errno::Errno;

use super::connection::{self, POLLED, Seen};
use super::live::silence;
use super::{Captures, settled};
use crate::engine::reason::Reason;
use crate::engine::state::files::Stop;
use crate::engine::sys::{fds, socket};
use crate::proto::files::TcpConnection;

/// What was taken.
#[derive(Debug, Default)]
pub struct TakenQueues {
    /// The connections, in the order in which they would have been accepted. They are gone from here, in silence.
    pub connections: Vec<TcpConnection>,
    /// Those that are lost, and why. To be ended for their peers.
    pub lost: Vec<(OwnedFd, Reason)>,
}

/// Takes what waits at those of `sockets` that listen, at most `most` connections.
pub fn take_queued(sockets: &[OwnedFd], most: usize) -> TakenQueues {
    let all = Captures::new(true);
    let mut taken = TakenQueues::default();
    for listening in sockets.iter().map(AsFd::as_fd).filter(|fd| is_listening(*fd)) {
        // A queue that is empty by now must not be waited for. Nobody will read this flag.
        if fds::set_status_flags(listening, libc::O_NONBLOCK).is_err() {
            continue;
        }
        while taken.connections.len() < most {
            let fd = match socket::accept(listening) {
                Ok(fd) => fd,
                // One that was broken before it was accepted.
                Err(Errno::ECONNABORTED) => continue,
                Err(_) => break,
            };
            match read(fd.as_fd(), &all) {
                Ok(image) => {
                    silence(fd.as_fd());
                    taken.connections.push(image);
                }
                Err(stop) => {
                    let why = match stop {
                        Stop::Refused { why, .. } => why,
                        Stop::Failed { step, errno } => format!("could not be read: {step}: {errno}"),
                    };
                    let object = match super::list::peer(fd.as_fd()) {
                        Ok(peer) => format!("connection not accepted yet, of {peer}"),
                        Err(_) => "connection not accepted yet".to_owned(),
                    };
                    taken.lost.push((fd, Reason::new(object, format!("is lost: it {why}"), "")));
                }
            }
        }
    }
    taken
}

fn read(fd: BorrowedFd<'_>, all: &Captures) -> Result<TcpConnection, Stop> {
    let mut info = [0; socket::VALUE_BYTES];
    let info = socket::read_option(fd, IPPROTO_TCP, libc::TCP_INFO, &mut info)
        .map_err(Stop::failed("reading TCP_INFO"))?;
    let state = *info.first().ok_or(Stop::Failed { step: "understanding TCP_INFO", errno: Errno::EPROTO })?;
    let family = socket::int_option(fd, SOL_SOCKET, libc::SO_DOMAIN)
        .map_err(Stop::failed("asking what a socket is"))?;
    let (address, port, scope) =
        socket::local_address(fd).map_err(Stop::failed("asking for a local address"))?;
    if scope != 0 {
        return Err(Stop::refuse("is a TCP socket with a link-local address, which cannot be carried"));
    }
    let polled = fds::poll_now(fd, POLLED).map_err(Stop::failed("polling a TCP socket"))?;
    let options = settled(fd, family, &all.sets)?;
    let seen = Seen { fd, family, state, info, local: (address, port), polled, options };
    connection::capture(&seen, all)
}

/// Whether a socket waits for connections.
pub fn is_listening(fd: BorrowedFd<'_>) -> bool {
    super::list::is_tcp(fd) && socket::int_option(fd, SOL_SOCKET, libc::SO_ACCEPTCONN) == Ok(1)
}

/// Why the queue of this socket cannot be carried, if so.
pub(super) fn refuse_queue(fd: BorrowedFd<'_>, queued: u32) -> Result<(), Stop> {
    let is_set = |level, name| socket::int_option(fd, level, name).is_ok_and(|value| value != 0);
    let refuse = |which: &str| {
        Err(Stop::refuse(format!(
            "is a listening socket {which} with {queued} connections not accepted yet, which cannot be carried"
        )))
    };
    // What begins them comes by the loopback device, and is not what the peer has sent.
    if is_set(SOL_SOCKET, libc::SO_BINDTOIFINDEX) {
        return refuse("bound to a device");
    }
    if is_set(IPPROTO_TCP, libc::TCP_SAVE_SYN) {
        return refuse("that keeps requests (TCP_SAVE_SYN)");
    }
    Ok(())
}
