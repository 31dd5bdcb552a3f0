//! Which objects there are, by device and inode, and what each is.

use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::sysv::Row;
use super::{ObjectError, huge};
use crate::engine::remote::Tid;
use crate::proto::image::{Object, ObjectKind, Segment};

/// Inodes of ordinary and of huge pages, and the ids of segments, are numbered separately.
const SYSV_TAG: u64 = 1 << 56;
const HUGE_TAG: u64 = 2 << 56;

/// What is behind a file of one of the kernel's own mounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Ordinary pages.
    Shmem,
    /// Huge pages of this size.
    Huge(u64),
}

impl Backing {
    /// As `page_bytes` of the image: 0 for ordinary pages.
    pub fn page_bytes(self) -> u64 {
        match self {
            Backing::Shmem => 0,
            Backing::Huge(bytes) => bytes,
        }
    }
}

/// The devices of the kernel's own mounts, which are those of memfds of ours.
fn mounts() -> &'static [((u32, u32), Backing)] {
    static MOUNTS: OnceLock<Vec<((u32, u32), Backing)>> = OnceLock::new();
    MOUNTS.get_or_init(|| {
        let sizes = huge::sizes().into_iter().map(Backing::Huge);
        let device = |backing: Backing| {
            let flags = MFdFlags::MFD_CLOEXEC | flags_of(backing.page_bytes());
            let file = File::from(memfd_create(c"migrate", flags).ok()?);
            Some((device_of(&file.metadata().ok()?), backing))
        };
        std::iter::once(Backing::Shmem).chain(sizes).filter_map(device).collect()
    })
}

/// The flags of memfd_create(2) for pages of this size.
pub(super) fn flags_of(page_bytes: u64) -> MFdFlags {
    const SIZE_SHIFT: u32 = 26;
    if page_bytes == 0 {
        return MFdFlags::empty();
    }
    MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(page_bytes.trailing_zeros() << SIZE_SHIFT)
}

fn device_of(meta: &Metadata) -> (u32, u32) {
    (libc::major(meta.dev()), libc::minor(meta.dev()))
}

/// What is behind a file of this device; `None`: it is none of the kernel's own mounts.
pub fn backing(device: (u32, u32)) -> Option<Backing> {
    mounts().iter().find(|(d, _)| *d == device).map(|(_, b)| *b)
}

/// The id of an object: for a segment its number, which is also the inode that its mappings show.
pub fn object_id(kind: ObjectKind, page_bytes: u64, inode: u64) -> u64 {
    match kind {
        ObjectKind::ObjectSysv => SYSV_TAG | inode,
        _ if page_bytes != 0 => HUGE_TAG | inode,
        _ => inode,
    }
}

/// The id and page size of the memfd that a descriptor leads to; `None`: it is none.
pub fn id_of_memfd(meta: &Metadata) -> Option<(u64, u64)> {
    let page_bytes = backing(device_of(meta))?.page_bytes();
    Some((object_id(ObjectKind::ObjectMemfd, page_bytes, meta.ino()), page_bytes))
}

/// A way to an object: what it should be, and a path by which it opens.
#[derive(Debug, Clone)]
pub(super) struct Lead {
    pub(super) id: u64,
    pub(super) kind: ObjectKind,
    pub(super) page_bytes: u64,
    pub(super) path: PathBuf,
    pub(super) is_descriptor: bool,
}

/// The memfds that a process has open, once per descriptor. `others` are numbers of descriptors that are known to be
/// something else: to ask what each leads to takes its time.
pub(super) fn open_memfds(pid: Tid, others: &HashSet<i32>) -> Result<Vec<Lead>, ObjectError> {
    let mut found = Vec::new();
    let failed = || ObjectError::sys("listing the descriptors", format!("process {pid}"));
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed())? {
        let entry = entry.map_err(failed())?;
        if entry.file_name().to_str().and_then(|s| s.parse().ok()).is_some_and(|n| others.contains(&n)) {
            continue;
        }
        let path = entry.path();
        // Closed meanwhile, or none: nothing to carry.
        let Ok(link) = std::fs::read_link(&path) else { continue };
        if !link.as_os_str().as_bytes().starts_with(b"/memfd:") {
            continue;
        }
        let Some((id, page_bytes)) = std::fs::metadata(&path).ok().and_then(|m| id_of_memfd(&m)) else {
            continue;
        };
        let kind = ObjectKind::ObjectMemfd;
        found.push(Lead { id, kind, page_bytes, path, is_descriptor: true });
    }
    Ok(found)
}

