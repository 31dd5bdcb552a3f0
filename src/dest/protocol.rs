//! The words of the destination's machine: what it is told, what it asks for, how it ends.
//!
//! Plain values; `driver` maps the messages of `proto/control.proto` to them.

use std::time::Duration;

use crate::engine::reason::Reason;
use crate::migration::{Fate, ProcessKey, RunRight};

/// A connection, as the driver numbers them. Answers go where the question came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkId(pub u64);

/// What the source said (after Begin, which makes the machine).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Take the right to run.
    Commit,
    /// Did you take it? If not, don't.
    Query,
    /// The source knows that we have it.
    Confirm,
    /// Which pages are missing? The source goes on with them, on the connection of this message.
    Resume,
    /// The source has lost the pages that are missing here.
    Gone(Vec<Reason>),
    /// The source keeps the process.
    Abort(Vec<Reason>),
}

/// What we say to the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tell {
    /// The skeleton exists.
    Ready,
    /// Preflight says no.
    Refused(Vec<Reason>),
    /// All pages of this round are in place.
    RoundPlaced(u32),
    /// All state is applied, threads stopped at their first instruction.
    Prepared,
    /// We hold the right to run.
    Committed,
    /// What became of it.
    Answer(Fate),
    /// What is missing (the driver knows), or that nothing is.
    Resumed,
    /// No page is missing any more.
    Drained,
    /// The process has ended here: its missing pages cannot be had.
    Lost(Vec<Reason>),
    /// We gave up and will not accept.
    Abort(Vec<Reason>),
}

/// What the driver reports.
#[derive(Debug)]
pub enum Event {
    /// A message of the source.
    Message(LinkId, Message),
    /// Preflight passed and the skeleton exists.
    Built,
    /// Preflight failed.
    Unable(Vec<Reason>),
    /// Pages or state arrived: the source is alive.
    Progress,
    /// All pages of this round are in place.
    RoundPlaced(u32),
    /// Pages and state are complete and applied to this process.
    Applied(ProcessKey),
    /// The journal names the process.
    Recorded,
    /// The process outlives us from now on.
    Accepted,
    /// Nothing is missing any more, or the process has ended; tell the source on this connection.
    Drained(LinkId),
    /// This connection is lost.
    LinkLost(LinkId),
    /// The timer that [`Action::Arm`] set has run out.
    Timeout,
    /// An action could not be performed; the rest of its list was dropped. For `Accept` it means that the
    /// leader still is to be killed with us, or dead.
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
    /// Send a message on this connection.
    Send(LinkId, Tell),
    /// Set the one timer of this machine, instead of what it was set to.
    Arm(Duration),
    /// Stop the timer.
    Disarm,
    /// Check this host and make the skeleton; report [`Event::Built`] or [`Event::Unable`].
    Build,
    /// Write the journal's "prepared"; report [`Event::Recorded`].
    Record(ProcessKey),
    /// Raise the fence (SIGSTOP), then clear PTRACE_O_EXITKILL on all threads, the leader last; report
    /// [`Event::Accepted`].
    Accept,
    /// Write the journal's "accepted", before the process can run and end.
    RecordAccepted,
    /// Add the addresses that move with it and announce them. They may be there already.
    AddAddresses,
    /// Lower the fence and let the process run.
    Resume(RunRight),
    /// Take this connection for the missing pages, in place of any other.
    Attach(LinkId),
    /// Kill the process, which waits for pages that will not come.
    KillLost,
    /// Kill the skeleton and free all it holds. No thread of it has run.
    Kill,
    /// Remove the journal.
    Forget,
    /// Nothing is left to do but answering: the machine may be dropped.
    Finish(Outcome),
}

/// How a migration ended here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The process runs here, and the source knows.
    Moved,
    /// Nothing of it is left here.
    NotMoved(Cause),
}

/// Why the destination gave up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// Our preflight said no.
    #[error("this host cannot take the process")]
    Unable(Vec<Reason>),
    /// The source said so.
    #[error("the source keeps the process")]
    Aborted(Vec<Reason>),
    /// The source asked what became of it, which it does when it waits no longer.
    #[error("the source asked for the outcome while {0}")]
    Queried(&'static str),
    /// The connection broke.
    #[error("the connection to the source was lost while {0}")]
    LinkLost(&'static str),
    /// Nothing came for too long.
    #[error("nothing heard from the source while {0}")]
    Timeout(&'static str),
    /// Something failed on this host.
    #[error("{step}: {error}")]
    Failed {
        /// What was being done.
        step: &'static str,
        /// The error and its chain.
        error: String,
    },
    /// The source broke the protocol.
    #[error("unexpected message {message} while {state}")]
    Protocol {
        /// The message.
        message: String,
        /// What we were doing.
        state: &'static str,
    },
    /// The service was restarted and the skeleton died with it.
    #[error("the service was restarted before the commit")]
    Restarted,
}

/// An event that does not belong to the state it came in: a defect of the driver.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("event {event} while {state}")]
pub struct WrongState {
    /// The event.
    pub event: String,
    /// The state.
    pub state: &'static str,
}
