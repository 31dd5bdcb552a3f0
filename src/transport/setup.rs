//! From an address to two streams: endpoints, the handshake, stream roles, the exchange of Hellos.
//!
//! Everything here runs under the handshake deadline, which the callers set.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use quinn::{
    AckFrequencyConfig, Connection, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig,
    ReadExactError, RecvStream, SendStream, TransportConfig, VarInt, WriteError,
};
use tokio::time::timeout;

use super::polite::{self, Politeness};
use super::socket::{self, CappedSocket};
use super::{PeerInfo, Settings, TransportError, code, tls};
use crate::identity::{Fingerprint, Node};
use crate::migration::MigrationId;
use crate::proto::control::Attach;
use crate::wire::{
    self, Body, Control, Hello, LENGTH_BYTES, MAX_HELLO_BYTES, PROTOCOL_VERSION, Role, WireError,
};

/// How often an idle connection says that it is alive.
pub(super) const KEEP_ALIVE: Duration = Duration::from_millis(500);
/// Bytes that a sender may have in flight on one stream.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Bytes that a sender keeps until they are acknowledged, over all streams. More than one stream's window, so
/// that a full bulk stream never keeps a control message waiting.
pub(super) const SEND_WINDOW_BYTES: u64 = 6 << 20;
/// Largest packet to look for on the path: jumbo frames. QUIC probes, starting with what every path carries.
const MAX_UDP_PAYLOAD: u16 = 8952;

/// Bytes that may be in flight at once on a new connection: ten of the largest packets. QUIC's default of 14 KB
/// is full with one probe for jumbo frames in flight, and quinn then holds even the closing packet back for
/// good: the peer would wait for the idle timeout.
const INITIAL_WINDOW_BYTES: u64 = 128 << 10;

/// A packet counts as lost when it is this much of a round trip late: more than the 9/8 that QUIC begins
/// with, so that a path that changes the order of packets does not look like one that loses them.
const LATE_ROUND_TRIPS: f32 = 1.5;
/// And when so many later ones have arrived: so many that time decides, for the same reason.
const LATER_PACKETS: u32 = 64;

/// On a connection for single pages the peer acknowledges late, not with every second packet: sending an
/// acknowledgement costs about as much as a page does, and would come before the page is looked at. A lost
/// packet is noticed sooner nevertheless: QUIC counts with 25 ms otherwise.
const URGENT_ACK_PACKETS: u32 = 16;
const URGENT_ACK_DELAY: Duration = Duration::from_millis(4);

/// A connection with its streams, both Hellos exchanged.
pub(super) struct Streams {
    pub(super) connection: Connection,
    pub(super) peer: PeerInfo,
    pub(super) control: (SendStream, RecvStream),
    pub(super) bulk: Bulk,
    pub(super) politeness: Arc<Politeness>,
}

/// The bulk stream: the source writes it, the destination reads it. A connection for single pages has none.
pub(super) enum Bulk {
    Send(SendStream),
    Receive(RecvStream),
    None,
}

/// What an accepted connection is for.
pub(super) enum Answered {
    Link(Streams),
    /// Single pages of this migration, if it is known and the peer's: nothing has been promised yet.
    Urgent(Streams, MigrationId),
}

fn transport_config(
    settings: &Settings,
    accept_streams: u8,
    politeness: &Arc<Politeness>,
    role: Role,
) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    // A time that QUIC cannot express (beyond 146 years) means none.
    config.max_idle_timeout(IdleTimeout::try_from(settings.idle_timeout).ok());
    config.keep_alive_interval(Some(KEEP_ALIVE.min(settings.idle_timeout / 3)));
    config.stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES));
    config.send_window(SEND_WINDOW_BYTES);
    config.max_concurrent_bidi_streams(accept_streams.into());
    config.max_concurrent_uni_streams(accept_streams.into());
    config.datagram_receive_buffer_size(None);
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(MAX_UDP_PAYLOAD);
    config.mtu_discovery_config(Some(discovery));
    if role == Role::Urgent {
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(URGENT_ACK_PACKETS));
        acks.max_ack_delay(Some(URGENT_ACK_DELAY));
        acks.reordering_threshold(VarInt::from_u32(URGENT_ACK_PACKETS));
        config.ack_frequency_config(Some(acks));
    }
    config.packet_threshold(LATER_PACKETS);
    config.time_threshold(LATE_ROUND_TRIPS);
    config.congestion_controller_factory(polite::factory(INITIAL_WINDOW_BYTES, politeness));
    Arc::new(config)
}

/// An endpoint on `addr`; needs the context of a tokio runtime.
pub(super) fn endpoint(
    addr: SocketAddr,
    server: Option<quinn::ServerConfig>,
) -> Result<Endpoint, TransportError> {
    let socket = socket::open(addr)?;
    let socket = CappedSocket::new(socket).map_err(TransportError::local("watch a UDP socket"))?;
    let mut config = EndpointConfig::default();
    // The default would keep peers from sending jumbo frames. This size is a valid one, so it cannot fail.
    let _ = config.max_udp_payload_size(MAX_UDP_PAYLOAD);
    Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(quinn::TokioRuntime))
        .map_err(TransportError::local("start a QUIC endpoint"))
}

