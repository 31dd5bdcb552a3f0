//! The objects at the destination: made, filled through descriptors of ours, and finished.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown};

use super::find::flags_of;
use super::{ObjectError, WINDOWS_END, WINDOWS_START, by_window, from_object, name_of, sysv, window_range};
use crate::engine::memory::PAGE_BYTES;
use crate::engine::remote::{Arg, Batch, InjectError, RemoteCalls};
use crate::engine::sys::shm;
use crate::proto::image::{Layout, Object, ObjectKind, Segment, Vma, VmaKind};

/// Longest name of a memfd (NAME_MAX less the kernel's prefix).
const NAME_BYTES: usize = 249;
/// Objects of a process, at most.
const MAX_OBJECTS: usize = 65_536;

#[derive(Debug)]
struct Made {
    image: Object,
    file: File,
}

/// The objects of a process that is being built. Unless it is [`Objects::keep`]t, nothing of them stays.
#[derive(Debug, Default)]
pub struct Objects {
    made: BTreeMap<u64, Made>,
}

impl Objects {
    /// Lets go of what is not wanted any more, once `unmap` has unmapped it.
    ///
    /// # Errors
    /// That of `unmap`; the process is then of no use.
    pub fn forget(
        &mut self,
        wanted: &[Object],
        unmap: impl FnOnce() -> Result<(), InjectError>,
    ) -> Result<(), ObjectError> {
        unmap()?;
        let still = |made: &Made| wanted.iter().any(|o| o.id == made.image.id && same(o, &made.image));
        let gone: Vec<u64> = self.made.iter().filter(|(_, m)| !still(m)).map(|(id, _)| *id).collect();
        for made in gone.iter().filter_map(|id| self.made.remove(id)) {
            remove(&made.image);
        }
        Ok(())
    }

    /// Makes what is new in `wanted` and brings the sizes up to date.
    ///
    /// # Errors
    /// See [`ObjectError`]; the process is then of no use.
    pub fn reconcile(&mut self, process: &mut dyn RemoteCalls, wanted: &[Object]) -> Result<(), ObjectError> {
        for object in wanted {
            let failed = |step| ObjectError::sys(step, name_of(object));
            let made = match self.made.entry(object.id) {
                Entry::Occupied(there) => there.into_mut(),
                Entry::Vacant(place) => {
                    let file = make(process, object)?;
                    place.insert(Made { image: object.clone(), file })
                }
            };
            made.image = object.clone();
            let len = made.file.metadata().map_err(failed("examining"))?.len();
            if object.kind() == ObjectKind::ObjectMemfd && len != object.size {
                made.file.set_len(object.size).map_err(failed("setting the size"))?;
            }
        }
        Ok(())
    }

