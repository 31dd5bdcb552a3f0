//! What survives a crash of a service: one small file per migration that is not resolved yet.
//!
//! Written by rename, so that a reader sees the old record or the new one; never synced, because a crash
//! of the host takes the process with it. No memory and no key of the process is in it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::marker::PhantomData;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::engine::address::Address;
use crate::engine::hook::Hook;
use crate::migration::{MigrationId, ProcessKey};

/// Largest record that is read back: a few dozen addresses and all hooks that there may be need less.
const MAX_RECORD_BYTES: u64 = 64 * 1024;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How far the source had come. There is no record before something of the host is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutgoingState {
    /// The addresses may be gone. The process is not fenced: it runs if the source dies, unless that is in the
    /// middle of reading its connections.
    Taking,
    /// The commit may be under way: only the destination knows who runs the process.
    Limbo,
    /// The destination runs it, and is owed pages that are still here.
    Serving,
    /// The destination has it: kill it here, keep the addresses away.
    Moved,
}

/// The source's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outgoing {
    /// The migration.
    pub id: MigrationId,
    /// The process here.
    pub process: ProcessKey,
    /// Which boot of this host the process belongs to: [`boot_id`].
    pub boot: String,
    /// The source command: while it lives, the migration is its business alone.
    pub owner: ProcessKey,
    /// Where to ask: `HOST:PORT`.
    pub destination: String,
    /// The fingerprint of the destination that got the process.
    pub peer: String,
    /// How far the source had come.
    pub state: OutgoingState,
    /// Pages are owed once it is accepted: it must not be killed before the destination has them.
    #[serde(default)]
    pub owes: bool,
    /// It was stopped (SIGSTOP) before we came, and must be left so.
    pub was_stopped: bool,
    /// What each thread blocks, `(TID, kernel sigset)`: a fence is lifted with all signals blocked.
    #[serde(default)]
    pub masks: Vec<(i32, u64)>,
    /// Addresses taken from this host.
    pub addresses: Vec<Address>,
    /// Live TCP connections move along.
    #[serde(default)]
    pub connections: bool,
    /// What to run where the migration is put right.
    #[serde(default)]
    pub hooks: Vec<Hook>,
}

/// How far the destination had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IncomingState {
    /// The process is complete, and bound to the service until it is accepted.
    Prepared,
    /// It is ours.
    Accepted,
}

/// The destination's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incoming {
    /// The migration.
    pub id: MigrationId,
    /// The process here.
    pub process: ProcessKey,
    /// Which boot of this host the process belongs to.
    pub boot: String,
    /// The fingerprint of the source: nobody else may ask.
    pub peer: String,
    /// How far the destination had come.
    pub state: IncomingState,
    /// Pages are missing until the source has confirmed: a guardian holds them, see `dest::guardian`.
    #[serde(default)]
    pub misses: bool,
    /// It was stopped (SIGSTOP) at the source, and must be left so.
    pub was_stopped: bool,
    /// What each thread blocks, as in [`Outgoing::masks`].
    #[serde(default)]
    pub masks: Vec<(i32, u64)>,
    /// Addresses to add here.
    pub addresses: Vec<Address>,
}

/// A kind of record with a directory of its own.
pub trait Record: Serialize + DeserializeOwned {
    /// The directory below the state directory.
    const DIRECTORY: &'static str;
    /// The migration it is about, which names its file.
    fn id(&self) -> MigrationId;
}

impl Record for Outgoing {
    const DIRECTORY: &'static str = "outgoing";
    fn id(&self) -> MigrationId {
        self.id
    }
}

impl Record for Incoming {
    const DIRECTORY: &'static str = "incoming";
    fn id(&self) -> MigrationId {
        self.id
    }
}

/// Why a record could not be kept or found.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file operation failed.
    #[error("{step} {}", path.display())]
    Io {
        /// What was being done.
        step: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file is there, but is no record.
    #[error("{} is not a record of a migration", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A file is too long for a record.
    #[error("{} is larger than {MAX_RECORD_BYTES} bytes", .0.display())]
    TooLarge(PathBuf),
    /// A file holds the record of another migration than its name says.
    #[error("{} is about migration {found}", path.display())]
    Misnamed {
        /// The file.
        path: PathBuf,
        /// What is in it.
        found: MigrationId,
    },
}

/// The directory of one kind of records.
#[derive(Debug)]
pub struct Journal<R> {
    directory: PathBuf,
    kind: PhantomData<fn() -> R>,
}

