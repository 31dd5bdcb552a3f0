//! The memory map: what is mapped where, and from what. Contents are `dirty`'s and the rounds' concern.
//!
//! Capture reads /proc/PID/maps at every round, and the VmFlags of smaps (slow: it walks the page tables)
//! only while the process runs. Restore is a reconciliation: the skeleton's map is brought to the wanted
//! one by unmapping, mapping and protecting what differs.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use crate::engine::procfs::{self, MapsEntry};
use crate::engine::reason::Reason;
use crate::engine::remote::{Arg, Batch, Call, InjectError, RemoteCalls, Tid};
use crate::proto::files::FileRef;
use crate::proto::image::{Layout, Mm, Vma, VmaKind};

/// Why a memory map could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// A file of /proc could not be read.
    #[error("reading {path}")]
    Read {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It could be read, and made no sense.
    #[error("parsing {path}")]
    Parse {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: procfs::ProcfsError,
    },
    /// There are mappings that cannot be carried.
    #[error("{} mappings cannot be carried, the first: {}", .0.len(), .0.first().map(ToString::to_string).unwrap_or_default())]
    Refused(Vec<Reason>),
}

fn read(path: String) -> Result<(Vec<u8>, String), MapError> {
    match std::fs::read(&path) {
        Ok(bytes) => Ok((bytes, path)),
        Err(source) => Err(MapError::Read { path, source }),
    }
}

/// VmFlags by mapping, as of the last look at smaps.
#[derive(Debug, Default, Clone)]
pub struct FlagCache {
    flags: Vec<(u64, u64, Vec<[u8; 2]>)>,
}

impl FlagCache {
    /// Reads smaps: milliseconds per GiB, so only while the process runs.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn look(pid: Tid) -> Result<Self, MapError> {
        let (text, path) = read(format!("/proc/{pid}/smaps"))?;
        let flags = procfs::parse_smaps_flags(&text).map_err(|source| MapError::Parse { path, source })?;
        Ok(Self { flags })
    }

    /// The flags of the mapping that holds `address`.
    fn at(&self, address: u64) -> &[[u8; 2]] {
        let i = self.flags.partition_point(|(_, end, _)| *end <= address);
        self.flags.get(i).filter(|(start, ..)| *start <= address).map_or(&[], |(.., f)| f)
    }
}

