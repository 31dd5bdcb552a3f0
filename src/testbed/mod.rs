//! Two hosts on one machine, for `migrate demo` and for the tests.
//!
//! Each host is a set of namespaces (network, PID, mount, IPC, UTS) whose first process is an
//! [`agent`]: it starts programs on request and reaps. A third host, the [`Lan`], holds the bridge
//! between them, and its network namespace is where clients live. Nothing is made outside of these
//! namespaces, no file and no interface: when the program that made them ends in any way, the agents
//! see the end of their input, end too, and the kernel removes everything with them.
//!
//! The lan's `/run` is a tmpfs. [`SHARED`] in it is a disk that both hosts see, [`PRIVATE`] is each
//! host's own.

pub mod agent;
mod host;
mod lan;
pub mod load;
mod moving;
pub mod redis;

use std::io;
use std::time::{Duration, Instant};

pub use host::{Exit, Host, Job, Spawn};
pub use lan::{Lan, Tools};
pub use moving::{Outcome, Service};

/// A directory that all hosts of a lan share, as storage that both machines mount.
pub const SHARED: &str = "/run/shared";
/// A directory of the host's own.
pub const PRIVATE: &str = "/run/node";
/// Where the hosts keep the state of `migrate`.
pub const STATE: &str = "/run/node/state";

/// What can go wrong with the test grounds themselves.
#[derive(Debug, thiserror::Error)]
pub enum TestbedError {
    /// A step failed in the kernel or the file system.
    #[error("{step}")]
    Io {
        /// What was tried.
        step: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A command that sets something up said no.
    #[error("{command} failed: {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// What it printed.
        stderr: String,
    },
    /// The agent of a host refused a request or is gone.
    #[error("the agent of host {host}: {what}")]
    Agent {
        /// The host's name.
        host: String,
        /// What it answered.
        what: String,
    },
    /// Something awaited did not happen in time.
    #[error("{what} did not happen within {seconds} s")]
    Deadline {
        /// What was awaited.
        what: String,
        /// For how long.
        seconds: u64,
    },
    /// A program ended that should have gone on, or said something else than it should.
    #[error("{0}")]
    Program(String),
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, TestbedError>;

/// Turns an I/O error into ours, naming the step.
pub(crate) fn step<T>(result: io::Result<T>, step: impl FnOnce() -> String) -> Result<T> {
    result.map_err(|source| TestbedError::Io { step: step(), source })
}

/// Asks `condition` again and again until it gives a value; an error once `limit` has passed.
///
/// # Errors
/// [`TestbedError::Deadline`], or what `condition` itself fails with.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if Instant::now() >= end {
            return Err(TestbedError::Deadline { what: what.to_owned(), seconds: limit.as_secs() });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
