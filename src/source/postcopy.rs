//! The pages that the destination is owed after the resume, served from the memory of the frozen process.
//!
//! Two threads take from one set: the network's, which answers requests for single pages that somebody
//! waits for, and the push, which goes through the rest, around the last request first. What one has taken
//! the other does not send, so each page travels once. After a lost connection the destination says what it
//! misses, and the set starts over from that.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::engine::extents::Extents;
use crate::engine::memory::{Memory, MemoryError, PAGE_BYTES};
use crate::engine::priority::Hurry;
use crate::engine::remote::Tid;
use crate::engine::sys::vm::RemoteRange;
use crate::pageserver::frame::FrameError;
use crate::pageserver::pack::{Compression, PackError, PackStats, Packer};
use crate::source::precopy::Sink;

/// Pages that are pushed at a time: one frame's worth, so that a request never waits behind more than that
/// above the transport.
const PUSH_BYTES: usize = 64 * 1024;
/// How far around a request the push goes first, to each side.
const NEAR_BYTES: u64 = 128 * 1024;
/// Requests whose surroundings are remembered.
const MOST_NEAR: usize = 64;
/// The round number of frames after the freeze: higher than any round.
pub const LATE_ROUND: u32 = u32::MAX;

/// Why pages could not be served. `E` is the error of the link.
#[derive(Debug, thiserror::Error)]
pub enum PostcopyError<E: std::error::Error + 'static> {
    /// They cannot be read: the process is gone, and with it the pages.
    #[error("reading pages that the destination waits for")]
    Memory(#[from] MemoryError),
    /// A page that exists could not be read.
    #[error("the page at {0:#x}, which the destination waits for, is gone")]
    Missing(u64),
    /// They could not be packed or sent.
    #[error("sending pages that the destination waits for")]
    Pack(#[from] PackError<E>),
    /// A message is too long for a frame.
    #[error("framing")]
    Frame(#[from] FrameError),
}

/// What was served so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Served {
    /// Pages sent because they were asked for.
    pub asked: u64,
    /// Pages pushed.
    pub pushed: u64,
    /// Frames and bytes of both.
    pub packed: PackStats,
}

/// What is owed of one process's memory.
#[derive(Debug)]
pub struct Store {
    memory: Memory,
    compression: Compression,
    owed: Mutex<Owed>,
}

#[derive(Debug, Default)]
struct Owed {
    left: Extents,
    pages: u64,
    /// Ranges around the last requests, the latest first.
    near: VecDeque<(u64, u64)>,
    /// Mappings of huge pages: start, end, bytes of a page.
    huge: Vec<(u64, u64, u64)>,
    served: Served,
}

impl Store {
    /// Nothing owed yet.
    ///
    /// # Errors
    /// If the memory of the process cannot be opened.
    pub fn open(pid: Tid, compression: Compression) -> Result<Self, MemoryError> {
        Ok(Self { memory: Memory::open(pid)?, compression, owed: Mutex::default() })
    }

    fn owed(&self) -> MutexGuard<'_, Owed> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Owes these pages from now on, and no others. `huge`: mappings of huge pages (start, end, bytes of a
    /// page), of which only whole ones are of use.
    pub fn owe(&self, left: Extents, huge: Vec<(u64, u64, u64)>) {
        let mut owed = self.owed();
        owed.pages = left.total() / PAGE_BYTES;
        owed.left = left;
        owed.huge = huge;
        owed.near.clear();
    }

    /// After a lost connection: owes what the destination misses, of what it was owed at the beginning.
    pub fn owe_again(&self, missing: Extents) {
        let mut owed = self.owed();
        owed.pages = missing.total() / PAGE_BYTES;
        owed.left = missing;
        owed.near.clear();
    }

    /// Pages that are still owed.
    pub fn pages_left(&self) -> u64 {
        self.owed().pages
    }

    /// What was served so far.
    pub fn served(&self) -> Served {
        self.owed().served
    }

    /// Answers a request for the page at `address`: nothing if it is not owed (any more), for then it is
    /// under way. To be called from one thread at a time, which keeps `packer`.
    ///
    /// # Errors
    /// See [`PostcopyError`].
    pub fn answer<E: std::error::Error>(
        &self,
        address: u64,
        packer: &mut Packer,
        sink: &mut impl Sink<E>,
    ) -> Result<(), PostcopyError<E>> {
        let taken = {
            let mut owed = self.owed();
            let (start, end) = owed.unit(address);
            owed.look_around(start, end);
            owed.take(start, end)
        };
        let pages = self.send(&taken, packer, sink)?;
        self.owed().served.asked += pages;
        Ok(())
    }

    /// A packer for [`Store::answer`]: raw, because a page alone is there sooner than compressed.
    pub fn answering_packer() -> Packer {
        Packer::new(Compression::Off, true)
    }

    /// Pushes until nothing is owed. Returns when that is so or `stop` says yes.
    ///
    /// # Errors
    /// See [`PostcopyError`].
    pub fn push<E: std::error::Error>(
        &self,
        sink: &mut impl Sink<E>,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), PostcopyError<E>> {
        let mut packer = Packer::new(self.compression, true);
        let mut sent = 0;
        while !stop() {
            // The thread that answers requests is first in line and needs the same lock.
            let taken = {
                let _hurry = Hurry::up();
                let mut owed = self.owed();
                owed.served.pushed += std::mem::take(&mut sent);
                owed.next()
            };
            if taken.is_empty() {
                break;
            }
            sent = self.send(&taken, &mut packer, sink)?;
        }
        let mut owed = self.owed();
        owed.served.pushed += sent;
        let (all, now) = (&mut owed.served.packed, packer.stats());
        all.pages_data += now.pages_data;
        all.pages_zero += now.pages_zero;
        all.bytes_raw += now.bytes_raw;
        all.bytes_wire += now.bytes_wire;
        Ok(())
    }

    fn send<E: std::error::Error>(
        &self,
        taken: &[(u64, u64)],
        packer: &mut Packer,
        sink: &mut impl Sink<E>,
    ) -> Result<u64, PostcopyError<E>> {
        let mut pages = 0;
        let mut buffer = [0u8; PUSH_BYTES];
        let mut left = taken.iter().copied();
        let mut run = left.next();
        while run.is_some() {
            // As many runs as the buffer holds; a huge page takes several rounds.
            let (mut group, mut filled) = (Vec::new(), 0);
            while let Some((start, end)) = run.filter(|_| filled < PUSH_BYTES) {
                let len = usize::try_from(end - start).unwrap_or(PUSH_BYTES).min(PUSH_BYTES - filled);
                group.push(RemoteRange { start, len });
                filled += len;
                let rest = start + len as u64;
                run = if rest < end { Some((rest, end)) } else { left.next() };
            }
            let read = self.memory.read_runs(&group, &mut buffer)?;
            if read.iter().map(|r| r.len).sum::<usize>() != filled {
                return Err(PostcopyError::Missing(group.first().map_or(0, |r| r.start)));
            }
            let addrs: Vec<u64> =
                group.iter().flat_map(|r| (r.start..r.start + r.len as u64).step_by(4096)).collect();
            packer.pack(LATE_ROUND, &addrs, &buffer[..filled], sink)?;
            pages += addrs.len() as u64;
        }
        packer.flush(sink)?;
        Ok(pages)
    }
}

impl Owed {
    /// The range that is of use if the page at `address` is wanted: itself, or all of its huge page.
    fn unit(&self, address: u64) -> (u64, u64) {
        let page = address & !(PAGE_BYTES - 1);
        match self.huge.iter().find(|(start, end, _)| (*start..*end).contains(&page)) {
            Some((start, _, bytes)) => {
                let first = page - (page - start) % bytes;
                (first, first + bytes)
            }
            None => (page, page.saturating_add(PAGE_BYTES)),
        }
    }

    fn look_around(&mut self, start: u64, end: u64) {
        self.near.push_front((start.saturating_sub(NEAR_BYTES), end.saturating_add(NEAR_BYTES)));
        self.near.truncate(MOST_NEAR);
    }

    /// Takes what is owed of a range off the set.
    fn take(&mut self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let taken: Vec<_> = self.left.overlap(start, end).collect();
        self.left.remove(start, end);
        self.pages -= taken.iter().map(|(s, e)| (e - s) / PAGE_BYTES).sum::<u64>();
        taken
    }

    /// What to push next: around the last requests, or else the lowest of the rest. At most
    /// [`PUSH_BYTES`], or one huge page.
    fn next(&mut self) -> Vec<(u64, u64)> {
        while let Some(&(start, end)) = self.near.front() {
            // Behind the request before ahead of it: most programs go upwards.
            let middle = start + (end - start) / 2;
            let found = self.left.overlap(middle, end).next().or(self.left.overlap(start, middle).next());
            if let Some(found) = found {
                return self.take_some(found);
            }
            self.near.pop_front();
        }
        let first = self.left.iter().next();
        first.map(|run| self.take_some(run)).unwrap_or_default()
    }

    fn take_some(&mut self, run: (u64, u64)) -> Vec<(u64, u64)> {
        let (unit_start, unit_end) = self.unit(run.0);
        if unit_end - unit_start > PAGE_BYTES {
            return self.take(unit_start, unit_end);
        }
        // Scattered pages travel together, as many as one frame holds.
        let mut room = PUSH_BYTES as u64;
        let mut taken = Vec::new();
        let mut at = run.0;
        while room > 0 {
            let Some((start, end)) = self.left.overlap(at, run.0.saturating_add(REACH_BYTES)).next() else {
                break;
            };
            if self.unit(start).1 - self.unit(start).0 > PAGE_BYTES {
                break;
            }
            let end = end.min(start + room);
            room -= end - start;
            taken.extend(self.take(start, end));
            at = end;
        }
        taken
    }
}

/// How far apart the pages of one push may lie: the page table of a frame reaches no further.
const REACH_BYTES: u64 = 65_535 * PAGE_BYTES;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    use crate::pageserver::frame::Frame;
    use crate::pageserver::unpack::{Content, Unpacker};

    /// A store over our own memory: pages with a pattern, and a request in the middle of the push.
    #[test]
    fn each_page_travels_once_and_a_request_moves_the_push() {
        const PAGES: usize = 300;
        let mut memory = vec![0u8; (PAGES + 1) * 4096];
        let base = memory.as_ptr().addr().next_multiple_of(4096);
        let at = base - memory.as_ptr().addr();
        for (i, page) in memory[at..at + PAGES * 4096].chunks_exact_mut(4096).enumerate() {
            page.fill(u8::try_from(i % 251).unwrap());
        }
        let address = |page: usize| (base + page * 4096) as u64;
        let store = Store::open(std::process::id().cast_signed(), Compression::Auto).unwrap();
        let mut owed = Extents::new();
        owed.insert(address(0), address(PAGES));
        owed.remove(address(7), address(9));
        store.owe(owed, vec![]);
        assert_eq!(store.pages_left(), 298);

        let mut seen = vec![0; PAGES];
        let mut order = Vec::new();
        let mut unpacker = Unpacker::default();
        let mut take = |mut bytes: bytes::Bytes| {
            while !bytes.is_empty() {
                let frame = Frame::decode(&mut bytes).unwrap();
                match unpacker.unpack(&frame).unwrap() {
                    Content::Data(pages) => {
                        for (start, contents) in pages.runs() {
                            for (i, page) in contents.chunks_exact(4096).enumerate() {
                                let index = usize::try_from(start).unwrap().wrapping_sub(base) / 4096 + i;
                                assert!(page.iter().all(|b| usize::from(*b) == index % 251));
                                seen[index] += 1;
                                order.push(index);
                            }
                        }
                    }
                    Content::Zero { addr, pages, .. } => {
                        for i in 0..usize::try_from(pages).unwrap() {
                            let index = usize::try_from(addr).unwrap().wrapping_sub(base) / 4096 + i;
                            assert_eq!(index % 251, 0);
                            seen[index] += 1;
                            order.push(index);
                        }
                    }
                    other => panic!("{other:?}"),
                }
            }
            Ok::<(), Infallible>(())
        };
        let mut packer = Store::answering_packer();
        // What was never owed, and what is asked again: nobody's, or under way.
        store.answer(address(8), &mut packer, &mut take).unwrap();
        store.answer(address(200), &mut packer, &mut take).unwrap();
        store.answer(address(200), &mut packer, &mut take).unwrap();
        store.push(&mut take, &|| false).unwrap();
        assert_eq!(order[..2], [200, 201], "the push begins where somebody waits");
        assert_eq!(store.pages_left(), 0);
        let served = store.served();
        assert_eq!((served.asked, served.pushed), (1, 297));
        let unowed = |i: &usize| (7..9).contains(i);
        assert!(seen.iter().enumerate().all(|(i, n)| *n == u32::from(!unowed(&i))), "{seen:?}");
    }

    #[test]
    fn of_a_huge_page_all_goes_at_once() {
        const HUGE: u64 = 2 << 20;
        let mut owed = Owed { huge: vec![(4 * HUGE, 8 * HUGE, HUGE)], ..Owed::default() };
        owed.left.insert(4 * HUGE, 6 * HUGE);
        owed.left.insert(HUGE, HUGE + 8192);
        owed.pages = 1026;
        assert_eq!(owed.unit(5 * HUGE + 4096), (5 * HUGE, 6 * HUGE));
        assert_eq!(owed.next(), [(HUGE, HUGE + 8192)], "small pages do not take a part of a huge one along");
        assert_eq!(owed.next(), [(4 * HUGE, 5 * HUGE)]);
        assert_eq!(owed.next(), [(5 * HUGE, 6 * HUGE)]);
        assert_eq!(owed.next(), []);
        assert_eq!(owed.pages, 0);
    }
}
