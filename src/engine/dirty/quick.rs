//! Where something was written, in a large mapping: the kernel tells only that at half the cost of telling also what is
//! there now, or less (0.5 ms for a GiB on a processor that needs 0.9 for the other; its quick way is that of a query for
//! nothing but written pages). What is there is asked for afterwards, where there is something to ask for.

use nix::sys::utsname::uname;

use super::TrackError;
use super::uffd::UffdTracker;
use crate::engine::sys::pagemap::{self, PageRegion, Query};
use crate::proto::image::{Vma, VmaKind};

/// Mappings that hold less are looked at once.
const LEAST_BYTES: u64 = 32 << 20;
/// Places that are not further apart than this are looked at as one: a call takes as long as a look at so many pages.
const NEAR_BYTES: u64 = 1 << 20;
/// Since then, at the latest, its quick way reports all that the other does: what was dropped, and guards.
const SINCE: (u32, u32) = (6, 18);

/// Whether the kernel tells all on its quick way, which is known of what it has tried.
fn tells_all(swap: bool) -> bool {
    // Swap has marks of its own.
    !swap && uname().is_ok_and(|name| is_since(&name.release().to_string_lossy()))
}

fn is_since(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    matches!((numbers.next(), numbers.next()), (Some(major), Some(minor)) if (major, minor) >= SINCE)
}

fn is_worth(start: u64, end: u64) -> bool {
    end.saturating_sub(start) >= LEAST_BYTES
}

/// Places to look at, in order of address.
#[derive(Debug, Default)]
struct Places(Vec<(u64, u64)>);

impl Places {
    fn push(&mut self, start: u64, end: u64) {
        match self.0.last_mut() {
            Some(last) if start <= last.1.saturating_add(NEAR_BYTES) => last.1 = end,
            _ => self.0.push((start, end)),
        }
    }

    fn into_vec(self) -> Vec<(u64, u64)> {
        self.0
    }
}

impl UffdTracker {
    /// Where to look for what was written; `None`: the mapping is not registered.
    pub(super) fn places_written(&mut self, vma: &Vma) -> Result<Option<Vec<(u64, u64)>>, TrackError> {
        let is_simple = vma.kind() == VmaKind::VmaAnonPrivate && vma.page_bytes == 0;
        if !is_simple || !is_worth(vma.start, vma.end) || !tells_all(self.swap) {
            return Ok(Some(vec![(vma.start, vma.end)]));
        }
        let query = Query {
            flags: pagemap::CHECK_WPASYNC,
            all: pagemap::WRITTEN,
            report: pagemap::WRITTEN,
            ..Query::default()
        };
        let mut places = Places::default();
        let tracked = self.query(vma.start, vma.end, query, |r| places.push(r.start, r.end))?;
        Ok(tracked.then(|| places.into_vec()))
    }

    /// The same as [`UffdTracker::query`] in several places.
    pub(super) fn query_at(
        &mut self,
        places: &[(u64, u64)],
        query: Query,
        mut each: impl FnMut(PageRegion),
    ) -> Result<bool, TrackError> {
        for (start, end) in places {
            if !self.query(*start, *end, query, &mut each)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_are_known_and_places_that_are_near() {
        for (release, is) in
            [("6.18.44-x", true), ("6.17.9", false), ("7.0-rc1", true), ("10.1", true), ("6", false)]
        {
            assert_eq!(is_since(release), is, "{release}");
        }
        let mut places = Places::default();
        for at in [0, 4096, NEAR_BYTES + 8192, 4 * NEAR_BYTES, 5 * NEAR_BYTES + 4097] {
            places.push(at, at + 4096);
        }
        let last = 5 * NEAR_BYTES + 4097;
        assert_eq!(
            places.into_vec(),
            [(0, NEAR_BYTES + 12288), (4 * NEAR_BYTES, 4 * NEAR_BYTES + 4096), (last, last + 4096)]
        );
    }
}
