//! What the two ends have agreed on, and what is derived from that.

use super::*;

/// `tcpi_snd_mss`
fn segment_bytes(fd: &impl AsFd) -> u32 {
    let info = socket::option(fd.as_fd(), IPPROTO_TCP, libc::TCP_INFO).unwrap();
    u32::from_ne_bytes(info[16..20].try_into().unwrap())
}

#[test]
fn segments_are_as_large_as_before() {
    with_network(|network| {
        for family in [0, 1] {
            let (s, fd, mut client) = connected(network, family);
            let before = segment_bytes(&s.take(fd));
            assert!(before > 1300, "{before}");
            let d = moved(network, s);
            assert_eq!(segment_bytes(&d.take(fd)), before);
            goes_on(&mut end(&d, fd), &mut client);
        }
    });
}

/// Without window scaling the window that is offered is meant as it reads.
#[test]
fn a_window_without_scaling() {
    with_network(|network| {
        network.in_client(|| std::fs::write("/proc/sys/net/ipv4/tcp_window_scaling", "0").unwrap());
        let (s, fd, mut client) = connected(network, 0);
        let d = moved(network, s);
        let info = socket::option(d.take(fd).as_fd(), IPPROTO_TCP, libc::TCP_INFO).unwrap();
        assert_eq!((info[5] & 4, info[6]), (0, 0), "no scaling");
        let up = pattern(40_000, 11);
        client.write_all(&up).unwrap();
        wait_unread(&d.take(fd), up.len());
        let mut server = end(&d, fd);
        expect(&mut server, &up);
        goes_on(&mut server, &mut client);
    });
}

/// Older kernels tell any number; newer ones take an odd one for a clock of microseconds.
#[test]
fn the_clock_of_an_older_kernel_goes_on_in_milliseconds() {
    with_network(|network| {
        for odd in [0, 1] {
            let (s, fd, mut client) = connected(network, 0);
            let d =
                moved_with(network, s, |connection| connection.timestamp = connection.timestamp & !1 | odd);
            let info = socket::option(d.take(fd).as_fd(), IPPROTO_TCP, libc::TCP_INFO).unwrap();
            assert_eq!(info[5] & (64 | 1), 1, "timestamps, and not in microseconds");
            goes_on(&mut end(&d, fd), &mut client);
        }
    });
}
