//! What can go wrong between two nodes, and whose doing it was.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use quinn::{ConnectionError, TransportErrorCode};

use super::code;
use super::urgent::RequestError;
use crate::identity::{Fingerprint, IdentityError};
use crate::pageserver::frame::{FrameError, Kind};
use crate::wire::{PROTOCOL_VERSION, WireError};

/// On which side trust is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UntrustedSide {
    /// We do not trust the peer; the fingerprint is the peer's.
    Here,
    /// The peer does not trust us; the fingerprint is ours.
    There,
}

/// Why there is no connection, or no more.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TransportError {
    /// The state directory's files could not be used.
    #[error("read this node's identity or trusted peers")]
    Identity(#[source] Arc<IdentityError>),
    /// Something local failed: a socket, a thread, a runtime.
    #[error("{step}")]
    Local {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: Arc<io::Error>,
    },
    /// TLS could not be configured with our own key and certificate.
    #[error("set up TLS")]
    Tls(#[source] rustls::Error),
    /// QUIC would not even try this address.
    #[error("connect to {addr}")]
    Connect {
        /// The address.
        addr: SocketAddr,
        /// What is wrong with it.
        #[source]
        source: quinn::ConnectError,
    },
    /// Nobody answered.
    #[error("no answer from {addr}: is `migrate serve` running there, and may UDP pass?")]
    Unreachable {
        /// The address.
        addr: SocketAddr,
    },
    /// One of the two nodes does not trust the other.
    #[error("{}", untrusted(*side, *addr, *fingerprint))]
    Untrusted {
        /// The peer's address.
        addr: SocketAddr,
        /// The fingerprint that is not trusted.
        fingerprint: Fingerprint,
        /// By whom.
        side: UntrustedSide,
    },
    /// The peer speaks another protocol version.
    #[error("protocol version {ours} here, {theirs} there: both nodes need the same version of migrate")]
    VersionMismatch {
        /// Our version.
        ours: u32,
        /// The peer's version.
        theirs: u32,
    },
    /// The destination has too many connections being set up.
    #[error("{addr} is busy and takes no more connections now")]
    Busy {
        /// The peer's address.
        addr: SocketAddr,
    },
    /// The peer did not do its part of the set-up in time.
    #[error("{addr} did not complete the handshake in time")]
    Slow {
        /// The peer's address.
        addr: SocketAddr,
    },
    /// The peer sent a control message that breaks the rules.
    #[error("control stream")]
    Wire(#[source] WireError),
    /// The peer sent a frame that breaks the rules.
    #[error("page frames")]
    Frame(#[source] FrameError),
    /// A stream ended in the middle of a message.
    #[error("the peer ended the {0} stream in the middle of a message")]
    Truncated(&'static str),
    /// The peer says that we broke the rules.
    #[error("the peer rejected what was sent: {0}")]
    Rejected(String),
    /// The peer has no use for this connection: it knows no such migration of ours.
    #[error("the peer refused the connection: {0}")]
    Refused(String),
    /// A newer connection for the same migration took this one's place.
    #[error("a newer connection took its place")]
    Replaced,
    /// A frame that belongs on another stream.
    #[error("a {0:?} frame where single pages belong")]
    Misplaced(Kind),
    /// The peer asked for pages in a way that breaks the rules.
    #[error("requests")]
    Request(#[source] RequestError),
    /// The peer closed the connection after the last message, in good order.
    #[error("the peer has finished")]
    Finished,
    /// The peer closed the connection without having finished.
    #[error("the peer gave up the connection")]
    GaveUp,
    /// This side has closed the connection.
    #[error("the connection is closed")]
    Closed,
    /// The connection broke: nothing heard for too long, or QUIC itself failed.
    #[error("connection lost")]
    Lost(#[source] ConnectionError),
}

fn untrusted(side: UntrustedSide, addr: SocketAddr, fingerprint: Fingerprint) -> String {
    let command = format!("migrate trust add NAME {fingerprint}");
    match side {
        UntrustedSide::Here => {
            format!("{addr} ({fingerprint}) is not trusted by this node; to trust it, run here: {command}")
        }
        UntrustedSide::There => {
            format!("this node ({fingerprint}) is not trusted by {addr}; to be trusted, run there: {command}")
        }
    }
}

impl TransportError {
    /// Whether trying again later may help: nothing was said about who we are or what we sent.
    pub fn is_loss(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::Busy { .. } | Self::Slow { .. } | Self::Lost(_) | Self::GaveUp
        )
    }

    pub(super) fn local(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Local { step, source: Arc::new(source) }
    }

    /// What the end of an established connection means.
    pub(super) fn from_end(end: ConnectionError) -> Self {
        match end {
            ConnectionError::ApplicationClosed(close) => match close.error_code {
                code::DONE => Self::Finished,
                code::VERSION => version_from(&close.reason),
                code::REFUSED => Self::Refused(String::from_utf8_lossy(&close.reason).into_owned()),
                code::REPLACED => Self::Replaced,
                code::PROTOCOL => Self::Rejected(String::from_utf8_lossy(&close.reason).into_owned()),
                _ => Self::GaveUp,
            },
            ConnectionError::LocallyClosed => Self::Closed,
            other => Self::Lost(other),
        }
    }

    /// What the end of a connection that is still being set up means. `refused` is the fingerprint that our
    /// verifier refused, `own` our own.
    pub(super) fn from_setup_end(
        end: ConnectionError,
        addr: SocketAddr,
        own: Fingerprint,
        refused: Option<Fingerprint>,
    ) -> Self {
        if let (ConnectionError::TransportError(_), Some(fingerprint)) = (&end, refused) {
            return Self::Untrusted { addr, fingerprint, side: UntrustedSide::Here };
        }
        match end {
            ConnectionError::ConnectionClosed(close) if close.error_code == access_denied() => {
                Self::Untrusted { addr, fingerprint: own, side: UntrustedSide::There }
            }
            ConnectionError::ConnectionClosed(close)
                if close.error_code == TransportErrorCode::CONNECTION_REFUSED =>
            {
                Self::Busy { addr }
            }
            ConnectionError::TimedOut => Self::Unreachable { addr },
            other => Self::from_end(other),
        }
    }
}

impl From<WireError> for TransportError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Version { ours, theirs } => Self::VersionMismatch { ours, theirs },
            other => Self::Wire(other),
        }
    }
}

/// The alert that a refused fingerprint gives, as a QUIC error.
fn access_denied() -> TransportErrorCode {
    TransportErrorCode::crypto(u8::from(rustls::AlertDescription::AccessDenied))
}

fn version_from(reason: &[u8]) -> TransportError {
    match std::str::from_utf8(reason).ok().and_then(|text| text.parse().ok()) {
        Some(theirs) => TransportError::VersionMismatch { ours: PROTOCOL_VERSION, theirs },
        None => TransportError::Rejected("another protocol version".to_owned()),
    }
}
