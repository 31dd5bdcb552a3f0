//! How mappings of the process come under the tracker's eyes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;

use super::TrackError;
use super::removals::is_shared;
use super::uffd::UffdTracker;
use crate::engine::freeze::Frozen;
use crate::engine::procfs::{self, parse_maps};
use crate::engine::remote::{Batch, InjectError, RemoteCalls};
use crate::engine::state::limits;
use crate::engine::sys::{pagemap, pidfd, uffd};
use crate::proto::image::Vma;

/// Makes userfaultfds in the stopped process, one for each set of features, and takes them over.
pub(super) fn make(process: &mut Frozen, features: &[u64]) -> Result<Vec<OwnedFd>, TrackError> {
    let unsupported = |what| move |errno| TrackError::Unsupported { what, errno };
    let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK).unsigned_abs()) | uffd::USER_MODE_ONLY;
    let mut theirs = ask(process, features.len(), flags, None)?;
    if theirs.contains(&Err(Errno::EMFILE))
        && let Some(limits) = limits::of_open_files(process.pid())
    {
        close(process, &theirs)?;
        theirs = ask(process, features.len(), flags, Some(limits))?;
    }
    let pidfd = pidfd::PidFd::open(process.pid().unsigned_abs());
    let take = |number: u64| {
        let pidfd = pidfd.as_ref().map_err(|errno| *errno)?;
        pidfd::take_fd(pidfd.as_fd(), i32::try_from(number).unwrap_or(-1))
    };
    let ours: Vec<Result<OwnedFd, Errno>> = theirs.iter().flatten().map(|number| take(*number)).collect();
    close(process, &theirs)?;
    if theirs.contains(&Err(Errno::EMFILE)) {
        return Err(TrackError::NoDescriptor);
    }
    if let Some(Err(errno)) = theirs.iter().find(|r| r.is_err()) {
        return Err(unsupported("userfaultfd(2)")(*errno));
    }
    let mut made = Vec::with_capacity(features.len());
    for (fd, features) in ours.into_iter().zip(features) {
        let fd = fd.map_err(unsupported("pidfd_getfd(2)"))?;
        uffd::api(fd.as_fd(), *features).map_err(unsupported("asynchronous write-protection"))?;
        made.push(fd);
    }
    Ok(made)
}

/// Lets the process make some userfaultfds, beyond its limit of open files for this moment if that is given, soft
/// and hard.
fn ask(
    process: &mut Frozen,
    count: usize,
    flags: u64,
    limits: Option<(u64, u64)>,
) -> Result<Vec<Result<u64, Errno>>, InjectError> {
    let mut batch = Batch::new();
    let limit = |batch: &mut Batch, soft: u64, hard: u64| {
        let value = batch.input(&[soft, hard].map(u64::to_ne_bytes).concat());
        batch.call(libc::SYS_prlimit64, &[0u64.into(), libc::RLIMIT_NOFILE.into(), value, 0u64.into()]);
    };
    if let Some((_, hard)) = limits {
        limit(&mut batch, hard, hard);
    }
    let first = batch.len();
    for _ in 0..count {
        batch.call(libc::SYS_userfaultfd, &[flags.into()]);
    }
    if let Some((soft, hard)) = limits {
        limit(&mut batch, soft, hard);
    }
    let outcome = process.run(&batch)?;
    Ok((first..first + count).map(|at| outcome.ret(at)).collect())
}

fn close(process: &mut Frozen, numbers: &[Result<u64, Errno>]) -> Result<(), InjectError> {
    let mut batch = Batch::new();
    for number in numbers.iter().flatten() {
        batch.call(libc::SYS_close, &[(*number).into()]);
    }
    if !batch.is_empty() {
        process.run_all_ok("closing the userfaultfds", &batch)?;
    }
    Ok(())
}

