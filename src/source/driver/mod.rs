//! Performs what the source's machine asks for: the engine, the journal, the sentinel, the connection.
//!
//! Runs on one thread, which is the tracer of the process. The network has a thread of its own (see
//! `transport`), so frames leave while the next ones are read.

mod ahead;
mod backlog;
mod doors;
mod handshakes;
mod late;
mod network;
mod orphans;
mod perform;
mod queued;
mod strays;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::handshakes::Handshakes;
use super::machine::SourceMachine;
use super::pace::Pacer;
use super::policy::{self, Limits, Order, Told};
use super::precopy::{Precopy, PrecopyError};
use super::protocol::{Action, Cause, Event, Message, Outcome};
use super::sentinel::{self, Sentinel};
use super::serving::Serving;
use super::wire::{Extras, last_word, to_message};
use crate::config::SourceConfig;
use crate::engine::address::AddressSet;
use crate::engine::capture::CaptureError;
use crate::engine::clocks::ClockError;
use crate::engine::dirty::TrackError;
use crate::engine::freeze::{FreezeError, Frozen};
use crate::engine::hook::{self, HookError, Hooks};
use crate::engine::late::Seen;
use crate::engine::lock::{Concerned, Connection, Lock, LockError};
use crate::engine::memory::MemoryError;
use crate::engine::reason::{Reason, chain};
use crate::engine::remote::{InjectError, Tid};
use crate::engine::sleep::SleepBook;
use crate::engine::state::files::{Descriptors, EarlyLook, Lasting, ScannedProcesses};
use crate::engine::undertaker::Undertaker;
use crate::identity::Node;
use crate::journal::{Journal, JournalError, Outgoing};
use crate::migration::{MigrationId, ProcessKey};
use crate::operator::{End, Posting};
use crate::pageserver::frame::FrameError;
use crate::proto::control::{Begin, LateSignal, PageRuns};
use crate::report::{PhaseClock, Report};
use crate::transport::{Incoming, Link, Settings, TransportError};
use crate::wire::Hello;

