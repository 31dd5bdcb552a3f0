//! The backend by userfaultfd: rounds over the running process.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;

use super::last::Final;
use super::removals::{Again, Removals, is_shared};
use super::{FinalScan, TrackError, Tracker, register, wide};
use crate::engine::extents::Extents;
use crate::engine::freeze::Frozen;
use crate::engine::memory::PAGE_BYTES;
use crate::engine::remote::{RemoteCalls, Tid};
use crate::engine::state::objects::by_window;
use crate::engine::sys::pagemap::{self, PageRegion, Query};
use crate::engine::sys::uffd;
use crate::engine::sys::vm::RemoteRange;
use crate::proto::image::{Layout, Range, Vma, VmaKind};

/// userfaultfd write-protection, asynchronous.
#[derive(Debug)]
pub struct UffdTracker {
    pub(super) pid: Tid,
    pub(super) uffd: OwnedFd,
    pub(super) pagemap: File,
    pub(super) maps: File,
    found: Vec<PageRegion>,
    pub(super) swap: bool,
    /// Ranges whose contents no scan has reported yet, although they may be protected.
    pub(super) owed: Extents,
    /// Shared mappings are registered here.
    pub(super) removals: Removals,
    /// What is to be sent again, by the last look at the removals.
    pub(super) removed: Extents,
    /// Plain shared memory by inode.
    shared: HashMap<u64, Shared>,
}

/// One object of plain shared memory, at the last scan.
#[derive(Debug, Default)]
struct Shared {
    /// When it was last changed, by stores or otherwise (ns).
    changed_at: i64,
    /// Changed since the scan before.
    is_changed: bool,
    /// Stores to it were reported: by this scan so far, by the one before.
    is_stored: bool,
    was_stored: bool,
    /// Some page of it was mapped at two places at once, at some time.
    has_views: bool,
}

/// How many regions one ioctl can report.
const FOUND_REGIONS: usize = 4096;

impl UffdTracker {
    /// Makes a userfaultfd in the stopped process and takes it over; the process keeps nothing.
    ///
    /// # Errors
    /// See [`TrackError`].
    pub fn start(process: &mut Frozen) -> Result<Self, TrackError> {
        let pid = process.pid();
        let features =
            uffd::FEATURE_WP_ASYNC | uffd::FEATURE_WP_UNPOPULATED | uffd::FEATURE_WP_HUGETLBFS_SHMEM;
        let mut made = register::make(
            process,
            &[features, features | uffd::FEATURE_EVENT_REMOVE | uffd::FEATURE_EVENT_REMAP],
        )?
        .into_iter();
        let (Some(ours), Some(of_shared)) = (made.next(), made.next()) else {
            return Err(TrackError::Unsupported { what: "userfaultfd(2)", errno: Errno::EMFILE });
        };
        let path = format!("/proc/{pid}/pagemap");
        let pagemap = File::open(&path).map_err(|source| TrackError::Open { path, source })?;
        let path = format!("/proc/{pid}/maps");
        let maps = File::open(&path).map_err(|source| TrackError::Open { path, source })?;
        let swap = std::fs::read_to_string("/proc/swaps").is_ok_and(|s| s.lines().count() > 1);
        Ok(Self {
            pid,
            uffd: ours,
            pagemap,
            maps,
            found: vec![PageRegion::default(); FOUND_REGIONS],
            swap,
            owed: Extents::new(),
            removals: Removals::start(of_shared)?,
            removed: Extents::new(),
            shared: HashMap::new(),
        })
    }

    /// One query over a range, in as many ioctls as it takes. `false`: a mapping is not registered.
    pub(super) fn query(
        &mut self,
        start: u64,
        end: u64,
        query: Query,
        each: impl FnMut(PageRegion),
    ) -> Result<bool, TrackError> {
        let done = if query.flags & pagemap::WP_MATCHING == 0 && wide::is_worth(start, end) {
            wide::scan(&self.pagemap, (start, end), query, FOUND_REGIONS)
                .map(|found| found.into_iter().for_each(each))
        } else {
            pagemap::scan_all(self.pagemap.as_fd(), start, end, query, &mut self.found, each)
        };
        match done {
            Ok(()) => Ok(true),
            Err(Errno::EPERM) => Ok(false),
            Err(errno) => Err(TrackError::Scan { start, end, errno }),
        }
    }

