//! A small process that outlives the source command and ends what it leaves behind.
//!
//! The source command starts it before it freezes anything, and holds one end of a socket whose other end
//! is the sentinel's standard input. Nothing is said on it but "ready": when it closes, the source command
//! is gone, and its journal says what is to be done (see [`resolve`]). No record, nothing to do. So there
//! is no second account of the migration that could differ from the journal.
//!
//! The sentinel has a session of its own, no other descriptor and no terminal. If it is killed too, the
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
    /// until it is ready to take over.
    ///
    /// # Errors
    /// If it cannot be started or does not report.
    pub fn spawn(mut command: Command) -> Result<Self, SentinelError> {
        let failed = |step| move |source| SentinelError::Start { step, source };
        let (line, theirs) = UnixStream::pair().map_err(failed("making a socket for"))?;
        let child = command
            .stdin(OwnedFd::from(theirs))
            // An inherited pipe would keep whoever reads it waiting for us.
            .stdout(Stdio::null())
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
