//! The UDP socket below a QUIC endpoint.
//!
//! Receive buffers of the default size overflow at full speed, so both are raised to 4 MiB. And the kernel
//! takes no more than 64 KiB in one send: QUIC sends up to 10 packets at once, which is too much when packets
//! are jumbo frames, and a send that fails looks to QUIC like a path that carries only small packets. The
//! wrapper below tells QUIC how many packets of the present size fit.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, UdpPoller};

use super::TransportError;

/// Size asked for each socket buffer.
const BUFFER_BYTES: usize = 4 << 20;
/// Most bytes of one send: an IP packet without its headers.
const MAX_SEND_BYTES: usize = 65_507;

/// Opens the socket.
pub(super) fn open(addr: SocketAddr) -> Result<UdpSocket, TransportError> {
    let socket = UdpSocket::bind(addr).map_err(TransportError::local("bind a UDP socket"))?;
    // The forced variants pass the system's limit where we may; without the right to, the plain ones do.
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
        let _ = setsockopt(&socket, sockopt::RcvBuf, &BUFFER_BYTES);
    }
    if setsockopt(&socket, sockopt::SndBufForce, &BUFFER_BYTES).is_err() {
        let _ = setsockopt(&socket, sockopt::SndBuf, &BUFFER_BYTES);
    }
    let receive = getsockopt(&socket, sockopt::RcvBuf).unwrap_or(0);
    let send = getsockopt(&socket, sockopt::SndBuf).unwrap_or(0);
    // The kernel reports twice what it was asked for.
    if receive.min(send) < 2 * BUFFER_BYTES {
        tracing::warn!(
            receive_bytes = receive / 2,
            send_bytes = send / 2,
            wanted_bytes = BUFFER_BYTES,
            "the kernel clamps UDP socket buffers, migration will be slower: raise net.core.rmem_max and wmem_max"
        );
    }
    Ok(socket)
}

/// A tokio UDP socket that never asks the kernel for too large a send.
#[derive(Debug)]
pub(super) struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    segment_bytes: AtomicUsize,
}

impl CappedSocket {
    /// Wraps a socket; needs the context of a tokio runtime.
    pub(super) fn new(socket: UdpSocket) -> io::Result<Arc<Self>> {
        let inner = quinn::TokioRuntime.wrap_udp_socket(socket)?;
        Ok(Arc::new(Self { inner, segment_bytes: AtomicUsize::new(1) }))
    }
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(segment) = transmit.segment_size.filter(|size| *size > 0) else {
            return self.inner.try_send(transmit);
        };
        self.segment_bytes.store(segment, Ordering::Relaxed);
        if transmit.contents.len() <= MAX_SEND_BYTES {
            return self.inner.try_send(transmit);
        }
        // The packets have just become larger and QUIC does not know the new cap yet. Parts after the first
        // that do not go out are lost packets, as any network may lose them.
        let mut sent = Ok(());
        for (index, contents) in transmit.contents.chunks(MAX_SEND_BYTES / segment * segment).enumerate() {
            let part = Transmit {
                destination: transmit.destination,
                ecn: transmit.ecn,
                contents,
                segment_size: Some(segment).filter(|size| contents.len() > *size),
                src_ip: transmit.src_ip,
            };
            let result = self.inner.try_send(&part);
            if index == 0 {
                sent = result;
            }
            if sent.is_err() {
                break;
            }
        }
        sent
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let fit = MAX_SEND_BYTES / self.segment_bytes.load(Ordering::Relaxed).max(1);
        self.inner.max_transmit_segments().min(fit).max(1)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
