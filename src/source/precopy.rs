//! The rounds: what is dirty is read and sent while the process runs, and a last time while it is frozen.
//!
//! One round is: the memory map, one scan per mapping (protect and report), the map on the wire if it
//! differs, then the reported pages. What has been sent and is valid at the destination is kept as a set
//! of ranges: it tells, at the freeze, what the destination must forget.

mod late;
mod ranges;
mod windows;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;

use crate::engine::dirty::{FinalScan, TrackError, Tracker};
use crate::engine::extents::Extents;
use crate::engine::freeze::thread_ids;
use crate::engine::memory::{Memory, MemoryError, PAGE_BYTES};
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::engine::state::mm::{self, FlagCache, MapError};
use crate::engine::state::objects::{self, ObjectBook, ObjectError, Selected, Sums, by_window};
use crate::engine::sys::vm::RemoteRange;
use crate::pageserver::frame::{self, FrameError};
use crate::pageserver::pack::{Compression, PackError, PackStats, Packer};
use crate::proto::files::Ahead;
use crate::proto::image::{Layout, Object, Process, Vma};

pub use late::{FinalMap, Following, Remainder};
use ranges::{clip, mark_fresh, page_chunks, range};

/// Bytes read from the process at a time: the fastest size, and it stays in the cache (FACTS on reads:
/// 6.7 GB/s at 256 KiB).
const READ_BYTES: usize = 256 * 1024;

/// Runs of resident pages that are told of one file mapping, at most: it is about the resident size and a
/// warm start, not about contents.
const MAX_RESIDENT_RANGES: usize = 4096;

