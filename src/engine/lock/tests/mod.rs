//! On real connections, in a network namespace that each test makes for its own thread.

mod beyond;
mod own;
mod reachable;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::engine::sys::netlink::attributes;
use crate::engine::sys::socket;
use crate::engine::trial::{Killed, PATIENCE, until};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// The children of `test` inherit the namespace from this thread.
fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        ip("link set dev lo up");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A lock with a name that no other has: the kernel forgets a table a moment after its lock is dropped, and later still
/// if a process that another test is starting has inherited the socket.
fn open() -> Lock {
    static LOCKS: AtomicU32 = AtomicU32::new(0);
    Lock::open(&format!("migrate-test-{}", LOCKS.fetch_add(1, Ordering::Relaxed))).unwrap()
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// A connection, both ends here.
struct Pair {
    client: TcpStream,
    server: TcpStream,
}

impl Pair {
    fn on(listener: &TcpListener) -> Self {
        Self::to(listener, listener.local_addr().unwrap())
    }

    fn to(listener: &TcpListener, address: SocketAddr) -> Self {
        let client = TcpStream::connect(address).unwrap();
        let server = listener.accept().unwrap().0;
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_nodelay(true).unwrap();
        }
        Self { client, server }
    }

    /// The connection as its server has it.
    fn connection(&self) -> Connection {
        let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
        Connection {
            local: canonical(self.server.local_addr().unwrap()),
            remote: Some(canonical(self.server.peer_addr().unwrap())),
        }
    }

    /// A word there and back: what was sent before on another connection has arrived by then, or never will.
    fn round_trip(&mut self) {
        self.client.write_all(b"?").unwrap();
        let mut word = [0];
        self.server.read_exact(&mut word).unwrap();
        self.server.write_all(b"!").unwrap();
        self.client.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"!");
    }
}

fn has_input(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let peeked = stream.peek(&mut [0]);
    stream.set_nonblocking(false).unwrap();
    match peeked {
        Err(error) if error.kind() == ErrorKind::WouldBlock => false,
        Ok(count) => count > 0,
        Err(error) => panic!("{error}"),
    }
}

/// State and number of retransmissions, by TCP_INFO.
fn info(stream: &impl AsFd) -> (u8, u32) {
    let info = socket::option(stream.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO).unwrap();
    // tcpi_state is the first byte, tcpi_total_retrans the word at 100.
    (info[0], u32::from_ne_bytes(*info[100..].first_chunk().unwrap()))
}

fn until_repeated(stream: &TcpStream) {
    let before = info(stream).1;
    until("a retransmission", || info(stream).1 > before);
}

fn tables() -> Vec<String> {
    const GET_TABLE: u16 = 10 << 8 | 1;
    let mut netlink = Netlink::open_for(SockProtocol::NetlinkNetFilter).unwrap();
    let all = netlink.dump(GET_TABLE, &[1, 0, 0, 0]).unwrap();
    let name = |body: &Vec<u8>| {
        let (_, name) = attributes(&body[4..]).find(|(kind, _)| *kind == 1).unwrap();
        String::from_utf8_lossy(name).trim_end_matches('\0').to_owned()
    };
    all.iter().map(name).collect()
}

#[test]
fn a_locked_connection_is_silent_both_ways_and_goes_on_after_the_release() {
    in_a_namespace(|| {
        let dual = TcpListener::bind("[::]:0").unwrap();
        let mapped = SocketAddr::new(V4, dual.local_addr().unwrap().port());
        for (listener, to) in [
            (&TcpListener::bind((V4, 0)).unwrap(), None),
            (&TcpListener::bind((V6, 0)).unwrap(), None),
            (&dual, Some(mapped)),
        ] {
            let to = to.unwrap_or_else(|| listener.local_addr().unwrap());
            let mut locked = Pair::to(listener, to);
            let mut other = Pair::to(listener, to);
            let mut lock = open();
            lock.close_on(&[locked.connection()]).unwrap();
            locked.client.write_all(b"in").unwrap();
            locked.server.write_all(b"out").unwrap();
            until_repeated(&locked.client);
            other.round_trip();
            assert!(!has_input(&locked.server) && !has_input(&locked.client), "{to}");
            // The port is not locked, only the connection.
            Pair::to(listener, to).round_trip();
            lock.release().unwrap();
            let (mut arrived, mut answered) = ([0; 2], [0; 3]);
            locked.server.read_exact(&mut arrived).unwrap();
            locked.client.read_exact(&mut answered).unwrap();
            assert_eq!((&arrived, &answered), (b"in", b"out"));
            locked.round_trip();
        }
    });
}

