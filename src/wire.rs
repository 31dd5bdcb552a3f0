//! Control messages: their sequence, their framing, their limits.
//!
//! One connection carries one migration. The source opens it with two streams: control (both ways, messages
//! of `proto/control.proto`, each behind a u32 little-endian length) and bulk (source to destination, frames
//! of `pageserver::frame`). Each stream starts with one byte that names its role.
//!
//! ```text
//! source                                       destination
//!   | -- Hello ------------------------------->  |   version first, both ways
//!   | <------------------------------- Hello --  |
//!   | -- Begin ------------------------------->  |   identity of the process, what it needs there
//!   | <-------------------- Ready | Refused ---  |   all reasons at once; Ready: the skeleton exists
//!   | == Layout, Data, Zero, Drop, RoundEnd ==>  |   bulk, while the process runs
//!   | <------------------------- RoundPlaced --  |   the pages of the round are where they belong
//!   |        ... rounds ...                      |
//!   | == Ahead ===============================>  |   bulk; connections that do nothing, if there are many
//!   | <--------------------------- MadeAhead --  |   their sockets exist; not waited for long
//!   |   freeze                                   |
//!   | == last round, State ===================>  |
//!   | <---------------------------- Prepared --  |   all state applied, threads stopped
//!   | -- Commit ------------------------------>  |   the right to run goes over, and late signals
//!   | -- Strays ------------------------------>  |   segments that came for the process since the freeze
//!   | <--------------------------- Committed --  |   recorded there; the process runs there
//!   | -- Strays ------------------------------>  |   and those that came since then, if any
//!   | -- Queued ------------------------------>  |   connections that it has not accepted yet, if any
//!   | -- Confirm ----------------------------->  |   the source has let go
//!
//! at any time before Commit:   -- Abort --> or <-- Abort --   both forget the migration
//! on any later connection:     -- Query -->    <-- Answer --  who holds the right to run
//! ```
//!
//! Beside it there may be a connection for single pages, which opens one stream only:
//!
//! ```text
//!   | -- Hello, Attach ----------------------->  |   which migration it is for
//!   | <--------------------- Hello, Attached --  |
//!   | <=========================== requests ===  |   see `transport::urgent`
//!   | == frames ==============================>  |
//! ```
//!
//! The state rule: the right to run has one holder. The source holds it until it sends Commit and cannot
//! thaw the process after that unless an Answer says that the destination never accepted; the destination
//! holds it from the moment it has recorded the Commit. A message that the receiver's state does not know is
//! an error that names both, and before Commit it aborts the migration.
//!
//! Versions: the first message either way is a Hello with the sender's protocol version. Versions must be
//! equal; the one who finds them different closes with both named.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

pub use crate::proto::control::control::Message as Body;
pub use crate::proto::control::{Control, Hello};

/// The protocol version that this build speaks.
pub const PROTOCOL_VERSION: u32 = 6;
/// Largest control message.
pub const MAX_CONTROL_BYTES: usize = 64 << 20;
/// Largest first message: nothing is known about the peer's software yet.
pub const MAX_HELLO_BYTES: usize = 64 << 10;
/// Bytes of the length before a control message.
pub const LENGTH_BYTES: usize = 4;

/// What a stream is for: its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// Control messages, both ways.
    Control = 1,
    /// Page frames from the source.
    Bulk = 2,
    /// Single pages: after the Hellos and an Attach, requests one way and frames the other. Stands in the
    /// place of the control stream; such a connection has no other.
    Urgent = 3,
}

impl TryFrom<u8> for Role {
    type Error = WireError;

    fn try_from(byte: u8) -> Result<Self, WireError> {
        match byte {
            1 => Ok(Self::Control),
            2 => Ok(Self::Bulk),
            3 => Ok(Self::Urgent),
            other => Err(WireError::Role(other)),
        }
    }
}

