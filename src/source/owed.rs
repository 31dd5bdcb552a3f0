//! Which pages may follow after the resume, and under which names.
//!
//! Late pages are placed by userfaultfd, so what it does not cover goes before the resume: the written
//! pages of private file mappings. So does what somebody could see past the mappings that it watches:
//! memory with a descriptor or an id by which it can be mapped or read anew. And so does locked memory,
//! whose owner asked for no faults.

use crate::engine::extents::Extents;
use crate::engine::memory::PAGE_BYTES;
use crate::engine::state::objects::{by_window, window_range};
use crate::proto::image::{Layout, Object, ObjectKind, Vma, VmaKind};

/// Whether the pages of this mapping, by its own addresses, may follow after the resume.
pub(super) fn may_follow(vma: &Vma) -> bool {
    let anonymous = matches!(vma.kind(), VmaKind::VmaAnonPrivate | VmaKind::VmaAnonShared);
    anonymous && !by_window(vma) && !vma.locked
}

/// Splits a set of pages of mappings: those that may follow, and those that must go before. Huge pages
/// follow as whole ones.
pub(super) fn split(pages: &Extents, layout: &Layout) -> (Extents, Extents) {
    let (mut late, mut early) = (Extents::new(), pages.clone());
    for vma in layout.vmas.iter().filter(|v| may_follow(v)) {
        let unit = vma.page_bytes.max(PAGE_BYTES);
        for (start, end) in pages.overlap(vma.start, vma.end) {
            let start = start - (start - vma.start) % unit;
            let end = vma.start + (end - vma.start).next_multiple_of(unit);
            late.insert(start, end);
            early.remove(start, end);
        }
    }
    (late, early)
}

/// Takes those pages of windows out of `windows` that may follow, and names them by the mappings that show
/// them: what is only reached by mappings, all of which can be watched. An object that is open (`is_open`,
/// by its id) could be seen past them.
pub(super) fn split_windows(
    windows: &mut Extents,
    layout: &Layout,
    is_open: impl Fn(u64) -> bool,
) -> Extents {
    let mut late = Extents::new();
    for object in &layout.objects {
        let (start, end) = window_range(object);
        if windows.overlap(start, end).next().is_none() || !only_mapped(object, &is_open) {
            continue;
        }
        let unit = object.page_bytes.max(PAGE_BYTES);
        let mappings = || layout.vmas.iter().filter(|v| v.shm_inode == object.id);
        let watched =
            |v: &Vma| by_window(v) && !v.never_writable && !v.locked && v.offset.is_multiple_of(unit);
        if !mappings().all(watched) {
            continue;
        }
        for vma in mappings() {
            let at = object.window + vma.offset;
            let shown: Vec<_> = windows.overlap(at, at + (vma.end - vma.start)).collect();
            for (start, end) in shown {
                let start = start - (start - object.window) % unit;
                let end = object.window + (end - object.window).next_multiple_of(unit);
                windows.remove(start, end);
                late.insert(start - at + vma.start, (end - at + vma.start).min(vma.end));
            }
        }
    }
    late
}

/// Whether nothing but mappings leads to the object.
fn only_mapped(object: &Object, is_open: &impl Fn(u64) -> bool) -> bool {
    match object.kind() {
        ObjectKind::ObjectHugeShared => true,
        ObjectKind::ObjectMemfd => object.seals == 0 && !is_open(object.id),
        // userfaultfd refuses an attached segment (UFFDIO_REGISTER for missing pages: EINVAL), because its
        // operations are not those of ordinary shared memory.
        ObjectKind::ObjectSysv | ObjectKind::Invalid => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUGE: u64 = 2 << 20;

    fn set(ranges: &[(u64, u64)]) -> Extents {
        let mut set = Extents::new();
        ranges.iter().for_each(|(start, end)| set.insert(*start, *end));
        set
    }

    #[test]
    fn huge_pages_follow_whole_and_locked_ones_not_at_all() {
        let kind = VmaKind::VmaAnonPrivate.into();
        let huge = Vma { start: 4 * HUGE, end: 8 * HUGE, page_bytes: HUGE, kind, ..Vma::default() };
        let locked = Vma { start: 8 * HUGE, end: 9 * HUGE, locked: true, kind, ..Vma::default() };
        let layout = Layout { vmas: vec![huge, locked], ..Layout::default() };
        let pages = set(&[(5 * HUGE + 4096, 5 * HUGE + 8192), (8 * HUGE, 8 * HUGE + 4096)]);
        let (late, early) = split(&pages, &layout);
        assert_eq!(late, set(&[(5 * HUGE, 6 * HUGE)]));
        assert_eq!(early, set(&[(8 * HUGE, 8 * HUGE + 4096)]));
    }

    #[test]
    fn an_object_follows_by_its_mappings_unless_something_else_leads_to_it() {
        let window = 1 << 48;
        let object =
            |kind: ObjectKind| Object { id: 7, kind: kind.into(), window, size: 0x8000, ..Object::default() };
        let kind = VmaKind::VmaMemfdShared.into();
        let vma = Vma { start: 0x10000, end: 0x14000, offset: 0x1000, shm_inode: 7, kind, ..Vma::default() };
        let layout =
            |object: Object, vma: Vma| Layout { vmas: vec![vma], objects: vec![object], ..Layout::default() };
        let memfd = || object(ObjectKind::ObjectMemfd);
        let pages = set(&[(window, window + 0x3000)]);

        let mut windows = pages.clone();
        let late = split_windows(&mut windows, &layout(memfd(), vma.clone()), |_| false);
        assert_eq!(late, set(&[(0x10000, 0x12000)]));
        assert_eq!(windows, set(&[(window, window + 0x1000)]), "what no mapping shows goes before");

        let readonly = Vma { never_writable: true, ..vma.clone() };
        let sealed = Object { seals: 1, ..memfd() };
        let open = layout(memfd(), vma.clone());
        for (layout, is_open) in [
            (open, true),
            (layout(memfd(), readonly), false),
            (layout(sealed, vma.clone()), false),
            (layout(object(ObjectKind::ObjectSysv), vma), false),
        ] {
            let mut windows = pages.clone();
            assert!(split_windows(&mut windows, &layout, |_| is_open).is_empty());
            assert_eq!(windows, pages);
        }
    }
}