/// The lock as the other end sees it: of a process here that speaks with one elsewhere both hooks matter.
#[test]
fn a_connection_that_was_made_from_here_is_locked_as_well() {
    in_a_namespace(|| {
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let (mut locked, mut other) = (Pair::on(&listener), Pair::on(&listener));
        let mut lock = open();
        let Connection { local, remote } = locked.connection();
        lock.close_on(&[Connection { local: remote.unwrap(), remote: Some(local) }]).unwrap();
        locked.client.write_all(b"x").unwrap();
        locked.server.write_all(b"y").unwrap();
        until_repeated(&locked.server);
        other.round_trip();
        assert!(!has_input(&locked.server) && !has_input(&locked.client));
        drop(lock);
        locked.server.read_exact(&mut [0]).unwrap();
        locked.client.read_exact(&mut [0]).unwrap();
    });
}

#[test]
fn a_kernel_without_the_socket_resets_nothing_while_it_is_locked() {
    in_a_namespace(|| {
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let Pair { mut client, server } = Pair::on(&listener);
        let mut lock = open();
        let ends = Connection { local: server.local_addr().unwrap(), remote: server.peer_addr().ok() };
        lock.close_on(&[ends]).unwrap();
        // In repair a socket goes without a word.
        socket::set_int_option(server.as_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, 1).unwrap();
        drop(server);
        client.write_all(b"x").unwrap();
        until_repeated(&client);
        Pair::on(&listener).round_trip();
        const ESTABLISHED: u8 = 1;
        assert_eq!(info(&client).0, ESTABLISHED, "it was not reset");
        lock.release().unwrap();
        let error = client.read_exact(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "the lock is what kept it");
    });
}

/// A request for a connection that nobody answers, until it is repeated after the release.
fn request_is_dropped(lock: &mut Lock, to: SocketAddr, passing: &[SocketAddr]) {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let fd = socket::socket(family, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0).unwrap();
    let address = nix::sys::socket::SockaddrStorage::from(to);
    let started = nix::sys::socket::connect(fd.as_raw_fd(), &address);
    assert_eq!(started, Err(Errno::EINPROGRESS), "{to}");
    until("the request repeated", || info(&fd).1 > 0);
    const SYN_SENT: u8 = 2;
    assert_eq!(info(&fd).0, SYN_SENT, "{to}");
    for address in passing {
        TcpStream::connect_timeout(address, PATIENCE).unwrap();
    }
    lock.release().unwrap();
    until("the connection", || info(&fd).0 != SYN_SENT);
    assert_eq!(info(&fd).0, 1, "{to} is connected, and was not refused");
}

#[test]
fn requests_to_a_locked_listener_wait() {
    in_a_namespace(|| {
        for ip in [V4, V6] {
            let listener = TcpListener::bind((ip, 0)).unwrap();
            let to = listener.local_addr().unwrap();
            let mut old = Pair::on(&listener);
            // The same port, another address; the same address, another port.
            let beside = TcpListener::bind(("127.0.0.2", to.port())).unwrap();
            let above = TcpListener::bind((ip, 0)).unwrap();
            let mut lock = open();
            lock.close_on(&[Connection { local: to, remote: None }]).unwrap();
            // What is connected is no matter of the listener.
            old.round_trip();
            let passing = [beside.local_addr().unwrap(), above.local_addr().unwrap()];
            request_is_dropped(&mut lock, to, &passing);

            // On all addresses of one version of IP.
            let everywhere =
                if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let everywhere = SocketAddr::new(everywhere, to.port());
            lock.close_on(&[Connection { local: everywhere, remote: None }]).unwrap();
            request_is_dropped(&mut lock, to, &passing[1..]);
        }
    });
}

fn inodes(sockets: &[&dyn AsFd]) -> HashSet<u64> {
    let inode = |s: &&dyn AsFd| {
        std::fs::metadata(format!("/proc/thread-self/fd/{}", s.as_fd().as_raw_fd())).unwrap().ino()
    };
    sockets.iter().map(inode).collect()
}

