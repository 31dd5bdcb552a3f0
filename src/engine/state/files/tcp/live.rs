//! Restored connections come to life: after the process is ours and its addresses are here, before it runs.
//!
//! Until then they are in `TCP_REPAIR`. Which of them owe something to that moment (bytes that were never
//! sent, an end to be sent again, all of it where there was no route before) shows in the kernel: their
//! `TCP_REPAIR_QUEUE` is the send queue. So a service that finds them after its predecessor died knows
//! which connections are whole, and which would miss bytes: those it resets.

use std::ffi::c_int;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::{IPPROTO_IP, IPPROTO_TCP, SOL_SOCKET};
use nix::errno::Errno;
use nix::sys::socket::Shutdown;

use super::super::{CaptureFilesError, Trouble};
use super::connection::{Room, complete, lock_buffers, make, push, set_receive_buffer, set_send_buffer};
use super::list::{each_tcp, state};
use super::table::{NewSockets, value_of};
use super::{STATE_CLOSE, STATE_LISTEN, address_of, shut};
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::engine::sys::socket;
use crate::engine::sys::tcp::{self, Queue, REPAIR_OFF, REPAIR_OFF_SILENTLY};
use crate::proto::files::TcpConnection;

/// A connection that is silent yet, by a descriptor of ours. The process has the same.
#[derive(Debug)]
pub(in super::super) struct Silent {
    fd: OwnedFd,
    /// SO_REUSEADDR and IP_TRANSPARENT as they were.
    reuse: c_int,
    transparent: c_int,
    /// As far as it is still needed.
    image: TcpConnection,
    complete: bool,
}

/// What is in the kernel by now is not kept twice: of most connections that is nearly all.
fn still_needed(image: &TcpConnection, complete: bool) -> TcpConnection {
    if !complete {
        return image.clone();
    }
    TcpConnection {
        local: image.local.clone(),
        local_port: image.local_port,
        remote: image.remote.clone(),
        remote_port: image.remote_port,
        connecting: image.connecting,
        write_ended: image.write_ended,
        unsent: image.unsent.clone(),
        // For the sizes of the buffers.
        options: if image.unsent.is_empty() { Vec::new() } else { image.options.clone() },
        ..TcpConnection::default()
    }
}

/// All connections of a process that are not live yet. Dropping them leaves them silent for ever.
#[derive(Debug, Default)]
pub struct SilentConnections(Vec<Silent>);

impl SilentConnections {
    /// Makes one more, in `TCP_REPAIR`.
    pub(in super::super) fn add(
        &mut self,
        image: &TcpConnection,
        flags: c_int,
        new: &mut NewSockets,
    ) -> Result<OwnedFd, Trouble> {
        let fd = make(image, flags, new.of(image.family)?)?;
        let complete = image.connecting || complete(fd.as_fd(), image)?;
        let owes = !complete || image.connecting || image.write_ended || !image.unsent.is_empty();
        let queue = if owes { Queue::Send } else { Queue::None };
        tcp::choose_queue(fd.as_fd(), queue).map_err(Trouble::step("leaving a queue"))?;
        if complete && !(image.sent.is_empty() && image.received.is_empty()) {
            set_send_buffer(fd.as_fd(), image, Room::AsBefore)?;
            set_receive_buffer(fd.as_fd(), image, Room::AsBefore, new.of(image.family)?)?;
            lock_buffers(fd.as_fd(), image)?;
        }
        let ours =
            fd.try_clone().map_err(|e| Trouble::Step("duplicating a socket", super::super::errno_of(&e)))?;
        let value = |level, name| value_of(&image.options, level, name).unwrap_or(0);
        let reuse = value(SOL_SOCKET, libc::SO_REUSEADDR);
        let transparent = value(IPPROTO_IP, libc::IP_TRANSPARENT);
        self.0.push(Silent { fd: ours, reuse, transparent, image: still_needed(image, complete), complete });
        Ok(fd)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes those whole that could not be before their addresses were here; no packet may come meanwhile. One
    /// that cannot be is reset, and named: its stream would not be what it was.
    pub fn complete(&mut self) -> Vec<Reason> {
        let mut new = NewSockets::default();
        self.keep(|silent| silent.complete(&mut new))
    }

    /// All of them come to life. One that cannot is reset, and named, likewise.
    pub fn go_live(mut self) -> Vec<Reason> {
        let mut lost = self.complete();
        lost.extend(self.keep(|silent| silent.go_live()));
        lost
    }

    fn keep(&mut self, mut act: impl FnMut(&mut Silent) -> Result<(), Trouble>) -> Vec<Reason> {
        let mut lost = Vec::new();
        self.0.retain_mut(|silent| match act(silent) {
            Ok(()) => true,
            Err(trouble) => {
                lost.push(silent.reset(&trouble));
                false
            }
        });
        lost
    }
}

impl Silent {
    fn complete(&mut self, new: &mut NewSockets) -> Result<(), Trouble> {
        let (fd, image) = (self.fd.as_fd(), &self.image);
        if self.complete {
            return Ok(());
        }
        if !complete(fd, image)? {
            return Err(Trouble::Step("finding a route to the peer", Errno::ENETUNREACH));
        }
        set_send_buffer(fd, image, Room::AsBefore)?;
        set_receive_buffer(fd, image, Room::AsBefore, new.of(image.family)?)?;
        lock_buffers(fd, image)?;
        self.complete = true;
        Ok(())
    }

