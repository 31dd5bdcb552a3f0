//! Which pages are still missing, where they belong, and what the process does to them meanwhile. Pure.
//!
//! A page is named by its *source address*: where it was in the source's memory at the freeze. What the
//! process does afterwards (fork, mremap, munmap) moves the places where the page belongs, never its
//! name. A page of private memory belongs to one address in each address space (*mm*) that misses it; a
//! page of a shared object belongs to the object, once, and is named by the lowest shared mapping that
//! covered it at the freeze.

use std::collections::BTreeMap;

use super::pieces::{Piece, Pieces};
use crate::engine::extents::Extents;
use crate::engine::memory::PAGE_BYTES;
use crate::proto::image::{Layout, Vma, VmaKind};

/// An address space: the process itself is 0, then its children by fork.
pub type MmId = u32;

/// The only size of huge pages that is served.
pub const HUGE_BYTES: u64 = 2 << 20;

/// What lies behind a range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backing {
    /// Memory of the mm's own; the piece leads to the source address.
    Private,
    /// A shared object; the piece leads to the offset. A private mapping of it shows its pages, but
    /// cannot be used to place them.
    Shared { object: usize, places: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct View {
    backing: Backing,
    page: u64,
    /// A child finds it empty (MADV_WIPEONFORK).
    wiped: bool,
}

#[derive(Debug, Clone)]
struct Mm {
    /// By address.
    views: Pieces<View>,
    /// Private memory, by source address; leads to the address.
    places: Pieces<()>,
    /// Private pages, by source address.
    missing: Extents,
    motion: Motion,
}

/// What is not certain while events of an mm are unread. Threads change the map one after the other, but
/// tell of it in any order; when no event is due any more, all of this is void.
#[derive(Debug, Clone, Default)]
struct Motion {
    /// Something else has moved to where these were: the event that tells of their leaving is to come.
    displaced: Vec<Piece<View>>,
    /// A moved mapping is reported as unmapped as well, later: by then something else may be there.
    echoes: Vec<(u64, u64)>,
    /// Children that may have been born after a change that is yet to be told.
    children: Vec<MmId>,
}

/// A shared object, as far as mappings at the freeze covered it.
#[derive(Debug)]
struct Object {
    page: u64,
    /// By offset.
    missing: Extents,
    /// By offset; leads to the source address.
    names: Pieces<()>,
}

/// What to do about a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The source must be asked for this page.
    Ask(u64),
    /// It has been asked for, and has not arrived.
    AlreadyAsked(u64),
    /// Nothing is missing there: it is to read as zeros, placed at this address of this mm.
    NotMissing {
        /// Whose mapping to place it by.
        mm: MmId,
        /// Where, at the border of a page.
        address: u64,
        /// Size of the page.
        page: u64,
    },
    /// Not an address that the table knows.
    Unknown,
}

/// Where pages that arrived belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// At an address of an mm.
    Mapped {
        /// Whose.
        mm: MmId,
        /// Where.
        address: u64,
    },
    /// In a shared object, at an offset that nothing maps now.
    Object {
        /// Which.
        object: usize,
        /// Where.
        offset: u64,
    },
}

/// A run of pages to be installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Where.
    pub place: Place,
    /// Their name.
    pub source: u64,
    /// Bytes.
    pub len: u64,
    /// Size of the pages there.
    pub page: u64,
    /// The object and the offset, if they belong to one.
    object: Option<(usize, u64)>,
    mm: MmId,
}

/// Addresses whose waiters must look again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wake {
    /// Of which mm.
    pub mm: MmId,
    /// From here.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// Why a layout cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Pages are missing where no mapping is that could wait for them.
    #[error("pages are missing at {start:#x}-{end:#x}, where they cannot be waited for")]
    Unsupported {
        /// First address.
        start: u64,
        /// First address behind.
        end: u64,
    },
    /// Huge pages of another size, or mappings that do not begin and end with one.
    #[error("the mapping at {0:#x} has pages of a size that is not served")]
    PageSize(u64),
}

