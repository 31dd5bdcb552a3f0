//! A connection as blocking threads see it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::Connection;
use tokio::sync::{OwnedSemaphorePermit, mpsc as tokio_mpsc, oneshot};

use super::budget::Budget;
use super::polite::Politeness;
use super::pump::{self, Ends};
use super::setup::{self, Streams};
use super::{PeerInfo, Settings, TransportError};
use crate::identity::Node;
use crate::pageserver::frame::Frame;
use crate::wire::{self, Control, Hello, Role};

/// Bulk bytes handed over but not yet taken by QUIC.
const BULK_QUEUE_BYTES: usize = 2 << 20;
/// The same while the bulk is polite: one message may be written while the next one is being made.
const POLITE_QUEUE_BYTES: usize = 128 << 10;
/// Control bytes handed over but not yet taken by QUIC.
const CONTROL_QUEUE_BYTES: usize = 1 << 20;
/// How long the closing of a connection may take when a link is dropped.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(200);

/// What arrives on a link.
#[derive(Debug)]
pub enum Incoming {
    /// A control message.
    Control(Box<Control>),
    /// A frame of the bulk stream (destination only).
    Frame(Frame),
    /// The connection has ended; nothing comes any more.
    Lost(TransportError),
}

/// An item of the receiving queue, with the room that it takes there.
pub(super) struct Queued {
    pub(super) item: Incoming,
    pub(super) _room: Option<OwnedSemaphorePermit>,
}

/// An item of a sending queue.
pub(super) enum Outgoing {
    Data(Bytes),
    Finish,
}

/// What a link, its senders and its pump share.
#[derive(Debug)]
pub(super) struct Shared {
    control: Budget,
    bulk: Budget,
    pub(super) sent: AtomicU64,
    pub(super) politeness: Arc<Politeness>,
    /// When something was heard from the peer last.
    pub(super) heard: Mutex<Instant>,
}

impl Shared {
    pub(super) fn budget(&self, bulk: bool) -> &Budget {
        if bulk { &self.bulk } else { &self.control }
    }

    /// Nobody waits for room any more: the connection has ended.
    pub(super) fn end(&self) {
        self.control.close();
        self.bulk.close();
    }
}

/// The sending half of a [`Link`]; clones send on the same connection.
#[derive(Debug, Clone)]
pub struct LinkSender {
    shared: Arc<Shared>,
    control: tokio_mpsc::UnboundedSender<Outgoing>,
    bulk: tokio_mpsc::UnboundedSender<Outgoing>,
}

impl LinkSender {
    /// Sends a control message; waits while too much is queued. That it was handed over does not say that it
    /// arrives.
    ///
    /// # Errors
    /// [`TransportError::Closed`] once the connection has ended; [`TransportError::Wire`] if it is too long.
    pub fn send_control(&self, message: &Control) -> Result<(), TransportError> {
        self.send(wire::encode(message)?, false)
    }

    /// Sends frames in wire form on the bulk stream; waits while too much is in flight. Source only.
    ///
    /// # Errors
    /// [`TransportError::Closed`] once the connection has ended.
    pub fn send_frame_blocking(&self, frames: Bytes) -> Result<(), TransportError> {
        self.send(frames, true)
    }

    /// Bytes of frames and control messages that were given to QUIC so far.
    pub fn bytes_sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Makes the bulk stream stand back for others on the same path, or go as fast as it can again: while it
    /// is polite, only as much is in flight as delays others by half a millisecond, and little is queued
    /// above that. What was sent or queued before still goes its way.
    ///
    /// What is handed over at once goes as a whole, so that the bulk is only as polite as it is sent in
    /// pieces of at most 64 KiB.
    pub fn set_polite(&self, polite: bool) {
        self.shared.politeness.set(polite);
        self.shared.bulk.set_limit(if polite { POLITE_QUEUE_BYTES } else { BULK_QUEUE_BYTES });
    }

    /// How much QUIC takes while polite, in flight or not.
    #[cfg(test)]
    pub(super) fn send_window(&self) -> Option<u64> {
        self.shared.politeness.send_window()
    }

    /// For how long nothing was heard from the peer, to a fifth of a second. An idle peer says twice a second
    /// that it is there: beyond a second or so the link stands still, whether or not it is lost later.
    pub fn silent_for(&self) -> Duration {
        self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    fn send(&self, bytes: Bytes, bulk: bool) -> Result<(), TransportError> {
        let (budget, queue) = (self.shared.budget(bulk), if bulk { &self.bulk } else { &self.control });
        if !budget.acquire_blocking(bytes.len()) {
            return Err(TransportError::Closed);
        }
        queue.send(Outgoing::Data(bytes)).map_err(|_| TransportError::Closed)
    }

    fn finish(&self) {
        // If the pump is gone, there is nothing to finish.
        let _ = self.bulk.send(Outgoing::Finish);
        let _ = self.control.send(Outgoing::Finish);
    }
}

/// A connection to another node. Dropping it closes the connection; [`Link::finish`] does so in good order.
pub struct Link {
    sender: LinkSender,
    incoming: mpsc::Receiver<Queued>,
    lost: Option<TransportError>,
    peer: PeerInfo,
    connection: Connection,
    dropped: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("peer", &self.peer.addr).finish_non_exhaustive()
    }
}

