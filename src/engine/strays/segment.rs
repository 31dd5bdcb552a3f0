//! One segment of TCP in its IP packet: what it is, and whether its checksum is right.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes of an IPv4 header without options, of an IPv6 header, of the least TCP header.
const V4_BYTES: usize = 20;
const V6_BYTES: usize = 40;
const TCP_BYTES: usize = 20;
/// The protocol's number.
pub(super) const TCP: u8 = 6;
/// "More fragments", and the place of a fragment.
const FRAGMENT: u16 = 0x3fff;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
/// Where the TCP header has its checksum.
const CHECKSUM: usize = 16;

/// A segment on its way to a socket here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Segment {
    /// The end it is for.
    pub local: SocketAddr,
    /// The end it is from.
    pub remote: SocketAddr,
    /// It asks for a new connection.
    pub opening: bool,
    /// Bytes of the packet; a frame may have some more.
    pub len: usize,
    /// Where its TCP header begins.
    start: usize,
}

/// What else a segment says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Numbers {
    pub(in crate::engine) sequence: u32,
    pub(in crate::engine) acknowledged: u32,
    /// As it is on the wire.
    pub(in crate::engine) window: u16,
    /// It has bytes, or the end.
    pub(in crate::engine) says_something: bool,
}

fn word_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

impl Segment {
    /// What is worth keeping: requests for connections, and what belongs to an open one. Not resets, answers to a
    /// request, fragments, packets with IP options; nor what no other host can have sent.
    pub(in crate::engine) fn of(packet: &[u8]) -> Option<Self> {
        let first = *packet.first()?;
        let (protocol, start, len, from, to): (u8, usize, usize, IpAddr, IpAddr) = match first >> 4 {
            4 => {
                if first != 0x45 || word_at(packet, 6)? & FRAGMENT != 0 {
                    return None;
                }
                let ip = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?).into());
                (*packet.get(9)?, V4_BYTES, word_at(packet, 2)?.into(), ip(12)?, ip(16)?)
            }
            6 => {
                let ip = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?).into());
                (*packet.get(6)?, V6_BYTES, V6_BYTES + usize::from(word_at(packet, 4)?), ip(8)?, ip(24)?)
            }
            _ => return None,
        };
        let tcp = packet.get(start..len).filter(|tcp| tcp.len() >= TCP_BYTES)?;
        let header = usize::from(*tcp.get(12)? >> 4) * 4;
        let flags = *tcp.get(13)? & (SYN | RST | ACK);
        let (from_port, to_port) = (word_at(tcp, 0)?, word_at(tcp, 2)?);
        let broadcast = from == IpAddr::V4(Ipv4Addr::BROADCAST);
        let local_only = from.is_loopback() || from.is_unspecified() || from.is_multicast() || from == to;
        if protocol != TCP
            || !(TCP_BYTES..=tcp.len()).contains(&header)
            || !(flags == SYN || flags == ACK)
            || from_port == 0
            || broadcast
            || local_only
        {
            return None;
        }
        let (local, remote) = (SocketAddr::new(to, to_port), SocketAddr::new(from, from_port));
        Some(Self { local, remote, opening: flags == SYN, len, start })
    }

    pub(in crate::engine) fn numbers(&self, packet: &[u8]) -> Option<Numbers> {
        let tcp = packet.get(self.start..self.len)?;
        let word = |at: usize| Some(u32::from_be_bytes(*tcp.get(at..)?.first_chunk()?));
        let header = usize::from(*tcp.get(12)? >> 4) * 4;
        Some(Numbers {
            sequence: word(4)?,
            acknowledged: word(8)?,
            window: word_at(tcp, 14)?,
            says_something: tcp.len() > header || *tcp.get(13)? & FIN != 0,
        })
    }

    /// Whether the checksum fits.
    pub(super) fn is_whole(&self, packet: &[u8]) -> bool {
        self.sum(packet) == Some(u16::MAX)
    }

    /// Makes it fit: of what came from this very machine it is not made yet.
    pub(super) fn complete(&self, packet: &mut [u8]) {
        make_sum(packet, self.start, self.len);
    }

    fn sum(&self, packet: &[u8]) -> Option<u16> {
        sum(packet, self.start, self.len)
    }
}

/// Makes the checksum of the segment in a packet of ours, whose header has no options.
pub(in crate::engine) fn complete(packet: &mut [u8]) {
    let start = if packet.first().is_some_and(|first| first >> 4 == 4) { V4_BYTES } else { V6_BYTES };
    make_sum(packet, start, packet.len());
}

fn make_sum(packet: &mut [u8], start: usize, len: usize) {
    let at = start + CHECKSUM;
    if let Some(field) = packet.get_mut(at..at + 2) {
        field.fill(0);
    }
    let sum = !sum(packet, start, len).unwrap_or_default();
    if let Some(field) = packet.get_mut(at..at + 2) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
}

