//! Performs what the destination's machine asks for: preflight of this host, skeleton, journal, acceptance.
//!
//! One thread per migration, named after it; it is the tracer of the skeleton. Messages about the same
//! migration that come over other connections reach it through its [`Inbox`].

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::assemble::Assembly;
use super::drain::Drain;
use super::machine::DestMachine;
use super::protocol::{Action, Event, LinkId, Message, Outcome, Tell};
use super::queued::Queued;
use super::steps::{ActionError, parse_remaps, step_name};
use super::strays::Waiting;
use super::wire::{Extras, late_signals, to_control, to_message};
use super::{reaper, recover};
use crate::engine::address::AddressSet;
use crate::engine::clocks::{self, Shift};
use crate::engine::hook::Hooks;
use crate::engine::kernel::Host;
use crate::engine::lock::Lock;
use crate::engine::reason::{Reason, chain};
use crate::engine::remap::Remap;
use crate::engine::remote::Tid;
use crate::engine::skeleton::{ReservedPid, Skeleton};
use crate::engine::state::files::{AheadSockets, SilentConnections, UnixNames};
use crate::journal::{self, Incoming, IncomingState, Journal, JournalError};
use crate::migration::{MigrationId, ProcessKey};
use crate::operator::protocol::Phase;
use crate::operator::{End, Posting};
use crate::proto::control::{Begin, LateSignal, Timings};
use crate::proto::image::Clocks;
use crate::report::PhaseClock;
use crate::transport::{self, Link, LinkSender};

/// A message about this migration from another connection, and the way to answer it.
#[derive(Debug)]
pub(super) struct Ask {
    pub message: Message,
    pub answer: LinkSender,
}

/// What other connections bring.
#[derive(Debug)]
pub(super) enum Arrival {
    /// A message.
    Ask(Ask),
    /// A connection that takes the place of the one that began: the source goes on with missing pages.
    Resume(Box<Link>),
}

/// Where it arrives.
pub(super) type Inbox = Receiver<Arrival>;

/// How often the own connection is left to look into the inbox.
const INBOX_POLL: Duration = Duration::from_millis(20);
/// The connection that began the migration.
pub(super) const OWN_LINK: LinkId = LinkId(0);

/// One incoming migration.
pub(super) struct Driver {
    pub id: MigrationId,
    pub begin: Begin,
    /// What our clocks read when the plan came.
    pub received: Option<Clocks>,
    /// How much more the process's clocks will read than ours.
    pub shift: Shift,
    pub link: Option<Link>,
    pub inbox: Inbox,
    pub state_dir: PathBuf,
    pub host: Arc<Host>,
    pub assembly: Option<Assembly>,
    pub skeleton: Option<Skeleton>,
    pub process: Option<ProcessKey>,
    pub stopped: bool,
    /// What its threads block.
    pub masks: Vec<(Tid, u64)>,
    /// Signals that the source got after the capture: they come with the commit.
    pub late: Vec<LateSignal>,
    pub addresses: Option<AddressSet>,
    /// Sockets of connections that were made before the state came.
    pub ahead: AheadSockets,
    pub made_ahead: u64,
    /// Restored connections that are silent yet.
    pub connections: SilentConnections,
    /// Names of unix sockets that are not at their places yet.
    pub names: UnixNames,
    pub lost_datagrams: u64,
    /// What sockets get for the addresses they had.
    pub remaps: Vec<Remap>,
    /// Keeps connections quiet until the process runs. After the skeleton: its sockets go first.
    pub lock: Option<Lock>,
    pub strays: Waiting,
    pub queued: Queued,
    /// The operator's, and what they are told of this service.
    pub hooks: Hooks,
    pub listen: SocketAddr,
    /// The source was told that it may begin.
    pub consented: bool,
    pub asks: HashMap<u64, LinkSender>,
    pub next_ask: u64,
    pub clock: PhaseClock,
    pub peer: String,
    /// What operators see.
    pub posting: Posting,
    /// Pages that are missing after the resume.
    pub drain: Drain,
    /// The right to run is ours.
    pub accepted: bool,
    /// The source was told that nothing is missing.
    pub drained_told: bool,
}