impl UffdTracker {
    /// Registers what is mapped in the range of `vma`, whole mappings at a time, with no page of it protected.
    /// Registering a part of a mapping would split it, and the process would see that: an mremap over both
    /// halves fails. So the borders are looked up right before; and memory that has grown in that moment is
    /// registered as well, upon which the kernel joins the two again.
    pub(super) fn register(&mut self, vma: &Vma) -> Result<(), Errno> {
        const GROWTHS: usize = 4;
        let mut pair = [self.uffd.as_fd(), self.removals.uffd()];
        if is_shared(vma) {
            pair.reverse();
        }
        let mut first = vma.start;
        let mut at = vma.start;
        while at < vma.end {
            let mapping = match pagemap::mapping_at(self.maps.as_fd(), at) {
                Ok(Some(mapping)) if mapping.start < vma.end => mapping,
                Ok(_) => return if at == vma.start { Err(Errno::ENOMEM) } else { Ok(()) },
                // An older kernel: the borders of a moment ago.
                Err(Errno::ENOTTY) => {
                    register_with(pair, vma.start, vma.end - vma.start)?;
                    return clear_marks(pair[0], vma.start, vma.end);
                }
                Err(errno) => return Err(errno),
            };
            register_with(pair, mapping.start, mapping.end - mapping.start)?;
            clear_marks(pair[0], mapping.start.max(vma.start), mapping.end.min(vma.end))?;
            first = first.min(mapping.start);
            at = mapping.end;
            for _ in 0..GROWTHS {
                match pagemap::mapping_at(self.maps.as_fd(), at) {
                    Ok(Some(rest)) if mapping.anonymous && rest.anonymous && rest.start == at => {
                        let len = rest.end - rest.start;
                        if register_with(pair, rest.start, len).is_err() {
                            break;
                        }
                        at = rest.end;
                    }
                    _ => break,
                }
            }
        }
        // What this round does not know yet starts over in the next. So does what a mapping has joined with
        // since it was looked at: it may have been without registration meanwhile.
        self.owed.insert(first, vma.start);
        self.owed.insert(vma.end, at);
        Ok(())
    }

    /// Whether ordinary memory has taken the place of memory that may be dropped at any time, since somebody looked at
    /// flags: a userfaultfd takes only what holds its contents (`vma_can_userfault` in the kernel, Linux 6.11, which
    /// has MAP_DROPPABLE).
    pub(super) fn holds(&self, vma: &Vma) -> bool {
        uffd::register_wp(self.uffd.as_fd(), vma.start, vma.end - vma.start).is_ok()
    }

    /// Whether the process still has a mapping with these borders.
    pub(super) fn still_maps(&self, vma: &Vma) -> bool {
        let text = procfs::read(format!("/proc/{}/maps", self.pid)).unwrap_or_default();
        let maps = parse_maps(&text).unwrap_or_default();
        maps.iter().any(|m| m.start == vma.start && m.end == vma.end)
    }
}

/// Registers with the first of two userfaultfds. When a shared mapping takes the place of a private one, or the
/// other way round, at the moment that it is registered, it is so with the wrong one, until the next time.
fn register_with([right, wrong]: [BorrowedFd<'_>; 2], start: u64, len: u64) -> Result<(), Errno> {
    match uffd::register_wp(right, start, len) {
        Err(Errno::EBUSY) => {
            uffd::unregister(wrong, start, len).map_err(|_| Errno::EBUSY)?;
            uffd::register_wp(right, start, len)
        }
        registered => registered,
    }
}

/// Takes marks of protection away that an earlier registration has left. When mremap(2) moves a mapping next to
/// one that was its neighbour before, the kernel joins them, ends the registration of both, and clears the
/// marks of the one that moved only (tried on 6.18). What is stored to the other then makes its pages writable
/// and leaves their marks. For PAGEMAP_SCAN such a page is protected already: it would never be reported again.
fn clear_marks(uffd: BorrowedFd<'_>, start: u64, end: u64) -> Result<(), Errno> {
    const TRIES: usize = 50;
    const PAUSE: Duration = Duration::from_micros(200);
    for _ in 0..TRIES {
        match uffd::unprotect(uffd, start, end - start) {
            // A removal is being told of.
            Err(Errno::EAGAIN) => std::thread::sleep(PAUSE),
            // Something else is there by now, or nothing.
            Err(Errno::ENOENT) => return Err(Errno::ENOMEM),
            cleared => return cleared,
        }
    }
    Err(Errno::ENOMEM)
}