    /// The query of a round for this kind of mapping; `None`: its contents are not ours to send.
    pub(super) fn round_query(&self, vma: &Vma) -> Option<Query> {
        let flags = pagemap::WP_MATCHING | pagemap::CHECK_WPASYNC;
        match vma.kind() {
            // Private huge pages look like those of a private file: one that was dropped leaves a mark.
            VmaKind::VmaAnonPrivate if vma.page_bytes != 0 => Some(own_pages(vma, flags)),
            // The condition that the kernel's fast path knows; swap makes it a little slower.
            VmaKind::VmaAnonPrivate if self.swap => Some(Query {
                flags,
                all: pagemap::WRITTEN,
                any: pagemap::PRESENT | pagemap::SWAPPED,
                report: pagemap::WRITTEN | pagemap::GUARD,
                ..Query::default()
            }),
            VmaKind::VmaAnonPrivate => Some(Query {
                flags,
                all: pagemap::WRITTEN | pagemap::PRESENT,
                report: pagemap::WRITTEN,
                ..Query::default()
            }),
            // Only pages that are the process's own: not the file's, not the zero page.
            VmaKind::VmaFilePrivate | VmaKind::VmaMemfdPrivate => Some(own_pages(vma, flags)),
            // Nothing is ever written through it; the kernel would not let us register it either.
            _ if by_window(vma) && vma.never_writable => None,
            // A page may be in the object and not in this page table: whatever was written counts.
            VmaKind::VmaAnonShared | VmaKind::VmaMemfdShared | VmaKind::VmaSysv => {
                Some(Query { flags, all: pagemap::WRITTEN, report: pagemap::WRITTEN, ..Query::default() })
            }
            VmaKind::VmaFileShared | VmaKind::VmaVdso | VmaKind::VmaDroppable | VmaKind::Invalid => None,
        }
    }

    /// Scans one mapping of the running process. One that has not been followed without a gap starts over:
    /// it is registered, and everything in it is protected and reported.
    fn scan_vma(&mut self, vma: &mut Vma, runs: &mut Runs) -> Result<(), TrackError> {
        let Some(mut query) = self.round_query(vma) else { return Ok(()) };
        runs.begin();
        let push = |r: PageRegion, runs: &mut Runs| {
            if r.categories & pagemap::GUARD == 0 {
                runs.push(r.start, r.end);
            }
        };
        let owed = self.owed.overlap(vma.start, vma.end).next().is_some();
        if !vma.fresh && !owed {
            // What is written elsewhere meanwhile is the next scan's.
            if let Some(places) = self.places_written(vma)?
                && self.query_at(&places, query, |r| push(r, runs))?
            {
                return self.add_unreported(vma, runs);
            }
            runs.forget();
        }
        // Until a scan goes through, everything in the range is owed to the destination: an aborted scan
        // has protected pages that it did not report, and if the mapping changes under our hands, the next
        // scan may meet a part of it that looks as if it had been followed all along.
        vma.fresh = true;
        self.owed.insert(vma.start, vma.end);
        match self.register(vma) {
            Ok(()) => {}
            // It is gone; the next round sees what has become of it.
            Err(Errno::ENOMEM | Errno::ESRCH) => return Ok(()),
            Err(Errno::EINVAL) if !self.still_maps(vma) => return Ok(()),
            Err(errno) => return Err(TrackError::Untrackable { start: vma.start, end: vma.end, errno }),
        }
        let done = if by_window(vma) {
            // Protect all of it; which pages there are is the object's to say.
            runs.push(vma.start, vma.end);
            self.query(vma.start, vma.end, query, |_| {})?
        } else if vma.kind() == VmaKind::VmaAnonShared {
            // Protect all of it, and report what the object holds, in this page table or not.
            self.query(vma.start, vma.end, query, |_| {})?
                && self.object_data(vma, &whole(vma), |start, end| runs.push(start, end))?
        } else {
            query.all &= !pagemap::WRITTEN;
            self.query(vma.start, vma.end, query, |r| push(r, runs))?
        };
        if done {
            self.owed.remove(vma.start, vma.end);
        } else {
            runs.forget();
        }
        Ok(())
    }