/// Pages (of 4 KiB) by what became of them: `initial + inherited = installed + dropped + missing`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Missing at the beginning.
    pub initial: u64,
    /// Missing in children when they were born.
    pub inherited: u64,
    /// Placed.
    pub installed: u64,
    /// Wanted no more: unmapped, dropped, or of an mm that is gone.
    pub dropped: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Table {
    mms: BTreeMap<MmId, Mm>,
    objects: Vec<Object>,
    /// Names of pages of objects: by source address, leads to the offset.
    names: Pieces<usize>,
    /// Source ranges of huge pages.
    huge: Extents,
    asked: Extents,
    counts: Counts,
    next: MmId,
}

/// A mapping that has to be registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registered {
    /// First address.
    pub start: u64,
    /// First address behind.
    pub end: u64,
    /// The object it shows.
    pub object: Option<usize>,
}

impl Table {
    /// The table at the freeze, and the mappings whose missing pages must be reported: all that hold
    /// missing pages, and all of a shared object that misses some. `missing` is rounded out to huge pages
    /// where the mapping has them.
    ///
    /// # Errors
    /// See [`TableError`].
    pub fn new(layout: &Layout, missing: &Extents) -> Result<(Self, Vec<Registered>), TableError> {
        let mut table = Self {
            mms: BTreeMap::new(),
            objects: Vec::new(),
            names: Pieces::new(),
            huge: Extents::new(),
            asked: Extents::new(),
            counts: Counts::default(),
            next: 1,
        };
        let mut unserved = missing.clone();
        let mut mm = Mm {
            views: Pieces::new(),
            places: Pieces::new(),
            missing: Extents::new(),
            motion: Motion::default(),
        };
        let mut registered = Vec::new();
        let mut inodes: BTreeMap<u64, usize> = BTreeMap::new();
        let shared = |vma: &&Vma| is_shared(vma);
        for vma in layout.vmas.iter().filter(shared) {
            let index = *inodes.entry(vma.shm_inode).or_insert_with(|| {
                table.objects.push(Object {
                    page: page_bytes(vma),
                    missing: Extents::new(),
                    names: Pieces::new(),
                });
                table.objects.len() - 1
            });
            check_pages(vma)?;
            let Some(object) = table.objects.get_mut(index) else { continue };
            for (start, end) in rounded(missing, vma) {
                object.missing.insert(vma.offset + (start - vma.start), vma.offset + (end - vma.start));
                unserved.remove(start, end);
            }
            // The lowest mapping gives the name: what is named already stays.
            let mut fresh = Extents::new();
            let end = vma.offset + (vma.end - vma.start);
            fresh.insert(vma.offset, end);
            object.names.overlap(vma.offset, end).for_each(|p| fresh.remove(p.start, p.end));
            for (from, to) in fresh.iter() {
                let source = vma.start + (from - vma.offset);
                object.names.insert(Piece { start: from, end: to, to: source, tag: () });
                table.names.insert(Piece { start: source, end: source + (to - from), to: from, tag: index });
            }
        }
        for vma in &layout.vmas {
            let page = page_bytes(vma);
            let wiped = vma.advice.contains(&libc::MADV_WIPEONFORK.unsigned_abs());
            let object = inodes.get(&vma.shm_inode).filter(|_| vma.shm_inode != 0).copied();
            let lacking = object.and_then(|o| table.objects.get(o)).is_some_and(|o| !o.missing.is_empty());
            let (backing, to) = match (object, vma.kind()) {
                (Some(object), _) if lacking => {
                    let places = vma.kind() != VmaKind::VmaMemfdPrivate;
                    (Backing::Shared { object, places }, vma.offset)
                }
                (None, VmaKind::VmaAnonPrivate) if missing.overlap(vma.start, vma.end).next().is_some() => {
                    check_pages(vma)?;
                    for (start, end) in rounded(missing, vma) {
                        mm.missing.insert(start, end);
                        unserved.remove(start, end);
                    }
                    mm.places.insert(Piece { start: vma.start, end: vma.end, to: vma.start, tag: () });
                    (Backing::Private, vma.start)
                }
                _ => continue,
            };
            if page > PAGE_BYTES {
                table.huge.insert(vma.start, vma.end);
            }
            let tag = View { backing, page, wiped };
            mm.views.insert(Piece { start: vma.start, end: vma.end, to, tag });
            registered.push(Registered { start: vma.start, end: vma.end, object });
        }
        if let Some((start, end)) = unserved.iter().next() {
            return Err(TableError::Unsupported { start, end });
        }
        let objects: u64 = table.objects.iter().map(|o| o.missing.total()).sum();
        table.counts.initial = (mm.missing.total() + objects) / PAGE_BYTES;
        table.mms.insert(0, mm);
        Ok((table, registered))
    }

