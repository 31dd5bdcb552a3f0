//! System V shared memory segments: the table of them, what stands against a move, what is left behind.

use super::{ObjectError, name_of};
use crate::engine::memory::PAGE_BYTES;
use crate::engine::procfs;
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::engine::sys::shm;
use crate::proto::image::{Layout, Object, ObjectKind, Segment, Vma, VmaKind};

const TABLE: &str = "/proc/sysvipc/shm";
pub(super) const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";
const DEST: u32 = 0o1000;
const LOCKED: u32 = 0o2000;
/// Ids are a sequence number times this, plus the place in the kernel's table.
const PLACES: i32 = 32768;

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) key: i32,
    pub(super) id: i32,
    pub(super) mode: u32,
    pub(super) size: u64,
    creator: Tid,
    last_user: Tid,
    pub(super) attaches: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) creator_uid: u32,
    pub(super) creator_gid: u32,
    /// When it was last attached, and detached (s).
    pub(super) attached: [u64; 2],
}

impl Row {
    pub(super) fn is_removed(&self) -> bool {
        self.mode & DEST != 0
    }
    pub(super) fn is_locked(&self) -> bool {
        self.mode & LOCKED != 0
    }
    /// Whether this is what the process with this number has left here: when it moved away (a segment with a
    /// key stays), or when a move of it to here was cut off by the death of the service. Nobody else has
    /// used it since, so it gives its place to what comes.
    pub(super) fn is_left_by(&self, pid: Tid, object: &Object, segment: &Segment) -> bool {
        (self.id, self.key, self.size) == (segment.id, segment.key, object.size)
            && (self.creator, self.last_user, self.attaches) == (pid, pid, 0)
    }
    /// As its mappings show it.
    pub(super) fn inode(&self) -> u64 {
        u64::from(self.id.cast_unsigned())
    }
}

/// All segments of our namespace, which is also that of the process.
pub(super) fn table() -> Result<Vec<Row>, ObjectError> {
    let text = procfs::read_text(TABLE).map_err(ObjectError::sys("reading", TABLE.to_owned()))?;
    Ok(parse(&text))
}

/// Lines that do not look like rows (the heading) are none.
fn parse(text: &str) -> Vec<Row> {
    let row = |line: &str| {
        // key shmid perms size cpid lpid nattch uid gid cuid cgid atime dtime ...
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let number = |i: usize| words.get(i)?.parse::<u64>().ok();
        let id = |i: usize| words.get(i)?.parse::<u32>().ok();
        Some(Row {
            key: words.first()?.parse().ok()?,
            id: words.get(1)?.parse().ok()?,
            mode: u32::from_str_radix(words.get(2)?, 8).ok()?,
            size: number(3)?,
            creator: words.get(4)?.parse().ok()?,
            last_user: words.get(5)?.parse().ok()?,
            attaches: number(6)?,
            uid: id(7)?,
            gid: id(8)?,
            creator_uid: id(9)?,
            creator_gid: id(10)?,
            attached: [number(11)?, number(12)?],
        })
    };
    text.lines().filter_map(row).collect()
}

/// Where the whole segment would be, of which this mapping is a part.
pub fn attach_range(vma: &Vma, object: &Object) -> Option<(u64, u64)> {
    let unit = object.page_bytes.max(PAGE_BYTES);
    let base = vma.start.checked_sub(vma.offset)?;
    Some((base, base.checked_add(object.size.checked_next_multiple_of(unit)?)?))
}

/// Whether two mappings can be parts of one attach.
pub fn same_attach(a: &Vma, b: &Vma) -> bool {
    a.shm_inode == b.shm_inode && a.start.wrapping_sub(a.offset) == b.start.wrapping_sub(b.offset)
}

/// What stands against carrying the attached segments of a process.
pub fn check_source(layout: &Layout) -> Result<Vec<Reason>, ObjectError> {
    let mut reasons = Vec::new();
    if !layout.objects.iter().any(|o| o.kind() == ObjectKind::ObjectSysv) {
        return Ok(reasons);
    }
    let table = table()?;
    for object in layout.objects.iter().filter(|o| o.kind() == ObjectKind::ObjectSysv) {
        let id = object.segment.as_ref().map_or(-1, |s| s.id);
        let ours = layout.vmas.iter().filter(|v| from(v, object)).count() as u64;
        if let Some(row) = table.iter().find(|r| r.id == id && r.attaches > ours) {
            let why = format!("is attached {} times, {ours} of them by this process", row.attaches);
            reasons.push(Reason::new(name_of(object), why, "detach it in the other processes"));
        }
        for vma in layout.vmas.iter().filter(|v| from(v, object)) {
            let range = attach_range(vma, object);
            let covers = |v: &&Vma| {
                range.is_some_and(|(start, end)| v.start < end && start < v.end) && !same_attach(v, vma)
            };
            let beyond = range.is_none_or(|(_, end)| vma.end > end);
            if beyond || layout.vmas.iter().any(|v| covers(&v)) {
                let object = format!("mapping {:x}-{:x}", vma.start, vma.end);
                let why = "is part of a System V segment, where something else took another part's place";
                reasons.push(Reason::new(object, why, ""));
            }
        }
    }
    Ok(reasons)
}

