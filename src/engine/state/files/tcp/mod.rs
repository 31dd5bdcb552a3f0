//! TCP sockets: those that listen or have no connection, and connections, carried or given up.
//!
//! A live connection is carried with `--tcp-established`: see [`connection`] and [`live`].
//!
//! A connection given up with `--tcp-close` is only described at the source. The destination makes a
//! socket as a connection leaves it that the network has ended: it reads EOF, writes give EPIPE, poll
//! says POLLHUP, the local address is the old one, the peer's is gone. It never was connected, so it
//! cannot send a packet. (A socket left in TCP_REPAIR would keep the peer's address, but its reads fail
//! with EPERM; with repair off it sends its FIN again and again.) The peer learns of the end from the
//! source, by [`close_peers`] after the commit.

mod ahead;
mod buffers;
mod connection;
mod diag;
mod glance;
mod list;
mod live;
mod queued;
mod recipe;
mod table;

use std::collections::HashMap;
use std::ffi::c_int;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use libc::{AF_INET, AF_INET6, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, SOL_SOCKET};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};

use super::inet::ip_of;
use super::options::{self, COMMON, TCP, TCP_DEAD};
use super::scan::Open;
use super::{FilesOptions, Stop, Trouble};
use crate::engine::address::octets;
use crate::engine::reason::Reason;
use crate::engine::sys::tcp::REPAIR_OFF_SILENTLY;
use crate::engine::sys::{datagram, fds, socket, tcp};
use crate::proto::files::{OptionSet, SocketOption, TcpClosed, TcpConnection, TcpSocket};
use connection::{POLLED, QueueRoom};
pub(super) use table::{Known, Sets};

pub use ahead::{AheadSockets, MOST_AHEAD};
pub use connection::MOST_QUEUED_BYTES;
pub(in crate::engine) use diag::{abort_half, ends_of, received_by, remove_remains};
pub(super) use glance::{Glance, Seen};
pub(super) use list::examine;
pub use list::{is_unsettled, unsettled};
pub(super) use live::Silent;
pub use live::{SilentConnections, drop_connections, drop_silently, leave_repair, wake_connections};
pub use queued::{TakenQueues, is_listening, take_queued};

/// Headers of IPv6 that are sent with each segment.
const EXTENSIONS: [c_int; 4] =
    [libc::IPV6_HOPOPTS, libc::IPV6_RTHDRDSTOPTS, libc::IPV6_RTHDR, libc::IPV6_DSTOPTS];
const STATE_SYN_SENT: u8 = connection::SYN_SENT;
const STATE_CLOSE: u8 = 7;
const STATE_LISTEN: u8 = 10;
/// Where TCP_INFO of a listening socket has the length of its accept queue.
const QUEUED: usize = 24;
/// Most bytes of unread input that [`close_peers`] discards per connection.
const DRAIN_BYTES: usize = 256 << 20;

/// A port that must be free at the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenPort {
    /// Where it listens.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// Others with the same option may share it.
    pub reuseport: bool,
    /// An IPv6 socket that leaves IPv4 alone.
    pub v6only: bool,
}

impl From<&ListenPort> for crate::proto::control::Port {
    fn from(port: &ListenPort) -> Self {
        let address = octets(port.address);
        Self { address, port: port.port.into(), reuseport: port.reuseport, v6only: port.v6only }
    }
}

impl TryFrom<&crate::proto::control::Port> for ListenPort {
    type Error = Reason;

    fn try_from(port: &crate::proto::control::Port) -> Result<Self, Reason> {
        let bad = || Reason::new("plan", "names a listening port that makes no sense", "");
        Ok(Self {
            address: ip_of(&port.address).map_err(|_| bad())?,
            port: port.port.try_into().map_err(|_| bad())?,
            reuseport: port.reuseport,
            v6only: port.v6only,
        })
    }
}

/// What a TCP socket turned out to be.
#[derive(Debug)]
pub(super) enum Tcp {
    Idle(TcpSocket),
    Dead { image: TcpClosed, close_later: bool },
    Live(TcpConnection),
}

/// What the looks at all TCP sockets of a process have in common. Several threads may use it.
#[derive(Debug)]
pub(super) struct Captures {
    sets: Sets,
    /// The options of connections, by inode, that need not be read any more.
    known: HashMap<u64, Known>,
    /// What was seen at a glance, now that the process stands still.
    seen: Option<Seen>,
    /// None: queues are not read.
    room: Option<QueueRoom>,
}

