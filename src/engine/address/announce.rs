//! Tells neighbours who has an address now: gratuitous ARP, unsolicited neighbour advertisement.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::errno::Errno;

use crate::engine::address::route::Link;
use crate::engine::sys::packet::{MAC_BYTES, PacketSocket};

const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
const BROADCAST: [u8; MAC_BYTES] = [0xff; MAC_BYTES];
/// The Ethernet address of `ff02::1`, all nodes of the link.
const ALL_NODES_MAC: [u8; MAC_BYTES] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The socket, opened if any device needs it, and the devices that neighbours can be told about.
#[derive(Debug)]
pub(super) struct Announcer {
    socket: Option<PacketSocket>,
    devices: Vec<(u32, [u8; MAC_BYTES])>,
}

impl Announcer {
    pub(super) fn new() -> Self {
        Self { socket: None, devices: Vec::new() }
    }

    /// Makes ready for `address` on `link`. A loopback or a tunnel has no neighbours to tell.
    pub(super) fn prepare(&mut self, link: &Link, address: IpAddr) -> Result<(), Errno> {
        let Some(mac) = link.mac.filter(|_| !address.is_loopback()) else { return Ok(()) };
        if self.socket.is_none() {
            self.socket = Some(PacketSocket::open()?);
        }
        self.devices.push((link.index, mac));
        Ok(())
    }

    /// Announces `address` on the device. That the device is down is fine: there is nobody to tell.
    pub(super) fn announce(&self, index: u32, address: IpAddr) -> Result<(), Errno> {
        let mac = self.devices.iter().find(|(i, _)| *i == index).map(|(_, mac)| *mac);
        let (Some(socket), Some(mac)) = (&self.socket, mac) else { return Ok(()) };
        let sent = match address {
            // Some systems learn from the request, some from the reply.
            IpAddr::V4(ip) => socket
                .send(index, ETH_P_ARP, BROADCAST, &arp(ArpKind::Request, mac, ip))
                .and_then(|()| socket.send(index, ETH_P_ARP, BROADCAST, &arp(ArpKind::Reply, mac, ip))),
            IpAddr::V6(ip) => socket.send(index, ETH_P_IPV6, ALL_NODES_MAC, &advertisement(mac, ip)),
        };
        match sent {
            Err(Errno::ENETDOWN) => Ok(()),
            other => other,
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum ArpKind {
    Request = 1,
    Reply = 2,
}

/// An ARP packet in which sender and target are the same address (RFC 5227, RFC 2002).
fn arp(kind: ArpKind, mac: [u8; MAC_BYTES], ip: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 0x08, 0x00, 6, 4, 0, kind as u8]; // Ethernet, IPv4
    packet.extend(mac);
    packet.extend(ip.octets());
    packet.extend(match kind {
        ArpKind::Request => [0; MAC_BYTES],
        ArpKind::Reply => mac,
    });
    packet.extend(ip.octets());
    packet
}

/// An IPv6 packet with a neighbour advertisement that overrides what neighbours knew (RFC 4861 §4.4).
fn advertisement(mac: [u8; MAC_BYTES], ip: Ipv6Addr) -> Vec<u8> {
    const OVERRIDE: u8 = 0x20;
    let mut icmp = vec![136, 0, 0, 0, OVERRIDE, 0, 0, 0];
    icmp.extend(ip.octets());
    icmp.extend([2, 1]); // target link-layer address, in units of 8 bytes
    icmp.extend(mac);
    let length = [0, 32]; // 24 bytes and the option's 8

    let mut pseudo = Vec::new();
    pseudo.extend(ip.octets());
    pseudo.extend(ALL_NODES.octets());
    pseudo.extend([0, 0, length[0], length[1], 0, 0, 0, ICMPV6]);
    pseudo.extend(&icmp);
    icmp[2..4].copy_from_slice(&checksum(&pseudo).to_be_bytes());

    // Hop limit 255 proves to receivers that no router passed it on.
    let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], ICMPV6, 255];
    packet.extend(ip.octets());
    packet.extend(ALL_NODES.octets());
    packet.extend(icmp);
    packet
}

const ICMPV6: u8 = 58;

/// The Internet checksum of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let sum =
        bytes.chunks_exact(2).fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_verifies() {
        let packet = advertisement([2, 0, 0, 0, 0, 9], Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7));
        let mut pseudo = packet[8..40].to_vec();
        pseudo.extend([0, 0, 0, 32, 0, 0, 0, ICMPV6]);
        pseudo.extend(&packet[40..]);
        assert_eq!(checksum(&pseudo), 0, "a receiver's sum over a good packet is zero");
    }
}
