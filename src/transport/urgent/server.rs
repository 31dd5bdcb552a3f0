//! The destination: asks for pages and takes them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use quinn::{Connection, Endpoint, SendStream, WriteError};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};

use super::super::pump::{self, Frames};
use super::super::server::accept_all;
use super::super::setup::{self, Answered, Streams};
use super::super::{TransportError, code};
use super::watch::{Next, Watch};
use super::{request, settings, start_thread};
use crate::identity::{Fingerprint, Node};
use crate::migration::MigrationId;
use crate::pageserver::frame::{Frame, Header, Kind};
use crate::proto::control::Attached;
use crate::wire::{self, Body, Hello};

/// Connections of one migration that wait for an earlier one to be put away.
const ARRIVALS: usize = 4;
/// Payload buffers of a connection, to be used again.
const PAYLOAD_BUFFERS: usize = 4;
/// How long closing everything may take.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(200);
/// What a source is told for which nobody waits: the same whether there is no such migration or it is somebody
/// else's.
const UNKNOWN: &str = "no migration of yours by this id waits for pages";

/// What happens to one migration on the connection for its single pages.
#[derive(Debug)]
pub enum Urgent {
    /// The source is there: requests reach it from now on. What was asked before must be asked again.
    Attached,
    /// Pages.
    Frame(Frame),
    /// The connection has ended; the source may come again. [`TransportError::Finished`] if it ended it in good
    /// order.
    Lost(TransportError),
}

/// Called on the `faults` thread for all that happens, in order. All migrations wait while it runs.
pub type On = Box<dyn FnMut(Urgent) + Send>;

/// Pages that are to be asked for.
#[derive(Debug, Default)]
struct Asks {
    state: Mutex<AskState>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct AskState {
    attached: bool,
    pages: Vec<u64>,
}

impl Asks {
    fn state(&self) -> MutexGuard<'_, AskState> {
        // Nothing panics while holding the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_attached(&self, attached: bool) {
        *self.state() = AskState { attached, pages: Vec::new() };
    }

    fn take(&self) -> Vec<u64> {
        std::mem::take(&mut self.state().pages)
    }
}

/// A migration that waits for its source.
#[derive(Debug)]
struct Expected {
    peer: Fingerprint,
    arrivals: mpsc::Sender<Streams>,
    asks: Arc<Asks>,
}

type Registry = Arc<Mutex<HashMap<MigrationId, Expected>>>;

fn locked(registry: &Registry) -> MutexGuard<'_, HashMap<MigrationId, Expected>> {
    registry.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where accepted connections find the migration that they are for.
#[derive(Debug, Clone)]
pub(crate) struct Attachments {
    registry: Registry,
    runtime: Handle,
}

impl Attachments {
    /// Hands a connection to its migration, or refuses it.
    pub(in super::super) fn offer(&self, streams: Streams, id: MigrationId) {
        let peer = streams.peer.fingerprint;
        let arrivals = match locked(&self.registry).get(&id) {
            Some(expected) if expected.peer == peer => Some(expected.arrivals.clone()),
            Some(_) => {
                tracing::warn!(%id, %peer, "a connection for the pages of somebody else's migration");
                None
            }
            None => None,
        };
        let Some(arrivals) = arrivals else { return Self::refuse(&streams) };
        // A source that connects faster than its connections are put away is no source of ours.
        if let Err(mpsc::error::TrySendError::Full(streams) | mpsc::error::TrySendError::Closed(streams)) =
            arrivals.try_send(streams)
        {
            Self::refuse(&streams);
        }
    }

    /// Tells a source that nobody waits for it.
    pub(in super::super) fn refuse(streams: &Streams) {
        streams.connection.close(code::REFUSED, UNKNOWN.as_bytes());
    }
}

/// One migration's right to ask for pages; dropping it closes the connection and forgets the callback.
#[derive(Debug)]
pub struct UrgentHandle {
    id: MigrationId,
    asks: Arc<Asks>,
    registry: Registry,
}

