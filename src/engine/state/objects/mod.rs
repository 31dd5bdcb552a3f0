//! Memory that mappings and descriptors share, carried as objects of their own: memfds, System V segments,
//! shared anonymous huge pages.
//!
//! An object's pages travel once, by an address in its *window*, a range above user space: `window` plus
//! the offset in the object. So it does not matter how often and where it is mapped, or whether at all.
//!
//! - At the source, [`ObjectBook`] finds the objects and tells which pages may have changed: those that the
//!   tracker saw written or given up through any mapping; and all, where the object's times say that it was
//!   changed and that may have been by a call (write(2), fallocate(2)) or through a mapping that is gone.
//!   [`Sums`] of what was sent keep what turns out to be the same off the wire.
//! - At the destination, [`Objects`] makes them, writes their pages through descriptors of ours, and lends
//!   those for mappings and descriptors of the process.

mod book;
mod find;
mod huge;
mod make;
mod select;
mod sums;
mod sysv;

use nix::errno::Errno;

pub use book::ObjectBook;
pub use find::{Backing, backing, id_of_memfd, object_id, open_in};
pub use huge::needed as huge_pages_needed;
pub use make::{Objects, check};
pub use select::Selected;
pub use sums::Sums;
pub use sysv::{attach_range, check_source, remove_left_behind, same_attach};

use super::super::reason::Reason;
use super::super::remote::{InjectError, Tid};
use crate::proto::control::HugePages;
use crate::proto::image::{Object, ObjectKind, Vma, VmaKind};

/// Windows begin here, above all user space of four-level page tables.
pub const WINDOWS_START: u64 = 1 << 48;
/// And end here, where page numbers of frames end.
pub const WINDOWS_END: u64 = 1 << 56;
/// A window's size is a multiple of this: most objects can grow in theirs.
const WINDOW_STEP: u64 = 1 << 40;

/// Why an object could not be read or made.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// A call of ours failed.
    #[error("{step} of {name}")]
    Sys {
        /// What was being done.
        step: &'static str,
        /// To which object.
        name: String,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// What a peer sent makes no sense.
    #[error("the description of shared memory is not valid: {0}")]
    Invalid(&'static str),
    /// The id of a System V segment is not to be had here.
    #[error("System V segment {wanted} got the id {got} here")]
    SegmentId {
        /// As at the source.
        wanted: i32,
        /// As it came out.
        got: u64,
    },
    /// The process did not run our calls.
    #[error("making shared memory")]
    Inject(#[from] InjectError),
}

impl ObjectError {
    fn sys<E: Into<std::io::Error>>(step: &'static str, name: String) -> impl FnOnce(E) -> Self {
        move |error| {
            let errno = error.into().raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            ObjectError::Sys { step, name, errno }
        }
    }
}

/// Whether the contents of a mapping are those of an object, which travel by its window.
pub fn by_window(vma: &Vma) -> bool {
    match vma.kind() {
        VmaKind::VmaMemfdShared | VmaKind::VmaSysv => true,
        VmaKind::VmaAnonShared => vma.page_bytes != 0,
        _ => false,
    }
}

/// Whether a mapping is made from an object: those [`by_window`], and private ones of a memfd, whose own
/// pages travel by their addresses.
pub fn from_object(vma: &Vma) -> bool {
    by_window(vma) || vma.kind() == VmaKind::VmaMemfdPrivate
}

/// The window as far as the object reaches, in whole pages.
pub fn window_range(object: &Object) -> (u64, u64) {
    let unit = object.page_bytes.max(crate::engine::memory::PAGE_BYTES);
    (object.window, object.window + object.size.next_multiple_of(unit))
}

/// An object in the words of the operator.
pub fn name_of(object: &Object) -> String {
    match object.kind() {
        ObjectKind::ObjectMemfd => format!("memfd {}", String::from_utf8_lossy(&object.name)),
        ObjectKind::ObjectSysv => {
            format!("System V segment {}", object.segment.as_ref().map_or(-1, |s| s.id))
        }
        ObjectKind::ObjectHugeShared => "shared anonymous huge pages".to_owned(),
        ObjectKind::Invalid => "shared memory".to_owned(),
    }
}

/// What this host has against these objects of process `pid`: ids and keys in use, too few huge pages.
pub fn check_here(pid: Tid, objects: &[Object], pages: &[HugePages]) -> Vec<Reason> {
    let mut reasons = sysv::check_here(pid, objects);
    reasons.extend(huge::check_here(pages));
    reasons
}
