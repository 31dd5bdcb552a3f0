//! The destination's half of the protocol: what to do next, decided without I/O.
//!
//! One [`DestMachine`] per migration id. The driver feeds it [`Event`]s and performs the [`Action`]s it
//! gets, in order. `Build`, `Record` and `Accept` can fail: the driver then drops the rest of the list and
//! reports [`Event::Failed`]. All other actions never end the list; a `Send` without a connection is
//! reported as [`Event::LinkLost`] after it.
//!
//! ```text
//!  Building ──Built──▶ Receiving ──Applied──▶ Recording ──Recorded──▶ Prepared ──Commit──▶ Accepting
//!    Build               │ RoundPlaced           Record                 Prepared sent        Accept │
//!    │                   │                       │                      │                           │
//!    └───────────────────┴───────────────────────┴──────────────────────┤                  Accepted │
//!       link lost, timeout, abort, failure, and Query: all of them bind │                           ▼
//!       ▼                                                               │          Running: Committed sent
//!     GivenUp: Kill, Forget, Finish ◀── Failed (nothing accepted) ──────┴─ Accepting                │
//!       answers Commit with Abort, Query with NotAccepted                                   Confirm │
//!                                                                                                   ▼
//!     a restarted service: [`DestMachine::recovered`] ──▶ Running or GivenUp        Done: Forget, Finish
//! ```
//!
//! The acceptance is one system call: `Accept` clears PTRACE_O_EXITKILL on every thread, the leader last.
//! Before it our death kills the skeleton, after it the process outlives us, so the kernel itself keeps the
//! truth and [`DestMachine::recovered`] only has to look whether the process is there. For a process that
//! could run and end between the acceptance and its record that look would say "never accepted", and the
//! source would run it a second time. So `Accept` first puts a SIGSTOP in front of it, as the source does
//! in limbo: until `Resume` the process survives our death only as a stopped one.
//!
//! For an id without a machine the answer is [`Fate::NotAccepted`]. Looking it up, handling the message and
//! the making of a new machine must exclude each other, or that answer would not bind.

use std::time::Duration;

use crate::dest::protocol::{Action, Cause, Event, LinkId, Message, Outcome, Tell, WrongState};
use crate::engine::reason::Reason;
use crate::migration::{Fate, ProcessKey, RunRight};

/// Longest silence of the source before it freezes the process.
pub const SOURCE_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait from Prepared to Commit. The process stands still at the source meanwhile.
pub const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Each state owns what exists in it. `link` is the connection that began the migration.
#[derive(Debug)]
enum State {
    Building {
        link: LinkId,
    },
    Receiving {
        link: LinkId,
    },
    Recording {
        link: LinkId,
        process: ProcessKey,
    },
    Prepared {
        link: LinkId,
        process: ProcessKey,
    },
    /// `asked`: where to answer once we know.
    Accepting {
        asked: Vec<(LinkId, Message)>,
        process: ProcessKey,
    },
    Running,
    GivenUp,
    Done,
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            State::Building { .. } => "building the skeleton",
            State::Receiving { .. } => "receiving",
            State::Recording { .. } => "recording the process",
            State::Prepared { .. } => "waiting for the commit",
            State::Accepting { .. } => "accepting",
            State::Running => "running the process",
            State::GivenUp => "given up",
            State::Done => "done",
        }
    }
}

type Step = (State, Result<Vec<Action>, WrongState>);

/// The destination of one migration.
#[derive(Debug)]
pub struct DestMachine {
    state: State,
}

impl DestMachine {
    /// The machine for a migration that began on `link`, and its first actions.
    pub fn begin(link: LinkId) -> (Self, Vec<Action>) {
        (Self { state: State::Building { link } }, vec![Action::Build, Action::Arm(SOURCE_TIMEOUT)])
    }

    /// The machine for a journal entry that a restarted service found. `accepted` is what the entry says;
    /// `alive` whether this very process (number and start time) exists and will go on existing: see
    /// `engine::alive::open_untraced`.
    pub fn recovered(process: ProcessKey, accepted: bool, alive: bool) -> (Self, Vec<Action>) {
        if accepted || alive {
            let actions =
                vec![Action::RecordAccepted, Action::AddAddresses, Action::Resume(RunRight::of(process))];
            (Self { state: State::Running }, actions)
        } else {
            let actions = vec![Action::Forget, Action::Finish(Outcome::NotMoved(Cause::Restarted))];
            (Self { state: State::GivenUp }, actions)
        }
    }