/// An endpoint that listens on `addr`.
pub(super) fn listen(node: &Node, addr: SocketAddr, settings: &Settings) -> Result<Endpoint, TransportError> {
    // Each connection gets a configuration of its own; this one only makes the endpoint listen.
    let (config, _) = server_config(node, settings, &Arc::default())?;
    endpoint(addr, Some(config))
}

/// The configuration of one incoming connection, and what verifies its peer.
pub(super) fn server_config(
    node: &Node,
    settings: &Settings,
    politeness: &Arc<Politeness>,
) -> Result<(quinn::ServerConfig, Arc<tls::Verifier>), TransportError> {
    let (crypto, verifier) = tls::server(node)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport_config(settings, 1, politeness, Role::Control));
    config.migration(false);
    Ok((config, verifier))
}

/// Connects to `addr` and says hello: for a link (`Role::Control`) or for single pages (`Role::Urgent`). The
/// endpoint is the connection's own.
pub(super) async fn dial(
    node: &Node,
    addr: SocketAddr,
    hello: Hello,
    settings: &Settings,
    role: Role,
) -> Result<(Endpoint, Streams), TransportError> {
    let any: SocketAddr =
        if addr.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let endpoint = endpoint(any, None)?;
    let (crypto, verifier) = tls::client(node)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    let politeness = Arc::new(Politeness::default());
    config.transport_config(transport_config(settings, 0, &politeness, role));
    let connecting = endpoint
        .connect_with(config, addr, "migrate")
        .map_err(|source| TransportError::Connect { addr, source })?;

    let own = node.fingerprint();
    let setup_error = |end| TransportError::from_setup_end(end, addr, own, verifier.refused());
    let dialled = async {
        let connection = connecting.await.map_err(setup_error)?;
        let ended = |error| setup_end(error, &setup_error);
        let (mut control_send, mut control_receive) = connection.open_bi().await.map_err(setup_error)?;
        control_send.write_chunk(greeting(Some(role), hello)?).await.map_err(writing).map_err(&ended)?;
        let bulk = if role == Role::Urgent {
            Bulk::None
        } else {
            let mut bulk = connection.open_uni().await.map_err(setup_error)?;
            let role = Bytes::copy_from_slice(&[Role::Bulk as u8]);
            bulk.write_chunk(role).await.map_err(writing).map_err(&ended)?;
            Bulk::Send(bulk)
        };
        let peer = read_hello(&mut control_receive, &connection).await.map_err(&ended)?;
        // Control goes first where both have something to send.
        let _ = control_send.set_priority(1);
        Ok(Streams { connection, peer, control: (control_send, control_receive), bulk, politeness })
    };
    match timeout(settings.handshake_timeout, dialled).await {
        Ok(Ok(streams)) => Ok((endpoint, streams)),
        Ok(Err(error)) => {
            // Our alert or close must still go out: the peer's operator wants to know, too.
            let _ = timeout(Duration::from_millis(200), endpoint.wait_idle()).await;
            Err(error)
        }
        Err(_) => Err(TransportError::Unreachable { addr }),
    }
}

/// Accepts a peer and says hello; refuses another protocol version by naming ours.
pub(super) async fn answer(
    node: &Node,
    incoming: quinn::Incoming,
    hello: Hello,
    settings: &Settings,
) -> Result<Answered, TransportError> {
    let addr = incoming.remote_address();
    let politeness = Arc::new(Politeness::default());
    let (config, verifier) = server_config(node, settings, &politeness)?;
    let setup_error = |end| TransportError::from_setup_end(end, addr, node.fingerprint(), verifier.refused());
    let ended = |error| setup_end(error, &setup_error);
    let answered = async {
        let connection =
            incoming.accept_with(Arc::new(config)).map_err(setup_error)?.await.map_err(setup_error)?;
        let (mut control_send, mut control_receive) = connection.accept_bi().await.map_err(setup_error)?;
        let urgent = match read_role(&mut control_receive, &connection).await.map_err(&ended)? {
            Role::Control => false,
            Role::Urgent => true,
            Role::Bulk => return Err(ended(misplaced(&connection, Role::Bulk))),
        };
        let peer = read_hello(&mut control_receive, &connection).await.map_err(&ended)?;
        control_send.write_chunk(greeting(None, hello)?).await.map_err(writing).map_err(&ended)?;
        if urgent {
            let id = read_attach(&mut control_receive, &connection).await.map_err(&ended)?;
            let control = (control_send, control_receive);
            return Ok(Answered::Urgent(
                Streams { connection, peer, control, bulk: Bulk::None, politeness },
                id,
            ));
        }
        let mut bulk = connection.accept_uni().await.map_err(setup_error)?;
        match read_role(&mut bulk, &connection).await.map_err(&ended)? {
            Role::Bulk => {}
            other => return Err(ended(misplaced(&connection, other))),
        }
        let (control, bulk) = ((control_send, control_receive), Bulk::Receive(bulk));
        Ok(Answered::Link(Streams { connection, peer, control, bulk, politeness }))
    };
    timeout(settings.handshake_timeout, answered).await.unwrap_or(Err(TransportError::Slow { addr }))
}

