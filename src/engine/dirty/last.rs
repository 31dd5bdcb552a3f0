//! The last look at the stopped process: what was written since the last round, and what is gone.

use std::os::unix::fs::FileExt;

use super::TrackError;
use super::uffd::{Runs, UffdTracker, whole};
use crate::engine::extents::Extents;
use crate::engine::memory::PAGE_BYTES;
use crate::engine::state::objects::by_window;
use crate::engine::sys::pagemap::{self, Query};
use crate::proto::image::{Vma, VmaKind};

impl UffdTracker {
    /// The last look at one mapping that rounds have followed. `false`: they have not.
    pub(super) fn final_tracked(
        &mut self,
        vma: &Vma,
        sent: &Extents,
        out: &mut Final,
    ) -> Result<bool, TrackError> {
        let kind = vma.kind();
        match kind {
            VmaKind::VmaAnonPrivate if vma.page_bytes == 0 => {
                let query = Query {
                    flags: pagemap::CHECK_WPASYNC,
                    all: pagemap::WRITTEN,
                    report: pagemap::PRESENT | pagemap::SWAPPED | pagemap::GUARD,
                    ..Query::default()
                };
                let places = match self.places_written(vma)? {
                    Some(places) => places,
                    None => return Ok(false),
                };
                self.query_at(&places, query, |r| {
                    if r.categories & pagemap::GUARD != 0 {
                        out.guards.push(r.start, r.end);
                        out.gone.extend(sent.overlap(r.start, r.end));
                    } else if r.categories & (pagemap::PRESENT | pagemap::SWAPPED) != 0 {
                        out.written.push(r.start, r.end);
                    } else {
                        out.gone.extend(sent.overlap(r.start, r.end));
                    }
                })
            }
            VmaKind::VmaAnonPrivate | VmaKind::VmaFilePrivate | VmaKind::VmaMemfdPrivate => {
                let Some(mut query) = self.round_query(vma) else { return Ok(true) };
                query.flags = pagemap::CHECK_WPASYNC;
                let written = &mut out.written;
                let guards = &mut out.guards;
                let tracked = self.query(vma.start, vma.end, query, |r| {
                    if r.categories & pagemap::GUARD != 0 {
                        guards.push(r.start, r.end);
                    } else {
                        written.push(r.start, r.end);
                    }
                })?;
                // A page dropped from a private file mapping shows the file again, and is not reported.
                let mut left = Extents::new();
                sent.overlap(vma.start, vma.end).for_each(|(s, e)| left.insert(s, e));
                if tracked && !left.is_empty() {
                    let own = pagemap::FILE | pagemap::PFNZERO;
                    let live = Query {
                        inverted: own,
                        all: own,
                        any: pagemap::PRESENT | pagemap::SWAPPED,
                        report: pagemap::GUARD | pagemap::PRESENT,
                        ..Query::default()
                    };
                    let mut swapped = Vec::new();
                    self.query(vma.start, vma.end, live, |r| {
                        if r.categories & pagemap::PRESENT != 0 {
                            left.remove(r.start, r.end);
                        } else if r.categories & pagemap::GUARD == 0 {
                            swapped.push((r.start, r.end));
                        }
                    })?;
                    // A page that was dropped leaves the mark of its protection behind, which looks like
                    // swap; without swap there is nothing else that does.
                    if self.swap && vma.page_bytes == 0 {
                        for (start, end) in swapped {
                            self.really_swapped(start, end, |page| left.remove(page, page + PAGE_BYTES))?;
                        }
                    }
                    out.gone.extend(left.iter());
                }
                Ok(tracked)
            }
            _ if by_window(vma) && vma.never_writable => Ok(true),
            _ if by_window(vma) => {
                let query = Query {
                    flags: pagemap::CHECK_WPASYNC,
                    all: pagemap::WRITTEN,
                    report: pagemap::WRITTEN,
                    ..Query::default()
                };
                let mut written = Extents::new();
                let tracked = self.query(vma.start, vma.end, query, |r| written.insert(r.start, r.end))?;
                self.unreported(vma).for_each(|(s, e)| written.insert(s, e));
                written.iter().for_each(|(s, e)| out.written.push(s, e));
                Ok(tracked)
            }
            VmaKind::VmaAnonShared => {
                let query = Query {
                    flags: pagemap::CHECK_WPASYNC,
                    all: pagemap::WRITTEN,
                    report: pagemap::WRITTEN,
                    ..Query::default()
                };
                let mut written = Extents::new();
                if !self.query(vma.start, vma.end, query, |r| written.insert(r.start, r.end))? {
                    return Ok(false);
                }
                // Where something was given up, the scan does not tell what is there now.
                let mut unsure = Extents::new();
                if self.must_resend(vma, !written.is_empty()) {
                    unsure.insert(vma.start, vma.end);
                } else {
                    self.unreported(vma).for_each(|(s, e)| unsure.insert(s, e));
                }
                unsure.iter().for_each(|(s, e)| written.insert(s, e));
                let mut left = Extents::new();
                for (start, end) in unsure.iter() {
                    sent.overlap(start, end).for_each(|(s, e)| left.insert(s, e));
                }
                // Holes that were never filled are not to be read.
                let runs = &mut out.written;
                self.object_data(vma, &written, |s, e| {
                    left.remove(s, e);
                    runs.push(s, e);
                })?;
                out.gone.extend(left.iter());
                Ok(true)
            }
            VmaKind::VmaMemfdShared | VmaKind::VmaSysv => Ok(true),
            VmaKind::VmaFileShared | VmaKind::VmaVdso | VmaKind::VmaDroppable | VmaKind::Invalid => Ok(true),
        }
    }

