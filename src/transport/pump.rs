//! The network side of a link: tasks that move bytes between its queues and its streams.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use quinn::{Connection, ReadError, RecvStream, SendStream, WriteError};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::budget::Rate;
use super::link::{Incoming, Outgoing, Queued, Shared};
use super::setup::{Bulk, SEND_WINDOW_BYTES, Streams};
use super::{TransportError, code};
use crate::pageserver::frame::{Frame, HEADER_BYTES, Header};
use crate::pageserver::pool::Pool;
use crate::wire::{self, LENGTH_BYTES, MAX_CONTROL_BYTES};

/// Packets that are taken out of QUIC at once.
const CHUNKS: usize = 32;
/// Bytes that the destination holds received but not yet taken.
pub(super) const RECEIVED_BYTES: usize = 8 << 20;
/// Payload buffers of the usual size, to be used again.
const PAYLOAD_BUFFERS: usize = RECEIVED_BYTES / PAYLOAD_BYTES;
/// Payload of an ordinary Data frame: table and block.
const PAYLOAD_BYTES: usize = 64 * 1024 + 32;
/// First allocation for a long message or payload; it grows as the bytes come.
const FIRST_BYTES: usize = 1 << 20;

/// How often it is noted whether the peer was heard.
const HEARD_INTERVAL: Duration = Duration::from_millis(200);

/// The ends of the queues that the pump works on.
pub(super) struct Ends {
    pub(super) shared: Arc<Shared>,
    pub(super) control: mpsc::UnboundedReceiver<Outgoing>,
    pub(super) bulk: mpsc::UnboundedReceiver<Outgoing>,
    pub(super) incoming: std::sync::mpsc::Sender<Queued>,
    pub(super) dropped: oneshot::Receiver<()>,
    pub(super) bandwidth: Option<u64>,
}

/// Runs a link until its connection has ended. The last thing queued says how it ended.
pub(super) async fn run(streams: Streams, ends: Ends) {
    let Streams { connection, control: (control_send, control_receive), bulk, .. } = streams;
    let Ends { shared, control, bulk: bulk_queue, incoming, dropped, bandwidth } = ends;
    let queue = Queue { incoming, room: Arc::new(Semaphore::new(RECEIVED_BYTES)) };
    let (bulk_send, bulk_receive) = match bulk {
        Bulk::Send(stream) => (Some(stream), None),
        Bulk::Receive(stream) => (None, Some(stream)),
        Bulk::None => (None, None),
    };

    let writing = async {
        let rate = bandwidth.map(|bytes| Rate::new(bytes, Instant::now()));
        let bulk = async {
            if let Some(stream) = bulk_send {
                write(stream, bulk_queue, &shared, Some(&connection), rate).await;
            }
        };
        tokio::join!(write(control_send, control, &shared, None, None), bulk);
    };
    let reading = async {
        let control = async { checked(read_control(control_receive, &queue).await, &connection) };
        let bulk = async {
            match bulk_receive {
                Some(stream) => checked(read_frames(stream, &queue).await, &connection),
                None => Ok(()),
            }
        };
        match tokio::join!(control, bulk) {
            (Ok(()), Ok(())) => {
                connection.close(code::DONE, b"");
                TransportError::Finished
            }
            // What broke the rules is the cause; the other stream then only saw the connection end.
            (Err(cause), Ok(())) | (Ok(()), Err(cause)) => cause,
            (Err(TransportError::Closed), Err(cause)) | (Err(cause), Err(_)) => cause,
        }
    };
    let reading = async {
        tokio::select! {
            end = reading => end,
            _ = dropped => {
                connection.close(code::GAVE_UP, b"");
                TransportError::Closed
            }
        }
    };
    let written = async {
        writing.await;
        // Nothing more to write is no reason to stop reading.
        std::future::pending::<()>().await;
    };
    let end = tokio::select! {
        end = reading => end,
        () = written => TransportError::Closed,
        () = listen(&connection, &shared) => TransportError::Closed,
    };
    shared.end();
    tracing::debug!(peer = %connection.remote_address(), end = %end, "connection ended");
    queue.put_last(Incoming::Lost(end));
}

