//! Carries out the changes of a memory map in the process that is being built.

use super::capture::ADVICE;
use super::changes::{Change, changes, vdso_group};
use super::{resident, segments};
use crate::engine::remote::{Arg, Batch, Call, InjectError, RemoteCalls};
use crate::engine::state::objects::{Objects, by_window};
use crate::proto::image::{Layout, Mm, Vma, VmaKind};

/// `arch_prctl` code: map the vdso group at this address (include/uapi/asm/prctl.h).
const ARCH_MAP_VDSO_64: u64 = 0x2003;
const MAP_FIXED_NOREPLACE: i32 = 0x10_0000;
/// Instead of MAP_PRIVATE or MAP_SHARED (include/uapi/linux/mman.h).
const MAP_DROPPABLE: i32 = 8;
/// mseal(2).
const SYS_MSEAL: i64 = 462;

/// What a mapping is made from, and how that is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Nothing,
    File(u32, i32),
    Object(u64, i32),
}

fn source_of(vma: &Vma) -> Source {
    match (vma.kind(), vma.file) {
        (VmaKind::VmaFileShared, Some(file)) => Source::File(file, libc::O_RDWR),
        (_, Some(file)) => Source::File(file, libc::O_RDONLY),
        (VmaKind::VmaMemfdPrivate, _) => Source::Object(vma.shm_inode, libc::O_RDONLY),
        _ if by_window(vma) && vma.never_writable => Source::Object(vma.shm_inode, libc::O_RDONLY),
        _ if by_window(vma) => Source::Object(vma.shm_inode, libc::O_RDWR),
        _ => Source::Nothing,
    }
}

/// Unmaps what is not wanted any more: the first half of bringing the skeleton's memory map from `now` to
/// `wanted`. In between, objects can be made: a segment may need the place of one that goes.
///
/// # Errors
/// If a call fails; the skeleton is then of no use.
pub fn unmap(process: &mut dyn RemoteCalls, now: &Layout, wanted: &Layout) -> Result<(), InjectError> {
    let mut batch = Batch::new();
    for change in changes(now, wanted) {
        if let Change::Unmap { start, end } = change {
            batch.call(libc::SYS_munmap, &[start.into(), (end - start).into()]);
        }
    }
    let expected = vec![Some(0); batch.len()];
    run_expecting(process, "unmapping", &batch, &expected)
}

/// The second half, after [`unmap`]: brings the skeleton's memory map to `wanted`, whose `objects` are there.
/// Shared anonymous memory of ordinary pages is mapped writable whatever it will be, so that its pages can be
/// placed; see [`finish`].
///
/// # Errors
/// If a call fails: the map is then in between, and the skeleton of no use.
pub fn reconcile(
    process: &mut dyn RemoteCalls,
    now: &Layout,
    wanted: &Layout,
    objects: &Objects,
) -> Result<(), InjectError> {
    let todo = changes(now, wanted);
    let mut batch = Batch::new();
    let mut expected: Vec<Option<u64>> = Vec::new();
    let mut shared = Vec::new();
    let mut attached = Vec::new();
    let mut open = Source::Nothing;
    let mut push = |batch: &mut Batch, number, args: &[Arg], result: Option<u64>| {
        batch.call(number, args);
        expected.push(result);
    };
    let mut maps: Vec<(u64, u64, usize)> = Vec::new();
    for change in &todo {
        match *change {
            Change::Map { start, end, wanted } => maps.push((start, end, wanted)),
            Change::Unmap { .. } | Change::Adjust { .. } => {}
        }
    }
    // By file, so that each is opened once; the descriptor is always 0, the skeleton has none below.
    maps.sort_by_key(|(start, _, w)| (source_of(&wanted.vmas[*w]), *start));
    for (start, end, w) in maps {
        let vma = &wanted.vmas[w];
        let Ok(kind) = VmaKind::try_from(vma.kind) else { continue };
        let mut flags = MAP_FIXED_NOREPLACE;
        let len = end - start;
        match kind {
            VmaKind::VmaVdso | VmaKind::Invalid => continue,
            VmaKind::VmaSysv => {
                attached.push(w);
                continue;
            }
            VmaKind::VmaAnonShared if !by_window(vma) => {
                shared.push((start, end, w));
                continue;
            }
            VmaKind::VmaAnonPrivate => flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            VmaKind::VmaDroppable => flags |= MAP_DROPPABLE | libc::MAP_ANONYMOUS,
            VmaKind::VmaFilePrivate | VmaKind::VmaMemfdPrivate => flags |= libc::MAP_PRIVATE,
            VmaKind::VmaFileShared | VmaKind::VmaMemfdShared | VmaKind::VmaAnonShared => {
                flags |= libc::MAP_SHARED;
            }
        }
        if vma.page_bytes != 0 && kind == VmaKind::VmaAnonPrivate {
            let size = vma.page_bytes.trailing_zeros() << libc::MAP_HUGE_SHIFT;
            flags |= libc::MAP_HUGETLB | size.cast_signed();
        }
        if vma.grows_down {
            flags |= libc::MAP_GROWSDOWN;
        }
        if vma.noreserve {
            flags |= libc::MAP_NORESERVE;
        }
        let needed = source_of(vma);
        let backed = needed != Source::Nothing;
        if backed && open != needed {
            if open != Source::Nothing {
                push(&mut batch, libc::SYS_close, &[0u64.into()], Some(0));
            }
            open = needed;
            let (path, how) = match needed {
                Source::Nothing => (Vec::new(), 0),
                Source::File(i, how) => {
                    (wanted.files.get(i as usize).map(|f| f.path.clone()).unwrap_or_default(), how)
                }
                Source::Object(id, how) => (objects.path(id).unwrap_or_default().into_bytes(), how),
            };
            let path = batch.input_c_string(&path);
            let at = libc::AT_FDCWD;
            push(&mut batch, libc::SYS_openat, &[at.into(), path, (how | libc::O_CLOEXEC).into()], Some(0));
        }
        let fd: Arg = if backed { 0u64.into() } else { (-1i64).into() };
        let offset = if backed { vma.offset + (start - vma.start) } else { 0 };
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
    if open != Source::Nothing {
        push(&mut batch, libc::SYS_close, &[0u64.into()], Some(0));
    }
    for change in &todo {
        let Change::Adjust { start, end, was, wanted: w } = *change else { continue };
        let (a, b) = (&now.vmas[was], &wanted.vmas[w]);
        let len = end - start;
        if a.prot != b.prot && (b.kind() != VmaKind::VmaAnonShared || by_window(b)) {
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
    let (batch, expected) = segments::attach(wanted, &attached)?;
    run_expecting(process, "attaching shared memory", &batch, &expected)?;
    resident::show(process, wanted)
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

/// What can only be done once all pages are in: protections of shared memory, locks, guards, the numbers of
/// the mm (heap, stack, arguments, auxv), and seals.
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
        if vma.kind() == VmaKind::VmaAnonShared
            && !by_window(vma)
            && vma.prot != vma.prot | writable.unsigned_abs()
        {
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
    // Last: nothing that changes a mapping works on it afterwards.
    for vma in layout.vmas.iter().filter(|v| v.sealed) {
        batch.call(SYS_MSEAL, &[vma.start.into(), (vma.end - vma.start).into(), 0u64.into()]);
        expected.push(Some(0));
    }
    run_expecting(process, "finishing the memory map", &batch, &expected)
}
