//! A small process that outlives the source command and ends what it leaves behind.
//!
//! The source command starts it before it freezes anything, and holds one end of a socket whose other end
//! is the sentinel's standard input. Nothing is said on it but "ready": when it closes, the source command
//! is gone, and its journal says what is to be done (see [`resolve`]). No record, nothing to do. So there
//! is no second account of the migration that could differ from the journal.
//!
//! The sentinel has a session of its own, no other descriptor (but that of the lock on the connections, see
//! [`crate::engine::lock`]) and no terminal. If it is killed too, the
//! journal remains, and `migrate resume ID` or the next move of the process does the same.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;

use crate::engine::sys::inherit;
use crate::journal::{Journal, JournalError, Outgoing};
use crate::migration::MigrationId;
use crate::source::resolve::{self, Destination, Patience, Resolution};

/// What the sentinel says when it is there.
const READY: u8 = b'R';
/// It says so within milliseconds; a host too busy for this is too busy for a migration.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before what failed for a local reason (a full disk, a missing device) is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// How often that is; then it takes an operator, and the journal keeps what he needs.
const MAX_FAILURES: u32 = 100;

/// Why there is no sentinel, or why it ended.
#[derive(Debug, thiserror::Error)]
pub enum SentinelError {
    /// Starting it failed.
    #[error("{step} the sentinel")]
    Start {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Its own set-up failed.
    #[error("sentinel: {step}")]
    SetUp {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The journal cannot be opened.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The migration stays unresolved.
    #[error(transparent)]
    Resolve(#[from] resolve::ResolveError),
}

/// The source command's hold on its sentinel. Dropping it is what the sentinel waits for.
#[derive(Debug)]
pub struct Sentinel {
    line: UnixStream,
    child: Child,
}

impl Sentinel {
    /// Starts `command` (`/proc/self/exe` with the hidden subcommand that calls [`run_sentinel`]) and waits
    /// until it is ready to take over. `held` is the socket of the lock, which it holds as long as it lives or
    /// until it lets go ([`crate::engine::lock::let_go`]), in the place of its standard output.
    ///
    /// # Errors
    /// If it cannot be started or does not report.
    pub fn spawn(mut command: Command, held: Option<OwnedFd>) -> Result<Self, SentinelError> {
        let failed = |step| move |source| SentinelError::Start { step, source };
        let (line, theirs) = UnixStream::pair().map_err(failed("making a socket for"))?;
        let child = command
            .stdin(OwnedFd::from(theirs))
            // An inherited pipe would keep whoever reads it waiting for us.
            .stdout(held.map_or_else(Stdio::null, Stdio::from))
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed("starting"))?;
        drop(command); // and with it our copy of their end
        let mut sentinel = Self { line, child };
        match sentinel.await_ready() {
            Ok(()) => Ok(sentinel),
            Err(source) => {
                let _ = sentinel.child.kill();
                let _ = sentinel.child.wait();
                Err(SentinelError::Start { step: "waiting for", source })
            }
        }
    }

    fn await_ready(&mut self) -> io::Result<()> {
        self.line.set_read_timeout(Some(READY_TIMEOUT))?;
        let mut word = [0];
        self.line.read_exact(&mut word)?;
        if word == [READY] { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still watches. To be asked once more right before limbo.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends it home and waits for its end. The journal's record must be gone, or it will resolve it.
    pub fn dismiss(self) {
        let Self { line, mut child } = self;
        drop(line);
        let _ = child.wait();
    }
}

/// The sentinel's whole life: reports ready on standard input (a socket), waits until the other end is
/// closed, resolves migration `id` by the journal in `state_dir`.
///
/// To be called first thing in a process that owns no descriptor above 2.
///
/// # Errors
/// If it cannot watch, or the host itself keeps hindering it. A destination that is not reached is asked
/// again for ever.
pub fn run_sentinel(
    state_dir: &Path,
    id: MigrationId,
    destination: &mut impl Destination,
) -> Result<Resolution, SentinelError> {
    let failed = |step| move |errno| SentinelError::SetUp { step, errno };
    inherit::close_inherited().map_err(failed("closing inherited descriptors"))?;
    nix::unistd::setsid().map_err(failed("making a session"))?;
    let journal = Journal::<Outgoing>::open(
        &std::path::absolute(state_dir)
            .map_err(|source| SentinelError::Start { step: "finding the state directory of", source })?,
    )?;
    nix::unistd::chdir("/").map_err(failed("leaving the working directory"))?;
    watch(&io::stdin())
        .map_err(|source| SentinelError::Start { step: "reporting to the source of", source })?;
    let mut failures = 0;
    loop {
        match resolve::resolve(&journal, id, destination, Patience::Endless) {
            Ok(Some(resolution)) => return Ok(resolution),
            Ok(None) => {}
            Err(error) if failures >= MAX_FAILURES => return Err(error.into()),
            Err(error) => {
                failures += 1;
                tracing::error!(migration = %id, error = &error as &dyn std::error::Error, "not resolved yet");
            }
        }
        std::thread::sleep(RETRY_PAUSE);
    }
}

/// Says "ready" and returns when the other end is closed, by its process's death or on purpose.
fn watch(standard_input: &impl std::os::fd::AsFd) -> io::Result<()> {
    let mut line = UnixStream::from(standard_input.as_fd().try_clone_to_owned()?);
    let _ = line.write_all(&[READY]); // if nobody listens any more, the read below says so
    let mut nothing = [0; 16];
    loop {
        match line.read(&mut nothing) {
            Ok(0) => return Ok(()),
            // A reset is the close of an end that had not read our word.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
            _ => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::path::PathBuf;

    use nix::sys::signal::Signal;

    use super::*;
    use crate::engine::alive;
    use crate::engine::trial::Killed;
    use crate::journal::{OutgoingState, boot_id};
    use crate::migration::{Fate, ProcessKey};

    const DIR: &str = "MIGRATE_TEST_SENTINEL_DIR";
    const ID: MigrationId = MigrationId::new([9; 16]);

    /// Reads its answers from the test's directory: the file `fate`, once it is there.
    struct ByFile(PathBuf);

    impl Destination for ByFile {
        fn ask(&mut self, _: &Outgoing) -> Option<Fate> {
            match std::fs::read_to_string(self.0.join("fate")).ok()?.as_str() {
                "accepted" => Some(Fate::Accepted),
                "not accepted" => Some(Fate::NotAccepted),
                _ => None,
            }
        }
        fn serve(&mut self, _: &Outgoing) -> bool {
            true
        }
        fn confirm(&mut self, _: &Outgoing) {
            std::fs::write(self.0.join("confirmed"), b"").unwrap();
        }
    }

    /// This test program again, as another process that runs only the function `entry` below.
    fn as_child(entry: &str, dir: &Path) -> Command {
        let mut command = Command::new("/proc/self/exe");
        let name = format!("source::sentinel::tests::{entry}");
        command.args(["--exact", &name, "--ignored", "--nocapture"]).env(DIR, dir);
        command
    }

    fn test_dir() -> PathBuf {
        std::env::var_os(DIR).expect("started by another test").into()
    }

    #[test]
    #[ignore = "runs in a process of its own, started by the tests below"]
    fn sentinel_process() {
        let dir = test_dir();
        let resolution = run_sentinel(&dir, ID, &mut ByFile(dir.clone())).unwrap();
        std::fs::write(dir.join("resolution"), format!("{resolution:?}")).unwrap();
    }

    /// A source command that has its sentinel and its record, and then only waits for its end.
    #[test]
    #[ignore = "runs in a process of its own, started by the tests below"]
    fn source_process() {
        let dir = test_dir();
        let _inherited = nix::unistd::dup(std::fs::File::open("/proc/self/stat").unwrap()).unwrap();
        let sentinel = Sentinel::spawn(as_child("sentinel_process", &dir), None).unwrap();
        let journal = Journal::<Outgoing>::open(&dir).unwrap();
        let mut record = journal.read(ID).unwrap().unwrap();
        let pid = std::process::id();
        record.owner = ProcessKey { pid, start_ticks: alive::start_ticks(pid).unwrap().unwrap() };
        journal.write(&record).unwrap();
        std::fs::write(dir.join("armed"), sentinel.pid().to_string()).unwrap();
        loop {
            std::thread::park();
        }
    }

    /// Waits for a file to appear with contents, and returns them.
    fn await_file(path: &Path) -> String {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            match std::fs::read_to_string(path) {
                Ok(text) if !text.is_empty() => return text,
                _ => assert!(std::time::Instant::now() < deadline, "{} does not appear", path.display()),
            }
            std::thread::yield_now();
        }
    }

    /// The source command is killed while `state` is recorded; returns the process's end state.
    fn source_killed(state: OutgoingState, fate: &str) -> (String, char, bool) {
        let dir = tempfile::tempdir().unwrap();
        let process = Killed::sleeper();
        let start_ticks = alive::start_ticks(process.id()).unwrap().unwrap();
        alive::open(process.id(), start_ticks).unwrap().unwrap().signal(Signal::SIGSTOP).unwrap();
        let record = Outgoing {
            id: ID,
            process: ProcessKey { pid: process.id(), start_ticks },
            boot: boot_id().unwrap(),
            owner: ProcessKey { pid: 1, start_ticks: 0 },
            destination: String::new(),
            peer: String::new(),
            state,
            owes: false,
            was_stopped: false,
            masks: vec![],
            addresses: vec![],
            connections: false,
            hooks: vec![],
        };
        Journal::open(dir.path()).unwrap().write(&record).unwrap();

        let source = Killed::spawn(as_child("source_process", dir.path()).stdout(Stdio::null()));
        let sentinel: u32 = await_file(&dir.path().join("armed")).parse().unwrap();
        let session = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(sentinel.cast_signed()))).unwrap();
        assert_eq!(session.as_raw().cast_unsigned(), sentinel, "it leads a session of its own");
        let fds = std::fs::read_dir(format!("/proc/{sentinel}/fd")).unwrap();
        let lead_to: Vec<_> = fds.map(|fd| std::fs::read_link(fd.unwrap().path()).unwrap()).collect();
        let strange =
            |path: &&PathBuf| !path.ends_with("null") && !path.to_string_lossy().starts_with("socket:");
        assert_eq!(lead_to.iter().find(strange), None, "nothing inherited");
        assert!(!dir.path().join("resolution").exists(), "it waits for the end of the source command");

        drop(source);
        std::fs::write(dir.path().join("fate"), fate).unwrap();
        let resolution = await_file(&dir.path().join("resolution"));
        let state = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.id())).unwrap();
            stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
        };
        let mut end = state();
        // Killed, but on a busy host it has not come to die yet.
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while fate == "accepted" && end != 'Z' && std::time::Instant::now() < limit {
            std::thread::yield_now();
            end = state();
        }
        assert_eq!(Journal::<Outgoing>::open(dir.path()).unwrap().read(ID).unwrap(), None);
        (resolution, end, dir.path().join("confirmed").exists())
    }

    #[test]
    fn a_killed_source_in_limbo_is_resolved_either_way() {
        let (resolution, end, confirmed) = source_killed(OutgoingState::Limbo, "accepted");
        assert_eq!((resolution.as_str(), confirmed), ("Moved", true));
        assert!("ZX".contains(end), "{end}");

        let (resolution, end, confirmed) = source_killed(OutgoingState::Limbo, "not accepted");
        assert_eq!((resolution.as_str(), confirmed), ("NotMoved", false));
        assert!("SR".contains(end), "{end}");
    }

    #[test]
    fn dismissed_without_a_record_it_does_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut sentinel = Sentinel::spawn(as_child("sentinel_process", dir.path()), None).unwrap();
        assert!(sentinel.is_alive());
        sentinel.dismiss();
        assert_eq!(await_file(&dir.path().join("resolution")), "Nothing");
    }

    #[test]
    fn what_is_no_sentinel_is_reported() {
        let error = Sentinel::spawn(Command::new("true"), None).unwrap_err();
        assert_eq!(error.to_string(), "waiting for the sentinel");
        assert!(Sentinel::spawn(Command::new("/nonexistent"), None).is_err());
    }
}