#[test]
fn what_a_process_has_is_found_with_what_it_has_not_accepted() {
    in_a_namespace(|| {
        let ours = TcpListener::bind("[::]:0").unwrap();
        let port = ours.local_addr().unwrap().port();
        let theirs = TcpListener::bind((V4, 0)).unwrap();
        let at = |ip: IpAddr| SocketAddr::new(ip, port);
        let (v4, v6) = (Pair::to(&ours, at(V4)), Pair::to(&ours, at(V6)));
        let strange = Pair::on(&theirs);
        let waits = TcpStream::connect(at(V4)).unwrap();
        let mine = inodes(&[&ours, &v4.server, &v6.server]);
        let all = socket_inodes(std::process::id().cast_signed()).unwrap();
        assert!(mine.is_subset(&all), "{mine:?} {all:?}");

        let mut expected = vec![
            Connection { local: at(Ipv4Addr::UNSPECIFIED.into()), remote: None },
            Connection { local: at(Ipv6Addr::UNSPECIFIED.into()), remote: None },
            v4.connection(),
            v6.connection(),
            Connection { local: at(V4), remote: waits.local_addr().ok() },
        ];
        expected.sort_unstable();
        let sorted = |mut list: Vec<Connection>| {
            list.sort_unstable();
            list
        };
        assert_eq!(sorted(connections(&mine).unwrap()), expected);
        let only = inodes(&[&strange.client]);
        let Connection { local, remote } = strange.connection();
        let turned = Connection { local: remote.unwrap(), remote: Some(local) };
        assert_eq!(connections(&only).unwrap(), [turned]);

        // All of it is locked, and nothing else.
        let mut lock = open();
        let locked = lock.close_on_process(&mine).unwrap();
        assert_eq!(sorted(locked.all), expected);
        assert_eq!(locked.queued, [Connection { local: at(V4), remote: waits.local_addr().ok() }]);
        for mut client in [&v4.client, &v6.client, &waits] {
            client.write_all(b"x").unwrap();
            until_repeated(client);
        }
        let mut strange = strange;
        strange.round_trip();
        assert!(!has_input(&v4.server) && !has_input(&v6.server));
        request_is_dropped(&mut lock, at(V6), &[theirs.local_addr().unwrap()]);
    });
}

/// So many connections with one end here that it is locked as a whole, and one more.
fn crowd(ip: IpAddr) -> (TcpListener, Vec<Pair>, Pair) {
    let listener = TcpListener::bind((ip, 0)).unwrap();
    let pairs = (0..69).map(|_| Pair::on(&listener)).collect();
    let one_more = Pair::on(&listener);
    (listener, pairs, one_more)
}

/// Where a server has accepted many, their common end is locked; one by one, if another process has one too.
#[test]
fn a_crowded_end_is_locked_as_a_whole_unless_somebody_else_has_it() {
    in_a_namespace(|| {
        for ip in [V4, V6] {
            let (listener, mut pairs, mut strange) = crowd(ip);
            let to = listener.local_addr().unwrap();
            let connections: Vec<Connection> = pairs.iter().map(Pair::connection).collect();
            let servers: Vec<&dyn AsFd> = pairs.iter().map(|pair| &pair.server as &dyn AsFd).collect();
            let mine = inodes(&servers);

            let mut lock = open();
            for by_process in [false, true] {
                match by_process {
                    false => lock.close_on(&connections).unwrap(),
                    true => drop(lock.close_on_connections(&mine, &[]).unwrap()),
                }
                pairs[3].client.write_all(b"?").unwrap();
                pairs[68].server.write_all(b"!").unwrap();
                until_repeated(&pairs[3].client);
                strange.round_trip();
                assert!(!has_input(&pairs[3].server) && !has_input(&pairs[68].client));
                lock.release().unwrap();
                pairs[3].server.read_exact(&mut [0]).unwrap();
                pairs[68].client.read_exact(&mut [0]).unwrap();
            }

            drop(strange);
            let beside = TcpListener::bind((ip, 0)).unwrap();
            let passing = [beside.local_addr().unwrap()];
            for by_process in [false, true] {
                match by_process {
                    false => lock.close_on(&connections).unwrap(),
                    true => drop(lock.close_on_connections(&mine, &[]).unwrap()),
                }
                pairs[0].client.write_all(b"?").unwrap();
                until_repeated(&pairs[0].client);
                assert!(!has_input(&pairs[0].server));
                // It is not in the list: only the whole end can keep it out.
                request_is_dropped(&mut lock, to, &passing);
                pairs[0].server.read_exact(&mut [0]).unwrap();
            }
        }
    });
}

#[test]
fn what_listens_on_ipv6_only_leaves_ipv4_alone() {
    in_a_namespace(|| {
        let fd = socket::socket(libc::AF_INET6, libc::SOCK_STREAM, 0).unwrap();
        socket::set_int_option(fd.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1).unwrap();
        socket::bind(fd.as_fd(), Ipv6Addr::UNSPECIFIED.into(), 777).unwrap();
        socket::listen(fd.as_fd(), 1).unwrap();
        let local = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 777);
        assert_eq!(connections(&inodes(&[&fd])).unwrap(), [Connection { local, remote: None }]);
    });
}

