//! Pages to where they belong, in as few calls as the runs allow.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::time::Instant;

use nix::errno::Errno;

use super::LazyError;
use super::state::State;
use super::table::{HUGE_BYTES, MmId, Place, Step, Wake};
use crate::engine::memory::PAGE_BYTES;
use crate::engine::sys::uffd;

/// What pages hold.
#[derive(Debug, Clone, Copy)]
pub(super) enum Content<'a> {
    Bytes(&'a [u8]),
    Zero { len: u64, present: bool },
}

/// How far it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    /// An event must be read first, or its thread go on.
    Again,
}

impl<'a> Content<'a> {
    pub(super) fn len(&self) -> u64 {
        match self {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Zero { len, .. } => *len,
        }
    }

    /// A part of it; shorter if it ends before.
    fn part(self, from: u64, len: u64) -> Self {
        match self {
            Content::Bytes(bytes) => {
                let from = usize::try_from(from).unwrap_or(usize::MAX).min(bytes.len());
                let to = from.saturating_add(usize::try_from(len).unwrap_or(usize::MAX)).min(bytes.len());
                Content::Bytes(bytes.get(from..to).unwrap_or_default())
            }
            Content::Zero { len: all, present } => {
                Content::Zero { len: len.min(all.saturating_sub(from)), present }
            }
        }
    }
}

/// A huge page of zeros.
fn zeros() -> &'static [u8] {
    static ZEROS: OnceLock<Vec<u8>> = OnceLock::new();
    ZEROS.get_or_init(|| vec![0; usize::try_from(HUGE_BYTES).unwrap_or(0)])
}

/// The outcome of one step.
enum Stepped {
    Done,
    /// The table has changed: what is left has to be planned anew.
    Changed,
    Again,
}

impl State {
    /// Places what is missing of these pages of 4 KiB. `first`: they have not been tried before.
    pub(super) fn put(
        &mut self,
        source: u64,
        content: Content<'_>,
        first: bool,
    ) -> Result<Progress, LazyError> {
        let placed = self.put_all(source, content, first);
        self.write_down();
        // Until then, a fault there has been asked for.
        if !matches!(placed, Ok(Progress::Again)) {
            self.answered(source, source + content.len());
        }
        placed
    }

    fn put_all(&mut self, source: u64, content: Content<'_>, first: bool) -> Result<Progress, LazyError> {
        let end = source + content.len();
        let mut count = first;
        loop {
            if let Some(mm) = self.table.in_motion(source, end) {
                if !self.is_quiet(mm) {
                    return Ok(Progress::Again);
                }
                self.table.quiet(mm);
            }
            let steps = self.table.plan(source, end);
            if std::mem::take(&mut count) {
                self.stats.unwanted += unwanted(&steps, source, end);
            }
            let mut changed = false;
            for step in &steps {
                match self.step(step, content.part(step.source - source, step.len))? {
                    Stepped::Done => {}
                    Stepped::Again => return Ok(Progress::Again),
                    Stepped::Changed => {
                        changed = true;
                        break;
                    }
                }
            }
            if !changed {
                return Ok(Progress::Done);
            }
        }
    }

    /// Takes in a part of a huge page, and places the page if it is whole. `again` grows by the names of
    /// pages that must be asked for again.
    pub(super) fn put_huge(
        &mut self,
        source: u64,
        content: Content<'_>,
        again: &mut Vec<u64>,
    ) -> Result<Progress, LazyError> {
        let base = source & !(HUGE_BYTES - 1);
        if self.table.plan(base, base + HUGE_BYTES).is_empty() {
            self.huge.forget(base);
            self.stats.unwanted += content.len() / PAGE_BYTES;
            return Ok(Progress::Done);
        }
        let bytes = match content {
            Content::Bytes(bytes) => Some(bytes),
            Content::Zero { .. } => None,
        };
        let added = self.huge.add(source, content.len(), bytes);
        self.stats.unwanted += added.again;
        if let Some(evicted) = added.evicted {
            self.stats.evicted += 1;
            again.push(evicted);
        }
        let Some(whole) = added.whole else { return Ok(Progress::Done) };
        let placed = self.put(base, Content::Bytes(&whole), true);
        if !matches!(placed, Ok(Progress::Done)) {
            // Back into parts, to be tried again with the last of them.
            let len = content.len();
            let (from, to) = (source - base, source - base + len);
            let whole = Content::Bytes(&whole);
            for (at, len) in [(0, from), (to, HUGE_BYTES - to)] {
                if let (Content::Bytes(part), true) = (whole.part(at, len), len > 0) {
                    self.huge.add(base + at, len, Some(part));
                }
            }
        }
        placed
    }

    /// The answers to faults that these pages are.
    fn answered(&mut self, source: u64, end: u64) {
        self.table.arrived(source, end);
        let now = Instant::now();
        while let Some((&at, &since)) = self.waiting.range(source..end).next() {
            self.waiting.remove(&at);
            self.waits.record(now.saturating_duration_since(since));
        }
    }