impl Driver {
    /// Runs the machine until there is nothing left to do but answering that can be left to others.
    pub(super) fn run(self) -> Outcome {
        let (machine, actions) = DestMachine::begin(OWN_LINK);
        self.run_from(machine, actions)
    }

    /// Runs a machine that has begun already.
    pub(super) fn run_from(mut self, mut machine: DestMachine, actions: Vec<Action>) -> Outcome {
        let started = Instant::now();
        let mut todo: VecDeque<Action> = actions.into();
        let mut events = VecDeque::new();
        let mut timer: Option<Instant> = None;
        let mut last_progress = Instant::now();
        loop {
            while let Some(action) = todo.pop_front() {
                match action {
                    Action::Arm(after) => timer = Some(Instant::now() + after),
                    Action::Disarm => timer = None,
                    Action::Finish(outcome) => {
                        self.posting.end(match outcome {
                            Outcome::Moved => End::Moved,
                            Outcome::NotMoved(_) => End::NotMoved,
                        });
                        if outcome != Outcome::Moved {
                            self.tell_failure();
                        }
                        self.say_goodbye();
                        return outcome;
                    }
                    action => {
                        let step = step_name(&action);
                        match self.perform(action) {
                            Ok(event) => events.extend(event),
                            Err(error) => {
                                todo.clear();
                                events.push_back(self.failed(step, &error));
                            }
                        }
                    }
                }
            }
            let event = match events.pop_front() {
                Some(event) => event,
                None => self.wait(&mut timer, &mut last_progress),
            };
            match machine.handle(started.elapsed(), event) {
                Ok(actions) => todo.extend(actions),
                Err(error) => tracing::error!(%error, "a defect of the driver"),
            }
        }
    }

    pub(super) fn failed(&self, step: &'static str, error: &ActionError) -> Event {
        tracing::warn!(step, error = chain(error), "failed");
        Event::Failed { step, error: chain(error) }
    }

    /// The next event from outside.
    fn wait(&mut self, timer: &mut Option<Instant>, last_progress: &mut Instant) -> Event {
        loop {
            if timer.is_some_and(|t| t <= Instant::now()) {
                *timer = None;
                return Event::Timeout;
            }
            let left =
                timer.map_or(Duration::from_secs(3600), |t| t.saturating_duration_since(Instant::now()));
            if let Some(event) = self.drained() {
                return event;
            }
            self.drain.keep_guarded();
            // Faults are answered elsewhere: whether all is there can only be looked at.
            if self.drain.is_active() && !self.drained_told {
                self.posting.phase(if self.link.is_some() { Phase::Postcopy } else { Phase::Paused });
                self.posting.remaining(self.drain.pages_left());
            }
            let poll = if self.drain.is_active() { left.min(INBOX_POLL) } else { left };
            let arrival = match &self.link {
                Some(_) => self.inbox.try_recv().ok(),
                None => match self.inbox.recv_timeout(poll) {
                    Ok(arrival) => Some(arrival),
                    Err(RecvTimeoutError::Timeout) => continue,
                    // The service is going down: so is this migration, unless it is accepted.
                    Err(RecvTimeoutError::Disconnected) => return Event::Timeout,
                },
            };
            match arrival {
                Some(Arrival::Ask(ask)) => {
                    self.next_ask += 1;
                    self.asks.insert(self.next_ask, ask.answer);
                    return Event::Message(LinkId(self.next_ask), ask.message);
                }
                Some(Arrival::Resume(link)) => {
                    // What is under way on the old connection is void from here on.
                    self.link = Some(*link);
                    return Event::Message(OWN_LINK, Message::Resume);
                }
                None => {}
            }
            let Some(link) = self.link.as_mut() else { continue };
            match link.recv_timeout(left.min(INBOX_POLL)) {
                None => {}
                Some(transport::Incoming::Control(message)) => {
                    let Some(mut message) = self.without_strays(message) else { continue };
                    self.late.extend(late_signals(&mut message));
                    match to_message(*message) {
                        Ok(message) => return Event::Message(OWN_LINK, message),
                        Err(error) => {
                            tracing::warn!(%error, "the source broke the protocol");
                            self.link = None;
                            return Event::LinkLost(OWN_LINK);
                        }
                    }
                }
                Some(transport::Incoming::Lost(error)) => {
                    tracing::info!(error = &error as &dyn std::error::Error, "connection ended");
                    self.link = None;
                    return Event::LinkLost(OWN_LINK);
                }
                Some(transport::Incoming::Frame(frame)) => {
                    if let Some(event) = self.frame(&frame, last_progress) {
                        return event;
                    }
                }
            }
        }
    }

