//! With real clients, in a network namespace that each test makes for its own thread: a connection is taken out of the
//! queue of a listening socket and put in again, as two hosts would do it.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::engine::lock::{Connection, Lock, Locked};
use crate::engine::strays::{Keeps, Strays};
use crate::engine::trial::{PATIENCE as TRIAL, until};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
/// More than one of our segments.
const MUCH: usize = 40_000;

fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert!(Command::new("ip").args(["link", "set", "dev", "lo", "up"]).status().unwrap().success());
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn switch(setting: &str, to: &str) {
    // Of this thread's namespace: the link of the same name is that of the first thread's.
    std::fs::write(format!("/proc/sys/net/ipv4/{setting}"), to).unwrap();
}

/// How many resets this namespace has sent.
fn resets() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let mut tcp = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (tcp.next().unwrap(), tcp.next().unwrap());
    let mut both = names.split(' ').zip(values.split(' '));
    both.find(|(name, _)| *name == "OutRsts").unwrap().1.parse().unwrap()
}

/// A client that has said something to a server which has not accepted it.
struct Client {
    stream: TcpStream,
    said: Vec<u8>,
    ended: bool,
}

impl Client {
    fn say(to: SocketAddr, said: Vec<u8>, ended: bool) -> Self {
        let mut stream = TcpStream::connect(to).unwrap();
        stream.set_read_timeout(Some(TRIAL)).unwrap();
        stream.write_all(&said).unwrap();
        if ended {
            stream.shutdown(Shutdown::Write).unwrap();
        }
        let client = Self { stream, said, ended };
        let all = client.said.len() + usize::from(ended);
        let Connection { local, remote } = client.connection();
        let come = || files::received_by(&[(local, remote.unwrap())]).unwrap();
        until("the arrival", || come() == [Some(all)]);
        client
    }

    /// As the server will have it.
    fn connection(&self) -> Connection {
        let local = self.stream.peer_addr().unwrap();
        Connection { local, remote: self.stream.local_addr().ok() }
    }

    /// The other end has all that was said, and the two understand each other.
    fn is_served_by(&mut self, mut server: TcpStream) {
        server.set_read_timeout(Some(TRIAL)).unwrap();
        assert_eq!(server.peer_addr().unwrap().port(), self.stream.local_addr().unwrap().port());
        let mut heard = vec![0; self.said.len()];
        server.read_exact(&mut heard).unwrap();
        assert!(heard == self.said, "other bytes");
        if self.ended {
            assert_eq!(server.read(&mut [0]).unwrap(), 0, "an end");
        }
        server.write_all(b"answer").unwrap();
        let mut answer = [0; 6];
        self.stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        if !self.ended {
            self.stream.write_all(b"more").unwrap();
            server.read_exact(&mut answer[..4]).unwrap();
            assert_eq!(&answer[..4], b"more");
        }
        drop(server);
        assert_eq!(self.stream.read(&mut [0]).unwrap(), 0, "the server's end");
    }
}

/// Takes the clients out of the queue, behind a lock that lets them hear nothing.
fn taken(listener: &TcpListener, clients: &[Client]) -> (Vec<TcpConnection>, Lock) {
    let kept: Vec<Connection> = clients.iter().map(Client::connection).collect();
    // The kernel takes a moment to forget the table of a lock that is gone.
    static LOCKS: AtomicU32 = AtomicU32::new(0);
    let mut lock = Lock::open(&format!("migrate-test-{}", LOCKS.fetch_add(1, Ordering::Relaxed))).unwrap();
    lock.close_on(&kept).unwrap();
    let listening = [listener.try_clone().unwrap().into()];
    let taken = files::take_queued(&listening, clients.len() + 1);
    assert_eq!((taken.connections.len(), taken.lost.len()), (clients.len(), 0));
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "the queue is empty");
    listener.set_nonblocking(false).unwrap();
    let ends: Vec<_> = kept.iter().map(|c| (c.local, c.remote.unwrap())).collect();
    assert_eq!(files::received_by(&ends).unwrap(), vec![None; clients.len()], "nothing is left");
    lock.release_but(&kept).unwrap();
    (taken.connections, lock)
}

