//! UDP, raw and netlink sockets.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use libc::{AF_INET, AF_INET6, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_UDP, SOCK_DGRAM, SOCK_RAW, SOL_SOCKET};

use super::network::with_network;
use super::sockets::set;
use super::{AheadSockets, Held, all_free, arrive, build, capture, moved, options};
use crate::engine::clocks::Shift;
use crate::engine::state::objects::Objects;
use crate::engine::sys::datagram;
use crate::engine::trial::until;
use crate::proto::files::description::Kind;
use crate::proto::files::{Files, IpSocket};

const IP_TRANSPARENT: i32 = libc::IP_TRANSPARENT;

pub(super) fn socket(s: &mut Held, family: i32, kind: i32, protocol: i32) -> i32 {
    s.call(libc::SYS_socket, &[family.into(), (kind | libc::SOCK_NONBLOCK).into(), protocol.into()]) as i32
}

fn name_call(s: &mut Held, number: i64, fd: i32, address: SocketAddr) -> nix::Result<i64> {
    let raw = datagram::raw_of(address);
    s.with(|b| {
        let name = b.input(&raw);
        b.call(number, &[fd.into(), name, raw.len().into()])
    })
}

pub(super) fn bind(s: &mut Held, fd: i32, address: &str) -> SocketAddr {
    name_call(s, libc::SYS_bind, fd, address.parse().unwrap()).unwrap();
    UdpSocket::from(s.take(fd)).local_addr().unwrap()
}

pub(super) fn connect(s: &mut Held, fd: i32, address: &str) {
    name_call(s, libc::SYS_connect, fd, address.parse().unwrap()).unwrap();
}

pub(super) fn set_bytes(s: &mut Held, fd: i32, level: i32, name: i32, value: &[u8]) -> nix::Result<i64> {
    s.with(|b| {
        let data = b.input(value);
        b.call(libc::SYS_setsockopt, &[fd.into(), level.into(), name.into(), data, value.len().into()])
    })
}

pub(super) fn images(files: &Files) -> Vec<IpSocket> {
    let image = |k: &Option<Kind>| match k {
        Some(Kind::IpSocket(image)) => Some(image.clone()),
        _ => None,
    };
    files.descriptions.iter().filter_map(|d| image(&d.kind)).collect()
}

/// Moves, and compares what a second capture of the new process says with the first.
pub(super) fn moved_the_same(s: Held) -> Held {
    let before = images(&capture(s.pid(), &options()).unwrap().image);
    let d = moved(s, &options());
    let after = images(&capture(d.pid(), &options()).unwrap().image);
    assert!(!before.is_empty());
    assert_eq!(after.len(), before.len());
    // A raw socket hears what goes on meanwhile.
    let bare = |image: &IpSocket| IpSocket { options: vec![], lost: 0, ..image.clone() };
    for (after, before) in after.iter().zip(&before) {
        assert_eq!(bare(after), bare(before));
        let pairs = after.options.iter().zip(&before.options);
        assert_eq!(pairs.filter(|(a, b)| a != b).collect::<Vec<_>>(), []);
        assert_eq!(after.options.len(), before.options.len());
    }
    d
}

fn drain(at: &UdpSocket) -> Vec<(usize, SocketAddr)> {
    let mut buffer = vec![0; 70_000];
    std::iter::from_fn(|| at.recv_from(&mut buffer).ok()).collect()
}

#[test]
fn unread_datagrams_keep_order_senders_and_bounds() {
    with_network(|_| {
        for (address, protocol) in [("127.0.0.1:0", IPPROTO_UDP), ("[::1]:0", 0)] {
            let mut s = Held::source();
            let family = if protocol == 0 { AF_INET6 } else { AF_INET };
            let fd = socket(&mut s, family, SOCK_DGRAM, protocol);
            let local = bind(&mut s, fd, address);
            let senders = [UdpSocket::bind(address).unwrap(), UdpSocket::bind(address).unwrap()];
            let sent = [(0, 5), (1, 0), (0, 60_000), (1, 0), (1, 1)];
            for (who, len) in sent {
                senders[who].send_to(&vec![b'x'; len], local).unwrap();
            }
            let image = capture(s.pid(), &options()).unwrap().image;
            // Nothing was taken; only the empty ones cannot be looked at twice.
            assert_eq!(images(&capture(s.pid(), &options()).unwrap().image)[0].queue.len(), 3);
            assert_eq!(drain(&UdpSocket::from(s.take(fd))).len(), sent.len());
            drop(s);
            let d = arrive(&image, None);
            let twin = UdpSocket::from(d.take(fd));
            let expected = sent.map(|(who, len)| (len, senders[who].local_addr().unwrap()));
            assert_eq!(drain(&twin), expected);
            senders[0].send_to(b"live", local).unwrap();
            assert_eq!(drain(&twin), [(4, senders[0].local_addr().unwrap())]);
        }
    });
}

