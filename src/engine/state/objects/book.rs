//! The objects of a process at the source: found again at every look, kept open, read.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use nix::unistd::{Whence, lseek64};

use super::find::{self, Lead, Stamp};
use super::{
    ObjectError, WINDOW_STEP, WINDOWS_END, WINDOWS_START, by_window, from_object, sysv, window_range,
};
use crate::engine::extents::Extents;
use crate::engine::memory::{Memory, PAGE_BYTES};
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::proto::image::{Layout, Object, ObjectKind, Vma, VmaKind};

/// A change that is older than this when we first look has a time of its own: later ones will differ. (Times
/// of files may move on by ticks of the clock, of up to 10 ms.)
const SETTLED: Duration = Duration::from_millis(50);

/// An object that is kept open for reading.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) file: File,
    pub(super) image: Object,
    /// Bytes of its window.
    span: u64,
    /// As it was while the process stood still, before the first round. `None`: it was not there then, or
    /// changed just before.
    pub(super) baseline: Option<Stamp>,
    /// Whether the process has a descriptor of it, and whether it had one at some look.
    pub(super) is_open: bool,
    pub(super) was_open: bool,
    /// Stores to it were reported at some time.
    pub(super) was_stored: bool,
    /// At some time a page of it was mapped at two places at once, or was unmapped.
    has_views: bool,
    /// Its pages that were mapped at the last selection, as offsets.
    mapped: Extents,
    /// When it was seen first (s).
    pub(super) seen_at: u64,
    /// What was selected as perhaps changed and held nothing, as addresses of the window.
    pub(super) holes: Extents,
    /// At the last look, and at the one before.
    pub(super) now: Stamp,
    pub(super) before: Option<Stamp>,
}

/// All of them.
#[derive(Debug)]
pub struct ObjectBook {
    pid: Tid,
    pub(super) held: BTreeMap<u64, Held>,
    next_window: u64,
    /// Descriptors that lead to no object, at the next look.
    passed_over: HashSet<i32>,
}

impl ObjectBook {
    /// Nothing known yet.
    pub fn new(pid: Tid) -> Self {
        Self { pid, held: BTreeMap::new(), next_window: WINDOWS_START, passed_over: HashSet::new() }
    }

    /// Takes down how the objects of the stopped process are, to know later which were changed by calls: no
    /// call is under way now.
    ///
    /// # Errors
    /// See [`ObjectError`].
    pub fn start(&mut self, layout: &mut Layout) -> Result<(), ObjectError> {
        self.look(layout, false)?;
        let settled = since_epoch().saturating_sub(SETTLED).as_nanos();
        for held in self.held.values_mut() {
            let changed = u128::try_from(held.now.changed_ns.max(held.now.modified_ns)).unwrap_or(0);
            held.baseline = (changed < settled).then_some(held.now);
        }
        Ok(())
    }

    /// At the next look, these descriptors of the stopped process need not be looked at: they are sockets.
    pub fn pass_over(&mut self, sockets: HashSet<i32>) {
        self.passed_over = sockets;
    }

