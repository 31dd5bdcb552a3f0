//! One name for each page of memory that is mapped at several places.

use std::collections::HashMap;

use crate::engine::extents::Extents;
use crate::proto::image::{Layout, Vma};

/// The set with each page under one address: a page of a shared object that several mappings show goes by
/// the lowest of its addresses. Pure.
pub fn canonical(pages: Extents, layout: &Layout) -> Extents {
    let mut objects: HashMap<u64, Vec<&Vma>> = HashMap::new();
    for vma in layout.vmas.iter().filter(|v| v.shm_inode != 0) {
        objects.entry(vma.shm_inode).or_default().push(vma);
    }
    objects.retain(|_, vmas| vmas.len() > 1);
    let mut out = pages;
    for vmas in objects.values() {
        // By offset first; then the lowest mapping that shows it names it.
        let mut offsets = Extents::new();
        for vma in vmas {
            let here: Vec<_> = out.overlap(vma.start, vma.end).collect();
            for (start, end) in here {
                offsets.insert(start - vma.start + vma.offset, end - vma.start + vma.offset);
                out.remove(start, end);
            }
        }
        for vma in vmas {
            let (first, last) = (vma.offset, vma.offset + (vma.end - vma.start));
            let here: Vec<_> = offsets.overlap(first, last).collect();
            for (start, end) in here {
                out.insert(start - first + vma.start, end - first + vma.start);
                offsets.remove(start, end);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::image::VmaKind;

    fn shared(start: u64, pages: u64, offset: u64) -> Vma {
        let kind = VmaKind::VmaAnonShared.into();
        Vma { start, end: start + pages * 4096, offset: offset * 4096, kind, shm_inode: 7, ..Vma::default() }
    }

    #[test]
    fn a_page_mapped_twice_goes_by_its_lowest_address() {
        let layout = Layout {
            vmas: vec![
                shared(0x10000, 2, 1),
                shared(0x20000, 4, 0),
                Vma { start: 0x30000, end: 0x40000, ..Vma::default() },
            ],
            ..Layout::default()
        };
        let mut pages = Extents::new();
        pages.insert(0x20000, 0x24000); // offsets 0..4
        pages.insert(0x11000, 0x12000); // offset 2 again
        pages.insert(0x30000, 0x31000);
        let mut want = Extents::new();
        want.insert(0x10000, 0x12000); // offsets 1 and 2
        want.insert(0x20000, 0x21000); // offset 0
        want.insert(0x23000, 0x24000); // offset 3
        want.insert(0x30000, 0x31000);
        assert_eq!(canonical(pages, &layout), want);
    }
}