impl Captures {
    /// `queues`: what is in queues is read too.
    pub(super) fn new(queues: bool) -> Self {
        Self { sets: Sets::default(), known: HashMap::new(), seen: None, room: queues.then(QueueRoom::new) }
    }

    /// With the queues, after what was seen before and is so still, and what was seen at a glance since the process
    /// stands still.
    pub(super) fn after(known: Option<(Sets, HashMap<u64, Known>)>, seen: Option<Seen>) -> Self {
        let (sets, known) = known.unwrap_or_default();
        Self { sets, known, seen, ..Self::new(true) }
    }

    /// What was seen at a glance.
    pub(super) fn seen(&self) -> Option<&Seen> {
        self.seen.as_ref()
    }

    /// A connection that is quiet, where all of it was seen without asking its socket.
    pub(super) fn quiet(&self, open: &Open) -> Option<TcpConnection> {
        let inode = open.stat.ino();
        let image = self.seen.as_ref()?.quiet(open.number, inode)?;
        with_options(image, self.known.get(&inode)?)
    }

    /// The family of a socket that is known to be a connection.
    pub(super) fn family_of(&self, open: &Open) -> Option<c_int> {
        self.known.get(&open.stat.ino()).map(|known| known.family)
    }

    fn room(&self) -> Option<&QueueRoom> {
        self.room.as_ref()
    }

    /// The sets of options that connections were found to have, by number.
    pub(super) fn into_sets(self) -> Vec<OptionSet> {
        self.sets.into_all()
    }
}

/// A connection that was seen at a glance, with the options that it is known to have.
pub(super) fn with_options(image: TcpConnection, known: &Known) -> Option<TcpConnection> {
    (image.family == known.family).then_some(TcpConnection { option_set: known.number, ..image })
}

/// Reads a TCP socket of this family; the queues of a live connection only if there is room for them.
pub(super) fn capture(
    open: &Open,
    family: c_int,
    allowed: &FilesOptions,
    all: &Captures,
) -> Result<Tcp, Stop> {
    let fd = open.fd();
    let mut info = [0; socket::VALUE_BYTES];
    let info = socket::read_option(fd, IPPROTO_TCP, libc::TCP_INFO, &mut info)
        .map_err(Stop::failed("reading TCP_INFO"))?;
    let state = *info.first().ok_or(Stop::Failed { step: "understanding TCP_INFO", errno: Errno::EPROTO })?;
    // Of a listening socket: the length of the accept queue, and its limit.
    let word = |at: usize| info.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_ne_bytes(*b));
    let (queued, backlog) = (word(QUEUED), word(QUEUED + 4));
    let (address, port, scope) =
        socket::local_address(fd).map_err(Stop::failed("asking for a local address"))?;
    if scope != 0 {
        return Err(Stop::refuse("is a TCP socket with a link-local address, which cannot be carried"));
    }
    let polled = fds::poll_now(fd, POLLED).map_err(Stop::failed("polling a TCP socket"))?;
    // A socket that never was connected shows POLLHUP too, but not the end of input.
    let was_connected = polled & libc::POLLRDHUP != 0;
    // What waits for a running process is no reason against a move: it gets a moment to take it, see
    // [`unsettled`].
    let gives_way = allowed.tcp_close || allowed.tcp_established && all.room.is_none();
    if state == STATE_LISTEN || state == STATE_CLOSE && !was_connected {
        let listening = state == STATE_LISTEN;
        if listening && queued > 0 && allowed.tcp_queued {
            queued::refuse_queue(fd, queued)?;
        }
        let gives_way = gives_way || allowed.tcp_queued;
        return idle(open, family, listening, (address, port), (queued, backlog), gives_way).map(Tcp::Idle);
    }
    if state != STATE_CLOSE && allowed.tcp_established {
        let options = match all.known.get(&open.stat.ino()) {
            Some(known) => known.clone(),
            None => settled(fd, family, &all.sets)?,
        };
        let local = (address, port);
        let seen = connection::Seen { fd, family, state, info, local, polled, options };
        return connection::capture(&seen, all).map(Tcp::Live);
    }
    let remedy = "use --tcp-close to give connections up";
    if state != STATE_CLOSE && !allowed.tcp_close {
        let what = if state == STATE_SYN_SENT {
            "a TCP connection being made"
        } else {
            "an established TCP connection"
        };
        let with = list::peer(fd).map_or_else(|_| String::new(), |peer| format!(" with {peer}"));
        return Err(Stop::advise(
            format!("is {what}{with}"),
            "use --tcp-established to move connections along, or --tcp-close to give them up",
        ));
    }
    if state == STATE_CLOSE && !gives_way {
        if has_error(fd) {
            return Err(Stop::advise(
                "is a TCP connection that ended with an error not yet reported",
                remedy,
            ));
        }
        let unread = fds::readable_bytes(fd).map_err(Stop::failed("asking what was not read"))?;
        if unread > 0 {
            let why = format!("is a TCP connection that has ended, with {unread} bytes not read");
            return Err(Stop::advise(why, remedy));
        }
    }
    let options = options::capture(fd, &[TCP_DEAD])?;
    let image = TcpClosed { family, address: octets(address), port: port.into(), options };
    Ok(Tcp::Dead { image, close_later: state != STATE_CLOSE })
}

