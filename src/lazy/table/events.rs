//! What the process does to its memory while pages are missing.

use super::{Backing, MmId, PAGE_BYTES, Table, View, Wake};
use crate::engine::extents::Extents;
use crate::lazy::book::Op;
use crate::lazy::pieces::{Piece, Pieces};

/// What is not certain while events of an mm are unread. Threads change the map one after the other, but
/// tell of it in any order; when no event is due any more, all of this is void.
#[derive(Debug, Clone, Default)]
pub(super) struct Motion {
    /// Something else has moved to where these were: the event that tells of their leaving is to come.
    displaced: Vec<Piece<View>>,
    /// A moved mapping is reported as unmapped as well, later: by then something else may be there.
    echoes: Vec<(u64, u64)>,
    /// Children that may have been born after a change that is yet to be told.
    children: Vec<MmId>,
}

impl Table {
    /// A child by fork, with the same memory. Pages it does not have either are inherited.
    pub fn fork(&mut self, parent: MmId) -> Option<MmId> {
        self.ops.push(Op::Fork { parent });
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
        self.ops.push(Op::Remap { mm, from, to, len, echo });
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
        if m.motion.is_void() {
            return;
        }
        self.ops.push(Op::Quiet { mm });
        let motion = std::mem::take(&mut m.motion);
        for p in motion.displaced {
            if p.tag.backing == Backing::Private {
                self.counts.dropped += take(&mut m.missing, p.to, p.to + (p.end - p.start));
            }
        }
    }

    /// A mapping of an object that the table did not know: `start..end` shows it from `offset` on.
    pub fn learn(&mut self, mm: MmId, start: u64, end: u64, object: usize, offset: u64, places: bool) {
        self.ops.push(Op::Learn { mm, start, end, object, offset, places });
        let page = self.objects.get(object).map_or(PAGE_BYTES, |o| o.page);
        let tag = View { backing: Backing::Shared { object, places }, page, wiped: false };
        if let Some(m) = self.mms.get_mut(&mm) {
            m.views.insert(Piece { start, end, to: offset, tag });
        }
    }

    /// The contents of `start..end` are given up; of shared memory only if `hole` says so.
    pub fn remove(&mut self, mm: MmId, start: u64, end: u64, hole: bool) -> Vec<Wake> {
        self.ops.push(Op::Remove { mm, start, end, hole });
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
        self.ops.push(Op::Unmap { mm, start, end });
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
        self.ops.push(Op::Vanished { mm, start, end });
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
        self.ops.push(Op::Gone { mm });
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
    fn is_void(&self) -> bool {
        self.displaced.is_empty() && self.echoes.is_empty() && self.children.is_empty()
    }

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

/// Takes a range out and returns how many pages of it were in.
fn take(set: &mut Extents, start: u64, end: u64) -> u64 {
    let pages = set.overlap(start, end).map(|(s, e)| e - s).sum::<u64>() / PAGE_BYTES;
    set.remove(start, end);
    pages
}
