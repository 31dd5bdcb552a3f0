//! The pages of a migration on their way: packed into frames at the source, unpacked at the destination,
//! in memory only.
//!
//! - [`frame`]: what a frame is, its header, and the strict decoder.
//! - [`pack`]: page contents to frames: zero runs, batches of up to 16 pages, compression where it pays.
//! - [`unpack`]: a received frame to runs of pages.
//! - [`runs`]: lists of page runs without contents.

pub mod frame;
pub mod pack;
pub mod runs;
pub mod unpack;

mod compress;
pub(crate) mod pool;

#[cfg(test)]
#[allow(clippy::panic)]
mod tests;
