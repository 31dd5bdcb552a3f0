//! Which pages of a process have been written: one trait, one backend so far.
//!
//! The backend is userfaultfd write-protection in asynchronous mode with the PAGEMAP_SCAN ioctl
//! (Linux 6.7): the process needs one brief stop to make the userfaultfd; from then on "report what was
//! written and protect it again" is one atomic ioctl per mapping on the running process. Scan first, read
//! second: a write between the two is in what is read, one after it is reported by the next scan.
//!
//! What no scan reports, the freeze finds out: pages that were sent and are no longer there
//! (MADV_DONTNEED, hole punches), and mappings that were replaced. A mapping that is not tracked yet
//! (new, moved, mapped over) is *fresh*: it is registered, everything in it is reported, and the
//! destination starts it over.

mod last;
mod quick;
mod register;
mod removals;
mod uffd;
mod wide;

pub use uffd::UffdTracker;

use nix::errno::Errno;

use super::extents::Extents;
use super::remote::InjectError;
use super::sys::vm::RemoteRange;
use crate::proto::image::{Layout, Range, Vma};

/// Why pages could not be tracked.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The kernel lacks what the backend needs.
    #[error("this kernel cannot track writes by userfaultfd ({what}); Linux 6.7 or newer is needed")]
    Unsupported {
        /// The missing feature.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The process has as many descriptors as it may have.
    #[error(
        "the process has no descriptor free for the moment of making a userfaultfd: its limit of open files is reached"
    )]
    NoDescriptor,
    /// A mapping refuses to be tracked.
    #[error("mapping {start:x}-{end:x} cannot be tracked")]
    Untrackable {
        /// Where it starts.
        start: u64,
        /// Where it ends.
        end: u64,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A scan failed.
    #[error("scanning {start:x}-{end:x} for written pages")]
    Scan {
        /// Where it starts.
        start: u64,
        /// Where it ends.
        end: u64,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A file of /proc could not be opened or searched.
    #[error("opening {path}")]
    Open {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The process could not be made to create its userfaultfd.
    #[error("creating a userfaultfd in the process")]
    Inject(#[from] InjectError),
}

/// What the last look at a stopped process found.
#[derive(Debug, Default)]
pub struct FinalScan {
    /// Written since the last scan, or never sent: to be read and sent.
    pub written: Vec<RemoteRange>,
    /// Sent earlier and no longer there.
    pub gone: Vec<(u64, u64)>,
    /// Guard pages (MADV_GUARD_INSTALL).
    pub guards: Vec<Range>,
}

/// A backend that knows which pages were written.
pub trait Tracker: Send {
    /// Reports what was written in the mappings of `layout` since the last scan, and starts over. Marks
    /// mappings that it has not followed since then as fresh: everything in them is reported, as in those
    /// that are marked so already. The process runs.
    ///
    /// # Errors
    /// See [`TrackError`].
    fn scan(&mut self, layout: &mut Layout) -> Result<Vec<RemoteRange>, TrackError>;

    /// The last scan, of the stopped process; `sent` is what the destination has.
    ///
    /// # Errors
    /// See [`TrackError`].
    fn final_scan(&mut self, layout: &mut Layout, sent: &Extents) -> Result<FinalScan, TrackError>;

    /// Which pages of a file mapping are the file's own and mapped.
    ///
    /// # Errors
    /// See [`TrackError`].
    fn file_pages(&mut self, vma: &Vma) -> Result<Vec<Range>, TrackError>;

    /// Which parts of these runs are the kernel's shared zero page: read, never written.
    ///
    /// # Errors
    /// See [`TrackError`].
    fn untouched(&mut self, runs: &[RemoteRange]) -> Result<Extents, TrackError>;
}
