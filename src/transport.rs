//! QUIC between two nodes: mutual TLS 1.3, one control stream, one bulk stream.
//!
//! A [`Link`] is one connection, used from blocking threads; its network side lives in a task of a tokio
//! runtime. The source gets one from [`connect`], which runs it on an OS thread of its own named `net` with a
//! current-thread runtime (the fastest arrangement); the destination from [`Server::accept`].
//!
//! Bytes in flight are bounded: what the source has handed over but not sent, what QUIC has sent but not seen
//! acknowledged, and what the destination has received but not placed, each have a limit, and whoever runs
//! into one waits.
//!
//! While a process waits for single pages, they travel on a connection of their own ([`urgent`]), and the
//! bulk is told to be polite ([`LinkSender::set_polite`]): it then keeps no more bytes on the way than delay
//! others by half a millisecond.
//!
//! A peer that is not trusted gets nothing: the TLS handshake fails on the side that does not trust, before
//! any stream exists (see `tls`). Peers that are slow, stuck or hostile meet deadlines and limits and never
//! hold up the acceptance of others.

mod budget;
mod error;
mod link;
mod polite;
mod pump;
mod server;
mod setup;
mod socket;
mod tls;
pub mod urgent;

use std::net::SocketAddr;
use std::time::Duration;

pub use error::{TransportError, UntrustedSide};
pub use link::{Incoming, Link, LinkSender, connect};
pub use server::{Failed, Server};

/// What can be chosen about connections.
#[derive(Debug, Clone)]
pub struct Settings {
    /// A connection on which nothing was heard for so long is lost.
    pub idle_timeout: Duration,
    /// A peer that has not completed the handshake and its Hello by then is given up.
    pub handshake_timeout: Duration,
    /// Most bytes per second of bulk data; `None`: as fast as it goes.
    pub bandwidth: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            bandwidth: None,
        }
    }
}

/// Who is at the other end.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// Its address.
    pub addr: SocketAddr,
    /// What it is known by.
    pub fingerprint: crate::identity::Fingerprint,
    /// Its first message.
    pub hello: crate::wire::Hello,
}

/// Codes with which a connection is closed.
mod code {
    use quinn::VarInt;

    /// Everything was received; the receiver of the last message closes with this.
    pub(super) const DONE: VarInt = VarInt::from_u32(1);
    /// The other side gave up. 0, because that is also what QUIC sends for a handle that was just dropped.
    pub(super) const GAVE_UP: VarInt = VarInt::from_u32(0);
    /// Another protocol version; the reason is our version in decimal.
    pub(super) const VERSION: VarInt = VarInt::from_u32(2);
    /// A message or frame that breaks the rules; the reason says which.
    pub(super) const PROTOCOL: VarInt = VarInt::from_u32(3);
    /// A connection that nobody here waits for; the reason says why.
    pub(super) const REFUSED: VarInt = VarInt::from_u32(4);
    /// A newer connection has taken this one's place.
    pub(super) const REPLACED: VarInt = VarInt::from_u32(5);
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod quiet_tests;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_precision_loss)]
pub(crate) mod tests;
