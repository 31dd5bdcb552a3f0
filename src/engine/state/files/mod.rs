//! Descriptors: what each leads to, at the source from outside, at the destination in a new process.
//!
//! - [`check`] looks at the running process and collects every reason against a move at once.
//! - [`capture()`] reads a stopped process. Nothing is consumed: after a failed move it goes on as before.
//! - [`build()`] makes the open file descriptions as descriptors of ours, [`install()`] gives them to the
//!   process at their numbers.
//! - [`close_peers`] ends the connections that `--tcp-close` gave up, after the commit.
//! - Live TCP connections (`--tcp-established`) are made silent, and come to life after the acceptance
//!   ([`SilentConnections`]); at the source they are then dropped, silently too ([`drop_silently`]).
//!
//! Descriptors are duplicated from the process (`pidfd_getfd`), so everything is asked of the object
//! itself and not of a path that may lead elsewhere by now. What is not known here is refused by name.

mod anycast;
mod build;
mod capture;
mod early;
mod epoll;
mod eventfd;
mod filter;
mod holders;
mod inet;
mod install;
mod ip_socket;
mod lasting;
mod memfd;
mod multicast;
mod multicast_if;
mod netlink;
mod options;
mod path;
mod pipe;
mod reuseport;
mod scan;
mod signalfd;
mod tcp;
#[cfg(test)]
mod tests;
mod timerfd;
mod unix;
mod unix_diag;
mod unix_names;
mod unix_single;

use std::collections::HashSet;

use nix::errno::Errno;

use crate::engine::lock::LockError;
use crate::engine::reason::Reason;
use crate::engine::remote::{InjectError, Tid};
use crate::proto::files::FileRef;

pub use build::{Built, build};
pub use capture::{CapturedFiles, capture, capture_after, check};
pub use early::EarlyLook;
pub use holders::ScannedProcesses;
pub use install::install;
pub use lasting::Lasting;
pub use path::{add_content, compare_here, describe};
pub use scan::Descriptors;
pub use tcp::{
    AheadSockets, ListenPort, MOST_AHEAD, MOST_QUEUED_BYTES, SilentConnections, TakenQueues, close_peers,
    drop_connections, drop_silently, is_listening, is_unsettled, leave_repair, port_free, take_queued,
    unsettled, wake_connections,
};
pub(in crate::engine) use tcp::{abort_half, ends_of, received_by, remove_remains};
pub use unix_names::UnixNames;

/// What the operator allows.
#[derive(Debug, Clone, Copy, Default)]
pub struct FilesOptions {
    /// Carry live TCP connections.
    pub tcp_established: bool,
    /// Give established TCP connections up.
    pub tcp_close: bool,
    /// Leave standard streams behind that lead out of the process.
    pub shell_job: bool,
    /// Connections that are not accepted yet are carried, too: see [`take_queued`].
    pub tcp_queued: bool,
}

/// What a look at the running process found.
#[derive(Debug, Default)]
pub struct FilesCheck {
    /// What is in the way.
    pub reasons: Vec<Reason>,
    /// Listening ports, which must be free at the destination.
    pub ports: Vec<ListenPort>,
    /// Open files, which must be there and the same.
    pub files: Vec<FileRef>,
    /// Other processes looked at, for [`capture_after`].
    pub scanned: ScannedProcesses,
    /// The number of its last descriptor.
    pub highest: u32,
    /// Its sockets that have been there for a while, by inode.
    pub sockets: HashSet<u64>,
}

/// Why the descriptors of a process could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CaptureFilesError {
    /// The process died.
    #[error("process {0} is gone")]
    Gone(Tid),
    /// A look at the process as a whole failed.
    #[error("{step} of process {pid}")]
    Process {
        /// What was being done.
        step: &'static str,
        /// To which process.
        pid: Tid,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// Its sockets could not be listed.
    #[error(transparent)]
    Sockets(#[from] LockError),
    /// A look at one descriptor failed.
    #[error("{step} of fd {number} of process {pid}")]
    Descriptor {
        /// What was being done.
        step: &'static str,
        /// To which process.
        pid: Tid,
        /// To which descriptor.
        number: i32,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// Some descriptors cannot be carried.
    #[error("{} descriptors of process {pid} cannot be carried, the first: {}", reasons.len(),
        reasons.first().map(ToString::to_string).unwrap_or_default())]
    Refused {
        /// The process.
        pid: Tid,
        /// All of them.
        reasons: Vec<Reason>,
    },
}

/// Why descriptors could not be made again.
#[derive(Debug, thiserror::Error)]
pub enum RestoreFilesError {
    /// The description we were sent does not make sense.
    #[error("the description of descriptors is invalid: {0}")]
    Invalid(&'static str),
    /// A file is not here, or is another one.
    #[error("file here: {0}")]
    File(Reason),
    /// Making an object failed.
    #[error("{step} for fd {number}")]
    Make {
        /// What was being done.
        step: &'static str,
        /// The descriptor it was for.
        number: u32,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A setting could not be made as it was.
    #[error("{what} of fd {number} does not take the value it had")]
    Differs {
        /// Which setting.
        what: String,
        /// The descriptor it was for.
        number: u32,
    },
    /// Handing descriptors to the process failed on our side.
    #[error("{step} for process {pid}")]
    Pass {
        /// What was being done.
        step: &'static str,
        /// The process.
        pid: Tid,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The process did not run our calls.
    #[error("installing descriptors")]
    Inject(#[from] InjectError),
}

/// Why one description is not captured: refused in words, or a failed step.
#[derive(Debug, Clone)]
enum Stop {
    Refused { why: String, remedy: &'static str },
    Failed { step: &'static str, errno: Errno },
}

impl Stop {
    fn refuse(why: impl Into<String>) -> Self {
        Stop::Refused { why: why.into(), remedy: "" }
    }
    fn advise(why: impl Into<String>, remedy: &'static str) -> Self {
        Stop::Refused { why: why.into(), remedy }
    }
    fn failed(step: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Stop::Failed { step, errno }
    }
}

/// Why one description is not made: the descriptor's number is added where it is known.
#[derive(Debug)]
enum Trouble {
    Step(&'static str, Errno),
    Differs(String),
    Invalid(&'static str),
    File(Reason),
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Trouble::Step(step, errno) => write!(f, "{step}: {errno}"),
            Trouble::Differs(what) => write!(f, "{what} does not take the value it had"),
            Trouble::Invalid(what) => write!(f, "{what} is not valid"),
            Trouble::File(reason) => reason.fmt(f),
        }
    }
}

impl Trouble {
    fn step(step: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Trouble::Step(step, errno)
    }
    fn for_fd(self, number: u32) -> RestoreFilesError {
        match self {
            Trouble::Step(step, errno) => RestoreFilesError::Make { step, number, errno },
            Trouble::Differs(what) => RestoreFilesError::Differs { what, number },
            Trouble::Invalid(what) => RestoreFilesError::Invalid(what),
            Trouble::File(reason) => RestoreFilesError::File(reason),
        }
    }
}

/// The kernel's answer in an I/O error.
fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
