//! Which pages of the objects are to be read again: from what the tracker saw written through mappings,
//! and from what the objects tell themselves.

use std::collections::BTreeMap;

use super::book::ObjectBook;
use super::sums::Sums;
use super::{by_window, window_range};
use crate::engine::extents::Extents;
use crate::engine::memory::{Memory, PAGE_BYTES};
use crate::engine::sys::vm::RemoteRange;
use crate::proto::image::Layout;

/// Written pages by the kind of their addresses.
#[derive(Debug, Default)]
pub struct Selected {
    /// Of mappings: what was reported and is not of an object.
    pub mapped: Vec<RemoteRange>,
    /// Of windows: written through mappings.
    pub windows: Extents,
    /// Of windows: perhaps changed by calls.
    pub suspects: Extents,
}

impl ObjectBook {
    /// Sorts what was written, after a look at the objects and a scan of the mappings. Objects that may have
    /// been changed otherwise than by reported stores are suspected as a whole. Their times tell, although
    /// stores to protected pages move those too: since the look before, or, at the `last` look, at any time
    /// since [`ObjectBook::start`]. (A write(2) sets the object's times first and copies then: a look in
    /// between, and the page read before the copy, would leave nothing to notice at the next look. But at
    /// the start and at the end no call is under way.)
    ///
    /// An object that only mappings reach, each page by one, can only be changed through them; so where stores
    /// were reported, they are what its times tell of.
    pub fn select(&mut self, layout: &Layout, runs: Vec<RemoteRange>, last: bool) -> Selected {
        let mut selected = Selected::default();
        let mut written: BTreeMap<u64, Extents> = BTreeMap::new();
        for run in runs {
            let i = layout.vmas.partition_point(|v| v.end <= run.start);
            match layout.vmas.get(i).filter(|v| v.start <= run.start && by_window(v)) {
                None => selected.mapped.push(run),
                Some(vma) => {
                    let Some(held) = self.held.get_mut(&vma.shm_inode) else { continue };
                    // Of what is new in the page tables everything is reported, stored or not.
                    held.was_stored |= !vma.fresh;
                    let from = held.image.window + vma.offset + (run.start - vma.start);
                    let to = (from + run.len as u64).min(window_range(&held.image).1);
                    written.entry(vma.shm_inode).or_default().insert(from, to);
                }
            }
        }
        for (id, held) in &mut self.held {
            held.note_views(layout, *id);
            let reference = if last { held.baseline } else { held.before };
            let written = written.remove(id).unwrap_or_default();
            // Between rounds, only where there is a descriptor to change it by; in the end, all. What is
            // new is sent as a whole in any case.
            let asked = if last { !held.is_changed_by_stores_only() } else { held.is_open };
            let changed = reference != Some(held.now) && (asked || held.before.is_none());
            // Of huge pages the times tell nothing, and a page that was written and is not mapped any more
            // (munmap, MADV_DONTNEED) is not reported.
            let changed = changed || last && held.image.page_bytes != 0;
            let new = held.before.is_none();
            held.before = Some(held.now);
            let mut doubtful = written.clone();
            if changed {
                let (start, end) = window_range(&held.image);
                doubtful.insert(start, end);
            }
            if doubtful.is_empty() {
                continue;
            }
            let data = Self::data(held, &doubtful);
            doubtful.iter().for_each(|(s, e)| held.holes.insert(s, e));
            for (start, end) in data.iter() {
                held.holes.remove(start, end);
                if changed && !new {
                    selected.suspects.insert(start, end);
                    written.overlap(start, end).for_each(|(s, e)| selected.windows.insert(s, e));
                } else {
                    selected.windows.insert(start, end);
                }
            }
        }
        selected
    }

    /// Pages that were sent and are holes now.
    pub fn gone(&self, sent: &Extents) -> Vec<(u64, u64)> {
        let mut gone = Extents::new();
        for held in self.held.values().filter(|h| h.image.page_bytes == 0) {
            for (start, end) in held.holes.iter() {
                sent.overlap(start, end).for_each(|(s, e)| gone.insert(s, e));
            }
        }
        gone.iter().collect()
    }

