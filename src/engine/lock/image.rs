//! What is to be locked where a process is made again: its sockets, by the description of its descriptors.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Connection;
use crate::engine::address::end_of;
use crate::proto::files::description::Kind;
use crate::proto::files::{Files, TcpConnection, TcpSocket};

/// Where the process will listen, and the connections that it will have. What makes no sense is left out: it is
/// refused where the socket is made.
pub fn of_image(files: &Files) -> Vec<Connection> {
    let mut found = Vec::new();
    for description in &files.descriptions {
        match &description.kind {
            Some(Kind::Tcp(socket)) => found.extend(places_of(socket)),
            Some(Kind::TcpConnection(socket)) => found.extend(connection_of(socket)),
            _ => {}
        }
    }
    found.extend(files.queued.iter().filter_map(connection_of));
    found.extend(files.handshakes.iter().filter_map(|one| connection_of(one.connection.as_ref()?)));
    found.sort_unstable();
    found.dedup();
    found
}

/// Those that wait to be accepted by the process.
pub fn queued_in_image(files: &Files) -> Vec<Connection> {
    files.queued.iter().filter_map(connection_of).collect()
}

/// Where a socket listens, if it does: twice, if on all addresses of both versions of IP.
pub fn places_of(image: &TcpSocket) -> Vec<Connection> {
    let Some(local) = end_of(&image.address, image.port).filter(|_| image.listening) else {
        return Vec::new();
    };
    let v6only = image.options.iter().any(|o| {
        (o.level, o.name) == (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY) && o.value.iter().any(|b| *b != 0)
    });
    let mut found = vec![Connection { local, remote: None }];
    if local.is_ipv6() && local.ip().is_unspecified() && !v6only {
        let local = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), local.port());
        found.push(Connection { local, remote: None });
    }
    found
}

/// Whether a local end is one of these places, or its port is one of all addresses.
pub fn is_at(local: SocketAddr, places: &HashSet<SocketAddr>) -> bool {
    let everywhere: IpAddr = match local {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    places.contains(&local) || places.contains(&SocketAddr::new(everywhere, local.port()))
}

/// The two ends of a connection; `None` if they make no sense.
pub fn connection_of(image: &TcpConnection) -> Option<Connection> {
    let remote = Some(end_of(&image.remote, image.remote_port)?);
    Some(Connection { local: end_of(&image.local, image.local_port)?, remote })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::address::octets;
    use crate::proto::files::{Description, SocketOption};

    #[test]
    fn listeners_of_a_description() {
        let v6only = |on: u8| SocketOption {
            level: libc::IPPROTO_IPV6,
            name: libc::IPV6_V6ONLY,
            value: vec![on, 0, 0, 0],
        };
        let socket = |address: &str, listening, options| TcpSocket {
            address: octets(address.parse().unwrap()),
            port: 80,
            listening,
            options,
            ..TcpSocket::default()
        };
        let locked = |socket: TcpSocket| {
            let kind = Some(Kind::Tcp(socket));
            let files = Files {
                descriptions: vec![Description { kind, ..Description::default() }],
                ..Files::default()
            };
            of_image(&files).into_iter().map(|c| c.local.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(locked(socket("10.0.0.1", true, vec![])), ["10.0.0.1:80"]);
        assert_eq!(locked(socket("10.0.0.1", false, vec![])), Vec::<String>::new());
        assert_eq!(locked(socket("::ffff:10.0.0.1", true, vec![v6only(0)])), ["10.0.0.1:80"]);
        assert_eq!(locked(socket("::", true, vec![v6only(0)])), ["0.0.0.0:80", "[::]:80"]);
        assert_eq!(locked(socket("::", true, vec![v6only(1)])), ["[::]:80"]);
        let mapped = octets("::ffff:10.0.0.1".parse().unwrap());
        let image = TcpConnection {
            local: mapped,
            local_port: 80,
            remote: vec![10, 0, 0, 2],
            remote_port: 1234,
            ..TcpConnection::default()
        };
        let locked_connection = connection_of(&image).unwrap();
        assert_eq!(locked_connection.local.to_string(), "10.0.0.1:80");
        assert_eq!(locked_connection.remote.unwrap().to_string(), "10.0.0.2:1234");
        assert_eq!(locked(TcpSocket { listening: true, port: 1 << 20, ..TcpSocket::default() }), [""; 0]);
    }
}
