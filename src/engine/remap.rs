//! `--tcp-remap OLD=NEW`: sockets that had the address OLD at the source have NEW at the destination.
//!
//! Local ends change. The remote end of a connection changes where the other end is in the same process and so
//! moves as well; anybody else has to be told by the operator.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use crate::engine::address::{end_of, ip_of, octets};
use crate::engine::reason::Reason;
use crate::proto::files::description::Kind;
use crate::proto::files::{Description, Files, TcpConnection};

/// One address in place of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remap {
    /// What sockets have at the source.
    pub old: IpAddr,
    /// What they get at the destination.
    pub new: IpAddr,
}

/// Why a text is no [`Remap`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a remap is written OLD=NEW, two addresses of one version of IP, for example 10.0.0.5=10.0.1.5")]
pub struct BadRemap;

impl FromStr for Remap {
    type Err = BadRemap;

    fn from_str(text: &str) -> Result<Self, BadRemap> {
        let (old, new) = text.split_once('=').ok_or(BadRemap)?;
        let parse = |text: &str| text.parse::<IpAddr>().map(|ip| ip.to_canonical()).map_err(|_| BadRemap);
        let (old, new) = (parse(old)?, parse(new)?);
        let odd = |ip: IpAddr| ip.is_unspecified() || ip.is_multicast();
        if old.is_ipv4() != new.is_ipv4() || old == new || odd(old) || odd(new) {
            return Err(BadRemap);
        }
        Ok(Self { old, new })
    }
}

impl fmt::Display for Remap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.old, self.new)
    }
}

/// What is wrong with these remaps taken together.
pub fn check(remaps: &[Remap]) -> Vec<Reason> {
    let mut seen = HashSet::new();
    let twice = remaps.iter().filter(|remap| !seen.insert(remap.old));
    twice.map(|remap| Reason::new(format!("--tcp-remap {remap}"), "is given twice", "")).collect()
}

/// What becomes of an address.
pub fn of(ip: IpAddr, remaps: &[Remap]) -> IpAddr {
    remaps.iter().find(|remap| remap.old == ip.to_canonical()).map_or(ip, |remap| match (ip, remap.new) {
        // IPv4 in the form of IPv6 keeps its form.
        (IpAddr::V6(_), IpAddr::V4(new)) => new.to_ipv6_mapped().into(),
        (_, new) => new,
    })
}

/// Changes the addresses of the sockets of a process. What is no address stays as it is: others find that out.
pub fn apply(files: &mut Files, remaps: &[Remap]) {
    if remaps.is_empty() {
        return;
    }
    let inside = all_ends(files);
    for description in &mut files.descriptions {
        match &mut description.kind {
            Some(Kind::TcpConnection(socket)) => {
                // One that is asked for still has no other end; what asks its own host goes on to do so.
                let asks_itself = |(local, remote): (SocketAddr, SocketAddr)| {
                    socket.connecting && local.ip() == remote.ip()
                };
                let ends = ends(socket);
                if ends.is_some_and(asks_itself)
                    || ends.is_some_and(|(local, remote)| inside.contains(&(remote, local)))
                {
                    apply_to(&mut socket.remote, remaps);
                }
                apply_to(&mut socket.local, remaps);
            }
            Some(Kind::Tcp(socket)) => apply_to(&mut socket.address, remaps),
            Some(Kind::TcpClosed(socket)) => apply_to(&mut socket.address, remaps),
            Some(Kind::IpSocket(socket)) => {
                if let Some(local) = &mut socket.local {
                    apply_to(&mut local.address, remaps);
                }
            }
            _ => {}
        }
    }
    for socket in &mut files.queued {
        // One whose other end is of the same host: if nobody has that any more, it is of that host still.
        let is_of_one_host = ends(socket).is_some_and(|(local, remote)| local.ip() == remote.ip());
        if is_of_one_host || ends(socket).is_some_and(|(local, remote)| inside.contains(&(remote, local))) {
            apply_to(&mut socket.remote, remaps);
        }
        apply_to(&mut socket.local, remaps);
    }
    for socket in files.handshakes.iter_mut().filter_map(|one| one.connection.as_mut()) {
        apply_to(&mut socket.local, remaps);
    }
}

/// The local and remote ends of all connections, those included that wait to be accepted.
fn all_ends(files: &Files) -> HashSet<(SocketAddr, SocketAddr)> {
    let of = |d: &Description| match &d.kind {
        Some(Kind::TcpConnection(socket)) => ends(socket),
        _ => None,
    };
    files.descriptions.iter().filter_map(of).chain(files.queued.iter().filter_map(ends)).collect()
}

fn ends(socket: &TcpConnection) -> Option<(SocketAddr, SocketAddr)> {
    Some((end_of(&socket.local, socket.local_port)?, end_of(&socket.remote, socket.remote_port)?))
}

