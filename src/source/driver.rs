//! Performs what the source's machine asks for: the engine, the journal, the sentinel, the connection.
//!
//! Runs on one thread, which is the tracer of the process. The network has a thread of its own (see
//! `transport`), so frames leave while the next ones are read.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::machine::SourceMachine;
use super::policy::{self, Limits};
use super::precopy::{Precopy, PrecopyError};
use super::protocol::{Action, Event, Message, Outcome, Tell};
use super::sentinel::{self, Sentinel};
use super::wire::{to_control, to_message};
use crate::config::SourceConfig;
use crate::engine::address::AddressSet;
use crate::engine::capture::{self, CaptureError};
use crate::engine::clocks::{self, ClockError};
use crate::engine::dirty::{TrackError, UffdTracker};
use crate::engine::freeze::{FreezeError, Frozen};
use crate::engine::memory::MemoryError;
use crate::engine::priority;
use crate::engine::reason::Reason;
use crate::engine::remote::{InjectError, Tid};
use crate::engine::sleep::SleepBook;
use crate::engine::state::files::{self, FilesOptions, ScannedProcesses};
use crate::identity::Node;
use crate::journal::{self, Journal, JournalError, Outgoing, OutgoingState};
use crate::migration::{MigrationId, ProcessKey};
use crate::proto::control::{Begin, Timings};
use crate::report::{PhaseClock, Report, Round, RoundProgress};
use crate::transport::{self, Incoming, Link, Settings, TransportError};
use crate::wire::Hello;

/// How long threads may take to stop.
const FREEZE_PATIENCE: Duration = Duration::from_secs(2);
/// How often the operator's wish to cancel is looked for.
const CANCEL_POLL: Duration = Duration::from_millis(100);
/// How long the goodbye may take.
const FINISH_PATIENCE: Duration = Duration::from_secs(2);

