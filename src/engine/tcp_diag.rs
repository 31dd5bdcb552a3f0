//! Questions to the kernel about single TCP connections of this network namespace (`inet_diag`), by their two ends:
//! the answer costs the same however many others there are.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockProtocol, recv, send, setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::many;
use super::sys::netlink::{Netlink, u16_at, u32_at};
use super::sys::socket;

pub(in crate::engine) const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Bytes of `struct inet_diag_req_v2` and `struct inet_diag_msg`; attributes follow the latter.
pub(in crate::engine) const REQUEST_BYTES: usize = 56;
pub(in crate::engine) const ANSWER_BYTES: usize = 72;
/// `IPPROTO_TCP`
pub(in crate::engine) const TCP: u8 = 6;

const SOCK_DESTROY: u16 = 21;
/// Where an answer has what names a socket and no other; what stands for any.
const COOKIE: usize = 44;
const ANY: [u8; 8] = [0xff; 8];
const NETLINK_SOCK_DIAG: i32 = 4;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const HEADER_BYTES: usize = 16;
/// The kernel answers at once, or never.
const PATIENCE: TimeVal = TimeVal::new(5, 0);
/// Questions asked at once: their answers fit into the buffer of the socket.
const AT_ONCE: usize = 32;

/// Asks for the connections with these ends, the local one first. What `read` makes of each answer, in their order;
/// `None` for one that is not there. In the absence of a connection the kernel tells of what listens for it. One of a
/// socket of IPv6 that speaks IPv4 is found by its addresses in either form; one that is bound to a device is not.
///
/// `extensions`: what is to be told besides, a bit for each.
pub(in crate::engine) fn ask<R: Send>(
    ends: &[(SocketAddr, SocketAddr)],
    extensions: u8,
    read: impl Fn(&[u8]) -> Option<R> + Sync,
) -> Result<Vec<Option<R>>, Errno> {
    let blocks: Vec<_> = ends.chunks(AT_ONCE).collect();
    let answers = many::map_large(&blocks, |block| ask_once(block, extensions, &read));
    Ok(answers.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
}

/// Ends the connections with these ends of which `which` says so by the kernel's answer, at once and with a reset for whoever
/// is at the other end (`SOCK_DESTROY`, since Linux 4.5; of one in TIME_WAIT nothing is left, in silence). Returns how many.
///
/// # Errors
/// EOPNOTSUPP without CONFIG_INET_DIAG_DESTROY, EPERM without CAP_NET_ADMIN.
pub(in crate::engine) fn destroy(
    ends: &[(SocketAddr, SocketAddr)],
    which: impl Fn(&[u8]) -> bool + Sync,
) -> Result<usize, Errno> {
    let read = |answer: &[u8]| {
        let cookie: [u8; 8] = *answer.get(COOKIE..)?.first_chunk()?;
        Some(which(answer).then_some(cookie))
    };
    let found = ends.iter().zip(ask(ends, 0, read)?).filter_map(|(ends, found)| Some((*ends, found??)));
    let mut netlink = Netlink::open_for(SockProtocol::NetlinkSockDiag)?;
    let mut ended = 0;
    for ((local, remote), cookie) in found {
        // By its cookie: in its absence the kernel would take what listens for it.
        match netlink.request(SOCK_DESTROY, 0, &question(0, local, remote, cookie)) {
            Ok(()) => ended += 1,
            Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(ended)
}

fn ask_once<R>(
    ends: &[(SocketAddr, SocketAddr)],
    extensions: u8,
    read: &impl Fn(&[u8]) -> Option<R>,
) -> Result<Vec<Option<R>>, Errno> {
    let fd = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &PATIENCE)?;
    let mut message = Vec::with_capacity(ends.len() * (HEADER_BYTES + REQUEST_BYTES));
    for (i, (local, remote)) in ends.iter().enumerate() {
        request(&mut message, u32::try_from(i).unwrap_or(u32::MAX), extensions, *local, *remote);
    }
    send(fd.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut found: Vec<Option<R>> = ends.iter().map(|_| None).collect();
    answers(&fd, &mut found, read)?;
    Ok(found)
}

fn request(message: &mut Vec<u8>, number: u32, extensions: u8, local: SocketAddr, remote: SocketAddr) {
    let length = u32::try_from(HEADER_BYTES + REQUEST_BYTES).unwrap_or(0);
    message.extend(length.to_ne_bytes());
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend(number.to_ne_bytes());
    message.extend([0; 4]);
    message.extend(question(extensions, local, remote, ANY));
}

/// struct inet_diag_req_v2
fn question(extensions: u8, local: SocketAddr, remote: SocketAddr, cookie: [u8; 8]) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    // Family, protocol, extensions, padding, all states; ports, addresses, no device.
    bytes[..4].copy_from_slice(&[if local.is_ipv4() { 2 } else { 10 }, TCP, extensions, 0]);
    bytes[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    bytes[8..10].copy_from_slice(&local.port().to_be_bytes());
    bytes[10..12].copy_from_slice(&remote.port().to_be_bytes());
    for (at, end) in [(12, local.ip()), (28, remote.ip())] {
        match end {
            IpAddr::V4(ip) => bytes[at..at + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => bytes[at..at + 16].copy_from_slice(&ip.octets()),
        }
    }
    bytes[48..].copy_from_slice(&cookie);
    bytes
}

fn answers<R>(
    fd: &OwnedFd,
    found: &mut [Option<R>],
    read: &impl Fn(&[u8]) -> Option<R>,
) -> Result<(), Errno> {
    let mut buffer = vec![0u8; 16 << 10];
    for _ in 0..found.len() {
        let len = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let answer = buffer.get(..len).unwrap_or_default();
        let (Some(kind), Some(number)) = (u16_at(answer, 4), u32_at(answer, 8)) else {
            return Err(Errno::EPROTO);
        };
        let body = answer.get(HEADER_BYTES..).unwrap_or_default();
        match kind {
            SOCK_DIAG_BY_FAMILY => {
                let place = found.get_mut(number as usize).ok_or(Errno::EPROTO)?;
                *place = Some(read(body).ok_or(Errno::EPROTO)?);
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
