//! The missing pages of a process that runs already, at the destination (post-copy).
//!
//! The mappings that miss pages are registered with a userfaultfd of the process. A thread that touches a
//! missing page waits; its fault is reported here, the source is asked, and whatever brings the page
//! calls [`Lazy::install`], as the background push does. Each page is placed once.
//!
//! What the process does to its memory meanwhile is followed by events, and the thread that does it goes
//! on only when its event has been read:
//!
//! | event | when it is sent | what follows |
//! |---|---|---|
//! | fork | the child has its copy | the child misses the same pages; they are placed in both |
//! | remap | the mapping has moved | the pages belong to the new address |
//! | unmap | the mapping is gone | its pages are wanted no more |
//! | remove | *before* the contents go | private: wanted no more; shared: see `look` |
//!
//! Nothing may be placed by a table that does not know of an event that has been read. So messages are
//! read and acted upon, and pages are placed, under one lock, by any thread. While an event is unread the kernel refuses
//! to place pages (EAGAIN); a fault that overtakes the event about its own address is caught by that.
//!
//! When the last userfaultfd is closed, whoever waits for a page reads zeros. So a [`Lazy`] may be closed
//! only when nothing is missing (see [`Lazy::finish`]), and its owner, who may die before, gives duplicates
//! of all that it holds to a [`Keeper`]; whoever gets them from there goes on ([`Lazy::take_over`]).
//!
//! Not seen by a userfaultfd, and so to be placed before the process runs: written pages of private file
//! mappings, memory that also a descriptor or a new attachment leads to (a memfd that is open, System V
//! shared memory that others may attach). Guard regions that are installed over missing pages
//! (MADV_GUARD_INSTALL) are lost when the pages arrive, and MADV_WIPEONFORK is followed only as of the
//! freeze.

pub mod book;
mod handler;
mod huge;
mod keep;
mod look;
mod pieces;
mod place;
mod start;
mod state;
mod stats;
pub mod table;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::Epoll;

use crate::engine::extents::Extents;
use crate::engine::memory::PAGE_BYTES;
use crate::engine::remote::{InjectError, Tid};
use crate::report::Latency;
use book::BookError;
use place::{Content, Progress};
use state::State;
use table::TableError;

pub use handler::{Left, Reader, UNSETTLED};
pub use keep::{Held, Keeper, Kept};
pub use stats::Stats;