impl UrgentHandle {
    /// Asks for pages by their addresses; neighbours in the list travel as one request. Never blocks. What is
    /// asked while the source is not attached is dropped, so ask again at [`Urgent::Attached`].
    pub fn ask(&self, pages: &[u64]) {
        let mut state = self.asks.state();
        if !state.attached {
            return;
        }
        state.pages.extend_from_slice(pages);
        drop(state);
        self.asks.wake.notify_one();
    }
}

impl Drop for UrgentHandle {
    fn drop(&mut self) {
        let mut registry = locked(&self.registry);
        if registry.get(&self.id).is_some_and(|expected| Arc::ptr_eq(&expected.asks, &self.asks)) {
            // Without its sender, the task ends.
            registry.remove(&self.id);
        }
    }
}

/// Accepts the connections for single pages of all migrations. Dropping it closes them all, without a word to
/// the callbacks.
#[derive(Debug)]
pub struct UrgentServer {
    port: u16,
    attachments: Attachments,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl UrgentServer {
    /// Listens beside the main listener at `main`: on the same address, ten thousand ports further on (17077
    /// for 7077) if that one is free, else on any. `hello` makes our first message for each connection (the
    /// version is filled in).
    ///
    /// # Errors
    /// [`TransportError`] if the thread, the socket or TLS cannot be set up.
    pub fn start(
        node: Arc<Node>,
        main: SocketAddr,
        hello: impl Fn() -> Hello + Send + Sync + 'static,
    ) -> Result<Self, TransportError> {
        let (ready, is_ready) = std_mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let thread = start_thread(move |runtime| {
            let runtime = match runtime {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            let attachments =
                Attachments { registry: Registry::default(), runtime: runtime.handle().clone() };
            runtime.block_on(async move {
                let listening = listen(&node, main).and_then(|endpoint| {
                    let addr = endpoint.local_addr();
                    Ok((endpoint, addr.map_err(TransportError::local("read the listening address"))?))
                });
                let (endpoint, addr) = match listening {
                    Ok(listening) => listening,
                    Err(error) => {
                        let _ = ready.send(Err(error));
                        return;
                    }
                };
                let take = {
                    let attachments = attachments.clone();
                    move |peer, answered| {
                        taken(&attachments, peer, answered);
                        std::future::ready(())
                    }
                };
                if ready.send(Ok((addr.port(), attachments))).is_err() {
                    return;
                }
                tokio::select! {
                    () = accept_all(endpoint.clone(), node, settings(), hello, take) => {}
                    _ = stopped => {}
                }
                endpoint.close(code::GAVE_UP, b"");
                let _ = tokio::time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
            });
        })?;
        let (port, attachments) = is_ready.recv().unwrap_or(Err(TransportError::Closed))?;
        Ok(Self { port, attachments, stop: Some(stop), thread: Some(thread) })
    }

    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Lets the source of a migration, and nobody else, attach. `on` is called for all that happens then. An
    /// earlier expectation of the same migration is forgotten.
    pub fn expect(&self, id: MigrationId, peer: Fingerprint, on: On) -> UrgentHandle {
        let asks = Arc::new(Asks::default());
        let (arrivals, arrived) = mpsc::channel(ARRIVALS);
        let registry = self.attachments.registry.clone();
        self.attachments.runtime.spawn(attend(id, arrived, asks.clone(), on));
        locked(&registry).insert(id, Expected { peer, arrivals, asks: asks.clone() });
        UrgentHandle { id, asks, registry }
    }

    /// Calls `read` on the `faults` thread whenever `fd` has become readable, and again as it says, until the answer is
    /// dropped. All migrations wait while it runs, so it is to read a little at a time.
    ///
    /// # Errors
    /// If the descriptor cannot be watched.
    pub fn watch(
        &self,
        fd: OwnedFd,
        read: impl FnMut() -> Next + Send + 'static,
    ) -> Result<Watch, TransportError> {
        Watch::start(&self.attachments.runtime, fd, read)
    }

    pub(in super::super) fn attachments(&self) -> Attachments {
        self.attachments.clone()
    }
}

impl Drop for UrgentServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the thread for faults panicked");
        }
    }
}

