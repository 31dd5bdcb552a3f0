//! Tracking of shared memory: what is stored is reported and nothing else, and so is what was given up.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use migrate::engine::dirty::{Tracker, UffdTracker};
use migrate::engine::extents::Extents;
use migrate::engine::freeze::Frozen;
use migrate::engine::state::mm::{self, FlagCache};
use migrate::proto::image::{Layout, VmaKind};

const PAGE: u64 = 4096;
const NONE: [u64; 0] = [];

/// A Python program that has 64 pages of shared anonymous memory, and does with them what it is told:
/// `s PAGE` stores, `r PAGE COUNT` gives up and reads again, `v PAGE` stores through a second mapping, `d PAGE` stores, and
/// takes away with a second mapping what tells of it.
const PROGRAM: &str = r#"
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
P = 4096
m = mmap.mmap(-1, 64 * P)
m.write(b'x' * 64 * P)
at = ctypes.addressof(ctypes.c_char.from_buffer(m))
print(at, flush=True)
for line in sys.stdin:
    word, page, *more = line.split()
    page = int(page)
    if word == 's':
        m[page * P] = 1
    elif word == 'r':
        count = int(more[0])
        m.madvise(mmap.MADV_REMOVE, page * P, count * P)
        assert all(m[i * P] == 0 for i in range(page, page + count))
    elif word == 'd':
        m[page * P] = 3
        twin = libc.mremap(at, 64 * P, 64 * P, 1 | 4, None)
        assert twin != at and libc.munmap(twin, 64 * P) == 0
    else:
        twin = libc.mremap(at, 0, 64 * P, 1, None)
        ctypes.c_char.from_address(twin + page * P).value = b'\2'
        libc.munmap(twin, 64 * P)
    print('done', flush=True)
"#;

struct Target {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
    at: u64,
    pages: u64,
}

