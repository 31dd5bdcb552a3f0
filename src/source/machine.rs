//! The source's half of the protocol: what to do next, decided without I/O.
//!
//! The driver feeds [`Event`]s to [`SourceMachine::handle`] and performs the [`Action`]s it gets, in order.
//! `StartSentinel`, `StartRound`, `Announce`, `Freeze`, `TakeAddresses`, `SendFinal` and `EnterLimbo` can fail: the driver
//! then drops the rest of the list and reports [`Event::Failed`]. All other actions never end the list; a
//! `Send` without a connection is reported as [`Event::LinkLost`] after it.
//!
//! ```text
//!  Asking ──Ready──▶ Copying ◀─┐        ──▶ Freezing ──Frozen──▶ Finishing ──Prepared──▶ Entering
//!    │ Begin sent      │ StartRound;      Freeze              TakeAddresses,           EnterLimbo
//!    │                 │ RoundSent and                        SendFinal                   │
//!    │                 └ RoundPlaced                                                 LimboEntered
//!    │                                                                                    ▼
//!    └─ refused, cancel, link lost, timeout, failure: from every state up to here       Limbo: Commit sent
//!       ▼                                                                               │  │  │
//!     Done(NotMoved): Thaw  ◀───────────────── NotAccepted (Answer, Abort) ─────────────┘  │  │
//!     Done(Unknown): LeaveHeld ◀────────── nobody reached until the deadline ──────────────┼──┘
//!                                                                                          │
//!     Done(Moved): Confirm  ◀── Killed ── Concluding: Conclude ◀── NothingOwed ── Serving ◀┘ Committed,
//!                                                                   or Drained    Serve      Accepted
//!     Done(Unfinished): LeaveHeld ◀── nobody reached until the deadline ── Serving: Resume, again and again
//! ```
//!
//! In limbo the answer is not ours to guess. On link loss or silence the machine connects again and sends
//! Query, with back-off, until the destination says what it did; its answer binds it. Before limbo the
//! destination cannot have accepted, so the process is thawed at once.
//!
//! In post-copy (Serving) the right is gone; what is left here is a store of pages. A lost connection is
//! made again with back-off, and the destination says what it misses.
//!
//! Why the order of the entry matters: journal and sentinel first, the fence second, Commit last. Whoever
//! survives us then finds a process held by the fence only together with a record that says so, and a
//! record of limbo always before the destination can have accepted.

use std::time::Duration;

use crate::engine::reason::Reason;
use crate::migration::{Fate, ProcessKey, RunRight};
use crate::source::policy::{self, FreezeReason, Hurry, Limits, Round, Verdict};
use crate::source::protocol::{Action, Cause, Event, Message, Outcome, Tell, WrongState};

/// Longest wait for the next message before limbo.
pub const PEER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait from the freeze to Prepared, beyond twice what the last pages should take: the process
/// stands still meanwhile.
pub const PREPARE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest such wait in any case.
pub const LONGEST_PREPARE: Duration = Duration::from_secs(120);
/// Longest wait for the answer to a Commit or Query before we connect again.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// First pause between attempts to connect in limbo; doubled each time.
pub const FIRST_RETRY: Duration = Duration::from_millis(20);
/// Longest such pause.
pub const LAST_RETRY: Duration = Duration::from_secs(2);
/// How long the source command asks before it leaves the process held and lets the sentinel go on.
pub const LIMBO_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for the word that nothing is missing, after the last page was sent, before we ask.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it tries to reach a destination that waits for pages, before it leaves that to the sentinel.
pub const RECOVERY_LIMIT: Duration = Duration::from_secs(600);

/// Each state owns what exists in it.
#[derive(Debug)]
enum State {
    Asking {
        right: RunRight,
    },
    Copying {
        right: RunRight,
        round: u32,
        sent: Option<Round>,
        placed: bool,
    },
    Freezing {
        right: RunRight,
        /// For what comes after the freeze.
        patience: Duration,
        give_up: Option<Cause>,
    },
    Finishing {
        right: RunRight,
    },
    Entering {
        right: RunRight,
        give_up: Option<Cause>,
    },
    Limbo {
        right: RunRight,
        deadline: Duration,
        retry: Duration,
        link: Link,
    },
    /// `since`: when the destination was last heard of. `lost`: why the process has ended there.
    Serving {
        right: RunRight,
        since: Duration,
        retry: Duration,
        link: Link,
    },
    Concluding {
        lost: Option<Vec<Reason>>,
    },
    Done,
}

