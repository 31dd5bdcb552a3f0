//! Huge pages of a host: which sizes there are, and whether enough are free.

use std::collections::BTreeMap;

use crate::engine::reason::Reason;
use crate::proto::control::HugePages;
use crate::proto::image::{Layout, VmaKind};

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// The sizes that this kernel has, bytes.
pub(super) fn sizes() -> Vec<u64> {
    let pools = std::fs::read_dir(POOLS).into_iter().flatten().flatten();
    let size = |name: &str| name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok();
    pools.filter_map(|e| size(e.file_name().to_str()?)).map(|kib| kib * 1024).collect()
}

/// Pages that nobody has or has been promised.
fn free(page_bytes: u64) -> Option<u64> {
    let number = |what: &str| {
        let path = format!("{POOLS}/hugepages-{}kB/{what}", page_bytes / 1024);
        std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()
    };
    let overcommit = number("nr_overcommit_hugepages")?.saturating_sub(number("surplus_hugepages")?);
    Some(number("free_hugepages")?.saturating_sub(number("resv_hugepages")?) + overcommit)
}

/// How many huge pages a map takes at most, by size: mapping them takes them out of the pool.
pub fn needed(layout: &Layout) -> Vec<HugePages> {
    let mut pages: BTreeMap<u64, u64> = BTreeMap::new();
    for vma in layout.vmas.iter().filter(|v| v.page_bytes != 0) {
        if vma.kind() == VmaKind::VmaAnonPrivate || vma.kind() == VmaKind::VmaMemfdPrivate {
            *pages.entry(vma.page_bytes).or_default() += (vma.end - vma.start) / vma.page_bytes;
        }
    }
    for object in layout.objects.iter().filter(|o| o.page_bytes != 0) {
        *pages.entry(object.page_bytes).or_default() += object.size.div_ceil(object.page_bytes);
    }
    pages.into_iter().map(|(page_bytes, pages)| HugePages { page_bytes, pages }).collect()
}

/// What is missing here.
pub(super) fn check_here(wanted: &[HugePages]) -> Vec<Reason> {
    let missing = |wanted: &HugePages| {
        let free = free(wanted.page_bytes).unwrap_or(0);
        let kib = wanted.page_bytes / 1024;
        (free < wanted.pages).then(|| {
            Reason::new(
                format!("huge pages of {kib} KiB"),
                format!("{} are needed at the destination, {free} are free there", wanted.pages),
                format!("reserve more there ({POOLS}/hugepages-{kib}kB/nr_hugepages)"),
            )
        })
    };
    wanted.iter().filter_map(missing).collect()
}
