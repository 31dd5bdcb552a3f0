//! How long a process waits for a page that is still at the source: the network's part of it.
//!
//! The destination asks for one page at a time, about a millisecond apart, as faults come. The time runs from
//! the request until the page's frame is in the hands of who would install it. Beside it the source pushes
//! frames as fast as the bulk stream takes them, or nothing.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use migrate::identity::Node;
use migrate::migration::MigrationId;
use migrate::pageserver::frame::PAGE_BYTES;
use migrate::pageserver::pack::{Compression, Packer};
use migrate::proto::control::Query;
use migrate::testbed::{Lan, STATE, Tools};
use migrate::transport::urgent::{self, Urgent, UrgentServer};
use migrate::transport::{self, Incoming, Link, LinkSender, Server, Settings};
use migrate::wire::Body;

use crate::table::{self, median};

const PORT: u16 = 7100;
const ID: MigrationId = MigrationId::new([9; 16]);
/// The rounds by which frames are told apart.
const PUSHED: u32 = 1;
const ASKED: u32 = 2;
/// How long one way is measured, and how often, in turn with the others.
const TAKES: Duration = Duration::from_millis(1000);
const TURNS: usize = 5;
const WAIT: Duration = Duration::from_secs(10);

/// How requests travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Requests {
    None,
    Bulk,
    Own,
}

/// What is pushed meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Push {
    None,
    Plain,
    Polite,
}

/// The ways that are compared; the first is what the push is measured against.
const WAYS: [(Push, Requests); 8] = [
    (Push::Plain, Requests::None),
    (Push::Polite, Requests::None),
    (Push::None, Requests::Bulk),
    (Push::None, Requests::Own),
    (Push::Plain, Requests::Bulk),
    (Push::Polite, Requests::Bulk),
    (Push::Plain, Requests::Own),
    (Push::Polite, Requests::Own),
];

#[derive(Debug, Default)]
struct Seen {
    waits_us: Vec<f64>,
    rates: Vec<f64>,
}

/// Measures over the unlimited link and over one of `mbit`.
pub(crate) fn run(tools: &Tools, mbit: u32) -> Result<()> {
    println!("## A page on request, us (from asking to having it; one at a time, about 1 ms apart)\n");
    for limit in [None, Some(mbit)] {
        let lan = Lan::start(tools)?;
        lan.share_identity()?;
        if let Some(mbit) = limit {
            lan.limit_rate(&lan.a, mbit)?;
            lan.limit_rate(&lan.b, mbit)?;
        }
        let round_trip = median(&mut echo(&lan)?);
        let mut seen: [Seen; WAYS.len()] = Default::default();
        for _ in 0..TURNS {
            for ((push, requests), seen) in WAYS.into_iter().zip(&mut seen) {
                let (waits, rate) = session(&lan, push, requests)?;
                seen.waits_us.extend(waits);
                seen.rates.push(rate);
            }
        }
        let name = limit.map_or("unlimited".to_owned(), |mbit| format!("{mbit} Mbit/s"));
        println!("{name} link; round trip of a small packet, idle: {round_trip:.0} us\n");
        report(round_trip, &mut seen);
    }
    Ok(())
}

fn report(round_trip: f64, seen: &mut [Seen]) {
    let plain = median(&mut seen[0].rates);
    let mut rows = Vec::new();
    for ((push, requests), seen) in WAYS.into_iter().zip(seen) {
        seen.waits_us.sort_by(f64::total_cmp);
        let at = |percent: usize| {
            let last = seen.waits_us.len().checked_sub(1)?;
            seen.waits_us.get(last * percent / 100).copied()
        };
        let cell = |value: Option<f64>, digits: usize| {
            value.map_or(String::new(), |value| format!("{value:.digits$}"))
        };
        let rate = (push != Push::None).then(|| median(&mut seen.rates));
        let over = match requests {
            Requests::None => "",
            Requests::Bulk => "bulk",
            Requests::Own => "own",
        };
        rows.push(vec![
            format!("{push:?}").to_lowercase(),
            over.to_owned(),
            seen.waits_us.len().to_string(),
            cell(at(50), 0),
            cell(at(99), 0),
            cell(at(100), 0),
            cell(at(50).map(|wait| wait - round_trip), 0),
            cell(rate.map(|rate| rate / 1e6), 0),
            cell(rate.map(|rate| rate / plain), 2),
        ]);
    }
    let head = ["push", "requests over", "pages", "p50", "p99", "most", "p50 - rt", "push, MB/s", "of plain"];
    table::print(&table::words(&head), &rows);
}