/// The connection, where it may be lost and made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// We wait for an answer on it.
    Up,
    /// It is being opened.
    Opening,
    /// We wait before we open it again.
    Pausing,
    /// Pages travel on it: silence is no reason to doubt it, the transport notices its end.
    InUse,
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            State::Asking { .. } => "asking the destination",
            State::Copying { .. } => "copying memory",
            State::Freezing { .. } => "freezing",
            State::Finishing { .. } => "sending the final state",
            State::Entering { .. } => "preparing the commit",
            State::Limbo { .. } => "waiting for the answer to the commit",
            State::Serving { .. } => "serving missing pages",
            State::Concluding { .. } => "ending the process here",
            State::Done => "done",
        }
    }
}

/// The source of one migration.
#[derive(Debug)]
pub struct SourceMachine {
    state: State,
    limits: Limits,
    rounds: Vec<Round>,
    hurry: Option<Hurry>,
    /// The rounds are over: why the process is frozen next, and what may go before the resume.
    last: Option<(FreezeReason, u64)>,
}

impl SourceMachine {
    /// The machine for `process`, which runs here, and its first actions.
    pub fn start(process: ProcessKey, limits: Limits) -> (Self, Vec<Action>) {
        let state = State::Asking { right: RunRight::of(process) };
        (
            Self { state, limits, rounds: Vec::new(), hurry: None, last: None },
            vec![Action::Send(Tell::Begin), Action::Arm(PEER_TIMEOUT)],
        )
    }

    /// What is being done, for progress lines and errors.
    pub fn state_name(&self) -> &'static str {
        self.state.name()
    }

    /// The completed rounds.
    pub fn rounds(&self) -> &[Round] {
        &self.rounds
    }

    /// Whether a Commit may be under way: neither cancel nor failure decides any more.
    pub fn in_limbo(&self) -> bool {
        matches!(self.state, State::Limbo { .. })
    }

    /// Whether the process runs at the destination, and pages are owed to it.
    pub fn serves(&self) -> bool {
        matches!(self.state, State::Serving { .. })
    }

    /// Takes an event at time `now` (any monotonic clock) and returns what to do about it.
    ///
    /// # Errors
    /// For an event that the driver cannot have in this state; the state stays as it was.
    pub fn handle(&mut self, now: Duration, event: Event) -> Result<Vec<Action>, WrongState> {
        if let Event::Hurry(hurry) = event {
            self.hurry = Some(hurry);
            return Ok(vec![]);
        }
        let state = std::mem::replace(&mut self.state, State::Done);
        let (next, result) = match state {
            State::Asking { right } => self.asking(right, event),
            State::Copying { right, round, sent, placed } => self.copying(right, round, sent, placed, event),
            State::Freezing { right, patience, give_up } => freezing(right, patience, give_up, event),
            State::Finishing { right } => finishing(right, event),
            State::Entering { right, give_up } => entering(now, right, give_up, event),
            State::Limbo { right, deadline, retry, link } => limbo(now, right, deadline, retry, link, event),
            State::Serving { right, since, retry, link } => serving(now, right, since, retry, link, event),
            State::Concluding { lost } => concluding(lost, event),
            // Whatever still arrives (a late answer, a timer) concerns nobody any more.
            State::Done => (State::Done, Ok(vec![])),
        };
        self.state = next;
        result
    }

    fn asking(&mut self, right: RunRight, event: Event) -> Step {
        match event {
            Event::Message(Message::Ready) => {
                let decision = policy::decide(&[], &self.limits, self.hurry);
                let first = match decision.verdict {
                    Verdict::Freeze(reason) if decision.eager_pages == 0 => self.announce(1, reason, 0),
                    _ => Action::StartRound(1),
                };
                let actions = vec![Action::StartSentinel, first, Action::Arm(PEER_TIMEOUT)];
                (State::Copying { right, round: 1, sent: None, placed: false }, Ok(actions))
            }
            Event::Message(Message::Refused(reasons)) => stay(right, Cause::Refused(reasons), Held::Running),
            other => ended(State::Asking { right }, other),
        }
    }

    /// What is dirty is announced before the freeze, so that the freeze has to deal only with the rest.
    fn announce(&mut self, round: u32, reason: FreezeReason, eager_pages: u64) -> Action {
        self.last = Some((reason, eager_pages));
        Action::Announce(round)
    }

    fn copying(
        &mut self,
        right: RunRight,
        round: u32,
        sent: Option<Round>,
        placed: bool,
        event: Event,
    ) -> Step {
        let (sent, placed) = match event {
            Event::RoundSent(measured) if sent.is_none() => (Some(measured), placed),
            Event::Message(Message::RoundPlaced(n)) if n == round && !placed => (sent, true),
            other => return ended(State::Copying { right, round, sent, placed }, other),
        };
        let Some(measured) = sent.filter(|_| placed) else {
            return (State::Copying { right, round, sent, placed }, Ok(vec![Action::Arm(PEER_TIMEOUT)]));
        };
        if let Some((reason, eager_pages)) = self.last {
            return freeze(right, reason, eager_pages, Duration::ZERO);
        }
        self.rounds.push(measured);
        let decision = policy::decide(&self.rounds, &self.limits, self.hurry);
        let next = round + 1;
        let action = match decision.verdict {
            Verdict::Continue => Action::StartRound(next),
            Verdict::Freeze(reason)
                if reason == FreezeReason::Converged || decision.eager_pages == u64::MAX =>
            {
                return freeze(right, reason, decision.eager_pages, decision.downtime);
            }
            Verdict::Freeze(reason) => self.announce(next, reason, decision.eager_pages),
        };
        let state = State::Copying { right, round: next, sent: None, placed: false };
        (state, Ok(vec![action, Action::Arm(PEER_TIMEOUT)]))
    }
}

