//! Sockets: each to its kind.

use libc::SOL_SOCKET;

use super::super::scan::Open;
use super::super::tcp::{self, Captures, Tcp};
use super::super::{FilesOptions, Stop, ip_socket, netlink};
use super::Collector;
use crate::engine::sys::socket;
use crate::proto::files::TcpConnection;
use crate::proto::files::description::Kind;

/// What a socket is, and all of it if it is one of TCP.
pub(super) enum Seen {
    Tcp(Tcp),
    /// A live connection of which there is nothing more to be asked.
    Quiet(TcpConnection),
    Other {
        domain: i32,
        kind: i32,
        protocol: i32,
    },
}

/// Looks at a socket. Of these a server has thousands: all processors do it at once.
pub(super) fn look(open: &Open, options: &FilesOptions, all: &Captures) -> Result<Seen, Stop> {
    if options.tcp_established
        && let Some(image) = all.quiet(open)
    {
        return Ok(Seen::Quiet(image));
    }
    if let Some(family) = all.family_of(open) {
        return tcp::capture(open, family, options, all).map(Seen::Tcp);
    }
    let option = |name| {
        socket::int_option(open.fd(), SOL_SOCKET, name).map_err(Stop::failed("asking what a socket is"))
    };
    let (domain, kind) = (option(libc::SO_DOMAIN)?, option(libc::SO_TYPE)?);
    let protocol = option(libc::SO_PROTOCOL)?;
    match (domain, kind, protocol) {
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => {
            tcp::capture(open, domain, options, all).map(Seen::Tcp)
        }
        _ => Ok(Seen::Other { domain, kind, protocol }),
    }
}

impl Collector<'_> {
    pub(super) fn socket(&mut self, description: usize, open: &Open, seen: Seen) -> Result<Kind, Stop> {
        let (domain, kind, protocol) = match seen {
            Seen::Tcp(tcp) => return self.tcp(description, open, tcp),
            Seen::Quiet(image) => {
                self.quiet.insert(description);
                return self.connection(open, image);
            }
            Seen::Other { domain, kind, protocol } => (domain, kind, protocol),
        };
        match (domain, kind, protocol) {
            (libc::AF_UNIX, ..) => self.unix_end(open, kind),
            (libc::AF_INET | libc::AF_INET6, ..) if ip_socket::is_known(kind, protocol) => {
                if let Some(pids) = self.holders.others(&open.link) {
                    return self.held_too(open, ip_socket::words(kind, protocol), &pids);
                }
                ip_socket::capture(open, (domain, kind, protocol), self.contents).map(Kind::IpSocket)
            }
            (libc::AF_NETLINK, ..) => {
                if let Some(pids) = self.holders.others(&open.link) {
                    return self.held_too(open, "a netlink socket", &pids);
                }
                netlink::capture(open, kind, protocol, self.contents).map(Kind::Netlink)
            }
            _ => Err(Stop::refuse(format!(
                "is {}, which cannot be carried yet",
                socket_words(domain, kind, protocol)
            ))),
        }
    }

    fn tcp(&mut self, description: usize, open: &Open, tcp: Tcp) -> Result<Kind, Stop> {
        match tcp {
            Tcp::Idle(image) => {
                // Whoever stays would lose what it listens on as soon as the process has gone.
                if let Some(pids) = self.holders.others(&open.link).filter(|_| image.listening) {
                    let why = format!("is a listening socket that another process holds too ({pids})");
                    let remedy = "the others must close it (systemd: stop the .socket unit)";
                    return Err(Stop::advise(why, remedy));
                }
                // Held so that connections which arrive after the freeze are ended cleanly.
                if image.listening {
                    self.closing.push(description);
                }
                Ok(Kind::Tcp(image))
            }
            Tcp::Live(image) => self.connection(open, image),
            Tcp::Dead { image, close_later } => {
                if close_later {
                    self.closing.push(description);
                }
                Ok(Kind::TcpClosed(image))
            }
        }
    }
}

impl Collector<'_> {
    fn connection(&self, open: &Open, image: TcpConnection) -> Result<Kind, Stop> {
        match self.holders.others(&open.link) {
            Some(pids) => self.held_too(open, "a TCP connection", &pids),
            None => Ok(Kind::TcpConnection(image)),
        }
    }
}

const AF_SMC: i32 = 43;

fn socket_words(domain: i32, kind: i32, protocol: i32) -> String {
    match (domain, kind) {
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM) => {
            format!("a datagram socket of IP protocol {protocol}")
        }
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM) if protocol == libc::IPPROTO_MPTCP => {
            "an MPTCP socket".to_owned()
        }
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM) => {
            format!("a stream socket of IP protocol {protocol}")
        }
        (libc::AF_PACKET, _) => "a packet socket".to_owned(),
        (AF_SMC, _) => "an SMC socket".to_owned(),
        (libc::AF_VSOCK, _) => "a vsock socket".to_owned(),
        _ => format!("a socket of family {domain}"),
    }
}