    /// What is being done, for logs and errors.
    pub fn state_name(&self) -> &'static str {
        self.state.name()
    }

    /// Takes an event and returns what to do about it. `now` is not needed yet; it keeps both machines alike.
    ///
    /// # Errors
    /// For an event that the driver cannot have in this state; the state stays as it was.
    pub fn handle(&mut self, _now: Duration, event: Event) -> Result<Vec<Action>, WrongState> {
        let state = std::mem::replace(&mut self.state, State::Done);
        let (next, result) = match state {
            State::Building { link } => building(link, event),
            State::Receiving { link } => receiving(link, event),
            State::Recording { link, process } => recording(link, process, event),
            State::Prepared { link, process } => prepared(link, process, event),
            State::Accepting { asked, process } => accepting(asked, process, event),
            State::Running => running(event),
            State::GivenUp => (State::GivenUp, Ok(answer_given_up(event))),
            State::Done => (State::Done, Ok(answer_done(event))),
        };
        self.state = next;
        result
    }
}

/// What to answer for an id that no machine exists for: never accepted, or confirmed by the source.
pub fn answer_unknown(message: &Message) -> Option<Tell> {
    match message {
        Message::Query => Some(Tell::Answer(Fate::NotAccepted)),
        Message::Commit => Some(Tell::Abort(vec![])),
        // Only a source that was accepted says these; with us no such process is known.
        Message::Resume => Some(Tell::Answer(Fate::NotAccepted)),
        Message::Confirm | Message::Abort(_) | Message::Gone(_) => None,
    }
}

fn building(link: LinkId, event: Event) -> Step {
    match event {
        Event::Built => (
            State::Receiving { link },
            Ok(vec![Action::Send(link, Tell::Ready), Action::Arm(SOURCE_TIMEOUT)]),
        ),
        Event::Unable(reasons) => {
            give_up(Cause::Unable(reasons.clone()), Some((link, Tell::Refused(reasons))))
        }
        other => ended(State::Building { link }, link, other),
    }
}

fn receiving(link: LinkId, event: Event) -> Step {
    let state = State::Receiving { link };
    match event {
        Event::Progress => (state, Ok(vec![Action::Arm(SOURCE_TIMEOUT)])),
        Event::RoundPlaced(round) => {
            (state, Ok(vec![Action::Send(link, Tell::RoundPlaced(round)), Action::Arm(SOURCE_TIMEOUT)]))
        }
        Event::Applied(process) => (
            State::Recording { link, process },
            Ok(vec![Action::Record(process), Action::Arm(COMMIT_TIMEOUT)]),
        ),
        other => ended(state, link, other),
    }
}

fn recording(link: LinkId, process: ProcessKey, event: Event) -> Step {
    match event {
        Event::Recorded => (
            State::Prepared { link, process },
            Ok(vec![Action::Send(link, Tell::Prepared), Action::Arm(COMMIT_TIMEOUT)]),
        ),
        other => ended(State::Recording { link, process }, link, other),
    }
}

fn prepared(link: LinkId, process: ProcessKey, event: Event) -> Step {
    match event {
        Event::Message(from, Message::Commit) => {
            let asked = vec![(from, Message::Commit)];
            (State::Accepting { asked, process }, Ok(vec![Action::Disarm, Action::Accept]))
        }
        other => ended(State::Prepared { link, process }, link, other),
    }
}

fn accepting(mut asked: Vec<(LinkId, Message)>, process: ProcessKey, event: Event) -> Step {
    match event {
        Event::Accepted => {
            let right = RunRight::of(process);
            let mut actions = vec![Action::RecordAccepted, Action::AddAddresses, Action::Resume(right)];
            actions.extend(asked.iter().filter_map(|(link, m)| answer_accepted(*link, m)));
            (State::Running, Ok(actions))
        }
        Event::Failed { step, error } => {
            let (next, result) = give_up(Cause::Failed { step, error }, None);
            let late = asked.iter().filter_map(|(link, m)| Some(Action::Send(*link, answer_unknown(m)?)));
            (next, result.map(|actions| with_answers(actions, late)))
        }
        // The call is under way and cannot be taken back: whoever asks now is answered after it.
        Event::Message(from, message @ (Message::Commit | Message::Query)) => {
            if asked.len() < MAX_ASKED {
                asked.push((from, message));
            }
            (State::Accepting { asked, process }, Ok(vec![]))
        }
        _ => (State::Accepting { asked, process }, Ok(vec![])),
    }
}

