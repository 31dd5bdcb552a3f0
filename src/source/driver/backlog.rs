//! The lock on the connections of the frozen process, and those that it has to take before.
//!
//! Connections that have ended with an error or with input that the process has not noticed yet cannot be carried; nor,
//! where the destination cannot put them into a queue, those that wait to be accepted. So the process gets a moment to
//! take them, while no new ones can begin. What it leaves is refused by name.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::{ActionError, Driver, FREEZE_PATIENCE};
use crate::engine::capture::CaptureError;
use crate::engine::queued;
use crate::engine::state::files::{self, Descriptors};

/// How long the process may take. It is off the network meanwhile.
const PATIENCE: Duration = Duration::from_millis(50);
/// Between two looks.
const PAUSE: Duration = Duration::from_micros(200);

impl Driver<'_> {
    /// Locks all connections that the frozen process has, and where it listens.
    pub(super) fn lock_connections(&mut self) -> Result<(), ActionError> {
        let mut descriptors = self.lock_descriptors()?;
        // Not before: now no handshake can be completed any more.
        let mut waiting = files::unsettled(&descriptors);
        if self.carries_queued() {
            waiting.retain(|fd| !files::is_listening(fd.as_fd()));
        }
        if !waiting.is_empty() {
            // What the process closes meanwhile must not be held open by us.
            drop(descriptors);
            self.let_run(waiting)?;
            descriptors = self.lock_descriptors()?;
        }
        if !self.carries_queued() {
            self.state.reasons.extend(self.state.against_queued.iter().cloned());
        }
        self.state.descriptors = Some(descriptors);
        Ok(())
    }

    fn lock_descriptors(&mut self) -> Result<Descriptors, ActionError> {
        let pid = self.pid();
        let lock = self.state.lock.as_mut().ok_or(ActionError::Order)?;
        let (mut descriptors, locked) = match self.state.early.as_ref() {
            None => {
                let descriptors = Descriptors::take(pid).map_err(CaptureError::from)?;
                let locked = lock.close_on_process(&descriptors.socket_inodes())?;
                (descriptors, locked)
            }
            // The kernel locks on one processor, and the descriptors are taken on the others.
            Some(early) => std::thread::scope(|scope| {
                let take = || Descriptors::take(pid);
                let taking = std::thread::Builder::new().name("descriptors".into()).spawn_scoped(scope, take);
                let taking = taking.map_err(ActionError::Thread)?;
                let own = early.own_sockets();
                let locked = own.as_ref().map(|own| lock.close_on_own(own)).transpose()?;
                let descriptors = match taking.join() {
                    Ok(descriptors) => descriptors.map_err(CaptureError::from)?,
                    Err(panic) => std::panic::resume_unwind(panic),
                };
                let all = descriptors.socket_inodes();
                let is_all = own.is_some_and(|own| all.is_subset(&own.inodes));
                let locked = match locked.filter(|_| is_all) {
                    Some(locked) => locked,
                    None => lock.close_on_process(&all)?,
                };
                Ok::<_, ActionError>((descriptors, locked))
            })?,
        };
        tracing::debug!(count = locked.all.len(), queued = locked.queued.len(), "connections are locked");
        self.state.against_queued = queued::against(&locked);
        self.state.queued = locked.queued;
        self.lock_handshakes(locked.half_open, &locked.all);
        self.expect_strays(locked.all);
        if let Some(early) = &self.state.early {
            descriptors.glance(early);
        }
        Ok(descriptors)
    }

    /// Lets the frozen process run until it has taken what waits for it.
    fn let_run(&mut self, waiting: Vec<OwnedFd>) -> Result<(), ActionError> {
        tracing::info!(sockets = waiting.len(), "connections wait: the process runs on for a moment");
        self.state.frozen.take().ok_or(ActionError::Order)?.thaw()?;
        let deadline = Instant::now() + PATIENCE;
        while waiting.iter().any(|fd| files::is_unsettled(fd.as_fd())) && Instant::now() < deadline {
            std::thread::sleep(PAUSE);
        }
        // Before the freeze: what the process has closed is closed only now.
        drop(waiting);
        let frozen = self.state.sleeps.freeze(self.config.pid, FREEZE_PATIENCE)?;
        self.state.frozen = Some(frozen);
        self.refuse_orphans_left()?;
        self.record_taking()
    }
}