/// The receiving queue and the room in it.
struct Queue {
    incoming: std::sync::mpsc::Sender<Queued>,
    room: Arc<Semaphore>,
}

impl Queue {
    async fn put(&self, item: Incoming, bytes: usize) -> Result<(), TransportError> {
        let permits = u32::try_from(bytes.clamp(1, RECEIVED_BYTES)).unwrap_or(u32::MAX);
        let room = self.room.clone().acquire_many_owned(permits).await.map_err(|_| TransportError::Closed)?;
        self.incoming.send(Queued { item, _room: Some(room) }).map_err(|_| TransportError::Closed)
    }

    fn put_last(&self, item: Incoming) {
        // Whoever dropped the receiver does not want to know.
        let _ = self.incoming.send(Queued { item, _room: None });
    }
}

/// Notes when something was heard.
async fn listen(connection: &Connection, shared: &Shared) {
    let mut seen = 0;
    loop {
        let datagrams = connection.stats().udp_rx.datagrams;
        if datagrams != seen {
            seen = datagrams;
            *shared.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
        tokio::time::sleep(HEARD_INTERVAL).await;
    }
}

/// Closes the connection if the peer broke the rules, and tells it how.
pub(super) fn checked<T>(
    result: Result<T, TransportError>,
    connection: &Connection,
) -> Result<T, TransportError> {
    if let Err(
        error @ (TransportError::Wire(_)
        | TransportError::Frame(_)
        | TransportError::Misplaced(_)
        | TransportError::Request(_)
        | TransportError::Truncated(_)),
    ) = &result
    {
        let source = std::error::Error::source(error).map(ToString::to_string);
        let reason = source.unwrap_or_else(|| error.to_string());
        connection.close(code::PROTOCOL, reason.as_bytes());
    }
    result
}

/// Writes a queue to its stream; returns when it was finished or the connection has ended. `bulk_of` is the
/// connection whose bulk stream it is, if it is one.
async fn write(
    mut stream: SendStream,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    shared: &Shared,
    bulk_of: Option<&Connection>,
    mut rate: Option<Rate>,
) {
    let mut send_window = SEND_WINDOW_BYTES;
    while let Some(Outgoing::Data(bytes)) = queue.recv().await {
        let len = bytes.len();
        if let Some(connection) = bulk_of {
            // What QUIC has taken waits there as long as what is in flight, so that is bounded by the same.
            let wanted =
                shared.politeness.send_window().map_or(SEND_WINDOW_BYTES, |w| w.min(SEND_WINDOW_BYTES));
            if wanted != send_window {
                connection.set_send_window(wanted);
                send_window = wanted;
            }
        }
        let written = write_all(&mut stream, bytes, rate.as_mut()).await;
        shared.budget(bulk_of.is_some()).release(len);
        shared.sent.fetch_add(len as u64, Ordering::Relaxed);
        if let Err(error) = written {
            tracing::debug!(%error, "write ended");
            return;
        }
    }
    // The stream may be gone already; then the reading side says why.
    let _ = stream.finish();
}

async fn write_all(
    stream: &mut SendStream,
    mut bytes: Bytes,
    rate: Option<&mut Rate>,
) -> Result<(), WriteError> {
    let Some(rate) = rate else {
        return stream.write_chunk(bytes).await;
    };
    while !bytes.is_empty() {
        let piece = bytes.split_to(bytes.len().min(rate.piece_bytes()));
        let start = rate.take(piece.len(), Instant::now());
        tokio::time::sleep_until(start.into()).await;
        stream.write_chunk(piece).await?;
    }
    Ok(())
}

/// Takes bytes off a stream, in pieces as they came in packets.
pub(super) struct Source {
    stream: RecvStream,
    chunks: [Bytes; CHUNKS],
    next: usize,
    name: &'static str,
}

impl Source {
    pub(super) fn new(stream: RecvStream, name: &'static str) -> Self {
        Self { stream, chunks: [const { Bytes::new() }; CHUNKS], next: 0, name }
    }

    /// The piece to be read next; `None` at the end of the stream.
    async fn piece(&mut self) -> Result<Option<&mut Bytes>, TransportError> {
        loop {
            let left = self.chunks.get(self.next..).and_then(|rest| rest.iter().position(|c| !c.is_empty()));
            if let Some(index) = left {
                self.next += index;
                return Ok(self.chunks.get_mut(self.next));
            }
            self.next = 0;
            match self.stream.read_chunks(&mut self.chunks).await {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(None),
                Err(ReadError::ConnectionLost(end)) => return Err(TransportError::from_end(end)),
                Err(_) => return Err(TransportError::GaveUp),
            }
        }
    }

    /// Fills `out`; false at the end of the stream, before the first byte.
    async fn fill(&mut self, out: &mut [u8]) -> Result<bool, TransportError> {
        let name = self.name;
        let mut rest = &mut *out;
        let want = rest.len();
        while !rest.is_empty() {
            let missing = rest.len();
            match self.piece().await? {
                Some(piece) => {
                    let piece = piece.split_to(piece.len().min(missing));
                    rest.put_slice(&piece);
                }
                None if missing == want => return Ok(false),
                None => return Err(TransportError::Truncated(name)),
            }
        }
        Ok(true)
    }

    /// Appends `len` bytes to `out`.
    async fn append(&mut self, out: &mut BytesMut, len: usize) -> Result<(), TransportError> {
        let name = self.name;
        let end = out.len() + len;
        while out.len() < end {
            let missing = end - out.len();
            let piece = self.piece().await?.ok_or(TransportError::Truncated(name))?;
            out.extend_from_slice(&piece.split_to(piece.len().min(missing)));
        }
        Ok(())
    }
}

async fn read_control(stream: RecvStream, queue: &Queue) -> Result<(), TransportError> {
    let mut source = Source::new(stream, "control");
    let mut prefix = [0; LENGTH_BYTES];
    while source.fill(&mut prefix).await? {
        let len = wire::check_length(prefix, MAX_CONTROL_BYTES)?;
        let mut bytes = BytesMut::with_capacity(len.min(FIRST_BYTES));
        source.append(&mut bytes, len).await?;
        let message = wire::decode(bytes.freeze())?;
        queue.put(Incoming::Control(Box::new(message)), len).await?;
    }
    Ok(())
}

/// Takes frames off a stream.
pub(super) struct Frames {
    source: Source,
    pool: Pool,
}

impl Frames {
    /// Frames of a stream; `buffers` of the usual size are kept to be used again.
    pub(super) fn new(stream: RecvStream, name: &'static str, buffers: usize) -> Self {
        Self { source: Source::new(stream, name), pool: Pool::new(PAYLOAD_BYTES, buffers) }
    }

    /// The next frame, if `accept` lets its header pass; `None` at the end of the stream.
    pub(super) async fn next(
        &mut self,
        accept: impl FnOnce(&Header) -> Result<(), TransportError>,
    ) -> Result<Option<Frame>, TransportError> {
        let mut head = [0; HEADER_BYTES];
        if !self.source.fill(&mut head).await? {
            return Ok(None);
        }
        let header = Header::decode(&head).map_err(TransportError::Frame)?;
        accept(&header)?;
        let len = header.payload_bytes();
        let payload = if len == 0 {
            Bytes::new()
        } else if len <= PAYLOAD_BYTES {
            let mut buffer = self.pool.take();
            self.source.append(&mut buffer, len).await?;
            self.pool.send(buffer)
        } else {
            let mut buffer = BytesMut::with_capacity(len.min(FIRST_BYTES));
            self.source.append(&mut buffer, len).await?;
            buffer.freeze()
        };
        Frame::new(header, payload).map(Some).map_err(TransportError::Frame)
    }
}

async fn read_frames(stream: RecvStream, queue: &Queue) -> Result<(), TransportError> {
    let mut frames = Frames::new(stream, "bulk", PAYLOAD_BUFFERS);
    while let Some(frame) = frames.next(|_| Ok(())).await? {
        let len = frame.payload().len();
        queue.put(Incoming::Frame(frame), HEADER_BYTES + len).await?;
    }
    Ok(())
}
