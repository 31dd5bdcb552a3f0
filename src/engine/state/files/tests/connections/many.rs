//! Many connections: what is said once for all of them, and what is known of them early.

use std::collections::HashMap;

use super::super::all_free;
use super::*;
use crate::engine::state::files::{AheadSockets, EarlyLook, RestoreFilesError, ScannedProcesses, build};
use crate::engine::trial::until;
use crate::proto::files::description::Kind;
use crate::proto::files::{Files, TcpConnection};

/// A process with that many connections: their descriptors, and the ends of the client.
pub(super) fn crowd(network: &Network, count: usize) -> (Held, Vec<i32>, Vec<TcpStream>) {
    let mut s = Held::source();
    let (listening, port) = listener(&mut s, network.service(0));
    let connect = |_| (dial(network, network.service(0), port), accept(&mut s, listening));
    let (clients, ends) = (0..count).map(connect).unzip();
    (s, ends, clients)
}

pub(super) fn look_early(s: &Held) -> EarlyLook {
    let inodes = Descriptors::take(s.pid()).unwrap().socket_inodes();
    EarlyLook::at(s.pid(), &inodes, &inodes).expect("a kernel that counts calls")
}

fn captured_after(s: &mut Held, look: EarlyLook) -> CapturedFiles {
    let mut descriptors = Descriptors::take(s.pid()).unwrap();
    descriptors.glance(&look);
    descriptors.remember(look);
    descriptors.ask(s.calls()).unwrap();
    capture_after(descriptors, &carry(), &ScannedProcesses::default()).unwrap()
}

/// Ends a process whose connections go on; what they are said to be.
pub(super) fn gone(s: Held, captured: CapturedFiles) -> Files {
    drop_silently(captured.carried);
    drop(captured.closing);
    drop(s);
    captured.image
}

/// The connections of an image by descriptor.
pub(super) fn connections(image: &Files) -> HashMap<i32, &TcpConnection> {
    let of = |fd: &crate::proto::files::Fd| match &image.descriptions[fd.description as usize].kind {
        Some(Kind::TcpConnection(c)) => Some((fd.number as i32, c)),
        _ => None,
    };
    image.fds.iter().filter_map(of).collect()
}

/// TCP_NODELAY of each connection in an image.
fn nodelay(image: &Files) -> HashMap<i32, u8> {
    let of = |c: &TcpConnection| {
        let set = &image.option_sets[c.option_set as usize].options;
        set.iter().find(|o| (o.level, o.name) == (IPPROTO_TCP, libc::TCP_NODELAY)).unwrap().value[0]
    };
    connections(image).into_iter().map(|(fd, c)| (fd, of(c))).collect()
}

#[test]
fn an_option_that_changes_after_the_early_look_arrives() {
    with_network(|network| {
        let (mut s, ends, _clients) = crowd(network, 120);
        let look = look_early(&s);
        assert!(look.holds());
        set(&mut s, ends[70], IPPROTO_TCP, libc::TCP_NODELAY, 1);
        assert!(!look.holds());
        let captured = captured_after(&mut s, look);
        let image = gone(s, captured);
        let seen = nodelay(&image);
        assert!(ends.iter().all(|fd| seen[fd] == u8::from(*fd == ends[70])));
        let (d, _silent) = arrive_silent(&image, None);
        for fd in ends.iter().copied() {
            let now = socket::int_option(d.take(fd).as_fd(), IPPROTO_TCP, libc::TCP_NODELAY);
            assert_eq!(now, Ok(i32::from(fd == ends[70])));
        }
    });
}

/// Not by the process: nobody counts that, and so it shows that the options are not read again.
#[test]
fn options_that_were_seen_early_are_not_read_again() {
    with_network(|network| {
        let (mut s, mut ends, mut clients) = crowd(network, 120);
        let look = look_early(&s);
        let changed = s.take(ends[3]);
        socket::set_int_option(changed.as_fd(), IPPROTO_TCP, libc::TCP_NODELAY, 1).unwrap();
        // Nor does it matter that there are more connections by now.
        let (listening, port) = listener(&mut s, network.service(0));
        clients.push(dial(network, network.service(0), port));
        ends.push(accept(&mut s, listening));
        let late = s.take(ends[120]);
        socket::set_int_option(late.as_fd(), IPPROTO_TCP, libc::TCP_NODELAY, 1).unwrap();
        drop((changed, late));
        assert!(look.holds());
        let seen = nodelay(&captured_after(&mut s, look).image);
        assert_eq!((seen[&ends[3]], seen[&ends[120]]), (0, 1));
    });
}

#[test]
fn a_thread_of_the_process_is_counted_too() {
    with_network(|network| {
        let (s, _ends, _clients) = crowd(network, 101);
        let mut python = std::process::Command::new("python3");
        let piped = python.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = crate::engine::trial::Killed::spawn(piped.args(["-c", THREADS]));
        let mut word = [0; 1];
        child.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
        // Its own sockets do not matter, but that there are enough.
        let inodes = Descriptors::take(s.pid()).unwrap().socket_inodes();
        let look = EarlyLook::at(child.id() as i32, &inodes, &inodes).expect("a kernel that counts calls");
        let before = look.holds();
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
        let after = look.holds();
        assert_eq!((before, after), (true, false));
    });
}

/// The second thread starts a third, which sets an option.
const THREADS: &str = "
import os, socket, threading
s = socket.socket()
def set():
    s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    os.write(1, b'd')