impl Target {
    /// A program that says where so many pages are.
    fn running(program: &str, pages: u64) -> Self {
        let mut command = Command::new("python3");
        command.args(["-c", program]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        Self { child, out, at: line.trim().parse().unwrap(), pages }
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{what}").unwrap();
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        assert_eq!(line, "done\n");
    }

    fn freeze(&self) -> Frozen {
        Frozen::freeze(self.pid(), Duration::from_secs(5)).unwrap()
    }

    /// The pages of the area among addresses.
    fn pages(&self, ranges: impl Iterator<Item = (u64, u64)>) -> Vec<u64> {
        let end = self.at + self.pages * PAGE;
        ranges
            .map(|(from, to)| (from.max(self.at), to.min(end)))
            .flat_map(|(from, to)| (from..to).step_by(4096))
            .map(|address| (address - self.at) / PAGE)
            .collect()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        super::end(&mut self.child);
    }
}

fn layout(pid: i32, before: &Layout) -> Layout {
    let mut layout = mm::capture(pid, &FlagCache::default()).unwrap().layout;
    layout.vmas.retain(|v| v.kind() == VmaKind::VmaAnonShared);
    mm::mark_replaced(&mut layout, before);
    layout
}

#[test]
fn of_shared_memory_what_was_stored_or_given_up_is_reported_and_no_more() {
    let mut target = Target::running(PROGRAM, 64);
    let mut frozen = target.freeze();
    let mut tracker = UffdTracker::start(&mut frozen).unwrap();
    frozen.thaw().unwrap();
    let mut before = Layout::default();
    let mut scan = |target: &Target| {
        let mut layout = layout(target.pid(), &before);
        let runs = tracker.scan(&mut layout).unwrap();
        before = layout;
        target.pages(runs.iter().map(|r| (r.start, r.start + r.len as u64)))
    };
    assert_eq!(scan(&target), (0..64).collect::<Vec<_>>(), "at first, all");
    assert_eq!(scan(&target), NONE);
    // Its times change with that; it is not sent as a whole for it.
    target.tell("s 7");
    assert_eq!(scan(&target), [7]);
    assert_eq!(scan(&target), NONE);
    target.tell("r 20 4");
    target.tell("s 9");
    assert_eq!(scan(&target), [9, 20, 21, 22, 23]);
    // What was read for the round before may be older than the removal.
    assert_eq!(scan(&target), [20, 21, 22, 23]);
    assert_eq!(scan(&target), NONE);
    assert_eq!(scan(&target), NONE);
    // Through a mapping that is gone again, no scan reports it; nor do the times tell, where it was stored besides.
    for words in ["v 40", "d 40"] {
        target.tell(words);
        target.tell("s 50");
        assert_eq!(scan(&target), (0..64).collect::<Vec<_>>(), "{words}");
        // The second mapping may have been there after the map was read, and stored to after the scan.
        assert_eq!(scan(&target), (0..64).collect::<Vec<_>>(), "{words}");
        assert_eq!(scan(&target), NONE, "{words}");
    }
    target.tell("s 30");

    let frozen = target.freeze();
    let mut sent = Extents::new();
    sent.insert(target.at, target.at + 64 * PAGE);
    let mut last = layout(target.pid(), &before);
    let found = tracker.final_scan(&mut last, &sent).unwrap();
    let written = target.pages(found.written.iter().map(|r| (r.start, r.start + r.len as u64)));
    assert_eq!(written, [20, 21, 22, 23, 30], "what was given up at any time once more");
    assert_eq!(target.pages(found.gone.into_iter()), NONE);
    drop(tracker);
    frozen.thaw().unwrap();
    // The process has nothing of it left: this would wait for ever.
    target.tell("r 1 2");
}

/// A Python program that has 4 pages of private memory, and moves the upper two away (`a`) and back (`b`), or
/// stores to one (`s PAGE`).
const MOVER: &str = r#"
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
P = 4096
hole = libc.mmap(None, 64 * P, 0, 0x22, -1, 0)
at, away = hole + 8 * P, hole + 32 * P
libc.mprotect(at, 4 * P, 3)
for i in range(4): ctypes.c_char.from_address(at + i * P).value = b'x'
print(at, flush=True)
for line in sys.stdin:
    word, *page = line.split()
    if word == 's':
        ctypes.c_char.from_address(at + int(page[0]) * P).value = b'y'
    else:
        frm, to = (at + 2 * P, away) if word == 'a' else (away, at + 2 * P)
        assert libc.mremap(frm, 2 * P, 2 * P, 3, to) == to
    print('done', flush=True)
"#;

/// The kernel joins a tracked mapping that comes back with its tracked neighbour, and tracks neither from then
/// on, but leaves the marks of protection in the neighbour's page table. Stores meanwhile make its pages
/// writable under these marks: they must not count as protected.
#[test]
fn of_a_mapping_whose_neighbour_came_back_stores_are_reported() {
    let mut target = Target::running(MOVER, 4);
    let mut frozen = target.freeze();
    let mut tracker = UffdTracker::start(&mut frozen).unwrap();
    frozen.thaw().unwrap();
    let mut before = Layout::default();
    let mut scan = |target: &Target| {
        let mut layout = mm::capture(target.pid(), &FlagCache::default()).unwrap().layout;
        layout.vmas.retain(|v| v.kind() == VmaKind::VmaAnonPrivate);
        mm::mark_replaced(&mut layout, &before);
        let runs = tracker.scan(&mut layout).unwrap();
        before = layout;
        target.pages(runs.iter().map(|r| (r.start, r.start + r.len as u64)))
    };
    assert_eq!(scan(&target), [0, 1, 2, 3]);
    target.tell("a");
    assert_eq!(scan(&target), NONE);
    target.tell("b");
    target.tell("s 0");
    assert_eq!(scan(&target), [0, 1, 2, 3], "all of it starts over");
    target.tell("s 0");
    assert_eq!(scan(&target), [0]);
}

/// A Python program with 4 pages that may be dropped, or of ordinary memory where the kernel knows no such thing, and
/// in whose place it maps ordinary memory.
const CHANGER: &str = r#"
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
P = 4096
hole = libc.mmap(None, 64 * P, 0, 0x22, -1, 0)
at = hole + 8 * P
droppable = libc.mmap(at, 4 * P, 3, 0x38, -1, 0) == at
assert droppable or libc.mmap(at, 4 * P, 3, 0x32, -1, 0) == at
def fill():
    for i in range(4): ctypes.c_char.from_address(at + i * P).value = b'x'
fill()
print(at, flush=True)
for line in sys.stdin:
    assert libc.mmap(at, 4 * P, 3, 0x32, -1, 0) == at
    fill()
    print('done', flush=True)
"#;

/// Flags are from a look before the freeze: memory that could be dropped then may be ordinary memory by now.
#[test]
fn ordinary_memory_in_the_place_of_droppable_memory_is_sent() {
    let mut target = Target::running(CHANGER, 4);
    let mut frozen = target.freeze();
    let mut tracker = UffdTracker::start(&mut frozen).unwrap();
    frozen.thaw().unwrap();
    let flags = FlagCache::look(target.pid()).unwrap();
    let mut last = |target: &Target, before: &Layout| {
        let frozen = target.freeze();
        let mut layout = mm::capture(target.pid(), &flags).unwrap().layout;
        mm::mark_replaced(&mut layout, before);
        let vma = |layout: &Layout| layout.vmas.iter().find(|v| v.start == target.at).cloned().unwrap();
        let kind = |layout: &Layout| Some(vma(layout).kind());
        let looked = kind(&layout);
        let found = tracker.final_scan(&mut layout, &Extents::new()).unwrap();
        frozen.thaw().unwrap();
        let written = target.pages(found.written.iter().map(|r| (r.start, r.start + r.len as u64)));
        if kind(&layout) != Some(VmaKind::VmaDroppable) {
            assert!(vma(&layout).advice.is_empty() && !vma(&layout).noreserve);
        }
        (looked, kind(&layout), written, layout)
    };
    let (looked, kind, written, before) = last(&target, &Layout::default());
    let droppable = Some(VmaKind::VmaDroppable);
    if looked == droppable {
        assert_eq!((kind, written), (droppable, vec![]));
    }
    target.tell("replace");
    let (again, kind, written, _) = last(&target, &before);
    assert_eq!((again, kind, written), (looked, Some(VmaKind::VmaAnonPrivate), vec![0, 1, 2, 3]));
}

/// A Python program with 64 MiB of memory of its own, all written, that does with its pages what it is told: `s PAGE` stores,
/// `d PAGE COUNT` drops, `r PAGE COUNT` drops and reads, `g PAGE COUNT` guards, `t PAGE COUNT` drops and stores.
const LARGE: &str = r#"
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
P = 4096
m = mmap.mmap(-1, 16384 * P, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
at = ctypes.addressof(ctypes.c_char.from_buffer(m))
libc.madvise(at, 16384 * P, 15)
for i in range(16384 - 100):
    m[i * P] = 1
print(at, flush=True)
for line in sys.stdin:
    word, page, *more = line.split()
    page, count = int(page), int(more[0]) if more else 1
    if word != 's':
        assert libc.madvise(at + page * P, count * P, 102 if word == 'g' else 4) == 0
    for i in range(page, page + count):
        if word in 'st':
            m[i * P] = 2
        if word == 'r':
            assert m[i * P] == 0
    print('done', flush=True)
"#;

#[test]
fn of_large_memory_the_last_look_finds_what_is_written_dropped_and_guarded() {
    let mut target = Target::running(LARGE, 16384);
    let mut frozen = target.freeze();
    let mut tracker = UffdTracker::start(&mut frozen).unwrap();
    frozen.thaw().unwrap();
    let look = |target: &Target, before: &Layout| {
        let mut layout = mm::capture(target.pid(), &FlagCache::default()).unwrap().layout;
        layout.vmas.retain(|v| v.start <= target.at && target.at < v.end);
        mm::mark_replaced(&mut layout, before);
        layout
    };
    let mut before = look(&target, &Layout::default());
    let runs = tracker.scan(&mut before).unwrap();
    let mut sent = Extents::new();
    runs.iter().for_each(|r| sent.insert(r.start, r.start + r.len as u64));
    assert!(sent.total() >= (16384 - 100) * PAGE);

    let mut written = vec![3, 700, 701, 5000, 16300, 16383];
    written.iter().for_each(|page| target.tell(&format!("s {page}")));
    for what in ["d 100 3", "d 9000 1", "g 200 2", "g 16350 1", "t 300 2", "r 400 2"] {
        target.tell(what);
    }
    written.extend([300, 301, 400, 401]);
    written.sort_unstable();

    let frozen = target.freeze();
    let mut layout = look(&target, &before);
    let last = tracker.final_scan(&mut layout, &sent).unwrap();
    assert!(layout.vmas.iter().all(|v| !v.fresh));
    let found = last.written.iter().map(|r| (r.start, r.start + r.len as u64));
    assert_eq!(target.pages(found), written);
    let guards = last.guards.iter().map(|r| (r.start, r.end));
    assert_eq!(target.pages(guards), [200, 201, 16350]);
    let mut gone = target.pages(last.gone.iter().copied());
    gone.sort_unstable();
    assert_eq!(gone, [100, 101, 102, 200, 201, 9000]);
    frozen.thaw().unwrap();
}
