//! What the kernel says about TCP sockets from outside (`sock_diag`), where the sockets themselves do not: keys
//! of signatures, and unread input beyond an urgent byte.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

use super::STATE_LISTEN;
use super::connection::{CLOSE_WAIT, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, SYN_SENT};
use crate::engine::sys::netlink::{Netlink, attributes, u32_at};
use crate::engine::tcp_diag::{self, ANSWER_BYTES, REQUEST_BYTES, SOCK_DIAG_BY_FAMILY, TCP};

/// Where an answer has the other end's port, its address, the length of the receive queue and the inode.
const REMOTE_PORT: usize = 6;
const REMOTE: usize = 24;
const RECEIVE_QUEUE: usize = 56;
const INODE: usize = 68;
/// `INET_DIAG_INFO` as a bit: the keys come with it.
const INFO: u8 = 2;
const ATTR_INFO: u16 = 2;
const ATTR_SIGNATURES: u16 = 18;
/// Where struct tcp_info has the number of bytes that have come, the end included.
const BYTES_RECEIVED: usize = 128;

const TIME_WAIT: u8 = 6;

/// One connection as the kernel sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    /// Bytes received and not read, the end of the stream included.
    pub(super) unread: u32,
    /// Its segments are signed (TCP_MD5SIG, TCP-AO).
    pub(super) signed: bool,
    /// Bytes received since it began, the end included.
    received: u64,
    /// It is no connection: in its absence the kernel tells of what listens for it, or of one that has ended.
    is_none: bool,
}

/// Asks about connections by their two ends; `None` for one that is not there any more.
pub(super) fn ask(ends: &[(SocketAddr, SocketAddr)]) -> Result<Vec<Option<Seen>>, Errno> {
    tcp_diag::ask(ends, INFO, seen)
}

fn seen(answer: &[u8]) -> Option<Seen> {
    let unread = u32_at(answer, RECEIVE_QUEUE)?;
    let (mut signed, mut received) = (false, 0);
    for (kind, value) in attributes(answer.get(ANSWER_BYTES..).unwrap_or_default()) {
        signed |= kind == ATTR_SIGNATURES;
        if kind == ATTR_INFO {
            let bytes = value.get(BYTES_RECEIVED..).and_then(|bytes| bytes.first_chunk());
            received = bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        }
    }
    let is_none = answer.get(1).is_some_and(|state| [STATE_LISTEN, TIME_WAIT].contains(state));
    Some(Seen { unread, signed, received, is_none })
}

/// How many bytes have come by each of these connections since it began, the end of the stream included; `None` for
/// one that is not there.
pub(in crate::engine) fn received_by(ends: &[(SocketAddr, SocketAddr)]) -> Result<Vec<Option<usize>>, Errno> {
    let received = |seen: Seen| usize::try_from(seen.received).unwrap_or(usize::MAX);
    Ok(ask(ends)?.into_iter().map(|seen| seen.filter(|seen| !seen.is_none).map(received)).collect())
}

/// What the kernel has at an end of a connection of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct End {
    state: u8,
    /// A process has it.
    held: bool,
}

impl End {
    /// Whether it waits to be accepted. One that was closed is in none of these states.
    pub(in crate::engine) fn waits(self) -> bool {
        !self.held && [ESTABLISHED, CLOSE_WAIT].contains(&self.state)
    }

    /// Whether its peer has ended its stream: then all of that has come.
    pub(in crate::engine) fn has_all(self) -> bool {
        self.state == CLOSE_WAIT
    }

    /// Whether a process has it.
    pub(in crate::engine) fn is_held(self) -> bool {
        self.held
    }
}

/// What there is at these ends of connections; `None` where there is nothing.
pub(in crate::engine) fn ends_of(ends: &[(SocketAddr, SocketAddr)]) -> Result<Vec<Option<End>>, Errno> {
    let read = |answer: &[u8]| Some(End { state: *answer.get(1)?, held: u32_at(answer, INODE)? != 0 });
    let all = tcp_diag::ask(ends, 0, read)?;
    // In the absence of a connection the kernel tells of what listens for it.
    Ok(all.into_iter().map(|end| end.filter(|end| end.state != STATE_LISTEN)).collect())
}

/// Removes what is left of connections that had these ends and have come to an end (TIME_WAIT): as a request for a new one
/// would. Returns how many there were.
pub(in crate::engine) fn remove_remains(ends: &[(SocketAddr, SocketAddr)]) -> Result<usize, Errno> {
    tcp_diag::destroy(ends, |answer| answer.get(1) == Some(&TIME_WAIT))
}

/// Breaks connections of processes with these ends, whose other end is not there: they have not heard of its end. Returns
/// how many there were.
pub(in crate::engine) fn abort_half(ends: &[(SocketAddr, SocketAddr)]) -> Result<usize, Errno> {
    let others: Vec<_> = ends.iter().map(|(local, remote)| (*remote, *local)).collect();
    let halves = ends.iter().zip(ends_of(&others)?).filter(|(_, other)| other.is_none());
    let halves: Vec<_> = halves.map(|(ends, _)| *ends).collect();
    let unaware = [ESTABLISHED, FIN_WAIT1, FIN_WAIT2];
    tcp_diag::destroy(&halves, |answer| answer.get(1).is_some_and(|state| unaware.contains(state)))
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
        let mut request = vec![family, TCP, 0, 0];
        request.extend((1u32 << SYN_SENT).to_ne_bytes());
        request.resize(REQUEST_BYTES, 0);
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