/// Why an action could not be performed.
#[derive(Debug, thiserror::Error)]
enum ActionError {
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    #[error(transparent)]
    Inject(#[from] InjectError),
    #[error(transparent)]
    Track(#[from] TrackError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Precopy(#[from] PrecopyError<TransportError>),
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error(transparent)]
    Clocks(#[from] ClockError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Sentinel(#[from] sentinel::SentinelError),
    #[error(transparent)]
    Address(#[from] crate::engine::address::AddressError),
    #[error("the sentinel has ended")]
    NoSentinel,
    #[error("this step came before the one that it needs")]
    Order,
}

/// Everything that one outgoing migration holds.
pub(super) struct Driver<'a> {
    pub config: &'a SourceConfig,
    pub id: MigrationId,
    pub process: ProcessKey,
    pub node: Arc<Node>,
    pub hello: Hello,
    pub settings: Settings,
    pub begin: Begin,
    pub link: Option<Link>,
    pub cancelled: Arc<AtomicBool>,
    pub report: Report,
    /// Processes that preflight has looked at for shared descriptors.
    pub scanned: ScannedProcesses,
    pub state: Held,
}

/// What is held of the process and of this host.
#[derive(Default)]
pub(super) struct Held {
    precopy: Option<Precopy>,
    frozen: Option<Frozen>,
    sleeps: SleepBook,
    closing: Vec<OwnedFd>,
    addresses: Option<AddressSet>,
    taken: bool,
    journal: Option<Journal<Outgoing>>,
    sentinel: Option<Sentinel>,
    was_stopped: bool,
    frozen_at: Option<Instant>,
    reasons: Vec<Reason>,
}

impl Driver<'_> {
    fn pid(&self) -> Tid {
        self.config.pid
    }

    /// Runs the machine to its end and completes the report.
    pub(super) fn run(mut self) -> Report {
        let limits = Limits { max_downtime: self.config.max_downtime, max_rounds: self.config.max_rounds };
        let started = Instant::now();
        let mut clock = PhaseClock::start();
        clock.begin("prepare");
        let (mut machine, actions) = SourceMachine::start(self.process, limits);
        let mut events = VecDeque::new();
        let mut timer: Option<Instant> = None;
        let mut outcome = None;
        let mut todo: VecDeque<Action> = actions.into();
        let mut cancel_told = false;
        loop {
            while let Some(action) = todo.pop_front() {
                match action {
                    Action::Arm(after) => timer = Some(Instant::now() + after),
                    Action::Finish(end) => outcome = Some(end),
                    action => {
                        let step = step_name(&action);
                        match self.perform(action, &mut machine, &limits, &mut clock) {
                            Ok(event) => events.extend(event),
                            Err(error) => {
                                tracing::warn!(step, error = chain(&error), "failed");
                                todo.clear();
                                if let Some(reasons) = refusals(&error) {
                                    self.state.reasons.extend(reasons);
                                }
                                events.push_back(self.failure(step, &error));
                            }
                        }
                    }
                }
            }
            if let Some(outcome) = outcome.take() {
                return self.conclude(outcome, clock, started);
            }
            let event = match events.pop_front() {
                Some(event) => event,
                None => {
                    if self.cancelled.load(Ordering::Relaxed) && !cancel_told {
                        cancel_told = true;
                        Event::Cancel
                    } else {
                        self.wait(&mut timer, &mut clock)
                    }
                }
            };
            match machine.handle(started.elapsed(), event) {
                Ok(actions) => todo.extend(actions),
                Err(error) => tracing::error!(%error, "a defect of the driver"),
            }
        }
    }

    /// The next event from outside.
    fn wait(&mut self, timer: &mut Option<Instant>, clock: &mut PhaseClock) -> Event {
        loop {
            let now = Instant::now();
            if timer.is_some_and(|t| t <= now) {
                *timer = None;
                return Event::Timeout;
            }
            if self.cancelled.load(Ordering::Relaxed) {
                return Event::Cancel;
            }
            let wait = timer.map_or(CANCEL_POLL, |t| (t - now).min(CANCEL_POLL));
            let Some(link) = self.link.as_mut() else {
                std::thread::sleep(wait);
                continue;
            };
            match link.recv_timeout(wait) {
                None => {}
                Some(Incoming::Control(message)) => match to_message(*message) {
                    Ok((message, timings)) => {
                        self.take_timings(&message, timings, clock);
                        return Event::Message(message);
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the destination broke the protocol");
                        self.link = None;
                        return Event::LinkLost;
                    }
                },
                Some(Incoming::Frame(_)) => {}
                Some(Incoming::Lost(error)) => {
                    tracing::info!(error = &error as &dyn std::error::Error, "connection ended");
                    self.link = None;
                    return Event::LinkLost;
                }
            }
        }
    }

    fn take_timings(&mut self, message: &Message, timings: Option<Timings>, clock: &mut PhaseClock) {
        match message {
            Message::Prepared => clock.begin("commit"),
            Message::Committed => {
                if let Some(since) = self.state.frozen_at {
                    self.report.downtime = since.elapsed();
                }
                clock.end();
            }
            _ => {}
        }
        if let Some(timings) = timings {
            self.report.phases.add_remote("dest_", &timings.phase_us);
        }
    }

    fn failure(&mut self, step: &'static str, error: &ActionError) -> Event {
        // A broken link while frames are sent is the link's fault, not the step's.
        if let ActionError::Precopy(PrecopyError::Cancelled) = error {
            return Event::Cancel;
        }
        if matches!(error, ActionError::Precopy(PrecopyError::Pack(_))) && self.link_is_lost() {
            return Event::LinkLost;
        }
        Event::Failed { step, error: chain(error) }
    }

    fn link_is_lost(&mut self) -> bool {
        match self.link.as_mut().map(|l| l.recv_timeout(Duration::from_millis(1))) {
            Some(Some(Incoming::Lost(_))) | None => {
                self.link = None;
                true
            }
            _ => false,
        }
    }

    fn perform(
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
                Ok(self.send(tell))
            }
            Action::StartSentinel => self.start_sentinel().map(|()| None),
            Action::StartRound(round) => self.round(round, machine, limits, clock).map(Some),
            Action::Freeze(reason) => {
                tracing::info!(?reason, "freezing");
                priority::urgent();
                clock.begin("freeze");
                self.state.sleeps.look(self.config.pid);
                self.state.frozen_at = Some(Instant::now());
                let frozen = Frozen::freeze(self.pid(), FREEZE_PATIENCE)?;
                self.state.sleeps.note(frozen.threads());
                self.state.was_stopped = frozen.group_stopped;
                self.state.frozen = Some(frozen);
                Ok(Some(Event::Frozen))
            }
            Action::TakeAddresses => self.take_addresses(clock).map(|()| None),
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
                if self.state.taken
                    && let Some(addresses) = self.state.addresses.as_mut()
                    && let Err(error) = addresses.add()
                {
                    tracing::error!(error = &error as &dyn std::error::Error, "giving addresses back");
                    self.state.reasons.push(Reason::new("addresses", chain(&error), "add them by hand"));
                }
                self.state.taken = false;
                Ok(None)
            }
            Action::Thaw(_right) => {
                self.state.precopy = None;
                if let Some(frozen) = self.state.frozen.take()
                    && let Err(error) = frozen.thaw()
                {
                    tracing::error!(%error, "letting the process go");
                }
                Ok(None)
            }
            Action::Conclude(_right) => {
                let recorded = self.record(OutgoingState::Moved).is_ok();
                if let Some(frozen) = self.state.frozen.take() {
                    frozen.kill();
                }
                files::close_peers(std::mem::take(&mut self.state.closing));
                Ok(Some(Event::Killed { recorded }))
            }
            Action::LeaveHeld(_right) => {
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
        let message = to_control(&tell, self.id, &self.begin);
        match self.link.as_ref().map(|l| l.send_control(&message)) {
            Some(Ok(())) => None,
            _ => Some(Event::LinkLost),
        }
    }

