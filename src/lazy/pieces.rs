//! A map from ranges to ranges of the same length: what lies where. Pure.

use std::collections::BTreeMap;

/// `start..end` leads to `to..`, and is of the kind `tag`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece<T> {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) to: u64,
    pub(super) tag: T,
}

impl<T: Copy> Piece<T> {
    /// Where `at`, a place inside, leads to.
    pub(super) fn target(&self, at: u64) -> u64 {
        self.to + (at - self.start)
    }

    /// The part inside of `start..end`.
    pub(super) fn clip(self, start: u64, end: u64) -> Self {
        let from = self.start.max(start).min(self.end);
        Self { start: from, end: self.end.min(end), to: self.target(from), tag: self.tag }
    }
}

/// Disjoint pieces.
#[derive(Debug, Clone)]
pub(super) struct Pieces<T> {
    by_start: BTreeMap<u64, (u64, u64, T)>,
}

impl<T: Copy> Pieces<T> {
    pub(super) fn new() -> Self {
        Self { by_start: BTreeMap::new() }
    }

    /// Adds a piece, over whatever was there.
    pub(super) fn insert(&mut self, piece: Piece<T>) {
        if piece.start < piece.end {
            self.cut(piece.start, piece.end);
            self.by_start.insert(piece.start, (piece.end, piece.to, piece.tag));
        }
    }

    /// Takes `start..end` out, and returns what was there.
    pub(super) fn cut(&mut self, start: u64, end: u64) -> Vec<Piece<T>> {
        let hit: Vec<Piece<T>> = self.whole(start, end).collect();
        let mut out = Vec::with_capacity(hit.len());
        for piece in hit {
            self.by_start.remove(&piece.start);
            for rest in [piece.clip(0, start), piece.clip(end, u64::MAX)] {
                if rest.start < rest.end {
                    self.by_start.insert(rest.start, (rest.end, rest.to, rest.tag));
                }
            }
            out.push(piece.clip(start, end));
        }
        out
    }

    /// The piece that holds `at`.
    pub(super) fn find(&self, at: u64) -> Option<Piece<T>> {
        self.whole(at, at.saturating_add(1)).next()
    }

    /// The parts of the pieces inside of `start..end`, in order.
    pub(super) fn overlap(&self, start: u64, end: u64) -> impl Iterator<Item = Piece<T>> + '_ {
        self.whole(start, end).map(move |piece| piece.clip(start, end))
    }

    /// All pieces, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = Piece<T>> + '_ {
        self.by_start.iter().map(|(&start, &(end, to, tag))| Piece { start, end, to, tag })
    }

    /// The pieces that touch `start..end`, as they are.
    fn whole(&self, start: u64, end: u64) -> impl Iterator<Item = Piece<T>> + '_ {
        let first = self.by_start.range(..=start).next_back().map_or(start, |(&s, _)| s);
        self.by_start
            .range(first..end.max(first))
            .map(|(&start, &(end, to, tag))| Piece { start, end, to, tag })
            .filter(move |piece| piece.start < end && start < piece.end)
    }
}