impl Link {
    /// Makes the two halves: what blocking threads use, and what the pump runs on.
    pub(super) fn new(streams: &Streams, bandwidth: Option<u64>) -> (Self, Ends) {
        let (control, control_queue) = tokio_mpsc::unbounded_channel();
        let (bulk, bulk_queue) = tokio_mpsc::unbounded_channel();
        let (queue, incoming) = mpsc::channel();
        let (dropper, dropped) = oneshot::channel();
        let shared = Arc::new(Shared {
            control: Budget::new(CONTROL_QUEUE_BYTES),
            bulk: Budget::new(BULK_QUEUE_BYTES),
            sent: AtomicU64::new(0),
            politeness: streams.politeness.clone(),
            heard: Mutex::new(Instant::now()),
        });
        let link = Self {
            sender: LinkSender { shared: shared.clone(), control, bulk },
            incoming,
            lost: None,
            peer: streams.peer.clone(),
            connection: streams.connection.clone(),
            dropped: Some(dropper),
            thread: None,
        };
        (link, Ends { shared, control: control_queue, bulk: bulk_queue, incoming: queue, dropped, bandwidth })
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &PeerInfo {
        &self.peer
    }

    /// A handle that other threads can send with.
    pub fn sender(&self) -> LinkSender {
        self.sender.clone()
    }

    /// As [`LinkSender::send_control`].
    ///
    /// # Errors
    /// As there.
    pub fn send_control(&self, message: &Control) -> Result<(), TransportError> {
        self.sender.send_control(message)
    }

    /// The round-trip time as QUIC estimates it.
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// Largest UDP payload that the path is known to carry.
    pub fn path_mtu(&self) -> u16 {
        self.connection.stats().path.current_mtu
    }

    /// Bytes of UDP payload sent so far: everything, with retransmissions and QUIC's own.
    pub fn udp_bytes_sent(&self) -> u64 {
        self.connection.stats().udp_tx.bytes
    }

    /// Waits up to `timeout` for what comes next; `None` if nothing did. Once the connection has ended, says
    /// so each time.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Option<Incoming> {
        if let Some(end) = &self.lost {
            return Some(Incoming::Lost(end.clone()));
        }
        let item = match self.incoming.recv_timeout(timeout) {
            Ok(queued) => queued.item,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => Incoming::Lost(TransportError::Closed),
        };
        if let Incoming::Lost(end) = &item {
            self.lost = Some(end.clone());
        }
        Some(item)
    }

    /// Ends the connection in good order: waits until the peer has received everything that was sent, or
    /// `timeout` has passed. What the peer still sends is dropped.
    ///
    /// # Errors
    /// The error that ended the connection before that; [`TransportError::Slow`] after `timeout`.
    pub fn finish(mut self, timeout: Duration) -> Result<(), TransportError> {
        self.sender.finish();
        let deadline = Instant::now() + timeout;
        loop {
            match self.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Some(Incoming::Lost(TransportError::Finished)) => return Ok(()),
                Some(Incoming::Lost(end)) => return Err(end),
                Some(_) => {}
                None => return Err(TransportError::Slow { addr: self.peer.addr }),
            }
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The pump notices and closes the connection, unless it has ended already.
        drop(self.dropped.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the network thread panicked");
        }
    }
}

/// Connects to the first of `addrs` that answers and exchanges Hellos (the version is filled in here). The
/// connection runs on a thread of its own.
///
/// # Errors
/// [`TransportError`]; with several addresses that of the last.
pub fn connect(
    node: Arc<Node>,
    addrs: Vec<SocketAddr>,
    hello: Hello,
    settings: Settings,
) -> Result<Link, TransportError> {
    let (ready, link) = mpsc::channel();
    let thread = thread::Builder::new()
        .name("net".to_owned())
        .spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(source) => {
                    let _ = ready.send(Err(TransportError::local("start the network runtime")(source)));
                    return;
                }
            };
            runtime.block_on(run_client(&node, &addrs, &hello, &settings, ready));
        })
        .map_err(TransportError::local("start the network thread"))?;
    let mut link = link.recv().unwrap_or(Err(TransportError::Closed))?;
    link.thread = Some(thread);
    Ok(link)
}

async fn run_client(
    node: &Node,
    addrs: &[SocketAddr],
    hello: &Hello,
    settings: &Settings,
    ready: mpsc::Sender<Result<Link, TransportError>>,
) {
    let mut dialled = Err(TransportError::Closed);
    for addr in addrs {
        dialled = setup::dial(node, *addr, hello.clone(), settings, Role::Control).await;
        if !matches!(dialled, Err(TransportError::Unreachable { .. } | TransportError::Connect { .. })) {
            break;
        }
    }
    let (endpoint, streams) = match dialled {
        Ok(dialled) => dialled,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    let (link, ends) = Link::new(&streams, settings.bandwidth);
    let connection = streams.connection.clone();
    if ready.send(Ok(link)).is_err() {
        return;
    }
    drop(ready);
    pump::run(streams, ends).await;
    // A close of ours must still leave the socket; after a close of the peer's there is nothing to say.
    if matches!(connection.close_reason(), Some(quinn::ConnectionError::LocallyClosed)) {
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
    }
}