    /// Before a scan, so that what comes later is found by the next one: what was given up, and which objects
    /// of plain shared memory were changed.
    fn look_at_shared(&mut self, layout: &Layout) {
        let Again { removed, arrived } = self.removals.look(layout);
        self.removed = removed;
        // Stays until a mapping there is met: this map may be older.
        arrived.iter().for_each(|(s, e)| self.owed.insert(s, e));
        for shared in self.shared.values_mut() {
            shared.was_stored = std::mem::take(&mut shared.is_stored);
        }
        let mut views: Vec<&Vma> = layout.vmas.iter().filter(|v| is_plain_shared(v)).collect();
        views.sort_by_key(|v| (v.shm_inode, v.offset));
        let mut seen = HashSet::new();
        for (i, vma) in views.iter().enumerate() {
            let next = views.get(i + 1).filter(|n| n.shm_inode == vma.shm_inode);
            let overlaps = next.is_some_and(|n| n.offset < vma.offset + (vma.end - vma.start));
            if !seen.insert(vma.shm_inode) {
                if let Some(shared) = self.shared.get_mut(&vma.shm_inode) {
                    shared.has_views |= overlaps;
                }
                continue;
            }
            let path = format!("/proc/{}/map_files/{:x}-{:x}", self.pid, vma.start, vma.end);
            // Gone meanwhile: whatever is there now is scanned as new.
            let Ok(meta) = std::fs::metadata(&path) else { continue };
            let changed_at = meta.ctime() * 1_000_000_000 + meta.ctime_nsec();
            let known = self.shared.contains_key(&vma.shm_inode);
            let shared = self.shared.entry(vma.shm_inode).or_default();
            shared.is_changed = known && shared.changed_at != changed_at;
            shared.changed_at = changed_at;
            shared.has_views |= overlaps;
        }
        self.shared.retain(|inode, _| seen.contains(inode));
    }

    /// Adds to what was reported as written what no scan reports.
    fn add_unreported(&mut self, vma: &Vma, runs: &mut Runs) -> Result<(), TrackError> {
        if !is_shared(vma) {
            return Ok(());
        }
        let mut more = Extents::new();
        self.removed.overlap(vma.start, vma.end).for_each(|(s, e)| more.insert(s, e));
        if self.must_resend(vma, runs.has_own()) {
            more.insert(vma.start, vma.end);
        }
        if more.is_empty() {
            return Ok(());
        }
        for run in runs.take_own() {
            more.insert(run.start, run.start + run.len as u64);
        }
        if by_window(vma) {
            more.iter().for_each(|(s, e)| runs.push(s, e));
        } else if !self.object_data(vma, &more, |s, e| runs.push(s, e))? {
            runs.forget();
        }
        Ok(())
    }

    /// Whether a mapping of plain shared memory must be sent as a whole, after a scan that reported stores to
    /// it or did not. The times of the object tell that it was changed. Where its pages are mapped once, it was
    /// by stores that this scan or the one before has reported; where they are mapped twice, the one mapping
    /// may be gone with what it would have reported.
    pub(super) fn must_resend(&mut self, vma: &Vma, stored: bool) -> bool {
        let Some(shared) = self.shared.get_mut(&vma.shm_inode).filter(|_| is_plain_shared(vma)) else {
            return false;
        };
        shared.is_stored |= stored;
        let explained = shared.is_stored || shared.was_stored;
        shared.is_changed && (shared.has_views || !explained)
    }

    /// The pages that a shared memory object holds, of these addresses in this mapping of it. `false`: there is
    /// no such mapping any more.
    pub(super) fn object_data(
        &self,
        vma: &Vma,
        of: &Extents,
        mut each: impl FnMut(u64, u64),
    ) -> Result<bool, TrackError> {
        let path = format!("/proc/{}/map_files/{:x}-{:x}", self.pid, vma.start, vma.end);
        let object = match File::open(&path) {
            Ok(object) => object,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(TrackError::Open { path, source }),
        };
        let seek = |at: u64, whence| {
            nix::unistd::lseek64(&object, i64::try_from(at).unwrap_or(i64::MAX), whence)
                .map(|v| u64::try_from(v).unwrap_or(0))
        };
        for (start, end) in of.overlap(vma.start, vma.end) {
            let (mut at, end) = (vma.offset + (start - vma.start), vma.offset + (end - vma.start));
            while at < end {
                let Ok(data) = seek(at, nix::unistd::Whence::SeekData) else { break };
                if data >= end {
                    break;
                }
                let hole = seek(data, nix::unistd::Whence::SeekHole).unwrap_or(end).min(end);
                let (from, to) = (data & !(PAGE_BYTES - 1), hole.next_multiple_of(PAGE_BYTES));
                each(vma.start + (from - vma.offset), vma.start + (to.min(end) - vma.offset));
                at = hole.max(data + 1);
            }
        }
        Ok(true)
    }
}