/// How long threads may take to stop.
const FREEZE_PATIENCE: Duration = Duration::from_secs(2);
/// How often the operator's orders are looked for.
const ORDER_POLL: Duration = Duration::from_millis(100);
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
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Urgent(#[from] TransportError),
    #[error("starting to push owed pages")]
    Push(#[source] std::io::Error),
    #[error("the destination's list of missing pages")]
    Missing(#[source] FrameError),
    #[error("connections that were closed are not at their end")]
    Orphans(Vec<Reason>),
    /// The process has something by now that stays behind.
    #[error("what the process has begun since it was looked at first")]
    Begun(Vec<Reason>),
    #[error("sharing the lock with the sentinel")]
    Share(#[source] std::io::Error),
    #[error("starting a thread")]
    Thread(#[source] std::io::Error),
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
    /// What operators see and want.
    pub posting: Posting,
    /// When the migration began.
    pub began: Instant,
    pub report: Report,
    /// Processes that preflight has looked at for shared descriptors.
    pub scanned: ScannedProcesses,
    /// Its sockets that have been there for a while.
    pub lasting: Lasting,
    /// The operator's.
    pub hooks: Hooks,
    pub state: Held,
}

/// What is held of the process and of this host.
#[derive(Default)]
pub(super) struct Held {
    precopy: Option<Precopy>,
    pacer: Option<Pacer>,
    undertaker: Option<Undertaker>,
    frozen: Option<Frozen>,
    sleeps: SleepBook,
    /// Connections that are given up, and those that are carried.
    closing: Vec<OwnedFd>,
    carried: Vec<OwnedFd>,
    addresses: Option<AddressSet>,
    taken: bool,
    /// The descriptors of the frozen process, where they were looked at before the capture.
    descriptors: Option<Descriptors>,
    /// What was seen of its connections just before.
    early: Option<EarlyLook>,
    /// What has come from the destination and was not looked at yet.
    unread: VecDeque<Incoming>,
    /// Keeps connections that are carried quiet, from the freeze on.
    lock: Option<Lock>,
    /// Which connections that nobody has any more would lose something by the move.
    orphans: Option<Concerned>,
    /// Those that wait to be accepted; whether the destination can put such into a queue.
    queued: Vec<Connection>,
    takes_queued: bool,
    handshakes: Handshakes,
    /// Why some of them cannot be carried at all.
    against_queued: Vec<Reason>,
    /// What comes for the process meanwhile.
    kept: strays::Kept,
    /// The hooks for taking the network away were run, or some of them: they are to be told when it is back.
    unlock_due: bool,
    /// The hooks that are told of the resume.
    resumed: Option<hook::Running>,
    journal: Option<Journal<Outgoing>>,
    sentinel: Option<Sentinel>,
    was_stopped: bool,
    /// The signals that the captured state has, and those that came after it.
    seen: Seen,
    late: Vec<LateSignal>,
    frozen_at: Option<Instant>,
    told: Told,
    /// Where the destination takes requests for single pages of its own.
    urgent_port: u16,
    /// What may go between freeze and resume.
    eager_pages: u64,
    /// The service of owed pages; none if nothing may follow.
    serving: Option<Serving>,
    owes: bool,
    /// What the destination misses, by its last word.
    missing: Option<PageRuns>,
    committed_at: Option<Instant>,
    lost_at: Option<Instant>,
    reasons: Vec<Reason>,
}

impl Driver<'_> {
    fn pid(&self) -> Tid {
        self.config.pid
    }

    /// Runs the machine to its end and completes the report. True: the destination's preflight refused, and the
    /// process was not touched.
    pub(super) fn run(mut self) -> (Report, bool) {
        let limits = Limits {
            mode: self.config.mode,
            max_downtime: self.config.max_downtime,
            max_rounds: self.config.max_rounds,
        };
        let started = Instant::now();
        let mut clock = PhaseClock::start();
        clock.begin("prepare");
        self.await_orphans();
        let (mut machine, actions) = SourceMachine::start(self.process, limits);
        let mut events = VecDeque::new();
        let mut timer: Option<Instant> = None;
        let mut outcome = None;
        let mut todo: VecDeque<Action> = actions.into();
        loop {
            while let Some(action) = todo.pop_front() {
                match action {
                    Action::Arm(after) => timer = Some(Instant::now() + after),
                    Action::Finish(end) => outcome = Some(end),
                    action => {
                        let step = step_name(&action);
                        let freezes = matches!(action, Action::Freeze { .. });
                        match self.perform(action, &mut machine, &limits, &mut clock) {
                            Ok(event) => events.extend(event),
                            Err(error) => {
                                tracing::warn!(step, error = chain(&error), "failed");
                                todo.clear();
                                if let Some(reasons) = refusals(&error) {
                                    self.state.reasons.extend(reasons);
                                }
                                let event = self.failure(step, &error);
                                // The machine waits for the end of the freeze, whatever comes meanwhile.
                                let is_told = matches!(event, Event::Failed { .. });
                                events.push_back(event);
                                if freezes && !is_told {
                                    events.push_back(Event::Failed { step, error: chain(&error) });
                                }
                            }
                        }
                    }
                }
            }
            if let Some(outcome) = outcome.take() {
                let refused = matches!(outcome, Outcome::NotMoved(Cause::Refused(_)));
                return (self.conclude(outcome, clock, started), refused);
            }
            let event = match events.pop_front() {
                Some(event) => event,
                None => self.wait(&mut timer, &mut clock),
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
            if let Some(event) = self.news().or_else(|| self.service_news()) {
                return event;
            }
            let wait = timer.map_or(ORDER_POLL, |t| (t - now).min(ORDER_POLL));
            let Some(link) = self.link.as_mut() else {
                std::thread::sleep(wait);
                continue;
            };
            match self.state.unread.pop_front().or_else(|| link.recv_timeout(wait)) {
                None => {}
                Some(Incoming::Control(message)) if ahead::is_made(&message) => {}
                Some(Incoming::Control(message)) => match to_message(*message) {
                    Ok((message, extras)) => {
                        self.take_extras(&message, extras, clock);
                        return Event::Message(message);
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the destination broke the protocol");
                        self.lose_link();
                        return Event::LinkLost;
                    }
                },
                Some(Incoming::Frame(_)) => {}
                Some(Incoming::Lost(error)) => {
                    tracing::info!(error = &error as &dyn std::error::Error, "connection ended");
                    self.lose_link();
                    return Event::LinkLost;
                }
            }
        }
    }

    /// What the operator or the clock wants, as far as the machine does not know it yet.
    fn news(&mut self) -> Option<Event> {
        Some(match self.state.told.news(ordered(&self.posting, self.config, self.began))? {
            Order::Cancel => Event::Cancel,
            Order::Hurry(hurry) => Event::Hurry(hurry),
        })
    }

    /// What came beside the word.
    fn take_extras(&mut self, message: &Message, extras: Extras, clock: &mut PhaseClock) {
        match message {
            Message::Ready => {
                self.state.urgent_port = extras.urgent_port;
                self.state.takes_queued = extras.takes_queued;
            }
            Message::Prepared => clock.begin("commit"),
            Message::Committed => {
                if let Some(since) = self.state.frozen_at {
                    self.report.downtime = since.elapsed();
                }
                clock.end();
                self.pass_strays();
                self.pass_queued();
                self.tell_lost_handshakes();
            }
            Message::Resumed => {
                self.state.urgent_port = extras.urgent_port;
                self.state.missing = extras.missing;
                // Where the word of the commit was lost.
                self.pass_queued();
            }
            Message::Drained => self.take_stats(extras.stats),
            _ => {}
        }
        self.report.connections_ahead = self.report.connections_ahead.max(extras.made_ahead);
        if extras.lost_datagrams > 0 {
            let why = format!("{} that were not read yet were lost on the way", extras.lost_datagrams);
            self.report.notes.push(Reason::new("datagrams", why, ""));
        }
        if let Some(timings) = extras.timings {
            self.report.phases.add_remote("dest_", &timings.phase_us);
        }
    }

    fn failure(&mut self, step: &'static str, error: &ActionError) -> Event {
        // A broken link while frames are sent is the link's fault, not the step's.
        if let ActionError::Precopy(PrecopyError::Cancelled) = error {
            return Event::Cancel;
        }
        if matches!(error, ActionError::Precopy(PrecopyError::Pack(_)))
            && let Some(event) = self.farewell()
        {
            return event;
        }
        Event::Failed { step, error: chain(error) }
    }

    /// What the destination said before it ended the link, or that it is lost; `None` while it is there.
    fn farewell(&mut self) -> Option<Event> {
        let mut unread = std::mem::take(&mut self.state.unread);
        let event = self.link.as_mut().map_or(Some(Event::LinkLost), |link| last_word(&mut unread, link));
        if matches!(event, Some(Event::LinkLost)) {
            self.lose_link();
        }
        event
    }

    fn conclude(mut self, outcome: Outcome, clock: PhaseClock, started: Instant) -> Report {
        self.posting.end(match &outcome {
            Outcome::Moved => End::Moved,
            Outcome::NotMoved(_) => End::NotMoved,
            Outcome::Unknown | Outcome::Unfinished | Outcome::Lost(_) => End::Unknown,
        });
        let stats = self.state.precopy.as_ref().map(Precopy::stats).unwrap_or_default();
        self.report.pages_zero = stats.pages_zero;
        self.report.pages_data = stats.pages_data;
        self.report.bytes_wire = stats.bytes_wire;
        if stats.bytes_wire > 0 && stats.pages_data > 0 {
            #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
            let ratio = stats.bytes_raw as f64 / stats.bytes_wire as f64;
            self.report.compression_ratio = ratio;
        }
        self.count_served();
        self.state.serving = None;
        self.tell_the_end(&outcome);
        if let Some(link) = self.link.take() {
            let _ = link.finish(FINISH_PATIENCE);
        }
        let remote = std::mem::take(&mut self.report.phases);
        self.report.phases = clock.finish();
        self.report.phases.merge(remote);
        self.report.total = started.elapsed();
        self.report.settle_mode();
        if let (Outcome::NotMoved(Cause::Cancelled), Some(timeout)) = (&outcome, self.config.timeout)
            && !self.posting.orders().cancelled()
        {
            let why = format!("the time for it was over (--timeout {:?})", timeout.after);
            self.state.reasons.push(Reason::new("migration", why, "give it more, or --on-timeout postcopy"));
        }
        super::outcome::describe(&mut self.report, outcome, std::mem::take(&mut self.state.reasons));
        self.report
    }
}

/// What is wanted of the migration now.
fn ordered(posting: &Posting, config: &SourceConfig, began: Instant) -> Option<Order> {
    let orders = posting.orders();
    policy::order(began.elapsed(), config.timeout, orders.cancelled(), orders.postcopy())
}

fn step_name(action: &Action) -> &'static str {
    match action {
        Action::StartSentinel => "starting the sentinel",
        Action::StartRound(_) => "copying memory",
        Action::Announce(_) => "announcing what is to follow",
        Action::Freeze { .. } => "freezing the process",
        Action::Serve => "serving owed pages",
        Action::TakeAddresses => "taking the network",
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
        ActionError::Orphans(reasons) | ActionError::Begun(reasons) => Some(reasons.clone()),
        _ => None,
    }
}
