//! Which pages of a process have been written: one trait, one backend so far.
//!
//! The backend is userfaultfd write-protection in asynchronous mode with the PAGEMAP_SCAN ioctl
//! (Linux 6.7): the process needs one brief stop to make the userfaultfd; from then on "report what was
//! written and protect it again" is one atomic ioctl per mapping on the running process. Scan first, read
//! second: a write between the two is in what is read, one after it is reported by the next scan.
//!
//! What no scan reports, the freeze finds out: pages that were sent and are no longer there
//! (MADV_DONTNEED, hole punches), and mappings that were replaced. A mapping that is not tracked yet
//! (new, moved, mapped over) is *fresh*: it is registered, everything in it is reported, and the
//! destination starts it over.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;

use super::extents::Extents;
use super::freeze::Frozen;
use super::memory::PAGE_BYTES;
use super::procfs::parse_maps;
use super::remote::{Batch, InjectError, RemoteCalls, Tid};
use super::sys::pagemap::{self, PageRegion, Query};
use super::sys::vm::RemoteRange;
use super::sys::{pidfd, uffd};
use crate::proto::image::{Layout, Range, Vma, VmaKind};

/// Why pages could not be tracked.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The kernel lacks what the backend needs.
    #[error("this kernel cannot track writes by userfaultfd ({what}); Linux 6.7 or newer is needed")]
    Unsupported {
        /// The missing feature.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A mapping refuses to be tracked.
    #[error("mapping {start:x}-{end:x} cannot be tracked")]
    Untrackable {
        /// Where it starts.
        start: u64,
        /// Where it ends.
        end: u64,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A scan failed.
    #[error("scanning {start:x}-{end:x} for written pages")]
    Scan {
        /// Where it starts.
        start: u64,
        /// Where it ends.
        end: u64,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A file of /proc could not be opened or searched.
    #[error("opening {path}")]
    Open {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The process could not be made to create its userfaultfd.
    #[error("creating a userfaultfd in the process")]
    Inject(#[from] InjectError),
}

/// What the last look at a stopped process found.
#[derive(Debug, Default)]
pub struct FinalScan {
    /// Written since the last scan, or never sent: to be read and sent.
    pub written: Vec<RemoteRange>,
    /// Sent earlier and no longer there.
    pub gone: Vec<(u64, u64)>,
    /// Guard pages (MADV_GUARD_INSTALL).
    pub guards: Vec<Range>,
}

/// A backend that knows which pages were written.
pub trait Tracker {
    /// Reports what was written in the mappings of `layout` since the last scan, and starts over. Marks
    /// mappings that it has not followed since then as fresh: everything in them is reported, as in those
    /// that are marked so already. The process runs.
    ///
    /// # Errors
    /// See [`TrackError`].
    fn scan(&mut self, layout: &mut Layout) -> Result<Vec<RemoteRange>, TrackError>;

    /// The last scan, of the stopped process; `sent` is what the destination has.
    ///
    /// # Errors
    /// See [`TrackError`].
    fn final_scan(&mut self, layout: &mut Layout, sent: &Extents) -> Result<FinalScan, TrackError>;

    /// Which pages of a file mapping are the file's own and mapped.
    ///
    /// # Errors
    /// See [`TrackError`].
    fn file_pages(&mut self, vma: &Vma) -> Result<Vec<Range>, TrackError>;

    /// Which parts of these runs are the kernel's shared zero page: read, never written.
    ///
    /// # Errors
    /// See [`TrackError`].
    fn untouched(&mut self, runs: &[RemoteRange]) -> Result<Extents, TrackError>;
}

/// userfaultfd write-protection, asynchronous.
#[derive(Debug)]
pub struct UffdTracker {
    pid: Tid,
    uffd: OwnedFd,
    pagemap: File,
    found: Vec<PageRegion>,
    swap: bool,
    /// Ranges whose contents no scan has reported yet, although they may be protected.
    owed: Extents,
    /// Of each shared memory object, by inode: when it was last changed otherwise than by a store (ns).
    changed_at: HashMap<u64, i64>,
    /// Objects that have been changed so since the last scan.
    punched: HashSet<u64>,
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
        let mut batch = Batch::new();
        let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs()) | uffd::USER_MODE_ONLY;
        batch.call(libc::SYS_userfaultfd, &[flags.into()]);
        let theirs = process
            .run(&batch)?
            .ret(0)
            .map_err(|errno| TrackError::Unsupported { what: "userfaultfd(2)", errno })?;
        let ours = pidfd::PidFd::open(pid.unsigned_abs())
            .and_then(|p| pidfd::take_fd(p.as_fd(), i32::try_from(theirs).unwrap_or(-1)));
        let mut close = Batch::new();
        close.call(libc::SYS_close, &[theirs.into()]);
        process.run_all_ok("closing the userfaultfd", &close)?;
        let ours = ours.map_err(|errno| TrackError::Unsupported { what: "pidfd_getfd(2)", errno })?;
        let features =
            uffd::FEATURE_WP_ASYNC | uffd::FEATURE_WP_UNPOPULATED | uffd::FEATURE_WP_HUGETLBFS_SHMEM;
        uffd::api(ours.as_fd(), features)
            .map_err(|errno| TrackError::Unsupported { what: "asynchronous write-protection", errno })?;
        let path = format!("/proc/{pid}/pagemap");
        let pagemap = File::open(&path).map_err(|source| TrackError::Open { path, source })?;
        let swap = std::fs::read_to_string("/proc/swaps").is_ok_and(|s| s.lines().count() > 1);
        Ok(Self {
            pid,
            uffd: ours,
            pagemap,
            found: vec![PageRegion::default(); FOUND_REGIONS],
            swap,
            owed: Extents::new(),
            changed_at: HashMap::new(),
            punched: HashSet::new(),
        })
    }

    /// One query over a range, in as many ioctls as it takes. `false`: a mapping is not registered.
    fn query(
        &mut self,
        start: u64,
        end: u64,
        query: Query,
        mut each: impl FnMut(PageRegion),
    ) -> Result<bool, TrackError> {
        let mut at = start;
        while at < end {
            match pagemap::scan(self.pagemap.as_fd(), at, end, query, &mut self.found) {
                Ok((count, walked_to)) => {
                    self.found.iter().take(count).for_each(|r| each(*r));
                    if walked_to <= at {
                        break;
                    }
                    at = walked_to;
                }
                Err(Errno::EPERM) => return Ok(false),
                Err(errno) => return Err(TrackError::Scan { start, end, errno }),
            }
        }
        Ok(true)
    }

    /// The query of a round for this kind of mapping; `None`: its contents are not ours to send.
    fn round_query(&self, kind: VmaKind) -> Option<Query> {
        let flags = pagemap::WP_MATCHING | pagemap::CHECK_WPASYNC;
        match kind {
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
            VmaKind::VmaFilePrivate => Some(Query {
                flags,
                inverted: pagemap::FILE | pagemap::PFNZERO,
                all: pagemap::WRITTEN | pagemap::FILE | pagemap::PFNZERO,
                any: pagemap::PRESENT | pagemap::SWAPPED,
                report: pagemap::WRITTEN | pagemap::GUARD,
            }),
            // A page may be in the object and not in this page table: whatever was written counts.
            VmaKind::VmaAnonShared => {
                Some(Query { flags, all: pagemap::WRITTEN, report: pagemap::WRITTEN, ..Query::default() })
            }
            VmaKind::VmaFileShared | VmaKind::VmaVdso | VmaKind::Invalid => None,
        }
    }

    /// Scans one mapping of the running process. One that has not been followed without a gap starts over:
    /// it is registered, and everything in it is protected and reported.
    fn scan_vma(&mut self, vma: &mut Vma, runs: &mut Runs) -> Result<(), TrackError> {
        let Some(mut query) = self.round_query(vma.kind()) else { return Ok(()) };
        runs.begin();
        let push = |r: PageRegion, runs: &mut Runs| {
            if r.categories & pagemap::GUARD == 0 {
                runs.push(r.start, r.end);
            }
        };
        let owed = self.owed.overlap(vma.start, vma.end).next().is_some();
        if !vma.fresh && !owed && self.punched.contains(&vma.shm_inode) {
            if self.query(vma.start, vma.end, query, |_| {})?
                && self.object_data(vma, |start, end| runs.push(start, end))?
            {
                return Ok(());
            }
            runs.forget();
        } else if !vma.fresh && !owed {
            if self.query(vma.start, vma.end, query, |r| push(r, runs))? {
                return Ok(());
            }
            runs.forget();
        }
        // Until a scan goes through, everything in the range is owed to the destination: an aborted scan
        // has protected pages that it did not report, and if the mapping changes under our hands, the next
        // scan may meet a part of it that looks as if it had been followed all along.
        vma.fresh = true;
        self.owed.insert(vma.start, vma.end);
        match uffd::register_wp(self.uffd.as_fd(), vma.start, vma.end - vma.start) {
            Ok(()) => {}
            // It is gone; the next round sees what has become of it.
            Err(Errno::ENOMEM | Errno::ESRCH) => return Ok(()),
            Err(Errno::EINVAL) if !self.still_maps(vma) => return Ok(()),
            Err(errno) => return Err(TrackError::Untrackable { start: vma.start, end: vma.end, errno }),
        }
        let done = if vma.kind() == VmaKind::VmaAnonShared {
            // Protect all of it, and report what the object holds, in this page table or not.
            self.query(vma.start, vma.end, query, |_| {})?
                && self.object_data(vma, |start, end| runs.push(start, end))?
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

    /// Whether the process still has a mapping with these borders.
    fn still_maps(&self, vma: &Vma) -> bool {
        let text = std::fs::read(format!("/proc/{}/maps", self.pid)).unwrap_or_default();
        let maps = parse_maps(&text).unwrap_or_default();
        maps.iter().any(|m| m.start == vma.start && m.end == vma.end)
    }

    /// Finds out which shared memory objects had holes punched (MADV_REMOVE) since the last scan. A page
    /// that is read again behind such a hole is a new one, full of zeros, that no scan reports; but the
    /// object's change time tells, which stores do not touch. Before the scan, so that a hole that comes
    /// later is found by the next one.
    fn look_for_holes(&mut self, layout: &Layout) {
        self.punched.clear();
        let mut seen = HashSet::new();
        for vma in layout.vmas.iter().filter(|v| v.kind() == VmaKind::VmaAnonShared) {
            if !seen.insert(vma.shm_inode) {
                continue;
            }
            let path = format!("/proc/{}/map_files/{:x}-{:x}", self.pid, vma.start, vma.end);
            // Gone meanwhile: whatever is there now is scanned as new.
            let Ok(meta) = std::fs::metadata(&path) else { continue };
            let changed = meta.ctime() * 1_000_000_000 + meta.ctime_nsec();
            if self.changed_at.insert(vma.shm_inode, changed).is_some_and(|before| before != changed) {
                self.punched.insert(vma.shm_inode);
            }
        }
        self.changed_at.retain(|inode, _| seen.contains(inode));
    }

    /// The pages that a shared memory object holds, as addresses in this mapping of it. `false`: there is no
    /// such mapping any more.
    fn object_data(&self, vma: &Vma, mut each: impl FnMut(u64, u64)) -> Result<bool, TrackError> {
        let path = format!("/proc/{}/map_files/{:x}-{:x}", self.pid, vma.start, vma.end);
        let object = match File::open(&path) {
            Ok(object) => object,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(TrackError::Open { path, source }),
        };
        let end = vma.offset + (vma.end - vma.start);
        let seek = |at: u64, whence| {
            nix::unistd::lseek64(&object, i64::try_from(at).unwrap_or(i64::MAX), whence)
                .map(|v| u64::try_from(v).unwrap_or(0))
        };
        let mut at = vma.offset;
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
        Ok(true)
    }

    /// The last look at one mapping that rounds have followed. `false`: they have not.
    fn final_tracked(&mut self, vma: &Vma, sent: &Extents, out: &mut Final) -> Result<bool, TrackError> {
        let kind = vma.kind();
        match kind {
            VmaKind::VmaAnonPrivate => {
                let query = Query {
                    flags: pagemap::CHECK_WPASYNC,
                    all: pagemap::WRITTEN,
                    report: pagemap::PRESENT | pagemap::SWAPPED | pagemap::GUARD,
                    ..Query::default()
                };
                self.query(vma.start, vma.end, query, |r| {
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
            VmaKind::VmaFilePrivate => {
                let Some(mut query) = self.round_query(kind) else { return Ok(true) };
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
                    if self.swap {
                        for (start, end) in swapped {
                            self.really_swapped(start, end, |page| left.remove(page, page + PAGE_BYTES))?;
                        }
                    }
                    out.gone.extend(left.iter());
                }
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
                if self.punched.contains(&vma.shm_inode) {
                    written.insert(vma.start, vma.end);
                }
                if !self.query(vma.start, vma.end, query, |r| written.insert(r.start, r.end))? {
                    return Ok(false);
                }
                // Holes punched since are not reported; holes that were never filled are not to be read.
                let mut left = Extents::new();
                sent.overlap(vma.start, vma.end).for_each(|(s, e)| left.insert(s, e));
                let runs = &mut out.written;
                self.object_data(vma, |s, e| {
                    left.remove(s, e);
                    written.overlap(s, e).for_each(|(s, e)| runs.push(s, e));
                })?;
                out.gone.extend(left.iter());
                Ok(true)
            }
            VmaKind::VmaFileShared | VmaKind::VmaVdso | VmaKind::Invalid => Ok(true),
        }
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
    fn final_fresh(&mut self, vma: &Vma, out: &mut Final) -> Result<(), TrackError> {
        let mut query = Query {
            any: pagemap::PRESENT | pagemap::SWAPPED,
            report: pagemap::GUARD | pagemap::PRESENT,
            ..Query::default()
        };
        match vma.kind() {
            VmaKind::VmaAnonShared => {
                let runs = &mut out.written;
                return self.object_data(vma, |s, e| runs.push(s, e)).map(drop);
            }
            VmaKind::VmaFilePrivate => {
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

impl Tracker for UffdTracker {
    fn scan(&mut self, layout: &mut Layout) -> Result<Vec<RemoteRange>, TrackError> {
        let mut runs = Runs::default();
        self.look_for_holes(layout);
        for vma in &mut layout.vmas {
            self.scan_vma(vma, &mut runs)?;
        }
        Ok(runs.runs)
    }

    fn final_scan(&mut self, layout: &mut Layout, sent: &Extents) -> Result<FinalScan, TrackError> {
        let mut out = Final::default();
        self.look_for_holes(layout);
        for vma in &mut layout.vmas {
            let gone = out.gone.len();
            out.written.begin();
            out.guards.begin();
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

#[derive(Debug, Default)]
struct Final {
    written: Runs,
    guards: Runs,
    gone: Vec<(u64, u64)>,
}

/// Page runs in order of address, merged where they touch within one mapping.
#[derive(Debug, Default)]
struct Runs {
    runs: Vec<RemoteRange>,
    /// Runs before this one belong to other mappings.
    sealed: usize,
}

impl Runs {
    fn push(&mut self, start: u64, end: u64) {
        let len = usize::try_from(end - start).unwrap_or(0);
        let own = self.runs.len() > self.sealed;
        match self.runs.last_mut() {
            Some(last) if own && last.start + last.len as u64 == start => last.len += len,
            _ => self.runs.push(RemoteRange { start, len }),
        }
    }
    /// Begins a mapping; [`Runs::forget`] takes back what is pushed from here on.
    fn begin(&mut self) {
        self.sealed = self.runs.len();
    }
    fn forget(&mut self) {
        self.runs.truncate(self.sealed);
    }
}
