//! Requests and pages over loopback.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use bytes::Bytes;
use nix::sys::eventfd::{EfdFlags, EventFd};
use quinn::VarInt;

use super::super::tests::{Listening, Place, SHORT, bare, hello, listen, patient, place, trust};
use super::super::{Settings, TransportError, UntrustedSide, connect as connect_link};
use super::*;
use crate::migration::MigrationId;
use crate::pageserver::frame::{self, FrameError, Kind, PAGE_BYTES};
use crate::pageserver::pack::{Compression, Packer};
use crate::pageserver::unpack::{Content, Unpacker};
use crate::proto::control::Attach;
use crate::wire::{Body, Role, WireError, encode};

const ID: MigrationId = MigrationId::new([7; 16]);
const LOCAL: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

/// Bytes, and the error that they must lead to.
type Nonsense = (Vec<u8>, fn(&TransportError) -> bool);

/// A destination with its service for single pages.
struct Grounds {
    a: Place,
    b: Place,
    server: UrgentServer,
}

fn grounds() -> Grounds {
    let (a, b) = (place(), place());
    trust(&a, &b);
    trust(&b, &a);
    let server = UrgentServer::start(b.node.clone(), (LOCAL, 0).into(), hello).unwrap();
    Grounds { a, b, server }
}

impl Grounds {
    fn addr(&self) -> SocketAddr {
        (LOCAL, self.server.port()).into()
    }

    fn expect(&self) -> (UrgentHandle, Receiver<Urgent>) {
        let (events, happened) = channel();
        let on = Box::new(move |urgent| drop(events.send(urgent)));
        (self.server.expect(ID, self.a.node.fingerprint(), on), happened)
    }

    fn connect(&self, id: MigrationId, serve: Serve) -> Result<Source, TransportError> {
        source(&self.a, vec![self.addr()], id, serve)
    }
}

#[derive(Debug)]
struct Source {
    link: UrgentLink,
    lost: Receiver<TransportError>,
}

fn source(
    who: &Place,
    addrs: Vec<SocketAddr>,
    id: MigrationId,
    serve: Serve,
) -> Result<Source, TransportError> {
    let (tell, lost) = channel();
    let on_lost = Box::new(move |end| drop(tell.send(end)));
    let link = connect(who.node.clone(), addrs, hello(), id, serve, on_lost, settings())?;
    Ok(Source { link, lost })
}

/// Every page holds its own address.
fn page(address: u64) -> Bytes {
    let contents: Vec<u8> = address.to_le_bytes().repeat(PAGE_BYTES / 8);
    let mut packer = Packer::new(Compression::Off, true);
    let mut out = Bytes::new();
    let mut sink = |bytes| {
        out = bytes;
        Ok::<(), std::convert::Infallible>(())
    };
    packer.pack(1, &[address], &contents, &mut sink).unwrap();
    packer.flush(&mut sink).unwrap();
    out
}

fn honest() -> Serve {
    Box::new(|address, out| out(page(address)))
}

fn attached(happened: &Receiver<Urgent>) {
    let next = happened.recv_timeout(SHORT).unwrap();
    assert!(matches!(next, Urgent::Attached), "{next:?}");
}

fn lost(happened: &Receiver<Urgent>) -> TransportError {
    match happened.recv_timeout(SHORT).unwrap() {
        Urgent::Lost(end) => end,
        other => panic!("{other:?}"),
    }
}

/// The address of the next page, which must hold it.
fn next_page(happened: &Receiver<Urgent>) -> u64 {
    let Urgent::Frame(frame) = happened.recv_timeout(SHORT).unwrap() else { panic!("no frame") };
    let mut unpacker = Unpacker::default();
    let Content::Data(pages) = unpacker.unpack(&frame).unwrap() else { panic!("no pages") };
    let (address, contents) = pages.runs().next().unwrap();
    assert_eq!(contents, address.to_le_bytes().repeat(PAGE_BYTES / 8));
    address
}

#[test]
fn pages_come_as_asked_and_in_order() {
    let grounds = grounds();
    let (handle, happened) = grounds.expect();
    handle.ask(&[4096]);
    let source = grounds.connect(ID, honest()).unwrap();
    attached(&happened);
    // What was asked before is void, as promised.
    let asked: Vec<u64> = (100..150).chain([7, 8, 3000]).map(|number| number * 4096).collect();
    handle.ask(&asked);
    handle.ask(&[8192]);
    let got: Vec<u64> = (0..=asked.len()).map(|_| next_page(&happened)).collect();
    assert_eq!(got, [&asked[..], &[8192]].concat());
    assert!(!source.link.is_lost());
    drop(source);
    assert!(matches!(lost(&happened), TransportError::Finished));
    assert!(happened.try_recv().is_err());
}