/// Questions kept while the acceptance is under way; a peer that asks more often asks again later.
const MAX_ASKED: usize = 16;

fn running(event: Event) -> Step {
    match event {
        Event::Message(_, Message::Confirm) => {
            (State::Done, Ok(vec![Action::Forget, Action::Finish(Outcome::Moved)]))
        }
        // Drained follows where nothing is missing: the driver knows.
        Event::Message(from, Message::Resume) => {
            (State::Running, Ok(vec![Action::Attach(from), Action::Send(from, Tell::Resumed)]))
        }
        Event::Message(from, Message::Gone(reasons)) => {
            (State::Running, Ok(vec![Action::KillLost, Action::Send(from, Tell::Lost(reasons))]))
        }
        Event::Drained(link) => (State::Running, Ok(vec![Action::Send(link, Tell::Drained)])),
        Event::Message(from, message) => {
            (State::Running, Ok(answer_accepted(from, &message).into_iter().collect()))
        }
        _ => (State::Running, Ok(vec![])),
    }
}

/// Once accepted, each question has one answer; an Abort comes too late and is answered like a Query.
fn answer_accepted(link: LinkId, message: &Message) -> Option<Action> {
    match message {
        Message::Commit => Some(Action::Send(link, Tell::Committed)),
        Message::Query | Message::Abort(_) => Some(Action::Send(link, Tell::Answer(Fate::Accepted))),
        // After the confirmation: nothing can be missing.
        Message::Resume => Some(Action::Send(link, Tell::Drained)),
        Message::Confirm | Message::Gone(_) => None,
    }
}

fn answer_given_up(event: Event) -> Vec<Action> {
    let Event::Message(link, message) = event else { return vec![] };
    answer_unknown(&message).map(|send| Action::Send(link, send)).into_iter().collect()
}

/// Confirmed: the process at the source is dead, so "accepted" is true for ever, as long as we exist.
fn answer_done(event: Event) -> Vec<Action> {
    let Event::Message(link, message) = event else { return vec![] };
    answer_accepted(link, &message).into_iter().collect()
}

/// Gives up: from here on nothing can be accepted. The answer goes out last, when nothing is left.
fn give_up(cause: Cause, answer: Option<(LinkId, Tell)>) -> Step {
    let actions = vec![Action::Disarm, Action::Kill, Action::Forget];
    let finish = Action::Finish(Outcome::NotMoved(cause));
    let answer = answer.map(|(link, send)| Action::Send(link, send));
    (State::GivenUp, Ok(actions.into_iter().chain(answer).chain([finish]).collect()))
}

/// Puts answers in front of the final action.
fn with_answers(mut actions: Vec<Action>, answers: impl Iterator<Item = Action>) -> Vec<Action> {
    let finish = actions.pop();
    actions.into_iter().chain(answers).chain(finish).collect()
}

/// The events that end any state before the acceptance; all others are wrong there.
fn ended(state: State, link: LinkId, event: Event) -> Step {
    let name = state.name();
    match event {
        Event::Message(from, Message::Query | Message::Resume) => {
            give_up(Cause::Queried(name), Some((from, Tell::Answer(Fate::NotAccepted))))
        }
        Event::Message(_, Message::Abort(reasons)) => give_up(Cause::Aborted(reasons), None),
        Event::Message(from, message) => {
            let message = format!("{message:?}");
            give_up(Cause::Protocol { message, state: name }, Some((from, Tell::Abort(vec![]))))
        }
        Event::LinkLost(lost) if lost == link => give_up(Cause::LinkLost(name), None),
        Event::LinkLost(_) => (state, Ok(vec![])),
        Event::Timeout => give_up(Cause::Timeout(name), Some((link, Tell::Abort(vec![])))),
        Event::Failed { step, error } => {
            let reason = Reason::new("destination", format!("{step}: {error}"), "");
            give_up(Cause::Failed { step, error }, Some((link, Tell::Abort(vec![reason]))))
        }
        Event::Progress => (state, Ok(vec![])),
        other => {
            let wrong = WrongState { event: format!("{other:?}"), state: name };
            (state, Err(wrong))
        }
    }
}
