//! Sockets of datagrams over IP: UDP, UDP-Lite, ICMP and raw ones, with options, multicast groups and filter;
//! for UDP also the unread datagrams (see [`queue`]).
//!
//! Not carried, as the network may lose it too: an error that was not reported yet (an ICMP message), and
//! what waits in a raw socket. A datagram that is half written is not for the network to lose: refused.

mod queue;

use std::ffi::c_int;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use libc::{AF_INET, AF_INET6, IPPROTO_IP, IPPROTO_IPV6, SOL_SOCKET};
use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};

use super::inet::{self, DATAGRAM};
use super::options::{self, COMMON};
use super::scan::Open;
use super::{Stop, Trouble, filter, multicast, multicast_if};
use crate::engine::procfs;
use crate::engine::sys::{datagram, fds, socket};
use crate::proto::files::IpSocket;

/// What the filling of the queue and the binding need to be otherwise.
const BINDING: &[(c_int, c_int)] = &[
    (SOL_SOCKET, libc::SO_REUSEADDR),
    (SOL_SOCKET, libc::SO_REUSEPORT),
    (SOL_SOCKET, libc::SO_BINDTODEVICE),
];
/// What is set while binding; the same two flags by either name.
const NOT_LOCAL: &[(c_int, c_int)] = &[
    (IPPROTO_IP, libc::IP_FREEBIND),
    (IPPROTO_IP, libc::IP_TRANSPARENT),
    (IPPROTO_IPV6, libc::IPV6_FREEBIND),
    (IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
];
/// Options of the IPv6 header that are sent with each datagram.
const EXTENSIONS: [c_int; 4] =
    [libc::IPV6_HOPOPTS, libc::IPV6_RTHDRDSTOPTS, libc::IPV6_RTHDR, libc::IPV6_DSTOPTS];

/// Whether sockets of this kind are known here.
pub(super) fn is_known(kind: c_int, protocol: c_int) -> bool {
    let ping = [libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6].contains(&protocol);
    kind == libc::SOCK_RAW || kind == libc::SOCK_DGRAM && (ping || is_udp(kind, protocol))
}

fn is_udp(kind: c_int, protocol: c_int) -> bool {
    kind == libc::SOCK_DGRAM && [libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE].contains(&protocol)
}

/// Its name for the operator.
pub(super) fn words(kind: c_int, protocol: c_int) -> &'static str {
    match protocol {
        _ if kind == libc::SOCK_RAW => "a raw IP socket",
        libc::IPPROTO_UDPLITE => "a UDP-Lite socket",
        libc::IPPROTO_UDP => "a UDP socket",
        _ => "an ICMP socket",
    }
}

pub(super) fn capture(
    open: &Open,
    (family, kind, protocol): (c_int, c_int, c_int),
    contents: bool,
) -> Result<IpSocket, Stop> {
    let fd = open.fd();
    let what = words(kind, protocol);
    refuse_rare(fd, what)?;
    let own = inet::own_address(fd).map_err(Stop::failed("asking for a local address"))?;
    let peer = datagram::raw_peer(fd).map_err(Stop::failed("asking for a socket's peer"))?;
    let peer = peer.as_deref().and_then(datagram::address_of);
    let udp = is_udp(kind, protocol);
    let has_port = own.port() != 0 && kind != libc::SOCK_RAW;
    if udp && !has_port && !own.ip().is_unspecified() {
        return Err(Stop::refuse(format!("is {what} bound to an address without a port")));
    }
    if !udp && peer.is_none() && is_connected(open, family, kind) {
        return Err(Stop::refuse(format!("is {what} that is connected, which cannot be carried yet")));
    }
    // One without a port has begun none, and would be given a port by the question.
    if udp && has_port && datagram::holds_half_a_datagram(fd) {
        let why = format!("is {what} with a datagram begun and not sent (UDP_CORK or MSG_MORE)");
        return Err(Stop::advise(why, "try again"));
    }
    let mut options = options::capture(fd, &[DATAGRAM, BINDING, NOT_LOCAL, COMMON])?;
    options.extend(options::capture_buffers(fd)?);
    let mut device_options = inet::capture_devices(fd)?;
    device_options.extend(multicast_if::capture(fd, (family, kind, protocol), own, contents)?);
    let mut image = IpSocket {
        family,
        r#type: kind,
        protocol,
        local: (has_port || !own.ip().is_unspecified()).then(|| inet::endpoint(own)).transpose()?,
        peer: peer.map(inet::endpoint).transpose()?,
        options,
        device_options,
        memberships: multicast::capture(fd, family)?,
        filter: filter::capture(fd)?,
        shutdown: ends(fd)?,
        ..IpSocket::default()
    };
    if contents && udp {
        queue::capture(fd, &mut image)?;
    } else if contents && fds::readable_bytes(fd).is_ok_and(|bytes| bytes > 0) {
        image.lost = 1;
    }
    Ok(image)
}