/// Why missing pages cannot be served, or one could not be placed.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// The layout has pages missing where they cannot be waited for.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The process could not be driven.
    #[error("driving the process")]
    Inject(#[from] InjectError),
    /// A step of the kernel's failed.
    #[error("{step} for process {pid}")]
    Sys {
        /// What was being done.
        step: &'static str,
        /// For which process.
        pid: Tid,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A mapping cannot be registered.
    #[error("watching {start:#x}-{end:#x}")]
    Register {
        /// First address.
        start: u64,
        /// First address behind.
        end: u64,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A shared object cannot be found behind its mapping.
    #[error("looking up the shared memory at {start:#x}")]
    Object {
        /// Where it is mapped.
        start: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// What arrived is not whole pages, or lies outside of any address space.
    #[error("{len} bytes at {address:#x} are not pages")]
    NotPages {
        /// Their address.
        address: u64,
        /// How many.
        len: u64,
    },
    /// The book cannot be written, or not be gone on by.
    #[error(transparent)]
    Book(#[from] BookError),
    /// Somebody's userfaultfd, or the book, was not kept.
    #[error("not all that is needed for the missing pages was kept")]
    NotKept,
    /// A page could not be placed; it is still missing.
    #[error("placing a page at {address:#x}")]
    Place {
        /// Where.
        address: u64,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
}

/// Called with names (source addresses) of pages that the source must send now. The name of a huge page
/// is that of its first part, and means all of it.
pub type Ask = Box<dyn Fn(&[u64]) + Send + Sync>;

/// A process whose missing pages come in. Not to be dropped before [`Lazy::is_done`] says so: see the
/// module.
#[derive(Debug)]
pub struct Lazy {
    shared: Shared,
}

/// What the threads that read and those that install have in common.
struct Shared {
    state: Mutex<State>,
    /// Something has been read, installed or dropped.
    changed: Condvar,
    epoll: Arc<Epoll>,
    ask: Ask,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much is placed under one lock: a fault that comes meanwhile waits about 30 microseconds.
const TURN_BYTES: u64 = 128 * 1024;

impl Lazy {
    /// Places pages that arrived, named by their source address. Those that are not missing are counted
    /// and left alone. Any thread may call it.
    ///
    /// # Errors
    /// See [`LazyError`]: pages not placed are still missing.
    pub fn install(&self, address: u64, bytes: &[u8]) -> Result<(), LazyError> {
        self.put(address, bytes.len() as u64, |from, to| {
            let index = |at: u64| usize::try_from(at - address).unwrap_or(usize::MAX);
            Content::Bytes(bytes.get(index(from)..index(to)).unwrap_or_default())
        })
    }

    /// Places zeros. `present`: as pages of its own, which count in the resident size.
    ///
    /// # Errors
    /// See [`LazyError`].
    pub fn install_zero(&self, address: u64, pages: u64, present: bool) -> Result<(), LazyError> {
        let len = pages.saturating_mul(PAGE_BYTES);
        self.put(address, len, |from, to| Content::Zero { len: to - from, present })
    }

    fn put<'a>(
        &self,
        address: u64,
        len: u64,
        content: impl Fn(u64, u64) -> Content<'a>,
    ) -> Result<(), LazyError> {
        let end = address.checked_add(len);
        let end = end.filter(|_| address.is_multiple_of(PAGE_BYTES) && len.is_multiple_of(PAGE_BYTES));
        let end = end.ok_or(LazyError::NotPages { address, len })?;
        let mut at = address;
        while at < end {
            let mut state = self.shared.lock();
            let (page, same) = state.table.unit(at, end);
            let turn = at.saturating_add(TURN_BYTES.max(page)) & !(page - 1);
            let to = same.min(turn);
            let mut again = Vec::new();
            if page > PAGE_BYTES {
                loop {
                    match state.put_huge(at, content(at, to), &mut again)? {
                        Progress::Done => break,
                        Progress::Again => state = self.clear_the_way(state),
                    }
                }
            } else {
                let mut first = true;
                loop {
                    match state.put(at, content(at, to), first)? {
                        Progress::Done => break,
                        Progress::Again => state = self.clear_the_way(state),
                    }
                    first = false;
                }
            }
            let done = state.table.is_empty();
            drop(state);
            if done {
                self.shared.changed.notify_all();
            }
            if !again.is_empty() {
                (self.shared.ask)(&again);
            }
            at = to;
        }
        Ok(())
    }

    /// All that is missing, by source address; huge pages whole.
    pub fn missing(&self) -> Extents {
        self.shared.lock().table.missing()
    }

    /// Asks again for all that was asked for and has not arrived: after the link was lost.
    pub fn ask_again(&self) {
        let pages = self.shared.lock().asked();
        if !pages.is_empty() {
            (self.shared.ask)(&pages);
        }
    }

    /// Whether nothing is missing any more, nor will be.
    pub fn is_done(&self) -> bool {
        self.shared.lock().table.is_empty()
    }

    /// Waits until nothing is missing; false if that took longer than `timeout`.
    pub fn wait_done(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.lock();
        while !state.table.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// What has been counted so far.
    pub fn stats(&self) -> Stats {
        self.shared.lock().stats()
    }

    /// How long threads waited for their pages so far, from a fault's message until the page was placed.
    pub fn waits(&self) -> Latency {
        // Read without the lock, for which faults would wait.
        let waits = self.shared.lock().waits.clone();
        waits.latency()
    }

    /// Closes everything: the mappings become ordinary ones again, and nothing is read any more. If pages are
    /// missing, the processes that miss them are killed first: they would read zeros.
    pub fn finish(&self) {
        self.shared.lock().close();
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        self.finish();
    }
}
