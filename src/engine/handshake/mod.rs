//! Handshakes that are half open: the peer has asked for a connection, the kernel has answered, and the peer's word that
//! it has heard that is missing.
//!
//! The peer may have got the answer: then it believes that it is connected, with the sequence numbers that the answer
//! named. So they are taken along ([`Reader`]), and held where the process runs then ([`Held`]): the answer is repeated to
//! a peer that asks for it, or says nothing. When its word comes, the connection is put into the queue of the socket that
//! listens ([`crate::engine::queued`]), and goes on like any other.

mod hold;
mod read;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests;

pub use hold::{Heard, Held};
pub use read::{ReadError, Reader};

/// Most that are taken along for one process: peers that ask for connections and want none come by the thousand.
pub const MOST: usize = 256;