    /// Huge pages of private mappings of the stopped process that were sent and have been dropped since, and
    /// are there again (MADV_DONTNEED, and a read). Such a page is full of zeros, and the kernel reports it
    /// as neither written nor gone: so one of its small pages is looked at that held something else.
    pub fn dropped_huge(layout: &Layout, sent: &Extents, sums: &Sums, memory: &Memory) -> Extents {
        let mut dropped = Extents::new();
        let mut page = vec![0; usize::try_from(PAGE_BYTES).unwrap_or(4096)];
        for vma in layout.vmas.iter().filter(|v| v.page_bytes != 0 && !by_window(v)) {
            let (start, end, unit) = (vma.start, vma.end, vma.page_bytes);
            let mut at = start;
            while at < end {
                let Some((first, _)) = sent.overlap(at, end).next() else { break };
                at = first - (first - start) % unit;
                if let Some(witness) = sums.witness(at, at + unit) {
                    let there = memory.read_exact(witness, &mut page).is_ok();
                    if !there || !sums.matches(witness, &page) {
                        dropped.insert(at, at + unit);
                    }
                }
                at += unit;
            }
        }
        dropped
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::engine::remote::Tid;
    use crate::engine::state::objects::find::flags_of;
    use crate::engine::trial::{Killed, until};
    use crate::proto::image::Vma;

    /// A memfd of ours, as an object of this very process.
    fn book(name: &str, page_bytes: u64, size: u64) -> (File, ObjectBook, Memory) {
        let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | flags_of(page_bytes)).unwrap());
        file.set_len(size).unwrap();
        let pid = Tid::try_from(std::process::id()).unwrap();
        (file, ObjectBook::new(pid), Memory::open(pid).unwrap())
    }

    /// Looks, and selects of the object of that name; its window is from the answer.
    fn look(book: &mut ObjectBook, name: &str, last: bool) -> (u64, Vec<(u64, u64)>) {
        let mut layout = Layout::default();
        book.look(&mut layout, true).unwrap();
        let window = layout.objects.iter().find(|o| o.name == name.as_bytes()).unwrap().window;
        let selected = book.select(&layout, Vec::new(), last);
        let mut windows = selected.suspects;
        selected.windows.iter().for_each(|(s, e)| windows.insert(s, e));
        let of_it = windows.overlap(window, window + (1 << 30)).map(|(s, e)| (s - window, e - window));
        (window, of_it.collect())
    }

    #[test]
    fn what_calls_change_is_selected_and_holes_are_not() {
        let (file, mut book, _) = book("select-calls", 0, 1 << 20);
        file.write_all_at(&[1; 8192], 0x4000).unwrap();
        // Its change must not be of just now, or it counts as changed at the last look in any case.
        let changed = || std::os::unix::fs::MetadataExt::ctime_nsec(&file.metadata().unwrap());
        let ours =
            |held: &super::super::book::Held| held.image.name == b"select-calls" && held.baseline.is_some();
        let settled = |book: &ObjectBook| book.held.values().any(ours);
        let before = changed();
        until("that it settles", || {
            book.start(&mut Layout::default()).unwrap();
            settled(&book)
        });
        assert_eq!(changed(), before);
        assert_eq!(look(&mut book, "select-calls", false).1, [(0x4000, 0x6000)], "new: all there is");
        assert_eq!(look(&mut book, "select-calls", false).1, [], "nothing changed");
        assert_eq!(look(&mut book, "select-calls", true).1, [], "nothing changed since the start");
        file.write_all_at(&[2; 100], 0x8001).unwrap();
        let both = [(0x4000, 0x6000), (0x8000, 0x9000)];
        assert_eq!(look(&mut book, "select-calls", false).1, both);
        assert_eq!(look(&mut book, "select-calls", false).1, [], "nothing changed since that look");
        assert_eq!(look(&mut book, "select-calls", true).1, both, "changed at some time since the start");
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file.as_fd(), hole, 0x5000, 0x1000).unwrap();
        let (window, _) = look(&mut book, "select-calls", true);
        let mut sent = Extents::new();
        sent.insert(window + 0x4000, window + 0x6000);
        assert_eq!(book.gone(&sent), [(window + 0x5000, window + 0x6000)]);
    }

    #[test]
    fn what_is_written_through_a_mapping_goes_by_the_window() {
        let (file, mut book, _) = book("select-mapped", 0, 0x8000);
        file.write_all_at(&[1; 0x6000], 0x1000).unwrap();
        let mut layout = Layout::default();
        book.look(&mut layout, true).unwrap();
        let object = layout.objects.iter().find(|o| o.name == b"select-mapped").unwrap();
        let (id, window) = (object.id, object.window);
        let kind = crate::proto::image::VmaKind::VmaMemfdShared.into();
        let vma = Vma { start: 0x10000, end: 0x14000, offset: 0x5000, kind, shm_inode: id, ..Vma::default() };
        let private = Vma { start: 0x20000, end: 0x24000, ..Vma::default() };
        layout.vmas = vec![vma, private];
        book.select(&layout, Vec::new(), false);
        // The pages with the offsets 5 to 8, of which 7 is a hole and 8 is behind the end.
        let runs = [(0x10000, 0x4000), (0x21000, 0x1000)].map(|(start, len)| RemoteRange { start, len });
        let selected = book.select(&layout, runs.to_vec(), false);
        assert_eq!(selected.mapped, [RemoteRange { start: 0x21000, len: 0x1000 }]);
        assert!(selected.suspects.overlap(window, window + 0x8000).next().is_none());
        let found: Vec<_> = selected.windows.overlap(window, window + 0x10000).collect();
        assert_eq!(found, [(window + 0x5000, window + 0x7000)]);
    }

    #[test]
    fn a_huge_page_that_was_dropped_and_is_there_again_is_found() {
        // Pages of ours stand for a huge page of two of them.
        let mut pages = vec![0u64; 4 * 512];
        let start = (pages.as_ptr().addr() as u64).next_multiple_of(8192);
        let at = usize::try_from(start - pages.as_ptr().addr() as u64).unwrap() / 8;
        let memory = Memory::open(Tid::try_from(std::process::id()).unwrap()).unwrap();
        let vma = Vma { start, end: start + 8192, page_bytes: 8192, ..Vma::default() };
        let layout = Layout { vmas: vec![vma], ..Layout::default() };
        pages[at + 512] = 7;
        let mut sums = Sums::default();
        let mut sent = Extents::new();
        sent.insert(start, start + 8192);
        let mut page = [0; 4096];
        for address in [start, start + 4096] {
            memory.read_exact(address, &mut page).unwrap();
            sums.record(address, &page);
        }
        assert!(ObjectBook::dropped_huge(&layout, &sent, &sums, &memory).is_empty());
        pages[at + 512] = 0;
        let dropped = ObjectBook::dropped_huge(&layout, &sent, &sums, &memory);
        assert_eq!(dropped.iter().collect::<Vec<_>>(), [(start, start + 8192)]);
        assert!(ObjectBook::dropped_huge(&layout, &Extents::new(), &sums, &memory).is_empty());
    }

    #[test]
    fn huge_pages_are_all_read_in_the_end() {
        const HUGE: u64 = 2 << 20;
        if crate::engine::state::objects::huge::sizes().is_empty() {
            return;
        }
        let (_file, mut book, _) = book("select-huge", HUGE, HUGE);
        look(&mut book, "select-huge", false);
        assert_eq!(look(&mut book, "select-huge", false).1, []);
        assert_eq!(look(&mut book, "select-huge", true).1, [(0, HUGE)]);
    }

    /// A segment tells when it was attached: what was stored through an attachment that is gone again is read at
    /// the last look, although stores were reported that its times could tell of.
    #[test]
    fn a_segment_that_was_attached_meanwhile_is_suspected() {
        use std::io::{BufRead, BufReader, Write};
        use std::process::{Command, Stdio};
        let code = "
import ctypes
l = ctypes.CDLL(None); l.shmat.restype = ctypes.c_void_p; l.shmdt.argtypes = [ctypes.c_void_p]
id = l.shmget(0, 0x4000, 0o600)
a = l.shmat(id, None, 0); l.shmctl(id, 0, None)
ctypes.memset(a, 1, 0x4000); print(hex(a), flush=True); input()
ctypes.memset(a, 2, 1); print(flush=True); input()
b = l.shmat(id, None, 0); ctypes.memset(b + 0x3000, 2, 1); l.shmdt(b); print(flush=True); input()";
        let mut python = Command::new("python3");
        let mut child = Killed::spawn(python.args(["-c", code]).stdin(Stdio::piped()).stdout(Stdio::piped()));
        let (mut to, mut from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        let start = u64::from_str_radix(line.trim().trim_start_matches("0x"), 16).unwrap();
        let pid = child.pid();
        let layout = |book: &mut ObjectBook| {
            let flags = crate::engine::state::mm::FlagCache::look(pid).unwrap();
            let mut layout = crate::engine::state::mm::capture(pid, &flags).unwrap().layout;
            assert_eq!(book.look(&mut layout, false).unwrap(), []);
            layout
        };
        let mut book = ObjectBook::new(pid);
        let now = layout(&mut book);
        book.start(&mut now.clone()).unwrap();
        let window = now.objects[0].window;
        book.select(&now, vec![RemoteRange { start, len: 0x4000 }], false);
        // Long ago, as far as its times can tell.
        let held = book.held.values_mut().next().unwrap();
        (held.baseline, held.seen_at) = (Some(held.now), held.now.attached[0] + 2);
        let mut go_on = || {
            to.write_all(b"\n").unwrap();
            from.read_line(&mut line).unwrap();
        };
        go_on();
        let stored = vec![RemoteRange { start, len: 0x1000 }];
        let now = layout(&mut book);
        let selected = book.select(&now, stored.clone(), true);
        assert!(selected.suspects.is_empty() && !selected.windows.is_empty());
        let later = book.held.values().next().unwrap().seen_at;
        until("a later second", || super::super::book::since_epoch().as_secs() >= later);
        go_on();
        let now = layout(&mut book);
        let selected = book.select(&now, stored, true);
        assert_eq!(selected.suspects.iter().collect::<Vec<_>>(), [(window, window + 0x4000)]);
    }
}