/// The sum over the segment, and the addresses, the protocol and the length, as TCP wants it.
fn sum(packet: &[u8], start: usize, len: usize) -> Option<u16> {
    let addresses = if start == V4_BYTES { packet.get(12..V4_BYTES) } else { packet.get(8..V6_BYTES) };
    let tcp = packet.get(start..len)?;
    let mut sum = u64::from(TCP) + u64::try_from(tcp.len()).ok()?;
    for bytes in [addresses?, tcp] {
        for pair in bytes.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u64::from(u16::from_be_bytes([*pair.first()?, low]));
        }
    }
    while sum > u64::from(u16::MAX) {
        sum = (sum & u64::from(u16::MAX)) + (sum >> 16);
    }
    u16::try_from(sum).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A packet with these flags, its checksum not made.
    pub(in super::super) fn packet(from: &str, to: &str, flags: u8, data: &[u8]) -> Vec<u8> {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut tcp = Vec::new();
        tcp.extend(from.port().to_be_bytes());
        tcp.extend(to.port().to_be_bytes());
        tcp.extend([0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(data);
        let len = u16::try_from(tcp.len()).unwrap();
        let mut packet = Vec::new();
        match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                packet.extend([0x45, 0]);
                packet.extend((len + 20).to_be_bytes());
                packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
                packet.extend(from.octets());
                packet.extend(to.octets());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                packet.extend([0x60, 0, 0, 0]);
                packet.extend(len.to_be_bytes());
                packet.extend([6, 64]);
                packet.extend(from.octets());
                packet.extend(to.octets());
            }
            _ => unreachable!(),
        }
        packet.extend(tcp);
        packet
    }

    const ENDS: [(&str, &str); 2] = [("10.0.0.9:1000", "10.0.0.1:80"), ("[fd00::9]:1000", "[fd00::1]:80")];

    #[test]
    fn kinds_of_segments() {
        for (from, to) in ENDS {
            let of = |flags: u8| Segment::of(&packet(from, to, flags, b"abc")).map(|s| s.opening);
            assert_eq!(of(SYN), Some(true));
            assert_eq!(of(ACK), Some(false));
            assert_eq!(of(ACK | 0x08 | 0x01), Some(false), "with an end and a push");
            assert_eq!([of(RST), of(RST | ACK), of(SYN | ACK), of(0), of(1)], [None; 5]);
            let segment = Segment::of(&packet(from, to, ACK, b"abc")).unwrap();
            assert_eq!((segment.remote.to_string(), segment.local.to_string()), (from.into(), to.into()));
        }
        for from in
            ["127.0.0.1:9", "0.0.0.0:9", "224.0.0.1:9", "255.255.255.255:9", "10.0.0.1:9", "10.0.0.9:0"]
        {
            assert_eq!(Segment::of(&packet(from, "10.0.0.1:80", ACK, b"")), None, "{from}");
        }
        let change = |at: usize, to: u8| {
            let mut packet = packet(ENDS[0].0, ENDS[0].1, ACK, b"abc");
            packet[at] = to;
            Segment::of(&packet)
        };
        assert_eq!(change(6, 0x20), None, "a fragment");
        assert_eq!(change(7, 1), None, "a later fragment");
        assert_eq!(change(0, 0x46), None, "options");
        assert_eq!(change(9, 17), None, "UDP");
        assert_eq!(change(32, 15 << 4), None, "a header beyond the end");
        assert_eq!(change(3, 200), None, "longer than it is");
        assert_eq!(change(3, 39), None, "too short");
        assert!(change(8, 1).is_some());
    }

    #[test]
    fn checksums() {
        for ((from, to), data) in ENDS.into_iter().zip([&b"abc"[..], b"abcd"]) {
            let mut bytes = packet(from, to, ACK, data);
            // As Ethernet fills short frames.
            bytes.extend([7; 6]);
            let segment = Segment::of(&bytes).unwrap();
            assert_eq!(segment.len, bytes.len() - 6);
            assert!(!segment.is_whole(&bytes));
            segment.complete(&mut bytes);
            assert!(segment.is_whole(&bytes));
            bytes[segment.len - 1] ^= 1;
            assert!(!segment.is_whole(&bytes));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(first in prop_oneof![Just(0x45u8), Just(0x60)], rest in proptest::collection::vec(any::<u8>(), 0..120)) {
            let mut bytes = vec![first];
            bytes.extend(rest);
            if let Some(segment) = Segment::of(&bytes) {
                segment.complete(&mut bytes);
                prop_assert!(segment.is_whole(&bytes));
            }
        }
    }
}
