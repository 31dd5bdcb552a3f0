//! Whether to compress a block: only where it has been paying.
//!
//! Memory is divided into regions of 16 MiB. A region whose blocks saved less than a fifth over the last
//! eight is sent raw from then on, and one block in 32 is tried again, so that a region whose contents
//! change is found out.

use std::collections::HashMap;

/// Pages of a region.
const REGION_PAGES: u64 = (16 << 20) / 4096;
/// Blocks after which a region is judged.
const JUDGED_BLOCKS: u32 = 8;
/// Of so many blocks in a raw region one is tried.
const PROBE_EVERY: u32 = 32;

/// What the operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// LZ4 where it pays.
    #[default]
    Auto,
    /// Never.
    Off,
    /// LZ4 for every block that gets smaller.
    Lz4,
}

#[derive(Debug, Clone, Copy, Default)]
struct Region {
    raw: bool,
    blocks: u32,
    bytes_in: u64,
    bytes_out: u64,
}

/// Remembers how regions compress.
#[derive(Debug, Default)]
pub(super) struct Policy {
    mode: Compression,
    regions: HashMap<u64, Region>,
}

/// A block saves at least a fifth.
fn pays(bytes_in: u64, bytes_out: u64) -> bool {
    bytes_out.saturating_mul(5) <= bytes_in.saturating_mul(4)
}

impl Policy {
    pub(super) fn new(mode: Compression) -> Self {
        Self { mode, regions: HashMap::new() }
    }

    /// Whether to try to compress the block at `first_page`.
    pub(super) fn wants(&mut self, first_page: u64) -> bool {
        match self.mode {
            Compression::Off => return false,
            Compression::Lz4 => return true,
            Compression::Auto => {}
        }
        let region = self.regions.entry(first_page / REGION_PAGES).or_default();
        if !region.raw {
            return true;
        }
        region.blocks += 1;
        region.blocks >= PROBE_EVERY
    }

    /// What compressing that block gave; `bytes_out` is `bytes_in` where it did not get smaller.
    pub(super) fn tried(&mut self, first_page: u64, bytes_in: usize, bytes_out: usize) {
        if self.mode != Compression::Auto {
            return;
        }
        let (bytes_in, bytes_out) = (bytes_in as u64, bytes_out as u64);
        let region = self.regions.entry(first_page / REGION_PAGES).or_default();
        if region.raw {
            *region = Region { raw: !pays(bytes_in, bytes_out), ..Region::default() };
            return;
        }
        region.blocks += 1;
        region.bytes_in += bytes_in;
        region.bytes_out += bytes_out;
        if region.blocks == JUDGED_BLOCKS {
            *region = Region { raw: !pays(region.bytes_in, region.bytes_out), ..Region::default() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(policy: &mut Policy, blocks: u32, page: u64, bytes_out: usize) -> u32 {
        let mut tries = 0;
        for _ in 0..blocks {
            if policy.wants(page) {
                tries += 1;
                policy.tried(page, 1000, bytes_out);
            }
        }
        tries
    }

    #[test]
    fn a_region_that_does_not_pay_is_only_probed() {
        let mut policy = Policy::new(Compression::Auto);
        assert_eq!(run(&mut policy, 8, 0, 900), 8);
        assert_eq!(run(&mut policy, 320, 0, 900), 10);
        assert_eq!(run(&mut policy, 100, REGION_PAGES, 500), 100, "another region is its own");
    }

    #[test]
    fn a_probe_that_pays_brings_compression_back() {
        let mut policy = Policy::new(Compression::Auto);
        run(&mut policy, 8, 0, 1000);
        assert_eq!(run(&mut policy, 32, 0, 100), 1);
        assert_eq!(run(&mut policy, 50, 0, 100), 50);
    }

    #[test]
    fn the_operator_has_the_last_word() {
        let mut always = Policy::new(Compression::Lz4);
        assert_eq!(run(&mut always, 100, 0, 1000), 100);
        let mut never = Policy::new(Compression::Off);
        assert_eq!(run(&mut never, 100, 0, 1), 0);
    }
}
