//! Checksums of pages as they were sent: a page that is the same needs no second journey.

use std::collections::HashMap;
use std::sync::OnceLock;

use xxhash_rust::xxh3::xxh3_64;

use crate::engine::memory::PAGE_BYTES;

/// Pages in one piece of the table.
const PIECE: usize = 512;

/// Checksums by address. Eight bytes per page that was recorded, and nothing for holes.
#[derive(Debug, Default)]
pub struct Sums {
    pieces: HashMap<u64, Box<[u64; PIECE]>>,
}

/// Never 0, which stands for a page that was not recorded.
fn sum(page: &[u8]) -> u64 {
    xxh3_64(page).max(1)
}

fn place(address: u64) -> (u64, usize) {
    let page = address / PAGE_BYTES;
    (page / PIECE as u64, usize::try_from(page % PIECE as u64).unwrap_or(0))
}

impl Sums {
    /// Records what a page holds; whether that is what was recorded before.
    pub fn record(&mut self, address: u64, page: &[u8]) -> bool {
        let (piece, at) = place(address);
        let slot = &mut self.pieces.entry(piece).or_insert_with(|| Box::new([0; PIECE]))[at];
        let sum = sum(page);
        std::mem::replace(slot, sum) == sum
    }

    /// Whether a page holds what was recorded.
    pub fn matches(&self, address: u64, page: &[u8]) -> bool {
        let (piece, at) = place(address);
        self.pieces.get(&piece).is_some_and(|p| p[at] == sum(page))
    }

    /// A page of the range that held something else than zeros.
    pub fn witness(&self, start: u64, end: u64) -> Option<u64> {
        static ZERO: OnceLock<u64> = OnceLock::new();
        let zero = *ZERO.get_or_init(|| sum(&[0; 4096]));
        let step = usize::try_from(PAGE_BYTES).unwrap_or(4096);
        (start..end).step_by(step).find(|address| {
            let (piece, at) = place(*address);
            self.pieces.get(&piece).is_some_and(|p| p[at] != 0 && p[at] != zero)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_what_is_the_same_and_finds_a_page_that_is_not_zero() {
        let mut sums = Sums::default();
        let (zeros, ones) = ([0u8; 4096], [1u8; 4096]);
        assert!(!sums.record(0x1_0000_0000_0000, &zeros));
        assert!(sums.record(0x1_0000_0000_0000, &zeros));
        assert_eq!(sums.witness(0x1_0000_0000_0000, 0x1_0000_0020_0000), None);
        assert!(!sums.record(0x1_0000_0000_3000, &ones));
        assert!(sums.matches(0x1_0000_0000_3000, &ones) && !sums.matches(0x1_0000_0000_3000, &zeros));
        assert_eq!(sums.witness(0x1_0000_0000_0000, 0x1_0000_0020_0000), Some(0x1_0000_0000_3000));
    }
}