/// When an object was changed by calls, not by stores; and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) changed_ns: i64,
    pub(super) modified_ns: i64,
    pub(super) size: u64,
    /// When a segment was last attached and detached (s).
    pub(super) attached: [u64; 2],
}

/// Opens what a lead leads to; `None`: it leads elsewhere by now.
pub(super) fn open(lead: &Lead) -> Result<Option<File>, ObjectError> {
    let file = match File::open(&lead.path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(ObjectError::sys("opening", lead.path.display().to_string())(e)),
    };
    let meta = file.metadata().map_err(ObjectError::sys("examining", lead.path.display().to_string()))?;
    let same = backing(device_of(&meta)).is_some_and(|b| {
        b.page_bytes() == lead.page_bytes && object_id(lead.kind, lead.page_bytes, meta.ino()) == lead.id
    });
    Ok(same.then_some(file))
}

/// Whether two files with one number are one: made at the same time.
pub(super) fn is_same(a: &File, b: &File) -> bool {
    let made = |file: &File| file.metadata().and_then(|meta| meta.created()).ok();
    made(a).is_some() && made(a) == made(b)
}

/// What an object is now. `None`: a segment that is not in the table (any more).
pub(super) fn describe(
    file: &File,
    lead: &Lead,
    table: &[Row],
) -> Result<Option<(Object, Stamp)>, ObjectError> {
    let failed = |step| ObjectError::sys(step, lead.path.display().to_string());
    let meta = file.metadata().map_err(failed("examining"))?;
    let ns = |s: i64, ns: i64| s.saturating_mul(1_000_000_000).saturating_add(ns);
    let mut stamp = Stamp {
        changed_ns: ns(meta.ctime(), meta.ctime_nsec()),
        modified_ns: ns(meta.mtime(), meta.mtime_nsec()),
        size: meta.size(),
        attached: [0; 2],
    };
    let mut object = Object {
        id: lead.id,
        kind: lead.kind.into(),
        size: meta.size(),
        page_bytes: lead.page_bytes,
        ..Object::default()
    };
    match lead.kind {
        ObjectKind::ObjectMemfd => {
            object.name = name(file, lead)?;
            object.mode = meta.mode() & 0o7777;
            (object.uid, object.gid) = (meta.uid(), meta.gid());
            let seals = fcntl(file.as_fd(), FcntlArg::F_GET_SEALS)
                .map_err(ObjectError::sys("reading the seals", lead.path.display().to_string()))?;
            object.seals = seals.cast_unsigned();
            object.accessed_ns = ns(meta.atime(), meta.atime_nsec());
            object.modified_ns = stamp.modified_ns;
        }
        ObjectKind::ObjectSysv => {
            let Some(row) = table.iter().find(|r| object_id(lead.kind, 0, r.inode()) == lead.id) else {
                return Ok(None);
            };
            object.mode = row.mode & 0o777;
            (object.uid, object.gid) = (row.uid, row.gid);
            object.size = row.size;
            stamp.attached = row.attached;
            object.segment = Some(Segment {
                id: row.id,
                key: row.key,
                creator_uid: row.creator_uid,
                creator_gid: row.creator_gid,
                removed: row.is_removed(),
                locked: row.is_locked(),
            });
        }
        ObjectKind::ObjectHugeShared | ObjectKind::Invalid => {}
    }
    Ok(Some((object, stamp)))
}

/// The name that it was made with: not as maps shows it, where newlines are escaped.
fn name(file: &File, lead: &Lead) -> Result<Vec<u8>, ObjectError> {
    use std::os::fd::AsRawFd;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(ObjectError::sys("reading the name", lead.path.display().to_string()))?;
    let link = link.as_os_str().as_bytes();
    let name = link.strip_prefix(b"/memfd:").unwrap_or(link);
    Ok(name.strip_suffix(b" (deleted)").unwrap_or(name).to_vec())
}

/// The memfds that another process has open, by id; nothing if it is gone.
pub fn open_in(pid: Tid) -> Vec<u64> {
    open_memfds(pid, &HashSet::new()).unwrap_or_default().into_iter().map(|lead| lead.id).collect()
}
