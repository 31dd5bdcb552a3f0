//! Which pages are still missing, where they belong, and what the process does to them meanwhile. Pure.
//!
//! A page is named by its *source address*: where it was in the source's memory at the freeze. What the
//! process does afterwards (fork, mremap, munmap) moves the places where the page belongs, never its
//! name. A page of private memory belongs to one address in each address space (*mm*) that misses it; a
//! page of a shared object belongs to the object, once, and is named by the lowest shared mapping that
//! covered it at the freeze.

mod build;
mod events;
mod ops;

use std::collections::BTreeMap;

use super::book::Op;
use super::pieces::{Piece, Pieces};
use crate::engine::extents::Extents;
use crate::engine::memory::PAGE_BYTES;
use events::Motion;

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
    /// What has changed, to be written down.
    ops: Vec<Op>,
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
        let Some((index, offset)) = step.object else {
            self.arrived_at(None, step.mm, step.source + done, len);
            return Vec::new();
        };
        let (from, to) = (offset + done, offset + done + len);
        self.arrived_at(Some(index), step.mm, from, len);
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

impl View {
    fn places(&self) -> bool {
        !matches!(self.backing, Backing::Shared { places: false, .. })
    }
}

fn has(set: &Extents, at: u64) -> bool {
    set.overlap(at, at + 1).next().is_some()
}

#[cfg(test)]
mod tests;