/// What may hang on any TCP socket, and is not carried.
fn check_attachments(fd: BorrowedFd<'_>, v6: bool) -> Result<(), Stop> {
    if !socket::option(fd, IPPROTO_TCP, libc::TCP_ULP).unwrap_or_default().is_empty() {
        return Err(Stop::refuse("is a TCP socket with an upper layer protocol (kernel TLS or the like)"));
    }
    if !matches!(datagram::filter(fd), Ok(filter) if filter.is_empty()) {
        return Err(Stop::refuse("is a TCP socket with a packet filter (BPF), which cannot be carried yet"));
    }
    let extends = |name| socket::option(fd, IPPROTO_IPV6, name).is_ok_and(|value| !value.is_empty());
    if !socket::option(fd, IPPROTO_IP, libc::IP_OPTIONS).unwrap_or_default().is_empty()
        || v6 && EXTENSIONS.iter().any(|name| extends(*name))
    {
        return Err(Stop::refuse(
            "is a TCP socket with IP options or extension headers, which cannot be carried yet",
        ));
    }
    if tcp::has_authentication(fd).map_err(Stop::failed("asking for keys of TCP-AO"))? {
        return Err(Stop::refuse("is a TCP socket with signed segments (TCP-AO)"));
    }
    Ok(())
}

/// What only setsockopt(2) gives to a connection: the number of its options; or why it cannot be carried.
fn settled(fd: BorrowedFd<'_>, family: c_int, sets: &Sets) -> Result<Known, Stop> {
    check_attachments(fd, family == AF_INET6)?;
    let options = sets.read(fd, family)?;
    connection::refuse_rare(fd, &options)?;
    Ok(options)
}

/// The options of a connection that is carried; `None` for another socket, and if they are a reason against a move.
pub(super) fn options_of_connection(fd: BorrowedFd<'_>, sets: &Sets) -> Option<Known> {
    if !list::is_tcp(fd) || matches!(list::state(fd), None | Some(STATE_LISTEN | STATE_CLOSE)) {
        return None;
    }
    let family = socket::int_option(fd, SOL_SOCKET, libc::SO_DOMAIN).ok()?;
    settled(fd, family, sets).ok()
}

fn has_error(fd: BorrowedFd<'_>) -> bool {
    fds::poll_now(fd, 0).is_ok_and(|seen| seen & libc::POLLERR != 0)
}

fn idle(
    open: &Open,
    family: c_int,
    listening: bool,
    (address, port): (IpAddr, u16),
    (queued, backlog): (u32, u32),
    gives_way: bool,
) -> Result<TcpSocket, Stop> {
    let fd = open.fd();
    if listening && queued > 0 && !gives_way {
        let why = format!("is a listening socket with {queued} connections not accepted yet");
        return Err(Stop::advise(why, "use --tcp-close to give connections up, or try again"));
    }
    check_attachments(fd, family == AF_INET6)?;
    if listening && diag::has_keys(SocketAddr::new(address, port)).map_err(Stop::failed("asking for keys"))? {
        return Err(Stop::refuse("is a listening socket with signed segments (TCP_MD5SIG)"));
    }
    let mut options = options::capture(fd, &[COMMON, TCP, &FREEBIND])?;
    options.extend(options::capture_buffers(fd)?);
    let bound = port != 0;
    if !bound && !address.is_unspecified() {
        return Err(Stop::refuse(
            "is a TCP socket bound to an address without a port, which cannot be carried yet",
        ));
    }
    let address = if bound { octets(address) } else { Vec::new() };
    Ok(TcpSocket { family, address, port: port.into(), listening, backlog, options })
}

