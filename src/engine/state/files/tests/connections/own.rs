//! What a process's own sockets say of its connections is what the list of all sockets of the host says.

use super::*;
use crate::engine::lock::Own;
use crate::engine::state::files::tcp::Glance;
use crate::engine::trial::until;

/// The sockets of a process, once by themselves, and its connections from the list of all.
fn both(s: &Held) -> (Own, Vec<Connection>) {
    let mut own = Glance::prepare(s.pid()).expect("a kernel with iterators").own().unwrap();
    assert_eq!(own.inodes, Descriptors::take(s.pid()).unwrap().socket_inodes());
    own.connections.sort_unstable();
    let mut listed = connections_of(s);
    listed.retain(|connection| connection.remote.is_some());
    (own, listed)
}

fn connecting(s: &mut Held, to: IpAddr) -> i32 {
    let fd = stream_socket(s, to.is_ipv6());
    s.call(libc::SYS_fcntl, &[fd.into(), libc::F_SETFL.into(), libc::O_NONBLOCK.into()]);
    assert_eq!(with_name(s, libc::SYS_connect, fd, to, 9), Err(nix::errno::Errno::EINPROGRESS));
    fd
}

#[test]
fn in_all_states_and_families() {
    with_network(|network| {
        let mut s = Held::source();
        let IpAddr::V4(v4) = network.service(0) else { panic!() };
        let IpAddr::V4(client4) = CLIENT[0].parse().unwrap() else { panic!() };
        let mapped = IpAddr::V6(v4.to_ipv6_mapped());
        let (mut clients, mut late, mut all) = (Vec::new(), Vec::new(), Vec::new());
        let families = [
            (network.service(0), network.service(0), CLIENT[0].parse().unwrap()),
            (network.service(1), network.service(1), CLIENT[1].parse().unwrap()),
            (mapped, network.service(0), IpAddr::V6(client4.to_ipv6_mapped())),
        ];
        for (at, to, client) in families {
            let (listening, port) = listener(&mut s, at);
            let pair = |s: &mut Held| {
                let client = dial(network, to, port);
                (accept(s, listening), client)
            };
            let ends: Vec<_> = (0..7).map(|_| pair(&mut s)).collect();
            let shut = |s: &mut Held, fd: i32| s.call(libc::SYS_shutdown, &[fd.into(), libc::SHUT_WR.into()]);
            let ended = |(_, client): &(i32, TcpStream)| client.shutdown(std::net::Shutdown::Write).unwrap();
            // 0 stays as it is. The other end of 1 has ended, ours of 2; both of 3, and of 4 by a reset.
            ended(&ends[1]);
            shut(&mut s, ends[2].0);
            ended(&ends[3]);
            wait_for_state(&s.take(ends[3].0), 8);
            shut(&mut s, ends[3].0);
            let linger = [1u32.to_ne_bytes(), [0; 4]].concat();
            socket::set_option(ends[4].1.as_fd(), SOL_SOCKET, libc::SO_LINGER, &linger).unwrap();
            // 5 and 6 end when nothing comes through any more, 6 after the other end.
            ended(&ends[6]);
            let numbers: Vec<i32> = ends.iter().map(|(fd, _)| *fd).collect();
            for (i, end) in ends.into_iter().enumerate() {
                if i != 4 {
                    clients.push(end.1);
                }
            }
            for (fd, state) in numbers.iter().zip([1, 8, 5, 7, 7, 1, 8]) {
                wait_for_state(&s.take(*fd), state);
            }
            late.push((client, numbers[5], numbers[6]));
            all.extend(numbers);
            all.push(listening);
            // What has no connection.
            let bound = stream_socket(&mut s, at.is_ipv6());
            with_name(&mut s, libc::SYS_bind, bound, at, 0).unwrap();
            let family = if at.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
            let udp = s.call(libc::SYS_socket, &[family.into(), libc::SOCK_DGRAM.into(), 0]) as i32;
            with_name(&mut s, libc::SYS_connect, udp, client, 9).unwrap();
            stream_socket(&mut s, at.is_ipv6());
            all.push(bound);
        }
        s.call(libc::SYS_socket, &[libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0]);
        // Said once, and once for all threads.
        s.call(libc::SYS_dup, &[all[0].into()]);
        let there = network.in_client(|| TcpListener::bind((CLIENT[0], 0)).unwrap());
        let opened = stream_socket(&mut s, false);
        let address = there.local_addr().unwrap();
        with_name(&mut s, libc::SYS_connect, opened, address.ip(), address.port()).unwrap();
        all.push(opened);
        network.cut();
        for (client, to_end, to_end_last) in late {
            s.call(libc::SYS_shutdown, &[to_end.into(), libc::SHUT_WR.into()]);
            s.call(libc::SYS_shutdown, &[to_end_last.into(), libc::SHUT_WR.into()]);
            all.push(connecting(&mut s, client));
        }
        let mut states: Vec<u8> = all.iter().map(|fd| state(&s.take(*fd))).collect();
        states.sort_unstable();
        states.dedup();
        assert_eq!(states, [1, 2, 4, 5, 7, 8, 9, 10]);
        let (own, listed) = both(&s);
        assert_eq!(own.connections, listed);
        // Of each family all but two, and one that is on its way; and the one that the process has opened.
        assert_eq!((own.is_all, listed.len()), (true, 3 * 6 + 1));
        drop(clients);
    });
}

/// Who waits has no socket that the process could tell of.
#[test]
fn whoever_waits_is_noticed() {
    with_network(|network| {
        for family in [0, 1] {
            let mut s = Held::source();
            let (listening, port) = listener(&mut s, network.service(family));
            assert!(both(&s).0.is_all);
            let mut client = dial(network, network.service(family), port);
            until("the connection", || connections_of(&s).len() == 2);
            let (own, listed) = both(&s);
            assert_eq!((own.is_all, own.connections.len(), listed.len()), (false, 0, 1));
            let fd = accept(&mut s, listening);
            let (own, listed) = both(&s);
            assert_eq!((own.is_all, own.connections), (true, listed));

            // A handshake that is not at its end before the client has said something.
            set(&mut s, listening, IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 60);
            let mut half = dial(network, network.service(family), port);
            let (own, listed) = both(&s);
            assert_eq!((own.is_all, own.connections.len(), listed.len()), (false, 1, 2));
            half.write_all(b"x").unwrap();
            let accepted = accept(&mut s, listening);
            let (own, listed) = both(&s);
            assert_eq!((own.is_all, own.connections), (true, listed));
            goes_on(&mut end(&s, fd), &mut client);
            wait_unread(&s.take(accepted), 1);
        }
    });
}

/// Its connections have sockets that are not the process's.
#[test]
fn a_protocol_that_is_none_of_ours_is_noticed() {
    with_network(|_| {
        let mut s = Held::source();
        let open = s.with(|b| {
            let kind = [libc::AF_INET.into(), libc::SOCK_STREAM.into(), libc::IPPROTO_MPTCP.into()];
            b.call(libc::SYS_socket, &kind)
        });
        let (own, _) = both(&s);
        assert_eq!(own.is_all, open.is_err(), "where the kernel has it");
    });
}
