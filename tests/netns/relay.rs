//! A bad network: a relay of UDP datagrams in the middle that loses, repeats and delays them, or holds them until it is
//! told to let them go.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use migrate::testbed::{Lan, TestbedError};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBuf;

use crate::case::{Choices, Result};

/// The largest datagram.
const LARGEST: usize = 65_536;

/// What the relay does to datagrams.
#[derive(Clone, Copy)]
pub(crate) struct Weather {
    /// Of a thousand, so many are lost.
    pub(crate) lost: u64,
    /// Of a thousand, so many arrive twice.
    pub(crate) repeated: u64,
    /// Each arrives this much later.
    pub(crate) delay: Duration,
    /// One of ten up to twice as much, and so out of order.
    pub(crate) reorders: bool,
}

/// The two ways through it: to the destination, and back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    Forth,
    Back,
}

/// Asked before a datagram is delivered: whether it and all after it on the same way are to be held. What the sender
/// has done before it sent them can be seen by then, however late anybody comes to look.
pub(crate) type Gate = Box<dyn FnMut(Way) -> bool + Send>;

/// A running relay; it ends when dropped.
pub(crate) struct Relay {
    /// Where the source reaches the destination through it.
    pub(crate) address: String,
    released: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<std::result::Result<(), TestbedError>>>,
}

impl Relay {
    /// Starts a relay to the service on host `b`.
    pub(crate) fn start(lan: &Lan, weather: Weather) -> Result<Self> {
        Self::with_gate(lan, weather, Box::new(|_| false))
    }

    /// The same; a way is closed when the gate says so, until [`Relay::release`].
    pub(crate) fn with_gate(lan: &Lan, weather: Weather, gate: Gate) -> Result<Self> {
        let here = SocketAddr::new(Lan::CLIENT.parse()?, 7077);
        let there = SocketAddr::new(Lan::B.parse()?, 7077);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let released = Arc::new(AtomicBool::new(false));
        let gate = Doors { gate, closed: Vec::new(), held: Vec::new(), released: Arc::clone(&released) };
        let (ready, bound) = std::sync::mpsc::channel();
        let thread = lan.client("relay", move || {
            let carried = UdpSocket::bind(here).and_then(|front| {
                let _ = ready.send(());
                carry(&front, there, weather, gate, &stopped)
            });
            if let Err(error) = carried {
                println!("    the relay ended: {error}");
            }
        })?;
        // What is sent before it listens is lost without its doing.
        bound.recv_timeout(Duration::from_secs(10)).map_err(|_| "the relay does not listen")?;
        Ok(Self { address: here.to_string(), released, stop, thread: Some(thread) })
    }

    /// Delivers what was held, and holds nothing any more.
    pub(crate) fn release(&self) {
        self.released.store(true, Ordering::SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One client of the relay: its own socket towards the destination.
type Clients = HashMap<SocketAddr, UdpSocket>;

/// When it is due, a number that keeps the order, whether to the destination or back, client, bytes.
type Waiting = (Instant, u64, bool, SocketAddr, Vec<u8>);

/// A datagram that is held: which way, client, bytes.
type Held = (Way, SocketAddr, Vec<u8>);

/// What is held, and whether more is to be.
struct Doors {
    gate: Gate,
    closed: Vec<Way>,
    held: Vec<Held>,
    released: Arc<AtomicBool>,
}

impl Doors {
    /// The datagram, unless it is held.
    fn pass(&mut self, datagram: Held) -> Option<Held> {
        if self.released.load(Ordering::SeqCst) {
            return Some(datagram);
        }
        let way = datagram.0;
        if !self.closed.contains(&way) {
            if !(self.gate)(way) {
                return Some(datagram);
            }
            self.closed.push(way);
        }
        self.held.push(datagram);
        None
    }

    /// What was held, once it may go.
    fn released(&mut self) -> Vec<Held> {
        if self.released.load(Ordering::SeqCst) { std::mem::take(&mut self.held) } else { Vec::new() }
    }
}

fn carry(
    front: &UdpSocket,
    there: SocketAddr,
    weather: Weather,
    mut doors: Doors,
    stop: &AtomicBool,
) -> std::io::Result<()> {
    let here = front.local_addr()?;
    front.set_nonblocking(true)?;
    // A burst must not be lost here that a real link would carry.
    setsockopt(front, RcvBuf, &(4 << 20))?;
    let mut choices = Choices::new("relay");
    let mut clients = Clients::new();
    let mut queue: BinaryHeap<Reverse<Waiting>> = BinaryHeap::new();
    let (mut number, mut bytes) = (0, vec![0; LARGEST]);
    while !stop.load(Ordering::Relaxed) {
        let mut idle = true;
        let mut accept = |forth: bool, client: SocketAddr, datagram: &[u8]| {
            if choices.below(1000) < weather.lost {
                return;
            }
            let copies = 1 + u64::from(choices.below(1000) < weather.repeated);
            for _ in 0..copies {
                let micros = u64::try_from(weather.delay.as_micros()).unwrap_or(0);
                let more =
                    if weather.reorders && choices.below(10) == 0 { choices.below(micros + 1) } else { 0 };
                let due = Instant::now() + Duration::from_micros(micros + more);
                number += 1;
                queue.push(Reverse((due, number, forth, client, datagram.to_vec())));
            }
        };
        while let Some((count, client)) = received(front.recv_from(&mut bytes))? {
            if let std::collections::hash_map::Entry::Vacant(place) = clients.entry(client) {
                let back = UdpSocket::bind((here.ip(), 0))?;
                back.connect(there)?;
                back.set_nonblocking(true)?;
                setsockopt(&back, RcvBuf, &(4 << 20))?;
                place.insert(back);
            }
            accept(true, client, &bytes[..count]);
            idle = false;
        }
        for (client, back) in &clients {
            while let Some(count) = received(back.recv(&mut bytes))? {
                accept(false, *client, &bytes[..count]);
                idle = false;
            }
        }
        let mut leaving = doors.released();
        while queue.peek().is_some_and(|Reverse((due, ..))| *due <= Instant::now()) {
            let Some(Reverse((_, _, forth, client, datagram))) = queue.pop() else { break };
            let way = if forth { Way::Forth } else { Way::Back };
            leaving.extend(doors.pass((way, client, datagram)));
            idle = false;
        }
        for (way, client, datagram) in leaving {
            // A full socket buffer is one more way of losing it.
            let _ = match clients.get(&client) {
                Some(back) if way == Way::Forth => back.send(&datagram),
                _ => front.send_to(&datagram, client),
            };
        }
        if idle {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    Ok(())
}

/// Nothing there, a refusal that came back, and news that nobody is there any more: none of them is a datagram.
fn received<T>(result: std::io::Result<T>) -> std::io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.kind() {
            ErrorKind::WouldBlock
            | ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable => Ok(None),
            _ => Err(error),
        },
    }
}