/// Held while one process looks at a record and acts on it: see [`Journal::lock`].
#[derive(Debug)]
pub struct JournalLock(#[expect(dead_code, reason = "dropping it unlocks")] Flock<File>);

impl<R: Record> Journal<R> {
    /// Opens the journal below `state_dir`, making its directory (0700) if need be.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let directory = state_dir.join(R::DIRECTORY);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(io_error("creating", &directory))?;
        Ok(Self { directory, kind: PhantomData })
    }

    /// Writes the record, in place of an earlier one of this migration.
    ///
    /// # Errors
    /// If it cannot be written; the earlier one stays.
    pub fn write(&self, record: &R) -> Result<(), JournalError> {
        let path = self.path(record.id());
        let new = self.directory.join(format!(".{}.new", record.id()));
        let bytes = serde_json::to_vec(record)
            .map_err(|source| JournalError::Malformed { path: path.clone(), source })?;
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(&bytes))
            .map_err(io_error("writing", &new))?;
        fs::rename(&new, &path).map_err(io_error("renaming to", &path))
    }

    /// The record of this migration, if there is one.
    ///
    /// # Errors
    /// If the file cannot be read or is no record.
    pub fn read(&self, id: MigrationId) -> Result<Option<R>, JournalError> {
        let path = self.path(id);
        let file =
            match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path)
            {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                other => other.map_err(io_error("opening", &path))?,
            };
        let mut bytes = Vec::new();
        file.take(MAX_RECORD_BYTES + 1).read_to_end(&mut bytes).map_err(io_error("reading", &path))?;
        if u64::try_from(bytes.len()).is_ok_and(|n| n > MAX_RECORD_BYTES) {
            return Err(JournalError::TooLarge(path));
        }
        let record: R = serde_json::from_slice(&bytes)
            .map_err(|source| JournalError::Malformed { path: path.clone(), source })?;
        match record.id() {
            found if found == id => Ok(Some(record)),
            found => Err(JournalError::Misnamed { path, found }),
        }
    }

    /// Removes the record of a resolved migration. That there is none is fine.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(&self, id: MigrationId) -> Result<(), JournalError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(io_error("removing", &path)),
        }
    }

    /// All records, and the errors of those that cannot be read: for the log, they hinder nobody else.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn list(&self) -> Result<(Vec<R>, Vec<JournalError>), JournalError> {
        let (mut records, mut unreadable) = (Vec::new(), Vec::new());
        let entries = fs::read_dir(&self.directory).map_err(io_error("listing", &self.directory))?;
        for entry in entries {
            let name = entry.map_err(io_error("listing", &self.directory))?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".json")?.parse().ok());
            let Some(id) = id else { continue }; // the lock, a half-written record, nothing of ours
            match self.read(id) {
                Ok(record) => records.extend(record),
                Err(error) => unreadable.push(error),
            }
        }
        Ok((records, unreadable))
    }

    /// Waits for the right to act on a record of this directory. Read the record again under it: somebody
    /// else may have resolved the migration meanwhile, and a late SIGCONT would lift a newer one's fence.
    ///
    /// # Errors
    /// If the lock file cannot be made or locked.
    pub fn lock(&self) -> Result<JournalLock, JournalError> {
        let path = self.directory.join("lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("opening", &path))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map(JournalLock)
            .map_err(|(_, errno)| io_error("locking", &path)(errno.into()))
    }

    fn path(&self, id: MigrationId) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }
}

/// What identifies this boot of the host: start times of processes are only good within it.
///
/// # Errors
/// If `/proc` does not say.
pub fn boot_id() -> Result<String, JournalError> {
    static ID: OnceLock<String> = OnceLock::new();
    if let Some(id) = ID.get() {
        return Ok(id.clone());
    }
    let id = fs::read_to_string(BOOT_ID).map_err(io_error("reading", Path::new(BOOT_ID)))?;
    Ok(ID.get_or_init(|| id.trim().to_owned()).clone())
}

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io { step, path, source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn record(byte: u8, state: OutgoingState) -> Outgoing {
        Outgoing {
            id: MigrationId::new([byte; 16]),
            process: ProcessKey { pid: 7, start_ticks: 42 },
            boot: boot_id().unwrap(),
            owner: ProcessKey { pid: 8, start_ticks: 43 },
            destination: "[2001:db8::1]:7077".into(),
            peer: "sha256:00".into(),
            state,
            owes: false,
            was_stopped: false,
            masks: vec![],
            addresses: vec![],
            connections: false,
            hooks: vec![],
        }
    }

    #[test]
    fn a_record_is_replaced_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::<Outgoing>::open(dir.path()).unwrap();
        let (mut a, b) = (record(1, OutgoingState::Taking), record(2, OutgoingState::Moved));
        assert_eq!(journal.read(a.id).unwrap(), None);
        journal.write(&a).unwrap();
        journal.write(&b).unwrap();
        a.state = OutgoingState::Limbo;
        journal.write(&a).unwrap();
        assert_eq!(journal.read(a.id).unwrap(), Some(a.clone()));
        let mode = fs::metadata(journal.path(a.id)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let (mut all, bad) = journal.list().unwrap();
        all.sort_by_key(|r| r.id);
        assert_eq!(all, vec![a.clone(), b.clone()]);
        assert!(bad.is_empty());
        journal.remove(a.id).unwrap();
        journal.remove(a.id).unwrap();
        assert_eq!(journal.list().unwrap().0, vec![b]);
    }

    #[test]
    fn what_is_no_record_is_reported_and_hinders_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::<Outgoing>::open(dir.path()).unwrap();
        let good = record(1, OutgoingState::Limbo);
        journal.write(&good).unwrap();
        let at = |n: u8| journal.path(MigrationId::new([n; 16]));
        fs::write(at(2), b"{").unwrap();
        fs::write(at(3), vec![b' '; 100_000]).unwrap();
        fs::copy(at(1), at(4)).unwrap();
        fs::create_dir(at(5)).unwrap();
        std::os::unix::fs::symlink(at(1), at(6)).unwrap();
        nix::unistd::mkfifo(&at(7), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(at(8), serde_json::to_string(&good).unwrap().replace("limbo", "heaven")).unwrap();
        fs::write(dir.path().join("outgoing/README"), b"").unwrap();
        let (records, unreadable) = journal.list().unwrap();
        assert_eq!(records, vec![good]);
        assert_eq!(unreadable.len(), 7, "{unreadable:?}");
        assert!(unreadable.iter().any(|e| matches!(e, JournalError::Misnamed { .. })));
        assert!(unreadable.iter().any(|e| matches!(e, JournalError::TooLarge(_))));
    }

    #[test]
    fn the_lock_excludes() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::<Incoming>::open(dir.path()).unwrap();
        let held = journal.lock().unwrap();
        let other = || {
            Flock::lock(
                File::open(dir.path().join("incoming/lock")).unwrap(),
                FlockArg::LockExclusiveNonblock,
            )
        };
        assert!(other().is_err());
        drop(held);
        assert!(other().is_ok());
    }
}
