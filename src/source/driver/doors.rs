//! The doors: just before the freeze no new connection can begin, and those that are half open get the time to
//! become whole and to be accepted.
//!
//! A peer in the middle of a handshake, or one that is connected and only waits to be accepted, can be carried, but a
//! connection that the process has accepted costs less: it gets a moment for that. The process runs meanwhile. Who asks for a connection waits; its request is kept and put in where
//! the process runs then.

use std::time::{Duration, Instant};

use super::{ActionError, Driver};
use crate::engine::handshake::Reader;
use crate::engine::lock::{self, Connection};
use crate::engine::state::files::EarlyLook;

/// The round trip of a client that is not far: for one that is complete nothing has to be done.
const ROUND_TRIP: Duration = Duration::from_millis(50);
/// The round trip of a far client, and what the process takes to accept it, where handshakes cannot be taken along. Whoever
/// has not finished by then has most likely gone.
const PATIENCE: Duration = Duration::from_millis(200);
/// What the process gets to accept those that are whole, where they can be carried.
const MOMENT: Duration = Duration::from_millis(20);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);

impl Driver<'_> {
    /// Closes the doors of a process whose connections are carried. The lock opens them again.
    pub(super) fn close_doors(&mut self) -> Result<(), ActionError> {
        if self.state.lock.is_none() {
            return Ok(());
        }
        let inodes = lock::socket_inodes(self.config.pid)?;
        let lasting = self.lasting.among(&inodes);
        self.state.early = EarlyLook::at(self.config.pid, &inodes, &lasting);
        self.make_ahead()?;
        self.keep_requests(&inodes)?;
        let lock = self.state.lock.as_mut().ok_or(ActionError::Order)?;
        let places = lock.close_on_listeners(&inodes)?;
        if !places.is_empty() {
            if let Some(reader) = self.wait_for_unfinished(&places)? {
                self.read_handshakes(&reader);
            }
            // A server that sets options sets them when it accepts: from here on that is over.
            if let Some(early) = self.state.early.take_if(|early| !early.holds()) {
                self.state.early = early.again(self.config.pid, &lasting);
            }
        }
        // What is known of its connections now need not be asked for in the freeze.
        let own = self.state.early.as_ref().and_then(EarlyLook::own_sockets);
        if let (Some(own), Some(lock)) = (own, self.state.lock.as_mut()) {
            lock.look_for_others(&own.connections)?;
        }
        Ok(())
    }

    /// With what reads handshakes that are left, if they can be taken along.
    fn wait_for_unfinished(&self, places: &[Connection]) -> Result<Option<Reader>, ActionError> {
        let closed = Instant::now();
        let for_queued = if self.state.takes_queued { MOMENT } else { PATIENCE };
        let mut reader = None;
        let left = loop {
            let left = lock::unfinished(places)?;
            if left.half_open + left.unanswered > 0 {
                reader.get_or_insert_with(|| self.handshake_reader());
            }
            let for_half_open = if matches!(reader, Some(Some(_))) { ROUND_TRIP } else { PATIENCE };
            let waited = closed.elapsed();
            if (left.half_open == 0 || waited >= for_half_open) && (left.queued == 0 || waited >= for_queued)
            {
                break left;
            }
            std::thread::sleep(PAUSE);
        };
        tracing::debug!(?left, took = ?closed.elapsed(), "the doors are closed");
        Ok(reader.flatten().filter(|_| left.half_open + left.unanswered > 0))
    }
}