    /// Finds the objects that are mapped in `layout` or open, and adds them to it. Mappings of a running
    /// process whose object cannot be reached any more are taken out: they are gone.
    ///
    /// # Errors
    /// See [`ObjectError`].
    pub fn look(&mut self, layout: &mut Layout, running: bool) -> Result<Vec<Reason>, ObjectError> {
        let leads = leads(self.pid, &layout.vmas, &std::mem::take(&mut self.passed_over))?;
        let segments = leads.values().flatten().any(|lead| lead.kind == ObjectKind::ObjectSysv);
        let table = if segments { sysv::table()? } else { Vec::new() };
        let mut reasons = Vec::new();
        let mut objects = Vec::new();
        for ((id, _), leads) in leads {
            let Some(lead) = leads.first() else { continue };
            let is_open = leads.iter().any(|lead| lead.is_descriptor);
            // Ids of segments are used again, so a segment may be another one than before.
            let is_held = self.held.contains_key(&id);
            let reused = is_held && lead.kind == ObjectKind::ObjectSysv;
            let mut opened = match is_held && !reused {
                true => None,
                false => leads.iter().find_map(|lead| find::open(lead).transpose()).transpose()?,
            };
            if let (true, Some(file)) = (reused, &opened) {
                if self.held.get(&id).is_some_and(|held| find::is_same(&held.file, file)) {
                    opened = None;
                } else {
                    self.held.remove(&id);
                }
            }
            let Some(file) = opened.as_ref().or(self.held.get(&id).map(|h| &h.file)) else { continue };
            let Some((mut image, now)) = find::describe(file, lead, &table)? else { continue };
            if image.size > WINDOWS_END - WINDOWS_START - WINDOW_STEP {
                reasons.push(Reason::new(super::name_of(&image), "is too large to be carried", ""));
                continue;
            }
            match self.held.get_mut(&id) {
                Some(held) if image.size <= held.span => {
                    image.window = held.image.window;
                    (held.image, held.now) = (image.clone(), now);
                    held.is_open = is_open;
                    held.was_open |= is_open;
                }
                Some(_) => {
                    let why = "has grown beyond all expectations during the move";
                    reasons.push(Reason::new(super::name_of(&image), why, "try again"));
                    continue;
                }
                None => {
                    let span = image.size.max(1).next_multiple_of(WINDOW_STEP);
                    if WINDOWS_END - self.next_window < span {
                        let why = "cannot be carried: there are too many objects, or they are too large";
                        reasons.push(Reason::new(super::name_of(&image), why, ""));
                        continue;
                    }
                    image.window = self.next_window;
                    self.next_window += span;
                    if let Some(file) = opened {
                        let image = image.clone();
                        let held = Held {
                            file,
                            image,
                            span,
                            baseline: None,
                            is_open,
                            was_open: is_open,
                            was_stored: false,
                            has_views: false,
                            mapped: Extents::new(),
                            seen_at: since_epoch().as_secs(),
                            holes: Extents::new(),
                            now,
                            before: None,
                        };
                        self.held.insert(id, held);
                    }
                }
            }
            objects.push(image);
        }
        self.held.retain(|id, _| objects.iter().any(|o| o.id == *id));
        for vma in layout.vmas.iter_mut().filter(|v| v.kind() == VmaKind::VmaMemfdShared) {
            let object = objects.iter().find(|o| o.id == vma.shm_inode);
            let sealed = libc::F_SEAL_WRITE.cast_unsigned();
            vma.never_writable |= object.is_some_and(|o| o.seals & sealed != 0);
        }
        let lost = |v: &Vma| from_object(v) && !objects.iter().any(|o| o.id == v.shm_inode);
        if let Some(vma) = layout.vmas.iter().find(|v| lost(v)).filter(|_| !running && reasons.is_empty()) {
            let name = format!("mapping {:x}-{:x}", vma.start, vma.end);
            return Err(ObjectError::Sys { step: "opening", name, errno: nix::errno::Errno::ENOENT });
        }
        layout.vmas.retain(|v| !lost(v));
        layout.objects = objects;
        Ok(reasons)
    }

    /// Whether the process has a descriptor of this object, by the last look.
    pub fn is_open(&self, id: u64) -> bool {
        self.held.get(&id).is_none_or(|held| held.is_open)
    }

    /// The object to whose window an address belongs.
    pub fn at(&self, address: u64) -> Option<&Object> {
        self.find(address).map(|held| &held.image)
    }

    fn find(&self, address: u64) -> Option<&Held> {
        self.held.values().find(|held| {
            let (start, end) = window_range(&held.image);
            (start..end).contains(&address)
        })
    }

    /// Reads whole pages of a window, all of one object, and returns how many bytes there are. What lies in
    /// the last page behind the object's end is read where it is mapped (`layout`), if it is.
    ///
    /// # Errors
    /// See [`ObjectError`].
    pub fn read(
        &self,
        address: u64,
        into: &mut [u8],
        layout: &Layout,
        memory: &Memory,
    ) -> Result<usize, ObjectError> {
        let Some(held) = self.find(address) else { return Ok(0) };
        let offset = address - held.image.window;
        let mut filled = 0;
        while filled < into.len() {
            match held.file.read_at(&mut into[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ObjectError::sys("reading", super::name_of(&held.image))(e)),
            }
        }
        let page = usize::try_from(PAGE_BYTES).unwrap_or(4096);
        let tail = filled % page;
        if tail != 0 {
            let last = filled - tail;
            into[filled..last + page].fill(0);
            if let Some(mapped) = mapped_at(layout, &held.image, offset + last as u64) {
                let mut whole = vec![0; page];
                // Unmapped meanwhile: the next look finds out.
                if memory.read_exact(mapped, &mut whole).is_ok() {
                    into[filled..last + page].copy_from_slice(&whole[tail..]);
                }
            }
            filled = last + page;
        }
        Ok(filled)
    }