    /// What to do about a thread that waits at `address`. A page is asked for once.
    pub fn fault(&mut self, mm: MmId, address: u64) -> Fault {
        let Some(view) = self.mms.get(&mm).and_then(|m| m.views.find(address)) else { return Fault::Unknown };
        let page = view.tag.page;
        let address = address & !(page - 1);
        let to = view.target(address.max(view.start));
        let source = match view.tag.backing {
            Backing::Private => self.mms.get(&mm).filter(|m| has(&m.missing, to)).map(|_| to),
            Backing::Shared { object, .. } => self
                .objects
                .get(object)
                .filter(|o| has(&o.missing, to))
                .and_then(|o| o.names.find(to).map(|p| p.target(to))),
        };
        match source {
            Some(source) if has(&self.asked, source) => Fault::AlreadyAsked(source),
            Some(source) => {
                self.asked.insert(source, source + page);
                Fault::Ask(source)
            }
            None => match view.tag.backing {
                Backing::Shared { object, places: false } => {
                    // A private copy of zeros would hide what is written to the object later.
                    let (mm, address) = self.placing(object, to).unwrap_or((mm, address));
                    Fault::NotMissing { mm, address, page }
                }
                _ => Fault::NotMissing { mm, address, page },
            },
        }
    }

    /// A mapping by which this page of an object can be placed.
    fn placing(&self, object: usize, offset: u64) -> Option<(MmId, u64)> {
        self.showing(object, offset, offset + 1).find(|(_, p)| p.tag.places()).map(|(mm, p)| (mm, p.start))
    }

