//! Restored connections come to life: after the process is ours and its addresses are here, before it runs.
//!
//! Until then they are in `TCP_REPAIR`. Which of them owe something to that moment (bytes that were never
//! sent, an end to be sent again, all of it where there was no route before) shows in the kernel: their
//! `TCP_REPAIR_QUEUE` is the send queue. So a service that finds them after its predecessor died knows
//! which connections are whole, and which would miss bytes: those it resets.

use std::collections::HashMap;
use std::ffi::c_int;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use libc::{IPPROTO_IP, IPPROTO_TCP, SOL_SOCKET};
use nix::errno::Errno;
use nix::sys::socket::Shutdown;

use super::super::{CaptureFilesError, Trouble};
use super::buffers::{Room, is_quiet, lock_buffers, set_buffers, set_send_buffer};
use super::connection::{complete, make, push};
use super::list::{each_tcp, state};
use super::recipe::Recipe;
use super::{STATE_CLOSE, STATE_LISTEN, address_of, shut};
use crate::engine::address::ip_of;
use crate::engine::many;
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::engine::sys::socket;
use crate::engine::sys::tcp::{self, Queue, REPAIR_OFF, REPAIR_OFF_SILENTLY};
use crate::proto::files::TcpConnection;

/// A connection that is silent yet, by a descriptor of ours. The process has the same.
#[derive(Debug)]
pub(in super::super) struct Silent {
    fd: Arc<OwnedFd>,
    /// Has what it gets back when it is live.
    recipe: Arc<Recipe>,
    /// As far as it is still needed.
    image: TcpConnection,
    complete: bool,
    /// A queue is chosen: see above.
    owes: bool,
    /// Nothing needs to be said when it is live.
    quiet: bool,
    /// It has nothing to say, and nobody may be at its other end, which was of this host and has ended: the kernel would
    /// answer with a reset.
    alone: bool,
}

/// Of so many connections of one local end, those that have nothing to say say nothing: a probe and its answer take
/// about as long as all the rest of waking a connection. Of fewer, each does: a peer whose last word was lost
/// is told at once. And connections that the process has opened do, each of which has a local end of its own: a
/// firewall of this host that knows connections would take what their peers send for something new.
const MANY: usize = 1000;

/// Whether it has nothing to say, and its other end may have been closed, on the same host, which then has no connection
/// any more.
fn is_alone(image: &TcpConnection) -> bool {
    let owes = image.write_ended || !image.sent.is_empty() || !image.unsent.is_empty();
    let of_this_host = || match (ip_of(&image.local), ip_of(&image.remote)) {
        (Some(local), Some(remote)) => remote.to_canonical().is_loopback() || local == remote,
        _ => false,
    };
    image.read_ended && !owes && of_this_host()
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
        send_buffer: image.send_buffer,
        ..TcpConnection::default()
    }
}

/// All connections of a process that are not live yet. Dropping them leaves them silent for ever.
#[derive(Debug, Default)]
pub struct SilentConnections(Vec<Silent>);

impl SilentConnections {
    /// These.
    pub(in super::super) fn new(all: Vec<Silent>) -> Self {
        Self(all)
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
        if self.0.iter().all(|silent| silent.complete) {
            return Vec::new();
        }
        let lost = self.keep(Silent::complete);
        self.0.iter_mut().for_each(|silent| silent.complete = true);
        lost
    }

    /// All of them come to life. One that cannot is reset, and named, likewise.
    pub fn go_live(mut self) -> Vec<Reason> {
        let mut lost = self.complete();
        let mut counts: HashMap<(Vec<u8>, u32), usize> = HashMap::new();
        let end = |image: &TcpConnection| (image.local.clone(), image.local_port);
        if self.0.len() >= MANY {
            self.0.iter().for_each(|silent| *counts.entry(end(&silent.image)).or_default() += 1);
        }
        let many = |silent: &Silent| counts.get(&end(&silent.image)).is_some_and(|count| *count >= MANY);
        lost.extend(self.keep(|silent| silent.go_live(many(silent))));
        lost
    }

