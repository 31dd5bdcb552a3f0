//! What only shows from another host: packets that are rewritten or forwarded on their way.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel};

use super::*;
use crate::engine::sys::netlink::{push_attribute, push_nested};

/// Another namespace, at the other end of a cable: `10.9.0.9` there, `10.9.0.1` here. It runs what it is sent.
fn neighbour() -> Sender<Box<dyn FnOnce() + Send>> {
    let (jobs, received) = channel::<Box<dyn FnOnce() + Send>>();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        tell.send(nix::unistd::gettid()).unwrap();
        received.into_iter().for_each(|job| job());
    });
    let there = told.recv().unwrap();
    ip(&format!("link add name a type veth peer name b netns {there}"));
    ip("address add 10.9.0.1/24 dev a");
    ip("link set dev a up");
    let (up, is_up) = channel();
    let set_up = move || {
        ip("address add 10.9.0.9/24 dev b");
        ip("link set dev b up");
        up.send(()).unwrap();
    };
    jobs.send(Box::new(set_up)).unwrap();
    is_up.recv().unwrap();
    jobs
}

/// A socket of the neighbour's that wants to connect.
fn request_from(neighbour: &Sender<Box<dyn FnOnce() + Send>>, to: SocketAddr) -> OwnedFd {
    let (made, socket_made) = channel();
    let connect = move || {
        let fd = socket::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0).unwrap();
        let address = nix::sys::socket::SockaddrStorage::from(to);
        assert_eq!(nix::sys::socket::connect(fd.as_raw_fd(), &address), Err(Errno::EINPROGRESS));
        made.send(fd).unwrap();
    };
    neighbour.send(Box::new(connect)).unwrap();
    socket_made.recv().unwrap()
}

/// While the address is with nobody here, the host does not tell peers that it is not reached either.
#[test]
fn nothing_is_said_for_an_address_that_is_gone() {
    in_a_namespace(|| {
        let neighbour = neighbour();
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        ip("address add 10.9.0.7/24 dev a");
        let to: SocketAddr = "10.9.0.7:80".parse().unwrap();
        // The neighbour learns the way.
        until("the refusal", || info(&request_from(&neighbour, to)).0 == 7);
        let mut lock = open();
        lock.close_on(&[Connection { local: to, remote: None }]).unwrap();
        ip("address del 10.9.0.7/24 dev a");
        ip("route add unreachable 10.9.0.7");
        let request = request_from(&neighbour, to);
        until("the request repeated", || info(&request).1 > 0);
        assert_eq!(info(&request).0, 2, "nobody has said anything");
        drop(lock);
        until("the end of the request", || info(&request).0 == 7);
    });
}

/// A port that leads to another one of ours before a packet reaches the socket (REDIRECT).
#[test]
fn what_is_rewritten_on_its_way_in_is_locked_as_the_socket_sees_it() {
    in_a_namespace(|| {
        let neighbour = neighbour();
        let listener = TcpListener::bind("10.9.0.1:80").unwrap();
        redirect(8080, 80);
        let request = request_from(&neighbour, "10.9.0.1:8080".parse().unwrap());
        let mut server = listener.accept().unwrap().0;
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(server.local_addr().unwrap().port(), 80);
        let mut client = TcpStream::from(request);
        client.set_nonblocking(false).unwrap();
        let mut lock = open();
        let remote = server.peer_addr().ok();
        lock.close_on(&[Connection { local: server.local_addr().unwrap(), remote }]).unwrap();
        client.write_all(b"x").unwrap();
        server.write_all(b"y").unwrap();
        until_repeated(&client);
        assert!(!has_input(&server) && !has_input(&client));
        lock.release().unwrap();
        server.read_exact(&mut [0]).unwrap();
        client.read_exact(&mut [0]).unwrap();
    });
}

/// A table that sends what comes for one port to another. It is left to the end of the namespace.
fn redirect(from: u16, to: u16) {
    let name = |out: &mut Vec<u8>, kind, text: &str| {
        push_attribute(out, kind, &[text.as_bytes(), b"\0"].concat());
    };
    let number = |out: &mut Vec<u8>, kind, number: i32| push_attribute(out, kind, &number.to_be_bytes());
    let step = |out: &mut Vec<u8>, what: &str, fill: &dyn Fn(&mut Vec<u8>)| {
        push_nested(out, 1, |out| {
            name(out, 1, what);
            push_nested(out, 2, fill);
        });
    };
    let value = |out: &mut Vec<u8>, kind, port: u16| {
        push_nested(out, kind, |out| push_attribute(out, 1, &port.to_be_bytes()));
    };
    let mut table = vec![1, 0, 0, 0];
    name(&mut table, 1, "nat");
    let mut chain = table.clone();
    name(&mut chain, 3, "in");
    push_nested(&mut chain, 4, |out| {
        number(out, 1, 0);
        number(out, 2, -100);
    });
    name(&mut chain, 7, "nat");
    let mut rule = table.clone();
    name(&mut rule, 2, "in");
    push_nested(&mut rule, 4, |out| {
        step(out, "payload", &|out| {
            for (kind, of) in [(1, 8), (2, 2), (3, 2), (4, 2)] {
                number(out, kind, of);
            }
        });
        step(out, "cmp", &|out| {
            number(out, 1, 8);
            number(out, 2, 0);
            value(out, 3, from);
        });
        step(out, "immediate", &|out| {
            number(out, 1, 8);
            value(out, 2, to);
        });
        step(out, "redir", &|out| number(out, 1, 8));
    });
    let new = |kind: u16, body| (10 << 8 | kind, 0x400, body);
    let mut netlink = Netlink::open_for(SockProtocol::NetlinkNetFilter).unwrap();
    let frame = nft::batch_frame();
    netlink.transact((16, &frame), &[new(0, table), new(3, chain), new(6, rule)], (17, &frame)).unwrap();
}