/// Round trips of a small packet without any protocol, us.
pub(crate) fn echo(lan: &Lan) -> Result<Vec<f64>> {
    let (ready, is_ready) = channel();
    let server = Lan::inside(&lan.b, "echo", move || -> Result<()> {
        let socket = UdpSocket::bind((Lan::B, PORT))?;
        socket.set_read_timeout(Some(WAIT))?;
        let _ = ready.send(());
        let mut packet = [0; 64];
        loop {
            let (len, from) = socket.recv_from(&mut packet)?;
            socket.send_to(&packet[..len], from)?;
            if len == 1 {
                return Ok(());
            }
        }
    })?;
    is_ready.recv().context("the echo did not start")?;
    let client = Lan::inside(&lan.a, "pings", move || -> Result<Vec<f64>> {
        let socket = UdpSocket::bind((Lan::A, 0))?;
        socket.connect((Lan::B, PORT))?;
        socket.set_read_timeout(Some(WAIT))?;
        let mut took = Vec::new();
        let mut packet = [0; 64];
        for _ in 0..1000 {
            let start = Instant::now();
            socket.send(&packet[..16])?;
            socket.recv(&mut packet)?;
            took.push(start.elapsed().as_secs_f64() * 1e6);
            std::thread::sleep(Duration::from_millis(1));
        }
        socket.send(&packet[..1])?;
        Ok(took)
    })?;
    let took = client.join().map_err(|_| anyhow!("the pings panicked"))???;
    server.join().map_err(|_| anyhow!("the echo panicked"))???;
    Ok(took)
}

/// One way, once: the waits and the bytes per second that were pushed.
fn session(lan: &Lan, push: Push, requests: Requests) -> Result<(Vec<f64>, f64)> {
    let node = Arc::new(Node::open(&lan.a.outside(STATE))?);
    let theirs = node.clone();
    let (ready, is_ready) = channel();
    let destination =
        Lan::inside(&lan.b, "destination", move || receive(theirs, push != Push::None, requests, &ready))?;
    let port = is_ready.recv().context("the destination did not start")?;
    let source = Lan::inside(&lan.a, "source", move || serve(node, push, requests, port))?;
    let seen = destination.join().map_err(|_| anyhow!("the destination panicked"))??;
    source.join().map_err(|_| anyhow!("the source panicked"))???;
    seen
}

fn address(port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(Lan::B.parse()?, port))
}

/// The time of the request that is on its way, and where its wait is to be told.
#[derive(Debug, Clone)]
struct Stopwatch {
    asked: Arc<Mutex<Instant>>,
    waits: Sender<Duration>,
}

impl Stopwatch {
    fn start(&self) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn stop(&self) {
        let _ = self.waits.send(self.asked.lock().unwrap_or_else(PoisonError::into_inner).elapsed());
    }
}

fn receive(
    node: Arc<Node>,
    pushed: bool,
    requests: Requests,
    ready: &Sender<u16>,
) -> Result<(Vec<f64>, f64)> {
    let peer = node.fingerprint();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut server = {
        let _context = runtime.enter();
        Server::bind(node.clone(), address(PORT)?, Settings::default(), migrate::hello::hello)?
    };
    let faults = UrgentServer::start(node, server.local_addr(), migrate::hello::hello)?;
    let (waits, waited) = channel();
    let watch = Stopwatch { asked: Arc::new(Mutex::new(Instant::now())), waits };
    let (attached, is_attached) = channel();
    let handle = {
        let watch = watch.clone();
        let on = move |urgent| match urgent {
            Urgent::Attached => drop(attached.send(())),
            Urgent::Frame(_) => watch.stop(),
            Urgent::Lost(_) => {}
        };
        faults.expect(ID, peer, Box::new(on))
    };
    let _ = ready.send(faults.port());
    let link = runtime.block_on(server.accept()).context("the endpoint failed")?.map_err(|f| f.error)?;
    if requests == Requests::Own {
        is_attached.recv_timeout(WAIT).context("the source did not attach")?;
    }
    let count = Arc::new(AtomicU64::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let sender = link.sender();
    let reader = {
        let (count, done, watch) = (count.clone(), done.clone(), watch.clone());
        let read = move || read(link, &watch, &count, &done);
        std::thread::Builder::new().name("reader".into()).spawn(read)?
    };
    // The push has come up to its speed by then.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(300) || pushed && count.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (before, begun) = (count.load(Ordering::Relaxed), Instant::now());
    let mut us = Vec::new();
    // The gaps differ, so that they do not keep step with the push.
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    let result = (1..).take_while(|_| begun.elapsed() < TAKES).try_for_each(|page: u64| -> Result<()> {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros(500 + noise % 1024));
        watch.start();
        match requests {
            Requests::None => return Ok(()),
            Requests::Bulk => sender.send_control(&query())?,
            Requests::Own => handle.ask(&[page * PAGE_BYTES as u64]),
        }
        let wait = waited.recv_timeout(WAIT).context("a page did not come")?;
        us.push(wait.as_secs_f64() * 1e6);
        Ok(())
    });
    let rate = (count.load(Ordering::Relaxed) - before) as f64 / begun.elapsed().as_secs_f64();
    done.store(true, Ordering::Relaxed);
    reader.join().map_err(|_| anyhow!("the reader panicked"))?;
    drop((handle, faults));
    runtime.block_on(server.shutdown());
    result.map(|()| (us, rate))
}

