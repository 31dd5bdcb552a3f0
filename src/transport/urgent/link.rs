//! The source: answers requests for pages.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{Connection, Endpoint, ReadError, RecvStream, SendStream, WriteError};
use tokio::sync::oneshot;

use super::super::pump;
use super::super::setup::{self, Streams};
use super::super::{PeerInfo, Settings, TransportError, code};
use super::request::Request;
use super::start_thread;
use crate::identity::Node;
use crate::migration::MigrationId;
use crate::wire::{Hello, Role};

/// Packets that are taken out of QUIC at once.
const CHUNKS: usize = 16;
/// Answers that are gathered before they are sent: enough for what is asked at once, and little enough that
/// the first page does not wait long for the last.
const GATHERED_BYTES: usize = 128 << 10;
/// How long each address but the last may take to answer.
const NEXT_ADDRESS_AFTER: Duration = Duration::from_secs(1);
/// How long the closing may take.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(200);

/// Answers the request for the page at an address: gives frames in wire form to the function it gets. Called
/// on the `faults` thread.
pub type Serve = Box<dyn FnMut(u64, &mut dyn FnMut(Bytes)) + Send>;
/// Called on the `faults` thread when the connection has ended, unless by being dropped here.
/// [`TransportError::Finished`]: the destination needs no more pages. [`TransportError::is_loss`]: connecting
/// again may help.
pub type Lost = Box<dyn FnOnce(TransportError) + Send>;

/// The source's connection for single pages. Dropping it closes the connection; afterwards nothing is called
/// any more.
#[derive(Debug)]
pub struct UrgentLink {
    peer: PeerInfo,
    connection: Connection,
    lost: Arc<AtomicBool>,
    dropped: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl UrgentLink {
    /// Who is at the other end; its address says which of those tried was reached.
    pub fn peer(&self) -> &PeerInfo {
        &self.peer
    }

    /// Whether the connection has ended.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// The round-trip time as QUIC estimates it.
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }
}

impl Drop for UrgentLink {
    fn drop(&mut self) {
        drop(self.dropped.take());
        if let Some(thread) = self.thread.take()
            // Dropped by a callback: the thread ends by itself.
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the thread for faults panicked");
        }
    }
}

/// Connects to the first of `addrs` that answers (the destination's port for single pages, then its main port)
/// and attaches to a migration. `serve` answers requests and `lost` is told the end, both on a thread of their
/// own. [`settings`](super::settings) are made for this.
///
/// # Errors
/// [`TransportError`]; with several addresses that of the last. [`TransportError::Refused`] if the destination
/// does not wait for this migration.
pub fn connect(
    node: Arc<Node>,
    addrs: Vec<SocketAddr>,
    hello: Hello,
    id: MigrationId,
    serve: Serve,
    lost: Lost,
    settings: Settings,
) -> Result<UrgentLink, TransportError> {
    let (ready, link) = mpsc::channel();
    let thread = start_thread(move |runtime| {
        let attached = runtime.and_then(|runtime| {
            let attached = runtime.block_on(attach(&node, &addrs, &hello, id, &settings));
            attached.map(|(endpoint, streams)| (runtime, endpoint, streams))
        });
        match attached {
            Ok((runtime, endpoint, streams)) => {
                runtime.block_on(run(endpoint, streams, serve, lost, &ready));
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        }
    })?;
    let mut link: UrgentLink = link.recv().unwrap_or(Err(TransportError::Closed))?;
    link.thread = Some(thread);
    Ok(link)
}

async fn attach(
    node: &Node,
    addrs: &[SocketAddr],
    hello: &Hello,
    id: MigrationId,
    settings: &Settings,
) -> Result<(Endpoint, Streams), TransportError> {
    let mut dialled = Err(TransportError::Closed);
    for (index, addr) in addrs.iter().enumerate() {
        let mut settings = settings.clone();
        if index + 1 < addrs.len() {
            settings.handshake_timeout = settings.handshake_timeout.min(NEXT_ADDRESS_AFTER);
        }
        dialled = setup::dial(node, *addr, hello.clone(), &settings, Role::Urgent).await;
        if !matches!(dialled, Err(TransportError::Unreachable { .. } | TransportError::Connect { .. })) {
            break;
        }
    }
    let (endpoint, mut streams) = dialled?;
    match setup::attach(&mut streams, id, settings).await {
        Ok(()) => Ok((endpoint, streams)),
        Err(error) => {
            streams.connection.close(code::GAVE_UP, b"");
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
            Err(error)
        }
    }
}

async fn run(
    endpoint: Endpoint,
    streams: Streams,
    serve: Serve,
    lost: Lost,
    ready: &mpsc::Sender<Result<UrgentLink, TransportError>>,
) {
    let Streams { connection, peer, control: (mut send, mut receive), .. } = streams;
    let is_lost = Arc::new(AtomicBool::new(false));
    let (dropper, dropped) = oneshot::channel();
    let link = UrgentLink {
        peer,
        connection: connection.clone(),
        lost: is_lost.clone(),
        dropped: Some(dropper),
        thread: None,
    };
    if ready.send(Ok(link)).is_err() {
        return;
    }
    // A task is reached in one turn of the runtime, the future that it blocks on only in the next.
    let closing = connection.clone();
    let answering = tokio::spawn(async move {
        let end = answer(&mut send, &mut receive, serve).await;
        // Before the streams are dropped, which would look like an end in good order. Tells the peer if it
        // broke the rules.
        let end = pump::checked(Err::<(), _>(end), &closing).err().unwrap_or(TransportError::Closed);
        closing.close(code::GAVE_UP, b"");
        end
    });
    let end = tokio::select! {
        end = answering => end.unwrap_or(TransportError::Closed),
        _ = dropped => {
            connection.close(code::DONE, b"");
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
            return;
        }
    };
    tracing::debug!(peer = %connection.remote_address(), %end, "connection for single pages ended");
    is_lost.store(true, Ordering::Release);
    lost(end);
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
}

/// Answers requests until the connection ends: all that have come are served in one go.
async fn answer(send: &mut SendStream, receive: &mut RecvStream, mut serve: Serve) -> TransportError {
    let mut chunks = [const { Bytes::new() }; CHUNKS];
    let mut received = BytesMut::new();
    let mut answers: Vec<Bytes> = Vec::new();
    loop {
        let got = match receive.read_chunks(&mut chunks).await {
            Ok(Some(got)) => got,
            Ok(None) => return TransportError::Finished,
            Err(ReadError::ConnectionLost(end)) => return TransportError::from_end(end),
            Err(_) => return TransportError::GaveUp,
        };
        for chunk in chunks.iter_mut().take(got) {
            received.extend_from_slice(&std::mem::take(chunk));
        }
        loop {
            let request = match Request::take(&mut received) {
                Ok(Some(request)) => request,
                Ok(None) => break,
                Err(error) => return TransportError::Request(error),
            };
            for page in request.addresses() {
                serve(page, &mut |frame| answers.push(frame));
            }
            if answers.iter().map(Bytes::len).sum::<usize>() >= GATHERED_BYTES
                && let Err(error) = write(send, &mut answers).await
            {
                return error;
            }
        }
        if let Err(error) = write(send, &mut answers).await {
            return error;
        }
    }
}

async fn write(send: &mut SendStream, answers: &mut Vec<Bytes>) -> Result<(), TransportError> {
    let written = send.write_all_chunks(answers).await;
    answers.clear();
    written.map_err(|error| match error {
        WriteError::ConnectionLost(end) => TransportError::from_end(end),
        _ => TransportError::GaveUp,
    })
}