/// And puts them in again; those that are lost.
fn there_and_back(listener: &TcpListener, clients: &[Client]) -> Vec<Reason> {
    let (images, mut lock) = taken(listener, clients);
    // As a destination has one.
    let tap = Strays::prepare(&[clients[0].connection()], Keeps::All).unwrap();
    tap.listen().unwrap();
    let lost = Placer::prepare().unwrap().place(&images).unwrap();
    // They are whole before anything else reaches them.
    let ends: Vec<_> = clients.iter().map(Client::connection).map(|c| (c.local, c.remote.unwrap())).collect();
    let all: Vec<_> = clients.iter().map(|c| Some(c.said.len() + usize::from(c.ended))).collect();
    assert_eq!(files::received_by(&ends).unwrap(), all);
    lock.release().unwrap();
    lost
}

#[test]
fn what_waits_to_be_accepted_waits_again_and_its_client_notices_nothing() {
    in_a_namespace(|| {
        let dual = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
        for (ip, listener) in [
            (V4, TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap()),
            (V4, TcpListener::bind((V4, 0)).unwrap()),
            (V6, TcpListener::bind((V6, 0)).unwrap()),
            (V4, dual.try_clone().unwrap()),
            (V6, dual),
        ] {
            let to = SocketAddr::new(ip, listener.local_addr().unwrap().port());
            for len in [0, 1, FIRST_BYTES + 1, MUCH] {
                for ended in [false, true] {
                    let said = (0..len).map(|i: usize| i.to_le_bytes()[0]).collect();
                    let mut client = [Client::say(to, said, ended)];
                    assert_eq!(there_and_back(&listener, &client), [], "{to} {len} {ended}");
                    client[0].is_served_by(listener.accept().unwrap().0);
                }
            }
        }
        assert_eq!(resets(), 0);
    });
}

#[test]
fn a_full_queue_is_full_again_in_the_same_order() {
    in_a_namespace(|| {
        let fd = socket::socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
        socket::bind(fd.as_fd(), V4, 0).unwrap();
        socket::listen(fd.as_fd(), 7).unwrap();
        let listener = TcpListener::from(fd);
        let to = listener.local_addr().unwrap();
        let mut clients: Vec<Client> = (0..8).map(|i| Client::say(to, vec![i; 3], false)).collect();
        assert_eq!(there_and_back(&listener, &clients), []);
        for client in &mut clients {
            client.is_served_by(listener.accept().unwrap().0);
        }
        assert_eq!(resets(), 0);
    });
}

/// Each option that may be off when the connection begins, and when it is put in again.
#[test]
fn options_that_are_off_on_one_side() {
    in_a_namespace(|| {
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        for setting in [TIMESTAMPS_ALLOWED, SELECTIVE_ALLOWED, "tcp_window_scaling"] {
            for later in ["0", "1"] {
                switch(setting, if later == "0" { "1" } else { "0" });
                let mut client = [Client::say(to, b"hello".to_vec(), false)];
                switch(setting, later);
                if !is_on(setting) && NEEDED.contains(&setting) {
                    assert!(matches!(Placer::prepare(), Err(QueuedError::Off(_))));
                    switch(setting, "1");
                }
                assert_eq!(there_and_back(&listener, &client), [], "{setting} {later}");
                client[0].is_served_by(listener.accept().unwrap().0);
                switch(setting, "1");
            }
        }
        assert_eq!(resets(), 0);
    });
}

/// The process takes what has come while the rest finds no room.
#[test]
fn a_smaller_buffer_takes_it_piece_by_piece() {
    in_a_namespace(|| {
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let client = [Client::say(listener.local_addr().unwrap(), vec![7; MUCH], true)];
        socket::set_int_option(listener.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, 4096).unwrap();
        let (images, _lock) = taken(&listener, &client);
        std::thread::scope(|scope| {
            // A thread has the namespace of the one that started it.
            let placing = scope.spawn(|| Placer::prepare().unwrap().place(&images).unwrap());
            let mut server = listener.accept().unwrap().0;
            server.set_read_timeout(Some(TRIAL)).unwrap();
            let mut heard = Vec::new();
            server.read_to_end(&mut heard).unwrap();
            assert!(heard == vec![7; MUCH]);
            assert_eq!(placing.join().unwrap(), []);
        });
        assert_eq!(resets(), 0);
    });
}

