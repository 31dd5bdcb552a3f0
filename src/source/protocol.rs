//! The words of the source's machine: what it is told, what it asks for, how it ends.
//!
//! Plain values; `driver` maps the messages of `proto/control.proto` to them.

use std::time::Duration;

use crate::engine::reason::Reason;
use crate::migration::{Fate, RunRight};
use crate::source::policy::{FreezeReason, Hurry, Round};

/// What the destination said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The plan is accepted, the skeleton exists.
    Ready,
    /// Preflight says no.
    Refused(Vec<Reason>),
    /// All pages of this round are in place.
    RoundPlaced(u32),
    /// All state is applied, threads stopped at their first instruction.
    Prepared,
    /// The destination holds the right to run, and runs the process.
    Committed,
    /// The answer to a Query.
    Answer(Fate),
    /// The answer to a Resume: pages are missing still, and the destination waits for them.
    Resumed,
    /// No page is missing there any more.
    Drained,
    /// The process has ended there, because its missing pages cannot be had.
    Lost(Vec<Reason>),
    /// The destination gave up, for good.
    Abort(Vec<Reason>),
}

/// What we say to the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tell {
    /// The plan.
    Begin,
    /// Take the right to run.
    Commit,
    /// Did you take it? If not, don't.
    Query,
    /// Which pages are missing? We go on with them.
    Resume,
    /// The pages that are missing cannot be had any more.
    Gone(Cause),
    /// We know that you have it: forget this migration.
    Confirm,
    /// We keep the process.
    Abort(Cause),
}

/// What the driver reports.
#[derive(Debug)]
pub enum Event {
    /// A message of the destination.
    Message(Message),
    /// All pages of the round are written to the stream; what it measured.
    RoundSent(Round),
    /// All threads are stopped and the final state is captured as far as sending it needs.
    Frozen,
    /// Journal, sentinel and fence are in place.
    LimboEntered,
    /// Nothing is owed: all pages went before the resume.
    NothingOwed,
    /// All owed pages have been sent; the destination should say so soon.
    AllSent,
    /// Our process is killed; `recorded` tells whether journal and sentinel know that the move is done.
    Killed {
        /// If not, we must not send Confirm: the destination has to remember for us.
        recorded: bool,
    },
    /// There is a new connection, as asked for by [`Action::Connect`].
    Connected,
    /// The connection is lost, or [`Action::Connect`] failed.
    LinkLost,
    /// A timer that [`Action::Arm`] set has run out.
    Timeout,
    /// The operator wants the process to stay.
    Cancel,
    /// The rounds are to end here: heard before the freeze, where one decides about it.
    Hurry(Hurry),
    /// An action could not be performed; the rest of its list was dropped.
    Failed {
        /// What was being done.
        step: &'static str,
        /// The error and its chain.
        error: String,
    },
}

/// What the driver does, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a message on the current connection. Not being able to is [`Event::LinkLost`].
    Send(Tell),
    /// Set the one timer of this machine, instead of what it was set to.
    Arm(Duration),
    /// Start the sentinel and wait until it says that it is there.
    StartSentinel,
    /// Scan, read and send this round; report [`Event::RoundSent`].
    StartRound(u32),
    /// In place of a round: announce what is dirty, to follow after the resume; report [`Event::RoundSent`].
    Announce(u32),
    /// Run the hooks that come before it, then stop all threads; report [`Event::Frozen`]. If what is dirty
    /// then is more than `eager_pages`, it follows after the resume.
    Freeze {
        /// Why now.
        reason: FreezeReason,
        /// See above; `u64::MAX` if nothing may follow.
        eager_pages: u64,
    },
    /// Record what is done to the network here, then do it: remove the addresses that move, lock connections,
    /// run the hooks for that.
    TakeAddresses,
    /// Send the last pages and the state.
    SendFinal,
    /// Record limbo in the journal, tell the sentinel, raise the fence (SIGSTOP), in this order; report
    /// [`Event::LimboEntered`].
    EnterLimbo,
    /// Drop the connection if there is one and open a new one; report [`Event::Connected`] or
    /// [`Event::LinkLost`].
    Connect,
    /// Take the fence down, if it is up.
    LowerFence,
    /// Give back the addresses that were taken, run the hooks for that, lift the lock. Failing here is a
    /// warning, not an [`Event::Failed`]: the process is thawed in any case.
    ReturnAddresses,
    /// Undo all that was done to the process and let it run.
    Thaw(RunRight),
    /// Serve the pages that are owed (those that the last Resumed named, if there was one), and record that
    /// we do; report [`Event::NothingOwed`] if there are none.
    Serve,
    /// Record that the process is the destination's (journal, then sentinel), then kill ours; report
    /// [`Event::Killed`]. The record comes first: an address must not be given back after Confirm.
    Conclude(RunRight),
    /// Let go of the process with the fence up: it stays stopped.
    LeaveHeld(RunRight),
    /// Remove the journal and send the sentinel home.
    Forget,
    /// The migration is over; the last action of all.
    Finish(Outcome),
}

/// How a migration ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It runs at the destination.
    Moved,
    /// It runs here as before.
    NotMoved(Cause),
    /// It is held here until the destination can be asked: exit status 3.
    Unknown,
    /// It runs at the destination, and waits for pages that are held here: exit status 3.
    Unfinished,
    /// It was taken over by the destination, and has ended there for want of its pages.
    Lost(Vec<Reason>),
}

/// Why a process was not moved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// Its preflight said no.
    #[error("the destination refused")]
    Refused(Vec<Reason>),
    /// It gave up later.
    #[error("the destination gave up")]
    GivenUp(Vec<Reason>),
    /// It did not take the commit: it had given up, or was restarted, when it was asked.
    #[error("the destination did not accept the commit")]
    NotAccepted,
    /// The connection broke.
    #[error("the connection to the destination was lost while {0}")]
    LinkLost(&'static str),
    /// Nothing came for too long.
    #[error("no answer from the destination while {0}")]
    Timeout(&'static str),
    /// The operator said so.
    #[error("cancelled")]
    Cancelled,
    /// Something failed on this host.
    #[error("{step}: {error}")]
    Failed {
        /// What was being done.
        step: &'static str,
        /// The error and its chain.
        error: String,
    },
    /// The destination broke the protocol.
    #[error("unexpected message {message} while {state}")]
    Protocol {
        /// The message's name and contents.
        message: String,
        /// What we were doing.
        state: &'static str,
    },
}

/// An event that does not belong to the state it came in: a defect of the driver. (A peer's message out of
/// order is no such error; it ends the migration with [`Cause::Protocol`].)
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("event {event} while {state}")]
pub struct WrongState {
    /// The event.
    pub event: String,
    /// The state.
    pub state: &'static str,
}