    /// The object with this id.
    pub fn fd(&self, id: u64) -> Option<BorrowedFd<'_>> {
        self.made.get(&id).map(|m| m.file.as_fd())
    }

    /// A path by which the process being built can open the object.
    pub(in crate::engine) fn path(&self, id: u64) -> Option<String> {
        let fd = self.made.get(&id)?.file.as_raw_fd();
        Some(format!("/proc/{}/fd/{fd}", std::process::id()))
    }

    /// Writes whole pages at an address of a window.
    ///
    /// # Errors
    /// See [`ObjectError`].
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), ObjectError> {
        let made = self.find(address, bytes.len() as u64)?;
        let failed = |step| ObjectError::sys(step, name_of(&made.image));
        let offset = address - made.image.window;
        let unit = made.image.page_bytes;
        if unit != 0 {
            let mut at = 0;
            while at < bytes.len() {
                let within = (offset + at as u64) % unit;
                let part = usize::try_from(unit - within).unwrap_or(bytes.len()).min(bytes.len() - at);
                let start = offset + at as u64 - within;
                let (unit, within) = (to_usize(unit)?, to_usize(within)?);
                let piece = bytes.get(at..at + part).unwrap_or_default();
                shm::write_mapped(made.file.as_fd(), start, unit, within, piece)
                    .map_err(failed("writing into"))?;
                at += part;
            }
            return Ok(());
        }
        // The last page may reach beyond the end, which a write would move.
        let whole = to_usize((made.image.size & !(PAGE_BYTES - 1)).saturating_sub(offset))?.min(bytes.len());
        let (body, tail) = bytes.split_at(whole);
        let name = name_of(&made.image);
        made.file.write_all_at(body, offset).map_err(ObjectError::sys("writing into", name))?;
        if !tail.is_empty() {
            let page = to_usize(PAGE_BYTES)?;
            shm::write_mapped(made.file.as_fd(), offset + whole as u64, page, 0, tail)
                .map_err(failed("writing into"))?;
        }
        Ok(())
    }

    /// Takes pages of a window out: they read as zeros from then on.
    ///
    /// # Errors
    /// See [`ObjectError`].
    pub fn punch(&self, start: u64, end: u64) -> Result<(), ObjectError> {
        let made = self.find(start, end - start)?;
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed = |v: u64| i64::try_from(v).map_err(|_| ObjectError::Invalid("an address"));
        fallocate(made.file.as_fd(), flags, signed(start - made.image.window)?, signed(end - start)?)
            .map_err(ObjectError::sys("punching a hole into", name_of(&made.image)))
    }

    fn find(&self, address: u64, len: u64) -> Result<&Made, ObjectError> {
        let holds = |made: &&Made| {
            let (start, end) = window_range(&made.image);
            address >= start && address.checked_add(len).is_some_and(|e| e <= end)
        };
        self.made.values().find(holds).ok_or(ObjectError::Invalid("pages outside of all objects"))
    }

    /// Sets what would have been in the way before: owners, times, seals; removes segments that were
    /// removed already and lived on by their attaches.
    ///
    /// # Errors
    /// See [`ObjectError`].
    pub fn finish(&self, process: &mut dyn RemoteCalls) -> Result<(), ObjectError> {
        let mut batch = Batch::new();
        for made in self.made.values() {
            match (made.image.kind(), &made.image.segment) {
                (ObjectKind::ObjectMemfd, _) => finish_memfd(made)?,
                (ObjectKind::ObjectSysv, Some(segment)) => {
                    for (wanted, what) in
                        [(segment.locked, libc::SHM_LOCK), (segment.removed, libc::IPC_RMID)]
                    {
                        if wanted {
                            batch.call(libc::SYS_shmctl, &[segment.id.into(), what.into(), 0u64.into()]);
                        }
                    }
                }
                _ => {}
            }
        }
        if !batch.is_empty() {
            process.run_all_ok("finishing shared memory", &batch)?;
        }
        Ok(())
    }

    /// The process has been accepted: its objects stay with it, and we let go of them.
    pub fn keep(&mut self) {
        self.made.clear();
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        self.made.values().for_each(|made| remove(&made.image));
    }
}

/// Segments are the only objects that outlive those who hold them.
fn remove(image: &Object) {
    if let Some(segment) = &image.segment
        && let Err(errno) = shm::remove_segment(segment.id)
        && errno != Errno::EINVAL
    {
        tracing::warn!(segment = segment.id, %errno, "a System V segment stays behind");
    }
}

/// Whether one object can go on as the other.
fn same(a: &Object, b: &Object) -> bool {
    let fixed = a.kind() == ObjectKind::ObjectMemfd || a.size == b.size;
    a.kind == b.kind && a.window == b.window && a.page_bytes == b.page_bytes && fixed && a.name == b.name
}

fn to_usize(v: u64) -> Result<usize, ObjectError> {
    usize::try_from(v).map_err(|_| ObjectError::Invalid("a size"))
}

fn make(process: &mut dyn RemoteCalls, object: &Object) -> Result<File, ObjectError> {
    match (object.kind(), &object.segment) {
        (ObjectKind::ObjectMemfd, _) => make_memfd(object),
        (ObjectKind::ObjectSysv, Some(segment)) => make_segment(process, object, segment),
        (ObjectKind::ObjectHugeShared, _) => {
            let mut batch = Batch::new();
            let size = object.page_bytes.trailing_zeros() << libc::MAP_HUGE_SHIFT;
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | size.cast_signed();
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let len = object.size;
            let args = [0u64.into(), len.into(), prot.into(), flags.into(), (-1i64).into(), 0u64.into()];
            batch.call(libc::SYS_mmap, &args);
            let at = process.run_all_ok("mapping shared huge pages", &batch)?.ret(0).unwrap_or(0);
            let file = open_mapped(process, object, at, at + len)?;
            let mut batch = Batch::new();
            batch.call(libc::SYS_munmap, &[at.into(), len.into()]);
            process.run_all_ok("unmapping shared huge pages", &batch)?;
            Ok(file)
        }
        _ => Err(ObjectError::Invalid("an object of unknown kind")),
    }
}

