//! Unread datagrams of a UDP socket, with where each came from.
//!
//! At the source they are looked at, one after the other, by the peek offset. At the destination the new
//! socket is first bound to a free port of the loopback device alone; there a raw socket sends it each
//! datagram with the header it had. Then that address is given up and the real one taken: the queue stays.
//! So nothing is seen outside, the real address need not be here yet, and no other socket that shares the
//! real port gets any of it.
//!
//! Where the program asks to which address a datagram was sent (`IP_PKTINFO`), it is put back only if that
//! address is here already; where it asks for more than that, not at all. What is not put back is counted,
//! never changed.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use libc::{IPPROTO_IP, IPPROTO_IPV6, SOL_SOCKET};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockaddrIn, SockaddrIn6, sendto};

use super::super::{Stop, Trouble, inet};
use crate::engine::sys::datagram::{self, Looked};
use crate::engine::sys::{fds, socket};
use crate::proto::files::{Datagram, IpSocket};

/// Most bytes and datagrams that we take from one queue, or into one.
const QUEUE_BYTES: usize = 64 << 20;
const QUEUE_LEN: usize = 1 << 16;
/// The longest datagram, and what several of one flow are together (`UDP_GRO`).
const DATAGRAM_BYTES: usize = 1 << 16;
/// Errors of the socket that a look may report before the datagrams.
const ERRORS: usize = 16;
/// How long one datagram may take to its socket on the same machine.
const ARRIVAL: Duration = Duration::from_millis(500);
/// `SO_MEMINFO`, and two of its words: bytes in the receive queue, packets dropped.
const SO_MEMINFO: i32 = 55;
const MEMINFO_RECEIVED: usize = 0;
const MEMINFO_DROPS: usize = 8;
const UDP_HEADER_BYTES: usize = 8;
const USUAL_HOPS: u32 = 64;

/// Looks at the queue of a stopped process. An error that the socket has to report is lost by that.
pub(super) fn capture(fd: BorrowedFd<'_>, image: &mut IpSocket) -> Result<(), Stop> {
    let flag = |level, name| socket::int_option(fd, level, name).is_ok_and(|value| value != 0);
    // Asked for the port too: it would be that of the loopback device.
    let wants_port =
        flag(IPPROTO_IP, libc::IP_RECVORIGDSTADDR) || flag(IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR);
    let offset = |value| {
        socket::set_int_option(fd, SOL_SOCKET, fds::SO_PEEK_OFF, value)
            .map_err(Stop::failed("moving the peek offset of a UDP socket"))
    };
    offset(0)?;
    let walked = walk(fd, wants_port, image);
    offset(-1)?;
    walked
}

fn walk(fd: BorrowedFd<'_>, wants_port: bool, image: &mut IpSocket) -> Result<(), Stop> {
    let mut buffer = vec![0u8; DATAGRAM_BYTES];
    let (mut bytes, mut errors) = (0, 0);
    loop {
        let looked = match datagram::look(fd, &mut buffer) {
            Ok(looked) => looked,
            Err(Errno::EAGAIN) => return Ok(()),
            Err(_) if errors < ERRORS => {
                errors += 1;
                continue;
            }
            Err(errno) => return Err(Stop::Failed { step: "looking at unread datagrams", errno }),
        };
        let data = buffer.get(..looked.len).unwrap_or(&buffer);
        // After an end of reading, a look finds nothing for ever.
        if looked.len == 0 && looked.from.is_empty() {
            return Ok(());
        }
        bytes += data.len();
        let found = segments(&looked, data);
        let room = bytes <= QUEUE_BYTES && image.queue.len() + found.len() <= QUEUE_LEN;
        match describe(&looked) {
            Some(like) if !wants_port && room => {
                image.queue.extend(found.into_iter().map(|data| Datagram { data, ..like.clone() }));
            }
            _ => image.lost = image.lost.saturating_add(u32::try_from(found.len()).unwrap_or(u32::MAX)),
        }
        if !room {
            return Ok(());
        }
    }
}

fn control(looked: &Looked, level: i32, name: i32) -> Option<&[u8]> {
    looked.control.iter().find(|(l, n, _)| (*l, *n) == (level, name)).map(|(_, _, value)| value.as_slice())
}

