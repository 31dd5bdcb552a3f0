//! The actions of post-copy.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::{ActionError, Driver, ordered};
use crate::config::Mode;
use crate::engine::freeze::Frozen;
use crate::engine::reason::{Reason, chain};
use crate::journal::OutgoingState;
use crate::operator::protocol::Phase;
use crate::pageserver::runs;
use crate::proto::control::DrainStats;
use crate::report::{Latency, PhaseClock};
use crate::source::policy::{self, Order};
use crate::source::postcopy::Store;
use crate::source::precopy::Go;
use crate::source::protocol::Event;
use crate::source::serving::{News, Serving};

impl Driver<'_> {
    /// Whatever may follow after the resume needs a connection for single pages: without it nothing follows.
    pub(super) fn prepare_service(&mut self) -> Result<(), ActionError> {
        if self.config.mode == Mode::Precopy && !self.posting.orders().postcopy() {
            // An order for post-copy may still come: then it is tried again.
            return Ok(());
        }
        self.start_service()
    }

    fn start_service(&mut self) -> Result<(), ActionError> {
        if self.state.serving.is_some() {
            return Ok(());
        }
        let store = Arc::new(Store::open(self.pid(), self.config.compression)?);
        let mut serving = Serving::new(store, self.node.clone(), self.hello.clone(), self.id);
        let link = self.link.as_ref().ok_or(ActionError::Order)?;
        match serving.answer(link, self.state.urgent_port) {
            Ok(true) => {}
            Ok(false) => self.report.notes.push(Reason::new(
                format!("port {} of the destination", self.state.urgent_port),
                "cannot be reached, so that requests for single pages share the main port's queue",
                "let UDP through to it",
            )),
            Err(error) if self.config.mode == Mode::Postcopy => return Err(error.into()),
            Err(error) => {
                let why = format!("cannot be used: {}", chain(&error));
                self.report.notes.push(Reason::new("post-copy", why, ""));
                return Ok(());
            }
        }
        self.state.serving = Some(serving);
        Ok(())
    }

    /// Before the process is stopped: the restore may already need pages that are owed, and would wait in vain
    /// for a connection that was lost during the rounds.
    pub(super) fn ensure_attached(&mut self) -> Result<(), ActionError> {
        let (Some(serving), Some(link)) = (self.state.serving.as_mut(), self.link.as_ref()) else {
            return Ok(());
        };
        if !serving.is_attached() {
            serving.answer(link, self.state.urgent_port)?;
        }
        Ok(())
    }

    /// In place of a round.
    pub(super) fn announce(&mut self, round: u32, clock: &mut PhaseClock) -> Result<Event, ActionError> {
        if self.state.precopy.is_none() {
            self.start_tracking(clock)?;
        }
        self.start_service()?;
        clock.begin("announce");
        let start = Instant::now();
        let sender = self.link.as_ref().ok_or(ActionError::Order)?.sender();
        let precopy = self.state.precopy.as_mut().ok_or(ActionError::Order)?;
        let (posting, config, began) = (&self.posting, self.config, self.began);
        let mut sink = |bytes: Bytes| {
            posting.carried(bytes.len() as u64);
            sender.send_frame_blocking(bytes)
        };
        let go = |_| {
            if ordered(posting, config, began) == Some(Order::Cancel) { Go::Cancel } else { Go::On }
        };
        let dirty_after = precopy.announce(round, &mut sink, &go)?;
        Ok(Event::RoundSent(policy::Round {
            duration: start.elapsed(),
            dirty_after,
            ..policy::Round::default()
        }))
    }

    /// The process runs at the destination: what it is owed follows. What hinders us here is a reason to try
    /// again on a new connection, not to give the pages up.
    pub(super) fn serve(&mut self) -> Option<Event> {
        self.try_to_serve().unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "serving owed pages");
            self.lose_link();
            Some(Event::LinkLost)
        })
    }

    fn try_to_serve(&mut self) -> Result<Option<Event>, ActionError> {
        let now = Instant::now();
        if self.state.committed_at.is_none() {
            self.state.committed_at = Some(now);
            // Not at the end: the clients wait for the end of their connections.
            self.leave_network();
            if !self.state.owes {
                return Ok(Some(Event::NothingOwed));
            }
        }
        if let Err(error) = self.record(OutgoingState::Serving) {
            // The record of limbo says the same to whoever asks the destination.
            tracing::warn!(error = chain(&error), "recording post-copy");
        }
        self.posting.phase(Phase::Postcopy);
        let link = self.link.as_ref().ok_or(ActionError::Order)?;
        let serving = self.state.serving.as_mut().ok_or(ActionError::Order)?;
        if let Some(missing) = self.state.missing.take() {
            serving.store().owe_again(runs::decode(&missing).map_err(ActionError::Missing)?);
            if let Some(lost) = self.state.lost_at.take() {
                self.report.postcopy.recoveries += 1;
                self.report.postcopy.paused += now - lost;
            }
        }
        if !serving.is_attached() {
            serving.answer(link, self.state.urgent_port)?;
        }
        serving.push(link.sender()).map_err(ActionError::Push)?;
        Ok(None)
    }

    /// What the service has to tell.
    pub(super) fn service_news(&mut self) -> Option<Event> {
        self.state.committed_at.filter(|_| self.state.owes)?;
        let serving = self.state.serving.as_mut()?;
        self.posting.remaining(serving.store().pages_left());
        match serving.news()? {
            News::AllSent => Some(Event::AllSent),
            News::Failed(error) => Some(Event::Failed { step: "serving owed pages", error }),
            News::Lost if self.link.is_none() => None,
            News::Lost => {
                self.lose_link();
                Some(Event::LinkLost)
            }
        }
    }

    /// One of the two connections is gone: the other is of no use alone.
    pub(super) fn lose_link(&mut self) {
        self.link = None;
        if self.state.committed_at.is_some() && self.state.owes {
            self.posting.phase(Phase::Paused);
            self.state.lost_at.get_or_insert_with(Instant::now);
        }
        if let Some(serving) = self.state.serving.as_mut().filter(|_| self.state.committed_at.is_some()) {
            serving.stop();
        }
    }

    /// What the destination counted.
    pub(super) fn take_stats(&mut self, stats: Option<DrainStats>) {
        let Some(stats) = stats.filter(|_| self.state.owes) else { return };
        let report = &mut self.report.postcopy;
        report.pages_postcopy = stats.pages_announced;
        report.pages_faulted = stats.pages_faulted;
        report.pages_pushed = stats.pages_installed.saturating_sub(stats.pages_faulted);
        report.pages_dropped = stats.pages_dropped;
        report.pages_twice = stats.pages_twice;
        #[allow(clippy::cast_precision_loss, reason = "microseconds for people")]
        let latency = Latency {
            count: stats.faults,
            p50: stats.fault_p50_us as f64,
            p99: stats.fault_p99_us as f64,
            max: stats.fault_max_us as f64,
        };
        report.fault_latency_us = latency;
    }

    /// Adds what was served to the report.
    pub(super) fn count_served(&mut self) {
        let (Some(serving), Some(committed)) = (&self.state.serving, self.state.committed_at) else { return };
        if !self.state.owes {
            return;
        }
        self.report.postcopy.took = committed.elapsed();
        let served = serving.store().served();
        let packed = served.packed;
        self.report.pages_data += packed.pages_data + served.asked;
        self.report.pages_zero += packed.pages_zero;
        self.report.bytes_wire += packed.bytes_wire;
        self.report.pages_after_freeze += served.asked + served.pushed;
    }
}

/// Pages that a thread touches at once: its stack, its thread-local storage.
pub(super) fn hot_pages(frozen: &Frozen) -> Vec<u64> {
    const MOST: usize = 64;
    frozen.threads().iter().take(MOST).flat_map(|t| [t.regs.rsp, t.regs.fs_base]).collect()
}
