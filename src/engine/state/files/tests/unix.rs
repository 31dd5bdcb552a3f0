//! Unix sockets with names.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;

use libc::{SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM, SOL_SOCKET};

use super::sockets::set;
use super::{AheadSockets, Held, arrive, build, capture, moved, options};
use crate::engine::clocks::Shift;
use crate::engine::state::objects::Objects;
use crate::engine::sys::{datagram, fds, socket};
use crate::engine::trial::until;

fn new(s: &mut Held, kind: i32) -> i32 {
    s.call(libc::SYS_socket, &[libc::AF_UNIX.into(), (kind | libc::SOCK_NONBLOCK).into(), 0]) as i32
}

fn name_call(s: &mut Held, number: i64, fd: i32, name: &[u8]) {
    let raw = [&1u16.to_ne_bytes()[..], name].concat();
    s.with(|b| {
        let data = b.input(&raw);
        b.call(number, &[fd.into(), data, raw.len().into()])
    })
    .unwrap();
}

fn bound(s: &mut Held, kind: i32, name: &[u8]) -> i32 {
    let fd = new(s, kind);
    name_call(s, libc::SYS_bind, fd, name);
    fd
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// Nothing but what the sockets made.
fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        directory.read_dir().unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn listening_sockets_are_reached_by_their_names() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("l");
    let mut s = Held::source();
    s.call(libc::SYS_setresgid, &[-1, 1234, -1]);
    let fd = bound(&mut s, SOCK_STREAM, bytes(&path));
    s.call(libc::SYS_listen, &[fd.into(), 37]);
    s.call(libc::SYS_setresgid, &[-1, 0, -1]);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o721)).unwrap();
    let abstract_name = format!("\0migrate-{}", s.pid());
    let packets = bound(&mut s, SOCK_SEQPACKET, abstract_name.as_bytes());
    s.call(libc::SYS_listen, &[packets.into(), 1]);
    let idle = new(&mut s, SOCK_STREAM);
    set(&mut s, idle, SOL_SOCKET, libc::SO_PASSCRED, 1);
    let removed = bound(&mut s, SOCK_DGRAM, bytes(&directory.path().join("removed")));
    std::fs::remove_file(directory.path().join("removed")).unwrap();
    let d = moved(s, &options());
    assert_eq!(names_in(directory.path()), ["l"]);
    let meta = path.metadata().unwrap();
    assert_eq!((meta.mode() & 0o777, meta.gid()), (0o721, 1234));
    let listener = UnixListener::from(d.take(fd));
    assert_eq!(listener.local_addr().unwrap().as_pathname(), Some(path.as_path()));
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"hello").unwrap();
    let mut got = [0; 5];
    listener.accept().unwrap().0.read_exact(&mut got).unwrap();
    let served_by = socket::option(client.as_fd(), SOL_SOCKET, libc::SO_PEERCRED).unwrap();
    assert_eq!(served_by[..4], d.pid().to_ne_bytes());
    assert_eq!(served_by[8..12], 1234u32.to_ne_bytes());
    assert_eq!(datagram::raw_name(d.take(packets).as_fd()).unwrap()[2..], *abstract_name.as_bytes());
    assert_eq!(socket::int_option(d.take(packets).as_fd(), SOL_SOCKET, libc::SO_ACCEPTCONN), Ok(1));
    assert_eq!(socket::int_option(d.take(idle).as_fd(), SOL_SOCKET, libc::SO_PASSCRED), Ok(1));
    let gone = UnixDatagram::from(d.take(removed));
    assert_eq!(gone.local_addr().unwrap().as_pathname(), Some(directory.path().join("removed").as_path()));
    let ask = |fd| super::super::unix_diag::ask(std::fs::File::from(fd).metadata().unwrap().ino()).unwrap();
    assert_eq!((ask(d.take(fd)).backlog, ask(d.take(packets)).backlog), (37, 1));
}

