//! Ranges of addresses against memory maps. Pure.

use crate::engine::extents::Extents;
use crate::engine::memory::PAGE_BYTES;
use crate::engine::state::objects::window_range;
use crate::engine::sys::vm::RemoteRange;
use crate::proto::image::Layout;

/// Marks what lies in `start..end` fresh. A mapping that it covers in part is split: it has merged with a
/// neighbour that is not fresh. One that is fresh already, because it took the place of what was there, stays whole: of
/// huge pages there are no parts.
pub(super) fn mark_fresh(layout: &mut Layout, start: u64, end: u64) {
    let mut vmas = Vec::with_capacity(layout.vmas.len() + 2);
    for vma in layout.vmas.drain(..) {
        let (from, to) = (start.max(vma.start), end.min(vma.end));
        if from >= to || vma.fresh {
            vmas.push(vma);
            continue;
        }
        for (a, b, fresh) in [(vma.start, from, false), (from, to, true), (to, vma.end, false)] {
            if a < b {
                let mut piece = vma.clone();
                let backed = piece.file.is_some() || piece.shm_inode != 0;
                piece.offset += if backed { a - vma.start } else { 0 };
                (piece.start, piece.end, piece.fresh) = (a, b, fresh);
                vmas.push(piece);
            }
        }
    }
    layout.vmas = vmas;
}

/// Cuts a set down to what is mapped as it was before, or in an object: of what is fresh, the set knows nothing.
pub(super) fn clip(set: &mut Extents, layout: &Layout) {
    let mut at = 0;
    let mut holes = Vec::new();
    let mut windows: Vec<_> = layout.objects.iter().map(window_range).collect();
    windows.sort_unstable();
    let kept = layout.vmas.iter().filter(|v| !v.fresh);
    for (start, end) in kept.map(|v| (v.start, v.end)).chain(windows) {
        holes.push((at, start));
        at = end;
    }
    holes.push((at, u64::MAX));
    for (start, end) in holes {
        set.remove(start, end);
    }
}

/// A range as what is read.
pub(super) fn range(start: u64, end: u64) -> RemoteRange {
    RemoteRange { start, len: usize::try_from(end - start).unwrap_or(usize::MAX) }
}

/// A range as runs of at most `u32::MAX` pages.
pub(super) fn page_chunks(start: u64, end: u64) -> impl Iterator<Item = (u64, u32)> {
    let most = u64::from(u32::MAX / 2);
    let pages = (end - start) / PAGE_BYTES;
    (0..pages.div_ceil(most)).map(move |i| {
        let n = (pages - i * most).min(most);
        (start + i * most * PAGE_BYTES, u32::try_from(n).unwrap_or(0))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::image::Vma;

    #[test]
    fn only_the_fresh_part_of_a_merged_mapping_starts_over() {
        let vma = Vma { start: 0x1000, end: 0x9000, ..Vma::default() };
        let mut layout = Layout { vmas: vec![vma], ..Layout::default() };
        mark_fresh(&mut layout, 0x3000, 0x5000);
        let pieces: Vec<_> = layout.vmas.iter().map(|v| (v.start, v.end, v.fresh)).collect();
        assert_eq!(pieces, [(0x1000, 0x3000, false), (0x3000, 0x5000, true), (0x5000, 0x9000, false)]);
    }

    /// Small pages were mapped at the last look, and a huge one by now in the place of some of them.
    #[test]
    fn what_took_the_place_of_something_fresh_stays_whole() {
        let huge =
            Vma { start: 0x20_0000, end: 0x40_0000, page_bytes: 0x20_0000, fresh: true, ..Vma::default() };
        let other = Vma { start: 0x40_0000, end: 0x40_4000, ..Vma::default() };
        let mut layout = Layout { vmas: vec![huge.clone(), other.clone()], ..Layout::default() };
        let mut dirty = Extents::new();
        dirty.insert(0x1f_f000, 0x20_2000);
        dirty.insert(0x40_0000, 0x40_1000);
        clip(&mut dirty, &layout);
        mark_fresh(&mut layout, 0x1f_0000, 0x20_2000);
        assert_eq!(layout.vmas, [huge, other]);
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [(0x40_0000, 0x40_1000)]);
    }
}
