//! What operators see of running migrations, and how they step in: `migrate status`, `cancel`, `postcopy`.
//!
//! A `migrate --to` and a `migrate serve` each keep a [`Board`] on which their migrations write how far they
//! are, and from which they read what the operator wants. A [`Listener`] answers for the board on a unix socket
//! below the state directory (`place`); [`client`] asks all sockets there, and the journal for what has no
//! socket any more. Nothing of this can hurt a migration: without a socket it goes on unseen.

mod board;
pub mod client;
mod listener;
mod meter;
mod place;
pub mod protocol;
pub mod table;

pub use board::{About, Board, End, Orders, Posting};
pub use listener::Listener;
