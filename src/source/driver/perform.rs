//! The single actions.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::engine::address::AddressSet;
use crate::engine::capture::{self};
use crate::engine::clocks::{self};
use crate::engine::dirty::UffdTracker;
use crate::engine::extents::Extents;
use crate::engine::freeze::Frozen;
use crate::engine::lock::{self, Lock};
use crate::engine::preflight;
use crate::engine::priority;
use crate::engine::reason::Reason;
use crate::engine::state::files::Descriptors;
use crate::engine::state::mm::{self, FlagCache};
use crate::engine::state::objects::{self, ObjectBook};
use crate::engine::undertaker::Undertaker;
use crate::journal::{self, Journal, JournalError, Outgoing, OutgoingState};
use crate::migration::ProcessKey;
use crate::operator::protocol::Phase;
use crate::proto::image::Range;
use crate::report::{PhaseClock, Round, RoundProgress};
use crate::source::machine::SourceMachine;
use crate::source::pace::Pacer;
use crate::source::policy::{self, Limits, Order};
use crate::source::precopy::{Following, Go, Precopy, PrecopyError};
use crate::source::protocol::{Action, Event, Tell};
use crate::source::sentinel::Sentinel;
use crate::source::wire::to_control;
use crate::transport::{self, Settings, TransportError};

use super::late;
use super::{ActionError, Driver, FREEZE_PATIENCE, ordered};

/// So few pages are packed in a few milliseconds.
const FEW_PAGES: u64 = 1024;