fn freeze(right: RunRight, reason: FreezeReason, eager_pages: u64, downtime: Duration) -> Step {
    // On a slow link a limit that does not know of its pace would freeze only to give up.
    let patience = PREPARE_TIMEOUT.saturating_add(downtime.saturating_mul(2));
    let patience = patience.min(LONGEST_PREPARE);
    let actions = vec![Action::Freeze { reason, eager_pages }];
    (State::Freezing { right, patience, give_up: None }, Ok(actions))
}

type Step = (State, Result<Vec<Action>, WrongState>);

/// How far the process is held; decides what must be undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Running,
    Frozen,
    Fenced,
}

/// The process stays: everything is undone, then the destination is told, best effort.
fn stay(right: RunRight, cause: Cause, held: Held) -> Step {
    let mut actions = Vec::new();
    if held == Held::Fenced {
        actions.push(Action::LowerFence);
    }
    if held != Held::Running {
        actions.push(Action::ReturnAddresses);
    }
    actions.push(Action::Thaw(right));
    if !matches!(cause, Cause::Refused(_) | Cause::GivenUp(_) | Cause::NotAccepted | Cause::LinkLost(_)) {
        actions.push(Action::Send(Tell::Abort(cause.clone())));
    }
    actions.push(Action::Forget);
    actions.push(Action::Finish(Outcome::NotMoved(cause)));
    (State::Done, Ok(actions))
}

/// The events that end any state before limbo; all others are wrong there.
fn ended(state: State, event: Event) -> Step {
    let cause = match cause_of(&state, event) {
        Ok(cause) => cause,
        Err(wrong) => return (state, Err(wrong)),
    };
    match state {
        State::Asking { right } | State::Copying { right, .. } => stay(right, cause, Held::Running),
        State::Finishing { right } => stay(right, cause, Held::Frozen),
        // The driver is in the middle of it: wait for its report, or a thaw would overtake the freeze.
        State::Freezing { right, patience, give_up } => {
            (State::Freezing { right, patience, give_up: give_up.or(Some(cause)) }, Ok(vec![]))
        }
        State::Entering { right, give_up } => {
            (State::Entering { right, give_up: give_up.or(Some(cause)) }, Ok(vec![]))
        }
        state @ (State::Limbo { .. } | State::Serving { .. } | State::Concluding { .. } | State::Done) => {
            (state, Ok(vec![]))
        }
    }
}

