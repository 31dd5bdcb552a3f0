//! Huge pages, put together from the parts that arrive. Pure.

use super::table::HUGE_BYTES;
use crate::engine::memory::PAGE_BYTES;

/// So many can be in parts at a time: 8 MiB. More come only if the source sends them mixed.
const MOST: usize = 4;

const HUGE: usize = 2 << 20;
const PAGE: usize = 4096;
const _: () = assert!(HUGE as u64 == HUGE_BYTES && PAGE as u64 == PAGE_BYTES);

/// One huge page that is not complete.
#[derive(Debug)]
struct Parts {
    source: u64,
    bytes: Vec<u8>,
    here: [u64; HUGE / PAGE / 64],
}

impl Parts {
    fn complete(&self) -> bool {
        self.here.iter().all(|word| *word == u64::MAX)
    }
}

/// What a part led to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Added {
    /// The page is complete: its contents.
    pub(super) whole: Option<Vec<u8>>,
    /// A page whose parts had to go for it: it must be asked for again.
    pub(super) evicted: Option<u64>,
    /// Parts that were here already, in pages.
    pub(super) again: u64,
}

/// The pages in parts, oldest first.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    open: Vec<Parts>,
}

impl Assembler {
    /// Takes a part in: whole pages at `source`, inside of one huge page; `None` is zeros.
    pub(super) fn add(&mut self, source: u64, len: u64, bytes: Option<&[u8]>) -> Added {
        let mut added = Added::default();
        let base = source & !(HUGE_BYTES - 1);
        let at = match self.open.iter().position(|p| p.source == base) {
            Some(at) => at,
            None => {
                if self.open.len() >= MOST {
                    added.evicted = Some(self.open.remove(0).source);
                }
                self.open.push(Parts { source: base, bytes: vec![0; HUGE], here: Default::default() });
                self.open.len() - 1
            }
        };
        let Some(parts) = self.open.get_mut(at) else { return added };
        let from = usize::try_from(source - base).unwrap_or(HUGE).min(HUGE);
        let to = from.saturating_add(usize::try_from(len).unwrap_or(HUGE)).min(HUGE);
        if let Some(into) = parts.bytes.get_mut(from..to) {
            match bytes {
                Some(bytes) if bytes.len() == into.len() => into.copy_from_slice(bytes),
                _ => into.fill(0),
            }
        }
        for page in from / PAGE..to / PAGE {
            if let Some(word) = parts.here.get_mut(page / 64) {
                let bit = 1 << (page % 64);
                added.again += u64::from(*word & bit != 0);
                *word |= bit;
            }
        }
        if parts.complete() {
            added.whole = Some(self.open.remove(at).bytes);
        }
        added
    }

    /// Gives up the parts of this page, if there are any.
    pub(super) fn forget(&mut self, source: u64) {
        self.open.retain(|p| p.source != source);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_in_any_order_make_a_page() {
        let mut assembler = Assembler::default();
        let base = 7 * HUGE_BYTES;
        for page in (0..512u64).rev() {
            let contents = vec![u8::try_from(page % 251).unwrap(); 4096];
            let bytes = (page % 5 != 0).then_some(contents.as_slice());
            let added = assembler.add(base + page * PAGE_BYTES, PAGE_BYTES, bytes);
            assert_eq!((added.evicted, added.again), (None, 0));
            assert_eq!(added.whole.is_some(), page == 0);
            if let Some(whole) = added.whole {
                for (i, part) in whole.chunks(4096).enumerate() {
                    let want = if i % 5 == 0 { 0 } else { u8::try_from(i % 251).unwrap() };
                    assert!(part.iter().all(|b| *b == want), "part {i}");
                }
            }
        }
        assert!(assembler.open.is_empty());
    }

    #[test]
    fn the_oldest_makes_room() {
        let mut assembler = Assembler::default();
        for page in 0..4 {
            assert_eq!(assembler.add(page * HUGE_BYTES, PAGE_BYTES, None).evicted, None);
        }
        assert_eq!(assembler.add(0, PAGE_BYTES, None).again, 1);
        assert_eq!(assembler.add(4 * HUGE_BYTES, PAGE_BYTES, None).evicted, Some(0));
        let whole = Some(vec![0; HUGE]);
        assert_eq!(assembler.add(0, HUGE_BYTES, None), Added { whole, evicted: Some(HUGE_BYTES), again: 0 });
    }
}
