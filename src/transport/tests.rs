//! Real QUIC over loopback.

use std::net::UdpSocket;

use bytes::{BufMut, BytesMut};

use super::*;
use crate::engine::trial::until;
use crate::identity::Node;
use crate::pageserver::frame::{self, Frame, Kind, MAX_STATE_BYTES};
use crate::pageserver::pack::{Compression, Packer};
use crate::pageserver::unpack::{Content, Unpacker};
use crate::wire::{Body, Control, Hello, MAX_CONTROL_BYTES, PROTOCOL_VERSION, Role, WireError, encode};
use std::sync::Arc;
use std::time::Instant;
use tokio::runtime::Runtime;

pub(super) const SHORT: Duration = Duration::from_secs(20);

/// For links that are not to be lost, nor given up, because the host is busy.
pub(crate) fn patient() -> Settings {
    Settings { idle_timeout: Duration::from_secs(60), handshake_timeout: SHORT, ..Settings::default() }
}

/// A node in a state directory of its own.
pub(crate) struct Place {
    _dir: tempfile::TempDir,
    pub(super) node: Arc<Node>,
}

pub(super) fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let node = Arc::new(Node::open(dir.path()).unwrap());
    Place { _dir: dir, node }
}

pub(super) fn trust(who: &Place, whom: &Place) {
    who.node.trust().add("peer", whom.node.fingerprint()).unwrap();
}

pub(super) fn hello() -> Hello {
    Hello { software: "test".into(), ..Hello::default() }
}

pub(crate) struct Listening {
    pub(super) runtime: Runtime,
    pub(super) server: Server,
}

pub(super) fn listen(place: &Place, settings: Settings) -> Listening {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let server = {
        let _context = runtime.enter();
        Server::bind(place.node.clone(), ([127, 0, 0, 1], 0).into(), settings, hello).unwrap()
    };
    Listening { runtime, server }
}

impl Listening {
    pub(super) fn addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    pub(super) fn accept(&mut self) -> Result<Link, Failed> {
        let server = &mut self.server;
        let accepted = self.runtime.block_on(async { tokio::time::timeout(SHORT, server.accept()).await });
        accepted.expect("a connection in time").expect("a live endpoint")
    }
}

fn dial(place: &Place, addr: SocketAddr) -> Result<Link, TransportError> {
    connect(place.node.clone(), vec![addr], hello(), patient())
}

pub(crate) fn trusted_pair(settings: Settings) -> (Place, Place, Listening, Link, Link) {
    let (a, b) = (place(), place());
    trust(&a, &b);
    trust(&b, &a);
    let mut listening = listen(&b, settings.clone());
    let source = connect(a.node.clone(), vec![listening.addr()], hello(), settings).unwrap();
    let destination = listening.accept().unwrap();
    (a, b, listening, source, destination)
}

fn commit(id: &str) -> Control {
    Body::Commit(crate::proto::control::Commit { migration_id: id.to_owned(), late: Vec::new() }).into()
}

fn end(link: &mut Link) -> TransportError {
    loop {
        match link.recv_timeout(SHORT) {
            Some(Incoming::Lost(end)) => return end,
            Some(_) => {}
            None => panic!("the connection should have ended"),
        }
    }
}