#[test]
fn datagrams_keep_their_senders_and_connections_their_targets() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mut s = Held::source();
    let server = bound(&mut s, SOCK_DGRAM, bytes(&path("server")));
    let name = format!("\0migrate-d-{}", s.pid());
    let client = bound(&mut s, SOCK_DGRAM, name.as_bytes());
    name_call(&mut s, libc::SYS_connect, client, bytes(&path("server")));
    s.write(client, b"from inside");
    let outside = UnixDatagram::bind(path("outside")).unwrap();
    outside.send_to(b"", path("server")).unwrap();
    outside.send_to(&[7; 50_000], path("server")).unwrap();
    UnixDatagram::unbound().unwrap().send_to(b"nameless", path("server")).unwrap();
    let logger = UnixDatagram::bind(path("log")).unwrap();
    let logging = new(&mut s, SOCK_DGRAM);
    name_call(&mut s, libc::SYS_connect, logging, bytes(&path("log")));
    let d = moved(s, &options());
    assert_eq!(names_in(directory.path()), ["log", "outside", "server"]);
    let at_server = UnixDatagram::from(d.take(server));
    let mut buffer = vec![0; 60_000];
    let mut next = || at_server.recv_from(&mut buffer).unwrap();
    let (len, from) = next();
    assert_eq!((len, from.as_abstract_name()), (11, Some(&name.as_bytes()[1..])));
    for expected in [0, 50_000] {
        let (len, from): (usize, SocketAddr) = next();
        assert_eq!((len, from.as_pathname()), (expected, Some(path("outside").as_path())));
    }
    let (len, from) = next();
    assert_eq!((len, from.is_unnamed()), (8, true));
    UnixDatagram::from(d.take(client)).send(b"more").unwrap();
    assert_eq!(next().0, 4);
    UnixDatagram::from(d.take(logging)).send(b"logged").unwrap();
    assert_eq!(logger.recv(&mut buffer).unwrap(), 6);
    // By its own name: the sender's answer arrives.
    outside.send_to(b"again", path("server")).unwrap();
}

#[test]
fn a_name_that_is_used_there_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("n");
    let mut s = Held::source();
    bound(&mut s, SOCK_DGRAM, bytes(&path));
    let image = capture(s.pid(), &options()).unwrap().image;
    let refusal = || {
        let built = build(&image, None, &Shift::default(), &Objects::default(), AheadSockets::default());
        built.unwrap_err().to_string()
    };
    assert!(refusal().contains("in use"), "{}", refusal());
    drop(s);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"precious").unwrap();
    assert!(refusal().contains("another kind of file"), "{}", refusal());
    std::fs::remove_file(&path).unwrap();
    // Given up before the process runs: as if it had never been.
    drop(UnixDatagram::bind(&path).unwrap());
    let stale = path.metadata().unwrap().ino();
    // As soon as no process that another test is starting has a copy of that socket.
    until("that nobody uses it", || {
        build(&image, None, &Shift::default(), &Objects::default(), AheadSockets::default()).is_ok()
    });
    assert_eq!((names_in(directory.path()), path.metadata().unwrap().ino()), (vec!["n".to_owned()], stale));
    drop(arrive(&image, None));
    assert_ne!(path.metadata().unwrap().ino(), stale);
    drop(directory);
    assert!(refusal().contains("does not exist"), "{}", refusal());
}

#[test]
fn what_waits_at_a_name_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("l");
    let mut s = Held::source();
    let fd = bound(&mut s, SOCK_STREAM, bytes(&path));
    s.call(libc::SYS_listen, &[fd.into(), 5]);
    let client = UnixStream::connect(&path).unwrap();
    let refused = capture(s.pid(), &options()).unwrap_err().to_string();
    assert!(refused.contains("1 connections not accepted"), "{refused}");
    s.call(libc::SYS_accept4, &[fd.into(), 0, 0, 0]);
    let refused = capture(s.pid(), &options()).unwrap_err().to_string();
    assert!(refused.contains("leads out of the process"), "{refused}");
    drop(client);
    let mut s = Held::source();
    let (a, b) = s.socketpair(SOCK_STREAM);
    set(&mut s, b, SOL_SOCKET, 76, 1);
    s.write(a, b"who");
    let refused = capture(s.pid(), &options()).unwrap_err().to_string();
    assert!(refused.contains("pidfd"), "{refused}");
}

