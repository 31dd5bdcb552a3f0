//! What is seen of connections at a glance is what `TCP_REPAIR` says.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::os::linux::fs::MetadataExt;

use super::many::{connections, crowd, look_early};
use super::*;
use crate::engine::state::files::ScannedProcesses;
use crate::engine::state::files::tcp::{Glance, Seen};
use crate::engine::trial::{counted, until};
use crate::proto::files::{Description, Files, TcpConnection};

pub(super) fn inode(s: &Held, fd: i32) -> u64 {
    std::fs::File::from(s.take(fd)).metadata().unwrap().st_ino()
}

fn glance(s: &Held) -> Seen {
    Glance::prepare(s.pid()).expect("a kernel with iterators").look().unwrap()
}

/// Without what is another at each look.
fn still(mut image: TcpConnection) -> TcpConnection {
    image.timestamp = 0;
    image.option_set = 0;
    image
}

/// All connections of a process by `TCP_REPAIR`.
fn repaired(s: &Held) -> HashMap<i32, TcpConnection> {
    let image = capture(s.pid(), &carry()).unwrap().image;
    connections(&image).into_iter().map(|(fd, image)| (fd, image.clone())).collect()
}

/// Milliseconds that may pass between two looks.
const BETWEEN: u32 = 20_000;

/// Compares what is said of these connections both ways. The kernel itself changes them now and then, when it
/// acknowledges late: so until nothing has changed between two glances.
fn compare(s: &Held, ends: &[i32]) -> HashMap<i32, TcpConnection> {
    let mut said = HashMap::new();
    until("two glances that say the same", || {
        let before = glance(s);
        let read = repaired(s);
        let after = glance(s);
        said.clear();
        ends.iter().all(|fd| {
            let inode = inode(s, *fd);
            let (Some(before), Some(after)) = (before.quiet(*fd, inode), after.quiet(*fd, inode)) else {
                return false;
            };
            if still(before.clone()) != still(after.clone()) {
                return false;
            }
            let read = &read[fd];
            assert_eq!(still(before.clone()), still(read.clone()));
            let clocks = (before.timestamp, read.timestamp, after.timestamp);
            let (one, other) = (clocks.1.wrapping_sub(clocks.0), clocks.2.wrapping_sub(clocks.1));
            assert!(one <= BETWEEN && other <= BETWEEN, "{clocks:?}");
            assert_eq!(clocks.0 == 0, read.negotiated & 1 == 0, "{clocks:?}");
            said.insert(*fd, before);
            true
        })
    });
    said
}

/// A client whose network has settings of its own at that moment.
fn dial_with(network: &Network, settings: &[(&str, &str)], to: (IpAddr, u16)) -> TcpStream {
    let path = |name: &str| format!("/proc/sys/net/ipv4/{name}");
    let before: Vec<String> = network.in_client(|| {
        let read = |(name, _): &(&str, &str)| std::fs::read_to_string(path(name)).unwrap();
        let before = settings.iter().map(read).collect();
        settings.iter().for_each(|(name, value)| std::fs::write(path(name), value).unwrap());
        before
    });
    let client = dial(network, to.0, to.1);
    network.in_client(|| {
        for ((name, _), value) in settings.iter().zip(&before) {
            std::fs::write(path(name), value).unwrap();
        }
    });
    client
}