/// The Hello of this build, behind the role of its stream where it opens one.
fn greeting(role: Option<Role>, hello: Hello) -> Result<Bytes, TransportError> {
    let hello: Control = Body::Hello(Hello { version: PROTOCOL_VERSION, ..hello }).into();
    let mut out = BytesMut::new();
    if let Some(role) = role {
        out.put_u8(role as u8);
    }
    out.put(wire::encode(&hello)?);
    Ok(out.freeze())
}

/// Why reading a stream ended: with the connection, or by what was on it.
enum Ended {
    Connection(quinn::ConnectionError),
    Peer(TransportError),
}

fn setup_end(
    ended: Ended,
    setup_error: &impl Fn(quinn::ConnectionError) -> TransportError,
) -> TransportError {
    match ended {
        Ended::Connection(end) => setup_error(end),
        Ended::Peer(error) => error,
    }
}

fn writing(error: WriteError) -> Ended {
    match error {
        WriteError::ConnectionLost(end) => Ended::Connection(end),
        _ => Ended::Peer(TransportError::GaveUp),
    }
}

fn reading(error: ReadExactError) -> Ended {
    match error {
        ReadExactError::ReadError(quinn::ReadError::ConnectionLost(end)) => Ended::Connection(end),
        _ => Ended::Peer(TransportError::Truncated("control")),
    }
}

async fn read_role(stream: &mut RecvStream, connection: &Connection) -> Result<Role, Ended> {
    let mut byte = [0; 1];
    stream.read_exact(&mut byte).await.map_err(reading)?;
    Role::try_from(byte[0]).map_err(|error| reject(connection, error))
}

fn misplaced(connection: &Connection, role: Role) -> Ended {
    reject(connection, WireError::Role(role as u8))
}

/// One short message, while the streams are not yet pumped.
async fn read_message(stream: &mut RecvStream, connection: &Connection) -> Result<Control, Ended> {
    let mut prefix = [0; LENGTH_BYTES];
    stream.read_exact(&mut prefix).await.map_err(reading)?;
    let len = wire::check_length(prefix, MAX_HELLO_BYTES).map_err(|e| reject(connection, e))?;
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).await.map_err(reading)?;
    wire::decode(bytes.into()).map_err(|error| reject(connection, error))
}

async fn read_attach(stream: &mut RecvStream, connection: &Connection) -> Result<MigrationId, Ended> {
    let id = match read_message(stream, connection).await?.message {
        Some(Body::Attach(attach)) => attach.migration_id.parse().ok(),
        _ => None,
    };
    id.ok_or_else(|| reject(connection, WireError::Expected("an Attach with a migration id")))
}

/// Says which migration the connection is for and waits until the other side agrees; under the handshake
/// deadline.
pub(super) async fn attach(
    streams: &mut Streams,
    id: MigrationId,
    settings: &Settings,
) -> Result<(), TransportError> {
    let addr = streams.peer.addr;
    let (send, receive) = &mut streams.control;
    let attach = wire::encode(&Body::Attach(Attach { migration_id: id.to_string() }).into())?;
    let connection = &streams.connection;
    let attached = async {
        send.write_chunk(attach).await.map_err(writing)?;
        match read_message(receive, connection).await?.message {
            Some(Body::Attached(_)) => Ok(()),
            _ => Err(reject(connection, WireError::Expected("Attached"))),
        }
    };
    match timeout(settings.handshake_timeout, attached).await {
        Ok(done) => done.map_err(|ended| setup_end(ended, &TransportError::from_end)),
        Err(_) => Err(TransportError::Slow { addr }),
    }
}

async fn read_hello(stream: &mut RecvStream, connection: &Connection) -> Result<PeerInfo, Ended> {
    let message = read_message(stream, connection).await?;
    let hello = wire::check_hello(message).map_err(|error| reject(connection, error))?;
    Ok(PeerInfo { addr: connection.remote_address(), fingerprint: fingerprint(connection)?, hello })
}

/// Closes the connection for what the peer said, and tells it why.
fn reject(connection: &Connection, error: WireError) -> Ended {
    if let WireError::Version { ours, .. } = error {
        connection.close(code::VERSION, ours.to_string().as_bytes());
    } else {
        connection.close(code::PROTOCOL, error.to_string().as_bytes());
    }
    Ended::Peer(error.into())
}

fn fingerprint(connection: &Connection) -> Result<Fingerprint, Ended> {
    let chain = connection
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<rustls::pki_types::CertificateDer<'_>>>().ok());
    let certificate = chain.as_ref().and_then(|chain| chain.first());
    // TLS has verified it, so it is there.
    certificate.map(Fingerprint::of).ok_or(Ended::Peer(TransportError::GaveUp))
}
