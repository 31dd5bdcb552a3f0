//! The incoming side, behind `migrate serve`.
//!
//! [`serve()`] accepts connections; each migration has a thread, on which `driver` performs what [`machine`]
//! decides: frames become a skeleton ([`assemble`]), the skeleton a process.

pub mod assemble;
mod drain;
mod driver;
mod frames;
pub mod guardian;
mod handshakes;
pub mod machine;
mod network;
mod preflight;
pub mod protocol;
mod queued;
mod reaper;
mod recover;
mod serve;
mod steps;
mod strays;
mod wire;

pub use serve::{ServeError, serve};
