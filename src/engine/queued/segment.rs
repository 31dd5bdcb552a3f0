//! Segments of TCP with their IP headers, as a peer would send them.

use std::net::{IpAddr, SocketAddr};

use crate::engine::strays::complete;

pub(in crate::engine) const FIN: u8 = 0x01;
pub(in crate::engine) const RST: u8 = 0x04;
pub(in crate::engine) const ACK: u8 = 0x10;
pub(in crate::engine) const SYN: u8 = 0x02;
/// A TCP header without options, and the most that these take.
const HEADER_BYTES: usize = 20;
const MOST_OPTIONS: usize = 40;
const TCP: u8 = 6;
const HOPS: u8 = 64;

/// A segment.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Segment<'a> {
    pub(in crate::engine) from: SocketAddr,
    pub(in crate::engine) to: SocketAddr,
    pub(in crate::engine) sequence: u32,
    pub(in crate::engine) acknowledged: u32,
    pub(in crate::engine) flags: u8,
    pub(in crate::engine) window: u16,
    /// As they are on the wire: a multiple of four bytes.
    pub(in crate::engine) options: &'a [u8],
    pub(in crate::engine) payload: &'a [u8],
}

impl Segment<'_> {
    /// Its packet; `None` if it is too long for one, its ends are not of one version of IP, or its options make no header.
    pub(in crate::engine) fn packet(&self) -> Option<Vec<u8>> {
        if self.options.len() > MOST_OPTIONS || !self.options.len().is_multiple_of(4) {
            return None;
        }
        let header = HEADER_BYTES + self.options.len();
        let length = u16::try_from(header.checked_add(self.payload.len())?).ok()?;
        let mut packet = Vec::with_capacity(usize::from(length) + 40);
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                packet.extend([0x45, 0]);
                packet.extend(length.checked_add(20)?.to_be_bytes());
                // The kernel makes the checksum of this header.
                packet.extend([0, 0, 0x40, 0, HOPS, TCP, 0, 0]);
                packet.extend(from.octets());
                packet.extend(to.octets());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                packet.extend([0x60, 0, 0, 0]);
                packet.extend(length.to_be_bytes());
                packet.extend([TCP, HOPS]);
                packet.extend(from.octets());
                packet.extend(to.octets());
            }
            _ => return None,
        }
        packet.extend(self.from.port().to_be_bytes());
        packet.extend(self.to.port().to_be_bytes());
        packet.extend(self.sequence.to_be_bytes());
        packet.extend(self.acknowledged.to_be_bytes());
        // In units of four bytes, where the header has that.
        packet.extend([u8::try_from(header << 2).ok()?, self.flags]);
        packet.extend(self.window.to_be_bytes());
        packet.extend([0; 4]);
        packet.extend(self.options);
        packet.extend(self.payload);
        complete(&mut packet);
        Some(packet)
    }
}
