//! TCP sockets of this network namespace, as the kernel lists them (`inet_diag`), those of a process picked
//! out by their inodes.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

use super::{Connection, Locked, Unfinished, is_at};
use crate::engine::sys::netlink::{Netlink, attributes, u32_at};
use crate::engine::tcp_diag::{self, ANSWER_BYTES};

/// `INET_DIAG_INFO`, to be asked for: a `struct tcp_info`, and where that has `tcpi_notsent_bytes`.
const INFO: u16 = 2;
const NOT_SENT: usize = 144;
/// `INET_DIAG_SKV6ONLY`.
const V6ONLY: u16 = 11;

/// `TCPDIAG_GETSOCK` (linux/inet_diag.h), its request, and where that has the states.
const TCPDIAG_GETSOCK: u16 = 18;
const OLD_REQUEST_BYTES: usize = 60;
const OLD_STATES: usize = 52;

const ESTABLISHED: u32 = 1;
const SYN_SENT: u32 = 2;
const SYN_RECEIVED: u32 = 3;
const FIN_WAIT1: u32 = 4;
const FIN_WAIT2: u32 = 5;
const CLOSE_WAIT: u32 = 8;
const LAST_ACK: u32 = 9;
const LISTEN: u32 = 10;
const CLOSING: u32 = 11;
pub(super) const CONNECTED: [u32; 8] =
    [ESTABLISHED, SYN_SENT, SYN_RECEIVED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING];
/// Those that take a segment of their peer's.
const OPEN: [u32; 7] = [ESTABLISHED, SYN_RECEIVED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING];
/// What a connection can be in that nobody has accepted.
const UNACCEPTED: [u32; 3] = [ESTABLISHED, SYN_RECEIVED, CLOSE_WAIT];

/// What a connection can be in that its process has closed, and whose peer has not got everything.
const UNFINISHED_ENDS: [u32; 3] = [FIN_WAIT1, LAST_ACK, CLOSING];

/// One line of the kernel's list.
struct Socket {
    state: u32,
    /// How often its last segment was sent again.
    repeated: u8,
    local: SocketAddr,
    remote: SocketAddr,
    /// Bytes that have come; of one that listens, connections that are to be accepted.
    unread: u32,
    /// Bytes that the peer has not acknowledged, an end among them.
    unacknowledged: u32,
    /// Those of them that were not even sent yet, if that was asked for.
    unsent: Option<u32>,
    /// 0: no process has it, for it waits to be accepted, or was closed and is on its way out.
    inode: u64,
    v6only: bool,
    /// The device that it is bound to; 0 for none.
    device: u32,
}

impl Socket {
    /// Where it listens: twice, if on all addresses of both versions of IP.
    fn places(&self) -> impl Iterator<Item = Connection> + use<> {
        let local = canonical(self.local);
        let both = local.is_ipv6() && local.ip().is_unspecified() && !self.v6only;
        let everywhere = both.then(|| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), local.port()));
        [Some(local), everywhere].into_iter().flatten().map(|local| Connection { local, remote: None })
    }

    /// Whether its local end is one of these places, or its port is one of all addresses.
    fn is_at(&self, places: &HashSet<SocketAddr>) -> bool {
        is_at(canonical(self.local), places)
    }

    /// Whether it is one that waits to be accepted at one of these places, or will.
    fn is_unaccepted_at(&self, places: &HashSet<SocketAddr>) -> bool {
        self.inode == 0 && UNACCEPTED.contains(&self.state) && self.is_at(places)
    }

    fn connection(&self) -> Connection {
        Connection { local: canonical(self.local), remote: Some(canonical(self.remote)) }
    }
}

/// Where these sockets listen.
pub(super) fn listeners(inodes: &HashSet<u64>) -> Result<Vec<Connection>, Errno> {
    listeners_and_waiting(inodes).map(|(listeners, _)| listeners)
}

/// Where these sockets listen, and whether somebody waits there to be accepted.
pub(super) fn listeners_and_waiting(inodes: &HashSet<u64>) -> Result<(Vec<Connection>, bool), Errno> {
    let (mut found, mut are_waiting) = (Vec::new(), false);
    list(&[LISTEN], &mut |socket| {
        if !inodes.contains(&socket.inode) {
            return;
        }
        found.extend(socket.places());
        are_waiting |= socket.unread != 0;
    })?;
    // Several sockets may listen at one place (SO_REUSEPORT).
    found.sort_unstable();
    found.dedup();
    Ok((found, are_waiting))
}