#[test]
fn two_families_in_one_queue() {
    with_network(|_| {
        let mut s = Held::source();
        let fd = socket(&mut s, AF_INET6, SOCK_DGRAM, 0);
        let port = bind(&mut s, fd, "[::]:0").port();
        let four = UdpSocket::bind("127.0.0.3:0").unwrap();
        let six = UdpSocket::bind("[::1]:0").unwrap();
        four.send_to(b"four", ("127.0.0.1", port)).unwrap();
        six.send_to(b"sixsix", ("::1", port)).unwrap();
        let d = moved_the_same(s);
        let seen = drain(&UdpSocket::from(d.take(fd)));
        let mapped: IpAddr = "::ffff:127.0.0.3".parse().unwrap();
        assert_eq!(seen[0], (4, SocketAddr::new(mapped, four.local_addr().unwrap().port())));
        assert_eq!(seen[1], (6, six.local_addr().unwrap()));
    });
}

#[test]
fn options_groups_filter_and_connections() {
    with_network(|_| {
        let mut s = Held::source();
        let fd = socket(&mut s, AF_INET, SOCK_DGRAM, 0);
        set(&mut s, fd, SOL_SOCKET, libc::SO_REUSEPORT, 1);
        set(&mut s, fd, SOL_SOCKET, libc::SO_BROADCAST, 1);
        set(&mut s, fd, SOL_SOCKET, libc::SO_RCVBUF, 50_000);
        set(&mut s, fd, SOL_SOCKET, libc::SO_PRIORITY, 3);
        set(&mut s, fd, IPPROTO_IP, libc::IP_TOS, 16);
        set(&mut s, fd, SOL_SOCKET, libc::SO_PRIORITY, 2);
        set(&mut s, fd, IPPROTO_IP, libc::IP_MULTICAST_TTL, 7);
        set(&mut s, fd, IPPROTO_IP, libc::IP_MULTICAST_LOOP, 0);
        set(&mut s, fd, IPPROTO_IP, libc::IP_RECVERR, 1);
        set(&mut s, fd, libc::SOL_UDP, libc::UDP_CORK, 1);
        set(&mut s, fd, libc::SOL_UDP, libc::UDP_GRO, 1);
        set(&mut s, fd, libc::SOL_UDP, libc::UDP_SEGMENT, 1000);
        let local = bind(&mut s, fd, "0.0.0.0:0");
        // ip_mreqn: any source; ip_mreq_source: group, device by address, source; and one source blocked.
        let group = [&[239, 7, 7, 7][..], &[127, 0, 0, 1], &1u32.to_ne_bytes()].concat();
        set_bytes(&mut s, fd, IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, &group).unwrap();
        let blocked = [239, 7, 7, 7, 127, 0, 0, 1, 9, 9, 9, 8];
        set_bytes(&mut s, fd, IPPROTO_IP, libc::IP_BLOCK_SOURCE, &blocked).unwrap();
        let chosen = [232, 7, 7, 7, 127, 0, 0, 1, 9, 9, 9, 9];
        set_bytes(&mut s, fd, IPPROTO_IP, libc::IP_ADD_SOURCE_MEMBERSHIP, &chosen).unwrap();
        set_bytes(&mut s, fd, IPPROTO_IP, libc::IP_MULTICAST_IF, &[127, 0, 0, 1]).unwrap();
        // `ret 0xffff`
        let program = [6, 0, 0, 0, 0xff, 0xff, 0, 0];
        s.with(|b| {
            let program = b.input(&program);
            let mut head = [0u8; 16];
            head[0] = 1;
            let head = b.input(&head);
            b.pointer_to(head, 8, program);
            b.call(
                libc::SYS_setsockopt,
                &[fd.into(), SOL_SOCKET.into(), libc::SO_ATTACH_FILTER.into(), head, 16.into()],
            )
        })
        .unwrap();
        set(&mut s, fd, SOL_SOCKET, libc::SO_LOCK_FILTER, 1);
        // Beside it on the same port, connected, from an address that is not here.
        let beside = socket(&mut s, AF_INET, SOCK_DGRAM, 0);
        set(&mut s, beside, SOL_SOCKET, libc::SO_REUSEPORT, 1);
        set(&mut s, beside, IPPROTO_IP, IP_TRANSPARENT, 1);
        bind(&mut s, beside, &format!("203.0.113.7:{}", local.port()));
        connect(&mut s, beside, "127.0.0.1:9");
        set(&mut s, beside, IPPROTO_IP, IP_TRANSPARENT, 0);
        let six = socket(&mut s, AF_INET6, SOCK_DGRAM, libc::IPPROTO_UDPLITE);
        let group = [&[0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 7][..], &1u32.to_ne_bytes()].concat();
        set_bytes(&mut s, six, IPPROTO_IPV6, libc::IPV6_ADD_MEMBERSHIP, &group).unwrap();
        set(&mut s, six, IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, 1);
        let seen = images(&capture(s.pid(), &options()).unwrap().image);
        assert_eq!(seen[0].memberships.len(), 2, "{:?}", seen[0].memberships);
        assert_eq!(seen[0].memberships.iter().map(|m| m.sources.len()).sum::<usize>(), 2);
        assert_eq!(
            seen[0].filter.as_ref().map(|f| (f.program.as_slice(), f.locked)),
            Some((&program[..], true))
        );
        assert_eq!(seen[0].device_options.len(), 1);
        assert_eq!(seen[1].peer.as_ref().map(|p| p.port), Some(9));
        assert_eq!((seen[2].memberships.len(), seen[2].device_options.len()), (1, 1));
        moved_the_same(s);
    });
}

