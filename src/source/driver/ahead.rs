//! Connections that do nothing, told to the destination just before the freeze: it makes their sockets while the process
//! is stopped and read here. The state tells all of them again, so that nothing depends on what is told.

use bytes::Bytes;

use super::{ActionError, Driver};
use crate::engine::state::files::MOST_AHEAD;

/// Fewer are made as fast when the state comes.
const WORTH_IT: usize = 100;

impl Driver<'_> {
    /// Tells what was seen of them, if there are many.
    pub(super) fn tell_ahead(&mut self) -> Result<(), ActionError> {
        let (Some(early), Some(link)) = (&self.state.early, &self.link) else { return Ok(()) };
        let Some(precopy) = self.state.precopy.as_mut() else { return Ok(()) };
        let mut ahead = early.quiet_connections();
        ahead.connections.truncate(MOST_AHEAD);
        if ahead.connections.len() < WORTH_IT {
            return Ok(());
        }
        let round = u32::try_from(self.report.rounds.len() + 1).unwrap_or(u32::MAX);
        let (sender, posting) = (link.sender(), &self.posting);
        let mut sink = |bytes: Bytes| {
            posting.carried(bytes.len() as u64);
            sender.send_frame_blocking(bytes)
        };
        tracing::debug!(count = ahead.connections.len(), "connections are told ahead");
        Ok(precopy.send_ahead(round, &ahead, &mut sink)?)
    }
}