/// How many connections wait to be accepted by these sockets: of those that were broken meanwhile, too.
pub(super) fn waiting_for(inodes: &HashSet<u64>) -> Result<usize, Errno> {
    let mut waiting = 0;
    list(&[LISTEN], &mut |socket| {
        if inodes.contains(&socket.inode) {
            waiting += usize::try_from(socket.unread).unwrap_or(usize::MAX);
        }
    })?;
    Ok(waiting)
}

/// The connections of these sockets, and those that nobody has accepted at the places of `listeners`; and the local
/// ends of the connections that other processes have.
pub(super) fn connections(
    inodes: &HashSet<u64>,
    listeners: &[Connection],
) -> Result<(Locked, HashSet<SocketAddr>), Errno> {
    let places: HashSet<SocketAddr> = listeners.iter().map(|l| l.local).collect();
    let (mut found, mut others) = (Locked::default(), HashSet::new());
    list(&CONNECTED, &mut |socket| {
        let unaccepted = socket.is_unaccepted_at(&places);
        if unaccepted || inodes.contains(&socket.inode) {
            found.all.push(socket.connection());
            if unaccepted && socket.state == SYN_RECEIVED {
                found.half_open.push(socket.connection());
            } else if unaccepted {
                found.queued.push(socket.connection());
                found.queued_bytes += u64::from(socket.unread);
            }
        } else if socket.inode != 0 {
            others.insert(canonical(socket.local));
        }
    })?;
    Ok((found, others))
}

/// What has become of handshakes that were half open, now that nothing comes for them: those that are so still, and those
/// that wait to be accepted.
pub(super) fn settled(half_open: &[Connection]) -> Result<(Vec<Connection>, Vec<Connection>), Errno> {
    let ends: Vec<_> = half_open.iter().filter_map(|one| Some((one.local, one.remote?))).collect();
    let (mut left, mut queued) = (Vec::new(), Vec::new());
    for (one, socket) in half_open.iter().zip(tcp_diag::ask(&ends, 0, parse)?) {
        match socket.filter(|socket| socket.connection() == *one) {
            Some(socket) if socket.state == SYN_RECEIVED => left.push(*one),
            Some(socket) if UNACCEPTED.contains(&socket.state) => queued.push(*one),
            _ => {}
        }
    }
    Ok((left, queued))
}

/// Those of `ends` with which this host has connections that are none of `known`.
pub(super) fn others_at(
    ends: &HashSet<SocketAddr>,
    known: &[Connection],
) -> Result<HashSet<SocketAddr>, Errno> {
    let known: HashSet<&Connection> = known.iter().collect();
    let mut found = HashSet::new();
    let ports: HashSet<u16> = ends.iter().map(SocketAddr::port).collect();
    for port in ports {
        list_at(port, &CONNECTED, false, &mut |socket| {
            let connection = socket.connection();
            if socket.inode != 0 && ends.contains(&connection.local) && !known.contains(&connection) {
                found.insert(connection.local);
            }
        })?;
    }
    Ok(found)
}

/// How many connections nobody has accepted at these places, but for handshakes that seem to be left.
pub(super) fn unfinished(listeners: &[Connection]) -> Result<Unfinished, Errno> {
    let places: HashSet<SocketAddr> = listeners.iter().map(|l| l.local).collect();
    let mut found = Unfinished::default();
    list(&UNACCEPTED, &mut |socket| {
        if !socket.is_unaccepted_at(&places) {
        } else if socket.state != SYN_RECEIVED {
            found.queued += 1;
        } else if socket.repeated == 0 {
            found.half_open += 1;
        } else {
            found.unanswered += 1;
        }
    })?;
    Ok(found)
}

/// Connections that no process has any more, and whose peers have not got everything: those of these local addresses,
/// and those at these places. With each how many bytes are left, whether some were never sent, and how often its last
/// segment was sent again.
pub(super) fn closed(
    ips: &HashSet<IpAddr>,
    places: &HashSet<SocketAddr>,
) -> Result<Vec<(Connection, u32, bool, u8)>, Errno> {
    let mut found = Vec::new();
    list_at(0, &UNFINISHED_ENDS, true, &mut |socket| {
        let connection = socket.connection();
        let ip = connection.local.ip();
        if socket.inode == 0 && !ip.is_loopback() && (ips.contains(&ip) || socket.is_at(places)) {
            let unsent = socket.unsent.unwrap_or(socket.unacknowledged) != 0;
            found.push((connection, socket.unacknowledged, unsent, socket.repeated));
        }
    })?;
    Ok(found)
}

