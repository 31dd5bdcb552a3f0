//! Ends what a dead source command has left behind: what the sentinel and `migrate resume ID` do.
//!
//! The journal is the only truth: its record says how far the source had come, and who acts on it holds
//! the journal's lock and has read it again. So any number of resolvers may be at it, in any order.
//!
//! | record | the process | what is done |
//! | --- | --- | --- |
//! | none | runs, or was killed by the source itself | nothing |
//! | taking | runs: its tracer is dead and no fence was up, but for while its connections were read | connections out of repair, addresses back, the lock lifted, then the fence down |
//! | limbo, not accepted | stopped by the fence | addresses back, the lock lifted, then the fence down |
//! | limbo, accepted | stopped by the fence | recorded as moved (as serving, if it owes pages), then as below |
//! | serving | stopped by the fence | its pages are served until none is missing, then recorded as moved |
//! | moved | stopped or dead | connections dropped silently, killed; then Confirm, so that the destination may forget |
//!
//! The operator's hooks are told on the way what the source command would have told them.

use std::time::Duration;

use nix::errno::Errno;
use nix::poll::PollTimeout;
use nix::sys::signal::Signal;

use crate::engine::address::{AddressError, AddressSet};
use crate::engine::alive::{self, AliveError};
use crate::engine::fence;
use crate::engine::hook::Stage;
use crate::engine::lock;
use crate::engine::state::files;
use crate::journal::{Journal, JournalError, Outgoing, OutgoingState, boot_id};
use crate::migration::{Fate, MigrationId, ProcessKey};
use crate::source::hooks;

/// First pause after the destination was not reached; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest such pause.
const LAST_PAUSE: Duration = Duration::from_secs(10);

/// One thing to do with the host or the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Add the addresses again that the source had taken.
    ReturnAddresses,
    /// Threads whose fence was being lifted block what they blocked before; then SIGCONT, unless the process
    /// was stopped before, or somebody else has stopped it since.
    LowerFence,
    /// Write [`OutgoingState::Serving`], with ourselves as the owner; the rest follows from that record.
    RecordServing,
    /// Write [`OutgoingState::Moved`].
    RecordMoved,
    /// Connections that were being read are as before.
    LeaveRepair,
    /// Connections that have moved are gone from here, and nobody is told.
    DropConnections,
    /// Run this stage of the operator's hooks.
    Hook(Stage),
    /// Let go of the lock on the connections, if we are its holder.
    Unlock,
    /// SIGKILL.
    Kill,
    /// Tell the destination that it may forget the migration, best effort.
    Confirm,
    /// Remove the record.
    Forget,
}

/// What a record demands without its source; `None` if the destination must be asked or served first.
pub fn steps_for(state: OutgoingState) -> Option<&'static [Step]> {
    match state {
        OutgoingState::Taking => Some(WHEN_IT_STAYS),
        OutgoingState::Limbo | OutgoingState::Serving => None,
        OutgoingState::Moved => {
            Some(&[Step::DropConnections, Step::Unlock, Step::Kill, Step::Confirm, Step::Forget])
        }
    }
}

/// What limbo demands after the destination's answer; `owes`: pages are owed to it then.
pub fn steps_after(fate: Fate, owes: bool) -> &'static [Step] {
    match fate {
        Fate::Accepted if owes => {
            &[Step::DropConnections, Step::RecordServing, Step::Unlock, Step::Hook(Stage::PostResume)]
        }
        Fate::NotAccepted => WHEN_IT_STAYS,
        // Recorded before Confirm: a destination that has forgotten would answer "not accepted", and the
        // next resolver would give the addresses back.
        Fate::Accepted => &[
            Step::RecordMoved,
            Step::DropConnections,
            Step::Unlock,
            Step::Kill,
            Step::Hook(Stage::PostResume),
            Step::Confirm,
            Step::Forget,
        ],
    }
}

/// What is done for a process that goes on here. It is to find its connections and addresses when it runs.
pub const WHEN_IT_STAYS: &[Step] = &[
    Step::LeaveRepair,
    Step::ReturnAddresses,
    Step::Hook(Stage::NetworkUnlock),
    Step::Unlock,
    Step::LowerFence,
    Step::Hook(Stage::Failed),
    Step::Forget,
];

/// What is done once the destination misses no page any more.
pub const WHEN_SERVED: &[Step] =
    &[Step::RecordMoved, Step::DropConnections, Step::Kill, Step::Confirm, Step::Forget];

