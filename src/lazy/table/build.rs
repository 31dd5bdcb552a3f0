//! The table at the freeze, from the memory map and what of it is missing.

use std::collections::BTreeMap;

use super::events::Motion;
use super::{Backing, Counts, HUGE_BYTES, Mm, Object, Registered, Table, TableError, View};
use crate::engine::extents::Extents;
use crate::engine::memory::PAGE_BYTES;
use crate::lazy::pieces::{Piece, Pieces};
use crate::proto::image::{Layout, Vma, VmaKind};

impl Table {
    /// The table at the freeze, and the mappings whose missing pages must be reported: all that hold
    /// missing pages, and all of a shared object that misses some. `missing` is rounded out to huge pages
    /// where the mapping has them.
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn new(layout: &Layout, missing: &Extents) -> Result<(Self, Vec<Registered>), TableError> {
        let mut table = Self {
            mms: BTreeMap::new(),
            objects: Vec::new(),
            names: Pieces::new(),
            huge: Extents::new(),
            asked: Extents::new(),
            counts: Counts::default(),
            next: 1,
            ops: Vec::new(),
        };
        let mut unserved = missing.clone();
        let mut mm = Mm {
            views: Pieces::new(),
            places: Pieces::new(),
            missing: Extents::new(),
            motion: Motion::default(),
        };
        let mut registered = Vec::new();
        let mut inodes: BTreeMap<u64, usize> = BTreeMap::new();
        let shared = |vma: &&Vma| is_shared(vma);
        for vma in layout.vmas.iter().filter(shared) {
            let index = *inodes.entry(vma.shm_inode).or_insert_with(|| {
                table.objects.push(Object {
                    page: page_bytes(vma),
                    missing: Extents::new(),
                    names: Pieces::new(),
                });
                table.objects.len() - 1
            });
            check_pages(vma)?;
            let Some(object) = table.objects.get_mut(index) else { continue };
            for (start, end) in rounded(missing, vma) {
                object.missing.insert(vma.offset + (start - vma.start), vma.offset + (end - vma.start));
                unserved.remove(start, end);
            }
            // The lowest mapping gives the name: what is named already stays.
            let mut fresh = Extents::new();
            let end = vma.offset + (vma.end - vma.start);
            fresh.insert(vma.offset, end);
            object.names.overlap(vma.offset, end).for_each(|p| fresh.remove(p.start, p.end));
            for (from, to) in fresh.iter() {
                let source = vma.start + (from - vma.offset);
                object.names.insert(Piece { start: from, end: to, to: source, tag: () });
                table.names.insert(Piece { start: source, end: source + (to - from), to: from, tag: index });
            }
        }
        for vma in &layout.vmas {
            let page = page_bytes(vma);
            let wiped = vma.advice.contains(&libc::MADV_WIPEONFORK.unsigned_abs());
            let object = inodes.get(&vma.shm_inode).filter(|_| vma.shm_inode != 0).copied();
            let lacking = object.and_then(|o| table.objects.get(o)).is_some_and(|o| !o.missing.is_empty());
            let (backing, to) = match (object, vma.kind()) {
                (Some(object), _) if lacking => {
                    let places = vma.kind() != VmaKind::VmaMemfdPrivate;
                    (Backing::Shared { object, places }, vma.offset)
                }
                (None, VmaKind::VmaAnonPrivate) if missing.overlap(vma.start, vma.end).next().is_some() => {
                    check_pages(vma)?;
                    for (start, end) in rounded(missing, vma) {
                        mm.missing.insert(start, end);
                        unserved.remove(start, end);
                    }
                    mm.places.insert(Piece { start: vma.start, end: vma.end, to: vma.start, tag: () });
                    (Backing::Private, vma.start)
                }
                _ => continue,
            };
            if page > PAGE_BYTES {
                table.huge.insert(vma.start, vma.end);
            }
            let tag = View { backing, page, wiped };
            mm.views.insert(Piece { start: vma.start, end: vma.end, to, tag });
            registered.push(Registered { start: vma.start, end: vma.end, object });
        }
        if let Some((start, end)) = unserved.iter().next() {
            return Err(TableError::Unsupported { start, end });
        }
        let objects: u64 = table.objects.iter().map(|o| o.missing.total()).sum();
        table.counts.initial = (mm.missing.total() + objects) / PAGE_BYTES;
        table.mms.insert(0, mm);
        Ok((table, registered))
    }
}

fn is_shared(vma: &Vma) -> bool {
    vma.shm_inode != 0
        && matches!(vma.kind(), VmaKind::VmaAnonShared | VmaKind::VmaMemfdShared | VmaKind::VmaSysv)
}

fn page_bytes(vma: &Vma) -> u64 {
    if vma.page_bytes == 0 { PAGE_BYTES } else { vma.page_bytes }
}

fn check_pages(vma: &Vma) -> Result<(), TableError> {
    let page = page_bytes(vma);
    let known = page == PAGE_BYTES || page == HUGE_BYTES;
    let fits = known && [vma.start, vma.end, vma.offset].iter().all(|at| at.is_multiple_of(page));
    if fits { Ok(()) } else { Err(TableError::PageSize(vma.start)) }
}

/// What is missing of a mapping, in whole pages of it.
fn rounded(missing: &Extents, vma: &Vma) -> Vec<(u64, u64)> {
    let page = page_bytes(vma);
    missing
        .overlap(vma.start, vma.end)
        .map(|(s, e)| (s & !(page - 1), e.next_multiple_of(page).min(vma.end)))
        .collect()
}
