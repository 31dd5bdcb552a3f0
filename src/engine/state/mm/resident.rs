//! Pages of files that the source has mapped: they count in the resident size, and the process finds them
//! without a fault. Which is all they are for, so failing is no error.

use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;

use crate::engine::extents::Extents;
use crate::engine::remote::{Batch, InjectError, RemoteCalls};
use crate::engine::sys::pagemap::{self, PageRegion, Query};
use crate::proto::image::{Layout, Vma};

/// Regions per look; a mapping with more takes several.
const REGIONS: usize = 256;

/// Maps what `wanted` says is resident at the source, and no more: around each page that is touched, the
/// kernel maps what else it has of the file in its 64 KiB (`fault_around_bytes`), and those go again.
pub(super) fn show(process: &mut dyn RemoteCalls, wanted: &Layout) -> Result<(), InjectError> {
    const MADV_POPULATE_READ: i32 = 22;
    let told: Vec<&Vma> = wanted.vmas.iter().filter(|v| !v.resident.is_empty()).collect();
    let wanted = told.iter().flat_map(|v| &v.resident).map(|r| (r.start, r.end));
    advise(process, wanted, MADV_POPULATE_READ)?;
    let surplus = File::open(format!("/proc/{}/pagemap", process.pid()))
        .map_err(|_| Errno::ENOENT)
        .and_then(|file| told.iter().try_fold(Extents::new(), |all, vma| add_surplus(&file, vma, all)))
        .unwrap_or_default();
    advise(process, surplus.iter(), libc::MADV_DONTNEED)
}

fn advise(
    process: &mut dyn RemoteCalls,
    ranges: impl Iterator<Item = (u64, u64)>,
    advice: i32,
) -> Result<(), InjectError> {
    let mut batch = Batch::new();
    for (start, end) in ranges {
        batch.call(libc::SYS_madvise, &[start.into(), end.saturating_sub(start).into(), advice.into()]);
    }
    if !batch.is_empty() {
        process.run(&batch)?;
    }
    Ok(())
}

/// Pages of the file that are mapped and were not asked for. A page that was written in a private mapping is
/// not the file's any more, and never among them.
fn add_surplus(pagemap: &File, vma: &Vma, mut surplus: Extents) -> Result<Extents, Errno> {
    let query = Query { all: pagemap::PRESENT | pagemap::FILE, report: pagemap::FILE, ..Query::default() };
    let mut found = [PageRegion::default(); REGIONS];
    let each = |r: PageRegion| surplus.insert(r.start, r.end);
    pagemap::scan_all(pagemap.as_fd(), vma.start, vma.end, query, &mut found, each)?;
    vma.resident.iter().for_each(|r| surplus.remove(r.start, r.end));
    Ok(surplus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::procfs::parse_maps;
    use crate::engine::skeleton::ReservedPid;
    use crate::engine::sys::vm::{self, RemoteRange};
    use crate::proto::files::FileRef;
    use crate::proto::image::{Range, VmaKind};

    const PAGE: u64 = 4096;
    const PAGES: u64 = 64;
    const AT: [(u64, VmaKind); 2] =
        [(0x1_0000_0000, VmaKind::VmaFilePrivate), (0x1_1000_0000, VmaKind::VmaFileShared)];

    /// The process's own group of vdso mappings, and the file twice, with these pages of it resident.
    fn layout(pid: u32, path: &[u8], pages: &[u64]) -> Layout {
        let maps = parse_maps(&std::fs::read("/proc/self/maps").unwrap()).unwrap();
        let group = maps.iter().filter(|m| m.path == b"[vdso]" || m.path.starts_with(b"[vvar"));
        let mut vmas: Vec<Vma> = group
            .map(|m| Vma { start: m.start, end: m.end, kind: VmaKind::VmaVdso.into(), ..Vma::default() })
            .collect();
        let prot = (libc::PROT_READ | libc::PROT_WRITE).unsigned_abs();
        for (start, kind) in AT {
            let range = |page: &u64| Range { start: start + page * PAGE, end: start + (page + 1) * PAGE };
            vmas.push(Vma {
                start,
                end: start + PAGES * PAGE,
                prot,
                file: Some(0),
                kind: kind.into(),
                resident: pages.iter().map(range).collect(),
                ..Vma::default()
            });
        }
        vmas.sort_by_key(|v| v.start);
        let files = vec![FileRef { path: path.to_vec(), ..FileRef::default() }];
        Layout { vmas, files, tids: vec![pid], ..Layout::default() }
    }

    /// The pages of the file that are mapped, in each of its mappings.
    fn mapped(pid: i32) -> Vec<Vec<u64>> {
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
        let pages = |(start, _)| {
            let vma = Vma { start, end: start + PAGES * PAGE, ..Vma::default() };
            let all = add_surplus(&pagemap, &vma, Extents::new()).unwrap();
            (0..PAGES)
                .filter(|p| all.overlap(start + p * PAGE, start + (p + 1) * PAGE).next().is_some())
                .collect()
        };
        AT.into_iter().map(pages).collect()
    }

    #[test]
    fn what_the_source_has_mapped_is_mapped_and_no_more() {
        let path = std::env::temp_dir().join(format!("migrate-resident-{}", std::process::id()));
        std::fs::write(&path, vec![7u8; usize::try_from(PAGES * PAGE).unwrap()]).unwrap();
        let name = path.to_str().unwrap().as_bytes();
        let reserved = (20_000..30_000).find_map(|pid| ReservedPid::take(pid).ok()).unwrap();
        let mut skeleton = reserved.execute(&Layout::default()).unwrap();
        let pid = skeleton.pid();
        skeleton.reconcile(layout(pid.unsigned_abs(), name, &[3, 40])).unwrap();
        assert_eq!(mapped(pid), [[3, 40], [3, 40]]);
        // A page of the private mapping that was written meanwhile is neither the file's nor surplus.
        let (written, own) = (AT[0].0 + 5 * PAGE, [9u8; 4096]);
        assert_eq!(vm::write(pid, &own, &[RemoteRange { start: written, len: own.len() }]), Ok(own.len()));
        skeleton.reconcile(layout(pid.unsigned_abs(), name, &[3, 8, 40])).unwrap();
        assert_eq!(mapped(pid), [[3, 8, 40], [3, 8, 40]]);
        let mut now = [0u8; 4096];
        let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&memory, &mut now, written).unwrap();
        assert_eq!(now, own);
        std::fs::remove_file(&path).unwrap();
    }
}