#[test]
fn requests_that_come_together_are_all_served() {
    let grounds = grounds();
    let (handle, happened) = grounds.expect();
    // The first request holds the source up until all others have been sent.
    let (go, wait) = channel::<()>();
    let mut first = true;
    let serve: Serve = Box::new(move |address, out| {
        if std::mem::take(&mut first) {
            wait.recv().unwrap();
        }
        out(page(address));
    });
    let source = grounds.connect(ID, serve).unwrap();
    attached(&happened);
    let asked: Vec<u64> = (1..=2000).map(|number| number * 3 * 4096).collect();
    for one in &asked {
        handle.ask(&[*one]);
    }
    go.send(()).unwrap();
    let got: Vec<u64> = asked.iter().map(|_| next_page(&happened)).collect();
    assert_eq!(got, asked);
    drop(source);
}

/// Whoever has always more to read, or can never read what there is, holds up nobody's pages.
#[test]
fn pages_come_beside_what_is_watched() {
    let grounds = grounds();
    let (handle, happened) = grounds.expect();
    let _source = grounds.connect(ID, honest()).unwrap();
    attached(&happened);
    let mut watches = Vec::new();
    let turns = Arc::new(AtomicUsize::new(0));
    for next in [Next::Again, Next::Soon(Duration::from_micros(30))] {
        let event = EventFd::from_value(1).unwrap();
        let counts = turns.clone();
        let read = move || {
            counts.fetch_add(1, Ordering::Relaxed);
            // On a single processor nobody else would ever run.
            std::thread::sleep(Duration::from_micros(10));
            next
        };
        watches.push(grounds.server.watch(OwnedFd::from(event), read).unwrap());
    }
    for address in (1..100).map(|page| page * 4096) {
        handle.ask(&[address]);
        assert_eq!(next_page(&happened), address);
    }
    assert!(turns.load(Ordering::Relaxed) > 100, "nobody read");
    drop(watches);
}

