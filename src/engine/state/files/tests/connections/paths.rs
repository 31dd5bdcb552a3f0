//! Options, the ways back, what is refused, and what it costs.

use super::*;

#[test]
fn options_are_as_before() {
    with_network(|network| {
        for family in [0, 1] {
            let (mut s, fd, mut client) = connected(network, family);
            for (level, name, value) in [
                (IPPROTO_TCP, libc::TCP_NODELAY, 1),
                (IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
                (IPPROTO_TCP, libc::TCP_KEEPINTVL, 7),
                (IPPROTO_TCP, libc::TCP_KEEPCNT, 4),
                (IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 12_345),
                (IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 5_000),
                (SOL_SOCKET, libc::SO_KEEPALIVE, 1),
                (SOL_SOCKET, libc::SO_REUSEADDR, 1),
                (SOL_SOCKET, libc::SO_MARK, 9),
                (SOL_SOCKET, libc::SO_SNDBUF, 50_000),
                (SOL_SOCKET, libc::SO_RCVBUF, 60_000),
                (SOL_SOCKET, libc::SO_OOBINLINE, 1),
                (IPPROTO_IP, libc::IP_TTL, 33),
                (IPPROTO_IP, libc::IP_TOS, 16),
                (SOL_SOCKET, libc::SO_PRIORITY, 3),
            ] {
                set(&mut s, fd, level, name, value);
            }
            s.with(|b| {
                let data = b.input(b"reno");
                b.call(
                    libc::SYS_setsockopt,
                    &[fd.into(), 6.into(), libc::TCP_CONGESTION.into(), data, 4.into()],
                )
            })
            .unwrap();
            s.with(|b| {
                let data = b.input(&[1, 0, 0, 0, 5, 0, 0, 0]);
                let linger = libc::SO_LINGER.into();
                b.call(libc::SYS_setsockopt, &[fd.into(), SOL_SOCKET.into(), linger, data, 8.into()])
            })
            .unwrap();
            let all = |h: &Held| {
                let ours = h.take(fd);
                let info = socket::option(ours.as_fd(), IPPROTO_TCP, libc::TCP_INFO).unwrap();
                let clamp = socket::int_option(ours.as_fd(), IPPROTO_TCP, libc::TCP_WINDOW_CLAMP);
                let table = crate::engine::state::files::tcp::table_of_connection(ours.as_fd());
                // Timestamps, SACK, window scaling and the two factors.
                (table, info[5] & 7, info[6], clamp)
            };
            client.write_all(b"x").unwrap();
            wait_unread(&s.take(fd), 1);
            let before = all(&s);
            assert_eq!(before.1, 7);
            let d = moved(network, s);
            assert_eq!(all(&d), before);
            let mut server = end(&d, fd);
            expect(&mut server, b"x");
            goes_on(&mut server, &mut client);
        }
    });
}

#[test]
fn reading_changes_nothing() {
    with_network(|network| {
        let (mut s, fd, mut client) = connected(network, 0);
        set(&mut s, fd, SOL_SOCKET, libc::SO_REUSEADDR, 1);
        let down = pattern(32 << 20, 6);
        let taken = stuff(s.take(fd), &down);
        client.write_all(b"unread").unwrap();
        wait_unread(&s.take(fd), 6);
        let before = capture(s.pid(), &carry()).unwrap().image;
        for _ in 0..20 {
            let again = capture(s.pid(), &carry()).unwrap().image;
            let ends = |files: &crate::proto::files::Files| {
                let Some(crate::proto::files::description::Kind::TcpConnection(c)) =
                    files.descriptions[1].kind.clone()
                else {
                    panic!("no connection")
                };
                let options = files.option_sets[c.option_set as usize].clone();
                (c.receive_sequence, c.received, c.send_sequence.wrapping_add(c.sent.len() as u32), options)
            };
            assert!(ends(&again) == ends(&before));
        }
        assert_eq!(tcp::is_in_repair(s.take(fd).as_fd()), Ok(false));
        let mut server = end(&s, fd);
        expect(&mut server, b"unread");
        expect(&mut client, &down[..taken]);
        goes_on(&mut server, &mut client);
    });
}

#[test]
fn a_connection_left_in_repair_goes_on() {
    with_network(|network| {
        let (s, fd, mut client) = connected(network, 0);
        tcp::set_repair(s.take(fd).as_fd(), 1).unwrap();
        leave_repair(s.pid()).unwrap();
        let mut server = end(&s, fd);
        goes_on(&mut server, &mut client);
    });
}

/// The service dies when the connections are silent yet: what is whole goes on, what is not is reset.
#[test]
fn silent_connections_are_woken_or_reset() {
    with_network(|network| {
        let mut s = Held::source();
        let (listening, port) = listener(&mut s, network.service(0));
        let mut clients: Vec<TcpStream> = (0..2).map(|_| dial(network, network.service(0), port)).collect();
        let ends: Vec<i32> = (0..2).map(|_| accept(&mut s, listening)).collect();
        stuff(s.take(ends[1]), &pattern(32 << 20, 7));
        clients[0].write_all(b"whole").unwrap();
        wait_unread(&s.take(ends[0]), 5);
        network.remove_service();
        let CapturedFiles { image, carried, .. } = capture(s.pid(), &carry()).unwrap();
        drop_silently(carried);
        drop(s);
        let (d, silent) = arrive_silent(&image, None);
        drop(silent);
        network.add_service();
        assert_eq!(wake_connections(d.pid()).unwrap(), 1);
        let mut server = end(&d, ends[0]);
        expect(&mut server, b"whole");
        goes_on(&mut server, &mut clients[0]);
        let mut rest = Vec::new();
        let error = clients[1].read_to_end(&mut rest).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    });
}

#[test]
fn what_waits_for_the_process_is_found() {
    with_network(|network| {
        let mut s = Held::source();
        let (listening, port) = listener(&mut s, network.service(0));
        let mut client = dial(network, network.service(0), port);
        let waiting = |s: &Held| unsettled(&Descriptors::take(s.pid()).unwrap()).len();
        let deadline = std::time::Instant::now() + PATIENCE;
        while waiting(&s) != 1 {
            assert!(std::time::Instant::now() < deadline);
        }
        // Not before: while it runs it may yet be accepted.
        assert_eq!(check(s.pid(), &carry()).unwrap().reasons, []);
        let refused = capture(s.pid(), &carry()).map(drop).unwrap_err().to_string();
        assert!(refused.contains("1 connections not accepted"), "{refused}");
        let fd = accept(&mut s, listening);
        assert_eq!(waiting(&s), 0);
        // Ended by both, with input that nobody has read.
        s.call(libc::SYS_shutdown, &[fd.into(), libc::SHUT_WR.into()]);
        client.write_all(b"late").unwrap();
        drop(client);
        wait_for_state(&s.take(fd), 7);
        assert_eq!(waiting(&s), 1);
        let refused = capture(s.pid(), &carry()).map(drop).unwrap_err().to_string();
        assert!(refused.contains("4 bytes not read"), "{refused}");
    });
}

#[test]
fn the_source_lets_go_in_silence() {
    with_network(|network| {
        let (s, _, client) = connected(network, 0);
        let heard = || {
            let info = socket::option(client.as_fd(), IPPROTO_TCP, libc::TCP_INFO).unwrap();
            u32::from_ne_bytes(info[140..144].try_into().unwrap())
        };
        let before = heard();
        let CapturedFiles { carried, .. } = capture(s.pid(), &carry()).unwrap();
        drop_silently(carried);
        drop(s);
        assert_eq!((heard(), state(&client)), (before, 1));
    });
}

#[test]
fn what_cannot_be_carried_is_named() {
    with_network(|network| {
        let reasons = |s: &Held| {
            let found = capture(s.pid(), &carry()).map(drop).unwrap_err();
            found.to_string()
        };
        // A peer on the same host, which would stay.
        let mut s = Held::source();
        let (listening, port) = listener(&mut s, "127.0.0.1".parse().unwrap());
        let _peer = TcpStream::connect(("127.0.0.1", port)).unwrap();
        accept(&mut s, listening);
        assert!(reasons(&s).contains("another process of this host"), "{}", reasons(&s));

        let (s, fd, client) = connected(network, 0);
        nix::sys::socket::send(
            std::os::fd::AsRawFd::as_raw_fd(&client),
            b"!",
            nix::sys::socket::MsgFlags::MSG_OOB,
        )
        .unwrap();
        let deadline = std::time::Instant::now() + PATIENCE;
        while fds::poll_now(s.take(fd).as_fd(), libc::POLLPRI).unwrap() == 0 {
            assert!(std::time::Instant::now() < deadline);
        }
        assert!(reasons(&s).contains("urgent"), "{}", reasons(&s));

        let (s, fd, mut client) = connected(network, 0);
        client.write_all(b"abc").unwrap();
        nix::sys::socket::send(
            std::os::fd::AsRawFd::as_raw_fd(&client),
            b"!",
            nix::sys::socket::MsgFlags::MSG_OOB,
        )
        .unwrap();
        client.write_all(b"def").unwrap();
        let mut byte = [0; 1];
        let taken = s.take(fd);
        crate::engine::trial::until("the urgent byte", || {
            nix::sys::socket::recv(
                std::os::fd::AsRawFd::as_raw_fd(&taken),
                &mut byte,
                nix::sys::socket::MsgFlags::MSG_OOB,
            )
            .is_ok()
        });
        drop(taken);
        assert!(reasons(&s).contains("urgent data in"), "{}", reasons(&s));

        let (s, fd, _client) = connected(network, 0);
        // struct tcp_md5sig: an address of 128 bytes, flags, prefix, length, device, key.
        let mut key = name(CLIENT[0].parse().unwrap(), 0);
        key.resize(128, 0);
        key.extend([0, 0, 3, 0, 0, 0, 0, 0]);
        key.extend(b"key");
        key.resize(128 + 8 + 80, 0);
        socket::set_option(s.take(fd).as_fd(), IPPROTO_TCP, libc::TCP_MD5SIG, &key).unwrap();
        assert!(reasons(&s).contains("MD5"), "{}", reasons(&s));
    });
}

/// Not a test of speed: prints what 2,000 connections cost.
#[test]
#[ignore = "a measurement"]
fn cost_of_2000_connections() {
    with_network(|network| {
        let mut s = Held::source();
        let (listening, port) = listener(&mut s, network.service(0));
        let mut clients = Vec::new();
        let epoll = s.call(libc::SYS_epoll_create1, &[0]) as i32;
        for _ in 0..2000 {
            clients.push(dial(network, network.service(0), port));
            let fd = accept(&mut s, listening);
            s.epoll_add(epoll, fd, libc::EPOLLIN, 0x7f00_1234_5678);
            set(&mut s, fd, IPPROTO_TCP, libc::TCP_NODELAY, 1);
        }
        network.remove_service();
        // Of the processors, and by the clock: several threads work, and the machine may have other work.
        let now = || {
            let clock = nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID;
            (Duration::from(nix::time::clock_gettime(clock).unwrap()), std::time::Instant::now())
        };
        let each = |took: Duration| took.as_secs_f64() * 1e6 / 2000.0;
        let step = |what: &str, (used, since): (Duration, std::time::Instant)| {
            println!(
                "{what}: {:.2} µs each, {:.2} by the clock",
                each(now().0 - used),
                each(since.elapsed())
            );
        };
        let found = check(s.pid(), &carry()).unwrap();
        let t = now();
        let table =
            crate::engine::state::files::scan::Table::of(Descriptors::take(s.pid()).unwrap(), None).unwrap();
        step("table", t);
        let t = now();
        for open in &table.opens {
            crate::engine::state::files::tcp::table_of_connection(open.fd());
        }
        step("options", t);
        drop(table);
        let t = now();
        connections_of(&s);
        step("list", t);
        let t = now();
        let inodes = Descriptors::take(s.pid()).unwrap().socket_inodes();
        let early = crate::engine::state::files::EarlyLook::at(s.pid(), &inodes, &inodes).unwrap();
        step("look early", t);
        let mut lock = lock::Lock::open("migrate-cost").unwrap();
        lock.close_on_listeners(&inodes).unwrap();
        lock.look_for_others(&early.own_sockets().unwrap().connections).unwrap();
        let t = now();
        let own = early.own_sockets().unwrap();
        step("name sockets", t);
        let t = now();
        lock.close_on_own(&own).unwrap();
        step("lock by own", t);
        let t = now();
        lock.close_on_process(&inodes).unwrap();
        step("lock by list", t);
        drop(lock);
        let t = now();
        let mut descriptors = Descriptors::take(s.pid()).unwrap();
        step("take", t);
        let t = now();
        crate::engine::procfs::read_text(format!("/proc/{}/fdinfo/{epoll}", s.pid())).unwrap();
        step("epoll", t);
        let t = now();
        early.glance().unwrap();
        step("glance", t);
        let t = now();
        descriptors.glance(&early);
        step("glance, epoll", t);
        descriptors.remember(early);
        let t = now();
        descriptors.ask(s.calls()).unwrap();
        step("ask", t);
        let t = now();
        let captured = capture_after(descriptors, &carry(), &found.scanned).unwrap();
        step("capture", t);
        drop(captured.closing);
        let t = now();
        let image = captured.image;
        let bytes = prost::Message::encode_to_vec(&image);
        step(&format!("encode {} bytes", bytes.len()), t);
        let t = now();
        drop_silently(captured.carried);
        step("drop", t);
        drop(s);
        let told = super::ahead::ahead_of(&image, 10);
        let t = now();
        let mut ahead = crate::engine::state::files::AheadSockets::default();
        ahead.make(&told);
        step(&format!("make {} ahead", ahead.len()), t);
        let ahead = if std::env::var_os("AHEAD").is_some() { ahead } else { Default::default() };
        let t = now();
        let mut built = crate::engine::state::files::build(
            &image,
            None,
            &crate::engine::clocks::Shift::default(),
            &crate::engine::state::objects::Objects::default(),
            ahead,
        )
        .unwrap();
        step(&format!("build, {} were made ahead", built.made_ahead), t);
        let silent = built.take_connections();
        network.add_service();
        let t = now();
        assert_eq!(silent.go_live(), []);
        step("live", t);
    });
}