#[test]
fn thousands_are_locked_at_once() {
    in_a_namespace(|| {
        const MANY: u16 = 20_000;
        let mut lock = open();
        for ip in [V4, V6] {
            let remote = Some(SocketAddr::new(ip, 80));
            let all: Vec<_> =
                (1..=MANY).map(|port| Connection { local: SocketAddr::new(ip, port), remote }).collect();
            lock.close_on(&all).unwrap();
            // Once more is no error.
            lock.close_on(&all[..1]).unwrap();
        }
        lock.release().unwrap();
    });
}

#[test]
#[ignore = "prints how long it takes"]
fn measure() {
    in_a_namespace(|| {
        let took = |what: &str, since: Instant| println!("{what}: {:?}", since.elapsed());
        for count in [1u16, 2000] {
            let since = Instant::now();
            let mut lock = open();
            took("open", since);
            let listener = TcpListener::bind((V4, 0)).unwrap();
            let pairs: Vec<_> = (0..count).map(|_| Pair::on(&listener)).collect();
            let since = Instant::now();
            let all = socket_inodes(std::process::id().cast_signed()).unwrap();
            took(&format!("{} inodes", all.len()), since);
            let since = Instant::now();
            let listed = connections(&all).unwrap();
            took(&format!("{} listed", listed.len()), since);
            let own: Vec<_> = pairs.iter().map(Pair::connection).collect();
            let since = Instant::now();
            lock.close_on(&own).unwrap();
            took(&format!("closed on {}", own.len()), since);
            let since = Instant::now();
            lock.release().unwrap();
            took("released", since);
            let since = Instant::now();
            lock.remove().unwrap();
            took("removed", since);
            let mut lock = open();
            let since = Instant::now();
            lock.close_on_process(&all).unwrap();
            took("closed on process", since);
            let since = Instant::now();
            drop(lock);
            took("dropped", since);
        }
    });
}

const DIR: &str = "MIGRATE_TEST_LOCK_DIR";

#[test]
#[ignore = "runs in a process of its own, started by the test below"]
fn holder_process() {
    let dir: PathBuf = std::env::var_os(DIR).expect("started by another test").into();
    let _lock = Lock::open("migrate-held").unwrap();
    std::fs::write(dir.join("held"), "x").unwrap();
    loop {
        std::thread::park();
    }
}

fn holder(dir: &Path) -> Killed {
    let mut command = Command::new("/proc/self/exe");
    let arguments = ["--exact", "engine::lock::tests::holder_process", "--ignored", "--nocapture"];
    let child = Killed::spawn(command.args(arguments).env(DIR, dir).stdout(Stdio::null()));
    until("the table", || dir.join("held").exists());
    child
}

#[test]
fn a_killed_holder_leaves_no_table() {
    in_a_namespace(|| {
        let dir = tempfile::tempdir().unwrap();
        let child = holder(dir.path());
        assert_eq!(tables(), ["migrate-held"]);
        assert!(Lock::open("migrate-held").is_err(), "it is somebody else's");
        drop(child);
        until("the end of the table", || tables().is_empty());
    });
}

#[test]
fn a_second_holder_keeps_it() {
    in_a_namespace(|| {
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let mut pair = Pair::on(&listener);
        let mut lock = open();
        lock.close_on(&[pair.connection()]).unwrap();
        let held = lock.socket().try_clone_to_owned().unwrap();
        let child =
            Killed::spawn(Command::new("sleep").arg("1000").stdout(Stdio::from(held)).stderr(Stdio::null()));
        let name = lock.name.clone();
        drop(lock);
        assert_eq!(tables(), [name]);
        pair.client.write_all(b"x").unwrap();
        until_repeated(&pair.client);
        assert!(!has_input(&pair.server));
        drop(child);
        pair.server.read_exact(&mut [0]).unwrap();
        until("the end of the table", || tables().is_empty());
    });
}

#[test]
fn it_is_removed_although_somebody_holds_it() {
    in_a_namespace(|| {
        let lock = open();
        let second_holder = lock.socket().try_clone_to_owned().unwrap();
        lock.remove().unwrap();
        assert_eq!(tables(), Vec::<String>::new());
        drop(second_holder);
        assert_eq!(missing_here(), None);
    });
}
