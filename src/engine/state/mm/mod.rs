//! The memory map: what is mapped where, and from what. Contents are `dirty`'s and the rounds' concern.
//!
//! Capture reads /proc/PID/maps at every round, and the VmFlags of smaps (slow: it walks the page tables)
//! only while the process runs. Restore is a reconciliation: the skeleton's map is brought to the wanted
//! one by unmapping, mapping and protecting what differs.

mod canonical;
mod capture;
mod changes;
mod resident;
mod restore;
mod segments;

pub use canonical::canonical;
pub use capture::{CapturedMap, FlagCache, ask_brk, capture, capture_mm, check_shared};
pub use changes::{mark_replaced, vdso_group};
pub use restore::{finish, reconcile, unmap};

use crate::engine::procfs;
use crate::engine::reason::Reason;

/// Why a memory map could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// A file of /proc could not be read.
    #[error("reading {path}")]
    Read {
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
        source: procfs::ProcfsError,
    },
    /// There are mappings that cannot be carried.
    #[error("{} mappings cannot be carried, the first: {}", .0.len(), .0.first().map(ToString::to_string).unwrap_or_default())]
    Refused(Vec<Reason>),
}
