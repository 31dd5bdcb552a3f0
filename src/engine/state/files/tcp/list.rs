//! The TCP sockets of a process taken together, without touching them.

use std::collections::{HashMap, HashSet};
use std::ffi::c_int;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::{AF_INET, AF_INET6, IPPROTO_TCP, SOL_SOCKET};
use nix::errno::Errno;

use super::super::CaptureFilesError;
use super::super::scan::{Descriptors, numbers_of};
use super::connection::SYN_SENT;
use super::{QUEUED, STATE_CLOSE, STATE_LISTEN, address_of, diag};
use crate::engine::lock;
use crate::engine::remote::Tid;
use crate::engine::sys::{fds, pidfd, socket, tcp};
use crate::proto::files::TcpConnection;

/// The TCP sockets of a process that only the process itself can bring into a state that is carried, by
/// descriptors of ours: with connections that wait to be accepted, or ended with something not yet read.
pub fn unsettled(descriptors: &Descriptors) -> Vec<OwnedFd> {
    let waiting = descriptors.busy_sockets().filter(|fd| is_tcp(*fd) && is_unsettled(*fd));
    waiting.filter_map(|fd| fd.try_clone_to_owned().ok()).collect()
}

/// Whether this is still so.
pub fn is_unsettled(fd: BorrowedFd<'_>) -> bool {
    let Ok(info) = socket::option(fd, IPPROTO_TCP, libc::TCP_INFO) else { return false };
    let queued = info.get(QUEUED..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_ne_bytes(*b));
    match info.first() {
        Some(&STATE_LISTEN) => queued > 0,
        Some(&STATE_CLOSE) => super::has_error(fd) || fds::readable_bytes(fd).is_ok_and(|unread| unread > 0),
        _ => false,
    }
}

/// The other end of a connection, also of one that is being made.
pub(super) fn peer(fd: BorrowedFd<'_>) -> Result<SocketAddr, Errno> {
    match tcp::remote_address(fd) {
        Ok((ip, port, 0)) => Ok(SocketAddr::new(ip, port)),
        Ok((_, _, _)) => Err(Errno::EADDRNOTAVAIL),
        Err(Errno::ENOTCONN) if state(fd) == Some(SYN_SENT) => {
            let inode = nix::sys::stat::fstat(fd)?.st_ino;
            diag::connecting_to(inode)?.ok_or(Errno::ENOTCONN)
        }
        Err(errno) => Err(errno),
    }
}

/// The state of a TCP socket, as the kernel numbers them.
pub(super) fn state(fd: BorrowedFd<'_>) -> Option<u8> {
    socket::option(fd, IPPROTO_TCP, libc::TCP_INFO).ok()?.first().copied()
}