impl Driver<'_> {
    pub(super) fn perform(
        &mut self,
        action: Action,
        machine: &mut SourceMachine,
        limits: &Limits,
        clock: &mut PhaseClock,
    ) -> Result<Option<Event>, ActionError> {
        match action {
            Action::Arm(_) | Action::Finish(_) => Ok(None),
            Action::Send(tell) => {
                if tell == Tell::Begin {
                    // Not before now: on another machine the clocks go on from here.
                    self.begin.clocks = Some(clocks::look(self.pid())?.now);
                }
                if tell == Tell::Commit {
                    self.posting.phase(Phase::Committing);
                }
                let commits = tell == Tell::Commit;
                let lost = self.send(tell);
                if commits && lost.is_none() {
                    self.pass_strays();
                }
                Ok(lost)
            }
            Action::StartSentinel => self.start_sentinel().map(|()| None),
            Action::StartRound(round) => self.round(round, machine, limits, clock).map(Some),
            Action::Announce(round) => self.announce(round, clock).map(Some),
            Action::Serve => Ok(self.serve()),
            Action::Freeze { reason, eager_pages } => {
                tracing::info!(?reason, "freezing");
                self.ensure_attached()?;
                self.before_the_freeze(clock)?;
                self.state.eager_pages = eager_pages;
                priority::urgent();
                clock.begin("freeze");
                self.posting.phase(Phase::Frozen);
                self.state.frozen_at = Some(Instant::now());
                let frozen = self.state.sleeps.freeze(self.config.pid, FREEZE_PATIENCE)?;
                self.state.frozen = Some(frozen);
                Ok(Some(Event::Frozen))
            }
            Action::TakeAddresses => self.take_network(clock).map(|()| None),
            Action::SendFinal => self.send_final(clock).map(|()| None),
            Action::EnterLimbo => self.enter_limbo(),
            Action::Connect => Ok(Some(self.reconnect())),
            Action::LowerFence => {
                if let Some(frozen) = self.state.frozen.as_mut()
                    && let Err(error) = frozen.lift_fence()
                {
                    tracing::error!(%error, "lowering the fence");
                }
                Ok(None)
            }
            Action::ReturnAddresses => {
                self.return_network();
                Ok(None)
            }
            Action::Thaw(_right) => {
                self.state.serving = None;
                self.state.precopy = None;
                // What the process closes must be closed: an epoll tells of sockets that we hold open.
                self.state.descriptors = None;
                self.state.early = None;
                self.state.carried.clear();
                self.state.closing.clear();
                if let Some(frozen) = self.state.frozen.take()
                    && let Err(error) = frozen.thaw()
                {
                    tracing::error!(%error, "letting the process go");
                }
                self.forget_lock();
                Ok(None)
            }
            Action::Conclude(_right) => {
                let recorded = self.record(OutgoingState::Moved).is_ok();
                // Before the kill, which takes the memory apart, and the longer the more there is of it: the
                // clients wait for the end of their connections.
                self.leave_network();
                if let Some(frozen) = self.state.frozen.take() {
                    frozen.kill();
                }
                objects::remove_left_behind(self.state.precopy.as_ref().map_or(&[], |p| p.objects()));
                Ok(Some(Event::Killed { recorded }))
            }
            Action::LeaveHeld(_right) => {
                self.link = None;
                self.state.serving = None;
                if let Some(frozen) = self.state.frozen.take() {
                    frozen.leave_held();
                }
                Ok(None)
            }
            Action::Forget => {
                if let Some(journal) = &self.state.journal
                    && let Err(error) = journal.remove(self.id)
                {
                    tracing::error!(error = &error as &dyn std::error::Error, "removing the journal entry");
                }
                if let Some(sentinel) = self.state.sentinel.take() {
                    sentinel.dismiss();
                }
                Ok(None)
            }
        }
    }

    fn send(&mut self, tell: Tell) -> Option<Event> {
        let message = to_control(&tell, self.id, &self.begin, &self.state.late);
        match self.link.as_ref().map(|l| l.send_control(&message)) {
            Some(Ok(())) => None,
            _ => Some(Event::LinkLost),
        }
    }

    fn start_sentinel(&mut self) -> Result<(), ActionError> {
        self.state.undertaker = Some(Undertaker::start(self.pid()).map_err(ActionError::Thread)?);
        let state_dir = std::path::absolute(&self.config.state_dir).unwrap_or_else(|_| PathBuf::from("/"));
        self.state.journal = Some(Journal::open(&state_dir)?);
        let mut command = std::process::Command::new("/proc/self/exe");
        command.arg("--state-dir").arg(&state_dir).arg("__sentinel").arg(self.id.to_string());
        if self.config.allowed.files.tcp_established {
            self.state.lock = Some(Lock::open(&format!("migrate-{}", self.id))?);
        }
        // It holds the lock as well: until it has done its work no connection may be reset.
        let held = self.state.lock.as_ref().map(|lock| lock.socket().try_clone_to_owned());
        let held = held.transpose().map_err(ActionError::Share)?;
        self.state.sentinel = Some(Sentinel::spawn(command, held)?);
        if !self.config.allowed.move_ips.is_empty() {
            self.state.addresses = Some(AddressSet::at_source(&self.config.allowed.move_ips)?);
        }
        Ok(())
    }

    /// The first round begins with the one brief stop that creates the userfaultfd.
    pub(super) fn start_tracking(&mut self, clock: &mut PhaseClock) -> Result<(), ActionError> {
        clock.begin("track");
        let mut frozen = self.state.sleeps.freeze(self.config.pid, FREEZE_PATIENCE)?;
        let tracker = UffdTracker::start(&mut frozen);
        let mut objects = ObjectBook::new(self.pid());
        let started = mm::capture(self.pid(), &FlagCache::default()).map(|map| {
            let mut layout = map.layout;
            objects.start(&mut layout)
        });
        frozen.thaw()?;
        let tracker = tracker?;
        started
            .map_err(PrecopyError::<TransportError>::from)?
            .map_err(PrecopyError::<TransportError>::from)?;
        let compression = self.config.compression;
        self.state.precopy = Some(Precopy::new(self.pid(), Box::new(tracker), objects, compression)?);
        self.prepare_service()
    }

    fn round(
        &mut self,
        number: u32,
        machine: &SourceMachine,
        limits: &Limits,
        clock: &mut PhaseClock,
    ) -> Result<Event, ActionError> {
        if self.state.precopy.is_none() {
            self.start_tracking(clock)?;
            priority::background();
            self.state.pacer = Some(Pacer::new(self.pid()));
        }
        clock.begin("precopy");
        let carries = self.state.lock.is_some();
        if carries {
            self.lasting.note(lock::socket_inodes(self.config.pid)?);
        }
        let start = Instant::now();
        let sender = self.link.as_ref().ok_or(ActionError::Order)?.sender();
        let precopy = self.state.precopy.as_mut().ok_or(ActionError::Order)?;
        let (posting, config, began) = (&self.posting, self.config, self.began);
        posting.round(number);
        let mut sink = |bytes: Bytes| {
            posting.carried(bytes.len() as u64);
            sender.send_frame_blocking(bytes)
        };
        // The first round is the long one; the others are a race against the writes.
        let pacer = self.state.pacer.as_mut().filter(|_| number == 1).map(RefCell::new);
        let (lasting, pid) = (RefCell::new(&mut self.lasting), self.config.pid);
        let go = |left| {
            posting.remaining(left);
            if let Some(pacer) = &pacer {
                pacer.borrow_mut().breathe();
            }
            // In a long round too: it is the youngest list but one that tells what has lasted.
            let mut lasting = lasting.borrow_mut();
            if carries
                && lasting.is_due()
                && let Ok(sockets) = lock::socket_inodes(pid)
            {
                lasting.note(sockets);
            }
            match ordered(posting, config, began) {
                None => Go::On,
                Some(Order::Hurry(_)) => Go::Stop,
                Some(Order::Cancel) => Go::Cancel,
            }
        };
        let (sent, dirty_after) = precopy.round(number, &mut sink, &go)?;
        let took = start.elapsed();
        // What the link and we can do is what the freeze will need.
        let worked = took.saturating_sub(pacer.map(|p| p.into_inner().take_rested()).unwrap_or_default());
        self.report.rounds.push(Round { pages: sent.pages, bytes_wire: sent.bytes, took, dirty_after });
        let round = policy::Round {
            pages: sent.pages,
            bytes: sent.bytes,
            duration: worked,
            scanning: sent.scanning,
            dirty_after,
        };
        let per_second = u128::from(dirty_after) * 1_000_000 / took.as_micros().max(1);
        let per_second = u64::try_from(per_second).unwrap_or(u64::MAX);
        self.posting.remaining(dirty_after);
        self.posting.dirty_rate(per_second);
        if self.config.progress {
            let mut rounds = machine.rounds().to_vec();
            rounds.push(round);
            let expected = policy::decide(&rounds, limits, None).downtime;
            let line = RoundProgress {
                number,
                pages: sent.pages,
                bytes_wire: sent.bytes,
                took,
                dirty_pages_per_second: per_second,
                expected_downtime: expected,
            };
            eprintln!("{line}");
        }
        Ok(Event::RoundSent(round))
    }

    fn send_final(&mut self, clock: &mut PhaseClock) -> Result<(), ActionError> {
        let round = u32::try_from(self.report.rounds.len() + 1).unwrap_or(u32::MAX);
        let (options, queued, handshakes) =
            (self.files_options(), self.queued_ends(), self.take_handshakes());
        let sender = self.link.as_ref().ok_or(ActionError::Order)?.sender();
        let precopy = self.state.precopy.as_mut().ok_or(ActionError::Order)?;
        let frozen = self.state.frozen.as_mut().ok_or(ActionError::Order)?;
        let (posting, config, began) = (&self.posting, self.config, self.began);
        let mut sink = |bytes: Bytes| {
            posting.carried(bytes.len() as u64);
            sender.send_frame_blocking(bytes)
        };
        // The process stands still: hurry is of no use any more.
        let given_up = AtomicBool::new(false);
        let go = |left| {
            posting.remaining(left);
            let cancelled = ordered(posting, config, began) == Some(Order::Cancel);
            if cancelled || given_up.load(Ordering::Relaxed) { Go::Cancel } else { Go::On }
        };
        clock.begin("scan");
        let sockets = self.state.descriptors.as_ref().map(Descriptors::socket_numbers).unwrap_or_default();
        let map = precopy.final_map(sockets)?;
        clock.begin("capture");
        let serving = self.state.serving.as_ref();
        // Without the service nothing may follow.
        let eager_pages = if serving.is_some() { self.state.eager_pages } else { u64::MAX };
        let hot = late::hot_pages(frozen);
        // What is owed must be known before the destination can ask for it.
        let mut owe = |owed: Extents, huge| {
            if let Some(serving) = serving {
                serving.store().owe(owed, huge);
            }
        };
        let follow = Following { eager_pages, hot: &hot, owe: &mut owe };
        let mut descriptors = self.state.descriptors.take();
        if let (Some(descriptors), Some(early)) = (&mut descriptors, self.state.early.take()) {
            descriptors.remember(early);
        }
        let sleeps = &self.state.sleeps;
        let (scanned, pid) = (&self.scanned, self.config.pid);
        let (asked, wait) = mpsc::channel::<()>();
        // Pages are read from outside, the state is asked for from inside: neither needs to wait for the other. But its
        // threads come to a processor sooner if nobody packs pages meanwhile, which for a few of them takes no time.
        let (last, captured) = std::thread::scope(|scope| {
            let (pages, given_up, sink, go) = (&mut *precopy, &given_up, &mut sink, &go);
            let work = move || {
                let start = Instant::now();
                let mut rest = pages.final_scan(map)?;
                let (count, guards, scanned) =
                    (rest.pages(), std::mem::take(&mut rest.guards), start.elapsed());
                let begun = preflight::begun_since(pid);
                given_up.fetch_or(!begun.is_empty(), Ordering::Relaxed);
                if count.min(follow.eager_pages) <= FEW_PAGES {
                    // The end of the other side is as good as its word.
                    let _ = wait.recv();
                }
                let start = Instant::now();
                let owes = pages.send_rest(round, rest, follow, sink, go);
                Ok(Last { count, guards, begun, owes, scanned, sent: start.elapsed() })
            };
            let pages = std::thread::Builder::new().name("pages".into()).spawn_scoped(scope, work);
            let captured =
                capture::capture(frozen, &options, sleeps, scanned, descriptors, move || drop(asked));
            // Then the process need not stand still until they are sent.
            given_up.fetch_or(captured.is_err(), Ordering::Relaxed);
            (pages.map(|thread| thread.join()), captured)
        });
        let last = match last.map_err(ActionError::Thread)? {
            Ok(last) => last.map_err(|error: PrecopyError<TransportError>| ActionError::from(error))?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        self.report.pages_after_freeze = last.count;
        self.report.phases.add("beside_scan", last.scanned);
        self.report.phases.add("beside_pages", last.sent);
        if !last.begun.is_empty() {
            return Err(ActionError::Begun(last.begun));
        }
        let mut captured = captured?;
        if let Some(memory) = captured.process.mm.as_mut() {
            memory.guards = last.guards;
        }
        if let Some(files) = captured.process.files.as_mut() {
            (files.queued, files.handshakes) = (queued, handshakes);
        }
        self.state.owes = last.owes?;
        posting.remaining(0);
        (self.state.closing, self.state.carried) = (captured.closing, captured.carried);
        self.report.connections = self.state.carried.len() as u64;
        self.state.seen = captured.seen;
        precopy.send_state(round, &captured.process, &mut sink)?;
        // While the destination is at work.
        frozen.close_injection()?;
        clock.begin("apply");
        Ok(())
    }

    fn enter_limbo(&mut self) -> Result<Option<Event>, ActionError> {
        if !self.state.sentinel.as_mut().is_some_and(Sentinel::is_alive) {
            return Err(ActionError::NoSentinel);
        }
        // With the stop and the SIGCONT that may have come since the freeze.
        self.state.was_stopped = self.state.frozen.as_ref().ok_or(ActionError::Order)?.stop_is_due()?;
        self.record(OutgoingState::Limbo)?;
        let frozen = self.state.frozen.as_mut().ok_or(ActionError::Order)?;
        frozen.fence()?;
        self.state.late = frozen.late_signals(&self.state.seen)?;
        Ok(Some(Event::LimboEntered))
    }

    pub(super) fn record(&self, state: OutgoingState) -> Result<(), JournalError> {
        let Some(journal) = &self.state.journal else { return Ok(()) };
        let peer = self.link.as_ref().map(|l| l.peer().fingerprint.to_string()).unwrap_or_default();
        journal.write(&Outgoing {
            id: self.id,
            process: self.process,
            boot: journal::boot_id()?,
            owner: own_key(),
            destination: self.config.to.to_string(),
            peer,
            state,
            owes: self.state.owes,
            was_stopped: self.state.was_stopped,
            masks: self.state.frozen.as_ref().map(Frozen::masks).unwrap_or_default(),
            addresses: self.state.addresses.as_ref().map(AddressSet::records).unwrap_or_default(),
            connections: self.config.allowed.files.tcp_established,
            hooks: self.config.allowed.hooks.clone(),
        })
    }

    fn reconnect(&mut self) -> Event {
        self.link = None;
        if let Some(serving) = self.state.serving.as_mut() {
            serving.stop();
        }
        let addrs = self.config.to.resolve().unwrap_or_default();
        let settings = Settings { handshake_timeout: Duration::from_secs(2), ..self.settings.clone() };
        match transport::connect(self.node.clone(), addrs, self.hello.clone(), settings) {
            Ok(link) => {
                self.link = Some(link);
                Event::Connected
            }
            Err(error) => {
                tracing::info!(error = &error as &dyn std::error::Error, "the destination is not reached");
                Event::LinkLost
            }
        }
    }
}

/// What becomes of the last pages, beside the capture.
struct Last {
    count: u64,
    guards: Vec<Range>,
    /// What was begun since preflight, and stands in the way.
    begun: Vec<Reason>,
    /// Whether pages follow.
    owes: Result<bool, PrecopyError<TransportError>>,
    scanned: Duration,
    sent: Duration,
}

/// Ourselves, as the journal names the owner of a migration.
fn own_key() -> ProcessKey {
    let pid = std::process::id();
    ProcessKey { pid, start_ticks: crate::engine::alive::start_ticks(pid).ok().flatten().unwrap_or(0) }
}
