//! Connections that are asked for one by one, and not looked for among all that the host has.

use super::*;
use crate::engine::tcp_diag;
use crate::engine::trial::counted;

const SYN_SENT: u8 = 2;
const CLOSE_WAIT: u8 = 8;

fn turned(connection: Connection) -> Connection {
    Connection { local: connection.remote.unwrap(), remote: Some(connection.local) }
}

#[test]
fn both_ways_find_the_same() {
    in_a_namespace(|| {
        let dual = TcpListener::bind("[::]:0").unwrap();
        let mapped = SocketAddr::new(V4, dual.local_addr().unwrap().port());
        let at = |listener: &TcpListener| listener.local_addr().unwrap();
        let (v4, v6) = (TcpListener::bind((V4, 0)).unwrap(), TcpListener::bind((V6, 0)).unwrap());
        let (mut expected, mut others, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for (listener, to) in [(&v4, at(&v4)), (&v6, at(&v6)), (&dual, mapped)] {
            let open = Pair::to(listener, to);
            expected.extend([open.connection(), turned(open.connection())]);
            expected.push(Connection { local: at(listener), remote: None });
            // Asked for by a listener that does not listen at this very place, and one that nobody has, of whose place the
            // kernel tells instead.
            let local =
                SocketAddr::new(if to.is_ipv4() { "127.0.0.2" } else { "::2" }.parse().unwrap(), to.port());
            let nobody = Some(SocketAddr::new(to.ip(), 1));
            others.extend([Connection { local, remote: None }, Connection { local: to, remote: nobody }]);

            // Half closed: at the other end it is so as well.
            let half = Pair::to(listener, to);
            expected.extend([half.connection(), turned(half.connection())]);
            half.client.shutdown(std::net::Shutdown::Write).unwrap();
            until("the end", || info(&half.server).0 == CLOSE_WAIT);

            let bound = Pair::to(listener, to);
            socket::set_option(bound.server.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo").unwrap();
            others.push(bound.connection());
            expected.push(turned(bound.connection()));

            // Not accepted, which does not matter.
            let waits = TcpStream::connect(to).unwrap();
            let local = waits.local_addr().unwrap();
            expected.extend([
                Connection { local, remote: Some(to) },
                Connection { local: to, remote: Some(local) },
            ]);
            kept.push((open, half, bound, waits));
        }
        let port = mapped.port();
        expected
            .push(Connection { local: SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port), remote: None });
        // Not a connection yet.
        let mut lock = open();
        lock.close_on(&[Connection { local: at(&v4), remote: None }]).unwrap();
        let fd = socket::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0).unwrap();
        let address = nix::sys::socket::SockaddrStorage::from(at(&v4));
        assert_eq!(nix::sys::socket::connect(fd.as_raw_fd(), &address), Err(Errno::EINPROGRESS));
        assert_eq!(info(&fd).0, SYN_SENT);
        let connecting = TcpStream::from(fd);
        others.push(Connection { local: connecting.local_addr().unwrap(), remote: Some(at(&v4)) });

        let expected: HashSet<Connection> = expected.into_iter().collect();
        let wanted: HashSet<Connection> = expected.iter().copied().chain(others).collect();
        for one_by_one in [0, wanted.len()] {
            assert_eq!(diag::reachable(&wanted, one_by_one).unwrap(), expected, "{one_by_one}");
        }
        for one in wanted {
            let found = diag::reachable(&HashSet::from([one]), 1).unwrap();
            assert_eq!(found.contains(&one), expected.contains(&one), "{one:?}");
        }
        assert_eq!(kept.len(), 3);
    });
}

#[test]
fn one_of_ipv6_that_speaks_ipv4_is_found_by_its_addresses_in_either_form() {
    in_a_namespace(|| {
        let dual = TcpListener::bind("[::]:0").unwrap();
        let pair = Pair::to(&dual, SocketAddr::new(V4, dual.local_addr().unwrap().port()));
        let (local, remote) = (pair.server.local_addr().unwrap(), pair.server.peer_addr().unwrap());
        assert!(local.is_ipv6() && remote.is_ipv6());
        let Connection { local: local4, remote: remote4 } = pair.connection();
        let remote4 = remote4.unwrap();
        assert!(local4.is_ipv4() && remote4.is_ipv4());
        let nobody = SocketAddr::new(V4, 1);
        let asked = [(local, remote), (local4, remote4), (local4, nobody)];
        let families = tcp_diag::ask(&asked, 0, |answer| answer.first().copied()).unwrap();
        // Of the last the listening socket is told.
        assert_eq!(families, [Some(10); 3]);
        let unknown = [(SocketAddr::new(V4, 2), nobody), (SocketAddr::new(V6, 2), SocketAddr::new(V6, 1))];
        assert_eq!(tcp_diag::ask(&unknown, 0, |_| Some(())).unwrap(), [None; 2]);
    });
}

#[test]
fn few_are_asked_for_one_by_one() {
    in_a_namespace(|| {
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let pairs: Vec<Pair> = (0..3).map(|_| Pair::on(&listener)).collect();
        let of = |pairs: &[Pair]| pairs.iter().map(Pair::connection).collect::<HashSet<_>>();
        for count in 0..=3 {
            let wanted = of(&pairs[..count]);
            let (answers, found) = counted("recvfrom", || reachable(&wanted).unwrap());
            assert_eq!(found, wanted);
            assert_eq!(answers, count as u64, "one each");
        }
        let place = HashSet::from([Connection { local: listener.local_addr().unwrap(), remote: None }]);
        assert_eq!(reachable(&place).unwrap(), place);
    });
}
