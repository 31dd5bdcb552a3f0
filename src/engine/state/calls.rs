//! What the files of this room share: calls of a batch that have names, errors, reading /proc.

use nix::errno::Errno;

use crate::engine::clocks::ClockError;
use crate::engine::procfs::{self, ProcfsError};
use crate::engine::reason::Reason;
use crate::engine::remote::{Arg, Batch, InjectError, Outcome, Tid};

/// Why an attribute could not be read or set.
#[derive(Debug, thiserror::Error)]
pub enum AttrError {
    /// A file of /proc could not be read.
    #[error("reading {path}")]
    Read {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file of /proc could not be written.
    #[error("writing {path}")]
    Write {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It could be read, and made no sense.
    #[error("parsing {path}")]
    Parse {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: ProcfsError,
    },
    /// A system call of ours about a thread failed.
    #[error("{step} of thread {tid}")]
    Thread {
        /// What was being done.
        step: &'static str,
        /// To which thread.
        tid: Tid,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The process could not run our calls, or one of them failed.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// The clocks of the process could not be told from ours.
    #[error("comparing the clocks of the process with ours")]
    Clocks(#[from] ClockError),
    /// There is state that cannot be carried, or not be had here.
    #[error("{} attributes cannot be carried, the first: {}", .0.len(), .0.first().map(ToString::to_string).unwrap_or_default())]
    Refused(Vec<Reason>),
}

/// `step` of `tid`, as an error.
pub(super) fn failed(step: &'static str, tid: Tid) -> impl Fn(Errno) -> AttrError {
    move |errno| AttrError::Thread { step, tid, errno }
}

/// Reads a file of /proc.
pub(super) fn read(path: String) -> Result<Vec<u8>, AttrError> {
    procfs::read(&path).map_err(|source| AttrError::Read { path, source })
}

/// Reads and parses a file of /proc.
pub(crate) fn read_as<T>(
    path: String,
    parse: impl Fn(&[u8]) -> Result<T, ProcfsError>,
) -> Result<T, AttrError> {
    match parse(&read(path.clone())?) {
        Ok(value) => Ok(value),
        Err(source) => Err(AttrError::Parse { path, source }),
    }
}

/// Calls of one concern within a batch, each with what it is for.
#[derive(Debug, Default)]
pub struct Named {
    calls: Vec<(usize, &'static str, Option<u64>)>,
}

impl Named {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// With those of another kind of state, in the same batch.
    #[must_use]
    pub fn and(mut self, others: Self) -> Self {
        self.calls.extend(others.calls);
        self
    }

    /// Adds a call that must not fail; returns its index.
    pub fn add(&mut self, batch: &mut Batch, what: &'static str, number: i64, args: &[Arg]) -> usize {
        let index = batch.call(number, args);
        self.calls.push((index, what, None));
        index
    }

    /// Adds a call that must return this value.
    pub fn expect(&mut self, batch: &mut Batch, what: &'static str, call: (i64, &[Arg]), value: u64) {
        let index = batch.call(call.0, call.1);
        self.calls.push((index, what, Some(value)));
    }

    /// Fails on the first call that did not do what it must, by its name. A call that returned another
    /// value than it must counts as EINVAL.
    ///
    /// # Errors
    /// [`InjectError::Call`].
    pub fn check(&self, tid: Tid, outcome: &Outcome) -> Result<(), InjectError> {
        for &(index, what, value) in &self.calls {
            let fail = |errno| InjectError::Call { what: what.into(), tid, errno };
            let got = outcome.ret(index).map_err(fail)?;
            if value.is_some_and(|v| v != got) {
                return Err(fail(Errno::EINVAL));
            }
        }
        Ok(())
    }
}

/// Native-endian words of what a call filled in.
pub(super) fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|c| u64::from_ne_bytes(c.try_into().unwrap_or_default())).collect()
}

/// The 32-bit number at the beginning of what a call filled in; 0 if there is none.
pub(super) fn u32_of(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |c| u32::from_ne_bytes(*c))
}
