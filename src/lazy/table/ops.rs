//! Each change of the table is noted for the book, by which it can be made again.

use super::{MmId, PAGE_BYTES, Table};
use crate::lazy::book::Op;

impl Table {
    /// Pages that are in place: by source address of an mm, or by offset of an object.
    pub(super) fn arrived_at(&mut self, object: Option<usize>, mm: MmId, at: u64, len: u64) {
        self.counts.installed += len / PAGE_BYTES;
        match (object, self.ops.last_mut()) {
            (o, Some(Op::Installed { object, mm: m, at: a, len: l }))
                if (o, mm, at) == (*object, *m, *a + *l) =>
            {
                *l += len;
            }
            _ => self.ops.push(Op::Installed { object, mm, at, len }),
        }
        let missing = match object {
            Some(object) => self.objects.get_mut(object).map(|o| &mut o.missing),
            None => self.mms.get_mut(&mm).map(|m| &mut m.missing),
        };
        if let Some(missing) = missing {
            missing.remove(at, at + len);
        }
    }

    /// What has changed since the last time.
    pub fn take_ops(&mut self) -> Vec<Op> {
        std::mem::take(&mut self.ops)
    }

    /// Makes a change again.
    pub fn apply(&mut self, op: &Op) {
        match *op {
            Op::Installed { object, mm, at, len } => self.arrived_at(object, mm, at, len),
            Op::Fork { parent } => drop(self.fork(parent)),
            Op::Remap { mm, from, to, len, echo } => self.remap(mm, from, to, len, echo),
            Op::Quiet { mm } => self.quiet(mm),
            Op::Learn { mm, start, end, object, offset, places } => {
                self.learn(mm, start, end, object, offset, places);
            }
            Op::Remove { mm, start, end, hole } => drop(self.remove(mm, start, end, hole)),
            Op::Unmap { mm, start, end } => self.unmap(mm, start, end),
            Op::Vanished { mm, start, end } => self.vanished(mm, start, end),
            Op::Gone { mm } => self.gone(mm),
        }
        self.ops.clear();
    }
}