    /// The pages that hold something, of these addresses of the window; of huge pages all, because their file
    /// system does not tell.
    pub(super) fn data(held: &Held, of: &Extents) -> Extents {
        let mut data = Extents::new();
        let (start, end) = window_range(&held.image);
        if held.image.page_bytes != 0 {
            of.overlap(start, end).for_each(|(s, e)| data.insert(s, e));
            return data;
        }
        let size = held.image.size;
        let seek = |at: u64, whence| {
            lseek64(&held.file, i64::try_from(at).unwrap_or(i64::MAX), whence)
                .map(|v| u64::try_from(v).unwrap_or(0))
        };
        for (first, last) in of.overlap(start, end) {
            let (mut at, last) = (first - start, (last - start).min(size));
            while at < last {
                // ENXIO: nothing but a hole up to the end.
                let Ok(from) = seek(at, Whence::SeekData) else { break };
                let to = seek(from, Whence::SeekHole).unwrap_or(last).min(last);
                if from >= last {
                    break;
                }
                let (from_page, to_page) = (from & !(PAGE_BYTES - 1), to.next_multiple_of(PAGE_BYTES));
                data.insert(start + from_page, (start + to_page).min(end));
                at = to.max(from + 1);
            }
        }
        data
    }
}

impl Held {
    /// Takes down where it is mapped: what was stored through a mapping that is gone is not reported.
    pub(super) fn note_views(&mut self, layout: &Layout, id: u64) {
        let mut mapped = Extents::new();
        for vma in layout.vmas.iter().filter(|v| by_window(v) && v.shm_inode == id) {
            let (start, end) = (vma.offset, vma.offset + (vma.end - vma.start));
            self.has_views |= mapped.overlap(start, end).next().is_some();
            mapped.insert(start, end);
        }
        mapped.iter().for_each(|(start, end)| self.mapped.remove(start, end));
        self.has_views |= !self.mapped.is_empty();
        self.mapped = mapped;
    }

    /// Whether it can only have been changed by stores that the tracker has reported: there were some, and
    /// nothing else reaches it than mappings that were there all along, each page by one. A segment tells
    /// when it was last attached or detached, to the second.
    pub(super) fn is_changed_by_stores_only(&self) -> bool {
        // By a clock that is up to a tick behind ours.
        let attached = self.now.attached.iter().any(|at| at.saturating_add(1) >= self.seen_at);
        self.was_stored && !self.was_open && !self.has_views && !attached
    }
}

pub(super) fn since_epoch() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Where a page of an object is mapped.
fn mapped_at(layout: &Layout, object: &Object, offset: u64) -> Option<u64> {
    let of_it = |v: &&Vma| super::by_window(v) && v.shm_inode == object.id;
    let vma = layout
        .vmas
        .iter()
        .filter(of_it)
        .find(|v| (v.offset..v.offset + (v.end - v.start)).contains(&offset))?;
    Some(vma.start + (offset - vma.offset))
}

/// All ways to each object.
fn leads(
    pid: Tid,
    vmas: &[Vma],
    passed_over: &HashSet<i32>,
) -> Result<BTreeMap<(u64, i32), Vec<Lead>>, ObjectError> {
    let mut leads: BTreeMap<(u64, i32), Vec<Lead>> = BTreeMap::new();
    for vma in vmas.iter().filter(|v| from_object(v)) {
        let kind = match vma.kind() {
            VmaKind::VmaSysv => ObjectKind::ObjectSysv,
            VmaKind::VmaAnonShared => ObjectKind::ObjectHugeShared,
            _ => ObjectKind::ObjectMemfd,
        };
        let path = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end));
        let lead = Lead { id: vma.shm_inode, kind, page_bytes: vma.page_bytes, path, is_descriptor: false };
        leads.entry((lead.id, kind.into())).or_default().push(lead);
    }
    let mut once: HashMap<u64, ()> = HashMap::new();
    for lead in find::open_memfds(pid, passed_over)? {
        // A process may have one open very often; one more way is enough.
        if once.insert(lead.id, ()).is_none() {
            leads.entry((lead.id, lead.kind.into())).or_default().push(lead);
        }
    }
    Ok(leads)
}
