//! Unix socket pairs and TCP.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixStream};

use libc::SOL_SOCKET;

use super::network::with_network;
use super::{Held, moved, options};
use crate::engine::state::files::{FilesOptions, port_free};
use crate::engine::sys::socket;
use crate::engine::trial::{PATIENCE, until};

pub(super) fn set(s: &mut Held, fd: i32, level: i32, name: i32, value: i32) {
    s.with(|b| {
        let data = b.input(&value.to_ne_bytes());
        b.call(libc::SYS_setsockopt, &[fd.into(), level.into(), name.into(), data, 4.into()])
    })
    .unwrap();
}

/// A socket of the process that waits for nothing for ever.
fn unix(d: &Held, fd: i32) -> UnixStream {
    let socket = UnixStream::from(d.take(fd));
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

#[test]
fn stream_pair_keeps_queues_options_and_creator() {
    let mut s = Held::source();
    let (a, b) = s.socketpair(libc::SOCK_STREAM | libc::SOCK_NONBLOCK);
    let bulk: Vec<u8> = (0..90_000u32).map(|i| (i % 249) as u8).collect();
    for part in bulk.chunks(45_000) {
        s.write(a, part);
    }
    s.write(b, b"back");
    set(&mut s, a, SOL_SOCKET, libc::SO_SNDBUF, 70_000);
    super::capture(s.pid(), &options()).unwrap();
    let d = moved(s, &options());
    let (mut at_a, mut at_b) = (unix(&d, a), unix(&d, b));
    let mut seen = vec![0; bulk.len()];
    at_b.read_exact(&mut seen).unwrap();
    assert!(seen == bulk);
    assert_eq!(at_b.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
    let mut back = [0; 4];
    at_a.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"back");
    at_a.write_all(b"on").unwrap();
    at_b.read_exact(&mut back[..2]).unwrap();
    assert_eq!(socket::int_option(at_a.as_fd(), SOL_SOCKET, libc::SO_SNDBUF), Ok(140_000));
    let creator = socket::option(at_a.as_fd(), SOL_SOCKET, libc::SO_PEERCRED).unwrap();
    assert_eq!(creator[..4], d.pid().to_ne_bytes());
}

#[test]
fn pair_made_as_another_user_still_says_so() {
    let mut s = Held::source();
    s.call(libc::SYS_setresgid, &[-1, 1234, -1]);
    s.call(libc::SYS_setresuid, &[-1, 4321, -1]);
    let (a, _) = s.socketpair(libc::SOCK_STREAM);
    s.call(libc::SYS_setresuid, &[-1, 0, -1]);
    s.call(libc::SYS_setresgid, &[-1, 0, -1]);
    let mut d = moved(s, &options());
    let creator = socket::option(d.take(a).as_fd(), SOL_SOCKET, libc::SO_PEERCRED).unwrap();
    assert_eq!(creator[4..8], 4321u32.to_ne_bytes());
    assert_eq!(creator[8..12], 1234u32.to_ne_bytes());
    assert_eq!(d.call(libc::SYS_geteuid, &[]), 0);
}

#[test]
fn datagrams_keep_their_boundaries() {
    for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
        let mut s = Held::source();
        let (a, b) = s.socketpair(kind);
        for message in [&b"one"[..], b"twotwo", b"3"] {
            s.write(a, message);
        }
        let d = moved(s, &options());
        let at_b = UnixDatagram::from(d.take(b));
        at_b.set_nonblocking(true).unwrap();
        let mut buffer = [0; 64];
        let lens: Vec<usize> = (0..3).map(|_| at_b.recv(&mut buffer).unwrap()).collect();
        assert_eq!(lens, [3, 6, 1]);
        assert_eq!(at_b.recv(&mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
    }
}

#[test]
fn shut_and_closed_ends() {
    let mut s = Held::source();
    let (a, b) = s.socketpair(libc::SOCK_STREAM);
    s.write(a, b"tail");
    s.call(libc::SYS_shutdown, &[a.into(), libc::SHUT_WR.into()]);
    let (c, gone) = s.socketpair(libc::SOCK_STREAM);
    s.write(gone, b"left");
    s.call(libc::SYS_close, &[gone.into()]);
    let (e, reset) = s.socketpair(libc::SOCK_STREAM);
    s.write(e, b"never read");
    s.call(libc::SYS_close, &[reset.into()]);
    let (f, reset) = s.socketpair(libc::SOCK_STREAM);
    s.write(reset, b"said first");
    s.write(f, b"never read");
    s.call(libc::SYS_close, &[reset.into()]);
    super::capture(s.pid(), &options()).unwrap();
    let d = moved(s, &options());
    assert_eq!(unix(&d, f).read(&mut [0; 64]).unwrap(), 10);
    assert_eq!(unix(&d, f).read(&mut [0; 64]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let mut text = String::new();
    unix(&d, b).read_to_string(&mut text).unwrap();
    assert_eq!(text, "tail");
    unix(&d, b).write_all(b"answer").unwrap();
    assert_eq!(unix(&d, a).read(&mut [0; 16]).unwrap(), 6);
    text.clear();
    unix(&d, c).read_to_string(&mut text).unwrap();
    assert_eq!(text, "left");
    assert_eq!(unix(&d, e).read(&mut [0; 4]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

fn bound(s: &mut Held, address: [u8; 4], set_up: impl FnOnce(&mut Held, i32)) -> (i32, u16) {
    let fd = s.call(libc::SYS_socket, &[libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0]) as i32;
    set_up(s, fd);
    let mut name = vec![2, 0, 0, 0];
    name.extend_from_slice(&address);
    name.extend_from_slice(&[0; 8]);
    s.with(|b| {
        let name = b.input(&name);
        b.call(libc::SYS_bind, &[fd.into(), name, 16.into()])
    })
    .unwrap();
    let (_, port, _) = socket::local_address(s.take(fd).as_fd()).unwrap();
    (fd, port)
}

#[test]
fn listening_socket_keeps_options_and_backlog() {
    with_network(|_| {
        let mut s = Held::source();
        let (fd, port) = bound(&mut s, [127, 0, 0, 1], |s, fd| {
            set(s, fd, SOL_SOCKET, libc::SO_REUSEADDR, 1);
            set(s, fd, SOL_SOCKET, libc::SO_RCVBUF, 50_000);
            set(s, fd, SOL_SOCKET, libc::SO_KEEPALIVE, 1);
            set(s, fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
            set(s, fd, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 3);
            set(s, fd, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77);
            set(s, fd, libc::IPPROTO_IP, libc::IP_TOS, 16);
            // Not what IP_TOS makes of it.
            set(s, fd, SOL_SOCKET, libc::SO_PRIORITY, 2);
        });
        s.call(libc::SYS_listen, &[fd.into(), 37]);
        set(&mut s, fd, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 5);
        let check = super::super::check(s.pid(), &options()).unwrap();
        assert!(check.reasons.is_empty());
        assert_eq!(check.ports.len(), 1);
        assert_eq!(check.ports[0].port, port);
        assert!(port_free(&check.ports[0]).is_some());
        let all = |h: &Held| {
            let ours = h.take(fd);
            let tables = [super::super::options::COMMON, super::super::options::TCP];
            (
                super::super::options::capture(ours.as_fd(), &tables).unwrap(),
                socket::option(ours.as_fd(), 6, libc::TCP_INFO).unwrap()[28],
            )
        };
        let before = all(&s);
        let d = moved(s, &options());
        assert_eq!(all(&d), before);
        assert_eq!(before.1, 37);
        let freebind = socket::int_option(d.take(fd).as_fd(), libc::IPPROTO_IP, libc::IP_FREEBIND);
        assert_eq!(freebind, Ok(0));
        // Deferred: it is accepted when the client has said something.
        let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        client.write_all(b"hello").unwrap();
        let (mut served, _) = TcpListener::from(d.take(fd)).accept().unwrap();
        served.set_read_timeout(Some(PATIENCE)).unwrap();
        served.read_exact(&mut [0; 5]).unwrap();
        drop(d);
        // Also by a process that another test is starting, which has copies of what we have taken.
        until("that the port is free", || port_free(&check.ports[0]).is_none());
    });
}

#[test]
fn listening_on_an_address_that_is_not_here_yet() {
    with_network(|_| {
        let mut s = Held::source();
        let (fd, _) = bound(&mut s, [203, 0, 113, 7], |s, fd| set(s, fd, 0, libc::IP_FREEBIND, 1));
        s.call(libc::SYS_listen, &[fd.into(), 5]);
        set(&mut s, fd, 0, libc::IP_FREEBIND, 0);
        let fresh = s.call(libc::SYS_socket, &[libc::AF_INET6.into(), libc::SOCK_STREAM.into(), 0]) as i32;
        let d = moved(s, &options());
        let (address, ..) = socket::local_address(d.take(fd).as_fd()).unwrap();
        assert_eq!(address, std::net::IpAddr::from([203, 0, 113, 7]));
        assert_eq!(socket::int_option(d.take(fd).as_fd(), SOL_SOCKET, libc::SO_ACCEPTCONN), Ok(1));
        d.take(fresh);
    });
}

/// Connections inside one process: served end, client end.
#[test]
fn closed_connection_ends_cleanly_at_both_sides_and_sends_nothing() {
    with_network(|_| {
        let mut s = Held::source();
        let (listener, port) =
            bound(&mut s, [127, 0, 0, 1], |s, fd| set(s, fd, SOL_SOCKET, libc::SO_REUSEADDR, 1));
        s.call(libc::SYS_listen, &[listener.into(), 5]);
        let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let served = s.call(libc::SYS_accept4, &[listener.into(), 0, 0, 0]) as i32;
        client.write_all(b"unread").unwrap();
        let mut waiting = TcpStream::connect(("127.0.0.1", port)).unwrap();
        waiting.set_read_timeout(Some(PATIENCE)).unwrap();
        let epoll = s.call(libc::SYS_epoll_create1, &[0]) as i32;
        s.epoll_add(epoll, served, libc::EPOLLIN, 9);
        let refused = super::capture(s.pid(), &options()).unwrap_err().to_string();
        assert!(refused.contains("2 descriptors"), "{refused}");
        assert!(refused.contains("--tcp-close"), "{refused}");
        let give_up = FilesOptions { tcp_close: true, ..options() };
        let mut d = moved(s, &give_up);
        // The clients: an end, not a reset, also for the one that was never accepted.
        assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
        assert_eq!(waiting.read(&mut [0; 8]).unwrap(), 0);
        // The process: an end, and nothing goes out.
        let sent = segments_sent(&client);
        let mut ours = TcpStream::from(d.take(served));
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(ours.local_addr().unwrap().port(), port);
        assert_eq!(ours.read(&mut [0; 8]).unwrap(), 0);
        assert_eq!(ours.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
        let state = crate::engine::sys::fds::poll_now(ours.as_fd(), libc::POLLIN | libc::POLLRDHUP).unwrap();
        assert_eq!(state, libc::POLLIN | libc::POLLRDHUP | libc::POLLHUP);
        assert_eq!(d.epoll_wait(epoll), [(u32::from((libc::POLLIN | libc::POLLHUP).cast_unsigned()), 9)]);
        drop(ours);
        d.call(libc::SYS_close, &[served.into()]);
        assert_eq!(segments_sent(&client), sent);
        // The listening socket goes on beside it.
        TcpStream::connect(("127.0.0.1", port)).unwrap();
    });
}

/// Segments that this connection has received (tcpi_segs_in).
fn segments_sent(client: &TcpStream) -> u32 {
    let info = socket::option(client.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO).unwrap();
    u32::from_ne_bytes(info[140..144].try_into().unwrap())
}

#[test]
fn two_families_share_a_port() {
    with_network(|_| {
        let mut s = Held::source();
        let (v4, port) = bound(&mut s, [0, 0, 0, 0], |_, _| {});
        let v6 = s.call(libc::SYS_socket, &[libc::AF_INET6.into(), libc::SOCK_STREAM.into(), 0]) as i32;
        set(&mut s, v6, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1);
        let mut name = vec![10, 0];
        name.extend_from_slice(&port.to_be_bytes());
        name.resize(28, 0);
        s.with(|b| {
            let name = b.input(&name);
            b.call(libc::SYS_bind, &[v6.into(), name, 28.into()])
        })
        .unwrap();
        for fd in [v4, v6] {
            s.call(libc::SYS_listen, &[fd.into(), 5]);
        }
        let ports = super::super::check(s.pid(), &options()).unwrap().ports;
        assert_eq!(ports.iter().map(|p| p.v6only).collect::<Vec<_>>(), [false, true]);
        let d = moved(s, &options());
        for address in ["127.0.0.1", "::1"] {
            TcpStream::connect((address, port)).unwrap();
        }
        drop(d);
    });
}
