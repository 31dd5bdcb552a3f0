//! Netlink sockets of the protocols that keep nothing with a socket but its port and groups: routes, events
//! of devices, questions about sockets.
//!
//! An answer that is not read yet comes from the kernel of the source, and nobody can say it again here:
//! refused. The program may have learned what is no longer true (an index of a device); what it hears from
//! then on is of the new host.

use std::ffi::c_int;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::SOL_NETLINK;

use super::options::{self, COMMON};
use super::scan::Open;
use super::{Stop, Trouble, filter};
use crate::engine::sys::{datagram, fds, socket};
use crate::proto::files::NetlinkSocket;

const NETLINK_LISTEN_ALL_NSID: c_int = 8;
const NETLINK_LIST_MEMBERSHIPS: c_int = 9;
const NETLINK_GET_STRICT_CHK: c_int = 12;

/// Protocols without further state of a socket.
const PROTOCOLS: [c_int; 3] = [libc::NETLINK_ROUTE, libc::NETLINK_SOCK_DIAG, libc::NETLINK_KOBJECT_UEVENT];

const NETLINK: &[(c_int, c_int)] = &[
    (SOL_NETLINK, libc::NETLINK_PKTINFO),
    (SOL_NETLINK, libc::NETLINK_BROADCAST_ERROR),
    (SOL_NETLINK, libc::NETLINK_NO_ENOBUFS),
    (SOL_NETLINK, NETLINK_LISTEN_ALL_NSID),
    (SOL_NETLINK, libc::NETLINK_CAP_ACK),
    (SOL_NETLINK, libc::NETLINK_EXT_ACK),
    (SOL_NETLINK, NETLINK_GET_STRICT_CHK),
];

/// Most groups of a protocol that we take from a peer; the kernel's own have less than a hundred.
const MAX_GROUPS: usize = 1024;

/// `struct sockaddr_nl`: family, padding, port, the first groups.
fn raw_of(port: u32) -> Vec<u8> {
    let mut raw = u16::try_from(libc::AF_NETLINK).unwrap_or(16).to_ne_bytes().to_vec();
    raw.extend_from_slice(&[0; 2]);
    raw.extend_from_slice(&port.to_ne_bytes());
    raw.extend_from_slice(&[0; 4]);
    raw
}

fn word(raw: &[u8], at: usize) -> u32 {
    raw.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_ne_bytes(*b))
}

pub(super) fn capture(
    open: &Open,
    kind: c_int,
    protocol: c_int,
    contents: bool,
) -> Result<NetlinkSocket, Stop> {
    let fd = open.fd();
    if !PROTOCOLS.contains(&protocol) {
        let why = format!("is a netlink socket of protocol {protocol}, which cannot be carried yet");
        return Err(Stop::refuse(why));
    }
    let name = datagram::raw_name(fd).map_err(Stop::failed("asking for a netlink socket's port"))?;
    let peer = datagram::raw_peer(fd).map_err(Stop::failed("asking for a netlink socket's peer"))?;
    if peer.is_some_and(|peer| word(&peer, 4) != 0 || word(&peer, 8) != 0) {
        return Err(Stop::refuse("is a netlink socket that is connected, which cannot be carried yet"));
    }
    let unread = fds::poll_now(fd, libc::POLLIN).map_err(Stop::failed("polling a netlink socket"))?;
    if contents && unread & (libc::POLLIN | libc::POLLERR) != 0 {
        return Err(Stop::advise("is a netlink socket with unread messages of this kernel", "try again"));
    }
    let mut options = options::capture(fd, &[NETLINK, COMMON])?;
    options.extend(options::capture_buffers(fd)?);
    Ok(NetlinkSocket {
        r#type: kind,
        protocol,
        port: word(&name, 4),
        groups: groups(fd)?,
        options,
        filter: filter::capture(fd)?,
    })
}

/// The groups it has joined: bit 0 of the first word is group 1.
fn groups(fd: BorrowedFd<'_>) -> Result<Vec<u32>, Stop> {
    let bits = socket::option(fd, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS)
        .map_err(Stop::failed("asking for the groups of a netlink socket"))?;
    let joined = |group: &u32| {
        let bit = group - 1;
        word(&bits, 4 * (bit / 32) as usize) & 1 << (bit % 32) != 0
    };
    let count = u32::try_from(8 * bits.len()).unwrap_or(0);
    Ok((1..=count).filter(joined).collect())
}

pub(super) fn make(image: &NetlinkSocket) -> Result<OwnedFd, Trouble> {
    let step = Trouble::step;
    let known =
        [libc::SOCK_RAW, libc::SOCK_DGRAM].contains(&image.r#type) && PROTOCOLS.contains(&image.protocol);
    if !known || image.groups.len() > MAX_GROUPS {
        return Err(Trouble::Invalid("a netlink socket"));
    }
    let fd = socket::socket(libc::AF_NETLINK, image.r#type, image.protocol)
        .map_err(step("making a netlink socket"))?;
    options::apply(fd.as_fd(), &image.options, &[NETLINK, COMMON])?;
    options::apply_buffers(fd.as_fd(), &image.options)?;
    if image.port != 0 {
        datagram::bind_raw(fd.as_fd(), &raw_of(image.port)).map_err(step("binding a netlink socket"))?;
    }
    filter::apply(fd.as_fd(), image.filter.as_ref())?;
    for group in &image.groups {
        socket::set_int_option(fd.as_fd(), SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group.cast_signed())
            .map_err(step("joining a netlink group"))?;
    }
    Ok(fd)
}
