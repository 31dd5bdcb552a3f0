//! What is mapped now, from /proc, and what of it cannot be carried.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use super::MapError;
use crate::engine::procfs::{self, MapsEntry};
use crate::engine::reason::Reason;
use crate::engine::remote::{Batch, Tid};
use crate::engine::state::objects::{self, ObjectError, backing, object_id};
use crate::proto::files::FileRef;
use crate::proto::image::{Layout, Mm, ObjectKind, Vma, VmaKind};

fn read(path: String) -> Result<(Vec<u8>, String), MapError> {
    match procfs::read(&path) {
        Ok(bytes) => Ok((bytes, path)),
        Err(source) => Err(MapError::Read { path, source }),
    }
}

/// VmFlags by mapping, as of the last look at smaps.
#[derive(Debug, Default, Clone)]
pub struct FlagCache {
    flags: Vec<procfs::MappingFlags>,
    at: Option<Instant>,
}

/// How long a look is good for: short rounds would become long by another one.
const HOLDS: Duration = Duration::from_millis(100);

impl FlagCache {
    /// Reads smaps: milliseconds per GiB, so only while the process runs.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn look(pid: Tid) -> Result<Self, MapError> {
        let (text, path) = read(format!("/proc/{pid}/smaps"))?;
        let flags = procfs::parse_smaps_flags(&text).map_err(|source| MapError::Parse { path, source })?;
        Ok(Self { flags, at: Some(Instant::now()) })
    }

    /// Looks again, unless the last look was just now.
    ///
    /// # Errors
    /// See [`FlagCache::look`].
    pub fn renew(&mut self, pid: Tid) -> Result<(), MapError> {
        if self.at.is_none_or(|at| at.elapsed() >= HOLDS) {
            *self = Self::look(pid)?;
        }
        Ok(())
    }

    /// The flags of a mapping, if it was there at the last look: of what else was there they say nothing.
    fn of(&self, mapping: &MapsEntry) -> &[[u8; 2]] {
        let i = self.flags.partition_point(|(was, _)| was.end <= mapping.start);
        let same = |was: &MapsEntry| {
            let object = |m: &MapsEntry| (m.dev, m.inode, m.shared);
            was.start <= mapping.start && object(was) == object(mapping)
        };
        self.flags.get(i).filter(|(was, _)| same(was)).map_or(&[], |(_, f)| f)
    }
}

/// MADV_* that VmFlags tell of, and what takes each back.
pub(super) const ADVICE: [(&[u8; 2], i32, i32); 8] = [
    (b"hg", libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE),
    (b"nh", libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE),
    (b"dc", libc::MADV_DONTFORK, libc::MADV_DOFORK),
    (b"dd", libc::MADV_DONTDUMP, libc::MADV_DODUMP),
    (b"wf", libc::MADV_WIPEONFORK, libc::MADV_KEEPONFORK),
    (b"mg", libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE),
    (b"sr", libc::MADV_SEQUENTIAL, libc::MADV_NORMAL),
    (b"rr", libc::MADV_RANDOM, libc::MADV_NORMAL),
];

/// VmFlags that no mapping of ours may have, and what they mean.
const REFUSED_FLAGS: [(&[u8; 2], &str); 6] = [
    (b"um", "is watched by a userfaultfd of its own"),
    (b"io", "maps device memory"),
    (b"pf", "maps device memory (PFN range)"),
    (b"mm", "maps device memory (mixed)"),
    (b"sf", "is a DAX mapping with MAP_SYNC"),
    (b"ss", "is a shadow stack"),
];

fn describe(m: &MapsEntry) -> String {
    let name = String::from_utf8_lossy(&m.path);
    format!("mapping {:x}-{:x}{}{name}", m.start, m.end, if name.is_empty() { "" } else { " " })
}

/// The kind of a mapping, or why it cannot be carried. `None`: nothing to carry (vsyscall).
fn kind_of(m: &MapsEntry) -> Result<Option<VmaKind>, &'static str> {
    let path = m.path.as_slice();
    let has = |prefix: &[u8]| path.starts_with(prefix);
    Ok(Some(match path {
        b"[vsyscall]" => return Ok(None),
        b"[vdso]" => VmaKind::VmaVdso,
        _ if has(b"[vvar") => VmaKind::VmaVdso,
        b"/dev/zero (deleted)" if m.shared => VmaKind::VmaAnonShared,
        _ if has(b"/memfd:") && backing(m.dev).is_some() && m.shared => VmaKind::VmaMemfdShared,
        _ if has(b"/memfd:") && backing(m.dev).is_some() => VmaKind::VmaMemfdPrivate,
        _ if has(b"/SYSV") && backing(m.dev).is_some() => VmaKind::VmaSysv,
        _ if has(b"/[aio]") => return Err("is an AIO ring (io_setup), which cannot be carried"),
        _ if has(b"anon_inode:") => {
            return Err("maps a kernel object (io_uring, perf), which cannot be carried");
        }
        _ if has(b"/anon_hugepage") && page_bytes_of(m) != 0 && m.shared => VmaKind::VmaAnonShared,
        _ if has(b"/anon_hugepage") && page_bytes_of(m) != 0 => VmaKind::VmaAnonPrivate,
        _ if has(b"/secretmem") => return Err("is secret memory (memfd_secret), which nobody else may read"),
        _ if path.ends_with(b" (deleted)") => return Err("maps a deleted file"),
        _ if m.inode != 0 && path.first() == Some(&b'/') && m.shared => VmaKind::VmaFileShared,
        _ if m.inode != 0 && path.first() == Some(&b'/') => VmaKind::VmaFilePrivate,
        _ if m.inode == 0
            && !m.shared
            && (path.is_empty() || has(b"[anon") || path == b"[heap]" || has(b"[stack")) =>
        {
            VmaKind::VmaAnonPrivate
        }
        _ => return Err("is of a kind that migrate does not know"),
    }))
}