fn word(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// The kernel may have put several datagrams together (`UDP_GRO`), all of one size but the last.
fn segments(looked: &Looked, data: &[u8]) -> Vec<Vec<u8>> {
    let size = control(looked, libc::SOL_UDP, libc::UDP_GRO).and_then(word).unwrap_or(0) as usize;
    if size == 0 || data.is_empty() {
        return vec![data.to_vec()];
    }
    data.chunks(size).map(<[u8]>::to_vec).collect()
}

/// Everything but the data; `None` for what cannot be put back as it was.
fn describe(looked: &Looked) -> Option<Datagram> {
    let from = datagram::address_of(&looked.from)?;
    // A link-local sender is shown with the device it is behind, which will be the loopback device.
    let scoped = matches!(from, SocketAddr::V6(v6) if v6.scope_id() != 0);
    if scoped || from.ip().is_unspecified() || looked.control_cut {
        return None;
    }
    // in_pktinfo: device, own address, address sent to; in6_pktinfo: address sent to, device.
    let to4 = control(looked, IPPROTO_IP, libc::IP_PKTINFO).and_then(|v| v.get(8..12));
    let to6 = control(looked, IPPROTO_IPV6, libc::IPV6_PKTINFO).and_then(|v| v.get(..16));
    let hops = control(looked, IPPROTO_IP, libc::IP_TTL)
        .or_else(|| control(looked, IPPROTO_IPV6, libc::IPV6_HOPLIMIT));
    let class4 = control(looked, IPPROTO_IP, libc::IP_TOS).and_then(|v| v.first().copied()).map(u32::from);
    let class6 = control(looked, IPPROTO_IPV6, libc::IPV6_TCLASS).and_then(word);
    Some(Datagram {
        from: inet::endpoint(from).ok(),
        data: Vec::new(),
        to: to4.or(to6).unwrap_or_default().to_vec(),
        hops: hops.and_then(word).unwrap_or(USUAL_HOPS),
        class: class4.or(class6).unwrap_or(0),
    })
}

/// Fills the queue of a new, unbound socket. Answers how many datagrams are not in it.
pub(super) fn put_back(fd: BorrowedFd<'_>, image: &IpSocket) -> Result<u32, Trouble> {
    let step = Trouble::step;
    if image.queue.is_empty() {
        return Ok(0);
    }
    let bytes = image.queue.iter().map(|d| d.data.len()).sum::<usize>();
    if bytes > QUEUE_BYTES || image.queue.len() > QUEUE_LEN {
        return Err(Trouble::Invalid("the queue of a UDP socket"));
    }
    let usual = socket::int_option(fd, SOL_SOCKET, libc::SO_RCVBUF).map_err(step("asking for SO_RCVBUF"))?;
    // A datagram is charged with the pages it lies in and its bookkeeping.
    let charged = 4 * bytes + 4096 * image.queue.len();
    let room = i32::try_from(charged).unwrap_or(i32::MAX / 4).max(usual);
    let size = |size| {
        socket::set_int_option(fd, SOL_SOCKET, libc::SO_RCVBUFFORCE, size)
            .map_err(step("sizing a UDP socket"))
    };
    size(room)?;
    // Nobody outside can reach it meanwhile.
    socket::set_option(fd, SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo\0")
        .map_err(step("binding to the loopback device"))?;
    let any: IpAddr = if image.family == libc::AF_INET {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    datagram::bind_raw(fd, &datagram::raw_of(SocketAddr::new(any, 0)))
        .map_err(step("binding to the loopback device"))?;
    let port = inet::own_address(fd).map_err(step("asking for a port"))?.port();
    let mut sender = Sender { protocol: image.protocol, port, raw: [None, None], checked: Vec::new() };
    let mut lost = 0;
    for (at, one) in image.queue.iter().enumerate() {
        let before = received(fd)?;
        if !sender.send(one)? {
            lost += 1;
            continue;
        }
        if !arrives(fd, before)? {
            // This machine does not let it through, and will not let the others through either.
            lost += image.queue.len() - at;
            break;
        }
    }
    // Also lets go of the device.
    datagram::disconnect(fd).map_err(step("letting go of the loopback device"))?;
    size(usual / 2)?;
    Ok(u32::try_from(lost).unwrap_or(u32::MAX))
}

/// Bytes in the queue and datagrams dropped.
fn received(fd: BorrowedFd<'_>) -> Result<[u32; 2], Trouble> {
    let info = socket::option(fd, SOL_SOCKET, SO_MEMINFO).map_err(Trouble::step("reading SO_MEMINFO"))?;
    let at = |i: usize| info.get(4 * i..).and_then(word).unwrap_or(0);
    Ok([at(MEMINFO_RECEIVED), at(MEMINFO_DROPS)])
}

/// Waits until one datagram more is in the queue: most often it is there already.
fn arrives(fd: BorrowedFd<'_>, before: [u32; 2]) -> Result<bool, Trouble> {
    let begun = Instant::now();
    loop {
        let [bytes, drops] = received(fd)?;
        if bytes > before[0] || drops != before[1] {
            return Ok(bytes > before[0]);
        }
        if begun.elapsed() > ARRIVAL {
            return Ok(false);
        }
        std::thread::yield_now();
    }
}

/// Sends datagrams in the name of others.
struct Sender {
    protocol: i32,
    port: u16,
    /// Raw sockets by family, made when needed.
    raw: [Option<OwnedFd>; 2],
    /// Addresses that were asked about: whether they are here.
    checked: Vec<(IpAddr, bool)>,
}

impl Sender {
    /// Sends one datagram; false if it cannot be as it was.
    fn send(&mut self, one: &Datagram) -> Result<bool, Trouble> {
        let from = inet::address_of(one.from.as_ref().ok_or(Trouble::Invalid("a datagram's sender"))?)?;
        let source = from.ip().to_canonical();
        let to = match one.to.is_empty() {
            true => inet::loopback(source.is_ipv4()),
            false => inet::ip_of(&one.to)?.to_canonical(),
        };
        if source.is_ipv4() != to.is_ipv4() || !one.to.is_empty() && !self.is_here(to) {
            return Ok(false);
        }
        let Some(packet) = packet(source, from.port(), to, self.port, self.protocol, one) else {
            return Ok(false);
        };
        let raw = self.raw(to.is_ipv4())?;
        let sent = match to {
            IpAddr::V4(to) => {
                sendto(raw, &packet, &SockaddrIn::from(std::net::SocketAddrV4::new(to, 0)), NOW)
            }
            IpAddr::V6(to) => {
                sendto(raw, &packet, &SockaddrIn6::from(std::net::SocketAddrV6::new(to, 0, 0, 0)), NOW)
            }
        };
        Ok(sent.is_ok())
    }

    fn is_here(&mut self, address: IpAddr) -> bool {
        if let Some((_, here)) = self.checked.iter().find(|(a, _)| *a == address) {
            return *here;
        }
        let here = inet::is_here(address);
        self.checked.push((address, here));
        here
    }

    fn raw(&mut self, v4: bool) -> Result<i32, Trouble> {
        use std::os::fd::AsRawFd;
        let [four, six] = &mut self.raw;
        let (slot, family) = if v4 { (four, libc::AF_INET) } else { (six, libc::AF_INET6) };
        if slot.is_none() {
            let made = socket::socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW);
            *slot = Some(made.map_err(Trouble::step("making a raw socket"))?);
        }
        slot.as_ref().map(|fd| fd.as_fd().as_raw_fd()).ok_or(Trouble::Invalid("a raw socket"))
    }
}

const NOW: MsgFlags = MsgFlags::MSG_DONTWAIT;

/// The whole packet; `None` if it is too long for one.
fn packet(
    source: IpAddr,
    source_port: u16,
    to: IpAddr,
    port: u16,
    protocol: i32,
    one: &Datagram,
) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_HEADER_BYTES + one.data.len()).ok()?;
    let protocol = u8::try_from(protocol).ok()?;
    let byte = |value: u32| u8::try_from(value).unwrap_or(u8::MAX);
    let mut packet = Vec::with_capacity(40 + usize::from(length));
    let mut pseudo = Vec::with_capacity(40);
    match (source, to) {
        (IpAddr::V4(source), IpAddr::V4(to)) => {
            // Version and length of the header, class, total length, no fragments; the kernel adds the sum.
            packet.extend_from_slice(&[0x45, byte(one.class)]);
            packet.extend_from_slice(&length.checked_add(20)?.to_be_bytes());
            packet.extend_from_slice(&[0, 0, 0, 0, byte(one.hops), protocol, 0, 0]);
            pseudo.extend_from_slice(&source.octets());
            pseudo.extend_from_slice(&to.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(to)) => {
            packet.extend_from_slice(&(6 << 28 | u32::from(byte(one.class)) << 20).to_be_bytes());
            packet.extend_from_slice(&length.to_be_bytes());
            packet.extend_from_slice(&[protocol, byte(one.hops)]);
            pseudo.extend_from_slice(&source.octets());
            pseudo.extend_from_slice(&to.octets());
        }
        _ => return None,
    }
    packet.extend_from_slice(&pseudo);
    pseudo.extend_from_slice(&u32::from(length).to_be_bytes());
    pseudo.extend_from_slice(&[0, 0, 0, protocol]);
    let start = packet.len();
    packet.extend_from_slice(&source_port.to_be_bytes());
    packet.extend_from_slice(&port.to_be_bytes());
    // UDP-Lite has here how much is covered by the sum; nothing said is all of it.
    let lite = i32::from(protocol) == libc::IPPROTO_UDPLITE;
    packet.extend_from_slice(&if lite { 0 } else { length }.to_be_bytes());
    packet.extend_from_slice(&[0, 0]);
    packet.extend_from_slice(&one.data);
    let sum = checksum(&pseudo, packet.get(start..)?);
    packet.get_mut(start + 6..start + 8)?.copy_from_slice(&sum.to_be_bytes());
    Some(packet)
}

/// The checksum of the Internet over a header of even length and what follows it. Zero means none: sent as
/// its other form.
fn checksum(pseudo: &[u8], packet: &[u8]) -> u16 {
    let sum_of = |bytes: &[u8]| {
        let pairs = bytes.chunks(2).map(|pair| match pair {
            [high, low] => u64::from(u16::from_be_bytes([*high, *low])),
            [high] => u64::from(*high) << 8,
            _ => 0,
        });
        pairs.sum::<u64>()
    };
    let mut sum = sum_of(pseudo) + sum_of(packet);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match u16::try_from(sum).unwrap_or(0) ^ 0xffff {
        0 => 0xffff,
        sum => sum,
    }
}

#[cfg(test)]
mod tests {
    use super::checksum;

    #[test]
    fn checksums_verify_and_are_never_none() {
        // RFC 1071's example: the sum of these is 0xddf2.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03], &[0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2 ^ 0xffff);
        assert_eq!(checksum(&[0xff, 0xff], &[]), 0xffff);
        assert_eq!(checksum(&[], &[0x01]), 0x0100 ^ 0xffff);
    }
}