fn from(vma: &Vma, object: &Object) -> bool {
    vma.kind() == VmaKind::VmaSysv && vma.shm_inode == object.id
}

/// What this host has against these segments of process `pid`.
pub(super) fn check_here(pid: Tid, objects: &[Object]) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let segments: Vec<_> = objects.iter().filter_map(|o| Some((o, o.segment.as_ref()?))).collect();
    if segments.is_empty() {
        return reasons;
    }
    let rows = match table() {
        Ok(rows) => rows,
        Err(error) => {
            return vec![Reason::new(
                "System V shared memory",
                format!("is not to be had here: {error}"),
                "",
            )];
        }
    };
    if let Err(error) = std::fs::File::options().write(true).open(NEXT_ID) {
        let why = format!("cannot get the ids that it had: {NEXT_ID}: {error}");
        reasons.push(Reason::new("System V shared memory", why, ""));
    }
    for (object, segment) in segments {
        let place = |id: i32| id.rem_euclid(PLACES);
        let mut rows = rows.iter().filter(|r| !r.is_left_by(pid, object, segment));
        if let Some(row) = rows.clone().find(|r| place(r.id) == place(segment.id)) {
            let why =
                format!("cannot have its id at the destination, where segment {} has its place", row.id);
            reasons.push(Reason::new(name_of(object), why, "remove that one (ipcrm -m)"));
        } else if let Some(row) = rows.find(|r| segment.key != 0 && r.key == segment.key) {
            let key = segment.key;
            let why =
                format!("cannot have its key {key:#x} at the destination, where segment {} has it", row.id);
            reasons.push(Reason::new(name_of(object), why, "remove that one (ipcrm -m)"));
        }
    }
    reasons
}

/// Removes the segments that a process, which has moved away and is gone here, has left behind: those that
/// only it could know, because they have no key, unless somebody has attached one meanwhile. A segment with
/// a key stays, with the contents it had: others may find it by that key.
pub fn remove_left_behind(objects: &[Object]) {
    let rows = table().unwrap_or_default();
    for segment in objects.iter().filter_map(|o| o.segment.as_ref()).filter(|s| s.key == 0) {
        if rows.iter().any(|r| r.id == segment.id && r.attaches == 0)
            && let Err(errno) = shm::remove_segment(segment.id)
        {
            tracing::warn!(segment = segment.id, %errno, "a System V segment stays behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_read_and_a_heading_is_none() {
        let text = "       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap\n\
                    -559038737      98305  3600                  5000  7655  7655      2  1000   100     0     5 1795270073          0 1795270073                  4096                     0\n";
        let rows = parse(text);
        assert_eq!(rows.len(), 1);
        let row = rows[0];
        assert_eq!((row.key, row.id, row.size, row.attaches), (-559_038_737, 98305, 5000, 2));
        assert_eq!((row.uid, row.gid, row.creator_uid, row.creator_gid), (1000, 100, 0, 5));
        assert!(row.is_removed() && row.is_locked() && row.mode & 0o777 == 0o600);
        let object = Object { size: 5000, ..Object::default() };
        let segment = Segment { id: 98305, key: -559_038_737, ..Segment::default() };
        let left = Row { attaches: 0, last_user: 7655, ..row };
        assert!(left.is_left_by(7655, &object, &segment));
        assert!(!row.is_left_by(7655, &object, &segment), "it is attached");
        assert!(!left.is_left_by(7656, &object, &segment), "another process made it");
        assert!(!Row { last_user: 1, ..left }.is_left_by(7655, &object, &segment), "somebody used it");
        assert!(!Row { id: 98306, ..left }.is_left_by(7655, &object, &segment), "another one");
    }

    #[test]
    fn a_part_of_an_attach_whose_place_is_taken_is_refused() {
        let object = Object {
            id: 7,
            kind: ObjectKind::ObjectSysv.into(),
            size: 5000,
            segment: Some(crate::proto::image::Segment { id: -5, ..Default::default() }),
            ..Object::default()
        };
        let part = |start: u64, end: u64, offset: u64| Vma {
            start,
            end,
            offset,
            kind: VmaKind::VmaSysv.into(),
            shm_inode: 7,
            ..Vma::default()
        };
        let anon =
            |start: u64, end: u64| Vma { start, end, kind: VmaKind::VmaAnonPrivate.into(), ..Vma::default() };
        let with = |vmas: Vec<Vma>| Layout { vmas, objects: vec![object.clone()], ..Layout::default() };
        let refused = |layout: &Layout| check_source(layout).unwrap().len();
        assert_eq!(refused(&with(vec![part(0x1000, 0x3000, 0), anon(0x3000, 0x4000)])), 0);
        assert_eq!(refused(&with(vec![part(0x1000, 0x2000, 0), part(0x2000, 0x3000, 0x1000)])), 0);
        assert_eq!(refused(&with(vec![part(0x1000, 0x2000, 0), anon(0x2000, 0x3000)])), 1);
        assert_eq!(refused(&with(vec![part(0x1000, 0x4000, 0)])), 1);
    }
}