#[test]
fn the_address_a_datagram_was_sent_to_is_kept_or_the_datagram_is_lost() {
    with_network(|_| {
        let mut s = Held::source();
        let fd = socket(&mut s, AF_INET, SOCK_DGRAM, 0);
        set(&mut s, fd, IPPROTO_IP, libc::IP_PKTINFO, 1);
        set(&mut s, fd, IPPROTO_IP, libc::IP_RECVTTL, 1);
        let port = bind(&mut s, fd, "0.0.0.0:0").port();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.set_ttl(33).unwrap();
        sender.send_to(b"here", ("127.0.0.5", port)).unwrap();
        let image = capture(s.pid(), &options()).unwrap().image;
        let mut elsewhere = image.clone();
        let d = moved_the_same(s);
        let kept = images(&capture(d.pid(), &options()).unwrap().image);
        assert_eq!((kept[0].queue[0].to.as_slice(), kept[0].queue[0].hops), (&[127, 0, 0, 5][..], 33));
        drop(d);
        let is_here = |ip: &str| super::super::inet::is_here(ip.parse().unwrap());
        assert_eq!(["127.0.0.5", "::1", "203.0.113.7"].map(is_here), [true, true, false]);
        if let Some(Kind::IpSocket(socket)) = &mut elsewhere.descriptions[0].kind {
            socket.queue[0].to = vec![203, 0, 113, 7];
        }
        until("that its port is free", || all_free(&elsewhere));
        let built =
            build(&elsewhere, None, &Shift::default(), &Objects::default(), AheadSockets::default()).unwrap();
        assert_eq!(built.lost_datagrams, 1);
    });
}

#[test]
fn raw_sockets_keep_address_and_filter() {
    with_network(|_| {
        let mut s = Held::source();
        let fd = socket(&mut s, AF_INET, SOCK_RAW, libc::IPPROTO_ICMP);
        set(&mut s, fd, 255, 1, 0x7777);
        name_call(&mut s, libc::SYS_bind, fd, "127.0.0.1:0".parse().unwrap()).unwrap();
        let six = socket(&mut s, AF_INET6, SOCK_RAW, libc::IPPROTO_ICMPV6);
        set(&mut s, six, IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1);
        moved_the_same(s);
    });
}