    fn perform(&mut self, action: Action) -> Result<Option<Event>, ActionError> {
        match action {
            Action::Arm(_) | Action::Disarm | Action::Finish(_) => Ok(None),
            Action::Send(to, tell) => Ok(self.send(to, &tell)),
            Action::Build => Ok(Some(self.build())),
            Action::Record(process) => {
                self.record(process, IncomingState::Prepared)?;
                self.posting.phase(Phase::Committing);
                Ok(Some(Event::Recorded))
            }
            Action::Accept => {
                self.clock.begin("accept");
                self.skeleton.as_mut().ok_or(ActionError::Order)?.accept()?;
                Ok(Some(Event::Accepted))
            }
            Action::RecordAccepted => {
                self.accepted = true;
                if let Some(process) = self.process
                    && let Err(error) = self.record(process, IncomingState::Accepted)
                {
                    tracing::error!(error = &error as &dyn std::error::Error, "recording the acceptance");
                }
                Ok(None)
            }
            Action::AddAddresses => {
                self.open_network();
                Ok(None)
            }
            Action::Resume(right) => {
                self.names.publish();
                match self.skeleton.take().map(|skeleton| skeleton.resume(self.stopped, &self.late)) {
                    Some(Ok(())) => reaper::adopt(right.process().pid),
                    Some(Err(error)) => {
                        tracing::error!(error = &error as &dyn std::error::Error, "resuming the process");
                        reaper::adopt(right.process().pid);
                    }
                    None => recover::lower_fence(right.process(), self.stopped, &self.masks),
                }
                self.clock.end();
                self.network_is_open();
                self.posting.phase(if self.drain.is_active() { Phase::Postcopy } else { Phase::Complete });
                Ok(None)
            }
            Action::Attach(_) => {
                if !self.drain.is_done() {
                    self.drain.detach();
                }
                Ok(None)
            }
            Action::KillLost => {
                // What misses pages dies with its end.
                self.drain.finish();
                Ok(None)
            }
            Action::Kill => {
                self.assembly = None;
                self.skeleton = None;
                self.ahead = AheadSockets::default();
                self.connections = SilentConnections::default();
                self.lock = None;
                self.drain.finish();
                Ok(None)
            }
            Action::Forget => {
                Journal::<Incoming>::open(&self.state_dir)?.remove(self.id)?;
                Ok(None)
            }
        }
    }

