//! IP addresses as they stand in messages and in images: 4 or 16 bytes.

use std::net::{IpAddr, SocketAddr};

/// The bytes of an address, in network order.
#[must_use]
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The address of 4 or 16 bytes; `None` for any other number of them.
#[must_use]
pub fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// Address and port as on the wire: a v4-mapped address is the v4 one.
#[must_use]
pub fn end_of(address: &[u8], port: u32) -> Option<SocketAddr> {
    Some(SocketAddr::new(ip_of(address)?.to_canonical(), u16::try_from(port).ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for text in ["10.1.2.3", "2001:db8::1", "::ffff:10.1.2.3"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(ip_of(&octets(ip)), Some(ip));
        }
        assert_eq!(end_of(&octets("::ffff:10.1.2.3".parse().unwrap()), 80), "10.1.2.3:80".parse().ok());
    }

    #[test]
    fn of_a_peer_that_lies() {
        for length in [0, 1, 3, 5, 15, 17, 64] {
            assert_eq!(ip_of(&vec![1; length]), None);
        }
        assert_eq!(end_of(&[10, 0, 0, 1], 65_536), None);
    }
}