/// Why this event ends the migration in this state before limbo.
fn cause_of(state: &State, event: Event) -> Result<Cause, WrongState> {
    Ok(match event {
        Event::Message(Message::Abort(reasons)) => Cause::GivenUp(reasons),
        Event::Message(message) => Cause::Protocol { message: format!("{message:?}"), state: state.name() },
        Event::LinkLost => Cause::LinkLost(state.name()),
        Event::Timeout => Cause::Timeout(state.name()),
        Event::Cancel => Cause::Cancelled,
        Event::Failed { step, error } => Cause::Failed { step, error },
        other => return Err(WrongState { event: format!("{other:?}"), state: state.name() }),
    })
}

fn freezing(right: RunRight, patience: Duration, give_up: Option<Cause>, event: Event) -> Step {
    match (event, give_up) {
        (Event::Frozen, None) => {
            // What hooks of the operator's take, he has to know himself.
            let actions = vec![Action::TakeAddresses, Action::Arm(patience), Action::SendFinal];
            (State::Finishing { right }, Ok(actions))
        }
        (Event::Frozen, Some(cause)) => stay(right, cause, Held::Frozen),
        (Event::Failed { step, error }, give_up) => {
            stay(right, give_up.unwrap_or(Cause::Failed { step, error }), Held::Frozen)
        }
        (other, give_up) => ended(State::Freezing { right, patience, give_up }, other),
    }
}

fn finishing(right: RunRight, event: Event) -> Step {
    match event {
        Event::Message(Message::Prepared) => {
            (State::Entering { right, give_up: None }, Ok(vec![Action::EnterLimbo]))
        }
        other => ended(State::Finishing { right }, other),
    }
}

fn entering(now: Duration, right: RunRight, give_up: Option<Cause>, event: Event) -> Step {
    match (event, give_up) {
        (Event::LimboEntered, None) => {
            let deadline = now.saturating_add(LIMBO_LIMIT);
            let actions = vec![Action::Send(Tell::Commit), Action::Arm(ANSWER_TIMEOUT)];
            (State::Limbo { right, deadline, retry: FIRST_RETRY, link: Link::Up }, Ok(actions))
        }
        // Commit was not sent, so the answer is known without asking.
        (Event::LimboEntered, Some(cause)) => stay(right, cause, Held::Fenced),
        (Event::Failed { step, error }, give_up) => {
            stay(right, give_up.unwrap_or(Cause::Failed { step, error }), Held::Fenced)
        }
        (other, give_up) => ended(State::Entering { right, give_up }, other),
    }
}

fn limbo(
    now: Duration,
    right: RunRight,
    deadline: Duration,
    retry: Duration,
    link: Link,
    event: Event,
) -> Step {
    let again = |right, retry, link, actions| (State::Limbo { right, deadline, retry, link }, Ok(actions));
    match event {
        // An answer by a connection that is gone; the next one goes on from there.
        Event::Message(Message::Committed | Message::Answer(Fate::Accepted)) if link != Link::Up => {
            (State::Serving { right, since: now, retry, link }, Ok(vec![]))
        }
        Event::Message(Message::Committed) => {
            let next = State::Serving { right, since: now, retry: FIRST_RETRY, link: Link::InUse };
            (next, Ok(vec![Action::Serve]))
        }
        // By another connection than the one that began: the destination has to take it for its pages.
        Event::Message(Message::Answer(Fate::Accepted)) => {
            let next = State::Serving { right, since: now, retry: FIRST_RETRY, link: Link::Up };
            (next, Ok(vec![Action::Send(Tell::Resume), Action::Arm(ANSWER_TIMEOUT)]))
        }
        Event::Message(Message::Answer(Fate::NotAccepted)) => stay(right, Cause::NotAccepted, Held::Fenced),
        // A destination that gives up says so only when it can no longer accept.
        Event::Message(Message::Abort(reasons)) => stay(right, Cause::GivenUp(reasons), Held::Fenced),
        Event::Connected => {
            let actions = vec![Action::Send(Tell::Query), Action::Arm(ANSWER_TIMEOUT)];
            again(right, retry, Link::Up, actions)
        }
        Event::LinkLost | Event::Timeout if now >= deadline => {
            (State::Done, Ok(vec![Action::LeaveHeld(right), Action::Finish(Outcome::Unknown)]))
        }
        Event::LinkLost => {
            if link == Link::Pausing {
                return again(right, retry, link, vec![]);
            }
            again(right, (retry * 2).min(LAST_RETRY), Link::Pausing, vec![Action::Arm(retry)])
        }
        // Silence, or the end of the pause. The old connection may only be slow; a new one finds out.
        Event::Timeout => {
            again(right, retry, Link::Opening, vec![Action::Connect, Action::Arm(ANSWER_TIMEOUT)])
        }
        // Too late to cancel; too early to fail: only the destination's answer counts now. The same goes
        // for messages that make no sense, which a peer may not use to start the process twice.
        Event::Cancel | Event::Failed { .. } | Event::Message(_) => again(right, retry, link, vec![]),
        other => {
            let state = State::Limbo { right, deadline, retry, link };
            let wrong = WrongState { event: format!("{other:?}"), state: state.name() };
            (state, Err(wrong))
        }
    }
}

