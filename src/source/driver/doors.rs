//! The doors: just before the freeze no new connection can begin, and those that are half open get the time to
//! become whole and to be accepted.
//!
//! Nothing but a handshake can put a connection into the queue of a listening socket, so one that is caught there by
//! the freeze cannot be carried; and a peer in the middle of a handshake, which believes that it is connected, would
//! be reset. The process runs meanwhile. Who asks for a connection waits; its request is kept and put in where the
//! process runs then.

use std::time::{Duration, Instant};

use super::{ActionError, Driver};
use crate::engine::lock;

/// The round trip of a far client, and what the process takes to accept it. Whoever has not finished by then has most
/// likely gone.
const PATIENCE: Duration = Duration::from_millis(200);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);

impl Driver<'_> {
    /// Closes the doors of a process whose connections are carried. The lock opens them again.
    pub(super) fn close_doors(&mut self) -> Result<(), ActionError> {
        if self.state.lock.is_none() {
            return Ok(());
        }
        let inodes = lock::socket_inodes(self.config.pid)?;
        self.keep_requests(&inodes)?;
        let lock = self.state.lock.as_mut().ok_or(ActionError::Order)?;
        let places = lock.close_on_listeners(&inodes)?;
        if places.is_empty() {
            return Ok(());
        }
        let closed = Instant::now();
        let mut left = lock::unfinished(&places)?;
        while left > 0 && closed.elapsed() < PATIENCE {
            std::thread::sleep(PAUSE);
            left = lock::unfinished(&places)?;
        }
        tracing::debug!(left, took = ?closed.elapsed(), "the doors are closed");
        Ok(())
    }
}
