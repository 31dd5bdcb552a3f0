//! Connections that one end or both have ended, and one that is being made.

use super::*;

#[test]
fn ended_by_the_client() {
    with_network(|network| {
        for tail in [&b""[..], b"tail"] {
            let (s, fd, mut client) = connected(network, 0);
            client.write_all(tail).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            wait_for_state(&s.take(fd), 8);
            let d = moved(network, s);
            // Once more: the end is part of the sequence from then on.
            let mut d = moved(network, d);
            let mut server = end(&d, fd);
            let seen = fds::poll_now(server.as_fd(), libc::POLLIN | libc::POLLRDHUP).unwrap();
            assert_eq!(seen, libc::POLLIN | libc::POLLRDHUP);
            let mut text = Vec::new();
            server.read_to_end(&mut text).unwrap();
            assert_eq!(text, tail);
            server.write_all(b"answer").unwrap();
            expect(&mut client, b"answer");
            drop(server);
            d.call(libc::SYS_close, &[fd.into()]);
            assert_eq!(client.read(&mut [0; 8]).unwrap(), 0, "a clean end");
        }
    });
}

#[test]
fn ended_by_the_server() {
    with_network(|network| {
        // The client has acknowledged the end, or it was lost; with bytes before it, or without.
        for (lost, last) in [(false, &b"last"[..]), (true, b"last"), (true, b""), (false, b"")] {
            let (mut s, fd, mut client) = connected(network, 0);
            if lost {
                network.cut();
            }
            s.write(fd, last);
            s.call(libc::SYS_shutdown, &[fd.into(), libc::SHUT_WR.into()]);
            if !lost {
                wait_for_state(&s.take(fd), 5);
            } else {
                assert_eq!(state(&s.take(fd)), 4);
            }
            let d = moved(network, s);
            if lost {
                network.heal();
            }
            let mut server = end(&d, fd);
            let mut text = Vec::new();
            client.read_to_end(&mut text).unwrap();
            assert_eq!(text, last);
            client.write_all(b"still").unwrap();
            expect(&mut server, b"still");
            wait_for_state(&server, 5);
            assert_eq!(server.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
            drop(client);
            assert_eq!(server.read(&mut [0; 8]).unwrap(), 0);
        }
    });
}

/// An end behind bytes that the client has no room for: neither was sent.
#[test]
fn an_end_that_waits_behind_unsent_bytes() {
    with_network(|network| {
        let (mut s, fd, mut client) = connected(network, 0);
        let down = pattern(32 << 20, 5);
        let taken = stuff(s.take(fd), &down);
        s.call(libc::SYS_shutdown, &[fd.into(), libc::SHUT_WR.into()]);
        assert!(tcp::never_sent(s.take(fd).as_fd()).unwrap() > 1);
        let d = moved(network, s);
        let mut seen = Vec::new();
        client.read_to_end(&mut seen).unwrap();
        assert!(seen == down[..taken]);
        client.write_all(b"thanks").unwrap();
        expect(&mut end(&d, fd), b"thanks");
    });
}

#[test]
fn ended_by_both() {
    with_network(|network| {
        let (mut s, fd, mut client) = connected(network, 0);
        client.write_all(b"bye").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        wait_for_state(&s.take(fd), 8);
        network.cut();
        s.write(fd, b"farewell");
        s.call(libc::SYS_shutdown, &[fd.into(), libc::SHUT_WR.into()]);
        assert_eq!(state(&s.take(fd)), 9);
        let d = moved(network, s);
        network.heal();
        let (mut at_client, mut at_server) = (Vec::new(), Vec::new());
        client.read_to_end(&mut at_client).unwrap();
        end(&d, fd).read_to_end(&mut at_server).unwrap();
        assert_eq!((&at_client[..], &at_server[..]), (&b"farewell"[..], &b"bye"[..]));
        let seen = fds::poll_now(d.take(fd).as_fd(), 0).unwrap();
        assert_eq!(seen, libc::POLLHUP);
    });
}

#[test]
fn a_connection_being_made() {
    with_network(|network| {
        let at: SocketAddr = (CLIENT[0].parse::<IpAddr>().unwrap(), 4711).into();
        let listening = network.in_client(|| TcpListener::bind(at).unwrap());
        network.cut();
        let mut s = Held::source();
        let fd = s.call(libc::SYS_socket, &[2, (libc::SOCK_STREAM | libc::SOCK_NONBLOCK).into(), 0]) as i32;
        with_name(&mut s, libc::SYS_bind, fd, network.service(0), 0).unwrap();
        let refused = with_name(&mut s, libc::SYS_connect, fd, at.ip(), at.port());
        assert_eq!(refused, Err(nix::errno::Errno::EINPROGRESS));
        let (_, port, _) = socket::local_address(s.take(fd).as_fd()).unwrap();
        let local = SocketAddr::new(network.service(0), port);
        assert_eq!(connections_of(&s), [Connection { local, remote: Some(at) }]);
        let d = moved(network, s);
        assert_eq!(state(&d.take(fd)), 2);
        network.heal();
        let ready = nix::poll::PollFd::new(listening.as_fd(), nix::poll::PollFlags::POLLIN);
        assert_eq!(nix::poll::poll(&mut [ready], 20_000u16), Ok(1), "nobody has come");
        let (mut accepted, from) = listening.accept().unwrap();
        assert_eq!(from, SocketAddr::new(network.service(0), port));
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        wait_for_state(&d.take(fd), 1);
        let mut ours = end(&d, fd);
        ours.set_nonblocking(false).unwrap();
        goes_on(&mut ours, &mut accepted);
    });
}
