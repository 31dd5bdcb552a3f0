//! Which pages may follow after the resume, and under which names.
//!
//! Late pages are placed by userfaultfd, so what it does not cover goes before the resume: the written
//! pages of private file mappings. So does what somebody could see past the mappings that it watches:
//! memory with a descriptor or an id by which it can be mapped or read anew. And so does locked memory,
//! whose owner asked for no faults, and for now memory of huge pages.

use crate::engine::extents::Extents;
use crate::proto::image::{Layout, Vma, VmaKind};

/// Whether the pages of this mapping may follow after the resume.
pub(super) fn may_follow(vma: &Vma) -> bool {
    let anonymous = matches!(vma.kind(), VmaKind::VmaAnonPrivate | VmaKind::VmaAnonShared);
    anonymous && !vma.locked && vma.page_bytes == 0
}

/// Splits a set of pages: those that may follow, and those that must go before.
pub(super) fn split(pages: &Extents, layout: &Layout) -> (Extents, Extents) {
    let (mut late, mut early) = (Extents::new(), pages.clone());
    for vma in layout.vmas.iter().filter(|v| may_follow(v)) {
        for (start, end) in pages.overlap(vma.start, vma.end) {
            late.insert(start, end);
            early.remove(start, end);
        }
    }
    (late, early)
}
