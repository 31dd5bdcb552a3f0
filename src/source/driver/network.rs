//! The network of the process: taken away at the freeze, given back if the process stays.

use std::time::Instant;

use super::{ActionError, Driver};
use crate::engine::hook::{self, Stage};
use crate::engine::reason::{Reason, chain};
use crate::engine::state::files;
use crate::journal::OutgoingState;
use crate::report::PhaseClock;
use crate::source::protocol::Outcome;

impl Driver<'_> {
    /// The hooks that may still say no while the process runs.
    pub(super) fn before_the_freeze(&mut self, clock: &mut PhaseClock) -> Result<(), ActionError> {
        if !self.hooks.is_empty() {
            clock.begin("hooks");
            self.hooks.run(Stage::PreFreeze, &self.about())?;
        }
        self.refuse_orphans_early()?;
        self.prepare_strays();
        self.close_doors()
    }

    /// Nobody reaches the process from here on. The record comes first: whoever puts things right after us acts
    /// upon it, also where connections were being read.
    pub(super) fn take_network(&mut self, clock: &mut PhaseClock) -> Result<(), ActionError> {
        if self.state.addresses.is_none() && self.state.lock.is_none() && self.hooks.is_empty() {
            return Ok(());
        }
        clock.begin("addresses");
        self.refuse_orphans_left()?;
        self.record_taking()?;
        self.keep_strays();
        if let Some(addresses) = self.state.addresses.as_mut() {
            addresses.remove()?;
            self.state.taken = true;
        }
        if self.state.lock.is_some() {
            clock.begin("lock");
            self.lock_connections()?;
        }
        if !self.hooks.is_empty() {
            clock.begin("hooks");
            self.state.unlock_due = true;
            let asked = Instant::now();
            self.hooks.run(Stage::NetworkLock, &self.about())?;
            tracing::debug!(took = ?asked.elapsed(), "network-lock hooks");
        }
        Ok(())
    }

    /// To be repeated when the process has run meanwhile: signal masks are in it.
    pub(super) fn record_taking(&mut self) -> Result<(), ActionError> {
        if self.state.lock.is_some() {
            // For whoever finds a fence around it: see `engine::capture`.
            self.state.was_stopped = self.state.frozen.as_ref().ok_or(ActionError::Order)?.stop_is_due()?;
        }
        Ok(self.record(OutgoingState::Taking)?)
    }

    /// The process goes on here, with all that it had. What fails is reported and changes nothing.
    pub(super) fn return_network(&mut self) {
        if self.state.taken
            && let Some(addresses) = self.state.addresses.as_mut()
            && let Err(error) = addresses.add()
        {
            tracing::error!(error = &error as &dyn std::error::Error, "giving addresses back");
            self.state.reasons.push(Reason::new("addresses", chain(&error), "add them by hand"));
        }
        self.state.taken = false;
        if std::mem::take(&mut self.state.unlock_due)
            && let Err(error) = self.hooks.run(Stage::NetworkUnlock, &self.about())
        {
            tracing::error!(error = &error as &dyn std::error::Error, "a hook");
            self.state.reasons.push(Reason::new(
                "--hook",
                chain(&error),
                "do by hand what it should have done",
            ));
        }
        if let Some(lock) = self.state.lock.as_mut()
            && let Err(error) = lock.release()
        {
            // The end of its socket lifts it as well.
            tracing::warn!(error = &error as &dyn std::error::Error, "the lock");
        }
        self.give_strays_back();
    }

    /// Removes the lock, which takes longer than lifting it. Not while somebody waits.
    pub(super) fn forget_lock(&mut self) {
        if let Some(lock) = self.state.lock.take()
            && let Err(error) = lock.remove()
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "the lock");
        }
    }

    /// The process runs at the destination: nothing here has anything to say to its peers any more, but to those
    /// whose connections were given up. May be called again.
    pub(super) fn leave_network(&mut self) {
        files::drop_silently(std::mem::take(&mut self.state.carried));
        self.forget_strays();
        self.forget_lock();
        files::close_peers(std::mem::take(&mut self.state.closing));
        if self.state.resumed.is_none() {
            self.state.resumed = Some(self.hooks.begin(Stage::PostResume, &self.about()));
        }
    }

    /// The hooks' last word. A move that never began was not tried, and did not fail.
    pub(super) fn tell_the_end(&mut self, outcome: &Outcome) {
        let resumed = self.state.resumed.take().map_or(Ok(()), hook::Running::finish);
        let began = self.state.journal.is_some();
        let failed = match outcome {
            Outcome::NotMoved(_) | Outcome::Lost(_) if began => self.hooks.run(Stage::Failed, &self.about()),
            _ => Ok(()),
        };
        for error in [resumed, failed].into_iter().filter_map(Result::err) {
            tracing::error!(error = &error as &dyn std::error::Error, "a hook");
            self.report.notes.push(Reason::new("--hook", chain(&error), ""));
        }
    }

    fn about(&self) -> hook::About {
        hook::About {
            id: self.id.to_string(),
            pid: self.process.pid,
            side: "source",
            destination: self.config.to.to_string(),
        }
    }
}