#[test]
fn messages_and_frames_arrive_in_order_both_ways() {
    let (a, _b, _l, mut source, mut destination) = trusted_pair(patient());
    assert_eq!(destination.peer().fingerprint, a.node.fingerprint());
    assert_eq!(destination.peer().hello.software, "test");
    assert_eq!(source.peer().hello.version, PROTOCOL_VERSION);
    let state = vec![7; 3 << 20];
    source.send_control(&commit("first")).unwrap();
    source.sender().send_frame_blocking(frame::layout(1, b"layout").unwrap()).unwrap();
    source.sender().send_frame_blocking(frame::state(2, &state).unwrap()).unwrap();
    destination.send_control(&commit("back")).unwrap();

    let mut frames: Vec<Frame> = Vec::new();
    let mut controls = 0;
    while frames.len() < 2 || controls < 1 {
        match destination.recv_timeout(SHORT) {
            Some(Incoming::Control(message)) => {
                assert_eq!(*message, commit("first"));
                controls += 1;
            }
            Some(Incoming::Frame(frame)) => frames.push(frame),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((frames[0].kind(), frames[0].round()), (Kind::Layout, 1));
    assert!(frames[1].kind() == Kind::State && frames[1].payload()[..] == state[..]);
    assert!(matches!(source.recv_timeout(SHORT), Some(Incoming::Control(m)) if *m == commit("back")));
    assert!(source.recv_timeout(Duration::from_millis(1)).is_none());
    assert!(source.sender().bytes_sent() > 3 << 20 && source.udp_bytes_sent() > 3 << 20);
}

#[test]
fn finish_delivers_the_last_message() {
    for _ in 0..20 {
        let (_a, _b, _l, source, mut destination) = trusted_pair(patient());
        source.sender().send_frame_blocking(frame::state(1, &vec![1; 1 << 20]).unwrap()).unwrap();
        source.send_control(&commit("last")).unwrap();
        source.finish(SHORT).unwrap();
        let mut seen = Vec::new();
        let end = loop {
            match destination.recv_timeout(SHORT) {
                Some(Incoming::Lost(end)) => break end,
                Some(item) => seen.push(item),
                None => panic!("no end"),
            }
        };
        assert!(matches!(end, TransportError::Finished), "{end}");
        assert_eq!(seen.len(), 2);
    }
    let (_a, _b, _l, mut source, destination) = trusted_pair(patient());
    destination.send_control(&commit("answer")).unwrap();
    destination.finish(SHORT).unwrap();
    assert!(matches!(source.recv_timeout(SHORT), Some(Incoming::Control(m)) if *m == commit("answer")));
    assert!(matches!(end(&mut source), TransportError::Finished));
    assert!(matches!(source.send_control(&commit("late")), Err(TransportError::Closed)));
}

#[test]
fn dropping_a_link_ends_the_other_side_at_once() {
    let (_a, _b, _l, source, mut destination) = trusted_pair(patient());
    let start = Instant::now();
    drop(source);
    assert!(matches!(end(&mut destination), TransportError::GaveUp));
    assert!(start.elapsed() < patient().idle_timeout / 2, "not by the idle timeout");
    let (_a, _b, _l, mut source, destination) = trusted_pair(patient());
    drop(destination);
    assert!(matches!(end(&mut source), TransportError::GaveUp));
    assert!(matches!(end(&mut source), TransportError::GaveUp), "said each time");
}

#[test]
fn an_untrusted_client_is_refused_and_told_the_command() {
    let (a, b) = (place(), place());
    trust(&a, &b);
    let mut listening = listen(&b, patient());
    let error = dial(&a, listening.addr()).unwrap_err();
    let own = a.node.fingerprint();
    assert!(
        matches!(&error, TransportError::Untrusted { fingerprint, side: UntrustedSide::There, .. } if *fingerprint == own),
        "{error:?}"
    );
    assert!(error.to_string().contains(&format!("run there: migrate trust add NAME {own}")), "{error}");
    let failed = listening.accept().unwrap_err();
    assert!(
        matches!(&failed.error, TransportError::Untrusted { fingerprint, side: UntrustedSide::Here, .. } if *fingerprint == own),
        "{failed:?}"
    );
    assert!(failed.error.to_string().contains(&format!("run here: migrate trust add NAME {own}")));

    // The store is read for each connection: no restart is needed.
    trust(&b, &a);
    dial(&a, listening.addr()).unwrap();
    listening.accept().unwrap();
    b.node.trust().remove("peer").unwrap();
    assert!(matches!(dial(&a, listening.addr()), Err(TransportError::Untrusted { .. })));
}

#[test]
fn an_untrusted_server_is_refused_and_sees_nothing() {
    let (a, b) = (place(), place());
    trust(&b, &a);
    let mut listening = listen(&b, patient());
    let error = dial(&a, listening.addr()).unwrap_err();
    let theirs = b.node.fingerprint();
    assert!(
        matches!(&error, TransportError::Untrusted { fingerprint, side: UntrustedSide::Here, .. } if *fingerprint == theirs),
        "{error:?}"
    );
    assert!(error.to_string().contains(&format!("run here: migrate trust add NAME {theirs}")), "{error}");
    let failed = listening.accept().unwrap_err();
    assert!(
        matches!(&failed.error, TransportError::Untrusted { side: UntrustedSide::There, .. }),
        "{failed:?}"
    );
}

/// A trusted peer that does not keep to the rules: a bare QUIC connection with the right key.
pub(super) async fn bare(place: &Place, addr: SocketAddr) -> (quinn::Endpoint, quinn::Connection) {
    let endpoint = setup::endpoint(([127, 0, 0, 1], 0).into(), None).unwrap();
    let (crypto, _) = tls::client(&place.node).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let connection = endpoint.connect_with(config, addr, "migrate").unwrap().await.unwrap();
    (endpoint, connection)
}

/// Opens both streams with proper roles and `first` behind that of the control stream.
async fn open(
    connection: &quinn::Connection,
    first: &[u8],
) -> (quinn::SendStream, quinn::RecvStream, quinn::SendStream) {
    let (mut control, receive) = connection.open_bi().await.unwrap();
    control.write_all(&[&[Role::Control as u8], first].concat()).await.unwrap();
    let mut bulk = connection.open_uni().await.unwrap();
    bulk.write_all(&[Role::Bulk as u8]).await.unwrap();
    (control, receive, bulk)
}

fn hello_bytes(version: u32) -> Vec<u8> {
    encode(&Body::Hello(Hello { version, ..hello() }).into()).unwrap().to_vec()
}

fn pair_for_bare(settings: Settings) -> (Place, Place, Listening, Runtime) {
    let (a, b) = (place(), place());
    trust(&a, &b);
    trust(&b, &a);
    let listening = listen(&b, settings);
    (a, b, listening, tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap())
}

#[test]
fn another_version_is_refused_with_both_named() {
    let (a, _b, mut listening, runtime) = pair_for_bare(patient());
    let closed = runtime.block_on(async {
        let (_endpoint, connection) = bare(&a, listening.addr()).await;
        let _streams = open(&connection, &hello_bytes(9)).await;
        connection.closed().await
    });
    let seen = TransportError::from_end(closed);
    assert!(matches!(seen, TransportError::VersionMismatch { theirs: PROTOCOL_VERSION, .. }), "{seen:?}");
    let failed = listening.accept().unwrap_err();
    assert!(
        matches!(failed.error, TransportError::VersionMismatch { ours: PROTOCOL_VERSION, theirs: 9 }),
        "{failed:?}"
    );
}

#[test]
fn broken_first_messages_are_refused() {
    let (a, _b, mut listening, runtime) = pair_for_bare(patient());
    let long = u32::try_from(wire_limit() + 1).unwrap().to_le_bytes().to_vec();
    let not_hello = encode(&commit("x")).unwrap().to_vec();
    for first in [long, not_hello, b"\x04\0\0\0\xff\xff\xff\xff".to_vec()] {
        let closed = runtime.block_on(async {
            let (_endpoint, connection) = bare(&a, listening.addr()).await;
            let _streams = open(&connection, &first).await;
            connection.closed().await
        });
        assert!(matches!(TransportError::from_end(closed), TransportError::Rejected(_)));
        assert!(matches!(listening.accept().unwrap_err().error, TransportError::Wire(_)));
    }
    // An unknown role.
    let closed = runtime.block_on(async {
        let (_endpoint, connection) = bare(&a, listening.addr()).await;
        let (mut control, _receive) = connection.open_bi().await.unwrap();
        control.write_all(&[9]).await.unwrap();
        connection.closed().await
    });
    assert!(matches!(TransportError::from_end(closed), TransportError::Rejected(_)));
    let failed = listening.accept().unwrap_err();
    assert!(matches!(failed.error, TransportError::Wire(WireError::Role(9))), "{failed:?}");
}

fn wire_limit() -> usize {
    crate::wire::MAX_HELLO_BYTES
}

#[test]
fn a_long_control_message_or_a_broken_frame_ends_the_link() {
    let (a, _b, mut listening, runtime) = pair_for_bare(patient());
    let over = u32::try_from(MAX_CONTROL_BYTES + 1).unwrap().to_le_bytes();
    let mut frames: Vec<(bool, Vec<u8>)> = vec![(false, over.to_vec()), (true, vec![9; 40])];
    // A State frame of 64 MiB + 1: refused by its header alone, nothing of it needs to come.
    let mut head = frame::state(1, b"x").unwrap()[..40].to_vec();
    head[12..16].copy_from_slice(&u32::try_from(MAX_STATE_BYTES + 1).unwrap().to_le_bytes());
    frames.push((true, head));
    for (on_bulk, bytes) in frames {
        runtime.block_on(async {
            let (_endpoint, connection) = bare(&a, listening.addr()).await;
            let (mut control, _receive, mut bulk) = open(&connection, &hello_bytes(PROTOCOL_VERSION)).await;
            let stream = if on_bulk { &mut bulk } else { &mut control };
            stream.write_all(&bytes).await.unwrap();
            let closed = TransportError::from_end(connection.closed().await);
            assert!(matches!(closed, TransportError::Rejected(_)), "{closed:?}");
        });
        let mut link = listening.accept().unwrap();
        let end = end(&mut link);
        assert!(matches!(end, TransportError::Wire(_) | TransportError::Frame(_)), "{end:?}");
    }
}

#[test]
fn stuck_peers_and_garbage_hold_nobody_up() {
    let (a, _b, mut listening, runtime) = pair_for_bare(patient());
    // Ten trusted peers that say nothing after the handshake, and garbage from a socket.
    let stuck = runtime.block_on(ten_silent(&a, listening.addr()));
    let garbage = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut noise = 0x9e37_79b9_7f4a_7c15u64;
    for len in 1..1400usize {
        let bytes: Vec<u8> = (0..len)
            .map(|_| {
                noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                noise.to_be_bytes()[0]
            })
            .collect();
        garbage.send_to(&bytes, listening.addr()).unwrap();
    }
    let good = dial(&a, listening.addr()).unwrap();
    // Before the first of them is given up.
    let first = listening.accept();
    assert!(first.is_ok(), "{first:?}");
    drop((stuck, good));
}

async fn ten_silent(place: &Place, addr: SocketAddr) -> Vec<(quinn::Endpoint, quinn::Connection)> {
    let mut all = Vec::new();
    for _ in 0..10 {
        all.push(bare(place, addr).await);
    }
    all
}

#[test]
fn stuck_peers_are_given_up() {
    // Enough for a handshake on a busy host.
    let (a, _b, mut listening, runtime) =
        pair_for_bare(Settings { handshake_timeout: Duration::from_secs(5), ..patient() });
    let stuck = runtime.block_on(ten_silent(&a, listening.addr()));
    for _ in 0..10 {
        let failed = listening.accept().unwrap_err();
        assert!(matches!(failed.error, TransportError::Slow { .. }), "{failed:?}");
    }
    drop(stuck);
}

#[test]
fn nobody_there_is_said_in_time() {
    let a = place();
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let settings = Settings { handshake_timeout: Duration::from_millis(300), ..Settings::default() };
    let error = connect(a.node.clone(), vec![silent.local_addr().unwrap()], hello(), settings).unwrap_err();
    assert!(matches!(error, TransportError::Unreachable { .. }), "{error:?}");
}

#[test]
fn a_receiver_that_does_not_take_frames_stops_the_sender() {
    let (_a, _b, _l, source, mut destination) = trusted_pair(patient());
    let sender = source.sender();
    let block = frame::state(1, &vec![3; 1 << 20]).unwrap();
    let sending =
        std::thread::spawn(move || (0..64).try_for_each(|_| sender.send_frame_blocking(block.clone())));
    // The queues hold some 8 + 4 + 6 + 2 MiB; wait until nothing moves any more.
    until("that the queues fill", || source.sender().bytes_sent() >= 8 << 20);
    let mut last = 0;
    while source.sender().bytes_sent() != last {
        last = source.sender().bytes_sent();
        std::thread::sleep(Duration::from_millis(300));
    }
    assert!((8 << 20..24 << 20).contains(&last), "{last}");
    assert!(!sending.is_finished());
    // Control is not kept waiting by the full bulk stream, only by the receiver's own queue.
    let mut frames = 0;
    source.send_control(&commit("over it")).unwrap();
    let mut control_after = None;
    while frames < 64 {
        match destination.recv_timeout(SHORT) {
            Some(Incoming::Frame(_)) => frames += 1,
            Some(Incoming::Control(_)) => control_after = Some(frames),
            other => panic!("{other:?}"),
        }
    }
    sending.join().unwrap().unwrap();
    assert!(control_after.is_some_and(|frames| frames < 40), "{control_after:?}");
}

#[test]
fn the_bandwidth_cap_holds() {
    let settings = Settings { bandwidth: Some(20 << 20), ..patient() };
    let (_a, _b, _l, source, mut destination) = trusted_pair(settings);
    let block = frame::state(1, &vec![3; 256 << 10]).unwrap();
    let sender = source.sender();
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || (0..40).try_for_each(|_| sender.send_frame_blocking(block.clone())).unwrap());
        let mut frames = 0;
        while frames < 40 {
            match destination.recv_timeout(SHORT) {
                Some(Incoming::Frame(_)) => frames += 1,
                other => panic!("{other:?}"),
            }
        }
    });
    let took = start.elapsed();
    assert!(took > Duration::from_millis(450), "10 MiB at 20 MiB/s took {took:?}");
    assert!(took < SHORT, "10 MiB at 20 MiB/s took {took:?}");
}