/// Calls `act` with each TCP socket of a process.
pub(super) fn each_tcp(pid: Tid, mut act: impl FnMut(BorrowedFd<'_>)) -> Result<(), CaptureFilesError> {
    let (process, numbers) = numbers_of(pid)?;
    for number in numbers {
        // One that was closed meanwhile is none.
        let Ok(fd) = pidfd::take_fd(process.as_fd(), number) else { continue };
        if is_tcp(fd.as_fd()) {
            act(fd.as_fd());
        }
    }
    Ok(())
}

pub(super) fn is_tcp(fd: BorrowedFd<'_>) -> bool {
    let option = |name: c_int| socket::int_option(fd, SOL_SOCKET, name);
    option(libc::SO_PROTOCOL) == Ok(IPPROTO_TCP)
        && matches!(option(libc::SO_DOMAIN), Ok(AF_INET | AF_INET6))
        && option(libc::SO_TYPE) == Ok(libc::SOCK_STREAM)
}

/// What shows only when all connections of a process are known: its reasons, each with the place of its
/// connection in `all`. `still`: the process stands still, and the queues were read. Of those in `quiet` the kernel
/// has nothing more to say. `listening`: where the process listens, if what waits to be accepted there comes along.
///
/// - A connection to another process of this very host: its other end would stay where the address does
///   not lead any more. Not so one that waits to be accepted by the process itself, or will, or was closed.
/// - One to the process itself whose two ends do not fit together.
/// - What the kernel says only from outside, see [`diag`].
pub(in super::super) fn examine<'a>(
    all: impl Iterator<Item = (usize, &'a TcpConnection)>,
    quiet: &HashSet<usize>,
    listening: &HashSet<SocketAddr>,
    still: bool,
) -> Result<Vec<(usize, String)>, Errno> {
    let all: Vec<_> = all.filter_map(|(at, image)| Some((at, image, ends(image)?))).collect();
    // Only these can be other ends of each other.
    let places: HashSet<IpAddr> = all.iter().map(|(_, _, (local, _))| local.ip().to_canonical()).collect();
    let index: HashMap<_, _> = all
        .iter()
        .filter(|(_, _, (_, remote))| places.contains(&remote.ip().to_canonical()))
        .map(|(_, image, (local, remote))| ((canonical(*local), canonical(*remote)), *image))
        .collect();
    // Those whose other end is of this host, and not among all.
    let is_half = |local: SocketAddr, remote: SocketAddr| {
        !index.contains_key(&(remote, local)) && (remote.ip().is_loopback() || remote.ip() == local.ip())
    };
    let halves = all.iter().map(|(_, _, (local, remote))| (canonical(*local), canonical(*remote)));
    let halves = halves.filter(|(local, remote)| is_half(*local, *remote));
    let others: Vec<_> = halves.map(|(local, remote)| (remote, local)).collect();
    let others: HashMap<_, _> = others.iter().copied().zip(diag::ends_of(&others)?).collect();
    let needs_nobody = |image: &TcpConnection, local: SocketAddr, remote: SocketAddr| {
        let end = others.get(&(remote, local)).copied().flatten();
        let is_own = lock::is_at(remote, listening);
        // It asks again at the destination; or its other end waits for the process itself, or was closed, and all of it
        // has come.
        is_own && (image.connecting || end.is_some_and(|end| end.waits()))
            || image.read_ended && !end.is_some_and(|end| end.is_held())
    };
    let is_asked = |at: &usize| !quiet.contains(at);
    let asked: Vec<_> = all.iter().filter(|(at, ..)| is_asked(at)).map(|(_, _, ends)| *ends).collect();
    let mut answers = diag::ask(&asked)?.into_iter();
    let mut found = Vec::new();
    for (at, image, (local, remote)) in &all {
        let seen = if is_asked(at) { answers.next().flatten() } else { None };
        let (local, remote) = (canonical(*local), canonical(*remote));
        let why = match (index.get(&(remote, local)), seen) {
            (None, _) if is_half(local, remote) && !needs_nobody(image, local, remote) => {
                format!("is a TCP connection to another process of this host ({remote})")
            }
            (Some(other), _) if still && !fit(image, other) => {
                "is a TCP connection to the process itself that changes while it stands still".to_owned()
            }
            (_, Some(seen)) if seen.signed => {
                "is a TCP connection with signed segments (TCP_MD5SIG)".to_owned()
            }
            (_, Some(seen)) if still && hides(image, seen) => {
                "is a TCP connection with urgent data in its unread input".to_owned()
            }
            _ => continue,
        };
        found.push((*at, why));
    }
    Ok(found)
}

fn ends(image: &TcpConnection) -> Option<(SocketAddr, SocketAddr)> {
    let (local, port) = address_of(&image.local, image.local_port).ok()?;
    let (remote, remote_port) = address_of(&image.remote, image.remote_port).ok()?;
    Some((SocketAddr::new(local, port), SocketAddr::new(remote, remote_port)))
}

fn canonical(end: SocketAddr) -> SocketAddr {
    SocketAddr::new(end.ip().to_canonical(), end.port())
}

/// What one end holds as acknowledged must have come to the other.
fn fit(sender: &TcpConnection, receiver: &TcpConnection) -> bool {
    let come = receiver.receive_sequence.wrapping_add(u32::try_from(receiver.received.len()).unwrap_or(0));
    let ahead = come.wrapping_sub(sender.send_sequence);
    sender.connecting || receiver.connecting || ahead < 1 << 31
}

/// Whether there is more unread than what reading gives before an urgent byte. An end counts as a byte.
fn hides(image: &TcpConnection, seen: diag::Seen) -> bool {
    seen.unread as usize > image.received.len() + usize::from(image.read_ended)
}