def wait():
    os.write(1, b'r')
    os.read(0, 1)
    threading.Thread(target=set).start()
t = threading.Thread(target=wait)
t.start()
t.join()
os.read(0, 1)
";

#[test]
fn what_is_alike_is_said_once() {
    with_network(|network| {
        let (mut s, ends, _clients) = crowd(network, 140);
        for fd in [ends[1], ends[139]] {
            set(&mut s, fd, SOL_SOCKET, libc::SO_KEEPALIVE, 1);
        }
        set(&mut s, ends[5], IPPROTO_TCP, libc::TCP_KEEPIDLE, 77);
        let captured = capture(s.pid(), &carry()).unwrap();
        let image = gone(s, captured);
        let set_of: HashMap<i32, u32> =
            connections(&image).into_iter().map(|(fd, c)| (fd, c.option_set)).collect();
        assert_eq!(image.option_sets.len(), 3);
        assert_eq!(set_of[&ends[1]], set_of[&ends[139]]);
        assert!([ends[5], ends[1]].iter().all(|fd| set_of[fd] != set_of[&ends[0]]));
        assert!(ends.iter().filter(|fd| set_of[fd] == set_of[&ends[0]]).count() == 137);
        let (d, _silent) = arrive_silent(&image, None);
        let value = |fd, level, name| socket::int_option(d.take(fd).as_fd(), level, name).unwrap();
        for fd in ends.iter().copied() {
            let alive = value(fd, SOL_SOCKET, libc::SO_KEEPALIVE);
            assert_eq!(alive, i32::from(fd == ends[1] || fd == ends[139]));
            assert_eq!(value(fd, IPPROTO_TCP, libc::TCP_KEEPIDLE) == 77, fd == ends[5]);
        }
    });
}

#[test]
fn a_set_that_is_not_there_is_an_error() {
    with_network(|network| {
        let (s, _fd, _client) = connected(network, 0);
        let captured = capture(s.pid(), &carry()).unwrap();
        let mut image = gone(s, captured);
        let sets = u32::try_from(image.option_sets.len()).unwrap();
        for description in &mut image.descriptions {
            if let Some(Kind::TcpConnection(connection)) = &mut description.kind {
                connection.option_set = sets;
            }
        }
        until("that its ports are free", || all_free(&image));
        let built = build(&image, None, &Default::default(), &Default::default(), AheadSockets::default());
        assert!(matches!(built, Err(RestoreFilesError::Invalid("a set of socket options"))));
    });
}

#[test]
fn the_process_says_the_same_of_its_sockets_as_proc() {
    with_network(|network| {
        let (mut s, ends, _clients) = crowd(network, 3);
        s.call(libc::SYS_fcntl, &[ends[1].into(), libc::F_SETFD.into(), libc::FD_CLOEXEC.into()]);
        let mut asked = Descriptors::take(s.pid()).unwrap();
        asked.ask(s.calls()).unwrap();
        let asked = capture_after(asked, &carry(), &ScannedProcesses::default()).unwrap().image;
        let read = capture(s.pid(), &carry()).unwrap().image;
        assert_eq!(asked.fds, read.fds);
        let closed = |fd: i32| asked.fds.iter().find(|f| f.number as i32 == fd).unwrap().cloexec;
        assert_eq!(ends.iter().map(|fd| closed(*fd)).collect::<Vec<_>>(), [false, true, false]);
    });
}

/// To read an epoll that watches thousands takes as long as a glance at them, at which one processor looks. So what it
/// is made to watch afterwards, which nobody can do to a process that stands still, is not carried.
#[test]
fn epolls_are_read_while_connections_are_seen_at_a_glance() {
    with_network(|network| {
        let (mut s, ends, _clients) = crowd(network, 100);
        let epoll = s.call(libc::SYS_epoll_create1, &[libc::EPOLL_CLOEXEC.into()]) as i32;
        let other = s.call(libc::SYS_epoll_create1, &[0]) as i32;
        let again = s.call(libc::SYS_dup, &[epoll.into()]) as i32;
        for fd in &ends {
            s.epoll_add(epoll, *fd, libc::EPOLLIN, 7);
        }
        let look = look_early(&s);
        let mut descriptors = Descriptors::take(s.pid()).unwrap();
        descriptors.glance(&look);
        descriptors.remember(look);
        s.epoll_add(other, ends[0], libc::EPOLLOUT, 8);
        let CapturedFiles { image: ahead, closing, carried } =
            capture_after(descriptors, &carry(), &ScannedProcesses::default()).unwrap();
        drop((closing, carried));
        let watched = |image: &Files, number: i32| -> Vec<(u32, u32, u64)> {
            let fd = image.fds.iter().find(|fd| fd.number as i32 == number).unwrap();
            let Some(Kind::Epoll(epoll)) = &image.descriptions[fd.description as usize].kind else {
                panic!()
            };
            epoll.watches.iter().map(|watch| (watch.number, watch.events, watch.data)).collect()
        };
        let late = capture(s.pid(), &carry()).unwrap().image;
        assert_eq!((watched(&ahead, other).len(), watched(&late, other).len()), (0, 1));
        assert_eq!(watched(&ahead, epoll).len(), 100);
        assert_eq!(ahead.fds, late.fds);
        for number in [epoll, again] {
            assert_eq!(watched(&ahead, number), watched(&late, number));
        }
    });
}