    fn keep(&mut self, act: impl Fn(&Silent) -> Result<(), Trouble> + Sync) -> Vec<Reason> {
        let done = many::map(&self.0, |silent| act(silent).map_err(|trouble| silent.reset(&trouble)));
        let mut lost = Vec::new();
        let mut done = done.into_iter();
        self.0.retain(|_| match done.next() {
            Some(Err(reason)) => {
                lost.push(reason);
                false
            }
            _ => true,
        });
        lost
    }
}

impl Silent {
    /// Makes one, in `TCP_REPAIR`. `flags` are those of the description.
    pub(in super::super) fn make(
        image: &TcpConnection,
        flags: c_int,
        recipe: &Arc<Recipe>,
    ) -> Result<Self, Trouble> {
        let fd = make(image, flags, recipe)?;
        let complete = image.connecting || complete(fd.as_fd(), image)?;
        Self::of(Arc::new(fd), image, recipe, complete, false)
    }

    /// With a socket that was made, and is complete or not. `left`: no queue is chosen.
    pub(super) fn of(
        fd: Arc<OwnedFd>,
        image: &TcpConnection,
        recipe: &Arc<Recipe>,
        complete: bool,
        left: bool,
    ) -> Result<Self, Trouble> {
        let owes = !complete || image.connecting || image.write_ended || !image.unsent.is_empty();
        let queue = if owes { Queue::Send } else { Queue::None };
        if owes || !left {
            tcp::choose_queue(fd.as_fd(), queue).map_err(Trouble::step("leaving a queue"))?;
        }
        if complete && !(image.sent.is_empty() && image.received.is_empty()) {
            set_buffers(fd.as_fd(), image, Room::AsBefore, recipe)?;
        }
        let (quiet, alone) = (!image.connecting && is_quiet(image), is_alone(image));
        let recipe = recipe.clone();
        let image = still_needed(image, complete);
        Ok(Self { fd, recipe, image, complete, owes, quiet, alone })
    }

    /// The socket, which the process is to have too.
    pub(in super::super) fn socket(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }

    fn complete(&self) -> Result<(), Trouble> {
        let (fd, image) = (self.fd.as_fd(), &self.image);
        if self.complete {
            return Ok(());
        }
        if !complete(fd, image)? {
            return Err(Trouble::Step("finding a route to the peer", Errno::ENETUNREACH));
        }
        set_buffers(fd, image, Room::AsBefore, &self.recipe)
    }

    fn go_live(&self, many: bool) -> Result<(), Trouble> {
        let (fd, image, step) = (self.fd.as_fd(), &self.image, Trouble::step);
        if self.owes {
            tcp::choose_queue(fd, Queue::None).map_err(step("leaving a queue"))?;
        }
        // The answer to the probe tells what the peer has got meanwhile.
        let is_silent = image.connecting || self.alone || self.quiet && many;
        let off = if is_silent { REPAIR_OFF_SILENTLY } else { REPAIR_OFF };
        tcp::set_repair(fd, off).map_err(step("leaving TCP_REPAIR"))?;
        let set = |level, name, value| {
            socket::set_int_option(fd, level, name, value).map_err(step("setting an option again"))
        };
        set(SOL_SOCKET, libc::SO_REUSEADDR, self.recipe.reuse)?;
        if image.connecting {
            let (remote, port) = address_of(&image.remote, image.remote_port)?;
            let connected = match tcp::connect(fd, remote, port) {
                Ok(()) | Err(Errno::EINPROGRESS) => Ok(()),
                Err(errno) => Err(Trouble::Step("connecting again", errno)),
            };
            set(IPPROTO_IP, libc::IP_TRANSPARENT, self.recipe.transparent)?;
            return connected;
        }
        set(IPPROTO_IP, libc::IP_TRANSPARENT, self.recipe.transparent)?;
        if !image.unsent.is_empty() {
            set_send_buffer(fd, image, Room::ToFill)?;
            push(fd, &image.unsent).map_err(step("sending what was not sent yet"))?;
            set_send_buffer(fd, image, Room::AsBefore)?;
            lock_buffers(fd, &self.recipe)?;
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

/// Takes a connection out of the kernel without a word.
pub(super) fn silence(fd: BorrowedFd<'_>) {
    // A connection that has ended by itself refuses; there is nothing to silence then.
    if tcp::set_repair(fd, tcp::REPAIR_ON).is_ok() {
        let _ = tcp::disconnect(fd);
    }
}
