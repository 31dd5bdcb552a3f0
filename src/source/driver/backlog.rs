//! Connections that wait to be accepted cannot be carried: nothing but a handshake can put one into the
//! queue of a listening socket. Nor can those that have ended with an error or with input that the process
//! has not noticed yet. So it gets a moment to do so, with its addresses gone, so that no new ones come.
//! What it leaves is refused by name.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{ActionError, Driver, FREEZE_PATIENCE};
use crate::engine::capture::CaptureError;
use crate::engine::freeze::Frozen;
use crate::engine::state::files;

/// How long the process may take. It is off the network meanwhile.
const PATIENCE: Duration = Duration::from_millis(50);
/// Between two looks.
const PAUSE: Duration = Duration::from_micros(200);

impl Driver<'_> {
    /// Lets the frozen process run until it has taken what waits for it, if something does.
    pub(super) fn settle_connections(&mut self) -> Result<(), ActionError> {
        if !self.config.tcp_established {
            return Ok(());
        }
        let waiting = files::unsettled(self.pid()).map_err(CaptureError::from)?;
        if waiting.is_empty() {
            return Ok(());
        }
        tracing::info!(sockets = waiting.len(), "connections wait: the process runs on for a moment");
        self.state.frozen.take().ok_or(ActionError::Order)?.thaw()?;
        let deadline = Instant::now() + PATIENCE;
        while waiting.iter().any(|fd| files::is_unsettled(fd.as_fd())) && Instant::now() < deadline {
            std::thread::sleep(PAUSE);
        }
        // Before the freeze: what the process has closed is closed only now.
        drop(waiting);
        self.state.sleeps.look(self.config.pid);
        let frozen = Frozen::freeze(self.pid(), FREEZE_PATIENCE)?;
        self.state.sleeps.note(frozen.threads());
        self.state.frozen = Some(frozen);
        Ok(())
    }
}