    /// The parts of all mappings that show this part of an object.
    fn showing(&self, object: usize, from: u64, to: u64) -> impl Iterator<Item = (MmId, Piece<View>)> + '_ {
        self.mms.iter().flat_map(move |(&id, mm)| {
            mm.views.iter().filter_map(move |p| {
                let shows = matches!(p.tag.backing, Backing::Shared { object: o, .. } if o == object);
                let (start, end) = (p.to.max(from), (p.to + (p.end - p.start)).min(to));
                (shows && start < end).then(|| {
                    let at = p.start + (start - p.to);
                    (id, Piece { start: at, end: at + (end - start), to: start, tag: p.tag })
                })
            })
        })
    }

    /// Where what is still missing of the source range belongs. Nothing: it is wanted no more.
    pub fn plan(&self, start: u64, end: u64) -> Vec<Step> {
        let mut steps = Vec::new();
        for (&id, mm) in &self.mms {
            for (s, e) in mm.missing.overlap(start, end) {
                for p in mm.places.overlap(s, e) {
                    let page = mm.views.find(p.to).map_or(PAGE_BYTES, |v| v.tag.page);
                    let place = Place::Mapped { mm: id, address: p.to };
                    let (source, len) = (p.start, p.end - p.start);
                    steps.push(Step { place, source, len, page, object: None, mm: id });
                }
            }
        }
        for name in self.names.overlap(start, end) {
            let Some(object) = self.objects.get(name.tag) else { continue };
            for (from, to) in object.missing.overlap(name.to, name.to + (name.end - name.start)) {
                self.plan_object(name.tag, from, to, name.start + (from - name.to), &mut steps);
            }
        }
        steps
    }

    fn plan_object(&self, index: usize, from: u64, to: u64, source: u64, steps: &mut Vec<Step>) {
        let page = self.objects.get(index).map_or(PAGE_BYTES, |o| o.page);
        let mut left = Extents::new();
        left.insert(from, to);
        let mut push = |place, offset: u64, len| {
            let source = source + (offset - from);
            steps.push(Step { place, source, len, page, object: Some((index, offset)), mm: 0 });
        };
        for (mm, p) in self.showing(index, from, to).filter(|(_, p)| p.tag.places()) {
            let parts: Vec<_> = left.overlap(p.to, p.to + (p.end - p.start)).collect();
            for (s, e) in parts {
                push(Place::Mapped { mm, address: p.start + (s - p.to) }, s, e - s);
                left.remove(s, e);
            }
        }
        for (offset, end) in left.iter() {
            push(Place::Object { object: index, offset }, offset, end - offset);
        }
    }

    /// `len` bytes of a step, from `done` on, are in place. Returns who waits for them by another mapping.
    pub fn installed(&mut self, step: &Step, done: u64, len: u64) -> Vec<Wake> {
        let source = step.source + done;
        self.counts.installed += len / PAGE_BYTES;
        let Some((index, offset)) = step.object else {
            if let Some(mm) = self.mms.get_mut(&step.mm) {
                mm.missing.remove(source, source + len);
            }
            return Vec::new();
        };
        let (from, to) = (offset + done, offset + done + len);
        if let Some(object) = self.objects.get_mut(index) {
            object.missing.remove(from, to);
        }
        let at = |w: &Wake| step.place != Place::Mapped { mm: w.mm, address: w.address.wrapping_sub(done) };
        self.showing(index, from, to)
            .map(|(mm, p)| Wake { mm, address: p.start, len: p.end - p.start })
            .filter(at)
            .collect()
    }

    /// The source range has arrived: it may be asked for again if it is missing all the same.
    pub fn arrived(&mut self, start: u64, end: u64) {
        self.asked.remove(start, end);
    }

    /// A child by fork, with the same memory. Pages it does not have either are inherited.
    pub fn fork(&mut self, parent: MmId) -> Option<MmId> {
        let id = self.next;
        self.next += 1;
        let mm = self.mms.get_mut(&parent)?;
        mm.motion.children.push(id);
        let mut child = mm.clone();
        child.motion.echoes.clear();
        child.motion.children.clear();
        let wiped: Vec<_> =
            child.views.iter().filter(|p| p.tag.wiped && p.tag.backing == Backing::Private).collect();
        for p in wiped {
            child.missing.remove(p.to, p.to + (p.end - p.start));
        }
        self.counts.inherited += child.missing.total() / PAGE_BYTES;
        self.mms.insert(id, child);
        Some(id)
    }

    /// Children that may share a move of their parent that is told only now.
    pub fn recent_children(&self, mm: MmId) -> Vec<MmId> {
        self.mms.get(&mm).map(|m| m.motion.children.clone()).unwrap_or_default()
    }

    /// `from..from+len` is at `to` now. What was there has left before, and will be told of. `echo`: an
    /// unmap of the old place follows.
    pub fn remap(&mut self, mm: MmId, from: u64, to: u64, len: u64, echo: bool) {
        let Some(m) = self.mms.get_mut(&mm) else { return };
        let (from_end, to_end) = (from.saturating_add(len), to.saturating_add(len));
        let earlier = m.motion.leave(from, from_end);
        let moving = if earlier.is_empty() { m.views.cut(from, from_end) } else { earlier };
        for p in m.views.cut(to, to_end) {
            m.places.cut_private(&p);
            m.motion.displaced.push(p);
        }
        for p in moving {
            let start = p.start - from + to;
            let end = start + (p.end - p.start);
            if p.tag.backing == Backing::Private {
                m.places.insert(Piece { start: p.to, end: p.to + (p.end - p.start), to: start, tag: () });
            }
            m.views.insert(Piece { start, end, to: p.to, tag: p.tag });
        }
        if echo {
            m.motion.echoes.push((from, from_end));
        }
    }

    /// Whether a page of the range belongs to a mapping of which nobody knows just now where it is; and
    /// whose it is.
    pub fn in_motion(&self, start: u64, end: u64) -> Option<MmId> {
        let within = |p: &Piece<View>| {
            p.tag.backing == Backing::Private && p.to < end && start < p.to + (p.end - p.start)
        };
        self.mms.iter().find(|(_, m)| m.motion.displaced.iter().any(within)).map(|(&id, _)| id)
    }

    /// No event of the mm is due: all that was to be told of it has been.
    pub fn quiet(&mut self, mm: MmId) {
        let Some(m) = self.mms.get_mut(&mm) else { return };
        let motion = std::mem::take(&mut m.motion);
        for p in motion.displaced {
            if p.tag.backing == Backing::Private {
                self.counts.dropped += take(&mut m.missing, p.to, p.to + (p.end - p.start));
            }
        }
    }

    /// A mapping of an object that the table did not know: `start..end` shows it from `offset` on.
    pub fn learn(&mut self, mm: MmId, start: u64, end: u64, object: usize, offset: u64, places: bool) {
        let page = self.objects.get(object).map_or(PAGE_BYTES, |o| o.page);
        let tag = View { backing: Backing::Shared { object, places }, page, wiped: false };
        if let Some(m) = self.mms.get_mut(&mm) {
            m.views.insert(Piece { start, end, to: offset, tag });
        }
    }

    /// The contents of `start..end` are given up; of shared memory only if `hole` says so.
    pub fn remove(&mut self, mm: MmId, start: u64, end: u64, hole: bool) -> Vec<Wake> {
        let Some(m) = self.mms.get_mut(&mm) else { return Vec::new() };
        let mut dropped = 0;
        let mut holes = Vec::new();
        for p in m.views.overlap(start, end) {
            let (from, to) = (p.to, p.to + (p.end - p.start));
            match p.tag.backing {
                Backing::Private => dropped += take(&mut m.missing, from, to),
                Backing::Shared { object, .. } if hole => holes.push((object, from, to)),
                Backing::Shared { .. } => {}
            }
        }
        let mut wakes = Vec::new();
        for (index, from, to) in holes {
            if let Some(object) = self.objects.get_mut(index) {
                dropped += take(&mut object.missing, from, to);
            }
            let showing = self.showing(index, from, to);
            wakes.extend(showing.map(|(mm, p)| Wake { mm, address: p.start, len: p.end - p.start }));
        }
        self.counts.dropped += dropped;
        wakes
    }

    /// An event says that `start..end` is mapped no more.
    pub fn unmap(&mut self, mm: MmId, start: u64, end: u64) {
        let Some(m) = self.mms.get_mut(&mm) else { return };
        if let Some(at) = m.motion.echoes.iter().position(|echo| *echo == (start, end)) {
            m.motion.echoes.remove(at);
            return;
        }
        let mut current = Extents::new();
        current.insert(start, end);
        let mut gone = m.motion.leave(start, end);
        gone.iter().for_each(|p| current.remove(p.start, p.end));
        for (start, end) in current.iter() {
            gone.extend(m.views.cut(start, end));
        }
        self.forget(mm, &gone);
    }

    /// The kernel says that nothing is mapped at `start..end`, and that no event is due.
    pub fn vanished(&mut self, mm: MmId, start: u64, end: u64) {
        if let Some(m) = self.mms.get_mut(&mm) {
            let gone = m.views.cut(start, end);
            self.forget(mm, &gone);
        }
    }

    /// Pieces that are no view any more.
    fn forget(&mut self, mm: MmId, gone: &[Piece<View>]) {
        let Some(m) = self.mms.get_mut(&mm) else { return };
        for p in gone {
            m.places.cut_private(p);
            if p.tag.backing == Backing::Private {
                self.counts.dropped += take(&mut m.missing, p.to, p.to + (p.end - p.start));
            }
        }
        if gone.iter().any(|p| p.tag.backing != Backing::Private) {
            self.forget_unmapped();
        }
    }

    /// The mm is no more: the process has ended or has executed another program.
    pub fn gone(&mut self, mm: MmId) {
        if let Some(m) = self.mms.remove(&mm) {
            self.counts.dropped += m.missing.total() / PAGE_BYTES;
            self.forget_unmapped();
        }
    }

    /// Objects that nobody maps any more are wanted no more.
    fn forget_unmapped(&mut self) {
        for index in 0..self.objects.len() {
            let lacking = self.objects.get(index).is_some_and(|o| !o.missing.is_empty());
            if lacking
                && self.showing(index, 0, u64::MAX).next().is_none()
                && let Some(object) = self.objects.get_mut(index)
            {
                self.counts.dropped += object.missing.total() / PAGE_BYTES;
                object.missing = Extents::new();
            }
        }
    }

    /// All that is missing anywhere, by source address.
    pub fn missing(&self) -> Extents {
        let mut all = Extents::new();
        self.mms.values().flat_map(|m| m.missing.iter()).for_each(|(s, e)| all.insert(s, e));
        for object in &self.objects {
            for (from, to) in object.missing.iter() {
                object.names.overlap(from, to).for_each(|p| all.insert(p.to, p.to + (p.end - p.start)));
            }
        }
        all
    }

    /// What has been asked for and is still missing.
    pub fn asked(&self) -> Extents {
        let missing = self.missing();
        let mut all = Extents::new();
        for (start, end) in self.asked.iter() {
            missing.overlap(start, end).for_each(|(s, e)| all.insert(s, e));
        }
        all
    }

    /// Whether nothing is missing.
    pub fn is_empty(&self) -> bool {
        self.mms.values().all(|m| m.missing.is_empty()) && self.objects.iter().all(|o| o.missing.is_empty())
    }

    /// Whether an object misses pages that this range of the mm shows.
    pub fn shares(&self, mm: MmId, start: u64, end: u64) -> bool {
        self.mms.get(&mm).is_some_and(|m| {
            m.views.overlap(start, end).any(|p| match p.tag.backing {
                Backing::Private => false,
                Backing::Shared { object, .. } => self
                    .objects
                    .get(object)
                    .is_some_and(|o| o.missing.overlap(p.to, p.to + (p.end - p.start)).next().is_some()),
            })
        })
    }

    /// The object and the offset that an address shows.
    pub fn shown(&self, mm: MmId, address: u64) -> Option<(usize, u64, bool)> {
        let view = self.mms.get(&mm)?.views.find(address)?;
        match view.tag.backing {
            Backing::Private => None,
            Backing::Shared { object, places } => Some((object, view.target(address), places)),
        }
    }

    /// Size of the page with this name, and the end of the range around it that has such pages.
    pub fn unit(&self, source: u64, end: u64) -> (u64, u64) {
        match self.huge.overlap(source, end).next() {
            Some((s, e)) if s == source => (HUGE_BYTES, e),
            Some((s, _)) => (PAGE_BYTES, s),
            None => (PAGE_BYTES, end),
        }
    }

    /// The mms there are.
    pub fn mms(&self) -> Vec<MmId> {
        self.mms.keys().copied().collect()
    }

    /// See [`Counts`].
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

