//! What the kernel tells of sockets only as a whole: anycast addresses, and programs that choose among sockets.

use libc::{AF_INET, AF_INET6, IPPROTO_IPV6, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET};
use nix::net::if_::if_nametoindex;

use super::ip::{bind, set_bytes, socket};
use super::network::with_network;
use super::refusals::reasons;
use super::sockets::set;
use super::{Held, options};
use crate::engine::state::files::check;
use crate::engine::sys::bpf;

const IPV6_JOIN_ANYCAST: i32 = 27;

#[test]
fn anycast_addresses_that_programs_joined_are_refused() {
    with_network(|_| {
        // Of a router the kernel makes some itself.
        std::fs::write("/proc/sys/net/ipv6/conf/s0/forwarding", "1").unwrap();
        let listed = std::fs::read_to_string("/proc/thread-self/net/anycast6").unwrap();
        assert!(listed.contains("fd090000000000000000000000000000"), "{listed}");
        let mut s = Held::source();
        let six = socket(&mut s, AF_INET6, SOCK_STREAM, 0);
        assert_eq!(reasons(&s, &options()), [""; 0]);
        let address = "fd09::77".parse::<std::net::Ipv6Addr>().unwrap().octets();
        let request = [&address[..], &if_nametoindex("s0").unwrap().to_ne_bytes()].concat();
        set_bytes(&mut s, six, IPPROTO_IPV6, IPV6_JOIN_ANYCAST, &request).unwrap();
        let seen = reasons(&s, &options());
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert!(seen[0].starts_with("anycast address fd09::77 on s0: "), "{seen:?}");
        assert!(seen[0].contains(&format!("fd {six} may be it")), "{seen:?}");
        // It is none of a process without such a socket.
        let mut four = Held::source();
        socket(&mut four, AF_INET, SOCK_STREAM, 0);
        assert_eq!(reasons(&four, &options()), [""; 0]);
    });
}

#[test]
fn sockets_that_a_program_may_choose_among_are_refused() {
    let mut s = Held::source();
    let share = |s: &mut Held, family: i32, kind: i32, address: &str| {
        let fd = socket(s, family, kind, 0);
        set(s, fd, SOL_SOCKET, libc::SO_REUSEPORT, 1);
        let local = bind(s, fd, address).to_string();
        if kind == SOCK_STREAM {
            s.call(libc::SYS_listen, &[fd.into(), 5]);
        }
        (fd, local)
    };
    let (first, local) = share(&mut s, AF_INET, SOCK_DGRAM, "127.0.0.1:0");
    let port = local.rsplit_once(':').unwrap().1.to_owned();
    // `r0 = 0; exit`, as a socket filter.
    let code = [0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];
    let program = s.with(|b| {
        let code = b.input(&code);
        let licence = b.input_c_string(b"MIT");
        let mut attributes = [0u8; 64];
        (attributes[0], attributes[4]) = (1, 2);
        let attributes = b.input(&attributes);
        b.pointer_to(attributes, 8, code);
        b.pointer_to(attributes, 16, licence);
        b.call(libc::SYS_bpf, &[5.into(), attributes, 64.into()])
    });
    let program = program.unwrap() as i32;
    let [_, id] = bpf::info(std::os::fd::AsFd::as_fd(&s.take(program))).unwrap();
    set(&mut s, first, SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_EBPF, program);
    s.call(libc::SYS_close, &[program.into()]);
    // Sockets of other addresses and protocols are no group.
    share(&mut s, AF_INET, SOCK_DGRAM, &format!("127.0.0.2:{port}"));
    let listening = share(&mut s, AF_INET, SOCK_STREAM, "127.0.0.1:0").1;
    assert_eq!(reasons(&s, &options()), [""; 0]);
    share(&mut s, AF_INET, SOCK_DGRAM, &local);
    share(&mut s, AF_INET, SOCK_STREAM, &listening);
    // (Programs of other tests come and go, so that two looks may differ.)
    let seen = check(s.pid(), &options()).unwrap().reasons;
    let seen: Vec<String> = seen.iter().map(ToString::to_string).collect();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(seen[0].starts_with(&format!("fd {first}: is one of 2 sockets of port {port}, ")), "{seen:?}");
    for reason in seen {
        let ids = reason.split_once("BPF program ").unwrap().1.split(')').next().unwrap();
        assert!(ids.split(", ").any(|known| known == id.to_string()), "{reason} is not of {id}");
    }
}