/// The size of its pages, if they are huge and of the kernel's own mount; else 0.
fn page_bytes_of(m: &MapsEntry) -> u64 {
    let own = [&b"/memfd:"[..], b"/SYSV", b"/anon_hugepage"].iter().any(|p| m.path.starts_with(p));
    if own { backing(m.dev).map_or(0, objects::Backing::page_bytes) } else { 0 }
}

/// The id of the shared memory behind a mapping; 0: none.
fn shared_id(kind: VmaKind, m: &MapsEntry) -> u64 {
    match kind {
        VmaKind::VmaSysv => object_id(ObjectKind::ObjectSysv, 0, m.inode),
        VmaKind::VmaMemfdShared | VmaKind::VmaMemfdPrivate | VmaKind::VmaAnonShared => {
            object_id(ObjectKind::ObjectMemfd, page_bytes_of(m), m.inode)
        }
        _ => 0,
    }
}

/// The memory map as it is now, and all that cannot be carried of it.
#[derive(Debug)]
pub struct CapturedMap {
    /// Mappings and files; `tids` and `objects` are left empty.
    pub layout: Layout,
    /// Why some cannot be carried.
    pub reasons: Vec<Reason>,
}

/// Reads the memory map of `pid`, running or stopped.
///
/// # Errors
/// If /proc cannot be read.
pub fn capture(pid: Tid, flags: &FlagCache) -> Result<CapturedMap, MapError> {
    let (text, path) = read(format!("/proc/{pid}/maps"))?;
    let entries = procfs::parse_maps(&text).map_err(|source| MapError::Parse { path, source })?;
    let mut files = Vec::new();
    let mut known: HashMap<Vec<u8>, Option<u32>> = HashMap::new();
    let mut systems = HashMap::new();
    let mut map = CapturedMap { layout: Layout::default(), reasons: Vec::new() };
    for m in &entries {
        let vm_flags = flags.of(m);
        let refused = REFUSED_FLAGS.iter().find(|(f, _)| vm_flags.contains(f)).map(|(_, why)| *why);
        let kind = match (kind_of(m), refused) {
            (Ok(None), _) => continue,
            (Ok(Some(VmaKind::VmaVdso)), _) => VmaKind::VmaVdso,
            (Err(why), _) | (Ok(_), Some(why)) => {
                map.reasons.push(Reason::new(describe(m), why, "it must be unmapped before the move"));
                continue;
            }
            (Ok(Some(_)), None) if vm_flags.contains(b"dp") => VmaKind::VmaDroppable,
            (Ok(Some(kind)), None) => kind,
        };
        let file = if matches!(kind, VmaKind::VmaFilePrivate | VmaKind::VmaFileShared) {
            let file = known.entry(m.path.clone()).or_insert_with(|| {
                let file = file_ref(m, &mut systems).map_err(|r| map.reasons.push(r)).ok()?;
                files.push(file);
                u32::try_from(files.len() - 1).ok()
            });
            if file.is_none() {
                continue;
            }
            *file
        } else {
            None
        };
        let prot = [(m.read, libc::PROT_READ), (m.write, libc::PROT_WRITE), (m.exec, libc::PROT_EXEC)]
            .into_iter()
            .filter(|(on, _)| *on)
            .fold(0, |all, (_, bit)| all | bit.unsigned_abs());
        let has = |flag: &[u8; 2]| vm_flags.contains(flag);
        map.layout.vmas.push(Vma {
            start: m.start,
            end: m.end,
            prot,
            kind: kind.into(),
            offset: m.offset,
            file,
            grows_down: has(b"gd"),
            noreserve: has(b"nr"),
            locked: has(b"lo"),
            advice: ADVICE.iter().filter(|(f, ..)| has(f)).map(|(_, on, _)| on.unsigned_abs()).collect(),
            shm_inode: shared_id(kind, m),
            fresh: false,
            resident: Vec::new(),
            page_bytes: page_bytes_of(m),
            never_writable: matches!(kind, VmaKind::VmaMemfdShared | VmaKind::VmaSysv)
                && !m.write
                && !vm_flags.is_empty()
                && !has(b"mw"),
            accounted: has(b"ac") && !m.write && !m.shared,
            sealed: has(b"sl") && kind != VmaKind::VmaVdso,
        });
    }
    map.layout.files = files;
    Ok(map)
}