    /// Preflight of this host, then the process's number.
    fn build(&mut self) -> Event {
        let same_kernel = self.same_kernel();
        let has_hooks = !self.hooks.is_empty();
        let (mut reasons, addresses) =
            super::preflight::check(&self.begin, &self.host, same_kernel, has_hooks);
        self.addresses = addresses;
        // What cannot be read is a reason already.
        self.remaps = parse_remaps(&self.begin.tcp_remaps).unwrap_or_default();
        // Here and not in preflight: only children of this very thread are born into the namespace.
        match clocks::prepare(&self.begin, same_kernel, self.received.as_ref()) {
            Ok(shift) => self.shift = shift,
            Err(error) => {
                let why = format!("cannot go on at the destination: {}", chain(&error));
                reasons.push(Reason::new(format!("clocks of pid {}", self.begin.pid), why, ""));
            }
        }
        if reasons.is_empty() && !self.begin.check_only {
            reasons.extend(self.prepare_lock());
        }
        if reasons.is_empty() && !self.begin.check_only {
            self.consented = true;
            match ReservedPid::take(Tid::try_from(self.begin.pid).unwrap_or(0)) {
                Ok(reserved) => {
                    self.assembly = Some(Assembly::new(reserved.expect_descriptors(self.begin.highest_fd)));
                    self.posting.round(1);
                }
                Err(error) => {
                    self.consented = false;
                    reasons.push(Reason::new(
                        format!("pid {}", self.begin.pid),
                        format!("cannot be used at the destination: {}", chain(&error)),
                        "",
                    ));
                }
            }
        }
        if reasons.is_empty() { Event::Built } else { Event::Unable(reasons) }
    }

    pub(super) fn same_kernel(&self) -> bool {
        let theirs = self.link.as_ref().map(|l| l.peer().hello.boot_id.clone()).unwrap_or_default();
        journal::boot_id().is_ok_and(|ours| ours.as_bytes() == theirs.as_slice())
    }

    fn record(&self, process: ProcessKey, state: IncomingState) -> Result<(), JournalError> {
        Journal::open(&self.state_dir)?.write(&Incoming {
            id: self.id,
            process,
            boot: journal::boot_id()?,
            peer: self.peer.clone(),
            state,
            misses: self.drain.is_active() && !self.drained_told,
            was_stopped: self.stopped,
            masks: self.masks.clone(),
            addresses: self.addresses.as_ref().map(AddressSet::records).unwrap_or_default(),
        })
    }

    /// Nothing is missing any more, and the source does not know yet. Few pages may all be fetched by the
    /// restore: that counts only once the process is ours, or the record below would say so too early.
    fn drained(&mut self) -> Option<Event> {
        if self.drained_told || !self.accepted || !self.drain.is_active() || !self.drain.is_done() {
            return None;
        }
        self.drained_told = true;
        self.posting.remaining(0);
        self.posting.phase(Phase::Complete);
        // The record first: a service that finds it kills the process if it misses pages without us.
        if let Some(process) = self.process
            && let Err(error) = self.record(process, IncomingState::Accepted)
        {
            tracing::error!(error = chain(&error), "recording that nothing is missing");
        }
        self.drain.finish();
        let stats = self.drain.stats();
        tracing::info!(id = %self.id, ?stats, "no page is missing any more");
        Some(Event::Drained(OWN_LINK))
    }

    fn send(&mut self, to: LinkId, tell: &Tell) -> Option<Event> {
        // Only we know whether anything is missing.
        let tell = if *tell == Tell::Resumed && self.drain.is_done() { &Tell::Drained } else { tell };
        let mut extras = Extras { takes_queued: self.queued.is_able(), ..Extras::default() };
        match tell {
            Tell::Prepared | Tell::Committed => {
                (extras.lost_datagrams, extras.made_ahead) = (self.lost_datagrams, self.made_ahead);
                extras.timings = Some(Timings { phase_us: self.clock.so_far().to_micros().collect() });
            }
            Tell::Ready => extras.urgent_port = self.drain.port(),
            Tell::Resumed => (extras.missing, extras.urgent_port) = (self.drain.missing(), self.drain.port()),
            Tell::Drained => extras.stats = self.drain.stats(),
            _ => {}
        }
        let message = to_control(tell, self.id, extras);
        let sent = match (to == OWN_LINK, &self.link) {
            (true, Some(link)) => link.send_control(&message).is_ok(),
            (true, None) => false,
            (false, _) => self.asks.remove(&to.0).is_some_and(|l| l.send_control(&message).is_ok()),
        };
        (!sent).then_some(Event::LinkLost(to))
    }

    fn say_goodbye(&mut self) {
        if let Some(link) = self.link.take() {
            let _ = link.finish(Duration::from_secs(2));
        }
    }
}
