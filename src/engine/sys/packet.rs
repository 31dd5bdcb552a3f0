//! A packet socket that only sends: link-layer broadcasts and multicasts of address announcements.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Bytes of an Ethernet address.
pub(crate) const MAC_BYTES: usize = 6;

/// Sends on any device of its network namespace. Open it beforehand and drop it afterwards: both wait for
/// the kernel for milliseconds.
#[derive(Debug)]
pub(crate) struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Opens the socket. It names no protocol, so it receives nothing.
    pub(crate) fn open() -> Result<Self, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        Ok(Self(socket(AddressFamily::Packet, SockType::Datagram, flags, None)?))
    }

    /// Sends `packet` (without the link header, which the kernel writes) to a link-layer address.
    pub(crate) fn send(
        &self,
        index: u32,
        protocol: u16,
        to: [u8; MAC_BYTES],
        packet: &[u8],
    ) -> Result<(), Errno> {
        let mut hardware = [0; 8];
        hardware[..MAC_BYTES].copy_from_slice(&to);
        let address = libc::sockaddr_ll {
            sll_family: FAMILY,
            sll_protocol: protocol.to_be(),
            sll_ifindex: i32::try_from(index).map_err(|_| Errno::ENODEV)?,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: hardware,
        };
        // SAFETY: `packet` is readable for its length and `address` for the length passed, both for the
        // whole call; the kernel writes to neither.
        let sent = unsafe {
            libc::sendto(
                self.0.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const address).cast(),
                ADDRESS_BYTES,
            )
        };
        Errno::result(sent).map(|_| ())
    }
}

/// `AF_PACKET` as the structure wants it.
const FAMILY: u16 = 17;
const ADDRESS_BYTES: libc::socklen_t = 20;
const _: () = assert!(FAMILY as i32 == libc::AF_PACKET);
const _: () = assert!(ADDRESS_BYTES as usize == size_of::<libc::sockaddr_ll>());