/// Changes an address of 4 or 16 bytes.
pub fn apply_to(address: &mut Vec<u8>, remaps: &[Remap]) {
    let Some(ip) = ip_of(address) else { return };
    *address = octets(of(ip, remaps));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::proto::files::{Endpoint, IpSocket, TcpClosed, TcpSocket};

    #[test]
    fn texts() {
        for good in ["10.0.0.5=10.0.1.5", "fd00::5=fd01::5"] {
            assert_eq!(good.parse::<Remap>().unwrap().to_string(), good);
        }
        let mapped: Remap = "::ffff:10.0.0.5=10.0.1.5".parse().unwrap();
        assert_eq!(mapped.to_string(), "10.0.0.5=10.0.1.5");
        for bad in [
            "",
            "10.0.0.5",
            "10.0.0.5=",
            "10.0.0.5=fd00::1",
            "10.0.0.5=10.0.0.5",
            "0.0.0.0=10.0.0.5",
            "10.0.0.5=224.0.0.1",
            "10.0.0.5=10.0.1.5=10.0.2.5",
            "node=10.0.0.5",
        ] {
            assert_eq!(bad.parse::<Remap>(), Err(BadRemap), "{bad}");
        }
        let twice: Vec<Remap> =
            ["10.0.0.5=10.0.1.5", "10.0.0.5=10.0.1.6"].iter().map(|t| t.parse().unwrap()).collect();
        assert_eq!(check(&twice).len(), 1);
        assert_eq!(check(&twice[..1]), vec![]);
    }

    #[test]
    fn a_remote_end_changes_only_where_it_moves_too() {
        let remaps = ["10.0.0.5=10.0.1.5".parse().unwrap()];
        let connection = |local: [u8; 4], local_port, remote: [u8; 4], remote_port| Description {
            kind: Some(Kind::TcpConnection(TcpConnection {
                local: local.to_vec(),
                local_port,
                remote: remote.to_vec(),
                remote_port,
                ..TcpConnection::default()
            })),
            ..Description::default()
        };
        let (old, new, other) = ([10, 0, 0, 5], [10, 0, 1, 5], [10, 0, 0, 6]);
        let descriptions = vec![
            connection(old, 80, old, 1000),
            connection(old, 1000, old, 80),
            connection(old, 80, old, 2000),
            connection(other, 80, old, 1000),
        ];
        let waiting = |local, remote, remote_port| match connection(local, 80, remote, remote_port).kind {
            Some(Kind::TcpConnection(image)) => image,
            _ => unreachable!(),
        };
        let descriptions =
            [descriptions, vec![connection(old, 3000, old, 80), connection(other, 80, old, 3000)]];
        // The other end of the second is nobody's any more.
        let queued = vec![waiting(old, old, 3000), waiting(old, old, 4000), waiting(old, other, 80)];
        let mut files = Files { descriptions: descriptions.concat(), queued, ..Files::default() };
        apply(&mut files, &remaps);
        let expected = [waiting(new, new, 3000), waiting(new, new, 4000), waiting(new, other, 80)];
        assert_eq!(files.queued, expected);
        let expected = [
            connection(new, 80, new, 1000),
            connection(new, 1000, new, 80),
            connection(new, 80, old, 2000),
            connection(other, 80, old, 1000),
            connection(new, 3000, new, 80),
            connection(other, 80, old, 3000),
        ];
        assert_eq!(files.descriptions, expected);
    }

    #[test]
    fn local_ends_change_in_the_form_they_have() {
        let remaps: Vec<Remap> =
            ["10.0.0.5=10.0.1.5", "fd00::5=fd01::5"].iter().map(|t| t.parse().unwrap()).collect();
        let bytes = |text: &str| octets(text.parse().unwrap());
        for (old, new) in [
            (bytes("10.0.0.5"), bytes("10.0.1.5")),
            (bytes("10.0.0.6"), bytes("10.0.0.6")),
            (bytes("0.0.0.0"), bytes("0.0.0.0")),
            (bytes("fd00::5"), bytes("fd01::5")),
            (bytes("::ffff:10.0.0.5"), bytes("::ffff:10.0.1.5")),
            (vec![], vec![]),
            (vec![1, 2, 3], vec![1, 2, 3]),
        ] {
            let kinds = |address: &Vec<u8>| {
                [
                    Kind::Tcp(TcpSocket { address: address.clone(), port: 80, ..TcpSocket::default() }),
                    Kind::TcpClosed(TcpClosed { address: address.clone(), ..TcpClosed::default() }),
                    Kind::IpSocket(IpSocket {
                        local: Some(Endpoint { address: address.clone(), ..Endpoint::default() }),
                        peer: Some(Endpoint { address: vec![10, 0, 0, 5], ..Endpoint::default() }),
                        ..IpSocket::default()
                    }),
                ]
                .map(|kind| Description { kind: Some(kind), ..Description::default() })
                .to_vec()
            };
            let mut files = Files { descriptions: kinds(&old), ..Files::default() };
            apply(&mut files, &remaps);
            assert_eq!(files.descriptions, kinds(&new), "{old:?}");
        }
    }
}