fn query() -> migrate::wire::Control {
    Body::Query(Query { migration_id: ID.to_string() }).into()
}

/// Takes what arrives, until told to stop; dropping the link then ends the source.
fn read(mut link: Link, watch: &Stopwatch, count: &AtomicU64, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        match link.recv_timeout(Duration::from_millis(20)) {
            Some(Incoming::Frame(frame)) if frame.round() == ASKED => watch.stop(),
            Some(Incoming::Frame(frame)) => {
                count.fetch_add(frame.payload().len() as u64, Ordering::Relaxed);
            }
            Some(Incoming::Lost(_)) => return,
            Some(Incoming::Control(_)) | None => {}
        }
    }
}

fn serve(node: Arc<Node>, push: Push, requests: Requests, port: u16) -> Result<()> {
    let hello = migrate::hello::hello;
    let page = frame(ASKED, 1)?;
    let mut link = transport::connect(node.clone(), vec![address(PORT)?], hello(), Settings::default())?;
    let urgent = if requests == Requests::Own {
        let answer = page.clone();
        let serve = Box::new(move |_, out: &mut dyn FnMut(Bytes)| out(answer.clone()));
        let addrs = vec![address(port)?, address(PORT)?];
        let lost = Box::new(|_| ());
        Some(urgent::connect(node, addrs, hello(), ID, serve, lost, urgent::settings())?)
    } else {
        None
    };
    let sender = link.sender();
    let pusher = (push != Push::None).then(|| {
        sender.set_polite(push == Push::Polite);
        let sender = sender.clone();
        std::thread::Builder::new().name("pusher".into()).spawn(move || pushing(&sender))
    });
    loop {
        match link.recv_timeout(WAIT) {
            Some(Incoming::Control(_)) => sender.send_frame_blocking(page.clone())?,
            Some(Incoming::Lost(_)) => break,
            Some(Incoming::Frame(_)) => {}
            None if requests == Requests::Bulk => bail!("no requests"),
            None => {}
        }
    }
    if let Some(pusher) = pusher {
        pusher?.join().map_err(|_| anyhow!("the pusher panicked"))??;
    }
    drop(urgent);
    Ok(())
}

/// Pushes until the link ends.
fn pushing(sender: &LinkSender) -> Result<()> {
    let batch = frame(PUSHED, 16)?;
    while sender.send_frame_blocking(batch.clone()).is_ok() {}
    Ok(())
}

/// So many pages in one frame, as they are.
fn frame(round: u32, pages: u64) -> Result<Bytes> {
    let contents: Vec<u8> = (0..pages * PAGE_BYTES as u64).map(|at| (at % 251) as u8).collect();
    let addresses: Vec<u64> = (1..=pages).map(|page| page * PAGE_BYTES as u64).collect();
    let mut frame = Bytes::new();
    let mut sink = |bytes| {
        frame = bytes;
        Ok::<(), std::convert::Infallible>(())
    };
    let mut packer = Packer::new(Compression::Off, true);
    packer.pack(round, &addresses, &contents, &mut sink)?;
    packer.flush(&mut sink)?;
    Ok(frame)
}