#[test]
fn connections_to_a_name_within_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("l");
    for kind in [SOCK_STREAM, SOCK_SEQPACKET] {
        let mut s = Held::source();
        let listener = bound(&mut s, kind, bytes(&path));
        s.call(libc::SYS_listen, &[listener.into(), 5]);
        let [mut clients, mut served] = [[0; 3]; 2];
        for i in 0..3 {
            clients[i] = new(&mut s, kind);
            name_call(&mut s, libc::SYS_connect, clients[i], bytes(&path));
            served[i] = s.call(libc::SYS_accept4, &[listener.into(), 0, 0, 0]) as i32;
            s.write(clients[i], b"question");
            // Unread data in an end that is closed would turn the end into a reset.
            if i != 1 {
                s.write(served[i], b"answer");
            }
        }
        s.call(libc::SYS_shutdown, &[clients[0].into(), libc::SHUT_WR.into()]);
        s.call(libc::SYS_close, &[clients[1].into()]);
        // The connection outlives its listener, and so does the name.
        s.call(libc::SYS_close, &[listener.into()]);
        std::fs::remove_file(&path).unwrap();
        let d = moved(s, &options());
        assert!(names_in(directory.path()).is_empty());
        for i in 0..3 {
            let mut at = UnixStream::from(d.take(served[i]));
            assert_eq!(at.local_addr().unwrap().as_pathname(), Some(path.as_path()));
            let mut buffer = [0; 64];
            assert_eq!(at.read(&mut buffer).unwrap(), 8);
            match i {
                0 => assert_eq!(at.read(&mut buffer).unwrap(), 0),
                1 => {
                    // As long as a process that is being started has a copy, it is open.
                    let ended = || fds::poll_now(at.as_fd(), 0).unwrap() & libc::POLLHUP != 0;
                    until("the end of the connection", ended);
                    assert!(at.write(b"x").is_err());
                }
                _ => at.write_all(b"more").unwrap(),
            }
            if i != 1 {
                let mut client = UnixStream::from(d.take(clients[i]));
                assert_eq!(client.peer_addr().unwrap().as_pathname(), Some(path.as_path()));
                assert!(client.local_addr().unwrap().is_unnamed());
                assert_eq!(client.read(&mut buffer[..6]).unwrap(), 6);
                if i == 2 {
                    assert_eq!(client.read(&mut buffer).unwrap(), 4);
                }
            }
        }
    }
}

#[test]
fn unread_data_keeps_the_credentials_of_the_process() {
    let mut s = Held::source();
    let mut fds = Vec::new();
    for kind in [SOCK_STREAM, SOCK_DGRAM] {
        let (a, b) = s.socketpair(kind);
        set(&mut s, b, SOL_SOCKET, libc::SO_PASSCRED, 1);
        s.write(a, b"root");
        s.call(libc::SYS_setresuid, &[4321, -1, -1]);
        s.write(a, b"user");
        s.call(libc::SYS_setresuid, &[0, -1, -1]);
        // Gives this end of datagrams a name of the kernel's choice.
        s.write(b, b"back");
        fds.push((a, b, datagram::raw_name(s.take(b).as_fd()).unwrap()));
    }
    let pid = s.pid();
    let d = moved(s, &options());
    assert_eq!(fds.iter().map(|(.., name)| name.len()).collect::<Vec<_>>(), [2, 8]);
    for (a, b, name) in fds {
        assert_eq!(datagram::raw_name(d.take(b).as_fd()).unwrap(), name);
        let mut buffer = [0; 4];
        let at_b = d.take(b);
        for uid in [0, 4321] {
            let seen = socket::peek(at_b.as_fd(), &mut buffer, 0, true).unwrap();
            assert_eq!((seen.len, seen.credentials), (4, Some([d.pid() as u32, uid, 0])), "was {pid}");
            nix::unistd::read(&at_b, &mut buffer).unwrap();
        }
        let back = socket::peek(d.take(a).as_fd(), &mut buffer, 0, false).unwrap();
        assert_eq!(back.len, 4);
    }
    let mut s = Held::source();
    let (a, b) = s.socketpair(SOCK_STREAM);
    set(&mut s, b, SOL_SOCKET, libc::SO_PASSCRED, 1);
    UnixStream::from(s.take(a)).write_all(b"ours").unwrap();
    let refused = capture(s.pid(), &options()).unwrap_err().to_string();
    assert!(refused.contains(&format!("credentials of pid {}", std::process::id())), "{refused}");
}