#[test]
fn what_is_half_done_or_unknown_is_refused() {
    with_network(|_| {
        let refusal = |set_up: &dyn Fn(&mut Held)| {
            let mut s = Held::source();
            set_up(&mut s);
            capture(s.pid(), &options()).unwrap_err().to_string()
        };
        for (family, to) in [(AF_INET, "127.0.0.1:9"), (AF_INET6, "[::1]:9")] {
            let half = refusal(&|s| {
                let fd = socket(s, family, SOCK_DGRAM, 0);
                connect(s, fd, to);
                set(s, fd, libc::SOL_UDP, libc::UDP_CORK, 1);
                s.write(fd, b"half");
            });
            assert!(half.contains("UDP_CORK"), "{half}");
        }
        let encapsulated = refusal(&|s| {
            let fd = socket(s, AF_INET, SOCK_DGRAM, 0);
            set(s, fd, libc::SOL_UDP, libc::UDP_ENCAP, 2);
        });
        assert!(encapsulated.contains("UDP_ENCAP"), "{encapsulated}");
        let connected = refusal(&|s| {
            let fd = socket(s, AF_INET, SOCK_RAW, libc::IPPROTO_ICMP);
            connect(s, fd, "127.0.0.1:0");
        });
        assert!(connected.contains("raw IP socket that is connected"), "{connected}");
        let program = refusal(&|s| {
            let fd = socket(s, AF_INET, SOCK_DGRAM, 0);
            let loaded = s.with(|b| {
                // `r0 = 0; exit`, as a socket filter.
                let code = b.input(&[0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0]);
                let licence = b.input_c_string(b"MIT");
                let mut attributes = [0u8; 64];
                attributes[0] = 1;
                attributes[4] = 2;
                let attributes = b.input(&attributes);
                b.pointer_to(attributes, 8, code);
                b.pointer_to(attributes, 16, licence);
                b.call(libc::SYS_bpf, &[5.into(), attributes, 64.into()])
            });
            let loaded = loaded.unwrap() as i32;
            set(s, fd, SOL_SOCKET, libc::SO_ATTACH_BPF, loaded);
            s.call(libc::SYS_close, &[loaded.into()]);
        });
        assert!(program.contains("eBPF"), "{program}");
    });
}

#[test]
fn netlink_sockets_keep_port_groups_and_options() {
    with_network(|_| {
        let mut s = Held::source();
        let fd = socket(&mut s, libc::AF_NETLINK, SOCK_RAW, libc::NETLINK_ROUTE);
        // Links, IPv4 addresses, and one beyond the first word.
        let name = [&16u32.to_ne_bytes()[..], &77_777u32.to_ne_bytes(), &0x11u32.to_ne_bytes()].concat();
        s.with(|b| {
            let name = b.input(&name);
            b.call(libc::SYS_bind, &[fd.into(), name, 12.into()])
        })
        .unwrap();
        set(&mut s, fd, 270, libc::NETLINK_ADD_MEMBERSHIP, 33);
        set(&mut s, fd, 270, libc::NETLINK_EXT_ACK, 1);
        let read = |h: &Held| {
            let image = capture(h.pid(), &options()).unwrap().image;
            let Some(Kind::Netlink(image)) = image.descriptions[0].kind.clone() else { panic!("{image:?}") };
            image
        };
        let before = read(&s);
        assert_eq!((before.port, before.groups.as_slice()), (77_777, &[1, 5, 33][..]));
        let mut d = moved(s, &options());
        assert_eq!(read(&d), before);
        // It works, and an answer that is not read is not left behind silently: a question about all links.
        let ask = [&20u32.to_ne_bytes()[..], &[18, 0, 1, 3], &[0; 12]].concat();
        d.write(fd, &ask);
        let refused = capture(d.pid(), &options()).unwrap_err().to_string();
        assert!(refused.contains("unread messages"), "{refused}");
    });
}
