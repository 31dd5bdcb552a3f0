//! A link that stands still, and a bulk that stands back.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::tests::{SHORT, hello, listen, patient, place, trust, trusted_pair};
use super::{Incoming, Settings, TransportError, connect, setup};
use crate::engine::trial::until;
use crate::pageserver::frame::{self, Kind};

/// Passes packets between one client and a server until it is cut.
struct Relay {
    addr: SocketAddr,
    cut: Arc<AtomicBool>,
}

impl Relay {
    fn to(server: SocketAddr) -> Self {
        let (front, back) =
            (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let addr = front.local_addr().unwrap();
        back.connect(server).unwrap();
        let cut = Arc::new(AtomicBool::new(false));
        let (is_cut, from, to) = (cut.clone(), front.try_clone().unwrap(), back.try_clone().unwrap());
        let (known, client) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut packet = [0; 65_535];
            while let Ok((len, who)) = from.recv_from(&mut packet) {
                let _ = known.send(who);
                if !is_cut.load(Ordering::Relaxed) {
                    let _ = to.send(&packet[..len]);
                }
            }
        });
        let is_cut = cut.clone();
        std::thread::spawn(move || {
            let mut packet = [0; 65_535];
            let client = client.recv().unwrap();
            while let Ok(len) = back.recv(&mut packet) {
                if !is_cut.load(Ordering::Relaxed) {
                    let _ = front.send_to(&packet[..len], client);
                }
            }
        });
        Self { addr, cut }
    }
}

#[test]
fn a_link_that_is_cut_is_seen_to_be_silent_before_it_is_lost() {
    let (a, b) = (place(), place());
    trust(&a, &b);
    trust(&b, &a);
    // One side's idle timeout is enough for both.
    let mut listening = listen(&b, Settings { idle_timeout: Duration::from_secs(60), ..patient() });
    let relay = Relay::to(listening.addr());
    let settings = Settings { idle_timeout: Duration::from_secs(6), ..patient() };
    let mut source = connect(a.node.clone(), vec![relay.addr], hello(), settings).unwrap();
    let mut destination = listening.accept().unwrap();
    // An idle link is never silent for long: the keep-alives are heard.
    for _ in 0..20 {
        assert!(source.recv_timeout(Duration::from_millis(100)).is_none());
        assert!(destination.recv_timeout(Duration::from_millis(1)).is_none());
        for link in [&source, &destination] {
            until("that it is heard", || link.sender().silent_for() < setup::KEEP_ALIVE * 2);
        }
    }
    relay.cut.store(true, Ordering::Relaxed);
    for link in [&mut source, &mut destination] {
        let mut silent = false;
        let end = loop {
            match link.recv_timeout(Duration::from_millis(20)) {
                None => silent |= link.sender().silent_for() > setup::KEEP_ALIVE * 2,
                Some(Incoming::Lost(end)) => break end,
                other => panic!("{other:?}"),
            }
        };
        assert!(matches!(end, TransportError::Lost(quinn::ConnectionError::TimedOut)), "{end:?}");
        assert!(
            silent || link.sender().silent_for() > setup::KEEP_ALIVE * 2,
            "lost without having been silent"
        );
    }
}

#[test]
fn a_polite_bulk_queues_little_and_loses_nothing() {
    let (_a, _b, _l, source, mut destination) = trusted_pair(patient());
    let sender = source.sender();
    let block = |round: u32| frame::state(round, &vec![3; 60 << 10]).unwrap();
    let rounds = 3000;
    sender.set_polite(true);
    let sending = {
        let sender = sender.clone();
        std::thread::spawn(move || (0..rounds).try_for_each(|round| sender.send_frame_blocking(block(round))))
    };
    let mut seen = 0;
    let mut bounded = false;
    while seen < rounds {
        match destination.recv_timeout(SHORT) {
            Some(Incoming::Frame(frame)) => {
                assert_eq!((frame.kind(), frame.round()), (Kind::State, seen));
                seen += 1;
                // As fast as ever in the middle, and polite again.
                if seen == rounds / 3 {
                    sender.set_polite(false);
                } else if seen == rounds * 2 / 3 {
                    sender.set_polite(true);
                }
                bounded |= sender.send_window().is_some_and(|window| window < setup::SEND_WINDOW_BYTES);
            }
            other => panic!("{other:?}"),
        }
    }
    sending.join().unwrap().unwrap();
    assert!(bounded, "QUIC took as much as ever");
}

#[test]
fn a_polite_sender_waits_behind_a_receiver_with_little_of_its_own() {
    let (_a, _b, _l, source, _destination) = trusted_pair(patient());
    let sender = source.sender();
    sender.set_polite(true);
    let block = frame::state(1, &vec![3; 64 << 10]).unwrap();
    let len = block.len() as u64;
    let (handed, count) = std::sync::mpsc::channel();
    let pushing = sender.clone();
    // Ends when the link is dropped.
    std::thread::spawn(move || {
        while pushing.send_frame_blocking(block.clone()).is_ok() {
            let _ = handed.send(());
        }
    });
    // The receiver takes nothing: in the end everything stands.
    let mut total = 0;
    while count.recv_timeout(Duration::from_millis(500)).is_ok() {
        total += len;
    }
    // A thread that had to wait for so long may have gone on since.
    let queued = total.saturating_sub(sender.bytes_sent());
    assert!(queued <= 3 * len, "{queued} bytes are queued above QUIC");
}