/// Those of `wanted` that a segment reaches, by whichever device it comes. So many connections are asked for one by one:
/// to list all that the host has takes milliseconds.
pub(super) fn reachable(
    wanted: &HashSet<Connection>,
    one_by_one: usize,
) -> Result<HashSet<Connection>, Errno> {
    let ends: Vec<_> = wanted.iter().filter_map(|one| Some((one.local, one.remote?))).collect();
    let mut found = HashSet::new();
    let mut take = |socket: Socket| {
        if socket.device != 0 {
        } else if socket.state == LISTEN {
            found.extend(socket.places().filter(|place| wanted.contains(place)));
        } else if OPEN.contains(&socket.state) {
            found.extend(Some(socket.connection()).filter(|connection| wanted.contains(connection)));
        }
    };
    let mut listed = Vec::new();
    if ends.len() < wanted.len() {
        listed.push(LISTEN);
    }
    if ends.len() > one_by_one {
        listed.extend(OPEN);
    } else if !ends.is_empty() {
        tcp_diag::ask(&ends, 0, parse)?.into_iter().flatten().for_each(&mut take);
    }
    if !listed.is_empty() {
        list(&listed, &mut take)?;
    }
    Ok(found)
}

/// As on the wire: sockets of IPv6 may speak IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn list(states: &[u32], take: &mut dyn FnMut(Socket)) -> Result<(), Errno> {
    list_at(0, states, false, take)
}

/// Only those with this local port, unless it is 0. The host may have a hundred times as many others. `info`: with
/// what costs more to tell.
fn list_at(port: u16, states: &[u32], info: bool, take: &mut dyn FnMut(Socket)) -> Result<(), Errno> {
    let mut netlink = Netlink::open_for(SockProtocol::NetlinkSockDiag)?;
    let wanted = states.iter().fold(0u32, |all, state| all | 1 << state);
    // struct inet_diag_req: family and lengths of addresses, which do not count, extensions; a struct inet_diag_sockid,
    // which begins with the local port; states, and what to tell else of. This old request is for both versions of IP: the
    // kernel goes through its table once, which on a host with much memory is large.
    let mut request = vec![0, 0, 0, u8::from(info) << (INFO - 1)];
    request.extend(port.to_be_bytes());
    request.resize(OLD_STATES, 0);
    request.extend(wanted.to_ne_bytes());
    request.resize(OLD_REQUEST_BYTES, 0);
    netlink.for_each(TCPDIAG_GETSOCK, &request, &mut |answer| {
        if let Some(socket) = parse(answer) {
            take(socket);
        }
    })
}

/// struct inet_diag_msg: family, state, timer, retransmits; ports and addresses, device, cookie; expiry, two
/// queues, user, inode; then attributes.
fn parse(answer: &[u8]) -> Option<Socket> {
    let v6 = i32::from(*answer.first()?) == libc::AF_INET6;
    let state = u32::from(*answer.get(1)?);
    let repeated = *answer.get(3)?;
    let end = |port_at: usize, address_at: usize| -> Option<SocketAddr> {
        let port = u16::from_be_bytes(*answer.get(port_at..)?.first_chunk()?);
        let ip: IpAddr = if v6 {
            Ipv6Addr::from(*answer.get(address_at..)?.first_chunk::<16>()?).into()
        } else {
            Ipv4Addr::from(*answer.get(address_at..)?.first_chunk::<4>()?).into()
        };
        Some(SocketAddr::new(ip, port))
    };
    let (local, remote) = (end(4, 8)?, end(6, 24)?);
    let device = u32_at(answer, 40)?;
    let (unread, unacknowledged) = (u32_at(answer, 56)?, u32_at(answer, 60)?);
    let inode = u64::from(u32_at(answer, 68)?);
    let (mut v6only, mut unsent) = (false, None);
    for (kind, value) in attributes(answer.get(ANSWER_BYTES..)?) {
        match kind {
            V6ONLY => v6only = value.first().is_some_and(|on| *on != 0),
            INFO => unsent = u32_at(value, NOT_SENT),
            _ => {}
        }
    }
    Some(Socket { state, repeated, local, remote, unread, unacknowledged, unsent, inode, v6only, device })
}
