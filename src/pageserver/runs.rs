//! Sets of pages on the wire: which are missing, without their contents.

use super::frame::{FrameError, MAX_PAGE_NUMBER, PAGE_BYTES};
use crate::engine::extents::Extents;
use crate::proto::control::PageRuns;

/// A set of page-aligned address ranges as a message.
pub fn encode(set: &Extents) -> PageRuns {
    let page = PAGE_BYTES as u64;
    let mut last = 0;
    let mut runs = Vec::new();
    for (start, end) in set.iter() {
        runs.push(start / page - last);
        runs.push((end - start) / page);
        last = end / page;
    }
    PageRuns { runs }
}

/// A message as a set of address ranges.
///
/// # Errors
/// [`FrameError::Runs`] if it is not one.
pub fn decode(message: &PageRuns) -> Result<Extents, FrameError> {
    let page = PAGE_BYTES as u64;
    let (pairs, rest) = message.runs.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(FrameError::Runs(message.runs.len()));
    }
    let mut set = Extents::new();
    let mut last = 0u64;
    for (index, [gap, len]) in pairs.iter().enumerate() {
        let start = last.checked_add(*gap);
        let end = start.and_then(|s| s.checked_add(*len)).filter(|end| *end <= MAX_PAGE_NUMBER && *len > 0);
        let (Some(start), Some(end)) = (start, end) else { return Err(FrameError::Runs(index)) };
        set.insert(start * page, end * page);
        last = end;
    }
    Ok(set)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_set_comes_back(ranges in proptest::collection::vec((0u64..1 << 30, 1u64..100), 0..50)) {
            let mut set = Extents::new();
            ranges.iter().for_each(|(start, len)| set.insert(start * 4096, (start + len) * 4096));
            prop_assert_eq!(decode(&encode(&set)).unwrap(), set);
        }

        #[test]
        fn no_numbers_panic(runs in proptest::collection::vec(any::<u64>(), 0..20)) {
            let _ = decode(&PageRuns { runs });
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for runs in
            [vec![1], vec![1, 0], vec![u64::MAX, 1], vec![0, 1, u64::MAX, 5], vec![MAX_PAGE_NUMBER, 1]]
        {
            assert!(decode(&PageRuns { runs: runs.clone() }).is_err(), "{runs:?}");
        }
    }
}