    fn start_sentinel(&mut self) -> Result<(), ActionError> {
        let state_dir = std::path::absolute(&self.config.state_dir).unwrap_or_else(|_| PathBuf::from("/"));
        self.state.journal = Some(Journal::open(&state_dir)?);
        let mut command = std::process::Command::new("/proc/self/exe");
        command.arg("--state-dir").arg(&state_dir).arg("__sentinel").arg(self.id.to_string());
        self.state.sentinel = Some(Sentinel::spawn(command)?);
        if !self.config.move_ips.is_empty() {
            self.state.addresses = Some(AddressSet::at_source(&self.config.move_ips)?);
        }
        Ok(())
    }

    /// The first round begins with the one brief stop that creates the userfaultfd.
    fn start_tracking(&mut self, clock: &mut PhaseClock) -> Result<(), ActionError> {
        clock.begin("track");
        self.state.sleeps.look(self.config.pid);
        let mut frozen = Frozen::freeze(self.pid(), FREEZE_PATIENCE)?;
        self.state.sleeps.note(frozen.threads());
        let tracker = UffdTracker::start(&mut frozen);
        frozen.thaw()?;
        let tracker = tracker?;
        self.state.precopy = Some(Precopy::new(self.pid(), Box::new(tracker), self.config.compression)?);
        Ok(())
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
        }
        clock.begin("precopy");
        let start = Instant::now();
        let sender = self.link.as_ref().ok_or(ActionError::Order)?.sender();
        let precopy = self.state.precopy.as_mut().ok_or(ActionError::Order)?;
        let cancelled = self.cancelled.clone();
        let mut sink = |bytes| sender.send_frame_blocking(bytes);
        let (sent, dirty_after) = precopy.round(number, &mut sink, &|| cancelled.load(Ordering::Relaxed))?;
        let took = start.elapsed();
        self.report.rounds.push(Round { pages: sent.pages, bytes_wire: sent.bytes, took, dirty_after });
        let round = policy::Round { pages: sent.pages, bytes: sent.bytes, duration: took, dirty_after };
        if self.config.progress {
            let mut rounds = machine.rounds().to_vec();
            rounds.push(round);
            let expected = policy::decide(&rounds, limits).downtime;
            let per_second = u128::from(dirty_after) * 1_000_000 / took.as_micros().max(1);
            let line = RoundProgress {
                number,
                pages: sent.pages,
                bytes_wire: sent.bytes,
                took,
                dirty_pages_per_second: u64::try_from(per_second).unwrap_or(u64::MAX),
                expected_downtime: expected,
            };
            eprintln!("{line}");
        }
        Ok(Event::RoundSent(round))
    }

    fn take_addresses(&mut self, clock: &mut PhaseClock) -> Result<(), ActionError> {
        if self.state.addresses.is_none() {
            return Ok(());
        }
        clock.begin("addresses");
        self.record(OutgoingState::Taking)?;
        if let Some(addresses) = self.state.addresses.as_mut() {
            addresses.remove()?;
            self.state.taken = true;
        }
        Ok(())
    }

    fn send_final(&mut self, clock: &mut PhaseClock) -> Result<(), ActionError> {
        let round = u32::try_from(self.report.rounds.len() + 1).unwrap_or(u32::MAX);
        let sender = self.link.as_ref().ok_or(ActionError::Order)?.sender();
        let precopy = self.state.precopy.as_mut().ok_or(ActionError::Order)?;
        let frozen = self.state.frozen.as_mut().ok_or(ActionError::Order)?;
        let mut sink = |bytes| sender.send_frame_blocking(bytes);
        clock.begin("scan");
        let mut rest = precopy.final_scan()?;
        self.report.pages_after_freeze = rest.pages();
        let guards = std::mem::take(&mut rest.guards);
        clock.begin("pages");
        precopy.send_rest(round, rest, &mut sink)?;
        clock.begin("capture");
        let options = FilesOptions { tcp_close: self.config.tcp_close, shell_job: self.config.shell_job };
        let captured = capture::capture(frozen, &options, &self.state.sleeps, guards, &self.scanned)?;
        self.state.closing = captured.closing;
        precopy.send_state(round, &captured.process, &mut sink)?;
        clock.begin("apply");
        Ok(())
    }

    fn enter_limbo(&mut self) -> Result<Option<Event>, ActionError> {
        if !self.state.sentinel.as_mut().is_some_and(Sentinel::is_alive) {
            return Err(ActionError::NoSentinel);
        }
        self.record(OutgoingState::Limbo)?;
        self.state.frozen.as_mut().ok_or(ActionError::Order)?.fence()?;
        Ok(Some(Event::LimboEntered))
    }

    fn record(&self, state: OutgoingState) -> Result<(), JournalError> {
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
            was_stopped: self.state.was_stopped,
            addresses: self.state.addresses.as_ref().map(AddressSet::records).unwrap_or_default(),
        })
    }

    fn reconnect(&mut self) -> Event {
        self.link = None;
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

    fn conclude(mut self, outcome: Outcome, clock: PhaseClock, started: Instant) -> Report {
        let stats = self.state.precopy.as_ref().map(Precopy::stats).unwrap_or_default();
        self.report.pages_zero = stats.pages_zero;
        self.report.pages_data = stats.pages_data;
        self.report.bytes_wire = stats.bytes_wire;
        if stats.bytes_wire > 0 && stats.pages_data > 0 {
            #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
            let ratio = stats.bytes_raw as f64 / stats.bytes_wire as f64;
            self.report.compression_ratio = ratio;
        }
        if let Some(link) = self.link.take() {
            let _ = link.finish(FINISH_PATIENCE);
        }
        let remote = std::mem::take(&mut self.report.phases);
        self.report.phases = clock.finish();
        self.report.phases.merge(remote);
        self.report.total = started.elapsed();
        super::outcome::describe(&mut self.report, outcome, std::mem::take(&mut self.state.reasons));
        self.report
    }
}

/// Ourselves, as the journal names the owner of a migration.
fn own_key() -> ProcessKey {
    let pid = std::process::id();
    ProcessKey { pid, start_ticks: crate::engine::alive::start_ticks(pid).ok().flatten().unwrap_or(0) }
}

fn step_name(action: &Action) -> &'static str {
    match action {
        Action::StartSentinel => "starting the sentinel",
        Action::StartRound(_) => "copying memory",
        Action::Freeze(_) => "freezing the process",
        Action::TakeAddresses => "taking the addresses",
        Action::SendFinal => "sending the final state",
        Action::EnterLimbo => "preparing the commit",
        _ => "switching over",
    }
}

/// Reasons that an error carries, to be shown one by one.
fn refusals(error: &ActionError) -> Option<Vec<Reason>> {
    match error {
        ActionError::Precopy(PrecopyError::Refused(reasons)) => Some(reasons.clone()),
        ActionError::Capture(error) => error.reasons(),
        _ => None,
    }
}

/// An error and its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