/// The process runs there; here are the pages that it misses.
fn serving(
    now: Duration,
    right: RunRight,
    since: Duration,
    retry: Duration,
    link: Link,
    event: Event,
) -> Step {
    let again =
        |right, since, retry, link, actions| (State::Serving { right, since, retry, link }, Ok(actions));
    match event {
        Event::NothingOwed | Event::Message(Message::Drained) => {
            (State::Concluding { lost: None }, Ok(vec![Action::Conclude(right)]))
        }
        Event::Message(Message::Lost(reasons)) => {
            (State::Concluding { lost: Some(reasons) }, Ok(vec![Action::Conclude(right)]))
        }
        Event::Message(Message::Resumed) => again(right, now, FIRST_RETRY, Link::InUse, vec![Action::Serve]),
        Event::Connected => {
            let actions = vec![Action::Send(Tell::Resume), Action::Arm(ANSWER_TIMEOUT)];
            again(right, since, retry, Link::Up, actions)
        }
        // Only now is silence strange: Drained has to follow.
        Event::AllSent if link == Link::InUse => {
            again(right, now, retry, Link::Up, vec![Action::Arm(DRAIN_TIMEOUT)])
        }
        Event::AllSent => again(right, since, retry, link, vec![]),
        Event::Timeout if link == Link::InUse => again(right, since, retry, link, vec![]),
        Event::LinkLost | Event::Timeout
            if link != Link::InUse && now.saturating_sub(since) >= RECOVERY_LIMIT =>
        {
            (State::Done, Ok(vec![Action::LeaveHeld(right), Action::Finish(Outcome::Unfinished)]))
        }
        Event::LinkLost => {
            let since = if link == Link::InUse { now } else { since };
            if link == Link::Pausing {
                return again(right, since, retry, link, vec![]);
            }
            again(right, since, (retry * 2).min(LAST_RETRY), Link::Pausing, vec![Action::Arm(retry)])
        }
        Event::Timeout => {
            again(right, since, retry, Link::Opening, vec![Action::Connect, Action::Arm(ANSWER_TIMEOUT)])
        }
        // The pages cannot be read any more: the process there must not wait for ever. It answers Lost.
        Event::Failed { step, error } => {
            let gone = Tell::Gone(Cause::Failed { step, error });
            again(right, since, retry, link, vec![Action::Send(gone)])
        }
        // Long too late to cancel; and no message takes back what was accepted.
        Event::Cancel | Event::Message(_) => again(right, since, retry, link, vec![]),
        other => {
            let state = State::Serving { right, since, retry, link };
            let wrong = WrongState { event: format!("{other:?}"), state: state.name() };
            (state, Err(wrong))
        }
    }
}

fn concluding(lost: Option<Vec<Reason>>, event: Event) -> Step {
    let Event::Killed { recorded } = event else {
        // The decision is made; nothing that happens to the link changes it.
        return (State::Concluding { lost }, Ok(vec![]));
    };
    let mut actions = Vec::new();
    if recorded {
        actions.push(Action::Send(Tell::Confirm));
    }
    actions.push(Action::Forget);
    actions.push(Action::Finish(lost.map_or(Outcome::Moved, Outcome::Lost)));
    (State::Done, Ok(actions))
}
