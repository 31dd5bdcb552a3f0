//! Strays: segments that come for a process's connections while no kernel answers for them, because the process is
//! on its way. They would be lost, and their senders would repeat them, but not before 200 ms (a request for a new
//! connection: one second). So they are kept and put in again where the process runs then.
//!
//! A packet socket sees what comes in before the lock drops it ([`crate::engine::lock`]), whether or not the
//! address is here; its queue in the kernel is all that keeps. Putting in is sending on a raw socket to our own
//! address, with the header as it was. Losing strays is harmless, and so is a segment that comes twice.

mod filter;
pub(super) mod segment;

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};

use self::segment::Segment;
pub(super) use self::segment::complete;
use crate::engine::lock::{self, Connection, LockError};
use crate::engine::sys::{datagram, socket};

/// Most packets that are kept of one migration at one host, and their bytes.
pub const MAX_PACKETS: usize = 2048;
/// See [`MAX_PACKETS`].
pub const MAX_BYTES: usize = 1 << 20;
/// How many frames are looked at for that, at one time.
const MOST_LOOKS: usize = 4 * MAX_PACKETS;
/// Room in the kernel; it counts more than the bytes.
const QUEUE_BYTES: i32 = 4 << 20;
/// The longest packet there is.
const PACKET_BYTES: usize = 40 + u16::MAX as usize;

const SOL_PACKET: i32 = 263;
const PACKET_AUXDATA: i32 = 8;
const PACKET_IGNORE_OUTGOING: i32 = 23;
/// `ETH_P_ALL`. A socket for one protocol only would have the kernel copy each packet on its way to TCP, and a copy
/// forgets for which socket it is meant: see [`crate::engine::queued`].
const ALL_PROTOCOLS: u16 = 3;
/// `TP_STATUS_CSUMNOTREADY`, `TP_STATUS_CSUM_VALID`: the checksum is not made yet, or need not be looked at.
const NEEDS_NO_LOOK: u32 = 1 << 3 | 1 << 7;

/// Why strays cannot be kept, or not be put in.
#[derive(Debug, thiserror::Error)]
pub enum StraysError {
    /// The kernel refused.
    #[error("{step}")]
    Sys {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The sockets that they are for cannot be listed.
    #[error(transparent)]
    Lock(#[from] LockError),
}

fn step(step: &'static str) -> impl Fn(Errno) -> StraysError {
    move |errno| StraysError::Sys { step, errno }
}

/// Keeps what comes, from [`Strays::listen`] on. Dropping it waits for the kernel, on a thread of its own.
#[derive(Debug)]
pub struct Strays {
    /// One for each version of IP that is used.
    taps: Vec<(OwnedFd, Version)>,
    packets_left: usize,
    bytes_left: usize,
}

/// A version of IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V4,
    V6,
}

impl Version {
    fn has(self, address: SocketAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }

    fn ether_type(self) -> u16 {
        if self == Self::V4 { 0x0800 } else { 0x86dd }
    }
}

/// What is kept of that which comes to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeps {
    /// Everything.
    All,
    /// Requests for new connections: SYN without ACK.
    Requests,
    /// Only what the peers of the connections send: from their ports.
    OfPeers,
}

