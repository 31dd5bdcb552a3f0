//! Multicast devices that were chosen by number alone.

use std::os::fd::AsFd;

use libc::{AF_INET, AF_INET6, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_UDPLITE, SOCK_DGRAM, SOCK_RAW};
use nix::net::if_::if_nametoindex;

use super::ip::{bind, connect, images, moved_the_same, set_bytes, socket};
use super::network::{ip, with_network};
use super::refusals::reasons;
use super::sockets::set;
use super::{Held, capture, options};
use crate::engine::state::files::check;
use crate::engine::sys::socket as sys_socket;

/// `ip_mreqn`: no group, no address, the number.
fn choose(s: &mut Held, fd: i32, device: &str) {
    let index = if_nametoindex(device).unwrap();
    let request = [[0; 4], [0; 4], index.to_ne_bytes()].concat();
    set_bytes(s, fd, IPPROTO_IP, libc::IP_MULTICAST_IF, &request).unwrap();
}

#[test]
fn the_one_device_that_it_can_be_is_carried() {
    with_network(|_| {
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
        let mut s = Held::source();
        let kinds = [
            (AF_INET, SOCK_DGRAM, 0),
            (AF_INET, SOCK_DGRAM, IPPROTO_UDPLITE),
            (AF_INET, SOCK_DGRAM, libc::IPPROTO_ICMP),
            (AF_INET, SOCK_RAW, libc::IPPROTO_ICMP),
            (AF_INET, SOCK_RAW, libc::IPPROTO_RAW),
            (AF_INET6, SOCK_DGRAM, 0),
        ];
        let mut expected = Vec::new();
        for (family, kind, protocol) in kinds {
            for device in ["", "lo", "s0"] {
                let fd = socket(&mut s, family, kind, protocol);
                if !device.is_empty() {
                    choose(&mut s, fd, device);
                }
                expected.push((fd, device));
            }
        }
        // Bound, and connected.
        let bound = socket(&mut s, AF_INET, SOCK_DGRAM, 0);
        bind(&mut s, bound, "10.9.0.1:0");
        connect(&mut s, bound, "10.9.0.9:9");
        choose(&mut s, bound, "s0");
        let connected = socket(&mut s, AF_INET6, SOCK_DGRAM, 0);
        connect(&mut s, connected, "[fd09::9]:9");
        choose(&mut s, connected, "s0");
        expected.extend([(bound, "s0"), (connected, "s0")]);
        // What cannot send IPv4 has no way there, whatever it chose.
        let six = socket(&mut s, AF_INET6, SOCK_DGRAM, 0);
        set(&mut s, six, IPPROTO_IPV6, libc::IPV6_V6ONLY, 1);
        let six_by_address = socket(&mut s, AF_INET6, SOCK_DGRAM, 0);
        bind(&mut s, six_by_address, "[fd09::1]:0");
        expected.extend([(six, ""), (six_by_address, "")]);
        let names: Vec<_> =
            expected.iter().map(|(fd, _)| sys_socket::local_address(s.take(*fd).as_fd())).collect();
        assert!(check(s.pid(), &options()).unwrap().reasons.is_empty());
        let seen = images(&capture(s.pid(), &options()).unwrap().image);
        let found: Vec<(i32, &str)> = expected
            .iter()
            .zip(&seen)
            .map(|((fd, _), image)| (*fd, image.device_options.first().map_or("", |o| o.device.as_str())))
            .collect();
        assert_eq!(found, expected);
        for ((fd, _), name) in expected.iter().zip(names) {
            let ours = s.take(*fd);
            assert_eq!(sys_socket::local_address(ours.as_fd()), name);
            assert_eq!(
                sys_socket::int_option(ours.as_fd(), IPPROTO_IP, libc::IP_TRANSPARENT).unwrap_or(0),
                0
            );
        }
        // One that is connected is bound when it is made again, and then has no way to send IPv4.
        s.call(libc::SYS_close, &[connected.into()]);
        moved_the_same(s);
    });
}

#[test]
fn what_could_be_several_is_refused() {
    with_network(|_| {
        ip("link add s1 type veth peer name t1");
        ip("link set s1 up");
        let mut s = Held::source();
        let fd = socket(&mut s, AF_INET, SOCK_DGRAM, 0);
        bind(&mut s, fd, "0.0.0.0:0");
        choose(&mut s, fd, "s1");
        let by_address = socket(&mut s, AF_INET, SOCK_DGRAM, 0);
        set_bytes(&mut s, by_address, IPPROTO_IP, libc::IP_MULTICAST_IF, &[10, 9, 0, 1]).unwrap();
        let seen = reasons(&s, &options());
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert!(seen[0].contains("cannot be read (s1 or s0)") || seen[0].contains("(s0 or s1)"), "{seen:?}");
        ip("link delete s1");
        let seen = reasons(&s, &options());
        assert!(seen[0].contains("(one that is gone)"), "{seen:?}");
    });
}

#[test]
fn a_look_at_a_running_process_gives_no_socket_a_port() {
    let mut s = Held::source();
    let fds = [AF_INET, AF_INET6].map(|family| socket(&mut s, family, SOCK_DGRAM, 0));
    check(s.pid(), &options()).unwrap();
    capture(s.pid(), &options()).unwrap();
    for fd in fds {
        assert_eq!(sys_socket::local_address(s.take(fd).as_fd()).unwrap().1, 0);
        bind(&mut s, fd, if fd == fds[0] { "127.0.0.1:0" } else { "[::1]:0" });
    }
}