/// What becomes readable is read, each time.
#[test]
fn what_is_watched_is_read() {
    let grounds = grounds();
    let event = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let (tell, told) = channel();
    let reads = event.clone();
    let read = move || {
        if reads.read().is_ok() {
            tell.send(()).unwrap();
            return Next::Again;
        }
        Next::Wait
    };
    let fd = event.as_fd().try_clone_to_owned().unwrap();
    let watch = grounds.server.watch(fd, read).unwrap();
    for _ in 0..100 {
        event.write(1).unwrap();
        told.recv_timeout(SHORT).unwrap();
    }
    drop(watch);
    // The function goes with the watch.
    assert_eq!(told.recv_timeout(SHORT), Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
}

#[test]
fn nobody_else_attaches() {
    let grounds = grounds();
    let refused = |result: Result<Source, TransportError>| {
        let error = result.unwrap_err();
        assert!(matches!(error, TransportError::Refused(_)), "{error:?}");
        assert!(!error.is_loss());
    };
    refused(grounds.connect(ID, honest()));
    let (handle, happened) = grounds.expect();
    refused(grounds.connect(MigrationId::new([8; 16]), honest()));
    // Trusted, but the migration is not theirs.
    let other = place();
    trust(&other, &grounds.b);
    grounds.b.node.trust().add("other", other.node.fingerprint()).unwrap();
    refused(source(&other, vec![grounds.addr()], ID, honest()));
    // Not trusted at all.
    let stranger = place();
    trust(&stranger, &grounds.b);
    let error = source(&stranger, vec![grounds.addr()], ID, honest()).unwrap_err();
    assert!(matches!(error, TransportError::Untrusted { side: UntrustedSide::There, .. }), "{error:?}");
    assert!(happened.try_recv().is_err(), "nobody of them was heard");
    let owner = grounds.connect(ID, honest()).unwrap();
    attached(&happened);
    drop(handle);
    let end = owner.lost.recv_timeout(SHORT).unwrap();
    assert!(matches!(end, TransportError::Finished), "{end:?}");
    assert!(owner.link.is_lost());
    assert!(happened.recv_timeout(SHORT).is_err(), "the callback is forgotten");
    refused(grounds.connect(ID, honest()));
}

#[test]
fn a_source_that_comes_again_replaces_itself() {
    let grounds = grounds();
    let (handle, happened) = grounds.expect();
    let mut before: Option<Source> = None;
    for _ in 0..3 {
        let source = grounds.connect(ID, honest()).unwrap();
        if let Some(before) = before {
            assert!(matches!(lost(&happened), TransportError::Replaced));
            let end = before.lost.recv_timeout(SHORT).unwrap();
            assert!(matches!(end, TransportError::Replaced), "{end:?}");
        }
        attached(&happened);
        handle.ask(&[4096]);
        assert_eq!(next_page(&happened), 4096);
        before = Some(source);
    }
    // A newer expectation of the same migration takes over, and dropping the old handle does not end it.
    let (newer, happens_now) = grounds.expect();
    let end = before.unwrap().lost.recv_timeout(SHORT).unwrap();
    assert!(matches!(end, TransportError::Finished), "{end:?}");
    drop(handle);
    let _source = grounds.connect(ID, honest()).unwrap();
    attached(&happens_now);
    newer.ask(&[8192]);
    assert_eq!(next_page(&happens_now), 8192);
}

#[test]
fn the_end_of_the_server_is_noticed() {
    let grounds = grounds();
    let (_handle, happened) = grounds.expect();
    let source = grounds.connect(ID, honest()).unwrap();
    attached(&happened);
    drop(grounds.server);
    let end = source.lost.recv_timeout(SHORT).unwrap();
    assert!(end.is_loss(), "{end:?}");
    assert!(source.link.is_lost());
}

fn main_listener(grounds: &Grounds, handshake_timeout: Duration) -> Listening {
    listen(&grounds.b, Settings { handshake_timeout, ..patient() })
}

#[test]
fn the_main_port_is_as_good() {
    let grounds = grounds();
    let mut main = main_listener(&grounds, SHORT);
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let addrs = vec![silent.local_addr().unwrap(), main.addr()];
    let (handle, happened) = grounds.expect();
    // Not before it is told.
    let error = source(&grounds.a, vec![main.addr()], ID, honest()).unwrap_err();
    assert!(matches!(error, TransportError::Refused(_)), "{error:?}");
    main.server.also_for(&grounds.server);
    let source = source(&grounds.a, addrs, ID, honest()).unwrap();
    assert_eq!(source.link.peer().addr, main.addr());
    attached(&happened);
    handle.ask(&[4096, 8192]);
    assert_eq!((next_page(&happened), next_page(&happened)), (4096, 8192));
    // Ordinary links are accepted beside it there, and not at the other port.
    let link = connect_link(grounds.a.node.clone(), vec![main.addr()], hello(), patient()).unwrap();
    main.accept().unwrap();
    drop(link);
    let link = connect_link(grounds.a.node.clone(), vec![grounds.addr()], hello(), patient());
    let end = match link {
        Err(error) => error,
        Ok(mut link) => match link.recv_timeout(SHORT) {
            Some(super::super::Incoming::Lost(end)) => end,
            other => panic!("{other:?}"),
        },
    };
    assert!(matches!(end, TransportError::Refused(_)), "{end:?}");
}

#[test]
fn a_taken_port_is_passed_over() {
    let b = place();
    // An address that no other test uses.
    let main: SocketAddr = ([127, 0, 0, 77], 7077).into();
    let taken = UdpSocket::bind((main.ip(), 17077)).unwrap();
    let second = UrgentServer::start(b.node.clone(), main, hello).unwrap();
    assert_ne!(second.port(), 17077);
    drop(taken);
    let third = UrgentServer::start(b.node.clone(), main, hello).unwrap();
    assert_eq!(third.port(), 17077);
}

#[test]
fn a_destination_that_asks_nonsense_is_given_up() {
    let grounds = grounds();
    let (handle, happened) = grounds.expect();
    let source = grounds.connect(ID, honest()).unwrap();
    attached(&happened);
    handle.ask(&[4097]);
    let end = source.lost.recv_timeout(SHORT).unwrap();
    assert!(matches!(end, TransportError::Request(_)), "{end:?}");
    let end = lost(&happened);
    assert!(matches!(&end, TransportError::Rejected(why) if why.contains("0x1001")), "{end:?}");
}

#[test]
fn a_source_that_sends_something_else_is_given_up() {
    let grounds = grounds();
    let (handle, happened) = grounds.expect();
    // Each alone shows it: nothing of the 16 MiB that the layout's header announces has to come.
    let mut layout = frame::layout(1, b"x").unwrap()[..40].to_vec();
    layout[12..16].copy_from_slice(&(16u32 << 20).to_le_bytes());
    let nonsense: [Nonsense; 2] = [
        (layout, |end| matches!(end, TransportError::Misplaced(Kind::Layout))),
        (vec![9; 40], |end| matches!(end, TransportError::Frame(FrameError::Kind(9)))),
    ];
    for (bytes, expected) in nonsense {
        let bytes = Bytes::from(bytes);
        let source = grounds.connect(ID, Box::new(move |_, out| out(bytes.clone()))).unwrap();
        attached(&happened);
        handle.ask(&[4096]);
        let end = lost(&happened);
        assert!(expected(&end), "{end:?}");
        let end = source.lost.recv_timeout(SHORT).unwrap();
        assert!(matches!(end, TransportError::Rejected(_)), "{end:?}");
    }
}

#[test]
fn an_attach_is_bounded_in_time_and_length() {
    let grounds = grounds();
    // One that says too little is given up soon, the others have as long as they need.
    let mut mains = [Duration::from_secs(3), SHORT].map(|timeout| main_listener(&grounds, timeout));
    for main in &mut mains {
        main.server.also_for(&grounds.server);
    }
    let [hasty, patient] = &mut mains;
    let (_handle, happened) = grounds.expect();
    let greeting =
        encode(&Body::Hello(crate::wire::Hello { version: crate::wire::PROTOCOL_VERSION, ..hello() }).into())
            .unwrap();
    let attach =
        |id: &str| encode(&Body::Attach(Attach { migration_id: id.into() }).into()).unwrap().to_vec();
    let long = u32::try_from(crate::wire::MAX_HELLO_BYTES + 1).unwrap().to_le_bytes().to_vec();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let firsts: [Nonsense; 4] = [
        (Vec::new(), |end| matches!(end, TransportError::Slow { .. })),
        (long, |end| matches!(end, TransportError::Wire(WireError::TooLong { .. }))),
        (attach("../x"), |end| matches!(end, TransportError::Wire(WireError::Expected(_)))),
        (greeting.to_vec(), |end| matches!(end, TransportError::Wire(WireError::Expected(_)))),
    ];
    for (first, expected) in firsts {
        let main = if first.is_empty() { &mut *hasty } else { &mut *patient };
        let (_endpoint, connection) = runtime.block_on(bare(&grounds.a, main.addr()));
        let bytes = [&[Role::Urgent as u8], &greeting[..], &first].concat();
        let (_send, _receive) = runtime.block_on(async {
            let (mut send, receive) = connection.open_bi().await.unwrap();
            send.write_all(&bytes).await.unwrap();
            let _ = tokio::time::timeout(Duration::from_millis(100), connection.closed()).await;
            (send, receive)
        });
        let failed = main.accept().unwrap_err();
        assert!(expected(&failed.error), "{failed:?}");
        connection.close(VarInt::from_u32(0), b"");
    }
    assert!(happened.try_recv().is_err());
}

#[test]
fn a_source_does_not_wait_for_ever_to_be_attached() {
    // A trusted peer that completes the handshake and never says Attached.
    let (a, b) = (place(), place());
    trust(&a, &b);
    trust(&b, &a);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let endpoint = {
        let _context = runtime.enter();
        super::super::setup::listen(&b.node, (LOCAL, 0).into(), &Settings::default()).unwrap()
    };
    let addr = endpoint.local_addr().unwrap();
    let (keep, kept): (Sender<_>, Receiver<_>) = channel();
    let node = b.node.clone();
    runtime.spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let answered = super::super::setup::answer(&node, incoming, hello(), &Settings::default()).await;
            let _ = keep.send(answered);
        }
    });
    let settings = Settings { handshake_timeout: Duration::from_secs(3), ..settings() };
    let error =
        connect(a.node.clone(), vec![addr], hello(), ID, honest(), Box::new(|_| ()), settings).unwrap_err();
    assert!(matches!(error, TransportError::Slow { .. }), "{error:?}");
    drop(kept);
}
