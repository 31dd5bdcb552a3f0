//! Sockets: each to its kind, ends of one connection put together.

use std::ffi::OsString;

use libc::SOL_SOCKET;

use super::super::scan::Open;
use super::super::tcp::{self, Tcp};
use super::super::{Stop, ip_socket, unix, unix_diag};
use super::{Collector, index, left_behind};
use crate::engine::sys::socket;
use crate::proto::files::description::Kind;
use crate::proto::files::{UnixEnd, UnixSocket};

impl Collector<'_> {
    pub(super) fn socket(&mut self, description: usize, open: &Open) -> Result<Kind, Stop> {
        if self.other_network {
            return Err(Stop::refuse("is a socket of another network namespace than ours"));
        }
        let option = |name| {
            socket::int_option(open.fd(), SOL_SOCKET, name).map_err(Stop::failed("asking what a socket is"))
        };
        let (domain, kind) = (option(libc::SO_DOMAIN)?, option(libc::SO_TYPE)?);
        let protocol = option(libc::SO_PROTOCOL)?;
        match (domain, kind, protocol) {
            (libc::AF_UNIX, ..) => self.unix_end(open, kind),
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => {
                match tcp::capture(open, self.options.tcp_close)? {
                    Tcp::Idle(image) => {
                        // Held so that connections which arrive after the freeze are ended cleanly.
                        if image.listening {
                            self.closing.push(description);
                        }
                        Ok(Kind::Tcp(image))
                    }
                    Tcp::Dead { image, close_later } => {
                        if close_later {
                            self.closing.push(description);
                        }
                        Ok(Kind::TcpClosed(image))
                    }
                }
            }
            (libc::AF_INET | libc::AF_INET6, ..) if ip_socket::is_known(kind, protocol) => {
                ip_socket::capture(open, (domain, kind, protocol), self.contents).map(Kind::IpSocket)
            }
            _ => Err(Stop::refuse(format!(
                "is {}, which cannot be carried yet",
                socket_words(domain, kind, protocol)
            ))),
        }
    }

    fn unix_end(&mut self, open: &Open, kind: i32) -> Result<Kind, Stop> {
        let inode = unix::inode(open);
        if let Some(known) = self.unix_index.get(&inode) {
            return known.clone().map(|(pair, end)| Kind::UnixEnd(UnixEnd { pair, end }));
        }
        let ask = |i| unix_diag::ask(i).map_err(Stop::failed("asking the kernel about a unix socket"));
        let state = ask(inode)?;
        if state.named || open.link.is_empty() {
            return Err(Stop::refuse("is a unix socket with a name, which cannot be carried yet"));
        }
        if !state.connected {
            return Err(Stop::refuse("is a unix socket without a connection, which cannot be carried yet"));
        }
        let other = self
            .table
            .opens
            .iter()
            .find(|o| o.link_starts_with("socket:[") && unix::inode(o) == state.peer && state.peer != 0);
        let named_peer = socket::peer_has_name(open.fd()).unwrap_or(true);
        if other.is_none() && state.peer != 0 || named_peer {
            let peer = OsString::from(format!("socket:[{}]", state.peer));
            return self.outside(open, &peer, "a unix socket");
        }
        for end in [Some(open), other].into_iter().flatten() {
            if let Some(pids) = self.holders.others(&end.link) {
                if self.is_left(open) {
                    return Ok(left_behind());
                }
                return Err(Stop::refuse(format!(
                    "is a unix socket that another process holds too ({pids})"
                )));
            }
        }
        let made = (|| {
            let mut pair = unix::capture_pair(self.table.pid, open)?;
            pair.ends.push(unix::capture_end(open, state, kind, self.contents)?);
            pair.ends.push(match other {
                Some(other) => unix::capture_end(other, ask(state.peer)?, kind, self.contents)?,
                None => UnixSocket { gone: true, ..UnixSocket::default() },
            });
            self.pairs.push(pair);
            Ok(index(self.pairs.len() - 1))
        })();
        if let Some(other) = other {
            self.unix_index.insert(unix::inode(other), made.clone().map(|pair| (pair, 1)));
        }
        self.unix_index.insert(inode, made.clone().map(|pair| (pair, 0)));
        made.map(|pair| Kind::UnixEnd(UnixEnd { pair, end: 0 }))
    }
}

fn socket_words(domain: i32, kind: i32, protocol: i32) -> String {
    match (domain, kind) {
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM) => {
            format!("a datagram socket of IP protocol {protocol}")
        }
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM) => {
            format!("a stream socket of IP protocol {protocol}")
        }
        (libc::AF_NETLINK, _) => "a netlink socket".to_owned(),
        (libc::AF_PACKET, _) => "a packet socket".to_owned(),
        (libc::AF_VSOCK, _) => "a vsock socket".to_owned(),
        _ => format!("a socket of family {domain}"),
    }
}