impl Strays {
    /// Makes ready for what comes to the ports of these; nothing is kept yet. Cheap if there are none.
    ///
    /// # Errors
    /// If we may not have packet sockets.
    pub fn prepare(ends: &[Connection], keeps: Keeps) -> Result<Self, StraysError> {
        let mut taps = Vec::new();
        for version in [Version::V4, Version::V6] {
            let Some(filter) = program(ends, version, keeps) else { continue };
            // It names no protocol, so it receives nothing.
            let fd = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, 0)
                .map_err(step("opening a packet socket"))?;
            datagram::attach_filter(fd.as_fd(), &filter).map_err(step("filtering a packet socket"))?;
            socket::set_int_option(fd.as_fd(), SOL_PACKET, PACKET_AUXDATA, 1)
                .map_err(step("asking a packet socket for checksums"))?;
            // Only to save time: the filter leaves out what goes out.
            let _ = socket::set_int_option(fd.as_fd(), SOL_PACKET, PACKET_IGNORE_OUTGOING, 1);
            // Less room keeps less.
            let _ = socket::set_int_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, QUEUE_BYTES);
            taps.push((fd, version));
        }
        Ok(Self { taps, packets_left: MAX_PACKETS, bytes_left: MAX_BYTES })
    }

    /// From here on it is kept.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn listen(&self) -> Result<(), StraysError> {
        for (fd, _) in &self.taps {
            // struct sockaddr_ll: family, protocol, and no device.
            let mut name = [0u8; 20];
            name[..2].copy_from_slice(&PACKET.to_ne_bytes());
            name[2..4].copy_from_slice(&ALL_PROTOCOLS.to_be_bytes());
            datagram::bind_raw(fd.as_fd(), &name).map_err(step("listening on a packet socket"))?;
        }
        Ok(())
    }

    /// Waits until something has come, not longer than this.
    pub fn wait(&self, limit: Duration) {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds: Vec<PollFd<'_>> =
            self.taps.iter().map(|(fd, _)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        // Whoever is interrupted looks once more than he must.
        let _ = poll(&mut fds, timeout);
    }

    /// What has come for `wanted` since the last time, in its order, whole and with right checksums.
    pub fn take(&mut self, wanted: &[Connection]) -> Vec<Vec<u8>> {
        let mut known = HashSet::new();
        self.gather(&mut |segment| {
            if known.is_empty() {
                known = wanted.iter().copied().collect();
            }
            segment.is_for(&known)
        })
    }

    /// What the peers of these connections have sent since the last time, likewise: requests as well. However much is taken
    /// in the end, at one time it is not more than [`MAX_PACKETS`] and [`MAX_BYTES`].
    pub fn take_of_peers(&mut self, ends: &[Connection]) -> Vec<Vec<u8>> {
        (self.packets_left, self.bytes_left) = (MAX_PACKETS, MAX_BYTES);
        let ends: HashSet<Connection> = ends.iter().copied().collect();
        self.gather(&mut |segment| {
            ends.contains(&Connection { local: segment.local, remote: Some(segment.remote) })
        })
    }

    /// Hears from now on only what the peers of these connections send, which are some of those before.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn narrow(&mut self, ends: &[Connection]) -> Result<(), StraysError> {
        for (fd, version) in std::mem::take(&mut self.taps) {
            if let Some(filter) = program(ends, version, Keeps::OfPeers) {
                datagram::attach_filter(fd.as_fd(), &filter).map_err(step("filtering a packet socket"))?;
                self.taps.push((fd, version));
            }
        }
        Ok(())
    }

    fn gather(&mut self, is_wanted: &mut dyn FnMut(&Segment) -> bool) -> Vec<Vec<u8>> {
        let mut taken = Vec::new();
        let mut buffer = Vec::new();
        for (fd, _) in &self.taps {
            for _ in 0..MOST_LOOKS {
                buffer.resize(PACKET_BYTES, 0);
                let Ok(looked) = datagram::take(fd.as_fd(), &mut buffer) else { break };
                let Some(packet) = buffer.get_mut(..looked.len) else { continue };
                let Some(segment) = Segment::of(packet).filter(|s| is_wanted(s)) else { continue };
                if status(&looked.control) & NEEDS_NO_LOOK != 0 {
                    segment.complete(packet);
                } else if !segment.is_whole(packet) {
                    continue;
                }
                if self.packets_left == 0 || segment.len > self.bytes_left {
                    break;
                }
                self.packets_left -= 1;
                self.bytes_left -= segment.len;
                taken.extend(packet.get(..segment.len).map(<[u8]>::to_vec));
            }
        }
        taken
    }
}

impl Drop for Strays {
    fn drop(&mut self) {
        let taps = std::mem::take(&mut self.taps);
        if !taps.is_empty() {
            // Its last close waits until no processor looks at it any more.
            let _ = std::thread::Builder::new().name("strays".into()).spawn(move || drop(taps));
        }
    }
}

/// The filter for what is kept of these; `None` if there are none.
fn program(ends: &[Connection], version: Version, keeps: Keeps) -> Option<Vec<u8>> {
    let mine = || ends.iter().filter(|end| version.has(end.local));
    if keeps == Keeps::OfPeers {
        let pairs = mine().filter_map(|end| Some((end.local.port(), end.remote?.port()))).collect();
        return filter::program_for_peers(version, &pairs);
    }
    filter::program(version, keeps, &mine().map(|end| end.local.port()).collect())
}