    fn go_live(&mut self) -> Result<(), Trouble> {
        let (fd, image, step) = (self.fd.as_fd(), &self.image, Trouble::step);
        tcp::choose_queue(fd, Queue::None).map_err(step("leaving a queue"))?;
        // The answer to the probe tells what the peer has got meanwhile.
        let off = if image.connecting { REPAIR_OFF_SILENTLY } else { REPAIR_OFF };
        tcp::set_repair(fd, off).map_err(step("leaving TCP_REPAIR"))?;
        let set = |level, name, value| {
            socket::set_int_option(fd, level, name, value).map_err(step("setting an option again"))
        };
        set(SOL_SOCKET, libc::SO_REUSEADDR, self.reuse)?;
        if image.connecting {
            let (remote, port) = address_of(&image.remote, image.remote_port)?;
            let connected = match tcp::connect(fd, remote, port) {
                Ok(()) | Err(Errno::EINPROGRESS) => Ok(()),
                Err(errno) => Err(Trouble::Step("connecting again", errno)),
            };
            set(IPPROTO_IP, libc::IP_TRANSPARENT, self.transparent)?;
            return connected;
        }
        set(IPPROTO_IP, libc::IP_TRANSPARENT, self.transparent)?;
        if !image.unsent.is_empty() {
            set_send_buffer(fd, image, Room::ToFill)?;
            push(fd, &image.unsent).map_err(step("sending what was not sent yet"))?;
            set_send_buffer(fd, image, Room::AsBefore)?;
            lock_buffers(fd, image)?;
        }
        if image.write_ended {
            shut(fd, Shutdown::Write)?;
        }
        Ok(())
    }

    fn reset(&self, trouble: &Trouble) -> Reason {
        reset(self.fd.as_fd());
        let end = |bytes: &[u8], port| {
            address_of(bytes, port)
                .map_or_else(|_| "?".to_owned(), |(a, p)| SocketAddr::new(a, p).to_string())
        };
        let (local, remote) =
            (end(&self.image.local, self.image.local_port), end(&self.image.remote, self.image.remote_port));
        Reason::new(format!("connection {local} to {remote}"), format!("was reset: {trouble}"), "")
    }
}

/// Ends a connection for both sides.
fn reset(fd: BorrowedFd<'_>) {
    let _ = tcp::set_repair(fd, REPAIR_OFF_SILENTLY);
    let _ = tcp::disconnect(fd);
}

/// At the destination, after the service died before they were live: the connections of a process that are
/// still silent come to life, as far as nothing of them is lost. Returns how many were reset.
///
/// # Errors
/// If the process cannot be looked at.
pub fn wake_connections(pid: Tid) -> Result<usize, CaptureFilesError> {
    let mut resets = 0;
    each_tcp(pid, |fd| {
        if tcp::is_in_repair(fd) != Ok(true) {
            return;
        }
        let queue = socket::int_option(fd, IPPROTO_TCP, libc::TCP_REPAIR_QUEUE);
        if queue == Ok(Queue::None as c_int) {
            let _ = tcp::set_repair(fd, REPAIR_OFF);
            let _ = socket::set_int_option(fd, IPPROTO_IP, libc::IP_TRANSPARENT, 0);
        } else {
            reset(fd);
            resets += 1;
        }
        set_reuse(fd);
    })?;
    Ok(resets)
}

/// At the source, after a command died while it read them: connections leave `TCP_REPAIR`.
///
/// # Errors
/// If the process cannot be looked at.
pub fn leave_repair(pid: Tid) -> Result<(), CaptureFilesError> {
    each_tcp(pid, |fd| {
        if tcp::is_in_repair(fd) == Ok(true) {
            let _ = tcp::choose_queue(fd, Queue::None);
            let _ = tcp::set_repair(fd, REPAIR_OFF_SILENTLY);
            set_reuse(fd);
        }
    })
}

/// What it was nobody knows; this way the port of the connection can be listened on again.
fn set_reuse(fd: BorrowedFd<'_>) {
    let _ = socket::set_int_option(fd, SOL_SOCKET, libc::SO_REUSEADDR, 1);
}

/// At the source, after the commit: the connections are gone from here, and nobody is told.
pub fn drop_silently(connections: Vec<OwnedFd>) {
    for fd in connections {
        silence(fd.as_fd());
    }
}

/// Likewise, by the process that has them.
///
/// # Errors
/// If the process cannot be looked at.
pub fn drop_connections(pid: Tid) -> Result<(), CaptureFilesError> {
    each_tcp(pid, |fd| {
        if !matches!(state(fd), None | Some(STATE_LISTEN | STATE_CLOSE)) {
            silence(fd);
        }
    })
}

fn silence(fd: BorrowedFd<'_>) {
    // A connection that has ended by itself refuses; there is nothing to silence then.
    if tcp::set_repair(fd, tcp::REPAIR_ON).is_ok() {
        let _ = tcp::disconnect(fd);
    }
}
