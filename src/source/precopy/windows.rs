//! Pages of shared memory objects on their way: read through descriptors, by the addresses of their windows.

use super::{Go, Precopy, PrecopyError, READ_BYTES, Sink, page_chunks};
use crate::engine::extents::Extents;
use crate::engine::memory::PAGE_BYTES;
use crate::engine::state::objects::{WINDOWS_END, WINDOWS_START};

/// Bytes of a page, as an index.
const PAGE: usize = 4096;

impl Precopy {
    /// Sends what differs from what was sent before of these pages. Ranges may be wide guesses: whole objects
    /// that were changed by a call. One read per run of pages: files cannot be read at several places at once.
    /// Returns what it was stopped before.
    pub(super) fn send_windows<E: std::error::Error>(
        &mut self,
        round: u32,
        ranges: &Extents,
        sink: &mut impl Sink<E>,
        go: &dyn Fn(u64) -> Go,
    ) -> Result<Extents, PrecopyError<E>> {
        let mut left = ranges.total();
        for (start, end) in ranges.overlap(WINDOWS_START, WINDOWS_END) {
            let mut at = start;
            while at < end {
                let from = at;
                let unit = self.objects.at(at).map_or(0, |o| o.page_bytes);
                at = if unit == 0 {
                    let next = end.min(at + READ_BYTES as u64);
                    self.send_window_pages(round, at, next, sink)?;
                    next
                } else {
                    // Windows begin at multiples of all page sizes.
                    let first = at - at % unit;
                    self.send_huge_page(round, first, unit, sink)?;
                    first + unit
                };
                left = left.saturating_sub(at - from);
                match go(left / PAGE_BYTES) {
                    Go::On => {}
                    Go::Cancel => return Err(PrecopyError::Cancelled),
                    Go::Stop => {
                        let mut unsent = ranges.clone();
                        unsent.remove(0, at);
                        return Ok(unsent);
                    }
                }
            }
        }
        Ok(Extents::new())
    }

    /// A huge page full of zeros may be a hole; as one it takes no page there.
    fn send_huge_page<E: std::error::Error>(
        &mut self,
        round: u32,
        start: u64,
        unit: u64,
        sink: &mut impl Sink<E>,
    ) -> Result<(), PrecopyError<E>> {
        let end = start + unit;
        let mut at = start;
        while at < end {
            let next = end.min(at + READ_BYTES as u64);
            let read = self.read_window(at, next)?;
            if self.buffer[..read].iter().any(|b| *b != 0) {
                break;
            }
            at = next;
        }
        if at >= end {
            if self.sent.overlap(start, end).next().is_some() {
                for (at, pages) in page_chunks(start, end) {
                    self.packer.drop_run(round, at, pages, sink)?;
                }
                self.sent.remove(start, end);
            }
            return Ok(());
        }
        let mut at = start;
        while at < end {
            let next = end.min(at + READ_BYTES as u64);
            self.send_window_pages(round, at, next, sink)?;
            at = next;
        }
        Ok(())
    }

    /// At most a buffer of pages of one object.
    fn send_window_pages<E: std::error::Error>(
        &mut self,
        round: u32,
        start: u64,
        end: u64,
        sink: &mut impl Sink<E>,
    ) -> Result<(), PrecopyError<E>> {
        let read = self.read_window(start, end)?;
        let mut addrs = Vec::with_capacity(read / PAGE);
        for i in 0..read / PAGE {
            let address = start + (i * PAGE) as u64;
            let from = i * PAGE..(i + 1) * PAGE;
            let same = self.sums.record(address, &self.buffer[from.clone()]);
            if same && self.sent.overlap(address, address + PAGE_BYTES).next().is_some() {
                continue;
            }
            self.buffer.copy_within(from, addrs.len() * PAGE);
            addrs.push(address);
        }
        self.sent.insert(start, start + read as u64);
        self.packer.pack(round, &addrs, &self.buffer[..addrs.len() * PAGE], sink)?;
        Ok(())
    }

    /// Into the buffer; how many bytes there are, in whole pages.
    fn read_window<E: std::error::Error>(&mut self, start: u64, end: u64) -> Result<usize, PrecopyError<E>> {
        let len = usize::try_from(end - start).unwrap_or(READ_BYTES).min(READ_BYTES);
        Ok(self.objects.read(start, &mut self.buffer[..len], &self.placed, &self.memory)?)
    }

    /// Remembers what huge pages of private mappings held, among these pages just read.
    pub(super) fn note_huge(&mut self, addrs: &[u64]) {
        if self.huge.is_empty() {
            return;
        }
        for (address, page) in addrs.iter().zip(self.buffer.chunks_exact(PAGE)) {
            if self.huge.overlap(*address, address + PAGE_BYTES).next().is_some() {
                self.sums.record(*address, page);
            }
        }
    }
}
