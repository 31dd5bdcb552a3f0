//! What the kernel says about TCP sockets from outside (`sock_diag`), where the sockets themselves do not: keys
//! of signatures, and unread input beyond an urgent byte.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockProtocol, recv, send, setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::STATE_LISTEN;
use super::connection::SYN_SENT;
use crate::engine::many;
use crate::engine::sys::netlink::{Netlink, attributes, u16_at, u32_at};
use crate::engine::sys::socket;

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const HEADER: usize = 16;
/// `struct inet_diag_req_v2`
const REQUEST: usize = 56;
/// `struct inet_diag_msg`
const ANSWER: usize = 72;
/// Where the other end's port, its address, the length of the receive queue and the inode are in it.
const REMOTE_PORT: usize = 6;
const REMOTE: usize = 24;
const RECEIVE_QUEUE: usize = 56;
const INODE: usize = 68;
/// `INET_DIAG_INFO` as a bit.
const INFO: u8 = 2;
const ATTR_INFO: u16 = 2;
const ATTR_SIGNATURES: u16 = 18;
/// Where struct tcp_info has the number of bytes that have come, the end included.
const BYTES_RECEIVED: usize = 128;
/// The kernel answers at once, or never.
const PATIENCE: TimeVal = TimeVal::new(5, 0);
/// Questions asked at once: their answers fit into the buffer of the socket.
const AT_ONCE: usize = 32;

/// One connection as the kernel sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    /// Bytes received and not read, the end of the stream included.
    pub(super) unread: u32,
    /// Its segments are signed (TCP_MD5SIG, TCP-AO).
    pub(super) signed: bool,
    /// Bytes received since it began, the end included.
    received: u64,
    /// It is no connection: in its absence the kernel tells of what listens for it.
    listens: bool,
}

/// Asks about connections by their two ends; `None` for one that is not there any more.
pub(super) fn ask(ends: &[(SocketAddr, SocketAddr)]) -> Result<Vec<Option<Seen>>, Errno> {
    let blocks: Vec<_> = ends.chunks(AT_ONCE).collect();
    let answers = many::map_large(&blocks, ask_once);
    Ok(answers.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
}

/// How many bytes have come by each of these connections since it began, the end of the stream included; `None` for
/// one that is not there.
pub(in crate::engine) fn received_by(ends: &[(SocketAddr, SocketAddr)]) -> Result<Vec<Option<usize>>, Errno> {
    let received = |seen: Seen| usize::try_from(seen.received).unwrap_or(usize::MAX);
    Ok(ask(ends)?.into_iter().map(|seen| seen.filter(|seen| !seen.listens).map(received)).collect())
}

fn ask_once(ends: &&[(SocketAddr, SocketAddr)]) -> Result<Vec<Option<Seen>>, Errno> {
    let fd = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &PATIENCE)?;
    let mut message = Vec::with_capacity(ends.len() * (HEADER + REQUEST));
    for (i, (local, remote)) in ends.iter().enumerate() {
        request(&mut message, u32::try_from(i).unwrap_or(u32::MAX), *local, *remote);
    }
    send(fd.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut seen = vec![None; ends.len()];
    answers(&fd, ends.len(), &mut seen)?;
    Ok(seen)
}

/// Whether segments for a place where somebody listens are signed (TCP_MD5SIG).
pub(super) fn has_keys(listening: SocketAddr) -> Result<bool, Errno> {
    let nobody: IpAddr = match listening {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let seen = ask(&[(listening, SocketAddr::new(nobody, 0))])?;
    Ok(seen.first().copied().flatten().is_some_and(|seen| seen.signed))
}

/// Whom a socket is connecting to, by its inode: until there is an answer the socket itself does not say.
pub(super) fn connecting_to(inode: u64) -> Result<Option<SocketAddr>, Errno> {
    let mut netlink = Netlink::open_for(SockProtocol::NetlinkSockDiag)?;
    let mut found = None;
    for family in [2u8, 10] {
        // All sockets of the family in that state.
        let mut request = vec![family, 6, 0, 0];
        request.extend((1u32 << SYN_SENT).to_ne_bytes());
        request.resize(REQUEST, 0);
        netlink.for_each(SOCK_DIAG_BY_FAMILY, &request, &mut |body| {
            if u32_at(body, INODE).map(u64::from) == Some(inode) {
                found = remote_of(body, family);
            }
        })?;
    }
    Ok(found)
}

fn remote_of(body: &[u8], family: u8) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(*body.get(REMOTE_PORT..)?.first_chunk()?);
    let bytes: [u8; 16] = *body.get(REMOTE..)?.first_chunk()?;
    let [a, b, c, d, ..] = bytes;
    let ip = if i32::from(family) == libc::AF_INET { [a, b, c, d].into() } else { IpAddr::from(bytes) };
    Some(SocketAddr::new(ip, port))
}

fn request(message: &mut Vec<u8>, number: u32, local: SocketAddr, remote: SocketAddr) {
    let length = u32::try_from(HEADER + REQUEST).unwrap_or(0);
    message.extend(length.to_ne_bytes());
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend(number.to_ne_bytes());
    message.extend([0; 4]);
    // Family, protocol, the extension with which the keys come, padding, all states.
    message.extend([if local.is_ipv4() { 2 } else { 10 }, 6, INFO, 0]);
    message.extend(u32::MAX.to_ne_bytes());
    message.extend(local.port().to_be_bytes());
    message.extend(remote.port().to_be_bytes());
    for end in [local.ip(), remote.ip()] {
        let mut bytes = [0; 16];
        match end {
            IpAddr::V4(ip) => bytes[..4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => bytes = ip.octets(),
        }
        message.extend(bytes);
    }
    // Any device, any cookie.
    message.extend([0; 4]);
    message.extend([0xff; 8]);
}

fn answers(fd: &OwnedFd, count: usize, seen: &mut [Option<Seen>]) -> Result<(), Errno> {
    let mut buffer = vec![0u8; 16 << 10];
    for _ in 0..count {
        let len = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let answer = buffer.get(..len).unwrap_or_default();
        let (Some(kind), Some(number)) = (u16_at(answer, 4), u32_at(answer, 8)) else {
            return Err(Errno::EPROTO);
        };
        let body = answer.get(HEADER..).unwrap_or_default();
        match kind {
            SOCK_DIAG_BY_FAMILY => {
                let unread = u32_at(body, RECEIVE_QUEUE).ok_or(Errno::EPROTO)?;
                let (mut signed, mut received) = (false, 0);
                for (kind, value) in attributes(body.get(ANSWER..).unwrap_or_default()) {
                    signed |= kind == ATTR_SIGNATURES;
                    if kind == ATTR_INFO {
                        let bytes = value.get(BYTES_RECEIVED..).and_then(|bytes| bytes.first_chunk());
                        received = bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes));
                    }
                }
                let listens = body.get(1) == Some(&STATE_LISTEN);
                *seen.get_mut(number as usize).ok_or(Errno::EPROTO)? =
                    Some(Seen { unread, signed, received, listens });
            }
            NLMSG_ERROR => {
                let code = u32_at(body, 0).ok_or(Errno::EPROTO)?.cast_signed();
                match Errno::from_raw(code.wrapping_neg()) {
                    Errno::ENOENT => {}
                    errno => return Err(errno),
                }
            }
            _ => return Err(Errno::EPROTO),
        }
    }
    Ok(())
}