/// Why a round could not be completed. `E` is the error of the link.
#[derive(Debug, thiserror::Error)]
pub enum PrecopyError<E: std::error::Error + 'static> {
    /// The memory map could not be taken.
    #[error("reading the memory map")]
    Map(#[from] MapError),
    /// The process has mapped something that cannot be carried.
    #[error("the process now has memory that cannot be carried")]
    Refused(Vec<Reason>),
    /// Shared memory could not be found or read.
    #[error("reading shared memory")]
    Objects(#[from] ObjectError),
    /// Written pages could not be found.
    #[error("looking for written pages")]
    Track(#[from] TrackError),
    /// Memory could not be read.
    #[error("reading memory")]
    Memory(#[from] MemoryError),
    /// Its threads could not be listed.
    #[error("listing the threads")]
    Threads(#[source] std::io::Error),
    /// Pages could not be packed or sent.
    #[error("sending pages")]
    Pack(#[from] PackError<E>),
    /// A message is too long for a frame.
    #[error("framing")]
    Frame(#[from] FrameError),
    /// The operator has cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// What a round sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sent {
    /// Pages, zero pages included.
    pub pages: u64,
    /// Bytes of all frames.
    pub bytes: u64,
    /// How long its looks at the memory took: that does not depend on how much there was to send.
    pub scanning: Duration,
}

/// Whether to go on, asked between two reads with the number of pages that are still to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Go {
    /// Yes.
    On,
    /// End the round here: what it has not sent is left for the next one, or for the freeze.
    Stop,
    /// Give up.
    Cancel,
}

/// The memory of one process on its way.
pub struct Precopy {
    pid: Tid,
    memory: Memory,
    tracker: Box<dyn Tracker>,
    packer: Packer,
    flags: FlagCache,
    objects: ObjectBook,
    /// What pages of windows, and huge pages of private mappings, held when they were sent.
    sums: Sums,
    /// Private mappings of huge pages.
    huge: Extents,
    /// The map that the destination has, as far as it was sent.
    placed: Layout,
    /// The map that was scanned last.
    scanned: Layout,
    /// Pages, of mappings and of windows, that the destination has, or was told to do without for now.
    sent: Extents,
    /// File mappings whose resident pages the destination has been told.
    shown: Extents,
    /// The latter.
    owed: Extents,
    /// The result of the last scan: sent by the next round.
    pending: Option<(Layout, Selected)>,
    buffer: Vec<u8>,
    extra_bytes: u64,
}

impl std::fmt::Debug for Precopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Precopy").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// Where frames go.
pub trait Sink<E>: FnMut(Bytes) -> Result<(), E> {}
impl<E, F: FnMut(Bytes) -> Result<(), E>> Sink<E> for F {}

impl Precopy {
    /// Nothing sent yet. `objects` has been started.
    ///
    /// # Errors
    /// If the memory of the process cannot be opened.
    pub fn new(
        pid: Tid,
        tracker: Box<dyn Tracker>,
        objects: ObjectBook,
        compression: Compression,
    ) -> Result<Self, MemoryError> {
        Ok(Self {
            pid,
            memory: Memory::open(pid)?,
            tracker,
            // Pages that were written with zeros count in the resident size, there as here.
            packer: Packer::new(compression, true),
            flags: FlagCache::default(),
            objects,
            sums: Sums::default(),
            huge: Extents::new(),
            placed: Layout::default(),
            scanned: Layout::default(),
            sent: Extents::new(),
            owed: Extents::new(),
            shown: Extents::new(),
            pending: None,
            buffer: vec![0; READ_BYTES],
            extra_bytes: 0,
        })
    }

    /// Counters of everything packed so far.
    pub fn stats(&self) -> PackStats {
        let mut stats = self.packer.stats();
        stats.bytes_wire += self.extra_bytes;
        stats
    }

    /// Looks at the map and protects and reports what was written since the last look.
    fn scan<E: std::error::Error>(&mut self) -> Result<(), PrecopyError<E>> {
        self.flags.renew(self.pid)?;
        let mut map = mm::capture(self.pid, &self.flags)?;
        map.reasons.extend(self.objects.look(&mut map.layout, true)?);
        if !map.reasons.is_empty() {
            return Err(PrecopyError::Refused(map.reasons));
        }
        map.layout.tids = self.tids()?;
        mm::mark_replaced(&mut map.layout, &self.scanned);
        let runs = self.tracker.scan(&mut map.layout)?;
        let selected = self.objects.select(&map.layout, runs, false);
        self.scanned = map.layout.clone();
        for vma in &mut map.layout.vmas {
            let known = self.shown.overlap(vma.start, vma.end).map(|(s, e)| e - s).sum::<u64>();
            if is_backed(vma) && (vma.fresh || known < vma.end - vma.start) {
                vma.resident = self.tracker.file_pages(vma)?;
                vma.resident.truncate(MAX_RESIDENT_RANGES);
            }
        }
        self.pending = Some((map.layout, selected));
        Ok(())
    }

    fn tids<E: std::error::Error>(&self) -> Result<Vec<u32>, PrecopyError<E>> {
        let mut tids = thread_ids(self.pid).map_err(PrecopyError::Threads)?;
        tids.sort_by_key(|t| (*t != self.pid, *t));
        Ok(tids.into_iter().filter_map(|t| u32::try_from(t).ok()).collect())
    }

    /// Sends one round, then scans for the next; tells what it sent, and how many pages are left to send.
    ///
    /// # Errors
    /// See [`PrecopyError`].
    pub fn round<E: std::error::Error>(
        &mut self,
        round: u32,
        sink: &mut impl Sink<E>,
        go: &dyn Fn(u64) -> Go,
    ) -> Result<(Sent, u64), PrecopyError<E>> {
        let start = Instant::now();
        if self.pending.is_none() {
            self.scan()?;
        }
        let mut scanning = start.elapsed();
        let Some((layout, Selected { mapped: runs, mut windows, suspects })) = self.pending.take() else {
            return Ok((Sent::default(), 0));
        };
        let before = self.stats();
        self.send_layout(round, layout, sink)?;
        let untouched = self.send_untouched(round, &runs, sink)?;
        let touched = self.touched(&runs, &untouched);
        let mut left = self.send_pages(round, &touched, sink, go)?;
        if left.is_empty() {
            suspects.iter().for_each(|(start, end)| windows.insert(start, end));
            windows = self.send_windows(round, &windows, sink, go)?;
        }
        self.packer.flush(sink)?;
        self.put(frame::round_end(round), sink)?;
        let after = self.stats();
        let start = Instant::now();
        self.scan()?;
        scanning += start.elapsed();
        let sent = Sent {
            pages: after.pages_data + after.pages_zero - before.pages_data - before.pages_zero,
            bytes: after.bytes_wire - before.bytes_wire,
            scanning,
        };
        let Some((layout, selected)) = &mut self.pending else { return Ok((sent, 0)) };
        let runs = &mut selected.mapped;
        if !left.is_empty() {
            // Their scan is done: no later one reports them unless they are written again.
            clip(&mut left, layout);
            runs.iter().for_each(|r| left.insert(r.start, r.start + r.len as u64));
            *runs = left.iter().map(|(start, end)| range(start, end)).collect();
        }
        clip(&mut windows, layout);
        windows.iter().for_each(|(start, end)| selected.windows.insert(start, end));
        // Not what is only suspected to have changed: most of it has not, and is not sent.
        let dirty = runs.iter().map(|r| r.len as u64).sum::<u64>() + selected.windows.total();
        Ok((sent, dirty / PAGE_BYTES))
    }

    /// Says that pages were only ever read: they are the kernel's zero page, nothing to read, nothing to
    /// occupy.
    fn send_untouched<E: std::error::Error>(
        &mut self,
        round: u32,
        runs: &[RemoteRange],
        sink: &mut impl Sink<E>,
    ) -> Result<Extents, PrecopyError<E>> {
        let untouched = self.tracker.untouched(runs)?;
        for (start, end) in untouched.iter() {
            for (at, pages) in page_chunks(start, end) {
                self.packer.zero_run(round, at, pages, false, sink)?;
            }
        }
        Ok(untouched)
    }

    /// What of these runs is to be read and sent.
    fn touched(&mut self, runs: &[RemoteRange], untouched: &Extents) -> Extents {
        let mut touched = Extents::new();
        for r in runs {
            touched.insert(r.start, r.start + r.len as u64);
        }
        for (start, end) in untouched.iter() {
            touched.remove(start, end);
            self.sent.insert(start, end);
        }
        touched
    }

    /// The memory map of the stopped process, before anything runs in it. `sockets` are descriptors that are known to be
    /// some.
    ///
    /// # Errors
    /// See [`PrecopyError`].
    pub fn final_map<E: std::error::Error>(
        &mut self,
        sockets: HashSet<i32>,
    ) -> Result<FinalMap, PrecopyError<E>> {
        self.objects.pass_over(sockets);
        let mut map = mm::capture(self.pid, &self.flags)?;
        map.reasons.extend(self.objects.look(&mut map.layout, false)?);
        map.reasons.extend(objects::check_source(&map.layout)?);
        if !map.reasons.is_empty() {
            return Err(PrecopyError::Refused(map.reasons));
        }
        map.layout.tids = self.tids()?;
        mm::mark_replaced(&mut map.layout, &self.scanned);
        Ok(FinalMap(map.layout))
    }

    /// What is left to send of it: the last scan of all. Meanwhile the process may be asked for its state: what that
    /// needs is not in the map.
    ///
    /// # Errors
    /// See [`PrecopyError`].
    pub fn final_scan<E: std::error::Error>(
        &mut self,
        FinalMap(mut layout): FinalMap,
    ) -> Result<Remainder, PrecopyError<E>> {
        let FinalScan { written, mut gone, guards } = self.tracker.final_scan(&mut layout, &self.sent)?;
        let Selected { mapped: written, windows, suspects } = self.objects.select(&layout, written, true);
        gone.extend(self.objects.gone(&self.sent));
        let mut dirty = Extents::new();
        if let Some((before, Selected { mapped, windows, .. })) = self.pending.take() {
            mapped.iter().for_each(|r| dirty.insert(r.start, r.start + r.len as u64));
            windows.iter().for_each(|(start, end)| dirty.insert(start, end));
            clip(&mut dirty, &layout);
            // A mapping that the last scan met first is fresh still: the destination has not heard of it.
            let fresh = before.vmas.iter().filter(|v| v.fresh).map(|v| (v.start, v.end));
            fresh.for_each(|(start, end)| mark_fresh(&mut layout, start, end));
        }
        for &(start, end) in &gone {
            dirty.remove(start, end);
        }
        for r in &guards {
            dirty.remove(r.start, r.end);
        }
        for r in written {
            dirty.insert(r.start, r.start + r.len as u64);
        }
        windows.iter().for_each(|(start, end)| dirty.insert(start, end));
        if layout.vmas.iter().any(|v| v.page_bytes != 0) {
            let mut kept = self.sent.clone();
            gone.iter().for_each(|(start, end)| kept.remove(*start, *end));
            self.owed.iter().for_each(|(start, end)| kept.remove(start, end));
            let dropped = ObjectBook::dropped_huge(&layout, &kept, &self.sums, &self.memory);
            dropped.iter().for_each(|(start, end)| dirty.insert(start, end));
        }
        Ok(Remainder { layout, dirty, suspects, gone, guards })
    }

    /// The shared memory that the destination has, or will have.
    pub fn objects(&self) -> &[Object] {
        &self.placed.objects
    }

    /// Sends the state of the frozen process, the last frame of all.
    ///
    /// # Errors
    /// See [`PrecopyError`].
    pub fn send_state<E: std::error::Error>(
        &mut self,
        round: u32,
        process: &Process,
        sink: &mut impl Sink<E>,
    ) -> Result<(), PrecopyError<E>> {
        self.put(frame::state(round, &process.encode_to_vec())?, sink)
    }

    /// Sends connections whose sockets can be made. What is too long for a frame is not sent: it need not be.
    ///
    /// # Errors
    /// See [`PrecopyError`].
    pub fn send_ahead<E: std::error::Error>(
        &mut self,
        round: u32,
        connections: &Ahead,
        sink: &mut impl Sink<E>,
    ) -> Result<(), PrecopyError<E>> {
        match frame::ahead(round, &connections.encode_to_vec()) {
            Ok(bytes) => self.put(bytes, sink),
            Err(FrameError::TooLong { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn put<E: std::error::Error>(
        &mut self,
        bytes: Bytes,
        sink: &mut impl Sink<E>,
    ) -> Result<(), PrecopyError<E>> {
        self.extra_bytes += bytes.len() as u64;
        sink(bytes).map_err(|e| PackError::Sink(e).into())
    }

    fn send_layout<E: std::error::Error>(
        &mut self,
        round: u32,
        layout: Layout,
        sink: &mut impl Sink<E>,
    ) -> Result<(), PrecopyError<E>> {
        clip(&mut self.sent, &layout);
        clip(&mut self.owed, &layout);
        // An object that shrinks loses the rest of its last page too, which may be there again later.
        for object in &layout.objects {
            let was = self.placed.objects.iter().find(|o| o.id == object.id && o.window == object.window);
            if was.is_some_and(|was| was.size > object.size) {
                let end = object.window + object.size;
                self.sent.remove(end - end % PAGE_BYTES, end.next_multiple_of(PAGE_BYTES));
            }
        }
        self.huge = Extents::new();
        for vma in layout.vmas.iter().filter(|v| v.page_bytes != 0 && !by_window(v)) {
            self.huge.insert(vma.start, vma.end);
        }
        if layout != self.placed {
            self.put(frame::layout(round, &layout.encode_to_vec())?, sink)?;
        }
        self.placed = layout;
        // What is fresh now is known to the destination from here on.
        clip(&mut self.shown, &self.placed);
        for vma in &mut self.placed.vmas {
            vma.fresh = false;
            vma.resident.clear();
            if is_backed(vma) {
                self.shown.insert(vma.start, vma.end);
            }
        }
        Ok(())
    }

    /// Reads and packs these ranges, a buffer at a time; returns what it was stopped before. What cannot be
    /// read has been unmapped meanwhile.
    fn send_pages<E: std::error::Error>(
        &mut self,
        round: u32,
        ranges: &Extents,
        sink: &mut impl Sink<E>,
        go: &dyn Fn(u64) -> Go,
    ) -> Result<Extents, PrecopyError<E>> {
        const MAX_RUNS: usize = 64;
        let mut group: Vec<RemoteRange> = Vec::with_capacity(MAX_RUNS);
        let mut filled = 0;
        let mut left = ranges.total();
        for (mut start, end) in ranges.iter() {
            while start < end {
                let part = usize::try_from(end - start).unwrap_or(READ_BYTES).min(READ_BYTES - filled);
                group.push(RemoteRange { start, len: part });
                start += part as u64;
                filled += part;
                left -= part as u64;
                if filled == READ_BYTES || group.len() == MAX_RUNS {
                    self.send_group(round, &group, sink)?;
                    group.clear();
                    filled = 0;
                    match go(left / PAGE_BYTES) {
                        Go::On => {}
                        Go::Cancel => return Err(PrecopyError::Cancelled),
                        Go::Stop => {
                            let mut unsent = ranges.clone();
                            unsent.remove(0, start);
                            return Ok(unsent);
                        }
                    }
                }
            }
        }
        self.send_group(round, &group, sink)?;
        Ok(Extents::new())
    }

    fn send_group<E: std::error::Error>(
        &mut self,
        round: u32,
        group: &[RemoteRange],
        sink: &mut impl Sink<E>,
    ) -> Result<(), PrecopyError<E>> {
        if group.is_empty() {
            return Ok(());
        }
        let read = self.memory.read_runs(group, &mut self.buffer)?;
        let mut addrs = Vec::with_capacity(READ_BYTES / 4096);
        for run in &read {
            let end = run.start + run.len as u64;
            addrs.extend((run.start..end).step_by(4096));
            self.sent.insert(run.start, end);
            self.owed.remove(run.start, end);
        }
        self.note_huge(&addrs);
        self.packer.pack(round, &addrs, &self.buffer[..addrs.len() * 4096], sink)?;
        Ok(())
    }
}

/// Whether pages of a mapping are somewhere else too: there they are mapped ahead.
fn is_backed(vma: &Vma) -> bool {
    vma.file.is_some() || objects::from_object(vma)
}
