//! Sockets made before the state is known: used if they are what it says, thrown away without a word otherwise.

use super::super::arrive_after;
use super::super::network::ip;
use super::many::{connections, crowd, gone};
use super::*;
use crate::engine::lock::Lock;
use crate::engine::state::files::AheadSockets;
use crate::proto::files::description::Kind;
use crate::proto::files::{Ahead, Files, TcpConnection};

/// What is told ahead of the connections of an image, with clocks that show this much less.
pub(super) fn ahead_of(image: &Files, less: u32) -> Ahead {
    let of = |description: &crate::proto::files::Description| match &description.kind {
        Some(Kind::TcpConnection(c)) => {
            Some(TcpConnection { timestamp: c.timestamp.wrapping_sub(less), ..c.clone() })
        }
        _ => None,
    };
    let connections = image.descriptions.iter().filter_map(of).collect();
    Ahead { connections, option_sets: image.option_sets.clone() }
}

fn made(ahead: &Ahead) -> AheadSockets {
    let mut sockets = AheadSockets::default();
    sockets.make(ahead);
    sockets
}

/// Segments that the client's host has received.
fn heard(network: &Network) -> u64 {
    let table = network.in_client(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let mut lines = table.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split_whitespace().position(|name| name == "InSegs").unwrap();
    values.split_whitespace().nth(at).unwrap().parse().unwrap()
}

/// The sockets of this network by the two ends of which one is the service's: state, timer.
fn listed() -> Vec<(String, String)> {
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    let mine = table.lines().filter(|line| line.contains(" 0500090A:"));
    let column = |line: &str, at| line.split_whitespace().nth(at).unwrap().to_owned();
    mine.map(|line| (column(line, 3), column(line, 5)[..2].to_owned())).collect()
}

/// The client has ended it: so nothing of it stays at our side.
const CLOSE_WAIT: u8 = 8;
/// How many connections there are.
fn established() -> usize {
    listed().iter().filter(|(state, _)| state == ESTABLISHED).count()
}

/// Milliseconds, more than any test takes.
const BEHIND: u32 = 1_000_000;
const ESTABLISHED: &str = "01";
const KEEP_ALIVE_TIMER: &str = "02";

#[test]
fn what_has_not_changed_is_used_and_the_rest_made_anew() {
    // Its address is there already, or is not.
    for is_there in [false, true] {
        with_network(|network| {
            let (mut s, mut ends, mut clients) = crowd(network, 12);
            let early = capture(s.pid(), &carry()).unwrap();
            let told = ahead_of(&early.image, BEHIND);
            drop((early.carried, early.closing));
            // Something came and was read, an option changed, one was closed, and one is new.
            clients[1].write_all(b"read").unwrap();
            wait_unread(&s.take(ends[1]), 4);
            expect(&mut TcpStream::from(s.take(ends[1])), b"read");
            clients[2].write_all(b"unread").unwrap();
            wait_unread(&s.take(ends[2]), 6);
            set(&mut s, ends[3], IPPROTO_TCP, libc::TCP_NODELAY, 1);
            s.call(libc::SYS_fcntl, &[ends[4].into(), libc::F_SETFL.into(), libc::O_NONBLOCK.into()]);
            drop(clients.remove(5));
            let closed = ends.remove(5);
            wait_for_state(&s.take(closed), CLOSE_WAIT);
            s.call(libc::SYS_close, &[closed.into()]);
            let (listening, port) = listener(&mut s, network.service(0));
            clients.push(dial(network, network.service(0), port));
            ends.push(accept(&mut s, listening));

            let captured = capture(s.pid(), &carry()).unwrap();
            let clock = connections(&captured.image)[&ends[0]].timestamp;
            let before = s.listing();
            let mut lock = Lock::open("ahead").unwrap();
            lock.close_on(&connections_of(&s)).unwrap();
            if !is_there {
                network.remove_service();
            }
            let image = gone(s, captured);
            let sent = heard(network);
            let sockets = made(&told);
            assert_eq!((sockets.len(), established()), (12, 12));
            let (there, silent, used) = arrive_after(&image, None, sockets);
            assert_eq!((silent.len(), used), (12, 8));
            assert_eq!(there.listing(), before);
            assert_eq!(heard(network), sent);
            let nodelay = |fd| socket::int_option(there.take(fd).as_fd(), IPPROTO_TCP, libc::TCP_NODELAY);
            assert_eq!((nodelay(ends[3]), nodelay(ends[4])), (Ok(1), Ok(0)));
            let now =
                socket::int_option(there.take(ends[0]).as_fd(), IPPROTO_TCP, libc::TCP_TIMESTAMP).unwrap();
            assert!(now.cast_unsigned().wrapping_sub(clock) < 100_000, "{now} after {clock}");
            // No more than there were: those of no use are gone.
            assert_eq!(established(), 12);
            if !is_there {
                network.add_service();
            }
            lock.release().unwrap();
            assert_eq!(silent.go_live(), []);
            for (at, (fd, mut client)) in ends.into_iter().zip(clients).enumerate() {
                let mut server = end(&there, fd);
                // One of them is not to wait.
                server.set_nonblocking(false).unwrap();
                if at == 2 {
                    expect(&mut server, b"unread");
                }
                goes_on(&mut server, &mut client);
            }
        });
    }
}

type Change = fn(&mut TcpConnection);

/// As the state says, whatever it was set to before.
#[test]
fn the_clock_goes_on() {
    with_network(|network| {
        for less in [BEHIND, BEHIND.wrapping_neg()] {
            let (s, ends, _clients) = crowd(network, 1);
            let captured = capture(s.pid(), &carry()).unwrap();
            let said = connections(&captured.image)[&ends[0]].timestamp;
            network.remove_service();
            let image = gone(s, captured);
            let began = std::time::Instant::now();
            let (there, _silent, used) = arrive_after(&image, None, made(&ahead_of(&image, less)));
            let shown = socket::int_option(there.take(ends[0]).as_fd(), IPPROTO_TCP, libc::TCP_TIMESTAMP);
            let took = u32::try_from(began.elapsed().as_millis()).unwrap();
            let beyond = shown.unwrap().cast_unsigned().wrapping_sub(said);
            assert!(used == 1 && beyond <= took + 2, "{less} less: {beyond} beyond, after {took} ms");
            drop(there);
            network.add_service();
        }
    });
}

/// Each field counts, but those that say nothing of the connection.
#[test]
fn another_connection_is_not_taken_for_it() {
    with_network(|network| {
        let (s, _ends, _clients) = crowd(network, 1);
        let captured = capture(s.pid(), &carry()).unwrap();
        let image = gone(s, captured);
        let told = ahead_of(&image, BEHIND);
        let was = told.connections[0].clone();
        let changes: [(&str, Change); 20] = [
            ("family", |c| c.family = libc::AF_INET6),
            ("local port", |c| c.local_port += 1),
            ("remote port", |c| c.remote_port += 1),
            ("connecting", |c| c.connecting = true),
            ("receive sequence", |c| c.receive_sequence += 1),
            ("send sequence", |c| c.send_sequence += 1),
            ("received", |c| c.received.push(1)),
            ("sent", |c| c.sent.push(1)),
            ("unsent", |c| c.unsent.push(1)),
            ("read ended", |c| c.read_ended = true),
            ("write ended", |c| c.write_ended = true),
            ("negotiated", |c| c.negotiated ^= 2),
            ("send scale", |c| c.send_scale += 1),
            ("receive scale", |c| c.receive_scale += 1),
            ("segments", |c| c.segment_limit -= 1),
            ("window", |c| c.window[0] ^= 1),
            ("clamp", |c| c.window_clamp -= 1),
            ("send buffer", |c| c.send_buffer += 1),
            ("receive buffer", |c| c.receive_buffer += 1),
            ("options", |c| c.option_set = 1),
        ];
        // The second set differs in a value, the third is the first again.
        let mut sets = vec![image.option_sets[was.option_set as usize].clone(); 3];
        let keep = (SOL_SOCKET, libc::SO_KEEPALIVE);
        sets[1].options.iter_mut().find(|o| (o.level, o.name) == keep).unwrap().value[0] ^= 1;
        let is_used = |connection: &TcpConnection| {
            let mut sockets = made(&told);
            assert_eq!(sockets.len(), 1);
            sockets.begin();
            let recipe = sockets.recipe_of(connection, &sets);
            recipe.is_ok_and(|recipe| sockets.take(connection, &recipe).is_some())
        };
        let plain = TcpConnection { option_set: 0, ..was };
        assert!(is_used(&plain));
        assert!(is_used(&TcpConnection { option_set: 2, timestamp: plain.timestamp + 5, ..plain.clone() }));
        for (what, change) in changes {
            let mut other = plain.clone();
            change(&mut other);
            assert!(!is_used(&other), "{what}");
        }
    });
}

#[test]
fn it_says_nothing_before_it_is_live() {
    with_network(|network| {
        let (mut s, ends, clients) = crowd(network, 3);
        for (option, value) in [(libc::TCP_KEEPIDLE, 30), (libc::TCP_KEEPINTVL, 1)] {
            set(&mut s, ends[0], IPPROTO_TCP, option, value);
        }
        set(&mut s, ends[0], SOL_SOCKET, libc::SO_KEEPALIVE, 1);
        network.remove_service();
        let captured = capture(s.pid(), &carry()).unwrap();
        let image = gone(s, captured);
        let sent = heard(network);
        let sockets = made(&ahead_of(&image, BEHIND));
        let with_timer = || listed().iter().filter(|(_, timer)| timer == KEEP_ALIVE_TIMER).count();
        assert_eq!((established(), with_timer()), (3, 0));
        // The first attempt fails.
        drop(sockets);
        assert_eq!(established(), 0);
        let sockets = made(&ahead_of(&image, BEHIND));
        assert_eq!((sockets.len(), established()), (3, 3));
        let (there, silent, used) = arrive_after(&image, None, sockets);
        assert_eq!((used, with_timer()), (3, 1));
        assert_eq!(heard(network), sent);
        network.add_service();
        assert_eq!(silent.go_live(), []);
        for (fd, mut client) in ends.into_iter().zip(clients) {
            goes_on(&mut end(&there, fd), &mut client);
        }
    });
}

/// Without a route all is done but the last step.
#[test]
fn it_waits_for_a_route() {
    with_network(|network| {
        let (mut s, ends, clients) = crowd(network, 2);
        set(&mut s, ends[0], SOL_SOCKET, libc::SO_KEEPALIVE, 1);
        let captured = capture(s.pid(), &carry()).unwrap();
        network.remove_service();
        ip("address del 10.9.0.1/24 dev s0");
        let image = gone(s, captured);
        let sockets = made(&ahead_of(&image, BEHIND));
        assert_eq!((sockets.len(), established()), (2, 0));
        let (there, silent, used) = arrive_after(&image, None, sockets);
        assert_eq!((used, established()), (2, 0));
        ip("address add 10.9.0.1/24 dev s0");
        network.add_service();
        assert_eq!(silent.go_live(), []);
        let kept_alive = |fd| socket::int_option(there.take(fd).as_fd(), SOL_SOCKET, libc::SO_KEEPALIVE);
        assert_eq!((kept_alive(ends[0]), kept_alive(ends[1])), (Ok(1), Ok(0)));
        for (fd, mut client) in ends.into_iter().zip(clients) {
            let mut server = end(&there, fd);
            goes_on(&mut server, &mut client);
        }
    });
}

/// Nothing in the list of a source that lies is a panic, or in anybody's way.
#[test]
fn nonsense_is_not_made() {
    with_network(|network| {
        let (s, _ends, _clients) = crowd(network, 1);
        let captured = capture(s.pid(), &carry()).unwrap();
        let image = gone(s, captured);
        let good = ahead_of(&image, BEHIND);
        let nonsense: [Change; 7] = [
            |c| c.family = 77,
            |c| c.local = vec![1; 5],
            |c| c.remote_port = 1 << 20,
            |c| c.option_set = 99,
            |c| c.window.clear(),
            |c| c.connecting = true,
            |c| c.unsent = vec![1],
        ];
        network.remove_service();
        for change in nonsense {
            let mut told = good.clone();
            change(&mut told.connections[0]);
            assert_eq!(made(&told).len(), 0);
        }
        let mut none = good.clone();
        none.option_sets.clear();
        assert!(made(&none).is_empty());
        assert_eq!(established(), 0);
    });
}