/// From the main port to the one for single pages: known in advance, so that it can be let through
/// firewalls, and not the next one, which a second service on the host may want for itself.
const PORT_DISTANCE: u16 = 10_000;

fn listen(node: &Node, main: SocketAddr) -> Result<Endpoint, TransportError> {
    let at = |port| setup::listen(node, SocketAddr::new(main.ip(), port), &settings());
    match main.port().checked_add(PORT_DISTANCE).filter(|_| main.port() > 0) {
        Some(port) => at(port).or_else(|_| at(0)),
        None => at(0),
    }
}

fn taken(attachments: &Attachments, peer: SocketAddr, answered: Result<Answered, TransportError>) {
    match answered {
        Ok(Answered::Urgent(streams, id)) => attachments.offer(streams, id),
        Ok(Answered::Link(streams)) => {
            streams.connection.close(code::REFUSED, b"this port is for single pages only");
        }
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(%peer, error, "connection for single pages refused");
        }
    }
}

/// All connections of one migration, one after another, until its handle is dropped.
async fn attend(id: MigrationId, mut arrivals: mpsc::Receiver<Streams>, asks: Arc<Asks>, mut on: On) {
    let mut next = None;
    loop {
        let streams = match next.take() {
            Some(streams) => streams,
            None => match arrivals.recv().await {
                Some(streams) => streams,
                None => return,
            },
        };
        let connection = streams.connection.clone();
        let addr = streams.peer.addr;
        tracing::debug!(%id, peer = %addr, "attached");
        let end = tokio::select! {
            end = carry(streams, &asks, &mut on) => Some(end),
            newer = arrivals.recv() => {
                next = newer;
                None
            }
        };
        let end = match (end, &next) {
            (Some(end), _) => end,
            (None, Some(_)) => {
                connection.close(code::REPLACED, b"");
                TransportError::Replaced
            }
            (None, None) => {
                connection.close(code::DONE, b"");
                return;
            }
        };
        tracing::debug!(%id, peer = %addr, %end, "detached");
        asks.set_attached(false);
        on(Urgent::Lost(end));
    }
}

/// Serves one connection until it ends.
async fn carry(streams: Streams, asks: &Asks, on: &mut On) -> TransportError {
    let Streams { connection, control: (mut send, receive), .. } = streams;
    let greeted =
        async { send.write_chunk(wire::encode(&Body::Attached(Attached {}).into())?).await.map_err(writing) };
    if let Err(error) = greeted.await {
        return error;
    }
    asks.set_attached(true);
    on(Urgent::Attached);
    let reading = async {
        let mut frames = Frames::new(receive, "urgent", PAYLOAD_BUFFERS);
        loop {
            match pump::checked(frames.next(about_pages).await, &connection) {
                Ok(Some(frame)) => on(Urgent::Frame(frame)),
                Ok(None) => return finished(&connection),
                Err(error) => return error,
            }
        }
    };
    tokio::select! {
        end = reading => end,
        end = ask_all(&mut send, asks) => end,
    }
}

/// Sends what is asked, as it comes; ends with the connection.
async fn ask_all(send: &mut SendStream, asks: &Asks) -> TransportError {
    loop {
        let pages = asks.take();
        if pages.is_empty() {
            asks.wake.notified().await;
        } else if let Err(error) = send.write_chunk(request::encode(&pages)).await {
            return writing(error);
        }
    }
}

fn finished(connection: &Connection) -> TransportError {
    connection.close(code::DONE, b"");
    TransportError::Finished
}

fn about_pages(header: &Header) -> Result<(), TransportError> {
    match header.kind() {
        Kind::Data | Kind::Zero | Kind::Drop => Ok(()),
        other => Err(TransportError::Misplaced(other)),
    }
}

fn writing(error: WriteError) -> TransportError {
    match error {
        WriteError::ConnectionLost(end) => TransportError::from_end(end),
        _ => TransportError::GaveUp,
    }
}