/// `AF_PACKET` as the structure wants it.
const PACKET: u16 = 17;
const _: () = assert!(PACKET as i32 == libc::AF_PACKET);

/// The first word of struct tpacket_auxdata.
fn status(control: &[(i32, i32, Vec<u8>)]) -> u32 {
    let value = control.iter().find(|(level, kind, _)| (*level, *kind) == (SOL_PACKET, PACKET_AUXDATA));
    value.and_then(|(_, _, value)| value.first_chunk()).map_or(0, |word| u32::from_ne_bytes(*word))
}

impl Segment {
    /// The connection that it belongs to, or the places of which it may ask for one.
    fn goals(&self) -> impl Iterator<Item = Connection> + use<> {
        let local = self.local;
        let everywhere: IpAddr = match local {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let connection = Connection { local, remote: (!self.opening).then_some(self.remote) };
        let place = Connection { local: SocketAddr::new(everywhere, local.port()), remote: None };
        [Some(connection), self.opening.then_some(place)].into_iter().flatten()
    }

    /// Whether it belongs to one of these, or asks for a connection at one of these.
    fn is_for(&self, these: &HashSet<Connection>) -> bool {
        self.goals().any(|goal| these.contains(&goal))
    }
}

/// Puts packets in, as if they came now. Only those for sockets of `wanted` that this host has: for others the
/// kernel would answer with a reset. Returns how many.
///
/// # Errors
/// If the sockets cannot be listed, or we may not have raw ones.
pub fn put_in(packets: &[Vec<u8>], wanted: &[Connection]) -> Result<usize, StraysError> {
    let wanted: HashSet<Connection> = wanted.iter().copied().collect();
    let meant = |packet| Segment::of(packet).filter(|segment| segment.is_for(&wanted));
    let chosen: Vec<_> = packets.iter().filter_map(|packet| Some((meant(packet)?, packet))).collect();
    if chosen.is_empty() {
        return Ok(0);
    }
    // Most have got nothing meanwhile.
    let goals = chosen.iter().flat_map(|(segment, _)| segment.goals());
    let here = lock::reachable(&goals.filter(|goal| wanted.contains(goal)).collect())?;
    let (mut v4, mut v6) = (None, None);
    let mut count = 0;
    for (segment, packet) in chosen.into_iter().filter(|(segment, _)| segment.is_for(&here)) {
        let (slot, family) =
            if segment.local.is_ipv4() { (&mut v4, libc::AF_INET) } else { (&mut v6, libc::AF_INET6) };
        let fd = match slot {
            Some(fd) => fd,
            // This protocol has the header written by us.
            None => slot.insert(
                socket::socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)
                    .map_err(step("opening a raw socket"))?,
            ),
        };
        let to = SockaddrStorage::from(SocketAddr::new(segment.local.ip(), 0));
        let whole = packet.get(..segment.len).unwrap_or(packet);
        match sendto(fd.as_raw_fd(), whole, &to, MsgFlags::MSG_DONTWAIT) {
            Ok(_) => count += 1,
            Err(errno) => tracing::debug!(%errno, "a stray is lost"),
        }
    }
    Ok(count)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::segment::tests::packet;
    use super::*;
    use crate::engine::trial::counted;

    /// A server has connections by the thousand: to ask for all of them would take longer than the rest of a move.
    #[test]
    fn only_sockets_that_something_has_come_for_are_looked_for() {
        let remote = Some("10.0.0.9:1000".parse().unwrap());
        let end = |port| SocketAddr::new(Ipv4Addr::new(10, 0, 0, 1).into(), port);
        let wanted: Vec<_> = (1..1000).map(|port| Connection { local: end(port), remote }).collect();
        let packets = [packet("10.0.0.9:1000", "10.0.0.1:80", 16, b"abc")];
        // This host has none of them.
        let (answers, count) = counted("recvfrom", || put_in(&packets, &wanted).unwrap());
        assert_eq!((answers, count), (1, 0));
        let (answers, count) = counted("recvfrom", || put_in(&packets, &wanted[..50]).unwrap());
        assert_eq!((answers, count), (0, 0), "it is for none of these");
    }
}
