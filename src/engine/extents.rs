//! A set of address ranges: insert, remove, intersect. Pure.

use std::collections::BTreeMap;

/// A set of `start..end` ranges, kept sorted, disjoint and merged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extents {
    by_start: BTreeMap<u64, u64>,
}

impl Extents {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `start..end`, merging with what it touches.
    pub fn insert(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (mut from, mut to) = (start, end);
        if let Some((&s, &e)) = self.by_start.range(..=start).next_back() {
            if e >= end {
                return;
            }
            if e >= start {
                from = s;
            }
        }
        while let Some((&s, &e)) = self.by_start.range(from..=to).next() {
            to = to.max(e);
            self.by_start.remove(&s);
        }
        self.by_start.insert(from, to);
    }

    /// Takes `start..end` out.
    pub fn remove(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        if let Some((&s, &e)) = self.by_start.range(..start).next_back()
            && e > start
        {
            self.by_start.insert(s, start);
            if e > end {
                self.by_start.insert(end, e);
                return;
            }
        }
        while let Some((&s, &e)) = self.by_start.range(start..end).next() {
            self.by_start.remove(&s);
            if e > end {
                self.by_start.insert(end, e);
                return;
            }
        }
    }

    /// The parts of `start..end` that are in the set.
    pub fn overlap(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = self.by_start.range(..start).next_back().map_or(start, |(&s, _)| s);
        self.by_start
            .range(first..end.max(first))
            .map(move |(&s, &e)| (s.max(start), e.min(end)))
            .filter(|(s, e)| s < e)
    }

    /// All ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.by_start.iter().map(|(&s, &e)| (s, e))
    }

    /// Sum of the lengths.
    pub fn total(&self) -> u64 {
        self.iter().map(|(s, e)| e - s).sum()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.by_start.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against the obvious model: one bit per unit.
        #[test]
        fn behaves_as_a_bitmap(ops in proptest::collection::vec((any::<bool>(), 0u64..64, 0u64..64), 1..60), q in (0u64..64, 0u64..64)) {
            let mut set = Extents::new();
            let mut bits = [false; 64];
            for (add, a, b) in ops {
                if add { set.insert(a, b) } else { set.remove(a, b) }
                for (i, bit) in bits.iter_mut().enumerate() {
                    if (a..b).contains(&(i as u64)) { *bit = add; }
                }
            }
            let mut got = [false; 64];
            let mut last_end = None;
            for (s, e) in set.iter() {
                prop_assert!(s < e && last_end.is_none_or(|l| l < s), "sorted, disjoint, merged");
                last_end = Some(e);
                for i in s..e { got[usize::try_from(i).unwrap()] = true; }
            }
            prop_assert_eq!(got, bits);
            let part: u64 = set.overlap(q.0, q.1).map(|(s, e)| e - s).sum();
            let want = (q.0..q.1).filter(|i| bits[usize::try_from(*i).unwrap()]).count() as u64;
            prop_assert_eq!(part, want);
        }
    }
}