/// The file behind a mapping, which must still be what its path leads to. `systems`: by device, whether it is one
/// of huge pages.
fn file_ref(m: &MapsEntry, systems: &mut HashMap<u64, bool>) -> Result<FileRef, Reason> {
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(&m.path));
    let meta = std::fs::metadata(path).map_err(|e| {
        Reason::new(describe(m), format!("maps a file that cannot be reached by its path: {e}"), "")
    })?;
    let of_huge_pages = || {
        let system = nix::sys::statfs::statfs(path).map(|fs| fs.filesystem_type());
        system == Ok(nix::sys::statfs::HUGETLBFS_MAGIC)
    };
    if *systems.entry(meta.dev()).or_insert_with(of_huge_pages) {
        let why = "maps a file of huge pages (hugetlbfs), which cannot be carried yet";
        return Err(Reason::new(describe(m), why, ""));
    }
    if meta.ino() != m.inode {
        return Err(Reason::new(
            describe(m),
            "maps a file that has been replaced at its path",
            "restart the process, or put the original file back",
        ));
    }
    Ok(FileRef {
        path: m.path.clone(),
        dev: meta.dev(),
        ino: meta.ino(),
        size: meta.size(),
        mtime_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
        mode: meta.mode(),
        rdev: meta.rdev(),
        ..FileRef::default()
    })
}

/// Shared memory that another process maps or has open as well: it would be torn in two. `layout` has its
/// objects.
///
/// # Errors
/// If the table of System V segments cannot be read.
pub fn check_shared(pid: Tid, layout: &Layout) -> Result<Vec<Reason>, ObjectError> {
    let mut ours: HashMap<u64, String> = HashMap::new();
    for vma in layout.vmas.iter().filter(|v| v.kind() == VmaKind::VmaAnonShared) {
        ours.insert(vma.shm_inode, format!("mapping {:x}-{:x}", vma.start, vma.end));
    }
    ours.extend(layout.objects.iter().map(|o| (o.id, objects::name_of(o))));
    let mut reasons = objects::check_source(layout)?;
    if ours.is_empty() {
        return Ok(reasons);
    }
    let us = Tid::try_from(std::process::id()).unwrap_or(0);
    let others = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let others = others.filter_map(|e| e.file_name().to_str()?.parse::<Tid>().ok());
    for other in others.filter(|p| *p != pid && *p != us) {
        let text = procfs::read(format!("/proc/{other}/maps")).unwrap_or_default();
        let maps = procfs::parse_maps(&text).unwrap_or_default();
        let mapped = maps.iter().filter_map(|m| {
            let kind = kind_of(m).ok()??;
            Some(shared_id(kind, m)).filter(|id| *id != 0)
        });
        let mut theirs: Vec<(u64, &str)> = mapped.map(|id| (id, "maps")).collect();
        theirs.extend(objects::open_in(other).into_iter().map(|id| (id, "has open")));
        theirs.sort_unstable();
        theirs.dedup_by_key(|(id, _)| *id);
        for (id, how) in theirs {
            if let Some(name) = ours.get(&id) {
                let why = format!("is shared memory that process {other} {how} as well");
                reasons.push(Reason::new(name, why, "move or end that process first"));
            }
        }
    }
    Ok(reasons)
}

/// The fields of the mm that /proc tells: all but `brk`, which [`ask_brk`] gets, and the guards.
///
/// # Errors
/// If /proc cannot be read.
pub fn capture_mm(pid: Tid) -> Result<Mm, MapError> {
    let (text, path) = read(format!("/proc/{pid}/stat"))?;
    let s = procfs::parse_stat(&text).map_err(|source| MapError::Parse { path, source })?;
    let (auxv, _) = read(format!("/proc/{pid}/auxv"))?;
    let link = format!("/proc/{pid}/exe");
    let exe_path = std::fs::read_link(&link).map_err(|source| MapError::Read { path: link, source })?;
    Ok(Mm {
        start_code: s.start_code,
        end_code: s.end_code,
        start_data: s.start_data,
        end_data: s.end_data,
        start_brk: s.start_brk,
        brk: 0,
        start_stack: s.start_stack,
        arg_start: s.arg_start,
        arg_end: s.arg_end,
        env_start: s.env_start,
        env_end: s.env_end,
        auxv,
        exe: Some(FileRef { path: exe_path.as_os_str().as_bytes().to_vec(), ..FileRef::default() }),
        guards: Vec::new(),
    })
}

/// Adds the question for the end of the heap to a batch; its answer is the call's result.
pub fn ask_brk(batch: &mut Batch) -> usize {
    batch.call(libc::SYS_brk, &[0u64.into()])
}