/// The port of a listening socket.
pub(super) fn listen_port(image: &TcpSocket) -> Option<ListenPort> {
    let flag = |level, name| {
        image.options.iter().any(|o| (o.level, o.name) == (level, name) && o.value.iter().any(|b| *b != 0))
    };
    let (address, port) = address_of(&image.address, image.port).ok().filter(|_| image.listening)?;
    let reuseport = flag(SOL_SOCKET, libc::SO_REUSEPORT);
    Some(ListenPort { address, port, reuseport, v6only: flag(IPPROTO_IPV6, libc::IPV6_V6ONLY) })
}

/// IPv4 and IPv6 share the flag, whichever name sets it.
const FREEBIND: [(c_int, c_int); 1] = [(IPPROTO_IP, libc::IP_FREEBIND)];

fn address_of(bytes: &[u8], port: u32) -> Result<(IpAddr, u16), Trouble> {
    let port = u16::try_from(port).map_err(|_| Trouble::Invalid("a port"))?;
    Ok((ip_of(bytes)?, port))
}

/// `flags` for the type: none, or SOCK_NONBLOCK.
fn new_socket(family: c_int, flags: c_int) -> Result<OwnedFd, Trouble> {
    if family != AF_INET && family != AF_INET6 {
        return Err(Trouble::Invalid("the family of a TCP socket"));
    }
    socket::socket(family, libc::SOCK_STREAM | flags, IPPROTO_TCP)
        .map_err(Trouble::step("making a TCP socket"))
}

/// Lets a socket bind to an address that this machine does not have yet.
fn set_freebind(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    socket::set_int_option(fd, IPPROTO_IP, libc::IP_FREEBIND, 1)
}

/// Makes a socket and binds it. It does not listen yet: see [`start_listening`].
pub(super) fn make(image: &TcpSocket) -> Result<OwnedFd, Trouble> {
    let fd = new_socket(image.family, 0)?;
    options::apply(fd.as_fd(), &image.options, &[TCP, COMMON])?;
    options::apply_buffers(fd.as_fd(), &image.options)?;
    if !image.address.is_empty() {
        let (address, port) = address_of(&image.address, image.port)?;
        set_freebind(fd.as_fd()).map_err(Trouble::step("preparing to bind"))?;
        bind_beside(fd.as_fd(), address, port).map_err(Trouble::step("binding a TCP socket"))?;
    }
    options::apply(fd.as_fd(), &image.options, &[&FREEBIND])?;
    Ok(fd)
}