impl Tracker for UffdTracker {
    fn scan(&mut self, layout: &mut Layout) -> Result<Vec<RemoteRange>, TrackError> {
        let mut runs = Runs::default();
        self.look_at_shared(layout);
        for vma in &mut layout.vmas {
            self.scan_vma(vma, &mut runs)?;
        }
        Ok(runs.runs)
    }

    fn final_scan(&mut self, layout: &mut Layout, sent: &Extents) -> Result<FinalScan, TrackError> {
        let mut out = Final::default();
        self.look_at_shared(layout);
        for vma in &mut layout.vmas {
            let gone = out.gone.len();
            out.written.begin();
            out.guards.begin();
            if vma.kind() == VmaKind::VmaDroppable && self.holds(vma) {
                vma.set_kind(VmaKind::VmaAnonPrivate);
                // All that came from its flags was of another mapping.
                vma.advice.clear();
                (vma.noreserve, vma.accounted) = (false, false);
                vma.fresh = true;
            }
            let owed = vma.fresh || self.owed.overlap(vma.start, vma.end).next().is_some();
            if owed || !self.final_tracked(vma, sent, &mut out)? {
                out.written.forget();
                out.guards.forget();
                out.gone.truncate(gone);
                vma.fresh = true;
                self.final_fresh(vma, &mut out)?;
            }
        }
        let guards = out.guards.runs.iter().map(|r| Range { start: r.start, end: r.start + r.len as u64 });
        Ok(FinalScan { guards: guards.collect(), written: out.written.runs, gone: out.gone })
    }

    fn file_pages(&mut self, vma: &Vma) -> Result<Vec<Range>, TrackError> {
        let both = pagemap::PRESENT | pagemap::FILE;
        let query = Query { all: both, report: pagemap::FILE, ..Query::default() };
        let mut runs = Runs::default();
        self.query(vma.start, vma.end, query, |r| runs.push(r.start, r.end))?;
        let range = |r: &RemoteRange| Range { start: r.start, end: r.start + r.len as u64 };
        Ok(runs.runs.iter().map(range).collect())
    }

    fn untouched(&mut self, runs: &[RemoteRange]) -> Result<Extents, TrackError> {
        let mut zero = Extents::new();
        let query = Query { all: pagemap::PFNZERO, report: pagemap::PFNZERO, ..Query::default() };
        for run in runs {
            self.query(run.start, run.start + run.len as u64, query, |r| zero.insert(r.start, r.end))?;
        }
        Ok(zero)
    }
}

/// Shared memory that travels by its addresses.
fn is_plain_shared(vma: &Vma) -> bool {
    vma.kind() == VmaKind::VmaAnonShared && !by_window(vma)
}

pub(super) fn whole(vma: &Vma) -> Extents {
    let mut whole = Extents::new();
    whole.insert(vma.start, vma.end);
    whole
}

/// Pages of a private mapping of a file that are the process's own. Huge pages are never swapped: what looks
/// so is the mark that protection leaves where a page was dropped.
fn own_pages(vma: &Vma, flags: u64) -> Query {
    let swapped = if vma.page_bytes == 0 { pagemap::SWAPPED } else { 0 };
    Query {
        flags,
        inverted: pagemap::FILE | pagemap::PFNZERO,
        all: pagemap::WRITTEN | pagemap::FILE | pagemap::PFNZERO,
        any: pagemap::PRESENT | swapped,
        report: pagemap::WRITTEN | pagemap::GUARD,
    }
}

/// Page runs in order of address, merged where they touch within one mapping.
#[derive(Debug, Default)]
pub(super) struct Runs {
    pub(super) runs: Vec<RemoteRange>,
    /// Runs before this one belong to other mappings.
    sealed: usize,
}

impl Runs {
    pub(super) fn push(&mut self, start: u64, end: u64) {
        let len = usize::try_from(end - start).unwrap_or(0);
        let own = self.runs.len() > self.sealed;
        match self.runs.last_mut() {
            Some(last) if own && last.start + last.len as u64 == start => last.len += len,
            _ => self.runs.push(RemoteRange { start, len }),
        }
    }
    /// Begins a mapping; [`Runs::forget`] takes back what is pushed from here on.
    pub(super) fn begin(&mut self) {
        self.sealed = self.runs.len();
    }
    pub(super) fn forget(&mut self) {
        self.runs.truncate(self.sealed);
    }
    fn has_own(&self) -> bool {
        self.runs.len() > self.sealed
    }
    fn take_own(&mut self) -> Vec<RemoteRange> {
        self.runs.split_off(self.sealed)
    }
}
