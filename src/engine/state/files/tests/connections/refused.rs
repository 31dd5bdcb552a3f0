//! What hangs on a connection or a listening socket and cannot be given to a new one: refused by name.

use super::*;

/// What preflight and the capture say, which must be the same.
fn refusal(s: &Held) -> String {
    let seen: Vec<String> =
        check(s.pid(), &carry()).unwrap().reasons.iter().map(ToString::to_string).collect();
    match capture(s.pid(), &carry()) {
        Ok(_) => assert!(seen.is_empty(), "{seen:?}"),
        Err(error) => assert!(!seen.is_empty(), "only at the capture: {error}"),
    }
    seen.join("; ")
}

#[test]
fn settings_of_a_connection() {
    with_network(|network| {
        let (s, fd, _client) = connected(network, 0);
        assert_eq!(refusal(&s), "");
        // A duplicate of ours that stays would be a reason of its own.
        let put = |name, value| {
            socket::set_int_option(s.take(fd).as_fd(), SOL_SOCKET, name, value).unwrap();
        };
        put(libc::SO_ZEROCOPY, 1);
        assert!(refusal(&s).contains("SO_ZEROCOPY"), "{}", refusal(&s));
        put(libc::SO_ZEROCOPY, 0);
        put(fds::SO_PEEK_OFF, 0);
        assert!(refusal(&s).contains("SO_PEEK_OFF"), "{}", refusal(&s));
        put(fds::SO_PEEK_OFF, -1);
        tcp::set_repair(s.take(fd).as_fd(), tcp::REPAIR_ON).unwrap();
        assert!(refusal(&s).contains("TCP_REPAIR"), "{}", refusal(&s));
        assert_eq!(tcp::is_in_repair(s.take(fd).as_fd()), Ok(true), "it is somebody's");
        tcp::set_repair(s.take(fd).as_fd(), tcp::REPAIR_OFF_SILENTLY).unwrap();
        assert_eq!(refusal(&s), "");
    });
}

#[test]
fn headers_of_every_segment() {
    with_network(|network| {
        let (s, fd, _client) = connected(network, 1);
        // A destination header with one option that is to be skipped: next, length, kind, length, padding.
        socket::set_option(
            s.take(fd).as_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_DSTOPTS,
            &[0, 0, 1, 4, 0, 0, 0, 0],
        )
        .unwrap();
        assert!(refusal(&s).contains("extension headers"), "{}", refusal(&s));
    });
}

#[test]
fn a_first_segment_that_is_kept() {
    with_network(|network| {
        let mut s = Held::source();
        let (listening, port) = listener(&mut s, network.service(0));
        set(&mut s, listening, IPPROTO_TCP, libc::TCP_SAVE_SYN, 1);
        let mut client = dial(network, network.service(0), port);
        let fd = accept(&mut s, listening);
        assert!(refusal(&s).contains("TCP_SAVED_SYN"), "{}", refusal(&s));
        let kept = socket::option(s.take(fd).as_fd(), IPPROTO_TCP, libc::TCP_SAVED_SYN).unwrap();
        assert!(kept.len() >= 40, "it was not taken by looking: {} bytes", kept.len());
        assert_eq!(refusal(&s), "");
        let d = moved(network, s);
        goes_on(&mut end(&d, fd), &mut client);
    });
}

#[test]
fn keys_of_a_listening_socket() {
    with_network(|network| {
        let mut s = Held::source();
        let (listening, _) = listener(&mut s, network.service(0));
        assert_eq!(refusal(&s), "");
        // struct tcp_md5sig: an address of 128 bytes, flags, prefix, length, device, key.
        let mut key = name(CLIENT[0].parse().unwrap(), 0);
        key.resize(128, 0);
        key.extend([0, 0, 3, 0, 0, 0, 0, 0]);
        key.extend(b"key");
        key.resize(128 + 8 + 80, 0);
        socket::set_option(s.take(listening).as_fd(), IPPROTO_TCP, libc::TCP_MD5SIG, &key).unwrap();
        assert!(refusal(&s).contains("TCP_MD5SIG"), "{}", refusal(&s));

        let mut s = Held::source();
        let (listening, _) = listener(&mut s, network.service(0));
        // struct tcp_ao_add: an address of 128 bytes, 64 bytes for the algorithm's name, device, flags, then
        // prefix, two ids, lengths, the key.
        const TCP_AO_ADD_KEY: i32 = 38;
        let mut key = name(CLIENT[0].parse().unwrap(), 0);
        key.resize(128, 0);
        key.extend(b"hmac(sha1)");
        key.resize(128 + 64 + 4 + 4 + 2, 0);
        key.extend([32, 100, 100, 0, 0, 3]);
        key.extend(b"key");
        key.resize(128 + 64 + 16 + 80, 0);
        match socket::set_option(s.take(listening).as_fd(), IPPROTO_TCP, TCP_AO_ADD_KEY, &key) {
            Ok(()) => assert!(refusal(&s).contains("TCP-AO"), "{}", refusal(&s)),
            // A kernel without it has nothing to refuse.
            Err(errno) => assert_eq!(errno, nix::errno::Errno::ENOPROTOOPT),
        }
    });
}