/// A message that breaks the rules of this module.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum WireError {
    /// A stream of no known role.
    #[error("stream of unknown role {0}")]
    Role(u8),
    /// A message longer than allowed.
    #[error("control message of {len} bytes, the limit is {limit}")]
    TooLong {
        /// Its length.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// Bytes that are no message.
    #[error("control message cannot be decoded")]
    Decode(#[source] prost::DecodeError),
    /// A message of a kind that this version does not know.
    #[error("control message of unknown kind")]
    Unknown,
    /// Something else came where a Hello belongs.
    #[error("the first message is not a Hello")]
    NoHello,
    /// Another message than the sequence asks for.
    #[error("the message should be {0}")]
    Expected(&'static str),
    /// The peer speaks another version.
    #[error("protocol version {ours} here, {theirs} there: both nodes need the same version of migrate")]
    Version {
        /// Our version.
        ours: u32,
        /// The peer's version.
        theirs: u32,
    },
}

/// A message with its length in front, ready for the control stream.
///
/// # Errors
/// [`WireError::TooLong`].
pub fn encode(message: &Control) -> Result<Bytes, WireError> {
    let len = message.encoded_len();
    let too_long = WireError::TooLong { len, limit: MAX_CONTROL_BYTES };
    let prefix = u32::try_from(len).ok().filter(|_| len <= MAX_CONTROL_BYTES).ok_or(too_long)?;
    let mut out = BytesMut::with_capacity(LENGTH_BYTES + len);
    out.put_u32_le(prefix);
    // Cannot fail: there is room for `encoded_len`.
    message.encode_raw(&mut out);
    Ok(out.freeze())
}

/// The length that a prefix announces, if it is within `limit`.
///
/// # Errors
/// [`WireError::TooLong`].
pub fn check_length(prefix: [u8; LENGTH_BYTES], limit: usize) -> Result<usize, WireError> {
    let len = usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX);
    if len > limit { Err(WireError::TooLong { len, limit }) } else { Ok(len) }
}

/// Decodes a message (without its length). The body is there, of a kind we know.
///
/// # Errors
/// [`WireError::Decode`], [`WireError::Unknown`].
pub fn decode(bytes: Bytes) -> Result<Control, WireError> {
    let message = Control::decode(bytes).map_err(WireError::Decode)?;
    if message.message.is_none() { Err(WireError::Unknown) } else { Ok(message) }
}

/// Takes the first message of a connection apart.
///
/// # Errors
/// [`WireError::NoHello`], [`WireError::Version`].
pub fn check_hello(message: Control) -> Result<Hello, WireError> {
    match message.message {
        Some(Body::Hello(hello)) if hello.version == PROTOCOL_VERSION => Ok(hello),
        Some(Body::Hello(hello)) => Err(WireError::Version { ours: PROTOCOL_VERSION, theirs: hello.version }),
        _ => Err(WireError::NoHello),
    }
}

impl From<Body> for Control {
    fn from(body: Body) -> Self {
        Self { message: Some(body) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::proto::control::{Abort, Reason};
    use proptest::prelude::*;

    fn abort() -> Control {
        let reasons =
            vec![Reason { object: "fd 5".into(), why: "is odd".into(), remedy: "close it".into() }; 100];
        Body::Abort(Abort { migration_id: "m".into(), reasons }).into()
    }

    #[test]
    fn a_message_comes_back() {
        let mut bytes = encode(&abort()).unwrap();
        let prefix = bytes.split_to(LENGTH_BYTES);
        let len = check_length(prefix[..].try_into().unwrap(), MAX_CONTROL_BYTES).unwrap();
        assert_eq!(len, bytes.len());
        assert_eq!(decode(bytes).unwrap(), abort());
    }

    #[test]
    fn a_cut_message_is_an_error_or_another_message_but_no_panic() {
        let bytes = encode(&abort()).unwrap().slice(LENGTH_BYTES..);
        for end in 0..bytes.len() {
            assert_ne!(decode(bytes.slice(..end)).ok(), Some(abort()));
        }
    }

    #[test]
    fn lengths_beyond_the_limit_are_refused() {
        assert!(check_length((64u32 << 20).to_le_bytes(), MAX_CONTROL_BYTES).is_ok());
        let over = WireError::TooLong { len: (64 << 20) + 1, limit: MAX_CONTROL_BYTES };
        assert_eq!(check_length(((64u32 << 20) + 1).to_le_bytes(), MAX_CONTROL_BYTES), Err(over));
    }

    #[test]
    fn other_versions_are_refused_with_both_named() {
        let hello = |version| Body::Hello(Hello { version, ..Hello::default() }).into();
        assert!(check_hello(hello(PROTOCOL_VERSION)).is_ok());
        let text = check_hello(hello(7)).unwrap_err().to_string();
        assert!(text.contains("version 6 here, 7 there"), "{text}");
        assert_eq!(check_hello(abort()), Err(WireError::NoHello));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode(Bytes::from(bytes));
        }
    }
}