#[test]
fn it_says_what_repair_says() {
    const SETTINGS: &[&[(&str, &str)]] = &[
        &[],
        &[("tcp_timestamps", "0")],
        &[("tcp_sack", "0")],
        &[("tcp_window_scaling", "0")],
        &[("tcp_timestamps", "0"), ("tcp_sack", "0"), ("tcp_window_scaling", "0")],
        &[("tcp_ecn", "1")],
    ];
    with_network(|network| {
        let mut s = Held::source();
        let IpAddr::V4(v4) = network.service(0) else { panic!() };
        let mapped = IpAddr::V6(v4.to_ipv6_mapped());
        let (mut ends, mut clients) = (Vec::new(), Vec::new());
        for (at, to) in [
            (network.service(0), network.service(0)),
            (network.service(1), network.service(1)),
            (mapped, network.service(0)),
        ] {
            let (listening, port) = listener(&mut s, at);
            for (variant, settings) in SETTINGS.iter().enumerate() {
                for traffic in [false, true] {
                    if variant == 3 {
                        // Inherited by what is accepted.
                        set(&mut s, listening, SOL_SOCKET, libc::SO_RCVBUF, 40_000);
                        set(&mut s, listening, IPPROTO_TCP, libc::TCP_MAXSEG, 777);
                    }
                    let mut client = dial_with(network, settings, (to, port));
                    let fd = accept(&mut s, listening);
                    match variant {
                        1 => set(&mut s, fd, SOL_SOCKET, libc::SO_SNDBUF, 50_000),
                        2 => set(&mut s, fd, IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, 9000),
                        _ => {}
                    }
                    if traffic {
                        goes_on(&mut end(&s, fd), &mut client);
                    }
                    ends.push(fd);
                    clients.push(client);
                }
            }
        }
        // And one that the process has opened.
        let there = network.in_client(|| TcpListener::bind((CLIENT[0], 0)).unwrap());
        let fd = stream_socket(&mut s, false);
        let address = there.local_addr().unwrap();
        with_name(&mut s, libc::SYS_connect, fd, address.ip(), address.port()).unwrap();
        ends.push(fd);
        clients.push(there.accept().unwrap().0);
        let said = compare(&s, &ends);
        let all = |of: fn(&TcpConnection) -> u32| {
            let mut all: Vec<u32> = said.values().map(of).collect();
            all.sort_unstable();
            all.dedup();
            all
        };
        assert_eq!(all(|image| image.negotiated & 7), [0, 3, 5, 6, 7]);
        assert_eq!(all(|image| image.negotiated & 8), [0, 8]);
        assert!(all(|image| image.segment_limit).len() >= 3, "{:?}", all(|image| image.segment_limit));
        assert!(all(|image| image.receive_buffer).len() >= 2);
        assert!(all(|image| image.window_clamp).contains(&9000));
        // Duplicates and what is no connection do not matter.
        let again = s.call(libc::SYS_dup, &[ends[0].into()]) as i32;
        assert_eq!(inode(&s, again), inode(&s, ends[0]));
        compare(&s, &ends[..1]);
    });
}

#[test]
fn nothing_is_said_of_what_is_not_quiet() {
    with_network(|network| {
        let mut s = Held::source();
        let (listening, port) = listener(&mut s, network.service(0));
        let mut pair = || {
            let client = dial(network, network.service(0), port);
            (accept(&mut s, listening), client)
        };
        let (quiet, _quiet) = pair();
        let (unread, mut unread_end) = pair();
        let (urgent, urgent_end) = pair();
        let (ended, ended_end) = pair();
        let (shut, _shut_end) = pair();
        let (reset, reset_end) = pair();
        let (signed, _signed_end) = pair();
        let (repaired, _repaired_end) = pair();
        let (unsent, _unsent_end) = pair();
        unread_end.write_all(b"x").unwrap();
        let flags = nix::sys::socket::MsgFlags::MSG_OOB;
        nix::sys::socket::send(urgent_end.as_raw_fd(), b"!", flags).unwrap();
        drop(ended_end);
        s.call(libc::SYS_shutdown, &[shut.into(), libc::SHUT_WR.into()]);
        // On, for no time: its end is a reset.
        let linger = [1u32.to_ne_bytes(), [0; 4]].concat();
        socket::set_option(reset_end.as_fd(), SOL_SOCKET, libc::SO_LINGER, &linger).unwrap();
        drop(reset_end);
        let mut key = name(CLIENT[0].parse().unwrap(), 0);
        key.resize(128, 0);
        key.extend([0, 0, 3, 0, 0, 0, 0, 0]);
        key.extend(b"key");
        key.resize(128 + 8 + 80, 0);
        socket::set_option(s.take(signed).as_fd(), IPPROTO_TCP, libc::TCP_MD5SIG, &key).unwrap();
        tcp::set_repair(s.take(repaired).as_fd(), tcp::REPAIR_ON).unwrap();
        until("all of it has come", || {
            fds::readable_bytes(s.take(unread).as_fd()) == Ok(1)
                && fds::poll_now(s.take(urgent).as_fd(), libc::POLLPRI).unwrap() != 0
                && state(&s.take(ended)) == 8
                && state(&s.take(shut)) == 5
                && state(&s.take(reset)) == 7
        });
        network.cut();
        assert_eq!(stuff(s.take(unsent), b"into nowhere"), 12);
        let seen = glance(&s);
        let said = |fd| seen.quiet(fd, inode(&s, fd)).is_some();
        for fd in [unread, urgent, ended, shut, reset, signed, repaired, unsent, listening] {
            assert!(!said(fd), "{fd}");
        }
        assert!(said(quiet));
        assert!(!said(0), "no socket of TCP");
        // What only stands for the path of a socket is none.
        let path = format!("/proc/self/fd/{quiet}\0");
        let path = s.with(|b| {
            let at = b.input(path.as_bytes());
            b.call(libc::SYS_openat, &[libc::AT_FDCWD.into(), at, libc::O_PATH.into()])
        });
        let path = path.unwrap() as i32;
        let (seen, inode) = (glance(&s), inode(&s, quiet));
        assert!(seen.flags(quiet, inode).is_some() && seen.flags(path, inode).is_none());
    });
}