/// Binds a socket also where connections of its port are there already, made ahead: at the source they came after it.
/// What listens there is in its way all the same.
fn bind_beside(fd: BorrowedFd<'_>, address: IpAddr, port: u16) -> Result<(), Errno> {
    match socket::bind(fd, address, port) {
        Err(Errno::EADDRINUSE) => {}
        bound => return bound,
    }
    let reuse = socket::int_option(fd, SOL_SOCKET, libc::SO_REUSEADDR)?;
    socket::set_int_option(fd, SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    socket::bind(fd, address, port)?;
    socket::set_int_option(fd, SOL_SOCKET, libc::SO_REUSEADDR, reuse)
}

/// Opens the port, as late as possible.
pub(super) fn start_listening(fd: BorrowedFd<'_>, image: &TcpSocket) -> Result<(), Trouble> {
    if !image.listening {
        return Ok(());
    }
    let backlog = c_int::try_from(image.backlog).unwrap_or(c_int::MAX);
    let step = Trouble::step;
    // At the source it listened before its connections were there: here they are first, and only this lets
    // it take the port beside them.
    let reuse =
        socket::int_option(fd, SOL_SOCKET, libc::SO_REUSEADDR).map_err(step("reading SO_REUSEADDR"))?;
    let set = |value| socket::set_int_option(fd, SOL_SOCKET, libc::SO_REUSEADDR, value);
    set(1).map_err(step("setting SO_REUSEADDR"))?;
    socket::listen(fd, backlog).map_err(step("listening"))?;
    set(reuse).map_err(step("setting SO_REUSEADDR"))
}

/// Makes a socket whose connection is gone.
pub(super) fn make_closed(image: &TcpClosed) -> Result<OwnedFd, Trouble> {
    let step = Trouble::step;
    let fd = new_socket(image.family, 0)?;
    // To be set before it is bound, which sets it for an address of IPv6 that is not all of them, for good.
    let is_early = |o: &SocketOption| (o.level, o.name) == (IPPROTO_IPV6, libc::IPV6_V6ONLY);
    let (early, others): (Vec<_>, Vec<_>) = image.options.iter().cloned().partition(is_early);
    options::apply(fd.as_fd(), &early, &[TCP_DEAD])?;
    if image.port != 0 {
        let (address, port) = address_of(&image.address, image.port)?;
        // In repair, a socket binds beside the one that listens on the same port.
        socket::set_int_option(fd.as_fd(), IPPROTO_TCP, libc::TCP_REPAIR, 1)
            .map_err(step("entering TCP_REPAIR"))?;
        set_freebind(fd.as_fd()).map_err(step("preparing to bind"))?;
        socket::bind(fd.as_fd(), address, port).map_err(step("binding a closed TCP socket"))?;
        socket::set_int_option(fd.as_fd(), IPPROTO_IP, libc::IP_FREEBIND, 0).map_err(step("binding"))?;
        socket::set_int_option(fd.as_fd(), IPPROTO_TCP, libc::TCP_REPAIR, REPAIR_OFF_SILENTLY)
            .map_err(step("leaving TCP_REPAIR"))?;
    }
    options::apply(fd.as_fd(), &others, &[TCP_DEAD])?;
    shut(fd.as_fd(), Shutdown::Both)?;
    Ok(fd)
}

fn shut(fd: BorrowedFd<'_>, how: Shutdown) -> Result<(), Trouble> {
    match shutdown(fd.as_raw_fd(), how) {
        // Without a connection it says so, but does mark the directions as ended.
        Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
        Err(errno) => Err(Trouble::Step("ending a TCP socket", errno)),
    }
}

/// Why a port is not free here; `None` if it is.
pub fn port_free(port: &ListenPort) -> Option<Reason> {
    let object = format!("port {}", SocketAddr::new(port.address, port.port));
    let family = if port.address.is_ipv4() { AF_INET } else { AF_INET6 };
    let probe = || -> Result<(), Errno> {
        let fd = socket::socket(family, libc::SOCK_STREAM, IPPROTO_TCP)?;
        let set = |level, name, on| socket::set_int_option(fd.as_fd(), level, name, c_int::from(on));
        // Remnants of old connections are no obstacle, listening sockets are.
        set(SOL_SOCKET, libc::SO_REUSEADDR, true)?;
        set(SOL_SOCKET, libc::SO_REUSEPORT, port.reuseport)?;
        if family == AF_INET6 {
            set(IPPROTO_IPV6, libc::IPV6_V6ONLY, port.v6only)?;
        }
        set_freebind(fd.as_fd())?;
        socket::bind(fd.as_fd(), port.address, port.port)
    };
    match probe() {
        Ok(()) => None,
        Err(Errno::EADDRINUSE) => Some(Reason::new(
            object,
            "is already bound at the destination",
            "stop the service that uses it there",
        )),
        Err(errno) => Some(Reason::new(object, format!("cannot be bound at the destination: {errno}"), "")),
    }
}

/// Ends the connections that were given up, after the commit: each peer gets a clean end at once, although
/// the local address may be gone already. Takes what [`super::capture()`] returned as `closing`.
pub fn close_peers(closing: Vec<OwnedFd>) {
    for fd in closing {
        loop {
            // On a listening socket: those that were not accepted yet.
            let listening = socket::int_option(fd.as_fd(), SOL_SOCKET, libc::SO_ACCEPTCONN) == Ok(1);
            if !listening || fds::set_status_flags(fd.as_fd(), libc::O_NONBLOCK).is_err() {
                break;
            }
            let Ok(connection) = socket::accept(fd.as_fd()) else { break };
            end(&connection);
        }
        end(&fd);
    }
}

/// Errors are not reported: a connection that the network has ended meanwhile is what we want.
fn end(fd: &OwnedFd) {
    let _ = socket::set_int_option(fd.as_fd(), IPPROTO_IP, libc::IP_TRANSPARENT, 1);
    let _ = socket::set_int_option(fd.as_fd(), IPPROTO_IPV6, libc::IPV6_TRANSPARENT, 1);
    let _ = shutdown(fd.as_raw_fd(), Shutdown::Both);
    // Input that stays unread would turn the end into a reset.
    let mut buffer = vec![0u8; 64 << 10];
    let mut drained = 0;
    while drained < DRAIN_BYTES {
        match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(_) => break,
            Ok(n) => drained += n,
        }
    }
}

/// All that is carried of a connection's options.
#[cfg(test)]
pub(super) fn table_of_connection(fd: BorrowedFd<'_>) -> Vec<crate::proto::files::SocketOption> {
    let family = socket::int_option(fd, SOL_SOCKET, libc::SO_DOMAIN).unwrap_or(0);
    Sets::default().read(fd, family).map(|known| known.set.options.clone()).unwrap_or_default()
}