/// The way to the destination of a record.
pub trait Destination {
    /// Asks what became of the migration (Query); `None` if the destination cannot be reached.
    fn ask(&mut self, record: &Outgoing) -> Option<Fate>;
    /// Serves the pages that the destination misses, from the memory of the record's process. True when it
    /// misses none any more, or has no use for them; false if it cannot be reached, or not any more.
    fn serve(&mut self, record: &Outgoing) -> bool;
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
    let (us, boot) = (own_key()?, boot_id()?);
    loop {
        let Some(record) = journal.read(id)? else { return Ok(Some(Resolution::Nothing)) };
        let serving = record.state == OutgoingState::Serving && record.owner == us;
        if !serving {
            wait_for_owner(record.owner, patience)?;
        }
        let steps = match record.state {
            OutgoingState::Limbo => destination.ask(&record).map(|fate| steps_after(fate, record.owes)),
            // Whoever serves says so, or two would take the destination's attention from each other.
            OutgoingState::Serving if record.owner != us && record.boot == boot => {
                Some(&[Step::RecordServing][..])
            }
            OutgoingState::Serving => destination.serve(&record).then_some(WHEN_SERVED),
            state => steps_for(state),
        };
        let Some(steps) = steps else {
            if patience == Patience::Once {
                return Ok(None);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LAST_PAUSE);
            continue;
        };
        pause = FIRST_PAUSE;
        let _lock = journal.lock()?;
        // What was decided holds for the record that was read, not for what may have become of it.
        if journal.read(id)?.as_ref() == Some(&record) {
            perform(journal, &record, steps, destination)?;
            if steps.contains(&Step::Forget) {
                let moved = steps.contains(&Step::Kill);
                return Ok(Some(if moved { Resolution::Moved } else { Resolution::NotMoved }));
            }
        }
    }
}

/// Ourselves, as the journal names the owner of a migration.
///
/// # Errors
/// If we cannot be looked at.
pub fn own_key() -> Result<ProcessKey, AliveError> {
    let pid = std::process::id();
    Ok(ProcessKey { pid, start_ticks: alive::start_ticks(pid)?.unwrap_or(0) })
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
            // Whoever waits for owed pages should not wait for hooks as well.
            Step::Hook(stage) if !steps.contains(&Step::Forget) => hooks::begin(record, *stage),
            Step::Hook(stage) => hooks::run(record, *stage),
            Step::Unlock => {
                if let Err(error) = lock::let_go() {
                    tracing::error!(error = &error as &dyn std::error::Error, "the lock");
                }
            }
            Step::ReturnAddresses => addresses = return_addresses(record),
            Step::LowerFence if process.is_none() => {}
            Step::LowerFence => {
                if let Err(error) = fence::restore_masks(&record.masks) {
                    tracing::error!(error = &error as &dyn std::error::Error, "restoring signal masks");
                }
                if is_held_by_us(record) {
                    signal(Signal::SIGCONT)?;
                }
            }
            Step::RecordServing => {
                let (owner, state) = (own_key()?, OutgoingState::Serving);
                journal.write(&Outgoing { owner, state, ..record.clone() })?;
            }
            Step::RecordMoved => {
                journal.write(&Outgoing { state: OutgoingState::Moved, ..record.clone() })?;
            }
            Step::LeaveRepair | Step::DropConnections => connections(record, *step, process.is_some()),
            Step::Kill => signal(Signal::SIGKILL)?,
            Step::Confirm => destination.confirm(record),
            Step::Forget if addresses.is_ok() => journal.remove(record.id)?,
            // A missing address must not keep the process stopped, but is worth another try: of the
            // addresses only, not of the signal and of the hooks.
            Step::Forget => {
                let (state, connections, hooks) = (OutgoingState::Taking, false, Vec::new());
                journal.write(&Outgoing { state, connections, hooks, ..record.clone() })?;
            }
        }
    }
    addresses
}

/// Whether the fence is up, and nothing else keeps the process from running.
fn is_held_by_us(record: &Outgoing) -> bool {
    // Before limbo there was one only while connections were read.
    let up = record.state != OutgoingState::Taking || record.connections && fence::is_up(record.process.pid);
    up && !record.was_stopped && !fence::another_stop_waits(record.process.pid)
}

/// A failure is no reason to leave the rest undone: at worst a peer hears of an end.
fn connections(record: &Outgoing, step: Step, alive: bool) {
    let Ok(pid) = i32::try_from(record.process.pid) else { return };
    if !record.connections || !alive {
        return;
    }
    let done = match step {
        Step::LeaveRepair => files::leave_repair(pid),
        _ => files::drop_connections(pid),
    };
    if let Err(error) = done {
        tracing::error!(pid, error = &error as &dyn std::error::Error, "connections");
    }
}

fn return_addresses(record: &Outgoing) -> Result<(), ResolveError> {
    if record.addresses.is_empty() {
        return Ok(());
    }
    AddressSet::of(&record.addresses)
        .and_then(|mut set| set.add())
        .map_err(|source| ResolveError::Addresses { pid: record.process.pid, source })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