    /// Places one run.
    fn step(&mut self, step: &Step, content: Content<'_>) -> Result<Stepped, LazyError> {
        let (mm, address) = match step.place {
            Place::Mapped { mm, address } => (mm, address),
            Place::Object { object, offset } => return self.write_object(step, object, offset, content),
        };
        let mut done = 0;
        // At a border of mappings a run has to be cut; where it is is found by halving.
        let mut limit = step.len;
        let mut twice = false;
        while done < step.len {
            let len = limit.min(step.len - done);
            match self.call(mm, address + done, step.page, content.part(done, len)) {
                Ok(placed) => {
                    self.table.quiet(mm);
                    self.mark(step, done, placed);
                    done += placed;
                    (limit, twice) = (step.len, false);
                }
                Err(Errno::EEXIST) => {
                    if !self.again {
                        self.stats.present += step.page / PAGE_BYTES;
                    }
                    self.mark(step, done, step.page);
                    self.wake(Wake { mm, address: address + done, len: step.page });
                    done += step.page;
                }
                Err(Errno::EAGAIN) => return Ok(Stepped::Again),
                Err(Errno::ESRCH) => {
                    self.gone(mm);
                    return Ok(Stepped::Changed);
                }
                Err(Errno::ENOENT) if len > step.page => {
                    limit = (len / 2).next_multiple_of(step.page).min(len - step.page);
                }
                // The mapping may have moved a moment ago. Then the next try says that an event is due.
                Err(Errno::ENOENT) if !twice => twice = true,
                Err(Errno::ENOENT) => {
                    self.table.vanished(mm, address + done, address + done + step.page);
                    return Ok(Stepped::Changed);
                }
                Err(errno) => return Err(LazyError::Place { address: address + done, errno }),
            }
        }
        Ok(Stepped::Done)
    }

    fn call(&self, mm: MmId, address: u64, page: u64, content: Content<'_>) -> Result<u64, Errno> {
        let space = self.spaces.get(&mm).ok_or(Errno::ESRCH)?;
        let uffd = space.uffd.as_fd();
        match content {
            Content::Bytes(bytes) => uffd::copy(uffd, address, bytes),
            Content::Zero { len, present: false } if page == PAGE_BYTES => uffd::zero(uffd, address, len),
            Content::Zero { len, .. } => {
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                uffd::copy(uffd, address, zeros().get(..len).unwrap_or(zeros()))
            }
        }
    }

    fn mark(&mut self, step: &Step, done: u64, len: u64) {
        let wakes = self.table.installed(step, done, len);
        wakes.into_iter().for_each(|wake| self.wake(wake));
    }

    /// Pages of an object that nothing maps just now: nobody can touch them while they are written.
    fn write_object(
        &mut self,
        step: &Step,
        object: usize,
        offset: u64,
        content: Content<'_>,
    ) -> Result<Stepped, LazyError> {
        if step.page > PAGE_BYTES {
            // It cannot be mapped again: such mappings do not grow.
            self.mark(step, 0, step.len);
            return Ok(Stepped::Done);
        }
        let mut done = 0;
        while done < step.len {
            let bytes = match content.part(done, step.len - done) {
                Content::Bytes(bytes) => bytes,
                Content::Zero { len, .. } => {
                    zeros().get(..usize::try_from(len).unwrap_or(usize::MAX)).unwrap_or(zeros())
                }
            };
            let written = match self.objects.get(&object) {
                Some(object) => object.file.write_all_at(bytes, offset + done),
                None => Ok(()),
            };
            written.map_err(|e| LazyError::Place {
                address: step.source + done,
                errno: Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)),
            })?;
            done += bytes.len() as u64;
        }
        self.mark(step, 0, step.len);
        Ok(Stepped::Done)
    }

    /// Zeros where nothing is missing, for a thread that waits there. Whatever stands in the way, the
    /// thread looks again.
    pub(super) fn fill_zero(&mut self, mm: MmId, address: u64, page: u64) {
        let zero = |present| Content::Zero { len: page, present };
        let mut filled = self.call(mm, address, page, zero(false));
        if filled == Err(Errno::EINVAL) {
            // Huge pages that the table does not know.
            let base = address & !(HUGE_BYTES - 1);
            filled = self.call(mm, base, HUGE_BYTES, Content::Zero { len: HUGE_BYTES, present: true });
        }
        match filled {
            Ok(_) => self.stats.zero_filled += 1,
            Err(Errno::ESRCH) => self.gone(mm),
            Err(Errno::EAGAIN) => self.later.push(Wake { mm, address, len: page }),
            Err(errno) => {
                if !matches!(errno, Errno::EEXIST | Errno::ENOENT) {
                    tracing::error!(%errno, address, "placing zeros");
                }
                self.wake(Wake { mm, address, len: page });
            }
        }
    }
}

/// How many pages of the range no step is about.
fn unwanted(steps: &[Step], start: u64, end: u64) -> u64 {
    let mut rest = crate::engine::extents::Extents::new();
    rest.insert(start, end);
    steps.iter().for_each(|step| rest.remove(step.source, step.source + step.len));
    rest.total() / PAGE_BYTES
}