impl Pieces<()> {
    /// The place of a private view is no more.
    fn cut_private(&mut self, view: &Piece<View>) {
        if view.tag.backing == Backing::Private {
            self.cut(view.to, view.to + (view.end - view.start));
        }
    }
}

impl Motion {
    /// Takes out what was displaced from `start..end` the longest time ago.
    fn leave(&mut self, start: u64, end: u64) -> Vec<Piece<View>> {
        let mut taken: Vec<Piece<View>> = Vec::new();
        let mut kept = Vec::new();
        for p in self.displaced.drain(..) {
            let twice = taken.iter().any(|t| t.start < p.end && p.start < t.end);
            if twice || p.end <= start || end <= p.start {
                kept.push(p);
                continue;
            }
            taken.push(p.clip(start, end));
            kept.extend([p.clip(0, start), p.clip(end, u64::MAX)].into_iter().filter(|r| r.start < r.end));
        }
        self.displaced = kept;
        taken
    }
}

impl View {
    fn places(&self) -> bool {
        !matches!(self.backing, Backing::Shared { places: false, .. })
    }
}

fn has(set: &Extents, at: u64) -> bool {
    set.overlap(at, at + 1).next().is_some()
}

/// Takes a range out and returns how many pages of it were in.
fn take(set: &mut Extents, start: u64, end: u64) -> u64 {
    let pages = set.overlap(start, end).map(|(s, e)| e - s).sum::<u64>() / PAGE_BYTES;
    set.remove(start, end);
    pages
}

fn is_shared(vma: &Vma) -> bool {
    vma.shm_inode != 0
        && matches!(vma.kind(), VmaKind::VmaAnonShared | VmaKind::VmaMemfdShared | VmaKind::VmaSysv)
}

fn page_bytes(vma: &Vma) -> u64 {
    if vma.page_bytes == 0 { PAGE_BYTES } else { vma.page_bytes }
}

fn check_pages(vma: &Vma) -> Result<(), TableError> {
    let page = page_bytes(vma);
    let known = page == PAGE_BYTES || page == HUGE_BYTES;
    let fits = known && [vma.start, vma.end, vma.offset].iter().all(|at| at.is_multiple_of(page));
    if fits { Ok(()) } else { Err(TableError::PageSize(vma.start)) }
}

/// What is missing of a mapping, in whole pages of it.
fn rounded(missing: &Extents, vma: &Vma) -> Vec<(u64, u64)> {
    let page = page_bytes(vma);
    missing
        .overlap(vma.start, vma.end)
        .map(|(s, e)| (s & !(page - 1), e.next_multiple_of(page).min(vma.end)))
        .collect()
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
