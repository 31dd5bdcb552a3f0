//! What earlier source commands left behind that were killed together with their sentinels.

use std::path::{Path, PathBuf};

use super::OverQuic;
use super::resolve::{self, Patience, Resolution, ResolveError};
use crate::engine::reason::{Reason, chain};
use crate::journal::{Journal, JournalError, Outgoing, OutgoingState};
use crate::migration::ProcessKey;

/// Resolves the records of `process` before it is moved again, and says what stands against the move. The
/// records of other processes are resolved in the background: their destinations may be slow to answer.
///
/// # Errors
/// If the journal cannot be read.
pub(super) fn clear(state_dir: &Path, process: Option<ProcessKey>) -> Result<Vec<Reason>, JournalError> {
    let journal = Journal::<Outgoing>::open(state_dir)?;
    let (records, unreadable) = journal.list()?;
    for error in unreadable {
        tracing::warn!(error = chain(&error), "a record that cannot be read");
    }
    let (own, others): (Vec<_>, Vec<_>) = records.into_iter().partition(|r| Some(r.process) == process);
    let mut destination = OverQuic::new(state_dir.to_owned());
    let reasons = own.iter().filter_map(|record| against(&journal, record, &mut destination)).collect();
    if !others.is_empty() {
        resolve_quietly(state_dir.to_owned(), journal, others);
    }
    Ok(reasons)
}

/// What an earlier migration of the process means for the next.
fn against(
    journal: &Journal<Outgoing>,
    record: &Outgoing,
    destination: &mut impl resolve::Destination,
) -> Option<Reason> {
    let id = record.id;
    let (why, remedy) = match resolve::resolve(journal, id, destination, Patience::Once) {
        Ok(Some(Resolution::Nothing | Resolution::NotMoved)) => return None,
        Ok(Some(Resolution::Moved)) => {
            (format!("has been moved to {} by migration {id}", record.destination), String::new())
        }
        Ok(None) => (
            format!("was offered to {} by migration {id}, and may run there", record.destination),
            format!("make that node reachable, then: migrate resume {id}"),
        ),
        Err(ResolveError::OwnerAlive(owner)) => {
            (format!("is being moved already, by process {owner}"), String::new())
        }
        Err(error) => (
            format!("is held by migration {id}, which cannot be resolved: {}", chain(&error)),
            format!("migrate resume {id}"),
        ),
    };
    Some(Reason::new(format!("pid {}", record.process.pid), why, remedy))
}

/// One try for each; being cut off in the middle is as harmless as it is for a sentinel.
fn resolve_quietly(state_dir: PathBuf, journal: Journal<Outgoing>, records: Vec<Outgoing>) {
    let work = move || {
        let mut destination = OverQuic::new(state_dir);
        // Serving pages takes longer than this command may live.
        for record in records.into_iter().filter(|r| r.state != OutgoingState::Serving) {
            match resolve::resolve(&journal, record.id, &mut destination, Patience::Once) {
                Ok(Some(resolution)) => tracing::info!(id = %record.id, ?resolution, "an old migration"),
                Ok(None) | Err(ResolveError::OwnerAlive(_)) => {}
                Err(error) => tracing::warn!(id = %record.id, error = chain(&error), "an old migration"),
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("leftovers".into()).spawn(work) {
        tracing::warn!(%error, "old migrations are not looked at");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::alive;
    use crate::engine::trial::Killed;
    use crate::journal::boot_id;
    use crate::migration::{Fate, MigrationId};

    struct Answers(Option<Fate>);

    impl resolve::Destination for Answers {
        fn ask(&mut self, _: &Outgoing) -> Option<Fate> {
            self.0
        }
        fn serve(&mut self, _: &Outgoing) -> bool {
            self.0.is_some()
        }
        fn confirm(&mut self, _: &Outgoing) {}
    }

    fn record(process: &std::process::Child, owner: ProcessKey) -> Outgoing {
        let start_ticks = alive::start_ticks(process.id()).unwrap().unwrap();
        Outgoing {
            id: MigrationId::new([9; 16]),
            process: ProcessKey { pid: process.id(), start_ticks },
            boot: boot_id().unwrap(),
            owner,
            destination: "node:1".into(),
            peer: String::new(),
            state: OutgoingState::Limbo,
            owes: false,
            was_stopped: false,
            masks: vec![],
            addresses: vec![],
            connections: false,
            hooks: vec![],
        }
    }

    #[test]
    fn a_killed_command_hinders_only_while_the_outcome_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let process = Killed::sleeper();
        // A start time that no process has: the owner is gone.
        let record = record(&process, ProcessKey { pid: std::process::id(), start_ticks: 1 });
        journal.write(&record).unwrap();
        let open = against(&journal, &record, &mut Answers(None));
        assert!(open.unwrap().remedy.contains("migrate resume"));
        assert_eq!(against(&journal, &record, &mut Answers(Some(Fate::NotAccepted))), None);
        assert_eq!(journal.read(record.id).unwrap(), None, "nothing is left");
        journal.write(&record).unwrap();
        let moved = against(&journal, &record, &mut Answers(Some(Fate::Accepted)));
        assert!(moved.unwrap().why.contains("has been moved"));
    }

    #[test]
    fn a_move_under_way_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let process = Killed::sleeper();
        let us = std::process::id();
        let owner = ProcessKey { pid: us, start_ticks: alive::start_ticks(us).unwrap().unwrap() };
        let record = record(&process, owner);
        journal.write(&record).unwrap();
        let reason = against(&journal, &record, &mut Answers(Some(Fate::NotAccepted))).unwrap();
        assert!(reason.why.contains("being moved already"), "{reason}");
        assert!(journal.read(record.id).unwrap().is_some());
    }
}