#[test]
fn quiet_connections_are_not_asked_one_by_one() {
    with_network(|network| {
        let (mut s, ends, mut clients) = crowd(network, 150);
        clients[7].write_all(b"not read yet").unwrap();
        wait_unread(&s.take(ends[7]), 12);
        let us = s.pid().into();
        s.call(libc::SYS_fcntl, &[ends[1].into(), libc::F_SETFL.into(), libc::O_NONBLOCK.into()]);
        s.call(libc::SYS_fcntl, &[ends[2].into(), fds::F_SETSIG.into(), libc::SIGUSR1.into()]);
        s.call(libc::SYS_fcntl, &[ends[3].into(), libc::F_SETOWN.into(), us]);
        s.call(libc::SYS_fcntl, &[ends[4].into(), libc::F_SETFL.into(), libc::O_ASYNC.into()]);
        let inodes = Descriptors::take(s.pid()).unwrap().socket_inodes();
        // As if options had changed: what was made ready serves again.
        let look = look_early(&s).again(s.pid(), &inodes).unwrap();
        let early = look.glance().unwrap();
        let quiet: HashMap<i32, TcpConnection> =
            ends.iter().filter_map(|fd| Some((*fd, early.quiet(*fd, inode(&s, *fd))?))).collect();
        assert_eq!(quiet.len(), 149);
        // Of other kinds, too, and no files.
        let other = s.call(libc::SYS_socket, &[libc::AF_UNIX.into(), libc::SOCK_DGRAM.into(), 0]);
        s.call(libc::SYS_epoll_create1, &[0]);
        let inodes = Descriptors::take(s.pid()).unwrap().socket_inodes();
        assert_eq!(look.own_sockets().unwrap().inodes, inodes);
        s.call(libc::SYS_close, &[other]);
        let mut descriptors = Descriptors::take(s.pid()).unwrap();
        descriptors.glance(&look);
        descriptors.remember(look);
        descriptors.ask(s.calls()).unwrap();
        let scanned = ScannedProcesses::default();
        let (calls, captured) =
            counted("getsockopt", || capture_after(descriptors, &carry(), &scanned).unwrap());
        assert!(calls < 100, "{calls}");
        // Or it would be we who hold them too.
        let CapturedFiles { image: captured, closing, carried } = captured;
        drop((closing, carried));
        let (calls, asked) = counted("getsockopt", || capture(s.pid(), &carry()).unwrap());
        assert!(calls > 1500, "{calls}");
        let (seen, read) = (connections(&captured), connections(&asked.image));
        assert_eq!(seen.len(), 150);
        let descriptions = |files: &Files| -> Vec<Description> {
            files.descriptions.iter().map(|one| Description { kind: None, ..one.clone() }).collect()
        };
        assert_eq!(descriptions(&captured), descriptions(&asked.image));
        assert_eq!(captured.fds, asked.image.fds);
        for fd in ends {
            assert_eq!(still(seen[&fd].clone()), still(read[&fd].clone()));
            let options = |image: &Files, connection: &TcpConnection| {
                image.option_sets[connection.option_set as usize].clone()
            };
            assert_eq!(options(&captured, seen[&fd]), options(&asked.image, read[&fd]));
            if let Some(early) = quiet.get(&fd) {
                assert_eq!(still(early.clone()), still(read[&fd].clone()));
            }
        }
    });
}
