//! What the frames of the source bring: memory, sockets that can be made already, and the state of the process.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::assemble::Applied;
use super::driver::{Driver, OWN_LINK};
use super::protocol::Event;
use super::steps::ActionError;
use crate::engine::address;
use crate::engine::lock::connection_of;
use crate::engine::reason::chain;
use crate::engine::state::files;
use crate::engine::{alive, clocks, remap, restore};
use crate::migration::ProcessKey;
use crate::operator::protocol::Phase;
use crate::pageserver::frame::{Frame, HEADER_BYTES};
use crate::proto::control::MadeAhead;
use crate::proto::files::Ahead;
use crate::proto::image::Process;
use crate::wire::Body;

/// How often the machine is told that frames keep coming.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

impl Driver {
    pub(super) fn frame(&mut self, frame: &Frame, last_progress: &mut Instant) -> Option<Event> {
        if self.drain.is_active() {
            if let Err(error) = self.drain.place(frame) {
                tracing::error!(error = chain(&error), "a page that was missing");
                // It is missing still; the source learns that when it connects again.
                self.link = None;
                return Some(Event::LinkLost(OWN_LINK));
            }
            return None;
        }
        // Frames that were under way when we gave up are nobody's.
        let assembly = self.assembly.as_mut()?;
        self.posting.carried((HEADER_BYTES + frame.payload().len()) as u64);
        let applied = assembly.apply(frame);
        if assembly.is_missing_any()
            && let Err(error) = self.drain.prepare_guard()
        {
            return Some(self.failed("guarding the missing pages", &error.into()));
        }
        match applied {
            Ok(Applied::Placed) if last_progress.elapsed() > PROGRESS_EVERY => {
                *last_progress = Instant::now();
                Some(Event::Progress)
            }
            Ok(Applied::Placed) => None,
            Ok(Applied::Ahead(ahead)) => {
                self.make_ahead(ahead);
                self.tell_made();
                None
            }
            Ok(Applied::RoundEnd(round)) => {
                self.posting.round(round.saturating_add(1));
                Some(Event::RoundPlaced(round))
            }
            Ok(Applied::State(mut process)) => match self.restore(&mut process) {
                Ok(key) => Some(Event::Applied(key)),
                Err(error) => Some(self.failed("restoring the process", &error)),
            },
            Err(error) => Some(self.failed("placing memory", &error.into())),
        }
    }

    /// The last frame has come: the rest of the state goes into the skeleton.
    fn restore(&mut self, process: &mut Process) -> Result<ProcessKey, ActionError> {
        self.clock.begin("build");
        self.posting.phase(Phase::Frozen);
        let (mut skeleton, missing) = self.assembly.take().ok_or(ActionError::Order)?.into_skeleton()?;
        let log = self.state_dir.join("logs").join(format!("{}-{}.log", process.pid, self.id));
        let mut descriptors = process.files.take().unwrap_or_default();
        self.prepare_sockets(&mut descriptors)?;
        let ahead = std::mem::take(&mut self.ahead);
        let mut built = files::build(&descriptors, Some(&log), &self.shift, skeleton.objects(), ahead)?;
        self.made_ahead = built.made_ahead as u64;
        self.connections = built.take_connections();
        self.names = std::mem::take(&mut built.names);
        self.lost_datagrams = built.lost_datagrams;
        if !missing.is_empty() {
            self.clock.begin("watch");
            self.drain.start(&mut skeleton, missing)?;
            self.clock.begin("guard");
            self.drain.entrust()?;
        }
        self.clock.begin("restore");
        let elapsed = clocks::catch_up(process.clocks.as_ref(), &self.shift)?;
        let restored = restore::restore(&mut skeleton, process, built, elapsed);
        self.drain.restored();
        restored?;
        self.clock.end();
        self.stopped = process.stopped;
        self.masks = process.threads.iter().map(|t| (t.tid.cast_signed(), t.sigmask)).collect();
        let start_ticks = alive::start_ticks(process.pid)?.ok_or(ActionError::Order)?;
        self.skeleton = Some(skeleton);
        let key = ProcessKey { pid: process.pid, start_ticks };
        self.process = Some(key);
        Ok(key)
    }

    /// The source waits for this word, a little. Whoever reads next finds out if the link is gone.
    fn tell_made(&self) {
        let made = MadeAhead { migration_id: self.id.to_string() };
        let _ = self.link.as_ref().map(|link| link.send_control(&Body::MadeAhead(made).into()));
    }

    /// Connections that do nothing: their sockets are made while the process is not here yet. None of them has to be
    /// made; what is not is made in the end.
    fn make_ahead(&mut self, mut ahead: Ahead) {
        let began = Instant::now();
        // In the network of the process itself its connections would be locked, and its ports be taken from it.
        let network = self.begin.network;
        let is_its_own = self.same_kernel() && (network == 0 || network == address::network_here());
        if is_its_own || !self.ahead.is_empty() {
            return;
        }
        ahead.connections.truncate(files::MOST_AHEAD);
        let mut ends = HashSet::new();
        ahead.connections.retain_mut(|image| {
            remap::apply_to(&mut image.local, &self.remaps);
            // Both ends of those of the host itself are here, and may be somebody else's.
            let of_others = connection_of(image).filter(|one| !one.local.ip().is_loopback());
            of_others.is_some_and(|one| ends.insert(one))
        });
        let Some(lock) = self.lock.as_mut() else { return };
        let ends: Vec<_> = ends.into_iter().collect();
        if let Err(error) = lock.close_on(&ends) {
            tracing::debug!(error = chain(&error), "connections are not locked ahead");
            return;
        }
        self.ahead.make(&ahead);
        tracing::debug!(came = ends.len(), made = self.ahead.len(), took = ?began.elapsed(), "sockets made ahead");
    }
}