fn refuse_rare(fd: BorrowedFd<'_>, what: &str) -> Result<(), Stop> {
    let is_set = |level, name| socket::int_option(fd, level, name).is_ok_and(|value| value != 0);
    let refuse =
        |with: &str| Err(Stop::refuse(format!("is {what} with {with}, which cannot be carried yet")));
    if is_set(libc::SOL_UDP, libc::UDP_ENCAP) {
        return refuse("encapsulation (UDP_ENCAP)");
    }
    if is_set(SOL_SOCKET, libc::SO_ZEROCOPY) {
        return refuse("SO_ZEROCOPY");
    }
    if socket::int_option(fd, SOL_SOCKET, fds::SO_PEEK_OFF).is_ok_and(|offset| offset >= 0) {
        return refuse("SO_PEEK_OFF");
    }
    let has = |level, name| socket::option(fd, level, name).is_ok_and(|value| !value.is_empty());
    if has(IPPROTO_IP, libc::IP_OPTIONS) || EXTENSIONS.iter().any(|name| has(IPPROTO_IPV6, *name)) {
        return refuse("IP options or extension headers");
    }
    Ok(())
}

/// A raw socket's peer has no port, and getpeername does not tell it then.
fn is_connected(open: &Open, family: c_int, kind: c_int) -> bool {
    let table = match (kind == libc::SOCK_RAW, family == AF_INET) {
        (true, true) => "raw",
        (true, false) => "raw6",
        (false, true) => "icmp",
        (false, false) => "icmp6",
    };
    let text = procfs::read_text(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
    let inode = open.stat.ino().to_string();
    // sl, local, remote, state, queues, timer, retransmissions, uid, timeout, inode
    text.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(9) == Some(&inode.as_str()) && words.get(3) == Some(&"01")
    })
}

/// Which directions are shut down. (That of writing alone cannot be told.)
fn ends(fd: BorrowedFd<'_>) -> Result<u32, Stop> {
    let seen = fds::poll_now(fd, libc::POLLRDHUP).map_err(Stop::failed("polling a socket of datagrams"))?;
    Ok(match (seen & libc::POLLRDHUP != 0, seen & libc::POLLHUP != 0) {
        (_, true) => 3,
        (true, false) => 1,
        _ => 0,
    })
}

/// Makes the socket, and says how many of its unread datagrams did not make it.
pub(super) fn make(image: &IpSocket) -> Result<(OwnedFd, u32), Trouble> {
    let step = Trouble::step;
    if ![AF_INET, AF_INET6].contains(&image.family) || !is_known(image.r#type, image.protocol) {
        return Err(Trouble::Invalid("the kind of an IP socket"));
    }
    let fd =
        socket::socket(image.family, image.r#type, image.protocol).map_err(step("making an IP socket"))?;
    options::apply(fd.as_fd(), &image.options, &[DATAGRAM, COMMON])?;
    let mut lost = image.lost;
    if is_udp(image.r#type, image.protocol) {
        lost = lost.saturating_add(queue::put_back(fd.as_fd(), image)?);
    }
    options::apply_buffers(fd.as_fd(), &image.options)?;
    options::apply(fd.as_fd(), &image.options, &[BINDING])?;
    attach(fd.as_fd(), image)?;
    inet::apply_devices(fd.as_fd(), &image.device_options)?;
    multicast::apply(fd.as_fd(), &image.memberships)?;
    let how = match image.shutdown {
        0 => None,
        1 => Some(Shutdown::Read),
        _ => Some(Shutdown::Both),
    };
    match how.map_or(Ok(()), |how| shutdown(fd.as_raw_fd(), how)) {
        // Without a connection it says so, but does mark the directions as ended.
        Ok(()) | Err(Errno::ENOTCONN) => {}
        Err(errno) => return Err(Trouble::Step("shutting down an IP socket", errno)),
    }
    filter::apply(fd.as_fd(), image.filter.as_ref())?;
    Ok((fd, lost))
}

/// Binds and connects, although the address may not be here yet.
fn attach(fd: BorrowedFd<'_>, image: &IpSocket) -> Result<(), Trouble> {
    let step = Trouble::step;
    let (level, name) = match image.family {
        AF_INET => (IPPROTO_IP, libc::IP_TRANSPARENT),
        _ => (IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
    };
    socket::set_int_option(fd, level, name, 1).map_err(step("preparing to bind"))?;
    if let Some(local) = &image.local {
        let local = fitting(image, inet::address_of(local)?)?;
        datagram::bind_raw(fd, &datagram::raw_of(local)).map_err(step("binding an IP socket"))?;
    }
    if let Some(peer) = &image.peer {
        let peer = fitting(image, inet::address_of(peer)?)?;
        datagram::connect_raw(fd, &datagram::raw_of(peer)).map_err(step("connecting an IP socket"))?;
    }
    options::apply(fd, &image.options, &[NOT_LOCAL])
}

/// An address of the socket's family.
fn fitting(image: &IpSocket, address: SocketAddr) -> Result<SocketAddr, Trouble> {
    match (image.family, address.ip()) {
        (AF_INET, IpAddr::V4(_)) | (AF_INET6, IpAddr::V6(_)) => Ok(address),
        _ => Err(Trouble::Invalid("the address of an IP socket")),
    }
}
