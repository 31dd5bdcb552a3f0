//! A look at a large range by several threads: in the freeze, nothing else needs the processors.

use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;

use crate::engine::many;
use crate::engine::sys::pagemap::{self, PageRegion, Query};

/// What one thread looks at at a time: work for a tenth of a millisecond (the kernel looks at a GiB in about one).
/// Parts begin where page tables do.
const PART_BYTES: u64 = 128 << 20;
const MOST_PARTS: u64 = 64;
/// Parts that are worth several threads.
const LEAST_PARTS: u64 = 4;

pub(super) fn is_worth(start: u64, end: u64) -> bool {
    end.saturating_sub(start) >= LEAST_PARTS * PART_BYTES
}

/// Scans a range by several threads at the same time; a query that changes nothing, with `found` as room for one
/// ioctl each. Regions come in order; one that lies across two parts comes in two.
///
/// # Errors
/// The first part's that failed.
pub(super) fn scan(
    pagemap: &File,
    range: (u64, u64),
    query: Query,
    room: usize,
) -> Result<Vec<PageRegion>, Errno> {
    scan_in(pagemap, &parts(range, part_bytes(range)), query, room)
}

/// Not too many of them: what is only reserved may be terabytes, which hold next to nothing.
fn part_bytes((start, end): (u64, u64)) -> u64 {
    (end.saturating_sub(start) / MOST_PARTS).next_multiple_of(PART_BYTES).max(PART_BYTES)
}

fn parts((start, end): (u64, u64), each: u64) -> Vec<(u64, u64)> {
    let mut parts = Vec::new();
    let mut at = start;
    while at < end {
        let next = at.saturating_add(1).next_multiple_of(each).min(end);
        parts.push((at, next));
        at = next;
    }
    parts
}

fn scan_in(
    pagemap: &File,
    parts: &[(u64, u64)],
    query: Query,
    room: usize,
) -> Result<Vec<PageRegion>, Errno> {
    let look = |&(from, to): &(u64, u64)| {
        let mut found = vec![PageRegion::default(); room];
        let mut all = Vec::new();
        pagemap::scan_all(pagemap.as_fd(), from, to, query, &mut found, |r| all.push(r))?;
        Ok(all)
    };
    let mut all = Vec::new();
    for found in many::map_large(parts, look) {
        all.append(&mut found?);
    }
    Ok(all)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::extents::Extents;

    #[test]
    fn parts_cover_the_range_without_a_gap() {
        assert!(!is_worth(5, 0) && !is_worth(0, LEAST_PARTS * PART_BYTES - 1));
        assert_eq!(parts((5, 0), 16), []);
        assert_eq!(parts((5, 40), 16), [(5, 16), (16, 32), (32, 40)]);
        assert_eq!(parts((16, 32), 16), [(16, 32)]);
        let reserved = (4096, 16 << 40);
        assert!(parts(reserved, part_bytes(reserved)).len() as u64 <= MOST_PARTS + 1);
        assert_eq!(part_bytes((0, 1 << 30)), PART_BYTES);
    }

    #[test]
    fn several_threads_find_what_one_finds() {
        const PAGE: usize = 4096;
        let mut memory = vec![0u8; 64 << 20];
        // Runs of three pages, closer together towards the end; some lie across two parts.
        let mut at = 0;
        for i in 0..600 {
            memory[at..][..3 * PAGE].fill(1);
            at += (4 + (600 - i) / 40) * PAGE;
        }
        memory[32 << 20..][..PAGE].fill(1);
        let start = (memory.as_ptr().addr() as u64).next_multiple_of(2 << 20);
        let end = start + (60 << 20);
        let file = File::open("/proc/self/pagemap").unwrap();
        let query = Query { all: pagemap::PRESENT, report: pagemap::PRESENT, ..Query::default() };
        let found = |each, room| {
            let mut all = Extents::new();
            let regions = scan_in(&file, &parts((start, end), each), query, room).unwrap();
            for pair in regions.windows(2) {
                assert!(
                    pair[0].end <= pair[1].start,
                    "parts of {each}, room for {room}: {pair:x?} of {start:x}"
                );
            }
            regions.iter().for_each(|r| all.insert(r.start, r.end));
            all.iter().collect::<Vec<_>>()
        };
        let one = found(u64::MAX / 2 + 1, 100_000);
        assert!(!one.is_empty());
        for each in [32 << 20, 16 << 20, 8 << 20] {
            assert_eq!(found(each, 5), one);
        }
        drop(memory);
    }
}
