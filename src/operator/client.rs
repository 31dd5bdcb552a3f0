//! Asks every `migrate` of a state directory, and its journal for what no `migrate` runs any more.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::listener::ORDER_PATIENCE;
use super::place::Place;
use super::protocol::{self, Answer, MAX_ANSWER_BYTES, MigrationStatus, Phase, Request, Side, Verdict};
use crate::engine::alive;
use crate::journal::{Incoming, IncomingState, Journal, JournalError, Outgoing, OutgoingState, Record};
use crate::migration::{IdPrefix, MigrationId, ProcessKey};

/// How long a `migrate` may take to say what it does. Most tests do not wait for that, and their host is busy.
const STATUS_PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 20 } else { 2 });
/// Bytes of a process's name that are shown.
const MAX_NAME_BYTES: usize = 64;

/// Why operators get no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The sockets cannot be looked for.
    #[error("looking for control sockets")]
    Sockets(#[source] io::Error),
    /// The records cannot be read.
    #[error("looking for unresolved migrations")]
    Journal(#[from] JournalError),
    /// There is none of this name.
    #[error("there is no migration {0} here")]
    NoSuch(IdPrefix),
    /// There are several.
    #[error("{prefix} is the beginning of several migrations: {ids}")]
    Ambiguous {
        /// What was typed.
        prefix: IdPrefix,
        /// What it could mean.
        ids: String,
    },
    /// The one that runs the migration does not answer, or not in time.
    #[error("process {pid}, which runs the migration, does not answer")]
    Silent {
        /// The `migrate`.
        pid: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// All that is known in a state directory.
#[derive(Debug, Default)]
pub struct Known {
    /// The migrations: those that run, in the order of their beginning, then those that were left behind.
    pub migrations: Vec<MigrationStatus>,
    /// What could not be found out: for standard error.
    pub troubles: Vec<String>,
    owners: Vec<(MigrationId, Side, ProcessKey)>,
}

/// What became of an order, and of which migration.
#[derive(Debug)]
pub struct Ordered {
    /// The migration that was meant.
    pub id: MigrationId,
    /// What became of the order.
    pub verdict: Verdict,
}

/// An order that operators can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// The process is to stay.
    Cancel,
    /// It is to be frozen now, the rest of its memory follows.
    Postcopy,
}

/// Asks for all migrations, or for those that `which` can mean.
///
/// # Errors
/// If neither sockets nor records can be looked for, or there is none that is meant.
pub fn status(state_dir: &Path, which: Option<&IdPrefix>) -> Result<Known, ClientError> {
    let mut known = running(state_dir, STATUS_PATIENCE)?;
    left_behind(state_dir, &mut known)?;
    if let Some(prefix) = which {
        known.only(prefix)?;
    }
    Ok(known)
}

/// Gives an order, and waits until it is decided what becomes of it.
///
/// # Errors
/// If it is not clear who is meant, or nobody answers.
pub fn order(state_dir: &Path, prefix: &IdPrefix, command: Command) -> Result<Ordered, ClientError> {
    let known = status(state_dir, Some(prefix))?;
    let Some(meant) = known.migrations.iter().find(|m| m.side == Side::Source).or(known.migrations.first())
    else {
        return Err(ClientError::NoSuch(prefix.clone()));
    };
    let id = meant.migration_id;
    let owner = known.owners.iter().find(|(i, side, _)| *i == id && *side == meant.side);
    let verdict = match (owner, meant.side) {
        (_, Side::Destination) => {
            Verdict::Refused(format!("the process comes here: give the order at its source, {}", meant.peer))
        }
        (None, Side::Source) => Verdict::TooLate(match &meant.resolve_with {
            Some(command) => format!("the migration was left at {}; resolve it with: {command}", meant.phase),
            None => format!("the migration is at {}, and nobody answers for it", meant.phase),
        }),
        (Some((_, _, owner)), Side::Source) => give(state_dir, *owner, id, command)?,
    };
    Ok(Ordered { id, verdict })
}

fn give(
    state_dir: &Path,
    owner: ProcessKey,
    id: MigrationId,
    command: Command,
) -> Result<Verdict, ClientError> {
    let request = match command {
        Command::Cancel => Request::Cancel { id },
        Command::Postcopy => Request::Postcopy { id },
    };
    let place = Place::open(state_dir).map_err(ClientError::Sockets)?;
    match ask(&place, owner, &request, ORDER_PATIENCE + STATUS_PATIENCE) {
        Ok(Some(Answer::Verdict { verdict })) => Ok(verdict),
        // It has ended since it was asked for its status.
        Ok(None) => Ok(Verdict::Unknown),
        Ok(Some(_)) => Err(silent(owner, io::ErrorKind::InvalidData.into())),
        Err(source) => Err(silent(owner, source)),
    }
}

fn silent(owner: ProcessKey, source: io::Error) -> ClientError {
    ClientError::Silent { pid: owner.pid, source }
}

/// One request to one `migrate`. None if it is gone.
fn ask(
    place: &Place,
    owner: ProcessKey,
    request: &Request,
    patience: Duration,
) -> io::Result<Option<Answer>> {
    let Some(mut stream) = place.connect(owner)? else { return Ok(None) };
    stream.set_write_timeout(Some(STATUS_PATIENCE))?;
    stream.set_read_timeout(Some(patience))?;
    protocol::write(&mut stream, request)?;
    protocol::read(&stream, MAX_ANSWER_BYTES).map(Some)
}

fn running(state_dir: &Path, patience: Duration) -> Result<Known, ClientError> {
    let mut known = Known::default();
    let place = match Place::open(state_dir) {
        Ok(place) => place,
        // No `migrate` has run here yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(known),
        Err(error) => return Err(ClientError::Sockets(error)),
    };
    for owner in place.owners().map_err(ClientError::Sockets)? {
        match ask(&place, owner, &Request::Status, patience) {
            Ok(Some(Answer::Migrations { migrations })) => {
                known.owners.extend(migrations.iter().map(|m| (m.migration_id, m.side, owner)));
                known.migrations.extend(migrations);
            }
            Ok(None) => {}
            Ok(Some(_)) => known.troubles.push(format!("process {} answers nonsense", owner.pid)),
            Err(error) => known.troubles.push(format!("process {} does not answer: {error}", owner.pid)),
        }
    }
    Ok(known)
}

fn left_behind(state_dir: &Path, known: &mut Known) -> Result<(), JournalError> {
    for record in records::<Outgoing>(state_dir, known)? {
        if known.runs(record.id, Side::Source) {
            continue;
        }
        let owner_lives = is_alive(record.owner);
        let phase = match record.state {
            OutgoingState::Limbo => Phase::Limbo,
            OutgoingState::Serving if owner_lives => Phase::Postcopy,
            OutgoingState::Serving => Phase::Paused,
            OutgoingState::Taking | OutgoingState::Moved => Phase::Interrupted,
        };
        known.migrations.push(MigrationStatus {
            peer: record.destination,
            migrate_pid: owner_lives.then_some(record.owner.pid),
            resolve_with: (!owner_lives).then(|| format!("migrate resume {}", record.id)),
            ..of_record(record.id, Side::Source, record.process, phase)
        });
    }
    for record in records::<Incoming>(state_dir, known)? {
        if known.runs(record.id, Side::Destination) {
            continue;
        }
        let phase = match record.state {
            IncomingState::Prepared => Phase::Interrupted,
            IncomingState::Accepted if record.misses => Phase::Paused,
            IncomingState::Accepted => Phase::Complete,
        };
        known.migrations.push(MigrationStatus {
            peer: record.peer,
            resolve_with: Some("migrate serve".to_owned()),
            ..of_record(record.id, Side::Destination, record.process, phase)
        });
    }
    Ok(())
}

/// The records of one kind. A state directory without any is left without.
fn records<R: Record>(state_dir: &Path, known: &mut Known) -> Result<Vec<R>, JournalError> {
    if !state_dir.join(R::DIRECTORY).exists() {
        return Ok(Vec::new());
    }
    let (mut records, unreadable) = Journal::<R>::open(state_dir)?.list()?;
    known.troubles.extend(unreadable.iter().map(ToString::to_string));
    records.sort_by_key(Record::id);
    Ok(records)
}

fn of_record(migration_id: MigrationId, side: Side, process: ProcessKey, phase: Phase) -> MigrationStatus {
    let command = if is_alive(process) { command_of(process.pid) } else { String::new() };
    MigrationStatus {
        migration_id,
        side,
        pid: i32::try_from(process.pid).unwrap_or(0),
        command,
        phase,
        round: None,
        pages_remaining: None,
        bytes_per_second: 0,
        bytes_per_second_mean: 0,
        dirty_pages_per_second: None,
        faults: None,
        elapsed_ms: None,
        peer: String::new(),
        migrate_pid: None,
        resolve_with: None,
    }
}

fn is_alive(process: ProcessKey) -> bool {
    alive::start_ticks(process.pid).is_ok_and(|start| start == Some(process.start_ticks))
}

/// The name of a process, as it may be shown; empty if there is none.
pub fn command_of(pid: u32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    shown(&name[..name.len().min(MAX_NAME_BYTES)])
}

/// A name that cannot lead a terminal astray.
pub fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl Known {
    fn runs(&self, id: MigrationId, side: Side) -> bool {
        self.owners.iter().any(|(i, s, _)| *i == id && *s == side)
    }

    /// Leaves only the one that is meant.
    fn only(&mut self, prefix: &IdPrefix) -> Result<(), ClientError> {
        self.migrations.retain(|m| prefix.matches(m.migration_id));
        let Some(first) = self.migrations.first() else { return Err(ClientError::NoSuch(prefix.clone())) };
        if self.migrations.iter().all(|m| m.migration_id == first.migration_id) {
            return Ok(());
        }
        let mut ids: Vec<_> = self.migrations.iter().map(|m| m.migration_id.to_string()).collect();
        ids.sort_unstable();
        ids.dedup();
        Err(ClientError::Ambiguous { prefix: prefix.clone(), ids: ids.join(", ") })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::trial::until;
    use crate::journal::boot_id;
    use crate::migration::ID_BYTES;
    use crate::operator::{About, Board, End, Listener};

    fn about(bytes: [u8; 2], side: Side) -> About {
        let mut id = [0; ID_BYTES];
        id[..2].copy_from_slice(&bytes);
        About { id: MigrationId::new(id), side, pid: 7, command: "redis".into(), peer: "b:7077".into() }
    }

    fn prefix(text: &str) -> IdPrefix {
        text.parse().unwrap()
    }

    #[test]
    fn nothing_is_made_where_nothing_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let known = status(dir.path(), None).unwrap();
        assert!(known.migrations.is_empty() && known.troubles.is_empty());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let error = order(dir.path(), &prefix("a"), Command::Cancel).unwrap_err();
        assert!(matches!(error, ClientError::NoSuch(_)), "{error}");
    }

    #[test]
    fn orders_reach_the_migration_that_is_meant() {
        let dir = tempfile::tempdir().unwrap();
        let board = Arc::new(Board::default());
        let listener = Listener::start(dir.path(), board.clone()).unwrap();
        let one = board.post(about([0xab, 0x10], Side::Source), Arc::default());
        let two = board.post(about([0xab, 0x20], Side::Source), Arc::default());
        let incoming = board.post(about([0xcc, 0], Side::Destination), Arc::default());
        two.round(1);
        assert_eq!(status(dir.path(), None).unwrap().migrations.len(), 3);
        assert_eq!(status(dir.path(), Some(&prefix("ab2"))).unwrap().migrations.len(), 1);
        for command in [Command::Cancel, Command::Postcopy] {
            let error = order(dir.path(), &prefix("ab"), command).unwrap_err();
            assert!(matches!(error, ClientError::Ambiguous { .. }), "{error}");
            let error = order(dir.path(), &prefix("0"), command).unwrap_err();
            assert!(matches!(error, ClientError::NoSuch(_)), "{error}");
            let refused = order(dir.path(), &prefix("cc"), command).unwrap().verdict;
            assert!(matches!(refused, Verdict::Refused(_)), "{refused:?}");
        }
        let asking = {
            let dir = dir.path().to_owned();
            std::thread::spawn(move || order(&dir, &prefix("ab2"), Command::Cancel).unwrap())
        };
        until("the order", || two.orders().cancelled());
        // Others are answered while one waits.
        assert_eq!(status(dir.path(), None).unwrap().migrations.len(), 3);
        two.end(End::NotMoved);
        drop((one, two, incoming));
        // The answer gets through although the program ends.
        drop(listener);
        let ordered = asking.join().unwrap();
        assert_eq!(ordered.verdict, Verdict::Cancelled);
        assert_eq!(ordered.id, about([0xab, 0x20], Side::Source).id);
        assert!(status(dir.path(), None).unwrap().migrations.is_empty());
        assert_eq!(std::fs::read_dir(dir.path().join("run")).unwrap().count(), 0);
    }

    #[test]
    fn what_was_left_behind_is_shown_with_its_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let us = super::super::place::ourselves();
        let gone = ProcessKey { pid: us.pid, start_ticks: us.start_ticks + 1 };
        let journal = Journal::<Outgoing>::open(dir.path()).unwrap();
        let mut record = Outgoing {
            id: about([0xaa, 0], Side::Source).id,
            process: us,
            boot: boot_id().unwrap(),
            owner: gone,
            destination: "b:7077".into(),
            peer: String::new(),
            state: OutgoingState::Limbo,
            owes: false,
            was_stopped: false,
            masks: vec![],
            addresses: vec![],
            connections: false,
            hooks: vec![],
        };
        journal.write(&record).unwrap();
        let known = status(dir.path(), None).unwrap();
        let [left] = known.migrations.as_slice() else { panic!("{known:?}") };
        assert_eq!((left.phase, left.side), (Phase::Limbo, Side::Source));
        assert_eq!(left.resolve_with, Some(format!("migrate resume {}", record.id)));
        assert_eq!(left.command, command_of(us.pid));
        let verdict = order(dir.path(), &prefix("aa"), Command::Cancel).unwrap().verdict;
        assert!(matches!(verdict, Verdict::TooLate(text) if text.contains("migrate resume")));

        // Its command lives, but has no socket: nobody else may resolve it.
        record.owner = us;
        journal.write(&record).unwrap();
        let known = status(dir.path(), None).unwrap();
        assert_eq!(known.migrations[0].resolve_with, None);
        assert_eq!(known.migrations[0].migrate_pid, Some(us.pid));

        // It is on a board: shown once.
        let board = Arc::new(Board::default());
        let _listener = Listener::start(dir.path(), board.clone()).unwrap();
        let posting = board.post(about([0xaa, 0], Side::Source), Arc::default());
        posting.phase(Phase::Committing);
        let known = status(dir.path(), None).unwrap();
        assert_eq!(known.migrations.len(), 1);
        assert_eq!(known.migrations[0].phase, Phase::Committing);

        Journal::<Incoming>::open(dir.path())
            .unwrap()
            .write(&Incoming {
                id: record.id,
                process: us,
                boot: record.boot.clone(),
                peer: "sha256:00".into(),
                state: IncomingState::Accepted,
                misses: false,
                was_stopped: false,
                masks: vec![],
                addresses: vec![],
            })
            .unwrap();
        std::fs::write(dir.path().join(format!("outgoing/{}.json", "0".repeat(32))), "{").unwrap();
        let known = status(dir.path(), None).unwrap();
        assert_eq!((known.migrations.len(), known.troubles.len()), (2, 1), "{known:?}");
        let incoming = &known.migrations[1];
        assert_eq!((incoming.side, incoming.phase), (Side::Destination, Phase::Complete));
        assert_eq!(incoming.resolve_with.as_deref(), Some("migrate serve"));
    }

    #[test]
    fn one_that_does_not_answer_hinders_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::make(dir.path()).unwrap();
        // Its start time is not ours, so that both can be there.
        let us = super::super::place::ourselves();
        let silent = place.bind(ProcessKey { pid: us.pid, start_ticks: us.start_ticks + 1 }).unwrap();
        let board = Arc::new(Board::default());
        let _listener = Listener::start(dir.path(), board.clone()).unwrap();
        let _posting = board.post(about([1, 1], Side::Source), Arc::default());
        let known = running(dir.path(), Duration::from_secs(5)).unwrap();
        assert_eq!((known.migrations.len(), known.troubles.len()), (1, 1), "{known:?}");
        drop(silent);
    }

    #[test]
    fn names_cannot_lead_a_terminal_astray() {
        assert_eq!(shown(b"a\x1b[2Jb\n\xff"), "a?[2Jb?\u{fffd}");
    }
}
