//! Live TCP connections, moved under a client of another host.

mod agreed;
mod ahead;
mod glance;
mod many;
mod own;
mod paths;
mod queues;
mod refused;
mod running;
mod states;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use libc::{IPPROTO_IP, IPPROTO_TCP, SOL_SOCKET};

use super::network::{CLIENT, Network, with_network};
use super::sockets::set;
use super::{Held, arrive_silent, options};
use crate::engine::lock::{self, Connection};
use crate::engine::state::files::{
    CapturedFiles, Descriptors, FilesOptions, capture, capture_after, check, drop_silently, leave_repair,
    unsettled, wake_connections,
};
use crate::engine::sys::{fds, socket, tcp};
use crate::proto::files::TcpConnection;
use crate::proto::files::description::Kind;

/// A client that waits for ever would hide what went wrong.
pub(super) use crate::engine::trial::PATIENCE;

pub(super) fn carry() -> FilesOptions {
    FilesOptions { tcp_established: true, ..options() }
}

/// `sockaddr_in` or `sockaddr_in6`.
pub(super) fn name(address: IpAddr, port: u16) -> Vec<u8> {
    let mut name = vec![if address.is_ipv4() { 2 } else { 10 }, 0];
    name.extend(port.to_be_bytes());
    match address {
        IpAddr::V4(ip) => {
            name.extend(ip.octets());
            name.resize(16, 0);
        }
        IpAddr::V6(ip) => {
            name.extend([0; 4]);
            name.extend(ip.octets());
            name.extend([0; 4]);
        }
    }
    name
}

pub(super) fn stream_socket(s: &mut Held, v6: bool) -> i32 {
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    s.call(libc::SYS_socket, &[family.into(), libc::SOCK_STREAM.into(), 0]) as i32
}

pub(super) fn with_name(s: &mut Held, call: i64, fd: i32, address: IpAddr, port: u16) -> nix::Result<i64> {
    let name = name(address, port);
    s.with(|b| {
        let at = b.input(&name);
        b.call(call, &[fd.into(), at, name.len().into()])
    })
}

/// A listening socket of the process: its descriptor and port.
pub(super) fn listener(s: &mut Held, address: IpAddr) -> (i32, u16) {
    let fd = stream_socket(s, address.is_ipv6());
    with_name(s, libc::SYS_bind, fd, address, 0).unwrap();
    s.call(libc::SYS_listen, &[fd.into(), 64]);
    let (_, port, _) = socket::local_address(s.take(fd).as_fd()).unwrap();
    (fd, port)
}

pub(super) fn accept(s: &mut Held, listener: i32) -> i32 {
    s.call(libc::SYS_accept4, &[listener.into(), 0, 0, 0]) as i32
}

pub(super) fn dial(network: &Network, address: IpAddr, port: u16) -> TcpStream {
    let stream = network.in_client(|| TcpStream::connect((address, port)).unwrap());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A process with one connection: (process, its end, the client's end).
pub(super) fn connected(network: &Network, family: usize) -> (Held, i32, TcpStream) {
    let mut s = Held::source();
    let (listening, port) = listener(&mut s, network.service(family));
    let client = dial(network, network.service(family), port);
    let fd = accept(&mut s, listening);
    (s, fd, client)
}

/// What is locked of a process.
pub(super) fn connections_of(s: &Held) -> Vec<Connection> {
    let inodes = Descriptors::take(s.pid()).unwrap().socket_inodes();
    let mut all = lock::connections(&inodes).unwrap();
    all.sort_unstable();
    all
}

/// Moves a process as a migration does: its address goes first and comes last.
pub(super) fn moved(network: &Network, source: Held) -> Held {
    moved_with(network, source, |_| {})
}

/// Likewise, with something else in the images of its connections.
pub(super) fn moved_with(network: &Network, source: Held, change: impl Fn(&mut TcpConnection)) -> Held {
    let before = source.listing();
    network.remove_service();
    let CapturedFiles { mut image, carried, .. } = capture(source.pid(), &carry()).unwrap();
    drop_silently(carried);
    drop(source);
    for description in &mut image.descriptions {
        if let Some(Kind::TcpConnection(connection)) = &mut description.kind {
            change(connection);
        }
    }
    let (there, silent) = arrive_silent(&image, None);
    assert_eq!(there.listing(), before);
    network.add_service();
    assert_eq!(silent.go_live(), []);
    there
}

/// Our view of a socket of the process, which never blocks for ever.
pub(super) fn end(d: &Held, fd: i32) -> TcpStream {
    let stream = TcpStream::from(d.take(fd));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

pub(super) fn state(fd: &impl AsFd) -> u8 {
    socket::option(fd.as_fd(), IPPROTO_TCP, libc::TCP_INFO).unwrap()[0]
}

pub(super) fn wait_for_state(fd: &impl AsFd, wanted: u8) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while state(fd) != wanted {
        assert!(std::time::Instant::now() < deadline, "state {} and not {wanted}", state(fd));
        std::thread::yield_now();
    }
}

pub(super) fn wait_unread(fd: &impl AsFd, bytes: usize) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while fds::readable_bytes(fd.as_fd()).unwrap() < bytes {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
}

pub(super) fn pattern(len: usize, seed: u32) -> Vec<u8> {
    (0..u32::try_from(len).unwrap())
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8)
        .collect()
}

pub(super) fn expect(stream: &mut TcpStream, bytes: &[u8]) {
    let mut seen = vec![0; bytes.len()];
    stream.read_exact(&mut seen).unwrap();
    assert!(seen == bytes);
}

/// Both ends can still say something, and then end cleanly.
pub(super) fn goes_on(server: &mut TcpStream, client: &mut TcpStream) {
    for round in 0..3u8 {
        client.write_all(&[round; 3000]).unwrap();
        expect(server, &[round; 3000]);
        server.write_all(&[round ^ 255; 5000]).unwrap();
        expect(client, &[round ^ 255; 5000]);
    }
}

/// Writes until the socket takes no more; returns what it took.
pub(super) fn stuff(fd: OwnedFd, bytes: &[u8]) -> usize {
    let mut stream = TcpStream::from(fd);
    stream.set_nonblocking(true).unwrap();
    let mut taken = 0;
    while taken < bytes.len() {
        match stream.write(&bytes[taken..]) {
            Ok(n) => taken += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    stream.set_nonblocking(false).unwrap();
    taken
}
