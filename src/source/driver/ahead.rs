//! Connections that do nothing, told to the destination just before the freeze: it makes their sockets before the process
//! is stopped. The state tells all of them again, so that nothing depends on what is told.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{ActionError, Driver};
use crate::engine::state::files::MOST_AHEAD;
use crate::transport::Incoming;
use crate::wire::{Body, Control};

/// Fewer are made as fast when the state comes.
const WORTH_IT: usize = 100;
/// How long the destination may take to make them. The process runs and writes meanwhile; after that it stops, and the
/// destination goes on.
const PATIENCE: Duration = Duration::from_millis(20);
const PATIENCE_EACH: Duration = Duration::from_micros(25);

/// Whether this is the destination's word that it has made them. It may come after we have stopped waiting.
pub(super) fn is_made(message: &Control) -> bool {
    matches!(message.message, Some(Body::MadeAhead(_)))
}

impl Driver<'_> {
    /// Tells what was seen of them, if there are many, and waits until their sockets are there.
    pub(super) fn make_ahead(&mut self) -> Result<(), ActionError> {
        let (Some(early), Some(link)) = (&self.state.early, &self.link) else { return Ok(()) };
        let Some(precopy) = self.state.precopy.as_mut() else { return Ok(()) };
        let mut ahead = early.quiet_connections();
        ahead.connections.truncate(MOST_AHEAD);
        let count = ahead.connections.len();
        if count < WORTH_IT {
            return Ok(());
        }
        let round = u32::try_from(self.report.rounds.len() + 1).unwrap_or(u32::MAX);
        let (sender, posting) = (link.sender(), &self.posting);
        let mut sink = |bytes: Bytes| {
            posting.carried(bytes.len() as u64);
            sender.send_frame_blocking(bytes)
        };
        precopy.send_ahead(round, &ahead, &mut sink)?;
        let began = Instant::now();
        let patience = PATIENCE + PATIENCE_EACH * u32::try_from(count).unwrap_or(u32::MAX);
        let made = self.await_made(began + patience)?;
        tracing::debug!(count, made, took = ?began.elapsed(), "connections are told ahead");
        Ok(())
    }

    /// What else comes is kept for whoever waits for it. Without a destination there is no reason to stop the process.
    fn await_made(&mut self, limit: Instant) -> Result<bool, ActionError> {
        while let Some(link) = self.link.as_mut() {
            match link.recv_timeout(limit.saturating_duration_since(Instant::now())) {
                Some(Incoming::Control(message)) if is_made(&message) => return Ok(true),
                Some(Incoming::Frame(_)) => {}
                Some(Incoming::Lost(error)) => return Err(error.into()),
                Some(other @ Incoming::Control(_)) => {
                    self.state.unread.push_back(other);
                    break;
                }
                None => break,
            }
        }
        Ok(false)
    }
}
