//! Both queues of a connection, and what was lost on the way.

use super::*;

#[test]
fn both_queues_of_each_family() {
    for (family, listen_on) in [(0, None), (1, None), (0, Some("::"))] {
        with_network(|network| {
            let mut s = Held::source();
            let address = listen_on.map_or(network.service(family), |a: &str| a.parse().unwrap());
            let (listening, port) = listener(&mut s, address);
            let mut client = dial(network, network.service(family), port);
            let fd = accept(&mut s, listening);
            let up = pattern(50_000, 1);
            client.write_all(&up).unwrap();
            wait_unread(&s.take(fd), up.len());
            // The client reads nothing: what its window does not take is never sent.
            let down = pattern(32 << 20, 2);
            let taken = stuff(s.take(fd), &down);
            assert!(tcp::never_sent(s.take(fd).as_fd()).unwrap() > 0);
            let d = moved(network, s);
            let mut server = end(&d, fd);
            expect(&mut server, &up);
            expect(&mut client, &down[..taken]);
            goes_on(&mut server, &mut client);
            assert_eq!(state(&server), 1);
        });
    }
}

#[test]
fn what_was_sent_and_lost_is_sent_again() {
    with_network(|network| {
        let (s, fd, mut client) = connected(network, 0);
        network.cut();
        let (lost, back) = (pattern(9_000, 3), pattern(400_000, 4));
        assert_eq!(stuff(s.take(fd), &lost), lost.len());
        assert_eq!(tcp::never_sent(s.take(fd).as_fd()), Ok(0));
        assert_eq!(tcp::unacknowledged(s.take(fd).as_fd()), Ok(9_000));
        client.set_nonblocking(true).unwrap();
        let taken = client.write(&back).unwrap();
        client.set_nonblocking(false).unwrap();
        let d = moved(network, s);
        network.heal();
        let mut server = end(&d, fd);
        expect(&mut client, &lost);
        expect(&mut server, &back[..taken]);
        goes_on(&mut server, &mut client);
    });
}

#[test]
fn both_ends_in_the_process() {
    with_network(|network| {
        let mut s = Held::source();
        let (listening, port) = listener(&mut s, "127.0.0.1".parse().unwrap());
        let a = stream_socket(&mut s, false);
        with_name(&mut s, libc::SYS_connect, a, "127.0.0.1".parse().unwrap(), port).unwrap();
        let b = accept(&mut s, listening);
        let bulk = pattern(32 << 20, 8);
        let taken = stuff(s.take(a), &bulk);
        s.write(b, b"back");
        s.call(libc::SYS_shutdown, &[b.into(), libc::SHUT_WR.into()]);
        let check = check(s.pid(), &carry()).unwrap();
        assert_eq!(check.reasons, []);
        let d = moved(network, s);
        let (mut a, mut b) = (end(&d, a), end(&d, b));
        expect(&mut b, &bulk[..taken]);
        let mut back = Vec::new();
        a.read_to_end(&mut back).unwrap();
        assert_eq!(back, b"back");
        a.write_all(b"and on").unwrap();
        expect(&mut b, b"and on");
    });
}

/// Two that share a port among themselves, and a listening socket that nobody may join, beside connections.
#[test]
fn connections_beside_their_listeners() {
    with_network(|network| {
        let mut s = Held::source();
        let (listening, port) = listener(&mut s, network.service(0));
        let mut clients: Vec<TcpStream> = (0..3).map(|_| dial(network, network.service(0), port)).collect();
        let ends: Vec<i32> = (0..3).map(|_| accept(&mut s, listening)).collect();
        let listed = connections_of(&s);
        assert_eq!(listed.len(), 4);
        let local = SocketAddr::new(network.service(0), port);
        assert!(listed.contains(&Connection { local, remote: None }));
        assert!(listed.contains(&Connection { local, remote: Some(clients[1].local_addr().unwrap()) }));
        let d = moved(network, s);
        assert_eq!(connections_of(&d), listed);
        for (client, fd) in clients.iter_mut().zip(ends) {
            goes_on(&mut end(&d, fd), client);
        }
        let reuse = socket::int_option(d.take(listening).as_fd(), SOL_SOCKET, libc::SO_REUSEADDR);
        assert_eq!(reuse, Ok(0));
        dial(network, network.service(0), port);
    });
}
