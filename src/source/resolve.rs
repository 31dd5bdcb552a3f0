//! Ends what a dead source command has left behind: what the sentinel and `migrate resume ID` do.
//!
//! The journal is the only truth: its record says how far the source had come, and who acts on it holds
//! the journal's lock and has read it again. So any number of resolvers may be at it, in any order.
//!
//! | record | the process | what is done |
//! | --- | --- | --- |
//! | none | runs, or was killed by the source itself | nothing |
//! | taking | runs: its tracer is dead and no fence was up | addresses back |
//! | limbo, not accepted | stopped by the fence | addresses back, then the fence down |
//! | limbo, accepted | stopped by the fence | recorded as moved, then as below |
//! | moved | stopped or dead | killed; then Confirm, so that the destination may forget |

use std::time::Duration;

use nix::errno::Errno;
use nix::poll::PollTimeout;
use nix::sys::signal::Signal;

use crate::engine::address::{AddressError, AddressSet};
use crate::engine::alive::{self, AliveError};
use crate::journal::{Journal, JournalError, Outgoing, OutgoingState, boot_id};
use crate::migration::{Fate, MigrationId, ProcessKey};

/// First pause after the destination was not reached; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest such pause.
const LAST_PAUSE: Duration = Duration::from_secs(10);

/// One thing to do with the host or the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Add the addresses again that the source had taken.
    ReturnAddresses,
    /// SIGCONT, unless the process was stopped before.
    LowerFence,
    /// Write [`OutgoingState::Moved`].
    RecordMoved,
    /// SIGKILL.
    Kill,
    /// Tell the destination that it may forget the migration, best effort.
    Confirm,
    /// Remove the record.
    Forget,
}

/// What a record demands without its source; `None` if the destination must be asked first.
pub fn steps_for(state: OutgoingState) -> Option<&'static [Step]> {
    match state {
        OutgoingState::Taking => Some(&[Step::ReturnAddresses, Step::Forget]),
        OutgoingState::Limbo => None,
        OutgoingState::Moved => Some(&[Step::Kill, Step::Confirm, Step::Forget]),
    }
}

/// What limbo demands after the destination's answer.
pub fn steps_after(fate: Fate) -> &'static [Step] {
    match fate {
        // The process is to find its addresses when it runs.
        Fate::NotAccepted => &[Step::ReturnAddresses, Step::LowerFence, Step::Forget],
        // Recorded before Confirm: a destination that has forgotten would answer "not accepted", and the
        // next resolver would give the addresses back.
        Fate::Accepted => &[Step::RecordMoved, Step::Kill, Step::Confirm, Step::Forget],
    }
}

/// The way to the destination of a record.
pub trait Destination {
    /// Asks what became of the migration (Query); `None` if the destination cannot be reached.
    fn ask(&mut self, record: &Outgoing) -> Option<Fate>;
    /// Sends Confirm, best effort.
    fn confirm(&mut self, record: &Outgoing);
}

/// How a migration was resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// There was nothing to resolve (any more).
    Nothing,
    /// The process runs here as before.
    NotMoved,
    /// The destination has it.
    Moved,
}

