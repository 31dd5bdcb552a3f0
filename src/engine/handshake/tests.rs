//! With a real kernel, in a network namespace of the thread; and what is said of segments.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;

use super::*;
use crate::engine::address::octets;
use crate::engine::lock::{Connection, Lock, connection_of};
use crate::engine::queued::segment::{ACK, FIN, SYN, Segment};
use crate::engine::queued::{SCALING, SELECTIVE, Sender, TIMESTAMPS};
use crate::engine::trial::until;
use crate::proto::files::description::Kind;
use crate::proto::files::{Description, Files, Handshake, SocketOption, TcpConnection, TcpSocket};

const ALL: u32 = TIMESTAMPS | SELECTIVE | SCALING;
/// Size of segments, selective acknowledgements with the clock 77, scale 9.
const OPTIONS: [u8; 20] = [2, 4, 0x03, 0xe8, 4, 2, 8, 10, 0, 0, 0, 77, 0, 0, 0, 0, 1, 3, 3, 9];

fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert!(Command::new("ip").args(["link", "set", "dev", "lo", "up"]).status().unwrap().success());
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A peer asks for a connection, and does not hear the answer.
fn ask(lock: &mut Lock, peer: SocketAddr, listener: SocketAddr, options: &[u8]) {
    lock.release_but(&[Connection { local: peer, remote: Some(listener) }]).unwrap();
    let (sequence, acknowledged) = (1000, 0);
    let (from, to, window) = (peer, listener, 8000);
    let segment = Segment { from, to, sequence, acknowledged, flags: SYN, window, options, payload: &[] };
    Sender::open().unwrap().send(0, &segment);
}

#[test]
fn the_kernel_tells_what_was_agreed_on() {
    in_a_namespace(|| {
        let (v4, v6): (IpAddr, IpAddr) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
        let everywhere: IpAddr = Ipv6Addr::UNSPECIFIED.into();
        let mut lock = Lock::open("migrate-test-handshakes").unwrap();
        let reader = Reader::prepare().unwrap();
        assert_eq!(reader.look().unwrap(), []);
        for (at, ip) in [(v4, v4), (v6, v6), (everywhere, v4)] {
            let listener = TcpListener::bind((at, 0)).unwrap();
            let to = SocketAddr::new(ip, listener.local_addr().unwrap().port());
            for (port, options, negotiated) in [(4000, &OPTIONS[..], ALL), (4001, &[], 0)] {
                let peer = SocketAddr::new(ip, port);
                ask(&mut lock, peer, to, options);
                let mut found = Vec::new();
                until("the handshake", || {
                    found = reader.look().unwrap();
                    found.retain(|one| {
                        connection_of(one.connection.as_ref().unwrap())
                            == Some(Connection { local: to, remote: Some(peer) })
                    });
                    !found.is_empty()
                });
                assert_eq!(found.len(), 1);
                let Handshake { connection, peer_clock, receive_window } = found.remove(0);
                let one = connection.unwrap();
                assert_eq!((one.receive_sequence, one.negotiated), (1001, negotiated));
                let has_all = negotiated == ALL;
                assert_eq!(peer_clock, if has_all { 77 } else { 0 });
                assert_eq!(one.send_scale, if has_all { 9 } else { 0 });
                assert_eq!(one.receive_scale != 0, has_all);
                assert_eq!(
                    one.segment_limit,
                    if has_all {
                        1000
                    } else if ip.is_ipv4() {
                        536
                    } else {
                        1220
                    }
                );
                assert!(receive_window > 1000, "{receive_window}");
                // Another one has other numbers, and these stay.
                let again = reader.look().unwrap();
                let same = again.iter().filter_map(|one| one.connection.as_ref());
                assert!(same.clone().any(|other| other.send_sequence == one.send_sequence));
            }
        }
    });
}

fn held(v6: bool, negotiated: u32) -> Held {
    held_with(v6, negotiated, vec![])
}

/// Where these sockets listen.
fn held_with(v6: bool, negotiated: u32, descriptions: Vec<Description>) -> Held {
    let [local, remote] = if v6 { ["fd00::1", "fd00::9"] } else { ["10.0.0.1", "10.0.0.9"] };
    let connection = TcpConnection {
        local: octets(local.parse().unwrap()),
        local_port: 80,
        remote: octets(remote.parse().unwrap()),
        remote_port: 4000,
        receive_sequence: 1001,
        send_sequence: 5001,
        negotiated,
        send_scale: if negotiated & SCALING == 0 { 0 } else { 3 },
        receive_scale: if negotiated & SCALING == 0 { 0 } else { 7 },
        segment_limit: 1000,
        timestamp: 1 << 20,
        ..TcpConnection::default()
    };
    let one = Handshake { connection: Some(connection), peer_clock: 77, receive_window: 60_000 };
    Held::of(&Files { handshakes: vec![one], descriptions, ..Files::default() })
}

/// A segment of its peer's.
fn said(held: &Held, flags: u8, sequence: u32, acknowledged: u32) -> Vec<u8> {
    let Connection { local, remote } = held.ends()[0];
    let (from, to) = (remote.unwrap(), local);
    let payload: &[u8] = if flags == SYN { &[] } else { b"words" };
    Segment { from, to, sequence, acknowledged, flags, window: 100, options: &[], payload }.packet().unwrap()
}