fn open_mapped(
    process: &dyn RemoteCalls,
    object: &Object,
    start: u64,
    end: u64,
) -> Result<File, ObjectError> {
    let path = format!("/proc/{}/map_files/{start:x}-{end:x}", process.pid());
    File::options().read(true).write(true).open(path).map_err(ObjectError::sys("opening", name_of(object)))
}

fn make_memfd(object: &Object) -> Result<File, ObjectError> {
    const MFD_NOEXEC_SEAL: u32 = 8;
    const MFD_EXEC: u32 = 16;
    const F_SEAL_EXEC: u32 = 0x20;
    let failed = |step| ObjectError::sys(step, name_of(object));
    // A host may forbid executable ones: ask for none if it was none.
    let exec = match object.seals & F_SEAL_EXEC != 0 && object.mode & 0o111 == 0 {
        true => MFD_NOEXEC_SEAL,
        false => MFD_EXEC,
    };
    let flags = MFdFlags::MFD_CLOEXEC
        | MFdFlags::MFD_ALLOW_SEALING
        | flags_of(object.page_bytes)
        | MFdFlags::from_bits_retain(exec);
    memfd_create(object.name.as_slice(), flags).map(File::from).map_err(failed("making"))
}

fn finish_memfd(made: &Made) -> Result<(), ObjectError> {
    let image = &made.image;
    let failed = |step| ObjectError::sys(step, name_of(image));
    let owner = (Uid::from_raw(image.uid), Gid::from_raw(image.gid));
    fchown(&made.file, Some(owner.0), Some(owner.1)).map_err(failed("setting the owner"))?;
    let mode = Mode::from_bits_retain(image.mode);
    let now = made.file.metadata().map_err(ObjectError::sys("examining", name_of(image)))?;
    if std::os::unix::fs::MetadataExt::mode(&now) & 0o7777 != image.mode {
        fchmod(&made.file, mode).map_err(failed("setting the permissions"))?;
    }
    let time = |ns: i64| TimeSpec::new(ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    futimens(&made.file, &time(image.accessed_ns), &time(image.modified_ns))
        .map_err(failed("setting the times"))?;
    let seals = SealFlag::from_bits_retain(image.seals.cast_signed());
    if !seals.is_empty() {
        fcntl(&made.file, FcntlArg::F_ADD_SEALS(seals)).map_err(failed("sealing"))?;
    }
    Ok(())
}

/// Makes a segment with the id it had, by the process itself and as who it was made by; we keep the file
/// behind it.
fn make_segment(
    process: &mut dyn RemoteCalls,
    object: &Object,
    segment: &Segment,
) -> Result<File, ObjectError> {
    const SHM_HUGETLB: u32 = 0o4000;
    // struct shmid64_ds, of which IPC_SET takes uid, gid and mode.
    const DS_BYTES: usize = 112;
    static NEXT_ID: Mutex<()> = Mutex::new(());
    let keep = Arg::from(-1i64);
    let mut batch = Batch::new();
    if segment.creator_gid != 0 {
        batch.call(libc::SYS_setresgid, &[keep, segment.creator_gid.into(), keep]);
    }
    if segment.creator_uid != 0 {
        batch.call(libc::SYS_setresuid, &[keep, segment.creator_uid.into(), keep]);
    }
    let mut flags = object.mode & 0o777 | (libc::IPC_CREAT | libc::IPC_EXCL).cast_unsigned();
    if object.page_bytes != 0 {
        flags |= SHM_HUGETLB | object.page_bytes.trailing_zeros() << libc::MAP_HUGE_SHIFT;
    }
    let made = batch.call(libc::SYS_shmget, &[segment.key.into(), object.size.into(), flags.into()]);
    if segment.creator_uid != 0 {
        batch.call(libc::SYS_setresuid, &[keep, 0u32.into(), keep]);
    }
    if segment.creator_gid != 0 {
        batch.call(libc::SYS_setresgid, &[keep, 0u32.into(), keep]);
    }
    if sysv::table()?.iter().any(|r| r.is_left_by(process.pid(), object, segment)) {
        shm::remove_segment(segment.id).map_err(ObjectError::sys("replacing", name_of(object)))?;
    }
    let outcome = {
        let _one_at_a_time = NEXT_ID.lock();
        std::fs::write(sysv::NEXT_ID, segment.id.to_string())
            .map_err(ObjectError::sys("choosing the id", name_of(object)))?;
        process.run(&batch)?
    };
    let got = outcome.ret(made).map_err(ObjectError::sys("making", name_of(object)))?;
    let made_id = i32::try_from(got).unwrap_or(-1);
    let result = (|| {
        if made_id != segment.id {
            return Err(ObjectError::SegmentId { wanted: segment.id, got });
        }
        let mut batch = Batch::new();
        let mut ds = [0u8; DS_BYTES];
        for (at, value) in [(4, object.uid), (8, object.gid), (20, object.mode & 0o777)] {
            ds[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        let ds = batch.input(&ds);
        batch.call(libc::SYS_shmctl, &[segment.id.into(), libc::IPC_SET.into(), ds]);
        let at = batch.call(libc::SYS_shmat, &[segment.id.into(), 0u64.into(), 0u64.into()]);
        let outcome = process.run_all_ok("attaching a segment", &batch)?;
        let at = outcome.ret(at).unwrap_or(0);
        let unit = object.page_bytes.max(PAGE_BYTES);
        let file = open_mapped(process, object, at, at + object.size.next_multiple_of(unit));
        let mut batch = Batch::new();
        batch.call(libc::SYS_shmdt, &[at.into()]);
        process.run_all_ok("detaching a segment", &batch)?;
        file
    })();
    if result.is_err() {
        let _ = shm::remove_segment(made_id);
    }
    result
}

/// The rules of a map from a peer that everything here relies on.
///
/// # Errors
/// The rule that is broken.
pub fn check(layout: &Layout) -> Result<(), &'static str> {
    if layout.objects.len() > MAX_OBJECTS {
        return Err("too many objects");
    }
    let mut windows = Vec::with_capacity(layout.objects.len());
    let mut last = None;
    for object in &layout.objects {
        if last.is_some_and(|last| last >= object.id) {
            return Err("objects out of order");
        }
        last = Some(object.id);
        let unit = object.page_bytes.max(PAGE_BYTES);
        if object.page_bytes != 0 && (!object.page_bytes.is_power_of_two() || unit == PAGE_BYTES) {
            return Err("an object's page size");
        }
        let in_order = object.window >= WINDOWS_START && object.window.is_multiple_of(unit);
        let end = object.size.checked_next_multiple_of(unit).and_then(|s| object.window.checked_add(s));
        if !in_order || end.is_none_or(|end| end > WINDOWS_END) {
            return Err("an object's window");
        }
        let of_its_kind = match object.kind() {
            ObjectKind::Invalid => false,
            ObjectKind::ObjectSysv => object.segment.is_some(),
            ObjectKind::ObjectHugeShared => object.page_bytes != 0 && object.segment.is_none(),
            ObjectKind::ObjectMemfd => object.name.len() <= NAME_BYTES && object.segment.is_none(),
        };
        if !of_its_kind || object.mode > 0o7777 {
            return Err("an object of unknown kind");
        }
        windows.push(window_range(object));
    }
    windows.sort_unstable();
    if windows.windows(2).any(|w| matches!(w, [a, b] if a.1 > b.0)) {
        return Err("windows overlap");
    }
    layout.vmas.iter().filter(|v| from_object(v) || v.page_bytes != 0).try_for_each(|v| of(v, layout))
}

/// A mapping of an object fits it.
fn of(vma: &Vma, layout: &Layout) -> Result<(), &'static str> {
    let unit = vma.page_bytes.max(PAGE_BYTES);
    if !unit.is_power_of_two() || [vma.start, vma.end, vma.offset].iter().any(|v| !v.is_multiple_of(unit)) {
        return Err("a mapping of huge pages is not aligned");
    }
    if !from_object(vma) {
        let private = vma.kind() == VmaKind::VmaAnonPrivate;
        return if private { Ok(()) } else { Err("huge pages of a kind that has none") };
    }
    let object = layout.objects.binary_search_by_key(&vma.shm_inode, |o| o.id).ok();
    let Some(object) = object.and_then(|i| layout.objects.get(i)) else {
        return Err("a mapping without its object");
    };
    let kind = match object.kind() {
        ObjectKind::ObjectSysv => vma.kind() == VmaKind::VmaSysv,
        ObjectKind::ObjectHugeShared => vma.kind() == VmaKind::VmaAnonShared && by_window(vma),
        _ => matches!(vma.kind(), VmaKind::VmaMemfdShared | VmaKind::VmaMemfdPrivate),
    };
    if kind && vma.page_bytes == object.page_bytes { Ok(()) } else { Err("a mapping of another object") }
}