/// Why a migration is not resolved.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The process or the source command cannot be looked at.
    #[error(transparent)]
    Alive(#[from] AliveError),
    /// A signal could not be sent.
    #[error("sending {signal} to process {pid}")]
    Signal {
        /// Which.
        signal: Signal,
        /// To whom.
        pid: u32,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The process is thawed, but addresses are missing. The record is kept: trying again may help.
    #[error("giving back addresses of process {pid}")]
    Addresses {
        /// The process.
        pid: u32,
        /// What failed.
        #[source]
        source: AddressError,
    },
    /// The source command is still at it.
    #[error("the migration is still run by process {0}")]
    OwnerAlive(u32),
}

/// Resolves migration `id`. Asks the destination until it answers, `patience` allowing, and waits that
/// long for the source command to die.
///
/// # Errors
/// If it stays unresolved, except for a destination that cannot be reached: that is `Ok(None)`.
pub fn resolve(
    journal: &Journal<Outgoing>,
    id: MigrationId,
    destination: &mut impl Destination,
    patience: Patience,
) -> Result<Option<Resolution>, ResolveError> {
    let mut pause = FIRST_PAUSE;
    loop {
        let Some(record) = journal.read(id)? else { return Ok(Some(Resolution::Nothing)) };
        wait_for_owner(record.owner, patience)?;
        let fate = if record.state == OutgoingState::Limbo { destination.ask(&record) } else { None };
        let Some(steps) = steps_for(record.state).or(fate.map(steps_after)) else {
            if patience == Patience::Once {
                return Ok(None);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LAST_PAUSE);
            continue;
        };
        let _lock = journal.lock()?;
        // What was decided holds for the record that was read, not for what may have become of it.
        if journal.read(id)?.as_ref() == Some(&record) {
            perform(journal, &record, steps, destination)?;
            let moved = steps.contains(&Step::Kill);
            return Ok(Some(if moved { Resolution::Moved } else { Resolution::NotMoved }));
        }
    }
}

/// Whether to wait for what may take for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// One try, for a command that an operator waits for.
    Once,
    /// As long as it takes, for the sentinel.
    Endless,
}

/// When the source command has ended, its tracees are released for certain.
fn wait_for_owner(owner: ProcessKey, patience: Patience) -> Result<(), ResolveError> {
    let Some(fd) = alive::open(owner.pid, owner.start_ticks)? else { return Ok(()) };
    let timeout = match patience {
        Patience::Once => PollTimeout::ZERO,
        Patience::Endless => PollTimeout::NONE,
    };
    let ended = fd.ended(timeout).map_err(|errno| AliveError::Sys {
        step: "waiting for the end",
        pid: owner.pid,
        errno,
    })?;
    if ended { Ok(()) } else { Err(ResolveError::OwnerAlive(owner.pid)) }
}

fn perform(
    journal: &Journal<Outgoing>,
    record: &Outgoing,
    steps: &[Step],
    destination: &mut impl Destination,
) -> Result<(), ResolveError> {
    if record.boot != boot_id()? {
        // Process, fence and addresses ended with an earlier boot of the host.
        return Ok(journal.remove(record.id)?);
    }
    let process = alive::open(record.process.pid, record.process.start_ticks)?;
    let signal = |signal| match process.as_ref().map(|fd| fd.signal(signal)) {
        None | Some(Ok(()) | Err(Errno::ESRCH)) => Ok(()),
        Some(Err(errno)) => Err(ResolveError::Signal { signal, pid: record.process.pid, errno }),
    };
    let mut addresses = Ok(());
    for step in steps {
        match step {
            Step::ReturnAddresses => addresses = return_addresses(record),
            Step::LowerFence if record.was_stopped => {}
            Step::LowerFence => signal(Signal::SIGCONT)?,
            Step::RecordMoved => {
                journal.write(&Outgoing { state: OutgoingState::Moved, ..record.clone() })?;
            }
            Step::Kill => signal(Signal::SIGKILL)?,
            Step::Confirm => destination.confirm(record),
            Step::Forget if addresses.is_ok() => journal.remove(record.id)?,
            // A missing address must not keep the process stopped, but is worth another try: of the
            // addresses only, not of the signal.
            Step::Forget => {
                journal.write(&Outgoing { state: OutgoingState::Taking, ..record.clone() })?;
            }
        }
    }
    addresses
}

fn return_addresses(record: &Outgoing) -> Result<(), ResolveError> {
    if record.addresses.is_empty() {
        return Ok(());
    }
    AddressSet::of(&record.addresses)
        .and_then(|mut set| set.add())
        .map_err(|source| ResolveError::Addresses { pid: record.process.pid, source })
}