#[test]
fn what_a_segment_is_to_it() {
    for v6 in [false, true] {
        let mut held = held(v6, ALL);
        let ends = held.ends()[0];
        let hears = |held: &mut Held, flags, sequence, acknowledged| {
            let packet = said(held, flags, sequence, acknowledged);
            let (whom, heard) = held.hear(&packet).unwrap();
            assert_eq!(whom, ends);
            heard
        };
        assert_eq!(hears(&mut held, SYN, 1000, 0), Heard::Again);
        for (sequence, acknowledged) in [(1001, 5000), (1001, 5002), (1000, 5001), (1001 + 60_001, 5001)] {
            assert_eq!(hears(&mut held, ACK, sequence, acknowledged), Heard::Nothing);
        }
        let mut strange = said(&held, ACK, 1001, 5001);
        // From another port.
        strange[if v6 { 41 } else { 21 }] ^= 1;
        assert_eq!(held.hear(&strange), None);
        // Its word was lost, and this is what it says next.
        let Heard::End(image) = hears(&mut held, ACK, 1001 + 2000, 5001) else { panic!("not the end") };
        assert_eq!((image.receive_sequence, image.send_sequence, image.segment_limit), (1001, 5001, 1000));
        assert_eq!(u32::from_ne_bytes(*image.window[4..].first_chunk().unwrap()), 100 << 3);
        assert!(image.timestamp >= 1 << 20);
        assert!(!held.is_empty(), "not before the connection is there");
    }
    // An old request that comes late is no reason to forget the one that was answered.
    let mut held = held(false, 0);
    for (first, expected) in [(1002, Heard::Again), (1003, Heard::Again), (1003, Heard::Other)] {
        let other = said(&held, SYN, first, 0);
        assert_eq!(held.hear(&other).unwrap().1, expected);
    }
}

/// Of a socket that listens for connections that say something.
#[test]
fn a_word_without_bytes_is_not_the_end_where_that_is_deferred() {
    in_a_namespace(|| {
        let option = |name| SocketOption { level: libc::IPPROTO_TCP, name, value: vec![1, 0, 0, 0] };
        let listening = |address: &str, port, name| {
            let (address, options) = (octets(address.parse().unwrap()), vec![option(name)]);
            let socket = TcpSocket { address, port, listening: true, options, ..TcpSocket::default() };
            vec![Description { kind: Some(Kind::Tcp(socket)), ..Description::default() }]
        };
        let of = |descriptions| held_with(false, ALL, descriptions);
        for (mut held, defers) in [
            (of(listening("10.0.0.1", 80, libc::TCP_DEFER_ACCEPT)), true),
            (of(listening("::", 80, libc::TCP_DEFER_ACCEPT)), true),
            (of(listening("10.0.0.1", 81, libc::TCP_DEFER_ACCEPT)), false),
            (of(listening("10.0.0.2", 80, libc::TCP_DEFER_ACCEPT)), false),
            (of(listening("10.0.0.1", 80, libc::TCP_NODELAY)), false),
        ] {
            let Connection { local, remote } = held.ends()[0];
            let (from, to, sequence, acknowledged) = (remote.unwrap(), local, 1001, 5001);
            let plain = Segment {
                from,
                to,
                sequence,
                acknowledged,
                flags: ACK,
                window: 1,
                options: &[],
                payload: &[],
            };
            let ends = |held: &mut Held, segment: Segment<'_>| {
                matches!(held.hear(&segment.packet().unwrap()), Some((_, Heard::End(_))))
            };
            assert_eq!(ends(&mut held, plain), !defers);
            assert!(ends(&mut held, Segment { payload: b"words", ..plain }));
            assert!(ends(&mut held, Segment { flags: ACK | FIN, ..plain }));
            // In the end any word will do.
            for _ in 0..5 {
                assert_eq!(ends(&mut held, plain), !defers);
                held.hurry();
                held.answer(&[]).unwrap();
            }
            assert!(ends(&mut held, plain));
        }
    });
}

#[test]
fn it_is_given_up_in_the_end() {
    in_a_namespace(|| {
        let mut held = held(false, ALL);
        let first = held.due().unwrap();
        held.answer(&[]).unwrap();
        assert_eq!(held.due(), Some(first), "it is not time yet");
        let asked = held.ends();
        held.answer(&asked).unwrap();
        assert_eq!(held.due(), Some(first), "nor is it by being asked");
        for repeated in 0..6 {
            assert!(!held.is_empty(), "{repeated}");
            held.hurry();
            held.answer(&[]).unwrap();
        }
        assert!(held.is_empty());
    });
}

proptest! {
    #[test]
    fn no_bytes_panic(first in prop_oneof![Just(0x45u8), Just(0x60)], rest in proptest::collection::vec(any::<u8>(), 0..120)) {
        let mut bytes = vec![first];
        bytes.extend(rest);
        let _ = held(false, ALL).hear(&bytes);
    }
}