#[test]
fn what_nobody_listens_for_is_lost_by_name() {
    in_a_namespace(|| {
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let client = Client::say(listener.local_addr().unwrap(), b"x".to_vec(), false);
        let listening = [listener.try_clone().unwrap().into()];
        let mut images = files::take_queued(&listening, 9).connections;
        // A process that another test is starting may have copies of these: nobody is to listen there either.
        nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Read).unwrap();
        drop((listener, listening));
        let nonsense = TcpConnection { window: vec![1], ..images[0].clone() };
        images.push(nonsense);
        let lost = Placer::prepare().unwrap().place(&images).unwrap();
        let text: Vec<String> = lost.iter().map(ToString::to_string).collect();
        assert_eq!(text.len(), 2, "{text:?}");
        assert!(text.iter().any(|t| t.contains("nobody listens")), "{text:?}");
        assert!(text.iter().any(|t| t.contains("makes no sense")), "{text:?}");
        drop(client);
    });
}

#[test]
fn a_packet_socket_for_ip_alone_is_in_the_way() {
    in_a_namespace(|| {
        assert!(Placer::prepare().is_ok());
        let tap = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0x0800u16.to_be().into()).unwrap();
        assert!(matches!(Placer::prepare(), Err(QueuedError::Tapped)));
        drop(tap);
    });
}

#[test]
fn only_what_no_other_process_of_this_host_has_can_be_carried() {
    let connection =
        |local: &str, remote: &str| Connection { local: local.parse().unwrap(), remote: remote.parse().ok() };
    let reasons = |local: &str, remote: &str| {
        let one = connection(local, remote);
        let all = [one, Connection { remote: None, ..one }];
        let own = connection(remote, local);
        let against = |queued: &[Connection], all: &[Connection]| {
            against(&Locked { queued: queued.to_vec(), all: all.to_vec(), ..Locked::default() }).len()
        };
        (against(&all, &all), against(&all, &[one, own]))
    };
    assert_eq!(reasons("10.0.0.1:80", "10.0.0.2:1000"), (0, 0));
    assert_eq!(reasons("[fd00::1]:80", "[fd00::2]:1000"), (0, 0));
    assert_eq!(reasons("10.0.0.1:80", "10.0.0.1:1000"), (1, 0));
    assert_eq!(reasons("127.0.0.1:80", "127.0.0.2:1000"), (1, 0));
    assert_eq!(reasons("[fe80::1]:80", "[fe80::2]:1000"), (1, 1));
}

/// The other end of one whose client has closed is nobody's, unless there was no room for all that it said.
#[test]
fn one_whose_client_has_closed_is_carried_if_it_has_everything() {
    let waiting = |one| Locked { queued: vec![one], ..Locked::default() };
    in_a_namespace(move || {
        for ip in [V4, V6] {
            let listener = TcpListener::bind((ip, 0)).unwrap();
            let to = listener.local_addr().unwrap();
            let client = Client::say(to, vec![3; MUCH], true);
            let connection = client.connection();
            let why = against(&waiting(connection));
            assert!(why.len() == 1 && !why[0].why.contains("closed"), "{why:?}");
            drop(client.stream);
            assert_eq!(against(&waiting(connection)), []);

            socket::set_int_option(listener.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, 4096).unwrap();
            let mut full = TcpStream::connect(to).unwrap();
            let connection = Connection { local: to, remote: full.local_addr().ok() };
            full.set_nonblocking(true).unwrap();
            while full.write(&[5; MUCH]).is_ok() {}
            drop(full);
            let why = against(&waiting(connection));
            assert!(why.len() == 1 && why[0].why.contains("closed"), "{why:?}");
        }
    });
}

#[test]
fn what_cannot_be_told_apart_and_what_is_too_much_is_refused() {
    let one = Connection { local: "10.0.0.1:80".parse().unwrap(), remote: "10.0.0.2:1000".parse().ok() };
    let all = Locked { queued: vec![one], ..Locked::default() };
    assert_eq!(against(&all), []);
    let why = against(&Locked { of_others: 1, ..all.clone() });
    assert!(why.len() == 1 && why[0].why.contains("SO_REUSEPORT"), "{why:?}");
    let most = files::MOST_QUEUED_BYTES as u64;
    assert_eq!(against(&Locked { queued_bytes: most, ..all.clone() }), []);
    let why = against(&Locked { queued_bytes: most + 1, ..all });
    assert!(why.len() == 1 && why[0].why.contains("MiB"), "{why:?}");
}