/// Prints the rate of one link; `cargo test --release throughput -- --nocapture --ignored`.
#[test]
#[ignore = "a measurement"]
fn throughput() {
    let (_a, _b, _l, source, mut destination) = trusted_pair(patient());
    let pages: u64 = 256 << 10;
    let mut contents = BytesMut::new();
    for word in 0..(256u64 << 10) / 8 {
        contents.put_u64(word.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    let sender = source.sender();
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut packer = Packer::new(Compression::Auto, true);
            let mut sink = |bytes| sender.send_frame_blocking(bytes);
            for chunk in 0..pages / 64 {
                let addrs: Vec<u64> = (0..64).map(|page| (chunk * 64 + page) << 12).collect();
                packer.pack(1, &addrs, &contents, &mut sink).unwrap();
            }
            packer.flush(&mut sink).unwrap();
            sender.send_frame_blocking(frame::round_end(1)).unwrap();
        });
        let mut unpacker = Unpacker::default();
        loop {
            let Some(Incoming::Frame(frame)) = destination.recv_timeout(SHORT) else { panic!("lost") };
            if matches!(unpacker.unpack(&frame).unwrap(), Content::RoundEnd) {
                break;
            }
        }
    });
    let mib = pages as f64 / 256.0;
    println!("packets of {} bytes, {:?}", source.path_mtu(), source.rtt());
    println!("{mib} MiB in {:?}: {:.0} MiB/s", start.elapsed(), mib / start.elapsed().as_secs_f64());
}
