//! System calls that another process runs for us, in batches.
//!
//! A [`Batch`] is a table of calls with the bytes they point to. A stopped thread runs the whole table in
//! one go (see `inject`), so a call costs a fraction of a microsecond instead of a stop of its own.
//! [`RemoteCalls`] is implemented by a frozen process at the source and by a skeleton at the destination;
//! the files under `state/` know only this trait.

use nix::errno::Errno;

/// Thread id as seen in our own PID namespace.
pub type Tid = i32;

/// Bytes that all batches may point to, in one run: the size of the scratch area in the process.
pub const SCRATCH_BYTES: usize = 192 * 1024;

/// One argument of a remote call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// A plain value.
    Value(u64),
    /// The remote address of the batch's data at this offset.
    Data(usize),
}

impl From<u64> for Arg {
    fn from(v: u64) -> Self {
        Arg::Value(v)
    }
}
impl From<u32> for Arg {
    fn from(v: u32) -> Self {
        Arg::Value(u64::from(v))
    }
}
impl From<usize> for Arg {
    fn from(v: usize) -> Self {
        Arg::Value(v as u64)
    }
}
impl From<i32> for Arg {
    fn from(v: i32) -> Self {
        Arg::from(i64::from(v))
    }
}
impl From<i64> for Arg {
    fn from(v: i64) -> Self {
        Arg::Value(u64::from_ne_bytes(v.to_ne_bytes()))
    }
}

/// One entry of the table.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// System call number (`libc::SYS_*`).
    pub number: i64,
    /// Its six arguments.
    pub args: [Arg; 6],
}

/// A table of system calls and the data they read or fill in.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    pub(crate) calls: Vec<Call>,
    pub(crate) data: Vec<u8>,
    /// Places in the data that hold the remote address of another place in the data.
    pub(crate) pointers: Vec<(usize, usize)>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a call with up to six arguments and returns its index for [`Outcome::ret`].
    pub fn call(&mut self, number: i64, args: &[Arg]) -> usize {
        let mut six = [Arg::Value(0); 6];
        for (slot, arg) in six.iter_mut().zip(args) {
            *slot = *arg;
        }
        self.calls.push(Call { number, args: six });
        self.calls.len() - 1
    }

    /// Copies `bytes` into the batch's data (8-byte aligned) and returns the argument that points there.
    pub fn input(&mut self, bytes: &[u8]) -> Arg {
        let at = self.reserve();
        self.data.extend_from_slice(bytes);
        Arg::Data(at)
    }

    /// Like [`Batch::input`], with a final NUL byte: a path or a name.
    pub fn input_c_string(&mut self, bytes: &[u8]) -> Arg {
        let at = self.input(bytes);
        self.data.push(0);
        at
    }

    /// Reserves `len` zeroed bytes for a call to fill in; read them with [`Outcome::data`].
    pub fn output(&mut self, len: usize) -> Arg {
        let at = self.reserve();
        self.data.resize(at + len, 0);
        Arg::Data(at)
    }

    /// Makes the eight bytes at `offset` of what `within` points to hold the remote address of `target`: a
    /// pointer inside a structure (`iovec`, `msghdr`, `clone_args`). Both must be data of this batch.
    pub fn pointer_to(&mut self, within: Arg, offset: usize, target: Arg) {
        if let (Arg::Data(within), Arg::Data(target)) = (within, target) {
            self.pointers.push((within + offset, target));
        }
    }

    /// The data as it must be at `address` in the process, pointers filled in.
    pub(crate) fn data_at(&self, address: u64) -> Vec<u8> {
        let mut data = self.data.clone();
        for &(at, target) in &self.pointers {
            if let Some(place) = data.get_mut(at..at + 8) {
                place.copy_from_slice(&(address + target as u64).to_ne_bytes());
            }
        }
        data
    }

    /// Number of calls.
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    fn reserve(&mut self) -> usize {
        let at = self.data.len().next_multiple_of(8);
        self.data.resize(at, 0);
        at
    }
}

/// What the calls of a batch returned, and its data as they left it.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub(crate) returned: Vec<i64>,
    pub(crate) data: Vec<u8>,
}

impl Outcome {
    /// The value that call `index` returned, or its errno.
    ///
    /// # Errors
    /// The call's errno; `EINVAL` for an index outside the batch.
    pub fn ret(&self, index: usize) -> Result<u64, Errno> {
        match self.returned.get(index) {
            None => Err(Errno::EINVAL),
            Some(&v) if (-4095..0).contains(&v) => Err(Errno::from_raw(i32::try_from(-v).unwrap_or(0))),
            Some(&v) => Ok(u64::from_ne_bytes(v.to_ne_bytes())),
        }
    }

    /// The first failed call: its index and errno.
    pub fn first_error(&self) -> Option<(usize, Errno)> {
        (0..self.returned.len()).find_map(|i| self.ret(i).err().map(|e| (i, e)))
    }

    /// `len` bytes of the data at what [`Batch::input`] or [`Batch::output`] returned; empty if outside.
    pub fn data(&self, at: Arg, len: usize) -> &[u8] {
        match at {
            Arg::Data(at) => self.data.get(at..at.saturating_add(len)).unwrap_or_default(),
            Arg::Value(_) => &[],
        }
    }
}

/// Why a process did not run our calls.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The process died or was killed while it was held.
    #[error("process {0} is gone")]
    Gone(Tid),
    /// A ptrace or memory operation failed.
    #[error("{step} of thread {tid}")]
    Sys {
        /// What was being done.
        step: &'static str,
        /// To which thread.
        tid: Tid,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The thread stopped in a way that injection does not expect.
    #[error("thread {tid} stopped with status {status:#x} while it ran injected calls")]
    UnexpectedStop {
        /// The thread.
        tid: Tid,
        /// Its wait status.
        status: i32,
    },
    /// The process has no place for the injected code or data.
    #[error("no room for injected code in process {tid}: {why}")]
    NoRoom {
        /// The process.
        tid: Tid,
        /// What is missing.
        why: &'static str,
    },
    /// One remote system call that must succeed failed.
    #[error("{what} in process {tid}")]
    Call {
        /// What the call was for.
        what: String,
        /// The process.
        tid: Tid,
        /// What it returned.
        #[source]
        errno: Errno,
    },
}

/// A stopped process that runs system calls for us.
pub trait RemoteCalls {
    /// The process's leader.
    fn pid(&self) -> Tid;

    /// Runs `batch` in the process's leader.
    ///
    /// # Errors
    /// If the process is gone or cannot be driven; failed calls are in the outcome.
    fn run(&mut self, batch: &Batch) -> Result<Outcome, InjectError>;

    /// Runs one batch in each of these threads, at the same time; outcomes in the same order.
    ///
    /// # Errors
    /// As [`RemoteCalls::run`].
    fn run_in_threads(&mut self, batches: &[(Tid, Batch)]) -> Result<Vec<Outcome>, InjectError>;

    /// Runs `batch` in the leader and fails on the first call that failed, naming it by `what`.
    ///
    /// # Errors
    /// As [`RemoteCalls::run`], and [`InjectError::Call`].
    fn run_all_ok(&mut self, what: &str, batch: &Batch) -> Result<Outcome, InjectError> {
        let outcome = self.run(batch)?;
        match outcome.first_error() {
            None => Ok(outcome),
            Some((index, errno)) => {
                Err(InjectError::Call { what: format!("{what} (call {index})"), tid: self.pid(), errno })
            }
        }
    }
}