/// What an earlier connection with the same ends has left is not in the way, as it is not in the way of a request.
#[test]
fn what_is_left_of_an_earlier_connection_goes() {
    in_a_namespace(|| {
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let client = [Client::say(to, vec![3; MUCH], false)];
        let (mut images, mut lock) = taken(&listener, &client);
        // Its server ends first.
        let mut earlier = TcpStream::connect(to).unwrap();
        drop(listener.accept().unwrap());
        assert_eq!(earlier.read(&mut [0]).unwrap(), 0);
        let remote = earlier.local_addr().unwrap();
        drop(earlier);
        until(
            "its end",
            || matches!(files::ends_of(&[(to, remote)]).unwrap()[..], [Some(left)] if !left.is_held()),
        );
        assert_eq!(files::received_by(&[(to, remote)]).unwrap(), [None], "that is no connection");

        // Another one with these ends comes.
        lock.close_on(&[Connection { local: to, remote: Some(remote) }]).unwrap();
        images[0].remote_port = remote.port().into();
        assert_eq!(Placer::prepare().unwrap().place(&images).unwrap(), []);
        let mut server = listener.accept().unwrap().0;
        let mut heard = vec![0; MUCH];
        server.read_exact(&mut heard).unwrap();
        assert!(heard == vec![3; MUCH]);
    });
}

#[test]
fn who_has_lost_the_other_end_is_told() {
    in_a_namespace(|| {
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let mut client = [Client::say(to, vec![3], false)];
        let both = [client[0].connection()];
        Placer::abort_halves(&both);
        let (images, mut lock) = taken(&listener, &client);
        Placer::abort_halves(&both);
        let why = client[0].stream.read(&mut [0]).unwrap_err();
        assert_eq!(why.kind(), ErrorKind::ConnectionAborted, "its server is gone");

        assert_eq!(Placer::prepare().unwrap().place(&images).unwrap(), []);
        lock.release().unwrap();
        Placer::abort_halves(&both);
        let mut server = listener.accept().unwrap().0;
        assert_eq!(server.read(&mut [0]).unwrap(), 1);
        let why = server.read(&mut [0]).unwrap_err();
        assert_eq!(why.kind(), ErrorKind::ConnectionAborted, "its client is gone");
    });
}

/// It answers as if its client had been here all the time.
#[test]
fn the_end_that_was_closed_is_there_again() {
    in_a_namespace(|| {
        for (ip, dual) in [(V4, false), (V6, false), (V4, true)] {
            let at = if dual { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { ip };
            let listener = TcpListener::bind((at, 0)).unwrap();
            let to = SocketAddr::new(ip, listener.local_addr().unwrap().port());
            let client = [Client::say(to, vec![3; MUCH], true)];
            let (images, mut lock) = taken(&listener, &client);
            let Connection { local, remote } = client[0].connection();
            // It is gone here, without a word.
            crate::engine::sys::tcp::set_repair(client[0].stream.as_fd(), 1).unwrap();
            crate::engine::sys::tcp::disconnect(client[0].stream.as_fd()).unwrap();
            let other = [(remote.unwrap(), local)];
            assert_eq!(files::ends_of(&other).unwrap(), [None]);

            let before = resets();
            let closed = Closed::make(images.iter());
            assert_eq!(Placer::prepare().unwrap().place(&images).unwrap(), []);
            closed.into_iter().for_each(Closed::close);
            lock.release().unwrap();
            let end = files::ends_of(&other).unwrap()[0].unwrap();
            assert!(!end.is_held() && !end.waits());
            let mut server = listener.accept().unwrap().0;
            server.set_read_timeout(Some(TRIAL)).unwrap();
            let mut heard = Vec::new();
            server.read_to_end(&mut heard).unwrap();
            assert!(heard == vec![3; MUCH]);
            // A segment of the server's that says nothing, as any late acknowledgement.
            assert_eq!(server.take_error().unwrap().map(|error| error.to_string()), None);
            server.shutdown(Shutdown::Write).unwrap();
            until("the end of the server's stream", || {
                files::ends_of(&[(local, remote.unwrap())]).unwrap()[0].is_none()
            });
            assert_eq!(resets(), before);
        }
    });
}
