//! What leads from one memory map to another.

use crate::engine::state::objects::{by_window, from_object};
use crate::proto::files::FileRef;
use crate::proto::image::{Layout, Vma, VmaKind};

/// A piece of work on the skeleton's map.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Unmap {
        start: u64,
        end: u64,
    },
    /// Map `start..end` as part of the wanted mapping with this index.
    Map {
        start: u64,
        end: u64,
        wanted: usize,
    },
    /// Protection or advice of a kept piece differs.
    Adjust {
        start: u64,
        end: u64,
        was: usize,
        wanted: usize,
    },
}

/// Whether a piece of `a` can stay where `b` is wanted.
fn same_backing(a: &Vma, b: &Vma, a_files: &[FileRef], b_files: &[FileRef]) -> bool {
    let path = |v: &Vma, files: &[FileRef]| {
        v.file.and_then(|i| files.get(i as usize).map(|f| (f.path.clone(), f.dev, f.ino)))
    };
    let object = |v: &Vma| v.offset.wrapping_sub(v.start);
    a.kind == b.kind
        && a.grows_down == b.grows_down
        && a.noreserve == b.noreserve
        && (a.accounted || !b.accounted)
        && a.page_bytes == b.page_bytes
        && a.never_writable == b.never_writable
        && match b.kind() {
            VmaKind::VmaAnonPrivate | VmaKind::VmaVdso | VmaKind::VmaDroppable => true,
            _ if from_object(b) => a.shm_inode == b.shm_inode && object(a) == object(b),
            VmaKind::VmaAnonShared => a.shm_inode == b.shm_inode && object(a) == object(b),
            _ => path(a, a_files) == path(b, b_files) && object(a) == object(b),
        }
}

/// Marks those mappings fresh that have another backing than what was there at the last look: the
/// destination will map them anew, whatever the tracker has seen.
pub fn mark_replaced(now: &mut Layout, before: &Layout) {
    let mut from = 0;
    let Layout { vmas, files, .. } = now;
    for vma in vmas {
        while before.vmas.get(from).is_some_and(|b| b.end <= vma.start) {
            from += 1;
        }
        let overlapping = before.vmas.iter().skip(from).take_while(|b| b.start < vma.end);
        let mut replaced = false;
        for b in overlapping {
            replaced |= !same_backing(b, vma, &before.files, files);
        }
        vma.fresh |= replaced;
    }
}

/// What leads from one map to another: all unmappings first, then the rest. Both sorted by address.
pub(super) fn changes(now: &Layout, wanted: &Layout) -> Vec<Change> {
    let mut kept: Vec<(u64, u64)> = Vec::new();
    let mut later = Vec::new();
    let mut from = 0;
    for (w, b) in wanted.vmas.iter().enumerate() {
        let mut at = b.start;
        while now.vmas.get(from).is_some_and(|a| a.end <= b.start) {
            from += 1;
        }
        for (n, a) in now.vmas.iter().enumerate().skip(from).take_while(|(_, a)| a.start < b.end) {
            // An object's contents are not the mapping's: only what maps another one is made anew. The pieces
            // of an attached segment belong together, so it is made anew whole.
            let fresh = b.fresh && !by_window(b);
            let torn = b.kind() == VmaKind::VmaSysv && (a.start > b.start || a.end < b.end);
            if fresh || torn || !same_backing(a, b, &now.files, &wanted.files) {
                continue;
            }
            let (start, end) = (a.start.max(b.start), a.end.min(b.end));
            if at < start {
                later.push(Change::Map { start: at, end: start, wanted: w });
            }
            kept.push((start, end));
            if a.prot != b.prot || a.advice != b.advice {
                later.push(Change::Adjust { start, end, was: n, wanted: w });
            }
            at = end;
        }
        if at < b.end {
            later.push(Change::Map { start: at, end: b.end, wanted: w });
        }
    }
    let mut all = Vec::new();
    let mut k = 0;
    for a in &now.vmas {
        let mut at = a.start;
        while k < kept.len() && kept[k].1 <= a.start {
            k += 1;
        }
        for &(start, end) in kept[k..].iter().take_while(|(start, _)| *start < a.end) {
            if at < start {
                all.push(Change::Unmap { start: at, end: start });
            }
            at = end;
        }
        if at < a.end {
            all.push(Change::Unmap { start: at, end: a.end });
        }
    }
    all.extend(later);
    all
}

/// Where the kernel's own group of mappings (vvar, vdso) begins and ends.
pub fn vdso_group(layout: &Layout) -> Option<(u64, u64)> {
    let mut group = layout.vmas.iter().filter(|v| v.kind() == VmaKind::VmaVdso);
    let first = group.next()?;
    Some((first.start, group.next_back().map_or(first.end, |v| v.end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anon(start: u64, end: u64, prot: u32) -> Vma {
        Vma { start, end, prot, kind: VmaKind::VmaAnonPrivate.into(), ..Vma::default() }
    }
    fn layout(vmas: &[Vma]) -> Layout {
        Layout { vmas: vmas.to_vec(), ..Layout::default() }
    }

    #[test]
    fn an_unchanged_map_needs_nothing() {
        let l = layout(&[anon(0x1000, 0x3000, 3), anon(0x5000, 0x6000, 1)]);
        assert_eq!(changes(&l, &l), []);
    }

    #[test]
    fn growth_maps_only_what_is_new() {
        let now = layout(&[anon(0x1000, 0x3000, 3)]);
        let wanted = layout(&[anon(0x1000, 0x8000, 3)]);
        assert_eq!(changes(&now, &wanted), [Change::Map { start: 0x3000, end: 0x8000, wanted: 0 }]);
    }

    #[test]
    fn a_hole_is_unmapped_and_a_split_keeps_both_sides() {
        let now = layout(&[anon(0x1000, 0x8000, 3)]);
        let wanted = layout(&[anon(0x1000, 0x3000, 3), anon(0x5000, 0x8000, 1)]);
        assert_eq!(
            changes(&now, &wanted),
            [
                Change::Unmap { start: 0x3000, end: 0x5000 },
                Change::Adjust { start: 0x5000, end: 0x8000, was: 0, wanted: 1 }
            ]
        );
    }

    #[test]
    fn a_fresh_mapping_replaces_the_old_one() {
        let now = layout(&[anon(0x1000, 0x3000, 3)]);
        let mut fresh = anon(0x2000, 0x4000, 3);
        fresh.fresh = true;
        let wanted = layout(&[anon(0x1000, 0x2000, 3), fresh]);
        assert_eq!(
            changes(&now, &wanted),
            [
                Change::Unmap { start: 0x2000, end: 0x3000 },
                Change::Map { start: 0x2000, end: 0x4000, wanted: 1 }
            ]
        );
    }
}