/// MADV_* that VmFlags tell of, and what takes each back.
const ADVICE: [(&[u8; 2], i32, i32); 8] = [
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
const REFUSED_FLAGS: [(&[u8; 2], &str); 8] = [
    (b"ht", "is backed by huge pages (hugetlb)"),
    (b"um", "is watched by a userfaultfd of its own"),
    (b"io", "maps device memory"),
    (b"pf", "maps device memory (PFN range)"),
    (b"mm", "maps device memory (mixed)"),
    (b"sf", "is a DAX mapping with MAP_SYNC"),
    (b"dp", "is droppable memory (MAP_DROPPABLE)"),
    (b"ss", "is a shadow stack"),
];

fn describe(m: &MapsEntry) -> String {
    let name = String::from_utf8_lossy(&m.path);
    format!("mapping {:x}-{:x}{}{name}", m.start, m.end, if name.is_empty() { "" } else { " " })
}

/// The kind of a mapping, or why it cannot be carried. `None`: nothing to carry ([vsyscall]).
fn kind_of(m: &MapsEntry) -> Result<Option<VmaKind>, &'static str> {
    let path = m.path.as_slice();
    let has = |prefix: &[u8]| path.starts_with(prefix);
    Ok(Some(match path {
        b"[vsyscall]" => return Ok(None),
        b"[vdso]" => VmaKind::VmaVdso,
        _ if has(b"[vvar") => VmaKind::VmaVdso,
        b"/dev/zero (deleted)" if m.shared => VmaKind::VmaAnonShared,
        _ if has(b"/memfd:") => return Err("maps a memfd, which cannot be carried yet"),
        _ if has(b"/SYSV") => return Err("is System V shared memory, which cannot be carried yet"),
        _ if has(b"/[aio]") => return Err("is an AIO ring (io_setup), which cannot be carried"),
        _ if has(b"anon_inode:") => {
            return Err("maps a kernel object (io_uring, perf), which cannot be carried");
        }
        _ if has(b"/anon_hugepage") => {
            return Err("is backed by huge pages (hugetlb), which cannot be carried yet");
        }
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

/// The memory map as it is now, and all that cannot be carried of it.
#[derive(Debug)]
pub struct CapturedMap {
    /// Mappings and files; `tids` is left empty.
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
    let mut map = CapturedMap { layout: Layout::default(), reasons: Vec::new() };
    for m in &entries {
        let vm_flags = flags.at(m.start);
        let refused = REFUSED_FLAGS.iter().find(|(f, _)| vm_flags.contains(f)).map(|(_, why)| *why);
        let kind = match (kind_of(m), refused) {
            (Ok(None), _) => continue,
            (Ok(Some(VmaKind::VmaVdso)), _) => VmaKind::VmaVdso,
            (Err(why), _) | (Ok(_), Some(why)) => {
                map.reasons.push(Reason::new(describe(m), why, "it must be unmapped before the move"));
                continue;
            }
            (Ok(Some(kind)), None) => kind,
        };
        let file = if matches!(kind, VmaKind::VmaFilePrivate | VmaKind::VmaFileShared) {
            let file = known.entry(m.path.clone()).or_insert_with(|| {
                let file = file_ref(m).map_err(|r| map.reasons.push(r)).ok()?;
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
            shm_inode: if kind == VmaKind::VmaAnonShared { m.inode } else { 0 },
            fresh: false,
            resident: Vec::new(),
            accounted: has(b"ac") && !m.write && !m.shared,
        });
    }
    map.layout.files = files;
    Ok(map)
}

/// The file behind a mapping, which must still be what its path leads to.
fn file_ref(m: &MapsEntry) -> Result<FileRef, Reason> {
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(&m.path));
    let meta = std::fs::metadata(path).map_err(|e| {
        Reason::new(describe(m), format!("maps a file that cannot be reached by its path: {e}"), "")
    })?;
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

/// Shared anonymous memory that another process maps as well: it would be torn in two.
pub fn check_shared(pid: Tid, vmas: &[Vma]) -> Vec<Reason> {
    let ours: HashMap<u64, &Vma> =
        vmas.iter().filter(|v| v.kind() == VmaKind::VmaAnonShared).map(|v| (v.shm_inode, v)).collect();
    let mut reasons = Vec::new();
    if ours.is_empty() {
        return reasons;
    }
    let others = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let others = others.filter_map(|e| e.file_name().to_str()?.parse::<Tid>().ok()).filter(|p| *p != pid);
    for other in others {
        let text = std::fs::read(format!("/proc/{other}/maps")).unwrap_or_default();
        let Ok(maps) = procfs::parse_maps(&text) else { continue };
        let shared = maps.iter().filter(|m| m.shared && m.path == b"/dev/zero (deleted)");
        if let Some(vma) = shared.filter_map(|m| ours.get(&m.inode)).next() {
            reasons.push(Reason::new(
                format!("mapping {:x}-{:x}", vma.start, vma.end),
                format!("is shared memory that process {other} maps as well"),
                "move or end that process first",
            ));
        }
    }
    reasons
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

/// A piece of work on the skeleton's map.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Unmap {
        start: u64,
        end: u64,
    },
    /// Map `start..end` as part of the wanted mapping with this index.
    Map {
        start: u64,
        end: u64,
        wanted: usize,
    },
    /// Protection or advice of a kept piece differs.
    Adjust {
        start: u64,
        end: u64,
        was: usize,
        wanted: usize,
    },
}

/// Whether a piece of `a` can stay where `b` is wanted.
fn same_backing(a: &Vma, b: &Vma, a_files: &[FileRef], b_files: &[FileRef]) -> bool {
    let path = |v: &Vma, files: &[FileRef]| {
        v.file.and_then(|i| files.get(i as usize).map(|f| (f.path.clone(), f.dev, f.ino)))
    };
    let object = |v: &Vma| v.offset.wrapping_sub(v.start);
    a.kind == b.kind
        && a.grows_down == b.grows_down
        && a.noreserve == b.noreserve
        && (a.accounted || !b.accounted)
        && match b.kind() {
            VmaKind::VmaAnonPrivate | VmaKind::VmaVdso => true,
            VmaKind::VmaAnonShared => a.shm_inode == b.shm_inode && object(a) == object(b),
            _ => path(a, a_files) == path(b, b_files) && object(a) == object(b),
        }
}

/// Marks those mappings fresh that have another backing than what was there at the last look: the
/// destination will map them anew, whatever the tracker has seen.
pub fn mark_replaced(now: &mut Layout, before: &Layout) {
    let mut from = 0;
    let Layout { vmas, files, .. } = now;
    for vma in vmas {
        while before.vmas.get(from).is_some_and(|b| b.end <= vma.start) {
            from += 1;
        }
        let overlapping = before.vmas.iter().skip(from).take_while(|b| b.start < vma.end);
        let mut replaced = false;
        for b in overlapping {
            replaced |= !same_backing(b, vma, &before.files, files);
        }
        vma.fresh |= replaced;
    }
}

/// What leads from one map to another: all unmappings first, then the rest. Both sorted by address.
fn changes(now: &Layout, wanted: &Layout) -> Vec<Change> {
    let mut kept: Vec<(u64, u64)> = Vec::new();
    let mut later = Vec::new();
    let mut from = 0;
    for (w, b) in wanted.vmas.iter().enumerate() {
        let mut at = b.start;
        while now.vmas.get(from).is_some_and(|a| a.end <= b.start) {
            from += 1;
        }
        for (n, a) in now.vmas.iter().enumerate().skip(from).take_while(|(_, a)| a.start < b.end) {
            if b.fresh || !same_backing(a, b, &now.files, &wanted.files) {
                continue;
            }
            let (start, end) = (a.start.max(b.start), a.end.min(b.end));
            if at < start {
                later.push(Change::Map { start: at, end: start, wanted: w });
            }
            kept.push((start, end));
            if a.prot != b.prot || a.advice != b.advice {
                later.push(Change::Adjust { start, end, was: n, wanted: w });
            }
            at = end;
        }
        if at < b.end {
            later.push(Change::Map { start: at, end: b.end, wanted: w });
        }
    }
    let mut all = Vec::new();
    let mut k = 0;
    for a in &now.vmas {
        let mut at = a.start;
        while k < kept.len() && kept[k].1 <= a.start {
            k += 1;
        }
        for &(start, end) in kept[k..].iter().take_while(|(start, _)| *start < a.end) {
            if at < start {
                all.push(Change::Unmap { start: at, end: start });
            }
            at = end;
        }
        if at < a.end {
            all.push(Change::Unmap { start: at, end: a.end });
        }
    }
    all.extend(later);
    all
}

/// Where the kernel's own group of mappings ([vvar], [vdso]) begins and ends.
pub fn vdso_group(layout: &Layout) -> Option<(u64, u64)> {
    let mut group = layout.vmas.iter().filter(|v| v.kind() == VmaKind::VmaVdso);
    let first = group.next()?;
    Some((first.start, group.next_back().map_or(first.end, |v| v.end)))
}

/// `arch_prctl` code: map the vdso group at this address (include/uapi/asm/prctl.h).
const ARCH_MAP_VDSO_64: u64 = 0x2003;
const MAP_FIXED_NOREPLACE: i32 = 0x10_0000;

/// Brings the skeleton's memory map from `now` to `wanted`. Shared anonymous memory is mapped writable
/// whatever it will be, so that its pages can be placed; see [`finish`].
///
/// # Errors
/// If a call fails: the map is then in between, and the skeleton of no use.
pub fn reconcile(process: &mut dyn RemoteCalls, now: &Layout, wanted: &Layout) -> Result<(), InjectError> {
    let todo = changes(now, wanted);
    let mut batch = Batch::new();
    let mut expected: Vec<Option<u64>> = Vec::new();
    let mut shared = Vec::new();
    let mut open: Option<(u32, i32)> = None;
    let mut push = |batch: &mut Batch, number, args: &[Arg], result: Option<u64>| {
        batch.call(number, args);
        expected.push(result);
    };
    let mut maps: Vec<(u64, u64, usize)> = Vec::new();
    for change in &todo {
        match *change {
            Change::Unmap { start, end } => {
                push(&mut batch, libc::SYS_munmap, &[start.into(), (end - start).into()], Some(0));
            }
            Change::Map { start, end, wanted } => maps.push((start, end, wanted)),
            Change::Adjust { .. } => {}
        }
    }
    // By file, so that each is opened once; the descriptor is always 0, the skeleton has none below.
    maps.sort_by_key(|(start, _, w)| (wanted.vmas[*w].file, wanted.vmas[*w].kind, *start));
    for (start, end, w) in maps {
        let vma = &wanted.vmas[w];
        let Ok(kind) = VmaKind::try_from(vma.kind) else { continue };
        let mut flags = MAP_FIXED_NOREPLACE;
        let len = end - start;
        match kind {
            VmaKind::VmaVdso | VmaKind::Invalid => continue,
            VmaKind::VmaAnonShared => {
                shared.push((start, end, w));
                continue;
            }
            VmaKind::VmaAnonPrivate => flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            VmaKind::VmaFilePrivate => flags |= libc::MAP_PRIVATE,
            VmaKind::VmaFileShared => flags |= libc::MAP_SHARED,
        }
        if vma.grows_down {
            flags |= libc::MAP_GROWSDOWN;
        }
        if vma.noreserve {
            flags |= libc::MAP_NORESERVE;
        }
        let how = if kind == VmaKind::VmaFileShared { libc::O_RDWR } else { libc::O_RDONLY };
        let needed = vma.file.map(|file| (file, how));
        if needed.is_some() && open != needed {
            if open.is_some() {
                push(&mut batch, libc::SYS_close, &[0u64.into()], Some(0));
            }
            open = needed;
            let path = vma.file.and_then(|i| wanted.files.get(i as usize)).map(|f| f.path.as_slice());
            let path = batch.input_c_string(path.unwrap_or_default());
            let at = libc::AT_FDCWD;
            push(&mut batch, libc::SYS_openat, &[at.into(), path, (how | libc::O_CLOEXEC).into()], Some(0));
        }
        let fd: Arg = if vma.file.is_some() { 0u64.into() } else { (-1i64).into() };
        let offset = if vma.file.is_some() { vma.offset + (start - vma.start) } else { 0 };
        // What has been writable once counts as memory of its own, and stays apart from neighbours.
        let writable = if vma.accounted { libc::PROT_WRITE.unsigned_abs() } else { 0 };
        let args = [start.into(), len.into(), (vma.prot | writable).into(), flags.into(), fd, offset.into()];
        push(&mut batch, libc::SYS_mmap, &args, Some(start));
        if vma.accounted {
            push(&mut batch, libc::SYS_mprotect, &[start.into(), len.into(), vma.prot.into()], Some(0));
        }
        for advice in &vma.advice {
            push(&mut batch, libc::SYS_madvise, &[start.into(), len.into(), (*advice).into()], Some(0));
        }
    }
    if open.is_some() {
        push(&mut batch, libc::SYS_close, &[0u64.into()], Some(0));
    }
    for change in &todo {
        let Change::Adjust { start, end, was, wanted: w } = *change else { continue };
        let (a, b) = (&now.vmas[was], &wanted.vmas[w]);
        let len = end - start;
        if a.prot != b.prot && b.kind() != VmaKind::VmaAnonShared {
            push(&mut batch, libc::SYS_mprotect, &[start.into(), len.into(), b.prot.into()], Some(0));
        }
        let undo = a.advice.iter().filter(|x| !b.advice.contains(x)).filter_map(|x| {
            ADVICE.iter().find(|(_, on, _)| on.unsigned_abs() == *x).map(|(.., off)| off.unsigned_abs())
        });
        for advice in undo.chain(b.advice.iter().copied()) {
            push(&mut batch, libc::SYS_madvise, &[start.into(), len.into(), advice.into()], Some(0));
        }
    }
    let old_group = vdso_group(now);
    if let Some((start, end)) = vdso_group(wanted).filter(|g| Some(*g) != old_group) {
        let _ = end;
        batch.call(libc::SYS_arch_prctl, &[ARCH_MAP_VDSO_64.into(), start.into()]);
        expected.push(None);
    }
    run_expecting(process, "building the memory map", &batch, &expected)?;
    map_shared(process, now, wanted, &shared)?;
    show_file_pages(process, wanted)
}

/// Maps the pages of files that the source has mapped: they count in the resident size, and the process
/// finds them without a fault. Which is all they are for, so failing is no error.
fn show_file_pages(process: &mut dyn RemoteCalls, wanted: &Layout) -> Result<(), InjectError> {
    const MADV_POPULATE_READ: i32 = 22;
    let mut batch = Batch::new();
    for range in wanted.vmas.iter().flat_map(|v| &v.resident) {
        let len = range.end.saturating_sub(range.start);
        batch.call(libc::SYS_madvise, &[range.start.into(), len.into(), MADV_POPULATE_READ.into()]);
    }
    if !batch.is_empty() {
        process.run(&batch)?;
    }
    Ok(())
}

fn run_expecting(
    process: &mut dyn RemoteCalls,
    what: &str,
    batch: &Batch,
    expected: &[Option<u64>],
) -> Result<(), InjectError> {
    if batch.is_empty() {
        return Ok(());
    }
    let outcome = process.run(batch)?;
    for (i, want) in expected.iter().enumerate() {
        let fail = |errno| InjectError::Call {
            what: format!("{what}: {}", batch.calls.get(i).map(show).unwrap_or_default()),
            tid: process.pid(),
            errno,
        };
        let got = outcome.ret(i).map_err(fail)?;
        if want.is_some_and(|w| w != got) {
            return Err(fail(nix::errno::Errno::EEXIST));
        }
    }
    Ok(())
}

fn show(call: &Call) -> String {
    let text: Vec<String> = call
        .args
        .iter()
        .map(|a| match a {
            Arg::Value(v) => format!("{v:#x}"),
            Arg::Data(_) => "data".into(),
        })
        .collect();
    format!("system call {}({})", call.number, text.join(", "))
}

/// Shared anonymous memory: one object per inode of the source, mapped wherever the source maps it.
fn map_shared(
    process: &mut dyn RemoteCalls,
    now: &Layout,
    wanted: &Layout,
    pieces: &[(u64, u64, usize)],
) -> Result<(), InjectError> {
    let mut by_object: std::collections::BTreeMap<u64, Vec<(u64, u64, usize)>> = Default::default();
    for piece in pieces {
        by_object.entry(wanted.vmas[piece.2].shm_inode).or_default().push(*piece);
    }
    for (inode, pieces) in by_object {
        let existing = now.vmas.iter().find(|v| {
            v.kind() == VmaKind::VmaAnonShared
                && v.shm_inode == inode
                && wanted
                    .vmas
                    .iter()
                    .any(|w| w.start <= v.start && v.end <= w.end && w.shm_inode == inode && !w.fresh)
        });
        let size =
            wanted.vmas.iter().filter(|v| v.shm_inode == inode).map(|v| v.offset + (v.end - v.start)).max();
        let size = size.unwrap_or(0);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // A mapping of the object that is there, or one of the whole object, made for the moment.
        let (base, base_end, made) = match existing {
            Some(v) => (v.start, v.end, false),
            None => {
                let mut batch = Batch::new();
                let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
                batch.call(
                    libc::SYS_mmap,
                    &[0u64.into(), size.into(), prot.into(), flags.into(), (-1i64).into(), 0u64.into()],
                );
                let outcome = process.run_all_ok("making shared memory", &batch)?;
                let base = outcome.ret(0).unwrap_or(0);
                (base, base + size, true)
            }
        };
        let mut batch = Batch::new();
        let path = batch.input_c_string(format!("/proc/self/map_files/{base:x}-{base_end:x}").as_bytes());
        let how = libc::O_RDWR | libc::O_CLOEXEC;
        batch.call(libc::SYS_openat, &[libc::AT_FDCWD.into(), path, how.into()]);
        let mut expected = vec![Some(0)];
        if made {
            batch.call(libc::SYS_munmap, &[base.into(), size.into()]);
            expected.push(Some(0));
        }
        for (start, end, w) in pieces {
            let vma = &wanted.vmas[w];
            let offset = vma.offset + (start - vma.start);
            let flags = libc::MAP_SHARED | MAP_FIXED_NOREPLACE;
            let prot = vma.prot | prot.unsigned_abs();
            let args =
                [start.into(), (end - start).into(), prot.into(), flags.into(), 0u64.into(), offset.into()];
            batch.call(libc::SYS_mmap, &args);
            expected.push(Some(start));
            for advice in &vma.advice {
                batch.call(libc::SYS_madvise, &[start.into(), (end - start).into(), (*advice).into()]);
                expected.push(Some(0));
            }
        }
        batch.call(libc::SYS_close, &[0u64.into()]);
        expected.push(Some(0));
        run_expecting(process, "mapping shared memory", &batch, &expected)?;
    }
    Ok(())
}

/// What can only be done once all pages are in: protections of shared memory, locks, guards, and the
/// numbers of the mm (heap, stack, arguments, auxv).
///
/// # Errors
/// If a call fails.
pub fn finish(process: &mut dyn RemoteCalls, layout: &Layout, mm: &Mm) -> Result<(), InjectError> {
    const PR_SET_MM: i32 = 35;
    const PR_SET_MM_MAP: i32 = 14;
    const MADV_GUARD_INSTALL: i32 = 102;
    const MLOCK_ONFAULT: u64 = 1;
    let mut batch = Batch::new();
    let mut expected = Vec::new();
    for vma in &layout.vmas {
        let (start, len) = (vma.start, vma.end - vma.start);
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        if vma.kind() == VmaKind::VmaAnonShared && vma.prot != vma.prot | writable.unsigned_abs() {
            batch.call(libc::SYS_mprotect, &[start.into(), len.into(), vma.prot.into()]);
            expected.push(Some(0));
        }
        if vma.locked {
            batch.call(libc::SYS_mlock2, &[start.into(), len.into(), MLOCK_ONFAULT.into()]);
            expected.push(Some(0));
        }
    }
    for guard in &mm.guards {
        let args = [guard.start.into(), (guard.end - guard.start).into(), MADV_GUARD_INSTALL.into()];
        batch.call(libc::SYS_madvise, &args);
        expected.push(Some(0));
    }
    let exe = mm.exe.as_ref().map(|f| f.path.as_slice()).unwrap_or_default();
    let path = batch.input_c_string(exe);
    batch.call(libc::SYS_openat, &[libc::AT_FDCWD.into(), path, (libc::O_RDONLY | libc::O_CLOEXEC).into()]);
    expected.push(Some(0));
    let auxv = batch.input(&mm.auxv);
    // struct prctl_mm_map: 11 addresses, the auxv's pointer, u32 size, i32 exe descriptor.
    let fields = [
        mm.start_code,
        mm.end_code,
        mm.start_data,
        mm.end_data,
        mm.start_brk,
        mm.brk,
        mm.start_stack,
        mm.arg_start,
        mm.arg_end,
        mm.env_start,
        mm.env_end,
    ];
    let mut map: Vec<u8> = fields.iter().flat_map(|v| v.to_ne_bytes()).collect();
    let pointer_at = map.len();
    map.extend_from_slice(&[0; 8]);
    map.extend_from_slice(&u32::try_from(mm.auxv.len()).unwrap_or(0).to_ne_bytes());
    map.extend_from_slice(&0i32.to_ne_bytes());
    let size = map.len();
    let map = batch.input(&map);
    batch.pointer_to(map, pointer_at, auxv);
    batch.call(libc::SYS_prctl, &[PR_SET_MM.into(), PR_SET_MM_MAP.into(), map, size.into()]);
    expected.push(Some(0));
    batch.call(libc::SYS_close, &[0u64.into()]);
    expected.push(Some(0));
    run_expecting(process, "finishing the memory map", &batch, &expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anon(start: u64, end: u64, prot: u32) -> Vma {
        Vma { start, end, prot, kind: VmaKind::VmaAnonPrivate.into(), ..Vma::default() }
    }
    fn layout(vmas: &[Vma]) -> Layout {
        Layout { vmas: vmas.to_vec(), ..Layout::default() }
    }

    #[test]
    fn an_unchanged_map_needs_nothing() {
        let l = layout(&[anon(0x1000, 0x3000, 3), anon(0x5000, 0x6000, 1)]);
        assert_eq!(changes(&l, &l), []);
    }

    #[test]
    fn growth_maps_only_what_is_new() {
        let now = layout(&[anon(0x1000, 0x3000, 3)]);
        let wanted = layout(&[anon(0x1000, 0x8000, 3)]);
        assert_eq!(changes(&now, &wanted), [Change::Map { start: 0x3000, end: 0x8000, wanted: 0 }]);
    }

    #[test]
    fn a_hole_is_unmapped_and_a_split_keeps_both_sides() {
        let now = layout(&[anon(0x1000, 0x8000, 3)]);
        let wanted = layout(&[anon(0x1000, 0x3000, 3), anon(0x5000, 0x8000, 1)]);
        assert_eq!(
            changes(&now, &wanted),
            [
                Change::Unmap { start: 0x3000, end: 0x5000 },
                Change::Adjust { start: 0x5000, end: 0x8000, was: 0, wanted: 1 }
            ]
        );
    }

    #[test]
    fn a_fresh_mapping_replaces_the_old_one() {
        let now = layout(&[anon(0x1000, 0x3000, 3)]);
        let mut fresh = anon(0x2000, 0x4000, 3);
        fresh.fresh = true;
        let wanted = layout(&[anon(0x1000, 0x2000, 3), fresh]);
        assert_eq!(
            changes(&now, &wanted),
            [
                Change::Unmap { start: 0x2000, end: 0x3000 },
                Change::Map { start: 0x2000, end: 0x4000, wanted: 1 }
            ]
        );
    }
}
