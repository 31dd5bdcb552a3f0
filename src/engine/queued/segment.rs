//! Segments of TCP with their IP headers, as a peer would send them.

use std::net::{IpAddr, SocketAddr};

use crate::engine::strays::complete;

pub(super) const FIN: u8 = 0x01;
pub(super) const RST: u8 = 0x04;
pub(super) const ACK: u8 = 0x10;
/// A TCP header without options, in units of four bytes, where it has that.
const HEADER_WORDS: u8 = 5;
const HEADER_BYTES: u16 = 20;
const TCP: u8 = 6;
const HOPS: u8 = 64;

/// A segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment<'a> {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) sequence: u32,
    pub(super) acknowledged: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    pub(super) payload: &'a [u8],
}

impl Segment<'_> {
    /// Its packet; `None` if it is too long for one, or its ends are not of one version of IP.
    pub(super) fn packet(&self) -> Option<Vec<u8>> {
        let length = u16::try_from(self.payload.len()).ok()?.checked_add(HEADER_BYTES)?;
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
        packet.extend([HEADER_WORDS << 4, self.flags]);
        packet.extend(self.window.to_be_bytes());
        packet.extend([0; 4]);
        packet.extend(self.payload);
        complete(&mut packet);
        Some(packet)
    }
}