    /// What the process has told of this mapping, and no scan reports.
    fn unreported(&self, vma: &Vma) -> impl Iterator<Item = (u64, u64)> + '_ {
        let (start, end) = (vma.start, vma.end);
        self.removals.ever.overlap(start, end).chain(self.removed.overlap(start, end))
    }

    /// Which pages of a range are on a swap device, and not a mark of userfaultfd (in pagemap: swap type 31,
    /// with bit 57; Documentation/admin-guide/mm/pagemap.rst).
    fn really_swapped(&self, start: u64, end: u64, mut each: impl FnMut(u64)) -> Result<(), TrackError> {
        const UFFD_WP: u64 = 1 << 57;
        const SWAP_TYPE: u64 = 0x1f;
        let mut entry = [0u8; 8];
        for page in (start..end).step_by(4096) {
            let at = page / PAGE_BYTES * 8;
            self.pagemap
                .read_exact_at(&mut entry, at)
                .map_err(|source| TrackError::Open { path: format!("/proc/{}/pagemap", self.pid), source })?;
            let entry = u64::from_ne_bytes(entry);
            if entry & UFFD_WP == 0 || entry & SWAP_TYPE != SWAP_TYPE {
                each(page);
            }
        }
        Ok(())
    }

    /// The last look at a mapping that appeared since the last round: everything in it.
    pub(super) fn final_fresh(&mut self, vma: &Vma, out: &mut Final) -> Result<(), TrackError> {
        let mut query = Query {
            any: pagemap::PRESENT | pagemap::SWAPPED,
            report: pagemap::GUARD | pagemap::PRESENT,
            ..Query::default()
        };
        match vma.kind() {
            _ if by_window(vma) => {
                out.written.push(vma.start, vma.end);
                return Ok(());
            }
            // May be dropped at any time, and is now.
            VmaKind::VmaDroppable => return Ok(()),
            VmaKind::VmaAnonShared => {
                let runs = &mut out.written;
                return self.object_data(vma, &whole(vma), |s, e| runs.push(s, e)).map(drop);
            }
            // What is not there but marked holds nothing, and reading it would take a huge page.
            VmaKind::VmaAnonPrivate if vma.page_bytes != 0 => query.any = pagemap::PRESENT,
            VmaKind::VmaFilePrivate | VmaKind::VmaMemfdPrivate => {
                if vma.page_bytes != 0 {
                    query.any = pagemap::PRESENT;
                }
                query.inverted = pagemap::FILE | pagemap::PFNZERO;
                query.all = query.inverted;
            }
            _ => {}
        }
        self.query(vma.start, vma.end, query, |r| {
            if r.categories & pagemap::GUARD != 0 {
                out.guards.push(r.start, r.end);
            } else {
                out.written.push(r.start, r.end);
            }
        })?;
        Ok(())
    }
}

#[derive(Debug, Default)]
pub(super) struct Final {
    pub(super) written: Runs,
    pub(super) guards: Runs,
    pub(super) gone: Vec<(u64, u64)>,
}
